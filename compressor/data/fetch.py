"""Download public data sets for users with internet and lay them out as train/ and test/ folders of classes.

Invariant: nothing else in the package downloads data, and a folder appears under its final name only when it is
complete and its contents have the known digest.

Digests. Caltech-101's archives have published MD5 sums, which are checked (they guard against damage, not against
malice). DeepPCB comes as an archive that GitHub makes on request and has no published digest: the sha256 over all its
images is written to `fetch.lock.json` beside the data at the first download and must be met at every later one. Copy
the lock file to have another machine check against yours.
"""

import hashlib
import json
import logging
import re
import shutil
import tarfile
import tempfile
import urllib.error
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, Any

from compressor.download import CONNECT_S, open_url
from compressor.errors import DataError, RecipeError, ResourceError, did_you_mean

log = logging.getLogger(__name__)

CALTECH101_INNER_MD5 = "b224c7392d521a49829488ab0f1120d9"
_MAX_BYTES = 2 * 2**30
_MAX_IMAGE_BYTES = 64 * 2**20
_CHUNK = 2**20
_TRAIN_PER_CLASS = 30
_SPLIT_SEED = 0
_SAFE_NAME = re.compile(r"[A-Za-z0-9_.\- ]*[A-Za-z0-9_\- ]")

File = tuple[str, str, str, bytes]  # split, class, file name, contents


@dataclass(frozen=True)
class PublicData:
    """Where a data set lives and how its archive is read.

    Attributes:
        url: Archive, over https.
        md5: Published MD5 of the archive, or None.
        read: Yields the archive's images.
        terms: Licence, for the log.
    """

    url: str
    md5: str | None
    read: Callable[[Path], Iterator[File]]
    terms: str


def fetch(name: str, dest: Path) -> Path:
    """Download a data set into `dest/NAME`; a folder that is there already is kept and returned.

    Raises:
        RecipeError: The name is not known.
        ResourceError: No network, a broken transfer, or no space.
        DataError: What arrived is not what was expected.
    """
    if name not in KNOWN:
        allowed = ", ".join(KNOWN)
        raise RecipeError(f"data fetch: '{name}' is not known; allowed: {allowed}{did_you_mean(name, KNOWN)}")
    source, target, lock = KNOWN[name], dest / name, dest / "fetch.lock.json"
    if target.is_dir():
        log.info("%s is there already", target)
        return target
    try:
        dest.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=dest) as work:
            archive, staging = Path(work) / "archive", Path(work) / name
            _download(source.url, archive, name)
            _check_md5(archive, source.md5, source.url)
            digest, count = _lay_out(source.read(archive), staging)
            _check_lock(lock, name, source.url, digest)
            staging.rename(target)
    except OSError as error:
        raise ResourceError(f"{dest}: {error}; is there space, and may this folder be written?") from error
    log.info("%s: %d images; %s", target, count, source.terms)
    return target


def _download(url: str, path: Path, name: str) -> None:
    response = _connect(url, name)
    try:
        with response, path.open("wb") as stream:
            total = 0
            while chunk := response.read(_CHUNK):
                total += len(chunk)
                if total > _MAX_BYTES:
                    raise DataError(f"{url}: more than {_MAX_BYTES >> 30} GiB arrived; this is not the data set")
                stream.write(chunk)
            expected = response.headers.get("Content-Length")
    except (TimeoutError, ConnectionError, HTTPException) as error:
        raise ResourceError(f"{url}: the transfer broke off ({error}); try again. {_ways_on(url, name)}") from error
    if expected is not None and expected.isdigit() and int(expected) != total:
        raise ResourceError(f"{url}: {total} of {expected} bytes arrived; try again. {_ways_on(url, name)}")


def _connect(url: str, name: str) -> Any:
    """Open the address, or fail within `CONNECT_S`."""
    try:
        return open_url(url, connect_s=CONNECT_S)
    except TimeoutError as error:
        raise ResourceError(f"{url}: {error}. {_ways_on(url, name)}") from error
    except OSError as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ResourceError(f"{url}: cannot be reached ({reason}). {_ways_on(url, name)}") from error


def _ways_on(url: str, name: str) -> str:
    return (
        f"Ways on: fetch it on a machine with internet (`compress.py data fetch {name}`) and copy the folder, then set "
        "data.path to it; set HTTPS_PROXY if you are behind a proxy; or use source synthetic_pcb, which needs no data"
    )


def _check_md5(archive: Path, md5: str | None, url: str) -> None:
    if md5 is None:
        return
    with archive.open("rb") as stream:
        found = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        raise DataError(f"{url}: MD5 is {found}, {md5} was published; the download is damaged or was replaced")


