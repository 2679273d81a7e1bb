from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from scipy import ndimage
from torch import nn

from howyouseeme import Explainer, Network, Preprocess, cli, load_image, localize, sample_photo
from howyouseeme.draw import boxes_picture
from howyouseeme.errors import InputError, MissingExtraError
from howyouseeme.evaluate import intersection_over_union
from howyouseeme.localize import (
    LEAST,
    Detection,
    detect,
    object_map,
    object_of,
    regions,
    to_coco,
    to_supervision,
)

CAT = 285
FOUND = (
    Detection(3, "cat", 0.75, (10.0, 20.0, 40.5, 60.0)),
    Detection(7, "dog", 0.5, (0.0, 0.0, 5.0, 8.0)),
)


@pytest.fixture(scope="module")
def explainer() -> Explainer:
    return Explainer("efficientnet-lite0")


def pasted(box: tuple[int, int, int, int], size: tuple[int, int] = (400, 300)) -> Image.Image:
    """The cat at a place of an even grey."""
    x0, y0, x1, y1 = box
    picture = Image.new("RGB", size, (120, 120, 120))
    picture.paste(load_image(sample_photo("cat")).resize((x1 - x0, y1 - y0)), (x0, y0))
    return picture


@pytest.mark.parametrize("box", [(60, 20, 330, 280), (20, 30, 210, 170), (190, 130, 380, 270)])
def test_an_object_is_boxed_where_it_is(explainer: Explainer, box: tuple[int, ...]) -> None:
    found = explainer(pasted(box), target=CAT).boxes()[0]
    assert intersection_over_union(found[0].box, [box])[0] >= 0.5
    assert (found[0].target, found[0].label) == (CAT, "Egyptian cat")


def test_the_box_is_that_of_the_maps_strongest_part(explainer: Explainer) -> None:
    picture = pasted((190, 130, 380, 270))
    explanation = explainer(picture, target=CAT)
    found = explanation.boxes(0.3)[0]
    heat = object_of(explanation)
    assert heat.shape == (224, 224)
    assert 0 <= heat.min() <= heat.max() <= 1 + 1e-9
    geometry = explanation.samples[0].geometry
    assert geometry is not None
    expected = regions(heat, 0.3)
    assert len(found) == len(expected)
    for one, (strength, (x0, y0, x1, y1)) in zip(found, expected, strict=True):
        assert one.score == pytest.approx(strength * explanation.probability[0])
        corners = np.array([[y0, x0], [y1, x1]]) * geometry.scale + geometry.offset
        (top, left), (bottom, right) = corners.clip(0, [300, 400])
        assert one.box == pytest.approx((left, top, right, bottom))


def test_boxes_of_a_batch_are_those_of_its_images(explainer: Explainer) -> None:
    photos = [pasted((20, 30, 210, 170)), load_image(sample_photo("coffee"))]
    together = explainer(photos, target=[CAT, 967]).boxes()
    for photo, target, found in zip(photos, (CAT, 967), together, strict=True):
        alone = explainer(photo, target=target).boxes()[0]
        assert [one.label for one in found] == [one.label for one in alone]
        for one, other in zip(found, alone, strict=True):
            assert one.box == pytest.approx(other.box, abs=1)


def naive_regions(heat: np.ndarray, level: float) -> list[tuple[float, tuple[int, ...]]]:
    """Parts that touch along sides and corners, and the cells that they reach over."""
    heat = heat / heat.max()
    labels, count = ndimage.label(heat >= level, np.ones((3, 3)))
    held = [heat[labels == i].sum() for i in range(1, count + 1)]
    found = []
    for i in np.argsort(held)[::-1]:
        y, x = np.nonzero(labels == i + 1)
        if held[i] >= LEAST * max(held):
            found.append((held[i] / max(held), (x.min(), y.min(), x.max() + 1, y.max() + 1)))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_regions_are_the_connected_parts_above_the_level(seed: int) -> None:
    noise = np.random.default_rng(seed).random((40, 50))
    heat = ndimage.gaussian_filter(noise, 2) ** 8
    found = regions(torch.tensor(heat), 0.4)
    expected = naive_regions(heat, 0.4)
    assert len(found) == len(expected) > 1
    for (strength, box), (share, cells) in zip(found, expected, strict=True):
        assert strength == pytest.approx(share)
        # Edges lie where the map crosses the level: less than a cell off the cells' own.
        assert np.abs(np.subtract(box, cells)).max() < 0.5 + 1e-6


