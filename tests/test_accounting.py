"""Nothing is lost: all paths and all biases add up to the answer of the network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from howyouseeme.backtrack import Plan, multipliers, plan
from howyouseeme.methods import get_method
from howyouseeme.tape import Call, Tape, Value, record

SIDE = 12


class Residual(nn.Module):
    """Residual blocks as ResNet has them, with in-place activations and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6))
        self.body = nn.Sequential(
            nn.Conv2d(6, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 1)
        )
        self.project = nn.Conv2d(6, 8, 1)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.stem(x))
        out = self.body(x)
        out += self.project(x)
        x = self.pool(F.relu(out, inplace=True))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Dense(nn.Module):
    """Every layer sees all before it, as DenseNet has it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(3 + 4 * i),
                nn.ReLU(inplace=True),
                nn.Conv2d(3 + 4 * i, 4, 3, padding=1),
            )
            for i in range(3)
        )
        self.transition = nn.Sequential(nn.Conv2d(15, 6, 1), nn.AvgPool2d(3, 2, 1, ceil_mode=True))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [x * 1]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(self.transition(torch.cat(features, 1)).mean((2, 3)))


class Inception(nn.Module):
    """Four branches side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 1)
        self.three = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 3, padding=1))
        self.tall = nn.Conv2d(3, 4, (5, 1), padding=(2, 0))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), nn.Conv2d(3, 2, 1))
        self.head = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - 0.4) / 0.2
        parts = [self.one(x), self.three(x), self.tall(x), self.pooled(x)]
        x = F.avg_pool2d(F.relu(torch.cat(parts, 1)), 3, 2, count_include_pad=False, padding=1)
        return self.head(x.amax((2, 3)))


class Inverted(nn.Module):
    """Depthwise convolutions and ReLU6, as MobileNet v2 has them, and channel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.depth = nn.Sequential(
            nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)
        )
        self.mix = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2), nn.ChannelShuffle(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depth(self.expand(x))
        left, right = self.mix(x).chunk(2, 1)
        return self.head((torch.cat([right, left], 1) + x).mean([2, 3]))


class Squeeze(nn.Module):
    """Squeeze-excite with SiLU, then hardswish with a hard gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU())
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 3, 1), nn.SiLU(), nn.Conv2d(3, 8, 1), nn.Sigmoid()
        )
        self.next = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.Hardswish(inplace=True))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x * self.gate(x)
        x = self.next(x)
        x = x * (F.relu6(x + 3) / 6)  # a gate of the same size
        return self.head(F.gelu(x).mean((2, 3)))


class Upscaling(nn.Module):
    """Down, up again in four ways, and across: a small U-net."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.LeakyReLU(0.1, inplace=True))
        self.up = nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1)
        self.shuffle = nn.Sequential(nn.Conv2d(6, 8, 1), nn.PixelShuffle(2))
        self.last = nn.Conv2d(6 + 4 + 2 + 6, 5, 3, padding=1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        low = self.down(x)
        smooth = F.interpolate(low, scale_factor=2, mode="bilinear")
        blocks = F.interpolate(low, size=x.shape[-2:], mode="nearest")
        high = self.last(torch.cat([smooth, self.up(low), self.shuffle(low), blocks], 1))
        return high.flatten(2).amax(2)


class Mixed(nn.Module):
    """Group, instance, layer and batch norm, with PReLU between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1),
            nn.GroupNorm(3, 6),
            nn.PReLU(6),
            nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"),
            nn.InstanceNorm2d(4, affine=True),
            nn.ELU(),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.PReLU(),
        )
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x).permute(0, 2, 3, 1)
        x = x + self.mlp(self.norm(x))
        return self.head(x.mean((1, 2)))


class InPlace(nn.Module):
    """A network that writes wherever it can, its input and a buffer included."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.register_buffer("canvas", torch.zeros(1))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).mul_(2)
        y = self.conv(x)
        first, second = y[:, :3], y[:, 3:]
        second.relu_()
        first += second
        canvas = x.new_zeros(len(x), 6, SIDE + 2, SIDE)
        canvas[:, ::2, 1:-1] = first
        canvas[:, 1::2, 1:-1] = -second
        canvas[:, 0].clamp_(-1, 1)
        canvas[canvas > 1.5] = 1.5
        self.canvas.add_(1)
        return self.head(canvas.sum((2, 3)) * self.canvas)


class Standardised(nn.Conv2d):
    """Weight standardisation: the kernel is computed, and the same for every image."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        return F.conv2d(x, (self.weight - mean) / (var + 1e-5).sqrt(), self.bias, 1, 1)


