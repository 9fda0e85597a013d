"""A process that has imported everything and forks one ``compressor`` command after another.

So that a fault hits the work and not the imports. It is started with a model file to warm up on,
reads a request a line, JSON, and answers with the process id, and with the exit code once that has
ended. ``strike`` is ``[SIGNAL, COUNT, FOLDER]``: the command sends itself the signal before its
COUNT-th change of a name in FOLDER. What it begins is written to ``stages`` in its folder.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "open")
"""Audit events of Python by which names in a folder change; of ``open`` those that may create."""

OVERRIDE = 0b110
"""Capabilities by which root reads and writes what its permissions forbid."""


def warm(model: str) -> None:
    """Imports what a run needs, by a whole run. From here on artifacts are timed for moments."""
    from compressor import pipeline
    from compressor.measure.protocol import SECONDS

    SECONDS["quick"] = 0.05
    with suppress(ImportError):  # where it is, PyTorch uses it, and its watcher is a thread
        from tqdm import tqdm

        tqdm.monitor_interval = 0
    with tempfile.TemporaryDirectory() as folder:
        pipeline.run(
            model, data="breast-cancer", prune=0.5, epochs=1, quantize="int8-dynamic",
            provider="cpu", threads=(1,), out=Path(folder) / "out",
        )  # fmt: skip


def strike(number: int, count: int, folder: str) -> None:
    """Sends this process the signal before its ``count``-th change of a name in ``folder``."""
    seen = 0

    def audit(event: str, given: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in CHANGES or not isinstance(given[0], str | os.PathLike):
            return
        if event == "open" and not (given[2] or 0) & (os.O_CREAT | os.O_TRUNC):
            return
        if folder in os.path.abspath(given[0]):  # noqa: PTH100 - Path would be audited again
            seen += 1
            if seen == count:
                os.kill(os.getpid(), number)

    sys.addaudithook(audit)


def plain() -> None:
    """Makes permissions hold for root, too; of others they do."""
    libc = ctypes.CDLL(None, use_errno=True)
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: low words, then high ones
    if libc.capget(head, sets):
        raise OSError(ctypes.get_errno(), "capget")
    sets[0] &= ~OVERRIDE
    sets[1] &= ~OVERRIDE
    if libc.capset(head, sets):
        raise OSError(ctypes.get_errno(), "capset")


@contextmanager
def told() -> Iterator[Callable[[int, int, str], None]]:
    """Progress that is written to a file, a line for what begins."""
    with Path("stages").open("a", encoding="utf-8", buffering=1) as file:
        yield lambda done, total, text: print(text, file=file)


def command(request: dict[str, Any]) -> None:
    """Becomes the command; does not return."""
    from compressor import cli

    os.setsid()
    os.chdir(request["cwd"])
    os.environ["COMPRESSOR_TEST"] = request["cwd"]
    os.environ["TMPDIR"] = tempfile.tempdir = request["cwd"]
    for handle, name in enumerate((os.devnull, "stdout", "stderr")):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if handle else os.O_RDONLY
        os.dup2(os.open(name, flags, 0o644), handle)
    faulthandler.register(signal.SIGQUIT)  # where it stands, asked of a command that hangs
    sys.argv = ["compressor", *request["argv"]]
    cli.progress = told
    for name, value in request.get("limits", {}).items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if request.get("plain"):
        plain()
    if request.get("strike"):
        strike(*request["strike"])
    code = 70
    try:
        cli.main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def main() -> None:
    """Serves until standard input ends."""
    warm(sys.argv[1])
    threads = len(list(Path("/proc/self/task").iterdir()))
    print(json.dumps({"threads": threads}), flush=True)  # forked with more, some would be missing
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            command(json.loads(line))
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
