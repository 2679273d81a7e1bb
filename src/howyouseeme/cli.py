"""The command line.

Only click is imported up here: torch, numpy, pillow and matplotlib take seconds, and `--help`,
`--version` and a mistyped option shall not wait for them.
"""

from __future__ import annotations

import errno
import io
import json
import re
import shlex
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .errors import HowYouSeeMeError, InputError, ModelError
from .web import Limits, Settings
from .web import serve as serve_web

if TYPE_CHECKING:
    from .explainer import Explainer
    from .explanation import Explanation
    from .images import Preprocess
    from .models import Network
    from .targets import Target

DEFAULT_MODEL = "efficientnet-lite0"
DEFAULT_METHOD = "evidence"
METHODS = ("evidence", "seed", "exact")
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_VERBOSE = "howyouseeme.verbose"


class _Program(click.Group):
    """Turns whatever ends a command early into a line and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Not every terminal can write an arrow or every file name; that is no reason to stop.
            sys.stdout.reconfigure(errors="replace")
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nInterrupted; the pictures written so far are kept.", err=True)
            ctx.exit(130)
        except HowYouSeeMeError as error:
            _complain(None, error)
            ctx.exit(2)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # whoever read our output has left; click ends quietly
            _complain(None, error)
            ctx.exit(1)


def _verbose_option(command: Callable[..., Any]) -> Callable[..., Any]:
    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        ctx.meta[_VERBOSE] = value

    return click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=remember,
        help="Say what is going on, and show the traceback of an error.",
    )(command)


def _model_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--model",
        default=DEFAULT_MODEL,
        show_default=True,
        help="Network to explain: one that `howyouseeme models` lists, timm:NAME, "
        "transformers:FOLDER, a file (.onnx, .keras, .h5, .pt2, .pt), or package.module:factory, a "
        "function of yours that returns it.",
    )(command)


def _input_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How a photo becomes the network's input, where that isn't known or is known wrongly."""
    for option in reversed(
        [
            click.option(
                "--size",
                metavar="N|HxW",
                help="Height and width of the network's input, such as 224 or 192x256; the whole "
                "photo is squashed into it.",
            ),
            click.option(
                "--mean",
                metavar="M|R,G,B",
                help="Subtracted from the values, one number or one for each channel.",
            ),
            click.option("--std", metavar="S|R,G,B", help="What they are divided by after that."),
            click.option(
                "--channels",
                type=click.Choice(["rgb", "bgr", "grey"]),
                help="Order of the channels, that of --mean and --std too.",
            ),
            click.option(
                "--range",
                "white",
                type=click.Choice(["1", "255"]),
                help="Value of white, before --mean and --std.",
            ),
            click.option(
                "--interpolation",
                type=click.Choice(["bilinear", "bicubic"]),
                help="How photos are resized; bilinear where nothing is known of the network.",
            ),
        ]
    ):
        command = option(command)
    return command


def _out_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--out",
        default="howyouseeme-out",
        show_default=True,
        type=click.Path(file_okay=False, writable=True, path_type=Path),
        help="Folder for the pictures; made if it is missing. Files of the same name in it are "
        "replaced.",
    )(command)


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="howyouseeme")
def main() -> None:
    """Show which pixels made a convolutional network answer what it answered."""


