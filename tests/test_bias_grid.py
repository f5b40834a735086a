"""Biases on the grid of integer sums: they move by half a step at most, and once."""

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from compressor.bias_grid import snap_biases
from compressor.export import trace_int8
from compressor.preprocess import InputSpec
from compressor.quantization import quantize


class Branches(nn.Module):
    """A chain with an addition, a pooled classifier, and a layer that runs with two ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.twice = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.depthwise(x)
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def batches(count: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 3, 16, 16, generator=generator) for _ in range(count)]


@pytest.fixture
def quantized() -> nn.Module:
    torch.manual_seed(0)
    return quantize(Branches().eval(), batches())[0]


def biases(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters() if name.endswith("bias")}


def test_a_bias_on_its_grid_does_not_move(quantized: nn.Module) -> None:
    before = biases(quantized)
    names = snap_biases(quantized, batches(1)[0])
    assert set(names) == {"stem.bias", "depthwise.bias", "head.bias"}, "what has two grids is left alone"
    assert all(torch.equal(before[name], value) for name, value in biases(quantized).items())


def test_a_bias_moves_by_half_a_step_at_most_and_nothing_else_does(quantized: nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in quantized.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.01 * torch.randn_like(parameter))
    before, moved = copy.deepcopy(quantized.state_dict()), biases(quantized)
    names = snap_biases(quantized, batches(1)[0])
    for name, value in quantized.state_dict().items():
        if name not in names:
            assert torch.equal(value, before[name])
    steps = integer_steps(quantized)
    for name in ("stem.bias", "depthwise.bias"):
        value, step = biases(quantized)[name], steps[name]
        assert ((value - moved[name]).abs() <= 0.5001 * step).all()
        assert torch.allclose(value / step, (value / step).round(), atol=1e-2)
    assert any(not torch.equal(moved[name], value) for name, value in biases(quantized).items())


def integer_steps(quantized: nn.Module) -> dict[str, Tensor]:
    """Input step x weight step of every convolution, read from the ONNX that is published."""
    graph: onnx.GraphProto = trace_int8(quantized, InputSpec(16, 16)).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    maker = {output: node for node in graph.node for output in node.output}
    steps = {}
    for node in graph.node:
        if node.op_type == "Conv":
            step = np.prod(
                np.broadcast_arrays(*(constants[maker[name].input[1]].reshape(-1) for name in node.input[:2])), axis=0
            )
            steps[".".join(node.input[2].split(".")[-2:])] = torch.from_numpy(step)
    return steps
