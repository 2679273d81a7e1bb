"""How well do maps show where an answer comes from? howyouseeme, its peers and controls, on the same images.

    python benchmarks/quality.py --half 1 --images 150 --grids 20 --out docs/benchmarks/quality.md

See README.md beside this file. A run that was broken off goes on where it stopped.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import importlib.util
import json
import platform
import time
import zlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import howyouseeme as hysm
from howyouseeme import evaluate
from howyouseeme.maps import gaussian_blur

ROOT = Path(__file__).resolve().parent.parent

#: From an input [channel, height, width] and a class to a map [height, width].
Explain = Callable[[Tensor, int], Tensor]


# -- networks ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network under test.

    - `module`: what howyouseeme explains, and what is timed and asked;
    - `prepare`: from a photo to its input [channel, height, width];
    - `plain(for_zennit)`: the same function made of modules that are used once, batch norm folded in,
      as hooks need it; with `last`, its last feature map, `last_conv`, the convolution before its ReLU, and `middle`,
      a stage before.
    """

    name: str
    module: nn.Module
    size: int
    prepare: Callable[[Image.Image], Tensor]
    plain: Callable[[bool], nn.Module]

    @torch.no_grad()
    def predict(self, batch: Tensor) -> Tensor:
        return self.module(batch).softmax(1)


class Sum(nn.Module):
    """Without zennit, a plain sum; zennit has a rule for its own."""

    def __init__(self, for_zennit: bool) -> None:
        super().__init__()
        self.sum = None
        if for_zennit:
            from zennit.layer import Sum as ZennitSum  # noqa: PLC0415

            self.sum = ZennitSum()

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return one + other if self.sum is None else self.sum(torch.stack([one, other], -1))


def folded(conv: Any, norm: Any) -> nn.Module:
    """A convolution that does what it and its batch norm did."""
    conv = deepcopy(conv)
    conv.weight, conv.bias = nn.utils.fusion.fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    return conv


def relu6() -> nn.Sequential:
    """A ReLU6 whose lower half guided backprop recognises."""
    return nn.Sequential(nn.ReLU(), nn.ReLU6())


class PlainBlock(nn.Module):
    def __init__(self, block: Any, for_zennit: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if block._block_args.expand_ratio != 1:
            layers += [folded(block._expand_conv, block._bn0), relu6()]
        layers += [folded(block._depthwise_conv, block._bn1), relu6()]
        layers += [folded(block._project_conv, block._bn2)]
        self.layers = nn.Sequential(*layers)
        args = block._block_args
        same = args.stride in (1, [1]) and args.input_filters == args.output_filters
        self.sum = Sum(for_zennit) if block.id_skip and same else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return y if self.sum is None else self.sum(y, x)


class PlainEfficientNet(nn.Module):
    """EfficientNet-Lite of plain modules."""

    def __init__(self, model: Any, for_zennit: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(folded(model._conv_stem, model._bn0), relu6())
        self.blocks = nn.Sequential(*[PlainBlock(block, for_zennit) for block in model._blocks])
        self.head = nn.Sequential(folded(model._conv_head, model._bn1), relu6())
        self.tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), deepcopy(model._fc))
        self.last, self.middle = self.head, self.blocks[10]
        self.last_conv = self.head[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.head(self.blocks(self.stem(x))))


