"""The values that the rest of the toolkit sees of a data set.

Invariant: `images[i]`, `labels[i]` and `names[i]` belong together, and images are at the network's size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compressor.preprocess import InputSpec


@dataclass(frozen=True)
class Split:
    """One side of the data.

    Attributes:
        images: uint8 (N, H, W, 3), RGB, read-only and memory-mapped: index it in batches.
        labels: int64 (N,), indices into the data set's labels.
        names: Where each image came from, relative to the data set.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: Sequence[int] | NDArray[np.int64]) -> "Split":
        """Those images alone, in that order, copied into memory."""
        rows = np.asarray(chosen, dtype=np.int64)
        return Split(self.images[rows], self.labels[rows], tuple(self.names[i] for i in rows))


@dataclass(frozen=True)
class Dataset:
    """Train, validation and test images, disjoint by content.

    Attributes:
        labels: Class names in index order, white space written `_`.
        train: What is learnt from; calibration images are taken from here.
        val: What choices are made on.
        test: What is measured once.
        spec: The preprocessing that made the images.
        fingerprint: sha256 over contents, order, labels, splits and preprocessing; the same on every machine.
        native_size: Median height and width of the images as they came, pixels.
        notes: Sentences for the report: duplicates dropped, alpha ignored, ...
        info: Counts per split and class and the like, fit for JSON.
    """

    labels: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    spec: InputSpec
    fingerprint: str
    native_size: tuple[int, int]
    notes: tuple[str, ...]
    info: dict[str, object]


def calibration_indices(split: Split, size: int, seed: int) -> NDArray[np.int64]:
    """Choose a class-balanced sample: counts per class differ by at most one while every class has images left.

    Args:
        split: What to choose from.
        size: How many; all of them when the split has fewer.
        seed: Decides which.

    Returns:
        Distinct indices into the split, (min(size, N),), the classes taking turns, so that every prefix is balanced.
    """
    if size < 1:
        raise ValueError(f"a calibration subset needs at least one image; size {size} asked for")
    rng = np.random.default_rng([seed, 0xCA11B])
    queues = [
        rng.permutation(np.flatnonzero(split.labels == label)) for label in rng.permutation(np.unique(split.labels))
    ]
    depth = max((len(queue) for queue in queues), default=0)
    turns = [queue[turn] for turn in range(depth) for queue in queues if turn < len(queue)]
    return np.asarray(turns[:size], np.int64)
