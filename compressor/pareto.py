"""Which of several measured points are worth having: Pareto sets, who dominates whom, and the hypervolume.

Invariant: with exact figures a point is dominated if and only if another is at least as good in everything and better
in something. Figures known within an interval only make fewer points dominated, never more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Objective:
    """A figure to be large or small."""

    name: str
    maximize: bool = False

    def cost(self, value: float) -> float:
        """The value so turned that less is better."""
        return -value if self.maximize else value


@dataclass(frozen=True)
class Figure:
    """A measured value and the interval that the true one is believed to lie in."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> "Figure":
        """A value without an interval."""
        return cls(value, value, value)

    def holds(self, value: float) -> bool:
        """Whether a value lies within the interval."""
        return self.low <= value <= self.high


Point = Mapping[str, Figure]  # name of an objective -> figure


def dominates(one: Point, other: Point, objectives: Sequence[Objective]) -> bool:
    """Whether `one` makes `other` pointless: nowhere worse, and somewhere better by more than chance.

    Better by chance is what lies in either's interval: who differs in accuracy alone, and by less than the interval
    that few test images leave, is not dominated.
    """
    pairs = [(objective, one[objective.name], other[objective.name]) for objective in objectives]
    if any(objective.cost(a.value) > objective.cost(b.value) for objective, a, b in pairs):
        return False
    return any(a.value != b.value and not a.holds(b.value) and not b.holds(a.value) for _, a, b in pairs)


def dominated_by(points: Mapping[str, Point], objectives: Sequence[Objective]) -> dict[str, list[str]]:
    """For each point the names of those that dominate it; the Pareto set are the points that none does."""
    return {
        name: [rival for rival in points if rival != name and dominates(points[rival], point, objectives)]
        for name, point in points.items()
    }


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """Volume of what lies between points and a reference, that is of all that some point is better than.

    By slices along the last axis (HSO; While et al. 2006, doi:10.1109/TEVC.2005.851275): exact,
    and fast enough for the tens of points that anybody trains.

    Args:
        points: Of costs: less is better.
        reference: The worst corner; points that are not better than it in every cost count nothing.
    """
    inside = sorted((tuple(p) for p in points if all(c < r for c, r in zip(p, reference, strict=True))), key=_last)
    if not inside:
        return 0.0
    if len(reference) == 1:
        return float(reference[0] - inside[0][0])
    volume = 0.0
    for i, point in enumerate(inside):
        end = inside[i + 1][-1] if i + 1 < len(inside) else reference[-1]
        if end > point[-1]:
            volume += (end - point[-1]) * hypervolume([p[:-1] for p in inside[: i + 1]], reference[:-1])
    return volume


def _last(point: tuple[float, ...]) -> float:
    return point[-1]


def normalised_hypervolume(points: Mapping[str, Point], objectives: Sequence[Objective]) -> float:
    """Hypervolume as a fraction of the box between the best and the worst value of each objective, 0..1.

    The worst values are the reference, so that the figure needs no choice of anybody's; an objective in which all are
    equal counts for nothing.
    """
    costs = [[objective.cost(point[objective.name].value) for objective in objectives] for point in points.values()]
    bounds = [(min(axis), max(axis)) for axis in zip(*costs, strict=True)]
    telling = [i for i, (best, worst) in enumerate(bounds) if worst > best]
    if not telling:
        return 0.0
    scaled = [[(cost[i] - bounds[i][0]) / (bounds[i][1] - bounds[i][0]) for i in telling] for cost in costs]
    return hypervolume(scaled, [1.0] * len(telling))
