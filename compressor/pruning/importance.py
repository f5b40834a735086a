"""How much each channel matters: one score per decision of a group, low scores go first.

Invariant: a score covers the true group, that is every coupled layer's rows, columns and BatchNorm scales, and the
network comes back exactly as it was: weights, statistics, modes, gradients.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import DataError, RecipeError, did_you_mean
from compressor.pruning import data_scores, weight_scores
from compressor.pruning.coupling import ChannelGroup
from compressor.pruning.data_scores import LossFunction
from compressor.pruning.slices import by_mean

Importance = Literal["magnitude", "bn_scale", "fpgm", "lamp", "taylor", "hessian", "activation", "random"]

_OF_WEIGHTS = {
    "magnitude": weight_scores.magnitude,
    "bn_scale": weight_scores.bn_scale,
    "fpgm": weight_scores.fpgm,
    "lamp": weight_scores.lamp,
}
_OF_DATA = {
    "taylor": data_scores.taylor,
    "hessian": data_scores.hessian,
    "activation": data_scores.activation,
}
NEEDS_BATCHES = frozenset(_OF_DATA)
IN_UNITS_OF_LOSS = frozenset({"taylor", "hessian"})  # comparable over all groups before they are normalised
_COMPARABLE = frozenset({"lamp"})  # made to be ranked over all groups as they are


def score_groups(
    module: nn.Module,
    groups: Sequence[ChannelGroup],
    *,
    kind: Importance,
    loss_batches: Iterable[tuple[Tensor, Tensor]] | None,
    seed: int,
    loss: LossFunction | None = None,
    normalise: bool = True,
) -> dict[str, Tensor]:
    """Score every decision of every prunable group.

    What each kind measures, and where it comes from, stands in `weight_scores` and `data_scores`; `random` is uniform.

    Args:
        module: The network the groups were found in.
        groups: From `find_groups`; unprunable ones are passed over.
        kind: Which score.
        loss_batches: For the kinds in `NEEDS_BATCHES`: inputs `(N, C, H, W)` and labels, on the network's device. Not
            used otherwise.
        seed: For `random`.
        loss: Of (logits, labels), a scalar; cross-entropy when None.
        normalise: Divide each group's scores by their mean, which makes groups of any kind comparable in a global
            ranking. Without it `taylor` and `hessian` stay in units of the loss, which are comparable too and let
            unimportant groups shrink as a whole. `lamp` is comparable by itself and never divided.

    Returns:
        Group name to float32 scores `(channels,)` on the CPU.

    Raises:
        RecipeError: If `kind` is unknown, has no batches though it needs them, or `bn_scale` meets a group without.
        DataError: If a score is not finite, for instance because the loss is NaN.
    """
    raw = raw_scores(module, groups, kind=kind, loss_batches=loss_batches, seed=seed, loss=loss)
    return scaled(raw, kind, normalise=normalise)


def scaled(raw: Mapping[str, Tensor], kind: str, *, normalise: bool = True) -> dict[str, Tensor]:
    """Scores as `score_groups` returns them, of what `raw_scores` returned."""
    divided = normalise and kind not in _COMPARABLE
    return {name: (by_mean(score) if divided else score).float() for name, score in raw.items()}


def raw_scores(
    module: nn.Module,
    groups: Sequence[ChannelGroup],
    *,
    kind: Importance,
    loss_batches: Iterable[tuple[Tensor, Tensor]] | None,
    seed: int,
    loss: LossFunction | None = None,
) -> dict[str, Tensor]:
    """What `score_groups` begins with: float64, in the kind's own unit. Arguments and errors as there."""
    chosen = [group for group in groups if group.prunable]
    if kind in _OF_WEIGHTS:
        scores = {group.name: _OF_WEIGHTS[kind](module, group) for group in chosen}
    elif kind in _OF_DATA:
        batches = list(loss_batches or ())
        if not batches:
            raise RecipeError(
                f"importance: '{kind}' needs at least one batch with labels, got none; 'magnitude' needs none"
            )
        scores = _OF_DATA[kind](module, chosen, batches, loss or F.cross_entropy)
    elif kind == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = {group.name: torch.rand(group.channels, generator=generator) for group in chosen}
    else:
        kinds = get_args(Importance)
        raise RecipeError(f"importance: '{kind}' is not one of {', '.join(kinds)}{did_you_mean(kind, kinds)}")
    for name, score in scores.items():
        if not bool(score.isfinite().all()):
            raise DataError(f"{name}: its {kind} scores are not finite; check the weights and the loss for NaN")
    return scores
