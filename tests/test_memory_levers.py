"""Levers that lower the memory of training change nothing else: gradients, statistics, steps."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from target_stages import fresh_network, tiny_context
from tiny_networks import TinyNetwork, tiny
from torch import Tensor, nn

from compressor import memory_levers, optimizers, training
from compressor.checkpoint import load_network
from compressor.checkpointing import blocks_of, checkpointed
from compressor.context import Assignment, Work
from compressor.data import Split
from compressor.errors import RecipeError
from compressor.feed import Batch
from compressor.inference import arithmetic
from compressor.memory_levers import combinations
from compressor.models import build
from compressor.optimizers import Adafactor, make_optimizer
from compressor.preprocess import InputSpec
from compressor.recipe import Finetune
from compressor.recipe_faults import validate
from compressor.report import Footprint
from compressor.stages import Outcome, run_stage
from compressor.training import finetune

EXAMPLE = torch.zeros(1, 3, 32, 32)


def step(network: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Outputs, gradients and state of one training step's passes."""
    network.train()
    with arithmetic(torch.float32, "cpu"):
        out = network(x)
    out.square().sum().backward()
    gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    return out.detach(), gradients, {k: v.clone() for k, v in network.state_dict().items()}


@pytest.mark.parametrize("name", ["tiny", "resnet18", "mobilenetv2_100", "densenet121"])
def test_computing_twice_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    network = TinyNetwork(5) if name == "tiny" else build("timm", name, {}, 5)
    other = copy.deepcopy(network)
    x = torch.randn(4, 3, 64, 64)
    plain = step(network, x)
    with checkpointed(other, EXAMPLE) as blocks:
        assert len(blocks) >= 4
        twice = step(other, x)
    assert torch.equal(plain[0], twice[0])
    assert len(plain[1]) == len(twice[1])
    for a, b in zip(plain[1], twice[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()) + 1e-7)
    for key in plain[2]:
        torch.testing.assert_close(plain[2][key], twice[2][key], msg=key)  # BatchNorm has seen the batch once
    assert not any("forward" in module.__dict__ for module in other.modules())


def test_what_is_remembered_shrinks() -> None:
    network = TinyNetwork(5).train()
    x = torch.randn(8, 3, 64, 64)

    def remembered() -> int:
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(x)
        return sum(seen.values())

    whole = remembered()
    with checkpointed(network, EXAMPLE):
        assert remembered() < 0.5 * whole


