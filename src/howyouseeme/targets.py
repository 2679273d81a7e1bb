"""What can be asked besides a class: one class and not another, a box, a region, a neuron, a channel, a likeness.

>>> import howyouseeme as hysm
>>> explainer = hysm.Explainer(detector)
>>> explanation = explainer(images, target=hysm.targets.box(3))

Anything else is a function of the model's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from .detectors import boxes_in
from .errors import InputError
from .numbers import plain
from .scores import outline, scores_in

if TYPE_CHECKING:
    from .models import Network

__all__ = ["Target", "alike", "box", "channel", "neuron", "region", "versus"]


@dataclass(frozen=True, eq=False)
class Target:
    """Something to explain: what it is called, and how it is read off an output.

    >>> brightest = Target("the brightest", lambda output, network: output.flatten(1).amax(1))

    Args:
        label: what pictures and JSON call it; `{answer}` in it becomes the name of the class that the
            network finds likeliest in each image, `{0}` that of the first of the `classes`.
        read: from the model's output, or that of `layer`, and the `Network`, to a tensor [batch], one
            element for each image. It works with PyTorch on floats alone.
        layer: the module whose output is read, or its name in `model.named_modules()`; None: the
            model itself. Of a module that runs more than once the last output is read.
        score: whether the elements are class scores, 0..1; these are explained before a softmax or
            sigmoid.
        box: the number of the detection that is asked about, for its class and place to be told.
        classes: those that the label names, by index or name.
    """

    label: str
    read: Callable[[Any, Network], Tensor]
    layer: str | nn.Module | None = None
    score: bool = False
    box: int | None = None
    classes: tuple[int | str, ...] = ()

    def __call__(self, output: Any, network: Network) -> Tensor:
        return self.read(output, network)

    def module(self, network: Network) -> nn.Module | None:
        """The module whose output is read; None for the model itself.

        >>> hysm.targets.channel("features.8", 412).module(network)

        Raises:
            InputError: the network has no such module.
        """
        if self.layer is None or isinstance(self.layer, nn.Module):
            found = self.layer
            if found is not None and all(found is not m for m in network.module.modules()):
                raise InputError(
                    f"The layer {type(found).__name__} is no module of {network.name}: take one from "
                    "model.modules(), or its name."
                )
            return self._hookable(found, network)
        named: dict[str, nn.Module] = dict(network.module.named_modules())
        if self.layer not in named:
            last = [name for name in named if name][-3:]
            raise InputError(
                f"{network.name} has no layer {self.layer!r}: model.named_modules() lists them, "
                f"the last being {', '.join(last) or 'the model itself'}."
            )
        return self._hookable(named[self.layer], network)

    @staticmethod
    def _hookable(module: nn.Module | None, network: Network) -> nn.Module | None:
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"This layer of {network.name} is TorchScript, which doesn't show what it gives: ask for a "
                "class, or explain the model that it was made of."
            )
        return module


def versus(one: int | str | None, other: int | str) -> Target:
    """Why this class and not that one? The score of one class less that of another.

    >>> explanation = explainer("rocket.jpg", hysm.targets.versus("drilling platform", "missile"))

    What speaks for both alike cancels out, and what tells them apart is left: the question to ask of a
    wrong answer, with the right one as the other, and the other way round. Where the other class wins, what speaks
    against this one weighs less, so that what speaks for it can be seen. Classes go by index or name; None is the class that
    the network finds likeliest in each image. The scores are the model's output [batch, classes], or
    its 'logits' or 'out', as they are (axes of one place behind the classes are no matter): a model that ends in a softmax is asked for a difference of probabilities.

    Raises, when it is explained:
        InputError: the model is no classifier, or has no such class, or both are the same.
    """

    read = partial(_difference, one, other)
    if one is None:
        return Target("{answer}, not {0}", read, classes=(_checked(other),))
    return Target("{0}, not {1}", read, classes=(_checked(one), _checked(other)))


def _difference(one: int | str | None, other: int | str, output: Any, network: Network) -> Tensor:
    scores = scores_in(output)
    if isinstance(scores, Tensor) and scores.dim() > 2 and scores.shape[2:].numel() == 1:
        scores = scores.flatten(1)
    if not isinstance(scores, Tensor) or scores.dim() != 2:
        raise InputError(
            f"{network.name} is no classifier whose output is [batch, classes]: give a function of "
            "its output as the target, target=lambda output: output[...]."
        )
    count = scores.shape[1]
    rival = network.class_index(other, count)
    mine = scores.argmax(1) if one is None else [network.class_index(one, count)] * len(scores)
    mine = torch.as_tensor(mine, device=scores.device)
    same = (mine == rival).nonzero().flatten().tolist()
    if same:
        of = f" to image {same[0]}" if len(scores) > 1 else ""
        answer = f"the network's answer{of}" if one is None else "that class"
        raise InputError(
            f"{network.label(rival)} is {answer} itself: name another class to set against it."
        )
    return scores.gather(1, mine[:, None])[:, 0] - scores[:, rival]


def _checked(category: int | str) -> int | str:
    """A class by index or name, so that what is neither is told where it was written."""
    category = plain(category)
    if isinstance(category, bool) or not isinstance(category, (int, str)):
        raise InputError(f"A class goes by its index or its name, and {category!r} is neither.")
    return category


def box(index: int) -> Target:
    """Why this box? The score of a detection, by its number among those that the detector found, from 0.

    >>> explanation = explainer(images, target=hysm.targets.box(0))
    >>> explanation.label[0], explanation.probability[0], explanation.box[0]

    Numbers are those of the detector's own list, which most begin with the most certain box; where it has
    none, as YOLO networks, the most certain is 0. Explained is the class score of the box, before the softmax
    or sigmoid where that is all that came after it. Which boxes were kept, and where they lie, is taken as given on this
    image. Detectors that answer as torchvision's, transformers' and YOLO networks do are read: see
    `howyouseeme.detectors.boxes_in`.

    Raises:
        InputError: the index is no number from 0 on; when it is explained: the model is no such detector, or
            finds fewer boxes.
    """
    if isinstance(index, np.integer):
        index = int(index)
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise InputError(f"Boxes have numbers from 0 on: there is no box {index!r}.")

    return Target(f"box {index}", partial(_score, index), score=True, box=index)


def _score(index: int, output: Any, network: Network) -> Tensor:
    scores = [one.scores for one in boxes_in(output, network, index + 1)]
    for image, kept in enumerate(scores):
        if index >= len(kept):
            place = f" in image {image}" if len(scores) > 1 else ""
            lower = "ask for a lower number, or lower" if len(kept) else "lower"
            raise InputError(
                f"There is no box {index}{place}, where {network.name} keeps {len(kept)}: {lower} its "
                "score threshold."
            )
    return torch.stack([kept[index] for kept in scores])


def region(mask: Tensor | np.ndarray, category: int | str) -> Target:
    """Why is this region sky? The scores of a class, summed over a region.

    >>> sky = torch.zeros(520, 520, dtype=torch.bool)
    >>> sky[:100] = True
    >>> explanation = explainer(images, target=hysm.targets.region(sky, "sky"))

    `mask` [height, width] is true inside of the region, at the size of the model's scores [batch,
    classes, height, width] (or of its input, if that is larger by a whole factor); of a volume [depth, height,
    width] likewise. The scores are the model's output, its 'out' or its 'logits', or the only part of it
    with places. For a mask each, give a list of regions.

    Raises:
        InputError: the mask is no mask, or empty; when it is explained: it does not fit the scores, or
            there is no such class.
    """
    inside = _tensor(np.array(mask, order="C") if isinstance(mask, np.ndarray) else mask)
    if inside.dim() < 1 or inside.dtype not in {torch.bool, torch.uint8}:
        raise InputError(
            f"The mask is a {inside.dtype} tensor of the shape {tuple(inside.shape)}: give a boolean one "
            "[height, width]."
        )
    inside = inside.bool()
    if not bool(inside.any()):
        raise InputError("The mask is empty: no place lies inside of the region.")
    read = partial(_over_region, inside, category)
    return Target("region of {0}", read, classes=(_checked(category),))


def _tensor(given: Any) -> Tensor:
    """A tensor where it is, anything else as one on the CPU, whatever PyTorch's default device is."""
    return given if isinstance(given, Tensor) else torch.as_tensor(given, device="cpu")


