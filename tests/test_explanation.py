"""What comes out: points and maps in the user's pixels, paths, layers, files."""

from __future__ import annotations

import json
import pickle
import sys
from collections import OrderedDict
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn

import howyouseeme as hysm
from howyouseeme import Explainer, Explanation, InputError, Network, Preprocess, record, shown
from howyouseeme import __version__ as version
from howyouseeme import forward as forward_module
from howyouseeme import views as views_module
from howyouseeme.backtrack import plan
from howyouseeme.draw import percent
from howyouseeme.explanation import Layer, Node
from howyouseeme.files import write
from howyouseeme.maps import gaussian_blur
from howyouseeme.methods import get_method
from howyouseeme.tape import Value
from howyouseeme.views import MOST_POINTS

METHODS = ["evidence", "seed", "exact"]
SCHEMA = json.loads((files("howyouseeme") / "data" / "explanation.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


class Residual(nn.Module):
    """Convolutions, batch norm, a branch, a concatenation and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.block = nn.Conv2d(6, 6, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.wide = nn.Conv2d(6, 4, 1)
        self.act = nn.ReLU()
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.pool(x + self.block(x))
        x = torch.cat([x, self.wide(x)], 1)
        return self.head(self.mean(self.act(x)).flatten(1))


def make_residual() -> Residual:
    torch.manual_seed(3)
    net = Residual().eval()
    with torch.no_grad():
        net.norm.weight.copy_(torch.tensor([1.0, -1.0, 0.5, 2.0, -0.5, 1.0]))
    return net


def make_bright(axes: int = 2, channels: int = 3) -> nn.Sequential:
    """Class 1 is brightness, class 0 is nothing: every white pixel is evidence, black ones are none."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](channels, 1, 1, bias=False)
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[axes - 1](1)
    head = nn.Linear(1, 2, bias=False)
    net = nn.Sequential(
        OrderedDict(see=conv, relu=nn.ReLU(), pool=pool, flatten=nn.Flatten(), head=head)
    )
    with torch.no_grad():
        conv.weight.fill_(1.0)
        head.weight.copy_(torch.tensor([[0.0], [1.0]]))
    return net.eval()


def photo_of_a_spot(height: int, width: int, y: float, x: float, radius: float) -> Image.Image:
    """Black, with a bright spot that is brightest at (y, x)."""
    down, across = np.mgrid[:height, :width]
    light = np.exp(-((down - y) ** 2 + (across - x) ** 2) / (2 * radius**2))
    light[light < 0.05] = 0
    return Image.fromarray((255 * light).astype(np.uint8)).convert("RGB")


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def photo() -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def network(preprocess: Preprocess | None = None) -> Network:
    return Network("residual", make_residual(), preprocess, ("a", "b", "c", "d", "e"))


# -- where --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("size", "spot"),
    [((64, 64), (20, 45)), ((48, 80), (10, 30)), ((150, 90), (80, 60)), ((256, 192), (130, 77))],
)
@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess((64, 64)),
        Preprocess((64, 48), interpolation="bicubic"),
        Preprocess((64, 64), resize="crop", crop_from=64),
        Preprocess((56, 56), resize="crop", crop_from=64, interpolation="bicubic"),
        Preprocess((64, 64), resize="crop", crop_from=50),  # padded
    ],
)
def test_points_and_maps_lie_where_the_object_is_in_the_photo(
    method: str, size: tuple[int, int], spot: tuple[int, int], preprocess: Preprocess
) -> None:
    photo = photo_of_a_spot(*size, *spot, radius=max(size) / 30)
    explanation = Explainer(make_bright(), method, preprocess=preprocess)(photo, 1)
    _, geometry = preprocess(photo)
    # The spot's brightest input pixel may be off by half a pixel of the input, rounding aside.
    off = max(1.0, 0.5 * max(geometry.scale) + 0.5)
    for y, x in (
        explanation.points[0].position[0],
        np.unravel_index(int(explanation.attention[0].argmax()), size),
        np.unravel_index(int(explanation.saliency[0].argmax()), size),
    ):
        if method == "seed":  # goes to k places of the spot, whichever they are
            assert max(abs(y - spot[0]), abs(x - spot[1])) <= max(size) / 10
        else:
            assert abs(y - spot[0]) <= off
            assert abs(x - spot[1]) <= off
    assert explanation.attention.shape == explanation.saliency.shape == (1, *size)


@pytest.mark.parametrize("method", METHODS)
def test_maps_are_zero_outside_of_the_crop(method: str) -> None:
    photo = Image.fromarray(np.full((40, 100, 3), 200, np.uint8))
    preprocess = Preprocess((20, 20), resize="crop", crop_from=20)
    explanation = Explainer(make_bright(), method, preprocess=preprocess)(photo, 1)
    for heat in (explanation.attention[0], explanation.saliency[0]):
        assert heat.shape == (40, 100)
        assert not heat[:, :29].any()
        assert not heat[:, 71:].any()
        assert heat[:, 30:70].max() == 1
    if method != "seed":  # which takes 20 of the equally bright pixels
        assert (explanation.attention[0][:, 31:69] > 0).all()
    points = explanation.points[0]
    assert points.x.min() >= 29.5
    assert points.x.max() <= 69.5


