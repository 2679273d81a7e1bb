"""What goes in: models, images and targets of every kind, and what is said when they can't be used."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import Made
from PIL import Image
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision import transforms

import howyouseeme as hysm
from howyouseeme import Explainer, InputError, ModelError, Network, Preprocess
from howyouseeme.localize import detect
from howyouseeme.methods import Evidence
from howyouseeme.tape import record

CLASSES = ("red fox", "grey fox", "hen", "cock")


def make_net(channels: int = 3, classes: int = 4, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 8, 3, padding=1),
            bn1=nn.BatchNorm2d(8),
            relu1=nn.ReLU(inplace=True),
            pool=nn.MaxPool2d(2),
            conv2=nn.Conv2d(8, 8, 3, padding=1),
            relu2=nn.ReLU(),
            mean=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(8, classes),
        )
    ).eval()


class Wrapped(nn.Module):
    """A network whose output was changed."""

    def __init__(self, change: Callable[[Tensor], Any], seed: int = 0) -> None:
        super().__init__()
        self.net = make_net(seed=seed)
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.net(x))


@pytest.fixture
def net() -> nn.Sequential:
    return make_net()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def explainer(net: nn.Sequential) -> Explainer:
    """One that knows how pictures become its input, and the names of its classes."""
    return Explainer(Network("foxes", net, Preprocess((16, 16)), CLASSES))


@pytest.fixture
def photo() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def same(one: hysm.Explanation, other: hysm.Explanation) -> None:
    assert one.target == other.target
    torch.testing.assert_close(one.evidence, other.evidence)


# -- images -------------------------------------------------------------------------------------------


def test_a_tensor_is_explained_as_it_is(net: nn.Module, images: Tensor) -> None:
    explanation = Explainer(net)(images)
    assert len(explanation) == 3
    assert explanation.evidence.shape == (3, 16, 16)
    assert explanation.samples[0].size == (16, 16)
    assert explanation.samples[0].name is None


def test_a_tensor_may_hold_one_image(net: nn.Module, images: Tensor) -> None:
    alone = Explainer(net)(images[1:2])
    torch.testing.assert_close(alone.evidence, Explainer(net)(images).evidence[1:2])


def sources(photo: Image.Image, folder: Path) -> dict[str, Any]:
    path = folder / "fox.png"
    photo.save(path)
    array = np.asarray(photo)
    return {
        "pil": photo,
        "path": path,
        "str": str(path),
        "bytes": path.read_bytes(),
        "file": io.BytesIO(path.read_bytes()),
        "array": array,
        "float array": array.astype(np.float32) / 255,
        "tensor": torch.from_numpy(array.copy()).permute(2, 0, 1),
        "float tensor": torch.from_numpy(array.copy()).permute(2, 0, 1) / 255,
    }


@pytest.mark.parametrize(
    "kind",
    ["path", "str", "bytes", "file", "array", "float array", "tensor", "float tensor"],
)
def test_a_picture_may_come_in_any_form(
    explainer: Explainer, photo: Image.Image, tmp_path: Path, kind: str
) -> None:
    given = sources(photo, tmp_path)
    explanation = explainer(given[kind])
    same(explanation, explainer(photo))
    assert explanation.samples[0].size == (24, 40)
    assert explanation.attention.shape == (1, 24, 40)
    wanted = str(given["path"]) if kind in ("path", "str") else None
    assert explanation.samples[0].name == wanted


@pytest.mark.parametrize("collect", [list, tuple])
def test_pictures_of_mixed_forms_and_sizes(
    explainer: Explainer, photo: Image.Image, tmp_path: Path, collect: type
) -> None:
    given = sources(photo, tmp_path)
    small = np.zeros((9, 7, 3), np.uint8)
    explanation = explainer(collect([given["path"], small, given["bytes"]]))
    assert [sample.size for sample in explanation.samples] == [(24, 40), (9, 7), (24, 40)]
    torch.testing.assert_close(explanation.evidence[0], explanation.evidence[2])
    assert [one.attention.shape[1:] for one in explanation] == [(24, 40), (9, 7), (24, 40)]


@pytest.mark.parametrize(
    "given", [np.zeros((2, 3, 16, 16), np.float32), [torch.full((3, 16, 16), -2.0)] * 2]
)
def test_a_batch_that_is_no_tensor_is_told_how_to_become_one(
    explainer: Explainer, given: Any
) -> None:
    with pytest.raises(hysm.ImageError, match=r"torch\.stack\(tensors\), or torch\.from_numpy"):
        explainer(given)


def test_a_batch_goes_to_the_model_even_if_pictures_could(
    explainer: Explainer, net: nn.Module, images: Tensor
) -> None:
    same(explainer(images), Explainer(net)(images))


def test_the_input_may_ask_for_gradients_and_change_afterwards(
    net: nn.Module, images: Tensor
) -> None:
    given = images.clone().requires_grad_()
    explanation = Explainer(net)(given)
    before = explanation[0].saliency
    with torch.no_grad():
        given.zero_()
    assert explanation.samples[0].input.abs().sum() > 0
    assert not explanation.samples[0].input.requires_grad
    path = explanation.path(0, [0])[0]
    again = Explainer(net)(images).path(0, [0])[0]
    assert path == again
    assert torch.equal(explanation[0].saliency, before)


# -- targets ------------------------------------------------------------------------------------------


def test_without_a_target_each_image_gets_its_top_class(net: nn.Module, images: Tensor) -> None:
    explanation = Explainer(net)(images)
    scores = net(images)
    assert explanation.target == tuple(scores.argmax(1).tolist())
    expected = scores.softmax(1).amax(1).tolist()
    assert explanation.probability == pytest.approx(expected)


@pytest.mark.parametrize("two", [2, "2", "hen", "HEN", np.int64(2), torch.tensor(2)])
def test_one_class_for_all(explainer: Explainer, images: Tensor, two: Any) -> None:
    explanation = explainer(images, two)
    assert explanation.target == (2, 2, 2)
    assert explanation.label == ("hen", "hen", "hen")


@pytest.mark.parametrize(
    "each",
    [
        [0, 3, 1],
        (0, 3, 1),
        ["red fox", "cock", "grey fox"],
        ["red", 3, "1"],
        np.array([0, 3, 1]),
        torch.tensor([0, 3, 1]),
        [np.int32(0), torch.tensor(3), 1],
    ],
)
def test_a_class_for_each(explainer: Explainer, images: Tensor, each: Any) -> None:
    explanation = explainer(images, each)
    assert explanation.target == (0, 3, 1)
    for i, target in enumerate((0, 3, 1)):
        torch.testing.assert_close(
            explanation.evidence[i], explainer(images[i : i + 1], target).evidence[0]
        )


def test_without_names_the_label_is_the_index(net: nn.Module, images: Tensor) -> None:
    assert Explainer(net)(images, 3).label == ("class 3",) * 3


def test_a_function_gives_an_element_for_each_image(net: nn.Module, images: Tensor) -> None:
    explanation = Explainer(net, contrast=False)(images, lambda output: output[:, 2])
    assert explanation.target == (None, None, None)
    assert explanation.label == ("", "", "")
    assert explanation.probability == (None, None, None)
    by_index = Explainer(net, contrast=False)(images, 2)
    torch.testing.assert_close(explanation.evidence, by_index.evidence)


def test_a_function_may_give_one_element_of_one_image(net: nn.Module, images: Tensor) -> None:
    explainer = Explainer(net, contrast=False)
    one = explainer(images[:1], lambda output: output[0, 2])
    torch.testing.assert_close(one.evidence, explainer(images[:1], 2).evidence)


def test_a_function_that_gives_a_scalar_sees_the_images_one_by_one(
    net: nn.Module, images: Tensor
) -> None:
    explainer = Explainer(net, contrast=False)
    explanation = explainer(images, lambda output: output[:, 2].sum())
    torch.testing.assert_close(explanation.evidence, explainer(images, 2).evidence)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda output: 1, (1, 1, 1)),
        (lambda output: output.argmin(1), None),
        (lambda output: output.argmin(), None),
    ],
)
def test_whole_numbers_from_a_function_are_classes(
    net: nn.Module, images: Tensor, function: Any, expected: Any
) -> None:
    explanation = Explainer(net)(images, function)
    least = tuple(net(images).argmin(1).tolist())
    assert explanation.target == (expected or least)
    same(explanation, Explainer(net)(images, list(expected or least)))


@pytest.mark.parametrize(
    ("change", "function"),
    [
        (lambda scores: {"a": {"b": scores}}, lambda output: output["a"]["b"][:, 2]),
        (lambda scores: (scores * 2, [scores]), lambda output: output[1][0][:, 2]),
        (lambda scores: scores[:, :, None, None], lambda output: output[:, 2, 0, 0]),
    ],
)
def test_a_function_reads_any_structure(change: Any, function: Any, images: Tensor) -> None:
    explanation = Explainer(Wrapped(change).eval(), contrast=False)(images, function)
    plain = Explainer(make_net(), contrast=False)(images, 2)
    torch.testing.assert_close(explanation.evidence, plain.evidence)


def count_forwards(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    return calls


def test_top_explains_the_likeliest_from_one_pass(net: nn.Module, images: Tensor) -> None:
    order = net(images).sort(dim=1, descending=True).indices
    separate = [Explainer(net)(images, order[:, rank]) for rank in range(3)]
    calls, explainer = count_forwards(net), Explainer(net)
    explanations = explainer.top(images, k=3)
    assert calls == [2, 1, 1, 1]  # first, whether images depend on one another
    explainer.top(images, k=3)
    assert calls[4:] == [1, 1, 1]
    for rank, (explanation, expected) in enumerate(zip(explanations, separate, strict=True)):
        assert explanation.target == tuple(order[:, rank].tolist())
        same(explanation, expected)


def test_many_explains_all_kinds_of_targets_from_one_pass(
    explainer: Explainer, images: Tensor
) -> None:
    targets = [None, 1, "hen", [0, 1, 2], lambda output: output[:, 3], lambda output: output[:, 0]]
    separate = [explainer(images, target) for target in targets]
    calls = count_forwards(explainer.network.module)
    explanations = explainer.many(images, targets)
    assert calls == [3]
    for explanation, expected in zip(explanations, separate, strict=True):
        same(explanation, expected)


def test_classes_that_share_what_excites_their_nodes_get_what_each_gets_alone(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([1.0, -1, 2, -2, 0.5, -0.5]))  # turns some filters around
    monkeypatch.setattr(hysm.methods.evidence, "_STACK", 1)  # one by one
    explainer = Explainer(net)
    alone = [explainer(images[:1], target=k) for k in range(5)]
    made = []
    parts = hysm.methods.excitation._parts
    monkeypatch.setattr(
        hysm.methods.excitation, "_parts", lambda *given: made.append(given[1]) or parts(*given)
    )
    together = explainer.many(images[:1], list(range(5)))
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.evidence, other.evidence)
        assert one.coverage == other.coverage
    once = len(made)
    explainer(images[:1], target=0)
    assert once == len(made) - once  # five classes took as many as one


def test_several_classes_in_low_precision(net: nn.Module, images: Tensor) -> None:
    one, other = Explainer(copy.deepcopy(net).bfloat16()).many(images.bfloat16(), [0, 1])
    assert bool(torch.isfinite(one.evidence).all())
    assert not torch.equal(one.evidence, other.evidence)


def test_a_strong_class_leaves_a_weak_one_its_evidence_in_half_precision() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0 if parameter.dim() > 1 else 0.0)
        net[-1].weight[0] = 400
    pictures = torch.linspace(0.3, 0.6, 32, dtype=torch.half).reshape(2, 1, 4, 4)
    explainer = Explainer(net.half(), contrast=False, together=True)
    weak = explainer(pictures[:1], 1)
    assert weak.coverage[0] == pytest.approx(1, abs=0.01)
    beside_a_class = explainer.many(pictures[:1], [0, 1])[1]
    beside_an_image = explainer(pictures, [1, 0])[0]
    for found in (beside_a_class, beside_an_image):
        torch.testing.assert_close(found.evidence, weak.evidence)
        assert found.coverage[0] == pytest.approx(weak.coverage[0])


def walks_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, object]]:
    """How many classes go back at once, and what they share, of each walk from now on."""
    walks: list[tuple[int, object]] = []
    walk = hysm.methods.evidence.Evidence._walk
    monkeypatch.setattr(
        hysm.methods.evidence.Evidence,
        "_walk",
        lambda self, way, alone, count, *rest: (
            walks.append((count, way.shared)) or walk(self, way, alone, count, *rest)
        ),
    )
    return walks


def test_elements_of_functions_share_nothing_that_is_kept(
    net: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks = walks_of(monkeypatch)
    Explainer(net).many(images[:1], [lambda out: out[:, 0] * 1, lambda out: out[:, 1] * 1])
    assert walks == [(1, None), (1, None)]


@pytest.mark.parametrize(
    ("largest", "counts"), [(0, [1, 1, 1, 1]), (2, [2, 2]), (3, [3, 1]), (99, [4])]
)
def test_classes_walk_as_a_stack(
    net: nn.Module,
    images: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    largest: int,
    counts: list[int],
) -> None:
    explainer, picture = Explainer(net.double()), images[:1].double()
    tape = record(net, [picture])
    most = max(value.numel for call in tape.calls for value in call.outputs if value is not None)
    monkeypatch.setattr(hysm.methods.evidence, "_STACK", largest * most)
    walks = walks_of(monkeypatch)
    stacked = explainer.many(picture, [0, 1, None, 2])
    assert [count for count, _ in walks] == counts
    shared = [kept for _, kept in walks]
    assert all(kept is shared[0] for kept in shared)
    assert (shared[0] is None) == (len(counts) == 1)
    for one, target in zip(stacked, [0, 1, None, 2], strict=True):
        alone = explainer(picture, target)
        assert one.target == alone.target
        torch.testing.assert_close(one.evidence, alone.evidence, rtol=1e-10, atol=1e-13)
        assert one.coverage == pytest.approx(alone.coverage)


def test_several_classes_of_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 4, 3), nn.Linear(6, 3)

        def forward(self, picture: Tensor, facts: Tensor) -> Tensor:
            seen = self.body(picture).relu().mean((2, 3))
            return self.head(torch.cat([seen, facts], 1))

    torch.manual_seed(1)
    explainer, given = Explainer(Two().double().eval()), (
        torch.randn(1, 3, 8, 8).double(), torch.randn(1, 2).double()
    )  # fmt: skip
    for target, found in enumerate(explainer.many(given, [0, 1, 2])):
        alone = explainer(given, target)
        for mine, theirs in zip(found.inputs, alone.inputs, strict=True):
            torch.testing.assert_close(mine.evidence, theirs.evidence, rtol=1e-10, atol=1e-13)
            assert mine.evidence.untyped_storage().nbytes() == mine.evidence.nbytes


class Quartered(nn.Module):
    """Moves places to the first axis and back; nothing excites what is asked of the mean's nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.then, self.head = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 1),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        parts = torch.cat([x[..., i : i + 4, j : j + 4] for i in (0, 4) for j in (0, 4)])
        return self.head(self.then((5 - parts.mean(0))[None]).relu().mean((2, 3)))


