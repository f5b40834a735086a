"""What one channel group alone costs in accuracy: really pruned, as a prune stage would, and scored.

Invariant: the network asked about is never touched. A figure equals that of pruning this group and no other, for the
plan, the surgery on all coupled layers and the statistics of BatchNorm are those of the stage (but for the importance
`random`, whose draws depend on how many groups there are).
"""

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from compressor.data import Split
from compressor.inference import evaluate, reestimate_batchnorm
from compressor.preprocess import InputSpec
from compressor.pruning.apply import apply_plan
from compressor.pruning.coupling import ChannelGroup
from compressor.pruning.plan import PrunePlan, decide_plan


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
        train: Images that BatchNorm statistics are estimated from.
        val: Images that are scored.
        spec: Their preprocessing.
        bn_batches: Training batches for the statistics; 0 leaves them.
        seed: Decides which.
        device: Where to compute.
    """
    network = copy.deepcopy(module)
    apply_plan(network, plan, example)
    reestimate_batchnorm(network, train, spec, passes=bn_batches, seed=seed, device=device)
    return evaluate(network, val, spec, device=device)
