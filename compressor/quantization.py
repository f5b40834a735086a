"""INT8 quantisation with NNCF: calibration, the quantiser configuration as JSON and back.

Invariant: what `quantize` returns is an ordinary trainable module (QAT is training it), and `load_quantized` with its
configuration and state dict gives a module with equal outputs, without pickle.
"""

import contextlib
import copy
import io
import json
import logging
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any, Literal, cast

from torch import Tensor, nn

from compressor.bias_grid import snap_biases
from compressor.environment import INT8_FEATURES, cpu_flags, prepare_process
from compressor.errors import CompressorError, RecipeError, UnsupportedModelError, did_you_mean
from compressor.fake_quantize import install_kernels
from compressor.modes import evaluating

Preset = Literal["mixed", "performance"]
OverflowFix = Literal["auto", "enable", "disable", "first_layer_only"]
Residual = Literal["int8", "float"]
RangeEstimator = Literal[
    "mean_minmax", "minmax", "median_minmax", "mean_no_outliers_minmax", "mean_quantile", "histogram"
]


class _Wrapped(nn.Module):
    """A plain module around an `nn.Sequential`, whose own `forward` would call NNCF's hook storage as a layer (3.4)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network(x)


def _wrap(module: nn.Module) -> nn.Module:
    return _Wrapped(module) if isinstance(module, nn.Sequential) else module


def unwrapped(module: nn.Module) -> nn.Module:
    """The network under the names of its layers before `quantize`, which puts a module around an `nn.Sequential`."""
    return module.network if isinstance(module, _Wrapped) else module


def quantized_prefix(module: nn.Module) -> str:
    """What stands before the names of a module's layers once it has been quantised."""
    return "network." if isinstance(module, nn.Sequential) else ""


def quantize(
    module: nn.Module,
    batches: Sequence[Tensor],
    *,
    preset: Preset = "mixed",
    ignored_scope: Collection[str] = (),
    residual: Residual = "float",
    per_channel_activations: bool = False,
    overflow_fix: OverflowFix = "auto",
    range_estimator: RangeEstimator = "mean_minmax",
    bias_correction: bool = True,
) -> tuple[nn.Module, dict[str, Any]]:
    """Insert calibrated fake quantisers; the input module is left as it is.

    Activations are quantised per tensor unless asked otherwise: NNCF's default for depthwise convolutions, per channel,
    cannot be written as ONNX that onnxruntime accepts.

    Args:
        module: Network, best after `fold_batchnorm`. An `nn.Sequential` comes back inside a module as `network`.
        batches: Calibration inputs, each (N, C, H, W), normalised as in training.
        preset: `performance` = symmetric activations, `mixed` = asymmetric where they are signed.
        ignored_scope: Globs over module names (those of `module`) that stay in float.
        residual: `float` leaves the terms of additions unquantised; every convolution after them still is. A residual
            stream that is rounded at each addition gathers that noise from all blocks before; and OpenVINO rounds only
            the sum where it fuses an addition with the convolution before it (2026.4), so `int8` is not what runs.
        per_channel_activations: Lift the per-tensor rule; no portable ONNX can be written then.
        overflow_fix: Half the weight range, for CPUs without VNNI; `auto` looks at this machine's.
        range_estimator: How the ends of an activation's range follow from the batches: `mean_minmax`, the mean of their
            extremes; `minmax`, the outermost; `median_minmax`; `mean_no_outliers_minmax`, the mean of all but the
            outermost; `mean_quantile`, the mean of the ends between which all but 2 in 10,000 values of a batch lie;
            `histogram`, the range of least error (not per channel). With `mean_minmax`, ranges per channel are
            `minmax`, as NNCF has it.
        bias_correction: Move the biases of quantised layers so that the mean of each output channel over the batches is
            as in float (arXiv 1906.04721; NNCF's fast form, each layer by itself). Layers without a bias, with a zero
            in it, or whose bias would change more than twofold are left as they are.

    Returns:
        The quantised module in evaluation mode, its biases on their grid (see `snap_biases`), and its configuration for
        `load_quantized` (JSON-able).

    Raises:
        RecipeError: A glob matches no module, or nothing that computes; or no batch is given; or histograms of
            channels are asked for.
    """
    if not batches:
        raise RecipeError("quantize: the calibration subset is empty; subset_size must be at least 1")
    if range_estimator == "histogram" and per_channel_activations:
        raise RecipeError("range_estimator: found 'histogram' beside per_channel_activations, which have none")
    nncf = _load_nncf()
    from nncf.quantization import advanced_parameters as advanced

    names = _ignored_nodes(module, batches[0], ignored_scope)
    if residual == "float":
        names += [name for name in _additions(module, batches[0]) if name not in names]
    network = _wrap(copy.deepcopy(module).eval())
    activations = advanced.QuantizationParameters(per_channel=None if per_channel_activations else False)
    with _quiet_stdout(), _named_failures(module):
        quantized = nncf.quantize(
            network,
            nncf.Dataset(list(batches)),
            preset=nncf.QuantizationPreset(preset),
            subset_size=len(batches),
            ignored_scope=nncf.IgnoredScope(names=names) if names else None,
            advanced_parameters=advanced.AdvancedQuantizationParameters(
                overflow_fix=advanced.OverflowFix(resolve_overflow_fix(overflow_fix)),
                activations_quantization_params=activations,
                activations_range_estimator_params=_range_parameters(range_estimator),
                disable_bias_correction=not bias_correction,
            ),
        )
    config = json.loads(json.dumps(nncf.torch.get_config(quantized)))
    snap_biases(quantized, batches[0])
    return cast(nn.Module, quantized.eval()), cast(dict[str, Any], config)


