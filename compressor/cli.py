"""The command line: `compress.py RECIPE`, `compressor run RECIPE`, and the commands around it.

Invariant: results go to stdout, everything else to stderr; heavy packages are imported only by the command that needs
them, so `--help`, `validate` and `schema` are instant, and `eval` and `bench` run with openvino, numpy, pillow.
"""

import argparse
import errno
import json
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from compressor import __version__
from compressor.errors import CompressorError, MissingDependencyError, RecipeError, did_you_mean

EXIT_CRASH, EXIT_MISSED, EXIT_RESOURCE, EXIT_INTERRUPTED = 1, 3, 5, 130
TAKE_A_VALUE = (
    "--set",
    "--out",
    "--device",
    "--calls",
    "--threads",
    "--dest",
    "--factory",
)  # what follows is no command
SCARCE = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.EROFS)
EXIT_CODES = (
    "exit codes: 0 ok; 1 crash; 2 recipe or usage; 3 gate or budget missed; 4 data; 5 environment; 130 interrupted"
)

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors become one message on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = argparse.Namespace(debug="--debug" in arguments, json="--json" in arguments)  # until they are parsed
    try:
        args = build_parser().parse_args(with_default_command(arguments))
        code = int(args.command(args))
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse has printed its help
        return int(stop.code or 0)
    except CompressorError as error:
        return fail(args, str(error), error.exit_code)
    except KeyboardInterrupt:
        return fail(args, interrupted_message(args), EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader has what it wanted; Python's own flush at exit must not fail either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        missing = MissingDependencyError(
            f"the package '{package}' is not installed; pip install compressor brings all that runs need"
        )
        return fail(args, str(missing), missing.exit_code)
    except (MemoryError, OSError) as error:
        scarce = isinstance(error, MemoryError) or error.errno in SCARCE
        return fail(args, f"{type(error).__name__}: {error}", EXIT_RESOURCE if scarce else EXIT_CRASH)
    except Exception as error:
        if is_out_of_memory(error):
            return fail(args, f"{error}; lower batch_size or input.size", EXIT_RESOURCE)
        return fail(args, f"internal error, {type(error).__name__}: {error} (--debug shows where)", EXIT_CRASH)


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch could not get memory, for which it has no class of its own on the CPU."""
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def fail(args: argparse.Namespace, message: str, code: int) -> int:
    """Print what went wrong, with a traceback only under `--debug`."""
    if args.debug:
        traceback.print_exc()
    if args.json:
        print(json.dumps({"error": message, "exit_code": code}), flush=True)
    print(f"compressor: {message}", file=sys.stderr)
    return code


def interrupted_message(args: argparse.Namespace) -> str:
    """How to go on after Ctrl-C; a run's finished stages are kept."""
    run = getattr(args, "run_dir", None)
    if run is None or not run.with_name(run.name + ".partial").is_dir():
        return "interrupted"
    words = ["python", sys.argv[0]] if sys.argv[0].endswith(".py") else ["compressor"]
    words += ["run", str(args.recipe), "--out", str(run), "--resume"]
    words += ["--force"] if args.force else []
    words += ["--device", args.device] if args.device != "auto" else []
    words += ["--factory", args.factory] if args.factory else []
    for override in args.overrides:
        words += ["--set", override]
    return "interrupted; finished stages are kept, go on with: " + shlex.join(words)


def with_default_command(arguments: list[str]) -> list[str]:
    """Insert `run` where the first word is a recipe: `compress.py RECIPE` = `compress.py run RECIPE`.

    Raises:
        RecipeError: the first word is neither, and looks like a misspelt command.
    """
    at = 0
    while at < len(arguments) and arguments[at].startswith("-"):
        at += 2 if arguments[at] in TAKE_A_VALUE else 1
    if at >= len(arguments):
        return arguments
    first = arguments[at]
    if any(a in ("-h", "--help", "--version") for a in arguments[:at]):
        return arguments
    if first in COMMANDS:
        return [first, *arguments[:at], *arguments[at + 1 :]]  # options may also come before the command
    if not first.endswith((".yaml", ".yml")) and not Path(first).exists() and (hint := did_you_mean(first, COMMANDS)):
        raise RecipeError(f"'{first}' is neither a command nor a recipe (.yaml){hint} (--help lists the commands)")
    return ["run", *arguments]


