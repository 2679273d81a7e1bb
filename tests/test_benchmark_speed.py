"""The speed benchmark, small, so that it cannot rot: it runs, it goes on, and its arithmetic is right. No time
is judged."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

pytest.importorskip("torchvision")

FOLDER = Path(__file__).parent.parent / "benchmarks"


def load(name: str) -> ModuleType:
    spec = spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def speed() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))  # it takes quality.py, beside it
    threads = torch.get_num_threads()
    yield load("speed")
    sys.path.remove(str(FOLDER))
    torch.set_num_threads(threads)


def row(*ratios: float) -> dict[str, Any]:
    return {"ratios": list(ratios), "bare": 1.0, "work": float(np.median(ratios))}


# -- the whole of it, small --------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [[], ["--nodes", "50"]], ids=["all", "few"])
def test_a_quick_run_of_replays_writes_its_page(
    speed: ModuleType, tmp_path: Path, nodes: list[str]
) -> None:
    out = tmp_path / "replay.md"
    ask = ["--quick", "--threads", "1", "--rows", str(tmp_path), "--out", str(out), *nodes]
    done = CliRunner().invoke(load("replay").main, ask, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    text = out.read_text()
    assert "its times mean nothing" in text
    assert "failed" not in text
    assert ("from 50 nodes at a time" in text) == bool(nodes)
    line = next(
        line for line in text.splitlines() if line.startswith("| SqueezeNet 1.1, one image")
    )
    table = next(line for line in text.splitlines() if line.startswith("| SqueezeNet 1.1 |"))
    assert line.split("|")[3].strip() in table.split("|")[3]  # the replayed one is what is judged


def test_a_quick_run_writes_the_page_and_goes_on(speed: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "speed.md"
    ask = ["--quick", "--threads", "1", "--rows", str(tmp_path), "--out", str(out)]
    run = CliRunner()
    done = run.invoke(speed.main, ask, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    kept = json.loads((tmp_path / "quick" / "ours-cpu.json").read_text())["found"]
    assert not {key: item["error"] for key, item in kept.items() if "error" in item}
    text = out.read_text()
    assert "its times mean nothing" in text
    assert "reached" not in text.replace("reaches", "")
    for name in speed.QUICK.networks:
        assert f"\n| {name} | " in text
    for part in ("networks", "growth", "peers"):
        assert f"speed-{part}.png" in text
        assert (tmp_path / f"speed-{part}.png").stat().st_size > 5000
    peers = json.loads((tmp_path / "quick" / "peers-cpu.json").read_text())["found"]
    assert "SqueezeNet 1.1, peer rise" in peers
    assert any("ratios" in item for item in peers.values())
    again = run.invoke(speed.main, ask, catch_exceptions=False)
    assert again.output == f"wrote {out}\n"  # nothing is measured twice
    assert out.read_text() == text


# -- measuring ---------------------------------------------------------------------------------------


def test_pairs_take_turns_and_give_the_ratio(speed: ModuleType) -> None:
    calls: list[str] = []

    def bare() -> None:
        calls.append("bare")
        time.sleep(0.01)

    def work() -> None:
        calls.append("work")
        time.sleep(0.03)

    found = speed.pairs(bare, work, 4, 4, 10)
    assert calls[:6] == ["bare", "work"] * 3  # warm-up
    assert calls[6:] == ["work", "bare", "bare", "work"] * 2
    assert len(found["ratios"]) == 4
    assert 1.5 < speed.middle(found) < 6
    assert found["work"] >= 0.03


def test_pairs_end_with_the_time_but_not_before_the_least(speed: ModuleType) -> None:
    assert len(speed.pairs(lambda: None, lambda: time.sleep(0.01), 3, 50, 0)["ratios"]) == 3
    assert len(speed.pairs(lambda: None, lambda: None, 1, 5, 10)["ratios"]) == 5


def test_activations_count_each_memory_once(speed: ModuleType) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.conv(x))
            return torch.relu_(x).view(len(x), -1)[:, :2] + 1

    found = speed.activations(Small().eval(), torch.rand(2, 3, 8, 8))
    # The convolution's and the norm's 2 x 4 x 8 x 8 floats; ReLU works in place, views have no memory; the sum's 4;
    # and the norm's two numbers a channel.
    assert found == 4 * (2 * 2 * 4 * 8 * 8 + 4 + 2 * 4)


def test_peak_sees_what_is_freed_again() -> None:
    """In a process of its own, as the benchmark does: one that has used much keeps it for the next."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import speed
found = []
for size in (1, 25_000_000, 1):
    with speed.peak(found):
        torch.ones(size)
print(*found)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(FOLDER)], capture_output=True, text=True, check=True
    )
    before, most, after = map(int, ran.stdout.split())
    assert 90e6 < most - before < 150e6
    assert after < most - 50e6


