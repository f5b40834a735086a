"""Depth reduction: drop residual blocks one by one, each time the one whose removal hurts a measured loss least.

Invariant: a choice depends only on measured losses; equal losses are decided by the order of the blocks.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from compressor.errors import TrainingError
from compressor.pruning.blocks import drop_blocks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drop:
    """One dropped block: the loss of every candidate without it, and the loss before and after recovery."""

    block: str
    candidates: dict[str, float]
    loss_before: float
    loss_after: float


def measure_without(module: nn.Module, block: str, loss: Callable[[nn.Module], float]) -> float:
    """Loss of the network with one block bypassed; the network is unchanged afterwards."""
    parent_name, _, child = block.rpartition(".")
    parent = module.get_submodule(parent_name)
    original = module.get_submodule(block)
    setattr(parent, child, nn.Identity())
    try:
        return loss(module)
    finally:
        setattr(parent, child, original)


def drop_greedily(
    module: nn.Module,
    blocks: Sequence[str],
    *,
    done: Callable[[nn.Module, int], bool],
    loss: Callable[[nn.Module], float],
    recover: Callable[[nn.Module, int], None],
    before: Sequence[Drop] = (),
    after: Callable[[list[Drop]], None] = lambda _: None,
) -> list[Drop]:
    """Drop blocks from `module` in place until `done(module, dropped)`, or until none is left.

    Args:
        blocks: names of candidates, removable in any order (see `find_blocks`).
        done: asked before each drop and after the last, with the number dropped so far; may refuse to go on.
        loss: the measured loss, lower is better (validation or distillation loss).
        recover: trains the network a little after each drop; gets the drop's index.
        before: drops that are behind `module` already.
        after: told all drops after each.

    Returns:
        All drops, `before` too.

    Raises:
        TrainingError: a measured loss is not finite.
    """
    drops = list(before)
    remaining = [name for name in blocks if name not in [drop.block for drop in drops]]
    while not done(module, len(drops)) and remaining:
        candidates = {name: measure_without(module, name, loss) for name in remaining}
        for name, value in candidates.items():
            if not math.isfinite(value):
                raise TrainingError(f"the loss measured without {name} is {value}; the network before it is no good")
        chosen = min(remaining, key=lambda name: candidates[name])
        remaining.remove(chosen)
        drop_blocks(module, [chosen])
        recover(module, len(drops))
        drop = Drop(chosen, candidates, candidates[chosen], loss(module))
        log.info("dropped %s: loss %.4f, after recovery %.4f", chosen, drop.loss_before, drop.loss_after)
        drops.append(drop)
        after(drops)
    return drops
