"""How many MACs a pruned network may have to run within a latency: measured on its own IR, not predicted.

Invariant: the network asked about is never touched; probes are pruned copies, timed in turns with the baseline.
"""

import copy
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor.benchmark import Candidate, measure_latency
from compressor.errors import RecipeError
from compressor.export import convert_float_ir, save_ir
from compressor.models.counting import count
from compressor.preprocess import InputSpec
from compressor.pruning.apply import apply_plan
from compressor.pruning.groups import ChannelGroup
from compressor.pruning.plan import decide_plan
from compressor.runtime import F32

log = logging.getLogger(__name__)

PROBES = 6  # halvings: the answer is within 1/64 of the range of MACs
CALLS = 60  # timed calls of each probe; the budget's own measurement takes more
_EVERYTHING = 1 - 1e-6  # as pruning ratio: all that min_channels lets go


@dataclass(frozen=True)
class Probe:
    """One pruned copy: its MACs, its median latency, the baseline's beside it, and the latency asked for then."""

    macs: int
    latency_ms: float
    baseline_ms: float
    goal_ms: float

    @property
    def met(self) -> bool:
        """Whether it is fast enough."""
        return self.latency_ms <= self.goal_ms


def search_macs(probe: Callable[[int], Probe], *, smallest: int, largest: int) -> tuple[int, list[Probe]]:
    """Find the largest MACs target whose network is fast enough, by halving.

    Args:
        probe: Prunes a copy to at most so many MACs and times it.
        smallest: Fewest MACs that pruning can reach.
        largest: MACs to try first; nothing is searched where they are fast enough.

    Returns:
        The MACs target, which a probe has met, and all probes in order.

    Raises:
        RecipeError: Even the smallest network is too slow; the message tells the range that can be reached.
    """
    probes = [probe(largest)]
    if probes[0].met:
        return largest, probes
    probes.append(probe(smallest))
    first, last = probes
    if not last.met:
        raise RecipeError(
            f"found {last.goal_ms:.3g} ms, but the smallest network that these settings allow ({last.macs:,} MACs) "
            f"takes {last.latency_ms:.3g} ms; reachable here: {last.latency_ms:.3g} to {first.latency_ms:.3g} ms "
            f"({last.latency_ms / last.baseline_ms:.2f}x to {first.latency_ms / first.baseline_ms:.2f}x of the "
            "baseline). A smaller min_channels or round_to, or less in ignored_scope, reaches further"
        )
    low, high = smallest, first.macs  # low is fast enough, high is not
    for _ in range(PROBES):
        middle = (low + high) // 2
        if middle <= low:
            break
        probes.append(probe(middle))
        if probes[-1].met:
            low = middle
        else:
            high = probes[-1].macs  # any target from there to `middle` gives this very network
    return low, probes


def macs_for_latency(
    module: nn.Module,
    example: Tensor,
    *,
    baseline: nn.Module,
    goal: Callable[[float], float],
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    ranking: Literal["local", "global"],
    round_to: int,
    min_channels: int,
    macs: int | None,
    params: int | None,
    spec: InputSpec,
    labels: Sequence[str],
    images: NDArray[np.uint8],
    folder: Path,
    threads: int | None,
) -> tuple[int, list[Probe]]:
    """Find the MACs target under which the pruned network's float IR, at OpenVINO's default precision, meets a latency.

    Args:
        module: The network to be pruned; left as it is.
        example: Input `(N, C, H, W)`.
        baseline: Timed beside every probe at f32, so that a fraction of its latency means the same moment.
        goal: The latency asked for in ms, given the baseline's.
        groups: From `find_groups`.
        scores: From `score_groups`.
        ranking: As for `decide_plan`, like `round_to` and `min_channels`.
        round_to: Kept channels are multiples of it.
        min_channels: Fewest channels a group keeps.
        macs: Another target, which the answer does not exceed; None: none.
        params: Likewise for parameters; every probe meets it.
        spec: Preprocessing inside the IR.
        labels: Class names.
        images: (N, h, w, 3) RGB at network size, fed in turn.
        folder: IRs are written into a temporary folder below it.
        threads: Inference threads; None leaves the choice to OpenVINO.

    Returns:
        The MACs target and the probes it rests on.

    Raises:
        RecipeError: Some target cannot be reached.
    """

    def shrunk(ratio: float | None, target: int | None) -> nn.Module:
        plan = decide_plan(
            module,
            example,
            groups=groups,
            scores=scores,
            ranking=ranking,
            pruning_ratio=ratio,
            target_macs=target,
            target_params=None if ratio is not None else params,
            round_to=round_to,
            min_channels=min_channels,
        )
        network = copy.deepcopy(module)
        apply_plan(network, plan, example)
        return network

    whole = count(module, example).macs
    largest = whole if macs is None else min(macs, whole)
    smallest = count(shrunk(_EVERYTHING, None), example).macs
    with ExitStack() as stack:
        room = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="latency", dir=folder)))
        save_ir(convert_float_ir(baseline, spec, labels), room / "baseline.xml")

        def probe(target: int) -> Probe:
            network = shrunk(None, target)
            save_ir(convert_float_ir(network, spec, labels), room / "probe.xml")
            found = time_irs(room / "baseline.xml", room / "probe.xml", images, threads)
            answer = Probe(count(network, example).macs, found[1], found[0], goal(found[0]))
            log.info("%s MACs: %.3g ms, asked for %.3g ms", f"{answer.macs:,}", answer.latency_ms, answer.goal_ms)
            return answer

        return search_macs(probe, smallest=smallest, largest=largest)


def time_irs(baseline: Path, probe: Path, images: NDArray[np.uint8], threads: int | None) -> tuple[float, float]:
    """Median latencies in ms of the baseline's IR at f32 and of a probe's at default precision, in turns."""
    candidates = {"baseline": Candidate(baseline, F32), "probe": Candidate(probe)}
    times = measure_latency(candidates, images, calls=CALLS, threads=threads)
    return times["baseline"].median_ms, times["probe"].median_ms
