"""From a model and images to explanations: record once, walk back, make maps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import PurePath
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .backtrack import Plan, plan
from .errors import HowYouSeeMeError, ImageError, InputError, ModelError
from .explanation import Explanation, Sample
from .images import Geometry, Source, load_image
from .likeness import Likeness, likeness
from .methods import Method, get_method
from .methods.base import Trail, Walked
from .models import Model, Prepare, as_network
from .rules import Refusal, find_rule
from .rules.branches import flip
from .rules.movement import pick
from .tape import Reader, Tape, Value, record
from .targets import Target as NamedTarget

__all__ = ["Explainer", "explain"]

#: A batch ready for the model, several of its inputs, or one picture or several.
Images = Tensor | tuple[Tensor, ...] | Source | Sequence[Source]

#: What can be asked for: nothing (the top class), a class, a box, region, neuron or channel
#: (`howyouseeme.targets`), a function of the output, or one of these for each sample.
Target = (
    None
    | int
    | str
    | NamedTarget
    | Callable[[Any], Any]
    | Sequence[int | str | NamedTarget | Callable[[Any], Any]]
    | Tensor
    | np.ndarray
)


@dataclass(frozen=True)
class _Batch:
    """The model's inputs, and what each is of each image."""

    tensors: tuple[Tensor, ...]
    samples: tuple[tuple[Sample, ...], ...]  # by input, then by image
    whole: _Batch | None = None  # the batch that this one is a part of

    def __len__(self) -> int:
        return len(self.samples[0])

    def part(self, first: int, size: int = 1) -> _Batch:
        """Some of the images, in memory of their own: kernels may round by how it is aligned."""
        here = slice(first, first + size)
        return _Batch(
            tuple(tensor[here].clone() for tensor in self.tensors),
            tuple(samples[here] for samples in self.samples),
            self.whole or self,
        )

    @property
    def given(self) -> str:
        """The shapes that were given."""
        return ", ".join(str(tuple(item.shape)) for item in (self.whole or self).tensors)

    @property
    def floats(self) -> list[int]:
        """Which of the inputs can be explained: those that are a tape's inputs, in that order."""
        return [j for j, tensor in enumerate(self.tensors) if tensor.is_floating_point()]

    @property
    def main(self) -> int:
        """The first of these with places in it, or else the first."""
        return next((j for j in self.floats if self.tensors[j].dim() > 2), self.floats[0])


class _CannotRunError(InputError):
    """The model itself refuses an input."""


