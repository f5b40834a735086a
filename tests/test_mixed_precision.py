"""INT8 where it pays: never slower than the better of all INT8 and all float, and as accurate as the time allows."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from separable_network import SeparableNetwork, normalised, pictures, trained
from tiny_networks import SHORT, tiny, write_recipe
from torch import Tensor, nn

from compressor import latency_target, mixed_precision
from compressor.benchmark import Candidate, measure_latency
from compressor.checkpoint import Network, load_network, save_network
from compressor.context import Assignment, Context, Work
from compressor.data import Dataset, Split, load_dataset
from compressor.data.batches import to_input
from compressor.environment import cache_dir
from compressor.errors import RecipeError
from compressor.export import convert_float_ir, convert_ir, save_ir, trace_int8
from compressor.folding import fold_batchnorm
from compressor.latency_target import DeploymentBench
from compressor.mixed_precision import (
    LOSS_TOLERANCE,
    NOISE,
    PROBES,
    Choice,
    Part,
    Validated,
    decide,
    partition,
    scopes_of,
)
from compressor.models.xception import Xception
from compressor.pipeline import compress
from compressor.preprocess import InputSpec
from compressor.pruning.blocks import find_blocks
from compressor.quantization import quantize
from compressor.quantize_stage import calibration, quantize_as_told
from compressor.quantizer_switch import layers_served, only_quantized, weight_layers
from compressor.recipe import Finetune, Quantize
from compressor.report import Footprint
from compressor.stage_targets import stage_keys
from compressor.stages import Outcome, run_stage
from compressor.target_search import Reading


class Fake:
    """Blocks of one layer each, with times and losses that add up, and a clock that may be noisy."""

    def __init__(self, float_ms: list[float], int8_ms: list[float], losses: list[float], border_ms: float = 0.0):
        self.float_ms, self.int8_ms, self.losses, self.border_ms = float_ms, int8_ms, losses, border_ms
        self.names = [f"block{i}" for i in range(len(losses))]
        self.everything = frozenset(self.names)
        self.noise = lambda: 1.0

    def milliseconds(self, in_float: frozenset[str]) -> float:
        """A block beside one of the other kind costs a conversion, which nothing foresees."""
        kinds = [name in in_float for name in self.names]
        borders = sum(a != b for a, b in itertools.pairwise(kinds))
        times = (f if kind else i for kind, f, i in zip(kinds, self.float_ms, self.int8_ms, strict=True))
        return sum(times) + borders * self.border_ms

    def measure(self, in_float: frozenset[str]) -> Reading:
        whole = self.milliseconds(self.everything)
        if in_float == self.everything:
            return Reading(whole, whole)
        return Reading(self.milliseconds(in_float) * self.noise(), whole)

    def validate(self, in_float: frozenset[str]) -> Validated:
        return Validated(
            0.5, 1 + sum(lost for n, lost in zip(self.names, self.losses, strict=True) if n not in in_float)
        )

    def parts(self) -> list[Part]:
        return [
            Part(
                name,
                frozenset([name]),
                self.float_ms[i],
                self.int8_ms[i],
                self.validate(self.everything - {name}),
                self.validate(frozenset([name])),
            )
            for i, name in enumerate(self.names)
        ]


def decide_for(
    fake: Fake, measure: Callable[[frozenset[str]], Reading] | None = None, tolerance: float = LOSS_TOLERANCE
) -> Choice:
    return decide(fake.parts(), measure or fake.measure, fake.validate, tolerance=tolerance, probes=PROBES)


TIMES = st.floats(0.1, 10)


@given(st.lists(st.tuples(TIMES, TIMES, st.floats(-0.01, 0.5)), min_size=1, max_size=12), st.floats(0, 2), st.randoms())
def test_auto_is_never_slower_than_the_better_of_both(
    blocks: list[tuple[float, float, float]], border_ms: float, random: np.random.RandomState
) -> None:
    fake = Fake(*(list(column) for column in zip(*blocks, strict=True)), border_ms)  # type: ignore[arg-type]
    fake.noise = lambda: random.uniform(0.99, 1.01)  # type: ignore[assignment]
    choice = decide_for(fake)
    better = min(fake.milliseconds(frozenset()), fake.milliseconds(fake.everything))
    assert fake.milliseconds(choice.chosen.in_float) <= better * (1 + NOISE) * 1.01 / 0.99
    assert choice.chosen in choice.tried
    assert [tried.in_float for tried in choice.tried[:2]] == [frozenset(), fake.everything]
    assert len(choice.tried) <= 2 + 2 * PROBES
    fast = [t for t in choice.tried if t.timed.fraction <= min(1, choice.tried[0].timed.fraction)]
    if choice.chosen.in_float not in (frozenset(), fake.everything):
        assert choice.chosen in fast
    goal = fake.validate(fake.everything).loss + choice.tolerance
    accurate = [t for t in fast if t.validated.loss <= goal and t in choice.tried[:2]]
    assert choice.accurate or not accurate, "one of the two was fast and accurate enough"


def test_what_gains_nothing_goes_to_float_and_the_rest_does_not() -> None:
    fake = Fake([1, 4, 1, 4], [2, 1, 1, 1], [0, 0, 0, 0])
    choice = decide_for(fake)
    assert choice.chosen.in_float == {"block0", "block2"}
    assert len(choice.tried) == 3


def test_what_no_counter_names_is_not_taken_to_gain_nothing() -> None:
    fake = Fake([1, 4], [2, 1], [0, 0])
    parts = [dataclasses.replace(part, int8_ms=None) for part in fake.parts()]
    choice = decide(parts, fake.measure, fake.validate, tolerance=LOSS_TOLERANCE, probes=PROBES)
    assert choice.chosen.in_float == frozenset()
    assert len(choice.tried) == 2


def test_what_only_pays_together_is_found_by_halves() -> None:
    """Block 0 alone is faster in float; beside it, block 4 costs two conversions more than it gains."""
    fake = Fake([1, 4, 4, 4, 1, 4], [3, 1, 1, 1, 1.5, 1], [0] * 6, border_ms=1)
    choice = decide_for(fake)
    assert choice.chosen.in_float == {"block0"}


@pytest.mark.parametrize(("spare_ms", "saved"), [(1.5, True), (0.5, False)])
def test_what_ruins_accuracy_goes_to_float_if_there_is_time(spare_ms: float, saved: bool) -> None:
    """Block 0 is faster in float by `spare_ms`, block 1 slower by 1 ms and ruined by INT8."""
    fake = Fake([1, 2, 9], [1 + spare_ms, 1, 3], [0, 0.8, 0.005])
    choice = decide_for(fake)
    assert choice.chosen.in_float == ({"block0", "block1"} if saved else {"block0"})
    assert choice.accurate == saved
    assert decide_for(fake, tolerance=1).chosen.in_float == {"block0"}


def test_float_is_taken_where_it_is_the_fastest() -> None:
    fake = Fake([1, 2], [2, 3], [0.3, 0.3])
    choice = decide_for(fake)
    assert choice.chosen.in_float == fake.everything
    assert choice.accurate


def test_a_candidate_that_was_lucky_once_is_not_taken() -> None:
    fake = Fake([1, 4], [1.1, 1], [0, 0])
    seen: list[frozenset[str]] = []

    def measure(in_float: frozenset[str]) -> Reading:
        seen.append(in_float)
        slow = 1.2 if seen.count(in_float) == 2 else 1.0
        timed = fake.measure(in_float)
        return Reading(slow * timed.measured, timed.baseline)

    choice = decide_for(fake, measure)
    assert seen.count(frozenset(["block0"])) == 2
    assert choice.chosen.in_float == frozenset()


class Plain(nn.Module):
    """A long chain, a short one, a branch, and a depthwise convolution in the long one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.long = nn.Sequential(
            *(nn.Conv2d(8, 8, 1) for _ in range(3)), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 1)
        )
        self.short = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.short(self.long(self.stem(x))).mean((2, 3)))  # type: ignore[no-any-return]


