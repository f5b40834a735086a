"""`inspect`: costs add up, sensitivity is that of pruning, nothing is measured twice, suggestions are recipes."""

import copy
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_networks import RandomNetwork, Spec
from tiny_networks import QUANTIZE, stand_in, tiny, tiny_recipe, write_recipe
from torch import nn

from compressor import cli, group_figures, inspection
from compressor.artifacts import atomic_write
from compressor.chart import inspection_chart
from compressor.checkpoint import Network, load_network, save_network
from compressor.context import Assignment, Context, Work
from compressor.data import Dataset, load_dataset
from compressor.data.batches import to_input
from compressor.environment import cache_dir
from compressor.errors import RecipeError
from compressor.inference import evaluate
from compressor.inspection import inspect_recipe
from compressor.models.counting import count
from compressor.preprocess import InputSpec
from compressor.pruning.costs import params_of_layers, part_of, shares_of_layers
from compressor.pruning.coupling import WRITERS
from compressor.pruning.groups import find_groups
from compressor.pruning.surgery import shrink
from compressor.recipe import Prune, Recipe
from compressor.recipe_loader import load_recipe, resolved_yaml
from compressor.report import Footprint
from compressor.stages import run_stage
from compressor.suggestion import time_with, tolerated_widths
from compressor.training import finetune

CLASSES = 4
FINETUNE = {"type": "finetune", "epochs": 1, "batch_size": 16}
PRUNE = {
    "type": "prune",
    "importance": "taylor",
    "importance_batches": 1,
    "pruning_ratio": 0.3,
    "round_to": 4,
    "min_channels": 4,
    "bn_batches": 1,
    "ignored_scope": ["block[2-4]", "block1.skip"],  # leaves three groups: figures of more would take no other path
}


@pytest.fixture(scope="module")
def data(tiny_images: Path) -> Dataset:
    return load_dataset(
        source="image_folder", path=str(tiny_images), spec=InputSpec(48, 48), cache=cache_dir() / "data"
    )