def test_the_object_is_what_is_alike_to_where_evidence_is(explainer: Explainer) -> None:
    """(seen · reach²)^(1/3), pixel by pixel."""
    explanation = explainer(sample_photo("cat"))
    (alike,) = explanation.alike
    seen = explanation.levels[0]
    reach = alike.reach(seen)
    heat = object_map(seen, alike)
    for y, x in ((100, 100), (60, 150), (200, 20)):
        want = (float(seen[y, x]) * float(reach[y, x]) ** 2) ** (1 / 3)
        assert float(heat[y, x]) == pytest.approx(want, rel=1e-5)
    assert 0 < float(seen.mean()) != float(reach.mean())
    assert object_map(seen, None) is seen


def test_regions_are_told_in_pixels_of_a_larger_map() -> None:
    heat = torch.zeros(224, 112, dtype=torch.float64)
    heat[32:96, 20:60] = 1
    ((strength, box),) = regions(heat, 0.5)
    assert strength == 1
    assert box == pytest.approx((20, 32, 60, 96), abs=3)


def test_nothing_is_found_in_an_empty_map() -> None:
    assert regions(torch.zeros(20, 20)) == []


@pytest.mark.parametrize("threshold", [0, 1, -1, 1.5, float("nan")])
def test_a_threshold_outside_of_0_to_1_is_refused(threshold: float) -> None:
    with pytest.raises(InputError, match="leaves no box: give one between 0 and 1"):
        regions(torch.ones(20, 20), threshold)


def test_a_network_without_feature_maps_has_the_saliency_alone() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)).eval()
    explanation = Explainer(module)(torch.rand(1, 3, 16, 16), target=1)
    assert torch.allclose(object_of(explanation).float(), explanation.saliency[0], atol=1e-6)
    assert explanation.boxes()[0]


