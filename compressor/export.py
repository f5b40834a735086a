"""Published files: FP32 and INT8 ONNX, and the OpenVINO IR with preprocessing and labels inside.

Invariant: the ONNX file and the IR of one network come from the same trace and differ only in the form of the input.
ONNX takes `image` float32 [N,3,H,W], RGB 0-255 at network size; the IR takes `image` u8 [1,?,?,3], RGB of any size.
Both normalise inside and return `logits`.
"""

import copy
import io
import logging
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import onnxsim
import openvino as ov
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from compressor.artifacts import atomic_write, write_via
from compressor.data.files import label_of
from compressor.errors import ResourceError, UnsupportedModelError
from compressor.onnx_pooling import any_adaptive_pooling
from compressor.openvino_core import core
from compressor.outputs import AsTuple, named_tensors
from compressor.preprocess import InputSpec, embed_preprocessing
from compressor.runtime import F32

log = logging.getLogger(__name__)

OPSET = 17  # the first with everything needed; onnxruntime and OpenVINO of the edge device may be older than ours
_PLANES = "planes"  # normalised RGB planes, the network proper's input
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_EXPORT_DIFFERENCE = 1e-3  # of an output's range, with whatever weights a network comes with
_HOOKS = "__nncf_hooks"  # NNCF 3.4 keeps its quantisers below this name


@dataclass(frozen=True)
class Published:
    """Files of one network; `onnx` is None where its quantisers cannot be written portably."""

    onnx: Path | None
    xml: Path
    bin: Path


def publish_float(
    module: nn.Module, spec: InputSpec, labels: Sequence[str], stem: Path, *, opset: int = OPSET
) -> Published:
    """Write `stem.onnx`, `stem.xml` and `stem.bin` from one trace of a float network."""
    network = trace_float(module, spec, opset=opset)
    return _publish(network, spec, labels, stem, portable=True)


def publish_int8(
    quantized: nn.Module, spec: InputSpec, labels: Sequence[str], stem: Path, *, opset: int = OPSET
) -> Published:
    """Write `stem.onnx`, `stem.xml` and `stem.bin` from one trace of what `quantize` returned, trained or not.

    With per-channel activations no ONNX is written.
    """
    network = trace_int8(quantized, spec, opset=opset)
    return _publish(network, spec, labels, stem, portable=not per_channel_activations(network))


def _publish(
    network: onnx.ModelProto, spec: InputSpec, labels: Sequence[str], stem: Path, *, portable: bool
) -> Published:
    path = stem.with_name(f"{stem.name}.onnx")
    if portable:
        save_onnx(network, spec, path, labels)
    xml = stem.with_name(f"{stem.name}.xml")
    save_ir(convert_ir(network, spec, labels), xml)
    return Published(onnx=path if portable else None, xml=xml, bin=xml.with_suffix(".bin"))


def convert_float_ir(module: nn.Module, spec: InputSpec, labels: Sequence[str]) -> ov.Model:
    """Return the FP32 IR with preprocessing and labels inside; see `convert_ir`."""
    return convert_ir(trace_float(module, spec), spec, labels)


def trace_float(module: nn.Module, spec: InputSpec, *, opset: int = OPSET) -> onnx.ModelProto:
    """Trace a float network: input `planes` float32 [N,3,H,W] normalised, output `logits` [N,classes]."""
    return _simplified(_traced(copy.deepcopy(module), spec, opset))


def trace_int8(quantized: nn.Module, spec: InputSpec, *, opset: int = OPSET) -> onnx.ModelProto:
    """Trace an NNCF fake-quantised network as QuantizeLinear/DequantizeLinear pairs, weights stored as int8.

    The input module stays trainable: a copy is stripped (NNCF's `NATIVE` form: PyTorch's own fake quantisers).

    A BatchNorm that `fold_batchnorm` could not fold runs in float between them.

    Raises:
        UnsupportedModelError: The exporter cannot write the network.
    """
    for name in ("torchao", "torch.utils._pytree"):
        # torchao 0.18, which only `strip` needs, warns about CUDA parts it does not find and about its own enums.
        logging.getLogger(name).setLevel(logging.ERROR)
    import nncf

    example = torch.zeros(1, 3, spec.height, spec.width, device=next(quantized.parameters()).device)
    own = _unshared(copy.deepcopy(quantized))
    stripped = nncf.strip(own, do_copy=False, strip_format=nncf.StripFormat.NATIVE, example_input=example)
    network = _simplified(_traced(stripped, spec, opset))
    _store_weights_as_int8(network)
    return network


