"""Runs that are killed or interrupted go on where they were, and end with the very weights of a run left alone."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_networks import DISTILLED, DROP, FINETUNE, KERNELS, PRUNE, QUANTIZE, contents, write_recipe

from compressor.artifacts import verify_manifest

DRIVER = Path(__file__).with_name("tiny_main.py")
# Importance by gradients and recovery inside stages: whatever a process carries from one stage to the next would show.
# Each run has a cache of its own, so with `precision: auto` the clock would choose anew in each.
FLOAT32 = {"precision": "float32"}
RECOVERY = {"steps": 4, "batch_size": 16, **FLOAT32}
STAGES = (
    {**FINETUNE, **FLOAT32},
    KERNELS,
    {**DROP, "metric": "distill_loss", "recovery": RECOVERY},
    {**PRUNE, "importance": "taylor", "importance_batches": 2, "iterations": 2, "recovery": RECOVERY},
    {**DISTILLED, **FLOAT32},
    QUANTIZE,
    {**DISTILLED, **FLOAT32},
)


@pytest.fixture(scope="module")
def alone(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("alone")
    write_recipe(folder / "recipe.yaml", tiny_images, *STAGES)
    done = command(folder, "recipe.yaml", "--out", "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def folder(tiny_images: Path, tmp_path: Path) -> Path:
    write_recipe(tmp_path / "recipe.yaml", tiny_images, *STAGES)
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    """A cache of each run's own: nothing is reused from elsewhere."""
    return {**os.environ, "COMPRESSOR_CACHE": str(folder / "cache")}


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DRIVER), *arguments],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(DRIVER), *arguments],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job, as CI may be, ignores Ctrl-C and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.005)


def tensors(run: Path) -> dict[str, str]:
    """Hashes of all weights; the .xml holds node numbers that differ between processes."""
    return {name: sha for name, sha in contents(run).items() if name.endswith((".bin", ".onnx", ".safetensors"))}


def reused(run: Path) -> list[bool]:
    stages: list[dict[str, Any]] = json.loads((run / "report.json").read_text())["stages"]
    return [stage["reused"] for stage in stages]


def stamps(partial: Path) -> dict[str, int]:
    """When each file of the finished stages was written."""
    return {path.relative_to(partial).as_posix(): path.stat().st_mtime_ns for path in partial.glob("stages/[0-9]*/*")}


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(folder: Path, alone: Path) -> None:
    run, partial = folder / "run", folder / "run.partial"
    with started(folder, "recipe.yaml", "--out", "run") as process:
        wait_for(partial / "stages" / "01-replace_kernels" / "footprint.json", process)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not run.exists()
    before = stamps(partial)
    finished = len(list(partial.glob("stages/[0-9]*")))
    assert 2 <= finished < len(STAGES)
    done = command(folder, "recipe.yaml", "--out", "run", "--resume")
    assert done.returncode == 0, done.stderr
    assert not partial.exists()
    assert reused(run) == [True] * finished + [False] * (len(STAGES) - finished)
    assert {name: stamp for name, stamp in stamps(run).items() if name in before} == before, "not written again"
    assert tensors(run) == tensors(alone)
    assert verify_manifest(run) == []
    assert contents(run).keys() == contents(alone).keys()
    assert (run / "run.log").read_text().count("stage 1/7") == 2, "one log for the whole run"


def test_ctrl_c_ends_with_130_and_the_command_that_goes_on(folder: Path, alone: Path) -> None:
    run, partial = folder / "run", folder / "run.partial"
    arguments = ("recipe.yaml", "--out", "run", "--device", "cpu", "--set", "stages[0].patience=null")
    with started(folder, *arguments) as process:
        wait_for(partial / "stages" / "00-finetune" / "footprint.json", process)
        process.send_signal(signal.SIGSTOP)  # at work, but not done before the second process has come and gone
        second = command(folder, *arguments, "--force")
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGINT)
        asked = time.monotonic()
        _, message = process.communicate(timeout=60)
        took = time.monotonic() - asked
    assert process.returncode == 130, message
    assert took < 10
    assert "Traceback" not in message
    assert not run.exists()
    resume = shlex.split(message.strip().splitlines()[-1].partition("go on with: ")[2])
    assert resume[0] == "python"
    done = subprocess.run(
        [sys.executable, *resume[1:]], cwd=folder, env=environment(folder), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert reused(run)[0]
    assert tensors(run) == tensors(alone)
    # While the first process was at work, a second one was turned away.
    assert second.returncode == 2
    assert "another process is working there" in second.stderr
