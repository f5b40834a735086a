"""A recipe suggested by what an inspection found: which groups to leave alone, and a latency to prune the others to.

Invariant: what is suggested is a valid recipe and says from what it was made; nobody has run it.
"""

import glob
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from compressor import strict_yaml
from compressor.pruning.coupling import is_depthwise
from compressor.pruning.surgery import kept_width
from compressor.recipe import Prune, Recipe
from compressor.recipe_rules import STRUCTURAL

TOLERATED_DROP = 0.02  # of accuracy, below the network's as it is
BLIND_RATIO = 0.25  # of every group, where nothing is known but what it costs

Row = Mapping[str, Any]


def tolerated_widths(rows: Sequence[Row], unpruned: float | None) -> tuple[dict[str, int], list[str]]:
    """How few channels each prunable group may keep, and which groups should lose none.

    Args:
        rows: The groups of an inspection.
        unpruned: Accuracy of the network as it is; None: no sensitivity was measured.

    Returns:
        Channels kept by group, at the largest ratio up to which accuracy falls by no more than `TOLERATED_DROP`
        (`BLIND_RATIO` where nothing was measured); names of groups that tolerate nothing.
    """
    kept: dict[str, int] = {}
    held: list[str] = []
    for row in (row for row in rows if row["prunable"]):
        if unpruned is None:
            kept[row["name"]] = round((1 - BLIND_RATIO) * row["channels"])
            continue
        for figure in row["sensitivity"]:
            if figure["accuracy"] is not None and figure["accuracy"] < unpruned - TOLERATED_DROP:
                held += [] if row["name"] in kept else [row["name"]]
                break
            if figure["kept"] < row["channels"]:
                kept[row["name"]] = figure["kept"]
    return kept, held


def time_with(
    module: nn.Module, rows: Sequence[Row], kept: Mapping[str, int], layers_ms: Mapping[str, float], rest_ms: float
) -> float:
    """Milliseconds of the network with these widths, if a layer's time falls as its multiply-accumulates do."""
    removed: dict[tuple[str, str], int] = {}
    for row in rows:
        gone = row["channels"] - kept.get(row["name"], row["channels"])
        for member in row["members"]:
            side = (member["layer"], member["kind"])
            removed[side] = removed.get(side, 0) + gone * member["channels"] // row["channels"]
    total = rest_ms
    for name, ms in layers_ms.items():
        layer = module.get_submodule(name)
        before, after = kept_width(layer, name, {}), kept_width(layer, name, removed)
        share = after[1] / before[1]
        total += ms * (share if is_depthwise(layer) else share * after[0] / before[0])
    return total


def suggest(
    recipe: Recipe,
    path: Path,
    changed: Sequence[str],
    *,
    prune: Prune,
    at: int | None,
    lead: int,
    module: nn.Module,
    rows: Sequence[Row],
    unpruned: float | None,
    layers_ms: Mapping[str, float],
    rest_ms: float,
    baseline_ms: float,
) -> dict[str, Any]:
    """A child of the inspected recipe with its prune stage replaced.

    Args:
        recipe: The inspected one, with overrides.
        path: Its file, which the suggestion extends.
        changed: Sections of the file that overrides have changed, beside `stages`.
        prune: The stage that was inspected.
        at: Its place among the stages; None: there is none, and one is put in after the baseline's training.
        lead: Number of stages that train the baseline.
        module: The network.
        rows: The groups of the inspection.
        unpruned: Accuracy of the network as it is; None: no sensitivity was measured.
        layers_ms: Time of each layer as it would be deployed.
        rest_ms: What of it belongs to no layer.
        baseline_ms: Of the FP32 network: what targets are fractions of.

    Returns:
        JSON: `made_from`, `target` and `yaml`, the last two null where nothing can be suggested.
    """
    kept, held = tolerated_widths(rows, unpruned)
    fraction = max(round(time_with(module, rows, kept, layers_ms, rest_ms) / baseline_ms, 2), 0.01)
    if unpruned is None:
        made_from = (
            f"milliseconds alone: {BLIND_RATIO:.0%} of every prunable group, which is a guess; --sensitivity measures "
            "what the network tolerates"
        )
    else:
        made_from = (
            f"milliseconds and the accuracy with each group pruned alone: what loses more than "
            f"{100 * TOLERATED_DROP:g} points at the smallest ratio is left alone ({len(held)} groups), the others go "
            "as far as each tolerates alone; together they lose more, and a finetune has to bring it back"
        )
    if not kept or fraction >= 1:
        why = f"it would still take {fraction:.2f}x of the FP32 network's time here" if kept else "no group may shrink"
        return {"made_from": f"{made_from}. Nothing to suggest: {why}", "target": None, "yaml": None}
    target = f"{fraction:g}x"
    scope = [*prune.ignored_scope, *(glob.escape(name.partition("[")[0]) for name in held)]
    change = {"ranking": "latency", "pruning_ratio": None, "target": {"latency_ms": target}}
    replaced = Prune.model_validate(prune.model_dump() | change | {"ignored_scope": tuple(dict.fromkeys(scope))})
    place = lead if at is None else at
    before, after = recipe.stages[:place], recipe.stages[place if at is None else place + 1 :]
    text = [
        f"A suggestion, not a result: nobody has run it. Made from {made_from}.",
        f"stages[{place}] aims at {target} of the FP32 network's latency: what is left if a layer's time falls as its "
        "multiply-accumulates do.",
    ]
    if any(stage.type in STRUCTURAL for stage in before):
        text.append(f"The stages before stages[{place}] save time too: lower the target by what they save.")
    values = recipe.model_dump(mode="json")
    tree = {
        "version": recipe.version,
        "extends": str(path.absolute()),
        **{name: values[name] for name in changed},
        "stages": [
            {"type": stage.type, **stage.model_dump(mode="json", exclude_defaults=True)}
            for stage in (*before, replaced, *after)
        ],
    }
    comment = "".join(f"# {line}\n" for part in text for line in textwrap.wrap(part, 98))
    return {"made_from": made_from, "target": target, "yaml": comment + strict_yaml.dump(tree)}
