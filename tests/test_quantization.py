"""Laws of folding, quantising, saving and training the quantised network."""

import copy
import importlib.util
import json
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from separable_network import SeparableNetwork, normalised, pictures, trained, varied
from torch import Tensor, nn

import compressor.fake_quantize
from compressor import quantization
from compressor.equalization import equalize_depthwise
from compressor.errors import RecipeError, UnsupportedModelError
from compressor.fake_quantize import (
    AsymmetricQuantize,
    SymmetricQuantize,
    TuneRange,
    fake_quantize,
    fake_quantize_gradients,
)
from compressor.folding import apply_fold, fold_batchnorm
from compressor.models.xception import Xception
from compressor.quantization import load_quantized, quantize, resolve_overflow_fix


def batches(n: int = 2) -> list[Tensor]:
    return [normalised(pictures(8, seed=seed)) for seed in range(n)]


@pytest.mark.parametrize(
    ("network", "size", "count"), [(SeparableNetwork(), 32, 4), (Xception(3), 64, 40)], ids=["separable", "xception"]
)
def test_folded_equals_original(network: nn.Module, size: int, count: int) -> None:
    network = varied(network).double()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        expected = network(x)
        pairs = fold_batchnorm(network, x)
        folded = network(x)
    assert len(pairs) == count
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert (folded - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_fold_by_structure_alone_takes_the_folded_state_dict() -> None:
    network = varied(SeparableNetwork())
    x = batches(1)[0]
    fresh = SeparableNetwork().eval()
    pairs = fold_batchnorm(network, x)
    apply_fold(fresh, pairs)
    fresh.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(fresh(x), network(x))


class Odd(nn.Module):
    """Norms that must stay: on a shared convolution, on an output read twice, on no convolution at all."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(3, 3, 1)
        self.shared_bn = nn.BatchNorm2d(3)
        self.twice = nn.Conv2d(3, 3, 1)
        self.twice_bn = nn.BatchNorm2d(3)
        self.alone_bn = nn.BatchNorm2d(3)
        self.plain = nn.Conv2d(3, 3, 1)
        self.plain_bn = nn.BatchNorm2d(3, affine=False)
        self.stateless = nn.Conv2d(3, 3, 1)
        self.stateless_bn = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared_bn(self.shared(x)) + self.shared(x)
        y = self.twice(x)
        x = self.twice_bn(y) + y
        x = self.alone_bn(torch.relu(x))
        return self.stateless_bn(self.stateless(self.plain_bn(self.plain(x))))


def test_fold_leaves_what_is_not_one_to_one() -> None:
    network = Odd()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    network = network.double().eval()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    expected = network(x)
    assert fold_batchnorm(network, x) == [("plain", "plain_bn")]
    torch.testing.assert_close(network(x), expected)


def test_fold_keeps_training_modes() -> None:
    network = varied(SeparableNetwork())
    network.third.train()
    fold_batchnorm(network, batches(1)[0])
    assert network.third.training
    assert not network.first.training


def test_apply_fold_names_the_nearest_module() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'stem_bm' is nothing, not a BatchNorm; did you mean 'stem_bn'"):
        apply_fold(SeparableNetwork(), [("stem", "stem_bm")])
    with pytest.raises(UnsupportedModelError, match="'stem_bn' is BatchNorm2d, not a convolution"):
        apply_fold(SeparableNetwork(), [("stem_bn", "stem_bn")])


@pytest.fixture(scope="module")
def folded() -> nn.Module:
    network = trained()
    fold_batchnorm(network, batches(1)[0])
    return network


def test_quantize_stays_near_and_leaves_its_input(folded: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    before = copy.deepcopy(folded.state_dict())
    quantized, config = quantize(folded, batches(), overflow_fix="disable")
    x = normalised(pictures(8, seed=9))
    expected = folded(x)
    assert 0 < (quantized(x) - expected).abs().max() < 0.1 * (expected.max() - expected.min())
    assert folded.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in folded.state_dict().items())
    shapes = [command["module_config"]["scale_shape"] for command in config["compression_state"]]
    weights = [command for command in config["compression_state"] if "pre_hooks" in command["hook_names_in_model"][0]]
    assert [1] in shapes
    assert sum(shape != [1] for shape in shapes) <= len(weights)  # activations per tensor
    assert capsys.readouterr().out == ""


def test_quantizer_config_survives_json_and_rebuilds_equal_outputs(folded: nn.Module) -> None:
    quantized, config = quantize(folded, batches())
    rebuilt = load_quantized(copy.deepcopy(folded), json.loads(json.dumps(config)), batches(1)[0])
    rebuilt.load_state_dict(quantized.state_dict(), strict=True)
    x = normalised(pictures(8, seed=9))
    assert torch.equal(rebuilt.eval()(x), quantized(x))
    assert json.loads(json.dumps(config)) == config


def test_config_of_another_structure_is_refused(folded: nn.Module) -> None:
    _, config = quantize(folded, batches(1))
    other = copy.deepcopy(folded)
    other.third = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="no operation 'third/depthwise/conv2d/0' in this network"):
        load_quantized(other, config, batches(1)[0])


def test_quantized_network_trains_and_copies(folded: nn.Module) -> None:
    quantized, _ = quantize(folded, batches())
    trained = copy.deepcopy(quantized).train()
    x, target = normalised(pictures(16, seed=5)), torch.arange(16) % 6
    optimizer = torch.optim.Adam([p for p in trained.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(trained(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    scales = [key for key in trained.state_dict() if key.endswith((".scale", "input_range"))]
    assert scales
    assert any(not torch.equal(trained.state_dict()[key], quantized.state_dict()[key]) for key in scales)


def test_sequential_is_wrapped() -> None:
    chain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    quantized, config = quantize(chain, batches(), ignored_scope=["4"])
    rebuilt = load_quantized(copy.deepcopy(chain), config, batches(1)[0])
    rebuilt.load_state_dict(quantized.state_dict())
    x = batches(1)[0]
    assert torch.equal(rebuilt.eval()(x), quantized(x))
    assert not any("/4/" in name for command in config["compression_state"] for name in command["hook_names_in_model"])


def test_ignored_scope_keeps_modules_in_float(folded: nn.Module) -> None:
    _, config = quantize(folded, batches(1), ignored_scope=["first*", "head"])
    hooked = [name for command in config["compression_state"] for name in command["hook_names_in_model"]]
    assert any("second" in name for name in hooked)
    assert not any(".head/" in name or "pre_hooks.first/" in name for name in hooked)


def test_residual_float_leaves_additions_and_still_rounds_what_convolutions_read(folded: nn.Module) -> None:
    hooked = {}
    for residual in ("int8", "float"):
        _, config = quantize(folded, batches(1), residual=residual)  # type: ignore[arg-type]
        hooked[residual] = {name for command in config["compression_state"] for name in command["hook_names_in_model"]}
    terms = {f"post_hooks.{name}/pointwise/conv2d/0__0.0" for name in ("first", "third")}
    assert terms <= hooked["int8"]
    assert not terms & hooked["float"]
    weights = {kind: {name for name in names if name.endswith("__1.0")} for kind, names in hooked.items()}
    assert weights["float"] == weights["int8"]  # every layer with weights is still quantized


def test_ignored_scope_that_matches_nothing(folded: nn.Module) -> None:
    with pytest.raises(RecipeError, match=r"ignored_scope\[1\]: 'haed' matches no module; did you mean 'head'"):
        quantize(folded, batches(1), ignored_scope=["first", "haed"])
    with pytest.raises(RecipeError, match=r"ignored_scope\[0\]: 'stem_bn' matches stem_bn, which computes nothing"):
        quantize(folded, batches(1), ignored_scope=["stem_bn"])


def test_no_calibration_data_is_an_error(folded: nn.Module) -> None:
    with pytest.raises(RecipeError, match="calibration subset is empty"):
        quantize(folded, [])


def test_overflow_fix_follows_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "cpu_flags", lambda: frozenset({"avx2", "avx_vnni"}))
    assert resolve_overflow_fix("auto") == "disable"
    monkeypatch.setattr(quantization, "cpu_flags", lambda: frozenset({"avx2"}))
    assert resolve_overflow_fix("auto") == "enable"
    assert resolve_overflow_fix("first_layer_only") == "first_layer_only"


def test_nncf_compiles_nothing(folded: nn.Module) -> None:
    quantize(folded, batches(1))
    assert not any("quantized_functions" in name for name in sys.modules)


@pytest.mark.parametrize(
    ("low", "span", "level_low", "level_high"),
    [
        (torch.tensor([-100 / 255 * 2.55]), torch.tensor([2.55]), 0, 255),
        (torch.tensor([0.0]), torch.tensor([1.7]), 0, 255),
        (torch.tensor([-1.5 * 128 / 127]), torch.tensor([1.5 * 255 / 127]), -128, 127),
        (-(torch.arange(8) + 1).reshape(1, 8, 1, 1) / 4.0, (torch.arange(8) + 1).reshape(1, 8, 1, 1) / 2, -127, 127),
    ],
    ids=["asymmetric", "unsigned", "signed", "per-channel"],
)
def test_kernels_equal_nncf_reference(low: Tensor, span: Tensor, level_low: int, level_high: int) -> None:
    from nncf.torch.quantization.reference import ReferenceBackendType, ReferenceQuantize

    reference = ReferenceQuantize(backend_type=ReferenceBackendType.NUMPY)
    levels = level_high - level_low + 1
    x, grad = (torch.randn(4, 8, 6, 6).mul_(2).contiguous(memory_format=torch.channels_last) for _ in range(2))
    arrays = [value.numpy() for value in (x, low, span)]
    out = fake_quantize(x, low, span, levels)
    assert out.is_contiguous(memory_format=torch.channels_last)
    expected = torch.from_numpy(reference.forward(*(a.copy() for a in arrays), levels))
    # Both round to the nearest of the same levels; exact ties may go either way.
    assert ((out - expected).abs() > 1e-5).float().mean() < 0.01
    grads = fake_quantize_gradients(
        grad, x, fake_quantize(x, low, span, levels), low, span, level_low, level_high, levels
    )
    wanted = reference.backward(grad.numpy().copy(), *(a.copy() for a in arrays), levels, level_low, level_high)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, torch.as_tensor(want).reshape(got.shape), rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("ranges", [1, 8], ids=["per-tensor", "per-filter"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kernels_do_not_depend_on_the_pieces(
    ranges: int, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, grad = (torch.randn(8, 5, 3, 7).contiguous(memory_format=layout) for _ in range(2))
    low, span = -torch.rand(ranges, 1, 1, 1) - 0.1, torch.rand(ranges, 1, 1, 1) + 0.5
    rounded = fake_quantize(x, low, span, 256)
    whole = (rounded, *fake_quantize_gradients(grad, x, rounded, low, span, 0, 255, 256))
    monkeypatch.setattr(compressor.fake_quantize, "PIECE", 13)
    rounded = fake_quantize(x, low, span, 256)
    pieces = (rounded, *fake_quantize_gradients(grad, x, rounded, low, span, 0, 255, 256))
    for got, want in zip(pieces, whole, strict=True):
        assert got.stride() == want.stride()
        torch.testing.assert_close(got, want)


def nncf_tune_range() -> type:
    """NNCF's own, from a copy of its module in which nothing is replaced."""
    spec = importlib.util.find_spec("nncf.torch.quantization.quantize_functions")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TuneRange


@given(lows=st.lists(st.floats(-4, 2, width=32), min_size=1, max_size=4), data=st.data())
def test_ranges_are_tuned_as_nncf_tunes_them(lows: list[float], data: st.DataObject) -> None:
    spans = [data.draw(st.floats(0.125, 6, width=32)) for _ in lows]
    low, span = torch.tensor(lows).reshape(-1, 1, 1), torch.tensor(spans).reshape(-1, 1, 1)
    got, wanted = TuneRange.apply(low, span, 256), nncf_tune_range().apply(low, span, 256)
    for mine, its in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-6)


