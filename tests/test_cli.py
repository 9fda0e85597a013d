"""The command line as a user meets it."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from compressor.cli import app
from compressor.measurement import PLACES
from compressor.recipe import named, read
from compressor.report import Report


def call(*words: object) -> Result:
    """The command in this process."""
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="compressor")


def refused(*words: object) -> str:
    """The one line of a command that must end with exit code 2 and say nothing else."""
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("compressor: error: ")
    return lines[0]


def process(*words: object, **settings: object) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "compressor", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=200,
        **settings,
    )  # type: ignore[call-overload, no-any-return]


# Models that cannot be read.


class Foreign:
    """Pickled by reference: whoever loads it imports this module."""


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_a_missing_file(tmp_path: Path) -> None:
    assert "none.pt does not exist" in refused("run", tmp_path / "none.pt")


def test_a_folder(tmp_path: Path) -> None:
    assert "is a folder" in refused("run", tmp_path)


def test_a_text_file_named_model(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_text("import torch\n")
    assert "is not a PyTorch checkpoint" in refused("run", tmp_path / "model.pt")


def test_a_pickle_with_foreign_classes(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "args": Foreign()}, tmp_path / "model.pt")
    line = refused("run", tmp_path / "model.pt")
    assert "Foreign" in line
    assert "compressor.save" in line


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_a_command_does_not(tmp_path: Path, legacy: bool) -> None:
    proof, model = tmp_path / "proof", tmp_path / "model.pt"
    if legacy:
        model.write_bytes(pickle.dumps(Bomb(proof)))
    else:
        torch.save(Bomb(proof), model)
    line = refused("run", model)
    assert "is not a PyTorch checkpoint" in line if legacy else "system" in line
    assert not proof.exists()


def test_a_state_dict_without_its_factory(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "model.pt")
    assert "add --arch PKG.MOD:FACTORY" in refused("run", tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("nonsense", "write PKG.MOD:FUNCTION"),
        ("no.such.module:net", "No module named"),
        ("./none.py:net", "no such file"),
        ("os:sep", "has no function 'sep'"),
        ("os:getcwd", "it must return an nn.Module"),
        ("os:abort_", "has no function"),
    ],
)
def test_a_factory_that_is_none(tmp_path: Path, arch: str, said: str) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "model.pt")
    assert said in refused("run", tmp_path / "model.pt", "--arch", arch, "--data", "digits")


# Flags that cannot be meant.


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prune", "1.5"], "--prune '1.5'"),
        (["--prune", "-0.1"], "--prune '-0.1'"),
        (["--prune", "half"], "--prune 'half'"),
        (["--prune", "nan"], "--prune 'nan'"),
        (
            ["--quantize", "int7"],
            "choose from none, fp16, bf16, int8, int8-dynamic, int8-static, int8-qat, "
            "int8-weights, int4",
        ),
        (["--time-budget", "0"], "--time-budget 0.0: give seconds, more than 0"),
        (["--time-budget", "nan"], "--time-budget nan"),
        (["--provider", "tpu"], "choose from cpu, cuda"),
        (["--provider", ""], "choose from cpu, cuda"),
        (["--batch", "one"], "--batch 'one'"),
        (["--batch", "0"], "--batch 0"),
        (["--threads", "1,,2"], "--threads '1,,2'"),
        (["--max-drop", "-1"], "--max-drop -1"),
        (["--bench-time", "slow"], "choose from quick, normal, full"),
        (["--metric", "bleu"], "choose from accuracy, top5"),
        (["--data", "nothing"], "nothing"),
        (["--data", "digits?size=7"], "size"),
        (["--data", "digits?width=7"], "width"),
        (["--data", "digits-rows"], "takes (1, 8, 8)"),
        (["--data", "breast-cancer"], "takes (1, 8, 8)"),
        (["--recipe", "none.toml"], "none.toml"),
        (["--keep", "conv1"], "add --prune"),
    ],
)
def test_wrong_flags(trained: Path, tmp_path: Path, flags: list[str], said: str) -> None:
    out = tmp_path / "out"
    assert said in refused("run", trained, "--out", out, *flags)
    assert not out.exists()


@pytest.mark.parametrize("flags", [["--no-such-flag"], ["--seed", "x"], []])
def test_what_the_parser_refuses(flags: list[str]) -> None:
    result = call("run", *flags)
    assert result.exit_code == 2
    assert "Usage" in result.stderr


# Data that does not fit.


def saved(folder: Path, x: np.ndarray, y: np.ndarray, **more: np.ndarray) -> str:
    """The spec of an ``.npz`` with these arrays."""
    np.savez(folder / "data.npz", x=x, y=y, **more)
    return f"arrays:{folder / 'data.npz'}"


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        ((60, 1, 9, 9), "labels", "shape"),
        ((60, 8), "labels", "(8,)"),
        ((60, 1, 8, 8), "high", "10 classes"),
        ((60, 1, 8, 8), "negative", "-1"),
        ((0, 1, 8, 8), "labels", "empty"),
        ((1, 1, 8, 8), "labels", "too few examples to split: 1;"),
        ((60, 1, 8, 8), "floats", "give integer labels"),
        ((60, 1, 8, 8), "short", "59"),
    ],
)
def test_data_that_does_not_fit(
    trained: Path, tmp_path: Path, x: tuple[int, ...], y: str, said: str
) -> None:
    count = x[0]
    targets = {
        "labels": np.arange(count) % 10,
        "high": np.arange(count) % 11,
        "negative": np.arange(count) % 10 - 1,
        "floats": np.linspace(0, 1, count),
        "short": np.arange(59) % 10,
    }[y]
    spec = saved(tmp_path, np.zeros(x, np.float32), targets)
    out = tmp_path / "out"
    assert said in refused("run", trained, "--data", spec, "--prune", "0.5", "--out", out)
    assert not out.exists()


def test_a_split_of_one_example(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def data():\n"
        "    x, y = np.zeros((50, 1, 8, 8), 'float32'), np.arange(50) % 10\n"
        "    return {'train': (x, y), 'test': (x[:1], y[:1])}\n"
    )
    line = refused("run", trained, "--data", f"{tmp_path / 'mine.py'}:data")
    assert "test" in line
    assert "1" in line


def test_nan_in_the_data(trained: Path, tmp_path: Path) -> None:
    x = np.zeros((60, 1, 8, 8), np.float32)
    x[7] = np.nan
    assert "x holds nan" in refused(
        "run", trained, "--data", saved(tmp_path, x, np.arange(60) % 10)
    )


# Folders that cannot be used.


def test_out_is_a_file(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert "is a file" in refused("run", trained, "--out", tmp_path / "out")
    assert "is a file" in refused("run", trained, "--out", tmp_path / "out" / "deeper")
    assert (tmp_path / "out").read_text() == "mine"


def test_out_cannot_be_written(trained: Path, tmp_path: Path) -> None:
    place = Path("/proc/compressor") if os.geteuid() == 0 else tmp_path
    tmp_path.chmod(0o500)
    try:
        assert "--out" in refused("run", trained, "--out", place / "out")
    finally:
        tmp_path.chmod(0o700)


def test_out_holds_another_run(trained: Path, finished: Report) -> None:
    assert "--fresh" in refused("run", trained, "--prune", "0.1", "--out", finished.folder)


# What works.


def test_help_names_every_command() -> None:
    result = call("--help")
    assert result.exit_code == 0
    for command in ("run", "demo", "report", "doctor"):
        assert command in result.stdout


def test_dry_run_prints_the_recipe_and_touches_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call("run", "m.pt", "--prune", "0.5", "--quantize", "int8", "--dry-run", "--out", out)
    assert result.exit_code == 0, result.output
    (tmp_path / "recipe.toml").write_text(result.stdout)
    steps = named(read(tmp_path / "recipe.toml"))
    assert [step.name for step in steps] == ["pruned", "recovered", "int8-dynamic", "int8-static"]
    assert steps[0].settings["criterion"] == "l2", "defaults are shown"
    assert not out.exists()


def test_a_finished_run_is_shown_again(trained: Path, finished: Report) -> None:
    result = call(
        "run", trained, "--prune", "0.5", "--epochs", "6", "--quantize", "int8",
        "--threads", "1", "--out", finished.folder,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{finished}\n"
    assert finished.document["created"] in result.stderr


def test_report_renders_again(finished: Report) -> None:
    (finished.folder / "report.md").unlink()
    result = call("report", finished.folder)
    assert result.exit_code == 0, result.output
    assert "int8-static" in result.stdout
    assert (finished.folder / "report.md").read_text() == finished.markdown()


def test_a_budget_that_is_not_met_is_exit_1(trained: Path, tmp_path: Path) -> None:
    result = call(
        "run", trained, "--prune", "0.9", "--epochs", "0", "--max-drop", "0.001",
        "--provider", "cpu", "--threads", "1", "--out", tmp_path / "run",
    )  # fmt: skip
    assert result.exit_code == 1, result.output
    assert "baseline" in result.stdout
    assert "--max-drop 0.001" in result.stderr
    assert Report.read(tmp_path / "run").best == "baseline"


def test_demo_twice_and_over_another_file(tmp_path: Path) -> None:
    out = tmp_path / "model.pt"
    words = ("demo", "--model", "mlp", "--data", "line", "--epochs", "2", "--out", out)
    assert call(*words).exit_code == 0
    before = out.read_bytes()
    again = call(*words)
    assert again.exit_code == 0
    assert "was trained by this very command" in again.stderr
    line = refused("demo", "--model", "mlp", "--data", "diabetes", "--out", out)
    assert "holds something else" in line
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "alexnet"], "choose from mlp, cnn"),
        (["--epochs", "0"], "--epochs 0"),
        (["--model", "lstm", "--data", "digits"], "sequences"),
        (["--data", "mnist:nowhere"], "nowhere"),
        (["--out", "no/such/folder/model.pt"], "does not exist"),
    ],
)
def test_demo_refuses(tmp_path: Path, flags: list[str], said: str) -> None:
    assert said in refused("demo", "--out", tmp_path / "model.pt", *flags)


def test_doctor() -> None:
    result = call("doctor")
    assert result.exit_code == 0
    assert "onnxruntime" in result.stdout
    assert "present (CPUExecutionProvider)" in result.stdout
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in result.stdout.splitlines()}
    assert set(PLACES) <= set(lines)


@pytest.mark.parametrize("here", [False, True])
def test_doctor_says_how_to_install_openvino(here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.measure.environment.installed", lambda package: here)
    line = next(line for line in call("doctor").stdout.splitlines() if "openvino on cpu" in line)
    assert line.split(maxsplit=1)[1] == (
        "present (openvino on cpu)"
        if here
        else "absent (openvino on cpu): OpenVINO is not installed: "
        "pip install 'compressor[openvino]'"
    )


# As processes.


def test_module_and_script_are_the_same() -> None:
    script = Path(sys.executable).parent / "compressor"
    ours = process("--help")
    theirs = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert ours.stdout == theirs.stdout
    assert ours.returncode == 0


def test_no_telemetry_in_the_command_itself(trained: Path, tmp_path: Path) -> None:
    """A real run writes nothing of onnxruntime's under the user's folders."""
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("XDG_") and key != "ORT_DISABLE_TELEMETRY"
    }
    done = process(
        "run", trained, "--quantize", "int8-static", "--provider", "cpu", "--threads", "1",
        "--out", tmp_path / "run",
        env={**environment, "HOME": str(home)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    left = [str(path.relative_to(home)).lower() for path in home.rglob("*")]
    assert not [path for path in left if "onnx" in path or "microsoft" in path or "device" in path]


def test_ctrl_c_keeps_what_is_finished(trained: Path, tmp_path: Path) -> None:
    words = [
        sys.executable, "-m", "compressor", "run", trained, "--prune", "0.5", "--epochs", "400",
        "--provider", "cpu", "--threads", "1", "--out", tmp_path / "run",
    ]  # fmt: skip
    child = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pruned = tmp_path / "run" / "artifacts" / "pruned.onnx"
    until = time.monotonic() + 120
    while not pruned.exists() and time.monotonic() < until and child.poll() is None:
        time.sleep(0.05)
    assert child.poll() is None, child.communicate()
    child.send_signal(signal.SIGINT)
    out, error = child.communicate(timeout=60)
    assert child.returncode == 130
    assert out == ""
    assert error.splitlines()[-1].startswith("compressor: error: interrupted")
    assert "Traceback" not in error
    assert pruned.exists()
    assert not (tmp_path / "run" / "report.json").exists()


def test_a_closed_pipe_is_no_traceback(finished: Report) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "compressor", "report", str(finished.folder)],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


# Measuring what is there, and the gate.


@pytest.fixture(scope="module")
def benched(finished: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `bench` over two files of a run."""
    out = tmp_path_factory.mktemp("bench") / "out"
    files = [finished.folder / "artifacts" / f"{name}.onnx" for name in ("baseline", "recovered")]
    result = call("bench", *files, "--provider", "cpu", "--threads", 1, "--out", out)
    assert result.exit_code == 0, result.output
    assert "nothing was judged" in result.stdout
    return out


