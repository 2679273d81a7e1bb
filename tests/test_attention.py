"""Attention: its weights are frozen, the values carry the evidence, and nothing is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from ledger import account
from torch import Tensor, nn

import howyouseeme as hysm
from howyouseeme.backtrack import plan
from howyouseeme.tape import record

SIDE = 16


class Attention(nn.Module):
    """Self-attention over [batch, tokens, width], in the ways in which networks write it."""

    def __init__(self, width: int, heads: int, form: str, bias: Tensor | None = None) -> None:
        super().__init__()
        self.heads, self.form, self.bias = heads, form, bias
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mix = nn.Linear(heads, heads)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            part(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        if self.form == "fused":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        elif self.form == "linear":  # no softmax: every product is half each
            y = q.relu() @ (k.relu().transpose(-2, -1) @ v) / tokens
        else:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            weights = (scores if self.bias is None else scores + self.bias).softmax(-1)
            if self.form == "talking heads":
                weights = self.mix(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            y = (
                torch.einsum("bhij,bhjc->bhic", weights, v)
                if self.form == "einsum"
                else F.dropout(weights, 0.1, self.training) @ v
            )
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(self, attention: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.attention = attention
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class ViT(nn.Module):
    """Patches, a class token, positions, blocks of attention."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.places = nn.Parameter(torch.zeros(1, 17, 8))
        self.blocks = nn.Sequential(*(Block(Attention(8, 2, form)) for _ in range(2)))
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.blocks(x)[:, 0])


