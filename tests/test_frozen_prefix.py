"""Frozen layers: they stay to the bit, and training from their cached outputs is training the whole network."""

import copy
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import RandomNetwork, Spec, specs
from small_training import SPEC, split
from torch import Tensor, nn

from compressor import feed, training
from compressor.context import resolve_freeze
from compressor.data.batches import Augment
from compressor.distillation import Distillation
from compressor.errors import RecipeError, ResourceError, TrainingError, UnsupportedModelError
from compressor.feed import Frozen, freezing, open_feed
from compressor.frozen_prefix import find_cuts, split_at, train_mode
from compressor.inference import frozen_copy
from compressor.pruning.groups import resolve_scope
from compressor.training import TrainingResult, finetune

FIRST = ("stem", "norm", "block*")
TURNS = Augment(flip=True, vertical_flip=True, rotate90=True)
STILL = Augment(flip=False)


class Block(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.norm(self.conv(x))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.block1, self.block2 = Block(8), Block(8)
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Conv2d(8, 12, 3, bias=False)
        self.last_norm = nn.BatchNorm2d(12)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(self.act(self.norm(self.stem(x)))))
        x = torch.relu(self.last_norm(self.last(self.pool(x))))
        return self.head(self.drop(x.mean((2, 3))))


def network() -> Network:
    torch.manual_seed(3)
    module = Network()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.5, 0.5)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return module


TRAIN, VAL = split(48, 0), split(71, 1)  # validation in batches of 64 and 7
FOUND = len(TRAIN.labels) + len(VAL.labels)


def run(
    module: nn.Module, folder: Path | None, *, freeze: tuple[str, ...] = FIRST, max_bytes: int = 10**9, **changes: Any
) -> TrainingResult:
    """Train with frozen layers; cached in a folder, or live without one."""
    options = {"epochs": 3, "batch_size": 16, "learning_rate": 5e-3, "precision": "float32", "seed": 5, **changes}
    layers = resolve_scope(module, freeze, where="freeze")
    with freezing(module, layers, folder=folder, max_bytes=max_bytes) as frozen:
        return finetune(module, train=TRAIN, val=VAL, spec=SPEC, frozen=frozen, **options)


def same(a: nn.Module, b: nn.Module, names: tuple[str, ...] = ("",)) -> bool:
    """Whether all tensors under these names are equal to the bit."""
    mine, other = a.state_dict(), b.state_dict()
    return all(torch.equal(mine[key], other[key]) for key in mine if key.startswith(names))


def taught() -> Distillation:
    torch.manual_seed(11)
    return Distillation(frozen_copy(Network()), 2.0, 0.5)


