"""The JSON Schema in sync with the recipe tree and its descriptions, and the shipped recipes valid by both."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compressor import recipe as spec
from compressor import strict_yaml
from compressor.recipe_faults import validate
from compressor.recipe_loader import json_schema, load_recipe, schema_text
from compressor.recipe_schema import schema_of_recipes
from compressor.schema import SYNONYMS

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
SHIPPED = sorted(path for path in RECIPES.rglob("*.y*ml") if path.parent.name != "studies")


def test_there_are_recipes_to_test() -> None:
    assert len(SHIPPED) >= 4
    names = {path.stem for path in SHIPPED}
    assert {"xception_slim", "xception_caltech101", "xception_deeppcb", "xception_ptq"} <= names


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_teach(path: Path) -> None:
    loaded = load_recipe(path)
    schema_line = loaded.text.splitlines()[0]
    assert schema_line.startswith("# yaml-language-server: $schema=")
    assert (path.parent / schema_line.split("=", 1)[1]).resolve() == RECIPES / "recipe.schema.json"
    assert sum("#" in line for line in loaded.text.splitlines()) >= 8
    document = strict_yaml.parse(path.read_bytes())
    assert schema_faults(document.value, json_schema(), "") == []


def test_the_committed_schema_is_in_sync() -> None:
    assert (RECIPES / "recipe.schema.json").read_text() == schema_text(), (
        "run: compress.py schema > recipes/recipe.schema.json"
    )


def test_every_key_is_described() -> None:
    schema = json_schema()
    described = 0
    for name, definition in {"Recipe": schema, **schema["$defs"]}.items():
        for key, node in definition["properties"].items():
            text = node.get("description") or schema["$defs"][node["$ref"].rsplit("/", 1)[1]]["description"]
            assert len(text) > 10, f"{name}.{key}"
            assert text.endswith("."), f"{name}.{key}"
            described += 1
    assert described >= 80


def test_every_model_of_the_tree_forbids_unknown_keys_and_is_frozen() -> None:
    schema = json_schema()
    assert all(node["additionalProperties"] is False for node in [schema, *schema["$defs"].values()])
    for name in schema["$defs"]:
        assert getattr(spec, name).model_config["frozen"]


def test_the_schema_lets_a_child_leave_out_what_its_parent_has() -> None:
    schema = json_schema()
    assert schema_faults({"extends": "a.yaml", "model": {"weights": "none"}}, schema, "") == []
    assert schema_faults({"version": 1, "model": {"weights": "none"}}, schema, "") != []
    assert schema_faults({"extends": "a.yaml", "stages": [{"type": "finetune"}]}, schema, "") != []


@pytest.mark.parametrize("size", [64, [64, 80]])
def test_the_schema_takes_a_side_or_both(size: object) -> None:
    assert schema_faults({"extends": "a.yaml", "input": {"size": size}}, json_schema(), "") == []


def test_synonyms_lead_to_words_that_exist() -> None:
    schema = json_schema()
    keys = {key for node in [schema, *schema["$defs"].values()] for key in node["properties"]}
    types = {
        node["properties"]["type"].get("const") for node in schema["$defs"].values() if "type" in node["properties"]
    }
    assert set(SYNONYMS.values()) <= keys | types
    assert not set(SYNONYMS) & (keys | types)


def test_what_is_allowed_can_be_said_of_every_key() -> None:
    schema = json_schema()
    for node in [schema, *schema["$defs"].values()]:
        for key, value in node["properties"].items():
            assert schema_of_recipes().allowed(value) not in ("", "nothing else"), key


MISSPELT = {
    "modle": "model", "verison": "version", "stage": "stages", "budgets": "budget", "benchmarks": "benchmark",
}  # fmt: skip
MISSPELT_IN_FINETUNE = {
    "epoch": "epochs", "lr": "learning_rate", "learningrate": "learning_rate", "batchsize": "batch_size",
    "bs": "batch_size", "optimiser": "optimizer", "scheduler": "schedule", "weight-decay": "weight_decay",
    "smoothing": "label_smoothing",
    "distil": "distill", "distillation": "distill", "augmentation": "augment", "early_stop_patience": "patience",
    "warm_up": "warmup", "flip": "augment.flip", "teacher": "distill", "clip": "clip_norm",
}  # fmt: skip
MISSPELT_TYPES = {
    "pruning": "prune", "fine_tune": "finetune", "fine-tune": "finetune", "quantise": "quantize", "ptq": "quantize",
    "drop_block": "drop_blocks", "reduce_channel": "reduce_channels", "replace_kernel": "replace_kernels",
    "train": "finetune", "Prune": "prune",
}  # fmt: skip


def test_misspellings_get_the_right_suggestion() -> None:
    cases = [({word: 1}, right) for word, right in MISSPELT.items()]
    cases += [({"stages": [{"type": "finetune", word: 1}]}, right) for word, right in MISSPELT_IN_FINETUNE.items()]
    cases += [({"stages": [{"type": word}]}, right) for word, right in MISSPELT_TYPES.items()]
    wrong = [
        (data, right)
        for data, right in cases
        if not any(text.endswith(f"did you mean '{right}'?") for _, text in validate(data)[1])
    ]
    assert len(cases) >= 30
    assert len(wrong) <= 2, wrong


def test_a_recipe_is_validated_within_half_a_second_in_a_fresh_process() -> None:
    code = (
        "import sys, time; from compressor.recipe_loader import load_recipe\n"
        f"load_recipe({str(SHIPPED[0])!r}); print(time.process_time(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, torch = done.stdout.split()
    assert torch == "False"
    assert float(seconds) < 0.8  # 0.2 s on a quiet core; double the promise, for a busy one


def schema_faults(value: Any, node: dict[str, Any], path: str) -> list[str]:
    """Check a value against the part of JSON Schema that ours uses; an unknown keyword fails the test."""
    known = {"$ref", "$schema", "$defs", "title", "description", "default", "discriminator"}
    if "$ref" in node:
        return schema_faults(value, json_schema()["$defs"][node["$ref"].rsplit("/", 1)[1]], path)
    faults: list[str] = []
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    for keyword, rule in sorted(node.items(), key=lambda item: item[0] != "type"):
        match keyword:
            case "type":
                right = value is None if rule == "null" else isinstance(value, kinds[rule])
                if not right or (isinstance(value, bool) and rule in ("integer", "number")):
                    return [f"{path}: not {rule}"]
            case "anyOf":
                if all(schema_faults(value, {**option}, path) for option in rule):
                    faults.append(f"{path}: no alternative fits")
            case "oneOf":
                if sum(not schema_faults(value, option, path) for option in rule) != 1:
                    faults.append(f"{path}: not exactly one alternative fits")
            case "required":
                faults += [f"{path}: {key} is missing" for key in rule if key not in value]
            case "properties":
                faults += [
                    fault
                    for key, inner in rule.items()
                    if key in value
                    for fault in schema_faults(value[key], inner, f"{path}.{key}")
                ]
            case "additionalProperties":
                extra = [key for key in value if key not in node.get("properties", {})]
                if rule is False:
                    faults += [f"{path}: {key} is unknown" for key in extra]
                else:
                    faults += [fault for key in extra for fault in schema_faults(value[key], rule, f"{path}.{key}")]
            case "items":
                faults += [fault for i, item in enumerate(value) for fault in schema_faults(item, rule, f"{path}[{i}]")]
            case "prefixItems":
                pairs = zip(value, rule, strict=False)
                faults += [fault for i, (v, r) in enumerate(pairs) for fault in schema_faults(v, r, f"{path}[{i}]")]
            case "const" | "enum":
                faults += [] if value in (rule if keyword == "enum" else [rule]) else [f"{path}: {value} not allowed"]
            case "pattern":
                faults += [] if re.search(rule, value) else [f"{path}: {value} does not match"]
            case "minItems" | "minLength":
                faults += [] if len(value) >= rule else [f"{path}: too short"]
            case "maxItems" | "maxLength":
                faults += [] if len(value) <= rule else [f"{path}: too long"]
            case "minimum" | "exclusiveMinimum":
                faults += [] if value > rule or (keyword == "minimum" and value == rule) else [f"{path}: too small"]
            case "maximum" | "exclusiveMaximum":
                faults += [] if value < rule or (keyword == "maximum" and value == rule) else [f"{path}: too large"]
            case _:
                assert keyword in known, f"unknown keyword {keyword} at {path}: {json.dumps(rule)[:80]}"
    return faults
