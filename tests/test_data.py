"""What a data set is loaded into, and that each fault is named before anything is trained."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from image_trees import SPEC, load, make_tree, pack, save_image, split_tree
from PIL import Image

from compressor.data import calibration_indices, class_labels, load_dataset, write_images
from compressor.errors import DataError, RecipeError
from compressor.preprocess import InputSpec, make_resizer


def test_split_folders_become_a_dataset(tmp_path: Path) -> None:
    root = split_tree(tmp_path / "pets")
    data = load(root, tmp_path / "cache")
    assert data.labels == class_labels("image_folder", str(root)) == ("cat", "dog")
    assert [len(s) for s in (data.train, data.val, data.test)] == [18, 4, 7]
    assert data.native_size == (12, 10)
    assert data.test.names == (*(f"test/cat/0{i}.png" for i in range(3)), *(f"test/dog/0{i}.png" for i in range(4)))
    assert data.info["counts"] == {
        "train": {"cat": 10, "dog": 8},
        "val": {"cat": 2, "dog": 2},
        "test": {"cat": 3, "dog": 4},
    }
    resize = make_resizer(SPEC)
    for split in (data.train, data.val, data.test):
        assert split.images.shape == (len(split), 8, 8, 3)
        assert not split.images.flags.writeable
        for image, label, name in zip(split.images, split.labels, split.names, strict=True):
            assert name.split("/")[1] == data.labels[label]
            assert np.array_equal(image, resize(np.asarray(Image.open(root / name).convert("RGB"))))


def test_val_folder_is_used_as_it_is(tmp_path: Path) -> None:
    root = split_tree(tmp_path / "pets")
    make_tree(root, {"val/cat": 1, "val/dog": 2}, start=900)
    data = load(root, tmp_path / "cache")
    assert data.val.names == ("val/cat/00.png", "val/dog/00.png", "val/dog/01.png")
    assert len(data.train) == 22
    assert data.info["splits_made_here"] == []


def test_one_folder_of_classes_is_split(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "pets", {"cat": 20, "big dog": 30})
    data = load(root, tmp_path / "cache", seed=3)
    assert data.labels == ("big_dog", "cat")
    assert data.info["counts"] == {
        "train": {"big_dog": 22, "cat": 14},
        "val": {"big_dog": 2, "cat": 2},
        "test": {"big_dog": 6, "cat": 4},
    }
    assert load(root, tmp_path / "cache", seed=4).fingerprint != data.fingerprint


@pytest.mark.parametrize("top", [".", "pets", "a folder"])
def test_tar_equals_folder(top: str, tmp_path: Path) -> None:
    root = split_tree(tmp_path / "pets")
    folder = load(root, tmp_path / "cache")
    packed = load(pack(root, tmp_path / "pets.tar", top), tmp_path / "other")
    assert packed.fingerprint == folder.fingerprint
    assert packed.train.names == folder.train.names
    assert np.array_equal(packed.train.images, folder.train.images)


def test_fingerprint_follows_content_and_spec_alone(tmp_path: Path) -> None:
    first = load(split_tree(tmp_path / "a"), tmp_path / "cache")
    assert load(split_tree(tmp_path / "elsewhere" / "b"), tmp_path / "cache2").fingerprint == first.fingerprint
    assert load(tmp_path / "a", tmp_path / "cache", spec=InputSpec(8, 9)).fingerprint != first.fingerprint
    save_image(tmp_path / "a/train/cat/00.png", 12345)
    assert load(tmp_path / "a", tmp_path / "cache").fingerprint != first.fingerprint


def test_images_per_class_limits_train_only(tmp_path: Path) -> None:
    root = split_tree(tmp_path / "pets")
    whole, part = load(root, tmp_path / "cache"), load(root, tmp_path / "cache", images_per_class=3)
    assert np.bincount(part.train.labels).tolist() == [3, 3]
    assert set(part.train.names) < set(whole.train.names)
    assert (part.val.names, part.test.names) == (whole.val.names, whole.test.names)


def test_colour_modes_are_converted_and_alpha_noted(tmp_path: Path) -> None:
    root = split_tree(tmp_path / "pets")
    save_image(root / "test/cat/grey.png", 1, mode="L")
    save_image(root / "test/cat/alpha.png", 2, mode="RGBA")
    Image.fromarray(np.zeros((9, 9, 4), np.uint8), "CMYK").save(root / "test/dog/print.jpg")
    Image.fromarray(np.arange(81, dtype=np.uint8).reshape(9, 9), "P").save(root / "test/dog/palette.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((9, 12, 3), np.uint8)).save(root / "test/dog/turned.jpg", exif=exif)
    data = load(root, tmp_path / "cache")
    assert "1 image(s) have an alpha channel, which is dropped" in data.notes
    assert "1 image(s) carry an EXIF rotation, which is not applied (as in PIL.Image.open)" in data.notes
    pixels = data.test.images[data.test.names.index("test/cat/alpha.png")]
    assert np.array_equal(
        pixels, make_resizer(SPEC)(np.asarray(Image.open(root / "test/cat/alpha.png").convert("RGB")))
    )


def test_hidden_files_are_ignored_and_strays_noted(tmp_path: Path) -> None:
    root = split_tree(tmp_path / "pets")
    for junk in (".DS_Store", "train/cat/Thumbs.db", "train/dog/.hidden.png", "__MACOSX/x.txt", "README.txt"):
        (root / junk).parent.mkdir(exist_ok=True)
        (root / junk).write_text("junk")
    data = load(root, tmp_path / "cache")
    assert len(data.train) + len(data.val) == 22
    assert data.notes == ("files outside of the class folders ignored: README.txt",)


def sixteen_bit(path: Path) -> None:
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(path)


def giant(path: Path) -> None:
    Image.new("1", (10_100, 10_000)).save(path)


def monster(path: Path) -> None:
    Image.new("1", (30_000, 10_000)).save(path)


def truncated(path: Path) -> None:
    save_image(path, 5, (64, 64))
    path.write_bytes(path.read_bytes()[:-3000])


def half_jpeg(path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue()[: buffer.tell() // 2])


BROKEN = {
    "text": (lambda p: p.write_text("a,b\n"), "not an image of a known format"),
    "empty": (lambda p: p.write_bytes(b""), "an empty file"),
    "truncated": (truncated, "a damaged or truncated image"),
    "half_jpeg": (half_jpeg, "a damaged or truncated image"),
    "sixteen_bit": (sixteen_bit, "more than 8 bits a channel"),
    "giant": (giant, "a giant image .*101000000 pixels"),
    "monster": (monster, "a giant image .*300000000 pixels"),
    "postscript": (lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "not an image"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_named(kind: str, tmp_path: Path) -> None:
    root = split_tree(tmp_path / "pets")
    spoil, message = BROKEN[kind]
    spoil(root / "test/dog/broken.png")
    with pytest.raises(DataError, match=rf"broken\.png: {message}"):
        load(root, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_sixteen_bit_colour_is_refused_too(tmp_path: Path) -> None:
    """Pillow gives mode RGB for it and drops the low bytes."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    root = split_tree(tmp_path / "pets")
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    body = zlib.compress((b"\0" + b"\x12\x34" * 12) * 4)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    (root / "train/cat/deep.png").write_bytes(png)
    with pytest.raises(DataError, match=r"deep\.png: more than 8 bits a channel \(mode RGB\)"):
        load(root, tmp_path / "cache")