class _Rank:
    """The class of a rank, 0 being the top one."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def among(self, count: int) -> int:
        """The rank, if there are so many classes."""
        if self.rank >= count:
            raise InputError(
                f"There is no class of rank {self.rank + 1}: the model has {count} class"
                f"{'' if count == 1 else 'es'}."
            )
        return self.rank


def explain(
    model: Model,
    images: Images,
    target: Target = None,
    method: str = "evidence",
    **parameters: Any,
) -> Explanation:
    """Explain one batch of images.

    >>> explanation = explain("efficientnet-lite0", "photo.jpg")
    >>> explanation = explain(my_model, torch.rand(8, 3, 224, 224), target=281)
    >>> explanation = explain(my_model, "photo.jpg", preprocess=Preprocess((64, 64)), method="seed", k=10)

    To explain more than one batch, make an `Explainer`. Arguments, result and errors are those of
    `Explainer` and of its call; `parameters` are all that `Explainer` takes by name.
    """
    return Explainer(model, method, **parameters)(images, target)


class Explainer:
    """Explains what a model answers, again and again.

    >>> explainer = Explainer(model)                        # an nn.Module in eval mode
    >>> explanation = explainer(images)                     # float tensor [batch, channel, height, width]
    >>> explainer = Explainer("efficientnet-lite0", method="seed", k=10)
    >>> explanation = explainer("photo.jpg", target="tabby")

    Args:
        model: an nn.Module, a `Network` (a module with its preprocessing and classes), a program of
            torch.export, a Keras model on the torch backend, or a name that `load_model` takes. What torch.compile or data parallelism wrapped is unwrapped.
        method: 'evidence' (default), 'seed' (How You See Me as published), or 'exact'.
        preprocess: how a photo becomes the model's input; that of the `Network` by default. A function
            from a PIL image to a tensor [channel, height, width] too, such as torchvision's transforms
            for evaluation, if `Preprocess.like` can tell what it does.
        classes: names of the classes, one for each score, or of no and yes where there is a single
            score; those of the `Network` by default.
        multilabel: whether the classes don't exclude each other. Then none is set against the others, and
            probabilities are sigmoids. Not needed where the model itself ends in a sigmoid.
        device: where to run, the model being moved there; where the model is by default.
        together: whether the images of a batch share a pass, or how many of them: on a CPU together=8
            takes less time for most networks, half for some. PyTorch's kernels round by the size of the
            batch, so that points of nearly the same strength may then change places; alone, each image
            gets to the bit what it gets without the others. None: alone on a CPU, all together
            elsewhere, where many passes cost far more than one.
        parameters: of the method, such as `k` of the seed method.

    The model is left as it was: its mode, gradients, hooks and buffers.

    Raises:
        InputError: the model is none, or there is no such method, parameter or device.
        ModelError, MissingExtraError: the model of that name can't be loaded.
    """

    def __init__(
        self,
        model: Model,
        method: str = "evidence",
        *,
        preprocess: Prepare | None = None,
        classes: Sequence[str] | None = None,
        multilabel: bool = False,
        device: str | torch.device | None = None,
        together: bool | int | None = None,
        **parameters: Any,
    ) -> None:
        together = _plain(together)
        number = isinstance(together, int) and (together is False or together > 0)
        if together is not None and not number:
            raise InputError(
                f"together={together!r} is no number of images that share a pass: give 1 or more, True "
                "for all, or None."
            )
        self.together, self.multilabel = together, multilabel
        self.method: Method = get_method(method, **parameters)
        network = as_network(model, preprocess, classes)
        if device is not None:
            network = replace(network, module=_moved(network.module, device))
        self.network = network

    def __call__(self, images: Images, target: Target = None) -> Explanation:
        """Explain the answer to `target` on each image.

        >>> explanation = explainer(images)                        # each image's top class
        >>> explanation = explainer(["cat.jpg", "dog.jpg"], target=["tabby", 207])
        >>> explanation = explainer(images, target=lambda output: output["masks"][:, 3, 20, 20])

        Args:
            images: a float tensor [batch, channel, height, width] ([batch, channel, ...] for networks
                over other axes), ready for the model, on its device; or, if the preprocessing is
                known, a picture or a list of pictures of any sizes (path, bytes, PIL image, array, or
                tensor [3, height, width] of floats in 0..1 or of uint8). For a model with several
                inputs a tuple of tensors, each [batch, ...]: the explanation is that of the first with
                places in it; where several are of floats, its `inputs` has one for each of them.
            target: None for each image's top class (of a model with a single score the class, or where the
                score is below 0 that it is not); a class (index or name) for all; one of
                `howyouseeme.targets` (a box, region, neuron or channel); a function from the model's
                output, of any structure, to the element that is to be explained: a tensor with one
                element a sample, or with one alone, in which case the images are explained one by
                one; or a list (array, tensor) with one of these for each image. A function may also
                return whole numbers: they are taken as classes.

        Raises:
            InputError, ImageError: the images or the target can't be used.
            ModelError: the model is in training mode, or answers with NaN or infinity.
            UnsupportedCallError: the model makes calls without a rule; the message names all of them.

        A model that ends in a softmax or sigmoid is explained before it, in logits.
        """
        return self.many(images, [target])[0]

    def top(self, images: Images, k: int = 3) -> list[Explanation]:
        """Explain the k most likely classes of each image, from one recorded pass.

        >>> for explanation in explainer.top("photo.jpg", k=3):
        ...     print(explanation.label[0], explanation.probability[0])

        Returns k explanations of the whole batch, the likeliest classes first; ties go to the lower
        index. Errors are those of a call; InputError also where there are fewer than k classes.
        """
        if k < 1:
            raise InputError(f"top {k} asks for nothing: give 1 or more.")
        return self.many(images, [_Rank(rank) for rank in range(k)])

    def many(self, images: Images, targets: Sequence[Target | _Rank]) -> list[Explanation]:
        """Explain several targets of the same images, from one recorded pass.

        >>> cat, dog = explainer.many("photo.jpg", ["tabby", "golden retriever"])

        Each of the `targets` is what a call takes; returned is one explanation for each, what a call
        gives up to rounding. Errors are those of a call.

        Each image gets a pass of its own unless they go together (see `Explainer`), and also then where
        the network mixes the samples of a batch. A function of the output always gets that of the batch.
        """
        batch = self._prepare(images)
        targets = [_one_each(target, len(batch)) for target in targets]
        listed = any(isinstance(target, list) and any(map(callable, target)) for target in targets)
        size = 1 if listed else self._at_once(targets, len(batch))
        if listed or size < len(batch):
            for some in dict.fromkeys((size, 1)):
                try:
                    return self._explain_parts(batch, targets, some)
                except _CannotRunError:
                    if listed or len(batch) == 1:
                        raise  # else it may take so many at once and no other number, as an exported program does
        tape = self._record(batch, targets)
        explanations = self._explain_all(tape, batch, targets)
        if explanations is not None:
            return explanations
        # Samples share an axis with something else: one pass for each keeps them apart.
        return self._explain_parts(batch, targets, 1, tape)

    # -- in ---------------------------------------------------------------------------------------

    def _prepare(self, images: Images) -> _Batch:
        if _are_inputs(images, self.network.preprocess is not None):
            return self._check_inputs(images)
        # A tensor of three axes is a picture, or, where pictures can't be used, the input of a 1-d network.
        known = self.network.preprocess is not None
        if (
            isinstance(images, Tensor)
            and images.is_floating_point()
            and not (images.dim() == 3 and known)
        ):
            images = self._check_tensor(images)
            return _Batch((images,), (_samples(images),))
        if self.network.preprocess is None:
            raise InputError(
                f"Explaining {_kind(images)} needs to know how the model wants its input: give "
                "preprocess=Preprocess(...), or a float tensor [batch, channel, height, width]."
            )
        many: Sequence[Any] = images if isinstance(images, (list, tuple)) else [images]
        if not many:
            raise InputError("There are no images to explain: the list is empty.")
        tensors, samples = [], []
        like = self._like()
        for source in many:
            picture = self._load(source)
            tensor, geometry = self.network.preprocess(picture)
            tensor = tensor.to(like)
            tensors.append(tensor)
            name = str(source) if isinstance(source, (str, PurePath)) else None
            samples.append(Sample(tensor, geometry, picture, name))
        return _Batch((torch.stack(tensors),), (tuple(samples),))

    @staticmethod
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

    def _check_inputs(self, inputs: tuple[Tensor, ...]) -> _Batch:
        device = self._like().device
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
                raise InputError(
                    f"Input {position} contains NaN or infinity: check how it was loaded."
                )
        if not any(tensor.is_floating_point() and tensor.dim() > 1 for tensor in inputs):
            raise InputError(
                "None of the inputs is of floats [batch, ...], which can be explained."
            )
        inputs = tuple(tensor.detach().clone() for tensor in inputs)
        return _Batch(inputs, tuple(map(_samples, inputs)))

    def _check_tensor(self, images: Tensor) -> Tensor:
        if images.dim() < 2 or not images.numel():
            raise InputError(
                f"The input has the shape {tuple(images.shape)}: a batch has the shape "
                "[batch, channel, height, width], or what else the model takes, and no axis of 0."
            )
        device = self._like().device
        if images.device != device:
            raise InputError(
                f"The input is on {images.device} and the model on {device}: "
                "move one of them with .to(device)."
            )
        if not bool(torch.isfinite(images).all()):
            raise InputError("The input contains NaN or infinity: check how it was loaded.")
        misfit = self.network.preprocess and self.network.preprocess.misfit(images)
        if misfit:
            warnings.warn(
                f"The input's values {misfit} as {self.network.name} takes them: is it normalised? "
                "Give pictures themselves, or what the network's preprocess makes of them.",
                stacklevel=5,
            )
        return images.detach().clone()  # the user's may change before paths are looked up

    def _like(self) -> Tensor:
        """A tensor of the type and on the device that the model's input must have."""
        module = self.network.module
        tensors = chain(module.parameters(), module.buffers())
        found = next((item for item in tensors if item.is_floating_point()), torch.empty(0))
        if found.is_meta:
            raise ModelError(
                f"The model {self.network.name} is on the meta device, where tensors have no contents: "
                "load its weights first."
            )
        return found

    # -- through ----------------------------------------------------------------------------------

    def _record(self, batch: _Batch, targets: Sequence[Target | _Rank]) -> Tape:
        module = self.network.module
        readers = [self._reader(target) for target in targets if callable(target)]
        first = batch.tensors[0]
        try:
            tape = record(module, batch.tensors, readers=readers)
        except HowYouSeeMeError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            hint = {
                2: " Pictures have the shape [batch, channel, height, width].",
                3: " A single image needs a batch axis: image[None].",
            }.get(first.dim(), "")
            raise _CannotRunError(
                f"The model {self.network.name} can't run on an input of the shape "
                f"{batch.given} and type {first.dtype}: {_first_line(error)}.{hint}"
            ) from error
        for read, reader in zip(tape.reads, readers, strict=True):
            if read is None and reader.module is not None:
                raise InputError(
                    f"The target can't be read on this input: the layer did not run, a "
                    f"{type(reader.module).__name__} of {self.network.name}."
                )
        _check_finite(tape, module)
        for read in tape.reads:
            _check_read(read, len(batch))
        return tape

    def _at_once(self, targets: Sequence[Target | _Rank], count: int) -> int:
        """How many images of a batch share a pass."""
        if any(callable(target) and not isinstance(target, NamedTarget) for target in targets):
            return count  # functions may have something to say about each sample
        together = self.together
        if together is None:
            together = self._like().device.type != "cpu"
        return count if together is True else max(together, 1)

    def _explain_parts(
        self,
        batch: _Batch,
        targets: Sequence[Target | _Rank],
        size: int,
        together: Tape | None = None,
    ) -> list[Explanation]:
        """So many samples in a pass; one, if all went `together` before, with the answer that it had then."""
        parts = []
        for first in range(0, len(batch), size):
            part = batch.part(first, size)
            own = [_of_part(target, first, size) for target in targets]
            tape = self._record(part, own)
            if together is not None and not _agree(together.output, first, tape.output):
                raise InputError(
                    "The model's answer to an image depends on the others in its batch: explain one "
                    "image at a time."
                )
            explanations = self._explain_all(tape, part, own)
            if explanations is None:  # they mix, which one can't
                explanations = self._explain_parts(part, own, 1, tape)
            parts.append(explanations)
        return [Explanation.join(each) for each in zip(*parts, strict=True)]

    def _explain_all(
        self, tape: Tape, batch: _Batch, targets: Sequence[Target | _Rank]
    ) -> list[Explanation] | None:
        """One explanation a target; None if the samples of the batch mix on the way back."""
        reads = iter(tape.reads)
        every = [self._asked(tape, target, reads, len(batch)) for target in targets]
        alike: dict[tuple[Value, bool], list[int]] = {}  # classes, not the elements of functions
        for i, asked in enumerate(every):
            alike.setdefault((asked.start, asked.exclusive), []).append(i)
        explanations: dict[int, Explanation] = {}
        for start, members in alike.items():
            with torch.no_grad():
                way = plan(tape, *start)
                if not way.separable(len(batch)):
                    return None
                inputs = [
                    (j, given, likeness(way, given))
                    for j, given in zip(batch.floats, tape.inputs, strict=True)
                ]
                walks = self.method.walk_each(way, [every[i].nodes for i in members])
                for i, walked in zip(members, walks, strict=True):
                    found = [
                        self._explanation(batch, *each, walked, every[i], targets[i])
                        for each in inputs
                    ]
                    main = found[batch.floats.index(batch.main)]
                    explanations[i] = replace(main, inputs=tuple(found)) if found[1:] else main
        return [explanations[i] for i in range(len(targets))]

    def _explanation(
        self,
        batch: _Batch,
        j: int,
        given: Value,
        alike: tuple[Likeness | None, ...],
        walked: Walked,
        asked: _Asked,
        target: Any,
    ) -> Explanation:
        """The explanation by input j, which is `given` on the tape."""
        nothing = torch.zeros_like(given.data)
        strength, share = walked.strength.get(given, nothing), walked.share.get(given, nothing)
        if not bool(torch.isfinite(strength).all()):
            raise ModelError(
                "The evidence overflows: the model's activations or weights are too large or too "
                "small for their type; try it in float64, model.double()."
            )
        share = share.clamp(min=0)
        if len(given.shape) > 2:  # places, and channels in each
            strength, share = self.method.clean(strength.sum(1)), share.sum(1)
        elif len(given.shape) == 1:  # a single number for each sample
            strength, share = strength[:, None], share[:, None]
        # Not the target where the classes do: a function can't be pickled.
        again = target if None in asked.classes else list(asked.classes)
        return Explanation(
            samples=batch.samples[j],
            evidence=strength,
            share=share,
            target=asked.classes,
            label=asked.labels or tuple(map(self._label, asked.classes)),
            probability=asked.probability,
            model=self.network,
            method=self.method,
            walk_again=tuple(
                partial(self._walk_again, batch, i, again, c, j)
                for i, c in enumerate(asked.classes)
            ),
            alike=alike,
        )

    def _label(self, index: int | None) -> str:
        return "" if index is None else self.network.label(index)

    def _walk_again(
        self, batch: _Batch, i: int, target: Any, index: int | None, j: int
    ) -> tuple[Plan, Trail, int]:
        """The walk of sample i, with all that it passed, to input j; the tape is not kept meanwhile.

        Alone, if its class `index` is known (a function may give each sample of the batch its own element),
        and if the model takes it alone.
        """
        tape = None
        if index is not None:
            try:
                alone = batch.part(i)
                tape = self._record(alone, [index])
                batch, i, target = alone, 0, index
            except _CannotRunError:
                if len(batch) == 1:
                    raise
        if tape is None:
            tape = self._record(batch, [target])
        asked = self._asked(tape, target, iter(tape.reads), len(batch))
        trail = Trail(len(batch))
        with torch.no_grad():
            way = plan(tape, asked.start, asked.exclusive)
            self.method.walk(way, asked.nodes, trail)
        given = tape.inputs[batch.floats.index(j)]
        trail.evidence.setdefault(given, torch.zeros_like(given.data))
        way.inputs = [given, *(value for value in way.inputs if value is not given)]
        return way, trail, i

    def _reader(self, target: Any) -> Reader:
        """The target function, with an error that says what it was given."""
        named = target if isinstance(target, NamedTarget) else None

        def read(output: Any) -> Any:
            try:
                return target(output) if named is None else named.read(output, self.network)
            except HowYouSeeMeError:
                raise
            except Exception as error:
                raise InputError(
                    f"The target function failed with {type(error).__name__}: {_first_line(error)}. "
                    f"It was given the model's output: {_outline(output)}."
                ) from error

        return Reader(read, None if named is None else named.module(self.network))

    # -- targets ----------------------------------------------------------------------------------

    def _asked(self, tape: Tape, target: Any, reads: Iterator[Any], batch: int) -> _Asked:
        """Where the walk sets out for a target; what a function made of the output is in `reads`."""
        if callable(target):
            read = next(reads)
            if not _is_whole(read):
                start, nodes = read, torch.arange(batch, device=read.device)
                labels, exclusive = ("",) * batch, True
                certainty: tuple[float | None, ...] = (None,) * batch
                if isinstance(target, NamedTarget):
                    labels = self._labels(target.label, tape, batch)
                    if target.score and read.numel == batch:
                        certainty = tuple(read.data.reshape(-1).tolist())
                        start, nodes, exclusive = _class_scores(tape, read, nodes)
                return _Asked(start, nodes, (None,) * batch, certainty, exclusive, labels)
            target = _one_each(read, batch)
        scores = _scores(tape.output)
        # Some networks leave the last convolution's axes of one place: [batch, classes, 1, 1].
        places = tuple(scores.shape[2:])
        # Others squeeze away the batch of a single picture.
        alone = batch == 1 and len(scores.shape) == 1 and tape.inputs[0].data.dim() > 3
        if not alone and (tuple(scores.shape[:1]) != (batch,) or places not in ((), (1, 1))):
            raise InputError(
                f"The model's output has the shape {tuple(scores.shape)} for {batch} image(s), not "
                "[batch, classes]: is the input [batch, channel, height, width]? For another kind of "
                "output, give a function as the target: target=lambda output: output[...]."
            )
        logits, squashed_by = _logits(scores)
        table = logits.data.reshape(batch, -1)
        if table.shape[1] == 1:
            return self._yes_or_no(tape, logits, target, scores, squashed_by)
        classes = self._classes(table, target)
        told = scores.data.reshape(batch, -1).float()
        if self.multilabel and not squashed_by:
            told, squashed_by = told.sigmoid(), "aten.sigmoid"
        exclusive = squashed_by != "aten.sigmoid"
        rows = torch.arange(batch, device=table.device)
        return _Asked(
            logits,
            rows * table.shape[1] + classes,
            tuple(classes.tolist()),
            _probabilities(told, squashed_by, classes),
            exclusive,
        )

    def _labels(self, label: str, tape: Tape, batch: int) -> tuple[str, ...]:
        """That of a `howyouseeme.targets` for each image, the likeliest class being named in it."""
        if "{answer}" not in label:
            return (label,) * batch
        likeliest = _scores(tape.output).data.reshape(batch, -1).argmax(1)
        return tuple(label.replace("{answer}", self._label(c)) for c in likeliest.tolist())

    def _yes_or_no(
        self, tape: Tape, logits: Value, target: Any, scores: Value, squashed_by: str
    ) -> _Asked:
        """The same where there is but one score: below 0 the answer is no, and that is explained.

        Two class names are those of no and yes. With one, or none, the class itself can be asked for too.
        """
        table = logits.data.reshape(-1, 1)
        batch, names = len(table), self.network.classes
        two = names is not None and len(names) == 2
        if names is not None and not two:
            self._classes(table, 0)  # refuses more names than these
        if target is None or isinstance(target, _Rank):
            rank = 0 if target is None else target.among(2 if two else 1)
            yes = (table[:, 0] >= 0) ^ (rank == 1)
        elif two:
            wanted = target if isinstance(target, list) else [target] * batch
            yes = torch.tensor([self._class(item, 2) == 1 for item in wanted], device=table.device)
        else:
            yes = self._classes(table, target) == 0
        certain = _probabilities(
            scores.data.reshape(batch, 1).float(),
            squashed_by,
            torch.zeros_like(yes, dtype=torch.long),
        )
        labels, classes = [], []
        for answer in yes.tolist():
            classes.append(int(answer) if two else 0 if answer else None)
            labels.append(self._label(classes[-1]) if two or answer else f"not {self._label(0)}")
        start = logits if bool(yes.all()) else flip(tape, logits, ~yes)
        return _Asked(
            start,
            torch.arange(batch, device=table.device),
            tuple(classes),
            tuple(p if answer else 1 - p for p, answer in zip(certain, yes.tolist(), strict=True)),
            False,
            tuple(labels),
        )

    def _classes(self, scores: Tensor, target: Any) -> Tensor:
        """Each sample's class [batch], given its scores [batch, classes]."""
        batch, count = scores.shape
        names = self.network.classes
        if names is not None and len(names) != count:
            raise InputError(
                f"{self.network.name} has {len(names)} class names and {count} scores: "
                "give classes=[...] with one name for each."
            )
        if isinstance(target, _Rank):
            rank = target.among(count)
            return scores.sort(dim=1, descending=True, stable=True).indices[:, rank]
        if target is None:
            return scores.argmax(1)
        wanted = target if isinstance(target, list) else [target] * batch
        return torch.tensor([self._class(item, count) for item in wanted], device=scores.device)

    def _class(self, name: Any, count: int) -> int:
        name = _plain(name)
        if isinstance(name, bool) or not isinstance(name, (int, str)):
            raise InputError(
                f"A target is None, a class (index or name), one for each image, or a function of the "
                f"model's output, not {name!r}."
            )
        index = self.network.class_index(name) if isinstance(name, str) else name
        if not 0 <= index < count:
            raise InputError(
                f"There is no class {index}: {self.network.name} has {count} classes, 0 to {count - 1}."
            )
        return index


