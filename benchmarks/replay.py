"""What does an explanation cost when it is replayed? In bare forward passes of the same network.

    python benchmarks/replay.py --out docs/benchmarks/replay.md
    python benchmarks/replay.py --nodes 2000 --out docs/benchmarks/replay-few.md
    python benchmarks/replay.py --device cuda --out docs/benchmarks/replay-cuda.md

Networks, images and the way of timing are those of speed.py; see docs/benchmarks/README.md.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import click
import numpy as np
import speed
import torch
from quality import ROOT
from speed import Row, Scale, Table

import howyouseeme as hysm

ABOUT = """# What a replayed explanation costs

Made by `benchmarks/replay.py`; see [how to run it](README.md). `Explainer(model, replay=True)` notes the calls that
explain one image and makes them again for the next, the same explanation {same}. As in [the table of speed](speed.md),
times are multiples of the same network's bare forward pass of the same images, measured turn and turn about
with it: the median over at least {pairs} pairs, its quartiles below; an explanation is whole, by the default method{few}.

- *as usual*: `replay=False`, one image.
{batches}- *the first three*, together: the first explanation of a kind is made as usual, the second is traced, and the third is
  made both ways{graphs} (n = {first}).
"""

#: On a GPU, of which there is little time, the pairs of a row take no longer than they must.
SECONDS = 0.5

#: The column, and what `howyouseeme.Explainer` is asked for.
COLUMNS: dict[str, dict[str, Any]] = {
    "as usual": {"replay": False},
    "replayed": {"replay": True},
    "classes": {"replay": True},
    "batch": {"replay": True},
}


def measure(rows: speed.Rows, nodes: int | None) -> Table:
    """{network: {column: row}}"""
    scale, found = rows.scale, {}
    few = {} if nodes is None else {"nodes": nodes}
    for name in scale.networks:
        line: dict[str, Row | None] = {}
        for column, ask in COLUMNS.items():
            more = {"classes": scale.ten} if column == "classes" else {}
            work = functools.partial(speed.whole, **ask, **few, **more)
            batch = scale.batch if column == "batch" else 1
            line[column] = rows.timed(f"{name}, {column}", name, work, batch)
        line["first"] = rows.get(f"{name}, first", functools.partial(first, rows, name, **few))
        found[name] = line
    return found


def first(rows: speed.Rows, name: str, **parameters: Any) -> Row:
    """The first three explanations together, beside bare passes: of a new explainer each time."""
    subject = speed.network(name, rows.scale.size, rows.device)
    x = speed.images(subject, 1, rows.device)
    times: dict[str, list[float]] = {"bare": [], "work": []}
    subject.bare(x)
    for _ in range(firsts(rows.device)):
        explainer = hysm.Explainer(subject.module, replay=True, **parameters)
        start = speed.clock()
        subject.bare(x)
        middle = speed.clock()
        for _ in range(3):
            explainer(x)
        times["bare"].append(middle - start)
        times["work"].append(speed.clock() - middle)
    ratios = [w / b for w, b in zip(times["work"], times["bare"], strict=True)]
    return {
        "ratios": ratios,
        "bare": float(np.median(times["bare"])),
        "work": float(np.median(times["work"])),
    }


def firsts(device: str) -> int:
    """How often the first explanations are timed."""
    return 3 if device == "cpu" else 1


def target_lines(networks: Table, scale: Scale) -> list[list[str]]:
    """What was asked for of explanations, and what replayed ones take."""
    others = [name for name in networks if name != scale.flagship]
    asked: list[tuple[str, float, list[str], str]] = [
        (f"{scale.flagship}, one image, one class", speed.ONE_FLAGSHIP, [scale.flagship], "replayed"),
        ("the others, one image, one class", speed.ONE, others, "replayed"),
        (f"all, batch of {scale.batch}", speed.BATCH, list(networks), "batch"),
        (f"all, {scale.ten} classes of one image", speed.TEN, list(networks), "classes"),
    ]  # fmt: skip
    medians = {"replayed": speed.ONE_MEDIAN, "batch": speed.BATCH_MEDIAN}
    lines = []
    for work, most, names, column in asked:
        seen = [speed.middle(r) for n in names if speed.good(r := networks[n][column]) and r]
        if not seen:
            continue
        told = f"{max(seen):.2f}" if len(names) == 1 else f"{min(seen):.2f} to {max(seen):.2f}"
        middle = "" if len(names) == 1 else f"{np.median(seen):.2f}"
        half = f"{medians[column]:g}" if len(names) > 1 and column in medians else ""
        lines.append([work, f"{most:g}", told, half, middle])
    return lines


def report(networks: Table, scale: Scale, device: str, nodes: int | None) -> str:
    told = {
        "batches": f"- *batch*: each of {scale.batch} images has a pass of its own.\n",
        "graphs": "",
        "same": "to the bit",
        "few": ""
        if nodes is None
        else f", going on from {nodes:,} nodes at a time (`nodes={nodes}`)",
    }
    if device != "cpu":
        told["batches"] = f"- *batch*: {scale.batch} images share a pass.\n"
        told["graphs"] = ", and its calls become CUDA graphs"
        told["same"] = "up to rounding"
    if not any(line["batch"] for line in networks.values()):
        told["batches"] = ""
    lines = [ABOUT.format(pairs=scale.pairs, batch=scale.batch, first=firsts(device), **told)]
    if not scale.judged:
        lines += ["**A quick run, to see that the benchmark works: its times mean nothing.**", ""]
    head = ["work", "at most", "seen", "median at most", "median"]
    lines += ["## What was asked for", "", *speed.markdown(head, target_lines(networks, scale))]
    notes: list[str] = []
    heads = {
        "as usual": "as usual",
        "replayed": "replayed",
        "classes": f"{scale.ten} classes",
        "batch": f"batch of {scale.batch}",
        "first": "the first three",
    }
    heads = {
        key: head for key, head in heads.items() if any(line[key] for line in networks.values())
    }
    table = [
        [name, *(speed.cell(line[column], firsts(device) if column == "first" else scale.pairs, notes) for column in heads)]
        for name, line in networks.items()
    ]  # fmt: skip
    if device != "cpu":
        heads |= {"bare": "forward pass, ms", "work": "replayed, ms"}
        for line, row in zip(table, (line["replayed"] for line in networks.values()), strict=True):
            line += [
                f"{1000 * row[key]:.2f}" if speed.good(row) and row else ""
                for key in ("bare", "work")
            ]
    lines += ["## Network by network", "", *speed.markdown(["", *heads.values()], table)]
    lines += speed.noted(notes)
    return "\n".join([*lines, *speed.made_with(["torch", "torchvision"], device)])


@click.command()
@click.option("--quick", is_flag=True, help="Few, small and not judged: does the benchmark work?")
@click.option("--only", multiple=True, help="Measure rows whose name has this in it.")
@click.option("--nodes", type=int, help="Go on from so many nodes at a time in place of all.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The page: docs/benchmarks/replay.md, replay-few.md, replay-cuda.md; of a quick run, out/benchmarks/replay/quick/replay.md.",
)
@click.option(
    "--rows",
    "folder",
    type=click.Path(path_type=Path),
    default=ROOT / "out/benchmarks/replay",
    help="Where rows are kept between runs.",
)
def main(
    quick: bool,
    only: tuple[str, ...],
    nodes: int | None,
    device: str,
    threads: int,
    out: Path | None,
    folder: Path,
) -> None:
    """Measure what replayed explanations cost."""
    torch.set_num_threads(threads)
    scale = speed.QUICK if quick else speed.FULL
    if device != "cpu":
        scale = dataclasses.replace(scale, seconds=SECONDS)
    folder = folder / "quick" if quick else folder
    folder = folder if nodes is None else folder / f"{nodes}-nodes"
    kind = ("" if nodes is None else "-few") + ("" if device == "cpu" else f"-{device}")
    name = f"replay{kind}.md"
    out = out or (folder if quick else ROOT / "docs/benchmarks") / name
    networks = measure(speed.Rows(folder, scale, device, only), nodes)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(report(networks, scale, device, nodes))
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
