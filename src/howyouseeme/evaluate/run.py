"""The measures for a network, images and boxes of your own."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import ImageError, InputError, ModelError
from ..explainer import Explainer
from ..files import write
from ..forward import Answer, answered, forward
from ..images import Geometry, load_image
from ..methods import Method
from ..models import Model, Network, Prepare
from ..scores import certainties, logits_of, recorded_scores, scores_in
from .boxes import Annotation, Annotations, Rows, read_boxes
from .measures import Array, Interval, Predict
from .randomise import randomised
from .scoring import (
    MEASURES,
    Explain,
    Grid,
    Item,
    Settings,
    intervals,
    make_grids,
    score_grid,
    score_image,
    values,
)

__all__ = ["Evaluation", "evaluate"]

SCHEMA_VERSION = 1

#: From a module, an input [1, channel, height, width] and a class to a map [height, width].
OwnMethod = Callable[[nn.Module, Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` returns.

    >>> print(found.table())
    >>> found.summary["evidence"]["energy"]
    Interval(mean=0.84, low=0.81, high=0.87)

    - `items`: the images measured, `values`: {method: {measure: {image: value}}};
    - `problems`: images and boxes that could not be used, each a sentence;
    - `notes`: what was left out for a good reason, such as images whose boxes show another class.
    """

    model: str
    items: tuple[Item, ...]
    labels: tuple[str, ...]
    values: dict[str, dict[str, dict[str, float]]]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @cached_property
    def summary(self) -> dict[str, dict[str, Interval | None]]:
        """{method: {measure: mean and 95 % bootstrap interval}}; None where there is nothing to it.

        >>> found.summary["evidence"]["insertion"].mean
        0.58
        """
        return {method: intervals(measured) for method, measured in self.values.items()}

    def table(self) -> str:
        """The means with their intervals as text, a measure a line, a method a column.

        >>> print(found.table())
                                  evidence                images
        energy (high is good)     0.959 (0.919 to 0.998)  2
        insertion (high is good)  0.582 (0.574 to 0.591)  2
        ...
        """
        rows = [["", *self.values, "images"]]
        for measure in MEASURES:
            means = [self.summary[method][measure.key] for method in self.values]
            if not any(means):
                continue
            count = max(len(self.values[method][measure.key]) for method in self.values)
            shown = [
                "" if m is None else f"{m.mean:.3f} ({m.low:.3f} to {m.high:.3f})" for m in means
            ]
            name = f"{measure.title} ({'high' if measure.high_is_good else 'low'} is good)"
            rows.append([name, *shown, f"{count}" + (" grids" if measure.key == "grid" else "")])
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, wide, strict=True)).rstrip()
            for row in rows
        )

    def to_dict(self) -> dict[str, Any]:
        """Means and intervals, ready for JSON.

        >>> found.to_dict()["measures"]["evidence"]["insertion"]
        {'mean': 0.582, 'low': 0.574, 'high': 0.591, 'n': 2}

        `n` is how many images, or grids, a mean is over. With them go the model, the shape of its input, problems,
        notes, and the versions of howyouseeme, torch and Python.
        """
        return {
            "schema": SCHEMA_VERSION,
            "model": self.model,
            "images": len(self.items),
            "input_shape": list(self.items[0].input.shape),
            "measures": {
                method: {
                    key: None
                    if mean is None
                    else {**mean._asdict(), "n": len(self.values[method][key])}
                    for key, mean in means.items()
                }
                for method, means in self.summary.items()
            },
            "problems": list(self.problems),
            "notes": list(self.notes),
            "howyouseeme": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }

    def to_csv(self) -> str:
        """One row for each method and image; a field is empty where nothing was measured.

        >>> found.to_csv().splitlines()[0]
        'method,file,class,label,probability,covered,pointing,energy,box,box_mean,...'

        `covered` is the share of the network's input inside the boxes.
        """
        keys = [measure.key for measure in MEASURES if measure.key != "grid"]
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "file", "class", "label", "probability", "covered", *keys])
        for method, measured in self.values.items():
            for item, label in zip(self.items, self.labels, strict=True):
                known = [
                    item.probability,
                    item.covered,
                    *(measured[k].get(item.name) for k in keys),
                ]
                numbers = ["" if value is None else f"{value:.6g}" for value in known]
                writer.writerow([method, item.name, item.target, label, *numbers])
        return file.getvalue()

    def save(self, folder: str | Path) -> list[Path]:
        """Write evaluation.csv and evaluation.json into a folder, which is made if it is missing.

        >>> found.save("out")
        [PosixPath('out/evaluation.csv'), PosixPath('out/evaluation.json')]

        Raises:
            OSError: the folder can't be written to.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        table, summary = folder / "evaluation.csv", folder / "evaluation.json"
        write(table, self.to_csv().encode())
        write(summary, f"{json.dumps(self.to_dict(), indent=1, allow_nan=False)}\n".encode())
        return [table, summary]


def evaluate(
    model: Model,
    images: Sequence[str | Path],
    boxes: str | Path | Rows | None = None,
    *,
    preprocess: Prepare | None = None,
    classes: Sequence[str] | None = None,
    methods: Sequence[str | Method | OwnMethod] = ("evidence",),
    limit: int | None = None,
    grids: int = 10,
    settings: Settings | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """How well the maps of a network show where its answers come from.

    >>> found = evaluate("efficientnet-lite0", sorted(Path("photos").glob("*.jpg")), "boxes.csv")
    >>> print(found.table())
    >>> found.save("out")

    Args:
        model: what `Explainer` takes, and so are `preprocess` and `classes`.
        preprocess: how a photo becomes the model's input; that of the `Network` by default.
        classes: names of the classes, one for each score; those of the `Network` by default.
        images: paths of pictures, each with a file name of its own.
        boxes: rows (class, x0, y0, x1, y1) by the name of the image's file, {"cat.jpg": [("tabby", 30, 23, 165,
            182)]}, in pixels of the image, x1 and y1 exclusive, the class being an index or a name; or the
            path of a CSV, of COCO's JSON, or of a folder of Pascal VOC's XML: see `read_boxes`. None: those
            measures are left out that need them.
        methods: names that `Explainer` takes; "seed:attention" measures another map than the saliency.
            Or methods with parameters, `Evidence(nodes=2000)`, which go by what they print as.
            And functions of your own, from the module, an input [1, channel, height, width] and a class
            to a map [height, width]; they go by their `__name__`.
        limit: at most so many images are measured.
        grids: so many 2 x 2 grids for GridPG.
        settings: how finely, and which of the slow measures are made; by default all are.
        say: is told about each image as it is done.

    Each image is asked for the class that the network finds likeliest. With boxes, only images are
    measured that have a box of that class: what a wrong answer ought to look at, nobody knows. All is
    measured in the pixels of the network's input, boxes being scaled and cut as the image was. What each
    measure tells: docs/evaluate.md; the papers are named where they are defined, in `howyouseeme.evaluate`.

    Raises:
        InputError: an argument can't be used, or no image can.
        ModelError, MissingExtraError: as `Explainer`.
    """
    explainer = Explainer(model, preprocess=preprocess, classes=classes)
    network = explainer.network
    _ = network.photo_input  # or an error, before anything is loaded
    makers = _makers(methods)
    explains = {name: make(network) for name, make in makers.items()}
    files = _by_name(images)
    known = None if boxes is None else read_boxes(boxes, network)
    found = _Found(problems=list(known.problems) if known else [])
    if known is not None:
        _compare_names(files, known, found)
        files = {name: path for name, path in files.items() if name in known.of}
        _refuse_fractions(files, known)
    predict = _load_all(explainer, files, known, limit, found)
    made = make_grids(found.items, grids)
    if not made and grids:
        found.notes.append(
            "GridPG is left out: it takes four classes, each with an image of which the network is sure by 0.9."
        )
    forgetful = Network(
        network.name,
        randomised(network.module, found.items[0].input[None]),
        network.preprocess,
        network.classes,
    )
    for name, explain in explains.items():
        other = makers[name](forgetful)
        explain(found.items[0].input, found.items[0].target)  # what only the first call costs
        items, scores = [], []
        for number, item in enumerate(found.items, start=1):
            try:
                scores.append(score_image(predict, explain, item, settings, other))
                items.append(item)
            except InputError as error:
                found.problems.append(f"{files[item.name]}: {error}")
            say(f"{name}: {item.name}, {number} of {len(found.items)}")
        found.values[name] = values(items, scores, _in_grids(explain, made, found))
    return Evaluation(
        network.name,
        tuple(found.items),
        tuple(network.label(item.target) for item in found.items),
        found.values,
        tuple(found.problems),
        tuple(found.notes),
    )


@dataclass
class _Found:
    items: list[Item] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # images whose boxes are of another class
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    values: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)


def _in_grids(explain: Explain, grids: Sequence[Grid], found: _Found) -> list[dict[str, Any]]:
    try:
        return [score_grid(explain, grid) for grid in grids]
    except InputError as error:
        note = f"GridPG is left out: the network does not take four images in one ({error})"
        found.notes += [note] if note not in found.notes else []
        return []


# -- in -------------------------------------------------------------------------------------------


def _makers(
    methods: Sequence[str | Method | OwnMethod],
) -> dict[str, Callable[[Network], Explain]]:
    """What makes the maps of a network, by the name of the method."""
    if isinstance(methods, str):
        raise InputError(f"methods are a list of them: give [{methods!r}].")
    given = dict.fromkeys(methods)  # each once
    makers = dict(map(_maker, given))
    if len(makers) < len(given):
        raise InputError(
            f"Of the methods several are called {', '.join(makers)}: give each function a __name__ of its own."
        )
    if not makers:
        raise InputError("There is no method to measure: give at least one, such as evidence.")
    return makers


def _maker(method: str | Method | OwnMethod) -> tuple[str, Callable[[Network], Explain]]:
    """The name of a method, and what makes its maps of a network."""
    if not isinstance(method, (str, Method)):
        own = method
        name = getattr(own, "__name__", type(own).__name__)
        return name, lambda network: partial(_own_map, name, own, network.module)
    walk: str | Method = method
    name, view = str(method), ""
    if isinstance(method, str):
        walk, _, view = method.partition(":")
    if view not in ("", "saliency", "attention"):
        raise InputError(
            f"{method!r} asks for no map: it is saliency or attention, as in {walk}:attention."
        )

    def make(network: Network) -> Explain:
        explainer = Explainer(network, method=walk)

        def explain(x: Tensor, target: int) -> Tensor:
            found: Tensor = getattr(explainer(x[None], target=target), view or "saliency")[0]
            return found

        return explain

    return name, make


def _own_map(name: str, method: OwnMethod, module: nn.Module, x: Tensor, target: int) -> Tensor:
    with torch.enable_grad():  # which many methods need
        found = torch.as_tensor(method(module, x[None], target)).detach().cpu()
    if not bool(torch.isfinite(found).all()):
        raise InputError(f"{name} made a map with NaN or infinity in it.")
    if found.shape != x.shape[-2:]:
        raise InputError(
            f"{name} made a map of the shape {tuple(found.shape)}: it is to be that of the input, "
            f"{tuple(x.shape[-2:])}."
        )
    return found


def _by_name(images: Sequence[str | Path]) -> dict[str, Path]:
    if isinstance(images, (str, Path)):
        raise InputError(
            f"images are paths of pictures: sorted(Path({str(images)!r}).glob('*.jpg'))"
        )
    files: dict[str, Path] = {}
    for path in map(Path, images):
        if path.name in files:
            raise InputError(
                f"{files[path.name]} and {path} have one name, by which boxes are found: rename one."
            )
        files[path.name] = path
    if not files:
        raise InputError("There are no images to measure.")
    return files


def _compare_names(files: Mapping[str, Path], boxes: Annotations, found: _Found) -> None:
    absent = [name for name in boxes.of if name not in files]
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        found.notes.append(  # boxes of a whole set, photos of a part
            f"{len(absent)} file(s) with boxes are not among the images: {', '.join(absent[:3])}{more}."
        )
    bare = len(files) - (len(boxes.of) - len(absent))
    if bare:
        found.notes.append(f"{bare} image(s) without boxes are left out.")


#: In a photo whose sides are longer, a first pixel is no object.
_FEW = 4


def _refuse_fractions(files: Mapping[str, Path], boxes: Annotations) -> None:
    """Stop where all boxes lie in the first pixel of their photos: no map would score there."""
    every = [box for name in files for box in boxes.of[name]]
    if any(max(box.corners[2:]) > 1 + _BEYOND for box in every):
        return
    for path in files.values():
        with suppress(ImageError):  # which is told when it is measured
            if min(load_image(path).size) > _FEW:
                raise InputError(
                    f"{every[0].where}: this box and all others lie within 0..1, as fractions do, and "
                    "corners are in pixels: multiply x by the photo's width and y by its height."
                )


def _load_all(
    explainer: Explainer,
    files: Mapping[str, Path],
    boxes: Annotations | None,
    limit: int | None,
    found: _Found,
) -> Predict:
    """Fill `found` with the images that can be measured; how the network is asked."""
    network = explainer.network
    predict: Predict | None = None
    for name, path in files.items():
        if limit is not None and len(found.items) >= limit:
            break
        try:
            x, geometry = network.photo_input(load_image(path))
            x = x.to(network.like)
            if predict is None:
                explainer(x[None])  # which refuses what can't be explained
                predict = _predict(network, x)
            item = _item(name, x, geometry, network, boxes.of[name] if boxes else None, found)
        except InputError as error:
            sentence = str(error)
            found.problems.append(sentence if str(path) in sentence else f"{path}: {sentence}")
            continue
        if item is None:
            found.wrong.append(name)
        else:
            found.items.append(item)
    if found.wrong:
        found.notes.append(
            f"{len(found.wrong)} image(s) are left out, having no usable box of the class that the network answers."
        )
    if not found.items or predict is None:
        reasons = " ".join([*found.problems[:3], *found.notes])
        raise InputError(f"No image can be measured. {reasons}")
    return predict


def _item(
    name: str,
    x: Tensor,
    geometry: Geometry,
    network: Network,
    boxes: Sequence[Annotation] | None,
    found: _Found,
) -> Item | None:
    """The image as the network gets it; None where no box of its answer can be used."""
    answer = _answer(network, x)
    order = answer.order.tolist()
    corners: Array | None = None
    if boxes is not None:
        mine = [box for box in boxes if box.target == order[0]]
        kept = [_to_input(box, geometry, found) for box in mine]
        rows = [row for row in kept if row is not None]
        if not rows:
            return None
        corners = np.array(rows)
    second = order[1] if len(order) > 1 else None
    return Item(name, x, order[0], second, float(answer.chances[order[0]]), corners)


#: A box may end so far outside of its image, as a share of its side: annotations are not exact.
_BEYOND = 0.02


def _to_input(box: Annotation, geometry: Geometry, found: _Found) -> list[float] | None:
    """The corners of a box in pixels of the network's input, cut to what the network saw."""
    height, width = geometry.image_size
    if box.size is not None and box.size != (width, height):
        found.problems.append(
            f"{box.where}: it is for an image of {box.size[0]} x {box.size[1]} pixels, and the image has "
            f"{width} x {height}."
        )
        return None
    x0, y0, x1, y1 = box.corners
    if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        found.problems.append(
            f"{box.where}: the box from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}) lies outside of the image, "
            f"which has {width} x {height} pixels."
        )
        return None
    beyond = max(-x0, x1 - width) > _BEYOND * width or max(-y0, y1 - height) > _BEYOND * height
    if beyond:
        found.problems.append(
            f"{box.where}: the box from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}) reaches beyond the image, "
            f"which has {width} x {height} pixels; is it for an image of another size?"
        )
        return None
    (down, across), (top, left) = geometry.scale, geometry.offset
    tall, wide = geometry.input_size
    corners = [
        min(max((x0 - left) / across, 0.0), wide),
        min(max((y0 - top) / down, 0.0), tall),
        min(max((x1 - left) / across, 0.0), wide),
        min(max((y1 - top) / down, 0.0), tall),
    ]
    if corners[2] - corners[0] <= 0 or corners[3] - corners[1] <= 0:
        return None  # cropped away
    return corners


# -- asking ---------------------------------------------------------------------------------------


def _predict(network: Network, x: Tensor) -> Predict:
    """From inputs to probabilities, as an explanation tells them."""
    tape = forward(network, [x[None]])
    scores = recorded_scores(tape)
    if scores.numel == 1:
        raise ModelError(
            f"{network.name} has a single score, and the measures compare classes: give a module "
            "that returns two, torch.cat([-score, score], 1), of no and yes."
        )
    found = logits_of(tape, scores)
    call = scores.call
    at_the_end = found.told is not None and call is not None and call.name == found.squashed_by

    def predict(batch: Tensor) -> Tensor:
        if at_the_end or found.told is None:
            given: Tensor = scores_in(network.module(batch)).reshape(len(batch), -1)
            return certainties(given, found._replace(told=given if at_the_end else None))
        # One by one, as a whole recorded pass is kept meanwhile.
        return torch.stack([_answer(network, one).chances for one in batch])

    return torch.no_grad()(predict)


def _answer(network: Network, x: Tensor) -> Answer:
    """What a network answers to an image; that it is no numbers is this image's fault, as others were explained."""
    try:
        return answered(network, x)
    except ModelError as error:
        raise InputError(str(error)) from error
