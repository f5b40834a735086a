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
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from compressor import __version__
from compressor.commands import COMMANDS
from compressor.errors import CompressorError, MissingDependencyError, RecipeError, did_you_mean
from compressor.interrupts import lasting_interrupts

EXIT_CRASH, EXIT_RESOURCE, EXIT_INTERRUPTED = 1, 5, 130
TAKE_A_VALUE = (
    "--set",
    "--out",
    "--device",
    "--calls",
    "--threads",
    "--dest",
    "--factory",
    "--run",
    "--chart",
    "--scale",
    "--jobs",
    "--ir",
    "--from-data",
    "--model",
    "--min-accuracy",
    "--tensorboard",
)  # what follows is no command
SCARCE = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.EROFS)
EXIT_CODES = (
    "exit codes: 0 ok; 1 crash; 2 recipe or usage; 3 gate or budget missed; 4 data; 5 environment; 130 interrupted"
)

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors become one message on stderr."""
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what may come next
        from compressor.completion import complete

        complete(build_parser())
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = argparse.Namespace(debug="--debug" in arguments, json="--json" in arguments)  # until they are parsed
    with lasting_interrupts() as interrupts:
        try:
            args = build_parser().parse_args(with_default_command(arguments))
            code = int(args.command(args))
            sys.stdout.flush()
            return code
        except SystemExit as stop:  # argparse has printed its help
            return int(stop.code or 0)
        except BrokenPipeError:  # the reader has what it wanted; Python's own flush at exit must not fail either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (Exception, KeyboardInterrupt) as error:
            if interrupts or isinstance(error, KeyboardInterrupt):  # what fails after Ctrl-C was interrupted
                return fail(args, interrupted_message(args), EXIT_INTERRUPTED)
            return fail(args, *explained(error))


def explained(error: Exception) -> tuple[str, int]:
    """What to tell the user of an error, and the exit code it ends with."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or str(error)).partition(".")[0]
        error = MissingDependencyError(
            f"the package '{package}' is not installed; pip install compressor brings all that runs need"
        )
    if isinstance(error, CompressorError):
        return str(error), error.exit_code
    if is_out_of_memory(error):
        return f"{error}; lower batch_size or input.size", EXIT_RESOURCE
    if isinstance(error, (MemoryError, OSError)):
        scarce = isinstance(error, MemoryError) or error.errno in SCARCE
        return f"{type(error).__name__}: {error}", EXIT_RESOURCE if scarce else EXIT_CRASH
    return f"internal error, {type(error).__name__}: {error} (--debug shows where)", EXIT_CRASH


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
    """How to go on after Ctrl-C; a run's finished stages are kept, and a study's runs."""
    if hasattr(args, "scale"):
        return "interrupted; what is finished is kept, the same command goes on"
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
    for name, entry in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=entry.text,
            description=entry.text[0].upper() + entry.text[1:] + ".",
            epilog="\n".join(["examples:", *(f"  compress.py {name} {words}".rstrip() for words in entry.examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(command=entry.run)
        entry.add_arguments(command)
        command.add_argument(
            "--json", action="store_true", help="print the result as JSON on stdout, and nothing else there"
        )
        command.add_argument("--debug", action="store_true", help="show a traceback when something fails")
        volume = command.add_mutually_exclusive_group()
        volume.add_argument("-q", "--quiet", action="store_true", help="only warnings and errors on stderr")
        volume.add_argument("-v", "--verbose", action="store_true", help="more detail on stderr")
    return parser
