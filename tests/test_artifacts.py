"""Files are whole or absent, and the manifest sees every changed bit."""

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.artifacts import atomic_write, sha256_of, verify_manifest, write_json, write_manifest, write_via
from compressor.errors import DataError, ResourceError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "artifacts").mkdir(parents=True)
    (folder / "artifacts" / "result.bin").write_bytes(bytes(range(256)) * 8)
    (folder / "report.json").write_text("{}")
    write_manifest(folder)
    return folder


def test_untouched_folder_verifies(run: Path) -> None:
    assert verify_manifest(run) == []


@given(position=st.integers(0, 256 * 8 * 8 - 1))
def test_any_flipped_bit_is_caught(tmp_path_factory: pytest.TempPathFactory, position: int) -> None:
    folder = tmp_path_factory.mktemp("run")
    data = bytearray(bytes(range(256)) * 8)
    (folder / "result.bin").write_bytes(data)
    write_manifest(folder)
    data[position // 8] ^= 1 << (position % 8)
    (folder / "result.bin").write_bytes(data)
    assert verify_manifest(folder) == ["result.bin: content differs from the manifest (sha256)"]


def test_missing_added_and_resized_files_are_listed(run: Path) -> None:
    (run / "report.json").write_text("{ }")
    (run / "artifacts" / "result.bin").unlink()
    (run / "stray.txt").write_text("x")
    assert verify_manifest(run) == [
        "artifacts/result.bin: missing",
        "report.json: 3 bytes, the manifest says 2",
        "stray.txt: not in the manifest",
    ]


def test_flipped_bit_in_the_manifest_itself_is_an_error_or_a_difference(run: Path) -> None:
    manifest = run / "manifest.json"
    data = bytearray(manifest.read_bytes())
    for position in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[position] ^= 4
        manifest.write_bytes(damaged)
        # Layout and the version number carry no claim about a file.
        if json.loads(data).get("files") == _files(damaged):
            continue
        try:
            faults = verify_manifest(run)
        except DataError as error:
            faults = [str(error)]
        assert any("manifest" in fault for fault in faults), position


def _files(data: bytearray) -> object:
    try:
        return json.loads(data).get("files")
    except ValueError:
        return None


def test_no_manifest_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no manifest; give the folder of a finished run"):
        verify_manifest(tmp_path)


def test_failed_write_keeps_the_old_content_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    atomic_write(target, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        write_via(target, fail)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_full_disk_names_the_file_and_the_way_on(tmp_path: Path, code: int) -> None:
    def fail(temporary: Path) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(ResourceError, match=r"file\.txt: cannot be written .*--out"):
        write_via(tmp_path / "file.txt", fail)
    assert list(tmp_path.iterdir()) == []


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"latency_ms": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_sha256_is_the_standard_one(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
