"""A recipe run from Python: what it measured, where the page is, and one image through the deployed network.

    python examples/quickstart.py [--out runs/quickstart] [--set KEY=VALUE ...]

Runs the main job (four minutes on two cores, generated images); `--set` changes keys of the recipe, as for compress.py.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from compressor import compress
from compressor.runtime import network_size, predict, read_labels
from compressor.shipped import find_shipped


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    args = parser.parse_args()

    report = compress(find_shipped("xception_slim").path, args.out, overrides=args.overrides)
    before, after = report.baseline, report.result
    print(f"{report.verdict['status']}; {', '.join(report.verdict['reasons']) or 'every gate met'}")
    print(f"latency {before.latency_ms:.2f} -> {after.latency_ms:.2f} ms")
    print(f"test accuracy {before.accuracy:.3f} -> {after.accuracy:.3f}; page: {args.out}/report.html")
    if not report.passed:
        return 3

    xml = args.out / report.recommended
    size = network_size(xml)
    image = np.full((*size, 3), 128, np.uint8)  # any RGB image of any size will do
    print(f"a grey square is called '{read_labels(xml)[int(predict(xml, [image]).argmax())]}'")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
