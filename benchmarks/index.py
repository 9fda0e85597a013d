"""Writes reports/README.md, and the table between the markers of README.md, from the reports."""

from __future__ import annotations

import re
from pathlib import Path

from compressor.artifact import write_text
from compressor.report import FILE, Report
from compressor.report import table as tables
from compressor.report.table import escaped

ROOT = Path(__file__).parent.parent
SHOWN = "mnist-cnn"
"""The report whose table stands in the README."""


def main() -> None:
    """Renders the index and the README's table again from what is on disk."""
    found = [Report.read(file) for file in sorted((ROOT / "reports").glob(f"*/{FILE}"))]
    kept = [report for report in found if report.folder.name != "model"]
    write_text(ROOT / "reports" / "README.md", index(kept))
    readme = ROOT / "README.md"
    shown = next(report for report in kept if report.folder.name == SHOWN)
    text = re.sub(
        r"(<!-- table -->\n).*?(<!-- /table -->)",
        lambda found: f"{found[1]}{block(shown)}\n{found[2]}",
        readme.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    write_text(readme, text)


def block(report: Report) -> str:
    """The table, its recommendation and where it comes from."""
    document = report.document
    cpu = document["environment"]["cpu"]["model"]
    place = f"reports/{report.folder.name}/report.md"
    return (
        f"{tables.table(document, tables.primary(document), markdown=True)}\n\n"
        f"{escaped(document['recommendation'])}\n\n"
        f"`{document['command']}` on {escaped(cpu)}, one thread, batch 1: "
        f"[the whole report]({place}). `make reports MNIST=DIR` makes it again."
    )


def index(reports: list[Report]) -> str:
    """A line for each report."""
    lines = [
        "# Reports",
        "",
        "Written by `make reports`; each folder holds what one run measured: `report.md` to read "
        "here, `report.html` to open in a browser. [All in one comparison](comparison.md).",
        "",
    ]
    for report in reports:
        document = report.document
        lines.append(
            f"- [{escaped(report.folder.name)}]({report.folder.name}/report.md) "
            f"([page]({report.folder.name}/report.html)), "
            f"{document['created'][:10]}: {escaped(document['recommendation'])}"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
