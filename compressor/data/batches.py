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
class Draw:
    """What was drawn for the images of one batch.

    Attributes:
        orientations: int64 (N,), 0 = as it is: bit 0 mirrors left and right, bit 1 top and bottom, bit 2 swaps rows and
            columns afterwards. A quarter turn is a swap and a mirroring, so these eight are all there are.
        shifts: int64 (N, 2), pixels down and right; None = none.
        windows: Sides and centre of each image's rectangle, float32 (N, 2) each, width and height; None = the whole.
        blend: Which image of the batch each is blended with, int64 (N,), and its own share, float32 (N,); None = none.
    """

    orientations: Tensor
    shifts: Tensor | None = None
    windows: tuple[Tensor, Tensor] | None = None
    blend: tuple[Tensor, Tensor] | None = None

    def at(self, places: NDArray[np.int64]) -> "Draw":
        """What was drawn for some of the images, none of which is blended with another."""
        assert self.blend is None, "blended images cannot be numbered, so nobody asks for some of them"
        some = torch.from_numpy(places)
        shifts = None if self.shifts is None else self.shifts[some]
        windows = None if self.windows is None else (self.windows[0][some], self.windows[1][some])
        return Draw(self.orientations[some], shifts, windows)

    def scaled(self, rows: float, columns: float) -> "Draw":
        """The same for images of another size: what counts in pixels is multiplied, to whole ones."""
        if self.shifts is None:
            return self
        shifts = (self.shifts * torch.tensor([rows, columns])).round().long()
        return Draw(self.orientations, shifts, self.windows, self.blend)


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
        mixup: Share of the images that are blended with another one of the batch, and their labels with its, in
            proportions that are uniform in 0..1 (arXiv 1710.09412); 0 = off.
    """

    flip: bool = True
    vertical_flip: bool = False
    shift: int = 0
    rotate90: bool = False
    crop: float = 1.0
    mixup: float = 0.0

    def draw(self, n: int, generator: torch.Generator) -> Draw:
        """Decide what happens to `n` images; the generator is on the CPU and alone decides, on every device."""
        turns = torch.randint(4, (n,), generator=generator) if self.rotate90 else torch.zeros(n, dtype=torch.int64)
        mirror_rows = _coins(n, self.vertical_flip, generator)
        mirror_columns = _coins(n, self.flip, generator)
        shifts = windows = blend = None
        if self.shift:
            down, right = (torch.randint(-self.shift, self.shift + 1, (n, 1), generator=generator) for _ in range(2))
            shifts = torch.cat([down, right], dim=1)
        if self.crop < 1:
            sides = self.crop + (1 - self.crop) * torch.rand(n, 2, generator=generator)
            windows = sides, (2 * torch.rand(n, 2, generator=generator) - 1) * (1 - sides)  # centres, in -1..1
        if self.mixup:
            own = torch.rand(n, generator=generator)
            alone = torch.rand(n, generator=generator) >= self.mixup
            blend = torch.randperm(n, generator=generator), own.masked_fill(alone, 1.0)
        return Draw(_orientation(turns, mirror_rows, mirror_columns), shifts, windows, blend)

    def apply(self, x: Tensor, draw: Draw) -> Tensor:
        """Return images changed as was drawn; the input is left alone, or returned when nothing is changed.

        Args:
            x: (N, C, H, W), any dtype and device.
            draw: Of `self.draw`, for N images.

        Returns:
            Same shape, dtype and device, in channels_last memory.

        Raises:
            ValueError: `rotate90` on images that are not square.
        """
        if self.rotate90 and x.shape[2] != x.shape[3]:
            raise ValueError(f"augment.rotate90 needs square images; {x.shape[2]} x {x.shape[3]} found")
        if draw.shifts is not None or bool(draw.orientations.any()):
            x = _move(x, draw)
        if draw.windows is not None:
            x = _crop(x, *draw.windows)
        return x if draw.blend is None else _blended(x, *draw.blend)

    def orientations(self) -> tuple[int, ...] | None:
        """All that `Draw.orientations` can be, where nothing else is drawn; None = the changes cannot be numbered."""
        if self.shift or self.crop < 1 or self.mixup:
            return None
        turns = torch.arange(4 if self.rotate90 else 1)[:, None, None]
        mirror_rows = torch.arange(2 if self.vertical_flip else 1).bool()[:, None]
        mirror_columns = torch.arange(2 if self.flip else 1).bool()
        return tuple(sorted(set(_orientation(turns, mirror_rows, mirror_columns).flatten().tolist())))


def draws(
    count: int, *, size: int, generator: torch.Generator, augment: Augment | None
) -> Iterator[tuple[NDArray[np.int64], Draw]]:
    """One shuffled pass over `count` images: which ones make up each batch, and what happens to them.

    Without the ragged rest: a tiny batch would spoil BatchNorm statistics.
    """
    order = torch.randperm(count, generator=generator).numpy()
    size = min(size, count)
    for start in range(0, count - size + 1, size):
        # Sorted: neighbouring reads of the memory-mapped array; the order inside a batch does not matter.
        chosen = np.sort(order[start : start + size])
        yield chosen, augment.draw(size, generator) if augment else Draw(torch.zeros(size, dtype=torch.int64))


def drawn_images(
    split: Split, spec: InputSpec, chosen: NDArray[np.int64], draw: Draw, *, augment: Augment | None, device: str
) -> Tensor:
    """The images of one batch as a network is fed them, (N, 3, H, W)."""
    x = to_input(split.images[chosen], spec, device)
    return augment.apply(x, draw) if augment else x


def labels_of(split: Split, chosen: NDArray[np.int64], device: str) -> Tensor:
    """Labels of one batch, int64 (N,)."""
    return torch.from_numpy(np.asarray(split.labels[chosen])).to(device)


def _orientation(turns: Tensor, mirror_rows: Tensor, mirror_columns: Tensor) -> Tensor:
    """Number of the orientation that quarter turns and then mirrorings give; see `Draw`."""
    rows = ((turns == 2) | (turns == 3)) ^ mirror_rows
    columns = ((turns == 1) | (turns == 2)) ^ mirror_columns
    return turns % 2 * 4 + rows * 2 + columns


def _move(x: Tensor, draw: Draw) -> Tensor:
    """Everything that only moves pixels: no value changes."""
    n, channels, height, width = x.shape
    down, right = (None, None) if draw.shifts is None else (draw.shifts[:, :1], draw.shifts[:, 1:])
    # Every change is a choice of source row and source column, and all together are one gather:
    # out[i, j] = x[rows[i], columns[j]], or x[rows[j], columns[i]] where rows and columns are swapped.
    rows = _sources(height, draw.orientations & 2 > 0, down)  # (N, H)
    columns = _sources(width, draw.orientations & 1 > 0, right)  # (N, W)
    flat = rows[:, :, None] * width + columns[:, None, :]  # (N, H, W)
    swapped = draw.orientations & 4 > 0
    if bool(swapped.any()):
        flat = torch.where(swapped[:, None, None], flat.transpose(1, 2), flat)
    flat += torch.arange(n)[:, None, None] * (height * width)
    pixels = x.permute(0, 2, 3, 1).reshape(n * height * width, channels)  # a view in channels_last memory
    moved = pixels.index_select(0, flat.reshape(-1).to(x.device))
    return moved.view(n, height, width, channels).permute(0, 3, 1, 2)


def _crop(x: Tensor, sides: Tensor, places: Tensor) -> Tensor:
    """A rectangle of every image, at the size of the whole; (N, C, H, W) as it came."""
    affine = torch.cat([torch.diag_embed(sides), places[:, :, None]], dim=2)  # (N, 2, 3), acting on (column, row)
    grid = F.affine_grid(affine.to(x), list(x.shape), align_corners=False)
    cropped = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return cropped.contiguous(memory_format=torch.channels_last)


def _blended(x: Tensor, partners: Tensor, shares: Tensor) -> Tensor:
    """Every image with its share of itself and the rest of its partner; (N, C, H, W) as it came."""
    own = shares.to(x)[:, None, None, None]
    return torch.lerp(x[partners.to(x.device)], x, own).contiguous(memory_format=torch.channels_last)


def _coins(n: int, wanted: bool, generator: torch.Generator) -> Tensor:
    """One fair coin per image, bool (n,); all false when the change is not wanted."""
    return torch.randint(2, (n,), generator=generator).bool() if wanted else torch.zeros(n, dtype=torch.bool)


def _sources(length: int, mirror: Tensor, shift: Tensor | None) -> Tensor:
    """Which source line each output line shows, int64 (n, length)."""
    lines = torch.arange(length).expand(len(mirror), length)
    if shift is not None:
        lines = lines + shift
        # Reflection without repeating the edge, for shifts of any size: a triangle wave of period 2 (length - 1).
        period = max(2 * (length - 1), 1)
        lines = lines.remainder(period)
        lines = torch.minimum(lines, period - lines) if length > 1 else torch.zeros_like(lines)
    return torch.where(mirror[:, None], length - 1 - lines, lines)
