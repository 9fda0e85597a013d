"""The page in a real browser: its plots, its tables, and that hostile names do nothing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_html import NAMES, full, stored, tampered, unjudged

from compressor.report.html import html
from compressor.report.table import count, figures, milliseconds, plain, score, size
from compressor.report.waterfall import waterfall

pytest.importorskip("selenium", reason="selenium is not installed")

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

CHROMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OWNED = "document.title='owned';document.body.dataset.owned=1"


@pytest.fixture(scope="module")
def chrome() -> Iterator[webdriver.Chrome]:
    found = next(filter(None, map(shutil.which, CHROMES)), None)
    driver = shutil.which("chromedriver")
    if not found or not driver:
        pytest.skip(f"needs one of {', '.join(CHROMES)} and chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


class Reader:
    """Somebody who has opened the page of a document."""

    def __init__(self, chrome: webdriver.Chrome, folder: Path) -> None:
        self.chrome, self.file = chrome, folder / "report.html"

    def open(self, document: Any, *, width: int = 1200, scheme: str = "light") -> None:
        self.file.write_text(html(document), encoding="utf-8")
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.chrome.get(self.file.as_uri())

    def ask(self, script: str, *arguments: Any) -> Any:
        return self.chrome.execute_script(f"return {script}", *arguments)

    def all(self, selector: str) -> list[WebElement]:
        return self.chrome.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """What a reader sees, of whatever is scrolled away too."""
        each = "(element) => element.innerText ?? element.textContent"  # an SVG has only the latter
        found = f"Array.from(document.querySelectorAll(arguments[0]), {each})"
        return [str(text) for text in self.ask(found, selector)]

    def points(self, plot: str) -> dict[str, tuple[float, float]]:
        """The places of a plot's circles by the name that is read out."""
        script = """Array.from(document.querySelectorAll(arguments[0]), (point) => {
            const circle = point.querySelector("circle:not(.reach)");
            return [point.getAttribute("aria-label"),
                Number(circle.getAttribute("cx")), Number(circle.getAttribute("cy"))];
        })"""
        found = self.ask(script, f"#{plot} .point")
        return {re.split(r"[,:]", label)[0]: (x, y) for label, x, y in found}

    def complaints(self) -> list[Any]:
        """What the browser wrote to its console since the last call."""
        chrome: Any = self.chrome  # its logs have no types
        return list(chrome.get_log("browser"))

    def point(self, selector: str) -> None:
        """Moves the mouse there at once."""
        there = self.all(selector)[0]
        ActionChains(self.chrome, duration=0).move_to_element(there).perform()

    def tip(self) -> dict[str, str]:
        """The tooltip's figures, empty while none is shown."""
        rows = self.texts(".tip:not([hidden]) dt")
        return dict(zip(rows, self.texts(".tip:not([hidden]) dd"), strict=True))


@pytest.fixture
def reader(chrome: webdriver.Chrome, tmp_path: Path) -> Reader:
    return Reader(chrome, tmp_path)


def on_primary(document: Any) -> dict[str, Any]:
    return {row["artifact"]: row for row in document["measurements"] if row.get("primary")}


def test_page_opens_without_errors_or_requests(reader: Reader) -> None:
    for document in (stored(), full(), unjudged()):
        reader.open(document)
        assert reader.complaints() == []
        entries = reader.ask("performance.getEntriesByType('resource').map((e) => e.name)")
        assert [name for name in entries if not name.startswith("data:")] == []


def test_every_plot_has_its_points(reader: Reader) -> None:
    document = full()
    reader.open(document)
    assert set(reader.points("pareto")) == set(NAMES)
    assert len(reader.all("#waterfall .point")) == 3 * len(waterfall(document))
    epochs = [
        entry
        for step in document["artifacts"][2]["steps"]
        for entry in step.get("facts", {}).get("history", ())
    ]
    assert epochs
    drawn = epochs[0].keys() - {"epoch", "rate", "seconds", "examples_per_s"}
    assert drawn == {"loss", "accuracy"}
    assert len(reader.all("#curves .point")) == len(epochs) * len(drawn)
    assert len(reader.all("#load .point")) == 3 * len(NAMES)  # of four, one has no p99
    pictures = reader.ask(
        "Array.from(document.querySelectorAll('#worst img'), (i) => i.complete && i.naturalWidth)"
    )
    assert pictures == [28] * 6


def test_without_data_the_height_is_fidelity(reader: Reader) -> None:
    reader.open(unjudged())
    heights = {name: y for name, (_, y) in reader.points("pareto").items()}
    decibels = {one["name"]: one["fidelity"]["sqnr_db"] for one in unjudged()["artifacts"]}
    # The reference matches itself exactly: above all others.
    order = sorted(NAMES, key=lambda name: -(decibels[name] or float("inf")))
    assert sorted(NAMES, key=heights.__getitem__) == order
    assert "SQNR" in reader.texts("#pareto")[0]