def test_places_on_the_first_axis_are_no_stack() -> None:
    torch.manual_seed(0)
    net, picture = Quartered().double().eval(), torch.rand(1, 3, 8, 8).double()
    explainer = Explainer(net)
    alone = [explainer(picture, target) for target in range(3)]
    for found, expected in zip(explainer.many(picture, [0, 1, 2]), alone, strict=True):
        assert found.evidence.shape == expected.evidence.shape == (1, 8, 8)
        assert torch.equal(found.evidence, expected.evidence)


def test_classes_of_a_model_that_does_nothing() -> None:
    for net in (nn.Softmax(1), nn.Identity()):
        one, other = Explainer(net.eval()).many(torch.tensor([[0.5, 0.2, 0.9]]), [0, 2])
        assert one.evidence.shape == other.evidence.shape == (1, 3)
        assert int(one.evidence.argmax()) == 0
        assert int(other.evidence.argmax()) == 2


def test_a_quotient_that_is_not_taken_leaves_no_infinity() -> None:
    class Guarded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.see, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.see(x).relu()
            return self.head(torch.where(h > 0.05, 2 / h, 0).mean((2, 3)))

    torch.manual_seed(0)
    found = Explainer(Guarded().eval())(torch.rand(1, 3, 10, 10))
    assert bool(torch.isfinite(found.evidence).all())


