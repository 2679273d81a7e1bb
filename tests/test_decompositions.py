"""Calls that the tape takes apart: they give what PyTorch gives, and their parts have rules."""
# ruff: noqa: E731 - a table of lambdas is what this is

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from networks import Made
from torch import Tensor, nn
from torchvision import ops

from howyouseeme import Explainer
from howyouseeme.backtrack import plan
from howyouseeme.decompositions import decompositions
from howyouseeme.tape import record

aten = torch.ops.aten


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7 * sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


A, B, V, C = numbers(3, 4), numbers(3, 4, seed=1), numbers(4), numbers(3)
STACK, OTHERS = numbers(2, 3, 4), numbers(2, 4, 3)
MAP = numbers(2, 8, 6, 7)
HOLES = torch.where(A > 1, torch.nan, A)
REGIONS = torch.tensor([[0, 0.3, 1.1, 4.7, 3.9], [1, -2, -1.5, 9, 7]]).double()
LSTM = nn.LSTM(4, 5, num_layers=2, bidirectional=True).double()
FIRST = nn.LSTM(4, 5, batch_first=True, bias=False)
PAIRED = nn.Bilinear(4, 4, 3).double()
CELL, GATED = nn.LSTMCell(4, 5).double(), nn.GRUCell(4, 5).double()


