"""Images per second of `finetune` against the bare computation, and against a plain PyTorch training loop.

    python benchmarks/training_speed.py bare  [benchmarks/training_speed_bare.json]
    python benchmarks/training_speed.py plain --data caltech101.tar --weights xception_imagenet.safetensors
        [benchmarks/training_speed_plain.json]

`bare`: forward and backward passes of the same network on one cached batch in the same precision, and, with a live
teacher, its forward pass as well; in turns with `finetune` on random images.

`plain`: the same training (network, weights, images, epochs, optimiser, schedule, batch) as most people write it: NCHW,
float32, a DataLoader that decodes and resizes JPEGs in worker processes. Here `finetune` is charged with filling its
image cache too.

Invariant: images per second count what a training loop does, without validation.
"""

import argparse
import tarfile
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import in_turns, keep, summary
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from compressor.data import Split, load_dataset
from compressor.data.batches import Augment, to_input
from compressor.distillation import Distillation
from compressor.inference import arithmetic, choose_precision, frozen_copy
from compressor.metrics import wilson_interval
from compressor.models.weights import load_weights
from compressor.models.xception import Xception
from compressor.optimizers import make_optimizer
from compressor.preprocess import InputSpec
from compressor.training import finetune, schedule_factor

RATE, DECAY, WARMUP = 1e-3, 0.02, 0.25


def bare(size: int, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds per image of `finetune` and of the bare passes, without and with a teacher that is asked every time."""
    spec, dtype = InputSpec(size, size), choose_precision("auto", "cpu")
    rng = np.random.default_rng(0)

    def split(count: int) -> Split:
        images = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        return Split(images, np.arange(count, dtype=np.int64) % 101, tuple(map(str, range(count))))

    train, val = split(steps * batch), split(batch)
    torch.manual_seed(0)
    teacher = frozen_copy(Xception(101)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, labels = to_input(train.images[:batch], spec, "cpu"), torch.from_numpy(train.labels[:batch])

    def passes(network: nn.Module, taught: bool) -> None:
        network.train()
        for _ in range(steps):
            network.zero_grad(set_to_none=True)
            with arithmetic(dtype, "cpu"):
                if taught:
                    with torch.no_grad():
                        teacher(x)
                out = network(x)
            F.cross_entropy(out.float(), labels).backward()  # type: ignore[no-untyped-call]

    def trained(network: nn.Module, distill: Distillation | None) -> float:
        # A crop is never the same twice, so the teacher is asked about every image.
        augment = Augment(crop=0.9)
        result = finetune(
            network,
            train=train,
            val=val,
            spec=spec,
            epochs=1,
            batch_size=batch,
            learning_rate=1e-6,
            augment=augment,
            distill=distill,
        )
        return result.seconds - result.time["validation"]

    figures: dict[str, Any] = {}
    for name, distill in (("without_teacher", None), ("with_teacher", Distillation(teacher, 2.0, 0.5))):
        ours, alone = Xception(101), Xception(101).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        seconds = in_turns(
            {"finetune": partial(trained, ours, distill), "bare": partial(passes, alone, distill is not None)}, rounds
        )
        figures[name] = {
            "images_per_s": {work: summary([len(train.labels) / s for s in spent]) for work, spent in seconds.items()},
            "share_of_bare": summary([b / f for b, f in zip(seconds["bare"], seconds["finetune"], strict=True)]),
        }
    return {"size": size, "batch": batch, "steps": steps, "precision": str(dtype), "figures": figures}


class Jpegs(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images decoded, resized and normalised whenever they are asked for, half of them mirrored in training."""

    def __init__(self, root: Path, names: Sequence[str], labels: Sequence[int], spec: InputSpec, train: bool):
        self.root, self.names, self.labels, self.spec, self.train = root, names, labels, spec, train

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.root / self.names[index]) as file:
            image = file.convert("RGB").resize((self.spec.width, self.spec.height), Image.Resampling.BILINEAR)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
        x = (x / 255 - torch.tensor(self.spec.mean)[:, None, None]) / torch.tensor(self.spec.std)[:, None, None]
        return x.flip(2) if self.train and torch.rand(()) < 0.5 else x, self.labels[index]


def plain_loop(
    network: nn.Module, root: Path, train: Split, val: Split, spec: InputSpec, epochs: int, batch: int, workers: int
) -> tuple[float, int]:
    """Train as most people write it; returns seconds without validation, and correct validation images at the end."""
    loader, val_loader = (
        DataLoader(
            Jpegs(root, split.names, split.labels.tolist(), spec, learning),
            batch_size=batch,
            shuffle=learning,
            drop_last=learning,
            num_workers=workers,
            persistent_workers=learning and workers > 0,
        )
        for split, learning in ((train, True), (val, False))
    )
    torch.manual_seed(0)
    optimizer = make_optimizer(network, "adamw", RATE, DECAY)
    factor, total, step = schedule_factor("one_cycle", WARMUP), epochs * len(loader), 0
    started = time.perf_counter()
    for _ in range(epochs):
        network.train()
        for x, labels in loader:
            for group in optimizer.param_groups:
                group["lr"] = RATE * factor(step / total)
            optimizer.zero_grad()
            F.cross_entropy(network(x), labels).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            step += 1
    seconds = time.perf_counter() - started
    network.eval()
    with torch.no_grad():
        return seconds, sum(int((network(x).argmax(1) == labels).sum()) for x, labels in val_loader)


