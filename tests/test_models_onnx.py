"""ONNX files, held against onnxruntime and against the definitions that ONNX itself tests with."""

from __future__ import annotations

import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import Made
from PIL import Image
from torch import Tensor, nn

import howyouseeme as hysm
from howyouseeme.errors import MissingExtraError, ModelError, UnsupportedCallError
from howyouseeme.images import Preprocess
from howyouseeme.models import load_model
from howyouseeme.tape import record

onnx = pytest.importorskip("onnx", reason="pip install onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from howyouseeme.models.onnx import check, load_onnx  # noqa: E402
from howyouseeme.models.onnx.graph import WITH_GRAPHS, OnnxModule, operators_in  # noqa: E402
from howyouseeme.models.onnx.operators import OPERATORS, operator  # noqa: E402

KNOWN = OPERATORS.keys() | WITH_GRAPHS.keys()
LIGHT = sorted((Path(onnx.__file__).parent / "backend/test/data/light").glob("light_*.onnx"))


def saved(
    path: Path,
    nodes: list[Any],
    weights: dict[str, np.ndarray] | None = None,
    opset: int = 18,
    shape: tuple[int, ...] = (1, 3, 8, 8),
) -> Path:
    """A file of a graph from x to y, whose shape isn't said."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 9
    onnx.save(model, path)
    return path


# --- operators


def numbers(data: Any) -> Any:
    """A tensor, or a list of them; None for what PyTorch has no arithmetic for (strings, small floats)."""
    if isinstance(data, list):
        items = [numbers(item) for item in data]
        return None if any(item is None for item in items) else items
    data = np.asarray(data) if isinstance(data, np.generic) else data
    if not isinstance(data, np.ndarray) or data.dtype not in (
        *(np.float16, np.float32, np.float64, np.int8, np.int16, np.int32, np.int64),
        *(np.uint8, np.bool_),
    ):
        return None
    return torch.tensor(data.copy())


def same(mine: Any, theirs: Any) -> bool:
    if isinstance(theirs, list):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    theirs = np.asarray(theirs)
    least = 1e-3 if theirs.dtype == np.float16 else 1e-5
    return tuple(mine.shape) == theirs.shape and np.allclose(
        mine.numpy(), theirs, rtol=1e-3, atol=least, equal_nan=True
    )


#: Where PyTorch, or onnxruntime, which matters more, does something else than ONNX's own tests.
OTHERWISE = {
    "test_reduce_max_empty_set",
    "test_reduce_max_empty_set_bool",
    "test_reduce_min_empty_set",
    "test_resize_downsample_scales_linear_align_corners",  # lengths that are no whole numbers
    "test_resize_downsample_scales_cubic_align_corners",
}
if onnx.__version__.startswith("1.16."):  # whose answers there wrap around instead of ending at 127
    OTHERWISE |= {
        f"test_qlinearmatmul_{dims}_int8_{scale}"
        for dims in ("2D", "3D")
        for scale in ("float16", "float32")
    }


#: What those tests leave out, or ask in a way that is refused: tested below.
OURS = {"ConcatFromSequence", "GRU", "SequenceErase"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_operator_does_what_onnx_says() -> None:
    """ONNX's own test cases of all operators; a case may be refused, and be wrong it may not."""
    from onnx.backend.test.case.node import collect_testcases  # noqa: PLC0415

    passed: set[str] = set()
    wrong: list[str] = []
    for case in collect_testcases(None):
        kinds = operators_in(case.model.graph)
        if not kinds <= KNOWN or case.name in OTHERWISE:
            continue
        for inputs, outputs in case.data_sets:
            given = [numbers(item) for item in inputs]
            if any(item is None for item in (*given, *map(numbers, outputs))):
                continue
            try:
                answer = OnnxModule(case.model)(*given)
            except UnsupportedCallError:
                continue
            answers = list(answer.values()) if isinstance(answer, dict) else [answer]
            if all(map(same, answers, outputs)):
                passed |= kinds
            else:
                wrong.append(case.name)
    assert wrong == []
    newer = {
        name for name in KNOWN if "." not in name and not onnx.defs.has(name)
    }  # than this ONNX
    assert {name for name in KNOWN - passed if "." not in name} == OURS | newer


def graph(name: str, nodes: list[Any], inputs: list[Any], outputs: list[str]) -> Any:
    """The body of a branch or a loop; the types of its outputs follow from what it does."""
    made = [helper.make_tensor_value_info(one, TensorProto.FLOAT, None) for one in outputs]
    return helper.make_graph(nodes, name, inputs, made)


@pytest.mark.parametrize("shape", [(1,), (3, 1, 1), (8,), (3, 8, 8)])
def test_slopes_are_broadcast_as_numpy_does(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    rng = np.random.default_rng(0)
    slope = {"s": rng.normal(size=shape).astype(np.float32), "c": np.ones(1, np.float32)}
    nodes = [
        helper.make_node("Sub", ["x", "c"], ["a"]),  # below zero
        helper.make_node("PRelu", ["a", "s"], ["y"]),
    ]
    load_onnx(saved(tmp_path / "slope.onnx", nodes, slope))  # compares


def test_slopes_for_columns_are_not_those_of_channels(tmp_path: Path) -> None:
    x = torch.rand(1, 3, 8, 3) - 1
    slope = torch.tensor([0.1, 0.2, 0.3])
    node = helper.make_node("PRelu", ["x", "s"], ["y"])
    path = saved(tmp_path / "slope.onnx", [node], {"s": slope.numpy()}, shape=(1, 3, 8, 3))
    assert torch.allclose(OnnxModule(onnx.load(path))(x), x * slope)


def test_sequences(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    nodes = [
        helper.make_node("SplitToSequence", ["x"], ["s"], axis=1),
        helper.make_node("SequenceErase", ["s", "one"], ["t"]),
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("SequenceInsert", ["t", "r"], ["u"]),
        helper.make_node("ConcatFromSequence", ["u"], ["v"], axis=1),
        helper.make_node("SequenceErase", ["t"], ["w"]),
        helper.make_node("ConcatFromSequence", ["w"], ["q"], axis=0, new_axis=1),
        helper.make_node("Squeeze", ["q", "zero"], ["p"]),
        helper.make_node("Concat", ["v", "p"], ["y"], axis=1),
    ]
    weights = {"one": np.array(1), "zero": np.array([0])}
    network = load_onnx(saved(tmp_path / "list.onnx", nodes, weights))  # compares
    assert network.module(torch.rand(1, 3, 8, 8)).shape == (1, 6, 8, 8)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_over_the_columns_of_a_picture(
    tmp_path: Path, kind: str, direction: str
) -> None:
    """As networks that read text have them; the answer is onnxruntime's, and its evidence adds up."""
    pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    rng = np.random.default_rng(0)
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    sides = 2 if direction == "bidirectional" else 1
    weights = {
        "w": rng.normal(size=(sides, gates * 5, 24)).astype(np.float32) / 5,
        "r": rng.normal(size=(sides, gates * 5, 5)).astype(np.float32) / 2,
        "b": rng.normal(size=(sides, gates * 10)).astype(np.float32) / 9,
        "h": rng.normal(size=(sides, 1, 5)).astype(np.float32),
        "rows": np.array([8, 1, 24]),
        "last": np.array([1, -1]),
        "seven": np.array(7),
    }
    more = {"linear_before_reset": 1} if kind == "GRU" else {}
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[3, 0, 1, 2]),
        helper.make_node("Reshape", ["t", "rows"], ["s"]),
        helper.make_node(
            *(kind, ["s", "w", "r", "b", "", "h"], ["all", "end"]),
            **{"hidden_size": 5, "direction": direction, **more},
        ),
        helper.make_node("Gather", ["all", "seven"], ["one"]),
        helper.make_node("Add", ["one", "end"], ["both"]),
        helper.make_node("Reshape", ["both", "last"], ["y"]),
    ]
    network = load_onnx(saved(tmp_path / "read.onnx", nodes, weights))  # compares
    explanation = hysm.Explainer(network, method="exact")(torch.rand(1, 3, 8, 8), target=2)
    assert explanation.evidence.abs().sum() > 0


@pytest.mark.parametrize("level", [0.1, 0.9])
def test_branches_and_loops(tmp_path: Path, level: float) -> None:
    """Both take values from around them; which way is gone, and how often, this image tells."""
    pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    yes = graph("yes", [helper.make_node("Conv", ["x", "w"], ["a"], name="conv")], [], ["a"])
    no = graph("no", [helper.make_node("Neg", ["x"], ["b"])], [], ["b"])
    body = graph(
        "body",
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Mul", ["state", "half"], ["c"]),
            helper.make_node("Add", ["c", "d"], ["next"]),
            helper.make_node("ReduceMean", ["next"], ["each"], keepdims=0),
        ],
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, None),
        ],
        ["on", "next", "each"],
    )
    body.output[0].type.tensor_type.elem_type = TensorProto.BOOL
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Less", ["level", "most"], ["bright"]),
        helper.make_node("If", ["bright"], ["d"], then_branch=yes, else_branch=no, name="if"),
        helper.make_node("Loop", ["three", "", "d"], ["e", "means"], body=body),
        helper.make_node("ReduceMean", ["e", "space"], ["f"], keepdims=0),
        helper.make_node("Mul", ["means", "means"], ["g"]),
        helper.make_node("Unsqueeze", ["g", "zero"], ["h"]),
        helper.make_node("Concat", ["f", "h"], ["y"], axis=1),
    ]
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(3, 3, 1, 1)).astype(np.float32),
        "level": np.array(level, np.float32),
        "half": np.array(0.5, np.float32),
        "three": np.array(3),
        "space": np.array([2, 3]),
        "zero": np.array([0]),
    }
    network = load_onnx(saved(tmp_path / "ways.onnx", nodes, weights))  # compares
    image = torch.rand(1, 3, 8, 8) * 0.5  # one way for .1, the other for .9
    explanation = hysm.Explainer(network, method="exact")(image, target=0)
    mean = explanation.evidence.abs().sum()
    assert mean > 0
    calls = {call.module for call in record(network.module, [image]).calls}
    assert ("nodes.if.yes.nodes.conv" in calls) == (level == 0.1)


