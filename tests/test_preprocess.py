"""The published IR computes on a raw image what the network computes on the cached one."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from numpy.typing import NDArray
from openvino import opset13 as op
from PIL import Image

from compressor.errors import RecipeError, UnsupportedModelError
from compressor.openvino_core import core
from compressor.preprocess import FITS, RESIZES, InputSpec, embed_preprocessing, make_resizer, resize_model

F32 = {"INFERENCE_PRECISION_HINT": "f32"}
SIZES = [(60, 40), (40, 60), (24, 32), (19, 11), (1, 1), (101, 100), (7, 90)]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def tiny_network(height: int, width: int) -> ov.Model:
    rng = np.random.default_rng(1)
    x = op.parameter(ov.PartialShape([1, 3, height, width]), ov.Type.f32)
    kernel = rng.standard_normal((8, 3, 3, 3)).astype(np.float32)
    y = op.relu(op.convolution(x, kernel, [2, 2], [1, 1], [1, 1], [1, 1]))
    y = op.reduce_mean(y, np.array([2, 3], np.int64), False)
    y = op.matmul(y, rng.standard_normal((5, 8)).astype(np.float32), False, True)
    model = ov.Model([op.result(y)], [x], "tiny")
    model.set_rt_info("a b c d e", ["model_info", "labels"])
    return model


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("resize", RESIZES)
def test_ir_on_a_raw_image_equals_network_on_the_cached_one(resize: str, fit: str, tmp_path: Path) -> None:
    spec = InputSpec(24, 32, resize, fit, MEAN, STD)
    network = tiny_network(24, 32)
    ov.save_model(embed_preprocessing(network, spec), tmp_path / "m.xml", compress_to_fp16=False)
    model = core().read_model(tmp_path / "m.xml")
    assert model.input(0).get_names() == {"image"}
    assert model.output(0).get_names() == {"logits"}
    assert str(model.input(0).get_partial_shape()) == "[1,?,?,3]"
    assert model.input(0).get_element_type() == ov.Type.u8
    assert model.get_rt_info(["model_info", "labels"]).astype(str) == "a b c d e"
    published, bare = core().compile_model(model, "CPU", F32), core().compile_model(network, "CPU", F32)
    cached = make_resizer(spec)
    for size in SIZES:
        image = noise(*size)
        pixels = cached(image).astype(np.float64)
        planes = ((pixels / 255 - MEAN) / STD).astype(np.float32).transpose(2, 0, 1)[None]
        expected = bare(planes)[0]
        np.testing.assert_allclose(published(image[None])[0], expected, atol=1e-5, err_msg=str(size))
        fixed = model.clone()
        fixed.reshape([1, *image.shape])
        np.testing.assert_allclose(core().compile_model(fixed, "CPU", F32)(image[None])[0], expected, atol=1e-5)


@pytest.mark.parametrize("resize", RESIZES)
def test_default_precision_resizes_to_the_same_bytes(resize: str) -> None:
    """bf16, where the CPU has it, must not touch the geometry: accuracy is measured at default precision."""
    spec = InputSpec(24, 32, resize)
    plain, exact = core().compile_model(resize_model(spec), "CPU"), core().compile_model(resize_model(spec), "CPU", F32)
    for size in SIZES:
        image = noise(*size)[None]
        assert np.array_equal(plain(image)[0], exact(image)[0])


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("fit", FITS)
def test_image_at_network_size_passes_unchanged(resize: str, fit: str) -> None:
    image = noise(24, 32)
    assert np.array_equal(make_resizer(InputSpec(24, 32, resize, fit))(image), image)


def test_two_passes_equal_openvinos_own_pillow_resize() -> None:
    """The cheap form of the resize is bit for bit the operation that PrePostProcessor would insert."""
    from openvino.preprocess import PrePostProcessor, ResizeAlgorithm

    for resize, algorithm in (
        ("pillow_bilinear", ResizeAlgorithm.RESIZE_BILINEAR_PILLOW),
        ("pillow_bicubic", ResizeAlgorithm.RESIZE_BICUBIC_PILLOW),
    ):
        x = op.parameter(ov.PartialShape([1, 24, 32, 3]), ov.Type.u8)
        processor = PrePostProcessor(ov.Model([op.result(x)], [x], "identity"))
        processor.input().tensor().set_shape(ov.PartialShape([1, -1, -1, 3])).set_layout(ov.Layout("NHWC"))
        processor.input().model().set_layout(ov.Layout("NHWC"))
        processor.input().preprocess().resize(algorithm)
        official, ours = core().compile_model(processor.build(), "CPU"), make_resizer(InputSpec(24, 32, resize))
        for size in SIZES:
            image = noise(*size)
            assert np.array_equal(official(image[None])[0][0], ours(image)), (resize, size)


@pytest.mark.parametrize(
    ("resize", "filter_", "levels"),
    [("pillow_bilinear", Image.Resampling.BILINEAR, 2), ("pillow_bicubic", Image.Resampling.BICUBIC, 2)],
)
def test_pillow_modes_agree_with_pillow(resize: str, filter_: Image.Resampling, levels: int) -> None:
    ours = make_resizer(InputSpec(24, 32, resize))
    # Wide images: for tall ones Pillow 13 takes the vertical pass first, which rounds (and, bicubic, clips) elsewhere.
    for size in [(40, 90), (50, 70), (30, 200), (24, 64)]:
        image = noise(*size)
        theirs = np.asarray(Image.fromarray(image).resize((32, 24), filter_)).astype(int)
        difference = np.abs(ours(image).astype(int) - theirs)
        assert difference.max() <= levels
        assert (difference > 0).mean() < 0.2


def test_center_crop_is_the_largest_centred_box_of_the_targets_aspect() -> None:
    crop, stretch = make_resizer(InputSpec(24, 32, fit="center_crop")), make_resizer(InputSpec(24, 32))
    for height, width in [(60, 40), (40, 61), (24, 32), (101, 100), (7, 90), (1, 1)]:
        image = noise(height, width)
        box_h, box_w = min(height, max(1, width * 24 // 32)), min(width, max(1, height * 32 // 24))
        top, left = (height - box_h) // 2, (width - box_w) // 2
        assert np.array_equal(crop(image), stretch(image[top : top + box_h, left : left + box_w]))


def test_resizer_is_safe_in_threads() -> None:
    resize = make_resizer(InputSpec(16, 16))
    images = [noise(20 + i % 7, 30 + i % 5, i) for i in range(60)]
    alone = [resize(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(resize, images))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_resizer_refuses_what_is_no_rgb_image() -> None:
    with pytest.raises(ValueError, match=r"uint8 \(height, width, 3\); float32 \(4, 4, 3\) found"):
        make_resizer(InputSpec(8, 8))(np.zeros((4, 4, 3), np.float32))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"height": 0, "width": 8}, "input.size: 0 x 8 found"),
        ({"height": 8, "width": 8, "resize": "pilow_bilinear"}, "did you mean 'pillow_bilinear'"),
        ({"height": 8, "width": 8, "fit": "crop"}, "input.fit: 'crop' is not known; use one of stretch, center_crop"),
        ({"height": 8, "width": 8, "std": (0.5, 0.0, 0.5)}, "std above zero"),
    ],
)
def test_bad_spec_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        InputSpec(**values)  # type: ignore[arg-type]


def test_network_of_another_input_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"input is .*\[1,3,24,32\]; float32 \[1,3,16,16\] is needed"):
        embed_preprocessing(tiny_network(24, 32), InputSpec(16, 16))
