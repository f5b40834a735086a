"""The JSON Schema of a recipe.

Invariant: error texts, the editor's completions and `schema` draw on one description, made from the recipe's types.
"""

import json
from functools import cache
from typing import Any

from compressor.recipe import Recipe
from compressor.schema import Schema, Untitled


@cache
def _schema() -> dict[str, Any]:
    schema = Recipe.model_json_schema(schema_generator=Untitled)
    definitions = schema["$defs"]
    for definition in definitions.values():
        properties = definition["properties"]
        required = definition.get("required", [])
        if "type" in properties:  # it has a default for Python's sake; in a file it says which stage this is
            definition["required"] = ["type", *required]
            definition["properties"] = {"type": properties.pop("type"), **properties}
        if "steps" in properties:
            definition["anyOf"] = [{"required": ["epochs"]}, {"required": ["steps"]}]
    # A recipe that extends another may leave out what the parent has; a complete one may not.
    complete: dict[str, Any] = {"required": schema.pop("required"), "properties": {}}
    complete["properties"]["data"] = {"required": definitions["DataSection"].pop("required")}
    brought = {"properties": {"source": {"const": "custom"}}, "required": ["source"]}
    complete["properties"]["model"] = {"anyOf": [{"required": ["name"]}, brought]}
    schema["anyOf"] = [{"required": ["extends"]}, complete]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "compressor recipe"}


@cache
def schema_of_recipes() -> Schema:
    """What may stand where in a recipe."""
    return Schema(_schema())


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a recipe file."""
    copy: dict[str, Any] = json.loads(json.dumps(_schema()))
    return copy


def schema_text() -> str:
    """Return the JSON Schema as the text of `recipes/recipe.schema.json`."""
    return json.dumps(_schema(), indent=2) + "\n"