@pytest.mark.parametrize("freeze", [FIRST, ("stem", "norm", "block2"), ("stem",)])
@pytest.mark.parametrize(
    "options",
    [
        {"augment": STILL},
        {"augment": None, "steps": 7, "epochs": None, "optimizer": "sgd"},
        {"augment": Augment(flip=True), "ema": 0.8},
        {"augment": TURNS, "distill": taught()},
    ],
)
def test_training_from_cached_features_is_training_the_whole_network(
    freeze: tuple[str, ...], options: dict[str, Any], tmp_path: Path
) -> None:
    live, cached = network(), network()
    slow, fast = run(live, None, freeze=freeze, **options), run(cached, tmp_path, freeze=freeze, **options)
    assert slow.frozen["cut"] is None
    assert fast.frozen["cut"] is not None
    assert fast.frozen["notes"] == slow.frozen["notes"]
    assert len(fast.frozen["notes"]) == ("block2" in freeze)  # behind a block that is trained
    assert fast.frozen["variants"] == {None: 1, STILL: 1, TURNS: 8}.get(options["augment"], 2)
    for (name, one), other in zip(live.state_dict().items(), cached.state_dict().values(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5), name
    assert [e.loss for e in fast.history] == pytest.approx([e.loss for e in slow.history], rel=1e-4)
    assert [e.val_loss for e in fast.history] == pytest.approx([e.val_loss for e in slow.history], rel=1e-4)
    assert fast.start_accuracy == slow.start_accuracy


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("freeze", [FIRST, ("block2", "last*"), ("norm",)])
def test_frozen_layers_stay_to_the_bit_and_all_others_change(
    freeze: tuple[str, ...], cached: bool, tmp_path: Path
) -> None:
    module, before = network(), network()
    result = run(module, tmp_path if cached else None, freeze=freeze, ema=0.9, augment=TURNS, epochs=5)
    assert result.best_epoch >= 0
    frozen = tuple(f"{name}." for name in resolve_scope(module, freeze, where="freeze"))
    assert same(module, before, frozen)
    others = [name for name, _ in module.named_parameters() if not name.startswith(frozen)]
    assert not any(torch.equal(module.state_dict()[name], before.state_dict()[name]) for name in others)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_the_same_seed_gives_the_same_bits_with_caching(tmp_path: Path) -> None:
    one, other = network(), network()
    for module in (one, other):
        run(module, tmp_path, augment=TURNS)
    assert same(one, other)


@pytest.mark.parametrize(("augment", "variants"), [(STILL, 1), (Augment(flip=True), 2)])
def test_no_image_goes_twice_through_the_frozen_layers(augment: Augment, variants: int, tmp_path: Path) -> None:
    passed = []
    for epochs in (1, 12):
        module, seen = network(), []
        module.stem.register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(len(inputs[0])))
        result = run(module, tmp_path, epochs=epochs, augment=augment)
        passed.append(sum(seen) - result.frozen["cached_images"])
        assert result.frozen["cached_images"] <= len(TRAIN.labels) * variants + len(VAL.labels)
    assert passed[0] == passed[1] <= 6, "beside the cached ones only what the cut is found and proven with"
    assert result.frozen["cached_images"] == len(TRAIN.labels) * variants + len(VAL.labels)


def test_features_take_two_bytes_each_in_bfloat16(tmp_path: Path) -> None:
    module = network()
    result = run(module, tmp_path, freeze=("stem",), augment=STILL, precision="bfloat16")
    assert result.frozen == {
        "layers": 1, "cut": "stem", "variants": 1, "cached_images": FOUND, "cached_bytes": FOUND * 8 * 6 * 6 * 2,
        "notes": [],
    }  # fmt: skip
    assert result.history[-1].loss < result.history[0].loss


def test_the_latest_point_that_fits_is_cached(tmp_path: Path) -> None:
    """What the pooling gives is a quarter of what the blocks give, and comes later."""
    row = 8 * 6 * 6 * 4
    whole = run(network(), tmp_path, freeze=(*FIRST, "last"), augment=STILL)
    assert whole.frozen["cut"] == "last"
    assert whole.frozen["cached_bytes"] == FOUND * 12 * 4
    assert whole.frozen["layers"] == 9

    class Widening(Network):
        def forward(self, x: Tensor) -> Tensor:
            x = self.block2(self.block1(self.act(self.norm(self.stem(x)))).repeat(1, 1, 2, 1))
            return self.head(self.last(x).mean((2, 3)))

    for max_bytes, cut in ((2 * row * FOUND, "block2 (add_1)"), (row * FOUND, "block1 (add)"), (row * FOUND - 1, None)):
        torch.manual_seed(0)
        result = run(Widening(), tmp_path, augment=STILL, max_bytes=max_bytes)
        assert result.frozen["cut"] == cut
        assert result.frozen["cached_bytes"] <= max_bytes
        note = " ".join(result.frozen["notes"])
        if cut == "block1 (add)":
            assert "the outputs of block2 (add_1) would take" in note
            assert "those of block1 (add) are kept instead" in note
        elif cut is None:
            assert "computed anew at every step: the outputs of block2 (add_1) would take" in note
        else:
            assert note == ""


