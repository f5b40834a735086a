"""What each command takes and does; `cli.py` finds the command and tells what went wrong.

Invariant: results go to stdout, everything else to stderr; heavy packages are imported only by the command that needs
them.
"""

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXIT_MISSED, EXIT_DATA, EXIT_RESOURCE = 3, 4, 5


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML recipe")
    _set_argument(parser)


def _set_argument(parser: argparse.ArgumentParser) -> None:
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
    _device_argument(parser)


def _device_argument(parser: argparse.ArgumentParser) -> None:
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


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser)
    parser.add_argument(
        "--run", type=Path, metavar="RUN", help="take the baseline that this run has trained (RUN or RUN.partial)"
    )
    parser.add_argument(
        "--sensitivity",
        action="store_true",
        help="also measure the accuracy with each group alone pruned by 25, 50 and 75 %%: minutes to hours",
    )
    parser.add_argument("--chart", type=svg_file, metavar="FILE.svg", help="also draw it")


def svg_file(text: str) -> Path:
    """The path of an SVG file, for argparse."""
    if not text.endswith(".svg"):
        raise argparse.ArgumentTypeError(f"found '{text}', allowed a file ending in .svg")
    return Path(text)


def _inspect(args: argparse.Namespace) -> int:
    from compressor.recipe_loader import load_recipe

    load_recipe(args.recipe, args.overrides, own_model=args.factory)  # faults show before torch is imported
    from compressor import console

    with console.logging_to_stderr(quiet=args.quiet, verbose=args.verbose):
        from compressor.inspection import inspect_recipe

        inspection = inspect_recipe(
            args.recipe, args.overrides, _own_network(args), run=args.run, sensitivity=args.sensitivity
        )
    if args.chart:
        from compressor.artifacts import atomic_write
        from compressor.chart import inspection_chart

        atomic_write(args.chart, inspection_chart(inspection).svg)
    if args.json:
        print(json.dumps(inspection))
    else:
        console.show_inspection(inspection, members=args.verbose)
    return 0


def _study_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=Path, metavar="STUDY", help="a YAML study, like those in recipes/studies/")
    parser.add_argument("--scale", help="one of the study's scales (default: its first)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for runs, figures and chart; what is finished there is kept (default: runs/STUDY-SCALE)",
    )
    _set_argument(parser)
    parser.add_argument("--jobs", type=at_least_one, default=1, help="runs at once (default 1)")
    parser.add_argument("--list", action="store_true", help="check the study and list its runs; run nothing")
    parser.add_argument("--force", action="store_true", help="run again what was finished for other recipes")
    _device_argument(parser)


def _study(args: argparse.Namespace) -> int:
    from compressor.study_spec import load_study

    loaded = load_study(args.study, scale=args.scale, overrides=args.overrides)
    from compressor import console

    if args.list:
        runs = [
            {"row": run.row, "seed": run.seed, "recipe": str(run.path), "changes": run.overrides} for run in loaded.runs
        ]
        if args.json:
            print(json.dumps({"scale": loaded.scale, "runs": runs}))
        else:
            console.show_planned(loaded)
        return 0
    out = args.out or Path("runs") / "-".join(filter(None, [args.study.stem, loaded.scale]))
    with console.logging_to_stderr(quiet=args.quiet, verbose=args.verbose):
        from compressor.study import run_study

        study = run_study(
            args.study,
            out,
            scale=args.scale,
            overrides=args.overrides,
            jobs=args.jobs,
            device=args.device,
            force=args.force,
        )
    if args.json:
        print(json.dumps(study))
    else:
        console.show_study(study, out)
    return EXIT_MISSED if study["missing"] else 0


def _schema_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--study", action="store_true", help="of studies instead")


def _schema(args: argparse.Namespace) -> int:
    if args.study:
        from compressor.study_spec import schema_text
    else:
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


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="finished runs, or folders of studies; their pages are made anew",
    )
    parser.add_argument(
        "--out",
        type=html_file,
        metavar="FILE.html",
        help="also put the runs side by side in this page, and a .csv beside it",
    )
    parser.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="also write the figures for TensorBoard, if installed"
    )


def html_file(text: str) -> Path:
    """The path of an HTML file, for argparse."""
    if not text.endswith(".html"):
        raise argparse.ArgumentTypeError(f"found '{text}', allowed a file ending in .html")
    return Path(text)


def _report(args: argparse.Namespace) -> int:
    from compressor.pages.files import rebuild

    pages = rebuild(args.folders, args.out, args.tensorboard)
    print(json.dumps({"pages": [str(page) for page in pages]}) if args.json else "\n".join(map(str, pages)))
    return 0


def _deploy_arguments(parser: argparse.ArgumentParser) -> None:
    _run_folder_argument(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to create; DIR.zip lies beside it"
    )
    parser.add_argument("--ir", choices=("int8", "fp32"), help="which network (default: the one the report recommends)")
    parser.add_argument("--calls", type=at_least_one, default=100, help="timed calls on this machine (default 100)")
    parser.add_argument("--force", action="store_true", help="replace what is there")