def test_a_choice_that_rounding_turns_is_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two scores that are the same up to rounding either may be the better one; of two others not."""
    pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    nodes = [
        helper.make_node("ReduceMean", ["x", "space"], ["means"], keepdims=0),
        helper.make_node("Sub", ["means", "means"], ["none"]),
        helper.make_node("Add", ["none", "near"], ["scores"], name="scores"),
        helper.make_node("TopK", ["scores", "three"], ["best", "which"]),
        helper.make_node("Cast", ["which"], ["y"], to=TensorProto.FLOAT),
    ]
    weights = {
        "space": np.array([2, 3]),
        "near": np.array([0.5, 0.5 + 1e-7, 0.3], np.float32),
        "three": np.array([3]),
    }
    path = saved(tmp_path / "near.onnx", nodes, weights)
    assert load_onnx(path).module(torch.rand(1, 3, 8, 8)).tolist() == [[1, 0, 2]]
    turned = torch.tensor([2e-7, 0, 0])
    monkeypatch.setitem(OPERATORS, "Add", lambda attributes, a, b: a + b + turned)
    assert load_onnx(path).module(torch.rand(1, 3, 8, 8)).tolist() == [[0, 1, 2]]
    monkeypatch.setitem(OPERATORS, "Add", lambda attributes, a, b: a + b + turned.flip(0) * 2e6)
    with pytest.raises(ModelError, match="the output y differs, the first at the node scores; "):
        load_onnx(path)


def test_a_difference_stays_one_where_its_nodes_cannot_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    nodes = [
        helper.make_node("ArgMax", ["x"], ["best"], axis=1),
        helper.make_node("Cast", ["best"], ["y"], to=TensorProto.FLOAT),
    ]
    path = saved(tmp_path / "wrong.onnx", nodes)
    monkeypatch.setitem(OPERATORS, "ArgMax", lambda attributes, x: x.argmin(1, keepdim=True))
    with pytest.raises(ModelError, match="differs, the first at the node best; please report it"):
        load_onnx(path)

    def too_large(*_: Any) -> None:
        raise ValueError("protobuf exceeds 2GB")

    monkeypatch.setattr(check, "_odd_node", too_large)
    with pytest.raises(ModelError, match="the output y differs; please report it"):
        load_onnx(path)


def test_an_operator_in_a_branch_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    odd = graph("odd", [helper.make_node("Det", ["x"], ["a"])], [], ["a"])
    same = graph("same", [helper.make_node("Identity", ["x"], ["b"])], [], ["b"])
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["bright"], to=TensorProto.BOOL),
        helper.make_node("If", ["bright"], ["y"], then_branch=odd, else_branch=same),
    ]
    with pytest.raises(UnsupportedCallError, match="operators are not supported: Det"):
        load_onnx(saved(tmp_path / "odd.onnx", nodes))


def test_an_operator_registers_once() -> None:
    with pytest.raises(ValueError, match="Conv is registered already"):
        operator("Conv")(lambda attributes, x: x)


@pytest.mark.parametrize("opset", [7, 9])
def test_what_older_opsets_mean(tmp_path: Path, opset: int) -> None:
    pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    nodes = [
        helper.make_node("Clip", ["x"], ["a"], min=0.1, max=0.9),
        helper.make_node("Unsqueeze", ["a"], ["b"], axes=[0]),
        helper.make_node("Squeeze", ["b"], ["c"], axes=[0]),
        helper.make_node("Pad", ["c"], ["d"], pads=[0, 0, 1, 0, 0, 0, 2, 1], value=0.3),
        helper.make_node("Slice", ["d"], ["e"], axes=[2, 3], starts=[1, 0], ends=[9, -1]),
        helper.make_node("Split", ["e"], ["f", "g"], axis=1, split=[1, 2]),
        helper.make_node("ReduceSum", ["g"], ["h"], axes=[2], keepdims=0),
        helper.make_node("Upsample", ["f", "s"], ["u"], mode="nearest")
        if opset == 9
        else helper.make_node("Upsample", ["f"], ["u"], mode="nearest", scales=[1.0, 1, 2, 3]),
        helper.make_node("ReduceMean", ["u"], ["v"], axes=[2, 3], keepdims=0),
        helper.make_node("ReduceMean", ["h"], ["w"], axes=[2], keepdims=0),
        helper.make_node("Concat", ["v", "w"], ["z"], axis=1),
        helper.make_node("Softmax", ["z"], ["y"]),
    ]
    scales = {"s": np.array([1, 1, 2, 3], np.float32)} if opset == 9 else {}
    network = load_onnx(saved(tmp_path / "old.onnx", nodes, scales, opset))  # compares
    assert network.module(torch.rand(1, 3, 8, 8)).shape == (1, 3)


def test_operators_that_cannot_be_imported_are_all_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("EyeLike", ["a"], ["b"]),
        helper.make_node("EyeLike", ["b"], ["c"]),
        helper.make_node("Det", ["c"], ["y"]),
    ]
    path = saved(tmp_path / "odd.onnx", nodes)
    with pytest.raises(UnsupportedCallError, match=r"odd\.onnx .* supported: Det, EyeLike\.$"):
        load_model(str(path))


def test_a_way_of_using_an_operator_that_is_not_supported(tmp_path: Path) -> None:
    scales = {"s": np.array([1, 1, 2, 2], np.float32)}
    nodes = [helper.make_node("Resize", ["x", "", "s"], ["y"], mode="linear", antialias=1)]
    with pytest.raises(
        UnsupportedCallError, match=r"smooth\.onnx: .* Resize, .* antialias=1 is not"
    ):
        load_model(str(saved(tmp_path / "smooth.onnx", nodes, scales)))


def test_an_opset_that_is_too_old(tmp_path: Path) -> None:
    path = saved(tmp_path / "old.onnx", [helper.make_node("Relu", ["x"], ["y"])], opset=6)
    with pytest.raises(UnsupportedCallError, match=r"is of opset 6, .* convert it with onnx"):
        load_model(str(path))


# --- networks


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_the_networks_that_onnx_ships(path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    module = load_model(str(path)).module
    image = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(3))
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = (one.name for one in session.get_inputs())
    (theirs,) = session.run(None, {name: image.numpy()})
    with torch.no_grad():
        assert np.allclose(module(image).numpy(), theirs, rtol=1e-4)
    assert hysm.explain(module, image, target=3).target == (3,)


def test_there_are_nine() -> None:
    assert len(LIGHT) == 9


@pytest.fixture(scope="module")
def lite0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded, trained network as torch.onnx.export writes it."""
    pytest.importorskip("onnxscript", reason="pip install onnxscript")
    if not hasattr(torch.export.Dim, "AUTO"):
        pytest.skip("this PyTorch does not have today's exporter")
    path = tmp_path_factory.mktemp("onnx") / "lite0.onnx"
    image = torch.rand(1, 3, 224, 224)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            hysm.load_model().module,
            (image,),
            path,
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: torch.export.Dim.AUTO},),
        )
    return path


