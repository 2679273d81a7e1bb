from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

import howyouseeme as hysm
from howyouseeme import Network, Preprocess, cli, load_image, sample_photo
from howyouseeme.errors import InputError, ModelError
from howyouseeme.propose import (
    Proposals,
    Proposer,
    Region,
    _agreement,
    _held,
    _in_turn,
    _largest,
    _salience,
    _things,
    _windows,
)
from howyouseeme.regions import merged, overlaps


@pytest.fixture(scope="module")
def proposer() -> Proposer:
    return Proposer("efficientnet-lite0")


def pasted(box: tuple[int, int, int, int]) -> Image.Image:
    """The cat at a place of an even grey."""
    x0, y0, x1, y1 = box
    picture = Image.new("RGB", (400, 300), (120, 120, 120))
    picture.paste(load_image(sample_photo("cat")).resize((x1 - x0, y1 - y0)), (x0, y0))
    return picture


def best(regions: tuple[Region, ...], box: tuple[int, ...]) -> float:
    found = torch.tensor([region.box for region in regions])
    return float(overlaps(found, torch.tensor(box, dtype=torch.float32)).max())


@pytest.mark.parametrize("box", [(20, 30, 180, 150), (230, 120, 380, 270), (60, 20, 360, 280)])
def test_what_stands_out_is_salient_and_proposed(
    proposer: Proposer, box: tuple[int, int, int, int]
) -> None:
    found = proposer(pasted(box))
    x0, y0, x1, y1 = box
    heat = found.saliency
    assert heat.shape == (300, 400)
    assert heat.min() >= 0
    assert heat.max() == pytest.approx(1)
    area = (x1 - x0) * (y1 - y0) / heat.size
    assert heat[y0:y1, x0:x1].sum() / heat.sum() > min(0.9, 2 * area)
    assert best(found.regions[:10], box) >= 0.5


def test_regions_lie_in_the_picture_and_do_not_repeat_each_other(proposer: Proposer) -> None:
    regions = proposer(sample_photo("coffee")).regions
    assert 80 < len(regions) <= 100
    boxes = torch.tensor([region.box for region in regions])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= torch.tensor([600.0, 400.0])).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    for i in range(1, len(boxes)):
        assert overlaps(boxes[:i], boxes[i]).max() <= 0.5001
    assert all(0 <= region.share <= 1 for region in regions)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) / (600 * 400)
    assert areas.min() < 0.03  # small ones have their turn
    assert areas.max() > 0.4


def test_padding_is_not_proposed() -> None:
    network = hysm.load_model("efficientnet-lite0")
    fitting = replace(network.photo_input, resize="fit", crop_from=None)
    proposer = Proposer(network, preprocess=fitting)
    wide = load_image(sample_photo("cat")).crop((0, 60, 450, 180))
    found = proposer(wide)
    boxes = torch.tensor([region.box for region in found.regions])
    size = torch.tensor([wide.width, wide.height])
    assert len(boxes) > 50
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= size).all()
    assert ((boxes[:, 2:] - boxes[:, :2]) > size / 60).all()  # of 28 cells
    for i in range(1, len(boxes)):
        assert overlaps(boxes[:i], boxes[i]).max() <= 0.5001
    whole = overlaps(boxes, torch.tensor([0.0, 0.0, *size])).argmax()
    covered = (boxes[whole, 2:] - boxes[whole, :2]).prod() / size.prod()
    assert found.regions[whole].share >= 0.98 * min(float(covered), 1)
    for category in ("tabby", "Egyptian cat", "tiger cat"):
        x0, y0, x1, y1 = proposer.find(wide, category)
        assert x1 - x0 > 1
        assert y1 - y0 > 1


def test_fewer_regions_are_the_first_ones(proposer: Proposer) -> None:
    picture = sample_photo("cat")
    assert proposer(picture, 5).regions == proposer(picture).regions[:5]


def test_a_class_is_found_for_a_tracker(proposer: Proposer) -> None:
    box = (200, 90, 390, 280)
    found = torch.tensor([proposer.find(pasted(box), "tabby")])
    assert overlaps(found, torch.tensor(box, dtype=torch.float32))[0] > 0.4


# From their definitions


