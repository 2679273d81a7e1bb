"""From a model and images to explanations: record once, walk back, make maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .backtrack import Plan, plan
from .errors import InputError, ModelError
from .explanation import Explanation, Sample
from .images import Geometry, Preprocess, load_image
from .methods import Method, get_method
from .methods.base import Trail
from .models import Network, load_model
from .tape import Tape, Value, record

__all__ = ["Explainer", "explain"]

#: What can be asked for: nothing (the top class), a class, one a sample, or a function of the output.
Target = None | int | str | Sequence[int | str] | Callable[[Any], Any]


class _Rank:
    """The class of a rank, 0 being the top one."""

    def __init__(self, rank: int) -> None:
        self.rank = rank


def explain(
    model: nn.Module | Network | str,
    images: Any,
    target: Target = None,
    method: str = "evidence",
    **parameters: Any,
) -> Explanation:
    """Explain one batch of images; `Explainer` does the same for many.

    >>> explanation = explain("efficientnet-lite0", "photo.jpg")
    >>> explanation = explain(my_model, torch.rand(8, 3, 224, 224), target=281)

    Arguments, result and errors are those of `Explainer` and of its call.
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
            `load_model` takes.
        method: 'evidence' (default), 'seed' (How You See Me as published), or 'exact'.
        preprocess: how a photo becomes the model's input; that of the `Network` by default.
        classes: names of the classes; those of the `Network` by default.
        device: where to run; where the model is by default.
        parameters: of the method, such as `k` of the seed method.

    The model is left as it was.
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
        if isinstance(model, str):
            model = load_model(model)
        if isinstance(model, nn.Module):
            model = Network(type(model).__name__, _unwrapped(model), None, None)
        if not isinstance(model, Network):
            raise InputError(
                f"A model is an nn.Module, a Network or a name, not a {type(model).__name__}."
            )
        self.network = Network(
            model.name,
            model.module if device is None else model.module.to(device),
            preprocess or model.preprocess,
            tuple(classes) if classes is not None else model.classes,
        )

    def __call__(self, images: Any, target: Target = None) -> Explanation:
        """Explain the answer to `target` on each image.

        >>> explanation = explainer(images, target=[281, 282])

        Args:
            images: a float tensor [batch, channel, ...], ready for the model; or, if the
                preprocessing is known, an image or a list of images (path, bytes, PIL image, array).
            target: None for each image's top class; a class (index or name) for all; one a sample;
                or a function from the model's output to the element that is to be explained, in any
                output structure: a scalar tensor, or one a sample.

        Raises:
            InputError, ImageError: the images or the target can't be used.
            ModelError: the model is in training mode, or answers with NaN.
            UnsupportedCallError: the model makes calls without a rule.
        """
        return self.many(images, [target])[0]

    def top(self, images: Any, k: int = 3) -> list[Explanation]:
        """Explain the k most likely classes of each image, from one recorded pass.

        >>> for explanation in explainer.top("photo.jpg", k=3):
        ...     print(explanation.label[0], explanation.probability[0])
        """
        if k < 1:
            raise InputError(f"top {k} asks for nothing: give 1 or more.")
        return self.many(images, [_Rank(rank) for rank in range(k)])

    def many(self, images: Any, targets: Sequence[Target | _Rank]) -> list[Explanation]:
        """Explain several targets of the same images, from one recorded pass.

        >>> cat, dog = explainer.many("photo.jpg", ["tabby", "golden retriever"])
        """
        inputs, samples = self._prepare(images)
        readers = [target for target in targets if callable(target)]
        tape = self._record(inputs, readers)
        if tape.separable(len(inputs)):
            return self._explain_all(tape, samples, targets)
        # Samples share an axis with something else: one pass for each keeps them apart.
        alone = [
            self._explain_all(self._record(sample.input[None], readers), [sample], targets)
            for sample in samples
        ]
        return [Explanation.join(parts) for parts in zip(*alone, strict=True)]

    # -- in ---------------------------------------------------------------------------------------

    def _prepare(self, images: Any) -> tuple[Tensor, list[Sample]]:
        if isinstance(images, Tensor) and images.is_floating_point() and images.dim() != 3:
            return self._check_tensor(images)
        if isinstance(images, Tensor) and images.dim() == 3 and self.network.preprocess is None:
            return self._check_tensor(images)  # [batch, channel, length]: a 1-d network
        if self.network.preprocess is None:
            raise InputError(
                f"Explaining {_kind(images)} needs to know how the model wants its input: give "
                "preprocess=Preprocess(...), or a float tensor [batch, channel, height, width]."
            )
        many = images if isinstance(images, (list, tuple)) else [images]
        if not many:
            raise InputError("There are no images to explain: the list is empty.")
        tensors, samples = [], []
        for source in many:
            picture = load_image(source)
            tensor, geometry = self.network.preprocess(picture)
            tensor = tensor.to(self._place())
            tensors.append(tensor)
            name = str(source) if isinstance(source, (str, PurePath)) else None
            samples.append(Sample(tensor, geometry, picture, name))
        return torch.stack(tensors), samples

    def _check_tensor(self, images: Tensor) -> tuple[Tensor, list[Sample]]:
        if images.dim() < 2 or not images.numel():
            raise InputError(
                f"The input has the shape {tuple(images.shape)}: a batch has the shape "
                "[batch, channel, height, width], none of them 0."
            )
        if not bool(torch.isfinite(images).all()):
            raise InputError("The input contains NaN or infinity: check how it was loaded.")
        place = self._place()
        if images.device != place:
            raise InputError(
                f"The input is on {images.device} and the model on {place}: "
                "move one of them with .to(device)."
            )
        height, width = images.shape[2:] if images.dim() == 4 else (0, 0)
        geometry = Geometry.identity((height, width)) if images.dim() == 4 else None
        return images, [Sample(image, geometry) for image in images]

    def _place(self) -> torch.device:
        module = self.network.module
        tensors = (*module.parameters(), *module.buffers())
        return tensors[0].device if tensors else torch.device("cpu")

    # -- through ----------------------------------------------------------------------------------

    def _record(self, inputs: Tensor, readers: Sequence[Callable[[Any], Any]]) -> Tape:
        module = self.network.module
        try:
            tape = record(module, [inputs], readers=readers)
        except RuntimeError as error:
            if isinstance(error, ModelError):
                raise
            raise InputError(
                f"The model {self.network.name} can't run on an input of the shape "
                f"{tuple(inputs.shape)} and type {inputs.dtype}: {str(error).splitlines()[0]}"
            ) from error
        _check_finite(tape, module)
        return tape

    def _explain_all(
        self, tape: Tape, samples: list[Sample], targets: Sequence[Target | _Rank]
    ) -> list[Explanation]:
        reads = iter(tape.reads)
        explanations = []
        for target in targets:
            if callable(target):
                start, nodes = _element(next(reads), len(samples))
                classes = None
            else:
                start, nodes, classes = self._classes(tape, target, len(samples))
            with torch.no_grad():
                walked = self.method.walk(plan(tape, start), nodes)
            picture = tape.inputs[0]
            known = [None] * len(samples) if classes is None else classes.tolist()
            explanations.append(
                Explanation(
                    samples=tuple(samples),
                    evidence=self.method.clean(walked.strength[picture].sum(1)),
                    share=walked.share[picture].sum(1),
                    target=tuple(known),
                    label=tuple("" if c is None else self.network.label(c) for c in known),
                    probability=_probabilities(start, classes, len(samples)),
                    model=self.network,
                    method=self.method,
                    walk_again=tuple(
                        partial(self._walk_again, sample, target if callable(target) else c)
                        for sample, c in zip(samples, known, strict=True)
                    ),
                )
            )
        return explanations

    def _walk_again(self, sample: Sample, target: Any) -> tuple[Plan, Trail]:
        """The walk of one sample, with all that it passed; the tape is not kept in between."""
        tape = self._record(sample.input[None], [target] if callable(target) else [])
        if callable(target):
            start, nodes = _element(tape.reads[0], 1)
        else:
            start, nodes, _ = self._classes(tape, target, 1)
        trail = Trail()
        with torch.no_grad():
            way = plan(tape, start)
            self.method.walk(way, nodes, trail)
        return way, trail

    # -- targets ----------------------------------------------------------------------------------

    def _classes(self, tape: Tape, target: Any, batch: int) -> tuple[Value, Tensor, Tensor]:
        """The scores, the flat index of each sample's class in them, and the classes."""
        scores = _scores(tape.output)
        if scores.data.dim() != 2 or scores.shape[0] != batch:
            raise InputError(
                f"The model's output has the shape {tuple(scores.shape)} for {batch} image(s), not "
                "[batch, classes]: is the input [batch, channel, height, width]? For another kind of "
                "output, give a function as the target: target=lambda output: output[...]."
            )
        if isinstance(target, _Rank):
            if target.rank >= scores.shape[1]:
                raise InputError(
                    f"There is no class of rank {target.rank + 1}: the model has "
                    f"{scores.shape[1]} classes."
                )
            order = scores.data.sort(dim=1, descending=True, stable=True).indices
            classes = order[:, target.rank]
        elif target is None:
            classes = scores.data.argmax(1)
        else:
            many = isinstance(target, Sequence) and not isinstance(target, str)
            if isinstance(target, Tensor):
                target, many = target.tolist(), target.dim() > 0
            names = list(target) if many else [target] * batch
            if len(names) != batch:
                raise InputError(f"There are {len(names)} targets for {batch} images.")
            classes = torch.tensor(
                [self._class_index(name, scores.shape[1]) for name in names],
                device=scores.data.device,
            )
        rows = torch.arange(batch, device=scores.data.device)
        return _before_softmax(scores), rows * scores.shape[1] + classes, classes

    def _class_index(self, name: Any, count: int) -> int:
        if isinstance(name, bool) or not isinstance(name, (int, str)):
            raise InputError(f"A target is a class index or name, not {name!r}.")
        index = self.network.class_index(name)
        if not 0 <= index < count:
            raise InputError(
                f"There is no class {index}: the model has {count} classes, 0 to {count - 1}."
            )
        return index


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
    """The class scores in a model's output."""
    if isinstance(output, Value):
        return output
    if isinstance(output, Mapping):
        named = [output[name] for name in ("logits", "out") if name in output]
        found = named or list(output.values())
        if found and isinstance(found[0], Value):
            return found[0]
    if isinstance(output, Sequence) and output and isinstance(output[0], Value):
        return output[0]
    if isinstance(output, Tensor):
        raise ModelError(
            "The model's output does not depend on its input through recorded calls: is it computed "
            "outside of PyTorch (numpy), or from a constant?"
        )
    raise InputError(
        f"There are no class scores in the model's output (a {type(output).__name__}): give a "
        "function as the target: target=lambda output: output[...]."
    )


def _before_softmax(scores: Value) -> Value:
    """The logits, where the model ends with a softmax: it would set every class against all others."""
    while scores.call is not None and scores.call.name in {"aten._softmax", "aten._log_softmax"}:
        scores = scores.call.args[0]
    return scores


def _probabilities(start: Value, classes: Tensor | None, batch: int) -> tuple[float | None, ...]:
    if classes is None:
        return (None,) * batch
    scores = start.data.float()
    if scores.shape[1] == 1:
        return tuple(scores.sigmoid()[:, 0].tolist())
    return tuple(scores.softmax(1).gather(1, classes[:, None])[:, 0].tolist())


def _element(value: Any, batch: int) -> tuple[Value, Tensor]:
    """What a target function returned, as a start and its nodes."""
    if not isinstance(value, Value) or value.numel not in {1, batch}:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Value) else repr(value)
        raise InputError(
            "A target function returns an element of the model's output: a tensor with one element, "
            f"or one a sample; this one returned {found}."
        )
    if value.numel != batch:
        raise InputError(
            f"The target function returned one element for {batch} images: return one a sample, or "
            "explain one image at a time."
        )
    return value, torch.arange(batch, device=value.data.device)


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
