"""What each channel group of a recipe's network is worth and costs, before anything is pruned: `compress.py inspect`.

Invariant: what was measured once, for this network, data, settings and machine, is remembered in the cache folder, one
figure at a time.
"""

import copy
import functools
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor import environment
from compressor import recipe as spec
from compressor.artifacts import write_json
from compressor.backbone import build_dense, fresh_architecture, input_spec, resolve_input
from compressor.channel_choice import groups_of
from compressor.checkpoint import MODEL_JSON, load_network
from compressor.context import Context
from compressor.data import class_labels
from compressor.data.batches import to_input
from compressor.errors import RecipeError
from compressor.group_figures import RATIOS, Subject, costs, measure_sensitivity, scores, spread
from compressor.inference import evaluate
from compressor.models.custom import Own, identity, own_network
from compressor.pipeline import choose_device, leading_finetunes, read_recipe
from compressor.pruning.coupling import ChannelGroup
from compressor.pruning.importance import IN_UNITS_OF_LOSS, NEEDS_BATCHES, Importance, scaled
from compressor.recipe_loader import load_recipe
from compressor.recipe_rules import STRUCTURAL
from compressor.resolution import load_data
from compressor.run_folder import partial_of
from compressor.strict_yaml import parse_path
from compressor.structure import check_scopes
from compressor.suggestion import suggest

log = logging.getLogger(__name__)


def inspect_recipe(
    path: Path,
    overrides: Sequence[str] = (),
    model: nn.Module | Callable[[int], nn.Module] | None = None,
    *,
    run: Path | None = None,
    sensitivity: bool = False,
) -> dict[str, Any]:
    """Look at the dense network of a recipe with the eyes of its first prune stage.

    Importance is in multiples of a group's mean, which makes groups comparable; `taylor` and `hessian` are in units of
    the loss, and `lamp` is as it is, for these are comparable already. Without `sensitivity`, which takes minutes to
    hours, importances that need images are shown by magnitude.

    Args:
        path: The recipe.
        overrides: `PATH=VALUE` changes to it.
        model: A caller's own network, as in `compress`.
        run: A run, finished or not, whose trained baseline takes the place of the recipe's weights.
        sensitivity: Also measure the accuracy with each group alone pruned by each of `RATIOS`.

    Returns:
        JSON: see `costs`; each of `groups` also has `importance` and `sensitivity` (null where not measured), and there
        are `settings`, `importance`, `unpruned`, `suggestion`, `notes` and, in `cached`, what was not measured anew.

    Raises:
        RecipeError: The recipe or the run is wrong, or accuracy is asked of a head that was never trained.
    """
    environment.prepare_process()
    own = own_network(model) if model is not None else None
    recipe = resolve_input(read_recipe(path, overrides, own)[0], own)
    classes = len(class_labels(recipe.data.source, recipe.data.path))
    torch.manual_seed(recipe.seed)
    module, weights, trained = _network(recipe, own, classes, run)
    if sensitivity and not trained:
        raise RecipeError(
            f"--sensitivity: {weights} have no trained head for these {classes} classes, so accuracy would mean "
            "nothing; give --run with a run that has trained the baseline, or model.weights a file that covers the head"
        )
    data = load_data(recipe, input_spec(recipe, own))
    example = to_input(data.train.images[:1], data.spec, "cpu")
    check_scopes(module, recipe.stages, example)
    at = next((i for i, stage in enumerate(recipe.stages) if isinstance(stage, spec.Prune)), None)
    stage = spec.Prune(pruning_ratio=RATIOS[0]) if at is None else recipe.stages[at]
    assert isinstance(stage, spec.Prune)
    where = "prune" if at is None else f"stages[{at}]"
    quantize = next(((f"stages[{i}]", s) for i, s in enumerate(recipe.stages) if isinstance(s, spec.Quantize)), None)
    shown: Importance = stage.importance
    if shown in NEEDS_BATCHES and not sensitivity:
        shown = "magnitude"
    with tempfile.TemporaryDirectory(prefix="inspect") as room:
        context = Context(example, data, choose_device("auto"), Path(room), threads=recipe.benchmark.threads)
        subject = Subject(module, stage, where, recipe.seed + (at or 0), quantize, context)
        known, before = _measured(subject, shown, sensitivity)
    found, rows = known["costs"], _rows(known, before, shown, sensitivity)
    unpruned = known["unpruned"] if sensitivity else None
    deployed = "int8" if quantize and "int8" in found["layers_ms"] else "fp32"
    suggestion = suggest(
        recipe,
        path,
        _changed_sections(overrides, own),
        prune=stage,
        at=at,
        lead=leading_finetunes(recipe),
        module=module,
        rows=rows,
        unpruned=unpruned["accuracy"] if unpruned else None,
        layers_ms=found["layers_ms"][deployed],
        rest_ms=found["rest_ms"][deployed],
        baseline_ms=found["network"]["ms"]["fp32"],
    )
    return {
        "recipe": str(path),
        "weights": weights,
        "classes": classes,
        "input": list(example.shape[2:]),
        "settings": {"from": where, **_settings(stage)},
        "importance": {"kind": shown, "unit": "the loss" if shown in IN_UNITS_OF_LOSS else "the group's mean"},
        "network": found["network"],
        "unpruned": unpruned,
        "groups": rows,
        "rest": found["rest"],
        "suggestion": suggestion,
        "notes": [*_notes(recipe, at, shown), *found["notes"]],
        "cached": {
            "costs": "costs" in before,
            "importance": shown in before["scores"],
            "unpruned": "unpruned" in before if sensitivity else None,
        },
    }