class Modern(nn.Module):
    """NFNet's and ConvNeXt V2's parts: standardised weights, global response norm, blur pooling,
    space to depth, gated linear units, local response norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Standardised(12, 8, 3)
        self.gamma, self.beta = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.register_buffer(
            "blur", torch.tensor([1.0, 2, 1]).outer(torch.tensor([1.0, 2, 1])) / 16
        )
        self.gated = nn.Conv2d(8, 12, 1)
        self.norm = nn.LocalResponseNorm(3, alpha=0.3)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(F.pixel_unshuffle(F.interpolate(x, 24, mode="bicubic"), 2))
        x = F.gelu(x).permute(0, 2, 3, 1)
        size = x.norm(p=2, dim=(1, 2), keepdim=True)
        response = size / (size.mean(-1, keepdim=True) + 1e-6)
        x = x + torch.addcmul(self.beta, self.gamma, x * response)
        x = F.pad(x.permute(0, 3, 1, 2), (1, 1, 1, 1), mode="reflect")
        x = F.conv2d(x, self.blur.expand(8, 1, 3, 3), stride=2, groups=8)
        return self.head(self.norm(F.glu(self.gated(x), 1)).mean((2, 3)))


class Split(nn.Module):
    """ResNeSt's split attention: a softmax over the groups of channels is the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.split = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, groups=1), nn.BatchNorm2d(8), nn.ReLU())
        self.attend = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.split(x)
        halves = x.view(len(x), 2, 4, *x.shape[2:])
        weights = self.attend(F.adaptive_avg_pool2d(halves.sum(1), 1))
        weights = (
            weights.view(len(x), 1, 2, -1).transpose(1, 2).softmax(1).reshape(len(x), -1, 1, 1)
        )
        gated = (halves * weights.view(len(x), 2, 4, 1, 1)).sum(1)
        return self.head(gated.mean((2, 3)))


class Statistics(nn.Module):
    """Means, deviations, norms and log-sums as features, as audio and weakly supervised nets use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2))
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2)
        parts = [
            x.mean(2),
            x.std(2),
            x.norm(dim=2),
            x.logsumexp(2),
            x.topk(3).values.cumsum(2)[..., 2],
        ]
        return self.head(torch.cat(parts, 1))


class Gathered(nn.Module):
    """What is sampled between places, pooled at random, pooled over regions of no fixed shape, and solved."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.pool = nn.FractionalMaxPool2d(2, 8, _random_samples=torch.rand(2, 6, 2))
        self.register_buffer("at", torch.rand(1, 8, 8, 2) * 2.4 - 1.2)
        self.register_buffer("region", torch.randint(5, (64,)))
        self.register_buffer("mixed", torch.randn(6, 6) + 3 * torch.eye(6))
        self.head = nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.pool._random_samples = self.pool._random_samples[: len(x)].to(x)
        x = self.pool(self.conv(x))
        x = F.grid_sample(x, self.at.expand(len(x), -1, -1, -1), "bicubic", align_corners=False)
        x = torch.linalg.solve(self.mixed, x.flatten(2))
        to, none = self.region.expand_as(x), x.new_zeros(*x.shape[:2], 6)
        parts = [
            none.scatter_reduce(2, to, x, "mean", include_self=False),
            none.scatter_reduce(2, to, x, "amax"),
            none.index_reduce(2, self.region, x.sigmoid(), "prod"),
        ]
        x = torch.linalg.cross(*(part.unflatten(1, (2, 3)) for part in parts[:2]), dim=2)
        return self.head((x.flatten(1, 2).diagonal_scatter(parts[2][..., 0], 0, 1, 2)).flatten(1))


class Across(nn.Module):
    """Response norm as it was, a buffer that grows and is filled piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.CrossMapLRN2d(3, alpha=0.3)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


class Masked(nn.Module):
    """Masks of minus infinity and of NaN, which count for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.register_buffer("seen", torch.eye(10) > 0)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        hidden = x.masked_fill(self.seen, -torch.inf)
        holes = torch.where(x > 0, x, torch.nan).nan_to_num(0.25)
        parts = [hidden.softmax(3)[..., 0], hidden.sigmoid(), hidden.exp(), holes]
        return self.head(torch.cat([part.flatten(2).mean(2) for part in parts], 1))


