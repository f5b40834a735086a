"""What single stages do to a network, and what the runner makes sure of after each."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter
from tiny_networks import tiny
from torch import nn

from compressor import channel_choice, stages
from compressor.checkpoint import Network, load_network, save_network
from compressor.context import Assignment, Context, Work
from compressor.data import Dataset, load_dataset
from compressor.data.batches import to_input
from compressor.environment import cache_dir
from compressor.errors import RecipeError, TrainingError, UnsupportedModelError
from compressor.inference import frozen_copy
from compressor.models.counting import count
from compressor.preprocess import InputSpec
from compressor.pruning import reconstruction
from compressor.pruning.importance import NEEDS_BATCHES, Importance, score_groups
from compressor.recipe import Stage
from compressor.report import Footprint
from compressor.stages import Outcome, run_stage

Run = Callable[..., Outcome]
RECOVERY = {"steps": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def data(tiny_images: Path) -> Dataset:
    return load_dataset(
        source="image_folder", path=str(tiny_images), spec=InputSpec(48, 48), cache=cache_dir() / "data"
    )


@pytest.fixture
def context(data: Dataset, tmp_path: Path) -> Context:
    return Context(to_input(data.train.images[:1], data.spec, "cpu"), data, "cpu", tmp_path)


@pytest.fixture
def network() -> Network:
    torch.manual_seed(3)
    architecture = {"source": "builtin", "name": "xception", "args": {}, "num_classes": 4}
    module = tiny(4)
    for block in range(2, 5):  # blocks start as the identity; then they would all be as good to drop
        nn.init.constant_(module.get_submodule(f"block{block}").rep[-1].weight, 0.1 * block)  # type: ignore[union-attr,index]
    return Network(module.eval(), architecture, (), None, (3, 48, 48))


@pytest.fixture
def run(network: Network, context: Context) -> Run:
    """Run one stage, given as a recipe writes it, with the untouched network as the baseline."""
    teacher = frozen_copy(network.module)
    whole = count(teacher, context.example)

    def run_one(work: Work | None = None, **stage: Any) -> Outcome:
        parsed: Any = TypeAdapter(Stage).validate_python(stage)
        assignment = Assignment(2, 0, teacher, Footprint(params=whole.params, macs=whole.macs))
        return run_stage(parsed, network, context, assignment, work or Work({}, [], []))

    return run_one


def sizes(network: Network, context: Context) -> tuple[int, int]:
    counts = count(network.module, context.example)
    return counts.macs, counts.params


def reloads(outcome: Outcome, context: Context, folder: Path) -> bool:
    save_network(folder / "saved", outcome.network)
    again = load_network(folder / "saved", tiny(4)).module
    x = to_input(context.data.test.images[:4], context.data.spec, "cpu")
    with torch.no_grad():
        return torch.equal(again(x), outcome.network.module.eval()(x))


@pytest.mark.parametrize("init", ["inherit", "random"])
def test_channel_reduction_gives_every_group_its_width(
    init: str, run: Run, network: Network, context: Context, tmp_path: Path
) -> None:
    before = network.module.state_dict()["conv1.weight"].clone()
    outcome = run(type="reduce_channels", width=0.5, widths={"block5*": 0.75}, init=init, round_to=4, min_channels=4)
    module = outcome.network.module
    assert module.get_submodule("conv1").out_channels == 8
    assert module.get_submodule("block1.rep.0.pointwise").out_channels == 16
    assert module.get_submodule("fc").in_features == 36, "three quarters of 48"
    assert module.get_submodule("fc").out_features == 4
    (plan,) = outcome.plans
    kept = plan["keep"]["conv1"]
    inherited = torch.equal(module.get_submodule("conv1").weight, before[list(kept)])  # type: ignore[arg-type]
    assert inherited == (init == "inherit")
    assert any("drawn anew" in note for note in outcome.notes) == (init == "random")
    assert outcome.footprint.macs == count(module, context.example).macs
    assert outcome.footprint.val_accuracy is not None
    assert outcome.footprint.accuracy is None
    assert reloads(outcome, context, tmp_path)


@pytest.mark.parametrize("target", [{"macs": "0.6x"}, {"params": "0.6x"}, {"macs": "0.8x", "params": "0.5x"}])
def test_pruning_meets_every_target_in_equal_steps_with_recovery_between(
    target: dict[str, str], run: Run, network: Network, context: Context, tmp_path: Path
) -> None:
    before = dict(zip(("macs", "params"), sizes(network, context), strict=True))
    options = {"iterations": 3, "recovery": RECOVERY, "round_to": 1, "min_channels": 2, "bn_batches": 1}
    outcome = run(type="prune", target=target, **options)
    steps = outcome.details["iterations"]
    assert len(steps) == 3
    after = dict(zip(("macs", "params"), sizes(outcome.network, context), strict=True))
    for name, text in target.items():
        goal = float(text.removesuffix("x")) * before[name]
        assert after[name] <= goal
        for i, step in enumerate(steps):
            assert step[name] <= before[name] * (goal / before[name]) ** ((i + 1) / 3)
    assert len(outcome.details["recovery"]) == 2, "between the steps only: what follows is another stage's work"
    assert outcome.footprint.train_time_s == pytest.approx(sum(r["seconds"] for r in outcome.details["recovery"]))
    assert outcome.footprint.train_peak_memory_bytes
    assert [edit["type"] for edit in outcome.network.edits] == ["prune"] * 3
    assert reloads(outcome, context, tmp_path)


def test_a_pruning_ratio_holds_over_all_steps_together(run: Run, network: Network, context: Context) -> None:
    outcome = run(type="prune", pruning_ratio=0.5, iterations=2, round_to=1, min_channels=1, bn_batches=0)
    assert outcome.network.module.get_submodule("conv1").out_channels == pytest.approx(8, abs=1)
    assert any("fc" in note and "outputs" in note for note in outcome.notes), "what stayed whole is listed"


def test_reconstruction_keeps_what_the_network_says(run: Run, network: Network, context: Context) -> None:
    x = to_input(context.data.val.images, context.data.spec, "cpu")
    stage = {"type": "prune", "pruning_ratio": 0.25, "round_to": 1, "min_channels": 2, "bn_batches": 0}
    dense, off = copy.deepcopy(network), []
    with torch.no_grad():
        whole = dense.module(x)
        for images in (None, 64):
            object.__setattr__(network, "module", copy.deepcopy(dense.module))
            outcome = run(**stage, reconstruction_images=images)
            off.append(float((outcome.network.module.eval()(x) - whole).square().mean()))
    assert off[1] < 0.5 * off[0], "measured on images that nothing was fitted to"
    assert sizes(outcome.network, context) < sizes(dense, context)


def test_a_layer_that_is_not_refitted_is_listed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "MOST_CHANNELS", 31)
    stage = {"type": "prune", "pruning_ratio": 0.5, "round_to": 1, "iterations": 2, "reconstruction_images": 8}
    notes = [note for note in run(**stage, min_channels=2, bn_batches=0).notes if "not refitted" in note]
    assert notes
    assert len(notes) == len(set(notes))
    assert all("reconstruction takes on 31 at most" in note for note in notes)
    monkeypatch.undo()
    assert not any("not refitted" in note for note in run(**stage, min_channels=1, bn_batches=0).notes)


def test_taylor_importance_repeats_with_the_seed(run: Run, network: Network, context: Context) -> None:
    stage = {"type": "prune", "importance": "taylor", "importance_batches": 2, "pruning_ratio": 0.5, "min_channels": 4}
    state = {name: value.clone() for name, value in network.module.state_dict().items()}
    decided = run(**stage).plans
    fresh = tiny(4)
    fresh.load_state_dict(state)
    object.__setattr__(network, "module", fresh.eval())
    assert run(**stage).plans == decided


@pytest.mark.parametrize("kind", get_args(Importance))
def test_a_prune_stage_goes_by_the_importance_it_names(
    kind: Importance, run: Run, network: Network, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []

    def score(*args: Any, **options: Any) -> dict[str, torch.Tensor]:
        asked.append((options["kind"], bool(options["loss_batches"])))
        return score_groups(*args, **options)

    monkeypatch.setattr(channel_choice, "score_groups", score)
    before = sizes(network, context)
    outcome = run(type="prune", importance=kind, importance_batches=1, pruning_ratio=0.5, min_channels=4, bn_batches=0)
    assert asked == [(kind, kind in NEEDS_BATCHES)]
    assert sizes(outcome.network, context) < before


def test_a_target_out_of_reach_is_refused_before_the_first_of_many_steps(
    run: Run, network: Network, context: Context
) -> None:
    before = sizes(network, context)
    with pytest.raises(RecipeError, match=r"stages\[2\].*macs"):
        run(type="prune", target={"macs": "0.05x"}, iterations=6, round_to=4, min_channels=8, bn_batches=0)
    assert sizes(network, context) == before


@pytest.mark.parametrize("metric", ["val_loss", "distill_loss"])
def test_blocks_are_dropped_to_a_target_one_by_one(
    metric: str, run: Run, network: Network, context: Context, tmp_path: Path
) -> None:
    whole, _ = sizes(network, context)
    names = ("block2", "block3", "block4")
    cost = sum(
        macs for layer, macs in count(network.module, context.example).per_layer.items() if layer.startswith(names[:2])
    )
    target = f"{(whole - cost) / whole + 0.001:.4f}x"  # the three cost the same; two must go
    outcome = run(type="drop_blocks", target={"macs": target}, metric=metric, metric_images=16, recovery=RECOVERY)
    drops = outcome.details["drops"]
    assert len(drops) == 2
    assert [len(drop["candidates"]) for drop in drops] == [3, 2]
    assert len(outcome.details["recovery"]) == 2
    gone = {drop["block"] for drop in drops}
    assert {n for n in names if isinstance(outcome.network.module.get_submodule(n), nn.Identity)} == gone
    assert set(outcome.network.edits[0]["modules"]) == gone
    assert len(outcome.network.edits) == 1
    assert reloads(outcome, context, tmp_path)


def test_a_target_that_is_met_already_drops_nothing(run: Run, context: Context, tmp_path: Path) -> None:
    outcome = run(type="drop_blocks", target={"macs": "1x"})
    assert outcome.details["drops"] == []
    assert reloads(outcome, context, tmp_path)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"type": "drop_blocks", "count": 3, "min_blocks": 1},
            r"stages\[2\]\.count: found 3, but 3 blocks can be dropped and 1 must stay .*allowed up to 2",
        ),
        (
            {"type": "drop_blocks", "count": 1, "scope": ["block1*", "block5"]},
            r"stages\[2\]\.scope: no residual block in .*block5.* can be removed",
        ),
        ({"type": "drop_blocks", "count": 1, "scope": ["blok2"]}, r"stages\[2\]\.scope\[0\]: 'blok2'.*'block2'"),
        (
            {"type": "drop_blocks", "target": {"macs": "0.1x"}, "min_blocks": 1, "metric_images": 4},
            r"stages\[2\]\.target: 2 blocks can be dropped, which leaves \S+ MACs \(0\.\d+x of the baseline\)",
        ),
        ({"type": "replace_kernels", "scope": ["fc"]}, r"stages\[2\]: scope: no .*convolution in it can become 1x1"),
        (
            {"type": "replace_kernels", "scope": ["block2.*"], "ignored_scope": ["block*"]},
            r"stages\[2\]\.ignored_scope: leaves no convolution of \['block2\.\*'\] to replace",
        ),
        ({"type": "prune", "pruning_ratio": 0.5, "ignored_scope": ["head.fcc"]}, r"stages\[2\]\.ignored_scope\[0\]"),
        ({"type": "quantize", "ignored_scope": ["blocks"]}, r"stages\[2\]\.ignored_scope\[0\]: 'blocks'.*did you mean"),
        ({"type": "prune", "target": {"macs": "0.0001x"}}, r"macs"),
    ],
)
def test_what_cannot_be_done_says_where_and_what_would_work(stage: dict[str, Any], message: str, run: Run) -> None:
    with pytest.raises(RecipeError, match=message):
        run(**stage)


def test_a_block_may_stay_in_float(run: Run, context: Context, tmp_path: Path) -> None:
    outcome = run(type="quantize", ignored_scope=["block2"], subset_size=4)
    commands = outcome.network.quantizer["compression_state"]  # type: ignore[index]
    hooked = [name for command in commands for name in command["hook_names_in_model"]]
    for block in ("block1", "block3", "block4", "block5"):
        assert any(f"pre_hooks.{block}/" in name for name in hooked), f"{block} has quantizers"
    assert not any("pre_hooks.block2/" in name for name in hooked), "its weights keep their 32 bits"
    assert outcome.details["overflow_fix"] in ("enable", "disable")
    assert reloads(outcome, context, tmp_path)


def test_a_scope_may_leave_kernels_alone(run: Run, network: Network, context: Context, tmp_path: Path) -> None:
    outcome = run(type="replace_kernels", scope=["block[23].*"], ignored_scope=["block3"])
    assert outcome.details["modules"] == ["block2.rep.1.conv1", "block2.rep.4.conv1"]
    assert outcome.network.module.get_submodule("block2.rep.1.conv1").kernel_size == (1, 1)
    assert outcome.network.module.get_submodule("block3.rep.1.conv1").kernel_size == (3, 3)
    assert reloads(outcome, context, tmp_path)


def test_a_stage_that_changes_the_outputs_is_a_fault(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def widen(network: Network, *_: object, **__: object) -> None:
        network.module.fc = nn.Linear(48, 5)

    monkeypatch.setattr(stages, "_finetune", widen)
    with pytest.raises(UnsupportedModelError, match=r"stages\[2\]: outputs were .*\(1, 4\), .*became .*\(1, 5\)"):
        run(type="finetune", epochs=1)


def test_a_tensor_that_is_not_finite_ends_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(network: Network, *_: object, **__: object) -> None:
        with torch.no_grad():
            network.module.get_submodule("bn1").running_var[3] = float("nan")  # type: ignore[operator,index]

    monkeypatch.setattr(stages, "_finetune", poison)
    with pytest.raises(TrainingError, match=r"stages\[2\]: 1 tensors are not finite any more, first bn1\.running_var"):
        run(type="finetune", epochs=1)


def test_a_finetune_with_frozen_layers_says_what_was_cached(run: Run, network: Network, context: Context) -> None:
    before = {name: value.clone() for name, value in network.module.state_dict().items()}
    outcome = run(type="finetune", epochs=2, batch_size=8, freeze=["conv1", "bn1", "block[1-3]"], augment={"crop": 1.0})
    frozen = outcome.details["frozen"]
    assert frozen["cut"] == "block3 (add_2)"
    assert frozen["variants"] == 2
    assert frozen["cached_bytes"] > 0
    assert outcome.notes == ()
    state = outcome.network.module.state_dict()
    held = ("conv1", "bn1", "block1.", "block2.", "block3.")
    assert all(torch.equal(state[name], value) for name, value in before.items() if name.startswith(held))
    assert not list(context.run_dir.iterdir())


def test_a_recovery_with_frozen_layers_says_what_is_not_cached(run: Run) -> None:
    recovery = {**RECOVERY, "freeze": ["block[1-3]", "conv1", "bn1"], "augment": {"crop": 0.8}}
    outcome = run(type="drop_blocks", count=1, metric_images=8, bn_batches=0, recovery=recovery)
    assert outcome.details["recovery"][0]["frozen"]["cut"] is None
    assert any("augment.shift, crop and mixup" in note for note in outcome.notes)


def test_a_quantized_network_trains_whole_behind_frozen_layers(run: Run, network: Network, context: Context) -> None:
    quantized = run(type="quantize", subset_size=4).network
    before = {name: value.clone() for name, value in quantized.module.state_dict().items()}
    object.__setattr__(network, "module", quantized.module)
    outcome = run(type="finetune", steps=3, batch_size=8, freeze=["conv1", "block[1-3]"])
    assert outcome.details["frozen"]["cut"] is None
    assert "forward is replaced, as quantizers do" in outcome.notes[0]
    assert torch.equal(outcome.network.module.state_dict()["conv1.weight"], before["conv1.weight"])