def test_under_autocast_the_result_is_in_the_precision_of_the_layers() -> None:
    """The float32 weights of a layer leave as bf16, their gradient comes back as float32."""
    weight = torch.randn(8, 4, 3, 3).requires_grad_()
    scale = torch.full((8, 1, 1, 1), 1.5).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = SymmetricQuantize.apply(weight, scale, -127, 127, 255)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, SymmetricQuantize.apply(weight, scale, -127, 127, 255).bfloat16())
    out.backward(torch.ones_like(out))
    assert weight.grad.dtype == scale.grad.dtype == torch.float32


def test_values_on_the_ends_of_a_range_are_inside_it() -> None:
    """After a ReLU every other activation lies on the lower end."""
    x = torch.tensor([[-0.1, 0.0, 0.5, 1.0, 1.1]]).requires_grad_()
    for function, ranges, levels in (
        (SymmetricQuantize, (torch.tensor([1.0]),), (0, 255, 256)),
        (AsymmetricQuantize, (torch.tensor([0.0]), torch.tensor([1.0])), (0, 255, 256)),
    ):
        (by_x,) = torch.autograd.grad(function.apply(x, *ranges, *levels).sum(), x)
        assert by_x.tolist() == [[0, 1, 1, 1, 0]]


def test_values_on_the_ends_of_a_row_are_inside_it_and_the_next_beyond_are_not() -> None:
    """A filter's largest weight lies on the end of its range; whether it passes is decided by a quotient."""
    scale = torch.rand(5000, 1).mul_(20).sub_(10).exp_()
    beyond = torch.nextafter(scale, torch.full_like(scale, torch.inf))
    x = torch.cat([scale, -scale, beyond, -beyond], 1).requires_grad_()
    (by_x,) = torch.autograd.grad(SymmetricQuantize.apply(x, scale, -127, 127, 255).sum(), x)
    assert torch.equal(by_x, torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(5000, 4))