def fully_connected() -> nn.Module:
    """VGG's head: flatten, wide layers, dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(4 * 25, 12),
        nn.ReLU(inplace=True),
        nn.Dropout(inplace=True),
        nn.Linear(12, 5),
    )


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, dilation=2),
        nn.Tanh(),
        nn.AvgPool2d(2, 2, divisor_override=3),
        nn.Conv2d(6, 5, 2),
        nn.Sigmoid(),
        nn.Softplus(),
        nn.Flatten(),
    )


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """As the explainer walks: links hold the model's parameters, which would record a graph."""
    with torch.no_grad():
        yield


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "residual": Residual,
    "dense": Dense,
    "inception": Inception,
    "depthwise": Inverted,
    "squeeze-excite": Squeeze,
    "fully connected": fully_connected,
    "norms": Mixed,
    "upscaling": Upscaling,
    "in place": InPlace,
    "modern": Modern,
    "split attention": Split,
    "statistics": Statistics,
    "gathered": Gathered,
    "across channels": Across,
}


def network(make: Callable[[], nn.Module]) -> nn.Module:
    """The network in float64, with statistics and scales that are nowhere trivial."""
    torch.manual_seed(0)
    model = make().double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
                module.weight.normal_()  # of both signs
                module.bias.normal_()
    return model


def images(samples: int = 2) -> Tensor:
    return torch.rand(samples, 3, SIDE, SIDE, dtype=torch.float64)


def seed_at(value: Value, *places: int) -> Tensor:
    """The multiplier of a target: 1 at some elements of the output, 0 elsewhere."""
    seed = torch.zeros(value.numel, dtype=torch.float64)
    seed[list(places)] = 1
    return seed.reshape(value.shape)


def account(tape: Tape, walk: Plan, seed: Tensor) -> tuple[Tensor, dict[Call, Tensor]]:
    """The evidence at the input, element by element, and that of each call's bias."""
    biases: dict[Call, Tensor] = {}
    arrived = dict(
        multipliers(walk, seed, on_bias=lambda call, share: biases.update({call: share}))
    )
    (x,) = tape.inputs
    return arrived[x] * x.data, biases


