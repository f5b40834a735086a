"""Random small CNNs for property tests: every way in which channels of layers get coupled, in random order."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

KINDS = (
    "plain",
    "strided",
    "separable",
    "residual",
    "projection",
    "grouped",
    "dense",
    "branches",
    "concat_residual",
    "squeeze",
    "depthwise",
)


@dataclass(frozen=True)
class Spec:
    """What a random network is made of; hypothesis prints it when a test fails."""

    kinds: tuple[str, ...]
    widths: tuple[int, ...]
    norm: bool
    bias: bool
    activation: str
    head: str
    size: int
    seed: int


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    kinds = tuple(draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4)))
    widths = tuple(draw(st.sampled_from((4, 6, 8, 12))) for _ in range(len(kinds) + 1))
    return Spec(
        kinds=kinds,
        widths=widths,
        norm=draw(st.booleans()),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from(("relu", "silu", "prelu"))),
        head=draw(st.sampled_from(("pooled", "flatten", "hidden"))),
        size=draw(st.sampled_from((4, 6))),
        seed=draw(st.integers(0, 2**16)),
    )


class Unit(nn.Module):
    """Convolution, optional BatchNorm, activation."""

    def __init__(self, spec: Spec, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=spec.bias)
        self.norm = nn.BatchNorm2d(outputs) if spec.norm else nn.Identity()
        self.act = {"relu": nn.ReLU(inplace=True), "silu": nn.SiLU(), "prelu": nn.PReLU(outputs)}[spec.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Piece(nn.Module):
    """One building block of kind `kind`; `outputs` may differ from what was asked for, see the attribute."""

    def __init__(self, spec: Spec, kind: str, inputs: int, width: int):
        super().__init__()
        self.kind = kind
        self.outputs = width
        match kind:
            case "plain":
                self.a = Unit(spec, inputs, width)
            case "strided":
                self.a = Unit(spec, inputs, width, stride=2)
            case "separable":
                self.a = nn.Conv2d(inputs, inputs, 3, 1, 1, groups=inputs, bias=spec.bias)
                self.b = Unit(spec, inputs, width, kernel=1)
            case "depthwise":
                self.a = Unit(spec, inputs, inputs, groups=inputs)
                self.outputs = inputs
            case "residual":
                self.a = Unit(spec, inputs, width)
                self.b = nn.Conv2d(width, inputs, 1)
                self.outputs = inputs
            case "projection":
                self.a = Unit(spec, inputs, width)
                self.skip = nn.Conv2d(inputs, width, 1, bias=False)
            case "grouped":
                self.a = Unit(spec, inputs, 8)
                self.b = Unit(spec, 8, 12, groups=2)
                self.c = Unit(spec, 12, width, kernel=1)
            case "dense":
                self.a = Unit(spec, inputs, width)
                self.outputs = inputs + width
            case "branches":
                self.a, self.b = Unit(spec, inputs, width), Unit(spec, inputs, 4, kernel=1)
                self.outputs = width + 4
            case "concat_residual":
                self.a, self.b, self.c = Unit(spec, inputs, width), Unit(spec, inputs, 4), Unit(spec, inputs, width + 4)
                self.outputs = width + 4
            case "squeeze":
                self.a, self.down, self.up = Unit(spec, inputs, width), nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "separable":
                return self.b(self.a(x))
            case "residual":
                return x + self.b(self.a(x))
            case "projection":
                return self.skip(x) + self.a(x)
            case "grouped":
                return self.c(self.b(self.a(x)))
            case "dense":
                return torch.cat([x, self.a(x)], 1)
            case "branches":
                return torch.cat([self.a(x), self.b(x)], 1)
            case "concat_residual":
                return self.c(x) + torch.cat([self.a(x), self.b(x)], 1)
            case "squeeze":
                x = self.a(x)
                return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))
            case _:
                return self.a(x)


class RandomNetwork(nn.Module):
    """Stem, pieces, classifier of 3 classes; double precision, every parameter and statistic random."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.stem = Unit(spec, 3, spec.widths[0])
        width, size = spec.widths[0], spec.size
        pieces = []
        for kind, wanted in zip(spec.kinds, spec.widths[1:], strict=True):
            pieces.append(Piece(spec, kind, width, wanted))
            width = pieces[-1].outputs
            size = (size + 1) // 2 if kind == "strided" else size
        self.pieces = nn.Sequential(*pieces)
        self.pool = nn.AdaptiveAvgPool2d(1) if spec.head != "flatten" else nn.Identity()
        flat = width * (size * size if spec.head == "flatten" else 1)
        self.hidden = nn.Linear(flat, 8) if spec.head == "hidden" else nn.Identity()
        self.fc = nn.Linear(8 if spec.head == "hidden" else flat, 3)
        randomise(self, spec.seed)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.pieces(self.stem(x))).flatten(1)
        return self.fc(torch.relu(self.hidden(x)) if isinstance(self.hidden, nn.Linear) else x)


def randomise(module: nn.Module, seed: int) -> None:
    """Random weights, BatchNorm statistics and affine parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in module.modules():
            for parameter in layer.parameters(recurse=False):
                spread = (2 / max(1, parameter[0].numel())) ** 0.5 if parameter.dim() > 1 else 0.5
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.running_mean is not None
                assert layer.running_var is not None
                layer.running_mean.copy_(torch.randn(layer.running_mean.shape, generator=generator))
                layer.running_var.copy_(0.5 + torch.rand(layer.running_var.shape, generator=generator))
