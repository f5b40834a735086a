"""The folder of a run: `RUN.partial/` while it works, `RUN/` when it is complete, and stages shared between runs.

Invariant: `RUN` appears by one rename after its manifest is written; nothing finished is lost unasked.
"""

import errno
import fcntl
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compressor import environment
from compressor.artifacts import MANIFEST, atomic_write, sha256_of, write_json, write_manifest
from compressor.checkpoint import Network, save_network
from compressor.errors import RecipeError, ResourceError
from compressor.recipe import Recipe
from compressor.recipe_loader import load_recipe, recipe_hash, resolved_yaml


def fresh_run_dir(name: str) -> Path:
    """A folder under `runs/`, named after the recipe and the time, that neither exists nor is being worked on."""
    first = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidates = itertools.chain([first], (first.with_name(f"{first.name}-{i}") for i in itertools.count(2)))
    return next(path for path in candidates if not path.exists() and not partial_of(path).exists())


@contextmanager
def open_partial(run: Path, recipe: Recipe, *, resume: bool, force: bool) -> Iterator[Path]:
    """Make or reopen `RUN.partial/` and keep other processes out of it while the block runs.

    Raises:
        RecipeError: finished work is in the way, there is nothing to resume, or another process is at work.
        ResourceError: the folder cannot be written.
    """
    partial = partial_of(run)
    _refuse_existing(run, force)
    if resume and not partial.is_dir():
        raise RecipeError(f"{partial}: there is no unfinished run to resume; leave out --resume to start one")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ResourceError(f"{partial}: cannot be made ({error.strerror}); choose another place with --out") from error
    try:
        _lock(handle, partial)
        _refuse_existing(run, force)  # again: the process that held the lock may have published meanwhile
        _settle(partial, recipe, resume=resume, force=force)
        yield partial
    finally:
        os.close(handle)  # the kernel drops the lock with the process too, so none goes stale


def partial_of(run: Path) -> Path:
    """Where a run works until it is complete."""
    if run.name in ("", ".."):
        raise RecipeError(f"--out {run}: name a folder to create, like runs/mine")
    return run.with_name(run.name + ".partial")


def _refuse_existing(run: Path, force: bool) -> None:
    if not os.path.lexists(run):
        return
    if not force:
        raise RecipeError(f"{run}: already exists; choose another place with --out, or replace it with --force")
    if not run.is_dir() or (any(run.iterdir()) and not (run / MANIFEST).is_file()):
        raise RecipeError(f"{run}: not the folder of a run, so --force does not replace it; choose another --out")


def _lock(handle: int, partial: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RecipeError(
            f"{partial}: another process is working there; wait for it or choose another place with --out"
        ) from None
    if not partial.is_dir() or not os.path.samestat(os.fstat(handle), partial.stat()):
        raise RecipeError(f"{partial}: another process has just finished there; look at its run, or start again")


def _settle(partial: Path, recipe: Recipe, *, resume: bool, force: bool) -> None:
    """Refuse or clear away what is in a locked folder; then write the recipe there."""
    stored = partial / "recipe.yaml"
    if any(not path.name.startswith(".") for path in partial.iterdir()) and not stored.is_file():
        raise RecipeError(f"{partial}: not the folder of an unfinished run; choose another place with --out")
    if resume:
        if stored.is_file() and recipe_hash(load_recipe(stored).recipe) != recipe_hash(recipe):
            raise RecipeError(
                f"{partial}: belongs to another recipe than the one given; "
                "--force starts again, --out takes another place"
            )
        for path in partial.glob(".*"):  # what a killed process was writing
            _remove(path)
    else:
        if not force and any((partial / "stages").glob("[!.]*")):
            raise RecipeError(f"{partial}: an unfinished run is there; --resume continues it, --force starts again")
        for path in sorted(partial.iterdir(), key=lambda path: path == stored):  # the recipe last: it marks the folder
            _remove(path)
    atomic_write(stored, resolved_yaml(recipe))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Also write the toolkit's log into the run folder."""
    handler = logging.FileHandler(path)
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger("compressor")
    level = root.level
    root.addHandler(handler)
    root.setLevel(min(root.getEffectiveLevel(), logging.INFO))  # the run's log is whole, whatever the console shows
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
        handler.close()


def keep_stage(
    folder: Path, network: Network, plans: Sequence[dict[str, Any]], record: dict[str, Any]
) -> dict[str, Any]:
    """Write a stage's folder, which appears by one rename; returns its record with the digests of its files."""
    unfinished = folder.with_name("." + folder.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    save_network(unfinished, network)
    if plans:
        write_json(unfinished / "plan.json", {"plans": list(plans)})
    record = {**record, "files": {path.name: sha256_of(path) for path in sorted(unfinished.iterdir())}}
    write_json(unfinished / "footprint.json", record)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return record


def stage_is_ready(folder: Path, key: str) -> bool:
    """Whether a stage's folder is complete for this key, bringing it from an earlier run where possible."""
    if _is_intact(folder, key):
        return True
    unfinished = folder.with_name("." + folder.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        known = json.loads(_entry(key).read_text())
        source, files = Path(known["folder"]), dict(known["files"])
        unfinished.mkdir(parents=True)
        for name in files:
            shutil.copyfile(source / name, unfinished / name)
        if any(sha256_of(unfinished / name) != digest for name, digest in files.items()):
            raise ValueError(f"{source} is not what it was")
    except (OSError, ValueError, KeyError, TypeError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{folder}: cannot be written ({error.strerror}); free some space") from error
        return False
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return True


def _is_intact(folder: Path, key: str) -> bool:
    try:
        record = json.loads((folder / "footprint.json").read_text())
        return record["key"] == key and all(sha256_of(folder / n) == digest for n, digest in record["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def remember_stage(folder: Path, key: str) -> None:
    """Let later runs find a finished stage."""
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    write_json(_entry(key), {"folder": str(folder.absolute()), "files": files})


def _entry(key: str) -> Path:
    return environment.cache_dir() / "stages" / f"{key}.json"


def publish(partial: Path, run: Path, records: Sequence[dict[str, Any]], *, force: bool) -> None:
    """Write the manifest, rename the folder into place, and let later runs find the stages.

    Raises:
        RecipeError: a folder has appeared at `run` meanwhile; the finished work stays in `partial`.
    """
    shutil.rmtree(partial / "last_good", ignore_errors=True)  # of an attempt before this one
    write_manifest(partial)
    _refuse_existing(run, force)
    replaced = run.with_name(f".{run.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if run.exists():
        run.rename(replaced)
    partial.rename(run)
    shutil.rmtree(replaced, ignore_errors=True)
    for record in records:
        remember_stage(run / "stages" / f"{record['index']:02d}-{record['type']}", record["key"])
