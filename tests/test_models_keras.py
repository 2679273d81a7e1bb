"""Keras models, from files and from memory, on its torch backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from networks import cifar, photo

import howyouseeme as hysm
from howyouseeme import cli
from howyouseeme.errors import MissingExtraError, ModelError
from howyouseeme.models import from_keras, load_model
from howyouseeme.models.keras import on_torch
from howyouseeme.tape import record

if find_spec("keras") is None:
    pytest.skip("keras is missing: pip install keras", allow_module_level=True)


@pytest.fixture(scope="module")
def keras() -> Any:
    return on_torch("The test")


@pytest.fixture(autouse=True)
def _same_weights(keras: Any) -> Iterator[None]:
    keras.utils.set_random_seed(0)
    yield
    keras.utils.clear_session()


def small(keras: Any) -> Any:
    """With an input that is not square, so that axes can't be mixed up unseen."""
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((12, 20, 3)),
            layers.Conv2D(8, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.MaxPooling2D(),
            layers.Conv2D(8, 3, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dropout(0.5),
            layers.Dense(5, activation="softmax"),
        ]
    )


def image(keras: Any, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("suffix", ["keras", "h5"])
@pytest.mark.filterwarnings("ignore")
def test_files(keras: Any, tmp_path: Path, suffix: str) -> None:
    model = small(keras)
    path = tmp_path / f"small.{suffix}"
    model.save(path)
    network = load_model(str(path))
    x = image(keras, 2, 3, 12, 20)
    with torch.no_grad():
        expected = model(x.permute(0, 2, 3, 1), training=False)
    assert torch.equal(record(network.module, [x]).output.data, expected)
    assert (network.name, network.preprocess, network.classes) == (path.name, None, None)
    points = hysm.explain(network, x).points[0].position
    assert points[:, 0].max() <= 11
    assert 11 < points[:, 1].max() <= 19


def trained() -> Path:
    """The .h5 of cifar-10-model."""
    spec = find_spec("cifar_10_model")
    assert spec is not None
    return Path(next(iter(spec.submodule_search_locations or ()))) / "trained_models/cnn_model.h5"


def test_a_trained_file_on_the_command_line(tmp_path: Path) -> None:
    words = ["explain", hysm.sample_photo("cat"), "--model", trained(), "--size", "32"]
    words += ["--out", tmp_path]
    result = CliRunner().invoke(cli.main, list(map(str, words)))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "cat.json").read_text())
    assert found["target"]["index"] == 3  # cat
    assert found["target"]["probability"] > 0.9


@pytest.mark.parametrize("method", ["evidence", "seed", "exact"])
def test_the_same_network_in_keras_and_pytorch_has_the_same_points(keras: Any, method: str) -> None:
    """The .h5 of cifar-10-model, through Keras and as the same weights in PyTorch."""
    reference = cifar().double()
    network = load_model(str(trained()))
    for name in ("cat", "rocket"):
        x = photo(name, 32).float()
        with torch.no_grad():
            assert torch.allclose(network.module(x).double(), reference(x.double()), atol=1e-3)
        mine, theirs = (
            hysm.explain(network, x, method=method),
            hysm.explain(reference, x.double(), method=method),
        )
        assert mine.target == theirs.target
        strength = {
            tuple(place): value
            for place, value in zip(
                theirs.points[0].position.tolist(), theirs.points[0].strength.tolist(), strict=True
            )
        }
        # Signed evidence cancels, which costs digits.
        rounding = max(strength.values()) * (1e-2 if method == "exact" else 1e-3)
        for place, value in zip(
            mine.points[0].position.tolist(), mine.points[0].strength.tolist(), strict=True
        ):  # those in neither are within rounding of zero
            assert abs(value - strength.pop(tuple(place), 0)) < rounding
        assert all(value < rounding for value in strength.values())


@pytest.mark.parametrize("name", ["MobileNetV2", "ResNet50V2", "EfficientNetB0", "DenseNet121"])
def test_applications(keras: Any, name: str) -> None:
    model = getattr(keras.applications, name)(weights=None, input_shape=(64, 64, 3), classes=7)
    network = from_keras(model)
    x = image(keras, 1, 3, 64, 64) * 255
    with torch.no_grad():
        expected = model(x.permute(0, 2, 3, 1), training=False)
    assert torch.equal(record(network.module, [x]).output.data, expected)
    explanation = hysm.explain(network, x)
    assert expected[0, explanation.target[0]] == expected.max()
    assert len(explanation.points[0]) > 0
    assert explanation.coverage[0] > 0.5