def test_a_method_with_its_parameters(net: nn.Module, images: Tensor) -> None:
    by_name = Explainer(net, "evidence", nodes=50)(images)
    by_itself = Explainer(net, Evidence(nodes=50))(images)
    assert torch.equal(by_name.evidence, by_itself.evidence)
    assert by_itself.method == Evidence(nodes=50)
    with pytest.raises(InputError, match="is a method with all its parameters: give k when"):
        Explainer(net, Evidence(), k=3)


def test_many_of_nothing_is_nothing(explainer: Explainer, images: Tensor) -> None:
    assert explainer.many(images, []) == []


def test_an_explainer_of_a_function_and_explain_are_the_same(
    net: nn.Module, images: Tensor
) -> None:
    same(hysm.explain(net, images, 2), Explainer(net)(images, 2))
    by_seed = hysm.explain(net, images, 2, "seed", k=3)
    assert by_seed.method.parameters["k"] == 3
    same(by_seed, Explainer(net, "seed", k=3)(images, 2))


class Mixing(nn.Module):
    """The samples of a batch share an axis with the channels on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, x: Tensor) -> Tensor:
        batch = len(x)
        folded = x.reshape(1, -1, *x.shape[2:]).reshape(batch, -1, *x.shape[2:])
        return self.net(folded)


def test_samples_that_share_an_axis_keep_their_own_targets(images: Tensor) -> None:
    explainer = Explainer(Mixing().eval())
    targets = [None, 1, [0, 3, 1], torch.tensor([2, 0, 1]), lambda output: output[:, 3]]
    mixed = explainer.many(images, targets)
    apart = Explainer(make_net()).many(images, targets)
    for one, other in zip(mixed, apart, strict=True):
        same(one, other)
    with pytest.raises(InputError, match="2 targets for 3 image"):
        explainer(images, [1, 2])


# -- outputs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda scores: (scores,),
        lambda scores: [scores],
        lambda scores: {"aux": scores * 2, "logits": scores},
        lambda scores: {"aux": scores * 2, "out": scores},
        lambda scores: {"anything": scores},
        lambda scores: (scores, scores.argmax(1), np.arange(3), "hello", None),
        lambda scores: scores.softmax(1),
        lambda scores: scores.log_softmax(-1),
        lambda scores: nn.functional.softmax(scores.float(), dim=1),
        lambda scores: scores[:, :, None, None].softmax(1).flatten(1),
    ],
)
def test_the_scores_are_found_and_taken_before_a_softmax(change: Any, images: Tensor) -> None:
    explanation = Explainer(Wrapped(change).eval())(images)
    plain = Explainer(make_net())(images)
    same(explanation, plain)
    assert explanation.probability == pytest.approx(plain.probability)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.sigmoid().clamp(1e-6, 1), lambda s: s.sigmoid()),
        (lambda s: s.softmax(1).clone(), lambda s: s.softmax(1)),
        (lambda s: s.softmax(1).log_softmax(1), lambda s: s.softmax(1).softmax(1)),
        (lambda s: s.exp() / s.exp().sum(1, keepdim=True), lambda s: s.softmax(1)),
        (lambda s: s.sigmoid() * 0.5, lambda s: s.sigmoid()),
        (lambda s: (s.softmax(1) + 1e-3).log(), lambda s: s.softmax(1)),
    ],
)
def test_the_probability_is_the_one_that_the_model_says(
    change: Any, said: Any, images: Tensor
) -> None:
    explanation = Explainer(Wrapped(change).eval())(images, 1)
    with torch.no_grad():
        want = said(make_net()(images))[:, 1]
    assert explanation.probability == pytest.approx(want.tolist(), rel=1e-4)


GROWN: list[Any] = [
    lambda p: p * 100,
    lambda p: (p + 1e-3).log(),
    lambda p: p.sqrt(),
    lambda p: p / p.sum(1, keepdim=True),
    lambda p: torch.where(p > 0.3, p, 0.0),
    lambda p: p * (p > 0.3),
    lambda p: p.masked_fill(p < 0.3, 0.0),
    lambda p: p.round(decimals=3),
]


@pytest.mark.parametrize("change", GROWN)
@pytest.mark.parametrize("squash", ["softmax", "sigmoid"])
def test_what_lets_scores_only_grow_is_seen_through(
    change: Any, squash: str, images: Tensor
) -> None:
    squashed = (lambda s: s.softmax(1)) if squash == "softmax" else torch.sigmoid
    whole = Explainer(Wrapped(lambda s: change(squashed(s))).eval())
    plain = Explainer(Wrapped(squashed).eval())
    for target in (0, 3):  # the answer and others
        same(whole(images, target), plain(images, target))
    if change is not GROWN[3]:
        found, expected = whole(images, 0).probability, plain(images, 0).probability
        assert found == pytest.approx(expected, abs=1e-3)


def test_a_single_score_says_no_where_the_model_does(images: Tensor) -> None:
    with torch.no_grad():
        said = make_net()(images)[:, 0].sigmoid()
    edge = float(said.mean())
    model = Wrapped(lambda s: (s[:, 0].sigmoid() - edge) * 10).eval()
    labels = Explainer(model)(images).label
    assert [label.startswith("not ") for label in labels] == (said < edge).tolist()
    scaled = Explainer(Wrapped(lambda s: s[:, 0].sigmoid() * 0.1).eval())(images)
    same(scaled, Explainer(Wrapped(lambda s: s[:, 0].sigmoid()).eval())(images))


def test_a_constant_in_the_place_of_a_score_is_not_seen_through(images: Tensor) -> None:
    instead = torch.tensor([True, False, False, False])
    model = Wrapped(lambda s: torch.where(instead, 1.0, s.softmax(1))).eval()
    found = Explainer(model)(images)
    assert found.target == (0, 0, 0)
    plain = Explainer(Wrapped(lambda s: s.softmax(1)).eval())(images, 0)
    assert found.evidence.abs().max() < 0.5 * plain.evidence.abs().max()
    assert found.probability != pytest.approx(plain.probability, abs=0.01)


def test_what_may_fall_is_not_seen_through_whatever_the_batch(images: Tensor) -> None:
    model = Wrapped(lambda s: (s.softmax(1) - 0.12).abs()).eval()
    together = Explainer(model, together=True)(images)
    for i, image in enumerate(images):
        alone = Explainer(model)(image[None], together.target[i])
        torch.testing.assert_close(together.evidence[i], alone.evidence[0])


def test_what_turns_scores_round_is_not_seen_through(images: Tensor) -> None:
    turned = Explainer(Wrapped(lambda s: -s.softmax(1)).eval())(images, 0)
    plain = Explainer(Wrapped(lambda s: s.softmax(1)).eval())(images, 0)
    maps = torch.stack([turned.evidence.flatten(), plain.evidence.flatten()])
    assert torch.corrcoef(maps)[0, 1] < 0


def test_the_answer_is_the_models_where_classes_are_weighed_after_the_softmax(
    images: Tensor,
) -> None:
    prior = torch.tensor([0.01, 0.01, 0.01, 5.0])
    model = Wrapped(lambda s: s.softmax(1) * prior).eval()
    with torch.no_grad():
        order = model(images).argsort(1, descending=True)
    explainer = Explainer(model)
    assert explainer(images).target == tuple(order[:, 0].tolist())
    assert [e.target for e in explainer.top(images, 4)] == [
        tuple(column) for column in order.T.tolist()
    ]


def test_of_chosen_classes_the_probability_is_among_all(images: Tensor) -> None:
    with torch.no_grad():
        said = make_net()(images).softmax(1)
    chosen = Explainer(Wrapped(lambda s: s.softmax(1)[:, [2, 0]]).eval())(images, 1)
    assert chosen.probability == pytest.approx(said[:, 0].tolist(), rel=1e-4)
    logits = Explainer(Wrapped(lambda s: s[:, [2, 0]]).eval())(images, 1)
    same(chosen, logits)


def test_one_class_of_a_softmax_is_explained_by_its_odds(images: Tensor) -> None:
    with torch.no_grad():
        scores = make_net()(images)
    chosen = Explainer(Wrapped(lambda s: s.softmax(1)[:, 1]).eval())(images)
    odds = Explainer(
        Wrapped(lambda s: s[:, 1] - torch.cat([s[:, :1], s[:, 2:]], 1).logsumexp(1)).eval()
    )(images)
    same(chosen, odds)
    said = scores.softmax(1)[:, 1]
    assert chosen.probability == pytest.approx(torch.maximum(said, 1 - said).tolist(), rel=1e-4)
    assert [label.startswith("not ") for label in chosen.label] == (said < 0.5).tolist()


def test_a_function_may_give_each_image_its_own_class(net: nn.Module, images: Tensor) -> None:
    wanted = torch.tensor([2, 0, 3])
    own = Explainer(net, "exact")(images, lambda s: s[torch.arange(len(s)), wanted])
    by_class = Explainer(net, "exact")(images, wanted.tolist())
    torch.testing.assert_close(own.evidence, by_class.evidence)
    for i in range(3):
        for mine, same in zip(own.layers(i), by_class.layers(i), strict=True):
            torch.testing.assert_close(mine.map, same.map)
        assert own.path(i, [0])[0].nodes[-1].position == by_class.path(i, [0])[0].nodes[-1].position


def test_an_answer_that_depends_on_the_rest_of_the_batch_is_refused(images: Tensor) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x - x.mean(0))

    net = Mixing().eval()
    for together in (True, 2):
        with pytest.raises(InputError, match="depends on the others in its batch"):
            Explainer(net, together=together)(images)
    alone = Explainer(net, together=1)(images)  # each is told what it would be alone
    assert alone.target == tuple(Explainer(net)(image[None]).target[0] for image in images)


class Bag(nn.Module):
    """One answer to all images together, that of the strongest."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).amax(0, keepdim=True)