class _Asked(NamedTuple):
    """A target, found on a tape: where the walk sets out, and what is known about each sample's."""

    start: Value
    nodes: Tensor  # [batch], flat indices into the start
    classes: tuple[int | None, ...]
    probability: tuple[float | None, ...]
    exclusive: bool = True  # softmax, not sigmoids
    labels: tuple[str, ...] | None = None  # where there is no class that has one


def _one_each(target: Any, batch: int) -> Any:
    """Several classes as a list, one for each sample; anything else as it is."""
    target = _plain(target)
    if not isinstance(target, Sequence) or isinstance(target, str):
        return target
    if len(target) != batch:
        raise InputError(
            f"There are {len(target)} targets for {batch} image(s): give one for each, or one for all."
        )
    return list(target)


def _of_part(target: Any, first: int, size: int) -> Any:
    """The target of some of the images, for a batch of them."""
    if not isinstance(target, list):
        return target
    return target[first] if callable(target[first]) else target[first : first + size]


def _outline(output: Any) -> str:
    """The structure of an output: tensor [2, 10]"""
    if isinstance(output, (Tensor, Value)):
        return f"tensor {list(output.shape)}"
    if isinstance(output, Mapping):
        inside = ", ".join(f"{name!r}: {_outline(item)}" for name, item in output.items())
        return f"{type(output).__name__} {{{inside}}}"
    if isinstance(output, (list, tuple)):
        return f"{type(output).__name__} ({', '.join(map(_outline, output))})"
    return type(output).__name__


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _is_whole(item: Any) -> bool:
    """True for a class index or a tensor of them."""
    if isinstance(item, Tensor):
        return not (item.is_floating_point() or item.is_complex() or item.dtype == torch.bool)
    return isinstance(item, int) and not isinstance(item, bool)


