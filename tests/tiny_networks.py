"""A small stand-in for Xception, with the same conventions, and recipes that run through in seconds."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image
from torch import Tensor, nn

from compressor import models, proof
from compressor.models.xception import Block, initialise
from compressor.pages import run_page

FINETUNE = {
    "type": "finetune",
    "epochs": 3,
    "batch_size": 16,
    "learning_rate": 1e-2,
}
SHORT = {**FINETUNE, "epochs": 1, "learning_rate": 2e-3}
DIVERGING = {"type": "finetune", "epochs": 4, "batch_size": 16, "optimizer": "sgd", "learning_rate": 10.0}
DIVERGING |= {"clip_norm": None, "precision": "float32"}
DISTILLED = {**SHORT, "distill": {"temperature": 2.0, "weight": 0.5}}
PRUNE = {"type": "prune", "target": {"macs": "0.7x"}, "round_to": 4, "min_channels": 4, "bn_batches": 4}
DROP = {"type": "drop_blocks", "count": 1, "metric_images": 42, "bn_batches": 4}
KERNELS = {"type": "replace_kernels", "scope": ["block3.rep.*"], "bn_batches": 4}
QUANTIZE = {"type": "quantize", "subset_size": 28}


EVERY_STAGE = (FINETUNE, KERNELS, DROP, PRUNE, DISTILLED, QUANTIZE, DISTILLED)


class TinyNetwork(nn.Module):
    """Stem, a narrowing block, three residual blocks that can be dropped, a last block, classifier `fc`."""

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU(inplace=True)
        self.block1 = Block(16, 32, 1, 2, start_with_relu=False)
        for i in range(2, 5):
            self.add_module(f"block{i}", Block(32, 32, 2))
        self.block5 = Block(32, 48, 1, 2)
        self.act2 = nn.ReLU(inplace=True)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(48, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        for i in range(1, 6):
            x = self.get_submodule(f"block{i}")(x)
        return cast(Tensor, self.fc(self.global_pool(self.act2(x)).flatten(1)))


def tiny(num_classes: int = 1000) -> nn.Module:
    return TinyNetwork(num_classes)


@contextmanager
def stand_in(*, retrain: bool = False, charts: bool = False) -> Iterator[None]:
    """Whole runs in seconds: the tiny network under Xception's name.

    Args:
        retrain: Start the child process that measures retraining; it builds the real Xception, and so fails.
        charts: Draw them for the runs' pages, which takes longer than many a run.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.BUILTIN, "xception", tiny)
        if not retrain:
            patch.setattr(proof, "_retrain_memory", lambda *_: {"error": "the stand-in network has no child process"})
        if not charts:
            patch.setattr(run_page, "run_charts", lambda _: [])
        yield


def make_images(folder: Path, per_class: int = 40, test_per_class: int = 16, size: int = 48) -> Path:
    """Fill `folder/{train,test}/<colour>/` with noisy tinted PNGs that a network learns in seconds, widely apart."""
    rng = np.random.default_rng(0)
    for split, count in (("train", per_class), ("test", test_per_class)):
        for name, tint in (("red", (70, 0, 0)), ("green", (0, 70, 0)), ("blue", (0, 0, 70)), ("grey", (0, 0, 0))):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                noise = rng.normal(rng.uniform(80, 140), 25, (size, size, 3))
                pixels = np.clip(noise + tint, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i:03d}.png")
    return folder


def tiny_recipe(images: Path, *stages: Mapping[str, Any], **sections: Any) -> dict[str, Any]:
    """A recipe as plain data, on the images of `make_images`; nothing is measured longer than it must be."""
    return {
        "version": 1,
        "model": {"name": "xception", "weights": "none"},
        "data": {"source": "image_folder", "path": str(images)},
        "input": {"size": 48},
        "benchmark": {"threads": 1, "throughput_s": None},
        "stages": [dict(stage) for stage in stages],
        **sections,
    }


def write_recipe(path: Path, images: Path, *stages: Mapping[str, Any], **sections: Any) -> Path:
    path.write_text(json.dumps(tiny_recipe(images, *stages, **sections), indent=2))  # JSON is YAML
    return path


def contents(folder: Path, names: Sequence[str] = ()) -> dict[str, str]:
    """sha256 of every file below a folder (or of those with the given names), by relative path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (not names or path.name in names)
    }
