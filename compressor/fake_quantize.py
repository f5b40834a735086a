"""Fake quantisation for NNCF in plain PyTorch operations, in the place of the C++ extension it would compile.

Invariant: same function and same gradients as NNCF's reference kernels, up to rounding of exact ties.
"""

import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def install_kernels() -> None:
    """Let NNCF's quantisers, on CPU and CUDA, use `NativeKernels` in this process.

    NNCF compiles C++ at first use: a minute and more on a busy edge device, a compiler needed, a lock file that hangs
    later runs when killed. On CPU its kernels also pass some 20 times over each tensor, these 13 times.
    """
    from nncf.torch.quantization import quantize_functions

    devices = ["CPU", "CUDA"] if torch.cuda.is_available() else ["CPU"]
    for device in devices:
        namespace: object = getattr(quantize_functions, f"QuantizedFunctions{device}", None)
        if hasattr(namespace, "_loaded_namespace"):
            namespace._loaded_namespace = NativeKernels
        else:
            log.warning("this NNCF has no place for our %s kernels; it compiles its own at first use", device)


class NativeKernels:
    """Fake quantisation and its gradients in a few vectorised, partly in-place PyTorch operations.

    Names and arguments are those NNCF 3.4 calls; the gradients are its own (straight-through inside the range,
    learned ranges in the manner of LSQ, arXiv 1902.08153).
    """

    @staticmethod
    def Quantize_forward(x: Tensor, low: Tensor, span: Tensor, levels: int) -> Tensor:  # noqa: N802
        """Round `x` to the grid of `levels` steps from `low` to `low + span` (broadcast against x); shape kept."""
        step = span / (levels - 1)
        first = torch.round(low / step)  # an integer multiple of the step, so that zero is on the grid
        out = torch.mul(x, step.reciprocal()).round_()
        return out.clamp_(first, first + (levels - 1)).mul_(step).to(x.dtype)

    @staticmethod
    def Quantize_backward(  # noqa: N802
        grad: Tensor,
        x: Tensor,
        low: Tensor,
        span: Tensor,
        levels: int,
        level_low: int,
        level_high: int,
        _asymmetric: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients by the input, by `low` and by `span` (for a symmetric quantiser: by its scale)."""

        def total(values: Tensor) -> Tensor:
            if low.numel() == 1:
                return values.sum().reshape(low.shape)
            return values.sum(dim=[d for d in range(x.dim()) if low.shape[d] == 1], keepdim=True)

        grad_x = torch.clamp(x, low, low + span).eq_(x).mul_(grad)
        error = NativeKernels.Quantize_forward(x, low, span, levels).sub_(x)
        inside = total(error.mul_(grad_x)) / span
        outside = total(grad) - total(grad_x)
        above = total((x > low + span).to(grad.dtype).mul_(grad))
        grad_span = inside + above + (outside - above) * (level_low / level_high)
        return grad_x, outside, grad_span
