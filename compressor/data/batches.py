"""From cached uint8 images to what a network is fed, and the random changes of training.

Invariant: `to_input` computes what the published IR computes on the same pixels: (pixel - 255 mean) / (255 std), in
float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from compressor.data.dataset import Split
from compressor.preprocess import InputSpec


def to_input(
    images: NDArray[np.uint8], spec: InputSpec, device: str | torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Normalise a batch of cached images.

    Args:
        images: uint8 (N, H, W, 3).
        spec: Its mean and std are used; the images are at its size already.
        device: Where the result lives; pixels travel there as bytes.
        dtype: Of the result. The arithmetic is float32 in any case.

    Returns:
        (N, 3, H, W), in channels_last memory: a view of (N, H, W, 3), which is how the pixels lie already.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (spec.height, spec.width, 3):
        wanted = f"uint8 (N, {spec.height}, {spec.width}, 3)"
        raise ValueError(f"to_input: {images.dtype} {images.shape} found; {wanted} is needed")
    # A slice of the memory map is read-only, which torch warns of; a batch taken by index is a fresh array already.
    pixels = torch.from_numpy(images if images.flags.writeable else images.copy()).to(device)
    values = pixels.to(torch.float32)  # (N, H, W, 3)
    values.sub_(torch.from_numpy(spec.mean_255()).to(device)).div_(torch.from_numpy(spec.std_255()).to(device))
    return values.to(dtype).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Augment:
    """Random changes drawn anew for every image of a batch.

    Attributes:
        flip: Mirror left and right, for half of the images.
        vertical_flip: Mirror top and bottom, for half of the images.
        shift: Move by up to this many pixels in each direction; what is uncovered is filled by reflection.
        rotate90: Turn by 0, 90, 180 or 270 degrees, each for a quarter of the images; needs square images.
        crop: Cut out a rectangle at a random place, each side this share of the image's or more, and stretch it back
            bilinearly (after "random resized crop", arXiv 1409.4842); 1 = off.
    """

    flip: bool = True
    vertical_flip: bool = False
    shift: int = 0
    rotate90: bool = False
    crop: float = 1.0

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return changed images; the input is left alone, or returned when nothing is asked for.

        Args:
            x: (N, C, H, W), any dtype and device.
            generator: On the CPU; its state alone decides the changes, on every device.

        Returns:
            Same shape, dtype and device, in channels_last memory.

        Raises:
            ValueError: `rotate90` on images that are not square.
        """
        if self.flip or self.vertical_flip or self.shift or self.rotate90:
            x = self._move(x, generator)
        return _crop(x, self.crop, generator) if self.crop < 1 else x

    def _move(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Everything that only moves pixels: no value changes."""
        n, channels, height, width = x.shape
        if self.rotate90 and height != width:
            raise ValueError(f"augment.rotate90 needs square images; {height} x {width} found")
        # A quarter turn is a transposition and a mirroring, so every change is a choice of source row and source
        # column, and all together are one gather: out[i, j] = x[rows[i], columns[j]], or x[rows[j], columns[i]].
        turns = torch.randint(4, (n,), generator=generator) if self.rotate90 else torch.zeros(n, dtype=torch.int64)
        mirror_rows = ((turns == 2) | (turns == 3)) ^ _coins(n, self.vertical_flip, generator)
        mirror_columns = ((turns == 1) | (turns == 2)) ^ _coins(n, self.flip, generator)
        rows = _sources(height, mirror_rows, self.shift, generator)  # (N, H)
        columns = _sources(width, mirror_columns, self.shift, generator)  # (N, W)
        flat = rows[:, :, None] * width + columns[:, None, :]  # (N, H, W)
        if self.rotate90:
            flat = torch.where((turns % 2 == 1)[:, None, None], flat.transpose(1, 2), flat)
        flat += torch.arange(n)[:, None, None] * (height * width)
        pixels = x.permute(0, 2, 3, 1).reshape(n * height * width, channels)  # a view in channels_last memory
        moved = pixels.index_select(0, flat.reshape(-1).to(x.device))
        return moved.view(n, height, width, channels).permute(0, 3, 1, 2)


def batches(
    split: Split, spec: InputSpec, *, size: int, generator: torch.Generator, augment: Augment | None, device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """One shuffled pass over a split, without the ragged rest (a tiny batch would spoil BatchNorm statistics)."""
    order = torch.randperm(len(split.labels), generator=generator).numpy()
    size = min(size, len(order))
    for start in range(0, len(order) - size + 1, size):
        # Sorted: neighbouring reads of the memory-mapped array; the order inside a batch does not matter.
        chosen = np.sort(order[start : start + size])
        x = to_input(split.images[chosen], spec, device)
        if augment is not None:
            x = augment(x, generator)
        yield x, torch.from_numpy(np.asarray(split.labels[chosen])).to(device)


def _crop(x: Tensor, smallest: float, generator: torch.Generator) -> Tensor:
    """A random rectangle of every image, at the size of the whole; (N, C, H, W) as it came."""
    sides = smallest + (1 - smallest) * torch.rand(len(x), 2, generator=generator)  # of width and height
    places = (2 * torch.rand(len(x), 2, generator=generator) - 1) * (1 - sides)  # centres, in -1..1
    affine = torch.cat([torch.diag_embed(sides), places[:, :, None]], dim=2)  # (N, 2, 3), acting on (column, row)
    grid = F.affine_grid(affine.to(x), list(x.shape), align_corners=False)
    cropped = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return cropped.contiguous(memory_format=torch.channels_last)


def _coins(n: int, wanted: bool, generator: torch.Generator) -> Tensor:
    """One fair coin per image, bool (n,); all false when the change is not wanted."""
    return torch.randint(2, (n,), generator=generator).bool() if wanted else torch.zeros(n, dtype=torch.bool)


def _sources(length: int, mirror: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Which source line each output line shows, int64 (n, length)."""
    lines = torch.arange(length).expand(len(mirror), length)
    if shift:
        lines = lines + torch.randint(-shift, shift + 1, (len(mirror), 1), generator=generator)
        # Reflection without repeating the edge, for shifts of any size: a triangle wave of period 2 (length - 1).
        period = max(2 * (length - 1), 1)
        lines = lines.remainder(period)
        lines = torch.minimum(lines, period - lines) if length > 1 else torch.zeros_like(lines)
    return torch.where(mirror[:, None], length - 1 - lines, lines)
