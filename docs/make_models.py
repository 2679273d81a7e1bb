"""Tries every architecture that can be had here, and writes docs/models.md.

    python docs/make_models.py                     # all sources, each in a process of its own
    python docs/make_models.py --source timm       # one of them
    python docs/make_models.py --again             # try again what could not be explained
    python docs/make_models.py --fresh             # try all of them again

Each network gets random weights (but the embedded one and those in ONNX files, which have their
own), one input of noise, and a time limit. It is run plainly, recorded, and explained: a classifier's
likeliest class, a detector's first box, a segmenter's commonest class where it sees it, or what else
the page says. What came out is kept in build/models.jsonl, so that a run that was interrupted goes on
where it ended.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import howyouseeme as hysm
from howyouseeme.models import from_keras
from howyouseeme.models.keras import on_torch
from howyouseeme.tape import Value, record

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "build" / "models.jsonl"
PAGE = ROOT / "docs" / "models.md"

#: Of one architecture: building it, running it three times, and explaining it.
SECONDS = 300

TIMM = """
    bat_resnext26ts beit_base_patch16_224 botnet26t_256 caformer_s18 cait_xxs24_224 coat_lite_tiny
    coatnet_nano_rw_224 coatnext_nano_rw_224 convformer_s18 convit_tiny convmixer_768_32
    convnext_atto convnext_tiny convnextv2_atto cpubone_nano crossvit_9_240 cs3darknet_s
    cs3sedarknet_l csatv2 cspdarknet53 cspnext_tiny cspresnet50 cspresnext50 darknet53 davit_tiny
    deepseek_vit_412m deit_tiny_patch16_224 densenet121 densenetblur121d dla34 dla46_c dla46x_c
    dla60_res2net dla60_res2next dm_nfnet_f0 dpn48b dpn68 eca_nfnet_l0 eca_resnet33ts eca_vovnet39b
    ecaresnet26t edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0
    efficientnet_es efficientnet_lite0 efficientnetv2_rw_t efficientvim_m1 efficientvit_b0
    efficientvit_m0 ese_vovnet19b_dw eva02_tiny_patch14_224 fasternet_t0 fastvit_sa12 fastvit_t8
    fbnetc_100 fbnetv3_b focalnet_tiny_srf gc_efficientnetv2_rw_t gcresnet33ts gcvit_xxtiny
    gemma4_vit_167m gernet_s ghostnet_100 ghostnetv2_100 ghostnetv3_100 halonet26t hardcorenas_a
    hgnet_tiny hgnetv2_b0 hiera_tiny_224 hieradet_small hrnet_w18_small hrnet_w18_small_v2 iformer_t
    inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lambda_resnet26t lcnet_050
    lcnetv2_small legacy_senet154 legacy_seresnet18 legacy_xception levit_128s levit_conv_128s
    lowformer_b0 mambaout_femto maxvit_pico_rw_256 mixer_s32_224 mixnet_s mnasnet_100
    mobilenet_edgetpu_100 mobilenetv1_100 mobilenetv2_100 mobilenetv3_small_100
    mobilenetv4_conv_small mobilenetv4_hybrid_medium mobilenetv5_base mobileone_s0 mobilevit_xxs
    mobilevitv2_050 mvitv2_tiny naflexvit_base_patch16_gap nasnetalarge nest_tiny nextvit_small
    nf_regnet_b0 nf_resnet26 nfnet_f0 pit_ti_224 pnasnet5large poolformer_s12 poolformerv2_s12
    pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetv_040 regnetx_002 regnety_002 regnetz_b16
    repghostnet_050 repvgg_a0 repvit_m1 res2net50_14w_8s res2next50 resmlp_12_224 resnest14d
    resnest50d_1s4x24d resnet10t resnet18 resnet26t resnet50 resnet50_gn resnetaa50 resnetblur18
    resnetrs50 resnetv2_18 resnetv2_50x1_bit resnext26ts resnext50_32x4d rexnet_100 rexnetr_100
    sam2_hiera_tiny samvit_base_patch16_224 selecsls42 semnasnet_100 sequencer2d_s seresnet18
    seresnext26d_32x4d shvit_s1 skresnet18 skresnext50_32x4d spnasnet_100 starnet_s050
    swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256
    tf_efficientnet_b0 tf_efficientnetv2_b0 tf_mixnet_s tf_mobilenetv3_small_minimal_100
    tiny_vit_5m_224 tinynet_e tnt_s_patch16_224 tresnet_m twins_svt_small vgg11 vgg11_bn
    visformer_tiny vit_relpos_small_patch16_224 vit_small_patch16_dinov3 vit_small_r26_s32_224
    vit_tiny_patch16_224 vitamin_small_224 volo_d1_224 vovnet39a wide_resnet50_2 xception41
    xception41p xcit_nano_12_p16_224