def test_a_class_that_is_hardly_seen_is_found_with_a_warning(proposer: Proposer) -> None:
    with pytest.warns(
        UserWarning, match=r"^espresso may not be in the picture: .* number \d+, with"
    ):
        box = proposer.find(sample_photo("cat"), "espresso")
    assert box[2] > box[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        proposer.find(sample_photo("coffee"), "espresso")


def test_a_class_beyond_the_last_is_named() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    module = nn.Sequential(*layers, nn.Linear(4, 6)).eval()
    with pytest.raises(InputError, match="plain has no class 6; indices go from 0 to 5"):
        Proposer(Network("plain", module, Preprocess((16, 16)))).find(sample_photo(), 6)


def test_what_windows_hold_is_the_integral_over_them() -> None:
    rng = np.random.default_rng(0)
    heat = torch.tensor(rng.uniform(size=(28, 28)))
    low = rng.uniform(0, 20, (30, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.1, 8, (30, 2))], 1)

    def covered(low: float, high: float) -> np.ndarray:
        cells = np.arange(28)
        return np.clip(np.minimum(cells + 1, high) - np.maximum(cells, low), 0, None)

    wanted = [covered(y0, y1) @ heat.numpy() @ covered(x0, x1) for x0, y0, x1, y1 in boxes]
    np.testing.assert_allclose(_held(heat, torch.tensor(boxes)), wanted, rtol=1e-5, atol=1e-5)


def test_agreement_is_intersection_over_union() -> None:
    mask = torch.zeros(28, 28, dtype=torch.bool)
    mask[4:10, 6:16] = True
    windows = torch.tensor([[6.0, 4, 16, 10], [6, 4, 11, 10], [20, 20, 24, 24], [0, 0, 28, 28]])
    assert _agreement(mask, windows).tolist() == pytest.approx([1, 0.5, 0, 60 / 784], abs=1e-5)


def test_a_window_is_salient_that_holds_more_than_its_surroundings() -> None:
    heat = torch.zeros(28, 28)
    heat[10:14, 10:14] = 1
    tight, loose, beside, even = _salience(
        heat, torch.tensor([[10.0, 10, 14, 14], [6, 6, 18, 18], [14, 10, 18, 14], [20, 20, 24, 24]])
    )
    assert tight > loose > even > beside
    assert float(tight) == pytest.approx(1 / 4, rel=1e-5)  # all of it, over the root of 16
    assert float(even) == pytest.approx(0, abs=1e-6)
    assert _salience(torch.ones(28, 28), _windows()).abs().max() < 0.05


def naive_merged(features: np.ndarray) -> list[tuple[int, int, int, int]]:
    """By the definition: of all pairs of parts that touch, the union with the least growth of variance."""
    parts = [{(y, x)} for y in range(features.shape[1]) for x in range(features.shape[2])]

    def spread(part: set[tuple[int, int]]) -> float:
        values = np.array([features[:, y, x] for y, x in part])
        return float(((values - values.mean(0)) ** 2).sum())

    def touch(one: set[tuple[int, int]], other: set[tuple[int, int]]) -> bool:
        return any(abs(y - v) + abs(x - u) == 1 for y, x in one for v, u in other)

    found = []
    while len(parts) > 1:
        pairs = [(a, b) for i, a in enumerate(parts) for b in parts[:i] if touch(a, b)]
        first, second = min(
            pairs, key=lambda pair: spread(pair[0] | pair[1]) - spread(pair[0]) - spread(pair[1])
        )
        union = first | second
        parts = [part for part in parts if part is not first and part is not second] + [union]
        ys, xs = zip(*union, strict=True)
        found.append((min(xs), min(ys), max(xs) + 1, max(ys) + 1))
    return found[::-1]


@pytest.mark.parametrize(("height", "width"), [(4, 5), (1, 6), (5, 3)])
def test_those_parts_are_merged_whose_variance_grows_least(height: int, width: int) -> None:
    features = torch.randn(3, height, width, generator=torch.Generator().manual_seed(height))
    found = merged(features)
    assert found.shape == (height * width - 1, 4)
    assert [tuple(map(int, box)) for box in found.tolist()] == naive_merged(features.numpy())


def test_one_place_has_nothing_to_be_merged_with() -> None:
    assert merged(torch.ones(3, 1, 1)).shape == (0, 4)


def test_things_are_what_the_network_describes_alike() -> None:
    """Two squares on a ground: both are proposed, the salient one first."""
    features, heat = torch.zeros(2, 28, 28), torch.zeros(28, 28)
    features[0, 4:12, 4:10] = 1.0
    features[1, 15:25, 12:22] = 1.2
    heat[15:25, 12:22] = 1.0
    things = _things(features, heat, (0.0, 0.0, 28.0, 28.0)).tolist()
    assert things[:2] == [[0, 0, 28, 28], [12, 15, 22, 25]]  # all of it holds more than nothing
    assert [4, 4, 10, 12] in things[2:]


def test_two_lists_take_turns_until_one_is_done() -> None:
    long, short = torch.arange(12.0).reshape(3, 4), torch.full((1, 4), -1.0)
    assert torch.equal(_in_turn(long, short), torch.stack([long[0], short[0], long[1], long[2]]))
    assert torch.equal(_in_turn(short, long), torch.stack([short[0], *long]))


