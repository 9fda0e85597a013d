"""What else can happen to a run: it says so in a line, leaves nothing half, and goes on."""

from __future__ import annotations

import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import MARK, WAIT, Case, Launcher, left, litter, one_line, shas, soon, sound

from compressor.pipeline.folder import LOCK, Lock
from compressor.report import Report

STAGES = {
    "export": "baseline: export",
    "prune": "pruned: prune",
    "distill": "recovered: distill",
    "quantize": "int8-dynamic: quantize",
    "measure": "timing on",
    "report": "report",
}
"""What a run says when it begins something."""

ROOT = os.geteuid() == 0


def complete(launcher: Launcher, case: Case, folder: Path, out: Path | str = "out") -> None:
    """The same command again: it ends well, with what an undisturbed run makes."""
    ran = launcher.run(folder, *case.words, "--out", str(out))
    assert ran.code == 0, ran.errors
    assert sound(folder / out)
    assert shas(folder / out) == case.shas
    assert litter(folder / out) == []
    assert left(folder) == []


@pytest.fixture(scope="session")
def whole(launcher: Launcher, case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, to copy."""
    folder = tmp_path_factory.mktemp("whole")
    complete(launcher, case, folder)
    return folder / "out"


# Interrupted


def interrupted(launcher: Launcher, case: Case, folder: Path, stage: str, later: float) -> None:
    with launcher.started(folder, *case.words, "--out", "out") as running:
        assert running.until(STAGES[stage])
        time.sleep(later)
        running.send(signal.SIGINT)
    # The last moments of a run are over before a signal comes.
    if running.code != 0:
        assert "interrupted;" in one_line(running, 130)
        assert "the same command goes on" in running.errors
    assert soon(lambda: left(folder) == [], 1), "a worker was left behind"
    sound(folder / "out")
    made = {path.name for path in (folder / "out" / "artifacts").glob("*.json")}
    complete(launcher, case, folder)
    cached = {
        f"{one['artifact']}.{one['stage']}.json"
        for one in Report.read(folder / "out").document["stages"]
        if one["cached"]
    }
    assert made == cached or running.code == 0, "what was finished is kept"


def test_ctrl_c(launcher: Launcher, case: Case, tmp_path: Path) -> None:
    interrupted(launcher, case, tmp_path, "measure", 0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "later"), [(stage, 0.1 * (at % 2)) for at, stage in enumerate(STAGES)]
)
def test_ctrl_c_in_each_stage(
    launcher: Launcher, case: Case, tmp_path: Path, stage: str, later: float
) -> None:
    interrupted(launcher, case, tmp_path, stage, later)


@pytest.mark.slow
def test_ctrl_c_on_a_terminal(launcher: Launcher, case: Case, tmp_path: Path) -> None:
    """The command as a user starts it, in a terminal of its own, whose driver sends the signal."""
    child, terminal = pty.fork()
    if not child:
        os.chdir(tmp_path)
        os.environ |= {"OMP_NUM_THREADS": "1", MARK: str(tmp_path)}
        os.execv(sys.executable, [sys.executable, "-m", "compressor", *case.words, "--out", "out"])
    said = b""
    while b"export" not in said:
        said += os.read(terminal, 1 << 16)
    os.write(terminal, b"\x03")
    try:
        while part := os.read(terminal, 1 << 16):
            said += part
    except OSError:  # the terminal's other end is closed
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert b"interrupted; what was finished is kept" in said
    assert b"Traceback" not in said
    os.close(terminal)
    complete(launcher, case, tmp_path)


# Power


def cut(out: Path, files: list[Path], keep: float) -> None:
    """As if the ends of the files had not reached the disk."""
    for file in files:
        os.truncate(file, int(file.stat().st_size * keep))


def newest(out: Path, count: int) -> list[Path]:
    files = [path for path in out.rglob("*") if path.is_file()]
    return sorted(files, key=lambda path: path.stat().st_mtime_ns)[-count:]


@pytest.mark.parametrize(
    ("count", "keep"), [pytest.param(3, 0.5, marks=pytest.mark.slow), (99, 0.0)]
)
def test_a_power_cut(
    launcher: Launcher, case: Case, whole: Path, tmp_path: Path, count: int, keep: float
) -> None:
    shutil.copytree(whole, tmp_path / "out")
    cut(tmp_path / "out", newest(tmp_path / "out", count), keep)
    complete(launcher, case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_power_cuts(launcher: Launcher, case: Case, whole: Path, tmp_path: Path, seed: int) -> None:
    """Also in the middle of a run."""
    draw = random.Random(seed)
    if seed % 2:
        shutil.copytree(whole, tmp_path / "out")
    else:
        launcher.run(tmp_path, *case.words, "--out", "out", after=draw.uniform(0.5, 3))
    files = newest(tmp_path / "out", draw.choice([1, 2, 4, 8]))
    cut(tmp_path / "out", files, draw.choice([0.0, 0.3, 0.99]))
    complete(launcher, case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["best.onnx", "artifacts/pruned.onnx", "report.json"])
def test_damage_of_a_finished_run_is_mended(
    launcher: Launcher, case: Case, whole: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(whole, tmp_path / "out")
    content = bytearray((whole / name).read_bytes())
    content[len(content) // 2 :] = b"\0" * 8
    (tmp_path / "out" / name).write_bytes(content)
    complete(launcher, case, tmp_path)


# Room


@pytest.mark.parametrize("size", [pytest.param(45_000, marks=pytest.mark.slow), 60_000])
def test_a_limit_on_the_size_of_files(
    launcher: Launcher, case: Case, tmp_path: Path, size: int
) -> None:
    ran = launcher.run(tmp_path, *case.words, "--out", "out", limits={"RLIMIT_FSIZE": size})
    assert "File too large" in one_line(ran, 3)
    assert not sound(tmp_path / "out")
    assert litter(tmp_path / "out") == []
    complete(launcher, case, tmp_path)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    if not ROOT or shutil.which("mount") is None:
        pytest.skip("only root can mount")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)], check=False
    )
    if mounted.returncode:
        pytest.skip("nothing can be mounted here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def remounted(disk: Path, *options: str) -> None:
    subprocess.run(["mount", "-o", ",".join(("remount", *options)), str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("kib", [0, 4, 64, 112, 250, 350])
def test_a_full_disk(launcher: Launcher, case: Case, disk: Path, tmp_path: Path, kib: int) -> None:
    """Of so many KiB; a run needs about 450. With none, even the lock has no room for its text.
    Where nothing can be begun, it is another folder that is needed."""
    remounted(disk, f"size={max(kib, 4)}k")
    if not kib:
        (disk / "full").write_bytes(b"\0" * 4096)
    ran = launcher.run(tmp_path, *case.words, "--out", str(disk / "out"))
    assert "No space left on device" in one_line(ran, 3 if kib > 4 else 2)
    assert not sound(disk / "out")
    assert litter(disk / "out") == []
    (disk / "full").unlink(missing_ok=True)
    remounted(disk, "size=50m")
    complete(launcher, case, tmp_path, disk / "out")


@pytest.mark.slow
def test_a_disk_that_becomes_read_only(
    launcher: Launcher, case: Case, disk: Path, tmp_path: Path
) -> None:
    remounted(disk, "size=50m", "ro")
    ran = launcher.run(tmp_path, *case.words, "--out", str(disk / "out"))
    assert f"{disk} cannot be written to: name another folder" in one_line(ran, 2)
    remounted(disk, "rw")
    complete(launcher, case, tmp_path, disk / "out")
    remounted(disk, "ro")
    again = launcher.run(tmp_path, *case.words, "--out", str(disk / "out"))
    assert again.code == 0, "a finished run is shown"
    ran = launcher.run(tmp_path, *case.words, "--out", str(disk / "out"), "--fresh")
    assert "cannot be written to" in one_line(ran, 2)
    assert sound(disk / "out")


@pytest.mark.parametrize(
    ("out", "mode", "why"),
    [
        ("out", 0o555, "out cannot be written to: name another folder"),
        pytest.param(
            "out/run", 0o555, "out cannot be written to: name another folder",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "out/run", 0o000, "cannot be used: Permission denied", marks=pytest.mark.slow
        ),
    ],
)  # fmt: skip
def test_a_folder_without_permission(
    launcher: Launcher, case: Case, tmp_path: Path, out: str, mode: int, why: str
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    folder.chmod(mode)
    try:
        ran = launcher.run(tmp_path, *case.words, "--out", out, plain=ROOT)
        said = one_line(ran, 2)
        assert f"--out {out}" in said
        assert why in said
    finally:
        folder.chmod(0o755)
    assert list(folder.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("mib", [1, 60, 300])
def test_a_limit_on_memory(launcher: Launcher, case: Case, tmp_path: Path, mib: int) -> None:
    """So much more than the command has when it begins."""
    pages = int(Path(f"/proc/{launcher.process.pid}/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + (mib << 20)
    ran = launcher.run(tmp_path, *case.words, "--out", "out", limits={"RLIMIT_AS": limit})
    # What is written in C++ may abort where it gets none.
    if ran.code not in (0, -signal.SIGABRT, -signal.SIGSEGV):
        assert ran.code == 3 or "Cannot allocate memory" in one_line(ran, 2), ran.errors
    assert "Traceback" not in ran.errors
    sound(tmp_path / "out")
    complete(launcher, case, tmp_path)


# Others


@pytest.mark.slow
def test_a_worker_that_is_killed_is_a_row(launcher: Launcher, case: Case, tmp_path: Path) -> None:
    with launcher.started(tmp_path, *case.words, "--out", "out") as running:
        assert running.until("timing on")
        assert soon(lambda: left(tmp_path) != [])
        for pid in left(tmp_path)[:1]:
            os.kill(pid, signal.SIGKILL)
    assert sound(tmp_path / "out"), running.errors
    rows = Report.read(tmp_path / "out").document["measurements"]
    skipped = [row["skipped"] for row in rows if "skipped" in row]
    assert all("killed by SIGKILL (out of memory?)" in reason for reason in skipped)
    assert running.code in (0, 3)
    assert shas(tmp_path / "out") == case.shas
    assert left(tmp_path) == []


def test_one_run_at_a_time(launcher: Launcher, case: Case, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    lock = Lock(tmp_path / "out" / LOCK)
    said = lock.path.read_text()
    for more in ([], ["--fresh"]):
        ran = launcher.run(tmp_path, *case.words, "--out", "out", *more)
        assert f"--out out is in use by process {os.getpid()} on " in one_line(ran, 2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]
    assert lock.path.read_text() == said
    lock.release()


@pytest.mark.slow
def test_one_job_of_several_processes_at_a_time(case: Case, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    lock = Lock(tmp_path / "out" / LOCK)
    ran = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
            "-m", "compressor", *case.words, "--out", "out", "--fresh",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=WAIT,
        env={**os.environ, "OMP_NUM_THREADS": "1", MARK: str(tmp_path)},
    )  # fmt: skip
    assert ran.returncode != 0
    assert f"in use by process {os.getpid()} on " in ran.stderr
    assert left(tmp_path) == []
    lock.release()
    assert sound(tmp_path / "out")


@pytest.mark.slow
def test_nobody_reads_what_is_printed(launcher: Launcher, case: Case, tmp_path: Path) -> None:
    """As ``compressor run ... | head -0``, whose reader is gone when the table comes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: str(tmp_path)}
    for words in (("run", "--out", "out"), ("report", "out")):
        command = [*case.words, *words[1:]] if words[0] == "run" else list(words)
        process = subprocess.Popen(
            [sys.executable, "-m", "compressor", *command],
            cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.close()
        _, errors = process.communicate(timeout=WAIT)
        assert (process.returncode, errors) == (1, b"")
        assert sound(tmp_path / "out")
    assert shas(tmp_path / "out") == case.shas
    assert left(tmp_path) == []


@pytest.mark.slow
def test_a_command_of_its_own_makes_the_same(case: Case, tmp_path: Path) -> None:
    """Nothing above rests on the process that forks."""
    ran = subprocess.run(
        [sys.executable, "-m", "compressor", *case.words, "--out", "out"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert shas(tmp_path / "out") == case.shas
    assert litter(tmp_path / "out") == []
