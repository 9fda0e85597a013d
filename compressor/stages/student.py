"""Another architecture, built anew, to be taught by the original."""

from __future__ import annotations

from pathlib import Path

from compressor.artifact import Torch
from compressor.errors import InputError
from compressor.loading import torchfile
from compressor.task import Task


def student(artifact: Torch, task: Task, into: Path, *, factory: str) -> Torch:
    """Writes the model that ``factory`` builds, one of those that the command line names
    (``--student``). What follows prunes, teaches and quantizes that model.

    Its weights are those that the factory gives it. Raises :class:`InputError` for a factory that
    the command line does not name.
    """
    suited(task, factory=factory)
    model = task.students[factory]()
    path = into.with_name(into.name + torchfile.SUFFIX)
    torchfile.write(path, model, {"factory": factory, "arguments": {}, "student": True})
    return artifact.then(path, "torch", "student", {"factory": factory})


def suited(task: Task, *, factory: str) -> None:
    """Raises :class:`InputError` for a factory that the command line does not name."""
    if factory not in task.students:
        raise InputError(
            f"student {factory!r} is code to run: add --student {factory} if you trust it"
        )