class Encoder(ViT):
    """PyTorch's own layer, which runs in one fused call unless it is recorded."""

    def __init__(self) -> None:
        super().__init__("fused")
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.1, "gelu", batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Windows(nn.Module):
    """Swin's block: attention within shifted windows, with a bias for relative positions."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift
        self.block = Block(Attention(8, 2, "plain", torch.randn(2, 16, 16)))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        x = x.roll((-self.shift, -self.shift), (1, 2))
        windows = x.view(batch, height // 4, 4, width // 4, 4, channels).permute(0, 1, 3, 2, 4, 5)
        y = self.block(windows.reshape(-1, 16, channels))
        y = y.view(batch, height // 4, width // 4, 4, 4, channels).permute(0, 1, 3, 2, 4, 5)
        return y.reshape(x.shape).roll((self.shift, self.shift), (1, 2))


class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.stages = nn.Sequential(Windows(0), Windows(2))
        self.merge = nn.Linear(32, 8, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.patches(x).permute(0, 2, 3, 1))
        corners = [x[:, i::2, j::2] for j in range(2) for i in range(2)]
        return self.head(self.merge(torch.cat(corners, -1)).mean((1, 2)))


class Hybrid(nn.Module):
    """CoAtNet: convolutions with squeeze-excite first, attention over what they made."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU())
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.down = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1, groups=8))
        self.block = Block(Attention(8, 2, "plain", torch.randn(2, 16, 16)))
        self.last = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.down(x * self.squeeze(x))
        tokens = self.block(x.flatten(2).transpose(1, 2))
        return self.head(F.relu(self.last(tokens.transpose(1, 2).view_as(x))).mean((2, 3)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{
        f"vit, {form}": lambda form=form: ViT(form)
        for form in ("plain", "fused", "einsum", "talking heads", "linear")
    },
    "encoder": Encoder,
    "swin": Swin,
    "hybrid": Hybrid,
}


def network(name: str) -> nn.Module:
    """In float64, with weights that are nowhere trivial."""
    torch.manual_seed(0)
    model = NETWORKS[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    for module in model.modules():
        if isinstance(module, Attention) and module.bias is not None:
            module.bias = module.bias.double()
    return model


def images(batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_lost(name: str) -> None:
    model, x = network(name), images()
    with torch.no_grad():
        answer = model(x)
    tape = record(model, [x])
    torch.testing.assert_close(tape.output.data, answer, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        way = plan(tape, tape.output)
        # PyTorch's own layer swaps the batch and the tokens on the way.
        assert way.separable(2) == (name != "encoder")
        for place in (0, 3, 7):
            ledger = account(way, torch.tensor([place]))
            assert ledger.total == pytest.approx(float(answer.reshape(-1)[place]), rel=1e-9)
            assert ledger.inputs != 0


# Where no softmax tells gate from signal, the greedy walk may stay with the class token's query,
# which no pixel made.
EXPLAINED = [
    (name, method)
    for name in NETWORKS
    for method in ("evidence", "seed", "exact")
    if (name, method) != ("vit, linear", "seed")
]


@pytest.mark.parametrize(("name", "method"), EXPLAINED)
def test_every_method_explains_it(name: str, method: str) -> None:
    parameters = {"outliers": False} if method == "seed" else {}
    explanation = hysm.explain(network(name), images(), method=method, **parameters)
    for points in explanation.points:
        assert len(points)
    path = explanation.path(0, [0])[0]
    assert path.nodes[-1].call == "input"
    assert path.nodes[0].channel == explanation.target[0]


@pytest.mark.parametrize("name", ["vit, plain", "vit, fused", "swin", "hybrid"])
def test_attention_itself_is_frozen(name: str) -> None:
    """No path goes through the queries and keys, which are what made the weights."""
    tape = record(network(name), [images()])
    with torch.no_grad():
        modules = {value.call.module.split(".")[-1] for value, _ in plan(tape, tape.output).steps}
    assert "v" in modules
    assert "out" in modules
    assert not modules & {"q", "k"}


class Spotlight(nn.Module):
    """Attends, of sixteen patches, to the brightest alone, and answers with what it finds there."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 4, stride=4).transpose(1, 2)  # [batch, 16, 48]
        bright = patches.mean(-1, keepdim=True)
        query = torch.full_like(bright[:, :1], 1e4)
        if self.fused:
            seen = F.scaled_dot_product_attention(query[:, None], bright[:, None], patches[:, None])
        else:
            seen = (query @ bright.transpose(1, 2)).softmax(-1) @ patches
        return seen.reshape(len(x), -1)[:, :2]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", ["evidence", "seed", "exact"])
def test_evidence_goes_where_attention_looks(fused: bool, method: str) -> None:
    x = torch.rand(2, 3, SIDE, SIDE)
    x[0, :, 8:12, 4:8] += 1
    x[1, :, 0:4, 12:16] += 1
    parameters = {"outliers": False} if method == "seed" else {}
    explanation = hysm.explain(Spotlight(fused).eval(), x, target=1, method=method, **parameters)
    for points, place in zip(explanation.points, [(8, 5), (0, 13)], strict=True):
        y, x_at, _ = points[0]
        assert (y, x_at) == place  # the second element of the brightest patch
    evidence = explanation.evidence.clone()
    evidence[0, 8:12, 4:8] = 0
    evidence[1, 0:4, 12:16] = 0
    assert not evidence.any()


def test_pytorchs_fused_layers_are_back_afterwards() -> None:
    assert torch.backends.mha.get_fastpath_enabled()
    tape = record(network("encoder"), [images()])
    assert torch.backends.mha.get_fastpath_enabled()
    assert "aten._transformer_encoder_layer_fwd" not in {call.name for call in tape.calls}

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not torch.backends.mha.get_fastpath_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        record(Fails().eval(), [images()])
    assert torch.backends.mha.get_fastpath_enabled()


class Recurrent(nn.Module):
    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 6, 3, 2)
        self.layer = layer(6, 5, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.conv(x).relu().transpose(1, 2))[0][:, -1])


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recurrent_layers_are_taken_apart(layer: type[nn.RNNBase], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Recurrent(layer).to(dtype).eval(), torch.randn(2, 2, 20, dtype=dtype)
    assert torch._C._get_mkldnn_enabled()
    tape = record(model, [x])
    assert torch._C._get_mkldnn_enabled()
    with torch.no_grad():
        answer = model(x)
        ledger = account(plan(tape, tape.output), torch.tensor([4]))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    assert ledger.total == pytest.approx(float(answer[1, 1]), rel=tolerance)
    assert ledger.inputs != 0
    assert len(hysm.explain(model, x, method="exact").points[0])


def test_a_recording_that_ends_first_leaves_the_other_alone() -> None:
    """Two threads record: the fused layers stay off until both are done."""
    inside, go_on = threading.Event(), threading.Event()
    seen: list[bool] = []

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inside.set()
            assert go_on.wait(30)
            seen.append(torch.backends.mha.get_fastpath_enabled())
            return x * 2

    thread = threading.Thread(target=lambda: record(Waits().eval(), [images()]))
    thread.start()
    assert inside.wait(30)
    record(network("vit, plain"), [images()])
    go_on.set()
    thread.join(30)
    assert seen == [False]
    assert torch.backends.mha.get_fastpath_enabled()
