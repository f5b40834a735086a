"""The folder of a run: `RUN.partial/` while it works, `RUN/` when it is complete, and stages shared between runs.

Invariant: `RUN` appears by one rename after its manifest is written; nothing finished is lost unasked.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compressor import environment
from compressor.artifacts import atomic_write, sha256_of, write_json, write_manifest
from compressor.errors import RecipeError, ResourceError
from compressor.recipe import Recipe
from compressor.recipe_loader import load_recipe, recipe_hash, resolved_yaml


def open_partial(run: Path, recipe: Recipe, *, resume: bool, force: bool) -> Path:
    """Make or reopen `RUN.partial/` without ever losing finished work unasked."""
    partial = run.with_name(run.name + ".partial")
    if run.exists() and not force:
        raise RecipeError(f"{run}: already exists; choose another place with --out, or replace it with --force")
    if resume and not partial.is_dir():
        raise RecipeError(f"{partial}: there is no unfinished run to resume; leave out --resume to start one")
    if partial.exists() and not resume:
        if not force:
            raise RecipeError(f"{partial}: an unfinished run is there; --resume continues it, --force starts again")
        shutil.rmtree(partial)
    text = resolved_yaml(recipe)
    stored = partial / "recipe.yaml"
    if resume and stored.is_file() and recipe_hash(load_recipe(stored).recipe) != recipe_hash(recipe):
        raise RecipeError(
            f"{partial}: belongs to another recipe than the one given; --force starts again, --out takes another place"
        )
    try:
        partial.mkdir(parents=True, exist_ok=True)
        atomic_write(stored, text)
    except OSError as error:
        raise ResourceError(
            f"{partial}: cannot be written ({error.strerror}); choose another place with --out"
        ) from error
    return partial


@contextmanager
def exclusive(partial: Path) -> Iterator[None]:
    """Keep a second process out of the folder; the kernel drops the lock with the process, so none goes stale."""
    handle = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise RecipeError(
            f"{partial}: another process is working there; wait for it or choose another place with --out"
        ) from None
    finally:
        os.close(handle)


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Also write the toolkit's log into the run folder."""
    handler = logging.FileHandler(path)
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger("compressor")
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def stage_is_ready(folder: Path, key: str) -> bool:
    """Whether a stage's folder is complete for this key, bringing it from an earlier run where possible."""
    try:
        if json.loads((folder / "footprint.json").read_text())["key"] == key:
            return True
    except (OSError, ValueError, KeyError, TypeError):
        pass
    entry = environment.cache_dir() / "stages" / f"{key}.json"
    try:
        known = json.loads(entry.read_text())
        source, files = Path(known["folder"]), dict(known["files"])
        if any(sha256_of(source / name) != digest for name, digest in files.items()):
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    shutil.rmtree(folder, ignore_errors=True)
    unfinished = folder.with_name("." + folder.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name in files:
        shutil.copy2(source / name, unfinished / name)
    unfinished.rename(folder)
    return True


def publish(partial: Path, run: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write the manifest, rename the folder into place, and let later runs find the stages."""
    write_manifest(partial)
    old = run.with_name(run.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if run.exists():
        run.rename(old)
    partial.rename(run)
    shutil.rmtree(old, ignore_errors=True)
    for record in records:
        folder = (run / "stages" / f"{record['index']:02d}-{record['type']}").absolute()
        files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
        write_json(
            environment.cache_dir() / "stages" / f"{record['key']}.json", {"folder": str(folder), "files": files}
        )
