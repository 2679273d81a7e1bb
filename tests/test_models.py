from __future__ import annotations

import dataclasses
import hashlib
import http.server
import io
import os
import pickle
import sys
import threading
import warnings
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import nn

import howyouseeme.models.torchvision as hub
from howyouseeme.errors import InputError, MissingExtraError, ModelError
from howyouseeme.images import Preprocess, load_image, sample_photo
from howyouseeme.models import Network, as_network, available, load_model
from howyouseeme.models.classes import imagenet_classes
from howyouseeme.models.weights import fill, read_weights

SMALL = "torchvision:squeezenet1_1"


class Runs:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch it-ran",)


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def not_a_module() -> dict:
    return {}


def described() -> Network:
    return Network("mine", tiny(), Preprocess((8, 8)), ("cat", "dog", "cow", "hen"))


def described_badly() -> Network:
    return Network("mine", {})


def broken() -> nn.Module:
    raise RuntimeError("oh")


def needs_arguments(width: int) -> nn.Module:
    return nn.Linear(width, width)


def infinite() -> nn.Module:
    module = tiny()
    nn.init.constant_(module[0].bias, torch.inf)
    return module


def named(*classes: str) -> Network:
    return Network("pets", nn.Identity(), None, classes)


@pytest.fixture(scope="module")
def embedded() -> Network:
    return load_model()


@pytest.fixture(scope="module")
def squeezenet() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    return models.squeezenet1_1(weights=None)


