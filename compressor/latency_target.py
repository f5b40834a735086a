"""Timing and weighing networks as they would be deployed, and learning from a few what the others would take.

Invariant: the network asked about is never touched; copies of it are timed, in turns with the baseline.
"""

import copy
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor import environment
from compressor.artifacts import write_json
from compressor.benchmark import PATIENCE, Candidate, fastest_rounds, measure_latency, steady
from compressor.export import ir_bytes, save_ir
from compressor.latency_model import LatencyModel, Observation, fit_latency
from compressor.profiling import profile, times_of_layers
from compressor.pruning.coupling import ChannelGroup
from compressor.pruning.surgery import kept_widths, shrink
from compressor.runtime import F32
from compressor.target_search import Reading

log = logging.getLogger(__name__)

ROUNDS = 5  # each compiles both anew, see `benchmark.ROUNDS`; the middle one counts
CALLS = 60  # timed calls of each in a round
RANDOM_COPIES = 6  # timed beside the whole network and the smallest; four terms of each layer are fitted to all
PROFILES = 3  # looks into a compiled network: the middle one counts


class DeploymentBench:
    """Times networks in turns with a baseline, and weighs them; a context, because their files need a folder.

    Args:
        baseline_ir: Timed at f32, unless `baseline_config` says otherwise.
        deployed_ir: Makes a network's IR at the precision it will be deployed in; timed at OpenVINO's default.
        images: (N, h, w, 3) RGB at network size, fed in turn.
        baseline_images: The same at the baseline's.
        folder: IRs are written into a temporary folder below it.
        threads: Inference threads; None leaves the choice to OpenVINO.
        baseline_config: Properties the baseline is compiled with.
    """

    def __init__(
        self,
        baseline_ir: ov.Model,
        deployed_ir: Callable[[nn.Module], ov.Model],
        images: NDArray[np.uint8],
        baseline_images: NDArray[np.uint8],
        folder: Path,
        threads: int | None,
        baseline_config: Mapping[str, str] = F32,
    ) -> None:
        self._baseline_ir, self._deployed_ir, self._baseline_config = baseline_ir, deployed_ir, baseline_config
        self._images, self._baseline_images, self._folder, self._threads = images, baseline_images, folder, threads
        self._open = ExitStack()
        self._written: nn.Module | None = None
        self._fastest = float("inf")  # the baseline in any round so far, ms

    def __enter__(self) -> Self:
        self._room = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix=".deployed", dir=self._folder)))
        save_ir(self._baseline_ir, self._room / "baseline.xml")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()

    def _write(self, network: nn.Module) -> Path:
        """Export a network, which must not change while it is asked about; the last one's files are kept."""
        path = self._room / "network.xml"
        if network is not self._written:
            save_ir(self._deployed_ir(network), path)
            self._written = network
        return path

    def weigh(self, network: nn.Module) -> Reading:
        """Bytes of a network's IR, .xml and .bin, and of the baseline's."""
        return Reading(ir_bytes(self._write(network)), ir_bytes(self._room / "baseline.xml"))

    def time(self, network: nn.Module) -> Reading:
        """Median latency in ms of a network and of the baseline beside it, of the middle round of several.

        Rounds in which the machine was disturbed do not count, as in `measure_latency`, if others can be had.
        """
        probe = Candidate(self._write(network), images=self._images)
        baseline = Candidate(self._room / "baseline.xml", self._baseline_config, self._baseline_images)
        rounds: list[Reading] = []
        while len(rounds) < PATIENCE * ROUNDS:
            its, latency = time_pair(baseline, probe, self._threads)
            rounds.append(Reading(latency, its))
            if len(rounds) >= ROUNDS and steady([timed.baseline for timed in rounds], ROUNDS, self._fastest):
                break
        times = [timed.baseline for timed in rounds]
        self._fastest = min(self._fastest, *times)
        chosen = sorted((rounds[place] for place in fastest_rounds(times, ROUNDS)), key=lambda timed: timed.fraction)
        return chosen[ROUNDS // 2]

    def observe(self, network: nn.Module) -> Observation:
        """Export a network, time it, and see which layers the time goes to."""
        fraction = self.time(network).fraction
        widths = kept_widths(network, {})
        operations = profile(self._write(network), self._images, threads=self._threads)
        times, rest = times_of_layers(operations, widths)
        return Observation(widths, _shares(times, rest), fraction)

    def shares_of_layers(
        self, networks: Mapping[str, nn.Module], layers: Collection[str]
    ) -> dict[str, dict[str, float]]:
        """Export networks and see, in turns, what share of its time each spends in which layer: the median turn's.

        A layer that no operation of the compiled network bears the name of is not among them.
        """
        files = {name: self._room / f"{name}.xml" for name in networks}
        for name, network in networks.items():
            save_ir(self._deployed_ir(network), files[name])
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in networks}
        for _ in range(PROFILES):
            for name, xml in files.items():
                turns[name].append(_shares(*times_of_layers(profile(xml, self._images, threads=self._threads), layers)))
        return {
            name: {layer: float(np.median([turn[layer] for turn in seen])) for layer in seen[0] if layer in layers}
            for name, seen in turns.items()
        }