""".split()

#: What makes a transformer small.
SMALL = {"num_hidden_layers": 4}

#: Of a network of MONAI.
CLASSES = {"in_channels": 1, "out_channels": 5}

#: Configurations of transformers, with what makes some of them small.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "BeitConfig": SMALL,
    "BitConfig": {},
    "ConvNextConfig": {},
    "ConvNextV2Config": {},
    "CvtConfig": {},
    "Data2VecVisionConfig": SMALL,
    "DeiTConfig": SMALL,
    "Dinov2Config": SMALL,
    "EfficientNetConfig": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
    "FocalNetConfig": {},
    "HGNetV2Config": {"image_size": 224},
    "HieraConfig": {"image_size": [224, 224]},
    "LevitConfig": {},
    "MobileNetV1Config": {},
    "MobileNetV2Config": {},
    "MobileViTConfig": {},
    "MobileViTV2Config": {},
    "PPLCNetConfig": {},
    "PoolFormerConfig": {},
    "PvtConfig": {},
    "PvtV2Config": {},
    "RegNetConfig": {},
    "ResNetConfig": {},
    "SegformerConfig": {},
    "SwiftFormerConfig": {},
    "SwinConfig": {"image_size": 224},
    "Swinv2Config": {},
    "TextNetConfig": {},
    "ViTConfig": SMALL,
    "ViTMSNConfig": SMALL,
}

KERAS = """
    ConvNeXtTiny DenseNet121 EfficientNetB0 EfficientNetV2B0 InceptionResNetV2 InceptionV3 MobileNet
    MobileNetV2 MobileNetV3Large MobileNetV3Small ResNet50 ResNet50V2 VGG16 VGG19 Xception
""".split()


#: How `--model` and `load_model` name a network.
NAMING = """
| your network | `--model`, `load_model` | weights | preprocessing |
| --- | --- | --- | --- |
| EfficientNet-Lite0 | `efficientnet-lite0` | come with a package | known |
| torchvision's classifiers | `torchvision:resnet50` | the hub's, or `--weights` | known |
| timm's | `timm:resnet50.a1_in1k` | the hub's, or `--weights` | known, but for crops with borders |
| Hugging Face transformers' classifiers | `transformers:FOLDER`, or a name on the hub | the folder's or the hub's, \
safetensors only, or `--weights` | measured from the image processor |
| ONNX | `model.onnx` | in the file | `--size` and so on; Ultralytics' say it themselves |
| Keras 3, on torch | `model.keras`, `model.h5`; `from_keras(model)` | in the file | `--size` and so on |
| torch.export, TorchScript, pickled | `model.pt2`, `model.pt`, with `--allow-code` | in the file | \
`--size` and so on |
| any `nn.Module` | `package.module:factory`, or the module itself | as made, or `--weights` | as the \
factory says |

