"""Group lasso on BatchNorm scales: its value by hand, and what it does to channels before they go."""

import copy
import math
from pathlib import Path

import pytest
import torch
from target_stages import fresh_network, run
from tiny_networks import DISTILLED, FINETUNE, SHORT, tiny_recipe, write_recipe
from torch import Tensor, nn

from compressor.checkpoint import Network
from compressor.context import Context
from compressor.errors import RecipeError
from compressor.pipeline import compress
from compressor.pruning.group_lasso import scale_penalty
from compressor.pruning.groups import find_groups
from compressor.recipe_faults import validate

LASSO = {"steps": 100, "batch_size": 8, "learning_rate": 3e-2}
PRUNED = {"type": "prune", "importance": "bn_scale", "pruning_ratio": 0.5, "round_to": 1, "min_channels": 2}


class Coupled(nn.Module):
    """Two convolutions that add up, so that their channels go together, one behind them, and one without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.b, self.b_bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.c, self.c_bn = nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)
        self.d, self.head = nn.Conv2d(3, 5, 1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a_bn(self.a(x))
        x = torch.relu(x + self.b_bn(self.b(x)))
        x = self.d(torch.relu(self.c_bn(self.c(x))))
        logits: Tensor = self.head(torch.relu(x).mean((2, 3)))
        return logits


def test_the_penalty_is_what_it_is_by_hand() -> None:
    net = Coupled().eval()
    with torch.no_grad():
        net.a_bn.weight.copy_(torch.tensor([3.0, -3.0, 0.0, 6.0]))
        net.b_bn.weight.copy_(torch.tensor([4.0, 4.0, 0.0, -8.0]))
        net.c_bn.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
    groups = find_groups(net, torch.zeros(1, 3, 8, 8), ignored=())
    penalty, left_out = scale_penalty(net, groups)
    value = penalty()
    assert left_out == ["d"]
    assert value.item() == pytest.approx(math.sqrt(2) * (5 + 5 + 0 + 10) + (1 + 2 + 0.5))
    value.backward()
    assert net.a_bn.weight.grad is not None
    # d/ds of sqrt(2) |(s, t)| is sqrt(2) s / |(s, t)|; where both are 0, nothing pulls.
    wanted = math.sqrt(2) * torch.tensor([3 / 5, -3 / 5, 0.0, 6 / 10])
    assert torch.allclose(net.a_bn.weight.grad, wanted)
    assert all(layer.weight.grad is None for layer in (net.a, net.d, net.head)), "filters are not asked about"


def test_scales_that_stay_are_not_asked_about() -> None:
    net = Coupled().eval()
    example = torch.zeros(1, 3, 8, 8)
    penalty, _ = scale_penalty(net, find_groups(net, example, ignored={"a", "b"}))
    assert penalty().item() == pytest.approx(3.0), "three scales of 1 behind c"
    with pytest.raises(RecipeError, match="sparsify: found no channel group with BatchNorm scales"):
        scale_penalty(net, find_groups(net, example, ignored={"a", "b", "c"}))


@pytest.fixture
def learned(context: Context) -> Network:
    """The stand-in network after a short training, so that there is something to lose."""
    network = fresh_network()
    run(network, context, FINETUNE)
    return network


def largest_scales(module: nn.Module, context: Context) -> Tensor:
    """For every channel, coupled ones as one, the largest of its BatchNorm scales."""
    largest = []
    for group in find_groups(module, context.example, ignored=()):
        norms = [member for member in group.members if member.kind == "norm" and group.prunable]
        scales = [module.get_submodule(m.layer).get_parameter("weight")[torch.tensor(m.indices)] for m in norms]
        largest += [torch.cat(scales, dim=1).detach().abs().amax(1)] if scales else []
    return torch.cat(largest)


def test_channels_fade_while_others_stay(learned: Network, context: Context) -> None:
    """The same steps without the penalty are the control."""
    scales = {}
    for strength in (0.0, 0.002):
        network = copy.deepcopy(learned)
        stage = {**PRUNED, "pruning_ratio": 0.01, "round_to": 64}  # no width is a multiple of 64: nothing goes
        outcome = run(network, context, {**stage, "sparsify": {**LASSO, "strength": strength}})
        scales[strength] = largest_scales(outcome.network.module, context)
        spent = outcome.details["sparsify"]
        assert outcome.footprint.train_time_s == pytest.approx(spent["seconds"])
        assert outcome.footprint.train_peak_memory_bytes
        assert (spent["penalty_after"] < 0.7 * spent["penalty_before"]) == (strength > 0)
        assert spent["best_epoch"] == len(spent["history"]) - 1, "what validation does not ask for is kept all the same"
    assert (scales[0.0] < 0.1).sum() == 0
    assert (scales[0.002] < 0.1).float().mean() > 0.25
    assert (scales[0.002] > 0.5).any(), "it is not all of them"


def test_a_stage_sparsifies_once_before_its_first_channel_goes(context: Context) -> None:
    sparsify = {"steps": 2, "batch_size": 16, "strength": 0.01, "distill": DISTILLED["distill"]}
    stage = {**PRUNED, "importance": "magnitude", "round_to": 4, "iterations": 2, "sparsify": sparsify}
    details = run(fresh_network(), context, stage).details
    assert details["sparsify"]["steps"] == 2
    assert details["sparsify"]["teacher_images"] > 0
    assert len(details["iterations"]) == 2


def test_nothing_to_sparsify_is_known_before_training(tiny_network: None, tiny_images: Path, tmp_path: Path) -> None:
    stage = {"type": "prune", "pruning_ratio": 0.5, "ignored_scope": ["conv1", "block*"], "sparsify": {"epochs": 1}}
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, {**SHORT, "epochs": 50}, stage)
    with pytest.raises(RecipeError, match=r"stages\[1\]: sparsify: found no channel group with BatchNorm scales"):
        compress(recipe, tmp_path / "run")
    assert not list(tmp_path.glob("run.partial/stages/*"))


@pytest.mark.parametrize(
    ("sparsify", "message"),
    [
        ({}, "needs `epochs` or `steps`"),
        ({"epochs": 1, "strength": -1}, "found -1, allowed a number >= 0"),
        ({"epochs": 1, "augment": {"shift": 48}}, "allowed less than the input's shorter side of 48"),
        ({"epochs": 1, "distill": {}}, "a teacher whose head is new and untrained"),
    ],
)
def test_its_options_are_those_of_a_training(sparsify: dict[str, object], message: str, tiny_images: Path) -> None:
    _, faults = validate(tiny_recipe(tiny_images, {**PRUNED, "sparsify": sparsify}))
    assert [message in text for _, text in faults] == [True]
    assert faults[0][0][:3] == ("stages", 0, "sparsify")
