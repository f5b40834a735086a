"""Plan laws: multiples, targets met or refused, nested, reproducible, true to the really pruned network."""

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_networks import RandomNetwork, Spec, specs
from torch import Tensor, nn

from compressor.errors import DataError, RecipeError, UnsupportedModelError
from compressor.latency_model import LatencyModel
from compressor.models.counting import count
from compressor.pruning.apply import apply_plan, mask_plan
from compressor.pruning.groups import ChannelGroup, find_groups
from compressor.pruning.importance import score_groups
from compressor.pruning.plan import PrunePlan, decide_plan, width_plan
from compressor.pruning.steps import most_saved_first, steps_of
from compressor.pruning.surgery import kept_widths

SPEC = Spec(("residual", "grouped", "dense"), (12, 8, 12, 8), True, True, "relu", "hidden", 4, 5)


class Case:
    """A network with its groups and scores, and `decide_plan` with defaults."""

    def __init__(self, spec: Spec = SPEC, kind: str = "magnitude"):
        self.net = RandomNetwork(spec)
        self.example = torch.zeros(1, 3, spec.size, spec.size, dtype=torch.float64)
        self.groups = find_groups(self.net, self.example, ignored=())
        self.scores: dict[str, Tensor] = score_groups(
            self.net,
            self.groups,
            kind=kind,  # type: ignore[arg-type]
            loss_batches=None,
            seed=spec.seed,
        )

    def prune(self, plan: PrunePlan) -> None:
        apply_plan(self.net, plan, self.example)
        self.groups = find_groups(self.net, self.example, ignored=())
        self.scores = score_groups(self.net, self.groups, kind="magnitude", loss_batches=None, seed=0)

    def widths(self) -> dict[str, int]:
        return {group.name: group.channels for group in self.groups}

    def decide(self, **settings: Any) -> PrunePlan:
        defaults: dict[str, Any] = {
            "ranking": "global",
            "round_to": 2,
            "min_channels": 2,
        }
        if settings.get("ranking") == "latency":
            defaults["model"] = self.model()
        model = self.model()
        defaults["predict"] = {"latency": lambda kept: model.latency(kept.widths)}
        return decide_plan(self.net, self.example, groups=self.groups, scores=self.scores, **{**defaults, **settings})

    def model(self) -> LatencyModel:
        """Costs of every kind, in lanes of 4, as if they had been measured."""
        layers = [name for name, layer in self.net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        generator = torch.Generator().manual_seed(1)
        terms = {name: tuple(torch.rand(4, generator=generator).tolist()) for name in layers}
        return LatencyModel(terms, rest=1.0, lanes=4, error=0.0)

    def cost(self, net: nn.Module, unit: str) -> float:
        """What a network costs: counted, or predicted from its layers."""
        if unit == "latency":
            return self.model().latency(kept_widths(net, {}))
        return float(getattr(count(net, self.example), unit))

    def width(self, width: float, **settings: Any) -> PrunePlan:
        defaults: dict[str, Any] = {"overrides": {}, "round_to": 2, "min_channels": 2}
        return width_plan(groups=self.groups, scores=self.scores, width=width, **{**defaults, **settings})


def group_named(case: Case, name: str) -> ChannelGroup:
    return next(group for group in case.groups if group.name == name)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    spec=specs(),
    ranking=st.sampled_from(("local", "global", "latency")),
    unit=st.sampled_from(("macs", "params", "latency")),
    fraction=st.floats(0.05, 1),
    round_to=st.sampled_from((1, 2, 4)),
    min_channels=st.integers(1, 5),
)
def test_targets_are_met_or_refused(
    spec: Spec, ranking: str, unit: str, fraction: float, round_to: int, min_channels: int
) -> None:
    case = Case(spec, "random")
    settings = {"ranking": ranking, "round_to": round_to, "min_channels": min_channels, "model": case.model()}
    target = fraction * case.cost(case.net, unit)
    try:
        plan = case.decide(targets={unit: target}, **settings)
    except RecipeError as error:
        least = float(str(error).split("reach from ")[1].split(" (")[0].replace(",", "")) * (1 + 1e-9)
        assert target < least
        plan = case.decide(targets={unit: least}, **settings)  # what is said to be reachable is
        target = least
    cut = copy.deepcopy(case.net)
    apply_plan(cut, plan, case.example)
    assert case.cost(cut, unit) <= target * (1 + 1e-9)
    for name, kept in plan.keep.items():
        group = group_named(case, name)
        assert len(kept) % round_to == 0
        assert min_channels <= len(kept) < group.channels
        assert list(kept) == sorted(set(kept))
        # The kept ones are the most important ones.
        gone = set(range(group.channels)) - set(kept)
        assert case.scores[name][list(gone)].max() <= case.scores[name][list(kept)].min()
    untouched = {group.name for group in case.groups} - plan.keep.keys()
    for name in untouched - plan.skipped.keys():
        assert group_named(case, name).channels > round_to  # it could have been pruned; the target did not need it
    assert PrunePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_residual_of_a_concatenation_that_is_concatenated_again_meets_its_target() -> None:
    spec = Spec(("dense", "residual", "dense"), (4, 4, 4, 4), False, False, "relu", "flatten", 4, 0)
    case = Case(spec, "random")
    assert group_named(case, "pieces.0.a.conv").prunable
    plan = case.decide(targets={"macs": 0.8 * count(case.net, case.example).macs}, round_to=1, min_channels=1)
    cut = copy.deepcopy(case.net)
    apply_plan(cut, plan, case.example)
    assert count(cut, case.example).macs <= 0.8 * count(case.net, case.example).macs


