"""The bench: files as they are, side by side; the first is what the others are compared with."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from compressor.artifact import Artifact, digest
from compressor.errors import StageError
from compressor.loading import onnxfile
from compressor.measure import counting, protocol
from compressor.measure.environment import absent
from compressor.measurement import Target
from compressor.pipeline import MAX_DROP, Progress, data_digest, silent, targets_of, verdict
from compressor.pipeline.document import (
    SAMPLES,
    about,
    described,
    fed,
    hurt,
    machine,
    uncounted,
    write_samples,
)
from compressor.pipeline.entries import Entry, facts, first, judge, make, read
from compressor.pipeline.folder import Folder, key_of
from compressor.pipeline.measuring import Measured, measure
from compressor.pipeline.verdict import Choice, Outputs, Row
from compressor.report import Report
from compressor.report.table import target_of
from compressor.task import Kind, Task

OUT = Path("reports") / "bench"

NO_DATA = "there is no data (add --data SPEC)"

NO_RUN = "no file ran on the first examples of the data"

UNJUDGED = "no accuracy was measured, fidelity is on made-up inputs"


def bench(
    models: Sequence[str | Path],
    *,
    data: Any = None,
    arch: Any = None,
    metric: str | None = None,
    kind: Kind | None = None,
    inputs: Sequence[str] = (),
    domains: Sequence[str] = (),
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
    """Measures ``models`` side by side and gives the report; the first is the reference.

    Each is an ONNX file, copied into the report's folder with its external data and otherwise taken
    as it is, or a torch model as in :func:`compressor.run`, exported first. Names are the files'
    stems (:func:`~compressor.pipeline.entries.named`). Accuracy is measured with ``data``, by
    default what the first file names; without it fidelity to that file's outputs, on made-up
    inputs. ``inputs`` are those of ``--input``, ``NAME=SHAPE[:DTYPE[<HIGH]]``, for axes that a file
    leaves open; ``domains`` those of operators that neither ONNX nor onnxruntime defines. A file
    that cannot be read or fed becomes rows with the reason, and so does one
    that fails while it is measured; ``document["failed"]`` lists those that ran nowhere.

    Raises :class:`InputError` before any work when an argument is wrong or no file can be read and
    fed, :class:`StageError` when none of the models can be exported.
    """
    protocol.check(bench_time, seed)
    targets = targets_of(provider, batch, threads)
    entries, given = read(
        models, data, arch, metric, kind, onnxfile.asked(inputs), domains, batch, seed
    )
    fingerprint = key_of(
        bench=[[entry.name, facts(entry)] for entry in entries],
        data=data_digest(given.splits if given else None),
        fed=[asdict(one) for one in first(entries).inputs],
        targets=[target.to_json() for target in targets],
        bench_time=bench_time,
        metric=metric,
        kind=kind,
        seed=seed,
    )
    folder, stored = Folder.open(Path(out or OUT), fingerprint, command, fresh=fresh)
    if stored is not None:
        return replace(stored, stored=True)
    with folder:
        done, total = 0, len(entries) + len(targets) + 1

        def say(text: str) -> None:
            nonlocal done
            progress(done, total, text)
            done += 1

        made, skipped, stages = make(entries, folder.artifacts, say)
        if not made:
            raise StageError(next(iter(skipped.values())))
        task = judge(entries, made, given, metric, kind, targets[0].batch, seed)
        unjudged = None if task.splits else NO_RUN if given else NO_DATA
        measured = measure(
            task,
            list(made.values()),
            skipped,
            targets,
            bench_time,
            say,
            lambda text: progress(done - 1, total, text),
            reference=entries[0].name,
            arch=arch if isinstance(arch, str) else None,
        )
        say("report")
        report = Report(
            {
                "schema": 1,
                "name": task.name,
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "command": command or f"compressor.bench({task.name}, ...)",
                "fingerprint": fingerprint,
                "model": {"path": entries[0].path.name, "sha256": digest(entries[0].path)},
                **_document(task, entries, made, measured, targets, folder.path, unjudged),
                "stages": stages + measured.stages,
            },
            folder.path,
        )
        with folder.results() as beside:
            write_samples(beside / SAMPLES, measured.raw)
            report.write(beside)
        return report


# What is said of it.


def _document(
    task: Task,
    entries: Sequence[Entry],
    made: Mapping[str, Artifact],
    measured: Measured,
    targets: Sequence[Target],
    folder: Path,
    unjudged: str | None,
) -> Row:
    """The report, but for what only the caller knows. ``unjudged`` is why no accuracy is known."""
    outputs: Outputs = next(iter(measured.outputs.values()), {})
    reference, names = entries[0].name, list(made)
    fields, validated = (
        {
            name: verdict.judged(task, measured.targets, outputs, name, split, reference)
            for name in names
        }
        for split in ("test", "validate")
    )
    if unjudged:
        fields = {name: ({"skipped": unjudged}, found) for name, (_, found) in fields.items()}
    primary = {row["artifact"]: row for row in measured.rows if row["primary"]}
    choice = _choice(
        task,
        reference,
        primary,
        {name: accuracy for name, (accuracy, _) in validated.items()},
        {name: accuracy for name, (accuracy, _) in fields.items()},
        unjudged,
    )
    within = [name for name in names if verdict.within(validated[name][0], MAX_DROP)]
    allowed = (within or [reference]) if task.splits else names
    reached = [row for row in measured.rows if absent(target_of(row), measured.providers) is None]
    ran = {row["artifact"] for row in reached if "skipped" not in row}
    counted = {
        entry.name: counting.counted(made[entry.name].path, entry.inputs)
        for entry in entries
        if entry.name in made
    }
    said = [each for name, found in counted.items() for each in uncounted(name, found)]
    return {
        "environment": machine(measured, targets[0]),
        "recipe": [],
        "task": about(task),
        "inputs": fed(task),
        "artifacts": [
            {
                **described(made[name], folder, accuracy, MAX_DROP),
                "params": counted[name].params,
                "macs": counted[name].macs,
                "best": name == choice.best,
                "fidelity": fidelity,
                **hurt(task, measured, outputs, name, reference),
            }
            for name, (accuracy, fidelity) in fields.items()
        ],
        "measurements": measured.rows,
        "best_per_target": [
            {**target.to_json(), "artifact": found}
            for target in targets
            if (found := verdict.best_on(measured.rows, target, allowed))
        ],
        "primary": targets[0].to_json(),
        "max_drop": MAX_DROP if task.splits else None,
        "budget_held": choice.held,
        "best": choice.best or None,
        "recommendation": choice.sentence,
        "warnings": [*([f"{UNJUDGED}: {unjudged}"] if unjudged else []), *said],
        "samples": SAMPLES,
        "failed": [entry.name for entry in entries if reached and entry.name not in ran],
        "missed": [],
        "finished": True,
    }


def _choice(
    task: Task,
    reference: str,
    primary: Mapping[str, Row],
    validated: Mapping[str, Row],
    tested: Mapping[str, Row],
    unjudged: str | None,
) -> Choice:
    """The fastest within the budget. Where nothing was judged or compared ``best`` is empty."""
    measured = {name: row for name, row in primary.items() if "skipped" not in row}
    target = target_of(primary[reference])
    if reference not in measured:
        why = primary[reference]["skipped"]
        return Choice(
            "",
            f"Nothing was compared: {reference} was not measured on {target}: {why}.",
            False,
        )
    if task.splits and len(validated) > 1:
        rows = list(primary.values())
        return verdict.choose(
            task, list(validated), rows, validated, tested, MAX_DROP, reference=reference
        )
    faster = [name for name, row in measured.items() if row["speedup"]["verdict"] == "faster"]
    best = min(faster, key=lambda name: measured[name]["latency_ms"]["p50"], default=reference)
    if faster:
        ratio = measured[best]["speedup"]
        said = f"{best} is the fastest on {target}, {ratio['value']:.2f}x "
        said += f"[{ratio['low']:.2f}, {ratio['high']:.2f}] faster than {reference}"
    elif len(measured) > 1:
        said = f"None is faster than {reference} on {target} beyond noise"
    else:
        said = f"Only {reference} was measured on {target}"
    judged = f"; nothing was judged: {unjudged}" if unjudged else ""
    return Choice("", f"{said}{judged}.", True)
