"""Image classifiers of Hugging Face's transformers, from a folder or the hub."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..errors import InputError, MissingExtraError, ModelError, first_line
from ..images import Preprocess
from . import hub
from .network import Network
from .weights import load_weights

PREFIX = "transformers:"


def load_transformers(place: str, weights: Path | None = None) -> Network:
    """An image classifier in a folder that `save_pretrained` wrote, or of that name on the hub.

    >>> network = load_transformers("my-resnet")              # config.json and model.safetensors
    >>> network = load_transformers("microsoft/resnet-50")    # from the hub
    >>> network = load_transformers("my-resnet", Path("other.safetensors"))

    Preprocessing comes from the folder's image processor; it is None where there is none, or where
    it does something else than resize, cut and scale. Code that comes with a model is not run.

    Raises `MissingExtraError` without transformers, and `ModelError` when the folder or the hub's
    model can't be had or is no image classifier, or its weights are incomplete.
    """
    transformers = _transformers()
    auto = transformers.AutoModelForImageClassification
    folder = Path(place).is_dir()
    local = folder or not hub.answers()
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local}
    try:
        if weights is None:
            module, info = auto.from_pretrained(
                place, use_safetensors=True, output_loading_info=True, **options
            )
            absent = sorted({*info["missing_keys"], *map(str, info["mismatched_keys"])})
        else:
            config = transformers.AutoConfig.from_pretrained(place, **options)
            module, absent = auto.from_config(config, trust_remote_code=False), []
            load_weights(module, weights, PREFIX + place)
    except ModelError:
        raise
    except Exception as error:  # OSError, ValueError, and those of the hub and of safetensors
        gone = local and not folder
        reason = f"there is no such folder, and {hub.silence()}" if gone else first_line(error)
        raise ModelError(
            f"{PREFIX}{place} can't be loaded ({reason}); give a folder with config.json "
            "and model.safetensors of an image classifier."
        ) from error
    if absent:  # they have been made up
        some = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
        raise ModelError(
            f"{PREFIX}{place} lacks weights that fit: {some}; save the model after its training."
        )
    preprocess = _preprocess(transformers, place, options)
    return Network(PREFIX + place, module.eval(), preprocess, names_in(module))


def _transformers() -> ModuleType:
    try:
        return import_module("transformers")
    except ImportError as error:
        raise MissingExtraError(
            "Models of transformers need that package: pip install transformers"
        ) from error


def labels_in(module: nn.Module) -> dict[int, str]:
    """What the configuration of a model of transformers calls its outputs, by index; none of any other.

    >>> labels_in(AutoModelForImageClassification.from_pretrained("my-resnet"))
    {0: 'cat', 1: 'dog'}
    """
    labels = getattr(getattr(module, "config", None), "id2label", None)
    return labels if isinstance(labels, dict) else {}


def names_in(module: nn.Module) -> tuple[str, ...] | None:
    """The names of the classes in the configuration of a model of transformers; None where there are none.

    >>> names_in(AutoModelForImageClassification.from_pretrained("my-resnet"))
    ('cat', 'dog')
    """
    labels = labels_in(module)
    if set(labels) != set(range(len(labels))):
        return None
    if hasattr(module, "num_labels"):  # a classifier, whose head may have been changed
        heads = [one for one in module.modules() if isinstance(one, (nn.Linear, nn.Conv2d))]
        if not heads or len(heads[-1].weight) != len(labels):
            return None
    names = tuple(str(labels[index]) for index in range(len(labels)))
    made_up = names == tuple(f"LABEL_{index}" for index in range(len(names)))
    return None if made_up or not names else names


def _preprocess(transformers: ModuleType, place: str, options: dict[str, Any]) -> Preprocess | None:
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(place, **options)
    except (OSError, ValueError, ImportError):  # there is none, or it needs more packages
        return None

    try:
        return Preprocess.like(processor)
    except InputError:
        return None
