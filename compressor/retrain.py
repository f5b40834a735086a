"""Measure what training the slim network takes on a device: the last `finetune` alone, in a process of its own.

Invariant: prints one JSON line and leaves nothing written; the teacher is left out, since a device has none.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.environment import cache_dir, prepare_process
from compressor.errors import CompressorError
from compressor.memory import give_back_freed, measure_memory, resident_bytes


def retrain(
    run: Path,
    stage_folder: Path,
    index: int,
    steps: int,
    precision: str,
    levers: Mapping[str, Any] | None = None,
    factory: str | None = None,
) -> dict[str, int]:
    """Train the network of a finished stage for a few steps with the options of `stages[index]`.

    `precision` is what `auto` means in that run; `levers` replace some options of the loop; `factory` is the
    `package.module:function` that makes a caller's own network.

    Returns:
        Resident bytes: `floor_bytes` with torch imported and nothing loaded, `average_bytes` and `peak_bytes`.
    """
    prepare_process()
    import torch

    from compressor.backbone import fresh_architecture, input_spec
    from compressor.checkpoint import load_network
    from compressor.context import freezing_as_told, loop_options
    from compressor.data import class_labels
    from compressor.models.custom import load_factory
    from compressor.recipe import Training
    from compressor.recipe_loader import load_recipe
    from compressor.resolution import load_data
    from compressor.training import finetune

    give_back_freed()
    floor = resident_bytes()
    recipe = load_recipe(run / "recipe.yaml").recipe
    stage = recipe.stages[index]
    assert isinstance(stage, Training)
    full = input_spec(recipe)
    torch.manual_seed(recipe.seed)
    labels = class_labels(recipe.data.source, recipe.data.path)
    own = load_factory(factory) if factory else None
    network = load_network(stage_folder, fresh_architecture(own, len(labels), (full.height, full.width)))
    spec = dataclasses.replace(full, height=network.input[1], width=network.input[2])
    data = load_data(recipe, spec)
    options = loop_options(stage, precision) | dict(levers or {}) | {"epochs": None, "steps": steps, "patience": None}
    with (
        measure_memory() as memory,
        freezing_as_told(
            network.module, stage, where=f"stages[{index}]", folder=cache_dir(), example=torch.zeros(1, *network.input)
        ) as frozen,
    ):
        finetune(
            network.module,
            train=data.train,
            val=data.val.take(range(min(stage.batch_size, len(data.val)))),  # scores are not what is measured
            spec=spec,
            frozen=frozen,
            seed=recipe.seed,
            **options,
        )
    return {"floor_bytes": floor, "average_bytes": memory.average_bytes, "peak_bytes": memory.peak_bytes}


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    try:
        run, stage_folder, index, steps, precision, levers, *factory = sys.argv[1:]
        told = json.loads(levers)
        print(json.dumps(retrain(Path(run), Path(stage_folder), int(index), int(steps), precision, told, *factory)))
    except CompressorError as error:
        sys.exit(str(error))
