"""Figures of a network's channel groups: size, time as deployed, scores, and accuracy with each group alone pruned.

Invariant: what is measured is what a run would do: the groups that its prune stage finds, the IRs that would be
deployed, the accuracy after really pruning. Everything returned is JSON.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor import recipe as spec
from compressor.benchmark import Candidate, measure_latency
from compressor.channel_stages import loss_batches, moments_of
from compressor.context import Context, located
from compressor.errors import RecipeError, UnsupportedModelError
from compressor.export import convert_float_ir, save_ir
from compressor.models.counting import count
from compressor.profiling import profile, times_of_layers
from compressor.pruning.costs import params_of_layers, part_of, shares_of_layers
from compressor.pruning.coupling import ChannelGroup
from compressor.pruning.importance import NEEDS_BATCHES, Importance, raw_scores
from compressor.pruning.sensitivity import plan_alone, score_pruned
from compressor.pruning.surgery import kept_widths
from compressor.quantize_stage import deployed_ir
from compressor.runtime import F32

log = logging.getLogger(__name__)

RATIOS = (0.25, 0.5, 0.75)  # removed of a group, at which accuracy is measured
# Timed calls of each IR: as many as it takes for so many multiply-accumulates, a few seconds, within these limits.
TIMED_MACS, FEWEST_CALLS, MOST_CALLS = 1e11, 12, 100


@dataclass(frozen=True)
class Subject:
    """A network, and what the recipe's prune stage would be told about it."""

    module: nn.Module
    stage: spec.Prune
    where: str  # key path of the stage, for messages
    seed: int
    quantize: tuple[str, spec.Quantize] | None  # the quantize stage that follows, with its key path
    context: Context  # its folder takes files for a while


def costs(subject: Subject, groups: Sequence[ChannelGroup]) -> dict[str, Any]:
    """What the network and each group cost: parameters, MACs, milliseconds in FP32 and INT8.

    A group has what the layers cost whose filters, or scales, belong to it; see `shares_of_layers`.

    Returns:
        JSON: `network` (params, macs, ms), `groups` (name, channels, prunable, reason, members, params, macs, ms),
        `rest` (what belongs to no group), `notes`; by precision `layers_ms` and `rest_ms`, of what belongs to no layer.

    Raises:
        RecipeError, UnsupportedModelError: The network cannot be deployed as the recipe asks.
    """
    module = subject.module
    counts, params, shares = (
        count(module, subject.context.example),
        params_of_layers(module),
        shares_of_layers(module, groups),
    )
    calls = min(max(int(TIMED_MACS / max(counts.macs, 1)), FEWEST_CALLS), MOST_CALLS)
    times = _times(subject, calls)
    rows: list[dict[str, Any]] = [
        {
            "name": group.name,
            "channels": group.channels,
            "prunable": group.prunable,
            "reason": group.reason,
            "members": [
                {"layer": m.layer, "kind": m.kind, "channels": sum(len(indices) for indices in m.indices)}
                for m in group.members
            ],
            "params": part_of(group.name, params, shares),
            "macs": part_of(group.name, counts.per_layer, shares),
            "ms": {name: part_of(group.name, layers, shares) for name, layers in times["layers_ms"].items()},
        }
        for group in groups
    ]
    return {
        "network": {"params": counts.params, "macs": counts.macs, "ms": times["ms"]},
        "groups": rows,
        "rest": {
            "params": counts.params - sum(row["params"] for row in rows),
            "macs": counts.macs - sum(row["macs"] for row in rows),
            "ms": {name: ms - sum(row["ms"][name] for row in rows) for name, ms in times["ms"].items()},
        },
        "layers_ms": times["layers_ms"],
        "rest_ms": times["rest_ms"],
        "notes": times["notes"],
    }