def test_the_coordinates_of_a_tensor_are_its_own() -> None:
    images = torch.zeros(2, 3, 10, 12)
    images[0, :, 4, 7] = 1.0
    images[1, 1, 9, 0] = 1.0
    explanation = Explainer(make_bright())(images, 1)
    assert [list(points[0])[:2] for points in explanation.points] == [[4, 7], [9, 0]]
    assert [len(points) for points in explanation.points] == [1, 1]
    for i, (y, x) in enumerate([(4, 7), (9, 0)]):
        assert explanation.saliency[i, y, x] == 1
        assert (explanation.saliency[i] == 1).sum() == 1
        assert explanation.attention[i].argmax() == y * 12 + x


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("axes", "shape"), [(1, (20,)), (3, (5, 6, 7))])
def test_other_numbers_of_axes(method: str, axes: int, shape: tuple[int, ...]) -> None:
    at = tuple(size // 2 for size in shape)
    signal = torch.zeros(1, 2, *shape)
    signal[(0, 1, *at)] = 1.0
    explanation = Explainer(make_bright(axes, 2), method, **_no_outliers(method))(signal, 1)
    points = explanation.points[0]
    assert points.position.shape[1] == axes
    assert points[0].position == at
    assert explanation.attention.shape == explanation.saliency.shape == (1, *shape)
    assert int(explanation.attention.argmax()) == int(np.ravel_multi_index(at, shape))
    assert explanation.paths[0][0].nodes[-1].position == at
    assert explanation.layers()[0].map.shape == shape
    assert explanation.samples[0].size == shape
    data = explanation.to_dict()
    VALIDATOR.validate(data)
    assert data["points"][0][:-1] == list(at)


def _no_outliers(method: str) -> dict[str, Any]:
    return {"outliers": False} if method == "seed" else {}


@pytest.mark.parametrize(("axes", "shape"), [(1, (20,)), (3, (5, 6, 7))])
def test_what_is_no_picture_is_not_drawn(axes: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    explanation = Explainer(make_bright(axes, 2))(torch.rand(1, 2, *shape))
    assert explanation._repr_html_() is None
    with pytest.raises(InputError, match=r"can't be drawn as a picture.*to_dict"):
        explanation.picture()
    with pytest.raises(InputError, match="can't be drawn"):
        explanation.save(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="can't be drawn"):
        explanation.layer_views(0, explanation.layers())


# -- points and maps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_points_are_sorted_and_positive(method: str, images: Tensor) -> None:
    explanation = Explainer(network(), method, **_no_outliers(method))(images)
    for points, evidence in zip(explanation.points, explanation.evidence, strict=True):
        strength = points.strength
        assert len(points) == int((evidence > 0).sum())
        assert (strength > 0).all()
        assert (np.diff(strength) <= 0).all()
        for y, x, value in points:
            assert value == pytest.approx(float(evidence[int(y), int(x)]))
        if method == "seed":
            assert (strength == strength.round()).all()


def test_of_equally_strong_points_the_nearer_to_the_top_left_goes_first() -> None:
    images = torch.zeros(1, 3, 8, 8)
    for y, x in [(6, 1), (2, 5), (2, 3), (0, 7)]:
        images[0, :, y, x] = 1.0
    images[0, :, 7, 7] = 2.0
    points = Explainer(make_bright())(images, 1).points[0]
    assert points.position.tolist() == [[7, 7], [0, 7], [2, 3], [2, 5], [6, 1]]


def test_there_are_at_most_so_many_points() -> None:
    images = torch.rand(1, 3, 50, 50) + 0.1
    explanation = Explainer(make_bright())(images, 1)
    assert int((explanation.evidence > 0).sum()) == 2500
    assert len(explanation.points[0]) == MOST_POINTS == SCHEMA["properties"]["points"]["maxItems"]


@pytest.mark.parametrize("method", METHODS)
def test_maps_are_from_zero_to_one(method: str, images: Tensor) -> None:
    explanation = Explainer(network(), method, **_no_outliers(method))(images)
    for heat in (explanation.attention, explanation.saliency):
        assert heat.shape == (2, 16, 12)
        assert heat.dtype == torch.float32
        assert heat.device.type == "cpu"
        assert heat.min() >= 0
        assert heat.flatten(1).amax(1).tolist() == [1.0, 1.0]


def test_maps_of_photos_of_different_sizes_are_taken_one_by_one(photo: Image.Image) -> None:
    explanation = Explainer(network(Preprocess((16, 12))))([photo, photo.resize((9, 11))])
    for name in ("attention", "saliency"):
        with pytest.raises(InputError, match=r"differ in size.*explanation\[i\]"):
            getattr(explanation, name)
        assert [getattr(one, name).shape for one in explanation] == [(1, 30, 20), (1, 11, 9)]


@pytest.mark.parametrize("method", METHODS)
def test_where_nothing_speaks_for_the_answer(method: str, tmp_path: Path) -> None:
    explanation = Explainer(make_bright(), method)(torch.zeros(1, 3, 8, 8), 1)
    assert len(explanation.points[0]) == 0
    assert explanation.coverage == (0.0,)
    assert not explanation.attention.any()
    assert not explanation.saliency.any()
    assert explanation.paths == ((),)
    assert all(len(layer.nodes) == 0 and not layer.map.any() for layer in explanation.layers())
    VALIDATOR.validate(explanation.to_dict())
    explanation.save(tmp_path, layers=True)


def test_exact_coverage_is_what_biases_leave_to_the_pixels(images: Tensor) -> None:
    def spoken_for(bias: float) -> float:
        net = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 2)).eval()
        with torch.no_grad():
            net[1].weight.fill_(1)
            net[1].bias.fill_(bias)
        return Explainer(net, "exact")(images, 0).coverage[1]

    pixels = float(images[1].sum())
    assert spoken_for(0) == pytest.approx(1)
    assert spoken_for(-5) == pytest.approx(1)  # speaks against it
    assert spoken_for(pixels) == pytest.approx(0.5)


