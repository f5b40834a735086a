"""Targets and budgets: what is a bound, how it is written, and how it judges a measurement."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import RecipeError
from compressor.recipe import Bound, Budget
from compressor.recipe_bounds import parse_bound
from compressor.report import Footprint


@pytest.mark.parametrize(
    ("written", "value", "relative"),
    [
        (4.5e8, 4.5e8, False),
        (3, 3.0, False),
        ("0.4x", 0.4, True),
        ("1x", 1.0, True),
        (".5x", 0.5, True),
        ("2.x", 2.0, True),
    ],
)
def test_bounds_are_numbers_or_fractions_of_the_baseline(written: object, value: float, relative: bool) -> None:
    bound = parse_bound(written)
    assert bound == Bound(value, relative)
    assert parse_bound(bound.plain()) == bound
    assert bound.resolve(200.0) == (value * 200 if relative else value)


@pytest.mark.parametrize(
    "written", [0, -1, "0x", "0.4", "x", "-0.4x", "1e3x", "0.4 x", True, None, float("inf"), float("nan"), []]
)
def test_anything_else_is_no_bound(written: object) -> None:
    with pytest.raises(ValueError, match=r"not a bound|out of range"):
        parse_bound(written)


@given(st.floats(1e-9, 1e30), st.booleans())
def test_bounds_survive_being_written(value: float, relative: bool) -> None:
    bound = Bound(value, relative)
    assert parse_bound(bound.plain()) == bound


def test_a_fraction_of_nothing_is_an_error() -> None:
    with pytest.raises(RecipeError, match="a fraction of a baseline that was not measured"):
        Bound(0.4, relative=True).resolve(None)


BASE = {"macs": 1000, "latency_ms": 10.0, "throughput_fps": 100.0, "accuracy": 0.95}


def budget(**bounds: Any) -> Budget:
    return Budget.model_validate(bounds)


@pytest.mark.parametrize(
    ("bounds", "result", "missed"),
    [
        ({"macs": "0.5x"}, {"macs": 500}, None),
        ({"macs": "0.5x"}, {"macs": 501}, "budget.macs: measured 501, above the bound of 500 (0.5x)"),
        ({"macs": 400}, {"macs": 500}, "budget.macs: measured 500, above the bound of 400"),
        ({"latency_ms": "0.2x"}, {"latency_ms": 2.19}, None),
        ({"latency_ms": "0.2x"}, {"latency_ms": 2.21}, "budget.latency_ms: measured 2.21, above the bound of 2 (0.2x)"),
        ({"throughput_fps": "3x"}, {"throughput_fps": 300.0}, None),
        ({"throughput_fps": "3x"}, {"throughput_fps": 299.0}, "budget.throughput_fps: measured 299, below the bound"),
        ({"accuracy": 0.9}, {"accuracy": 0.91}, None),
        ({"accuracy": "1x"}, {"accuracy": 0.94}, "budget.accuracy: measured 0.94, below the bound of 0.95 (1x)"),
        ({"accuracy_drop": 0.03}, {"accuracy": 0.92}, None),
        ({"accuracy_drop": 0.03}, {"accuracy": 0.91}, "budget.accuracy_drop: measured 0.0400, above the bound of 0.03"),
        ({"accuracy_drop": 0.03}, {}, "budget.accuracy_drop: bound 0.03, but an accuracy was not measured"),
        ({"size_bytes": 5}, {}, "budget.size_bytes: bound 5, but the result's was not measured"),
        (
            {"size_bytes": "0.5x"},
            {"size_bytes": 4},
            "budget.size_bytes: bound 0.5x, but the baseline's was not measured",
        ),
    ],
)
def test_a_budget_judges_a_measurement(bounds: dict[str, Any], result: dict[str, Any], missed: str | None) -> None:
    violations = budget(**bounds).violations(result, BASE)
    assert len(violations) == (missed is not None)
    assert missed is None or violations[0].startswith(missed)


def test_latency_far_below_its_bound_is_overshoot() -> None:
    asked = budget(latency_ms="0.4x", macs="0.9x", latency_p95_ms=3.0)
    assert asked.overshoots({"latency_ms": 3.5, "macs": 10}, BASE) == []
    lines = asked.overshoots({"latency_ms": 2.0, "macs": 10}, BASE)
    assert lines == ["budget.latency_ms: measured 2, 0.50x of the bound of 4 (0.4x): more was given up than needed"]


def test_every_budget_key_is_a_footprint_name_or_the_drop() -> None:
    names = set(Budget.model_fields) - {"accuracy_drop"}
    assert names <= set(Footprint.__dataclass_fields__)
