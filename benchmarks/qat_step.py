"""Time and memory of one step of quantization-aware training, against the float step and NNCF's own kernels.

    python benchmarks/qat_step.py benchmarks/qat_step.json

Four steps of the same folded Xception in turns: float32 and bf16 without quantizers, NNCF's stock quantizers in float32
(its C++ extension is compiled first, which needs a compiler), and this toolkit's in the precision it would choose here.

Invariant: each is the step of `training.finetune` on the same batch; peak memory is measured in a process of its own.
"""

import argparse
import copy
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from measuring import in_turns, keep, summary
from torch import nn

from compressor import environment
from compressor.fake_quantize import KERNELS
from compressor.folding import fold_batchnorm
from compressor.inference import arithmetic, choose_precision
from compressor.memory import measure_memory
from compressor.models.xception import Xception
from compressor.optimizers import make_optimizer
from compressor.quantization import quantize
from compressor.training import loss_of

VARIANTS = ("float32", "bfloat16", "stock_qat", "qat")


def stock_kernels() -> dict[str, type]:
    """NNCF's quantisation functions before this toolkit replaces them."""
    environment.prepare_process()
    from nncf.torch.quantization import quantize_functions

    return {name: getattr(quantize_functions, name) for name in KERNELS}


def use_kernels(kernels: Mapping[str, type]) -> None:
    """Let every quantizer of this process call these functions."""
    from nncf.torch.quantization import quantize_functions

    for name, function in kernels.items():
        setattr(quantize_functions, name, function)


def make_step(variant: str, size: int, batch: int, stock: dict[str, type]) -> Callable[[], None]:
    """A training step of a variant; every call does the same amount of work."""
    torch.manual_seed(0)
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 101, (batch,))
    network: nn.Module = Xception(101)
    fold_batchnorm(network, x[:1])
    if variant in ("stock_qat", "qat"):
        network, _ = quantize(network, [x[i : i + 1] for i in range(2)])
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.train()
    chosen = {"float32": "float32", "bfloat16": "bfloat16", "stock_qat": "float32", "qat": "auto"}[variant]
    dtype = choose_precision(chosen, "cpu")
    optimizer = make_optimizer(network, "adamw", 1e-6, 0.02)
    kernels = stock if variant == "stock_qat" else KERNELS

    def step() -> None:
        use_kernels(kernels)
        with arithmetic(dtype, "cpu"):
            outputs = network(x)
        loss = loss_of(outputs.float(), labels, 0.0, None, None)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()

    return step


def peak_bytes(variant: str, size: int, batch: int) -> int:
    """Peak resident memory of three steps, measured in a fresh process."""
    command = [sys.executable, __file__, "--memory-of", variant, "--size", str(size), "--batch", str(batch)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", help="JSON file to write")
    parser.add_argument("--size", type=int, default=160, help="input side in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each variant, in turns")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    stock = copy.copy(stock_kernels())
    if args.memory_of:
        step = make_step(args.memory_of, args.size, args.batch, stock)
        step()
        with measure_memory() as memory:
            step()
            step()
        print(memory.peak_bytes)
        return 0
    steps = {name: make_step(name, args.size, args.batch, stock) for name in args.variants}
    seconds = in_turns(steps, args.rounds)
    steps.clear()
    figures = {
        name: {"seconds": summary(spent), "peak_bytes": peak_bytes(name, args.size, args.batch)}
        for name, spent in seconds.items()
    }
    keep(args.output, {"size": args.size, "batch": args.batch, "rounds": args.rounds, "figures": figures})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