def _plain(item: Any) -> Any:
    """Python's numbers and lists instead of a tensor's or numpy's."""
    return item.tolist() if isinstance(item, (Tensor, np.ndarray, np.generic)) else item


def _moved(module: nn.Module, device: str | torch.device) -> nn.Module:
    try:
        return module.to(device)
    except (RuntimeError, AssertionError) as error:  # torch's ways to say that there is no such one
        raise InputError(f"The device {device} can't be used: {_first_line(error)}.") from error


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


def _scores(output: Any) -> Value:
    """The class scores in a model's output: the output itself, its 'logits' or 'out', or all it has."""
    if isinstance(output, Mapping):
        named = [output[name] for name in ("logits", "out") if name in output]
        output = named[0] if named else list(output.values())
    if isinstance(output, Sequence) and len(output) == 1:
        output = output[0]
    if isinstance(output, Value):
        return output
    if isinstance(output, Tensor):
        raise ModelError(
            "The model's output does not depend on its input through recorded calls: is it computed "
            "outside of PyTorch (numpy), or from a constant?"
        )
    raise InputError(
        f"Which part of the model's output are the class scores? It is {_outline(output)}: give a "
        "function as the target: target=lambda output: output[...]."
    )


def _values(output: Any) -> list[Value]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Value)]


