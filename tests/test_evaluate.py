"""`evaluate` for a network, images and boxes whose truth is known; boxes from every kind of file."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from networks import Made
from PIL import Image
from torch import Tensor, nn

import howyouseeme as hysm
from howyouseeme import InputError, ModelError, cli
from howyouseeme.evaluate import Settings, evaluate, make_grids, randomised, read_boxes
from howyouseeme.evaluate.scoring import Item, score_image, summarise, values

SIZE, PHOTO = 32, (64, 96)  # of the network's input, and of a photo (height, width)
COLOURS = ("red", "green", "blue")
COCO_IDS = {"red": 11, "green": 12, "blue": 13}


class Colours(nn.Module):
    """Answers with the colour of which there is most; grey has a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.ReLU())
        self.tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
        with torch.no_grad():
            self.body[0].weight.copy_(torch.eye(3)[:, :, None, None])
            self.tail[2].weight.copy_(60 * torch.eye(4)[:, :3])
            self.tail[2].bias.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(x))


def colours(**changes: Any) -> hysm.Network:
    wanted: dict[str, Any] = {
        "preprocess": hysm.Preprocess((SIZE, SIZE)),
        "classes": (*COLOURS, "grey"),
        **changes,
    }
    return hysm.Network("colours", Colours().eval(), wanted["preprocess"], wanted["classes"])


def box_of(i: int) -> tuple[int, int, int, int]:
    """In pixels of the photo, whole pixels of the input: 3 by 2 photo pixels each."""
    return 12 + 6 * i, 8, 48 + 6 * i, 40


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six photos, each with a patch of a colour."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        array = np.zeros((*PHOTO, 3), np.uint8)
        x0, y0, x1, y1 = box_of(i)
        array[y0:y1, x0:x1, i % 3] = 255
        Image.fromarray(array).save(folder / f"{i}.png")
    return folder


def files(photos: Path) -> list[Path]:
    return sorted(photos.iterdir())


Writer = Callable[[Path], Path]