def _over_region(inside: Tensor, category: int | str, output: Any, network: Network) -> Tensor:
    scores = _placed(output, inside.dim())
    if scores is None:
        axes = ", ".join(("batch", "classes", *("depth", "height", "width")[-inside.dim() :]))
        raise InputError(
            f"{network.name} answers with {outline(output)}, and not with scores [{axes}] for the places of the "
            f"mask {tuple(inside.shape)}: give a mask for each image in a list of regions, or a function of the "
            "output as the target, target=lambda output: output[...]."
        )
    scores = scores[:, network.class_index(category, scores.shape[1])]
    places = scores.shape[1:]
    steps = [given // size for given, size in zip(inside.shape, places, strict=True)]
    if tuple(size * step for size, step in zip(places, steps, strict=True)) != tuple(inside.shape):
        raise InputError(
            f"The mask has the size {tuple(inside.shape)} and the scores {tuple(places)}: "
            "make it as large as them."
        )
    chosen = inside[tuple(slice(step // 2, None, step) for step in steps)].to(scores.device)
    if not bool(chosen.any()):
        raise InputError("The mask has no place inside of the region at the size of the scores.")
    return scores[:, chosen].sum(1)


def _placed(output: Any, axes: int) -> Tensor | None:
    """The scores [batch, classes, ...] in an output that have so many axes of places."""
    named = (
        [output[name] for name in ("out", "logits") if name in output]
        if isinstance(output, Mapping)
        else []
    )
    found, others = (
        [
            one
            for one in parts
            if isinstance(one, Tensor) and one.dim() == 2 + axes and one.is_floating_point()
        ]
        for parts in (named, pytree.tree_leaves(output))
    )
    if found:
        return found[0]
    return others[0] if len(others) == 1 else None


def alike(embedding: Tensor | np.ndarray, name: str | None = None) -> Target:
    """Why are these two alike? The cosine of an image's embedding and another one.

    >>> with torch.no_grad():
    ...     other = encoder(another)                            # [1, features]
    >>> explanation = explainer(images, hysm.targets.alike(other, "another.jpg"))

    The embedding is the model's output [batch, features], or the part of it that a class would be looked for
    in: `embedding` is one such row, [features] or [1, features], and `name` what pictures call it. To see both
    sides, explain each of two images by the embedding of the other. For an embedding each, give a list.

    Raises:
        InputError: the embedding is no row of numbers, or is 0 throughout; when it is explained: the model
            answers with something else, or with another number of features.
    """
    if not isinstance(embedding, (Tensor, np.ndarray)):
        raise InputError(
            f"An embedding is a tensor, what the network makes of a picture, not a {type(embedding).__name__}."
        )
    given = _tensor(embedding).detach()
    if not given.numel() or (given.dim() > 1 and len(given) > 1):
        raise InputError(
            f"An embedding is one row of features, and this one has the shape {tuple(given.shape)}."
        )
    row = given.flatten().float()
    if not bool(torch.isfinite(row).all()) or not bool(row.any()):
        raise InputError(
            "The embedding holds NaN or infinity, or nothing but 0: nothing is like that."
        )
    label = "likeness" if name is None else f"likeness to {name}"
    return Target(label, partial(_cosine, F.normalize(row, dim=0)))


def _cosine(wanted: Tensor, output: Any, network: Network) -> Tensor:
    features = scores_in(output)
    if features.shape == wanted.shape:  # without the axis of a single image
        features = features[None]
    if features.dim() < 2 or features.shape[1:].numel() != len(wanted):
        raise InputError(
            f"{network.name} answers with {outline(output)}, and the embedding has {len(wanted)} features: "
            "give one that this network made."
        )
    return (F.normalize(features.flatten(1)) * wanted.to(features)).sum(1)


def _features(output: Any, layer: str | nn.Module, network: Network) -> Tensor:
    """The first tensor of floats in what a layer gave."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1:
            return leaf
    raise InputError(
        f"The layer {_name(layer)} of {network.name} makes no tensor [batch, channel, ...]."
    )


def _name(layer: str | nn.Module) -> str:
    return layer if isinstance(layer, str) else type(layer).__name__


def _channel(output: Tensor, index: int, layer: str | nn.Module, network: Network) -> Tensor:
    if not 0 <= index < output.shape[1]:
        raise InputError(
            f"The layer {_name(layer)} of {network.name} has no channel {index}, but {output.shape[1]} "
            f"of them: 0 to {output.shape[1] - 1}."
        )
    return output[:, index]


def neuron(layer: str | nn.Module, channel: int, *position: int) -> Target:
    """What made this neuron fire? One element of a layer's output [batch, channel, ...].

    >>> explanation = explainer(images, target=hysm.targets.neuron("features.8", 412, 3, 4))

    `position` counts from 0 along each axis after the channel (y, x for a picture); without it, the
    strongest place of the channel in each image is taken. The output is read as the layer made it,
    before anything that is done to it in place.

    Raises, when it is explained:
        InputError: the network has no such layer, or the layer no such channel or position.
    """

    place = f" at {', '.join(map(str, position))}" if position else ""
    return Target(
        f"neuron {channel} of {_name(layer)}{place}", partial(_one, layer, channel, position), layer
    )


def _one(
    layer: str | nn.Module,
    channel: int,
    position: tuple[int, ...],
    output: Any,
    network: Network,
) -> Tensor:
    plane = _channel(_features(output, layer, network), channel, layer, network)
    if not position:
        return plane.flatten(1).amax(1) if plane.dim() > 1 else plane
    if len(position) != plane.dim() - 1 or not all(
        0 <= at < size for at, size in zip(position, plane.shape[1:], strict=True)
    ):
        raise InputError(
            f"The layer {_name(layer)} of {network.name} has no position {position}: its output has "
            f"the places {tuple(plane.shape[1:])}."
        )
    for at in position:
        plane = plane[:, at]
    return plane


def channel(layer: str | nn.Module, index: int) -> Target:
    """What does this filter look at? A channel of a layer's output, summed over all its places.

    >>> explanation = explainer(images, target=hysm.targets.channel("features.8", 412))

    Places where the filter is negative count against it; `neuron(layer, channel)` takes its strongest
    place alone.

    Raises, when it is explained:
        InputError: the network has no such layer, or the layer no such channel.
    """

    return Target(f"channel {index} of {_name(layer)}", partial(_whole, layer, index), layer)


def _whole(layer: str | nn.Module, index: int, output: Any, network: Network) -> Tensor:
    plane = _channel(_features(output, layer, network), index, layer, network)
    return plane.flatten(1).sum(1) if plane.dim() > 1 else plane
