"""The method `evidence` with dense Jacobians and plain loops: slow, obviously right, for tiny networks.

Written from the description of `howyouseeme.methods.evidence`; shares no code with howyouseeme. A
network is a list of named operations, which `Net` runs as PyTorch and `walk` freezes one by one.

The decisions that are a matter of taste have a function each: `rivals`, `unexcited` and `focus`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Array = np.ndarray
#: Where the rows of a map lie in the picture, and where its columns do.
Positions = tuple[list[float], list[float]]


# -- the decisions --------------------------------------------------------------------------------


def rivals(scores: Array, target: int) -> Array:
    """What each class weighs.

    1 for the target, minus half the average of the others, weighted by probability, and half the plain
    average of all. Where the others beat the target, their half shrinks to what leaves it half of its
    lead over the plain average, and the rest goes to the plain average.
    """
    others = [c for c in range(len(scores)) if c != target]
    weights = np.zeros(len(scores))
    weights[target] = 1
    if not others:
        return weights
    highest = max(scores[c] for c in others)
    total = sum(np.exp(scores[c] - highest) for c in others)
    share = {c: np.exp(scores[c] - highest) / total for c in others}
    mean = sum(scores) / len(scores)
    lead = scores[target] - mean
    best = sum(share[c] * scores[c] for c in others) - mean
    half = 0.5
    if best > 0:
        half = 0.5 * min(max(lead / best, 0), 1)
    for c in others:
        weights[c] -= half * share[c]
    return weights - (1 - half) / len(scores)


def unexcited(evidence: float) -> float:
    """How much of the evidence of a node ends there, if no input speaks for what is asked of it."""
    return evidence


def focus(maps: list[tuple[Array, Positions]], height: int, width: int) -> Array:
    """What a pixel's evidence is multiplied by: the evidence of its place at the last feature maps.

    Each map [channels, height, width] comes with the rows and columns of the picture where its places
    lie. Summed over channels, where positive, linear between the places, the maximum 1.
    """
    weight = np.zeros((height, width))
    for each, (rows, columns) in maps:
        place = np.maximum(each.sum(0), 0)
        for y, x in product(range(height), range(width)):
            for (i, share_y), (j, share_x) in product(_nearest(rows, y), _nearest(columns, x)):
                weight[y, x] += share_y * share_x * place[i, j]
    return weight / weight.max() if weight.max() > 0 else weight


def _nearest(positions: list[float], at: float) -> list[tuple[int, float]]:
    """The places before and after a pixel, with their shares of it; beyond the last, that alone."""
    order = sorted(range(len(positions)), key=lambda i: (positions[i], i))
    before = [i for i in order if positions[i] <= at]
    after = [i for i in order if positions[i] > at]
    if not before or not after:
        return [(before[-1] if before else after[0], 1.0)]
    low, high = before[-1], after[0]
    share = (at - positions[low]) / (positions[high] - positions[low])
    return [(low, 1 - share), (high, share)]


def positions(net: Net, values: dict[str, Tensor]) -> dict[str, Positions]:
    """Where in the picture the rows and the columns of each map lie."""
    image = values["image"]
    found: dict[str, Positions] = {
        "image": tuple([float(i) for i in range(size)] for size in image.shape[2:])
    }
    for op in net.ops:
        if values[op.out].dim() != 4 or op.ins[0] not in found:
            continue
        before = found[op.ins[0]]
        found[op.out] = tuple(
            [
                _read(line, place)
                for place in _windows(op, len(line), values[op.out].shape[2 + axis])
            ]
            for axis, line in enumerate(before)
        )
    return found


def _windows(op: Op, size: int, count: int) -> list[float]:
    """The middle of each window on an axis of the input, in the axis's own steps."""
    if op.kind not in {"conv", "max", "average"}:
        return [float(i) for i in range(count)]
    kernel, stride, pad = (
        option if isinstance(option, int) else option[0]
        for option in (op.module.kernel_size, op.module.stride, op.module.padding)
    )
    middles = []
    for i in range(count):
        window = list(range(i * stride - pad, i * stride - pad + kernel))
        if op.kind != "conv":  # pools look at nothing outside
            window = [at for at in window if 0 <= at < size]
        middles.append((window[0] + window[-1]) / 2)
    if count > 1 and count * stride >= size:  # they cover the axis: in its middle
        shift = (size - 1) / 2 - sum(middles) / count
        middles = [middle + shift for middle in middles]
    return middles


def _read(line: list[float], place: float) -> float:
    """A line of positions read between two of them, or beyond the last."""
    if len(line) == 1:
        return line[0]
    low = min(max(int(np.floor(place)), 0), len(line) - 2)
    return line[low] + (place - low) * (line[low + 1] - line[low])


