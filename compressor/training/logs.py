"""Watching a training run: its logs, its line on the terminal, the trace of a few of its steps."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from compressor.artifact import write_text
from compressor.errors import InputError, one_line

Facts = Mapping[str, float]
Settings = Mapping[str, Any]
Write = Callable[[int, Facts], None]

PROJECT = "compressor"
"""The project of a Weights & Biases run where the user names none."""


class Log(NamedTuple):
    """An open log: ``write(epoch, facts)``, and ``close(well)``: whether training ended well."""

    write: Write
    close: Callable[[bool], None]


def checked(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once.

    Raises :class:`InputError` for one that is unknown, and where its package is not installed.
    """
    for name in names:
        if name not in LOGS:
            raise InputError(f"--log {name!r} is unknown: choose from {', '.join(LOGS)}")
        if name in PACKAGES:
            _package(name)
    return tuple(dict.fromkeys(names))


@contextmanager
def opened(
    names: Sequence[str],
    folder: Path,
    title: str,
    settings: Settings,
    *,
    warn: Callable[[str], None],
    resumed: int = 0,
) -> Iterator[Write]:
    """Gives ``write(epoch, facts)``, which writes to all logs; epochs count from 1.

    Files stand in ``folder`` and are named after ``title``, which must do as a file name.
    ``resumed`` is the last epoch of an earlier training that this one goes on from, 0 for none:
    ``csv``, ``json`` and ``tensorboard`` go on after it, and what they hold of later epochs is
    dropped. ``wandb`` and ``mlflow``, which take nothing back, get a new run.

    A log that fails is closed, ``warn`` is told once, and training goes on with the others. All are
    closed in the end, whatever happens. Raises :class:`InputError` as :func:`checked` does.
    """
    logs: dict[str, Log] = {}

    def lost(name: str, error: Exception) -> None:
        warn(
            f"--log {name} failed, training goes on without it: "
            f"{type(error).__name__}: {one_line(error)}"
        )
        if log := logs.pop(name, None):
            with suppress(Exception):
                log.close(False)

    def write(epoch: int, facts: Facts) -> None:
        told = {key: value for key, value in facts.items() if key != "epoch"}
        for name, log in list(logs.items()):
            try:
                log.write(epoch, told)
            except Exception as error:
                lost(name, error)

    well = False
    try:
        for name in checked(names):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                logs[name] = LOGS[name](folder, title, settings, resumed)
            except Exception as error:
                lost(name, error)
        yield write
        well = True
    finally:
        while logs:
            name, log = logs.popitem()
            try:
                log.close(well)
            except Exception as error:
                lost(name, error)


def line(facts: Facts, epochs: int, seconds: float, resumed: int = 0) -> str:
    """An epoch in words; ``seconds`` are those since training began, or went on after ``resumed``.

    >>> facts = {"epoch": 3, "loss": 0.42, "accuracy": 0.9712, "examples_per_s": 1240.4}
    >>> line(facts, epochs=10, seconds=60.0)
    'epoch 3/10, loss 0.42, accuracy 0.9712, 1240 examples/s, 2 min 20 s left'
    """
    done = facts["epoch"]  # whole at the end of an epoch, and in between before that
    epoch = math.ceil(done)
    parts = [f"epoch {epoch}/{epochs}", f"loss {facts['loss']:.4g}"]
    parts += [f"{key} {value:.4g}" for key, value in facts.items() if _metric(key)]
    if "examples_per_s" in facts:
        rate = facts["examples_per_s"]
        parts.append(f"{rate:.3g} examples/s" if rate < 100 else f"{rate:.0f} examples/s")
    if done < epochs:
        parts.append(f"{lasting(seconds / (done - resumed) * (epochs - done))} left")
    return ", ".join(parts)


def _metric(key: str) -> bool:
    """Whether an entry of the history is the metric on the validation split."""
    return key not in BESIDE and not key.startswith("train_")


BESIDE = ("epoch", "loss", "rate", "seconds", "examples_per_s")
"""What else an epoch's entry in the history holds, and ``train_METRIC`` where it was asked for."""