def test_all_faults_come_in_one_error(tmp_path: Path) -> None:
    root = split_tree(tmp_path / "pets")
    (root / "train/ant").mkdir()
    truncated(root / "test/dog/a.png")
    sixteen_bit(root / "train/cat/b.png")
    with pytest.raises(DataError) as caught:
        load(root, tmp_path / "cache")
    text = str(caught.value)
    assert text.startswith(f"{root}: 4 faults\n  - ")
    assert f"{root / 'train/ant'}: an empty class folder" in text
    assert "class folders of train/ that test/ lacks: ant" in text
    assert "a.png: a damaged or truncated image" in text
    assert "b.png: more than 8 bits" in text


def test_long_lists_of_faults_are_cut(tmp_path: Path) -> None:
    root = split_tree(tmp_path / "pets")
    for i in range(30):
        (root / f"train/cat/{i}.txt").write_text("x")
    with pytest.raises(DataError) as caught:
        load(root, tmp_path / "cache")
    assert str(caught.value).count("not an image") == 20


@pytest.mark.parametrize(
    ("counts", "extra", "message"),
    [
        ({"train/cat": 5, "test/cat": 2}, {}, r"only one class \('cat'\)"),
        ({"cat": 9}, {}, r"only one class \('cat'\)"),
        (
            {"train/cat": 5, "train/dog": 5},
            {},
            r"has no test/ beside train; add it, or give one folder of class folders",
        ),
        ({"test/cat": 5, "test/dog": 5}, {}, r"has no train/ beside test"),
        (
            {"train/cat": 5, "train/dog": 5, "test/cat": 2, "test/dgo": 2},
            {},
            r"class folders of train/ that test/ lacks: dog; did you mean 'dgo'\?",
        ),
        (
            {"train/cat": 5, "train/dog": 5, "test/cat": 2, "test/dog": 2, "valid/cat": 2},
            {},
            r"valid: not one of train, val, test; did you mean 'val'\?",
        ),
        (
            {"Train/cat": 5, "Train/dog": 5, "Test/cat": 2, "Test/dog": 2},
            {},
            r"a folder inside a class folder; a data set is",
        ),
        ({"train/a/x": 3, "train/b": 3, "test/a": 2, "test/b": 2}, {}, r"train/a/x: a folder inside a class folder"),
        ({"a b": 6, "a_b": 6}, {}, r"'a b' and 'a_b' both become label 'a_b'; rename one"),
        ({"cat": 9, "dog": 4}, {}, r"class 'dog': 2 image\(s\) are too few to split off 2 for val and keep one"),
        ({"cat": 9, "dog": 2}, {}, r"class 'dog': 2 image\(s\) are too few to split off 2 for test"),
        ({"cat": 9, "dog": 9}, {"group_by": 1}, r"class 'cat': 9 image\(s\) in 1 group\(s\) are too few"),
    ],
)
def test_wrong_layouts_are_explained(
    counts: dict[str, int], extra: dict[str, object], message: str, tmp_path: Path
) -> None:
    root = make_tree(tmp_path / "pets", counts)
    with pytest.raises(DataError, match=message):
        load(root, tmp_path / "cache", **extra)


