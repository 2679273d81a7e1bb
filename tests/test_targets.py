"""Boxes, regions, neurons, channels: what can be asked besides a class."""

from __future__ import annotations

import pickle
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import howyouseeme as hysm
from howyouseeme import Explainer, targets
from howyouseeme.detectors import boxes_in
from howyouseeme.errors import InputError
from howyouseeme.explanation import Explanation
from howyouseeme.localize import found_in
from howyouseeme.models import Network

models = pytest.importorskip("torchvision.models")


class Small(nn.Module):
    """Two stages with in-place activations, scores by place or over all."""

    def __init__(self, dense: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = dense
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(inplace=True))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.head(self.second(self.first(x)))
        return {"out": F.interpolate(x, scale_factor=2)} if self.dense else x.mean((2, 3))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def same(one: Explanation, other: Explanation) -> None:
    torch.testing.assert_close(one.evidence, other.evidence)
    assert one.evidence.any()


# -- two classes -----------------------------------------------------------------------------------


def test_two_classes_where_the_scores_keep_axes_of_one_place(images: Tensor) -> None:
    class Kept(Small):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x)[:, :, None, None]

    kept, flat = (
        hysm.explain(net.eval(), images, targets.versus(2, 0)) for net in (Kept(), Small())
    )
    same(kept, flat)


def test_one_class_and_not_another_is_the_difference_of_their_scores(images: Tensor) -> None:
    explainer = hysm.Explainer(Small().eval(), classes=["a", "b", "c", "d"])
    named, numbered, function = explainer.many(
        images,
        [targets.versus("c", "a"), targets.versus(2, 0), lambda out: out[:, 2] - out[:, 0]],
    )
    same(named, numbered)
    same(named, function)
    assert named.label == ("c, not a",) * 2
    assert numbered.label == ("c, not a",) * 2


def test_the_likeliest_class_and_not_another(images: Tensor) -> None:
    net = Small().eval()
    best = net(images).argmax(1).tolist()
    asked = hysm.explain(net, images, targets.versus(None, 0))
    for i, top in enumerate(best):
        same(asked[i], hysm.explain(net, images[i : i + 1], targets.versus(top, 0)))


