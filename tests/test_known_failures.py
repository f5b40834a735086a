"""Failures that users of other tools report most, each guarded here by a test of its own."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from separable_network import LABELS, SPEC, SeparableNetwork, normalised, pictures, trained, varied
from torch import Tensor, nn

from compressor.checkpoint import MODEL_JSON, Network, load_network, save_network
from compressor.export import publish_int8
from compressor.folding import fold_batchnorm
from compressor.models.counting import count
from compressor.models.xception import Block
from compressor.parity import ir_logits, onnx_logits, torch_logits
from compressor.pruning.apply import apply_plan, mask_plan
from compressor.pruning.groups import find_groups, resolve_scope
from compressor.pruning.importance import score_groups
from compressor.pruning.plan import PrunePlan, decide_plan
from compressor.quantization import load_quantized, quantize
from compressor.runtime import F32

TESTS = Path(__file__).resolve().parent
EXAMPLE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def plan_of(
    module: nn.Module,
    *,
    ratio: float = 0.5,
    ignored: tuple[str, ...] = (),
    ranking: str = "local",
    round_to: int = 1,
    min_channels: int = 1,
) -> PrunePlan:
    groups = find_groups(module, EXAMPLE, ignored=resolve_scope(module, ignored, where="ignored_scope"))
    return decide_plan(
        module,
        EXAMPLE,
        groups=groups,
        scores=score_groups(module, groups, kind="magnitude", loss_batches=None, seed=0),
        ranking=ranking,  # type: ignore[arg-type]
        pruning_ratio=ratio,
        round_to=round_to,
        min_channels=min_channels,
    )


def pruned(module: nn.Module, plan: PrunePlan) -> nn.Module:
    """The network cut as planned; it gives what the masked one gives, with as many outputs as before."""
    masked, cut = copy.deepcopy(module), copy.deepcopy(module)
    mask_plan(masked, plan, EXAMPLE)
    apply_plan(cut, plan, EXAMPLE)
    with torch.no_grad():
        expected, output, whole = masked(EXAMPLE), cut(EXAMPLE), module(EXAMPLE)
    assert output.shape == whole.shape
    assert float((output - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    return cut


def separable() -> nn.Module:
    return varied(SeparableNetwork())


def logits_range(values: np.ndarray) -> float:
    return float(np.ptp(values))


class Flattened(nn.Module):
    """Three convolutions whose last map is reshaped, positions and all, into a linear layer."""

    def __init__(self, *, view: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.conv2 = nn.Conv2d(8, 12, 3, 2, 1)
        self.pool = nn.AdaptiveAvgPool2d(3)
        self.fc1, self.fc2 = nn.Linear(108, 20), nn.Linear(20, 5)
        self.view = view

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.conv2(torch.relu(self.conv1(x)))))
        x = x.reshape(len(x), -1) if self.view else x.flatten(1)
        return self.fc2(torch.relu(self.fc1(x)))


class Tied(nn.Module):
    """Two convolutions share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.second.weight = self.first.weight
        self.middle = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.middle(torch.relu(self.second(x)))).mean((2, 3)))


def test_depthwise_layers_of_separable_blocks_are_pruned() -> None:
    """jacobgil/pytorch-pruning#34: pruning an Xception fails at its depthwise convolutions.

    They must go with the layer before, and stay depthwise: one filter for each channel that is left.
    """
    for module, layer in ((separable(), "second.depthwise"), (Block(16, 24, 2, 2).eval(), None)):
        network = module
        if layer is None:
            network = nn.Sequential(
                nn.Conv2d(3, 16, 3), module, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4)
            )
            layer = "1.rep.4.conv1"
        before = network.eval().get_submodule(layer)
        after = pruned(network, plan_of(network)).get_submodule(layer)
        assert isinstance(before, nn.Conv2d)
        assert isinstance(after, nn.Conv2d)
        assert after.groups == after.in_channels == after.out_channels == before.groups // 2


def test_residual_streams_are_pruned() -> None:
    """nncf#588: layers whose outputs are added are left unpruned.

    The stream goes as one decision, in every layer that writes or reads it.
    """
    module = separable()
    cut = pruned(module, plan_of(module))
    widths = {cut.get_submodule(name).out_channels for name in ("stem", "first.pointwise")}
    assert widths == {8}
    assert cut.get_submodule("third.pointwise").out_channels == 16
    assert cut.get_submodule("head").in_features == 16


@pytest.mark.parametrize("view", [False, True])
def test_a_channel_is_followed_through_flatten_and_reshape(view: bool) -> None:
    """Torch-Pruning#125: after a reshape the wrong columns of the linear layer go."""
    module = Flattened(view=view).eval()
    plan = plan_of(module)
    if "conv2" not in plan.keep:
        assert view, "flatten can be followed"
        assert plan.skipped["conv2"]
        pruned(module, plan)
        return
    cut = pruned(module, plan)
    assert cut.get_submodule("conv2").out_channels == 6
    assert cut.get_submodule("fc1").in_features == 6 * 9


