"""Proof that torch, ONNX and IR compute the same logits from the same images.

Invariant: the checks only measure and `violations` compares with the thresholds, so a report can be written either way.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from compressor.environment import usable_cpus
from compressor.preprocess import InputSpec
from compressor.runtime import DEFAULT, F32, predict

FLOAT_DIFFERENCE = 1e-4  # of the range of the logits
INT8_AGREEMENT = 0.99
NUDGE = 1e-3  # pixel levels of 255; far below what any camera resolves
_BATCH = 32


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
        self_agreement: Measured when an INT8 threshold is missed, else None: the fraction of images on which the torch
            network gives the same class after its pixels move by `NUDGE`. Where it is low too, the network's decisions
            are close calls that any rounding tips, and no runtime is at fault.
    """

    kind: Literal["float", "int8"]
    images: int
    pairs: dict[str, Pair]
    self_agreement: float | None = None


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
    return Parity("float", len(images), compare(outputs))


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
    return Parity("int8", len(images), pairs, self_agreement)


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
    return found


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
    """Logits (N, classes) of a network in evaluation mode for images (N, H, W, 3); the module's modes are restored.

    Args:
        module: Takes normalised (N, 3, H, W).
        images: RGB at network size.
        spec: Normalisation.
        nudge: Standard deviation of seeded noise added to the pixels, in levels of 255.
    """
    modes = [(child, child.training) for child in module.modules()]
    device = next(module.parameters()).device
    mean, std = (torch.tensor(values, device=device).reshape(1, 3, 1, 1) for values in (spec.mean, spec.std))
    try:
        module.eval()
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            rows = []
            for start in range(0, len(images), _BATCH):
                planes = _planes(images[start : start + _BATCH])
                if nudge:
                    planes = planes + nudge * torch.randn(planes.shape, generator=generator)
                rows.append(module((planes.to(device) / 255 - mean) / std).float().cpu().numpy())
    finally:
        for child, training in modes:
            child.training = training
    return np.concatenate(rows)


def _planes(images: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()  # channels_last in memory


def onnx_logits(path: Path, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Logits (N, classes) of a published ONNX file from onnxruntime for images (N, H, W, 3)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cpus()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    rows = [
        session.run(["logits"], {"image": _planes(images[start : start + _BATCH]).contiguous().numpy()})[0]
        for start in range(0, len(images), _BATCH)
    ]
    return np.concatenate(rows)


def ir_logits(xml: Path, images: NDArray[np.uint8], config: Mapping[str, str] = DEFAULT) -> NDArray[np.float32]:
    """Logits (N, classes) of a published IR through its own preprocessing for images (N, h, w, 3)."""
    return predict(xml, images, config)
