"""Costs that only measuring tells: met or refused, however wrong the predictions are, and not by much too small."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import RecipeError
from compressor.target_search import Cost, Probe, Reading, meet_targets

BASELINE = 10.0


def cost_of(fixed: float, slope: float, bend: float, goal: float, asked: list[int], steps: int) -> Cost[int]:
    """A network is a number of steps taken. What is measured is a factor, a constant and a curve off the prediction."""

    def predict(network: int) -> float:
        return 1 - network / steps

    def measure(network: int) -> Reading:
        asked.append(network)
        return Reading(BASELINE * (fixed + slope * predict(network) ** bend), BASELINE)

    def goal_of(baseline: float) -> float:
        return goal * baseline

    return Cost("stages[1].target.x", predict, measure, None, goal_of, "{:.3g} ms".format, 0.97, 5)


CURVES = st.tuples(st.floats(0.01, 0.5), st.floats(0.3, 3), st.floats(0.7, 1.5), st.floats(0.05, 2))


@given(curves=st.lists(CURVES, min_size=1, max_size=3), steps=st.integers(1, 1000), deepest=st.floats(0.1, 0.95))
def test_all_goals_are_met_or_one_is_refused(
    curves: list[tuple[float, float, float, float]], steps: int, deepest: float
) -> None:
    asked: dict[str, list[int]] = {str(i): [] for i in range(len(curves))}
    costs = {str(i): cost_of(*curve, asked[str(i)], steps) for i, curve in enumerate(curves)}
    smallest = max(1, int(deepest * steps))

    def shrunk(wanted: Mapping[str, float]) -> int:
        """The fewest steps after which every predicted cost is as low as asked."""
        return next(
            n for n in range(smallest + 1) if all(cost.predict(n) <= wanted[name] for name, cost in costs.items())
        )

    def used(network: int) -> float:
        return max(cost.measure(network).measured / cost.goal(BASELINE) for cost in costs.values())

    if used(smallest) > 1:
        with pytest.raises(RecipeError, match=r"stages\[1\]\.target\.x: found .* reachable here: .* to .* ms \("):
            meet_targets(shrunk, costs, smallest=smallest, whole=0)
        return
    for measured in asked.values():
        measured.clear()
    targets, tried = meet_targets(shrunk, costs, smallest=smallest, whole=0)
    taken = shrunk(targets)
    assert all(taken in measured for measured in asked.values()), "what is returned was measured"
    assert len(tried) <= 2 + 5
    assert used(taken) <= 1
    last_met = next(found for found in reversed(tried) if all(probe.met for probe in found.values()))
    assert max(probe.used for probe in last_met.values()) == used(taken)
    if taken > 0:
        assert used(max(taken - 1 - steps // 50, 0)) > 0.85, "not much smaller than it had to be"


def test_nothing_is_tried_twice_where_networks_come_in_coarse_steps() -> None:
    asked: list[int] = []
    cost = cost_of(0.1, 0.9, 1.0, 0.75, asked, 4)
    targets, tried = meet_targets(
        lambda wanted: next(n for n in range(4) if cost.predict(n) <= wanted["x"]), {"x": cost}, smallest=3, whole=0
    )
    assert sorted(asked) == sorted(set(asked)), "each is measured once"
    assert targets["x"] < 0.75 <= 0.1 + 0.9 * 0.75, "one step of 0.775 is too large"
    assert [probe["x"].met for probe in tried].count(False) >= 1


def test_a_whole_network_that_meets_its_goals_is_taken() -> None:
    asked: list[int] = []
    cost = cost_of(0.1, 0.9, 1.0, 1.0, asked, 4)
    targets, tried = meet_targets(lambda _: 99, {"x": cost}, smallest=3, whole=0)
    assert targets == {"x": 1.0}
    assert asked == [0]
    assert tried == [{"x": Probe(10.0, 10.0, predicted=10.0, goal=10.0)}]


def test_a_lucky_reading_is_not_taken() -> None:
    """First readings are a fifth too low; the network taken truly costs no more than was asked for."""
    asked: list[int] = []
    cost = cost_of(0.0, 1.0, 1.0, 0.5, asked, 100)

    def measure(network: int) -> Reading:
        return Reading(0.8 * cost.measure(network).measured, BASELINE)

    def shrunk(wanted: Mapping[str, float]) -> int:
        return next(n for n in range(91) if cost.predict(n) <= wanted["x"])

    trusting = replace(cost, measure=measure)
    targets, _ = meet_targets(shrunk, {"x": trusting}, smallest=90, whole=0)
    assert cost.measure(shrunk(targets)).fraction > 0.5, "one reading is believed: the case is real"
    targets, tried = meet_targets(shrunk, {"x": replace(trusting, confirm=cost.measure)}, smallest=90, whole=0)
    assert 0.4 < cost.measure(shrunk(targets)).fraction <= 0.5
    assert all(found["x"].measured == found["x"].predicted for found in tried if found["x"].met), "the worse is told"