@pytest.mark.parametrize("ranking", ["local", "global", "latency"])
def test_tighter_targets_keep_subsets(ranking: str) -> None:
    case = Case()
    full = count(case.net, case.example).macs
    previous: PrunePlan | None = None
    macs = []
    for fraction in (1.0, 0.9, 0.75, 0.6, 0.45, 0.3):
        plan = case.decide(ranking=ranking, targets={"macs": fraction * full})
        if previous is not None:
            for name, kept in previous.keep.items():
                assert set(plan.keep[name]) <= set(kept)
        cut = copy.deepcopy(case.net)
        apply_plan(cut, plan, case.example)
        macs.append(count(cut, case.example).macs)
        previous = plan
    assert macs == sorted(macs, reverse=True)
    assert macs[0] == full  # a target that is met already removes nothing


def test_what_costs_most_for_its_importance_goes_first() -> None:
    case = Case()
    groups = [group for group in case.groups if group.prunable]
    ascending = {group.name: case.scores[group.name].argsort().tolist() for group in groups}
    steps = {
        group.name: steps_of(group, case.scores[group.name], ascending[group.name], "latency", 2, 2) for group in groups
    }
    model = case.model()
    order = most_saved_first(case.net, groups, steps, case.scores, ascending, model)
    assert sorted(order, key=lambda step: (step.group, -step.before)) != order, "groups take turns"
    widths = {group.name: group.channels for group in groups}

    def latency(widths: dict[str, int]) -> float:
        plan = PrunePlan(
            {name: tuple(range(width)) for name, width in widths.items()},
            {group.name: group.channels for group in groups},
        )
        cut = copy.deepcopy(case.net)
        apply_plan(cut, plan, case.example)
        return model.latency(kept_widths(cut, {}))

    def price(group: str, after: int) -> float:
        """Importance lost per time saved, from really cut networks."""
        gone = ascending[group][case.widths()[group] - widths[group] : case.widths()[group] - after]
        saved = latency(widths) - latency({**widths, group: after})
        return float(case.scores[group][gone].sum()) / saved if saved > 1e-12 else float("inf")

    left = {name: list(some) for name, some in steps.items()}
    position = 0
    for _ in range(6):
        cheapest = min(
            (price(name, step.after), name, i) for name, some in left.items() for i, step in enumerate(some[:8])
        )
        chunk = order[position : position + cheapest[2] + 1]
        assert [step.group for step in chunk] == [cheapest[1]] * len(chunk)
        assert chunk[-1].key == pytest.approx(cheapest[0])
        position += len(chunk)
        widths[cheapest[1]] = chunk[-1].after
        left[cheapest[1]] = left[cheapest[1]][len(chunk) :]


def test_both_targets_are_met_together() -> None:
    case = Case()
    full = count(case.net, case.example)
    plan = case.decide(targets={"macs": 0.7 * full.macs, "params": 0.4 * full.params})
    apply_plan(case.net, plan, case.example)
    cut = count(case.net, case.example)
    assert cut.macs <= 0.7 * full.macs
    assert cut.params <= 0.4 * full.params


def test_an_unreachable_target_names_the_range() -> None:
    case = Case()
    full = count(case.net, case.example).macs
    with pytest.raises(RecipeError, match=rf"target of 10 macs cannot be reached; .* reach from [\d,]+ .* to {full:,}"):
        case.decide(targets={"macs": 10})


def test_local_ratio_rounds_each_group_to_the_nearest_multiple() -> None:
    case = Case()
    plan = case.decide(ranking="local", pruning_ratio=0.5, round_to=4, min_channels=1)
    for name, kept in plan.keep.items():
        channels = group_named(case, name).channels
        assert len(kept) % 4 == 0
        assert abs(len(kept) - 0.5 * channels) <= 2 or len(kept) == 4
    small = {g.name for g in case.groups if g.prunable and g.channels <= 4}
    assert small
    assert all("leave none to remove" in plan.skipped[name] for name in small)


