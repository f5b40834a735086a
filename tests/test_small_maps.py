"""Law: a convolution of a small map done the fast way has the values and gradients of `torch.conv2d`."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compressor import small_maps
from compressor.quantization import quantize
from compressor.small_maps import SmallMaps


@given(data=st.data())
def test_values_and_gradients_are_those_of_torch(data: st.DataObject) -> None:
    """Every kernel, stride, padding, dilation, grouping and bias, on maps of 1 to 9 pixels a side."""
    groups = data.draw(st.sampled_from([1, 2, 4]))
    kernel = data.draw(st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 3])))
    stride = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilation = data.draw(st.sampled_from([(1, 1), (2, 1)]))
    padding = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    size = [data.draw(st.integers(low, max(low, 9))) for low in least]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    conv = nn.Conv2d(
        4, 8, kernel, stride, padding, dilation, groups, bias=data.draw(st.booleans()), dtype=torch.float64
    )
    x = torch.randn(2, 4, *size, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    inputs = (x, *conv.parameters())
    expected = conv(x)
    with SmallMaps():
        got = conv(x)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(got, expected)
    for mine, torchs in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, torchs)


def test_other_calls_of_conv2d_pass_unchanged() -> None:
    """Padding by name, keywords, and images without a batch dimension."""
    weight = torch.randn(4, 1, 3, 3)
    x = torch.randn(4, 2, 2)
    with SmallMaps():
        assert torch.equal(F.conv2d(x, weight, padding=1, groups=4), torch.conv2d(x, weight, padding=1, groups=4))
        named = nn.Conv2d(4, 4, 3, padding="same", groups=4)(x[None])
    assert named.shape == (1, 4, 2, 2)


@pytest.mark.parametrize("size", [1, 2, 6])
def test_quantizers_stay_where_nncf_put_them(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast way is taken inside NNCF's hooks: quantised values go in, and the outputs are the same."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1))
    x = torch.randn(4, 3, size, size)
    quantized, _ = quantize(_Wrapped(network), [x[:1], x[1:2]])
    quantized.eval()
    expected = quantized(x)
    taken = []
    real = small_maps.convolve
    monkeypatch.setattr(small_maps, "convolve", lambda *args: taken.append(args[1]) or real(*args))
    with SmallMaps():
        got = quantized(x)
    torch.testing.assert_close(got, expected)
    assert len(taken) == 3
    assert all(not torch.equal(weight, conv.weight) for weight, conv in zip(taken, network[::2], strict=False))


class _Wrapped(nn.Module):
    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)
