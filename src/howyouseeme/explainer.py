"""From a model and images to explanations: record once, walk back, make maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .backtrack import Plan, plan
from .errors import HowYouSeeMeError, InputError, ModelError
from .explanation import Explanation, Sample
from .images import Geometry, Preprocess, Source, load_image
from .methods import Method, get_method
from .methods.base import Trail
from .models import Network, load_model
from .tape import Tape, Value, record

__all__ = ["Explainer", "explain"]

#: A batch ready for the model, or one picture or several.
Images = Tensor | Source | Sequence[Source]

#: What can be asked for: nothing (the top class), a class, one a sample, or a function of the output.
Target = None | int | str | Sequence[int | str] | Tensor | np.ndarray | Callable[[Any], Any]


class _Rank:
    """The class of a rank, 0 being the top one."""

    def __init__(self, rank: int) -> None:
        self.rank = rank


def explain(
    model: nn.Module | Network | str,
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
        model: an nn.Module, a `Network` (a module with its preprocessing and classes), or a name that
            `load_model` takes. What torch.compile or data parallelism wrapped is unwrapped.
        method: 'evidence' (default), 'seed' (How You See Me as published), or 'exact'.
        preprocess: how a photo becomes the model's input; that of the `Network` by default.
        classes: names of the classes, one for each score; those of the `Network` by default.
        device: where to run, the model being moved there; where the model is by default.
        parameters: of the method, such as `k` of the seed method.

    The model is left as it was: its mode, gradients, hooks and buffers.

    Raises:
        InputError: the model is none, or there is no such method, parameter or device.
        ModelError, MissingExtraError: the model of that name can't be loaded.
    """

    def __init__(
        self,
        model: nn.Module | Network | str,
        method: str = "evidence",
        *,
        preprocess: Preprocess | None = None,
        classes: Sequence[str] | None = None,
        device: str | torch.device | None = None,
        **parameters: Any,
    ) -> None:
        self.method: Method = get_method(method, **parameters)
        if preprocess is not None and not isinstance(preprocess, Preprocess):
            raise InputError(
                f"preprocess is a howyouseeme.Preprocess, not a {type(preprocess).__name__}: it has to "
                "know where in the photo each pixel of the input lies. Give its size, mean and std to "
                "howyouseeme.Preprocess(...)."
            )
        if isinstance(model, str):
            model = load_model(model)
        if isinstance(model, nn.Module):
            model = Network(type(_unwrapped(model)).__name__, model, None, None)
        if not isinstance(model, Network):
            raise InputError(
                "A model is an nn.Module, a Network or a name, not "
                f"{f'the class {model.__name__}' if isinstance(model, type) else f'a {type(model).__name__}'}."
            )
        module = _unwrapped(model.module)
        self.network = Network(
            model.name,
            module if device is None else _moved(module, device),
            preprocess or model.preprocess,
            tuple(classes) if classes is not None else model.classes,
        )

    def __call__(self, images: Images, target: Target = None) -> Explanation:
        """Explain the answer to `target` on each image.

        >>> explanation = explainer(images)                        # each image's top class
        >>> explanation = explainer(["cat.jpg", "dog.jpg"], target=["tabby", 207])
        >>> explanation = explainer(images, target=lambda output: output["masks"][:, 3, 20, 20])

        Args:
            images: a float tensor [batch, channel, height, width] ([batch, channel, ...] for networks
                over other axes), ready for the model, on its device; or, if the preprocessing is
                known, a picture or a list of pictures of any sizes (path, bytes, PIL image, array, or
                tensor [3, height, width] of floats in 0..1 or of uint8).
            target: None for each image's top class; a class (index or name) for all; a class for each
                (list, array or tensor); or a function from the model's output, of any structure, to
                the element that is to be explained: a tensor with one element a sample, or with one
                alone, in which case the images are explained one by one. A function may also
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

        Each of the `targets` is what a call takes; returned is one explanation for each. Errors are
        those of a call.

        Where the network mixes the samples of a batch, each sample gets a pass of its own.
        """
        inputs, samples = self._prepare(images)
        targets = [_one_each(target, len(samples)) for target in targets]
        readers = [_reader(target) for target in targets if callable(target)]
        tape = self._record(inputs, readers)
        for read in tape.reads:
            _check_read(read, len(samples))
        explanations = self._explain_all(tape, samples, targets)
        if explanations is not None:
            return explanations
        # Samples share an axis with something else: one pass for each keeps them apart.
        alone = [
            self._explain_alone(tape, readers, i, sample, targets)
            for i, sample in enumerate(samples)
        ]
        return [Explanation.join(parts) for parts in zip(*alone, strict=True)]

    # -- in ---------------------------------------------------------------------------------------

    def _prepare(self, images: Images) -> tuple[Tensor, list[Sample]]:
        # A tensor of three axes is a picture, or, where pictures can't be used, the input of a 1-d network.
        known = self.network.preprocess is not None
        if (
            isinstance(images, Tensor)
            and images.is_floating_point()
            and not (images.dim() == 3 and known)
        ):
            return self._check_tensor(images)
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
            picture = load_image(source)
            tensor, geometry = self.network.preprocess(picture)
            tensor = tensor.to(like)
            tensors.append(tensor)
            name = str(source) if isinstance(source, (str, PurePath)) else None
            samples.append(Sample(tensor, geometry, picture, name))
        return torch.stack(tensors), samples

    def _check_tensor(self, images: Tensor) -> tuple[Tensor, list[Sample]]:
        if images.dim() < 3 or not images.numel():
            raise InputError(
                f"The input has the shape {tuple(images.shape)}: a batch has the shape "
                "[batch, channel, height, width], none of them 0."
            )
        device = self._like().device
        if images.device != device:
            raise InputError(
                f"The input is on {images.device} and the model on {device}: "
                "move one of them with .to(device)."
            )
        if not bool(torch.isfinite(images).all()):
            raise InputError("The input contains NaN or infinity: check how it was loaded.")
        images = (
            images.detach().clone()
        )  # paths are looked up later, when the user's may have changed
        geometry = (
            Geometry.identity((images.shape[2], images.shape[3])) if images.dim() == 4 else None
        )
        return images, [Sample(image, geometry) for image in images]

    def _like(self) -> Tensor:
        """A tensor of the type and on the device that the model's input must have."""
        module = self.network.module
        tensors = (item for item in (*module.parameters(), *module.buffers()))
        found = next((item for item in tensors if item.is_floating_point()), torch.empty(0))
        if found.is_meta:
            raise ModelError(
                f"The model {self.network.name} is on the meta device, where tensors have no contents: "
                "load its weights first."
            )
        return found

    # -- through ----------------------------------------------------------------------------------

    def _record(self, inputs: Tensor, readers: Sequence[Callable[[Any], Any]]) -> Tape:
        module = self.network.module
        try:
            tape = record(module, [inputs], readers=readers)
        except HowYouSeeMeError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            hint = "" if inputs.dim() != 3 else " A single image needs a batch axis: image[None]."
            raise InputError(
                f"The model {self.network.name} can't run on an input of the shape "
                f"{tuple(inputs.shape)} and type {inputs.dtype}: {_first_line(error)}.{hint}"
            ) from error
        _check_finite(tape, module)
        return tape

    def _explain_alone(
        self,
        together: Tape,
        readers: Sequence[Callable[[Any], Any]],
        i: int,
        sample: Sample,
        targets: Sequence[Target | _Rank],
    ) -> list[Explanation]:
        """Sample i in a pass of its own, if that gives the answer that it had among the others."""
        tape = self._record(sample.input[None], readers)
        for read in tape.reads:
            _check_read(read, 1)
        pairs = zip(_values(together.output), _values(tape.output), strict=True)
        if not all(_agrees(batch.data, i, one.data) for batch, one in pairs):
            raise InputError(
                "The model's answer to an image depends on the others in its batch: explain one image "
                "at a time."
            )
        own = [target[i : i + 1] if isinstance(target, list) else target for target in targets]
        explanations = self._explain_all(tape, [sample], own)
        assert explanations is not None  # one sample can't mix
        return explanations

    def _explain_all(
        self, tape: Tape, samples: list[Sample], targets: Sequence[Target | _Rank]
    ) -> list[Explanation] | None:
        """One explanation a target; None if the samples of the batch mix on the way back."""
        reads = iter(tape.reads)
        explanations = []
        for target in targets:
            asked = self._asked(tape, target, reads, len(samples))
            with torch.no_grad():
                way = plan(tape, asked.start, asked.exclusive)
                if not way.separable(len(samples)):
                    return None
                walked = self.method.walk(way, asked.nodes)
            picture = tape.inputs[0]
            if not bool(torch.isfinite(walked.strength[picture]).all()):
                raise ModelError(
                    "The evidence overflows: the model's activations or weights are too large or too "
                    "small for their type; try it in float64, model.double()."
                )
            explanations.append(
                Explanation(
                    samples=tuple(samples),
                    evidence=self.method.clean(walked.strength[picture].sum(1)),
                    share=walked.share[picture].clamp(min=0).sum(1),
                    target=asked.classes,
                    label=tuple("" if c is None else self.network.label(c) for c in asked.classes),
                    probability=asked.probability,
                    model=self.network,
                    method=self.method,
                    walk_again=tuple(
                        partial(self._walk_again, samples, i, target)
                        if c is None  # a function may give each sample of the batch its own element
                        else partial(self._walk_again, [sample], 0, c)
                        for i, (sample, c) in enumerate(zip(samples, asked.classes, strict=True))
                    ),
                )
            )
        return explanations

    def _walk_again(
        self, samples: Sequence[Sample], i: int, target: Any
    ) -> tuple[Plan, Trail, int]:
        """The walk of sample i, with all that it passed; the tape is not kept in between."""
        readers = [_reader(target)] if callable(target) else []
        tape = self._record(torch.stack([sample.input for sample in samples]), readers)
        asked = self._asked(tape, target, iter(tape.reads), len(samples))
        trail = Trail(len(samples))
        with torch.no_grad():
            way = plan(tape, asked.start, asked.exclusive)
            self.method.walk(way, asked.nodes, trail)
        return way, trail, i

    # -- targets ----------------------------------------------------------------------------------

    def _asked(self, tape: Tape, target: Any, reads: Iterator[Any], batch: int) -> _Asked:
        """Where the walk sets out for a target; what a function made of the output is in `reads`."""
        if callable(target):
            target = next(reads)
            if not _is_whole(target):
                nodes = torch.arange(batch, device=target.data.device)
                return _Asked(target, nodes, (None,) * batch, (None,) * batch)
            target = _one_each(target, batch)
        scores = _scores(tape.output)
        if tuple(scores.shape[:1]) != (batch,) or scores.data.dim() > 2:
            raise InputError(
                f"The model's output has the shape {tuple(scores.shape)} for {batch} image(s), not "
                "[batch, classes]: is the input [batch, channel, height, width]? For another kind of "
                "output, give a function as the target: target=lambda output: output[...]."
            )
        logits, squashed_by = _logits(scores)
        table = logits.data.reshape(batch, -1)
        classes = self._classes(table, target)
        exclusive = table.shape[1] > 1 and squashed_by != "aten.sigmoid"
        rows = torch.arange(batch, device=table.device)
        return _Asked(
            logits,
            rows * table.shape[1] + classes,
            tuple(classes.tolist()),
            _probabilities(scores.data.reshape(batch, -1).float(), squashed_by, classes),
            exclusive,
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
            if target.rank >= count:
                raise InputError(
                    f"There is no class of rank {target.rank + 1}: the model has {count} classes."
                )
            return scores.sort(dim=1, descending=True, stable=True).indices[:, target.rank]
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


def _reader(target: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The target function, with an error that says what it was given."""

    def read(output: Any) -> Any:
        try:
            return target(output)
        except Exception as error:
            raise InputError(
                f"The target function failed with {type(error).__name__}: {_first_line(error)}. "
                f"It was given the model's output: {_outline(output)}."
            ) from error

    return read


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


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile and data-parallel wrappers, which hide its calls."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, (nn.DataParallel, nn.parallel.DistributedDataParallel)
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _kind(images: Any) -> str:
    if isinstance(images, Tensor):
        return f"a {images.dtype} tensor of the shape {tuple(images.shape)}"
    return f"a {type(images).__name__}"


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


def _agrees(batch: Tensor, i: int, one: Tensor) -> bool:
    """Whether the i-th answer of a batch is the one given alone, up to rounding."""
    if batch.shape[1:] != one.shape[1:] or one.shape[:1] != (1,) or not one.is_floating_point():
        return True  # no batch axis to compare
    scale = one.float().abs().max().clamp(min=1e-6)
    return bool(((batch[i] - one[0]).float().abs() <= 1e-2 * scale).all())


def _logits(scores: Value) -> tuple[Value, str]:
    """The scores before a softmax or sigmoid at the end, and its call's name; '' if there is none.

    A softmax sets every class against all others, and a sigmoid that is sure of itself is flat.
    """
    value, squashed_by = scores, ""
    while (call := value.call) is not None:
        if call.name in _SQUASHING:
            squashed: Value = call.args[0]
            dims = squashed.data.dim()
            if call.name != "aten.sigmoid" and call.args[1] % dims != dims - 1:
                break  # over something else than classes
            scores, squashed_by = squashed, squashed_by or call.name
        elif call.name not in _UNCHANGING:
            break
        value = call.args[0]
    return scores, squashed_by


_SQUASHING = {"aten._softmax", "aten._log_softmax", "aten.sigmoid"}
_UNCHANGING = {
    f"aten.{name}"
    for name in ("view", "_unsafe_view", "squeeze", "clone", "_to_copy", "alias", "detach", "clamp")
}


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
