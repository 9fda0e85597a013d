"""Export: one file, any batch, the same outputs, and nothing of the machine inside."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from standing import at_rest, exported, settled, small_cnn, task_of
from torch import Tensor, nn

from compressor import StageError, session, zoo
from compressor.stages import export, graph, prune
from compressor.stages.export import ROUNDING, TOLERANCE, apart, rounding
from compressor.stages.graph import cleaned
from compressor.task import Input

IMAGE = (1, 8, 8)
IDS = Input("input", (6,), "int64", high=50)


class Tiny(nn.Module):
    """A linear layer, and a function of it and of the inputs."""

    def __init__(self, function: Any, width: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.function = nn.Linear(4, width), function

    def forward(self, *x: Tensor) -> Any:
        return self.function(self.body(x[0]), *x[1:])


def test_one_file_any_batch_same_outputs(tmp_path: Path) -> None:
    task = task_of(small_cnn(), IMAGE)
    made = exported(task, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "source.onnx"]
    assert made.form == "onnx"
    assert made.source == tmp_path / "model.safetensors"
    assert made.steps[-1]["settings"] == {"opset": 20}
    assert set(made.steps[-1]["facts"]["parity"]) == {"1", "2", "7"}
    graph = onnx.load(made.path).graph
    (given,) = graph.input
    dims = given.type.tensor_type.shape.dim
    assert given.name == "input"
    assert dims[0].dim_param
    assert [dim.dim_value for dim in dims[1:]] == [1, 8, 8]
    predict = session(made.path)
    for size in (1, 2, 7, 33):
        (x,) = task.examples(size)
        with torch.inference_mode():
            wanted = task.model()(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(predict(x), wanted, rtol=0, atol=1e-5)


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from standing import exported, small_cnn, task_of
exported(task_of(small_cnn(), (1, 8, 8)), Path.cwd())
"""


def test_the_same_bytes_from_anywhere_and_no_path_inside(tmp_path: Path) -> None:
    task = task_of(small_cnn(), IMAGE)
    one = exported(task, tmp_path, "one").path.read_bytes()
    elsewhere = tmp_path / "a folder elsewhere"
    elsewhere.mkdir()
    script = elsewhere / "standing_script.py"
    script.write_text(SCRIPT.format(here=str(Path(__file__).parent)))
    subprocess.run([sys.executable, script.name], cwd=elsewhere, check=True, capture_output=True)
    assert exported(task, tmp_path, "two").path.read_bytes() == one
    assert (elsewhere / "source.onnx").read_bytes() == one
    for word in (
        b"site-packages",
        b".py",
        b"File ",
        b"/work",
        b"/tmp",
        b"/home",
        b"/usr",
        b"/root",
    ):
        assert word not in one, word
    assert not re.search(rb"/[a-z]{3,}/[a-z]{3,}", one)


def test_stack_traces_go_from_branches_and_functions_too() -> None:
    inner = onnx.helper.make_node("Identity", ["x"], ["y"], doc_string="/a/b.py")
    inner.metadata_props.add(key="stack", value="File /a/b.py")
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n"])
    branch = onnx.helper.make_graph([inner], "branch", [], [y], value_info=[y])
    condition = onnx.helper.make_node(
        "If", ["c"], ["y"], then_branch=branch, else_branch=branch, doc_string="/a/b.py"
    )
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n"])
    c = onnx.helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
    model = onnx.helper.make_model(onnx.helper.make_graph([condition], "g", [x, c], [y]))
    opset = [onnx.helper.make_opsetid("", 20)]
    model.functions.append(onnx.helper.make_function("own", "f", ["x"], ["y"], [inner], opset))
    model.metadata_props.add(key="path", value="/a")
    cleaned(model)
    assert b"/a" not in model.SerializeToString()
    assert b"File" not in model.SerializeToString()
    assert len(model.graph.node[0].attribute[0].g.node) == 1


