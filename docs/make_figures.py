"""Make every picture and table that the docs show, with the program itself."""

from __future__ import annotations

import copy
import inspect
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import torch
from nbclient import NotebookClient
from PIL import Image, ImageFilter
from torch import nn

import howyouseeme as hysm
from howyouseeme import watch
from howyouseeme.decompositions import decompositions
from howyouseeme.draw import boxes_picture
from howyouseeme.explanation import Explanation
from howyouseeme.localize import detect
from howyouseeme.propose import Proposer
from howyouseeme.rules import family_of, rules
from howyouseeme.track import Tracker, annotate

DOCS = Path(__file__).parent
sys.path.append(str(DOCS.parent / "benchmarks"))
import quality  # noqa: E402 - no package, but a script beside this one

IMAGES = DOCS / "images"


def save(picture: Image.Image, name: str, width: int = 1400) -> None:
    """A picture small enough for a repository."""
    height = round(picture.height * width / picture.width)
    shrunk = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    shrunk.save(IMAGES / f"{name}.jpg", quality=88, optimize=True)


def photos() -> None:
    """The README's pictures, and one photo under each method."""
    explainer = hysm.Explainer("efficientnet-lite0")
    save(explainer(hysm.sample_photo("cat")).picture(), "cat")
    save(explainer(hysm.sample_photo("rocket")).picture(layers=True), "rocket-layers")
    for method in ("evidence", "seed", "exact"):
        one = hysm.Explainer("efficientnet-lite0", method=method)
        save(one(hysm.sample_photo("coffee")).picture(), f"coffee-{method}")


def applications() -> None:
    """The README's pictures of what boxes, regions and targets look like."""
    photo = hysm.load_image(hysm.sample_photo("coffee"))
    found = detect(hysm.Explainer("efficientnet-lite0"), photo, top=3)
    told = [(one.box, one.label, one.caption) for one in found]
    save(boxes_picture(photo, told), "detect", 700)
    save(Proposer("efficientnet-lite0")(photo).picture(photo), "propose", 700)
    save(followed(), "track")
    save(watched(), "watch")


def clip() -> list[np.ndarray]:
    """A clip made of the photo of a cup: the camera pans across it, and comes closer."""
    photo = hysm.load_image(hysm.sample_photo("coffee"))
    frames = []
    for step in np.linspace(0, 1, 25):
        x, y, width = 5 + 175 * np.sin(2.2 * step), 10 + 60 * step**2, 440 - 130 * step
        view = (x, y, x + width, y + width * 3 / 4)
        frames.append(np.asarray(photo.resize((360, 270), Image.Resampling.BICUBIC, view)))
    return frames


def watched() -> Image.Image:
    """What answers for each frame of the clip."""
    explainer = hysm.Explainer("efficientnet-lite0")
    frames = [clip()[i] for i in (0, 6, 12, 18, 24)]
    shown = [watch.annotate(frame, watch.Moment(0, None, explainer(frame))) for frame in frames]
    return Image.fromarray(np.concatenate(shown, 1))


def followed() -> Image.Image:
    """The cup, found in each frame of the clip."""
    frames = clip()
    tracker = Tracker("efficientnet-lite0")
    sightings = [tracker.start(frames[0], CUP), *(tracker(frame) for frame in frames[1:])]
    shown = [annotate(frames[i], sightings[i]) for i in (0, 6, 12, 18, 24)]
    return Image.fromarray(np.concatenate(shown, 1))


#: x0, y0, x1, y1 in the first frame of the clip.
CUP = (132, 4, 340, 256)


