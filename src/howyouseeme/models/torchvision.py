"""Torchvision's image classifiers, with weights from its hub or from a file."""

from __future__ import annotations

import re
from difflib import get_close_matches
from http.client import HTTPException
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ..errors import MissingExtraError, ModelError
from ..images import Preprocess
from .classes import imagenet_classes
from .network import Network
from .weights import class_count, fill, read_weights

PREFIX = "torchvision:"

# What the builders set on their own only when they download the weights themselves.
_AS_TRAINED: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True, "init_weights": False},
    "inception_v3": {"transform_input": True, "init_weights": False},
}


def torchvision_names() -> list[str]:
    """The names of torchvision's image classifiers, e.g. "torchvision:vgg16"; none without it.

    >>> torchvision_names()
    """
    return [] if find_spec("torchvision") is None else [PREFIX + name for name in _names(_models())]


def load_torchvision(name: str, weights: Path | None = None) -> Network:
    """One of torchvision's image classifiers, by its name there.

    >>> network = load_torchvision("resnet50")                        # from torchvision's hub
    >>> network = load_torchvision("resnet50", Path("resnet50.safetensors"))

    A file that keeps the name it has in the hub gets the preprocessing of those weights, any
    other file that of the model's default ones. Weights of a network that was trained for other classes give
    one with as many, which have no names.

    Raises `MissingExtraError` without torchvision, and `ModelError` for an unknown name, or when
    the hub can't be reached or the file can't be read or doesn't fit.
    """
    models = _models()
    names = _names(models)
    if name in models.list_models() and name not in names:
        raise ModelError(
            f"{PREFIX}{name} is no image classifier: let a function of yours return it, with its weights, and "
            "name that, --model mine:network; or give the module itself."
        )
    if name not in names:
        close = ", ".join(PREFIX + known for known in get_close_matches(name, names, n=3))
        raise ModelError(
            f"Torchvision has no image classifier {name!r}"
            f"{f'; did you mean {close}?' if close else '.'}"
        )
    published = models.get_model_weights(name)
    classes: tuple[str, ...] | None = imagenet_classes()
    if weights is None:
        chosen = published.DEFAULT
        module = _from_hub(models, name, chosen)
    else:
        same_file = (one for one in published if Path(one.url).name == weights.name)
        chosen = next(same_file, published.DEFAULT)
        state, options = _renamed(name, read_weights(weights)), _AS_TRAINED.get(name, {})
        module = models.get_model(name, weights=None, **options)
        if count := class_count(module, state):
            classes = None
            module = models.get_model(name, weights=None, num_classes=count, **options)
        fill(module, state, str(weights), PREFIX + name)
    return Network(PREFIX + name, module.eval(), _preprocess(chosen), classes)


def _models() -> ModuleType:
    try:
        return import_module("torchvision.models")
    except ImportError as error:
        raise MissingExtraError(
            "torchvision's models need the package torchvision: pip install torchvision"
        ) from error


def _names(models: ModuleType) -> list[str]:
    return list(models.list_models(module=models))


def _from_hub(models: ModuleType, name: str, chosen: Any) -> nn.Module:
    try:
        module: nn.Module = models.get_model(name, weights=chosen)
    except (OSError, HTTPException, RuntimeError) as error:  # the last for a wrong checksum
        raise ModelError(
            f"The weights of {name} could not be downloaded from torchvision's hub ({error}); "
            f"fetch {chosen.url} elsewhere and pass --weights FILE."
        ) from error
    return module


def _renamed(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The hub's DenseNets were saved before their layers lost a dot: norm.1 is norm1 today."""
    if not name.startswith("densenet"):
        return state
    return {re.sub(r"\.(norm|conv)\.([12])\.", r".\1\2.", key): state[key] for key in state}


def _preprocess(weights: Any) -> Preprocess:
    preset = weights.transforms()
    (side,) = preset.crop_size
    (crop_from,) = preset.resize_size
    mean: Any = tuple(preset.mean)
    std: Any = tuple(preset.std)
    return Preprocess(
        (side, side),
        resize="crop",
        crop_from=crop_from,
        mean=mean,
        std=std,
        interpolation=preset.interpolation.value,
    )
