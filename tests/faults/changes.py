"""Kills a folder's user before every single change that it makes to the disk, and looks.

``python changes.py FOLDER`` forks, for each way of opening a folder and for each change
of a name that is made from there to the end of a run, a process that ends at that change. Prints
how many there were, as JSON; an assertion that fails ends it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher import strike

from compressor import report
from compressor.artifact import Artifact, digest, settle, write_text
from compressor.pipeline.folder import STATE, Folder
from compressor.report import FILE, Report, html, plots

MODELS = ("baseline", "pruned")


def run(path: Path, document: dict[str, Any], fingerprint: str, fresh: bool) -> Report:
    """What a run does to its folder. The models hold the fingerprint."""
    folder, stored = Folder.open(path, fingerprint, "a run", fresh=fresh)
    with folder:
        if stored is not None:
            return stored
        for name in MODELS:
            ready = folder.finished(f"{name}:make", fingerprint)
            if ready is None:
                file = folder.artifacts / f"{name}.onnx"
                write_text(file, f"{name} of {fingerprint}")
                folder.remember(f"{name}:make", fingerprint, Artifact.of(file, "onnx"), {})
        made = Report({**document, "fingerprint": fingerprint}, path)
        with folder.results() as beside:
            write_text(beside / "best.onnx", f"pruned of {fingerprint}")
            made.write(beside)
        return made


def crashed(count: int, folder: Path, work: Callable[[], object]) -> bool:
    """Whether a process that does ``work`` was killed before its ``count``-th change."""
    pid = os.fork()
    if not pid:
        strike(signal.SIGKILL, count, str(folder))
        work()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def whole(path: Path, known: tuple[str, ...]) -> str | None:
    """The fingerprint of the run that a reader finds, all of whose files are of that run."""
    settle(path)  # as every reader of ours does
    if not (path / FILE).exists():
        return None
    found = str(Report.read(path).document["fingerprint"])
    assert found in known
    assert found in (path / "report.md").read_text(encoding="utf-8")
    assert found in (path / "best.onnx").read_text(encoding="utf-8")
    for name in MODELS:
        assert found in (path / "artifacts" / f"{name}.onnx").read_text(encoding="utf-8")
    return found


def main() -> None:
    """Goes through all of it."""
    base, document = Path(sys.argv[1]), {"schema": 1, "finished": True}
    # What takes time and is no matter of names: pictures, the schema, and a kill is no power cut.
    plots.pictures = lambda document: {"pareto.png": b"drawn"}
    html.html = lambda document: document["fingerprint"]
    Report.markdown = lambda self: self.document["fingerprint"]  # type: ignore[method-assign]
    report.problem = lambda document: None
    os.fsync = lambda handle: None
    found: dict[str, int] = {}
    path = base / "run"

    def nothing() -> None:
        return

    def failed() -> None:
        run(path, {**document, "finished": False}, "one", False)

    ways: dict[str, tuple[Callable[[], object], str, bool]] = {
        "new": (nothing, "one", False),
        "again after a failure": (failed, "one", False),
        "over itself": (lambda: run(path, document, "one", False), "one", True),
        "over another": (lambda: run(path, document, "one", False), "two", True),
    }
    for way, (before, fingerprint, fresh) in ways.items():
        count = 0
        while True:
            count += 1
            shutil.rmtree(path, ignore_errors=True)
            before()
            had = whole(path, ("one",))
            alive = not crashed(count, base, lambda: run(path, document, fingerprint, fresh))  # noqa: B023
            now = whole(path, ("one", "two"))
            if alive:
                assert now == fingerprint
                break
            # With --fresh the old results go first; otherwise they stay until the new ones are.
            assert now in (had, fingerprint, None) if fresh else now in (had, fingerprint)
            # A run of the same arguments goes on, and needs no other flag than it had.
            again = run(path, document, fingerprint, fresh)
            assert again.document["fingerprint"] == whole(path, (fingerprint,)) == fingerprint
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            assert FILE not in state["files"]
            assert all(digest(path / name) == one["sha256"] for name, one in state["files"].items())
            assert not [*path.rglob("*.part"), *path.glob(".*"), *path.glob("*.lock")]
        found[way] = count - 1
    print(json.dumps(found))


if __name__ == "__main__":
    main()