def _range_parameters(range_estimator: RangeEstimator) -> Any:
    """NNCF's parameters; none for its own default, `mean_minmax`, which it sets per channel to `minmax`."""
    from nncf.quantization.range_estimator import RangeEstimatorParameters, RangeEstimatorParametersSet

    if range_estimator == "mean_minmax":
        return RangeEstimatorParameters()
    return copy.deepcopy(getattr(RangeEstimatorParametersSet, range_estimator.upper()))


def resolve_overflow_fix(choice: OverflowFix) -> str:
    """NNCF's word for `choice`; `auto` = `disable` where INT8 accumulates in 32 bits (VNNI, AMX), else `enable`.

    Without VNNI two u8 x i8 products are added in 16 bits and saturate; NNCF itself never looks at the CPU (3.4).
    """
    if choice != "auto":
        return choice
    return "disable" if cpu_flags() & set(INT8_FEATURES) else "enable"


def load_quantized(module: nn.Module, config: dict[str, Any], example: Tensor) -> nn.Module:
    """Put the quantisers of `config` around `module` (in place), ready for `load_state_dict`.

    Args:
        module: The network as it was when quantised: same structure, BatchNorm folded.
        config: From `quantize`.
        example: Valid input, (N, C, H, W), to check that every quantiser meets an operation.

    Raises:
        UnsupportedModelError: A quantiser belongs to an operation this module does not have. NNCF would leave it
            unused and the network would silently run in float.
    """
    nncf = _load_nncf()
    from nncf.torch.function_hook.hook_storage import decode_hook_name

    wrapped = _wrap(module)
    present = set(_node_names(wrapped, example))
    commands = copy.deepcopy(config.get("compression_state", []))
    for command in commands:
        for hook in command["hook_names_in_model"]:
            node = decode_hook_name(hook)[1]
            if node not in present:
                raise UnsupportedModelError(
                    f"quantizer config: no operation '{node}' in this network{did_you_mean(node, present)}; "
                    "it was saved for another structure"
                )
        # JSON has no tuples, and NNCF compares the shape with one to tell per-tensor from per-channel (3.4).
        shape = command["module_config"].get("scale_shape")
        if shape is not None:
            command["module_config"]["scale_shape"] = tuple(shape)
    return cast(nn.Module, nncf.torch.load_from_config(wrapped, {"compression_state": commands}))


def _ignored_nodes(module: nn.Module, example: Tensor, globs: Collection[str]) -> list[str]:
    """Names of NNCF's graph nodes inside the modules that the globs match."""
    if not globs:
        return []
    modules = [name for name, _ in module.named_modules() if name]
    prefix = quantized_prefix(module)
    nodes = _node_names(_wrap(module), example)
    chosen: list[str] = []
    for index, glob in enumerate(globs):
        matched = [name for name in modules if fnmatchcase(name, glob)]
        if not matched:
            raise RecipeError(f"ignored_scope[{index}]: '{glob}' matches no module{did_you_mean(glob, modules)}")
        scopes = tuple(f"{prefix}{name}.".replace(".", "/") for name in matched)
        inside = [node for node in nodes if node.startswith(scopes)]
        if not inside:
            raise RecipeError(
                f"ignored_scope[{index}]: '{glob}' matches {matched[0]}, which computes nothing "
                "(a folded BatchNorm?); name a convolution, a linear layer or a block"
            )
        chosen += [node for node in inside if node not in chosen]
    return chosen


def _additions(module: nn.Module, example: Tensor) -> list[str]:
    """Names of NNCF's graph nodes that add tensors."""
    _load_nncf()
    from nncf.torch.graph.operator_metatypes import PTAddMetatype

    return [node.node_name for node in _nodes(_wrap(module), example) if node.metatype is PTAddMetatype]


def _node_names(module: nn.Module, example: Tensor) -> list[str]:
    """Operations of NNCF's traced graph, named `module/path/function/call`, and the inputs."""
    return [node.node_name for node in _nodes(module, example)]


def _nodes(module: nn.Module, example: Tensor) -> list[Any]:
    _load_nncf()
    from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph

    with evaluating(module):
        return list(build_nncf_graph(module, example[:1]).get_all_nodes())


def _load_nncf() -> ModuleType:
    """Import NNCF (seconds), quiet on stdout, with our quantisation kernels in the place of its compiled extension."""
    prepare_process()
    logger_class = logging.getLoggerClass()
    import nncf
    import nncf.torch

    logging.setLoggerClass(logger_class)  # nncf 3.4 replaces the class of every later logger in the process
    logger = logging.getLogger("nncf")
    logger.handlers.clear()  # its handler writes to stdout, which belongs to --json
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    install_kernels()
    return cast(ModuleType, nncf)


@contextlib.contextmanager
def _named_failures(module: nn.Module) -> Iterator[None]:
    """NNCF raises whatever its tracing of a foreign network leads to."""
    try:
        yield
    except CompressorError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise UnsupportedModelError(
            f"quantize: NNCF cannot quantize this {type(module).__name__} ({type(error).__name__}: {reason})"
        ) from error


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """NNCF draws progress bars on stdout without a way to switch them off (3.4)."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
