"""What a recipe's key means, from the schema that recipes are checked by.

Invariant: keys, types, defaults and meanings are the schema's own; examples are lines of shipped recipes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from compressor.errors import RecipeError, did_you_mean
from compressor.pages.rendering import as_yaml
from compressor.recipe_schema import json_schema, schema_of_recipes
from compressor.schema import SYNONYMS
from compressor.shipped import shipped

MISSING = object()


@dataclass(frozen=True)
class Key:
    """One key: its path (`prune.target.macs`: keys of stages stand under the stage's type), and what is said of it."""

    path: str
    description: str
    allowed: str
    default: Any
    required: bool


def keys() -> list[Key]:
    """Every key of a recipe, in the order of the schema."""
    root = json_schema()
    return list(_walk(root, root, ""))


def _walk(root: Mapping[str, Any], node: Mapping[str, Any], prefix: str) -> Iterator[Key]:
    required = node.get("required", ())
    for name, value in node.get("properties", {}).items():
        path = f"{prefix}.{name}" if prefix else name
        if name == "type" and prefix:
            continue  # it is what the stage's keys stand under
        inside = _resolved(root, value)
        description = str(value.get("description") or inside.get("description") or "")
        yield Key(
            path, description, schema_of_recipes().allowed(value), value.get("default", MISSING), name in required
        )
        if name == "stages" and not prefix:
            for kind, reference in root_stages(root).items():
                stage = _resolved(root, {"$ref": reference})
                yield Key(kind, str(stage.get("description", "")), "a stage", MISSING, False)
                yield from _walk(root, stage, kind)
        elif "properties" in inside:
            yield from _walk(root, inside, path)


def root_stages(root: Mapping[str, Any]) -> dict[str, str]:
    """Type of each stage to the place in the schema that describes it."""
    items = root["properties"]["stages"]["items"]
    mapping: dict[str, str] = _resolved(root, items)["discriminator"]["mapping"]
    return mapping


def _resolved(root: Mapping[str, Any], node: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a node refers to, or that one of its alternatives that has keys."""
    while "$ref" in node:
        node = root["$defs"][node["$ref"].rsplit("/", 1)[1]]
    for option in node.get("anyOf", ()):
        found = _resolved(root, option)
        if "properties" in found:
            return found
    return node


def explain(asked: str) -> list[Key]:
    """The keys that a path or its end names: `prune.round_to`, `round_to`, `stages[1].distill.weight`.

    Raises:
        RecipeError: There is no such key.
    """
    plain = asked.strip()
    while "[" in plain and "]" in plain:
        plain = plain[: plain.index("[")] + plain[plain.index("]") + 1 :]
    plain = plain.removeprefix("stages.") or plain
    known = keys()
    found = [key for key in known if key.path == plain]
    found = found or [key for key in known if key.path.endswith("." + plain)]
    if found:
        return found
    last = plain.rpartition(".")[2].lower().replace("-", "_")
    meant = SYNONYMS.get(last)
    ends = {key.path.rpartition(".")[2] for key in known}
    near = f"; did you mean '{meant}'?" if meant in ends else did_you_mean(plain, [key.path for key in known])
    raise RecipeError(f"'{asked}' is no key of a recipe{near or did_you_mean(last, ends)}")


def format_keys(found: list[Key]) -> str:
    """Lay keys out for people, with an example of each from the shipped recipes."""
    lines: list[str] = []
    for key in found:
        lines += [key.path, f"  {key.description}"] if key.description else [key.path]
        lines.append(f"  allowed: {key.allowed}")
        if key.required:
            lines.append("  required")
        elif key.default is not MISSING:
            lines.append(f"  default: {as_yaml(key.default)}")
        if example := example_of(key.path):
            lines.append(f"  example: {example}")
    return "\n".join(lines)


def as_markdown() -> str:
    """All keys as a page: `docs/keys.md`."""
    lines = [
        "# Keys of a recipe",
        "",
        "Made by `python compress.py explain --markdown`; keys of a stage stand under its type.",
    ]
    for key in keys():
        if "." not in key.path and (key.allowed == "a stage" or key.path == "version"):
            lines += ["", f"## {key.path}"] if key.allowed == "a stage" else ["", "## Top level"]
        allowed = "" if key.allowed == "a stage" else f" *{key.allowed}*"
        default = "" if key.default is MISSING else f" Default: `{as_yaml(key.default)}`."
        required = " Required." if key.required else ""
        lines += ["", f"`{key.path}`{allowed}{'.' if allowed else ''}{default}{required} {key.description}".rstrip()]
    return "\n".join(lines) + "\n"


def example_of(path: str) -> str | None:
    """The first value that a shipped recipe gives a key, and in which."""
    for one in shipped():
        tree = yaml.safe_load(one.path.read_text(encoding="utf-8"))
        for value in _values(tree, path.split(".")):
            if not isinstance(value, dict | list):
                return f"{path.rpartition('.')[2]}: {as_yaml(value)}    # {one.name}"
    return None


def _values(tree: Any, parts: list[str]) -> Iterator[Any]:
    """What stands at a path; a first part that is a stage's type is looked for among the stages."""
    starts = [tree]
    if isinstance(tree, dict) and parts[0] not in tree:
        stages = [stage for stage in tree.get("stages") or () if isinstance(stage, dict)]
        starts = [stage for stage in stages if stage.get("type") == parts[0]]
        parts = parts[1:]
    for start in starts:
        value: Any = start
        for part in parts:
            value = value.get(part, MISSING) if isinstance(value, dict) else MISSING
        if value is not MISSING and parts:
            yield value
