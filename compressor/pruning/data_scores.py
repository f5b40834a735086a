"""Importances that need images: how the loss, or what is computed, depends on each channel.

Each takes the network, its groups, at least one batch of inputs `(N, C, H, W)` and labels, and a loss of (logits,
labels); it returns float64 scores `(channels,)` by group, low ones to be removed first.

Invariant: the network comes back exactly as it was: weights, statistics, modes, gradients.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compressor.modes import evaluating
from compressor.outputs import logits_of
from compressor.pruning.coupling import ChannelGroup, Member
from compressor.pruning.slices import by_mean, has_bias_rows, per_decision, rows_of, weighted_members

LossFunction = Callable[[Tensor, Tensor], Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]
# Of a parameter and its gradient, element by element, in float64.
_Change = Callable[[Tensor, Tensor], Tensor]


def taylor(
    module: nn.Module, groups: Sequence[ChannelGroup], batches: Batches, loss: LossFunction
) -> dict[str, Tensor]:
    """First-order change of the loss: over members, |sum of weight x gradient|, averaged over batches (1906.10771)."""
    return _sensitivity(module, groups, batches, loss, lambda weight, gradient: weight * gradient)


def hessian(
    module: nn.Module, groups: Sequence[ChannelGroup], batches: Batches, loss: LossFunction
) -> dict[str, Tensor]:
    """Second-order change of the loss with a diagonal Hessian, half the sum of weight² x curvature.

    Optimal Brain Damage (LeCun et al., NIPS 1989); the curvature is the Fisher information, the mean over all samples
    of the squared gradient of each one's loss (arXiv 1801.05787).
    """
    samples = (
        (image[None], label[None]) for images, labels in batches for image, label in zip(images, labels, strict=True)
    )
    return _sensitivity(module, groups, samples, loss, lambda weight, gradient: 0.5 * (weight * gradient).square())


def activation(
    module: nn.Module, groups: Sequence[ChannelGroup], batches: Batches, loss: LossFunction
) -> dict[str, Tensor]:
    """Mean size of what the group's readers are given, over samples and positions (arXiv 1611.06440); no gradients."""
    readers = {
        group.name: [(m, layer) for m, layer in weighted_members(module, group) if m.kind in ("in", "depthwise")]
        for group in groups
    }
    sums: dict[str, Tensor] = {}
    hooks = []

    def watch(member: Member, layer: nn.Module) -> None:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().double()
            channels = x.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
            sums[member.layer] = sums.get(member.layer, torch.zeros(())) + channels.abs().mean(1).cpu()

        hooks.append(layer.register_forward_pre_hook(note))

    watched = {member.layer: (member, layer) for pairs in readers.values() for member, layer in pairs}
    for member, layer in watched.values():
        watch(member, layer)
    try:
        with evaluating(module):
            for images, _ in batches:
                module(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        group.name: sum(
            (by_mean(per_decision(sums[member.layer], member)) for member, _ in readers[group.name]),
            torch.zeros(group.channels, dtype=torch.float64),
        )
        / max(len(readers[group.name]), 1)
        for group in groups
    }


def _sensitivity(
    module: nn.Module, groups: Sequence[ChannelGroup], batches: Batches, loss: LossFunction, change: _Change
) -> dict[str, Tensor]:
    """Per batch and member the size of the sum of `change` over what goes with a decision; then the mean of batches."""
    scores = {group.name: torch.zeros(group.channels, dtype=torch.float64) for group in groups}
    sides = [(group.name, member, layer) for group in groups for member, layer in weighted_members(module, group)]
    layers = {member.layer: layer for _, member, layer in sides}
    slots = [
        (name, tensor, parameter)
        for name, layer in sorted(layers.items())
        for tensor, parameter in layer.named_parameters(recurse=False)
    ]
    seen = 0
    with _differentiable(module):
        for images, labels in batches:
            value = loss(logits_of(module(images)), labels)
            # `autograd.grad` leaves every `.grad` alone, also that of parameters outside the groups.
            gradients = torch.autograd.grad(value, [slot[2] for slot in slots], allow_unused=True)
            changes = {
                (name, tensor): change(parameter.detach().double(), gradient.double())
                for (name, tensor, parameter), gradient in zip(slots, gradients, strict=True)
                if gradient is not None
            }
            for group, member, layer in sides:
                weight, bias = (changes.get((member.layer, tensor)) for tensor in ("weight", "bias"))
                if weight is None:
                    continue
                rows = rows_of(layer, member, weight)
                total = rows.reshape(len(rows), -1).sum(1)
                if bias is not None and has_bias_rows(member):
                    total = total + bias
                scores[group] += per_decision(total, member).abs()
            seen += 1
    return {name: score / seen for name, score in scores.items()}


@contextmanager
def _differentiable(module: nn.Module) -> Iterator[None]:
    """Eval mode (BatchNorm's running statistics, no dropout) with gradients for frozen parameters too."""
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with evaluating(module), torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
