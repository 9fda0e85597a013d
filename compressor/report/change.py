"""What the gate says: one row for each figure of each variant, and the views of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compressor.errors import BudgetError, InputError
from compressor.report.table import MISSING, escaped, figures, plain, render, score, size

UNITS = {"latency": " ms", "throughput": "/s", "load": " ms", "cpu": " ms", "energy": " mJ"}
COUNTS = ("params", "macs", "nodes")


@dataclass(frozen=True)
class Row:
    """One figure of one variant in both reports, and what the gate says of it.

    Bytes, counts, ms, 1/s, mJ or the metric's own unit; a slow-down is a ratio, 1 in OLD. ``old``
    and ``new`` are ``None`` where there is no figure.
    """

    variant: str
    quantity: str
    old: float | None = None
    new: float | None = None
    limit: str | None = None
    verdict: str = "shown"
    """ok, fails, inconclusive, shown, new, missing (which fails too) or n/a."""
    why: str = ""
    target: str | None = None
    """In words, for what was measured on one."""

    @property
    def change(self) -> float | None:
        """New less old."""
        return None if self.old is None or self.new is None else self.new - self.old

    @property
    def relative(self) -> float | None:
        """The change as a share of the old value."""
        return self.change / abs(self.old) if self.old and self.change is not None else None

    @property
    def failed(self) -> bool:
        """Whether this row alone fails the gate."""
        return self.verdict in ("fails", "missing")

    def shown(self, value: float | None) -> str:
        """The value with its unit; counts in full, since one more is one too many."""
        if value is None:
            return "" if self.old is self.new else MISSING
        if self.quantity in COUNTS:
            return f"{value:,.0f}"
        if self.quantity == "size":
            return f"{value:,.0f} B"
        if self.quantity == "memory":
            return size(value)
        unit = UNITS.get(self.quantity)
        return score(value) if unit is None else f"{figures(value)}{unit}"

    def moved(self) -> str:
        """``+1.23 %``; the difference itself for accuracy and where the old value is 0."""
        if self.change is None:
            return ""
        share = self.relative
        if self.change == 0 or share is None or self.quantity == "accuracy":
            return f"{self.change:+.4g}" if self.change else "0"
        return f"{'+' if share > 0 else '-'}{figures(abs(share) * 100)} %"

    def __str__(self) -> str:
        where = f" on {self.target}" if self.target else ""
        change = f" {self.moved()} (limit {self.limit})" if self.change is not None else ""
        return f"{self.variant} {self.quantity}{where}{change}" + (f": {self.why}" * bool(self.why))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "change": self.change, "relative": self.relative}


NAMED = 3
"""Failures that the first line names; the table has all."""


@dataclass(frozen=True)
class Comparison:
    """What the gate found: rows in the order of the old report, and what to know about them."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> list[Row]:
        """The rows that fail."""
        return [row for row in self.rows if row.failed]

    @property
    def unjudged(self) -> list[Row]:
        """Those that have a limit and no verdict."""
        return [row for row in self.rows if row.limit and row.verdict == "n/a"]

    @property
    def judged(self) -> bool:
        """Whether there is any verdict at all."""
        return any(row.failed or row.verdict in ("ok", "inconclusive") for row in self.rows)

    @property
    def said(self) -> str:
        """``passes: ...``, ``fails: what`` or ``nothing was judged: why``, one line."""
        if not self.judged:
            reasons = dict.fromkeys(
                f"{row.quantity} {row.limit}: {row.why}" for row in self.unjudged
            )
            return plain(f"nothing was judged: {'; '.join(reasons) or 'OLD holds no variant'}")
        if not self.failed:
            found = Counter(row.verdict for row in self.rows)
            counts = [
                f"; {count} {what}"
                for count, what in (
                    (found["inconclusive"], "inconclusive"),
                    (len(self.unjudged), "not judged"),
                )
                if count
            ]
            return f"passes: {found['ok']} figures hold their limits{''.join(counts)}"
        named = "; ".join(map(str, self.failed[:NAMED]))
        more = len(self.failed) - NAMED
        return plain(f"fails: {named}" + (f"; and {more} more" if more > 0 else ""))

    def check(self) -> None:
        """Raises :class:`BudgetError` with the one line when anything fails, and
        :class:`InputError` when nothing was judged."""
        if not self.judged:
            raise InputError(self.said)
        if self.failed:
            raise BudgetError(self.said)

    def table(self, *, markdown: bool = False) -> str:
        """The first line, what was judged, what is only shown (on one target), and the notes."""
        text = escaped if markdown else plain
        judged = [row for row in self.rows if row.verdict != "shown"]
        first = next((row.target for row in self.rows if row.target), None)
        only = [row for row in self.rows if row.verdict == "shown" and row.target in (None, first)]
        parts = [f"**{text(self.said)}**" if markdown else text(self.said)]
        for title, rows in (("", judged), (f"Shown, not judged ({first}):", only)):
            if rows:
                parts += [text(title)] * bool(title) + [_ruled(rows, markdown)]
        parts.append("\n".join(f"- {text(note)}" for note in self.notes))
        return "\n\n".join(part for part in parts if part)

    def markdown(self) -> str:
        """The same for a page."""
        return self.table(markdown=True) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Plain values: ``{"passes", "said", "rows", "notes"}``."""
        return {
            "passes": self.judged and not self.failed,
            "said": self.said,
            "rows": [row.to_json() for row in self.rows],
            "notes": list(self.notes),
        }


def _ruled(rows: Sequence[Row], markdown: bool) -> str:
    text = escaped if markdown else plain
    places = len({row.target for row in rows} - {None}) > 1
    judged = any(row.verdict != "shown" for row in rows)
    cells = []
    for row in rows:
        where = f" ({row.target})" if places and row.target else ""
        said = f"{row.verdict}: {row.why}" if row.why else row.verdict
        words = [text(row.variant), text(row.quantity + where), *[text(said)] * judged]
        numbers = [row.shown(row.old), row.shown(row.new), row.moved()]
        cells.append([*words, *numbers, *[row.limit or ""] * judged])
    header = ["variant", "quantity", *["verdict"] * judged, "old", "new", "change"]
    return render(header + ["limit"] * judged, cells, markdown=markdown, left=2 + judged)
