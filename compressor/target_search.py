"""Searching the largest network whose measured costs are all within their goals.

Invariant: what is returned was measured and met every goal, or it is refused with the range that can be reached.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from compressor.errors import RecipeError

log = logging.getLogger(__name__)

LEAST_SHARE, MOST_SHARE = 0.05, 0.95  # of the way between two measured networks: a line is not trusted at its ends
NARROWEST = 0.98  # where even so far up the way nothing but the smaller network is found, nothing lies between
Network = TypeVar("Network")


@dataclass(frozen=True)
class Reading:
    """What a network costs, and what the baseline costs at the same moment, in the cost's own unit."""

    measured: float
    baseline: float

    @property
    def fraction(self) -> float:
        """Of the baseline's cost: the unit of predictions."""
        return self.measured / self.baseline


@dataclass(frozen=True)
class Probe(Reading):
    """A network that was measured, what was predicted for it, and what was asked for at that moment."""

    predicted: float
    goal: float

    @property
    def used(self) -> float:
        """How much of what is allowed it takes."""
        return self.measured / self.goal

    @property
    def met(self) -> bool:
        """Whether it is small or fast enough."""
        return self.used <= 1


@dataclass(frozen=True)
class Cost(Generic[Network]):
    """A cost that only measuring tells.

    Attributes:
        where: Key path of what asks for it, for messages.
        predict: What a network would cost, as a fraction of the baseline's.
        measure: What it costs.
        confirm: The same once more; None where a reading is exact. Of noisy readings the lucky ones are within the
            goal, so a network is taken only if two are.
        goal: The most that is allowed, given the baseline's cost of the same moment.
        show: A value with its unit, for people.
        close: Share of the goal that is near enough to it to stop.
        probes: Networks measured at most, besides the first two.
    """

    where: str
    predict: Callable[[Network], float]
    measure: Callable[[Network], Reading]
    confirm: Callable[[Network], Reading] | None
    goal: Callable[[float], float]
    show: Callable[[float], str]
    close: float
    probes: int


def meet_targets(
    shrunk: Callable[[dict[str, float]], Network],
    costs: Mapping[str, Cost[Network]],
    *,
    smallest: Network,
    whole: Network,
) -> tuple[dict[str, float], list[dict[str, Probe]]]:
    """Find the predicted costs at which a pruned network's measured ones are just below all their goals.

    The next network to try is where, for every cost, a straight line between the largest that met the goals and the
    smallest that did not reaches its goal: predictions err alike on networks so much alike.

    Args:
        shrunk: A network pruned to at most these predicted costs; the tighter they are, the less of it is left.
        costs: By name.
        smallest: The network with as few channels as may be.
        whole: The network as it is.

    Returns:
        The predicted costs to prune to, which give a network that was measured and met all goals; and all that was
        measured, by cost, in the order of trying.

    Raises:
        RecipeError: Even the smallest network misses a goal; the message tells the range that can be reached.
    """
    tried: list[dict[str, Probe]] = []

    def compared(name: str, network: Network, reading: Reading) -> Probe:
        cost = costs[name]
        predicted = cost.predict(network) * reading.baseline
        found = Probe(reading.measured, reading.baseline, predicted, cost.goal(reading.baseline))
        shown = [cost.show(value) for value in (found.measured, predicted, found.goal)]
        log.info("%s: %s (predicted %s), asked for at most %s", name, *shown)
        return found

    def probe(network: Network) -> dict[str, Probe]:
        found = {name: compared(name, network, cost.measure(network)) for name, cost in costs.items()}
        if all(first.met for first in found.values()):
            for name, cost in costs.items():
                if cost.confirm is not None:
                    again = compared(name, network, cost.confirm(network))
                    found[name] = max(found[name], again, key=lambda read: read.used)
        tried.append(found)
        return found

    def predicted(network: Network) -> dict[str, float]:
        return {name: cost.predict(network) for name, cost in costs.items()}

    high, above = probe(whole), predicted(whole)
    if all(found.met for found in high.values()):
        return above, tried
    low, below = probe(smallest), predicted(smallest)
    for name, cost in costs.items():
        refuse_out_of_reach(cost, high[name], low[name])
    targets, least_share = below, LEAST_SHARE
    while len(tried) < 2 + min(cost.probes for cost in costs.values()):
        if any(low[name].used >= cost.close for name, cost in costs.items()) or least_share > NARROWEST:
            break
        shares = {
            name: ((1 + cost.close) / 2 - low[name].used) / (high[name].used - low[name].used)
            for name, cost in costs.items()
            if not high[name].met
        }
        shares = {name: max(min(share, MOST_SHARE), least_share) for name, share in shares.items()}
        wanted = {name: below[name] + shares.get(name, 1.0) * (above[name] - below[name]) for name in costs}
        network = shrunk(wanted)
        if predicted(network) == below:  # the same again: nothing lies between; perhaps further up
            targets, least_share = wanted, (1 + min(shares.values())) / 2
            continue
        found, least_share = probe(network), LEAST_SHARE
        if all(one.met for one in found.values()):
            low, below, targets = found, predicted(network), wanted
        else:
            high, above = found, predicted(network)
    return targets, tried


def refuse_out_of_reach(cost: Cost[Network], whole: Reading, smallest: Reading) -> None:
    """Say what can be reached where even the smallest network costs too much.

    Raises:
        RecipeError: It does.
    """
    asked, show = cost.goal(smallest.baseline), cost.show
    if smallest.measured > asked:
        raise RecipeError(
            f"{cost.where}: found {show(asked)}, but the smallest network that these settings allow takes "
            f"{show(smallest.measured)}; reachable here: {show(smallest.measured)} to {show(whole.measured)} "
            f"({smallest.fraction:.2f}x to {whole.fraction:.2f}x of the baseline). A smaller min_channels or "
            "round_to, or less in ignored_scope, reaches further"
        )
