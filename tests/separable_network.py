"""A tiny network with everything the export path meets: depthwise, residual, strided, BatchNorm, linear head."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor.preprocess import InputSpec

SPEC = InputSpec(32, 32)
LABELS = ("sea horse", "crab", "lobster", "crayfish", "octopus", "starfish")


class Separable(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.pointwise(self.depthwise(x)))


class SeparableNetwork(nn.Module):
    def __init__(self, classes: int = len(LABELS), channels: int = 16):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, 2, 1, bias=False)
        self.stem_bn = nn.BatchNorm2d(channels)
        self.first = Separable(channels, channels)
        self.second = Separable(channels, 2 * channels, 2)
        self.third = Separable(2 * channels, 2 * channels)
        self.head = nn.Linear(2 * channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_bn(self.stem(x)))
        x = torch.relu(x + self.first(x))
        x = torch.relu(self.second(x))
        x = torch.relu(x + self.third(x))
        return self.head(x.mean((2, 3)))


def varied(network: nn.Module) -> nn.Module:
    """Give BatchNorm statistics and scales that are not the trivial ones."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.2, 2.0)
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return network.eval()


def trained(channels: int = 16) -> SeparableNetwork:
    """A network that has learned something, in two seconds: only then does agreement between runtimes mean anything."""
    torch.manual_seed(0)
    network = SeparableNetwork(channels=channels)
    images = pictures(256, seed=100)
    x, target = normalised(images), torch.from_numpy(answers(images))
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for step in range(60):
        chosen = slice(step % 8 * 32, step % 8 * 32 + 32)
        loss = nn.functional.cross_entropy(network(x[chosen]), target[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def answers(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The class of each picture, 0-5: its strongest colour, and whether its left half is the brighter one."""
    means = images.mean((1, 2))  # (N, 3)
    half = images.shape[2] // 2
    left = images[:, :, :half].mean((1, 2, 3)) > images[:, :, half:].mean((1, 2, 3))
    return 2 * means.argmax(1) + left


def pictures(n: int, size: int = 32, seed: int = 0) -> NDArray[np.uint8]:
    """Coloured gradients and noise, (n, size, size, 3): smooth enough that the network's answers differ by image."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, size)
    a, b, c = (rng.uniform(-160, 160, (n, 1, 1, 3)) for _ in range(3))
    images = 128 + a * (ramp[None, :, None, None] - 0.5) + b * (ramp[None, None, :, None] - 0.5) + c / 2
    return np.clip(images + rng.normal(0, 30, images.shape), 0, 255).astype(np.uint8)


def normalised(images: NDArray[np.uint8]) -> Tensor:
    """What the network takes, (N, 3, H, W)."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
