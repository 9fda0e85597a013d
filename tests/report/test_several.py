"""Several runs side by side: their names, what each column says, and what must be said beside."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from compressor.errors import InputError
from compressor.measurement import Target
from compressor.report import Report, problem
from compressor.report.several import Runs, notes, several

PNG = b"\x89PNG\r\n\x1a\n"
CPU, CUDA = Target(), Target(provider="cuda")


def measured(artifact: str, p50: float, speedup: float, target: Target = CPU) -> dict[str, Any]:
    return {
        "artifact": artifact,
        **target.to_json(),
        "primary": target == CPU,
        "latency_ms": {"min": p50, "p50": p50, "p90": None, "p99": None, "mean": p50, "n": 99},
        "throughput_per_s": 1000 / p50,
        "peak_rss_bytes": 45_000_000,
        "load_ms": 11.5,
        "accuracy": None,
        "fidelity": None,
        "speedup": {
            "versus": "baseline",
            "value": speedup,
            "low": speedup * 0.98,
            "high": speedup * 1.02,
            "verdict": "faster" if speedup > 1.1 else "same",
        },
        "noise": [],
    }


def made(name: str, size_bytes: int, accuracy: float, best: bool) -> dict[str, Any]:
    lost = round(0.95 - accuracy, 4)
    return {
        "name": name,
        "path": f"{name}.onnx",
        "sha256": "ab" * 32,
        "form": "onnx",
        "source": None,
        "steps": [],
        "size_bytes": size_bytes,
        "params": size_bytes // 4,
        "macs": size_bytes * 10,
        "best": best,
        "within_budget": True,
        "proven": False,
        "accuracy": {
            "accuracy": accuracy,
            "n": 360,
            "drop": {"value": lost, "low": lost - 0.01, "high": lost + 0.01},
        },
        "fidelity": None,
    }


def document(**changes: Any) -> dict[str, Any]:
    """A run of two artifacts on one target, schema 1; keywords replace top-level fields."""
    whole = {
        "schema": 1,
        "name": "cnn",
        "created": "2026-11-21T14:02:11+00:00",
        "command": "compressor run cnn.pt --quantize int8",
        "model": {"path": "cnn.pt", "sha256": "ab" * 32},
        "max_drop": 0.01,
        "primary": CPU.to_json(),
        "recommendation": "int8 is recommended.",
        "environment": {
            "versions": {"python": "3.11.7", "numpy": "2.4.6", "onnxruntime": "1.31.1"},
            "cpu": {"model": "Xeon", "features": ["avx2"], "cores": 2},
            "threads": {},
            "session_settings": {"spinning": "0"},
            "providers": ["CPUExecutionProvider"],
            "load": 0.3,
            "noise_floor": {"value": 0.013, "n": 400},
            "os": "Linux x86_64",
        },
        "recipe": [],
        "task": {
            "name": "cnn",
            "kind": "classification",
            "data": "digits",
            "splits": {"train": 1077, "validate": 180, "calibrate": 180, "test": 360},
            "metric": "accuracy",
            "higher_is_better": True,
        },
        "artifacts": [made("baseline", 80_000, 0.95, False), made("int8", 20_000, 0.94, True)],
        "measurements": [measured("baseline", 0.4, 1.0), measured("int8", 0.2, 2.0)],
        "best_per_target": [],
        "stages": [],
        "samples": None,
    }
    return copy.deepcopy({**whole, **changes})


def run(folder: str = "runs/a", **changes: Any) -> Report:
    report = Report(document(**changes), Path(folder))
    assert problem(report.document) is None
    return report


def error_run(folder: str) -> Report:
    """A run whose metric is an error."""
    other = document(name="boston")
    other["task"] |= {"kind": "regression", "metric": "rmse", "higher_is_better": False}
    for artifact in other["artifacts"]:
        accuracy = artifact["accuracy"]
        accuracy["rmse"] = 10 * accuracy.pop("accuracy")
    return Report(other, Path(folder))


def cells(table: str) -> list[list[str]]:
    """A markdown table's header and rows, without the rule between them."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [split[0], *split[2:]]