def _unshared(quantized: nn.Module) -> nn.Module:
    """Give every place its own quantiser; NNCF shares one among the inputs of a concatenation, and `strip` then
    replaces it in one place only (3.4)."""
    seen: set[int] = set()
    for name, layer in list(quantized.named_modules(remove_duplicate=False)):
        if id(layer) in seen and _HOOKS in name:
            parent, _, leaf = name.rpartition(".")
            quantized.get_submodule(parent).add_module(leaf, copy.deepcopy(layer))
        seen.add(id(layer))
    return quantized


def check_exportable(module: nn.Module, spec: InputSpec) -> None:
    """Demand that the network can be written, and that onnxruntime and OpenVINO compute what torch computes.

    Known in seconds, before a stage is trained.

    Raises:
        UnsupportedModelError: It cannot, or a runtime gives other outputs for a random image.
    """
    network = trace_float(module, spec)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, spec.height, spec.width, generator=generator)
    twin = copy.deepcopy(module).cpu().eval()
    with torch.no_grad():
        wanted = {name: value.numpy() for name, value in named_tensors(twin(x)).items()}
    name = type(module).__name__
    try:
        session = onnxruntime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
        got = {"onnxruntime": session.run(list(wanted), {_PLANES: x.numpy()})}
        converted = ov.convert_model(io.BytesIO(network.SerializeToString()))
        compiled = core().compile_model(converted, "CPU", F32)
        got["OpenVINO"] = [np.asarray(value) for value in compiled([x.numpy()]).values()]
    except Exception as error:  # whatever the runtimes raise on an operation that they do not have
        reason = next(iter(str(error).strip().splitlines()), "")
        raise UnsupportedModelError(
            f"{name}: its ONNX form cannot be run ({type(error).__name__}: {reason})"
        ) from error
    for runtime, outputs in got.items():
        for key, value in zip(wanted, outputs, strict=True):
            difference = float(np.abs(value - wanted[key]).max()) / max(float(np.ptp(wanted[key])), 1e-6)
            if not difference <= _EXPORT_DIFFERENCE:
                raise UnsupportedModelError(
                    f"{name}: {runtime} gives another '{key}' than torch ({difference:.1e} of its range) for a random "
                    "image; a network must compute by its input alone"
                )


def count_nodes(network: onnx.ModelProto, *kinds: str) -> int:
    """Number of nodes of the given operator types."""
    return sum(node.op_type in kinds for node in network.graph.node)


def per_channel_activations(network: onnx.ModelProto) -> bool:
    """Whether some activation has a scale per channel, which onnxruntime refuses for convolutions."""
    constants = _constants(network)
    return any(
        node.op_type == "QuantizeLinear"
        and node.input[0] not in constants
        and int(np.prod(constants[node.input[1]].dims, dtype=np.int64)) > 1
        for node in network.graph.node
    )


def _traced(module: nn.Module, spec: InputSpec, opset: int) -> onnx.ModelProto:
    # The TorchScript exporter: on Xception four times faster than the dynamo one (torch 2.13), which cannot trace
    # NNCF's quantisers at all.
    buffer = io.BytesIO()
    network = module.cpu().eval()
    example = torch.zeros(1, 3, spec.height, spec.width)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation of this exporter, and notes on constants found while tracing
        with torch.no_grad():
            output = network(example)
        names = list(named_tensors(output))
        try:
            with any_adaptive_pooling(opset):
                torch.onnx.export(
                    network if isinstance(output, torch.Tensor) else AsTuple(network),
                    (example,),
                    buffer,  # type: ignore[arg-type]  # this exporter takes it; a file would be outside the run
                    dynamo=False,
                    opset_version=opset,
                    input_names=[_PLANES],
                    output_names=names,
                    dynamic_axes={name: {0: "N"} for name in (_PLANES, *names)},
                )
        except Exception as error:  # the exporter raises whatever an operation it does not know leads to
            reason = next(iter(str(error).splitlines()), "")
            raise UnsupportedModelError(
                f"{type(module).__name__}: the ONNX exporter cannot write it ({type(error).__name__}: {reason})"
            ) from error
    return onnx.load_model_from_string(buffer.getvalue())


