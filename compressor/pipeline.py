"""The one verb: `compress(recipe) -> Report`.

Invariant: work happens in `RUN.partial/`; `RUN` appears by one rename, after its manifest is written, or not at all.
"""

import copy
import dataclasses
import functools
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor import environment
from compressor.backbone import build_dense, input_spec, resolve_input
from compressor.checkpoint import Network, load_network, save_network
from compressor.clock import Clock
from compressor.context import Context, Work, assignment_of
from compressor.data import Dataset
from compressor.data.batches import to_input
from compressor.errors import RecipeError, ResourceError, TrainingError
from compressor.export import check_exportable
from compressor.inference import frozen_copy
from compressor.measurement import Networks
from compressor.models import zoo
from compressor.models.counting import count
from compressor.models.custom import Own, own_network
from compressor.models.weights import WeightsReport
from compressor.pages.files import write_run_files
from compressor.precision import TrainingPrecision, faster_precision
from compressor.proof import prove
from compressor.recipe import DropBlocks, Finetune, ModelSection, Quantize, Recipe, Stage, custom_model
from compressor.recipe_loader import load_recipe
from compressor.recipe_stages import trainings_of
from compressor.report import Footprint, Report, write_report
from compressor.resolution import contexts_of, load_data, sizes_of
from compressor.resume_points import keep_point, last_point, point_of
from compressor.run_folder import (
    fresh_run_dir,
    keep_stage,
    log_file,
    open_partial,
    publish,
    remember_stage,
    stage_is_ready,
)
from compressor.simulation import check_targets
from compressor.stage_targets import digest, stage_keys
from compressor.stages import not_finite, run_stage
from compressor.structure import check_scopes

log = logging.getLogger(__name__)


@dataclass
class _Run:
    """The state of one execution: networks worth keeping and the records of the stages so far."""

    recipe: Recipe
    partial: Path
    context: Context  # of the baseline
    contexts: list[Context]  # of each stage
    weights: WeightsReport
    precision: TrainingPrecision
    clock: Clock
    identity: str | None = None  # of a network the toolkit did not build itself
    dense: nn.Module | None = None  # that network before any edit, to rebuild finished stages on
    records: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compress(
    recipe: str | Path | Recipe,
    run_dir: str | Path | None = None,
    *,
    model: nn.Module | Callable[[int], nn.Module] | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    force: bool = False,
    device: str = "auto",
) -> Report:
    """Run a recipe from data to verified artifacts.

    Args:
        recipe: path of a YAML recipe, or a validated `Recipe`.
        run_dir: folder to create; default a fresh one under `runs/`.
        model: the caller's own network in place of the recipe's `model.source` and `model.name`: a module, which is
            copied and whose head is replaced if it has another number of classes, or a function that takes the number
            of classes and returns a module. A weights file named in the recipe is loaded into it.
        overrides: `PATH=VALUE` changes to the recipe, as `--set` on the command line.
        resume: continue `RUN.partial/` from its last finished stage.
        force: replace an existing run folder; the old one stays until the new one is complete.
        device: `auto`, `cpu` or `cuda`, for training only; measurements are OpenVINO's on the CPU.

    Returns:
        The report, also when a gate or a budget was missed (`report.passed` is then False).

    Raises:
        CompressorError: anything else that prevented a run; finished stages stay in `RUN.partial/`.
    """
    environment.prepare_process()
    own = own_network(model) if model is not None else None
    tree, name = read_recipe(recipe, overrides, own)
    tree = resolve_input(tree, own)
    run = Path(run_dir) if run_dir else fresh_run_dir(name)
    if run.name in ("", ".."):
        run = run.resolve()
    with open_partial(run, tree, resume=resume, force=force) as partial, log_file(partial / "run.log"):
        clock = Clock()
        state, network = _prepare(tree, partial, choose_device(device), clock, own)
        networks = _run_stages(state, network)
        report = prove(
            state.contexts[-1],
            tree,
            networks,
            records=state.records,
            precision=dataclasses.asdict(state.precision),
            clock=clock,
            weights=dataclasses.asdict(state.weights),
            notes=state.notes,
        )
        write_report(partial / "report.json", report)
        write_run_files(partial, report, run.resolve().name)
        publish(partial, run, state.records, force=force)
    return report


def read_recipe(recipe: str | Path | Recipe, overrides: Sequence[str], own: Own | None) -> tuple[Recipe, str]:
    """The validated recipe and a name for its runs; a caller's own network takes the place of the recipe's."""
    if isinstance(recipe, Recipe):
        if overrides:
            raise RecipeError("overrides need a recipe file; change the Recipe itself instead")
        if own is not None:
            section = ModelSection.model_validate(custom_model(own.name, recipe.model.model_dump()))
            recipe = recipe.model_copy(update={"model": section})
        tree, name = recipe, "recipe"
    else:
        tree = load_recipe(Path(recipe), overrides, own_model=own.name if own else None).recipe
        name = Path(recipe).stem
    if own is None and tree.model.source == "custom":
        raise RecipeError(
            "model.source: found 'custom', and no network; give one with --factory package.module:function or "
            "compress(..., model=...), or name one of source builtin, timm, torchvision or plugin"
        )
    return tree, name