def csv_file(folder: Path) -> Path:
    rows = ["comment, File ,class,x0,y0,x1,y1"]
    rows += [
        f"any,{i}.png,{i % 3 if i < 3 else COLOURS[i % 3].upper()}," + ",".join(map(str, box_of(i)))
        for i in range(6)
    ]
    path = folder / "boxes.csv"
    path.write_text("\ufeff" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


def coco_file(folder: Path, **changes: Any) -> Path:
    content = {
        "images": [
            {"id": 70 + i, "file_name": f"train/{i}.png", "width": PHOTO[1], "height": PHOTO[0]}
            for i in range(6)
        ],
        "categories": [{"id": number, "name": name} for name, number in COCO_IDS.items()],
        "annotations": [
            {
                "id": i,
                "image_id": 70 + i,
                "category_id": COCO_IDS[COLOURS[i % 3]],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
            }
            for i, (x0, y0, x1, y1) in ((i, box_of(i)) for i in range(6))
        ],
        **changes,
    }
    path = folder / "coco.json"
    path.write_text(json.dumps(content))
    return path


def voc_folder(folder: Path) -> Path:
    made = folder / "voc"
    made.mkdir()
    for i in range(6):
        x0, y0, x1, y1 = box_of(i)
        (made / f"{i}.xml").write_text(
            f"""<annotation><filename>{i}.png</filename>
            <size><width>{PHOTO[1]}</width><height>{PHOTO[0]}</height><depth>3</depth></size>
            <object><name>{COLOURS[i % 3]}</name><bndbox>
            <xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>
            </bndbox></object></annotation>"""
        )
    return made


KINDS: dict[str, Writer] = {"csv": csv_file, "coco": coco_file, "voc": voc_folder}


# -- boxes from files -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_holds_the_same_boxes(kind: str, tmp_path: Path) -> None:
    found = read_boxes(KINDS[kind](tmp_path), colours())
    assert found.problems == []
    assert {name: [(b.target, b.corners) for b in boxes] for name, boxes in found.of.items()} == {
        f"{i}.png": [(i % 3, box_of(i))] for i in range(6)
    }


def test_several_boxes_of_an_image_stay_together(tmp_path: Path) -> None:
    path = tmp_path / "b.csv"
    path.write_text(
        'file,class,x0,y0,x1,y1\n"sub\\a, b.png",0,0,0,1,1\nx/y/a.png,red,1,1,2,2\na.png,2,1,1,3,3\n'
    )
    found = read_boxes(path, colours())
    assert {name: len(boxes) for name, boxes in found.of.items()} == {"a, b.png": 1, "a.png": 2}


def test_a_line_that_cannot_be_used_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "boxes.csv"
    lines = [
        "file,class,x0,y0,x1,y1",
        "good.png,red,1,1,9,9",
        "short.png,red,1",
        "text.png,red,1,1,nine,9",
        "nan.png,red,1,1,nan,9",
        "flat.png,red,5,1,5,9",
        "violet.png,violet,1,1,9,9",
        "violet.png,violet,1,1,9,8",
        "far.png,17,1,1,9,9",
        ",red,1,1,9,9",
    ]
    path.write_text("\n".join(lines))
    found = read_boxes(path, colours())
    assert list(found.of) == ["good.png"]
    told = "\n".join(found.problems)
    for part in (
        "line 3: x0, y0, x1 and y1 are not four numbers",
        "line 4: x0, y0, x1 and y1 are not four numbers",
        "line 5: a corner is not a finite number",
        "line 6: the box from (5, 1) to (5, 9) has no area",
        "2 box(es) left out: colours has no class 'violet'",
        "1 box(es) left out: colours has no class 17; indices go from 0 to 3",
        "line 10: it names no image",
    ):
        assert part in told
    assert len(found.problems) == 7


def test_coco_tells_which_categories_are_no_classes_and_what_is_broken(tmp_path: Path) -> None:
    good = {"id": 0, "image_id": 70, "category_id": 11, "bbox": [1, 1, 2, 2]}
    path = coco_file(
        tmp_path,
        categories=[{"id": 11, "name": "RED"}, {"id": 2, "name": "dining table"}],
        annotations=[
            good,
            {**good, "id": 1, "category_id": 2},
            {**good, "id": 2, "image_id": 1},
            {**good, "id": 3, "bbox": [1, 2]},
            {"id": 4},
            {**good, "id": 5, "category_id": 3},
            "text",
        ],
    )
    found = read_boxes(path, colours())
    assert {name: [box.target for box in boxes] for name, boxes in found.of.items()} == {
        "0.png": [0]
    }
    told = "\n".join(found.problems)
    assert "1 box(es) left out: colours has no class 'dining table'" in told
    assert "1 box(es) left out: colours has no class with the id 3" in told
    assert all(f"annotation {i}: " in told for i in (2, 3, 4, 6))
    assert len(found.problems) == 6


def test_infinity_in_coco_is_told_or_not_looked_at(tmp_path: Path) -> None:
    one = {"id": 0, "image_id": 70, "category_id": 11, "bbox": [1, 1, 2, 2]}
    path = coco_file(
        tmp_path,
        images=[{"id": 70, "file_name": "0.png", "width": math.inf, "height": 9}],
        annotations=[one, {**one, "id": 1, "category_id": math.inf}],
    )
    found = read_boxes(path, colours())
    assert [box.size for box in found.of["0.png"]] == [None]
    (told,) = found.problems
    assert "annotation 1: it has no usable image, bbox or category" in told


def test_crowds_are_left_out(tmp_path: Path) -> None:
    one = {"id": 0, "image_id": 70, "category_id": 11, "bbox": [1, 1, 2, 2], "iscrowd": 0}
    crowd = {**one, "id": 1, "bbox": [0, 0, 90, 60], "iscrowd": 1}
    found = read_boxes(coco_file(tmp_path, annotations=[one, crowd]), colours())
    assert [box.corners for box in found.of["0.png"]] == [(1, 1, 3, 3)]
    assert found.problems == []


def test_without_class_names_a_category_goes_by_its_id(tmp_path: Path) -> None:
    path = coco_file(tmp_path)
    found = read_boxes(path, colours(classes=None))
    assert [boxes[0].target for boxes in found.of.values()] == [11, 12, 13, 11, 12, 13]
    found = read_boxes(csv_file(tmp_path), colours(classes=None))
    assert [boxes[0].target for boxes in found.of.values()] == [0, 1, 2]
    assert "has no class names, so 'RED' must be an index" in found.problems[0]


def test_voc_tells_what_is_broken(tmp_path: Path) -> None:
    folder = voc_folder(tmp_path)
    (folder / "0.xml").write_text("<annotation><filename>")
    (folder / "1.xml").write_text(
        (folder / "1.xml").read_text().replace("<filename>1.png", "<filename>")
    )
    (folder / "2.xml").write_text(
        "<annotation><filename>2.png</filename><object><name>red</name></object></annotation>"
    )
    found = read_boxes(folder, colours())
    assert sorted(found.of) == ["3.png", "4.png", "5.png"]
    told = "\n".join(found.problems)
    assert "0.xml: it can't be read as XML" in told
    assert "1.xml, object 1: it names no image" in told
    assert "2.xml, object 1: its bndbox has not four numbers" in told


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.csv", None, "There is no file or folder"),
        ("boxes.txt", "", "is no file with boxes"),
        ("boxes.csv", "file;class;x0;y0;x1;y1\n", "has no column file, class, x0, y0, x1, y1"),
        ("boxes.csv", "file,class,x0,y0,x1\n", "has no column y1"),
        ("boxes.csv", "file,class,x0,y0,x1,y1\n", "There is no box"),
        ("boxes.json", "{", "is no COCO file"),
        ("boxes.json", "[]", "is no COCO file"),
        ("boxes.json", '{"images": []}', "is no COCO file"),
        ("folder", None, "There is no .xml file"),
    ],
)
def test_a_file_that_is_none_of_these(
    name: str, content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    elif name == "folder":
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=message):
        read_boxes(tmp_path / name, colours())