def test_global_ratio_removes_at_most_that_share() -> None:
    case = Case()
    total = sum(group.channels for group in case.groups if group.prunable)
    for ratio in (0.0, 0.2, 0.5):
        plan = case.decide(pruning_ratio=ratio, round_to=1, min_channels=1)
        gone = sum(plan.channels[name] - len(kept) for name, kept in plan.keep.items())
        assert ratio * total - 1 < gone <= ratio * total


def test_every_group_is_pruned_as_asked_or_listed() -> None:
    case = Case()
    plan = case.decide(ranking="local", pruning_ratio=0.9, round_to=4, min_channels=6)
    assert plan.keep.keys() | plan.skipped.keys() == {group.name for group in case.groups}
    assert plan.skipped["fc"] == "its channels are outputs of the network"
    assert "kept at 8 of 12 channels by round_to 4 and min_channels 6" in plan.skipped["stem.conv"]
    gentle = case.decide(ranking="local", pruning_ratio=0.05, round_to=4)
    assert "keeping 0.95 of 12 channels rounds to its 12 with round_to 4" in gentle.skipped["stem.conv"]
    assert not gentle.keep


def test_a_ratio_in_steps_ends_where_one_step_would() -> None:
    full = {group.name: group.channels for group in Case().groups}
    for ranking in ("local", "global"):
        once, case = Case(), Case()
        asked: dict[str, Any] = {"ranking": ranking, "round_to": 4, "min_channels": 4}
        once.prune(once.decide(pruning_ratio=0.4, **asked))
        for share in (0.25, 0.5, 0.75, 1.0):
            case.prune(case.decide(pruning_ratio=1 - 0.6**share, full=full, **asked))
        if ranking == "local":
            assert case.widths() == once.widths()
        else:
            assert abs(sum(case.widths().values()) - sum(once.widths().values())) <= 4


def test_a_global_ratio_that_cannot_be_reached_lists_every_group() -> None:
    case = Case()
    plan = case.decide(pruning_ratio=0.9, round_to=4, min_channels=8)
    assert plan.skipped.keys() == {group.name for group in case.groups}
    assert "pruning_ratio is not reached" in plan.skipped["stem.conv"]


def test_a_width_for_a_layer_that_is_not_the_root_of_its_group_is_noted() -> None:
    plan = Case().width(1.0, overrides={"pieces.0.*": 0.5})
    assert any(name.startswith("pieces.0.") for name in plan.keep)
    assert "stem.conv" not in plan.keep
    assert "widths['pieces.0.*'] matches 'pieces.0.b'" in plan.skipped["stem.conv"]
    named = Case().width(1.0, overrides={"pieces.0.*": 0.5, "stem.conv": 0.75})
    assert len(named.keep["stem.conv"]) < named.channels["stem.conv"]
    assert "matches" not in named.skipped.get("stem.conv", "")


def test_a_width_for_a_separable_convolution_says_nothing_of_the_layer_before() -> None:
    case = Case(Spec(("separable", "plain"), (12, 8, 8), True, True, "relu", "hidden", 4, 5))
    assert "depthwise" in {member.kind for member in group_named(case, "stem.conv").members}
    plan = case.width(1.0, overrides={"pieces.0.*": 0.5})
    assert plan.keep.keys() == {"pieces.0.b.conv"}
    assert "stem.conv" not in plan.skipped or "matches" not in plan.skipped["stem.conv"]
    with pytest.raises(RecipeError, match=r"widths\['pieces.0.a'\] matches no channel group; .* group 'stem.conv'"):
        case.width(1.0, overrides={"pieces.0.a": 0.5})


def test_same_seed_same_plan_and_equal_scores_in_channel_order() -> None:
    assert Case().decide(pruning_ratio=0.4) == Case().decide(pruning_ratio=0.4)
    case = Case()
    case.scores = {name: torch.ones_like(score) for name, score in case.scores.items()}
    plan = case.decide(ranking="local", pruning_ratio=0.5)
    assert plan.keep["stem.conv"] == tuple(range(6, 12))


