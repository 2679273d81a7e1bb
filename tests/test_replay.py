"""Replays: the explanation that is made as usual, to the bit, or none."""

from __future__ import annotations

import gc
import pickle
import random
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from networks import Made
from torch import Tensor, nn
from torch.nn import functional as F

from howyouseeme import Explainer, Explanation, InputError, ModelError, load_model
from howyouseeme import explainer as explainer_module
from howyouseeme.links import Diagonal, Edges, Link
from howyouseeme.links.base import Shape
from howyouseeme.methods import Evidence
from howyouseeme.replay import program
from howyouseeme.replay.graph import warned
from howyouseeme.replay.program import Program
from howyouseeme.replay.state import State
from howyouseeme.replay.traced import trace
from howyouseeme.replay.tracer import Tracer, Unfit
from howyouseeme.rules import Step, rules
from howyouseeme.tape import Value, record

SEEDS = range(20)


class AsGraph:
    """What `Graph` is on a GPU, here: what is made lies where it lay, in memory of its own."""

    def __init__(self, run: Callable[..., Any], given: Sequence[Tensor], steady: int) -> None:
        self.run, self.steady = run, steady
        self.given = [*given[:steady], *(item.clone() for item in given[steady:])]
        self.made = run([item.clone() for item in given])

    def __call__(self, given: Sequence[Tensor]) -> Any:
        for at, (own, item) in enumerate(zip(self.given, given, strict=True)):
            if at < self.steady:
                assert own is item
            else:
                own.copy_(item)
        for own, item in zip(self.made, self.run(self.given), strict=True):
            own.copy_(item)
        return self.made

    @classmethod
    def of(cls, run: Callable[..., Any], given: Sequence[Tensor], steady: int) -> AsGraph:
        return cls(run, given, steady)


@pytest.fixture(params=["as calls", "as a graph"], autouse=True)
def start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs as calls of the CPU, and as if they were the graph of a GPU."""
    if request.param == "as a graph":
        monkeypatch.setattr(program, "makes_graphs", lambda device: True)
        monkeypatch.setattr(program, "Graph", AsGraph)
        monkeypatch.setattr(
            explainer_module, "makes_graphs", lambda device: True
        )  # with what is drawn


class Net(nn.Module):
    """Convolutions, what most networks have between them, and `extra` at a feature map [batch, 8, 12, 12]."""

    def __init__(self, extra: Callable[[Tensor], Tensor] = lambda x: x, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        self.extra, self.scale = extra, 1.0
        self.shift, self.listed = torch.zeros(1), {"a": [1.0]}
        self.configured = SimpleNamespace(scale=1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv1(x)), inplace=True)
        x = F.max_pool2d(x, 2)
        x = self.extra(x)
        x = F.relu_(x + self.conv2(x))
        x = self.head((self.conv3(x) + self.shift).mean((2, 3)) * self.configured.scale)
        return x * self.scale * self.listed["a"][0]


class Doubled(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2)


def image(seed: int, batch: int = 1, size: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, size, size, generator=generator) * 2 - 1


def pair(model: nn.Module, **parameters: Any) -> tuple[Explainer, Explainer]:
    """An explainer that replays, with its two images before that, and one that doesn't."""
    replaying = Explainer(model.eval(), replay=True, **parameters)
    for seed in (100, 101):
        replaying(image(seed))
    return replaying, Explainer(model, replay=False, **parameters)


def hits(explainer: Explainer) -> int:
    assert explainer._replays is not None
    return sum(kept.hits for kept in explainer._replays._kept.values() if kept is not None)


def assert_same(one: Explanation, other: Explanation) -> None:
    assert one.target == other.target
    assert one.probability == other.probability
    assert one.evidence.abs().max() > 0
    assert torch.equal(one.evidence, other.evidence)
    assert torch.equal(one.share, other.share)
    assert torch.equal(one.saliency, other.saliency)
    assert one.coverage == other.coverage


def in_place(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :4] = x[:, 4:] * 0.5
    x[:, 2:6].mul_(2).add_(-0.1)
    return x


def half_written(x: Tensor) -> Tensor:
    y = torch.empty_permuted(x.shape, (0, 2, 3, 1))
    y[:, :4] = x[:, 4:]
    return y


def branches(x: Tensor) -> Tensor:
    weighed = x[:, 1:6] * x[:, 1:6].mean((2, 3), keepdim=True)
    return torch.cat([F.avg_pool2d(x, 3, 1, 1)[:, :3], weighed], 1)


