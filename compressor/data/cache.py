"""Decoded, resized images on disk, so that an image is decoded once and not once an epoch.

Invariant: an array is found by what it holds (file contents, preprocessing, versions) and used only if its bytes still
have the recorded sha256. Files appear under their final name whole or not at all, so two processes may build at once.
"""

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import PIL
from numpy.typing import NDArray

from compressor.data.decode import ImageFaultError, decode, strict_pillow
from compressor.data.files import MAX_FAULTS, FileEntry, FileTree, raise_faults
from compressor.environment import usable_cpus
from compressor.errors import ResourceError
from compressor.preprocess import InputSpec, make_resizer

log = logging.getLogger(__name__)

_FORMAT = 1
_STALE_S = 24 * 3600.0


@dataclass(frozen=True)
class CachedImages:
    """Images of one split, uint8 (N, H, W, 3) memory-mapped, and what is known of the files they came from.

    Attributes:
        images: Pixels at the network's size.
        sizes: int64 (N, 2), height and width as the files had them.
        alpha: Rows whose alpha channel was dropped.
        rotated: Rows whose EXIF rotation was not applied.
    """

    images: NDArray[np.uint8]
    sizes: NDArray[np.int64]
    alpha: tuple[int, ...]
    rotated: tuple[int, ...]


@dataclass(frozen=True)
class _Row:
    """One image on its way into an array."""

    pixels: NDArray[np.uint8]
    size: tuple[int, int]
    alpha: bool
    rotated: bool


def digests(tree: FileTree, entries: Sequence[FileEntry], cache: Path) -> list[str]:
    """sha256 of every file, read only where size or time of change differ from the last time.

    Raises:
        DataError: A file cannot be read.
    """
    source = hashlib.sha256(str(tree.path.resolve()).encode()).hexdigest()
    index_path = cache / "sources" / f"{source}.json"
    known: dict[str, list[Any]] = _read_json(index_path).get("files", {})

    def fresh(entry: FileEntry) -> str | None:
        row = known.get(entry.name)
        if isinstance(row, list) and row[:-1] == [entry.size, *entry.stamp] and isinstance(row[-1], str):
            return row[-1]
        return None

    def digest(entry: FileEntry) -> tuple[str | None, str]:
        old = fresh(entry)
        if old is not None:
            return old, ""
        try:
            return hashlib.sha256(tree.read(entry)).hexdigest(), ""
        except OSError as error:
            return None, f"{tree.where(entry.name)}: cannot be read: {error}"

    with ThreadPoolExecutor(usable_cpus()) as pool:
        results = list(pool.map(digest, entries, chunksize=64))
    raise_faults(str(tree.path), [fault for _, fault in results if fault])
    found = [value for value, _ in results if value is not None]
    if any(fresh(entry) is None for entry in entries) or len(known) != len(entries):
        files = {e.name: [e.size, *e.stamp, value] for e, value in zip(entries, found, strict=True)}
        with _replacing(index_path) as stream:
            stream.write(json.dumps({"format": _FORMAT, "path": str(tree.path), "files": files}).encode())
    return found


def cached_images(
    *,
    cache: Path,
    spec: InputSpec,
    keys: Sequence[str],
    read: Callable[[int], bytes],
    where: Callable[[int], str],
) -> CachedImages:
    """Open the array of these images, building it first if need be.

    Rows that another array of the same preprocessing holds (another seed's split, say) are copied instead of decoded.

    Args:
        cache: Folder of all arrays.
        spec: Preprocessing; decides the rows' size.
        keys: sha256 of each image file, in row order.
        read: Returns the bytes of a row's file; called from several threads.
        where: Names a row's file in messages.

    Raises:
        DataError: Images cannot be used; up to 20 of them are named.
        ResourceError: The cache cannot be written.
    """

    def produce(wanted: Sequence[int]) -> Generator[_Row | str, None, None]:
        resize = make_resizer(spec)

        def make(i: int) -> _Row | str:
            try:
                decoded = decode(read(i))
            except (ImageFaultError, OSError) as error:
                return f"{where(i)}: {error}"
            height, width = decoded.pixels.shape[:2]
            return _Row(resize(decoded.pixels), (height, width), decoded.alpha, decoded.rotated)

        with strict_pillow(), ThreadPoolExecutor(usable_cpus()) as pool:
            yield from _in_order(pool, make, wanted)

    return _open_or_build(cache, spec, keys, produce)


def cached_pixels(
    *, cache: Path, spec: InputSpec, key: str, count: int, generate: Callable[[], NDArray[np.uint8]]
) -> CachedImages:
    """Like `cached_images`, for images that are generated: `generate` returns uint8 (count, h, w, 3)."""

    def produce(wanted: Sequence[int]) -> Generator[_Row | str, None, None]:
        resize, pixels = make_resizer(spec), generate()
        height, width = pixels.shape[1:3]
        for i in wanted:
            yield _Row(resize(pixels[i]), (height, width), alpha=False, rotated=False)

    return _open_or_build(cache, spec, [f"{key}:{i}" for i in range(count)], produce)