@pytest.mark.parametrize("method", METHODS)
def test_coverage_is_a_share(method: str, images: Tensor) -> None:
    explanation = Explainer(network(), method)(images)
    assert len(explanation.coverage) == 2
    assert all(0 <= share <= 1 for share in explanation.coverage)


@pytest.mark.parametrize("method", METHODS)
def test_coverage_is_all_where_nothing_can_be_lost(method: str) -> None:
    images = torch.zeros(1, 3, 8, 8)
    images[0, 1, 3, 3] = 1.0  # one pixel, no bias: all there is comes from it
    explanation = Explainer(make_bright(), method)(images, 1)
    assert explanation.coverage[0] == pytest.approx(1.0)


# -- a batch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_indexing_gives_one_image(method: str, images: Tensor) -> None:
    explanation = Explainer(network(), method)(images)
    assert len(explanation) == 2
    assert len(list(explanation)) == 2
    for i in (0, 1, -1):
        one = explanation[i]
        assert len(one) == 1
        assert one.target[0] == explanation.target[i]
        assert one.label[0] == explanation.label[i]
        assert one.probability[0] == explanation.probability[i]
        assert one.coverage[0] == explanation.coverage[i]
        assert torch.equal(one.attention[0], explanation.attention[i])
        assert np.array_equal(one.points[0].position, explanation.points[i].position)
        assert one.paths[0] == explanation.paths[i]
        assert one.to_dict() == explanation.to_dict(range(2)[i])
    with pytest.raises(IndexError):
        explanation[2]


def test_joining_undoes_indexing(images: Tensor) -> None:
    explanation = Explainer(network())(images, [1, 2])
    joined = Explanation.join(list(explanation))
    assert torch.equal(joined.evidence, explanation.evidence)
    assert joined.target == explanation.target == (1, 2)
    assert joined.label == ("b", "c")
    assert joined.to_dict(1) == explanation.to_dict(1)
    assert joined.paths == explanation.paths


def test_what_can_not_be_joined(images: Tensor) -> None:
    one = Explainer(network())(images)
    joined = Explanation.join([one, Explainer(one.network.module)(images)])  # a network of its own
    assert len(joined) == 2 * len(one)
    with pytest.raises(InputError, match="no explanations to join"):
        Explanation.join([])
    with pytest.raises(InputError, match=r"one model and method.*residual.*residual"):
        Explanation.join([one, Explainer(network())(images)])
    with pytest.raises(InputError, match="Seed"):
        Explanation.join([one, Explainer(one.network, "seed")(images)])
    small = Explainer(make_residual())
    with pytest.raises(InputError, match=r"\(16, 12\) with \(8, 8\)"):
        Explanation.join([small(images), small(images[:, :, :8, :8])])

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_residual()

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return self.net(x if y is None else x + y)

    both = Explainer(Both().eval())
    with pytest.raises(InputError, match="equally many inputs can be joined, not by 1 with 2"):
        Explanation.join([both(images), both((images, images))])


def test_repr_says_what_was_answered(images: Tensor) -> None:
    explainer = Explainer(network())
    explanation = explainer(images, [0, 3])
    first, second = (percent(p) for p in explanation.probability if p is not None)
    assert repr(explanation) == f"Explanation(residual, evidence: a {first}, d {second})"
    by_function = explainer(images[:1], lambda output: output[:, 0])
    assert repr(by_function) == "Explanation(residual, evidence: the target)"
    assert repr(explanation.points[0]) == f"Points({len(explanation.points[0])})"


# -- paths --------------------------------------------------------------------------------------------


def connected(tape_plan: Any, values: list[Value], upper: Node, lower: Node) -> bool:
    """Whether some link leads from one node to the other with a weight that is not zero."""

    def flat(node: Node, value: Value) -> int | None:
        index = (0, node.channel, *node.position)
        if len(index) != len(value.shape):
            return None
        return int(np.ravel_multi_index(index, tuple(value.shape)))

    def matches(node: Node, value: Value) -> bool:
        name = value.call.name if value.call is not None else "input"
        return name == node.call and (value.call.module if value.call else "") == node.module

    for above in filter(lambda value: matches(upper, value), values):
        step, start = tape_plan.step(above), flat(upper, above)
        if step is None or start is None:
            continue
        for source, link in step.links:
            edges = link.edges(torch.tensor([start]))
            there = edges.index[(edges.index >= 0) & (edges.weight != 0)].tolist()
            if matches(lower, source) and flat(lower, source) in there:
                return True
    return False


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("evidence", None),
        ("evidence", 3),
        ("seed", None),
        ("seed", 3),
        ("exact", None),
        ("exact", 3),
    ],
)
def test_paths_lead_from_the_class_to_the_points(
    method: str, target: int | None, images: Tensor
) -> None:
    net = make_residual()
    explanation = Explainer(net, method, **_no_outliers(method))(images, target)
    for i, (paths, points) in enumerate(zip(explanation.paths, explanation.points, strict=True)):
        tape = record(net, [images[i : i + 1]])
        way = plan(tape, tape.output)
        values = list(tape.values)
        assert len(paths) == min(20, len(points)) > 0
        for path, point in zip(paths, points, strict=False):
            assert path.point == point
            first, last = path.nodes[0], path.nodes[-1]
            assert (first.module, first.call) == ("head", "aten.addmm")
            assert first.channel == explanation.target[i]
            assert (last.module, last.call) == ("", "input")
            assert last.position == point.position
            for upper, lower in pairwise(path.nodes):
                assert connected(way, values, upper, lower), (upper, lower)