def section(page: str, heading: str) -> list[list[str]]:
    """The first table under a heading."""
    below = page.split(f"## {heading}\n", 1)[1].splitlines()
    start = next(at for at, line in enumerate(below) if line.startswith("|"))
    return cells("\n".join(takewhile(lambda line: line.startswith("|"), below[start:])))


# --- names ---

NAMES = st.sampled_from(["cnn", "cnn (a)", "1: cnn", "a|b", "x\x1b[31m"])
FOLDERS = st.sampled_from(["a", "b", "x/a", "y/a", "x/b/a", "y/b/a", "."])


@given(st.lists(st.tuples(NAMES, FOLDERS), min_size=1, max_size=8))
def test_names_tell_all_runs_apart(given_runs: list[tuple[str, str]]) -> None:
    """Whatever they are called and wherever they lie; a name that is alone stays as it is."""
    reports = [
        run(folder, name=name, max_drop=at / 100) for at, (name, folder) in enumerate(given_runs)
    ]
    names = several(reports).names
    assert len(set(names)) == len(reports)
    for (name, _), shown in zip(given_runs, names, strict=True):
        assert name.replace("\x1b[31m", "") in shown
    own = [name.replace("\x1b[31m", "") for name, _ in given_runs]
    if len(set(own)) == len(own):
        assert list(names) == own


def test_as_much_of_the_folder_as_it_takes() -> None:
    reports = [run("x/old/cnn"), run("x/new/cnn"), run("x/new/mlp", name="mlp")]
    assert several(reports).names == ("cnn (old/cnn)", "cnn (new/cnn)", "mlp")


def test_two_files_of_one_folder_are_numbered() -> None:
    assert several([run(), run(max_drop=0.2)]).names == ("1: cnn", "2: cnn")


def test_a_run_given_twice_is_a_mistake() -> None:
    with pytest.raises(InputError, match="runs/a is given twice"):
        several([run("runs/a"), run("runs/b"), run("runs/../runs/a")])
    with pytest.raises(InputError, match="no reports"):
        several([])


# --- tables ---


def test_every_artifact_of_every_run_has_its_row() -> None:
    page = several([run("a"), error_run("b")]).markdown()
    header, *rows = section(page, "All variants")
    assert header[:4] == ["run", "variant", "accuracy", "rmse"]
    assert [row[:4] for row in rows] == [
        ["cnn", "baseline", "0.9500", "n/a"],
        ["cnn", "**int8** ★", "0.9400", "n/a"],
        ["boston", "baseline", "n/a", "9.5000"],
        ["boston", "**int8** ★", "n/a", "9.4000"],
    ]
    assert rows[1][4:] == [
        "+0.0100 [0.0000, 0.0200]", "20.0 KB", "5.00k", "200k", "0.200", "5.00k", "45.0 MB",
        "2.00x [1.96, 2.04] faster",
    ]  # fmt: skip
    assert rows[0][-1] == "reference"


def test_the_best_of_each_run() -> None:
    held = document(name="held")
    for artifact in held["artifacts"]:
        artifact["best"] = artifact["name"] == "baseline"
    header, *rows = section(
        several([run(), Report(held, Path("b"))]).markdown(), "Best of each run"
    )
    assert header[:3] == ["run", "best", "kept"]
    assert rows[0] == [
        "cnn", "int8", "accuracy 0.9400", "+0.0100 [0.0000, 0.0200]", "20.0 KB (25%)", "0.200",
        "5.00k", "2.00x [1.96, 2.04] faster",
    ]  # fmt: skip
    assert rows[1][1] == "baseline"
    assert rows[1][-1] == "reference"


