"""Robustness: what each artifact keeps on examples that are corrupted, or made to fool it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compressor.report.drawing import BEST, HUES, INK, LONGEST, dress, paper, png, title
from compressor.report.table import (
    MISSING,
    Document,
    drop,
    escaped,
    metric_of,
    plain,
    render,
    score,
    subject,
    variant,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, Any]
Key = tuple[str, int | None]
"""What was done to the examples, and how severely."""

CLEAN, ATTACKS = "clean", "attacks"
COLUMNS = 3
"""Panels of the picture in a row."""


def rows(document: Document) -> list[Record]:
    """Every row of every artifact, with the ``artifact``'s name; empty where none was asked for."""
    return [
        {"artifact": artifact["name"], **row}
        for artifact in document["artifacts"]
        for row in artifact.get("robustness") or ()
    ]


def judged(document: Document) -> dict[str, dict[str, Record]]:
    """What was done to the examples, to artifact name, to its row over all severities."""
    found: dict[str, dict[str, Record]] = {}
    for row in rows(document):
        if "skipped" not in row and row["severity"] is None:
            found.setdefault(row["what"], {})[row["artifact"]] = row
    return {what: found[what] for what in sorted(found, key=lambda what: what != CLEAN)}


def pictured(document: Document) -> dict[str, dict[str, Key]]:
    """A panel for each corruption, and one for all attacks: what its ticks say and stand for.

    Empty where nothing was measured but clean examples.
    """
    panels: dict[str, dict[str, Key]] = {}
    for row in rows(document):
        if "skipped" in row or row["what"] == CLEAN:
            continue
        key = row["what"], row["severity"]
        if row["how"]:
            panels.setdefault(ATTACKS, {CLEAN: (CLEAN, None)})[row["what"]] = key
        elif row["severity"] is not None:
            panels.setdefault(row["what"], {CLEAN: (CLEAN, None)})[str(row["severity"])] = key
    return panels


def table(document: Document, *, markdown: bool = False) -> str:
    """A row for each corruption and attack, a column for each artifact: the metric, and the drop
    against the first with its interval; may be empty."""
    found = judged(document)
    shown = [
        artifact
        for artifact in document["artifacts"]
        if any(artifact["name"] in by for by in found.values())
    ]
    if not shown:
        return ""
    reference = document["artifacts"][0]["name"]

    def cell(row: Record | None) -> str:
        if row is None:
            return MISSING
        value = score(row["value"])
        return value if row["artifact"] == reference else f"{value}, {drop(row)}"

    cells = [
        [escaped(what) if markdown else plain(what)]
        + [cell(by.get(artifact["name"])) for artifact in shown]
        for what, by in found.items()
    ]
    metric = _metric(document)
    header = [
        escaped(metric) if markdown else plain(metric),
        *(variant(artifact, markdown=markdown) for artifact in shown),
    ]
    return render(header, cells, markdown=markdown)


def _metric(document: Document) -> str:
    """That of the rows: the report's own may be none of single examples."""
    named = (row["metric"] for row in rows(document) if "skipped" not in row)
    return str(next(named, metric_of(document)))


def lost(document: Document) -> str:
    """Where the artifact that is looked at closely lost beyond noise, in a sentence; may be
    empty."""
    chosen = subject(document)
    name = chosen["name"] if chosen else None
    drops = {
        what: by[name]["drop"]
        for what, by in judged(document).items()
        if name in by and by[name]["drop"] is not None
    }
    if not drops:
        return ""
    beyond = [what for what, one in drops.items() if one["low"] > 0]
    if not beyond:
        return f"{name} lost nothing beyond noise: every interval reaches 0."
    rest = [what for what in drops if what not in beyond]
    elsewhere = f"; on {_listed(rest)} its interval reaches 0 or lies below" if rest else ""
    return f"{name} lost beyond noise on {_listed(beyond)} examples{elsewhere}."


def notes(document: Document) -> list[str]:
    """What was not measured and why, and what to make of the attacks; not yet escaped."""
    found = rows(document)
    why: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for row in found:
        if "skipped" in row:
            whats, names = why.setdefault(plain(row["skipped"]), ({}, {}))
            whats[row["what"]] = names[row["artifact"]] = None
    said = [
        f"{', '.join(whats)}: not measured: {reason} ({', '.join(names)})"
        for reason, (whats, names) in why.items()
    ]
    moved = {
        row["artifact"]: None for row in found if row["how"] == "transfer" and "skipped" not in row
    }
    if moved:
        said.append(
            "an artifact of fewer bits has no gradient: the attacks on it were made on the float "
            f"model that it comes from, and it may seem safer than it is ({', '.join(moved)})"
        )
    return said


def _listed(names: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def picture(document: Document) -> bytes:
    """A PNG of the metric by the severity of each corruption, and under the attacks; a line for
    each artifact."""
    panels = pictured(document)
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = paper(1.0 + 2.4 * columns, 1.1 + 2.1 * lines)
    every = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    for axes in every:
        axes.set_axis_off()
    for axes, (name, ticks) in zip(every, panels.items(), strict=False):
        axes.set_axis_on()
        _panel(axes, document, ticks)
        title(axes, name)
    for axes in every[::columns]:
        axes.set_ylabel(plain(_metric(document))[:LONGEST], color=INK, parse_math=False)
    names = [artifact["name"] for artifact in document["artifacts"]]
    numbers = [str(at) for at in range(len(names))]
    legend = figure.legend(
        every[0].get_lines(), numbers, loc="outside lower center", ncols=3, fontsize=8,
        frameon=False,
    )  # fmt: skip
    # A label may begin with "_" or hold "$", which a legend would take for its own.
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=plain(name)[:LONGEST], parse_math=False, color=INK)
    return png(figure)


def _panel(axes: Axes, document: Document, ticks: Mapping[str, Key]) -> None:
    hues = 0
    for artifact in document["artifacts"]:
        known = {
            (row["what"], row["severity"]): row["value"]
            for row in artifact.get("robustness") or ()
            if "skipped" not in row
        }
        best = artifact["best"]
        axes.plot(
            range(len(ticks)),
            [known.get(key, math.nan) for key in ticks.values()],
            color=BEST if best else HUES[hues % len(HUES)],
            lw=2.0 if best else 1.4,
            marker="o",
            markersize=5 if best else 4,
            markeredgecolor="white",
            markeredgewidth=0.6,
            zorder=3 if best else 2,
        )
        hues += not best
    axes.set_xticks(range(len(ticks)), [plain(tick) for tick in ticks], parse_math=False)
    dress(axes)