def test_half_of_the_free_disk_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000))
    result = run(network(), tmp_path, augment=STILL)
    assert result.frozen["cut"] is None
    assert "5e-07 GB are allowed (freeze_cache_gb, and half of the free disk)" in result.frozen["notes"][0]


@pytest.mark.parametrize("augment", [Augment(shift=1), Augment(crop=0.8)])
def test_changes_without_end_are_not_cached_and_said(augment: Augment, tmp_path: Path) -> None:
    live, asked = network(), network()
    run(live, None, augment=augment)
    result = run(asked, tmp_path, augment=augment)
    assert result.frozen["cut"] is None
    assert "augment.shift, crop and mixup" in result.frozen["notes"][0]
    assert same(live, asked)


def left_open(folder: Path) -> list[str]:
    """Files of a folder that this process holds, with or without a name."""
    paths = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    return [path for path in paths if path.startswith(str(folder))]


@pytest.mark.parametrize("error", [KeyboardInterrupt, TrainingError, None])
def test_nothing_is_left_on_disk_however_training_ends(
    error: type[BaseException] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, steps = network(), []

    def stop(result: TrainingResult, *_: object) -> None:
        steps.append(result.steps)
        assert list(tmp_path.iterdir()) == [], "the file has no name"
        if error and result.steps == 4:
            raise error

    monkeypatch.setattr(training, "_report_step", stop)
    if error:
        with pytest.raises(error):
            run(module, tmp_path)
    else:
        run(module, tmp_path)
    assert len(steps) == (4 if error else 9)
    assert list(tmp_path.iterdir()) == []
    assert left_open(tmp_path) == []
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_disk_that_fills_up_stops_training_and_says_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "r+b", buffering=0) as full:
        monkeypatch.setattr(feed, "_open_file", lambda *_: full)
        with pytest.raises(ResourceError, match=r"frozen layers: .*No space left.*; free space or lower freeze_cache"):
            run(network(), tmp_path)


def test_a_folder_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run(network(), tmp_path / "file" / "cache", augment=STILL)
    assert result.frozen["cut"] is None
    assert "features cannot be kept there" in result.frozen["notes"][0]


class Branching(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > -1e9 else x


class Noisy(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.1, self.training))


class Jumping(Network):
    """The image itself reaches the layers that are trained."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean((2, 3))


class Replaced(Network):
    def __init__(self) -> None:
        super().__init__()
        inner = super().forward
        self.forward = lambda x: 2 * inner(x)  # type: ignore[method-assign]


class Restless(Network):
    """Gives another output each time, in evaluation too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.1, training=True))


