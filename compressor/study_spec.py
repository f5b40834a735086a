"""A study: recipes, or grids of changes to them, to be run with several seeds and compared.

Invariant: a frozen value; every run it asks for is a valid recipe, or loading raises one error with all faults.
Importing this module loads no torch.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, JsonValue, ValidationError

from compressor import strict_yaml
from compressor.errors import RecipeError, did_you_mean
from compressor.recipe import Recipe, with_input
from compressor.recipe_bounds import STRICT
from compressor.recipe_faults import explain, found
from compressor.recipe_loader import load_recipe, recipe_hash
from compressor.schema import Schema, Untitled
from compressor.strict_yaml import KeyPath, format_path


@dataclass(frozen=True)
class FigureKind:
    """What a figure is, and how people read it: `scale` turns the toolkit's unit into `unit`."""

    meaning: str
    label: str
    unit: str
    scale: float = 1.0
    form: str = "{:.2f}"


# What a study compares. The figures of a report's footprint keep its names.
FIGURES: Mapping[str, FigureKind] = {
    "accuracy": FigureKind("top-1 on the test split, a fraction", "test accuracy", "%", 100.0, "{:.1f}"),
    "latency_ms": FigureKind("median time of the published IR for one image", "IR latency", "ms"),
    "latency_p95_ms": FigureKind("95th percentile of the same", "95th percentile of latency", "ms"),
    "torch_latency_ms": FigureKind("median time of the float network in eager PyTorch", "latency in PyTorch", "ms"),
    "throughput_fps": FigureKind("images a second, several requests at once", "throughput", "images/s", 1.0, "{:.0f}"),
    "joules_per_image": FigureKind(
        "energy of the processor for one image, at full throughput, where the machine exposes it",
        "energy",
        "J",
        1.0,
        "{:.3f}",
    ),
    "params": FigureKind("parameters", "parameters", "M", 1e-6),
    "macs": FigureKind("multiply-accumulates for one image", "MACs", "M", 1e-6, "{:.0f}"),
    "size_bytes": FigureKind("the published IR, .xml and .bin", "IR size", "MB", 1e-6, "{:.1f}"),
    "training_avg_memory_bytes": FigureKind(
        "resident memory, averaged over time, while the network that is deployed trains: again, as on a device",
        "average training memory",
        "MB",
        1e-6,
        "{:.0f}",
    ),
    "training_peak_memory_bytes": FigureKind("the most of the same", "peak training memory", "MB", 1e-6, "{:.0f}"),
    "epoch_s": FigureKind(
        "a pass over the training images in the last float finetune, validation left out",
        "epoch",
        "s",
        1.0,
        "{:.1f}",
    ),
    "best_epoch_s": FigureKind("training until the weights that were kept, all stages", "training to the best", "s"),
    "train_time_s": FigureKind("training, all stages", "training", "s", 1.0, "{:.0f}"),
}
# Those that fit a table for people.
COLUMNS = (
    "accuracy",
    "latency_ms",
    "training_avg_memory_bytes",
    "training_peak_memory_bytes",
    "epoch_s",
    "params",
    "macs",
    "size_bytes",
)
_MEANINGS = "; ".join(f"{name} = {kind.meaning}" for name, kind in FIGURES.items())
FigureName = Literal[
    "accuracy",
    "latency_ms",
    "latency_p95_ms",
    "torch_latency_ms",
    "throughput_fps",
    "joules_per_image",
    "params",
    "macs",
    "size_bytes",
    "training_avg_memory_bytes",
    "training_peak_memory_bytes",
    "epoch_s",
    "best_epoch_s",
    "train_time_s",
]
Name = Annotated[
    str,
    Field(
        min_length=1,
        max_length=60,
        pattern=r"^[a-z0-9][a-z0-9_.-]*$",
        description="lower-case letters, digits and _ . -, first a letter or digit",
    ),
]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Changes = Mapping[str, JsonValue]
MAX_RUNS = 2000


class Scale(BaseModel):
    """How large the study is run: what changes in all rows, or, inside a row, in that row."""

    model_config = STRICT

    seeds: Annotated[tuple[Seed, ...] | None, Field(strict=False)] = Field(
        default=None, min_length=1, max_length=100, description="Seeds at this scale; null = the study's."
    )
    set: Changes = Field(default={}, description="Key paths of the recipes and what they are set to.")


