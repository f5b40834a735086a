"""Accuracy and its uncertainty.

Invariant: counts come in, fractions 0..1 go out; a ragged last batch can never weigh more than its images.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def top1(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Whether the largest logit is at the label, per image: `(N, C)`, `(N,)` -> `(N,)`."""
    return np.asarray(logits.argmax(axis=1) == labels)


def probabilities(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Softmax over the last axis: `(N, C)` -> `(N, C)`."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def calibration_error(confidences: NDArray[np.floating], hits: NDArray[np.bool_], bins: int = 15) -> float:
    """How far confidence is from being right: expected calibration error (arXiv 1706.04599) over bins of equal width.

    Args:
        confidences: (N,) probability of the class that was named, 0..1.
        hits: (N,) whether it was the right one.
        bins: Of confidence.
    """
    if not len(hits):
        raise ValueError("calibration needs at least one image")
    place = np.clip(np.ceil(confidences * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(place, hits.astype(np.float64) - confidences, bins)
    return float(np.abs(gaps).sum() / len(hits))


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927, doi 10.1080/01621459.1927.10502953)."""
    if total < 1:
        raise ValueError("an interval needs at least one image")
    p = correct / total
    centre = p + Z95**2 / (2 * total)
    spread = Z95 * math.sqrt(p * (1 - p) / total + Z95**2 / (4 * total**2))
    scale = 1 + Z95**2 / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def paired_interval(
    first: Sequence[bool] | NDArray[np.bool_], second: Sequence[bool] | NDArray[np.bool_]
) -> tuple[float, float]:
    """95 % interval of the difference of two accuracies (first - second) on the same images.

    Wald interval for paired proportions with the Agresti-Min adjustment of +0.5 per cell (doi 10.1002/sim.1781).
    """
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    if a.shape != b.shape or a.size < 1:
        raise ValueError(f"paired accuracies need the same images, got {a.shape} and {b.shape}")
    only_first = float((a & ~b).sum()) + 0.5
    only_second = float((b & ~a).sum()) + 0.5
    n = a.size + 2.0
    difference = (only_first - only_second) / n
    spread = Z95 * math.sqrt(only_first + only_second - (only_first - only_second) ** 2 / n) / n
    return max(-1.0, difference - spread), min(1.0, difference + spread)
