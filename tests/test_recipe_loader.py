"""Loading recipe files: faults with file and line, parents, overrides, round trips, shipped recipes, the schema."""

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor import recipe as spec
from compressor import strict_yaml
from compressor.errors import RecipeError
from compressor.recipe import Bound, Recipe
from compressor.recipe_loader import load_recipe, recipe_hash, resolved_yaml
from compressor.recipe_schema import schema_of_recipes

BASE = """\
version: 1
model: {name: xception}
data: {source: synthetic_pcb}
input: {size: 64}
stages:
  - type: finetune
    epochs: 2
  - type: prune
    target: {macs: 0.4x}
  - type: finetune
    epochs: 1
    distill: {}
  - type: quantize
"""


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def faults_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path, BASE, "base.yaml")


def test_a_recipe_knows_where_each_key_was_written(base: Path) -> None:
    loaded = load_recipe(base)
    assert loaded.text == BASE
    assert loaded.path == base
    assert loaded.files == (base,)
    assert loaded.lines["stages[1].target.macs"] == f"{base}:9"
    assert loaded.where("stages[1].target.macs") == f"{base}:9"
    assert loaded.where("stages[1].ignored_scope[0]") == f"{base}:8"  # the nearest key around it
    assert loaded.where("budget.macs") == f"{base}:1"


def test_all_faults_come_at_once_each_with_file_and_line(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """\
version: 1
seed: 1
seed: 2
model:
  name: xeption
data: {source: deepcb, path: x}
stages:
  - type: finetune
    epochs: 0
    lr: 1e-3
  - type: quantise
  - type: prune
    target: {macs: 1.4x}
    ignored_scope: &scope [head.*]
budget:
  latency: 3
""",
    )
    assert faults_of(path) == [
        "recipe.yaml:3: seed: found a second time, first on line 2; keep one of the two",
        "recipe.yaml:5: model.name: found 'xeption', allowed xception; did you mean 'xception'?",
        "recipe.yaml:6: data.source: found 'deepcb', allowed synthetic_pcb, image_folder, caltech101 or deeppcb; "
        "did you mean 'deeppcb'?",
        "recipe.yaml:9: stages[0].epochs: found 0, allowed an integer >= 1 and <= 10000 or null",
        "recipe.yaml:10: stages[0].lr: found an unknown key, allowed "
        + ", ".join(schema_of_recipes().keys_at(("stages", 0), {"stages": [{"type": "finetune"}]}))
        + "; did you mean 'learning_rate'?",
        "recipe.yaml:11: stages[1].type: found 'quantise', allowed drop_blocks, finetune, prune, quantize, "
        "reduce_channels, reduce_resolution or replace_kernels; did you mean 'quantize'?",
        "recipe.yaml:13: stages[2].target.macs: found '1.4x', allowed a number > 0, a fraction of the baseline such as "
        "0.4x (at most 1x) or null",
        "recipe.yaml:14: stages[2].ignored_scope: found the anchor &scope, which recipes do not allow; remove it",
        "recipe.yaml:16: budget.latency: found an unknown key, allowed "
        + ", ".join(spec.Budget.model_fields)
        + "; did you mean 'latency_ms'?",
    ]