def saved(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path


# --- the embedded network


@pytest.mark.parametrize(
    ("photo", "label"),
    [("cat", "Egyptian cat"), ("coffee", "espresso"), ("rocket", "drilling platform")],
)
def test_the_embedded_network_names_the_photos(embedded: Network, photo: str, label: str) -> None:
    tensor, _ = embedded.preprocess(load_image(sample_photo(photo)))
    with torch.no_grad():
        scores = embedded.module(tensor[None])[0].softmax(0)
    assert embedded.label(int(scores.argmax())) == label
    assert scores.max() > 0.5


def test_the_embedded_network_is_quiet_and_ready(capfd: pytest.CaptureFixture[str]) -> None:
    network = load_model("efficientnet-lite0")
    network.module(torch.zeros(1, 3, 224, 224))
    assert capfd.readouterr() == ("", "")
    assert not network.module.training
    assert network.name == "efficientnet-lite0"
    assert network.classes == imagenet_classes()


def test_loading_the_package_loads_no_package_of_models() -> None:
    code = (
        "import sys, howyouseeme.models;"
        "others = 'torchvision timm transformers keras onnx onnxruntime safetensors';"
        "sys.exit(bool({'efficientnet_lite_pytorch', *others.split()} & {*sys.modules}))"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0


def test_imagenet_classes_are_torchvisions_and_all_different() -> None:
    theirs = pytest.importorskip("torchvision.models._meta")._IMAGENET_CATEGORIES
    ours = imagenet_classes()
    assert len({name.casefold() for name in ours}) == len(ours) == 1000
    renamed = {
        index for index, pair in enumerate(zip(ours, theirs, strict=True)) if len({*pair}) > 1
    }
    assert renamed == {134, 264, 474, 517, 638, 639}
    assert (ours[134], ours[517]) == ("crane (bird)", "crane (machine)")


# --- classes by name


@pytest.mark.parametrize("asked", ["tabby", " TABBY ", "281", 281])
def test_class_index(embedded: Network, asked: str | int) -> None:
    assert embedded.class_index(asked) == 281
    assert embedded.label(281) == "tabby"


def test_every_label_finds_its_class(embedded: Network) -> None:
    assert [embedded.class_index(embedded.label(i)) for i in range(1000)] == [*range(1000)]


def test_a_part_of_a_name_is_enough_if_no_other_has_it(embedded: Network) -> None:
    assert embedded.label(embedded.class_index("egyptian")) == "Egyptian cat"


def test_an_exact_name_wins_over_longer_names_and_indices() -> None:
    network = named("cat", "tiger cat", "0", "Cat")
    assert network.class_index("cat") == 0
    assert network.class_index("Cat") == 3
    assert network.class_index("0") == 2
    assert network.class_index("1") == 1
    with pytest.raises(InputError, match=r"'CAT' may be cat \(0\), Cat \(3\); give"):
        network.class_index("CAT")


def test_an_index_of_numpy_or_torch_does() -> None:
    network = named("cat", "dog")
    assert network.class_index(np.int64(1)) == network.class_index(torch.tensor(1)) == 1
    for wrong in (1.5, None, True, np.float32(1), ["cat"]):
        with pytest.raises(InputError, match="index or its name"):
            network.class_index(wrong)


def test_a_class_is_named_by_its_whole_name() -> None:
    network = named("cat", "tiger cat", "Cat")
    assert network.class_named("cat") == 0
    assert network.class_named("TIGER CAT") == 1
    assert network.class_named("tiger") is None
    with pytest.raises(InputError, match="may be"):
        network.class_named("CAT")


def test_ambiguous_names_list_the_candidates(embedded: Network) -> None:
    with pytest.raises(InputError, match=r"may be crane \(bird\) \(134\), crane \(machine\) \(517"):
        embedded.class_index("crane")
    with pytest.raises(InputError, match=r"\(\d+\) and \d+ more; give the whole name"):
        embedded.class_index("dog")


def test_unknown_names_get_suggestions(embedded: Network) -> None:
    with pytest.raises(InputError, match=r"no class 'tabbi'; did you mean tabby \(281\)\?$"):
        embedded.class_index("tabbi")
    for unknown in ("qqqqqq", "", "-1"):
        with pytest.raises(InputError, match=f"no class '{unknown}'\\.$"):
            embedded.class_index(unknown)


@pytest.mark.parametrize("index", [-1, 1000, "1000"])
def test_indices_out_of_range(embedded: Network, index: int | str) -> None:
    with pytest.raises(InputError, match=r"no class -?\d+; indices go from 0 to 999"):
        embedded.class_index(index)
    with pytest.raises(InputError, match="indices go from 0 to 999"):
        embedded.label(int(index))


def test_a_network_without_names() -> None:
    network = Network("mine", nn.Identity())
    assert network.class_index("7") == 7
    assert network.label(7) == "class 7"
    with pytest.raises(InputError, match="mine has no class names to look 'cat' up in"):
        network.class_index("cat")
    with pytest.raises(InputError, match=r"indices go from 0\.$"):
        network.class_index(-1)


# --- names of models


def test_available() -> None:
    names = available()
    assert names[0] == "efficientnet-lite0"
    assert {"torchvision:vgg16", "torchvision:resnet50", SMALL} <= {*names}
    assert "torchvision:fcn_resnet50" not in names


def test_available_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    assert available() == ["efficientnet-lite0"]


def test_missing_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(MissingExtraError, match=r"pip install torchvision$"):
        load_model("torchvision:resnet50")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50", r"no model 'resnet50' \(did you mean torchvision:resnet50, "),
        ("efficientnet-lite", r"did you mean efficientnet-lite0"),
        ("qqqqqq", "no model 'qqqqqq'; `howyouseeme models` lists them"),
        ("my/cat.JPG", r"my/cat\.JPG is a photo, .* as in `howyouseeme explain my/cat\.JPG` or"),
        (
            "torchvision:resnet5O",
            "no image classifier 'resnet5O'; did you mean torchvision:resnet50",
        ),
        ("torchvision:qqqqqq", r"no image classifier 'qqqqqq'\.$"),
        ("torchvision:fcos_resnet50_fpn", "is no image classifier: let a function of yours return"),
        ("no_such_package:factory", "No module named 'no_such_package'"),
        ("math:no_such_name", "no attribute 'no_such_name'"),
        (":factory", "can't be imported"),
        (f"{__name__}:not_a_module", "gave a dict, not a torch.nn.Module or a howyouseeme.Net"),
        (f"{__name__}:described_badly", "gave a dict, not a torch.nn.Module"),
        (f"{__name__}:needs_arguments", "failed with TypeError: .*argument: 'width'\\.$"),
        (f"{__name__}:broken", r"broken\(\) failed with RuntimeError: oh\.$"),
        (f"{__name__}:SMALL", "is a str; it must be callable without arguments"),
        (f"{__name__}:infinite", r"can't be explained: 0\.bias holds NaN or infinity"),
    ],
)
def test_models_that_cannot_be_had(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(name)


def test_a_factory(tmp_path: Path) -> None:
    source = tiny()
    network = load_model(f"{__name__}:tiny", saved(tmp_path / "tiny.pth", source.state_dict()))
    assert torch.equal(network.module[0].weight, source[0].weight)
    assert not network.module.training
    assert (network.preprocess, network.classes) == (None, None)


def test_a_factory_of_a_network(tmp_path: Path) -> None:
    source = tiny()
    path = saved(tmp_path / "tiny.pth", source.state_dict())
    network = load_model(f"{__name__}:described", path)
    assert torch.equal(network.module[0].weight, source[0].weight)
    assert not network.module.training
    assert network.name == "mine"
    assert network.preprocess == Preprocess((8, 8))
    assert network.class_index("cow") == 2


def test_a_factory_in_a_file_with_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mistaken.py").write_text("def factory(:")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=r"can't be imported \(SyntaxError: "):
        load_model("mistaken:factory")


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_missing_packages_of_models(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(MissingExtraError, match=rf"pip install {kind}$"):
        load_model(f"{kind}:resnet50")


def test_preprocess_can_be_replaced() -> None:
    mine = Preprocess((64, 64))
    assert load_model(f"{__name__}:tiny", preprocess=mine).preprocess is mine


# --- torchvision's models


@pytest.mark.parametrize(
    "error", [URLError("no route"), TimeoutError("slow"), RuntimeError("hash")]
)
def test_an_unreachable_hub(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(
        pytest.importorskip("torchvision").models._api, "load_state_dict_from_url", unreachable
    )
    with pytest.raises(ModelError, match=r"hub \(.*pth elsewhere and pass --weights FILE"):
        load_model(SMALL)


def test_weights_of_the_hub_are_downloaded_once(
    squeezenet: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a hub on this machine: over HTTP, with the checksum in the file's name as there."""
    buffer = io.BytesIO()
    torch.save(squeezenet.state_dict(), buffer)
    name = f"squeezenet1_1-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.pth"
    (tmp_path / name).write_bytes(buffer.getvalue())

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *_: Any) -> None:
            pass

    weights = pytest.importorskip("torchvision.models").SqueezeNet1_1_Weights.DEFAULT
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{name}"
        monkeypatch.setattr(weights, "_value_", dataclasses.replace(weights.value, url=url))
        downloaded = load_model(SMALL)
        server.shutdown()
    kept = load_model(SMALL)  # the hub is gone, its file is not
    for network in (downloaded, kept):
        for key, value in squeezenet.state_dict().items():
            assert torch.equal(network.module.state_dict()[key], value)
        assert network.preprocess is not None


@pytest.mark.parametrize("name", ["squeezenet1_1", "googlenet", "densenet121"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_torchvision_fine_tuned_for_other_classes(tmp_path: Path, name: str, prefix: str) -> None:
    models = pytest.importorskip("torchvision").models
    options = {"init_weights": False} if name == "googlenet" else {}
    module = models.get_model(name, num_classes=7, **options)
    state = {prefix + key: value for key, value in module.state_dict().items()}
    torch.save(state, tmp_path / "mine.pth")
    network = load_model(f"torchvision:{name}", tmp_path / "mine.pth")
    assert network.classes is None
    assert network.module(torch.rand(1, 3, 64, 64)).shape == (1, 7)
    for key, value in network.module.state_dict().items():
        assert torch.equal(value, module.state_dict()[key]), key


def test_weights_that_differ_in_more_than_the_classes(tmp_path: Path) -> None:
    """Fewer channels inside, too: then it is another network."""
    models = pytest.importorskip("torchvision").models
    state = models.squeezenet1_1(num_classes=7).state_dict()
    state["features.0.weight"] = state["features.0.weight"][:32]
    torch.save(state, tmp_path / "mine.pth")
    with pytest.raises(ModelError, match=r"of another shape: features\.0\.weight"):
        load_model(SMALL, tmp_path / "mine.pth")


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_torchvision_with_weights_from_a_file(
    squeezenet: nn.Module, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / f"squeezenet.{kind}"
    if kind == "pth":
        torch.save(squeezenet.state_dict(), path)
    else:
        pytest.importorskip("safetensors.torch").save_file(squeezenet.state_dict(), path)
    network = load_model(SMALL, path)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network.module(x), squeezenet.eval()(x))
    assert network.name == SMALL
    assert network.classes == imagenet_classes()
    assert network.preprocess == Preprocess(
        (224, 224), "crop", 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )


def test_a_file_of_the_hub_gets_the_preprocessing_of_its_own_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "read_weights", lambda path: {})
    monkeypatch.setattr(hub, "fill", lambda *_: None)
    name = "mobilenet_v2"
    for file, crop_from in (("mobilenet_v2-b0353104.pth", 256), ("any.pth", 232)):
        assert hub.load_torchvision(name, tmp_path / file).preprocess.crop_from == crop_from


def test_weights_trained_on_shifted_inputs_keep_the_shift(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "read_weights", lambda path: {})
    monkeypatch.setattr(hub, "fill", lambda *_: None)
    assert hub.load_torchvision("googlenet", tmp_path / "any.pth").module.transform_input


def test_the_hubs_old_names_in_densenets() -> None:
    models = pytest.importorskip("torchvision").models
    today = models.densenet121(weights=None).state_dict()
    old = {
        key.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): value
        for key, value in today.items()
    }
    assert old.keys() != today.keys()
    assert hub._renamed("densenet121", old).keys() == today.keys()
    assert hub._renamed("resnet50", old).keys() == old.keys()


def test_the_preprocessing_of_every_published_weight() -> None:
    models = pytest.importorskip("torchvision").models
    for name in hub.torchvision_names():
        for weights in models.get_model_weights(name.removeprefix(hub.PREFIX)):
            ours = hub._preprocess(weights).describe()
            theirs = weights.transforms()
            assert ours["size"] == theirs.crop_size * 2
            assert ours["mean"] == theirs.mean
            assert ours["std"] == theirs.std
            assert ours["interpolation"] == theirs.interpolation.value


# --- files of weights


def test_weights_with_code_are_refused_and_do_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "evil.pth", {"weight": Runs()})
    with pytest.raises(ModelError, match=r"evil\.pth is a pickle that could run code \(.*system\)"):
        load_model(weights=path)
    assert not Path("it-ran").exists()


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pth", tiny())
    with pytest.raises(ModelError, match=r"asks for torch\.nn\S+\), .*save model\.state_dict\(\)"):
        load_model(weights=path)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.trace(tiny().eval(), torch.zeros(1, 3, 8, 8)), path)
    monkeypatch.setattr(torch, "load", None)  # before PyTorch 2.6 it takes TorchScript for weights
    with pytest.raises(ModelError, match="is a TorchScript program"):
        read_weights(path)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_other_pickles_are_refused_without_a_warning(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"weight": Runs()}, protocol))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ModelError, match=r"is a pickle that could run code.* not loaded"):
            read_weights(path)


