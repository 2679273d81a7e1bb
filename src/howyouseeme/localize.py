"""From the evidence of a class to boxes around its objects; no box was ever trained.

Evidence lights up what tells a class, and likeness (`howyouseeme.likeness`) how far the thing reaches
that has it. Where both are, there is the object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .detectors import recorded_boxes
from .draw import percent
from .errors import InputError, MissingExtraError
from .forward import forward
from .images import Source
from .inputs import prepare
from .likeness import Likeness
from .models import Network
from .regions import Box, components, edges, held, overlaps

if TYPE_CHECKING:
    from .explainer import Explainer
    from .explanation import Explanation

__all__ = [
    "THRESHOLD",
    "Detection",
    "detect",
    "found_in",
    "object_map",
    "object_of",
    "regions",
    "to_coco",
    "to_supervision",
]

#: The level of the map of an object, 0..1, at which it ends.
THRESHOLD = 0.22

#: A region with less than this of the strongest one's map is no object.
LEAST = 0.1

_CELLS = 56  # regions are found on so many cells a side
_ALIKE = 0.5  # boxes of several classes that overlap more are one object


@dataclass(frozen=True)
class Detection:
    """An object found.

    >>> found = explanation.boxes()[0][0]
    >>> found.label, found.score, found.box
    ('Egyptian cat', 0.797, (48.5, 9.6, 364.7, 279.2))

    - `target`: its class; None where another element than a class was asked for; `label`: its name;
    - `score`: 0..1, the probability of the class (1 where it has none), times how much there is of
      the object in the map, the strongest of the class being 1;
    - `box`: x0, y0, x1, y1 in pixels of the user's image, x1 and y1 exclusive;
    - `number`: of a detector's own box, that which `targets.box` takes;
    - `named`: whether the label is the name of the class, and not made of the number for want of one.
    """

    target: int | None
    label: str
    score: float
    box: Box
    number: int | None = None
    named: bool = True

    @property
    def caption(self) -> str:
        """What is written at its box: its number, if it has one, its name and its score.

        >>> found.caption
        'Egyptian cat 79.7%'
        """
        number = [] if self.number is None else [str(self.number)]
        return " ".join([*number, *filter(None, [self.label]), percent(self.score)])


def detect(
    explainer: Explainer,
    image: Source,
    targets: Sequence[int | str] = (),
    top: int = 1,
    threshold: float = THRESHOLD,
) -> tuple[Detection, ...]:
    """The objects in a photo, best first: of the classes asked for, or of the `top` likeliest ones.

    >>> for found in detect(Explainer("efficientnet-lite0"), "photo.jpg", top=3):
    ...     print(found.label, found.score, found.box)

    Of the likeliest classes several may mean one object: where their boxes overlap by more than half,
    the best stays. A class whose strongest box goes is not there, and its others go too. `threshold` is
    that of `Explanation.boxes`, and so are the boxes: connected regions of (level · likeness²)^(1/3), as
    docs/detect.md tells.

    Raises:
        InputError: the targets are no list or no classes, `top` is below 1 or more than there are classes, the
            threshold isn't between 0 and 1, or the input is no picture.
        ImageError, ModelError, UnsupportedCallError: as the explainer.
    """
    if isinstance(targets, str):
        raise InputError(f"The classes to look for are a list of them: give [{targets!r}].")
    if targets:  # what was asked for by name is told, also where two share a place
        asked = explainer.many(image, list(targets))
        named = (one for explanation in asked for one in explanation.boxes(threshold)[0])
        return tuple(sorted(named, key=lambda one: -one.score))
    likely = explainer.top(image, k=top)
    # Where a network says no to its only class, there is nothing to put a box around.
    each = [one.boxes(threshold)[0] for one in likely if one.target[0] is not None]
    strongest = [of_class[0] for of_class in each if of_class]
    kept: list[Detection] = []
    gone: set[int | None] = set()
    for one in sorted((one for of_class in each for one in of_class), key=lambda one: -one.score):
        if one.target in gone:
            continue
        box = torch.tensor(one.box, dtype=torch.float64, device="cpu")
        others = box.new_tensor([other.box for other in kept]).reshape(-1, 4)
        if bool((overlaps(others, box) <= _ALIKE).all()):
            kept.append(one)
        elif one in strongest:
            gone.add(one.target)
    return tuple(kept)


# From maps to boxes


def boxes(explanation: Explanation, i: int, threshold: float) -> tuple[Detection, ...]:
    """What `Explanation.boxes` finds in image i."""
    chance, asked = explanation.probability[i], explanation.box[i]
    if asked is not None:  # a detector found it: nothing is to be looked for
        label = explanation.label[i]
        return (Detection(None, label, 1.0 if chance is None else chance, asked),)
    heat = object_of(explanation, i)
    geometry = explanation.samples[i].geometry
    assert geometry is not None  # or else there were no map
    return tuple(
        Detection(
            explanation.target[i],
            explanation.label[i],
            strength * (1.0 if chance is None else chance),
            geometry.box_to_image(box),
        )
        for strength, box in regions(heat, threshold)
    )


def object_of(explanation: Explanation, i: int = 0) -> Tensor:
    """The map of the object that an answer is seen in, over the model's input [height, width], 0..1.

    >>> heat = object_of(explanation)

    Raises:
        InputError: the input is no picture.
    """
    sample = explanation.samples[i]
    if sample.geometry is None:
        shape = tuple(sample.input.shape)
        raise InputError(f"An input of the shape {shape} is no picture, and has no boxes.")
    return object_map(explanation.levels[i], explanation.alike[i]).cpu()


def object_map(seen: Tensor, alike: Likeness | None) -> Tensor:
    """How much each pixel of the input belongs to the object [height, width], 0..1.

    >>> heat = object_map(levels(evidence), likeness(plan(tape, tape.output), tape.inputs[0])[0])

    `seen` [height, width], 0..1, are levels of evidence. The result is (seen · reach²)^(1/3), the reach
    being that of what is `alike`; `seen` itself where nothing is known of that.
    """
    if alike is None:
        return seen
    return (seen * alike.reach(seen) ** 2) ** (1 / 3)


def found_in(network: Network, image: Source, count: int = 100) -> tuple[Detection, ...]:
    """The boxes that a detector finds in a photo, in the order of the numbers that `targets.box` takes.

    >>> for one in found_in(howyouseeme.load_model("yolov8n.onnx"), "photo.jpg"):
    ...     print(one.number, one.label, one.score, one.box)

    Each with its class (0 where the detector tells none; 'box 3' where it has no name), its score and its place
    in the photo, in pixels; no more than `count`.

    Raises:
        InputError, ImageError, ModelError: the photo or the model can't be used, or the model is no detector
            that is known, or doesn't tell where its boxes lie.
    """
    batch = prepare(network, image)
    if len(batch) > 1:
        raise InputError(
            f"Boxes are listed of one photo, and here are {len(batch)}: give each alone."
        )
    tape = forward(network, batch.tensors)
    (found,) = recorded_boxes(tape, network, count)
    geometry = batch.samples[0][0].geometry
    size = batch.tensors[0].shape[2:]
    if found.boxes is None or geometry is None:
        raise InputError(f"{network.name} doesn't tell where its boxes lie.")
    told = []
    for i in range(min(len(found), count)):
        place = found.place(i, size) or (0.0, 0.0, 0.0, 0.0)  # its corners are crossed
        category = 0 if found.classes is None else int(found.classes[i])
        name = found.name(i, network)
        label, score = name or f"box {i}", float(found.scores[i])
        told.append(Detection(category, label, score, geometry.box_to_image(place), i, bool(name)))
    return tuple(told)


def regions(heat: Tensor, threshold: float = THRESHOLD) -> list[tuple[float, Box]]:
    """The connected parts of a map [height, width] that reach a share of its maximum, strongest first.

    >>> strength, (x0, y0, x1, y1) = regions(heat)[0]      # in pixels of the map

    `strength` is how much of the map lies in the part, the first having 1; parts below 0.1 are no objects.

    Raises:
        InputError: the threshold isn't between 0 and 1.
    """
    if not 0 < threshold < 1:
        raise InputError(f"A threshold of {threshold:g} leaves no box: give one between 0 and 1.")
    size = [min(_CELLS, side) for side in heat.shape]
    cells = F.interpolate(heat[None, None], size=size, mode="area")[0, 0]
    if not float(cells.max()) > 0:
        return []
    cells = cells / cells.max()
    labels = components(cells >= threshold)
    holds = held(labels, cells)
    down, across = (side / count for side, count in zip(heat.shape, size, strict=True))
    found = []
    for number in holds.sort(descending=True, stable=True).indices.tolist():
        strength = float(holds[number] / holds.max())
        if strength < LEAST:
            break
        x0, y0, x1, y1 = edges(cells, labels == number, threshold)
        found.append((strength, (x0 * across, y0 * down, x1 * across, y1 * down)))
    return found


# To other formats


def to_supervision(found: Sequence[Detection]) -> Any:
    """The objects of one photo as `supervision.Detections`.

    >>> boxes = supervision.BoxAnnotator().annotate(photo, to_supervision(found))

    `class_id` is -1 where no class was asked for; names are in `data["class_name"]`.

    Raises:
        MissingExtraError: supervision isn't installed.
    """
    try:
        import supervision  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError(
            "Detections of supervision need it: pip install 'howyouseeme[apps]'"
        ) from error
    return supervision.Detections(
        xyxy=np.array([one.box for one in found], dtype=np.float32).reshape(-1, 4),
        confidence=np.array([one.score for one in found], dtype=np.float32),
        class_id=np.array([-1 if one.target is None else one.target for one in found], dtype=int),
        data={"class_name": np.array([one.label for one in found], dtype=str)},
    )


def to_coco(
    found: Mapping[str, Sequence[Detection]], sizes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The objects of some photos as a COCO data set, ready for JSON.

    >>> json.dumps(to_coco({"photo.jpg": found}, {"photo.jpg": (480, 640)}))

    `sizes` are height and width of each photo. Images and annotations count from 1; a category's id is
    its class; each annotation has a `score` as COCO's results do, and where it is a detector's own its `number`.

    Raises:
        InputError: a photo has no size, or a detection is of no class.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    categories: dict[int, str] = {}
    for number, (name, objects) in enumerate(found.items(), start=1):
        if name not in sizes:
            raise InputError(f"The size of {name} is missing: give its height and width.")
        height, width = sizes[name]
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for one in objects:
            if one.target is None:
                raise InputError(f"COCO takes classes, and {one.label or 'a target'} is none.")
            x0, y0, x1, y1 = (round(side, 2) for side in one.box)
            named = one.named and one.label
            categories[one.target] = one.label if named else f"class {one.target}"
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": one.target,
                    "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)],
                    "area": round((x1 - x0) * (y1 - y0), 2),
                    "iscrowd": 0,
                    "score": round(one.score, 4),
                    **({} if one.number is None else {"number": one.number}),
                }
            )
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in sorted(categories.items())],
    }
