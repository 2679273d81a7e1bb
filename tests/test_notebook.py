"""What shows under a notebook's cell, with a kernel, without one, and where HTML isn't let through."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient
from PIL import Image
from torch import nn

from howyouseeme import Explainer, Explanation
from howyouseeme.notebook import MOST_IMAGES, html_of

GALLERY = Path(__file__).parent.parent / "docs" / "gallery.ipynb"
CLASSES = ("<b>one</b>", '"two"', "three & more")


def explanation_of(images: int, side: int = 16) -> Explanation:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    explainer = Explainer(net.eval(), classes=CLASSES)
    return explainer(torch.rand(images, 3, side, side), [i % 3 for i in range(images)])


class Reader(HTMLParser):
    """The elements of a page, and its pictures; complains where tags don't match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"img", "input"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_html_has_a_picture_and_a_slider_through_all_frames() -> None:
    explanation = explanation_of(1)
    page = Reader(html_of(explanation))
    frames = explanation.frames()
    names = [name for name, _, _ in frames]
    assert names[:5] == ["photo", "points", "attention", "saliency", "pixels"]
    assert len(names) > 6  # two stages at least
    assert [label["title"] for label in page.all("label")] == names
    assert len(page.all("figure")) == len(page.all("input")) == len(names)
    chosen = [name for name, box in zip(names, page.all("input"), strict=True) if "checked" in box]
    assert chosen == ["attention"]
    pictures = page.all("img")
    assert len(pictures) == 1 + len(names)
    for tag in pictures:
        kind, data = tag["src"].split(",")
        assert kind == "data:image/webp;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            picture.load()
    assert not page.all("script")


def test_each_stop_of_the_slider_shows_its_own_frame() -> None:
    text = html_of(explanation_of(1))
    for k in range(1, len(explanation_of(1).frames()) + 1):
        assert f".hysm:has(label:nth-of-type({k}) :checked) figure:nth-of-type({k})" in text


def test_names_are_text_and_no_html() -> None:
    page = Reader(html_of(explanation_of(3)))
    first = [tag["alt"] for tag in page.all("img") if "Explanation(" in tag["alt"]]
    assert [classes in text for classes, text in zip(CLASSES, first, strict=True)] == [True] * 3
    assert not page.all("b")


def test_a_large_batch_shows_its_first_images_and_says_how_many_more() -> None:
    text = html_of(explanation_of(MOST_IMAGES + 3, side=8))
    assert len(Reader(text).all("form")) == MOST_IMAGES
    assert text.endswith(f"3 more: explanation[{MOST_IMAGES}] and on.")
    assert "more:" not in html_of(explanation_of(2, side=8))


def test_frames_are_all_of_one_size() -> None:
    assert len({picture.size for _, _, picture in explanation_of(1).frames()}) == 1


def run_in_a_notebook(*cells: str) -> list[Any]:
    """The outputs of the last cell, in a real kernel."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=120).execute()
    return list(notebook.cells[-1].outputs)


def test_in_a_notebook_the_picture_stands_apart_from_the_html() -> None:
    """GitHub shows HTML where there is any, but takes its style, so that a picture is an output alone."""
    one, two, three, four = run_in_a_notebook(
        "import torch, howyouseeme as hysm\n"
        "net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(),\n"
        "    torch.nn.AdaptiveMaxPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2))\n"
        "explainer = hysm.Explainer(net.eval())",
        "explainer(torch.rand(2, 3, 8, 8))",
    )
    for picture in (one, three):
        assert set(picture.data) == {"image/jpeg", "text/plain"}
        assert picture.data["text/plain"].startswith("Explanation(")
    for slider in (two, four):
        assert set(slider.data) == {"text/html", "text/plain"}
        assert Reader(slider.data["text/html"]).all("figure")


def test_in_a_notebook_what_is_no_picture_is_its_repr() -> None:
    (output,) = run_in_a_notebook(
        "import torch, howyouseeme as hysm\n"
        "net = torch.nn.Sequential(torch.nn.Conv1d(2, 4, 3), torch.nn.ReLU(),\n"
        "    torch.nn.AdaptiveMaxPool1d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2))",
        "hysm.Explainer(net.eval())(torch.rand(1, 2, 8))",
    )
    assert set(output.data) == {"text/plain"}
    assert output.data["text/plain"].startswith("Explanation(")


def test_in_a_terminal_it_is_its_repr(capsys: pytest.CaptureFixture[str]) -> None:
    shell = InteractiveShell.instance()
    try:
        explanation = explanation_of(1)
        shell.displayhook(explanation)
        assert f"]: {explanation!r}\n" in capsys.readouterr().out
    finally:
        InteractiveShell.clear_instance()


@pytest.mark.slow
def test_the_gallery_runs_and_shows_what_is_kept_in_it() -> None:
    kept = nbformat.read(GALLERY, as_version=4)
    assert GALLERY.stat().st_size < 2_000_000
    made = nbformat.read(GALLERY, as_version=4)
    for cell in made.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(made, timeout=120, coalesce_streams=True).execute()
    for before, now in zip(kept.cells, made.cells, strict=True):
        if now.cell_type != "code":
            continue
        assert [shown(output) for output in before.outputs] == [
            shown(output) for output in now.outputs
        ]
    assert sum(bool(cell.get("outputs")) for cell in made.cells) >= 4


def shown(output: Any) -> tuple[Any, ...]:
    """What an output says, without the pixels of its pictures, which a processor may round its own way."""
    if output.output_type == "stream":
        return (output.name, output.text)
    data = output.data
    return (sorted(data), data.get("text/plain"), "".join(Reader(data.get("text/html", "")).words))
