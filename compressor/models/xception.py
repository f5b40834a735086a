"""Xception for image classification; state-dict names are those of timm's `legacy_xception`.

Architecture: "Xception: Deep Learning with Depthwise Separable Convolutions", arXiv 1610.02357, figure 5.
"""

from typing import cast

from torch import Tensor, nn


class SeparableConv2d(nn.Module):
    """Depthwise convolution followed by a pointwise one, no activation between (arXiv 1610.02357, section 3)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, padding: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, kernel_size, stride, padding, groups=in_channels, bias=False)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.pointwise(self.conv1(x)))


class Block(nn.Module):
    """Residual block of `reps` separable convolutions; a strided or widening one has a 1x1 convolution on its skip."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        reps: int,
        stride: int = 1,
        start_with_relu: bool = True,
        grow_first: bool = True,
    ):
        super().__init__()
        self.skip: nn.Conv2d | None = None
        if out_channels != in_channels or stride != 1:
            self.skip = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.skipbn = nn.BatchNorm2d(out_channels)
        hidden = out_channels if grow_first else in_channels
        widths = [in_channels, *[hidden] * (reps - 1), out_channels]
        layers: list[nn.Module] = []
        for i in range(reps):
            if i or start_with_relu:
                # The first ReLU must not write in place: the skip reads the same input.
                layers.append(nn.ReLU(inplace=i > 0))
            layers += [SeparableConv2d(widths[i], widths[i + 1]), nn.BatchNorm2d(widths[i + 1])]
        if stride != 1:
            layers.append(nn.MaxPool2d(3, stride, 1))
        self.rep = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.skip is None else self.skipbn(self.skip(x))
        return cast(Tensor, self.rep(x) + skip)


class Xception(nn.Module):
    """Entry flow, eight residual middle blocks, exit flow, global average pooling, linear classifier.

    Input `(N, in_chans, H, W)` with H, W >= 33; output logits `(N, num_classes)`.
    """

    def __init__(self, num_classes: int = 1000, in_chans: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 32, 3, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(32, 64, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.act2 = nn.ReLU(inplace=True)

        self.block1 = Block(64, 128, 2, 2, start_with_relu=False)
        self.block2 = Block(128, 256, 2, 2)
        self.block3 = Block(256, 728, 2, 2)
        for i in range(4, 12):
            self.add_module(f"block{i}", Block(728, 728, 3))
        self.block12 = Block(728, 1024, 2, 2, grow_first=False)

        self.conv3 = SeparableConv2d(1024, 1536)
        self.bn3 = nn.BatchNorm2d(1536)
        self.act3 = nn.ReLU(inplace=True)
        self.conv4 = SeparableConv2d(1536, 2048)
        self.bn4 = nn.BatchNorm2d(2048)
        self.act4 = nn.ReLU(inplace=True)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2048, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        for i in range(1, 13):
            x = self.get_submodule(f"block{i}")(x)
        x = self.act3(self.bn3(self.conv3(x)))
        x = self.act4(self.bn4(self.conv4(x)))
        return cast(Tensor, self.fc(self.global_pool(x).flatten(1)))


def initialise(model: nn.Module) -> None:
    """He initialisation (arXiv 1502.01852) of convolutions, fan-out mode; BatchNorm scales 1, shifts 0.

    Blocks with an identity skip start as the identity: the scale of their last BatchNorm is 0 (arXiv 1706.02677), which
    lets the eight middle blocks learn from the first step when trained from scratch.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Block) and module.skip is None:
            last = module.rep[-1]
            assert isinstance(last, nn.BatchNorm2d)
            nn.init.zeros_(last.weight)


def xception(num_classes: int = 1000) -> nn.Module:
    """Build a randomly initialised Xception for RGB images; see `Xception` for shapes."""
    return Xception(num_classes)