def test_an_input_that_is_no_picture_has_no_boxes() -> None:
    module = nn.Sequential(nn.Conv1d(2, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten()).eval()
    explanation = Explainer(module)(torch.rand(1, 2, 30), target=0)
    with pytest.raises(InputError, match=r"\(2, 30\) is no picture, and has no boxes"):
        explanation.boxes()


def test_of_likely_classes_that_share_a_place_the_best_stays(explainer: Explainer) -> None:
    photo = pasted((60, 20, 330, 280))
    found = detect(explainer, photo, top=3)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    for i, one in enumerate(found[1:], start=1):
        others = [other.box for other in found[:i]]
        assert intersection_over_union(one.box, others).max() <= 0.5
    asked = detect(explainer, photo, targets=["Egyptian cat", "tabby"])
    assert {one.label for one in asked} == {"Egyptian cat", "tabby"}
    assert len({(one.label, one.box) for one in asked}) == len(asked)


def test_a_class_whose_strongest_box_goes_is_not_there(explainer: Explainer) -> None:
    photo = sample_photo("rocket")
    strongest = {one.label[0]: one.boxes()[0][0].box for one in explainer.top(photo, 5)}
    found = detect(explainer, photo, top=5)
    best = {one.label: one.box for one in reversed(found)}
    assert 0 < len(best) < len(strongest)
    assert best.items() <= strongest.items()


def test_what_covers_the_strongest_box_of_a_class_may_be_any_box_of_another() -> None:
    class Explained:
        def __init__(
            self, target: int, *boxes: tuple[float, tuple[float, float, float, float]]
        ) -> None:
            found = tuple(localize.Detection(target, str(target), *box) for box in boxes)
            self.target, self.boxes = (target,), lambda threshold: (found,)

    class Likeliest:
        @staticmethod
        def top(image: object, k: int) -> list[Explained]:
            far, near, other = (0.0, 0.0, 9.0, 9.0), (50.0, 0.0, 60.0, 9.0), (90.0, 0.0, 99.0, 9.0)
            return [Explained(1, (0.8, far), (0.6, near)), Explained(2, (0.2, near), (0.1, other))]

    found = detect(Likeliest(), "photo.jpg", top=2)  # type: ignore[arg-type]
    assert [(one.target, one.score) for one in found] == [(1, 0.8), (1, 0.6)]


@pytest.mark.parametrize(("wide", "stays"), [(66.0, True), (67.0, False)])
def test_a_box_stays_that_overlaps_a_better_one_by_a_half_at_most(wide: float, stays: bool) -> None:
    class Explained:
        def __init__(self, target: int, score: float, x0: float) -> None:
            found = (Detection(target, str(target), score, (x0, 0.0, x0 + 100, 10.0)),)
            self.target, self.boxes = (target,), lambda threshold: (found,)

    class Likeliest:
        @staticmethod
        def top(image: object, k: int) -> list[Explained]:
            return [Explained(1, 0.8, 0.0), Explained(2, 0.2, 100 - wide)]  # shares `wide` of 100

    found = detect(Likeliest(), "photo.jpg", top=2)  # type: ignore[arg-type]
    assert wide / (200 - wide) > 0.49
    assert [one.target for one in found] == ([1, 2] if stays else [1])


def test_a_network_that_says_no_shows_no_box() -> None:
    class No(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 4, 3, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -self.body(x).abs().mean((1, 2, 3))[:, None]

    explainer = Explainer(Network("no", No().eval(), Preprocess((32, 32))))
    assert explainer(sample_photo()).label == ("not class 0",)
    assert detect(explainer, sample_photo()) == ()
    assert detect(explainer, sample_photo(), targets=[0]) == ()


def test_coco_has_every_image_box_and_class() -> None:
    made = to_coco({"a.jpg": FOUND, "b.jpg": ()}, {"a.jpg": (80, 100), "b.jpg": (4, 5)})
    assert json.loads(json.dumps(made)) == made
    assert made["images"] == [
        {"id": 1, "file_name": "a.jpg", "width": 100, "height": 80},
        {"id": 2, "file_name": "b.jpg", "width": 5, "height": 4},
    ]
    assert made["categories"] == [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    first = made["annotations"][0]
    assert first["bbox"] == [10, 20, 30.5, 40]
    assert (first["area"], first["score"], first["image_id"]) == (1220, 0.75, 1)
    assert [one["id"] for one in made["annotations"]] == [1, 2]


def test_coco_names_classes_that_have_a_name() -> None:
    named = Detection(7, "box 1", 0.9, (0, 0, 1, 1), 1)  # of a network that tells boxes apart
    unnamed = Detection(8, "box 2", 0.8, (0, 0, 1, 1), 2, named=False)
    made = to_coco({"a.jpg": [named, unnamed]}, {"a.jpg": (1, 1)})
    assert made["categories"] == [{"id": 7, "name": "box 1"}, {"id": 8, "name": "class 8"}]


def test_coco_says_what_is_missing() -> None:
    with pytest.raises(InputError, match=r"size of a\.jpg is missing"):
        to_coco({"a.jpg": FOUND}, {})
    with pytest.raises(InputError, match="COCO takes classes, and a neuron is none"):
        to_coco({"a.jpg": [Detection(None, "a neuron", 1, (0, 0, 1, 1))]}, {"a.jpg": (1, 1)})


def test_supervision_gets_boxes_classes_and_scores() -> None:
    pytest.importorskip("supervision")
    made = to_supervision(FOUND)
    assert made.xyxy.tolist() == [list(one.box) for one in FOUND]
    assert made.class_id.tolist() == [3, 7]
    assert made.confidence.tolist() == [0.75, 0.5]
    assert made.data["class_name"].tolist() == ["cat", "dog"]
    assert len(to_supervision(())) == 0


def test_without_supervision_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'howyouseeme\[apps\]'"):
        to_supervision(FOUND)


def test_a_picture_shows_the_boxes() -> None:
    photo = Image.new("RGB", (800, 600), (0, 0, 0))
    drawn = np.asarray(boxes_picture(photo, [((100, 200, 300, 400), "cat", "cat 90%")]))
    assert drawn.shape == (600, 800, 3)
    assert drawn[300, 100].any()
    assert drawn[399, 200].any()
    assert not drawn[300, 200].any()
    assert not drawn[500, 500].any()


# the command


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU()]
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    network = Network("small", module.eval(), Preprocess((32, 32)), ("cat", "dog"))
    monkeypatch.setattr("howyouseeme.models.load_model", lambda *_, **__: network)


@pytest.mark.usefixtures("small")
def test_the_command_writes_pictures_and_coco_and_goes_on(tmp_path: Path) -> None:
    photo, broken, out = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "out"
    pasted((20, 30, 210, 170)).save(photo)
    broken.write_bytes(b"no picture")
    words = ["detect", str(photo), str(broken), "--top", "2", "--out", str(out)]
    done = CliRunner().invoke(cli.main, words)
    assert done.exit_code == 1
    assert "1 of 2 failed" in done.stderr
    assert Image.open(out / "a.boxes.png").size == (600, 450)
    made = json.loads((out / "detections.json").read_text())
    assert [one["file_name"] for one in made["images"]] == [str(photo)]
    assert made["annotations"]
    for one in made["annotations"]:
        x, y, wide, tall = one["bbox"]
        assert 0 <= x < x + wide <= 400
        assert 0 <= y < y + tall <= 300


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "Name at least one photo"),
        (["--target", "cat", "--top", "2"], "--target CLASS or --top N, not both"),
        (["--target", "top2"], "for the N likeliest ones give --top N"),
        (["--target", "zebra"], "zebra"),
        (["--threshold", "1"], "0<x<1"),
    ],
)
def test_the_command_refuses_in_one_sentence(words: list[str], told: str, tmp_path: Path) -> None:
    photo = [str(sample_photo("cat"))] if words else []
    done = CliRunner().invoke(cli.main, ["detect", *photo, *words, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert told in done.stderr
    assert not (tmp_path / "out").exists()