class Row(BaseModel):
    """One line of the comparison: a recipe with some keys changed, run once for each seed."""

    model_config = STRICT

    name: Name
    recipe: str = Field(min_length=1, description="The recipe, relative to the study's file.")
    set: Changes = Field(default={}, description="Key paths of the recipe and what they are set to.")
    grid: Mapping[str, list[JsonValue]] = Field(
        default={},
        max_length=6,
        description="Key paths and the values each takes; every combination becomes a row of its own.",
    )
    scales: Mapping[Name, Scale] = Field(default={}, description="What changes at a scale in this row only.")


class Published(BaseModel):
    """Somebody else's figures, shown beside the measured ones and never mixed with them."""

    model_config = STRICT

    name: str = Field(min_length=1, max_length=80, description="What it is called there.")
    source: str = Field(min_length=1, max_length=200, description="Where it was published.")
    figures: Mapping[FigureName, float] = Field(description="The figures, in this toolkit's units.")


class Objectives(BaseModel):
    """What makes one row better than another."""

    model_config = STRICT

    maximize: Annotated[tuple[FigureName, ...], Field(strict=False)] = Field(
        default=("accuracy",), description=f"Figures to be large: {_MEANINGS}."
    )
    minimize: Annotated[tuple[FigureName, ...], Field(strict=False)] = Field(
        default=("latency_ms", "training_avg_memory_bytes"), description="Figures to be small, of the same."
    )


class Study(BaseModel):
    """A complete study, version 1."""

    model_config = STRICT

    version: Literal[1] = Field(description="Version of the study format.")
    title: str = Field(min_length=1, max_length=120, description="What is compared, for charts and tables.")
    seeds: Annotated[tuple[Seed, ...], Field(strict=False)] = Field(
        default=(0,), min_length=1, max_length=100, description="Each row is run once for each."
    )
    objectives: Objectives = Field(default=Objectives(), description="What makes one row better than another.")
    set: Changes = Field(default={}, description="Key paths and what they are set to in every recipe.")
    scales: Mapping[Name, Scale] = Field(
        default={}, description="Sizes the study can be run at; the first is the default."
    )
    rows: list[Row] = Field(min_length=1, max_length=200, description="What is compared.")
    published: list[Published] = Field(default=[], description="Figures of others, to be shown beside.")


@dataclass(frozen=True, eq=False)  # a recipe has no hash; a run is itself and no other
class PlannedRun:
    """One run of a study."""

    row: str
    seed: int
    path: Path
    overrides: tuple[str, ...]  # as `--set` takes them
    recipe: Recipe

    def hash_with(self, given: Mapping[str, Any]) -> str:
        """Identifies the recipe once the keys of `input` that it leaves to the network are filled in."""
        return recipe_hash(with_input(self.recipe, given))

    @property
    def folder(self) -> str:
        """Where the row's runs are."""
        return folder_of(self.row)


def folder_of(row: str) -> str:
    """The name of a row as the name of a folder."""
    return re.sub(r"[^\w.,=+\[\]-]", "_", row)


@dataclass(frozen=True)
class LoadedStudy:
    """A study and the runs it asks for."""

    study: Study
    path: Path
    scale: str | None
    runs: tuple[PlannedRun, ...]  # seed by seed, so that whoever stops early has compared all rows


@cache
def study_schema() -> Schema:
    """What may stand where in a study."""
    schema = Study.model_json_schema(schema_generator=Untitled)
    heading = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return Schema({**heading, **schema, "title": "compressor study"})


def schema_text() -> str:
    """Return the JSON Schema as the text of `recipes/study.schema.json`."""
    return json.dumps(study_schema().root, indent=2) + "\n"


