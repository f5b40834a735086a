"""Running a published IR: open it with clear errors, feed it images, read what it says about itself.

Invariant: needs only openvino and numpy, so that the edge device can evaluate and time a model without torch.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from compressor.errors import DataError
from compressor.openvino_core import core

log = logging.getLogger(__name__)

F32 = {"INFERENCE_PRECISION_HINT": "f32"}  # CPUs with bf16 run "FP32" models in bf16 unless told otherwise
DEFAULT: dict[str, str] = {}


def open_ir(xml: Path) -> ov.Model:
    """Read an IR.

    Raises:
        DataError: The file or its .bin is missing or is no IR, or its input is not one u8 NHWC image.
    """
    for path in (xml, xml.with_suffix(".bin")):
        if not path.is_file():
            raise DataError(f"{path}: no such file; an OpenVINO IR is an .xml with its .bin beside it")
    try:
        model = core().read_model(xml)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise DataError(f"{xml}: OpenVINO cannot read it ({reason})") from error
    image = model.inputs[0]
    shape = image.get_partial_shape()
    if len(model.inputs) != 1 or image.get_element_type() != ov.Type.u8 or len(shape) != 4 or shape[3] != 3:
        raise DataError(
            f"{xml}: its input is {image.get_element_type()} {shape}; published IRs take one u8 [1,?,?,3] image"
        )
    return model


def compile_ir(xml: Path, hint: str, config: Mapping[str, str] = DEFAULT) -> ov.CompiledModel:
    """Compile an IR for the CPU with performance hint `LATENCY` or `THROUGHPUT` and further properties."""
    return core().compile_model(open_ir(xml), "CPU", {"PERFORMANCE_HINT": hint, **config})


def read_labels(xml: Path) -> tuple[str, ...]:
    """Class names in index order, from the IR's `model_info`; empty when it has none."""
    model = open_ir(xml)
    if not model.has_rt_info(["model_info", "labels"]):
        return ()
    return tuple(model.get_rt_info(["model_info", "labels"]).astype(str).split())


def network_size(xml: Path) -> tuple[int, int] | None:
    """Height and width the network resizes to, from the IR's `model_info`; None when it does not say."""
    model = open_ir(xml)
    keys = (["model_info", "orig_height"], ["model_info", "orig_width"])
    if not all(model.has_rt_info(key) for key in keys):
        return None
    height, width = (int(model.get_rt_info(key).astype(str)) for key in keys)
    return height, width


def stream(compiled: ov.CompiledModel, images: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.float32]]:
    """Run images, each (h, w, 3), with as many requests under way as the plugin asks for; yields logits in order.

    Requests are waited for, not answered by callbacks: calling Python from OpenVINO's threads locks up or crashes the
    process now and then (openvino 2026.4, Python 3.11).
    """
    spare = [
        compiled.create_infer_request() for _ in range(int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")))
    ]
    under_way: deque[ov.InferRequest] = deque()

    def finish() -> NDArray[np.float32]:
        request = under_way.popleft()
        request.wait()
        spare.append(request)
        return np.array(request.get_output_tensor(0).data, np.float32).reshape(-1)  # a copy: the tensor is reused

    for image in images:
        if not spare:
            yield finish()
        request = spare.pop()
        request.start_async({0: np.ascontiguousarray(image)[None]})
        under_way.append(request)
    while under_way:
        yield finish()


def predict(xml: Path, images: Iterable[NDArray[np.uint8]], config: Mapping[str, str] = DEFAULT) -> NDArray[np.float32]:
    """Run images, each (h, w, 3) RGB and of any size, through an IR.

    Several requests run at once, so that `images` may decode the next one meanwhile.

    Returns:
        Logits, (N, classes), in the order of the images.
    """
    compiled = compile_ir(xml, "THROUGHPUT", config)
    rows = list(stream(compiled, images))
    if not rows:
        return np.zeros((0, compiled.outputs[0].get_partial_shape()[1].get_length()), np.float32)
    return np.stack(rows)
