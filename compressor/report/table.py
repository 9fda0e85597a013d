"""The table: every artifact on one target, for a terminal or for markdown.

Both renderings come from the same cells; only the escaping of names and the ruling differ.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from compressor.measurement import Target

Document = Mapping[str, Any]
Text = Callable[[object], str]

MISSING = "n/a"

ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\].*?(?:\x07|\x1b\\|$)|[@-Z\\-_])", re.DOTALL)
MARKS = {
    **{mark: f"\\{mark}" for mark in "\\`*_[~$"},
    **{"|": "&#124;", "<": "&lt;", ">": "&gt;", "&": "&amp;"},
}
"""What markdown would read as its own; a pipe as an entity cannot end a cell, whatever precedes."""


def printable(text: object) -> str:
    """The text on one line, as wide as it was: no escape sequences, no control characters."""
    spaced = re.sub(r"\s", " ", ANSI.sub("", str(text)))
    return "".join(char for char in spaced if unicodedata.category(char)[0] != "C")


def plain(text: object) -> str:
    """:func:`printable` text in single spaces, for a terminal.

    >>> plain("a\\x1b[31mb\\n c\\x00")
    'ab c'
    """
    return " ".join(printable(text).split())


def escaped(text: object) -> str:
    """:func:`plain` text that markdown shows as it stands.

    >>> escaped("a|b <i>")
    'a&#124;b &lt;i&gt;'
    """
    return "".join(MARKS.get(char, char) for char in plain(text))


# Numbers as people read them. ``None`` is "n/a" everywhere.


def figures(value: float) -> str:
    """Three significant digits without an exponent: ``0.261``, ``33.4``, ``1234``."""
    rounded = float(f"{value:.3g}")
    if rounded == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{value:.{digits}f}"


def scaled(value: float | None, units: Sequence[str]) -> str:
    """Three significant digits in the first unit that keeps them below 1000."""
    if value is None:
        return MISSING
    for unit in units[:-1]:
        shown = f"{value:.0f}" if unit == units[0] and value == int(value) else figures(value)
        if float(shown) < 1000:
            return shown + unit
        value /= 1000
    return figures(value) + units[-1]


def count(value: float | None) -> str:
    """A plain number: ``640``, ``21.8k``, ``4.09M``."""
    return scaled(value, ("", "k", "M", "G", "T"))


def size(value: float | None) -> str:
    """Bytes in decimal units: ``812 B``, ``88.3 KB``, ``45.0 MB``."""
    return scaled(value, (" B", " KB", " MB", " GB", " TB"))


def milliseconds(value: float | None) -> str:
    """``0.261``; the unit stands in the header."""
    return MISSING if value is None else figures(value)


def score(value: float | None) -> str:
    """A metric: four decimals where they tell something, else four significant digits."""
    if value is None:
        return MISSING
    fixed = value == 0 or 0.001 <= abs(value) < 10
    return f"{value:.4f}" if fixed else f"{value:.4g}"


def drop(accuracy: Mapping[str, Any]) -> str:
    """``+0.0022 [-0.0040, 0.0090]``: what was lost, positive is worse."""
    lost = accuracy.get("drop")
    if lost is None:
        return MISSING
    return f"{lost['value']:+.4f} [{lost['low']:.4f}, {lost['high']:.4f}]"


def ratio(speedup: Mapping[str, Any] | None, artifact: str = "") -> str:
    """``2.41x [2.35, 2.47] faster``; the reference itself is no faster than anything."""
    if speedup is None:
        return MISSING
    if speedup["versus"] == artifact:
        return "reference"
    bounds = [speedup["low"], speedup["high"]]
    if None in bounds:
        return f"{speedup['value']:.2f}x {speedup['verdict']}"
    # A bound that rounds to 1.00 would seem to contradict the verdict beside it.
    digits = 3 if "1.00" in [f"{bound:.2f}" for bound in bounds] else 2
    low, high = (f"{bound:.{digits}f}" for bound in bounds)
    return f"{speedup['value']:.{digits}f}x [{low}, {high}] {speedup['verdict']}"


# What the document says.


def target_of(record: Mapping[str, Any]) -> Target:
    """The target that a measurement, or anything else with the four fields, speaks of."""
    return Target(record["runtime"], record["provider"], record["batch"], record["threads"])


def label(target: Target) -> str:
    """The target in words; the runtime only where it is not the usual one."""
    return str(target)


def targets(document: Document) -> list[Target]:
    """Every target of the document, in order."""
    return list(dict.fromkeys(target_of(row) for row in document["measurements"]))


def primary(document: Document) -> Target | None:
    """The target that the best artifact was chosen for; ``None`` where there is none at all."""
    if document.get("primary"):
        return target_of(document["primary"])
    chosen = (target_of(row) for row in document["measurements"] if row.get("primary"))
    return next(chosen, next(iter(targets(document)), None))


def measured(document: Document, target: Target | None) -> dict[str, Mapping[str, Any]]:
    """Artifact name to its measurement on ``target``, where there is one."""
    return {
        row["artifact"]: row
        for row in document["measurements"]
        if "skipped" not in row and target_of(row) == target
    }


def metric_of(document: Document) -> str:
    """The metric's own name."""
    return document["task"]["metric"] or "accuracy"