@pytest.mark.parametrize("method", METHODS)
def test_a_path_ends_at_the_pixel_that_the_point_shows_in_the_photo(
    method: str, photo: Image.Image
) -> None:
    preprocess = Preprocess((16, 12), resize="crop", crop_from=18)
    explanation = Explainer(network(preprocess), method)(photo)
    geometry = explanation.samples[0].geometry
    assert geometry is not None
    for path in explanation.paths[0]:
        y, x = (np.array([at]) for at in path.nodes[-1].position)
        expected = [float(at[0]) for at in geometry.points_to_image(y, x)]
        assert [path.point.y, path.point.x] == pytest.approx(expected)


def test_a_path_may_be_asked_for_by_its_point(images: Tensor) -> None:
    explanation = Explainer(network())(images)
    assert explanation.path(1, [3, 0]) == (explanation.paths[1][3], explanation.paths[1][0])
    assert explanation.path(0, []) == ()
    with pytest.raises(IndexError):
        explanation.path(2, [0])
    count = len(explanation.points[1])
    for point in (count, -count - 1):
        with pytest.raises(
            IndexError, match=f"There is no point {point}: image 1 has {count}, from"
        ):
            explanation.path(-1, [0, point])
    assert explanation.path(0, -1) == explanation.path(0, [len(explanation.points[0]) - 1])


def test_no_images_have_no_maps(images: Tensor) -> None:
    nothing = Explainer(network())(images)[2:2]
    assert nothing.levels == nothing.counted == []
    assert nothing.points == ()


def test_an_explanation_can_be_pickled_whatever_was_asked_of_it(images: Tensor) -> None:
    explanation = Explainer(network())(images)
    paths = explanation.paths
    assert explanation.paths is paths  # each image costs a pass, once
    again = pickle.loads(pickle.dumps(explanation))
    assert torch.equal(again.evidence, explanation.evidence)
    assert [path.nodes for path in again.paths[1]] == [path.nodes for path in paths[1]]


def test_a_pickle_grows_no_faster_than_the_batch() -> None:
    net, alone = network(), []
    for count in (2, 8):
        batch = torch.rand(count, 3, 16, 16)
        explanation = Explainer(net)(batch)
        again = pickle.loads(pickle.dumps(explanation))
        assert torch.equal(again.samples[1].input, batch[1])
        alone.append(len(pickle.dumps(explanation[0])))
        whole = len(pickle.dumps(explanation))
        assert whole < alone[-1] + 20 * batch.numel() * batch.element_size()
    assert alone[1] < 1.1 * alone[0]


@pytest.mark.parametrize("each", [False, True])
def test_what_can_be_pickled_is_where_a_target_cannot(images: Tensor, each: bool) -> None:
    def target(output: Tensor) -> Tensor:  # of a function, which no pickle can find
        return output[:, 1]

    explanation = Explainer(network())(images, [target] * len(images) if each else target)
    again = pickle.loads(pickle.dumps(explanation))
    assert torch.equal(again.evidence, explanation.evidence)
    assert torch.equal(again.saliency, explanation.saliency)
    assert explanation.layers()
    with pytest.raises(InputError, match="couldn't be pickled"):
        again.layers()


@pytest.mark.parametrize("replay", [False, True])
def test_layers_of_a_model_that_changed_are_refused(images: Tensor, replay: bool) -> None:
    model = network().module
    explainer = Explainer(model, replay=replay)
    explanation = [explainer(images) for _ in range(4)][-1]
    assert explanation.layers()
    explanation.forget()
    with torch.no_grad():
        for weight in model.parameters():
            weight.neg_()
    for ask in (explanation.layers, lambda: explanation.paths):
        with pytest.raises(InputError, match=r"to what it answered .* weights have changed"):
            ask()


def test_layers_for_a_target_that_reads_something_else_by_now_are_refused(images: Tensor) -> None:
    explainer = Explainer(network(), "exact")
    made = [explainer(images, lambda output: output[:, c]) for c in range(3)]  # noqa: B023
    assert made[2].layers()
    with pytest.raises(InputError, match="what the target function reads"):
        made[0].layers()


