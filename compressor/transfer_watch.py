"""Whether pretrained weights help: short trainings beforehand to compare with, and a look at the curve afterwards.

Invariant: probes train copies; the network and the draws of its own training are as they would be without them.
"""

import copy
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from compressor.context import Assignment, Context, train
from compressor.errors import TrainingError
from compressor.feed import parameters_of
from compressor.inference import predict
from compressor.metrics import paired_interval, top1
from compressor.models.heads import find_head, look
from compressor.recipe_stages import Finetune
from compressor.training import Epoch

log = logging.getLogger(__name__)
RISE = 1.1  # of the validation loss over its lowest, which calls for a word
EARLY = 1 / 3  # of the training: where the lowest is, for that
FALL = 0.9  # of the training loss meanwhile
# Of what the pretrained layers are ahead of random weights; less is no reason to warn. The first steps of a training,
# while the classifier is random, cost a part: 0.08 of 0.44 of Xception's on Caltech-101 (96 px, 100 steps at 3e-4).
LOST = 0.5


def compare_starts(
    module: nn.Module, stage: Finetune, context: Context, assignment: Assignment
) -> tuple[dict[str, Any], list[str]]:
    """Train copies for a few steps each and compare them on validation.

    `pretrained` is the stage itself; `scratch` begins with random weights, all of which are trained; `linear` trains
    the classifier alone (a linear probe, as in arXiv 1805.08974), and `linear_after` does so once more on the layers as
    `pretrained` has left them, where there is a classifier to be found. A few steps hardly train a classifier, and less
    so on layers that move; so what training does to the layers shows between the two linear probes (that it can distort
    what they know: arXiv 2202.10054), and not between `linear` and `pretrained`.

    Args:
        module: What the stage is given, with pretrained weights.
        stage: With a `transfer_watch`.
        context: Of the stage.
        assignment: Of the stage.

    Returns:
        For the report `steps`, `val_accuracy` of each probe, `differences` with their 95 % interval (pairs of answers
        about the same images), of `scratch` to `pretrained` and of `linear` to `linear_after`, and why some `diverged`;
        and warnings, empty where pretrained weights do no harm.
    """
    assert stage.transfer_watch is not None
    steps = stage.transfer_watch.steps
    short = stage.model_copy(update={"epochs": None, "steps": steps, "patience": None})
    val = context.data.val
    right: dict[str, NDArray[np.bool_]] = {}
    diverged: dict[str, str] = {}

    def probe(name: str, network: nn.Module, freeze: Sequence[str]) -> None:
        log.info("transfer watch: %d steps, %s", steps, name)
        options = short.model_copy(update={"freeze": tuple(freeze)})
        try:
            train(network, options, context, assignment, key="transfer_watch")
        except TrainingError as error:  # a finding, not the end of the run; what is judged is what it kept
            diverged[name] = str(error)
        logits = predict(network, val.images, context.data.spec, device=context.device)
        right[name] = top1(logits.numpy(), val.labels)

    trained = copy.deepcopy(module)
    probe("pretrained", trained, short.freeze)
    probe("scratch", reinitialised(module, assignment.seed), ())
    compared = {"scratch": "pretrained"}
    if head := find_head(look(module, context.example), len(context.data.labels)):
        rest = all_but(module, head)
        probe("linear", copy.deepcopy(module), rest)
        trained.get_submodule(head).load_state_dict(module.get_submodule(head).state_dict())
        probe("linear_after", trained, rest)
        compared["linear"] = "linear_after"
    accuracies = {name: float(hits.mean()) for name, hits in right.items()}
    differences: dict[str, Any] = {}
    for name, other in compared.items():
        low, high = paired_interval(right[name], right[other])
        differences[name] = {"difference": accuracies[name] - accuracies[other], "interval": [low, high]}
    found = {"steps": steps, "val_accuracy": accuracies, "differences": differences, "diverged": diverged}
    return found, warnings_of(found, stage)


def warnings_of(found: dict[str, Any], stage: Finetune) -> list[str]:
    """What does better than the pretrained start by more than chance, and what may help."""
    accuracies, differences = found["val_accuracy"], found["differences"]
    warnings = []
    if reason := found["diverged"].get("pretrained"):
        warnings.append(f"transfer_watch: training from the pretrained weights diverged: {reason}")

    def told(name: str, other: str) -> str:
        low, high = differences[name]["interval"]
        return (
            f"{accuracies[name]:.3f} against {accuracies[other]:.3f} on validation after {found['steps']} steps, a "
            f"difference of {low:.3f} to {high:.3f}"
        )

    if differences["scratch"]["interval"][0] > 0:
        freeing = "freeze less, " if stage.freeze else ""
        warnings.append(
            "transfer_watch: random weights do better than the pretrained ones "
            f"({told('scratch', 'pretrained')}); try {freeing}weights of another source, or model.weights: none"
        )
    elif "linear" in differences and differences["linear"]["interval"][0] > 0:
        lost = accuracies["linear"] - accuracies["linear_after"]
        if lost > LOST * (accuracies["linear"] - accuracies["scratch"]):
            warnings.append(
                "transfer_watch: a classifier trained alone does better on the layers as they came than on what "
                f"training makes of them ({told('linear', 'linear_after')}), and most of what they were ahead of "
                f"random weights is lost: training undoes what they know; try a learning_rate below "
                f"{stage.learning_rate:g}, or first a finetune that freezes role:stem and role:body"
            )
    return warnings


def divergence(history: Sequence[Epoch]) -> str | None:
    """A warning where validation turned early while the training loss went on falling; None = it did not."""
    if len(history) < 4:
        return None
    best = min(range(len(history)), key=lambda i: history[i].val_loss)
    turn, end = history[best], history[-1]
    early = best < EARLY * len(history)
    if not (early and end.val_loss > RISE * turn.val_loss and end.loss < FALL * turn.loss):
        return None
    return (
        f"validation turned after epoch {turn.epoch + 1} of {len(history)}: its loss rose from {turn.val_loss:.3g} to "
        f"{end.val_loss:.3g} while the training loss fell from {turn.loss:.3g} to {end.loss:.3g}; try a smaller "
        "learning_rate, more of augment, fewer epochs or patience"
    )


def reinitialised(module: nn.Module, seed: int) -> nn.Module:
    """A copy with random weights: each layer's as torch gives them to a new one, normal ones where it has no way to."""
    fresh = copy.deepcopy(module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in fresh.modules():
            reset = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()
            else:
                for parameter in layer.parameters(recurse=False):
                    nn.init.normal_(parameter, std=0.02)
    return fresh


def all_but(module: nn.Module, head: str) -> tuple[str, ...]:
    """Names of the layers with parameters, without the classifier."""
    return tuple(name for name, _ in module.named_modules() if name and name != head and parameters_of(module, [name]))