@pytest.mark.parametrize("name", ["garbage.pth", "garbage.safetensors"])
@pytest.mark.parametrize("data", [b"", b"garbage, no weights", sample_photo().read_bytes()])
def test_files_that_hold_no_weights(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"garbage\.\w+ is not a file of weights; give"):
        read_weights(path)


@pytest.mark.parametrize("data", [b"PK\3\4 cut short", b"\x40" + bytes(7) + b"{cut short"])
def test_files_of_damaged_weights(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "damaged.pth"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"damaged\.pth can't be read as weights \(.+\); copy"):
        read_weights(path)


def test_the_suffix_of_weights_does_not_matter(tmp_path: Path) -> None:
    state = tiny().state_dict()
    saved(tmp_path / "a.safetensors", state)
    pytest.importorskip("safetensors.torch").save_file(state, tmp_path / "b.pth")
    old = {"_use_new_zipfile_serialization": False}
    torch.save(state, tmp_path / "c.bin", **old)
    for path in tmp_path.iterdir():
        assert read_weights(path).keys() == state.keys()


def test_weights_cut_short(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(tiny().state_dict(), buffer)
    path = tmp_path / "cut.pth"
    path.write_bytes(buffer.getvalue()[:1000])
    with pytest.raises(ModelError, match=r"cut\.pth can't be read as weights"):
        read_weights(path)


def test_missing_weights(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.pth", tmp_path):
        with pytest.raises(ModelError, match=f"no weights file {path}"):
            load_model(weights=str(path))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([torch.zeros(1)], "holds no state dict"),
        ({}, "holds no state dict"),
        ({"epoch": 3, "state_dict": {}}, "it also holds epoch, state_dict; save only"),
        (
            {"model": {"w": torch.zeros(1)}, "ema": {"w": torch.zeros(1)}, "epoch": 3},
            "holds 2 state dicts, model, ema; save only",
        ),
    ],
)
def test_files_of_something_else(tmp_path: Path, state: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_weights(saved(tmp_path / "other.pth", state))


def test_the_only_state_dict_of_a_checkpoint_is_taken(tmp_path: Path) -> None:
    state = tiny().state_dict()
    checkpoint = {"epoch": 3, "model": state, "optimizer": {"state": {}, "param_groups": [{}]}}
    assert read_weights(saved(tmp_path / "checkpoint.pth", checkpoint)).keys() == state.keys()


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_left_out(prefix: str) -> None:
    source, module = tiny(), tiny()
    fill(module, {prefix + k: v for k, v in source.state_dict().items()}, "ddp.pth", "mine")
    assert torch.equal(module[0].weight, source[0].weight)


def test_prefixes_of_the_model_stay() -> None:
    source, module = (nn.ModuleDict({"module": tiny()}) for _ in range(2))
    fill(module, source.state_dict(), "own.pth", "mine")
    assert torch.equal(module["module"][0].weight, source["module"][0].weight)


def test_missing_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    path = tmp_path / "tiny.safetensors"
    path.write_bytes(b"\x40" + bytes(7) + b"{}")
    with pytest.raises(MissingExtraError, match="pip install safetensors"):
        read_weights(path)


def test_weights_that_do_not_fit_name_a_few() -> None:
    state = tiny().state_dict()
    state["0.weight"] = torch.zeros(4, 3, 5, 5)
    state["extra"] = state.pop("0.bias")
    with pytest.raises(ModelError) as caught:
        fill(tiny(), state, "some.pth", "mine")
    assert str(caught.value) == (
        "The weights in some.pth don't fit mine; missing: 0.bias; unknown: extra; of another "
        "shape: 0.weight (4 x 3 x 5 x 5, not 4 x 3 x 3 x 3); name the model that they belong to "
        "(--model)."
    )
    with pytest.raises(ModelError, match=r"missing: 0\.weight, 0\.bias, 1\.weight and 3 more; unk"):
        fill(tiny(), {"extra": torch.zeros(1)}, "some.pth", "mine")


def test_another_number_of_classes_gets_the_next_step() -> None:
    with pytest.raises(ModelError, match=r"weight \(3 x 5, not 2 x 5\), .* package\.module:fact"):
        fill(nn.Linear(5, 2), nn.Linear(5, 3).state_dict(), "some.pth", "mine")


def test_weights_without_the_counters_of_batch_norm_fit() -> None:
    source, module = tiny(), tiny()
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("batches_tracked")}
    fill(module, state, "old.pth", "mine")
    assert torch.equal(module[0].weight, source[0].weight)