def test_missing_keys_are_placed_at_the_nearest_line(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 3\nmodel:\n  weights: none\nstages:\n  - type: finetune\n    epochs: 1\n")
    assert faults_of(path) == [
        "recipe.yaml:1: version: found nothing, needs 1",
        "recipe.yaml:1: data: found nothing, needs a mapping with keys of source, path, val_fraction, test_fraction, "
        "group_by, images_per_class, train_per_class, val_per_class, test_per_class, image_size",
        "recipe.yaml:2: model.name: found nothing, needs xception",
    ]


def test_what_could_not_be_read_is_not_reported_as_missing_too(tmp_path: Path) -> None:
    path = write(
        tmp_path, BASE.replace("{source: synthetic_pcb}", "*shared").replace("epochs: 2", "epochs: " + "9" * 40)
    )
    assert [fault.split(";")[0] for fault in faults_of(path)] == [
        "recipe.yaml:3: data: found the alias *shared, which recipes do not allow",
        "recipe.yaml:7: stages[0].epochs: found an integer of 40 digits",
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "recipe.yaml:1: is empty"),
        (b"- a\n", "recipe.yaml:1: found a list of 1, allowed a mapping with keys of version, extends, seed, model"),
        (b"just words\n", "recipe.yaml:1: found 'just words', allowed a mapping"),
        (b"\xff\xfe\x00", "recipe.yaml:1: is not UTF-8 text"),
        (b"a: [1,\nb: 2", "recipe.yaml:2: is not YAML"),
        (b"a: 1\n---\nb: 1\n", "recipe.yaml:2: holds a second document"),
        (b"x: " + b"a" * strict_yaml.MAX_BYTES, "recipe.yaml:1: is larger than 256 KiB"),
        (b"[" * 2000, "is nested deeper than 20 levels"),
    ],
)
def test_files_that_are_no_recipes_give_one_clear_fault(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    faults = faults_of(path)
    assert len(faults) == 1
    assert expected in faults[0]


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, base: Path) -> None:
    assert faults_of(tmp_path / "bsae.yaml") == ["bsae.yaml: does not exist; did you mean 'base.yaml'?"]
    assert faults_of(tmp_path / "base") == ["base: does not exist; did you mean 'base.yaml'?"]
    assert faults_of(tmp_path / "nowhere" / "x.yaml") == ["x.yaml: does not exist"]
    with pytest.raises(RecipeError, match="is a folder; name a recipe file in it"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match="cannot be read: embedded null"):
        load_recipe("a\0b.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(RecipeError, match="is not a regular file"):
        load_recipe(tmp_path / "pipe.yaml")


def test_faults_beyond_a_screenful_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "stages: [" + ", ".join(["x"] * 60) + "]\n")
    faults = faults_of(path)
    assert len(faults) == 41
    assert re.fullmatch(r"\.\.\. and \d+ more faults", faults[-1])


def test_a_hostile_recipe_is_refused_fast(tmp_path: Path) -> None:
    junk = ", ".join(f"k{i}: {{a: [1, 2]}}" for i in range(2000))
    path = write(tmp_path, f"stages: [{{type: prune, {junk}}}]\nmodel: {{{junk}}}\n")
    started = time.process_time()
    assert len(faults_of(path)) == 41
    assert time.process_time() - started < 6


def test_a_child_merges_mappings_and_replaces_lists_and_values(tmp_path: Path, base: Path) -> None:
    write(tmp_path, "extends: base.yaml\nseed: 7\ninput: {fit: center_crop}\n", "mid.yaml")
    child = write(
        tmp_path,
        "extends: ../mid.yaml\ninput:\n  size: [64, 80]\nstages:\n  - {type: finetune, epochs: 9}\n",
        "sub/c.yaml",
    )
    loaded = load_recipe(child)
    assert loaded.recipe.seed == 7
    assert loaded.recipe.input.size == (64, 80)
    assert loaded.recipe.input.fit == "center_crop"
    assert [stage.type for stage in loaded.recipe.stages] == ["finetune"]
    assert loaded.recipe.extends is None
    assert [path.name for path in loaded.files] == ["c.yaml", "mid.yaml", "base.yaml"]
    assert loaded.where("model.name").endswith("base.yaml:2")
    assert loaded.where("input.fit").endswith("mid.yaml:3")
    assert loaded.where("input.size[1]").endswith("c.yaml:3")
    assert "stages[1]" not in loaded.lines


