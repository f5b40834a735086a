"""What commands share: how one is described, arguments that several take, and kinds of values.

Invariant: results go to stdout, everything else to stderr; heavy packages are imported only by the command that needs
them.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXIT_MISSED, EXIT_DATA, EXIT_RESOURCE = 3, 4, 5


@dataclass(frozen=True)
class Command:
    """What a command does, the arguments it adds, what is said of it, and two ways to use it."""

    run: Callable[[argparse.Namespace], int]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    text: str
    examples: tuple[str, str]


def set_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change one key, e.g. stages[1].epochs=3 (repeatable)",
    )


def recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML recipe")
    set_argument(parser)


def model_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    parser.add_argument(
        "--factory",
        metavar="PACKAGE.MODULE:FUNCTION",
        help="your own network in place of the recipe's: a function that takes the number of classes and returns a "
        "torch.nn.Module; looked for in the working folder too",
    )


def own_network(args: argparse.Namespace) -> Any:
    """What `--factory` names, or None."""
    if args.factory is None:
        return None
    from compressor.models.custom import load_factory

    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing there takes the place of an installed package
    return load_factory(args.factory)


def device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to train; measured is always on the CPU",
    )


def run_folder_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir_to_check", type=Path, metavar="RUN", help="the folder of a finished run")


def no_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def at_least_one(text: str) -> int:
    """A positive integer, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found '{text}', allowed an integer >= 1")
    return int(text)


def fraction(text: str) -> float:
    """A number from 0 to 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"found '{text}', allowed a number from 0 to 1")
    return value


def file_ending(suffix: str) -> Callable[[str], Path]:
    """The path of a file of one kind, for argparse."""

    def path(text: str) -> Path:
        if not text.endswith(suffix):
            raise argparse.ArgumentTypeError(f"found '{text}', allowed a file ending in {suffix}")
        return Path(text)

    return path