def _shares(times: Mapping[str, float], rest: float) -> dict[str, float]:
    whole = rest + sum(times.values())
    return {name: ms / whole for name, ms in times.items()}


def time_pair(baseline: Candidate, probe: Candidate, threads: int | None) -> tuple[float, float]:
    """Median latencies in ms of the baseline and of a probe, each on its own images, in turns."""
    assert probe.images is not None
    files = {"baseline": baseline, "probe": probe}
    times = measure_latency(files, probe.images, calls=CALLS, threads=threads, rounds=1)
    return times["baseline"].median_ms, times["probe"].median_ms


def measured_model(
    module: nn.Module,
    example: Tensor,
    groups: Sequence[ChannelGroup],
    bench: DeploymentBench,
    *,
    floor: int,
    identity: Mapping[str, Any],
) -> LatencyModel:
    """Learn what channels cost from copies of the network: whole, as small as may be, and some of random widths.

    Remembered for the network, what `identity` says and the machine, as long as the packages stay the same.

    Args:
        module: The network; left as it is.
        example: Input `(N, C, H, W)`.
        groups: From `find_groups`.
        bench: Times the copies.
        floor: Fewest channels of a group.
        identity: JSON; what else decides the time: precision, threads.
    """
    prunable = [group for group in groups if group.prunable and group.channels > floor]
    shapes = {name: list(value.shape) for name, value in module.state_dict().items()}
    key = {
        "network": hashlib.sha256(repr((str(module), sorted(shapes.items()))).encode()).hexdigest(),
        "input": list(example.shape),
        "groups": [group.name for group in prunable],
        "floor": floor,
        "cpu": environment.cpu_model(),
        "isa": sorted(environment.cpu_flags() & {*environment.BF16_FEATURES, *environment.INT8_FEATURES}),
        "cpus": environment.usable_cpus(),
        "versions": environment.versions(),
        **identity,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    file = environment.cache_dir() / "latency" / f"{name}.json"
    try:
        return LatencyModel.from_dict(json.loads(file.read_text())["model"])
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # never measured here, or damaged: measured again
        pass
    observations = [bench.observe(module)]
    for widths in random_widths({group.name: group.channels for group in prunable}, floor, RANDOM_COPIES):
        observations.append(bench.observe(narrowed(module, prunable, widths)))
    model = fit_latency(observations)
    log.info(
        "latency model of %d layers from %d copies: at most %.0f %% off on these",
        len(model.layers),
        len(observations),
        100 * model.error,
    )
    write_json(file, {"model": model.to_dict(), "of": key})
    return model


def random_widths(channels: Mapping[str, int], floor: int, copies: int) -> list[dict[str, int]]:
    """Widths of every group in each copy: the floor everywhere, then every group once in each part of its range.

    A Latin hypercube: with few copies every layer is seen wide and narrow, beside neighbours of every width.
    """
    generator = torch.Generator().manual_seed(0)
    order = {name: torch.randperm(copies, generator=generator).tolist() for name in channels}
    drawn = [
        {name: floor + int((width - floor) * (order[name][i] + 0.5) / copies) for name, width in channels.items()}
        for i in range(copies)
    ]
    return [dict.fromkeys(channels, floor), *drawn]


def narrowed(module: nn.Module, groups: Sequence[ChannelGroup], widths: Mapping[str, int]) -> nn.Module:
    """A copy of the network with the first so many channels of each group; which ones does not matter to the clock."""
    network = copy.deepcopy(module)
    shrink(network, groups, {name: range(width) for name, width in widths.items()})
    return network
