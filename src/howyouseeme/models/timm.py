"""The image classifiers of timm, with weights from its hub or from a file."""

from __future__ import annotations

import math
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..errors import MissingExtraError, ModelError, first_line
from ..images import Preprocess
from . import hub
from .classes import imagenet_classes
from .network import Network
from .weights import class_count, fill, read_weights

PREFIX = "timm:"

#: What timm's weights are called on the hub.
_FILE = "model.safetensors"


def load_timm(name: str, weights: Path | None = None) -> Network:
    """One of timm's image classifiers, by its name there, with or without the tag of its weights.

    >>> network = load_timm("resnet50.a1_in1k")                       # from timm's hub
    >>> network = load_timm("resnet50", Path("resnet50.safetensors"))

    The preprocessing is the one that timm says belongs to the weights of that tag, or, without
    one, to the model's default ones. Classes are as many as a file of weights is for; they have names where there
    are 1000, as on ImageNet.

    Raises `MissingExtraError` without timm, and `ModelError` for an unknown name, or when the hub
    can't be reached, has no weights of that model, or the file can't be read or doesn't fit.
    """
    timm = _timm()
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3)
        close = ", ".join(PREFIX + known for known in near)
        raise ModelError(
            f"timm has no model {name!r}{f'; did you mean {close}?' if close else '.'}"
        )
    if weights is None:
        module = _from_hub(timm, name)
    else:
        state = read_weights(weights)
        try:
            module = timm.create_model(name, pretrained=False)
            if count := class_count(module, state):
                module = timm.create_model(name, pretrained=False, num_classes=count)
        except RuntimeError as error:  # a tag that isn't there
            raise ModelError(f"timm can't make {name!r}: {error}.") from error
        fill(module, state, str(weights), PREFIX + name)
    classes = imagenet_classes() if module.num_classes == 1000 else None
    return Network(PREFIX + name, module.eval(), preprocess_of(module), classes)


def preprocess_of(module: nn.Module) -> Preprocess | None:
    """The preprocessing that a model made by timm was trained with, None if it is of another kind.

    >>> preprocess_of(timm.create_model("resnet50"))
    """
    config: dict[str, Any] = _timm().data.resolve_model_data_config(module)
    channels, height, width = config["input_size"]
    mode, part = config["crop_mode"], config["crop_pct"]
    known = mode in ("center", "squash") and config["interpolation"] in ("bilinear", "bicubic")
    if not known or channels != 3 or height != width:
        return None
    whole = mode == "squash" and part == 1
    return Preprocess(
        (height, width),
        resize="squash" if mode == "squash" else "crop",
        crop_from=None if whole else math.floor(height / part),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
    )


def _timm() -> ModuleType:
    try:
        return import_module("timm")
    except ImportError as error:
        raise MissingExtraError("timm's models need the package timm: pip install timm") from error


def _from_hub(timm: ModuleType, name: str) -> nn.Module:
    options: dict[str, Any] = {}
    try:
        config = timm.models.get_pretrained_cfg(name)
        if config is not None and config.hf_hub_id and not hub.answers():
            file = hub.downloaded(config.hf_hub_id, config.hf_hub_filename or _FILE)
            if file is None or not file.endswith(".safetensors"):  # others timm would unpickle
                raise OSError(hub.silence())
            options = {"pretrained_cfg_overlay": {"file": file}}
        module: nn.Module = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # the hub's errors have no common base
        reason = first_line(error)
        raise ModelError(
            f"The weights of {PREFIX}{name} could not be had from timm's hub ({reason}); "
            "fetch them elsewhere and pass --weights FILE."
        ) from error
    return module
