"""The default method, against dense Jacobians and plain loops on tiny networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from evidence_reference import Net, Op, rivals, walk
from torch import Tensor, nn

import howyouseeme as hysm
from howyouseeme import Explainer, halftone
from howyouseeme.backtrack import Plan, plan
from howyouseeme.links import Convolution, Matrix
from howyouseeme.methods import Evidence, evidence, excitation, get_method
from howyouseeme.methods.base import Trail
from howyouseeme.methods.descent import descend
from howyouseeme.rules import Step
from howyouseeme.tape import Value, record


def conv(out: str, source: str, inputs: int, outputs: int, size: int = 3, **options: int) -> Op:
    options.setdefault("padding", size // 2)
    return Op(out, "conv", [source], nn.Conv2d(inputs, outputs, size, **options))


def bn(out: str, source: str, channels: int) -> Op:
    return Op(out, "bn", [source], nn.BatchNorm2d(channels))


def linear(out: str, source: str, inputs: int, outputs: int) -> Op:
    return Op(out, "linear", [source], nn.Linear(inputs, outputs))


def relu(out: str, source: str) -> Op:
    return Op(out, "relu", [source])


def maximum(out: str, source: str, size: int, stride: int, padding: int = 0) -> Op:
    return Op(out, "max", [source], nn.MaxPool2d(size, stride, padding))


def chain() -> list[Op]:
    """Convolution, batch norm, ReLU, max-pool, twice; then the mean and a linear layer."""
    return [
        conv("a", "image", 2, 4),
        bn("b", "a", 4),
        relu("c", "b"),
        maximum("d", "c", 2, 2),
        conv("e", "d", 4, 5),
        bn("f", "e", 5),
        relu("g", "f"),
        Op("h", "mean", ["g"]),
        linear("scores", "h", 5, 4),
    ]


def residual() -> list[Op]:
    """A block around which the input passes, and one whose shortcut is a convolution."""
    return [
        conv("a", "image", 2, 4),
        relu("b", "a"),
        conv("c", "b", 4, 4),
        bn("d", "c", 4),
        Op("e", "add", ["d", "b"]),
        conv("f", "e", 4, 6, stride=2),
        relu("g", "f"),
        conv("h", "e", 4, 6, size=1, stride=2),
        Op("i", "add", ["g", "h"]),
        relu("j", "i"),
        Op("k", "mean", ["j"]),
        linear("scores", "k", 6, 3),
    ]


def dense() -> list[Op]:
    """Concatenation, and batch norm before ReLU before convolution."""
    return [
        conv("a", "image", 2, 3),
        bn("b", "a", 3),
        relu("c", "b"),
        conv("d", "c", 3, 3),
        Op("e", "cat", ["a", "d"]),
        bn("f", "e", 6),
        relu("g", "f"),
        conv("h", "g", 6, 4, size=1),
        Op("i", "average", ["h"], nn.AvgPool2d(2)),
        conv("j", "i", 4, 3),
        Op("k", "cat", ["i", "j"]),
        bn("l", "k", 7),
        Op("m", "mean", ["l"]),
        linear("scores", "m", 7, 4),
    ]


def gated() -> list[Op]:
    """Squeeze and excite, in a block and at the last feature map."""
    return [
        conv("a", "image", 2, 4),
        bn("b", "a", 4),
        Op("c", "mean", ["b"]),
        linear("d", "c", 4, 4),
        Op("e", "sigmoid", ["d"]),
        Op("f", "gate", ["b", "e"]),
        conv("g", "f", 4, 4, groups=4, bias=False),
        bn("h", "g", 4),
        relu("i", "h"),
        Op("j", "mean", ["i"]),
        linear("k", "j", 4, 4),
        Op("l", "sigmoid", ["k"]),
        Op("m", "gate", ["i", "l"]),
        Op("n", "mean", ["m"]),
        linear("scores", "n", 4, 3),
    ]


def classic() -> list[Op]:
    """ReLU before batch norm, pools that overlap, and fully connected layers with ReLUs."""
    return [
        conv("a", "image", 2, 4, size=2),
        relu("b", "a"),
        maximum("c", "b", 3, 2, 1),
        bn("d", "c", 4),
        conv("e", "d", 4, 4),
        maximum("f", "e", 3, 1),
        bn("g", "f", 4),
        Op("h", "flatten", ["g"]),
        linear("i", "h", 4 * 2 * 2, 6),
        relu("j", "i"),
        linear("k", "j", 6, 5),
        relu("scores", "k"),
    ]


def forked() -> list[Op]:
    """A map that is read twice: by a convolution, and through a batch norm."""
    return [
        conv("a", "image", 2, 4),
        conv("b", "a", 4, 4, size=1),
        bn("c", "a", 4),
        relu("d", "c"),
        conv("e", "d", 4, 4),
        Op("f", "add", ["b", "e"]),
        Op("g", "mean", ["f"]),
        linear("scores", "g", 4, 3),
    ]


NETS: dict[str, Callable[[], list[Op]]] = {
    "chain": chain,
    "residual": residual,
    "dense": dense,
    "gated": gated,
    "classic": classic,
    "forked": forked,
}
every_net = pytest.mark.parametrize("name", NETS)


def build(name: str, seed: int, bias: bool = True) -> Net:
    """Random weights, with batch norms of either sign."""
    torch.manual_seed(seed)
    net = Net(NETS[name]())
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            nn.init.normal_(layer.weight)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=0.5 if bias else 0)
        if isinstance(layer, nn.BatchNorm2d) and bias:
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return net.double().eval()


def image(seed: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, 7, 7, dtype=torch.float64, generator=generator)


def walked(
    net: nn.Module, images: Tensor, targets: list[int], **parameters: object
) -> tuple[Tensor, Tensor, Trail]:
    """Evidence and share at the pixels of each image [batch, 2, 7, 7], and the trail."""
    tape = record(net, [images])
    classes = tape.output.shape[1]
    nodes = torch.tensor([i * classes + target for i, target in enumerate(targets)])
    trail = Trail()
    result = Evidence(**parameters).walk(plan(tape, tape.output), nodes, trail)
    return result.strength[tape.inputs[0]], result.share[tape.inputs[0]], trail


def descending(
    method: Evidence, plan: Plan, waiting: dict[Value, Any], batch: int, trail: Trail | None
) -> tuple[dict[Value, Tensor], Tensor]:
    """The body of `nodes`, with as many of them as there are."""
    maps = {value: item.evidence for value, item in waiting.items()}
    return descend(plan, maps, None, batch, trail)


@pytest.mark.parametrize("body", ["all nodes", "all dots"])
@pytest.mark.parametrize("contrast", [True, False])
@every_net
def test_against_the_reference(
    name: str, contrast: bool, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if body == "all dots":
        monkeypatch.setattr(Evidence, "_body", descending)
    some = 0.0
    for seed in range(8):
        net, picture = build(name, seed), image(seed)
        for target in (0, 2):
            found, share, _ = walked(net, picture, [target], focus=False, contrast=contrast)
            focused, same_share, _ = walked(net, picture, [target], focus=True, contrast=contrast)
            expected = walk(net, picture, target, contrast)
            pixels = torch.tensor(expected.pixels).reshape(picture.shape)
            torch.testing.assert_close(found, pixels, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(
                focused.flatten(), torch.tensor(expected.focused), rtol=1e-10, atol=1e-10
            )
            torch.testing.assert_close(share, same_share, rtol=1e-12, atol=1e-13)
            total = expected.kept_positive + expected.ended_positive
            shares = pixels / total if total > 0 else torch.zeros_like(pixels)
            torch.testing.assert_close(share, shares, rtol=1e-9, atol=1e-10)
            some += expected.kept_positive
    assert some > 0


@every_net
def test_each_image_of_a_batch_against_the_reference(name: str) -> None:
    net, pictures = build(name, 1), image(1, batch=4)
    targets = [0, 1, 2, 0]
    found, _, _ = walked(net, pictures, targets)
    for i, target in enumerate(targets):
        expected = walk(net, pictures[i : i + 1], target, contrast=True).focused
        torch.testing.assert_close(
            found[i].flatten(), torch.tensor(expected), rtol=1e-10, atol=1e-10
        )


class Signed(nn.Module):
    """Convolutions and linear layers of every sort on activations of both signs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=2, dilation=2, groups=4),
            nn.GELU(),
            nn.ConvTranspose2d(8, 12, 3, stride=2, groups=2, bias=False),
            nn.BatchNorm2d(12),
            nn.Conv2d(12, 6, 1),
        )
        self.across = nn.Linear(6, 6)
        self.last = nn.Conv2d(6, 6, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        x = x + self.across(x.movedim(1, 3)).movedim(3, 1)
        return self.head(self.last(x).mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_products_of_both_signs_by_their_sums(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the sum of all products and that of their sizes, what each sign's own sums tell."""
    monkeypatch.setattr(excitation, "_FEW_INPUTS", 0)
    mixed, taken = excitation._mixed, []

    def telling(step: Step, both: bool) -> Convolution | Matrix | None:
        taken.append(mixed(step, both))
        return taken[-1]

    for seed in range(8):
        torch.manual_seed(seed)
        net, pictures = Signed().to(dtype).eval(), image(seed, batch=2).to(dtype)
        monkeypatch.setattr(excitation, "_mixed", telling)
        *short, short_trail = walked(net, pictures, [0, 2])
        monkeypatch.setattr(excitation, "_mixed", lambda *_, **__: None)
        *long, long_trail = walked(net, pictures, [0, 2])
        bound = 1e-12 if dtype is torch.float64 else 1e-5
        for one, other in zip(short, long, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=bound * float(other.abs().max()))
        short_rates, long_rates = (
            torch.cat([one.rate.flatten() for many in trail.crossings.values() for one in many])
            for trail in (short_trail, long_trail)
        )
        if dtype is torch.float64:  # where little excites, it is told less exactly
            torch.testing.assert_close(short_rates, long_rates, rtol=1e-8, atol=1e-12)
    kinds = [type(link) for link in taken if link is not None]
    assert {Convolution, Matrix} == set(kinds)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_rounding_counts_as_none_and_overflow_stays(broken: float) -> None:
    given = record(nn.Identity().eval(), [torch.ones(2, 1, 3)]).inputs[0]
    found = {given: torch.tensor([[[1.0, -1e-8, 1e-3]], [[broken, 1e-8, 1.0]]])}
    kept, total = evidence._above_rounding(found, torch.zeros(2), 2)
    assert kept[given][0].tolist() == [[1.0, 0.0, pytest.approx(1e-3)]]
    torch.testing.assert_close(kept[given][1], found[given][1], equal_nan=True)
    assert float(total[0]) == pytest.approx(1.001)
    assert not bool(total[1].isfinite())


@pytest.mark.parametrize("contrast", [True, False])
@every_net
def test_nothing_is_lost(name: str, contrast: bool) -> None:
    """Evidence at the pixels and what ended on the way add up to what the walk set out with."""
    for seed in range(8):
        net, picture = build(name, seed), image(seed)
        found, _, _ = walked(net, picture, [1], contrast=contrast, focus=False)
        expected = walk(net, picture, 1, contrast)
        assert float(found.sum()) + expected.ended == pytest.approx(expected.start, abs=1e-9)


@pytest.mark.parametrize("name", ["chain", "residual"])
def test_without_biases_the_pixels_carry_the_whole_answer(name: str) -> None:
    """Nothing ends: the evidence of the pixels is the class's score, less its rivals'."""
    net, picture = build(name, 5, bias=False), image(5)
    for op in net.ops:
        if op.kind == "bn":
            op.module.weight.data.abs_()  # a negative scale asks for what nothing may supply
    scores = net(picture)[0].detach()
    for target in range(3):
        plain, share, _ = walked(net, picture, [target], contrast=False, focus=False)
        torch.testing.assert_close(plain.sum(), scores[target], rtol=1e-9, atol=1e-10)
        if scores[target] > 0:
            assert 0 < share.clamp(min=0).sum() <= 1 + 1e-12
        against, _, _ = walked(net, picture, [target], contrast=True, focus=False)
        weights = torch.tensor(rivals(scores.numpy(), target))
        torch.testing.assert_close(against.sum(), weights @ scores, rtol=1e-9, atol=1e-10)


@every_net
def test_few_nodes_bring_on_average_what_all_bring(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(20):  # some have no evidence at all
        net, picture = build(name, seed), image(seed)
        all_, _, _ = walked(net, picture, [0], focus=False)
        if bool((all_ != 0).any()):
            break
    dither, found = halftone._dither, []
    for pattern in range(300):
        monkeypatch.setattr(halftone, "_dither", lambda seed, p=pattern: dither(1000 * p + seed))
        found.append(walked(net, picture, [0], focus=False, nodes=10)[0].flatten())
    # Single pixels may be met too rarely to tell; sums of all with random signs are not.
    signs = torch.randn(all_.numel(), 5, generator=torch.Generator().manual_seed(0)).sign().double()
    several = torch.stack(found) @ signs
    error = several.std(0) / len(found) ** 0.5
    assert float(error.min()) > 0
    assert bool(((several.mean(0) - all_.flatten() @ signs).abs() <= 4 * error).all())


@pytest.mark.parametrize(
    "parameters", [{}, {"contrast": False}, {"focus": False}], ids=lambda p: "".join(p) or "default"
)
@every_net
def test_classes_that_walk_as_a_stack_get_what_each_gets_alone(
    name: str, parameters: dict[str, object]
) -> None:
    net, picture = build(name, 5), image(5)
    tape = record(net, [picture])
    way, pixels = plan(tape, tape.output), tape.inputs[0]
    assert way.stacks
    targets = [torch.tensor([target]) for target in range(tape.output.shape[1])]
    for walked_, target in zip(
        Evidence(**parameters).walk_each(way, targets), targets, strict=True
    ):
        alone, share, _ = walked(net, picture, target.tolist(), **parameters)
        torch.testing.assert_close(walked_.strength[pixels], alone, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(walked_.share[pixels], share, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("nodes", [6, 500])
@every_net
def test_each_image_of_a_batch_with_few_nodes_gets_what_it_gets_alone(
    name: str, nodes: int
) -> None:
    net, pictures = build(name, 5), image(5, batch=3)
    together, _, _ = walked(net, pictures, [0, 1, 2], nodes=nodes)
    for i in range(3):
        alone, _, _ = walked(net, pictures[i : i + 1], [i], nodes=nodes)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["chain", "residual", "dense", "gated", "forked"])
def test_few_nodes_are_the_same_wherever_activations_lie(name: str) -> None:
    net, pictures = build(name, 5), image(5, batch=2)
    expected, _, _ = walked(net, pictures, [0, 1], nodes=6)
    pictures = pictures.to(memory_format=torch.channels_last)
    found, _, _ = walked(net.to(memory_format=torch.channels_last), pictures, [0, 1], nodes=6)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@every_net
def test_paths_of_few_nodes_lead_from_the_class_to_the_pixels(name: str) -> None:
    explanation = hysm.explain(build(name, 2), image(2), target=0, nodes=12)
    for path in explanation.path(0, range(min(5, len(explanation.points[0])))):
        assert path.nodes[0].call != "input"
        assert path.nodes[-1].call == "input"
        assert all(node.share > 0 for node in path.nodes[1:])


@pytest.mark.parametrize("nodes", [None, 1_000_000])
def test_a_part_without_elements_changes_nothing(nodes: int | None) -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = build("chain", 1)

        def forward(self, x: Tensor) -> Tensor:
            none, rest = x.split([0, 2], 1)
            return self.chain(torch.cat([none.relu() + none, rest], 1))

    found, _, _ = walked(Split().eval(), image(1), [0], nodes=nodes)
    expected, _, _ = walked(build("chain", 1), image(1), [0])
    assert float(expected.abs().max()) > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def test_contrast_asks_another_question() -> None:
    """What speaks for both of two classes alike is no evidence for one of them."""
    net = build("chain", 6)
    head = net.ops[-1].module
    head.weight.data[1:] = head.weight.data[:1]
    head.bias.data.zero_()
    picture = image(6)
    alone, _, _ = walked(net, picture, [0], contrast=False, focus=False)
    against, _, _ = walked(net, picture, [0], contrast=True, focus=False)
    assert alone.abs().max() > 1e-3
    assert against.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("parameters", "named"),
    [({"nodes": 0}, "nodes=0"), ({"nodes": -1}, "nodes=-1"), ({"k": 3}, "k")],
)
def test_wrong_parameters_are_named(parameters: dict[str, object], named: str) -> None:
    with pytest.raises(hysm.InputError, match=named):
        get_method("evidence", **parameters)


@pytest.mark.parametrize("spare", [False, True])
@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize(
    ("dtype", "of_z"),
    [
        *(
            (dtype, dtype)
            for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        ),
        *((torch.float64, torch.float32), (torch.float32, torch.float16)),
    ],
    ids=str,
)
def test_rates_are_e_by_z_above_the_least(
    dtype: torch.dtype, of_z: torch.dtype, kind: str, spare: bool
) -> None:
    z = torch.tensor([[1.0, 0.0, 2.0, 0.5, -3.0, 0.25]]).to(of_z)
    given = torch.tensor([[3.0, 1.0, -4.0, 2.0, 5.0, 0.0], [0.0, -2.0, 8.0, 1.0, 1.0, 1.0]]).to(
        dtype
    )
    least: float | Tensor = torch.finfo(dtype).tiny / torch.finfo(dtype).eps
    if kind == "tensor":
        least = (
            torch.full((1, 6), float(least), dtype=dtype)
            if dtype == of_z
            else z.new_tensor([[0.1]])
        )
    for asked in (given[:1], given):
        for made in (z, z.clamp(min=0.5)):  # some nodes that nothing excites, and none
            dead = made <= least
            expected = (asked / made.masked_fill(dead, torch.inf)).masked_fill(dead, 0)
            rates, ended = excitation._rates(asked.clone(), made.clone(), least, spare)
            torch.testing.assert_close(rates, expected, rtol=1e-6, atol=0, check_dtype=False)
            lost = torch.zeros_like(asked) if ended is None else ended
            torch.testing.assert_close(lost, asked * dead, rtol=0, atol=0)


class Cells(nn.Module):
    """A detector: each cell of its map says how sure it is of something there, seen through a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU()
        )
        self.head = nn.Conv2d(6, 2, 3, 1, 1)
        for item in self.parameters():
            item.data = item.data.abs() if item.dim() > 1 else torch.full_like(item, -0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).relu()


@pytest.mark.parametrize(
    ("ask", "focused"),
    [
        (lambda y: y[:, 1, 12, 6], False),
        (lambda y: y[:, 1, 12:14, 6:8].sum((1, 2)), False),
        (lambda y: y.mean((2, 3)), True),  # places that a ReLU has closed have a say
        (lambda y: y[:, 1].flatten(1).sum(1), True),
    ],
    ids=["a cell", "four cells", "classes", "all cells"],
)
def test_the_place_that_was_asked_for_is_no_place_to_focus_on(
    ask: Callable[[Tensor], Tensor], focused: bool
) -> None:
    """Where few cells answer, they tell which box it is, and not where in their sight the evidence lies."""
    net = Cells().eval()
    images = torch.rand(2, 3, 32, 32)
    images[:, :, :25] = 0  # most of the places see nothing
    if ask(net(images)).dim() == 2:
        kind: Any = nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        target: Any = 1
    else:
        kind, target = net, ask
    with_focus = hysm.explain(kind, images, target, contrast=False, likeness=False).evidence
    plain = hysm.explain(kind, images, target, contrast=False, likeness=False, focus=False).evidence
    assert plain.abs().sum() > 0
    assert torch.equal(with_focus, plain) == (not focused)


@pytest.mark.parametrize("side", [32, 64, 128])
def test_a_head_of_maxima_has_all_places_to_focus_on(side: int) -> None:
    """Each channel takes its highest place: few of them here, and any of them elsewhere."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
    net = nn.Sequential(body, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    image = torch.rand(1, 3, side, side)
    with_focus, plain = (
        hysm.explain(net, image, likeness=False, focus=focus).evidence for focus in (True, False)
    )
    assert not torch.equal(with_focus, plain)


class Losing(nn.Module):
    """Two classes, each excited by a colour of its own; the second by much more."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.ReLU())
        self.mix = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.ReLU())
        self.head = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.features[0].weight.copy_(torch.eye(2)[:, :, None, None])
            self.mix[0].weight.copy_(
                torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])[:, :, None, None]
            )
            self.head.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 3.0]]))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.features(x)).mean((2, 3)))


@pytest.mark.parametrize("nodes", [None, 50])
@pytest.mark.parametrize("batch", [1, 2])
def test_what_speaks_for_a_class_that_loses_is_seen(batch: int, nodes: int | None) -> None:
    """What speaks against it weighs so much less that a tenth of what speaks for it is left."""
    x = torch.zeros(batch, 2, 8, 8)
    x[:, 0, 2, 2] = 4.0
    x[:, 1, 5, 5] = 4.0
    method = Evidence(nodes=nodes, focus=False, likeness=False)
    explainer = Explainer(Losing(), method, together=batch)
    found = explainer(x, hysm.targets.versus(0, 1))
    assert all({(point.y, point.x) for point in points} == {(2, 2)} for points in found.points)
    # Of the map, 4 / 64 for and 7 * 4 / 64 against: at its place 4 of the first channel, 12 of the third; at the
    # other 4 of the second and 12 of the third.
    weight = 0.9 * 4 / 28
    expected = torch.zeros(8, 8)
    expected[2, 2] = (4 - weight * 12) / 64
    expected[5, 5] = -weight * 16 / 64
    for one in found.evidence:
        torch.testing.assert_close(one, expected, rtol=0.05 if nodes else 1e-6, atol=1e-6)
    # The other way round nothing is to be weighed.
    expected[2, 2], expected[5, 5] = (12 - 4) / 64, 16 / 64
    for one in explainer(x, hysm.targets.versus(1, 0)).evidence:
        torch.testing.assert_close(one, expected, rtol=0.05 if nodes else 1e-6, atol=1e-6)


@pytest.mark.parametrize("meet", [torch.sub, torch.maximum], ids=["sum", "maximum"])
def test_a_smaller_map_meets_a_constant(meet: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Asked is what made all as it is, and what the constant made ends there, as with a map as large."""

    class Compared(nn.Module):
        def __init__(self, spread: bool) -> None:
            super().__init__()
            self.spread, self.first, self.last = spread, nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3)
            self.register_buffer("centres", torch.linspace(-2, 2, 5))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).flatten(2).unsqueeze(3)
            x = x.expand(-1, -1, -1, 5) if self.spread else x
            return self.last(meet(x, self.centres)).mean((2, 3))

    torch.manual_seed(0)
    model, other = Compared(False).eval(), Compared(True).eval()
    other.load_state_dict(model.state_dict())
    picture = torch.randn(1, 2, 6, 6)
    found, want = (hysm.explain(net, picture, 1) for net in (model, other))
    assert want.evidence.abs().max() > 0
    torch.testing.assert_close(found.evidence, want.evidence)
    assert found.coverage == pytest.approx(want.coverage)
