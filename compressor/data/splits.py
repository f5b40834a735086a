"""Decide which image trains, validates or tests.

Invariant: equal bytes are never on two sides, and images of one group (`group_by`) never on both sides of a split made
here. The same images, settings and seed give the same split on every machine.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from compressor.errors import RecipeError

MIN_HELD_OUT = 2  # of each class, in a split made here


@dataclass(frozen=True)
class Item:
    """What the split is decided on.

    Attributes:
        name: Path below the data set's root.
        digest: sha256 of the file's bytes.
        label: Class index.
        split: `train`, `val` or `test` as found, or None.
    """

    name: str
    digest: str
    label: int
    split: str | None


@dataclass(frozen=True)
class Assignment:
    """Indices into the items for each split, in the items' order, and what is to be said of it."""

    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]
    faults: tuple[str, ...]
    notes: tuple[str, ...]
    duplicates_dropped: int


def assign(
    items: Sequence[Item],
    labels: Sequence[str],
    *,
    seed: int,
    val_fraction: float,
    test_fraction: float,
    group_by: int | None = None,
    images_per_class: int | None = None,
) -> Assignment:
    """Keep the splits that were found, make those that were not, and take equal bytes off the training side.

    Args:
        items: All images.
        labels: Class names in index order, for messages.
        seed: Decides the random parts.
        val_fraction: Of train, when no val was found; stratified by class.
        test_fraction: Of everything, when no splits were found at all.
        group_by: So many leading characters of a file's name identify its group.
        images_per_class: Keep at most this many images of a class in train, chosen at random; val and test stay whole.

    Raises:
        RecipeError: A fraction is not between 0 and 1, or a count is not positive.
    """
    for key, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 < fraction < 1:
            raise RecipeError(f"data.{key}: {fraction} found; a number between 0 and 1, such as 0.1, is needed")
    for key, count in (("group_by", group_by), ("images_per_class", images_per_class)):
        if count is not None and count < 1:
            raise RecipeError(f"data.{key}: {count} found; a whole number from 1, or null, is needed")
    sides: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    faults: list[str] = []
    for i, item in enumerate(items):
        sides[item.split or "train"].append(i)
    dropped, notes = _drop_shared(items, sides)
    notes += _label_conflicts(items, labels)
    notes += _twins(items, sides)
    if not sides["test"]:
        sides["train"], sides["test"] = _hold_out(
            items, labels, sides["train"], "test", test_fraction, [seed, 1], group_by, faults
        )
    if not sides["val"]:
        sides["train"], sides["val"] = _hold_out(
            items, labels, sides["train"], "val", val_fraction, [seed, 2], group_by, faults
        )
    for side in sides:
        present = {items[i].label for i in sides[side]}
        lost = [labels[k] for k in range(len(labels)) if k not in present]
        if lost and not faults:
            faults.append(f"{side} has no image left of {', '.join(lost[:5])} ({dropped} duplicates were dropped)")
    if images_per_class is not None:
        sides["train"] = _limit(items, sides["train"], images_per_class, seed)
    train, val, test = (tuple(sorted(sides[side])) for side in ("train", "val", "test"))
    return Assignment(train, val, test, tuple(faults), tuple(notes), dropped)


def _drop_shared(items: Sequence[Item], sides: dict[str, list[int]]) -> tuple[int, list[str]]:
    """Remove from train what val or test holds too, and from val what test holds; in place."""
    notes, total = [], 0
    for side, others in (("val", ("test",)), ("train", ("val", "test"))):
        held = {items[i].digest: other for other in others for i in sides[other]}
        shared = [i for i in sides[side] if items[i].digest in held]
        if shared:
            first = items[shared[0]]
            notes.append(
                f"{len(shared)} image(s) of {side} dropped, being byte-identical to {held[first.digest]} images "
                f"(first: {first.name})"
            )
            sides[side] = [i for i in sides[side] if items[i].digest not in held]
            total += len(shared)
    return total, notes


