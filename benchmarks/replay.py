"""What does an explanation cost when it is replayed? In bare forward passes of the same network.

    python benchmarks/replay.py --out docs/benchmarks/replay.md
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
with it: the median over at least {pairs} pairs, its quartiles below; an explanation is whole, by the default method.

- *as usual*: `replay=False`, one image.
- *batch*: {batches}.
- *{nodes:,} nodes*: replayed too, from about so many nodes at a time (`nodes={nodes}`) in place of all{few}.
- *the first three*, together: the first explanation of a kind is made as usual, the second is traced, and the third is
  made both ways{graphs} (n = {first}).
"""

#: On a GPU, of which there is little time, the pairs of a row take no longer than they must.
SECONDS = 0.5

#: The columns of explanations by all nodes, and by a few, which a GPU does not replay.
ALL = ["as usual", "replayed", "classes", "batch"]
FEW = ["few", "few, classes", "few, batch"]


def columns(device: str) -> list[str]:
    return ALL + FEW if device == "cpu" else ALL


def asked_for(column: str, scale: Scale) -> dict[str, Any]:
    """What `speed.whole` is asked for."""
    ask: dict[str, Any] = {"replay": column != "as usual"}
    if column.endswith("classes"):
        ask["classes"] = scale.ten
    if column in FEW:
        ask["nodes"] = scale.nodes
    return ask


def measure(rows: speed.Rows) -> Table:
    """{network: {column: row}}"""
    scale, found = rows.scale, {}
    for name in scale.networks:
        line: dict[str, Row | None] = {}
        for column in columns(rows.device):
            work = functools.partial(speed.whole, **asked_for(column, scale))
            batch = scale.batch if column.endswith("batch") else 1
            line[column] = rows.timed(f"{name}, {column}", name, work, batch)
        line["first"] = rows.get(f"{name}, first", functools.partial(first, rows, name))
        found[name] = line
    return found


def first(rows: speed.Rows, name: str) -> Row:
    """The first three explanations together, beside bare passes: of a new explainer each time."""
    subject = speed.network(name, rows.scale.size, rows.device)
    x = speed.images(subject, 1, rows.device)
    times: dict[str, list[float]] = {"bare": [], "work": []}
    subject.bare(x)
    for _ in range(firsts(rows.device)):
        explainer = hysm.Explainer(subject.module, replay=True)
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
    few = f", {scale.nodes:,} nodes"
    one, batch = "one image, one class", f"batch of {scale.batch}"
    classes = f"{scale.ten} classes of one image"
    asked: list[tuple[str, float, list[str], str]] = [
        (f"{scale.flagship}, {one}", speed.ONE_FLAGSHIP, [scale.flagship], "replayed"),
        (f"the others, {one}", speed.ONE, others, "replayed"),
        (f"all, {batch}", speed.BATCH, list(networks), "batch"),
        (f"all, {classes}", speed.TEN, list(networks), "classes"),
        (f"{scale.flagship}, {one}{few}", speed.ONE_FLAGSHIP, [scale.flagship], "few"),
        (f"the others, {one}{few}", speed.ONE, others, "few"),
        (f"all, {batch}{few}", speed.BATCH, list(networks), "few, batch"),
        (f"all, {classes}{few}", speed.TEN, list(networks), "few, classes"),
    ]
    medians = {"replayed": speed.ONE_MEDIAN, "batch": speed.BATCH_MEDIAN}
    medians |= {"few": medians["replayed"], "few, batch": medians["batch"]}
    lines = []
    for work, most, names, column in asked:
        seen = [speed.middle(r) for n in names if speed.good(r := networks[n].get(column)) and r]
        if not seen:
            continue
        told = f"{max(seen):.2f}" if len(names) == 1 else f"{min(seen):.2f} to {max(seen):.2f}"
        middle = "" if len(names) == 1 else f"{np.median(seen):.2f}"
        half = f"{medians[column]:g}" if len(names) > 1 and column in medians else ""
        lines.append([work, f"{most:g}", told, half, middle])
    return lines


def report(networks: Table, scale: Scale, device: str) -> str:
    told = {
        "batches": f"each of {scale.batch} images has a pass of its own",
        "graphs": "",
        "same": "to the bit",
        "nodes": scale.nodes,
        "few": "",
    }
    if device != "cpu":
        told["batches"] = f"{scale.batch} images share a pass"
        told["graphs"] = ", and its calls become CUDA graphs"
        told["same"] = "up to rounding"
        told["few"] = ": not on a GPU, which has to be waited for to choose them"
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
        "few": f"{scale.nodes:,} nodes",
        "few, classes": f"the same, {scale.ten} classes",
        "few, batch": f"the same, batch of {scale.batch}",
        "first": "the first three",
    }
    heads = {key: head for key, head in heads.items() if key == "first" or key in columns(device)}
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
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The page: docs/benchmarks/replay.md, replay-cuda.md; of a quick run, out/benchmarks/replay/quick/replay.md.",
)
@click.option(
    "--rows",
    "folder",
    type=click.Path(path_type=Path),
    default=ROOT / "out/benchmarks/replay",
    help="Where rows are kept between runs.",
)
def main(
    quick: bool, only: tuple[str, ...], device: str, threads: int, out: Path | None, folder: Path
) -> None:
    """Measure what replayed explanations cost."""
    torch.set_num_threads(threads)
    scale = speed.QUICK if quick else speed.FULL
    if device != "cpu":
        scale = dataclasses.replace(scale, seconds=SECONDS)
    folder = folder / "quick" if quick else folder
    name = "replay.md" if device == "cpu" else f"replay-{device}.md"
    out = out or (folder if quick else ROOT / "docs/benchmarks") / name
    networks = measure(speed.Rows(folder, scale, device, only))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(report(networks, scale, device))
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
