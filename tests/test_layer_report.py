"""The layers' costs add up to the network's, nothing unknown becomes 0, and INT8 is recommended where it is faster."""

from collections.abc import Iterator
from itertools import count as numbers

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separable_network import SeparableNetwork
from torch import Tensor, nn

from compressor.layer_report import FLOAT_IR, INT8_IR, NOISE, Costs, compare_layers, costs_of, recommend, untold
from compressor.models.counting import count
from compressor.profiling import Operation

NETWORK, EXAMPLE = SeparableNetwork().eval(), torch.zeros(1, 3, 32, 32)
LAYERS = list(count(NETWORK, EXAMPLE).per_layer)
COUNTED = st.floats(0, 100, allow_subnormal=False)


def operations(times: dict[str, float], precision: str = "f32") -> Iterator[Operation]:
    """What a plugin would make of a chain of layers: nothing is fused, each reads the one before."""
    before = "image"
    for name, ms in times.items():
        path = f"/{name.replace('.', '/')}/Conv"
        yield Operation(path, "Convolution", precision, ms, (path,), (before,))
        before = path


def resize(ms: float) -> Operation:
    return Operation("resize", "Interpolate", "u8", ms, ("Interpolate_7",), ("image",))


@settings(max_examples=30)
@given(
    st.lists(COUNTED, min_size=len(LAYERS), max_size=len(LAYERS)), st.floats(0.001, 100), st.floats(0.01, 1000), COUNTED
)
def test_layers_and_the_rest_add_up_to_the_latency(
    times: list[float], before: float, latency_ms: float, reordering: float
) -> None:
    chain = list(operations(dict(zip(LAYERS, times, strict=True))))
    reorder = Operation("reorder", "Reorder", "bf16", reordering, ("",), (chain[2].name,))
    costs = costs_of(NETWORK, EXAMPLE, [resize(before), *chain, reorder], latency_ms)
    rows = [*costs.layers.values(), costs.totals["rest"]]
    assert sum(row["share"] for row in rows) == pytest.approx(1, abs=1e-5)
    assert sum(row["ms"] for row in rows) == pytest.approx(latency_ms, abs=1e-5)
    assert sum(row["macs"] for row in costs.layers.values()) == count(NETWORK, EXAMPLE).macs
    assert costs.totals["reorders"]["bf16"]["count"] == 1
    layer = costs.layers[LAYERS[2]]
    assert layer["ms"] + 1e-6 >= costs.totals["reorders"]["bf16"]["ms"], "its time is part of the layer's it reads"


def test_rows_say_what_the_layers_are() -> None:
    costs = costs_of(NETWORK, EXAMPLE, list(operations(dict.fromkeys(LAYERS, 1.0), "u8")), 8.0)
    assert list(costs.layers) == LAYERS == list(costs.kinds)
    assert costs.layers["stem"] == {
        "in": 3,
        "out": 16,
        "macs": 3 * 9 * 16 * 16 * 16,
        "precision": "u8",
        "ms": 1.0,
        "share": 0.125,
    }
    assert [costs.kinds[name] for name in ("stem", "first.depthwise", "first.pointwise", "head")] == [
        *("conv", "depthwise", "conv", "linear")
    ]
    assert costs.totals == {"rest": {"ms": 0.0, "share": 0.0}, "reorders": {}}
    assert untold({"result": costs}) == []


def test_what_no_counter_is_named_after_is_unknown_and_said_to_be() -> None:
    told = dict.fromkeys(LAYERS[:3], 2.0)
    costs = costs_of(NETWORK, EXAMPLE, list(operations(told)), 6.0)
    assert [row["ms"] for row in costs.layers.values()] == [2.0] * 3 + [None] * (len(LAYERS) - 3)
    assert costs.layers[LAYERS[-1]]["share"] is None
    assert costs.layers[LAYERS[-1]]["precision"] is None
    assert costs.layers[LAYERS[-1]]["macs"] == 32 * 6
    notes = untold(
        {"baseline": costs_of(NETWORK, EXAMPLE, list(operations(dict.fromkeys(LAYERS, 1.0))), 1), "x": costs}
    )
    assert notes == [
        f"x: milliseconds of {len(LAYERS) - 3} layers could not be told apart; what they take counts for the layers "
        "before"
    ]
    silent = costs_of(NETWORK, EXAMPLE, list(operations(dict.fromkeys(LAYERS, 0.0))), 6.0)
    assert {row["ms"] for row in [*silent.layers.values(), silent.totals["rest"]]} == {None}, "no counter counted"


def test_a_layer_that_runs_twice_has_both_times_and_both_precisions() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x))

    first, again = (
        Operation(f"/conv{call}/Conv", "Convolution", precision, ms, (f"/conv{call}/Conv",), ())
        for call, precision, ms in (("", "u8", 1.0), ("_1", "f32", 2.0))
    )
    pooled = Operation("pool", "Pooling", "bf16", 1.0, ("/pool",), ("/conv_1/Conv",))
    costs = costs_of(Twice(), EXAMPLE, [first, again, pooled], 8.0)
    assert costs.layers["conv"]["ms"] == 8.0
    assert costs.layers["conv"]["precision"] == "f32+u8", "of the layer itself, not of what follows it"
    assert costs.layers["conv"]["macs"] == 2 * 9 * 32 * 32


def test_a_layer_that_is_not_there_has_no_figures() -> None:
    number = numbers()
    rows = {name: {"ms": next(number)} for name in "abcd"}
    kinds = dict.fromkeys(rows, "conv")
    before = Costs({name: rows[name] for name in "abc"}, kinds, {})
    after = Costs({name: rows[name] for name in "adc"}, {**kinds, "d": "linear", "a": "depthwise"}, {})
    compared = compare_layers(before, after)
    assert [row["layer"] for row in compared] == ["a", "b", "c", "d"]
    assert [row["baseline"] for row in compared] == [{"ms": 0}, {"ms": 1}, {"ms": 2}, None]
    assert [row["result"] for row in compared] == [{"ms": 0}, None, {"ms": 2}, {"ms": 3}]
    assert compared[0]["kind"] == "conv", "what it was before"


def test_without_quantization_the_float_ir_is_all_there_is() -> None:
    assert recommend(None, None, 0.9) == (FLOAT_IR, None)


@given(st.floats(0.01, 1000), st.floats(0.1, 10))
def test_int8_is_recommended_where_it_is_faster_by_more_than_noise(int8_ms: float, gain: float) -> None:
    artifact, note = recommend(int8_ms, gain * int8_ms, 0.9125)
    if gain > 1 + NOISE + 1e-9:
        assert (artifact, note) == (INT8_IR, None)
    elif gain < 1 + NOISE - 1e-9:
        assert artifact == FLOAT_IR
        assert note is not None
        assert f"{int8_ms:.4g} ms, the float IR {gain * int8_ms:.4g} ms" in note
        assert "its test accuracy was not measured, that of the INT8 IR is 0.9125" in note


def test_a_float_ir_that_misses_the_budget_is_not_recommended() -> None:
    artifact, note = recommend(1.0, 1.0, None, ["budget.size_bytes: measured 8, above the bound of 4"])
    assert artifact == INT8_IR
    assert note is not None
    assert note.startswith("INT8 gains nothing on this CPU: 1 ms, the float IR 1 ms")
    assert note.endswith("for the float IR misses budget.size_bytes: measured 8, above the bound of 4")
