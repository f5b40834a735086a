"""A network saved in version 1 of the format keeps opening: the files here are never written again."""

import json
from pathlib import Path

import torch
from test_models import picture

from compressor.checkpoint import load_network

SAVED = Path(__file__).parent / "saved_v1"


def test_a_pruned_network_of_version_1_opens_and_gives_the_same_outputs() -> None:
    expected = torch.tensor(json.loads((SAVED / "logits.json").read_text()))
    network = load_network(SAVED)
    assert [edit["type"] for edit in network.edits] == ["prune"]
    assert network.architecture == {"source": "builtin", "name": "xception", "args": {}, "num_classes": 4}
    assert network.module.get_submodule("conv1").weight.shape[0] == 8  # type: ignore[union-attr,index]
    with torch.no_grad():
        logits = network.module(picture(64))[0]
    scale = float(expected.max() - expected.min())
    assert scale > 0.05, "figures that would not tell one network from another prove nothing"
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * scale)
