"""Draw flawless printed-circuit layouts as distance fields: tracks, bends, pads, vias, pours.

Invariant: a field is negative in copper and positive outside, near every edge its value is the distance to the edge,
and the crop is always SPAN units wide whatever its resolution.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]

SPAN = 48.0  # width of a crop in layout units: at 48 px one unit is one pixel
_HALF = SPAN / 2
_DIAGONAL = 0.7071067811865476
_FAR = np.float32(40.0)

# Least and greatest width of a track and of the gap to the next. A unit is a little more than a pixel of
# DeepPCB, whose thinnest tracks and gaps are 8 px wide.
_TRACK_STYLES = ((5.5, 8.5, 6.5, 11.0), (8.0, 13.0, 7.0, 14.0), (9.0, 15.0, 8.0, 18.0), (14.0, 32.0, 8.0, 20.0))


class Dice:
    """Uniform draws that are bit-equal on every machine.

    `Generator.uniform` multiplies and adds in C, which some compilers fuse into one rounding; `Generator.random` is
    an exact scaling of an integer and Python's own arithmetic never fuses.
    """

    def __init__(self, seed: tuple[int, ...]) -> None:
        self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self._generator.random()

    def below(self, bound: int) -> int:
        return int(self._generator.random() * bound)

    def chance(self, probability: float) -> bool:
        return self._generator.random() < probability

    def direction(self) -> tuple[float, float]:
        """A unit vector; rejection in the disc needs only a square root, which is exactly rounded everywhere."""
        while True:
            x, y = self.between(-1, 1), self.between(-1, 1)
            length = (x * x + y * y) ** 0.5
            if 0.1 < length <= 1.0:
                return x / length, y / length

    def noise(self, shape: tuple[int, ...]) -> Field:
        """Uniform noise in [-1, 1)."""
        values: Field = self._generator.random(shape, dtype=np.float32)
        return 2 * values - 1


class Canvas:
    """Coordinates of the pixel centres of a square crop, x along rows and y down, origin in the middle."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.unit = SPAN / size  # layout units per pixel
        line = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(self.unit) - np.float32(_HALF)
        self.x: Field = line[None, :]
        self.y: Field = line[:, None]

    def filled(self, value: float) -> Field:
        return np.full((self.size, self.size), value, dtype=np.float32)

    def disc(self, x: float, y: float, radius: float) -> Field:
        dx, dy = self.x - np.float32(x), self.y - np.float32(y)
        distance: Field = np.sqrt(dx * dx + dy * dy)
        return distance - np.float32(radius)

    def box(self, x: float, y: float, half_width: float, half_height: float) -> Field:
        dx = np.abs(self.x - np.float32(x)) - np.float32(half_width)
        dy = np.abs(self.y - np.float32(y)) - np.float32(half_height)
        field: Field = np.maximum(dx, dy)
        return field

    def capsule(self, start: tuple[float, float], end: tuple[float, float], radius: float) -> Field:
        """A straight stroke with round ends."""
        (x0, y0), (x1, y1) = start, end
        vx, vy = x1 - x0, y1 - y0
        squared = vx * vx + vy * vy
        if squared < 1e-6:
            return self.disc(x0, y0, radius)
        dx, dy = self.x - np.float32(x0), self.y - np.float32(y0)
        along = np.clip(dx * np.float32(vx / squared) + dy * np.float32(vy / squared), 0, 1)
        dx, dy = dx - along * np.float32(vx), dy - along * np.float32(vy)
        distance: Field = np.sqrt(dx * dx + dy * dy)
        return distance - np.float32(radius)

    def slope(self, nx: float, ny: float, offset: float) -> Field:
        """Signed distance to a straight line with unit normal (nx, ny)."""
        return self.x * np.float32(nx) + self.y * np.float32(ny) - np.float32(offset)

    def pixel(self, coordinate: float) -> int:
        return min(max(int((coordinate + _HALF) / self.unit), 0), self.size - 1)


def draw_layout(canvas: Canvas, dice: Dice) -> Field:
    """Draw one random layout; its orientation is random among the eight of the square."""
    kinds: tuple[tuple[float, Callable[[Canvas, Dice], Field]], ...] = (
        (0.44, _tracks),
        (0.28, _pads),
        (0.20, _slotted_pour),
        (0.08, _lone_edge),
    )
    roll = dice.between(0, 1)
    field = canvas.filled(float(_FAR))
    for share, draw in kinds:
        roll -= share
        if roll < 0:
            field = draw(canvas, dice)
            break
    if dice.chance(0.18):
        field = _flood(canvas, dice, field)
    field = np.rot90(field, dice.below(4))
    return np.ascontiguousarray(field.T if dice.chance(0.5) else field)


