"""What memory retraining a network would take on a device, measured for networks that a stage might come to.

Five repeats differed by 1.8 % (Xception, 48 px, batch 16) and 0.6 % (the same with the fewest channels).

Invariant: each is trained in a process of its own by the options of the next `finetune`, and its files are gone then.
"""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import nn

from compressor.checkpoint import Network, save_network
from compressor.context import Assignment, Context
from compressor.errors import RecipeError, ResourceError
from compressor.models.counting import count
from compressor.pruning.steps import Kept, Predictor
from compressor.retraining import retraining_memory, unrebuildable
from compressor.target_search import Reading


class RetrainingBench:
    """Measures networks of one stage, and the baseline once; a context, because their files need a folder.

    Args:
        baseline: The dense network.
        context: Of the stage.
        assignment: Of the stage; must say which `finetune` follows and what the stage is given.

    Raises:
        RecipeError: No process of its own could rebuild the networks.
    """

    def __init__(self, baseline: nn.Module, context: Context, assignment: Assignment) -> None:
        assert assignment.finetune is not None, "the recipe validator demands a finetune after such a target"
        assert assignment.start is not None, "the pipeline says what every stage is given"
        self._baseline, self._context, self._start = baseline, context, assignment.start
        self._index, self._options = assignment.finetune
        self._where = f"{assignment.where}.target.train_peak_memory_bytes"
        self._known: dict[str, int] = {}
        if reason := unrebuildable(self._start.architecture):
            raise RecipeError(f"{self._where}: {reason}")
        self._room = tempfile.TemporaryDirectory(prefix=".retraining", dir=context.run_dir)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._room.cleanup()

    def measure(self, module: nn.Module, edits: Sequence[dict[str, Any]]) -> Reading:
        """Peak resident bytes of retraining a network to which these edits of the stage lead, and of the baseline.

        Raises:
            ResourceError: The process failed.
        """
        now, full = self._context.data.spec, self._context.baseline_data.spec
        edits = (*self._start.edits, *edits)
        network = dataclasses.replace(self._start, module=module, edits=edits, input=(3, now.height, now.width))
        dense = dataclasses.replace(self._start, module=self._baseline, edits=(), input=(3, full.height, full.width))
        return Reading(self._peak_bytes(network), self._peak_bytes(dense))

    def _peak_bytes(self, network: Network) -> int:
        """Networks of equal shapes take the same memory, so that one is measured for all of them."""
        shapes = [[name, list(value.shape)] for name, value in network.module.state_dict().items()]
        key = hashlib.sha256(json.dumps([str(network.module), shapes, network.input]).encode()).hexdigest()
        if key not in self._known:
            folder = Path(self._room.name)
            save_network(folder, network)
            found = retraining_memory(
                self._context.run_dir, folder, self._index, self._context.precision, network.architecture
            )
            if "error" in found:
                raise ResourceError(f"{self._where}: retraining could not be measured: {found['error']}")
            self._known[key] = found["peak_bytes"]
        return self._known[key]

    def residents(self, module: nn.Module) -> Predictor:
        """Bytes that training holds of what is left of a network: parameters as often as the optimiser and the snapshot
        of the best weights keep them, and for each image of a batch what layers and their normalisations give."""
        options = self._options
        copies = {"adamw": 5, "sgd": 4, "adafactor": 3}[options.optimizer] + (options.ema is not None)
        batch = min(options.memory.micro_batch or options.batch_size, len(self._context.data.train.labels))
        weights = {name: layer.weight.numel() for name, layer in module.named_modules() if _has_width(layer)}
        macs = count(module, self._context.example).per_layer
        positions = {name: value / weights[name] for name, value in macs.items() if name in weights}

        def bytes_of(kept: Kept) -> float:
            given: float = sum(positions[name] * kept.widths[name][1] for name in positions if name in kept.widths)
            return 4 * (copies * kept.params + 2 * batch * given)

        return bytes_of


def _has_width(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d | nn.Linear)
