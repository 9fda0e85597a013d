"""Beside the table: learning, throughput by batch, delay by load, further costs, noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compressor.measurement import Target
from compressor.report.drawing import BEST, HUES, INK, LONGEST, dress, paper, png, title
from compressor.report.table import (
    MISSING,
    Document,
    Text,
    count,
    escaped,
    figures,
    label,
    measured,
    metric_of,
    milliseconds,
    plain,
    primary,
    render,
    size,
    target_of,
    targets,
    variant,
)
from compressor.training.logs import lasting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
Line = tuple[bool, Sequence[float], Sequence[float]]
"""Whether it is the recommended one's, and the line's x and y."""


def histories(document: Document) -> list[dict[str, Any]]:
    """``{"artifact", "stage", "best", "epochs"}`` of every step that trained, each step once.

    ``artifact`` is the first that the step made, ``best`` whether the recommended one was made
    with it, ``epochs`` its history: ``{"epoch", "loss", metric, "train_" + metric}`` after each
    epoch, the metric on the validation and on the training split where it was taken. What else is
    known of an epoch is no curve.
    """
    kept = ("epoch", "loss", metric_of(document), _train(document))
    return [
        {
            "artifact": one["artifact"]["name"],
            "stage": one["step"]["stage"],
            "best": one["best"],
            "epochs": [{key: epoch[key] for key in kept if key in epoch} for epoch in epochs],
        }
        for one in _steps(document)
        if (epochs := _epochs(one["step"].get("facts", {})))
    ]


def _train(document: Document) -> str:
    """The metric on what was trained on, as an epoch of a history names it."""
    return f"train_{metric_of(document)}"


def _steps(document: Document) -> list[dict[str, Any]]:
    """Each step once: ``{"step", "artifact", "best"}``, as :func:`histories` has them."""
    found: list[dict[str, Any]] = []
    shown: list[Record] = []
    for artifact in document["artifacts"]:
        for step in artifact["steps"]:
            if step not in shown:
                shown.append(step)
                found.append({"step": step, "artifact": artifact, "best": False})
            found[shown.index(step)]["best"] |= artifact["best"]
    return found


def _epochs(facts: Record) -> list[Mapping[str, float]]:
    """The history among a step's facts; facts are free, and another's may go by that name."""
    history = facts.get("history")
    if not isinstance(history, list):
        return []
    numbers = (
        {key: value for key, value in epoch.items() if isinstance(value, (int, float))}
        for epoch in history
        if isinstance(epoch, Mapping)
    )
    return [epoch for epoch in numbers if {"epoch", "loss"} <= set(epoch)]


def learning(document: Document) -> bytes:
    """A PNG of the loss on the training split and the metric on the validation split by epoch.

    Where the metric is known on the training split it is a dashed line of the same hue.
    """
    found, metric, train = histories(document), metric_of(document), _train(document)
    known = {key for one in found for epoch in one["epochs"] for key in epoch}
    panels = [("loss", "loss in training")]
    if {metric, train} & known:
        beside = "\n(dashed: on train)" if train in known else ""
        panels.append((metric, f"{plain(metric)[:LONGEST]} on validate{beside}"))
    figure = paper(8, 3.6)
    every = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (key, words) in zip(every, panels, strict=True):
        _lines(axes, _by_epoch(found, key))
        if key == metric and train in known:
            _lines(axes, _by_epoch(found, train), style="--")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("epoch", color=INK)
        axes.set_ylabel(words, color=INK, parse_math=False)
    _legend(figure, every[0], [f"{one['stage']} → {one['artifact']}" for one in found])
    title(every[0], document["name"])
    return png(figure)


def _by_epoch(found: Sequence[Record], key: str) -> list[Line]:
    """A line for each history, of the epochs that know ``key``; it may be empty."""
    lines: list[Line] = []
    for one in found:
        known = [epoch for epoch in one["epochs"] if key in epoch]
        ys = [epoch[key] for epoch in known]
        lines.append((one["best"], [epoch["epoch"] for epoch in known], ys))
    return lines


def training(document: Document, *, markdown: bool = False) -> str:
    """How long each step trained, how fast and on what, as a table; may be empty.

    One row for each step that says so among its facts, ``training``, beside the first artifact
    that it made. Throughput is in examples of the training split per second of training.
    """
    show: Text = escaped if markdown else plain
    rows = []
    for one in _steps(document):
        facts = one["step"].get("facts", {}).get("training")
        if not isinstance(facts, Mapping):
            continue
        cells = []
        for field, said, absent in TRAINING.values():
            value = facts.get(field, MISSING)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            cells.append(said(value) if number else show(absent if value is None else value))
        name = variant(one["artifact"], markdown=markdown)
        crossed = _crossed(one["step"]["facts"].get("folds"), show)
        rows.append([name, show(one["step"]["stage"]), *cells, crossed])
    if not rows:
        return ""
    header = ["variant", "stage", *TRAINING, "in folds"]
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    rows = [[cell or MISSING for cell in row] for row in rows]
    return render(header, rows, markdown=markdown, left=2)


def _crossed(found: Any, show: Text) -> str:
    """What cross-validation reached: mean, standard deviation and number of the folds."""
    if not isinstance(found, Mapping):
        return ""
    numbers = [found.get(key) for key in ("mean", "deviation", "folds")]
    if not all(isinstance(one, (int, float)) for one in numbers):
        return ""
    mean, deviation, folds = numbers
    return show(f"{found.get('metric')} {mean:.4f} ± {deviation:.4f}, {folds} folds")


TRAINING: Mapping[str, tuple[str, Callable[[Any], str], str]] = {
    "epochs": ("epochs", count, MISSING),
    "best epoch": ("best_epoch", count, MISSING),
    "stopped early": ("stopped", plain, "no"),
    "time": ("seconds", lasting, MISSING),
    "examples/s": ("examples_per_s", count, MISSING),
    "device": ("device", plain, MISSING),
    "precision": ("precision", plain, MISSING),
    "processes": ("processes", count, MISSING),
    "optimizer": ("optimizer", plain, MISSING),
    "parameters": ("parameters", count, MISSING),
    "teacher": ("teacher", plain, "none"),
}
"""What is told of training: header, field, how a number is written, what null says."""


def throughput(document: Document) -> dict[str, str]:
    """Inferences/s by batch as tables in markdown, by what they were measured on.

    Only where several batch sizes were.
    """
    batches: dict[Target, dict[int, Mapping[str, Record]]] = {}
    for target in targets(document):
        if found := measured(document, target):
            batches.setdefault(replace(target, batch=1), {})[target.batch] = found
    tables = {}
    for target, by in batches.items():
        if len(by) < 2:
            continue
        rows = [
            [variant(artifact, markdown=True)]
            + [count(by[at].get(artifact["name"], {}).get("throughput_per_s")) for at in sorted(by)]
            for artifact in document["artifacts"]
        ]
        header = ["inferences/s", *(f"batch {at}" for at in sorted(by))]
        tables[label(target).replace(", batch 1,", ",", 1)] = render(header, rows, markdown=True)
    return tables


Columns = Mapping[str, tuple[str, Callable[[Any], str]]]

COSTS: Columns = {
    "load ms": ("load_ms", milliseconds),
    "first call ms": ("first_ms", milliseconds),
    "CPU ms": ("cpu_ms", milliseconds),
    "memory to load": ("peak_load_bytes", size),
    "memory to run": ("peak_run_bytes", size),
    "VRAM": ("vram_bytes", size),
    "energy mJ": ("energy_mj", milliseconds),
    "device ms": ("device_ms", milliseconds),
}
"""What is measured of a call beside the table's columns: header, field, how it is written."""