def path_through_stages(explanation: Explanation) -> None:
    """One path, from the class down to its pixel: where it is, and how many pixels a node stands for."""
    path = explanation.path(0, [0])[0]
    stages = {layer.module: layer for layer in explanation.layers()}
    nodes = [node for node in path.nodes if node.module in stages and len(node.position) == 2]
    shown = nodes[:: max(len(nodes) // 6, 1)][:7]
    photo = explanation.samples[0].image
    assert photo is not None
    figure, axes = plt.subplots(1, len(shown), figsize=(2.4 * len(shown), 2.2))
    for axis, node in zip(axes, shown, strict=True):
        layer = stages[node.module]
        axis.imshow(np.asarray(photo.convert("L")), cmap="gray", alpha=0.6)
        height, width = layer.shape[1:]
        step_y, step_x = photo.height / height, photo.width / width
        y, x = node.position
        axis.add_patch(
            plt.Rectangle(
                (x * step_x, y * step_y), step_x, step_y, facecolor="#ffb000", edgecolor="#dc267f"
            )
        )
        axis.set_title(f"{node.module}\nchannel {node.channel}, {height}x{width}", fontsize=7)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(IMAGES / "path.jpg", dpi=110, bbox_inches="tight")
    plt.close(figure)


def steps_of_the_method() -> None:
    """The default method on one photo, after each of its steps."""
    photo = hysm.sample_photo("cat")
    focused = hysm.explain("efficientnet-lite0", photo)
    plain = hysm.explain("efficientnet-lite0", photo, focus=False)
    places = [layer for layer in plain.layers() if layer.shape[1:] == (7, 7)][-1].map
    drawn = focused.samples[0].image
    assert drawn is not None
    steps = {
        "head": places.numpy(),
        "body": plain.evidence[0].clamp(min=0).sqrt().numpy(),
        "focus": focused.evidence[0].clamp(min=0).sqrt().numpy(),
        "levels": focused.saliency[0].numpy(),
    }
    for name, heat in steps.items():
        figure, (left, right) = plt.subplots(1, 2, figsize=(6.4, 3.2))
        extent = (0, drawn.width, drawn.height, 0)
        left.imshow(drawn)
        right.imshow(np.asarray(drawn.convert("L")), cmap="gray", alpha=0.35)
        right.imshow(heat, cmap="inferno", alpha=0.85, extent=extent, interpolation="nearest")
        for axis in (left, right):
            axis.axis("off")
        figure.tight_layout(pad=0.3)
        figure.savefig(IMAGES / f"method-{name}.jpg", dpi=110, bbox_inches="tight")
        plt.close(figure)


def two_in_one() -> Image.Image:
    """A cat above a cup of coffee: a photo with two answers."""
    both = Image.new("RGB", (440, 440))
    for top, (name, box) in enumerate([("cat", (0, 40, 440, 260)), ("coffee", (50, 60, 550, 310))]):
        photo = hysm.load_image(hysm.sample_photo(name))
        both.paste(photo.crop(box).resize((440, 220), Image.Resampling.LANCZOS), (0, 220 * top))
    return both


def likeness() -> None:
    """What makes a picture of two things like each of two photos, by a network without its head."""
    network = hysm.load_model()
    encoder = copy.deepcopy(network.module)
    encoder._fc = nn.Identity()
    explainer = hysm.Explainer(encoder, preprocess=network.preprocess)
    both = two_in_one()
    panels = [("the picture", both)]
    for name in ("cat", "coffee"):
        tensor, _ = network.photo_input(hysm.load_image(hysm.sample_photo(name)))
        with torch.no_grad():
            target = hysm.targets.alike(encoder(tensor[None]), f"{name}.jpg")
        found = explainer(both, target)
        panels.append((found.label[0], found.frames()[2][2]))
    side_by_side(panels, "alike")


def peers() -> None:
    """The methods and their best-known peers on the same photos, each at its package's defaults."""
    subject = quality.efficientnet()
    columns = quality.free_photos(subject)
    both = two_in_one()
    for label in ("Egyptian cat", "espresso"):
        item = quality.make_item(subject, label, both)
        item = replace(item, target=hysm.load_model().class_index(label))
        columns.append((f"both, asked for\n{label}", both, item))
    names = ["evidence", "evidence-attention", "seed", "grad-cam", "lrp", "excitation"]
    quality.pictures(subject, names, columns, IMAGES / "methods.jpg")


def wrong_prediction() -> None:
    """The pictures of the recipe: four questions about the rocket, and what hiding things does."""
    explainer = hysm.Explainer("efficientnet-lite0")
    photo = hysm.load_image(hysm.sample_photo("rocket"))
    one, other = "drilling platform", "missile"
    apart = [hysm.targets.versus(one, other), hysm.targets.versus(other, one)]
    asked = explainer.many(photo, [one, other, *apart])
    panels = [(each.label[0], each.frames()[2][2]) for each in asked]
    side_by_side(panels, "wrong-asked")
    blurred = photo.filter(ImageFilter.GaussianBlur(25))
    panels = []
    for hidden, boxes in {
        "as it is": [],
        "rocket blurred": [(275, 110, 375, 405)],
        "outer towers blurred": [(0, 0, 100, 400), (550, 0, 640, 400)],
    }.items():
        changed = photo.copy()
        for box in boxes:
            changed.paste(blurred.crop(box), box)
        scores = explainer.many(changed, [one, other])
        told = ", ".join(f"{each.label[0]} {each.probability[0]:.0%}" for each in scores)
        panels.append((f"{hidden}:\n{told}", changed))
    side_by_side(panels, "wrong-hidden")


def side_by_side(panels: list[tuple[str, Image.Image]], name: str) -> None:
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 2.7))
    for axis, (title, picture) in zip(axes, panels, strict=True):
        axis.imshow(np.asarray(picture))
        axis.set_title(title, fontsize=8)
        axis.axis("off")
    figure.tight_layout(pad=0.4)
    figure.savefig(IMAGES / f"{name}.jpg", dpi=110, bbox_inches="tight")
    plt.close(figure)