def attention(x: Tensor) -> Tensor:
    rows = x.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(rows, rows, rows).transpose(1, 2).reshape(x.shape)


EXTRAS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "in place": in_place,
    "half written": half_written,
    "overwritten": lambda x: F.relu_(x - 0.3) + x.sub_(0.1),
    "branches": branches,
    "attention": attention,
    "layer norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "swish": lambda x: F.silu(x, inplace=True),
    "resized": lambda x: F.interpolate(F.interpolate(x, size=5), size=(12, 12), mode="bilinear"),
    "constant": lambda x: x + torch.linspace(-1, 1, 12) * torch.tensor([0.5]),
    "masked by what it is": lambda x: torch.where(x > x.mean(), x, torch.zeros_like(x)),
    "moved": lambda x: torch.roll(x, 2, 3).flip(2)[:, torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])],
    "data": lambda x: x.data * 2 + (x * 3).data,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", EXTRAS)
def test_a_replay_is_what_is_made_as_usual(name: str) -> None:
    replaying, usual = pair(Net(EXTRAS[name]))
    for seed in range(4):
        assert_same(replaying(image(seed)), usual(image(seed)))
    assert hits(replaying) == 4


@pytest.mark.parametrize("parameters", [{"contrast": False}, {"focus": False}, {"method": "exact"}])
def test_with_other_parameters(parameters: dict[str, Any]) -> None:
    replaying, usual = pair(Net(), **parameters)
    for seed in range(3):
        one, other = replaying(image(seed)), usual(image(seed))
        assert torch.equal(one.evidence, other.evidence)
    assert hits(replaying) == 3


def test_the_first_is_explained_as_usual_and_the_second_is_traced() -> None:
    explainer = Explainer(Net().eval(), replay=True)
    assert explainer._replays is not None
    for kept in (0, 1):
        assert_same(explainer(image(0)), Explainer(explainer.network)(image(0)))
        assert len(explainer._replays._kept) == kept
    assert not hits(explainer)


def test_classes_can_be_chosen() -> None:
    replaying, usual = pair(Net(), classes=["a", "b", "c", "d", "e"])
    for target in ("b", 3, None):
        assert_same(replaying(image(1), target), usual(image(1), target))
    assert hits(replaying) == 3
    for _ in range(3):
        many, as_usual = replaying.many(image(2), [0, "e"]), usual.many(image(2), [0, "e"])
        best, best_as_usual = replaying.top(image(2), 3), usual.top(image(2), 3)
    for one, other in zip([*many, *best], [*as_usual, *best_as_usual], strict=True):
        assert_same(one, other)
    assert hits(replaying) == 3 + 2
    with pytest.raises(InputError, match="has no class 'f'"):
        replaying(image(1), "f")


@pytest.mark.parametrize("together", [None, 2, True])
def test_the_images_of_a_batch(together: int | None) -> None:
    replaying, usual = pair(Net(), together=together)
    for seed in range(3):
        assert_same(replaying(image(seed, batch=4)), usual(image(seed, batch=4)))
    assert hits(replaying)


def test_weights_are_those_of_the_moment() -> None:
    net = Net()
    replaying, usual = pair(net)
    before = replaying(image(0))
    with torch.no_grad():
        net.conv2.weight.neg_()
    net.head.weight.data.mul_(-1)
    net.bn.running_mean.add_(0.2)
    after = replaying(image(0))
    assert_same(after, usual(image(0)))
    assert not torch.equal(before.evidence, after.evidence)
    assert hits(replaying) == 2


def changed_layer(net: Net) -> None:
    net.conv2 = Net(seed=5).conv2.eval()


def changed_memory(net: Net) -> None:
    net.conv2.weight.data = Net(seed=5).conv2.weight.data


def changed_number(net: Net) -> None:
    net.scale = -1.0


def changed_stride(net: Net) -> None:
    net.conv3.stride = (2, 2)


def changed_function(net: Net) -> None:
    net.extra = torch.sin


def turned_weight(net: Net) -> None:
    net.conv2.weight.data = net.conv2.weight.data.transpose(0, 1)


def changed_tensor(net: Net) -> None:
    net.shift.data = net.shift.data + 3


def changed_item(net: Net) -> None:
    net.listed["a"][0] = 3.0


def changed_configuration(net: Net) -> None:
    net.configured.scale = 3.0


