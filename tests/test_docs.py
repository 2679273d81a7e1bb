"""Every block of the README and the docs runs, top to bottom, page by page; and the site is built.

`python` blocks run in one namespace a page; one with `title="mine.py"` is written to that file first. Of a
`console` block each `howyouseeme` line runs as well, in a folder with the files that the pages speak of,
and prints what the page says, where it says something ('...' stands for anything), as does a `text` block of
the Python before it. Of other commands it is checked that what they ask for exists. `<!-- skip: next "reason" -->` leaves the next block out.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from sybil import Document, Example, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer
from torch import nn
from torchvision import models

import howyouseeme as hysm
from howyouseeme.cli import main
from howyouseeme.rules import family_of, rules
from howyouseeme.video import VideoWriter
from howyouseeme.web.metrics import _PATHS as PATHS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).with_suffix("").as_posix()


# -- what the blocks of each language must do --------------------------------------------------------


def python_blocks(document: Document) -> Iterator[Region]:
    lexer = FencedCodeBlockLexer(
        language=r'python(?: title="[\w./]+")?', mapping={"language": "info", "source": "source"}
    )
    for region in lexer(document):
        region.parsed = region.lexemes["source"]
        title = re.search(r'title="(.*)"', region.lexemes["info"])
        region.evaluator = run_python
        if title:
            region.evaluator = lambda example, file=title[1]: write_and_run(example, file)
        yield region


def run_python(example: Example) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        PythonEvaluator()(example)
    example.namespace["printed"] = printed.getvalue()


def write_and_run(example: Example, file: str) -> None:
    Path(file).unlink(missing_ok=True)  # it may be a link to one that other pages use
    Path(file).write_text(example.parsed, encoding="utf-8")
    run_python(example)


def run_console(example: Example) -> None:
    """Each command, with the lines below it that are not one: what it prints."""
    command, said = "", [""]
    for line in [*example.parsed.splitlines(), "$ true"]:
        if line.startswith("$ "):
            if command:
                run_command(command, "\n".join(said).strip())
            command, said = line.removeprefix("$ "), []
        elif not line.lstrip().startswith("#"):
            said.append(line)


def run_command(command: str, said: str) -> None:
    program, *words = shlex.split(command, comments=True)
    if program == "howyouseeme" and words[0] == "serve":  # goes on until it is stopped
        main.commands["serve"].make_context("serve", words[1:])
    elif program == "howyouseeme":
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, f"{command}\n{done.output}"
        assert not said or fits(done.stdout, said), f"{command}\n{done.output}"
    elif said:
        pytest.fail(f"{command}: what it prints is not tested")
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert [w for w in words if "=" not in w and w not in targets] == [], command
    elif program == "pip":
        known = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
        asked = [
            name
            for word in words
            for found in re.findall(r"\[(.*)\]", word)
            for name in found.split(",")
        ]
        assert [name for name in asked if name not in known] == [], command
    elif program == "python":
        assert (ROOT / words[0]).exists(), command
    elif program == "curl":  # the API has tests of its own; here, that there is such an address
        (path,) = re.findall(r"http://[\w.:]+(/[\w/]*)", command)
        assert path in PATHS, command
    else:
        assert program in {".", "cd", "export"}, f"{command}: the tests can't try it"


def compare_text(example: Example) -> None:
    """What the Python block before it printed."""
    printed = example.namespace["printed"]
    assert fits(printed, example.parsed), f"{example.path}:{example.line} is now\n{printed}"


def fits(printed: str, said: str) -> bool:
    """Whether it is what was said, '...' standing for anything."""
    pattern = ".*".join(re.escape(part) for part in said.strip().split("..."))
    return re.fullmatch(pattern, printed.strip(), re.S) is not None


def read_json(example: Example) -> None:
    json.loads(example.parsed)


def examples(page: Path) -> list[Example]:
    document = Document.parse(
        str(page),
        SkipParser(),
        python_blocks,
        CodeBlockParser("console", run_console),
        CodeBlockParser("text", compare_text),
        CodeBlockParser("json", read_json),
    )
    return list(document.examples())


# -- the files that the pages speak of ---------------------------------------------------------------


class Cells(nn.Module):
    """Answers as YOLOv8 does: [batch, 4 + classes, cells]."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        boxes, scores = self.head(self.features(x).relu()).flatten(2).split([4, 1], 1)
        return torch.cat([boxes.exp() * 8, scores.sigmoid()], 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader may have it: photos, a video, a network of their own in several files."""
    folder = tmp_path_factory.mktemp("files")
    photo = hysm.load_image(hysm.sample_photo("cat"))
    shutil.copy(hysm.sample_photo("cat"), folder / "photo.jpg")
    for name in ("rocket", "street"):
        shutil.copy(hysm.sample_photo("rocket"), folder / f"{name}.jpg")
    for name in ("photos", "holiday", "frames"):
        (folder / name).mkdir()
    for name in ("cat", "coffee"):
        shutil.copy(hysm.sample_photo(name), folder / "photos" / f"{name}.jpg")
    shutil.copy(hysm.sample_photo("coffee"), folder / "holiday" / "coffee.jpg")
    (folder / "boxes.csv").write_text(
        "file,class,x0,y0,x1,y1\ncat.jpg,Egyptian cat,40,0,451,300\ncoffee.jpg,espresso,100,10,400,390\n"
    )
    wide = photo.resize((720, 480))
    with VideoWriter(folder / "walk.mp4", 10) as video:
        for number in range(4):
            frame = np.asarray(wide.crop((10 * number, 0, 640 + 10 * number, 480)))
            video.write(frame)
            Image.fromarray(frame).save(folder / "frames" / f"{number}.jpg")
    (folder / "mine.py").write_text(
        "import howyouseeme as hysm\n\ndef network():\n    return hysm.load_model()\n"
    )
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    options = {"input_names": ["x"], "output_names": ["y"], "dynamo": False}
    torch.onnx.export(net.eval(), (torch.rand(1, 3, 224, 224),), folder / "network.onnx", **options)
    torch.onnx.export(
        Cells().eval(), (torch.rand(1, 3, 64, 64),), folder / "yolov8n.onnx", **options
    )
    detector = onnx.load(folder / "yolov8n.onnx")
    said = {
        "author": "Ultralytics",
        "task": "detect",
        "imgsz": "[64, 64]",
        "names": "{0: 'person'}",
    }
    onnx.helper.set_model_props(detector, said)
    onnx.save(detector, folder / "yolov8n.onnx")
    save_file(models.resnet50(weights=None).state_dict(), folder / "resnet50.safetensors")
    torch.save(models.resnet18(num_classes=3).state_dict(), folder / "finetuned.pt")
    return folder


@pytest.fixture
def registry() -> Iterator[None]:
    """The registry as it was, after a page that changes it."""
    before = dict(rules())
    yield
    rules().clear()
    rules().update(before)


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=name_of)
def test_the_blocks_of_a_page_run(page, files, tmp_path, monkeypatch, registry):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setattr(Image.Image, "show", lambda self, *_: None)  # no viewer is to open
    for item in files.iterdir():
        (tmp_path / item.name).symlink_to(item)
    torch.manual_seed(0)
    for example in examples(page):
        try:
            example.evaluate()
        except unittest.SkipTest as reason:
            assert len(str(reason)) > 10  # noqa: PT017 - Sybil raises it for a block that is left out


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_all_code_of_a_page_is_in_blocks_that_run(page):
    text = page.read_text(encoding="utf-8")
    languages = re.findall(r"^[ >]*```(\S*)[^`\n]*\n.*?^[ >]*```$", text, re.M | re.S)
    assert set(languages) <= {"python", "console", "json", "text", "bibtex"}
    commands = re.findall(r"^    (?:\$ )?(?:howyouseeme|pip|make|python) .*", text, re.M)
    assert not commands or page.name == "research.md", commands


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target


def test_the_rules_page_lists_every_rule_under_its_family():
    _, *sections = (DOCS / "rules.md").read_text(encoding="utf-8").split("\n## ")
    listed = {}
    for section in sections:
        heading, *lines = section.splitlines()
        for line in lines:
            calls = line.removeprefix("| ").split(" | ")[0]  # the other column tells of calls too
            listed |= dict.fromkeys(re.findall(r"`(\w+\.\w+)`", calls), heading)
    assert {name: family_of(name) for name in rules()}.items() <= listed.items()


def test_the_page_of_models_lists_all_of_torchvisions():
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    kinds = (models, models.detection, models.segmentation, models.video, models.optical_flow)
    names = [name for kind in kinds for name in models.list_models(module=kind)]
    assert len(names) > 100
    assert [name for name in names if f"\n| {name} |" not in page] == []


def test_readme_counts_the_models_that_the_page_explains():
    explained = re.search(r"were tried, and (\d+) explained", (DOCS / "models.md").read_text())
    claimed = re.search(r"\[(\d+) architectures\]", (ROOT / "README.md").read_text())
    assert claimed[1] == explained[1]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_asks_nobody(tmp_path):
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in tmp_path.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(
            r'<(?:script|img|link|iframe)\b[^>]*(?:src|href)="(?:https?:)?//([^"]+)', text
        )
        assert loaded == [], page