class OwnStatistics(nn.Module):
    """Batch norm by the batch that is given."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), make_net())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize(
    "target", [None, 1, lambda out: out[:, 1]], ids=["top", "class", "function"]
)
def test_a_bag_of_images_is_no_batch(images: Tensor, target: Any) -> None:
    bag, images = Bag().eval(), images * torch.tensor([3.0, 1.0, 0.1]).reshape(3, 1, 1, 1)
    for given in (images, images.flip(0)):  # the strongest one alone is answered as all are
        with pytest.raises(InputError, match="depends on the others in its batch"):
            Explainer(bag)(given, target)

    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return bag(x[0])

    found = Explainer(One().eval())(images[None], 1)
    assert found.probability[0] == pytest.approx(float(bag(images).softmax(1)[0, 1]), rel=1e-4)


def with_loss(scores: Tensor) -> Any:
    return {"logits": scores, "loss": scores.pow(2).mean().reshape(1)}


def with_a_list(scores: Tensor) -> Any:
    return {"logits": scores, "each": [row * 2 for row in scores]}


def with_a_table(scores: Tensor) -> Any:
    """Of the first image three rows, of each other one."""
    return {"logits": scores, "rows": torch.cat([scores[:1], 2 * scores[:1], scores])}


def with_more_for_many(scores: Tensor) -> Any:
    return {"logits": scores, **({"mean": scores.mean(0)} if len(scores) > 1 else {})}


@pytest.mark.parametrize("change", [with_loss, with_a_list, with_a_table, with_more_for_many])
def test_what_is_not_asked_for_may_depend_on_the_batch(change: Any, images: Tensor) -> None:
    net, plain = Wrapped(change).eval(), make_net()
    same(Explainer(net)(images, 1), Explainer(plain)(images, 1))
    function = [lambda said: said["logits"][:, 1]] * len(images)
    alone = [lambda scores: scores[:, 1]] * len(images)
    same(Explainer(net)(images, function), Explainer(plain)(images, alone))


def test_a_model_that_takes_one_image_is_asked_once_for_two(images: Tensor) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 1:
                raise KeyError("one at a time")
            return self.net(x)

    net = One().eval()
    calls, explainer = count_forwards(net), Explainer(net)
    for _ in range(2):
        same(explainer(images, 1), Explainer(make_net())(images, 1))
    assert calls == [2, *[1] * len(images), *[1] * len(images)]


def test_statistics_of_a_batch_are_not_taken_for_those_of_an_image(images: Tensor) -> None:
    net, images = OwnStatistics().eval(), images * torch.tensor([3.0, 1.0, 0.1]).reshape(3, 1, 1, 1)
    with pytest.raises(InputError, match="depends on the others in its batch"):
        Explainer(net)(images)
    together = Explainer(net, together=True)(images, 1)
    assert together.probability == pytest.approx(net(images).softmax(1)[:, 1].tolist(), rel=1e-4)


def test_random_answers_are_not_taken_for_those_of_a_batch(images: Tensor) -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x + torch.rand_like(x))

    with pytest.warns(UserWarning, match="random"):
        assert len(Explainer(Random().eval())(images)) == len(images)


def test_a_model_that_squeezes_the_batch_away(net: nn.Module, images: Tensor) -> None:
    class Squeezing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).squeeze()

    class Sure(Squeezing):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(-1)

    for model in (Squeezing().eval(), Sure().eval()):
        for together in (False, True):
            found = Explainer(model, together=together)(images)
            same(found, Explainer(net, together=together)(images))
            assert found.label[0].startswith("class")


def test_feature_maps_with_other_axes_than_the_input(images: Tensor) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plane = nn.Conv2d(3, 4, 3, padding=1)
            self.line = nn.Conv1d(3, 4, 3, padding=1)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            plane = self.plane(x).relu().mean((2, 3))
            line = self.line(x.flatten(2)).relu().mean(2)
            return self.head(torch.cat([plane, line], 1))

    explanation = Explainer(Both().eval())(images)
    assert explanation.evidence.shape == (3, *images.shape[2:])
    assert torch.isfinite(explanation.evidence).all()


@pytest.mark.parametrize("method", ["evidence", "seed"])
@pytest.mark.parametrize("reduce", [torch.mean, torch.sum])
def test_a_reduction_may_add_up_in_another_type(
    reduce: Callable[..., Tensor], method: str, net: nn.Module, images: Tensor
) -> None:
    class Precise(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.net, self.dtype = net, dtype

        def forward(self, x: Tensor) -> Tensor:
            features = self.net[:6](x)
            return self.net.head(reduce(features, (2, 3), dtype=self.dtype).float())

    found, expected = (
        Explainer(Precise(dtype).eval(), method=method)(images)
        for dtype in (torch.float64, torch.float32)
    )
    same(found, expected)


def test_a_dead_channel_makes_no_nan() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, groups=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).eval()
    with torch.no_grad():
        net[0].weight[1] = 1e-42
        net[1].bias[:] = 1
    explanation = Explainer(net)(torch.rand(2, 3, 8, 8))
    assert torch.isfinite(explanation.evidence).all()
    assert all(0 <= share <= 1 for share in explanation.coverage)


def test_inference_mode_changes_nothing(net: nn.Module, images: Tensor) -> None:
    plain = Explainer(net)(images)
    with torch.inference_mode():
        same(Explainer(net)(images.clone()), plain)


def test_a_sigmoid_at_the_end_gives_its_own_probabilities(images: Tensor) -> None:
    explanation = Explainer(Wrapped(torch.sigmoid).eval())(images, 1)
    assert explanation.probability == pytest.approx(make_net()(images)[:, 1].sigmoid().tolist())
    alone = Explainer(make_net(), contrast=False)(images, 1)  # sigmoids have no rivals
    torch.testing.assert_close(explanation.evidence, alone.evidence)


def test_labels_that_do_not_exclude_each_other(images: Tensor) -> None:
    net = make_net()
    found = Explainer(net, multilabel=True)(images, 1)
    expected = Explainer(Wrapped(torch.sigmoid).eval())(images, 1)
    assert found.probability == pytest.approx(expected.probability)
    torch.testing.assert_close(found.evidence, expected.evidence)
    squashed = Explainer(Wrapped(torch.sigmoid).eval(), multilabel=True)(images, 1)
    assert squashed.probability == pytest.approx(expected.probability)
    torch.testing.assert_close(squashed.evidence, expected.evidence)


@pytest.mark.parametrize(
    "change",
    [
        lambda scores: scores[:, :1],
        lambda scores: scores[:, 0],
        lambda scores: scores[:, :1].sigmoid(),
        lambda scores: scores[:, :1].squeeze(),
        lambda scores: scores[:, 0].sigmoid().squeeze(),
    ],
)
def test_a_single_logit_is_the_only_class(change: Any, images: Tensor) -> None:
    explanation = Explainer(Wrapped(change).eval())(images, 0)
    assert explanation.target == (0, 0, 0)
    assert explanation.probability == pytest.approx(make_net()(images)[:, 0].sigmoid().tolist())
    plain = Explainer(make_net(), multilabel=True)(images, 0)
    torch.testing.assert_close(explanation.evidence, plain.evidence)


@pytest.mark.parametrize("classes", [None, ("cat",), ("dog", "cat")])
@pytest.mark.parametrize("squash", [False, True])
def test_of_a_single_score_below_zero_the_no_is_explained(
    classes: tuple[str, ...] | None, squash: bool, images: Tensor
) -> None:
    middle = float(make_net()(images)[:, 0].detach().median())

    def change(scores: Tensor) -> Tensor:
        score = scores[:, :1] - middle
        return score.sigmoid() if squash else score

    explainer = Explainer(Wrapped(change).eval(), classes=classes)
    found = explainer(images)
    score = make_net()(images)[:, 0].detach() - middle
    no = (score < 0).tolist()
    assert 0 < sum(no) < len(no)
    yes, other = {
        None: ("class 0", "not class 0"),
        ("cat",): ("cat", "not cat"),
        ("dog", "cat"): ("cat", "dog"),
    }[classes]
    assert found.label == tuple(other if item else yes for item in no)
    assert found.probability == pytest.approx(score.abs().sigmoid().tolist())
    plus, minus = (
        Explainer(Wrapped(lambda s, sign=sign: sign * (s[:, :1] - middle)).eval())(
            images, lambda output: output[:, 0]
        )
        for sign in (1, -1)
    )
    for i, item in enumerate(no):
        expected = (minus if item else plus).evidence[i]
        torch.testing.assert_close(found.evidence[i], expected)
        assert found.paths[i] == explainer(images[i : i + 1]).paths[0]
    if classes is not None:  # what was asked for is explained, whatever the answer is
        torch.testing.assert_close(explainer(images, "cat").evidence, plus.evidence)
    if classes == ("dog", "cat"):
        torch.testing.assert_close(explainer(images, ["dog"] * 3).evidence, minus.evidence)
        first, second = explainer.top(images, 2)
        assert first.label == found.label
        assert all(a != b for a, b in zip(first.label, second.label, strict=True))


def test_a_single_score_has_two_answers_and_names_for_no_more(images: Tensor) -> None:
    single = Wrapped(lambda scores: scores[:, :1]).eval()
    with pytest.raises(InputError, match="no class of rank 3"):
        Explainer(single, classes=("no", "yes")).top(images, 3)
    with pytest.raises(InputError, match="no class of rank 2"):
        Explainer(single).top(images, 2)
    for target in (None, 0):
        with pytest.raises(InputError, match="3 class names and 1 scores"):
            Explainer(single, classes=("a", "b", "c"))(images, target)


def test_broken_weights_are_told_whatever_the_target_is(net: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        net.head.weight[0, 0] = torch.nan
    for target in (0, hysm.targets.versus(0, 1)):
        with pytest.raises(ModelError, match=r"weight head\.weight contains NaN"):
            Explainer(net)(images, target)


def test_a_target_function_that_gives_nan_is_told(net: nn.Module, images: Tensor) -> None:
    with pytest.raises(InputError, match="The target function returned NaN or infinity"):
        Explainer(net)(images, lambda output: output[:, 0] * float("nan"))


def test_a_program_for_two_images_shows_its_layers_and_paths(
    net: nn.Module, images: Tensor
) -> None:
    program = torch.export.export(net, (images[:2],))
    explanation = Explainer(program)(images[:2])
    expected = Explainer(net)(images[:2])
    for i in range(2):
        strength = [point.strength for point in expected.points[i][:5]]
        assert [path.point.strength for path in explanation.path(i, range(5))] == pytest.approx(
            strength
        )
        assert explanation.layers(i)[0].shape == (3, 16, 16)


def test_containers_of_torch_fx_are_in_no_mode(net: nn.Module, images: Tensor) -> None:
    nested = nn.Sequential(OrderedDict(body=net)).eval()
    traced = torch.fx.symbolic_trace(nested)
    assert any(module.training for module in traced.modules())
    torch.testing.assert_close(Explainer(traced)(images).evidence, Explainer(net)(images).evidence)


def test_a_layer_of_torchscript_cannot_be_asked_for(net: nn.Module, images: Tensor) -> None:
    scripted = torch.jit.trace(net, images)
    with pytest.raises(InputError, match="is TorchScript, which doesn't show"):
        Explainer(scripted)(images, hysm.targets.channel("conv1", 3))


# -- models -------------------------------------------------------------------------------------------


def test_wrappers_are_taken_off(net: nn.Module, images: Tensor) -> None:
    expected = Explainer(net)(images)
    compiled = torch.compile(net, backend="eager")
    for wrapper in (compiled, nn.DataParallel(net), nn.DataParallel(compiled)):
        explainer = Explainer(wrapper)
        assert explainer.network.module is net
        assert explainer.network.name == "Sequential"
        same(explainer(images), expected)
    inside = Explainer(Network("mine", nn.DataParallel(net)))
    assert inside.network.module is net
    assert inside.network.name == "mine"


def test_a_model_compiled_in_place_is_seen_through(net: nn.Module, images: Tensor) -> None:
    expected = Explainer(net)(images)
    net.compile(backend="eager")
    same(Explainer(net)(images), expected)


@pytest.mark.parametrize("method", ["evidence", "seed", "exact"])
def test_the_model_is_left_as_it_was(images: Tensor, method: str) -> None:
    net = make_net()
    net.conv1.weight.grad = torch.ones_like(net.conv1.weight)
    net.conv2.weight.requires_grad_(False)
    net.relu1.register_forward_hook(lambda module, args, output: None)
    before = copy.deepcopy(net.state_dict())

    def state() -> list[Any]:
        return [
            [(name, p.requires_grad, p.grad is None, id(p)) for name, p in net.named_parameters()],
            [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()],
            sorted(net.__dict__),
        ]

    expected = state()
    given = images.clone()
    explanation = Explainer(net, method)(given)
    assert explanation.layers()
    assert explanation.paths is not None
    assert state() == expected
    assert torch.equal(net.conv1.weight.grad, torch.ones_like(net.conv1.weight))
    after = net.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(given, images)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("method", ["evidence", "seed", "exact"])
def test_channels_last_makes_no_difference(images: Tensor, method: str) -> None:
    expected = Explainer(make_net(), method)(images, 1)
    net = make_net().to(memory_format=torch.channels_last)
    found = Explainer(net, method)(images.to(memory_format=torch.channels_last), 1)
    same(found, expected)
    assert len(found.paths[0]) == len(expected.paths[0])


@pytest.mark.parametrize(
    ("method", "options"),
    [("evidence", {}), ("evidence", {"nodes": 100_000}), ("exact", {})],
    ids=["evidence", "nodes", "exact"],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-4), (torch.float16, 0.05), (torch.bfloat16, 0.3)],
)
def test_other_precisions_agree(
    images: Tensor, method: str, options: dict[str, int], dtype: torch.dtype, tolerance: float
) -> None:
    expected = Explainer(make_net(), method, **options)(images, 1).evidence
    found = Explainer(make_net().to(dtype), method, **options)(images.to(dtype), 1)
    assert (found.evidence.float() - expected).norm() / expected.norm() < tolerance
    assert all(0 <= share <= 1 for share in found.coverage)
    assert found.attention.dtype == torch.float32
    assert found.layers()
    assert found.paths is not None
    assert found.to_dict()["provenance"]["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("nodes", [None, 20])
def test_evidence_that_overflows_is_said(nodes: int | None) -> None:
    """The weights of two layers make what is infinite together, each activation being none of it."""
    net = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 2)
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net[0].weight.fill_(1e-10)
        net[2].weight.copy_(1e20 * torch.eye(8))
        net[3].weight[0] = torch.tensor([1e20, -1e20]).repeat(4)
    with pytest.raises(ModelError, match="evidence overflows"):
        Explainer(net, nodes=nodes)(torch.ones(1, 1, 2, 2), 0)


@pytest.mark.parametrize("options", [{}, {"method": "exact"}, {"together": True}], ids=str)
def test_evidence_spread_thin_is_kept_in_half_precision(options: dict[str, Any]) -> None:
    """Many places and small activations: in float16 what each gets would be 0, and z below what it can tell."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    pictures = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        net[0].weight *= 0.05
        net[3].weight *= 0.05
        net[-1].weight *= 10
    expected = hysm.explain(net, pictures, 1, **options)
    found = hysm.explain(copy.deepcopy(net).half(), pictures.half(), 1, **options)
    assert found.evidence.dtype == torch.float32
    assert found.samples[0].input.dtype == torch.float16
    assert found.coverage == pytest.approx(expected.coverage, rel=0.02)
    assert torch.cosine_similarity(found.evidence.flatten(), expected.evidence.flatten(), 0) > 0.999
    assert found.layers()[0].map.dtype == torch.float32


