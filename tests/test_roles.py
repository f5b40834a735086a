"""Layers addressed by what they are: the same words for networks whose names have nothing in common."""

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import RecipeError
from compressor.models.xception import xception
from compressor.models.zoo import import_timm
from compressor.pruning.groups import resolve_scope
from compressor.pruning.roles import find_roles, named_layers

EXAMPLE = torch.zeros(1, 3, 64, 64)


def test_xception_has_a_stem_a_head_and_four_strides() -> None:
    roles = find_roles(xception(10), EXAMPLE)
    assert roles["stem"] == {"conv1", "bn1"}
    assert roles["head"] == {"fc"}
    assert {f"block{i}" for i in range(4, 12)} <= roles["stride16"]
    assert "block12" not in roles["stride16"]  # it ends at stride 32
    assert {"conv3", "conv3.pointwise", "bn4", "conv4"} <= roles["stride32"]
    assert roles["body"] >= roles["stride2"] | roles["stride4"] | roles["stride16"] | roles["stride32"]


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "densenet121", "convnext_atto"])
def test_every_layer_has_one_place(name: str) -> None:
    network = import_timm()[0].create_model(name, num_classes=7)
    roles = find_roles(network, EXAMPLE)
    layers = {n for n, layer in network.named_modules() if next(layer.parameters(recurse=False), None) is not None}
    leaves = {role: names & layers for role, names in roles.items()}
    assert leaves["stem"] | leaves["body"] | leaves["head"] == layers
    assert len(leaves["stem"]) + len(leaves["body"]) + len(leaves["head"]) == len(layers)
    strides = [names for role, names in leaves.items() if role.startswith("stride")]
    assert set().union(*strides) == leaves["body"]
    assert sum(map(len, strides)) == len(leaves["body"])
    (classifier,) = (
        n for n, layer in network.named_modules() if isinstance(layer, nn.Linear) and layer.out_features == 7
    )
    assert classifier in leaves["head"]


def test_what_works_on_pooled_values_in_between_is_no_head() -> None:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.gate = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 1)
            self.b, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(self.stem(x))
            x = self.b(x * self.gate(x.mean((2, 3), keepdim=True)))
            return self.fc(x.mean((2, 3)))

    roles = find_roles(Squeezed(), EXAMPLE)
    assert roles["stride4"] == {"a", "gate", "b"}
    assert roles["head"] == {"fc"}


def test_roles_stand_beside_globs_and_unknown_ones_are_named() -> None:
    network = xception(10)
    assert resolve_scope(network, ["role:head", "block1"], where="s", example=EXAMPLE) >= {"fc", "block1.skip"}
    with pytest.raises(
        RecipeError, match=r"s\[1\]: no layer has 'role:heat'; .*role:stride16.*did you mean 'role:head'"
    ):
        resolve_scope(network, ["fc", "role:heat"], where="s", example=EXAMPLE)
    assert named_layers(network, ["block1", "role:head"], EXAMPLE) == ["block1", "fc"]


def test_looking_changes_nothing() -> None:
    network = xception(10).train()
    find_roles(network, EXAMPLE)
    assert all(layer.training for layer in network.modules())
    assert int(network.get_buffer("bn1.num_batches_tracked")) == 0
