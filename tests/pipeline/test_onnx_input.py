"""An ONNX file as the model of a run: measured as it is given, quantized, and never trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, parser
from sklearn.datasets import load_digits

import compressor
from compressor import pipeline
from compressor.artifact import digest
from compressor.errors import InputError
from compressor.loading import task as tasks
from compressor.measure.counting import counted
from compressor.pipeline.entries import Runner, behaviour
from compressor.pipeline.given import TorchOnly, graph_path, original
from compressor.recipe import QUANTIZE, Step
from compressor.report import Report, problem
from compressor.stages import STAGES, form_taken
from compressor.stages.quantize.judge import Judge
from compressor.task import Input

HEAD = '<ir_version: 10, opset_import: ["": 20]> g '
NEEDS = "give the PyTorch model"


def written(path: Path, text: str, **held: Any) -> Path:
    """The graph ``(inputs) => (outputs) { nodes }`` with these constants, as a file."""
    model = parser.parse_model(HEAD + text)
    for name, value in held.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def floats(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def fitted() -> tuple[Any, Any]:
    """Random features of the digits and a ridge regression on them: a model without training."""
    x, y = load_digits(return_X_y=True)
    wide = floats(0, 64, 128) / 8
    hidden = np.maximum((x[:1200] / 16).astype(np.float32) @ wide, 0)
    squares = hidden.T @ hidden + 10 * np.eye(128)
    narrow = np.linalg.solve(squares, hidden.T @ np.eye(10)[y[:1200]])
    return wide, narrow.astype(np.float32)


BODY = "f = Flatten(x) a = MatMul(f, wide) r = Relu(a) y = MatMul(r, narrow)"


def net(path: Path, batch: str = "n", body: str = BODY, **held: Any) -> Path:
    """A network of two layers that reads the digits."""
    wide, narrow = fitted()
    text = f"(float[{batch},1,8,8] x) => (float[{batch},10] y) {{ {body} }}"
    return written(path, text, **{"wide": wide, "narrow": narrow, **held})


def ran(model: Any, out: Path, **given: Any) -> Report:
    wanted = {"data": "digits", "provider": "cpu", "threads": (1,), "out": out}
    return pipeline.run(model, **{**wanted, **given})


def by_name(report: Report) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in report.document["artifacts"]}


# A whole run.


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("onnx")
    model = net(folder / "digits.onnx")
    return ran(str(model), folder / "out", quantize="int8", max_drop=0.05, time_budget=30)


def test_the_file_is_its_own_baseline(finished: Report) -> None:
    document = finished.document
    assert problem(json.loads(json.dumps(document))) is None
    given = finished.folder.parent / "digits.onnx"
    baseline = by_name(finished)["baseline"]
    copied = finished.folder / baseline["path"]
    assert copied.read_bytes() == given.read_bytes()
    assert not copied.is_symlink()
    assert baseline["sha256"] == document["model"]["sha256"] == digest(given)
    assert (baseline["form"], baseline["source"], baseline["steps"]) == ("onnx", None, [])
    assert document["name"] == "digits"
    assert document["model"]["path"] == "digits.onnx"
    assert [row["stage"] for row in document["stages"]][:2] == ["load", "import"]


def test_what_it_costs_is_counted_in_the_graph(finished: Report) -> None:
    for one in by_name(finished).values():
        assert (one["params"], one["macs"]) == (64 * 128 + 128 * 10,) * 2
    assert not [said for said in finished.document["warnings"] if "MACs" in said]


def test_quantized_versions_are_judged_against_the_file(finished: Report) -> None:
    found = by_name(finished)
    assert set(found) == {"baseline", "int8-dynamic", "int8-static"}
    assert finished.document["task"]["kind"] == "classification"
    assert found["baseline"]["accuracy"]["accuracy"] > 0.9
    assert found["baseline"]["accuracy"]["drop"]["value"] == 0
    for name in ("int8-dynamic", "int8-static"):
        one = found[name]
        assert one["size_bytes"] < found["baseline"]["size_bytes"] / 2
        assert one["fidelity"]["top1_agreement"] > 0.95
        assert 20 < one["fidelity"]["sqnr_db"] < 80
        lost = found["baseline"]["accuracy"]["accuracy"] - one["accuracy"]["accuracy"]
        assert one["accuracy"]["drop"]["value"] == pytest.approx(lost)
        assert one["within_budget"] is (lost <= 0.05)
    assert found["baseline"]["gap"]["n"] > 0
    assert found["int8-static"]["gap"] is None


def test_the_same_again_is_shown_and_its_recipe_makes_the_same_bytes(
    finished: Report, tmp_path: Path
) -> None:
    given = finished.folder.parent / "digits.onnx"
    again = ran(given, finished.folder, quantize="int8", max_drop=0.05, time_budget=30)
    assert again.stored
    with pytest.raises(InputError, match="holds another run"):
        ran(net(tmp_path / "digits.onnx", more=1.0), finished.folder, quantize="int8")
    recipe = finished.folder / "recipe.toml"
    replayed = ran(given, tmp_path / "out", recipe=recipe)
    hashes = {name: one["sha256"] for name, one in by_name(finished).items()}
    assert {name: one["sha256"] for name, one in by_name(replayed).items()} == hashes


def test_an_interrupted_run_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    model = net(tmp_path / "m.onnx")
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ran(model, tmp_path / "out", quantize="fp16", robustness=True)
    report = ran(model, tmp_path / "out", quantize="fp16", robustness=True)
    cached = {row["artifact"]: row["cached"] for row in report.document["stages"][1:3]}
    assert cached == {"baseline": True, "fp16": True}
    # Without gradients there are no attacks, but all else.
    harder = by_name(report)["fp16"]["robustness"]
    skipped = {row["what"]: row["skipped"] for row in harder if "skipped" in row}
    assert set(skipped) == {"fgsm", "pgd"}
    assert set(skipped.values()) == {"m was given as ONNX, which has no gradients"}
    assert sum("value" in row for row in harder) > 5


@pytest.mark.parametrize("scheme", ["int4", "weights"])
def test_weights_alone_are_stored_in_few_bits(tmp_path: Path, scheme: str) -> None:
    with original(net(tmp_path / "m.onnx"), data="digits") as (task, taken):
        made = STAGES["quantize"](taken, task, tmp_path / "q", scheme=scheme, left=(), disabled=())
        assert made.size_bytes < taken.size_bytes / 1.5
        assert made.steps[-1]["facts"]["sqnr_db"] > {"int4": 10, "weights": 20}[scheme]


# What an ONNX file cannot do.

TORCH = [name for name, stage in STAGES.items() if form_taken(stage) == "torch"]


@pytest.mark.parametrize(
    "given",
    [
        {"prune": 0.5},
        {"epochs": 1},
        {"quantize": "int8-qat"},
        {"prune": "macs=0.5", "epochs": 0, "quantize": "int8"},
        {"student": lambda: torch.nn.Linear(1, 1)},
        {"arch": "a:b"},
        {"teacher": "teacher.pt", "quantize": "int8"},
        {"epochs": 1, "train": {"optimizer": "sgd"}},
    ],
)
def test_what_trains_or_cuts_needs_the_pytorch_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    """Before the file or the data is so much as opened: neither is there."""
    with pytest.raises(InputError, match=NEEDS) as caught:
        ran(tmp_path / "none.onnx", tmp_path / "out", data="arrays:none.npz", **given)
    assert "none.onnx is ONNX" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", TORCH)
def test_every_stage_of_pytorch_says_so(stage: str) -> None:
    with pytest.raises(InputError, match=f"step 'a': {stage} changes a PyTorch .*{NEEDS}"):
        graph_path(
            "model.onnx", (Step(stage, {}, "a", "baseline"),), TorchOnly(), (), (), trusted=False
        )
    assert set(TORCH) == set(STAGES) - {"quantize"}
    assert QUANTIZE  # of which all but qat are for ONNX


def test_what_is_asked_of_onnx_files_is_not_asked_of_others(tmp_path: Path) -> None:
    for given, flag in (({"inputs": ["x=3"]}, "--input"), ({"domains": ["a.b"]}, "--domain")):
        with pytest.raises(InputError, match=f"{flag} .*only ONNX files are asked"):
            ran(torch.nn.Linear(2, 2), tmp_path / "out", **given)


@pytest.mark.parametrize(
    ("text", "held", "said"),
    [
        ("(float[n,1,8,8] x) => (float y) { y = own.Custom(x) }", {}, "add --domain own if"),
        ("(float[n,1,8,8] x) => (float y) { y = MatMul(x, w) }", {"w": floats(0, 5, 2)}, "run"),
        (
            "(float[n,8,8,1] x) => (float y) { y = Flatten(x) }",
            {},
            "1x8x8: the file has channels last",
        ),
        (
            "(float[n,1,8,8] x) => (float y) { y = ReduceMean(x, zero) }",
            {"zero": [0]},
            "turns a batch of 2 into",
        ),
        ("(float[n,1,8,8] x) => (float y) { l = Log(x) y = Flatten(l) }", {}, "finite"),
    ],
)
def test_what_cannot_be_run_is_one_line_and_nothing_is_written(
    tmp_path: Path, text: str, held: dict[str, Any], said: str
) -> None:
    model = written(tmp_path / "m.onnx", text, **held)
    if "own." in text:
        proto = onnx.load(model)
        proto.opset_import.add(domain="own", version=1)
        model.write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match=said) as caught:
        ran(model, tmp_path / "out", quantize="int8")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# Files that take another form.


def as_given(path: Path, x: Any) -> Any:
    """What the file itself answers, one example at a time."""
    session = onnxruntime.InferenceSession(str(path))
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: x[at : at + 1]})[0] for at in range(len(x))])


IMAGES = floats(3, 9, 1, 8, 8)


@pytest.mark.parametrize(
    "body",
    [
        BODY,
        BODY.replace("Flatten(x)", "Reshape(x, to)"),
        BODY.replace("Flatten(x)", "Reshape(x, free)"),
        BODY.replace("f = Flatten(x)", "t = Constant<value = int64[2] {1, 64}>() f=Reshape(x, t)"),
        BODY.replace("f = Flatten(x)", "h = Reshape(x, rows) f = Reshape(h, to)"),
    ],
)
def test_a_fixed_batch_is_opened(tmp_path: Path, body: str) -> None:
    shapes = {"to": [1, 64], "free": [1, -1], "rows": [1, 8, 8]}
    model = net(tmp_path / "m.onnx", "1", body, **shapes)
    before = model.read_bytes()
    with original(model, data="digits") as (task, taken):
        assert taken.path != model
        assert taken.steps[0]["stage"] == "import"
        assert taken.steps[0]["facts"]["changes"] == ["the batch axis was opened"]
        assert set(taken.steps[0]["facts"]["parity"]) == {"1", "2", "7"}
        (got,) = onnxruntime.InferenceSession(str(taken.path)).run(None, {"x": IMAGES})
        np.testing.assert_allclose(got, as_given(model, IMAGES), rtol=1e-5, atol=1e-5)
        assert task.inputs == (Input("x", (1, 8, 8)),)
    assert model.read_bytes() == before
    assert not taken.path.exists()


def test_a_batch_that_the_graph_depends_on_is_refused(tmp_path: Path) -> None:
    cases = {
        # Such as the class token of a transformer, which is there once.
        "f = Flatten(x) c = Concat<axis=1>(f, one) y = MatMul(c, v)": "Concat",
        # A mean over the batch.
        "f = Flatten(x) m = ReduceMean(f, zero) d = Add(f, m) y = MatMul(d, u)": "outputs differ",
    }
    held = {"one": floats(0, 1, 3), "v": floats(1, 67, 10), "u": floats(2, 64, 10), "zero": [0]}
    for body, said in cases.items():
        model = net(tmp_path / "m.onnx", "1", body, **held)
        with pytest.raises(InputError, match=said) as caught, original(model, data="digits"):
            pass
        assert "takes batches of 1 only, and its graph depends on that" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_baseline_that_was_changed_says_so(tmp_path: Path) -> None:
    model = net(tmp_path / "m.onnx", "1")
    report = ran(model, tmp_path / "out")
    (said,) = report.document["warnings"]
    assert said == "baseline is not the file byte for byte: the batch axis was opened"
    assert by_name(report)["baseline"]["sha256"] != digest(model)
    assert report.document["model"]["sha256"] == digest(model)


def external(path: Path) -> Path:
    """:func:`net` whose weights lie in ``part/weights.bin``."""
    model = onnx.load(net(path))
    (path.parent / "part").mkdir()
    whole = b""
    for tensor in model.graph.initializer:
        place = {
            "location": "part/weights.bin",
            "offset": len(whole),
            "length": len(tensor.raw_data),
        }
        whole += tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())
    (path.parent / "part" / "weights.bin").write_bytes(whole)
    return path


def test_weights_beside_the_file_are_taken_into_it(tmp_path: Path) -> None:
    """Under another name: one that the file chooses could be any file's of the run's folder."""
    model = external(tmp_path / "m.onnx")
    with original(model, data="digits") as (task, taken):
        assert taken.steps[0]["facts"]["changes"] == ["weights were taken into the file"]
        assert taken.companions == ()
        assert [file.name for file in taken.path.parent.iterdir()] == ["m.onnx"]
        (got,) = onnxruntime.InferenceSession(str(taken.path)).run(None, {"x": IMAGES})
        np.testing.assert_allclose(got, as_given(model, IMAGES), rtol=1e-5, atol=1e-5)
        assert counted(model, task.inputs) == counted(taken.path, task.inputs)
        assert counted(model, task.inputs).macs == 64 * 128 + 128 * 10


def test_weights_elsewhere_are_not_read(tmp_path: Path) -> None:
    model = external(tmp_path / "m.onnx")
    weights = tmp_path / "part" / "weights.bin"
    weights.rename(tmp_path / "moved.bin")
    weights.symlink_to(tmp_path / "moved.bin")
    with pytest.raises(InputError, match="are a link"):
        ran(model, tmp_path / "out", quantize="int8")
    weights.unlink()
    weights.hardlink_to(tmp_path / "moved.bin")
    with pytest.raises(InputError, match="are a hard link"):
        ran(model, tmp_path / "out", quantize="int8")
    assert not (tmp_path / "out").exists()


def test_constants_that_old_files_list_as_inputs_are_quantized(tmp_path: Path) -> None:
    model = onnx.load(net(tmp_path / "m.onnx"))
    for tensor in model.graph.initializer:
        model.graph.input.append(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    model.ir_version = 3
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with original(tmp_path / "m.onnx", data="digits") as (task, taken):
        assert [one.name for one in task.inputs] == ["x"]
        made = STAGES["quantize"](taken, task, tmp_path / "q", scheme="dynamic", left=(), repair=())
        assert made.size_bytes < taken.size_bytes / 2
        (got,) = onnxruntime.InferenceSession(str(taken.path)).run(None, {"x": IMAGES})
        np.testing.assert_allclose(got, as_given(net(tmp_path / "n.onnx"), IMAGES), rtol=1e-5)


# What it takes and gives.


def test_tokens_of_several_inputs_with_open_axes(tmp_path: Path) -> None:
    model = written(
        tmp_path / "m.onnx",
        "(int64[n,length] ids, int64[n,length] mask) => (float y, float h) "
        "{ e = Gather(t, ids) m = Cast<to=1>(mask) u = Unsqueeze(m, last) w = Mul(e, u) "
        "h = MatMul(w, a) s = ReduceSum<keepdims=0>(h, one) y = MatMul(s, b) }",
        t=floats(0, 50, 64),
        a=floats(1, 64, 64),
        b=floats(2, 64, 3),
        last=[2],
        one=[1],
    )
    with pytest.raises(InputError, match="add --input ids=length with numbers"):
        ran(model, tmp_path / "out", data=None)
    with pytest.raises(InputError, match="--input idz: no file has such an input"):
        ran(model, tmp_path / "out", data=None, inputs=["idz=7"])
    both = ["ids=7", "mask=7"]
    report = ran(
        model,
        tmp_path / "out",
        data=None,
        inputs=both,
        quantize="int8-dynamic",
        provider=("cpu", "torch"),
    )
    assert report.document["inputs"] == [
        {"name": "ids", "shape": [7], "dtype": "int64", "high": 50},
        {"name": "mask", "shape": [7], "dtype": "int64", "high": 2},
    ]
    baseline = by_name(report)["baseline"]
    assert baseline["macs"] == 7 * 64 * 64 + 64 * 3
    made = by_name(report)["int8-dynamic"]
    assert made["accuracy"] == {"skipped": "no data"}
    assert made["fidelity"]["n"] > 0
    skipped = {row.get("skipped") for row in report.document["measurements"]}
    assert skipped == {None, "it has no PyTorch form: it was made from ONNX"}
    # The data says how long they are.
    ids, mask = np.arange(300).reshape(60, 5) % 50, np.ones((60, 5), np.int64)
    given = ((ids, mask), np.arange(60) % 3)
    with original(model, data=given) as (task, _):
        assert [(one.shape, one.name) for one in task.inputs] == [((5,), "ids"), ((5,), "mask")]
        assert task.kind == "classification"


@pytest.mark.parametrize("dtype", ["float16", "double", "int32"])
def test_numbers_are_given_in_the_types_that_the_file_takes(tmp_path: Path, dtype: str) -> None:
    kind = {"float16": "float16", "double": "float64", "int32": "int32"}[dtype]
    text = f"({dtype}[n,8] x) => ({dtype}[n,3] y) {{ y = MatMul(x, w) }}"
    w = np.asarray(floats(0, 8, 3) * 4, dtype=kind)
    model = written(tmp_path / "m.onnx", text, w=w)
    x = np.full((100, 8), 1, np.int64 if kind == "int32" else np.float32)
    y = np.arange(100) % 3
    with original(model, data=(x, y)) as (task, _):
        assert task.inputs == (Input("x", (8,), kind, task.inputs[0].high),)
        assert task.splits is not None
        (got,), _ = task.splits.test.head(3)
        assert got.dtype == kind
    if kind != "float64":
        x[-1] = 1 << 40 if kind == "int32" else 1e6
        x[:] = x[-1]
        said = f"takes {kind}, which the data's numbers do not fit"
        with pytest.raises(InputError, match=said), original(model, data=(x, y)):
            pass


KINDS = [
    (floats(1, 8, 3), np.arange(120) % 3, "classification"),
    (floats(1, 8, 1), np.arange(120) % 2, "binary"),
    (floats(1, 8, 3), (np.arange(360) % 2).reshape(120, 3), "multilabel"),
    (floats(1, 8, 3), floats(2, 120, 3), "regression"),
    (floats(1, 8, 1), floats(2, 120, 1), "regression"),
]


@pytest.mark.parametrize(("weights", "targets", "kind"), KINDS)
def test_kinds_are_told_apart_as_of_a_pytorch_model(
    tmp_path: Path, weights: Any, targets: Any, kind: str
) -> None:
    layer = torch.nn.Linear(8, weights.shape[1], bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weights.T.copy()))
    text = f"(float[n,8] x) => (float[n,{weights.shape[1]}] y) {{ y = MatMul(x, w) }}"
    model = written(tmp_path / "m.onnx", text, w=weights)
    given = (floats(0, 120, 8), targets)
    theirs = tasks(layer, data=given)
    with original(model, data=given) as (ours, _):
        assert ours.kind == theirs.kind == kind
        assert (ours.metric, ours.labelled) == (theirs.metric, theirs.labelled)
        x = torch.from_numpy(given[0])
        with torch.inference_mode():
            np.testing.assert_allclose(ours.model()(x), theirs.model()(x), rtol=1e-4, atol=1e-4)
    if kind in ("binary", "multilabel"):
        text = text.replace("y = MatMul(x, w)", "a = MatMul(x, w) y = Sigmoid(a)")
        sigmoid = written(tmp_path / "s.onnx", text, w=weights)
        with (
            pytest.raises(
                InputError, match=r"ends in a Sigmoid, and .* told from logits|as after a sigmoid"
            ),
            original(sigmoid, data=given),
        ):
            pass


def test_the_judge_counts_from_the_file(tmp_path: Path) -> None:
    from compressor.stages import graph

    model = net(tmp_path / "m.onnx")
    with original(model, data="digits") as (task, taken):
        source = graph.read(taken.path)
        judge = Judge(source, task, [task.examples(4)])
        assert judge.drop(source) == 0
        wide, narrow = fitted()
        wrong = graph.read(net(tmp_path / "w.onnx", wide=-wide, narrow=narrow))
        lost = judge.drop(wrong)
        assert lost is not None
        assert lost > 0.3


def test_labels_may_be_the_files_own_answers(tmp_path: Path) -> None:
    x = floats(4, 60, 1, 8, 8)
    model = net(tmp_path / "m.onnx")
    with original(model, data={"x": x}) as (task, _):
        assert not task.labelled
        assert task.splits is not None
        (inputs,), targets = task.splits.test.head(5)
        assert np.array_equal(targets, as_given(model, inputs).argmax(1))


# The module that answers for a file.


def test_a_runner_answers_many_times_with_one_process(tmp_path: Path) -> None:
    model = net(tmp_path / "m.onnx")
    runner = Runner(model, 4)
    x = torch.from_numpy(IMAGES)
    first, second = runner(x), runner(x[:3])
    pid = runner._worker.pid if runner._worker else 0
    assert torch.equal(runner(x), first)
    assert runner._worker is not None
    assert runner._worker.pid == pid
    np.testing.assert_allclose(first, as_given(model, IMAGES), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(second, first[:3], rtol=1e-5, atol=1e-5)


def test_a_runner_outlives_its_process(tmp_path: Path) -> None:
    import os
    import signal

    runner = Runner(net(tmp_path / "m.onnx"), 4)
    x = torch.from_numpy(IMAGES)
    first = runner(x)
    assert runner._worker is not None
    os.kill(runner._worker.pid, signal.SIGKILL)
    with pytest.raises(compressor.CompressorError, match="killed"):
        runner(x)
    assert torch.equal(runner(x), first)


def test_what_a_model_does_is_told_apart(tmp_path: Path) -> None:
    layers = [torch.nn.Linear(8, 2), torch.nn.Linear(8, 2)]
    given = (floats(0, 60, 8), np.arange(60) % 2)
    one, other = (behaviour(tasks(layer, data=given)) for layer in layers)
    assert one != other
    assert one == behaviour(tasks(layers[0], data=given))
