"""Scores: what they measure, that they are reproducible, and that scoring leaves the network as it was."""

import copy

import pytest
import torch
from random_networks import RandomNetwork, Spec
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import DataError, RecipeError
from compressor.pruning.groups import ChannelGroup, find_groups
from compressor.pruning.importance import score_groups
from compressor.pruning.surgery import mask

SPEC = Spec(("grouped", "concat_residual", "separable"), (8, 8, 6, 8), True, True, "relu", "flatten", 4, 3)


def prepared(spec: Spec = SPEC) -> tuple[nn.Module, list[ChannelGroup], tuple[Tensor, Tensor]]:
    net = RandomNetwork(spec)
    images = torch.randn(4, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return net, find_groups(net, images, ignored=()), (images, torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize("kind", ["magnitude", "taylor", "random"])
def test_every_prunable_group_gets_a_score_per_decision_with_mean_one(kind: str) -> None:
    net, groups, batch = prepared()
    scores = score_groups(net, groups, kind=kind, loss_batches=[batch], seed=0)  # type: ignore[arg-type]
    assert {name: tuple(score.shape) for name, score in scores.items()} == {
        group.name: (group.channels,) for group in groups if group.prunable
    }
    for score in scores.values():
        assert score.mean().item() == pytest.approx(1)
        assert (score >= 0).all()
    again = score_groups(net, groups, kind=kind, loss_batches=[batch], seed=0)  # type: ignore[arg-type]
    assert all(torch.equal(again[name], score) for name, score in scores.items())


def test_a_vanishing_channel_scores_lowest_through_all_its_layers() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1), nn.Flatten())
    net.append(nn.Linear(5 * 4, 2))
    groups = find_groups(net, torch.zeros(1, 3, 2, 2), ignored=())
    with torch.no_grad():
        net[0].weight.fill_(0.5)
        net[2].weight.fill_(0.5)
        net[1].weight.copy_(torch.tensor([1, 1, 0.5, 1]))  # only the BatchNorm scale tells channel 2 apart
        net[2].weight[:, 1] = 0.1  # and only the reader tells channel 1 apart
    score = score_groups(net, groups, kind="magnitude", loss_batches=None, seed=0)["0"]
    assert score.argsort()[:2].tolist() == [1, 2]
    assert score[0] == score[3]


def test_magnitude_does_not_depend_on_the_scale_of_a_layer() -> None:
    net, groups, _ = prepared()
    before = score_groups(net, groups, kind="magnitude", loss_batches=None, seed=0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(7)
    after = score_groups(net, groups, kind="magnitude", loss_batches=None, seed=0)
    for name, score in before.items():
        torch.testing.assert_close(after[name], score)


def test_taylor_predicts_the_loss_of_masking_a_channel() -> None:
    # With a loss that is linear in the logits of a linear reader, the first order is exact: masking the channel changes
    # the loss by the reader's sum of weight x gradient. A group of one writer and one reader counts it twice.
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Flatten(), nn.Linear(4 * 4, 2)).double()
    x, y = torch.randn(3, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 1])

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits * F.one_hot(labels, 2)).sum()

    groups = find_groups(net, x, ignored=())
    scores = score_groups(net, groups, kind="taylor", loss_batches=[(x, y)], seed=0, loss=loss, normalise=False)["0"]
    for channel in range(4):
        masked = copy.deepcopy(net)
        mask(masked, groups, {"0": [c for c in range(4) if c != channel]})
        change = (loss(net(x), y) - loss(masked(x), y)).abs()
        assert scores[channel].item() == pytest.approx(2 * change.item())


def test_scoring_leaves_the_network_as_it_was() -> None:
    net, groups, batch = prepared()
    net.train()
    net.stem.eval()
    net.stem.conv.weight.requires_grad_(False)
    net.fc.weight.grad = torch.ones_like(net.fc.weight)
    before = copy.deepcopy(net.state_dict())
    modes = [layer.training for layer in net.modules()]
    score_groups(net, groups, kind="taylor", loss_batches=[batch], seed=0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [layer.training for layer in net.modules()] == modes
    assert not net.stem.conv.weight.requires_grad
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["fc.weight"]
    assert (net.fc.weight.grad == 1).all()


def test_errors_say_what_is_missing() -> None:
    net, groups, (images, labels) = prepared()
    with pytest.raises(RecipeError, match="'taylr' is not one of magnitude, taylor, random; did you mean 'taylor'"):
        score_groups(net, groups, kind="taylr", loss_batches=None, seed=0)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="'taylor' needs batches with labels, none were given"):
        score_groups(net, groups, kind="taylor", loss_batches=None, seed=0)
    with pytest.raises(RecipeError, match="at least one batch"):
        score_groups(net, groups, kind="taylor", loss_batches=[], seed=0)
    with pytest.raises(DataError, match="scores are not finite"):
        score_groups(net, groups, kind="taylor", loss_batches=[(images * float("nan"), labels)], seed=0)