# -- evaluate -------------------------------------------------------------------------------------

FAST = Settings(steps=4, road=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_whose_evidence_is_in_the_boxes_scores_full(
    kind: str, photos: Path, tmp_path: Path
) -> None:
    found = evaluate(
        colours(),
        files(photos),
        KINDS[kind](tmp_path),
        settings=FAST,
        methods=["evidence", "exact"],
    )
    assert [item.name for item in found.items] == [f"{i}.png" for i in range(6)]
    assert found.labels == (*COLOURS, *COLOURS)
    assert found.problems == ()
    for means in found.summary.values():
        for measure in ("pointing", "energy", "box", "box_mean"):
            assert means[measure].low > 0.9, measure  # resampling blurs the photo's edges
        assert means["road"] is None
        assert means["grid"] is None
        # The network sees the mean colour alone, which deletion and insertion keep.
        assert min(means["deletion"].low, means["insertion"].low) > 0.9
        assert means["time"].low > 0


def test_boxes_are_scaled_and_cut_as_the_photo_was(photos: Path, tmp_path: Path) -> None:
    (item, *_) = evaluate(colours(), files(photos), csv_file(tmp_path), settings=FAST).items
    assert item.boxes.tolist() == [[12 / 3, 8 / 2, 48 / 3, 40 / 2]]
    crop = hysm.Preprocess((SIZE, SIZE), resize="crop", crop_from=SIZE)  # 64 x 96 to 32 x 48
    network = colours(preprocess=crop)
    (item, *_) = evaluate(network, files(photos), csv_file(tmp_path), settings=FAST).items
    assert item.boxes.tolist() == [[0, 4, 16, 20]]  # 6 - 8 is cut off
    assert item.covered == 0.25


def test_what_is_measured_is_the_map_that_the_user_sees(photos: Path, tmp_path: Path) -> None:
    """On the user's own pixels the measures come to the same, up to resampling."""
    network = colours()
    found = evaluate(network, files(photos), csv_file(tmp_path), settings=FAST, limit=1)
    explanation = hysm.explain(network, files(photos)[0])
    from howyouseeme.evaluate import energy  # noqa: PLC0415

    mine = energy(explanation.saliency[0], [box_of(0)])
    assert found.summary["evidence"]["energy"].mean == pytest.approx(mine, abs=0.1)


def test_without_boxes_there_are_the_measures_that_need_none(photos: Path) -> None:
    found = evaluate(colours(), files(photos), settings=Settings(steps=4), grids=0)
    means = found.summary["evidence"]
    have = {key for key, mean in means.items() if mean is not None}
    assert have == {"insertion", "deletion", "road", "second_class", "randomised", "time"}
    assert len(found.items) == 6


def test_only_images_with_a_box_of_the_answer_are_measured(photos: Path) -> None:
    boxes = {f"{i}.png": [(i % 3, *box_of(i))] for i in range(3)}
    boxes["1.png"] = [(0, *box_of(1)), (2, 0, 0, 9, 9)]  # it is green, class 1
    boxes["absent.png"] = [(0, 1, 1, 9, 9)]
    found = evaluate(colours(), files(photos), boxes, settings=FAST)
    assert [item.name for item in found.items] == ["0.png", "2.png"]
    assert found.notes[:3] == (
        "1 file(s) with boxes are not among the images: absent.png.",
        "3 image(s) without boxes are left out.",
        "1 image(s) are left out, having no usable box of the class that the network answers.",
    )
    assert not found.problems


def test_what_is_broken_is_told_and_the_rest_goes_on(photos: Path) -> None:
    (photos / "0.png").write_bytes(b"not a picture")
    boxes = {f"{i}.png": [(i % 3, *box_of(i))] for i in range(6)}
    boxes["1.png"] = [(1, 500, 0, 600, 9)]
    boxes["2.png"] = [(2, -50, -50, 600, 90)]
    boxes["3.png"] = [(0, -0.5, 0, 97, 64.5)]  # rounded
    found = evaluate(colours(), files(photos), boxes, settings=FAST)
    assert [item.name for item in found.items] == ["3.png", "4.png", "5.png"]
    assert found.notes[0].startswith("2 image(s) are left out, having no usable box")
    first, second, third = found.problems
    assert "0.png is not a picture" in first
    assert "lies outside of the image, which has 96 x 64 pixels" in second
    assert "reaches beyond the image, which has 96 x 64 pixels" in third


def test_a_method_of_ones_own_is_measured_beside_ours(photos: Path) -> None:
    network = colours()

    def by_us(module: nn.Module, image: torch.Tensor, target: int) -> torch.Tensor:
        preprocess = network.preprocess
        return hysm.explain(module, image, target, preprocess=preprocess).saliency[0]

    found = evaluate(network, files(photos), methods=["evidence", by_us], settings=FAST)
    assert list(found.values) == ["evidence", "by_us"]
    ours, same = ({**found.values[name], "time": {}} for name in found.values)
    assert ours == same

    def gradient(module: nn.Module, image: torch.Tensor, target: int) -> torch.Tensor:
        image = image.clone().requires_grad_()
        module(image)[0, target].backward()
        assert image.grad is not None
        return image.grad[0].abs().sum(0)

    assert "gradient" in evaluate(network, files(photos), methods=[gradient], settings=FAST).values
    unnamed = [lambda *_: None, lambda *_: None]
    with pytest.raises(InputError, match="several are called <lambda>"):
        evaluate(network, files(photos), methods=unnamed, settings=FAST)

    def empty(module: nn.Module, image: torch.Tensor, target: int) -> torch.Tensor:
        return image[0, 0] * torch.nan

    with pytest.raises(InputError, match="empty made a map with NaN"):
        evaluate(network, files(photos), methods=[empty], settings=FAST)

    def narrow(module: nn.Module, image: torch.Tensor, target: int) -> torch.Tensor:
        return image[0, 0, :, :5]

    with pytest.raises(InputError, match=r"narrow made a map of the shape \(\d+, 5\)"):
        evaluate(network, files(photos), methods=[narrow], settings=FAST)


def test_a_single_score_is_refused(photos: Path) -> None:
    network = colours()

    class Single(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores: torch.Tensor = network.module(x)
            return scores[:, :1]

    with pytest.raises(ModelError, match="has a single score, and the measures compare classes"):
        evaluate(Single().eval(), files(photos), preprocess=network.preprocess)


def test_boxes_for_an_image_of_another_size_are_refused(photos: Path, tmp_path: Path) -> None:
    folder = voc_folder(tmp_path)
    turned = folder / "2.xml"
    turned.write_text(turned.read_text().replace("<width>96</width>", "<width>64</width>"))
    found = evaluate(colours(), files(photos), folder, settings=FAST)
    assert len(found.items) == 5
    (problem,) = found.problems
    assert (
        "2.xml, object 1: it is for an image of 64 x 64 pixels, and the image has 96 x 64"
        in problem
    )


@pytest.mark.parametrize("kind", KINDS)
def test_fractions_are_told_from_pixels(photos: Path, tmp_path: Path, kind: str) -> None:
    made = KINDS[kind](tmp_path)
    if kind == "csv":
        made.write_text("file,class,x0,y0,x1,y1\n0.png,red,.1,.1,.5,.6\n1.png,green,0,0,1,1\n")
    elif kind == "coco":
        content = json.loads(made.read_text())
        for one in content["annotations"]:
            one["bbox"] = [0.1, 0.1, 0.9, 0.5]
        made.write_text(json.dumps(content))
    else:
        for path in made.iterdir():
            text = path.read_text()
            for side, share in (("xmin", 0.1), ("ymin", 0.1), ("xmax", 0.5), ("ymax", 0.9)):
                text = re.sub(rf"<{side}>\d+", f"<{side}>{share}", text)
            path.write_text(text)
    (photos / "0.png").write_bytes(b"")  # another size is as good
    with pytest.raises(InputError, match=r"all others lie within 0\.\.1, .*multiply x by the ph"):
        evaluate(colours(), files(photos), made, settings=FAST)


def test_a_box_of_a_pixel_is_one_beside_others_and_in_a_tiny_photo(
    photos: Path, tmp_path: Path
) -> None:
    boxes = {"0.png": [(0, *box_of(0))], "1.png": [(1, 0, 0, 1, 1)]}
    assert len(evaluate(colours(), files(photos), boxes, settings=FAST).items) == 2
    Image.new("RGB", (2, 2), "red").save(tmp_path / "tiny.png")
    tiny = {"tiny.png": [(0, 0, 0, 1, 1)]}
    assert len(evaluate(colours(), [tmp_path / "tiny.png"], tiny, settings=FAST).items) == 1


def test_grids_are_measured_where_four_classes_are_sure(photos: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((*PHOTO, 3), np.uint8)).save(photos / "black.png")

    class Sure(Colours):
        def forward(self, x: Tensor) -> Tensor:
            return 9 * super().forward(x)

    network = hysm.Network("sure", Sure().eval(), hysm.Preprocess((SIZE, SIZE)), None)
    settings = Settings(steps=2, road=False, second=False, randomised=False)
    found = evaluate(network, files(photos), settings=settings, grids=3)
    assert len(found.values["evidence"]["grid"]) == 3
    assert found.notes == ()
    assert "3 grids" in found.table()

    class Fixed(Sure):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(-1, 3, SIZE, SIZE))

    network = hysm.Network("fixed", Fixed().eval(), hysm.Preprocess((SIZE, SIZE)), None)
    found = evaluate(network, files(photos), settings=settings, grids=3)
    assert found.summary["evidence"]["grid"] is None
    (note,) = found.notes
    assert note.startswith("GridPG is left out: the network does not take four images in one")


@pytest.mark.parametrize(
    "ending",
    [
        *(nn.Identity(), nn.Softmax(1), nn.Sigmoid(), nn.LogSoftmax(1)),
        Made(lambda scores: 100 * scores.softmax(1)),
        Made(lambda scores: (scores.softmax(1) + 1e-3).log()),
    ],
)
def test_probabilities_are_what_the_explanation_says(ending: nn.Module, photos: Path) -> None:
    module = nn.Sequential(Colours(), ending).eval()
    network = hysm.Network("ends", module, hysm.Preprocess((SIZE, SIZE)), None)
    found = evaluate(network, files(photos)[:2], settings=FAST, grids=0)
    for item, path in zip(found.items, files(photos), strict=False):
        explanation = hysm.explain(network, path)
        assert item.target == explanation.target[0]
        assert item.probability == pytest.approx(explanation.probability[0], abs=1e-6)


def test_the_answer_is_the_models_where_classes_are_masked(photos: Path) -> None:
    mask = torch.tensor([0.0, 1, 1, 1])  # red can't be answered
    module = nn.Sequential(Colours(), Made(lambda scores: scores.softmax(1) * mask)).eval()
    network = hysm.Network("masked", module, hysm.Preprocess((SIZE, SIZE)), None)
    found = evaluate(network, files(photos), settings=FAST, grids=0)
    for item, path in zip(found.items, files(photos), strict=True):
        assert item.target == hysm.explain(network, path).target[0] != 0


def test_results_are_saved(photos: Path, tmp_path: Path) -> None:
    found = evaluate(
        colours(),
        files(photos),
        csv_file(tmp_path),
        settings=FAST,
        methods=["evidence", "seed:attention"],
    )
    table, summary = found.save(tmp_path / "a" / "b")
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    assert len(rows) == 12
    assert [row["file"] for row in rows[:6]] == [f"{i}.png" for i in range(6)]
    assert rows[7]["method"] == "seed:attention"
    assert float(rows[0]["energy"]) > 0.9
    assert rows[0]["road"] == ""
    content = json.loads(summary.read_text())
    for method, means in found.summary.items():
        mine = content["measures"][method]["energy"]
        assert (mine["mean"], mine["low"], mine["high"]) == means["energy"]
        assert mine["n"] == 6
    assert content["measures"]["evidence"]["road"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "There are no images"),
        ({"images": "photos"}, "images are paths"),
        ({"images": ["a/x.png", "b/x.png"]}, "have one name"),
        ({"methods": []}, "no method to measure"),
        ({"methods": ["magic"]}, "There is no method 'magic'"),
        ({"methods": ["seed:heat"]}, "it is saliency or attention"),
        ({"model": Colours().eval()}, "How a photo becomes the input"),
        ({"images": ["nowhere.png"]}, "No image can be measured. There is no file nowhere.png"),
    ],
)
def test_arguments_that_cannot_be_used(change: dict[str, Any], message: str, photos: Path) -> None:
    given: dict[str, Any] = {"model": colours(), "images": files(photos), **change}
    with pytest.raises((InputError, ModelError), match=message):
        evaluate(**given)


