"""What a stage's `target` may name: how each cost is predicted while a stage decides, and how it is measured.

Invariant: what is measured is a network as it will be deployed, or retrained, by the stages that follow in the recipe.
"""

import dataclasses
import hashlib
import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
from torch import Tensor, nn

from compressor import environment
from compressor import recipe as spec
from compressor.context import Assignment, Context, assignment_of
from compressor.export import convert_float_ir
from compressor.latency_model import LatencyModel
from compressor.latency_target import DeploymentBench
from compressor.models.counting import count
from compressor.pruning.steps import Predictor, kept_of
from compressor.quantize_stage import deployed_ir
from compressor.report import Footprint
from compressor.target_search import Cost, Probe, Reading
from compressor.training_memory import RetrainingBench


@dataclass(frozen=True, eq=False)
class Draft:
    """A network that a stage may come to, which never changes, and the stage's edits that lead to it."""

    module: nn.Module
    edits: tuple[dict[str, Any], ...] = ()


class Bench:
    """Measures what networks cost, for one stage; a context. What an instrument needs is made when it is first used.

    Args:
        module: The network that the stage is given; stands for the baseline where nothing came before.
        context: Of the stage.
        assignment: Of the stage.
    """

    def __init__(self, module: nn.Module, context: Context, assignment: Assignment) -> None:
        self.context, self.assignment = context, assignment
        self._baseline = module if assignment.teacher is None else assignment.teacher
        self._open = ExitStack()
        self._readings: weakref.WeakKeyDictionary[Draft, dict[str, Reading]] = weakref.WeakKeyDictionary()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()

    @cached_property
    def deployment(self) -> DeploymentBench:
        """Times and weighs networks as this run will deploy them, beside its baseline."""
        context, dense = self.context, self.context.baseline_data
        where, quantize = self.assignment.quantize or ("", None)
        return self._open.enter_context(
            DeploymentBench(
                convert_float_ir(self._baseline, dense.spec, dense.labels),
                lambda network: deployed_ir(network, quantize, context, where=where),
                np.asarray(context.data.train.images[:8]),
                np.asarray(dense.train.images[:8]),
                context.run_dir,
                context.threads,
            )
        )

    @cached_property
    def retraining(self) -> RetrainingBench:
        """Measures the memory of retraining networks as the next `finetune` would, and the baseline's."""
        return self._open.enter_context(RetrainingBench(self._baseline, self.context, self.assignment))

    def measure(self, name: str, draft: Draft) -> Reading:
        """What a network costs in the unit of this target; asked once."""
        readings = self._readings.setdefault(draft, {})
        if name not in readings:
            how = KINDS[name].measured
            assert how is not None, "arithmetic tells the others"
            readings[name] = how.measure(self, draft)
        return readings[name]


Anchor: TypeAlias = tuple[Draft, Reading]  # a network that was measured


@dataclass(frozen=True)
class Measured:
    """How a cost that only measuring tells is measured and predicted.

    Attributes:
        measure: What a network costs, and the baseline, in the unit of the target.
        predictor: From what channels cost (where that was learned), the largest and the smallest network with what they
            were measured to cost, a function from what is left of a network to its cost, in fractions of the
            baseline's. What it errs by is corrected by measuring.
        noisy: Whether the same network is measured differently another time.
        close: Share of the target that is near enough to stop.
        probes: Networks measured at most, besides those two.
        depends: What decides the measurement besides the network: a stage found by it is not reused under another.
    """

    measure: Callable[[Bench, Draft], Reading]
    predictor: Callable[[Bench, LatencyModel | None, Anchor, Anchor], Predictor]
    noisy: bool
    close: float
    probes: int
    depends: Callable[[Context, Assignment], object]


@dataclass(frozen=True)
class Kind:
    """One kind of target.

    Attributes:
        noun: For people.
        show: A value with its unit.
        measured: How; None where arithmetic tells it of a network before it is made: a figure of `Counts`.
    """

    noun: str
    show: Callable[[float], str]
    measured: Measured | None = None


