"""The commands that people start with.

Invariant: results go to stdout, everything else to stderr; heavy packages are imported only by the command that needs
them.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

from compressor.command_arguments import EXIT_DATA, EXIT_RESOURCE, Command, no_arguments


def _fetch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("fetch",), help="download once, for later runs without a network")
    parser.add_argument("name", metavar="NAME", help="what to fetch")


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=("fetch", "inspect"),
        help="fetch: download once, for runs without a network; inspect: counts, sizes, duplicates, leaks, faults",
    )
    parser.add_argument("name", metavar="NAME|DIR", help="what to fetch, or the folder or .tar to inspect")
    parser.add_argument("--dest", type=Path, default=Path("data"), help="folder to put it in (default: data/)")


def _weights(args: argparse.Namespace) -> int:
    from compressor import console

    with console.logging_to_stderr(quiet=args.quiet, verbose=args.verbose):
        from compressor.models.weights import fetch_weights

        path = fetch_weights(args.name)
    print(json.dumps({"path": str(path)}) if args.json else path)
    return 0


def _data(args: argparse.Namespace) -> int:
    if args.action == "inspect":
        return _data_inspect(args)
    from compressor import console

    with console.logging_to_stderr(quiet=args.quiet, verbose=args.verbose):
        from compressor.data.fetch import fetch

        path = fetch(args.name, args.dest)
    print(json.dumps({"path": str(path)}) if args.json else path)
    return 0


def _data_inspect(args: argparse.Namespace) -> int:
    from compressor.data.survey import format_survey, survey

    found = survey(Path(args.name).expanduser())
    print(json.dumps(found) if args.json else format_survey(found))
    return EXIT_DATA if found["faults"] else 0


def _doctor(args: argparse.Namespace) -> int:
    from compressor.doctor import examine, format_examination

    found = examine()
    print(json.dumps(found) if args.json else format_examination(found))
    return EXIT_RESOURCE if found["problems"] else 0


def _ls(args: argparse.Namespace) -> int:
    from compressor.shipped import shipped

    known = shipped()
    if args.json:
        print(json.dumps([{"name": one.name, "path": str(one.path), "purpose": one.purpose} for one in known]))
    else:
        indent = 2 + max(len(one.name) for one in known)
        for one in known:
            told = textwrap.fill(one.purpose, 120, initial_indent=" " * indent, subsequent_indent=" " * indent)
            print(f"{one.name:{indent}}{told[indent:]}")
    return 0


def _new_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a shipped recipe; `ls` lists them")
    parser.add_argument("dest", nargs="?", type=Path, metavar="DEST", help="file to write (default: NAME.yaml here)")
    parser.add_argument(
        "--from-data", type=Path, metavar="DIR", help="write a recipe that fits this folder of images instead"
    )
    parser.add_argument(
        "--model",
        default="xception",
        help="with --from-data: xception, timm/NAME or torchvision/NAME (default xception)",
    )
    parser.add_argument("--force", action="store_true", help="replace what is there")


def _new(args: argparse.Namespace) -> int:
    from compressor.errors import RecipeError
    from compressor.shipped import adapted, find_shipped, new_recipe

    if args.from_data is None:
        if args.name is None:
            raise RecipeError("new: found no NAME, needs one of `compress.py ls`, or --from-data DIR")
        one = find_shipped(args.name)
        target = args.dest or Path(Path(one.name).name + ".yaml")
        text = adapted(one, target)
    else:
        from compressor.data.survey import survey
        from compressor.fitted_recipe import recipe_for

        if args.dest is not None:
            raise RecipeError(f"new: found {args.dest} as well, needs one DEST beside --from-data")
        target = Path(args.name or f"{args.from_data.resolve().name}.yaml")
        text = recipe_for(survey(args.from_data), args.from_data, args.model, target)
    path = new_recipe(text, target, force=args.force)
    print(json.dumps({"path": str(path)}) if args.json else path)
    return 0


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("key", nargs="?", metavar="KEY", help="a key or the end of its path: prune.round_to, round_to")
    parser.add_argument("--markdown", action="store_true", help="print all keys as a page")


def _explain(args: argparse.Namespace) -> int:
    from compressor.errors import RecipeError
    from compressor.explain import MISSING, as_markdown, explain, format_keys

    if args.markdown:
        sys.stdout.write(as_markdown())
        return 0
    if args.key is None:
        raise RecipeError("explain: found no KEY; give one, such as prune.round_to, or --markdown for all")
    found = explain(args.key)
    if args.json:
        told = [{name: value for name, value in vars(key).items() if value is not MISSING} for key in found]
        print(json.dumps(told))
    else:
        print(format_keys(found))
    return 0


def _completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="whose completion to print")


def _completion(args: argparse.Namespace) -> int:
    from compressor.completion import shell_code

    sys.stdout.write(shell_code(args.shell))
    return 0


START: dict[str, Command] = {
    "weights": Command(
        _weights,
        _fetch_arguments,
        "fetch pretrained weights into the cache",
        ("fetch xception", "fetch timm/mobilenetv3_large_100"),
    ),
    "data": Command(
        _data,
        _data_arguments,
        "fetch a data set, or tell what a folder of images holds",
        ("fetch caltech101", "inspect images"),
    ),
    "ls": Command(_ls, no_arguments, "list the shipped recipes and studies", ("", "--json")),
    "new": Command(
        _new,
        _new_arguments,
        "copy a shipped recipe, or write one that fits a folder of images",
        ("xception_slim mine.yaml", "mine.yaml --from-data images --model timm/mobilenetv3_large_100"),
    ),
    "explain": Command(_explain, _explain_arguments, "tell what a recipe's key means", ("prune.round_to", "mixup")),
    "doctor": Command(
        _doctor,
        no_arguments,
        "tell what this machine and installation are good for",
        ("", "--json"),
    ),
    "completion": Command(
        _completion,
        _completion_arguments,
        "print what makes a shell complete commands, recipes and keys",
        ("bash >> ~/.bashrc", "fish > ~/.config/fish/completions/compressor.fish"),
    ),
}
