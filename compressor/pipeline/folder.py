"""The folder of a run: who it belongs to, which stages are finished, what may be reused.

``run.json`` says whose it is; at the end also what every file was, so that damage is noticed.
``artifacts`` has the models and beside each the record of the stage that made it. The other files
are results: they become visible together, when all of them are written.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakSet

from compressor.artifact import (
    PART,
    READY,
    Artifact,
    digest,
    part_of,
    settle,
    together,
    write_text,
)
from compressor.errors import InputError, StageError
from compressor.report import FILE, Report
from compressor.report.plots import PICTURES

if sys.platform != "win32":
    import fcntl

STATE = "run.json"
LOCK = "run.lock"
ARTIFACTS = "artifacts"
VIEWS = ("report.md", "report.html", *PICTURES)
"""What is drawn from the report, and can be again."""

RESULTS = (FILE, "best.json", "best.onnx", *VIEWS, "recipe.toml", "samples.json.gz")
"""What a run ends with, in the order in which ``--fresh`` removes it."""

DATA = "*.onnx.*.data"
"""External data of ``best.onnx``."""

OURS = frozenset((STATE, LOCK, ARTIFACTS, READY, *RESULTS))
"""Everything that a run writes, but for :data:`DATA`."""

TORN = "a run whose run.json is damaged"


def key_of(**facts: Any) -> str:
    """SHA-256 of plain values: equal facts, equal key."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


class Lock:
    """One process's claim on a folder, which ends with the process, however that ends.

    Raises :class:`InputError` that names the process where another has it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None
        while self._handle is None:
            # What a link leads to is not ours to empty.
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            try:
                _claim(handle, path)
                # Whoever had it before may have removed the file since it was opened.
                if _same(handle, path):
                    self._handle, handle = handle, -1
            finally:
                if handle >= 0:
                    os.close(handle)
        with suppress(OSError):  # a full disk: it is locked all the same
            os.ftruncate(self._handle, 0)
            os.write(self._handle, f"process {os.getpid()} on {platform.node()}\n".encode())
        _HELD.add(self)

    def release(self) -> None:
        """Gives the folder back."""
        if self._handle is not None:
            with suppress(OSError):  # a folder that became read-only
                self.path.unlink()
            self.let_go()

    def let_go(self) -> None:
        """Closes the file, which is still locked where another process has it open."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    __del__ = release


_HELD: WeakSet[Lock] = WeakSet()


def _forked() -> None:
    # A loader's worker may outlive a run that was killed: it must not keep the folder locked.
    for lock in list(_HELD):
        lock.let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _claim(handle: int, path: Path) -> None:
    if sys.platform == "win32":  # where two runs in one folder are not noticed
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = " ".join(os.read(handle, 200).decode(errors="replace").split()) or "another process"
        raise InputError(
            f"--out {path.parent} is in use by {who}: wait for its end, or name another folder"
        ) from None
    except OSError:  # a file system without locks
        return


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


