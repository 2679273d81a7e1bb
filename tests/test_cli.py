from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import howyouseeme
from howyouseeme import Explainer, cli, draw, sample_photo
from howyouseeme.cli import explain as explain_of
from howyouseeme.cli import photos as photos_of
from howyouseeme.cli import program
from howyouseeme.cli.network import DEFAULT_MODEL
from howyouseeme.cli.photos import find_photos
from howyouseeme.draw import percent

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(cli.main, [str(word) for word in words])


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    source = Path(sample_photo())
    return Path(shutil.copy(source, tmp_path / f"photo{source.suffix}"))


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module in the current folder, with functions for --model."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "my_factories.py"
    path.write_text("""
import torch
from torch import nn
from howyouseeme import Network, Preprocess

def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, 2))

def network():
    return Network("pets", module(), Preprocess((16, 16)), ("cat", "dog"))

def single():
    return Network("single", nn.Sequential(module(), nn.Linear(2, 1)), Preprocess((16, 16)))

def places():
    return Network("places", nn.Conv2d(3, 4, 3), Preprocess((16, 16)))

class Finds(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.score = nn.Conv2d(3, 2, 4, 4)

    def forward(self, x):
        scores = self.score(x).flatten(2).sigmoid()
        middle = torch.arange(16.0) % 4 * 4 + 2
        place = torch.stack([middle, middle.reshape(4, 4).T.flatten(), middle * 0 + 4, middle * 0 + 4])
        return torch.cat([place[None], scores], 1)

def detector():
    return Network("finds", Finds(), Preprocess((16, 16), resize="fit"), ("cat", "dog"))

def deaf():
    made = network()
    nn.init.zeros_(made.module[4].weight)
    return made
""")
    yield path
    sys.modules.pop(path.stem, None)


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,
    )


# Without a network


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--version"], ["explain", "--help"]])
def test_help_and_version_import_nothing_heavy(words: list[str]) -> None:
    code = f"""
import sys
from howyouseeme.cli import main
try:
    main({words!r})
finally:
    heavy = {{"torch", "numpy", "PIL", "matplotlib"}} & set(sys.modules)
    print("heavy:", sorted(heavy), file=sys.stderr)
"""
    done = python("-c", code)
    assert done.returncode == 0
    assert done.stdout
    assert done.stderr == "heavy: []\n"


def test_version(run: Run) -> None:
    assert howyouseeme.__version__ in run("--version").output


def test_no_photo_suggests_the_demo(run: Run) -> None:
    result = run("explain")
    assert result.exit_code == 2
    assert "howyouseeme demo" in result.stderr


def test_empty_folder_is_a_usage_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no photo")
    result = run("explain", "empty")
    assert result.exit_code == 2
    assert "no photo in the folder empty, nor in those inside" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["explain", "x.jpg", "--k", "3"],
        ["explain", "x.jpg", "--method", "seed", "--nodes", "3"],
        ["explain", "x.jpg", "--nodes", "0"],
        ["explain", "x.jpg", "--method", "seed", "--k", "0"],
        ["explain", "x.jpg", "--method", "magic"],
        ["explain", "x.jpg", "--weights", "missing.pth"],
        ["explain", "x.jpg", "--no-such-option"],
        ["no-such-command"],
    ],
)
def test_wrong_options_are_usage_errors(run: Run, words: list[str]) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr
    assert not Path("howyouseeme-out").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["explain", ""], "It is empty: name a photo or a folder."),
        (["detect", "x.jpg", ""], "It is empty: name a photo or a folder."),
        (["explain", "x.jpg", "--out", ""], "It is empty: name a folder."),
        (["track", "x.mp4", "--target", "cat", "--out", ""], "It is empty: name a folder."),
        (["explain", "x.jpg", "--out", "o/why.png"], "o/why.png is named as a file"),
        (["explain", "x.jpg", "--out", "s3://b/c"], "s3://b/c is an address: name a folder here."),
        (["watch", ""], "It is empty: name a video, a folder of frames, or a webcam."),
        (["evaluate", "--images", ""], "Directory '' does not exist."),
        (["propose", "https://x.org/a.jpg"], "https://x.org/a.jpg is an address: download it"),
        (["watch", "RTSP://x.org/a"], "RTSP://x.org/a is an address: download it first, and give"),
    ],
)
def test_what_is_no_path_is_a_usage_error(
    run: Run, photo: Path, words: list[str], sentence: str
) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert list(Path().iterdir()) == [Path(photo.name)]


