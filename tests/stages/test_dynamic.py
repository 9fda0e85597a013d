"""Dynamic 8-bit graphs: the numbers in them, and what is shared or left."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphs import answers, drawn, floats, sqnr
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.stages.graph import constant
from compressor.stages.quantize.dynamic import dynamic, products, recurrent
from compressor.stages.quantize.kernels import Codes
from compressor.stages.quantize.qdq import channel_scales, nearest
from compressor.task import Array

CODES = Codes(signed=False, bits=8)
SEVEN = Codes(signed=False, bits=7)


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def product(x: Array, w: Array, codes: Codes = CODES) -> Array:
    """DynamicQuantizeLinear of the whole batch, MatMulInteger, and back."""
    low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
    scale = np.float32((high - low) / np.float32(255))
    zero = np.clip(np.rint(-low / scale), 0, 255)
    held = np.clip(np.rint(x / scale) + zero, 0, 255) - zero
    scales = channel_scales(w, 1, codes)
    whole = held.astype(np.int64) @ nearest(w, scales, 1, codes).astype(np.int64)
    return np.asarray(whole * (scale * scales))


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**16),
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
    kind=st.sampled_from(
        ["MatMul(x, w)", "Gemm(x, w)", "Gemm(x, w, b)", "Gemm <transB = 1> (x, w, wide)"]
    ),
    codes=st.sampled_from([CODES, SEVEN]),
)
def test_a_product_is_what_its_codes_say(
    seed: int, sizes: tuple[int, int, int], kind: str, codes: Codes
) -> None:
    rows, reads, makes = sizes
    x, w, b = floats(seed, (rows, reads), (reads, makes), (makes,))
    model = drawn(
        f"(float[n, {reads}] x) => (float[n, {makes}] y) {{ y = {kind} }}",
        w=np.ascontiguousarray(w.T) if "transB" in kind else w,
        b=b,
        wide=b[None],
    )
    made = dynamic(model, products(model), codes)
    assert operators(made)["MatMulInteger"] == 1
    wanted = product(x, w, codes) + (b if "b)" in kind or "wide" in kind else 0)
    assert np.allclose(answers(made, x=x)["y"], wanted, rtol=1e-5, atol=1e-5)
    assert products(model)  # the source stays as it was


TWO = """(float[n, 6] x) => (float[n, 4] y, float[n, 4] z, float[n, 6] h) {
    h = Tanh(x) a = MatMul(h, q) c = MatMul(h, k) y = Add(a, c) z = MatMul(h, q) }"""


def test_what_several_products_read_is_encoded_once() -> None:
    x, q, k = floats(0, (3, 6), (6, 4), (6, 4))
    model = drawn(TWO, q=q, k=k)
    made = dynamic(model, products(model), CODES)
    used = operators(made)
    assert (used["DynamicQuantizeLinear"], used["MatMulInteger"], used["MatMul"]) == (1, 3, 0)
    h = np.tanh(x)
    seen = answers(made, x=x)
    assert list(seen) == ["y", "z", "h"]
    assert np.allclose(seen["z"], product(h, q), rtol=1e-5, atol=1e-5)
    assert np.allclose(seen["y"], product(h, q) + product(h, k), rtol=1e-5, atol=1e-5)
    assert np.allclose(seen["h"], h, rtol=1e-5)


@pytest.mark.parametrize("left", ["MatMul_a", "MatMul_c", "MatMul_z"])
def test_what_is_not_named_stays(left: str) -> None:
    x, q, k = floats(0, (3, 6), (6, 4), (6, 4))
    model = drawn(TWO, q=q, k=k)
    names = [name for name in products(model) if name != left]
    made = dynamic(model, names, CODES)
    used = operators(made)
    assert (used["DynamicQuantizeLinear"], used["MatMulInteger"], used["MatMul"]) == (1, 2, 1)
    assert [str(node.name) for node in made.graph if node.op_type == "MatMul"] == [left]
    assert sqnr(answers(model, x=x)["y"], answers(made, x=x)["y"]) > 25
    nothing = dynamic(model, (), CODES)
    assert operators(nothing) == operators(model)
    assert np.array_equal(answers(nothing, x=x)["y"], answers(model, x=x)["y"])


def test_convolutions_are_never_dynamic() -> None:
    (w,) = floats(0, (4, 4, 1, 1))
    model = drawn("(float[n, 4, 8, 8] x) => (float[n, 4, 8, 8] y) { y = Conv(x, w) }", w=w)
    assert products(model) == []
    assert recurrent(model) == []


def test_inputs_that_are_constant_have_codes() -> None:
    (w,) = floats(0, (6, 4))
    model = drawn("(float[n, 6] x) => (float[n, 4] y) { y = MatMul(x, w) }", w=w)
    made = dynamic(model, products(model), CODES)
    assert not answers(made, x=np.zeros((2, 6), np.float32))["y"].any()


# --- LSTM

STEPS, BATCH, READS, HIDDEN = 7, 3, 5, 8


def lstm(ways: int, attributes: str = "", *, extra: str = "", **more: Any) -> ir.Model:
    w, r, b = floats(
        ways, (ways, 4 * HIDDEN, READS), (ways, 4 * HIDDEN, HIDDEN), (ways, 8 * HIDDEN)
    )
    direction = "bidirectional" if ways == 2 else "forward"
    return drawn(
        f"(float[t, n, {READS}] x) => (float[t, {ways}, n, {HIDDEN}] y,"
        f" float[{ways}, n, {HIDDEN}] last) {{ y, last = LSTM <hidden_size = {HIDDEN},"
        f' direction = "{direction}" {attributes}> (x, w, r, b {extra}) }}',
        **{"w": w, "r": r, "b": b, **more},
    )


@pytest.mark.parametrize("codes", [CODES, SEVEN])
@pytest.mark.parametrize("ways", [1, 2])
def test_an_lstm_in_8_bits(ways: int, codes: Codes) -> None:
    model = lstm(ways)
    (x,) = floats(9, (STEPS, BATCH, READS))
    (name,) = recurrent(model)
    assert name == "LSTM_y"
    made = dynamic(model, [name], codes)
    assert operators(made) == {"DynamicQuantizeLSTM": 1}
    assert [value.name for value in made.graph.outputs] == ["y", "last"]
    held = {key: constant(value) for key, value in made.graph.initializers.items()}
    for weight, reads in (("w", READS), ("r", HIDDEN)):
        quantized, scale = held[f"{weight}_quantized"], held[f"{weight}_scale"]
        assert quantized is not None
        assert scale is not None
        assert quantized.shape == (ways, reads, 4 * HIDDEN)
        assert quantized.dtype == np.int8
        assert np.abs(quantized.astype(int)).max() == codes.largest
        exact = constant(model.graph.initializers[weight])
        assert exact is not None
        near = np.abs(quantized * scale[:, None] - exact.transpose(0, 2, 1))
        assert (near <= 0.501 * scale[:, None]).all()
    exact_outputs, seen = answers(model, x=x), answers(made, x=x)
    for output, value in exact_outputs.items():
        assert seen[output].shape == value.shape
        assert sqnr(value, seen[output]) > (30 if codes.bits == 8 else 24)
    assert recurrent(model) == ["LSTM_y"]  # the source stays as it was


def test_first_states_are_handed_on() -> None:
    h, c = floats(4, (1, BATCH, HIDDEN), (1, BATCH, HIDDEN))
    model = lstm(1, extra=", , h, c", h=h, c=c)
    (x,) = floats(9, (STEPS, BATCH, READS))
    made = dynamic(model, recurrent(model), CODES)
    exact, seen = answers(model, x=x)["y"], answers(made, x=x)["y"]
    assert sqnr(exact, seen) > 30
    assert sqnr(answers(lstm(1), x=x)["y"], seen) < 15


@pytest.mark.parametrize(
    ("made", "shapes"),
    [
        (", , c", {"c": (1, BATCH, HIDDEN)}),  # the cell state alone
        (", h", {"h": (1, BATCH, HIDDEN)}),
        (", h, c", {"h": (1, BATCH, HIDDEN), "c": (1, BATCH, HIDDEN)}),
        ("y, , c", {"y": (STEPS, 1, BATCH, HIDDEN), "c": (1, BATCH, HIDDEN)}),
    ],
)
def test_outputs_that_nobody_asked_for_stay_absent(
    made: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    x, w, r = floats(5, (STEPS, BATCH, READS), (1, 4 * HIDDEN, READS), (1, 4 * HIDDEN, HIDDEN))
    ends = ", ".join(f"float[{', '.join('d' * len(shapes[end]))}] {end}" for end in shapes)
    model = drawn(
        f"(float[t, n, {READS}] x) => ({ends}) {{ {made} = LSTM <hidden_size = {HIDDEN}> (x, w, r)"
        " }",
        w=w,
        r=r,
    )
    wanted = [part.strip() for part in made.split(",")]
    assert [value.name for value in model.graph[0].outputs] == wanted
    fast = dynamic(model, recurrent(model), CODES)
    assert operators(fast) == {"DynamicQuantizeLSTM": 1}
    assert [value.name for value in fast.graph[0].outputs] == wanted
    exact, seen = answers(model, x=x), answers(fast, x=x)
    assert {name: value.shape for name, value in seen.items()} == shapes
    for name, value in exact.items():
        assert sqnr(value, seen[name]) > 30


def test_a_layer_may_read_the_cell_state_alone() -> None:
    x, w, r, v = floats(
        6, (STEPS, BATCH, READS), (1, 4 * HIDDEN, READS), (1, 4 * HIDDEN, HIDDEN), (HIDDEN, 4)
    )
    model = drawn(
        f"(float[t, n, {READS}] x) => (float[1, n, 4] y) {{"
        f" , , c = LSTM <hidden_size = {HIDDEN}> (x, w, r) y = MatMul(c, v) }}",
        w=w,
        r=r,
        v=v,
    )
    made = dynamic(model, [*products(model), *recurrent(model)], CODES)
    used = operators(made)
    assert (used["DynamicQuantizeLSTM"], used["MatMulInteger"]) == (1, 1)
    assert sqnr(answers(model, x=x)["y"], answers(made, x=x)["y"]) > 25


@pytest.mark.parametrize(
    ("attributes", "taken"),
    [
        ('activations = ["Sigmoid", "Tanh", "Tanh"]', True),
        ('activations = ["Sigmoid", "Relu", "Tanh"]', False),
        ("clip = 1.0", False),
        ("input_forget = 1", False),
        ("layout = 0", True),
        ("layout = 1", False),
    ],
)
def test_cells_of_another_kind_stay(attributes: str, taken: bool) -> None:
    assert bool(recurrent(lstm(1, f", {attributes}"))) is taken


def test_cells_with_peepholes_or_computed_weights_stay() -> None:
    p = np.ones((1, 3 * HIDDEN), np.float32)
    assert recurrent(lstm(1, extra=", , , , p", p=p)) == []
    text = (
        f"(float[t, n, {READS}] x, float[1, 32, {READS}] w) => (float[t, 1, n, 8] y)"
        " { y = LSTM <hidden_size = 8> (x, w, r) }"
    )
    assert recurrent(drawn(text, r=np.ones((1, 32, 8), np.float32))) == []
