"""On a GPU: the same evidence as on the CPU, and no wait for it at every call. Skipped where there is none."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import howyouseeme as hysm
from howyouseeme import backtrack, links, maps
from howyouseeme.methods import excitation
from howyouseeme.propose import Proposer
from howyouseeme.replay.traced import Traced
from howyouseeme.rounding import unrounded
from howyouseeme.track import Tracker

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture
def exact() -> Iterator[None]:
    """Convolutions in float32 all the way, as on the CPU."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


class Small(nn.Module):
    """A bit of everything: signed and gated activations, a depthwise filter, a shift, cat, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8), nn.ReLU6())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.last = nn.Sequential(nn.Conv2d(16, 12, 1), nn.BatchNorm2d(12), nn.ReLU(inplace=True))
        self.head = nn.Linear(12, 5)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.stem(x), 3, 2, 1)
        deep = self.deep(x)
        x = torch.cat([x, deep * self.gate(deep)], 1)
        return self.head(self.last(x).mean((2, 3)))


def small() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def photos(count: int = 2, side: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, side, side, generator=generator)


WAYS: dict[str, dict[str, Any]] = {
    "all nodes": {},
    "no contrast": {"contrast": False},
    "few nodes": {"nodes": 5000},
    "seed": {"method": "seed", "k": 20},
}


@needs_gpu
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("way", WAYS)
def test_evidence_is_that_of_the_cpu(way: str) -> None:
    x = photos()
    here = hysm.Explainer(small(), **WAYS[way])(x, target=[1, 3])
    there = hysm.Explainer(small().cuda(), **WAYS[way])(x.cuda(), target=[1, 3])
    assert there.evidence.is_cuda
    scale = here.evidence.abs().max()
    if way == "few nodes":  # another halftone, as devices have no comb
        both = torch.stack([here.attention.flatten(), there.attention.flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.95
    else:
        assert (there.evidence.cpu() - here.evidence).abs().max() < 1e-4 * scale
        assert (there.attention - here.attention).abs().max() < 1e-3
        assert (there.saliency - here.saliency).abs().mean() < 1e-3


@needs_gpu
@pytest.mark.usefixtures("exact")
def test_a_real_photo_by_the_network_of_the_package() -> None:
    photo = hysm.load_image(hysm.sample_photo())
    here, there = (
        hysm.Explainer(hysm.load_model("efficientnet-lite0"), device=device)(photo)
        for device in ("cpu", "cuda")
    )
    assert there.label == here.label
    assert (there.evidence.cpu() - here.evidence).abs().max() < 1e-3 * here.evidence.abs().max()
    assert there.points[0][0].position == here.points[0][0].position
    assert len(there.boxes()[0]) == len(here.boxes()[0])
    assert there.boxes()[0][0].box == pytest.approx(here.boxes()[0][0].box, abs=1)
    assert np.asarray(there.picture()).shape == np.asarray(here.picture()).shape
    nodes = [[(n.module, n.channel) for n in path.nodes] for path in there.path(0, [0])]
    assert nodes == [[(n.module, n.channel) for n in path.nodes] for path in here.path(0, [0])]
    assert len(there.layers()) == len(here.layers())
    assert there.hidden().size == here.hidden().size


@needs_gpu
def test_rounded_products_change_little() -> None:
    x = photos()
    here = hysm.Explainer(small())(x, target=[1, 3])
    assert torch.backends.cudnn.allow_tf32  # PyTorch's default
    there = hysm.Explainer(small().cuda())(x.cuda(), target=[1, 3])
    assert torch.backends.cudnn.allow_tf32
    assert (there.evidence.cpu() - here.evidence).abs().max() < 2e-2 * here.evidence.abs().max()


@needs_gpu
def test_a_target_is_followed() -> None:
    frame = np.asarray(hysm.load_image(hysm.sample_photo()))
    height, width = frame.shape[:2]
    network = hysm.load_model("efficientnet-lite0")
    network.module.cuda()
    tracker = Tracker(network)
    tracker.start(frame, (0.3 * width, 0.3 * height, 0.7 * width, 0.7 * height))
    assert tracker(frame).found
    assert tracker._stages.module is not network.module  # TF32 is no reason to leave the copy


@needs_gpu
@pytest.mark.usefixtures("exact")
def test_regions_are_proposed_as_on_the_cpu() -> None:
    found = []
    for device in ("cpu", "cuda"):
        network = hysm.load_model("efficientnet-lite0")
        network.module.to(device)
        found.append(Proposer(network)(hysm.sample_photo()))
    here, there = found
    assert np.abs(there.saliency - here.saliency).max() < 0.05
    assert there.regions[0].box == pytest.approx(here.regions[0].box, abs=2)


@needs_gpu
def test_several_classes_of_one_image() -> None:
    x = photos(1).cuda()
    explainer = hysm.Explainer(small().cuda())
    for one in explainer.top(x, 3):  # which share what excites each node
        alone = explainer(x, target=one.target)
        scale = alone.evidence.abs().max()
        assert (one.evidence - alone.evidence).abs().max() < 1e-2 * scale


@needs_gpu
def test_no_wait_at_every_call() -> None:
    deep = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    deep += nn.Sequential(
        *(
            deepcopy(layer)
            for _ in range(20)
            for layer in (nn.Conv2d(8, 8, 3, padding=1), *deep[1:])
        )
    )
    x = photos(1).cuda()
    waits = []
    for depth in (len(deep), len(deep) // 2):
        module = nn.Sequential(
            *deep[:depth], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        )
        explainer = hysm.Explainer(module.eval().cuda())
        explainer(x)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                explainer(x)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchroniz" in str(one.message) for one in seen))
    assert waits[0] <= waits[1] + 3 < 40  # with twice the layers


def replays(explainer: hysm.Explainer) -> list[Traced]:
    """What an explainer replays, all of it by graphs."""
    assert explainer._replays is not None
    kept = [item for item in explainer._replays._kept.values() if item is not None]
    assert all(item.forward.lasts and item.back.lasts for item in kept)
    return kept


def assert_close(one: hysm.Explanation, other: hysm.Explanation) -> None:
    assert one.target == other.target
    scale = other.evidence.abs().max()
    assert scale > 0
    assert (one.evidence - other.evidence).abs().max() <= 1e-4 * scale
    assert (one.saliency - other.saliency).abs().mean() < 1e-3
    assert one.coverage == pytest.approx(other.coverage, abs=1e-4)


@needs_gpu
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("way", ["all nodes", "no contrast"])
def test_replays_are_graphs(way: str, count: int) -> None:
    model = small().cuda()
    replaying = hysm.Explainer(model, replay=True, **WAYS[way])
    usual = hysm.Explainer(model, **WAYS[way])
    images = [photos(count) + shift for shift in (0, 0.5, 1, -0.5, -1)]
    found = [replaying(x.cuda()) for x in images]
    for one, x in zip(found, images, strict=True):  # none has written over what came of another
        assert_close(one, usual(x.cuda()))
    assert [item.hits for item in replays(replaying)] == [3]
    with torch.no_grad():
        model.head.weight.mul_(-2)
    assert_close(replaying(images[0].cuda()), usual(images[0].cuda()))
    assert [item.hits for item in replays(replaying)] == [4]


@needs_gpu
def test_replays_of_several_kinds_classes_and_streams() -> None:
    model = small().cuda()
    replaying, usual = hysm.Explainer(model, replay=True), hysm.Explainer(model)
    streams = [torch.cuda.Stream() for _ in range(3)]
    found = []
    for turn in range(5):
        for count in (1, 2):
            x = (photos(count) + turn).cuda()
            torch.cuda.synchronize()
            with torch.cuda.stream(streams[turn % 3]):
                found += [(x, i, one) for i, one in enumerate(replaying.top(x, 2))]
    torch.cuda.synchronize()
    for x, i, one in found:
        assert_close(one, usual.top(x, 2)[i])
    assert [item.hits for item in replays(replaying)] == [3, 3]


@needs_gpu
def test_what_looks_up_places_after_a_look_is_not_replayed() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.table = small(), nn.Parameter(torch.rand(3, 5))

        def forward(self, x: Tensor) -> Tensor:
            place = (x.mean((1, 2, 3)) * 100).long().clamp(min=0)
            if bool((place < 3).all()):
                return self.body(x) * self.table[place]
            return self.body(x)

    model = Looks().eval().cuda()
    replaying, usual = hysm.Explainer(model, replay=True), hysm.Explainer(model)
    with pytest.warns(UserWarning, match="not replayed.*places"):
        found = [(x, replaying(x)) for x in (photos(1).cuda() + shift for shift in (0, 0, 0, 9))]
    for x, one in found:
        assert_close(one, usual(x))


@needs_gpu
def test_a_network_that_waits_for_the_device_is_replayed_call_by_call() -> None:
    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.cpu().cuda())

    model = Waits().eval().cuda()
    replaying, usual = hysm.Explainer(model, replay=True), hysm.Explainer(model)
    for shift in range(4):
        assert_close(replaying(photos(1).cuda() + shift), usual(photos(1).cuda() + shift))
    assert replaying._replays is not None
    (kept,) = replaying._replays._kept.values()
    assert kept is not None
    assert kept.hits == 2
    assert not kept.forward.lasts
    assert kept.back.lasts


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors that say they are on a GPU, whose products PyTorch rounds; as they were, afterwards."""
    monkeypatch.setattr(Tensor, "is_cuda", True)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("rounding")