def test_blocks_divide_the_layers() -> None:
    plain = Plain().eval()
    blocks = partition(plain, torch.zeros(1, 3, 12, 12), weight_layers(plain))
    names = [block.name for block in blocks]
    assert names == ["stem", "long.0", "long.1", "long.2", "long.3", "short", "head"]
    assert blocks[4].layers == {"long.3", "long.5"}
    assert blocks[4].scope == ("long.3", "long.5")
    assert blocks[5].scope == ("short",)
    xception = Xception(4).eval()
    example = torch.zeros(1, 3, 64, 64)
    blocks = partition(xception, example, weight_layers(xception))
    assert [b.name for b in blocks] == [
        *("conv1", "conv2", *(f"block{i}" for i in range(1, 13)), "conv3", "conv4", "fc"),
    ]
    assert sorted(layer for block in blocks for layer in block.layers) == sorted(weight_layers(xception))
    assert set(find_blocks(xception, example)) <= {block.name for block in blocks}
    part = {"block4.rep.1.pointwise", *blocks[4].layers}
    assert scopes_of(blocks, part) == ["block3", "block4.rep.1.pointwise"]


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "block", "count"), [("mobilenetv2_100", "blocks.1.0", 20), ("resnet18", "layer2.0", 10)]
)
def test_blocks_of_a_zoo(name: str, block: str, count: int) -> None:
    from compressor.models import build

    network = build("timm", name, {}, 4).eval()
    blocks = partition(network, torch.zeros(1, 3, 64, 64), weight_layers(network))
    assert len(blocks) == count
    assert block in [b.name for b in blocks], "the first of a stage, which changes shapes"
    assert sorted(layer for b in blocks for layer in b.layers) == sorted(weight_layers(network))