@pytest.mark.parametrize("name", NETWORKS)
def test_all_paths_and_biases_add_up_to_the_answer(name: str) -> None:
    model = network(NETWORKS[name])
    tape = record(model, [images()])
    walk = plan(tape, tape.output)
    for place in (0, 3, 7, 9):
        evidence, biases = account(tape, walk, seed_at(tape.output, place))
        logit = float(tape.output.flat[place])
        total = float(evidence.sum() + sum(share.sum() for share in biases.values()))
        assert total == pytest.approx(logit, rel=1e-9)
        assert evidence.any()


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"norms"}))
def test_samples_account_for_themselves(name: str) -> None:
    """In a batch, each answer has its own evidence - except where batch norm mixes the samples."""
    model = network(NETWORKS[name])
    tape = record(model, [images()])
    walk = plan(tape, tape.output)
    classes = tape.output.shape[1]
    evidence, biases = account(tape, walk, seed_at(tape.output, 2, classes + 1))
    for sample, place in enumerate((2, classes + 1)):
        total = evidence[sample].sum() + sum(share[sample].sum() for share in biases.values())
        assert float(total) == pytest.approx(float(tape.output.flat[place]), rel=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_depth_accounts_for_the_answer(name: str) -> None:
    """Cut the walk anywhere: what has arrived, and the biases on the way there, are the answer."""
    model = network(NETWORKS[name])
    tape = record(model, [images(1)])
    walk = plan(tape, tape.output)
    waiting = {walk.start: seed_at(walk.start, 1)}
    gone = 0.0
    logit = float(tape.output.flat[1])
    for value, step in walk.steps:
        multiplier = waiting.pop(value)
        gone += float((multiplier * step.bias_like(value.data)).sum())
        for source, link in step.links:
            back = link.transposed().forward(multiplier)
            waiting[source] = waiting.get(source, 0) + back
        at_cut = sum(float((m * v.data).sum()) for v, m in waiting.items())
        assert at_cut + gone == pytest.approx(logit, rel=1e-9)
    assert set(waiting) == set(tape.inputs)


def test_each_bias_is_told_once_and_by_its_module() -> None:
    model = network(Residual)
    tape = record(model, [images()])
    walk = plan(tape, tape.output)
    told: list[tuple[str, tuple[int, ...]]] = []
    seed = seed_at(tape.output, 0)
    for _ in multipliers(
        walk, seed, on_bias=lambda call, share: told.append((call.module, tuple(share.shape)))
    ):
        pass
    counts = Counter(module for module, _ in told if module)
    assert counts["head"] == counts["stem.1"] == counts["project"] == counts["body.0"] == 1
    assert "stem.0" not in counts  # it has no bias
    assert dict(told)["head"] == (2, 5)


def test_what_a_mask_hid_counts_for_nothing() -> None:
    model = network(Masked)
    tape = record(model, [images(1)])
    walk = plan(tape, tape.output)
    for place in range(5):
        evidence, biases = account(tape, walk, seed_at(tape.output, place))
        total = float(evidence.sum() + sum(share.sum() for share in biases.values()))
        assert total == pytest.approx(float(tape.output.flat[place]), rel=1e-9)
        walked = get_method("exact").walk(walk, torch.tensor([place]))
        (share,) = walked.share.values()
        assert share.any()


# -- path by path ---------------------------------------------------------------------------------


class Tiny(nn.Module):
    """Small enough to walk every single path: convolution, norm, pooling, a skip and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.skip = nn.Conv2d(2, 2, 1, groups=2)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        x = F.relu(x) - self.skip(x) * torch.sigmoid(x.mean((2, 3), keepdim=True))
        x = F.max_pool2d(x, 2, padding=1)
        x = torch.cat([x, F.avg_pool2d(x, 2)[:, :1].expand(-1, 2, *x.shape[2:])], 3)
        return self.head(x.mean((2, 3)))


def paths(
    walk: Plan, value: Value, node: int, weight: float, biases: list[float]
) -> Iterator[tuple[int, float]]:
    """Every path from a node to the input, as (pixel, product of the weights), one edge at a time."""
    step = walk.step(value)
    if step is None:
        yield node, weight
        return
    biases.append(weight * float(step.bias_like(value.data).reshape(-1)[node]))
    for source, link in step.links:
        edges = link.edges(torch.tensor([node]))
        index, factor = edges.index.flatten().tolist(), edges.weight.flatten().tolist()
        for at, share in zip(index, factor, strict=True):
            if at >= 0 and share != 0:
                yield from paths(walk, source, at, weight * share, biases)


@pytest.mark.parametrize("place", range(3))
def test_every_single_path_through_a_tiny_network(place: int) -> None:
    tape = record(network(Tiny), [torch.rand(1, 1, 3, 3, dtype=torch.float64)])
    walk = plan(tape, tape.output)
    (x,) = tape.inputs
    pixels = torch.zeros(9, dtype=torch.float64)
    biases: list[float] = []
    count = 0
    for pixel, weight in paths(walk, tape.output, place, 1.0, biases):
        pixels[pixel] += weight * x.flat[pixel]
        count += 1
    assert count > 100
    logit = float(tape.output.flat[place])
    assert float(pixels.sum()) + sum(biases) == pytest.approx(logit, rel=1e-9)

    # The same as all paths at once, pixel by pixel and bias by bias.
    evidence, shares = account(tape, walk, seed_at(tape.output, place))
    torch.testing.assert_close(evidence.reshape(-1), pixels, rtol=1e-9, atol=1e-12)
    assert float(sum(s.sum() for s in shares.values())) == pytest.approx(sum(biases), rel=1e-9)


@pytest.mark.parametrize("method", ["evidence", "seed", "exact"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_walk_leaves_what_was_recorded_as_it_was(name: str, method: str) -> None:
    """Walks reuse memory, and none that the tape holds: activations, weights, or the answer."""
    tape = record(network(NETWORKS[name]), [images(1)])
    held = [value.data for value in tape.values]
    held += [leaf for call in tape.calls for leaf in call.args if isinstance(leaf, Tensor)]
    before = [item.clone() for item in held]
    walk = plan(tape, tape.output)
    for rank in (0, -1):  # what the network sees, and what it does not, where signs turn
        target = tape.output.data.argsort(descending=True)[0, rank : rank + 1 or None]
        get_method(method).walk(walk, target)
    for item, was in zip(held, before, strict=True):
        assert torch.equal(item, was)