class PlainFire(nn.Module):
    def __init__(self, fire: Any) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(deepcopy(fire.squeeze1x1), nn.ReLU())
        self.small = nn.Sequential(deepcopy(fire.expand1x1), nn.ReLU())
        self.large = nn.Sequential(deepcopy(fire.expand3x3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x)
        return torch.cat([self.small(x), self.large(x)], 1)


class PlainSqueezeNet(nn.Module):
    """SqueezeNet of plain modules."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        fires = {i: PlainFire(getattr(model, f"fire{i}")) for i in range(2, 10)}
        self.low = nn.Sequential(deepcopy(model.conv1), nn.ReLU(), nn.MaxPool2d(3, 2))
        self.low.extend([fires[2], fires[3], nn.MaxPool2d(3, 2), fires[4]])
        self.middle = fires[5]
        self.high = nn.Sequential(nn.MaxPool2d(3, 2), *[fires[i] for i in range(6, 10)])
        self.last = self.last_conv = deepcopy(model.conv10)
        self.tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.last(self.high(self.middle(self.low(x)))))


def efficientnet() -> Subject:
    network = hysm.load_model("efficientnet-lite0")
    assert network.preprocess is not None
    prepare = network.preprocess
    return Subject(
        "efficientnet-lite0",
        network.module,
        224,
        lambda photo: prepare(photo)[0],
        lambda for_zennit: PlainEfficientNet(network.module, for_zennit).eval(),
    )


def squeezenet() -> Subject:
    """SqueezeNet 1.1 of ndf; needs the tests' loader."""
    path = ROOT / "tests" / "networks.py"
    spec = importlib.util.spec_from_file_location("networks", path)
    if spec is None or spec.loader is None or not path.exists():
        raise click.ClickException(f"squeezenet needs {path}.")
    networks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(networks)
    try:
        module = networks.squeezenet()
    except BaseException as missing:  # pytest's skip is none of Exception
        raise click.ClickException(f"squeezenet can't be loaded: {missing}") from None

    def prepare(photo: Image.Image) -> Tensor:
        array = np.asarray(photo.convert("RGB").resize((227, 227), Image.Resampling.BICUBIC))
        pixels = torch.tensor(array).permute(2, 0, 1)[None].float()
        return networks.squeezenet_input(pixels)[0].contiguous()

    return Subject("squeezenet", module, 227, prepare, lambda _: PlainSqueezeNet(module).eval())


SUBJECTS = {"efficientnet-lite0": efficientnet, "squeezenet": squeezenet}


# -- methods ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table: `make` prepares it for a network, `package` is what it takes."""

    label: str
    kind: str
    make: Callable[[Subject], Explain]
    package: str | None = None


def ours(subject: Subject, method: str = "evidence", view: str = "saliency") -> Explain:
    explainer = hysm.Explainer(subject.module, method=method)
    return lambda x, target: getattr(explainer(x[None], target=target), view)[0]


def centre(_: Subject) -> Explain:
    def gaussian(x: Tensor, target: int) -> Tensor:
        down, across = (torch.linspace(-1, 1, size) for size in x.shape[1:])
        return torch.exp(-2 * (down[:, None] ** 2 + across**2))  # sigma: a quarter of the side

    return gaussian


def random_points(_: Subject) -> Explain:
    def points(x: Tensor, target: int) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(x.numpy().tobytes()) + target)
        places = torch.zeros(x[0].numel())
        places[torch.randint(len(places), (100,), generator=generator)] = 1
        return gaussian_blur(places.reshape(x.shape[1:]), 8)

    return points


def edges(_: Subject) -> Explain:
    def sobel(x: Tensor, target: int) -> Tensor:
        padded = nn.functional.pad(x.mean(0)[None, None], (1, 1, 1, 1), mode="replicate")
        smooth, slope = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0])
        kernels = torch.stack([slope[:, None] * smooth, smooth[:, None] * slope])[:, None]
        return nn.functional.conv2d(padded, kernels)[0].norm(dim=0)

    return sobel


def cam(subject: Subject, name: str, layer: str = "last") -> Explain:
    """Of grad-cam; enlarged to the input by the package."""
    import pytorch_grad_cam  # noqa: PLC0415
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget  # noqa: PLC0415

    model = subject.plain(False)
    explainer = getattr(pytorch_grad_cam, name)(model, target_layers=[getattr(model, layer)])

    def explain(x: Tensor, target: int) -> Tensor:
        with torch.enable_grad():
            made = explainer(input_tensor=x[None], targets=[ClassifierOutputTarget(target)])
        return torch.from_numpy(made[0])

    return explain


def captum(subject: Subject, name: str) -> Explain:
    """Of captum, summed over the colours."""
    from captum import attr  # noqa: PLC0415

    model = subject.plain(False)
    explainer = getattr(attr, name)(model)

    def explain(x: Tensor, target: int) -> Tensor:
        given = x[None].clone().requires_grad_()
        with torch.enable_grad():
            return explainer.attribute(given, target=target)[0].detach().sum(0)

    return explain