@pytest.mark.parametrize("method", ["evidence", "seed", "exact"])
def test_activations_that_pass_through_8_bits(method: str) -> None:
    """As networks whose weights will be of 8 bits are trained: few calls of PyTorch can add these up."""

    class Squeezed(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.dtype, self.conv, self.head = dtype, nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).to(self.dtype).float().relu().mean((2, 3)))

    torch.manual_seed(0)
    net = Squeezed(torch.float8_e4m3fn).eval()
    wide = Squeezed(torch.float32).eval()
    wide.load_state_dict(net.state_dict())
    picture = torch.rand(1, 3, 8, 8)
    found, want = (hysm.explain(model, picture, 1, method=method) for model in (net, wide))
    assert found.paths[0]
    if method != "seed":  # where the strongest nodes may be others
        torch.testing.assert_close(found.evidence, want.evidence, rtol=0.1, atol=0.02)


def test_nested_tensors_are_refused() -> None:
    def forward(x: Tensor) -> Tensor:
        return torch.nested.nested_tensor([one * 2 for one in x]).to_padded_tensor(0.0).sum((2, 3))

    with pytest.raises(ModelError, match="makes nested tensors"):
        hysm.explain(Made(forward), torch.rand(1, 3, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_photo_becomes_what_the_model_takes(photo: Image.Image, dtype: torch.dtype) -> None:
    explainer = Explainer(make_net().to(dtype), "seed", preprocess=Preprocess((16, 16)))
    explanation = explainer(photo)
    assert explanation.samples[0].input.dtype == dtype
    assert explanation.picture().size[0] > 0


@dataclass
class Said:
    scores: Tensor
    logits: Tensor
    name: str = "said"


def test_an_answer_in_a_dataclass(images: Tensor) -> None:
    net = Wrapped(lambda scores: [Said(scores.softmax(1), scores)]).eval()
    same(
        Explainer(net)(images, lambda said: said[0].logits[:, 1]),
        Explainer(make_net())(images, lambda s: s[:, 1]),
    )
    one = Wrapped(lambda scores: Said(scores.softmax(1), scores)).eval()
    same(Explainer(one)(images, 1), Explainer(make_net())(images, 1))
    versus = hysm.targets.versus(1, 2)
    same(Explainer(one)(images, versus), Explainer(make_net())(images, versus))


def test_an_answer_in_a_dataclass_that_pytorch_takes_apart(images: Tensor) -> None:
    @dataclass
    class Registered:
        logits: Tensor
        late: Any = field(init=False)  # and never set

    pytree.register_dataclass(Registered, field_names=["logits"], drop_field_names=["late"])
    net = Wrapped(Registered).eval()
    same(Explainer(net)(images, 1), Explainer(make_net())(images, 1))


def test_a_batch_of_bytes_is_a_list_of_pictures() -> None:
    explainer = Explainer(make_net(), preprocess=Preprocess((16, 16)))
    pictures = torch.randint(256, (2, 3, 20, 24), dtype=torch.uint8)
    same(explainer(pictures), explainer(list(pictures)))


def test_a_model_without_parameters(images: Tensor) -> None:
    pool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten()).eval()
    explanation = Explainer(pool, contrast=False)(images, 1)
    for i, one in enumerate(explanation):
        y, x, _ = one.points[0][0]
        assert images[i, 1, int(y), int(x)] == images[i, 1].max()


# -- errors: the target -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("badger", "foxes has no class 'badger'"),
        ("hem", "did you mean hen"),
        ("fox", r"'fox' may be red fox \(0\), grey fox \(1\).*give the whole name or the index"),
        (4, "foxes has no class 4; indices go from 0 to 3"),
        (-1, "foxes has no class -1; indices go from 0 to 3"),
        ([0, 1], r"2 targets for 3 image\(s\): give one for each"),
        (torch.tensor([0, 1]), r"2 targets for 3 image\(s\)"),
        ([], r"0 targets for 3 image\(s\)"),
        ([0, 1, "badger"], "no class 'badger'"),
        (1.5, "A target is None, a class .* not 1.5"),
        (True, "A target is .* not True"),
        ([0, 1.5, 1], "A target is .* not 1.5"),
        (np.array([[0], [1], [2]]), r"A target is .* not \[0\]"),
    ],
)
def test_a_class_that_is_not_there(
    explainer: Explainer, images: Tensor, target: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        explainer(images, target)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda output: "badger", "this one returned 'badger'"),
        (lambda output: None, "this one returned None"),
        (lambda output: 0.5, "this one returned 0.5"),
        (lambda output: output, r"for 3 image\(s\) this one returned a tensor \[3, 4\]"),
        (lambda output: output[:2, 0], r"returned a tensor \[2\]"),
        (lambda output: torch.ones(3), "does not depend on the input"),
        (lambda output: output[:, 0] > 0, r"returned a tensor \[3\]"),
        (lambda output: 7, "has no class 7; indices go from 0 to"),
        (lambda output: output.boxes, r"AttributeError.*the model's output: tensor \[3, 4\]"),
        (lambda output: output[:, 99], "IndexError: index 99 is out of bounds"),
        (lambda output: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_function_that_returns_nonsense(
    net: nn.Module, images: Tensor, function: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Explainer(net)(images, function)


def test_a_failing_function_is_told_what_it_was_given(images: Tensor) -> None:
    model = Wrapped(lambda scores: {"scores": (scores, [None])}).eval()
    with pytest.raises(InputError) as caught:
        Explainer(model)(images, lambda output: output["logits"])
    assert "KeyError: 'logits'" in str(caught.value)
    assert "dict {'scores': tuple (tensor [3, 4], list (NoneType))}" in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("k", [0, -1])
def test_top_nothing(net: nn.Module, images: Tensor, k: int) -> None:
    with pytest.raises(InputError, match="give 1 or more"):
        Explainer(net).top(images, k)


def test_top_more_than_there_are(net: nn.Module, images: Tensor) -> None:
    with pytest.raises(InputError, match="no class of rank 5: the model has 4 classes"):
        Explainer(net).top(images, 5)


def test_names_that_do_not_fit_the_scores(net: nn.Module, images: Tensor) -> None:
    with pytest.raises(InputError, match="Sequential has 2 class names and 4 scores"):
        Explainer(net, classes=["fox", "hen"])(images)


# -- errors: the images -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 1, 16, 16), r"Sequential can't run on .*\(2, 1, 16, 16\).*3 channels"),
        (torch.rand(3, 16, 16), r"\(3, 16, 16\).*A single image needs a batch axis: image\[None\]"),
        (
            torch.rand(16, 16),
            r"can't run on .*\(16, 16\).* Pictures have the shape \[batch, channel",
        ),
        (torch.tensor(1.0), r"the shape \(\): a batch"),
        (torch.rand(0, 3, 16, 16), r"the shape \(0, 3, 16, 16\).*no axis of 0"),
        (torch.rand(2, 3, 0, 16), "no axis of 0"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "a torch.uint8 tensor .* preprocess="),
        (torch.rand(1, 3, 16, 16).double(), "type torch.float64"),
        (torch.full((1, 3, 16, 16), float("nan")), "contains NaN or infinity"),
        (torch.full((1, 3, 16, 16), float("inf")), "contains NaN or infinity"),
        (torch.rand(1, 3, 16, 16, device="meta"), "The input is on meta and the model on cpu"),
        ("photo.jpg", "Explaining a str needs to know .* preprocess="),
        ([torch.rand(3, 16, 16)], "Explaining a list needs to know"),
        (np.zeros((4, 4, 3), np.uint8), "Explaining a ndarray needs to know"),
        (None, "Explaining a NoneType"),
    ],
)
def test_images_that_can_not_be_used(net: nn.Module, images: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Explainer(net)(images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "the list is empty"),
        ("nowhere.jpg", "There is no file nowhere.jpg"),
        (["nowhere.jpg"], "There is no file nowhere.jpg"),
        (b"no picture", "not a picture"),
        (torch.rand(3, 16, 16) * 2 + 2, r"scale them to 0\.\.1"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int64), "is not one picture"),
        (None, "A NoneType is not a picture"),
        ([None], "A NoneType is not a picture"),
    ],
)
def test_pictures_that_can_not_be_read(explainer: Explainer, images: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        explainer(images)


# -- errors: the model --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (3, "not a int"),
        (None, "not a NoneType"),
        (lambda x: x, "not a function"),
        (nn.Linear, "not the class Linear"),
    ],
)
def test_a_model_that_is_none(model: Any, message: str) -> None:
    with pytest.raises(
        InputError, match=f"A model is an nn.Module, a Network or a name, {message}"
    ):
        Explainer(model)


