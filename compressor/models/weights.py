"""Where pretrained weights come from and how they are loaded.

Invariant: a network is asked only when the caller says so; what did not load is always listed.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from safetensors import safe_open
from torch import Tensor, nn

from compressor.artifacts import sha256_of, write_via
from compressor.download import open_url
from compressor.environment import weights_dir
from compressor.errors import RecipeError, ResourceError, did_you_mean
from compressor.models import HEADS

log = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".pth", ".pt")
# ImageNet weights by architecture name: hub id of the original TensorFlow weights in timm's naming.
HUB_IDS = {"xception": "timm/legacy_xception.tf_in1k"}


@dataclass(frozen=True)
class WeightsReport:
    """What loading did. `reinitialised` are tensors of the file whose shape the network does not have (the head)."""

    source: str
    sha256: str | None
    loaded: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reinitialised: tuple[str, ...]
    head_loaded: bool = False
    notes: tuple[str, ...] = ()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a `.safetensors` file, or a `.pth`/`.pt` file with `weights_only=True` (never unpickled freely).

    Raises:
        ResourceError: no such file, or a file that is not what its name says.
    """
    if not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise ResourceError(f"{path}: no such weights file{near}")
    if path.suffix not in SUFFIXES:
        raise ResourceError(f"{path}: '{path.suffix}' is not supported; allowed: {', '.join(SUFFIXES)}")
    try:
        content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except Exception as error:  # a damaged pickle makes torch raise nearly anything: KeyError, IndexError, ...
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ResourceError(f"{path}: not a readable weights file ({reason})") from error
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        raise ResourceError(f"{path}: found {type(content).__name__}, expected a state dict of tensors")
    return dict(content)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def _read_pickle(path: Path) -> Any:
    content = torch.load(path, map_location="cpu", weights_only=True)
    return content.get("state_dict", content) if isinstance(content, dict) else content


def load_into(
    model: nn.Module, tensors: Mapping[str, Tensor], *, head: str, source: str, sha256: str | None
) -> WeightsReport:
    """Copy `tensors` into `model`; only the head may differ in shape and then keeps its fresh initialisation.

    Raises:
        RecipeError: the file belongs to another architecture (a body tensor is missing or has another shape).
    """
    own = model.state_dict()
    missing = [k for k in own if k not in tensors and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in tensors if k not in own]
    misshapen = [k for k in own if k in tensors and tensors[k].shape != own[k].shape]
    in_head = (head + ".",)
    wrong = [k for k in missing + misshapen if not k.startswith(in_head)]
    if wrong:
        shown = ", ".join(wrong[:5])
        raise RecipeError(
            f"model.weights: {source} does not fit the network: {len(wrong)} tensors missing or of another shape "
            f"({shown}{', ...' if len(wrong) > 5 else ''}); {len(unexpected)} tensors of the file are unknown"
        )
    usable = {k: v for k, v in tensors.items() if k in own and k not in misshapen}
    model.load_state_dict({k: v.to(own[k].dtype) for k, v in usable.items()}, strict=False)
    head_loaded = any(k.startswith(in_head) for k in usable) and not missing and not misshapen
    return WeightsReport(source, sha256, len(usable), tuple(missing), tuple(unexpected), tuple(misshapen), head_loaded)


def load_weights(
    model: nn.Module,
    *,
    name: str,
    weights: str,
    download: bool = False,
    fallback: str | None = None,
) -> WeightsReport:
    """Load what `model.weights` asks for: `imagenet`, a path, or `none`.

    Args:
        model: freshly built network, changed in place.
        name: architecture name, decides the hub id and the head.
        weights: `imagenet`, `none`, or a path relative to the current folder.
        download: whether the hub may be asked.
        fallback: `none` allows random initialisation when `imagenet` is not at hand.
    """
    if weights == "none":
        return WeightsReport(
            "none", None, 0, tuple(model.state_dict()), (), (), notes=("random initialisation, as asked",)
        )
    if weights == "imagenet":
        path = imagenet_path(name)
        if not path.is_file() and download:
            fetch_weights(name)
        if not path.is_file():
            advice = (
                f"ImageNet weights for '{name}' are not in {path.parent}; ways on: `compress.py weights fetch {name}` "
                "where there is internet, model.weights_download: true, model.weights: PATH to a .safetensors file, "
                "or model.weights_fallback: none to train from random initialisation"
            )
            if fallback != "none":
                raise ResourceError(f"model.weights: {advice}")
            log.warning("TRAINING FROM RANDOM INITIALISATION: %s", advice)
            note = "ImageNet weights were not at hand: random initialisation (weights_fallback: none)"
            return WeightsReport("none", None, 0, tuple(model.state_dict()), (), (), notes=(note,))
    else:
        path = Path(weights).expanduser()
    report = load_into(model, read_tensors(path), head=HEADS[name], source=str(path), sha256=sha256_of(path))
    for kind, keys in (
        ("missing", report.missing),
        ("unexpected", report.unexpected),
        ("re-initialised", report.reinitialised),
    ):
        if keys:
            log.info("weights: %d %s: %s", len(keys), kind, ", ".join(keys[:8]))
    return report


def fetch_weights(name: str) -> Path:
    """Download ImageNet weights of `name` into `weights_dir()`; fails within about ten seconds when offline.

    Raises:
        RecipeError: no hub id is known for `name`.
        ResourceError: the hub cannot be reached or does not have the file.
    """
    if name not in HUB_IDS:
        known = ", ".join(HUB_IDS)
        raise RecipeError(f"weights fetch: '{name}' is not known; allowed: {known}{did_you_mean(name, HUB_IDS)}")
    from huggingface_hub import hf_hub_url

    # Not hf_hub_download: offline it retries for half a minute (huggingface_hub 2.4) and it caches in the home folder.
    url, target = hf_hub_url(HUB_IDS[name], "model.safetensors"), imagenet_path(name)

    def download(path: Path) -> None:
        with open_url(url) as response, path.open("wb") as file:
            shutil.copyfileobj(response, file)
        read_tensors(path)  # what a proxy or a login page sends is no weights file

    try:
        write_via(target, download)
    except (OSError, HTTPException, ResourceError) as error:
        if isinstance(error.__cause__, OSError):
            raise  # a full disk or a denied folder, told by `write_via`
        reason = error.reason if isinstance(error, URLError) else error
        raise ResourceError(
            f"weights fetch {name}: {url} could not be read ({reason}); "
            f"copy that file by hand to {target}, or give model.weights a path"
        ) from error
    return target


def imagenet_path(name: str) -> Path:
    """Where `weights: imagenet` looks for the weights of an architecture."""
    return weights_dir() / f"{name}_imagenet.safetensors"
