"""Detection, proposals and tracking, measured beside what people would use instead, in one run.

    python benchmarks/applications.py --out docs/benchmarks/applications.md

See docs/benchmarks/README.md. A task is a module with a function `section` that returns its part of the
page. Pictures of the best, the median and the worst cases of each go to out/, since the images may not
be redistributed.
"""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import click
import cv2
import detection
import proposals
import torch
import tracking
from harness import Setup

import howyouseeme as hysm

ROOT = Path(__file__).resolve().parent.parent

#: What is measured, in the order of the page.
TASKS = {"detect": detection.section, "propose": proposals.section, "track": tracking.section}


@click.command()
@click.option(
    "--data",
    default=ROOT.parent / "shared" / "data",
    show_default=False,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with ilsvrc-val-dev and davis2016-dev.",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    type=click.Choice(list(TASKS)),
    default=list(TASKS),
    help="What to measure; repeatable. All if not given.",
)
@click.option("--images", default=10**6, help="Images for detection and proposals, at most.")
@click.option(
    "--half",
    default="all",
    type=click.Choice(["all", "0", "1"]),
    help="Every second image and sequence.",
)
@click.option(
    "--threads",
    default=2,
    show_default=True,
    help="Of torch and OpenCV for tracking; detection and proposals, whose CPU time is told, take one.",
)
@click.option(
    "--kept",
    default=ROOT / "out" / "benchmarks" / "applications",
    show_default=False,
    type=click.Path(path_type=Path),
    help="Where rows are kept between runs, and pictures of cases.",
)
@click.option(
    "--out",
    default=ROOT / "docs" / "benchmarks" / "applications.md",
    show_default=False,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The page to write.",
)
def main(
    data: Path, tasks: tuple[str, ...], images: int, half: str, threads: int, kept: Path, out: Path
) -> None:
    """Measure the applications. A run that was broken off goes on where it stopped."""
    setup = Setup(data, kept, images, half)
    parts = []
    for task in tasks:
        used = threads if task == "track" else 1
        torch.set_num_threads(used)
        cv2.setNumThreads(used)
        parts.append(TASKS[task](setup))
    body = "\n".join(parts)
    versions = ", ".join(
        f"{name} {version(name)}"
        for name in ("torch", "opencv-contrib-python-headless", "grad-cam")
    )
    some = "" if half == "all" else f" Half {half} of the sequences and of the images."
    page = f"""# Applications, measured

Made by `make bench-applications`: howyouseeme {hysm.__version__}, {versions}, Python {platform.python_version()}, on
{platform.machine()}, one thread unless said otherwise.{some} The images and videos may not be redistributed: pictures of the three best, three
median and three worst cases of each task, with our boxes and the true ones, are written to `out/benchmarks/applications` by the same command.

{body}"""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page)
    click.echo(page)


if __name__ == "__main__":
    main()
