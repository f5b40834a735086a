"""One training loop for baseline, recovery after pruning, and quantization-aware training.

Invariant: given the same seed, threads and machine, the same weights come out; on any error the network holds its last
good weights.
"""

import itertools
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.checkpointing import checkpointed
from compressor.clock import Clock
from compressor.data import Split
from compressor.data.batches import Augment, to_input
from compressor.distillation import Answers, Distillation
from compressor.errors import TrainingError
from compressor.feed import NOTHING_FROZEN, Batch, Frozen, open_feed
from compressor.frozen_prefix import train_mode
from compressor.inference import arithmetic, choose_precision, evaluate, predict
from compressor.models.weights import restore
from compressor.optimizers import make_optimizer
from compressor.outputs import logits_of
from compressor.preprocess import InputSpec

log = logging.getLogger(__name__)
# An epoch whose mean loss is this many times the larger of the first epoch's and chance level has diverged; the first
# epoch is compared with its own first step.
DIVERGED = 4.0


@dataclass(frozen=True)
class Epoch:
    """One line of the learning curve. `seconds` counts from the start of the stage."""

    epoch: int
    loss: float
    val_accuracy: float
    val_loss: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class Progress:
    """Where a stage stands; attached to log records as `progress` so that only the command line draws."""

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    val_accuracy: float | None
    seconds: float


@dataclass
class TrainingResult:
    """What `finetune` did; the network itself holds the weights of `best_epoch` (-1: those it started from)."""

    history: list[Epoch] = field(default_factory=list)
    best_epoch: int = -1
    start_accuracy: float = 0.0
    val_accuracy: float = 0.0
    val_loss: float = math.inf
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    time: dict[str, float] = field(default_factory=dict)  # seconds of `data`, `teacher`, `step` and `validation`
    precision: str = "float32"
    teacher_images: int = 0  # how many the teacher was asked about
    checkpointed: int = 0  # blocks that were computed twice
    frozen: dict[str, Any] | None = None  # what was frozen and what of it was cached, see `feed.Feed`


