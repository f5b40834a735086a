"""Scores: what they measure, that they are reproducible, and that scoring leaves the network as it was."""

import copy
from typing import get_args

import pytest
import torch
from random_networks import RandomNetwork, Spec
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import DataError, RecipeError
from compressor.pruning.groups import ChannelGroup, find_groups
from compressor.pruning.importance import NEEDS_BATCHES, Importance, score_groups
from compressor.pruning.surgery import mask

SPEC = Spec(("grouped", "concat_residual", "separable"), (8, 8, 6, 8), True, True, "relu", "flatten", 4, 3)


def prepared(spec: Spec = SPEC) -> tuple[nn.Module, list[ChannelGroup], tuple[Tensor, Tensor]]:
    net = RandomNetwork(spec)
    images = torch.randn(4, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return net, find_groups(net, images, ignored=()), (images, torch.tensor([0, 1, 2, 0]))


KINDS = get_args(Importance)


@pytest.mark.parametrize("kind", KINDS)
def test_every_prunable_group_gets_a_score_per_decision_with_mean_one(kind: str) -> None:
    net, groups, batch = prepared()
    scores = score_groups(net, groups, kind=kind, loss_batches=[batch], seed=0)  # type: ignore[arg-type]
    assert {name: tuple(score.shape) for name, score in scores.items()} == {
        group.name: (group.channels,) for group in groups if group.prunable
    }
    for score in scores.values():
        assert kind == "lamp" or score.mean().item() == pytest.approx(1)
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


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_leaves_the_network_as_it_was(kind: Importance) -> None:
    net, groups, batch = prepared()
    net.train()
    net.stem.eval()
    net.stem.conv.weight.requires_grad_(False)
    net.fc.weight.grad = torch.ones_like(net.fc.weight)
    before = copy.deepcopy(net.state_dict())
    modes = [layer.training for layer in net.modules()]
    score_groups(net, groups, kind=kind, loss_batches=[batch], seed=0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [layer.training for layer in net.modules()] == modes
    assert not net.stem.conv.weight.requires_grad
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["fc.weight"]
    assert (net.fc.weight.grad == 1).all()


def one_group(scales: bool = True) -> tuple[nn.Sequential, list[ChannelGroup]]:
    """Three channels written by a convolution of two weights each, scaled by a norm, read by a linear layer."""
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, affine=scales), nn.Flatten(), nn.Linear(3, 2))
    net = net.double().eval()
    return net, find_groups(net, torch.zeros(1, 2, 1, 1, dtype=torch.float64), ignored=())


def scores_of(net: nn.Module, groups: list[ChannelGroup], kind: Importance, **options: object) -> list[float]:
    (scores,) = score_groups(net, groups, kind=kind, seed=0, **{"loss_batches": None, **options}).values()  # type: ignore[arg-type]
    return list(scores.tolist())


def test_bn_scale_is_the_size_of_the_scales() -> None:
    net, groups = one_group()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([0.5, -2.0, 1.0]))
    assert scores_of(net, groups, "bn_scale", normalise=False) == [0.5, 2.0, 1.0]
    net, groups = one_group(scales=False)
    with pytest.raises(RecipeError, match="'bn_scale' needs BatchNorm scales, and group 0 has none"):
        scores_of(net, groups, "bn_scale")


def test_fpgm_lets_the_channel_in_the_middle_go() -> None:
    net, groups = one_group()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])[:, :, None, None])  # 5 apart each
        net[1].weight.fill_(1.0)
        net[3].weight.fill_(1.0)  # neither norm nor reader tells the channels apart: their distances are all zero
    # Sums of distances 15, 10, 15, over their mean; one for each of the other two members.
    expected = [(15 / (40 / 3) + 2) / 3, (10 / (40 / 3) + 2) / 3, (15 / (40 / 3) + 2) / 3]
    assert scores_of(net, groups, "fpgm", normalise=False) == pytest.approx(expected)


def test_lamp_is_the_share_among_what_is_at_least_as_large() -> None:
    net, groups = one_group()
    with torch.no_grad():
        for values in (net[0].weight, net[3].weight.T, net[1].weight):
            values.copy_(torch.tensor([2.0, 1.0, 3.0]).reshape(3, *[1] * (values.dim() - 1)).expand_as(values))
    assert scores_of(net, groups, "lamp") == pytest.approx([4 / 13, 1 / 14, 1.0])


def test_activation_is_what_the_readers_are_given() -> None:
    net, groups = one_group()
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.copy_(torch.tensor([1.0, -3.0, 2.0]))
        net[1].weight.fill_(1.0)
        net[1].eps = 0.0
    batch = (torch.randn(4, 2, 1, 1, dtype=torch.float64), torch.zeros(4, dtype=torch.long))
    assert scores_of(net, groups, "activation", loss_batches=[batch], normalise=False) == pytest.approx([0.5, 1.5, 1.0])


def test_hessian_is_exact_where_the_loss_is_quadratic_in_one_weight_at_a_time() -> None:
    """Samples' gradients of loss = logit: the input itself; half of weight² times their mean square, by hand."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([2.0, 3.0]).reshape(2, 1, 1, 1))
        net[2].weight.copy_(torch.tensor([[5.0, 7.0]]))
    x = torch.tensor([1.0, -2.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    groups = find_groups(net, x, ignored=())
    found = scores_of(
        net,
        groups,
        "hessian",
        loss_batches=[(x, torch.zeros(2, dtype=torch.long))],
        loss=lambda logits, _: logits.sum(),
        normalise=False,
    )
    # Writer: d loss / d w_c = v_c x; reader: d loss / d v_c = w_c x; the mean of x² is 2.5; each has (w v x)² / 2.
    assert found == pytest.approx([2 * 0.5 * (2 * 5) ** 2 * 2.5, 2 * 0.5 * (3 * 7) ** 2 * 2.5])


def test_errors_say_what_is_missing() -> None:
    net, groups, (images, labels) = prepared()
    with pytest.raises(RecipeError, match=r"'taylr' is not one of magnitude, .*, random; did you mean 'taylor'"):
        score_groups(net, groups, kind="taylr", loss_batches=None, seed=0)  # type: ignore[arg-type]
    for kind in sorted(NEEDS_BATCHES):
        for batches in (None, []):
            with pytest.raises(RecipeError, match=f"'{kind}' needs at least one batch with labels, got none"):
                score_groups(net, groups, kind=kind, loss_batches=batches, seed=0)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="scores are not finite"):
        score_groups(net, groups, kind="taylor", loss_batches=[(images * float("nan"), labels)], seed=0)