@main.command()
@click.argument("photos", nargs=-1, type=click.Path(path_type=Path), metavar="PHOTO|FOLDER...")
@_model_option
@click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with the weights of the network, instead of its own.",
)
@_input_options
@click.option(
    "--allow-code",
    is_flag=True,
    help="Load a --model file that can run any code (pickled models, TorchScript, .pt2, Keras "
    "Lambda layers): only if you trust its source.",
)
@click.option(
    "--target",
    help="Class to explain, by name or index (`howyouseeme classes` lists them), or top3 for the "
    "three likeliest (topN for N). The likeliest one if not given.",
)
@click.option(
    "--versus",
    metavar="CLASS",
    help="Explain what speaks for the target and not for this class.",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default=DEFAULT_METHOD,
    show_default=True,
    help="How to walk back.",
)
@click.option(
    "--k",
    type=click.IntRange(min=1),
    help="Nodes taken at each fully connected layer, 20 if not given; for --method seed.",
)
@click.option(
    "--nodes",
    type=click.IntRange(min=1),
    help="Go on from about so many nodes, 2000 say, instead of all: sooner done, and less fine; for "
    "--method evidence.",
)
@_out_option
@click.option("--layers", is_flag=True, help="Add where each stage of the network looks.")
@click.option(
    "--check",
    is_flag=True,
    help="Ask again with the evidence blurred away, and with all else blurred: was it that?",
)
@click.option("--device", default="cpu", show_default=True, help="Such as cpu, cuda or mps.")
@click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    metavar="N",
    help="Take photos of up to N pixels, instead of some 90 million.",
)
@_verbose_option
def explain(
    *,
    photos: tuple[Path, ...],
    model: str,
    weights: Path | None,
    size: str | None,
    mean: str | None,
    std: str | None,
    channels: str | None,
    white: str | None,
    interpolation: str | None,
    allow_code: bool,
    target: str | None,
    versus: str | None,
    method: str,
    k: int | None,
    nodes: int | None,
    out: Path,
    layers: bool,
    check: bool,
    device: str,
    max_pixels: int | None,
) -> None:
    """Explain photos, or all the photos in a folder.

    Writes a picture (PNG) and the numbers behind it (JSON) for each photo.
    """
    if not photos:
        raise click.UsageError(
            "Name at least one photo or folder. To see what comes out without a photo of your "
            "own: howyouseeme demo"
        )
    if k is not None and method != "seed":
        raise click.UsageError(f"--k belongs to --method seed, not to {method}.")
    if nodes is not None and method != "evidence":
        raise click.UsageError(f"--nodes belongs to --method evidence, not to {method}.")
    parameters = {name: n for name, n in (("k", k), ("nodes", nodes)) if n is not None}
    files = _find_photos(photos)
    asked = _read_input_options(size, mean, std, channels, white, interpolation)
    network = _load(model, weights, device, allow_code)
    network = replace(network, preprocess=_preprocess(network, asked))
    wanted = _read_target(target, network)
    if versus is not None:
        rival = _read_target(versus, network)
        if wanted.top is not None or rival.index is None:
            raise click.UsageError("--versus stands one class against one: name them.")
        wanted = replace(wanted, rival=rival.index)
    explainer = _explainer(network, method, parameters)
    _make_folder(out)  # only now: a mistyped class should leave no empty folder behind
    if max_pixels is not None:
        from PIL import Image  # noqa: PLC0415

        Image.MAX_IMAGE_PIXELS = max_pixels
    failed = _explain_all(_Job(explainer, wanted, out, layers, check), files)
    if failed:
        click.echo(f"{failed} of {len(files)} failed", err=True)
        sys.exit(1)


@main.command()
@_out_option
@_verbose_option
def demo(out: Path) -> None:
    """Explain the photos that come with the package."""
    from .images import sample_photo  # noqa: PLC0415

    explainer = _explainer(_load(DEFAULT_MODEL, None, "cpu"), DEFAULT_METHOD, {})
    _make_folder(out)
    photos = sorted(sample_photo().parent.glob("*.jpg"))
    if _explain_all(_Job(explainer, _Target(), out, layers=False), photos):
        sys.exit(1)
    click.echo(
        "\nA photo of your own: howyouseeme explain photo.jpg\n"
        "The network is wrong about the rocket. Why is it no missile?\n"
        f"  howyouseeme explain {shlex.quote(str(sample_photo('rocket')))} --versus missile --check"
    )


@main.command()
@_verbose_option
def models() -> None:
    """List the networks that --model takes."""
    from .models import available  # noqa: PLC0415

    for name in available():
        click.echo(name)


