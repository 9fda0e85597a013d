"""The plan of a static graph: what computes in 8 bits, and which values are held for that."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import drawn, floats
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.stages.quantize.plan import axis_of, plan
from compressor.task import Array

IMAGE = "(float[n, 4, 8, 8] x)"
W, V, B = floats(0, (4, 4, 3, 3), (4, 4, 3, 3), (4,))
DENSE, TURNED, ROW = floats(1, (256, 5), (5, 256), (5,))
SAME = "<pads = [1, 1, 1, 1]>"


def names(held: dict[str, str]) -> str:
    """``value`` or ``value:source``, in alphabetical order."""
    parts = (name if name == source else f"{name}:{source}" for name, source in held.items())
    return " ".join(sorted(parts))


def said(*values: str) -> frozenset[str]:
    return frozenset(values)


def test_a_clamp_between_convolutions_is_done_by_the_codes() -> None:
    model = drawn(
        f"{IMAGE} => (float[n, 4, 8, 8] y) {{"
        f"a = Conv {SAME} (x, w, b) b1 = Relu(a) y = Conv {SAME} (b1, v) }}",
        w=W,
        v=V,
        b=B,
    )
    ours = plan(model)
    assert ours.weighted == ("Conv_a", "Conv_y")
    assert ours.inside == said("Conv_a", "Conv_y")
    assert names(ours.held) == "b1 x y"  # not what is before the clamp
    assert ours.made == said("b1", "y")
    assert ours.ranged == ("x", "b1", "y")


@pytest.mark.parametrize("clamp", ["Relu(a)", "Clip(a, low, high)"])
def test_a_clamp_that_others_see_through_is_not(clamp: str) -> None:
    model = drawn(
        f"{IMAGE} => (float[n, 4, 8, 8] a, float[n, 4, 8, 8] y) {{"
        f"a = Conv {SAME} (x, w) b = {clamp} y = Conv {SAME} (b, v) }}",
        w=W,
        v=V,
        low=np.float32(0),
        high=np.float32(6),
    )
    ours = plan(model)
    assert names(ours.held) == "a b x y"  # `a` leaves the graph as it is, `b` has its own range
    assert ours.made == said("a", "y")


def test_a_clip_whose_bounds_are_computed_is_no_clamp() -> None:
    model = drawn(
        f"{IMAGE} => (float[n, 4, 8, 8] y) {{"
        f"a = Conv {SAME} (x, w) top = ReduceMax <keepdims = 0> (x) b = Clip(a, low, top)"
        f" y = Conv {SAME} (b, v) }}",
        w=W,
        v=V,
        low=np.float32(0),
    )
    assert names(plan(model).held) == "a b x y"


def test_a_residual_sum_computes_in_8_bits_where_both_sides_come_from_inside() -> None:
    body = (
        f"a = Conv {SAME} (x, w) b = Relu(a) c = Conv {SAME} (b, v) d = Add(c, OTHER) e = Relu(d)"
        f" y = Conv {SAME} (e, w)"
    )
    text = f"{IMAGE} => (float[n, 4, 8, 8] y) {{ {body} }}"
    ours = plan(drawn(text.replace("OTHER", "b"), w=W, v=V))
    assert ours.inside == said("Conv_a", "Conv_c", "Add_d", "Conv_y")
    assert names(ours.held) == "b c e x y"
    assert ours.made == said("b", "c", "e", "y")
    # The model's own input is not brought into 8 bits for a sum; nor is a constant.
    for other in ("t", "k"):
        swapped = text.replace("OTHER", other).replace("{ a", "{ t = Tanh(x) a")
        ours = plan(drawn(swapped, w=W, v=V, k=np.float32(1)))
        assert "Add_d" not in ours.inside
        assert names(ours.held) == "b c e x y"  # `e` is encoded where the next layer reads it
        assert "e" not in ours.made


def test_a_sum_that_nothing_in_8_bits_reads_stays_float() -> None:
    model = drawn(
        f"{IMAGE} => (float[n, 4, 8, 8] y) {{"
        f"a = Conv {SAME} (x, w) b = Conv {SAME} (x, v) c = Add(a, b) y = Tanh(c) }}",
        w=W,
        v=V,
    )
    assert plan(model).inside == said("Conv_a", "Conv_b")


def test_what_only_moves_keeps_the_codes_of_its_source() -> None:
    model = drawn(
        f"{IMAGE} => (float[n, 5] y) {{"
        f"a = Conv {SAME} (x, w) p = MaxPool <kernel_shape = [1, 1]> (a) q = Relu(p)"
        " t = Transpose <perm = [0, 2, 3, 1]> (a) r = Reshape(t, shape) y = Gemm(r, g, c) }",
        w=W,
        g=DENSE,
        c=ROW,
        shape=np.array([-1, 256]),
    )
    ours = plan(model)
    assert ours.weighted == ("Conv_a", "Gemm_y")
    assert names(ours.held) == "a r:a t:a x"
    assert ours.ranged == ("x", "a")
    assert ours.made == said("a")  # Gemm hands float on where nobody reads codes


LEARNED = (
    "(float[n, 16] x) => (float[n, 3, 6] y) { h = MatMul(x, v) s = Shape <start = 0, end = 1> (h)"
    " t = Concat <axis = 0> (s, rest) MOVED e = Expand(SOURCE, t) y = MatMul(e, w) }"
)
"""A constant, one for all examples, that a layer reads: the query of an attention, say."""


@pytest.mark.parametrize(
    ("moved", "source", "held"),
    [
        ("", "q", "e x"),
        ("u = Transpose <perm = [0, 1, 2]> (q)", "u", "e:u u x"),
    ],
)
def test_a_constant_is_not_held_where_what_is_moved_from_it_is(
    moved: str, source: str, held: str
) -> None:
    q, w, v = floats(4, (1, 3, 8), (8, 6), (16, 8))
    text = LEARNED.replace("MOVED", moved).replace("SOURCE", source)
    ours = plan(drawn(text, q=q, w=w, v=v, rest=np.array([3, 8])))
    assert ours.weighted == ("MatMul_h", "MatMul_y")
    assert names(ours.held) == held
    assert not ours.made


def test_maxpool_that_says_where_is_not_moving_alone() -> None:
    text = (
        f"{IMAGE} => (float[n, 4, 8, 8] y) {{ a = Conv {SAME} (x, w) p, WHERE"
        f" = MaxPool <kernel_shape = [1, 1]> (a) y = Conv {SAME} (p, v) }}"
    )
    assert names(plan(drawn(text.replace(", WHERE", ""), w=W, v=V)).held) == "a p:a x y"
    assert names(plan(drawn(text.replace("WHERE", "at"), w=W, v=V)).held) == "a p x y"


@pytest.mark.parametrize(("mode", "held"), [("nearest", "a r:a x y"), ("linear", "a r x y")])
def test_resizing_moves_where_it_does_not_mix(mode: str, held: str) -> None:
    model = drawn(
        f"{IMAGE} => (float[n, 4, 16, 16] y) {{ a = Conv {SAME} (x, w)"
        f' r = Resize <mode = "{mode}"> (a, , scales) y = Conv {SAME} (r, v) }}',
        w=W,
        v=V,
        scales=np.array([1, 1, 2, 2], np.float32),
    )
    assert names(plan(model).held) == held


def test_a_concatenation_needs_all_its_parts_from_inside() -> None:
    text = (
        f"{IMAGE} => (float[n, 4, 8, 8] y) {{ a = Conv {SAME} (x, w) b = Conv {SAME} (x, v)"
        f" t = Tanh(x) c = Concat <axis = 1> (a, OTHER) y = Conv {SAME} (c, u) }}"
    )
    (u,) = floats(3, (4, 8, 3, 3))
    ours = plan(drawn(text.replace("OTHER", "b"), w=W, v=V, u=u))
    assert "Concat_c" in ours.inside
    assert names(ours.held) == "a b c x y"
    assert ours.made == said("a", "b", "c", "y")
    ours = plan(drawn(text.replace("OTHER", "t"), w=W, v=V, u=u))
    assert "Concat_c" not in ours.inside
    assert ours.made == said("a", "b", "y")


def test_squeeze_and_excite_is_all_inside() -> None:
    (u,) = floats(3, (4, 4, 1, 1))
    model = drawn(
        f"{IMAGE} => (float[n, 4, 8, 8] y) {{ a = Conv {SAME} (x, w) g = GlobalAveragePool(a)"
        f" s = Conv(g, u) r = Relu(s) e = Conv(r, u) h = Sigmoid(e) m = Mul(a, h)"
        f" y = Conv {SAME} (m, v) }}",
        w=W,
        v=V,
        u=u,
    )
    ours = plan(model)
    assert ours.inside == {str(node.name) for node in model.graph} - {"Relu_r"}
    assert names(ours.held) == "a e g h m r x y"


TEXT = "(float[n, 256] x, float[5] given) => (float[n, 5] y) {{ k = Tanh(given) y = {} }}"


@pytest.mark.parametrize(
    ("node", "taken", "axis"),
    [
        ("Gemm(x, w)", True, 1),
        ("Gemm(x, w, b)", True, 1),
        ("Gemm <transB = 1> (x, t, b)", True, 0),
        ("Gemm(x, w, wide)", True, 1),
        ("MatMul(x, w)", True, 1),
        ("Gemm <transA = 1> (x, square)", False, 0),
        ("Gemm <alpha = 0.5> (x, w, b)", False, 0),
        ("Gemm <beta = 2.0> (x, w, b)", False, 0),
        ("Gemm(x, w, k)", False, 0),  # a bias that is computed
        ("Gemm(x, w, column)", False, 0),  # a bias for each example
        ("Gemm(x, w, one)", False, 0),  # a bias that is spread over the channels
        ("Gemm(x, w, scalar)", False, 0),
        ("MatMul(x, stack)", False, 0),  # a weight for each example
        ("MatMul(w2, w)", False, 0),  # constants on both sides
    ],
)
def test_matrix_products_with_an_8_bit_kernel(node: str, taken: bool, axis: int) -> None:
    stack, square, other = floats(2, (3, 256, 5), (7, 5), (3, 256))
    model = drawn(
        TEXT.format(node),
        w=DENSE,
        t=TURNED,
        b=ROW,
        wide=ROW[None],
        column=np.ones((3, 1), np.float32),
        one=np.ones(1, np.float32),
        scalar=np.float32(1),
        stack=stack,
        square=square,
        w2=other,
    )
    (product,) = [one for one in model.graph if one.op_type in ("Gemm", "MatMul")]
    assert plan(model).weighted == ((str(product.name),) if taken else ())
    if taken:
        assert axis_of(product) == axis


def test_weights_of_other_types_stay() -> None:
    model = drawn(
        "(double[n, 256] x) => (double[n, 5] y) { y = Gemm(x, w) }", w=DENSE.astype(np.float64)
    )
    assert plan(model).weighted == ()


def test_sums_of_integers_stay() -> None:
    (w,) = floats(0, (1, 4, 3, 3))
    model = drawn(
        f"{IMAGE} => (float[n, 1, 8, 8] y, int64[4] s) {{"
        f"a = Conv {SAME} (x, w) h = Shape(a) s = Add(h, h) y = Tanh(a) }}",
        w=w,
    )
    assert plan(model).inside == said("Conv_a")


def test_one_weight_may_serve_two_layers() -> None:
    model = drawn(
        f"{IMAGE} => (float[n, 4, 8, 8] y) {{ a = Conv {SAME} (x, w) y = Conv {SAME} (a, w) }}",
        w=W,
    )
    ours = plan(model)
    assert ours.weighted == ("Conv_a", "Conv_y")
    assert names(ours.held) == "a x y"


def test_the_models_input_is_held_but_not_made() -> None:
    model = drawn(
        f"{IMAGE} => (float[n, 4, 8, 8] y, float[n, 4, 8, 8] z) {{"
        f"y = Conv {SAME} (x, w) z = Exp(x) }}",
        w=W,
    )
    ours = plan(model)
    assert names(ours.held) == "x y"
    assert ours.made == said("y")  # so that Exp goes on reading the input in float


def test_a_value_that_float_reads_too_is_made_in_8_bits() -> None:
    model = drawn(
        f"{IMAGE} => (float[n, 4, 8, 8] y, float[n, 4, 8, 8] z) {{"
        f"a = Conv {SAME} (x, w) z = Exp(a) y = Conv {SAME} (a, v) }}",
        w=W,
        v=V,
    )
    assert plan(model).made == said("a", "y")


def test_what_is_left_breaks_the_chain() -> None:
    model = drawn(
        f"{IMAGE} => (float[n, 4, 8, 8] y) {{ a = Conv {SAME} (x, w) b = Conv {SAME} (a, v)"
        f" c = Add(a, b) y = Conv {SAME} (c, w) }}",
        w=W,
        v=V,
    )
    assert plan(model).inside == said("Conv_a", "Conv_b", "Add_c", "Conv_y")
    ours = plan(model, ["Conv_b"])
    assert ours.weighted == ("Conv_a", "Conv_y")
    assert ours.inside == said("Conv_a", "Conv_y")  # the sum has lost a side
    assert names(ours.held) == "a c x y"
    nothing = plan(model, ["Conv_a", "Conv_b", "Conv_y"])
    assert (nothing.weighted, nothing.inside, nothing.held) == ((), frozenset(), {})


OPERATORS = (
    f"Conv {SAME} (A, w)",
    f"Conv {SAME} (A, v, b)",
    "Relu(A)",
    "Clip(A, low, high)",
    "Tanh(A)",
    "Sigmoid(A)",
    "Add(A, B)",
    "Mul(A, B)",
    "MaxPool <kernel_shape = [1, 1]> (A)",
    "Identity(A)",
    "Transpose <perm = [0, 1, 3, 2]> (A)",
)


@st.composite
def nets(draw: st.DrawFn) -> tuple[str, list[str]]:
    """The text of a random graph of 4x8x8 images, and some of its nodes."""
    values, lines, made = ["x"], [], []
    for at in range(draw(st.integers(1, 9))):
        operator = draw(st.sampled_from(OPERATORS))
        for hole in "AB":
            operator = operator.replace(f"({hole}", f"({draw(st.sampled_from(values[-3:]))}")
            operator = operator.replace(f"{hole})", f"{draw(st.sampled_from(values[-3:]))})")
        lines.append(f"v{at} = {operator}")
        values.append(f"v{at}")
        made.append(f"{operator.split()[0].split('(')[0]}_v{at}")
    ends = sorted({values[-1], *draw(st.lists(st.sampled_from(values[1:]), max_size=2))})
    outputs = ", ".join(f"float[n, 4, 8, 8] {end}" for end in ends)
    left = draw(st.lists(st.sampled_from(made), max_size=2))
    return f"{IMAGE} => ({outputs}) {{ {' '.join(lines)} }}", left


CONSTANTS: dict[str, Array | np.float32] = {
    "w": W,
    "v": V,
    "b": B,
    "low": np.float32(0),
    "high": np.float32(2),
}


@settings(max_examples=60)
@given(nets())
def test_plans_hold_together(net: tuple[str, list[str]]) -> None:
    text, left = net
    model = drawn(text, **CONSTANTS)
    ours = plan(model, left)
    assert set(ours.weighted) <= ours.inside
    assert not ours.inside & set(left)
    assert ours.made <= set(ours.held)
    assert all(ours.held[source] == source for source in ours.held.values())
    nodes = {str(node.name): node for node in model.graph}
    convolutions = [name for name in nodes if name.startswith("Conv")]
    assert list(ours.weighted) == [name for name in convolutions if name not in left]
    for name in ours.inside:  # whatever computes in 8 bits reads codes
        read = [value for value in nodes[name].inputs if value and not value.const_value]
        assert all(value.name in ours.held for value in read)
    if not ours.weighted:
        assert not ours.inside
        assert not ours.held