def _prepare(recipe: Recipe, partial: Path, device: str, clock: Clock, own: Own | None) -> tuple[_Run, Network]:
    """Load data and weights: everything that can be found wrong before a stage starts."""
    with clock("prepare"):
        spec = input_spec(recipe)
        data = load_data(recipe, spec)
        torch.manual_seed(recipe.seed)
        dense = build_dense(recipe, len(data.labels), own)
        module, weights = dense.module, dense.weights
        if not leading_finetunes(recipe) and not weights.head_loaded:
            _refuse_untrained_baseline(recipe, weights)
        example = to_input(data.train.images[:1], spec, "cpu")
        check_scopes(module, recipe.stages, example)
        sizes_of(recipe.stages, (spec.height, spec.width))  # what is wrong with them is known before it is worked with
        if dense.architecture["source"] != "builtin":
            check_exportable(module, spec)
    with clock("training precision"):
        precision = _training_precision(
            recipe, module, {**dense.architecture, "identity": dense.identity}, data, device
        )
    context = Context(
        example, data, device, partial, precision.chosen, recipe.benchmark.threads, pretrained=weights.loaded > 0
    )
    with clock("prepare"):
        contexts = contexts_of(recipe.stages, context, functools.partial(load_data, recipe, like=data))
    with clock("reachability"):
        network = Network(module, dense.architecture, (), None, (3, spec.height, spec.width))
        check_targets(network, recipe.stages, context.example, contexts, recipe.seed)
    state = _Run(recipe, partial, context, contexts, weights, precision, clock, dense.identity)
    if own is not None:
        state.dense = copy.deepcopy(module)
    imported = zoo.import_note(recipe.model.source)
    state.notes += [*data.notes, *weights.notes, *([imported] if imported else [])]
    return state, network


def _training_precision(
    recipe: Recipe, module: nn.Module, architecture: Mapping[str, Any], data: Dataset, device: str
) -> TrainingPrecision:
    """What `precision: auto` means in this run: measured for the dense network with the first training's batch."""
    trainings = [options for stage in recipe.stages for _, options in trainings_of(stage)]
    if not any(training.precision == "auto" for training in trainings):
        return TrainingPrecision("auto")
    batch = to_input(data.train.images[: trainings[0].batch_size], data.spec, "cpu")
    return faster_precision(module, batch, device=device, identity=architecture)


def leading_finetunes(recipe: Recipe) -> int:
    """Number of stages that train the baseline."""
    return next((i for i, stage in enumerate(recipe.stages) if not isinstance(stage, Finetune)), len(recipe.stages))


def _refuse_untrained_baseline(recipe: Recipe, weights: WeightsReport) -> None:
    """What only loading the weights tells: their head does not fit the data, so there is nothing to compare with."""
    wanted = [f"stages[{i}]" for i, stage in enumerate(recipe.stages) if _needs_teacher(stage)]
    budget = recipe.budget
    wanted += ["budget.accuracy_drop"] if budget.accuracy_drop is not None else []
    wanted += ["budget.accuracy"] if budget.accuracy is not None and budget.accuracy.relative else []
    if wanted:
        raise RecipeError(
            f"{', '.join(wanted)}: needs a trained baseline, but {weights.source} has no head for these classes; "
            "begin `stages` with a finetune"
        )


def _needs_teacher(stage: Stage) -> bool:
    judged = isinstance(stage, DropBlocks) and stage.metric == "distill_loss"
    return judged or any(options.distill is not None for _, options in trainings_of(stage))


def choose_device(asked: str) -> str:
    """Where to train: what is asked for, or with `auto` CUDA where there is one.

    Raises:
        RecipeError, ResourceError: There is no such device.
    """
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise ResourceError("--device cuda: torch finds no CUDA device; use --device cpu")
    if asked not in ("cpu", "cuda"):
        raise RecipeError(f"--device: found '{asked}', allowed: auto, cpu, cuda")
    return asked


def _first_key(state: _Run) -> str:
    """What the first stage depends on: model, weights, data with its preprocessing, seed, code, versions, processor."""
    context = state.context
    return digest(
        {
            "code": environment.code_digest(),
            "model": state.recipe.model.model_dump(mode="json"),
            "identity": state.identity,
            "weights": state.weights.sha256,
            "data": context.data.fingerprint,
            "seed": state.recipe.seed,
            "versions": environment.versions(),
            "device": context.device,
            "precision": context.precision,
            # What `overflow_fix: auto` looks at.
            "isa": sorted(environment.cpu_flags() & {*environment.INT8_FEATURES, *environment.BF16_FEATURES}),
        }
    )


