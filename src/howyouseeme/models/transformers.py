"""Image classifiers of Hugging Face's transformers, from a folder or the hub."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import MissingExtraError, ModelError
from ..images import Preprocess
from . import hub
from .network import Network
from .weights import load_weights

PREFIX = "transformers:"

_Resizing = tuple[Literal["squash", "crop"], int | None]  # of a Preprocess: resize and crop_from


def load_transformers(place: str, weights: Path | None = None) -> Network:
    """An image classifier in a folder that `save_pretrained` wrote, or of that name on the hub.

        network = load_transformers("my-resnet")              # config.json and model.safetensors
        network = load_transformers("microsoft/resnet-50")    # from the hub
        network = load_transformers("my-resnet", Path("other.safetensors"))

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
        reason = f"there is no such folder, and {hub.silence()}" if gone else _first_line(error)
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
    return Network(PREFIX + place, module.eval(), preprocess, _names(module))


def _transformers() -> ModuleType:
    try:
        return import_module("transformers")
    except ImportError as error:
        raise MissingExtraError(
            "Models of transformers need that package: pip install transformers"
        ) from error


def _names(module: nn.Module) -> tuple[str, ...] | None:
    config: Any = module.config
    names = tuple(str(config.id2label[index]) for index in range(config.num_labels))
    made_up = names == tuple(f"LABEL_{index}" for index in range(len(names)))
    return None if made_up else names


def _preprocess(transformers: ModuleType, place: str, options: dict[str, Any]) -> Preprocess | None:
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(place, **options)
    except (OSError, ValueError, ImportError):  # there is none, or it needs more packages
        return None
    return measured(processor)


def measured(processor: Any) -> Preprocess | None:
    """The `Preprocess` that does what an image processor does; None if none does.

        measured(transformers.ViTImageProcessor())

    Processors have many switches, so what they do is measured: black, white and red pictures give
    the scale and the order of channels, and a picture of ramps tells which resizing it was.
    """
    # Neither square nor a multiple of anything, so that no two ways of resizing agree.
    y, x = np.mgrid[0:331, 0:457]
    ramps = np.stack([255 * y / 330, 255 * x / 456, 255 * (x + y) / 786], 2).astype(np.uint8)
    flat = [np.full_like(ramps, level) for level in (0, 255)]
    red = flat[0].copy()
    red[:, :, 0] = 255
    black, white, reddish, sloped = (_run(processor, picture) for picture in (*flat, red, ramps))
    low, high = black.amax((1, 2)), white.amax((1, 2))
    even = torch.equal(low, black.amin((1, 2))) and torch.equal(high, white.amin((1, 2)))
    if len(black) != 3 or not even or not bool((high > low).all()):
        return None
    std = 255 / (high - low)
    channels: Literal["rgb", "bgr"] = "rgb" if bool((reddish[0] == white[0]).all()) else "bgr"
    size = (sloped.shape[1], sloped.shape[2])
    for resize, crop_from in _resizings(processor):
        candidate = Preprocess(
            size,
            resize=resize,
            crop_from=crop_from,
            mean=tuple((-low * std).tolist()),
            std=tuple(std.tolist()),
            scale=1.0,
            channels=channels,
            interpolation="bicubic" if getattr(processor, "resample", 2) == 3 else "bilinear",
        )
        mine, _ = candidate(Image.fromarray(ramps))
        levels = (mine - sloped) * std[:, None, None]
        # The two resizings round at other moments, and may cut one pixel apart.
        if float(levels.abs().max()) < 1.6 + 255 / min(size):
            return candidate
    return None


def _run(processor: Any, picture: np.ndarray) -> Tensor:
    made: Tensor = processor(images=Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    return made[0].float()


def _resizings(processor: Any) -> list[_Resizing]:
    """How such a processor may resize."""
    asked = dict(getattr(processor, "size", None) or {})
    shorter, height = asked.get("shortest_edge"), asked.get("height")
    part = getattr(processor, "crop_pct", None)
    found: list[_Resizing] = [("squash", None)]
    if height is not None:
        found.append(("squash", height))
    if shorter is not None:
        found.append(("crop", shorter))
        if part:
            found.append(("crop", int(shorter / part)))
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
