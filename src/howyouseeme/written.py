"""An explanation as files: a picture, all about it as JSON, and maps for NumPy."""

from __future__ import annotations

import io
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import __version__
from .draw import encoded
from .errors import InputError
from .files import EXPLANATIONS, identities, spare, write

if TYPE_CHECKING:
    from .explanation import Explanation

__all__ = ["SCHEMA_VERSION", "as_json", "check_name", "facts", "provenance", "save"]

SCHEMA_VERSION = 1


def facts(one: Explanation) -> dict[str, Any]:
    """All about one image, ready for JSON; see `Explanation.to_dict`."""
    sample, box = one.samples[0], one.box[0]
    return {
        "schema": SCHEMA_VERSION,
        "image": {"name": sample.name, "size": list(sample.size)},
        "target": {
            "index": one.target[0],
            "label": one.label[0] or None,
            "probability": one.probability[0],
            "box": None if box is None else [round(side, 2) for side in box],
        },
        "coverage": one.coverage[0],
        "points": [
            [*(round(at, 2) for at in point.position), float(f"{point.strength:.6g}")]
            for point in one.points[0]
        ],
        "provenance": one.provenance(),
    }


def provenance(one: Explanation) -> dict[str, Any]:
    """What it takes to make the explanation of an image again; see `Explanation.provenance`."""
    given, network = one.samples[0].input, one.network
    return {
        "howyouseeme": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "model": network.name,
        "method": one.method.name,
        "parameters": one.method.parameters,
        "input_shape": list(given.shape),
        "dtype": str(given.dtype).removeprefix("torch."),
        "device": str(given.device),
        "preprocess": network.preprocess.describe() if network.preprocess else None,
    }


def save(
    explanation: Explanation, folder: str | Path, name: str | None, layers: bool, maps: bool
) -> list[Path]:
    """Write a PNG, a JSON and, if asked for, the maps of each image; see `Explanation.save`."""
    folder = Path(folder)
    if folder.suffix.lower() in EXPLANATIONS and not folder.is_dir():
        raise InputError(
            f"{folder} is named as a file, and a folder is wanted: give {str(folder.parent)!r}, and "
            f"{folder.stem!r} as the name."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{folder} is no folder, or is in none; name another.") from error
    written = []
    stems = [
        name or (Path(sample.name).stem if sample.name else "explanation")
        for sample in explanation.samples
    ]
    if len({stem.casefold() for stem in stems}) < len(stems):
        stems = [f"{stem}-{i}" for i, stem in enumerate(stems)]
    photos = identities(sample.name for sample in explanation.samples if sample.name)
    spare(photos, [folder / f"{stem}.png" for stem in stems])
    for i, stem in enumerate(stems):
        one = explanation._alone(i)  # which keeps what is made
        made = {".png": encoded(one.picture(layers=layers)), ".json": as_json(one)}
        if maps:
            made[".npz"] = _npz(one)
        for suffix, content in made.items():
            written.append(folder / f"{stem}{suffix}")
            write(written[-1], content)
    return written


def check_name(name: str | None) -> None:
    """See that a name is none of the files that `save` writes.

    >>> check_name("cat")

    Raises:
        InputError: it is, or is no name.
    """
    if name is None:
        return
    if not isinstance(name, str):
        raise InputError(f"The name is one text for all files, such as 'cat', not {name!r}.")
    if Path(name).name != name:
        raise InputError(f"{name!r} is no name of a file without its folder: give that as folder.")
    if Path(name).suffix.lower() in EXPLANATIONS:
        raise InputError(
            f"The name {name!r} is one with a suffix, which the files get: give {Path(name).stem!r}."
        )


def _npz(one: Explanation) -> bytes:
    """The maps of an image, as a file of numpy."""
    file = io.BytesIO()
    np.savez_compressed(file, saliency=one.saliency[0].numpy(), attention=one.attention[0].numpy())
    return file.getvalue()


def as_json(one: Explanation) -> bytes:
    """All about one image as the file that `save` writes: one field a line, and one point a line.

    >>> Path("photo.json").write_bytes(as_json(explanation[0]))
    """
    data = one.to_dict()
    fields = {name: json.dumps(item, allow_nan=False) for name, item in data.items()}
    points = ",\n".join(f"  {json.dumps(point, allow_nan=False)}" for point in data["points"])
    fields["points"] = f"[\n{points}\n ]"
    lines = ",\n".join(f' "{name}": {item}' for name, item in fields.items())
    return f"{{\n{lines}\n}}\n".encode()
