"""Where a network's time goes, layer by layer, before and after; and which precision is worth deploying.

Invariant: the milliseconds of all layers and of the rest add up to the measured latency, and what no counter could be
assigned to is None, never 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compressor.models.counting import count
from compressor.profiling import Operation, precisions_of_layers, times_of_layers
from compressor.pruning.coupling import is_depthwise
from compressor.quantization import unwrapped

FLOAT_IR, INT8_IR = "artifacts/result_fp32.xml", "artifacts/result_int8.xml"
# A compiled network keeps the luck of where its memory lies, and each IR is compiled once to be timed: what a latency
# search takes for near enough (`close` of `stage_targets.KINDS`) is no gain.
NOISE = 0.03
_DIGITS = 6  # of milliseconds and shares: finer than any clock


@dataclass(frozen=True)
class Costs:
    """What each layer of one network costs.

    Attributes:
        layers: By name, in the order of execution: `in`, `out` (channels), `macs`, `precision` (of the operation that
            the layer became; None = no operation is known to be it), `ms`, `share` (of the latency; with what follows
            the layer and has no weights).
        kinds: `conv`, `depthwise` or `linear`, by layer.
        totals: `rest`: `ms` and `share` of what belongs to no layer. `reorders`: `count` and `ms` of conversions of
            layout or precision, by precision; their time is part of the layers'.
    """

    layers: dict[str, dict[str, Any]]
    kinds: dict[str, str]
    totals: dict[str, Any]


def costs_of(module: nn.Module, example: Tensor, operations: Sequence[Operation], latency_ms: float) -> Costs:
    """Assign the time of a network to its layers.

    Counters slow every operation down, so their shares are taken, of the latency measured without them.

    Args:
        module: The network that was published, quantized or not.
        example: Input `(1, C, H, W)`; only its shape matters.
        operations: From `profile`, of its IR.
        latency_ms: Of the same IR with the same properties.
    """
    module = unwrapped(module)
    macs = count(module, example).per_layer
    times, rest = times_of_layers(operations, macs)
    precisions = precisions_of_layers(operations, macs)
    counted = rest + sum(times.values())

    def scaled(ms: float | None) -> dict[str, float | None]:
        if ms is None or not counted:
            return {"ms": None, "share": None}
        return {"ms": round(latency_ms * ms / counted, _DIGITS), "share": round(ms / counted, _DIGITS)}

    layers, kinds = {}, {}
    for name in macs:
        layer = module.get_submodule(name)
        kinds[name], widths = _describe(layer)
        own = {"macs": macs[name], "precision": precisions.get(name)}
        layers[name] = {**widths, **own, **scaled(times.get(name))}
    reorders: dict[str, list[float]] = {}
    for operation in operations:
        if operation.kind == "Reorder":
            reorders.setdefault(operation.precision, []).append(operation.ms)
    found = {precision: {"count": len(ms), "ms": scaled(sum(ms))["ms"]} for precision, ms in sorted(reorders.items())}
    return Costs(layers, kinds, {"rest": scaled(rest), "reorders": found})


def _describe(layer: nn.Module) -> tuple[str, dict[str, int]]:
    if isinstance(layer, nn.Linear):
        return "linear", {"in": layer.in_features, "out": layer.out_features}
    assert isinstance(layer, nn.modules.conv._ConvNd), "the counter counts nothing else"
    return "depthwise" if is_depthwise(layer) else "conv", {"in": layer.in_channels, "out": layer.out_channels}


def compare_layers(baseline: Costs, result: Costs) -> tuple[dict[str, Any], ...]:
    """One row for each layer, in the order of the baseline: `layer`, `kind`, `baseline`, `result`.

    A layer that a network does not have, because its block was dropped say, is None there. Layers of the result alone
    come last.
    """
    kinds = {**result.kinds, **baseline.kinds}
    names = dict.fromkeys((*baseline.layers, *result.layers))
    return tuple(
        {
            "layer": name,
            "kind": kinds[name],
            "baseline": baseline.layers.get(name),
            "result": result.layers.get(name),
        }
        for name in names
    )


def untold(costs: Mapping[str, Costs]) -> list[str]:
    """A note for each network with layers that no counter is named after."""
    missing = {name: sum(row["ms"] is None for row in value.layers.values()) for name, value in costs.items()}
    return [
        f"{name}: milliseconds of {number} layers could not be told apart; what they take counts for the layers before"
        for name, number in missing.items()
        if number
    ]


def recommend(
    int8_ms: float | None, float_ms: float | None, accuracy: float | None, missed_by_float: Sequence[str] = ()
) -> tuple[str, str | None]:
    """Which IR to deploy, and a note where that is not the obvious one.

    INT8 costs accuracy and is worth it where it is faster by more than noise.

    Args:
        int8_ms: Latency of the result's INT8 IR at OpenVINO's default precision; None where nothing was quantized.
        float_ms: Of its float IR, likewise, measured in turns with the other.
        accuracy: Test accuracy of the INT8 IR.
        missed_by_float: Bounds of the budget that the INT8 IR meets and the float IR does not.

    Returns:
        Path below the run folder, and the note.
    """
    if int8_ms is None or float_ms is None:
        return FLOAT_IR, None
    if float_ms > (1 + NOISE) * int8_ms:
        return INT8_IR, None
    found = (
        f"INT8 gains nothing on this CPU: {int8_ms:.4g} ms, the float IR {float_ms:.4g} ms at default precision "
        f"(a gain of {float_ms / int8_ms:.2f}x)"
    )
    if missed_by_float:
        return INT8_IR, f"{found}; it is recommended all the same, for the float IR misses {'; '.join(missed_by_float)}"
    known = "was not measured" if accuracy is None else f"is {accuracy:.4f}"
    return FLOAT_IR, (
        f"{found}, so the float IR is recommended; its test accuracy was not measured, that of the INT8 IR {known}"
    )