def test_windows_have_all_sizes_and_places() -> None:
    windows = _windows()
    assert (windows[:, :2] >= 0).all()
    assert (windows[:, 2:] <= 28 + 1e-4).all()
    for box in ((0, 0, 28, 28), (0, 0, 3, 3), (20, 3, 27, 12), (5, 5, 23, 13)):
        assert overlaps(windows, torch.tensor(box, dtype=torch.float32)).max() > 0.6


def test_an_empty_map_has_no_largest_part() -> None:
    assert _largest(torch.zeros(28, 28)) is None


def test_a_module_and_its_preprocessing_do(proposer: Proposer) -> None:
    network = proposer.network
    found = Proposer(network.module, preprocess=network.preprocess)(sample_photo(), 5)
    assert found.regions == proposer(sample_photo(), 5).regions


# What is refused


def test_a_network_that_tells_probabilities_proposes_the_same(proposer: Proposer) -> None:
    """The scores are read as an explanation reads them: before a softmax, and out of a dict."""

    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = proposer.network.module

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": self.network(x).softmax(1)}

    other = Proposer(Told().eval(), preprocess=proposer.network.preprocess)
    picture = sample_photo("cat")
    mine, theirs = proposer(picture), other(picture)
    np.testing.assert_allclose(mine.saliency, theirs.saliency, atol=1e-5)
    assert mine.regions == theirs.regions


def test_what_cannot_be_proposed_is_said(proposer: Proposer) -> None:
    with pytest.raises(InputError, match="0 regions are none"):
        proposer(sample_photo(), 0)
    with pytest.raises(InputError, match="0 classes are none"):
        Proposer(proposer.network, top=0)
    with pytest.raises(InputError, match="has no class"):
        proposer.find(sample_photo(), "no such thing")
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
    with pytest.raises(ModelError, match="How a photo becomes the input of plain"):
        Proposer(Network("plain", plain))
    with pytest.raises(ModelError, match="plain has no feature maps"):
        Proposer(Network("plain", plain, Preprocess((2, 2)), None))(sample_photo())


# Files


def test_the_command_writes_a_picture_and_numbers(tmp_path: Path) -> None:
    words = ["propose", str(sample_photo()), "--count", "7", "--out", str(tmp_path)]
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 0, result.output
    assert "7 regions" in result.stdout
    data = json.loads((tmp_path / "cat.regions.json").read_text())
    assert data["image"]["size"] == [300, 451]
    assert len(data["regions"]) == 7
    assert Image.open(tmp_path / "cat.regions.png").size == (451, 300)


def test_a_photo_that_cannot_be_read_does_not_stop_the_others(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no photo")
    words = ["propose", str(bad), str(sample_photo()), "--count", "2", "--out", str(tmp_path)]
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 1
    assert "2 regions" in result.stdout
    assert "1 of 2 failed" in result.stderr


def test_the_picture_shows_the_first_boxes() -> None:
    found = Proposals(np.zeros((40, 60), np.float32), (Region((10.0, 5.0, 50.0, 35.0), 1.0),))
    with_box, without = found.picture(Image.new("RGB", (60, 40))), Proposals(found.saliency, ())
    plain = without.picture(Image.new("RGB", (60, 40)))
    changed = np.abs(np.asarray(with_box, int) - np.asarray(plain, int)).sum(2) > 0
    rows, columns = np.nonzero(changed)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (10, 5, 49, 34)


class Scores(nn.Module):
    """Scores of grey pictures, times a factor."""

    def __init__(self, channels: int = 3, factor: float = 1.0, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, classes, 3)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).relu().mean((2, 3)) * self.factor


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (Scores(channels=1), InputError, "can't run on an input of the shape"),
        (Scores(factor=float("nan")), ModelError, "NaN or infinity, first made by aten.mul"),
        (Scores(classes=1), ModelError, "has a single score, and proposals compare classes"),
    ],
    ids=["other channels", "no numbers", "one score"],
)
def test_a_network_that_proposes_nothing_says_why(
    module: nn.Module, error: type[Exception], message: str
) -> None:
    network = Network("mine", module.eval(), Preprocess((24, 24)))
    with pytest.raises(error, match=message):
        Proposer(network)(sample_photo("cat"))


def test_classes_that_are_masked_are_not_proposed() -> None:
    class Masked(Scores):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = super().forward(x)
            return scores.masked_fill(torch.tensor([False, True, False]), -torch.inf)

    found = Proposer(Network("mine", Masked().eval(), Preprocess((48, 48))))(sample_photo("cat"))
    assert found.regions
    assert np.isfinite(found.saliency).all()


def test_another_default_device_changes_nothing(proposer: Proposer) -> None:
    usual = proposer(sample_photo("cat"), count=20)
    with torch.device("meta"):
        found = proposer(sample_photo("cat"), count=20)
    assert found.regions == usual.regions
