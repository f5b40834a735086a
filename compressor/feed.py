"""Training behind frozen layers: what they give for an image is computed once, kept in a file and trained from.

Invariant: the random draws, and up to rounding the weights that come out, are those of training the whole network. The
file has no name: it is gone when the layers thaw or the process ends, however it ends.
"""

import logging
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor.data import Split
from compressor.data.batches import Augment, Draw, drawn_images, draws, labels_of, to_input
from compressor.errors import ResourceError, UnsupportedModelError
from compressor.frozen_prefix import Cut, find_cuts, split_at
from compressor.inference import arithmetic
from compressor.modes import evaluating
from compressor.outputs import logits_of
from compressor.preprocess import InputSpec

log = logging.getLogger(__name__)

_MAPPINGS = (nn.modules.conv._ConvNd, nn.Linear)  # what a network's memory and time go into


@dataclass(frozen=True)
class Frozen:
    """Layers that do not change during a training, and how much of what they compute may be kept.

    Attributes:
        layers: Names of modules, with all inside them.
        folder: Where the file of features lies; None = nothing is kept.
        max_bytes: Largest size of that file.
        files: Closes it when the layers thaw.
    """

    layers: frozenset[str] = frozenset()
    folder: Path | None = None
    max_bytes: int = 0
    files: ExitStack = field(default_factory=ExitStack)


NOTHING_FROZEN = Frozen()


@dataclass(frozen=True)
class Batch:
    """One step's inputs, for the network or for what is trained of it, and labels.

    Attributes:
        images: The images themselves, or those at some places of the batch; for a teacher.
        rows: A number for each image in its orientation, below `Feed.rows`; None where there are too many to number.
        blend: See `Draw.blend`; the labels are each image's own.
    """

    inputs: Tensor
    labels: Tensor
    images: Callable[[NDArray[np.int64] | None], Tensor]
    rows: NDArray[np.int64] | None
    blend: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Feed:
    """What a training loop runs, and on what.

    Attributes:
        trained: The network, or the part behind the cut; takes the inputs of a batch, gives logits.
        batches: One shuffled pass over the training images, for a batch size and a generator.
        rows: How many images in how many orientations there are to train on; 0 where they cannot be numbered.
        val_features: What `trained` takes instead of these validation images; None = it takes the images.
        summary: For the report: `layers` frozen, `cut` (None = not cached), `variants` of an image, `cached_images`
            and `cached_bytes` so far, `notes`; None where nothing is frozen.
    """

    trained: nn.Module
    batches: Callable[[int, torch.Generator], Iterator[Batch]]
    rows: int
    val_features: Callable[[slice], Tensor] | None = None
    summary: Callable[[], dict[str, Any] | None] = lambda: None


