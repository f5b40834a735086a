"""What one channel group alone costs: really pruned, as a prune stage would, and scored.

Invariant: the network asked about is never touched. A figure equals that of pruning this group and no other, for the
plan, the surgery on all coupled layers and the statistics of BatchNorm are those of the stage (but for the importance
`random`, whose draws depend on how many groups there are).
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.data import Split
from compressor.inference import choose_precision, evaluate, predict, reestimate_batchnorm
from compressor.preprocess import InputSpec
from compressor.pruning.apply import apply_plan
from compressor.pruning.coupling import ChannelGroup
from compressor.pruning.plan import PrunePlan, decide_plan
from compressor.pruning.reconstruction import Moments, reconstruct
from compressor.pruning.surgery import shrink

PROBED = (0.25, 0.5)  # of a group's channels
LEAST_DAMAGE = 1e-9  # nats: nothing is free, and a power law needs positive values


def plan_alone(
    module: nn.Module,
    example: Tensor,
    group: ChannelGroup,
    scores: Mapping[str, Tensor],
    *,
    ratio: float,
    round_to: int,
    min_channels: int,
) -> PrunePlan:
    """The plan that takes a fraction of one group's channels and leaves all others; see `decide_plan`."""
    return decide_plan(
        module,
        example,
        groups=[group],
        scores=scores,
        ranking="local",
        pruning_ratio=ratio,
        round_to=round_to,
        min_channels=min_channels,
    )


def score_pruned(
    module: nn.Module,
    example: Tensor,
    plan: PrunePlan,
    groups: Sequence[ChannelGroup],
    moments: Moments,
    *,
    train: Split,
    val: Split,
    spec: InputSpec,
    bn_batches: int,
    seed: int,
    device: str,
) -> tuple[float, float]:
    """Top-1 accuracy and mean cross-entropy on `val` of a pruned copy, before any training.

    In float32 on every machine, as the validation accuracy of a stage is, so that the two can be compared.

    Args:
        module: The network; left as it is.
        example: Input (1, C, H, W).
        plan: What to keep.
        groups: Those of the network.
        moments: From `reader_moments`, with which readers are refitted before the cut; none = they are not.
        train: Images that BatchNorm statistics are estimated from.
        val: Images that are scored.
        spec: Their preprocessing.
        bn_batches: Training batches for the statistics; 0 leaves them.
        seed: Decides which.
        device: Where to compute.
    """
    network = copy.deepcopy(module)
    reconstruct(network, groups, plan.keep, moments)
    apply_plan(network, plan, example)
    reestimate_batchnorm(network, train, spec, passes=bn_batches, seed=seed, device=device)
    return evaluate(network, val, spec, device=device)


def damage_of(
    module: nn.Module,
    groups: Sequence[ChannelGroup],
    moments: Moments,
    *,
    train: Split,
    judged: Split,
    spec: InputSpec,
    bn_batches: int,
    seed: int,
    device: str,
) -> Callable[[PrunePlan], float]:
    """A function from a plan to what it does to the network's answers before any training.

    Groups are as they were found: tracing the network anew for each plan would take most of the time. What is pruned in
    the end is checked as a whole. With `moments`, from `reader_moments`, readers are refitted before each cut.

    Returns:
        Mean Kullback-Leibler divergence, in nats, of a pruned copy's class probabilities from the network's, on the
        images of `judged`, whose labels are not looked at. In bf16 where the processor has it: groups are compared.
    """
    dtype = choose_precision("auto", device)
    whole = F.log_softmax(predict(module, judged.images, spec, device=device, dtype=dtype), dim=1)

    def damage(plan: PrunePlan) -> float:
        network = copy.deepcopy(module)
        reconstruct(network, groups, plan.keep, moments)
        shrink(network, groups, plan.keep)
        reestimate_batchnorm(network, train, spec, passes=bn_batches, seed=seed, device=device)
        logits = predict(network, judged.images, spec, device=device, dtype=dtype)
        return float(F.kl_div(F.log_softmax(logits, dim=1), whole, reduction="batchmean", log_target=True))

    return damage


def scores_by_damage(
    module: nn.Module,
    example: Tensor,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    damage: Callable[[PrunePlan], float],
    *,
    round_to: int,
    min_channels: int,
) -> tuple[dict[str, Tensor], dict[str, dict[float, float]]]:
    """Scores that can be compared between groups: they add up to what a group's removal was measured to do.

    Scores from weights or gradients say which channel of a group goes first, but a tenth of a small early layer can be
    worth more than half of a late one. So each group is cut alone, by a quarter and by a half, and the damage is
    measured (as NetAdapt does for each of its steps, arXiv 1804.03230). A power law through both says what any number
    of its channels are worth; it is steepened where the group nears its end, so that no group is emptied.

    Args:
        module: The network.
        example: Input (1, C, H, W).
        groups: Its groups.
        scores: From `score_groups`: the order within each group stays.
        damage: See `damage_of`.
        round_to: As for the plan that the scores are for.
        min_channels: Likewise.

    Returns:
        A score for each channel of the groups that can be cut, those of other groups as they were; and for each group
        that was cut the share of its channels that went and the damage that did.
    """
    measured, damages = dict(scores), {}
    for group in groups:
        if not group.prunable:
            continue
        points: dict[float, float] = {}
        for ratio in PROBED:
            plan = plan_alone(module, example, group, scores, ratio=ratio, round_to=round_to, min_channels=min_channels)
            if group.name in plan.keep:
                share = 1 - len(plan.keep[group.name]) / group.channels
                if share not in points:
                    points[share] = max(damage(plan), LEAST_DAMAGE)
        if points:
            damages[group.name] = points
            values = _increments(points, group.channels)
            ascending = scores[group.name].argsort(stable=True)
            measured[group.name] = torch.empty(group.channels, dtype=torch.float64).index_copy(0, ascending, values)
    return measured, damages


def _increments(points: Mapping[float, float], channels: int) -> Tensor:
    """What each further channel costs, least important first: differences of the curve through measured points."""
    (first, least), (last, most) = min(points.items()), max(points.items())
    power = max(1.0, math.log(most / least) / math.log(last / first)) if last > first else 1.0
    share = torch.arange(channels + 1, dtype=torch.float64) / channels
    lost = most * (share / last) ** power
    beyond = share > last
    lost[beyond] *= (1 - last) / (1 - share[beyond]).clamp_min(0.5 / channels)
    rising = 1 + torch.arange(channels, dtype=torch.float64) * 1e-9  # equal ones would forget their order
    return lost.diff() * rising
