"""What does an explanation cost? howyouseeme and its peers, in bare forward passes of the same network.

    python benchmarks/speed.py --out docs/benchmarks/speed.md

See docs/benchmarks/README.md. A run that was broken off goes on where it stopped.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import numpy as np
import quality
import torch
from quality import ROOT, Explain, Subject, installed
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import howyouseeme as hysm
from howyouseeme.tape import record

GB = 1e9

# -- how much is measured ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scale:
    """What is measured, and how often: `pairs` at least, then on for `seconds`, but no more than `most`."""

    networks: tuple[str, ...]
    flagship: str  # stands in a row of its own, with the seed method
    growing: tuple[str, ...]  # those whose cost is followed over side, batch and classes
    depths: tuple[str, ...]
    sides: tuple[int, ...]
    batches: tuple[int, ...]
    classes: tuple[int, ...]
    ks: tuple[int, ...]
    pairs: int = 15
    most: int = 45
    seconds: float = 10
    batch: int = 16
    together: int = 8  # images of a batch that share a pass, in one of its columns
    ten: int = 10
    nodes: int = 2000  # of the walk of few nodes
    size: int | None = None  # of all inputs; None: of each network its own
    steps: int = 50  # of integrated gradients
    masks: int = 500  # of RISE
    memories: tuple[str, ...] = ("memory", "memory-batch")
    judged: bool = True


FULL = Scale(
    networks=(
        "VGG-16",
        "AlexNet",
        "ResNet-50",
        "DenseNet-121",
        "Inception v3",
        "GoogLeNet",
        "SqueezeNet 1.1",
        "ShuffleNet v2",
        "MobileNet v2",
        "MobileNet v3 large",
        "RegNet-Y 400MF",
        "EfficientNet-B0",
        "ConvNeXt-Tiny",
        "EfficientNet-Lite0",
    ),
    flagship="VGG-16",
    growing=("ResNet-18", "VGG-16"),
    depths=("ResNet-18", "ResNet-34", "ResNet-50", "ResNet-101", "ResNet-152"),
    sides=(112, 160, 224, 320, 448, 640, 1024),
    batches=(1, 2, 4, 8, 16, 32, 64),
    classes=(1, 2, 5, 10, 20, 50, 100),
    ks=(1, 2, 5, 10, 20, 50, 100),
)

QUICK = Scale(
    networks=("SqueezeNet 1.1",),
    flagship="SqueezeNet 1.1",
    growing=("SqueezeNet 1.1",),
    depths=("ResNet-18",),
    sides=(64, 96),
    batches=(1, 2),
    classes=(1, 2),
    ks=(1, 2),
    pairs=2,
    most=2,
    batch=2,
    together=2,
    ten=2,
    size=64,
    steps=2,
    masks=25,
    memories=("memory",),
    judged=False,
)

#: What the issue of speed asks for at least: multiples of the forward pass, and of the kept activations.
ONE_FLAGSHIP, ONE, ONE_MEDIAN, BATCH, BATCH_MEDIAN = 1.2, 1.5, 1.3, 1.25, 1.15
TEN, SEED, MEMORY = 2.0, 1.3, 1.2

# -- networks ----------------------------------------------------------------------------------------

#: The builder's name in torchvision, and the side of its input.
TORCHVISION = {
    "VGG-16": ("vgg16", 224),
    "AlexNet": ("alexnet", 224),
    "ResNet-18": ("resnet18", 224),
    "ResNet-34": ("resnet34", 224),
    "ResNet-50": ("resnet50", 224),
    "ResNet-101": ("resnet101", 224),
    "ResNet-152": ("resnet152", 224),
    "DenseNet-121": ("densenet121", 224),
    "Inception v3": ("inception_v3", 299),
    "GoogLeNet": ("googlenet", 224),
    "SqueezeNet 1.1": ("squeezenet1_1", 224),
    "ShuffleNet v2": ("shufflenet_v2_x1_0", 224),
    "MobileNet v2": ("mobilenet_v2", 224),
    "MobileNet v3 large": ("mobilenet_v3_large", 224),
    "RegNet-Y 400MF": ("regnet_y_400mf", 224),
    "EfficientNet-B0": ("efficientnet_b0", 224),
    "ConvNeXt-Tiny": ("convnext_tiny", 224),
}

# As their published weights are loaded; drawing truncated normals takes a minute.
AS_PUBLISHED = {
    name: {"transform_input": True, "init_weights": False} for name in ("googlenet", "inception_v3")
}


@functools.lru_cache(maxsize=1)
def network(name: str, size: int | None = None, device: str = "cpu") -> Subject:
    """A network by its name in the tables, for square inputs of `size` (None: its own)."""
    real = name == "EfficientNet-Lite0"
    subject = quality.efficientnet() if real else random_network(name)
    if size is not None:
        subject = resized(subject, size)
    subject.module.to(device)
    return subject


def random_network(name: str) -> Subject:
    """One of torchvision's, with random weights and the batch statistics that go with them.

    Without these, activations of deep networks vanish or overflow, and such numbers have speeds of their own.
    """
    try:
        from torchvision import models  # noqa: PLC0415
    except ImportError:
        raise click.ClickException(f"{name} needs: pip install torchvision") from None
    builder, side = TORCHVISION[name]
    torch.manual_seed(0)
    module = models.get_model(builder, weights=None, **AS_PUBLISHED.get(builder, {})).eval()
    subject = resized(Subject(name, module, side, lambda _: torch.empty(0), plain), side)
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = None
    if norms:
        subject.bare(images(subject, 3))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
    return subject


def resized(subject: Subject, size: int) -> Subject:
    """The same network for photos of another size."""
    prepare = hysm.Preprocess(
        (size, size), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize="squash"
    )
    return dataclasses.replace(subject, size=size, prepare=lambda photo: prepare(photo)[0])


def plain(module: nn.Module, for_zennit: bool) -> nn.Module:
    """A copy as peers take it: nothing in modules happens in place; with its last convolution that has
    places, for the CAMs."""
    module = deepcopy(module)
    for part in module.modules():
        if hasattr(part, "inplace"):
            part.inplace = False
    found: list[nn.Module] = []
    convolutions = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    handles = [
        part.register_forward_hook(
            lambda part, _, output: found.append(part) if output[0, 0].numel() > 1 else None
        )
        for part in convolutions
    ]
    with torch.no_grad():
        module(torch.zeros(1, 3, 224, 224))
    for handle in handles:
        handle.remove()
    # Not as a module of it: zennit would hook it twice.
    module.__dict__.update(last=found[-1], last_conv=found[-1])
    return module


def images(subject: Subject, batch: int = 1, device: str = "cpu") -> Tensor:
    """[batch, channel, height, width]: the package's photos, in turn, shifted so that no two are the same."""
    names = ("cat", "coffee", "rocket")
    photos = [subject.prepare(hysm.load_image(hysm.sample_photo(name))) for name in names[:batch]]
    batched = [photos[i % len(photos)].roll(5 * (i // len(photos)), -1) for i in range(batch)]
    return torch.stack(batched).to(device)


# -- what is timed -----------------------------------------------------------------------------------

Work = Callable[[], object]


def views(explanation: hysm.Explanation) -> object:
    """All that an explanation shows, which is made when it is asked for."""
    return explanation.points, explanation.saliency, explanation.attention


def whole(subject: Subject, x: Tensor, classes: int | None = None, **method: Any) -> Work:
    """Whole explanations: of the top class, or of the first few classes from one tape."""
    explainer = hysm.Explainer(subject.module, **method)
    if classes is None:
        return lambda: views(explainer(x))
    return lambda: [views(explanation) for explanation in explainer.top(x, classes)]


def recording(subject: Subject, x: Tensor) -> Work:
    return lambda: record(subject.module, [x])


@dataclasses.dataclass(frozen=True)
class Peer:
    """A method of others: `pixels` tells whether it follows the network down to single pixels."""

    label: str
    package: str | None
    pixels: bool
    make: Callable[[Subject, Scale], Explain]


def of_quality(name: str) -> Callable[[Subject, Scale], Explain]:
    """As benchmarks/quality.py runs it."""
    return lambda subject, _: quality.METHODS[name].make(subject)


def integrated_gradients(subject: Subject, scale: Scale) -> Explain:
    """From black (zero), as captum's default; ten steps at once, for memory's sake."""
    from captum.attr import IntegratedGradients  # noqa: PLC0415

    explainer = IntegratedGradients(subject.plain(subject.module, False))

    def explain(x: Tensor, target: int) -> Tensor:
        with torch.enable_grad():
            found = explainer.attribute(
                x[None], target=target, n_steps=scale.steps, internal_batch_size=10
            )
        return found[0].detach().sum(0)

    return explain


def rise(subject: Subject, scale: Scale) -> Explain:
    return quality.rise(subject, masks=scale.masks)


PEERS = {
    "grad-cam": Peer("Grad-CAM", "grad-cam", False, of_quality("grad-cam")),
    "layer-cam": Peer("Layer-CAM", "grad-cam", False, of_quality("layer-cam")),
    "guided": Peer("guided backprop", "captum", True, of_quality("guided")),
    "integrated": Peer("integrated gradients", "captum", True, integrated_gradients),
    "lrp": Peer("LRP", "zennit", True, of_quality("lrp")),
    "excitation": Peer("excitation backprop", "zennit", True, of_quality("excitation")),
    "rise": Peer("RISE", None, False, rise),
}


def peer_work(peer: Peer, subject: Subject, scale: Scale) -> Work:
    """One map of the top class; refuses where none comes out."""
    explain = peer.make(subject, scale)
    x = images(subject)[0]
    target = int(subject.bare(x[None]).argmax())
    made = explain(x, target)
    if made.shape != x.shape[1:] or not bool(torch.isfinite(made).all()):
        raise ValueError(f"a map of {list(made.shape)}, or one with NaN or infinity")
    return lambda: explain(x, target)


# -- measuring ---------------------------------------------------------------------------------------

#: {"ratios": one a pair, "bare": median seconds, "work": median seconds}, or {"error": why there is none}
Row = dict[str, Any]


def clock() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def pairs(bare: Work, work: Work, least: int, most: int, seconds: float) -> Row:
    """Times of both, turn and turn about, after warm-up."""
    begin = clock()
    for _ in range(3):
        bare()
        work()
        if clock() - begin > seconds:
            break
    times: dict[Work, list[float]] = {bare: [], work: []}
    begin = clock()
    while len(times[work]) < least or (len(times[work]) < most and clock() - begin < seconds):
        turn = (bare, work) if len(times[work]) % 2 else (work, bare)
        for one in turn:
            start = clock()
            one()
            times[one].append(clock() - start)
    return {
        "ratios": [w / b for b, w in zip(times[bare], times[work], strict=True)],
        "bare": float(np.median(times[bare])),
        "work": float(np.median(times[work])),
    }


class Made(TorchDispatchMode):
    """Counts the memory that calls write their results to; twice used memory counts once."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.seen = {tensor.untyped_storage()._cdata for tensor in given}
        self.alive = list(given)  # or other tensors may get the same memory
        self.bytes = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                self.seen.add(tensor.untyped_storage()._cdata)
                self.alive.append(tensor)
                self.bytes += tensor.untyped_storage().nbytes()
        return result


@torch.no_grad()
def activations(module: nn.Module, x: Tensor) -> int:
    """Bytes of all that the layers of a bare forward pass make, in-place ones nothing. Nothing is computed,
    so that batch norm appears to keep two numbers a channel, which it doesn't."""
    state = {
        name: tensor.to("meta")
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    x = x.to("meta")
    with Made([x, *state.values()]) as made:
        torch.func.functional_call(module, state, (x,))
    return made.bytes


@contextlib.contextmanager
def peak(found: list[int]) -> Iterator[None]:
    """Adds the most bytes of memory that the process, or on the GPU its tensors, held meanwhile."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        yield
        found.append(torch.cuda.max_memory_allocated())
        return
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    yield
    status = Path("/proc/self/status").read_text().split()
    found.append(1024 * int(status[status.index("VmHWM:") + 1]))


def memory_here(name: str, size: int | None, batch: int, device: str) -> Row:
    """Peak memory of bare passes and of explanations, the first one included; for a process of its own."""
    subject = network(name, size, device)
    x = images(subject, batch, device)
    small = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)).eval()
    small.to(device)(x[:1, :, :32, :32])
    views(hysm.Explainer(small)(x[:1, :, :32, :32]))  # whatever is imported at first use
    found: list[int] = []
    for _ in range(2):
        subject.bare(x)
    with peak(found):
        subject.bare(x)
    with peak(found):
        work = whole(subject, x)
        for _ in range(2):
            work()
    kept = activations(subject.module, x)
    bare, explained = found
    return {"bare": bare, "explained": explained, "kept": kept, "ratio": (explained - bare) / kept}


def memory(name: str, size: int | None, batch: int, device: str) -> Row:
    """The same, measured in a new process, which gives memory back as soon as it is freed."""
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    asked = json.dumps([name, size, batch, device])
    command = [sys.executable, __file__, "--memory-of", asked]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(
        command, env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    row: Row = json.loads(done.stdout)
    return row


#: Parts of the package that take no part in an explanation of a tensor.
ASIDE = {
    *("evaluate", "models", "web"),
    *("cli", "draw.py", "localize.py", "propose.py", "regions.py", "track.py", "video.py"),
}


def made_by(scale: Scale, device: str, ours: bool) -> str:
    """Changes with whatever times depend on: the package's source (for our rows), this file, versions, machine."""
    package = Path(hysm.__file__).parent
    files = [Path(__file__)]
    if ours:
        sources = sorted(package.rglob("*.py"))
        files += [path for path in sources if path.relative_to(package).parts[0] not in ASIDE]
    else:
        files.append(Path(quality.__file__))
    versions = [
        installed(name)
        for name in ("torch", "torchvision", "numpy", "grad-cam", "captum", "zennit")
    ]
    digest = hashlib.sha256(repr((scale, device, versions, machine(device))).encode())
    for path in files:
        digest.update(code(path).encode())
    return digest.hexdigest()[:16]


def code(path: Path) -> str:
    """The code of a file, whatever its comments, docstrings and layout are."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
    return ast.dump(tree)


def machine(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return f"{model or platform.machine()}, {torch.get_num_threads()} thread(s)"


class Rows:
    """What was measured, kept in files row by row. Those that aren't asked for are None unless they are kept."""

    def __init__(self, folder: Path, scale: Scale, device: str, only: Sequence[str]) -> None:
        self.scale, self.device, self.only = scale, device, only
        self.kept = {
            ours: quality.Scores(folder / f"{name}-{device}.json", made_by(scale, device, ours))
            for name, ours in (("ours", True), ("peers", False))
        }

    def get(self, key: str, measure: Callable[[], Row], ours: bool = True) -> Row | None:
        kept = self.kept[ours]
        if key not in kept.found and self.only and not any(part in key for part in self.only):
            return None

        def told() -> Row:
            begin = time.perf_counter()
            try:
                row = measure()
            except click.ClickException:
                raise
            except Exception as error:  # whatever peers, or networks, may come up with
                text = str(error).strip() or type(error).__name__
                row = {"error": f"{type(error).__name__}: {text.splitlines()[0][:200]}"}
            shown = row.get("error") or f"{middle(row):.2f}"
            click.echo(f"{key}: {shown} ({time.perf_counter() - begin:.0f} s)")
            return row

        return kept.get(key, told)

    def timed(
        self, key: str, name: str, work: Callable[[Subject, Tensor], Work], batch: int = 1
    ) -> Row | None:
        """A row of ours: `work` beside bare passes of the same images."""

        def measure() -> Row:
            scale = self.scale
            subject = network(name, scale.size, self.device)
            x = images(subject, batch, self.device)
            timed = work(subject, x)
            return pairs(lambda: subject.bare(x), timed, scale.pairs, scale.most, scale.seconds)

        return self.get(key, measure)


Table = dict[str, dict[str, Row | None]]


def measure_networks(rows: Rows) -> Table:
    """{network: {column: row}}"""
    scale, found = rows.scale, {}
    for name in scale.networks:
        line = found[name] = {
            "one": rows.timed(f"{name}, one image", name, whole),
            "few": rows.timed(
                f"{name}, few nodes", name, functools.partial(whole, nodes=scale.nodes)
            ),
            "batch": rows.timed(f"{name}, batch", name, whole, scale.batch),
            "ten": rows.timed(
                f"{name}, classes", name, functools.partial(whole, classes=scale.ten)
            ),
            "recording": rows.timed(f"{name}, recording", name, recording),
        }
        if rows.device == "cpu":
            work = functools.partial(whole, together=scale.together)
            line["together"] = rows.timed(f"{name}, together", name, work, scale.batch)
        for column in scale.memories:
            batch = 1 if column == "memory" else scale.batch
            ask = functools.partial(memory, name, scale.size, batch, rows.device)
            line[column] = rows.get(f"{name}, {column}", ask)
        if name == scale.flagship:
            seed = functools.partial(whole, method="seed", k=20)
            line["seed"] = rows.timed(f"{name}, seed method", name, seed)
    return found


def measure_peers(rows: Rows, left_out: Sequence[str]) -> Table:
    """{network: {peer: row}}; each has at least one pair, and more while there is time."""
    scale, found = rows.scale, {}
    for name in scale.networks:

        def measure(peer: Peer, name: str = name) -> Row:
            subject = network(name, scale.size)
            x = images(subject)
            with contextlib.redirect_stderr(None):
                work = peer_work(peer, subject, scale)
            return pairs(lambda: subject.bare(x), work, 1, scale.pairs, scale.seconds)

        found[name] = {
            key: rows.get(f"{name}, peer {key}", functools.partial(measure, peer), False)
            for key, peer in PEERS.items()
            if key not in left_out
        }
    return found


#: {network: {size: row}}
Growth = dict[str, dict[Any, Row | None]]


def measure_growth(rows: Rows) -> dict[str, Growth]:
    """{what grows: {network: {how much: row}}}"""
    scale = rows.scale
    few = (min(5, scale.pairs), scale.pairs, 2 * scale.seconds)

    def grown(name: str, side: int | None, batch: int, **asked: Any) -> Row:
        subject = network(name, scale.size, rows.device)
        if side is not None:
            subject = resized(subject, side)
        # The tape keeps them, and the walk needs about as much.
        needed = 2 * batch * activations(subject.module, images(subject))
        if needed > (8 * GB if rows.device == "cpu" else torch.cuda.mem_get_info()[0] / 2):
            return {"error": f"left out: about {needed / GB:.0f} GB"}
        x = images(subject, batch, rows.device)
        row = pairs(lambda: subject.bare(x), whole(subject, x, **asked), *few)
        if "k" in asked:
            row["nodes"] = seed_nodes(subject, x, asked["k"])
        return row

    def follow(what: str, name: str, sizes: Sequence[int]) -> dict[Any, Row | None]:
        found = {}
        for size in sizes:
            asked: dict[str, Any] = {"side": None, "batch": 1}
            if what == "k":
                asked.update(method="seed", k=size)
            else:
                asked[what] = size
            measure = functools.partial(grown, name, **asked)
            found[size] = rows.get(f"{name}, growth {what} {size}", measure)
        return found

    return {
        "side": {name: follow("side", name, scale.sides) for name in scale.growing},
        "batch": {name: follow("batch", name, scale.batches) for name in scale.growing},
        "classes": {name: follow("classes", name, scale.classes) for name in scale.growing},
        "k": {scale.flagship: follow("k", scale.flagship, scale.ks)},
        "depth": {
            "ResNet": {
                int(name.rpartition("-")[2]): rows.get(
                    f"{name}, growth depth", functools.partial(grown, name, None, 1)
                )
                for name in scale.depths
            }
        },
    }


def seed_nodes(subject: Subject, x: Tensor, k: int) -> int:
    """How many nodes the seed method visits."""
    trail = hysm.Explainer(subject.module, "seed", k=k)(x).walk_again[0]().trail
    return sum(int(evidence.count_nonzero()) for evidence in trail.evidence.values())


# -- report ------------------------------------------------------------------------------------------


def middle(row: Row) -> float:
    return float(row["ratio"] if "ratio" in row else np.median(row["ratios"]))


def good(row: Row | None) -> bool:
    return row is not None and "error" not in row


def cell(row: Row | None, enough: int, notes: list[str]) -> str:
    """The median with its quartiles, or a reference to the note that tells what went wrong."""
    if row is None:
        return ""
    if "error" in row:
        if row["error"] not in notes:
            notes.append(row["error"])
        return f"failed [{notes.index(row['error']) + 1}]"
    if "ratio" in row:
        return f"{row['ratio']:.2f}"
    low, mid, high = np.quantile(row["ratios"], [0.25, 0.5, 0.75])
    digits = 2 if mid < 10 else 1 if mid < 100 else 0
    few = f", n = {len(row['ratios'])}" if len(row["ratios"]) < enough else ""
    return f"{mid:.{digits}f}<br><sub>{low:.{digits}f} to {high:.{digits}f}{few}</sub>"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    made = [head, ["---"] * len(head), *lines]
    return ["| " + " | ".join(line) + " |" for line in made] + [""]


def noted(notes: Sequence[str]) -> list[str]:
    return [*(f"[{i}] `{note}`  " for i, note in enumerate(notes, 1)), ""] if notes else []


def fastest(networks: Table, peers: Table) -> tuple[int, int]:
    """On how many networks ours is the fastest that reaches the pixels, and how many were compared."""
    won = compared = 0
    for name, line in networks.items():
        one = line["one"]
        rivals = [r for key, r in peers.get(name, {}).items() if PEERS[key].pixels]
        rivals = [row for row in rivals if row is not None and "error" not in row]
        if one is not None and rivals:
            compared += 1
            won += "error" not in one and middle(one) < min(map(middle, rivals))
    return won, compared


def target_lines(networks: Table, peers: Table, scale: Scale) -> list[list[str]]:
    """What was asked for, what was seen, and whether it is enough. What failed is a miss; a row that was
    not measured leaves the target open."""
    others = [name for name in networks if name != scale.flagship]
    lines: list[list[str]] = []

    def add(
        work: str, most: float, among: Sequence[str], columns: Sequence[str], median: bool
    ) -> None:
        asked = {(n, c): networks[n].get(c) for n in among for c in columns}
        if not asked:
            return
        seen = {key: middle(row) for key, row in asked.items() if row is not None and good(row)}
        failed = [key for key, row in asked.items() if row is not None and "error" in row]
        missing = sum(row is None for row in asked.values())
        told = "not measured"
        value = float("nan")
        if seen:
            worst = max(seen, key=lambda key: seen[key])
            value = float(np.median(list(seen.values()))) if median else seen[worst]
            told = f"{value:.2f}"
            if not median and len(among) > 1:
                below = sum(one <= most for one in seen.values())
                told += f" ({worst[0]}); {below} of {len(asked)} reach it"
        if failed:
            told += f"; failed: {', '.join(sorted({name for name, _ in failed}))}"
        if missing and seen:
            told += f"; {missing} not measured"
        missed = bool(failed) or value > most
        verdict = "missed" if missed else "open" if missing else "reached"
        lines.append([work, f"{most:g}", told, verdict if scale.judged else "not judged"])

    one, batch, few = ("one",), ("batch",), ("few",)
    add(f"{scale.flagship}, one image, one class", ONE_FLAGSHIP, [scale.flagship], one, False)
    add("each of the others, one image, one class", ONE, others, one, False)
    add("median over them", ONE_MEDIAN, others, one, True)
    add(f"{scale.flagship}, with {scale.nodes:,} nodes", ONE_FLAGSHIP, [scale.flagship], few, False)
    add(f"each of the others, with {scale.nodes:,} nodes", ONE, others, few, False)
    add("median over them", ONE_MEDIAN, others, few, True)
    add(f"each network, batch of {scale.batch}", BATCH, list(networks), batch, False)
    add("median over them", BATCH_MEDIAN, list(networks), batch, True)
    if any("together" in line for line in networks.values()):
        some = f"the same, together={scale.together}"
        add(some, BATCH, list(networks), ("together",), False)
        add("median over them", BATCH_MEDIAN, list(networks), ("together",), True)
    add(f"{scale.ten} classes of one image, from one tape", TEN, list(networks), ("ten",), False)
    add(f"the seed method, {scale.flagship}, k = 20", SEED, [scale.flagship], ("seed",), False)
    add("peak memory, in kept activations", MEMORY, list(networks), scale.memories, False)
    won, compared = fastest(networks, peers)
    verdict = "open" if compared < len(networks) else "reached" if won == compared else "missed"
    lines.append(
        [
            "the fastest that reaches the pixels",
            "on every network",
            f"on {won} of {compared} compared",
            verdict if scale.judged else "not judged",
        ]
    )
    return lines


def network_part(networks: Table, scale: Scale, picture: str) -> list[str]:
    notes: list[str] = []
    heads = {
        "one": "one image",
        "few": f"{scale.nodes:,} nodes",
        "batch": f"batch of {scale.batch}",
        "together": f"batch of {scale.batch}, together={scale.together}",
        "ten": f"{scale.ten} classes",
        "recording": "recording alone",
        "memory": "memory",
        "memory-batch": f"memory, batch of {scale.batch}",
    }
    columns = [column for column in heads if any(column in line for line in networks.values())]
    lines = []
    for name, line in networks.items():
        kept = line.get("memory")
        size = f"{kept['kept'] / 1e6:.0f} MB" if kept is not None and "kept" in kept else ""
        lines.append([name, *(cell(line.get(c), scale.pairs, notes) for c in columns), size])
    head = ["", *(heads[column] for column in columns), "kept activations, one image"]
    flagship = cell(networks[scale.flagship].get("seed"), scale.pairs, notes)
    return [
        "## Network by network",
        "",
        *markdown(head, lines),
        f"The seed method on {scale.flagship}, k = 20: {flagship or 'not measured'}",
        "",
        *noted(notes),
        f"![cost by network]({picture})",
        "",
    ]


def growth_part(growth: dict[str, Growth], picture: str) -> list[str]:
    titles = {
        "side": "image side, px",
        "batch": "images in a batch",
        "classes": "classes of one image, from one tape",
        "k": "k of the seed method",
        "depth": "layers",
    }
    made = ["## How it grows", ""]
    for what, by_network in growth.items():
        for name, line in by_network.items():
            notes: list[str] = []
            rows = {size: row for size, row in line.items() if row is not None}
            if not rows:
                made += [f"{titles[what].capitalize()}, {name}: not measured.", ""]
                continue
            fine = {size: row for size, row in rows.items() if "error" not in row}
            first = next(iter(fine.values()), None)
            lines, before = [], None
            for size, row in rows.items():
                if "error" in row or first is None:
                    lines.append(
                        [
                            str(size),
                            *[""] * 2,
                            cell(row, 0, notes),
                            *[""] * (what in ("classes", "k")),
                        ]
                    )
                    continue
                told = [
                    str(size),
                    f"{row['bare'] / first['bare']:.2f}",
                    f"{row['work'] / first['work']:.2f}",
                    cell(row, 15, notes),
                ]
                if what in ("classes", "k"):
                    count = row.get("nodes", size)
                    told.append(further(before, row, count))
                    before = row, count
                lines.append(told)
            head = [
                titles[what],
                "forward, times the first",
                "explanation, times the first",
                "explanation / forward",
            ]
            if what == "classes":
                head.append("each further class, in forward passes")
            if what == "k":
                head.append("nodes; a thousand further ones, in forward passes")
            made += [
                f"### {titles[what].capitalize()}: {name}",
                "",
                *markdown(head, lines),
                *noted(notes),
            ]
    drawn = any(
        row is not None for line in growth.values() for by in line.values() for row in by.values()
    )
    return [*made, *([f"![growth]({picture})", ""] if drawn else [])]


def further(before: tuple[Row, int] | None, row: Row, count: int) -> str:
    """What one class more, or a thousand nodes more, cost since the row before: linear if it stays the same."""
    nodes = f"{count:,}" if "nodes" in row else ""
    if before is None or count == before[1]:
        return nodes
    each = (middle(row) - middle(before[0])) / (count - before[1])
    return f"{nodes}; {1000 * each:.3f}" if nodes else f"{each:.3f}"


def peer_part(networks: Table, peers: Table, scale: Scale, picture: str) -> list[str]:
    notes: list[str] = []
    keys = [key for key in PEERS if any(key in line for line in peers.values())]
    head = [
        "",
        "**howyouseeme**",
        *(PEERS[key].label + " *" * (not PEERS[key].pixels) for key in keys),
    ]
    lines = []
    for name, line in peers.items():
        cells = [cell(line[key], scale.pairs, notes) for key in keys]
        lines.append([name, f"{cell(networks[name]['one'], scale.pairs, notes)}", *cells])
    return [
        "## Against peers",
        "",
        "One image, one class. \\* does not reach the pixels: a map of the last layer, or of coarse masks.",
        f"Integrated gradients take {scale.steps} steps, RISE {scale.masks} masks; the CAMs look at the last",
        "convolution. Peers get a copy of the network whose modules work out of place, EfficientNet-Lite0 also with",
        "batch norm folded in. Only times are compared: without ReLU modules guided backprop is the plain gradient,",
        "and zennit's rules would want some of these networks rewritten.",
        "",
        *markdown(head, lines),
        *noted(notes),
        f"![cost of peers]({picture})",
        "",
    ]


COLOURS = {
    "one": "#c1272d",
    "few": "#2b8a3e",
    "batch": "#1f4e79",
    "together": "#5b9bd5",
    "ten": "#e08e0b",
    "recording": "#999999",
}


def saved(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def quartiles(
    axis: Any, row: Row, y: float, colour: str, label: str | None, marker: str = "o"
) -> None:
    low, mid, high = np.quantile(row["ratios"], [0.25, 0.5, 0.75])
    axis.plot([low, high], [y, y], color=colour, linewidth=2, alpha=0.6)
    axis.plot(mid, y, marker, color=colour, markersize=5, label=label, linestyle="none")


def named(axis: Any, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="x", color="#dddddd")
    axis.spines[["top", "right"]].set_visible(False)
    axis.axvline(1, color="black", linewidth=0.8)


def plot_networks(networks: Table, scale: Scale, path: Path) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415

    labels = {
        "one": "one image",
        "few": f"{scale.nodes:,} nodes",
        "batch": f"batch of {scale.batch}",
        "together": f"the same, together={scale.together}",
        "ten": f"{scale.ten} classes of one image",
        "recording": "recording alone",
    }
    figure = Figure(figsize=(8, 1.6 + 0.4 * len(networks)))
    axis = figure.subplots()
    shown: set[str] = set()
    for y, line in enumerate(networks.values()):
        for shift, column in zip((-0.3, -0.18, -0.06, 0.06, 0.18, 0.3), labels, strict=True):
            row = line.get(column)
            if row is not None and "error" not in row:
                label = None if column in shown else labels[column]
                shown.add(column)
                quartiles(axis, row, y + shift, COLOURS[column], label)
    named(axis, list(networks))
    for column, most in (("one", ONE), ("batch", BATCH), ("ten", TEN)):
        axis.axvline(most, color=COLOURS[column], linewidth=1, linestyle=":")
    axis.set_xlim(left=0)
    axis.set_xlabel(
        "bare forward passes (median, quartiles); dotted: what it may be at most", fontsize=9
    )
    if shown:
        figure.legend(loc="upper center", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def plot_growth(growth: dict[str, Growth], path: Path) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415

    axes_of = {
        "side": "image side, px",
        "batch": "images in a batch",
        "classes": "classes",
        "k": "nodes that the seed method visits",
        "depth": "layers of the ResNet",
    }
    figure = Figure(figsize=(11, 6))
    axes = list(figure.subplots(2, 3).flat)
    for axis, (what, by_network) in zip(axes, growth.items(), strict=False):
        for (name, line), colour in zip(by_network.items(), ("#c1272d", "#1f4e79"), strict=False):
            rows = {
                row.get("nodes", size): np.quantile(row["ratios"], [0.25, 0.5, 0.75])
                for size, row in line.items()
                if row is not None and "error" not in row
            }
            if rows:
                low, mid, high = np.array(list(rows.values())).T
                axis.plot(list(rows), mid, "o-", color=colour, markersize=4, label=name)
                axis.fill_between(list(rows), low, high, color=colour, alpha=0.2, linewidth=0)
                axis.legend(fontsize=8, frameon=False)
        if what in ("side", "batch"):
            axis.set_xscale("log", base=2)
            sizes = sorted({size for line in by_network.values() for size in line})
            axis.set_xticks(sizes, map(str, sizes))
            axis.minorticks_off()
        axis.set_xlabel(axes_of[what], fontsize=9)
        axis.set_ylabel("explanation, in forward passes", fontsize=8)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylim(bottom=0)
        axis.grid(color="#dddddd")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(growth) :]:
        axis.axis("off")
    saved(figure, path)


def plot_peers(networks: Table, peers: Table, path: Path) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(8, 1.8 + 0.32 * len(peers)))
    axis = figure.subplots()
    looks = {
        "grad-cam": ("#9ecae1", "s"), "layer-cam": ("#6baed6", "D"), "guided": ("#2ca02c", "^"),
        "integrated": ("#9467bd", "v"), "lrp": ("#e08e0b", "P"), "excitation": ("#8c564b", "X"),
        "rise": ("#999999", "*"),
    }  # fmt: skip
    shown: set[str] = set()
    for y, (name, line) in enumerate(peers.items()):
        entries = {"howyouseeme": networks[name]["one"], **line}
        for key, row in entries.items():
            if row is None or "error" in row:
                continue
            colour, marker = looks.get(key, ("#c1272d", "o"))
            label = PEERS[key].label if key in PEERS else key
            quartiles(axis, row, y, colour, None if label in shown else label, marker)
            shown.add(label)
    named(axis, list(peers))
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("bare forward passes (median, quartiles)", fontsize=9)
    if shown:
        figure.legend(loc="upper center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.88))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


ABOUT = """\
# What an explanation costs

Made by `benchmarks/speed.py`; see [how to run it](README.md). All times are multiples of the same
network's bare forward pass (`torch.no_grad`) of the same images, measured turn and turn about with it after warm-up:
the median over at least {pairs} pairs, its quartiles below. *n* stands where there were fewer.

- An explanation is whole: recording, walk, and all that it shows (`points`, `saliency`, `attention`), by the default
  method.
- Torchvision's networks have **random weights**, with batch norm's statistics taken from three photos: speed
  hardly depends on weights, and nothing has to be downloaded. EfficientNet-Lite0 has its real ones. Images are the
  package's photos.
- *memory*: the peak of the process while the network is explained twice, the first call included, above the peak of
  its bare pass; in kept activations. These are all that the layers make, each piece of memory counted once (layers
  that work in place add nothing). Measured in a process of its own which gives memory back as it is freed
  (`VmHWM` of Linux; on a GPU, what torch allocated).
- *together*: on a CPU each image of a batch has a pass of its own, and gets to the bit what it gets alone; with
  `together` so many share one.
- *recording alone*: `howyouseeme.tape.record`, no walk.
"""


def made_with(packages: Sequence[str], device: str) -> list[str]:
    """The section that tells when, with what and on what a page was made."""
    found = [f"{name} {installed(name) or 'missing'}" for name in packages]
    versions = ", ".join([f"howyouseeme {hysm.__version__}", *found])
    when = datetime.now(timezone.utc).date().isoformat()
    python = f"Python {platform.python_version()}, {platform.system()}"
    return ["## Made with", "", f"{when}; {versions}; {python}; float32; {machine(device)}.", ""]


def report(
    networks: Table,
    growth: dict[str, Growth],
    peers: Table,
    left_out: Sequence[str],
    scale: Scale,
    device: str,
    out: Path,
) -> str:
    names = {part: f"{out.stem}-{part}.png" for part in ("networks", "growth", "peers")}
    plot_networks(networks, scale, out.with_name(names["networks"]))
    lines = [ABOUT.format(pairs=scale.pairs)]
    if not scale.judged:
        lines += ["**A quick run, to see that the benchmark works: its times mean nothing.**", ""]
    head = ["work", "at most", "seen", ""]
    lines += ["## Targets", "", *markdown(head, target_lines(networks, peers, scale))]
    lines += network_part(networks, scale, names["networks"])
    if any(row is not None for line in peers.values() for row in line.values()):
        plot_peers(networks, peers, out.with_name(names["peers"]))
        lines += peer_part(networks, peers, scale, names["peers"])
    grown = growth_part(growth, names["growth"])
    if any(names["growth"] in line for line in grown):
        plot_growth(growth, out.with_name(names["growth"]))
    lines += grown
    packages = [
        "torch",
        "torchvision",
        *(["grad-cam", "captum", "zennit"] if device == "cpu" else []),
    ]
    lines += made_with(packages, device)
    if left_out:
        lines += [f"Left out: {'; '.join(left_out)}.", ""]
    if device != "cpu":
        lines += ["Forward passes and explanations of one image, in milliseconds:", ""]
        rows = [(name, line["one"]) for name, line in networks.items()]
        timed = [(name, row) for name, row in rows if row is not None and "error" not in row]
        lines += markdown(
            ["", "forward", "explanation"],
            [[n, f"{1e3 * row['bare']:.1f}", f"{1e3 * row['work']:.1f}"] for n, row in timed],
        )
    return "\n".join(lines)


# -- command line ------------------------------------------------------------------------------------


@click.command()
@click.option("--quick", is_flag=True, help="Few, small and not judged: does the benchmark work?")
@click.option(
    "--only",
    multiple=True,
    help="Measure rows whose name has this in it (see what a run says), show what was kept of the others.",
)
@click.option("--device", default="cpu", show_default=True, help="'cuda' has no peers.")
@click.option("--threads", default=2, show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The page to write: docs/benchmarks/speed.md; of a quick run, out/benchmarks/speed/quick/speed.md.",
)
@click.option(
    "--rows",
    "folder",
    type=click.Path(path_type=Path),
    default=ROOT / "out/benchmarks/speed",
    help="Where rows are kept between runs.",
)
@click.option("--memory-of", hidden=True)
def main(
    quick: bool,
    only: tuple[str, ...],
    device: str,
    threads: int,
    out: Path | None,
    folder: Path,
    memory_of: str | None,
) -> None:
    """Measure what explanations cost, and what those of peers do."""
    torch.set_num_threads(threads)
    if memory_of is not None:
        click.echo(json.dumps(memory_here(*json.loads(memory_of))))
        return
    scale = QUICK if quick else FULL
    if quick:
        folder = folder / "quick"
    if out is None:
        suffix = "" if device == "cpu" else f"-{device}"
        place = folder if quick else ROOT / "docs/benchmarks"
        out = place / f"speed{suffix}.md"
    rows = Rows(folder, scale, device, only)
    missing = {key: peer for key, peer in PEERS.items() if installed(peer.package) is None}
    left_out = [f"{peer.label}: {peer.package} is missing" for peer in missing.values()]
    if device != "cpu":
        missing, left_out = PEERS, ["peers, which are compared on the CPU"]
    networks = measure_networks(rows)
    peers = measure_peers(rows, list(missing))
    growth = measure_growth(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(report(networks, growth, peers, left_out, scale, device, out))
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