@given(st.lists(st.floats(0.001, 1000), min_size=2, max_size=5))
def test_no_ratio_between_runs(times: list[float]) -> None:
    """However fast one run is beside another, the only ratios are those that its report holds."""
    reports = []
    for at, p50 in enumerate(times):
        rows = [measured("baseline", p50, 1.0), measured("int8", p50 / 2, 2.0)]
        reports.append(run(f"run-{at}", name=f"run {at}", measurements=rows))
    runs = several(reports)
    for text in (runs.table(), runs.markdown()):
        assert set(re.findall(r"[\d.]+x", text)) == {"2.00x"}
        assert "None is given from run to run" in text


def test_the_targets_of_all_runs_side_by_side() -> None:
    one, other = document(), document(name="gpu")
    other["measurements"] = [measured("int8", 0.05, 8.0, CUDA)]
    runs = several([Report(one, Path("a")), Report(other, Path("b"))])
    header, *rows = section(runs.markdown(), "On every target")
    assert header[2:] == ["cpu, batch 1, 1 thread", "cuda, batch 1, 1 thread"]
    assert [row[2:] for row in rows] == [
        ["0.400", "n/a"],
        ["0.200 (2.00x faster)", "n/a"],
        ["n/a", "n/a"],
        ["n/a", "0.0500 (8.00x faster)"],
    ]
    assert "On every target" not in several([run("a"), run("b")]).markdown()


# --- notes ---


def changed(report: dict[str, Any], *path: str, value: Any) -> dict[str, Any]:
    inner = report
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return report


DIFFERENT = {
    "CPU: times": (("environment", "cpu", "model"), "EPYC"),
    "CPU features: times": (("environment", "cpu", "features"), []),
    "cores: times": (("environment", "cpu", "cores"), 8),
    "system: times": (("environment", "os"), "Darwin arm64"),
    "session settings: times": (("environment", "session_settings"), {"spinning": "1"}),
    "target: times": (("primary",), CUDA.to_json()),
    "metric: drops": (("task", "metric"), "f1"),
    "data: accuracy": (("task", "data"), None),
    "examples in each split: accuracy": (("task", "splits"), None),
    "budget: what is recommended": (("max_drop",), 0.2),
    "version of onnxruntime: times": (("environment", "versions", "onnxruntime"), "1.30.0"),
    "version of torch: times": (("environment", "versions", "torch"), "2.13.0"),
}


@given(st.sets(st.sampled_from(sorted(DIFFERENT))))
def test_what_differs_is_said_and_nothing_else(differing: set[str]) -> None:
    other = document(name="other")
    for name in differing:
        path, value = DIFFERENT[name]
        changed(other, *path, value=value)
    said = notes(several([run("a"), Report(other, Path("b"))]))[1:]
    assert {note.split(" does not")[0].split(" do not")[0].split(" and ")[0] for note in said} == (
        differing
    )


def test_a_difference_names_the_values_and_their_runs() -> None:
    other = changed(document(name="other"), "environment", "cpu", "model", value="EPYC")
    third = changed(document(name="third"), "environment", "cpu", "model", value=None)
    runs = several([run("a"), Report(other, Path("b")), Report(third, Path("c"))])
    assert "CPU: times do not compare: Xeon in cnn; EPYC in other; none in third" in notes(runs)


def test_reasons_come_along() -> None:
    """What a run could not measure is said with the run's name, and once where all could not."""
    skipped = {"artifact": "int8", **CUDA.to_json(), "skipped": "no CUDA here"}
    rows = [*document()["measurements"], skipped]
    alone = several([run("a", measurements=rows), run("b", name="other")])
    assert "cnn: cuda, batch 1, 1 thread: not measured: no CUDA here (int8)" in notes(alone)
    both = several([run("a", measurements=rows), run("b", name="other", measurements=rows)])
    assert notes(both)[1:] == [
        "every run: cuda, batch 1, 1 thread: not measured: no CUDA here (int8)"
    ]
    assert "cnn: this run did not finish" in notes(several([run(finished=False)]))