def changed_class(net: Net) -> None:
    net.__class__ = Doubled


CHANGES = [
    *(changed_layer, changed_memory, changed_number, changed_stride, changed_function),
    *(turned_weight, changed_tensor, changed_item, changed_configuration, changed_class),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_network_that_was_changed_is_traced_anew(change: Callable[[Net], None]) -> None:
    net = Net()
    replaying, usual = pair(net)
    before = replaying(image(0))
    change(net)
    for seed in range(4):
        assert_same(replaying(image(seed)), usual(image(seed)))
    assert not torch.equal(before.evidence, usual(image(0)).evidence)
    assert hits(replaying) == 2


def test_a_class_that_was_changed_is_traced_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    replaying, usual = pair(Doubled())
    monkeypatch.setattr(Doubled, "forward", lambda self, x: Net.forward(self, x * 3))
    assert_same(replaying(image(0)), usual(image(0)))


def test_another_method_is_traced_anew() -> None:
    replaying, usual = pair(Net())
    replaying.method = usual.method = Evidence(contrast=False)
    for seed in range(3):
        assert_same(replaying(image(seed)), usual(image(seed)))


def test_hooks_on_all_modules_are_not_passed_over() -> None:
    replaying, usual = pair(Net())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda *given: seen.append(given[0]))
    try:
        assert_same(replaying(image(0)), usual(image(0)))
    finally:
        handle.remove()
    assert seen


def test_hooks_are_not_passed_over() -> None:
    net = Net()
    replaying, usual = pair(net)
    seen = []
    handle = net.conv2.register_forward_hook(lambda *given: seen.append(given[2]) or given[2] * 2)
    with pytest.warns(UserWarning, match="not replayed.*hooks"):
        found = [replaying(image(seed)) for seed in range(3)]
    assert len(seen) == 3
    for seed in range(3):
        assert_same(found[seed], usual(image(seed)))
    handle.remove()
    for seed in range(4):
        assert_same(replaying(image(seed)), usual(image(seed)))
    assert hits(replaying) == 2


def turned(x: Tensor) -> Tensor:
    return x.flip(3) if x[:, 0].mean() > x[:, 1].mean() else x * 2


def by_list(x: Tensor) -> Tensor:
    return x * (1 + int(np.argmax(x.mean((0, 2, 3)).gt(0).tolist())))


def by_size(x: Tensor) -> Tensor:
    place = (x[0, 0, 0, 0] * 4).long().clamp(min=0)
    table = torch.arange(2.0) if place < 2 else torch.arange(9.0)
    return x + table[place]  # fails where the table is too short, if it isn't looked at first


def by_equality(x: Tensor) -> Tensor:
    return x.flip(2) if torch.equal(x.argmax() % 2, torch.tensor(1)) else x


@pytest.mark.parametrize("change", [turned, by_list, by_size, by_equality])
def test_an_image_that_makes_the_network_decide_otherwise(
    change: Callable[[Tensor], Tensor],
) -> None:
    replaying, usual = pair(nn.Sequential(Made(change), Net()))
    ways = set()
    for seed in range(8):
        before = hits(replaying)
        assert_same(replaying(image(seed)), usual(image(seed)))
        ways.add(hits(replaying) - before)
    assert ways == {0, 1}


def test_what_differs_each_time_is_given_up() -> None:
    replaying, usual = pair(Net(lambda x: x * float(x.max())))
    images = [image(seed) for seed in range(8)]
    with pytest.warns(UserWarning, match="differs from image to image"):
        found = [replaying(each) for each in images]
    for one, each in zip(found, images, strict=True):
        assert_same(one, usual(each))


def by_numpy(x: Tensor) -> Tensor:
    return x * float(np.asarray(x).max())


def by_mask(x: Tensor) -> Tensor:
    return x - x[x > 0].mean()


def by_chance(x: Tensor) -> Tensor:
    return x + 0 * torch.rand_like(x)


def behind(x: Tensor) -> Tensor:
    y = x * 1
    y.data = x * 2
    return y


def wrapped(x: Tensor) -> Tensor:
    return nn.Parameter(x * 2, requires_grad=False) * 1


def by_list_of_tensors(x: Tensor) -> Tensor:
    return x * torch.tensor([x.mean(), x.max()]).sum()