def test_an_ignored_layer_keeps_its_filters_and_reads_fewer() -> None:
    """Torch-Pruning#341: ignored layers are pruned all the same, or block their neighbours.

    Its own outputs stay; what is before it may shrink, and then it reads less.
    """
    module = separable()
    plan = plan_of(module, ignored=("second.pointwise",))
    cut = pruned(module, plan)
    layer = cut.get_submodule("second.pointwise")
    assert (layer.in_channels, layer.out_channels) == (8, 32)
    assert any("ignored_scope" in reason for reason in plan.skipped.values())


RELOAD = """
import sys
from pathlib import Path
import numpy as np, torch
assert "pickle" not in str(sorted(p.name for p in Path(sys.argv[1]).iterdir()))
from separable_network import SeparableNetwork
from compressor.checkpoint import load_network
network = load_network(Path(sys.argv[1]), SeparableNetwork())
with torch.no_grad():
    np.save(sys.argv[3], network.module(torch.from_numpy(np.load(sys.argv[2]))).numpy())
"""


def test_a_pruned_network_reloads_in_a_fresh_process_without_pickle(tmp_path: Path) -> None:
    """Torch-Pruning#139, #428, #436: pruned models cannot be saved and loaded but as a pickle of the whole object."""
    module = separable()
    plan = plan_of(module)
    cut = pruned(module, plan)
    edits = ({"type": "prune", "plan": plan.to_dict()},)
    architecture = {"source": "custom", "name": "separable", "args": {}, "num_classes": 6}
    save_network(tmp_path / "saved", Network(cut, architecture, edits, None, (3, 32, 32)))
    assert sorted(path.suffix for path in (tmp_path / "saved").iterdir()) == [".json", ".safetensors"]
    np.save(tmp_path / "x.npy", EXAMPLE.numpy())
    search = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    threads = str(torch.get_num_threads())
    subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path / "saved"), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")],
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": threads},
        check=True,
    )
    with torch.no_grad():
        expected = cut(EXAMPLE).numpy()
    assert np.abs(np.load(tmp_path / "y.npy") - expected).max() <= 1e-6 * logits_range(expected)


@pytest.mark.parametrize("round_to", [16, 32, 64])
def test_a_group_too_narrow_for_round_to_is_named(round_to: int) -> None:
    """Torch-Pruning#417, #448: a group with no more channels than round_to is skipped without a word.

    Every group is either pruned or listed with the reason.
    """
    module = separable()
    groups = {group.name for group in find_groups(module, EXAMPLE, ignored=())}
    plan = plan_of(module, round_to=round_to, min_channels=round_to)
    assert groups == plan.keep.keys() | plan.skipped.keys()
    narrow = [reason for reason in plan.skipped.values() if f"round_to {round_to}" in reason]
    assert bool(narrow), "the stem's 16 channels leave nothing to remove"
    pruned(module, plan)


@pytest.mark.parametrize("ignored", [(), ("head",)])
def test_the_classifier_keeps_its_outputs(ignored: tuple[str, ...]) -> None:
    """Torch-Pruning 1.6: `ignored_layers=[nn.Linear]`, a type, is dropped silently and the classifier loses outputs.

    Outputs of the network are never pruned, ignored or not; something that names no module is an error.
    """
    module = separable()
    cut = pruned(module, plan_of(module, ratio=0.9, ignored=ignored))
    assert cut.get_submodule("head").out_features == len(LABELS)
    with pytest.raises(Exception, match="matches no module"):
        plan_of(module, ignored=("Linear",))


def test_attributes_tell_the_truth_after_pruning() -> None:
    """Torch-Pruning 1.6: `num_features`, `out_channels` and `groups` go stale and mislead what reads them."""
    module = separable()
    cut = pruned(module, plan_of(module))
    for name, layer in cut.named_modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.shape[:2] == (layer.out_channels, layer.in_channels // layer.groups), name
        elif isinstance(layer, nn.BatchNorm2d):
            assert len(layer.weight) == len(layer.running_mean) == layer.num_features, name  # type: ignore[arg-type]
        elif isinstance(layer, nn.Linear):
            assert layer.weight.shape == (layer.out_features, layer.in_features), name


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.999])
def test_a_global_ranking_empties_no_group(ratio: float) -> None:
    """Torch-Pruning 1.6: where a global ranking takes a whole group, the group is skipped and the ratio missed.

    A group whose channels all score lowest keeps `min_channels`.
    """
    module = separable()
    with torch.no_grad():
        for name in ("second.pointwise.weight", "second.bn.weight"):
            module.get_parameter(name).mul_(1e-6)
    plan = plan_of(module, ratio=ratio, ranking="global", min_channels=2)
    assert all(len(kept) >= 2 for kept in plan.keep.values())
    pruned(module, plan)