def _agree(together: Any, i: int, alone: Any) -> bool:
    """Whether the i-th answer of a batch is the one given alone, up to rounding."""
    if isinstance(together, Sequence) and len(alone) == 1 < len(together):  # one answer an image
        pairs = zip_longest(_values(together[i]), _values(alone[0]))
        return all(b is not None and a is not None and _close(a.data, b.data) for a, b in pairs)
    return all(
        _close(batch.data[i], one.data[0])
        for batch, one in zip(_values(together), _values(alone), strict=True)
        if batch.shape[1:] == one.shape[1:] and one.shape[:1] == (1,)  # else there is no batch axis
    )


def _close(batch: Tensor, one: Tensor) -> bool:
    if batch.shape != one.shape:
        return False
    if not one.is_floating_point() or not one.numel():
        return True
    scale = one.float().abs().max().clamp(min=1e-6)
    return bool(((batch - one).float().abs() <= 1e-2 * scale).all())


def _before_squashing(scores: Value, nodes: Tensor) -> tuple[Value, Tensor, str]:
    """Where scores were before a softmax or sigmoid, and its call's name; '' if there was none.

    A softmax sets every class against all others, and a sigmoid that is sure of itself is flat.
    Between the two the scores may only have been moved, or clamped.
    """
    start, chosen, squashed_by = scores, nodes, ""
    found: tuple[Value, Tensor] | None = scores, nodes
    while found is not None and (call := found[0].call) is not None:
        value, nodes = found
        if call.name in _SQUASHING:
            squashed: Value = call.args[0]
            dims = len(squashed.shape)
            if call.name != "aten.sigmoid" and call.args[1] % dims != dims - 1:
                break  # over something else than classes
            start, chosen, squashed_by = squashed, nodes, squashed_by or call.name
            found = start, nodes
        else:
            found = _moved_from(value, nodes)
    return start, chosen, squashed_by