def by_places_in_a_list(x: Tensor) -> Tensor:
    mean = x.mean((0, 2, 3))
    return x + x[:, [mean.argmax(), mean.argmin()]].mean(1, keepdim=True)


def by_floats(x: Tensor) -> Tensor:
    return x * torch.FloatTensor([x.mean(), x.max()]).sum()  # type: ignore[list-item]


def in_another_thread(x: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return x + pool.submit((x * 2).relu).result()


def in_other_words(x: Tensor) -> Tensor:
    try:
        return x - x[x > 0].mean()
    except Exception as error:
        raise RuntimeError("no good") from error


def swallowing(x: Tensor) -> Tensor:
    try:
        return x * float(x.numpy().max())
    except Exception:
        return x


#: What a network does that can't be replayed, and what is said of it.
UNFIT = {
    "outside of PyTorch": by_numpy,
    "size that depends on contents": by_mask,
    "random numbers": by_chance,
    "other memory": behind,
    "which no call tells": wrapped,
    "taken by NumPy or other code outside": by_list_of_tensors,
    "or other code outside of PyTorch": by_places_in_a_list,
    "image to image": by_floats,
    "contents go ways that no call tells": in_another_thread,
    "what aten.index.Tensor returns": in_other_words,
    "code outside": swallowing,
}


@pytest.mark.parametrize("reason", UNFIT)
def test_what_cannot_be_replayed_is_explained_as_usual(reason: str) -> None:
    net = Net(UNFIT[reason]).eval()
    replaying, usual = Explainer(net, replay=True), Explainer(net, replay=False)
    with pytest.warns(UserWarning, match=f"not replayed.*{reason}") as told:
        found = [replaying(image(seed)) for seed in range(8)]
    assert len([one for one in told if "replayed" in str(one.message)]) == 1
    if reason not in ("random numbers", "contents go ways that no call tells"):
        for seed in range(8):
            assert_same(found[seed], usual(image(seed)))


class Cells(nn.Module):
    """Calls of many kinds below the last feature map, each of which a walk by a few nodes goes through."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.each = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.bn, self.norm = nn.BatchNorm2d(8), nn.LayerNorm(8)
        self.up, self.last = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1)
        self.bn.weight.data[::2] *= -1
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.first(x))
        x = F.hardswish(self.bn(self.each(x)))
        x = torch.cat([F.max_pool2d(x, 2), F.avg_pool2d(x, 2)], 1)
        x = self.up(x.flip(3))
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        rows = x.flatten(2)
        x = x + (rows.softmax(2) @ rows.mT @ rows).reshape(x.shape)
        return self.head(self.last(F.pad(x, (1, 0, 0, 2))).relu().mean((2, 3)))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "method", [{"nodes": 20}, {"nodes": 200}, {"method": "seed", "k": 5}], ids=str
)
@pytest.mark.parametrize("model", [Net, Cells])
def test_nodes_are_chosen_anew(model: type[nn.Module], method: dict[str, Any], batch: int) -> None:
    if program.makes_graphs(torch.device("cpu")):
        pytest.skip("a GPU would have to be waited for")
    net = model().eval()
    replaying = Explainer(net, replay=True, together=True, **method)
    usual = Explainer(net, replay=False, together=True, **method)
    for seed in range(6):
        assert_same(replaying(image(seed, batch)), usual(image(seed, batch)))
    assert hits(replaying) == 4
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.7)
    assert_same(replaying(image(7, batch)), usual(image(7, batch)))
    assert hits(replaying) == 5
    several = image(8, batch)
    pairs = [(replaying(several, [1, 2, 3][:batch]), usual(several, [1, 2, 3][:batch]))]
    pairs += zip(replaying.many(several, [0, 1]), usual.many(several, [0, 1]), strict=True)
    for one, other in pairs:
        assert torch.equal(one.evidence, other.evidence)


@pytest.mark.parametrize("method", [{"nodes": 9}, {"method": "seed"}], ids=str)
def test_a_replay_that_chooses_nodes_keeps_nothing_of_an_image(method: dict[str, Any]) -> None:
    if program.makes_graphs(torch.device("cpu")):
        pytest.skip("a GPU would have to be waited for")
    replaying = Explainer(Cells().eval(), replay=True, **method)
    for seed in range(3):
        replaying(image(seed, size=46))
    gc.collect()
    own = {item.untyped_storage().data_ptr() for item in replaying.network.module.parameters()}
    assert not [
        item.shape
        for item in gc.get_objects()
        if type(item) is Tensor and item.dim() > 2 and {46, 23, 23 * 23} & set(item.shape)
        if item.dtype == torch.float
        if item.untyped_storage().data_ptr() not in own
    ]


class Turned(Link):
    """A user's own, which finds its weights somewhere."""

    one_to_one = True

    def __init__(self, in_shape: Shape, out_shape: Shape, find: Any) -> None:
        super().__init__(in_shape, out_shape)
        self.find = find

    @property
    def weight(self) -> Tensor:
        found: Tensor = self.find() if callable(self.find) else self.find
        return found

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).reshape(self.shape_of(x))

    def edges(self, nodes: Tensor) -> Edges:
        return Edges(nodes, self.weight.reshape(-1)[nodes])

    def transposed(self) -> Link:
        return Diagonal(self.out_shape, self.in_shape, self.weight)

    def positive(self) -> Link:
        return Diagonal(self.in_shape, self.out_shape, self.weight.clamp(min=0))

    def negative(self) -> Link:
        return Diagonal(self.in_shape, self.out_shape, self.weight.clamp(max=0))