def test_bars_are_the_intervals(reader: Reader) -> None:
    document, rows = stored(), on_primary(stored())
    for at, artifact in enumerate(document["artifacts"]):
        artifact["accuracy"] |= {"accuracy": 0.9 - at / 100}
        artifact["accuracy"]["drop"] = {"value": 0.03, "low": 0.02, "high": 0.05}
        rows[artifact["name"]]["latency_ms"]["p50"] = 2.0 + at
        rows[artifact["name"]]["speedup"] |= {"value": 2.0, "low": 1.6, "high": 2.5}
    document["measurements"] = list(rows.values())
    reader.open(document)
    points = [reader.points("pareto")[name] for name in NAMES]
    right, down = points[1][0] - points[0][0], points[1][1] - points[0][1]  # 1 ms and 0.01
    script = """Array.from(document.querySelectorAll(arguments[0]), (line) =>
        ["x1", "x2", "y1", "y2"].map((name) => Number(line.getAttribute(name))))"""
    for at, (name, (x, y)) in enumerate(zip(NAMES, points, strict=True)):
        across, up = reader.ask(script, f"#pareto .point[aria-label^='{name}'] line")
        # A speed-up of 2 that may be 2.5 is a latency that may be 0.8 of what it is.
        assert across == pytest.approx(
            [x - 0.2 * (2 + at) * right, x + 0.25 * (2 + at) * right, y, y]
        )
        assert sorted(up[2:]) == pytest.approx([y - down, y + 2 * down])


def test_pointing_at_an_artifact_shows_its_figures(reader: Reader) -> None:
    document = stored()
    reader.open(document)
    rows = on_primary(document)
    for artifact in document["artifacts"]:
        label = f"#pareto .point[aria-label^='{artifact['name']}']"
        assert reader.tip() == {}
        if artifact["name"] in ("pruned", "baseline"):
            circle = f"{label} circle:not(.reach)"
            reader.point(circle)
        else:  # others lie on top of it, or may
            reader.ask("document.querySelector(arguments[0]).focus()", label)
        row, shown = rows[artifact["name"]], reader.tip()
        assert shown["accuracy"] == score(artifact["accuracy"]["accuracy"])
        assert shown["p50"] == f"{milliseconds(row['latency_ms']['p50'])} ms"
        assert shown["size"] == size(artifact["size_bytes"])
        assert shown["MACs"] == count(artifact["macs"])
        gain = row["speedup"]
        ratio = f"{gain['value']:.2f}x [{gain['low']:.2f}, {gain['high']:.2f}]"
        assert shown["speed-up [95 %]"] == ("reference" if artifact["name"] == NAMES[0] else ratio)
        words = reader.all(label)[0].get_attribute("aria-label")
        assert all(f"{what} {value}" in str(words) for what, value in shown.items())
        reader.point("h1")
        reader.ask("document.activeElement.blur()")


def test_keyboard_walks_the_points(reader: Reader) -> None:
    reader.open(stored())
    reader.ask("document.querySelector('#pareto select').focus()")
    seen = []
    for _ in range(len(NAMES) + 1):  # the box for the budget comes first
        ActionChains(reader.chrome).send_keys(Keys.TAB).perform()
        seen.append(bool(reader.tip()))
    assert seen == [False, *[True] * len(NAMES)]
    ActionChains(reader.chrome).send_keys(Keys.ESCAPE).perform()
    assert reader.tip() == {}


def test_selector_changes_what_accuracy_is_drawn_against(reader: Reader) -> None:
    document = stored()
    reader.open(document)
    costs = {
        "file size": {one["name"]: one["size_bytes"] for one in document["artifacts"]},
        "parameters": {one["name"]: one["params"] for one in document["artifacts"]},
        "p50 latency, ms (cpu, batch 1, 2 threads)": {
            row["artifact"]: row["latency_ms"]["p50"]
            for row in document["measurements"]
            if "skipped" not in row and (row["runtime"], row["threads"]) == ("onnxruntime", 2)
        },
    }
    for label, of in costs.items():
        Select(reader.all("#pareto select")[0]).select_by_visible_text(label)
        assert label in reader.texts("#pareto text")
        across = {name: x for name, (x, _) in reader.points("pareto").items()}
        for one in NAMES:
            for other in NAMES:
                assert (across[one] < across[other]) == (of[one] < of[other])


def test_box_leaves_only_what_holds_the_budget(reader: Reader) -> None:
    document = stored()
    reader.open(document)
    reader.all("#pareto input")[0].click()
    holding = {one["name"] for one in document["artifacts"] if one["within_budget"]}
    assert holding < set(NAMES)
    assert set(reader.points("pareto")) == holding


def test_worst_examples_of_another_artifact(reader: Reader) -> None:
    document = full()
    document["artifacts"][1]["worst"] = document["artifacts"][1]["worst"][:2]
    reader.open(document)
    Select(reader.all("#worst select")[0]).select_by_visible_text("pruned")
    assert len(reader.all("#worst img")) == 2


