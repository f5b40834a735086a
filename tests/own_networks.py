"""Networks of somebody else, for tests of `--factory` and `compress(model=...)`."""

import torch
from torch import Tensor, nn


class OwnNetwork(nn.Module):
    """Three convolutions, one of them depthwise, with a skip; classifier `out`."""

    def __init__(self, classes: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.pointwise = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.widen = nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.out = nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.pointwise(self.depthwise(x))
        logits: Tensor = self.out(self.widen(x).mean((2, 3)))
        return logits


def make(classes: int) -> nn.Module:
    """A factory that draws the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return OwnNetwork(classes)


def sequential(classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, 2),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, classes),
    )


def breaks(classes: int) -> nn.Module:
    raise OSError(f"no licence for {classes} classes")


not_a_function = 3