@contextmanager
def freezing(
    module: nn.Module, layers: Collection[str], *, folder: Path | None = None, max_bytes: int = 0
) -> Iterator[Frozen]:
    """Keep the parameters of `layers` (see `resolve_scope`) from being trained while the block runs."""
    held = [parameter for parameter in parameters_of(module, layers) if parameter.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
        parameter.grad = None  # one of an earlier training would count in the norm that clips
    try:
        with ExitStack() as files:
            yield Frozen(frozenset(layers), folder, max_bytes, files)
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


def parameters_of(module: nn.Module, layers: Collection[str]) -> list[nn.Parameter]:
    """The parameters that these modules themselves own."""
    return [parameter for name in layers for parameter in module.get_submodule(name).parameters(recurse=False)]


def open_feed(
    module: nn.Module,
    frozen: Frozen,
    *,
    train: Split,
    val: Split,
    spec: InputSpec,
    augment: Augment | None,
    dtype: torch.dtype,
    device: str,
    shown: tuple[Split, InputSpec] | None = None,
) -> Feed:
    """Decide what is cached of the frozen layers, and open the file for it; nothing is computed yet but one example.

    `shown` holds the training images at the size a teacher takes, where that is another than the network's.
    """
    images = partial(drawn_images, train, spec, augment=augment, device=device)
    views = images if shown is None else partial(_resized, *shown, spec, augment=augment, device=device)
    kinds = augment.orientations() if augment else (0,)
    train_rows = len(train.labels) * len(kinds or ())

    def numbered(chosen: NDArray[np.int64], draw: Draw) -> NDArray[np.int64] | None:
        return None if kinds is None else chosen * len(kinds) + np.searchsorted(kinds, draw.orientations.numpy())

    def live(size: int, generator: torch.Generator) -> Iterator[Batch]:
        for chosen, draw in draws(len(train.labels), size=size, generator=generator, augment=augment):
            x = images(chosen, draw)
            seen = partial(_places, x.detach()) if shown is None else partial(_some, views, chosen, draw)
            yield Batch(x, labels_of(train, chosen, device), seen, numbered(chosen, draw), draw.blend)

    if not frozen.layers:
        return Feed(module, live, train_rows)
    summary: dict[str, Any] = {"layers": sum(bool(parameters_of(module, [name])) for name in frozen.layers)}
    notes = _passed_through(module, frozen.layers, to_input(train.images[:1], spec, device))
    summary |= {"cut": None, "variants": 0, "cached_images": 0, "cached_bytes": 0, "notes": notes}
    if frozen.folder is None or not frozen.max_bytes:
        return Feed(module, live, train_rows, summary=lambda: summary)
    try:
        if kinds is None:
            raise UnsupportedModelError("augment.shift, crop and mixup hardly ever show the same image twice")
        rows = train_rows + len(val.labels)
        graph, cuts = find_cuts(module, to_input(train.images[:2], spec, device), frozen.layers, dtype, device)
        cut, less = _affordable(cuts, rows, frozen)
        summary["notes"] = [*notes, *less]
        prefix, suffix = split_at(module, graph, cut)
        _prove(module, prefix, suffix, to_input(train.images[:1], spec, device))
        features = _Features(_open_file(frozen, rows * cut.bytes), rows, cut, prefix, dtype, device)
    except (UnsupportedModelError, ResourceError) as reason:
        summary["notes"] = [*notes, f"freeze: what the frozen layers give is computed anew at every step: {reason}"]
        return Feed(module, live, train_rows, summary=lambda: summary)

    def cached(size: int, generator: torch.Generator) -> Iterator[Batch]:
        for chosen, draw in draws(len(train.labels), size=size, generator=generator, augment=augment):
            rows = numbered(chosen, draw)
            assert rows is not None, "features are kept only where images can be numbered"
            inputs = features.of(rows, partial(_some, images, chosen, draw))
            yield Batch(inputs, labels_of(train, chosen, device), partial(_some, views, chosen, draw), rows)

    def val_features(part: slice) -> Tensor:
        rows = np.arange(len(val.labels))[part]
        return features.of(train_rows + rows, lambda absent: to_input(val.images[rows[absent]], spec, device))

    def cached_summary() -> dict[str, Any]:
        count = int(features.filled.sum())
        here = {"cut": cut.name, "variants": len(kinds), "cached_images": count, "cached_bytes": count * cut.bytes}
        return summary | here

    log.info("frozen layers: what %s gives is computed once an image, %d bytes", cut.name, cut.bytes)
    return Feed(suffix, cached, train_rows, val_features, cached_summary)


def _some(
    images: Callable[[NDArray[np.int64], Draw], Tensor],
    chosen: NDArray[np.int64],
    draw: Draw,
    places: NDArray[np.int64] | None,
) -> Tensor:
    """A batch's images, or only those at some places of it, changed as all of it would be."""
    return images(chosen, draw) if places is None else images(chosen[places], draw.at(places))


def _resized(
    split: Split,
    spec: InputSpec,
    drawn_for: InputSpec,
    chosen: NDArray[np.int64],
    draw: Draw,
    *,
    augment: Augment | None,
    device: str,
) -> Tensor:
    """The images of a batch at another size than the one they were drawn for, changed alike."""
    scaled = draw.scaled(spec.height / drawn_for.height, spec.width / drawn_for.width)
    return drawn_images(split, spec, chosen, scaled, augment=augment, device=device)


def _places(x: Tensor, places: NDArray[np.int64] | None) -> Tensor:
    """The images at some places of a batch that is there already."""
    return x if places is None else x[torch.from_numpy(places)].contiguous(memory_format=torch.channels_last)


def _passed_through(module: nn.Module, layers: Collection[str], example: Tensor) -> list[str]:
    """A note where trained layers run before frozen convolutions, which then take the memory of trained ones."""
    if "forward" in vars(module):
        return []  # a quantized network, whose ranges are trained from the image on
    trained: list[str] = []
    passed: list[bool] = []

    def ran(layer: nn.Module, inputs: tuple[Any, ...], _: Any, name: str) -> None:
        if name not in layers:
            trained.append(name)
        elif isinstance(layer, _MAPPINGS):
            passed.append(any(isinstance(x, Tensor) and x.requires_grad for x in inputs))

    hooks = [
        layer.register_forward_hook(partial(ran, name=name))
        for name, layer in module.named_modules()
        if parameters_of(module, [name])
    ]
    try:
        with evaluating(module), torch.enable_grad():
            module(example)
    finally:
        for hook in hooks:
            hook.remove()
    if not any(passed):
        return []
    return [
        f"freeze: '{trained[0]}' is trained and runs before {sum(passed)} of the {len(passed)} frozen convolutions and "
        "linear layers; gradients pass through those, so freezing them saves little memory. Freeze what runs before too"
    ]


def _affordable(cuts: Sequence[Cut], rows: int, frozen: Frozen) -> tuple[Cut, list[str]]:
    """The latest cut whose features fit, and a note when it is not the latest of all.

    Raises:
        ResourceError: None fits, or the folder cannot be used.
    """
    assert frozen.folder is not None
    try:
        frozen.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(frozen.folder).free
    except OSError as error:
        raise ResourceError(f"{frozen.folder}: features cannot be kept there: {error}") from error
    limit = min(frozen.max_bytes, free // 2)
    fitting = [cut for cut in cuts if rows * cut.bytes <= limit]
    latest = cuts[-1]
    too_large = (
        f"the outputs of {latest.name} would take {rows * latest.bytes / 1e9:.3g} GB and {limit / 1e9:.3g} GB are "
        "allowed (freeze_cache_gb, and half of the free disk)"
    )
    if not fitting:
        raise ResourceError(f"{too_large}, too few for any earlier point as well")
    earlier = fitting[-1] is not latest
    return fitting[-1], [f"freeze: {too_large}; those of {fitting[-1].name} are kept instead"] if earlier else []


def _prove(module: nn.Module, prefix: nn.Module, suffix: nn.Module, example: Tensor) -> None:
    """Demand the network's own outputs, to the bit, from the two parts one after the other."""
    module.eval()
    with torch.no_grad():
        if not torch.equal(logits_of(suffix(prefix(example))), logits_of(module(example))):
            raise UnsupportedModelError("cut in two, the network gives other outputs")


def _open_file(frozen: Frozen, size: int) -> IO[bytes]:
    try:
        file = frozen.files.enter_context(tempfile.TemporaryFile(dir=frozen.folder))  # noqa: SIM115 (it is one)
        file.truncate(size)  # sparse: only what is written takes space
    except OSError as error:
        raise ResourceError(f"{frozen.folder}: features cannot be kept there: {error}") from error
    return file


class _Features:
    """What a prefix gives, by row, in a file; a row is computed when it is first asked for."""

    def __init__(self, file: IO[bytes], rows: int, cut: Cut, prefix: nn.Module, dtype: torch.dtype, device: str):
        self.file, self.cut, self.prefix, self.dtype, self.device = file, cut, prefix, dtype, device
        self.filled = np.zeros(rows, np.bool_)

    def of(self, rows: NDArray[np.int64], images: Callable[[NDArray[np.int64]], Tensor]) -> Tensor:
        """Features (N, ...) of `rows`, in fresh memory; `images` gives the inputs of those of them that are absent."""
        absent = np.flatnonzero(~self.filled[rows])
        if len(absent):
            self.prefix.eval()  # its layers are the network's, which may be in training mode
            with torch.no_grad(), arithmetic(self.dtype, self.device):
                self._write(rows[absent], self.prefix(images(absent)))
        return self._read(rows).to(self.device)

    def _write(self, rows: NDArray[np.int64], features: Tensor) -> None:
        """Keep (N, ...) as the bytes they are; (N, C, H, W) with channels last, as convolutions want them again."""
        last = features.permute(0, 2, 3, 1) if features.ndim == 4 else features
        values = last.cpu().contiguous().view(torch.uint8).reshape(len(rows), self.cut.bytes).numpy()
        try:
            # Plain writes rather than a writable memory map: on a full disk a map kills the process with SIGBUS.
            for row, value in zip(rows, values, strict=True):
                self.file.seek(int(row) * self.cut.bytes)
                self.file.write(value)
            self.file.flush()
        except OSError as error:
            raise ResourceError(f"features of frozen layers: {error}; free space or lower freeze_cache_gb") from error
        self.filled[rows] = True

    def _read(self, rows: NDArray[np.int64]) -> Tensor:
        # Mapped for each batch anew: pages of a map that stays would count as memory of the training.
        shape = (len(self.filled), self.cut.bytes)
        values = torch.from_numpy(np.memmap(self.file, np.uint8, mode="r", shape=shape)[rows]).view(self.cut.dtype)
        if len(self.cut.shape) != 3:
            return values.view(len(rows), *self.cut.shape)
        channels, height, width = self.cut.shape
        return values.view(len(rows), height, width, channels).permute(0, 3, 1, 2)
