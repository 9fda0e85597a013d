"""What an inspection found, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from compressor.report.table import count, plain, render, score, size

Document = dict[str, Any]

FEW = 3
"""Names that a cell of a table has room for."""


def parts(document: Document) -> Iterator[str]:
    """The tables of an inspection, one after the other, for a terminal."""
    header = ["model", plain(document["name"])]
    yield render(header, list(_facts(document)), markdown=False, left=2)
    if "needs" in document:
        yield from _held(document)
        return
    if document["failed"]:
        yield f"pruning: cannot be followed: {plain(document['failed'])}"
    elif document["groups"]:
        header = ["can be pruned", "units are", "with it", "units", "params", "MACs"]
        rows = [
            [
                plain(row["layer"]),
                row["kind"],
                _few([layer for layer in row["layers"] if layer != row["layer"]]),
                str(row["units"]),
                f"{row['params_share']:.1%}",
                f"{row['macs_share']:.1%}",
            ]
            for row in document["groups"]
        ]
        yield (
            render(header, rows, markdown=False, left=3)
            + "\nparams and MACs: the part that the channels carry; "
            "weights between two groups count for both"
        )
    else:
        yield "pruning: nothing can be cut"
    if document["left_alone"]:
        rows = [[plain(row["layer"]), plain(row["reason"])] for row in document["left_alone"]]
        yield render(["left alone", "reason"], rows, markdown=False, left=2)
    yield render(["int8", "layers"], list(_schemes(document)), markdown=False, left=2)
    if "sensitivity" in document:
        yield _sensitivity(document["sensitivity"])


MANY = 20
"""Rows of a table of tensors."""


def _held(document: Document) -> Iterator[str]:
    """What a file holds that gives no model as it stands, and what is missing."""
    for what, left in (("operators", 1), ("tensors", 2)):
        if held := document.get(what):
            rows = [[plain(name), str(value)] for name, value in list(held.items())[:MANY]]
            more = f"\nand {len(held) - MANY:,} more" if len(held) > MANY else ""
            yield (
                render([what, "" if left == 2 else "times"], rows, markdown=False, left=left) + more
            )
    yield f"as it stands: {plain(document['needs'])}"


def _facts(document: Document) -> Iterator[list[str]]:
    if document["file"] is not None:
        yield ["file", plain(document["file"])]
    yield ["format", plain(document["format"])]
    yield ["sha256", document["sha256"]]
    if document.get("factory") is not None:
        yield ["factory", plain(document["factory"])]
    if document["file"] is not None:
        yield ["loading runs", plain(", ".join(document["executes"])) or "nothing"]
    for title, key in (("parameters", "params"), ("MACs per example", "macs")):
        if document[key] is not None:
            yield [title, f"{count(document[key])} ({document[key]:,})"]
    if document["state_bytes"] is not None:
        title = "numbers in it" if "needs" in document else "state"
        yield [title, f"{size(document['state_bytes'])} ({document['state_bytes']:,} bytes)"]
    for given in document["inputs"]:
        yield ["input", f"{plain(given['name'])}: {given['dtype']} {_times(given['shape'])}"]
    for made in document["outputs"]:
        yield ["output", f"{made['dtype']} {_times(made['shape'])}"]
    if "needs" in document:
        return
    if document["data"] is None:
        yield ["task", f"{document['kind']}, no data"]
    else:
        yield ["task", f"{document['kind']}, {document['metric']} on {plain(document['data'])}"]


def _schemes(document: Document) -> Iterator[list[str]]:
    found = document["int8"]
    yield ["dynamic", _few(found["dynamic"]) or "none"]
    static = _few(found["static"])
    yield ["static", f"{static}, and the operators between" if static else "none"]
    if found["float"]:
        yield ["stay float", _few(found["float"])]


def _few(names: Sequence[str]) -> str:
    """The names, or how many there are."""
    if len(names) > FEW:
        return f"{len(names)} layers"
    return ", ".join(plain(name) or "the model itself" for name in names)


def _times(shape: Sequence[str | int]) -> str:
    return " x ".join(plain(str(size)) for size in shape)


def _sensitivity(found: Document) -> str:
    """The table of curves: what is lost when a share of one group's units is zeroed alone."""
    metric = found["metric"]
    rows = []
    for curve in found["curves"]:
        row = [plain(curve["layer"]), curve["kind"]]
        for name in ("loss", "metric")[: 1 if metric is None else 2]:
            row += [
                score(value) + ("" if abs(share - asked) < 0.02 else f" ({share:.0%} cut)")
                for asked, share, value in zip(
                    found["asked"], curve["shares"][1:], curve[name][1:], strict=True
                )
            ]
        rows.append(row)
    what = "output change" if metric is None else "loss +"
    header = ["sensitivity", "units are", *(f"{what} {share:.0%}" for share in found["asked"])]
    if metric is not None:
        header += [f"{plain(metric)} {share:.0%}" for share in found["asked"]]
    where = (
        "on the calibration split"
        if metric is not None
        else "no data: changes of the output, squared and relative to its variance, on made-up "
        "inputs"
    )
    whole = found["curves"][0]["metric"][0]
    with_all = "" if metric is None else f"; {plain(metric)} of the whole model {score(whole)}"
    table = render(header, rows, markdown=False, left=2)
    return f"{table}\nunits of one group zeroed, {where}{with_all}"
