"""Depth reduction: the block that hurts least goes first, by measurement; candidates come back unharmed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import TrainingError
from compressor.pruning.blocks import find_blocks
from compressor.pruning.depth import drop_greedily, measure_without

X = torch.rand(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)) + 0.5


class Adding(nn.Module):
    """`x + strength * x`: what is lost without it is known by hand."""

    def __init__(self, strength: float):
        super().__init__()
        self.scale = nn.Conv2d(4, 4, 1, bias=False)
        with torch.no_grad():
            self.scale.weight.copy_(strength * torch.eye(4).reshape(4, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale(x)


class Chain(nn.Module):
    def __init__(self, *strengths: float):
        super().__init__()
        self.blocks = nn.Sequential(*[Adding(strength) for strength in strengths])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def distance(network: nn.Module) -> Callable[[nn.Module], float]:
    """Relative distance to what the whole network computed: without strengths s it is 1 - 1 / prod(1 + s)."""
    with torch.no_grad():
        wanted = network(X)

    def loss(changed: nn.Module) -> float:
        with torch.no_grad():
            return float((changed(X) - wanted).abs().sum() / wanted.abs().sum())

    return loss


def until(count: int) -> Callable[[nn.Module, int], bool]:
    return lambda _, dropped: dropped == count


def nothing(_: nn.Module, __: int) -> None:
    pass


def is_dropped(network: Chain) -> list[bool]:
    return [isinstance(block, nn.Identity) for block in network.blocks]


def test_the_weakest_block_goes_first_and_every_candidate_was_measured() -> None:
    network = Chain(0.5, 0.1, 0.9, 0.2)
    blocks = find_blocks(network, X)
    assert blocks == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")
    drops = drop_greedily(network, blocks, done=until(3), loss=distance(network), recover=nothing)
    assert [drop.block for drop in drops] == ["blocks.1", "blocks.3", "blocks.0"]
    assert is_dropped(network) == [True, True, False, True]
    # Losses by hand, in each round given what is gone already.
    gone = 1.0
    for drop, strengths in zip(
        drops,
        ({0: 0.5, 1: 0.1, 2: 0.9, 3: 0.2}, {0: 0.5, 2: 0.9, 3: 0.2}, {0: 0.5, 2: 0.9}),
        strict=True,
    ):
        expected = {f"blocks.{i}": 1 - 1 / (gone * (1 + s)) for i, s in strengths.items()}
        assert drop.candidates == pytest.approx(expected, rel=1e-4)
        assert drop.loss_before == min(drop.candidates.values())
        gone *= 1 + strengths[int(drop.block[-1])]
        assert drop.loss_after == pytest.approx(1 - 1 / gone, rel=1e-4), "nothing was recovered"


def test_a_choice_follows_the_loss_and_not_the_size_of_the_block() -> None:
    network = Chain(0.5, 0.1, 0.9)
    favourite = network.blocks[2]

    def loss(changed: nn.Module) -> float:
        return 0.0 if favourite not in list(changed.modules()) else 1.0

    drops = drop_greedily(network, ("blocks.0", "blocks.1", "blocks.2"), done=until(1), loss=loss, recover=nothing)
    assert [drop.block for drop in drops] == ["blocks.2"]


@pytest.mark.parametrize("order", [("blocks.0", "blocks.1", "blocks.2"), ("blocks.2", "blocks.0", "blocks.1")])
def test_ties_are_decided_by_the_order_of_the_blocks(order: tuple[str, ...]) -> None:
    network = Chain(0.3, 0.3, 0.3)
    drops = drop_greedily(network, order, done=until(2), loss=lambda _: 1.0, recover=nothing)
    assert [drop.block for drop in drops] == list(order[:2])


def test_a_loss_that_is_not_a_number_stops_the_stage() -> None:
    with pytest.raises(TrainingError, match=r"without blocks\.0 is nan"):
        drop_greedily(
            Chain(0.1, 0.2), ["blocks.0", "blocks.1"], done=until(1), loss=lambda _: float("nan"), recover=nothing
        )


def test_measuring_leaves_the_network_as_it_was() -> None:
    network = Chain(0.5, 0.1)
    modules, training = dict(network.named_modules()), network.training
    loss = distance(network)
    assert measure_without(network, "blocks.0", loss) > measure_without(network, "blocks.1", loss) > 0
    assert dict(network.named_modules()) == modules, "the very modules, in their places"
    assert loss(network) == 0
    assert network.training == training

    def failing(_: nn.Module) -> float:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measure_without(network, "blocks.0", failing)
    assert dict(network.named_modules()) == modules


def test_a_block_nested_deeper_is_restored_in_its_own_parent() -> None:
    network = nn.ModuleDict({"body": Chain(0.5, 0.1)})
    inner = network.get_submodule("body.blocks.1")
    measure_without(network, "body.blocks.1", lambda _: 0.0)
    assert network.get_submodule("body.blocks.1") is inner


def test_recovery_follows_every_drop_and_is_measured() -> None:
    network = Chain(0.5, 0.1, 0.2)
    seen: list[tuple[int, list[bool]]] = []
    losses = iter([3.0, 1.0, 2.0, 0.4, 5.0, 4.0, 0.7])  # three candidates, after recovery; two candidates, after

    drops = drop_greedily(
        network,
        ("blocks.0", "blocks.1", "blocks.2"),
        done=until(2),
        loss=lambda _: next(losses),
        recover=lambda module, index: seen.append((index, is_dropped(module))),
    )
    assert seen == [(0, [False, True, False]), (1, [False, True, True])]
    assert [(drop.loss_before, drop.loss_after) for drop in drops] == [(1.0, 0.4), (4.0, 0.7)]


def test_it_is_asked_before_each_drop_and_after_the_last_and_ends_when_none_is_left() -> None:
    network = Chain(0.5, 0.1)
    asked: list[int] = []

    def never(_: nn.Module, dropped: int) -> bool:
        asked.append(dropped)
        return False

    blocks = ("blocks.0", "blocks.1")
    assert drop_greedily(network, blocks, done=until(0), loss=distance(network), recover=nothing) == []
    assert is_dropped(network) == [False, False]
    drops = drop_greedily(network, blocks, done=never, loss=distance(network), recover=nothing)
    assert asked == [0, 1, 2]
    assert len(drops) == 2
    assert torch.equal(network(X), X)