def test_a_preprocess_that_is_none(net: nn.Module) -> None:
    with pytest.raises(
        InputError, match=r"preprocess is a howyouseeme\.Preprocess, or a .* not a dict"
    ):
        Explainer(net, preprocess={"size": 224})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"The preprocessing <lambda> failed .* \(KeyError: 'x'\)"):
        Explainer(net, preprocess=lambda _: {}["x"])


def test_a_preprocess_that_is_a_function(net: nn.Module) -> None:
    """Torchvision's transforms, as in the training script: points come out in the photo's pixels."""
    norm = [transforms.ToTensor(), transforms.Normalize((0.5,), (0.25,))]
    steps = transforms.Compose([transforms.Resize(20), transforms.CenterCrop(16), *norm])
    known = Preprocess((16, 16), "crop", 20, mean=(0.5,), std=(0.25,))
    photo = hysm.sample_photo("cat")
    found, want = (Explainer(net, preprocess=one)(photo) for one in (steps, known))
    assert found.target == want.target
    assert found.points[0].position.tolist() == want.points[0].position.tolist()


def test_a_name_that_no_model_has() -> None:
    with pytest.raises(ModelError, match=r"There is no model .eficientnet-lite0.*did you mean"):
        Explainer("eficientnet-lite0")


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("grad-cam", {}, "no method 'grad-cam': choose one of evidence, seed, exact"),
        ("seed", {"kk": 3}, "method='seed' has no parameter 'kk': it takes k, position, outliers"),
        ("evidence", {"k": 3}, "method='evidence' has no parameter 'k': it takes contrast"),
        ("seed", {"k": 0}, "k=0 is no number of nodes: give 1 or more"),
        ("seed", {"k": "a"}, "k='a' is no number of nodes"),
        ("seed", {"position": "here"}, "position='here' is not known"),
        ("evidence", {"nodes": 0}, "nodes=0 is no number of nodes"),
        ("evidence", {"nodes": True}, "nodes=True is no number of nodes"),
    ],
)
def test_methods_and_parameters_that_are_not_there(
    net: nn.Module, method: str, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Explainer(net, method, **parameters)


@pytest.mark.parametrize("part", ["the whole", "bn1"])
def test_training_mode(net: nn.Sequential, images: Tensor, part: str) -> None:
    (net if part == "the whole" else net.bn1).train()
    with pytest.raises(ModelError, match=r"in training mode .*call model\.eval\(\)") as caught:
        Explainer(net)(images)
    assert "bn1" in str(caught.value)
    assert net.bn1.training  # the model is left as it was, also here


def test_a_weight_that_is_nan(net: nn.Sequential, images: Tensor) -> None:
    with torch.no_grad():
        net.conv2.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"weight conv2\.weight contains NaN"):
        Explainer(net)(images)