def test_a_module_is_measured_with_its_preprocessing_beside_it(photos: Path) -> None:
    network = colours()
    options: dict[str, Any] = {"limit": 2, "grids": 0, "settings": FAST}
    found = evaluate(
        network.module,
        files(photos),
        preprocess=network.preprocess,
        classes=network.classes,
        **options,
    )
    expected = evaluate(network, files(photos), **options)
    assert found.labels == expected.labels
    mine, theirs = found.values["evidence"], expected.values["evidence"]
    assert {**mine, "time": {}} == {**theirs, "time": {}}


def test_a_model_that_cannot_be_explained_ends_at_once(photos: Path) -> None:
    network = colours()
    network.module.train()
    with pytest.raises(ModelError, match="training mode"):
        evaluate(network, files(photos))


# -- scoring --------------------------------------------------------------------------------------


def item(
    name: str, boxes: list[list[float]] | None, probability: float = 1, target: int = 0
) -> Item:
    rows = None if boxes is None else np.array(boxes, float)
    return Item(name, torch.zeros(3, SIZE, SIZE), target, 1, probability, rows)


def test_an_object_is_small_below_a_quarter_of_the_image() -> None:
    assert item("a", [[0, 0, SIZE / 2, SIZE / 2 - 1]]).small
    assert not item("b", [[0, 0, SIZE / 2, SIZE / 2]]).small
    assert not item("c", None).small


