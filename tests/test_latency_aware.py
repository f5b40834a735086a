"""The comparison of rankings: what it runs are recipes, the same in all but the ranking."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_networks import write_recipe

from compressor.recipe_loader import load_recipe

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_both_plans_are_recipes_that_differ_in_the_ranking_alone(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import latency_aware  # type: ignore[import-not-found]

    augment = {"flip": True, "crop": 0.6}
    stages = [{"type": "finetune", "steps": 1, "augment": augment}, {"type": "quantize"}]
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", tiny_images, *stages)).recipe
    options = argparse.Namespace(
        target="0.5x", importance="taylor", sensitivity_images=16, reconstruction_images=8, epochs=2, learning_rate=3e-4
    )
    found: dict[str, Any] = {}
    for ranking in latency_aware.RANKINGS:
        file = tmp_path / f"{ranking}.yaml"
        file.write_text(json.dumps(latency_aware.variant(recipe, ranking, 5, options)))
        found[ranking] = load_recipe(file).recipe.model_dump(mode="json")
        lead, prune, recovery = found[ranking]["stages"]
        assert lead["augment"] == recovery["augment"]
        assert prune.pop("ranking") == ranking
        assert prune.pop("sensitivity_images") == (16 if ranking == "latency" else None)
    assert found["latency"] == found["local"]