class Parser(argparse.ArgumentParser):
    """Reports wrong usage like every other error, so that `--json` and exit codes hold for it too."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message} ({self.prog} --help shows the usage)")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(
        prog="compress.py",
        description="Make a pretrained CNN small and fast: a YAML recipe in, verified ONNX and OpenVINO IR out.",
        epilog=f"'compress.py RECIPE' is short for 'compress.py run RECIPE'. {EXIT_CODES}",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (function, add_arguments, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=EXIT_CODES)
        command.set_defaults(command=function)
        add_arguments(command)
        command.add_argument(
            "--json", action="store_true", help="print the result as JSON on stdout, and nothing else there"
        )
        command.add_argument("--debug", action="store_true", help="show a traceback when something fails")
        volume = command.add_mutually_exclusive_group()
        volume.add_argument("-q", "--quiet", action="store_true", help="only warnings and errors on stderr")
        volume.add_argument("-v", "--verbose", action="store_true", help="more detail on stderr")
    return parser


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML recipe")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change one key, e.g. stages[1].epochs=3 (repeatable)",
    )


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    parser.add_argument(
        "--factory",
        metavar="PACKAGE.MODULE:FUNCTION",
        help="your own network in place of the recipe's: a function that takes the number of classes and returns a "
        "torch.nn.Module; looked for in the working folder too",
    )


def _own_network(args: argparse.Namespace) -> Any:
    """What `--factory` names, or None."""
    if args.factory is None:
        return None
    from compressor.models.custom import load_factory

    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing there takes the place of an installed package
    return load_factory(args.factory)


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser)
    parser.add_argument(
        "--out", dest="run_dir", type=Path, metavar="RUN", help="folder to create (default: a fresh one under runs/)"
    )
    parser.add_argument("--resume", action="store_true", help="continue an unfinished run from its last finished stage")
    parser.add_argument("--force", action="store_true", help="replace an existing run")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to train; measured is always on the CPU",
    )


def _run(args: argparse.Namespace) -> int:
    from compressor.recipe_loader import load_recipe

    load_recipe(args.recipe, args.overrides, own_model=args.factory)  # faults show before torch is imported
    from compressor.run_folder import fresh_run_dir

    if args.run_dir is None:
        args.run_dir = fresh_run_dir(args.recipe.stem)
    from compressor import console

    with console.logging_to_stderr(quiet=args.quiet, verbose=args.verbose):
        from compressor.pipeline import compress

        report = compress(
            args.recipe,
            args.run_dir,
            model=_own_network(args),
            overrides=args.overrides,
            resume=args.resume,
            force=args.force,
            device=args.device,
        )
    if args.json:
        print(json.dumps(report.to_json()))
    else:
        console.show_report(report, args.run_dir)
    return 0 if report.passed else EXIT_MISSED


def _validate(args: argparse.Namespace) -> int:
    from compressor.recipe_loader import load_recipe, recipe_hash

    recipe = load_recipe(args.recipe, args.overrides).recipe
    if args.json:
        print(json.dumps({"valid": True, "hash": recipe_hash(recipe), "recipe": recipe.model_dump(mode="json")}))
    else:
        print(f"{args.recipe}: valid, {len(recipe.stages)} stages, hash {recipe_hash(recipe)[:12]}")
    return 0


def _plan(args: argparse.Namespace) -> int:
    from compressor import console

    with console.logging_to_stderr(quiet=args.quiet, verbose=args.verbose):
        from compressor.planning import plan_recipe

        plan = plan_recipe(args.recipe, args.overrides, _own_network(args))
    if args.json:
        print(json.dumps(plan))
    else:
        console.show_plan(plan)
    return 0


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def _schema(args: argparse.Namespace) -> int:
    from compressor.recipe_schema import schema_text

    sys.stdout.write(schema_text())
    return 0


def _run_folder_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir_to_check", type=Path, metavar="RUN", help="the folder of a finished run")


def _verify(args: argparse.Namespace) -> int:
    from compressor.artifacts import verify_manifest

    faults = verify_manifest(args.run_dir_to_check)
    if args.json:
        print(json.dumps({"untouched": not faults, "faults": faults}))
    else:
        for fault in faults:
            print(fault)
        print(f"{args.run_dir_to_check}: {f'{len(faults)} files differ from the manifest' if faults else 'untouched'}")
    return EXIT_MISSED if faults else 0


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ir", type=Path, metavar="IR.xml", help="an OpenVINO IR made by this toolkit")
    parser.add_argument(
        "data", type=Path, metavar="DATA", help="a folder with one sub-folder of images per class, or one with test/"
    )


def _eval(args: argparse.Namespace) -> int:
    from compressor.evaluate import evaluate_ir, format_evaluation

    evaluation = evaluate_ir(args.ir, args.data)
    print(json.dumps(evaluation.to_json()) if args.json else format_evaluation(evaluation))
    return 0


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", type=Path, metavar="RUN|IR.xml", help="a run folder (baseline against result) or one IR"
    )
    parser.add_argument("--calls", type=at_least_one, default=100, help="timed calls per model (default 100)")
    parser.add_argument("--threads", type=at_least_one, help="inference threads (default: OpenVINO's choice)")


def at_least_one(text: str) -> int:
    """A positive integer, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found '{text}', allowed an integer >= 1")
    return int(text)


