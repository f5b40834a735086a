"""MACs and parameters equal values worked out by hand."""

import pytest
import torch
from torch import Tensor, nn

from compressor.models.counting import count
from compressor.models.xception import xception


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (3, 10, 6), 10 * 6 * 8 * 3 * 9),
        (nn.Conv2d(3, 8, 3, stride=2), (3, 11, 9), 5 * 4 * 8 * 3 * 9),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (8, 5, 5), 25 * 8 * 9),
        (nn.Conv2d(8, 12, (1, 3), groups=4), (8, 5, 7), 5 * 5 * 12 * 2 * 3),
        (nn.Conv1d(4, 6, 5), (4, 9), 5 * 6 * 4 * 5),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 5, 5), 25 * 4 * 6 * 9),
        (nn.Linear(7, 5), (7,), 35),
        (nn.Linear(7, 5), (3, 7), 105),
        (nn.BatchNorm2d(4), (4, 3, 3), 0),
    ],
    ids=repr,
)
def test_layers(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    for batch in (1, 3):
        assert count(layer, torch.zeros(batch, *shape)).macs == macs


def test_network_by_layer_and_with_a_layer_that_runs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1, bias=False)
            self.norm = nn.BatchNorm2d(2)
            self.fc = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.norm(self.conv(self.conv(x))).mean((2, 3)))

    net = Twice().train()
    mean = net.norm.running_mean
    assert mean is not None
    before = mean.clone()
    counts = count(net, torch.ones(2, 2, 4, 4))
    assert counts.per_layer == {"conv": 2 * 16 * 4, "fc": 6}
    assert counts.macs == 134
    assert counts.params == 4 + 4 + 9
    assert net.training
    assert torch.equal(mean, before)  # counting must not move BatchNorm's statistics


def test_xception_at_299_has_the_published_size() -> None:
    with torch.device("meta"):
        counts = count(xception(1000), torch.zeros(1, 3, 299, 299))
    assert counts.params == 22_855_952
    assert counts.macs == pytest.approx(8.4e9, rel=0.01)