@pytest.fixture(scope="module")
def folded() -> nn.Module:
    network = trained()
    fold_batchnorm(network, batches(1)[0])
    return network


def batches(n: int = 6) -> list[Tensor]:
    return [normalised(pictures(1, seed=seed)) for seed in range(n)]


@pytest.mark.parametrize("residual", ["float", "int8"])
def test_layers_switched_off_compute_what_the_float_network_does(residual: str, folded: nn.Module) -> None:
    quantized, _ = quantize(folded, batches(), residual=residual)  # type: ignore[arg-type]
    x = normalised(pictures(8, seed=9))
    served = layers_served(quantized, folded, x)
    before = {name: value.clone() for name, value in quantized.state_dict().items()}
    trainable = {name: parameter.requires_grad for name, parameter in quantized.named_parameters()}
    whole, reference = quantized(x), folded(x)
    with only_quantized(quantized, folded, [], served) as network:
        assert torch.equal(network(x), reference)
    with only_quantized(quantized, folded, weight_layers(folded), served) as network:
        assert torch.equal(network(x), whole)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name in ("second", "third"):
        quantized.get_submodule(name).register_forward_hook(
            lambda _m, given, out, name=name: seen.__setitem__(name, (given[0].detach(), out.detach()))
        )
    others = [name for name in weight_layers(folded) if not name.startswith("second")]
    with torch.no_grad(), only_quantized(quantized, folded, others, served) as network:
        out = network(x)
    assert torch.equal(seen["second"][1], folded.get_submodule("second")(seen["second"][0]))
    assert not torch.equal(seen["third"][1], folded.get_submodule("third")(seen["third"][0]))
    assert not torch.equal(out, whole)
    assert not torch.equal(out, reference)
    assert all(torch.equal(value, before[name]) for name, value in quantized.state_dict().items())
    assert trainable == {name: parameter.requires_grad for name, parameter in quantized.named_parameters()}


def test_an_error_inside_leaves_the_network_as_it_was(folded: nn.Module) -> None:
    quantized, _ = quantize(folded, batches(2))
    x = batches(1)[0]
    before = quantized(x)
    with pytest.raises(ZeroDivisionError), only_quantized(quantized, folded, [], layers_served(quantized, folded, x)):
        raise ZeroDivisionError
    assert torch.equal(quantized(x), before)


def upper_end(quantized: nn.Module) -> float:
    """Of the range of the input image."""
    quantizer = quantized.get_submodule("__nncf_hooks.post_hooks.x__0").get_submodule("0")
    return (quantizer.input_low + quantizer.input_range).item()  # type: ignore[operator, no-any-return]