def loss_of(
    outputs: Tensor,
    labels: Tensor,
    label_smoothing: float,
    teacher_outputs: Tensor | None,
    distill: Distillation | None,
    blend: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Cross-entropy, blended with distillation: `(1 - weight) * CE + weight * T^2 * KL(teacher || student)`.

    With `blend` (labels of the images that these are blended with, and each one's own share) both labels count; the
    teacher has seen the blend.
    """
    loss = torch.zeros((), device=outputs.device)
    if distill is None or distill.weight < 1:
        reduction = "mean" if blend is None else "none"
        loss = F.cross_entropy(outputs, labels, label_smoothing=label_smoothing, reduction=reduction)
        if blend is not None:
            other = F.cross_entropy(outputs, blend[0], label_smoothing=label_smoothing, reduction="none")
            loss = torch.lerp(other, loss, blend[1].to(outputs)).mean()
    if distill is None or teacher_outputs is None:
        return loss
    t = distill.temperature
    soft = F.kl_div(
        F.log_softmax(outputs / t, dim=1),
        F.log_softmax(teacher_outputs / t, dim=1),
        log_target=True,
        reduction="batchmean",
    )
    return (1 - distill.weight) * loss + distill.weight * t * t * soft


def schedule_factor(kind: str, warmup: float) -> Callable[[float], float]:
    """Learning-rate factor over the fraction of the stage done: linear or cosine rise, then cosine fall to ~0.

    `one_cycle` rises by a cosine from 1/25 (arXiv 1708.07120); `cosine` (arXiv 1608.03983) rises linearly from 0.
    """

    def factor(done: float) -> float:
        if done < warmup:
            rise = done / warmup
            return 0.04 + 0.96 * (1 - math.cos(math.pi * rise)) / 2 if kind == "one_cycle" else max(rise, 1e-3)
        fall = (done - warmup) / max(1 - warmup, 1e-9)
        return max((1 + math.cos(math.pi * min(fall, 1.0))) / 2, 1e-4)

    return factor


class WeightAverage:
    """Exponential moving average of parameters and buffers (Polyak averaging), with the usual early-step correction."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.state = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - decay)
            else:
                self.state[name].copy_(value)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state that later training cannot change."""
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def finetune(
    module: nn.Module,
    *,
    train: Split,
    val: Split,
    spec: InputSpec,
    epochs: int | None = None,
    steps: int | None = None,
    learning_rate: float = 5e-4,
    batch_size: int = 32,
    optimizer: str = "adamw",
    schedule: str = "one_cycle",
    warmup: float = 0.25,
    weight_decay: float = 0.02,
    label_smoothing: float = 0.0,
    clip_norm: float | None = 5.0,
    precision: str = "auto",
    ema: float | None = None,
    patience: int | None = None,
    augment: Augment | None = None,
    distill: Distillation | None = None,
    frozen: Frozen = NOTHING_FROZEN,
    penalty: Callable[[], Tensor] | None = None,
    checkpointing: bool = False,
    micro_batch: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> TrainingResult:
    """Train `module` in place and leave it with the weights that did best on `val` (accuracy, then loss).

    The weights it starts from compete too: on validation, a short recovery cannot make things worse. With a penalty,
    which validation does not see, it is left with those of the last epoch.

    Args:
        epochs: passes over `train`; validated after each.
        steps: optimiser steps instead of epochs; validated after each pass and at the end.
        patience: stop after this many epochs without a better validation accuracy.
        ema: decay of an exponential moving average of the weights; when given, the average is validated and kept.
        penalty: what is added to the loss of every step, a scalar of the network's parameters as they are then; the
            losses that are reported are without it.
        checkpointing: blocks are computed again in the backward pass instead of remembered, see `checkpointing`.
        micro_batch: images that pass at once; None: the batch.
        frozen: layers that stay as they are, from `feed.freezing`; `module` is the network they are in.
        device: where it trains; `module` and the teacher are moved there and stay there (see `inference.visiting`).

    Raises:
        TrainingError: the loss is not finite or has diverged; the last good weights are in `module`.
    """
    dtype = choose_precision(precision, device)
    module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    batch_size = min(batch_size, len(train.labels))
    per_epoch = len(train.labels) // batch_size
    total = steps if steps is not None else per_epoch * (epochs or 1)
    epochs = math.ceil(total / per_epoch)
    bridges = [distill.mimicry.bridge] if distill and distill.mimicry else []
    opt = make_optimizer(nn.ModuleList([module, *bridges]), optimizer, learning_rate, weight_decay)
    factor = schedule_factor(schedule, warmup)
    average = WeightAverage(module, ema) if ema else None
    shown = distill.shown if distill else None
    feed = open_feed(
        module, frozen, train=train, val=val, spec=spec, augment=augment, dtype=dtype, device=device, shown=shown
    )
    answers = Answers(distill, feed.rows, device) if distill else None

    result = TrainingResult(precision=str(dtype).removeprefix("torch."))
    good = snapshot(module)
    clock = Clock()
    with clock("validation"):
        result.start_accuracy, loss_at_start = evaluate(
            feed.trained, val, spec, device=device, dtype=dtype, features=feed.val_features
        )
    if math.isfinite(loss_at_start):
        result.val_accuracy, result.val_loss = result.start_accuracy, loss_at_start
    chance = math.log(max(2, _classes(module, train, spec, device)))
    example = to_input(train.images[:1], spec, device)
    twice: AbstractContextManager[list[str]] = checkpointed(module, example) if checkpointing else nullcontext([])
    with twice as blocks:
        result.checkpointed = len(blocks)
        if checkpointing and not blocks:
            log.warning("checkpointing: the network has no blocks of several layers, so all is remembered")
        for epoch in range(epochs):
            train_mode(module, frozen.layers)
            losses: list[float] = []
            batches = feed.batches(batch_size, generator)
            while result.steps < total:
                with clock("data"):
                    batch = next(batches, None)
                if batch is None:
                    break
                targets = None
                if answers:
                    with clock("teacher"), arithmetic(dtype, device):
                        targets = answers.of(batch)
                with clock("step"):
                    for group in opt.param_groups:
                        group["lr"] = learning_rate * factor(result.steps / total)
                    opt.zero_grad(set_to_none=True)
                    losses.append(_backward(feed.trained, batch, targets, distill, label_smoothing, micro_batch, dtype))
                    if not math.isfinite(losses[-1]):
                        restore(module, good, strict=True)
                        raise TrainingError(
                            f"the loss became {losses[-1]} at step {result.steps + 1} of {total} (epoch {epoch + 1}); "
                            "the last good weights are kept. Lower learning_rate "
                            f"(now {learning_rate:g}), set clip_norm, or use float32"
                        )
                    if penalty is not None:
                        penalty().backward()  # type: ignore[no-untyped-call]
                    if clip_norm:
                        nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
                    opt.step()
                    if average:
                        average.update(module)
                result.steps += 1
                result.images += len(batch.labels)
                _report_step(result, total, epoch, epochs, losses, clock.elapsed())
            mean_loss = float(np.mean(losses))
            first = result.history[0].loss if result.history else losses[0]
            if mean_loss > DIVERGED * max(first, chance):
                restore(module, good, strict=True)
                raise TrainingError(
                    f"training diverged: mean loss {mean_loss:.3g} in epoch {epoch + 1}, {first:.3g} at first; the last"
                    f" good weights are kept. Lower learning_rate (now {learning_rate:g})"
                )
            trained = snapshot(module) if average else None
            if average:
                restore(module, average.state, strict=True)
            with clock("validation"):
                accuracy, val_loss = evaluate(
                    feed.trained, val, spec, device=device, dtype=dtype, features=feed.val_features
                )
            if not math.isfinite(val_loss):
                restore(module, good, strict=True)
                raise TrainingError(
                    f"the validation loss became {val_loss} after epoch {epoch + 1}; the last good weights are kept. "
                    f"Lower learning_rate (now {learning_rate:g}) or set clip_norm"
                )
            better = (accuracy, -val_loss) > (result.val_accuracy, -result.val_loss)
            if better or penalty is not None:
                result.best_epoch, result.val_accuracy, result.val_loss = epoch, accuracy, val_loss
                good = snapshot(module)
            if trained is not None:
                restore(module, trained, strict=True)
            seconds = clock.elapsed()
            lr = opt.param_groups[0]["lr"]
            result.history.append(Epoch(epoch, mean_loss, accuracy, val_loss, lr, seconds))
            progress = Progress(result.steps, total, epoch + 1, epochs, mean_loss, accuracy, seconds)
            log.info(
                "epoch %d/%d  loss %.4f  val %.4f  %.0f s",
                epoch + 1,
                epochs,
                mean_loss,
                accuracy,
                seconds,
                extra={"progress": progress},
            )
            risen = max(range(len(result.history)), key=lambda i: result.history[i].val_accuracy)
            if result.steps == total or (patience and epoch - risen >= patience):
                break
    restore(module, good, strict=True)
    module.eval()
    if result.best_epoch < 0:
        log.warning(
            "no epoch did better on validation than the weights it started from (%.4f); those are kept",
            result.val_accuracy,
        )
    result.seconds, result.time = clock.elapsed(), clock.seconds
    result.teacher_images = answers.asked if answers else 0
    result.frozen = feed.summary()
    return result


def _backward(
    trained: nn.Module,
    batch: Batch,
    targets: Tensor | None,
    distill: Distillation | None,
    label_smoothing: float,
    micro_batch: int | None,
    dtype: torch.dtype,
) -> float:
    """Add a batch's gradients, `micro_batch` images at a time; returns its mean loss."""
    count, total = len(batch.labels), 0.0
    blend = batch.blend and (batch.labels[batch.blend[0].to(batch.labels.device)], batch.blend[1])
    for part in _parts(count, micro_batch):
        with arithmetic(dtype, batch.inputs.device.type):
            outputs = logits_of(trained(batch.inputs[part]))
        answers = None if targets is None else targets[part, : outputs.shape[1]]
        labels = batch.labels[part]
        other = blend and (blend[0][part], blend[1][part])
        loss = loss_of(outputs.float(), labels, label_smoothing, answers, distill, other)
        if targets is not None and distill is not None and distill.mimicry is not None:
            loss = loss + distill.mimicry.loss(targets[part, outputs.shape[1] :])
        loss = loss * (len(labels) / count)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


def _parts(images: int, size: int | None) -> list[slice]:
    """Where a batch is cut into pieces of about one size, `size` at most."""
    count = math.ceil(images / (size or images))
    edges = [round(i * images / count) for i in range(count + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(edges)]


def _report_step(
    result: TrainingResult, total: int, epoch: int, epochs: int, losses: list[float], seconds: float
) -> None:
    last = result.history[-1].val_accuracy if result.history else None
    recent = float(np.mean(losses[-20:]))
    progress = Progress(result.steps, total, epoch + 1, epochs, recent, last, seconds)
    log.debug("step %d/%d", result.steps, total, extra={"progress": progress})


def _classes(module: nn.Module, train: Split, spec: InputSpec, device: str) -> int:
    return int(predict(module, train.images[:1], spec, device=device).shape[1])
