"""Show what synthetic_pcb looks like: one row per class, labelled, as a PNG.

python examples/contact_sheet.py contact_sheet.png --columns 12 --zoom 2
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from compressor.data.synthetic_pcb import CLASSES, generate_pairs

LABEL_WIDTH = 84
GAP = 4


def draw_sheet(*, columns: int, size: int, zoom: int, seed: int, mark: bool) -> Image.Image:
    """Draw `columns` crops of every class; `mark` puts a red frame around each defect."""
    pairs = generate_pairs(per_class=columns, size=size, seed=seed)
    tile = size * zoom + GAP
    sheet = Image.new("RGB", (LABEL_WIDTH + columns * tile, len(CLASSES) * tile), (120, 130, 150))
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(CLASSES):
        pen.text((6, row * tile + tile // 2 - 6), name, fill="white")
        for column, index in enumerate(np.flatnonzero(pairs.labels == row)):
            left, top = LABEL_WIDTH + column * tile, row * tile
            crop = Image.fromarray(pairs.tested[index]).resize((size * zoom, size * zoom), Image.Resampling.NEAREST)
            sheet.paste(crop, (left, top))
            rows, lines = np.nonzero(pairs.tested[index] != pairs.template[index])
            if mark and len(rows):
                corners = (lines.min() - 2, rows.min() - 2, lines.max() + 3, rows.max() + 3)
                frame = [int(corner) * zoom + offset for corner, offset in zip(corners, (left, top) * 2, strict=True)]
                pen.rectangle(frame, outline="red")
    return sheet


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="PNG file to write")
    parser.add_argument("--columns", type=int, default=12, help="crops of each class")
    parser.add_argument("--size", type=int, default=64, help="side of a crop in pixels")
    parser.add_argument("--zoom", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mark", action="store_true", help="frame each defect in red")
    args = parser.parse_args()
    sheet = draw_sheet(columns=args.columns, size=args.size, zoom=args.zoom, seed=args.seed, mark=args.mark)
    sheet.save(args.output, format="PNG")
    print(f"{args.output}: {sheet.width}x{sheet.height}, rows {', '.join(CLASSES)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
