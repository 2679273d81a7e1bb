"""Measures of how well a map tells where an answer comes from.

>>> from howyouseeme.evaluate import pointing, energy
>>> pointing(explanation.saliency[0], [[30, 23, 165, 182]])
1.0
"""

from __future__ import annotations

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
    max_box_accuracy,
    pointing,
    rank_correlation,
    road,
)

__all__ = [
    "IOUS",
    "THRESHOLDS",
    "Interval",
    "bootstrap",
    "box_hits",
    "box_ious",
    "deletion",
    "energy",
    "grid_share",
    "insertion",
    "inside",
    "intersection_over_union",
    "largest_region",
    "max_box_accuracy",
    "pointing",
    "rank_correlation",
    "road",
]
