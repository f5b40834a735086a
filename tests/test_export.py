"""Published files: their inputs and outputs, their metadata, int8 storage, and atomic writing."""

import copy
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import pytest
import torch
from separable_network import LABELS, SPEC, SeparableNetwork, normalised, pictures, trained
from torch import nn

from compressor import export
from compressor.environment import INT8_FEATURES, cpu_flags
from compressor.errors import ResourceError, UnsupportedModelError
from compressor.export import (
    Published,
    check_exportable,
    convert_float_ir,
    model_info,
    publish_float,
    publish_int8,
    save_ir,
    save_onnx,
    trace_int8,
)
from compressor.folding import fold_batchnorm
from compressor.onnx_pooling import pooling_matrix
from compressor.openvino_core import core
from compressor.parity import check_int8, ir_logits, onnx_logits, torch_logits
from compressor.preprocess import InputSpec
from compressor.quantization import quantize
from compressor.runtime import F32


@dataclass(frozen=True)
class Case:
    float_network: nn.Module
    quantized: nn.Module
    float_files: Published
    int8_files: Published


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("published")
    network = trained(channels=32)
    float_files = publish_float(network, SPEC, LABELS, folder / "result_fp32")
    folded = copy.deepcopy(network)
    fold_batchnorm(folded, normalised(pictures(1)))
    quantized, _ = quantize(folded, [normalised(pictures(16, seed=1))])
    return Case(network, quantized, float_files, publish_int8(quantized, SPEC, LABELS, folder / "result_int8"))


def test_onnx_takes_pixels_in_any_batch(case: Case) -> None:
    for path in (case.float_files.onnx, case.int8_files.onnx):
        assert path is not None
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        assert model.opset_import[0].version >= 17
        (image,), (logits,) = model.graph.input, model.graph.output
        assert (image.name, logits.name) == ("image", "logits")
        dims = image.type.tensor_type.shape.dim
        assert dims[0].dim_param
        assert [dim.dim_value for dim in dims[1:]] == [3, 32, 32]
        images = pictures(7)
        together = onnx_logits(path, images)
        single = np.concatenate([onnx_logits(path, images[i : i + 1]) for i in range(7)])
        np.testing.assert_allclose(together, single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("opset", [17, 20])
def test_the_operator_set_is_the_one_asked_for(case: Case, opset: int, tmp_path: Path) -> None:
    images = pictures(4)
    for name, published in (
        ("float", publish_float(case.float_network, SPEC, LABELS, tmp_path / "float", opset=opset)),
        ("int8", publish_int8(case.quantized, SPEC, LABELS, tmp_path / "int8", opset=opset)),
    ):
        assert published.onnx is not None
        assert {entry.domain: entry.version for entry in onnx.load(published.onnx).opset_import}[""] == opset
        expected = onnx_logits(case.float_files.onnx if name == "float" else case.int8_files.onnx, images)  # type: ignore[arg-type]
        np.testing.assert_allclose(onnx_logits(published.onnx, images), expected, rtol=1e-4, atol=1e-4)


def test_int8_onnx_stores_int8_and_no_batchnorm(case: Case) -> None:
    assert case.int8_files.onnx is not None
    model = onnx.load(case.int8_files.onnx)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["BatchNormalization"] == 0
    assert kinds["Conv"] == 7
    stored = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 4 and tensor.dims[0] > 1]
    assert len(stored) == 7
    assert all(tensor.data_type == onnx.TensorProto.INT8 for tensor in stored)
    constants = {tensor.name for tensor in model.graph.initializer}
    assert not any(node.op_type == "QuantizeLinear" and node.input[0] in constants for node in model.graph.node)
    # Every weight and every quantised activation is read through a DequantizeLinear.
    assert kinds["DequantizeLinear"] == kinds["QuantizeLinear"] + 8


