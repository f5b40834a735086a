"""Every recipe that is shipped runs from end to end: those that are not Xception's, and those of studies' rows.

In a file of their own, for the tests of a file share a process, and these take minutes.
"""

from pathlib import Path

import pytest
from shipped_recipes import RECIPES, run_shipped


@pytest.mark.parametrize("path", [p for p in RECIPES if not p.stem.startswith("xception")], ids=lambda path: path.stem)
def test_a_shipped_recipe_runs_from_end_to_end(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_shipped(path, tmp_path, monkeypatch)