def _deploy(args: argparse.Namespace) -> int:
    from compressor.deploy import deploy

    made = deploy(args.run_dir_to_check, args.out, ir=args.ir, force=args.force, calls=args.calls)
    if args.json:
        print(json.dumps(made))
    else:
        print(f"{made['folder']}: {made['ir']}, {made['latency_ms']:.2f} ms here; {', '.join(made['files'])}")
        print(made["zip"])
    return 0


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ir", type=Path, metavar="IR.xml", help="an OpenVINO IR made by this toolkit")
    parser.add_argument(
        "data", type=Path, metavar="DATA", help="a folder with one sub-folder of images per class, or one with test/"
    )
    parser.add_argument("--min-accuracy", type=fraction, metavar="X", help="exit with 3 where top-1 is below this")


def _eval(args: argparse.Namespace) -> int:
    from compressor.evaluate import evaluate_ir, format_evaluation

    evaluation = evaluate_ir(args.ir, args.data)
    print(json.dumps(evaluation.to_json()) if args.json else format_evaluation(evaluation))
    if args.min_accuracy is not None and evaluation.top1 < args.min_accuracy:
        print(f"top-1 {evaluation.top1:.4f} is below --min-accuracy {args.min_accuracy:g}", file=sys.stderr)
        return EXIT_MISSED
    return 0


def fraction(text: str) -> float:
    """A number from 0 to 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"found '{text}', allowed a number from 0 to 1")
    return value


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", type=Path, metavar="RUN|IR.xml", help="a run folder (baseline against result) or one IR"
    )
    parser.add_argument("--calls", type=at_least_one, default=100, help="timed calls per model (default 100)")
    parser.add_argument("--threads", type=at_least_one, help="inference threads (default: OpenVINO's choice)")
    parser.add_argument(
        "--quick", action="store_true", help="of a run: only the IRs, not PyTorch and ONNX beside them as well"
    )


def at_least_one(text: str) -> int:
    """A positive integer, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found '{text}', allowed an integer >= 1")
    return int(text)


def _bench(args: argparse.Namespace) -> int:
    from compressor.benchmark import bench_target, format_bench

    result = bench_target(args.target, calls=args.calls, threads=args.threads)
    text = format_bench(result)
    if (args.target / "report.json").is_file() and not args.quick:
        from compressor.bench_formats import bench_formats, format_formats

        result["formats"] = bench_formats(args.target, calls=args.calls, threads=args.threads)
        text += "\n\n" + format_formats(result["formats"])
    print(json.dumps(result) if args.json else text)
    return 0


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


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    pass


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


@dataclass(frozen=True)
class Command:
    """What a command does, the arguments it adds, what is said of it, and two ways to use it."""

    run: Callable[[argparse.Namespace], int]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    text: str
    examples: tuple[str, str]


COMMANDS: dict[str, Command] = {
    "run": Command(
        _run,
        _run_arguments,
        "run a recipe: train, compress, export, prove, report",
        ("recipes/xception_slim.yaml", "mine.yaml --set data.path=images --out runs/mine --resume"),
    ),
    "validate": Command(
        _validate,
        _recipe_arguments,
        "check a recipe and report every fault at once",
        ("mine.yaml", "mine.yaml --set stages[1].epochs=3"),
    ),
    "plan": Command(
        _plan,
        _model_arguments,
        "show what a recipe would do to the network, without training; writes nothing",
        ("recipes/xception_slim.yaml", "mine.yaml --factory mypackage.nets:make"),
    ),
    "inspect": Command(
        _inspect,
        _inspect_arguments,
        "show what each channel group costs and is worth, and suggest a recipe",
        ("mine.yaml --chart groups.svg", "mine.yaml --sensitivity --run runs/mine"),
    ),
    "study": Command(
        _study,
        _study_arguments,
        "run recipes side by side, with several seeds, and compare them",
        ("recipes/studies/paper_caltech101.yaml --list", "recipes/studies/paper_pcb.yaml --scale small"),
    ),
    "schema": Command(
        _schema, _schema_arguments, "print the JSON Schema of recipes", ("> recipe.schema.json", "--study")
    ),
    "verify": Command(
        _verify,
        _run_folder_argument,
        "check every file of a run against its manifest",
        ("runs/mine", "runs/mine --json"),
    ),
    "report": Command(
        _report,
        _report_arguments,
        "make the pages of runs and studies anew, and put runs side by side",
        ("runs/mine", "runs/mine runs/other --out both.html"),
    ),
    "deploy": Command(
        _deploy,
        _deploy_arguments,
        "bundle a run's network for a device that has no toolkit",
        ("runs/mine --out edge", "runs/mine --out edge --ir fp32 --force"),
    ),
    "eval": Command(
        _eval,
        _eval_arguments,
        "score an IR on a folder of images",
        ("runs/mine/artifacts/result_int8.xml images/test", "edge/model.xml images --min-accuracy 0.9"),
    ),
    "bench": Command(
        _bench,
        _bench_arguments,
        "time a run's baseline and result, or one IR, on this machine",
        ("runs/mine", "edge/model.xml --calls 500 --threads 1"),
    ),
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
    "ls": Command(_ls, _no_arguments, "list the shipped recipes and studies", ("", "--json")),
    "new": Command(
        _new,
        _new_arguments,
        "copy a shipped recipe, or write one that fits a folder of images",
        ("xception_slim mine.yaml", "mine.yaml --from-data images --model timm/mobilenetv3_large_100"),
    ),
    "explain": Command(_explain, _explain_arguments, "tell what a recipe's key means", ("prune.round_to", "mixup")),
    "doctor": Command(
        _doctor,
        _no_arguments,
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
