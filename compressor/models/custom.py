"""Networks from outside: installed plugins, a factory named on the command line, a module handed over in Python.

Invariant: code is found by the name of an entry point or of a `--factory`, both given by whoever owns the machine,
never by a recipe; a module that was handed over is copied, not changed.
"""

import copy
import hashlib
import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from compressor.errors import RecipeError, did_you_mean

PLUGINS = "compressor.models"  # entry-point group: name -> callable(num_classes, **args) -> nn.Module
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class Own:
    """A caller's network.

    Attributes:
        name: For the report. `package.module:function` exactly where another process can import it by that name, else
            the qualified name of the class or function, without a colon.
        make: Number of classes -> a fresh network.
        module: The network itself where one was given; its head is made to fit the classes.
    """

    name: str
    make: Callable[[int], nn.Module]
    module: nn.Module | None = None


def own_network(model: nn.Module | Callable[[int], nn.Module] | Own) -> Own:
    """What `compress(model=...)` was given.

    Raises:
        RecipeError: neither a network nor a function that makes one.
    """
    if isinstance(model, Own):
        return model
    if isinstance(model, nn.Module):
        kind = type(model)
        given = model
        return Own(f"{kind.__module__}.{kind.__qualname__}", lambda _classes: copy.deepcopy(given), given)
    if not callable(model):
        raise RecipeError(
            f"compress(model=...): found {type(model).__name__}, needs an nn.Module, or a function that takes the "
            "number of classes and returns one"
        )
    module = getattr(model, "__module__", None) or type(model).__module__
    name = getattr(model, "__qualname__", None) or type(model).__qualname__
    importable = f"{module}:{name}"
    try:
        same = module != "__main__" and load_factory(importable).make is model
    except RecipeError:
        same = False
    return Own(importable if same else f"{module}.{name}", model)


def load_factory(text: str) -> Own:
    """Import what `--factory package.module:function` names.

    Raises:
        RecipeError: there is no such module or function.
    """
    if not _FACTORY.fullmatch(text):
        raise RecipeError(f"--factory: found '{text:.100}', allowed package.module:function")
    module_name, _, path = text.partition(":")
    try:
        value: object = importlib.import_module(module_name)
    except ImportError as error:
        raise RecipeError(f"--factory: '{module_name}' cannot be imported ({error})") from error
    for part in path.split("."):
        if not hasattr(value, part):
            raise RecipeError(f"--factory: '{module_name}' has no '{path}'{did_you_mean(part, dir(value))}")
        value = getattr(value, part)
    if not callable(value):
        raise RecipeError(f"--factory: '{text}' is a {type(value).__name__}, not a function that returns a network")
    return Own(text, value)


def make_own(own: Own, classes: int) -> nn.Module:
    """A fresh network of a caller, as it comes.

    Raises:
        RecipeError: their function fails or returns something else.
    """
    return _made(lambda: own.make(classes), f"own network {own.name}")


def build_plugin(name: str, args: Mapping[str, object], num_classes: int) -> nn.Module:
    """Build a network that an installed package offers in the entry-point group `compressor.models`.

    Raises:
        RecipeError: no package offers it, two do, or it fails.
    """
    offered = importlib.metadata.entry_points(group=PLUGINS)
    found = {(point.name, point.value): point for point in offered if point.name == name}
    if not found:
        known = ", ".join(sorted(offered.names)) or f"none (no package has an entry point in '{PLUGINS}')"
        raise RecipeError(
            f"model.name: no plugin is called '{name}'; installed: {known}{did_you_mean(name, offered.names)}"
        )
    if len(found) > 1:
        values = " and ".join(sorted(value for _, value in found))
        raise RecipeError(f"model.name: two plugins are called '{name}': {values}; uninstall one")
    (point,) = found.values()
    try:
        function = point.load()
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"model.name: plugin '{name}' ({point.value}) cannot be imported ({error})") from error
    return _made(lambda: function(num_classes, **args), f"model.name: plugin '{name}' ({point.value})")


def _made(make: Callable[[], object], what: str) -> nn.Module:
    try:
        module = make()
    except Exception as error:  # whatever foreign code raises
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise RecipeError(f"{what} cannot be built ({reason})") from error
    if not isinstance(module, nn.Module):
        raise RecipeError(f"{what}: found {type(module).__name__}, needs a torch.nn.Module")
    return module


def tensors_digest(module: nn.Module) -> str:
    """sha256 of every tensor of the state, with names, shapes and types."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        if isinstance(value, torch.Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}\0".encode())
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def identity(module: nn.Module) -> str:
    """sha256 of what a foreign network is: its modules, the source of its own classes, its tensors."""
    digest = hashlib.sha256(repr(module).encode())
    for kind in sorted(
        {type(layer) for layer in module.modules()}, key=lambda kind: (kind.__module__, kind.__qualname__)
    ):
        digest.update(f"{kind.__module__}.{kind.__qualname__}\0".encode())
        if kind.__module__.partition(".")[0] not in ("torch", "timm", "torchvision"):  # versions stand for those
            try:
                digest.update(inspect.getsource(kind).encode())
            except (OSError, TypeError):  # typed at a prompt: only its name and modules are known
                continue
    digest.update(tensors_digest(module).encode())
    return digest.hexdigest()
