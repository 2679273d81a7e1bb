"""What a model is given: tensors that are ready for it, or pictures, made ready and remembered."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeGuard

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from .errors import ImageError, InputError
from .images import Geometry, Source, load_image
from .models import Network

__all__ = ["Batch", "Images", "Sample", "prepare"]

#: A batch ready for the model, several of its inputs, or one picture or several.
Images = Tensor | tuple[Tensor, ...] | Source | Sequence[Source]


@dataclass(frozen=True, eq=False)
class Sample:
    """One image as the model saw it, and where it came from.

    >>> explanation.samples[0].name, explanation.samples[0].size
    ('photo.jpg', (480, 640))

    - `input` [channel, height, width]: what the model was given;
    - `geometry`: where its pixels lie in the user's image; None where the input is no picture;
    - `image`: the user's, and `name`, its path; None where a tensor (or bytes) was given.
    """

    input: Tensor
    geometry: Geometry | None
    image: PIL.Image.Image | None = None
    name: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: the input without the rest of a batch that it is a part of."""
        return vars(self) | {"input": self.input.clone()}

    @property
    def size(self) -> tuple[int, ...]:
        """Height and width of the image that was given, or whatever axes the input has."""
        return self.geometry.image_size if self.geometry else tuple(self.input.shape[1:])


@dataclass(frozen=True)
class Batch:
    """The model's inputs, and what each is of each image."""

    tensors: tuple[Tensor, ...]
    samples: tuple[tuple[Sample, ...], ...]  # by input, then by image
    whole: str | None = None  # the shapes of the batch that this one is a part of

    def __len__(self) -> int:
        return len(self.samples[0])

    def part(self, first: int, size: int = 1) -> Batch:
        """Some of the images, in memory of their own: kernels may round by how it is aligned."""
        here = slice(first, first + size)
        return Batch(
            tuple(tensor[here].clone() for tensor in self.tensors),
            tuple(samples[here] for samples in self.samples),
            self.given,
        )

    @property
    def given(self) -> str:
        """The shapes that were given."""
        return self.whole or ", ".join(str(tuple(item.shape)) for item in self.tensors)

    @property
    def floats(self) -> list[int]:
        """Which of the inputs can be explained: those that are a tape's inputs, in that order."""
        return [j for j, tensor in enumerate(self.tensors) if tensor.is_floating_point()]

    @property
    def main(self) -> int:
        """The first of these with places in it, or else the first."""
        return next((j for j in self.floats if self.tensors[j].dim() > 2), self.floats[0])


def prepare(network: Network, images: Images) -> Batch:
    """A batch for a network, of what a user gave: tensors as they are, or pictures by its preprocessing.

    >>> batch = prepare(load_model("efficientnet-lite0"), ["cat.jpg", "dog.jpg"])

    Raises:
        InputError, ImageError: the images can't be used.
    """
    if _are_inputs(images, network.preprocess is not None):
        return _check_inputs(network, images)
    # A tensor of three axes is a picture, or, where pictures can't be used, the input of a 1-d network.
    known = network.preprocess is not None
    if (
        isinstance(images, Tensor)
        and images.is_floating_point()
        and not (images.dim() == 3 and known)
    ):
        images = _check_tensor(network, images)
        return Batch((images,), (_samples(images),))
    if not isinstance(images, Tensor) and _holds_tensors(images):
        raise InputError(
            f"The input is {_kind(images)} with tensors in it: several inputs go in as one tuple of tensors "
            "and nothing else, each [batch, ...]. With None, numbers or lists among them, give a module that takes "
            "the tensors and calls the model."
        )
    if network.preprocess is None:
        raise InputError(
            f"Explaining {_kind(images)} needs to know how the model wants its input: give "
            "preprocess=Preprocess(...), or a float tensor [batch, channel, height, width]."
        )
    many: Sequence[Any] = images if isinstance(images, (list, tuple)) else [images]
    if isinstance(images, Tensor) and images.dim() == 4 and images.dtype == torch.uint8:
        many = list(images)
    if not many:
        raise InputError("There are no images to explain: the list is empty.")
    tensors, samples = [], []
    like = network.like
    for source in many:
        picture = _load(source)
        tensor, geometry = network.preprocess(picture)
        tensor = tensor.to(like)
        tensors.append(tensor)
        name = str(source) if isinstance(source, (str, PurePath)) else None
        samples.append(Sample(tensor, geometry, picture, name))
    return Batch((torch.stack(tensors),), (tuple(samples),))