def test_kernels_take_tensors_with_gaps() -> None:
    x = torch.randn(4, 6, 5, 5)[:, ::2].requires_grad_()
    out = AsymmetricQuantize.apply(x, torch.tensor([-1.0]), torch.tensor([2.0]), 0, 255, 256)
    assert torch.equal(out, fake_quantize(x.detach().contiguous(), torch.tensor([-1.0]), torch.tensor([2.0]), 256))
    (wanted,) = torch.autograd.grad(out, x, torch.ones(1).expand(out.shape))  # a gradient with strides of zero
    assert torch.equal(wanted, (x.abs() <= 1).float())


@pytest.mark.parametrize("symmetric", [True, False])
def test_half_precision_rounds_activations_only(symmetric: bool) -> None:
    x = torch.randn(4, 8, 6, 6).mul_(2).bfloat16()
    grad = torch.randn(4, 8, 6, 6).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        ranges = [torch.tensor([-1.5]), torch.tensor([2.7])] if not symmetric else [torch.tensor([1.37])]
        inputs = [x.detach().to(dtype), *ranges]
        for value in inputs:
            value.requires_grad_(True)
        quantizer = SymmetricQuantize if symmetric else AsymmetricQuantize
        out = quantizer.apply(*inputs, *((-128, 127, 256) if symmetric else (0, 255, 256)))
        assert out.dtype == dtype
        out.backward(grad.to(dtype))
        results.append([out, *(value.grad for value in inputs)])
    half, full = results
    assert torch.equal(half[0], full[0].bfloat16())
    assert torch.equal(half[1], full[1].bfloat16())
    for got, want in zip(half[2:], full[2:], strict=True):
        assert got.dtype == torch.float32
        # Not closer: the error of rounding is that of the values the next layer got, which are bf16.
        torch.testing.assert_close(got, want, rtol=5e-3, atol=5e-3)


