"""Turn a data source into a checked, split and cached `Dataset`.

Invariant: every fault of the data that would stop a run later is raised here, before anything is trained. No network.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compressor.data.cache import CachedImages, cached_images, cached_pixels, digests, faults_of
from compressor.data.dataset import Dataset, Split
from compressor.data.files import FileTree, open_tree, raise_faults
from compressor.data.image_folder import SPLITS, Layout, find_layout
from compressor.data.splits import Item, assign
from compressor.errors import DataError, RecipeError, did_you_mean
from compressor.preprocess import InputSpec

SOURCES = ("image_folder", "caltech101", "deeppcb", "synthetic_pcb")
# DeepPCB's file names begin with five digits of the board's group: crops of one board must not be on both sides.
_GROUP_BY = {"deeppcb": 5}
_FETCHABLE = ("caltech101", "deeppcb")


def class_labels(source: str, path: str | None) -> tuple[str, ...]:
    """Class names in index order, from the folder names alone; no image is opened.

    Raises:
        DataError: The classes cannot be found.
    """
    if source == "synthetic_pcb":
        from compressor.data import synthetic_pcb

        return tuple(synthetic_pcb.CLASSES)
    tree = open_tree(_path_of(source, path))
    layout = find_layout(tree)
    raise_faults(str(tree.path), [*tree.faults, *layout.faults])
    return layout.labels


def load_dataset(
    *,
    source: str,
    path: str | None,
    spec: InputSpec,
    cache: Path,
    seed: int = 0,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    group_by: int | None = None,
    images_per_class: int | None = None,
    train_per_class: int = 400,
    val_per_class: int = 60,
    test_per_class: int = 100,
    image_size: int | None = None,
    like: Dataset | None = None,
) -> Dataset:
    """Load train, val and test images at the network's size.

    Args:
        source: One of `SOURCES`. `caltech101` and `deeppcb` are `image_folder` with their settings.
        path: Folder or uncompressed tar of the images; not used by `synthetic_pcb`.
        spec: Preprocessing.
        cache: Folder for decoded images; anything in it may be deleted.
        seed: Decides splits made here and generated images.
        val_fraction: Share of train that becomes val where there is no `val/`.
        test_fraction: Share of everything that becomes test where there are no splits.
        group_by: Leading characters of a file's name that identify a group, kept on one side of a split made here.
            None takes the source's own (5 for `deeppcb`).
        images_per_class: Upper bound on the training images of a class; val and test stay whole.
        train_per_class: Images to generate (`synthetic_pcb`), likewise the next two.
        val_per_class: See above.
        test_per_class: See above.
        image_size: Side of the generated images, pixels; None generates at the network's size.
        like: What these settings gave at another size: of generated images the same ones are kept, although small ones
            repeat each other more easily. Files are told apart by their contents, at any size.

    Raises:
        DataError: Files or folders that cannot be used; all faults at once, up to 20.
        RecipeError: A setting is out of its range.
        ResourceError: The cache cannot be written.
    """
    if source not in SOURCES:
        allowed = ", ".join(SOURCES)
        raise RecipeError(f"data.source: '{source}' is not known; use one of {allowed}{did_you_mean(source, SOURCES)}")
    if source == "synthetic_pcb":
        counts = {"train": train_per_class, "val": val_per_class, "test": test_per_class}
        return _generate(spec, cache, seed, counts, image_size, like)
    tree = open_tree(_path_of(source, path))
    layout = find_layout(tree)
    faults = [*tree.faults, *layout.faults]
    if faults:
        # Broken images too, so that one round of mending is enough.
        raise_faults(str(tree.path), faults + faults_of(tree, [image.entry for image in layout.images]))
    group = group_by if group_by is not None else _GROUP_BY.get(source)
    shas = digests(tree, [image.entry for image in layout.images], cache)
    items = [Item(i.name, sha, i.label, i.split) for i, sha in zip(layout.images, shas, strict=True)]
    chosen = assign(
        items,
        layout.labels,
        seed=seed,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        group_by=group,
        images_per_class=images_per_class,
    )
    raise_faults(str(tree.path), list(chosen.faults))
    rows = {"train": chosen.train, "val": chosen.val, "test": chosen.test}
    cached = {side: _cached_split(tree, layout, items, rows[side], spec, cache) for side in SPLITS}
    made = [side for side in ("val", "test") if not any(item.split == side for item in items)]
    info: dict[str, object] = {
        "source": source,
        "path": str(tree.path),
        "splits_made_here": made,
        "group_by": group,
        "duplicates_dropped": chosen.duplicates_dropped,
    }
    notes = [*layout.notes, *chosen.notes, *_picture_notes(list(cached.values()))]
    splits = {
        side: Split(
            cached[side].images,
            np.asarray([items[i].label for i in rows[side]], np.int64),
            tuple(items[i].name for i in rows[side]),
        )
        for side in SPLITS
    }
    sizes = np.concatenate([cached[side].sizes for side in SPLITS])
    contents = {side: [items[i].digest for i in rows[side]] for side in SPLITS}
    return _dataset(layout.labels, splits, contents, sizes, spec, notes, info)


def _path_of(source: str, path: str | None) -> Path:
    if path is not None:
        return Path(path).expanduser()
    advice = f"; `compress.py data fetch {source}` downloads it" if source in _FETCHABLE else ""
    raise DataError(f"data.path: nothing given, but source '{source}' reads a folder or .tar of images{advice}")


def _cached_split(
    tree: FileTree, layout: Layout, items: Sequence[Item], rows: Sequence[int], spec: InputSpec, cache: Path
) -> CachedImages:
    entries = [layout.images[i].entry for i in rows]
    return cached_images(
        cache=cache,
        spec=spec,
        keys=[items[i].digest for i in rows],
        read=lambda k: tree.read(entries[k]),
        where=lambda k: tree.where(entries[k].name),
    )


def _picture_notes(cached: Sequence[CachedImages]) -> list[str]:
    notes = []
    alpha, rotated = sum(len(c.alpha) for c in cached), sum(len(c.rotated) for c in cached)
    if alpha:
        notes.append(f"{alpha} image(s) have an alpha channel, which is dropped")
    if rotated:
        notes.append(f"{rotated} image(s) carry an EXIF rotation, which is not applied (as in PIL.Image.open)")
    return notes


def _generate(
    spec: InputSpec, cache: Path, seed: int, per_class: dict[str, int], image_size: int | None, like: Dataset | None
) -> Dataset:
    """Generate every split with a seed of its own; cached under the generator's source code and settings."""
    from compressor.data import synthetic_pcb

    size = max(image_size or max(spec.height, spec.width), synthetic_pcb.MIN_SIZE)
    code = hashlib.sha256()
    for path in sorted(Path(synthetic_pcb.__file__).parent.glob("*pcb*.py")):
        code.update(path.read_bytes())
    labels, notes = tuple(synthetic_pcb.CLASSES), []
    splits: dict[str, Split] = {}
    contents: dict[str, list[str]] = {}
    held: set[str] = set()
    for side in reversed(SPLITS):  # test first: what repeats is taken off the side of training
        derived = int(np.random.SeedSequence([seed, SPLITS.index(side)]).generate_state(1)[0])
        settings = {"per_class": per_class[side], "size": size, "seed": derived}
        key = hashlib.sha256(json.dumps([code.hexdigest(), settings], sort_keys=True).encode()).hexdigest()
        truth = np.repeat(np.arange(len(labels), dtype=np.int64), per_class[side])
        images = cached_pixels(
            cache=cache, spec=spec, key=key, count=len(truth), generate=partial(_sorted_pixels, settings)
        ).images
        shas = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
        names = [f"{side}/{labels[label]}/{i % per_class[side]:05d}.png" for i, label in enumerate(truth.tolist())]
        if like is None:
            fresh = [i for i, sha in enumerate(shas) if sha not in held]
        else:
            taken = set(getattr(like, side).names)
            fresh = [i for i, name in enumerate(names) if name in taken]
        if len(fresh) < len(shas):
            notes.append(f"{len(shas) - len(fresh)} generated image(s) of {side} dropped: they repeat one held out")
            images, truth = images[fresh], truth[fresh]
        contents[side] = [shas[i] for i in fresh]
        splits[side] = Split(images, truth, tuple(names[i] for i in fresh))
        held.update(shas)
    info: dict[str, object] = {"source": "synthetic_pcb", "per_class": per_class, "generated_size": size}
    return _dataset(labels, splits, contents, np.asarray([[size, size]], np.int64), spec, notes, info)


