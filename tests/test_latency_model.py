"""The latency model finds the costs that made its observations, and predicts no faster network for more channels."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.latency_model import LatencyModel, Observation, fit_latency, non_negative_least_squares
from compressor.profiling import Operation, layer_of, times_of_layers

TERMS = {"stem": (0.01, 0.0, 0.002, 0.0), "body": (0.0, 0.0, 0.0, 0.0001), "depthwise": (0.02, 0.001, 0.0, 0.0)}
REST = 0.05


def observed(widths: dict[str, tuple[int, int]], lanes: int) -> Observation:
    truth = LatencyModel(TERMS, REST, lanes, 0.0)
    latency = truth.latency(widths)
    return Observation(
        widths, {name: truth.of_layer(name, *width) / latency for name, width in widths.items()}, latency
    )


@pytest.mark.parametrize("lanes", [1, 16])
def test_costs_are_found_again(lanes: int) -> None:
    generator = np.random.default_rng(0)
    drawn = [tuple(int(width) for width in generator.integers(8, 128, 2)) for _ in range(10)]
    observations = [
        observed({"stem": (3, first), "body": (first, second), "depthwise": (second, second)}, lanes)
        for first, second in drawn
    ]
    model = fit_latency(observations)
    assert model.lanes == lanes
    assert model.rest == pytest.approx(REST)
    assert model.error < 1e-9
    unseen = {"stem": (3, 40), "body": (40, 72), "depthwise": (72, 72)}
    assert model.latency(unseen) == pytest.approx(observed(unseen, lanes).latency)
    assert LatencyModel.from_dict(json.loads(json.dumps(model.to_dict()))) == model


@given(
    st.lists(
        st.tuples(st.integers(1, 256), st.integers(1, 256), st.floats(0, 1), st.floats(0.01, 10)),
        min_size=3,
        max_size=8,
    )
)
def test_fewer_channels_are_never_predicted_to_be_slower(
    drawn: list[tuple[int, int, float, float]],
) -> None:
    observations = [
        Observation({"layer": (inputs, outputs)}, {"layer": share}, latency)
        for inputs, outputs, share, latency in drawn
    ]
    model = fit_latency(observations)
    sizes = range(1, 257, 15)
    for narrow, wide in itertools.pairwise(sizes):
        for other in sizes:
            assert model.latency({"layer": (narrow, other)}) <= model.latency({"layer": (wide, other)}) + 1e-12
            assert model.latency({"layer": (other, narrow)}) <= model.latency({"layer": (other, wide)}) + 1e-12


@given(st.integers(0, 2**32 - 1))
def test_the_least_squares_are_the_least_of_all_that_are_not_negative(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows, values = generator.normal(size=(7, 3)), generator.normal(size=7)
    found = non_negative_least_squares(rows, values)
    assert (found >= 0).all()
    residual = rows @ found - values
    # Karush-Kuhn-Tucker: no term that could still grow would help, and those in use are balanced.
    slope = rows.T @ residual
    assert (slope >= -1e-8).all()
    assert abs(slope[found > 0]).max(initial=0) < 1e-8


def test_operations_count_for_the_layer_they_come_from() -> None:
    def operation(name: str, ms: float, origins: str, *inputs: str) -> Operation:
        return Operation(name, "any", "f32", ms, tuple(origins.split(",")), inputs)

    layers = {"stem.conv", "blocks.1.0.conv_dw", "fc"}
    operations = [
        operation("resize", 1.0, "Interpolate_7"),
        operation("a", 2.0, "/stem/conv/Conv/WithoutBiases,/stem/conv/Conv,/stem/act/Relu", "resize"),
        operation("reorder", 4.0, "", "a"),
        operation("pool", 8.0, "/pool/MaxPool", "reorder"),
        operation("b", 16.0, "/blocks/blocks.1/blocks.1.0/conv_dw/Conv", "pool"),
        operation("logits", 32.0, "logits", "/blocks/blocks.1/blocks.1.0/conv_dw/Conv", "fc.weight"),
    ]
    times, rest = times_of_layers(operations, layers)
    assert times == {"stem.conv": 14.0, "blocks.1.0.conv_dw": 16.0, "fc": 32.0}
    assert rest == 1.0
    quantized = operation("logits", 1.0, "logits", "b", "/fc/fc/linear/0__1.0/QuantizeLinear_output_0")
    assert times_of_layers([quantized], layers)[0] == {"fc": 1.0}


@pytest.mark.parametrize(
    ("origin", "layer"),
    [
        ("/conv/Conv", "conv"),
        ("/conv_1/Conv", "conv"),
        ("/conv_2/Conv", "conv_2"),
        ("/conv/Relu", None),
        ("/other/Conv", None),
        ("conv.weight", "conv"),
        ("network.conv.weight", "conv"),
        ("/network/conv/Conv", "conv"),
        ("/network/network/network.conv/Conv", "conv"),
        ("/conv/conv/conv2d/0__1.0/QuantizeLinear_output_0", "conv"),
        ("/conv/conv/conv2d/0__0.0/DequantizeLinear", None),
        ("/network/other/Conv", None),
        ("", None),
    ],
)
def test_names_of_operations_lead_to_layers(origin: str, layer: str | None) -> None:
    assert layer_of(origin, {"conv", "conv_2"}) == layer
