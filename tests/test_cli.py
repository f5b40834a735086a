"""The command line: what goes to stdout and stderr, exit codes, and which commands stay quick and light."""

import argparse
import dataclasses
import errno
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressor import __version__, cli
from compressor.artifacts import write_manifest
from compressor.errors import (
    BudgetError,
    CompressorError,
    DataError,
    MissingDependencyError,
    ParityError,
    RecipeError,
    ResourceError,
    TrainingError,
    UnsupportedModelError,
)
from compressor.run_folder import fresh_run_dir, partial_of

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPE = "recipes/xception_slim.yaml"
Command = Callable[[argparse.Namespace], int]


def script(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python compress.py ARGUMENTS` in a process of its own."""
    command = [sys.executable, "compress.py", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, **options)


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Command], None]:
    """Put a function in the place of a command's, arguments as they are."""

    def put(name: str, function: Command) -> None:
        monkeypatch.setitem(cli.COMMANDS, name, dataclasses.replace(cli.COMMANDS[name], run=function))

    return put


@pytest.mark.parametrize("arguments", [("--help",), ("validate", RECIPE), ("schema",)])
def test_light_commands_are_quick_and_load_nothing_heavy(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys; from compressor.cli import main; code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'numpy', 'openvino', 'nncf', 'onnx', 'rich'} & set(sys.modules)\n"
        "print('heavy:', heavy, file=sys.stderr); sys.exit(code)"
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - started)
        assert done.stdout
        assert done.stderr == "heavy: set()\n"
    assert (
        min(seconds) < 1.5
    )  # 0.1 to 0.3 s when quiet; the promise of 0.5 s is not for a machine busy with other tests


def test_help_names_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"\n    {name}\s", text) for name in cli.COMMANDS)
    assert "130 interrupted" in " ".join(text.split())
    for name in cli.COMMANDS:
        assert cli.main([name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert "--json" in shown
        assert len(shown.splitlines()) <= 40
        assert shown.count(f"\n  compress.py {name}") == 2  # examples
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a.yaml"], ["run", "a.yaml"]),
        (["a.yml", "--out", "b"], ["run", "a.yml", "--out", "b"]),
        (["--json", "a.yaml"], ["run", "--json", "a.yaml"]),
        (["--out", "b", "a.yaml"], ["run", "--out", "b", "a.yaml"]),
        (["--out", "plan", "a.yaml"], ["run", "--out", "plan", "a.yaml"]),
        (["--out", "runs/x", "a.yaml"], ["run", "--out", "runs/x", "a.yaml"]),
        (
            ["--set", "seed=1", "--device", "cpu", "plan", "a.yaml"],
            ["plan", "--set", "seed=1", "--device", "cpu", "a.yaml"],
        ),
        (["--out"], ["--out"]),
        (["--json", "validate", "a.yaml"], ["validate", "--json", "a.yaml"]),
        (["plan", "a.yaml"], ["plan", "a.yaml"]),
        (["run", "validate"], ["run", "validate"]),
        (["--help", "a.yaml"], ["--help", "a.yaml"]),
        (["--json"], ["--json"]),
        ([], []),
        (["quite_else"], ["run", "quite_else"]),
    ],
)
def test_a_recipe_alone_means_run(given: list[str], expected: list[str]) -> None:
    assert cli.with_default_command(given) == expected


def test_options_known_to_take_a_value_are_exactly_those_that_do() -> None:
    """They are listed by hand, since argparse tells a parser's options only through private names."""
    (commands,) = (a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    actions = [action for command in commands.choices.values() for action in command._actions]
    takers = {option for action in actions if action.nargs != 0 for option in action.option_strings}
    assert sorted(cli.TAKE_A_VALUE) == sorted(takers)


def test_run_gets_what_was_given(replace: Callable[[str, Command], None]) -> None:
    seen: list[argparse.Namespace] = []

    def run(args: argparse.Namespace) -> int:
        seen.append(args)
        return 0

    replace("run", run)
    options = ["--set", "seed=1", "--set", "a.b=[1, 2]", "--out", "runs/x", "--resume", "--device", "cpu", "-v"]
    assert cli.main(["my.yaml", *options]) == 0
    args = seen[0]
    assert (args.recipe, args.run_dir, args.overrides) == (Path("my.yaml"), Path("runs/x"), ["seed=1", "a.b=[1, 2]"])
    assert (args.resume, args.force, args.device, args.verbose, args.quiet) == (True, False, "cpu", True, False)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["validte", RECIPE], "'validte' is neither a command nor a recipe (.yaml); did you mean 'validate'?"),
        (["bnech", "x.xml"], "did you mean 'bench'?"),
        ([], "the following arguments are required: COMMAND"),
        (["validate"], "the following arguments are required: RECIPE (compress.py validate --help shows the usage)"),
        (["validate", RECIPE, "--outt", "x"], "unrecognized arguments: --outt"),
        (["validate", RECIPE, "-q", "-v"], "not allowed with argument"),
        ([RECIPE, "--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["bench", "x.xml", "--calls", "0"], "--calls: found '0', allowed an integer >= 1"),
        (["bench", "x.xml", "--threads", "two"], "--threads: found 'two', allowed an integer >= 1"),
        (["weights", "fecth", "xception"], "invalid choice: 'fecth'"),
        (
            ["weights", "fetch", "xcepton"],
            "'xcepton' is not known; allowed: xception, timm/NAME, torchvision/NAME; did you mean 'xception'?",
        ),
        (["data", "fetch", "deepcb"], "did you mean 'deeppcb'?"),
    ],
)
def test_wrong_usage_is_told_in_one_line(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert text in err
    assert err.startswith("compressor: ")
    assert err.count("\n") == 1
    assert cli.main([*arguments, "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["exit_code"] == 2
    assert text in json.loads(out)["error"]


ERRORS: list[tuple[BaseException, int]] = [
    (CompressorError("c"), 1),
    (RecipeError("c"), 2),
    (UnsupportedModelError("c"), 2),
    (TrainingError("c"), 2),
    (BudgetError("c"), 3),
    (ParityError("c"), 3),
    (DataError("c"), 4),
    (MissingDependencyError("c"), 5),
    (ResourceError("c"), 5),
    (MemoryError("c"), 5),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes"), 5),
    (OSError(errno.ENOSPC, "c"), 5),
    (PermissionError(errno.EACCES, "c"), 5),
    (FileNotFoundError(errno.ENOENT, "c"), 1),
    (ModuleNotFoundError("No module named 'c'", name="c"), 5),
    (ZeroDivisionError("c"), 1),
    (KeyboardInterrupt(), 130),
]


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=lambda value: type(value).__name__)
def test_every_error_has_its_exit_code(
    error: BaseException, code: int, replace: Callable[[str, Command], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(args: argparse.Namespace) -> int:
        raise error

    replace("schema", fails)
    assert cli.main(["schema"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("compressor: ")
    assert "interrupted" in err if code == 130 else "c" in err.removeprefix("compressor: ")
    assert "Traceback" not in err

    assert cli.main(["schema", "--json"]) == code
    out, err = capsys.readouterr()
    assert json.loads(out)["exit_code"] == code
    assert f"compressor: {json.loads(out)['error']}\n" == err

    assert cli.main(["schema", "--debug"]) == code
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("compressor: ")


def test_an_error_of_ours_without_a_class_says_how_to_see_more(
    replace: Callable[[str, Command], None], capsys: pytest.CaptureFixture[str]
) -> None:
    replace("schema", lambda args: 1 // 0)
    cli.main(["schema"])
    text = "compressor: internal error, ZeroDivisionError: integer division or modulo by zero (--debug shows where)\n"
    assert capsys.readouterr().err == text


def interrupted(
    replace: Callable[[str, Command], None], capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> str:
    def stop(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    replace("run", stop)
    assert cli.main(arguments) == 130
    return capsys.readouterr().err


def test_ctrl_c_tells_the_exact_command_that_resumes(
    replace: Callable[[str, Command], None],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "my run"
    (tmp_path / "my run.partial").mkdir()
    given = ["a b.yaml", "--out", str(run), "--set", "input.size=[64, 64]", "--set", "seed=1", "--device", "cpu"]
    for program, words in (("compress.py", ["python", "compress.py"]), ("/usr/bin/compressor", ["compressor"])):
        monkeypatch.setattr(sys, "argv", [program, *given])
        text = interrupted(replace, capsys, given)
        start, _, command = text.rstrip("\n").partition(": interrupted; finished stages are kept, go on with: ")
        assert start == "compressor"
        said = shlex.split(command)
        assert said[: len(words)] == words
        # What the parser makes of it differs from what was given in one thing.
        before, after = (cli.build_parser().parse_args(line) for line in (["run", *given], said[len(words) :]))
        assert vars(after) == {**vars(before), "resume": True}


def test_ctrl_c_before_anything_was_begun_offers_nothing(
    replace: Callable[[str, Command], None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert interrupted(replace, capsys, ["a.yaml", "--out", str(tmp_path / "run")]) == "compressor: interrupted\n"
    assert interrupted(replace, capsys, ["a.yaml"]) == "compressor: interrupted\n"


def test_runs_get_fresh_folders_named_after_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fresh_run_dir("mine")
    assert folder.parent == Path("runs")
    assert folder.name.startswith("mine-20")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    partial_of(Path("runs/mine-now")).mkdir(parents=True)
    Path("runs/mine-now-2").mkdir()
    assert fresh_run_dir("mine") == Path("runs/mine-now-3")


@pytest.mark.parametrize("place", [".", "..", "/"])
def test_a_run_needs_a_folder_of_its_own(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(REPOSITORY / RECIPE), "--out", place]) == 2
    assert re.search("already exists|name a folder to create", capsys.readouterr().err)


def test_what_is_not_there_ends_with_its_code() -> None:
    wrong_path = script("recipes/xception_slm.yaml", "--json")
    assert wrong_path.returncode == 2
    assert "does not exist; did you mean 'recipes/xception_slim.yaml'?" in json.loads(wrong_path.stdout)["error"]
    wrong_key = script("validate", RECIPE, "--set", "stages[0].epoch=2")
    assert wrong_key.returncode == 2
    assert "stages[0].epoch: found an unknown key" in wrong_key.stderr
    assert "did you mean 'epochs'?" in wrong_key.stderr
    assert wrong_key.stdout == ""
    wrong_set = script("validate", RECIPE, "--set", "seed")
    assert wrong_set.returncode == 2
    assert "PATH=VALUE" in wrong_set.stderr


def test_missing_data_ends_with_4_and_leaves_no_run(tmp_path: Path) -> None:
    keys = ["model.weights=none", "model.weights_fallback=null", "data.source=image_folder"]
    keys.append(f"data.path={tmp_path / 'absent'}")
    done = script(RECIPE, "--out", tmp_path / "run", "--json", *(word for key in keys for word in ("--set", key)))
    assert done.returncode == 4, done.stderr
    assert str(tmp_path / "absent") in json.loads(done.stdout)["error"]
    assert not (tmp_path / "run").exists()


def test_validate_tells_all_faults_or_the_hash(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["validate", str(REPOSITORY / RECIPE)]) == 0
    assert ": valid, 6 stages, hash " in capsys.readouterr().out
    assert cli.main(["validate", str(REPOSITORY / RECIPE), "--json", "--set", "seed=3"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["valid"] is True
    assert result["recipe"]["seed"] == 3
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("version: 2\nstages: []\nsed: 1\n")
    assert cli.main(["validate", str(recipe)]) == 2
    err = capsys.readouterr().err
    assert all(text in err for text in ("bad.yaml:1", "bad.yaml:2", "bad.yaml:3", "did you mean 'seed'?"))


def test_schema_is_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema", "--json"]) == 0
    assert "properties" in json.loads(capsys.readouterr().out)


def test_a_reader_that_stops_early_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "compress.py", "schema"], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "result_fp32.bin").write_bytes(b"weights")
    (tmp_path / "report.json").write_text("{}")
    write_manifest(tmp_path)
    return tmp_path


def test_verify_tells_an_untouched_run_from_another(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(run_folder)]) == 0
    assert capsys.readouterr().out == f"{run_folder}: untouched\n"
    assert cli.main(["verify", str(run_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"untouched": True, "faults": []}
    (run_folder / "artifacts" / "result_fp32.bin").write_bytes(b"weightt")
    assert cli.main(["verify", str(run_folder)]) == 3
    assert "artifacts/result_fp32.bin: content differs" in capsys.readouterr().out
    assert cli.main(["verify", str(run_folder), "--json"]) == 3
    assert len(json.loads(capsys.readouterr().out)["faults"]) == 1
    os.remove(run_folder / "manifest.json")
    assert cli.main(["verify", str(run_folder)]) == 4
    assert "no manifest" in capsys.readouterr().err


class _Report:
    """As much of a report as the command reads."""

    def __init__(self, passed: bool):
        self.passed = passed

    def to_json(self) -> dict[str, object]:
        return {"verdict": "passed" if self.passed else "failed"}


@pytest.mark.parametrize("passed", [True, False])
def test_a_missed_gate_ends_with_3_after_the_report(
    passed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import compressor.pipeline

    asked: dict[str, object] = {}

    def compress(recipe: Path, run: Path, **options: object) -> _Report:
        asked.update(options, run=run)
        return _Report(passed)

    monkeypatch.setattr(compressor.pipeline, "compress", compress)
    arguments = [str(REPOSITORY / RECIPE), "--out", str(tmp_path / "run"), "--force", "--set", "seed=2", "--json"]
    assert cli.main(arguments) == (0 if passed else 3)
    assert json.loads(capsys.readouterr().out) == {"verdict": "passed" if passed else "failed"}
    wanted = {"run": tmp_path / "run", "overrides": ["seed=2"], "resume": False, "force": True, "device": "auto"}
    assert asked == wanted | {"model": None}


def test_fetch_says_where_the_file_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import compressor.data.fetch
    import compressor.models.weights

    monkeypatch.setattr(compressor.models.weights, "fetch_weights", lambda name: tmp_path / name)
    monkeypatch.setattr(compressor.data.fetch, "fetch", lambda name, dest: dest / name)
    assert cli.main(["weights", "fetch", "xception"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'xception'}\n"
    assert cli.main(["data", "fetch", "deeppcb", "--dest", "there", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": "there/deeppcb"}
