"""The run: a recipe's steps turn one artifact into the next, and every one is measured."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor import recipe as recipes
from compressor.artifact import Artifact, copy, write_text
from compressor.errors import InputError
from compressor.loading import formats
from compressor.loading.torchfile import state_digest
from compressor.measure import protocol
from compressor.measure.environment import cores, installed
from compressor.measure.turns import disabled
from compressor.measurement import PLACES, SETTINGS, TORCH, Target
from compressor.pipeline import own, verdict
from compressor.pipeline.document import SAMPLES, document, write_samples
from compressor.pipeline.entries import behaviour
from compressor.pipeline.folder import Folder, key_of
from compressor.pipeline.given import TorchOnly, graph_path, opened
from compressor.pipeline.making import SHARED, Maker, follow
from compressor.pipeline.measuring import Measured, leave, measure, race, rival
from compressor.pipeline.robustness import robustness as stress
from compressor.pipeline.verdict import Row
from compressor.recipe import BASELINE, Recipe, Step
from compressor.report import Report
from compressor.stages import bind, fitting
from compressor.task import Kind, Splits, Task
from compressor.training import logs
from compressor.training.recovery import TRACE
from compressor.training.world import Lost, World, joined

if TYPE_CHECKING:
    from torch import nn

MAX_DROP = 0.01
Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, text: str) -> None:
    """A progress that shows nothing."""


def run(
    model: str | Path | nn.Module,
    *,
    data: Any = None,
    arch: Any = None,
    inputs: Sequence[str] = (),
    domains: Sequence[str] = (),
    recipe: str | Path | Sequence[Step] | None = None,
    prune: float | str | None = None,
    keep: Sequence[str] = (),
    epochs: int | None = None,
    distill: bool | None = None,
    quantize: str | None = None,
    teacher: Any = (),
    teacher_arch: Any = None,
    student: Any = None,
    loss: Any = None,
    augment: Any = (),
    folds: int | None = None,
    train: Mapping[str, Any] = {},
    log: str | Sequence[str] = (),
    robustness: bool = False,
    processes: int | None = None,
    weights: str | None = None,
    trust_pickle: bool = False,
    max_drop: float | None = None,
    time_budget: float | None = None,
    metric: Any = None,
    kind: Kind | None = None,
    provider: str | Sequence[str] | None = None,
    batch: Sequence[int] = (1,),
    threads: Sequence[int] | None = None,
    bench_time: str = "quick",
    out: str | Path | None = None,
    fresh: bool = False,
    seed: int = 0,
    command: str = "",
    progress: Progress = silent,
) -> Report:
    """Compresses ``model``, measures every artifact of the way and gives the report.

    ``model`` is a path or a live ``nn.Module`` (which is copied, never changed). An ONNX file is
    its own baseline; it can be quantized, and all else needs the PyTorch model. ``inputs`` says the
    open axes of an ONNX file, ``NAME=SHAPE[:DTYPE[<HIGH]]``, and ``domains`` which operators it may
    have that neither ONNX nor onnxruntime defines. ``data`` is a data
    spec, ``(train, test)`` DataLoaders, datasets or arrays, or a dict of splits. ``teacher`` is a
    path or a module, or several; ``loss``, ``augment`` and ``metric`` may be functions. ``train``
    are further settings of the recovery (:class:`compressor.training.settings.Training`). The other
    arguments are the flags of ``compressor run``; see its ``--help``. The report and all artifacts
    lie in ``out``, by default ``reports/<name>``.

    Started by ``torchrun``, all processes train together; the first does everything else.

    Raises :class:`InputError` before any work when an argument is wrong, :class:`StageError` when a
    stage fails (artifacts finished before it are kept and reused by the next run).
    """
    began = time.monotonic()
    protocol.check(bench_time, seed)
    targets = targets_of(provider, batch, threads, bench_time)
    if max_drop is not None and not 0 <= max_drop < float("inf"):
        raise InputError(f"--max-drop {max_drop!r}: give a number of 0 or more, such as 0.01")
    if time_budget is not None and not 0 < time_budget < float("inf"):
        raise InputError(f"--time-budget {time_budget!r}: give seconds, more than 0, such as 600")
    budget = MAX_DROP if max_drop is None else max_drop
    functions: own.Functions = {}
    settings = own.training(loss, augment, folds, train, functions)
    kept = [log] if isinstance(log, str) else list(log)
    logs.checked([name for name in kept if name != TRACE])
    metric = None if metric is None else own.called(metric, "--metric", functions)
    steps = plan(
        recipe,
        prune=prune,
        keep=keep,
        epochs=epochs,
        distill=distill,
        quantize=quantize,
        student=None if student is None else own.called(student, "--student", {}),
        train=settings,
    )
    masters = teacher if isinstance(teacher, tuple | list) else (teacher,)
    only = TorchOnly(arch, masters, teacher_arch, student, weights)
    graph = graph_path(model, steps, only, inputs, domains, trusted=trust_pickle)
    with joined(processes) as around, ExitStack() as stack:
        task, file = stack.enter_context(
            opened(
                model, graph, steps, only, inputs, domains, trusted=trust_pickle, data=data,
                metric=metric, kind=kind, seed=seed, functions=functions,
            )
        )  # fmt: skip
        learning = distill is not False and any(step.stage in SHARED for step in steps)
        if masters and not learning:
            raise InputError("--teacher: nothing is learnt from it here: add --distill")
        until = None if time_budget is None else began + time_budget
        task = replace(task, target=targets[0], budget=budget, until=until, logs=tuple(kept))
        for step in steps:
            fitting(step, task)
        path = Path(out) if out is not None else Path("reports") / task.name
        if not around.leader:
            return Report(follow(task, around), path)
        state = file.digest if file else state_digest(task.model().state_dict())
        factory = arch if isinstance(arch, str) else None
        # What the model computes stands for its code, which no file shows.
        reads = key_of(
            model=state,
            does=None if file else behaviour(task),
            data=data_digest(task.splits),
            others=[state_digest(build().state_dict()) for build in others(task)],
            functions=own.codes(functions),
        )
        fingerprint = key_of(
            reads=reads,
            source=task.source,
            inputs=[asdict(one) for one in task.inputs],
            recipe=[step.to_json() for step in steps],
            targets=[target.to_json() for target in targets],
            bench_time=bench_time,
            max_drop=max_drop,
            time_budget=time_budget,
            metric=task.metric,
            robustness=robustness,
            seed=seed,
        )
        with leading(around) as hand:
            folder, stored = Folder.open(path, fingerprint, command, fresh=fresh)
            if stored is not None:
                hand(stored.document)
                return replace(stored, stored=True)
            stack.enter_context(folder)
            done, total = 0, len(steps) + 2 + robustness + len(targets)

            def say(text: str) -> None:
                nonlocal done
                progress(done, total, text)
                done += 1

            loading = round(time.monotonic() - began, 3)
            task = replace(task, watch=lambda text: progress(done - 1, total, text))
            maker = Maker(task, folder, reads, say, around, file)
            maker.stages.append(
                {"stage": "load", "seconds": loading, "peak_rss_bytes": None, "cached": False}
            )
            maker.execute(steps)
            measured = measure(
                task,
                list(maker.onnx.values()),
                maker.skipped,
                targets,
                bench_time,
                say,
                lambda text: progress(done - 1, total, text),
                arch=factory,
            )
            say("report")
            found = document(task, maker, measured, targets, budget)
            if robustness:
                say("robustness")
                harder = stress(task, maker.onnx, maker.float_of, seed=seed, progress=task.watch)
                for row in found["artifacts"]:
                    row["robustness"] = harder.get(row["name"])
            where = _elsewhere(found, task, maker, measured, targets, bench_time, budget, factory)
            command = command or f"compressor.run({task.name}, ...)"
            report = Report(
                {
                    "schema": 1,
                    "name": task.name,
                    "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    "command": command,
                    "fingerprint": fingerprint,
                    "model": {
                        "path": Path(model).name if isinstance(model, str | Path) else None,
                        "sha256": formats.file_digest(model) or state,
                        "trusted": trust_pickle,  # its code was executed
                    },
                    **found,
                },
                folder.path,
            )
            with folder.results() as beside:
                write_samples(beside / SAMPLES, measured.raw)
                write_text(beside / "recipe.toml", recipes.write(maker.resolved, command))
                _write_best(beside, maker.onnx[found["best"]], where)
                report.write(beside)
            hand(report.document)
            return report


def plan(
    recipe: str | Path | Sequence[Step] | None = None,
    *,
    prune: float | str | None = None,
    keep: Sequence[str] = (),
    epochs: int | None = None,
    distill: bool | None = None,
    quantize: str | None = None,
    student: str | None = None,
    train: Mapping[str, Any] = {},
) -> Recipe:
    """The steps of a recipe after the flags, named and bound: what ``--dry-run`` prints."""
    if epochs is not None and epochs < 0:
        raise InputError(f"--epochs {epochs}: give 0 (no recovery) or more")
    given = recipes.read(Path(recipe)) if isinstance(recipe, str | Path) else list(recipe or ())
    edited = recipes.edited(
        given,
        prune=prune,
        keep=keep,
        epochs=epochs,
        distill=distill,
        quantize=quantize,
        student=student,
        train=train,
    )
    return bind(recipes.named(edited))


def others(task: Task) -> list[Callable[[], nn.Module]]:
    """What builds the teachers and students that were handed in."""
    return [*task.teachers, *task.students.values()]


@contextmanager
def leading(around: World) -> Iterator[Callable[[Row], None]]:
    """At the end the other processes get the report that was handed on, or learn that there is
    none."""
    report: list[Row] = []
    try:
        yield report.append
    except (Lost, KeyboardInterrupt):
        raise  # nobody is there to hear
    except BaseException:
        with suppress(Lost):
            around.told({})
        raise
    with suppress(Lost):
        around.told(report[0])


def targets_of(
    provider: str | Sequence[str] | None,
    batch: Sequence[int],
    threads: Sequence[int] | None,
    bench_time: str = "quick",
) -> list[Target]:
    """Every combination, the primary target first. Threads default to 1 and all cores, providers to
    cpu, cuda and, where it is installed, openvino; PyTorch's own rows come with more time."""
    if provider is None:
        provider = ("cpu", "cuda", *(["openvino"] if installed("openvino") else []))
        provider += {"quick": (), "normal": ("torch",), "full": ("torch", "torch-compile")}[
            bench_time
        ]
    if isinstance(provider, str):
        provider = [name.strip() for name in provider.split(",")]
    chosen = list(dict.fromkeys(threads if threads is not None else (1, cores())))
    for name in provider:
        if name not in PLACES:
            raise InputError(f"--provider {name!r} is unknown: choose from {', '.join(PLACES)}")
    for flag, values in (("--batch", batch), ("--threads", chosen)):
        for value in values:
            if value < 1:
                raise InputError(f"{flag} {value}: give 1 or more")
    if not (provider and batch and chosen):
        raise InputError("--provider, --batch and --threads each need at least one value")
    found: list[Target] = []
    for name in dict.fromkeys(provider):
        runtime, device = PLACES[name]
        if runtime in TORCH and not found:
            raise InputError(
                f"--provider {name} first: what is recommended runs without PyTorch; put another "
                f"first, such as cpu,{name}"
            )
        # Threads are CPU threads: a GPU is measured with the first count only.
        counts = chosen if device == "cpu" else chosen[:1]
        found += [
            Target(runtime, device, size, count)
            for size in dict.fromkeys(batch)
            for count in counts
        ]
    return found