def faults_of(tree: FileTree, entries: Sequence[FileEntry]) -> list[str]:
    """Decode files only to learn which cannot be used; stops after 20 faults."""

    def check(entry: FileEntry) -> str:
        try:
            decode(tree.read(entry))
        except (ImageFaultError, OSError) as error:
            return f"{tree.where(entry.name)}: {error}"
        return ""

    faults: list[str] = []
    with strict_pillow(), ThreadPoolExecutor(usable_cpus()) as pool:
        for fault in _in_order(pool, check, entries):
            if fault:
                faults.append(fault)
            if len(faults) >= MAX_FAULTS:
                break
    return faults


def _in_order(pool: ThreadPoolExecutor, work: Callable[[Any], Any], inputs: Sequence[Any]) -> Iterator[Any]:
    """`pool.map` in blocks, so that leaving early leaves little work behind and results do not pile up."""
    block = 64
    for start in range(0, len(inputs), block):
        yield from pool.map(work, inputs[start : start + block])


def _open_or_build(
    cache: Path,
    spec: InputSpec,
    keys: Sequence[str],
    produce: Callable[[Sequence[int]], Generator[_Row | str, None, None]],
) -> CachedImages:
    made_by = [_FORMAT, *spec.geometry(), ov.__version__, PIL.__version__]
    folder = cache / "images" / hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:16]
    stem = folder / hashlib.sha256("\n".join(keys).encode()).hexdigest()
    opened = _open(stem, list(keys))
    if opened is None:
        log.info("decoding %d images into %s", len(keys), folder)
        _build(stem, spec, keys, produce)
        opened = _open(stem, list(keys))
    if opened is None:
        raise ResourceError(f"{stem}.npy: changed while it was written; is another program using the cache folder?")
    return opened


def _open(stem: Path, keys: list[str]) -> CachedImages | None:
    """The array, or None when it is absent or damaged."""
    array, record = stem.with_suffix(".npy"), _read_json(stem.with_suffix(".json"))
    if not record or not array.exists():
        return None
    with array.open("rb") as stream:
        intact = (
            record.get("size") == os.fstat(stream.fileno()).st_size
            and record.get("sha256") == hashlib.file_digest(stream, "sha256").hexdigest()
            and record.get("keys") == keys
        )
    if not intact:
        log.warning("%s: damaged cache of images; built again", array)
        return None
    images = np.load(array, mmap_mode="r", allow_pickle=False)
    sizes = np.asarray(record["sizes"], np.int64).reshape(-1, 2)
    return CachedImages(np.asarray(images), sizes, tuple(record["alpha"]), tuple(record["rotated"]))


def _build(
    stem: Path,
    spec: InputSpec,
    keys: Sequence[str],
    produce: Callable[[Sequence[int]], Generator[_Row | str, None, None]],
) -> None:
    known = _rows_of_siblings(stem, set(keys))
    produced = produce([i for i, key in enumerate(keys) if key not in known])
    sizes, alpha, rotated, faults = [], [], [], []
    shape = (len(keys), spec.height, spec.width, 3)
    # Plain writes rather than a writable memory map: on a full disk a map kills the process with SIGBUS.
    with closing(produced), _replacing(stem.with_suffix(".npy")) as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for i, key in enumerate(keys):
            row = known[key] if key in known else next(produced)
            if isinstance(row, str):
                faults.append(row)
                if len(faults) >= MAX_FAULTS:
                    break
                continue
            stream.write(row.pixels.tobytes())
            sizes.append(row.size)
            alpha += [i] if row.alpha else []
            rotated += [i] if row.rotated else []
        raise_faults("data", faults)
        size = stream.tell()
        stream.seek(0)
        digest = hashlib.file_digest(stream, "sha256")
    record = {"sha256": digest.hexdigest(), "size": size, "keys": list(keys)}
    record |= {"sizes": sizes, "alpha": alpha, "rotated": rotated}
    with _replacing(stem.with_suffix(".json")) as stream:
        stream.write(json.dumps(record).encode())


def _rows_of_siblings(stem: Path, wanted: set[str]) -> dict[str, _Row]:
    """Rows among the wanted that intact arrays of the same preprocessing hold already; views, not copies."""
    rows: dict[str, _Row] = {}
    for path in sorted(stem.parent.glob("*.json")):
        record = _read_json(path)
        keys = record.get("keys", [])
        if not (wanted - rows.keys()).intersection(keys):
            continue
        opened = _open(path.with_suffix(""), keys)
        if opened is None:
            continue
        alpha, rotated = set(opened.alpha), set(opened.rotated)
        for i, key in enumerate(keys):
            if key in wanted and key not in rows:
                height, width = (int(v) for v in opened.sizes[i])
                rows[key] = _Row(opened.images[i], (height, width), i in alpha, i in rotated)
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file of ours; empty when absent or damaged, as everything here can be made again."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@contextmanager
def _replacing(path: Path) -> Iterator[BufferedRandom]:
    """Write a file under a name of its own, then give it its final name in one step."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent)
        handle, name = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise ResourceError(f"{path.parent}: the cache cannot be written: {error}") from error
    try:
        with os.fdopen(handle, "w+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, path)
    except OSError as error:
        raise ResourceError(
            f"{path}: the cache cannot be written: {error}; free space or set COMPRESSOR_CACHE"
        ) from error
    finally:
        Path(name).unlink(missing_ok=True)


def _remove_stale(folder: Path) -> None:
    """Delete what killed runs left behind, a day later: a younger one may belong to a running process."""
    for path in folder.glob("*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_S:
                path.unlink()
        except OSError:
            continue
