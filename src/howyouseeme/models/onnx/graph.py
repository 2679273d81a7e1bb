"""The graph of an ONNX file as a module, with a submodule for each of its nodes, named as in the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import HowYouSeeMeError, UnsupportedCallError, first_line
from . import constants, movement, pointwise, quantised, recurrent, selection, sums, windows  # noqa: F401
from .operators import OPERATORS, Attributes, to_tensor

__all__ = ["OWN", "WITH_GRAPHS", "OnnxModule", "operator_of", "operators_in", "opset_of"]

OWN = ("", "ai.onnx")  # the names of ONNX's own domain


class _Graph(nn.Module):
    """Nodes in the order of the file, and the constants that they take.

    `inputs` and `outputs` are names; `outer` are those of values that it takes from the graph around it.
    """

    def __init__(self, graph: Any, opset: int, around: Mapping[str, Any]) -> None:
        super().__init__()
        initial = {one.name: to_tensor(one) for one in graph.initializer}
        self.inputs = [one.name for one in graph.input if one.name not in initial]
        self.outputs = [one.name for one in graph.output]
        self.weights = nn.Module()
        self.nodes = nn.Module()
        self._place: dict[str, str] = {}  # where the constant of a name lies
        known: dict[str, Any] = {"": None, **around, **initial}
        for name in self.inputs:
            known.pop(name, None)
        for proto in graph.node:
            node = WITH_GRAPHS.get(operator_of(proto), _Node)(proto, opset, known)
            if all(name in known for name in node.takes):
                known.update(
                    zip(node.gives, node.results(*map(known.get, node.takes)), strict=False)
                )
            else:
                self.nodes.add_module(
                    _key(proto.name or next(filter(None, node.gives)), self.nodes), node
                )
        used = {name for node in self.steps() for name in node.takes} | {*self.outputs}
        made = {name for node in self.steps() for name in node.gives}
        for name in used:
            if isinstance(known.get(name), Tensor):
                self._place[name] = _key(name, self.weights)
                self.weights.register_buffer(self._place[name], known[name])
        self._others = {
            name: known[name] for name in used & known.keys() - self._place.keys()
        }  # lists, and nothing
        self.outer = sorted(used - made - known.keys() - {*self.inputs})

    def steps(self) -> list[_Node]:
        """The nodes that are run, in their order."""
        return [node for node in self.nodes.children() if isinstance(node, _Node)]

    def constants(self) -> dict[str, Any]:
        """What nodes take that doesn't depend on an input, by name."""
        weights = self.weights._buffers
        return {**self._others, **{name: weights[place] for name, place in self._place.items()}}

    def run(self, given: Mapping[str, Any]) -> list[Any]:
        """The outputs, in their order, for inputs and outer values by name."""
        known = {**self.constants(), **given}
        for node in self.steps():
            results = node.results(*(known[name] for name in node.takes))
            known.update(zip(node.gives, results, strict=False))
        return [known[name] for name in self.outputs]


class OnnxModule(_Graph):
    """The graph of an ONNX file, run node by node. What depends on constants alone is computed once."""

    def __init__(self, model: Any) -> None:
        super().__init__(model.graph, opset_of(model), {})
        self._said = {one.name: said_shape(one) for one in model.graph.input}

    def forward(self, *inputs: Tensor) -> Any:
        """The output, or a dict of several by their names in the file."""
        if len(inputs) != len(self.inputs):
            raise ValueError(f"takes {len(self.inputs)} inputs ({', '.join(self.inputs)})")
        given = [
            _laid(item, self._said[name]) for name, item in zip(self.inputs, inputs, strict=True)
        ]
        for name, item in zip(self.inputs, given, strict=True):
            if isinstance(item, Tensor) and not _fits(item.shape[1:], self._said[name][1:]):
                raise self._misfit(name)
        try:
            answers = self.run(dict(zip(self.inputs, given, strict=True)))
        except HowYouSeeMeError:
            raise
        except Exception as error:
            for name, item in zip(self.inputs, given, strict=True):
                if not _fits(item.shape, self._said[name]):  # most take more images than they say
                    raise self._misfit(name, f" ({first_line(error)})") from error
            raise
        return answers[0] if len(answers) == 1 else dict(zip(self.outputs, answers, strict=True))

    def _misfit(self, name: str, reason: str = "") -> ValueError:
        """What is said where an input is of another size than the file was exported for."""
        said = self._said[name]
        sizes = ", ".join("any" if size is None else str(size) for size in said)
        turned = ", channels last, which takes [batch, channel, height, width] here"
        return ValueError(
            f"the file was exported for inputs [{sizes}] alone{turned if channels_last(said) else ''}; give it "
            f"such, or export it for others{reason}"
        )


