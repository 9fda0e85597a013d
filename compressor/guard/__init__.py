"""Files that nobody vouches for are read in a child process that can do little, and not for long.

On Linux a server of ours, which has imported PyTorch once, forks a child for each file. The child
has the file's path, one descriptor for its result, an address space, a CPU time and a result of
limited size, and is killed when its time is up. It dies with the server, and the server with its
parent. The server has no network where the kernel lets it give that up; on x86-64 a filter of
system calls also denies each child sockets, programs, processes, signals to others and the opening
of any file for writing (:func:`holding` says what holds here). What a child keeps is reading: it
can open what the user can open.

What comes back is one safetensors file in memory. Its header has JSON that names the tensors; the
parent believes neither the JSON nor the child. Anything else than a sound result is one
:class:`InputError`. On other systems the child is a fresh process, with a limit of wall-clock time
alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import InputError, one_line, signal_name
from compressor.guard import server
from compressor.guard.server import OUT_OF_MEMORY, UNCONFINED, close, start

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["close", "guarded", "holding", "start", "unsound"]

BASE, FACTOR = 512 << 20, 4
"""Bytes that a child may take on top of the server's own: ``BASE``, and ``FACTOR`` for each byte of
the file. Reading a checkpoint takes two: what was read, and a copy of what is not contiguous."""

SECONDS, RATE = 30.0, 20e6
"""Time that a child has: some for any file, and more at the bytes a second of a slow disk."""

LONGEST = 600
"""Characters of a child's message that are passed on."""


def guarded(
    reader: str,
    path: Path,
    *,
    seconds: float | None = None,
    memory: int | None = None,
    imports: Sequence[str] = (),
    **options: str | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What ``reader(path, **options)`` gives: plain JSON values, and tensors by their names.

    ``reader`` is ``MODULE:FUNCTION``; ``imports`` are modules that it would import on its way and
    that a child cannot, since they make folders.
    ``seconds`` is the time that the child has, of wall clock and of CPU; ``memory`` are the bytes
    that it may take, and those of its result. Both grow with the file where they are ``None``.
    Tensors are dense, contiguous, on the CPU and bit for bit what was read; those that were one
    tensor under several names still are. Their memory is that of the result: nothing is copied.

    Raises :class:`InputError`, one line, for what the reader refuses, and for a child that takes
    more time or memory, crashes, or hands back anything unsound; :class:`CompressorError` where no
    child could be started.
    """
    full = Path(os.path.abspath(path))  # noqa: PTH100 - a link stays the name that the user gave
    size = full.stat().st_size if full.is_file() else 0
    seconds = SECONDS + size / RATE if seconds is None else seconds
    memory = BASE + FACTOR * size if memory is None else memory
    from compressor.guard.result import Result, most

    request = {
        "reader": reader,
        "imports": list(imports),
        "path": str(full),
        "options": options,
        "seconds": seconds,
        "memory": memory,
    }
    with Result() as result:
        ended = (server.forked if server.FORKING else server.spawned)(request, result)
        if reason := _stopped(ended, seconds, memory, size):
            raise InputError(_printable(f"{path} {reason}"))
        try:
            said, state = result.taken(most(memory))
        except Exception as error:  # whatever a header of bad intent can raise
            raise unsound(path, error) from None
    if "error" in said:
        raise InputError(_printable(said["error"].replace(str(full), str(path))))
    return said["said"], state


def _stopped(ended: Mapping[str, Any], seconds: float, memory: int, size: int) -> str | None:
    """Why a child that ended so has no result; ``None`` where it should have one."""
    code, ending = ended["code"], signal_name(-ended["code"])
    if ended["late"] or ending == "SIGXCPU":
        return (
            f"took longer than {seconds:g} s to read: it is damaged, or made to take for ever; "
            "save it again"
        )
    if code == OUT_OF_MEMORY:
        return (
            f"needs more than {memory / 1e6:,.0f} MB to read, for a file of {size / 1e6:,.1f} MB: "
            "it is damaged, or made to fill the memory; save it again"
        )
    if code == UNCONFINED:
        return (
            "was not read: this machine lets no limits be set on the process that reads it; use "
            "another"
        )
    how = f"crashed ({ending})" if code < 0 else f"ended with exit code {code}"
    return f"is damaged, or made to do this: its reader {how}; save it again" if code else None


def holding() -> dict[str, bool]:
    """Which limits hold for children on this machine: ``memory`` (address space and CPU time),
    ``network`` (none) and ``files`` (none written, no program started)."""
    if not server.FORKING:
        return {"memory": False, "network": False, "files": False}
    return {"memory": True, **server.kept()}


def unsound(path: Path, error: Exception) -> InputError:
    """What to raise for a result that no reader of ours gives."""
    return InputError(
        _printable(
            f"{path}: its reader handed back what it cannot have read ({one_line(error, 100)}): "
            "do not use this file"
        )
    )


def _printable(text: str) -> str:
    """One line without control characters, nor those that turn the direction of writing."""
    line = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