def test_what_speaks_for_two_classes_alike_cancels_out() -> None:
    """Red speaks for both classes, green for the first alone."""
    see, head = nn.Conv2d(3, 3, 1, bias=False), nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        see.weight.copy_(torch.eye(3)[:, :, None, None])
        head.weight.copy_(torch.tensor([[5.0, 1.0, 0.0], [5.0, 0.0, 0.0]]))
    net = nn.Sequential(see, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()
    picture = torch.zeros(1, 3, 8, 8)
    picture[:, 0, :4], picture[:, 1, 4:] = 1, 1
    found = hysm.explain(net, picture, targets.versus(0, 1), contrast=False)
    assert found.evidence[:, 4:].sum() > 0
    assert not found.evidence[:, :4].any()


@pytest.mark.parametrize(
    ("net", "target", "message"),
    [
        (Small(), targets.versus(0, 9), "Small has no class 9; indices go from 0 to 3"),
        (Small(), targets.versus("a", 1), "no class names"),
        (
            Small(dense=True),
            targets.versus(0, 1),
            r"no classifier whose output is \[batch, classes\]",
        ),
    ],
)
def test_classes_that_can_not_be_told_apart(
    images: Tensor, net: nn.Module, target: targets.Target, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        hysm.explain(net.eval(), images, target)


# -- inside the network ---------------------------------------------------------------------------


def outside(evidence: Tensor, y: slice, x: slice) -> Tensor:
    rest = evidence.clone()
    rest[..., y, x] = 0
    return rest


@pytest.mark.parametrize("method", ["evidence", "seed", "exact"])
def test_a_neuron_is_explained_within_its_receptive_field(method: str, images: Tensor) -> None:
    net = Small().eval()
    parameters = {"outliers": False} if method == "seed" else {}
    explainer = hysm.Explainer(net, method, **parameters)
    activations = net.second(net.first(images))
    channel = int(activations[:, :, 4, 3].amin(0).argmax())  # it fires in both images
    explanation = explainer(images, targets.neuron("second", channel, 4, 3))
    assert explanation.label == (f"neuron {channel} of second at 4, 3",) * 2
    assert explanation.target == explanation.probability == (None, None)
    assert explanation.evidence.any()
    # Place (4, 3) sees rows 7 to 9 of the first stage, and that rows 6 to 10 of the picture.
    assert not outside(explanation.evidence, slice(6, 11), slice(4, 9)).any()
    assert explanation.path(0, [0])[0].nodes[0].share > 0
    assert explanation.layers()[0].module == ""


def test_a_neuron_below_zero_has_its_reasons_too(images: Tensor) -> None:
    """Evidence starts behind its convolution: at the neuron itself there is but its own value."""
    net = Small().eval()
    activations = net.second[0](net.first(images))
    channel = int(activations[:, :, 4, 3].amax(0).argmin())
    assert (activations[:, channel, 4, 3] < 0).all()
    explainer = hysm.Explainer(net, focus=False)
    explanation = explainer(images, targets.neuron("second.0", channel, 4, 3))
    assert all(len(points) for points in explanation.points)


def test_a_neuron_accounts_for_its_activation(images: Tensor) -> None:
    net = Small().double().eval()
    for layer in (net.first, net.second):
        layer[0].bias.data.zero_()
    explainer = hysm.Explainer(net, "exact")
    images = images.double()
    for layer, module in [("first.0", net.first[0]), ("first", net.first), (net.first, net.first)]:
        explanation = explainer(images, targets.neuron(layer, 2, 5, 6))
        want = module(images)[:, 2, 5, 6]
        torch.testing.assert_close(explanation.evidence.sum((1, 2)), want)
    explanation = explainer(images, targets.channel("second", 3))
    torch.testing.assert_close(
        explanation.evidence.sum((1, 2)), net.second(net.first(images))[:, 3].sum((1, 2))
    )
    explanation = explainer(images, targets.neuron("second", 3))
    torch.testing.assert_close(
        explanation.evidence.sum((1, 2)), net.second(net.first(images))[:, 3].amax((1, 2))
    )


def test_a_layer_is_read_before_it_is_written_to(images: Tensor) -> None:
    """The convolution's own output, not what the ReLU behind it makes of the same memory."""
    net = Small().double().eval()
    images = images.double()
    raw = net.first[0](images)
    place = tuple(int(i) for i in torch.unravel_index(raw[0].argmin(), raw.shape[1:]))
    assert raw[0][place] < 0
    explanation = hysm.explain(net, images, targets.neuron("first.0", *place), method="exact")
    want = raw[:, place[0], place[1], place[2]] - net.first[0].bias[place[0]]
    torch.testing.assert_close(explanation.evidence.sum((1, 2)), want)


def test_the_last_layer_is_a_class(images: Tensor) -> None:
    net = Small().eval()
    explainer = hysm.Explainer(net, contrast=False)
    same(explainer(images, targets.channel("", 2)), explainer(images, 2))


def test_of_a_module_that_runs_twice_the_last_counts(images: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x)).mean((2, 3))

    net = Twice().eval()
    explanation = hysm.explain(net, images, targets.channel("conv", 1), method="exact")
    want = net.conv(net.conv(images))[:, 1].sum((1, 2))
    torch.testing.assert_close(explanation.evidence.sum((1, 2)), want)


def test_each_image_its_own_target(images: Tensor) -> None:
    explainer = hysm.Explainer(Small().eval())
    asked = [targets.neuron("second", 1), targets.channel("second", 5)]
    both = explainer(images, asked)
    assert both.label == ("neuron 1 of second", "channel 5 of second")
    for i in range(2):
        torch.testing.assert_close(both.evidence[i], explainer(images, asked[i]).evidence[i])
    mixed = explainer(images, [2, lambda output: output[:, 1]])
    assert mixed.target == (2, None)


def test_many_targets_cost_one_pass(images: Tensor) -> None:
    net = Small().eval()
    passes = []
    net.first.register_forward_hook(lambda *_: passes.append(1))
    asked = [None, targets.neuron("second", 1), lambda output: output[:, 1], targets.channel("", 2)]
    assert len(hysm.Explainer(net).many(images, asked)) == 4
    assert len(passes) == 1


class Answers(nn.Module):
    """A detector of 6 x 6 places and 3 classes that answers in one of the usual ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 5, 1))
        self.way = way

    def forward(self, x: Tensor) -> Any:  # noqa: PLR0911
        y, there, nothing = self.body(x).flatten(2).split([3, 1, 1], 1)  # [batch, ..., 36]
        batch, at = len(x), torch.arange(36.0)
        place = torch.stack([at % 6 * 2 + 1, (at / 6).floor() * 2 + 1, at * 0 + 3, at * 0 + 3])
        place = place.expand(batch, 4, 36)
        if self.way == "queries":
            logits = torch.cat([y, nothing], 1).transpose(1, 2)
            return {"logits": logits, "pred_boxes": place.transpose(1, 2) / 12}
        if self.way == "sigmoid queries":
            return {"logits": y.transpose(1, 2), "pred_boxes": place.transpose(1, 2) / 12}
        if self.way == "columns":
            return torch.cat([place, y.sigmoid()], 1)
        if self.way == "columns with masks":
            return torch.cat([place, y.sigmoid(), there - 9, nothing], 1), torch.rand(1, 2)
        if self.way == "rows":
            return torch.cat([place, there.sigmoid(), y.sigmoid()], 1).transpose(1, 2)
        best, which = y.sigmoid().max(1)
        order = best.sort(descending=True).indices[:, :7]
        corners = torch.cat([place[:, :2] - place[:, 2:] / 2, place[:, :2] + place[:, 2:] / 2], 1)
        rows = torch.cat([corners, best[:, None], which[:, None].float()], 1)
        table = rows.gather(2, order[:, None].expand(-1, 6, -1)).transpose(1, 2)
        if self.way == "chosen":
            return torch.cat([table, torch.zeros(batch, 2, 6)], 1)  # filled up
        boxes, scores, labels = table.split([4, 1, 1], 2)
        return {"boxes": boxes, "scores": scores[..., 0], "labels": labels[..., 0].long()}


WAYS = ["queries", "sigmoid queries", "columns", "columns with masks", "rows", "chosen", "named"]


@pytest.mark.parametrize("way", WAYS)
def test_a_box_of_any_kind_of_detector(way: str) -> None:
    """Its logit, place and class, found by hand; the map is that of the function which returns that logit."""
    net = Answers(way).eval()
    network = hysm.Network("net", net, classes=("cat", "dog", "owl"))
    images = torch.rand(2, 3, 12, 12)
    explained = hysm.Explainer(network, focus=False, likeness=False)(images, targets.box(0))
    with torch.no_grad():
        y = net.body(images).flatten(2)
    scores = y[:, :3].sigmoid()
    if way == "queries":
        scores = torch.cat([y[:, :3], y[:, 4:]], 1).softmax(1)[:, :3]
    if way == "rows":
        scores = scores * y[:, 3:4].sigmoid()
    for i in range(2):
        category, at = divmod(int(scores[i].argmax()), 36)
        assert explained.label[i] == f"{'cat dog owl'.split()[category]}, box 0"
        assert explained.probability[i] == pytest.approx(float(scores[i].max()), abs=1e-6)
        x0, y0 = at % 6 * 2 - 0.5, at // 6 * 2 - 0.5
        inside = [min(max(side, 0), 12) for side in (x0, y0, x0 + 3, y0 + 3)]
        assert explained.box[i] == pytest.approx(inside, abs=1e-4)
        if way not in {"queries", "rows"}:  # which have rivals, or two factors
            own = hysm.Explainer(net.body, focus=False, likeness=False)
            alone = own(images[i : i + 1], lambda y, c=category, at=at: y.flatten(2)[:, c, at])
            torch.testing.assert_close(explained.evidence[i], alone.evidence[0])


def test_boxes_that_overlap_better_ones_of_their_class_are_left_out() -> None:
    network = hysm.Network("net", nn.Identity(), classes=("cat", "dog"))
    rows = [
        (10, 10, 8, 8, 0.9, 0.0),
        (10, 11, 8, 8, 0.8, 0.0),  # the first again
        (10, 11, 8, 8, 0.0, 0.7),  # there, but a dog
        (30, 10, 8, 8, 0.6, 0.1),
    ]
    columns = torch.tensor([*rows, *[(90.0, 90, 1, 1, 0.0, 0)] * 5]).T[None]
    (found,) = boxes_in(columns, network, 3)
    assert found.scores.tolist() == pytest.approx([0.9, 0.7, 0.6])
    assert found.classes.tolist() == [0, 1, 0]
    assert found.boxes[1].tolist() == [6, 7, 14, 15]
    centred = torch.tensor([[(0.5, 0.5, 0.2, 0.2, 0.9, 1), (0.1, 0.1, 0.2, 0.4, 0.5, 0)]])
    (found,) = boxes_in(centred, network)  # as RT-DETR answers
    assert found.relative
    assert found.boxes.flatten().tolist() == pytest.approx([0.4, 0.4, 0.6, 0.6, 0, -0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("answer", "names", "message"),
    [
        (
            torch.rand(1, 50, 85),
            None,
            "can be read in several ways .* no class names: .* would have 46 classes, of a YOLOv5 45",
        ),
        (torch.rand(1, 85, 50), tuple("abc"), "can be read in several ways .* 3 class names"),
        (torch.rand(1, 7, 8), tuple("abc"), "can be read in several ways"),
        (torch.rand(1, 9, 150), None, "can be read in several ways"),
        (torch.randn(1, 7, 50), tuple("abc"), "in several ways or in none with 3 class names"),
        (torch.rand(2, 3), None, r"no detector whose answer is known: it is tensor \[2, 3\]"),
        ({"scores": torch.ones(3).long()}, None, "no detector whose answer is known"),
        ([], None, "no detector whose answer is known"),
        (
            {"logits": torch.rand(1, 9, 7), "pred_boxes": torch.rand(1, 9, 4)},
            None,
            "7 scores for each",
        ),
    ],
)
def test_answers_that_are_not_told_apart(
    answer: Any, names: tuple[str, ...] | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        boxes_in(answer, hysm.Network("net", nn.Identity(), classes=names))


def read(answer: Any, *names: str, count: int = 3) -> Any:
    return boxes_in(answer, hysm.Network("net", nn.Identity(), classes=names or None), count)


def test_a_table_of_one_class_is_not_taken_for_rows_with_their_class() -> None:
    """YOLOv5 with one class: that score is never trained, and nearly 1 everywhere."""
    table = torch.cat(
        [torch.rand(90, 2) * 640, torch.rand(90, 2) * 9 + 5, torch.rand(90, 1) / 9], 1
    )
    table = torch.cat([table, torch.full((90, 1), 0.99998)], 1)
    table[70, 4] = 0.9
    (found,) = read(table[None], "face")
    assert found.scores[0] == pytest.approx(0.9, abs=1e-3)
    assert found.boxes[0] == pytest.approx(
        table[70, [0, 1, 0, 1]] + table[70, [2, 3, 2, 3]] * torch.tensor([-0.5, -0.5, 0.5, 0.5])
    )
    with pytest.raises(InputError, match="can be read in several ways"):
        read(table[None])


def test_shares_of_the_sides_are_told_from_pixels() -> None:
    crossed = torch.tensor([[[0.6, 0.6, 0.1, 0.1, 0.9, 0.0]], [[0.3, 0.3, 0.5, 0.5, 0.9, 0.0]]])
    one, two = read(crossed)  # both are of one network
    assert one.relative
    assert one.boxes[0].tolist() == pytest.approx([0.55, 0.55, 0.65, 0.65])
    assert two.boxes[0].tolist() == pytest.approx([0.05, 0.05, 0.55, 0.55])
    (either,) = read(crossed[1:])
    assert either.boxes is None
    assert either.scores.tolist() == pytest.approx([0.9])
    table = torch.cat([torch.rand(1, 60, 4), torch.rand(1, 60, 3) * 0.9], 2)
    assert read(table, *"abc")[0].relative


def test_the_best_of_all_queries_and_classes_where_these_do_not_exclude_each_other() -> None:
    logits = torch.tensor([[[3.0, 2.0, -4.0], [1.0, -4.0, -4.0]]])
    (found,) = read({"logits": logits, "pred_boxes": torch.rand(1, 2, 4)}, *"abc")
    assert found.scores.tolist() == pytest.approx(torch.tensor([3.0, 2, 1]).sigmoid().tolist())
    assert found.classes.tolist() == [0, 1, 0]


def test_names_that_are_too_few_do_not_make_scores_of_something_else() -> None:
    table = torch.cat([torch.rand(1, 4, 90) * 9, torch.rand(1, 18, 90) * 0.9], 1)
    with pytest.raises(InputError, match="16 class names: of a YOLOv8 or later it would have 18"):
        read(table, *map(str, range(16)))
    with pytest.raises(InputError, match="no 'scores' and 'boxes'"):
        read({"scores": torch.rand(2, 5)})  # of classes
    with pytest.raises(InputError, match="not all between 0 and 1"):
        read({"scores": torch.randn(5)})
    with pytest.raises(InputError, match="no 'scores' and 'boxes'"):
        read({"scores": torch.rand(5), "boxes": torch.rand(5, 5)})


@pytest.mark.parametrize("index", [-1, True, 1.0, "0", None])
def test_numbers_that_no_box_has(index: Any) -> None:
    with pytest.raises(InputError, match="numbers from 0 on: there is no box"):
        targets.box(index)


def test_a_configuration_tells_whether_one_score_means_nothing() -> None:
    """Also where somebody gave that a name."""
    module = nn.Identity()
    module.config = SimpleNamespace(id2label={0: "cat", 1: "dog"})
    network = hysm.Network("net", module, classes=("cat", "dog", "nothing"))
    logits = torch.tensor([[[1.0, 2.0, 9.0], [3.0, 0.0, 0.0]]])
    (found,) = boxes_in({"logits": logits, "pred_boxes": torch.rand(1, 2, 4)}, network)
    assert found.classes.tolist() == [0, 1]
    assert found.scores.tolist() == pytest.approx(
        [float(logits[0, 1].softmax(0)[0]), float(logits[0, 0].softmax(0)[1])]
    )


def test_the_box_of_a_detector_is_the_object_that_its_answer_is_seen_in() -> None:
    network = hysm.Network("net", Answers("columns").eval(), classes=("cat", "dog", "owl"))
    found = hysm.explain(network, torch.rand(1, 3, 12, 12), targets.box(1))
    ((one,),) = found.boxes()
    assert (one.label, one.score, one.box) == (found.label[0], found.probability[0], found.box[0])


def test_boxes_that_are_not_decoded_are_refused() -> None:
    table = torch.rand(1, 7, 50)
    table[0, 2, 5] = -0.3
    with pytest.raises(InputError, match="boxes that are not decoded yet"):
        boxes_in(table, hysm.Network("net", nn.Identity(), classes=tuple("abc")))


@pytest.mark.parametrize("other", ["smaller", "no places"])
def test_a_region_is_read_where_the_scores_have_places(images: Tensor, other: str) -> None:
    class Both(Small):
        def forward(self, x: Tensor) -> Any:
            scores = super().forward(x)["out"]
            coarse = scores[:, :, ::4, ::4] if other == "smaller" else scores.mean((2, 3))
            return {"logits": coarse, "out": scores}

    target = targets.region(np.arange(256).reshape(16, 16) < 128, 1)
    both, plain = (hysm.explain(net(dense=True).eval(), images, target) for net in (Both, Small))
    same(both, plain)


def test_a_region_of_scores_in_a_list_by_a_mask_that_runs_backwards(images: Tensor) -> None:
    class Listed(Small):
        def forward(self, x: Tensor) -> Any:
            return [super().forward(x)["out"]]

    mask = np.arange(256).reshape(16, 16) < 128
    listed = hysm.explain(Listed(dense=True).eval(), images, targets.region(mask[::-1], 1))
    plain = hysm.explain(
        Small(dense=True).eval(), images, targets.region(torch.tensor(mask).flip(0), 1)
    )
    same(listed, plain)


def test_boxes_are_listed_whatever_else_the_answer_holds() -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 8, 8, 8)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            found = self.conv(x).flatten(2).transpose(1, 2)
            scores, boxes = found[..., :3], found[..., 4:]
            none = boxes.masked_fill(boxes > 0, torch.inf)
            return {
                "logits": scores,
                "pred_boxes": boxes.sigmoid(),
                "enc_outputs_coord_logits": none,
            }

    network = hysm.Network("net", Queries().eval(), hysm.Preprocess((32, 32)), ("a", "b", "c"))
    assert len(found_in(network, hysm.sample_photo("cat"), 2)) == 2


def test_the_boxes_of_one_photo_are_listed() -> None:
    network = hysm.Network("net", nn.Identity(), hysm.Preprocess((8, 8)))
    with pytest.raises(InputError, match="of one photo, and here are 2: give each alone"):
        found_in(network, [hysm.sample_photo("cat"), hysm.sample_photo("coffee")])


def test_a_box_by_a_number_of_numpys() -> None:
    assert targets.box(np.int64(1)).label == targets.box(1).label  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (targets.neuron("third", 1), r"no layer 'third'.*second.1, head"),
        (targets.neuron("second", 8, 0, 0), "no channel 8, but 8 of them: 0 to 7"),
        (targets.neuron("second", -1), "no channel -1"),
        (targets.neuron("second", 1, 8, 0), r"no position \(8, 0\).*\(8, 8\)"),
        (targets.neuron("second", 1, 3), r"no position \(3,\)"),
        (targets.channel(nn.ReLU(), 1), "layer ReLU is no module of Small"),
        (targets.box(0), "Small is no detector whose answer is known: it is tensor"),
        (
            targets.region(torch.ones(8, 8) > 0, 1),
            r"Small answers with tensor \[1, 4\], and not with scores",
        ),
    ],
)
def test_a_target_that_is_not_there(images: Tensor, target: targets.Target, message: str) -> None:
    with pytest.raises(InputError, match=message):
        hysm.explain(Small().eval(), images, target)


def test_a_layer_that_does_not_run(images: Tensor) -> None:
    net = Small().eval()
    net.idle = nn.Conv2d(1, 1, 1).eval()
    with pytest.raises(InputError, match="the layer did not run"):
        hysm.explain(net, images, targets.channel("idle", 0))


# -- regions --------------------------------------------------------------------------------------


def test_a_region_is_explained_by_what_lies_in_it(images: Tensor) -> None:
    net = Small(dense=True).eval()
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:8, 4:6] = True
    for method in ("seed", "exact"):
        parameters = {"outliers": False} if method == "seed" else {}
        explainer = hysm.Explainer(net, method, **parameters)
        explanation = explainer(images, targets.region(mask, 1))
        assert explanation.label == ("region of class 1",) * 2
        assert explanation.evidence.any()
        assert not outside(explanation.evidence, slice(2, 9), slice(2, 7)).any()
        same(explanation, explainer(images, lambda out: out["out"][:, 1, 4:8, 4:6].sum((1, 2))))
        same(explanation, explainer(images, targets.region(mask.numpy(), 1)))
        # A mask of the size of the photo, twice that of the scores.
        large = mask.repeat_interleave(2, 0).repeat_interleave(2, 1)
        same(explanation, explainer(images, targets.region(large, 1)))


def test_a_region_by_name(images: Tensor) -> None:
    network = Network("mine", Small(dense=True).eval(), None, ("sea", "sky", "sand", "ship"))
    explainer = hysm.Explainer(network, "exact")
    mask = torch.eye(16).bool()
    one, other = explainer.many(images, [targets.region(mask, "sky"), targets.region(mask, 1)])
    same(one, other)
    assert one.label == ("region of sky",) * 2
    with pytest.raises(InputError, match="no class 'sun'"):
        explainer(images, targets.region(mask, "sun"))


def test_scores_and_names_that_differ_in_number(images: Tensor) -> None:
    """The scores say which classes there are, and those without a name go by their index."""
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:4] = True
    few = hysm.Explainer(Small(dense=True).eval(), classes=["a", "b", "c"])
    assert few(images, targets.region(mask, 3)).label == ("region of class 3",) * 2
    many = hysm.Explainer(Small(dense=True).eval(), classes=["a", "b", "c", "d", "e"])
    for category in (4, "e"):
        with pytest.raises(InputError, match="Small has no class 4; indices go from 0 to 3"):
            many(images, targets.region(mask, category))


def test_names_that_look_like_places_in_a_label(images: Tensor) -> None:
    explainer = hysm.Explainer(Small().eval(), classes=["{1}", "{answer}", "c", "d"])
    assert explainer(images, targets.versus(0, 1)).label == ("{1}, not {answer}",) * 2


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    ).eval()


@pytest.mark.parametrize("shape", [(5,), (1, 5), (1, 5, 1, 1)], ids=str)
def test_likeness_is_the_cosine_of_two_embeddings(images: Tensor, shape: tuple[int, ...]) -> None:
    net = encoder()
    with torch.no_grad():
        other = net(images[1:])
    target = targets.alike(other.reshape(shape), "b.jpg")
    found = hysm.explain(net, images, target)
    same(found, hysm.explain(net, images, lambda out: F.cosine_similarity(out, other)))
    assert found.label == ("likeness to b.jpg",) * 2
    assert hysm.explain(net, images, targets.alike(other.numpy())).label == ("likeness",) * 2
    turned = hysm.explain(net, images, targets.alike(3 * other))  # its length is no matter
    torch.testing.assert_close(turned.evidence, found.evidence)


def test_what_is_like_a_thing_lies_on_it() -> None:
    """Red on the left, green on the right: channels see one colour each."""
    net = nn.Sequential(
        nn.Conv2d(3, 3, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(3)[:, :, None, None])
    picture = torch.zeros(1, 3, 8, 8)
    picture[:, 0, :, :4], picture[:, 1, :, 4:] = 1, 1
    found = hysm.explain(net.eval(), picture, targets.alike(torch.tensor([1.0, 0.0, 0.0])))
    evidence = found.evidence.clamp(min=0)
    assert evidence[..., :4].sum() > 0.99 * evidence.sum() > 0


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        (torch.rand(2, 5), r"one row of features, and this one has the shape \(2, 5\)"),
        (torch.rand(0), "one row of features"),
        (torch.zeros(5), "nothing is like that"),
        (torch.tensor([1.0, torch.nan]), "NaN or infinity"),
        (torch.rand(7), r"answers with tensor \[1, 5\], and the embedding has 7 features"),
    ],
    ids=str,
)
def test_an_embedding_that_is_none(images: Tensor, embedding: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        hysm.explain(encoder(), images, targets.alike(embedding))


def test_a_region_of_a_volume() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 1)).eval()
    volume, mask = torch.rand(1, 1, 6, 8, 8), torch.zeros(6, 8, 8, dtype=torch.bool)
    mask[2:4, :3, 5:] = True
    found = hysm.explain(net, volume, targets.region(mask, 1), "exact")
    same(found, hysm.explain(net, volume, lambda out: out[:, 1][:, mask].sum(1), "exact"))


def test_a_region_of_the_part_that_has_places(images: Tensor) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Small(dense=True)

        def forward(self, x: Tensor) -> Any:
            scores = self.net(x)["out"]
            return scores, scores.mean((2, 3))

    torch.manual_seed(0)
    both = Masked().eval()
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:4] = True
    same(
        hysm.explain(both, images, targets.region(mask, 1)),
        hysm.explain(both.net, images, targets.region(mask, 1)),
    )


def test_each_image_its_own_region(images: Tensor) -> None:
    explainer = hysm.Explainer(Small(dense=True).eval(), "exact")
    masks = [torch.eye(16).bool(), torch.ones(16, 16).tril().bool()]
    both = explainer(images, [targets.region(mask, 2) for mask in masks])
    for i, mask in enumerate(masks):
        alone = explainer(images, targets.region(mask, 2))
        torch.testing.assert_close(both.evidence[i], alone.evidence[i])


@pytest.mark.parametrize(
    ("mask", "category", "message"),
    [
        (torch.ones(16, 16), 1, r"torch.float32 tensor of the shape \(16, 16\)"),
        (torch.ones(2, 16, 16) > 0, 1, "a mask for each image in a list of regions"),
        (torch.zeros(16, 16) > 0, 1, "mask is empty"),
        (torch.ones(10, 16) > 0, 1, r"size \(10, 16\) and the scores \(16, 16\)"),
        (torch.ones(16, 16) > 0, 4, "Small has no class 4; indices go from 0 to 3"),
        (torch.ones(16, 16) > 0, "sky", "no class names"),
    ],
    ids=str,
)
def test_a_region_that_is_none(images: Tensor, mask: Any, category: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        hysm.explain(Small(dense=True).eval(), images, targets.region(mask, category))


# -- boxes ----------------------------------------------------------------------------------------


class Detector(nn.Module):
    """One anchor a place and class, chosen by score, as torchvision's one-stage detectors do it."""

    def __init__(self, squash: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.squash = squash
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        answers = []
        logits = self.head(self.body(torch.stack(list(images))))
        table = logits.flatten(2).transpose(1, 2)  # [batch, places, classes]
        scores = table.softmax(-1) if self.squash == "softmax" else table.sigmoid()
        for one in scores:
            best, place = one[:, 1:].flatten().topk(5)
            kept = best[best > 0.0]
            answers.append({"scores": kept, "labels": place % 2 + 1})
        return answers


@pytest.mark.parametrize("squash", ["softmax", "sigmoid"])
def test_a_box_is_explained_by_its_logit(squash: str, images: Tensor) -> None:
    net = Detector(squash).double().eval()
    net.body[0].bias.data.zero_()
    net.head.bias.data.zero_()
    images = images.double()
    logits = net.head(net.body(images)).flatten(2).transpose(1, 2)
    scores = (logits.softmax(-1) if squash == "softmax" else logits.sigmoid())[:, :, 1:]
    for index in (0, 3):
        explanation = hysm.explain(net, images, targets.box(index), method="exact")
        place = scores.flatten(1).sort(1, descending=True).indices[:, index]
        want = logits[:, :, 1:].flatten(1).gather(1, place[:, None])[:, 0]
        torch.testing.assert_close(explanation.evidence.sum((1, 2)), want)
        assert all(re.fullmatch(rf"class \d+, box {index}", one) for one in explanation.label)
        top = scores.flatten(1).sort(1, descending=True).values[:, index]
        assert explanation.probability == pytest.approx(top.tolist())
        for i, at in enumerate(torch.div(place, 2, rounding_mode="floor").tolist()):
            y, x = 2 * (at // 8), 2 * (at % 8)
            window = (slice(max(y - 1, 0), y + 2), slice(max(x - 1, 0), x + 2))
            assert not outside(explanation.evidence[i], *window).any()


def test_a_box_stands_against_the_other_classes_of_its_place_alone(images: Tensor) -> None:
    net = Detector("softmax").eval()
    plain = hysm.explain(net, images, targets.box(0), contrast=False, focus=False)
    against = hysm.explain(net, images, targets.box(0), contrast=True, focus=False)
    assert not torch.allclose(plain.evidence, against.evidence)
    assert ((plain.evidence == 0) >= (against.evidence == 0)).all() or (
        (against.evidence != 0).flatten(1).sum(1) <= 9
    ).all()


def test_a_box_that_does_not_exist(images: Tensor) -> None:
    net = Detector("sigmoid").eval()
    with pytest.raises(InputError, match=r"no box 5, where Detector keeps 5: .* lower"):
        hysm.explain(net, images, targets.box(5))
    with pytest.raises(InputError, match=r"no box 5 in image 0, where Detector keeps 5"):
        hysm.explain(net, images, targets.box(5), together=True)
    with pytest.raises(InputError, match="no box -1"):
        hysm.explain(net, images, targets.box(-1))


SMALL = {"weights": None, "weights_backbone": None, "num_classes": 3}
DETECTORS: dict[str, dict[str, Any]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": {
        "box_score_thresh": 0.0,
        "rpn_post_nms_top_n_test": 20,
    },
    "maskrcnn_resnet50_fpn": {"box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 20},
    "retinanet_resnet50_fpn": {"score_thresh": 0.0, "topk_candidates": 20},
    "fcos_resnet50_fpn": {"score_thresh": 0.0, "topk_candidates": 20},
    "ssd300_vgg16": {"score_thresh": 0.0, "topk_candidates": 20},
    "ssdlite320_mobilenet_v3_large": {"score_thresh": 0.0, "topk_candidates": 20},
}
SEGMENTERS = ["deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large", "fcn_resnet50"]


def filled(name: str, **options: Any) -> nn.Module:
    """A network with random weights under which activations neither die nor explode."""
    torch.manual_seed(0)
    model = models.get_model(name, **SMALL | options).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5)
                if "bbox" in key:  # boxes stay near their anchors
                    parameter.mul_(0.01)
            elif key.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("name", DETECTORS)
def test_torchvisions_detectors(name: str) -> None:
    ssd = name.startswith("ssd")
    model = filled(name, **DETECTORS[name], **({} if ssd else {"min_size": 64, "max_size": 64}))
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        (answer,) = model(image)
    assert len(answer["scores"]) > 1
    for method in ("evidence", "exact"):
        explanation = hysm.explain(model, image, targets.box(1), method=method)
        assert re.fullmatch(r"class \d+, box 1", explanation.label[0])
        assert explanation.evidence.shape == (1, 64, 64)
        assert explanation.evidence.any(), method
    assert len(explanation.points[0])
    with pytest.raises(InputError, match=f"keeps {len(answer['scores'])}"):
        hysm.explain(model, image, targets.box(len(answer["scores"])))


@pytest.mark.parametrize("name", SEGMENTERS)
def test_torchvisions_segmenters(name: str) -> None:
    model = filled(name)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[8:16, 8:24] = True
    with torch.no_grad():
        scores = model(images)["out"][:, :, mask].sum((0, 2))
    category = int(scores.argmax())
    for method in ("evidence", "exact"):
        explanation = hysm.explain(model, images, targets.region(mask, category), method=method)
        assert all(len(points) for points in explanation.points), method


@pytest.mark.parametrize(("brightness", "sure"), [(0.2, False), (0.4, False), (3.0, True)])
def test_a_detectors_best_score_is_explained_whether_above_one_half_or_below(
    brightness: float, sure: bool
) -> None:
    """As YOLO's: boxes and scores in one map, whose boxes go through one more convolution."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Conv2d(3, 8, 3, 2, 1)
            self.boxes, self.scores = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)
            self.decode = nn.Conv1d(4, 4, 1)
            for layer in (self.features, self.scores):
                layer.weight.data.abs_()
            self.scores.bias.data.fill_(-2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.features(x).relu()
            raw = torch.cat([self.boxes(x), self.scores(x)], 1).flatten(2)
            boxes, scores = raw.split([4, 2], 1)
            return torch.cat([self.decode(boxes), scores.sigmoid()], 1)

    torch.manual_seed(0)
    model = Detector().eval()
    picture = torch.zeros(1, 3, 16, 16)
    picture[..., 4:9, 9:14] = brightness
    score = float(model(picture)[0, 5].max())
    assert (score > 0.5) is sure
    explanation = Explainer(model)(picture, lambda output: output[:, 5].amax(1))
    evidence = torch.as_tensor(explanation.evidence[0])
    assert evidence[4:9, 9:14].sum() > 0
    assert evidence[4:9, 9:14].sum() == pytest.approx(float(evidence.clamp(min=0).sum()))
    logit = Explainer(model)(picture, lambda output: output[:, 5].logit().amax(1))
    close = torch.corrcoef(torch.stack([evidence.flatten(), logit.evidence[0].flatten()]))[0, 1]
    assert close > 0.99


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.log(),
        lambda p: -1 / p,
        lambda p: -1 / p.sqrt(),
        lambda p: p.log2() * 3 + 1,
        lambda p: p.logit(),
        lambda p: -(p**-2),
    ],
)
def test_what_rises_with_a_score_has_the_picture_of_the_score(change: Any, images: Tensor) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        *(nn.Conv2d(images.shape[1], 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
    ).eval()
    plain = Explainer(model)(images, lambda output: output.sigmoid()[:, 1]).evidence
    risen = Explainer(model)(images, lambda output: change(output.sigmoid()[:, 1])).evidence
    for one, other in zip(plain, risen, strict=True):
        assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1] > 0.98


# -- pickled ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["versus", "region", "neuron", "layer itself", "channel"])
def test_an_explanation_of_a_target_can_be_pickled_and_walks_again(
    asked: str, images: Tensor
) -> None:
    net = Small(dense=asked == "region").eval()
    target = {
        "versus": targets.versus(None, 0),
        "region": targets.region(torch.eye(16, dtype=torch.bool), 1),
        "neuron": targets.neuron("second", 3),
        "layer itself": targets.neuron(net.second, 3),
        "channel": targets.channel("second", 1),
    }[asked]
    explanation = hysm.explain(net, images, target)
    again = pickle.loads(pickle.dumps(explanation))
    same(again, explanation)
    assert again.path(1, [0])[0].nodes == explanation.path(1, [0])[0].nodes


def test_a_region_is_of_a_class() -> None:
    with pytest.raises(InputError, match="None is neither"):
        targets.region(torch.ones(4, 4, dtype=torch.bool), None)  # type: ignore[arg-type]


def test_another_default_device_changes_nothing(images: Tensor) -> None:
    mask = np.eye(16, dtype=bool)
    dense, net = Small(dense=True).eval(), Small().eval()
    embedding = np.ones(net(images).shape[1], np.float32)

    def asked() -> list[Tensor]:
        other = torch.from_numpy(embedding)
        return [
            hysm.explain(dense, images, targets.region(mask, 1)).evidence,
            hysm.explain(net, images, targets.alike(embedding)).evidence,
            hysm.explain(net, images, targets.alike(other)).evidence,
        ]

    usual = asked()
    with torch.device("meta"):
        found = asked()
    assert all(map(torch.equal, found, usual))
