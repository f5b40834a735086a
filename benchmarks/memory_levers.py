"""What each lever takes off the memory of training Xception, and what it costs in time.

    python benchmarks/memory_levers.py benchmarks/memory_levers.json [--size 160] [--batch 16] [--steps 8]
    python benchmarks/memory_levers.py benchmarks/memory_levers.json --table    # README's table from that file

Each row trains ImageNet's architecture from random weights in a process of its own, so that nothing of one is resident
in another. `floor` is the process with torch imported and nothing loaded: no lever reaches below it.

Where the processor has no bf16 units the rows in bf16 are left out, and listed: there the toolkit never chooses it.

Invariant: every figure is of a real training by the toolkit's loop.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import README, keep, rewrite

from compressor.inference import choose_precision

ROWS: dict[str, dict[str, Any]] = {
    "AdamW, float32": {},
    "AdamW, bf16": {"precision": "bfloat16"},
    "SGD": {"optimizer": "sgd", "learning_rate": 0.02},
    "Adafactor": {"optimizer": "adafactor"},
    "checkpointing": {"checkpointing": True},
    "micro-batches of 4": {"micro_batch": 4},
    "stem and body frozen": {"freeze": ["role:stem", "role:body"]},
    "half of the blocks frozen": {"freeze": ["conv[12]", "bn[12]", "block[1-6]"]},
    "Adafactor, checkpointing, micro-batches of 4": {
        "optimizer": "adafactor",
        "checkpointing": True,
        "micro_batch": 4,
    },
    "bf16, Adafactor, checkpointing": {"precision": "bfloat16", "optimizer": "adafactor", "checkpointing": True},
    "bf16, Adafactor, checkpointing, micro-batches of 4": {
        "precision": "bfloat16",
        "optimizer": "adafactor",
        "checkpointing": True,
        "micro_batch": 4,
    },
}
CLASSES = 101


def trained(levers: dict[str, Any], size: int, batch: int, steps: int) -> dict[str, Any]:
    """Train for some steps in this process and measure it."""
    from compressor import environment

    environment.prepare_process()
    import torch
    from latency_targets import pictures

    from compressor.context import resolve_freeze
    from compressor.feed import freezing
    from compressor.memory import measure_memory, resident_bytes
    from compressor.models import build
    from compressor.training import finetune

    floor = resident_bytes()
    torch.manual_seed(0)
    module = build("builtin", "xception", {}, CLASSES)
    options = {"precision": "float32", "optimizer": "adamw", **levers}
    layers = resolve_freeze(module, options.pop("freeze", ()), where="freeze", example=torch.zeros(1, 3, size, size))
    with tempfile.TemporaryDirectory() as folder:
        data = pictures(size, Path(folder))
        with measure_memory() as memory, freezing(module, layers) as frozen:
            result = finetune(
                module,
                train=data.train,
                val=data.val.take(range(4)),  # scores are not what is measured
                spec=data.spec,
                steps=steps,
                batch_size=batch,
                frozen=frozen,
                **options,
            )
    step_s = result.time["step"] / result.steps
    return {
        "floor_bytes": floor,
        "average_bytes": memory.average_bytes,
        "peak_bytes": memory.peak_bytes,
        "step_s": step_s,
        "blocks_checkpointed": result.checkpointed,
    }


def table_of(figures: dict[str, Any]) -> str:
    """Markdown: a row for each lever, with what it leaves of the first row's."""
    rows = figures["rows"]
    first = rows[0]
    setting = f"{figures['network']}, {figures['size']} px, batch {figures['batch']}"
    lines = [f"| {setting} | average, MB | peak, MB | a step, s |", "|---|---|---|---|"]
    for row in rows:
        cells = [f"{row[key] / 1e6:.0f} ({row[key] / first[key]:.2f}x)" for key in ("average_bytes", "peak_bytes")]
        lines.append(f"| {row['levers']} | {' | '.join(cells)} | {row['step_s']:.2f} ({row['step_fraction']:.2f}x) |")
    floor = max(row["floor_bytes"] for row in rows)
    lines.append(f"| *torch and this toolkit imported, nothing loaded* | | {floor / 1e6:.0f} | |")
    if figures["no_bf16_units_left_out"]:
        lines += ["", f"Left out on a processor without bf16 units: {'; '.join(figures['no_bf16_units_left_out'])}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="only rewrite README's table, from OUTPUT")
    args = parser.parse_args()
    if args.table:
        rewrite(README, "memory", table_of(json.loads(args.output.read_text())))
        return
    if args.row is not None:
        print(json.dumps(trained(ROWS[args.row], args.size, args.batch, args.steps)))
        return
    native = choose_precision("auto", "cpu") is torch.bfloat16
    left_out = [] if native else [name for name, levers in ROWS.items() if levers.get("precision") == "bfloat16"]
    rows: list[dict[str, Any]] = []
    for name, levers in ROWS.items():
        if name in left_out:
            continue
        command = [sys.executable, __file__, "--row", name]
        command += ["--size", str(args.size), "--batch", str(args.batch), "--steps", str(args.steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append({"levers": name, **levers, **json.loads(done.stdout.splitlines()[-1])})
        first = rows[0]
        for key in ("average_bytes", "peak_bytes", "step_s"):
            rows[-1][f"{key.rsplit('_', 1)[0]}_fraction"] = rows[-1][key] / first[key]
        print(rows[-1], flush=True)
    setting = {"network": "xception", "size": args.size, "batch": args.batch, "steps": args.steps}
    keep(args.output, {**setting, "no_bf16_units_left_out": left_out, "rows": rows})


if __name__ == "__main__":
    main()