def test_range_estimators_do_as_they_say(folded: nn.Module) -> None:
    images = batches(5)
    images[3] = images[3].clone()
    images[3][0, 0, 0, 0] = 40.0  # one value of one image
    highest = [float(image.max()) for image in images]
    ends = {
        name: upper_end(quantize(folded, images, range_estimator=name, bias_correction=False)[0])  # type: ignore[arg-type]
        for name in ("mean_minmax", "minmax", "median_minmax", "mean_no_outliers_minmax", "mean_quantile")
    }
    near = {"rel": 0.05}  # zero is put on the grid
    assert ends["minmax"] == pytest.approx(40, **near)
    assert ends["mean_minmax"] == pytest.approx(sum(highest) / 5, **near)
    assert ends["median_minmax"] == pytest.approx(sorted(highest)[2], **near)
    assert ends["mean_no_outliers_minmax"] < 1.1
    quantiles = [float(image.quantile(1 - 1e-4)) for image in images]
    assert ends["mean_quantile"] == pytest.approx(sum(quantiles) / 5, **near)
    assert ends["mean_quantile"] < ends["mean_minmax"]


def test_histograms_find_a_range_and_not_per_channel(folded: nn.Module) -> None:
    end = upper_end(quantize(folded, batches(2), range_estimator="histogram")[0])
    assert 0.5 < end <= 1.1
    with pytest.raises(RecipeError, match="'histogram' beside per_channel_activations"):
        quantize(folded, batches(2), range_estimator="histogram", per_channel_activations=True)
    with pytest.raises(ValidationError, match="'histogram' beside per_channel_activations"):
        Quantize(range_estimator="histogram", per_channel_activations=True)


def channel_means(network: nn.Module, name: str, x: Tensor) -> Tensor:
    """Of what a module gives, (C,)."""
    means: list[Tensor] = []
    handle = network.get_submodule(name).register_forward_hook(lambda _m, _i, out: means.append(out.mean((0, 2, 3))))
    network(x)
    handle.remove()
    return means[0]


def test_bias_correction_brings_the_means_back(folded: nn.Module) -> None:
    """Coarse weights (`overflow_fix`) shift the means of what a layer gives; the correction is each layer's own."""
    images = batches(8)
    x = torch.cat(images)
    shifts, biases = {}, {}
    for corrected in (True, False):
        quantized, _ = quantize(folded, images, bias_correction=corrected, overflow_fix="enable")
        biases[corrected] = dict(quantized.named_parameters())["third.pointwise.bias"].detach()
        served = layers_served(quantized, folded, x)
        layers = ["third.depthwise", "third.pointwise"]
        with torch.no_grad(), only_quantized(quantized, folded, layers, served) as network:
            means = [channel_means(owner, "third", x) for owner in (folded, network)]
        shifts[corrected] = float((means[0] - means[1]).abs().mean())
    assert not torch.equal(biases[True], biases[False])
    assert (biases[False] - folded.get_submodule("third.pointwise").bias).abs().max() < 1e-3, "only put on its grid"
    assert shifts[True] < 0.7 * shifts[False]


@pytest.fixture(scope="module")
def data(tiny_images: Path) -> Dataset:
    return load_dataset(
        source="image_folder", path=str(tiny_images), spec=InputSpec(48, 48), cache=cache_dir() / "data"
    )


@pytest.fixture
def context(data: Dataset, tmp_path: Path) -> Context:
    return Context(to_input(data.train.images[:1], data.spec, "cpu"), data, "cpu", tmp_path, threads=1)


def run(module: nn.Module, context: Context, **options: object) -> Outcome:
    architecture = {"source": "builtin", "name": "xception", "args": {}, "num_classes": 4}
    stage = Quantize(precision="auto", subset_size=4, metric_images=8, **options)  # type: ignore[arg-type]
    network = Network(module, architecture, (), None, (3, 48, 48))
    return run_stage(stage, network, context, Assignment(1, 0, None, Footprint()), Work({}, [], []))


