"""A folder, or a tar of one, as a list of files that any thread can read.

Invariant: nothing is extracted, and no byte outside the folder or the archive is read on the word of a name or link
inside the archive.
"""

import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from compressor.errors import DataError, did_you_mean

MAX_FAULTS = 20
MAX_FILE_BYTES = 512 * 2**20
MAX_FILES = 5_000_000
# data/split/class/file below the given path; one more level is listed so that it can be refused by name.
_MAX_DEPTH = 5
_IGNORED = frozenset({"thumbs.db", "desktop.ini", "__macosx"})


@dataclass(frozen=True)
class FileEntry:
    """One file of a tree.

    Attributes:
        name: Path below the tree's root, with forward slashes.
        size: Bytes.
        stamp: Numbers that change when the file is rewritten (time of change; in a tar, the place too).
    """

    name: str
    size: int
    stamp: tuple[int, ...]


@dataclass(frozen=True)
class FileTree:
    """Files and folders below `path`, hidden ones left out, both sorted by name.

    Attributes:
        path: The folder or tar.
        files: All files.
        folders: All folders, also empty ones, as paths below the root.
        faults: What makes the tree unusable, one sentence each.
        read: Returns one file's bytes; safe to call from several threads. Raises OSError.
    """

    path: Path
    files: tuple[FileEntry, ...]
    folders: tuple[str, ...]
    faults: tuple[str, ...]
    read: Callable[[FileEntry], bytes]

    def where(self, name: str) -> str:
        """Return how messages name a file or folder of this tree."""
        return f"{self.path}:{name}" if self.path.is_file() else str(self.path / name)


def open_tree(path: Path) -> FileTree:
    """List a folder, or an uncompressed tar of one.

    Raises:
        DataError: The path is missing, or is neither a folder nor a readable tar.
    """
    try:
        if path.is_dir():
            return _open_folder(path)
        if path.is_file():
            return _open_tar(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    siblings = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    hint = did_you_mean(path.name, siblings)
    if not siblings:
        hint = f"; the folder {path.parent} is missing too" if not path.parent.is_dir() else "; its folder is empty"
    raise DataError(f"data.path: {path} does not exist{hint}")


def raise_faults(where: str, faults: list[str]) -> None:
    """Raise one DataError that lists the faults, if there are any."""
    if not faults:
        return
    if len(faults) == 1:
        raise DataError(faults[0])
    shown = faults[:MAX_FAULTS]
    more = [f"... and {len(faults) - len(shown)} more"] if len(faults) > len(shown) else []
    raise DataError("\n  - ".join([f"{where}: {len(faults)} faults", *shown, *more]))


def label_of(folder: str) -> str:
    """Class name of a folder: white space becomes `_`, because OpenVINO's model_info joins labels by spaces."""
    return re.sub(r"\s", "_", folder)


def is_ignored(part: str) -> bool:
    """Whether a file or folder name is one that systems leave behind, or hidden."""
    return part.startswith(".") or part.lower() in _IGNORED


def _open_folder(path: Path) -> FileTree:
    files: list[FileEntry] = []
    folders: list[str] = []
    faults: list[str] = []
    for entry, name in _walk(path, "", 1):
        if entry.is_dir():
            folders.append(name)
            continue
        try:
            status = entry.stat()
        except OSError as error:  # A dangling link, mostly.
            faults.append(f"{path / name}: cannot be read: {error.strerror or error}")
            continue
        if status.st_size > MAX_FILE_BYTES:
            faults.append(_too_big(str(path / name), status.st_size))
        files.append(FileEntry(name, status.st_size, (status.st_mtime_ns,)))

    def read(entry: FileEntry) -> bytes:
        return (path / entry.name).read_bytes()

    return FileTree(path, _by_name(files), tuple(sorted(folders)), tuple(faults), read)


def _walk(folder: Path, prefix: str, depth: int) -> Iterator[tuple[os.DirEntry[str], str]]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if is_ignored(entry.name):
                continue
            name = prefix + entry.name
            yield entry, name
            # Linked folders are followed, as data sets are often assembled from links; the depth bounds a loop of them.
            if entry.is_dir() and depth < _MAX_DEPTH:
                yield from _walk(Path(entry.path), name + "/", depth + 1)


def _open_tar(path: Path) -> FileTree:
    status = path.stat()
    offsets: dict[str, int] = {}
    files: list[FileEntry] = []
    folders: set[str] = set()
    faults: list[str] = []
    try:
        # "r:" refuses compressed archives: their members cannot be reached without unpacking all before them.
        with tarfile.open(path, "r:") as archive:
            for number, member in enumerate(archive):
                if number >= MAX_FILES:
                    raise DataError(f"{path}: more than {MAX_FILES} members; is this a data set?")
                parts = [p for p in PurePosixPath(member.name).parts if p != "."]
                where, name = f"{path}:{member.name}", "/".join(parts)
                if member.name.startswith("/") or ".." in parts or "\\" in member.name:
                    faults.append(f"{where}: a path that leaves the archive; pack the folder with relative names")
                elif not parts or any(is_ignored(p) for p in parts):
                    continue
                elif member.isdir():
                    folders.add(name)
                elif member.issym() or member.islnk():
                    faults.append(f"{where}: a link; pack with `tar --dereference --hard-dereference`")
                elif not member.isreg() or member.issparse():
                    faults.append(f"{where}: not a plain file (tar type {member.type!r})")
                elif name in offsets:
                    faults.append(f"{where}: appears twice in the archive")
                elif member.size > MAX_FILE_BYTES:
                    faults.append(_too_big(where, member.size))
                elif member.offset_data + member.size > status.st_size:
                    faults.append(f"{where}: the archive ends before this file does; it is truncated")
                else:
                    offsets[name] = member.offset_data
                    folders.update(str(p) for p in PurePosixPath(name).parents if p.name)
                    files.append(FileEntry(name, member.size, (member.offset_data, status.st_mtime_ns)))
            faults += _end_faults(path, archive.offset)
    except (tarfile.TarError, ValueError, EOFError) as error:
        advice = "unpack it, or give an uncompressed .tar or a folder"
        raise DataError(f"{path}: not a readable tar archive ({error}); {advice}") from error

    def read(entry: FileEntry) -> bytes:
        with path.open("rb") as stream:
            stream.seek(offsets[entry.name])
            data = stream.read(entry.size)
        if len(data) != entry.size:
            raise OSError(f"{path}: {len(data)} of {entry.size} bytes of {entry.name} could be read")
        return data

    return FileTree(path, _by_name(files), tuple(sorted(folders)), tuple(faults), read)


def _end_faults(path: Path, offset: int) -> list[str]:
    """Python's tarfile stops without a word at a damaged or cut header (3.11); a sound archive ends in zeros."""
    with path.open("rb") as stream:
        stream.seek(offset)
        block = stream.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return [f"{path}: the archive has no end mark; it is truncated"]
    return [f"{path}: no readable member at byte {offset}; the archive is damaged"] if any(block) else []


def _by_name(files: list[FileEntry]) -> tuple[FileEntry, ...]:
    return tuple(sorted(files, key=lambda entry: entry.name))


def _too_big(where: str, size: int) -> str:
    return f"{where}: {size / 2**20:.0f} MiB; a file of images is at most {MAX_FILE_BYTES // 2**20} MiB"