def test_image_outside_of_the_class_folders_is_a_fault(tmp_path: Path) -> None:
    root = split_tree(tmp_path / "pets")
    save_image(root / "train/lost.png", 7)
    with pytest.raises(DataError, match=r"train/lost\.png: an image outside of the class folders"):
        load(root, tmp_path / "cache")


def test_missing_path_names_the_nearest(tmp_path: Path) -> None:
    split_tree(tmp_path / "pets")
    with pytest.raises(DataError, match=r"data\.path: .*pest does not exist; did you mean 'pets'\?"):
        load(tmp_path / "pest", tmp_path / "cache")
    with pytest.raises(DataError, match=r"the folder .*nowhere is missing too"):
        load(tmp_path / "nowhere/pets", tmp_path / "cache")
    with pytest.raises(DataError, match=r"`compress\.py data fetch caltech101` downloads it"):
        class_labels("caltech101", None)
    (tmp_path / "hollow").mkdir()
    with pytest.raises(DataError, match="no class folders found"):
        load(tmp_path / "hollow", tmp_path / "cache")


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    root = split_tree(tmp_path / "pets")
    with pytest.raises(RecipeError, match=r"data\.source: 'deepcb' is not known; .* did you mean 'deeppcb'\?"):
        load(root, tmp_path / "cache", source="deepcb")
    with pytest.raises(RecipeError, match=r"data\.val_fraction: 1\.5 found"):
        load(root, tmp_path / "cache", val_fraction=1.5)
    with pytest.raises(RecipeError, match=r"data\.group_by: 0 found"):
        load(root, tmp_path / "cache", group_by=0)


