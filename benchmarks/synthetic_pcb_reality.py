"""Train a small CNN on synthetic_pcb alone and ask it about crops of real DeepPCB boards: ok, or any defect?

The tar holds `deeppcb/{train,test}/{ok,defect}/NUMBER_{temp,test}.png`. A defect crop is cut where a tested board
differs from its template, an ok crop where it does not. Nothing real is trained on.

    python benchmarks/synthetic_pcb_reality.py DEEPPCB.tar --boards test --output benchmarks/synthetic_pcb_reality.json
"""

import argparse
import io
import json
import platform
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compressor.artifacts import atomic_write
from compressor.data.synthetic_pcb import CLASSES, generate
from compressor.metrics import wilson_interval

Mask = NDArray[np.bool_]
EDGE_SHIFT = 3  # board pixels by which registration may move an edge without it being a defect
MIN_PATCH = 12  # board pixels of a difference that counts as a defect ...
MIN_CORE = 4  # ... and of its part that no shift of an edge explains
MOST_DEFECTS = 12  # on a board, as the data set says; more differences mean that the pair is misregistered


@dataclass(frozen=True)
class RealCrops:
    """Crops scaled to the network's size, uint8 (N, size, size) of 0/255 each.

    `template` shows the flawless twin of each of the `defect` crops: the hardest ok there is.
    """

    defect: NDArray[np.uint8]
    ok: NDArray[np.uint8]
    template: NDArray[np.uint8]
    boards_used: int
    boards: int


def read_boards(tar_path: Path, split: str) -> dict[str, tuple[Mask, Mask]]:
    """Read (template, tested) copper masks by board number."""
    halves: dict[str, dict[str, Mask]] = {}
    with tarfile.open(tar_path) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if member.isfile() and len(parts) == 4 and parts[1] == split:
                stream = tar.extractfile(member)
                assert stream is not None
                image = np.asarray(Image.open(io.BytesIO(stream.read())).convert("L")) < 128
                halves.setdefault(parts[3].split("_")[0], {})[parts[2]] = image
    return {number: (pair["ok"], pair["defect"]) for number, pair in sorted(halves.items()) if len(pair) == 2}


def _spread(mask: Mask, grow: bool) -> Mask:
    """Dilate (or erode) by one pixel in all eight directions."""
    padded = np.pad(mask, 1, constant_values=not grow)
    height, width = mask.shape
    shifted = [padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]
    stacked: Mask = np.logical_or.reduce(shifted) if grow else np.logical_and.reduce(shifted)
    return stacked


def difference(template: Mask, tested: Mask) -> Mask:
    """Where the boards differ by more than the 1-px edges that registration leaves."""
    return _spread(_spread(template != tested, grow=False), grow=True)


def defect_cores(template: Mask, tested: Mask) -> Mask:
    """Copper far from all of the template's copper, or bare board far from all its bare board.

    Far is more than EDGE_SHIFT pixels: on many boards registration moves whole edges by 2-3 px.
    """
    near_copper, near_bare = template, ~template
    for _ in range(EDGE_SHIFT):
        near_copper, near_bare = _spread(near_copper, grow=True), _spread(near_bare, grow=True)
    cores: Mask = (tested & ~near_copper) | (~tested & ~near_bare)
    return cores


def defect_centres(changed: Mask, cores: Mask) -> list[tuple[int, int]]:
    """Centres of the 8-connected patches of difference that have a core, are large enough and so are no edge shift."""
    waiting = {(int(y), int(x)) for y, x in np.argwhere(changed | cores)}
    centres = []
    while waiting:
        stack = [waiting.pop()]
        patch = []
        while stack:
            y, x = stack.pop()
            patch.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & waiting
            waiting -= near
            stack.extend(near)
        if len(patch) >= MIN_PATCH and sum(bool(cores[place]) for place in patch) >= MIN_CORE:
            y, x = np.mean(patch, axis=0)
            centres.append((int(y), int(x)))
    return sorted(centres)


def shrink(mask: Mask, size: int) -> NDArray[np.uint8]:
    """Scale a crop by area averaging and binarise it again; copper becomes 0."""
    grey = Image.fromarray(np.where(mask, np.uint8(0), np.uint8(255))).resize((size, size), Image.Resampling.BOX)
    return np.where(np.asarray(grey) < 128, np.uint8(0), np.uint8(255))