@pytest.mark.parametrize(
    ("kind", "freeze", "reason"),
    [
        (Branching, FIRST, "tracing the network failed with TraceError"),
        (Noisy, FIRST, "in training mode and in evaluation mode"),
        (Jumping, FIRST, "no single tensor leads from frozen layers"),
        (Network, ("norm",), "no single tensor leads from frozen layers"),
        (Network, ("block2",), "no single tensor leads from frozen layers"),
        (Replaced, FIRST, "forward is replaced"),
        (Restless, FIRST, "gives other outputs"),
    ],
)
def test_what_cannot_be_cut_is_trained_whole_and_said(
    kind: Callable[[], Network], freeze: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = kind()
    result = run(module, tmp_path, freeze=freeze, epochs=1, augment=STILL)
    assert result.frozen["cut"] is None
    assert len(result.frozen["notes"]) == 1 + (freeze == ("block2",))  # behind a block that is trained
    assert reason in result.frozen["notes"][-1]
    assert result.steps == 3


@pytest.mark.parametrize(
    ("freeze", "passed"),
    [
        (("stem", "norm", "block1"), None),
        (("norm",), None),  # no convolution
        (("block1", "block2.norm"), "'stem' is trained and runs before 1 of the 1 frozen convolutions"),
        (("stem", "block*"), "'norm' is trained and runs before 2 of the 3 frozen convolutions"),
        (("stem", "norm", "block2", "last"), "'block1.conv' is trained and runs before 2 of the 3 frozen convolutions"),
    ],
)
def test_trained_layers_before_frozen_ones_are_told(freeze: tuple[str, ...], passed: str | None) -> None:
    result = run(network(), None, freeze=freeze, epochs=1, augment=STILL)
    notes = [note for note in result.frozen["notes"] if "saves little memory" in note]
    assert len(notes) == (passed is not None)
    if passed is not None:
        assert passed in notes[0]


@settings(max_examples=40)
@given(spec=specs(), data=st.data())
def test_every_cut_of_any_network_gives_two_parts_of_the_same_layers(spec: Spec, data: st.DataObject) -> None:
    module = RandomNetwork(spec).eval()
    x = torch.randn(2, 3, spec.size, spec.size, dtype=torch.float64)
    names = [name for name, _ in module.named_modules() if name]
    frozen = set(names[: data.draw(st.integers(1, len(names)))])
    try:
        graph, cuts = find_cuts(module, x, frozen, torch.float64, "cpu")
    except UnsupportedModelError:
        return
    for cut in cuts:
        prefix, suffix = split_at(module, graph, cut)
        with torch.no_grad():
            features = prefix(x)
            assert (tuple(features.shape[1:]), features.dtype) == (cut.shape, cut.dtype)
            assert torch.equal(suffix(features), module(x))
        own = {id(parameter): name for name, parameter in module.named_parameters()}
        assert {own[id(parameter)].rpartition(".")[0] for parameter in prefix.parameters()} <= frozen
        assert {id(parameter) for parameter in suffix.parameters()} <= set(own)


def test_a_frozen_dropout_and_norm_stay_in_evaluation_mode() -> None:
    module = network()
    train_mode(module, resolve_scope(module, ("block1", "drop"), where="freeze"))
    modes = {name: layer.training for name, layer in module.named_modules()}
    assert not any(modes[name] for name in ("block1", "block1.norm", "drop"))
    assert all(modes[name] for name in ("", "norm", "block2.norm"))


def test_an_old_gradient_of_a_frozen_layer_does_not_count_in_the_norm() -> None:
    module = network()
    module.stem.weight.grad = torch.full_like(module.stem.weight, 1e6)
    with freezing(module, {"stem"}):
        assert module.stem.weight.grad is None
        assert not module.stem.weight.requires_grad
    assert module.stem.weight.requires_grad


def test_a_layer_that_was_not_trained_before_is_not_trained_after() -> None:
    module = network()
    module.norm.weight.requires_grad_(False)
    with freezing(module, {"stem", "norm"}):
        pass
    assert [module.stem.weight.requires_grad, module.norm.weight.requires_grad] == [True, False]


def test_globs_are_checked() -> None:
    module, example = network(), torch.zeros(1, 3, 16, 16)
    assert resolve_freeze(module, ["block1"], where="x", example=example) == {
        "block1",
        "block1.conv",
        "block1.norm",
    }
    with pytest.raises(
        RecipeError, match=r"stages\[1\]\.freeze\[1\]: 'blok1' matches no module; did you mean 'block1'"
    ):
        resolve_freeze(module, ["stem", "blok1"], where="stages[1].freeze", example=example)
    with pytest.raises(RecipeError, match=r"stages\[1\]\.freeze: \['\*'\] leave no layer to train; leave out 'head'"):
        resolve_freeze(module, ["*"], where="stages[1].freeze", example=example)


def test_nothing_frozen_is_nothing_said() -> None:
    module = network()
    plain = finetune(module, train=TRAIN, val=VAL, spec=SPEC, epochs=1)
    assert plain.frozen is None
    given_none = open_feed(
        copy.deepcopy(module),
        Frozen(),
        train=TRAIN,
        val=VAL,
        spec=SPEC,
        augment=None,
        dtype=torch.float32,
        device="cpu",
    )
    assert given_none.val_features is None
