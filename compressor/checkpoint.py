"""A network on disk: `model.json` says how to rebuild it, `model.safetensors` holds its tensors. No pickle.

Invariant: a fresh process rebuilds the very network, by replaying the edits on the architecture and then loading the
tensors strictly. Whatever does not fit is an error that names the file and the entry.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from compressor.artifacts import atomic_write, write_json
from compressor.errors import DataError, did_you_mean
from compressor.folding import apply_fold
from compressor.models import build
from compressor.models.weights import restore
from compressor.pruning.apply import apply_plan
from compressor.pruning.blocks import drop_blocks
from compressor.pruning.kernels import replace_kernels
from compressor.pruning.plan import PrunePlan

MODEL_JSON = "model.json"
MODEL_TENSORS = "model.safetensors"
CHECKPOINT_VERSION = 1


@dataclass(frozen=True)
class Network:
    """A module together with everything needed to rebuild it.

    Attributes:
        module: The network as it is.
        architecture: `{source, name, args, num_classes}`: what it was built from.
        edits: JSON-able structural edits since then, in order: `{type: prune, plan}`, `{type: replace_kernels,
            modules}`, `{type: drop_blocks, modules}`, `{type: fold_bn, pairs}`.
        quantizer: The quantizer's configuration; None for a float network.
        input: Channels, height and width of its input.
    """

    module: nn.Module
    architecture: dict[str, Any]
    edits: tuple[dict[str, Any], ...]
    quantizer: dict[str, Any] | None
    input: tuple[int, int, int]


def save_network(folder: Path, network: Network) -> None:
    """Write `model.safetensors` and then `model.json` into a folder, each atomically.

    Args:
        folder: Created if need be.
        network: What to save; its module is left as it is.

    Raises:
        DataError: If the module's state holds anything but tensors, or the description is not JSON.
        ResourceError: If the disk is full or the folder not writable.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in network.module.state_dict().items():
        if not isinstance(value, Tensor):
            raise DataError(f"{folder / MODEL_TENSORS}: state '{name}' is a {type(value).__name__}, not a tensor")
        # safetensors refuses shared storage and other memory formats than plain contiguous; a copy has neither.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    description = {
        "version": CHECKPOINT_VERSION,
        "architecture": network.architecture,
        "edits": list(network.edits),
        "quantizer": network.quantizer,
        "input": list(network.input),
    }
    folder.mkdir(parents=True, exist_ok=True)
    try:
        json.dumps(description, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{folder / MODEL_JSON}: the network's description cannot be written as JSON: {error}"
        ) from error
    atomic_write(folder / MODEL_TENSORS, save(tensors))
    write_json(folder / MODEL_JSON, description)


def load_network(folder: Path, module: nn.Module | None = None) -> Network:
    """Rebuild a saved network in eval mode on the CPU.

    Args:
        folder: Holds `model.json` and `model.safetensors`.
        module: The architecture before any edit, changed in place; built from `model.json` when None. Needed for
            networks that came from outside the toolkit (`source: custom`).

    Raises:
        DataError: If a file is missing, damaged, of an unknown version, or does not fit the architecture.
        UnsupportedModelError: If an edit does not fit the architecture.
        RecipeError: If the architecture cannot be built: its zoo or plugin is another one here, or it came from outside
            the toolkit (`source: custom`) and `module` is missing.
    """
    where = folder / MODEL_JSON
    description = _read_description(where)
    architecture, size = description["architecture"], description["input"]
    if module is None:
        module = build(
            architecture["source"], architecture["name"], architecture.get("args", {}), architecture["num_classes"]
        )
    example = torch.zeros(1, *size)
    for position, edit in enumerate(description["edits"]):
        _replay(module, edit, example, where=f"{where}: edits[{position}]")
    quantizer = description["quantizer"]
    if quantizer is not None:
        # Imported late: the quantizer takes seconds to import, and float networks need none.
        from compressor.quantization import load_quantized

        module = load_quantized(module, quantizer, example)
    _load_tensors(module, folder / MODEL_TENSORS)
    return Network(module.eval(), architecture, tuple(description["edits"]), quantizer, (size[0], size[1], size[2]))


def _read_description(where: Path) -> dict[str, Any]:
    try:
        value = json.loads(where.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{where}: not found; a saved network has {MODEL_JSON} and {MODEL_TENSORS} side by side"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, found {type(value).__name__}")
    if value.get("version") != CHECKPOINT_VERSION:
        raise DataError(
            f"{where}: version {value.get('version')!r} is not one this release reads ({CHECKPOINT_VERSION})"
        )
    architecture, size = value.get("architecture"), value.get("input")
    if not isinstance(architecture, dict) or not {"source", "name", "num_classes"} <= architecture.keys():
        raise DataError(f"{where}: 'architecture' must hold source, name, args and num_classes")
    if not isinstance(value.get("edits"), list):
        raise DataError(f"{where}: 'edits' is missing or not a list")
    if not isinstance(size, list) or len(size) != 3 or not all(isinstance(n, int) and 0 < n < 65536 for n in size):
        raise DataError(f"{where}: 'input' must be three positive sizes [channels, height, width], found {size!r}")
    if not isinstance(value.setdefault("quantizer", None), dict | None):
        raise DataError(f"{where}: 'quantizer' must be an object or null")
    return value


def _replay(module: nn.Module, edit: object, example: Tensor, *, where: str) -> None:
    replay: Mapping[str, Callable[[dict[str, Any]], None]] = {
        "prune": lambda e: apply_plan(module, PrunePlan.from_dict(e.get("plan"), where=f"{where}.plan"), example),
        # The weights follow from the file; inheriting them draws no random numbers.
        "replace_kernels": lambda e: replace_kernels(module, _names(e, where), init="inherit", seed=0),
        "drop_blocks": lambda e: drop_blocks(module, _names(e, where)),
        "fold_bn": lambda e: _fold(module, e, where),
    }
    kind = edit.get("type") if isinstance(edit, dict) else None
    if not isinstance(edit, dict) or not isinstance(kind, str) or kind not in replay:
        raise DataError(f"{where}: type {kind!r} is not one of {', '.join(replay)}{did_you_mean(str(kind), replay)}")
    replay[kind](edit)


def _names(edit: Mapping[str, Any], where: str) -> list[str]:
    names = edit.get("modules")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: 'modules' must be a list of module names")
    return names


def _fold(module: nn.Module, edit: Mapping[str, Any], where: str) -> None:

    pairs = edit.get("pairs")
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(name, str) for name in pair)
        for pair in pairs
    ):
        raise DataError(f"{where}: 'pairs' must be a list of [convolution, batchnorm] names")
    apply_fold(module, [(conv, norm) for conv, norm in pairs])


def _load_tensors(module: nn.Module, where: Path) -> None:
    try:
        tensors = load_file(where)
    except FileNotFoundError:
        raise DataError(
            f"{where}: not found; a saved network has {MODEL_JSON} and {MODEL_TENSORS} side by side"
        ) from None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{where}: damaged or not a safetensors file: {error}") from None
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if missing or unexpected or shapes:
        faults = [
            f"{len(names)} {label} (first: '{min(names)}')"
            for label, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if names
        ]
        raise DataError(f"{where}: its tensors do not fit {MODEL_JSON}: {', '.join(faults)}")
    restore(module, tensors, strict=True)
