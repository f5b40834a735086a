"""Proof that torch, ONNX and IR compute the same logits from the same images.

Invariant: the checks only measure and `violations` compares with the thresholds, so a report can be written either way.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from compressor.environment import usable_cpus
from compressor.modes import evaluating
from compressor.outputs import LOGITS, named_tensors
from compressor.preprocess import InputSpec
from compressor.runtime import DEFAULT, F32, compile_ir, predict

FLOAT_DIFFERENCE = 1e-4  # of the range of the logits
INT8_AGREEMENT = 0.99
NUDGE = 1e-3  # pixel levels of 255; far below what any camera resolves
_BATCH = 32
OTHER_IMAGES = 16  # for outputs beside the logits, which may be whole feature maps


@dataclass(frozen=True)
class Pair:
    """Two runtimes compared over all images.

    Attributes:
        difference: Largest absolute difference of a logit, as a fraction of the first one's range over all images; None
            where a logit is NaN or infinite.
        agreement: Fraction of images with the same top-1 class.
        disagreeing: Number of images with another top-1 class.
        undecided: How many of those are ties: the first runtime's own logits of the two classes are closer than the
            float tolerance, so that rounding alone picks the winner.
    """

    difference: float | None
    agreement: float
    disagreeing: int
    undecided: int


@dataclass(frozen=True)
class Parity:
    """Figures of every pair of runtimes, keyed `first/second`.

    Attributes:
        kind: Which thresholds apply.
        images: Number of images compared.
        pairs: The figures.
        others: For outputs beside the logits, by name and pair of runtimes: float networks the largest difference as a
            fraction of the first one's range, INT8 networks the signal-to-noise ratio in dB; None where not finite.
        self_agreement: Measured when an INT8 threshold is missed, else None: the fraction of images on which the torch
            network gives the same class after its pixels move by `NUDGE`. Where it is low too, the network's decisions
            are close calls that any rounding tips, and no runtime is at fault.
    """

    kind: Literal["float", "int8"]
    images: int
    pairs: dict[str, Pair]
    self_agreement: float | None = None
    others: dict[str, dict[str, float | None]] = field(default_factory=dict)


def check_float(
    module: nn.Module, onnx_path: Path | None, ir_path: Path, images: NDArray[np.uint8], spec: InputSpec
) -> Parity:
    """Compare a float network with its ONNX file (None: not published) and its IR at f32.

    Images are (N, H, W, 3) RGB at network size.
    """
    outputs = {"torch": torch_logits(module, images, spec)}
    if onnx_path is not None:
        outputs["onnx"] = onnx_logits(onnx_path, images)
    outputs["ir_f32"] = ir_logits(ir_path, images, F32)
    others = _others(module, onnx_path, ir_path, images, spec, _difference)
    return Parity("float", len(images), compare(outputs), others=others)


def check_int8(
    quantized: nn.Module, onnx_path: Path | None, ir_path: Path, images: NDArray[np.uint8], spec: InputSpec
) -> Parity:
    """Compare a fake-quantised network with its Q/DQ ONNX (None: not produced) and its IR at f32 and as deployed."""
    outputs = {"torch": torch_logits(quantized, images, spec)}
    if onnx_path is not None:
        outputs["onnx"] = onnx_logits(onnx_path, images)
    outputs["ir_f32"] = ir_logits(ir_path, images, F32)
    outputs["ir_default"] = ir_logits(ir_path, images, DEFAULT)
    pairs = compare(outputs)
    self_agreement = None
    if any(pair.agreement < INT8_AGREEMENT for pair in pairs.values()):
        nudged = torch_logits(quantized, images, spec, nudge=NUDGE)
        self_agreement = float((nudged.argmax(1) == outputs["torch"].argmax(1)).mean())
    others = _others(quantized, onnx_path, ir_path, images, spec, _decibels)
    return Parity("int8", len(images), pairs, self_agreement, others)


def compare(outputs: Mapping[str, NDArray[np.float32]]) -> dict[str, Pair]:
    """Compare each pair of logits, each (N, classes)."""
    return {f"{a}/{b}": _pair(outputs[a], outputs[b]) for a, b in itertools.combinations(outputs, 2)}


def _pair(first: NDArray[np.float32], second: NDArray[np.float32]) -> Pair:
    if not len(first):
        raise ValueError("parity needs at least one image")
    span = float(np.ptp(first)) or 1.0
    difference = float(np.abs(first - second).max()) / span
    a, b = first.argmax(1), second.argmax(1)
    differing = np.flatnonzero(a != b)
    margins = first[differing, a[differing]] - first[differing, b[differing]]
    return Pair(
        difference=difference if np.isfinite(difference) else None,
        agreement=1 - len(differing) / len(first),
        disagreeing=len(differing),
        undecided=int((margins <= FLOAT_DIFFERENCE * span).sum()),
    )


def violations(parity: Parity) -> list[str]:
    """Return one sentence per missed threshold; empty when the runtimes agree.

    Float: difference at most 1e-4 of the range, top-1 equal except for ties within that tolerance (they are counted in
    `undecided` and reported). INT8: top-1 agreement at least 99 %, ties not excused.
    """
    found = []
    for name, pair in parity.pairs.items():
        first, _, second = name.partition("/")
        if pair.difference is None:
            found.append(f"{parity.kind} parity: {first} or {second} gives NaN or infinite logits")
        elif parity.kind == "int8":
            if pair.agreement < INT8_AGREEMENT:
                found.append(
                    f"int8 parity: {first} and {second} agree on the class of {pair.agreement:.1%} of {parity.images} "
                    f"images; {INT8_AGREEMENT:.0%} are needed{_excuse(parity)}"
                )
        else:
            if pair.difference > FLOAT_DIFFERENCE:
                found.append(
                    f"float parity: {first} and {second} differ by {pair.difference:.1e} of the logits' range; "
                    f"at most {FLOAT_DIFFERENCE:.0e} is allowed"
                )
            if pair.disagreeing > pair.undecided:
                found.append(
                    f"float parity: {first} and {second} disagree on the class of {pair.disagreeing} of "
                    f"{parity.images} images, {pair.undecided} of them ties"
                )
    for name, figures in parity.others.items():
        for runtimes, figure in figures.items():
            if figure is None:
                found.append(f"{parity.kind} parity: output '{name}' of {runtimes} has NaN or infinite values")
            elif parity.kind == "float" and figure > FLOAT_DIFFERENCE:
                found.append(
                    f"float parity: output '{name}' of {runtimes} differs by {figure:.1e} of its range; "
                    f"at most {FLOAT_DIFFERENCE:.0e} is allowed"
                )
    return found


def _others(
    module: nn.Module,
    onnx_path: Path | None,
    ir_path: Path,
    images: NDArray[np.uint8],
    spec: InputSpec,
    judge: Callable[[NDArray[np.float32], NDArray[np.float32]], float],
) -> dict[str, dict[str, float | None]]:
    """Compare what a network returns beside its logits, for a few images."""
    first = torch_outputs(module, images[:1], spec)
    if len(first) == 1:
        return {}
    some = images[:OTHER_IMAGES]
    wanted = torch_outputs(module, some, spec)
    got = {"ir_f32": _ir_outputs(ir_path, some)}
    if onnx_path is not None:
        got["onnx"] = _onnx_outputs(onnx_path, some, tuple(wanted))
    found: dict[str, dict[str, float | None]] = {}
    for name in [name for name in wanted if name != LOGITS]:
        for runtime, outputs in got.items():
            figure = judge(wanted[name], outputs[name])
            found.setdefault(name, {})[f"torch/{runtime}"] = figure if np.isfinite(figure) else None
    return found


def _difference(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    return float(np.abs(first - second).max()) / (float(np.ptp(first)) or 1.0)


def _decibels(signal: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    noise = float(np.square(signal - other).mean())
    return float(10 * np.log10(max(float(np.square(signal).mean()), 1e-30) / max(noise, 1e-30)))


def _excuse(parity: Parity) -> str:
    if parity.self_agreement is None or parity.self_agreement >= INT8_AGREEMENT:
        return ""
    return (
        f" (torch agrees with itself on only {parity.self_agreement:.1%} when pixels move by {NUDGE:g} of a level: "
        "its decisions are close calls, so train longer before or after quantizing)"
    )


def torch_logits(
    module: nn.Module, images: NDArray[np.uint8], spec: InputSpec, *, nudge: float = 0.0
) -> NDArray[np.float32]:
    """Logits (N, classes) of a network for images (N, H, W, 3); see `torch_outputs`."""
    return torch_outputs(module, images, spec, nudge=nudge, only=LOGITS)[LOGITS]


def torch_outputs(
    module: nn.Module, images: NDArray[np.uint8], spec: InputSpec, *, nudge: float = 0.0, only: str | None = None
) -> dict[str, NDArray[np.float32]]:
    """Outputs of a network in evaluation mode by name, for images (N, H, W, 3); the module's modes are restored.

    Args:
        module: Takes normalised (N, 3, H, W).
        images: RGB at network size.
        spec: Normalisation.
        nudge: Standard deviation of seeded noise added to the pixels, in levels of 255.
        only: Name of the one output that is asked for.
    """
    device = next(module.parameters()).device
    mean, std = (torch.tensor(values, device=device).reshape(1, 3, 1, 1) for values in (spec.mean, spec.std))
    generator = torch.Generator().manual_seed(0)
    rows: dict[str, list[NDArray[np.float32]]] = {}
    with evaluating(module):
        for start in range(0, len(images), _BATCH):
            planes = _planes(images[start : start + _BATCH])
            if nudge:
                planes = planes + nudge * torch.randn(planes.shape, generator=generator)
            for name, value in named_tensors(module((planes.to(device) / 255 - mean) / std)).items():
                if only in (None, name):
                    rows.setdefault(name, []).append(value.float().cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def _planes(images: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()  # channels_last in memory


def onnx_logits(path: Path, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Logits (N, classes) of a published ONNX file from onnxruntime for images (N, H, W, 3)."""
    return _onnx_outputs(path, images, (LOGITS,))[LOGITS]


def _onnx_outputs(path: Path, images: NDArray[np.uint8], names: tuple[str, ...]) -> dict[str, NDArray[np.float32]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cpus()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    rows = [
        session.run(list(names), {"image": _planes(images[start : start + _BATCH]).contiguous().numpy()})
        for start in range(0, len(images), _BATCH)
    ]
    return {name: np.concatenate(parts) for name, parts in zip(names, zip(*rows, strict=True), strict=True)}


def _ir_outputs(path: Path, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    compiled = compile_ir(path, "LATENCY", F32)
    rows: dict[str, list[NDArray[np.float32]]] = {}
    for image in images:
        for port, value in compiled([image[None]]).items():
            rows.setdefault(port.get_any_name(), []).append(np.array(value, np.float32))
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def ir_logits(xml: Path, images: NDArray[np.uint8], config: Mapping[str, str] = DEFAULT) -> NDArray[np.float32]:
    """Logits (N, classes) of a published IR through its own preprocessing for images (N, h, w, 3)."""
    return predict(xml, images, config)
