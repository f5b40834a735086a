"""Networks that return more than logits: by which names, and that every output is kept through to the IR."""

import copy
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.errors import UnsupportedModelError
from compressor.export import publish_float, publish_int8
from compressor.folding import fold_batchnorm
from compressor.outputs import AsTuple, logits_of, named_tensors
from compressor.parity import Parity, check_float, check_int8, violations
from compressor.preprocess import InputSpec
from compressor.pruning.apply import apply_plan, mask_plan
from compressor.pruning.groups import find_groups
from compressor.pruning.plan import PrunePlan
from compressor.quantization import quantize

SPEC = InputSpec(24, 24, "pillow_bilinear", "stretch", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LABELS = ("a", "b", "c")


class Body(nn.Module):
    """Features (N, 16, 12, 12) and logits (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.reduce = nn.Conv2d(32, 16, 1)
        self.fc = nn.Linear(16, 3)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.reduce(self.body(self.stem(x)))
        return features, self.fc(features.relu().mean((2, 3)))


class AsDict(Body):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features, logits = self.parts(x)
        return {"features": features, "logits": logits}


class AsPair(Body):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.parts(x)


def images(count: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 24, 24, 3), dtype=np.uint8)


def batches(count: int = 8) -> list[Tensor]:
    planes = torch.from_numpy(images(count)).permute(0, 3, 1, 2).float()
    return list(((planes / 255 - 0.5) / 0.5).split(1))


def test_names_depend_on_structure_alone() -> None:
    table, features = torch.zeros(2, 3), torch.zeros(2, 4, 5, 5)
    pair = namedtuple("pair", "aux out")

    @dataclass
    class Result:
        hidden: Tensor
        scores: Tensor

    assert list(named_tensors(table)) == ["logits"]
    assert list(named_tensors((features, table))) == ["logits", "output_0"]
    assert list(named_tensors({"aux": torch.ones(2, 3), "out": table, "maps": [features, features]})) == [
        "logits",
        "aux",
        "maps_0",
        "maps_1",
    ]
    assert logits_of({"aux": torch.ones(2, 3), "out": table}) is table
    assert logits_of(pair(torch.ones(2, 3), table)) is table
    assert list(named_tensors(Result(features, table))) == ["logits", "hidden"]
    assert list(named_tensors((table, torch.zeros(2, dtype=torch.long)))) == ["logits"]
    with pytest.raises(UnsupportedModelError, match=r"'output_0': \(2, 4, 5, 5\).*none of shape \(images, classes\)"):
        named_tensors((features,))


def test_the_flat_tuple_has_the_logits_first() -> None:
    network = AsPair().eval()
    logits, features = AsTuple(network)(batches()[0])
    assert logits.shape == (1, 3)
    assert features.shape == (1, 16, 12, 12)


@pytest.mark.parametrize("kind", [AsDict, AsPair])
def test_every_output_survives_pruning(kind: type[Body]) -> None:
    network = kind().eval()
    example = batches()[0]
    groups = find_groups(network, example, ignored=())
    free = {group.name for group in groups if group.prunable}
    assert free == {"stem.0", "body.0"}  # the features' channels are an output
    keep = {name: tuple(range(0, 16, 2)) for name in free}
    channels = {group.name: group.channels for group in groups}
    plan = PrunePlan(keep, {name: channels[name] for name in free})
    cut, masked = copy.deepcopy(network), copy.deepcopy(network)
    apply_plan(cut, plan, example)
    mask_plan(masked, plan, example)
    with torch.no_grad():
        for got, wanted in zip(
            named_tensors(cut(example)).items(), named_tensors(masked(example)).items(), strict=True
        ):
            assert got[0] == wanted[0]
            torch.testing.assert_close(got[1], wanted[1])


@pytest.mark.parametrize("kind", [AsDict, AsPair])
def test_every_output_is_published_and_compared(kind: type[Body], tmp_path: Path) -> None:
    network = kind().eval()
    name = "features" if kind is AsDict else "output_0"
    published = publish_float(network, SPEC, LABELS, tmp_path / "float")
    parity = check_float(network, published.onnx, published.xml, images(), SPEC)
    assert violations(parity) == []
    assert set(parity.others) == {name}
    assert set(parity.others[name]) == {"torch/onnx", "torch/ir_f32"}
    wrong = replace(parity, others={name: {"torch/onnx": 1e-2}})
    assert f"output '{name}' of torch/onnx differs" in violations(wrong)[0]

    fold_batchnorm(network, batches()[0])
    quantized, _ = quantize(network, batches())
    published = publish_int8(quantized, SPEC, LABELS, tmp_path / "int8")
    parity = check_int8(quantized, published.onnx, published.xml, images(), SPEC)
    assert not [line for line in violations(parity) if "output" in line]
    assert min(value for value in parity.others[name].values() if value is not None) > 25  # dB


def test_an_output_that_is_not_finite_is_a_violation() -> None:
    parity = Parity("int8", 4, {}, others={"features": {"torch/onnx": None}})
    assert violations(parity) == ["int8 parity: output 'features' of torch/onnx has NaN or infinite values"]
