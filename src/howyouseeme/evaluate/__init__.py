"""Measures of how well a map tells where an answer comes from.

>>> from howyouseeme.evaluate import evaluate
>>> print(evaluate("efficientnet-lite0", photos, "boxes.csv").table())

And one by one:

>>> from howyouseeme.evaluate import pointing, energy
>>> pointing(explanation.saliency[0], [[30, 23, 165, 182]])
1.0
"""

from __future__ import annotations

from .boxes import Annotation, Annotations, read_boxes
from .measures import (
    IOUS,
    THRESHOLDS,
    Interval,
    bootstrap,
    box_hits,
    box_ious,
    deletion,
    energy,
    grid_share,
    insertion,
    inside,
    intersection_over_union,
    largest_region,
    pointing,
    rank_correlation,
    road,
    structural_similarity,
)
from .randomise import randomised
from .run import Evaluation, evaluate
from .scoring import (
    MEASURES,
    Grid,
    Item,
    Measure,
    Settings,
    make_grids,
    score_grid,
    score_image,
    summarise,
)

__all__ = [
    "IOUS",
    "MEASURES",
    "THRESHOLDS",
    "Annotation",
    "Annotations",
    "Evaluation",
    "Grid",
    "Interval",
    "Item",
    "Measure",
    "Settings",
    "bootstrap",
    "box_hits",
    "box_ious",
    "deletion",
    "energy",
    "evaluate",
    "grid_share",
    "insertion",
    "inside",
    "intersection_over_union",
    "largest_region",
    "make_grids",
    "pointing",
    "randomised",
    "rank_correlation",
    "read_boxes",
    "road",
    "score_grid",
    "score_image",
    "structural_similarity",
    "summarise",
]