def subject(document: Document) -> Mapping[str, Any] | None:
    """The artifact that the page looks at closely: the recommended one.

    Where that is the reference itself, or none is marked, it is the fastest other on the primary
    target within the budget; where none is within it, the one that lost least. ``None`` where there
    is no other.
    """
    others = document["artifacts"][1:]
    found = measured(document, primary(document))

    def short(artifact: Mapping[str, Any]) -> tuple[bool, float, float, int]:
        lost, row = artifact["accuracy"].get("drop"), found.get(artifact["name"])
        outside = artifact["within_budget"] is False
        ms = row["latency_ms"]["p50"] if row else math.inf
        return outside, lost["value"] if outside and lost else 0.0, ms, artifact["size_bytes"]

    marked = (artifact for artifact in others if artifact["best"])
    return next(marked, min(others, key=short, default=None))


# Tables.


def render(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool, left: int = 1
) -> str:
    """The cells ruled; the first ``left`` columns are words, the others numbers."""
    from tabulate import tabulate

    return tabulate(
        rows,
        headers=header,
        tablefmt="pipe" if markdown else "simple",
        disable_numparse=True,
        colalign=["left" if at < left else "right" for at in range(len(header))],
    )


def variant(artifact: Mapping[str, Any], *, markdown: bool) -> str:
    """The artifact's name; the recommended one stands out."""
    if not markdown:
        return f"{plain(artifact['name'])} *" if artifact["best"] else plain(artifact["name"])
    name = escaped(artifact["name"])
    return f"**{name}** ★" if artifact["best"] else name


def table(document: Document, target: Target | None, *, markdown: bool = False) -> str:
    """One row for each artifact, with its costs on ``target``."""
    metric, rows = metric_of(document), []
    found = measured(document, target)
    for artifact in document["artifacts"]:
        accuracy = artifact["accuracy"]
        row = found.get(artifact["name"], {})
        latency = row.get("latency_ms", {})
        rows.append(
            [
                variant(artifact, markdown=markdown),
                score(accuracy.get(metric)),
                drop(accuracy),
                size(artifact["size_bytes"]),
                count(artifact["params"]),
                count(artifact["macs"]),
                milliseconds(latency.get("p50")),
                milliseconds(latency.get("p90")),
                count(row.get("throughput_per_s")),
                size(row.get("peak_rss_bytes")),
                ratio(row.get("speedup"), artifact["name"]),
            ]
        )
    header = [
        "variant",
        escaped(metric) if markdown else plain(metric),
        "drop [95 %]",
        "size",
        "params",
        "MACs",
        "p50 ms",
        "p90 ms",
        "inferences/s",
        "peak memory",
        "speed-up",
    ]
    return render(header, rows, markdown=markdown)


def further(document: Document, *, markdown: bool = False) -> str:
    """p50 in ms, and the speed-up, on every measured target but the primary one; may be empty."""
    show: Text = escaped if markdown else plain
    columns = {
        target: measured(document, target)
        for target in targets(document)
        if target != primary(document) and measured(document, target)
    }
    if not columns:
        return ""

    def cell(row: Mapping[str, Any] | None) -> str:
        if row is None:
            return MISSING
        speedup = row["speedup"]
        own = speedup is None or speedup["versus"] == row["artifact"]
        gain = "" if own else f" ({speedup['value']:.2f}x {speedup['verdict']})"
        return milliseconds(row["latency_ms"]["p50"]) + gain

    rows = [
        [variant(artifact, markdown=markdown)]
        + [cell(found.get(artifact["name"])) for found in columns.values()]
        for artifact in document["artifacts"]
    ]
    header = ["p50 ms", *(show(label(target)) for target in columns)]
    return render(header, rows, markdown=markdown)


