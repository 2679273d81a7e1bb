"""From a model and images to explanations: record once, walk back, make maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import backtrack
from .asking import Asked, Asker, Rank, Target, check_read, one_each
from .errors import HowYouSeeMeError, InputError
from .explanation import Explanation
from .forward import CannotRunError, check_finite, forward
from .inputs import Batch, Images, Sample, prepare
from .layers import Walk
from .methods import Method, get_method
from .methods.base import Trail
from .models import Model, Prepare, as_network
from .numbers import plain
from .regions import Box
from .replay import Replays, Way, makes_graphs
from .scores import recorded_scores
from .tape import Tape, Value
from .targets import Target as NamedTarget
from .walks import Seen, walk_back

__all__ = ["Explainer", "explain"]

#: After so many images of a kind a replay is prepared unasked: so many take about the time of that.
_WORTHWHILE = 8

#: What a score may differ by when it is asked for again, of the largest: kernels round by the batch.
_SAME = 1e-2


def explain(
    model: Model,
    images: Images,
    target: Target = None,
    method: str | Method = "evidence",
    **parameters: Any,
) -> Explanation:
    """Explain one batch of images.

    >>> explanation = explain("efficientnet-lite0", "photo.jpg")
    >>> explanation = explain(my_model, torch.rand(8, 3, 224, 224), target=281)
    >>> explanation = explain(my_model, "photo.jpg", preprocess=Preprocess((64, 64)), method="seed", k=10)

    `images` are a float tensor [batch, channel, height, width], ready for the model; or, if the preprocessing is
    known, a picture or a list of pictures (path, bytes, PIL image, array, tensor). To explain more than one
    batch, make an `Explainer`. Arguments and result are those of `Explainer` and of its call; `parameters` are
    all that `Explainer` takes by name.

    Raises:
        InputError, ImageError: the images, the target or a parameter can't be used.
        ModelError, MissingExtraError: the model of that name can't be loaded; ModelError also where it is in
            training mode, or answers with NaN or infinity.
        UnsupportedCallError: the model makes calls without a rule; the message names all of them.
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
            torch.export, a Keras model on the torch backend, or a name that `load_model` takes. What
            torch.compile or data parallelism wrapped is unwrapped.
        method: 'evidence' (default), 'seed' (How You See Me as published), or 'exact'; or one of
            `howyouseeme.methods`, such as `Evidence(nodes=2000)`.
        preprocess: how a photo becomes the model's input; that of the `Network` by default. A function
            from a PIL image to a tensor [channel, height, width] too, such as torchvision's transforms
            for evaluation, or an image processor of transformers, if `Preprocess.like` can tell what it does.
        classes: names of the classes, one for each score, or of no and yes where there is a single
            score; those of the `Network` by default.
        multilabel: whether the classes don't exclude each other. Then none is set against the others, and
            probabilities are sigmoids. Not needed where the model itself ends in a sigmoid.
        device: where to run, the model being moved there; where the model is by default.
        together: how many images of a batch share a pass: a number, True for all, False for one each. None:
            one each on a CPU, all elsewhere, where many passes cost far more than one. On a CPU together=8
            takes less time for most networks (docs/benchmarks/speed.md). Alone, each image gets to the bit
            what it gets without the others; together, points of nearly the same strength may change places,
            for PyTorch's kernels round by the size of the batch. None also looks once, by a pass over two
            images, whether a model's answers to images of a batch are those to each alone.
        replay: True: record the calls of one image and repeat them for further images of the same shape: the
            same results in less time (docs/benchmarks/replay.md; on an NVIDIA GPU as CUDA graphs, which
            keep the memory of what they make, and not by methods that choose nodes). The second image is
            slow (it is traced). For models whose code makes the same calls for every image; weights and
            layers may change. Where contents decide, an image that differs is explained as usual, and a
            warning says where nothing can be replayed. False: every image is explained as usual. None: for
            what `load_model` loaded, after eight images.
        parameters: of the method, such as `k` of the seed method.

    The model is left as it was: its mode, gradients, hooks and buffers.

    Raises:
        InputError: the model is none, or there is no such method, parameter or device.
        ModelError, MissingExtraError: the model of that name can't be loaded.
    """

    def __init__(
        self,
        model: Model,
        method: str | Method = "evidence",
        *,
        preprocess: Prepare | None = None,
        classes: Sequence[str] | None = None,
        multilabel: bool = False,
        device: str | torch.device | None = None,
        together: bool | int | None = None,
        replay: bool | None = None,
        **parameters: Any,
    ) -> None:
        together = plain(together)
        number = isinstance(together, int) and (together is False or together > 0)
        if together is not None and not number:
            raise InputError(
                f"together={together!r} is no number of images that share a pass: give 1 or more, True "
                "for all, or None."
            )
        if replay not in (True, False, None):
            raise InputError(f"replay={replay!r} is none of True, False and None.")
        self.together, self.multilabel = together, multilabel
        self.method: Method = get_method(method, **parameters)
        network = as_network(model, preprocess, classes)
        if device is not None:
            network = network.to(device)
        self.network, self._asker = network, Asker(network, multilabel)
        self._apart = False  # known to answer to samples of a batch as to each alone
        self._replays = None
        if network.static if replay is None else replay:
            asked = replay is not None
            self._replays = Replays(usual=1 if asked else _WORTHWHILE, warn=asked)

    def __call__(self, images: Images, target: Target = None) -> Explanation:
        """Explain the answer to `target` on each image.

        >>> explanation = explainer(images)                        # each image's top class
        >>> explanation = explainer(["cat.jpg", "dog.jpg"], target=["tabby", 207])
        >>> explanation = explainer(images, target=lambda output: output["masks"][:, 3, 20, 20])

        Args:
            images: a float tensor [batch, channel, height, width] ([batch, channel, ...] for networks
                over other axes), ready for the model, on its device; or, if the preprocessing is
                known, a picture or a list of pictures of any sizes (path, bytes, PIL image, array, or
                tensor [3, height, width] of floats in 0..1 or of uint8; of uint8 also a batch). For a model with several
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
        k = plain(k)
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InputError(f"top {k} asks for nothing: give 1 or more.")
        return self.many(images, [Rank(rank) for rank in range(k)])

    def many(self, images: Images, targets: Sequence[Target | Rank]) -> list[Explanation]:
        """Explain several targets of the same images, from one recorded pass.

        >>> cat, dog = explainer.many("photo.jpg", ["tabby", "golden retriever"])

        Each of the `targets` is what a call takes; returned is one explanation for each, what a call
        gives up to rounding. Errors are those of a call.

        Each image gets a pass of its own unless they go together (see `Explainer`), and also then where
        the network mixes the samples of a batch. A function of the output always gets that of the batch.
        """
        targets = plain(targets)
        if isinstance(targets, str) or not isinstance(targets, Sequence):
            raise InputError(f"Several targets are a list of them: give [{targets!r}].")
        batch = prepare(self.network, images)
        targets = [one_each(target, len(batch)) for target in targets]
        listed = any(isinstance(target, list) and any(map(callable, target)) for target in targets)
        size = 1 if listed else self._at_once(targets, len(batch))
        if listed or size < len(batch):
            for some in dict.fromkeys((size, 1)):
                try:
                    return self._explain_parts(batch, targets, some)
                except CannotRunError:
                    if listed or len(batch) == 1:
                        raise  # else it may take so many at once and no other number, as an exported program does
        explanations = self._replayed(batch, targets)
        if explanations is None:
            tape = self._record(batch, targets)
            explanations = self._explain_all(tape, batch, targets)
            if explanations is None:
                # Samples share an axis with something else: one pass for each keeps them apart.
                return self._explain_parts(batch, targets, 1, tape)
        return explanations

    # -- through ----------------------------------------------------------------------------------

    def _record(self, batch: Batch, targets: Sequence[Target | Rank]) -> Tape:
        readers = [self._asker.reader(target) for target in targets if callable(target)]
        tape = forward(self.network, batch.tensors, readers, batch.given)
        check_finite(tape, self.network, tape.output)
        for read, reader in zip(tape.reads, readers, strict=True):
            if read is None and reader.module is not None:
                raise InputError(
                    f"The target can't be read on this input: the layer did not run, a "
                    f"{type(reader.module).__name__} of {self.network.name}."
                )
        for read in tape.reads:
            check_read(read, len(batch))
        return tape

    def _at_once(self, targets: Sequence[Target | Rank], count: int) -> int:
        """How many images of a batch share a pass."""
        if any(callable(target) and not isinstance(target, NamedTarget) for target in targets):
            return count  # functions may have something to say about each sample
        together = self.together
        if together is None:
            together = self.network.like.device.type != "cpu"
        return count if together is True else max(together, 1)

    def _pair(self, batch: Batch) -> Tape | None:
        """What the model answers to the first two samples together, to hold against its answers to each alone.

        Asked for once. Photos are samples each, however a batch of them would be answered, and so is what
        goes alone by wish.
        """
        photos = batch.samples[0][0].image is not None
        if self._apart or self.together is not None or len(batch) == 1 or photos:
            return None
        try:
            return forward(self.network, batch.part(0, 2).tensors)
        except Exception:  # it takes samples one by one, or in other numbers
            self._apart = True
            return None

    def _check_apart(self, together: Tape, i: int, part: Batch, alone: Tape) -> None:
        """Refuse a model that answers otherwise to sample i of a batch than to it alone."""
        if _agree(together, i, alone) is not False:
            return
        again = self._record(part, []).output
        pairs = zip_longest(_values(again), _values(alone.output))
        if all(a is not None and b is not None and torch.equal(a.data, b.data) for a, b in pairs):
            # Else it draws random numbers, and answers otherwise to anything.
            raise InputError(
                "The model's answer to an image depends on the others in its batch (batch norm without "
                "running statistics, say, or a bag of images that is one sample): explain one image at a time, "
                "together=1; or of a bag, give a module that takes [1, images, channel, height, width], and "
                "gives x[0] to the model."
            )

    def _explain_parts(
        self,
        batch: Batch,
        targets: Sequence[Target | Rank],
        size: int,
        together: Tape | None = None,
    ) -> list[Explanation]:
        """So many samples in a pass; one, if all went `together` before, with the answer that it had then."""
        parts = []
        pair = self._pair(batch) if together is None else None
        for first in range(0, len(batch), size):
            part = batch.part(first, size)
            own = [_of_part(target, first, size) for target in targets]
            explanations = self._replayed(part, own) if together is None else None
            tape = self._record(part, own) if explanations is None else None
            if (held := together or pair) is not None:
                self._check_apart(held, first, part, tape or self._record(part, []))
            if pair is not None and first == 1:  # let go of: it holds all activations
                pair, self._apart = None, True
            if tape is not None:
                explanations = self._explain_all(tape, part, own)
            if explanations is None:  # they mix, which one can't
                explanations = self._explain_parts(part, own, 1, tape)
            parts.append(explanations)
        return [Explanation.join(each) for each in zip(*parts, strict=True)]

    def _replayed(self, batch: Batch, targets: Sequence[Target | Rank]) -> list[Explanation] | None:
        """The explanations of one pass, if it was to be replayed and can be."""
        if self._replays is None:
            return None
        way = Way(
            lambda: self._record(batch, targets),
            lambda tape: self._find(tape, targets, len(batch)),
            lambda tape, asked: self._viewed(tape, asked, batch),
        )
        found = self._replays(self.network.module, self.method, batch.tensors, targets, way)
        return None if found is None else self._explanations(batch, targets, *found)

    def _viewed(self, tape: Tape, asked: Sequence[Asked], batch: Batch) -> list[list[Seen]] | None:
        """What is seen, on a GPU with what is drawn of it: to start these calls takes longer than to make them."""
        seen = walk_back(self.method, tape, asked, len(batch))
        padded = any(
            one.geometry is not None and one.geometry.pads for one in chain(*batch.samples)
        )
        if seen is None or padded or not makes_graphs(tape.inputs[0].device):
            return seen
        return [[item.viewed(self.method) for item in each] for each in seen]

    def _find(self, tape: Tape, targets: Sequence[Target | Rank], batch: int) -> list[Asked]:
        """What the targets ask for on a tape."""
        reads = iter(tape.reads)
        return [self._asker.find(tape, target, reads, batch) for target in targets]

    def _explain_all(
        self, tape: Tape, batch: Batch, targets: Sequence[Target | Rank]
    ) -> list[Explanation] | None:
        """One explanation a target; None if the samples of the batch mix on the way back."""
        asked = self._find(tape, targets, len(batch))
        seen = walk_back(self.method, tape, asked, len(batch), spend=True)
        return None if seen is None else self._explanations(batch, targets, asked, seen)

    def _explanations(
        self,
        batch: Batch,
        targets: Sequence[Target | Rank],
        asked: Sequence[Asked],
        seen: Sequence[Sequence[Seen]],
    ) -> list[Explanation]:
        """One a target, of what each of the inputs shows of it."""
        explanations = []
        for target, one, each in zip(targets, asked, seen, strict=True):
            pairs = zip(batch.floats, each, strict=True)
            found = [self._explanation(batch, j, item, one, target) for j, item in pairs]
            main = found[at := batch.floats.index(batch.main)]
            if found[1:]:
                main = replace(main, inputs=tuple(found))._showing(each[at].views)
            explanations.append(main)
        return explanations

    def _explanation(
        self, batch: Batch, j: int, seen: Seen, asked: Asked, target: Any
    ) -> Explanation:
        """The explanation by input j."""
        # Not the target where the classes do: a function can't be pickled.
        again = target if None in asked.classes else list(asked.classes)
        made = Explanation(
            samples=batch.samples[j],
            evidence=seen.evidence,
            share=seen.share,
            target=asked.classes,
            label=asked.labels or tuple(map(self._asker.label, asked.classes)),
            probability=asked.probability,
            network=self.network,
            method=self.method,
            walk_again=tuple(
                partial(self._walk_again, batch, i, again, c, j, score)
                for i, (c, score) in enumerate(zip(asked.classes, asked.scores, strict=True))
            ),
            alike=seen.alike,
            box=tuple(map(_on_image, asked.boxes or (None,) * len(batch), batch.samples[j])),
        )
        return made._showing(seen.views)

    def _walk_again(
        self, batch: Batch, i: int, target: Any, index: int | None, j: int, score: float
    ) -> Walk:
        """The walk of sample i to input j; the tape is not kept meanwhile. It had this `score`.

        Alone, if its class `index` is known (a function may give each sample of the batch its own element),
        and if the model takes it alone.
        """
        tape = None
        if index is not None:
            try:
                alone = batch.part(i)
                tape = self._record(alone, [index])
                batch, i, target = alone, 0, index
            except CannotRunError:
                if len(batch) == 1:
                    raise
        if tape is None:
            tape = self._record(batch, [target])
        asked = self._asker.find(tape, target, iter(tape.reads), len(batch))
        now, scale = asked.scores[i], float(asked.start.data.abs().max())
        if not abs(now - score) <= _SAME * max(scale, abs(score)):
            raise InputError(
                f"{self.network.name} answers {now:.4g} to what it answered {score:.4g} when this was "
                "explained: its weights have changed since, or what the target function reads, or it makes "
                "random numbers. Explain it again, and ask for layers and paths before anything changes."
            )
        trail = Trail(len(batch))
        with torch.no_grad():
            plan = backtrack.plan(tape, asked.start, asked.exclusive)
            self.method.walk(plan, asked.nodes, trail)
        given = tape.inputs[batch.floats.index(j)]
        trail.evidence.setdefault(given, torch.zeros_like(given.data))
        return Walk(plan, trail, i, given)


