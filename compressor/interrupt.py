"""Ctrl-C, also where the code that it meets makes another error of it.

The exception that Python raises on SIGINT ends the command only where nothing on the way takes it
for something else. C and C++ code does: ``torch.tensor`` answers *any* error that its probing
meets with a ``ValueError`` about shapes. So the key press itself is remembered.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_pressed = False


@contextmanager
def listening() -> Iterator[None]:
    """In here SIGINT is remembered, and raises ``KeyboardInterrupt`` as ever.

    For commands: a library leaves the signals to the program that it is part of.
    """
    global _pressed
    before = signal.signal(signal.SIGINT, _press)
    try:
        with heard():
            yield
    finally:
        signal.signal(signal.SIGINT, before)
        _pressed = False


@contextmanager
def heard() -> Iterator[None]:
    """Whatever became of a key press inside, it ends as ``KeyboardInterrupt``."""
    try:
        yield
    except Exception:
        if _pressed:
            raise KeyboardInterrupt from None
        raise
    if _pressed:
        raise KeyboardInterrupt


def _press(number: int, frame: Any) -> None:
    global _pressed
    _pressed = True
    raise KeyboardInterrupt