def smooth_grad(subject: Subject, samples: int = 15) -> Explain:
    """Absolute gradients under noise of 15 % of the range, summed over colours, blurred by 8 px."""
    from captum.attr import NoiseTunnel, Saliency  # noqa: PLC0415

    explainer = NoiseTunnel(Saliency(subject.plain(False)))

    def explain(x: Tensor, target: int) -> Tensor:
        given = x[None].clone().requires_grad_()
        spread = 0.15 * float(x.max() - x.min())
        torch.manual_seed(0)
        with torch.enable_grad():
            found = explainer.attribute(
                given, nt_type="smoothgrad", nt_samples=samples, stdevs=spread, target=target
            )
        return gaussian_blur(found[0].detach().sum(0).float(), 8)

    return explain


def zennit(subject: Subject, name: str, blur: float = 0) -> Explain:
    """Of zennit, summed over the colours."""
    from zennit import composites  # noqa: PLC0415
    from zennit.attribution import Gradient  # noqa: PLC0415

    model = subject.plain(True)
    composite = getattr(composites, name)()

    def explain(x: Tensor, target: int) -> Tensor:
        with torch.enable_grad(), Gradient(model=model, composite=composite) as attributor:
            _, relevance = attributor(
                x[None].clone(),
                lambda out: nn.functional.one_hot(torch.tensor([target]), out.shape[1]).to(out),
            )
        found = relevance[0].detach().sum(0)
        return gaussian_blur(found.clamp(min=0), blur) if blur else found

    return explain


