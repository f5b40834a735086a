"""Small image folders for the data tests."""

import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from compressor.data import Dataset, load_dataset
from compressor.preprocess import InputSpec

SPEC = InputSpec(8, 8)


def save_image(path: Path, seed: int, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Path:
    """Write a random image of (height, width); the suffix decides the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size if mode == "L" else (*size, len(mode))
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make_tree(root: Path, counts: Mapping[str, int], start: int = 0) -> Path:
    """Fill `root/<key>/00.png ...` with so many different images for each key, such as `train/cat`."""
    seed = start
    for folder, count in counts.items():
        for i in range(count):
            save_image(root / folder / f"{i:02d}.png", seed)
            seed += 1
    return root


def split_tree(root: Path) -> Path:
    return make_tree(root, {"train/cat": 12, "train/dog": 10, "test/cat": 3, "test/dog": 4})


def pack(folder: Path, path: Path, top: str) -> Path:
    with tarfile.open(path, "w") as archive:
        archive.add(folder, top)
    return path


def load(path: Path, cache: Path, **settings: object) -> Dataset:
    values: dict[str, object] = {"source": "image_folder", "spec": SPEC, **settings}
    return load_dataset(path=str(path), cache=cache, **values)  # type: ignore[arg-type]
