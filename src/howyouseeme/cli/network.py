"""The options that say which network is asked, and the network that they stand for."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InputError, ModelError
from .program import as_one, tell

if TYPE_CHECKING:
    from ..images import Preprocess
    from ..models import Network

DEFAULT_MODEL = "efficientnet-lite0"

_MODEL = click.option(
    "--model",
    default=DEFAULT_MODEL,
    show_default=True,
    help="Network to ask: one that `howyouseeme models` lists, timm:NAME, transformers:FOLDER, a file "
    "(.onnx, .keras, .h5, .pt2, .pt), or package.module:factory, a function of yours that returns it.",
)

#: How a photo becomes the network's input, where that isn't known or is known wrongly.
_INPUT = (
    click.option(
        "--size",
        metavar="N|HxW",
        help="Height and width of the network's input, such as 224 or 192x256; the whole photo is "
        "squashed into it, or fitted where that is the network's own way.",
    ),
    click.option(
        "--fit",
        is_flag=True,
        help="Fit the whole photo into the input and pad it with grey, as YOLO networks are trained, "
        "instead of squashing it.",
    ),
    click.option(
        "--crop-from",
        type=click.IntRange(min=1),
        metavar="N",
        help="Resize the photo's shorter side to N and cut the middle out, instead of squashing it; "
        "256 is usual for 224.",
    ),
    click.option(
        "--mean",
        metavar="M|R,G,B",
        help="Subtracted from the values (see --range), one number or one for each channel.",
    ),
    click.option("--std", metavar="S|R,G,B", help="What they are divided by after that."),
    click.option(
        "--channels",
        type=click.Choice(["rgb", "bgr", "grey", "grey3"]),
        help="Order of the channels, that of --mean and --std too; grey3 is the same grey in three.",
    ),
    click.option(
        "--range",
        "white",
        type=click.Choice(["1", "255"]),
        help="Value of white, before --mean and --std: that of the network where it is known, else 1.",
    ),
    click.option(
        "--interpolation",
        type=click.Choice(["bilinear", "bicubic"]),
        help="How photos are resized; bilinear where nothing is known of the network.",
    ),
)

_REST = (
    click.option(
        "--weights",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="File with the weights of the network, instead of its own.",
    ),
    *_INPUT,
    click.option(
        "--classes",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Text file with the names of the classes, one a line, in the order of the scores.",
    ),
    click.option(
        "--allow-code",
        is_flag=True,
        help="Load a --model file that can run any code (pickled models, TorchScript, .pt2, Keras "
        "Lambda layers): only if you trust its source.",
    ),
    click.option("--device", default="cpu", show_default=True, help="Such as cpu, cuda or mps."),
)


@dataclass(frozen=True)
class Asked:
    """The network that the options ask for."""

    model: str
    weights: Path | None
    size: str | None
    fit: bool
    crop_from: int | None
    mean: str | None
    std: str | None
    channels: str | None
    white: str | None
    interpolation: str | None
    classes: Path | None
    allow_code: bool
    device: str

    def __post_init__(self) -> None:
        self._preprocess_options()  # a mistyped one is told before anything is loaded

    def load(self, photos: bool = True) -> Network:
        """The network, on its device; where it is for `photos`, with its preprocessing."""
        network = _load(self.model, self.weights, self.device, self.allow_code)
        if self.classes is not None:
            network = replace(network, classes=_read_classes(self.classes))
        if not photos:
            return network
        network = replace(network, preprocess=self._preprocess(network))
        if self.classes is not None:
            _check_classes(network, self.classes)
        return network

    def _preprocess(self, network: Network) -> Preprocess:
        """The network's own preprocessing with what was asked for instead, or all of it as asked."""
        from ..images import Preprocess  # noqa: PLC0415

        asked = self._preprocess_options()
        if network.preprocess is not None:
            if network.preprocess.resize == "fit" and asked.get("resize") == "squash":
                del asked["resize"]  # a size alone doesn't change how photos are brought to it
            return self._checked(replace(network.preprocess, **asked), network)
        if "size" in asked:
            if "mean" not in asked:
                click.echo(
                    f"Note: {network.name} gets pictures that are not normalised, as no --mean and --std say how.",
                    err=True,
                )
            return self._checked(Preprocess(**asked), network)
        raise ModelError(
            f"How a photo becomes the input of {network.name} is not known; give --size, and --mean, "
            "--std, --channels and --range as it was trained, or let a factory return "
            "howyouseeme.Network(name, module, howyouseeme.Preprocess(...), classes)."
        )

    def _checked(self, made: Preprocess, network: Network) -> Preprocess:
        """The same, if white and the mean can be of one range where --mean or --range was given."""
        if self.mean is None and self.white is None:
            return made
        white, mean = round(255 * made.scale), max(made.mean)
        if mean <= white and not (white == 255 and 0 < mean <= 1):
            return made
        told = ", ".join(f"{number:g}" for number in made.mean)
        given = "its values go" if self.white is None else "--range says that values go"
        raise click.UsageError(
            f"A mean of {told} can't be right for {network.name} where {given} up to {white}: give --range "
            f"{255 if mean > 1 else 1} with it, or a --mean to go with it."
        )

    def _preprocess_options(self) -> dict[str, Any]:
        """What --size and the like ask for, as fields of a `Preprocess`."""
        asked: dict[str, Any] = {}
        if self.size is not None:
            sides = re.fullmatch(r"(\d+)(?:x(\d+))?", self.size.strip().lower(), re.ASCII)
            if sides is None:
                raise click.UsageError(
                    f"--size {self.size}: give a number, or HEIGHTxWIDTH, as in 192x256."
                )
            asked |= {"size": (int(sides[1]), int(sides[2] or sides[1])), "resize": "squash"}
            asked["crop_from"] = None
        if self.fit and self.crop_from is not None:
            raise click.UsageError(
                "--fit shows the whole photo, --crop-from a part: give one of them."
            )
        if self.fit:
            asked |= {"resize": "fit", "crop_from": None, "fill": 114}
        if self.crop_from is not None:
            asked |= {"resize": "crop", "crop_from": self.crop_from}
        for name, given in (("mean", self.mean), ("std", self.std)):
            if given is not None:
                try:
                    asked[name] = tuple(float(number) for number in given.split(","))
                except ValueError:
                    raise click.UsageError(
                        f"--{name} {given}: give a number, or one for each channel, as in 0.5,0.5,0.5."
                    ) from None
        if self.channels is not None:
            asked["channels"] = self.channels
        if self.interpolation is not None:
            asked["interpolation"] = self.interpolation
        if self.white is not None:
            asked["scale"] = float(self.white) / 255
        return asked