def test_a_row_that_fails_is_kept_as_failed(speed: ModuleType, tmp_path: Path) -> None:
    rows = speed.Rows(tmp_path, speed.QUICK, "cpu", [])
    asked: list[str] = []

    def failing() -> Any:
        asked.append("now")
        raise ValueError("no such layer\nat all")

    expected = {"error": "ValueError: no such layer"}
    assert rows.get("some row", failing) == expected
    assert speed.Rows(tmp_path, speed.QUICK, "cpu", []).get("some row", failing) == expected
    assert asked == ["now"]
    other = speed.Rows(tmp_path, speed.FULL, "cpu", ["another"])  # other settings, other rows
    assert other.get("some row", failing) is None


def test_rows_are_dropped_with_the_source_of_the_package(
    speed: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed: list[str] = []
    added = "\nx = 1"
    read = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path, **given: read(path, **given) + added * (path.name in changed),
    )

    def prints() -> tuple[str, str]:
        return tuple(speed.made_by(speed.FULL, "cpu", ours) for ours in (True, False))

    ours, peers = prints()
    changed[:] = ["backtrack.py"]
    assert prints() == (prints()[0], peers)
    assert prints()[0] != ours
    added = "\n# a comment"
    assert prints() == (ours, peers)
    added = "\nx = 1"
    changed[:] = ["explain.py"]
    assert prints() == (ours, peers)
    changed[:] = ["quality.py"]
    assert prints()[1] != peers


# -- peers and networks ------------------------------------------------------------------------------


def test_peers_get_the_same_function_out_of_place(speed: ModuleType) -> None:
    subject = speed.network("ResNet-18", 64)
    x = speed.images(subject, 2)
    copy = subject.plain(subject.module, True)
    torch.testing.assert_close(copy(x), subject.module(x))
    assert copy.last_conv is copy.layer4[1].conv2
    assert not any(getattr(part, "inplace", False) for part in copy.modules())
    assert subject.module.relu.inplace


def test_images_differ_and_random_networks_have_statistics(speed: ModuleType) -> None:
    subject = speed.network("ResNet-18", 64)
    x = speed.images(subject, 5)
    assert x.shape == (5, 3, 64, 64)
    assert all(not torch.equal(x[i], x[j]) for i in range(5) for j in range(i))
    norm = subject.module.layer4[1].bn2
    assert not norm.training
    assert norm.momentum == 0.1
    assert float(norm.running_var.std()) > 0


def test_a_peer_without_a_map_of_the_input_fails(speed: ModuleType) -> None:
    subject = speed.network("ResNet-18", 64)
    peer = speed.Peer("small", None, True, lambda *_: lambda x, target: x[0, :8, :8])
    with pytest.raises(ValueError, match=r"a map of \[8, 8\]"):
        speed.peer_work(peer, subject, speed.QUICK)


# -- the page ----------------------------------------------------------------------------------------


def line(**rows: Any) -> dict[str, Any]:
    return {"one": None, "batch": None, "ten": None, "memory": None, **rows}


def test_targets_tell_reached_missed_and_open(speed: ModuleType) -> None:
    scale = speed.dataclasses.replace(speed.QUICK, flagship="VGG-16", judged=True)
    networks = {
        "VGG-16": line(one=row(1.1, 1.15, 9), batch=row(1.2), seed=row(1.4)),
        "AlexNet": line(one=row(1.45), batch={"error": "ValueError: none"}),
        "ResNet-50": line(one=row(1.6), batch=row(1.1)),
    }
    peers = {"VGG-16": {"guided": row(3)}, "AlexNet": {"guided": row(1.2), "rise": row(0.1)}}
    lines = {what: rest for what, *rest in speed.target_lines(networks, peers, scale)}
    assert lines["VGG-16, one image, one class"] == ["1.2", "1.15", "reached"]
    assert lines["each of the others, one image, one class"] == [
        "1.5",
        "1.60 (ResNet-50); 1 of 2 reach it",
        "missed",
    ]
    assert lines["each network, batch of 2"] == [
        "1.25",
        "1.20 (VGG-16); 2 of 3 reach it; failed: AlexNet",
        "missed",
    ]
    assert lines["the seed method, VGG-16, k = 20"] == ["1.3", "1.40", "missed"]
    assert lines["2 classes of one image, from one tape"] == ["2", "not measured", "open"]
    assert lines["the fastest that reaches the pixels"][1:] == ["on 1 of 2 compared", "open"]


def test_cells_tell_quartiles_few_pairs_and_failures(speed: ModuleType) -> None:
    notes: list[str] = []
    assert speed.cell(row(1, 2, 3, 4, 5), 5, notes) == "3.00<br><sub>2.00 to 4.00</sub>"
    assert speed.cell(row(500), 5, notes) == "500<br><sub>500 to 500, n = 1</sub>"
    assert speed.cell({"error": "no"}, 5, notes) == "failed [1]"
    assert speed.cell({"error": "no"}, 5, notes) == "failed [1]"
    assert notes == ["no"]
    assert speed.cell(None, 5, notes) == ""


def test_growth_tells_what_each_further_one_costs(speed: ModuleType) -> None:
    assert speed.further(None, row(1.2), 1) == ""
    assert speed.further((row(1.2), 1), row(1.6), 5) == "0.100"
    assert speed.further((row(1.2), 100), {**row(1.3), "nodes": 2100}, 2100) == "2,100; 0.050"
