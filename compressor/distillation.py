"""Knowledge distillation (arXiv 1503.02531): what the teacher says of the training images, and what it bases it on.

Invariant: a teacher never changes, so its answer about an image is computed once a training; the same image turned or
mirrored is another.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor.data import Split, calibration_indices
from compressor.data.batches import to_input
from compressor.errors import UnsupportedModelError
from compressor.feed import Batch
from compressor.inference import arithmetic
from compressor.models.heads import find_head, look
from compressor.modes import evaluating
from compressor.outputs import logits_of
from compressor.preprocess import InputSpec

MOST_BYTES = 1 << 28  # of remembered answers
MIMICRY_IMAGES = 256  # what features vary by, and maps between them, are taken from
RIDGE = 1e-2  # of the mean variance of what a linear map is fitted to


class Tap:
    """What a network's classifier took in last: (N, width), as it was computed."""

    def __init__(self) -> None:
        self.value = torch.empty(0)

    def keep(self, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A forward hook of the classifier."""
        self.value = inputs[0].flatten(1)


@dataclass(frozen=True)
class Mimicry:
    """Squared error of what the student's classifier takes in, over the variance of what the teacher's does.

    Attributes:
        student: Of the network that is trained.
        teacher: Of the teacher.
        bridge: From the student's width to the teacher's; trained along, and left behind.
        weight: Of this error in the loss.
        variance: Mean over the teacher's features.
    """

    student: Tap
    teacher: Tap
    bridge: nn.Module
    weight: float
    variance: float

    def loss(self, wanted: Tensor) -> Tensor:
        """For the student's last forward pass; `wanted` is (N, width), the teacher's."""
        error = F.mse_loss(self.bridge(self.student.value.float()), wanted)
        return self.weight * error / self.variance


@dataclass(frozen=True)
class Distillation:
    """KL divergence to the teacher's softened outputs, times T squared, with a weight beside the labels' loss.

    Attributes:
        shown: What the teacher sees where it takes images of another size: the training images at its own.
        mimicry: What is asked of features beside all that.
    """

    teacher: nn.Module
    temperature: float
    weight: float
    shown: tuple[Split, InputSpec] | None = None
    mimicry: Mimicry | None = None


@contextmanager
def mimicking(
    student: nn.Module,
    teacher: nn.Module,
    *,
    weight: float,
    train: Split,
    spec: InputSpec,
    shown: tuple[Split, InputSpec] | None,
    dtype: torch.dtype,
    device: str,
    seed: int,
) -> Iterator[Mimicry]:
    """Compare features while the block runs; both networks are on `device` already.

    Where the widths differ, the map between them begins as that of least squares on some training images: from a random
    one, the student would first be told to become something else.

    Raises:
        UnsupportedModelError: one of the two has no classifier that could be looked in front of.
    """
    chosen = calibration_indices(train, MIMICRY_IMAGES, seed)
    seen, seen_spec = shown or (train, spec)
    with (
        _tapped(student, to_input(train.images[:1], spec, device), "network") as taken,
        _tapped(teacher, to_input(seen.images[:1], seen_spec, device), "teacher") as wanted,
    ):
        goal = _features(teacher, wanted, seen, seen_spec, chosen, dtype, device)
        found = _features(student, taken, train, spec, chosen, dtype, device)
        bridge = nn.Identity() if found.shape == goal.shape else linear_map(found, goal)
        yield Mimicry(taken, wanted, bridge, weight, max(float(goal.var(0).mean()), 1e-12))


@contextmanager
def _tapped(module: nn.Module, example: Tensor, whose: str) -> Iterator[Tap]:
    seen = look(module, example)
    head = find_head(seen, seen.widths[0])
    if head is None:
        raise UnsupportedModelError(
            f"distill.features: no linear layer or 1x1 convolution makes the {seen.widths[0]} outputs of the {whose}, "
            "so there is nothing in front of it to compare; leave out `features`"
        )
    tap = Tap()
    hook = module.get_submodule(head).register_forward_pre_hook(tap.keep)
    try:
        yield tap
    finally:
        hook.remove()


@torch.no_grad()
def _features(
    module: nn.Module,
    tap: Tap,
    split: Split,
    spec: InputSpec,
    chosen: NDArray[np.int64],
    dtype: torch.dtype,
    device: str,
) -> Tensor:
    """What the classifier takes in for some images: (N, width), float32."""
    parts = []
    with evaluating(module), arithmetic(dtype, device):
        for start in range(0, len(chosen), 32):
            module(to_input(split.images[np.sort(chosen[start : start + 32])], spec, device))
            parts.append(tap.value.float())
    return torch.cat(parts)


def linear_map(taken: Tensor, wanted: Tensor) -> nn.Linear:
    """The map from (N, a) to (N, b) of least squares, held back where images are few (ridge regression)."""
    mean, goal = taken.mean(0), wanted.mean(0)
    x, y = (taken - mean).double(), (wanted - goal).double()
    covariance = x.T @ x / len(x)
    held = covariance + RIDGE * covariance.diagonal().mean().clamp(min=1e-12) * torch.eye(len(covariance)).to(x)
    weight = torch.linalg.solve(held, x.T @ y / len(x)).T.float()
    found = nn.Linear(taken.shape[1], wanted.shape[1]).to(taken.device)
    with torch.no_grad():
        found.weight.copy_(weight)
        found.bias.copy_(goal - weight @ mean)
    return found


class Answers:
    """What the teacher gives by image and orientation, asked for once and remembered, where they can be numbered."""

    def __init__(self, distill: Distillation, rows: int, device: str):
        """`rows` is `Feed.rows`; the teacher is moved to `device` and stays there."""
        teacher = distill.teacher.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.teacher, self.mimicry = teacher.eval(), distill.mimicry
        self.rows, self.asked = rows, 0
        self.answered = np.zeros(rows, np.bool_)
        self.values: Tensor | None = None

    @torch.no_grad()
    def of(self, batch: Batch) -> Tensor:
        """Logits (N, classes) in float32, in the caller's precision; features, if asked for, are further columns."""
        if batch.rows is None or not self.rows:
            return self._ask(batch, None)
        absent = np.flatnonzero(~self.answered[batch.rows])
        if len(absent):
            answers = self._ask(batch, None if len(absent) == len(batch.rows) else absent)
            if self.values is None:
                if self.rows * answers[0].nbytes > MOST_BYTES:
                    self.rows = 0
                    return answers
                self.values = answers.new_empty(self.rows, answers.shape[1])
            self.values[torch.from_numpy(batch.rows[absent])] = answers
            self.answered[batch.rows[absent]] = True
        assert self.values is not None
        return self.values[torch.from_numpy(batch.rows)]

    def _ask(self, batch: Batch, places: NDArray[np.int64] | None) -> Tensor:
        images = batch.images(places)
        self.asked += len(images)
        logits = logits_of(self.teacher(images)).float()
        return torch.cat([logits, self.mimicry.teacher.value.float()], 1) if self.mimicry else logits