def test_values_leave_out_what_was_not_measured() -> None:
    items = [item("a", [[0, 0, 8, 8]]), item("b", None), item("c", [[0, 0, 32, 32]])]
    curve = [1.0] * 37
    scores = [
        {"pointing": 1.0, "energy": 0.5, "boxes": curve, "insertion": 0.3},
        {"insertion": 0.5},
        {"pointing": 0.0, "energy": 0.3, "boxes": [0.0] * 37, "insertion": 0.1, "road": 0.2},
    ]
    found = values(items, scores, [{"grid": 0.9}, {"grid": 0.7}])
    assert found["insertion"] == {"a": 0.3, "b": 0.5, "c": 0.1}
    assert found["pointing"] == {"a": 1, "c": 0}
    assert found["small_pointing"] == {"a": 1}
    assert found["box"] == {"a": 1, "c": 0}
    assert found["box_mean"] == {"a": 1, "c": 0}
    assert found["small_box"] == {"a": 1}
    assert found["road"] == {"c": 0.2}
    assert found["randomised"] == {}
    assert list(found["grid"].values()) == [0.9, 0.7]
    means = summarise(items, scores)
    assert means["energy"].mean == pytest.approx(0.4)
    assert means["grid"] is None
    with pytest.raises(InputError, match="one name"):
        summarise([items[0], items[0]], scores[:2])


