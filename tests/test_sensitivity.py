"""Groups compared by what cutting each was measured to do, and no longer by scores that do not compare."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.data import Split
from compressor.preprocess import InputSpec
from compressor.pruning.apply import apply_plan
from compressor.pruning.groups import find_groups
from compressor.pruning.importance import score_groups
from compressor.pruning.plan import PrunePlan, decide_plan
from compressor.pruning.sensitivity import damage_of, scores_by_damage
from compressor.recipe_faults import validate

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Chain(nn.Module):
    """Two layers: answers depend on all of the first and hardly on the second, whose weights are larger."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 1)
        self.second = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        both = torch.cat([first, self.second(first)], dim=1)
        return self.fc(both.mean(dim=(2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def network() -> Chain:
    net = Chain()
    with torch.no_grad():
        net.first.weight.normal_().mul_(0.1)
        net.second.weight.normal_().mul_(10)
        net.fc.weight[:, :16].normal_().mul_(5)
        net.fc.weight[:, 16:].mul_(1e-4)
    return net.eval()


def split(count: int = 24) -> Split:
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
    return Split(images, np.zeros(count, np.int64), tuple(map(str, range(count))))


def measured(network: Chain, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    groups = find_groups(network, EXAMPLE, ignored=())
    scores = score_groups(network, groups, kind="magnitude", loss_batches=None, seed=0)
    spec = InputSpec(8, 8)
    damage = damage_of(
        network, groups, {}, train=split(), judged=split(), spec=spec, bn_batches=1, seed=0, device="cpu"
    )
    by_damage, _ = scores_by_damage(network, EXAMPLE, groups, scores, damage, round_to=4, min_channels=4, **settings)
    return scores, by_damage, damage


def test_scores_add_up_to_the_measured_damage(network: Chain) -> None:
    scores, by_damage, damage = measured(network)
    for name in ("first", "second"):
        ascending = scores[name].argsort(stable=True)
        half = PrunePlan({name: tuple(sorted(ascending[8:].tolist()))}, {name: 16})
        assert float(by_damage[name][ascending[:8]].sum()) == pytest.approx(damage(half), rel=1e-4, abs=1e-8)
        assert by_damage[name].argsort(stable=True).tolist() == ascending.tolist()  # who goes first is as it was


def test_damage_is_the_divergence_of_a_really_pruned_network(network: Chain) -> None:
    _, _, damage = measured(network)
    assert damage(PrunePlan({}, {})) == pytest.approx(0, abs=1e-6)
    plan = PrunePlan({"first": tuple(range(8))}, {"first": 16})
    found = damage(plan)
    whole = logits(network)
    apply_plan(network, plan, EXAMPLE)
    wanted, got = whole.log_softmax(1), logits(network).log_softmax(1)
    by_hand = (wanted.exp() * (wanted - got)).sum(1).mean()
    assert found == pytest.approx(float(by_hand), rel=0.02)  # bf16 where the processor has it
    assert found > 0


def logits(network: nn.Module) -> Tensor:
    images = torch.from_numpy(split().images).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        return network((images - 0.5) / 0.5)  # type: ignore[no-any-return]


def test_what_hardly_matters_goes_first_whatever_its_weights(network: Chain) -> None:
    scores, by_damage, _ = measured(network)
    groups = find_groups(network, EXAMPLE, ignored=())
    settings: dict[str, Any] = {"groups": groups, "ranking": "global", "pruning_ratio": 0.25}
    misled = decide_plan(network, EXAMPLE, scores=scores, round_to=4, min_channels=4, **settings)
    told = decide_plan(network, EXAMPLE, scores=by_damage, round_to=4, min_channels=4, **settings)
    assert "first" in misled.keep
    assert list(told.keep) == ["second"]


def test_a_group_near_its_end_is_dear(network: Chain) -> None:
    groups = find_groups(network, EXAMPLE, ignored=())
    scores = score_groups(network, groups, kind="magnitude", loss_batches=None, seed=0)

    def square(plan: PrunePlan) -> float:
        (kept,) = plan.keep.values()
        return (1 - len(kept) / 16) ** 2

    found, damages = scores_by_damage(network, EXAMPLE, groups, scores, square, round_to=4, min_channels=4)
    assert damages["first"] == {0.25: 0.0625, 0.5: 0.25}
    steps = found["first"].sort().values
    for removed in (1, 4, 8):
        assert float(steps[:removed].sum()) == pytest.approx((removed / 16) ** 2)
    assert float(steps[:12].sum()) == pytest.approx((12 / 16) ** 2 * 2)  # a quarter left, of the half that was tried
    assert float(steps[:15].sum()) > 7 * (15 / 16) ** 2
    assert all(math.isfinite(value) for value in steps.tolist())
    assert torch.equal(found["fc"], scores["fc"]) if "fc" in scores else "fc" not in found


def test_groups_do_not_compete_under_ranking_local() -> None:
    stage = {"type": "prune", "pruning_ratio": 0.5, "sensitivity_images": 64}
    data = {"source": "synthetic_pcb"}
    recipe, faults = validate({"version": 1, "model": {"name": "xception"}, "data": data, "stages": [stage]})
    assert recipe is None
    assert any(path[-1] == "sensitivity_images" and "ranking local" in text for path, text in faults)
    recipe, faults = validate(
        {"version": 1, "model": {"name": "xception"}, "data": data, "stages": [{**stage, "ranking": "latency"}]}
    )
    assert faults == []
