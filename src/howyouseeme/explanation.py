"""The result: which pixels are responsible for an answer, where the network looked, and by what way."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import chain
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import draw, localize, notebook, shown, written
from .errors import InputError
from .inputs import Sample
from .layers import Layer, Node, Path, Walk, layers_of, paths_to
from .likeness import Likeness
from .maps import Points, scale_each_to_one, scale_to_one
from .methods.base import Method
from .regions import Box
from .views import Views

if TYPE_CHECKING:
    from PIL.Image import Image

    from .draw import LayerView
    from .localize import Detection
    from .models import Network

__all__ = ["Explanation", "Layer", "Node", "Path", "Sample"]

#: What a batch has once; of all its other fields each image has its own.
_ONCE = ("network", "method", "inputs")

#: What an explanation keeps once it was asked for, one item an image.
_BY_IMAGE = (
    *("points", "coverage", "attention", "saliency", "counted", "levels", "paths"),
    *("_views", "inside"),
)


@dataclass(frozen=True, eq=False)
class Explanation:
    """Why a network gave an answer, for a batch of images.

    >>> explanation = howyouseeme.explain("efficientnet-lite0", "photo.jpg")
    >>> explanation.label[0], explanation.probability[0], explanation.coverage[0]
    >>> explanation.points[0][0]          # the strongest pixel
    >>> explanation.attention[0]          # where the network looked [height, width]
    >>> explanation.save("out")

    `explanation[i]` is the explanation of one image. All coordinates and maps are in pixels of the
    image that was given, also where it was resized or cropped for the model. A picture's axes are
    y and x; a network over one or three axes gives maps and positions of one or three.

    Args:
        samples: the images as the model saw them.
        evidence: at the pixels of the model's input, summed over channels [batch, height, width], with
            sign. In logits for 'evidence' (times the weight, 0..1, of the place, if focused) and
            'exact', in paths for 'seed'. Of a model in float16 it is float32.
        share: the same as a share of the evidence that the walk set out with, not focused.
        target: the class of each image; None where another element than a class was asked for, or a
            model with a single score says no.
        label: its name, 'class 7' where names aren't known; that of a `howyouseeme.targets`; '' for
            any other function.
        probability: of that class, 0..1: softmax over the model's scores, or sigmoid where the model
            ends in one or has a single score; of a box its score; None for any other element.
        network: the model with its preprocessing and classes.
        method: the method with its parameters.
        walk_again: for each image, the walk with all that it passed; for `path` and `layers`.
        alike: for each image, how the network describes its places; None where it has no feature maps,
            or the input is no picture.
        box: for each image the box that was asked about (`targets.box`), x0, y0, x1, y1 in pixels of the
            user's image; None for any other target, and where the model says nothing of its place.
        inputs: where the model takes several, the explanation by each of them, in their order; this
            one is by the first that has places in it.
    """

    samples: tuple[Sample, ...]
    evidence: Tensor
    share: Tensor
    target: tuple[int | None, ...]
    label: tuple[str, ...]
    probability: tuple[float | None, ...]
    network: Network
    method: Method
    walk_again: tuple[Callable[[], Walk], ...]
    alike: tuple[Likeness | None, ...]
    box: tuple[Box | None, ...]
    inputs: tuple[Explanation, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int | slice) -> Explanation:
        """The explanation of one image, as a batch of one (-1 is the last), or of a slice of the batch.

        Raises:
            IndexError: there is no such image.
        """
        some = i if isinstance(i, slice) else slice(self._at(i), self._at(i) + 1)
        if some.step is not None and some.step < 0:  # which tensors don't take
            turned = [self[at] for at in range(len(self))[some]]
            return Explanation.join(turned) if turned else self[:0]
        own = {name: items[some] for name, items in self._each().items()}
        part = replace(self, **own, inputs=tuple(part[some] for part in self.inputs))
        # What is known of these images already, and the pass that was recorded last.
        known = {name: vars(self)[name][some] for name in _BY_IMAGE if name in vars(self)}
        vars(part).update(known, _walks=self._walks)
        return part

    def _each(self) -> dict[str, Any]:
        """The fields that have an item for each image."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in _ONCE}

    def _alone(self, i: int) -> Explanation:
        """The explanation of one image; this itself where there is no other."""
        return self if len(self) == 1 else self[i]

    def _at(self, i: int) -> int:
        """The index of an image, from 0."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"There is no image {i}: the batch has {len(self)}, from 0.")
        return i % len(self)

    @staticmethod
    def join(parts: Sequence[Explanation]) -> Explanation:
        """One batch from explanations by one model and method.

        >>> Explanation.join([explainer(photo) for photo in photos])

        Raises:
            InputError: there are none, or their models, methods, or numbers or sizes of inputs differ.
        """
        if not parts:
            raise InputError("There are no explanations to join.")
        first = parts[0]
        for part in parts[1:]:
            if part.network.module is not first.network.module or part.method != first.method:
                raise InputError(
                    "Only explanations by one model and method can be joined, not "
                    f"{first.network.name} by {first.method} with {part.network.name} by {part.method}."
                )
            if part.evidence.shape[1:] != first.evidence.shape[1:]:
                raise InputError(
                    "Only explanations of inputs of one size can be joined, not "
                    f"{tuple(first.evidence.shape[1:])} with {tuple(part.evidence.shape[1:])}."
                )
            if len(part.inputs) != len(first.inputs):  # a model may take some of its inputs or not
                raise InputError(
                    "Only explanations by equally many inputs can be joined, not by "
                    f"{len(first.inputs) or 1} with {len(part.inputs) or 1}."
                )
        own: dict[str, Any] = {}
        for name, items in first._each().items():
            each = [getattr(part, name) for part in parts]
            own[name] = torch.cat(each) if isinstance(items, Tensor) else tuple(chain(*each))
        inputs = zip(*(part.inputs for part in parts), strict=True)
        return replace(first, **own, inputs=tuple(Explanation.join(same) for same in inputs))

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: the model is, but no recorded pass, nor maps that are made of the evidence again.

        Nor target functions of kinds that can't be: what is left has no more layers and paths.
        """
        kept = {name: item for name, item in vars(self).items() if name not in {"_walks", "_views"}}
        for name in ("evidence", "share"):  # of one image: not the batch that it is a part of
            kept[name] = kept[name].clone()
        kept["walk_again"] = tuple(map(_picklable, self.walk_again))
        return kept

    def __repr__(self) -> str:
        answers = [
            f"{label or 'the target'}{'' if p is None else f' {draw.percent(p)}'}"
            for label, p in zip(self.label, self.probability, strict=True)
        ]
        return f"Explanation({self.network.name}, {self.method.name}: {', '.join(answers)})"

    # -- what is responsible ------------------------------------------------------------------------

    @cached_property
    def _views(self) -> Views:
        """What is shown of the evidence, over the model's input."""
        return Views(self.inside, self.alike, self.method)

    @cached_property
    def inside(self) -> Tensor:
        """The evidence [batch, height, width] over the model's input, 0 in padding that shows nothing of the picture.

        >>> explanation.inside[0]
        """
        cut = [one.geometry is not None and one.geometry.pads for one in self.samples]
        if not any(cut):
            return self.evidence
        return torch.stack(
            [
                item if one.geometry is None else one.geometry.cut(item)
                for one, item in zip(self.samples, self.evidence, strict=True)
            ]
        )

    def _showing(self, views: Views | None) -> Explanation:
        """This one, with views that were made ahead, if they are those of the whole evidence."""
        if views is not None and self.inside is self.evidence:
            vars(self)["_views"] = views
        return self

    @cached_property
    def points(self) -> tuple[Points, ...]:
        """For each image the pixels responsible, strongest first; at most 2,000.

        >>> y, x, strength = explanation.points[0][0]

        `Points`: in pixels of the user's image, (y, x) for a picture, with the evidence above 0 that each
        carries, in logits or (seed) paths. Of equally strong ones that nearer the top left goes first.
        """
        found = []
        for sample, (place, strength) in zip(self.samples, self._views.strongest, strict=True):
            position = place.numpy().astype(np.float32)
            if sample.geometry is not None:
                y, x = sample.geometry.points_to_image(position[:, 0], position[:, 1])
                position = np.stack([y, x], 1)
            found.append(Points(position, strength.double().numpy()))
        return tuple(found)

    @cached_property
    def coverage(self) -> tuple[float, ...]:
        """For each image the share of the evidence, 0..1, that the paths kept brought to the pixels.

        >>> explanation.coverage[0]                     # EfficientNet-Lite0
        0.049

        The rest ended on the way: at nodes that nothing in the image excites (a bias made them what
        they are), and at nodes that were not kept. Evidence for and against is netted where paths
        meet, before it counts.
        """
        # Low precision and rounding may add up to a little more than all.
        return tuple(min(float(item.float().clamp(min=0).sum()), 1.0) for item in self.share)

    @cached_property
    def attention(self) -> Tensor:
        """[batch, height, width], 0..1: where the network looked, the evidence for the answer blurred.

        >>> explanation.attention.shape
        torch.Size([1, 480, 640])

        float32 on the CPU, over the user's image; the highest value is 1, and 0 is where the model didn't
        look (outside of the crop), or nothing speaks for the answer. The standard deviation of the Gaussian
        is 1/28 of the shorter side of the model's input (docs/method.md), for 'seed' 1/11.

        Raises:
            InputError: the images differ in size; take `explanation[i].attention`.
        """
        return self._maps(self._views.attention)

    @cached_property
    def saliency(self) -> Tensor:
        """[batch, height, width], 0..1: which pixels answer for it, level by level.

        >>> object_ = explanation.saliency[0] > 0.1     # all but the weakest tenth of what counts

        A pixel's level is the share of what counts in pixels that count no more than it does, so that a
        level means the same on every image. The formulas are in docs/method.md, 4 and 5; in short,

            counted = evidence + surroundings · blurred evidence
            saliency = levels(counted^0.8 · reach)

        The evidence is that for the answer, blurred as in `attention`: max-pooling picks one pixel where the
        network saw a window. `surroundings` is 0.3, and 3 where the method goes on from a few `nodes`. `reach`,
        0..1, tells how far the network describes a place like those where the evidence is. Of methods that don't
        look at `likeness`, and of networks without feature maps, saliency is levels(counted). Type and place are
        those of `attention`.

        Raises:
            InputError: the images differ in size; take `explanation[i].saliency`.
        """
        return self._maps(self._views.saliency)

    @cached_property
    def counted(self) -> list[Tensor]:
        """The evidence for the answer that each pixel of the model's input counts with, its own and that
        of its surroundings: one map [height, width] float64 an image, on a GPU if the evidence is.

        >>> explanation.counted[0].sum()
        """
        return list(self._views.counted)

    @cached_property
    def levels(self) -> list[Tensor]:
        """For each pixel of the model's input the share of `counted` in pixels with no more of it: one map
        [height, width] float64, 0..1, an image, on a GPU if the evidence is. Above 0.1 lies 90 % of it.

        >>> explanation.levels[0] > 0.1
        """
        return list(self._views.levels)

    def _maps(self, over_input: Tensor) -> Tensor:
        """Maps over the inputs, 0..1, drawn over the user's images."""
        maps = []
        for sample, item in zip(self.samples, over_input.cpu(), strict=True):
            made = item
            if sample.geometry is not None:
                drawn = sample.geometry.map_to_image(item.numpy())
                made = scale_to_one(torch.from_numpy(drawn))
            maps.append(made)
        if len({item.shape for item in maps}) > 1:
            raise InputError(
                "The images differ in size, so their maps make no tensor: take them one by one, "
                "explanation[i].attention."
            )
        return torch.stack(maps)

    def boxes(self, threshold: float | None = None) -> tuple[tuple[Detection, ...], ...]:
        """For each image the objects that the answer is seen in, the strongest first.

        >>> found = explanation.boxes()[0][0]
        >>> found.label, found.score, found.box        # x0, y0, x1, y1 in pixels of the user's image

        No box was ever trained: an object is where the evidence is, and what the network describes alike. The
        boxes are around connected regions of (level · likeness²)^(1/3), as docs/detect.md tells; x1 and y1 are
        exclusive. `threshold`, 0..1, is the share of the map's maximum at which an object ends, 0.22 by default.
        Of a detector's box that was asked about (`targets.box`), it is that one.

        Raises:
            InputError: the threshold isn't between 0 and 1, or the input is no picture.
        """
        level = localize.THRESHOLD if threshold is None else threshold
        return tuple(localize.boxes(self, i, level) for i in range(len(self)))

    def hidden(self, image: int = 0, share: float = 0.9, others: bool = False) -> Image:
        """The photo with the evidence blurred away, or with `others` all else: to ask again.

        >>> again = explainer(explanation.hidden(), target=explanation.target[0])
        >>> again.probability[0] < explanation.probability[0]

        Hidden are the strongest pixels that hold a `share` of the evidence, that of their surroundings
        included (`counted`); the blur is a Gaussian of a ninth of the shorter side, as strong as that of
        *insertion* (Petsiuk et al. 2018) on 224 pixels. If the answer hardly changes, they were not what
        decided. Of a tensor it is a picture to look at: only photos can be given again as they are.

        Raises:
            IndexError: there is no such image.
            InputError: the share isn't between 0 and 1, or the input is no picture.
        """
        if not 0 < share < 1:
            raise InputError(
                f"A share of {share:g} hides nothing, or all: give one between 0 and 1."
            )
        one = self._alone(image)
        level = one._maps(scale_each_to_one(one._views.levels).float())[0]
        return shown.blurred(shown.photo(one), level > 1 - share, others)

    # -- by what way --------------------------------------------------------------------------------

    @cached_property
    def _walks(self) -> dict[Callable[[], Walk], Walk]:
        """The last walk, by what walks again; slices of the batch share it."""
        return {}

    def _walk(self, i: int) -> Walk:
        """The walk to image i; only the last one is kept."""
        again = self.walk_again[self._at(i)]
        if again not in self._walks:
            walk = again()
            self._walks.clear()
            self._walks[again] = walk
        return self._walks[again]

    def forget(self) -> None:
        """Let go of the pass that `path`, `layers` and pictures of layers recorded, which is large.

        >>> explanation.layers(), explanation.forget()

        It is recorded anew when it is needed again.
        """
        self._walks.clear()

    @cached_property
    def paths(self) -> tuple[tuple[Path, ...], ...]:
        """For each image the paths from the class to its 20 strongest points.

        >>> [(node.module, node.channel) for node in explanation.paths[0][0].nodes]

        Costs another pass for each image, the first time; see `path`.
        """
        return tuple(self.path(i, range(min(20, len(p)))) for i, p in enumerate(self.points))

    def path(self, image: int, points: int | Sequence[int]) -> tuple[Path, ...]:
        """The strongest path from the class to each of some points of an image, call by call.

        >>> for node in explanation.path(0, [0])[0].nodes:
        ...     print(node.module, node.channel, node.position, node.share)

        `points` are indices into `explanation.points[image]`, or one of them. The pass is recorded once
        more, the first time, so that an explanation need not keep all activations.

        Raises:
            IndexError: there is no such image or point.
            InputError: the model or the target function gives another answer by now.
        """
        points = [points] if isinstance(points, (int, np.integer)) else points
        if not len(points):
            return ()
        image = self._at(image)
        count = len(self.points[image])
        for point in points:
            if not -count <= point < count:
                raise IndexError(f"There is no point {point}: image {image} has {count}, from 0.")
        found = paths_to(self._views.strongest[image][0][list(points)], self._walk(image))
        return tuple(
            Path(self.points[image][point], nodes)
            for point, nodes in zip(points, found, strict=True)
        )

    def layers(self, image: int = 0) -> list[Layer]:
        """What the network looks at in each module, from the pixels up to the class.

        >>> [(layer.module, layer.shape) for layer in explanation.layers()]
        [('', (3, 224, 224)), ('features.0', (32, 112, 112)), ...]

        Only modules whose output has the shape [batch, channel, ...] with places in it are listed; the
        first is the input. The pass is recorded once more, as for `path`.

        Raises:
            IndexError: there is no such image.
            InputError: the model or the target function gives another answer by now.
        """
        return layers_of(self._walk(image))

    # -- to look at ---------------------------------------------------------------------------------

    def picture(self, image: int = 0, layers: bool = False) -> Image:
        """The photo, and over it its points, attention and saliency; if asked for, below them the layers.

        >>> explanation.picture().save("picture.png")

        Raises:
            InputError: the input is no picture, but has one axis, or three.
        """
        one = self._alone(image)
        subject = shown.subject(one)
        picture = draw.explanation_picture(subject)
        if not layers:
            return picture
        views = one.layer_views(0, shown.stages(one.layers()))
        return draw.stack_pictures(picture, draw.layers_strip(subject.image, views))

    def frames(self, image: int = 0) -> list[tuple[str, str, Image]]:
        """The photo as each map shows it, one picture each: from the pixels up to the class.

        >>> for name, says, picture in explanation.frames():
        ...     picture.save(f"{name}.png")

        Name, what it shows in a few words, and a picture of about 500 x 500 pixels, all of one size:
        the photo, the points, attention, saliency, and then each stage of the network as in
        `picture(layers=True)`. The pass is recorded once more, as for `path`.

        Raises:
            InputError: the input is no picture.
        """
        one = self._alone(image)
        return draw.frames(shown.subject(one), one.layer_views(0, shown.stages(one.layers())))

    def layer_views(self, image: int, layers: Sequence[Layer]) -> list[LayerView]:
        """Some layers of one image as they are drawn over the photo, but those whose places are no pixels'.

        >>> [view.name for view in explanation.layer_views(0, explanation.layers(0)[-3:])]

        Raises:
            InputError: the input is no picture.
        """
        return shown.layer_views(self._alone(image), layers)

    def to_dict(self, image: int = 0) -> dict[str, Any]:
        """All about one image, ready for JSON.

        >>> json.dumps(explanation.to_dict())

        What the fields mean, in which units, is told by `data/explanation.schema.json` in the package.
        """
        return written.facts(self._alone(image))

    def provenance(self, image: int = 0) -> dict[str, Any]:
        """What it takes to make this explanation again, ready for JSON.

        >>> explanation.provenance()["method"]
        'evidence'
        """
        return written.provenance(self._alone(image))

    def save(
        self,
        folder: str | FilePath,
        name: str | None = None,
        layers: bool = False,
        maps: bool = False,
    ) -> list[FilePath]:
        """Write a PNG and a JSON for each image, and return their paths.

        >>> explanation.save("out")
        [PosixPath('out/photo.png'), PosixPath('out/photo.json')]

        The folder is made if it is missing. `name` is that of the files, without suffix; by default the
        photo's, or else 'explanation'. Where several would have one name, each image of the batch gets its
        number appended, from 0. Files of that name are replaced; if interrupted, none is left half written.

        Raises:
            InputError: the input is no picture (`to_dict` has its points), the name is none, or that of the
                folder one of a file; a file stands where the folder goes, or a folder where a file goes; or a
                file would replace one of the photos.
            OSError: the folder can't be written to.
        """
        written.check_name(name)
        return written.save(self, folder, name, layers, maps)

    def show(self, layers: bool = False) -> None:
        """Show the pictures: in a notebook under the cell, else in the system's image viewer.

        >>> explanation.show(layers=True)

        Raises:
            InputError: the input is no picture.
        """
        pictures = [self.picture(i, layers) for i in range(len(self))]
        try:
            from IPython import get_ipython  # noqa: PLC0415
            from IPython.display import display  # noqa: PLC0415
        except ImportError:
            get_ipython = None
        for picture in pictures:
            if get_ipython is not None and get_ipython() is not None:
                display(picture)
            else:
                picture.show()

    def _repr_html_(self) -> str | None:
        if any(sample.geometry is None for sample in self.samples):
            return None  # no picture: the notebook falls back to repr
        return notebook.html_of(self)

    def _ipython_display_(self) -> None:
        from IPython import get_ipython  # noqa: PLC0415 - it calls this

        no_picture = any(sample.geometry is None for sample in self.samples)
        if no_picture or not hasattr(get_ipython(), "kernel"):  # a terminal has none
            raise NotImplementedError  # IPython goes on to repr
        notebook.display(self)


def _picklable(again: Callable[[], Walk]) -> Callable[[], Walk]:
    """What walks again, or what says that it can't be, if a function is asked that can't be pickled."""
    try:
        pickle.dumps(
            [one for one in getattr(again, "args", ()) if callable(one) or isinstance(one, list)]
        )
    except Exception:  # each kind of function has its own
        return _forgotten
    return again


def _forgotten() -> Walk:
    raise InputError(
        "The target function of this explanation couldn't be pickled, so that its layers and paths can't be "
        "asked for any more: take a function of a module, def target(output), or ask before."
    )