def _run_stages(state: _Run, network: Network) -> Networks:
    """Run every stage, or take it from this run's folder or an earlier run's; keep the networks that get measured."""
    stages = state.recipe.stages
    lead = leading_finetunes(state.recipe)
    quantize_at = next((i for i, stage in enumerate(stages) if isinstance(stage, Quantize)), None)
    keys = stage_keys(_first_key(state), stages, state.contexts)
    ready = 0
    while ready < len(stages) and stage_is_ready(_stage_folder(state, ready), keys[ready + 1]):
        ready += 1
    kept: dict[str, Network] = {}
    teacher: nn.Module | None = None
    baseline = Footprint()
    for i in range(len(stages) + 1):
        if i == lead:
            kept["baseline"] = dataclasses.replace(network, module=frozen_copy(network.module))
            teacher = kept["baseline"].module
            counts = count(teacher, state.context.example)
            baseline = Footprint(params=counts.params, macs=counts.macs)
        if i == quantize_at:
            kept["floating"] = dataclasses.replace(network, module=frozen_copy(network.module))
        if i == len(stages):
            break
        folder = _stage_folder(state, i)
        if i < ready:
            state.records.append({**json.loads((folder / "footprint.json").read_text()), "reused": True})
            if i + 1 in (ready, lead, quantize_at):
                network = _load_stage(state, folder)
            log.info("stage %d/%d %s: reused", i + 1, len(stages), stages[i].type)
            continue
        told = f"stage {i + 1}/{len(stages)} {stages[i].type}"
        log.info("%s", told, extra={"stage": told})
        network = _run_one(state, i, network, keys[i + 1], teacher, baseline)
    final = dataclasses.replace(network, module=frozen_copy(network.module))
    quantized = final.quantizer is not None  # a quantize stage may have found that float is faster
    return Networks(
        baseline=kept["baseline"],
        baseline_trained=lead > 0 or state.weights.head_loaded,
        lead=lead,
        floating=kept["floating"] if quantized else final,
        quantized=final if quantized else None,
    )


def _run_one(
    state: _Run, index: int, network: Network, key: str, teacher: nn.Module | None, baseline: Footprint
) -> Network:
    """Run one stage and keep what came out."""
    stages, seed = state.recipe.stages, state.recipe.seed + index
    stage = stages[index]
    assignment = assignment_of(stages, index, seed=seed, teacher=teacher, baseline=baseline, start=network)
    folder, start = _stage_folder(state, index), network
    point = point_of(folder)
    network, work = last_point(point, key, start, copy.deepcopy(state.dense)) or (start, Work({}, [], []))
    if work.reached:
        log.info("stage %d/%d %s goes on where it was cut off", index + 1, len(stages), stage.type)

    def keep(module: nn.Module) -> None:
        keep_point(point, key, dataclasses.replace(start, module=module, edits=(*start.edits, *work.edits)), work)

    work.keep = keep
    name = f"stages[{index}] {stage.type}"
    try:
        with state.clock(name):
            outcome = run_stage(stage, network, state.contexts[index], assignment, work)
    except TrainingError as error:
        if not_finite(network.module):
            raise
        save_network(state.partial / "last_good", dataclasses.replace(network, edits=(*network.edits, *work.edits)))
        raise TrainingError(f"stages[{index}]: {error} (in {state.partial / 'last_good'})") from error
    seconds = state.clock.seconds[name]
    record = {
        "index": index,
        "type": stage.type,
        "key": key,
        "seconds": seconds,
        "footprint": outcome.footprint.to_json(),
        "details": outcome.details,
        "notes": list(outcome.notes),
    }
    for note in outcome.notes:
        log.warning("stages[%d]: %s", index, note)
    with state.clock("keep stages"):
        record = keep_stage(folder, outcome.network, outcome.plans, record)
        shutil.rmtree(point, ignore_errors=True)
        remember_stage(folder, key)
        state.records.append({**record, "reused": False})
        accuracy = outcome.footprint.val_accuracy or 0.0
        log.info("stage %d done in %.0f s: %.4f validation accuracy", index + 1, seconds, accuracy)
        # Read back, so that a resumed run goes on from the very same, to the order of its parameters.
        return _load_stage(state, folder)


def _load_stage(state: _Run, folder: Path) -> Network:
    return load_network(folder, copy.deepcopy(state.dense))


def _stage_folder(state: _Run, index: int) -> Path:
    return state.partial / "stages" / f"{index:02d}-{state.recipe.stages[index].type}"