@main.command()
@click.argument("text", required=False)
@_model_option
@_verbose_option
def classes(text: str | None, model: str) -> None:
    """List the classes that --target takes, or those with TEXT in their names."""
    from .models import available  # noqa: PLC0415
    from .models.classes import imagenet_classes  # noqa: PLC0415

    # All these have been trained on ImageNet, so that none has to be downloaded for this.
    names = imagenet_classes() if model in available() else _load(model, None, "cpu").classes
    if names is None:
        raise ModelError(f"{model} has no class names; give --target the index of a class.")
    wanted = (text or "").strip().casefold()
    found = [(i, name) for i, name in enumerate(names) if wanted in name.casefold()]
    if not found:
        raise InputError(f"{model} has no class with {text!r} in its name.")
    for index, name in found:
        click.echo(f"{index:>{len(str(len(names)))}}  {name}")


@main.command()
@_model_option
@click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with the weights of the network, instead of its own.",
)
@_input_options
@click.option(
    "--allow-code",
    is_flag=True,
    help="Load a --model file that can run any code: only if you trust its source.",
)
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
@click.option(
    "--out",
    default="howyouseeme-out",
    show_default=True,
    type=click.Path(file_okay=False, writable=True, path_type=Path),
    help="Folder for evaluation.csv and evaluation.json; made if it is missing.",
)
@click.option("--device", default="cpu", show_default=True, help="Such as cpu, cuda or mps.")
@_verbose_option
def evaluate(
    *,
    model: str,
    weights: Path | None,
    size: str | None,
    mean: str | None,
    std: str | None,
    channels: str | None,
    white: str | None,
    interpolation: str | None,
    allow_code: bool,
    images: Path,
    boxes: Path | None,
    methods: str,
    limit: int | None,
    grids: int,
    out: Path,
    device: str,
) -> None:
    """Measure how well the maps show where the answers come from.

    Prints a table of means with their 95 % intervals. What could not be used is told on the error
    output, and then the exit status is 1.
    """
    files = _find_photos([images])
    asked = _read_input_options(size, mean, std, channels, white, interpolation)
    network = _load(model, weights, device, allow_code)
    network = replace(network, preprocess=_preprocess(network, asked))
    from .evaluate import evaluate as measure  # noqa: PLC0415

    found = measure(
        network,
        files,
        boxes,
        methods=[name.strip() for name in methods.split(",") if name.strip()],
        limit=limit,
        grids=grids,
        say=_tell,
    )
    click.echo(found.table())
    for line in found.notes:
        click.echo(line, err=True)
    written = found.save(out)
    click.echo(f"{len(found.items)} images → {', '.join(map(str, written))}")
    for line in found.problems:
        click.echo(line, err=True)
    if found.problems:
        sys.exit(1)


