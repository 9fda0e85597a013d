"""report.html: the report as one file that opens offline, with plots that answer to the pointer.

The text is that of :mod:`compressor.report.markdown`; ``page.js`` and ``plots.js`` draw a plot
where it has a picture. Names come from models, so nothing in a document may become a part of the
page: markdown is rendered without raw HTML, links and foreign pictures, the plots read the document
from an inert block of JSON, and a policy in the page lets only our own script and style run
(https://www.w3.org/TR/CSP3/).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.report.markdown import markdown
from compressor.report.table import Document, label, primary, printable, subject, targets
from compressor.report.waterfall import waterfall

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

PLOTS = ("pareto", "waterfall", "curves", "load", "worst")
"""Pictures of report.md, without their ``.png``, that ``plots.js`` draws."""

INERT = {ord(mark): f"\\u{ord(mark):04x}" for mark in "<>&\u2028\u2029"}
"""What could end a script block or a line of it, as JSON writes it within a string."""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{content}</main>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def html(document: Document) -> str:
    """The whole page, UTF-8 text that needs no other file and no network.

    Raises :class:`ValueError` where the document holds a number that JSON cannot write.
    """
    style, script = _part("page.css"), _part("page.js") + _part("plots.js")
    policy = {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": _digest(style),
        "script-src": _digest(script),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return PAGE.format(
        policy="; ".join(f"{name} {source}" for name, source in policy.items()),
        title=escape(printable(document["name"])),
        style=style,
        content=_content(markdown(document)),
        data=_data(document),
        script=script,
    )


@cache
def _part(name: str) -> str:
    """A file that lies beside this one, with the line ends that a browser hashes."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """The source of a policy that allows this very text inline."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _data(document: Document) -> str:
    """What ``page.js`` reads: the document, and what Python derives of it for the other views.

    ``subject`` is the artifact that the page looks at closely; ``targets`` has the four fields of
    each and its ``label``, the primary one first.
    """
    first = primary(document)
    every = sorted(targets(document), key=lambda target: target != first)
    known: dict[str, Any] = {
        "document": document,
        "subject": close["name"] if (close := subject(document)) else None,
        "targets": [{**target.to_json(), "label": label(target)} for target in every],
        "waterfall": waterfall(document),
    }
    return json.dumps(known, allow_nan=False).translate(INERT)


def _content(text: str) -> str:
    """The markdown as HTML, a figure for each plot in place of its picture."""
    parser = _parser()
    tokens = parser.parse(text)
    for at, token in enumerate(tokens):
        # The policy forbids style attributes, those of markdown-it too.
        if token.attrs.pop("style", None) == "text-align:right":
            token.attrSet("class", "right")
        if token.type == "inline" and [child.type for child in token.children or ()] == ["image"]:
            # A figure cannot stand in a paragraph.
            tokens[at - 1].hidden = tokens[at + 1].hidden = True
    return str(parser.renderer.render(tokens, parser.options, {}))


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.disable(["link", "autolink", "reference"])
    parser.add_render_rule("image", _picture)
    parser.add_render_rule("table_open", lambda *_: '<div class="scroll"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return parser


def _picture(_: object, tokens: Sequence[Token], at: int, *__: object) -> str:
    """The place of a plot; of any other picture only its words."""
    source, words = str(tokens[at].attrs["src"]), escape(tokens[at].content)
    name = source.removesuffix(".png")
    if name not in PLOTS or name == source:
        return words
    return (
        f'<figure class="plot" id="{name}"><figcaption>{words}</figcaption>'
        f'<p class="hint">Drawn by JavaScript; the figures stand in the tables too.</p></figure>\n'
    )