def test_what_is_like_another_photo(run: Run, photo: Path) -> None:
    with Image.open(sample_photo("cat")) as cat, Image.open(sample_photo("coffee")) as cup:
        both = Image.new("RGB", (600, 300))
        both.paste(cat.resize((300, 300)), (0, 0))
        both.paste(cup.resize((300, 300)), (300, 0))
    both.save("both.png")
    for name, left in (("cat", True), ("coffee", False)):
        result = run("explain", "both.png", "--like", sample_photo(name), "--maps", "--out", "o")
        assert result.exit_code == 0, result.output
        assert f"likeness to {name}.jpg → " in result.stdout
        with np.load(f"o/both.likeness-to-{name}-jpg.npz") as maps:
            seen = maps["saliency"]
        assert (seen[:, :300].sum() > 0.8 * seen.sum()) == left
    for more in (["--target", "tabby"], ["--box", 0], ["--check"]):
        wrong = run("explain", photo, "--like", photo, *more)
        assert wrong.exit_code == 2
        assert "--like go" in wrong.stderr
    missing = run("explain", photo, "--like", "none.jpg")
    assert missing.exit_code == 2
    assert "There is no file none.jpg" in missing.stderr


@pytest.mark.filterwarnings("default")
def test_a_warning_is_a_line(run: Run, photo: Path) -> None:
    with Image.open(photo) as picture:
        picture.save("two.tif", save_all=True, append_images=[picture.copy()])
    usual = warnings.showwarning
    result = run("detect", "two.tif")
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stderr.splitlines() if "pages" in line]
    assert line.startswith("warning: two.tif has 2 pages, of which the first is taken")
    assert ".py" not in result.stderr
    assert warnings.showwarning is usual


def test_a_folder_stands_for_its_photos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("b.JPG", "a.png", "c.txt", ".hidden.png", "d.webp"):
        (tmp_path / name).touch()
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "e.png").touch()
    again = tmp_path / "deeper" / ".." / "a.png"
    found = find_photos([tmp_path / "d.webp", tmp_path, again])
    assert [path.name for path in found] == ["d.webp", "a.png", "b.JPG"]  # each of them once
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path}: 2 of 5 skipped; read are files that end in .bmp .gif ")
    assert "heic" not in said
    (tmp_path / "f.HEIC").touch()
    find_photos([tmp_path])
    assert capsys.readouterr().err.endswith("; convert .heic to .jpg\n")


def test_on_a_terminal_what_goes_on_takes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    for line in ("1 of 2", "2 of 2", ""):
        program.show(line)
    assert shown.getvalue() == "\r\x1b[K1 of 2\r\x1b[K2 of 2\r\x1b[K"
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    program.show("1 of 2")
    assert not file.getvalue()