def _label_conflicts(items: Sequence[Item], labels: Sequence[str]) -> list[str]:
    first: dict[str, Item] = {}
    conflicts = []
    for item in items:
        other = first.setdefault(item.digest, item)
        if other.label != item.label:
            pair = f"{other.name} ({labels[other.label]}) and {item.name} ({labels[item.label]})"
            conflicts.append(f"the same bytes under two labels: {pair}")
    if len(conflicts) > 3:
        return [*conflicts[:3], f"... and {len(conflicts) - 3} more images with the bytes of another label"]
    return conflicts


def _twins(items: Sequence[Item], sides: dict[str, list[int]]) -> list[str]:
    notes = []
    for side, indices in sides.items():
        extra = len(indices) - len({items[i].digest for i in indices})
        if extra:
            notes.append(f"{extra} image(s) of {side} repeat the bytes of another one there; kept")
    return notes


def _hold_out(
    items: Sequence[Item],
    labels: Sequence[str],
    pool: list[int],
    side: str,
    fraction: float,
    seed: list[int],
    group_by: int | None,
    faults: list[str],
) -> tuple[list[int], list[int]]:
    """Move whole units (equal bytes, equal groups) out of the pool until each class has its share.

    Greedy over shuffled units: one is moved when that brings the counts per class nearer to their targets in total, so
    without duplicates and groups every class gets exactly its share. Then classes still below the minimum are served.
    """
    units = _units(items, pool, group_by)
    left = Counter(items[i].label for i in pool)
    target = {label: max(MIN_HELD_OUT, round(fraction * n)) for label, n in left.items()}
    out: Counter[int] = Counter()
    held: set[int] = set()
    rng = np.random.default_rng(seed)
    order = [int(u) for u in rng.permutation(len(units))]
    contents = [Counter(items[i].label for i in unit) for unit in units]

    def move(u: int) -> None:
        held.add(u)
        out.update(contents[u])
        left.subtract(contents[u])

    def leaves_some(u: int) -> bool:
        return all(left[label] > n for label, n in contents[u].items())

    for u in order:
        gain = sum(abs(out[k] - target[k]) - abs(out[k] + n - target[k]) for k, n in contents[u].items())
        if gain > 0 and leaves_some(u):
            move(u)
    smallest_first = sorted(order, key=lambda u: len(units[u]))
    for label in sorted(target):
        while out[label] < MIN_HELD_OUT:
            fit = next((u for u in smallest_first if u not in held and contents[u][label] and leaves_some(u)), None)
            if fit is None:
                n = sum(items[i].label == label for i in pool)
                of = sum(1 for c in contents if c[label])
                grouped = f" in {of} group(s)" if of < n else ""
                faults.append(
                    f"class '{labels[label]}': {n} image(s){grouped} are too few to split off {MIN_HELD_OUT} for "
                    f"{side} and keep one; add images or give a {side}/ folder"
                )
                break
            move(fit)
    chosen = {i for u in held for i in units[u]}
    return [i for i in pool if i not in chosen], sorted(chosen)


def _units(items: Sequence[Item], pool: Sequence[int], group_by: int | None) -> list[list[int]]:
    """Connected sets of images that share bytes or a group."""
    parent = {i: i for i in pool}

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i in pool:
        keys = [("bytes", items[i].digest)]
        if group_by is not None:
            keys.append(("group", PurePosixPath(items[i].name).name[:group_by]))
        for key in keys:
            a, b = root(first.setdefault(key, i)), root(i)
            parent[max(a, b)] = min(a, b)
    units = defaultdict(list)
    for i in pool:
        units[root(i)].append(i)
    return list(units.values())


def _limit(items: Sequence[Item], pool: list[int], per_class: int, seed: int) -> list[int]:
    by_label = defaultdict(list)
    for i in pool:
        by_label[items[i].label].append(i)
    rng = np.random.default_rng([seed, 3])
    return [int(i) for label in sorted(by_label) for i in rng.permutation(by_label[label])[:per_class]]