def rise(subject: Subject, masks: int = 500, cells: int = 7, batch: int = 25) -> Explain:
    """Petsiuk et al. 2018, p = 0.5, with fewer masks than the 4000 to 8000 of the paper."""

    def explain(x: Tensor, target: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        height, width = x.shape[1:]
        step_y, step_x = -(-height // cells), -(-width // cells)
        total, size = torch.zeros(height, width), ((cells + 1) * step_y, (cells + 1) * step_x)
        for _ in range(0, masks, batch):
            coarse = (torch.rand(batch, 1, cells, cells, generator=generator) < 0.5).float()
            fine = nn.functional.interpolate(coarse, size=size, mode="bilinear")
            offsets = torch.randint(min(step_y, step_x), (batch, 2), generator=generator).tolist()
            mask = torch.stack(
                [
                    one[:, y : y + height, k : k + width]
                    for one, (y, k) in zip(fine, offsets, strict=True)
                ]
            )
            score = subject.predict(x * mask)[:, target]
            total += (score[:, None, None] * mask[:, 0]).sum(0)
        return total - total.min()

    return explain


_p = functools.partial
METHODS = {
    "evidence": Method("howyouseeme: evidence, saliency", "ours", ours),
    "evidence-attention": Method(
        "howyouseeme: evidence, attention", "ours", _p(ours, view="attention")
    ),
    "seed": Method(
        "howyouseeme: seed, attention", "ours", _p(ours, method="seed", view="attention")
    ),
    "centre": Method("centred Gaussian", "control", centre),
    "random": Method("random points, blurred", "control", random_points),
    "edges": Method("edges", "control", edges),
    "grad-cam": Method(
        "Grad-CAM, last convolution", "peer", _p(cam, name="GradCAM", layer="last_conv"), "grad-cam"
    ),
    "hires-cam": Method("HiRes-CAM", "peer", _p(cam, name="HiResCAM"), "grad-cam"),
    "layer-cam": Method("Layer-CAM, last", "peer", _p(cam, name="LayerCAM"), "grad-cam"),
    "layer-cam-middle": Method(
        "Layer-CAM, middle", "peer", _p(cam, name="LayerCAM", layer="middle"), "grad-cam"
    ),
    "guided": Method("guided backprop", "peer", _p(captum, name="GuidedBackprop"), "captum"),
    "input-x-gradient": Method(
        "input x gradient", "peer", _p(captum, name="InputXGradient"), "captum"
    ),
    "smoothgrad": Method("SmoothGrad, blurred 8 px", "peer", smooth_grad, "captum"),
    "lrp": Method("LRP epsilon-plus-flat", "peer", _p(zennit, name="EpsilonPlusFlat"), "zennit"),
    "lrp-blurred": Method(
        "LRP epsilon-plus-flat, blurred 8 px",
        "peer",
        _p(zennit, name="EpsilonPlusFlat", blur=8),
        "zennit",
    ),
    "excitation": Method(
        "excitation backprop", "peer", _p(zennit, name="ExcitationBackprop"), "zennit"
    ),
    "rise": Method("RISE, 500 masks", "peer", rise),
}


def installed(package: str | None) -> str | None:
    """The version of a package; None where it is missing."""
    try:
        return version(package) if package else ""
    except PackageNotFoundError:
        return None


# -- images -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Item:
    """One image: its input, its class, and that class's boxes [n, 4] in pixels of the input."""

    name: str
    input: Tensor
    target: int
    second: int
    boxes: np.ndarray
    probability: float

    @property
    def covered(self) -> float:
        """The share of the image inside the boxes."""
        return float(evaluate.inside(self.boxes, self.input.shape[1:]).mean())

    @property
    def small(self) -> bool:
        return self.covered < 0.25


@dataclasses.dataclass(frozen=True)
class Grid:
    """Four images of different classes, 2 x 2, and the cells that are asked for."""

    name: str
    input: Tensor
    targets: tuple[int, ...]
    cells: tuple[int, ...] = (0, 3)


def load_items(subject: Subject, data: Path, half: str) -> list[Item]:
    """The images of a half that the network gets right."""
    table = data / "boxes.csv"
    if not table.is_file() or not (data / "images").is_dir():
        raise click.ClickException(
            f"There is no benchmark data in {data}: it takes boxes.csv (file, class, x0, y0, x1, y1 in "
            "pixels of the image) and a folder images. Give its place by --data."
        )
    found: dict[str, tuple[int, list[list[float]]]] = {}
    with table.open() as file:
        for row in csv.DictReader(file):
            entry = found.setdefault(row["file"], (int(row["class"]), []))
            entry[1].append([float(row[key]) for key in ("x0", "y0", "x1", "y1")])
    items: list[Item] = []
    for i, (name, (target, boxes)) in enumerate(found.items()):
        if half != "all" and i % 2 != int(half):
            continue
        with Image.open(data / "images" / name) as photo:
            scale = subject.size / np.array([*photo.size, *photo.size])
            item = make_item(subject, name, photo.convert("RGB"), np.array(boxes) * scale)
        if item.target == target:
            items.append(item)
    return items


def make_item(subject: Subject, name: str, photo: Image.Image, boxes: np.ndarray) -> Item:
    """A photo with the class that the network gives it."""
    prepared = subject.prepare(photo)
    probability, order = subject.predict(prepared[None])[0].topk(2)
    return Item(name, prepared, int(order[0]), int(order[1]), boxes, float(probability[0]))


def make_grids(items: Sequence[Item], count: int, seed: int = 0) -> list[Grid]:
    """Grids of images that the network is sure of (0.9 and more), drawn at random."""
    sure = [item for item in items if item.probability >= 0.9]
    if count and len({item.target for item in sure}) < 4:
        raise click.ClickException(
            f"Grids take four classes with a probability of 0.9; {len(sure)} images are too few."
        )
    random = np.random.default_rng(seed)
    grids: list[Grid] = []
    while len(grids) < count:
        four = [sure[i] for i in random.choice(len(sure), 4, replace=False)]
        if len({item.target for item in four}) == 4:
            rows = [torch.cat([a.input, b.input], 2) for a, b in (four[:2], four[2:])]
            name = "+".join(item.name for item in four)
            grids.append(Grid(name, torch.cat(rows, 1), tuple(item.target for item in four)))
    return grids


# -- measuring --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is measured of each image."""

    steps: int = 16
    road: bool = True
    classes: bool = True


def measure_image(
    subject: Subject, explain: Explain, item: Item, settings: Settings
) -> dict[str, Any]:
    """All measures of one image, ready for JSON."""
    start = time.perf_counter()
    subject.predict(item.input[None])
    forward = time.perf_counter()
    saliency = explain(item.input, item.target)
    done = time.perf_counter()
    asked = (subject.predict, item.input, item.target, saliency)
    found: dict[str, Any] = {
        "forward": forward - start,
        "seconds": done - forward,
        "pointing": evaluate.pointing(saliency, item.boxes),
        "energy": evaluate.energy(saliency, item.boxes),
        "boxes": [round(iou, 4) for iou in evaluate.box_ious(saliency, item.boxes).tolist()],
        "insertion": evaluate.insertion(*asked, steps=settings.steps),
        "deletion": evaluate.deletion(*asked, steps=settings.steps),
    }
    if settings.road:
        found["road"] = evaluate.road(*asked)
    if settings.classes:
        second = explain(item.input, item.second)
        found["classes"] = evaluate.rank_correlation(saliency, second)
    return found


def measure_grid(explain: Explain, grid: Grid) -> dict[str, Any]:
    return {
        "grid": float(
            np.mean(
                [
                    evaluate.grid_share(explain(grid.input, grid.targets[cell]), cell)
                    for cell in grid.cells
                ]
            )
        )
    }


class Scores:
    """Scores of one method, kept in a file after every image; those of other code are dropped."""

    def __init__(self, path: Path, made_by: str) -> None:
        self.path, self.made_by = path, made_by
        self.found: dict[str, dict[str, Any]] = {}
        if path.is_file():
            kept = json.loads(path.read_text())
            if kept["made_by"] == made_by:
                self.found = kept["found"]

    def get(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if name not in self.found:
            self.found[name] = measure()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps({"made_by": self.made_by, "found": self.found}))
            unfinished.replace(self.path)
        return self.found[name]


def fingerprint(method: Method, settings: Settings) -> str:
    """Changes with whatever the scores depend on: the code of the method and the measures, the packages."""
    package = Path(hysm.__file__).parent
    files = [Path(__file__), package / "evaluate" / "measures.py"]
    if method.kind == "ours":
        files += [path for path in sorted(package.rglob("*.py")) if path.parent.name != "evaluate"]
    else:
        files.append(package / "maps.py")
    digest = hashlib.sha256(repr(settings).encode())
    for path in files:
        digest.update(path.read_bytes())
    for name in ("torch", "numpy", method.package):
        digest.update(str(installed(name)).encode())
    return digest.hexdigest()[:16]


def measure(
    subject: Subject,
    items: Sequence[Item],
    grids: Sequence[Grid],
    names: Sequence[str],
    folder: Path,
    settings: Settings,
    say: Callable[[str], None] = click.echo,
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Every method on every image and grid: {method: {"images": [...], "grids": [...]}}."""
    results = {}
    for name in names:
        method = METHODS[name]
        scores = Scores(folder / subject.name / f"{name}.json", fingerprint(method, settings))
        explain = method.make(subject)
        if items and items[0].name not in scores.found:
            explain(items[0].input, items[0].target)  # what only the first call costs
        start = time.perf_counter()
        results[name] = {
            "images": [
                scores.get(
                    item.name, functools.partial(measure_image, subject, explain, item, settings)
                )
                for item in items
            ],
            "grids": [
                scores.get(grid.name, functools.partial(measure_grid, explain, grid))
                for grid in grids
            ],
        }
        say(f"{subject.name}: {method.label} in {time.perf_counter() - start:.0f} s")
    return results


# -- report -----------------------------------------------------------------------------------------

#: Columns: name, whether high is good, and the values [n] or [n, m] whose mean it shows.
COLUMNS = (
    ("pointing", True),
    ("energy", True),
    ("box IoU .5", True),
    ("mean .3 .5 .7", True),
    ("small: pointing", True),
    ("small: box", True),
    ("insertion", True),
    ("deletion", False),
    ("ROAD", True),
    ("GridPG", True),
    ("2nd class", False),
)


def summary(
    items: Sequence[Item], result: dict[str, list[dict[str, Any]]]
) -> dict[str, evaluate.Interval | None]:
    """One row: each column's mean and interval; None where nothing was measured."""
    images, small = result["images"], np.array([item.small for item in items], dtype=bool)
    curves = [one["boxes"] for one in images]
    hits = {iou: evaluate.box_hits(curves, iou) for iou in evaluate.IOUS}
    pointing = np.array([one["pointing"] for one in images])
    values: dict[str, Any] = {
        "pointing": pointing,
        "energy": [one["energy"] for one in images],
        "box IoU .5": hits[0.5],
        "mean .3 .5 .7": np.stack(list(hits.values()), 1),
        "small: pointing": pointing[small],
        "small: box": hits[0.5][small],
        "insertion": [one["insertion"] for one in images],
        "deletion": [one["deletion"] for one in images],
        "ROAD": [one["road"] for one in images if "road" in one],
        "GridPG": [one["grid"] for one in result["grids"]],
        "2nd class": [one["classes"] for one in images if "classes" in one],
    }
    return {
        name: evaluate.bootstrap(values[name]) if len(values[name]) else None for name, _ in COLUMNS
    }


def table(items: Sequence[Item], results: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """The results in Markdown; of each column the best is bold, controls apart."""
    rows = {name: summary(items, result) for name, result in results.items()}
    rivals = [name for name in rows if METHODS[name].kind != "control"]
    best: dict[str, float] = {}
    for column, high in COLUMNS:
        means = [one.mean for name in rivals if (one := rows[name][column]) is not None]
        if means:
            best[column] = max(means) if high else min(means)

    def cell(name: str, column: str) -> str:
        one = rows[name][column]
        if one is None:
            return ""
        shown = f"{one.mean:.3f}"
        if name in rivals and shown == f"{best[column]:.3f}":
            shown = f"**{shown}**"
        return f"{shown}<br><sub>{one.low:.2f} to {one.high:.2f}</sub>"

    heads = [f"{name} {'↑' if high else '↓'}" for name, high in COLUMNS]
    lines = [
        "| " + " | ".join(["", *heads, "time", "s"]) + " |",
        "| --- |" + " --- |" * (len(heads) + 2),
    ]
    for name, result in results.items():
        seconds = float(np.median([one["seconds"] for one in result["images"]]))
        ratio = float(np.median([one["seconds"] / one["forward"] for one in result["images"]]))
        cells = [cell(name, column) for column, _ in COLUMNS]
        lines.append(
            "| "
            + " | ".join([METHODS[name].label, *cells, f"{ratio:.1f}", f"{seconds:.3f}"])
            + " |"
        )
    return "\n".join(lines)


def pictures(subject: Subject, names: Sequence[str], path: Path) -> None:
    """The package's photos under every method: those of ILSVRC may not be shown."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    photos = [hysm.load_image(hysm.sample_photo(name)) for name in ("cat", "coffee", "rocket")]
    size = (subject.size, subject.size)
    items = [make_item(subject, "", photo, np.zeros((1, 4))) for photo in photos]
    columns = 6
    rows = -(-(len(names) + 1) // (columns // len(photos)))
    figure = Figure(figsize=(2 * columns, 2.2 * rows))
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1, len(photos))
    for line in axes:
        for axis in line:
            axis.axis("off")
    for line, name in zip(axes, [None, *names], strict=False):
        explain = METHODS[name].make(subject) if name else None
        for axis, photo, item in zip(line, photos, items, strict=True):
            axis.imshow(np.asarray(photo.resize(size).convert("L")), cmap="gray", vmin=0, vmax=255)
            if explain is not None:
                heat = explain(item.input, item.target).clamp(min=0).numpy()
                top = float(np.quantile(heat, 0.999)) or 1.0
                axis.imshow(heat, cmap="inferno", alpha=0.75, vmin=0, vmax=top)
        line[0].set_title(METHODS[name].label if name else "photo", fontsize=9, loc="left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, pil_kwargs={"quality": 85})


ABOUT = """\
# How well the maps show it

Made by `benchmarks/quality.py`; see [how to run it](../../benchmarks/README.md). All methods saw the same images
in the same run; their target is the true class, and only images that the network gets right are taken.
Below each figure stands its 95 % confidence interval (bootstrap over images).

- *pointing*: the strongest place is in a box of the class, tolerance 15 px; *energy*: the share of the map there.
- *box*: the largest region above a threshold has an IoU of .5 with a box (mean: over .3, .5, .7); the threshold is
  chosen on one half of the images and scored on the other. *small*: boxes cover less than a quarter of the image.
- *insertion* into a strong blur, *deletion* to the mean colour, 16 steps: the mean probability. *ROAD*: half of
  what removing the most evident pixels costs more than removing the least.
- *GridPG*: share of the evidence in the asked cell of 2 x 2 images; chance is .25.
- *2nd class*: rank correlation of the maps for the first and the second class.
- *time*: median over images, in bare forward passes of the network (just before, without gradients); *s*: seconds.
"""


def report(
    parts: Sequence[str], names: Sequence[str], missing: Sequence[str], picture: Path | None
) -> str:
    packages = ("howyouseeme", "torch", "numpy", "grad-cam", "captum", "zennit")
    versions = ", ".join(f"{name} {installed(name) or 'missing'}" for name in packages)
    when = datetime.now(timezone.utc).date().isoformat()
    lines = [ABOUT, *parts, "## Made with", ""]
    lines += [
        f"{when}; {versions}; Python {platform.python_version()}, {platform.machine()}, "
        f"{torch.get_num_threads()} thread(s). Best figures, controls apart, are bold.",
        "",
    ]
    if missing:
        left_out = ", ".join(f"{METHODS[name].label} ({METHODS[name].package})" for name in missing)
        lines += [f"Left out, the package being missing: {left_out}.", ""]
    if picture is not None:
        lines += ["## Pictures", "", "The network's answer for each photo, under every method.", ""]
        lines += [f"![three photos under {len(names)} methods]({picture.name})", ""]
    return "\n".join(lines)


# -- command line -----------------------------------------------------------------------------------


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=ROOT.parent / "shared/data/ilsvrc-val-dev",
    help="Folder with boxes.csv and images.",
)
@click.option(
    "--network",
    "networks",
    multiple=True,
    type=click.Choice(list(SUBJECTS)),
    default=["efficientnet-lite0"],
    show_default=True,
)
@click.option(
    "--images",
    default=150,
    show_default=True,
    help="At most so many, of those that the network gets right.",
)
@click.option(
    "--grids",
    default=20,
    show_default=True,
    help="Grids of 2 x 2 images; two cells of each are asked for.",
)
@click.option(
    "--half",
    type=click.Choice(["0", "1", "all"]),
    default="1",
    show_default=True,
    help="Every second image, from the first or from the second.",
)
@click.option(
    "--methods", default=",".join(METHODS), help="Which, with commas between; all by default."
)
@click.option("--road/--no-road", default=True, help="Measure ROAD, which is slow.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=ROOT / "docs/benchmarks/quality.md",
    show_default=False,
    help="The page to write.",
)
@click.option(
    "--scores",
    type=click.Path(path_type=Path),
    default=ROOT / "out/benchmarks/quality",
    help="Where scores are kept between runs.",
)
@click.option("--pictures/--no-pictures", "with_pictures", default=True)
def main(
    data: Path,
    networks: tuple[str, ...],
    images: int,
    grids: int,
    half: str,
    methods: str,
    road: bool,
    out: Path,
    scores: Path,
    with_pictures: bool,
) -> None:
    """Measure howyouseeme, its peers and controls on the same images."""
    asked = [name.strip() for name in methods.split(",") if name.strip()]
    unknown = [name for name in asked if name not in METHODS]
    if unknown:
        raise click.ClickException(
            f"No method {', '.join(unknown)}; there are {', '.join(METHODS)}."
        )
    missing = [name for name in asked if installed(METHODS[name].package) is None]
    names = [name for name in asked if name not in missing]
    settings = Settings(road=road)
    parts, picture = [], None
    for network in networks:
        subject = SUBJECTS[network]()
        pool = load_items(subject, data, half)
        items = pool[:images]
        if len(items) < 2:
            raise click.ClickException(
                f"{network} gets {len(items)} images right: at least 2 are needed."
            )
        made = make_grids(pool, grids)
        results = measure(subject, items, made, names, scores, settings)
        small = sum(item.small for item in items)
        share = np.mean([item.covered for item in items])
        parts += [
            f"## {network}\n\n{len(items)} images of half {half} ({small} with small objects; boxes cover "
            f"{share:.3f} of the image on average), {len(made)} grids with 2 cells each.\n",
            table(items, results),
            "",
        ]
        if with_pictures and picture is None:
            picture = out.with_name(f"{out.stem}-pictures.jpg")
            pictures(subject, names, picture)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(report(parts, names, missing, picture))
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
