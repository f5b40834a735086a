"""What a shell offers when Tab is pressed: commands, options, shipped recipes, keys for `--set`.

Invariant: answers within a moment, so nothing heavy is imported; a broken recipe gives fewer offers, no error.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import argcomplete
import yaml
from argcomplete.completers import FilesCompleter
from argcomplete.shell_integration import shellcode

from compressor.shipped import recipes_dir, shipped

NAMES = ["compressor", "compress.py"]


def shell_code(shell: str) -> str:
    """What a shell reads to know how to ask."""
    return str(shellcode(NAMES, shell=shell)) + "\n"


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and end the process."""
    for command in _commands(parser):
        for action in command._actions:
            if action.dest in COMPLETERS:
                action.completer = COMPLETERS[action.dest]  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options=False)


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def recipe_files(prefix: str, **_: Any) -> list[str]:
    """YAML files, and in another folder than the checkout's the shipped recipes by their whole path."""
    found = list(FilesCompleter(("yaml", "yml"))(prefix))
    root = recipes_dir()
    if not (Path.cwd() / "recipes").exists() or prefix.startswith("/"):
        found += [str(path) for path in sorted(root.glob("*.yaml")) if str(path).startswith(prefix)]
    return found


def shipped_names(prefix: str, **_: Any) -> list[str]:
    """Names for `new`."""
    return [one.name for one in shipped() if one.name.startswith(prefix)]


def set_keys(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Key paths for `--set`, of the recipe that is named already: `stages[1].epochs=`."""
    if "=" in prefix:
        return []
    from compressor.explain import keys

    stages = _stages(getattr(parsed_args, "recipe", None))
    known = keys()
    kinds = {key.path for key in known if key.allowed == "a stage"}
    offers: list[str] = []
    for key in known:
        kind, dot, rest = key.path.partition(".")
        if kind in kinds:
            offers += [f"stages[{i}].{rest}=" for i, stage in enumerate(stages) if dot and stage == kind]
        elif key.path != "stages":
            offers.append(f"{key.path}=")
    return [offer for offer in offers if offer.startswith(prefix)]


def _stages(recipe: Path | None) -> list[str]:
    """Types of a recipe's stages; none where it cannot be read."""
    try:
        tree = yaml.safe_load(Path(recipe).read_text(encoding="utf-8")) if recipe else {}
        return [str(stage["type"]) for stage in tree["stages"]]
    except (OSError, yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError, RecursionError):
        return []


COMPLETERS = {"recipe": recipe_files, "study": recipe_files, "name": shipped_names, "overrides": set_keys}