_SQUASHING = {"aten._softmax", "aten._log_softmax", "aten.sigmoid"}


def _moved_from(value: Value, nodes: Tensor) -> tuple[Value, Tensor] | None:
    """The value that these elements were only moved (or clamped) from, and where they are in it."""
    call = value.call
    assert call is not None
    find = find_rule(call.name)
    try:
        step = find(call, value) if find is not None else None
    except Refusal:
        step = None
    for source, link in step.links if step is not None else ():
        if not link.one_to_one:
            continue
        index = link.edges(nodes).index
        if bool((index < 0).any()):
            continue
        if call.name == "aten.clamp" or torch.equal(value.flat[nodes], source.flat[index]):
            return source, index
    return None


def _logits(scores: Value) -> tuple[Value, str]:
    """The table of scores [batch, classes] before a softmax or sigmoid at the end, and its call."""
    nodes = torch.arange(scores.numel, device=scores.device)
    start, found, squashed_by = _before_squashing(scores, nodes)
    same = start.numel == scores.numel and torch.equal(found, nodes)
    return (start, squashed_by) if same else (scores, "")


def _class_scores(tape: Tape, scores: Value, nodes: Tensor) -> tuple[Value, Tensor, bool]:
    """Where scores [batch] of detections were logits, at which nodes, and whether of a softmax."""
    start, found, squashed_by = _before_squashing(scores, nodes)
    if squashed_by in {"", "aten.sigmoid"}:
        return start, found, False
    # A softmax has one row of classes for each detection: only theirs stand against each other.
    classes = start.shape[-1]
    first = torch.div(found, classes, rounding_mode="floor") * classes
    rows = first[:, None] + torch.arange(classes, device=found.device)
    picked = pick(tape, start, rows)
    return picked, nodes * classes + found % classes, True