def _holds_tensors(images: Any) -> bool:
    """Whether it is a dict of tensors, or a mixture of tensors and what is no picture."""
    if isinstance(images, Mapping):
        return any(isinstance(item, Tensor) for item in images.values())
    if not isinstance(images, (list, tuple)) or not images:
        return False
    tensors = [isinstance(item, Tensor) and item.dim() != 3 for item in images]
    others = [item is None or isinstance(item, (bool, int, float, Mapping)) for item in images]
    return all(tensors) or (any(tensors) and any(others))


def _load(source: Source) -> PIL.Image.Image:
    try:
        return load_image(source)
    except ImageError as error:
        if not isinstance(source, (Tensor, np.ndarray)):
            raise
        raise ImageError(
            f"{error} What is ready for the model goes in as one float tensor [batch, channel, height, "
            "width]: torch.stack(tensors), or torch.from_numpy(array)."
        ) from error


def _check_inputs(network: Network, inputs: tuple[Tensor, ...]) -> Batch:
    device = network.like.device
    for position, tensor in enumerate(inputs):
        if tensor.dim() < 1 or not tensor.numel() or len(tensor) != len(inputs[0]):
            raise InputError(
                f"Input {position} has the shape {tuple(tensor.shape)}: each is [batch, ...], with "
                f"as many samples as the first one, {len(inputs[0]) if inputs[0].dim() else 1}, "
                "and no axis of 0."
            )
        if tensor.device != device:
            raise InputError(
                f"Input {position} is on {tensor.device} and the model on {device}: "
                "move one of them with .to(device)."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"Input {position} contains NaN or infinity: check how it was loaded.")
    if not any(tensor.is_floating_point() and tensor.dim() > 1 for tensor in inputs):
        raise InputError("None of the inputs is of floats [batch, ...], which can be explained.")
    for tensor in inputs:
        _warn_of_axes(tensor)
    inputs = tuple(_own(tensor) for tensor in inputs)
    return Batch(inputs, tuple(map(_samples, inputs)))


def _check_tensor(network: Network, images: Tensor) -> Tensor:
    if images.dim() < 2 or not images.numel():
        raise InputError(
            f"The input has the shape {tuple(images.shape)}: a batch has the shape "
            "[batch, channel, height, width], or what else the model takes, and no axis of 0."
        )
    device = network.like.device
    if images.device != device:
        raise InputError(
            f"The input is on {images.device} and the model on {device}: "
            "move one of them with .to(device)."
        )
    if not bool(torch.isfinite(images).all()):
        raise InputError("The input contains NaN or infinity: check how it was loaded.")
    misfit = network.preprocess and network.preprocess.misfit(images)
    if misfit:
        warnings.warn(
            f"The input's values {misfit} as {network.name} takes them: is it normalised? "
            "Give pictures themselves, or what the network's preprocess makes of them.",
            stacklevel=5,
        )
    _warn_of_axes(images)
    return _own(images)


def _own(tensor: Tensor) -> Tensor:
    """A plain copy: the user's may change before paths are looked up, and be of a class with ways of its own."""
    return tensor.detach().as_subclass(Tensor).clone()


def _warn_of_axes(images: Tensor) -> None:
    """Say so where colours look as if they lay on another axis than that of channels."""
    colours = [axis for axis in range(1, images.dim()) if images.shape[axis] == 3]
    if images.is_floating_point() and images.dim() in {4, 5} and colours and colours[0] > 1:
        warnings.warn(
            f"The input has the shape {tuple(images.shape)}, of which axis 1 is taken for channels, that are "
            f"summed over, and the others for places. If channels are axis {colours[0]}, give a module that "
            "takes [batch, channel, ...] and moves the axes itself.",
            stacklevel=6,
        )


def _are_inputs(images: Any, pictures: bool) -> TypeGuard[tuple[Tensor, ...]]:
    """True for a tuple of tensors for as many inputs; where pictures can be used, it may be of these."""
    if not isinstance(images, tuple) or not all(isinstance(item, Tensor) for item in images):
        return False
    return bool(images) and not (pictures and all(item.dim() == 3 for item in images))


def _samples(images: Tensor) -> tuple[Sample, ...]:
    """Each of a batch; those with two axes of places are pictures."""
    picture = images.dim() == 4
    geometry = Geometry.identity((images.shape[2], images.shape[3])) if picture else None
    return tuple(Sample(image, geometry) for image in images)


def _kind(images: Any) -> str:
    if isinstance(images, Tensor):
        return f"a {images.dtype} tensor of the shape {tuple(images.shape)}"
    name = type(images).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