def test_a_trained_network_gives_the_same_explanation(lite0: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    embedded = hysm.load_model()
    network = load_model(str(lite0), preprocess=embedded.preprocess)
    photos = [hysm.sample_photo(name) for name in ("cat", "coffee")]
    inputs = torch.stack([network.preprocess(hysm.load_image(photo))[0] for photo in photos])
    session = runtime.InferenceSession(str(lite0), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    recorded = record(network.module, [inputs]).output.data
    assert np.allclose(recorded.numpy(), theirs, atol=1e-3)
    mine, reference = hysm.Explainer(network), hysm.Explainer(embedded)
    for photo in photos:
        one, other = mine(photo), reference(photo)
        assert one.target == other.target
        assert np.corrcoef(one.saliency.ravel(), other.saliency.ravel())[0, 1] > 0.999


def test_the_calls_are_named_by_the_nodes_of_the_file(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "conv.w"], ["a"], name="first.conv"),
        helper.make_node("Relu", ["a"], ["b"], name="forward"),  # which every module has
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["y"]),
    ]
    weights = {"conv.w": np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)}
    module = load_onnx(saved(tmp_path / "small.onnx", nodes, weights)).module
    tape = record(module, [torch.rand(1, 3, 8, 8)])
    assert [call.module for call in tape.calls[:2]] == ["nodes.first/conv", "nodes.forward:2"]
    assert list(module.state_dict()) == ["weights.conv/w"]


