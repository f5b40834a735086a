"""Accuracy of a published IR through its own preprocessing, from a folder of images or from arrays.

Invariant: needs only openvino, numpy and pillow; labels come from the IR, and every label has exactly one class folder.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.data.decode import ImageFaultError, decode, strict_pillow
from compressor.data.files import is_ignored, label_of
from compressor.errors import DataError, did_you_mean
from compressor.metrics import calibration_error, probabilities, wilson_interval
from compressor.runtime import DEFAULT, predict, read_labels


@dataclass(frozen=True)
class ClassCount:
    """Images of one class and how many of them were named right."""

    correct: int
    total: int

    @property
    def fraction(self) -> float:
        """Recall; 1 for a class without images."""
        return self.correct / self.total if self.total else 1.0


@dataclass(frozen=True)
class Evaluation:
    """Accuracy figures, each image counting once.

    Attributes:
        top1: Fraction of images whose highest logit is the right class.
        top5: Same for the five highest; None with five classes or fewer.
        n: Number of images.
        interval: Wilson interval of `top1`, 95 %.
        per_class: Label to counts, in index order.
        confusion: `confusion[i][j]` images of class i named j.
        calibration_error: Mean distance of confidence from the share of images named right, see
            `metrics.calibration_error`.
    """

    top1: float
    top5: float | None
    n: int
    interval: tuple[float, float]
    per_class: dict[str, ClassCount]
    confusion: tuple[tuple[int, ...], ...]
    calibration_error: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return asdict(self)


def evaluate_ir(xml: Path, folder: Path, *, config: Mapping[str, str] = DEFAULT) -> Evaluation:
    """Evaluate an IR on a tree of class folders, or on the `test` folder in it.

    Raises:
        DataError: The IR has no labels, folders and labels do not match, a class is empty, or an image is unreadable.
    """
    labels = read_labels(xml)
    if not labels:
        raise DataError(f"{xml}: no labels in its model_info, so folders cannot be matched with outputs")
    files = list_images(folder, labels)
    truth = np.asarray([index for index, _ in files], np.int64)
    return summarise(predict(xml, _decoded([path for _, path in files]), config), truth, labels)


def evaluate_images(
    xml: Path,
    images: NDArray[np.uint8],
    truth: NDArray[np.int64],
    labels: Sequence[str],
    *,
    config: Mapping[str, str] = DEFAULT,
) -> Evaluation:
    """Evaluate an IR on decoded images (N, h, w, 3) RGB with class indices (N,)."""
    return summarise(predict(xml, images, config), truth, labels)


def summarise(logits: NDArray[np.float32], truth: NDArray[np.int64], labels: Sequence[str]) -> Evaluation:
    """Count; logits (N, classes), truth (N,) indices into labels. Ties go to the lower index."""
    if not len(truth):
        raise DataError("evaluation: no images")
    if logits.shape != (len(truth), len(labels)):
        raise DataError(f"evaluation: logits {logits.shape} for {len(truth)} images and {len(labels)} labels")
    classes = len(labels)
    confusion = np.zeros((classes, classes), np.int64)
    named = logits.argmax(1)
    np.add.at(confusion, (truth, named), 1)
    correct = int(np.trace(confusion))
    top5 = None
    if classes > 5:
        best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        top5 = float((best == truth[:, None]).any(1).mean())
    return Evaluation(
        top1=correct / len(truth),
        top5=top5,
        n=len(truth),
        interval=wilson_interval(correct, len(truth)),
        per_class={
            label: ClassCount(int(confusion[index, index]), int(confusion[index].sum()))
            for index, label in enumerate(labels)
        },
        confusion=tuple(tuple(int(value) for value in row) for row in confusion),
        calibration_error=calibration_error(probabilities(logits).max(1), named == truth),
    )


def list_images(folder: Path, labels: Sequence[str]) -> list[tuple[int, Path]]:
    """Class index and path of every image, in label order; `folder` holds one folder per class, or `test` which does.

    Raises:
        DataError: A folder without a label, a label without a folder, or a class without images.
    """
    if folder.is_file():
        raise DataError(f"{folder}: a file; give a folder with one folder per class (unpack an archive first)")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    root = folder / "test" if (folder / "test").is_dir() and "test" not in labels else folder
    folders: dict[str, Path] = {}
    for path in sorted(root.iterdir()):
        if path.is_dir() and not is_ignored(path.name):
            name = label_of(path.name)
            if name in folders:
                raise DataError(f"{path} and {folders[name]} are the same class '{name}'; merge them")
            folders[name] = path
    for name, path in folders.items():
        if name not in labels:
            raise DataError(f"{path}: the model has no label '{name}'{did_you_mean(name, labels)}")
    files = []
    for index, label in enumerate(labels):
        if label not in folders:
            raise DataError(f"{root}: no folder for label '{label}'{did_you_mean(label, folders)}")
        # Every file counts, as in training: one that is no image is an error by name, not an image fewer.
        found = sorted(path for path in folders[label].iterdir() if path.is_file() and not is_ignored(path.name))
        if not found:
            raise DataError(f"{folders[label]}: no image in it")
        files += [(index, path) for path in found]
    return files


def _decoded(paths: Sequence[Path]) -> Iterator[NDArray[np.uint8]]:
    with strict_pillow():
        for path in paths:
            try:
                yield decode(path.read_bytes()).pixels
            except ImageFaultError as fault:
                raise DataError(f"{path}: {fault}") from fault


def format_evaluation(evaluation: Evaluation) -> str:
    """Lay the figures out for people: accuracy with its interval, the weakest classes, the commonest confusions."""
    low, high = evaluation.interval
    lines = [f"top-1 {evaluation.top1:.4f} (95 % interval {low:.4f}-{high:.4f}) on {evaluation.n} images"]
    if evaluation.top5 is not None:
        lines.append(f"top-5 {evaluation.top5:.4f}")
    lines.append(f"expected calibration error {evaluation.calibration_error:.4f}")
    labels = list(evaluation.per_class)
    weakest = sorted(labels, key=lambda label: evaluation.per_class[label].fraction)[:5]
    for label in weakest:
        count = evaluation.per_class[label]
        if count.correct < count.total:
            lines.append(f"  {label}: {count.correct} of {count.total}")
    wrong = [
        (number, labels[i], labels[j])
        for i, row in enumerate(evaluation.confusion)
        for j, number in enumerate(row)
        if i != j and number
    ]
    for number, label, named in sorted(wrong, reverse=True)[:5]:
        lines.append(f"  {label} taken for {named}: {number}")
    return "\n".join(lines)