def rules_page() -> None:
    """The table of all rules, from the registry."""
    families: dict[str, dict[str, list[str]]] = {}
    for name, function in sorted(rules().items()):
        text = (inspect.getdoc(function) or "").splitlines()[0]
        families.setdefault(family_of(name), {}).setdefault(text, []).append(name)
    page = DOCS / "rules.md"
    lines = [page.read_text().split("\n## ", 1)[0]]  # the introduction is written by hand
    for family, texts in families.items():
        module = inspect.getmodule(
            next(f for name, f in rules().items() if family_of(name) == family)
        )
        assert module is not None
        intro = (inspect.getdoc(module) or "").replace("\n", " ").split("  ")[0]
        lines += [
            f"## {family}",
            "",
            intro,
            "",
            "| calls | what they are, once frozen |",
            "| --- | --- |",
        ]
        for text, names in texts.items():
            calls = ", ".join(f"`{name}`" for name in names)
            lines.append(f"| {calls} | {text.replace('|', chr(92) + '|')} |")
        lines.append("")
    lines += [
        "## Taken apart",
        "",
        "Calls that the tape records as the simpler calls that they are made of, each of which has a rule above.",
        "",
        "| calls | what they make |",
        "| --- | --- |",
    ]
    parts: dict[str, list[str]] = {}
    for name, function in sorted(decompositions().items()):
        parts.setdefault((inspect.getdoc(function) or "").splitlines()[0], []).append(name)
    for text, names in parts.items():
        calls = ", ".join(f"`{name}`" for name in names)
        lines.append(f"| {calls} | {text.replace('|', chr(92) + '|')} |")
    page.write_text("\n".join([*lines, ""]))


def gallery() -> None:
    """Run the notebook, and keep what it shows in it."""
    path = DOCS / "gallery.ipynb"
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, record_timing=False, coalesce_streams=True).execute()
    notebook.metadata.language_info = {"name": "python"}  # whose version is no part of it
    nbformat.write(notebook, path)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    photos()
    applications()
    steps_of_the_method()
    path_through_stages(hysm.explain("efficientnet-lite0", hysm.sample_photo("cat")))
    peers()
    wrong_prediction()
    likeness()
    rules_page()
    gallery()


if __name__ == "__main__":
    main()
