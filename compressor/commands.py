"""What each command takes and does; `cli.py` finds the command and tells what went wrong.

Invariant: results go to stdout, everything else to stderr; heavy packages are imported only by the command that needs
them.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXIT_MISSED = 3


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


def html_file(text: str) -> Path:
    """The path of an HTML file, for argparse."""
    if not text.endswith(".html"):
        raise argparse.ArgumentTypeError(f"found '{text}', allowed a file ending in .html")
    return Path(text)


def _report(args: argparse.Namespace) -> int:
    from compressor.pages.files import rebuild

    pages = rebuild(args.folders, args.out)
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
    "inspect": (
        _inspect,
        _inspect_arguments,
        "show what each channel group of a recipe's network costs and is worth, and suggest a recipe",
    ),
    "study": (_study, _study_arguments, "run recipes side by side, with several seeds, and compare them"),
    "schema": (_schema, _schema_arguments, "print the JSON Schema of recipes"),
    "verify": (_verify, _run_folder_argument, "check every file of a run against its manifest"),
    "report": (_report, _report_arguments, "make the pages of runs and studies anew, and put runs side by side"),
    "deploy": (_deploy, _deploy_arguments, "bundle a run's network for a device that has no toolkit"),
    "eval": (_eval, _eval_arguments, "score an IR on a folder of images"),
    "bench": (_bench, _bench_arguments, "time a run's baseline and result, or one IR, on this machine"),
    "weights": (_weights, _fetch_arguments, "fetch pretrained weights into the cache"),
    "data": (_data, _data_arguments, "fetch a data set and lay it out for a recipe"),
}