def test_constants_are_computed_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["w"]),
        helper.make_node("Add", ["w", "one"], ["ones"]),
        helper.make_node("Conv", ["x", "ones"], ["y"]),
    ]
    weights = {"shape": np.array([2, 3, 3, 3]), "one": np.ones(1, np.float32)}
    module = load_onnx(saved(tmp_path / "constant.onnx", nodes, weights)).module
    assert len(list(module.nodes.children())) == 1
    assert torch.equal(module.weights.ones, torch.ones(2, 3, 3, 3))


def test_an_import_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    path = saved(tmp_path / "wrong.onnx", [helper.make_node("Relu", ["x"], ["y"])])
    load_onnx(path)
    monkeypatch.setitem(OPERATORS, "Relu", lambda attributes, x: x.clamp(min=0.01))
    with pytest.raises(
        ModelError, match=r"wrong\.onnx is not imported as onnxruntime runs it, .* y"
    ):
        load_onnx(path)


def test_a_network_can_be_pickled_with_what_explains_it(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node("ReduceMean", ["a", "s"], ["y"]),
    ]
    network = load_onnx(saved(tmp_path / "a.onnx", nodes, {"s": np.array([2, 3])}))
    image = torch.rand(1, 3, 8, 8)
    explanation = hysm.Explainer(network)(image, target=1)
    again = pickle.loads(pickle.dumps(explanation))
    assert torch.equal(again.evidence, explanation.evidence)
    assert torch.equal(again.network.module(image), network.module(image))


