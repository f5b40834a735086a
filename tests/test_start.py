"""What a newcomer meets first: `doctor`, `ls`, `new`, `explain`, `data inspect`."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tiny_networks import make_images

from compressor import doctor
from compressor.cli import main
from compressor.data.survey import survey
from compressor.errors import DataError, RecipeError
from compressor.explain import as_markdown, example_of, explain, keys
from compressor.fitted_recipe import recipe_for
from compressor.recipe_loader import load_recipe
from compressor.shipped import find_shipped, recipes_dir, shipped
from compressor.study_spec import load_study

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "my images", per_class=6, test_per_class=4)


def test_the_versions_doctor_calls_tested_are_those_of_the_constraints() -> None:
    pinned = dict(
        line.strip().split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line
    )
    lower = {name.lower(): version for name, version in pinned.items()}
    assert {n: lower[n] for n in (*doctor.TESTED, *doctor.OPTIONAL)} == {**doctor.TESTED, **doctor.OPTIONAL}


def test_doctor_tells_what_is_there_and_what_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert told.endswith("ready\n")
    assert "telemetry: off" in told
    assert re.search(r"torch +2\.\d+\.\d+\S* +2\.13\.0", told)
    monkeypatch.setitem(doctor.TESTED, "no-such-package", "1.0")
    monkeypatch.setattr(doctor, "cpu_flags", frozenset)
    assert main(["doctor", "--json"]) == 5
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == ["no-such-package is not installed; pip install compressor brings it"]
    assert any("no VNNI" in text for text in found["warnings"])


def test_every_shipped_recipe_is_listed_with_its_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    paths = {*recipes_dir().glob("*.yaml"), *(recipes_dir() / "studies").glob("*.yaml")}
    assert {one["path"] for one in listed} == set(map(str, paths))
    assert all(one["purpose"].endswith(".") and len(one["purpose"]) > 20 for one in listed)
    assert main(["ls"]) == 0
    assert all(len(line) <= 120 for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("one", shipped(), ids=lambda one: one.name)
def test_a_copy_of_a_shipped_recipe_is_as_good_as_the_recipe(
    one: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = one.name  # type: ignore[attr-defined]
    assert main(["new", name, "copy.yaml"]) == 0
    copy = tmp_path / "copy.yaml"
    if name.startswith("studies/"):
        assert len(load_study(copy).runs) == len(load_study(find_shipped(name).path).runs)
    else:
        assert load_recipe(copy, ()).recipe == load_recipe(find_shipped(name).path, ()).recipe
        assert "python compress.py copy.yaml" in copy.read_text()


def test_new_overwrites_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", "xception_ptq"]) == 0
    mine = tmp_path / "xception_ptq.yaml"
    mine.write_text("mine")
    assert main(["new", "xception_ptq"]) == 2
    assert "it exists; choose another name or add --force" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    assert main(["new", "xception_ptq", "--force"]) == 0
    assert mine.read_text() != "mine"
    assert main(["new", "xception_slimm"]) == 2
    assert "did you mean 'xception_slim'?" in capsys.readouterr().err
    assert main(["new"]) == 2
    assert main(["new", "xception_ptq", "a.txt"]) == 2


@pytest.mark.parametrize("model", ["xception", "timm/resnet18", "torchvision/resnet18"])
def test_a_recipe_made_for_a_folder_is_valid_and_fits_it(
    images: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", "mine.yaml", "--from-data", str(images), "--model", model]) == 0
    recipe = load_recipe(tmp_path / "mine.yaml", ()).recipe
    source, _, name = model.rpartition("/")
    assert (recipe.model.source, recipe.model.name) == (source or "builtin", name)
    assert recipe.data.path == str(images)
    assert recipe.input.size == (64, 64)
    text = (tmp_path / "mine.yaml").read_text()
    assert "4 classes,\n# 24 train, 16 test, 4 to 6 images a class and split, median 48 x 48 pixels" in text
    capsys.readouterr()
    assert main(["validate", "mine.yaml"]) == 0
    assert main(["new", "other.yaml", "--from-data", str(images), "--model", "keras/x"]) == 2
    assert not (tmp_path / "other.yaml").exists()


@given(path=st.text(min_size=1, max_size=30), classes=st.integers(2, 300), count=st.integers(1, 100_000))
def test_no_path_and_no_number_makes_an_invalid_recipe(path: str, classes: int, count: int) -> None:
    found = {
        "labels": list(map(str, range(classes))),
        "faults": [],
        "totals": {"all": classes * count},
        "counts": {"all": dict.fromkeys(map(str, range(classes)), count)},
        "height": {"median": 100 + count % 900},
        "width": {"median": 80 + classes},
        "leaks": {},
        "repeated": 0,
    }
    tree = yaml.safe_load(recipe_for(found, Path(path.replace("\0", "")), "timm/resnet18", Path("a.yaml")))
    assert tree["data"]["path"] == str(Path(path.replace("\0", "")))
    assert 64 <= tree["input"]["size"] <= 224
    assert 3 <= tree["stages"][0]["epochs"] <= 30
    assert set(tree) == {"version", "model", "data", "input", "stages", "budget"}


def test_a_folder_with_faults_gets_no_recipe(images: Path, tmp_path: Path) -> None:
    (images / "train" / "red" / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="1 faults, mend them first"):
        recipe_for(survey(images), images, "xception", tmp_path / "a.yaml")


def test_inspect_finds_what_is_wrong_with_a_folder(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = images / "train", images / "test"
    shutil.copy(train / "red" / "000.png", test / "red" / "leaked.png")
    shutil.copy(train / "red" / "001.png", train / "red" / "again.png")
    shutil.copy(train / "red" / "002.png", train / "blue" / "mistaken.png")
    assert main(["data", "inspect", str(images), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["totals"] == {"train": 26, "test": 17}
    assert found["counts"]["train"] == {"blue": 7, "green": 6, "grey": 6, "red": 7}
    assert found["leaks"] == {"train and test": {"images": 1, "first": ["train/red/000.png", "test/red/leaked.png"]}}
    assert found["repeated"] == 2  # the copy, and the one under another label
    assert found["conflicts"] == [["train/blue/mistaken.png", "train/red/002.png"]]
    assert found["height"] == {"least": 48, "median": 48, "most": 48}
    (train / "grey" / "broken.png").write_bytes(b"no image")
    assert main(["data", "inspect", str(images)]) == 4
    told = capsys.readouterr().out
    assert "broken.png: not an image of a known format" in told
    assert "leak: 1 images are in both train and test" in told
    assert main(["data", "inspect", str(images / "absent")]) == 4


@pytest.mark.parametrize(
    ("asked", "paths"),
    [
        ("prune.round_to", ["prune.round_to"]),
        ("round_to", ["prune.round_to", "reduce_channels.round_to"]),
        ("stages[2].distill.temperature", None),
        ("input.size", ["input.size"]),
        ("quantize", ["quantize"]),
    ],
)
def test_a_key_is_found_by_its_path_or_its_end(asked: str, paths: list[str] | None) -> None:
    found = [key.path for key in explain(asked)]
    assert found == paths if paths else all(path.endswith("distill.temperature") for path in found) and found
    for key in explain(asked):
        assert len(key.description) > 10


def test_explain_prints_type_default_and_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "finetune.learning_rate"]) == 0
    told = capsys.readouterr().out
    for part in (
        "Peak learning rate",
        "allowed: a number > 0 and <= 10",
        "default: 0.0005",
        "example: learning_rate: ",
    ):
        assert part in told
    assert main(["explain", "no_such_key_at_all"]) == 2


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("lr", "learning_rate"), ("temprature", "temperature"), ("prune.roundto", "prune.round_to"), ("flops", "macs")],
)
def test_a_misspelt_key_is_suggested(wrong: str, right: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"did you mean '{right}'") + "|" + re.escape(f".{right}'")):
        explain(wrong)


def test_every_key_has_a_meaning_and_examples_come_from_recipes_that_are_valid() -> None:
    known = keys()
    assert len(known) == len({key.path for key in known}) > 100
    assert [key.path for key in known if len(key.description) < 10] == []
    assert example_of("finetune.epochs") is not None
    assert example_of("prune.no_such_key") is None


def test_the_page_of_keys_is_up_to_date() -> None:
    page = REPOSITORY / "docs" / "keys.md"
    assert page.read_text() == as_markdown(), "python compress.py explain --markdown > docs/keys.md"
