"""`howyouseeme propose`: regions worth looking at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

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


@click.command()
@photos_argument
@click.option(
    "--count", default=100, show_default=True, type=click.IntRange(min=1), help="Regions at most."
)
@network_options
@out_option()
@max_pixels_option
@verbose_option
def propose(*, photos: tuple[Path, ...], count: int, asked: Asked, out: Path) -> None:
    """Propose what to look at in photos, before anybody asks for a class.

    Writes a picture of the saliency and the first regions (PNG), and all regions (JSON), for each.
    """
    files = find_photos(photos, out)
    spare_photos(files, out, ".regions.png")
    from ..draw import encoded  # noqa: PLC0415
    from ..images import load_image  # noqa: PLC0415
    from ..propose import Proposer  # noqa: PLC0415

    proposer = Proposer(asked.load())
    make_folder(out)

    def one(file: Path, name: str) -> Iterator[str]:
        image = load_image(file)
        found = proposer(image, count)
        picture = out / f"{name}.regions.png"
        write(picture, encoded(found.picture(image)))
        data = json.dumps(found.to_dict(str(file)), indent=1)
        write(out / f"{name}.regions.json", f"{data}\n".encode())
        yield f"{file} → {len(found.regions)} regions → {picture}"

    for_each(files, one)
