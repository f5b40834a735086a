"""An image is decoded once; a damaged cache is noticed and made again; two processes do not disturb each other."""

import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from image_trees import load, make_tree, pack, save_image, split_tree

import compressor.data.cache as cache_module
from compressor.data.files import FileTree
from compressor.errors import ResourceError
from compressor.preprocess import InputSpec


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the files decoded so far."""
    calls: list[int] = []
    real = cache_module.decode

    def decode(data: bytes) -> object:
        calls.append(len(data))
        return real(data)

    monkeypatch.setattr(cache_module, "decode", decode)
    return calls


@pytest.mark.parametrize("packed", [False, True])
def test_second_load_neither_decodes_nor_reads(
    packed: bool, decoded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = split_tree(tmp_path / "pets")
    path = pack(root, tmp_path / "pets.tar", "pets") if packed else root
    first = load(path, tmp_path / "cache")
    assert len(decoded) == 29
    opened = cache_module.digests
    reads: list[str] = []

    def digests(tree: FileTree, *args: object) -> object:
        counting = FileTree(tree.path, tree.files, tree.folders, tree.faults, lambda e: reads.append(e.name) or b"")  # type: ignore[func-returns-value]
        return opened(counting, *args)  # type: ignore[arg-type]

    monkeypatch.setattr("compressor.data.load.digests", digests)
    second = load(path, tmp_path / "cache")
    assert (len(decoded), reads) == (29, [])
    assert second.fingerprint == first.fingerprint
    assert np.array_equal(second.train.images, first.train.images)


def test_a_changed_file_alone_is_decoded_again(decoded: list[int], tmp_path: Path) -> None:
    root = split_tree(tmp_path / "pets")
    before = load(root, tmp_path / "cache")
    decoded.clear()
    save_image(root / "test/dog/00.png", 4321)
    after = load(root, tmp_path / "cache")
    assert len(decoded) == 1
    row = after.test.names.index("test/dog/00.png")
    same = np.all(before.test.images == after.test.images, axis=(1, 2, 3))
    assert np.flatnonzero(~same).tolist() == [row]


def test_another_seed_copies_rows_instead_of_decoding(decoded: list[int], tmp_path: Path) -> None:
    root = make_tree(tmp_path / "pets", {"a": 20, "b": 20})
    first = load(root, tmp_path / "cache", seed=0)
    decoded.clear()
    second = load(root, tmp_path / "cache", seed=1)
    assert decoded == []
    assert first.fingerprint != second.fingerprint
    images = {
        name: image for s in (first.train, first.val, first.test) for name, image in zip(s.names, s.images, strict=True)
    }
    for part in (second.train, second.val, second.test):
        assert all(np.array_equal(images[name], image) for name, image in zip(part.names, part.images, strict=True))


def test_another_spec_is_another_array(decoded: list[int], tmp_path: Path) -> None:
    root = split_tree(tmp_path / "pets")
    load(root, tmp_path / "cache")
    load(root, tmp_path / "cache", spec=InputSpec(8, 8, mean=(0.1, 0.2, 0.3)))
    assert len(decoded) == 29, "normalisation does not touch the cached bytes"
    load(root, tmp_path / "cache", spec=InputSpec(8, 8, "linear"))
    assert len(decoded) == 58


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda npy: flip_a_bit(npy),
        lambda npy: npy.write_bytes(npy.read_bytes()[:-1]),
        lambda npy: npy.write_bytes(b""),
        lambda npy: npy.with_suffix(".json").write_text(
            npy.with_suffix(".json").read_text().replace('"size": ', '"size": 1')
        ),
    ],
    ids=["bit", "short", "empty", "sidecar"],
)
def test_a_damaged_cache_is_built_again_with_a_warning(
    damage: object, decoded: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = split_tree(tmp_path / "pets")
    first = load(root, tmp_path / "cache")
    expected = np.array(first.train.images)
    del first
    decoded.clear()
    for npy in (tmp_path / "cache").rglob("*.npy"):
        damage(npy)  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        again = load(root, tmp_path / "cache")
    assert "damaged cache of images; built again" in caplog.text
    assert len(decoded) == 29
    assert np.array_equal(again.train.images, expected)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"files": {"train/cat/00.png": 3}}'])
def test_a_damaged_index_or_sidecar_is_made_again(text: str, decoded: list[int], tmp_path: Path) -> None:
    root = split_tree(tmp_path / "pets")
    first = load(root, tmp_path / "cache")
    for path in (tmp_path / "cache").rglob("*.json"):
        path.write_text(text)
    assert load(root, tmp_path / "cache").fingerprint == first.fingerprint
    assert len(decoded) == 58


def test_two_builders_at_once_agree(tmp_path: Path) -> None:
    root = split_tree(tmp_path / "pets")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: load(root, tmp_path / "cache"), range(2))
    assert np.array_equal(first.train.images, second.train.images)
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_leftovers_of_killed_runs_go_after_a_day(tmp_path: Path) -> None:
    root = split_tree(tmp_path / "pets")
    load(root, tmp_path / "cache")
    folder = next((tmp_path / "cache" / "images").iterdir())
    old, young = folder / "old.npy.tmp", folder / "young.npy.tmp"
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 3e5,) * 2)
    load(root, tmp_path / "cache", images_per_class=3)
    assert (old.exists(), young.exists()) == (False, True)


def test_an_unwritable_cache_is_a_resource_error(tmp_path: Path) -> None:
    root = split_tree(tmp_path / "pets")
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ResourceError, match="the cache cannot be written"):
        load(root, tmp_path / "cache")


def test_a_full_disk_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = split_tree(tmp_path / "pets")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left on device; free space or set COMPRESSOR_CACHE"):
        load(root, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_the_sidecar_holds_no_absolute_path(tmp_path: Path) -> None:
    load(split_tree(tmp_path / "pets"), tmp_path / "cache")
    for path in (tmp_path / "cache" / "images").rglob("*.json"):
        record = json.loads(path.read_text())
        assert set(record) == {"sha256", "size", "keys", "sizes", "alpha", "rotated"}
        assert str(tmp_path) not in path.read_text()
