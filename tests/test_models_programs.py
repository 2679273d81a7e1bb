"""Whole networks in PyTorch's own files, and in wrappers."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import howyouseeme as hysm
from howyouseeme.errors import InputError, ModelError
from howyouseeme.models import load_model
from howyouseeme.tape import record


class Runs:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch it-ran",)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(8, 5),
    )
    return module.eval()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def same(one: hysm.Explanation, other: hysm.Explanation) -> bool:
    return np.array_equal(one.points[0].position, other.points[0].position) and np.allclose(
        one.points[0].strength, other.points[0].strength, rtol=1e-4, atol=1e-6
    )


def export(module: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """As PyTorch does it today unasked; the strict way of 2.4 loses the parts of a bare Sequential."""
    return torch.export.export(module, (images,), strict=False)


@pytest.fixture
def exported(tmp_path: Path, image: Tensor) -> Path:
    torch.export.save(export(small(), image), tmp_path / "small.pt2")
    return tmp_path / "small.pt2"


def scripted(path: Path, image: Tensor, how: str) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        module = torch.jit.trace(small(), image) if how == "trace" else torch.jit.script(small())
        module = torch.jit.freeze(module) if how == "freeze" else module
        torch.jit.save(module, path)
    return path


# --- programs


def test_an_exported_program(exported: Path, image: Tensor) -> None:
    network = load_model(str(exported), allow_code=True)
    assert torch.equal(record(network.module, [image]).output.data, small()(image))
    assert same(hysm.explain(network, image), hysm.explain(small(), image))
    # It keeps the names of the modules that it was exported from.
    assert "4" in {call.module for call in record(network.module, [image]).calls}


def test_a_program_in_memory(image: Tensor) -> None:
    program = export(small(), image)
    assert same(hysm.explain(program, image), hysm.explain(small(), image))
    with pytest.raises(
        ModelError, match=r"module\(\) of a program of torch\.export.* give the program"
    ):
        hysm.explain(program.module(), image)
    with pytest.raises(ModelError, match="The program was exported in training mode"):
        hysm.explain(export(small().train(), image), image)


def test_a_program_that_has_lost_its_modules(
    monkeypatch: pytest.MonkeyPatch, image: Tensor
) -> None:
    """As a bare Sequential's of PyTorch 2.4, by default, where unflatten fails."""

    def fails(program: torch.export.ExportedProgram) -> None:
        raise AssertionError("Child module 'getattr' is not a descendant")

    monkeypatch.setattr(torch.export, "unflatten", fails)
    with pytest.raises(
        ModelError, match=r"The program can't .*Child module .* with strict=False\.$"
    ):
        hysm.explain(export(small(), image), image)


def test_a_program_for_one_image(image: Tensor) -> None:
    """Which can't run on two, as images that go together do otherwise."""
    images = torch.cat([image, image.flip(3), image.flip(2)])
    program = export(small(), image)
    found = hysm.explain(program, images, together=2)
    assert same(found, hysm.explain(small(), images))


def test_a_program_for_batches_of_two(image: Tensor) -> None:
    """Which can't run on one, as images of a batch do otherwise."""
    images = torch.cat([image, image.flip(3)])
    program = export(small(), images)
    assert same(hysm.explain(program, images), hysm.explain(small(), images, together=True))
    with pytest.raises(InputError, match=r"can't run on .*\(1, 3, "):
        hysm.explain(program, image)
    with pytest.raises(InputError, match=r"can't run on .*\(3, 3, "):
        hysm.explain(program, torch.cat([images, image]))


@pytest.mark.parametrize("how", ["trace", "script", "freeze"])
def test_torchscript(tmp_path: Path, image: Tensor, how: str) -> None:
    network = load_model(str(scripted(tmp_path / "small.pt", image, how)), allow_code=True)
    with torch.no_grad():
        plain = network.module(image)
    assert torch.allclose(plain, small()(image), atol=1e-5)  # freezing folds batch norms
    for _ in range(3):  # TorchScript optimises what ran before
        assert torch.equal(record(network.module, [image]).output.data, plain)
    assert same(hysm.explain(network, image), hysm.explain(small(), image))


