"""Find classes and splits in a tree of files: `train/ [val/] test/` of class folders, or one folder of class folders.

Invariant: every file of a class folder is either an image of that class or a fault; none is passed over.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from compressor.data.files import FileEntry, FileTree, label_of
from compressor.errors import did_you_mean

SPLITS = ("train", "val", "test")
_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2", ".avif"}
)
_EXPECTED = "a data set is train/ [val/] test/ with a folder per class in each, or one folder with a folder per class"


@dataclass(frozen=True)
class ImageFile:
    """A file in a class folder.

    Attributes:
        entry: Where it is.
        name: Path below the data set's top folder, so alike for a folder and a tar of it.
        split: None where the tree has no splits.
        label: Index of its class.
    """

    entry: FileEntry
    name: str
    split: str | None
    label: int


@dataclass(frozen=True)
class Layout:
    """What a tree holds; `faults` and `notes` are sentences."""

    labels: tuple[str, ...]
    images: tuple[ImageFile, ...]
    faults: tuple[str, ...]
    notes: tuple[str, ...]


def find_layout(tree: FileTree) -> Layout:
    """Read classes and splits off the folder names; no file is opened."""
    files = {entry.name: entry for entry in tree.files}
    top = _single_top_folder(tree)
    faults: list[str] = []
    strays: list[str] = []

    def below(name: str) -> tuple[str, ...]:
        return PurePosixPath(name).parts[len(PurePosixPath(top).parts) :]

    folders = [parts for parts in map(below, tree.folders) if parts]
    first = {parts[0] for parts in folders}
    split_layout = bool(first & set(SPLITS))
    depth = 2 if split_layout else 1  # Folders above an image.
    if split_layout:
        faults += _split_folder_faults(tree, top, first)

    def where(parts: tuple[str, ...]) -> str:
        return tree.where("/".join((top, *parts)) if top else "/".join(parts))

    found: list[tuple[FileEntry, str | None, str]] = []
    nested: set[tuple[str, ...]] = set()
    for name, entry in files.items():
        parts = below(name)
        if split_layout and len(parts) > 1 and parts[0] not in SPLITS:
            continue  # Its folder is a fault already.
        if len(parts) == depth + 1:
            found.append((entry, parts[0] if split_layout else None, parts[-2]))
        elif len(parts) > depth + 1:
            nested.add(parts[: depth + 1])
        elif PurePosixPath(name).suffix.lower() in _SUFFIXES:
            faults.append(f"{where(parts)}: an image outside of the class folders; {_EXPECTED}")
        else:
            strays.append("/".join(parts))
    nested |= {
        parts for parts in folders if len(parts) == depth + 1 and parts[0] in (SPLITS if split_layout else first)
    }
    for parts in sorted(nested):
        hint = did_you_mean(parts[0].lower(), SPLITS) if not split_layout else ""
        faults.append(f"{where(parts)}: a folder inside a class folder; {_EXPECTED}{hint}")

    classes = {parts[-1] for parts in folders if len(parts) == depth and (not split_layout or parts[0] in SPLITS)}
    labels, label_faults = _labels(classes, tree, top)
    faults += label_faults
    if split_layout:
        faults += _class_set_faults(folders, first)
    filled = {(split, folder) for _, split, folder in found}
    for parts in folders:
        if len(parts) == depth and (not split_layout or parts[0] in SPLITS):
            key = (parts[0] if split_layout else None, parts[-1])
            if key not in filled:
                faults.append(f"{where(parts)}: an empty class folder; remove it or fill it")
    index = {folder: number for number, folder in enumerate(sorted(classes))}
    images = sorted(
        (ImageFile(e, "/".join(below(e.name)), s, index[f]) for e, s, f in found), key=lambda i: (i.label, i.name)
    )
    notes = [f"files outside of the class folders ignored: {', '.join(strays[:5])}"] if strays else []
    return Layout(labels, tuple(images), tuple(faults), tuple(notes))


def write_images(images: NDArray[np.uint8], labels: NDArray[np.int64], names: tuple[str, ...], folder: Path) -> None:
    """Write images as PNG into one folder per class, for checks that know nothing of the toolkit.

    Args:
        images: uint8 (N, H, W, 3).
        labels: int64 (N,), indices into `names`.
        names: Class names, used as folder names.
        folder: Made if absent.
    """
    seen: Counter[int] = Counter()
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for image, label in zip(images, labels.tolist(), strict=True):
        Image.fromarray(np.asarray(image)).save(folder / names[label] / f"{seen[label]:05d}.png", compress_level=1)
        seen[label] += 1


def _single_top_folder(tree: FileTree) -> str:
    """Name of the one folder that holds everything (an archive packed with its folder), or an empty string."""
    tops = {PurePosixPath(name).parts[0] for name in (*tree.folders, *(entry.name for entry in tree.files))}
    if len(tops) != 1:
        return ""
    top = next(iter(tops))
    has_folders = any(name.startswith(top + "/") for name in tree.folders)
    return top if has_folders and top not in SPLITS else ""


def _split_folder_faults(tree: FileTree, top: str, first: set[str]) -> list[str]:
    faults = []
    for name in sorted(first - set(SPLITS)):
        hint = did_you_mean(name.lower(), SPLITS) or "; move it out of the data set"
        faults.append(f"{tree.where(f'{top}/{name}'.lstrip('/'))}: not one of train, val, test{hint}")
    for name in ("train", "test"):
        if name not in first:
            advice = "add it, or give one folder of class folders to have it split"
            faults.append(
                f"{tree.where(top) if top else tree.path}: has no {name}/ beside {', '.join(sorted(first))}; {advice}"
            )
    return faults


def _labels(classes: set[str], tree: FileTree, top: str) -> tuple[tuple[str, ...], list[str]]:
    """Labels in index order."""
    folders = sorted(classes)
    labels = tuple(label_of(folder) for folder in folders)
    owners = defaultdict(list)
    for folder, label in zip(folders, labels, strict=True):
        owners[label].append(folder)
    root = tree.where(top) if top else str(tree.path)
    faults = [
        f"{root}: class folders {' and '.join(repr(n) for n in names)} both become label '{label}'; rename one"
        for label, names in owners.items()
        if len(names) > 1
    ]
    if len(folders) == 0:
        faults.append(f"{root}: no class folders found; {_EXPECTED}")
    elif len(folders) == 1:
        faults.append(f"{root}: only one class ('{folders[0]}'); a classifier needs two or more")
    return labels, faults


def _class_set_faults(folders: list[tuple[str, ...]], first: set[str]) -> list[str]:
    """Splits must hold the same class folders."""
    sets = {split: {p[1] for p in folders if len(p) == 2 and p[0] == split} for split in SPLITS if split in first}
    if "train" not in sets:
        return []
    faults = []
    for split in ("val", "test"):
        if split not in sets:
            continue
        for have, lack in (("train", split), (split, "train")):
            missing = sorted(sets[have] - sets[lack])
            if missing:
                shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
                hint = did_you_mean(missing[0], sets[lack] - sets[have])
                faults.append(f"class folders of {have}/ that {lack}/ lacks: {shown}{hint}")
    return faults
