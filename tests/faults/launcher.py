"""A process that has imported everything and forks one ``compressor`` command after another.

So that a fault hits the work and not the imports. It reads a request a line, JSON:
``{"argv", "cwd", "stdout", "stderr", "limits", "strike"}``; answers with the process id, and once
that has ended with its exit code. ``strike`` is ``[SIGNAL, COUNT, FOLDER]``: the command sends
itself the signal before its COUNT-th change of a name in FOLDER. What it begins is written to the
file ``stages`` of the working folder.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "open")
"""Audit events of Python by which names in a folder change; of ``open`` those that may create."""


def warm(model: str) -> None:
    """Imports what a run needs, by a whole run. From here on artifacts are timed for moments."""
    from compressor import pipeline
    from compressor.measure.protocol import SECONDS

    SECONDS["quick"] = 0.05
    with tempfile.TemporaryDirectory() as folder:
        pipeline.run(
            model, prune=0.5, epochs=1, quantize="int8-dynamic", provider="cpu", threads=(1,),
            out=Path(folder) / "out",
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
    for handle, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        flags = os.O_RDONLY if handle == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(name, flags, 0o644), handle)
    for name, value in request.get("limits", {}).items():
        resource.setrlimit(getattr(resource, name), (value, value))
    sys.argv = ["compressor", *request["argv"]]
    cli.progress = told
    if request.get("strike"):
        strike(*request["strike"])
    code = 0
    try:
        cli.main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(code)


def main() -> None:
    """Serves until standard input ends."""
    warm(sys.argv[1])
    print(json.dumps({"threads": len(os.listdir("/proc/self/task"))}), flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            command(json.loads(line))
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