def test_a_folder_of_folders_stands_for_the_photos_in_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As data sets have one for each class."""
    for name in (
        "dog/1.png",
        "cat/2.jpg",
        "cat/1.jpg",
        "cat/deep/3.gif",
        "cat/a.txt",
        ".git/4.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_photos([tmp_path])]
    assert found == ["cat/1.jpg", "cat/2.jpg", "cat/deep/3.gif", "dog/1.png"]
    # Nor are those that were made of them.
    monkeypatch.chdir(tmp_path)
    for name in ("howyouseeme-out/cat-1.png", "made/cat-1.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert len(find_photos([Path()], Path("made"))) == 4
    capsys.readouterr()
    find_photos([tmp_path], tmp_path / "made")
    assert capsys.readouterr().err == f"{tmp_path}: 4 photos in 3 subfolders\n"


def test_names_never_collide() -> None:
    files = [Path(p) for p in ("a/x.jpg", "b/x.jpg", "b/X.png", "c/y.v2.jpg", "a-x.png", "a/x.gif")]
    names = photos_of._output_names(files)
    assert names == ["a-x-jpg", "b-x-jpg", "b-X-png", "y.v2", "a-x", "a-x-gif"]
    assert len({name.casefold() for name in names}) == len(files)


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["grey16.png", "grey16.tif"], ["grey16-png", "grey16-tif"]),
        (["a/x.jpg", "b/x.png"], ["a-x", "b-x"]),
        (["x.jpg", "x.JPG", "x-jpg.png"], ["x-jpg-2", "x-jpg-3", "x-jpg"]),
        (["x", "x.jpg"], ["x", "x-jpg"]),
    ],
)
def test_names_tell_what_differs(files: list[str], names: list[str]) -> None:
    assert photos_of._output_names([Path(file) for file in files]) == names


@pytest.mark.parametrize(
    ("label", "slug"),
    [
        ("tabby", "tabby"),
        ("Egyptian cat, a/b\\c", "egyptian-cat-a-b-c"),
        ("../..", "class"),
        ("x" * 99, "x" * 40),
    ],
)
def test_slug_is_fit_for_a_file_name(label: str, slug: str) -> None:
    assert explain_of._slug(label) == slug


@pytest.mark.parametrize("word", ["--help", "models"])
def test_a_closed_pipe_is_silent(word: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "howyouseeme", word],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
            check=False,
        )
    finally:
        os.close(writing)
    assert "Traceback" not in done.stderr
    assert "rror" not in done.stderr
    assert done.returncode == 1


# With the real network


def test_models(run: Run) -> None:
    result = run("models")
    assert result.exit_code == 0
    assert DEFAULT_MODEL in result.output.split()


def test_classes(run: Run, factories: Path) -> None:
    assert len(run("classes").stdout.splitlines()) == 1000
    assert run("classes", "TABBY").stdout == " 281  tabby\n"
    assert run("classes", "t", "--model", f"{factories.stem}:network").stdout == "0  cat\n"
    for words, sentence in [
        (["qqqq"], "efficientnet-lite0 has no class with 'qqqq' in its name."),
        (["--model", f"{factories.stem}:module"], "give --target the index of a class."),
        (["--model", "qqqq"], "`howyouseeme models` lists them"),
    ]:
        result = run("classes", *words)
        assert result.exit_code == 2
        assert sentence in result.stderr


def test_a_factory_in_the_current_folder(run: Run, photo: Path, factories: Path) -> None:
    result = run("explain", photo, "--model", f"{factories.stem}:network", "--target", "dog")
    assert result.exit_code == 0, result.output
    assert Path("howyouseeme-out/photo.dog.png").exists()


def test_a_photo_may_be_named_as_if_it_were_two(run: Run, photo: Path, factories: Path) -> None:
    result = run("explain", photo.rename("cat.png.jpg"), "--model", f"{factories.stem}:network")
    assert result.exit_code == 0, result.output
    assert Path("howyouseeme-out/cat.png.json").exists()


def test_a_box_of_a_detector(run: Run, photo: Path, factories: Path) -> None:
    model = ["--model", f"{factories.stem}:detector"]
    result = run("explain", photo, *model, "--box", 1, "--out", "out")
    assert result.exit_code == 0, result.output
    found = re.search(r"→ ((?:cat|dog), box 1) [\d.]+% → (\S+)", result.stdout)
    assert found
    assert found[2] == str(Path("out") / f"photo.{found[1].replace(', box ', '-box-')}.png")
    target = json.loads(Path(found[2]).with_suffix(".json").read_text())["target"]
    assert target["label"] == found[1]
    x0, y0, x1, y1 = target["box"]
    width, height = Image.open(photo).size
    assert 0 <= x0 < x1 <= width
    assert 0 <= y0 < y1 <= height
    told = run("explain", photo, *model)
    assert told.exit_code == 1
    assert "Of a detector ask for a box, howyouseeme.targets.box(0) or --box 0" in told.stderr
    assert "There is no box 99" in run("explain", photo, *model, "--box", 99).stderr
    both = run("explain", photo, *model, "--box", 0, "--target", "dog")
    assert both.exit_code == 2
    assert "--box goes without --target" in both.stderr


def test_the_boxes_that_a_detector_finds_itself(
    run: Run, photo: Path, factories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ["--model", f"{factories.stem}:detector"]
    drawn: list[tuple[Any, str, str]] = []
    original = draw.boxes_picture
    monkeypatch.setattr(
        draw, "boxes_picture", lambda image, boxes: drawn.extend(boxes) or original(image, boxes)
    )
    result = run("detect", photo, *model, "--own", "--out", "out")
    assert result.exit_code == 0, result.output
    told = re.findall(r"(\d+) (cat|dog) ([\d.]+)%", result.stdout)
    assert [int(number) for number, *_ in told] == list(range(len(told)))  # the best first
    assert Path("out/photo.boxes.png").exists()
    # A colour is that of a label, so the number isn't part of it.
    assert [text for *_, text in drawn] == [f"{n} {name} {p}%" for n, name, p in told]
    assert [label for _, label, _ in drawn] == [name for _, name, _ in told]
    coco = json.loads(Path("out/detections.json").read_text())
    assert len(coco["annotations"]) == len(told) > 1
    for number, label, score in told[:2]:  # the number is that of explain --box
        again = run("explain", photo, *model, "--box", number, "--out", "out")
        assert f"{label}, box {number} {score}%" in again.stdout
        made = json.loads(Path(f"out/photo.{label}-box-{number}.json").read_text())
        (mine,) = [one for one in coco["annotations"] if one["number"] == int(number)]
        x, y, width, height = mine["bbox"]
        assert made["target"]["box"] == pytest.approx([x, y, x + width, y + height], abs=0.1)
    both = run("detect", photo, *model, "--own", "--top", 2)
    assert both.exit_code == 2
    assert "--own goes without" in both.stderr
    classifier = run("detect", photo, "--model", f"{factories.stem}:network", "--own")
    assert classifier.exit_code == 1
    assert "is no detector whose answer is known" in classifier.stderr


def test_a_size_of_ones_own_keeps_the_proportions_where_the_network_does(
    factories: Path, run: Run, photo: Path
) -> None:
    words = ["explain", photo, "--out", "out", "--model"]
    for name, more, expected in (
        ("detector", ["--size", "16", "--box", "0"], ("fit", 0)),
        ("network", ["--fit"], ("fit", 114)),
        ("network", ["--size", "16"], ("squash", 0)),
    ):
        result = run(*words, f"{factories.stem}:{name}", *more)
        assert result.exit_code == 0, result.output
        (file,) = Path("out").glob("*.json")
        made = json.loads(file.read_text())["provenance"]["preprocess"]
        assert (made["resize"], made["fill"]) == expected
        file.unlink()
    result = run(*words, f"{factories.stem}:network", "--fit", "--crop-from", 20)
    assert result.exit_code == 2
    assert "give one of them" in result.stderr


def test_a_factory_without_preprocessing_stops_before_the_first_photo(
    run: Run, photo: Path, factories: Path
) -> None:
    result = run("explain", photo, "--model", f"{factories.stem}:module")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "return howyouseeme.Network(name, module, howyouseeme.Preprocess(...), cl" in line
    assert not Path("howyouseeme-out").exists()


@pytest.mark.parametrize("command", ["explain", "detect", "propose"])
def test_class_names_of_another_number_are_told_once(
    run: Run, photo: Path, factories: Path, command: str
) -> None:
    model = ["--model", f"{factories.stem}:network", "--classes", "names.txt"]
    shutil.copy(photo, "second.jpg")
    Path("names.txt").write_text("cat\ndog\nbird\n")
    result = run(command, photo, "second.jpg", *model)
    assert result.exit_code == 2
    assert result.stderr.count("names.txt has 3 names, and pets 2 scores") == 1
    assert not Path("howyouseeme-out").exists()


@pytest.mark.parametrize(
    ("factory", "names", "status"),
    [("network", 2, 0), ("single", 1, 0), ("single", 2, 0), ("single", 3, 2), ("places", 3, 1)],
)
def test_class_names_fit_the_scores(
    run: Run, photo: Path, factories: Path, factory: str, names: int, status: int
) -> None:
    Path("names.txt").write_text("\n".join("abcdef"[:names]))
    words = ["--model", f"{factories.stem}:{factory}", "--classes", "names.txt"]
    result = run("explain", photo, *words)
    assert result.exit_code == status, result.output
    assert "unexpected" not in result.stderr


def test_one_class_versus_another(run: Run, photo: Path, factories: Path) -> None:
    model = ["--model", f"{factories.stem}:network", "--out", "out"]
    result = run("explain", photo, *model, "--target", "cat", "--versus", "dog")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{photo} → cat, not dog → out")
    assert Path("out/photo.cat-not-dog.png").exists()
    result = run("explain", photo, *model, "--versus", "dog")
    assert "→ cat, not dog →" in result.stdout
    for words in (["--target", "top2", "--versus", "dog"], ["--versus", "top2"]):
        result = run("explain", photo, *model, *words)
        assert result.exit_code == 2
        assert "one class against one" in result.stderr
    result = run("explain", photo, *model, "--target", "dog", "--versus", "dog")
    assert result.exit_code == 2
    assert "--target and --versus name the same class" in result.stderr
    result = run("explain", photo, *model, "--versus", "cat")
    assert result.exit_code == 1
    assert "cat is the network's answer itself" in result.stderr


def test_a_photo_that_does_not_speak_for_the_class(run: Run, photo: Path, factories: Path) -> None:
    result = run("explain", photo, "--model", f"{factories.stem}:deaf", "--target", "dog")
    assert result.exit_code == 0, result.output
    sentence = f"{photo}: nothing in it speaks for dog more than for other classes\n"
    assert result.stderr == sentence
    assert result.stdout.startswith(f"{photo} → dog ")
    words = ["explain", photo, "--model", f"{factories.stem}:deaf", "--target", "dog", "--nodes"]
    sentence = f"{photo}: the sample of 1 node holds nothing that speaks for dog; raise --nodes\n"
    assert run(*words, 1).stderr == sentence
    assert "sample of 20 nodes holds" in run(*words, 20).stderr


def test_max_pixels(run: Run, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # put back in the end
    result = run("explain", photo, "--max-pixels", "1000")
    assert result.exit_code == 1
    assert "more than the limit of 1000" in result.stderr
    assert "--max-pixels" in result.stderr


def test_the_default_of_k_in_the_help(run: Run) -> None:
    from howyouseeme.methods import get_method  # noqa: PLC0415

    text = " ".join(run("explain", "--help").stdout.split())
    assert f"{get_method('seed').k} if not given; for --method seed" in text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--target", "no such class"], "'no such class'. `howyouseeme classes` lists them."),
        (["--target", "100000"], "100000"),
        (["--target", "top0"], "N goes from 1 to 1000"),
        (["--target", "top1001"], "N goes from 1 to 1000"),
        (["--device", "toaster"], "toaster"),
        (["--weights", "broken.pth"], "broken.pth"),
    ],
)
def test_what_cannot_work_stops_before_the_first_photo(
    run: Run, photo: Path, words: list[str], sentence: str
) -> None:
    Path("broken.pth").write_bytes(b"not weights")
    result = run("explain", photo, *words)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert "unexpected" not in result.stderr
    assert not result.stdout
    assert not Path("howyouseeme-out").exists()


def test_explain_writes_a_picture_and_numbers(run: Run, photo: Path) -> None:
    result = run("explain", photo)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    folder = Path("howyouseeme-out")
    assert sorted(path.name for path in folder.iterdir()) == ["photo.json", "photo.png"]
    with Image.open(folder / "photo.png") as picture:
        assert picture.width > 600
    json.loads((folder / "photo.json").read_text("utf-8"))
    (line,) = result.stdout.splitlines()
    path, answer, picture_path = line.split(" → ")
    assert path == str(photo)
    assert 0 < float(answer.split()[-1].strip("%<>")) <= 100
    assert Path(picture_path) == folder / "photo.png"


def test_broken_photos_do_not_stop_the_others(run: Run, photo: Path) -> None:
    Path("broken.jpg").write_bytes(b"not a photo")
    result = run("explain", "broken.jpg", photo, "missing.jpg", "--out", "out")
    assert result.exit_code == 1
    broken, missing, end = result.stderr.splitlines()
    assert "broken.jpg" in broken
    assert missing == "There is no file missing.jpg; check its name and folder."
    assert "unexpected" not in result.stderr
    assert end == "2 of 3 failed"
    assert Path("out/photo.png").exists()
    assert len(result.stdout.splitlines()) == 1


def test_a_loop_of_links_does_not_stop_the_others(run: Run, photo: Path) -> None:
    folder = Path("photos")
    folder.mkdir()
    shutil.copy(photo, folder / "a.png")
    try:
        (folder / "b.png").symlink_to("c.png")
        (folder / "c.png").symlink_to("b.png")
    except OSError:
        pytest.skip("this system lets no one make links")
    (folder / "c.jpg").symlink_to("c.jpg")
    result = run("explain", folder, "--out", "out")
    assert result.exit_code == 1
    *loops, end = result.stderr.splitlines()
    assert len(loops) == 3
    assert all("can't be opened" in loop and "symbolic links" in loop for loop in loops)
    assert end == "3 of 4 failed"
    assert Path("out/a.png").exists()


def test_same_names_from_two_folders(run: Run, photo: Path) -> None:
    for folder in ("a", "b"):
        Path(folder).mkdir()
        shutil.copy(photo, f"{folder}/{photo.name}")
    result = run("explain", "a", "b", "--out", "out/deep")
    assert result.exit_code == 0, result.output
    written = sorted(path.name for path in Path("out/deep").glob("*.png"))
    assert written == ["a-photo.png", "b-photo.png"]


@pytest.mark.parametrize("command", ["explain", "detect", "propose"])
def test_no_photo_that_is_read_is_replaced(run: Run, factories: Path, command: str) -> None:
    ending = {"explain": "", "detect": ".boxes", "propose": ".regions"}[command]
    for name in ("a", f"b{ending}"):
        Image.new("RGB", (20, 20)).save(f"{name}.png")
    Image.new("RGB", (20, 20)).save("b.jpg")
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    model = ["--model", f"{factories.stem}:network"]
    result = run(command, "a.png", "b.jpg", f"b{ending}.png", *model, "--out", ".")
    assert result.exit_code == 2
    replaced = "a.png" if command == "explain" else f"b{ending}.png"
    assert result.stderr == (
        f"Error: {replaced} is read, and would be replaced; name another folder (--out).\n"
    )
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


def test_no_photo_is_replaced_by_what_explains_a_class_of_another(
    run: Run, factories: Path
) -> None:
    Image.new("RGB", (20, 20)).save("a.jpg")
    Image.new("RGB", (20, 20)).save("a.dog.png")
    before = Path("a.dog.png").read_bytes()
    words = ["--model", f"{factories.stem}:network", "--target", "dog", "--out", "."]
    result = run("explain", "a.jpg", "a.dog.png", *words)
    assert result.exit_code == 1
    assert "a.jpg: a.dog.png is read, and would be replaced" in result.stderr
    assert Path("a.dog.png").read_bytes() == before
    assert Path("a.dog.dog.png").exists()


def test_boxes_that_are_read_are_not_replaced(run: Run, factories: Path) -> None:
    Path("photos").mkdir()
    Image.new("RGB", (20, 20)).save("photos/a.png")
    Path("evaluation.csv").write_text("file,class,x0,y0,x1,y1\na.png,cat,0,0,9,9\n")
    words = ["--images", "photos", "--boxes", "evaluation.csv", "--out", "."]
    result = run("evaluate", *words, "--model", f"{factories.stem}:network")
    assert result.exit_code == 2
    assert "evaluation.csv is read, and would be replaced" in result.stderr


@pytest.mark.parametrize("command", ["detect", "propose"])
def test_no_picture_is_left_half_written(
    run: Run, factories: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    Image.new("RGB", (20, 20)).save("a.png")
    Path("out").mkdir()
    for ending in ("boxes", "regions"):
        Path(f"out/a.{ending}.png").write_bytes(b"before")
    monkeypatch.setattr(Path, "replace", interrupted)
    result = run(command, "a.png", "--model", f"{factories.stem}:network", "--out", "out")
    assert result.exit_code == 130
    assert {path.read_bytes() for path in Path("out").iterdir()} == {b"before"}


def test_names_as_long_as_they_can_be(run: Run, factories: Path) -> None:
    names = ["x" * 251, "x" * 250 + "y", "ü" * 125]
    for name in names:
        Image.new("RGB", (20, 20)).save(f"{name}.png")
    words = ["--model", f"{factories.stem}:network", "--target", "dog", "--out", "out"]
    result = run("explain", *(f"{name}.png" for name in names), *words)
    assert result.exit_code == 0, result.output
    assert len(list(Path("out").iterdir())) == 2 * len(names)


def test_top_classes_and_one_class(run: Run, photo: Path) -> None:
    result = run("explain", photo, "--target", "top2", "--out", "out")
    assert result.exit_code == 0, result.output
    lines = [line.split(" → ") for line in result.stdout.splitlines()]
    labels = [answer.rsplit(" ", 1)[0] for _, answer, _ in lines]
    first, second = labels
    assert first != second
    expected = [f"photo.{i}-{explain_of._slug(label)}" for i, label in enumerate(labels, start=1)]
    assert [Path(path).name for *_, path in lines] == [f"{name}.png" for name in expected]
    on_disk = sorted(path.name for path in Path("out").iterdir())
    assert on_disk == sorted(name + end for name in expected for end in (".json", ".png"))

    result = run("explain", photo, "--target", second, "--out", "out")
    assert result.exit_code == 0, result.output
    assert f" → {second} " in result.stdout
    assert result.stdout.rstrip().endswith(f"photo.{explain_of._slug(second)}.png")
    assert Path("out", f"{expected[1]}.png").exists()  # nothing was replaced


def test_seed_takes_k_and_layers_make_the_picture_taller(run: Run, photo: Path) -> None:
    plain = run("explain", photo, "--method", "seed", "--k", "2", "--out", "plain")
    layers = run("explain", photo, "--method", "seed", "--k", "2", "--layers", "--out", "layers")
    assert plain.exit_code == layers.exit_code == 0, plain.output + layers.output
    pictures = ("plain/photo.seed.png", "layers/photo.seed.png")
    with Image.open(pictures[0]) as less, Image.open(pictures[1]) as more:
        assert less.width == more.width
        assert less.height < more.height


def test_evidence_takes_nodes(run: Run, photo: Path) -> None:
    result = run("explain", photo, "--nodes", "50", "--out", "few")
    assert result.exit_code == 0, result.output
    told = json.loads(Path("few", "photo.json").read_text())
    assert told["provenance"]["parameters"]["nodes"] == 50


def test_demo(run: Run) -> None:
    result = run("demo", "--out", "shown")
    assert result.exit_code == 0, result.output
    pictures = sorted(str(path) for path in Path("shown").glob("*.png"))
    assert pictures
    told, further = result.stdout.split("\n\n")
    assert [line.split(" → ")[-1] for line in told.splitlines()] == pictures
    # What it says to do next can be done.
    command = shlex.split(further.splitlines()[-1])
    result = run(*command[1:])
    assert result.exit_code == 0, result.output
    assert "drilling platform 56.4%, missile 5.8%" in result.stdout


def test_the_answer_is_checked_on_the_photo_changed(run: Run) -> None:
    result = run("explain", sample_photo("cat"), "--target", "Egyptian cat", "--check")
    assert result.exit_code == 0, result.output
    _, *lines = result.stdout.splitlines()
    explainer = Explainer("efficientnet-lite0")
    explanation = explainer(sample_photo("cat"), target="Egyptian cat")
    photos = {
        "as it is": sample_photo("cat"),
        "without that evidence": explanation.hidden(),
        "with it alone": explanation.hidden(others=True),
    }
    assert len(lines) == len(photos)
    for line, (name, photo) in zip(lines, photos.items(), strict=True):
        asked, top = explainer.many(photo, ["Egyptian cat", None])
        answers = [asked] if top.target == asked.target else [asked, top]
        told = [f"{one.label[0]} {percent(one.probability[0])}" for one in answers]
        assert line == f"  {name}: {', '.join(told)}"


def test_several_classes_are_checked_one_by_one(run: Run, photo: Path, factories: Path) -> None:
    model = ["--model", f"{factories.stem}:network"]
    result = run("explain", photo, *model, "--target", "top2", "--check")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("  ")] == [
        "  as it is",
        "  without that evidence",
        "  with it alone",
    ] * 2
    result = run("explain", photo, *model, "--versus", "dog", "--check")
    assert all("dog" in line for line in result.stdout.splitlines())


# When something goes wrong that nobody planned


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int = 0) -> None:
    """Let the explainer raise the error, after some photos that work."""
    from howyouseeme.explainer import Explainer  # noqa: PLC0415

    work, calls = Explainer.many, []

    def explain(self: Explainer, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) > after:
            raise error
        return work(self, *args, **kwargs)

    monkeypatch.setattr(Explainer, "many", explain)


def test_a_bug_is_one_line(run: Run, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, KeyError("two\nlines"))
    result = run("explain", photo)
    assert result.exit_code == 1
    line, end = result.stderr.splitlines()
    assert line.startswith(f"{photo}: unexpected error, please report it (KeyError: ")
    assert end == "1 of 1 failed"
    verbose = run("explain", photo, "-v")
    assert verbose.exit_code == 1
    assert "Traceback (most recent call last)" in verbose.stderr


def test_a_bug_before_the_first_photo(
    run: Run, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("howyouseeme.models.load_model", load)
    result = run("explain", photo)
    assert result.exit_code == 1
    assert result.stderr == "Error: unexpected error, please report it (ZeroDivisionError: oh)\n"
    assert "Traceback" in run("explain", photo, "-v").stderr


def test_a_full_disk_is_named(run: Run, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, OSError(28, "No space left on device", "out/photo.png"))
    result = run("explain", photo)
    assert result.exit_code == 1
    assert f"{photo}: No space left on device: out/photo.png" in result.stderr


def test_ctrl_c_keeps_what_is_written(
    run: Run, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(photo, "second.jpg")
    fail_with(monkeypatch, KeyboardInterrupt(), after=1)
    result = run("explain", photo, "second.jpg", "--out", "out")
    assert result.exit_code == 130
    assert result.stderr == "\nInterrupted; the pictures written so far are kept.\n"
    assert Path("out/photo.png").exists()
    assert len(result.stdout.splitlines()) == 1


def terminate(*_: Any, **__: Any) -> None:
    signal.raise_signal(signal.SIGTERM)


def test_what_ends_the_program_ends_it_as_ctrl_c_does(
    run: Run, factories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (20, 20)).save("a.png")
    monkeypatch.setattr(Path, "replace", terminate)
    seen: list[object] = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))  # of whoever runs us: theirs
    words = ["explain", "a.png", "--model", f"{factories.stem}:network", "--out", "out"]
    try:
        run(*words)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        result = run(*words) if seen else None
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result is not None
    assert result.exit_code == 143
    assert result.stderr == "\nInterrupted; the pictures written so far are kept.\n"
    assert not list(Path("out").iterdir())


def test_no_picture_is_said_to_be_kept_where_none_is_made(
    run: Run, factories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("photos").mkdir()
    Image.new("RGB", (20, 20)).save("photos/a.png")
    fail_with(monkeypatch, KeyboardInterrupt())
    result = run("evaluate", "--images", "photos", "--model", f"{factories.stem}:network")
    assert result.exit_code == 130
    assert result.stderr == "\nInterrupted.\n"


@pytest.mark.parametrize(
    ("count", "terminal", "bar"), [(4, True, True), (3, True, False), (4, False, False)]
)
def test_progress_bar(
    count: int, terminal: bool, bar: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def progressbar(length: int, **options: Any) -> Any:
        assert options["file"] is sys.stderr
        made.append(length)
        return original(length=length, **options)

    original = click.progressbar
    monkeypatch.setattr(click, "progressbar", progressbar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with photos_of._progress(count) as (step, clear):
        for _ in range(count):
            clear()
            step()
    assert made == ([count] if bar else [])


def test_the_package_is_a_program() -> None:
    for words in (["--version"], ["explain", "--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "howyouseeme", *words],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "howyouseeme" in done.stdout
