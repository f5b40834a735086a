"""The float gate holds on real files, and every way to miss a gate is seen."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from separable_network import LABELS, SPEC, normalised, pictures, trained
from torch import nn

from compressor.export import Published, publish_float, publish_int8
from compressor.folding import fold_batchnorm
from compressor.parity import Parity, check_float, check_int8, compare, torch_logits, violations
from compressor.quantization import quantize


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return trained()


@pytest.fixture(scope="module")
def files(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_float(network, SPEC, LABELS, tmp_path_factory.mktemp("parity") / "float")


def test_float_runtimes_agree(network: nn.Module, files: Published) -> None:
    assert files.onnx is not None
    parity = check_float(network, files.onnx, files.xml, pictures(70), SPEC)
    assert set(parity.pairs) == {"torch/onnx", "torch/ir_f32", "onnx/ir_f32"}
    assert parity.images == 70
    assert violations(parity) == []
    assert all(pair.difference < 1e-5 for pair in parity.pairs.values())
    assert len(set(torch_logits(network, pictures(70), SPEC).argmax(1))) > 1  # else agreement would mean nothing


def test_files_of_another_network_are_caught(network: nn.Module, files: Published) -> None:
    assert files.onnx is not None
    other = copy.deepcopy(network)
    other.first.pointwise.weight.data.mul_(1.001)
    found = violations(check_float(other, files.onnx, files.xml, pictures(16), SPEC))
    assert any("torch and onnx differ by" in line for line in found)
    assert any("torch and ir_f32 differ by" in line for line in found)
    assert not any("onnx and ir_f32" in line for line in found)


def _quantized(network: nn.Module) -> nn.Module:
    folded = copy.deepcopy(network)
    fold_batchnorm(folded, normalised(pictures(1)))
    return quantize(folded, [normalised(pictures(32, seed=1))])[0]


def test_int8_runtimes_agree(network: nn.Module, tmp_path: Path) -> None:
    quantized = _quantized(network)
    files = publish_int8(quantized, SPEC, LABELS, tmp_path / "int8")
    parity = check_int8(quantized, files.onnx, files.xml, pictures(100), SPEC)
    assert len(parity.pairs) == 6
    assert all(pair.agreement >= 0.98 and pair.difference < 0.05 for pair in parity.pairs.values())
    without = check_int8(quantized, None, files.xml, pictures(8), SPEC)
    assert set(without.pairs) == {"torch/ir_f32", "torch/ir_default", "ir_f32/ir_default"}
    dataclasses.asdict(parity)


def test_int8_threshold_is_99_percent() -> None:
    first = np.eye(2, dtype=np.float32)[np.zeros(200, int)]
    second = first.copy()
    second[:2] = second[:2, ::-1]
    assert violations(Parity("int8", 200, compare({"torch": first, "onnx": second}))) == []
    second[2] = second[2, ::-1]
    assert violations(Parity("int8", 200, compare({"torch": first, "onnx": second}))) == [
        "int8 parity: torch and onnx agree on the class of 98.5% of 200 images; 99% are needed"
    ]


def test_a_network_of_close_calls_is_told_from_a_wrong_file(network: nn.Module, tmp_path: Path) -> None:
    undecided = copy.deepcopy(network)
    undecided.head.weight.data[1:] = undecided.head.weight.data[:1] + 1e-6 * torch.randn(5, 32)
    undecided.head.bias.data.fill_(0.0)
    files = publish_int8(_quantized(undecided), SPEC, LABELS, tmp_path / "undecided")
    parity = check_int8(_quantized(undecided), files.onnx, files.xml, pictures(64), SPEC)
    if violations(parity):  # the runtimes may happen to tip the same way
        assert parity.self_agreement is not None
    wrong = check_int8(_quantized(network), files.onnx, files.xml, pictures(64), SPEC)
    assert wrong.self_agreement is not None
    assert wrong.self_agreement >= 0.98
    assert any("99% are needed" in line for line in violations(wrong))


def test_close_calls_are_named_in_the_violation() -> None:
    pairs = compare({"torch": np.eye(2, dtype=np.float32), "onnx": np.eye(2, dtype=np.float32)[::-1]})
    assert "close calls" in violations(Parity("int8", 2, pairs, 0.9))[0]
    assert "close calls" not in violations(Parity("int8", 2, pairs, 1.0))[0]


def test_ties_are_counted_and_excused_only_within_the_tolerance() -> None:
    first = np.asarray([[1.0, 1.00001, -1.0], [3.0, 0.0, 0.0]], np.float32)
    second = np.asarray([[1.00001, 1.0, -1.0], [3.0, 0.0, 0.0]], np.float32)
    pairs = compare({"torch": first, "onnx": second})
    assert (pairs["torch/onnx"].disagreeing, pairs["torch/onnx"].undecided) == (1, 1)
    assert pairs["torch/onnx"].agreement == 0.5
    assert violations(Parity("float", 2, pairs)) == []
    second[1] = [0.0, 3.0, 0.0]
    found = violations(Parity("float", 2, compare({"torch": first, "onnx": second})))
    assert any("disagree on the class of 2 of 2 images, 1 of them ties" in line for line in found)


def test_nan_is_a_violation() -> None:
    good = np.ones((3, 2), np.float32)
    bad = good.copy()
    bad[1, 0] = np.nan
    for outputs in ({"torch": good, "onnx": bad}, {"torch": bad, "onnx": good}):
        for kind in ("float", "int8"):
            assert "NaN" in violations(Parity(kind, 3, compare(outputs)))[0]


def test_modes_are_restored(network: nn.Module) -> None:
    trained = copy.deepcopy(network).train()
    trained.third.eval()
    expected = torch_logits(network, pictures(40), SPEC)
    assert np.allclose(torch_logits(trained, pictures(40), SPEC), expected, atol=1e-4)
    assert trained.training
    assert not trained.third.training