def test_a_path_from_a_function_of_the_output(images: Tensor) -> None:
    explanation = Explainer(network(), contrast=False)(images, lambda output: output[:, 3])
    by_class = Explainer(network(), contrast=False)(images, 3)
    for path, expected in zip(explanation.paths[0], by_class.paths[0], strict=True):
        shared = path.nodes[-len(expected.nodes) + 1 :]  # all below the class, where both start
        for node, same in zip(shared, expected.nodes[1:], strict=True):
            assert (node.module, node.channel, node.position) == (
                same.module,
                same.channel,
                same.position,
            )
            assert node.share == pytest.approx(same.share, rel=1e-4)


def test_the_pass_is_recorded_again_once_an_image(images: Tensor) -> None:
    net = make_residual()
    explanation = Explainer(net)(images)
    calls: list[int] = []
    net.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    assert explanation.paths
    assert explanation.layers(0)
    assert explanation.layers(1)
    assert calls == [1, 1, 1, 1]  # paths of both images, then layers of each: the last walk is kept
    assert explanation.layers(1)
    assert len(calls) == 4


# -- layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_layers_go_from_the_pixels_up(method: str, images: Tensor) -> None:
    net = make_residual()
    explanation = Explainer(net, method)(images)
    for i in range(2):
        layers = explanation.layers(i)
        names = [layer.module for layer in layers]
        assert names[0] == ""
        assert layers[0].shape == (3, 16, 12)
        assert [layer.call for layer in layers].count("input") == 1
        assert layers[0].call == "input"
        assert len(layers[0].nodes) > 0
        modules = dict(net.named_modules())
        assert all(name in modules for name in names)
        order = [name for name in ("stem", "norm", "pool", "act") if name in names]
        assert [name for name in names if name in order] == order
        assert {"stem", "norm", "pool", "act"} <= set(names)
        for layer in layers:
            assert layer.map.shape == layer.shape[1:]
            assert layer.map.min() >= 0
            assert layer.map.max() in (0, 1)
            shares = [node.share for node in layer.nodes]
            assert shares == sorted(shares, reverse=True)
            assert len(shares) <= 20
            assert (len(shares) > 0) == (sum(shares) > 0)
            assert sum(shares) <= 1.001
            for node in layer.nodes:
                assert node.module == layer.module
                assert 0 <= node.channel < layer.shape[0]
                assert all(
                    0 <= at < size for at, size in zip(node.position, layer.shape[1:], strict=True)
                )
    with pytest.raises(IndexError):
        explanation.layers(2)


def test_the_layer_of_the_pixels_is_their_evidence(images: Tensor) -> None:
    explanation = Explainer(network(), focus=False)(images)
    evidence = explanation.evidence[1].clamp(min=0)
    torch.testing.assert_close(explanation.layers(1)[0].map, evidence / evidence.max())


def test_saliency_says_how_much_evidence_lies_below(images: Tensor) -> None:
    explanation = Explainer(network(), likeness=False)(images)
    for i, item in enumerate(explanation.evidence):
        own = item.clamp(min=0).double()
        # The attention's maximum is 1: scaled back, it is the evidence blurred.
        around = gaussian_blur(own, explanation.method.blur * min(own.shape))
        counted = own + 0.3 * around
        for y, x in [(0, 0), (3, 5), (7, 2)]:
            below = counted[counted <= counted[y, x]].sum() / counted.sum()
            assert explanation.saliency[i, y, x] == pytest.approx(float(below), abs=1e-6)


def test_the_evidence_is_hidden_and_nothing_else() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8)
    photo = Image.fromarray(noise)
    explanation = hysm.explain("efficientnet-lite0", photo, target=3)
    blurred = np.asarray(photo.filter(ImageFilter.GaussianBlur(224 / 9)))
    counted = explanation.counted[0].numpy()
    for share in (0.9, 0.5):
        strongest = np.sort(counted.ravel())[::-1]
        held = strongest.cumsum() / strongest.sum()
        there = counted >= strongest[np.searchsorted(held, share)]
        hidden, alone = (
            np.asarray(explanation.hidden(share=share, others=others)) for others in (False, True)
        )
        for found, gone in ((hidden, there), (alone, ~there)):
            # A pixel at the edge of the share may go either way.
            assert ((found[gone] != blurred[gone]).any(1)).sum() <= 1
            assert ((found[~gone] != noise[~gone]).any(1)).sum() <= 1


def test_without_the_evidence_it_is_no_cat() -> None:
    explainer = Explainer("efficientnet-lite0")
    explanation = explainer(hysm.sample_photo("cat"), target=285)
    hidden, alone = (
        explainer(explanation.hidden(others=others), target=285).probability[0]
        for others in (False, True)
    )
    assert hidden is not None
    assert alone is not None
    assert hidden < 0.2
    assert alone > 0.7


@pytest.mark.parametrize("share", [0, 1, float("nan")])
def test_a_share_that_hides_nothing_or_all_is_refused(images: Tensor, share: float) -> None:
    with pytest.raises(InputError, match="hides nothing, or all: give one between 0 and 1"):
        Explainer(network())(images).hidden(share=share)


# -- numbers ------------------------------------------------------------------------------------------


