"""Operators of ONNX that choose: by an index, by what is largest, or by which boxes overlap."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import MissingExtraError, UnsupportedCallError
from .operators import Attributes, operator

__all__: list[str] = []


def _from_start(index: Tensor, size: int) -> Tensor:
    """Indices from 0, where those below it count from the end."""
    return torch.where(index < 0, index + size, index)


@operator("TopK")
def _top_k(attributes: Attributes, x: Tensor, count: Tensor | None = None) -> tuple[Tensor, Tensor]:
    axis = attributes.get("axis", -1)
    wanted = attributes.get("k") if count is None else int(count)
    # Of equals the first, where torch.topk takes any; sorted also where the node leaves that open.
    values, places = x.sort(dim=axis, descending=bool(attributes.get("largest", 1)), stable=True)
    return values.narrow(axis, 0, wanted), places.narrow(axis, 0, wanted)


@operator("ArgMax", "ArgMin")
def _arg_max(attributes: Attributes, x: Tensor) -> Tensor:
    attributes.only("select_last_index", 0)
    find = torch.argmax if attributes.kind == "ArgMax" else torch.argmin
    return find(x, attributes.get("axis", 0), keepdim=bool(attributes.get("keepdims", 1)))


@operator("Hardmax")
def _hard_max(attributes: Attributes, x: Tensor) -> Tensor:
    flat = x if attributes.opset >= 13 else x.flatten(attributes.get("axis", 1) % x.dim())
    axis = attributes.get("axis", -1) if attributes.opset >= 13 else -1
    chosen = F.one_hot(flat.argmax(axis), flat.shape[axis]).movedim(-1, axis)
    return chosen.reshape(x.shape).to(x.dtype)


@operator("Gather")
def _gather(attributes: Attributes, x: Tensor, index: Tensor) -> Tensor:
    axis = attributes.get("axis", 0) % x.dim()
    chosen = x.index_select(axis, _from_start(index, x.shape[axis]).reshape(-1))
    return chosen.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


@operator("GatherElements")
def _gather_elements(attributes: Attributes, x: Tensor, index: Tensor) -> Tensor:
    axis = attributes.get("axis", 0) % x.dim()
    return x.gather(axis, _from_start(index, x.shape[axis]))


@operator("GatherND")
def _gather_nd(attributes: Attributes, x: Tensor, index: Tensor) -> Tensor:
    first = attributes.get("batch_dims", 0)
    rows = [
        torch.arange(size, device=x.device).reshape(-1, *[1] * (index.dim() - 2 - axis))
        for axis, size in enumerate(x.shape[:first])
    ]
    places: tuple[Tensor, ...] = (*rows, *index.unbind(-1))
    return x[places]


@operator("ScatterND")
def _scatter_nd(attributes: Attributes, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    add = attributes.only("reduction", "none", "add") == "add"
    return x.index_put(index.unbind(-1), updates, accumulate=add)


@operator("ScatterElements", "Scatter")
def _scatter_elements(attributes: Attributes, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    axis = attributes.get("axis", 0) % x.dim()
    index = _from_start(index, x.shape[axis])
    kind = attributes.only("reduction", "none", "add", "mul", "max", "min")
    if kind == "none":
        return x.scatter(axis, index, updates)
    if kind == "add":
        return x.scatter_add(axis, index, updates)
    reduce = {"mul": "prod", "max": "amax", "min": "amin"}[kind]
    return x.scatter_reduce(axis, index, updates, reduce)


@operator("NonZero")
def _non_zero(attributes: Attributes, x: Tensor) -> Tensor:
    return x.nonzero().t() if x.dim() else x.reshape(1).nonzero()[:, :0].t()


@operator("Compress")
def _compress(attributes: Attributes, x: Tensor, condition: Tensor) -> Tensor:
    axis = attributes.get("axis")
    flat = x.flatten() if axis is None else x
    return flat.index_select(axis or 0, condition.nonzero()[:, 0])


@operator("OneHot")
def _one_hot(attributes: Attributes, index: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    count = int(depth)
    axis = attributes.get("axis", -1) % (index.dim() + 1)
    places = torch.arange(count, device=index.device).reshape(-1, *[1] * (index.dim() - axis))
    there = _from_start(index, count).unsqueeze(axis) == places
    return torch.where(there, values[1], values[0])


@operator("Trilu")
def _trilu(attributes: Attributes, x: Tensor, offset: Tensor | None = None) -> Tensor:
    diagonal = 0 if offset is None else int(offset)
    return x.triu(diagonal) if attributes.get("upper", 1) else x.tril(diagonal)


@operator("NonMaxSuppression")
def _non_max_suppression(
    attributes: Attributes,
    boxes: Tensor,
    scores: Tensor,
    most: Tensor | None = None,
    overlap: Tensor | None = None,
    least: Tensor | None = None,
) -> Tensor:
    """[chosen, 3]: image, class and box. A box goes whose better one of its class overlaps it by more."""
    if attributes.get("center_point_box", 0):
        x, y, width, height = boxes.unbind(-1)
        ends = [y - height / 2, x - width / 2, y + height / 2, x + width / 2]
    else:  # any two corners
        one, other = boxes[..., :2], boxes[..., 2:]
        ends = [*torch.minimum(one, other).unbind(-1), *torch.maximum(one, other).unbind(-1)]
    top, left, bottom, right = ends
    area = (bottom - top) * (right - left)
    limit = 0 if most is None else int(most)
    chosen: list[tuple[int, int, int]] = []
    for image, of_image in enumerate(scores):
        for category, score in enumerate(of_image):
            there = score > float(least) if least is not None else torch.ones_like(score).bool()
            order = score.sort(descending=True, stable=True).indices
            waiting = order[there[order]]
            kept = 0
            while kept < limit and len(waiting):
                best, waiting = waiting[0], waiting[1:]
                chosen.append((image, category, int(best)))
                kept += 1
                down = torch.minimum(bottom[image, best], bottom[image, waiting])
                down = down - torch.maximum(top[image, best], top[image, waiting])
                across = torch.minimum(right[image, best], right[image, waiting])
                across = across - torch.maximum(left[image, best], left[image, waiting])
                both = down.clamp(min=0) * across.clamp(min=0)
                shared = both / (area[image, best] + area[image, waiting] - both)
                waiting = waiting[~(shared > (0.0 if overlap is None else float(overlap)))]
    return torch.tensor(chosen, dtype=torch.int64, device=boxes.device).reshape(-1, 3)


@operator("RoiAlign")
def _roi_align(attributes: Attributes, x: Tensor, boxes: Tensor, images: Tensor) -> Tensor:
    try:
        from torchvision.ops import roi_align  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError(
            "RoiAlign needs the package torchvision: pip install torchvision"
        ) from error
    attributes.only("mode", "avg")
    usual = "half_pixel" if attributes.opset >= 16 else "output_half_pixel"
    half = attributes.get("coordinate_transformation_mode", usual) == "half_pixel"
    size = attributes.get("output_height", 1), attributes.get("output_width", 1)
    samples = attributes.get("sampling_ratio", 0) or -1
    rows = torch.cat([images.to(boxes.dtype)[:, None], boxes], 1)
    pooled: Tensor = roi_align(x, rows, size, attributes.get("spatial_scale", 1.0), samples, half)
    return pooled


# -- sequences: lists of tensors ------------------------------------------------------------------


@operator("SequenceEmpty")
def _sequence_empty(attributes: Attributes) -> list[Tensor]:
    return []


@operator("SequenceConstruct")
def _sequence_construct(attributes: Attributes, *items: Tensor) -> list[Tensor]:
    return list(items)


@operator("SequenceInsert")
def _sequence_insert(
    attributes: Attributes, items: Sequence[Tensor], item: Tensor, place: Tensor | None = None
) -> list[Tensor]:
    at = len(items) if place is None else int(place)
    at += len(items) if at < 0 else 0
    return [*items[:at], item, *items[at:]]


@operator("SequenceErase")
def _sequence_erase(
    attributes: Attributes, items: Sequence[Tensor], place: Tensor | None = None
) -> list[Tensor]:
    at = (-1 if place is None else int(place)) % len(items)
    return [*items[:at], *items[at + 1 :]]


@operator("SequenceAt")
def _sequence_at(attributes: Attributes, items: Sequence[Tensor], place: Tensor) -> Tensor:
    return items[int(place)]


@operator("SequenceLength")
def _sequence_length(attributes: Attributes, items: Sequence[Tensor]) -> Tensor:
    return torch.tensor(len(items))


@operator("SplitToSequence")
def _split_to_sequence(
    attributes: Attributes, x: Tensor, sizes: Tensor | None = None
) -> list[Tensor]:
    axis = attributes.get("axis", 0)
    if sizes is None:
        parts = x.split(1, axis)
        return (
            list(parts) if attributes.get("keepdims", 1) else [one.squeeze(axis) for one in parts]
        )
    return list(x.split(sizes.tolist(), axis))


@operator("ConcatFromSequence")
def _concat_from_sequence(attributes: Attributes, items: Sequence[Tensor]) -> Tensor:
    axis = attributes.get("axis")
    if attributes.get("new_axis", 0):
        return torch.stack(list(items), axis)
    if not items:
        raise UnsupportedCallError("there is nothing to join.")
    return torch.cat(list(items), axis)