NOISE: Columns = {
    "IQR / median": ("iqr", "{:.1%}".format),
    "drift": ("drift", "{:+.1%}".format),
    "CPU / wall": ("cpu_share", "{:.0%}".format),
    "switches/s": ("switches_per_s", figures),
    "steal": ("steal", "{:.1%}".format),
    "load": ("load", figures),
    "governor": ("governor", escaped),
}
"""The conditions that a row was measured under."""


def costs(document: Document) -> str:
    """What else a call costs on the primary target, in markdown; may be empty."""
    found = measured(document, primary(document))
    rows = [
        ([variant(artifact, markdown=True)], found.get(artifact["name"], {}))
        for artifact in document["artifacts"]
    ]
    return _known(["variant"], rows, COSTS)


def noise(document: Document) -> str:
    """The conditions of every measurement, in markdown; may be empty."""
    rows = [
        ([escaped(row["artifact"]), escaped(label(target_of(row)))], row["conditions"])
        for row in document["measurements"]
        if row.get("conditions")
    ]
    return _known(["variant", "on"], rows, NOISE)


def _known(
    names: Sequence[str], rows: Sequence[tuple[list[str], Mapping[str, Any]]], columns: Columns
) -> str:
    """A table of the columns that some row knows, and a line with those that none does."""
    shown = {
        header: how
        for header, how in columns.items()
        if any(record.get(how[0]) is not None for _, record in rows)
    }
    if not shown:
        return ""
    cells = [
        name
        + [
            MISSING if record.get(field) is None else said(record[field])
            for field, said in shown.values()
        ]
        for name, record in rows
    ]
    ruled = render([*names, *shown], cells, markdown=True, left=len(names))
    # A field that no row has was not asked for; one that is null everywhere could not be had.
    absent = [
        header
        for header, (field, _) in columns.items()
        if header not in shown and any(field in record for _, record in rows)
    ]
    return ruled + (f"\n\nNot known here: {', '.join(absent)}." if absent else "")


