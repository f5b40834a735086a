"""Where the time of a published IR goes: milliseconds of each operation, by OpenVINO's own counters.

Invariant: needs only openvino and numpy. Counters slow each operation down by about a microsecond, so their sum is more
than a request takes without them: shares of it are what they are good for.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compressor.runtime import DEFAULT, compile_ir

_CONVERTED = ("Conv", "Gemm", "MatMul", "ConvTranspose")  # last words of the names of ONNX operations that have weights
_QUANTIZED = "__1.0/QuantizeLinear_output_0"  # how the names of weights end that NNCF 3.4 quantized
_WRAPPER = "network"  # what the modules that export and quantization put around a network call it
# What layers with weights are to the plugin.
_COMPUTING = ("Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul")


@dataclass(frozen=True)
class Operation:
    """One operation of a compiled model.

    Attributes:
        name: In the compiled model.
        kind: What it is to the plugin (`Convolution`, `Subgraph`, `Reorder`).
        precision: It is computed in.
        ms: Median.
        origins: Names in the IR of what was fused into it.
        inputs: Names of the operations it reads.
    """

    name: str
    kind: str
    precision: str
    ms: float
    origins: tuple[str, ...]
    inputs: tuple[str, ...]


def profile(
    xml: Path,
    images: NDArray[np.uint8],
    *,
    calls: int = 40,
    threads: int | None = None,
    config: Mapping[str, str] = DEFAULT,
) -> list[Operation]:
    """Time every operation of an IR, one request at a time.

    Args:
        xml: A published IR.
        images: (N, h, w, 3) RGB, fed in turn.
        calls: Counted requests, after a quarter as many that are not.
        threads: Inference threads; None leaves the choice to OpenVINO.
        config: Properties to compile with, such as `runtime.F32`.

    Returns:
        In the order of execution; constants, and what the plugin left out, are not among them.
    """
    more = {"PERF_COUNT": "YES", **({} if threads is None else {"INFERENCE_NUM_THREADS": str(threads)})}
    compiled = compile_ir(xml, "LATENCY", {**config, **more})
    request = compiled.create_infer_request()
    times: dict[str, list[float]] = {}
    for call in range(-(calls // 4), calls):
        request.infer({0: np.ascontiguousarray(images[call % len(images)])[None]})
        if call >= 0:
            for counter in request.get_profiling_info():
                times.setdefault(counter.node_name, []).append(counter.real_time.total_seconds() * 1e3)
    operations = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        info, name = node.get_rt_info(), node.get_friendly_name()
        kind = info["layerType"].astype(str)
        if kind != "Const" and name in times:
            operations.append(
                Operation(
                    name,
                    kind,
                    info["runtimePrecision"].astype(str),
                    float(np.median(times[name])),
                    tuple(info["originalLayersNames"].astype(str).split(",")),
                    tuple(source.get_node().get_friendly_name() for source in node.input_values()),
                )
            )
    return operations


def times_of_layers(operations: Sequence[Operation], layers: Collection[str]) -> tuple[dict[str, float], float]:
    """Add up the operations' times by the layer of the torch network that they come from.

    What has no weights (activations, additions, pooling, changes of layout) counts for the layer whose result it reads,
    for it costs as much as that layer has channels.

    Args:
        operations: From `profile`, of an IR that was traced from torch.
        layers: Names of the convolutions and linear layers.

    Returns:
        Milliseconds by layer, and of what comes before the first layer (preprocessing).
    """
    owners: dict[str, str] = {}
    times: dict[str, float] = {}
    rest = 0.0
    for operation in operations:
        read = (owners.get(name) or layer_of(name, layers) for name in operation.inputs)
        owner = _own_layer(operation, layers) or next(filter(None, read), None)
        if owner is None:
            rest += operation.ms
            continue
        owners[operation.name] = owner
        times[owner] = times.get(owner, 0.0) + operation.ms
    return times, rest


def precisions_of_layers(operations: Sequence[Operation], layers: Collection[str]) -> dict[str, str]:
    """What each layer itself is computed in, whatever the file says; arguments as in `times_of_layers`.

    A layer that runs more than once, not always alike, has all its precisions (`f32+u8`); one that no operation is
    named after is missing.
    """
    found: dict[str, set[str]] = {}
    for operation in operations:
        owner = _own_layer(operation, layers) if operation.kind in _COMPUTING else None
        if owner is not None:
            found.setdefault(owner, set()).add(operation.precision)
    return {name: "+".join(sorted(precisions)) for name, precisions in found.items()}


def _own_layer(operation: Operation, layers: Collection[str]) -> str | None:
    """The layer that an operation was made from, or something fused with it was."""
    # What produces an output of the network is named after it; its weights still tell whose it is.
    weights = (name for name in operation.inputs if name.endswith((".weight", _QUANTIZED)))
    own = (layer_of(name, layers) for name in (*operation.origins, *weights))
    return next(filter(None, own), None)


def layer_of(origin: str, layers: Collection[str]) -> str | None:
    """The layer that torch's exporter named an ONNX operation after, or None.

    A name lists the modules around the operation, children of lists with the list's name before their number
    (`/blocks/blocks.1/conv/Conv`), a module called again with `_1`; OpenVINO adds to it (`.../WithoutBiases`). Weights
    keep the name they have in torch; quantized ones are named by their module and what NNCF calls the quantizer. A
    module around the network may come first.
    """
    if origin.endswith(".weight"):
        name = origin.removesuffix(".weight")
        return next((known for known in (name, name.removeprefix(f"{_WRAPPER}.")) if known in layers), None)
    words = origin.strip("/").split("/")
    if not origin.endswith(_QUANTIZED) and not any(word.partition("_")[0] in _CONVERTED for word in words):
        return None
    path = ""
    for word in words:
        key = word.rpartition(".")[2]
        inside = f"{path}.{key}" if path else key
        again = inside.rpartition("_")
        for name in (inside, again[0] if again[2].isdigit() else inside):
            if name in layers:
                return name
        path = inside
    return layer_of("/".join(words[1:]), layers) if words[0] == _WRAPPER else None
