"""Generate binarised printed-circuit crops, each flawless or with exactly one defect of a known class.

Invariant: an image is kept only when counting its copper components and holes, before and after the defect and also
with the copper shrunk and grown, proves the defect to be what the label says.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from compressor.data.pcb_layout import SPAN, Canvas, Dice, Field, draw_layout
from compressor.data.pcb_topology import measure_topology
from compressor.errors import DataError

CLASSES: tuple[str, ...] = ("ok", "open", "short", "mousebite", "spur", "copper", "pinhole")
MIN_SIZE = 48  # at 48 px a layout unit is one pixel and the thinnest defects are four wide

_MARGIN = 12.0  # a defect starts at least this far from the border, in layout units
_SAFETY = 1.2  # the laws must also hold with every copper edge moved by this much, in layout units
_SMALLEST_PIECE = 60.0  # of a net, in square units: less would look like spurious copper
_ROUND = 64  # candidates drawn before their topology is measured together

Point = tuple[float, float]


@dataclass(frozen=True)
class Pairs:
    """Crops of a tested board with the flawless crop of the same place.

    Attributes:
        tested: with the defect of its class, uint8 (N, size, size), copper 0 and bare board 255.
        template: the same without the defect; equal to `tested` for `ok`.
        labels: indices into CLASSES, int64 (N,).
    """

    tested: NDArray[np.uint8]
    template: NDArray[np.uint8]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class _Law:
    """What a defect changes: copper components, holes, and whether copper is added or removed."""

    components: int
    holes: int
    adds: bool


_LAWS = {
    "open": _Law(components=1, holes=0, adds=False),
    "short": _Law(components=-1, holes=0, adds=True),
    "mousebite": _Law(components=0, holes=0, adds=False),
    "spur": _Law(components=0, holes=0, adds=True),
    "copper": _Law(components=1, holes=0, adds=True),
    "pinhole": _Law(components=0, holes=1, adds=False),
}


def generate(*, per_class: int, size: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Generate `per_class` crops of every class, in random order; equal arguments give equal bytes on every machine.

    Args:
        per_class: images of each of the seven CLASSES.
        size: side in pixels; the crop shows the same area of board at any size.
        seed: images of different seeds are disjoint.

    Returns:
        Images, uint8 (7 * per_class, size, size), copper 0 and bare board 255, and labels, int64 indices into CLASSES.

    Raises:
        DataError: an argument is out of range.
    """
    pairs = generate_pairs(per_class=per_class, size=size, seed=seed)
    return pairs.tested, pairs.labels


def generate_pairs(*, per_class: int, size: int, seed: int) -> Pairs:
    """Generate like `generate`, with the flawless template of every crop."""
    for name, value, least in (("per_class", per_class, 1), ("size", size, MIN_SIZE), ("seed", seed, 0)):
        if value < least:
            raise DataError(f"synthetic_pcb: {name} is {value}; it must be at least {least}")
    canvas, dice = Canvas(size), Dice((seed, 0x9CB))
    kinds = tuple(_LAWS)
    tested: list[NDArray[np.bool_]] = []
    template: list[NDArray[np.bool_]] = []
    labels: list[int] = []
    # An ok crop is the template of a crop whose defect, of a random class, was placed and proven and then left out:
    # so no property of the layout tells ok from defect.
    wanted = dict.fromkeys(kinds, per_class)
    for index in range(per_class):
        wanted[kinds[index % len(kinds)]] += 1
    plain = {kind: wanted[kind] - per_class for kind in kinds}
    for kind in kinds:
        for before, after in _accepted(canvas, dice, kind, wanted[kind]):
            is_ok = plain[kind] > 0
            plain[kind] -= is_ok
            template.append(before)
            tested.append(before if is_ok else after)
            labels.append(0 if is_ok else CLASSES.index(kind))
    order = np.argsort(dice.noise((len(labels),)), kind="stable")
    return Pairs(_to_image(tested, order), _to_image(template, order), np.array(labels, dtype=np.int64)[order])


def _to_image(copper: list[NDArray[np.bool_]], order: NDArray[np.int64]) -> NDArray[np.uint8]:
    return np.where(np.stack(copper)[order], np.uint8(0), np.uint8(255))