def _times(subject: Subject, calls: int) -> dict[str, Any]:
    """Median latency of the FP32 IR at f32 and of the INT8 IR, timed in turns, and their layers' parts of it.

    Returns:
        `ms`, `layers_ms` and `rest_ms` by precision, and `notes`.
    """
    module, context = subject.module, subject.context
    data, room, notes = context.data, context.run_dir, []
    candidates = {"fp32": Candidate(room / "fp32.xml", F32)}
    save_ir(convert_float_ir(module, data.spec, data.labels), candidates["fp32"].xml)
    where, quantize = subject.quantize or ("quantize", spec.Quantize())
    if subject.quantize is None:
        notes.append("INT8 is timed as quantize would make it by default: the recipe has no such stage")
    try:
        save_ir(deployed_ir(module, quantize, context, where=where), room / "int8.xml")
        candidates["int8"] = Candidate(room / "int8.xml")
    except (RecipeError, UnsupportedModelError) as error:
        if subject.quantize is not None:
            raise
        notes.append(f"INT8 was not timed: {error}")
    images = np.asarray(data.train.images[:8])
    timed = measure_latency(candidates, images, calls=calls, warmup=2, threads=context.threads, rounds=1)
    found: dict[str, Any] = {"ms": {}, "layers_ms": {}, "rest_ms": {}, "notes": notes}
    for name, candidate in candidates.items():
        operations = profile(
            candidate.xml, images, calls=-(-calls // 3), threads=context.threads, config=candidate.config
        )
        times, rest = times_of_layers(operations, kept_widths(module, {}))
        # Counters cost time themselves: of what they say only the shares are used.
        scale = timed[name].median_ms / (rest + sum(times.values()))
        found["ms"][name] = timed[name].median_ms
        found["layers_ms"][name] = {layer: ms * scale for layer, ms in times.items()}
        found["rest_ms"][name] = rest * scale
    return found


def scores(subject: Subject, groups: Sequence[ChannelGroup], kind: Importance) -> dict[str, list[float]]:
    """Raw scores of every prunable group's channels, as the prune stage would compute them in its first iteration."""
    stage, batches = subject.stage, None
    if kind in NEEDS_BATCHES:
        batches = loss_batches(subject.context, stage.importance_batches, 32, subject.seed)
    with located(subject.where):
        raw = raw_scores(subject.module, groups, kind=kind, loss_batches=batches, seed=subject.seed)
    return {name: score.double().tolist() for name, score in raw.items()}


def measure_sensitivity(
    subject: Subject,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    figures: dict[str, dict[str, Any]],
    keep: Callable[[], None],
) -> None:
    """Prune each group alone, to each of `RATIOS`, and score the network.

    Args:
        subject: The network and the stage's settings.
        groups: All its groups.
        scores: As a prune stage ranks by.
        figures: Group name to ratio to `kept` channels, `accuracy` and `loss` on validation; what is missing is added,
            both null where `round_to` and `min_channels` let nothing go.
        keep: Called after each figure.
    """
    context, stage = subject.context, subject.stage
    missing = [
        (group, ratio)
        for group in groups
        for ratio in RATIOS
        if group.prunable and str(ratio) not in figures.get(group.name, {})
    ]
    moments = moments_of(subject.module, stage, groups, context, subject.seed) if missing else {}
    started = time.perf_counter()
    for done, (group, ratio) in enumerate(missing, 1):
        plan = plan_alone(
            subject.module,
            context.example,
            group,
            scores,
            ratio=ratio,
            round_to=stage.round_to,
            min_channels=stage.min_channels,
        )
        own = figures.setdefault(group.name, {})
        kept = len(plan.keep.get(group.name, range(group.channels)))
        # Where rounding gives a width twice, or the whole one, there is nothing more to find out.
        known = next((figure for figure in own.values() if figure["kept"] == kept), None)
        if kept == group.channels:
            known = {"kept": kept, "accuracy": None, "loss": None}
        if known is None:
            accuracy, loss = score_pruned(
                subject.module,
                context.example,
                plan,
                groups,
                moments,
                train=context.data.train,
                val=context.data.val,
                spec=context.data.spec,
                bn_batches=stage.bn_batches,
                seed=subject.seed,
                device=context.device,
            )
            known = {"kept": kept, "accuracy": accuracy, "loss": loss}
        own[str(ratio)] = known
        keep()
        left = (time.perf_counter() - started) / done * (len(missing) - done) / 60
        log.info(
            "sensitivity %d/%d: %s at %d of %d channels: %s; %.0f min left",
            done,
            len(missing),
            group.name,
            kept,
            group.channels,
            "nothing to remove" if known["accuracy"] is None else f"{known['accuracy']:.4f}",
            left,
        )


def spread(values: Tensor) -> dict[str, float]:
    """Smallest, 10 %, median, 90 % and largest of `(channels,)` scores."""
    points = torch.quantile(values.double(), torch.tensor((0.0, 0.1, 0.5, 0.9, 1.0), dtype=torch.float64))
    return dict(zip(("min", "p10", "median", "p90", "max"), points.tolist(), strict=True))
