"""Image geometry and normalisation as OpenVINO operations, so that training and deployment share one implementation.

Invariant: the resize that fills the cache of training images (`make_resizer`) and the one inside the published IR
(`embed_preprocessing`) are built by the same function, so a cached image is what the deployed network sees.

Input convention: unsigned 8-bit RGB, height x width x channels, of any size. An image already at the network's size
passes unchanged.

Fit. `stretch` scales both sides to the target and ignores the aspect ratio. `center_crop` cuts the largest centred box
that has the target's aspect ratio (sides rounded down to whole pixels, an odd remainder going to the right and bottom)
and scales that box; nothing outside the box is read.

Resize. `pillow_bilinear` and `pillow_bicubic` are Pillow's antialiased filters. OpenVINO 2026.4 computes them in 8
bits, horizontal pass first. Pillow 13 takes the vertical pass first for tall images, and breaks ties differently: the
two agree within a level or two of 255 for bilinear; on noise, bicubic can differ by more. `linear` samples two pixels a
side and aliases when it shrinks, but costs less on large images.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as op

from compressor.errors import RecipeError, UnsupportedModelError, did_you_mean
from compressor.openvino_core import core

RESIZES = ("pillow_bilinear", "pillow_bicubic", "linear")
FITS = ("stretch", "center_crop")

_INTERPOLATE_MODES = {"pillow_bilinear": "bilinear_pillow", "pillow_bicubic": "bicubic_pillow", "linear": "linear_onnx"}
_NHWC_SPATIAL_AXES = (1, 2)

Resizer = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]


@dataclass(frozen=True)
class InputSpec:
    """What the network is fed.

    Attributes:
        height: Rows of the network's input, pixels.
        width: Columns of the network's input, pixels.
        resize: One of `RESIZES`.
        fit: One of `FITS`.
        mean: Per-channel mean subtracted, RGB order, in units where white is 1.
        std: Per-channel divisor, RGB order, in units where white is 1.

    Raises:
        RecipeError: A field is out of its range.
    """

    height: int
    width: int
    resize: str = "pillow_bilinear"
    fit: str = "stretch"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise RecipeError(f"input.size: {self.height} x {self.width} found; both sides must be at least 1 pixel")
        for key, value, allowed in (("resize", self.resize, RESIZES), ("fit", self.fit, FITS)):
            if value not in allowed:
                hint = did_you_mean(value, allowed)
                raise RecipeError(f"input.{key}: '{value}' is not known; use one of {', '.join(allowed)}{hint}")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(s > 0 for s in self.std):
            raise RecipeError(f"input.mean/std: {self.mean} / {self.std} found; three numbers each, std above zero")

    def geometry(self) -> tuple[int, int, str, str]:
        """Return the fields that decide the cached pixels: height, width, resize, fit."""
        return (self.height, self.width, self.resize, self.fit)

    def mean_255(self) -> NDArray[np.float32]:
        """Return the mean in units of pixel levels, float32 (3,)."""
        return (np.asarray(self.mean, np.float64) * 255.0).astype(np.float32)

    def std_255(self) -> NDArray[np.float32]:
        """Return the divisor in units of pixel levels, float32 (3,)."""
        return (np.asarray(self.std, np.float64) * 255.0).astype(np.float32)


def resize_model(spec: InputSpec) -> ov.Model:
    """Return the geometry alone as a model: u8 [1,?,?,3] `image` -> u8 [1,H,W,3] `resized`."""
    image = _image_parameter()
    return ov.Model([_named(_geometry(image.output(0), spec), "resized")], [image], "resize")


def make_resizer(spec: InputSpec) -> Resizer:
    """Compile `resize_model` for the CPU and return it as a function on arrays.

    The function is safe to call from several threads; each compiles the small model for itself.

    Returns:
        u8 (h, w, 3) -> u8 (H, W, 3), a fresh array.
    """
    local = threading.local()

    def resize(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an image is uint8 (height, width, 3); {image.dtype} {image.shape} found")
        if not hasattr(local, "request"):
            local.request = _compile_single_threaded(resize_model(spec)).create_infer_request()
        local.request.infer({0: np.ascontiguousarray(image)[None]}, share_inputs=True)
        result: NDArray[np.uint8] = local.request.get_output_tensor(0).data[0].copy()
        return result

    # The bindings fill tables at their first use; two threads that come first at once wait for each other for ever, one
    # with Python's lock and one with the table's (openvino 2026.4, one process in sixty). So the caller comes first.
    resize(np.zeros((spec.height, spec.width, 3), np.uint8))
    return resize


def _compile_single_threaded(model: ov.Model) -> ov.CompiledModel:
    # One thread a model: callers parallelise over images, which scales better than splitting one image.
    config = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    try:
        # The plugin keeps 5,000 compiled kernels, one or two per input size: about a megabyte each here. The property
        # is not a documented one (openvino 2026.4), hence the way out.
        return core().compile_model(model, "CPU", {**config, "CPU_RUNTIME_CACHE_CAPACITY": 256})
    except RuntimeError:
        return core().compile_model(model, "CPU", config)


def embed_preprocessing(network: ov.Model, spec: InputSpec) -> ov.Model:
    """Put geometry, layout change and normalisation in front of a network.

    Args:
        network: One float32 input [1,3,H,W] (or dynamic dimensions) of normalised RGB, logits [1,N] as first
            output. Left as it is; the result is built on a clone.
        spec: Geometry and normalisation.

    Returns:
        Model with input `image` u8 [1,?,?,3] RGB of any size, output `logits` [1,N] and the network's others.
        Fixing the input with `model.reshape([1, h, w, 3])` works too.

    Raises:
        UnsupportedModelError: The network's input or output is not as described.
    """
    inner = network.clone()
    if len(inner.inputs) != 1:
        raise UnsupportedModelError(f"embed_preprocessing: {len(inner.inputs)} inputs found; one image is needed")
    wanted = ov.PartialShape([1, 3, spec.height, spec.width])
    shape, element = inner.inputs[0].get_partial_shape(), inner.inputs[0].get_element_type()
    if element != ov.Type.f32 or not shape.compatible(wanted):
        raise UnsupportedModelError(
            f"embed_preprocessing: the network's input is {element} {shape}; float32 {wanted} is needed (input.size)"
        )
    inner.reshape(wanted)
    # Metadata (labels and the like) is carried over: building a new Model drops rt_info.
    image = _image_parameter()
    planes = _normalised_planes(_geometry(image.output(0), spec), spec)
    inner.get_parameters()[0].output(0).replace(planes)
    results = []
    for position, result in enumerate(inner.get_results()):
        value = result.input_value(0)
        results.append(_named(value, "logits" if position == 0 else inner.outputs[position].get_any_name()))
    model = ov.Model(results, [image], inner.get_friendly_name())
    for key, value in network.get_rt_info().items():
        model.set_rt_info(value, [key])
    model.validate_nodes_and_infer_types()
    return model


def _image_parameter() -> Any:
    parameter = op.parameter(ov.PartialShape([1, -1, -1, 3]), ov.Type.u8, name="image")
    parameter.set_layout(ov.Layout("NHWC"))
    parameter.output(0).set_names({"image"})
    return parameter


def _named(value: Any, name: str) -> Any:
    result = op.result(value, name=name)
    result.output(0).set_names({name})
    return result


def _geometry(image: Any, spec: InputSpec) -> Any:
    """Return the resized image: u8 (1, h, w, 3) -> u8 (1, H, W, 3)."""
    if spec.fit == "center_crop":
        image = _centre_box(image, spec.height, spec.width)
    mode = _INTERPOLATE_MODES[spec.resize]
    # The resize works on u8: after a conversion to float OpenVINO's Pillow modes no longer round as Pillow does.
    if spec.resize == "linear":
        return _interpolate(image, (spec.height, spec.width), mode)
    # Two one-dimensional passes over reshaped views instead of one two-dimensional operation. OpenVINO 2026.4 unrolls
    # its Pillow kernel over the whole image: 190 ms and 19 MB for every new input size, then 2.7 ms a 300 px image. A
    # row (or a column of all W x 3 values) at a time it is 10 ms, 1 MB and 0.4 ms, with the same bits.
    rows = op.transpose(image, _ints(1, 0, 2, 3))  # (h, 1, w, 3)
    rows = _interpolate(rows, (1, spec.width), mode)  # (h, 1, W, 3)
    columns = op.reshape(rows, _ints(1, -1, 1, spec.width * 3), False)  # (1, h, 1, 3 W)
    columns = _interpolate(columns, (spec.height, 1), mode)  # (1, H, 1, 3 W)
    return op.reshape(columns, _ints(1, spec.height, spec.width, 3), False).output(0)


def _interpolate(pixels: Any, size: tuple[int, int], mode: str) -> Any:
    """Resize the second and third axis to `size`."""
    return op.interpolate(
        pixels,
        _ints(*size),
        mode,
        "sizes",
        pads_begin=[0, 0, 0, 0],
        pads_end=[0, 0, 0, 0],
        coordinate_transformation_mode="half_pixel",
        cube_coeff=-0.5,
        axes=_ints(*_NHWC_SPATIAL_AXES),
    ).output(0)


def _ints(*values: int) -> NDArray[np.int64]:
    return np.asarray(values, np.int64)


def _centre_box(image: Any, height: int, width: int) -> Any:
    """Return the largest centred box with aspect height : width, in whole pixels."""
    axis = np.int64(0)
    sides = op.gather(op.shape_of(image, "i64"), _ints(*_NHWC_SPATIAL_AXES), axis)  # (2,) h, w
    # (w, h) scaled to the other axis: the height that goes with the full width, and the width with the full height.
    swapped = op.gather(sides, _ints(1, 0), axis)
    scaled = op.divide(op.multiply(swapped, _ints(height, width)), _ints(width, height))
    box = op.maximum(op.minimum(sides, scaled), _ints(1, 1))
    start = op.divide(op.subtract(sides, box), _ints(2, 2))
    return op.slice(image, start, op.add(start, box), _ints(1, 1), _ints(*_NHWC_SPATIAL_AXES)).output(0)


def _normalised_planes(pixels: Any, spec: InputSpec) -> Any:
    """Return float32 (1, 3, H, W): (pixels - 255 mean) / (255 std)."""
    levels = op.convert(pixels, "f32")
    # Subtracting first keeps levels exact where the plugin runs in bfloat16, whose 8 bits hold 0-255 but not 1/255ths.
    centred = op.subtract(levels, spec.mean_255().reshape(1, 1, 1, 3))
    scaled = op.divide(centred, spec.std_255().reshape(1, 1, 1, 3))
    return op.transpose(scaled, _ints(0, 3, 1, 2)).output(0)
