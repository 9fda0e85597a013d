"""Robustness rows: real models end to end, and whatever fails is a row with its reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from compressor.artifact import Artifact
from compressor.loading import task as tasks
from compressor.loading import torchfile
from compressor.measure import threads
from compressor.measure.corruptions import ATTACKS, CORRUPTIONS, EPS, Scale, corrupted
from compressor.measure.process import WorkerFailed
from compressor.measure.statistics import drop
from compressor.pipeline import robustness as robust
from compressor.pipeline.robustness import CONDITIONS, NO_DATA, SEVERITIES, Row, robustness
from compressor.stages.export import export
from compressor.stages.quantize import quantize
from compressor.task import Array, Input, Kind, Split, Splits, Task

DRAWN = np.random.default_rng(0)
PICTURES = DRAWN.random((60, 1, 6, 6)).astype(np.float32)
TABLE = DRAWN.standard_normal((60, 4)).astype(np.float32)
TOKENS = DRAWN.integers(0, 9, (60, 4))
LABELS = DRAWN.integers(0, 3, 60)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads.one_thread():
        yield


def split(inputs: Array, targets: Array = LABELS) -> Split:
    return Split.arrays(inputs, targets)


def task(
    inputs: Array = PICTURES,
    targets: Array = LABELS,
    model: Callable[[], nn.Module] = nn.Identity,
    kind: Kind = "classification",
    **fields: Any,
) -> Task:
    whole = split(inputs, targets)
    return Task(
        name="t",
        kind=kind,
        model=model,
        source={"factory": "test", "arguments": {}},
        inputs=(Input("x", inputs.shape[1:], str(inputs.dtype), 9),),
        metric=fields.pop("metric", "accuracy"),
        splits=Splits(whole, whole, whole, whole),
        **fields,
    )


class Net(nn.Module):
    """A small model whose three logits depend on every input; ``broken`` says how it fails."""

    def __init__(self, size: int, broken: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.broken = nn.Linear(size, 3), broken

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        if self.broken == "bright":  # beyond the largest mean of a clean picture there is no root
            limit = float(PICTURES.mean(axis=(1, 2, 3)).max()) + 0.01
            flat = flat * (limit - flat.mean(dim=1, keepdim=True)).sqrt()
        if self.broken == "raises" and x.requires_grad:
            raise ValueError("out of\n luck")
        return self.head(flat.detach() if self.broken == "detached" else flat)


class Made(NamedTuple):
    task: Task
    torch: Artifact
    onnx: Artifact


def made(folder: Path, broken: str = "") -> Made:
    given = task(model=lambda: Net(36, broken).eval())
    path = folder / f"baseline{torchfile.SUFFIX}"
    torchfile.write(path, given.model(), given.source)
    source = Artifact.of(path, "torch")
    return Made(given, source, export(source, given, folder / "baseline"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Made:
    with threads.one_thread():
        return made(tmp_path_factory.mktemp("small"))


def by(rows: list[Row]) -> dict[tuple[str, int | None], Row]:
    """What was done and how severely, to the one row of it."""
    found = {(row["what"], row["severity"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def reasons(rows: list[Row]) -> dict[tuple[str, int | None], str]:
    return {key: row["skipped"] for key, row in by(rows).items() if "skipped" in row}


# --- real models ---


@pytest.fixture(scope="module")
def digits(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, Any, Any]:
    """The CNN on digits: its task, its artifacts (float, the same again, 8 bits), its rows."""
    folder = tmp_path_factory.mktemp("robust")
    with threads.one_thread():
        given = tasks(trained)
        path = folder / f"baseline{torchfile.SUFFIX}"
        torchfile.write(path, given.model(), given.source)
        source = Artifact.of(path, "torch")
        onnx = export(source, given, folder / "baseline")
        narrow = quantize(onnx, given, folder / "int8", scheme="static")
        artifacts = {"baseline": onnx, "again": replace(onnx, name="again"), "int8": narrow}
        return given, artifacts, robustness(given, artifacts, lambda name: source, examples=200)


def test_every_condition_has_its_row(digits: tuple[Task, Any, Any]) -> None:
    _, _, found = digits
    json.dumps(found, allow_nan=False)
    means = {(what, None) for what in CORRUPTIONS}
    for rows in found.values():
        assert reasons(rows) == {}
        assert set(by(rows)) == set(map(tuple, CONDITIONS)) | means
        assert rows[0]["what"] == "clean"
        for row in rows:
            assert set(row) == {"what", "severity", "how", "metric", "value", "drop", "n"}
            assert (row["metric"], row["n"]) == ("accuracy", 200)
            assert row["drop"]["low"] <= row["drop"]["value"] <= row["drop"]["high"]
            assert (row["how"] is None) == (row["what"] not in ATTACKS)
    ways = {name: {row["how"] for row in rows} - {None} for name, rows in found.items()}
    assert ways == {"baseline": {"white-box"}, "again": {"white-box"}, "int8": {"transfer"}}


def test_the_same_artifact_sees_the_same_inputs(digits: tuple[Task, Any, Any]) -> None:
    _, _, found = digits
    same = [[{**row, "drop": None} for row in found[name]] for name in ("baseline", "again")]
    assert same[0] == same[1]
    assert all(row["drop"]["value"] == 0 < row["drop"]["high"] for row in found["again"])
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0}
    assert all(row["drop"] == nothing for row in found["baseline"])


def run(artifact: Artifact, images: Array) -> Array:
    session = onnxruntime.InferenceSession(artifact.path, providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    return np.asarray([session.run(None, {name: image[None]})[0][0] for image in images])


def test_rows_are_what_the_files_answer(digits: tuple[Task, Any, Any]) -> None:
    given, artifacts, found = digits
    assert given.splits is not None
    drawn = np.sort(np.random.default_rng(0).permutation(len(given.splits.test))[:200])
    (images,), labels = given.splits.test.take(drawn).head(200)
    for what, severity in (("clean", None), ("noise", 5), ("contrast", 3)):
        inputs = corrupted((images,), what, severity, 0)[0] if severity else images
        right = {
            name: (run(artifacts[name], inputs).argmax(1) == labels).astype(float)
            for name in ("baseline", "int8")
        }
        row = by(found["int8"])[what, severity]
        assert row["value"] == right["int8"].mean()
        assert row["drop"] == drop(right["baseline"], right["int8"], higher_is_better=True)


def test_corruptions_and_attacks_hurt(digits: tuple[Task, Any, Any]) -> None:
    _, _, found = digits
    for rows in map(by, found.values()):
        clean = rows["clean", None]["value"]
        assert all(rows[what, None]["value"] < clean for what in (*CORRUPTIONS, *ATTACKS))
        for what in CORRUPTIONS:
            every = [rows[what, severity]["value"] for severity in SEVERITIES]
            assert rows[what, None]["value"] == pytest.approx(np.mean(every))


def test_the_mean_has_a_narrower_interval_than_its_parts(digits: tuple[Task, Any, Any]) -> None:
    _, _, found = digits
    rows = by(found["int8"])

    def width(row: Row) -> float:
        return float(row["drop"]["high"] - row["drop"]["low"])

    for what in CORRUPTIONS:
        assert width(rows[what, None]) <= max(width(rows[what, one]) for one in SEVERITIES)


def test_attacks_are_made_on_the_models_own_gradient(small: Made) -> None:
    given, source, onnx = small
    rows = by(robustness(given, {"baseline": onnx}, lambda name: source)["baseline"])
    model, images = given.model(), torch.from_numpy(PICTURES).requires_grad_()
    loss = nn.functional.cross_entropy(model(images), torch.from_numpy(LABELS))
    (gradient,) = torch.autograd.grad(loss, images)
    scale = Scale.of(PICTURES)
    moved = PICTURES + EPS * (scale.high - scale.low) * gradient.sign().numpy()
    right = model(torch.from_numpy(moved.clip(scale.low, scale.high))).argmax(1).numpy() == LABELS
    assert rows["fgsm", None]["value"] == right.mean()
    assert rows["fgsm", None]["value"] < rows["clean", None]["value"]


def test_seed_and_examples(small: Made) -> None:
    given, source, onnx = small
    asked: list[int] = []

    def fetch(at: Any) -> Any:
        asked.extend(at.tolist())
        return (PICTURES[at],), LABELS[at]

    assert given.splits is not None
    counted = Split(fetch, np.arange(60))
    given = replace(given, splits=replace(given.splits, test=counted))

    def rows(seed: int) -> Any:
        return robustness(given, {"baseline": onnx}, lambda _: source, examples=20, seed=seed)

    first = rows(1)
    assert len(asked) == len(set(asked)) == 20
    assert asked == sorted(asked) != list(range(20))
    assert first == rows(1)
    assert first != rows(2)


# --- faults ---


def test_a_model_that_fails_on_corrupted_input(tmp_path: Path) -> None:
    given, source, onnx = made(tmp_path, "bright")
    rows = robustness(given, {"baseline": onnx}, lambda name: source)["baseline"]
    why = reasons(rows)
    assert {("brightness", 3), ("brightness", 5), ("brightness", None)} <= set(why)
    assert all("not finite" in reason for reason in why.values())
    measured = {row["what"] for row in rows if "skipped" not in row}
    assert measured >= {"clean", "noise", "contrast", "pixelate"}


@pytest.mark.parametrize(
    ("broken", "reason"), [("raises", "out of luck"), ("detached", "has no gradient")]
)
def test_a_model_that_cannot_be_attacked(small: Made, broken: str, reason: str) -> None:
    given, source, onnx = small
    given = replace(given, model=lambda: Net(36, broken).eval())
    why = reasons(robustness(given, {"baseline": onnx}, lambda name: source)["baseline"])
    assert set(why) == {(what, None) for what in ATTACKS}
    assert all(reason in one for one in why.values())


def test_an_artifact_without_a_float_model(small: Made) -> None:
    given, _, onnx = small
    why = reasons(robustness(given, {"baseline": onnx}, {}.__getitem__)["baseline"])
    assert set(why) == {(what, None) for what in ATTACKS}


def test_a_file_that_changed_fails_alone(small: Made) -> None:
    given, source, onnx = small
    gone = replace(onnx, path=onnx.path.with_name("gone.onnx"))
    found = robustness(given, {"baseline": gone, "fine": onnx}, lambda name: source)
    assert list(reasons(found["baseline"])) == [("clean", None)]
    assert "changed since it was made" in found["baseline"][0]["skipped"]
    assert reasons(found["fine"]) == {}
    assert all(row["drop"] is None for row in found["fine"])


class Scripted:
    """A worker whose three logits are the first values of each example, or their negatives where
    the file is called worse; it dies when it is told.

    ``log`` has what was asked of all workers, ``fatal`` how many predictions are left to the next
    death.
    """

    log: list[str]
    fatal: list[int]

    def __enter__(self) -> Scripted:
        self.dead = False
        return self

    def __exit__(self, *error: object) -> None:
        self.log.append("closed")

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert not self.dead
        self.log.append(do)
        if do == "load":
            self.sign = -1 if Path(request["path"]).stem == "worse" else 1
        if do == "predict":
            self.fatal[0] -= 1
            if self.fatal[0] == 0:
                self.dead = True
                raise WorkerFailed("the worker was killed by SIGKILL (out of memory?)")
            given = np.load(request["inputs"][0])[request["start"] : request["stop"]]
            np.save(request["out"], self.sign * given.reshape(len(given), -1)[:, :3])
        return {}


def scripted(
    given: Task, tmp_path: Path, names: tuple[str, ...] = ("baseline",), fatal: int = 0
) -> tuple[Any, list[str]]:
    worker = type("One", (Scripted,), {"log": [], "fatal": [fatal]})
    artifacts = {}
    for name in names:
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(b"a model")
        artifacts[name] = Artifact.of(path, "onnx")
    return robustness(given, artifacts, {}.__getitem__, start=worker), worker.log


def test_a_worker_that_dies_is_started_anew(tmp_path: Path) -> None:
    found, log = scripted(task(TABLE), tmp_path, fatal=2)  # clean, then noise at severity 1
    why = reasons(found["baseline"])
    assert "SIGKILL" in why["noise", 1]
    assert why["noise", None] == why["noise", 1]
    assert ("noise", 3) not in why
    assert [verb for verb in log if verb != "predict"] == ["load", "take", "closed"] * 2


def test_what_fails_on_clean_examples_is_not_asked_further(tmp_path: Path) -> None:
    found, log = scripted(task(), tmp_path, ("baseline", "fine"), fatal=1)
    assert list(reasons(found["baseline"])) == [("clean", None)]
    assert log.count("load") == 2
    assert ("noise", None) in by(found["fine"])


def test_a_drop_is_what_was_lost_against_the_reference(tmp_path: Path) -> None:
    targets = PICTURES.reshape(60, -1)[:, :3]
    labels = targets.argmax(1)
    for given in (
        task(targets=labels),
        task(targets=targets + 1, kind="regression", metric="mse"),
    ):
        found, _ = scripted(given, tmp_path, ("baseline", "worse"))
        ours, theirs = by(found["baseline"]), by(found["worse"])
        for key in (("clean", None), ("blur", 1), ("noise", None)):
            before, after = ours[key]["value"], theirs[key]["value"]
            absolute = given.kind == "classification"
            lost = before - after if absolute else (after - before) / before
            assert 0 < theirs[key]["drop"]["value"] == pytest.approx(lost)


def test_what_suits_no_table_and_no_tokens(tmp_path: Path) -> None:
    table = reasons(scripted(task(TABLE), tmp_path)[0]["baseline"])
    others = {(what, None) for what in (*CORRUPTIONS, *ATTACKS) if what != "noise"}
    assert set(table) == others
    assert set(table.values()) == {"its inputs are no pictures"}
    tokens = reasons(scripted(task(TOKENS), tmp_path)[0]["baseline"])
    assert set(tokens) == others | {("noise", None)}
    assert all("whole numbers" in why for why in tokens.values())


def test_a_regression_has_nothing_to_attack(tmp_path: Path) -> None:
    targets = PICTURES.reshape(60, -1)[:, :3] + 1
    found, _ = scripted(task(targets=targets, kind="regression", metric="mae"), tmp_path)
    why = reasons(found["baseline"])
    assert set(why) == {(what, None) for what in ATTACKS}
    assert all("; this is regression" in one for one in why.values())
    clean = by(found["baseline"])["clean", None]
    assert (clean["metric"], clean["value"]) == ("mae", pytest.approx(1))


def test_a_metric_of_all_examples_gives_way_to_the_first(tmp_path: Path) -> None:
    found, _ = scripted(task(metric="f1"), tmp_path)
    clean = by(found["baseline"])["clean", None]
    right = PICTURES.reshape(60, -1)[:, :3].argmax(1) == LABELS
    assert (clean["metric"], clean["value"]) == ("accuracy", right.mean())


def test_without_data_and_with_data_that_cannot_be_read(tmp_path: Path) -> None:
    given = task()
    assert given.splits is not None
    nothing, _ = scripted(replace(given, splits=None), tmp_path, ("baseline", "int8"))
    reason = {("clean", None): NO_DATA}
    assert {name: reasons(rows) for name, rows in nothing.items()} == {
        "baseline": reason,
        "int8": reason,
    }

    def fetch(at: Any) -> Any:
        raise OSError("disk on fire")

    broken = replace(given.splits, test=Split(fetch, np.arange(9)))
    found, log = scripted(replace(given, splits=broken), tmp_path)
    assert reasons(found["baseline"]) == {("clean", None): "disk on fire"}
    assert log == []


def test_two_artifacts_of_one_float_model_share_an_attack(
    small: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, source, onnx = small
    crafted: list[str] = []
    craft = robust._crafted

    def counted(task: Task, given: Any, attack: str, *rest: Any) -> Any:
        crafted.append(attack)
        return craft(task, given, attack, *rest)

    monkeypatch.setattr(robust, "_crafted", counted)
    robustness(given, {"baseline": onnx, "again": onnx}, lambda name: source)
    assert crafted == list(ATTACKS)
