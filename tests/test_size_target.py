"""Pruning to a size: what is weighed is the file that would be deployed, and it fits or is refused."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from target_stages import prune, run
from tiny_networks import SHORT, tiny, write_recipe

from compressor.checkpoint import Network
from compressor.context import Context
from compressor.errors import RecipeError
from compressor.export import convert_float_ir, convert_ir, ir_bytes, save_ir, trace_int8
from compressor.inference import frozen_copy
from compressor.models.counting import count
from compressor.pipeline import compress
from compressor.planning import plan_recipe
from compressor.quantize_stage import calibration, deployed_ir, quantize_as_told
from compressor.recipe import Finetune, Prune, Quantize, Stage
from compressor.stage_targets import stage_keys

INT8 = ("stages[2]", Quantize(subset_size=4))


def weighed(module: torch.nn.Module, context: Context) -> int:
    save_ir(convert_float_ir(module, context.data.spec, context.data.labels), context.run_dir / "weighed.xml")
    return ir_bytes(context.run_dir / "weighed.xml")


def test_the_deployed_file_is_as_small_as_asked(network: Network, context: Context) -> None:
    dense = weighed(frozen_copy(network.module), context)
    outcome = prune(network, context, {"size_bytes": "0.7x"})
    found = outcome.details["targets"]["size_bytes"]
    assert found["asked"] == "0.7x"
    assert found["goal"] == pytest.approx(0.7 * dense)
    assert found["measured"] == weighed(outcome.network.module, context) <= found["goal"]
    assert found["measured"] > 0.9 * found["goal"], "and not much smaller"
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.05)
    assert outcome.details["binding_target"] == "size_bytes"
    assert len(found["probes"]) <= 5, "size is nearly a straight line over parameters"
    assert [path.name for path in context.run_dir.iterdir() if path.name.startswith(".")] == []


def test_a_file_is_weighed_in_int8_where_a_later_stage_quantizes(network: Network, context: Context) -> None:
    """Quantizers make the .xml of so small a network longer than its weights become shorter."""

    def int8(module: torch.nn.Module) -> int:
        save_ir(deployed_ir(module, INT8[1], context, where=INT8[0]), context.run_dir / "int8.xml")
        return ir_bytes(context.run_dir / "int8.xml")

    dense = int8(frozen_copy(network.module))
    outcome = prune(network, context, {"size_bytes": dense - 6000}, quantize=INT8)
    found = outcome.details["targets"]["size_bytes"]
    assert found["goal"] == dense - 6000
    assert found["measured"] == pytest.approx(int8(outcome.network.module), rel=1e-3)
    assert found["measured"] <= found["goal"]
    assert len({probe["baseline"] for probe in found["probes"]}) == 1


def test_what_is_timed_and_weighed_has_the_operations_and_the_size_of_what_is_deployed(
    network: Network, context: Context
) -> None:
    """It is calibrated in a hurry, see `deployed_ir`."""
    where, stage = INT8
    draft = deployed_ir(network.module, stage, context, where=where)
    batches = calibration(stage, context, seed=0)
    whole = quantize_as_told(frozen_copy(network.module), stage, batches, context, where=where).module
    deployed = convert_ir(trace_int8(whole, context.data.spec), context.data.spec, context.data.labels)
    counts = [Counter(node.get_type_name() for node in model.get_ops()) for model in (draft, deployed)]
    assert counts[0] == counts[1]
    assert counts[0]["FakeQuantize"] > 5
    for name, model in (("draft", draft), ("deployed", deployed)):
        save_ir(model, context.run_dir / f"{name}.xml")
    draft_bytes, deployed_bytes = (ir_bytes(context.run_dir / f"{name}.xml") for name in ("draft", "deployed"))
    assert draft_bytes == pytest.approx(deployed_bytes, rel=1e-3)


def test_tighter_sizes_keep_subsets(network: Network, context: Context) -> None:
    state = {name: value.clone() for name, value in network.module.state_dict().items()}
    kept: dict[str, set[int]] = {}
    for size in ("0.8x", "0.6x"):
        fresh = tiny(4).eval()
        fresh.load_state_dict(state)
        object.__setattr__(network, "module", fresh)
        (plan,) = prune(network, context, {"size_bytes": size}).plans
        now = {name: set(channels) for name, channels in plan["keep"].items()}
        assert all(now[name] <= channels for name, channels in kept.items())
        kept = now
    assert kept


def test_the_target_that_decides_is_named(
    network: Network,
    context: Context,
    counted_latency: None,
) -> None:
    """The clock of this test weighs files: half the latency is much less than nine tenths of the size."""
    before = count(network.module, context.example)
    outcome = prune(network, context, {"latency_ms": "0.6x", "size_bytes": "0.9x", "params": "0.95x"})
    targets = outcome.details["targets"]
    assert set(targets) == {"latency_ms", "size_bytes", "params"}
    assert all(found["measured"] <= found["goal"] for found in targets.values())
    assert outcome.details["binding_target"] == "latency_ms"
    assert targets["size_bytes"]["measured"] == weighed(outcome.network.module, context), "of the network that is left"
    assert targets["params"]["measured"] == count(outcome.network.module, context.example).params < before.params


@pytest.mark.parametrize(
    "stage",
    [
        {"type": "prune", "target": {"size_bytes": "0.01x"}, "round_to": 2, "min_channels": 2},
        {"type": "drop_blocks", "target": {"size_bytes": 1000}},
    ],
)
def test_a_size_out_of_reach_is_refused_before_training(
    stage: dict[str, object], tiny_network: None, tiny_images: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, {**SHORT, "epochs": 50}, stage)
    reachable = {
        "prune": r"stages\[1\]\.target\.size_bytes: found [\d,]+ bytes of IR, but the smallest .* takes [\d,]+ bytes "
        r"of IR; reachable here: [\d,]+ bytes of IR to [\d,]+ bytes of IR \(0\.\d+x to 1\.00x of the baseline\)",
        "drop_blocks": r"stages\[1\]\.target: 3 blocks can be dropped, which leaves [\d,]+ bytes of IR \(0\.\d+x of",
    }
    with pytest.raises(RecipeError, match=reachable[str(stage["type"])]):
        compress(recipe, tmp_path / "run")
    assert not list(tmp_path.glob("run.partial/stages/*"))
    assert not list(tmp_path.glob("run.partial/.*"))
    planned = plan_recipe(recipe)
    assert "size is measured in the run, and not counted here" in planned["stages"][1]["what"]


def test_blocks_are_dropped_until_the_file_fits(network: Network, context: Context) -> None:
    stage = {"type": "drop_blocks", "target": {"size_bytes": "0.85x", "macs": "0.99x"}, "metric_images": 8}
    outcome = run(network, context, stage)
    targets = outcome.details["targets"]
    assert targets["size_bytes"]["measured"] == weighed(outcome.network.module, context)
    assert targets["size_bytes"]["measured"] <= targets["size_bytes"]["goal"]
    sizes = [probe["measured"] for probe in targets["size_bytes"]["probes"]]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size > targets["size_bytes"]["goal"] for size in sizes[:-1]), "none was dropped in vain"
    assert outcome.details["binding_target"] in targets


@pytest.mark.parametrize(
    ("target", "decides"),
    [
        ({"macs": "0.5x"}, set()),
        ({"size_bytes": "0.5x"}, {"quantize", "threads"}),
        ({"latency_ms": "0.5x", "params": 9}, {"quantize", "threads"}),
        ({"train_peak_memory_bytes": "0.5x"}, {"finetune", "precision"}),
        ({"train_peak_memory_bytes": "0.5x", "size_bytes": 9}, {"quantize", "threads", "finetune", "precision"}),
    ],
)
def test_what_a_target_was_measured_under_is_part_of_a_stages_key(
    target: dict[str, object], decides: set[str], context: Context
) -> None:
    """A finished stage is reused only where nothing that decided it has changed."""
    stage = Prune.model_validate({"target": target})

    def key(
        quantize: Quantize | None = None,
        finetune: Finetune = Finetune(epochs=1),  # noqa: B008
        threads: int = 1,
        precision: str = "float32",
    ) -> str:
        after = (Finetune(epochs=9), stage, *([quantize] if quantize else []), finetune)
        here = dataclasses.replace(context, threads=threads, precision=precision)
        return stage_keys("first", after, [here] * len(after))[2]

    other = {
        "quantize": key(Quantize(ignored_scope=("block2",))),
        "finetune": key(finetune=Finetune(epochs=1, batch_size=8)),
        "threads": key(threads=2),
        "precision": key(precision="bfloat16"),
    }
    assert {name for name, value in other.items() if value != key()} == decides


@pytest.mark.parametrize("value", ["1.2x", 0, -1, "small", "0x"])
def test_a_size_is_a_positive_number_or_a_fraction(value: object) -> None:
    with pytest.raises(ValidationError, match="size_bytes"):
        TypeAdapter(Stage).validate_python({"type": "prune", "target": {"size_bytes": value}})