def _line(proxy: Predictor, example: Tensor, whole: Anchor, smallest: Anchor) -> Predictor:
    """A straight line over `proxy` through two measured networks; level where the smaller one did not cost less."""
    most, least = (proxy(kept_of(draft.module, example)) for draft, _ in (whole, smallest))
    above, below = whole[1].fraction, smallest[1].fraction
    slope = max(above - below, 0.0) / (most - least) if most > least else 0.0
    return lambda kept: below + slope * (proxy(kept) - least)


def _by_parameters(bench: Bench, _: LatencyModel | None, whole: Anchor, smallest: Anchor) -> Predictor:
    """Files grow by so many bytes a parameter."""
    return _line(lambda kept: kept.params, bench.context.example, whole, smallest)


def _by_model(_: Bench, model: LatencyModel | None, __: Anchor, ___: Anchor) -> Predictor:
    assert model is not None, "a stage with a latency target learns what channels cost first"
    return lambda kept: model.latency(kept.widths)


def _by_residents(bench: Bench, _: LatencyModel | None, whole: Anchor, smallest: Anchor) -> Predictor:
    """Training holds some copies of the parameters, and what layers give for a batch."""
    return _line(bench.retraining.residents(whole[0].module), bench.context.example, whole, smallest)


def _deployment(context: Context, assignment: Assignment) -> object:
    quantize = assignment.quantize and assignment.quantize[1].model_dump(mode="json")
    return [environment.cpu_model(), environment.usable_cpus(), context.threads, quantize]


def _retraining(context: Context, assignment: Assignment) -> object:
    finetune = assignment.finetune and assignment.finetune[1].model_dump(mode="json")
    return [context.precision, finetune]


# In the order in which they are measured: what costs least first.
KINDS: Mapping[str, Kind] = {
    "macs": Kind("MACs", "{:,.0f} MACs".format),
    "params": Kind("parameters", "{:,.0f} parameters".format),
    "size_bytes": Kind(
        "size",
        "{:,.0f} bytes of IR".format,
        Measured(
            lambda bench, draft: bench.deployment.weigh(draft.module),
            _by_parameters,
            noisy=False,
            close=0.99,
            probes=5,
            depends=_deployment,
        ),
    ),
    "latency_ms": Kind(
        "latency",
        "{:.3g} ms".format,
        Measured(
            lambda bench, draft: bench.deployment.time(draft.module),
            _by_model,
            noisy=True,
            close=0.97,
            probes=5,
            depends=_deployment,
        ),
    ),
    "train_peak_memory_bytes": Kind(
        "training memory",
        "{:,.0f} bytes of training memory".format,
        Measured(
            lambda bench, draft: bench.retraining.measure(draft.module, draft.edits),
            _by_residents,
            noisy=False,
            close=0.95,
            probes=3,  # each trains a network for some steps
            depends=_retraining,
        ),
    ),
}


def bounds_of(stage: spec.Stage) -> dict[str, spec.Bound]:
    """The targets that a stage names."""
    target: spec.Target | None = getattr(stage, "target", None)
    bounds = {name: getattr(target, name, None) for name in KINDS}
    return {name: bound for name, bound in bounds.items() if bound is not None}


def count_goals(stage: spec.Stage, baseline: Footprint) -> dict[str, int]:
    """The most that may be left, of the targets that arithmetic can tell."""
    return {
        name: int(bound.resolve(getattr(baseline, name)))
        for name, bound in bounds_of(stage).items()
        if KINDS[name].measured is None
    }


def measured_targets(stage: spec.Stage) -> dict[str, Measured]:
    """Those of a stage's targets that only measuring tells."""
    return {name: how for name in bounds_of(stage) if (how := KINDS[name].measured) is not None}


def needs_model(stage: spec.Stage) -> bool:
    """Whether a stage must learn what each channel costs in time."""
    return isinstance(stage, spec.Prune) and (stage.ranking == "latency" or "latency_ms" in bounds_of(stage))


def what_is_measured(stage: spec.Stage) -> list[str]:
    """The costs that a stage measures before it decides."""
    timed = needs_model(stage) or (isinstance(stage, spec.Quantize) and stage.precision == "auto")
    return [name for name in KINDS if name in measured_targets(stage) or (name == "latency_ms" and timed)]