class Spoiler(nn.Module):
    """Its second block overwrites what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = Pair(False)
        self.spoiling = Pair(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.spoiling(self.fine(x))  # type: ignore[no-any-return]


class Pair(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=inplace)
        self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(self.act(x)))  # type: ignore[no-any-return]


def test_a_block_that_overwrites_its_input_is_left_out() -> None:
    network = Spoiler()
    assert blocks_of(network) == ["fine", "spoiling"]
    with checkpointed(network, EXAMPLE) as names:
        assert names == ["fine"]


@given(images=st.integers(1, 40), size=st.integers(1, 40) | st.none())
def test_parts_cover_a_batch_in_pieces_of_about_one_size(images: int, size: int | None) -> None:
    parts = training._parts(images, size)
    assert [i for part in parts for i in range(images)[part]] == list(range(images))
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) <= (size or images)
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("blended", [False, True])
def test_micro_batches_add_up_to_the_gradients_of_the_batch(blended: bool) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    x, labels = torch.randn(10, 3, 8, 8), torch.randint(0, 3, (10,))
    blend = (torch.randperm(10), torch.rand(10)) if blended else None
    batch = Batch(x, labels, lambda places: x, None, blend)
    found = []
    for micro_batch in (None, 3):
        network.zero_grad()
        loss = training._backward(network, batch, None, None, 0.1, micro_batch, torch.float32)
        found.append((loss, [p.grad.clone() for p in network.parameters() if p.grad is not None]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_adafactor_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]])[:, :, None, None])
    optimizer = Adafactor([{"params": [weight], "weight_decay": 0.1}], lr=0.01)
    gradient = torch.tensor([[0.1, -0.2], [0.3, 0.4]])
    weight.grad = gradient.clone()[:, :, None, None]
    optimizer.step()
    squares = gradient**2
    rows, columns = squares.mean(1), squares.mean(0)
    update = gradient / torch.sqrt(rows[:, None] * columns[None] / rows.mean())
    update /= max(1.0, float(update.square().mean().sqrt()))
    expected = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * (1 - 0.01 * 0.1) - 0.01 * update
    torch.testing.assert_close(weight.detach()[:, :, 0, 0], expected)


def test_adafactor_keeps_rows_and_columns() -> None:
    network = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.Flatten(), nn.LazyLinear(4))
    network(torch.randn(2, 16, 8, 8)).sum().backward()
    sizes = {}
    for kind in ("adamw", "sgd", "adafactor"):
        optimizer = make_optimizer(network, kind, 1e-3, 0.01)
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        sizes[kind] = sum(value.numel() for value in states)
    weights = sum(p.numel() for p in network.parameters())
    assert sizes["adamw"] >= 2 * weights
    assert weights <= sizes["sgd"] < 1.1 * weights
    assert sizes["adafactor"] < 0.2 * weights  # vectors are kept whole


def test_adafactor_learns_at_the_learning_rates_of_adamw() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    wanted = x @ torch.randn(8, 3)
    losses = {}
    for kind in ("adamw", "adafactor"):
        torch.manual_seed(1)
        network = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
        optimizer = optimizers.make_optimizer(network, kind, 1e-2, 0.0)
        for _ in range(150):
            loss = (network(x) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[kind] = float(loss.detach())
    assert losses["adafactor"] < 2 * losses["adamw"] + 0.02


@pytest.mark.parametrize(
    ("stages", "text"),
    [
        (
            [{"type": "finetune", "epochs": 1, "freeze": ["conv1"], "memory": {"checkpointing": True}}],
            "beside memory.checkpointing, which needs whole blocks",
        ),
        (
            [
                {"type": "finetune", "epochs": 1},
                {"type": "quantize"},
                {"type": "finetune", "epochs": 1, "memory": {"checkpointing": True}},
            ],
            r"stages[1], whose quantizers cannot be computed twice",
        ),
    ],
)
def test_levers_that_exclude_each_other_are_named(stages: list[dict[str, object]], text: str) -> None:
    data = {"source": "synthetic_pcb"}
    recipe, faults = validate({"version": 1, "model": {"name": "xception"}, "data": data, "stages": stages})
    assert recipe is None
    assert any(text in message for _, message in faults), faults


def test_a_training_with_levers_ends_with_the_same_weights() -> None:
    """Up to rounding, where no statistics are taken over a batch."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (24, 16, 16, 3), generator=generator, dtype=torch.uint8).numpy()
    split = Split(pixels, np.arange(24) % 3, tuple(map(str, range(24))))
    states, counts = [], []
    for levers in ({}, {"checkpointing": True}, {"micro_batch": 3}, {"checkpointing": True, "micro_batch": 5}):
        torch.manual_seed(0)
        network = nn.Sequential(Pair(False), Pair(False), nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
        result = finetune(
            network,
            train=split,
            val=split,
            spec=InputSpec(16, 16),
            epochs=2,
            batch_size=8,
            optimizer="sgd",
            learning_rate=0.01,
            precision="float32",
            **levers,  # type: ignore[arg-type]
        )
        states.append(network.state_dict())
        counts.append(result.checkpointed)
    assert counts == [0, 2, 0, 2]
    for other in states[1:]:
        for key, value in states[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-6)


@pytest.fixture
def weighed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """In place of training in another process: each lever takes its part off; what was asked."""
    asked: list[dict[str, Any]] = []

    def measure(
        run: Path, folder: Path, index: int, precision: str, architecture: dict[str, Any], levers: dict[str, Any]
    ) -> dict[str, int]:
        network = load_network(folder, tiny(4))
        asked.append({**levers, "params": sum(p.numel() for p in network.module.parameters())})
        peak = 1000 - 300 * ("checkpointing" in levers) - 100 * (levers.get("precision") == "bfloat16")
        peak -= 150 * (levers.get("optimizer") == "adafactor")
        peak -= 100 - 100 * levers.get("micro_batch", 16) // 16
        return {"floor_bytes": 50, "average_bytes": peak - 10, "peak_bytes": peak}

    monkeypatch.setattr(memory_levers, "retraining_memory", measure)
    return asked


def limited(limit: float | str, images: Path, folder: Path, **options: Any) -> Outcome:
    stage = Finetune.model_validate(
        {
            "epochs": 1,
            "batch_size": 16,
            "learning_rate": 2e-3,
            "precision": "float32",
            "memory": {"limit": limit},
            **options,
        }
    )
    assignment = Assignment(2, 0, None, Footprint())
    return run_stage(stage, fresh_network(), tiny_context(images, folder), assignment, Work({}, [], []))


@pytest.mark.parametrize(
    ("limit", "chosen"),
    [
        (1031, {}),
        (1030, {"checkpointing": True}),  # 3 % to spare
        ("1x", {"checkpointing": True}),
        ("0.6x", {"checkpointing": True, "optimizer": "adafactor"}),
        (516, {"checkpointing": True, "optimizer": "adafactor", "micro_batch": 8}),
        (485, {"checkpointing": True, "optimizer": "adafactor", "micro_batch": 2}),
    ],
)
def test_the_gentlest_levers_below_the_limit_are_taken(
    limit: float | str, chosen: dict[str, Any], tiny_images: Path, tmp_path: Path, weighed: list[dict[str, Any]]
) -> None:
    outcome = limited(limit, tiny_images, tmp_path)
    found = outcome.details["memory_levers"]
    assert found["chosen"] == chosen == found["tried"][-1]["levers"]
    assert (found["asked"], found["floor_bytes"]) == (limit, 50)
    assert found["limit_bytes"] == (limit if not isinstance(limit, str) else 1000 * float(limit[:-1]))
    assert outcome.details["checkpointed"] == (5 if "checkpointing" in chosen else 0)
    assert list(tmp_path.iterdir()) == []


def test_a_limit_below_all_levers_is_refused_with_the_least(
    tiny_images: Path, tmp_path: Path, weighed: list[dict[str, Any]]
) -> None:
    with pytest.raises(
        RecipeError, match=r"stages\[2\].memory.limit: 0 MB cannot be met with 3% to spare; .*micro_batch: 2"
    ):
        limited("0.2x", tiny_images, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_bf16_is_a_lever_only_where_precision_is_open() -> None:
    told = Finetune.model_validate({"epochs": 1, "batch_size": 4})
    assert [sorted(levers) for levers in combinations(told, blocks=True, bf16=True)] == [
        [],
        ["checkpointing"],
        ["checkpointing", "precision"],
        ["checkpointing", "optimizer", "precision"],
        ["checkpointing", "micro_batch", "optimizer", "precision"],
    ]
    sgd = told.model_copy(update={"optimizer": "sgd"})
    assert list(combinations(sgd, blocks=False, bf16=False)) == [{}, {"micro_batch": 2}]


def test_a_limit_inside_another_stage_is_refused() -> None:
    recovery = {"steps": 3, "memory": {"limit": "0.5x"}}
    stages = [{"type": "prune", "pruning_ratio": 0.5, "iterations": 2, "recovery": recovery}]
    data = {"source": "synthetic_pcb"}
    _, faults = validate({"version": 1, "model": {"name": "xception"}, "data": data, "stages": stages})
    assert any(path == ("stages", 0, "recovery", "memory", "limit") for path, _ in faults), faults