def test_equalising_changes_nothing_in_float_and_narrows_the_spread() -> None:
    network = SeparableNetwork().double()
    x = batches(2)
    x = [batch.double() for batch in x]
    with torch.no_grad():
        for child in network.modules():
            if isinstance(child, torch.nn.Conv2d) and child.groups > 1:
                child.weight.mul_(torch.logspace(-2, 1, child.out_channels, dtype=torch.float64)[:, None, None, None])
    network.eval()
    before = [network(batch) for batch in x]
    spread_before = _spreads(network, x)
    pairs = equalize_depthwise(network, x)
    assert pairs
    for batch, expected in zip(x, before, strict=True):
        assert torch.allclose(network(batch), expected, rtol=1e-9, atol=1e-9)
    after = _spreads(network, x)
    for first, _ in pairs:
        assert after[first] < 0.5 * spread_before[first]


def _spreads(network: torch.nn.Module, x: list[torch.Tensor]) -> dict[str, float]:
    """Largest over smallest channel range of every depthwise convolution's output."""
    found: dict[str, float] = {}

    def observe(name: str, out: torch.Tensor) -> None:
        ranges = out.abs().amax((0, 2, 3))
        found[name] = float(ranges.max() / ranges.min())

    handles = [
        child.register_forward_hook(lambda _m, _i, out, name=name: observe(name, out))
        for name, child in network.named_modules()
        if isinstance(child, torch.nn.Conv2d) and child.groups > 1
    ]
    with torch.no_grad():
        network(torch.cat(x))
    for handle in handles:
        handle.remove()
    return found