def test_frozen_torchscript_in_memory(image: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        frozen = torch.jit.freeze(torch.jit.script(small()))
    assert not hasattr(frozen, "training")
    assert same(hysm.explain(frozen, image), hysm.explain(small(), image))


def test_a_pickled_model(tmp_path: Path, image: Tensor) -> None:
    torch.save(small().train(), tmp_path / "small.pth")
    network = load_model(str(tmp_path / "small.pth"), allow_code=True)
    assert same(hysm.explain(network, image), hysm.explain(small(), image))


def test_programs_are_refused_unless_they_are_trusted(
    exported: Path, tmp_path: Path, image: Tensor
) -> None:
    torch.save(small(), tmp_path / "small.pth")
    scripted(tmp_path / "small.pt", image, "trace")
    for name, kind in {
        "small.pt2": "a program of torch.export",
        "small.pt": "a TorchScript program",
        "small.pth": "a pickled model",
    }.items():
        with pytest.raises(
            ModelError, match=rf"{kind}.* can run code .* --allow-code \(allow_code"
        ):
            load_model(str(tmp_path / name))


def test_refused_code_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, old in (("new.pt", True), ("old.pt", False)):
        torch.save({"model": Runs()}, name, _use_new_zipfile_serialization=old)
        with pytest.raises(ModelError, match="can run code"):
            load_model(name)
    assert not Path("it-ran").exists()
    with pytest.raises(ModelError, match=r"new\.pt holds a dict, not a torch\.nn\.Module"):
        load_model("new.pt", allow_code=True)
    assert Path("it-ran").exists()  # it was not refused for another reason


def test_a_program_exported_in_training_mode(tmp_path: Path, image: Tensor) -> None:
    torch.export.save(export(small().train(), image), tmp_path / "train.pt2")
    with pytest.raises(ModelError, match="exported in training mode"):
        load_model(str(tmp_path / "train.pt2"), allow_code=True)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_weights_are_no_network(tmp_path: Path, name: str) -> None:
    path, state = tmp_path / name, small().state_dict()
    if name.endswith("pt"):
        torch.save(state, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(state, path)
    with pytest.raises(ModelError, match=r"holds weights alone, .* give this file as --weights"):
        load_model(str(path))


def test_files_that_are_missing_or_no_programs(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model file .*gone\.pt2; check"):
        load_model(str(tmp_path / "gone.pt2"))
    (tmp_path / "text.pt").write_text("no program")
    with pytest.raises(ModelError, match=r"text\.pt is not a file of weights"):
        load_model(str(tmp_path / "text.pt"))


def test_a_file_brings_its_own_weights(exported: Path) -> None:
    with pytest.raises(ModelError, match="brings its own weights"):
        load_model(str(exported), weights="other.safetensors", allow_code=True)


def test_a_damaged_program(exported: Path) -> None:
    import zipfile  # noqa: PLC0415

    with zipfile.ZipFile(exported.with_name("cut.pt2"), "w") as archive:
        archive.writestr("cut/models/model.json", "{")
    with pytest.raises(ModelError, match=r"cut\.pt2 can't be loaded as a program of torch\.export"):
        load_model(str(exported.with_name("cut.pt2")), allow_code=True)


# --- wrappers and kinds of weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(image: Tensor, dtype: torch.dtype) -> None:
    explanation = hysm.explain(small().to(dtype), image.to(dtype), target=2)
    reference = hysm.explain(small(), image, target=2)
    kept = {tuple(point) for point in explanation.points[0].position[:5].tolist()}
    exact = {tuple(point) for point in reference.points[0].position[:10].tolist()}
    assert kept <= exact
    assert np.corrcoef(explanation.saliency.ravel(), reference.saliency.ravel())[0, 1] > 0.99


def test_channels_last(image: Tensor) -> None:
    model = small().to(memory_format=torch.channels_last)
    explanation = hysm.explain(model, image.to(memory_format=torch.channels_last))
    assert same(explanation, hysm.explain(small(), image))


def test_frozen_weights(image: Tensor) -> None:
    assert same(hysm.explain(small().requires_grad_(False), image), hysm.explain(small(), image))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrappers_are_taken_off(image: Tensor, wrap: object) -> None:
    assert same(hysm.explain(wrap(small()), image), hysm.explain(small(), image))


def test_a_lightning_module(image: Tensor) -> None:
    lightning = pytest.importorskip("lightning", reason="pip install lightning")

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    assert same(hysm.explain(Lit().eval(), image), hysm.explain(small(), image))


# --- the same network, written otherwise


class Apart(nn.Module):
    """Batch norm as Keras and some ONNX exporters write it, bias apart, channels last in between."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor) -> Tensor:
        bare = nn.functional.conv2d(x.permute(0, 3, 1, 2), self.conv.weight)
        x = (bare.permute(0, 2, 3, 1) + self.conv.bias).relu()
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        return (x - self.norm.running_mean) * scale + self.norm.bias


class Moved(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


def test_how_a_network_is_written_does_not_matter(image: Tensor) -> None:
    torch.manual_seed(0)
    pairs = [(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), (nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))]
    for _, norm in pairs:
        nn.init.normal_(norm.running_mean)
        nn.init.normal_(norm.weight)  # half of them turn the sign
        nn.init.normal_(norm.bias)
    end = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    usual = [part for conv, norm in pairs for part in (conv, nn.ReLU(), norm)]
    other = [Moved(0, 2, 3, 1), *(Apart(*pair) for pair in pairs), Moved(0, 3, 1, 2)]
    first = nn.Sequential(*usual, end).eval().double()
    second = nn.Sequential(*other, end).eval().double()
    x = image.double()
    assert torch.allclose(first(x), second(x))
    for method in ("evidence", "exact"):
        one, two = (hysm.explain(net, x, method=method) for net in (first, second))
        assert np.allclose(one.saliency, two.saliency, atol=1e-6), method
