"""Which backbones the zoo table has, and how random weights are made sane.

Invariant: a settled network is alive: every branch contributes, BatchNorm's statistics fit its inputs, and logits have
unit variance over inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor.models import build
from compressor.preprocess import InputSpec

CLASSES = 10
_NORMS = nn.modules.batchnorm._BatchNorm

# Family -> names, small members where there are any.
_TIMM = {
    "VGG": "vgg11 vgg11_bn vgg13_bn",
    "ResNet": "resnet14t resnet18 resnet26d resnet33ts resnet50 resnetblur18",
    "ResNetV2": "resnetv2_18 resnetv2_50 resnetv2_50x1_bit",
    "ResNeXt": "resnext26ts resnext50_32x4d",
    "RegNet": "regnetx_002 regnetx_004 regnety_002 regnety_004 regnetz_b16",
    "DenseNet": "densenet121 densenetblur121d",
    "Inception": "inception_v3 inception_v4 inception_resnet_v2",
    "Xception": "legacy_xception xception41 xception41p xception65 xception71",
    "MobileNetV1": "mobilenetv1_100",
    "MobileNetV2": "mobilenetv2_050 mobilenetv2_100",
    "MobileNetV3": "mobilenetv3_small_100 mobilenetv3_large_100 tf_mobilenetv3_small_minimal_100",
    "MobileNetV4": "mobilenetv4_conv_small mobilenetv4_conv_medium",
    "MNASNet": "mnasnet_100 semnasnet_100 spnasnet_100",
    "EfficientNet": "efficientnet_b0 tf_efficientnet_b0 efficientnet_es",
    "EfficientNetV2": "tf_efficientnetv2_b0 efficientnetv2_rw_t",
    "EfficientNet-Lite": "tf_efficientnet_lite0 efficientnet_lite1",
    "GhostNet": "ghostnet_100 ghostnetv2_100",
    "RepGhost": "repghostnet_100",
    "FBNet": "fbnetc_100 fbnetv3_b",
    "HardCoreNAS": "hardcorenas_a",
    "TinyNet": "tinynet_c tinynet_e",
    "LCNet": "lcnet_050 lcnet_100",
    "MixNet": "mixnet_s",
    "ReXNet": "rexnet_100",
    "DLA": "dla34 dla46_c dla60x_c",
    "CSPNet": "cspresnet50 cspdarknet53",
    "DarkNet": "darknet17 darknet53",
    "HRNet": "hrnet_w18_small",
    "RepVGG": "repvgg_a0",
    "MobileOne": "mobileone_s0",
    "NFNet": "nf_resnet26 nf_regnet_b0 eca_nfnet_l0",
    "ConvNeXt": "convnext_atto convnextv2_atto",
    "Res2Net": "res2net50_14w_8s",
    "ResNeSt": "resnest14d",
    "SKNet": "skresnet18",
    "SENet": "legacy_seresnet18 seresnet18",
    "DPN": "dpn48b dpn68",
    "VoVNet": "ese_vovnet19b_dw ese_vovnet39b",
    "SelecSLS": "selecsls42b",
    "GCResNet": "gcresnet33ts",
    "ECAResNet": "ecaresnet26t",
    "EdgeNeXt": "edgenext_xx_small",
    "InceptionNeXt": "inception_next_atto",
    "StarNet": "starnet_s1",
    "FasterNet": "fasternet_t0",
    "HGNet": "hgnet_tiny hgnetv2_b0",
    "TResNet": "tresnet_m",
    "GERNet": "gernet_s",
}
_TORCHVISION = {
    "AlexNet": "alexnet",
    "VGG": "vgg11 vgg11_bn",
    "ResNet": "resnet18 resnet34 resnet50 wide_resnet50_2",
    "ResNeXt": "resnext50_32x4d",
    "RegNet": "regnet_x_400mf regnet_y_400mf",
    "DenseNet": "densenet121",
    "Inception": "googlenet inception_v3",
    "MobileNetV2": "mobilenet_v2",
    "MobileNetV3": "mobilenet_v3_small mobilenet_v3_large",
    "MNASNet": "mnasnet0_5 mnasnet1_0",
    "EfficientNet": "efficientnet_b0",
    "EfficientNetV2": "efficientnet_v2_s",
    "ShuffleNetV2": "shufflenet_v2_x0_5 shufflenet_v2_x1_0",
    "SqueezeNet": "squeezenet1_0 squeezenet1_1",
    "ConvNeXt": "convnext_tiny",
}
# Without auxiliary classifiers, which only train; and drawn by the network itself, without a warning about it.
_ARGS = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}
_GLOBAL = {"resnet18", "mobilenetv2_100", "densenet121", "regnetx_004", "cspresnet50", "vgg11_bn"}


_DIRECTIONS = 2  # of the features that the logits are mixed from


@dataclass(frozen=True)
class Row:
    """A backbone of the table; `ranking` is how its channels are ranked."""

    source: str
    name: str
    family: str
    ranking: str = "local"
    args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.source}/{self.name}"


def _rows(source: str, families: Mapping[str, str]) -> list[Row]:
    return [
        Row(
            source,
            name,
            family,
            "global" if name in _GLOBAL else "local",
            _ARGS.get(name, {}) if source == "torchvision" else {},
        )
        for family, names in families.items()
        for name in names.split()
    ]


ROWS = (*_rows("timm", _TIMM), *_rows("torchvision", _TORCHVISION))


def build_network(row: Row) -> nn.Module:
    """The architecture with weights of its own drawing, every branch alive, in evaluation mode."""
    module = build(row.source, row.name, row.args, CLASSES)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.named_parameters():
            # Branches that start switched off: zero scales of their last BatchNorm, small layer scales, zero weights.
            if not name.endswith("bias") and float(value.abs().max()) < 1e-3:
                if isinstance(module.get_submodule(name.rpartition(".")[0]), nn.Conv2d | nn.Linear):
                    value.copy_(torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5)
                else:
                    value.fill_(1.0)
        # Filters with a constant part, as trained ones have. Without it little of what tells images apart survives the
        # edges and the rounding of many layers.
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d) and layer.weight[0, 0].numel() > 1:
                constant = torch.randn(*layer.weight.shape[:2], 1, 1, generator=generator)
                layer.weight.add_(layer.weight.std() * constant).mul_(0.5**0.5)
        # Shifts that leave most of each activation's input on one side, as training does: with none a deep random
        # network amplifies every rounding, and no two runtimes agree about it.
        for layer in module.modules():
            if isinstance(layer, _NORMS) and layer.weight is not None:
                layer.weight.copy_(0.8 + 0.1 * torch.rand(layer.weight.shape, generator=generator))
                layer.bias.copy_(1.2 + 0.1 * torch.rand(layer.bias.shape, generator=generator))
    return module.eval()


def photos(count: int, size: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth random images (count, size, size, 3): blobs of a few scales on a colour each, and a little noise.

    Images differ in colour and contrast, as photos do: what random networks make of texture alone hardly differs.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, 3, size, size)
    for cells in (2, 4, 8, 16):
        coarse = torch.randn(count, 3, cells, cells, generator=generator)
        total += nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False) / cells**0.5
    contrast = torch.rand(count, 1, 1, 1, generator=generator)
    colour = 255 * torch.rand(count, 3, 1, 1, generator=generator)
    levels = colour + 30 * contrast * total + 4 * torch.randn(total.shape, generator=generator)
    return np.ascontiguousarray(levels.clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())


def to_planes(images: NDArray[np.uint8], spec: InputSpec) -> Tensor:
    """What the network takes, (N, 3, H, W)."""
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (spec.mean, spec.std))
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()  # other layouts round differently
    return (planes.float() / 255 - mean) / std


def settle(module: nn.Module, x: Tensor) -> None:
    """Fit BatchNorm's statistics to `x` (N, 3, H, W), and the classifier for logits of unit variance, in place."""
    norms = [layer for layer in module.modules() if isinstance(layer, _NORMS) and layer.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the passes below
        norm.train()
    with torch.no_grad():
        for part in x.split(max(len(x) // 2, 1)):
            module(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    module.eval()
    _scale_logits(module, x)


def _scale_logits(module: nn.Module, x: Tensor) -> None:
    """Fit the layer that makes the logits, the last one of `CLASSES` outputs, for logits of unit variance over inputs.

    A linear head reads the directions in which the features differ most, as a trained one would. Random directions hold
    next to none of what tells inputs apart, and the rounding of every layer.
    """
    heads: list[tuple[nn.Module, Tensor, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, out: heads.append((layer, inputs[0], out)))
        for layer in module.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.shape[0] == CLASSES
    ]
    with torch.no_grad():
        logits = module(x)
        for hook in hooks:
            hook.remove()
        head, features, out = heads[-1]
        assert isinstance(head, nn.Linear | nn.Conv2d)
        if features.flatten(1).shape[1] == head.weight[0].numel() and bool(features.isfinite().all()):
            features = features.flatten(1)
            _, _, directions = torch.linalg.svd(features - features.mean(0), full_matrices=False)
            mix = torch.randn(CLASSES, _DIRECTIONS, generator=torch.Generator().manual_seed(0))
            head.weight.copy_((mix @ directions[:_DIRECTIONS]).reshape(head.weight.shape))
            logits = module(x)
        spread = float(logits.var(0).mean().sqrt())
        if not 0 < spread < float("inf"):
            return  # the gates say so
        head.weight.div_(spread)
        if head.bias is not None:
            head.bias.div_(spread)
            if out is logits:  # nothing behind it, a ReLU say, for which zero has a meaning
                head.bias.sub_(logits.mean(0) / spread)
