"""Law: every image that was named wrong is in one pair, and the worst are those the network was surest of."""

import base64
import io

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from compressor.mistakes import THUMBNAIL, WORST, mistakes_of, thumbnail


@given(st.integers(0, 1000), st.integers(1, 40), st.integers(2, 5))
def test_counts_add_up(seed: int, images: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(images, classes)).astype(np.float32)
    truth = rng.integers(0, classes, images)
    pixels = np.zeros((images, 4, 4, 3), np.uint8)
    found = mistakes_of(logits, truth, pixels, [str(i) for i in range(images)])
    assert sum(found["right"]) + sum(count for *_, count in found["confusions"]) == images
    assert all(label != named for label, named, _ in found["confusions"])
    assert len(found["worst"]) == min(WORST, images - sum(found["right"]))
    for one in found["worst"]:
        row = int(one["name"])
        assert (one["label"], one["named"]) == (truth[row], logits[row].argmax())


def test_worst_first_and_commonest_first_by_hand() -> None:
    logits = np.array([[5, 0, 0], [1, 0, 0], [0, 9, 0], [0, 3, 0]], np.float32)
    truth = np.array([1, 1, 2, 1])
    found = mistakes_of(logits, truth, np.zeros((4, 4, 4, 3), np.uint8), ["a", "b", "c", "d"])
    assert found["confusions"] == [[1, 0, 2], [2, 1, 1]]
    assert found["right"] == [0, 1, 0]
    assert [one["name"] for one in found["worst"]] == ["c", "a", "b"]


def test_a_thumbnail_is_a_small_picture_of_the_same_shape() -> None:
    pixels = np.full((300, 150, 3), (200, 30, 30), np.uint8)
    with Image.open(io.BytesIO(base64.b64decode(thumbnail(pixels)))) as small:
        assert small.size == (THUMBNAIL // 2, THUMBNAIL)
        assert small.convert("RGB").getpixel((10, 10))[0] > 150