def _flood(canvas: Canvas, dice: Dice, field: Field) -> Field:
    """Pour copper over a side, or all, of the crop, leaving a clearance around what is there."""
    clearance = dice.between(6, 11)
    pour = canvas.filled(-float(_FAR)) if dice.chance(0.3) else _edge(canvas, dice)
    flooded: Field = np.minimum(field, np.maximum(pour, np.float32(clearance) - field))
    return flooded


def _edge(canvas: Canvas, dice: Dice) -> Field:
    """A half-plane, at times with a bevelled corner."""
    plane = canvas.slope(1, 0, dice.between(-14, 14))
    if dice.chance(0.5):
        plane = np.maximum(plane, canvas.slope(_DIAGONAL, _DIAGONAL, dice.between(-6, 20)))
    if dice.chance(0.3):
        plane = np.maximum(plane, canvas.slope(0, 1, dice.between(-4, 20)))
    return plane


def _ridge(canvas: Canvas, dice: Dice) -> Field:
    """A field whose level lines are parallel routes: straight, one 45-degree bend, a jog of two bends, or an arc."""
    axis, diagonal = (0.0, 1.0), (_DIAGONAL, _DIAGONAL)
    first, second = (axis, diagonal) if dice.chance(0.7) else (diagonal, axis)
    ridge: Field = canvas.slope(*first, dice.between(-6, 6))
    roll = dice.between(0, 1)
    if roll < 0.65:
        other = canvas.slope(*second, dice.between(-12, 12))
        if roll > 0.35:
            ridge = np.maximum(ridge, other)
        elif roll > 0.12:
            ridge = np.maximum(ridge, np.minimum(other, ridge + np.float32(dice.between(8, 24))))
        else:  # a right angle
            ridge = np.maximum(ridge, canvas.slope(-first[1], first[0], dice.between(-12, 12)))
    elif roll > 0.92:
        radius = dice.between(24, 60)
        ridge = canvas.disc(dice.between(-12, 12), radius - dice.between(0, 12), radius)
    return ridge


def _tracks(canvas: Canvas, dice: Dice) -> Field:
    """Parallel tracks along one route, some ending in pads, some carrying pads or vias."""
    ridge = _ridge(canvas, dice)
    low, high, gap_low, gap_high = _TRACK_STYLES[dice.below(len(_TRACK_STYLES))]
    sparse = dice.between(0.1, 0.5)
    equal = dice.chance(0.5)
    width, gap = dice.between(low, high), dice.between(gap_low, gap_high)
    level = -46 + dice.between(0, 20)
    routes: list[tuple[float, float, float]] = []  # level, half width, room on the sides
    while level < 46:
        if not equal:
            width, gap = dice.between(low, high), dice.between(gap_low, gap_high)
        if not dice.chance(sparse):
            routes.append((level + width / 2, width / 2, gap))
        level += width + gap
    field = canvas.filled(float(_FAR))
    for centre, half, _ in routes:
        np.minimum(field, np.abs(ridge - np.float32(centre)) - np.float32(half), out=field)
    end = dice.between(0, 20) if dice.chance(0.5) else _HALF
    cut = canvas.pixel(end)
    if float(np.abs(ridge[:, cut] - ridge[:, cut - 1]).max()) > 0.3 * canvas.unit:
        end = _HALF  # the tracks do not run straight into the cut, which would leave spikes
    if end < _HALF:
        field = np.maximum(field, canvas.slope(1, 0, end))
    drilled = dice.chance(0.6)
    hole = dice.between(3.4, 5.0)
    for centre, half, gap in routes:
        column = end if end < _HALF and dice.chance(0.8) else dice.between(-30, end)
        if column != end and not dice.chance(0.4):
            continue
        distance = np.abs(ridge[:, canvas.pixel(column)] - np.float32(centre))
        row = int(np.argmin(distance))
        if float(distance[row]) > 1:
            continue  # the route leaves the crop before this column
        y = float(canvas.y[row, 0])
        radius = half + min(dice.between(1.5, 6), gap - 5.5)
        if radius < max(6, half + 1.5):
            continue
        pad = canvas.box(column, y, radius, radius) if dice.chance(0.25) else canvas.disc(column, y, radius)
        field = np.minimum(field, pad)
        if drilled and radius > hole + 3:
            field = np.maximum(field, -canvas.disc(column, y, hole))
    return field


