"""What a folder of images holds, before anything is done with it: counts, sizes, duplicates, leaks, faults.

Invariant: nothing is written and nothing is raised for what the images are; every fault is listed.
"""

import hashlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compressor.data.decode import ImageFaultError, decode, strict_pillow
from compressor.data.files import FileTree, open_tree
from compressor.data.image_folder import SPLITS, ImageFile, find_layout
from compressor.environment import usable_cpus

UNSPLIT = "all"  # where the tree has no splits


@dataclass(frozen=True)
class _Seen:
    """One image: its bytes' digest, height and width, and what is wrong with it."""

    digest: str | None
    size: tuple[int, int] | None
    alpha: bool
    rotated: bool
    fault: str | None


def survey(path: Path) -> dict[str, Any]:
    """Open every image of a folder or tar.

    Args:
        path: `train/ [val/] test/` of class folders, or one folder of class folders.

    Returns:
        JSON-able: `path`, `labels`, `counts` (split -> label -> images), `totals`, `height` and `width` (`least`,
        `median`, `most`), `alpha` and `rotated` (images), `repeated` (images with the bytes of an earlier one of their
        split), `leaks` (`images`, `first`, for each pair of splits that share bytes), `conflicts` (pairs of names with
        the same bytes under two labels), `faults`, `notes`.

    Raises:
        DataError: There is no such folder, or it is no readable tar.
    """
    tree = open_tree(path)
    layout = find_layout(tree)
    with strict_pillow(), ThreadPoolExecutor(usable_cpus()) as pool:
        seen = list(pool.map(lambda image: _look(tree, image), layout.images))
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for image in layout.images:
        counts[image.split or UNSPLIT][image.label] += 1
    sides = [side for side in (*SPLITS, UNSPLIT) if side in counts]
    sizes = np.array([one.size for one in seen if one.size], np.int64).reshape(-1, 2)
    return {
        "path": str(path),
        "labels": list(layout.labels),
        "counts": {s: {label: counts[s][i] for i, label in enumerate(layout.labels)} for s in sides},
        "totals": {side: sum(counts[side].values()) for side in sides},
        "height": _spread(sizes[:, 0]),
        "width": _spread(sizes[:, 1]),
        "alpha": sum(one.alpha for one in seen),
        "rotated": sum(one.rotated for one in seen),
        "repeated": _repeated(layout.images, seen),
        "leaks": _leaks(layout.images, seen),
        "conflicts": _conflicts(layout.images, seen),
        "faults": [*tree.faults, *layout.faults, *(one.fault for one in seen if one.fault)],
        "notes": list(layout.notes),
    }


def _look(tree: FileTree, image: ImageFile) -> _Seen:
    where = tree.where(image.entry.name)
    try:
        data = tree.read(image.entry)
    except OSError as error:
        return _Seen(None, None, False, False, f"{where}: cannot be read: {error}")
    digest = hashlib.sha256(data).hexdigest()
    try:
        decoded = decode(data)
    except ImageFaultError as fault:
        return _Seen(digest, None, False, False, f"{where}: {fault}")
    height, width = decoded.pixels.shape[:2]
    return _Seen(digest, (height, width), decoded.alpha, decoded.rotated, None)


def _spread(values: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, int] | None:
    if not len(values):
        return None
    return {"least": int(values.min()), "median": int(np.median(values)), "most": int(values.max())}


def _repeated(images: tuple[ImageFile, ...], seen: list[_Seen]) -> int:
    known: set[tuple[str | None, str]] = set()
    repeated = 0
    for image, one in zip(images, seen, strict=True):
        if one.digest is not None:
            key = (image.split, one.digest)
            repeated += key in known
            known.add(key)
    return repeated


def _leaks(images: tuple[ImageFile, ...], seen: list[_Seen]) -> dict[str, dict[str, Any]]:
    """Images of one split whose bytes another has too."""
    held: dict[str, dict[str, str]] = defaultdict(dict)
    for image, one in zip(images, seen, strict=True):
        if one.digest is not None and image.split is not None:
            held[image.split].setdefault(one.digest, image.name)
    found = {}
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = sorted(held[first].keys() & held[second].keys(), key=lambda digest: held[first][digest])
        if shared:
            pair = [held[first][shared[0]], held[second][shared[0]]]
            found[f"{first} and {second}"] = {"images": len(shared), "first": pair}
    return found


def _conflicts(images: tuple[ImageFile, ...], seen: list[_Seen]) -> list[list[str]]:
    first: dict[str, ImageFile] = {}
    found = []
    for image, one in zip(images, seen, strict=True):
        if one.digest is not None:
            other = first.setdefault(one.digest, image)
            if other.label != image.label:
                found.append([other.name, image.name])
    return found


def format_survey(found: dict[str, Any]) -> str:
    """Lay a survey out for people."""
    labels, totals = found["labels"], found["totals"]
    images = ", ".join(f"{count} {side}" for side, count in totals.items()) or "no images"
    lines = [f"{found['path']}: {len(labels)} classes, {images}"]
    for side, counts in found["counts"].items():
        least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        spread = f"from {counts[least]} ({least}) to {counts[most]} ({most})"
        lines.append(f"  {side}: {counts[least] if counts[least] == counts[most] else spread} images a class")
    for name in ("height", "width"):
        if found[name]:
            size = found[name]
            lines.append(f"  {name}: {size['least']} to {size['most']} pixels, median {size['median']}")
    if found["alpha"]:
        lines.append(f"  {found['alpha']} images have an alpha channel, which is dropped")
    if found["rotated"]:
        lines.append(f"  {found['rotated']} images carry an EXIF rotation, which is not applied")
    if found["repeated"]:
        lines.append(f"  {found['repeated']} images repeat the bytes of another one of their split")
    for pair, leak in found["leaks"].items():
        lines.append(f"  leak: {leak['images']} images are in both {pair}, first {' = '.join(leak['first'])}")
    lines += [f"  the same bytes under two labels: {a} and {b}" for a, b in found["conflicts"][:10]]
    lines += [f"  note: {note}" for note in found["notes"]]
    lines += [f"  fault: {fault}" for fault in found["faults"]]
    return "\n".join(lines)