def _rows(known: dict[str, Any], before: dict[str, Any], shown: Importance, sensitivity: bool) -> list[dict[str, Any]]:
    """Each group's costs with its importance and sensitivity."""
    scores = scaled(_tensors(known, shown), shown, normalise=shown not in IN_UNITS_OF_LOSS)
    rows = []
    for row in known["costs"]["groups"]:
        name, figures = row["name"], None
        if sensitivity and row["prunable"]:
            cached = before["sensitivity"].get(name, {})
            figures = [
                {"ratio": ratio, **known["sensitivity"][name][str(ratio)], "cached": str(ratio) in cached}
                for ratio in RATIOS
            ]
        rows.append({**row, "importance": spread(scores[name]) if row["prunable"] else None, "sensitivity": figures})
    return rows


def _tensors(known: dict[str, Any], kind: str) -> dict[str, Tensor]:
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in known["scores"][kind].items()}


def _changed_sections(overrides: Sequence[str], own: Own | None) -> list[str]:
    """Sections of the recipe, beside `stages`, that are not as in its file; a network given beside it is in none."""
    changed = {parse_path(text.partition("=")[0].strip())[0] for text in overrides}
    return [
        name
        for name in spec.Recipe.model_fields
        if name in changed and name not in ("stages", "version") and not (own and name == "model")
    ]


def _network(recipe: spec.Recipe, own: Own | None, classes: int, run: Path | None) -> tuple[nn.Module, str, bool]:
    """The dense network in evaluation mode, where its weights are from, and whether its head was trained."""
    if run is None:
        dense = build_dense(recipe, classes, own)
        return dense.module.eval(), dense.weights.source, dense.weights.head_loaded
    folder = run if run.is_dir() else partial_of(run)
    if not (folder / "recipe.yaml").is_file():
        raise RecipeError(f"--run {run}: not the folder of a run; give RUN or RUN.partial of a run that has trained")
    lead = leading_finetunes(load_recipe(folder / "recipe.yaml").recipe)
    stage = folder / "stages" / f"{lead - 1:02d}-finetune"
    if not lead or not (stage / MODEL_JSON).is_file():
        why = f"stages[{lead - 1}] is not finished" if lead else "its recipe begins with no finetune"
        raise RecipeError(f"--run {run}: has trained no baseline: {why}")
    size = input_spec(recipe, own)
    asked = {
        "source": recipe.model.source,
        "name": recipe.model.name or "custom",
        "args": dict(recipe.model.args),
        "num_classes": classes,
        "input": [3, size.height, size.width],
    }
    network = load_network(stage, fresh_architecture(own, classes, (size.height, size.width), recipe.seed))
    there = {**network.architecture, "input": list(network.input)}
    for key, value in asked.items():
        if there.get(key) != value:
            raise RecipeError(f"--run {run}: its network has {key} {there.get(key)!r}, the recipe's {value!r}")
    return network.module.eval(), str(stage), True