def deformed(
    groups: int, parts: int, stride: Any, padding: Any, dilation: int, kernel: tuple[int, int]
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    weight, bias = numbers(4, 8 // groups, *kernel), numbers(4)
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    (out,) = (torch.nn.functional.conv2d(MAP[:1, :1], numbers(1, 1, *kernel), **options).shape[2:],)
    offset, mask = (numbers(2, n * parts * kernel[0] * kernel[1], *out) for n in (2, 1))
    run = lambda x, offset, mask=None: ops.deform_conv2d(
        x, offset, weight, bias, mask=mask, **options
    )
    return run, (MAP, offset * 2, mask) if stride == 1 else (MAP, offset * 2)


CLASSES = torch.tensor([2, 0, 3])
SOME = torch.tensor([2, -100, 3])
MAPPED = torch.arange(2 * 6 * 7).reshape(2, 6, 7) % 8
CHANCES, HELD, SIGNS = numbers(3, 4, seed=2).sigmoid(), numbers(3, 4, seed=3).sigmoid(), B.sign()
WEIGHTS = numbers(4, seed=4).abs()


def losses() -> Iterator[tuple[str, str, Callable[..., Any], tuple[Tensor, ...]]]:
    """Each loss with all reductions, of the input against a constant, and of two inputs where it can be."""
    f = nn.functional
    of_two: list[tuple[str, str, Callable[..., Tensor], Tensor, Tensor]] = [
        ("mse_loss", "plain", f.mse_loss, A, B),
        (
            "mse_loss",
            "broadcast",
            lambda x, t, **k: aten.mse_loss(x, t[0], _NUMBER[k["reduction"]]),
            A,
            B,
        ),
        ("smooth_l1_loss", "plain", f.smooth_l1_loss, A, B),
        ("smooth_l1_loss", "beta", partial(f.smooth_l1_loss, beta=0.5), A, B),
        (
            "smooth_l1_loss",
            "beta 0",
            lambda x, t, **k: aten.smooth_l1_loss(x, t, _NUMBER[k["reduction"]], 0.0),
            A,
            B,
        ),
        ("huber_loss", "plain", f.huber_loss, A, B),
        ("huber_loss", "delta", partial(f.huber_loss, delta=0.5), A, B),
        ("binary_cross_entropy", "plain", f.binary_cross_entropy, CHANCES, HELD),
        (
            "binary_cross_entropy",
            "weights",
            partial(f.binary_cross_entropy, weight=WEIGHTS),
            CHANCES,
            HELD,
        ),
        ("binary_cross_entropy", "sure", f.binary_cross_entropy, CHANCES.round(), HELD.round()),
        ("binary_cross_entropy_with_logits", "plain", f.binary_cross_entropy_with_logits, A, HELD),
        (
            "binary_cross_entropy_with_logits",
            "sure",
            f.binary_cross_entropy_with_logits,
            30 * A,
            HELD.round(),
        ),
        (
            "binary_cross_entropy_with_logits",
            "weights",
            partial(f.binary_cross_entropy_with_logits, weight=WEIGHTS, pos_weight=V.abs()),
            A,
            HELD,
        ),
        ("soft_margin_loss", "plain", f.soft_margin_loss, A, SIGNS),
    ]
    of_classes: list[tuple[str, str, Callable[..., Tensor], Tensor, Tensor]] = [
        ("nll_loss_forward", "plain", f.cross_entropy, A, CLASSES),
        ("nll_loss_forward", "ignored", partial(f.nll_loss, weight=WEIGHTS), A, SOME),
        ("nll_loss_forward", "ignored 0", partial(f.cross_entropy, ignore_index=0), A, CLASSES),
        ("nll_loss_forward", "smooth", partial(f.cross_entropy, label_smoothing=0.1), A, SOME),
        (
            "nll_loss_forward",
            "smooth weights",
            partial(f.cross_entropy, weight=WEIGHTS, label_smoothing=0.1),
            A,
            SOME,
        ),
        ("nll_loss_forward", "one row", partial(f.cross_entropy, weight=WEIGHTS), V, CLASSES[0]),
        ("nll_loss2d_forward", "plain", f.cross_entropy, MAP, MAPPED),
        (
            "nll_loss2d_forward",
            "weights",
            partial(f.cross_entropy, weight=WEIGHTS.repeat(2), ignore_index=3),
            MAP,
            MAPPED,
        ),
        ("nll_loss2d_forward", "line", f.cross_entropy, MAP.flatten(2), MAPPED.flatten(1)),
        ("multi_margin_loss", "plain", f.multi_margin_loss, A, CLASSES),
        (
            "multi_margin_loss",
            "squares",
            partial(f.multi_margin_loss, p=2, margin=0.5, weight=WEIGHTS),
            A,
            CLASSES,
        ),
        ("multi_margin_loss", "one row", f.multi_margin_loss, V, CLASSES[0]),
    ]
    for reduction in _NUMBER:
        for name, how, loss, x, target in of_two + of_classes:
            against = lambda x, loss=loss, t=target, r=reduction: loss(x, t, reduction=r)
            yield f"aten.{name}", f"{how}, {reduction}", against, (x,)
        for name, how, loss, x, target in of_two:
            both = lambda x, t, loss=loss, r=reduction: loss(x, t, reduction=r)
            yield f"aten.{name}", f"both, {how}, {reduction}", both, (x, target)


_NUMBER = {"none": 0, "mean": 1, "sum": 2}

BAGS, STARTS = torch.tensor([[2, 0], [2, 1]]), torch.tensor([0, 0, 2, 4])


def bagged(
    table: Tensor, weights: Tensor | None = None, mode: str = "sum", **options: Any
) -> Tensor:
    """Bags of rows of a table, one of them empty."""
    if weights is not None:
        options["per_sample_weights"] = weights[BAGS.flatten()]
    return nn.functional.embedding_bag(BAGS.flatten(), table, STARTS, mode=mode, **options)


CASES: list[tuple[str, str, Callable[..., Any], tuple[Tensor, ...]]] = [
    ("aten.mv", "matrix", lambda a: a @ V, (A,)),
    ("aten.mv", "vector", lambda v: A @ v, (V,)),
    ("aten.mv", "both", lambda a, v: a @ v, (A, V)),
    ("aten.dot", "one", lambda v: v @ B[0], (V,)),
    ("aten.dot", "both", lambda v, w: v @ w, (V, B[0])),
    ("aten.vdot", "both", torch.vdot, (V, B[0])),
    ("aten.addmv", "plain", lambda a: torch.addmv(C, a, V), (A,)),
    ("aten.addmv", "factors", lambda c, v: torch.addmv(c, A, v, beta=0.5, alpha=-2), (C, V)),
    ("aten.addmv", "in place", lambda c, v: (c * 1).addmv_(A, v), (C, V)),
    ("aten.addmv", "beta 0", lambda v: torch.addmv(C * torch.nan, A, v, beta=0), (V,)),
    ("aten.addr", "plain", lambda v, c: torch.addr(A, c, v), (V, C)),
    ("aten.addr", "factors", lambda v: torch.addr(A, C, v, beta=2, alpha=3), (V,)),
    ("aten.addbmm", "plain", lambda a, b: torch.addbmm(A[:, :3], a, b), (STACK, OTHERS)),
    (
        "aten.addbmm",
        "out",
        lambda a: torch.addbmm(A, a, STACK, out=A.new_empty(0)),
        (numbers(2, 3, 3),),
    ),
    ("aten._trilinear", "both", PAIRED, (A, B)),
    ("aten._trilinear", "one", lambda a: PAIRED(a, B), (A,)),
    ("aten.linalg_cross", "both", lambda a, b: torch.linalg.cross(a, b, dim=0), (A, B)),
    ("aten.linalg_cross", "constant", lambda a: torch.cross(B[:, :1], a, dim=0), (A,)),
    *[
        ("aten._embedding_bag_forward_only", mode, partial(bagged, mode=mode, **options), (A,))
        for mode in ("sum", "mean", "max")
        for options in ({}, {"padding_idx": 1}, {"include_last_offset": True})
    ],
    ("aten._embedding_bag_forward_only", "weighted", partial(bagged, weights=C), (A,)),
    (
        "aten._embedding_bag",
        "weights",
        lambda w: nn.functional.embedding_bag(
            BAGS, PAIRED.weight[0], per_sample_weights=w, mode="sum"
        ),
        (numbers(2, 2),),
    ),
    ("aten._cdist_forward", "2", lambda a: torch.cdist(a, B), (A,)),
    (
        "aten._cdist_forward",
        "both",
        lambda a, b: torch.cdist(a, b, p=1.0),
        (STACK, STACK.flip(1) * 2),
    ),
    ("aten._euclidean_dist", "many", lambda a: torch.cdist(a, numbers(30, 4)), (numbers(40, 4),)),
    ("aten.norm", "distance", lambda a: nn.functional.pairwise_distance(a, B), (A,)),
    ("aten.norm", "all", lambda a: aten.norm.Scalar(a, 3), (A,)),
    ("aten.norm", "axis", lambda a: aten.norm.ScalarOpt_dim(a, None, [1], True), (A,)),
    ("aten.norm", "no axis", lambda a: aten.norm.ScalarOpt_dim(a, 2, []), (A,)),
    (
        "aten._euclidean_dist",
        "very many",
        lambda a: torch.cdist(a, numbers(999, 40)),
        (numbers(998, 40),),
    ),
    ("aten.logaddexp", "a number", lambda a: torch.logaddexp(a, C[0]), (A.float(),)),
    ("aten.logaddexp", "both", torch.logaddexp, (A, B)),
    ("aten.logaddexp", "broadcast", lambda a: torch.logaddexp(a, V), (A,)),
    ("aten.hypot", "both", torch.hypot, (A, B)),
    (
        "aten.xlogy",
        "both",
        lambda a, b: torch.xlogy(a.relu(), b.relu()),
        (A, B.abs() - (A <= 0) * 9),
    ),
    ("aten.xlogy", "of a number", lambda a: torch.xlogy(a, 2.5), (A,)),
    ("aten.xlogy", "times a number", lambda a: torch.xlogy(2, a), (CHANCES,)),
    ("aten.index_fill", "number", lambda a: a.index_fill(-1, torch.tensor([2, 0]), 3.0), (A,)),
    ("aten.index_fill", "tensor", lambda a: a.index_fill(0, torch.tensor([1]), C[0]), (A,)),
    ("aten.index_fill", "in place", lambda a: (a * 1).index_fill_(0, torch.tensor(1), 2), (A,)),
    ("aten.nansum", "all", lambda a: torch.where(HOLES.isnan(), HOLES, a).nansum(), (A,)),
    ("aten.nansum", "axis", lambda a: torch.where(HOLES.isnan(), HOLES, a).nansum(1, True), (A,)),
    ("aten.trace", "wide", torch.trace, (A,)),
    ("aten.aminmax", "all", lambda a: torch.stack(a.aminmax()), (A,)),
    ("aten.aminmax", "axis", lambda a: torch.stack(a.aminmax(dim=1, keepdim=True)), (A,)),
    ("torchvision.deform_conv2d", "masked", *deformed(1, 1, 1, 1, 1, (3, 3))),
    ("torchvision.deform_conv2d", "parts", *deformed(2, 4, 2, 2, 1, (3, 2))),
    ("torchvision.deform_conv2d", "both", *deformed(4, 2, (1, 2), (0, 1), 2, (2, 3))),
    ("torchvision.ps_roi_align", "2", lambda x: ops.ps_roi_align(x, REGIONS, 2, 0.7, 2), (MAP,)),
    (
        "torchvision.ps_roi_align",
        "any",
        lambda x: ops.ps_roi_align(x, REGIONS, (4, 1), 1.0),
        (MAP,),
    ),
    ("aten.pixel_unshuffle", "2", lambda x: nn.functional.pixel_unshuffle(x, 2), (MAP[..., :6],)),
    (
        "aten.pixel_unshuffle",
        "one",
        lambda x: nn.functional.pixel_unshuffle(x, 3),
        (MAP[0, ..., :6],),
    ),
    ("aten.mkldnn_rnn_layer", "first", lambda x: FIRST(x)[0], (STACK.float(),)),
    ("aten.mkldnn_rnn_layer", "both ways", lambda x: LSTM.float()(x)[0], (STACK.float(),)),
    ("aten.mkldnn_rnn_layer", "states", lambda x: torch.cat(LSTM.float()(x)[1]), (STACK.float(),)),
    *losses(),
]


@pytest.mark.parametrize(("name", "run", "inputs"), [(n, r, i) for n, _, r, i in CASES])
def test_parts_make_what_the_call_makes(
    name: str, run: Callable[..., Any], inputs: tuple[Tensor, ...]
) -> None:
    with torch.no_grad():
        want = run(*inputs)
    tape = record(Made(run), inputs)
    assert name not in {call.name for call in tape.calls}
    single = want.dtype == torch.float32
    torch.testing.assert_close(
        tape.output.data, want, **({} if single else {"rtol": 1e-9, "atol": 1e-12})
    )
    # What is walked back, and the biases on the way, add up to the output again.
    walk = plan(tape, tape.output)
    for value, step in walk.steps:
        total = step.bias_like(value.data)
        for source, link in step.links:
            total = total + link.forward(source.data)
        torch.testing.assert_close(total, value.data, equal_nan=True)
    assert set(walk.inputs) == set(tape.inputs[: 1 if "deform" in name else None])


def test_cells_of_a_gpu() -> None:
    """Calls that PyTorch makes on a GPU alone, against the layers that make them."""
    x, h, c = numbers(3, 4), numbers(3, 5), numbers(3, 5, seed=1)
    for cell, name, state in [
        (CELL, "aten._thnn_fused_lstm_cell", (h, c)),
        (GATED, "aten._thnn_fused_gru_cell", h),
    ]:
        halves = x @ cell.weight_ih.mT, h @ cell.weight_hh.mT
        parts = decompositions()[name]
        made = parts(*halves, c if cell is CELL else h, cell.bias_ih, cell.bias_hh)
        want = cell(x, state)
        for one, other in zip(made, want if cell is CELL else [want], strict=False):
            torch.testing.assert_close(one, other)
        bare = parts(halves[0] + cell.bias_ih, halves[1] + cell.bias_hh, c if cell is CELL else h)
        torch.testing.assert_close(bare[0], made[0])


def test_every_call_that_is_taken_apart_has_a_case() -> None:
    on_a_gpu = {"aten._thnn_fused_lstm_cell", "aten._thnn_fused_gru_cell"}
    assert set(decompositions()) == {name for name, *_ in CASES} | on_a_gpu


def test_what_cannot_be_taken_apart_stays_whole() -> None:
    tape = record(
        Made(lambda a: aten._trilinear(a, B, B, [], [], [], [1])), [A]
    )  # no nn.Bilinear makes this
    assert [call.name for call in tape.calls] == ["aten._trilinear"]


def test_constants_are_left_alone() -> None:
    tape = record(Made(lambda a: a + torch.addmv(C, B, V)[0]), [A])
    assert [call.name for call in tape.calls] == ["aten.add"]


def test_an_lstm_is_walked_back_through_time() -> None:
    """What it says after the eighth column of a picture is due to the columns up to there."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Conv2d(1, 6, 3, padding=1)
            self.lstm = nn.LSTM(6, 8, batch_first=True)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            columns = self.features(x).relu().amax(2).mT
            return self.head(self.lstm(columns)[0][:, 7])

    torch.manual_seed(3)
    model, picture = Reader().eval(), torch.rand(1, 1, 12, 20)
    explanation = Explainer(model)(picture)[0]
    assert explanation.target[0] == int(model(picture).argmax())
    by_column = torch.as_tensor(explanation.evidence).abs().reshape(12, 20).sum(0)
    assert not by_column[9:].any()  # the kernel reaches one column further
    assert (by_column[:9] > 0).sum() >= 3


def test_the_package_needs_no_torchvision() -> None:
    """It is none of its dependencies, though some of its calls are taken apart."""
    program = (
        "import sys; sys.modules['torchvision'] = None; import howyouseeme as hysm; "
        "print(hysm.explain('efficientnet-lite0', hysm.sample_photo('cat')).label[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "cat" in done.stdout


TRUE = torch.tensor([[0.0, 1, 0, 1]])
EXPRESSIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "cross_entropy": (
        lambda o: nn.functional.cross_entropy(o, torch.tensor([1]), reduction="none"),
        lambda o: -o.log_softmax(1)[:, 1],
    ),
    "mse_loss": (
        lambda o: nn.functional.mse_loss(o, TRUE, reduction="none").mean(1),
        lambda o: ((o - TRUE) ** 2).mean(1),
    ),
    "smooth_l1_loss": (
        lambda o: nn.functional.smooth_l1_loss(o, TRUE, reduction="none").sum(1),
        lambda o: torch.where(
            (o - TRUE).abs() < 1, (o - TRUE).abs() ** 2 / 2, (o - TRUE).abs() - 0.5
        ).sum(1),
    ),
    "huber_loss": (
        lambda o: nn.functional.huber_loss(o, TRUE, delta=0.2),
        lambda o: torch.where(
            (o - TRUE).abs() <= 0.2, (o - TRUE).abs() ** 2 / 2, 0.2 * (o - TRUE).abs() - 0.02
        ).mean(),
    ),
    "binary_cross_entropy": (
        lambda o: nn.functional.binary_cross_entropy(o.sigmoid(), TRUE),
        lambda o: -torch.where(TRUE > 0, o.sigmoid().log(), (-o.sigmoid()).log1p()).mean(),
    ),
    "binary_cross_entropy_with_logits": (
        lambda o: nn.functional.binary_cross_entropy_with_logits(o, TRUE),
        lambda o: -nn.functional.logsigmoid(torch.where(TRUE > 0, o, -o)).mean(),
    ),
    "soft_margin_loss": (
        lambda o: nn.functional.soft_margin_loss(o, 2 * TRUE - 1),
        lambda o: nn.functional.softplus(o * (1 - 2 * TRUE)).mean(),
    ),
    "multi_margin_loss": (
        lambda o: nn.functional.multi_margin_loss(o, torch.tensor([2]), p=2),
        lambda o: ((o[:, [0, 1, 3]] - o[:, 2:3] + 1).relu() ** 2).sum() / 4,
    ),
}


@pytest.mark.parametrize("method", ["evidence", "exact"])
@pytest.mark.parametrize("loss", EXPRESSIONS)
def test_a_loss_is_explained_as_the_expression_that_defines_it(loss: str, method: str) -> None:
    torch.manual_seed(4)
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4)),
    ).eval()
    explainer, pictures = Explainer(model, method), torch.rand(1, 3, 8, 8)
    mine, written = (explainer(pictures, target).evidence for target in EXPRESSIONS[loss])
    assert mine.abs().sum() > 0
    torch.testing.assert_close(mine, written, rtol=1e-4, atol=1e-6 * float(written.abs().max()))


def test_the_error_of_an_autoencoder_is_explained() -> None:
    """Of each picture in a batch, as the mean of the squares."""

    class Judge(nn.Module):
        def __init__(self, *, written: bool) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.written = written
            self.down, self.up = nn.Conv2d(1, 3, 2, 2), nn.ConvTranspose2d(3, 1, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            made = self.up(self.down(x).relu())
            if self.written:
                return ((made - x) ** 2).mean((1, 2, 3))
            return nn.functional.mse_loss(made, x, reduction="none").mean((1, 2, 3))

    pictures = torch.rand(2, 1, 6, 6)
    mine, written = (Explainer(Judge(written=one).eval())(pictures) for one in (False, True))
    assert (mine.evidence != 0).any()
    torch.testing.assert_close(mine.evidence, written.evidence)
    assert mine.probability == written.probability
