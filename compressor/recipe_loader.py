"""Load a recipe file: parents merged in, `--set` applied, validated; and write one out again.

Invariant: either a valid recipe comes back, or one RecipeError that lists everything wrong, each with file and line.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressor import strict_yaml
from compressor.errors import RecipeError, did_you_mean
from compressor.recipe import Recipe, custom_model
from compressor.recipe_faults import found, validate
from compressor.recipe_schema import json_schema, schema_of_recipes, schema_text
from compressor.strict_yaml import KeyPath, format_path, parse_path

__all__ = ["Loaded", "json_schema", "load_recipe", "recipe_hash", "resolved_yaml", "schema_text"]

MAX_PARENTS = 8
MAX_FAULTS_SHOWN = 40
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Loaded:
    """A recipe and where each part of it was written."""

    recipe: Recipe
    path: Path
    text: str  # the file as written, comments included
    lines: Mapping[str, str]  # key path -> "file:line", or "--set"
    files: tuple[Path, ...]  # the recipe, its parent, the parent's parent, ...
    overrides: tuple[str, ...] = ()

    def where(self, key_path: str) -> str:
        """Return `file:line` of a key, or of the nearest key around it, for messages about it."""
        path = parse_path(key_path)
        for length in range(len(path), 0, -1):
            if place := self.lines.get(format_path(path[:length])):
                return place
        return f"{self.path}:1"


@dataclass
class _Sources:
    """What has been read so far."""

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    faults: list[tuple[str, KeyPath, str]] = field(default_factory=list)  # place, key path, text
    unreadable: bool = False

    def place(self, path: KeyPath) -> str:
        for length in range(len(path), 0, -1):
            if place := self.places.get(path[:length]):
                return place
        return f"{self.files[0]}:1"


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = (), *, own_model: str | None = None) -> Loaded:
    """Load, merge, override and validate a recipe.

    Args:
        path: The recipe file.
        overrides: `PATH=VALUE` texts such as `stages[1].epochs=3`; the value is YAML.
        own_model: Name of a network that was given beside the recipe; it replaces the `model` section.

    Raises:
        RecipeError: The file cannot be read or anything in it is wrong; one line `file:line: key.path: ...` per fault.
    """
    sources = _Sources()
    _read_chain(Path(path), sources)
    for text in overrides:
        _override(sources, text)
    if own_model is not None and not sources.unreadable:
        sources.data["model"] = custom_model(own_model, sources.data.get("model"))
    recipe = None
    if not sources.unreadable:
        recipe, faults = validate(sources.data)
        spoilt = {fault_path for _, fault_path, _ in sources.faults}
        for fault_path, text in faults:
            # A value that could not be read was left out; what follows from its absence is no fault of its own.
            if not any(fault_path[:length] in spoilt for length in range(1, len(fault_path) + 1)):
                sources.faults.append((sources.place(fault_path), fault_path, text))
    if sources.faults or recipe is None:
        raise RecipeError(_fault_lines(sources))
    lines = {format_path(key): place for key, place in sources.places.items()}
    return Loaded(recipe, Path(path), sources.texts[0], lines, tuple(sources.files), tuple(overrides))


def _fault_lines(sources: _Sources) -> str:
    def order(fault: tuple[str, KeyPath, str]) -> tuple[bool, str, int]:
        name, _, line = fault[0].rpartition(":")
        return name != str(sources.files[0]), name, int(line) if line.isdigit() else 0

    lines = [
        f"{place}: {format_path(path)}: {text}" if path else f"{place}: {text}"
        for place, path, text in sorted(sources.faults, key=order)
    ]
    more = len(lines) - MAX_FAULTS_SHOWN
    return "\n".join([*lines[:MAX_FAULTS_SHOWN], *[f"... and {more} more faults"] * (more > 0)])


def _read_chain(path: Path, sources: _Sources) -> None:
    """Read a recipe and its parents, then merge from the oldest down."""
    documents: list[tuple[dict[str, Any], dict[KeyPath, str]]] = []
    place = ""  # where `path` was named
    while True:
        content = _read(path)
        if isinstance(content, str):
            if not place:
                raise RecipeError(f"{path}: {content}")
            sources.faults.append((place, ("extends",), f"found {str(path)!r}, which {content}"))
            break
        if os.path.realpath(path) in [os.path.realpath(file) for file in sources.files]:
            cycle = " -> ".join(str(file) for file in [*sources.files, path])
            sources.faults.append((place, ("extends",), f"found a cycle: {cycle}"))
            break
        if len(sources.files) > MAX_PARENTS:
            sources.faults.append((place, ("extends",), f"found more than {MAX_PARENTS} parents in a row"))
            break
        sources.files.append(path)
        sources.texts.append(content.decode("utf-8-sig", errors="replace"))
        document = strict_yaml.parse(content)
        for fault in document.faults:
            sources.faults.append((f"{path}:{fault.line}", fault.path, fault.text))
            sources.unreadable |= not fault.path
        data = document.value
        if not isinstance(data, dict):
            if not document.faults:
                allowed = ", ".join(schema_of_recipes().keys_at((), {}))
                text = f"found {found(data)}, allowed a mapping with keys of {allowed}"
                sources.faults.append((f"{path}:1", (), text))
            sources.unreadable = True
            break
        documents.append((data, {key: f"{path}:{line}" for key, line in document.lines.items()}))
        parent = data.pop("extends", None)
        place = documents[-1][1].get(("extends",), f"{path}:1")
        if parent is None:
            break
        if not isinstance(parent, str) or not parent.endswith(SUFFIXES):
            allowed = f"the path of a parent recipe ending in {' or '.join(SUFFIXES)}, or null"
            sources.faults.append((place, ("extends",), f"found {found(parent)}, allowed {allowed}"))
            break
        path = Path(os.path.normpath(path.parent / parent))
    # Half a chain would only add faults about keys that the missing parent may well have.
    sources.unreadable |= any(path == ("extends",) for _, path, _ in sources.faults)
    for data, places in reversed(documents):
        replaced: set[KeyPath] = set()
        _merge(sources.data, data, (), replaced)
        kept = {
            key: value
            for key, value in sources.places.items()
            if not any(key[:length] in replaced for length in range(1, len(key) + 1))
        }
        sources.places = kept | places


def _merge(base: dict[str, Any], over: Mapping[str, Any], path: KeyPath, replaced: set[KeyPath]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value, (*path, key), replaced)
        else:
            replaced.add((*path, key))
            base[key] = value


def _read(path: Path) -> bytes | str:
    """Return the file's bytes (one more than allowed, so that the parser sees the excess), or why there are none."""
    if path.is_dir():
        return "is a folder; name a recipe file in it"
    if path.exists() and not path.is_file():
        return "is not a regular file"
    try:
        with path.open("rb") as file:
            return file.read(strict_yaml.MAX_BYTES + 1)
    except FileNotFoundError:
        folder = path.parent
        names = [file.name for file in folder.iterdir() if file.suffix in SUFFIXES] if folder.is_dir() else []
        stems = {name.rsplit(".", 1)[0]: name for name in names}
        near = did_you_mean(path.name, names) or did_you_mean(path.stem, stems)
        for name in (near.split("'")[1],) if near else ():
            return f"does not exist; did you mean '{folder / stems.get(name, name)}'?"
        return "does not exist"
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def _override(sources: _Sources, text: str) -> None:
    """Put one `PATH=VALUE` into the merged data."""
    name, equals, value_text = text.partition("=")

    def refuse(reason: str, path: KeyPath = ()) -> None:
        sources.faults.append(("--set", path, reason))

    try:
        path = parse_path(name.strip())
    except ValueError as error:
        return refuse(f"found {text!r:.100}, allowed PATH=VALUE: {error}")
    if not equals:
        return refuse(f"found {text!r:.100}, allowed PATH=VALUE such as {name}=3")
    if path[0] == "extends":
        return refuse("is fixed by the file and cannot be set", path)
    document = strict_yaml.parse(value_text) if value_text.strip() else strict_yaml.Document(None, {}, ())
    if document.faults:
        return refuse(f"found {value_text!r:.100}: {document.faults[0].text}", path)
    target: Any = sources.data
    for index, part in enumerate(path):
        here = path[: index + 1]
        if isinstance(part, int):
            if not isinstance(target, list):
                near = (
                    did_you_mean(str(path[index - 1]), schema_of_recipes().keys_at(path[: index - 1], sources.data))
                    if index
                    else ""
                )
                return refuse(f"found no list at {format_path(path[:index])} to take item {part} of{near}", path)
            if part >= len(target):
                items = (
                    f"{format_path(path[:index])} has items 0 to {len(target) - 1}" if target else "the list is empty"
                )
                return refuse(f"found no item {part}; {items}", path)
        elif not isinstance(target, dict):
            return refuse(f"found {found(target)} at {format_path(path[:index])}, which has no keys to set", path)
        if index == len(path) - 1:
            target[part] = document.value
        elif isinstance(part, str) and target.get(part) is None and isinstance(path[index + 1], str):
            target[part] = {}  # setting `distill.weight` turns on distillation
            sources.places[here] = "--set"
        target = target.get(part) if isinstance(target, dict) else target[part]
    sources.places = {key: place for key, place in sources.places.items() if key[: len(path)] != path}
    sources.places |= {(*path, *key): "--set" for key in document.lines} | {path: "--set"}
    return None


def _canonical(recipe: Recipe) -> dict[str, Any]:
    data = recipe.model_dump(mode="json", exclude={"extends"})
    data["stages"] = [{"type": stage["type"], **stage} for stage in data["stages"]]
    return data


def resolved_yaml(recipe: Recipe) -> str:
    """Return the recipe with every default written out; loading it gives an equal recipe."""
    return strict_yaml.dump(_canonical(recipe))


def recipe_hash(recipe: Recipe) -> str:
    """Return the sha256 of the resolved recipe as canonical JSON; layout, comments and `extends` do not count."""
    text = json.dumps(_canonical(recipe), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
