"""`howyouseeme detect`: boxes around objects."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..files import write
from .network import Asked, network_options
from .photos import (
    find_photos,
    for_each,
    make_folder,
    max_pixels_option,
    out_option,
    photos_argument,
    spare_photos,
)
from .program import verbose_option
from .question import read_target

if TYPE_CHECKING:
    from ..localize import Detection


@click.command()
@photos_argument
@click.option(
    "--target", "targets", multiple=True, help="Class to look for, by name or index; repeatable."
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    help="Look for so many of the likeliest classes instead, 1 if not given.",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Level of its map at which an object ends, 0.22 if not given; more makes boxes smaller.",
)
@click.option(
    "--own",
    is_flag=True,
    help="Of a detector: the boxes that it finds itself, with the numbers that `explain --box` takes.",
)
@network_options
@out_option()
@max_pixels_option
@verbose_option
def detect(
    *,
    photos: tuple[Path, ...],
    targets: tuple[str, ...],
    top: int | None,
    threshold: float | None,
    own: bool,
    asked: Asked,
    out: Path,
) -> None:
    """Put boxes around objects in photos; the network was only ever trained to name them (but see --own).

    Writes a picture (PNG) for each photo, and all boxes of this run to detections.json (COCO), which
    replaces that of the run before.
    """
    if targets and top is not None:
        raise click.UsageError("Say what to look for: --target CLASS or --top N, not both.")
    if own and (targets or top is not None or threshold is not None):
        raise click.UsageError("--own goes without --target, --top and --threshold.")
    files = find_photos(photos, out)
    spare_photos(files, out, ".boxes.png")
    network = asked.load()
    wanted = [read_target(target, network).index for target in targets]
    classes = [index for index in wanted if index is not None]
    if len(classes) < len(wanted):
        raise click.UsageError("--target takes a class; for the N likeliest ones give --top N.")
    from .. import localize  # noqa: PLC0415
    from ..detectors import SURE  # noqa: PLC0415
    from ..draw import boxes_picture, encoded  # noqa: PLC0415
    from ..explainer import Explainer  # noqa: PLC0415
    from ..images import load_image  # noqa: PLC0415

    explainer = Explainer(network)
    level = localize.THRESHOLD if threshold is None else threshold
    make_folder(out)
    found: dict[str, Sequence[Detection]] = {}
    sizes: dict[str, tuple[int, int]] = {}

    def one(file: Path, name: str) -> Iterator[str]:
        image = load_image(file)
        picture = out / f"{name}.boxes.png"
        if own:
            boxes = [one for one in localize.found_in(network, image) if one.score >= SURE]
        else:
            boxes = list(localize.detect(explainer, image, classes, top or 1, level))
        told = [(one.box, one.label, one.caption) for one in boxes]
        write(picture, encoded(boxes_picture(image, told)))
        found[str(file)] = boxes
        sizes[str(file)] = image.height, image.width
        # After each photo, so that an interruption leaves what is finished.
        data = json.dumps(localize.to_coco(found, sizes), indent=1)
        write(out / "detections.json", f"{data}\n".encode())
        labels = ", ".join(text for *_, text in told) or "nothing"
        yield f"{file} → {labels} → {picture}"

    for_each(files, one)