def cut_crops(boards: dict[str, tuple[Mask, Mask]], *, side: int, size: int, per_board: int, seed: int) -> RealCrops:
    """Cut up to `per_board` defect crops of each board, as many random ok crops of it, and the defects' templates."""
    rng = np.random.default_rng(seed)
    jitter = side // 5
    defect, ok, template = [], [], []
    boards_used = 0
    for clean, tested in boards.values():
        height, width = clean.shape
        changed = difference(clean, tested)
        centres = defect_centres(changed, defect_cores(clean, tested))
        if len(centres) > MOST_DEFECTS:
            continue
        boards_used += 1
        rng.shuffle(centres)
        for y, x in centres[:per_board]:
            top = int(np.clip(y - side // 2 + rng.integers(-jitter, jitter + 1), 0, height - side))
            left = int(np.clip(x - side // 2 + rng.integers(-jitter, jitter + 1), 0, width - side))
            window = (slice(top, top + side), slice(left, left + side))
            for _ in range(200):
                oy, ox = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
                if not changed[oy : oy + side, ox : ox + side].any():
                    defect.append(shrink(tested[window], size))
                    template.append(shrink(clean[window], size))
                    ok.append(shrink(tested[oy : oy + side, ox : ox + side], size))
                    break
    return RealCrops(np.stack(defect), np.stack(ok), np.stack(template), boards_used, len(boards))


class SmallNet(nn.Module):
    """Eight 3x3 convolutions with batch normalisation; mean and maximum are pooled, as a defect is small."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        plan = [(1, 1, 2), (1, 1, 1), (1, 2, 2), (2, 2, 1), (2, 4, 2), (4, 4, 1), (4, 4, 1), (4, 4, 1)]
        layers: list[nn.Module] = []
        for index, (before, after, stride) in enumerate(plan):
            inputs = width * before if index else 1
            layers += [
                nn.Conv2d(inputs, width * after, 3, stride, 1, bias=False),
                nn.BatchNorm2d(width * after),
                nn.ReLU(inplace=True),
            ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width * 8, classes)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.features(x)
        pooled = torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1)
        logits: Tensor = self.head(pooled)
        return logits


def _input(images: NDArray[np.uint8]) -> Tensor:
    return (torch.from_numpy(images).float() / 127.5 - 1)[:, None]


def _turn(batch: Tensor, generator: torch.Generator) -> Tensor:
    """One of the eight symmetries of the square, the same for the whole batch."""
    turned = torch.rot90(batch, int(torch.randint(4, (), generator=generator)), (2, 3))
    return turned.transpose(2, 3) if torch.rand((), generator=generator) < 0.5 else turned


def train(images: NDArray[np.uint8], labels: NDArray[np.int64], *, epochs: int, width: int, seed: int) -> nn.Module:
    """Train SmallNet with AdamW, one cycle and random symmetries."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    module = SmallNet(width, len(CLASSES))
    inputs, targets = _input(images), torch.from_numpy(labels)
    batch, steps = 64, len(targets) // 64
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * steps)
    for epoch in range(epochs):
        order = torch.randperm(len(targets), generator=generator)
        total = 0.0
        for step in range(steps):
            index = order[step * batch : (step + 1) * batch]
            with torch.autocast("cpu", torch.bfloat16):
                logits = module(_turn(inputs[index], generator).contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), targets[index], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        print(f"epoch {epoch + 1}/{epochs}: loss {total / steps:.3f}", file=sys.stderr)
    module.eval()
    return module


@torch.inference_mode()
def predict(module: nn.Module, images: NDArray[np.uint8]) -> NDArray[np.int64]:
    answers = [module(_input(images[start : start + 256])).argmax(1) for start in range(0, len(images), 256)]
    return torch.cat(answers).numpy()


def judge(module: nn.Module, crops: RealCrops) -> dict[str, object]:
    """Balanced accuracy of ok against any defect, for random ok places and for the defects' own templates."""
    answer = predict(module, crops.defect)
    hits = int((answer != 0).sum())
    passes = int((predict(module, crops.ok) == 0).sum())
    template_passes = int((predict(module, crops.template) == 0).sum())
    count = len(answer)
    return {
        "boards": crops.boards,
        "boards_used": crops.boards_used,
        "crops_of_each_kind": count,
        "balanced_accuracy": round((hits + passes) / 2 / count, 4),
        "balanced_accuracy_against_templates": round((hits + template_passes) / 2 / count, 4),
        "defects_found": round(hits / count, 4),
        "defects_found_95": [round(bound, 4) for bound in wilson_interval(hits, count)],
        "random_ok_passed": round(passes / count, 4),
        "random_ok_passed_95": [round(bound, 4) for bound in wilson_interval(passes, count)],
        "templates_passed": round(template_passes / count, 4),
        "classes_named_on_defects": {name: int((answer == i).sum()) for i, name in enumerate(CLASSES)},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tar", type=Path, help="deeppcb.tar")
    parser.add_argument("--boards", choices=("train", "test"), default="test", help="split to judge on; tune on train")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file too")
    parser.add_argument("--side", type=int, default=54, help="side of a real crop in board pixels")
    parser.add_argument("--size", type=int, default=48, help="side of a crop as the network sees it")
    parser.add_argument("--per-class", type=int, default=1500)
    parser.add_argument("--per-board", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--width", type=int, default=24, help="channels of the first convolution")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    began = time.perf_counter()
    images, labels = generate(per_class=args.per_class, size=args.size, seed=args.seed)
    generated = time.perf_counter()
    module = train(images, labels, epochs=args.epochs, width=args.width, seed=args.seed)
    trained = time.perf_counter()
    unseen, truth = generate(per_class=200, size=args.size, seed=args.seed + 1)
    answer = predict(module, unseen)
    crops = cut_crops(
        read_boards(args.tar, args.boards), side=args.side, size=args.size, per_board=args.per_board, seed=args.seed
    )
    settings = {key: value for key, value in vars(args).items() if key not in ("tar", "output")}
    figures = {
        "what": "trained on synthetic_pcb only; ok against any defect on crops of real DeepPCB boards",
        "settings": settings,
        "real": judge(module, crops),
        "synthetic": {
            "test_images": len(truth),
            "accuracy": round(float((answer == truth).mean()), 4),
            "recall": {name: round(float((answer[truth == i] == i).mean()), 4) for i, name in enumerate(CLASSES)},
        },
        "seconds": {"generate": round(generated - began, 1), "train": round(trained - generated, 1)},
        "environment": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "machine": platform.machine(),
            "threads": args.threads,
        },
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if args.output:
        atomic_write(args.output, text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
