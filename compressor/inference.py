"""Networks at work without being trained: logits, accuracy, BatchNorm statistics; where and in which precision.

Invariant: weights are never changed, and every network comes back on the device and in the mode it was given in.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor.data import Split
from compressor.data.batches import draws, to_input
from compressor.environment import BF16_FEATURES, cpu_flags
from compressor.metrics import top1
from compressor.modes import evaluating
from compressor.outputs import logits_of
from compressor.preprocess import InputSpec
from compressor.small_maps import SmallMaps

EVALUATION_BATCH = 64


def choose_precision(asked: str, device: str) -> torch.dtype:
    """bf16 where the hardware multiplies it natively, float32 elsewhere, unless the recipe insists."""
    if asked == "auto":
        native = device == "cuda" or bool(cpu_flags() & set(BF16_FEATURES))
        return torch.bfloat16 if native else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[asked]


@contextmanager
def arithmetic(dtype: torch.dtype, device: str) -> Iterator[None]:
    """How forward passes compute: bf16 autocast where `dtype` is bf16, and on a CPU the fast forms of `SmallMaps`."""
    mixed = torch.autocast(device, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16)
    with mixed, SmallMaps() if device == "cpu" else nullcontext():
        yield


@contextmanager
def visiting(device: str, *modules: nn.Module) -> Iterator[None]:
    """Move networks to `device` for the block, and back to where they were."""
    homes = [next(module.parameters()).device for module in modules]
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module, home in zip(modules, homes, strict=True):
            module.to(home)


def predict(
    module: nn.Module,
    images: NDArray[np.uint8],
    spec: InputSpec,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    features: Callable[[slice], Tensor] | None = None,
) -> Tensor:
    """Logits in evaluation mode: `(N, H, W, 3)` uint8 -> `(N, classes)` float32 on the CPU.

    With `features` the module is a network's end, and is given what they return for some of the images instead.
    """
    outputs = []
    with visiting(device, module), evaluating(module), arithmetic(dtype, device):
        for start in range(0, len(images), EVALUATION_BATCH):
            rows = slice(start, start + EVALUATION_BATCH)
            out = module(features(rows) if features else to_input(images[rows], spec, device))
            outputs.append(logits_of(out).float().cpu())
    return torch.cat(outputs)


def evaluate(
    module: nn.Module,
    split: Split,
    spec: InputSpec,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    features: Callable[[slice], Tensor] | None = None,
) -> tuple[float, float]:
    """Top-1 accuracy (fraction) and mean cross-entropy of a split, weighted by images; `features` as in `predict`."""
    logits = predict(module, split.images, spec, device=device, dtype=dtype, features=features)
    labels = torch.from_numpy(np.asarray(split.labels))
    loss = float(F.cross_entropy(logits, labels))
    return float(top1(logits.numpy(), np.asarray(split.labels)).mean()), loss


def reestimate_batchnorm(
    module: nn.Module, split: Split, spec: InputSpec, *, passes: int, seed: int, device: str = "cpu", size: int = 32
) -> None:
    """Replace BatchNorm running statistics by plain averages over `passes` training batches (arXiv 2007.02491).

    Removing channels shifts the distribution every later BatchNorm sees; the stored ones describe another network.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms or passes < 1:
        return
    momenta = [m.momentum for m in norms]
    generator = torch.Generator().manual_seed(seed)
    shuffled = draws(len(split.labels), size=size, generator=generator, augment=None)
    with visiting(device, module), evaluating(module), arithmetic(torch.float32, device):
        for m in norms:
            m.reset_running_stats()
            m.momentum = None  # cumulative average
            m.train()
        for chosen, _ in itertools.islice(shuffled, passes):
            module(to_input(split.images[chosen], spec, device))
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum


def frozen_copy(module: nn.Module) -> nn.Module:
    """A teacher: evaluation mode, no gradients, sharing nothing with the network it was copied from."""
    teacher = copy.deepcopy(module).eval()
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    return teacher