def test_modules_that_ask_for_a_version_get_it() -> None:
    models = pytest.importorskip("torchvision").models
    source, module = models.mnasnet0_5(weights=None), models.mnasnet0_5(weights=None)
    fill(module, dict(source.state_dict()), "mnasnet.safetensors", "mine")
    assert torch.equal(module.layers[0].weight, source.layers[0].weight)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    state = tiny().state_dict()
    state["1.running_var"][2] = value
    with pytest.raises(ModelError, match=r"1\.running_var holds NaN or infinity"):
        load_model(f"{__name__}:tiny", saved(tmp_path / "nan.pth", state))


@pytest.mark.parametrize(
    "classes", [[0, 1, 2], "abc", {0: "cat", 1: "dog", 2: "owl"}, [], {"cat", "dog"}, 1000]
)
def test_classes_that_are_no_names(classes: Any) -> None:
    with pytest.raises(InputError, match="classes are the names of the model's classes in order"):
        Network("mine", nn.Linear(4, 3), classes=classes)


def test_a_preprocess_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("howyouseeme.models.load_embedded", lambda *_: pytest.fail("was loaded"))
    for load in (load_model, as_network):
        with pytest.raises(InputError, match=r"preprocess is a howyouseeme\.Preprocess"):
            load("efficientnet-lite0", preprocess=5)  # type: ignore[arg-type]


def test_a_function_may_be_the_preprocess_of_a_network_however_it_is_given() -> None:
    prepare = Preprocess((32, 24), mean=(0.5,))

    def function(picture: Any) -> torch.Tensor:
        return prepare(picture)[0]

    made = Network("mine", nn.Linear(4, 3), function)  # type: ignore[arg-type]
    loaded = load_model(preprocess=function)
    for network in (made, loaded):
        tensor, geometry = network.photo_input(load_image(sample_photo("cat")))
        assert geometry.input_size == (32, 24)
        assert float((tensor - function(load_image(sample_photo("cat")))).abs().max()) < 0.02
