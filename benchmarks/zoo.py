"""The zoo table: backbones of timm and torchvision, pruned to half their MACs and taken through everything after.

    python benchmarks/zoo.py benchmarks/zoo.json [--only 'timm/res*'] [--size 128] [--limit 900] [--jobs 1]

Random weights made sane, small inputs. Columns, each a gate: `prune` (0.5x MACs met), `oracle` (cut = masked), `train`
(one step: loss finite, weights move), `fold` (BatchNorm folded, same function), `int8` (IR and onnxruntime against the
fake-quantized network, >= 25 dB), `onnx` and `ir` (float parity), `reload` (a fresh process gives the same outputs).
A row is `passed`, `refused` (an error of ours before anything was written) or `wrong` (anything else). Each row runs in
a process of its own; rows that are in the file already are not run again.

Invariant: the functions are those a run calls; a row never passes a column that was not measured.
"""

import argparse
import copy
import fnmatch
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from zoo_networks import CLASSES, ROWS, Row, build_network, photos, settle, to_planes

from compressor import environment
from compressor.artifacts import write_json
from compressor.checkpoint import Network, load_network, save_network
from compressor.equalization import equalize_depthwise
from compressor.errors import CompressorError, RecipeError
from compressor.export import publish_float, publish_int8
from compressor.folding import fold_batchnorm
from compressor.models.counting import count
from compressor.parity import check_float, ir_logits, onnx_logits, torch_logits
from compressor.preprocess import InputSpec
from compressor.pruning.apply import apply_plan, mask_plan
from compressor.pruning.groups import find_groups
from compressor.pruning.importance import score_groups
from compressor.pruning.plan import PrunePlan, decide_plan
from compressor.quantization import quantize
from compressor.runtime import F32

COLUMNS = ("prune", "oracle", "train", "fold", "int8", "onnx", "ir", "reload")
FLOAT_LIMIT, RELOAD_LIMIT, SQNR_LIMIT = 1e-4, 1e-6, 25.0
ROUNDINGS = (8, 4, 2, 1)  # narrow networks have too few channels for multiples of eight
IMAGES = 32
CALIBRATION = 32


@dataclass
class Findings:
    """What a row gathers on its way: a fault for every gate missed, figures for the table."""

    columns: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def gate(self, column: str, met: bool, fault: str) -> None:
        """Settle a column; once missed it stays missed."""
        self.columns[column] = "passed" if met and self.columns.get(column) != "wrong" else "wrong"
        if not met:
            self.faults.append(f"{column}: {fault}")

    def within(self, column: str, figure: str, value: float, limit: float) -> None:
        """Settle a column whose figure must not exceed a limit; NaN does."""
        self.figures[figure] = value if np.isfinite(value) else None
        self.gate(column, value <= limit, f"{figure} {value:.2e}, at most {limit:.0e} is allowed")


