"""*How You See Me*, one node at a time: slow, obviously right, and only for the three test networks.

Written from the text of the method: fully connected, the k inputs with the highest contribution
(weight x activation) above zero; convolution, the channel whose contributions in the receptive field
add up to most, and in it the strongest position; pooling, the maximum activation in the receptive
field; batch norm, the same place, a negative scale turning *strongest* into *weakest*; residual add,
the strongest summand. Counts of paths add up, and the lowest index wins every tie.

It shares no code with howyouseeme: it makes its own forward pass, module by module, and keeps the
activations that it needs.

A node is asked for its strength (+1) or for its weakness (-1). What is asked of an input is what is
asked of the node, times the sign of the weight between them. Where paths that ask for different
things meet, the majority wins, and strength wins a draw.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor, nn

Place = tuple[int, ...]


@dataclass
class Paths:
    """At each place of one layer: how many paths reached it, and how many more ask for strength."""

    count: dict[Place, int] = field(default_factory=dict)
    asked: dict[Place, int] = field(default_factory=dict)

    def add(self, place: Place, count: int, sign: int) -> None:
        self.count[place] = self.count.get(place, 0) + count
        self.asked[place] = self.asked.get(place, 0) + count * sign

    def __iter__(self) -> Iterable[tuple[Place, int, int]]:
        for place, count in self.count.items():
            yield place, count, -1 if self.asked[place] < 0 else 1

    def moved(self, to: dict[Place, Place]) -> Paths:
        """The same paths under other names of their places."""
        result = Paths()
        for place, count, sign in self:
            result.add(to[place], count, sign)
        return result

    @staticmethod
    def together(*parts: Paths) -> Paths:
        result = Paths()
        for part in parts:
            for place, count, sign in part:
                result.add(place, count, sign)
        return result


def _sign(weight: float) -> int:
    return -1 if weight < 0 else 1


def _first_maximum(scores: dict[Place, float]) -> Place:
    """The place with the highest score; the lowest place if several have it."""
    best = max(scores.values())
    return min(place for place, score in scores.items() if score == best)


def fully_connected(paths: Paths, layer: nn.Linear, x: Tensor, k: int) -> Paths:
    weight, activation, result = layer.weight.detach().numpy(), x[0].numpy(), Paths()
    for (node,), count, sign in paths:
        contribution = sign * weight[node] * activation
        order = sorted(range(len(contribution)), key=lambda i: (-contribution[i], i))
        for i in order[:k]:
            if contribution[i] > 0:
                result.add((i,), count, sign * _sign(weight[node, i]))
    return result


def convolution(
    paths: Paths, layer: nn.Conv2d, x: Tensor, position: str, pad: int = 0, around: int = 0
) -> Paths:
    """`pad` zeros that belong to the convolution are no positions.

    `around` the map lie zeros that another layer put there: they are positions as any other, but
    nothing leads on from them.
    """
    weight, activation, result = layer.weight.detach().numpy(), x[0].numpy(), Paths()
    _, height, width = activation.shape
    outputs, group_in, rows, columns = weight.shape
    per_group = outputs // layer.groups
    for (o, y, x_), count, sign in paths:
        first = o // per_group * group_in
        patch: dict[int, dict[Place, tuple[float, float, float]]] = {}
        for c, dy, dx in product(range(group_in), range(rows), range(columns)):
            at = (y * layer.stride[0] - pad + dy, x_ * layer.stride[1] - pad + dx)
            inside = 0 <= at[0] < height and 0 <= at[1] < width
            if not inside and not around:
                continue
            value = activation[first + c, at[0], at[1]] if inside else 0.0
            w = weight[o, c, dy, dx]
            patch.setdefault(first + c, {})[at] = (sign * w * value, value, w)
        channel = _first_maximum(
            {(c,): sum(item[0] for item in places.values()) for c, places in patch.items()}
        )[0]
        criterion = {"contribution": 0, "activation": 1}[position]
        at = _first_maximum({place: item[criterion] for place, item in patch[channel].items()})
        if 0 <= at[0] < height and 0 <= at[1] < width:
            result.add((channel, *at), count, sign * _sign(patch[channel][at][2]))
    return result


def pool(paths: Paths, x: Tensor, kernel: int, stride: int, asked: bool = False) -> Paths:
    """The maximum activation; with `asked`, the minimum where weakness is asked for."""
    activation, result = x[0].numpy(), Paths()
    _, height, width = activation.shape
    for (c, y, x_), count, sign in paths:
        window = {
            (c, i, j): (sign if asked else 1) * activation[c, i, j]
            for i in range(y * stride, min(y * stride + kernel, height))
            for j in range(x_ * stride, min(x_ * stride + kernel, width))
        }
        result.add(_first_maximum(window), count, sign)
    return result


def average(paths: Paths, x: Tensor, position: str) -> Paths:
    """Global average pooling [channel] -> [channel, y, x]: what was asked for, most of it.

    Where 'activation' decides a position it is the highest activation, whatever was asked for.
    """
    window = paths.moved({(c,): (c, 0, 0) for (c,), _, _ in paths})
    return pool(window, x, max(x.shape[2:]), 1, asked=position == "contribution")


def batch_norm(paths: Paths, layer: nn.BatchNorm2d) -> Paths:
    result = Paths()
    for place, count, sign in paths:
        result.add(place, count, sign * _sign(float(layer.weight[place[0]])))
    return result


def add(paths: Paths, first: Tensor, second: Tensor) -> tuple[Paths, Paths]:
    """The larger summand, or the smaller where weakness is asked for; the first wins a tie."""
    to_first, to_second = Paths(), Paths()
    for place, count, sign in paths:
        a, b = sign * float(first[0][place]), sign * float(second[0][place])
        (to_first if a >= b else to_second).add(place, count, sign)
    return to_first, to_second


# -- the three networks ---------------------------------------------------------------------------


def _start(target: int) -> Paths:
    paths = Paths()
    paths.add((target,), 1, 1)
    return paths


@torch.no_grad()
def cifar(network: nn.Sequential, image: Tensor, target: int, k: int, position: str) -> Paths:
    before, x = [], image
    for layer in network:
        before.append(x)
        x = layer(x)
    paths = _start(target)
    for layer, x in zip(reversed(network), reversed(before), strict=True):
        match layer:
            case nn.Linear():
                paths = fully_connected(paths, layer, x, k)
            case nn.Conv2d():
                paths = convolution(paths, layer, x, position)
            case nn.BatchNorm2d():
                paths = batch_norm(paths, layer)
            case nn.MaxPool2d():
                paths = pool(paths, x, layer.kernel_size, layer.stride)
            case nn.Flatten():  # one place is left
                paths = paths.moved({(c,): (c, 0, 0) for c in range(x.shape[1])})
    return paths


@torch.no_grad()
def squeezenet(network: nn.Module, image: Tensor, target: int, k: int, position: str) -> Paths:
    first = network.conv1(image).relu()
    stages = [["fire2", "fire3"], ["fire4", "fire5"], ["fire6", "fire7", "fire8", "fire9"]]
    x, log = first, []  # log: (layer, its input, its squeezed map), or (None, input of a max-pool)
    for stage in stages:
        log.append((None, x, None))
        x = network.pool(x)
        for name in stage:
            fire = getattr(network, name)
            squeezed = fire.squeeze1x1(x).relu()
            log.append((fire, x, squeezed))
            parts = [fire.expand1x1(squeezed).relu(), fire.expand3x3(squeezed).relu()]
            x = torch.cat(parts, 1)

    paths = average(_start(target), network.conv10(x), position)
    paths = convolution(paths, network.conv10, x, position)
    for fire, x, squeezed in reversed(log):
        if fire is None:
            paths = pool(paths, x, 3, 2)
            continue
        half = fire.expand1x1.out_channels
        narrow, wide = Paths(), Paths()
        for (c, *place), count, sign in paths:
            (narrow if c < half else wide).add((c % half, *place), count, sign)
        paths = Paths.together(
            convolution(narrow, fire.expand1x1, squeezed, position),
            convolution(wide, fire.expand3x3, squeezed, position, pad=1),
        )
        paths = convolution(paths, fire.squeeze1x1, x, position)
    return convolution(paths, network.conv1, image, position, pad=1)


@torch.no_grad()
def efficientnet(network: nn.Module, image: Tensor, target: int, k: int, position: str) -> Paths:
    """'SAME' padding: a zero border of its own, more of it at the far side, in front of a convolution."""
    x = network._swish(network._bn0(network._conv_stem(image)))
    log = []
    for block in network._blocks:
        entered = x
        if hasattr(block, "_expand_conv"):
            x = block._swish(block._bn0(block._expand_conv(x)))
        expanded = x
        deep = block._swish(block._bn1(block._depthwise_conv(expanded)))
        x = projected = block._bn2(block._project_conv(deep))
        residual = block._depthwise_conv.stride[0] == 1 and projected.shape == entered.shape
        if residual:
            x = projected + entered
        log.append((block, entered, expanded, deep, projected, residual))
    last = x
    head = network._swish(network._bn1(network._conv_head(last)))
    pooled = network._avg_pooling(head).flatten(1)

    def same_padded(paths: Paths, layer: nn.Conv2d, x: Tensor) -> Paths:
        size, kernel, stride = x.shape[2], layer.kernel_size[0], layer.stride[0]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return convolution(paths, layer, x, position, pad=total // 2, around=total)

    paths = fully_connected(_start(target), network._fc, pooled, k)
    paths = average(paths, head, position)
    paths = same_padded(batch_norm(paths, network._bn1), network._conv_head, last)
    for block, entered, expanded, deep, projected, residual in reversed(log):
        past = Paths()
        if residual:
            paths, past = add(paths, projected, entered)
        paths = same_padded(batch_norm(paths, block._bn2), block._project_conv, deep)
        paths = same_padded(batch_norm(paths, block._bn1), block._depthwise_conv, expanded)
        if hasattr(block, "_expand_conv"):
            paths = same_padded(batch_norm(paths, block._bn0), block._expand_conv, entered)
        paths = Paths.together(paths, past)
    return same_padded(batch_norm(paths, network._bn0), network._conv_stem, image)