# --- any document, any name ---

HOSTILE = "<script>alert(1)</script> | `a` \x1b[31m$x$ [b](http://c)"


def hostile() -> Runs:
    bad = document(name=HOSTILE)
    bad["task"] |= {"data": HOSTILE, "metric": HOSTILE}
    bad["environment"]["cpu"]["model"] = HOSTILE
    bad["recommendation"] = HOSTILE
    for row in [*bad["artifacts"], *bad["measurements"]]:
        key = "name" if "name" in row else "artifact"
        row[key] += HOSTILE
    return several([run("a"), Report(bad, Path("b"))])


def test_names_are_shown_and_never_read() -> None:
    runs = hostile()
    assert "\x1b" not in runs.table() + runs.markdown()
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(runs.markdown())
    assert "<script>" not in page
    assert "<a " not in page
    assert len({len(row) for row in section(runs.markdown(), "All variants")}) == 1
    assert runs.picture().startswith(PNG)


def empty() -> Report:
    """Nothing was made, measured or judged."""
    nothing = document(name="empty", artifacts=[], measurements=[], primary=None)
    nothing["environment"]["noise_floor"] = None
    nothing["task"] |= {"data": None, "splits": None, "metric": None, "higher_is_better": None}
    return Report(nothing, Path("empty"))


def test_a_run_with_nothing_in_it_is_a_row_of_its_own() -> None:
    runs = several([run("a"), empty()])
    assert section(runs.markdown(), "Best of each run")[2][:3] == ["empty", "n/a", "n/a"]
    assert "empty" in runs.table()
    assert runs.picture().startswith(PNG)
    assert several([empty()]).picture().startswith(PNG)


def test_reports_of_this_repository() -> None:
    """They hold everything that a real run writes."""
    found = sorted((Path(__file__).parents[2] / "reports").glob("*/report.json"))
    reports = [Report.read(file) for file in found]
    page = several(reports).markdown()
    artifacts = sum(len(report.document["artifacts"]) for report in reports)
    assert len(section(page, "All variants")) == artifacts + 1


def test_a_picture_has_room_for_many_long_names() -> None:
    """matplotlib warns, which fails here, where nothing is left of the plot itself."""
    many = [run(f"{at}", name=f"{at}" + "w" * 99) for at in range(24)]
    assert several([*many, error_run("b")]).picture().startswith(PNG)


def test_a_picture_is_the_same_every_time() -> None:
    runs = several([run("a"), error_run("b"), run("c", name="third")])
    assert runs.picture() == runs.picture()
    assert runs.picture() != several([run("a"), error_run("b")]).picture()


# --- files ---


def test_the_page_and_its_picture_lie_side_by_side(tmp_path: Path) -> None:
    runs = several([run("a"), run("b", name="other")])
    runs.write(tmp_path / "new" / "my runs.md")
    page = (tmp_path / "new" / "my runs.md").read_text(encoding="utf-8")
    assert page == runs.markdown("my runs.png")
    assert "(my%20runs.png)" in page
    assert (tmp_path / "new" / "my runs.png").read_bytes() == runs.picture()
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_a_place_that_cannot_be_written_is_a_mistake(tmp_path: Path) -> None:
    runs = several([run()])
    (tmp_path / "file").write_text("here")
    with pytest.raises(InputError, match=r"comparison\.txt: name a markdown file"):
        runs.write(tmp_path / "comparison.txt")
    with pytest.raises(InputError, match="cannot be written"):
        runs.write(tmp_path / "file" / "comparison.md")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_comparing_needs_none_of_the_heavy_packages(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(document()))
    code = (
        "import sys; from pathlib import Path\n"
        "from compressor.report import Report; from compressor.report.several import several\n"
        f"print(several([Report.read(Path({str(tmp_path)!r}))]))\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "int8 *" in done.stdout