def test_stored_weights_give_the_same_logits_as_quantizing_at_load(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(8)
    monkeypatch.setattr(export, "_store_weights_as_int8", lambda network: None)
    plain = publish_int8(case.quantized, SPEC, LABELS, tmp_path / "plain").onnx
    assert plain is not None
    assert case.int8_files.onnx is not None
    assert plain.stat().st_size > 2 * case.int8_files.onnx.stat().st_size
    assert np.array_equal(onnx_logits(plain, images), onnx_logits(case.int8_files.onnx, images))


def test_ir_takes_images_of_any_size(case: Case) -> None:
    for path in (case.float_files.xml, case.int8_files.xml):
        model = core().read_model(path)
        (image,), (logits,) = model.inputs, model.outputs
        assert image.get_any_name() == "image"
        assert logits.get_any_name() == "logits"
        assert image.get_element_type() == ov.Type.u8
        assert str(image.get_partial_shape()) == "[1,?,?,3]"
        assert list(logits.get_shape()) == [1, len(LABELS)]
        assert ir_logits(path, pictures(2, size=57)).shape == (2, len(LABELS))


def test_files_hold_no_precision_they_should_not(case: Case) -> None:
    network, kept = core().read_model(case.float_files.xml), core().read_model(case.int8_files.xml)
    weights = [op for op in network.get_ops() if op.get_type_name() == "Constant" and len(op.get_output_shape(0)) >= 4]
    assert all(op.get_output_element_type(0) == ov.Type.f32 for op in weights if np.prod(op.get_output_shape(0)) > 64)
    large = [op for op in kept.get_ops() if op.get_type_name() == "Constant" and np.prod(op.get_output_shape(0)) > 256]
    assert large
    assert all(op.get_output_element_type(0) == ov.Type.i8 for op in large)
    assert case.int8_files.bin.stat().st_size < 0.4 * case.float_files.bin.stat().st_size


def test_parameters_of_the_network_survive_export(case: Case) -> None:
    before = torch_logits(case.quantized, pictures(4), SPEC)
    trace_int8(case.quantized, SPEC)
    assert np.array_equal(torch_logits(case.quantized, pictures(4), SPEC), before)
    case.quantized(normalised(pictures(2))).sum().backward()


def test_metadata_for_model_api(case: Case) -> None:
    model = core().read_model(case.int8_files.xml)
    info = {key: model.get_rt_info(["model_info", key]).astype(str) for key in model_info(SPEC, LABELS, embedded=True)}
    assert info == {
        "model_type": "Classification",
        "task_type": "classification",
        "labels": "sea_horse crab lobster crayfish octopus starfish",
        "resize_type": "standard",
        "interpolation_mode": "LINEAR",
        "reverse_input_channels": "NO",
        "embedded_processing": "YES",
        "orig_height": "32",
        "orig_width": "32",
    }
    assert case.float_files.onnx is not None
    props = {prop.key: prop.value for prop in onnx.load(case.float_files.onnx).metadata_props}
    assert props["model_info labels"] == info["labels"]
    assert "model_info embedded_processing" not in props
    cropped = model_info(InputSpec(32, 32, resize="pillow_bicubic", fit="center_crop"), LABELS, embedded=True)
    assert (cropped["resize_type"], cropped["interpolation_mode"]) == ("crop", "CUBIC")


def test_model_api_names_the_same_class(case: Case) -> None:
    models = pytest.importorskip("model_api.models", reason="openvino-model-api is not installed")
    for path in (case.float_files.xml, case.int8_files.xml):
        wrapped = models.Model.create_model(str(path))
        for size in (32, 75):
            images = pictures(8, size=size, seed=3)
            expected = ir_logits(path, images).argmax(1)
            named = [wrapped(image).top_labels[0].name for image in images]
            assert named == [LABELS[index].replace(" ", "_") for index in expected]


def test_wrong_number_of_labels_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="6 outputs and there are 5 labels"):
        convert_float_ir(SeparableNetwork(), SPEC, LABELS[:5])


