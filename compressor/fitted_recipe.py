"""A recipe that fits a folder of images: sizes, epochs and augmentation from what the survey found.

Invariant: text alone; the recipe it gives is valid, and says of each number why it is what it is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.errors import DataError, RecipeError
from compressor.pages.rendering import render
from compressor.shipped import recipes_dir

STEPS = 1500  # of training from pretrained weights: a choice to begin with
FEWEST_EPOCHS, MOST_EPOCHS = 3, 30
SMALLEST, LARGEST, GRID = 64, 224, 32  # pixels
BATCH = 32
SOURCES = ("builtin", "timm", "torchvision")


def recipe_for(found: Mapping[str, Any], path: Path, model: str, target: Path) -> str:
    """YAML text of a recipe.

    Args:
        found: Of `data.survey.survey`.
        path: The images.
        model: `xception`, `timm/NAME` or `torchvision/NAME`.
        target: Where the recipe will be.

    Raises:
        DataError: The images have faults, so no recipe would run.
        RecipeError: The model's source is not known.
    """
    if found["faults"]:
        faults = found["faults"]
        raise DataError("\n  - ".join([f"{path}: {len(faults)} faults, mend them first", *faults[:20]]))
    source, _, name = model.rpartition("/")
    source = source or ("builtin" if name == "xception" else "timm")
    if source not in SOURCES:
        raise RecipeError(f"--model {model}: found source '{source}', allowed: xception, timm/NAME or torchvision/NAME")
    train = found["totals"].get("train") or round(0.8 * found["totals"]["all"])
    short = min(found["height"]["median"], found["width"]["median"])
    size = max(SMALLEST, min(LARGEST, short // GRID * GRID))
    epochs = max(FEWEST_EPOCHS, min(MOST_EPOCHS, round(STEPS * BATCH / max(train, 1))))
    per_class = [count for counts in found["counts"].values() for count in counts.values()]
    notes = [
        f"{leak['images']} images are in both {pair}; a run drops them from the first"
        for pair, leak in found["leaks"].items()
    ]
    notes += [f"{found['repeated']} images repeat the bytes of another one"] if found["repeated"] else []
    return render(
        "recipe.yaml.j2",
        schema=recipes_dir() / "recipe.schema.json",
        path=str(path),
        target=target.name,
        classes=len(found["labels"]),
        totals=", ".join(f"{count} {side}" for side, count in found["totals"].items()),
        fewest=min(per_class),
        most=max(per_class),
        width=found["width"]["median"],
        height=found["height"]["median"],
        notes=notes,
        source=source,
        name=name,
        fetched=name if source == "builtin" else model,
        size=size,
        grid=GRID,
        steps=STEPS,
        batch=BATCH,
        epochs=epochs,
        patience=max(2, epochs // 3),
        recovery_steps=max(20, min(80, train // BATCH)),
        recovery_epochs=max(FEWEST_EPOCHS, round(1.2 * epochs)),
        calibration=max(len(found["labels"]), min(300, train)),
        qat_steps=max(20, min(150, 2 * train // BATCH)),
    )
