"""Every recipe that is shipped runs from end to end: here Xception's, in test_shipped_backbones.py the others."""

from pathlib import Path

import pytest
from shipped_recipes import RECIPES, run_shipped


def test_all_recipes_are_found() -> None:
    assert len(RECIPES) >= 5


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem.startswith("xception")], ids=lambda path: path.stem)
def test_a_shipped_recipe_runs_from_end_to_end(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_shipped(path, tmp_path, monkeypatch)