def test_width_is_a_fraction_kept_with_overrides_by_group() -> None:
    case = Case()
    plan = case.width(0.5, overrides={"pieces.*": 1.0, "pieces.1.*": 0.75})
    assert len(plan.keep["stem.conv"]) == 6
    assert len(plan.keep["pieces.1.c.conv"]) == 8 or len(plan.keep["pieces.1.c.conv"]) == 10
    assert "pieces.0.a.conv" not in plan.keep
    assert not case.width(1.0).keep
    with pytest.raises(RecipeError, match=r"widths\['pieces.0.b'\] matches no channel group; .* group 'stem.conv'"):
        case.width(0.5, overrides={"pieces.0.b": 0.5})
    with pytest.raises(RecipeError, match=r"widths\['stem.cnv'\] matches no channel group; did you mean 'stem.conv'"):
        case.width(0.5, overrides={"stem.cnv": 0.5})
    with pytest.raises(RecipeError, match=r"0 < width <= 1; found 1\.5"):
        case.width(1.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either pruning_ratio or targets"),
        ({"pruning_ratio": 0.3, "targets": {"macs": 100}}, "either pruning_ratio or targets"),
        ({"pruning_ratio": 1.0}, "0 <= ratio < 1; found 1.0"),
        ({"pruning_ratio": 0.3, "round_to": 0}, "round_to must be at least 1; found 0"),
        ({"pruning_ratio": 0.3, "ranking": "both"}, "ranking 'both' is not one of local, global, latency"),
    ],
)
def test_contradictory_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Case().decide(**settings)


def test_missing_scores_are_refused() -> None:
    case = Case()
    case.scores["stem.conv"] = torch.ones(5)
    with pytest.raises(RecipeError, match=r"stem.conv: needs scores of shape \(12,\), found shape \(5,\)"):
        case.decide(pruning_ratio=0.3)


def damaged(**changes: object) -> dict[str, object]:
    value: dict[str, object] = {
        "version": 1,
        "keep": {"a": [0, 2]},
        "channels": {"a": 4},
        "skipped": {},
        "settings": {},
    }
    return value | changes


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "plan: expected an object, found list"),
        (damaged(version=9), "version 9 is not one this release reads"),
        (damaged(skipped=None), "'skipped' is missing or not an object"),
        (damaged(channels={}), r"channels\['a'\] is missing"),
        (damaged(keep={"a": [0, 4]}), r"keep\['a'\] must list channels from 0 to 3"),
        (damaged(keep={"a": [-1]}), r"keep\['a'\] must list channels"),
        (damaged(keep={"a": []}), r"keep\['a'\] must list channels"),
        (damaged(keep={"a": [True]}), r"keep\['a'\] must list channels"),
        (damaged(keep={"a": [2, 1]}), r"keep\['a'\] is not ascending"),
    ],
)
def test_damaged_plans_are_refused(value: object, message: str) -> None:
    assert PrunePlan.from_dict(damaged()).keep == {"a": (0, 2)}
    with pytest.raises(DataError, match=message):
        PrunePlan.from_dict(value)


@pytest.mark.parametrize("do", [apply_plan, mask_plan])
@pytest.mark.parametrize(
    ("keep", "channels", "message"),
    [
        ({"stem.cnv": (0,)}, {"stem.cnv": 12}, "no channel group 'stem.cnv'; did you mean 'stem.conv'"),
        ({"fc": (0,)}, {"fc": 3}, "'fc' must not be pruned: its channels are outputs"),
        ({"stem.conv": (0,)}, {"stem.conv": 10}, "'stem.conv' has 12 channels here, the plan was made for 10"),
        ({"stem.conv": (0, 12)}, {"stem.conv": 12}, r"'stem.conv' keeps \[12\] of channels 0..11"),
        ({"stem.conv": ()}, {"stem.conv": 12}, "'stem.conv' keeps nothing of channels 0..11"),
    ],
)
def test_a_plan_for_another_network_is_refused_untouched(
    do: Any, keep: dict[str, tuple[int, ...]], channels: dict[str, int], message: str
) -> None:
    case = Case()
    before = copy.deepcopy(case.net.state_dict())
    with pytest.raises(UnsupportedModelError, match=message):
        do(case.net, PrunePlan(keep, channels), case.example)
    assert all(torch.equal(value, before[name]) for name, value in case.net.state_dict().items())


def test_pruning_in_several_steps_refers_to_the_network_before_each() -> None:
    case = Case()
    first = case.decide(ranking="local", pruning_ratio=0.3)
    apply_plan(case.net, first, case.example)
    groups = find_groups(case.net, case.example, ignored=())
    assert {g.name: g.channels for g in groups if g.name in first.keep} == {n: len(k) for n, k in first.keep.items()}
    with pytest.raises(UnsupportedModelError, match="plans refer to the network before the edit"):
        apply_plan(case.net, first, case.example)


def test_a_plan_keeps_the_mode_of_the_network() -> None:
    case = Case()
    case.net.train()
    assert isinstance(case.net, nn.Module)
    apply_plan(case.net, case.decide(pruning_ratio=0.3), case.example)
    assert case.net.training
