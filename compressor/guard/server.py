"""The parent's side of the process that forks a child for each file: see :mod:`.child`.

PyTorch is not imported here: a command starts the server first, which imports it meanwhile.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import CompressorError, one_line

if TYPE_CHECKING:
    from compressor.guard.result import Result

FORKING = sys.platform == "linux"

OUT_OF_MEMORY, UNCONFINED = 81, 82
"""Exit codes of a child: one that has no memory left may be unable to say more."""

ENVIRONMENT = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH",
               "SYSTEMROOT", "TMPDIR", "VIRTUAL_ENV")  # fmt: skip
"""Variables that a child inherits; no token or password is among them."""

SINGLE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Only a process of one thread can be forked safely."""


class Server:
    """The process that forks, which imports ``modules`` first; it is not waited for."""

    def __init__(self, modules: Sequence[str] = ()) -> None:
        self.folder = tempfile.mkdtemp()
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                _python(f"serve({theirs.fileno()}, {list(modules)!r})"),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=self.folder,
                env=_environment(),
                start_new_session=True,  # Ctrl-C reaches the parent alone, which then closes us
            )
        self._kept: dict[str, bool] | None = None

    @property
    def kept(self) -> dict[str, bool]:
        """What it could give up, once it is there; ``OSError`` where it does not come up."""
        if self._kept is None:
            self._kept = self._answer(120.0)
        return self._kept

    def ask(self, request: Mapping[str, Any], descriptor: int) -> dict[str, Any]:
        """How the child that served ``request`` ended; ``OSError`` where the server did."""
        assert self.kept is not None  # it is there
        socket.send_fds(self.socket, [json.dumps(request).encode()], [descriptor])
        return self._answer(request["seconds"] + 30.0)

    def _answer(self, seconds: float) -> dict[str, Any]:
        self.socket.settimeout(seconds)
        said = self.socket.recv(1 << 16)
        if not said:
            raise ConnectionError("it ended")
        return dict(json.loads(said))

    def close(self) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


SERVERS: dict[int, Server] = {}
"""By process id: a process that was forked from this one must not speak to its server."""

LOCK = threading.Lock()


def start(*modules: str) -> None:
    """Has a server come up that imports ``modules``, while this process goes on with its work.

    For a command that knows that it will read a file. Where that fails, reading says so.
    """
    if FORKING:
        with LOCK, suppress(OSError):
            if os.getpid() not in SERVERS:
                SERVERS[os.getpid()] = Server(modules)


def kept() -> dict[str, bool]:
    """What the server could give up; starts it where there is none."""
    with LOCK:
        return dict(_asked(lambda server: server.kept))


def forked(request: Mapping[str, Any], result: Result) -> dict[str, Any]:
    """How the child ended that read for ``request`` and wrote to ``result``."""
    with LOCK:
        return _asked(lambda server: server.ask(request, result.descriptor), result.emptied)


def _asked(
    question: Callable[[Server], dict[str, Any]], again: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """The answer to ``question``, put a second time, after ``again``, if the server is gone."""
    for _ in range(2):  # whoever ended the server, it was not this file's child
        try:
            return question(_there())
        except BaseException as error:
            # After Ctrl-C too: an answer left over would be taken for that to the next file.
            if os.getpid() in SERVERS:
                SERVERS.pop(os.getpid()).close()
            if not isinstance(error, OSError):
                raise
            again()
            reason = one_line(error)
    raise CompressorError(
        f"the process that reads files does not come up, or was ended twice ({reason}): try again"
    )


def _there() -> Server:
    if os.getpid() not in SERVERS:
        SERVERS[os.getpid()] = Server()
    return SERVERS[os.getpid()]


def spawned(request: Mapping[str, Any], result: Result) -> dict[str, Any]:
    """The same where there is no server: a fresh process, with its time limited."""
    try:
        ended = subprocess.run(
            _python("alone()"),
            input=json.dumps({**request, "result": result.path}).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=Path(result.path).parent,
            env=_environment(),
            timeout=request["seconds"],
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"code": 0, "late": True}
    return {"code": ended.returncode, "late": False}


def _python(call: str) -> list[str]:
    # -P: a json.py where the user stands must not stand in for Python's.
    return [sys.executable, "-P", "-c", f"from compressor.guard import child; child.{call}"]


def _environment() -> dict[str, str]:
    return {**{name: os.environ[name] for name in ENVIRONMENT if name in os.environ}, **SINGLE}


def close() -> None:
    """Ends the server, which takes 230 MB; the next file starts another."""
    with LOCK:
        server = SERVERS.pop(os.getpid(), None)
        if server is not None:
            server.close()


atexit.register(close)