def test_a_model_with_its_channels_first(keras: Any) -> None:
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((3, 12, 20)),
            layers.Conv2D(8, 3, activation="relu", data_format="channels_first"),
            layers.GlobalAveragePooling2D(data_format="channels_first"),
            layers.Dense(5),
        ]
    )
    x = image(keras, 1, 3, 12, 20)
    with torch.no_grad():
        assert torch.equal(from_keras(model).module(x), model(x))


def test_a_layer_of_python_code_is_refused_and_does_not_run(
    keras: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    inputs = keras.layers.Input((8, 8, 3))
    hidden = keras.layers.Lambda(lambda x: (open("it-ran", "w").close(), x)[1])(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(hidden)))
    model.save("lambda.keras")
    Path("it-ran").unlink()  # it ran to find its shape
    with pytest.raises(
        ModelError, match=r"lambda\.keras holds .* \(Lambda\).* --allow-code \(allow"
    ):
        load_model("lambda.keras")
    assert not Path("it-ran").exists()
    load_model("lambda.keras", allow_code=True).module(torch.rand(1, 3, 8, 8))
    assert Path("it-ran").exists()


def test_files_that_are_no_models(keras: Any, tmp_path: Path) -> None:
    for name in ("text.keras", "text.h5"):
        (tmp_path / name).write_text("no model")
        with pytest.raises(ModelError, match=rf"{name} can't be loaded by Keras \("):
            load_model(str(tmp_path / name))


def test_what_is_no_model(keras: Any) -> None:
    with pytest.raises(ModelError, match=r"A dict is not a Keras model"):
        from_keras({})


def test_several_inputs(keras: Any) -> None:
    layers = keras.layers
    picture, table = layers.Input((12, 20, 3)), layers.Input((4,))
    seen = layers.GlobalAveragePooling2D()(layers.Conv2D(8, 3, activation="relu")(picture))
    joined = layers.Concatenate()([seen, layers.Dense(6, activation="relu")(table)])
    model = keras.Model([picture, table], layers.Dense(5)(joined))
    inputs = image(keras, 1, 3, 12, 20), image(keras, 1, 4)
    with torch.no_grad():
        expected = model([inputs[0].permute(0, 2, 3, 1), inputs[1]], training=False)
    assert torch.equal(from_keras(model).module(*inputs), expected)
    by_picture, by_table = hysm.explain(model, inputs).inputs
    assert by_picture.evidence.shape == (1, 12, 20)
    assert by_table.evidence.shape == (1, 4)
    assert len(by_picture.points[0])
    assert len(by_table.points[0])


@pytest.mark.parametrize("named", [False, True])
def test_a_model_in_memory_needs_no_wrapping(keras: Any, named: bool) -> None:
    model, x = small(keras), image(keras, 1, 3, 12, 20)
    given = hysm.Network("mine", model) if named else model
    found, want = hysm.explain(given, x), hysm.explain(from_keras(model), x)
    assert np.array_equal(found.points[0].position, want.points[0].position)


def test_a_model_on_another_backend_is_told(keras: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(keras)
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(ModelError, match="Keras runs on jax"):
        hysm.Explainer(model)


def test_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(config=SimpleNamespace(backend=lambda: "jax"))
    monkeypatch.setitem(sys.modules, "keras", other)
    with pytest.raises(
        ModelError, match=r"runs on jax; set .* KERAS_BACKEND=torch before Keras is"
    ):
        on_torch("small.keras")


def test_without_keras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    monkeypatch.setattr(sys, "path", [])
    (tmp_path / "small.keras").write_bytes(b"")
    with pytest.raises(MissingExtraError, match=r"pip install keras$"):
        load_model(str(tmp_path / "small.keras"))


def test_the_environment_is_left_as_it_was() -> None:
    code = (
        "import os; from howyouseeme.models.keras import on_torch;"
        "keras = on_torch('The test'); assert keras.config.backend() == 'torch';"
        "assert os.environ.get('KERAS_BACKEND') == 'jax'"
    )
    subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "KERAS_BACKEND": "jax"}, check=True
    )


def test_the_seed_of_dropout_is_no_weight(keras: Any) -> None:
    network = from_keras(small(keras))
    x = image(keras, 1, 3, 12, 20)
    assert np.array_equal(
        hysm.explain(network, x).points[0].position, hysm.explain(network, x).points[0].position
    )
