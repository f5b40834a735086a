"""Xception is the paper's network under timm's names; model names resolve in a fixed table; timm stays optional."""

import hashlib
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import MissingDependencyError, RecipeError
from compressor.models import BUILTIN, build, heads, zoo
from compressor.models.counting import count
from compressor.models.weights import load_into, read_tensors
from compressor.models.xception import Block, Xception

# Logits, names and shapes of timm's legacy_xception for `filled` weights and the `picture` below, from timm itself.
GOLDEN = json.loads((Path(__file__).parent / "golden_xception.json").read_text())
CLASSES = 7


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return Xception(CLASSES).eval()


def filled(network: nn.Module) -> nn.Module:
    """Give every tensor values that depend on its place and shape alone, at a scale that keeps signals alive."""
    with torch.no_grad():
        for number, (name, value) in enumerate(network.state_dict().items()):
            if not value.is_floating_point():
                continue
            wave = torch.sin(torch.arange(value.numel(), dtype=torch.float64) * 0.7311 + number)
            if value.dim() > 1:
                wave *= (3.0 / value[0].numel()) ** 0.5
            elif name.endswith(("running_var", "weight")):
                wave = 1.0 + 0.3 * wave
            else:
                wave *= 0.1
            value.copy_(wave.reshape(value.shape))
    return network.eval()


def picture(size: int) -> Tensor:
    """A colour pattern, (1, 3, size, size)."""
    return torch.sin(torch.arange(3 * size * size, dtype=torch.float64) ** 1.2 * 0.01).reshape(1, 3, size, size).float()


