"""Every Python block of the documentation runs, top to bottom, page by page."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

import howyouseeme as hysm
from howyouseeme.rules import rules

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def registry():
    """The registry as it was, after a page that changes it."""
    before = dict(rules())
    yield
    rules().clear()
    rules().update(before)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, registry):
    monkeypatch.chdir(tmp_path)
    shutil.copy(hysm.sample_photo("cat"), tmp_path / "photo.jpg")
    torch.manual_seed(0)
    namespace = {
        "torch": torch,
        "model": hysm.load_model().module,
        "images": torch.randn(2, 3, 64, 64),
    }
    for number, block in enumerate(blocks(page), start=1):
        code = compile(block, f"{page.name}, block {number}", "exec")
        exec(code, namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_rules_page_lists_every_rule():
    page = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    assert [name for name in rules() if f"`{name}`" not in page] == []