class _Node(nn.Module):
    """One node of a graph: it takes values by name, and gives others."""

    def __init__(self, node: Any, opset: int, known: Mapping[str, Any]) -> None:
        super().__init__()
        self.attributes = Attributes(node, opset)
        self.operator = operator_of(node)
        self.takes = list(node.input)
        self.gives = list(node.output)
        self.kind = node.op_type

    def forward(self, *inputs: Any) -> Any:
        try:
            return self.run(*inputs)
        except UnsupportedCallError as error:
            raise UnsupportedCallError(
                f"The ONNX operator {self.kind}, which gives {next(filter(None, self.gives))}, can't be imported: {error}"
            ) from None

    def results(self, *inputs: Any) -> Sequence[Any]:
        """What it gives, one for each of its names; a list is a single value, ONNX's sequence."""
        given = self(*inputs)
        return given if isinstance(given, tuple) else (given,)

    def run(self, *inputs: Any) -> Any:
        return OPERATORS[self.operator](self.attributes, *inputs)

    def _take(self, *bodies: _Graph) -> None:
        """Take what bodies need of the graph around them too."""
        self.own = len(self.takes)
        self.takes += sorted({name for body in bodies for name in body.outer})


class _If(_Node):
    """One of two graphs, as a condition says."""

    def __init__(self, node: Any, opset: int, known: Mapping[str, Any]) -> None:
        super().__init__(node, opset, known)
        self.yes = _Graph(self.attributes.get("then_branch"), opset, known)
        self.no = _Graph(self.attributes.get("else_branch"), opset, known)
        self._take(self.yes, self.no)

    def run(self, condition: Tensor, *outer: Any) -> Any:
        body = self.yes if bool(condition) else self.no
        return tuple(body.run(dict(zip(self.takes[self.own :], outer, strict=True))))


class _Loop(_Node):
    """A graph that is run so many times, or as long as a condition holds; it hands values on to itself."""

    def __init__(self, node: Any, opset: int, known: Mapping[str, Any]) -> None:
        super().__init__(node, opset, known)
        self.body = _Graph(self.attributes.get("body"), opset, known)
        self._take(self.body)

    def run(self, most: Tensor | None, condition: Tensor | None, *given: Any) -> Any:
        handed, outer = list(given[: self.own - 2]), given[self.own - 2 :]
        around = dict(zip(self.takes[self.own :], outer, strict=True))
        gathered: list[list[Tensor]] = [[] for _ in self.body.outputs[1 + len(handed) :]]
        number = 0
        while (most is None or number < int(most)) and (condition is None or bool(condition)):
            states = [torch.tensor(number), torch.tensor(True), *handed]
            condition, *results = self.body.run(
                {**around, **dict(zip(self.body.inputs, states, strict=True))}
            )
            handed = results[: len(handed)]
            for items, item in zip(gathered, results[len(handed) :], strict=True):
                items.append(item)
            number += 1
        if gathered and not number:
            raise UnsupportedCallError(
                "it runs not once, so that the shape of what it gathers isn't known."
            )
        return (*handed, *map(torch.stack, gathered))


#: The nodes that hold graphs themselves.
WITH_GRAPHS: dict[str, type[_Node]] = {"If": _If, "Loop": _Loop}


def opset_of(model: Any) -> int:
    """The version of ONNX's operators that a file was written in."""
    return max(int(one.version) for one in model.opset_import if one.domain in OWN)


def operator_of(node: Any) -> str:
    """The name of what a node does, with its domain where that isn't ONNX's own."""
    return node.op_type if node.domain in OWN else f"{node.domain}.{node.op_type}"


def operators_in(graph: Any) -> set[str]:
    """The names of all operators in a graph, those of its branches and loops included."""
    found = set()
    for node in graph.node:
        found.add(operator_of(node))
        for one in node.attribute:
            for body in [one.g] if one.HasField("g") else one.graphs:
                found |= operators_in(body)
    return found


#: How many channels a picture has.
_COLOURS = {1, 3, 4}


def channels_last(said: Sequence[int | None]) -> bool:
    """Whether an input of this shape has its channels on the last axis, as those of TensorFlow have."""
    return len(said) == 4 and said[3] in _COLOURS and said[1] not in _COLOURS


def _laid(item: Any, said: Sequence[int | None]) -> Any:
    """Pictures [batch, channel, height, width] as the file takes them: of some, one alone, or with channels last."""
    if not isinstance(item, Tensor) or item.dim() != 4:
        return item
    if len(said) == 3 and len(item) == 1:
        return item[0]
    last = channels_last(said) and item.shape[1] == said[3] != item.shape[3]
    return item.permute(0, 2, 3, 1) if last else item


def _fits(shape: Sequence[int], said: Sequence[int | None]) -> bool:
    return len(said) == len(shape) and all(
        size in {None, side} for size, side in zip(said, shape, strict=True)
    )


def said_shape(value: Any) -> list[int | None]:
    """The shape in the file, None for what it leaves open."""
    return [max(dim.dim_value, 0) or None for dim in value.type.tensor_type.shape.dim]


def _key(name: str, holder: nn.Module) -> str:
    """A name under which a module can hold something, and holds nothing yet."""
    base = key = name.replace(".", "/")
    number = 1
    while hasattr(holder, key):
        number += 1
        key = f"{base}:{number}"
    return key
