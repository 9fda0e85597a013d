"""Ctrl-C that other code makes another error of."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import pytest
import torch

from compressor.interrupt import heard, listening


class Pressed:
    """A sequence whose items nobody sees: the user presses Ctrl-C there."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        return 0.0


def test_torch_makes_another_error_of_it() -> None:
    """Why the module is there: without it this is a ValueError about shapes."""
    with pytest.raises(ValueError, match="shape"):
        torch.tensor(Pressed())


def test_one_that_became_another_error() -> None:
    with pytest.raises(KeyboardInterrupt), listening():
        torch.tensor(Pressed())


def test_one_that_was_swallowed() -> None:
    with pytest.raises(KeyboardInterrupt), listening(), suppress(Exception):
        torch.tensor(Pressed())


def test_it_goes_no_further_than_the_part_that_heard_it() -> None:
    def parts() -> None:
        with heard(), suppress(Exception):
            torch.tensor(Pressed())
        pytest.fail("it went on")

    with pytest.raises(KeyboardInterrupt), listening():
        parts()


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ZeroDivisionError), listening():
        raise ZeroDivisionError


def test_one_press_ends_one_command() -> None:
    with pytest.raises(KeyboardInterrupt), listening():
        os.kill(os.getpid(), signal.SIGINT)
    with heard():  # in a library call of the same process
        pass


def test_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), listening():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