@pytest.fixture(scope="module")
def run(data: Dataset, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As much of an unfinished run as there is after the baseline's training."""
    torch.manual_seed(0)
    module = tiny(CLASSES)
    finetune(
        module,
        train=data.train,
        val=data.val,
        spec=data.spec,
        seed=0,
        epochs=2,
        batch_size=16,
        learning_rate=1e-2,
        precision="float32",
    )
    folder = tmp_path_factory.mktemp("runs") / "mine.partial"
    architecture = {"source": "builtin", "name": "xception", "args": {}, "num_classes": CLASSES}
    save_network(folder / "stages" / "00-finetune", Network(module, architecture, (), None, (3, 48, 48)))
    recipe = Recipe.model_validate(tiny_recipe(tiny_images, FINETUNE, PRUNE))
    atomic_write(folder / "recipe.yaml", resolved_yaml(recipe))
    return folder.with_name("mine")


@pytest.fixture(autouse=True)
def stand_in_network() -> Iterator[None]:
    with stand_in():
        yield


@pytest.fixture
def recipe(tiny_images: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", tiny_images, FINETUNE, PRUNE, QUANTIZE)


@pytest.fixture
def own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test alone."""
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, own_cache_folder: Path) -> list[str]:
    """Time by MACs instead of by the clock, and note what is measured: exports take most of a test's time."""
    seen: list[str] = []

    def times(subject: group_figures.Subject, _: int) -> Any:
        seen.append("times")
        macs = count(subject.module, subject.context.example).per_layer
        layers = {"fp32": {name: n / 1e6 for name, n in macs.items()}, "int8": {n: m / 3e6 for n, m in macs.items()}}
        rest = {"fp32": 0.5, "int8": 0.1}
        whole = {name: sum(layers[name].values()) + rest[name] for name in layers}
        return {"ms": whole, "layers_ms": layers, "rest_ms": rest, "notes": []}

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            seen.append(name)
            return function(*args, **options)

        return call

    monkeypatch.setattr(group_figures, "_times", times)
    monkeypatch.setattr(group_figures, "raw_scores", noted("scores", group_figures.raw_scores))
    monkeypatch.setattr(group_figures, "score_pruned", noted("figure", group_figures.score_pruned))
    monkeypatch.setattr(inspection, "groups_of", noted("groups", inspection.groups_of))
    return seen


COUPLED = Spec(
    kinds=("grouped", "dense", "concat_residual", "squeeze", "depthwise", "residual"),
    widths=(8, 8, 6, 4, 12, 8, 6),
    norm=True,
    bias=True,
    activation="prelu",
    head="hidden",
    size=6,
    seed=3,
)


@pytest.mark.parametrize(
    ("network", "example"),
    [
        (lambda: tiny(CLASSES), torch.zeros(1, 3, 48, 48)),
        (lambda: RandomNetwork(COUPLED), torch.zeros(1, 3, 6, 6).double()),
    ],
)
def test_what_the_groups_cost_adds_up_to_the_network(network: Callable[[], nn.Module], example: torch.Tensor) -> None:
    module = network().eval()
    groups, counts = find_groups(module, example, ignored=()), count(module, example)
    shares, params = shares_of_layers(module, groups), params_of_layers(module)
    assert sum(params.values()) == counts.params
    parts = {g.name: (part_of(g.name, params, shares), part_of(g.name, counts.per_layer, shares)) for g in groups}
    assert all(isinstance(part, int) for pair in parts.values() for part in pair)
    assert sum(part[0] for part in parts.values()) == counts.params
    assert sum(part[1] for part in parts.values()) == counts.macs
    for group in groups:
        layers = {m.layer for m in group.members if m.kind in WRITERS}
        if all(shares[layer] == {group.name: 1} for layer in layers):
            own = sum(p.numel() for layer in layers for p in module.get_submodule(layer).parameters())
            assert parts[group.name] == (own, sum(counts.per_layer.get(layer, 0) for layer in layers))
    split = [layer for layer, own in shares.items() if len(own) > 1]
    assert bool(split) == isinstance(module, RandomNetwork), "the second network has layers that two groups share"
    if not split:
        # The stem's convolution, the BatchNorm after it, and the depthwise half of the separable convolution that
        # follows: what the filters of the group cost, not what reads them.
        assert parts["conv1"][0] == 16 * 27 + 2 * 16 + 16 * 9


def really_pruned(
    run: Path, data: Dataset, folder: Path, group: str, ratio: float, images: int | None
) -> tuple[float | None, float]:
    """Accuracy that a run reports after a prune stage that may shrink one group only; and the loss."""
    network = load_network(run.with_name("mine.partial") / "stages" / "00-finetune")
    context = Context(to_input(data.train.images[:1], data.spec, "cpu"), data, "cpu", folder)
    others = {
        member.layer
        for other in find_groups(network.module, context.example, ignored=())
        if other.name != group
        for member in other.members
        if member.kind == "out"
    }
    stage = Prune.model_validate(
        {**PRUNE, "pruning_ratio": ratio, "ignored_scope": sorted(others), "reconstruction_images": images}
    )
    assignment = Assignment(1, 1, None, Footprint())
    outcome = run_stage(stage, network, context, assignment, Work({}, [], []))
    assert list(outcome.plans[0]["keep"]) == [group]
    return outcome.footprint.val_accuracy, evaluate(outcome.network.module, data.val, data.spec)[1]


@pytest.mark.parametrize("images", [None, 12])
def test_sensitivity_is_that_of_really_pruning_the_group(
    recipe: Path, run: Path, data: Dataset, tmp_path: Path, counted: list[str], images: int | None
) -> None:
    before = {path: path.read_bytes() for path in run.with_name("mine.partial").rglob("*") if path.is_file()}
    change = [] if images is None else [f"stages[1].reconstruction_images={images}"]
    found = inspect_recipe(recipe, change, run=run, sensitivity=True)
    assert (
        found["unpruned"]["accuracy"]
        == evaluate(load_network(run.with_name("mine.partial") / "stages" / "00-finetune").module, data.val, data.spec)[
            0
        ]
    )
    figures = [
        (row["name"], figure) for row in found["groups"] for figure in row["sensitivity"] or () if row["prunable"]
    ]
    assert len(figures) == 3 * sum(row["prunable"] for row in found["groups"])
    chosen = np.random.default_rng(0).permutation(len(figures))[:4]
    assert len({figures[i][1]["loss"] for i in chosen}) > 1
    for name, figure in (figures[i] for i in chosen):
        assert (figure["accuracy"], figure["loss"]) == really_pruned(run, data, tmp_path, name, figure["ratio"], images)
    assert {path: path.read_bytes() for path in before} == before, "the run is read only"


def test_nothing_is_measured_twice(recipe: Path, run: Path, counted: list[str]) -> None:
    first = inspect_recipe(recipe, run=run, sensitivity=True)
    assert counted.count("times") == counted.count("scores") == counted.count("groups") == 1
    widths = {(row["name"], f["kept"]) for row in first["groups"] for f in row["sensitivity"] or ()}
    whole = {(row["name"], row["channels"]) for row in first["groups"]}
    assert counted.count("figure") == len(widths - whole)
    assert not any(first["cached"].values())
    counted.clear()
    again = inspect_recipe(recipe, run=run, sensitivity=True)
    assert counted == []
    assert all(again["cached"].values())
    for found, cached in ((first, False), (again, True)):
        assert {f.pop("cached") for row in found["groups"] for f in row["sensitivity"] or ()} == {cached}
        found.pop("cached")
    assert again == first
    inspect_recipe(recipe, ["stages[1].bn_batches=2"], run=run)
    assert counted == ["groups", "times", "scores"], "other settings, other figures"


def test_ctrl_c_loses_one_figure_at_most_and_a_damaged_file_is_measured_again(
    recipe: Path, run: Path, counted: list[str], own_cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = group_figures.score_pruned

    def interrupted(*args: Any, **options: Any) -> Any:
        if counted.count("figure") == 2:
            raise KeyboardInterrupt
        return score(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(group_figures, "score_pruned", interrupted)
        with pytest.raises(KeyboardInterrupt):
            inspect_recipe(recipe, run=run, sensitivity=True)
    assert counted.count("figure") == 2
    whole = inspect_recipe(recipe, run=run, sensitivity=True)
    figures = [figure for row in whole["groups"] for figure in row["sensitivity"] or ()]
    assert sum(figure["cached"] for figure in figures) == 2
    assert counted.count("scores") == counted.count("times") == 1
    (file,) = (own_cache_folder / "inspect").glob("*.json")
    text = file.read_text()
    file.write_text(text.replace('"accuracy": ', '"accuracy": 1', 1))
    assert file.read_text() != text
    counted.clear()
    inspect_recipe(recipe, run=run)
    assert counted == ["groups", "times", "scores"]


def test_without_sensitivity_no_image_is_run_for_importance(recipe: Path, counted: list[str]) -> None:
    found = inspect_recipe(recipe)
    assert found["importance"]["kind"] == "magnitude"
    assert any("importance is shown by magnitude: taylor needs" in note for note in found["notes"])
    assert found["unpruned"] is None
    for row in found["groups"]:
        assert row["sensitivity"] is None
        assert (row["importance"] is None) == (not row["prunable"]) == (row["reason"] is not None)
        if row["prunable"]:
            assert list(row["importance"].values()) == sorted(row["importance"].values())
            assert row["importance"]["min"] <= 1 <= row["importance"]["max"], "in units of the mean"
    held = {row["name"]: row["reason"] for row in found["groups"] if not row["prunable"]}
    assert "ignored_scope" in held["block1.skip"]
    assert "output" in held["fc"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, r"--sensitivity: .* no trained head for these 4 classes.* give --run .*or model\.weights"),
        ({"run": "absent"}, r"--run \S*absent: not the folder of a run"),
        ({"run": "untrained"}, r"--run \S*untrained: has trained no baseline: stages\[0\] is not finished"),
        (
            {"run": "mine", "set": "input.size=64"},
            r"--run \S*mine: its network has input \[3, 48, 48\], the recipe's \[3, 64",
        ),
    ],
)
def test_accuracy_is_asked_only_of_a_network_that_was_trained(
    change: dict[str, str], text: str, recipe: Path, run: Path, counted: list[str]
) -> None:
    untrained = run.with_name("untrained")
    untrained.mkdir(exist_ok=True)
    atomic_write(untrained / "recipe.yaml", (run.with_name("mine.partial") / "recipe.yaml").read_text())
    overrides = [change["set"]] if "set" in change else []
    with pytest.raises(RecipeError, match=text):
        inspect_recipe(
            recipe, overrides, run=run.with_name(change["run"]) if "run" in change else None, sensitivity=True
        )
    assert counted == []


def test_the_suggestion_is_a_recipe(recipe: Path, run: Path, counted: list[str], tmp_path: Path) -> None:
    overrides = ["data.val_fraction=0.2", "stages[1].min_channels=8"]
    for sensitivity in (False, True):
        suggestion = inspect_recipe(recipe, overrides, run=run, sensitivity=sensitivity)["suggestion"]
        assert ("milliseconds alone" in suggestion["made_from"]) != sensitivity
        if suggestion["yaml"] is None:
            continue
        atomic_write(tmp_path / "elsewhere" / "suggested.yaml", suggestion["yaml"])
        asked, told = (
            load_recipe(recipe, overrides).recipe,
            load_recipe(tmp_path / "elsewhere" / "suggested.yaml").recipe,
        )
        (prune,) = (stage for stage in told.stages if isinstance(stage, Prune))
        assert prune.ranking == "latency"
        assert prune.target is not None
        assert str(prune.target.latency_ms) == suggestion["target"]
        assert set(asked.stages[1].ignored_scope) <= set(prune.ignored_scope)
        assert prune.min_channels == 8
        expected = asked.model_copy(
            update={"extends": told.extends, "stages": (asked.stages[0], prune, asked.stages[2])}
        )
        assert told == expected
    without = write_recipe(tmp_path / "dense.yaml", Path(asked.data.path or ""), FINETUNE, QUANTIZE)
    atomic_write(tmp_path / "suggested.yaml", inspect_recipe(without)["suggestion"]["yaml"])
    assert [s.type for s in load_recipe(tmp_path / "suggested.yaml").recipe.stages] == ["finetune", "prune", "quantize"]


def row(name: str, channels: int, *accuracies: float | None) -> dict[str, Any]:
    figures = [
        {"ratio": r, "kept": channels if a is None else round((1 - r) * channels), "accuracy": a}
        for r, a in zip((0.25, 0.5, 0.75), accuracies, strict=False)
    ]
    return {"name": name, "channels": channels, "prunable": bool(accuracies), "sensitivity": figures or None}


def test_groups_go_as_far_as_each_tolerates() -> None:
    rows = [
        row("all", 16, 0.9, 0.89, 0.885),
        row("half", 16, 0.9, 0.88, 0.5),
        row("none", 16, 0.87, 0.9, 0.9),
        row("rounded", 16, None, None, 0.9),
        row("late", 16, None, 0.5, 0.5),
        row("too small", 16, None, None, None),
        row("fixed", 16),
    ]
    kept, held = tolerated_widths(rows, 0.9)
    assert kept == {"all": 4, "half": 8, "rounded": 4}
    assert held == ["none", "late"]
    assert tolerated_widths(rows, None) == (dict.fromkeys([r["name"] for r in rows[:-1]], 12), [])


def test_time_falls_with_the_multiply_accumulates_of_the_pruned_network() -> None:
    module, example = tiny(CLASSES).eval(), torch.zeros(1, 3, 48, 48)
    groups = find_groups(module, example, ignored=())
    rows = [
        {
            "name": g.name,
            "channels": g.channels,
            "members": [{"layer": m.layer, "kind": m.kind, "channels": sum(map(len, m.indices))} for m in g.members],
        }
        for g in groups
    ]
    kept = {group.name: group.channels // 2 for group in groups if group.prunable}
    pruned = copy.deepcopy(module)
    shrink(pruned, groups, {name: range(width) for name, width in kept.items()})
    layers = {name: float(macs) for name, macs in count(module, example).per_layer.items()}
    assert time_with(module, rows, kept, layers, 7.0) == pytest.approx(count(pruned, example).macs + 7)


def test_the_command_shows_a_table_of_a_hundred_columns_and_draws(
    recipe: Path,
    run: Path,
    counted: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    drawing = tmp_path / "groups.svg"
    arguments = ["inspect", str(recipe), "--run", str(run), "--sensitivity", "-q"]
    assert cli.main([*arguments, "--json", "--chart", str(drawing)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["groups"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    table = out.partition("score:")[0]
    assert max(map(len, table.splitlines())) <= 100
    assert all(group["name"] in table for group in found["groups"])
    for group in found["groups"]:
        assert all(f"{figure['accuracy']:.3f}" in table for figure in group["sensitivity"] or () if figure["accuracy"])
    assert (found["suggestion"]["yaml"] or found["suggestion"]["made_from"]).splitlines()[-1] in out
    root = ElementTree.fromstring(drawing.read_text())
    space = {"svg": "http://www.w3.org/2000/svg"}
    title, desc = root.find("svg:title", space), root.find("svg:desc", space)
    assert title is not None
    assert desc is not None
    assert root.attrib["aria-labelledby"].split() == [title.attrib["id"], desc.attrib["id"]]
    assert "recipe.yaml" in str(title.text)
    assert "Most of the FP32 time" in str(desc.text)
    texts = {"".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {group["name"] for group in found["groups"]} | {"latency of the group's layers, ms"} <= texts
    assert inspection_chart(found).svg == drawing.read_text(), "the same figures, the same bytes"
    assert cli.main(["inspect", str(recipe), "--chart", "groups.png"]) == 2
    assert "allowed a file ending in .svg" in capsys.readouterr().err


def test_milliseconds_are_those_of_the_deployed_network_divided_among_groups(
    recipe: Path, own_cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_figures, "MOST_CALLS", 12)
    found = inspect_recipe(recipe)
    for name in ("fp32", "int8"):
        whole = found["network"]["ms"][name]
        assert whole > 0
        parts = [part["ms"][name] for part in [*found["groups"], found["rest"]]]
        assert sum(parts) == pytest.approx(whole)
        assert all(part >= -1e-9 for part in parts)
        assert sum(part > 0 for part in parts) > len(parts) / 2, "every layer's time is found by its name"