def _simplified(network: onnx.ModelProto) -> onnx.ModelProto:
    before = _quantized_reads(network)
    try:
        simplified, same = onnxsim.simplify(network)
    except Exception as error:  # an optional step of a library of its own; the graph as traced is as right
        log.warning("onnxsim failed (%s); the ONNX graph stays as traced", error)
        return network
    if not same or _quantized_reads(simplified) != before:
        log.warning("onnxsim changed the network or its quantisers; the ONNX graph stays as traced")
        return network
    del simplified.metadata_props[:]  # onnxsim's diary of what it did
    return cast(onnx.ModelProto, simplified)


def _quantized_reads(network: onnx.ModelProto) -> Counter[tuple[str, int]]:
    """How many operations of each kind read how many quantised inputs; merging equal quantisers does not change it."""
    quantised = {node.output[0] for node in network.graph.node if node.op_type == "DequantizeLinear"}
    reads = Counter(
        (node.op_type, sum(name in quantised for name in node.input))
        for node in network.graph.node
        if node.op_type not in (*_QUANTIZERS, "Identity", "Cast")
    )
    return Counter({kind: count for kind, count in reads.items() if kind[1]})


def _constants(network: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Constant tensors by every name they are read by, through nodes that hand them on."""
    found = {tensor.name: tensor for tensor in network.graph.initializer}
    for node in network.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
        elif node.op_type == "Identity" and node.input[0] in found:
            found[node.output[0]] = found[node.input[0]]
        elif node.op_type == "Cast" and node.input[0] in found:
            to = onnx.helper.tensor_dtype_to_np_dtype(node.attribute[0].i)
            values = numpy_helper.to_array(found[node.input[0]]).astype(to)
            found[node.output[0]] = numpy_helper.from_array(values, node.output[0])
    return found


def _store_weights_as_int8(network: onnx.ModelProto) -> None:
    """Replace each QuantizeLinear of a constant by its int8 result, in place: same values, a quarter of the file."""
    graph = network.graph
    own = {tensor.name for tensor in graph.initializer}
    constants = _constants(network)
    readers: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    for node in [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] in constants]:
        weight, scale, zero = (numpy_helper.to_array(constants[name]) for name in node.input)
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        stored = numpy_helper.from_array(_quantized(weight, scale, zero, axis), node.output[0])
        graph.initializer.append(stored)
        graph.node.remove(node)
        if readers[node.input[0]] == 1 and node.input[0] in own:
            graph.initializer.remove(constants[node.input[0]])


def _quantized(weight: NDArray[Any], scale: NDArray[Any], zero: NDArray[Any], axis: int) -> NDArray[Any]:
    """QuantizeLinear as ONNX defines it: round half to even, saturate."""
    shape = [1] * weight.ndim
    if scale.size > 1:
        shape[axis] = scale.size
    info = np.iinfo(zero.dtype)
    levels = np.rint(weight / scale.reshape(shape)) + zero.astype(np.int32).reshape(shape)
    return cast(NDArray[Any], np.clip(levels, info.min, info.max).astype(zero.dtype))


def save_onnx(network: onnx.ModelProto, spec: InputSpec, path: Path, labels: Sequence[str]) -> None:
    """Put the normalisation in front, add the metadata, check, and write atomically.

    Raises:
        UnsupportedModelError: Activations are quantised per channel.
    """
    if per_channel_activations(network):
        raise UnsupportedModelError(
            f"{path.name}: activations are quantised per channel, which onnxruntime refuses (zero point must be a "
            "scalar); quantize with per_channel_activations: false to get an ONNX file"
        )
    model = onnx.ModelProto()
    model.CopyFrom(network)
    graph = model.graph
    planes = graph.input[0]
    image = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["N", 3, spec.height, spec.width])
    for name, values in (("image_mean", spec.mean_255()), ("image_std", spec.std_255())):
        graph.initializer.append(numpy_helper.from_array(values.reshape(1, 3, 1, 1), name))
    nodes = [
        onnx.helper.make_node("Sub", ["image", "image_mean"], ["image_centred"], name="image_centred"),
        onnx.helper.make_node("Div", ["image_centred", "image_std"], [planes.name], name="image_normalised"),
        *graph.node,
    ]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.input[0].CopyFrom(image)
    onnx.helper.set_model_props(
        model, {f"model_info {key}": value for key, value in model_info(spec, labels, embedded=False).items()}
    )
    onnx.checker.check_model(model, full_check=True)
    atomic_write(path, model.SerializeToString())


def convert_ir(network: onnx.ModelProto, spec: InputSpec, labels: Sequence[str]) -> ov.Model:
    """Convert a traced network and build preprocessing and metadata in.

    Converting the Q/DQ trace gives the same int8 constants and u8 convolutions as converting the fake-quantised module
    itself, in 4 s instead of 9 to 20 (Xception, openvino 2026.4).

    Returns:
        Model with input `image` u8 [1,?,?,3] RGB, output `logits` float32 [1,classes], and `model_info`.
    """
    converted = ov.convert_model(io.BytesIO(network.SerializeToString()))
    model = embed_preprocessing(converted, spec)
    classes = model.outputs[0].get_partial_shape()[1]
    if classes.is_static and classes.get_length() != len(labels):
        raise UnsupportedModelError(
            f"the network has {classes.get_length()} outputs and there are {len(labels)} labels"
        )
    for key, value in model_info(spec, labels, embedded=True).items():
        model.set_rt_info(value, ["model_info", key])
    model.set_friendly_name("network")
    return model


def model_info(spec: InputSpec, labels: Sequence[str], *, embedded: bool) -> dict[str, str]:
    """Metadata for OpenVINO Model API 0.4 (`model_info` in IR, `model_info KEY` in ONNX): how to feed and read it.

    Args:
        spec: Geometry the network expects.
        labels: Class names in index order; blanks become `_`, since the list is written with blanks between.
        embedded: Whether resizing is inside the model (IR) or left to the caller (ONNX).
    """
    info = {
        "model_type": "Classification",
        "task_type": "classification",
        "labels": " ".join(label_of(label) for label in labels),
        "resize_type": "crop" if spec.fit == "center_crop" else "standard",
        "interpolation_mode": "CUBIC" if spec.resize == "pillow_bicubic" else "LINEAR",
        "reverse_input_channels": "NO",
    }
    if embedded:
        info |= {"embedded_processing": "YES", "orig_height": str(spec.height), "orig_width": str(spec.width)}
    return info


def ir_bytes(path: Path) -> int:
    """Size of an IR: its .xml and its .bin."""
    return path.stat().st_size + path.with_suffix(".bin").stat().st_size


def save_ir(model: ov.Model, path: Path) -> None:
    """Write `path` (.xml) and its .bin, weights in the precision they have, each renamed into place when complete.

    Raises:
        ResourceError: The disk is full or the folder cannot be written.
    """

    def write(temporary: Path) -> None:
        weights = temporary.with_suffix(".bin")
        try:
            ov.save_model(model, temporary, compress_to_fp16=False)
            with weights.open("rb+") as file:
                os.fsync(file.fileno())
            # The .bin first: an .xml beside the .bin of another model would load and compute nonsense.
            weights.replace(path.with_suffix(".bin"))
        except RuntimeError as error:  # OpenVINO 2026.4 says only "basic_ios::clear: iostream error"
            raise ResourceError(f"{path}: OpenVINO could not write it ({error}); is the disk full?") from error
        finally:
            weights.unlink(missing_ok=True)

    path.with_suffix(".xml").unlink(missing_ok=True)
    write_via(path, write)