def _bench(args: argparse.Namespace) -> int:
    from compressor.benchmark import bench_target, format_bench

    result = bench_target(args.target, calls=args.calls, threads=args.threads)
    print(json.dumps(result) if args.json else format_bench(result))
    return 0


def _fetch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("fetch",), help="download once, for later runs without a network")
    parser.add_argument("name", metavar="NAME", help="what to fetch")


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    _fetch_arguments(parser)
    parser.add_argument("--dest", type=Path, default=Path("data"), help="folder to put it in (default: data/)")


def _weights(args: argparse.Namespace) -> int:
    from compressor import console

    with console.logging_to_stderr(quiet=args.quiet, verbose=args.verbose):
        from compressor.models.weights import fetch_weights

        path = fetch_weights(args.name)
    print(json.dumps({"path": str(path)}) if args.json else path)
    return 0


def _data(args: argparse.Namespace) -> int:
    from compressor import console

    with console.logging_to_stderr(quiet=args.quiet, verbose=args.verbose):
        from compressor.data.fetch import fetch

        path = fetch(args.name, args.dest)
    print(json.dumps({"path": str(path)}) if args.json else path)
    return 0


Command = tuple[Callable[[argparse.Namespace], int], Callable[[argparse.ArgumentParser], None], str]
COMMANDS: dict[str, Command] = {
    "run": (_run, _run_arguments, "run a recipe: train, compress, export, prove, report"),
    "validate": (_validate, _recipe_arguments, "check a recipe and report every fault at once"),
    "plan": (_plan, _model_arguments, "show what a recipe would do to the network, without training; writes nothing"),
    "schema": (_schema, _no_arguments, "print the JSON Schema of recipes"),
    "verify": (_verify, _run_folder_argument, "check every file of a run against its manifest"),
    "eval": (_eval, _eval_arguments, "score an IR on a folder of images"),
    "bench": (_bench, _bench_arguments, "time a run's baseline and result, or one IR, on this machine"),
    "weights": (_weights, _fetch_arguments, "fetch pretrained weights into the cache"),
    "data": (_data, _data_arguments, "fetch a data set and lay it out for a recipe"),
}
