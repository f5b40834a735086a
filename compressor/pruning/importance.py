"""How much each channel matters: one score per decision of a group, low scores go first.

Invariant: a score covers the true group, that is every coupled layer's rows, columns and BatchNorm scales, and the
network comes back exactly as it was: weights, statistics, modes, gradients.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import DataError, RecipeError, did_you_mean
from compressor.outputs import logits_of
from compressor.pruning.coupling import SIZES, ChannelGroup, Member

Importance = Literal["magnitude", "taylor", "random"]
LossFunction = Callable[[Tensor, Tensor], Tensor]


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

    `magnitude` is the L2 norm of what a decision removes (arXiv 1608.08710), taken over the whole group (DepGraph,
    arXiv 2301.12900): each member's norms are divided by their mean, so that a BatchNorm scale near 1 and a filter of a
    thousand small weights weigh the same, then averaged over members. `taylor` is the first-order change of the loss,
    the sum over members of |sum of weight x gradient|, averaged over batches (arXiv 1906.10771). `random` is uniform.

    Args:
        module: The network the groups were found in.
        groups: From `find_groups`; unprunable ones are passed over.
        kind: Which score.
        loss_batches: For `taylor`: inputs `(N, C, H, W)` and labels, on the network's device. Not used otherwise.
        seed: For `random`.
        loss: Of (logits, labels), a scalar; cross-entropy when None.
        normalise: Divide each group's scores by their mean, which makes groups of any kind comparable in a global
            ranking. Without it `taylor` stays in units of the loss, which are comparable too and let unimportant
            groups shrink as a whole.

    Returns:
        Group name to float32 scores `(channels,)` on the CPU.

    Raises:
        RecipeError: If `kind` is unknown, or `taylor` has no batches to differentiate.
        DataError: If a score is not finite, for instance because the loss is NaN.
    """
    chosen = [group for group in groups if group.prunable]
    if kind == "magnitude":
        scores = {group.name: _magnitude(module, group) for group in chosen}
    elif kind == "taylor":
        if loss_batches is None:
            raise RecipeError("importance: 'taylor' needs batches with labels, none were given; 'magnitude' needs none")
        scores = _taylor(module, chosen, loss_batches, loss or F.cross_entropy)
    elif kind == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = {group.name: torch.rand(group.channels, generator=generator) for group in chosen}
    else:
        kinds = ("magnitude", "taylor", "random")
        raise RecipeError(f"importance: '{kind}' is not one of {', '.join(kinds)}{did_you_mean(kind, kinds)}")
    for name, score in scores.items():
        if not bool(score.isfinite().all()):
            raise DataError(f"{name}: its {kind} scores are not finite; check the weights and the loss for NaN")
        if normalise:
            scores[name] = _by_mean(score)
    return {name: score.float() for name, score in scores.items()}


def _by_mean(score: Tensor) -> Tensor:
    mean = score.mean()
    return score / mean if mean > 0 else torch.ones_like(score)


def _slices(layer: nn.Module, member: Member, tensors: dict[str, Tensor]) -> Iterator[Tensor]:
    """Yield per-channel views `(C, ...)` of the given tensors of a layer, C being this side's channels.

    Args:
        layer: The member's layer.
        member: Which side of it.
        tensors: Tensors to slice, shaped like the layer's `weight` and `bias`.
    """
    weight = tensors["weight"]
    if member.kind == "in":
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            # Block b of the filters reads block b of the channels: (G, out/G, in/G, k, k) -> (G * in/G, out/G, k, k).
            blocks = weight.reshape(layer.groups, -1, *weight.shape[1:]).transpose(1, 2)
            yield blocks.flatten(0, 1)
        else:
            yield weight.transpose(0, 1)
        return
    yield weight
    if "bias" in tensors:
        yield tensors["bias"]


def _per_decision(values: Tensor, member: Member) -> Tensor:
    """Sum `(C,)` values of a layer side over the channels of each decision."""
    lengths = torch.tensor([len(indices) for indices in member.indices])
    flat = torch.tensor([index for indices in member.indices for index in indices])
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return torch.zeros(len(lengths), dtype=values.dtype).index_add_(0, owner, values.cpu()[flat])


def _magnitude(module: nn.Module, group: ChannelGroup) -> Tensor:
    total = torch.zeros(group.channels, dtype=torch.float64)
    for member in group.members:
        layer = module.get_submodule(member.layer)
        if member.kind.startswith(SIZES) or not isinstance(getattr(layer, "weight", None), Tensor):
            continue  # BatchNorm without affine parameters
        weight = layer.get_parameter("weight").detach().double()
        # Biases and BatchNorm shifts are left out: a large one puts a channel far from zero, it does not make it vary.
        (rows,) = _slices(layer, member, {"weight": weight})
        squares = rows.reshape(len(rows), -1).square().sum(1)
        total += _by_mean(_per_decision(squares, member).sqrt())
    return total / len(group.members)


def _taylor(
    module: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: LossFunction,
) -> dict[str, Tensor]:
    scores = {group.name: torch.zeros(group.channels, dtype=torch.float64) for group in groups}
    names = sorted({m.layer for group in groups for m in group.members if not m.kind.startswith(SIZES)})
    slots = [
        (name, tensor, parameter)
        for name in names
        for tensor, parameter in module.get_submodule(name).named_parameters(recurse=False)
    ]
    seen = 0
    with _differentiable(module):
        for images, labels in batches:
            value = loss(logits_of(module(images)), labels)
            # `autograd.grad` leaves every `.grad` alone, also that of parameters outside the groups.
            gradients = torch.autograd.grad(value, [slot[2] for slot in slots], allow_unused=True)
            products: dict[str, dict[str, Tensor]] = {name: {} for name in names}
            for (name, tensor, parameter), gradient in zip(slots, gradients, strict=True):
                if gradient is not None:
                    products[name][tensor] = parameter.detach().double() * gradient.double()
            for group in groups:
                for member in group.members:
                    if not member.kind.startswith(SIZES) and "weight" in products[member.layer]:
                        rows = _slices(module.get_submodule(member.layer), member, products[member.layer])
                        change = torch.stack([row.reshape(len(row), -1).sum(1) for row in rows]).sum(0)
                        scores[group.name] += _per_decision(change, member).abs()
            seen += 1
    if not seen:
        raise RecipeError("importance: 'taylor' needs at least one batch with labels, got an empty iterable")
    return {name: score / seen for name, score in scores.items()}


@contextmanager
def _differentiable(module: nn.Module) -> Iterator[None]:
    """Eval mode (BatchNorm's running statistics, no dropout) with gradients for frozen parameters too."""
    modes = [(layer, layer.training) for layer in module.modules()]
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    module.eval()
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for layer, training in modes:
            layer.training = training