def loads(document: Document) -> dict[str, Record]:
    """Artifact name to its row on the primary target, where that has a load curve."""
    found = measured(document, primary(document))
    return {name: row for name, row in found.items() if row.get("load_curve")}


def percentile(document: Document) -> str:
    """The percentile of the load curves: p99, or the next that any point has samples for."""
    points = [point for row in loads(document).values() for point in row["load_curve"]]
    known = (name for name in ("p99", "p90") if any(point.get(name) for point in points))
    return next(known, "p50")


def _shares(row: Record) -> list[float]:
    """The offered rates as shares of the throughput that was measured without a pause."""
    whole = row["throughput_per_s"] or math.inf
    return [point.get("share", point["offered_per_s"] / whole) for point in row["load_curve"]]


def delays(document: Document) -> str:
    """The percentile in ms, and the rate offered, by load, in markdown; may be empty."""
    found = loads(document)
    if not found:
        return ""
    shown = percentile(document)
    points = range(max(len(row["load_curve"]) for row in found.values()))
    artifacts = {artifact["name"]: artifact for artifact in document["artifacts"]}
    rows = []
    for name, row in found.items():
        cells = [
            f"{milliseconds(point.get(shown))} at {count(point['offered_per_s'])}/s"
            for point in row["load_curve"]
        ]
        rows.append([variant(artifacts[name], markdown=True), *cells])
        rows[-1] += [MISSING] * (len(points) + 1 - len(rows[-1]))
    shares = [
        statistics.median(_shares(row)[at] for row in found.values() if at < len(_shares(row)))
        for at in points
    ]
    header = [f"{shown} ms", *(f"{share:.0%} load" for share in shares)]
    return render(header, rows, markdown=True)


def load(document: Document) -> bytes:
    """A PNG of the percentile by the rate offered, and by its share of the throughput."""
    found, shown = loads(document), percentile(document)
    best = {artifact["name"] for artifact in document["artifacts"] if artifact["best"]}
    figure = paper(8, 3.8)
    every = figure.subplots(1, 2, sharey=True)
    for axes, shared in zip(every, (False, True), strict=True):
        lines = []
        for name, row in found.items():
            rates = [point["offered_per_s"] for point in row["load_curve"]]
            xs = [100 * share for share in _shares(row)] if shared else rates
            seen = [
                (x, point[shown])
                for x, point in zip(xs, row["load_curve"], strict=True)
                if point.get(shown) and x  # there is no 0 on a logarithmic axis
            ]
            lines.append((name in best, [x for x, _ in seen], [y for _, y in seen]))
        _lines(axes, lines)
        axes.set_yscale("log")
        _plain(axes.yaxis)
    every[0].set_xscale("log")
    _plain(every[0].xaxis)
    every[0].set_ylabel(f"{shown} latency with waiting, ms", color=INK)
    every[0].set_xlabel("inferences/s offered", color=INK)
    every[1].set_xlabel("offered, % of its throughput", color=INK)
    _legend(figure, every[0], list(found))
    title(every[0], document["name"])
    return png(figure)


def _lines(axes: Axes, lines: Sequence[Line], style: str = "-") -> None:
    """One line each, with a dot for each point; the recommended one on top."""
    hues = 0
    for best, xs, ys in lines:
        axes.plot(
            xs,
            ys,
            color=BEST if best else HUES[hues % len(HUES)],
            ls=style,
            lw=2.0 if best else 1.4,
            marker="o" if len(xs) <= 20 else None,
            markersize=5 if best else 4,
            markeredgecolor="white",
            markeredgewidth=0.6,
            zorder=3 if best else 2,
        )
        hues += not best
    dress(axes)


def _plain(axis: Axis) -> None:
    """A logarithmic axis with numbers that people count with."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def _legend(figure: Figure, axes: Axes, names: Sequence[str]) -> None:
    """The names of the lines, below the plots."""
    numbers = [str(at) for at in range(len(names))]
    legend = figure.legend(
        axes.get_lines(), numbers, loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    # A label may begin with "_" or hold "$", which a legend would take for its own.
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=plain(name)[:LONGEST], parse_math=False, color=INK)
