"""Kernel replacement: shapes stay, constants pass unchanged, and what cannot be replaced is said."""

import copy

import pytest
import torch
from torch import nn

from compressor.errors import RecipeError, UnsupportedModelError
from compressor.models.xception import xception
from compressor.pruning.kernels import find_kernels, replace_kernels


def test_xception_scope_finds_depthwise_kernels_only() -> None:
    net = xception(10)
    found = find_kernels(net, ["block4", "block5.*", "conv3"])
    assert found == (
        *(f"block{b}.rep.{i}.conv1" for b in (4, 5) for i in (1, 4, 7)),
        "conv3.conv1",
    )


def test_dense_kernels_must_be_named_in_full() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8))
    assert find_kernels(net, ["*"]) == ("1",)
    assert find_kernels(net, ["0"]) == ("0",)


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        (["conv1"], r"s\[0\]: 'conv1' cannot become 1x1: has padding \(0, 0\), so its output would change shape"),
        (["conv4", "block1.skip"], r"s\[1\]: 'block1.skip' cannot become 1x1: is 1x1 already"),
        (["conf4"], r"s\[0\]: 'conf4' matches no module; did you mean 'conv4'"),
        (["conv?"], "s: no depthwise convolution in it can become 1x1.*of 2 convolutions refused"),
        (["fc"], "s: no depthwise convolution in it"),
    ],
)
def test_a_scope_without_anything_to_replace_is_an_error(scope: list[str], message: str) -> None:
    net = xception(10)
    if scope == ["conv?"]:
        net = nn.Sequential()
        net.conv1, net.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 2, padding=1)
    with pytest.raises(RecipeError, match=message):
        find_kernels(net, scope, where="s")


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.Conv2d(6, 6, 5, stride=2, padding=2, groups=6, bias=False),
        nn.Conv2d(6, 4, (1, 7), padding=(0, 3)),
        nn.Conv2d(6, 4, 3, stride=3, padding=1, groups=2),
        nn.Conv2d(6, 4, 3, padding="same"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("init", ["inherit", "random"])
def test_shapes_stride_groups_and_bias_are_kept(conv: nn.Conv2d, size: int, init: str) -> None:
    net = nn.Sequential(copy.deepcopy(conv)).eval()
    shape = net(torch.zeros(2, 6, size, size)).shape
    replace_kernels(net, ["0"], init=init, seed=1)  # type: ignore[arg-type]
    assert net(torch.zeros(2, 6, size, size)).shape == shape
    assert net[0].kernel_size == (1, 1)
    assert (net[0].stride, net[0].groups, net[0].bias is None) == (conv.stride, conv.groups, conv.bias is None)
    assert not net[0].training


def test_inherited_kernels_are_exact_on_constant_inputs() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 5, padding=2, groups=4), nn.Conv2d(4, 6, 3, padding=1)).double()
    x = torch.randn(1, 4, 1, 1, dtype=torch.float64).expand(1, 4, 15, 15)
    inner = (..., slice(4, -4), slice(4, -4))  # away from the zero padding
    before = net(x)[inner]
    replace_kernels(net, ["0", "1"], init="inherit")
    torch.testing.assert_close(net(x)[inner], before)


def test_random_kernels_are_seeded_and_of_He_size() -> None:  # noqa: N802
    nets = [nn.Sequential(nn.Conv2d(2000, 2000, 3, padding=1, groups=2000)) for _ in range(3)]
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        replace_kernels(net, ["0"], init="random", seed=seed)
    assert torch.equal(nets[0][0].weight, nets[1][0].weight)
    assert not torch.equal(nets[0][0].weight, nets[2][0].weight)
    assert nets[0][0].weight.std().item() == pytest.approx(2**0.5, rel=0.1)  # one input per channel


def test_nothing_is_replaced_when_one_name_is_wrong() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(4, 4, 3, dilation=2))
    with pytest.raises(UnsupportedModelError, match="1: expected a convolution to replace, found a ReLU"):
        replace_kernels(net, ["0", "1"], init="inherit")
    with pytest.raises(UnsupportedModelError, match="9: expected a convolution to replace, found no module"):
        replace_kernels(net, ["0", "9"], init="inherit")
    with pytest.raises(UnsupportedModelError, match=r"2: cannot become 1x1: has dilation \(2, 2\)"):
        replace_kernels(net, ["0", "2"], init="inherit")
    assert net[0].kernel_size == (3, 3)
