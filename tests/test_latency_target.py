"""Pruning to a latency: met or refused, found by timing, and nothing changed when it is refused."""

from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from target_stages import BASELINE_MS, prune, run
from tiny_networks import tiny, write_recipe

from compressor.checkpoint import Network
from compressor.context import Context
from compressor.errors import RecipeError
from compressor.export import convert_float_ir, save_ir
from compressor.inference import frozen_copy
from compressor.models.counting import count
from compressor.pipeline import compress
from compressor.planning import plan_recipe
from compressor.recipe import Quantize, Stage


@pytest.mark.parametrize(
    ("asked", "options"),
    [("0.6x", {}), (6.0, {"ranking": "global"}), (6, {"ranking": "latency"}), (6, {"iterations": 2})],
)
def test_the_pruned_network_is_the_one_that_was_timed(
    asked: object, options: dict[str, object], network: Network, context: Context, counted_latency: None
) -> None:
    before = count(network.module, context.example).macs
    dense_network = frozen_copy(network.module)
    outcome = prune(network, context, {"latency_ms": asked}, **options)
    found = outcome.details["targets"]["latency_ms"]
    assert found["asked"] == asked
    assert 0.85 * 6 <= found["measured"] <= found["goal"] == pytest.approx(6)
    assert found["measured"] in [probe["measured"] for probe in found["probes"]]
    assert count(outcome.network.module, context.example).macs < before
    ir = convert_float_ir(outcome.network.module, context.data.spec, context.data.labels)
    save_ir(ir, context.run_dir / "again.xml")
    size = (context.run_dir / "again.bin").stat().st_size
    dense = convert_float_ir(dense_network, context.data.spec, context.data.labels)
    save_ir(dense, context.run_dir / "dense.xml")
    assert found["measured"] == pytest.approx(BASELINE_MS * size / (context.run_dir / "dense.bin").stat().st_size)
    assert not list(context.run_dir.glob(".deployed*")), "the probes' files are gone"


def test_what_is_timed_is_int8_where_a_later_stage_quantizes(
    network: Network, context: Context, counted_latency: None
) -> None:
    before = count(network.module, context.example).macs
    outcome = prune(network, context, {"latency_ms": "0.6x"}, quantize=("stages[2]", Quantize()))
    found = outcome.details["targets"]["latency_ms"]
    assert outcome.details["latency_model"]["precision"] == "int8"
    assert [probe["measured"] for probe in found["probes"]] == [found["measured"]]
    assert count(outcome.network.module, context.example).macs == before, "a byte a weight: already small enough"
    assert outcome.network.quantizer is None, "the copies were quantized, not the network"
    with pytest.raises(RecipeError, match=r"stages\[2\]\.ignored_scope"):
        prune(network, context, {"latency_ms": "0.6x"}, quantize=("stages[2]", Quantize(ignored_scope=["nowhere"])))


def test_every_target_beside_the_latency_is_met_too(network: Network, context: Context, counted_latency: None) -> None:
    before = count(network.module, context.example)
    outcome = prune(network, context, {"latency_ms": "0.9x", "macs": "0.5x", "params": "0.4x"})
    after = count(outcome.network.module, context.example)
    assert after.macs <= 0.5 * before.macs
    assert after.params <= 0.4 * before.params
    assert len(outcome.details["targets"]["latency_ms"]["probes"]) == 1, "the others make it fast enough"
    assert outcome.details["binding_target"] == (
        "macs" if after.macs / before.macs / 0.5 > after.params / before.params / 0.4 else "params"
    )


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


def test_blocks_are_dropped_until_the_network_is_fast_enough(
    network: Network, context: Context, counted_latency: None
) -> None:
    stage = {"type": "drop_blocks", "target": {"latency_ms": "0.85x"}, "metric_images": 8}
    outcome = run(network, context, stage)
    found, drops = outcome.details["targets"]["latency_ms"], outcome.details["drops"]
    assert found["asked"] == "0.85x"
    assert found["measured"] <= found["goal"] == 8.5
    times = [probe["measured"] for probe in found["probes"]]
    assert times == sorted(times, reverse=True), "each network is smaller than the one before"
    assert all(latency > 8.5 for latency in times[:-1]), "none was dropped in vain"
    assert len(drops) == len(times) - 1 == 2


def test_every_block_may_go_and_still_be_too_few(network: Network, context: Context, counted_latency: None) -> None:
    stage = {"type": "drop_blocks", "target": {"latency_ms": "0.3x", "macs": "0.9x"}, "metric_images": 8}
    message = (
        r"stages\[1\]\.target: 3 blocks can be dropped, which leaves \S+ ms \(0\.\d+x of the baseline\); ask for no"
    )
    with pytest.raises(RecipeError, match=message):
        run(network, context, stage)


def test_a_latency_that_no_dropping_reaches_is_refused_before_training(
    tiny_network: None, tiny_images: Path, tmp_path: Path, counted_latency: None
) -> None:
    stages = [
        {"type": "finetune", "epochs": 50, "learning_rate": 1e-3},
        {"type": "drop_blocks", "target": {"latency_ms": "0.2x"}, "min_blocks": 1},
    ]
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, *stages)
    message = (
        r"stages\[1\]\.target: 2 blocks can be dropped, which leaves \S+ ms \(0\.\d+x of the baseline\); ask for no"
    )
    with pytest.raises(RecipeError, match=message):
        compress(recipe, tmp_path / "run")
    assert not list(tmp_path.glob("run.partial/stages/*"))
    planned = plan_recipe(recipe)
    assert planned["stages"][1]["what"] == "drop_blocks: 0 of 3; latency is measured in the run, and not counted here"


def test_a_real_clock_decides_too(network: Network, context: Context) -> None:
    outcome = prune(network, context, {"latency_ms": 1000})
    assert 0 < outcome.details["latency_model"]["error"] < 10
    (probe,) = outcome.details["targets"]["latency_ms"]["probes"]
    assert 0 < probe["measured"] < 1000
    assert probe["baseline"] > 0
    assert outcome.footprint.macs == count(tiny(4), context.example).macs, "fast enough as it is: nothing goes"
    with pytest.raises(RecipeError, match=r"takes \S+ ms; reachable here"):
        prune(network, context, {"latency_ms": 1e-6})


def test_the_plan_says_that_latency_is_measured_in_the_run(
    tiny_network: None, tiny_images: Path, tmp_path: Path
) -> None:
    stage = {"type": "prune", "target": {"latency_ms": "0.5x"}, "round_to": 4, "min_channels": 4}
    alone = plan_recipe(write_recipe(tmp_path / "alone.yaml", tiny_images, stage))
    assert "latency is measured in the run, and not counted here" in alone["stages"][0]["what"]
    assert alone["stages"][0]["macs"] == alone["baseline"]["macs"]
    stage["target"] = {"latency_ms": "0.5x", "macs": "0.7x"}
    both = plan_recipe(write_recipe(tmp_path / "both.yaml", tiny_images, stage))
    assert both["stages"][0]["what"].endswith("latency is measured in the run")
    assert both["stages"][0]["macs"] <= 0.7 * both["baseline"]["macs"]


@pytest.mark.parametrize("value", ["1.2x", 0, -1, "fast", "0x"])
def test_a_latency_is_a_positive_number_or_a_fraction(value: object) -> None:
    with pytest.raises(ValidationError, match="latency_ms"):
        TypeAdapter(Stage).validate_python({"type": "prune", "target": {"latency_ms": value}})
