"""Graph preparation: the same numbers from a graph that is quicker to quantize."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from standing import exported, task_of
from torch import nn

from compressor import zoo
from compressor.stages import graph
from compressor.stages.quantize.prepare import PASSES, STATIC, prepare
from compressor.stages.quantize.preparing.edit import sizes
from compressor.task import Array

RNG = np.random.default_rng(0)


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def made(
    nodes: list[Any],
    inputs: dict[str, tuple[Any, ...]],
    outputs: dict[str, tuple[Any, ...]],
    **constants: Any,
) -> ir.Model:
    """A float graph of these nodes."""
    proto = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, at) for x, at in inputs.items()],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, at) for y, at in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20)]
    return ir.from_proto(helper.make_model(proto, opset_imports=opsets, ir_version=10))


def run(model: ir.Model, *inputs: Array) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [found.name for found in session.get_inputs()]
    return list(session.run(None, dict(zip(names, inputs, strict=True))))


def kinds(model: ir.Model) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph)


def same(model: ir.Model, *inputs: Array, static: bool = False) -> list[str]:
    """Prepares the model in place; its outputs are what they were, and once is enough."""
    before = run(model, *inputs)
    done = prepare(model, static=static)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for ours, theirs in zip(run(model, *inputs), before, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert set(prepare(model, static=static)) <= {"shapes"}
    return done


@given(
    channels=st.integers(1, 5),
    image=st.tuples(st.integers(3, 12), st.integers(3, 12)),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    pads=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    stride=st.integers(1, 4),
    batch=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_a_stem_computes_the_same_whatever_its_kernel_pads_and_stride(
    channels: int,
    image: tuple[int, int],
    kernel: tuple[int, int],
    pads: list[int],
    stride: int,
    batch: int,
) -> None:
    kernel = tuple(  # type: ignore[assignment]
        min(k, size + a + b)
        for k, size, a, b in zip(kernel, image, pads[:2], pads[2:], strict=True)
    )
    conv = helper.make_node("Conv", ["x", "w", "b"], ["y"], pads=pads, strides=[stride] * 2)
    model = made(
        [conv],
        {"x": ("n", channels, *image)},
        {"y": ("n", 4, None, None)},
        w=normal(4, channels, *kernel),
        b=normal(4),
    )
    done = same(model, normal(batch, channels, *image), static=True)
    blocks = stride > 1 and channels < 5 and all(size % stride == 0 for size in image)
    assert ("stem" in done) == (blocks or channels < 4)
    assert kinds(model)["SpaceToDepth"] == blocks


@pytest.mark.parametrize(
    ("change", "size"),
    [({"group": 2}, 8), ({"dilations": [2, 2]}, 8), ({"auto_pad": "SAME_UPPER"}, 8), ({}, "side")],
)
def test_a_stem_that_is_not_understood_stays(change: dict[str, Any], size: int | str) -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], **change)
    weight = normal(4, 2 // change.get("group", 1) + 2 * (size == "side"), 3, 3)
    given = weight.shape[1] * change.get("group", 1)
    model = made([conv], {"x": ("n", given, size, size)}, {"y": ("n", 4, None, None)}, w=weight)
    assert "stem" not in same(model, normal(2, given, 8, 8), static=True)


@given(
    channels=st.integers(1, 5),
    high=st.integers(1, 4),
    wide=st.integers(1, 4),
    kind=st.sampled_from(["rows", "columns", "MatMul"]),
    reshape=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_flattening_channels_last_computes_the_same(
    channels: int, high: int, wide: int, kind: str, reshape: bool
) -> None:
    count = channels * high * wide
    weight = normal(3, count) if kind == "rows" else normal(count, 3)
    nodes = [
        helper.make_node("Conv", ["x", "c"], ["image"]),
        helper.make_node("Relu", ["image"], ["active"]),
        helper.make_node("Reshape", ["active", "shape"], ["flat"])
        if reshape
        else helper.make_node("Flatten", ["active"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["y"])
        if kind == "MatMul"
        else helper.make_node("Gemm", ["flat", "w"], ["y"], transB=int(kind == "rows")),
    ]
    model = made(
        nodes,
        {"x": ("n", 5, high, wide)},
        {"y": ("n", 3)},
        c=normal(channels, 5, 1, 1),
        w=weight,
        shape=np.array([-1, count]),
    )
    done = same(model, normal(2, 5, high, wide), static=True)
    assert ("flatten" in done) == (channels > 1 and high * wide > 1)


def test_layouts_for_int8_are_left_alone_in_float() -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2])
    model = made([conv], {"x": ("n", 3, 8, 8)}, {"y": ("n", 4, 3, 3)}, w=normal(4, 3, 3, 3))
    assert not set(same(model, normal(2, 3, 8, 8))) & set(STATIC)
    assert set(STATIC) < set(PASSES)


MASKED = """
<ir_version: 10, opset_import: ["" : 20]>
attention (float[n, 6, 24] x, float[n, 1, 6, 6] mask) => (float[n, 6, 8] y{more})
<int64[4] split = {{0, 6, 2, 4}}, int64[3] join = {{0, 6, 8}}, float half = {{0.5}},
 float zero = {{0}}, int64[3] parts = {{8, 8, 8}}>
{{
  q, k, v = Split <axis = 2> (x, parts)
  qr = Reshape (q, split)
  kr = Reshape (k, split)
  vr = Reshape (v, split)
  qt = Transpose <perm = [0, 2, 1, 3]> (qr)
  kt = Transpose <perm = [0, 2, 3, 1]> (kr)
  vt = Transpose <perm = [0, 2, 1, 3]> (vr)
  dots = MatMul (qt, kt)
  scaled = Mul (dots, half)
  scores = Add (scaled, mask)
  soft = Softmax <axis = -1> (scores)
  bad = IsNaN (soft)
  weights = Where (bad, zero, soft)
  seen = MatMul (weights, vt)
  back = Transpose <perm = [0, 2, 1, 3]> (seen)
  y = Reshape (back, join)
}}
"""


@pytest.mark.parametrize("finite", [True, False])
def test_rows_of_which_everything_is_masked_stay_zero(finite: bool) -> None:
    model = ir.from_onnx_text(MASKED.format(more=""))
    mask = np.zeros((3, 1, 6, 6), np.float32)
    mask[..., 4:] = -1e4 if finite else -np.inf
    mask[1, :, 2] = -1e4 if finite else -np.inf  # a row that sees nothing at all
    assert "attention" in same(model, normal(3, 6, 24), mask)
    assert kinds(model)["MultiHeadAttention"] == 1
    assert kinds(model)["Softmax"] == 0
    (found,) = run(model, normal(3, 6, 24), mask)
    assert np.isfinite(found).all()
    assert finite or not found[1, 2].any()


def test_attention_whose_weights_are_an_output_stays() -> None:
    model = ir.from_onnx_text(MASKED.format(more=", float[n, 2, 6, 6] weights"))
    done = same(model, normal(2, 6, 24), np.zeros((2, 1, 6, 6), np.float32))
    assert "attention" not in done


class Attending(nn.Module):
    """Fused or separate projections, with or without a mask, batch or sequence first."""

    def __init__(self, fused: bool, masked: bool) -> None:
        super().__init__()
        self.fused, self.masked = fused, masked
        self.qkv = nn.Linear(12, 36)
        self.apart = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.out = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        if self.fused:
            q, k, v = self.qkv(x).reshape(b, s, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (layer(x).view(b, s, 3, 4).transpose(1, 2) for layer in self.apart)
        seen = x[..., 0] > -1e9  # depends on the input: the mask is computed
        mask = seen[:, None, None, :].expand(b, 1, s, s) if self.masked else None
        found = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        outputs: torch.Tensor = self.out(found.transpose(1, 2).reshape(b, s, 12))
        return outputs.mean(1)


@pytest.mark.parametrize(
    "reference",
    [
        pytest.param(Attending(fused=True, masked=False), marks=pytest.mark.slow),
        Attending(fused=False, masked=True),
        nn.Sequential(
            nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, activation="gelu"),
            nn.Flatten(),
            nn.Linear(60, 3),
        ),
    ],
    ids=["fused", "masked", "encoder"],
)
def test_exported_attention_becomes_one_operator(reference: nn.Module, tmp_path: Path) -> None:
    model = graph.read(exported(task_of(reference, (5, 12)), tmp_path).path)
    for batch in (1, 3):
        assert "attention" in same(model.clone(), normal(batch, 5, 12))
    prepare(model)
    assert kinds(model)["MultiHeadAttention"] == 1
    assert kinds(model)["Softmax"] == 0
    attended = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    assert sizes(attended.outputs[0]) == ("batch", 5, 12)
    # onnx alone loses the batch at the first Reshape.
    assert all("unk" not in str(sizes(value)) for value in attended.inputs if value)


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_recurrent_layers_lose_the_zeros_they_start_from(kind: str, start: float) -> None:
    states = ["h", "h"] if kind == "LSTM" else ["h"]
    nodes = [
        helper.make_node("Shape", ["x"], ["batch"], start=1, end=2),
        helper.make_node("Concat", ["two", "batch", "four"], ["shape"], axis=0),
        helper.make_node("Expand", ["start", "shape"], ["both"]),
        helper.make_node("Slice", ["both", "first", "one", "first"], ["h"]),
        helper.make_node(kind, ["x", "w", "r", "", "", *states], ["all"], hidden_size=4),
        helper.make_node("Transpose", ["all"], ["turned"], perm=[0, 2, 1, 3]),
        helper.make_node("Shape", ["turned"], ["sizes"], start=0, end=2),
        helper.make_node("Concat", ["sizes", "four"], ["joined"], axis=0),
        helper.make_node("Reshape", ["turned", "joined"], ["steps"]),
        helper.make_node("Transpose", ["steps"], ["first_batch"], perm=[1, 0, 2]),
        helper.make_node("Gather", ["first_batch", "last"], ["y"], axis=1),
    ]
    model = made(
        nodes,
        {"x": (5, "n", 3)},
        {"y": ("n", 4)},
        w=normal(1, 4 * GATES[kind], 3),
        r=normal(1, 4 * GATES[kind], 4),
        start=np.float32(start),
        last=np.array(-1),
        **{
            name: np.array([at]) for name, at in {"first": 0, "one": 1, "two": 2, "four": 4}.items()
        },
    )
    done = same(model, normal(5, 3, 3))
    assert ("states" in done) == (not start)
    assert {"reshapes", "selections"} <= set(done)
    if not start:
        assert kinds(model) == {kind: 1, "Reshape": 1, "Gather": 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", "gru", "cnn", "vit", "resnet20", "unet", "mobilenet_v2"])
def test_the_zoo_computes_the_same(name: str, tmp_path: Path) -> None:
    shape = (16, 16) if name in {"lstm", "gru"} else (3, 32, 32)
    model = zoo.build(name, zoo.arguments_for(name, shape, 5))
    found = graph.read(exported(task_of(model, shape), tmp_path).path)
    for static in (False, True):
        same(found.clone(), normal(3, *shape), static=static)


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose", "Gemm"])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_normalization_goes_into_the_layer_before(kind: str, bias: bool) -> None:
    image = () if kind == "Gemm" else (4, 4)
    weight = {"Conv": normal(5, 3, 2, 2), "ConvTranspose": normal(3, 5, 2, 2)}
    nodes = [
        helper.make_node(kind, ["x", "w", "b"][: 2 + bias], ["h"]),
        helper.make_node("BatchNormalization", ["h", "s", "b", "m", "v"], ["y"], epsilon=1e-3),
    ]
    model = made(
        nodes,
        {"x": ("n", 3, *image)},
        {"y": ("n", 5, *(None for _ in image))},
        w=weight.get(kind, normal(3, 5)),
        b=normal(5),
        s=normal(5),
        m=normal(5),
        v=np.abs(normal(5)) + 0.1,
    )
    assert "norms" in same(model, normal(2, 3, *image))
    assert kinds(model) == {kind: 1}


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", [[2, 3], [-1, -2], [1, 2]])
def test_the_mean_over_an_image_is_a_pooling(keepdims: int, axes: list[int]) -> None:
    nodes = [helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=keepdims)]
    rank = 4 if keepdims else 2
    model = made(nodes, {"x": ("n", 3, 4, 5)}, {"y": (None,) * rank}, axes=np.array(axes))
    assert ("pools" in same(model, normal(2, 3, 4, 5))) == (axes != [1, 2])


def test_nodes_that_do_nothing_go_and_names_stay() -> None:
    nodes = [
        helper.make_node("Identity", ["x"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Dropout", ["b"], ["c"]),
        helper.make_node("Identity", ["c"], ["y"]),
        helper.make_node("Identity", ["x"], ["same"]),
    ]
    model = made(nodes, {"x": ("n", 3)}, {"y": ("n", 3), "same": ("n", 3)})
    assert same(model, normal(2, 3))
    assert [value.name for value in model.graph.outputs] == ["y", "same"]
    assert kinds(model) == {"Relu": 1, "Identity": 1}  # an output cannot be an input


@given(st.permutations(range(4)), st.lists(st.integers(1, 3), min_size=3, max_size=3))
@settings(max_examples=25, deadline=None)
def test_a_transposition_that_moves_nothing_is_a_reshape(order: list[int], rest: list[int]) -> None:
    nodes = [helper.make_node("Transpose", ["x"], ["y"], perm=order)]
    shape = ("n", *rest)
    model = made(nodes, {"x": shape}, {"y": tuple(shape[axis] for axis in order)})
    done = same(model, normal(2, *rest))
    moved = [axis for axis in order if shape[axis] != 1]
    assert ("reshapes" in done) == (moved == sorted(moved))
