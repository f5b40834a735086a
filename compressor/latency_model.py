"""What a network's latency would be with fewer channels: fitted to what a few pruned copies of it really took.

Each layer's time is modelled as a + b*in + c*out + d*in*out of its channels, no term negative: overhead, reading,
writing, multiplying. Where the processor works in lanes of 8 to 64 channels, widths count in lanes. As in NetAdapt
(arXiv 1804.03230) the costs are measured, not assumed; unlike there, all layers of a copy are timed at once. OpenVINO's
counters give the layers' shares; their sum is what the copy took without counters.

Invariant: predictions never rise when a channel goes.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LANES = (1, 8, 16, 32, 64)  # channels that a vector unit or a tile may take at once
Widths = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Observation:
    """One copy of a network, timed.

    Attributes:
        widths: Channels in and out of each layer.
        shares: Each layer's part of the counted time; the rest, up to 1, belongs to no layer.
        latency: Of the whole network, as a fraction of the baseline's measured beside it.
    """

    widths: dict[str, tuple[int, int]]
    shares: dict[str, float]
    latency: float


@dataclass(frozen=True)
class LatencyModel:
    """Predicts latency, as a fraction of the baseline's, from the channels of each layer.

    Attributes:
        layers: The terms of each layer: constant, in, out, in x out, of widths in lanes.
        rest: What belongs to no layer.
        lanes: Channels that count as one.
        error: Largest relative error on the networks it was fitted to.
    """

    layers: dict[str, tuple[float, float, float, float]]
    rest: float
    lanes: int
    error: float

    def of_layer(self, name: str, inputs: int, outputs: int) -> float:
        """Predicted time of one layer, with what follows it up to the next; 0 where none was counted."""
        terms = self.layers.get(name)
        return 0.0 if terms is None else float(np.dot(terms, _terms(inputs, outputs, self.lanes)))

    def latency(self, widths: Widths) -> float:
        """Predicted latency of a network with these channels in and out of its layers."""
        return self.rest + sum(self.of_layer(name, *width) for name, width in widths.items())

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values for the cache."""
        return asdict(self)

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> "LatencyModel":
        """Read what `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: It is something else.
        """
        layers = {str(name): tuple(float(term) for term in terms) for name, terms in value["layers"].items()}
        if any(len(terms) != 4 for terms in layers.values()):
            raise ValueError("a layer has four terms")
        return LatencyModel(layers, float(value["rest"]), int(value["lanes"]), float(value["error"]))  # type: ignore[arg-type]


def fit_latency(observations: Sequence[Observation]) -> LatencyModel:
    """Fit the model to timed copies; the lanes are those that explain them best."""
    rest = float(np.mean([_rest(observation) for observation in observations]))
    names = sorted({name for observation in observations for name in observation.shares})

    def fitted(lanes: int) -> tuple[LatencyModel, float]:
        layers, squares = {}, 0.0
        for name in names:
            rows = np.array([_terms(*o.widths[name], lanes) for o in observations])
            times = np.array([o.shares.get(name, 0.0) * o.latency for o in observations])
            terms = non_negative_least_squares(rows, times)
            layers[name] = (float(terms[0]), float(terms[1]), float(terms[2]), float(terms[3]))
            squares += float(((rows @ terms - times) ** 2).sum())
        return LatencyModel(layers, rest, lanes, 0.0), squares

    model = min((fitted(lanes) for lanes in LANES), key=lambda found: found[1])[0]
    errors = [abs(model.latency(o.widths) / o.latency - 1) for o in observations]
    return LatencyModel(model.layers, model.rest, model.lanes, max(errors))


def non_negative_least_squares(rows: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return x >= 0 that minimises |rows @ x - values|, exactly: one of the sets of non-zero terms is the best one's.

    Args:
        rows: (N, terms), few terms: all their subsets are tried.
        values: (N,).
    """
    terms = rows.shape[1]
    best, least = np.zeros(terms), float((values**2).sum())
    for size in range(1, terms + 1):
        for chosen in itertools.combinations(range(terms), size):
            some = np.linalg.lstsq(rows[:, chosen], values, rcond=None)[0]
            squares = float(((rows[:, chosen] @ some - values) ** 2).sum())
            if (some >= 0).all() and squares < least:
                best, least = np.zeros(terms), squares
                best[list(chosen)] = some
    return best


def _terms(inputs: int, outputs: int, lanes: int) -> tuple[float, float, float, float]:
    wide_in, wide_out = -(-inputs // lanes), -(-outputs // lanes)
    return 1.0, wide_in, wide_out, wide_in * wide_out


def _rest(observation: Observation) -> float:
    return (1 - sum(observation.shares.values())) * observation.latency