def _on_image(box: Box | None, sample: Sample) -> Box | None:
    """A box in pixels of the model's input, in pixels of the user's image; None where there is no such."""
    if box is None or sample.geometry is None:
        return None
    return sample.geometry.box_to_image(box)


def _of_part(target: Any, first: int, size: int) -> Any:
    """The target of some of the images, for a batch of them."""
    if not isinstance(target, list):
        return target
    return target[first] if callable(target[first]) else target[first : first + size]


def _values(output: Any) -> list[Value]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Value)]


def _agree(together: Tape, i: int, alone: Tape) -> bool | None:
    """Whether a network says of sample i in a batch what it says of it alone, up to rounding.

    That is its scores; where it has none, each part of its answer that has an axis of samples. None where
    that can't be told.
    """
    count = len(together.inputs[0].data)
    try:
        batch, one = recorded_scores(together).data, recorded_scores(alone).data
    except HowYouSeeMeError:
        return _parts_agree(together.output, i, alone.output, count)
    if len(batch) == 1 < count and batch.shape == one.shape:  # one answer to all of them
        return _close(batch, one)
    row = batch[i] if len(batch) == count else None
    if row is None or row.numel() != one.numel():  # some squeeze away the axis of a single sample
        return None
    return _close(row.flatten(), one.flatten())


def _parts_agree(together: Any, i: int, alone: Any, count: int) -> bool | None:
    listed = isinstance(together, Sequence) and isinstance(alone, Sequence)
    if listed and len(alone) == 1 and len(together) == count:  # one answer an image
        pairs = zip_longest(_values(together[i]), _values(alone[0]))
        return all(b is not None and a is not None and _close(a.data, b.data) for a, b in pairs)
    batch, one = _values(together), _values(alone)
    if len(batch) != len(one):
        return None
    known = [
        _close(a.data[i], b.data[0])
        for a, b in zip(batch, one, strict=True)
        if a.shape[1:] == b.shape[1:] and (a.shape[:1], b.shape[:1]) == ((count,), (1,))
    ]
    return all(known) if known else None


def _close(batch: Tensor, one: Tensor) -> bool:
    if batch.shape != one.shape:
        return False
    if not one.is_floating_point() or not one.numel():
        return True
    low = one.isneginf()  # where classes are masked
    batch, one = (item.float().masked_fill(low, 0) for item in (batch, one))
    scale = one.abs().max().clamp(min=1e-6)
    return bool(((batch - one).abs() <= 1e-2 * scale).all())