def lasting(seconds: float) -> str:
    """A duration in words: ``2.3 s``, ``45 s``, ``3 min 05 s``, ``2 h 30 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


@contextmanager
def profiled(path: Path | None) -> Iterator[Callable[[], None]]:
    """Gives ``step()``, to be called after each step of training; without a ``path`` it is idle.

    The third to fifth step are traced, once things have settled, and written to ``path`` for
    chrome://tracing or ui.perfetto.dev. Training of fewer steps leaves an empty trace, or none.
    """
    if path is None:
        yield lambda: None
        return
    from torch.profiler import profile, schedule

    path.parent.mkdir(parents=True, exist_ok=True)
    with profile(
        schedule=schedule(wait=1, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda trace: trace.export_chrome_trace(str(path)),
    ) as trace:
        yield trace.step


def _csv(folder: Path, title: str, settings: Settings, resumed: int) -> Log:
    """``TITLE.csv``: a row for each epoch, a column for each fact; a cell may be empty."""
    path = folder / f"{title}.csv"
    rows: list[Mapping[str, Any]] = list(_until(resumed, csv.DictReader(_lines(path))))
    columns = list(rows[0]) if rows else ["epoch"]

    def text(some: Sequence[Mapping[str, Any]], *, header: bool) -> str:
        whole = io.StringIO()
        table = csv.DictWriter(whole, columns, lineterminator="\n")
        if header:
            table.writeheader()
        table.writerows(some)
        return whole.getvalue()

    def write(epoch: int, facts: Facts) -> None:
        rows.append({"epoch": epoch, **facts})
        if more := [key for key in facts if key not in columns]:
            columns.extend(more)
            write_text(path, text(rows, header=True))
        else:
            _add(path, text(rows[-1:], header=False))

    write_text(path, text(rows, header=True))
    return Log(write, _nothing)


def _json(folder: Path, title: str, settings: Settings, resumed: int) -> Log:
    """``TITLE.jsonl``: an object for each epoch; what is not finite is null."""
    path = folder / f"{title}.jsonl"

    def write(epoch: int, facts: Facts) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in facts.items()}
        _add(path, json.dumps({"epoch": epoch, **finite}) + "\n")

    found = _until(resumed, filter(None, map(_object, _lines(path))))
    write_text(path, "".join(json.dumps(row) + "\n" for row in found))
    return Log(write, _nothing)


def _tensorboard(folder: Path, title: str, settings: Settings, resumed: int) -> Log:
    """Event files in ``tensorboard/TITLE``: ``tensorboard --logdir FOLDER/tensorboard``."""
    place = folder / "tensorboard" / title
    place.mkdir(parents=True, exist_ok=True)
    package = _package("tensorboard").__name__
    # Its SummaryWriter writes in a thread: when the disk is full that dies without a word, and
    # training waits forever for room in its queue.
    records = import_module(f"{package}.record_writer")
    summary = import_module(f"{package}.summary")
    protocol = import_module(f"{package}.proto.event_pb2")
    # Its own writer puts the machine's name there. The end keeps two of one second apart.
    name = f"events.out.tfevents.{int(time.time())}.compressor.{resumed}"
    file = records.RecordWriter(str(place / name))

    def add(step: int, **what: Any) -> None:
        file.write(protocol.Event(step=step, wall_time=time.time(), **what).SerializeToString())

    def write(epoch: int, facts: Facts) -> None:
        for key, value in facts.items():
            add(epoch, summary=summary.scalar(key, value))
        file.flush()

    add(0, file_version="brain.Event:2")
    # A start hides the events of its step and later: of epochs that are trained again.
    start = protocol.SessionLog(status=protocol.SessionLog.START)
    add(resumed + 1, session_log=start)
    if not resumed:
        rows = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
        table = f"| setting | value |\n|---|---|\n{rows}"
        add(0, summary=summary.text("settings", table))
    file.flush()
    return Log(write, lambda well: file.close())


def _wandb(folder: Path, title: str, settings: Settings, resumed: int) -> Log:
    """A run of Weights & Biases, kept in ``wandb``; it goes online only by ``WANDB_MODE``."""
    run = _package("wandb").init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=title,
        config={**settings, "resumed": resumed},
        dir=os.environ.get("WANDB_DIR", str(folder)),
        mode=os.environ.get("WANDB_MODE", "offline"),
        reinit="create_new",  # a run that the caller has open is left alone
    )
    return Log(
        lambda epoch, facts: run.log(dict(facts), step=epoch),
        lambda well: run.finish(exit_code=0 if well else 1),
    )


def _mlflow(folder: Path, title: str, settings: Settings, resumed: int) -> Log:
    """A run of MLflow where the user keeps them: ``MLFLOW_TRACKING_URI``, else the disk.

    Within a run that the caller has open it is a nested one.
    """
    mlflow = _package("mlflow")
    run = mlflow.start_run(run_name=title, nested=True).info.run_id
    try:
        mlflow.log_params({**settings, "resumed": resumed})
    except Exception:
        mlflow.end_run("FAILED")  # or the next run of this process would be nested in it
        raise
    return Log(
        lambda epoch, facts: mlflow.log_metrics(dict(facts), step=epoch, run_id=run),
        lambda well: mlflow.end_run("FINISHED" if well else "FAILED"),
    )


LOGS: dict[str, Callable[[Path, str, Settings, int], Log]] = {
    "csv": _csv,
    "json": _json,
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
"""What a training run can be written to: ``opener(folder, title, settings, resumed)``."""

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
"""The package that a log is written with."""

QUIET = {
    "wandb": ("WANDB_ERROR_REPORTING", "false"),
    "mlflow": ("MLFLOW_DISABLE_TELEMETRY", "true"),
}
"""What keeps a package from reporting to its makers, unless the user has said otherwise."""


def _package(log: str) -> ModuleType:
    name = PACKAGES[log]
    if log in QUIET:
        os.environ.setdefault(*QUIET[log])
    try:
        module = import_module(name)
        if getattr(module, "__file__", None) is None:
            # The folder of runs that wandb leaves behind imports as an empty package.
            raise ImportError(f"No module named {name!r}")
    except ImportError as error:
        raise InputError(f"--log {log!r}: {one_line(error)}: pip install {name}") from None
    return module


def _nothing(well: bool) -> None:
    """Closes what was closed after each row."""


def _add(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text)


def _lines(path: Path) -> list[str]:
    """The file's lines, but for a last one that was cut off; none where there is no file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return text[: text.rfind("\n") + 1].splitlines()


def _object(text: str) -> Mapping[str, Any] | None:
    """The JSON object that a line holds, if it does."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _until(last: int, rows: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The rows of the epochs up to ``last``; what has no epoch is no row of ours."""
    for row in rows:
        with suppress(KeyError, TypeError, ValueError):
            if int(row["epoch"]) <= last:
                yield row
