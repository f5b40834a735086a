"""Knowledge distillation (arXiv 1503.02531): what the teacher says of the training images.

Invariant: a teacher never changes, so its answer about an image is computed once a training; the same image turned or
mirrored is another.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor.data import Split
from compressor.feed import Batch
from compressor.outputs import logits_of
from compressor.preprocess import InputSpec

MOST_BYTES = 1 << 28  # of remembered answers


@dataclass(frozen=True)
class Distillation:
    """KL divergence to the teacher's softened outputs, times T squared, with a weight beside the labels' loss.

    `shown` is what the teacher sees where it takes images of another size: the training images at its own.
    """

    teacher: nn.Module
    temperature: float
    weight: float
    shown: tuple[Split, InputSpec] | None = None


class Answers:
    """The teacher's logits by image and orientation, asked for once and remembered, where they can be numbered."""

    def __init__(self, teacher: nn.Module, rows: int, device: str):
        """`rows` is `Feed.rows`; the teacher is moved to `device` and stays there."""
        self.teacher = teacher.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.rows, self.asked = rows, 0
        self.answered = np.zeros(rows, np.bool_)
        self.logits: Tensor | None = None

    @torch.no_grad()
    def of(self, batch: Batch) -> Tensor:
        """Logits (N, classes) in float32, in the caller's precision."""
        if batch.rows is None or not self.rows:
            return self._ask(batch, None)
        absent = np.flatnonzero(~self.answered[batch.rows])
        if len(absent):
            answers = self._ask(batch, None if len(absent) == len(batch.rows) else absent)
            if self.logits is None:
                if self.rows * answers[0].nbytes > MOST_BYTES:
                    self.rows = 0
                    return answers
                self.logits = answers.new_empty(self.rows, answers.shape[1])
            self.logits[torch.from_numpy(batch.rows[absent])] = answers
            self.answered[batch.rows[absent]] = True
        assert self.logits is not None
        return self.logits[torch.from_numpy(batch.rows)]

    def _ask(self, batch: Batch, places: NDArray[np.int64] | None) -> Tensor:
        images = batch.images(places)
        self.asked += len(images)
        return logits_of(self.teacher(images)).float()
