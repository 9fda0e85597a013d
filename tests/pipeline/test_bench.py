"""Files side by side: each is a row with figures or with its reason, and none is changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper, parser

import compressor
from compressor.artifact import digest
from compressor.errors import InputError
from compressor.measure.turns import CONTROL
from compressor.pipeline.bench import bench
from compressor.pipeline.entries import Runner, named
from compressor.report import Report, problem
from compressor.report.table import operators, primary

HEAD = '<ir_version: 10, opset_import: ["": 20]> g '
ROWS = np.random.default_rng(0).standard_normal((120, 8)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).standard_normal((8, 3)).astype(np.float32)
LINEAR = "(float[n,8] x) => (float[n,3] y) { y = MatMul(x, w) }"


def written(path: Path, text: str, **held: Any) -> Path:
    model = parser.parse_model(HEAD + text)
    for name, value in held.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def linear(path: Path, weights: Any = WEIGHTS, text: str = LINEAR) -> Path:
    return written(path, text, w=weights)


def slow(path: Path) -> Path:
    """:func:`linear` after many products that change nothing: slower beyond any noise."""
    chain = " ".join(f"a{at + 1} = MatMul(a{at}, e)" for at in range(100))
    nodes = f"a0 = MatMul(x, wide) {chain} b = MatMul(a100, narrow) y = MatMul(b, w)"
    held: dict[str, Any] = {
        "e": np.eye(64),
        "wide": np.eye(8, 64),
        "narrow": np.eye(64, 8),
        "w": WEIGHTS,
    }
    return written(
        path,
        f"(float[n,8] x) => (float[n,3] y) {{ {nodes} }}",
        **{name: array.astype(np.float32) for name, array in held.items()},
    )


def external(path: Path) -> Path:
    """:func:`linear` whose weights lie in ``weights.bin`` beside it."""
    model = onnx.load(linear(path))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    path.write_bytes(model.SerializeToString())
    (path.parent / "weights.bin").write_bytes(WEIGHTS.tobytes())
    return path


def here(models: Any, out: Path, **settings: Any) -> Report:
    """On one thread of the CPU."""
    return bench(models, out=out, provider="cpu", threads=(1,), **settings)


def reasons(report: Report) -> dict[str, str]:
    rows = report.document["measurements"]
    return {row["artifact"]: row["skipped"] for row in rows if "skipped" in row}


def by_name(report: Report) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in report.document["artifacts"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good models, and five that are not."""
    at = tmp_path_factory.mktemp("bench")
    slow(at / "slow.onnx")
    linear(at / "same.onnx")
    linear(at / "other.onnx", WEIGHTS[:, :2], LINEAR.replace("n,3", "n,2"))
    linear(at / "nan.onnx", text="(float[n,8] x) => (float[n,3] y) { h = MatMul(x, w) "
           "z = Sub(h, h) y = Div(z, z) }")  # fmt: skip
    linear(at / "two.onnx", text="(float[n,8] x, float[n,8] z) => (float[n,3] y) "
           "{ s = Add(x, z) y = MatMul(s, w) }")  # fmt: skip
    linear(at / "open.onnx", text=LINEAR.replace("n,8", "n,width"))
    # A petabyte is more than any address space holds.
    linear(at / "huge.onnx", text="(float[n,8] x) => (float[n,3] y) { h = MatMul(x, w) "
           "s = Shape(x) z = Constant<value_ints=[16777216, 16777216]>() m = Mul(s, z) "
           "f = ConstantOfShape(m) r = ReduceSum<keepdims=0>(f) y = Add(h, r) }")  # fmt: skip
    whole = (at / "slow.onnx").read_bytes()
    (at / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    return at


ALL = ("slow", "same", "other", "nan", "huge", "two", "open", "cut")


@pytest.fixture(scope="module")
def ran(folder: Path) -> Report:
    models = [folder / f"{name}.onnx" for name in ALL]
    return here(models, folder / "out", command="compressor bench")


def test_what_fails_is_a_row_with_the_reason_and_the_others_are_finished(ran: Report) -> None:
    document = ran.document
    assert problem(json.loads(json.dumps(document))) is None
    assert {row["artifact"] for row in document["measurements"]} == set(ALL)
    assert set(reasons(ran)) == set(document["failed"]) == {"nan", "huge", "two", "open", "cut"}
    said = reasons(ran)
    assert said["nan"] == "the model's output is not finite (NaN or infinity)"
    assert "allocate" in said["huge"]
    assert said["two"] == "it takes x float32 8, z float32 8; slow takes x float32 8"
    assert "add --input x=width with numbers" in said["open"]
    assert said["cut"].startswith("cut.onnx is not ONNX or cut off")
    assert ran.folder.joinpath("report.md").is_file()


def test_the_first_is_what_the_others_are_compared_with(ran: Report) -> None:
    rows = {row["artifact"]: row for row in ran.document["measurements"]}
    assert rows["slow"]["speedup"]["value"] == 1.0
    assert {rows[name]["speedup"]["versus"] for name in ("same", "other")} == {"slow"}
    assert rows["same"]["speedup"]["verdict"] == "faster"
    assert ran.document["environment"]["noise_floor"]["n"] > 0
    sentence = ran.document["recommendation"]
    assert "is the fastest on cpu, batch 1, 1 thread" in sentence
    assert "faster than slow; nothing was judged: there is no data (add --data SPEC)" in sentence


def test_what_nobody_judged_is_not_recommended(ran: Report) -> None:
    assert not any(one["best"] for one in ran.document["artifacts"])
    assert ran.document["best"] is None
    assert ran.best == "slow"
    (header, *_) = operators(ran.document, primary(ran.document)).splitlines()
    assert header.split("|")[2].strip() == "slow nodes"
    assert header.split("|")[4].strip() in ("same nodes", "other nodes")


def test_what_one_example_is_stands_in_the_report(ran: Report) -> None:
    assert ran.document["inputs"] == [{"name": "x", "shape": [8], "dtype": "float32", "high": 2}]


def test_outputs_are_compared_where_their_shapes_agree(ran: Report) -> None:
    found = by_name(ran)
    assert found["same"]["fidelity"]["n"] > 0
    assert found["same"]["fidelity"]["max_abs_diff"] < 1e-5
    assert found["other"]["fidelity"] is None
    why = "there is no data (add --data SPEC)"
    assert all(one["accuracy"] == {"skipped": why} for one in found.values())
    assert ran.document["warnings"] == [
        f"no accuracy was measured, fidelity is on made-up inputs: {why}"
    ]
    assert found["same"]["params"] == WEIGHTS.size


def test_a_file_is_copied_byte_for_byte(folder: Path, ran: Report) -> None:
    for name, one in by_name(ran).items():
        path = ran.folder / one["path"]
        assert not path.is_symlink()
        assert one["sha256"] == digest(path) == digest(folder / f"{name}.onnx")


def test_the_same_again_is_shown_and_anything_else_refused(folder: Path, ran: Report) -> None:
    models = [folder / f"{name}.onnx" for name in ALL]
    again = here(models, ran.folder)
    assert again.stored
    assert again.document == ran.document
    for other in ({"seed": 1}, {"batch": (2,)}, {"metric": "top5"}):
        with pytest.raises(InputError, match="holds another run"):
            here(models, ran.folder, **other)
    with pytest.raises(InputError, match="holds another run"):
        here(models[:2], ran.folder)


def test_a_reference_that_fails_leaves_the_others_their_rows(folder: Path, tmp_path: Path) -> None:
    report = here([folder / "cut.onnx", folder / "same.onnx"], tmp_path / "out")
    row = next(row for row in report.document["measurements"] if row["artifact"] == "same")
    assert row["latency_ms"]["n"] > 0
    assert row["speedup"] is None
    assert report.document["recommendation"].startswith("Nothing was compared: cut was not")
    assert [one["best"] for one in report.document["artifacts"]] == [False]
    assert (report.document["best"], report.best) == (None, "same")
    assert report.document["failed"] == ["cut"]


def test_where_nothing_can_be_measured_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    for models, said in {
        ("cut",): "cut.onnx is not ONNX",
        ("open", "cut"): "add --input x=width",
        ("none", "same"): "none.onnx does not exist",
        (): "there is no file to measure",
    }.items():
        with pytest.raises(InputError, match=said):
            here([folder / f"{name}.onnx" for name in models], tmp_path / "out")
    with pytest.raises(InputError, match="--input y: no file has such an input; known: x"):
        here([folder / "same.onnx"], tmp_path / "out", inputs=["y=8"])
    with pytest.raises(InputError, match="--bench-time 'long'"):
        here([folder / "same.onnx"], tmp_path / "out", bench_time="long")
    assert not (tmp_path / "out").exists()


def test_two_files_may_keep_their_weights_under_one_name(folder: Path, tmp_path: Path) -> None:
    models = [external(linear(tmp_path / at / "model.onnx")) for at in ("a", "b")]
    report = here([*models, folder / "open.onnx"], tmp_path / "out", inputs=["x=8"])
    assert not reasons(report)  # the open axis was given
    names = [one["name"] for one in report.document["artifacts"]]
    assert names == ["a-model", "b-model", "open"]
    for one, model in zip(report.document["artifacts"][:2], models, strict=True):
        path = report.folder / one["path"]
        assert one["sha256"] == digest(model, model.parent / "weights.bin")
        assert (path.parent / "weights.bin").read_bytes() == WEIGHTS.tobytes()
        (got,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": ROWS})
        np.testing.assert_allclose(got, ROWS @ WEIGHTS, rtol=1e-5, atol=1e-5)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Rows whose class is what :func:`linear` says, but for every tenth."""
    labels = (ROWS @ WEIGHTS).argmax(axis=1)
    labels[::10] = (labels[::10] + 1) % 3
    np.savez(tmp_path / "rows.npz", x=ROWS, y=labels)
    return f"arrays:{tmp_path / 'rows.npz'}"


def test_with_data_accuracy_is_judged_against_the_first(
    folder: Path, tmp_path: Path, data: str
) -> None:
    linear(tmp_path / "wrong.onnx", -WEIGHTS)
    models = [folder / "slow.onnx", folder / "same.onnx", tmp_path / "wrong.onnx"]
    report = here(
        [*models, folder / "other.onnx", folder / "open.onnx"], tmp_path / "out", data=data
    )
    found, count = by_name(report), report.document["task"]["splits"]["test"]
    assert report.document["task"]["kind"] == "classification"
    assert found["slow"]["accuracy"]["drop"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["same"]["accuracy"]["drop"]["value"] == 0.0
    assert found["same"]["accuracy"]["n"] == count
    assert found["same"]["accuracy"]["accuracy"] > 0.7 > found["wrong"]["accuracy"]["accuracy"]
    assert not found["wrong"]["within_budget"]
    assert found["other"]["accuracy"] == {"skipped": "its outputs have another shape"}
    assert "open" not in reasons(report)  # the data says how wide its input is
    best = report.best
    assert best in ("same", "open")
    assert [name for name, one in found.items() if one["best"]] == [report.document["best"]]
    sentence = report.document["recommendation"]
    assert sentence.startswith(f"{best} is recommended: ")
    assert "faster than slow, for a drop in accuracy of 0.0000" in sentence


def test_where_no_file_runs_on_the_data_nothing_asks_for_data(
    folder: Path, tmp_path: Path, data: str
) -> None:
    models = [folder / "nan.onnx", folder / "huge.onnx"]
    report = here(models, tmp_path / "out", data=data)
    assert set(reasons(report)) == {"nan", "huge"}
    why = "no file ran on the first examples of the data"
    assert all(one["accuracy"] == {"skipped": why} for one in by_name(report).values())
    assert report.document["warnings"][0].endswith(f": {why}")
    assert "--data" not in report.markdown()


def test_a_file_of_whole_batches_is_judged_on_every_example(
    folder: Path, tmp_path: Path, data: str
) -> None:
    """As a file that takes any number is, though no split has a multiple of 7."""
    seven = linear(tmp_path / "seven.onnx", text=LINEAR.replace("n,", "7,"))
    assert Runner(seven, 7)(torch.from_numpy(ROWS[:2])).shape == (2, 3)
    report = here([seven, folder / "same.onnx"], tmp_path / "out", data=data, batch=(7,))
    found, sizes = by_name(report), report.document["task"]["splits"]
    assert not reasons(report)
    assert all(count % 7 for count in (sizes["validate"], sizes["test"]))
    assert found["seven"]["accuracy"]["n"] == sizes["test"]
    assert found["seven"]["accuracy"]["accuracy"] == found["same"]["accuracy"]["accuracy"]
    assert found["same"]["fidelity"]["max_abs_diff"] < 1e-5


def test_data_that_no_file_can_take_is_refused(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=ROWS[:, :5], y=np.zeros(len(ROWS)))
    said = "same.onnx: input 'x' is float32 .n, 8.; an example of --input or --data is float32 5"
    with pytest.raises(InputError, match=said):
        here([folder / "same.onnx"], tmp_path / "out", data=f"arrays:{tmp_path / 'd.npz'}")


def test_a_torch_model_is_exported_and_stands_beside_its_onnx(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))

    def build() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))

    path = compressor.save(net, tmp_path / "net.pt", factory="a:b", inputs=torch.zeros(2, 8))
    linear(tmp_path / "net.onnx")
    report = here([path, tmp_path / "net.onnx"], tmp_path / "out", arch=build)
    assert not reasons(report)
    first, second = report.document["artifacts"]
    assert (first["name"], second["name"]) == ("net.pt", "net.onnx")
    assert [step["stage"] for step in first["steps"]] == ["export"]
    assert first["source"] == "artifacts/net.pt.safetensors"
    assert (first["params"], first["macs"]) == (8 * 4 + 4 + 4 * 3 + 3, 8 * 4 + 4 * 3)
    (got,) = onnxruntime.InferenceSession(str(report.folder / first["path"])).run(
        None, {"input": ROWS}
    )
    with torch.inference_mode():
        np.testing.assert_allclose(got, net(torch.from_numpy(ROWS)), rtol=1e-5, atol=1e-5)
    assert second["fidelity"]["max_abs_diff"] > 0
    assert second["steps"] == []


# Names.

PATHS = st.lists(
    st.builds(
        lambda folders, stem, suffix: Path("/", *folders, stem + suffix),
        st.lists(st.sampled_from("ab"), max_size=2),
        st.sampled_from(["m", "a-m", "m-2", "m.onnx", CONTROL]),
        st.sampled_from([".onnx", ".pt"]),
    ),
    max_size=6,
)


@settings(max_examples=50)
@given(PATHS)
def test_no_two_files_have_one_name(paths: list[Path]) -> None:
    names, stems = named(paths), [path.stem for path in paths]
    assert len(set(names)) == len(paths)
    assert all(stem in name for name, stem in zip(names, stems, strict=True))
    assert CONTROL not in names
    if len(set(stems)) == len(stems) and CONTROL not in stems:
        assert names == stems


def test_names_tell_files_apart_by_as_little_as_it_takes() -> None:
    given = {
        ("x/m.onnx", "x/n.onnx"): ["m", "n"],
        ("x/m.onnx", "y/m.onnx"): ["x-m", "y-m"],
        ("x/m.onnx", "x/m.pt"): ["m.onnx", "m.pt"],
        ("x/m.onnx", "x/m.onnx"): ["m", "m-2"],
        ("x/m.onnx", f"x/{CONTROL}.onnx"): ["m", f"{CONTROL}-2"],
    }
    for paths, names in given.items():
        assert named([Path(path) for path in paths]) == names