def test_a_buffer_that_is_nan(net: nn.Sequential, images: Tensor) -> None:
    with torch.no_grad():
        net.bn1.running_var[2] = float("inf")
        net.bn1.running_mean[2] = float("nan")
    with pytest.raises(ModelError, match=r"buffer bn1\.running_mean contains NaN"):
        Explainer(net)(images)


def test_an_overflow_names_the_module_that_made_it(net: nn.Sequential, images: Tensor) -> None:
    with torch.no_grad():
        net.conv1.weight.fill_(1e30)
        net.conv2.weight.fill_(1e30)
    with pytest.raises(ModelError, match=r"first made by aten\.convolution\(1x8x8x8\) in conv2"):
        Explainer(net)(images)


def test_a_model_without_contents(images: Tensor) -> None:
    with pytest.raises(ModelError, match="on the meta device"):
        Explainer(make_net().to("meta"))(images)


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there(net: nn.Module, device: str) -> None:
    with pytest.raises(InputError, match=f"The device {device} can't be used"):
        Explainer(net, device=device)


@pytest.mark.parametrize("device", [torch.float16, 0.5])
def test_what_is_no_device_changes_no_weights(net: nn.Module, device: Any) -> None:
    with pytest.raises(InputError, match="can't be used: give a name of PyTorch's"):
        Explainer(net, device=device)
    assert {item.dtype for item in net.parameters()} == {torch.float32}


