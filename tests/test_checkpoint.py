"""Saved networks: a fresh process rebuilds the same outputs, and whatever does not fit is a clear error."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from random_networks import randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor.checkpoint import Network, load_network, save_network
from compressor.errors import CompressorError, DataError, UnsupportedModelError
from compressor.folding import fold_batchnorm
from compressor.models import build
from compressor.pruning.apply import apply_plan
from compressor.pruning.blocks import drop_blocks
from compressor.pruning.groups import find_groups
from compressor.pruning.importance import score_groups
from compressor.pruning.kernels import find_kernels, replace_kernels
from compressor.pruning.plan import width_plan
from compressor.quantization import quantize

SIZE = (3, 40, 40)
ARCHITECTURE = {"source": "builtin", "name": "xception", "args": {}, "num_classes": 4}

LOADER = """
import sys, pathlib, torch
from safetensors.torch import load_file, save_file
from compressor.checkpoint import load_network
folder = pathlib.Path(sys.argv[1])
network = load_network(folder)
with torch.no_grad():
    save_file({"y": network.module(load_file(folder / "x.safetensors")["x"]).contiguous()}, folder / "y.safetensors")
"""


@pytest.fixture(scope="module")
def slim() -> Network:
    """Xception after every kind of float edit, pruned twice: 1/8 of the width so that the tests are quick."""
    module = build("builtin", "xception", {}, 4)
    randomise(module, 0)
    example = torch.zeros(1, *SIZE)
    edits: list[dict[str, Any]] = []
    blocks = ["block5", "block6", "block7", "block8", "block9", "block10"]
    drop_blocks(module, blocks)
    edits.append({"type": "drop_blocks", "modules": blocks})
    for width in (0.25, 0.5):
        groups = find_groups(module, example, ignored=())
        scores = score_groups(module, groups, kind="random", loss_batches=None, seed=0)
        plan = width_plan(groups=groups, scores=scores, width=width, overrides={}, round_to=4, min_channels=4)
        apply_plan(module, plan, example)
        edits.append({"type": "prune", "plan": plan.to_dict()})
    kernels = find_kernels(module, ["block4", "conv3"])
    replace_kernels(module, kernels, init="inherit")
    edits.append({"type": "replace_kernels", "modules": list(kernels)})
    return Network(module.eval(), ARCHITECTURE, tuple(edits), None, SIZE)


def outputs_in_a_fresh_process(folder: Path, x: Tensor) -> Tensor:
    save_file({"x": x}, folder / "x.safetensors")
    done = subprocess.run([sys.executable, "-c", LOADER, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "y.safetensors")["y"]


def test_a_fresh_process_rebuilds_a_pruned_network(slim: Network, tmp_path: Path) -> None:
    save_network(tmp_path, slim)
    x = torch.randn(2, *SIZE)
    with torch.no_grad():
        expected = slim.module(x)
    assert torch.equal(outputs_in_a_fresh_process(tmp_path, x), expected)
    assert not list(tmp_path.glob("*.p*t*"))  # no pickle


def test_a_folded_and_quantized_network_comes_back(slim: Network, tmp_path: Path) -> None:
    save_network(tmp_path / "float", slim)
    module = load_network(tmp_path / "float").module
    pairs = fold_batchnorm(module, torch.zeros(1, *SIZE))
    quantized, config = quantize(module, [torch.randn(1, *SIZE) for _ in range(2)])
    fold = {"type": "fold_bn", "pairs": [list(pair) for pair in pairs]}
    save_network(tmp_path, Network(quantized, ARCHITECTURE, (*slim.edits, fold), config, SIZE))
    x = torch.randn(2, *SIZE)
    with torch.no_grad():
        expected = quantized(x)
    assert torch.equal(outputs_in_a_fresh_process(tmp_path, x), expected)


def test_what_comes_back_is_the_description_that_was_saved(slim: Network, tmp_path: Path) -> None:
    training = slim.module.training
    save_network(tmp_path, slim)
    loaded = load_network(tmp_path)
    assert (loaded.architecture, loaded.edits, loaded.quantizer, loaded.input) == (
        slim.architecture,
        slim.edits,
        None,
        SIZE,
    )
    assert slim.module.training == training
    assert not loaded.module.training
    # Its convolutions keep the fast memory format that the architecture was built in.
    conv = loaded.module.get_submodule("block2.skip")
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_shared_and_channels_last_tensors_and_a_module_of_the_users(tmp_path: Path) -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(4, 4, 3, padding=1)
            self.b = nn.Conv2d(4, 4, 3, padding=1)
            self.b.weight = self.a.weight
            self.to(memory_format=torch.channels_last)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    net = Custom()
    save_network(tmp_path, Network(net, {**ARCHITECTURE, "source": "custom", "name": "mine"}, (), None, (4, 8, 8)))
    loaded = load_network(tmp_path, Custom())
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(loaded.module(x), net(x))


def change(folder: Path, **changes: object) -> None:
    value = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(value | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"version": 2}, DataError, "version 2 is not one this release reads"),
        ({"architecture": {"name": "xception"}}, DataError, "'architecture' must hold source, name, args"),
        ({"architecture": {**ARCHITECTURE, "name": "xceptoin"}}, CompressorError, "did you mean 'xception'"),
        ({"input": [3, 0, 40]}, DataError, "'input' must be three positive sizes"),
        ({"edits": None}, DataError, "'edits' is missing or not a list"),
        ({"edits": ["prune"]}, DataError, r"edits\[0\]: type None is not one of prune"),
        ({"edits": [{"type": "prunes"}]}, DataError, r"type 'prunes' is not one of .*; did you mean 'prune'"),
        ({"edits": [{"type": "prune", "plan": {"version": 7}}]}, DataError, r"edits\[0\]\.plan: version 7"),
        ({"edits": [{"type": "prune"}]}, DataError, r"edits\[0\]\.plan: expected an object, found NoneType"),
        ({"edits": [{"type": "drop_blocks"}]}, DataError, "'modules' must be a list of module names"),
        ({"edits": [{"type": "drop_blocks", "modules": ["x"]}]}, UnsupportedModelError, "no module 'x'"),
        ({"edits": [{"type": "fold_bn", "pairs": [["conv1"]]}]}, DataError, "'pairs' must be a list of"),
        ({"edits": []}, DataError, r"do not fit model.json: .*missing.*of another shape"),
        ({"quantizer": [1]}, DataError, "'quantizer' must be an object or null"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(
    slim: Network, tmp_path: Path, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    save_network(tmp_path, slim)
    change(tmp_path, **changes)
    with pytest.raises(error, match=message):
        load_network(tmp_path)


def test_missing_and_damaged_files_are_named(slim: Network, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model\.json: not found"):
        load_network(tmp_path)
    save_network(tmp_path, slim)
    tensors = tmp_path / "model.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged or not a safetensors file"):
        load_network(tmp_path)
    contents = load_file_from(whole)
    del contents["fc.bias"]
    save_file({**contents, "extra": torch.zeros(1)}, tensors)
    with pytest.raises(DataError, match=r"1 missing \(first: 'fc.bias'\), 1 unexpected \(first: 'extra'\)"):
        load_network(tmp_path)
    tensors.unlink()
    with pytest.raises(DataError, match=r"model\.safetensors: not found"):
        load_network(tmp_path)
    for text, message in (("{", "not valid JSON"), ("3", "expected an object, found int")):
        (tmp_path / "model.json").write_text(text)
        with pytest.raises(DataError, match=message):
            load_network(tmp_path)


def load_file_from(data: bytes) -> dict[str, Tensor]:
    from safetensors.torch import load

    return load(data)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> object:
            return {"anything": 1}

    with pytest.raises(DataError, match="state '_extra_state' is a dict, not a tensor"):
        save_network(tmp_path, Network(Extra(2, 2), ARCHITECTURE, (), None, SIZE))
    with pytest.raises(DataError, match="cannot be written as JSON"):
        save_network(tmp_path, Network(nn.Linear(2, 2), ARCHITECTURE, ({"type": {1}},), None, SIZE))
    assert not list(tmp_path.iterdir())
