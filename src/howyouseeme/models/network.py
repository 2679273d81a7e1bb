"""A network with what is known about it: how pictures become its input, and its classes' names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import chain
from reprlib import repr
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, ModelError, first_line
from ..images import Preprocess
from ..numbers import plain

_SHOWN = 8


@dataclass(frozen=True)
class Network:
    """A model, ready to be explained.

    >>> network = Network("mine", module.eval(), Preprocess((64, 64)), ("cat", "dog"))
    >>> network.class_index("dog")                           # 1

    - `module`: in eval mode;
    - `preprocess`: how a photo becomes its input; None where that isn't known. It may be given as a function
      from a PIL image to a tensor [channel, height, width]: its `Preprocess.like` is kept;
    - `classes`: names, one for each score in the order of the model's outputs, or of no and yes where there is
      a single score; None where they aren't known. Any sequence of names may be given; a tuple is kept;
    - `static`: whether the module's code makes the same calls for every image of a shape unless the image
      itself decides otherwise, so that explanations may be replayed (see `Explainer`).

    Raises:
        InputError: the preprocessing is none, or the classes are no names.
    """

    name: str
    module: nn.Module
    preprocess: Preprocess | None = None
    classes: tuple[str, ...] | None = None
    static: bool = False

    def __post_init__(self) -> None:
        if self.preprocess is not None and not isinstance(self.preprocess, Preprocess):
            object.__setattr__(self, "preprocess", measured(self.preprocess))
        if self.classes is not None:
            object.__setattr__(self, "classes", _names(self.classes))

    @property
    def photo_input(self) -> Preprocess:
        """How a photo becomes the network's input.

        >>> tensor, geometry = network.photo_input(photo)

        Raises:
            ModelError: that isn't known.
        """
        if self.preprocess is None:
            raise ModelError(
                f"How a photo becomes the input of {self.name} is not known: give "
                "preprocess=howyouseeme.Preprocess(...), or a howyouseeme.Network that has it."
            )
        return self.preprocess

    @property
    def like(self) -> Tensor:
        """A tensor of the type and on the device that the model's input must have.

        >>> tensor = tensor.to(network.like)

        Raises:
            ModelError: the model has no contents yet.
        """
        module = self.module
        tensors = chain(module.parameters(), module.buffers())
        found = next((item for item in tensors if item.is_floating_point()), torch.empty(0))
        if found.is_meta:
            raise ModelError(
                f"The model {self.name} is on the meta device, where tensors have no contents: "
                "load its weights first."
            )
        return found

    def class_index(self, name_or_index: str | int, count: int | None = None) -> int:
        """The index of a class given by its name, a part of it that no other has, or its index.

        >>> network.class_index("tabby"), network.class_index("281"), network.class_index(281)

        Case matters only between names that differ in nothing else. Indices end with the names,
        or with the `count` of the scores where that is given.

        Raises:
            InputError: there is no such class, or more than one.
        """
        wanted = plain(name_or_index)
        if isinstance(wanted, int) and not isinstance(wanted, bool):
            return self._checked(wanted, count)
        if not isinstance(wanted, str):
            raise InputError(f"A class goes by its index or its name, and {wanted!r} is neither.")
        wanted = wanted.strip()
        named = self.class_named(wanted)
        if named is not None:
            return self._checked(named, count)
        if wanted.isdecimal():
            return self._checked(int(wanted), count)
        if self.classes is None:
            raise InputError(
                f"{self.name} has no class names to look {wanted!r} up in; give the class's index."
            )
        inside = [
            index
            for index, name in enumerate(self.classes)
            if wanted and wanted.casefold() in name.casefold()
        ]
        if not inside:
            raise InputError(f"{self.name} has no class {wanted!r}{self._close(wanted)}")
        return self._checked(self._only(inside, wanted), count)

    def class_named(self, name: str) -> int | None:
        """The index of the class of that whole name; None where there is none.

        >>> network.class_named("tabby"), network.class_named("tab")
        (281, None)

        Case matters only between names that differ in nothing else.

        Raises:
            InputError: there is more than one.
        """
        names = self.classes or ()
        same = [index for index, one in enumerate(names) if one == name]
        folded = [index for index, one in enumerate(names) if one.casefold() == name.casefold()]
        return self._only(same or folded, name) if same or folded else None

    def label(self, index: int) -> str:
        """The name of the class at `index`; "class 7" where the network has no names.

        >>> network.label(281)                                   # "tabby"

        Raises:
            InputError: there is no such class.
        """
        self._checked(index)
        return f"class {index}" if self.classes is None else self.classes[index]

    def to(self, device: str | torch.device) -> Network:
        """The network on a device; the module itself is moved there.

        >>> network.to("cuda")

        Raises:
            InputError: the device can't be used.
        """
        try:
            where = torch.device(device)  # a module would also take a type, and change its weights
            return replace(self, module=self.module.to(where))
        except TypeError as error:
            raise InputError(
                f"The device {device} can't be used: give a name of PyTorch's, such as 'cpu' or 'cuda'."
            ) from error
        except (RuntimeError, AssertionError) as error:  # as torch tells it
            raise InputError(f"The device {device} can't be used: {first_line(error)}.") from error

    def _checked(self, index: int, count: int | None = None) -> int:
        if count is None and self.classes is not None:
            count = len(self.classes)
        if index < 0 or (count is not None and index >= count):
            last = "" if count is None else f" to {count - 1}"
            raise InputError(f"{self.name} has no class {index}; indices go from 0{last}.")
        return index

    def _only(self, found: list[int], wanted: str) -> int:
        if len(found) > 1:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise InputError(
                f"{wanted!r} may be {self._listed(found[:_SHOWN])}{more}; "
                "give the whole name or the index."
            )
        return found[0]

    def _close(self, wanted: str) -> str:
        by_name = {name.casefold(): index for index, name in enumerate(self.classes or ())}
        close = get_close_matches(wanted.casefold(), by_name, n=3)
        return (
            f"; did you mean {self._listed([by_name[name] for name in close])}?" if close else "."
        )

    def _listed(self, indices: list[int]) -> str:
        return ", ".join(f"{self.label(index)} ({index})" for index in indices)


def measured(prepare: Any) -> Preprocess:
    """The `Preprocess` of a function, or itself.

    >>> measured(torchvision.transforms.ToTensor())

    Raises:
        InputError: it is neither, or does what `Preprocess.like` can't tell.
    """
    if isinstance(prepare, Preprocess):
        return prepare
    if not callable(prepare):
        raise InputError(
            "preprocess is a howyouseeme.Preprocess, or a function from a PIL image to a tensor "
            f"[channel, height, width], not a {type(prepare).__name__}."
        )
    return Preprocess.like(prepare)


def _names(classes: Any) -> tuple[str, ...]:
    """Names of classes as a tuple."""
    ordered = isinstance(classes, Iterable) and not isinstance(
        classes, (str, Mapping, set, frozenset)
    )
    names = tuple(classes) if ordered else ()
    if names and all(isinstance(name, str) for name in names):
        return names
    raise InputError(
        "classes are the names of the model's classes in order, one for each score, such as "
        f"('cat', 'dog'), not {repr(classes)}."
    )