def in_int8(network: nn.Module) -> set[str]:
    """Layers whose weights are rounded now."""
    from nncf.torch.quantization.layers import BaseQuantizer

    return {
        name.split(".pre_hooks.")[1].rsplit("/", 2)[0].replace("/", ".")
        for name, part in network.named_modules()
        if isinstance(part, BaseQuantizer) and name.endswith("__1.0") and part.is_enabled_quantization()
    }


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, float]]:
    """In the place of the clock and of validation: what blocks take, and layers lose, in INT8.

    In float each block takes 1 ms and loses nothing; in INT8 half of that, unless told otherwise here.
    """
    costs: dict[str, dict[str, float]] = {"ms": {}, "loss": {}}

    def milliseconds(network: nn.Module) -> dict[str, float]:
        rounded, layers = in_int8(network), weight_layers(network)
        blocks = [layer.partition(".")[0] for layer in layers]
        return {
            layer: (costs["ms"].get(block, 0.5) if layer in rounded else 1.0) / blocks.count(block)
            for layer, block in zip(layers, blocks, strict=True)
        }

    def time(self: DeploymentBench, network: nn.Module) -> Reading:
        times = milliseconds(network)
        return Reading(math.fsum(times.values()), len({layer.partition(".")[0] for layer in times}))

    def shares(self: DeploymentBench, networks: dict[str, nn.Module], layers: set[str]) -> dict[str, dict[str, float]]:
        found = {name: milliseconds(network) for name, network in networks.items()}
        return {name: {layer: ms / sum(times.values()) for layer, ms in times.items()} for name, times in found.items()}

    def evaluate(network: nn.Module, split: Split, spec: InputSpec, *, device: str) -> tuple[float, float]:
        return 0.5, 1 + sum(costs["loss"].get(layer, 0.0) for layer in in_int8(network))

    monkeypatch.setattr(DeploymentBench, "time", time)
    monkeypatch.setattr(DeploymentBench, "shares_of_layers", shares)
    monkeypatch.setattr(mixed_precision, "evaluate", evaluate)
    return costs


def test_the_stage_leaves_in_float_what_gains_nothing_or_ruins_accuracy(
    counted: dict[str, dict[str, float]], tiny_network: None, context: Context
) -> None:
    counted["ms"] |= {"block2": 1.4, "conv1": 1.1}
    counted["loss"] |= {"block3.rep.4.pointwise": 0.3, "fc": 0.005}
    torch.manual_seed(3)
    outcome = run(tiny(4).eval(), context)
    measured = outcome.details["auto"]
    precisions = {block["name"]: block["precision"] for block in measured["blocks"]}
    assert precisions == {
        **dict.fromkeys(["block1", "block4", "block5", "fc"], "int8"),
        **dict.fromkeys(["conv1", "block2"], "float"),
        "block3": "mixed",
    }
    (row,) = [block for block in measured["blocks"] if block["name"] == "block3"]
    blamed = {layer["name"]: layer["precision"] for layer in row["by_layer"]}
    assert blamed["block3.rep.4.pointwise"] == "float"
    assert list(blamed.values()).count("int8") == 3
    assert row["only"]["loss"] == pytest.approx(1.3)
    assert row["all_but"]["loss"] == pytest.approx(1.005)
    assert (row["float_ms"], row["int8_ms"]) == pytest.approx((1, 0.5))
    chosen = measured["chosen"]
    assert chosen["in_float"] == ["conv1", "block2", "block3.rep.4.pointwise"]
    assert chosen["loss"] == pytest.approx(1.005)
    assert chosen["latency_ms"] <= measured["tried"][0]["latency_ms"]
    layers = in_int8(outcome.network.module)
    assert layers == {
        layer
        for layer in weight_layers(tiny(4))
        if not layer.startswith(("conv1", "block2")) and layer != "block3.rep.4.pointwise"
    }, "the network is what the details say"
    assert outcome.notes == ()
    save_network(context.run_dir / "kept", outcome.network)
    x = to_input(context.data.val.images, context.data.spec, "cpu")
    with torch.no_grad():
        assert torch.equal(load_network(context.run_dir / "kept").module(x), outcome.network.module(x))


