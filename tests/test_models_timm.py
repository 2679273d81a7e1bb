"""Classifiers of timm: weights from files, preprocessing as timm itself does it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import howyouseeme as hysm
from howyouseeme.errors import ModelError
from howyouseeme.images import Preprocess, load_image, sample_photo
from howyouseeme.models import hub, load_model
from howyouseeme.models.classes import imagenet_classes
from howyouseeme.models.timm import preprocess_of

timm = pytest.importorskip("timm", reason="pip install timm")


def model(name: str, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **options).eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("timm") / "lcnet.pth"
    torch.save(model("lcnet_035").state_dict(), path)
    return path


def test_a_model_with_weights_from_a_file(weights: Path) -> None:
    network = load_model("timm:lcnet_035", weights)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network.module(image), model("lcnet_035")(image))
    assert network.name == "timm:lcnet_035"
    assert network.classes == imagenet_classes()
    assert network.preprocess.mean == (0.485, 0.456, 0.406)
    assert not network.module.training
    assert len(hysm.explain(network, sample_photo("cat")).points[0]) > 0


def test_a_model_that_was_fine_tuned_for_other_classes(tmp_path: Path) -> None:
    tuned = model("lcnet_035", num_classes=5)
    torch.save(tuned.state_dict(), tmp_path / "tuned.pth")
    network, image = load_model("timm:lcnet_035", tmp_path / "tuned.pth"), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network.module(image), tuned(image))
    assert network.classes is None


def test_the_tag_of_the_weights_chooses_the_preprocessing() -> None:
    first, second = (preprocess_of(model(f"resnet18.{tag}")) for tag in ("a1_in1k", "tv_in1k"))
    assert (first.interpolation, second.interpolation) == ("bicubic", "bilinear")


@pytest.mark.parametrize(
    "name",
    [
        "resnet10t",  # crop, of a part
        "dm_nfnet_f0.dm_in1k",  # squash, of a part
        "tf_efficientnet_lite3.in1k",  # another mean
        "mobilevit_xxs.cvnets_in1k",  # no mean
        "maxvit_pico_rw_256.untrained",
        "mixnet_s",
    ],
)
def test_preprocessing_is_that_of_timm(name: str) -> None:
    made = torch.nn.Module()
    made.pretrained_cfg = timm.models.get_pretrained_cfg(name).to_dict()
    mine = preprocess_of(made)
    config = timm.data.resolve_model_data_config(made)
    theirs = timm.data.create_transform(**config, is_training=False)
    for photo in ("cat", "rocket"):
        picture = load_image(sample_photo(photo))
        tensor, _ = mine(picture)
        expected = theirs(picture)
        assert tensor.shape == expected.shape
        # Pillow resizes only the part that is cut, which may differ by a level.
        levels = (tensor - expected).abs() * 255 * torch.tensor(mine.std)[:, None, None]
        assert levels.max() < 1.5


def test_a_preprocessing_that_is_another_kind() -> None:
    made = torch.nn.Module()
    made.pretrained_cfg = {
        **timm.models.get_pretrained_cfg("resnet18").to_dict(),
        "crop_mode": "border",
    }
    assert preprocess_of(made) is None


def test_unknown_names() -> None:
    with pytest.raises(ModelError, match=r"no model 'resnet5O'; did you mean timm:resnet5"):
        load_model("timm:resnet5O")
    with pytest.raises(ModelError, match=r"no model 'qqqqqq'\.$"):
        load_model("timm:qqqqqq")


def test_an_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **options: object) -> None:
        assert options["pretrained"]
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(hub, "answers", lambda: True)
    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ModelError, match=r"from timm's hub \(no route\); .* pass --weights FILE"):
        load_model("timm:resnet18")


def test_models_without_weights_are_not_made_up() -> None:
    with pytest.raises(ModelError, match=r"could not be had .* pass --weights FILE"):
        load_model("timm:lcnet_035")  # timm has none


def test_weights_of_another_model(weights: Path) -> None:
    with pytest.raises(ModelError, match="don't fit timm:lcnet_050"):
        load_model("timm:lcnet_050", weights)


def test_a_picture_is_explained_where_it_is(weights: Path) -> None:
    picture = Image.fromarray(np.zeros((300, 500, 3), np.uint8))
    picture.paste((255, 255, 255), (200, 100, 260, 160))
    network = load_model("timm:lcnet_035", weights, preprocess=Preprocess((64, 64)))
    points = hysm.explain(network, picture).points[0].position
    assert points[:, 0].max() <= 299
    assert points[:, 1].max() <= 499
