"""Count what a binary image is made of: connected components, holes, smallest piece; many images at once.

Invariant: foreground is 8-connected and background 4-connected, and outside the image everything is background.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Topology:
    """Counts of a stack of images, one entry per image.

    Attributes:
        components: 8-connected foreground components, int64 (N,).
        holes: background components that do not touch the border, int64 (N,).
        smallest: pixels of the smallest foreground component, 0 where there is none, int64 (N,).
    """

    components: NDArray[np.int64]
    holes: NDArray[np.int64]
    smallest: NDArray[np.int64]


def measure_topology(masks: NDArray[np.bool_]) -> Topology:
    """Count components and holes of every image of a stack.

    Rows are cut into runs, touching runs of neighbouring rows are joined, and holes follow from Euler's number
    (components minus holes), which local 2x2 patterns give without a second labelling.

    Args:
        masks: foreground, bool (N, H, W).
    """
    count, height, width = masks.shape
    framed = np.zeros((count, height + 1, width + 2), dtype=np.bool_)  # a blank row parts one image from the next
    framed[:, :height, 1:-1] = masks
    flat = framed.reshape(-1)
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts, ends = changes[0::2], changes[1::2]  # of runs, end exclusive
    stride = width + 2
    first = np.searchsorted(ends, starts + stride, side="left")
    last = np.searchsorted(starts, ends + stride, side="right")
    touching = np.maximum(last - first, 0)
    upper = np.repeat(np.arange(len(starts)), touching)
    offsets = np.arange(len(upper)) - np.repeat(np.cumsum(touching) - touching, touching)
    roots = _join(len(starts), upper, first[upper] + offsets)

    image_of_run = starts // (stride * (height + 1))
    is_root = roots == np.arange(len(roots))
    components = np.bincount(image_of_run[is_root], minlength=count)
    area = np.bincount(roots, weights=ends - starts, minlength=len(roots))
    smallest = np.full(count, height * width + 1, dtype=np.int64)
    np.minimum.at(smallest, image_of_run[is_root], area[is_root].astype(np.int64))
    return Topology(
        components=components,
        holes=components - _euler_numbers(masks),
        smallest=np.where(components > 0, smallest, 0),
    )


def _join(count: int, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each of `count` nodes the smallest node connected to it by the edges `left`-`right`."""
    root = np.arange(count)
    while True:
        a, b = root[left], root[right]
        differs = a != b
        if not differs.any():
            return root
        left, right, a, b = left[differs], right[differs], a[differs], b[differs]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while True:  # every node points at its root again
            above = root[root]
            if np.array_equal(above, root):
                break
            root = above


def _euler_numbers(masks: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Components minus holes, from the counts of 2x2 patterns (Gray's bit quads, 8-connected foreground)."""
    count, height, width = masks.shape
    padded = np.zeros((count, height + 2, width + 2), dtype=np.uint8)
    padded[:, 1:-1, 1:-1] = masks
    pattern = padded[:, :-1, :-1] + 2 * padded[:, :-1, 1:] + 4 * padded[:, 1:, :-1] + 8 * padded[:, 1:, 1:]
    weight = np.zeros(16, dtype=np.int8)
    weight[[1, 2, 4, 8]] = 1  # one corner
    weight[[7, 11, 13, 14]] = -1  # three corners
    weight[[6, 9]] = -2  # a diagonal pair
    quarters: NDArray[np.int64] = weight[pattern].sum(axis=(1, 2), dtype=np.int64)
    return quarters // 4
