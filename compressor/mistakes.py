"""What a network takes for what: pairs of classes, and the mistakes it is surest of, with small pictures of them.

Invariant: plain JSON comes out; needs only numpy and pillow.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from compressor.metrics import probabilities

WORST = 12  # mistakes that are shown
THUMBNAIL = 96  # pixels of the longer side


def mistakes_of(
    logits: NDArray[np.float32], truth: NDArray[np.int64], images: NDArray[np.uint8], names: Sequence[str]
) -> dict[str, Any]:
    """Count confusions and keep the mistakes of the highest confidence.

    Args:
        logits: (N, classes).
        truth: (N,) class indices.
        images: (N, h, w, 3) RGB.
        names: Of the images.

    Returns:
        `confusions` ([class, named, images], the commonest first), `right` (images named right, by class), `worst`
        (`name`, `label` and `named` as indices, `confidence`, and `jpeg`, base64).
    """
    named, sure = logits.argmax(1), probabilities(logits).max(1)
    wrong = np.flatnonzero(named != truth)
    pairs, counts = np.unique(np.stack([truth[wrong], named[wrong]]), axis=1, return_counts=True)
    confusions = [[int(a), int(b), int(n)] for (a, b), n in zip(pairs.T, counts, strict=True)]
    worst = wrong[np.argsort(-sure[wrong], kind="stable")][:WORST]
    return {
        "confusions": sorted(confusions, key=lambda pair: (-pair[2], pair[:2])),
        "right": np.bincount(truth[named == truth], minlength=logits.shape[1]).tolist(),
        "worst": [
            {
                "name": names[i],
                "label": int(truth[i]),
                "named": int(named[i]),
                "confidence": float(sure[i]),
                "jpeg": thumbnail(images[i]),
            }
            for i in worst
        ],
    }


def thumbnail(image: NDArray[np.uint8]) -> str:
    """A small JPEG of (h, w, 3) RGB, base64."""
    picture = Image.fromarray(np.asarray(image))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    written = io.BytesIO()
    picture.save(written, "JPEG", quality=80)
    return base64.b64encode(written.getvalue()).decode("ascii")
