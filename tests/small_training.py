"""A training that takes a moment: images whose class a small network can see, the network, and the loop's options."""

import numpy as np
import torch
from torch import nn

from compressor.data import Split
from compressor.preprocess import InputSpec
from compressor.training import finetune

SPEC = InputSpec(12, 12)


def split(count: int, seed: int) -> Split:
    """Three classes told apart by which third of the image is bright."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % 3
    images = rng.integers(0, 90, (count, 12, 12, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[4 * label : 4 * label + 4] += 140
    return Split(images, labels, tuple(str(i) for i in range(count)))


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(72, 3),
    )


TRAIN, VAL = split(96, 0), split(33, 1)


def run(module: nn.Module, **changes: object):  # type: ignore[no-untyped-def]
    options = {"epochs": 4, "batch_size": 16, "learning_rate": 1e-2, "precision": "float32", "seed": 5, **changes}
    return finetune(module, train=TRAIN, val=VAL, spec=SPEC, **options)  # type: ignore[arg-type]