#: Options for the network, which the command gets as one argument, `asked`.
network_options = as_one("asked", Asked, (_MODEL, *_REST))


def options_of_each_network(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same without --model, for commands that take several; they get a function of its name."""

    @wraps(command)
    def given(**options: Any) -> Any:
        mine = {field.name: options.pop(field.name) for field in fields(Asked)[1:]}
        return command(asked=lambda model: Asked(model, **mine), **options)

    wrapped: Callable[..., Any] = given
    for option in reversed(_REST):
        wrapped = option(wrapped)
    return wrapped


def _read_classes(file: Path) -> tuple[str, ...]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"--classes {file} is no text in UTF-8.") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise click.UsageError(f"--classes {file} has no names in it.")
    return names


def _check_classes(network: Network, file: Path) -> None:
    """Stop where a file has not one name for each score, which a black picture tells the number of."""
    import torch  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    from ..scores import scores_in  # noqa: PLC0415

    preprocess, names = network.photo_input, len(network.classes or ())
    black, _ = preprocess(Image.new("RGB", preprocess.size[::-1]))
    try:
        with torch.no_grad():
            scores = scores_in(network.module(black[None].to(network.like)))
        shape = tuple(scores.shape)
    except Exception:  # the first photo will meet the same, and tell it
        return
    count = max(shape, default=1)
    if shape.count(1) < len(shape) - 1 or names == count or (count == 1 and names == 2):
        return  # no list of scores, or one that the names fit: a single one may be of no and yes
    raise click.UsageError(
        f"--classes {file} has {names} names, and {network.name} {count} scores: give a name for each, "
        "one a line, in the order of the scores."
    )


def find_here(models: Iterable[str]) -> None:
    """Let a factory among these lie in the current folder."""
    own = ("torchvision:", "timm:", "transformers:")
    if any(":" in model and not model.startswith(own) for model in models):
        sys.path.insert(0, "")


def _load(model: str, weights: Path | None, device: str, allow_code: bool) -> Network:
    from ..models import load_model  # noqa: PLC0415

    tell(f"loading {model}" + (f" with the weights in {weights}" if weights else ""))
    find_here([model])
    network = load_model(model, weights=weights, allow_code=allow_code)
    try:
        return network.to(device)
    except InputError as error:
        raise click.UsageError(str(error)) from None
