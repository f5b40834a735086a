"""How costs grow: training with images and with MACs, memory with images, planning with layers.

    python benchmarks/scaling.py [benchmarks/scaling.json]

Training is one epoch of Xception, each point in a process of its own, points of a series in turns.
Planning finds the groups of ResNets (arXiv 1512.03385), scores them and decides a plan for half of their MACs.

Invariant: images are memory-mapped from a file, as those of a data set are.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import growth, in_turns, keep, summary
from torch import nn

from compressor.data import Split
from compressor.memory import measure_memory
from compressor.models.counting import count
from compressor.models.xception import Xception
from compressor.preprocess import InputSpec
from compressor.pruning.groups import find_groups
from compressor.pruning.importance import score_groups
from compressor.pruning.plan import decide_plan
from compressor.training import finetune

IMAGES = (256, 512, 1024, 2048)  # at SIDE pixels
SIDES = (64, 96, 136, 192)  # pixels, with FEW images; MACs grow with the area
SIDE, FEW = 64, 192
RESNETS = {  # residual blocks of each stage, and whether they are bottlenecks
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}


class Residual(nn.Module):
    """Two 3x3 convolutions, or a bottleneck of three, beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool):
        super().__init__()
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        else:
            shapes = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
        layers: list[nn.Module] = []
        for i, o, kernel, step in shapes:
            layers += [nn.Conv2d(i, o, kernel, step, kernel // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        self.body = nn.Sequential(*layers[:-1])
        same = stride == 1 and inputs == outputs
        change = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Identity() if same else nn.Sequential(*change)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet(blocks: tuple[int, ...], bottleneck: bool) -> nn.Module:
    """A ResNet with 1000 classes and random weights."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 64
    for stage, count_blocks in enumerate(blocks):
        width = 64 << stage
        for i in range(count_blocks):
            layers.append(Residual(inputs, width, 2 if stage and not i else 1, bottleneck))
            inputs = 4 * width if bottleneck else width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)).eval()


def train_once(folder: Path, images: int, side: int) -> dict[str, float]:
    """Seconds and peak memory above the floor of one epoch on `images` images of `side` pixels."""
    file = folder / "images.npy"
    pixels = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=(images, side, side, 3))
    rng = np.random.default_rng(0)
    for image in pixels:
        image[:] = rng.integers(0, 256, image.shape, dtype=np.uint8)
    pixels.flush()
    del pixels
    labels = np.arange(images, dtype=np.int64) % 7
    train = Split(np.load(file, mmap_mode="r"), labels, tuple(map(str, range(images))))
    val = Split(train.images[:32], labels[:32], train.names[:32])
    torch.manual_seed(0)
    network = Xception(7)
    macs = count(network, torch.zeros(1, 3, side, side)).macs
    warm = Split(train.images[:64], labels[:64], train.names[:64])
    options: dict[str, Any] = {"val": val, "spec": InputSpec(side, side), "batch_size": 32, "learning_rate": 1e-6}
    finetune(network, train=warm, epochs=1, **options)
    with measure_memory() as memory:
        result = finetune(network, train=train, epochs=1, **options)
    seconds = result.seconds - result.time["validation"]
    return {"seconds": seconds, "macs": macs, "peak_bytes": memory.peak_bytes}


def in_a_process(images: int, side: int) -> dict[str, float]:
    """`train_once` in a fresh process."""
    command = [sys.executable, __file__, "--train-once", str(images), str(side)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def series(points: list[tuple[int, int]], rounds: int) -> list[dict[str, Any]]:
    """Every point `rounds` times, in turns."""
    found: list[list[dict[str, float]]] = [[] for _ in points]
    for _ in range(rounds):
        for place, point in zip(found, points, strict=True):
            place.append(in_a_process(*point))
    return [
        {
            "images": images,
            "side": side,
            "macs": runs[0]["macs"],
            "seconds": summary([run["seconds"] for run in runs]),
            "peak_bytes": summary([run["peak_bytes"] for run in runs]),
        }
        for (images, side), runs in zip(points, found, strict=True)
    ]


def plan_once(network: nn.Module, example: torch.Tensor) -> None:
    """Everything that planning a prune stage does on an untrained network."""
    groups = find_groups(network, example, ignored=())
    scores = score_groups(network, groups, kind="magnitude", loss_batches=None, seed=0)
    decide_plan(
        network,
        example,
        groups=groups,
        scores=scores,
        ranking="global",
        targets={"macs": count(network, example).macs // 2},
        round_to=8,
        min_channels=8,
    )


def planning(rounds: int) -> list[dict[str, Any]]:
    """Seconds of planning each ResNet, in turns."""
    torch.manual_seed(0)
    example = torch.zeros(1, 3, 64, 64)
    networks = {name: resnet(*shape) for name, shape in RESNETS.items()}
    seconds = in_turns({name: partial(plan_once, network, example) for name, network in networks.items()}, rounds)
    layers = {n: sum(isinstance(m, nn.Conv2d | nn.Linear) for m in net.modules()) for n, net in networks.items()}
    return [{"network": n, "layers": layers[n], "seconds": summary(spent)} for n, spent in seconds.items()]


def medians(rows: list[dict[str, Any]], key: str) -> list[float]:
    """The medians of a measured column."""
    return [row[key]["median"] for row in rows]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train-once", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train_once:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(train_once(Path(folder), *args.train_once)))
        return 0
    by_images = series([(images, SIDE) for images in IMAGES], args.rounds)
    by_macs = series([(FEW, side) for side in SIDES], args.rounds)
    plans = planning(args.rounds)
    peaks = medians(by_images, "peak_bytes")
    figures = {
        "training_by_images": {
            "rows": by_images,
            "growth": growth([row["images"] for row in by_images], medians(by_images, "seconds")),
            "peak_bytes_largest_over_smallest": max(peaks) / min(peaks),
        },
        "training_by_macs": {
            "rows": by_macs,
            "growth": growth([row["macs"] for row in by_macs], medians(by_macs, "seconds")),
        },
        "planning_by_layers": {
            "rows": plans,
            "growth": growth([row["layers"] for row in plans], medians(plans, "seconds")),
        },
    }
    keep(args.output, {"rounds": args.rounds, **figures})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