def _pads(canvas: Canvas, dice: Dice) -> Field:
    """Pads on a grid, round, square or oblong, with or without holes, some joined by tracks."""
    columns, rows = _grid_lines(dice), _grid_lines(dice)
    radius = dice.between(6.5, 12)
    hole = dice.between(3.2, radius * 0.5) if dice.chance(0.65) else 0.0
    track = dice.between(2.8, 4.6)
    shape = dice.below(4)
    tracks = canvas.filled(float(_FAR))
    pads, holes = tracks.copy(), tracks.copy()
    for i, x in enumerate(columns):
        for j, y in enumerate(rows):
            if dice.chance(0.15) or max(abs(x), abs(y)) > _HALF + radius * 1.6:
                continue
            if shape == 0:
                pad = canvas.box(x, y, radius, radius * 0.8)
            elif shape == 1:
                pad = canvas.capsule((x, y - radius * 0.6), (x, y + radius * 0.6), radius * 0.9)
            else:
                pad = canvas.disc(x, y, radius)
            np.minimum(pads, pad, out=pads)
            if hole:
                np.minimum(holes, canvas.disc(x, y, hole), out=holes)
            roll = dice.between(0, 1)
            if roll < 0.25 and i + 1 < len(columns):
                np.minimum(tracks, canvas.capsule((x, y), (columns[i + 1], y), track), out=tracks)
            elif roll < 0.45 and j + 1 < len(rows):
                np.minimum(tracks, canvas.capsule((x, y), (x, rows[j + 1]), track), out=tracks)
            elif roll < 0.65:  # leaves the grid: straight, a bend, then away
                sign = 1 if dice.chance(0.5) else -1
                knee, leg = dice.between(8, 16), dice.between(6, 20)
                corner, after = (x + knee, y), (x + knee + leg, y + sign * leg)
                np.minimum(tracks, canvas.capsule((x, y), corner, track), out=tracks)
                np.minimum(tracks, canvas.capsule(corner, after, track), out=tracks)
                np.minimum(tracks, canvas.capsule(after, (after[0] + 60, after[1]), track), out=tracks)
    return np.maximum(np.minimum(pads, tracks), -holes)


def _grid_lines(dice: Dice) -> list[float]:
    spacing = dice.between(26, 44)
    position = -_HALF - dice.between(0, spacing)
    lines = []
    while position < _HALF + 10:
        lines.append(position + dice.between(-1.5, 1.5))
        position += spacing
    return lines


def _slotted_pour(canvas: Canvas, dice: Dice) -> Field:
    """A copper plane parted by channels, with drill holes and pads standing in clearances."""
    field = canvas.filled(-float(_FAR))
    for _ in range(1 + dice.below(2)):
        ridge = _ridge(canvas, dice)
        half = dice.between(3.2, 7)
        field = np.maximum(field, np.float32(half) - np.abs(ridge - np.float32(dice.between(-20, 20))))
        if dice.chance(0.4):
            field = np.rot90(field)
    for _ in range(dice.below(4)):
        x, y = dice.between(-30, 30), dice.between(-30, 30)
        if dice.chance(0.5):
            field = np.maximum(field, -canvas.disc(x, y, dice.between(5, 9)))
        else:
            radius = dice.between(6, 10)
            field = np.maximum(field, -canvas.disc(x, y, radius + dice.between(6, 8)))
            field = np.minimum(field, canvas.disc(x, y, radius))
    return field


def _lone_edge(canvas: Canvas, dice: Dice) -> Field:
    """Little else than the outline of a pour, and perhaps a pad beside it."""
    field = _edge(canvas, dice)
    if dice.chance(0.6):
        radius = dice.between(6, 12)
        x, y = dice.between(-30, 30), dice.between(-30, 30)
        field = np.maximum(field, np.float32(radius + dice.between(6, 9)) - canvas.disc(x, y, 0))
        field = np.minimum(field, canvas.disc(x, y, radius))
    return field
