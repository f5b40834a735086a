"""The optimisers of training, chosen by name; Adafactor for convolutions, which torch's own does not factor.

Invariant: vectors (biases, norms, ranges) are not decayed; learning rates mean the same to AdamW and to Adafactor.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def make_optimizer(module: nn.Module, kind: str, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), SGD with Nesterov momentum, or Adafactor (arXiv 1804.04235)."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if _is_matrix(p)], "weight_decay": weight_decay},
        {"params": [p for p in trainable if not _is_matrix(p)], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    if kind == "adafactor":
        return Adafactor(groups, lr=learning_rate)
    return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, nesterov=True, fused=True)


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim > 1 and parameter.shape.numel() > max(parameter.shape)


class Adafactor(torch.optim.Optimizer):
    """Adam without momentum, whose second moments are one number for each row and each column of a weight.

    Of a convolution (filters, channels, height, width) a row is a filter; torch.optim.Adafactor (2.13) takes the last
    two dimensions for the matrix, which of 1 x 1 kernels keeps more than Adam does. No relative step sizes: an update
    has a root mean square of at most 1, as Adam's have about, so that its learning rates hold.
    """

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure` is not called."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"], group["weight_decay"])

    def _update(self, parameter: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[parameter]
        count = state["count"] = state.get("count", 0) + 1
        keep = 1 - count**-0.8  # its decay rises towards 1: no correction for the start is needed
        squares = gradient.float().square().add_(1e-30)
        if _is_matrix(parameter):
            squares = squares.flatten(1)
            rows = _moved(state, "rows", squares.mean(1), keep)
            columns = _moved(state, "columns", squares.mean(0), keep)
            scale = (rows / rows.mean()).rsqrt_()[:, None] * columns.rsqrt()[None]
            update = gradient * scale.view(gradient.shape)
        else:
            update = gradient * _moved(state, "all", squares, keep).rsqrt()
        update.div_(update.square().mean().sqrt_().clamp_(min=1.0))
        if weight_decay:
            parameter.mul_(1 - lr * weight_decay)
        parameter.add_(update, alpha=-lr)


def _moved(state: dict[str, Any], name: str, value: Tensor, keep: float) -> Tensor:
    """A moving average, started by its first value."""
    average: Tensor = state.setdefault(name, torch.zeros_like(value))
    return average.lerp_(value, 1 - keep)
