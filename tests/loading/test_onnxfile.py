"""What an ONNX file takes is read off it, nothing in it is run, and what is wrong is one line."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, parser

from compressor.errors import InputError
from compressor.loading.onnxfile import Asked, asked, inputs, read
from compressor.task import Input

HEAD = '<ir_version: 10, opset_import: ["": 21]> g '


def written(path: Path, text: str, **held: Any) -> Path:
    """The graph ``(inputs) => (outputs) { nodes }`` with these constants, as a file."""
    model = parser.parse_model(HEAD + text)
    for name, value in held.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    path.write_bytes(model.SerializeToString())
    return path


def linear(path: Path, shape: str = "n,3") -> Path:
    weights = np.arange(6, dtype=np.float32).reshape(3, 2)
    return written(path, f"(float[{shape}] x) => (float y) {{ y = MatMul(x, w) }}", w=weights)


def outside(path: Path, location: str, **said: str) -> Path:
    """:func:`linear`, whose weights lie in another file (24 bytes)."""
    model = onnx.load(linear(path))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **said}.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    return path


def test_names_shapes_and_dtypes_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = written(
        tmp_path / "m.onnx",
        "(float16[batch,3,8] b, bool[n] a, uint8[?,2] c) => (float16 y) { y = Identity(b) }",
    )
    assert inputs(read(path), {}) == (
        Input("b", (3, 8), "float16"),
        Input("a", (), "bool"),
        Input("c", (2,), "uint8"),
    )


def test_constants_are_no_inputs(tmp_path: Path) -> None:
    path = written(
        tmp_path / "m.onnx",
        "(float[n,3] x, float[3,2] w) => (float y) { y = MatMul(x, w) }",
        w=np.ones((3, 2), np.float32),
    )
    found = read(path)
    assert [slot.name for slot in found.slots] == ["x"]
    assert found.listed
    assert not read(linear(tmp_path / "m.onnx")).listed


@pytest.mark.parametrize(
    ("shapes", "batch"),
    [(("n,3", "n,3"), None), (("4,3", "4,3"), 4), (("n,3", "2,3"), 2), (("", "n,3"), None)],
)
def test_the_batch_is_what_the_first_axis_says(
    tmp_path: Path, shapes: tuple[str, str], batch: int | None
) -> None:
    a, b = shapes
    text = f"(float[{a}] a, float[{b}] b) => (float y) {{ y = Add(a, b) }}"
    assert read(written(tmp_path / "m.onnx", text)).batch == batch


@pytest.mark.parametrize(
    ("nodes", "last"),
    [
        ("y = Sigmoid(x)", "Sigmoid"),
        ("s = Sigmoid(x) f = Flatten(s) y = Cast<to=11>(f)", "Sigmoid"),
        ("s = Sigmoid(x) y = Mul(s, x)", "Mul"),
        ("y = Identity(x)", ""),
    ],
)
def test_what_the_output_comes_from(tmp_path: Path, nodes: str, last: str) -> None:
    path = written(tmp_path / "m.onnx", f"(float[n,3] x) => (float y) {{ {nodes} }}")
    assert read(path).last == last


@pytest.mark.parametrize(
    ("nodes", "high"),
    [
        ("y = Gather(t, ids)", 11),
        ("c = Cast<to=7>(ids) u = Unsqueeze(c, at) y = Gather(t, u)", 11),
        ("f = DequantizeLinear(q, s) y = Gather(f, ids)", 7),
        ("a = Gather(t, ids) f = DequantizeLinear(q, s) y = Gather(f, ids)", 7),
        ("y = Gather<axis=1>(t, ids)", 2),
        ("y = Cast<to=1>(ids)", 2),
        ("one = Add(ids, ids) y = Gather(t, one)", 2),
    ],
)
def test_integers_stay_below_the_rows_of_their_table(tmp_path: Path, nodes: str, high: int) -> None:
    path = written(
        tmp_path / "m.onnx",
        f"(int64[n,5] ids) => (float y) {{ {nodes} }}",
        t=np.zeros((11, 4), np.float32),
        q=np.zeros((7, 4), np.int8),
        s=np.float32(1),
        at=np.array([1]),
    )
    (found,) = inputs(read(path), {})
    assert found.high == high
    (other,) = inputs(read(path), {"ids": Asked((5,), "int64", 3)})
    assert other.high == 3


def test_open_axes_come_from_the_command_line_or_the_data(tmp_path: Path) -> None:
    file = read(linear(tmp_path / "m.onnx", "n,rows,3"))
    with pytest.raises(InputError, match=r"x' is float32 \[n, rows, 3\].*--input x=rowsx3 with"):
        inputs(file, {})
    assert inputs(file, {"x": Asked((5, 3))}) == (Input("x", (5, 3)),)
    assert inputs(file, {}, like=[Input("input", (7, 3))]) == (Input("x", (7, 3)),)
    for wrong in (Asked((5, 4)), Asked((3,)), Asked((5, 3), "float64")):
        with pytest.raises(InputError, match="an example of --input or --data is"):
            inputs(file, {"x": wrong})
    with pytest.raises(InputError, match=r"takes 1 inputs \(x\), the data has 2"):
        inputs(file, {}, like=[Input("a", (7, 3))] * 2)


@pytest.mark.parametrize("batch", [(1,), (4,), (1, 4), (4, 1)])
def test_a_fixed_batch_axis_is_for_that_batch_alone(tmp_path: Path, batch: tuple[int, ...]) -> None:
    file = read(linear(tmp_path / "m.onnx", "1,3"))
    if batch == (1,):
        assert inputs(file, {}, batch=batch) == (Input("x", (3,)),)
    else:
        with pytest.raises(InputError, match="batches of 1 only: add --batch 1, or export"):
            inputs(file, {}, batch=batch)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("(string[n,2] x) => (string y) { y = Identity(x) }", "is of type string"),
        ("(bfloat16[n,2] x) => (bfloat16 y) { y = Identity(x) }", "is of type bfloat16"),
        ("(float x) => (float y) { y = Identity(x) }", "is a single number"),
        ("(float[] x) => (float y) { y = Identity(x) }", r"\[\?\].*--input x=SHAPE"),
        ("(seq(float[2]) x) => (seq(float[2]) y) { y = Identity(x) }", "is no tensor"),
        ("() => (float y) { y = Constant<value_float=1.0>() }", "takes no inputs"),
    ],
)
def test_what_cannot_be_fed_is_said(tmp_path: Path, given: str, said: str) -> None:
    path = written(tmp_path / "m.onnx", given)
    with pytest.raises(InputError, match=said) as error:
        inputs(read(path), {})
    assert str(path) in str(error.value)


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.text(st.characters(blacklist_characters="\n"), min_size=1, max_size=8),
        st.tuples(
            st.lists(st.integers(1, 999), max_size=4).map(tuple),
            st.sampled_from([None, "float32", "int64", "bool"]),
            st.none() | st.integers(1, 99999),
        ),
        max_size=3,
    )
)
def test_asked_reads_what_it_documents(said: dict[str, tuple[Any, Any, Any]]) -> None:
    wanted = {name: Asked(shape, dtype, high if dtype else None)
              for name, (shape, dtype, high) in said.items()}  # fmt: skip
    texts = [
        f"{name}={'x'.join(map(str, one.shape))}"
        + (f":{one.dtype}" if one.dtype else "")
        + (f"<{one.high}" if one.high else "")
        for name, one in wanted.items()
    ]
    assert asked(texts) == wanted


@pytest.mark.parametrize(
    "text", ["x", "=3", "x=3,4", "x=3x", "x=3:int64<0", "x=3<4", "x=-1", "x=3:", "x=3:int64<"]
)
def test_asked_refuses_the_rest(text: str) -> None:
    with pytest.raises(InputError, match="write NAME=SHAPE"):
        asked([text])


def test_an_input_stands_once() -> None:
    with pytest.raises(InputError, match="--input x stands twice"):
        asked(["x=3", "x=4"])


# What a file may do.


@settings(max_examples=60)
@given(st.data())
def test_a_file_that_is_cut_or_changed_is_read_or_is_one_line(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = linear(Path(folder) / "m.onnx")
        whole = bytearray(path.read_bytes())
        if data.draw(st.booleans()):
            whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
        else:
            whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(bytes(whole))
        said = str(path)
        try:
            inputs(read(path), {})
        except InputError as error:
            said = str(error)
        assert str(path) in said
        assert "\n" not in said


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("m.onnx", b"", "holds no graph"),
        ("m.onnx", b"PK\x03\x04 this is a zip", "is not ONNX or cut off"),
        ("m.pt", b"", "is no .onnx file"),
    ],
)
def test_what_is_no_onnx_is_said(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        read(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "none.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        read(tmp_path / "folder.onnx")


def test_external_data_belongs_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    weights = tmp_path / "part" / "w.bin"
    weights.write_bytes(bytes(32))
    path = outside(tmp_path / "m.onnx", "part/w.bin", offset="8", length="24")
    assert read(path).companions == (weights,)


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("/etc/passwd", "outside its folder"),
        ("../w.bin", "outside its folder"),
        ("part/../../w.bin", "outside its folder"),
        ("C:\\w.bin", "outside its folder"),
        ("..\\w.bin", "outside its folder"),
        ("", "outside its folder"),
        ("*/_ORT_MEM_ADDR_/*", "missing"),
        ("none.bin", "missing"),
        ("link.bin", "are a link"),
        ("linked/w.bin", "are a link"),
        ("short.bin", "cut off at 23 of 24 bytes"),
        ("hard.bin", "are a hard link"),
        ("pipe", "missing"),
    ],
)
def test_external_data_elsewhere_is_refused(tmp_path: Path, location: str, said: str) -> None:
    folder = tmp_path / "folder"
    (folder / "part").mkdir(parents=True)
    for name in ("w.bin", "folder/part/w.bin"):
        (tmp_path / name).write_bytes(bytes(24))
    (folder / "short.bin").write_bytes(bytes(23))
    (folder / "link.bin").symlink_to(tmp_path / "w.bin")
    (folder / "linked").symlink_to(folder / "part")
    (folder / "hard.bin").hardlink_to(tmp_path / "w.bin")
    os.mkfifo(folder / "pipe")  # reading one would wait for ever
    with pytest.raises(InputError, match=said):
        read(outside(folder / "m.onnx", location))


@pytest.mark.parametrize("said", [{"offset": "-1"}, {"length": "-5"}, {"offset": "one"}])
def test_a_broken_place_is_refused(tmp_path: Path, said: dict[str, str]) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(24))
    with pytest.raises(InputError, match="the place of 'w' is broken"):
        read(outside(tmp_path / "m.onnx", "w.bin", **said))


@pytest.mark.parametrize("length", ["23", "25", "1000000000000"])
def test_a_tensor_has_the_bytes_of_its_shape(tmp_path: Path, length: str) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(64))
    with pytest.raises(InputError, match=r"of external data, its shape asks for 24"):
        read(outside(tmp_path / "m.onnx", "w.bin", length=length))


@settings(max_examples=40)
@given(
    st.sampled_from([*range(1, 14), *range(16, 26)]),
    st.lists(st.integers(0, 5), max_size=3),
    st.booleans(),
    st.integers(-1, 1),
)
def test_tensors_in_the_file_are_held_to_their_shape(
    kind: int, shape: list[int], raw: bool, more: int
) -> None:
    """All types, however the library stores them; a last axis that is one longer is refused."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    if dtype.kind == "O":
        return
    array = np.zeros(shape, dtype)
    tensor = (
        numpy_helper.from_array(array, "w")
        if raw
        else helper.make_tensor("w", kind, shape, array.ravel())
    )
    if shape and array.size:
        tensor.dims[-1] += more * 4  # four: less is one byte of two bits each
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder) / "m.onnx", "(float[n] x) => (float y) { y = Identity(x) }")
        model = onnx.load(path)
        model.graph.initializer.append(tensor)
        path.write_bytes(model.SerializeToString())
        if array.size and shape and more > 0:
            with pytest.raises(InputError, match="its shape asks for"):
                read(path)
        elif more == 0 or not (array.size and shape):
            assert read(path).slots