def _lay_out(files: Iterator[File], folder: Path) -> tuple[str, int]:
    """Write the files as split/class/name; returns the sha256 over names and contents, and the count."""
    lines = []
    try:
        for split, label, name, data in files:
            for part in (label, name):
                if not _SAFE_NAME.fullmatch(part):
                    raise DataError(f"the archive holds a file of an unexpected name: {part!r:.80}")
            place = folder / split / label
            place.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(data)
            lines.append(f"{split}/{label}/{name} {hashlib.sha256(data).hexdigest()}")
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, KeyError, UnicodeDecodeError) as error:
        raise DataError(f"the archive cannot be read ({error}); it is damaged, or its layout has changed") from error
    if not lines:
        raise DataError("the archive holds no images where they were expected; its layout has changed")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest(), len(lines)


def _check_lock(lock: Path, name: str, url: str, digest: str) -> None:
    """Compare with the digest of the first download, or record it."""
    known: dict[str, dict[str, str]] = {}
    if lock.exists():
        try:
            known = json.loads(lock.read_text())
            recorded = known.get(name, {}).get("contents_sha256", digest)
        except (ValueError, AttributeError) as error:
            raise DataError(
                f"{lock}: not a lock file of `data fetch` ({error}); delete it to accept any contents"
            ) from error
        if recorded != digest:
            raise DataError(
                f"{url}: contents have sha256 {digest}, but {lock} recorded {recorded} at the first download; the data "
                "set was changed. Delete its entry there to accept this one"
            )
    known[name] = {"url": url, "contents_sha256": digest}
    part = lock.with_suffix(".part")
    part.write_text(json.dumps(known, indent=2) + "\n")
    part.replace(lock)


def _read_caltech101(archive: Path) -> Iterator[File]:
    """101 classes; 30 images of each to train, the others to test, chosen by hash, so alike on every machine."""
    classes: dict[str, dict[str, bytes]] = defaultdict(dict)
    with zipfile.ZipFile(archive) as outer, tempfile.TemporaryFile() as inner:
        member = next((n for n in outer.namelist() if n.endswith("101_ObjectCategories.tar.gz")), None)
        if member is None:
            raise KeyError("101_ObjectCategories.tar.gz")
        with outer.open(member) as packed:
            shutil.copyfileobj(packed, inner, _CHUNK)
        inner.seek(0)
        found = hashlib.file_digest(inner, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found != CALTECH101_INNER_MD5:
            raise DataError(f"{member}: MD5 is {found}, {CALTECH101_INNER_MD5} was published")
        inner.seek(0)
        with tarfile.open(fileobj=inner, mode="r:gz") as images:
            for entry in images:
                parts = PurePosixPath(entry.name).parts
                if not entry.isreg() or len(parts) != 3 or not parts[2].endswith(".jpg") or parts[2].startswith("."):
                    continue
                if parts[1] == "BACKGROUND_Google":  # clutter, by convention not a class
                    continue
                stream = images.extractfile(entry)
                assert stream is not None, "a regular file"
                classes[parts[1]][parts[2]] = _bounded(stream, entry.size, entry.name)
    for label, files in sorted(classes.items()):
        order = sorted(files, key=lambda name: hashlib.sha256(f"{_SPLIT_SEED}:{label}/{name}".encode()).digest())
        for rank, name in enumerate(order):
            yield "train" if rank < _TRAIN_PER_CLASS else "test", label, name, files[name]


def _read_deeppcb(archive: Path) -> Iterator[File]:
    """The official lists; each line names a pair of template (ok) and tested board (defect)."""
    with zipfile.ZipFile(archive) as pack:
        names = set(pack.namelist())
        for split, listing in (("train", "trainval.txt"), ("test", "test.txt")):
            path = next((n for n in sorted(names) if n.endswith(f"PCBData/{listing}")), None)
            if path is None:
                raise KeyError(f"PCBData/{listing}")
            root = PurePosixPath(path).parent
            lines = _bounded(pack.open(path), pack.getinfo(path).file_size, path).decode().split("\n")
            for line in filter(str.strip, lines):
                # The listed name exists with _temp and _test before its suffix.
                board = PurePosixPath(line.split()[0])
                for label, ending in (("ok", "_temp"), ("defect", "_test")):
                    member = str(root / board.with_name(f"{board.stem}{ending}{board.suffix}"))
                    data = _bounded(pack.open(member), pack.getinfo(member).file_size, member)
                    yield split, label, PurePosixPath(member).name, data


def _bounded(stream: IO[bytes], size: int, name: str) -> bytes:
    if size > _MAX_IMAGE_BYTES:
        raise DataError(f"{name}: {size} bytes in the archive; an image of this data set is far smaller")
    with stream:
        return stream.read(_MAX_IMAGE_BYTES)


KNOWN: dict[str, PublicData] = {
    "caltech101": PublicData(
        "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",
        "3138e1922a9193bfa496528edbbc45d0",
        _read_caltech101,
        "Caltech-101, CC BY 4.0",
    ),
    "deeppcb": PublicData(
        "https://github.com/tangsanli5201/DeepPCB/archive/refs/heads/master.zip",
        None,
        _read_deeppcb,
        "DeepPCB, MIT; its README asks for research use only",
    ),
}