@main.command()
@click.argument("source", metavar="VIDEO|FOLDER|webcam")
@click.option(
    "--box",
    metavar="X0,Y0,X1,Y1",
    help="Where the target is in the first frame, in pixels; X1 and Y1 are just outside.",
)
@click.option("--target", help="Class to look for in the first frame instead, by name or index.")
@_model_option
@_out_option
@click.option("--device", default="cpu", show_default=True, help="Such as cpu, cuda or mps.")
@_verbose_option
def track(
    source: str, box: str | None, target: str | None, model: str, out: Path, device: str
) -> None:
    """Follow a target through a video, a folder of frames, or a webcam (webcam, webcam:1).

    Writes a table of boxes (CSV) and an annotated video; for a folder, annotated frames.
    """
    if (box is None) == (target is None):
        raise click.UsageError("Say what to follow: --box X0,Y0,X1,Y1 or --target CLASS.")
    asked = None if box is None else _read_box(box)
    from .track import Tracker, follow  # noqa: PLC0415
    from .video import FrameWriter, VideoWriter, open_video  # noqa: PLC0415

    with open_video(source) as video:
        network = _load(model, None, device)
        index = _read_target(target, network).index
        if asked is None and index is None:
            raise click.UsageError(f"--target {target}: name one class to follow.")
        tracker = Tracker(network)

        def choose(frame: Any) -> Sequence[float]:
            if asked is not None:
                return asked
            from .propose import Proposer  # noqa: PLC0415

            assert index is not None
            return Proposer(network).find(frame, index)

        _make_folder(out)
        stem = source.replace(":", "-") if source.startswith("webcam") else Path(source).stem
        table = out / f"{stem}.csv"
        picture: FrameWriter | VideoWriter = (
            FrameWriter(out / stem)
            if Path(source).is_dir()
            else VideoWriter(out / f"{stem}.track.mp4", video.rate or 25)
        )
        seen = frames = 0
        bar = click.progressbar(
            follow(video, tracker, choose, table, picture),
            length=video.count,
            label="Tracking",
            file=sys.stderr,
            hidden=not sys.stderr.isatty(),
        )
        try:
            with bar as sightings:
                for sighting in sightings:
                    seen, frames = seen + sighting.found, frames + 1
        finally:
            if frames:
                click.echo(
                    f"{source} → found in {seen} of {frames} frames → {table}, {picture.path}"
                )


@main.command()
@click.argument("photos", nargs=-1, type=click.Path(path_type=Path), metavar="PHOTO|FOLDER...")
@click.option(
    "--count", default=100, show_default=True, type=click.IntRange(min=1), help="Regions at most."
)
@_model_option
@_out_option
@click.option("--device", default="cpu", show_default=True, help="Such as cpu, cuda or mps.")
@_verbose_option
def propose(photos: tuple[Path, ...], count: int, model: str, out: Path, device: str) -> None:
    """Propose what to look at in photos, before anybody asks for a class.

    Writes a picture of the saliency and the first regions (PNG), and all regions (JSON), for each.
    """
    if not photos:
        raise click.UsageError("Name at least one photo or folder.")
    files = _find_photos(photos)
    from .propose import Proposer  # noqa: PLC0415

    proposer = Proposer(_load(model, None, device))
    _make_folder(out)
    failed = 0
    with _progress(len(files)) as (step, clear):
        for file, name in zip(files, _output_names(files), strict=True):
            try:
                found = proposer(file, count)
                picture = out / f"{name}.regions.png"
                found.picture(file).save(picture)
                data = json.dumps(found.to_dict(str(file)), indent=1)
                (out / f"{name}.regions.json").write_text(data + "\n")
            except (HowYouSeeMeError, OSError) as error:
                failed += 1
                clear()
                _complain(file, error)
            else:
                clear()
                click.echo(f"{file} → {len(found.regions)} regions → {picture}")
            step()
    if failed:
        click.echo(f"{failed} of {len(files)} failed", err=True)
        sys.exit(1)