def test_products_of_both_signs_are_not_rounded() -> None:
    link = links.Convolution(
        (1, 2, 4, 4), (1, 2, 4, 4), torch.ones(2, 2, 1, 1), (1,), (0,), (1,), 1
    )
    x = torch.zeros(1, 2, 4, 4)
    assert excitation._rounded(link, x)
    assert not excitation._rounded(link, x.double())
    assert not excitation._rounded(links.Matrix((1, 2), (1, 3), torch.ones(3, 2)), x)
    with unrounded(), unrounded():
        assert not torch.backends.cudnn.allow_tf32
        assert excitation._rounded(link, x)  # the network's own call was
    assert torch.backends.cudnn.allow_tf32
    with unrounded(False):
        assert torch.backends.cudnn.allow_tf32


@pytest.mark.usefixtures("rounding")
def test_evidence_where_products_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network's own sum is made again; here, where nothing is rounded, it is the same."""
    monkeypatch.undo()
    x = photos()
    expected = hysm.Explainer(small())(x, target=[1, 3]).evidence
    monkeypatch.setattr(excitation, "_rounded", lambda link, tensor: True)
    found = hysm.Explainer(small())(x, target=[1, 3]).evidence
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("way", ["all nodes", "no contrast"])
def test_evidence_without_a_look_at_the_contents(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is skipped on the CPU as it would change nothing is done on devices."""
    x = photos().double()
    expected = hysm.Explainer(small().double(), **WAYS[way])(x, target=[1, 3]).evidence
    looks = []
    for module in (backtrack, excitation, links.moves, maps):
        monkeypatch.setattr(module, "at_hand", lambda tensor: bool(looks.append(tensor)))
    found = hysm.Explainer(small().double(), **WAYS[way])(x, target=[1, 3]).evidence
    assert looks
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