def placement(document: Document, target: Target | None) -> str:
    """Where the nodes of the recommended artifact, or of what is looked at closely where there is
    none, ran on ``target``, in one line; may be empty."""
    name = _shown(document)
    if not (found := _placement(document, target, name)):
        return ""
    where = (
        f"{count} on {provider} ({found['share'][provider]:.0%} of the time)"
        for provider, count in found["nodes"].items()
    )
    counts = {
        "copies between devices": found["memcpy"],
        "QuantizeLinear": found["quantize"],
        "DequantizeLinear": found["dequantize"],
        "in float between Q/DQ pairs": found["unfused"],
    }
    left = (f"{count} {what}" for what, count in counts.items() if count)
    return "; ".join([f"placement of {name}: nodes that ran: {', '.join(where)}", *left])


def operators(document: Document, target: Target | None) -> str:
    """Nodes and ms of each operator, the reference against the :func:`subject`; may be empty."""
    names = [one["name"] for one in (*document["artifacts"][:1], subject(document)) if one]
    found = {
        name: {one["op"]: one for one in placed["operators"]}
        for name in names
        if (placed := _placement(document, target, name))
    }
    dearest = {
        op: max(by[op]["ms"] for by in found.values() if op in by)
        for op in dict.fromkeys(op for by in found.values() for op in by)
    }
    if not dearest:
        return ""
    none = {"nodes": 0, "ms": 0.0}
    rows = [
        [escaped(op)]
        + [
            cell
            for by in found.values()
            for cell in (str(by.get(op, none)["nodes"]), milliseconds(by.get(op, none)["ms"]))
        ]
        for op in sorted(dearest, key=lambda op: (-dearest[op], op))
    ]
    header = ["operator", *(text for name in found for text in (f"{escaped(name)} nodes", "ms"))]
    return render(header, rows, markdown=True)


def nodes(document: Document, target: Target | None) -> str:
    """The nodes that take the longest, of the artifact of :func:`placement`; may be empty."""
    rows = [
        [escaped(one["node"]), escaped(one["op"]), escaped(one["provider"]), figures(one["ms"])]
        for one in _placement(document, target, _shown(document)).get("dearest", ())
    ]
    header = ["dearest node", "operator", "provider", "ms"]
    return render(header, rows, markdown=True, left=3) if rows else ""


def _shown(document: Document) -> str:
    """The recommended artifact; where none is, the :func:`subject`, or the only one."""
    artifacts = document["artifacts"]
    marked = (one for one in artifacts if one["best"])
    found = next(marked, subject(document) or next(iter(artifacts), None))
    return str(found["name"]) if found else ""


def _placement(document: Document, target: Target | None, name: str) -> Mapping[str, Any]:
    return measured(document, target).get(name, {}).get("placement") or {}


def footnotes(document: Document) -> list[str]:
    """What could not be done or is doubtful, one line for each reason, not yet escaped."""
    whole = [artifact["name"] for artifact in document["artifacts"]]
    grouped: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for reason, where, artifact in _remarks(document):
        places, names = grouped.setdefault(plain(reason), ({}, {}))
        places[where] = names[artifact] = None

    def among(names: Mapping[str, None]) -> str:
        every = len(names) > 1 and set(names) >= set(whole)
        listed = "all variants" if every else ", ".join(name for name in names if name)
        return f" ({listed})" if listed else ""

    return [
        f"{'; '.join(places)}: {reason}{among(names)}"
        for reason, (places, names) in grouped.items()
    ]


ONCE = (
    "each ran in one process: the intervals of the speed-ups are widened by what another start may "
    "change, too far to call any two the same (--bench-time normal starts three)"
)


def _remarks(document: Document) -> Iterator[tuple[str, str, str]]:
    """(reason, what or where, artifact) of everything skipped, then of everything noisy."""
    never_made = set()
    for stage in document["stages"]:
        if stage.get("skipped"):
            never_made.add(stage.get("artifact"))
            yield f"skipped: {stage['skipped']}", stage["stage"], stage.get("artifact") or ""
    for artifact in document["artifacts"]:
        if "skipped" in artifact["accuracy"]:
            reason = artifact["accuracy"]["skipped"]
            yield f"not measured: {reason}", metric_of(document), artifact["name"]
    for row in document["measurements"]:
        if "skipped" in row and row["artifact"] not in never_made:
            yield f"not measured: {row['skipped']}", label(target_of(row)), row["artifact"]
    for row in document["measurements"]:
        if row.get("processes") == 1 and row["speedup"]:
            yield ONCE, label(target_of(row)), row["artifact"]
    for row in document["measurements"]:
        for flag in row.get("noise", ()):
            yield f"noisy: {flag}", label(target_of(row)), row["artifact"]
