"""Image classifiers of Hugging Face's transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import howyouseeme as hysm
from howyouseeme.errors import ModelError
from howyouseeme.images import Preprocess, load_image, sample_photo
from howyouseeme.models import load_model
from howyouseeme.tape import record

transformers = pytest.importorskip("transformers", reason="pip install transformers")


def model(**options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8, layer_type="basic", **options
    )
    return transformers.ResNetForImageClassification(config).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model(id2label={0: "cat", 1: "dog", 2: "cow"}).save_pretrained(tmp_path)
    transformers.ConvNextImageProcessor(size={"shortest_edge": 64}).save_pretrained(tmp_path)
    return tmp_path


def test_a_folder(folder: Path) -> None:
    network = load_model(f"transformers:{folder}")
    assert network.name == f"transformers:{folder}"
    assert network.classes == ("cat", "dog", "cow")
    assert network.preprocess.size == (64, 64)
    assert not network.module.training
    explanation = hysm.explain(network, sample_photo("cat"), target="dog")
    assert explanation.label == ("dog",)


def test_an_output_that_is_an_object() -> None:
    module, image = model(num_labels=4), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = module(image).logits
    assert torch.equal(record(module, [image]).output["logits"].data, expected)
    assert hysm.explain(module, image).target == (int(expected.argmax()),)


def test_a_model_in_memory_names_its_classes(folder: Path) -> None:
    module = model(id2label={0: "cat", 1: "dog", 2: "cow"})
    image = torch.randn(1, 3, 32, 32)
    assert hysm.explain(module, image, "dog").label == ("dog",)
    assert hysm.Explainer(module, classes=["a", "b", "c"])(image, "b").label == ("b",)
    module.classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 5))
    assert hysm.explain(module, image, 4).label == ("class 4",)


def test_an_image_processor_is_a_preprocessing(folder: Path) -> None:
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    network = load_model(f"transformers:{folder}")
    explainer = hysm.Explainer(network.module, preprocess=processor)
    assert explainer.network.preprocess == network.preprocess
    assert explainer(sample_photo("cat"), "dog").label == ("dog",)


def test_a_folder_without_names_and_preprocessing(tmp_path: Path) -> None:
    model(num_labels=4).save_pretrained(tmp_path)
    network = load_model(f"transformers:{tmp_path}")
    assert (network.preprocess, network.classes) == (None, None)


def test_weights_from_another_file(folder: Path) -> None:
    torch.manual_seed(1)
    state = {name: torch.rand_like(value.float()) for name, value in model().state_dict().items()}
    state = {name: value[:3] if "classifier" in name else value for name, value in state.items()}
    state["classifier.1.bias"] = torch.rand(3)
    state["classifier.1.weight"] = torch.rand(3, 16)
    torch.save(state, folder / "other.pth")
    network = load_model(f"transformers:{folder}", folder / "other.pth")
    assert torch.equal(network.module.classifier[1].bias, state["classifier.1.bias"])


def test_weights_that_are_missing_are_not_made_up(folder: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    state = model(num_labels=3).state_dict()
    del state["classifier.1.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights that fit: classifier\.1\.weight; save"):
        load_model(f"transformers:{folder}")


def test_pickled_weights_are_not_loaded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(model(num_labels=3).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"can't be loaded .*give a folder with config\.json and mod"
    ):
        load_model(f"transformers:{folder}")


def test_places_that_hold_no_classifier(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can't be loaded"):
        load_model(f"transformers:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match="can't be loaded"):
        load_model(f"transformers:{tmp_path}")


PROCESSORS = {
    "ViTImageProcessor": {"size": {"height": 48, "width": 48}},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 64}, "crop_pct": 0.875},
    "CLIPImageProcessor": {"size": {"shortest_edge": 80}, "crop_size": {"height": 64, "width": 64}},
    "MobileViTImageProcessor": {  # swaps the channels
        "size": {"shortest_edge": 80},
        "crop_size": {"height": 64, "width": 64},
    },
    "EfficientNetImageProcessor": {  # normalises twice
        "size": {"height": 64, "width": 64},
        "resample": 3,
    },
    "MobileNetV2ImageProcessor": {
        "size": {"shortest_edge": 72},
        "crop_size": {"height": 64, "width": 64},
    },
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_preprocessing_is_that_of_the_processor(name: str) -> None:
    processor = getattr(transformers, name)(**PROCESSORS[name])
    mine = Preprocess.like(
        lambda one: processor(images=one, return_tensors="pt")["pixel_values"][0]
    )
    assert mine.channels == ("bgr" if name.startswith("MobileViT") else "rgb")
    for photo in ("cat", "rocket"):
        picture = load_image(sample_photo(photo))
        tensor, _ = mine(picture)
        expected = processor(images=picture, return_tensors="pt")["pixel_values"][0]
        assert tensor.shape == expected.shape
        # Processors cut an odd rest one pixel away from where torchvision does.
        moved = [tensor.roll((y, x), (1, 2)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
        inside = (slice(None), slice(1, -1), slice(1, -1))
        apart = min(float((one - expected)[inside].abs().mean()) for one in moved)
        assert apart * min(mine.std) < 1  # in levels of 255


def test_a_processor_of_another_kind_has_no_preprocessing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def padded(images: Image.Image, return_tensors: str) -> dict[str, torch.Tensor]:
        square = Image.new("RGB", (512, 512))
        square.paste(images)
        array = np.asarray(square.resize((64, 64)), np.float32)
        return {"pixel_values": torch.tensor(array).permute(2, 0, 1)[None]}

    auto = transformers.AutoImageProcessor
    assert load_model(f"transformers:{folder}").preprocess is not None
    monkeypatch.setattr(auto, "from_pretrained", lambda *_, **__: padded)
    assert load_model(f"transformers:{folder}").preprocess is None