def _sorted_pixels(settings: dict[str, int]) -> NDArray[np.uint8]:
    """Generated images as RGB, uint8 (N, size, size, 3), class after class, so that the labels need no storage."""
    from compressor.data import synthetic_pcb

    grey, labels = synthetic_pcb.generate(**settings)
    return np.repeat(grey[np.argsort(labels, kind="stable")][..., None], 3, axis=3)


def _dataset(
    labels: tuple[str, ...],
    splits: dict[str, Split],
    contents: dict[str, list[str]],
    sizes: NDArray[np.int64],
    spec: InputSpec,
    notes: Sequence[str],
    info: dict[str, object],
) -> Dataset:
    """Add what all sources share: counts, native size and fingerprint."""
    height, width = (int(v) for v in np.median(sizes, axis=0))
    counts = {}
    for side in SPLITS:
        seen = Counter(splits[side].labels.tolist())
        counts[side] = {label: seen[k] for k, label in enumerate(labels)}
    info = {**info, "counts": counts, "totals": {side: len(splits[side]) for side in SPLITS}}
    info["native_size"] = [height, width]
    told = {
        "labels": labels,
        "splits": {side: [contents[side], splits[side].labels.tolist()] for side in SPLITS},
        "spec": dataclasses.asdict(spec),
    }
    fingerprint = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return Dataset(
        labels=labels,
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        spec=spec,
        fingerprint=fingerprint,
        native_size=(height, width),
        notes=tuple(notes),
        info=info,
    )