def relative(output: Tensor | NDArray[Any], expected: Tensor | NDArray[Any]) -> float:
    """Largest difference as a fraction of the expected range."""
    a, b = np.asarray(output, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape or not np.isfinite(b).all():
        return float("inf")
    return float(np.abs(a - b).max() / max(np.ptp(b), 1e-12))


def sqnr_db(logits: NDArray[Any], expected: NDArray[Any]) -> float:
    """Variance of the expected logits over inputs, class by class, against the mean squared difference, in dB."""
    noise = float(np.square(logits - expected).mean())
    return float(10 * np.log10(max(float(expected.var(0).mean()), 1e-30) / max(noise, 1e-30)))


def outputs(module: nn.Module, x: Tensor) -> Tensor:
    module.eval()
    with torch.no_grad():
        return module(x)


def choose_plan(module: nn.Module, example: Tensor, ranking: str) -> tuple[PrunePlan, int]:
    """A plan for half the MACs with the largest rounding that reaches it, and that rounding.

    Raises:
        CompressorError: the network cannot be traced, or no rounding reaches half.
    """
    groups = find_groups(module, example, ignored=())
    scores = score_groups(module, groups, kind="magnitude", loss_batches=None, seed=0)
    target = count(module, example).macs // 2
    for round_to in ROUNDINGS:
        try:
            plan = decide_plan(
                module,
                example,
                groups=groups,
                scores=scores,
                ranking=ranking,  # type: ignore[arg-type]
                targets={"macs": target},
                round_to=round_to,
                min_channels=min(round_to, 8),
            )
        except RecipeError as error:
            held = Counter(group.reason for group in groups if not group.prunable).most_common(2)
            refusal = f"{error}; held back: {'; '.join(f'{n} groups: {why}' for why, n in held) or 'no group'}"
            continue
        return plan, round_to
    raise RecipeError(refusal)


def prune(module: nn.Module, example: Tensor, x: Tensor, found: Findings) -> PrunePlan:
    """Prune in place to half the MACs, and compare with the masked network: columns `prune` and `oracle`."""
    before = count(module, example)
    plan, found.figures["round_to"] = choose_plan(module, example, found.figures["ranking"])
    masked = copy.deepcopy(module)
    mask_plan(masked, plan, example)
    apply_plan(module, plan, example)
    after = count(module, example)
    found.figures |= {"params_before": before.params, "params": after.params}
    found.figures |= {"macs_before": before.macs, "macs": after.macs}
    goal = before.macs // 2
    found.gate("prune", after.macs <= goal, f"{after.macs:,} MACs are left, {goal:,} were asked for")
    found.within("oracle", "difference", relative(outputs(module, x), outputs(masked, x)), FLOAT_LIMIT)
    return plan


def train_once(module: nn.Module, x: Tensor, found: Findings) -> None:
    """One optimiser step of cross-entropy, in place: column `train`."""
    torch.manual_seed(0)
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    loss = nn.functional.cross_entropy(module.train()(x), torch.arange(len(x)) % CLASSES)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    finite = bool(loss.isfinite()) and all(bool(value.isfinite().all()) for value in module.parameters())
    moved = sum(not torch.equal(value, before[name]) for name, value in module.named_parameters())
    found.figures["loss"] = float(loss) if bool(loss.isfinite()) else None
    found.gate("train", finite and moved > 0, f"loss {float(loss)}, {moved} tensors changed")


def reloaded(folder: Path, x: Tensor) -> NDArray[np.float32]:
    """Outputs of a saved network in a process that knows nothing but the folder."""
    np.save(folder / "inputs.npy", x.numpy())
    command = [sys.executable, __file__, "--reload", str(folder)]
    search = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": threads}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"a fresh process cannot open the saved network: {_last_line(done.stderr)}")
    return np.load(folder / "outputs.npy")


def _reload(folder: Path) -> None:
    network = load_network(folder)
    np.save(folder / "outputs.npy", outputs(network.module, torch.from_numpy(np.load(folder / "inputs.npy"))).numpy())


def measure(row: Row, folder: Path, *, size: int, found: Findings, columns: Sequence[str] = COLUMNS) -> None:
    """Take one backbone through the columns; writes into `folder` only after everything that can be refused.

    Args:
        row: Which backbone.
        folder: Empty; files of the networks come here.
        size: Side of the inputs in pixels.
        found: Filled as the row goes on, so that a crash leaves what came before it.
        columns: `prune` and `oracle` are always done; of the others only those named.

    Raises:
        CompressorError: something cannot be done with this backbone.
    """
    environment.prepare_process()
    torch.manual_seed(0)
    # ImageNet's: with mean and std of 0.5, a quantizer that keeps zero on its grid puts every pixel level half way
    # between two steps, and each runtime rounds such ties its own way.
    spec = InputSpec(size, size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    images = photos(IMAGES, size)
    x = to_planes(images, spec)
    example = x[:1]
    module = build_network(row)
    settle(module, x)
    plan = prune(module, example, x[:8], found)
    settle(module, x)
    if "train" in columns:
        train_once(module, x[:16], found)
        settle(module, x)
    architecture = {"source": row.source, "name": row.name, "args": dict(row.args), "num_classes": CLASSES}
    edits = [{"type": "prune", "plan": plan.to_dict()}]
    floating = Network(module.eval(), architecture, tuple(edits), None, (3, size, size))
    networks = [("reload_difference", floating)]
    labels = [f"class{i}" for i in range(CLASSES)]
    if {"fold", "int8"} & set(columns):
        folded = copy.deepcopy(module)
        pairs = fold_batchnorm(folded, example)
        found.within("fold", "fold_difference", relative(outputs(folded, x), outputs(module, x)), FLOAT_LIMIT)
    if "int8" in columns:
        calibration = [x[i : i + 1] for i in range(CALIBRATION)]
        equalize_depthwise(folded, calibration)
        quantized, config = quantize(folded, calibration)
        edits = [*edits, {"type": "fold_bn", "pairs": [list(pair) for pair in pairs]}]
        networks.append(
            ("reload_int8_difference", Network(quantized, architecture, tuple(edits), config, floating.input))
        )
        files = publish_int8(quantized, spec, labels, folder / "int8")
        expected = torch_logits(quantized, images, spec)
        assert files.onnx is not None, "activations have one range per tensor, so the ONNX is portable"
        for figure, logits in (
            ("sqnr_onnx_db", onnx_logits(files.onnx, images)),
            ("sqnr_ir_db", ir_logits(files.xml, images, F32)),
        ):
            value = sqnr_db(logits, expected)
            found.figures[figure] = round(value, 1)
            found.gate("int8", value >= SQNR_LIMIT, f"{figure} {value:.1f}, at least {SQNR_LIMIT:g} are needed")
    if {"onnx", "ir"} & set(columns):
        files = publish_float(module, spec, labels, folder / "float")
        pairs_of = check_float(module, files.onnx, files.xml, images, spec).pairs
        for column, key in (("onnx", "torch/onnx"), ("ir", "torch/ir_f32")):
            difference = pairs_of[key].difference
            found.within(
                column, f"{column}_difference", float("nan") if difference is None else difference, FLOAT_LIMIT
            )
    if "reload" in columns:
        for figure, network in networks:
            save_network(folder / figure, network)
            again = reloaded(folder / figure, x[:8])
            found.within("reload", figure, relative(again, outputs(network.module, x[:8])), RELOAD_LIMIT)


def judged(row: Row, work: Callable[[Path, Findings], None]) -> dict[str, Any]:
    """One row of the table: carry `work` out in a fresh folder and say how it ended."""
    found = Findings(figures={"ranking": row.ranking})
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="zoo") as name:
        folder = Path(name)
        try:
            work(folder, found)
            status, reason = ("wrong", "; ".join(found.faults)) if found.faults else ("passed", "")
        except CompressorError as error:
            written = sorted(path.name for path in folder.rglob("*"))
            status = "wrong" if written or found.faults else "refused"
            late = f" (after {', '.join(written)} had been written)" if written else ""
            reason = "; ".join([*found.faults, f"{type(error).__name__}: {error}{late}"])
        except Exception as error:  # whatever foreign code raises is a crash, and a row of its own
            traceback.print_exc()
            where = next((f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in _frames(error)), "?")
            lines = str(error).strip().splitlines() or [""]
            status = "wrong"
            reason = "; ".join([*found.faults, f"crash: {type(error).__name__}: {lines[0]} ({where})"])
    return _row(row, status, reason, time.perf_counter() - started, found)


def _frames(error: Exception) -> list[traceback.FrameSummary]:
    return list(reversed(traceback.extract_tb(error.__traceback__)))


def _row(row: Row, status: str, reason: str, seconds: float, found: Findings | None = None) -> dict[str, Any]:
    found = found or Findings()
    identity = {key: value for key, value in asdict(row).items() if key in ("source", "name", "family")}
    columns = {column: found.columns.get(column, "not run") for column in COLUMNS}
    return {
        **identity,
        "status": status,
        "reason": reason,
        "columns": columns,
        **found.figures,
        "seconds": round(seconds, 1),
    }


def run_row(row: Row, command: Sequence[str], limit_s: float, threads: int) -> dict[str, Any]:
    """Run one row in a process of its own; its last line on stdout is the row as JSON.

    Args:
        row: Which backbone.
        command: What prints that row.
        limit_s: Seconds after which the process and what it started are ended.
        threads: Threads of torch in it.
    """
    started = time.perf_counter()
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    try:
        out, err = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # its own children too
        child.communicate()
        return _row(row, "wrong", f"timeout: not finished after {limit_s:g} s", time.perf_counter() - started)
    try:
        return dict(json.loads(out.strip().splitlines()[-1]))
    except (IndexError, ValueError):
        reason = f"crash: exit status {child.returncode}: {_last_line(err)}"
        return _row(row, "wrong", reason, time.perf_counter() - started)


def _last_line(text: str) -> str:
    return next(iter(reversed(text.strip().splitlines())), "nothing on stderr")


def fill_table(
    output: Path | None, rows: Sequence[Row], run: Callable[[Row], dict[str, Any]], *, size: int, jobs: int = 1
) -> dict[str, Any]:
    """Run the rows that the file does not have yet, `jobs` at a time; the file is written after each.

    Raises:
        RecipeError: the file holds rows of another input size.
    """
    table: dict[str, Any] = {"size": size, "rows": []}
    if output is not None and output.is_file():
        table = json.loads(output.read_text(encoding="utf-8"))
        if table["size"] != size:
            raise RecipeError(f"{output}: its rows were made at {table['size']} px, not {size}; name another file")
    done = {(entry["source"], entry["name"]) for entry in table["rows"]}
    table["environment"] = environment.describe()
    order = {(row.source, row.name): place for place, row in enumerate(ROWS)}
    writing = threading.Lock()

    def record(row: Row) -> None:
        entry = run(row)
        with writing:
            table["rows"].append(entry)
            table["rows"].sort(key=lambda entry: order.get((entry["source"], entry["name"]), len(order)))
            table["summary"] = summary(table["rows"])
            if output is not None:
                write_json(output, table)
        print(format_row(entry), flush=True)

    pool = ThreadPoolExecutor(jobs)
    try:
        for ended in [pool.submit(record, row) for row in rows if (row.source, row.name) not in done]:
            ended.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C only the rows already begun are waited for
    table["summary"] = summary(table["rows"])
    return table


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts over all rows."""
    statuses = Counter(row["status"] for row in rows)
    return {
        "rows": len(rows),
        **{source: sum(row["source"] == source for row in rows) for source in ("timm", "torchvision")},
        "families": len({row["family"] for row in rows}),
        **{status: statuses[status] for status in ("passed", "refused", "wrong")},
        "passed_share": statuses["passed"] / len(rows) if rows else None,
    }


def format_row(row: Mapping[str, Any]) -> str:
    """One line for people."""
    ratio = f"{row['macs'] / row['macs_before']:.2f}x" if row.get("macs") else "-"
    sqnr = "/".join("-" if row.get(key) is None else f"{row[key]:.0f}" for key in ("sqnr_onnx_db", "sqnr_ir_db"))
    name = f"{row['source']}/{row['name']}"
    head = f"{name:42} {row['family']:18} {row['status']:8}"
    return f"{head} {ratio:>6} {sqnr:>7} dB {row['seconds']:6.0f} s  {row['reason']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", help="JSON file; rows it has already are not run again")
    parser.add_argument("--only", default="*", help="glob over source/name")
    parser.add_argument("--size", type=int, default=128, help="side of the inputs in pixels")
    parser.add_argument("--limit", type=float, default=900, help="seconds a row may take")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time; they share the processor's cores")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # the child process of one row
    parser.add_argument("--reload", type=Path, help=argparse.SUPPRESS)  # and that which opens its saved networks
    args = parser.parse_args()
    if args.reload:
        _reload(args.reload)
        return 0
    if args.row:
        (row,) = (row for row in ROWS if row.label == args.row)
        print(json.dumps(judged(row, lambda folder, found: measure(row, folder, size=args.size, found=found))))
        return 0
    chosen = [row for row in ROWS if fnmatch.fnmatchcase(row.label, args.only)]
    if not chosen:
        parser.error(f"--only: '{args.only}' matches no row")

    def run(row: Row) -> dict[str, Any]:
        command = [sys.executable, __file__, "--row", row.label, "--size", str(args.size)]
        return run_row(row, command, args.limit, threads=max(1, environment.usable_cpus() // args.jobs))

    table = fill_table(args.output, chosen, run, size=args.size, jobs=args.jobs)
    print("\n".join(format_row(row) for row in table["rows"]))
    print(json.dumps(table["summary"], indent=1))
    return 1 if table["summary"]["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