def crooked_tar(path: Path, kind: str) -> Path:
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo({"climb": "a/../../x.png", "absolute": "/etc/x.png"}.get(kind, "train/cat/x.png"))
        if kind == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        if kind == "device":
            member.type = tarfile.CHRTYPE
        archive.addfile(member)
        if kind == "twice":
            archive.addfile(member)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("climb", r"a/\.\./\.\./x\.png: a path that leaves the archive"),
        ("absolute", r":/etc/x\.png: a path that leaves the archive"),
        ("link", r"x\.png: a link; pack with"),
        ("device", r"x\.png: not a plain file"),
        ("twice", r"x\.png: appears twice"),
    ],
)
def test_crooked_tars_are_refused(kind: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load(crooked_tar(tmp_path / "x.tar", kind), tmp_path / "cache")


def test_damaged_and_compressed_tars_are_refused(tmp_path: Path) -> None:
    whole = pack(split_tree(tmp_path / "pets"), tmp_path / "pets.tar", "pets").read_bytes()
    with tarfile.open(tmp_path / "pets.tar") as archive:
        member = archive.getmember("pets/train/cat/03.png")
    for cut, message in (
        (member.offset_data + 10, "truncated|unexpected end of data"),
        (member.offset + 100, "no end mark; it is truncated"),
        (member.offset, "no end mark; it is truncated"),
    ):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=message):
            load(tmp_path / "cut.tar", tmp_path / "cache")
    (tmp_path / "bent.tar").write_bytes(whole[: member.offset] + b"x" * 512 + whole[member.offset + 512 :])
    with pytest.raises(DataError, match=f"no readable member at byte {member.offset}; the archive is damaged"):
        load(tmp_path / "bent.tar", tmp_path / "cache")
    (tmp_path / "text.tar").write_text("no tar " * 200)
    with pytest.raises(DataError, match="not a readable tar archive"):
        load(tmp_path / "text.tar", tmp_path / "cache")
    with tarfile.open(tmp_path / "pets.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "pets", "pets")
    with pytest.raises(DataError, match=r"pets\.tar\.gz: not a readable tar archive .* give an uncompressed \.tar"):
        load(tmp_path / "pets.tar.gz", tmp_path / "cache")


def test_loops_of_links_end(tmp_path: Path) -> None:
    root = split_tree(tmp_path / "pets")
    (root / "train/cat/loop").symlink_to(root)
    with pytest.raises(DataError, match="a folder inside a class folder"):
        load(root, tmp_path / "cache")
    (root / "train/cat/loop").unlink()
    (root / "train/cat/gone.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"gone\.png: cannot be read"):
        load(root, tmp_path / "cache")


def test_synthetic_boards_are_disjoint_seeded_and_balanced(tmp_path: Path) -> None:
    def board(seed: int) -> object:
        return load_dataset(
            source="synthetic_pcb",
            path=None,
            spec=InputSpec(48, 48),
            cache=tmp_path,
            seed=seed,
            train_per_class=4,
            val_per_class=2,
            test_per_class=3,
        )

    data, again, other = board(0), board(0), board(1)
    assert data.labels == class_labels("synthetic_pcb", None)  # type: ignore[attr-defined]
    assert data.fingerprint == again.fingerprint != other.fingerprint  # type: ignore[attr-defined]
    contents = []
    for split, count in ((data.train, 4), (data.val, 2), (data.test, 3)):  # type: ignore[attr-defined]
        assert np.bincount(split.labels).tolist() == [count] * 7
        assert split.images.shape == (7 * count, 48, 48, 3)
        contents.append({image.tobytes() for image in split.images})
    assert not (contents[0] & contents[1]) | (contents[0] & contents[2]) | (contents[1] & contents[2])


def test_calibration_is_balanced_seeded_and_distinct(tmp_path: Path) -> None:
    data = load(make_tree(tmp_path / "pets", {"a": 40, "b": 12, "c": 9}), tmp_path / "cache")
    for size in (1, 2, 3, 7, 12, 1000):
        chosen = calibration_indices(data.train, size, 5)
        assert len(set(chosen.tolist())) == len(chosen) == min(size, len(data.train))
        counts = np.bincount(data.train.labels[chosen], minlength=3)
        if size <= 12:
            assert counts.max() - counts.min() <= 1
    assert np.array_equal(calibration_indices(data.train, 9, 5), calibration_indices(data.train, 9, 5))
    assert not np.array_equal(calibration_indices(data.train, 9, 5), calibration_indices(data.train, 9, 6))
    with pytest.raises(ValueError, match="at least one image"):
        calibration_indices(data.train, 0, 5)


def test_written_images_load_again(tmp_path: Path) -> None:
    data = load(split_tree(tmp_path / "pets"), tmp_path / "cache")
    write_images(data.train.images, data.train.labels, data.labels, tmp_path / "out/train")
    write_images(data.test.images, data.test.labels, data.labels, tmp_path / "out/test")
    again = load(tmp_path / "out", tmp_path / "cache")
    assert again.labels == data.labels
    assert np.array_equal(again.test.images, data.test.images)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "totals"), [("caltech101", (2986, 860)), ("deeppcb", (2000, 500))])
def test_real_data(source: str, totals: tuple[int, int], shared: Path, tmp_path: Path) -> None:
    data = load(shared / f"data/{source}.tar", tmp_path, source=source, spec=InputSpec(64, 64))
    assert (len(data.train) + len(data.val), len(data.test)) == totals
    assert min(np.bincount(data.val.labels)) >= 2
    if source == "deeppcb":
        boards = [{Path(name).name[:5] for name in split.names} for split in (data.train, data.val)]
        assert not boards[0] & boards[1]
        assert any("repeat the bytes" in note for note in data.notes)
