"""Robustness, as it is told: the table, the sentence, the notes, the picture."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import document

from compressor.report import robust

WHATS = ("noise", "blur")
ATTACKS = ("fgsm", "pgd")
PNG = b"\x89PNG\r\n\x1a\n"


def row(
    what: str, severity: int | None, value: float, lost: float = 0.0, how: str | None = None
) -> dict[str, Any]:
    return {
        "what": what,
        "severity": severity,
        "how": how,
        "metric": "accuracy",
        "value": value,
        "drop": {"value": lost, "low": lost - 0.01, "high": lost + 0.01},
        "n": 360,
    }


def skipped(what: str, reason: str, how: str | None = None) -> dict[str, Any]:
    return {"what": what, "severity": None, "how": how, "skipped": reason}


def attacked(**lost: float) -> dict[str, Any]:
    """The document with rows for every artifact; ``lost`` are the drops of the recommended one."""
    changed = document()
    for artifact in changed["artifacts"]:
        best = lost if artifact["best"] else {}
        how = "transfer" if artifact["name"].startswith("int8") else "white-box"
        rows = [row("clean", None, 0.9, best.get("clean", 0.0))]
        for what in WHATS:
            rows.append(row(what, None, 0.7, best.get(what, 0.0)))
            rows += [row(what, one, 0.8 - one / 20) for one in (1, 3, 5)]
        rows += [row(what, None, 0.4, best.get(what, 0.0), how) for what in ATTACKS]
        artifact["robustness"] = rows
    return changed


def cells(table: str) -> list[list[str]]:
    """The rows of a markdown table, header first."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    del lines[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("nothing", [None, [], "absent"])
def test_what_was_not_asked_for_is_not_shown(nothing: Any) -> None:
    changed = document()
    for artifact in changed["artifacts"]:
        artifact |= {} if nothing == "absent" else {"robustness": nothing}
    assert (robust.rows(changed), robust.pictured(changed), robust.notes(changed)) == ([], {}, [])
    assert (robust.table(changed), robust.lost(changed)) == ("", "")


def test_the_table_has_the_means_over_severities() -> None:
    changed = attacked(noise=0.05)
    changed["artifacts"][0]["robustness"].reverse()  # clean is first whatever came first
    header, *rows = cells(robust.table(changed, markdown=True))
    assert header == [
        "accuracy", "baseline", "pruned", "recovered", "int8-dynamic", "**int8-static** ★",
    ]  # fmt: skip
    assert sorted(one[0] for one in rows) == sorted(["clean", *WHATS, *ATTACKS])
    assert rows[0] == ["clean", "0.9000"] + ["0.9000, +0.0000 [-0.0100, 0.0100]"] * 4
    (noise,) = (one for one in rows if one[0] == "noise")
    assert noise[1] == "0.7000"
    assert noise[-1] == "0.7000, +0.0500 [0.0400, 0.0600]"
    assert "int8-static *" in robust.table(changed)


def test_what_has_no_value_and_no_drop() -> None:
    changed = attacked()
    changed["artifacts"][1]["robustness"] = [skipped("clean", "the worker died")]
    changed["artifacts"][2]["robustness"] = [{**row("clean", None, 0.5), "drop": None}]
    header, clean, *_ = cells(robust.table(changed, markdown=True))
    assert header[1:4] == ["baseline", "recovered", "int8-dynamic"]
    assert clean[1:3] == ["0.9000", "0.5000, n/a"]
    assert cells(robust.table(changed, markdown=True))[2][2] == "n/a"
    assert robust.notes(changed)[0] == "clean: not measured: the worker died (pruned)"


def test_names_and_reasons_are_shown_as_they_are() -> None:
    changed = attacked()
    changed["artifacts"][0]["name"] = "a|b$"
    for one in changed["artifacts"][0]["robustness"]:
        one["metric"] = "x|y"
    found = cells(robust.table(changed, markdown=True))
    assert found[0][:2] == ["x&#124;y", "a&#124;b\\$"]
    assert robust.table(changed).splitlines()[0].split()[:2] == ["x|y", "a|b$"]


drops = st.dictionaries(st.sampled_from(["clean", *WHATS, *ATTACKS]), st.floats(-0.5, 0.5))


@given(drops)
@settings(max_examples=50)
def test_the_sentence_names_what_lost_beyond_noise(lost: dict[str, float]) -> None:
    changed = attacked(**lost)
    said = robust.lost(changed)
    beyond = {what for what, less in lost.items() if less - 0.01 > 0}
    assert said.startswith("int8-static lost ")
    first, _, rest = said.partition(";")
    every = {"clean", *WHATS, *ATTACKS}
    if not beyond:
        assert "nothing beyond noise" in said
    else:
        assert {what for what in every if what in first.replace("beyond noise", "")} == beyond
        assert {what for what in every if what in rest} == every - beyond


def test_the_notes_group_reasons_and_say_what_a_transfer_is() -> None:
    changed = attacked()
    for artifact in changed["artifacts"][:2]:
        artifact["robustness"] = [
            row("clean", None, 0.9),
            row("noise", None, 0.8),
            skipped("blur", "no pictures"),
            skipped("fgsm", "no pictures", "white-box"),
            skipped("pgd", "of\n its own", "white-box"),
        ]
    why, own, transfer = robust.notes(changed)
    assert why == "blur, fgsm: not measured: no pictures (baseline, pruned)"
    assert own == "pgd: not measured: of its own (baseline, pruned)"
    assert transfer.endswith("safer than it is (int8-dynamic, int8-static)")
    for artifact in changed["artifacts"]:
        artifact["robustness"] = [skipped("fgsm", "no pictures", "transfer")]
    (why,) = robust.notes(changed)
    assert why.startswith("fgsm: not measured: no pictures (baseline, ")


def test_a_panel_for_each_corruption_and_one_for_the_attacks() -> None:
    changed = attacked()
    panels = robust.pictured(changed)
    assert list(panels) == [*WHATS, "attacks"]
    assert panels["blur"] == {
        "clean": ("clean", None), "1": ("blur", 1), "3": ("blur", 3), "5": ("blur", 5),
    }  # fmt: skip
    assert list(panels["attacks"]) == ["clean", "fgsm", "pgd"]
    for artifact in changed["artifacts"]:
        artifact["robustness"] = artifact["robustness"][:1]
    assert robust.pictured(changed) == {}


def test_the_picture() -> None:
    changed = attacked()
    drawn = robust.picture(changed)
    assert drawn.startswith(PNG)
    assert drawn == robust.picture(changed)
    changed["artifacts"][0]["name"] = "_$x_{1"
    changed["artifacts"][1]["robustness"] = [skipped("clean", "the worker died")]
    for artifact in changed["artifacts"]:
        artifact["robustness"] += [row("contrast", 1, 0.2)]
    larger = robust.picture(changed)  # a second row of panels
    high = [int.from_bytes(one[20:24], "big") for one in (drawn, larger)]
    assert high[1] > 1.4 * high[0]