def _elsewhere(
    found: dict[str, Any],
    task: Task,
    maker: Maker,
    measured: Measured,
    targets: Sequence[Target],
    bench_time: str,
    budget: float,
    factory: str | None,
) -> Row:
    """Races the recommended artifact in the other runtimes, and says in ``found`` how it went.

    Gives the row of the runtime that it is handed on with.
    """
    best, primary = maker.onnx[found["best"]], targets[0]
    ran = [row for row in measured.rows if row["artifact"] == best.name]
    other, said = rival(ran, best.name, primary), None
    there = any(row["primary"] and "skipped" not in row for row in ran)
    if other is not None and there:
        said = race(task, best, primary, other, measured, bench_time, budget)
    if said is not None:
        found["recommendation"] += f" {verdict.runtimes(said)}"
    found["runtimes"] = said
    found["pytorch"] = (
        leave(task, maker.onnx[BASELINE], best, targets, measured, bench_time, factory)
        if there
        else []
    )
    for one in found["pytorch"]:
        found["recommendation"] += f" {verdict.left(one)}"
    return home(ran, primary, said)


def data_digest(splits: Splits | None) -> str:
    if splits is None:
        return ""
    parts = (splits.train, splits.validate, splits.calibrate, splits.test)
    return key_of(parts=[part.digest() for part in parts])


def home(ran: Sequence[Row], primary: Target, race: Row | None) -> Row:
    """The row, of those of the recommended artifact in ``ran``, that it is handed on with.

    That of the runtime that won the ``race`` and whose own outputs hold the budget, or else the
    first that was measured; where nothing was, only the primary target's fields.
    """
    if race and race["verdict"] == "faster" and race["within_budget"]:
        won = replace(primary, runtime=race["runtime"]).to_json()
        return next(row for row in ran if won.items() <= row.items())
    return next((row for row in ran if "skipped" not in row), primary.to_json())


def _write_best(folder: Path, best: Artifact, target: Mapping[str, Any]) -> None:
    """``best.onnx``, and beside it the settings under which it was measured, on ``target``: a row,
    or what a row begins with where nothing could be measured."""
    path = folder / "best.onnx"
    copy(best, path)
    said = {
        "artifact": best.name,
        "sha256": best.digest,
        "runtime": target["runtime"],
        "provider": target["provider"],
        "threads": target["threads"],
        **(target.get("session") or {"settings": SETTINGS, "disabled": disabled(best)}),
    }
    write_text(path.with_suffix(".json"), json.dumps(said, indent=1) + "\n")
