"""Pruning to a latency: met or refused, found by timing, and nothing changed when it is refused."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from tiny_networks import tiny, write_recipe

from compressor import latency_target
from compressor.checkpoint import Network
from compressor.context import Assignment, Context, Work
from compressor.data import Dataset, load_dataset
from compressor.data.batches import to_input
from compressor.environment import cache_dir
from compressor.errors import RecipeError
from compressor.inference import frozen_copy
from compressor.latency_target import Probe, search_macs
from compressor.models.counting import count
from compressor.planning import plan_recipe
from compressor.preprocess import InputSpec
from compressor.recipe import Stage
from compressor.report import Footprint
from compressor.stages import Outcome, run_stage

BASELINE_MS = 10.0


@given(
    fixed=st.floats(0, 5),
    goal=st.floats(0.5, 20),
    smallest=st.integers(1_000, 400_000),
    span=st.integers(1, 2_000_000),
)
def test_a_latency_is_met_or_refused(fixed: float, goal: float, smallest: int, span: int) -> None:
    largest = smallest + span

    def milliseconds(macs: int) -> float:
        return fixed + 1e-5 * macs

    def probe(macs: int) -> Probe:
        return Probe(macs, milliseconds(macs), BASELINE_MS, goal)

    if milliseconds(smallest) > goal:
        with pytest.raises(RecipeError, match=r"reachable here: .* to .* ms"):
            search_macs(probe, smallest=smallest, largest=largest)
        return
    macs, probes = search_macs(probe, smallest=smallest, largest=largest)
    assert any(tried.met and tried.macs == macs for tried in probes)
    assert len(probes) <= latency_target.PROBES + 2
    best = min(largest, math.floor((goal - fixed) / 1e-5))
    assert best - macs <= span / 2**latency_target.PROBES + 2, "not much smaller than it had to be"


@pytest.fixture(scope="module")
def data(tiny_images: Path) -> Dataset:
    return load_dataset(
        source="image_folder", path=str(tiny_images), spec=InputSpec(48, 48), cache=cache_dir() / "data"
    )


@pytest.fixture
def context(data: Dataset, tmp_path: Path) -> Context:
    return Context(to_input(data.train.images[:1], data.spec, "cpu"), data, "cpu", tmp_path, threads=1)


@pytest.fixture
def network() -> Network:
    torch.manual_seed(3)
    architecture = {"source": "builtin", "name": "xception", "args": {}, "num_classes": 4}
    return Network(tiny(4).eval(), architecture, (), None, (3, 48, 48))


def prune(network: Network, context: Context, target: dict[str, object], **options: object) -> Outcome:
    parsed = TypeAdapter(Stage).validate_python(
        {"type": "prune", "target": target, "round_to": 2, "min_channels": 2, "bn_batches": 0, **options}
    )
    whole = count(network.module, context.example)
    teacher = frozen_copy(network.module)
    assignment = Assignment("stages[1]", 0, teacher, Footprint(params=whole.params, macs=whole.macs))
    return run_stage(parsed, network, context, assignment, Work({}, [], []))


@pytest.fixture
def counted_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time what an IR computes by the size of its weights instead of by the clock."""

    def times(baseline: Path, probe: Path, *_: object) -> tuple[float, float]:
        sizes = [path.with_suffix(".bin").stat().st_size for path in (baseline, probe)]
        return BASELINE_MS, BASELINE_MS * sizes[1] / sizes[0]

    monkeypatch.setattr(latency_target, "time_irs", times)
    monkeypatch.setattr(latency_target, "PROBES", 2)  # each one traces a network


@pytest.mark.parametrize(("asked", "options"), [("0.6x", {}), (6.0, {"ranking": "global"}), (6, {"iterations": 2})])
def test_the_pruned_network_is_the_one_that_was_timed(
    asked: object, options: dict[str, object], network: Network, context: Context, counted_latency: None
) -> None:
    before = count(network.module, context.example).macs
    outcome = prune(network, context, {"latency_ms": asked}, **options)
    found = outcome.details["latency_target"]
    assert found["asked"] == asked
    macs = count(outcome.network.module, context.example).macs
    assert macs <= found["macs"] < before
    tried = {probe["macs"]: probe["latency_ms"] for probe in found["probes"]}
    if "iterations" not in options:
        assert tried[macs] <= 6.0
    assert not list(context.run_dir.iterdir()), "the probes' files are gone"


def test_every_target_beside_the_latency_is_met_too(network: Network, context: Context, counted_latency: None) -> None:
    before = count(network.module, context.example)
    outcome = prune(network, context, {"latency_ms": "0.9x", "macs": "0.5x", "params": "0.4x"})
    after = count(outcome.network.module, context.example)
    assert after.macs <= 0.5 * before.macs
    assert after.params <= 0.4 * before.params
    assert len(outcome.details["latency_target"]["probes"]) == 1, "the others make it fast enough"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"latency_ms": "0.001x"}, r"stages\[1\]\.target\.latency_ms: found 0\.01 ms, but the smallest .* reachable"),
        ({"latency_ms": "0.5x", "macs": "0.0001x"}, r"stages\[1\]: prune: a target of \S+ macs cannot be reached"),
    ],
)
def test_what_is_out_of_reach_is_refused_before_anything_changes(
    target: dict[str, object], message: str, network: Network, context: Context, counted_latency: None
) -> None:
    before = {name: value.clone() for name, value in network.module.state_dict().items()}
    with pytest.raises(RecipeError, match=message):
        prune(network, context, target, iterations=3)
    state = network.module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_a_real_clock_decides_too(network: Network, context: Context) -> None:
    outcome = prune(network, context, {"latency_ms": 1000})
    (probe,) = outcome.details["latency_target"]["probes"]
    assert 0 < probe["latency_ms"] < 1000
    assert probe["baseline_ms"] > 0
    assert outcome.footprint.macs == count(tiny(4), context.example).macs, "fast enough as it is: nothing goes"
    with pytest.raises(RecipeError, match=r"takes \S+ ms; reachable here"):
        prune(network, context, {"latency_ms": 1e-6})


def test_the_plan_says_that_latency_is_measured_in_the_run(
    tiny_network: None, tiny_images: Path, tmp_path: Path
) -> None:
    stage = {"type": "prune", "target": {"latency_ms": "0.5x"}, "round_to": 4, "min_channels": 4}
    alone = plan_recipe(write_recipe(tmp_path / "alone.yaml", tiny_images, stage))
    assert "latency target is measured in the run, and is not counted here" in alone["stages"][0]["what"]
    assert alone["stages"][0]["macs"] == alone["baseline"]["macs"]
    stage["target"] = {"latency_ms": "0.5x", "macs": "0.7x"}
    both = plan_recipe(write_recipe(tmp_path / "both.yaml", tiny_images, stage))
    assert both["stages"][0]["what"].endswith("its latency target is measured in the run")
    assert both["stages"][0]["macs"] <= 0.7 * both["baseline"]["macs"]


@pytest.mark.parametrize("value", ["1.2x", 0, -1, "fast", "0x"])
def test_a_latency_is_a_positive_number_or_a_fraction(value: object) -> None:
    with pytest.raises(ValidationError, match="latency_ms"):
        TypeAdapter(Stage).validate_python({"type": "prune", "target": {"latency_ms": value}})