def test_a_run_goes_on_where_float_is_the_fastest(
    counted: dict[str, dict[str, float]], tiny_network: None, tiny_images: Path, tmp_path: Path
) -> None:
    """Nothing is quantized then; the finetune that would have been QAT trains the float network, which is deployed."""
    counted["ms"] |= dict.fromkeys(("conv1", *(f"block{i}" for i in range(1, 6)), "fc"), 1.3)
    quantizing = {"type": "quantize", "precision": "auto", "subset_size": 4, "metric_images": 4}
    report = compress(write_recipe(tmp_path / "recipe.yaml", tiny_images, SHORT, quantizing, SHORT), tmp_path / "run")
    assert report.passed
    (note,) = [note for note in report.stages[1]["notes"] if "nothing was quantized" in note]
    assert "(7 ms; all INT8 9.1 ms)" in note
    artifacts = {path.name for path in (tmp_path / "run" / "artifacts").iterdir()}
    assert artifacts == {"baseline_fp32.xml", "baseline_fp32.bin"} | {
        f"result_fp32.{e}" for e in ("xml", "bin", "onnx")
    }
    assert "int8" not in report.parity
    last = load_network(tmp_path / "run" / "stages" / "02-finetune")
    assert last.quantizer is None
    assert last.edits == ()
    assert {block["precision"] for block in report.stages[1]["details"]["auto"]["blocks"]} == {"float"}


def test_too_little_time_is_said(counted: dict[str, dict[str, float]], context: Context) -> None:
    counted["loss"] |= {"third.pointwise": 0.3}
    outcome = run(SeparableNetwork(4).eval(), context)
    assert outcome.details["auto"]["chosen"]["in_float"] == []
    (note,) = outcome.notes
    assert "the validation loss is 0.3 above float's" in note


def test_nothing_to_choose_from_is_an_error(context: Context) -> None:
    with pytest.raises(RecipeError, match=r"stages\[1\]: ignored_scope: leaves no layer to quantize"):
        run(SeparableNetwork(4).eval(), context, ignored_scope=("*",))


def test_the_real_clock_agrees(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_target, "ROUNDS", 3)
    monkeypatch.setattr(mixed_precision, "PROBES", 2)
    torch.manual_seed(0)
    network = SeparableNetwork(4, channels=32).eval()
    spec, labels, folder = context.data.spec, context.data.labels, context.run_dir
    save_ir(convert_float_ir(network, spec, labels), folder / "float.xml")
    options = Quantize(precision="auto", subset_size=4, metric_images=8)
    rounded = quantize_as_told(
        SeparableNetwork(4, channels=32).eval(), options, calibration(options, context, 0), context, where="stages[1]"
    )
    save_ir(convert_ir(trace_int8(rounded.module, spec), spec, labels), folder / "int8.xml")
    outcome = run(network, context)
    result = outcome.network
    found = (
        convert_float_ir(result.module, spec, labels)
        if result.quantizer is None
        else convert_ir(trace_int8(result.module, spec), spec, labels)
    )
    save_ir(found, folder / "auto.xml")
    files = {name: Candidate(folder / f"{name}.xml") for name in ("float", "int8", "auto")}
    rounds = [measure_latency(files, np.asarray(context.data.train.images[:4]), threads=1) for _ in range(3)]
    ms = {name: min(found[name].median_ms for found in rounds) for name in files}
    assert ms["auto"] <= 1.25 * min(ms["float"], ms["int8"])
    measured = outcome.details["auto"]
    assert {block["name"] for block in measured["blocks"]} == {"stem", "first", "second", "third", "head"}
    for kind, tried in (("float_ms", measured["tried"][1]), ("int8_ms", measured["tried"][0])):
        layers_ms = math.fsum(block[kind] for block in measured["blocks"])
        assert 0.2 * tried["latency_ms"] < layers_ms <= 1.0001 * tried["latency_ms"], "the rest is preprocessing"
    assert not list(folder.glob(".deployed*")), "the files of what was tried are gone"


def test_a_choice_by_the_clock_is_not_reused_with_other_threads(context: Context) -> None:
    stages = [Finetune(epochs=1), Quantize(precision="auto"), Finetune(epochs=1)]
    threads = [[dataclasses.replace(context, threads=n)] * len(stages) for n in (1, 2)]
    one, two = (stage_keys("first", stages, contexts) for contexts in threads)
    assert [a == b for a, b in zip(one, two, strict=True)] == [True, True, False, False]
    stages[1] = Quantize()
    one, two = (stage_keys("first", stages, contexts) for contexts in threads)
    assert one == two