def test_faults_name_the_file_they_are_in(tmp_path: Path) -> None:
    write(tmp_path, BASE.replace("size: 64", "size: 6"), "base.yaml")
    child = write(tmp_path, "extends: base.yaml\nsede: 3\n", "child.yaml")
    faults = faults_of(child)
    assert faults[0].startswith("child.yaml:2: sede: found an unknown key")
    assert faults[0].endswith("did you mean 'seed'?")
    assert faults[1].startswith("base.yaml:4: input.size: found 6, allowed an integer >= 8")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.yaml": "extends: a.yaml\n"}, "a.yaml:1: extends: found a cycle: a.yaml -> a.yaml"),
        (
            {"a.yaml": "seed: 1\nextends: b.yaml\n", "b.yaml": "extends: ./a.yaml\n"},
            "b.yaml:1: extends: found a cycle: a.yaml -> b.yaml -> a.yaml",
        ),
        ({"a.yaml": "extends: b.yaml\n"}, "a.yaml:1: extends: found 'b.yaml', which does not exist"),
        ({"a.yaml": "extends: bsae.yaml\n", "base.yaml": BASE}, "which does not exist; did you mean 'base.yaml'?"),
        (
            {"a.yaml": "extends: [b.yaml]\n"},
            "a.yaml:1: extends: found a list of 1, allowed the path of a parent recipe",
        ),
        ({"a.yaml": "extends: /etc/passwd\n"}, "a.yaml:1: extends: found '/etc/passwd', allowed the path of a parent"),
        ({"a.yaml": "extends: b.yaml\n", "b.yaml": ""}, "b.yaml:1: is empty"),
        (
            {"a.yaml": "extends: 0.yaml\n", **{f"{i}.yaml": f"extends: {i + 1}.yaml\n" for i in range(12)}},
            "extends: found more than 8 parents in a row",
        ),
    ],
)
def test_parents_that_cannot_be_used_are_named(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    for name, text in files.items():
        write(tmp_path, text, name)
    faults = faults_of(tmp_path / "a.yaml")
    assert len(faults) == 1
    assert expected in faults[0]


def test_null_extends_nothing(base: Path) -> None:
    assert load_recipe(write(base.parent, BASE + "extends: null\n")).recipe == load_recipe(base).recipe


def test_overrides_set_keys_items_and_whole_sections(base: Path) -> None:
    loaded = load_recipe(
        base,
        [
            "stages[0].epochs=5",
            "stages[1].ignored_scope=[fc, 'block1.*']",
            "stages[2].distill.weight=0.9",
            "stages[0].augment.vertical_flip=true",
            "budget={latency_ms: 0.2x, accuracy_drop: 1e-2}",
            "input.size=96",
            "model.weights=none",
            "stages[2].patience=",
            "stages[0].patience=null",
        ],
    )
    first, prune, second, _ = loaded.recipe.stages
    assert isinstance(first, spec.Finetune)
    assert isinstance(prune, spec.Prune)
    assert isinstance(second, spec.Finetune)
    assert (first.epochs, first.augment.vertical_flip, first.patience) == (5, True, None)
    assert prune.ignored_scope == ("fc", "block1.*")
    assert second.distill is not None
    assert (second.distill.weight, second.distill.temperature, second.patience) == (0.9, 2.0, None)
    assert loaded.recipe.budget.latency_ms == Bound(0.2, relative=True)
    assert loaded.recipe.budget.accuracy_drop == 0.01
    assert loaded.recipe.input.size == (96, 96)
    assert loaded.where("stages[0].epochs") == "--set"
    assert loaded.where("stages[1].target") == f"{base}:9"


def test_the_last_override_of_a_key_counts(base: Path) -> None:
    assert load_recipe(base, ["seed=1", "seed=2"]).recipe.seed == 2


def test_a_key_with_dots_is_set_in_quotes(base: Path) -> None:
    stage = "{type: reduce_channels, width: 0.5}"
    loaded = load_recipe(base, [f"stages[1]={stage}", 'stages[1].widths["block1.*"]=0.75'])
    reduced = loaded.recipe.stages[1]
    assert isinstance(reduced, spec.ReduceChannels)
    assert reduced.widths == {"block1.*": 0.75}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "--set: found 'seed', allowed PATH=VALUE such as seed=3"),
        ("=3", "--set: found '=3', allowed PATH=VALUE: '' is not a key path such as stages[1].epochs"),
        ("stages[x]=3", "is not a key path such as stages[1].epochs"),
        ("seed=abc", "--set: seed: found 'abc', allowed an integer >= 0"),
        ("sede=1", "--set: sede: found an unknown key, allowed version, extends, seed"),
        ("stages[9].epochs=1", "--set: stages[9].epochs: found no item 9; stages has items 0 to 3"),
        (
            "stage[1].epochs=1",
            "--set: stage[1].epochs: found no list at stage to take item 1 of; did you mean 'stages'?",
        ),
        ("stages.epochs=1", "--set: stages.epochs: found a list of 4 at stages, which has no keys to set"),
        ("model.name.x=1", "--set: model.name.x: found 'xception' at model.name, which has no keys to set"),
        ("extends=x.yaml", "--set: extends: is fixed by the file and cannot be set"),
        ("stages[1].ignored_scope=*conv", "quote it if '*conv' is meant as text"),
        ("stages[1].ignored_scope=[a", "is not YAML: while parsing a flow sequence"),
        ("stages[1].epochs=3", "--set: stages[1].epochs: found an unknown key"),
        ("stages[1].epochs=3", "did you mean 'recovery.epochs'?"),
        ("stages[2].distill.weigth=0.1", "did you mean 'weight'?"),
        ("seed=!!python/name:os.system x", "found the tag"),
    ],
)
def test_wrong_overrides_are_named(base: Path, override: str, expected: str) -> None:
    faults = faults_of(base, override)
    assert len(faults) == 1
    assert expected in faults[0]


