"""The commands that take what a run left.

Invariant: results go to stdout, everything else to stderr; heavy packages are imported only by the command that needs
them.
"""

import argparse
import json
import sys
from pathlib import Path

from compressor.command_arguments import EXIT_MISSED, Command, at_least_one, file_ending, fraction, run_folder_argument


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
        type=file_ending(".html"),
        metavar="FILE.html",
        help="also put the runs side by side in this page, and a .csv beside it",
    )
    parser.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="also write the figures for TensorBoard, if installed"
    )


def _report(args: argparse.Namespace) -> int:
    from compressor.pages.files import rebuild

    pages = rebuild(args.folders, args.out, args.tensorboard)
    print(json.dumps({"pages": [str(page) for page in pages]}) if args.json else "\n".join(map(str, pages)))
    return 0


def _deploy_arguments(parser: argparse.ArgumentParser) -> None:
    run_folder_argument(parser)
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


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", type=Path, metavar="RUN|IR.xml", help="a run folder (baseline against result) or one IR"
    )
    parser.add_argument("--calls", type=at_least_one, default=100, help="timed calls per model (default 100)")
    parser.add_argument("--threads", type=at_least_one, help="inference threads (default: OpenVINO's choice)")
    parser.add_argument(
        "--quick", action="store_true", help="of a run: only the IRs, not PyTorch and ONNX beside them as well"
    )


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


RESULTS: dict[str, Command] = {
    "verify": Command(
        _verify,
        run_folder_argument,
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
}
