"""What a JSON Schema says about a key: what is allowed there, and which key was probably meant.

Invariant: error texts and the editor's completions draw on one description, made from the types of what is read.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from compressor.errors import did_you_mean
from compressor.strict_yaml import KeyPath

# Other tools' words for what is called differently here; likeness of spelling alone would not find them.
SYNONYMS: Mapping[str, str] = {
    "align": "round_to",
    "amount": "pruning_ratio",
    "backbone": "name",
    "bs": "batch_size",
    "calibration_size": "subset_size",
    "criterion": "importance",
    "dataset": "data",
    "decay": "weight_decay",
    "distillation": "distill",
    "divisor": "round_to",
    "exclude": "ignored_scope",
    "flops": "macs",
    "freeze_layers": "freeze",
    "frozen": "freeze",
    "hflip": "flip",
    "ignore": "ignored_scope",
    "ignored_layers": "ignored_scope",
    "kd": "distill",
    "lr": "learning_rate",
    "num_epochs": "epochs",
    "ptq": "quantize",
    "qat": "quantize",
    "ratio": "pruning_ratio",
    "scheduler": "schedule",
    "skip": "ignored_scope",
    "sparsity": "pruning_ratio",
    "t": "temperature",
    "teacher": "distill",
    "train": "finetune",
    "vflip": "vertical_flip",
    "wd": "weight_decay",
    "width_multiplier": "width",
}


class Untitled(GenerateJsonSchema):
    """Leaves out the titles that only repeat a key's name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


class Schema:
    """A JSON Schema that can be asked about key paths."""

    def __init__(self, root: dict[str, Any]) -> None:
        self.root = root

    def described(self, path: KeyPath, data: object) -> dict[str, Any]:
        """Return the schema of the value at `path`; empty where the schema knows no such key.

        Args:
            path: A key path; the last part may be missing from `data`.
            data: The recipe as plain data, which says what type each stage has.
        """
        node, value = self.root, data
        for part in path:
            node = self._mapping_schema(node, value)
            if isinstance(part, int):
                items: Any = node.get("prefixItems", [])
                node = items[part] if part < len(items) else node.get("items", {})
                value = value[part] if isinstance(value, list) and part < len(value) else None
            else:
                node = node.get("properties", {}).get(part) or node.get("additionalProperties") or {}
                value = value.get(part) if isinstance(value, dict) else None
        return node

    def keys_at(self, path: KeyPath, data: object) -> dict[str, Any]:
        """Return the keys a mapping at `path` may have, each with its schema."""
        value = data
        for part in path:
            try:
                value = value[part]  # type: ignore[index]
            except (KeyError, IndexError, TypeError):
                value = None
        keys: dict[str, Any] = self._mapping_schema(self.described(path, data), value).get("properties", {})
        return keys

    def _resolve(self, node: Mapping[str, Any]) -> dict[str, Any]:
        resolved = dict(node)
        while "$ref" in resolved:
            resolved |= self.root["$defs"][resolved.pop("$ref").rsplit("/", 1)[1]]
        return resolved

    def _mapping_schema(self, node: Mapping[str, Any], value: object) -> dict[str, Any]:
        """Return the part of a schema that has keys or items, following a stage's `type`."""
        node = self._resolve(node)
        if "discriminator" in node:
            kind = value.get("type") if isinstance(value, dict) else None
            reference = node["discriminator"]["mapping"].get(kind) if isinstance(kind, str) else None
            return self._resolve({"$ref": reference}) if reference else {}
        if "properties" in node or "items" in node or "prefixItems" in node:
            return node
        for option in node.get("anyOf", []):
            if found := self._mapping_schema(option, value):
                return found
        return node if "additionalProperties" in node else {}

    def allowed(self, node: Mapping[str, Any]) -> str:
        """Say in words what a schema allows."""
        node = self._resolve(node)
        if "const" in node:
            return str(node["const"])
        if "enum" in node:
            return _either([str(value) for value in node["enum"]])
        if "anyOf" in node and "properties" not in node:
            return _either([self.allowed(option) for option in node["anyOf"]])
        if "discriminator" in node:
            return f"a mapping whose type is {_either(self.words(node))}"
        match node.get("type"):
            case "boolean":
                return "true or false"
            case "integer":
                return f"an integer{_range(node)}"
            case "number":
                return f"a number{_range(node)}"
            case "string":
                return str(node["description"]) if "pattern" in node else "text"
            case "array":
                return self._list(node)
            case "object" if "properties" in node:
                return f"a mapping with keys of {', '.join(node['properties'])}"
            case "object":
                return f"a mapping of names to {self.allowed(node['additionalProperties'])}"
            case other:
                return str(other or "nothing else")

    def words(self, node: Mapping[str, Any]) -> list[str]:
        """Return the words that a schema allows: those of an enumeration, or a stage's types."""
        node = self._resolve(node)
        if "discriminator" in node:
            return list(node["discriminator"]["mapping"])
        options = [node, *node.get("anyOf", [])]
        return [
            str(value)
            for option in options
            for value in option.get("enum", [option["const"]] if "const" in option else [])
        ]

    def _list(self, node: Mapping[str, Any]) -> str:
        least, most = node.get("minItems", 0), node.get("maxItems")
        item = self.allowed((node.get("prefixItems") or [node.get("items", {})])[0])
        if least == most:
            return f"a list of {least}, each {item}"
        return f"a list{', not empty,' if least else ''} of {item}"

    def suggest_key(self, word: str, parent: KeyPath, data: object) -> str:
        """Return a suggestion for an unknown key: one of its mapping's keys, or of the mappings inside it."""
        keys = self.keys_at(parent, data)
        inner = dict(self._inner_keys(keys))
        if word in inner:
            return f"; did you mean '{inner[word]}'?"
        return suggest(word, list(keys)) or (
            f"; did you mean '{inner[near]}'?" if (near := _meant(word, inner)) else ""
        )

    def _inner_keys(self, keys: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        for outer, node in keys.items():
            for key in self._mapping_schema(node, None).get("properties", {}):
                yield key, f"{outer}.{key}"


def _either(texts: Sequence[str]) -> str:
    return f"{', '.join(texts[:-1])} or {texts[-1]}" if len(texts) > 1 else texts[0]


def _range(node: Mapping[str, Any]) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {node[key]:.10g}" for key, sign in signs.items() if key in node]
    return f" {' and '.join(limits)}" if limits else ""


def suggest(word: str, choices: Sequence[str]) -> str:
    """Return `"; did you mean 'x'?"` for what was probably meant among `choices`, or an empty string."""
    plain = word.strip().lower().replace("-", "_").replace(" ", "_")
    meant = SYNONYMS.get(plain)
    return f"; did you mean '{meant}'?" if meant in choices else did_you_mean(plain, choices)


def _meant(word: str, choices: Mapping[str, str]) -> str:
    text = suggest(word, list(choices))
    return text.split("'")[1] if text else ""