FAMILIES = [
    ("mlp", (30,)),
    ("lstm", (8, 8)),
    ("vit", IMAGE),
    ("gru", (8, 8)),
    ("unet", IMAGE),
    *(
        pytest.param(name, shape, marks=pytest.mark.slow)
        for name, shape in [
            ("cnn", IMAGE),
            ("resnet20", (1, 16, 16)),
            ("resnet56", (1, 16, 16)),
            ("vgg16", (1, 32, 32)),
            ("resnet18", (1, 32, 32)),
            ("resnet50", (1, 32, 32)),
            ("mobilenet_v2", (1, 32, 32)),
        ]
    ),
]


@pytest.mark.parametrize(("name", "shape"), FAMILIES)
def test_the_zoo_and_what_is_pruned_of_it(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = zoo.build(name, zoo.arguments_for(name, shape, 10))
    task = task_of(settled(model, torch.rand(16, *shape)), shape)
    source = at_rest(task, tmp_path)
    found = [export(source, task, tmp_path / "whole")]
    if name not in ("lstm", "gru", "mlp", "vit"):
        found.append(export(prune(source, task, tmp_path / "p", ratio=0.5), task, tmp_path / "p"))
    for made in found:
        assert max(made.steps[-1]["facts"]["parity"].values()) < 1e-5


class Amplifier(nn.Module):
    """The small difference of two large sums, magnified: the order of adding decides the digits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(400, 3), nn.Linear(400, 3)
        with torch.no_grad():
            self.b.weight.copy_(self.a.weight.flip(1))
            self.b.bias.copy_(self.a.bias)

    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * (self.a(x) - self.b(x.flip(1)))  # type: ignore[no-any-return]


def test_rounding_that_a_model_amplifies_is_no_wrong_export(tmp_path: Path) -> None:
    task = task_of(Amplifier(), (400,))
    made = exported(task, tmp_path)
    worst = max(made.steps[-1]["facts"]["parity"].values())
    assert TOLERANCE < worst <= ROUNDING * rounding(task.model(), task)


@pytest.mark.slow
def test_an_untrained_resnet50_rounds_little_for_the_size_of_its_outputs() -> None:
    torch.manual_seed(0)
    task = task_of(zoo.build("resnet50", {"in_channels": 1, "classes": 10}), (1, 32, 32))
    assert rounding(task.model(), task) < TOLERANCE / 10


@pytest.mark.parametrize(
    ("model", "task"),
    [
        (Tiny(lambda y, b: (y + b, y * 2)), {"shapes": [(4,), (3,)]}),
        (Tiny(lambda y: OrderedDict(logits=y, aux=[y.sum(1), y.argmax(1)])), {"shapes": [(4,)]}),
        (
            nn.Sequential(nn.Embedding(50, 4), nn.Flatten(), nn.Linear(24, 3)),
            {"shapes": [(6,)], "inputs": (IDS,)},
        ),
    ],
    ids=["two inputs, two outputs", "dict, int64 output", "integer input"],
)
def test_other_forms(tmp_path: Path, model: nn.Module, task: dict[str, Any]) -> None:
    shapes = task.pop("shapes")
    given = task_of(model, *shapes, **task)
    predict = session(exported(given, tmp_path).path)
    x = given.examples(5)
    with torch.inference_mode():
        wanted = given.model()(*map(torch.from_numpy, x))
    if isinstance(wanted, dict):
        wanted = (wanted["logits"], *wanted["aux"])
    got = predict(*x)
    for ours, theirs in zip(
        wanted if isinstance(wanted, tuple) else [wanted],
        got if isinstance(got, tuple) else [got],
        strict=True,
    ):
        np.testing.assert_allclose(theirs, ours.numpy(), atol=1e-5)


def test_dropout_is_off_and_statistics_are_the_learned_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.Dropout(0.9), nn.Linear(32, 3))
    settled(body, torch.randn(64, 4) * 3 + 1)
    task = task_of(body, (4,), model=lambda: body.train())
    made = exported(task, tmp_path)
    assert not {"Dropout", "RandomUniformLike"} & {
        n.op_type for n in onnx.load(made.path).graph.node
    }
    assert max(made.steps[-1]["facts"]["parity"].values()) < 1e-5


def raises(y: Tensor) -> Tensor:
    if torch.compiler.is_exporting():
        raise ValueError("no third line\nof two")
    return y


def branches(y: Tensor) -> Tensor:
    return y if y.sum() > 0 else -y


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Tiny(branches), "cannot export the model: "),
        (Tiny(lambda y: y.reshape(2, -1)), "at batch 1: "),
        (Tiny(raises), "cannot export the model: no third line"),
    ],
    ids=["branches on data", "constant batch", "raises"],
)
def test_what_cannot_be_exported_is_one_line(tmp_path: Path, model: nn.Module, said: str) -> None:
    with pytest.raises(StageError) as caught:
        exported(task_of(model, (4,)), tmp_path)
    assert said in str(caught.value)
    assert "step 1/3" not in str(caught.value)  # the exporter's advice and colours
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_wrong_graph_is_refused_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressor.stages import export as package

    module = sys.modules[package.__module__]
    task = task_of(Tiny(lambda y: y), (4,))
    made = exported(task, tmp_path)
    before, right = made.path.read_bytes(), module.exported  # type: ignore[attr-defined]

    def wrong(*given: Any) -> Any:
        model = right(*given)
        held = model.graph.initializers.values()
        bias = next(value for value in held if list(value.const_value.shape) == [3])
        bias.const_value = ir.tensor(np.full(3, 1.0, np.float32), name=bias.name)
        return model

    monkeypatch.setattr(module, "exported", wrong)
    with pytest.raises(StageError, match=r"onnxruntime and PyTorch differ by .* of the largest"):
        exported(task, tmp_path)
    assert made.path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_the_difference_counts_every_output_and_every_nan() -> None:
    one, two = np.ones((2, 3), np.float32), np.arange(6, dtype=np.float32).reshape(2, 3)
    assert apart([one, two], [one, two]) == 0
    assert apart([one, two], [one, two + 6]) == 1.0  # 6 / (1 + 5)
    for broken in (np.nan, np.inf):
        assert not apart([one, two], [one, np.full_like(two, broken)]) <= 1e9
        assert not apart([np.full_like(one, broken), two], [one, two]) <= 1e9
    assert apart([one > 0], [one > 0]) == 0
    assert apart([one > 0], [one < 0]) == 0.5
    assert apart([np.zeros(2, np.uint8)], [np.ones(2, np.uint8)]) == 1.0
    for got in ([one], [two, one[:1]], [one, one.T]):
        with pytest.raises(StageError, match="onnxruntime gives outputs of shape"):
            apart([one, two], got)


def test_rounding_is_measured_where_it_can_be() -> None:
    task = task_of(small_cnn(), IMAGE)
    model = task.model()
    assert 0 < rounding(model, task) < 1e-6
    assert next(model.parameters()).dtype == torch.float32
    insists = task_of(
        Tiny(lambda y: torch.cat([y.float(), y.float()]).float() @ torch.ones(3)), (4,)
    )
    assert rounding(insists.model(), insists) < 1e-6


@pytest.mark.parametrize("opset", [18, pytest.param(23, marks=pytest.mark.slow)])
def test_the_opset_is_the_one_asked_for(tmp_path: Path, opset: int) -> None:
    task = task_of(Tiny(lambda y: y), (4,))
    made = export(at_rest(task, tmp_path), task, tmp_path / "m", opset=opset)
    versions = {each.domain: each.version for each in onnx.load(made.path).opset_import}
    assert versions[""] == opset


def test_a_model_too_large_for_one_file_keeps_its_tensors_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(small_cnn(), (1, 8, 8))
    rest = at_rest(task, tmp_path)
    whole = export(rest, task, tmp_path / "whole")
    monkeypatch.setattr(graph, "LIMIT", 100)
    made = export(rest, task, tmp_path / "made")
    (beside,) = made.companions
    assert re.fullmatch(r"made\.onnx\.[0-9a-f]{8}\.data", beside.name)
    assert made.path.stat().st_size < whole.path.stat().st_size
    x = task.examples(3)
    assert np.array_equal(session(made.path)(*x), session(whole.path)(*x))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "made.onnx",
        beside.name,
        "model.safetensors",
        "whole.onnx",
    ]