def stage_keys(first: str, stages: Sequence[spec.Stage], contexts: Sequence[Context]) -> list[str]:
    """Keys to reuse finished stages by: `first`, for what all of them depend on, and one after each stage.

    What a stage measures, on one machine say, with so many threads, or at one precision, says nothing about another.
    """
    keys = [first]
    for index, (stage, context) in enumerate(zip(stages, contexts, strict=True)):
        told = assignment_of(stages, index, seed=0, teacher=None, baseline=Footprint(), start=None)
        found = [KINDS[name].measured for name in what_is_measured(stage)]
        under = [how.depends(context, told) for how in found if how is not None]
        keys.append(digest([keys[-1], stage.model_dump(mode="json"), *under]))
    return keys


def digest(value: object) -> str:
    """sha256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def searched_costs(
    stage: spec.Stage, bench: Bench, predict: Mapping[str, Callable[[Draft], float]]
) -> dict[str, Cost[Draft]]:
    """What `meet_targets` must know of those of a stage's targets that only measuring tells."""
    bounds = bounds_of(stage)

    def cost(name: str, how: Measured) -> Cost[Draft]:
        return Cost(
            where=f"{bench.assignment.where}.target.{name}",
            predict=predict.get(name, lambda _: 0.0),
            measure=lambda draft: bench.measure(name, draft),
            confirm=(lambda draft: how.measure(bench, draft)) if how.noisy else None,
            goal=bounds[name].resolve,
            show=KINDS[name].show,
            close=how.close,
            probes=how.probes,
        )

    return {name: cost(name, how) for name, how in measured_targets(stage).items()}


def first_misses(
    stage: spec.Stage,
    draft: Draft,
    example: Tensor,
    baseline: Footprint,
    bench: Bench | None,
    targets: dict[str, Any],
) -> list[str]:
    """What a network still costs too much of, a phrase for each; none: it meets every target of the stage.

    Costs that only measuring tells are asked for when all others are met, and up to the first that is not.

    Args:
        stage: Names the targets.
        draft: The network.
        example: Input for which MACs are counted.
        baseline: What fractions refer to.
        bench: Measures; without it, only what arithmetic tells is looked at.
        targets: What was found is noted here, for the report.
    """
    missed: list[str] = []
    counts, goals = vars(count(draft.module, example)), count_goals(stage, baseline)
    for name, bound in bounds_of(stage).items():
        if name in goals:
            reading, goal = Reading(counts[name], getattr(baseline, name) or counts[name]), float(goals[name])
        elif bench is None or missed:
            continue
        else:
            reading = bench.measure(name, draft)
            goal = bound.resolve(reading.baseline)
        probe = {**dataclasses.asdict(reading), "goal": goal}
        probes = [*targets.get(name, {}).get("probes", []), probe]
        targets[name] = {"asked": bound.plain(), "goal": goal, "measured": reading.measured, "probes": probes}
        if reading.measured > goal:
            missed.append(f"{KINDS[name].show(reading.measured)} ({reading.fraction:.3f}x of the baseline)")
    return missed


def findings(
    stage: spec.Stage, tried: Sequence[Mapping[str, Probe]], counts: Mapping[str, float], goals: Mapping[str, float]
) -> dict[str, Any]:
    """For the report: each target of a stage with what was asked for, predicted and measured.

    Args:
        stage: Names the targets.
        tried: What `meet_targets` measured; the last that met all goals is of the network that was taken.
        counts: What arithmetic tells of that network.
        goals: See `count_goals`.
    """
    taken = next((probes for probes in reversed(tried) if all(probe.met for probe in probes.values())), {})
    found: dict[str, Any] = {}
    for name, bound in bounds_of(stage).items():
        found[name] = {"asked": bound.plain()}
        if name in goals:
            found[name] |= {"goal": goals[name], "measured": counts[name]}
        else:
            probe = taken[name]
            found[name] |= {"goal": probe.goal, "predicted": probe.predicted, "measured": probe.measured}
            found[name]["probes"] = [dataclasses.asdict(probes[name]) for probes in tried]
    return found


def binding(targets: Mapping[str, Mapping[str, Any]]) -> str:
    """The target whose bound is nearest: it decided how much had to go."""
    return max(targets, key=lambda name: float(targets[name]["measured"] / targets[name]["goal"]))