def test_bench_measures_files_side_by_side(benched: Path) -> None:
    document = Report.read(benched).document
    assert [made["name"] for made in document["artifacts"]] == ["baseline", "recovered"]
    assert {row["artifact"] for row in document["measurements"]} == {"baseline", "recovered"}
    assert document["measurements"][1]["speedup"]["versus"] == "baseline"
    assert (benched / "report.html").is_file()


def test_bench_refuses_what_it_cannot_feed(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"no model")
    assert "no.onnx is not ONNX" in refused("bench", tmp_path / "no.onnx", "--out", tmp_path / "o")
    assert "--bench-time 'long'" in refused("bench", "a.onnx", "--bench-time", "long")


def test_compare_passes_what_is_no_worse_and_fails_the_rest(
    finished: Report, benched: Path, tmp_path: Path
) -> None:
    same = call("compare", finished.folder, finished.folder)
    assert (same.exit_code, same.stdout.startswith("passes: ")) == (0, True), same.output
    swapped = Report.read(finished.folder)
    for made in swapped.document["artifacts"]:
        made["size_bytes"] *= 2
    swapped = type(swapped)(swapped.document, tmp_path / "larger")
    swapped.save()
    worse = call("compare", finished.folder, tmp_path / "larger", "--fail-on", "size=10%")
    assert worse.exit_code == 1
    assert worse.stdout.startswith("fails: ")
    assert worse.stderr.startswith("compressor: error: fails: ")
    assert call("compare", tmp_path / "larger", finished.folder).exit_code == 0, "smaller is fine"
    assert call("compare", finished.folder, finished.folder, "--markdown").stdout[:2] == "**"


def test_compare_times_both_again(benched: Path) -> None:
    result = call("compare", benched, benched, "--remeasure", "--json")
    assert result.exit_code == 0, result.output
    assert '"the same file"' in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fail-on", "speed=1%"], "--fail-on 'speed=1%': give QUANTITY=LIMIT"),
        (["--remeasure", "--fail-on", "size=1%"], "--remeasure judges latency"),
        (["--remeasure", "--bench-time", "x"], "--bench-time 'x': choose from quick"),
    ],
)
def test_compare_refuses_limits_that_mean_nothing(
    benched: Path, words: list[str], said: str
) -> None:
    assert said in refused("compare", benched, benched, *words)


def test_several_reports_are_one_comparison(
    finished: Report, benched: Path, tmp_path: Path
) -> None:
    page = tmp_path / "comparison.md"
    result = call("report", finished.folder, benched, "--out", page)
    assert result.exit_code == 0, result.output
    assert page.is_file()
    assert page.with_suffix(".png").is_file()
    assert "--out" in refused("report", benched, "--out", page)
