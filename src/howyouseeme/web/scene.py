"""An explanation as the page shows it: all that the viewer draws, and what is asked of it later."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from ..draw import data_uri, encoded, shades
from ..explanation import Explanation, Layer
from ..localize import Detection
from ..rules import family_of
from ..written import as_json

__all__ = ["Scene", "make_scene", "palette", "stages"]

_SIDE = 1000  # of the photo as it is shown, at most
_MAP = 256  # of a map
_STAGE = 112  # of a stage's map
_POINTS = 600  # that are drawn and can be clicked
_GRID = 32  # cells a side, in which evidence is counted for regions
_MOST_STAGES = 28
_REST = 2**20  # bytes that the numbers and small pictures of a scene take, about


@dataclass(frozen=True, eq=False)
class Scene:
    """What the page knows about one answer to one photo.

    >>> scene = make_scene(explanation, likeliest)
    >>> scene.drawn                         # for the viewer
    >>> scene.path(0)                       # by which way the strongest point was reached

    - `explanation`: of one image;
    - `stages`: from the class to the pixels; see `stages`;
    - `boxes`: where the objects are;
    - `drawn`: all that the viewer draws, ready for JSON.
    """

    explanation: Explanation
    stages: dict[str, Layer]
    boxes: tuple[Detection, ...]
    drawn: dict[str, Any]

    def path(self, point: int) -> dict[str, Any]:
        """The strongest path to a point: where it passed each stage, ready for JSON.

        >>> scene.path(0)["nodes"][0]
        {"stage": 0, "name": "_conv_head", "channel": 1211, "y": 80.2, "x": 120.1, "share": 0.0018}

        `stage` is an index into `stages`; `share` is that of all the evidence there.

        Raises:
            IndexError: there is no such point.
        """
        points = self.explanation.points[0]
        if not 0 <= point < len(points):
            raise IndexError(point)
        found = self.explanation.path(0, [point])[0]
        self.explanation.forget()
        passed = {(node.module, node.call): node for node in found.nodes}
        nodes = []
        for number, (name, stage) in enumerate(self.stages.items()):
            node = passed.get((stage.module, stage.call))
            if node is None:  # a branch that the path went around
                continue
            y, x = _place(self.explanation, stage, node.position)
            nodes.append(
                {
                    "stage": number,
                    "name": name,
                    "channel": node.channel,
                    "y": round(y, 1),
                    "x": round(x, 1),
                    "share": node.share,
                }
            )
        strength = points.strength
        return {
            "point": point,
            "y": round(float(points.y[point]), 1),
            "x": round(float(points.x[point]), 1),
            "share": float(strength[point] / self.total),
            "nodes": nodes,
        }

    @property
    def total(self) -> float:
        """All the evidence for the answer, in the photo."""
        return float(self.explanation.inside[0].double().clamp(min=0).sum()) or 1.0

    @property
    def size(self) -> int:
        """The bytes of memory that it takes, about."""
        explanation, sample = self.explanation, self.explanation.samples[0]
        tensors = [
            explanation.evidence,
            explanation.share,
            *(one.map for one in self.stages.values()),
        ]
        tensors += [sample.input] * 2  # the walk that can be done again has one of its own
        photo: int = (
            4 * self.drawn["width"] * self.drawn["height"]
        )  # Pillow's RGB takes 4 bytes a pixel
        return photo + sum(one.nbytes for one in tensors) + _REST

    def picture(self, layers: bool = False) -> bytes:
        """The picture of the command line, a PNG."""
        one = self.explanation[0]  # which goes with its maps
        made = encoded(one.picture(0, layers))
        self.explanation.forget()
        return made

    def numbers(self) -> bytes:
        """The JSON of the command line."""
        return as_json(self.explanation[0])

    def archive(self) -> bytes:
        """A ZIP with the pictures, the maps, and the numbers."""
        explanation = self.explanation[0]
        made = {
            "explanation.png": self.picture(layers=True),
            "explanation.json": self.numbers(),
            "attention.png": encoded(_grey(explanation.attention[0].numpy())),
            "saliency.png": encoded(_grey(explanation.saliency[0].numpy())),
            "boxes.json": json.dumps(self.drawn["boxes"], indent=1).encode(),
            "stages.json": json.dumps(
                [
                    {
                        "block": name,
                        "module": stage.module,
                        "call": stage.call,
                        "shape": stage.shape,
                        "map": np.round(stage.map.numpy(), 4).tolist(),
                        "nodes": [
                            {"channel": n.channel, "position": n.position, "share": n.share}
                            for n in stage.nodes
                        ],
                    }
                    for name, stage in self.stages.items()
                    if name != "pixels"  # which the points tell
                ]
            ).encode(),
        }
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in made.items():
                file.writestr(name, content)
        return buffer.getvalue()


def make_scene(explanation: Explanation, likeliest: Sequence[Explanation]) -> Scene:
    """The scene of an explanation of one photo, beside those of the likeliest classes.

    >>> first, *_ = likeliest = explainer.top("photo.jpg", 5)
    >>> make_scene(first, likeliest)
    """
    image = explanation.samples[0].image
    assert image is not None  # the page explains photos
    walked = stages(explanation.layers())
    # Where a network says no to its only class, there is nothing to put a box around.
    boxes = explanation.boxes()[0] if explanation.target[0] is not None else ()
    views = explanation.layer_views(0, list(walked.values()))
    explanation.forget()
    points = explanation.points[0]
    strength = points.strength[:_POINTS]
    # As in the pictures: the top 2 % count as equally strong, or one outlier would hide the rest.
    level = np.minimum(1, strength / np.quantile(points.strength, 0.98)) if len(points) else []
    shown = image.copy()
    shown.thumbnail((_SIDE, _SIDE))
    drawn = {
        "photo": data_uri(shown, "JPEG", quality=88),
        "width": image.width,
        "height": image.height,
        "model": explanation.network.name,
        "label": explanation.label[0],
        "index": explanation.target[0],
        "probability": explanation.probability[0],
        "points": [
            [round(float(x), 1), round(float(y), 1), round(float(one), 3)]
            for y, x, one in zip(points.y[:_POINTS], points.x[:_POINTS], level, strict=True)
        ],
        "attention": _map(explanation.attention[0].numpy(), _MAP),
        "saliency": _map(explanation.saliency[0].numpy(), _MAP),
        "boxes": [
            {
                "label": one.label,
                "score": round(one.score, 4),
                "box": [round(side, 1) for side in one.box],
            }
            for one in boxes
        ],
        "stages": [
            {
                "name": name,
                "shape": list(layer.shape),
                "box": [round(side, 1) for side in view.box],
                "map": _map(view.map, _STAGE),
                "nodes": [
                    [round(float(x), 1), round(float(y), 1), node.channel, round(node.share, 5)]
                    for y, x, node in zip(
                        view.points_y,
                        view.points_x,
                        (layer.nodes[i] for i in view.which),
                        strict=True,
                    )
                ],
            }
            for (name, layer), view in zip(walked.items(), views, strict=True)
        ],
        "likeliest": [
            {
                "index": one.target[0],
                "label": one.label[0],
                "probability": one.probability[0],
                "grid": _counted(one),
            }
            for one in likeliest
        ],
        "grid": _GRID,
    }
    # Without the maps that were made, which take more memory than all the rest.
    return Scene(replace(explanation), walked, boxes, drawn)


def stages(layers: Sequence[Layer]) -> dict[str, Layer]:
    """The layers to stop at on the way back from the class to the pixels, by their blocks; 28 at most.

    >>> list(stages(explanation.layers()))
    ['_conv_head', '_blocks.15', ..., '_blocks.0', '_conv_stem', 'pixels']

    A block is all whose names begin alike, as far as that leaves not too many of them; its layer is
    the last one. What only squashes or scales the block before, place by place, is none of its own.
    """
    pixels, *above = layers
    above = [
        layer
        for layer in above
        if layer.call != "aten.constant_pad_nd"
        and {2, 3} <= {of for of, _ in layer.layout.values()}
    ]
    found: dict[str, Layer] = {}
    for depth in range(1, 12):
        blocks = _blocks(above, depth)
        if found and len(blocks) > _MOST_STAGES:
            break
        found = blocks
    if len(found) > _MOST_STAGES:  # a network without blocks: every so many of its modules
        spots = np.linspace(0, len(found) - 1, _MOST_STAGES).round().astype(int)
        found = dict([*found.items()][spot] for spot in spots)
    return {**dict(reversed(found.items())), "pixels": pixels}


def _blocks(layers: Sequence[Layer], depth: int) -> dict[str, Layer]:
    """The last layer of each block, in the order in which these ran."""
    blocks: dict[str, list[Layer]] = {}
    for layer in layers:
        name = ".".join(layer.module.split(".")[:depth])
        # Put at the end: a block is where it ended.
        blocks[name] = [*blocks.pop(name, []), layer]
    found: dict[str, Layer] = {}
    shape: tuple[int, ...] = ()
    for name, block in blocks.items():
        last = block[-1]
        if len(block) > 1 or last.shape != shape or family_of(last.call) != "pointwise":
            found[name] = last
        shape = last.shape
    return found


def palette() -> list[list[int]]:
    """256 colours from weak to strong, those of the pictures: readable with any colour vision.

    >>> palette()[255]
    [247, 209, 61]
    """
    found: list[list[int]] = shades(np.linspace(0, 1, 256)).tolist()
    return found


def _place(
    explanation: Explanation, layer: Layer, position: tuple[int, ...]
) -> tuple[float, float]:
    """Where a node of a layer is, y and x in pixels of the user's image."""
    geometry = explanation.samples[0].geometry
    assert geometry is not None
    if layer.call == "input":
        at = [float(side) for side in position]
    else:
        at = [0.0, 0.0]
        for axis, (of, line) in layer.layout.items():
            at[of - 2] = float(line[position[axis - 2]])
    y, x = geometry.points_to_image(np.array(at[:1]), np.array(at[1:]))
    return float(y[0]), float(x[0])


def _counted(explanation: Explanation) -> list[int]:
    """The share of the evidence in each cell of a grid over the photo, in millionths."""
    geometry = explanation.samples[0].geometry
    assert geometry is not None
    evidence = explanation.inside[0].double().clamp(min=0).cpu().numpy()
    row, column = np.indices(evidence.shape)
    y, x = geometry.points_to_image(row.ravel(), column.ravel())
    height, width = geometry.image_size
    counted, _, _ = np.histogram2d(
        (y + 0.5) / height,
        (x + 0.5) / width,
        bins=_GRID,
        range=((0, 1), (0, 1)),
        weights=evidence.ravel(),
    )
    shares: list[int] = np.rint(1e6 * counted.ravel() / (counted.sum() or 1)).astype(int).tolist()
    return shares


def _map(values: np.ndarray, side: int) -> str:
    made = _grey(values)
    made.thumbnail((side, side), Image.Resampling.BILINEAR)
    return data_uri(made)


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8))
