"""The gate: is a new report worse than an old one, by more than was allowed?

Figures that come out the same every time are judged from the two reports: size, parameters, MACs,
kernels, accuracy, and memory, whose high-water mark hardly moves. Times of two days are shown and
never judged; only files that were timed again side by side are (``pipeline.remeasure``).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from compressor.errors import InputError, one_line
from compressor.measurement import Target
from compressor.report import Report
from compressor.report.change import Comparison, Row
from compressor.report.table import (
    Document,
    measured,
    metric_of,
    primary,
    target_of,
    targets,
)

Record = Mapping[str, Any]


class Limit(NamedTuple):
    """How much worse a quantity may be: a share of the old value, or in its own unit."""

    value: float
    relative: bool

    def __str__(self) -> str:
        return f"{self.value * 100:g} %" if self.relative else f"{self.value:g}"


DEFAULT = "size=1%,accuracy=0.005,params=0,macs=0"
"""What is judged where ``--fail-on`` is not given: what a recipe gives again on any machine."""

LATENCY = "latency=5%"
"""What ``--remeasure`` judges besides, where ``--fail-on`` is not given."""

FILES: dict[str, Callable[[Record, Record], Any]] = {
    "size": lambda made, row: made.get("size_bytes"),
    "params": lambda made, row: made.get("params"),
    "macs": lambda made, row: made.get("macs"),
    "nodes": lambda made, row: (
        sum(((row.get("placement") or {}).get("nodes") or {}).values()) or None
    ),
}
"""How a figure of a file is found, in the artifact's record and its row on the primary target.
``nodes`` are the kernels that ran there, by the runtime's profile."""

ROWS: dict[str, Callable[[Record], Any]] = {
    "memory": lambda row: row.get("peak_rss_bytes"),
    "latency": lambda row: (row.get("latency_ms") or {}).get("p50"),
    "throughput": lambda row: row.get("throughput_per_s"),
    "load": lambda row: row.get("load_ms"),
    "cpu": lambda row: row.get("cpu_ms"),
    "energy": lambda row: row.get("energy_mj"),
}
"""How a figure of a target is found in its row: bytes, ms, 1/s, ms, ms, mJ."""

JUDGED = ("size", "params", "macs", "nodes", "accuracy", "memory", "latency")
"""What ``--fail-on`` may name. A session starts too few times in a job to be judged by that."""


def limits(text: str | None = None, *, remeasure: bool = False) -> dict[str, Limit]:
    """``--fail-on`` as limits by quantity; without it :data:`DEFAULT`.

    ``5%`` is a share of the old value. A plain number is in the quantity's own unit (bytes for size
    and memory); for accuracy it means what it means to ``--max-drop``: absolute, but relative for
    errors. Latency takes a share only. Raises :class:`InputError` for anything else, and where
    ``remeasure`` has no limit to judge by.

    >>> limits("latency=5%,accuracy=0.005")["latency"]
    Limit(value=0.05, relative=True)
    """
    if text is None:
        text = f"{DEFAULT},{LATENCY}" if remeasure else DEFAULT
    found: dict[str, Limit] = {}
    for part in map(str.strip, text.split(",")):
        name, _, amount = (piece.strip() for piece in part.partition("="))
        if name not in JUDGED:
            raise InputError(
                f"--fail-on {part!r}: give QUANTITY=LIMIT such as {DEFAULT}; quantities are "
                f"{', '.join(JUDGED)}"
            )
        if name in found:
            raise InputError(f"--fail-on {part!r}: {name} has a limit already")
        number = re.fullmatch(r"(\d{1,15}(?:\.\d*)?|\.\d+)\s*(%?)", amount, re.ASCII)
        if number is None:
            raise InputError(f"--fail-on {part!r}: give a limit of 0 or more, such as 5% or 0.005")
        relative = bool(number[2])
        found[name] = Limit(float(number[1]) / (100 if relative else 1), relative)
    if "latency" in found and not found["latency"].relative:
        raise InputError(f"--fail-on latency={found['latency']}: give a share, such as {LATENCY}")
    if remeasure and "latency" not in found:
        raise InputError(f"--remeasure judges latency: add it to --fail-on, such as {LATENCY}")
    return found


