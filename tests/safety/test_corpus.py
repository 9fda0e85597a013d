"""Hostile files: none is executed, none writes outside its folder, none hides in a report."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import (
    CONTROLS,
    EVIL,
    FILE_DATA,
    HARMLESS,
    MODELS,
    ONNX,
    RECIPES,
    SILENT,
    SPECS,
    Make,
    linear,
    module,
    outcome,
    poison,
    saved,
    titled,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import EpsImagePlugin
from typer.testing import CliRunner

import compressor
from compressor import InputError, Report, names, pipeline, recipe, stages
from compressor import data as sources
from compressor.cli import app, progress
from compressor.loading import onnxfile
from compressor.loading import task as tasks
from compressor.measure.threads import one_thread
from compressor.pipeline.folder import Folder
from compressor.report import gate
from compressor.report.html import html
from compressor.report.markdown import markdown
from compressor.report.several import several
from compressor.report.table import plain

HERE = Path(__file__).parents[2]
STORED = HERE / "reports" / "mnist-cnn" / "report.json"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


class Place:
    """Where a hostile file lies, and what must be as it was when it was read.

    ``folder`` is the file's own, ``here`` where the user stands, ``home`` theirs, ``scratch`` for
    temporary files; ``canary`` must never be.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.canary = root, root / "canary"
        self.folder, self.here, self.home, self.scratch = (
            root / name for name in ("folder", "here", "home", "scratch")
        )
        for folder in (self.folder, self.here, self.home, self.scratch):
            folder.mkdir(exist_ok=True)
        (self.home / "precious").write_text("mine", encoding="utf-8")
        self.elsewhere = (HERE, HERE / "compressor", Path.home(), Path("/"), Path("/tmp"))

    def made(self, make: Make) -> str:
        named = make(self.folder, self.canary)
        self.before = self.listed()
        return named

    def listed(self) -> dict[str, Any]:
        """Every name below, with the size of what is a file."""
        found: dict[str, Any] = {
            str(path): path.lstat().st_size if path.is_file() else None
            for part in (self.folder, self.here, self.home)
            for path in sorted(part.rglob("*"))
            if "/.cache/" not in f"{path}/" and "/.config/" not in f"{path}/"
        }
        for folder in self.elsewhere:
            names = {path.name for path in folder.iterdir()}
            if folder in self.elsewhere[2:]:  # where others write, too
                names = {name for name in names if "escaped" in name}
            found[str(folder)] = {name for name in names if name[0] not in "._"}
        return found

    def unharmed(self) -> None:
        assert not self.canary.exists()
        assert self.listed() == self.before
        assert (self.home / "precious").read_text(encoding="utf-8") == "mine"
        assert not list(self.root.rglob("escaped*"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    made = Place(tmp_path)
    monkeypatch.chdir(made.here)
    monkeypatch.setenv("HOME", str(made.home))
    monkeypatch.setenv("TMPDIR", str(made.scratch))
    monkeypatch.setattr(tempfile, "tempdir", str(made.scratch))
    monkeypatch.setenv("PATH", f"{made.folder}{os.pathsep}{os.environ['PATH']}")  # its own gs
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return made


def refused(call: Callable[[], object]) -> str:
    """The one line that a call ends in."""
    with warnings.catch_warnings(action="ignore"), pytest.raises(InputError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    assert line.strip()
    assert len(line) < 1000
    return line


def bound(path: Path, model: Path) -> None:
    """What happens to a recipe before any work starts."""
    task = tasks(model)
    for step in stages.bind(recipe.named(recipe.read(path))):
        stages.fitting(step, task)


# Each file


@pytest.mark.parametrize("what", MODELS)
def test_a_hostile_model_is_one_line(place: Place, what: str) -> None:
    path = place.made(MODELS[what])
    for read in (compressor.load, tasks):
        if what not in SILENT:
            refused(lambda read=read: read(path))
            continue
        _, line = outcome(lambda read=read: read(path))
        assert not line or "--arch" in line  # weights only
    place.unharmed()


@pytest.mark.parametrize("what", FILE_DATA)
def test_data_that_a_file_names_is_not_run(place: Place, what: str) -> None:
    path = place.made(FILE_DATA[what])
    compressor.load(path)
    line = refused(lambda: tasks(path))
    assert line.startswith("data ")
    place.unharmed()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", SPECS)
def test_hostile_data_is_one_line(place: Place, what: str) -> None:
    spec = place.made(SPECS[what])
    refused(lambda: sources.read(spec).splits.train.head(2))
    place.unharmed()


@pytest.mark.parametrize("what", RECIPES)
def test_a_hostile_recipe_is_one_line(place: Place, what: str) -> None:
    model = saved(place.home / "model.pt")
    path = Path(place.made(RECIPES[what]))
    line = refused(lambda: bound(path, model))
    assert line.isprintable()
    place.unharmed()


@pytest.mark.parametrize("what", ONNX)
def test_a_hostile_onnx_file_is_one_line(place: Place, what: str) -> None:
    path = Path(place.made(ONNX[what]))
    refused(lambda: onnxfile.read(path))
    refused(lambda: compressor.bench([path], provider=("cpu",), threads=(1,)))
    place.unharmed()


def test_the_bait_is_real(tmp_path: Path) -> None:
    """Read as such files usually are, each kind of bait bites."""
    with warnings.catch_warnings(action="ignore"):
        for what in (
            "a pickle",
            "a pickle of the older form",
            "a pickle among weights",
            "a pickle that evaluates",
            "a layer with a hook",
        ):
            root = tmp_path / what
            (root / "file").mkdir(parents=True)
            path = MODELS[what](root / "file", root / "canary")
            torch.load(path, weights_only=False)
            assert (root / "canary").exists(), what
    canary = tmp_path / "canary"
    names.function(f"{module(tmp_path, canary)}:make", "--arch")
    assert canary.exists()
    canary.unlink()
    poison(canary).call[0](*poison(canary).call[1])
    assert canary.exists()
    path = ONNX["weights above"](tmp_path, canary)
    held = Path(path).parent / "../secret"
    assert held.exists()
    sound = tmp_path / "sound.onnx"
    linear(sound)
    assert onnxfile.read(sound).slots


# Folders of others


def link(place: Place) -> Path:
    """A run folder whose files to be moved up lie behind a link: in the user's home."""
    (place.folder / "report.json").write_bytes(STORED.read_bytes())
    (place.folder / ".together.ready").symlink_to(place.home, target_is_directory=True)
    place.before = place.listed()
    return place.folder


def test_a_report_moves_nothing_of_others(place: Place) -> None:
    Report.read(link(place))
    place.unharmed()


def test_a_lock_that_is_a_link_empties_nothing(place: Place) -> None:
    state = {"fingerprint": "theirs", "command": "compressor run"}
    (place.folder / "run.json").write_text(json.dumps(state), encoding="utf-8")
    (place.folder / "run.lock").symlink_to(place.home / "precious")
    place.before = place.listed()
    refused(lambda: Folder.open(place.folder, "ours", "compressor run", fresh=False))
    place.unharmed()
    refused(lambda: Folder.open(place.folder, "ours", "compressor run", fresh=True))
    place.unharmed()


def test_results_take_the_place_of_links(place: Place) -> None:
    (place.folder / "report.json").write_bytes(STORED.read_bytes())
    for name in ("report.md", "report.html", "pareto.png"):
        (place.folder / name).symlink_to(place.home / "precious")
    Report.read(place.folder).save()
    assert (place.home / "precious").read_text(encoding="utf-8") == "mine"
    assert not (place.folder / "report.md").is_symlink()


# Names


class Elements(HTMLParser):
    """The elements of a page with their attributes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, attrs))


def renamed(document: Any, old: str, new: str) -> Any:
    """The document with ``old`` replaced in every text and key."""
    if isinstance(document, dict):
        return {key.replace(old, new): renamed(value, old, new) for key, value in document.items()}
    if isinstance(document, list):
        return [renamed(value, old, new) for value in document]
    return document.replace(old, new) if isinstance(document, str) else document


def blocks(text: str) -> list[tuple[str, str, int]]:
    """What a code host would make of a page: its elements and their depth, but for plain text."""
    found = []
    for token in (
        MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    ):
        found.append((token.type, token.tag, token.level))
        for child in token.children or ():
            if child.type not in ("text", "text_special", "softbreak"):
                found.append((child.type, child.tag, child.level))
    return found


NAME = "NAME"
"""Stands for a name in the documents below."""


@dataclass(frozen=True)
class Documents:
    """Reports, too long to be shown where a test fails."""

    each: list[Any] = field(repr=False)


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    """Reports in which every text that a model, a file, a step or the data gives is or has
    :data:`NAME`: a stored one, and one of a run of a model whose layers are called so."""
    known = json.loads(STORED.read_text(encoding="utf-8"))
    known |= {
        "name": f"x{NAME}x",
        "recommendation": f"Take x{NAME}x.",
        "warnings": [f"x{NAME}x: no"],
    }
    known["task"]["data"] = f"table:x{NAME}x.csv?target=x{NAME}x"
    for artifact in known["artifacts"]:
        for at, said in enumerate(artifact["steps"]):
            said["facts"] = {
                **said.get("facts", {}),
                f"x{NAME}x": f"x{NAME}x",
                "left_alone": {f"x{NAME}x": f"why x{NAME}x", f"y{NAME}x": "why"},
                "each": [{f"x{NAME}x": at}],
            }
            said["settings"] = {**said["settings"], "keep": [f"x{NAME}x"], f"x{NAME}x": 1}
        artifact["path"] = f"artifacts/x{NAME}x.onnx"
        artifact["classes"] = [
            {
                "class": f"x{NAME}x", "n": 10, "baseline": 0.9, "value": 0.8,
                "drop": {"value": 0.1, "low": 0.05, "high": 0.2},
            }
        ]  # fmt: skip
        artifact["worst"] = [
            {
                "example": 1, "target": f"x{NAME}x", "baseline": f"x{NAME}x",
                "output": f"x{NAME}x", "lost": 1.0, "picture": None,
            }
        ]  # fmt: skip
    known["artifacts"][1:] = renamed(known["artifacts"][1:], "pruned", f"p{NAME}x")
    known["measurements"] = renamed(known["measurements"], "pruned", f"p{NAME}x")
    for row in known["measurements"]:
        if placed := row.get("placement"):
            for one in (*placed["operators"], *placed["dearest"]):
                one["op"] = f"{one['op']}{NAME}x"
            for one in placed["dearest"]:
                one["node"] = f"x{NAME}x"
    folder = tmp_path_factory.mktemp("named")
    titled(folder / f"{NAME}.pt", NAME)
    with one_thread():
        report = pipeline.run(
            folder / f"{NAME}.pt", data="breast-cancer", prune=0.5, epochs=0,
            provider=("cpu",), threads=(1,), out=folder / "run",
        )  # fmt: skip
    assert NAME in json.dumps(report.document["artifacts"][1]["steps"])  # its layers are in there
    return Documents([known, report.document])


evil = st.lists(st.sampled_from(EVIL) | st.text(max_size=3), min_size=1, max_size=3).map(
    lambda parts: "n" + "".join(parts) + "n"
)


@given(evil)
@settings(max_examples=15)
def test_names_stay_names(documents: Documents, name: str) -> None:
    limits, run = gate.limits(None), Path("run")
    calm, wild = (renamed(documents.each, NAME, word) for word in (HARMLESS, name))
    for one, other in zip(calm, wild, strict=True):
        text, page, shown = markdown(other), html(other), str(Report(other, run))
        assert blocks(text) == blocks(markdown(one))
        assert Elements(page).found == Elements(html(one)).found
        assert shown.count("\n") == str(Report(one, run)).count("\n")
        judged, found = (gate.compare(each, each, limits) for each in (one, other))
        assert blocks(found.table(markdown=True)) == blocks(judged.table(markdown=True))
        for view in (text, page, shown, found.table(markdown=False)):
            assert not CONTROLS & set(view)
    assert plain(name) in str(Report(wild[0], run))
    runs = [
        several([Report(one, Path(f"{at}")) for at, one in enumerate(of)]) for of in (calm, wild)
    ]
    assert blocks(runs[1].markdown()) == blocks(runs[0].markdown())
    assert not CONTROLS & set(str(runs[1]) + runs[1].markdown())


@pytest.mark.parametrize("name", EVIL)
def test_every_such_name_is_seen_in_a_report(documents: Documents, name: str) -> None:
    """Not only harmless: what is left of the name can be read."""
    known = renamed(documents.each[0], NAME, name)
    parsed = MarkdownIt("commonmark", {"html": False}).enable("table").parse(markdown(known))
    read = [
        "".join(child.content for child in token.children or () if child.type.startswith("text"))
        for token in parsed
    ]
    assert any(plain(f"x{name}x") in text for text in read)


@pytest.mark.parametrize("name", EVIL)
def test_an_inspection_shows_names_as_they_are(tmp_path: Path, name: str) -> None:
    model = titled(tmp_path / "model.pt", f"n{name}n")
    found = compressor.inspect(model, data="breast-cancer")
    calm = compressor.inspect(titled(tmp_path / "model.pt", HARMLESS), data="breast-cancer")
    assert not CONTROLS & set(str(found))
    assert str(found).count("\n") == str(calm).count("\n")
    assert plain(f"n{name}n".replace(".", "·")) in str(found)
    assert json.dumps(found.document).isascii()


@given(evil)
def test_a_recipe_shows_its_settings_and_reads_back(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    steps = [
        recipe.Step("prune", {"ratio": 0.5, "keep": [name, f"{name}.x"]}, "pruned", "baseline")
    ]
    text = recipe.write(steps, f"compressor run {name}.pt")
    assert not CONTROLS & set(text)
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    assert recipe.read(path) == steps


@pytest.mark.parametrize("name", [*EVIL, "closing [/x]"])
def test_progress_shows_names_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    def drawn(text: str) -> str:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "300")
        with progress() as shown:
            shown(1, 2, f"measuring x{text}x")
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)

    assert drawn(HARMLESS).count(f"x{HARMLESS}x")
    assert plain(f"x{name}x") in drawn(name)


def test_errors_are_one_line_whatever_the_name(place: Place) -> None:
    for at, name in enumerate(EVIL[::2]):
        path = place.folder / f"{at}{name.replace('/', '|')}.pt".replace("\0", "")
        with path.open("wb") as file:  # PyTorch takes no such name
            torch.save(poison(place.canary), file)
        seen = CliRunner().invoke(app, ["inspect", str(path)], prog_name="compressor")
        assert "posix.system (--trust-pickle)" in seen.stdout
        described(seen.stdout)
        for words in (["run", path], ["bench", path], ["report", path]):
            result = CliRunner().invoke(app, [str(word) for word in words], prog_name="compressor")
            assert result.exit_code == 2, result.output
            assert result.stdout == ""
            assert result.stderr.count("\n") == 1
            assert not CONTROLS & set(result.stderr)
    assert not place.canary.exists()


def described(text: str) -> None:
    """What ``inspect`` says of a file that gives no model as it stands."""
    assert "as it stands: " in text
    assert not (CONTROLS - {"\n"}) & set(text)


# The command itself

CALLS: dict[str, tuple[Make, Callable[[str], list[str]]]] = {
    **{
        f"inspect {what}": (MODELS[what], lambda named: ["inspect", named])
        for what in [*MODELS][::2]
    },
    **{f"run {what}": (MODELS[what], lambda named: ["run", named]) for what in [*MODELS][1::2]},
    **{
        f"run {what}": (make, lambda named: ["run", named, "--prune", "0.5"])
        for what, make in FILE_DATA.items()
    },
    **{
        f"run with {what}": (make, lambda named: ["run", "../home/model.pt", "--data", named])
        for what, make in SPECS.items()
    },
    **{
        f"run by {what}": (make, lambda named: ["run", "../home/model.pt", "--recipe", named])
        for what, make in RECIPES.items()
    },
    **{f"bench {what}": (make, lambda named: ["bench", named]) for what, make in ONNX.items()},
}
"""The file, and the command that it is given to."""

SAMPLE = ("inspect a pickle", "bench weights above")
"""In the default suite; in the slow one every fourth. All are read in this process, above."""

LOADS = {f"{verb} {what}" for what in SILENT for verb in ("run", "inspect")}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "what",
    [
        what if what in SAMPLE else pytest.param(what, marks=pytest.mark.slow)
        for at, what in enumerate(CALLS)
        if what not in LOADS and (what in SAMPLE or at % 4 == 0)
    ],
)
def test_the_command_refuses_it_in_one_line_or_says_what_it_is(place: Place, what: str) -> None:
    saved(place.home / "model.pt")
    make, words = CALLS[what]
    named = place.made(make)
    done = subprocess.run(
        [sys.executable, "-m", "compressor", *words(named)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if what.startswith("inspect") and done.returncode == 0:
        assert done.stderr == ""
        described(done.stdout)
    else:
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert done.stderr.startswith("compressor: error: ")
        assert done.stderr.count("\n") == 1
        assert not CONTROLS & set(done.stderr)
    place.unharmed()


def test_a_run_of_what_is_good_in_a_poisoned_file_runs_nothing_else(place: Place) -> None:
    path = place.made(MODELS["poisoned sample input"])
    found = compressor.inspect(path)
    assert found.document["params"] == sum(
        one.numel() for one in compressor.load(path).parameters()
    )
    assert copy.deepcopy(found.document)["executes"] == []
    place.unharmed()
