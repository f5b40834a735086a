"""The commands that take a recipe or a study.

Invariant: results go to stdout, everything else to stderr; heavy packages are imported only by the command that needs
them.
"""

import argparse
import json
import sys
from pathlib import Path

from compressor.command_arguments import (
    EXIT_MISSED,
    Command,
    at_least_one,
    device_argument,
    file_ending,
    model_arguments,
    own_network,
    recipe_arguments,
    set_argument,
)


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    parser.add_argument(
        "--out", dest="run_dir", type=Path, metavar="RUN", help="folder to create (default: a fresh one under runs/)"
    )
    parser.add_argument("--resume", action="store_true", help="continue an unfinished run from its last finished stage")
    parser.add_argument("--force", action="store_true", help="replace an existing run")
    device_argument(parser)


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
            model=own_network(args),
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

        plan = plan_recipe(args.recipe, args.overrides, own_network(args))
    if args.json:
        print(json.dumps(plan))
    else:
        console.show_plan(plan)
    return 0


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    parser.add_argument(
        "--run", type=Path, metavar="RUN", help="take the baseline that this run has trained (RUN or RUN.partial)"
    )
    parser.add_argument(
        "--sensitivity",
        action="store_true",
        help="also measure the accuracy with each group alone pruned by 25, 50 and 75 %%: minutes to hours",
    )
    parser.add_argument("--chart", type=file_ending(".svg"), metavar="FILE.svg", help="also draw it")


def _inspect(args: argparse.Namespace) -> int:
    from compressor.recipe_loader import load_recipe

    load_recipe(args.recipe, args.overrides, own_model=args.factory)  # faults show before torch is imported
    from compressor import console

    with console.logging_to_stderr(quiet=args.quiet, verbose=args.verbose):
        from compressor.inspection import inspect_recipe

        inspection = inspect_recipe(
            args.recipe, args.overrides, own_network(args), run=args.run, sensitivity=args.sensitivity
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
    set_argument(parser)
    parser.add_argument("--jobs", type=at_least_one, default=1, help="runs at once (default 1)")
    parser.add_argument("--list", action="store_true", help="check the study and list its runs; run nothing")
    parser.add_argument("--force", action="store_true", help="run again what was finished for other recipes")
    device_argument(parser)


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


RECIPES: dict[str, Command] = {
    "run": Command(
        _run,
        _run_arguments,
        "run a recipe: train, compress, export, prove, report",
        ("recipes/xception_slim.yaml", "mine.yaml --set data.path=images --out runs/mine --resume"),
    ),
    "validate": Command(
        _validate,
        recipe_arguments,
        "check a recipe and report every fault at once",
        ("mine.yaml", "mine.yaml --set stages[1].epochs=3"),
    ),
    "plan": Command(
        _plan,
        model_arguments,
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
}
