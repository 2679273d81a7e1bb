"""`howyouseeme evaluate`: how good the maps are."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..files import identities, spare
from .network import Asked, network_options
from .photos import find_photos, max_pixels_option, out_option
from .program import show, verbose_option
from .question import DEFAULT_METHOD, METHODS


@click.command()
@click.option(
    "--images",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with the photos.",
)
@click.option(
    "--boxes",
    type=click.Path(exists=True, path_type=Path),
    help="Where the objects are: a CSV (file, class, x0, y0, x1, y1), a COCO .json, or a folder of "
    "Pascal VOC's .xml.",
)
@click.option(
    "--methods",
    default=DEFAULT_METHOD,
    show_default=True,
    help="How to walk back, with commas between: "
    f"{', '.join(METHODS)}; seed:attention for its blurred map.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Measure N images at most.")
@click.option(
    "--grids",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="Grids of four photos for GridPG.",
)
@network_options
@out_option("evaluation.csv and evaluation.json")
@max_pixels_option
@verbose_option
def evaluate(
    *,
    images: Path,
    boxes: Path | None,
    methods: str,
    limit: int | None,
    grids: int,
    asked: Asked,
    out: Path,
) -> None:
    """Measure how well the maps show where the answers come from.

    Prints a table of means with their 95 % intervals. What could not be used is told on the error
    output, and then the exit status is 1. Photos without a box of the network's answer are counted
    there too, and are no failure.
    """
    files = find_photos([images], out)
    if boxes is not None:
        spare(identities([boxes]), [out / "evaluation.csv", out / "evaluation.json"])
    network = asked.load()
    from ..evaluate import evaluate as measure  # noqa: PLC0415

    try:
        found = measure(
            network,
            files,
            boxes,
            methods=[name.strip() for name in methods.split(",") if name.strip()],
            limit=limit,
            grids=grids,
            say=show,
        )
    finally:
        show("")
    click.echo(found.table())
    for line in found.notes:
        click.echo(line, err=True)
    written = found.save(out)
    click.echo(f"{len(found.items)} images → {', '.join(map(str, written))}")
    for line in found.problems:
        click.echo(line, err=True)
    if found.problems:
        sys.exit(1)
