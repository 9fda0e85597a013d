"""Weight-only quantization: the operators compute with the weights that the codes stand for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compressor.measure.runtime import open_session
from compressor.stages.graph import new_constant, read, write
from compressor.stages.quantize.weights import BLOCKS, coded, matrices, packed, weights
from compressor.task import Array

BITS = st.sampled_from([4, 8])
BLOCK = st.sampled_from([16, 32, 64, 128, 256])
LEVELS: tuple[Literal[1, 4], ...] = (1, 4)


def graph(
    operator: str,
    constants: dict[int, Array],
    rank: int = 2,
    outer: Array | None = None,
    integers: bool = False,
    **attributes: Any,
) -> ir.Model:
    """One node ``node`` of some constants, an input ``x`` and perhaps another, ``c``."""
    kind = ir.DataType.INT64 if integers else ir.DataType.FLOAT
    x = ir.Value(name="x", type=ir.TensorType(kind), shape=ir.Shape([None] * rank))
    c = ir.Value(name="c", type=ir.TensorType(ir.DataType.FLOAT))
    if outer is not None:
        c.shape = ir.Shape([None] * outer.ndim)
    y = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT))
    inputs = [x] if outer is None else [x, c]
    model = ir.Model(ir.Graph(inputs, [y], nodes=[], opset_imports={"": 20}), ir_version=10)
    free = iter(inputs)
    count = len(constants) + len(inputs)
    read = [
        new_constant(model, f"w{at}", constants[at]) if at in constants else next(free)
        for at in range(count)
    ]
    model.graph.append(ir.node(operator, read, attributes, outputs=[y], name="node"))
    return model


def run(model: ir.Model, folder: Path, *inputs: Array) -> Array:
    path = folder / "model.onnx"
    write(model, path)
    session = open_session(path)
    names = [given.name for given in session.get_inputs()]
    found: Array = session.run(None, dict(zip(names, inputs, strict=True)))[0]
    return found


def kinds(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def decoded(rows: Array, bits: int, block: int) -> Array:
    codes, scales, zeros = coded(rows, bits, block)
    whole = (codes.astype(np.float32) - zeros[..., None]) * scales[..., None]
    return whole.reshape(len(rows), -1)[:, : rows.shape[1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


ROWS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=70),
    elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
)


@given(rows=ROWS, bits=BITS, block=BLOCK)
@settings(max_examples=60, deadline=None)
def test_no_weight_is_further_off_than_minimum_to_maximum_allows(
    rows: Array, bits: int, block: int
) -> None:
    """The search starts from the plain range, in which half a step is the worst (and half a step
    more at an end, where the zero point was rounded), and gives the least squares of all tried."""
    codes, scales, zeros = coded(rows, bits, block)
    assert codes.dtype == zeros.dtype == np.uint8
    assert scales.dtype == np.float32
    assert codes.max() < 2**bits
    assert zeros.max() < 2**bits
    got = decoded(rows, bits, block).astype(np.float64)
    for start in range(0, rows.shape[1], block):
        part = rows[:, start : start + block].astype(np.float64)
        span = np.maximum(part.max(-1), 0) - np.minimum(part.min(-1), 0)
        rms = np.sqrt(np.square(got[:, start : start + block] - part).sum(-1) / part.shape[1])
        assert (rms <= 1.001 * span / (2**bits - 1) + 1e-30).all()


@given(rows=ROWS, bits=BITS, block=BLOCK)
@settings(max_examples=30, deadline=None)
def test_zeros_stay_zero_and_scaling_by_two_scales(rows: Array, bits: int, block: int) -> None:
    got = decoded(rows, bits, block)
    assert (got[rows == 0] == 0).all()
    np.testing.assert_allclose(decoded(rows * 2, bits, block), got * 2, rtol=1e-6)


def test_the_search_beats_the_plain_range() -> None:
    """By 0.3 dB or more on normal weights in 4 bits."""
    rows = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    blocks = rows.reshape(64, -1, 32)
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    scale = (high - low) / 15
    zero = np.rint(-low / scale)
    plain = (np.clip(np.rint(blocks / scale) + zero, 0, 15) - zero) * scale
    noise = np.square(plain - blocks).sum() / np.square(decoded(rows, 4, 32) - rows).sum()
    assert 10 * np.log10(noise) > 0.3


@given(codes=hnp.arrays(np.uint8, hnp.array_shapes(max_dims=3), elements=st.integers(0, 15)))
def test_packed_codes_come_back(codes: Array) -> None:
    both = packed(codes, 4)
    again = np.stack([both & 15, both >> 4], -1).reshape(*codes.shape[:-1], -1)
    np.testing.assert_array_equal(again[..., : codes.shape[-1]], codes)
    assert both.shape[-1] == -(-codes.shape[-1] // 2)
    np.testing.assert_array_equal(packed(codes, 8), codes)


@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 150), st.integers(1, 20)),
    bits=BITS,
    block=BLOCK,
    rank=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_matmul_computes_with_the_decoded_weights(
    folder: Path, sizes: tuple[int, int, int], bits: Any, block: Any, rank: int, seed: int
) -> None:
    """For every depth, a multiple of the block or not, and every rank of the input."""
    rng = np.random.default_rng(seed)
    rows, depth, width = sizes
    x = rng.standard_normal([1, 2, rows, depth][-rank:]).astype(np.float32)
    w = rng.standard_normal((depth, width)).astype(np.float32)
    model = graph("MatMul", {1: w}, rank)
    listed = matrices(model, bits=bits, block=block)
    smaller = -(-depth // block) * (block * bits / 8 + 4 + bits / 8) < 4 * depth
    assert weights(model, bits=bits, block=block, level=1) == len(listed) == smaller
    assert kinds(model) == (Counter(MatMulNBits=1) if smaller else Counter(MatMul=1))
    if not smaller:
        return
    wanted = x @ decoded(np.ascontiguousarray(w.T), bits, block).T
    np.testing.assert_allclose(run(model, folder, x), wanted, atol=1e-4, rtol=1e-4)


@given(
    bits=BITS,
    across=st.booleans(),
    alpha=st.sampled_from([1.0, 0.5, -2.0]),
    beta=st.sampled_from([1.0, 0.0, 3.0]),
    bias=st.sampled_from([None, (), (1,), (6,), (1, 6), (3, 1), (3, 6)]),
    fixed=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_gemm_keeps_alpha_beta_and_bias(
    folder: Path,
    bits: Any,
    across: bool,
    alpha: float,
    beta: float,
    bias: tuple[int, ...] | None,
    fixed: bool,
) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 50)).astype(np.float32)
    w = rng.standard_normal((6, 50) if across else (50, 6)).astype(np.float32)
    c = None if bias is None else rng.standard_normal(bias).astype(np.float32)
    constants = {1: w} if c is None or not fixed else {1: w, 2: c}
    outer = None if fixed else c
    model = graph("Gemm", constants, outer=outer, transB=int(across), alpha=alpha, beta=beta)
    assert weights(model, bits=bits, block=16, level=1) == 1
    rows = np.ascontiguousarray((w if across else w.T) * np.float32(alpha))
    wanted = x @ decoded(rows, bits, 16).T + (0 if c is None else beta * c)
    given = (x,) if outer is None else (x, outer)
    np.testing.assert_allclose(run(model, folder, *given), wanted, atol=1e-4, rtol=1e-4)


@given(
    bits=BITS,
    block=BLOCK,
    shape=st.tuples(st.integers(1, 9), st.integers(1, 150)),
    rank=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_gather_gives_the_decoded_rows(
    folder: Path, bits: Any, block: Any, shape: tuple[int, int], rank: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    table = rng.standard_normal(shape).astype(np.float32)
    which = rng.integers(-shape[0], shape[0], [2] * rank)
    model = graph("Gather", {0: table}, rank, integers=True)
    listed = matrices(model, bits=bits, block=block)
    smaller = -(-shape[1] // block) * (block * bits / 8 + 4 + bits / 8) < 4 * shape[1]
    taken = smaller and not (bits == 4 and shape[1] % 2)
    assert weights(model, bits=bits, block=block) == len(listed) == taken
    assert kinds(model) == (Counter(GatherBlockQuantized=1) if taken else Counter(Gather=1))
    if not taken:
        return
    np.testing.assert_array_equal(run(model, folder, which), decoded(table, bits, block)[which])


def test_level_4_computes_in_8_bits_what_level_1_computes_in_float(folder: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 100)).astype(np.float32)
    w = rng.standard_normal((100, 8)).astype(np.float32)
    found = {}
    for level in LEVELS:
        model = graph("MatMul", {1: w})
        weights(model, bits=8, block=32, level=level)
        found[level] = run(model, folder, x)
    assert 0 < np.abs(found[1] - found[4]).max() < 0.03 * np.abs(found[1]).max()


NAN = np.full((64, 8), np.nan, np.float32)
LARGE = np.ones((64, 8), np.float32)


@pytest.mark.parametrize(
    ("operator", "constants", "attributes"),
    [
        ("MatMul", {1: NAN}, {}),
        ("MatMul", {1: LARGE.astype(np.float16)}, {}),
        ("MatMul", {1: LARGE[None]}, {}),
        ("MatMul", {0: LARGE}, {}),
        ("MatMul", {1: LARGE[:3]}, {}),
        ("Gemm", {1: LARGE}, {"transA": 1}),
        ("Gather", {0: LARGE.T.copy()}, {"axis": 1}),
        ("Conv", {1: LARGE[..., None]}, {}),
    ],
    ids=["nan", "float16", "stacked", "left side", "too small", "transposed", "columns", "conv"],
)
def test_what_cannot_change_is_not_listed_and_stays(
    operator: str, constants: dict[int, Array], attributes: dict[str, Any]
) -> None:
    model = graph(operator, constants, integers=operator == "Gather", **attributes)
    before = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    assert matrices(model, bits=4) == []
    assert weights(model, bits=4) == 0
    assert ir.serde.serialize_model(model).SerializeToString(deterministic=True) == before


@pytest.fixture(scope="module")
def reader(folder: Path) -> tuple[Path, Array]:
    """An embedding, a linear layer used twice, an LSTM and a head; and what it reads."""
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", 6]))
    y = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT))
    model = ir.Model(ir.Graph([x], [y], nodes=[], opset_imports={"": 20}), ir_version=10)

    def normal(name: str, *shape: int) -> ir.Value:
        scale = shape[-1] ** -0.5
        return new_constant(model, name, (rng.standard_normal(shape) * scale).astype(np.float32))

    twice = normal("twice", 48, 48)
    steps: list[tuple[str, list[ir.Value | None], dict[str, Any]]] = [
        ("Gather", [normal("words", 40, 48), x], {}),
        ("MatMul", [None, twice], {}),
        ("Relu", [None], {}),
        ("MatMul", [None, twice], {}),
        ("Transpose", [None], {"perm": [1, 0, 2]}),
        ("LSTM", [None, normal("w", 1, 256, 48), normal("r", 1, 256, 64)], {"hidden_size": 64}),
        ("Squeeze", [None, new_constant(model, "axes", np.array([0]))], {}),
        ("Gemm", [None, normal("head", 4, 64), normal("bias", 4)], {"transB": 1}),
    ]
    out = x
    for at, (operator, inputs, attributes) in enumerate(steps):
        read = [out if value is None else value for value in inputs]
        made = 2 if operator == "LSTM" else 1
        node = ir.node(operator, read, attributes, num_outputs=made, name=f"node{at}")
        model.graph.append(node)
        for place, value in enumerate(node.outputs):
            value.name = f"value{at}_{place}"
        out = node.outputs[-1]
    out.dtype, out.name = ir.DataType.FLOAT, "y"
    model.graph.outputs[0] = out
    write(model, folder / "reader.onnx")
    return folder / "reader.onnx", rng.integers(0, 40, (16, 6))


@pytest.mark.parametrize(("bits", "decibels"), [(4, 12), (8, 30)])
def test_a_whole_model(reader: tuple[Path, Array], folder: Path, bits: Any, decibels: int) -> None:
    """Equal weights are stored once, the LSTM stays, and the same graph gives the same bytes."""
    path, x = reader
    exact = run(read(path), folder, x)
    files = []
    for _ in range(2):
        model = read(path)
        before = kinds(model)
        assert weights(model, bits=bits, block=16) == 4
        assert kinds(model)["MatMulNBits"] == before["MatMul"] + before["Gemm"] == 3
        assert kinds(model)["LSTM"] == 1
        assert sum(name.endswith("_codes") for name in model.graph.initializers) == 3
        got = run(model, folder, x)
        files.append((folder / "model.onnx").read_bytes())
    assert files[0] == files[1]
    noise = np.square(got - exact).sum() / np.square(exact).sum()
    assert -10 * np.log10(noise) > decibels
    assert len(files[0]) < path.stat().st_size - 3 * 48 * 48


def test_left_nodes_stay_as_they_are(reader: tuple[Path, Array]) -> None:
    path, _ = reader
    model = read(path)
    left = [str(node.name) for node in model.graph if node.op_type != "Gather"]
    assert weights(model, bits=8, block=16, left=left) == 1
    assert kinds(model)["MatMulNBits"] == 0
    assert {str(node.name) for node in model.graph} >= set(left)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_listed_is_what_changes(reader: tuple[Path, Array], bits: Any) -> None:
    path, _ = reader
    model = read(path)
    before = {str(node.name): node.op_type for node in model.graph}
    listed = matrices(model, bits=bits, block=16)
    assert listed == ["node0", "node1", "node3", "node7"]  # in the graph's order, no LSTM
    assert {str(node.name): node.op_type for node in model.graph} == before  # looking changes none
    for name in listed:  # each of them alone
        one = read(path)
        assert weights(one, bits=bits, block=16, left=[at for at in listed if at != name]) == 1
        after = {str(node.name): node.op_type for node in one.graph}
        assert [at for at in before if after[at] != before[at]] == [name]
    whole = read(path)
    assert weights(whole, bits=bits, block=16, left=listed) == 0
    assert weights(whole, bits=bits, block=16) == len(listed)
    assert matrices(whole, bits=bits, block=16) == []


def test_the_block_follows_the_bits() -> None:
    """Without a block, that of the number of bits."""
    for bits, block in BLOCKS.items():
        model = graph("MatMul", {1: np.ones((256, 8), np.float32)})
        weights(model, bits=bits)
        assert model.graph[0].attributes["block_size"].as_int() == block