def test_distances_shrink_with_the_image() -> None:
    dot = torch.zeros(SIZE, SIZE)
    dot[20, 20] = 1

    def predict(batch: Tensor) -> Tensor:
        return batch.new_full((len(batch), 2), 0.5)

    def found(gap: int) -> float:
        boxed = item("a", [[0, 0, 21 - gap, 21 - gap]])
        settings = Settings(steps=1, road=False, second=False)
        return score_image(predict, lambda x, target: dot, boxed, settings)["pointing"]

    # 15 px of 224 are 2.1 of 32.
    assert [found(gap) for gap in (1, 2, 3)] == [1, 1, 0]


def test_time_is_a_multiple_of_a_bare_pass() -> None:
    def wait(seconds: float) -> Callable[..., Tensor]:
        def call(batch: Tensor, target: int = 0) -> Tensor:
            time.sleep(seconds)
            return batch.new_ones(len(batch), 2) if batch.dim() == 4 else batch[0]

        return call

    settings = Settings(steps=1, road=False, second=False)
    found = score_image(wait(0), wait(0.2), item("a", None), settings, bare=wait(0.05))
    assert found["forward"] >= 0.05
    assert found["seconds"] >= 0.2
    assert found["time"] == found["seconds"] / found["forward"]


def test_grids_take_four_sure_classes() -> None:
    sure = [item(str(i), None, 0.95, target=i) for i in range(4)]
    assert len(make_grids(sure, 5)) == 5
    assert make_grids([*sure[:3], item("x", None, 0.8, 3)], 5) == []
    assert make_grids([*sure[:3], item("x", None, 0.95, 2)], 5) == []
    for grid in make_grids(sure, 5):
        assert sorted(grid.targets) == [0, 1, 2, 3]
        assert grid.input.shape == (3, 2 * SIZE, 2 * SIZE)


