"""Downloads are checked, laid out and locked; offline is told quickly. No socket is opened here."""

import hashlib
import io
import json
import tarfile
import time
import urllib.error
import zipfile
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from image_trees import load
from PIL import Image

import compressor.data.fetch as fetch_module
from compressor.data import class_labels
from compressor.data.fetch import KNOWN, fetch
from compressor.errors import DataError, RecipeError, ResourceError


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def deeppcb_zip(path: Path, start: int = 0) -> Path:
    with zipfile.ZipFile(path, "w") as pack:
        for listing, boards in (("trainval", range(6)), ("test", range(6, 9))):
            names = [f"group00041/00041/{board:08d}.jpg" for board in boards]
            lines = [
                f"{name} group00041/00041_not/{board:08d}.txt\n" for name, board in zip(names, boards, strict=True)
            ]
            pack.writestr(f"DeepPCB-master/PCBData/{listing}.txt", "".join(lines))
            for name, board in zip(names, boards, strict=True):
                stem = f"DeepPCB-master/PCBData/{name[:-4]}"
                pack.writestr(f"{stem}_temp.jpg", jpeg(start + board))
                pack.writestr(f"{stem}_test.jpg", jpeg(start + 100 + board))
    return path


def serve(monkeypatch: pytest.MonkeyPatch, archive: Path) -> None:
    class Response(io.BytesIO):
        headers = MappingProxyType({"Content-Length": str(archive.stat().st_size)})

    monkeypatch.setattr(fetch_module, "_connect", lambda url, name: Response(archive.read_bytes()))


def test_deeppcb_becomes_folders_by_the_official_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, deeppcb_zip(tmp_path / "x.zip"))
    folder = fetch("deeppcb", tmp_path / "data")
    assert folder == tmp_path / "data/deeppcb"
    counts = {str(p.relative_to(folder)): len(list(p.iterdir())) for p in folder.glob("*/*")}
    assert counts == {"train/ok": 6, "train/defect": 6, "test/ok": 3, "test/defect": 3}
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["deeppcb", "fetch.lock.json"]
    assert class_labels("deeppcb", str(folder)) == ("defect", "ok")
    assert len(load(folder, tmp_path / "cache", source="deeppcb", group_by=8).test) == 6


def test_a_folder_that_is_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, deeppcb_zip(tmp_path / "x.zip"))
    fetch("deeppcb", tmp_path)
    monkeypatch.setattr(fetch_module, "_connect", lambda *_: pytest.fail("asked the network again"))
    assert fetch("deeppcb", tmp_path) == tmp_path / "deeppcb"


def test_lock_file_notices_changed_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, deeppcb_zip(tmp_path / "x.zip"))
    first = fetch("deeppcb", tmp_path / "data")
    lock = json.loads((tmp_path / "data/fetch.lock.json").read_text())
    assert len(lock["deeppcb"]["contents_sha256"]) == 64
    first.rename(tmp_path / "old")
    fetch("deeppcb", tmp_path / "data").rename(tmp_path / "old2")
    serve(monkeypatch, deeppcb_zip(tmp_path / "y.zip", start=1))
    with pytest.raises(DataError, match=r"recorded .* at the first download; the data set was changed"):
        fetch("deeppcb", tmp_path / "data")
    assert not (tmp_path / "data/deeppcb").exists()
    (tmp_path / "data/fetch.lock.json").write_text("[]")
    with pytest.raises(DataError, match="not a lock file"):
        fetch("deeppcb", tmp_path / "data")


def caltech_zip(path: Path) -> tuple[str, str]:
    """Write an archive like the published one; returns the MD5 of it and of the one inside."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as images:
        for label, count, start in (("ant", 35, 0), ("bee", 31, 100), ("BACKGROUND_Google", 3, 200)):
            for i in range(count):
                member = tarfile.TarInfo(f"101_ObjectCategories/{label}/image_{i:04d}.jpg")
                data = jpeg(start + i)
                member.size = len(data)
                images.addfile(member, io.BytesIO(data))
    with zipfile.ZipFile(path, "w") as pack:
        pack.writestr("caltech-101/101_ObjectCategories.tar.gz", inner.getvalue())
        pack.writestr("__MACOSX/x", b"")
    return hashlib.md5(path.read_bytes()).hexdigest(), hashlib.md5(inner.getvalue()).hexdigest()


def test_caltech101_trains_on_thirty_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outer, inner = caltech_zip(tmp_path / "x.zip")
    serve(monkeypatch, tmp_path / "x.zip")
    monkeypatch.setitem(KNOWN, "caltech101", replace(KNOWN["caltech101"], md5=outer))
    monkeypatch.setattr(fetch_module, "CALTECH101_INNER_MD5", inner)
    folder = fetch("caltech101", tmp_path)
    counts = {str(p.relative_to(folder)): len(list(p.iterdir())) for p in folder.glob("*/*")}
    assert counts == {"train/ant": 30, "train/bee": 30, "test/ant": 5, "test/bee": 1}


def test_wrong_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caltech_zip(tmp_path / "x.zip")
    serve(monkeypatch, tmp_path / "x.zip")
    with pytest.raises(DataError, match=r"MD5 is .*, 3138e1922a9193bfa496528edbbc45d0 was published"):
        fetch("caltech101", tmp_path)
    assert not (tmp_path / "caltech101").exists()


@pytest.mark.parametrize("listed", ["", "../../x/evil.jpg x\n", "group/a*b.jpg x\n"])
def test_strange_archives_are_refused(listed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as pack:
        for name in ("trainval", "test"):
            pack.writestr(f"D/PCBData/{name}.txt", listed)
        pack.writestr("D/PCBData/group/a*b_temp.jpg", jpeg(0))
    serve(monkeypatch, tmp_path / "x.zip")
    with pytest.raises(DataError, match=r"holds no images|layout has changed|unexpected name"):
        fetch("deeppcb", tmp_path)
    (tmp_path / "x.zip").write_bytes(b"not a zip")
    serve(monkeypatch, tmp_path / "x.zip")
    with pytest.raises(DataError, match="cannot be read"):
        fetch("deeppcb", tmp_path)


def test_a_transfer_that_breaks_off_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Response(io.BytesIO):
        headers = MappingProxyType({"Content-Length": "999"})

    monkeypatch.setattr(fetch_module, "_connect", lambda url, name: Response(b"half"))
    with pytest.raises(ResourceError, match="4 of 999 bytes arrived"):
        fetch("deeppcb", tmp_path)


def test_unreachable_and_silent_hosts_are_told_with_the_ways_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(ResourceError, match=r"cannot be reached \(Name or service not known\)\. Ways on: .*data\.path"):
        fetch("deeppcb", tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: time.sleep(2))
    monkeypatch.setattr(fetch_module, "CONNECT_S", 0.1)
    with pytest.raises(ResourceError, match="no answer within"):
        fetch("deeppcb", tmp_path)
    assert fetch_module.CONNECT_S < 10


def test_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"data fetch: 'caltech' is not known; allowed: caltech101, deeppcb; did you mean"
    ):
        fetch("caltech", tmp_path)