@main.command()
@click.argument("photos", nargs=-1, type=click.Path(path_type=Path), metavar="PHOTO|FOLDER...")
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
@_model_option
@_out_option
@click.option("--device", default="cpu", show_default=True, help="Such as cpu, cuda or mps.")
@_verbose_option
def detect(
    photos: tuple[Path, ...],
    targets: tuple[str, ...],
    top: int | None,
    threshold: float | None,
    model: str,
    out: Path,
    device: str,
) -> None:
    """Put boxes around objects in photos; the network was only ever trained to name them.

    Writes a picture (PNG) for each photo, and all boxes to detections.json (COCO).
    """
    if not photos:
        raise click.UsageError("Name at least one photo or folder.")
    if targets and top is not None:
        raise click.UsageError("Say what to look for: --target CLASS or --top N, not both.")
    files = _find_photos(photos)
    network = _load(model, None, device)
    wanted = [_read_target(target, network).index for target in targets]
    if None in wanted:
        raise click.UsageError("--target takes a class; for the N likeliest ones give --top N.")
    from . import localize  # noqa: PLC0415
    from .draw import boxes_picture, percent  # noqa: PLC0415
    from .images import load_image  # noqa: PLC0415

    explainer = _explainer(network, DEFAULT_METHOD, {})
    level = localize.THRESHOLD if threshold is None else threshold
    _make_folder(out)
    failed = 0
    found: dict[str, Sequence[localize.Detection]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    with _progress(len(files)) as (step, clear):
        for file, name in zip(files, _output_names(files), strict=True):
            try:
                image = load_image(file)
                classes = [index for index in wanted if index is not None]
                objects = localize.detect(explainer, image, classes, top or 1, level)
                picture = out / f"{name}.boxes.png"
                texts = [(one.box, f"{one.label} {percent(one.score)}") for one in objects]
                boxes_picture(image, texts).save(picture)
                found[str(file)], sizes[str(file)] = objects, (image.height, image.width)
                # After each photo, so that an interruption leaves what is finished.
                data = json.dumps(localize.to_coco(found, sizes), indent=1)
                (out / "detections.json").write_text(data + "\n")
            except (HowYouSeeMeError, OSError) as error:
                failed += 1
                clear()
                _complain(file, error)
            else:
                clear()
                labels = ", ".join(text for _, text in texts) or "nothing"
                click.echo(f"{file} → {labels} → {picture}")
            step()
    if failed:
        click.echo(f"{failed} of {len(files)} failed", err=True)
        sys.exit(1)


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="Its port."
)
@click.option(
    "--model",
    "models",
    multiple=True,
    default=[DEFAULT_MODEL],
    show_default=True,
    help="Network to load now, as for `howyouseeme explain`; repeatable, the first is the default.",
)
@click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with the weights of the network, where there is one --model.",
)
@click.option(
    "--allow-model",
    "allowed",
    multiple=True,
    help="Network that may be asked for too, and is loaded then; repeatable. No other ever is.",
)
@click.option(
    "--token",
    envvar="HOWYOUSEEME_TOKEN",
    help="What all must know who use the server; needed with a --host that others can reach. "
    "Better given in the environment variable HOWYOUSEEME_TOKEN, which no list of processes shows.",
)
@click.option("--page/--no-page", default=True, help="Serve the page too, or the API alone.")
@click.option(
    "--max-mb",
    default=Limits.body / 2**20,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Size of a request to the API, in MiB.",
)
@click.option(
    "--max-pixels",
    default=Limits.pixels,
    show_default=True,
    type=click.IntRange(min=1),
    help="Pixels of a photo.",
)
@click.option(
    "--max-seconds",
    default=Limits.seconds,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="From a request to its answer.",
)
@click.option(
    "--max-queue",
    default=Limits.queue,
    show_default=True,
    type=click.IntRange(min=1),
    help="Requests that wait; more are told that the server is busy.",
)
@click.option("--device", default="cpu", show_default=True, help="Such as cpu, cuda or mps.")
@_verbose_option
def serve(
    *,
    host: str,
    port: int,
    models: tuple[str, ...],
    weights: Path | None,
    allowed: tuple[str, ...],
    token: str | None,
    page: bool,
    max_mb: float,
    max_pixels: int,
    max_seconds: float,
    max_queue: int,
    device: str,
) -> None:
    """Serve a page to play with in a browser, and an HTTP API (described at /docs)."""
    if weights is not None and len(models) > 1:
        raise click.UsageError(
            "--weights are those of one --model; let a factory load the others'."
        )
    limits = Limits(
        body=round(max_mb * 2**20), pixels=max_pixels, queue=max_queue, seconds=max_seconds
    )
    settings = Settings(host, port, token or None, page, allowed, device, limits)
    networks = [_load(model, weights, device) for model in dict.fromkeys(models)]
    serve_web(networks, settings, say=click.echo)


# What to explain


@dataclass(frozen=True)
class _Target:
    index: int | None = None  # None: the class that the network answers
    top: int | None = None  # this many of the likeliest classes instead
    rival: int | None = None  # against this class


