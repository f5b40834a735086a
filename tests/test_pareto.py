"""The Pareto set agrees with brute force, intervals only spare points, hypervolumes agree with counting cells."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.pareto import Figure, Objective, Point, dominated_by, dominates, hypervolume, normalised_hypervolume

OBJECTIVES = (Objective("accuracy", maximize=True), Objective("latency_ms"), Objective("memory"))

small = st.integers(0, 5)
exact_points = st.lists(st.tuples(small, small, small), min_size=1, max_size=12)


def named(rows: list[tuple[int, int, int]]) -> dict[str, Point]:
    names = [objective.name for objective in OBJECTIVES]
    return {str(i): {k: Figure.exact(v) for k, v in zip(names, row, strict=True)} for i, row in enumerate(rows)}


@given(exact_points)
def test_exact_points_are_dominated_as_by_brute_force(rows: list[tuple[int, int, int]]) -> None:
    found = dominated_by(named(rows), OBJECTIVES)
    for i, (accuracy, latency, memory) in enumerate(rows):
        better = [
            str(j)
            for j, (a, ms, m) in enumerate(rows)
            if a >= accuracy and ms <= latency and m <= memory and (a, ms, m) != (accuracy, latency, memory)
        ]
        assert found[str(i)] == better


@given(exact_points)
def test_whoever_is_dominated_is_dominated_by_a_member_of_the_set(rows: list[tuple[int, int, int]]) -> None:
    found = dominated_by(named(rows), OBJECTIVES)
    front = {name for name, rivals in found.items() if not rivals}
    assert front
    assert all(front & set(rivals) for name, rivals in found.items() if name not in front)


@given(exact_points, st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_intervals_never_dominate_more(rows: list[tuple[int, int, int]], widths: list[int]) -> None:
    sure = named(rows)
    unsure = {
        name: {
            **point,
            "accuracy": Figure(point["accuracy"].value, point["accuracy"].value - w, point["accuracy"].value + w),
        }
        for (name, point), w in zip(sure.items(), widths, strict=False)
    }
    exact, within = dominated_by(sure, OBJECTIVES), dominated_by(unsure, OBJECTIVES)
    assert all(set(within[name]) <= set(exact[name]) for name in exact)


@pytest.mark.parametrize(
    ("accuracy", "latency", "dominated"),
    [
        (0.91, 2.0, False),  # less accurate, but within the interval: perhaps by chance
        (0.80, 2.0, True),  # less accurate beyond it
        (0.91, 3.0, True),  # within the interval, and slower
        (0.92, 2.0, False),  # a tie
        (0.93, 3.0, False),  # more accurate
    ],
)
def test_accuracy_alone_dominates_beyond_its_interval_only(accuracy: float, latency: float, dominated: bool) -> None:
    one = {"accuracy": Figure(0.92, 0.90, 0.94), "latency_ms": Figure.exact(2.0)}
    other = {"accuracy": Figure(accuracy, accuracy - 0.02, accuracy + 0.02), "latency_ms": Figure.exact(latency)}
    assert dominates(one, other, OBJECTIVES[:2]) is dominated


@given(st.lists(st.tuples(small, small, small), max_size=6), st.tuples(small, small, small))
def test_hypervolume_counts_the_dominated_cells(rows: list[tuple[int, int, int]], reference: tuple[int, ...]) -> None:
    cells = product(*(range(side) for side in reference))
    covered = sum(any(all(c <= x for c, x in zip(row, cell, strict=True)) for row in rows) for cell in cells)
    assert hypervolume(rows, reference) == covered


def test_hypervolume_by_hand() -> None:
    assert hypervolume([], (1, 1)) == 0
    assert hypervolume([(0.25,)], (1,)) == 0.75
    assert hypervolume([(1, 3), (3, 1)], (4, 4)) == 5  # 3 x 1 and 1 x 3, which share 1 x 1
    assert hypervolume([(1, 1), (4, 0)], (4, 4)) == 9  # what lies on the reference counts nothing
    assert hypervolume([(0, 0, 0), (1, 1, 1)], (2, 2, 2)) == 8


def test_a_normalised_volume_has_no_unit() -> None:
    def point(accuracy: float, latency: float) -> Point:
        return {"accuracy": Figure.exact(accuracy), "latency_ms": Figure.exact(latency), "memory": Figure.exact(7)}

    points = {"fast": point(0.8, 1), "good": point(0.9, 5), "both": point(0.85, 2)}
    # Between (0.8, 5) and (0.9, 1): "both" is better than half the accuracy times three quarters of the time.
    assert normalised_hypervolume(points, OBJECTIVES) == pytest.approx(0.375)
    seconds = {name: {**p, "latency_ms": Figure.exact(p["latency_ms"].value / 1000)} for name, p in points.items()}
    assert normalised_hypervolume(seconds, OBJECTIVES) == pytest.approx(0.375)
    assert normalised_hypervolume({"alone": point(0.9, 1)}, OBJECTIVES) == 0
