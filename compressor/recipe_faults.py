"""Turn what pydantic and the rules find wrong with a recipe's plain data into sentences people can act on.

Invariant: every fault names its key path, what was found, what is allowed, and the nearest match where there is one.
"""

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from compressor.recipe import Recipe
from compressor.recipe_rules import broken_rules
from compressor.recipe_schema import schema_of_recipes
from compressor.schema import Schema, suggest
from compressor.strict_yaml import KeyPath, format_path

# A hostile recipe can break a rule in every one of thousands of values; nobody reads more than a screen of faults.
MAX_ERRORS = 200


def validate(data: object) -> tuple[Recipe | None, list[tuple[KeyPath, str]]]:
    """Validate plain data; return the recipe, or all that is wrong as pairs of key path and text."""
    schema = schema_of_recipes()
    if not isinstance(data, dict):
        return None, [((), f"found {found(data)}, allowed a mapping with keys of {', '.join(schema.keys_at((), {}))}")]
    try:
        return Recipe.model_validate(data), []
    except ValidationError as error:
        faults = explain(error, data, schema)
    faults += broken_rules(data)
    return None, _without_echoes(dict.fromkeys(faults))


def explain(error: ValidationError, data: dict[str, Any], schema: Schema) -> list[tuple[KeyPath, str]]:
    """All that pydantic found wrong with plain data, as pairs of key path and text.

    Args:
        error: What it raised.
        data: What it was given.
        schema: What is allowed there.
    """
    errors = error.errors(include_url=False)[:MAX_ERRORS]
    return [fault for item in errors for fault in _explain(item, data, schema)]


def found(value: object) -> str:
    """Show a value the way YAML writes it, or by its kind when it is a collection."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"


def _explain(item: Any, data: dict[str, Any], schema: Schema) -> Iterator[tuple[KeyPath, str]]:
    """Yield the fault behind one of pydantic's errors (https://docs.pydantic.dev/latest/errors/validation_errors/)."""
    kind, path, value = item["type"], tuple(item["loc"]), item["input"]
    if kind == "broken_rule":
        yield path, item["msg"]
        return
    if path[:1] == ("stages",) and len(path) > 2:
        path = (*path[:2], *path[3:])  # pydantic puts the stage's type after its index
    path = _within(path, data)
    if kind == "too_short" and isinstance(value, list) and len(value) >= item["ctx"]["min_length"]:
        return  # pydantic counts the valid items only; the others have faults of their own
    if kind == "rule":
        yield path, item["msg"]
    elif kind == "extra_forbidden":
        key, parent = str(path[-1]), path[:-1]
        near = schema.suggest_key(key, parent, data)
        yield path, f"found an unknown key, allowed {', '.join(schema.keys_at(parent, data))}{near}"
    elif kind == "missing":
        yield path, f"found nothing, needs {schema.allowed(schema.described(path, data))}"
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        node = schema.described(path, data)
        kinds = schema.allowed(node).removeprefix("a mapping whose type is ")
        if kind == "union_tag_not_found":
            yield (*path, "type"), f"found nothing, needs {kinds}"
        else:
            tag = value["type"]
            near = suggest(tag, schema.words(node)) if isinstance(tag, str) else ""
            yield (*path, "type"), f"found {found(tag)}, allowed {kinds}{near}"
    else:
        node = schema.described(path, data)
        near = suggest(value, schema.words(node)) if kind == "literal_error" and isinstance(value, str) else ""
        yield path, f"found {found(value)}, allowed {schema.allowed(node)}{near}"


def _within(path: KeyPath, data: object) -> KeyPath:
    """Cut off items of what the recipe does not write as a list: `input.size: 6` is at fault, not both sides of it."""
    for index, part in enumerate(path):
        if isinstance(part, int) and not isinstance(data, list):
            return path[:index]
        try:
            data = data[part]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            data = [] if isinstance(part, int) else None
    return path


def _without_echoes(faults: dict[tuple[KeyPath, str], None]) -> list[tuple[KeyPath, str]]:
    """Leave out "needs epochs" where the unknown key beside it was probably meant to be `epochs`."""
    meant = {
        format_path((*path[:-1], text.rsplit("'", 2)[1])) for path, text in faults if "did you mean" in text and path
    }
    return [
        (path, text) for path, text in faults if not (text.startswith("found nothing") and format_path(path) in meant)
    ]
