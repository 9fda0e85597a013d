"""How it was judged: every metric, whether a difference is chance, and what was taken for what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.report.table import (
    MISSING,
    Document,
    drop,
    escaped,
    figures,
    metric_of,
    render,
    score,
    variant,
)

Record = Mapping[str, Any]

SHOWN = 20
"""Classes of a confusion matrix that fit on a page."""


def metrics(document: Document) -> str:
    """Every metric of every artifact on test, with what was lost, in markdown.

    Below them McNemar's p and the generalisation gap, where there are any. Empty for a report that
    has no more than the one metric of its first table.
    """
    artifacts = document["artifacts"]
    judged = [artifact["accuracy"] for artifact in artifacts]
    names = dict.fromkeys(name for accuracy in judged for name in accuracy.get("drops", ()))
    if not names:
        return ""
    rows = [[_named(document, name), *(_cell(one, name) for one in judged)] for name in names]
    if any("mcnemar" in accuracy for accuracy in judged):
        rows.append(["McNemar's p of accuracy", *map(_p, judged)])
    if any(artifact.get("gap") for artifact in artifacts):
        head = f"gap from train to test, {escaped(metric_of(document))}"
        rows.append([head, *(_gap(artifact.get("gap")) for artifact in artifacts)])
    header = ["test", *(variant(artifact, markdown=True) for artifact in artifacts)]
    return render(header, rows, markdown=True)


def legend(document: Document) -> str:
    """What the figures of :func:`metrics` are, in a paragraph."""
    said = ["In brackets what was lost against the first column with its 95 % interval"]
    better = document["task"].get("metrics", {})
    if errors := [escaped(name) for name, more in better.items() if not more]:
        said[0] += f", relative for errors ({', '.join(errors)})"
    artifacts = document["artifacts"]
    if any("mcnemar" in artifact["accuracy"] for artifact in artifacts):
        said.append(
            "McNemar's p: were both right equally often, a split of the examples on which they "
            "differ at least as uneven would have this probability"
        )
    if gaps := [artifact["gap"] for artifact in artifacts if artifact.get("gap")]:
        said.append(
            f"The gap is how much better the PyTorch model is on {gaps[0]['n']} training examples; "
            "of artifacts with fewer bits it was not taken"
        )
    return "".join(f"{sentence}. " for sentence in said).strip()


def _named(document: Document, name: str) -> str:
    better = document["task"].get("metrics", {}).get(name, True)
    return escaped(name) + ("" if better else " (lower is better)")


def _cell(accuracy: Record, name: str) -> str:
    if name not in accuracy:
        return MISSING
    lost = accuracy.get("drops", {}).get(name)
    own = lost is None or lost["low"] == lost["high"] == 0  # the reference against itself
    return score(accuracy[name]) + ("" if own else f" ({drop({'drop': lost})})")


def _p(accuracy: Record) -> str:
    found = accuracy.get("mcnemar")
    if found is None:
        return MISSING
    p = "< 0.0001" if found["p"] < 0.0001 else figures(found["p"])
    return f"{p} (better on {found['better']}, worse on {found['worse']})"


def _gap(found: Record | None) -> str:
    return f"{found['value']:+.4f} (train {score(found['train'])})" if found else MISSING


def confusion(document: Document) -> str:
    """The recommended artifact's examples by true class and predicted; may be empty."""
    marked = (one.get("confusion") for one in document["artifacts"] if one["best"])
    table = next(marked, None)
    if not table or len(table) > SHOWN:
        return ""
    rows = [[str(at), *map(str, row)] for at, row in enumerate(table)]
    return render(["true, predicted", *map(str, range(len(table)))], rows, markdown=True)