def _probabilities(scores: Tensor, squashed_by: str, classes: Tensor) -> tuple[float, ...]:
    """Of each sample's class, from what the model says: probabilities as they are, or logits."""
    chosen = scores.gather(1, classes[:, None])[:, 0]
    told = bool((scores >= 0).all()) and torch.allclose(
        scores.sum(1), torch.ones_like(chosen), atol=1e-3
    )
    if squashed_by == "aten._log_softmax":
        chosen = chosen.exp()
    elif squashed_by or (scores.shape[1] > 1 and told):
        pass
    elif scores.shape[1] == 1:
        chosen = chosen.sigmoid()
    else:
        chosen = scores.softmax(1).gather(1, classes[:, None])[:, 0]
    return tuple(chosen.tolist())


def _check_read(read: Any, batch: int) -> None:
    """Whether a target function returned something that can be explained."""
    if _is_whole(read) or (isinstance(read, Value) and read.numel in {1, batch}):
        if isinstance(read, Value) and not bool(torch.isfinite(read.data).all()):
            raise InputError("The target function returned NaN or infinity for this input.")
        return
    found = f"a tensor {list(read.shape)}" if isinstance(read, (Value, Tensor)) else repr(read)
    constant = " that does not depend on the input" if isinstance(read, Tensor) else ""
    raise InputError(
        "A target function returns elements of the model's output, one for each image or one alone: "
        f"for {batch} image(s) this one returned {found}{constant}. "
        "For example: target=lambda output: output[:, 281]."
    )


def _check_finite(tape: Tape, module: nn.Module) -> None:
    """Say where NaN or infinity comes from, if the answer has any."""
    last = [value for value in pytree.tree_leaves(tape.output) if isinstance(value, Value)]
    if all(bool(torch.isfinite(value.data).all()) for value in last):
        return
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"The model's weight {name} contains NaN or infinity: load it again.")
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point() and not bool(torch.isfinite(buffer).all()):
            raise ModelError(f"The model's buffer {name} contains NaN or infinity: load it again.")
    for value in tape.values:
        if not value.data.is_floating_point() or bool(torch.isfinite(value.data).all()):
            continue
        assert value.call is not None
        raise ModelError(
            f"The model's answer contains NaN or infinity, first made by {value.call.describe()}: "
            "is the input normalised as the model expects?"
        )