# -- randomisation --------------------------------------------------------------------------------


def test_only_the_last_layer_is_shuffled() -> None:
    module = Colours().eval()
    before = {name: item.clone() for name, item in module.state_dict().items()}
    other = randomised(module, torch.rand(1, 3, 8, 8))
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, before[name])  # the network itself is left alone
        if name != "tail.2.weight":
            assert torch.equal(weight, other.state_dict()[name])
    shuffled = other.state_dict()["tail.2.weight"]
    assert not torch.equal(shuffled, before["tail.2.weight"])
    assert torch.equal(
        shuffled.flatten().sort().values, before["tail.2.weight"].flatten().sort().values
    )
    again = randomised(module, torch.rand(1, 3, 8, 8))
    assert torch.equal(again.state_dict()["tail.2.weight"], shuffled)


def test_the_last_layer_is_the_last_that_runs() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(4, 4, 1)
            self.first = nn.Conv2d(3, 4, 1)
            self.unused = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.relu(self.last(self.first(x))).mean((2, 3))

    module = Odd().eval()
    other = randomised(module, torch.rand(1, 3, 8, 8))
    changed = [
        name
        for name, weight in module.named_parameters()
        if not torch.equal(weight, other.get_parameter(name))
    ]
    assert changed == ["last.weight"]


def test_a_network_without_weights_cannot_be_randomised() -> None:
    with pytest.raises(ModelError, match="no layer to randomise"):
        randomised(nn.Flatten().eval(), torch.rand(1, 3, 4, 4))


# -- command line ---------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("howyouseeme.models.load_model", lambda *args, **options: colours())
    return lambda *words: CliRunner().invoke(cli.main, ["evaluate", *map(str, words)])


def test_command_prints_a_table_and_writes_files(
    run: Callable[..., Result], photos: Path, tmp_path: Path
) -> None:
    boxes = csv_file(tmp_path)
    found = run("--images", photos, "--boxes", boxes, "--methods", "evidence,seed", "--out", "made")
    assert found.exit_code == 0, found.output
    assert "evidence" in found.stdout
    assert "energy (high is good)" in found.stdout
    assert "1.000 (1.000 to 1.000)" in found.stdout
    assert (tmp_path / "made" / "evaluation.csv").is_file()
    assert json.loads((tmp_path / "made" / "evaluation.json").read_text())["images"] == 6


def test_command_says_by_its_status_that_something_was_left_out(
    run: Callable[..., Result], photos: Path, tmp_path: Path
) -> None:
    (photos / "0.png").write_bytes(b"")
    found = run("--images", photos, "--limit", 2, "--grids", 0)
    assert found.exit_code == 1
    assert "0.png is empty" in found.stderr
    assert "2 images" in found.stdout


def test_command_counts_photos_left_out_on_purpose_as_no_failure(
    run: Callable[..., Result], photos: Path, tmp_path: Path
) -> None:
    rows = ["file,class,x0,y0,x1,y1", "0.png,red,1,1,9,9", "1.png,red,1,1,9,9"]  # 1 is green
    (tmp_path / "few.csv").write_text("\n".join(rows))
    found = run("--images", photos, "--boxes", tmp_path / "few.csv", "--grids", 0)
    assert found.exit_code == 0, found.output
    assert "4 image(s) without boxes are left out" in found.stderr
    assert "1 image(s) are left out, having no usable box" in found.stderr


