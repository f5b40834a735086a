"""Run recipes in processes of their own, so that nothing of one run is left in the memory that another measures.

Invariant: when the block ends, however it ends, no process is left; each had time to save what it had.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from compressor.errors import CompressorError
from compressor.recipe_loader import load_recipe, recipe_hash
from compressor.run_folder import partial_of
from compressor.study_spec import PlannedRun

log = logging.getLogger(__name__)

BUDGET_MISSED, INTERRUPTED = 3, 130
PATIENCE_S = 10.0  # for a run to save what it has


def _command(planned: PlannedRun, folder: Path, device: str) -> list[str]:
    words = [sys.executable, "-P", "-m", "compressor", "run", str(planned.path), "--out", str(folder)]
    words += ["--device", device]
    if folder.exists():
        words += ["--force"]
    elif (partial_of(folder) / "recipe.yaml").is_file():
        words += ["--resume"] if _same_recipe(planned, partial_of(folder)) else ["--force"]
    for text in planned.overrides:
        words += ["--set", text]
    return words


def _same_recipe(planned: PlannedRun, partial: Path) -> bool:
    try:
        stored = load_recipe(partial / "recipe.yaml").recipe
        return recipe_hash(stored) == planned.hash_with(stored.input.model_dump())
    except CompressorError:
        return False


def run_all(
    runs: Sequence[PlannedRun], folders: Mapping[PlannedRun, Path], logs: Path, *, jobs: int, device: str
) -> Generator[tuple[PlannedRun, int, str], None, None]:
    """Run recipes in processes, what was begun before going on from where it was.

    Args:
        runs: What to run, in this order.
        folders: Where each is to appear.
        logs: Folder for what each says.
        jobs: Processes at once.
        device: Where to train.

    Yields:
        Each run as it ends, with its exit code and a word about it.

    Raises:
        KeyboardInterrupt: A run was interrupted.
    """
    waiting = list(runs)
    search = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")]))
    with _ended_with_us() as working:
        while waiting or working:
            while waiting and len(working) < jobs:
                planned = waiting.pop(0)
                log.info("starting %s, seed %d", planned.row, planned.seed)
                said = logs / f"{planned.folder}-seed{planned.seed}.log"
                folders[planned].parent.mkdir(parents=True, exist_ok=True)
                with said.open("w") as log_file:
                    command = _command(planned, folders[planned], device)
                    child = subprocess.Popen(
                        command,
                        stdout=subprocess.DEVNULL,
                        stderr=log_file,
                        stdin=subprocess.DEVNULL,
                        env={**os.environ, "PYTHONPATH": search},
                    )
                working[child] = (planned, said, time.monotonic())
            for child in [child for child in working if child.poll() is not None]:
                planned, text, started = working.pop(child)
                code = int(child.returncode)
                if code == INTERRUPTED:
                    raise KeyboardInterrupt
                yield planned, code, _outcome(code, text, time.monotonic() - started)
            time.sleep(0.1)


@contextmanager
def _ended_with_us() -> Iterator[dict[subprocess.Popen[bytes], tuple[PlannedRun, Path, float]]]:
    """Processes at work; those left at the end of the block are asked to end, with time to save what they have."""
    working: dict[subprocess.Popen[bytes], tuple[PlannedRun, Path, float]] = {}
    try:
        yield working
    finally:
        for child in working:
            if child.poll() is None:
                child.terminate()  # SIGINT is ignored where the study is a shell's background job
        deadline = time.monotonic() + PATIENCE_S
        for child in working:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _outcome(code: int, text: Path, seconds: float) -> str:
    """A word about an ended process; of a failed one the last line it left."""
    if code in (0, BUDGET_MISSED):
        return f"{'done' if code == 0 else 'done, a gate or budget missed'} in {seconds:.0f} s"
    lines = [
        line.removeprefix("compressor: ") for line in text.read_text(errors="replace").splitlines() if line.strip()
    ]
    return lines[-1] if lines else f"ended with exit code {code} and without a message"
