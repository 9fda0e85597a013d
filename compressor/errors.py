"""What can go wrong, and the exit code that the command line turns it into.

::

    CompressorError
    ├── InputError            2   what the user gave is wrong: what, the value seen, what to do
    │   └── ProviderAbsent    -   measure.runtime: an execution provider is not there
    ├── BudgetError           1   a budget that was asked for does not hold
    ├── StageError            3   a stage failed; what was finished before it is kept
    │   ├── Unsuitable        -   a stage has nothing to do on this model
    │   └── Lost              -   training.world: another process of the run died
    └── WorkerFailed          -   measure.process: a worker died, hung or gave an error

Those without an exit code become a row with the reason, and the run goes on.
"""

from __future__ import annotations

import signal


class CompressorError(Exception):
    """Base of every error raised on purpose; its message is one line for a person."""

    exit_code: int = 3


class InputError(CompressorError):
    """The user's input is wrong. The message says what, the value seen and what to do."""

    exit_code = 2


class BudgetError(CompressorError):
    """A budget or gate that was asked for does not hold."""

    exit_code = 1


class StageError(CompressorError):
    """A stage failed. Artifacts of the stages before it stay on disk."""

    exit_code = 3


class Unsuitable(StageError):
    """A stage has nothing to do on this model; the run goes on and the report says why."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """The first sentence of an error that somebody else raised, fit for one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def signal_name(number: int) -> str:
    """What a process was ended by, for a message."""
    try:
        name = signal.Signals(number).name
    except ValueError:  # a real-time signal has no name
        return f"signal {number}"
    return f"{name} (out of memory?)" if name == "SIGKILL" else name