def test_command_takes_another_input_size(
    run: Callable[..., Result], photos: Path, tmp_path: Path
) -> None:
    found = run("--images", photos, "--limit", 1, "--size", "16x24", "--out", "made")
    assert found.exit_code == 0, found.output
    content = json.loads((tmp_path / "made" / "evaluation.json").read_text())
    assert content["input_shape"] == [3, 16, 24]


def test_command_names_what_is_wrong(
    run: Callable[..., Result], photos: Path, tmp_path: Path
) -> None:
    found = run("--images", photos, "--methods", "magic")
    assert found.exit_code == 2
    assert "There is no method 'magic'" in found.stderr
    found = run("--images", tmp_path / "nowhere")
    assert found.exit_code == 2


class Flat(nn.Module):
    """Scores of a picture that has contrast, of a softmax that is not the last call; else no numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.made = nn.Sequential(
            nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        contrast = x.flatten(1).std(1, keepdim=True)
        contrast = contrast * (contrast > 0.12)
        return (self.head(self.made(x)) * (contrast / contrast)).softmax(1)[:, :3]


def test_no_numbers_for_a_changed_image_are_told_and_the_others_go_on() -> None:
    network = hysm.Network("mine", Flat().eval(), hysm.Preprocess((48, 48)))
    photos = [Path(hysm.sample_photo(name)) for name in ("cat", "coffee")]
    found = evaluate(network, photos, methods=["evidence"], grids=0)
    assert len(found.items) == 2
    assert found.problems
    assert all("NaN or infinity, first made by aten.div" in problem for problem in found.problems)


def test_scores_without_a_batch_axis_are_those_of_the_image() -> None:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = Flat()

        def forward(self, x: Tensor) -> Tensor:
            return self.whole.head(self.whole.made(x)).squeeze()

    network = hysm.Network("mine", Squeezed().eval(), hysm.Preprocess((48, 48)))
    photo = Path(hysm.sample_photo("coffee"))
    (item,) = evaluate(network, [photo], methods=["evidence"], grids=0, settings=FAST).items
    explained = hysm.explain(network, photo)
    assert item.target == explained.target[0]
    assert item.probability == pytest.approx(explained.probability[0])


def test_boxes_given_as_rows_are_read_as_those_of_a_file(photos: Path, tmp_path: Path) -> None:
    rows = {f"{i}.png": [(COLOURS[i % 3], *box_of(i))] for i in range(6)}
    mine = evaluate(colours(), files(photos), rows, settings=FAST, grids=0)
    theirs = evaluate(colours(), files(photos), csv_file(tmp_path), settings=FAST, grids=0)
    assert mine.values["evidence"]["energy"] == theirs.values["evidence"]["energy"]
    by_index = {f"{i}.png": [(np.int64(i % 3), *map(float, box_of(i)))] for i in range(6)}
    again = evaluate(colours(), files(photos), by_index, settings=FAST, grids=0)
    assert again.values["evidence"]["energy"] == theirs.values["evidence"]["energy"]


def test_rows_that_cannot_be_used_are_told(photos: Path) -> None:
    rows = {f"{i}.png": [(COLOURS[i % 3], *box_of(i))] for i in range(3)}
    rows |= {
        "3.png": [(0, 1, 2)],
        "4.png": [("lamp", 0, 0, 4, 4)],
        "5.png": [(1, 0, 0, float("nan"), 4)],
    }
    found = evaluate(colours(), files(photos), rows, settings=FAST, grids=0)
    told = " ".join(found.problems)
    assert "the boxes of 3.png: (0, 1, 2) is no class with" in told
    assert "no class 'lamp'" in told
    assert "the boxes of 5.png: a corner is not a finite number" in told
    assert [item.name for item in found.items] == ["0.png", "1.png", "2.png"]


def test_one_method_is_a_list_of_one(photos: Path) -> None:
    with pytest.raises(InputError, match=r"give \['evidence'\]"):
        evaluate(colours(), files(photos), methods="evidence")


def test_another_default_device_changes_nothing(photos: Path) -> None:
    network, boxes = colours(), csv_file(photos.parent)

    def measured() -> dict[str, Any]:
        return {
            **evaluate(network, files(photos), boxes, grids=0).values["evidence"],
            "time": {},
        }

    usual = measured()
    with torch.device("meta"):
        assert measured() == usual