def test_without_onnxruntime_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    path = saved(tmp_path / "small.onnx", [helper.make_node("Relu", ["x"], ["y"])])
    with pytest.warns(
        UserWarning, match="not checked against onnxruntime.* pip install onnxruntime"
    ):
        load_model(str(path))


def test_without_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "small.onnx").write_bytes(b"")
    with pytest.raises(MissingExtraError, match=r"pip install onnx$"):
        load_model(str(tmp_path / "small.onnx"))


def test_files_that_are_no_onnx(tmp_path: Path) -> None:
    path = tmp_path / "text.onnx"
    for data in (b"no network", b""):
        path.write_bytes(data)
        with pytest.raises(
            ModelError, match=r"text\.onnx (can't be read as ONNX \(|holds no graph)"
        ):
            load_model(str(path))


def test_a_network_of_half_precision(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    weights = {name: value.detach().half().numpy() for name, value in module.state_dict().items()}
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["h", "0.weight", "0.bias"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Cast", ["b"], ["y"], to=TensorProto.FLOAT),
    ]
    loaded = load_onnx(saved(tmp_path / "half.onnx", nodes, weights)).module
    image = torch.rand(1, 3, 8, 8)
    assert torch.allclose(loaded(image), module(image), atol=1e-2)


def test_a_quantised_network_is_explained_like_the_one_it_was(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kernel, head = rng.normal(size=(6, 3, 3, 3)), rng.normal(size=(6, 5))
    step = np.abs(kernel).max((1, 2, 3)) / 127  # one for each channel
    weights = {
        "x.scale": np.float32(1 / 255),
        "x.zero": np.uint8(0),
        "w": np.round(kernel / step[:, None, None, None]).astype(np.int8),
        "w.scale": step.astype(np.float32),
        "w.zero": np.zeros(6, np.int8),
        "a.scale": np.float32(0.03),
        "a.zero": np.int8(-128),
        "head": head.astype(np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x.scale", "x.zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "x.scale", "x.zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "w.scale", "w.zero"], ["wd"], axis=0),
        helper.make_node("Conv", ["xd", "wd"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "a.scale", "a.zero"], ["rq"]),
        helper.make_node("DequantizeLinear", ["rq", "a.scale", "a.zero"], ["rd"]),
        helper.make_node("GlobalAveragePool", ["rd"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "head"], ["y"]),
    ]
    arrays = {name: np.asarray(array) for name, array in weights.items()}
    quantised = load_onnx(saved(tmp_path / "quantised.onnx", nodes, arrays))

    def whole(x: Tensor) -> Tensor:
        maps = nn.functional.conv2d(x, torch.tensor(kernel, dtype=torch.float32)).relu()
        return maps.mean((2, 3)) @ torch.tensor(head, dtype=torch.float32)

    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for target in range(5):
        mine, other = (
            hysm.Explainer(model)(image, target).evidence.flatten()
            for model in (quantised, Made(whole))
        )
        assert (mine - other).abs().max() < 0.1 * max(other.abs().max(), 1e-9)


def few(name: str, scale: float, zero: int, kind: Any = np.uint8) -> dict[str, np.ndarray]:
    """The scale and zero point of a tensor."""
    return {f"{name}.s": np.array(scale, np.float32), f"{name}.z": np.array(zero, kind)}


def steps(*names: str) -> list[str]:
    """Each name with its scale and zero point."""
    return [part for name in names for part in (name, f"{name}.s", f"{name}.z")]


OUT = ["yq.s", "yq.z"]
CONTRIBUTED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "QLinearAdd": ([*steps("xq", "w"), *OUT], {}),
    "QLinearMul": ([*steps("xq", "w"), *OUT], {}),
    "QLinearSigmoid": ([*steps("xq"), *OUT], {}),
    "QLinearLeakyRelu": ([*steps("xq"), *OUT], {"alpha": 0.2}),
    "QLinearSoftmax": ([*steps("xq"), *OUT], {"axis": 1, "opset": 18}),
    "QLinearGlobalAveragePool": ([*steps("xq"), *OUT], {}),
    "QLinearAveragePool": ([*steps("xq"), *OUT], {"kernel_shape": [3, 2], "strides": [2, 2]}),
    "QLinearConcat": ([*OUT, *steps("xq", "w")], {"axis": 1}),
    "QGemm": ([*steps("xq", "v"), "c", *OUT], {"transB": 1}),
    "QGemm in floats": ([*steps("xq", "v"), "c"], {"transB": 1, "alpha": 0.5}),
}


@pytest.mark.parametrize("name", CONTRIBUTED)
def test_operators_of_onnxruntime_for_numbers_of_few_bits(tmp_path: Path, name: str) -> None:
    """What it says itself, to one step of the output."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    inputs, options = CONTRIBUTED[name]
    rng = np.random.default_rng(0)
    gemm = name.startswith("QGemm")
    weights = {
        **few("xq", 0.02, 90),
        **few("w", 0.01, 100),
        **few("yq", 0.03, 60),
        "w": rng.integers(0, 255, (1, 3, 8, 8)).astype(np.uint8),
        "v": rng.integers(-127, 127, (5, 192)).astype(np.int8),
        "v.s": rng.uniform(0.001, 0.002, 5).astype(np.float32),
        "v.z": np.zeros(5, np.int8),
        "c": rng.integers(-9000, 9000, 5).astype(np.int32),
        "flat": np.array([1, 192]),
    }
    nodes = [helper.make_node("QuantizeLinear", ["x", "xq.s", "xq.z"], ["x0" if gemm else "xq"])]
    if gemm:
        nodes.append(helper.make_node("Reshape", ["x0", "flat"], ["xq"]))
    floats = name.endswith("floats")
    kind = name.split(maxsplit=1)[0]
    gives = ["y" if floats else "yq"]
    nodes.append(helper.make_node(kind, inputs, gives, domain="com.microsoft", **options))
    if not floats:
        nodes.append(helper.make_node("DequantizeLinear", ["yq", "yq.s", "yq.z"], ["y"]))
    path = saved(tmp_path / "one.onnx", nodes, weights)
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 4 - 1.5
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"x": image.numpy()})
    mine = OnnxModule(model)(image)
    assert tuple(mine.shape) == theirs.shape
    assert np.abs(mine.numpy() - theirs).max() <= (1e-4 if floats else 0.03 + 1e-6)
    assert f"com.microsoft.{kind}" in OPERATORS


@pytest.mark.parametrize("way", ["QOperator", "QDQ", "dynamic"])
def test_a_network_that_onnxruntime_quantised(tmp_path: Path, way: str) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization", reason="pip install onnxruntime")
    torch.manual_seed(0)
    one, two, head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
    arrays = {
        f"{name}.{kind}": value.detach().numpy()
        for name, module in (("one", one), ("two", two), ("head", head))
        for kind, value in module.named_parameters()
    }
    nodes = [
        helper.make_node("Conv", ["x", "one.weight", "one.bias"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "two.weight", "two.bias"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["b", "c"], ["d"]),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("GlobalAveragePool", ["e"], ["f"]),
        helper.make_node("Flatten", ["f"], ["g"]),
        helper.make_node("Gemm", ["g", "head.weight", "head.bias"], ["y"], transB=1),
    ]
    whole, quantised = saved(tmp_path / "whole.onnx", nodes, arrays), tmp_path / "quantised.onnx"
    pictures = [torch.rand(1, 3, 8, 8) for _ in range(8)]
    if way == "dynamic":
        quantization.quantize_dynamic(whole, quantised, weight_type=quantization.QuantType.QUInt8)
    else:
        left = iter([{"x": picture.numpy()} for picture in pictures])

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> Any:
                return next(left, None)

        quantization.quantize_static(
            whole, quantised, Reader(), quant_format=quantization.QuantFormat[way]
        )
    kinds = {node.op_type for node in onnx.load(quantised).graph.node}
    assert (
        kinds
        & {"QOperator": {"QLinearConv"}, "QDQ": {"QuantizeLinear"}, "dynamic": {"ConvInteger"}}[way]
    )
    expected = hysm.Explainer(load_onnx(whole))
    found = hysm.Explainer(load_onnx(quantised))
    for picture in pictures[:3]:
        mine, other = (
            torch.cat([one.evidence for one in each.many(picture, list(range(5)))])
            for each in (found, expected)
        )
        assert other.abs().max() > 0
        assert (mine - other).abs().max() < 0.15 * other.abs().max()
        assert nn.functional.cosine_similarity(mine.flatten(), other.flatten(), 0) > 0.97


def test_what_else_is_quantised_is_refused_with_a_way_out(tmp_path: Path) -> None:
    node = helper.make_node("QAttention", ["x"], ["y"], domain="com.microsoft")
    with pytest.raises(UnsupportedCallError, match=r"com\.microsoft\.QAttention\. .*format QDQ"):
        load_onnx(saved(tmp_path / "attention.onnx", [node]))


def several(path: Path, nodes: list[Any], kinds: dict[str, int], batch: int | None = None) -> Path:
    """A file of a graph with those outputs, from x [1, 3, 8, 8], or so many at a time."""
    onnx.save(
        helper.make_model(
            helper.make_graph(
                nodes,
                "test",
                [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch or 1, 3, 8, 8])],
                [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()],
                [numpy_helper.from_array(np.array([batch or 1, 192]), "shape")],
            ),
            opset_imports=[helper.make_opsetid("", 18)],
            ir_version=9,
        ),
        path,
    )
    return path


def test_of_several_outputs_the_scores_are_found_by_name_or_kind(tmp_path: Path) -> None:
    flat = helper.make_node("Reshape", ["x", "shape"], ["logits"])
    softmax = helper.make_node("Softmax", ["logits"], ["probabilities"])
    best = helper.make_node("ArgMax", ["logits"], ["best"], axis=1)
    real, whole = TensorProto.FLOAT, TensorProto.INT64
    image = torch.rand(1, 3, 8, 8)
    both = several(tmp_path / "a.onnx", [flat, softmax], {"probabilities": real, "logits": real})
    assert list(load_onnx(both).module(image)) == ["probabilities", "logits"]
    answer = several(
        tmp_path / "b.onnx", [flat, softmax, best], {"best": whole, "probabilities": real}
    )
    for path in (both, answer):
        explanation = hysm.Explainer(load_onnx(path))(image)
        assert explanation.target == (int(image.argmax()),)


def test_a_file_for_so_many_images_says_so(tmp_path: Path) -> None:
    flat = helper.make_node("Reshape", ["x", "shape"], ["y"])
    network = load_onnx(several(tmp_path / "four.onnx", [flat], {"y": TensorProto.FLOAT}, 4))
    with pytest.raises(hysm.InputError, match=r"exported for inputs \[4, 3, 8, 8\] alone"):
        hysm.Explainer(network)(torch.rand(1, 3, 8, 8))


def test_a_file_is_given_no_other_size_than_it_was_exported_for(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["y"]),
    ]
    network = load_onnx(several(tmp_path / "size.onnx", nodes, {"y": TensorProto.FLOAT}))
    assert len(hysm.explain(network, torch.rand(2, 3, 8, 8)).label) == 2
    with pytest.raises(
        hysm.InputError, match=r"exported for inputs \[1, 3, 8, 8\] alone; give it such"
    ):
        hysm.explain(network, torch.rand(1, 3, 12, 8))


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    weights = {"w": np.full((2, 3, 3, 3), np.nan, np.float32)}
    with pytest.raises(ModelError, match=r"weights\.w holds NaN"):
        load_onnx(saved(tmp_path / "nan.onnx", nodes, weights))


def test_a_network_of_bytes_is_given_the_photo_as_it_is(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["a"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["a", "space"], ["y"], keepdims=0),
        ],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        [numpy_helper.from_array(np.array([2, 3]), "space")],
    )
    path = tmp_path / "bytes.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path
    )
    network = load_onnx(path)
    photo = Image.new("RGB", (20, 20), (10, 200, 30))
    tensor, _ = network.photo_input(photo)
    assert tensor.amax((1, 2)).tolist() == pytest.approx([10, 200, 30])


@pytest.mark.parametrize("sides", [(8, 12), ("height", "width")], ids=["fixed", "open"])
@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.UINT8], ids=["floats", "bytes"])
def test_a_file_whose_channels_are_last(tmp_path: Path, kind: int, sides: tuple[Any, Any]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    weights = [
        numpy_helper.from_array(p.detach().numpy(), n)
        for n, p in zip("abcd", net.parameters(), strict=True)
    ]
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["f"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "a", "b"], ["u"]),
        helper.make_node("Relu", ["u"], ["v"]),
        helper.make_node("Conv", ["v", "c", "d"], ["w"]),
        helper.make_node("GlobalAveragePool", ["w"], ["m"]),
        helper.make_node("Flatten", ["m"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", kind, ["batch", *sides, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        weights,
    )
    path = tmp_path / "last.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path
    )
    network = load_onnx(path)
    fixed_bytes = kind == TensorProto.UINT8 and sides == (8, 12)
    assert (network.preprocess == Preprocess((8, 12), scale=1.0)) or not fixed_bytes
    pictures = torch.rand(2, 3, 8, 12)
    plain = nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    one, other = (hysm.explain(model, pictures, 1) for model in (network, plain))
    torch.testing.assert_close(one.evidence, other.evidence, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(one.saliency, other.saliency, rtol=1e-3, atol=1e-3)


def test_a_file_of_greys_whose_channel_is_last(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Flatten", ["t"], ["y"]),
    ]
    network = load_onnx(saved(tmp_path / "grey.onnx", nodes, shape=(1, 8, 6, 1)))
    picture = torch.rand(1, 1, 8, 6)
    assert torch.equal(network.module(picture), picture.flatten(1))
    with pytest.raises(
        hysm.InputError, match=r"\[1, 8, 6, 1\] alone, channels last, which takes \[batch"
    ):
        hysm.explain(network, torch.rand(1, 1, 8, 8))


def test_a_preprocessing_of_ones_own(tmp_path: Path) -> None:
    path = saved(tmp_path / "small.onnx", [helper.make_node("Relu", ["x"], ["y"])])
    mine = Preprocess((8, 8))
    assert load_model(str(path)).preprocess is None
    assert load_model(str(path), preprocess=mine).preprocess is mine


def test_what_ultralytics_writes_into_its_files(tmp_path: Path) -> None:
    path = saved(tmp_path / "yolo.onnx", [helper.make_node("Relu", ["x"], ["y"])])
    model = onnx.load(path)
    said = {"author": "Ultralytics", "task": "detect", "imgsz": "[8, 8]"}
    helper.set_model_props(model, {**said, "names": "{0: 'person', 1: \"driver's\"}"})
    onnx.save(model, path)
    network = load_onnx(path)
    assert network.classes == ("person", "driver's")
    assert network.preprocess == Preprocess((8, 8), resize="fit", fill=114)
    helper.set_model_props(
        model, {**said, "task": "classify", "names": "__import__('os').getcwd()"}
    )
    onnx.save(model, path)
    network = load_onnx(path)
    assert network.classes is None  # nothing is run
    assert network.preprocess == Preprocess((8, 8), resize="crop", crop_from=8)
    helper.set_model_props(model, {**said, "head": "RTDETRDecoder"})
    onnx.save(model, path)
    assert load_onnx(path).preprocess == Preprocess((8, 8))  # which it stretches
    odd = ["[8", "8", "['a', 8]", "[None, 3]", "[1e400, 3]", "[0, 8]", "[True, 8]"]
    for changed in ({"author": "me"}, {"channels": "1"}, *({"imgsz": text} for text in odd)):
        helper.set_model_props(model, {**said, "names": "{1: 'a', 'x': 'b'}", **changed})
        onnx.save(model, path)
        assert load_onnx(path).preprocess is None
        assert load_onnx(path).classes is None


def test_a_network_of_one_picture_without_a_batch(tmp_path: Path) -> None:
    """As torchvision's detectors are exported."""
    nodes = [
        helper.make_node("ReduceMean", ["x", "space"], ["m"], keepdims=0),
        helper.make_node("Sigmoid", ["m"], ["y"]),
    ]
    path = saved(tmp_path / "one.onnx", nodes, {"space": np.array([1, 2])})
    model = onnx.load(path)
    del model.graph.input[0].type.tensor_type.shape.dim[0]
    model.graph.output[0].name = "scores"
    model.graph.node[1].output[0] = "scores"
    model.graph.output.append(helper.make_tensor_value_info("m", TensorProto.FLOAT, None))
    onnx.save(model, path)
    images = torch.rand(2, 3, 8, 8)
    found = hysm.explain(load_onnx(path), images, hysm.targets.box(2), method="exact")
    assert found.box == (None, None)  # not told
    assert (found.evidence > 0).all()
    torch.testing.assert_close(found.evidence.sum((1, 2)), images[:, 2].mean((1, 2)))


def test_a_network_that_takes_but_one_height(tmp_path: Path) -> None:
    """As those that read lines of text do, whose files leave it open all the same."""
    pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    path = saved(tmp_path / "line.onnx", [helper.make_node("Add", ["x", "rows"], ["y"])],
                 {"rows": np.zeros((1, 3, 48, 1), np.float32)})  # fmt: skip
    model = onnx.load(path)
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"side{axis}"
    onnx.save(model, path)
    assert load_onnx(path).module(torch.rand(1, 3, 48, 99)).shape == (1, 3, 48, 99)
