"""Targets and budgets: numbers in a key's own unit, or fractions of what the baseline measures.

Invariant: a bound is positive and finite, and prints the way a recipe writes it.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, WithJsonSchema

from compressor.errors import RecipeError

# CONTRACT: met is <= 1.00x for counts, <= 1.10x for latency, the one noisy figure; far below a latency is overshoot.
LATENCY_TOLERANCE, OVERSHOOT = 1.10, 0.85
LOWER_BOUNDS = ("accuracy", "throughput_fps")
_PATTERN = r"^([0-9]+\.?[0-9]*|\.[0-9]+)x$"
_FRACTION = re.compile(_PATTERN)
# One model configuration for the whole tree: unknown keys and wrong types are errors, NaN and infinity are no numbers.
STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Bound:
    """A number in the key's own unit, or (`relative`) a fraction of the baseline's measurement."""

    value: float
    relative: bool = False

    def resolve(self, baseline: float | None) -> float:
        """Return the bound in the key's own unit.

        Raises:
            RecipeError: The bound is relative and the baseline was not measured.
        """
        if not self.relative:
            return self.value
        if baseline is None:
            raise RecipeError(f"found {self}, a fraction of a baseline that was not measured; give an absolute number")
        return self.value * baseline

    def plain(self) -> int | float | str:
        """Return the bound as a recipe writes it."""
        number = int(self.value) if self.value.is_integer() else self.value
        return f"{Decimal(repr(number)):f}x" if self.relative else number  # never 1e-05x, which no bound reads

    def __str__(self) -> str:
        return str(self.plain())


def _parse(value: object, *, largest: float = math.inf, largest_fraction: float = math.inf) -> Bound:
    if isinstance(value, Bound):
        bound = value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        bound = Bound(float(value))
    elif isinstance(value, str) and (match := _FRACTION.fullmatch(value)):
        bound = Bound(float(match[1]), relative=True)
    else:
        raise ValueError("not a bound")
    limit = largest_fraction if bound.relative else largest
    if not 0 < bound.value <= limit or math.isinf(bound.value):
        raise ValueError("out of range")
    return bound


def parse_bound(value: object) -> Bound:
    """Read `4.5e8` or `"0.4x"`.

    Raises:
        ValueError: Anything else, or a number that is not positive and finite.
    """
    return _parse(value)


def _parse_reduction(value: object) -> Bound:
    return _parse(value, largest_fraction=1)


def _parse_accuracy(value: object) -> Bound:
    return _parse(value, largest=1)


def _schema(number: dict[str, float], fraction: str) -> WithJsonSchema:
    return WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, **number},
                {"type": "string", "pattern": _PATTERN, "description": fraction},
            ]
        }
    )


_FRACTION_TEXT = "a fraction of the baseline such as 0.4x"
_WRITE = PlainSerializer(Bound.plain)
AnyBound = Annotated[Bound, PlainValidator(parse_bound), _WRITE, _schema({}, _FRACTION_TEXT)]
# What pruning aims at: a fraction above 1x would ask it to grow the network.
ReductionBound = Annotated[
    Bound, PlainValidator(_parse_reduction), _WRITE, _schema({}, f"{_FRACTION_TEXT} (at most 1x)")
]
# Both read every fraction all the same: the rules between keys refuse those that nothing can meet, and say why.
AbsoluteBound = Annotated[
    Bound, PlainValidator(parse_bound), _WRITE, WithJsonSchema({"type": "number", "exclusiveMinimum": 0})
]
TrainingBound = Annotated[
    Bound,
    PlainValidator(parse_bound),
    _WRITE,
    _schema({}, "a fraction of a trained baseline's such as 3x (at least 1x)"),
]
AccuracyBound = Annotated[Bound, PlainValidator(_parse_accuracy), _WRITE, _schema({"maximum": 1}, _FRACTION_TEXT)]


def _latency(what: str) -> Any:
    return _upper(what, f", or a fraction of the baseline's such as 0.2x; met up to {LATENCY_TOLERANCE:.2f} times it")


def _upper(what: str, fraction: str = ", or a fraction of the baseline's such as 0.5x") -> Any:
    return Field(default=None, description=f"Largest allowed {what}: a number{fraction}.")


def _training(what: str) -> Any:
    return _upper(what, ", or a fraction of a trained baseline's, which it includes, such as 3x (at least 1x)")


def _retraining(what: str) -> Any:
    return _upper(f"{what} of retraining the slim network, in bytes", "; the baseline is not retrained")


class Budget(BaseModel):
    """What the result must meet; a miss fails the run after the report is written."""

    model_config = STRICT

    params: AnyBound | None = _upper("number of parameters")
    macs: AnyBound | None = _upper("number of multiply-accumulates for one sample")
    size_bytes: AnyBound | None = _upper("size of the IR (.xml and .bin) in bytes")
    latency_ms: AnyBound | None = _latency("median latency of one request in ms at the network's input size")
    latency_p95_ms: AnyBound | None = _latency("95th percentile of the latency in ms")
    latency_default_ms: AnyBound | None = _latency("median latency in ms at OpenVINO's default precision")
    latency_native_ms: AnyBound | None = _latency("median latency in ms for images of the data set's median size")
    throughput_fps: AnyBound | None = Field(
        default=None,
        description="Smallest allowed images a second, requests asynchronous; 3x = three times the baseline's.",
    )
    accuracy: AccuracyBound | None = Field(
        default=None,
        description="Smallest allowed top-1 test accuracy as a fraction 0..1, or of the baseline's such as 0.98x.",
    )
    accuracy_drop: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Largest allowed baseline accuracy minus result accuracy; 0.03 = three points.",
    )
    train_time_s: TrainingBound | None = _training("training time of all stages in seconds")
    train_avg_memory_bytes: AnyBound | None = _upper("time-weighted mean resident memory of training, in bytes")
    train_peak_memory_bytes: TrainingBound | None = _training("peak resident memory of training, in bytes")
    retrain_avg_memory_bytes: AbsoluteBound | None = _retraining("mean resident memory")
    retrain_peak_memory_bytes: AbsoluteBound | None = _retraining("peak resident memory")

    def bounds(self) -> dict[str, Bound]:
        """Return the bounds that are set, by footprint name (`accuracy_drop` apart)."""
        return {name: value for name, value in self if isinstance(value, Bound)}

    def violations(self, result: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
        """Compare footprints (by name; None = not measured) with the budget: one sentence for each missed bound."""
        missed = []
        for name, bound in self.bounds().items():
            measured, reference = result.get(name), baseline.get(name)
            if measured is None or (bound.relative and reference is None):
                whose = "result" if measured is None else "baseline"
                missed.append(f"budget.{name}: bound {bound}, but the {whose}'s was not measured")
                continue
            limit = bound.resolve(reference)
            tolerance = LATENCY_TOLERANCE if name.startswith("latency") else 1.0
            if measured < limit - 1e-9 if name in LOWER_BOUNDS else measured > limit * tolerance:
                relation = "below" if name in LOWER_BOUNDS else "above"
                missed.append(f"budget.{name}: measured {measured:.6g}, {relation} the bound of {_show(bound, limit)}")
        if self.accuracy_drop is not None:
            accuracies = result.get("accuracy"), baseline.get("accuracy")
            if accuracies[0] is None or accuracies[1] is None:
                missed.append(f"budget.accuracy_drop: bound {self.accuracy_drop}, but an accuracy was not measured")
            elif (drop := accuracies[1] - accuracies[0]) > self.accuracy_drop + 1e-9:  # 0.95 - 0.92 > 0.03 in floats
                missed.append(f"budget.accuracy_drop: measured {drop:.4f}, above the bound of {self.accuracy_drop}")
        return missed

    def overshoots(self, result: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
        """Return a sentence for each latency bound that is met with much to spare: more was given up than asked for."""
        spared = []
        for name, bound in self.bounds().items():
            measured, reference = result.get(name), baseline.get(name)
            if not name.startswith("latency") or measured is None or (bound.relative and reference is None):
                continue
            limit = bound.resolve(reference)
            if measured < OVERSHOOT * limit:
                spared.append(
                    f"budget.{name}: measured {measured:.4g}, {measured / limit:.2f}x of the bound of "
                    f"{_show(bound, limit)}: more was given up than needed"
                )
        return spared


def _show(bound: Bound, limit: float) -> str:
    return f"{limit:.6g} ({bound})" if bound.relative else f"{limit:.6g}"