class NormAct(nn.BatchNorm2d):
    """In the manner of timm's BatchNormAct2d: a norm that ends in an activation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.LeakyReLU(0.1, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class HiddenAct(nn.BatchNorm2d):
    """A norm that does more than its parts tell."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class SamePad(nn.Conv2d):
    """In the manner of TensorFlow: pads by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Standardised(nn.Conv2d):
    """In the manner of NF-ResNets: the weight that computes is not the one that is stored."""

    def forward(self, x: Tensor) -> Tensor:
        spread, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, (self.weight - mean) / spread, self.bias)


def _settled(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in ((module.running_mean, -1, 1), (module.running_var, 0.5, 2)):
                assert values is not None
                nn.init.uniform_(values, low, high)
            nn.init.uniform_(module.weight, -1, 2)
            nn.init.uniform_(module.bias, -1, 1)
    return network.double().eval()


FOREIGN = {
    "norm and activation": (lambda: (nn.Conv2d(3, 4, 3), NormAct(4)), True),
    "hidden activation": (lambda: (nn.Conv2d(3, 4, 3), HiddenAct(4)), False),
    "own padding": (lambda: (SamePad(3, 4, 2, stride=2), nn.BatchNorm2d(4)), True),
    "standardised": (lambda: (Standardised(3, 4, 3), nn.BatchNorm2d(4)), False),
    "weight norm by hook": (lambda: (nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)), False),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", FOREIGN)
def test_fold_of_foreign_layers_keeps_the_function(kind: str) -> None:
    layers, folds = FOREIGN[kind]
    network, fresh = (_settled(nn.Sequential(*layers(), nn.Conv2d(4, 2, 1))) for _ in range(2))
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        expected = network(x)
        pairs = fold_batchnorm(network, x)
        assert pairs == ([("0", "1")] if folds else [])
        torch.testing.assert_close(network(x), expected)
        apply_fold(fresh, pairs)
        fresh.load_state_dict(network.state_dict(), strict=True)
        torch.testing.assert_close(fresh(x), expected)


class Aliased(nn.Module):
    """One norm under two names, called by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), self.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Peeking(nn.Module):
    """Holds its norm where no module list shows it, so that folding cannot take it out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.called = [self.norm]

    def forward(self, x: Tensor) -> Tensor:
        return self.called[0](self.conv(x))


def test_fold_takes_out_a_norm_under_all_its_names() -> None:
    network, x = _settled(Aliased()), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        expected = network(x)
        assert len(fold_batchnorm(network, x)) == 1
        torch.testing.assert_close(network(x), expected)


def test_fold_that_would_change_the_network_is_undone_and_refused() -> None:
    network, x = _settled(Peeking()), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        expected = network(x)
        with pytest.raises(UnsupportedModelError, match="folding BatchNorm changes what 'norm' computes"):
            fold_batchnorm(network, x)
        assert torch.equal(network(x), expected)
    assert isinstance(network.norm, nn.BatchNorm2d)
    assert {key: value.tolist() for key, value in network.state_dict().items()} == {
        key: value.tolist() for key, value in before.items()
    }


def test_a_depthwise_convolution_that_computes_its_weights_is_not_equalised() -> None:
    class Depthwise(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(8, 8, 3, groups=8)

        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)

    network = nn.Sequential(nn.Conv2d(3, 8, 1), Depthwise(), nn.Conv2d(8, 4, 1))
    assert equalize_depthwise(network, [torch.randn(1, 3, 9, 9)]) == []


def test_what_nncf_cannot_quantize_is_refused_by_name() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            if x.requires_grad or not hasattr(self, "seen"):
                self.seen = True
                return self.conv(x)
            raise ValueError("once is enough")

    with pytest.raises(UnsupportedModelError, match="NNCF cannot quantize this Odd"):
        quantize(Odd().eval(), [torch.randn(1, 3, 9, 9)])


class AddsInPlace(nn.Module):
    """As ResNets do: `x += shortcut`, then a ReLU in place, on what a quantizer gave."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.conv(x)
        y += x
        return self.head(y.relu_().mean((2, 3)))


@pytest.mark.parametrize("preset", ["mixed", "performance"])
def test_qat_of_networks_that_add_in_place(preset: quantization.Preset) -> None:
    batches = [torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    quantized, _ = quantize(AddsInPlace().eval(), batches, preset=preset)
    quantized.train()(torch.cat(batches)).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in quantized.parameters() if p.requires_grad)


def test_gradients_are_the_same_whether_or_not_the_output_is_changed_in_place() -> None:
    x = torch.randn(2, 4, 5, 5)
    gradients = []
    for in_place in (True, False):
        leaves = [
            x.clone().requires_grad_(),
            torch.tensor([-1.0], requires_grad=True),
            torch.tensor([3.0], requires_grad=True),
        ]
        y = AsymmetricQuantize.apply(*leaves, 0, 255, 256)
        y = y.mul_(2) if in_place else y * 2
        y.square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for changed, plain in zip(*gradients, strict=True):
        assert torch.equal(changed, plain)
