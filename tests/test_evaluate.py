"""Accuracy from folders: counting laws, matching of folders and labels, and images that cannot be used."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from separable_network import LABELS, SPEC, pictures, trained

from compressor.errors import DataError
from compressor.evaluate import evaluate_images, evaluate_ir, format_evaluation, list_images, summarise
from compressor.export import convert_float_ir, publish_float, save_ir
from compressor.metrics import wilson_interval
from compressor.openvino_core import core
from compressor.runtime import network_size, predict, read_labels

NAMES = tuple(label.replace(" ", "_") for label in LABELS)


@pytest.fixture(scope="module")
def xml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_float(trained(), SPEC, LABELS, tmp_path_factory.mktemp("ir") / "net").xml


def write_tree(root: Path, *, per_class: int = 3) -> None:
    for index, label in enumerate(LABELS):
        (root / label).mkdir(parents=True)
        for number, image in enumerate(pictures(per_class, size=40 + index, seed=index)):
            Image.fromarray(image).save(root / label / f"{number}.png")


def test_labels_and_size_come_from_the_ir(xml: Path) -> None:
    assert read_labels(xml) == NAMES
    assert network_size(xml) == (32, 32)


def test_folder_equals_array_evaluation(xml: Path, tmp_path: Path) -> None:
    write_tree(tmp_path / "data" / "test")
    (tmp_path / "data" / "test" / ".hidden").mkdir()
    (tmp_path / "data" / "test" / "crab" / ".DS_Store").write_text("x")
    result = evaluate_ir(xml, tmp_path / "data")
    assert result.n == 18
    logits = np.concatenate([predict(xml, pictures(3, size=40 + i, seed=i)) for i in range(6)])
    truth = np.repeat(np.arange(6), 3)
    assert result.top1 == (logits.argmax(1) == truth).mean()
    assert result == summarise(logits, truth, NAMES)
    same = pictures(6)
    assert evaluate_images(xml, same, np.arange(6), NAMES).n == 6
    assert json.loads(json.dumps(result.to_json()))["n"] == 18


def test_accuracy_counts_images_not_classes() -> None:
    logits = np.eye(3, dtype=np.float32)[[0, 0, 0, 0, 1, 0]]
    result = summarise(logits, np.asarray([0, 0, 0, 0, 1, 2]), ("a", "b", "c"))
    assert result.top1 == pytest.approx(5 / 6)
    assert result.top5 is None
    assert result.confusion == ((4, 0, 0), (0, 1, 0), (1, 0, 0))
    assert [(c.correct, c.total) for c in result.per_class.values()] == [(4, 4), (1, 1), (0, 1)]
    assert result.interval == wilson_interval(5, 6)
    text = format_evaluation(result)
    assert "top-1 0.8333" in text
    assert "c: 0 of 1" in text
    assert "c taken for a: 1" in text


def test_top5_holds_the_five_best() -> None:
    logits = np.tile(np.arange(8, dtype=np.float32), (8, 1))
    result = summarise(logits, np.arange(8), tuple("abcdefgh"))
    assert result.top1 == 1 / 8
    assert result.top5 == 5 / 8
    assert "top-5 0.6250" in format_evaluation(result)


def test_shapes_must_match() -> None:
    with pytest.raises(DataError, match="no images"):
        summarise(np.zeros((0, 2), np.float32), np.zeros(0, np.int64), ("a", "b"))
    with pytest.raises(DataError, match=r"logits \(1, 2\) for 1 images and 3 labels"):
        summarise(np.zeros((1, 2), np.float32), np.zeros(1, np.int64), ("a", "b", "c"))


def test_folders_and_labels_must_be_the_same_set(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", per_class=1)
    root = tmp_path / "tree"
    with pytest.raises(DataError, match="no such folder"):
        list_images(tmp_path / "absent", NAMES)
    (root / "crab").rename(root / "crabs")
    with pytest.raises(DataError, match="no label 'crabs'; did you mean 'crab'"):
        list_images(root, NAMES)
    (root / "crabs").rename(root / ".crab")
    with pytest.raises(DataError, match="no folder for label 'crab'"):
        list_images(root, NAMES)
    (root / "crab").mkdir()
    with pytest.raises(DataError, match="crab: no image in it"):
        list_images(root, NAMES)
    (root / "crab" / "notes.txt").write_text("no image")
    assert [path.name for _, path in list_images(root, NAMES)].count("notes.txt") == 1
    with pytest.raises(DataError, match=r"notes\.txt: a file; give a folder"):
        list_images(root / "crab" / "notes.txt", NAMES)
    (root / "sea_horse").mkdir()
    with pytest.raises(DataError, match="same class 'sea_horse'"):
        list_images(root, NAMES)


def test_a_class_called_test_is_a_class(tmp_path: Path) -> None:
    for name in ("test", "train"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
    assert [index for index, _ in list_images(tmp_path, ("test", "train"))] == [0, 1]


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "deep"])
def test_unusable_images_are_named(xml: Path, tmp_path: Path, damage: str) -> None:
    write_tree(tmp_path, per_class=1)
    path = tmp_path / "lobster" / "bad.png"
    if damage == "deep":
        Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(path)
    else:
        whole = (tmp_path / "lobster" / "0.png").read_bytes()
        path.write_bytes({"empty": b"", "truncated": whole[:200], "text": b"not an image"}[damage])
    with pytest.raises(DataError, match=r"lobster/bad\.png: "):
        evaluate_ir(xml, tmp_path)


def test_ir_without_labels_is_refused(xml: Path, tmp_path: Path) -> None:
    import openvino as ov

    model = core().read_model(xml)
    stripped = ov.Model(model.get_results(), model.get_parameters(), "bare")
    save_ir(stripped, tmp_path / "bare.xml")
    assert read_labels(tmp_path / "bare.xml") == ()
    assert network_size(tmp_path / "bare.xml") is None
    with pytest.raises(DataError, match="no labels in its model_info"):
        evaluate_ir(tmp_path / "bare.xml", tmp_path)


def test_a_model_that_does_not_take_images_is_refused(tmp_path: Path) -> None:
    import openvino as ov
    from openvino import opset13 as op

    value = op.parameter(ov.PartialShape([1, 4]), ov.Type.f32)
    save_ir(ov.Model([op.relu(value)], [value], "relu"), tmp_path / "relu.xml")
    with pytest.raises(DataError, match=r"relu\.xml: its input is .*; published IRs take one u8 \[1,\?,\?,3\] image"):
        read_labels(tmp_path / "relu.xml")


def test_no_images_give_no_rows(xml: Path) -> None:
    assert predict(xml, []).shape == (0, 6)


def test_order_of_images_is_kept(xml: Path) -> None:
    images = pictures(50)
    forwards, backwards = predict(xml, images), predict(xml, images[::-1])
    np.testing.assert_allclose(forwards, backwards[::-1], rtol=1e-6)
    assert convert_float_ir(trained(), SPEC, LABELS).inputs[0].get_any_name() == "image"
