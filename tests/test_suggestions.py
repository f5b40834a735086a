"""What people misspell, and what they are told: of thirty mistakes at least twenty-seven lead to the right word."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from compressor.cli import main
from compressor.errors import CompressorError
from compressor.models import zoo
from compressor.recipe_loader import load_recipe
from compressor.shipped import find_shipped

REPOSITORY = Path(__file__).resolve().parent.parent
SLIM = REPOSITORY / "recipes" / "xception_slim.yaml"


def key(path: str) -> Callable[[Path], None]:
    return lambda folder: load_recipe(SLIM, [f"{path}=1"]) and None


def stage(kind: str) -> Callable[[Path], None]:
    def attempt(folder: Path) -> None:
        tree = yaml.safe_load(SLIM.read_text())
        tree["stages"][1] = {"type": kind}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
        load_recipe(folder / "recipe.yaml", ())

    return attempt


def value(path: str, text: str) -> Callable[[Path], None]:
    return lambda folder: load_recipe(SLIM, [f"{path}={text}"]) and None


def command(*words: str) -> Callable[[Path], None]:
    def attempt(folder: Path) -> None:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            assert main(list(words)) == 2
        raise CompressorError(said.getvalue())

    return attempt


MISTAKES: list[tuple[str, Callable[[Path], None]]] = [
    ("epochs", key("stages[0].epoch")),
    ("learning_rate", key("stages[0].lr")),
    ("learning_rate", key("stages[0].learning-rate")),
    ("batch_size", key("stages[0].batchsize")),
    ("label_smoothing", key("stages[0].label_smooth")),
    ("weight_decay", key("stages[0].wd")),
    ("round_to", key("stages[2].roundto")),
    ("min_channels", key("stages[2].min_channel")),
    ("importance", key("stages[2].criterion")),
    ("pruning_ratio", key("stages[2].sparsity")),
    ("temperature", key("stages[5].distill.temprature")),
    ("subset_size", key("stages[4].calibration_size")),
    ("accuracy_drop", key("budget.acuracy_drop")),
    ("latency_ms", key("budget.latency")),
    ("stages", key("stage")),
    ("weights", key("model.weigths")),
    ("finetune", stage("fine_tune")),
    ("prune", stage("pruning")),
    ("quantize", stage("quantise")),
    ("drop_blocks", stage("drop_block")),
    ("reduce_channels", stage("reduce_channel")),
    ("xception", value("model.name", "xceptoin")),
    ("taylor", value("stages[2].importance", "tayler")),
    ("synthetic_pcb", value("data.source", "synthetic-pcb")),
    ("timm", value("model.source", "tim")),
    ("resnet18", lambda folder: zoo.build_timm("resent18", {}, 2) and None),
    ("xception_slim", lambda folder: find_shipped("xception-slim") and None),
    ("xception_caltech101", lambda folder: find_shipped("xception_caltec101") and None),
    ("inspect", command("inspekt")),
    ("validate", command("valdiate", str(SLIM))),
]


def test_most_mistakes_lead_to_the_right_word(tmp_path: Path) -> None:
    assert len(MISTAKES) == 30
    told = {}
    for number, (meant, attempt) in enumerate(MISTAKES):
        with pytest.raises(CompressorError) as caught:
            attempt(tmp_path)
        told[number] = f"'{meant}'" in str(caught.value).partition("did you mean")[2]
    missed = [(number, MISTAKES[number][0]) for number, right in told.items() if not right]
    assert len(missed) <= 3, missed
