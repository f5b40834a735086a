"""Your own network and your own folder of images: pruned to a latency, exported and verified.

    python examples/own_model.py [--images FOLDER] [--latency 0.45x] [--out runs/own_model]

FOLDER holds train/CLASS/*.png and test/CLASS/*.png; without one, shapes are drawn. Latency: ms, or a fraction.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from compressor import compress
from compressor.recipe import Recipe


def layer(outputs: int, kernel: int = 3, *, inputs: int | None = None, stride: int = 1, groups: int = 1) -> nn.Module:
    conv = nn.Conv2d(inputs or outputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class OwnNet(nn.Module):
    """A residual network with depthwise convolutions; nothing in it knows of compression."""

    def __init__(self, num_classes: int, width: int = 64):
        super().__init__()
        self.stem = layer(width, inputs=3, stride=2)
        self.blocks = nn.ModuleList(nn.Sequential(layer(width, groups=width), layer(width, 1)) for _ in range(3))
        self.last = layer(2 * width, inputs=width, stride=2)
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.last(x).mean((2, 3)))


def draw_shapes(folder: Path, size: int = 64) -> Path:
    """Write `folder/{train,test}/{circle,square,triangle}/*.png`."""
    rng = random.Random(0)
    for part, count in (("train", 40), ("test", 10)):
        for name, corners in (("circle", 90), ("square", 4), ("triangle", 3)):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                picture = Image.new("RGB", (size, size), tuple(rng.randrange(90) for _ in range(3)))
                centre = (rng.randrange(24, size - 24), rng.randrange(24, size - 24), rng.randrange(12, 22))
                colour = tuple(rng.randrange(130, 256) for _ in range(3))
                ImageDraw.Draw(picture).regular_polygon(centre, corners, rotation=rng.randrange(360), fill=colour)
                picture.save(folder / part / name / f"{i:03}.png")
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--latency", default="0.45x", type=lambda text: text if text.endswith("x") else float(text))
    parser.add_argument("--out", type=Path, default=Path("runs/own_model"))
    args = parser.parse_args()
    images = args.images or draw_shapes(Path(tempfile.mkdtemp(prefix="shapes")))
    train = {"type": "finetune", "epochs": 4, "batch_size": 16, "learning_rate": 3e-3}
    prune = {"type": "prune", "target": {"latency_ms": args.latency}, "round_to": 4, "min_channels": 8}
    stages = [train, prune, train]
    sections = {"model": {"source": "custom", "name": "OwnNet", "weights": "none"}, "input": {"size": 64}}
    data = {"source": "image_folder", "path": str(images)}
    recipe = Recipe.model_validate({"version": 1, **sections, "data": data, "stages": stages})
    report = compress(recipe, args.out, model=OwnNet)
    print(f"{report.verdict['status']}: {', '.join(report.verdict['reasons']) or 'every gate met'}")
    print(f"latency {report.baseline.latency_ms:.2f} -> {report.result.latency_ms:.2f} ms, IR: {args.out}/artifacts")
    return 0 if report.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
