"""Laws of the split, on random folders' worth of digests and groups."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_trees import load, make_tree, split_tree

from compressor.data.splits import Item, assign

LABELS = ("a", "b", "c")


@st.composite
def items(draw: st.DrawFn, found: bool) -> list[Item]:
    """Images with repeated digests and groups; with splits found, or in one folder."""
    count = draw(st.integers(30, 120))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    variety = draw(st.sampled_from([5, 40, 10_000]))
    groups = draw(st.sampled_from([6, 30, 10_000]))
    return [
        Item(
            name=f"x/{rng.integers(groups):05d}_{i}.png",
            digest=str(rng.integers(variety * 10)),
            label=int(rng.integers(3)),
            split=("train", "test")[int(rng.random() < 0.2)] if found else None,
        )
        for i in range(count)
    ]


def split(images: list[Item], *, group_by: int | None = None, seed: int = 0):  # type: ignore[no-untyped-def]
    return assign(images, LABELS, seed=seed, val_fraction=0.1, test_fraction=0.2, group_by=group_by)


@settings(max_examples=60)
@given(images=st.booleans().flatmap(items), seed=st.integers(0, 9))
def test_equal_bytes_are_never_on_two_sides(images: list[Item], seed: int) -> None:
    result = split(images, seed=seed)
    sides = [{images[i].digest for i in side} for side in (result.train, result.val, result.test)]
    assert not (sides[0] & sides[1]) | (sides[0] & sides[2]) | (sides[1] & sides[2])
    placed = Counter([*result.train, *result.val, *result.test])
    assert max(placed.values()) == 1
    assert len(placed) + result.duplicates_dropped == len(images)


@settings(max_examples=60)
@given(images=items(found=False), seed=st.integers(0, 9))
def test_groups_stay_on_one_side(images: list[Item], seed: int) -> None:
    result = split(images, group_by=5, seed=seed)
    groups = [{images[i].name[2:7] for i in side} for side in (result.train, result.val, result.test)]
    assert not (groups[0] & groups[1]) | (groups[0] & groups[2]) | (groups[1] & groups[2])


@settings(max_examples=30)
@given(images=items(found=False))
def test_a_split_without_faults_serves_every_class(images: list[Item]) -> None:
    result = split(images)
    if result.faults:
        return
    for side, least in ((result.train, 1), (result.val, 2), (result.test, 2)):
        counts = Counter(images[i].label for i in side)
        assert all(counts[label] >= least for label in {item.label for item in images})


def test_without_duplicates_the_share_is_exact_per_class() -> None:
    images = [Item(f"x/{i}.png", str(i), int(i >= 100), None) for i in range(150)]
    result = split(images)
    assert Counter(images[i].label for i in result.test) == {0: 20, 1: 10}
    assert Counter(images[i].label for i in result.val) == {0: 8, 1: 4}


def test_same_seed_same_split() -> None:
    images = [Item(f"x/{i}.png", str(i), i % 3, None) for i in range(90)]
    assert split(images, seed=1) == split(images, seed=1) != split(images, seed=2)


def test_duplicates_leave_the_training_side_with_a_note(tmp_path: Path) -> None:
    root = split_tree(tmp_path / "pets")
    make_tree(root, {"val/cat": 2, "val/dog": 2}, start=900)
    (root / "train/cat/copy.png").write_bytes((root / "test/cat/00.png").read_bytes())
    (root / "train/cat/copy2.png").write_bytes((root / "val/cat/00.png").read_bytes())
    (root / "val/dog/copy.png").write_bytes((root / "test/dog/01.png").read_bytes())
    (root / "train/dog/again.png").write_bytes((root / "train/dog/00.png").read_bytes())
    data = load(root, tmp_path / "cache")
    assert data.info["duplicates_dropped"] == 3
    assert [len(s) for s in (data.train, data.val, data.test)] == [23, 4, 7]
    assert data.notes == (
        "1 image(s) of val dropped, being byte-identical to test images (first: val/dog/copy.png)",
        "2 image(s) of train dropped, being byte-identical to test images (first: train/cat/copy.png)",
        "1 image(s) of train repeat the bytes of another one there; kept",
    )


def test_the_same_bytes_under_two_labels_are_noted(tmp_path: Path) -> None:
    root = split_tree(tmp_path / "pets")
    (root / "train/dog/cat.png").write_bytes((root / "train/cat/00.png").read_bytes())
    notes = load(root, tmp_path / "cache").notes
    assert notes[0] == "the same bytes under two labels: train/cat/00.png (cat) and train/dog/cat.png (dog)"


def test_deeppcb_groups_boards_by_their_prefix(tmp_path: Path) -> None:
    root = tmp_path / "boards"
    for board in range(8):
        for side, per in (("train", 3), ("test", 1)):
            make_tree(root / f"{side}-{board}", {"ok": per, "defect": per}, start=1000 * board + 100 * (side == "test"))
            for label in ("ok", "defect"):
                target = root / "set" / side / label
                target.mkdir(parents=True, exist_ok=True)
                for path in sorted((root / f"{side}-{board}" / label).iterdir()):
                    path.rename(target / f"{board:05d}{path.stem}.png")
    data = load(root / "set", tmp_path / "cache", source="deeppcb", val_fraction=0.25)
    boards = [{Path(name).name[:5] for name in s.names} for s in (data.train, data.val)]
    assert data.info["group_by"] == 5
    assert not boards[0] & boards[1]
    assert np.bincount(data.val.labels).tolist() == [6, 6]


def test_a_class_lost_to_duplicates_is_a_fault() -> None:
    images = [Item(f"train/{i}", str(i), i % 2, "train") for i in range(20)]
    images += [Item(f"test/{i}", str(i), 1, "test") for i in range(1, 20, 2)] + [Item("test/x", "x", 0, "test")]
    assert any("class 'b'" in f or "no image left of b" in f for f in split(images).faults)


@pytest.mark.parametrize("group_by", [None, 5])
def test_splitting_is_fast(group_by: int | None) -> None:
    import time

    images = [Item(f"x/{i // 10:05d}{i}.png", str(i), i % 100, None) for i in range(50_000)]
    started = time.perf_counter()
    assign(images, [str(i) for i in range(100)], seed=0, val_fraction=0.1, test_fraction=0.2, group_by=group_by)
    assert time.perf_counter() - started < 10
