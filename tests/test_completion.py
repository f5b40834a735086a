"""Law: what Tab offers is what the command line then takes; asked through bash itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compressor.cli import build_parser
from compressor.commands import COMMANDS
from compressor.completion import set_keys, shell_code
from compressor.recipe_loader import load_recipe

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPE = "recipes/xception_slim.yaml"
# What readline does: the words so far, and where the cursor is, go to the function that is registered for the command.
ASK = """
source {code}
COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}; COMP_TYPE=9
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_python_argcomplete compressor
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shell")
    (folder / "code.sh").write_text(shell_code("bash"))
    program = folder / "compressor"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m compressor "$@"\n')
    program.chmod(0o755)
    return folder / "code.sh"


def offered(code: Path, line: str) -> list[str]:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash on this machine")
    words = " ".join([*map(repr, line.split()), *(["''"] if line.endswith(" ") else [])])
    script = ASK.format(code=code, line=line, words=words)
    path = os.pathsep.join([str(code.parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [bash, "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    return [word.strip() for word in done.stdout.splitlines() if word.strip()]


def test_commands_are_offered(code: Path) -> None:
    assert set(COMMANDS) <= set(offered(code, "compressor "))
    assert offered(code, "compressor val") == ["validate"]


def test_recipes_are_offered(code: Path) -> None:
    assert RECIPE in offered(code, "compressor run recipes/xception_s")
    assert "xception_deeppcb" in offered(code, "compressor new xception_")


def test_keys_are_offered_for_set(code: Path) -> None:
    found = offered(code, f"compressor run {RECIPE} --set input.si")
    assert found == ["input.size="]


def test_offered_keys_of_stages_exist(tmp_path: Path) -> None:
    parsed = build_parser().parse_args(["run", str(REPOSITORY / RECIPE)])
    found = set_keys("stages[2].", parsed)
    assert "stages[2].round_to=" in found
    assert not [key for key in found if key.startswith("stages[2].epochs")]
    load_recipe(REPOSITORY / RECIPE, ["stages[2].round_to=8"])
    broken = tmp_path / "broken.yaml"
    broken.write_text("stages: [")
    assert set_keys("stages", build_parser().parse_args(["run", str(broken)])) == []
    assert set_keys("seed=", parsed) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_code(shell: str) -> None:
    assert "compressor" in shell_code(shell)
