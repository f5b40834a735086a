"""Which layers are worth quantizing: INT8 where it pays in time, float where it gains nothing or costs accuracy.

Invariant: what is chosen was exported and timed, and took no longer than the faster of the network all in INT8 and the
network all in float.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from compressor.data import Split
from compressor.errors import RecipeError
from compressor.inference import evaluate
from compressor.latency_target import DeploymentBench
from compressor.preprocess import InputSpec
from compressor.pruning.blocks import find_blocks
from compressor.quantizer_switch import layers_served, only_quantized, quantized_layers, weight_layers
from compressor.target_search import Reading

LOSS_TOLERANCE = 0.01  # validation cross-entropy above float's that is no reason to leave anything in float
PROBES = 6  # networks timed at most for the sake of time, and as many for the sake of accuracy
NOISE = 0.03  # of a latency: what two measurements of one network may differ by
_FEW = 4  # layers directly in one module that count as one block
_SMALLEST_MS = 1e-3  # what a layer costs at least, so that nothing is divided by zero


@dataclass(frozen=True)
class Block:
    """Layers that go to INT8 or to float together; `scope` names the modules to leave out of quantization for that."""

    name: str
    layers: frozenset[str]
    scope: tuple[str, ...]


@dataclass(frozen=True)
class Validated:
    """Top-1 accuracy and mean cross-entropy on validation images."""

    accuracy: float
    loss: float


@dataclass(frozen=True)
class Part:
    """What is known about a block, or about one layer `inside` a block that costs accuracy.

    `only` is the network with nothing else quantized, `all_but` the one with everything else quantized: the sensitivity
    analysis of arXiv 2004.09602.
    """

    name: str
    layers: frozenset[str]
    float_ms: float | None  # None: no operation of the compiled network bears the name of these layers
    int8_ms: float | None
    only: Validated
    all_but: Validated
    inside: str | None = None

    @property
    def gained_ms(self) -> float | None:
        """What INT8 saves."""
        return None if self.float_ms is None or self.int8_ms is None else self.float_ms - self.int8_ms


@dataclass(frozen=True)
class Tried:
    """A network that was exported and timed beside the float one, and what it does on validation."""

    in_float: frozenset[str]
    timed: Reading
    validated: Validated


@dataclass(frozen=True)
class Choice:
    """The network chosen, and all that were tried: the one all in INT8 first, the one all in float second."""

    chosen: Tried
    tried: tuple[Tried, ...]
    tolerance: float

    @property
    def accurate(self) -> bool:
        """Whether the choice is as accurate as float, within the tolerance."""
        return self.chosen.validated.loss <= self.tried[1].validated.loss + self.tolerance


def partition(module: nn.Module, example: Tensor, layers: Collection[str]) -> list[Block]:
    """Divide layers into blocks: every layer is in one.

    A block is a residual block, or another module of such a one's class (the first of a stage, which changes shapes);
    of what is left, the layers directly in one module, if they are few; else a layer alone. Depthwise convolutions of a
    long chain go with the layer after them.

    Args:
        module: Network.
        example: Input `(N, C, H, W)`.
        layers: Names of its convolutions and linear layers that are to be divided.
    """
    ordered = [name for name in weight_layers(module) if name in set(layers)]
    modules = dict(module.named_modules())
    residual = find_blocks(module, example)
    containers = {nn.Sequential, nn.ModuleList, nn.ModuleDict, type(module)}
    classes = {type(modules[name]) for name in residual} - containers
    alike = [name for name, part in modules.items() if name and (name in residual or type(part) in classes)]
    outermost = [name for name in alike if not any(name.startswith(f"{other}.") for other in alike)]
    groups: dict[str, list[str]] = {}
    pending: str | None = None  # a depthwise convolution of a long chain, waiting for what reads it
    for name in ordered:
        parent = name.rpartition(".")[0]
        block = next((outer for outer in outermost if name == outer or name.startswith(f"{outer}.")), None)
        beside = [other for other in ordered if other.rpartition(".")[0] == parent]
        if block is None and parent and len(beside) <= _FEW:
            block = parent
        if block is None:
            block = pending if pending is not None and pending.rpartition(".")[0] == parent else name
            layer = modules[name]
            pending = name if isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels else None
        groups.setdefault(block, []).append(name)
    everything = weight_layers(module)
    blocks = []
    for name, inside in groups.items():
        whole = {layer for layer in everything if layer == name or layer.startswith(f"{name}.")} == set(inside)
        blocks.append(Block(name, frozenset(inside), (name,) if whole else tuple(inside)))
    return blocks


def scopes_of(blocks: Iterable[Block], in_float: Collection[str]) -> list[str]:
    """Names of the modules to leave out of quantization, so that these layers stay in float."""
    left = set(in_float)
    found: list[str] = []
    for block in blocks:
        found += block.scope if block.layers <= left else sorted(block.layers & left)
    return found


def decide(
    parts: Sequence[Part],
    measure: Callable[[frozenset[str]], Reading],
    validate: Callable[[frozenset[str]], Validated],
    *,
    tolerance: float,
    probes: int,
) -> Choice:
    """Choose the layers that stay in float.

    Starting all in INT8, blocks that gain nothing go to float, all together, or where that is slower, in halves. Then,
    while validation is worse than float's by more than the tolerance, the block or layer that saves most loss for the
    time it costs goes there, if the network does not become slower than the better of all INT8 and all float. The
    fastest of the networks that were tried and are accurate enough is taken, and timed once more.

    Args:
        parts: All blocks, and layers inside some.
        measure: Times the network with these layers in float; the baseline is the network all in float.
        validate: What that network does on validation.
        tolerance: Cross-entropy above float's that is accepted.
        probes: Networks measured at most for time, and as many for accuracy.
    """
    everything = frozenset(layer for part in parts for layer in part.layers)
    tried: dict[frozenset[str], Tried] = {}

    def attempt(in_float: frozenset[str]) -> Tried:
        if in_float not in tried:
            tried[in_float] = Tried(in_float, measure(in_float), validate(in_float))
        return tried[in_float]

    int8, floating = attempt(frozenset()), attempt(everything)
    limit = min(int8.timed.fraction, floating.timed.fraction)
    goal = floating.validated.loss + tolerance
    now, most = int8, len(tried) + probes
    gains = [(p.gained_ms, p) for p in parts if p.inside is None and p.gained_ms is not None]
    gainless = [part for gained, part in sorted(gains, key=lambda pair: pair[0]) if gained <= 0]
    waiting = [gainless] if gainless else []
    while waiting and len(tried) < most:
        group = waiting.pop(0)
        found = attempt(now.in_float.union(*(part.layers for part in group)))
        if found.timed.fraction <= now.timed.fraction:
            now = found
        elif len(group) > 1:
            half = (len(group) + 1) // 2
            waiting += [group[:half], group[half:]]
    most, refused = len(tried) + probes, set[str]()
    while now.validated.loss > goal and len(tried) < most:
        saved = {part.name: int8.validated.loss - part.all_but.loss for part in parts}
        rest = [p for p in parts if p.name not in refused and saved[p.name] > 0 and not p.layers <= now.in_float]
        if not rest:
            break
        part = max(rest, key=lambda p: saved[p.name] / max(p.gained_ms or 0.0, _SMALLEST_MS))
        found = attempt(now.in_float | part.layers)
        if found.timed.fraction <= limit and found.validated.loss < now.validated.loss:
            now = found
        else:
            refused.add(part.name)
    quick = [found for found in tried.values() if found.timed.fraction <= limit]
    good = sorted((q for q in quick if q.validated.loss <= goal), key=lambda q: q.timed.fraction)
    order = good + sorted((q for q in quick if q not in good), key=lambda q: (q.validated.loss, q.timed.fraction))
    # The fastest of several may have been lucky; the two that the others are compared with need no second look.
    chosen = next(
        found for found in order if found in (int8, floating) or measure(found.in_float).fraction <= limit * (1 + NOISE)
    )
    return Choice(chosen, tuple(tried.values()), tolerance)


def choose_layers(
    floating: nn.Module,
    quantized: nn.Module,
    requantized: Callable[[Sequence[str]], nn.Module],
    bench: DeploymentBench,
    split: Split,
    spec: InputSpec,
    example: Tensor,
    *,
    device: str = "cpu",
) -> tuple[list[Block], Choice, dict[str, Any]]:
    """Measure what INT8 gains and costs in every block, and choose what stays in float.

    Args:
        floating: The network that was quantized, BatchNorm folded.
        quantized: All of it that may be, in INT8; the same after as before.
        requantized: The network quantized without these modules, to be timed.
        bench: Times networks beside the float one at OpenVINO's default precision; takes `floating` too.
        split: Validation images to judge by.
        spec: Their preprocessing.
        example: Input `(N, C, H, W)`.
        device: Where validation runs.

    Returns:
        The blocks, the choice, and both as JSON.

    Raises:
        RecipeError: Nothing in `quantized` is quantized.
    """
    served = layers_served(quantized, floating, example)
    layers = quantized_layers(served, floating)
    if not layers:
        raise RecipeError("ignored_scope: leaves no layer to quantize; precision auto needs some to choose from")
    blocks = partition(floating, example, layers)

    @functools.cache
    def validate(in_float: frozenset[str]) -> Validated:
        with only_quantized(quantized, floating, layers - in_float, served) as network:
            return Validated(*evaluate(network, split, spec, device=device))

    whole = bench.time(quantized)

    def measure(in_float: frozenset[str]) -> Reading:
        if in_float == layers:
            return Reading(whole.baseline, whole.baseline)
        return bench.time(requantized(scopes_of(blocks, in_float))) if in_float else whole

    shares = bench.shares_of_layers({"float": floating, "int8": quantized}, layers)

    def spent(kind: str, latency_ms: float, own: Collection[str]) -> float | None:
        """Counters cost time themselves: the shares are theirs, the milliseconds those of the networks."""
        seen = [shares[kind][layer] for layer in own if layer in shares[kind]]
        return latency_ms * sum(seen) if seen else None

    def part(name: str, own: frozenset[str], inside: str | None = None) -> Part:
        float_ms = spent("float", whole.baseline, own)
        int8_ms = spent("int8", whole.measured, own)
        return Part(name, own, float_ms, int8_ms, validate(layers - own), validate(own), inside)

    parts = [part(block.name, block.layers) for block in blocks]
    reference, rounded = validate(layers), validate(frozenset())
    for block, known in list(zip(blocks, parts, strict=True)):
        cost = max(known.only.loss - reference.loss, rounded.loss - known.all_but.loss)
        if cost > LOSS_TOLERANCE and len(block.layers) > 1:
            parts += [
                part(layer, frozenset([layer]), block.name)
                for layer in weight_layers(floating)
                if layer in block.layers
            ]
    choice = decide(parts, measure, validate, tolerance=LOSS_TOLERANCE, probes=PROBES)
    return blocks, choice, described(blocks, parts, choice, len(split.labels))


def described(blocks: Sequence[Block], parts: Sequence[Part], choice: Choice, images: int) -> dict[str, Any]:
    """What was measured and chosen, for the report."""
    in_float = choice.chosen.in_float

    def figures(part: Part) -> dict[str, Any]:
        left = part.layers & in_float
        return {
            "name": part.name,
            "precision": "int8" if not left else "float" if left == part.layers else "mixed",
            "float_ms": part.float_ms,
            "int8_ms": part.int8_ms,
            "only": asdict(part.only),
            "all_but": asdict(part.all_but),
        }

    def network(tried: Tried) -> dict[str, Any]:
        return {
            "in_float": scopes_of(blocks, tried.in_float),
            "latency_ms": tried.timed.measured,
            "float_latency_ms": tried.timed.baseline,
            **asdict(tried.validated),
        }

    rows = [figures(part) | {"layers": sorted(part.layers)} for part in parts if part.inside is None]
    for row in rows:
        inner = [figures(part) for part in parts if part.inside == row["name"]]
        row |= {"by_layer": inner} if inner else {}
    return {
        "validation_images": images,
        "loss_tolerance": choice.tolerance,
        "blocks": rows,
        "tried": [network(tried) for tried in choice.tried],
        "chosen": network(choice.chosen),
    }
