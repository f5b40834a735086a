"""A run's network as a folder, and a zip of it, that a device needs no toolkit for.

Invariant: what is in it is what the run proved: its files are checked against the manifest first, and copied as they
are. The folder appears by one rename, or not at all.
"""

import json
import shutil
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any

from compressor.artifacts import (
    atomic_write,
    sha256_of,
    verify_manifest,
    write_json,
    write_manifest,
    write_via,
)
from compressor.benchmark import bench_target
from compressor.errors import DataError, RecipeError
from compressor.runtime import read_labels

CARD = "model_card.md"


def deploy(run: Path, out: Path, *, ir: str | None = None, force: bool = False, calls: int = 100) -> dict[str, Any]:
    """Bundle a run's network with labels, a script that runs it, its model card, and its latency on this machine.

    Args:
        run: A finished run.
        out: Folder to create; the zip lies beside it.
        ir: `int8` or `fp32`; None = the one that the report recommends.
        force: Replace what is there.
        calls: Timed calls of the benchmark.

    Returns:
        `folder`, `zip`, `ir` (its path in the run), `files` and `latency_ms` here.

    Raises:
        DataError: No finished run, none that published anything, or one whose files were changed.
        RecipeError: `out` exists, or the run has no such IR.
    """
    zipped = out.with_name(out.name + ".zip")
    if not force and (out.exists() or zipped.exists()):
        raise RecipeError(f"--out {out}: it exists, or {zipped.name} does; choose another or add --force")
    if faults := verify_manifest(run):
        raise DataError(
            f"{run}: {len(faults)} files are not what the run wrote, first {faults[0]}; nothing was bundled"
        )
    chosen = _chosen(run, ir)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for suffix in (".xml", ".bin"):
            shutil.copyfile(run / Path(chosen).with_suffix(suffix), partial / f"model{suffix}")
        labels = read_labels(partial / "model.xml")
        atomic_write(partial / "labels.txt", "".join(f"{label}\n" for label in labels))
        script = resources.files("compressor").joinpath("bundle", "predict.py").read_text(encoding="utf-8")
        atomic_write(partial / "predict.py", script)
        shutil.copyfile(run / CARD, partial / CARD)
        timed = bench_target(partial / "model.xml", calls=calls, seconds=1.0)
        write_json(partial / "benchmark.json", {**timed, "target": "model.xml"})
        write_manifest(partial)
        write_via(zipped, lambda temporary: _zip(partial, temporary, out.name))
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {
        "folder": str(out),
        "zip": str(zipped),
        "ir": chosen,
        "files": sorted(path.name for path in out.iterdir()),
        "latency_ms": timed["latency"]["default"]["median_ms"],
        "zip_sha256": sha256_of(zipped),
    }


def _chosen(run: Path, ir: str | None) -> str:
    """Path of the IR in the run."""
    report = json.loads((run / "report.json").read_text())
    published = [one["path"] for one in report["artifacts"] if one["path"].endswith(".xml") and "result" in one["path"]]
    if not published:
        raise DataError(f"{run}: it missed a gate or its budget and published nothing, so there is nothing to deploy")
    if ir is None:
        return str(report.get("recommended") or published[-1])
    wanted = f"artifacts/result_{ir}.xml"
    if wanted not in published:
        raise RecipeError(f"--ir {ir}: the run has {', '.join(published)}")
    return wanted


def _zip(folder: Path, target: Path, name: str) -> None:
    """The files of a folder under its name; equal files give an equal zip."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.iterdir()):
            entry = zipfile.ZipInfo(f"{name}/{path.name}", (1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, path.read_bytes())