def compare(
    old: Document,
    new: Document,
    allowed: Mapping[str, Limit],
    timed: Mapping[str, Record] | None = None,
) -> Comparison:
    """Every variant of ``old`` and ``new`` under the limits.

    ``timed`` is what :func:`compressor.pipeline.remeasure.remeasure` found, by variant. What OLD
    has and NEW lacks fails, with NEW's reason where it has one; what OLD lacks is new and never
    fails. Raises :class:`InputError` when accuracy has a limit and the two were judged by another
    metric or on other data: neither result would mean anything.
    """
    unlike = _unlike(old["task"], new["task"])
    if unlike and "accuracy" in allowed:
        raise InputError(
            f"accuracy cannot be compared, {unlike}: judge both alike, or leave accuracy out of "
            "--fail-on"
        )
    before, after = ({made["name"]: made for made in one["artifacts"]} for one in (old, new))
    rows: list[Row] = []
    for name, made in before.items():
        if name not in after:
            rows.append(Row(name, "variant", verdict="missing", why=_lost(new, name)))
            continue
        figures = [*_of_file(old, new, made, after[name], allowed)]
        accuracy = _accuracy(old, made, after[name], allowed.get("accuracy"), unlike)
        figures += [accuracy] if accuracy.limit or accuracy.change is not None else []
        figures += _on_targets(old, new, name, allowed.get("memory"))
        if timed is not None:
            figures.append(_again(name, timed[name], allowed["latency"]))
        elif "latency" in allowed:
            figures.append(
                _unjudged(
                    name, "latency", allowed, "times of two days tell nothing, add --remeasure"
                )
            )
        if "memory" in allowed and not any(
            row.limit and row.quantity == "memory" for row in figures
        ):
            figures.append(_unjudged(name, "memory", allowed, "not measured in both on one target"))
        rows += figures
    rows += [
        Row(name, "variant", verdict="new", why="OLD lacks it")
        for name in after
        if name not in before
    ]
    return Comparison(tuple(rows), tuple(_notes(old, new)))


def _lost(new: Document, name: str) -> str:
    """Why NEW has no such variant, by the stage or the file that failed."""
    skipped = (
        row.get("skipped")
        for row in (*new.get("stages", ()), *new["measurements"])
        if row.get("artifact") == name
    )
    return next(filter(None, skipped), "NEW lacks it")


def _unjudged(name: str, quantity: str, allowed: Mapping[str, Limit], why: str) -> Row:
    return Row(name, quantity, limit=str(allowed[quantity]), verdict="n/a", why=why)


def _of_file(
    old: Document, new: Document, made: Record, now: Record, allowed: Mapping[str, Limit]
) -> Iterator[Row]:
    name = made["name"]
    ran = [measured(one, primary(old)).get(name, {}) for one in (old, new)]
    for quantity, find in FILES.items():
        row = Row(name, quantity, number(find(made, ran[0])), number(find(now, ran[1])))
        if quantity in allowed or row.change:
            yield _judged(row, allowed.get(quantity))


def _accuracy(
    old: Document, made: Record, now: Record, limit: Limit | None, unlike: str | None
) -> Row:
    metric, bounded = metric_of(old), old["task"].get("higher_is_better") is not False
    was, is_now = made["accuracy"], now["accuracy"]
    why = unlike or is_now.get("skipped") or was.get("skipped") or ""
    if not why and was.get("n") != is_now.get("n"):
        why = f"on {was.get('n')} examples in OLD, on {is_now.get('n')} in NEW"
    row = Row(
        made["name"],
        "accuracy",
        number(was.get(metric)),
        None if why else number(is_now.get(metric)),
        why=why,
    )
    return _judged(row, limit, bounded=bounded)


def _judged(row: Row, limit: Limit | None, *, bounded: bool | None = None) -> Row:
    """The row under its limit; without one it is shown.

    ``bounded`` says of accuracy whether more of it is better; otherwise it is an error, of which a
    plain number is a share.
    """
    row = replace(row, limit=str(limit) if limit else None)
    if row.old is None:
        return replace(row, verdict="n/a", why=row.why or "OLD has none")
    if row.change is None:
        return replace(row, verdict="fails" if limit else "n/a", why=row.why or "NEW has none")
    if limit is None:
        return row
    worse = -row.change if bounded else row.change
    share = limit.relative or (bounded is False and row.old != 0)
    most = limit.value * (abs(row.old) if share else 1)
    # Exactly at the limit holds: 0.975 - 0.97 is a hair over 0.005.
    held = worse <= most + 1e-12 * max(1.0, abs(row.old))
    return replace(row, verdict="ok" if held else "fails")


def _on_targets(old: Document, new: Document, name: str, limit: Limit | None) -> Iterator[Row]:
    """What was measured in both; what NEW could not measure fails, if NEW looked there at all."""
    for target in targets(old):
        was = measured(old, target).get(name)
        now = measured(new, target).get(name)
        if was is None:
            continue
        if now is None:
            if why := _absent(new, target, name, must=target == primary(old)):
                yield Row(name, "measurement", verdict="fails", why=why, target=str(target))
            continue
        for quantity, find in ROWS.items():
            row = Row(name, quantity, number(find(was)), number(find(now)), target=str(target))
            if quantity == "memory" and limit:
                yield _judged(row, limit)
            elif row.change is not None:
                yield row


def _absent(new: Document, target: Target, name: str, *, must: bool) -> str | None:
    """Why NEW has no figures of ``name`` on ``target``; ``None`` where that is nobody's fault."""
    for row in new["measurements"]:
        if row["artifact"] == name and target_of(row) == target:
            return str(row["skipped"])
    return "NEW was not measured there" if must else None