def test_the_schema_is_sound_and_describes_every_field() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)

    def visit(schema: dict[str, Any], name: str) -> None:
        assert schema.get("description"), f"{name} has no description"
        if "properties" in schema:
            assert schema["additionalProperties"] is False, name
            later = {"box", "fill"}  # than the first files of this version
            assert set(schema["required"]) == set(schema["properties"]) - later, name
        for key, inner in schema.get("properties", {}).items():
            visit(inner, f"{name}.{key}")

    visit(SCHEMA, "explanation")
    visit(SCHEMA["properties"]["points"]["items"], "point")


def test_the_example_in_the_docs_fits_the_schema() -> None:
    page = (Path(__file__).parent.parent / "docs" / "json.md").read_text()
    example = json.loads(page.split("```json\n")[1].split("```")[0])
    VALIDATOR.validate(example)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["tensor", "function", "photo", "crop", "one logit"])
def test_the_numbers_fit_the_schema(
    method: str, kind: str, images: Tensor, photo: Image.Image, tmp_path: Path
) -> None:
    path = tmp_path / "photo.png"
    photo.save(path)
    given: dict[str, Any] = {
        "tensor": (Explainer(make_residual(), method), images, None),
        "function": (Explainer(network(), method), images, lambda output: output[:, 1]),
        "photo": (Explainer(network(Preprocess((16, 12))), method), path, "b"),
        "crop": (
            Explainer(network(Preprocess((8, 8), resize="crop", crop_from=9)), method),
            photo,
            2,
        ),
        "one logit": (
            Explainer(nn.Sequential(make_residual(), nn.Linear(5, 1)).eval(), method),
            images,
            None,
        ),
    }
    explainer, source, target = given[kind]
    explanation = explainer(source, target)
    for i in range(len(explanation)):
        data = json.loads(json.dumps(explanation.to_dict(i), allow_nan=False))
        VALIDATOR.validate(data)
        assert len(data["points"]) == len(explanation.points[i])
        assert data["coverage"] == explanation.coverage[i]