def plain(
    data: Path, weights: Path, size: int, batch: int, epochs: int, classes: int, per_class: int, workers: int
) -> dict[str, Any]:
    """Images per second and validation accuracy of `finetune` and of the plain loop, trained on the same images."""
    spec = InputSpec(size, size)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "images"
        unpack(data, root, classes, per_class)
        started = time.perf_counter()
        dataset = load_dataset(
            source="image_folder", path=str(root), spec=spec, cache=Path(name) / "cache", val_fraction=0.3
        )
        prepared = time.perf_counter() - started
        train, val = dataset.train, dataset.val
        images = epochs * (len(train.labels) // batch) * batch
        ours, theirs = (pretrained(weights, len(dataset.labels)) for _ in range(2))
        result = finetune(
            ours,
            train=train,
            val=val,
            spec=spec,
            epochs=epochs,
            batch_size=batch,
            learning_rate=RATE,
            weight_decay=DECAY,
            warmup=WARMUP,
            augment=Augment(flip=True),
        )
        spent = result.seconds - result.time["validation"]
        correct = round(result.history[-1].val_accuracy * len(val.labels))
        plain_spent, plain_correct = plain_loop(theirs, root, train, val, spec, epochs, batch, workers)
    figures = {
        "finetune": {"images_per_s": images / (spent + prepared), "seconds": spent, "filling_the_cache_s": prepared},
        "plain": {"images_per_s": images / plain_spent, "seconds": plain_spent, "workers": workers},
    }
    for loop, right in (("finetune", correct), ("plain", plain_correct)):
        figures[loop] |= {"accuracy": right / len(val.labels), "ci": wilson_interval(right, len(val.labels))}
    return {
        "size": size,
        "batch": batch,
        "epochs": epochs,
        "train_images": len(train.labels),
        "val_images": len(val.labels),
        "classes": len(dataset.labels),
        "precision": result.precision,
        "figures": figures,
        "times_faster": figures["finetune"]["images_per_s"] / figures["plain"]["images_per_s"],
    }


def unpack(data: Path, root: Path, classes: int, per_class: int) -> None:
    """Write the first images of the first classes of a tar's `train/CLASS/FILE` as `root/CLASS/FILE`."""
    taken: dict[str, int] = {}
    with tarfile.open(data) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            parts = Path(member.name).parts
            if not member.isfile() or "train" not in parts[:-2]:
                continue
            label = parts[-2]
            if (label not in taken and len(taken) == classes) or taken.get(label, 0) == per_class:
                continue
            taken[label] = taken.get(label, 0) + 1
            file = tar.extractfile(member)
            assert file is not None
            (root / label).mkdir(parents=True, exist_ok=True)
            (root / label / parts[-1]).write_bytes(file.read())


def pretrained(weights: Path, classes: int) -> nn.Module:
    """Xception with the given weights and a new head."""
    torch.manual_seed(0)
    network = Xception(classes)
    load_weights(network, name="xception", weights=str(weights), head="fc")
    nn.init.normal_(network.fc.weight, std=0.01)
    nn.init.zeros_(network.fc.bias)
    return network


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("against", choices=("bare", "plain"))
    parser.add_argument("output", type=Path, nargs="?", help="JSON file to write")
    parser.add_argument("--size", type=int, default=160, help="input side in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="bare: steps of one turn")
    parser.add_argument("--rounds", type=int, default=7, help="bare: turns")
    parser.add_argument("--data", type=Path, help="plain: tar with train/CLASS/FILE, such as Caltech-101's")
    parser.add_argument("--weights", type=Path, help="plain: ImageNet weights as .safetensors")
    parser.add_argument("--epochs", type=int, default=3, help="plain: passes over the images")
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--per-class", type=int, default=40)
    parser.add_argument("--workers", type=int, default=2, help="plain: processes that decode images")
    args = parser.parse_args()
    if args.against == "bare":
        keep(args.output, bare(args.size, args.batch, args.steps, args.rounds))
    elif args.data and args.weights:
        settings = (args.size, args.batch, args.epochs, args.classes, args.per_class, args.workers)
        keep(args.output, plain(args.data, args.weights, *settings))
    else:
        parser.error("plain: give --data and --weights")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