def load_study(path: Path, *, scale: str | None = None, overrides: Sequence[str] = ()) -> LoadedStudy:
    """Read a study and make the recipe of every run it asks for.

    Args:
        path: The study's file.
        scale: One of its scales; None takes the first, if it has any.
        overrides: `PATH=VALUE` texts that change every recipe, after all the study changes.

    Raises:
        RecipeError: It cannot be read, or anything in it or in a recipe is wrong.
    """
    study, places = _read(path)
    if scale is None:
        scale = next(iter(study.scales), None)
    elif scale not in study.scales:
        known = ", ".join(study.scales) or "none"
        raise RecipeError(f"{path}: --scale {scale}: found no such scale, allowed {known}")
    runs, faults = [], []
    for index, row in enumerate(study.rows):
        where = places.get(("rows", index), f"{path}:1")
        for variant, changes in _variants(row):
            try:
                runs += list(_runs(study, row, variant, changes, scale, path, overrides))
            except RecipeError as error:
                faults.append(f"{where}: row {variant}: {error}")
    names = [run.row for run in runs if run.seed == runs[0].seed]
    faults += [f"{path}:1: rows: found {name!r} twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if len(runs) > MAX_RUNS:
        faults.append(f"{path}:1: found {len(runs)} runs, allowed {MAX_RUNS}")
    if faults:
        raise RecipeError("\n".join(faults))
    order = list(dict.fromkeys(run.seed for run in runs))
    return LoadedStudy(study, path, scale, tuple(sorted(runs, key=lambda run: order.index(run.seed))))


def _read(path: Path) -> tuple[Study, dict[KeyPath, str]]:
    """Parse and validate the study's own file."""
    try:
        with path.open("rb") as file:
            document = strict_yaml.parse(file.read(strict_yaml.MAX_BYTES + 1))
    except OSError as error:
        near = ""
        if path.parent.is_dir():
            near = did_you_mean(path.name, [other.name for other in path.parent.glob("*.yaml")])
        raise RecipeError(f"{path}: cannot be read: {error.strerror}{near}") from error
    places = {key: f"{path}:{line}" for key, line in document.lines.items()}
    faults = [(fault.path, fault.text, f"{path}:{fault.line}") for fault in document.faults]
    data = document.value
    if not faults and not isinstance(data, dict):
        raise RecipeError(
            f"{path}:1: found {found(data)}, allowed a mapping with keys of {', '.join(Study.model_fields)}"
        )
    if not faults and isinstance(data, dict):
        try:
            study = Study.model_validate(data)
        except ValidationError as error:
            faults = [(key, text, _place(key, places, path)) for key, text in explain(error, data, study_schema())]
        else:
            faults = [(key, text, _place(key, places, path)) for key, text in _broken_rules(study)]
            if not faults:
                return study, places
    raise RecipeError(
        "\n".join(f"{place}: {format_path(key)}: {text}" if key else f"{place}: {text}" for key, text, place in faults)
    )


def _place(key: KeyPath, places: Mapping[KeyPath, str], path: Path) -> str:
    return next((places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in places), f"{path}:1")


def _broken_rules(study: Study) -> Iterator[tuple[KeyPath, str]]:
    """What the types alone cannot say."""
    objectives = [*study.objectives.maximize, *study.objectives.minimize]
    for figure in dict.fromkeys(figure for figure in objectives if objectives.count(figure) > 1):
        yield ("objectives",), f"found {figure} twice"
    if not objectives:
        yield ("objectives",), "found nothing to maximize or minimize, needs one at least"
    known = ", ".join(study.scales) or "no scale, for the study has none"
    for index, row in enumerate(study.rows):
        for name in row.scales:
            if name not in study.scales:
                near = did_you_mean(name, list(study.scales))
                yield ("rows", index, "scales"), f"found {name!r}, allowed {known}{near}"
        for key, values in row.grid.items():
            if not values:
                yield ("rows", index, "grid", key), "found an empty list, needs a value at least"


def _variants(row: Row) -> Iterator[tuple[str, Changes]]:
    """Each combination of a row's grid, with the name that its row gets."""
    if not row.grid:
        yield row.name, {}
        return
    for values in itertools.product(*row.grid.values()):
        changes = dict(zip(row.grid, values, strict=True))
        label = ",".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in changes.items())
        yield f"{row.name}[{label}]", changes


def _short(value: JsonValue) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _runs(
    study: Study, row: Row, name: str, grid: Changes, scale: str | None, path: Path, overrides: Sequence[str]
) -> Iterator[PlannedRun]:
    """The runs of one row, one for each seed."""
    general = study.scales[scale] if scale is not None else Scale()
    special = row.scales.get(scale, Scale()) if scale is not None else Scale()
    seeds = special.seeds or general.seeds or study.seeds
    changes = [
        f"{key}={json.dumps(value)}"
        for part in (study.set, general.set, row.set, special.set, grid)
        for key, value in part.items()
    ]
    recipe = path.parent / row.recipe
    for seed in seeds:
        texts = (*changes, *overrides, f"seed={seed}")
        yield PlannedRun(name, seed, recipe, texts, load_recipe(recipe, texts).recipe)
