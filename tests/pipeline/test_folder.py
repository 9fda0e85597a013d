"""A folder is a run's own, or it is left alone."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compressor.artifact import Artifact
from compressor.errors import InputError
from compressor.pipeline.folder import LOCK, STATE, Folder, Lock


def files(path: Path) -> list[str]:
    return sorted(str(one.relative_to(path)) for one in path.rglob("*"))


@pytest.mark.parametrize("name", ["thesis.tex", "report.json", "run.json", "artifacts"])
@pytest.mark.parametrize("fresh", [False, True])
def test_other_people_s_files_are_never_touched(tmp_path: Path, name: str, fresh: bool) -> None:
    (tmp_path / name).write_text('{"lint": 1}')
    (tmp_path / "more").mkdir()
    with pytest.raises(InputError, match="holds other files"):
        Folder.open(tmp_path, "f", "compressor run x", fresh=fresh)
    assert files(tmp_path) == sorted([name, "more"])


@pytest.mark.parametrize("text", ["", '{\n "finger', "{}", "[1]"])
def test_a_torn_state_is_ours_only_among_our_files(tmp_path: Path, text: str) -> None:
    (tmp_path / STATE).write_text(text)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds other files"):
        Folder.open(tmp_path, "f", "compressor run x", fresh=True)
    assert (tmp_path / STATE).read_text() == text
    (tmp_path / "thesis.tex").unlink()
    if text.startswith(("{}", "[")):  # which no run of ours began to write
        with pytest.raises(InputError, match="holds other files"):
            Folder.open(tmp_path, "f", "compressor run x", fresh=True)
    else:
        with Folder.open(tmp_path, "f", "compressor run x", fresh=False)[0]:
            assert '"fingerprint": "f"' in (tmp_path / STATE).read_text()


def test_a_run_that_failed_at_once_can_be_taken_up_or_replaced(tmp_path: Path) -> None:
    first, report = Folder.open(tmp_path / "run", "f", "compressor run x", fresh=False)
    assert report is None
    (first.artifacts / "baseline.safetensors").write_bytes(b"half")
    first.close()
    again, report = Folder.open(tmp_path / "run", "f", "compressor run x", fresh=False)
    assert report is None
    again.close()
    assert files(again.path) == ["artifacts", "artifacts/baseline.safetensors", STATE]
    with pytest.raises(InputError, match=r"holds another run \(compressor run x\)"):
        Folder.open(tmp_path / "run", "g", "compressor run y", fresh=False)
    fresh, _ = Folder.open(tmp_path / "run", "g", "compressor run y", fresh=True)
    fresh.close()
    assert files(fresh.path) == ["artifacts", STATE]


def test_litter_of_a_killed_run_is_swept(tmp_path: Path) -> None:
    with Folder.open(tmp_path, "f", "compressor run x", fresh=False)[0] as folder:
        litter = [
            tmp_path / ".run.json.0123abcd.part",
            folder.artifacts / ".baseline.onnx.0123abcd.part",
            folder.artifacts / ".compressor-abc" / "whole.onnx",
            folder.artifacts / "net" / ".net.onnx.0123abcd.part",
        ]
        kept = [folder.artifacts / "net" / ".hidden", folder.artifacts / "recovered.training"]
        for file in (*litter, *kept):
            file.parent.mkdir(exist_ok=True)
            file.touch()
    Folder.open(tmp_path, "f", "compressor run x", fresh=False)[0].close()
    assert all(file.exists() for file in kept)
    assert not any(file.exists() for file in litter)
    assert not litter[2].parent.exists()


def test_a_stage_is_taken_up_while_its_files_hold(tmp_path: Path) -> None:
    with Folder.open(tmp_path, "f", "compressor run x", fresh=False)[0] as folder:
        path = folder.artifacts / "pruned.onnx"
        path.write_bytes(b"model")
        made = Artifact.of(path, "onnx")
        folder.remember("pruned:prune", "key", made, {"seconds": 1.0})
        folder.remember("int8:quantize", "key", None, {"skipped": "why"})
    with Folder.open(tmp_path, "f", "compressor run x", fresh=False)[0] as folder:
        assert folder.finished("pruned:prune", "key") == (made, {"seconds": 1.0})
        assert folder.finished("int8:quantize", "key") == (None, {"skipped": "why"})
        assert folder.finished("pruned:prune", "other") is None
        assert folder.finished("pruned:export", "key") is None
        record = folder.artifacts / "pruned.prune.json"
        whole = record.read_bytes()
        for length in (0, 1, len(whole) // 2, len(whole) - 3):
            record.write_bytes(whole[:length])
            assert folder.finished("pruned:prune", "key") is None
        record.write_bytes(whole)
        path.write_bytes(b"modem")
        assert folder.finished("pruned:prune", "key") is None


# The lock


def test_a_folder_in_use_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with Folder.open(path, "f", "compressor run x", fresh=False)[0]:
        (path / "artifacts" / "baseline.onnx").touch()
        for fingerprint, fresh in (("f", False), ("f", True), ("g", True)):
            with pytest.raises(
                InputError, match=f"in use by process {os.getpid()} on {platform.node()}: wait"
            ):
                Folder.open(path, fingerprint, "compressor run y", fresh=fresh)
        assert files(path) == ["artifacts", "artifacts/baseline.onnx", STATE, LOCK]
    assert not (path / LOCK).exists()
    Folder.open(path, "f", "compressor run y", fresh=True)[0].close()


def test_a_refusal_gives_the_folder_back(tmp_path: Path) -> None:
    Folder.open(tmp_path, "f", "compressor run x", fresh=False)[0].close()
    (tmp_path / LOCK).touch()  # of a run that was killed
    with pytest.raises(InputError, match="holds another run"):
        Folder.open(tmp_path, "g", "compressor run y", fresh=False)
    Lock(tmp_path / LOCK).release()


HOLD = """
import os, sys, time
from pathlib import Path
from compressor.pipeline.folder import Lock
lock = Lock(Path(sys.argv[1]))
if os.fork():
    print("held", flush=True)
    time.sleep(300)
time.sleep(2)  # a loader's worker, which outlives the run for a while
"""


def test_a_lock_dies_with_its_process_though_its_children_live(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE) as held:
        assert held.stdout is not None
        assert held.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=f"in use by process {held.pid} on "):
            Lock(path)
        held.send_signal(signal.SIGKILL)
        held.wait()
        lock = Lock(path)
        assert path.read_text().split()[:2] == ["process", str(os.getpid())]
        lock.release()
    assert not path.exists()


def test_a_lock_whose_file_is_replaced_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking, whoever had the folder may have removed the file."""
    import compressor.pipeline.folder as module

    path, claim, removed = tmp_path / LOCK, module._claim, []

    def slow(handle: int, where: Path) -> None:
        if not removed:
            removed.append(where)
            where.unlink()
        claim(handle, where)

    monkeypatch.setattr(module, "_claim", slow)
    lock = Lock(path)
    assert removed == [path]
    with pytest.raises(InputError, match="in use"):
        Lock(path)
    lock.release()
