"""The report: what a run measured, as data (report.json) and as views of it."""

from __future__ import annotations

import json
import reprlib
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from compressor.artifact import replacing, settle, together, write_text
from compressor.errors import InputError, one_line
from compressor.measurement import Target
from compressor.report import markdown as page
from compressor.report import table as tables

__all__ = ["FILE", "Report", "schema"]

FILE = "report.json"


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of report.json."""
    text = (Path(__file__).parent / "schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


LARGEST = 1e100
"""Of a report's numbers: no quantity is near it, and there is room for the plots' arithmetic."""


def _finite(text: str) -> float:
    """A JSON number; Python would take ``NaN`` and ``1e999`` too."""
    value = float(text)
    if not abs(value) <= LARGEST:
        raise ValueError(f"{text:.40} is not a finite number")
    return value


def _whole(text: str) -> int:
    """A JSON integer; Python would take one of thousands of digits."""
    _finite(text)
    return int(text)


def problem(document: Any) -> str | None:
    """Where the document breaks the schema and how, in one line; ``None`` when it holds."""
    import jsonschema

    validator = jsonschema.Draft202012Validator(schema())
    error = jsonschema.exceptions.best_match(validator.iter_errors(document))
    if error is None:
        return None
    # The message repeats the value, which may be the whole document.
    message = error.message.replace(repr(error.instance), reprlib.repr(error.instance))
    return tables.plain(f"at {error.json_path}: {one_line(ValueError(message))}")


@dataclass(frozen=True)
class Report:
    """A document of schema 1 and the folder that it lies in.

    ``document`` holds plain JSON values; everything printed or drawn is derived from it.
    """

    document: dict[str, Any]
    folder: Path
    stored: bool = False
    """Whether it was there before: the same run had been made."""

    @classmethod
    def read(cls, path: Path) -> Report:
        """The report at ``path``, a ``report.json`` or the folder of one.

        Raises :class:`InputError` when it is missing, is not JSON or breaks the schema.
        """
        path = Path(path)
        file = path / FILE if path.is_dir() else path
        with suppress(OSError):  # of a folder that is only to be read: what is there is whole
            settle(file.parent)
        try:
            document = json.loads(
                file.read_text(encoding="utf-8"),
                parse_float=_finite,
                parse_int=_whole,
                parse_constant=_finite,
            )
        except OSError as error:
            raise InputError(f"report {file} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"report {file} is not JSON: {one_line(error)}") from None
        if wrong := problem(document):
            raise InputError(f"report {file} breaks schema 1, {wrong}")
        return cls(document, file.parent)

    def save(self) -> None:
        """Writes ``report.json``, ``report.md``, its pictures and ``report.html`` into the folder:
        all of them at once, in place of those of an earlier report.

        Raises :class:`ValueError`, and writes nothing, when the document breaks the schema.
        """
        from compressor.report.plots import PICTURES

        with together(self.folder) as beside:
            drawn = self.write(beside)
        for name in PICTURES.keys() - drawn:
            (self.folder / name).unlink(missing_ok=True)  # of an earlier report

    def write(self, into: Path) -> set[str]:
        """Writes the files of the report into another folder and reads it again; gives their names.

        Raises :class:`ValueError`, and writes nothing, when the document breaks the schema.
        """
        from compressor.report.html import html
        from compressor.report.plots import pictures

        try:
            text = json.dumps(self.document, indent=2, allow_nan=False)
            wrong = problem(json.loads(text))
        except TypeError as error:
            raise ValueError(f"report holds what JSON cannot: {error}") from error
        if wrong:
            raise ValueError(f"report breaks schema 1, {wrong}")
        views = {"report.md": self.markdown(), "report.html": html(self.document)}
        drawn = pictures(self.document)
        for name, picture in drawn.items():
            with replacing(into / name) as beside:
                beside.write_bytes(picture)
        for name, view in {**views, FILE: text + "\n"}.items():
            write_text(into / name, view)
        return {*drawn, *views, FILE}

    def table(self, target: Target | None = None) -> str:
        """The table for a terminal: on ``target``, or on the primary one and briefly the others.

        Raises :class:`InputError` for a target that the report knows nothing of.
        """
        known = tables.targets(self.document)
        if target is not None and target not in known:
            names = "; ".join(tables.label(other) for other in known) or "none"
            raise InputError(f"nothing on {tables.label(target)} in this report; known: {names}")
        shown = target or tables.primary(self.document)
        notes = [tables.plain(note) for note in tables.footnotes(self.document)]
        if placed := tables.placement(self.document, shown):
            notes.insert(0, tables.plain(placed))
        parts = [
            tables.plain(tables.label(shown)) if shown else "",
            tables.table(self.document, shown),
            "\n" + tables.further(self.document) if len(known) > 1 and target is None else "",
            "\n".join(["", *notes]),
        ]
        return "\n".join(part for part in parts if part.strip())

    def markdown(self) -> str:
        """``report.md``."""
        return page.markdown(self.document)

    @property
    def best(self) -> str:
        """The name of the recommended artifact."""
        return page.best(self.document)

    def __str__(self) -> str:
        """What the terminal shows at the end of a run."""
        warnings = [f"warning: {text}" for text in self.document.get("warnings", [])]
        lines = [page.recommendation(self.document), *warnings, f"report: {self.folder}"]
        return "\n".join([self.table(), "", *(tables.plain(line) for line in lines)])

    def _repr_markdown_(self) -> str:
        return self.markdown()
