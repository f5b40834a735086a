"""What networks return: a tensor of logits, or tuples and mappings that hold one.

Invariant: names and order depend on the structure of what is returned alone, so that torch, ONNX and IR mean the same
by each name; the logits come first and are called `logits`.
"""

import dataclasses
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from compressor.errors import UnsupportedModelError

LOGITS = "logits"
_PREFERRED = (LOGITS, "out")  # how mappings call them; torchvision says "out"


def named_tensors(output: object) -> dict[str, Tensor]:
    """All floating-point tensors of an output by name, the logits first as `logits`.

    A mapping's and a dataclass's entries have their keys as names, a tuple's `output_INDEX` (a named tuple's its
    fields); nested names are joined by `_`.

    Raises:
        UnsupportedModelError: None of them are logits: none has the shape (images, classes).
    """
    found = dict(_walk(output, ""))
    logits = _find_logits(found)
    return {LOGITS: found[logits], **{name: value for name, value in found.items() if name != logits}}


def logits_of(output: object) -> Tensor:
    """The logits `(N, classes)` of an output; a tensor is taken as it is.

    Raises:
        UnsupportedModelError: see `named_tensors`.
    """
    return output if isinstance(output, Tensor) else named_tensors(output)[LOGITS]


class AsTuple(nn.Module):
    """A network that returns the flat tuple of its named tensors, logits first; what exporters can trace."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(named_tensors(self.network(x)).values())


def _walk(value: object, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name or LOGITS, value
        return
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not isinstance(value, Mapping):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        value = dict(zip(value._fields, value, strict=True))
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _walk(part, f"{name}_{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _walk(part, f"{name or 'output'}_{index}")


def _find_logits(found: Mapping[str, Tensor]) -> str:
    tables = [name for name, value in found.items() if value.dim() == 2]
    chosen = next((name for name in (*_PREFERRED, *tables) if name in tables), None)
    if chosen is None:
        shapes = {name: tuple(value.shape) for name, value in found.items()} or "no tensor"
        raise UnsupportedModelError(
            f"the network returns {shapes}, none of shape (images, classes); only classifiers can be compressed"
        )
    return chosen
