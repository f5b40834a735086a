"""Whether `torch.compile` pays for itself in training on this CPU: seconds to compile, and of a step, against eager.

    python benchmarks/compile_step.py benchmarks/compile_step.json

The toolkit trains eagerly. This says what compiling would save and after how many steps it would have paid; it needs a
C++ compiler, which the toolkit itself does not.

Invariant: both steps train the same Xception on the same batch in the precision the toolkit would choose, in turns.
"""

import argparse
import copy
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import in_turns, keep, summary
from torch import nn

from compressor.inference import arithmetic, choose_precision
from compressor.models.xception import Xception
from compressor.optimizers import make_optimizer
from compressor.training import loss_of


def make_step(
    network: nn.Module, run: Callable[[torch.Tensor], torch.Tensor], size: int, batch: int
) -> Callable[[], None]:
    """A training step of `network`, whose forward pass is `run`."""
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 101, (batch,))
    dtype = choose_precision("auto", "cpu")
    optimizer = make_optimizer(network, "adamw", 1e-6, 0.02)

    def step() -> None:
        with arithmetic(dtype, "cpu"):
            outputs = run(x)
        loss = loss_of(outputs.float(), labels, 0.0, None, None)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()

    return step


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", help="JSON file to write")
    parser.add_argument("--size", type=int, default=160, help="input side in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each, in turns")
    args = parser.parse_args()
    torch.manual_seed(0)
    eager = Xception(101).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    twin = copy.deepcopy(eager)
    with tempfile.TemporaryDirectory() as cache:  # nothing compiled before is found
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        compiled = make_step(twin, torch.compile(twin), args.size, args.batch)
        started = time.perf_counter()
        compiled()
        first = time.perf_counter() - started
        steps = {"eager": make_step(eager, eager, args.size, args.batch), "compiled": compiled}
        seconds = in_turns(steps, args.rounds)
    figures = {name: summary(spent) for name, spent in seconds.items()}
    saved = figures["eager"]["median"] - figures["compiled"]["median"]
    spent = first - figures["compiled"]["median"]
    keep(
        args.output,
        {
            "size": args.size,
            "batch": args.batch,
            "rounds": args.rounds,
            "compile_s": spent,
            "seconds": figures,
            "pays_after_steps": round(spent / saved) if saved > 0 else None,
        },
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