def test_a_batchnorm_that_cannot_be_folded_runs_in_float(tmp_path: Path) -> None:
    class NormLast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.bn(torch.relu(self.conv(x)))).mean((2, 3)))

    network = NormLast().eval()
    assert fold_batchnorm(network, normalised(pictures(1))) == []  # a ReLU lies between
    quantized, _ = quantize(network, [normalised(pictures(4))])
    published = publish_int8(quantized, SPEC, [f"c{i}" for i in range(6)], tmp_path / "int8")
    parity = check_int8(quantized, published.onnx, published.xml, pictures(16), SPEC)  # bf16 rounds on its own
    differences = [
        pair.difference for key, pair in parity.pairs.items() if "default" not in key
    ]  # bf16 has its own error
    assert max(value for value in differences if value is not None) < 0.05  # of the logits' range


class Fire(nn.Module):
    """Two convolutions read one tensor and are concatenated: NNCF gives both outputs one quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.last, self.head = nn.Conv2d(16, 8, 1), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.cat([torch.relu(self.a(x)), torch.relu(self.b(x))], 1)
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


def test_a_quantizer_shared_by_the_parts_of_a_concatenation_is_written_everywhere(tmp_path: Path) -> None:
    quantized, _ = quantize(Fire().eval(), [normalised(pictures(4))])
    hooks = [id(m) for n, m in quantized.named_modules(remove_duplicate=False) if n.endswith(".0") and "__nncf" in n]
    assert len(set(hooks)) < len(hooks)  # otherwise this tests nothing
    before = {name: id(layer) for name, layer in quantized.named_modules(remove_duplicate=False)}
    network = trace_int8(quantized, SPEC)
    assert {node.domain for node in network.graph.node} <= {""}
    assert before == {name: id(layer) for name, layer in quantized.named_modules(remove_duplicate=False)}
    published = publish_int8(quantized, SPEC, [f"c{i}" for i in range(6)], tmp_path / "int8")
    parity = check_int8(quantized, published.onnx, published.xml, pictures(16), SPEC)  # bf16 rounds on its own
    differences = [
        pair.difference for key, pair in parity.pairs.items() if "default" not in key
    ]  # bf16 has its own error
    assert max(value for value in differences if value is not None) < 0.05  # of the logits' range


def test_what_cannot_be_exported_is_refused_by_name() -> None:
    class Unwritable(Fire):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.special.i0(x))

    class Random(Fire):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.rand(1)

    check_exportable(Fire().eval(), SPEC)
    with pytest.raises(UnsupportedModelError, match="Unwritable: the ONNX exporter cannot write it"):
        check_exportable(Unwritable().eval(), SPEC)
    with pytest.raises(UnsupportedModelError, match=r"Random: .*a network must compute by its input alone"):
        check_exportable(Random().eval(), SPEC)


@pytest.mark.parametrize(
    "overflow_fix",
    [
        "enable",
        pytest.param(
            "first_layer_only",
            marks=pytest.mark.skipif(
                not cpu_flags() & set(INT8_FEATURES),
                reason="without VNNI full-range weights saturate, which is what overflow_fix: auto is for",
            ),
        ),
    ],
)
def test_half_range_weights_export_too(case: Case, tmp_path: Path, overflow_fix: str) -> None:
    network = copy.deepcopy(case.float_network)
    fold_batchnorm(network, normalised(pictures(1)))
    quantized, _ = quantize(network, [normalised(pictures(8))], overflow_fix=overflow_fix, preset="performance")
    files = publish_int8(quantized, SPEC, LABELS, tmp_path / "half")
    assert files.onnx is not None
    images = pictures(16, seed=4)
    logits = torch_logits(quantized, images, SPEC)
    for other in (onnx_logits(files.onnx, images), ir_logits(files.xml, images, F32)):
        assert np.abs(other - logits).max() < 0.05 * np.ptp(logits)


def test_per_channel_activations_give_an_ir_but_no_onnx(case: Case, tmp_path: Path) -> None:
    network = copy.deepcopy(case.float_network)
    fold_batchnorm(network, normalised(pictures(1)))
    quantized, _ = quantize(network, [normalised(pictures(8))], per_channel_activations=True)
    files = publish_int8(quantized, SPEC, LABELS, tmp_path / "channelwise")
    assert files.onnx is None
    images = pictures(16, seed=4)
    logits = torch_logits(quantized, images, SPEC)
    assert np.abs(ir_logits(files.xml, images, F32) - logits).max() < 0.05 * np.ptp(logits)
    with pytest.raises(UnsupportedModelError, match="per_channel_activations: false"):
        save_onnx(trace_int8(quantized, SPEC), SPEC, tmp_path / "refused.onnx", LABELS)
    assert not (tmp_path / "refused.onnx").exists()


def test_center_crop_is_inside_the_ir(case: Case, tmp_path: Path) -> None:
    spec = InputSpec(32, 32, fit="center_crop")
    xml = tmp_path / "crop.xml"
    save_ir(convert_float_ir(case.float_network, spec, LABELS), xml)
    wide = np.zeros((1, 32, 64, 3), np.uint8)
    square = pictures(1)
    wide[:, :, 16:48] = square
    np.testing.assert_allclose(ir_logits(xml, wide, F32), ir_logits(xml, square, F32), rtol=1e-5, atol=1e-5)


def test_failed_write_leaves_nothing(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = core().read_model(case.float_files.xml)

    def full(_model: object, path: Path, compress_to_fp16: bool) -> None:
        assert not compress_to_fp16
        path.with_suffix(".bin").write_bytes(b"half")
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(export.ov, "save_model", full)
    with pytest.raises(ResourceError, match=r"result\.xml: OpenVINO could not write it .* is the disk full\?"):
        save_ir(model, tmp_path / "result.xml")
    assert list(tmp_path.iterdir()) == []


def test_files_carry_no_path_of_this_machine(case: Case, tmp_path: Path) -> None:
    here = str(Path(__file__).resolve().parent.parent).encode()
    assert tmp_path.parent in case.float_files.xml.parents
    for path in (case.float_files.onnx, case.float_files.xml, case.int8_files.onnx, case.int8_files.xml):
        assert path is not None
        content = path.read_bytes()
        assert here not in content
        assert str(tmp_path.parent).encode() not in content


def test_adaptive_pooling_to_sizes_that_do_not_divide_is_written(tmp_path: Path) -> None:
    """VGG and AlexNet pool to 7x7 and 6x6, whatever the image's size; the exporter writes that for some sizes only."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.pool, self.head = nn.Conv2d(3, 8, 3, 4), nn.AdaptiveAvgPool2d((7, 5)), nn.Linear(280, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.pool(self.stem(x))).flatten(1))

    network = Pooled().eval()
    check_exportable(network, SPEC)
    quantized, _ = quantize(network, [normalised(pictures(4))])
    published = publish_int8(quantized, SPEC, [f"c{i}" for i in range(6)], tmp_path / "int8")
    pairs = check_int8(quantized, published.onnx, published.xml, pictures(16), SPEC).pairs
    assert max(pair.difference or 0 for key, pair in pairs.items() if "default" not in key) < 0.05


@pytest.mark.parametrize(("length", "wanted"), [(4, 7), (9, 5), (7, 7), (8, 4), (1, 3)])
def test_pooling_matrices_are_torchs_windows(length: int, wanted: int) -> None:
    x = torch.randn(1, 1, length)
    expected = nn.functional.adaptive_avg_pool1d(x, wanted)
    torch.testing.assert_close(x @ torch.from_numpy(pooling_matrix(length, wanted)).T, expected)
