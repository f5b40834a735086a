"""Accuracy and intervals against hand-computed values and laws."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.metrics import calibration_error, paired_interval, probabilities, top1, wilson_interval


def test_wilson_interval_matches_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263 -> 0.2553 to 0.3662; 0 of 20 -> 0 to 0.1611.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@given(total=st.integers(1, 5000), data=st.data())
def test_wilson_interval_holds_the_estimate_and_mirrors(total: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, total))
    low, high = wilson_interval(correct, total)
    assert 0 <= low <= correct / total + 1e-12
    assert correct / total - 1e-12 <= high <= 1
    other = wilson_interval(total - correct, total)
    assert (1 - other[1], 1 - other[0]) == pytest.approx((low, high))


def test_interval_of_no_images_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        wilson_interval(0, 0)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=300))
def test_paired_interval_is_antisymmetric_and_holds_the_adjusted_difference(pairs: list[tuple[bool, bool]]) -> None:
    first, second = ([p[i] for p in pairs] for i in (0, 1))
    low, high = paired_interval(first, second)
    assert low <= (sum(first) - sum(second)) / (len(pairs) + 2) <= high
    mirrored = paired_interval(second, first)
    assert mirrored == pytest.approx((-high, -low))


def test_paired_interval_is_narrower_when_errors_coincide() -> None:
    rng = np.random.default_rng(0)
    a = rng.random(500) < 0.9
    together = paired_interval(a, a)
    apart = paired_interval(a, rng.random(500) < 0.9)
    assert together[1] - together[0] < (apart[1] - apart[0]) / 3


def test_paired_interval_needs_the_same_images() -> None:
    with pytest.raises(ValueError, match="same images"):
        paired_interval([True], [True, False])


def test_top1_counts_images_not_batches() -> None:
    logits = np.array([[0.1, 0.9], [2.0, 1.0], [0.0, 1.0]])
    assert top1(logits, np.array([1, 0, 0])).tolist() == [True, True, False]


def test_calibration_error_by_hand() -> None:
    confidences = np.array([0.55, 0.58, 0.95, 0.95])  # with ten bins: two in one, two in another
    hits = np.array([True, False, True, True])
    expected = (abs(1 - 0.55 - 0.58) + abs(2 - 1.9)) / 4
    assert calibration_error(confidences, hits, bins=10) == pytest.approx(expected)
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0.0
    with pytest.raises(ValueError, match="at least one image"):
        calibration_error(np.zeros(0), np.zeros(0, bool))


@given(st.integers(0, 1000), st.integers(1, 60))
def test_calibration_error_lies_between_the_mean_gap_and_one(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    confidences, hits = rng.uniform(0.1, 1, count), rng.random(count) < 0.5
    error = calibration_error(confidences, hits)
    assert abs(confidences.mean() - hits.mean()) - 1e-9 <= error <= 1


def test_probabilities_add_up_and_do_not_overflow() -> None:
    found = probabilities(np.array([[1000.0, 1000.0], [-1000.0, 0.0]], np.float32))
    assert found.tolist() == [[0.5, 0.5], [0.0, 1.0]]