@dataclass(frozen=True, eq=False)
class Frozen(Turned):
    in_shape: Any
    out_shape: Any
    find: Any


class Slotted(Turned):
    __slots__ = ("find",)


def wave(x: Value) -> Tensor:
    return torch.sin(7 * x.data)


#: How a user's link comes by its weights, and whether that can be replayed.
LINKS: dict[str, tuple[Callable[[Value], Link], bool]] = {
    "a tensor": (lambda x: Turned(x.shape, x.shape, wave(x)), True),
    "frozen": (lambda x: Frozen(x.shape, x.shape, wave(x)), True),
    "a tensor of its function": (
        lambda x: Turned(x.shape, x.shape, partial(torch.clone, wave(x))),
        False,
    ),
    "the value": (lambda x: Turned(x.shape, x.shape, partial(wave, x)), False),
    "a slot": (lambda x: Slotted(x.shape, x.shape, wave(x)), False),
}


@pytest.mark.parametrize("kind", LINKS)
def test_links_of_users_are_filled_or_not_replayed(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if program.makes_graphs(torch.device("cpu")):
        pytest.skip("a GPU would have to be waited for")
    make, fit = LINKS[kind]
    monkeypatch.setitem(
        rules(), "aten.sinh", lambda call, output: Step([(call.args[0], make(call.args[0]))])
    )
    net = Net(torch.sinh).eval()
    replaying, usual = (Explainer(net, nodes=30, replay=way) for way in (True, False))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for seed in (0, 0, 0, 1, 2, 3):  # three alike, which tell nothing of others
            assert_same(replaying(image(seed)), usual(image(seed)))
    assert hits(replaying) == (4 if fit else 0)
    assert any("not replayed" in str(item.message) for item in told) != fit


def test_nodes_are_not_chosen_on_a_gpu() -> None:
    """Which would have to be waited for."""
    tracer, picture = Tracer(), image(0)
    tracer.enter(picture)
    tracer.device = torch.device("cuda")
    with pytest.raises(Unfit, match="nodes are chosen by contents"), tracer:
        tracer.work(lambda tensors: [tensors[0] + 1], [picture])


def masked_scores(x: Tensor) -> Tensor:
    scores = x.softmax(1)
    return scores.masked_fill(scores < 0.15, 0)


@pytest.mark.parametrize(
    "ending",
    [
        lambda x: x.softmax(1),
        lambda x: x.softmax(1).log(),
        torch.sigmoid,
        lambda x: x.softmax(1)[:, [4, 2, 0]],
        masked_scores,
    ],
)
def test_scores_are_seen_through_as_usual(ending: Callable[[Tensor], Tensor]) -> None:
    net = nn.Sequential(Net(), Made(ending)).eval()
    replaying, usual = Explainer(net, replay=True), Explainer(net, replay=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(8):
            one, other = replaying(image(seed)), usual(image(seed))
            assert_same(one, other)


def test_a_single_score_may_say_yes_or_no() -> None:
    net = nn.Sequential(Net(), Made(lambda x: x[:, 0] - x[:, 1] - 0.515)).eval()
    replaying, usual = Explainer(net, replay=True), Explainer(net, replay=False)
    answers = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(8):
            one, other = replaying(image(seed)), usual(image(seed))
            assert_same(one, other)
            answers |= set(one.label)
    assert len(answers) == 2


def test_several_inputs_of_which_one_holds_whole_numbers() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.table, self.head = Net(), nn.Embedding(7, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return self.head(self.net(x) * (1 + self.table(index)))

    net = Two().eval()
    replaying, usual = Explainer(net, replay=True), Explainer(net, replay=False)
    for seed in range(6):
        given = image(seed), torch.tensor([seed])
        assert_same(replaying(given), usual(given))
    assert hits(replaying) == 4


def test_errors_are_those_that_are_raised_as_usual() -> None:
    replaying, usual = pair(Net())
    for explainer in (replaying, usual):
        with pytest.raises(ModelError, match="NaN or infinity"):
            explainer(torch.full_like(image(0), 1e38))
    assert_same(replaying(image(0)), usual(image(0)))
    model = Net().eval()
    with pytest.raises(InputError, match="none of True, False and None"):
        Explainer(model, device="meta", replay="yes")  # type: ignore[arg-type]
    assert not any(item.is_meta for item in model.parameters())  # where it was


def test_functions_as_targets_are_made_as_usual() -> None:
    replaying, usual = pair(Net())
    for _ in range(3):
        one = replaying(image(0), lambda output: output[:, 1] - output[:, 2])
        other = usual(image(0), lambda output: output[:, 1] - output[:, 2])
        assert torch.equal(one.evidence, other.evidence)
    assert not hits(replaying)


def test_whole_numbers_of_the_network_may_change() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.register_buffer("order", torch.tensor([4, 2, 0, 1]))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x[:, self.order[1:] % 3])

    net = Chosen()
    replaying, usual = pair(net)
    for order in ([4, 2, 0, 1], [0, 0, 0, 1], [1, 1, 2, 0]):
        net.order.copy_(torch.tensor(order))
        for seed in range(2):
            assert_same(replaying(image(seed)), usual(image(seed)))


def test_numbers_of_the_weights_are_looked_at_again() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.weight = Net(), nn.Parameter(torch.tensor([1.0, 2.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x * self.weight.tolist()[1])

    net = Listed()
    replaying, usual = pair(net)
    for factor in (1, -1, 3):
        net.weight.data.mul_(factor)
        assert_same(replaying(image(0)), usual(image(0)))


def test_tensors_of_a_class_of_their_own_and_of_no_memory() -> None:
    class Photo(Tensor):
        pass

    net = Net()
    net.register_buffer("unused", torch.eye(3).to_sparse())
    replaying, usual = pair(net)
    for seed in range(3):
        assert_same(replaying(image(seed).as_subclass(Photo)), usual(image(seed)))
    assert hits(replaying) == 3


def test_autocast_switched_off_inside() -> None:
    class Precise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return self.net(x)

    net = Precise().eval()
    replaying, usual = Explainer(net, replay=True), Explainer(net, replay=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for seed in range(5):
            assert_same(replaying(image(seed)), usual(image(seed)))
    assert hits(replaying) == 3


def test_what_autocast_keeps_is_no_constant() -> None:
    net = nn.Sequential(Net(), Made(lambda x: x.float())).eval()
    replaying, usual = Explainer(net, replay=True), Explainer(net, replay=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            replaying(image(0))
            replaying(image(1))
        net[0].conv2.weight.data.neg_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for seed in range(3):
                assert_same(replaying(image(seed)), usual(image(seed)))


def test_many_kinds_of_inputs_are_not_traced_for_ever() -> None:
    explainer = Explainer(Net().eval(), replay=True)
    with patch("howyouseeme.replay.trace", side_effect=trace) as traced, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(8):
            for size in range(16, 40, 2):
                explainer(image(0, size=size))
    assert traced.call_count < 30


def test_a_tape_does_not_grow() -> None:
    net = nn.Sequential(Net(), Made(lambda x: x[:, 0] - x[:, 1] - 0.515)).eval()
    explainer = Explainer(net, replay=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(30):
            explainer(image(seed))
    assert explainer._replays is not None
    recorded = len(record(net, [image(0)]).calls)
    for kept in explainer._replays._kept.values():
        assert kept is None or len(kept.tape.calls) == recorded


def test_results_are_in_memory_of_their_own() -> None:
    replaying, usual = pair(Net())
    first = replaying(image(0))
    kept = first.evidence.clone()
    replaying(image(1)).evidence.zero_()
    assert torch.equal(first.evidence, kept)
    assert_same(replaying(image(1)), usual(image(1)))


def test_explanations_can_be_pickled_and_walk_again() -> None:
    replaying, usual = Explainer("efficientnet-lite0", replay=True), Explainer("efficientnet-lite0")
    for seed in range(3):
        explanation = replaying(image(seed, size=64))
    assert hits(replaying) == 1
    as_usual = usual(image(2, size=64))
    again = pickle.loads(pickle.dumps(explanation))
    assert torch.equal(again.evidence, as_usual.evidence)
    assert str(again.paths[0][0]) == str(as_usual.paths[0][0])


def test_networks_that_are_loaded_by_name_are_replayed_and_modules_if_asked() -> None:
    assert load_model().static
    explainer = Explainer("efficientnet-lite0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(10):
            explainer(image(seed, size=64))
            assert hits(explainer) == (seed > 8)  # after eight, and the one that is traced
        few = Explainer("efficientnet-lite0", nodes=50)
        for seed in range(10):  # nothing is said where nothing was asked for
            few(image(seed, size=64))
    assert Explainer(Net().eval())._replays is None
    assert Explainer("efficientnet-lite0", replay=False)._replays is None


# -- programs ------------------------------------------------------------------------------------------------


def random_calls(seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of some random calls on two tensors [4, 6]: views, writes, sums and what is not used."""

    def run(x: Tensor, weight: Tensor) -> Tensor:
        dice = random.Random(seed)
        pool = [x * 1, x + weight]
        for _ in range(25):
            a, b = dice.choice(pool), dice.choice(pool)
            kind = dice.randrange(9)
            if kind == 0:
                pool.append(a.detach())
            elif kind == 1:
                pool.append(a.t().reshape(4, 6))
            elif kind == 2:
                a[:, dice.randrange(3) : 4] = b[:, :1].clone()
            elif kind == 3:
                a.add_(b, alpha=0.5)
            elif kind == 4:
                pool.append(a.view(24)[:12].clone().repeat(2).view(4, 6))
            elif kind == 5:
                torch.mul(a, weight, out=b)
            elif kind == 6:
                pool.append(torch.zeros(4, 6) + torch.arange(6.0) + a.clamp(min=0))
            elif kind == 7:
                pool.append(a.sort(1).values)
            else:
                a.select(0, dice.randrange(4)).sub_(1)
        return torch.stack([dice.choice(pool) for _ in range(3)]).tanh()

    return run


@pytest.mark.parametrize("seed", SEEDS)
def test_a_program_does_what_the_calls_do(seed: int) -> None:
    run, weight = random_calls(seed), torch.randn(4, 6)
    tracer, first = Tracer(), torch.randn(4, 6)
    given = tracer.enter(first)
    with torch.no_grad(), tracer:
        result = run(first, weight)
    part = tracer.parts[0]
    program = Program(part, [given], [tracer.slot(result)], tracer)
    assert len(program.instructions) <= len(part.instructions)
    for _ in range(3):
        x = torch.randn(4, 6)
        weight.mul_(-1.5)
        before, weight_before = x.clone(), weight.clone()
        made = program([x])
        assert made is not None
        assert torch.equal(made[0], run(x, weight))
        assert torch.equal(x, before)
        assert torch.equal(weight, weight_before)


def test_calls_that_nothing_depends_on_are_left_out() -> None:
    tracer, x = Tracer(), torch.randn(3)
    given = tracer.enter(x)
    with torch.no_grad(), tracer:
        kept = x * 2
        view = kept[1:]
        unused = x.exp().log_()
        view.add_(1)
        result = kept + torch.ones(3).mul(4)
        del unused
    wanted = [tracer.slot(result)]
    program = Program(tracer.parts[0], [given], wanted, tracer)
    names = [str(item.op.overloadpacket) for item in program.instructions]
    # The last writes over `kept`, which is not read again; the first may not write over the input.
    assert names == ["aten.mul", "aten.slice", "aten.add_", "aten.add_"]
    assert program([x]) is not None
    assert torch.equal(program([x])[0], x * 2 + torch.tensor([0.0, 1, 1]) + 4)  # type: ignore[index]


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda x, weight: x.add_(1), "writes to the input"),
        (lambda x, weight: (y := x.sum()).sub_(float(y)), "what Python has looked at"),
        (lambda x, weight: weight.mul_(2), "writes to the input, to weights"),
        (lambda x, weight: x.view(-1)[:2].zero_(), "writes to the input"),
        (lambda x, weight: (x * 1).resize_(2), "another shape"),
        (lambda x, weight: torch.bernoulli(x), "random numbers"),
        (lambda x, weight: torch.nonzero(x), "size that depends on contents"),
        (lambda x, weight: x.to_sparse(), "size that depends|memory of their own"),
    ],
)
def test_what_a_trace_refuses(write: Callable[[Tensor, Tensor], Any], reason: str) -> None:
    tracer, x, weight = Tracer(), torch.rand(2, 3), torch.rand(2, 3)
    tracer.enter(x)
    with torch.no_grad(), pytest.raises(Unfit, match=reason), tracer:
        write(x, weight)
    with pytest.raises(Unfit):  # also where the network catches it
        tracer.check()


# -- what a network is made of -----------------------------------------------------------------------


class Held:
    def __init__(self) -> None:
        self.a, self.flip = 1.0, -1.0


class Part(nn.Module):
    """Holds what a network may hold besides layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.one = Held()
        self.two = SimpleNamespace(inner=SimpleNamespace(scale=1.0))
        self.listed, self.keyed, self.chosen = [1, [2]], {"a": 1.5, "b": [3]}, {"x"}
        self.recent, self.pair = deque([1, 2]), (1.0, [2.0])
        self.large, self.number = list(range(1000)), 1e9


class OtherPart(Part):
    pass


def renamed(part: Part) -> None:
    part.keyed["c"] = part.keyed.pop("b")


def moved(part: Part) -> None:
    part.two.flip = vars(part.one).pop("flip")


def based_on_another(part: Part) -> None:
    class Base(Part):
        pass

    part.__class__ = type("Made", (Base,), {})


CHANGES: dict[str, Callable[[Part], Any]] = {
    "a layer": lambda part: setattr(part, "layer", nn.Linear(2, 2)),
    "a weight": lambda part: setattr(part.layer, "weight", nn.Parameter(torch.ones(2, 2))),
    "its memory": lambda part: setattr(part.layer.weight, "data", torch.ones(2, 2)),
    "its strides": lambda part: setattr(part.layer.weight, "data", part.layer.weight.data.t()),
    "a number": lambda part: setattr(part, "number", 2e9),
    "its type": lambda part: setattr(part, "number", 1000000000),
    "an attribute more": lambda part: setattr(part, "more", 1),
    "a number of an object": lambda part: setattr(part.one, "a", 2.0),
    "of an object in an object": lambda part: setattr(part.two.inner, "scale", 2.0),
    "from object to object": moved,
    "a list": lambda part: part.listed.append(3),
    "a list in a list": lambda part: part.listed[1].append(3),
    "a list in a tuple": lambda part: part.pair[1].append(3),
    "a key": renamed,
    "a set": lambda part: part.chosen.add("y"),
    "a deque": lambda part: part.recent.rotate(),
    "a large list": lambda part: part.large.append(1),
    "a hook": lambda part: part.layer.register_forward_hook(lambda *_: None),
    "its class": lambda part: setattr(part, "__class__", OtherPart),
    "a base": based_on_another,
    "all attributes": lambda part: setattr(part.one, "__dict__", {"a": 1.0, "flip": 1.5}),
    "the mode": lambda part: part.eval(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_network_is_seen(change: str) -> None:
    part = Part()
    state = State(part)
    part.number = float("1e9")  # another object, the same number
    with torch.no_grad():
        part.layer.weight.add_(1)  # weights are looked up each time
    assert state.holds()
    CHANGES[change](part)
    assert not state.holds()
    assert State(part).holds()


def test_a_method_and_hooks_of_all_modules_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    part = OtherPart()
    state = State(part)
    monkeypatch.setattr(Part, "forward", lambda self, x: x, raising=False)
    assert not state.holds()
    state = State(part)
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not state.holds()
    finally:
        hook.remove()
    assert state.holds()


def test_a_warning_of_calls_is_noticed() -> None:
    """As on a GPU the one that a call waits for it."""

    def resize(given: Sequence[Tensor]) -> None:
        torch.ops.aten.add.out(given[0], given[0], out=given[1])

    fit, other = torch.ones(3), torch.ones(2)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert warned(resize, [torch.ones(3), other], "was resized")
        assert not warned(resize, [torch.ones(3), fit], "was resized")
    assert not seen