@dataclass(frozen=True)
class _Job:
    explainer: Explainer
    target: _Target
    out: Path
    layers: bool
    check: bool = False


def _find_photos(given: Sequence[Path]) -> list[Path]:
    """The files to explain, each once, in the order given; a folder stands for its photos."""
    found: dict[Path, Path] = {}
    for path in given:
        files = [path]
        if path.is_dir():
            try:
                inside = sorted(one for one in path.iterdir() if not one.name.startswith("."))
            except OSError as error:
                raise click.UsageError(f"{path}: {_reason(error)}.") from error
            files = [one for one in inside if one.suffix.lower() in SUFFIXES and not one.is_dir()]
            known = " ".join(sorted(SUFFIXES))
            heic = any(one.suffix.lower() in {".heic", ".heif"} for one in inside)
            hint = "; convert .heic to .jpg" if heic else ""
            if not files:
                raise click.UsageError(f"There is no photo in the folder {path} ({known}){hint}.")
            if len(files) < len(inside):
                skipped = f"{len(inside) - len(files)} of {len(inside)} skipped"
                read = f"read are files that end in {known}, not subfolders"
                click.echo(f"{path}: {skipped}; {read}{hint}", err=True)
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _output_names(files: Sequence[Path]) -> list[str]:
    """A name for the results of each file: its own, and what tells it from others of that name.

    That is the folder, if they are in several, and the suffix, if one folder has two of them.
    """
    # Without regard to case: on some systems X.png would overwrite x.png.
    alike: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        alike[file.stem.casefold()].append(file.resolve().parent)
    taken = {stem for stem, folders in alike.items() if len(folders) == 1}
    names = []
    for file in files:
        name = file.stem
        folders = alike[name.casefold()]
        if len(folders) > 1:
            apart = len(set(folders))
            parts = [
                file.resolve().parent.name if apart > 1 else "",
                name,
                file.suffix[1:].lower() if apart < len(folders) else "",
            ]
            base = name = "-".join(filter(None, parts))
            number = 1
            while name.casefold() in taken:
                number += 1
                name = f"{base}-{number}"
            taken.add(name.casefold())
        names.append(name)
    return names


def _read_box(text: str) -> tuple[float, ...]:
    try:
        sides = tuple(float(side) for side in text.split(","))
    except ValueError:
        sides = ()
    if len(sides) != 4:
        raise click.UsageError(
            f"--box {text}: give four numbers, X0,Y0,X1,Y1, such as 120,80,260,300."
        )
    return sides


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"Can't make the folder {out}: {_reason(error)}.") from error


def _read_input_options(
    size: str | None,
    mean: str | None,
    std: str | None,
    channels: str | None,
    white: str | None,
    interpolation: str | None,
) -> dict[str, Any]:
    """What --size and the like ask for, as fields of a `Preprocess`."""
    asked: dict[str, Any] = {}
    if size is not None:
        sides = re.fullmatch(r"(\d+)(?:x(\d+))?", size.strip().lower(), re.ASCII)
        if sides is None:
            raise click.UsageError(f"--size {size}: give a number, or HEIGHTxWIDTH, as in 192x256.")
        asked |= {"size": (int(sides[1]), int(sides[2] or sides[1])), "resize": "squash"}
        asked["crop_from"] = None
    for name, given in (("mean", mean), ("std", std)):
        if given is not None:
            try:
                asked[name] = tuple(float(number) for number in given.split(","))
            except ValueError:
                raise click.UsageError(
                    f"--{name} {given}: give a number, or one for each channel, as in 0.5,0.5,0.5."
                ) from None
    if channels is not None:
        asked["channels"] = channels
    if interpolation is not None:
        asked["interpolation"] = interpolation
    if white is not None:
        asked["scale"] = float(white) / 255
    if white != "255" and max(asked.get("mean", (0.0,))) > 1 and "size" in asked:
        raise click.UsageError(
            f"--mean {mean} is above white, which is 1: give --range 255 with it, or divide it by 255."
        )
    return asked


