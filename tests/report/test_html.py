"""The page: what it holds, what it lets run, and that no name becomes a part of it."""

from __future__ import annotations

import base64
import copy
import hashlib
import html as entities
import io
import json
import re
import sys
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from compressor.report.html import PLOTS, html
from compressor.report.markdown import markdown
from compressor.report.table import plain, targets
from compressor.report.waterfall import waterfall

STORED = Path(__file__).parents[2] / "reports" / "mnist-cnn" / "report.json"
NAMES = ("baseline", "pruned", "recovered", "int8-dynamic", "int8-static")


@cache
def _stored() -> Any:
    return json.loads(STORED.read_text(encoding="utf-8"))


def stored() -> Any:
    """A real report, fresh at every call, without what is optional."""
    found = copy.deepcopy(_stored())
    for row in found["measurements"]:
        row.pop("load_curve", None)
    for artifact in found["artifacts"]:
        artifact |= {"classes": None, "worst": None}
    return found


def picture(shade: int) -> str:
    file = io.BytesIO()
    Image.new("L", (28, 28), shade).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def full() -> Any:
    """The same with a load curve, damage of each class and the worst examples."""
    found = stored()
    for row in found["measurements"]:
        if "skipped" in row:
            continue
        rate = row["throughput_per_s"]
        row["load_curve"] = [
            {
                "offered_per_s": rate * share,
                "served_per_s": rate * share,
                "p50": row["latency_ms"]["p50"] / (1 - share),
                "p99": 3 * row["latency_ms"]["p50"] / (1 - share) if share < 0.9 else None,
                "n": 700,
            }
            for share in (0.25, 0.5, 0.75, 0.95)
        ]
    for artifact in found["artifacts"][1:]:
        drop = {"value": 0.0123, "low": -0.001, "high": 0.0251}
        artifact["classes"] = [
            {"class": f"digit {n}", "n": 980, "baseline": 0.9888, "value": 0.9765, "drop": drop}
            for n in range(10)
        ]
        artifact["worst"] = [
            {
                "example": 17 * n,
                "target": str(n),
                "baseline": str(n),
                "output": str(n + 1),
                "lost": 1.5 / (n + 1),
                "picture": picture(60 + 20 * n),
            }
            for n in range(6)
        ]
    return found


def unjudged() -> Any:
    """A run without data."""
    found = stored()
    found["task"] |= {"data": None, "splits": None, "metric": None, "higher_is_better": None}
    for artifact in found["artifacts"]:
        artifact |= {"accuracy": {"skipped": "no data"}, "within_budget": None, "proven": None}
    return found


def unmeasured() -> Any:
    """Nothing ran."""
    found = stored()
    found |= {"primary": None, "best_per_target": []}
    found["measurements"] = [
        {**row, **targets(found)[0].to_json(), "skipped": "the worker was killed"}
        for row in ({"artifact": name} for name in NAMES)
    ]
    return found


def nothing() -> Any:
    """Interrupted before the first file was made."""
    return unmeasured() | {"artifacts": [], "measurements": [], "stages": []}


CASES: list[Callable[[], Any]] = [stored, full, unjudged, unmeasured, nothing]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)

EVIL = [
    "</script>", "<script>alert(1)</script>", "<!--", "-->", "]]>", "</style>", "</title>",
    "<img src=x onerror=alert(1)>", "<svg/onload=alert(1)>", "&lt;b&gt;", "&#60;", '"', "'", "`",
    "\u2028", "\u2029", "\x00", "\x1b[31m", "\n# heading\n", "\n\n![p](waterfall.png)\n\n",
    "[click](javascript:alert(1))", "<javascript:alert(1)>", "![x](http://evil.example/x.png)",
    "![x](data:text/html,x)", "https://evil.example", "//evil.example", "[a]: http://evil.example",
    "[a](http://evil.example)", "<http://evil.example>", "[a]",
    "|", "\\", "**", "_", "~~", "$", "```", "- ", "1. ", "{title}", "{data}", "%s", "\U0001f600",
    "\u202e", "\ufeff", "★", "pareto.png",
]  # fmt: skip
hostile = st.lists(st.sampled_from(EVIL) | st.text(max_size=4), max_size=4).map(
    lambda parts: "n" + "".join(parts) + "n"
)


def renamed(document: Any, names: dict[str, str]) -> Any:
    """The document with every string that is a key of ``names`` replaced."""
    if isinstance(document, dict):
        return {key: renamed(value, names) for key, value in document.items()}
    if isinstance(document, list):
        return [renamed(value, names) for value in document]
    return names.get(document, document) if isinstance(document, str) else document


