"""The input sizes that a recipe's stages work at, and the images at each of them.

Invariant: whatever their size, the same images are at the same places of the same splits.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from compressor import environment
from compressor import recipe as spec
from compressor.context import Context
from compressor.data import Dataset, load_dataset
from compressor.data.batches import to_input
from compressor.errors import DataError, RecipeError
from compressor.preprocess import InputSpec
from compressor.recipe_rules import not_smaller


def sizes_of(stages: Sequence[spec.Stage], size: tuple[int, int]) -> list[tuple[int, int]]:
    """Height and width of the network's input in each stage, the first of which is given `size`.

    Raises:
        RecipeError: A stage would not reduce it.
    """
    sizes = []
    for i, stage in enumerate(stages):
        if isinstance(stage, spec.ReduceResolution):
            if fault := not_smaller(stage.size, size):
                raise RecipeError(f"stages[{i}].size: {fault}")
            size = stage.size
        sizes.append(size)
    return sizes


def check_input(module: nn.Module, example: Tensor) -> None:
    """Demand that a network takes an input, which not every one does at any size.

    Raises:
        RecipeError: It fails.
    """
    try:
        with torch.no_grad():
            module.eval()(example)
    except (RuntimeError, ValueError, AssertionError) as error:
        height, width = example.shape[2:]
        raise RecipeError(f"size: the network cannot take images of {height} x {width} pixels: {error}") from error


def load_data(recipe: spec.Recipe, input_spec: InputSpec, *, like: Dataset | None = None) -> Dataset:
    """Load a recipe's images.

    Args:
        recipe: With its `input` filled in.
        input_spec: What the images are prepared for.
        like: The same images at another size.

    Raises:
        DataError: See `load_dataset`; or the images are not those of `like`.
    """
    settings = recipe.data.model_dump()
    if settings["image_size"] is None and recipe.input.size is not None:
        settings["image_size"] = max(recipe.input.size)  # drawn once, and scaled to whatever size
    cache = environment.cache_dir() / "data"
    data = load_dataset(spec=input_spec, cache=cache, seed=recipe.seed, like=like, **settings)
    if like is not None and any(
        getattr(data, side).names != getattr(like, side).names for side in ("train", "val", "test")
    ):
        raise DataError("data: the images have changed while they were read; run it again")
    return data


def contexts_of(stages: Sequence[spec.Stage], context: Context, load: Callable[[InputSpec], Dataset]) -> list[Context]:
    """What each stage may read, at the input size it works at.

    Args:
        stages: Of the recipe.
        context: At the recipe's input size.
        load: Gives the data at another one.
    """
    full = context.data
    contexts = {(full.spec.height, full.spec.width): context}
    sizes = sizes_of(stages, (full.spec.height, full.spec.width))
    for size in sizes:
        if size not in contexts:
            data = load(dataclasses.replace(full.spec, height=size[0], width=size[1]))
            example = to_input(data.train.images[:1], data.spec, "cpu")
            contexts[size] = dataclasses.replace(context, example=example, data=data, full_size=full)
    return [contexts[size] for size in sizes]


def examples_of(stages: Sequence[spec.Stage], size: tuple[int, int]) -> list[Tensor]:
    """An input (1, 3, H, W) of the network in each stage, for counting without data."""
    return [torch.zeros(1, 3, *sides) for sides in sizes_of(stages, size)]