def test_click_on_a_header_sorts(reader: Reader) -> None:
    document = stored()
    document["measurements"][0]["peak_rss_bytes"] = None
    reader.open(document)
    rows = on_primary(document)
    by = {
        "size": {one["name"]: one["size_bytes"] for one in document["artifacts"]},
        "p50 ms": {name: row["latency_ms"]["p50"] for name, row in rows.items()},
        "peak memory": {name: row["peak_rss_bytes"] for name, row in rows.items()},
        "speed-up": {name: row["speedup"]["value"] for name, row in rows.items()},
        "variant": {name: name for name in NAMES},
    }
    shown = {"size": size, "p50 ms": milliseconds, "peak memory": size}
    for at, header in enumerate(reader.texts("table:first-of-type thead")[0].split("\t")):
        if (column := header.strip()) not in by:
            continue
        button = reader.all(".scroll:first-of-type th button")[at]
        for rising in (True, False):
            reader.ask("arguments[0].click()", button)
            names = reader.texts(".scroll:first-of-type tbody td:first-child")[: len(NAMES)]
            values = [by[column][name.removesuffix(" ★")] for name in names]
            known = [value for value in values if value is not None]
            assert values == known + [None] * (len(values) - len(known))  # n/a comes last
            said = [shown.get(column, str)(value) for value in known]  # equal as far as is seen
            ordered = sorted(known, reverse=not rising)
            assert said == [shown.get(column, str)(value) for value in ordered]
            state = button.find_element(By.XPATH, "..").get_attribute("aria-sort")
            assert state == ("ascending" if rising else "descending")


def test_numbers_are_written_as_in_the_tables(reader: Reader) -> None:
    reader.open(stored())
    # Sevenths are no ties, which Python and JavaScript round apart.
    values = [n / 7 * 10.0**power for n in (1, 9, 50, 699, 6_999, 40_000) for power in range(-5, 9)]
    for name, show in (("figures", figures), ("size", size), ("count", count)):
        written = reader.ask(f"arguments[0].map({name})", values)
        assert [str(text) for text in written] == [show(value) for value in values], name
    plain_scores = [value for value in values if 1e-4 < value < 9999]  # no exponents
    assert reader.ask("arguments[0].map(score)", plain_scores) == list(map(score, plain_scores))
    assert reader.ask("[0, 7, 999, 1000].map(size)") == [size(n) for n in (0, 7, 999, 1000)]
    assert reader.ask("[null, undefined].map(size)") == ["n/a", "n/a"]


def test_a_hostile_name_is_text_and_runs_nothing(reader: Reader) -> None:
    evil = f'"\'></script></svg><img src=x onerror="{OWNED}"><script>{OWNED}</script>&amp;'
    document = tampered(lambda: evil)
    for artifact in document["artifacts"][1:]:
        for one in artifact["worst"]:
            one |= {"target": evil, "output": evil, "baseline": evil}
        artifact["worst"][0]["picture"] = f'x" onerror="{OWNED}'
        artifact["steps"][-1]["stage"] = evil
    reader.open(document)
    for point in reader.all(".point"):
        reader.ask("arguments[0].focus()", point)
    assert reader.chrome.title == plain(document["name"])
    assert reader.ask("document.body.dataset.owned") is None
    assert reader.complaints() == []
    assert reader.texts("h1") == [plain(document["name"])]
    assert reader.texts("h3") == [plain(one["name"]) for one in document["artifacts"]]
    assert len(reader.all("script")) == 2
    assert len(reader.all("img")) == 5  # the sixth is no picture
    labels = [point.get_attribute("aria-label") for point in reader.all("#pareto .point")]
    assert all(evil in str(label) for label in labels)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_page_fits_the_screen_in_the_colours_asked_for(
    reader: Reader, width: int, scheme: str
) -> None:
    document = full()
    document["name"] = "resnet" * 40
    reader.open(document, width=width, scheme=scheme)
    assert reader.ask("document.documentElement.scrollWidth") <= width
    colour = reader.ask("getComputedStyle(document.body).backgroundColor")
    red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
    assert (red + green + blue > 600) == (scheme == "light")
    script = "Array.from(document.querySelectorAll('svg'), (s) => s.getBoundingClientRect().right)"
    assert max(reader.ask(script)) <= width


def test_without_javascript_the_tables_stand(reader: Reader) -> None:
    setting = "Emulation.setScriptExecutionDisabled"
    reader.chrome.execute_cdp_cmd(setting, {"value": True})
    try:
        reader.open(stored())
        text = reader.all("main")[0].text
    finally:
        reader.chrome.execute_cdp_cmd(setting, {"value": False})
    assert all(name in text for name in NAMES)
    assert "Drawn by JavaScript" in text