def test_importance_uses_every_sample() -> None:
    """Torch-Pruning 1.6: GroupHessianImportance keeps only the last sample's gradients.

    The score over all batches is the mean of the scores of each, whatever their order.
    """
    module = separable()
    groups = find_groups(module, EXAMPLE, ignored=())
    generator = torch.Generator().manual_seed(2)
    batches = [(torch.randn(2, 3, 32, 32, generator=generator), torch.tensor([i, i + 1])) for i in range(3)]

    def scored(chosen: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        return score_groups(module, groups, kind="taylor", loss_batches=chosen, seed=0, normalise=False)

    together, backwards = scored(batches), scored(batches[::-1])
    each = [scored([batch]) for batch in batches]
    for name, score in together.items():
        assert torch.allclose(score, torch.stack([one[name] for one in each]).mean(0), rtol=1e-4)
        assert torch.allclose(score, backwards[name], rtol=1e-4)
        assert not torch.allclose(score, each[-1][name], rtol=1e-2)


def test_a_bare_sequential_is_quantized() -> None:
    """nncf 3.4: a quantized top-level nn.Sequential calls NNCF's hook storage as a layer and fails."""
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    quantized, config = quantize(module, [EXAMPLE])
    with torch.no_grad():
        output, float_output = quantized(EXAMPLE), module(EXAMPLE)
    assert 0 < float((output - float_output).abs().max()) <= 0.1 * float(float_output.abs().max())
    again = load_quantized(copy.deepcopy(module), json.loads(json.dumps(config)), EXAMPLE)
    again.load_state_dict(quantized.state_dict())
    with torch.no_grad():
        assert torch.equal(again(EXAMPLE), output)


@pytest.fixture(scope="module")
def retrained() -> nn.Module:
    """A trained network, folded, quantized and then trained on (QAT)."""
    module = trained()
    images = pictures(64, seed=5)
    x = normalised(images)
    fold_batchnorm(module, x[:1])
    quantized, _ = quantize(module, list(x.split(8)))
    optimizer = torch.optim.SGD(quantized.parameters(), lr=1e-3)
    with torch.no_grad():
        before = quantized(x)
    for _ in range(3):
        nn.functional.cross_entropy(quantized.train()(x), torch.arange(64) % len(LABELS)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert not torch.equal(quantized.eval()(x), before)
    return quantized


def test_int8_depthwise_runs_in_onnxruntime_and_training_survives_export(retrained: nn.Module, tmp_path: Path) -> None:
    """nncf 3.4 gives depthwise inputs a range per channel, which onnxruntime refuses; exports drop what QAT learned.

    The Q/DQ ONNX runs in onnxruntime, and it and the INT8 IR compute what the fake-quantized network computes.
    """
    files = publish_int8(retrained, SPEC, LABELS, tmp_path / "int8")
    assert files.onnx is not None
    images = pictures(64, seed=9)
    expected = torch_logits(retrained, images, SPEC)
    for logits in (onnx_logits(files.onnx, images), ir_logits(files.xml, images, F32)):
        noise = np.square(logits - expected).mean()
        assert 10 * np.log10(expected.var(0).mean() / noise) >= 25, "dB of signal"


def test_shared_weights_are_refused_by_name_and_not_broken() -> None:
    """Layers that share a parameter: cutting one silently cuts, or unties, the other."""
    module = Tied().eval()
    plan = plan_of(module)
    assert any("share a parameter" in reason for reason in plan.skipped.values())
    cut = pruned(module, plan)
    assert cut.get_submodule("first").weight is cut.get_submodule("second").weight
    assert cut.get_submodule("middle").out_channels == 8


def test_steps_of_iterative_pruning_are_replayed_once_each(tmp_path: Path) -> None:
    """Torch-Pruning 1.6: interactive pruning records its history twice, and the replay cuts twice."""
    module = separable()
    edits = []
    for ratio in (0.25, 0.3, 0.5):
        plan = plan_of(module, ratio=ratio)
        module = pruned(module, plan)
        edits.append({"type": "prune", "plan": plan.to_dict()})
    architecture = {"source": "custom", "name": "separable", "args": {}, "num_classes": 6}
    save_network(tmp_path, Network(module, architecture, tuple(edits), None, (3, 32, 32)))
    assert len(json.loads((tmp_path / MODEL_JSON).read_text())["edits"]) == 3
    again = load_network(tmp_path, SeparableNetwork()).module
    assert count(again, EXAMPLE) == count(module, EXAMPLE)
    with torch.no_grad():
        assert torch.equal(again(EXAMPLE), module(EXAMPLE))