# -- networks -------------------------------------------------------------------------------------


@dataclass
class Op:
    """`out = kind(ins)`. The last of a gate's inputs is the gate."""

    out: str
    kind: str
    ins: list[str]
    module: nn.Module | None = None

    def run(self, *x: Tensor) -> Tensor:
        if self.module is not None:
            return self.module(*x)
        return {
            "add": lambda a, b: a + b,
            "cat": lambda *parts: torch.cat(parts, 1),
            "gate": lambda signal, gate: signal * gate[:, :, None, None],
            "mean": lambda a: a.mean((2, 3)),
            "flatten": lambda a: a.flatten(1),
            "relu": F.relu,
            "sigmoid": torch.sigmoid,
        }[self.kind](*x)


class Net(nn.Module):
    """Runs operations in their order; the last one is the answer."""

    def __init__(self, ops: Sequence[Op]) -> None:
        super().__init__()
        self.ops = list(ops)
        self.layers = nn.ModuleList(op.module for op in ops if op.module is not None)

    def values(self, image: Tensor) -> dict[str, Tensor]:
        values = {"image": image}
        for op in self.ops:
            values[op.out] = op.run(*(values[name] for name in op.ins))
        return values

    def forward(self, image: Tensor) -> Tensor:
        return self.values(image)[self.ops[-1].out]


# -- one operation as matrices --------------------------------------------------------------------


def _probed(op: Op, x: Tensor) -> Array:
    """The matrix of a linear operation, bias left out, from its answer to each unit vector."""
    units = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape[1:])
    columns = op.run(units) - op.run(torch.zeros_like(x))
    return columns.reshape(x.numel(), -1).numpy().T


def _first_maxima(op: Op, x: Tensor, y: Tensor) -> Array:
    """A max-pool: 1 where the maximum was, the first of several."""
    assert isinstance(op.module, nn.MaxPool2d)
    size, stride, pad = op.module.kernel_size, op.module.stride, op.module.padding
    _, _, height, width = x.shape
    matrix = np.zeros((y.numel(), x.numel()))
    for row, (c, i, j) in enumerate(product(*map(range, y.shape[1:]))):
        window = [
            (float(x[0, c, a, b]), -((c * height + a) * width + b))
            for a in range(i * stride - pad, i * stride - pad + size)
            for b in range(j * stride - pad, j * stride - pad + size)
            if 0 <= a < height and 0 <= b < width
        ]
        matrix[row, -max(window)[1]] = 1
    return matrix


def freeze(op: Op, values: dict[str, Tensor]) -> dict[str, Array]:
    """The matrix [out, in] of an operation on this image, for each input that evidence goes back to."""
    x, y = values[op.ins[0]], values[op.out]
    match op.kind:
        case "conv" | "linear" | "mean" | "average" | "bn" | "flatten":
            return {op.ins[0]: _probed(op, x)}
        case "relu":
            return {op.ins[0]: np.diag((x > 0).double().flatten().numpy())}
        case "max":
            return {op.ins[0]: _first_maxima(op, x, y)}
        case "add":
            return {name: np.eye(y.numel()) for name in op.ins}
        case "gate":
            gate = values[op.ins[1]][:, :, None, None].expand_as(x)
            return {op.ins[0]: np.diag(gate.flatten().numpy())}
        case "cat":
            matrices, start = {}, 0
            for name in op.ins:
                size = values[name].numel()
                matrices[name] = np.eye(y.numel())[:, start : start + size]
                start += size
            return matrices
    raise NotImplementedError(op.kind)


#: One input element for each output element: evidence moves, and nothing is decided.
MOVES = {"bn", "relu", "max", "flatten", "gate", "cat"}


def _is_map(name: str, made_by: dict[str, Op]) -> bool:
    """A convolution's output, or what one-to-one operations make of one."""
    op = made_by.get(name)
    if op is None:
        return False
    if op.kind in MOVES | {"add"}:
        signals = op.ins[:1] if op.kind == "gate" else op.ins
        return any(_is_map(source, made_by) for source in signals)
    return op.kind == "conv"


# -- the walk -------------------------------------------------------------------------------------


@dataclass
class Found:
    pixels: Array  # [inputs]: evidence, with sign
    focused: Array  # the same, weighed by the evidence of their places
    start: float  # what the last feature maps set out with, with sign
    ended: float  # what ended on the way, with sign
    kept_positive: float
    ended_positive: float


def _sign(x: float) -> int:
    return -1 if x < 0 else 1


