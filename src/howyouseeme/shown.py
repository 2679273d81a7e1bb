"""From an explanation to what its pictures show: the photo with its maps, and the layers over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from .draw import LayerView, Subject
from .errors import InputError
from .layers import Layer
from .maps import scale_to_one
from .models import Network
from .places import onto_input

if TYPE_CHECKING:
    from .explanation import Explanation

__all__ = ["blurred", "layer_views", "photo", "stages", "subject"]


def photo(one: Explanation) -> Image.Image:
    """The photo that was explained; where a tensor was given, a picture of that.

    >>> photo(explanation[0]).size

    Raises:
        InputError: the input is no picture.
    """
    sample = one.samples[0]
    return sample.image or _displayed(sample.input, one.network)


def subject(one: Explanation) -> Subject:
    """What the picture of an image shows.

    >>> draw.explanation_picture(subject(explanation[0])).save("picture.png")
    """
    points = one.points[0]
    return Subject(
        image=photo(one),
        points_y=points.y,
        points_x=points.x,
        strength=points.strength,
        attention=one.attention[0].numpy(),
        saliency=one.saliency[0].numpy(),
        label=one.label[0] or "the target",
        probability=one.probability[0],
        method=one.method.name,
        box=one.box[0],
    )


def stages(layers: Sequence[Layer]) -> list[Layer]:
    """The pixels, and of the layers above them one for each resolution, the last with evidence of its kind.

    >>> [layer.shape for layer in stages(explanation.layers())]
    """
    last: dict[tuple[int, ...], Layer] = {}
    pixels, *above = layers
    for layer in above:
        if layer.call == "aten.constant_pad_nd":  # a size of its own, and nothing new to see
            continue
        # As another scale of a detector's head has none.
        if layer.shape[1:] in last and not layer.map.any():
            continue
        last.pop(layer.shape[1:], None)
        last[layer.shape[1:]] = layer
    # From fine to coarse: where a network joins several scales, the order of its calls jumps.
    others = sorted(last.values(), key=lambda layer: layer.map.numel(), reverse=True)
    return [pixels, *(layer for layer in others if layer.shape[1:] != pixels.shape[1:])]


def layer_views(one: Explanation, layers: Sequence[Layer]) -> list[LayerView]:
    """Layers as they are drawn over the photo; see `Explanation.layer_views`."""
    sample = one.samples[0]
    if (geometry := sample.geometry) is None:
        raise _no_picture(sample.input)
    (height, width), (down, across) = geometry.input_size, geometry.scale
    top, left = geometry.offset
    box = (left, top, left + width * across, top + height * down)
    views = []
    for layer in layers:
        size = torch.Size((height, width))
        heat = onto_input(layer.map[None], layer.layout, size)
        if heat is None:  # its places are those of no pixel
            continue
        place = np.zeros((len(layer.nodes), 2), dtype=np.float32)
        strength = np.array([node.share for node in layer.nodes], dtype=np.float32)
        for axis, (of, line) in layer.layout.items():
            place[:, of - 2] = [line[node.position[axis - 2]] for node in layer.nodes]
        which = geometry.shows(place).nonzero()[0]
        place, strength = place[which], strength[which]
        y, x = geometry.points_to_image(place[:, 0], place[:, 1])
        call = "pixels" if layer.call == "input" else layer.call.removeprefix("aten.")
        name = layer.module or call
        seen = scale_to_one(heat[0]).numpy()
        views.append(LayerView(name, seen, y, x, strength, box, layer.shape[1:], which))
    return views


def blurred(picture: Image.Image, where: Tensor, others: bool = False) -> Image.Image:
    """A photo that is blurred where a mask [height, width] says so, or with `others` all around it.

    >>> blurred(photo(explanation[0]), explanation.saliency[0] > 0.1)

    By a Gaussian of a ninth of the shorter side.
    """
    soft = picture.filter(ImageFilter.GaussianBlur(min(picture.size) / 9))
    pair = (picture, soft) if others else (soft, picture)
    return Image.composite(*pair, Image.fromarray(where.numpy()))


def _displayed(tensor: Tensor, network: Network) -> Image.Image:
    if tensor.dim() != 3:
        raise _no_picture(tensor)
    if network.preprocess is not None and tensor.shape[0] == 3:
        return network.preprocess.undo(tensor)
    colours = tensor if tensor.shape[0] == 3 else tensor.mean(0, keepdim=True).expand(3, -1, -1)
    low, high = colours.min(), colours.max()
    scaled = (colours - low) / (high - low).clamp(min=1e-12)
    return Image.fromarray((scaled.float().permute(1, 2, 0) * 255).byte().cpu().numpy())


def _no_picture(tensor: Tensor) -> InputError:
    return InputError(
        f"An input of the shape {tuple(tensor.shape)} can't be drawn as a picture: take points, "
        "attention or to_dict() instead."
    )
