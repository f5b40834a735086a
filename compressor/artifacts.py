"""Files that are whole or not there: atomic writes, hashes, and the manifest that proves a run folder untouched.

Invariant: a name in its final place always holds complete, synced content; the manifest is written last.
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import DataError, ResourceError

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class Artifact:
    """A published file: `path` relative to the run folder; `io` describes inputs and outputs (name, dtype, shape)."""

    path: str
    format: str
    precision: str
    sha256: str
    size_bytes: int
    io: dict[str, str]


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def out_of_space_is_clear(path: Path) -> Iterator[None]:
    """Turn a full disk or a denied folder into an error that names the file and the way on."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise ResourceError(
                f"{path}: cannot be written ({error.strerror}); free some space or choose another place with --out"
            ) from error
        raise


def write_via(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it, rename it into place; nothing is left on failure."""
    temporary = path.with_name(f".{path.stem}.tmp{os.getpid()}{path.suffix}")
    with out_of_space_is_clear(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write bytes or UTF-8 text so that `path` holds either its old or its whole new content."""
    data = content.encode() if isinstance(content, str) else content
    write_via(path, lambda temporary: _write_bytes(temporary, data))


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically: indented, keys in the order given, NaN refused."""
    atomic_write(path, _json_text(value))


def _json_text(value: object) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_manifest(folder: Path) -> None:
    """Record sha256 and size of every file below `folder` in its `manifest.json`."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() != MANIFEST
    }
    write_json(folder / MANIFEST, {"version": MANIFEST_VERSION, "files": files})


def rewrite_listed(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files of a run folder anew, and what its manifest says of them; the other entries stay as they are.

    Raises:
        DataError: there is no readable manifest; nothing is written then.
    """
    listed = read_manifest(folder)
    for name, text in texts.items():
        atomic_write(folder / name, text)
        data = text.encode()
        listed[name] = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    write_json(folder / MANIFEST, {"version": MANIFEST_VERSION, "files": dict(sorted(listed.items()))})


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Name of each file to its `sha256` and `size_bytes`.

    Raises:
        DataError: there is no manifest, or it is damaged.
    """
    path = folder / MANIFEST
    try:
        content = path.read_text()
        manifest = json.loads(content)
        listed = {
            name: {"sha256": str(entry["sha256"]), "size_bytes": int(entry["size_bytes"])}
            for name, entry in manifest["files"].items()
        }
        if manifest["version"] != MANIFEST_VERSION:
            raise ValueError(f"version {manifest['version']!r}, this toolkit reads version {MANIFEST_VERSION}")
        if content != _json_text(manifest):  # a changed blank is a change too
            raise ValueError("not in the form it was written in")
    except FileNotFoundError:
        raise DataError(f"{path}: no manifest; give the folder of a finished run (RUN.partial is unfinished)") from None
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the manifest itself is damaged ({error})") from None
    return listed


def verify_manifest(folder: Path) -> list[str]:
    """Return what differs between `folder` and its manifest, one line per file; an empty list means untouched.

    Raises:
        DataError: there is no readable manifest.
    """
    expected = {name: (entry["sha256"], entry["size_bytes"]) for name, entry in read_manifest(folder).items()}
    faults = []
    for name, (digest, size) in expected.items():
        file = folder / name
        if not file.is_file():
            faults.append(f"{name}: missing")
        elif file.stat().st_size != size:
            faults.append(f"{name}: {file.stat().st_size} bytes, the manifest says {size}")
        elif sha256_of(file) != digest:
            faults.append(f"{name}: content differs from the manifest (sha256)")
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    faults += [f"{name}: not in the manifest" for name in sorted(present - set(expected) - {MANIFEST})]
    return faults
