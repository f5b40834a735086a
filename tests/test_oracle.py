"""The oracle: cutting channels out equals masking them, on random networks, in double precision."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_networks import KINDS, RandomNetwork, Spec, specs

from compressor.models.counting import count
from compressor.pruning.apply import apply_plan, mask_plan
from compressor.pruning.groups import find_groups
from compressor.pruning.plan import PrunePlan
from compressor.pruning.surgery import kept_cost, removed_channels

OUTPUTS = "its channels are outputs of the network"


def check(spec: Spec, seed: int) -> None:
    network = RandomNetwork(spec)
    example = torch.randn(
        2, 3, spec.size, spec.size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    before = copy.deepcopy(network.state_dict())
    groups = find_groups(network, example, ignored=())
    # No group may be given up because tracing failed: that would make the test pass on nothing.
    assert {group.reason for group in groups if not group.prunable} <= {OUTPUTS}
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in groups:
        if group.prunable:
            kept = int(torch.randint(1, group.channels + 1, (1,), generator=generator))
            keep[group.name] = tuple(sorted(torch.randperm(group.channels, generator=generator)[:kept].tolist()))
    plan = PrunePlan(keep, {group.name: group.channels for group in groups if group.prunable})

    cut, masked = copy.deepcopy(network), copy.deepcopy(network)
    apply_plan(cut, plan, example)
    mask_plan(masked, plan, example)
    with torch.no_grad():
        expected, output = masked(example), cut(example)
        whole = network(example)
    scale = float(expected.abs().max())
    assert float((output - expected).abs().max()) <= 1e-9 * scale + 1e-12

    assert {n: p.shape for n, p in masked.named_parameters()} == {n: p.shape for n, p in network.named_parameters()}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert output.shape == whole.shape
    counts = count(cut, example)
    removed = {side: len(indices) for side, indices in removed_channels(groups, keep).items()}
    assert kept_cost(network, count(network, example).per_layer, removed) == (counts.macs, counts.params)


@settings(max_examples=140, suppress_health_check=[HealthCheck.too_slow])
@given(spec=specs(), seed=st.integers(0, 2**16))
def test_cutting_equals_masking(spec: Spec, seed: int) -> None:
    check(spec, seed)


@pytest.mark.parametrize("seed", [0, 2])
def test_groups_of_equal_size_that_only_seem_independent_are_told_apart(seed: int) -> None:
    # Flattened with its positions, this concatenation is easily misread (Torch-Pruning 1.6.1 does), and cutting equally
    # many channels of both parts hides it.
    check(Spec(("concat_residual",), (4, 4), True, True, "relu", "flatten", 6, 0), seed)


def test_every_kind_of_coupling_is_exercised() -> None:
    for seed, kind in enumerate(KINDS):
        for norm in (False, True):
            check(Spec((kind, "plain", kind), (8, 8, 6, 4), norm, norm, "relu", "flatten", 6, seed), seed)