def _again(name: str, found: Record, limit: Limit) -> Row:
    """What timing both files again, in one job, said: the slow-down against 1."""
    ratio = found.get("value")
    return Row(
        name,
        "slow-down",
        None if ratio is None else 1.0,
        number(ratio),
        limit=str(limit),
        verdict=found["verdict"],
        why=found["why"],
        target=found["target"],
    )


def _unlike(was: Record, now: Record) -> str | None:
    """What differs in how accuracy was judged; ``None`` where one of the two was not judged."""
    if not was.get("splits") or not now.get("splits"):
        return None
    for what in ("kind", "metric", "higher_is_better"):
        if was.get(what) != now.get(what):
            return f"{what} is {was.get(what)} in OLD and {now.get(what)} in NEW"
    if _source(was) != _source(now):
        return f"data is {was.get('data')} in OLD and {now.get('data')} in NEW"
    counts = [one["splits"].get("test") for one in (was, now)]
    if counts[0] != counts[1]:
        return f"OLD has {counts[0]} test examples and NEW {counts[1]}"
    return None


def _source(task: Record) -> str:
    """The data's name without its place: the same data lies elsewhere on another machine."""
    return PurePath((task.get("data") or "").partition(":")[0]).name


def _notes(old: Document, new: Document) -> Iterator[str]:
    was, now = old["environment"], new["environment"]
    changed = [
        f"{package} {version} -> {now['versions'].get(package, 'absent')}"
        for package, version in was["versions"].items()
        if now["versions"].get(package) != version
    ]
    if changed:
        yield f"other versions: {', '.join(changed)}"
    for what, one, other in (
        ("CPU", was["cpu"]["model"], now["cpu"]["model"]),
        ("CPU features", " ".join(was["cpu"]["features"]), " ".join(now["cpu"]["features"])),
        ("cores", was["cpu"]["cores"], now["cpu"]["cores"]),
        ("system", was.get("os"), now.get("os")),
        ("session settings", was.get("session_settings"), now.get("session_settings")),
        ("primary target", primary(old), primary(new)),
        ("data", old["task"].get("data"), new["task"].get("data")),
    ):
        if one != other:
            yield f"{what}: {one} in OLD, {other} in NEW"
    here, there = targets(old), targets(new)
    if only := [str(target) for target in here if target not in there]:
        yield f"only OLD was measured on {'; '.join(only)}"
    if new.get("finished") is False:
        yield "NEW did not finish"


def number(value: object) -> float | None:
    """A finite number; ``None`` for anything else, which then counts as not measured."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if known and math.isfinite(value) else None  # type: ignore[arg-type]


def read(path: Path) -> Report:
    """The report at ``path``: a run folder, a ``report.json``, or a file of pytest-benchmark whose
    benchmarks hold ours (``extra_info["compressor"]``), which become one report.

    Raises :class:`InputError` for anything else.
    """
    path = Path(path)
    if path.is_file():
        try:
            held = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            held = None  # Report.read says it better
        if isinstance(held, dict) and "benchmarks" in held:
            try:
                return Report(_merged(path, held["benchmarks"]), path.parent)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise InputError(
                    f"{path} holds benchmarks of ours that cannot be read ({one_line(error)}): "
                    "run them again with this version"
                ) from None
    return Report.read(path)


def _merged(path: Path, benchmarks: list[Any]) -> dict[str, Any]:
    """Variants of all benchmarks; they carry the benchmark's name where there are several."""
    ours = [
        (str(one["name"]), one["extra_info"]["compressor"])
        for one in benchmarks
        if "compressor" in one.get("extra_info", {})
    ]
    if not ours:
        raise InputError(
            f"{path} has no benchmark of ours among {len(benchmarks)}: time ONNX files with the "
            "fixture `variants`"
        )
    artifacts, rows = [], []
    for benchmark, document in ours:
        if document["schema"] != 1:
            raise InputError(f"{path} is of schema {document['schema']!r}: this version reads 1")
        before = f"{benchmark}: " if len(ours) > 1 else ""
        artifacts += [
            {**made, "name": before + made["name"], "accuracy": dict(made["accuracy"])}
            for made in document["artifacts"]
        ]
        for row in document["measurements"]:
            target_of(row)  # or else KeyError
            rows.append({**row, "artifact": before + row["artifact"]})
    names = Counter(made["name"] for made in artifacts)
    if twice := [name for name, count in names.items() if count > 1]:
        raise InputError(f"{path} has {twice[0]!r} twice: give each benchmark a name of its own")
    first = ours[0][1]
    return {
        "environment": {**first["environment"], "versions": dict(first["environment"]["versions"])},
        "task": dict(first["task"]),
        "artifacts": artifacts,
        "measurements": rows,
        "benchmarks": [name for name, _ in ours],  # which have figures, and no models
    }