def test_wrong_overrides_and_wrong_keys_are_reported_together(base: Path) -> None:
    path = write(base.parent, BASE.replace("size: 64", "size: 6"))
    faults = faults_of(path, "seed=x", "stages[7]=3")
    assert [fault.split(": found")[0] for fault in faults] == [
        "recipe.yaml:4: input.size",
        "--set: stages[7]",
        "--set: seed",
    ]


def test_the_resolved_recipe_loads_as_the_same_recipe(base: Path) -> None:
    recipe = load_recipe(base, ['stages[1].ignored_scope=["1e-3", "no", "*", "a b"]', "budget.macs=0.00001x"]).recipe
    again = load_recipe(write(base.parent, resolved_yaml(recipe), "again.yaml")).recipe
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe)
    assert resolved_yaml(again) == resolved_yaml(recipe)


def test_the_hash_is_of_the_meaning_not_of_the_text(base: Path) -> None:
    shuffled = write(base.parent, "seed: 0\n# a comment\n" + BASE.replace("size: 64", "size: [64, 64]"))
    child = write(base.parent, "extends: base.yaml\n", "child.yaml")
    hashes = {recipe_hash(load_recipe(path).recipe) for path in (base, shuffled, child)}
    assert len(hashes) == 1
    assert re.fullmatch(r"[0-9a-f]{64}", hashes.pop())
    assert recipe_hash(load_recipe(base, ["seed=1"]).recipe) != recipe_hash(load_recipe(base).recipe)


TRAININGS = st.fixed_dictionaries(
    {"epochs": st.integers(1, 100)},
    optional={
        "learning_rate": st.floats(1e-8, 10, exclude_min=True),
        "ema": st.none() | st.floats(0.1, 0.999),
        "label_smoothing": st.floats(0, 0.9),
        "augment": st.fixed_dictionaries({}, optional={"flip": st.booleans(), "shift": st.integers(0, 63)}),
        "precision": st.sampled_from(["auto", "float32", "bfloat16"]),
    },
)
GLOBS = st.lists(st.text(min_size=1, max_size=8), max_size=3)
STAGES = st.one_of(
    TRAININGS.map(lambda options: {"type": "finetune", **options}),
    st.builds(
        lambda bound, globs: {"type": "prune", "target": {"macs": bound}, "ignored_scope": globs},
        st.integers(1, 10**12) | st.floats(0.001, 1).map(lambda value: str(Bound(value, relative=True))),
        GLOBS,
    ),
    st.builds(
        lambda width, widths: {"type": "reduce_channels", "width": width, "widths": widths},
        st.floats(0.01, 0.99),
        st.dictionaries(st.text(max_size=8), st.floats(0.01, 1), max_size=3),
    ),
    st.builds(
        lambda count, options: {"type": "drop_blocks", "count": count, "recovery": options},
        st.integers(1, 8),
        TRAININGS,
    ),
)


@given(stages=st.lists(STAGES, min_size=1, max_size=4), seed=st.integers(0, 2**32 - 1))
def test_any_recipe_survives_being_written_and_read(stages: list[dict[str, Any]], seed: int) -> None:
    data = {
        "version": 1,
        "seed": seed,
        "model": {"name": "xception"},
        "data": {"source": "synthetic_pcb"},
        "input": {"size": 64},
        "stages": stages,
    }
    recipe = Recipe.model_validate(data)
    document = strict_yaml.parse(resolved_yaml(recipe))
    assert document.faults == ()
    again = Recipe.model_validate(document.value)
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe)
