"""The server that forks a limited child for each file, and what such a child does."""

from __future__ import annotations

import errno
import gc
import importlib
import io
import json
import os
import re
import select
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

from compressor.errors import InputError, one_line
from compressor.guard.confine import confine, filtering, off_the_network
from compressor.guard.result import header, most, put, write
from compressor.guard.server import OUT_OF_MEMORY, UNCONFINED

Said = tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]
"""What a reader gives: plain JSON values, and tensors by name."""

LONGEST = 2400
"""Characters of a message that are handed back."""


def serve(descriptor: int, modules: Sequence[str]) -> None:
    """Forks a limited child for each request on the socket, until that closes."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tempfile.tempdir = str(Path.cwd())  # children, which cannot write, would find none
    kept = {"network": off_the_network(), "files": filtering()}
    for module in modules:
        importlib.import_module(module)
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(1)}, buffer)
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)  # imports what children will need
    gc.freeze()  # what children never change stays shared with them
    with socket.socket(fileno=descriptor) as parent:
        try:
            parent.send(json.dumps(kept).encode())
            while _served(parent):
                pass
        except ConnectionError:
            pass  # nobody is left to answer
    shutil.rmtree(Path.cwd(), ignore_errors=True)


def _served(parent: socket.socket) -> bool:
    """Whether there was a request, which then was answered."""
    said, passed, _, _ = socket.recv_fds(parent, 1 << 16, 1)
    if not said:
        return False
    request = json.loads(said)
    found(request["reader"])  # its imports are done once, here
    for module in request["imports"]:
        importlib.import_module(module)
    child = os.fork()
    if not child:
        _child(request, passed[0])
    os.close(passed[0])
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([ended, parent.fileno()], [], [], request["seconds"])
    for kill in (os.kill, os.killpg):  # with what it may have started
        with suppress(ProcessLookupError):
            kill(child, signal.SIGKILL)
    os.close(ended)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    parent.send(json.dumps({"code": code, "late": not ready}).encode())
    return True


def found(name: str) -> Callable[..., Said]:
    """The function that ``MODULE:FUNCTION`` names, which is never a file's to say."""
    module, _, function = name.partition(":")
    reader: Callable[..., Said] = getattr(importlib.import_module(module), function)
    return reader


def _child(request: Mapping[str, Any], descriptor: int) -> NoReturn:
    code = UNCONFINED
    try:
        seconds, memory = request["seconds"], int(request["memory"])
        confine(descriptor, seconds=seconds, memory=memory, result=most(memory))
        code = _reading(request, descriptor)
    finally:
        os._exit(code)


def alone() -> None:
    """Serves the one request that stands on standard input, without limits of its own."""
    request = json.loads(sys.stdin.buffer.read())
    torch.set_num_threads(1)
    with Path(request["result"]).open("wb") as file:
        code = _reading(request, file.fileno())
    sys.exit(code)


def _reading(request: Mapping[str, Any], descriptor: int) -> int:
    """Runs the reader and writes what it gives, or why it gives nothing; the exit code."""
    path = Path(request["path"])
    try:
        said, state = found(request["reader"])(path, **request["options"])
        write(descriptor, path, said, state)
    except BaseException as error:
        if _full(error):
            return OUT_OF_MEMORY
        text = str(error)
        if not isinstance(error, InputError):
            text = f"{path} cannot be read ({type(error).__name__}: {one_line(error, 160)})"
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.ftruncate(descriptor, 0)
        put(descriptor, header({"error": text[:LONGEST]}, []))
    return 0


def _full(error: BaseException | None) -> bool:
    """Whether an error, or one that it took the place of, was the want of memory."""
    while error is not None:
        number = getattr(error, "errno", None)
        if isinstance(error, MemoryError) or number in (errno.ENOMEM, errno.EFBIG):
            return True
        if re.search("allocate memory|bad_alloc|not enough memory", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