def _preprocess(network: Network, asked: dict[str, Any]) -> Preprocess:
    """The network's own preprocessing with what was asked for instead, or all of it as asked."""
    from .images import Preprocess  # noqa: PLC0415

    if network.preprocess is not None:
        return replace(network.preprocess, **asked)
    if "size" in asked:
        if "mean" not in asked:
            click.echo(
                f"Note: {network.name} gets pictures that are not normalised, as no --mean and --std say how.",
                err=True,
            )
        return Preprocess(**asked)
    raise ModelError(
        f"How a photo becomes the input of {network.name} is not known; give --size, and --mean, "
        "--std, --channels and --range as it was trained, or let a factory return "
        "howyouseeme.Network(name, module, howyouseeme.Preprocess(...), classes)."
    )


def _load(model: str, weights: Path | None, device: str, allow_code: bool = False) -> Network:
    from .models import load_model  # noqa: PLC0415

    _tell(f"loading {model}" + (f" with the weights in {weights}" if weights else ""))
    if ":" in model and not model.startswith(("torchvision:", "timm:", "transformers:")):
        sys.path.insert(0, "")  # a factory may be in the current folder
    network = load_model(model, weights=weights, allow_code=allow_code)
    try:
        network.module.to(device)
    except (RuntimeError, AssertionError) as error:  # torch's ways to say that there is no such one
        reason = str(error).strip().split("\n")[0]
        raise click.UsageError(f"The device {device} can't be used: {reason}") from error
    return network


def _explainer(network: Network, method: str, params: dict[str, Any]) -> Explainer:
    from .explainer import Explainer  # noqa: PLC0415

    return Explainer(network, method=method, **params)


def _read_target(target: str | None, network: Network) -> _Target:
    """What --target asks for, checked before the first photo."""
    if target is None:
        return _Target()
    top = re.fullmatch(r"top(\d+)", target.strip(), re.IGNORECASE | re.ASCII)
    if top is None:
        index = re.fullmatch(r"\d+", target.strip(), re.ASCII)
        try:
            return _Target(index=network.class_index(int(target) if index else target))
        except InputError as error:
            more = " `howyouseeme classes` lists them." if network.classes else ""
            raise InputError(f"{error}{more}") from error
    count, most = int(top[1]), len(network.classes or ())
    if count < 1 or (most and count > most):  # without names, the number of classes isn't known yet
        end = f" to {most} for this network" if most else ""
        raise click.UsageError(f"--target {target}: N goes from 1{end}.")
    return _Target(top=count)


# Explaining


def _explain_all(job: _Job, files: Sequence[Path]) -> int:
    """Explain the files one after the other; how many failed."""
    failed = 0
    with _progress(len(files)) as (step, clear):
        for file, name in zip(files, _output_names(files), strict=True):
            _tell(f"explaining {file}")
            lines: list[str] = []
            silent: list[str] = []  # the classes that nothing speaks for
            try:
                for explanation, result in _explain_one(job, file, name):
                    lines.append(_line(file, explanation, result))
                    if job.check and len(explanation.points[0]):
                        lines += _checked(job, explanation)
                    if not len(explanation.points[0]):
                        silent.append(_answer(explanation))
            except Exception as error:  # the other photos are not to suffer from this one
                failed += 1
                clear()
                _complain(file, error)
            else:
                clear()
            for line in lines:
                click.echo(line)
            for answer in silent:
                click.echo(
                    f"{file}: nothing in it speaks for {answer} more than for other classes",
                    err=True,
                )
            step()
    return failed