def nested(depth: int) -> onnx.ModelProto:
    """An If whose branches hold an If, and so on."""
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    one = numpy_helper.from_array(np.zeros(1, np.float32), "one")
    node = helper.make_node("Constant", [], ["y"], value=one)
    for _ in range(depth):
        branch = helper.make_graph([node], "branch", [], [out])
        node = helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    given = helper.make_tensor_value_info("x", TensorProto.BOOL, ["n"])
    return helper.make_model(helper.make_graph([node], "g", [given], [out]))


def test_graphs_in_graphs_have_an_end(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(nested(3).SerializeToString())
    assert read(path).slots
    model = nested(3)
    body = model.graph
    for _ in range(3):
        body = body.node[0].attribute[0].g
    # Two branches a level are too many to write: one chain goes further down.
    for _ in range(20):
        inner = helper.make_node("If", ["x"], ["y"])
        attribute = inner.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)
        attribute.g.node.add(op_type="Identity", input=["x"], output=["y"])
        body.node.append(inner)
        body = body.node[-1].attribute[0].g
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="its graphs lie more than 16 deep in each other"):
        read(path)


def calling(calls: dict[str, list[str]], domain: str = "own") -> onnx.ModelProto:
    """A model of functions by the names of those that each calls, the first one called."""
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)]
    functions = []
    for name, inner in calls.items():
        names = ["a", *(f"v{at}" for at in range(len(inner)))]
        nodes = [
            helper.make_node(each, [names[at]], [names[at + 1]], domain=domain)
            for at, each in enumerate(inner)
        ]
        nodes.append(helper.make_node("Relu", [names[-1]], ["b"]))
        functions.append(helper.make_function(domain, name, ["a"], ["b"], nodes, opsets))
    graph = helper.make_graph(
        [helper.make_node(next(iter(calls)), ["x"], ["y"], domain=domain)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
    )
    return helper.make_model(graph, functions=functions, opset_imports=opsets)


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        ({"f": ["f"]}, "its functions call themselves"),
        ({"f": ["g"], "g": ["h"], "h": ["f"]}, "its functions call themselves"),
        ({f"f{at}": [f"f{at + 1}"] for at in range(40)} | {"f40": []}, "more than 16 deep"),
        (
            {f"f{at}": [f"f{at + 1}"] * 9 for at in range(12)} | {"f12": []},
            "are .* nodes: that cannot be meant",
        ),
    ],
)
def test_functions_have_an_end(tmp_path: Path, calls: dict[str, list[str]], said: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(calling(calls).SerializeToString())
    with pytest.raises(InputError, match=said):
        read(path)


def test_operators_are_known_or_functions_of_the_file_or_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(calling({"f": ["g"], "g": []}).SerializeToString())
    assert read(path).slots
    path.write_bytes(calling({"f": ["missing"]}).SerializeToString())
    said = "operator 'missing' of domain 'own' is neither ONNX's nor .*add --domain own if"
    with pytest.raises(InputError, match=said):
        read(path)
    assert read(path, ["own"]).slots
    text = "(float[n,3] x) => (float y) { y = com.microsoft.Gelu(x) }"
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]> g ' + text
    )
    path.write_bytes(model.SerializeToString())
    assert read(path).slots


def test_external_data_is_found_wherever_it_stands(tmp_path: Path) -> None:
    """In the branch of an If, which no list of initializers shows."""
    tensor = numpy_helper.from_array(np.zeros(2, np.float32), "hidden")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["z"], value=tensor)],
        "branch",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2])],
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.BOOL, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(InputError, match="outside its folder"):
        read(path)