def test_a_device_is_moved_to(net: nn.Module, images: Tensor) -> None:
    same(Explainer(net, device="cpu")(images), Explainer(net)(images))


class Odd(nn.Module):
    """Calls that no rule knows, in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        self.inside = Cumulated()

    def forward(self, x: Tensor) -> Tensor:
        return torch.renorm(self.net(self.inside(x)), 2, 0, 1.0)


class Cumulated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cumprod(x, 1)


def test_all_unsupported_calls_are_named_at_once(images: Tensor, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(hysm.UnsupportedCallError) as caught:
        Explainer(Odd().eval())(images).save(out)
    message = str(caught.value)
    assert "aten.cumprod(1x3x16x16) in inside" in message
    assert "aten.renorm(1x4) in the model itself" in message
    assert "howyouseeme.rules.rule" in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: None, InputError, r"class scores\? It is NoneType"),
        (lambda s: {}, InputError, r"class scores\? It is dict \{\}"),
        (lambda s: (s * 2, s), InputError, r"Which part .* tuple \(tensor \[1, 4\], tensor"),
        (lambda s: s[:, :, None], InputError, r"shape \(1, 4, 1\) for 1 image\(s\), not \[batch"),
        (lambda s: torch.ones(3, 4), ModelError, "does not depend on its input"),
        (lambda s: torch.from_numpy(s.detach().numpy()), ModelError, "numpy"),
    ],
)
def test_outputs_without_scores(images: Tensor, change: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        Explainer(Wrapped(change).eval())(images)


def test_a_model_that_checks_its_input(images: Tensor) -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._assert(x.shape[-1] == 224, "Wrong image width! Expected 224.")
            return x

    with pytest.raises(InputError, match=r"Picky can't run on .*Wrong image width! Expected 224\."):
        Explainer(Picky().eval())(images)


def test_a_bug_in_the_model_stays_its_own(images: Tensor) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.absent(x)

    with pytest.raises(AttributeError, match="absent"):
        Explainer(Broken().eval())(images)


def test_a_string_is_no_list_of_targets(images: Tensor) -> None:
    net = make_net()
    with pytest.raises(InputError, match=r"give \['12'\]"):
        Explainer(net).many(images, "12")
    with pytest.raises(InputError, match=r"give \['12'\]"):
        detect(Explainer(net), images, "12")
    with pytest.raises(InputError, match=r"give \[images\]"):
        record(net, images)  # type: ignore[arg-type]


def test_parameters_may_be_numbers_of_numpy() -> None:
    assert hysm.methods.Seed(k=np.int64(5)) == hysm.methods.Seed(k=5)
    assert hysm.methods.Evidence(nodes=np.int64(50)).nodes == 50


def test_none_in_a_list_is_the_likeliest_class(net: nn.Module, images: Tensor) -> None:
    explainer = Explainer(net)
    likeliest = explainer(images).target
    found = explainer(images, [None, 2, None])
    assert found.target == (likeliest[0], 2, likeliest[2])
    for i, target in enumerate(found.target):
        assert torch.equal(found.evidence[i], explainer(images[i : i + 1], target).evidence[0])


def test_how_many_classes_is_a_number(net: nn.Module, images: Tensor) -> None:
    assert len(Explainer(net).top(images, k=np.int64(2))) == 2
    for k in (0, "3", True, 1.5):
        with pytest.raises(InputError, match="asks for nothing"):
            Explainer(net).top(images, k=k)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"give \[1\]"):
        Explainer(net).many(images, 1)  # type: ignore[arg-type]


def test_points_are_an_array(net: nn.Module, images: Tensor) -> None:
    points = Explainer(net)(images).points[0]
    array = np.asarray(points)
    assert array.shape == (len(points), 3)
    assert tuple(array[0, :2]) == points[0].position
    assert array[0, 2] == points[0].strength
    assert np.array(points, dtype=np.float32).dtype == np.float32


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (
            lambda z: z.argmax(1),
            "no scores, but whole numbers, as an argmax gives: .* Let the model",
        ),
        (lambda z: z > 0, "no scores, but yes and no: .* Let the model return the scores"),
        (lambda z: z.numpy(), "leaves PyTorch: it is ndarray. .* return tensors"),
        (lambda z: {"scores": z.tolist()[0]}, "leaves PyTorch: it is dict {'scores': list"),
        (lambda z: z[0, 0].item(), "leaves PyTorch: it is float"),
        (
            lambda z: torch.from_numpy(z.numpy()),
            r"outside of PyTorch \(numpy\), or from a constant",
        ),
    ],
)
def test_an_answer_that_is_no_scores_is_told_by_what_it_is(
    answer: Callable[[Tensor], Any], sentence: str
) -> None:
    class Answers(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return answer(x.mean((2, 3)))

    with pytest.raises(ModelError, match=sentence):
        hysm.explain(Answers().eval(), torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("method", ["evidence", "seed", "exact", Evidence(nodes=20)])
def test_another_default_device_changes_nothing(images: Tensor, method: Any) -> None:
    """As `torch.set_default_device("cuda")` for a model that is on the CPU."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()

        def forward(self, x: Tensor) -> Tensor:
            y = x * 1
            y[:, :1] = y[:, :1] * 2
            return self.net(torch.as_strided(y, y.shape, y.stride()))

    model = Views().eval()

    def asked() -> list[Any]:
        explanation = Explainer(model, method)(images)
        layers = [layer.map for layer in explanation.layers()]
        return [explanation.saliency, explanation.attention, *layers, explanation.paths]

    usual = asked()
    with torch.device("meta"):
        found = asked()
    for one, other in zip(usual, found, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_a_named_tuple_has_its_scores_by_name(images: Tensor) -> None:
    Answer = namedtuple("Answer", ["features", "logits"])
    model = Wrapped(lambda y: Answer(y * 2, y)).eval()
    found = Explainer(model)(images, 1)
    assert torch.equal(found.evidence, Explainer(make_net())(images, 1).evidence)