def tampered(word: Callable[[], str]) -> Any:
    """Every kind of text that a user or a model chooses, drawn from ``word``."""
    before = full()
    before |= {"name": "TITLE", "warnings": ["WARNING"], "recommendation": "SENTENCE"}
    before["command"] = "compressor run COMMAND"
    before["artifacts"][-1]["steps"][0]["facts"]["left_alone"] = {"fc2": "REASON"}
    known = {name: f"{at}{word()}" for at, name in enumerate(NAMES)}
    known |= {text: word() for text in ("TITLE", "WARNING", "SENTENCE", "REASON", "digit 3")}
    known |= {"relu_1_nchwc": word(), "Conv": f"0{word()}"}
    return renamed(before, known | {"compressor run COMMAND": f"compressor run {word()}"})


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text within each kind."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        if tag not in ("meta", "br", "hr", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    @property
    def known(self) -> Any:
        """The block that page.js reads."""
        return json.loads(self.texts["script"][0])

    @property
    def policy(self) -> dict[str, str]:
        metas = [attributes for tag, attributes in self.elements if tag == "meta"]
        content = next(str(meta["content"]) for meta in metas if "http-equiv" in meta)
        return dict(part.split(" ", 1) for part in content.split("; "))


@every_case
def test_page_has_every_heading_and_a_figure_for_every_picture(case: Callable[[], Any]) -> None:
    page, text = Page(html(case())), markdown(case())
    headings = re.findall(r"^(#+) (.*)$", text, re.MULTILINE)
    for level in {len(marks) for marks, _ in headings}:
        written = [said for marks, said in headings if len(marks) == level]
        shown = [entities.unescape(re.sub(r"\\(.)", r"\1", said)) for said in written]
        assert page.texts[f"h{level}"] == shown
    figures = [attributes["id"] for tag, attributes in page.elements if tag == "figure"]
    assert figures == re.findall(r"^!\[.*\]\((\w+)\.png\)$", text, re.MULTILINE)
    assert set(figures) <= set(PLOTS)


@every_case
def test_document_is_embedded_whole(case: Callable[[], Any]) -> None:
    known = Page(html(case())).known
    assert known["document"] == case()
    assert known["waterfall"] == waterfall(case())
    labels = [target["label"] for target in known["targets"]]
    assert labels == [str(target) for target in targets(case())]  # the first is the primary one


def test_full_page_has_every_plot() -> None:
    elements = Page(html(full())).elements
    figures = [str(attributes["id"]) for tag, attributes in elements if tag == "figure"]
    assert sorted(figures) == sorted(PLOTS)


@every_case
def test_policy_allows_what_is_embedded_and_nothing_else(case: Callable[[], Any]) -> None:
    page = Page(html(case()))
    _, script = page.texts["script"]

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert page.policy == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": digest(page.texts["style"][0]),
        "script-src": digest(script),
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_script_reads_no_data_as_code() -> None:
    script = Page(html(full())).texts["script"][1]
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "on="):
        assert sink not in script


@given(hostile, hostile)
@settings(max_examples=25)
def test_names_stay_text(one: str, other: str) -> None:
    words = cycle((one, other))
    document = tampered(lambda: next(words))
    text = html(document)
    page, harmless = Page(text), Page(html(tampered(lambda: "harmless")))
    # Whatever the names, the page is built of the same elements with the same attributes.
    assert page.elements == harmless.elements
    assert page.known["document"] == document
    assert page.texts["script"][1] == harmless.texts["script"][1]
    assert page.texts["h1"] == [plain(document["name"])]
    assert page.texts["h3"] == [plain(artifact["name"]) for artifact in document["artifacts"]]
    assert not set("\u2028\u2029\x00") & set(text)


@pytest.mark.parametrize("escapes", [True, False], ids=["as it is", "were nothing escaped"])
def test_page_loads_nothing(escapes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not escapes:
        module = sys.modules[html.__module__]
        monkeypatch.setattr(module, "markdown", lambda _: "\n\n".join(["| a |\n|--:|", *EVIL]))
    page = Page(html(tampered(lambda: "".join(EVIL))))
    for tag, attributes in page.elements:
        assert tag not in ("a", "img", "link", "iframe", "object", "base", "form")
        assert not {"src", "href", "style"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
        assert tag != "figure" or attributes["id"] in PLOTS
    assert not re.search(r"url\(|@import", page.texts["style"][0])


def test_numbers_stand_on_the_right() -> None:
    page = Page(html(stored()))
    cells = [attributes for tag, attributes in page.elements if tag == "td"]
    table = len(NAMES) * 11
    assert [cell.get("class") for cell in cells[:table]] == [None, *["right"] * 10] * len(NAMES)


def test_what_json_cannot_hold_is_refused() -> None:
    document = stored()
    document["max_drop"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        html(document)