def _explain_one(job: _Job, file: Path, name: str) -> Iterator[tuple[Explanation, Path]]:
    """The explanations of one file, each with the path of its picture."""
    if job.target.rival is not None:
        explanations = [job.explainer(file, _versus(job))]
    elif job.target.top is None:
        explanations = [job.explainer(file, job.target.index)]
    else:
        explanations = job.explainer.top(file, k=job.target.top)
    for i, explanation in enumerate(explanations, start=1):
        # What was asked for is in the name, so that asking for something else replaces nothing.
        parts = [name]
        if job.target != _Target():
            rank = "" if job.target.top is None else f"{i}-"
            parts.append(rank + _slug(_answer(explanation)))
        method = explanation.method.name
        if method != DEFAULT_METHOD:
            parts.append(method)
        written = explanation.save(job.out, name=".".join(parts), layers=job.layers)
        yield explanation, next(path for path in written if path.suffix == ".png")


def _checked(job: _Job, explanation: Explanation) -> list[str]:
    """What the network says of the photo without the evidence, and of that alone."""
    photo = explanation.samples[0].image
    assert photo is not None  # a file was given
    asked = [explanation.target[0]]
    if job.target.rival is not None:
        one = job.target.index
        asked = [job.explainer(photo).target[0] if one is None else one, job.target.rival]
    photos = {
        "as it is": photo,
        "without that evidence": explanation.hidden(),
        "with it alone": explanation.hidden(others=True),
    }
    lines = []
    for name, changed in photos.items():
        *answers, top = job.explainer.many(changed, [*dict.fromkeys(asked), None])
        if top.target[0] not in asked:
            answers.append(top)
        lines.append(f"  {name}: {', '.join(map(_told, answers))}")
    return lines


def _versus(job: _Job) -> Target:
    from . import targets  # noqa: PLC0415

    one, rival, label = job.target.index, job.target.rival, job.explainer.network.label
    assert rival is not None
    name = "the likeliest class" if one is None else label(one)
    return replace(targets.versus(one, rival), label=f"{name}, not {label(rival)}")


def _answer(explanation: Explanation) -> str:
    return explanation.label[0] or str(explanation.target[0])  # not every network names its classes


def _line(file: Path, explanation: Explanation, picture: Path) -> str:
    return f"{file} → {_told(explanation)} → {picture}"


def _told(explanation: Explanation) -> str:
    """An answer, and how likely it is."""
    from .draw import percent  # noqa: PLC0415

    probability = explanation.probability[0]
    return _answer(explanation) + ("" if probability is None else f" {percent(probability)}")


def _slug(label: str) -> str:
    """The label as a part of a file name."""
    return re.sub(r"\W+", "-", label.lower()).strip("-")[:40].rstrip("-") or "class"


@contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """How to move the bar on, and how to clear its line before another is printed."""
    if total <= 3 or not sys.stderr.isatty():
        yield lambda: None, lambda: None
        return
    with click.progressbar(length=total, label="Explaining", file=sys.stderr) as bar:
        yield (
            lambda: bar.update(1),
            lambda: click.echo("\r\x1b[K", nl=False, err=True),
        )


# What to say


def _verbose() -> bool:
    context = click.get_current_context(silent=True)
    return bool(context and context.meta.get(_VERBOSE))


def _tell(line: str) -> None:
    if _verbose():
        click.echo(line, err=True)


def _complain(file: Path | None, error: Exception) -> None:
    """One line about an error on stderr: what was wrong, or that it is our mistake."""
    if isinstance(error, HowYouSeeMeError):
        # One line, also of those that list what is wrong.
        sentence = " ".join(str(error).replace(":\n", ": ").replace("\n", "; ").split())
    elif isinstance(error, OSError):
        sentence = _reason(error)
        if error.filename is not None and str(error.filename) != str(file):
            sentence += f": {error.filename}"
    else:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        sentence = f"unexpected error, please report it ({what})"
    if file is not None and not sentence.startswith((str(file), f"There is no file {file};")):
        sentence = f"{file}: {sentence}"
    click.echo(sentence if file else f"Error: {sentence}", err=True)
    if _verbose():
        click.echo("".join(traceback.format_exception(error)).rstrip(), err=True)


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


if __name__ == "__main__":
    main()
