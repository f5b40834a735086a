"""Your own folder of images, from a look at it to a bundle for a device.

    python examples/own_data.py IMAGES [--model xception] [--out runs/own_data] [--set KEY=VALUE ...]

IMAGES holds train/CLASS/*.png and test/CLASS/*.png, or one folder for each class. The same on the command line:

    python compress.py data inspect IMAGES
    python compress.py new mine.yaml --from-data IMAGES
    python compress.py mine.yaml --out runs/own_data
    python compress.py deploy runs/own_data --out runs/own_data-bundle
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from compressor import compress
from compressor.data.survey import format_survey, survey
from compressor.deploy import deploy
from compressor.fitted_recipe import recipe_for


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--model", default="xception")
    parser.add_argument("--out", type=Path, default=Path("runs/own_data"))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    args = parser.parse_args()

    found = survey(args.images)
    print(format_survey(found))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    recipe = args.out.with_suffix(".yaml")
    recipe.write_text(recipe_for(found, args.images.resolve(), args.model, recipe))
    report = compress(recipe, args.out, overrides=args.overrides)
    print(f"{report.verdict['status']}; {', '.join(report.verdict['reasons']) or 'every gate met'}")
    if not report.passed:
        return 3
    made = deploy(args.out, args.out.with_name(args.out.name + "-bundle"))
    print(f"{made['zip']}: {made['latency_ms']:.2f} ms here; on the device: python predict.py IMAGE")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