def _accepted(canvas: Canvas, dice: Dice, kind: str, count: int) -> list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Draw until `count` pairs of copper masks, without and with a defect of `kind`, obey the law of the kind."""
    found: list[tuple[NDArray[np.bool_], NDArray[np.bool_]]] = []
    while len(found) < count:
        fields: list[Field] = []
        damaged: list[Field] = []
        noises: list[Field] = []
        while len(fields) < min(_ROUND, 8 + 2 * (count - len(found))):
            field = draw_layout(canvas, dice)
            stroke = _PLACERS[kind](canvas, dice, field)
            if stroke is not None:
                fields.append(field)
                damaged.append(np.minimum(field, stroke) if _LAWS[kind].adds else np.maximum(field, -stroke))
                noises.append(_roughness(canvas, dice))
        before, after, noise = np.stack(fields), np.stack(damaged), np.stack(noises)
        found.extend((before[i] < noise[i], after[i] < noise[i]) for i in _lawful(canvas, kind, before, after, noise))
    return found[:count]


def _lawful(canvas: Canvas, kind: str, before: Field, after: Field, noise: Field) -> NDArray[np.int64]:
    """Find the candidates for which the defect's law holds, as drawn and with all edges moved either way."""
    law = _LAWS[kind]
    smallest = _SMALLEST_PIECE / canvas.unit**2
    clean, tested = measure_topology(before < noise), measure_topology(after < noise)
    good = (tested.components == clean.components + law.components) & (tested.holes == clean.holes + law.holes)
    good &= (clean.components == 0) | (clean.smallest >= smallest)  # no crumbs, and when cut no crumb either
    if kind == "open":
        good &= tested.smallest >= smallest
    left = np.flatnonzero(good)
    for edge in (np.float32(-_SAFETY), np.float32(_SAFETY)):
        moved, moved_tested = measure_topology(before[left] < edge), measure_topology(after[left] < edge)
        # No gap or neck in the layout itself is so thin that it looks like a defect.
        passed = (moved.components == clean.components[left]) & (moved.holes == clean.holes[left])
        passed &= moved_tested.components == tested.components[left]
        passed &= moved_tested.holes == tested.holes[left]
        left = left[passed]
    return left


def _roughness(canvas: Canvas, dice: Dice) -> Field:
    """Jitter of the edges as binarisation leaves it: some from pixel to pixel, some shared by rows and columns."""
    size, depth = canvas.size, dice.between(0.05, 0.25)
    lines = dice.noise((2, size)) * np.float32(0.5 * depth * canvas.unit)
    jitter: Field = dice.noise((size, size)) * np.float32(depth * canvas.unit)
    jitter += lines[0][None, :] + lines[1][:, None]
    return jitter


# Placing a defect: each function returns the distance field of the copper to add or remove, or None without a place.


def _pick(canvas: Canvas, dice: Dice, allowed: NDArray[np.bool_]) -> tuple[int, int] | None:
    """Choose a pixel away from the border where `allowed` is true."""
    margin = int(_MARGIN / canvas.unit)
    inner = allowed[margin:-margin, margin:-margin]
    places = np.flatnonzero(inner)
    if not len(places):
        return None
    row, column = divmod(int(places[dice.below(len(places))]), inner.shape[1])
    return row + margin, column + margin


def _at(canvas: Canvas, row: int, column: int) -> Point:
    return float(canvas.x[0, column]), float(canvas.y[row, 0])


@dataclass(frozen=True)
class _Edge:
    """A point on an edge of copper, the unit normal out of the copper, and how far copper and bare board reach."""

    x: float
    y: float
    nx: float
    ny: float
    copper: float
    bare: float

    def point(self, outward: float, sideways: float) -> Point:
        return self.x + outward * self.nx - sideways * self.ny, self.y + outward * self.ny + sideways * self.nx


def _pick_edge(canvas: Canvas, dice: Dice, field: Field) -> _Edge | None:
    """Choose a point on an edge and measure along its normal the width of the copper and of the bare gap."""
    place = _pick(canvas, dice, np.abs(field) < 0.6 * canvas.unit)
    if place is None:
        return None
    row, column = place
    nx = float(field[row, column + 2]) - float(field[row, column - 2])
    ny = float(field[row + 2, column]) - float(field[row - 2, column])
    length = (nx * nx + ny * ny) ** 0.5
    if length < 2 * canvas.unit:  # a corner or a seam: no clear normal
        return None
    x, y = _at(canvas, row, column)
    nx, ny = nx / length, ny / length
    return _Edge(x, y, nx, ny, _reach(canvas, field, x, y, -nx, -ny, True), _reach(canvas, field, x, y, nx, ny, False))


