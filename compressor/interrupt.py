"""Ctrl-C, also where the code that it meets makes another error of it.

The exception that Python raises on SIGINT ends the command only where nothing on the way takes it
for something else. C and C++ code does: ``torch.tensor`` answers *any* error that its probing
meets with a ``ValueError`` about shapes. So the key press itself is remembered.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

_pressed: str | None = None
"""What was said with the key press, if there was one."""


@contextmanager
def listening() -> Iterator[None]:
    """In here SIGINT is remembered, and raises ``KeyboardInterrupt`` as ever.

    For commands: a library leaves the signals to the program that it is part of. Where SIGINT is
    ignored, as in what a shell runs in the background, or somebody else's, it stays so.
    """
    global _pressed
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, lambda number, frame: stop())
    try:
        with heard():
            yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _pressed = None


@contextmanager
def heard() -> Iterator[None]:
    """Whatever became of a key press inside, it ends as ``KeyboardInterrupt``."""
    try:
        yield
    except Exception:
        if _pressed is not None:
            raise KeyboardInterrupt(_pressed) from None
        raise
    if _pressed is not None:
        raise KeyboardInterrupt(_pressed)


def stop(why: str = "") -> NoReturn:
    """What a key press does; ``why`` where it was none."""
    global _pressed
    _pressed = why
    raise KeyboardInterrupt(why)