class Folder:
    """An open run folder, this process's own until it is closed; use it in a ``with`` block.

    ``fingerprint`` stands for the arguments of the run.
    """

    def __init__(self, path: Path, fingerprint: str, command: str) -> None:
        self.path = path
        self.artifacts = path / ARTIFACTS
        self._said = {"fingerprint": fingerprint, "command": command}
        self._lock: Lock | None = None

    @classmethod
    def open(
        cls, path: Path, fingerprint: str, command: str, *, fresh: bool
    ) -> tuple[Folder, Report | None]:
        """The folder, and its report when these very arguments have been run to the end.

        An unfinished run of the same arguments is taken up; ``fresh`` starts over. Raises
        :class:`InputError`, having touched nothing, when the folder holds anything else, is used by
        another process or cannot be written.
        """
        folder = cls(path, fingerprint, command)
        try:
            return folder, folder._taken(fresh)
        except OSError as error:
            folder.close()
            raise InputError(f"--out {path} cannot be used: {error.strerror}") from None
        except BaseException:
            folder.close()
            raise

    def close(self) -> None:
        """Lets other processes have the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Folder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _taken(self, fresh: bool) -> Report | None:
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--out {self.path} is a file: name a folder")
        if (self.path / LOCK).exists():  # of another process, or of one that was killed
            with suppress(OSError):  # what is only to be read can be shown
                self._claimed()
        report = self._looked(fresh)
        if report is None:
            _writable(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            self._claimed()
            report = self._looked(fresh)  # another may have run between the look and the claim
            if report is None:
                self._begun(fresh)
        if report is not None:
            self._drawn(report)
            self.close()
        return report

    def _claimed(self) -> None:
        self._lock = self._lock or Lock(self.path / LOCK)

    def _looked(self, fresh: bool) -> Report | None:
        """The report of these arguments, where it is finished and nothing of it was damaged."""
        with suppress(OSError):
            settle(self.path)
        state, report = _state(self.path), _report(self.path / FILE)
        theirs = state or (report.document if report else {})
        held = _held(self.path)
        if held and not theirs:
            raise InputError(
                f"--out {self.path} holds other files ({held[0]} ...): name a new or empty folder"
            )
        ours = self._said["fingerprint"]
        if theirs and not fresh and theirs["fingerprint"] not in (ours, TORN):
            raise InputError(
                f"--out {self.path} holds another run ({theirs['command']}): "
                "name another folder, or add --fresh to replace it"
            )
        if fresh or report is None or report.document["fingerprint"] != ours:
            return None
        if not report.document.get("finished", True) or not _whole(self.path, state):
            return None
        return report

    def _begun(self, fresh: bool) -> None:
        """Makes the folder this run's. Whenever that is cut short, it can be begun again."""
        state, report = _state(self.path), _report(self.path / FILE)
        if fresh or state.get("fingerprint") != self._said["fingerprint"]:
            # First: from here on the folder is known as this run's, whatever else lies in it.
            write_text(self.path / STATE, json.dumps(self._said, indent=1) + "\n")
        if fresh or report is None or report.document["fingerprint"] != self._said["fingerprint"]:
            for file in (self.path / FILE, *self._results()):
                file.unlink(missing_ok=True)
        if fresh and self.artifacts.exists():
            self.artifacts.rename(part_of(self.artifacts))
        _swept(self.path)
        self.artifacts.mkdir(exist_ok=True)

    def _results(self) -> list[Path]:
        return [*(self.path / name for name in RESULTS), *self.path.glob(DATA)]

    def _drawn(self, report: Report) -> None:
        """Draws the views of a finished report again where a part of one was lost."""
        files = _state(self.path).get("files", {})
        sizes = {name: _size(self.path / name) for name in VIEWS if name in files}
        if any(size < files[name]["size"] for name, size in sizes.items()):
            with suppress(OSError):
                report.save()

    def finished(self, name: str, key: str) -> tuple[Artifact | None, dict[str, Any]] | None:
        """What the stage that made ``name`` left behind, and what was seen, if it had this ``key``.

        The files are verified by their digests; where one is gone or changed, it is made again.
        """
        try:
            record = json.loads(self._record(name).read_text(encoding="utf-8"))
            if record["key"] != key:
                return None
            made, seen = record["artifact"], dict(record["seen"])
            return (Artifact.from_json(made, self.artifacts).checked() if made else None), seen
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StageError):
            return None

    def remember(
        self, name: str, key: str, artifact: Artifact | None, seen: Mapping[str, Any]
    ) -> None:
        """Writes down that the stage is finished, so that a later run can take up from here."""
        made = artifact.to_json() if artifact else None
        record = {"key": key, "artifact": made, "seen": dict(seen)}
        write_text(self._record(name), json.dumps(record, indent=1) + "\n")

    def _record(self, name: str) -> Path:
        return self.artifacts / f"{name.replace(':', '.')}.json"

    @contextmanager
    def results(self) -> Iterator[Path]:
        """Where to write what the run ends with; all of it takes the place of what an earlier run
        left, together."""
        with together(self.path) as beside:
            yield beside
            found = {file.name: file for file in beside.iterdir()}
            made = {
                str(file.relative_to(self.path)): file
                for file in self.artifacts.rglob("*")
                if file.is_file() and file.relative_to(self.artifacts).parts[0] != LOGS
            }
            files = {
                name: {"size": file.stat().st_size, "sha256": digest(file)}
                for name, file in sorted({**made, **found}.items())
                if name != FILE  # which may be rendered again, and tells itself whether it is whole
            }
            state = {**self._said, "files": files}
            write_text(beside / STATE, json.dumps(state, indent=1) + "\n")
        for file in self._results():
            if file.name not in found:
                file.unlink(missing_ok=True)


LOGS = "logs"
"""Of the artifacts' folder: what is read while a run goes on, and of no use to it."""


def _held(path: Path) -> list[str]:
    """Names in the folder that no run has written just to begin."""
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    return [name for name in names if name != LOCK and not PART.fullmatch(name)]


def _state(folder: Path) -> dict[str, Any]:
    """The state of a run of ours; empty where there is none."""
    try:
        text = (folder / STATE).read_bytes().rstrip(b"\0").decode(errors="replace")
    except OSError:
        return {}
    try:
        state = json.loads(text)
        if not {"fingerprint", "command"} <= state.keys():
            return {}
        files = {
            name: {"size": int(file["size"]), "sha256": str(file["sha256"])}
            for name, file in state.get("files", {}).items()
        }
        said = {key: str(state[key]) for key in ("fingerprint", "command")}
        return {**said, "files": files}
    except (ValueError, AttributeError, KeyError, TypeError, OverflowError, RecursionError):
        # After a power cut a file may end early. Its beginning, among nothing but our files, is
        # ours; which run it was, its stages will show.
        opening = json.dumps({"fingerprint": ""}, indent=1)[:-3]
        known = all(name in OURS or Path(name).match(DATA) for name in _held(folder))
        torn = text.startswith(opening) or opening.startswith(text)
        return {"fingerprint": TORN, "command": TORN, "files": {}} if known and torn else {}


def _report(path: Path) -> Report | None:
    """The report of a run of ours, which has a fingerprint; ``None`` for anybody else's file."""
    try:
        report = Report.read(path)
    except InputError:
        return None
    return report if "fingerprint" in report.document else None


def _whole(folder: Path, state: Mapping[str, Any]) -> bool:
    """Whether the files of a finished run are what they were; its views can be drawn again. Of a
    report that was kept alone, as in a repository, there is nothing to say."""
    return state.get("fingerprint") != TORN and all(
        _size(folder / name) == file["size"] and digest(folder / name) == file["sha256"]
        for name, file in state.get("files", {}).items()
        if name not in VIEWS
    )


def _size(path: Path) -> int:
    """Bytes; -1 for a file that is gone."""
    return path.stat().st_size if path.is_file() else -1


def _swept(folder: Path) -> None:
    """Removes what a process that was killed had begun to write."""
    for found in [*folder.glob(".*"), *folder.glob(f"{ARTIFACTS}/**/.*")]:
        if PART.fullmatch(found.name) or found.match(f"{ARTIFACTS}/.compressor-*"):
            _remove(found)


def _writable(path: Path) -> None:
    there = path
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise InputError(f"--out {path}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--out {path}: {there} cannot be written to: name another folder")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