@torch.no_grad()
def walk(net: Net, image: Tensor, target: int, contrast: bool) -> Found:
    """`image` is a batch of one."""
    values = net.values(image)
    flat = {name: value.double().flatten().numpy() for name, value in values.items()}
    made_by = {op.out: op for op in net.ops}
    answer = net.ops[-1].out
    weights = np.eye(len(flat[answer]))[target]
    if contrast:
        weights = rivals(flat[answer], target)

    evidence = _head(net, values, flat, made_by, weights)
    start = sum(item.sum() for item in evidence.values())
    where = positions(net, values)
    maps = [
        (item.reshape(values[name].shape[1:]), where[name])
        for name, item in evidence.items()
        if values[name].dim() == 4
    ]

    # Body: each node hands its evidence to those that made it what it is.
    asked: dict[str, Array | None] = dict.fromkeys(evidence)
    ends: list[float] = []
    for op in reversed(net.ops):
        if op.out not in evidence:
            continue
        mine, orientation = evidence.pop(op.out), asked.pop(op.out)
        if op.kind in MOVES:
            sent = _move(op, values, flat, mine, orientation)
        else:
            sent, lost = _excite(op, values, flat, mine, orientation)
            ends += lost
        for source, (part, part_asked) in sent.items():
            met = source in evidence
            evidence[source] = evidence[source] + part if met else part
            asked[source] = None if met else part_asked
    pixels = evidence["image"]
    focused = pixels
    if maps:
        weights = focus(maps, *image.shape[2:])
        focused = (pixels.reshape(image.shape[1:]) * weights).flatten()
    return Found(pixels, focused, start, sum(ends), _positive(pixels), _positive(ends))


def _head(
    net: Net,
    values: dict[str, Tensor],
    flat: dict[str, Array],
    made_by: dict[str, Op],
    weights: Array,
) -> dict[str, Array]:
    """The evidence at the last feature maps: everything behind them is one linear map."""
    multipliers = {net.ops[-1].out: weights}
    evidence: dict[str, Array] = {}
    for op in reversed(net.ops):
        if op.out not in multipliers:
            continue
        if (
            _is_map(op.out, made_by)
            and values[op.out].dim() == 4
            and values[op.out][0, 0].numel() > 1
        ):
            evidence[op.out] = multipliers[op.out] * flat[op.out]
            continue
        for source, matrix in freeze(op, values).items():
            back = matrix.T @ multipliers[op.out]
            multipliers[source] = multipliers.get(source, 0) + back
    if "image" in multipliers:
        evidence["image"] = multipliers["image"] * flat["image"]
    return evidence


def _positive(items: Iterable[float]) -> float:
    return float(sum(max(item, 0) for item in items))


def _move(
    op: Op, values: dict[str, Tensor], flat: dict[str, Array], mine: Array, asked: Array | None
) -> dict[str, tuple[Array, Array | None]]:
    """All evidence goes to the one input; a negative slope turns *most* into *least*.

    Where a max-pool took the same element for several windows, the majority says what is asked.
    """
    matrices = freeze(op, values)
    if op.kind == "cat":
        return {
            name: (matrix.T @ mine, None if asked is None else matrix.T @ asked)
            for name, matrix in matrices.items()
        }
    ((source, matrix),) = matrices.items()
    if op.kind == "max":
        turned = None if asked is None else np.array([_sign(a) for a in matrix.T @ asked])
        return {source: (matrix.T @ mine, turned)}
    if op.kind == "flatten":
        return {source: (mine, asked)}
    if asked is None:
        asked = np.array([_sign(a) for a in flat[op.out]])
    return {source: (mine, asked * np.array([_sign(slope) for slope in np.diag(matrix)]))}


def _excite(
    op: Op, values: dict[str, Tensor], flat: dict[str, Array], mine: Array, asked: Array | None
) -> tuple[dict[str, tuple[Array, None]], list[float]]:
    """In proportion to the contributions with the sign that is asked for: that of the node itself,
    unless it was turned on the way."""
    matrices = freeze(op, values)
    shares = {source: np.zeros(len(flat[source])) for source in matrices}
    ends = []
    for j, e in enumerate(mine):
        if e == 0:
            continue
        wanted = asked[j] if asked is not None else _sign(flat[op.out][j])
        speaking = {
            source: np.maximum(wanted * matrix[j] * flat[source], 0)
            for source, matrix in matrices.items()
        }
        total = sum(part.sum() for part in speaking.values())
        gone = 0.0 if total > 0 else unexcited(e)
        if gone:
            ends.append(gone)
        for source, part in speaking.items():
            if total > 0:
                shares[source] += e * part / total
    return {source: (share, None) for source, share in shares.items()}, ends