def signature(network: nn.Module) -> str:
    lines = (f"{name} {tuple(value.shape)}\n" for name, value in network.state_dict().items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@torch.no_grad()
def logits(network: nn.Module, size: int) -> Tensor:
    return network(picture(size))


def test_any_size_gives_one_row_of_logits_per_image(network: nn.Module) -> None:
    for height, width in ((33, 33), (64, 96)):
        with torch.no_grad():
            assert network(torch.zeros(2, 3, height, width)).shape == (2, CLASSES)


def test_parameters_are_the_papers() -> None:
    # Table 3 of arXiv 1610.02357: 22,855,952 for 1000 classes; a classifier row is 2048 weights and a bias.
    at_1000 = count(Xception(), torch.zeros(1, 3, 33, 33)).params
    assert at_1000 == 22_855_952
    assert count(Xception(CLASSES), torch.zeros(1, 3, 33, 33)).params == at_1000 - (1000 - CLASSES) * 2049 == 20_821_295


def test_macs_at_the_papers_size_are_the_known_ones() -> None:
    # timm's tables of results list 8.40 GMACs for legacy_xception at 299 x 299 pixels.
    assert count(Xception(), torch.zeros(1, 3, 299, 299)).macs / 1e9 == pytest.approx(8.4, rel=0.01)


def test_names_and_shapes_are_timms(network: nn.Module) -> None:
    names = list(network.state_dict())
    assert len([name for name in names if not name.startswith("fc.")]) == GOLDEN["tensors_without_fc"] == 274
    assert signature(network) == GOLDEN["signature"]


@pytest.mark.parametrize("size", [64, 97])
def test_logits_are_timms_golden_ones(network: nn.Module, size: int) -> None:
    expected = torch.tensor(GOLDEN["logits"][str(size)])
    assert expected.std() > 0.05  # figures that would not tell one network from another prove nothing
    scale = float(expected.max() - expected.min())
    torch.testing.assert_close(logits(filled(Xception(CLASSES)), size), expected, rtol=0, atol=1e-4 * scale)


def test_the_skip_of_a_block_reads_what_the_block_read() -> None:
    # An in-place first ReLU would change the input under the identity skip.
    block = Block(8, 8, 3).eval()
    x = torch.randn(1, 8, 5, 5)
    before = x.clone()
    with torch.no_grad():
        assert torch.equal(block(x), block.rep(before.clone()) + before)
    assert torch.equal(x, before)


def test_every_model_has_a_head_that_is_found() -> None:
    for name in BUILTIN:
        network = build("builtin", name, {}, 3)
        assert heads.find_head(heads.look(network, torch.zeros(1, 3, 33, 33)), 3) == "fc"


@pytest.mark.parametrize(
    ("source", "name", "args", "text"),
    [
        ("hub", "xception", {}, r"model\.source: 'hub' is not known; allowed: builtin, timm, torchvision, plugin"),
        ("builtin", "xcepton", {}, r"model\.name: 'xcepton' is not .*allowed: xception; did you mean 'xception'\?"),
        ("builtin", "os.system", {}, r"model\.name: 'os\.system' is not a built-in model; allowed: xception$"),
        ("builtin", "xception", {"depth": 3}, r"model\.args: found depth, allowed no argument for xception"),
        (
            "builtin",
            "xception",
            {"num_classes": 3},
            r"model\.args: found num_classes, allowed no argument for xception",
        ),
    ],
)
def test_what_is_not_known_is_named(source: str, name: str, args: dict[str, object], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        build(source, name, args, 2)


@pytest.mark.slow
def test_real_weights_fit_but_for_the_classifier(shared: Path) -> None:
    file = shared / "weights" / "xception_imagenet_notop.fp16.safetensors"
    network = Xception(CLASSES)
    report = load_into(network, read_tensors(file), head="fc", source=str(file), sha256=None)
    assert (report.missing, report.unexpected, report.reinitialised) == (("fc.weight", "fc.bias"), (), ())
    assert (report.loaded, report.head_loaded) == (274, False)
    assert all(bool(torch.isfinite(value).all()) for value in network.state_dict().values())


@pytest.mark.zoo
@pytest.mark.parametrize("size", [64, 97])
def test_outputs_equal_timms_for_equal_weights(size: int) -> None:
    timm, _ = zoo.import_timm()
    theirs = filled(timm.create_model("legacy_xception", num_classes=CLASSES))
    ours = Xception(CLASSES).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert signature(theirs) == signature(ours) == GOLDEN["signature"]
    torch.testing.assert_close(logits(ours, size), logits(theirs, size), rtol=0, atol=1e-6)


@pytest.fixture
def fake_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of stand-ins for timm and torchvision that comes before the real ones."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in _ZOO}
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(zoo, "_defined", [])
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in _ZOO]:
        del sys.modules[name]
    sys.modules.update(hidden)


_ZOO = ("timm", "torchvision")


def write_package(folder: Path, name: str, code: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)


def test_a_torchvision_that_works_is_left_alone(fake_packages: Path) -> None:
    write_package(fake_packages, "torchvision", "")
    write_package(fake_packages, "timm", "__version__ = 'x'\n")
    timm, note = zoo.import_timm()
    assert (timm.__version__, note) == ("x", None)


def test_operators_are_defined_where_torchvision_misses_them(
    fake_packages: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library = types.SimpleNamespace(defined=[])
    library.define = library.defined.append
    asked = []
    monkeypatch.setattr(torch.library, "Library", lambda name, kind: asked.append((name, kind)) or library)
    monkeypatch.setattr(zoo, "_seen", library.defined, raising=False)
    code = (
        "from compressor.models import zoo\nfrom torchvision import ops\n"
        "if not zoo._seen: raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    write_package(fake_packages, "torchvision", code)
    (fake_packages / "torchvision" / "ops.py").write_text("")
    write_package(fake_packages, "timm", "")
    _, note = zoo.import_timm()
    assert asked == [("torchvision", "DEF")]
    assert [text.partition("(")[0] for text in library.defined] == ["nms", "qnms"]
    assert note is not None
    assert "nms and qnms" in note
    assert "torchvision" in caplog.text
    assert zoo.import_timm()[1] == note  # said in every report, not only the first of a process


def test_another_failure_of_torchvision_is_not_hidden(fake_packages: Path) -> None:
    write_package(fake_packages, "torchvision", "raise RuntimeError('undefined symbol: x')\n")
    with pytest.raises(MissingDependencyError, match=r"torchvision does not fit torch .*undefined symbol: x"):
        zoo.import_timm()


@pytest.mark.parametrize("absent", ["torchvision", "timm"])
def test_absent_packages_are_named_with_the_extra_that_brings_them(
    fake_packages: Path, monkeypatch: pytest.MonkeyPatch, absent: str
) -> None:
    write_package(fake_packages, "torchvision", "")
    write_package(fake_packages, "timm", "")
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(MissingDependencyError, match=rf"'{absent}', which is not installed; .*compressor\[zoo\]"):
        zoo.import_timm()