def _reach(canvas: Canvas, field: Field, x: float, y: float, dx: float, dy: float, copper: bool) -> float:
    """Distance along a ray until copper (or bare board) ends; SPAN when it leaves the crop first."""
    distance = 1.0
    while True:
        px, py = x + distance * dx, y + distance * dy
        if max(abs(px), abs(py)) >= SPAN / 2 - canvas.unit:
            return SPAN
        value = float(field[canvas.pixel(py), canvas.pixel(px)])
        if (value < 0) != copper:
            return distance
        distance += max(abs(value) * 0.9, 0.5)


def _stroke(canvas: Canvas, points: list[Point], radius: float) -> Field:
    """A hand-drawn line through the points."""
    field = canvas.filled(SPAN)
    for start, end in pairwise(points):
        np.minimum(field, canvas.capsule(start, end, radius), out=field)
    return field


def _blob(canvas: Canvas, dice: Dice, x: float, y: float, reach: float, radius: float) -> Field:
    """An irregular patch: a stroke of a few turns that stays within `reach` of its centre."""
    points: list[Point] = []
    dx, dy = dice.direction()
    points.append((x + dx * reach, y + dy * reach))
    for _ in range(dice.below(3)):
        points.append((x + dice.between(-0.7, 0.7) * reach, y + dice.between(-0.7, 0.7) * reach))
    points.append((x - dx * reach, y - dy * reach))
    return _stroke(canvas, points, radius)


def _place_open(canvas: Canvas, dice: Dice, field: Field) -> Field | None:
    edge = _pick_edge(canvas, dice, field)
    if edge is None or not 4 < edge.copper < 34:
        return None
    radius = dice.between(2.0, 3.6)
    lean = dice.between(-2, 2)
    points = [
        edge.point(radius, -lean),
        edge.point(-edge.copper / 2, dice.between(-1.2, 1.2)),
        edge.point(-edge.copper - radius, lean),
    ]
    return _stroke(canvas, points, radius)


def _place_short(canvas: Canvas, dice: Dice, field: Field) -> Field | None:
    edge = _pick_edge(canvas, dice, field)
    if edge is None or not 4 < edge.bare < 30:
        return None
    radius = dice.between(2.0, 3.6)
    lean = dice.between(-2, 2)
    points = [
        edge.point(-1, -lean),
        edge.point(edge.bare / 2, dice.between(-1.5, 1.5)),
        edge.point(edge.bare + 1, lean),
    ]
    return _stroke(canvas, points, radius)


def _place_mousebite(canvas: Canvas, dice: Dice, field: Field) -> Field | None:
    edge = _pick_edge(canvas, dice, field)
    if edge is None:
        return None
    depth = min(dice.between(5.5, 11), edge.copper - 3)
    if depth < 4.5:
        return None
    radius = min(dice.between(2.8, 4.4), depth)
    lean = dice.between(-2.5, 2.5)
    return _stroke(canvas, [edge.point(radius * 0.6, -lean), edge.point(radius - depth, lean)], radius)


def _place_spur(canvas: Canvas, dice: Dice, field: Field) -> Field | None:
    edge = _pick_edge(canvas, dice, field)
    if edge is None:
        return None
    height = min(dice.between(5.5, 12), edge.bare - 3.2)
    if height < 4.5:
        return None
    radius = min(dice.between(2.2, 3.8), height * 0.6)
    lean = dice.between(-2.5, 2.5)
    return _stroke(canvas, [edge.point(-1, -lean), edge.point(height - radius, lean)], radius)


def _place_copper(canvas: Canvas, dice: Dice, field: Field) -> Field | None:
    radius, reach = dice.between(2.2, 3.6), dice.between(0, 6)
    place = _pick(canvas, dice, field > radius + 0.8 * reach + 2.5)
    if place is None:
        return None
    return _blob(canvas, dice, *_at(canvas, *place), reach, radius)


def _place_pinhole(canvas: Canvas, dice: Dice, field: Field) -> Field | None:
    radius, reach = dice.between(2.0, 3.4), dice.between(0, 5.5)
    place = _pick(canvas, dice, field < -(radius + 0.6 * reach + 2.2))
    if place is None:
        return None
    return _blob(canvas, dice, *_at(canvas, *place), reach, radius)


_PLACERS: dict[str, Callable[[Canvas, Dice, Field], Field | None]] = {
    "open": _place_open,
    "short": _place_short,
    "mousebite": _place_mousebite,
    "spur": _place_spur,
    "copper": _place_copper,
    "pinhole": _place_pinhole,
}
