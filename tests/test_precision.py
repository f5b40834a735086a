"""`precision: auto` is what a step measured faster, once for a network, a batch and a machine."""

import json
from pathlib import Path

import pytest
import torch
from small_training import network
from torch import nn

from compressor import environment, precision
from compressor.precision import TrainingPrecision, faster_precision, seconds_of_a_step

BATCH = torch.randn(4, 3, 12, 12)


@pytest.fixture
def clocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """A processor with bf16 units and an own cache; the steps take what the test says."""
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path))
    monkeypatch.setattr(environment, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.setattr("compressor.inference.cpu_flags", lambda: frozenset({"avx512_bf16"}))
    seconds: list[dict[str, float]] = []
    monkeypatch.setattr(precision, "seconds_of_a_step", lambda *_: seconds.pop(0))
    return seconds


def choose(module: nn.Module, device: str = "cpu", name: str = "net") -> TrainingPrecision:
    return faster_precision(module, BATCH, device=device, identity={"name": name})


@pytest.mark.parametrize(("float32", "bfloat16", "chosen"), [(2.0, 1.0, "bfloat16"), (1.0, 2.0, "float32")])
def test_the_faster_one_is_chosen_and_remembered(
    float32: float, bfloat16: float, chosen: str, clocked: list[dict[str, float]]
) -> None:
    measured = {"float32": float32, "bfloat16": bfloat16}
    clocked += [measured, {"float32": 9.0, "bfloat16": 9.0}]
    first = choose(network())
    assert first == choose(network()) == TrainingPrecision(chosen, measured)
    assert len(clocked) == 1, "the second answer was remembered"
    choose(network(), name="another")
    assert not clocked


def test_a_damaged_memory_is_measured_again(clocked: list[dict[str, float]], tmp_path: Path) -> None:
    clocked += [{"float32": 1.0, "bfloat16": 2.0}, {"float32": 2.0, "bfloat16": 1.0}]
    assert choose(network()).chosen == "float32"
    (file,) = (tmp_path / "precision").iterdir()
    file.write_text("{")
    assert choose(network()).chosen == "bfloat16"
    assert json.loads(file.read_text())["seconds"] == {"float32": 2.0, "bfloat16": 1.0}


def test_without_bf16_units_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path))
    monkeypatch.setattr("compressor.inference.cpu_flags", lambda: frozenset({"avx2"}))
    assert choose(network()) == TrainingPrecision("float32")
    assert choose(network(), device="cuda") == TrainingPrecision("bfloat16")
    assert list(tmp_path.iterdir()) == []


def test_measuring_leaves_the_network_and_the_random_numbers_as_they_were() -> None:
    module = nn.Sequential(network(), nn.Dropout(0.5)).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    seconds = seconds_of_a_step(module, BATCH)
    assert torch.equal(torch.rand(3), expected)
    assert set(seconds) == {"float32", "bfloat16"}
    assert min(seconds.values()) > 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not module.training
    assert all(parameter.grad is None for parameter in module.parameters())
