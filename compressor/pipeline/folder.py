"""The folder of a run: who it belongs to, which stages are finished, what may be reused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.artifact import Artifact, write_text
from compressor.errors import InputError, StageError
from compressor.report import FILE, Report
from compressor.report.plots import PICTURES

STATE = "run.json"
ARTIFACTS = "artifacts"
OURS = (STATE, FILE, "report.md", "report.html", *PICTURES, "best.onnx", "best.json", "recipe.toml",
        "samples.json.gz", ARTIFACTS)  # fmt: skip
"""Everything that a run writes, and so all that ``--fresh`` removes."""


def key_of(**facts: Any) -> str:
    """SHA-256 of plain values: equal facts, equal key."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


class Folder:
    """An open run folder. ``fingerprint`` stands for the arguments of the run."""

    def __init__(self, path: Path, fingerprint: str, command: str) -> None:
        self.path = path
        self.artifacts = path / ARTIFACTS
        self._state: dict[str, Any] = {
            "fingerprint": fingerprint,
            "command": command,
            "stages": {},
        }

    @classmethod
    def open(
        cls, path: Path, fingerprint: str, command: str, *, fresh: bool
    ) -> tuple[Folder, Report | None]:
        """The folder, and its report when these very arguments have been run to the end.

        An unfinished run of the same arguments is taken up; ``fresh`` starts over. Raises
        :class:`InputError`, having touched nothing, when the folder holds anything else or cannot
        be written.
        """
        folder = cls(path, fingerprint, command)
        if path.exists() and not path.is_dir():
            raise InputError(f"--out {path} is a file: name a folder")
        held = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        state, report = _state(path / STATE), _report(path)
        theirs = state or (report.document if report else {})
        if held and not theirs:
            raise InputError(
                f"--out {path} holds other files ({held[0]} ...): name a new or empty folder"
            )
        if held and not fresh and theirs["fingerprint"] != fingerprint:
            raise InputError(
                f"--out {path} holds another run ({theirs['command']}): "
                "name another folder, or add --fresh to replace it"
            )
        if report is not None and report.document.get("finished", True) and not fresh:
            return folder, report
        _writable(path)
        if fresh:
            for name in (*OURS, *(beside.name for beside in path.glob("*.onnx.*.data"))):
                _remove(path / name)
        elif state:
            folder._state = state
        try:
            folder.artifacts.mkdir(parents=True, exist_ok=True)
            folder.write()  # from here on the folder is known as this run's
        except OSError as error:
            raise InputError(f"--out {path} cannot be made: {error.strerror}") from None
        return folder, None

    def finished(self, name: str, key: str) -> tuple[Artifact | None, dict[str, Any]] | None:
        """What the stage that made ``name`` left behind, and what was seen, if it had this ``key``.

        The files are verified by their digests; where one is gone or changed, it is made again.
        """
        record = self._state["stages"].get(name)
        if record is None or record["key"] != key:
            return None
        if record["artifact"] is None:
            return None, record["seen"]
        artifact = Artifact.from_json(record["artifact"], self.artifacts)
        try:
            return artifact.checked(), record["seen"]
        except StageError:
            return None

    def remember(
        self, name: str, key: str, artifact: Artifact | None, seen: Mapping[str, Any]
    ) -> None:
        """Writes down that the stage is finished, so that a later run can take up from here."""
        made = artifact.to_json() if artifact else None
        self._state["stages"][name] = {"key": key, "artifact": made, "seen": dict(seen)}
        self.write()

    def write(self) -> None:
        """The state, on disk."""
        write_text(self.path / STATE, json.dumps(self._state, indent=1) + "\n")


def _state(path: Path) -> dict[str, Any]:
    """The state of a run of ours; empty where there is none, or none that can be read."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return {key: state[key] for key in ("fingerprint", "command", "stages")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _report(path: Path) -> Report | None:
    """The report of a run of ours, which has a fingerprint; ``None`` for anybody else's file."""
    try:
        report = Report.read(path)
    except InputError:
        return None
    return report if "fingerprint" in report.document else None


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
