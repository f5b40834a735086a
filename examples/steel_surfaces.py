"""Make a folder of images that no recipe knows: six kinds of steel surface, as cameras over a rolling mill see them.

    python examples/steel_surfaces.py steel --train 48 --test 16

Writes steel/{train,test}/CLASS/000.png, grey, 128 x 128, and steel.png, which shows a few of each class. The classes
are those of the NEU surface defect database (Song and Yan, Applied Surface Science 285, 2013); the images are not: each
is drawn, from its number alone.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIDE = 128
Pen = ImageDraw.ImageDraw


def _line(pen: Pen, random: Random, low: float, length: float, angle: float, shade: int, width: int) -> None:
    """A line that begins above `low` and wavers a little as it goes."""
    x, y = random.uniform(0, SIDE), random.uniform(0, low)
    points = [(x, y)]
    for _ in range(round(length / 6)):
        angle += random.gauss(0, 0.12)
        x, y = x + 6 * math.cos(angle), y + 6 * math.sin(angle)
        points.append((x, y))
    if len(points) > 1:
        pen.line(points, fill=shade, width=width)


def _spot(pen: Pen, random: Random, across: float, along: float, shade: int) -> None:
    x, y = random.uniform(0, SIDE), random.uniform(0, SIDE)
    pen.ellipse((x - across, y - along, x + across, y + along), fill=shade)


def crazing(pen: Pen, random: Random) -> None:
    """A net of fine cracks."""
    for _ in range(random.randint(45, 70)):
        _line(pen, random, SIDE, random.uniform(15, 50), random.uniform(0, math.pi), random.randint(20, 60), 1)


def inclusion(pen: Pen, random: Random) -> None:
    """A few dark streaks, along the rolling direction."""
    for _ in range(random.randint(2, 5)):
        _spot(pen, random, random.uniform(1.5, 4), random.uniform(10, 30), random.randint(0, 40))


def patches(pen: Pen, random: Random) -> None:
    """Large dull areas."""
    for _ in range(random.randint(3, 6)):
        _spot(pen, random, random.uniform(10, 24), random.uniform(10, 24), random.randint(40, 75))


def pitted(pen: Pen, random: Random) -> None:
    """Many small holes."""
    for _ in range(random.randint(60, 120)):
        size = random.uniform(0.8, 2.2)
        _spot(pen, random, size, size, random.randint(0, 50))


def rolled_in_scale(pen: Pen, random: Random) -> None:
    """Short dark marks in rows."""
    rows = random.randint(6, 9)
    for row in range(rows):
        for _ in range(random.randint(4, 8)):
            x, y = random.uniform(0, SIDE), (row + random.uniform(0.3, 0.7)) * SIDE / rows
            pen.arc((x - 7, y - 3, x + 7, y + 4), 180, 360, fill=random.randint(10, 60), width=2)


def scratches(pen: Pen, random: Random) -> None:
    """One to three long bright lines."""
    for _ in range(random.randint(1, 3)):
        _line(
            pen,
            random,
            SIDE / 2,
            random.uniform(70, 120),
            random.uniform(0.35, 0.65) * math.pi,
            random.randint(215, 255),
            2,
        )


CLASSES: dict[str, Callable[[Pen, Random], None]] = {
    "crazing": crazing,
    "inclusion": inclusion,
    "patches": patches,
    "pitted_surface": pitted,
    "rolled_in_scale": rolled_in_scale,
    "scratches": scratches,
}


def surface(name: str, number: int) -> Image.Image:
    """One image, of mode L: brushed steel in uneven light, and what is wrong with it."""
    random = Random(f"{name} {number}")
    noise = np.random.default_rng(random.getrandbits(32))
    grain = Image.fromarray(noise.normal(128, 40, (SIDE, SIDE)).clip(0, 255).astype(np.uint8))
    grain = grain.resize((SIDE, 4 * SIDE), Image.Resampling.BICUBIC).crop((0, 0, SIDE, SIDE))
    slope = noise.normal(0, 25, 2) @ np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j].reshape(2, -1)
    light = Image.fromarray((slope.reshape(SIDE, SIDE) + random.uniform(110, 150)).clip(0, 255).astype(np.uint8))
    steel = Image.blend(light, grain.filter(ImageFilter.GaussianBlur(0.7)), 0.35)
    marks = Image.new("L", (SIDE, SIDE), 128)
    CLASSES[name](ImageDraw.Draw(marks), random)
    return ImageChops.overlay(steel, marks.filter(ImageFilter.GaussianBlur(0.6)))


def write_images(root: Path, train: int, test: int) -> None:
    """Write `train` and `test` images of each class; none of the two is in the other."""
    for split, numbers in (("train", range(train)), ("test", range(train, train + test))):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in numbers:
                surface(name, number).save(folder / f"{number:03d}.png")


def sheet(columns: int) -> Image.Image:
    """A row of images of each class."""
    shown = Image.new("L", (columns * (SIDE + 4), len(CLASSES) * (SIDE + 4)), 255)
    for row, name in enumerate(CLASSES):
        for column in range(columns):
            shown.paste(surface(name, column), (column * (SIDE + 4), row * (SIDE + 4)))
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=48, help="images of each class")
    parser.add_argument("--test", type=int, default=16, help="images of each class")
    args = parser.parse_args()
    write_images(args.folder, args.train, args.test)
    sheet(6).save(args.folder.with_suffix(".png"))
    print(f"{args.folder}: {len(CLASSES)} classes, {args.train} train and {args.test} test images of each")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