def _measured(subject: Subject, shown: Importance, sensitivity: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything asked for, by part, and what of it had been measured before."""
    file, key = _place(subject)
    known = _remembered(file)
    before = copy.deepcopy(known)

    def keep() -> None:
        write_json(file, {"sha256": _digest(known), "known": known, "of": key})

    @functools.cache
    def groups() -> list[ChannelGroup]:
        return groups_of(subject.module, subject.context.example, subject.stage, subject.where)

    if "costs" not in known:
        known["costs"] = costs(subject, groups())
        keep()
    if shown not in known["scores"]:
        known["scores"][shown] = scores(subject, groups(), shown)
        keep()
    if sensitivity:
        context = subject.context
        if "unpruned" not in known:
            accuracy, loss = evaluate(subject.module, context.data.val, context.data.spec, device=context.device)
            known["unpruned"] = {"accuracy": accuracy, "loss": loss}
            keep()
        names = [row["name"] for row in known["costs"]["groups"] if row["prunable"]]
        if any(str(ratio) not in known["sensitivity"].get(name, {}) for name in names for ratio in RATIOS):
            ranked = scaled(_tensors(known, shown), shown)
            measure_sensitivity(subject, groups(), ranked, known["sensitivity"], keep)
    return known, before


def _place(subject: Subject) -> tuple[Path, dict[str, Any]]:
    """The file that holds what was measured under the same conditions, and these."""
    context = subject.context
    key = {
        "code": environment.code_digest(),
        "network": identity(subject.module),
        "data": context.data.fingerprint,
        "prune": _settings(subject.stage),
        "quantize": subject.quantize and subject.quantize[1].model_dump(mode="json"),
        "seed": subject.seed,
        "versions": environment.versions(),
        "cpu": environment.cpu_model(),
        "isa": sorted(environment.cpu_flags() & {*environment.BF16_FEATURES, *environment.INT8_FEATURES}),
        "cpus": environment.usable_cpus(),
        "threads": [context.threads, torch.get_num_threads()],
        "device": context.device,
    }
    return environment.cache_dir() / "inspect" / f"{_digest(key)}.json", key


def _remembered(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
        if content["sha256"] == _digest(content["known"]):
            return dict(content["known"])
    except (OSError, ValueError, KeyError, TypeError):  # never measured here, or damaged: measured again
        pass
    return {"scores": {}, "sensitivity": {}}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _settings(stage: spec.Prune) -> dict[str, Any]:
    """What of a prune stage decides the figures."""
    names = {
        "importance",
        "importance_batches",
        "round_to",
        "min_channels",
        "ignored_scope",
        "reconstruction_images",
        "bn_batches",
    }
    return stage.model_dump(mode="json", include=names)


def _notes(recipe: spec.Recipe, at: int | None, shown: str) -> list[str]:
    notes = []
    if at is None:
        notes.append("the recipe has no prune stage: what is shown is what one with default settings would see")
        return notes
    stage = recipe.stages[at]
    earlier = [f"stages[{i}] {s.type}" for i, s in enumerate(recipe.stages[:at]) if s.type in STRUCTURAL]
    if earlier:
        notes.append(f"what is shown is the dense network, before {', '.join(earlier)}")
    if isinstance(stage, spec.Prune) and shown != stage.importance:
        notes.append(
            f"importance is shown by {shown}: {stage.importance} needs passes over training images, for which "
            "--sensitivity takes the time"
        )
    return notes