def test_the_numbers_of_a_photo(photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    photo.save(path)
    explanation = Explainer(network(Preprocess((16, 12))))(path, "b")
    data = explanation.to_dict()
    assert data["image"] == {"name": str(path), "size": [30, 20]}
    assert data["target"] == {
        "index": 1,
        "label": "b",
        "probability": explanation.probability[0],
        "box": None,
    }
    y, x, strength = explanation.points[0][0]
    assert data["points"][0] == pytest.approx([y, x, strength], abs=0.006, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_provenance_is_enough_to_make_it_again(method: str, photo: Image.Image) -> None:
    preprocess = Preprocess((16, 12), resize="crop", crop_from=18, mean=(0.4, 0.5, 0.6))
    explanation = Explainer(network(preprocess), method)(photo)
    kept = json.loads(json.dumps(explanation.to_dict()))
    told = kept["provenance"]
    assert told["howyouseeme"] == version
    assert told["torch"] == torch.__version__
    assert told["input_shape"] == [3, 16, 12]
    assert (told["dtype"], told["device"]) == ("float32", "cpu")
    settings = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in told["preprocess"].items()
    }
    again = Preprocess(**settings)
    assert again == preprocess
    assert get_method(told["method"], **told["parameters"]) == explanation.method
    explainer = Explainer(
        replace(network(), preprocess=again), told["method"], **told["parameters"]
    )
    assert explainer(photo, kept["target"]["index"]).to_dict() == kept


# -- files --------------------------------------------------------------------------------------------


def test_files_are_named_after_the_photo(photo: Image.Image, tmp_path: Path) -> None:
    source = tmp_path / "my photo.v2.png"
    photo.save(source)
    out = tmp_path / "deep" / "out"
    explainer = Explainer(network(Preprocess((16, 12))))
    written = explainer(source).save(out)
    assert written == [out / "my photo.v2.png", out / "my photo.v2.json"]
    assert sorted(out.iterdir()) == sorted(written)
    with Image.open(written[0]) as picture:
        picture.load()
        assert picture.format == "PNG"
    data = json.loads(written[1].read_text())
    VALIDATOR.validate(data)
    assert data == explainer(source).to_dict()
    lines = written[1].read_text().splitlines()
    assert len(lines) == len(data["points"]) + len(data) + 3  # one point a line, one field a line


def test_files_of_a_batch_are_numbered(images: Tensor, tmp_path: Path) -> None:
    written = Explainer(network())(images).save(str(tmp_path), layers=True)
    names = ["explanation-0.png", "explanation-0.json", "explanation-1.png", "explanation-1.json"]
    assert [path.name for path in written] == names
    assert all(path.is_file() for path in written)
    named = Explainer(network())(images).save(tmp_path, name="mine")
    assert [path.name for path in named] == [n.replace("explanation", "mine") for n in names]


def test_photos_keep_their_names_where_they_differ(photo: Image.Image, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.png", "b.png", "B.jpg")]
    for file in files:
        photo.save(file)
    explainer = Explainer(network(Preprocess((16, 12))))
    apart = explainer(files[:2]).save(tmp_path / "out")
    assert [path.name for path in apart] == ["a.png", "a.json", "b.png", "b.json"]
    alike = explainer(files).save(tmp_path / "out")
    assert [path.name for path in alike[::2]] == ["a-0.png", "b-1.png", "B-2.png"]


def test_images_are_taken_by_number_or_slice(images: Tensor, tmp_path: Path) -> None:
    explanation = Explainer(network())(images)
    assert torch.equal(explanation[:].evidence, explanation.evidence)
    assert torch.equal(explanation[-1:].evidence, explanation[-1].evidence)
    for none in (explanation[2:], explanation[2:2], explanation[0:2:-1]):
        assert len(none) == 0
        assert none.evidence.shape == none.share.shape == (0, *explanation.evidence.shape[1:])
        assert none.samples == none.label == none.box == none.inputs == ()
        assert none.network is explanation.network
    assert torch.equal(explanation[::-1].evidence, explanation.evidence.flip(0))
    assert explanation[::-1].target == explanation.target[::-1]
    assert explanation.path(-1, 0) == explanation.path(1, [0])
    for ask in (
        explanation.__getitem__,
        explanation.picture,
        explanation.layers,
        explanation.to_dict,
    ):
        with pytest.raises(IndexError, match="There is no image 2: the batch has 2, from 0"):
            ask(2)
    with pytest.raises(InputError, match="'a/b' is no name of a file without its folder"):
        explanation.save(tmp_path, "a/b")


def test_maps_are_written_as_numbers(images: Tensor, tmp_path: Path) -> None:
    explanation = Explainer(network())(images)
    *_, last = explanation.save(tmp_path, "a", maps=True)
    assert last == tmp_path / "a-1.npz"
    with np.load(last) as maps:
        np.testing.assert_array_equal(maps["saliency"], explanation.saliency[1].numpy())
        np.testing.assert_array_equal(maps["attention"], explanation.attention[1].numpy())


def test_one_image_without_a_name(images: Tensor, tmp_path: Path) -> None:
    written = Explainer(network())(images[:1]).save(tmp_path)
    assert [path.name for path in written] == ["explanation.png", "explanation.json"]


def test_files_are_replaced(images: Tensor, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    Explainer(network())(images[:1]).save(tmp_path, "a")
    VALIDATOR.validate(json.loads((tmp_path / "a.json").read_text()))
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a.json"}


def test_no_photo_is_replaced_by_its_explanation(tmp_path: Path, photo: Image.Image) -> None:
    file = tmp_path / "photo.png"
    photo.save(file)
    before = file.read_bytes()
    explanation = Explainer(network(Preprocess((16, 12))))(file)
    with pytest.raises(
        InputError, match=r"photo\.png is read, and would be replaced; name another"
    ):
        explanation.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]
    assert file.read_bytes() == before
    assert len(explanation.save(tmp_path, "why")) == 2


@pytest.mark.parametrize(
    ("folder", "name", "message"),
    [
        (
            "new/cat.PNG",
            None,
            r"new.cat\.PNG is named as a file, .*: give '.*new', and 'cat' as the name",
        ),
        ("new", "b.png", r"The name 'b\.png' is one with a suffix, .*: give 'b'\."),
        ("new", "b.npz", "is one with a suffix"),
        ("new", ["a", "b"], r"The name is one text for all files, .*, not \['a', 'b'\]"),
        ("file", "a", "file is no folder, or is in none; name another"),
        ("file/in", "a", "in is no folder, or is in none"),
        ("taken", "a", r"a\.png is a folder, and a file is to be there; move it"),
    ],
)
def test_files_and_folders_are_told_apart(
    images: Tensor, tmp_path: Path, folder: str, name: Any, message: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "a.png").mkdir(parents=True)
    (tmp_path / "old.png").mkdir()
    explanation = Explainer(network())(images[:1])
    with pytest.raises(InputError, match=message):
        explanation.save(tmp_path / folder, name)
    assert not (tmp_path / "new").exists()
    assert len(explanation.save(tmp_path / "old.png")) == 2


def test_a_name_may_be_as_long_as_names_can_be(images: Tensor, tmp_path: Path) -> None:
    name = "x" * 250
    Explainer(network())(images[:1]).save(tmp_path, name)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png", f"{name}.json"}


def test_no_file_is_left_half_written(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explanation = Explainer(network())(images[:1])
    (tmp_path / "a.png").write_bytes(b"before")
    write = Path.write_bytes

    def interrupted(self: Path, content: bytes) -> int:
        write(self, content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        explanation.save(tmp_path, "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"before"


def test_no_picture_is_written_without_its_numbers(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Explanation, i: int = 0) -> dict[str, Any]:
        raise RuntimeError("no numbers")

    monkeypatch.setattr(Explanation, "to_dict", fail)
    with pytest.raises(RuntimeError, match="no numbers"):
        Explainer(network())(images).save(tmp_path)
    assert not list(tmp_path.iterdir())


# -- on screen ----------------------------------------------------------------------------------------


def test_a_layer_of_the_model_itself_is_not_taken_for_the_pixels() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.see = make_bright()

        def forward(self, x: Tensor) -> Tensor:
            return self.see(nn.functional.max_pool2d(x, 2) * 2)

    explanation = Explainer(Root().eval())(torch.rand(1, 3, 8, 8), 1)
    names = [view.name for view in explanation.layer_views(0, shown.stages(explanation.layers()))]
    assert names == ["pixels", "see.relu"]
    assert [layer.module for layer in explanation.layers()] == ["", "", "see.see", "see.relu"]
    assert [layer.call for layer in explanation.layers()][:2] == ["input", "aten.mul"]


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_a_picture_of_any_number_of_channels(channels: int) -> None:
    explanation = Explainer(make_bright(2, channels))(torch.rand(1, channels, 12, 10), 1)
    picture = explanation.picture()
    assert picture.mode in ("RGB", "RGBA")
    taller = explanation.picture(layers=True)
    assert taller.height > picture.height


class FakeNotebook:
    """Stands in for IPython, in a notebook or out of it."""

    def __init__(self, running: bool) -> None:
        self.shown: list[Image.Image] = []
        self.shell = object() if running else None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        package, module = type(sys)("IPython"), type(sys)("IPython.display")
        package.get_ipython = lambda: self.shell  # type: ignore[attr-defined]
        module.display = self.shown.append  # type: ignore[attr-defined]
        package.display = module  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "IPython", package)
        monkeypatch.setitem(sys.modules, "IPython.display", module)


@pytest.mark.parametrize("where", ["notebook", "IPython is there but not running", "no IPython"])
def test_show(where: str, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = FakeNotebook(running=where == "notebook")
    notebook.install(monkeypatch)
    if where == "no IPython":
        monkeypatch.setitem(sys.modules, "IPython", None)
    viewer: list[Image.Image] = []
    monkeypatch.setattr(Image.Image, "show", lambda self, *args: viewer.append(self))
    Explainer(network())(images).show()
    assert len(notebook.shown) == (2 if where == "notebook" else 0)
    assert len(viewer) == (0 if where == "notebook" else 2)


def test_what_was_made_once_is_there_for_each_image(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image of a batch has the maps of the batch, and the pass that was recorded for it last."""
    explanation = Explainer(network())(images)
    whole, points = explanation.saliency, explanation.points
    made: list[str] = []
    for name in ("gaussian_blur", "levels", "strongest_points"):
        function = getattr(views_module, name)
        monkeypatch.setattr(
            views_module,
            name,
            lambda *a, f=function, n=name, **k: made.append(n) or f(*a, **k),
        )
    for i in range(2):
        assert torch.equal(explanation[i].saliency[0], whole[i])
        assert explanation[i].points[0] is points[i]
    assert not made

    recorded: list[int] = []
    record = forward_module.record
    monkeypatch.setattr(
        forward_module, "record", lambda *a, **k: recorded.append(1) or record(*a, **k)
    )
    explanation[1].layers()
    explanation[1].path(0, 0)
    explanation.path(1, 0)
    assert len(recorded) == 1
    explanation[0].path(0, 0)
    explanation[0:1].layers()
    assert len(recorded) == 2
    explanation[0].forget()
    explanation.path(0, 0)
    assert len(recorded) == 3


def test_pictures_of_one_photo_make_its_maps_once(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[str] = []
    blur = views_module.gaussian_blur
    monkeypatch.setattr(
        views_module, "gaussian_blur", lambda *a, **k: made.append("blur") or blur(*a, **k)
    )
    explanation = Explainer(network(Preprocess((16, 12))))(photo)
    explanation.save(tmp_path, maps=True)
    explanation.picture()
    explanation.hidden()
    assert len(explanation.attention) == 1
    assert made == ["blur"]


def test_a_link_that_is_written_to_stays_one(tmp_path: Path) -> None:
    (tmp_path / "target.png").write_bytes(b"before")
    (tmp_path / "link.png").symlink_to("target.png")
    write(tmp_path / "link.png", b"after")
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "target.png").read_bytes() == b"after"


def test_what_lies_in_padding_shows_nothing_of_the_photo() -> None:
    """No points, no level and no dot of a layer there; nor does it count for any of them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 2))
    network = Network("net", net.eval(), Preprocess((32, 32), resize="fit", fill=200))
    photo = Image.fromarray(np.full((20, 40, 3), 90, np.uint8))
    explanation = Explainer(network, focus=False)(photo, target=1)
    padded = torch.cat([explanation.evidence[0, :8], explanation.evidence[0, 24:]])
    assert (padded > 0).any()  # the network does look there
    assert explanation.counted[0][:8].abs().sum() < 0.1 * explanation.counted[0].sum()
    inside = explanation.evidence[0, 8:24].clamp(min=0)
    assert len(explanation.points[0]) == int((inside > 0).sum())
    (pixels, *_), (view, *_) = (
        explanation.layers(),
        explanation.layer_views(0, explanation.layers()),
    )
    shown = [node for node in pixels.nodes if 8 <= node.position[0] < 24]
    assert len(view.points_y) == len(view.strength) == len(shown) < len(pixels.nodes)


def test_a_stage_is_shown_where_there_is_evidence() -> None:
    """Of the layers of one size the last, but not another scale of a detector's head, which saw nothing."""
    seen, none = torch.ones(4, 4), torch.zeros(4, 4)
    layers = [
        Layer(name, call, (8, *heat.shape), heat, ())
        for name, call, heat in (
            ("", "input", torch.ones(8, 8)),
            ("first", "aten.relu", seen),
            ("second", "aten.relu", seen),
            ("pad", "aten.constant_pad_nd", torch.ones(5, 5)),
            ("other", "aten.cat", none),
            ("small", "aten.cat", torch.zeros(2, 2)),
        )
    ]
    assert [layer.module for layer in shown.stages(layers)] == ["", "second", "small"]