`--weights` takes a `.safetensors` file or a state dict made by `torch.save`, for the same classes. Weights are never made up: where
there are none, that is an error. `torch.compile` and `DataParallel` are unwrapped.
"""


#: What a network takes, without the batch: noise of a shape, or a tensor as it is.
Given = tuple[tuple[int, ...] | Tensor, ...]


@dataclass(frozen=True)
class Case:
    """An architecture: what builds it, the inputs to try, of which the first that run are taken,
    and the target to ask for, given the output."""

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[Given, ...]
    random: bool = True
    asked: Callable[[Any], Any] = lambda _: None


def pictures(*sides: int) -> tuple[Given, ...]:
    return tuple(((3, side, side),) for side in sides)


def first_box(_: Any) -> Any:
    return hysm.targets.box(0)


def commonest(output: Any) -> Any:
    """The class that most places are of, at these places."""
    scores = output if isinstance(output, Tensor) else output.get("out", output.get("logits"))
    places = scores[0].argmax(0)
    category = int(places.flatten().mode().values)
    inside = places == category
    if inside.dim() == 2:
        return hysm.targets.region(inside, category)
    return lambda output: output[:, category][:, inside].sum(1)


#: Others of transformers: configuration, its options, inputs, and maybe what is asked.
MORE_TRANSFORMERS: dict[str, tuple[Any, ...]] = {
    "DeiTForImageClassificationWithTeacher": ("DeiTConfig", SMALL, ((3, 224, 224),)),
    "LevitForImageClassificationWithTeacher": ("LevitConfig", {}, ((3, 224, 224),)),
    "Dinov2WithRegistersForImageClassification": (
        "Dinov2WithRegistersConfig",
        SMALL,
        ((3, 224, 224),),
    ),
    "DonutSwinForImageClassification": ("DonutSwinConfig", {}, ((3, 224, 224),)),
    "IJepaForImageClassification": ("IJepaConfig", SMALL, ((3, 224, 224),)),
    "CLIPForImageClassification": ("CLIPConfig", {"vision_config": SMALL}, ((3, 224, 224),)),
    "MetaClip2ForImageClassification": (
        "MetaClip2Config",
        {"vision_config": SMALL},
        ((3, 224, 224),),
    ),
    "SiglipForImageClassification": ("SiglipConfig", {"vision_config": SMALL}, ((3, 224, 224),)),
    "PerceiverForImageClassificationConvProcessing": (
        "PerceiverConfig",
        {"num_latents": 64, "num_self_attends_per_block": 2, "num_cross_attention_heads": 1},
        ((3, 224, 224),),
    ),
    "SegformerForSemanticSegmentation": ("SegformerConfig", {}, ((3, 64, 64),), commonest),
    "MobileViTV2ForSemanticSegmentation": ("MobileViTV2Config", {}, ((3, 256, 256),), commonest),
    "YolosForObjectDetection": (
        "YolosConfig",
        {**SMALL, "image_size": [64, 64], "num_detection_tokens": 10},
        ((3, 64, 64),),
        lambda _: lambda output: output["logits"][:, 0].amax(-1),
    ),
    "VideoMAEForVideoClassification": ("VideoMAEConfig", SMALL, ((16, 3, 224, 224),)),
    "TimesformerForVideoClassification": ("TimesformerConfig", SMALL, ((8, 3, 224, 224),)),
    "VivitForVideoClassification": ("VivitConfig", {**SMALL, "num_frames": 8}, ((8, 3, 224, 224),)),
    "ASTForAudioClassification": ("ASTConfig", SMALL, ((1024, 128),)),
    "Wav2Vec2ForSequenceClassification": ("Wav2Vec2Config", SMALL, ((8000,),)),
    "HubertForSequenceClassification": ("HubertConfig", SMALL, ((8000,),)),
    "WavLMForSequenceClassification": ("WavLMConfig", SMALL, ((8000,),)),
    "CLIPModel": (
        "CLIPConfig",
        {"vision_config": SMALL, "text_config": SMALL},
        (torch.tensor([49406, 320, 1125, 539, 320, 2368, 49407]), (3, 224, 224)),
        lambda _: lambda output: output["logits_per_image"][:, 0],
    ),
}

LINE, CUBE, LARGE = ((1, 128),), ((1, 32, 32, 32),), ((1, 64, 64, 64),)
TWO_STEPS = {**CLASSES, "channels": (8, 16, 32), "strides": (2, 2)}
SMALL_EFFICIENTNET = {"model_name": "efficientnet-b0", "in_channels": 1, "num_classes": 5}

#: Networks of MONAI: class, options, inputs, and maybe what is asked.
MONAI: dict[str, tuple[Any, ...]] = {
    f"{kind}, {options['spatial_dims']}-d": (kind, options, *rest)
    for kind, options, *rest in (
        ("DenseNet121", {**CLASSES, "spatial_dims": 1}, LINE),
        ("DenseNet121", {**CLASSES, "spatial_dims": 3}, LARGE),
        ("EfficientNetBN", {**SMALL_EFFICIENTNET, "spatial_dims": 1}, LINE),
        ("EfficientNetBN", {**SMALL_EFFICIENTNET, "spatial_dims": 3}, LARGE),
        ("SEResNet50", {"in_channels": 1, "num_classes": 5, "spatial_dims": 1}, LINE),
        ("SEResNet50", {"in_channels": 1, "num_classes": 5, "spatial_dims": 3}, LARGE),
        ("UNet", {**TWO_STEPS, "spatial_dims": 1}, LINE, commonest),
        ("UNet", {**TWO_STEPS, "spatial_dims": 3}, CUBE, commonest),
        ("BasicUNet", {**CLASSES, "spatial_dims": 1}, LINE, commonest),
        ("BasicUNet", {**CLASSES, "spatial_dims": 3}, CUBE, commonest),
        ("AttentionUnet", {**TWO_STEPS, "spatial_dims": 1}, LINE, commonest),
        ("AttentionUnet", {**TWO_STEPS, "spatial_dims": 3}, CUBE, commonest),
        ("SegResNet", {**CLASSES, "spatial_dims": 3}, CUBE, commonest),
        ("VNet", {**CLASSES, "spatial_dims": 3}, CUBE, commonest),
        ("MedNeXtSmall", {**CLASSES, "spatial_dims": 3}, CUBE, commonest),
        ("HighResNet", {**CLASSES, "spatial_dims": 3}, CUBE, commonest),
        ("SwinUNETR", {**CLASSES, "spatial_dims": 3}, LARGE, commonest),
        ("UNETR", {**CLASSES, "spatial_dims": 3, "img_size": 32}, CUBE, commonest),
        (
            "VoxelMorph",
            {"spatial_dims": 3},
            CUBE * 2,
            lambda _: lambda output: output[0].flatten(1).sum(1),
        ),
    )
}

# -- where they come from -------------------------------------------------------------------------


def embedded() -> Iterator[Case]:
    yield Case("efficientnet-lite0", lambda: hysm.load_model().module, pictures(224), random=False)


def torchvision() -> Iterator[Case]:
    models = import_module("torchvision.models")
    for name in models.list_models(module=models):
        fixed = {"vit_h_14": 56, "maxvit_t": 224, "inception_v3": 139}
        side = fixed.get(name, 64)
        options = {"image_size": side} if name.startswith("vit_") else {}
        build = partial(models.get_model, name, weights=None, **options)
        yield Case(name, build, pictures(side, 224))


def torchvision_detection() -> Iterator[Case]:
    models = import_module("torchvision.models")
    for name in models.list_models(module=models.detection):
        # With random weights no box is certain, so that the few best are to stay.
        if "rcnn" in name:
            options = {"box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 20}
        else:
            options = {"score_thresh": 0.0, "topk_candidates": 20}
        if not name.startswith("ssd"):
            options |= {"min_size": 96, "max_size": 96}
        options |= {"weights": None, "weights_backbone": None}
        build = partial(models.get_model, name, **options)
        yield Case(name, build, pictures(96), asked=first_box)


def torchvision_segmentation() -> Iterator[Case]:
    models = import_module("torchvision.models")
    for name in models.list_models(module=models.segmentation):
        build = partial(models.get_model, name, weights=None, weights_backbone=None)
        yield Case(name, build, pictures(96), asked=commonest)


def torchvision_video() -> Iterator[Case]:
    models = import_module("torchvision.models")
    for name in models.list_models(module=models.video):
        clips = tuple(((3, 16, side, side),) for side in (64, 224))
        yield Case(name, partial(models.get_model, name, weights=None), clips)


def torchvision_optical_flow() -> Iterator[Case]:
    models = import_module("torchvision.models")
    for name in models.list_models(module=models.optical_flow):
        build = partial(models.get_model, name, weights=None)
        pair = ((3, 128, 128), (3, 128, 128))
        yield Case(name, build, (pair,), asked=lambda _: lambda flows: flows[-1][:, 0].mean((1, 2)))


def timm() -> Iterator[Case]:
    package = import_module("timm")
    for name in TIMM:
        own = package.models.get_pretrained_cfg(name).input_size[-1]
        # Of less, one place is left, where batch norm leaves nothing of noise.
        sides = (192,) if name == "inception_v3" else (96, 128, own)
        yield Case(name, partial(package.create_model, name), pictures(*sides))


def transformers() -> Iterator[Case]:
    package = import_module("transformers")
    for name, options in TRANSFORMERS.items():
        config = getattr(package, name)
        sized = {"image_size": 64} if "image_size" in config().to_dict() else {}
        classifier = name.replace("Config", "ForImageClassification")
        yield Case(
            classifier,
            lambda options=sized | options, config=config, classifier=classifier: getattr(
                package, classifier
            )(config(**options)),
            pictures(*(224,) if "image_size" in options else (64, 224)),
        )
    for name, (config, options, given, *asked) in MORE_TRANSFORMERS.items():
        yield Case(
            name,
            lambda name=name, config=config, options=options: getattr(package, name)(
                getattr(package, config)(**options)
            ),
            (given,),
            True,
            *asked,
        )


def monai() -> Iterator[Case]:
    nets = import_module("monai.networks.nets")
    for name, (kind, options, given, *asked) in MONAI.items():
        yield Case(name, partial(getattr(nets, kind), **options), (given,), True, *asked)


def keras() -> Iterator[Case]:
    applications = on_torch("A Keras model").applications
    for name in KERAS:
        build = getattr(applications, name)
        yield Case(
            name,
            lambda build=build: from_keras(build(weights=None, input_shape=(96, 96, 3))).module,
            pictures(96),
            random=False,
        )


def onnx() -> Iterator[Case]:
    package = import_module("onnx")
    folder = Path(package.__file__).parent / "backend" / "test" / "data" / "light"
    for path in sorted(folder.glob("*.onnx")):
        yield Case(
            path.name,
            lambda path=path: hysm.load_model(str(path)).module,
            pictures(224),
            random=False,
        )


SOURCES: dict[str, Callable[[], Iterator[Case]]] = {
    one.__name__: one
    for one in (
        embedded,
        torchvision,
        torchvision_detection,
        torchvision_segmentation,
        torchvision_video,
        torchvision_optical_flow,
        timm,
        transformers,
        monai,
        keras,
        onnx,
    )
}


# -- one of them ----------------------------------------------------------------------------------


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Weights under which activations neither die nor explode, whatever the initialisation says."""
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    for position, (name, parameter) in enumerate(module.named_parameters()):
        if not parameter.is_floating_point():
            continue
        start = 7919 * position % len(noise)
        count = parameter.numel()
        repeated = noise.roll(-start).repeat(count // len(noise) + 1)[:count]
        parameter.copy_(repeated.reshape(parameter.shape))
        if count > max(parameter.shape, default=1):
            parameter.mul_((2 / parameter[0].numel()) ** 0.5)
            if "bbox" in name:  # boxes stay near their anchors
                parameter.mul_(0.01)
        elif name.endswith("bias"):
            parameter.mul_(0.1)
        else:  # scales
            parameter.mul_(0.25).add_(1)


@torch.no_grad()
def settle(module: nn.Module, inputs: list[Tensor]) -> None:
    """Give batch norms the statistics of a few inputs of noise, as a training would."""
    norms = [one for one in module.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().momentum = 1.0
    several = (
        [one, *(torch.randn_like(one) if one.is_floating_point() else one for _ in range(3))]
        for one in inputs
    )
    module(*map(torch.cat, several))
    module.eval()


def built(case: Case) -> nn.Module:
    idle = {
        each: lambda tensor, *_, **__: tensor
        for each in dir(nn.init)
        if each.endswith("_") and not each.startswith("_")
    }
    torch.manual_seed(0)
    if not case.random:
        return case.build().eval()
    with patch.multiple(nn.init, **idle):  # it takes minutes for the large ones
        module = case.build()
    randomise(module)
    return module.eval()


def tensors(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(dict(output) if hasattr(output, "items") else output)
    return [
        leaf.data if isinstance(leaf, Value) else leaf
        for leaf in leaves
        if isinstance(leaf, (Tensor, Value))
    ]


def tried(case: Case) -> dict[str, Any]:
    """What the page says about one architecture."""
    module = built(case)
    count = sum(one.numel() for one in module.parameters())
    count = count or sum(one.numel() for one in module.buffers())
    row: dict[str, Any] = {"name": case.name, "parameters": count}
    for given in dict.fromkeys(case.inputs):
        noise = torch.Generator().manual_seed(1)
        inputs = [
            each[None] if isinstance(each, Tensor) else torch.randn(1, *each, generator=noise)
            for each in given
        ]
        try:
            with torch.no_grad():
                output = module(*inputs)
            break
        except (RuntimeError, ValueError, AssertionError) as error:
            row["why"] = f"does not run on its own: {first_line(error)}"
    else:
        return row
    row.pop("why", None)
    row["input"] = ", ".join(" x ".join(map(str, one.shape[1:])) for one in inputs)
    if case.random:
        settle(module, inputs)
        with torch.no_grad():
            output = module(*inputs)
    plain, target = tensors(output), case.asked(output)
    start = time.perf_counter()
    with torch.no_grad():
        module(*inputs)
    row["plain"] = time.perf_counter() - start
    tape = record(module, inputs)
    recorded = tensors(tape.output)
    row["calls"] = len(tape.calls)
    # Relative to the largest output; 0 where they are equal bit for bit.
    row["difference"] = max(
        float((a - b).abs().max() / b.abs().max()) if not torch.equal(a, b) else 0.0
        for a, b in zip(recorded, plain, strict=True)
    )
    del tape
    explainer = hysm.Explainer(module)
    start = time.perf_counter()
    try:
        explanation = explainer(inputs[0] if len(inputs) == 1 else tuple(inputs), target)
    except hysm.HowYouSeeMeError as error:
        named = re.search(r"A rule for (.*) makes", str(error))
        row["why"] = f"no rule for {named[1]}" if named else first_line(error)
        row["missing"] = str(error).splitlines()[1:-1] if named else []
        return row
    row["seconds"] = time.perf_counter() - start
    parts = explanation.inputs or (explanation,)
    row["coverage"] = sum(float(part.coverage[0]) for part in parts)
    row["points"] = sum(len(part.points[0]) for part in parts)
    return row


def first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return (line or type(error).__name__)[:160]


def run(source: str, fresh: bool, again: bool) -> None:
    KEPT.parent.mkdir(exist_ok=True)
    mine = [] if fresh else [row for row in kept() if row["source"] == source]
    known = {row["name"] for row in mine if not (again and "why" in row)}
    # What is imported when it is first used is not to count for the first architecture.
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    hysm.explain(small.eval(), torch.randn(1, 3, 8, 8))

    def too_late(*_: object) -> None:
        raise TimeoutError(f"took more than {SECONDS} seconds")

    signal.signal(signal.SIGALRM, too_late)
    for case in SOURCES[source]():
        if case.name in known:
            continue
        signal.alarm(SECONDS)
        try:
            row = tried(case)
        except Exception as error:  # any architecture may fail in any way; the page says how
            row = {"name": case.name, "why": f"{type(error).__name__}: {first_line(error)}"}
        finally:
            signal.alarm(0)
        row["source"] = source
        with KEPT.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(source, row["name"], row.get("why", "explained"), flush=True)  # noqa: T201
        gc.collect()


# -- the page -------------------------------------------------------------------------------------


def kept() -> list[dict[str, Any]]:
    """The latest result of each architecture, in the order of the sources."""
    if not KEPT.exists():
        return []
    rows = [json.loads(line) for line in KEPT.read_text().splitlines()]
    latest = {(row["source"], row["name"]): row for row in rows}
    return [row for source in SOURCES for (kind, _), row in latest.items() if kind == source]


def page(rows: list[dict[str, Any]]) -> str:
    explained = [row for row in rows if "seconds" in row]
    compared = [row for row in rows if "difference" in row]
    lines = [
        "# Models",
        "",
        "Written by `make models` (docs/make_models.py); do not edit.",
        "",
        *NAMING.strip().splitlines(),
        "",
        "## What was tried",
        "",
        f"{len(rows)} architectures were tried, and {len(explained)} explained. The output of the recorded "
        f"pass is bit for bit the plain one's for {sum(row['difference'] == 0 for row in compared)} of the "
        f"{len(compared)} that run.",
        "",
        "One input of noise, method `evidence`, one CPU thread, torch "
        f"{torch.__version__.partition('+')[0]}. Weights are random, but for the embedded network and the "
        "ONNX files, which have their own (those of `light_*` are constants, so that nothing speaks for "
        "one class more than for another): the table says what runs, not how good a map is. Of classifiers "
        "the likeliest class is explained, of detectors the first box, of segmenters the commonest class "
        "at its places; of YOLOS the best class of its first box, of CLIP how well picture and text fit, of "
        "RAFT the flow to the right, of VoxelMorph the picture that it moved. *Input* leaves out the batch. "
        "*Calls* are "
        "the ATen calls on the tape, *plain* is the bare forward pass, *explained* how many times as long "
        "the first explanation took, record and walk and points, on a machine that did other "
        "work too, and *coverage* the share of the evidence that reaches the pixels (0 where nothing in the "
        "noise speaks for the class). Where the recorded output is the plain one only *to* a relative "
        "difference, PyTorch's fused attention or recurrent layers are taken apart to be recorded.",
        "",
        "| source | tried | explained | recorded = plain |",
        "| --- | ---: | ---: | ---: |",
    ]
    for source in SOURCES:
        mine = [row for row in rows if row["source"] == source]
        counts = (
            len(mine),
            sum("seconds" in row for row in mine),
            sum(row.get("difference") == 0 for row in mine),
        )
        lines.append(f"| {source.replace('_', ' ')} | {' | '.join(map(str, counts))} |")
    for source in SOURCES:
        mine = [row for row in explained if row["source"] == source]
        lines += [
            "",
            f"## {source.replace('_', ' ')}",
            "",
            "| architecture | parameters, M | input | calls | plain, ms | explained | coverage | recorded = plain |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
            *(line(row) for row in mine),
        ]
    lines += ["", "## Not explained", "", "| architecture | why |", "| --- | --- |"]
    lines += [
        f"| {row['source']}: {row['name']} | {row['why'].replace('|', '/')} |"
        for row in rows
        if "why" in row
    ]
    return "\n".join(lines) + "\n"


def line(row: dict[str, Any]) -> str:
    times = row["seconds"] / row["plain"]
    cells = (
        row["name"],
        f"{row['parameters'] / 1e6:.1f}",
        row["input"],
        row["calls"],
        f"{1000 * row['plain']:.0f}",
        f"{times:.1f} x",
        f"{row['coverage']:.3f}",
        "yes" if row["difference"] == 0 else f"to {row['difference']:.0e}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Try every architecture; write docs/models.md.")
    parser.add_argument("--source", choices=SOURCES, action="append", help="only this source")
    parser.add_argument("--fresh", action="store_true", help="try all of them again")
    parser.add_argument("--again", action="store_true", help="and what could not be explained")
    parser.add_argument("--one", choices=SOURCES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if given.one:
        run(given.one, given.fresh, given.again)
        return
    for source in given.source or SOURCES:
        flags = [*["--fresh"] * given.fresh, *["--again"] * given.again]
        command = [sys.executable, __file__, "--one", source, *flags]
        subprocess.run(command, check=False)
    PAGE.write_text(page(kept()), encoding="utf-8")


if __name__ == "__main__":
    main()
