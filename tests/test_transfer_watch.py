"""Laws: a network is warned of weights that hurt it, and of nothing where they help; watching changes no weight."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import SPEC, TRAIN, VAL, network, run
from tiny_networks import FINETUNE, SHORT, write_recipe
from torch import nn

from compressor import transfer_watch
from compressor.context import Assignment, Context, train
from compressor.data import Dataset
from compressor.data.batches import to_input
from compressor.errors import RecipeError
from compressor.pipeline import compress
from compressor.recipe import Finetune
from compressor.recipe_loader import load_recipe
from compressor.report import Footprint
from compressor.training import Epoch
from compressor.transfer_watch import all_but, compare_starts, divergence, reinitialised, warnings_of

ASSIGNMENT = Assignment(0, 5, None, Footprint())


def context(folder: Path) -> Context:
    data = Dataset(("a", "b", "c"), TRAIN, VAL, VAL, SPEC, "made up", (12, 12), (), {})
    return Context(to_input(TRAIN.images[:1], SPEC, "cpu"), data, "cpu", folder, "float32", pretrained=True)


def stage(learning_rate: float = 1e-2, steps: int = 36) -> Finetune:
    told = {"epochs": 9, "batch_size": 16, "learning_rate": learning_rate, "transfer_watch": {"steps": steps}}
    return Finetune.model_validate(told)


def knowing() -> nn.Sequential:
    """A network that has learnt the task, with a new classifier."""
    module = network()
    run(module, epochs=8, learning_rate=2e-2)
    nn.init.normal_(module[5].weight, std=0.01)
    nn.init.zeros_(module[5].bias)
    return module


def test_dead_weights_are_told_from_living_ones(tmp_path: Path) -> None:
    module = knowing()
    nn.init.constant_(module[1].bias, -100.0)  # no activation and no gradient passes any more
    found, warnings = compare_starts(module, stage(), context(tmp_path), ASSIGNMENT)
    assert found["val_accuracy"]["scratch"] > 0.9
    assert found["val_accuracy"]["pretrained"] < 0.5
    low, high = found["differences"]["scratch"]["interval"]
    assert 0 < low < found["differences"]["scratch"]["difference"] < high
    (warning,) = warnings
    assert "random weights do better" in warning
    assert f"{low:.3f} to {high:.3f}" in warning
    assert "another source" in warning


def test_a_probe_that_diverges_is_a_finding_and_not_the_end(tmp_path: Path) -> None:
    module = knowing()
    nn.init.constant_(module[0].weight, math.nan)
    found, (diverged, worse) = compare_starts(module, stage(), context(tmp_path), ASSIGNMENT)
    assert set(found["diverged"]) == {"pretrained", "linear", "linear_after"}
    assert found["val_accuracy"]["scratch"] > 0.9
    assert f"training from the pretrained weights diverged: {found['diverged']['pretrained']}" in diverged
    assert "random weights do better" in worse


def test_weights_that_help_are_passed_over_in_silence_and_none_is_changed(tmp_path: Path) -> None:
    module = knowing()
    before = copy.deepcopy(module.state_dict())
    found, warnings = compare_starts(module, stage(), context(tmp_path), ASSIGNMENT)
    assert warnings == []
    assert found["val_accuracy"]["pretrained"] > 0.9
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())


def figures(scratch: float, linear: float, after: float) -> dict[str, Any]:
    """Of probes; what is pretrained has 0.5, and a difference is known to 0.1."""
    gaps = {"scratch": scratch - 0.5, "linear": linear - after}
    differences = {name: {"difference": gap, "interval": [gap - 0.1, gap + 0.1]} for name, gap in gaps.items()}
    accuracies = {"pretrained": 0.5, "scratch": scratch, "linear": linear, "linear_after": after}
    return {"steps": 36, "val_accuracy": accuracies, "differences": differences, "diverged": {}}


@pytest.mark.parametrize(
    ("scratch", "linear", "after", "advice"),
    [
        (0.55, 0.55, 0.5, None),  # better, but no more than chance
        (0.1, 0.7, 0.5, None),  # a third of what the layers were ahead of random ones is lost: a part is to be expected
        (
            0.1,
            0.7,
            0.3,
            "alone does better .*0.700 against 0.300 .* 0.300 to 0.500.* learning_rate below 0.01, or first a finetune",
        ),
        (
            0.7,
            0.1,
            0.1,
            "random weights do better .* 0.100 to 0.300.* try weights of another source, or model.weights: none",
        ),
        (0.7, 0.7, 0.1, "random weights do better"),  # the worse news is told
    ],
)
def test_what_is_told_is_more_than_chance(scratch: float, linear: float, after: float, advice: str | None) -> None:
    told = warnings_of(figures(scratch, linear, after), stage())
    assert bool(told) == (advice is not None)
    if advice:
        assert len(told) == 1
        assert re.search(advice, told[0])


def test_every_weight_of_the_control_is_new_and_seeded() -> None:
    module = knowing()
    first, second = reinitialised(module, 1), reinitialised(module, 1)
    for name, value in module.named_parameters():
        assert torch.equal(first.get_parameter(name), second.get_parameter(name))
        if value.ndim > 1:
            assert not torch.equal(first.get_parameter(name), value)
    assert float(first[1].running_mean.abs().max()) == 0.0


def test_the_linear_probe_trains_the_classifier_alone() -> None:
    assert all_but(network(), "5") == ("0", "1")


def test_training_that_undoes_what_the_weights_know_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ruinous(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        train(module, *args, **kwargs)
        if not trained:  # of all layers, from pretrained weights
            nn.init.constant_(module[1].bias, -100.0)
        trained.append(module)

    trained: list[nn.Module] = []
    monkeypatch.setattr(transfer_watch, "train", ruinous)
    module = knowing()
    found, warnings = compare_starts(module, stage(), context(tmp_path), ASSIGNMENT)
    assert found["val_accuracy"]["linear"] > 0.9
    assert found["differences"]["linear"]["interval"][0] > 0
    assert "random weights do better" in warnings[0], "the worse news"
    found["differences"]["scratch"]["interval"], found["val_accuracy"]["scratch"] = [-1, 0], 0.3
    (only,) = warnings_of(found, stage())
    assert "training undoes what they know; try a learning_rate below 0.01" in only


def test_a_classifier_that_lags_behind_is_no_harm(tmp_path: Path) -> None:
    """With so few steps on layers that move, the classifier alone is ahead; the layers are none the worse."""
    found, warnings = compare_starts(knowing(), stage(learning_rate=1e-3, steps=3), context(tmp_path), ASSIGNMENT)
    assert found["val_accuracy"]["pretrained"] < 0.9
    assert found["val_accuracy"]["linear_after"] == pytest.approx(found["val_accuracy"]["linear"], abs=0.1)
    assert warnings == []


def test_a_network_without_a_classifier_is_compared_with_random_weights_only(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found, _ = compare_starts(module, stage(steps=2), context(tmp_path), ASSIGNMENT)
    assert set(found["val_accuracy"]) == {"pretrained", "scratch"} == {*found["differences"], "pretrained"}


def epochs(losses: list[float], val_losses: list[float]) -> list[Epoch]:
    return [Epoch(i, loss, 0.5, val, 1e-3, 0.0) for i, (loss, val) in enumerate(zip(losses, val_losses, strict=True))]


@pytest.mark.parametrize(
    ("losses", "val_losses", "warned"),
    [
        ([2, 1.5, 1, 0.8, 0.5, 0.3], [1.5, 1.2, 1.3, 1.5, 1.7, 1.9], True),
        ([2, 1.5, 1, 0.8, 0.5, 0.3], [1.5, 1.3, 1.2, 1.1, 1.0, 1.0], False),  # falls as it should
        ([2, 1.5, 1, 0.8, 0.5, 0.3], [1.5, 1.3, 1.2, 1.1, 1.0, 1.3], False),  # turned late
        ([2, 1.5, 1, 0.8, 0.5, 0.3], [1.5, 1.2, 1.2, 1.25, 1.2, 1.3], False),  # no more than noise
        ([2, 1.5, 1.5, 1.5, 1.6, 1.5], [1.5, 1.2, 1.3, 1.5, 1.7, 1.9], False),  # the training loss rests as well
        ([2, 1, 0.5], [1, 2, 3], False),  # too short to tell
    ],
)
def test_validation_that_turns_early_is_told(losses: list[float], val_losses: list[float], warned: bool) -> None:
    text = divergence(epochs(losses, val_losses))
    assert (text is not None) == warned
    if text:
        assert "after epoch 2 of 6: its loss rose from 1.2 to 1.9 while the training loss fell from 1.5 to 0.3" in text


def test_only_the_first_stage_can_watch(tiny_images: Path, tmp_path: Path) -> None:
    watching = {**SHORT, "transfer_watch": {"steps": 3}}
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_images, FINETUNE, watching)
    with pytest.raises(RecipeError, match=r"stages\[1\]\.transfer_watch: found in stages\[1\], allowed in stages\[0\]"):
        load_recipe(recipe)


@pytest.mark.usefixtures("tiny_network")
def test_with_random_weights_there_is_nothing_to_watch(tiny_images: Path, tmp_path: Path) -> None:
    watching = {**SHORT, "transfer_watch": {"steps": 3}}
    report = compress(write_recipe(tmp_path / "recipe.yaml", tiny_images, watching), tmp_path / "run")
    assert any("the weights are random" in note for note in report.stages[0]["notes"])
    assert "transfer_watch" not in report.stages[0]["details"]
