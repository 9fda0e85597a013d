"""Changed bytes: what is read is the same as before, or refused in one line.

Where a form has a checksum (a digest of ours, the CRC-32 of a zip or gzip file) no change of a
number passes. Where it has none (bare weights, ONNX, CSV, TOML, JSON, plain IDX) a changed number
is another number, and nobody can know: that is shown here, not promised away.

Files are read in the limited child of :mod:`compressor.guard`, many in one child: what
would hang, crash or fill the memory there is seen as that, and not as the end of the tests.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import jsonschema  # noqa: F401 - the server imports this file once, and its children need not
import numpy as np
import onnx
import pytest
import torch
import torch._dynamo
from corpus import exported, linear, model, outcome, saved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import compressor
from compressor import InputError, Report, guard, recipe, stages
from compressor.data import arrays, idx
from compressor.guard.child import found
from compressor.guard.server import FORKING
from compressor.loading import onnxfile, readers, torchfile
from compressor.pipeline.folder import Folder
from compressor.report.html import html
from compressor.report.markdown import markdown
from compressor.report.plots import PICTURES

pytestmark = pytest.mark.skipif(not FORKING, reason="the server is Linux's")

HERE = Path(__file__)
STORED = HERE.parents[2] / "reports" / "mnist-cnn" / "report.json"
Said = tuple[dict[str, Any], dict[str, torch.Tensor]]
Read = Callable[[Path], str]


def digest(*values: Any) -> str:
    """What was read, in short: equal for equal values only."""
    total = sha256()
    for value in values:
        if isinstance(value, np.ndarray):
            total.update(f"{value.dtype}{value.shape}".encode())
            total.update(np.ascontiguousarray(value).tobytes())
        else:
            total.update(repr(value).encode(errors="surrogatepass"))
    return total.hexdigest()[:16]


def tensors(state: Any) -> str:
    return digest(*(value for key in sorted(state) for value in (key, state[key].numpy())))


# The readers: what ``path`` says, in short. Raises InputError, and nothing else.


def checkpoint(path: Path) -> str:
    said, state = found(readers.READERS["checkpoint"])(path)
    return described(said["source"], said, state)


def safetensors(path: Path) -> str:
    said, state = found(readers.READERS["safetensors"])(path)
    return described(said["header"], said, state)


def described(source: Any, said: Any, state: Any) -> str:
    """A file whose mark was changed is one of somebody else: weights, which need --arch."""
    if source is None:
        raise InputError("holds weights only: add --arch PKG.MOD:FACTORY")
    return digest(json.dumps(said, sort_keys=True)) + tensors(state)


def pt2(path: Path) -> str:
    said, state = found(readers.READERS["pt2"])(path)
    return digest(json.dumps(said, sort_keys=True)) + tensors(state)


def npz(path: Path) -> str:
    held = arrays._zipped(path)
    return digest(*(value for key in sorted(held) for value in (key, held[key])))


def graph(path: Path) -> str:
    found = onnxfile.read(path)
    return digest(found.slots, onnxfile.inputs(found, {}, batch=(found.batch or 1,)))


def steps(path: Path) -> str:
    return digest(stages.bind(recipe.named(recipe.read(path))))


def pixels(path: Path) -> str:
    return digest(idx.read_idx(path))


def table(path: Path) -> str:
    from compressor.data.tables import table as read

    data = read(str(path), 0, target="y")
    return digest(data.kind, data.columns, *data.splits.train.head(200)[0])


def report(path: Path) -> str:
    found = Report.read(path)
    views = (str(found), markdown(found.document), html(found.document))
    return digest(json.dumps(found.document, sort_keys=True), *map(len, views))


READS: dict[str, Read] = {
    ".pt": checkpoint,
    ".safetensors": safetensors,
    ".pt2": pt2,
    ".npz": npz,
    ".onnx": graph,
    ".toml": steps,
    ".idx": pixels,
    ".gz": pixels,
    ".csv": table,
    ".json": report,
}
"""By suffix, what reads a file."""

CHECKED = (".pt", ".safetensors", ".pt2", ".npz", ".gz")
"""Forms of which every number is under a checksum."""

NUMBERS = np.random.default_rng(0).random((50, 3))


def artifact(folder: Path) -> Path:
    arguments = {"features": 30, "outputs": 1, "hidden": [8]}
    source = {"factory": "compressor.zoo:mlp", "arguments": arguments}
    torchfile.write(folder / "whole.safetensors", model(), source)
    return folder / "whole.safetensors"


def archive(folder: Path) -> Path:
    np.savez(folder / "whole.npz", x=NUMBERS, y=np.arange(50))
    return folder / "whole.npz"


def network(folder: Path) -> Path:
    linear(folder / "whole.onnx")
    return folder / "whole.onnx"


def program(folder: Path) -> Path:
    """A recipe of every stage."""
    text = "\n".join(
        [
            "# a comment",
            '[[step]]\nstage = "prune"\nratio = 0.5\nkeep = ["fc*", "head"]',
            '[[step]]\nstage = "distill"\nepochs = 2\nname = "recovered"\nloss = "kd"',
            '[[step]]\nstage = "quantize"\nscheme = "static"\nfrom = "recovered"',
            '[[step]]\nstage = "quantize"\nscheme = "dynamic"\nfrom = "recovered"\nname = "d8"',
            '[[step]]\nstage = "export"\nfrom = "pruned"\nopset = 20\n',
        ]
    )
    (folder / "whole.toml").write_text(text, encoding="utf-8")
    return folder / "whole.toml"


IDX = struct.pack(">BBBBIII", 0, 0, 8, 3, 5, 4, 4) + bytes(range(80))


def images(folder: Path) -> Path:
    (folder / "whole.idx").write_bytes(IDX)
    return folder / "whole.idx"


def packed(folder: Path) -> Path:
    (folder / "whole.gz").write_bytes(gzip.compress(IDX, mtime=0))
    return folder / "whole.gz"


def rows(folder: Path) -> Path:
    lines = [
        "a,b,name,y",
        *(f"{a:.3f},{b:.3f},n{at % 3},{at % 2}" for at, (a, b, _) in enumerate(NUMBERS)),
    ]
    (folder / "whole.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "whole.csv"


def measured(folder: Path) -> Path:
    (folder / "whole.json").write_bytes(STORED.read_bytes())
    return folder / "whole.json"


SOUND: dict[str, Callable[[Path], Path]] = {
    ".pt": lambda folder: saved(folder / "whole.pt"),
    ".safetensors": artifact,
    ".pt2": exported,
    ".npz": archive,
    ".onnx": network,
    ".toml": program,
    ".idx": images,
    ".gz": packed,
    ".csv": rows,
    ".json": measured,
}
"""A sound file of each form."""

HELD = {".csv": "pyarrow"}
"""The package that a form needs."""


def reading(path: Path) -> Said:
    """What became of each file of the folder ``path``, in a limited child."""
    said: dict[str, Any] = {}
    for file in sorted(path.iterdir()):
        try:
            said[file.name] = ["read", READS[file.suffix](file)]
        except InputError as error:
            said[file.name] = ["refused", str(error)]
        except MemoryError:
            said[file.name] = ["refused", "memory"]
        except BaseException as error:
            said[file.name] = ["failed", repr(error)[:300]]
    return said, {}


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    """This file's reader, in a server that can import it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{HERE.parent}:{HERE.parents[2]}")
        patch.setitem(readers.READERS, "fuzzed", f"{HERE.stem}:reading")
        guard.close()
        yield
        guard.close()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("sound")
    return {suffix: make(folder).read_bytes() for suffix, make in SOUND.items()}


def mutated(whole: bytes, seed: int) -> bytes:
    """``whole`` with a few bytes changed, or a piece removed, repeated, moved or cut off."""
    draw = np.random.default_rng(seed)
    changed = bytearray(whole)
    for _ in range(draw.integers(1, 4)):
        at, length = int(draw.integers(len(changed))), int(draw.integers(1, 40))
        other = int(draw.integers(len(changed)))
        match draw.integers(12):
            case 0:
                del changed[at : at + length]
            case 1:
                changed[at:at] = changed[at : at + length]
            case 2:
                changed = changed[: max(at, 1)]
            case 3:
                changed[at : at + 8] = draw.choice([b"\xff" * 8, bytes(8), bytes(7) + b"\x80"])
            case 4:
                changed[at : at + length] = changed[other : other + length]
            case 5:
                changed[at] ^= 1 << int(draw.integers(8))
            case 6 | 7 | 8:  # text stays text
                changed[at] = changed[other]
            case _:
                changed[at] = int(draw.integers(256))
        changed = changed or bytearray(b"P")
    return bytes(changed)


Outcomes = dict[str, dict[str, int]]


def fuzzed(
    folder: Path, sound: dict[str, bytes], shares: dict[str, int], first: int = 0
) -> Outcomes:
    """Outcomes by suffix of so many changed files of each; asserts the law of each."""
    found: Outcomes = {}
    for suffix, count in shares.items():
        if suffix in HELD and not _has(HELD[suffix]):
            continue
        outcomes = found[suffix] = {"same": 0, "other": 0, "refused": 0}
        whole = folder / f"whole{suffix}"
        whole.mkdir()
        (whole / f"whole{suffix}").write_bytes(sound[suffix])
        ((_, (kind, expected)),) = readers.guarded("fuzzed", whole)[0].items()
        assert kind == "read", expected
        step = 20 if suffix in (".pt2", ".json") else 200
        for start in range(first, first + count, step):
            batch = folder / f"{suffix}{start}"
            batch.mkdir()
            for seed in range(start, min(start + step, first + count)):
                (batch / f"{seed}{suffix}").write_bytes(mutated(sound[suffix], seed))
            for name, (kind, what) in read(batch).items():
                assert kind != "failed", (name, what)
                if kind == "refused":
                    assert len(what.splitlines()) == 1, (name, what)
                    outcomes["refused"] += 1
                else:
                    outcomes["same" if what == expected else "other"] += 1
                    assert what == expected or suffix not in CHECKED, name
    return found


def read(batch: Path) -> dict[str, tuple[str, str]]:
    """What became of each file of a folder: all in one child, or where that ended each in one."""
    said, line = outcome(lambda: readers.guarded("fuzzed", batch)[0])
    if not line:
        return dict(said)
    files = sorted(batch.iterdir())
    if len(files) == 1:
        assert "took longer" not in line, files
        return {files[0].name: ("refused", line)}
    found = {}
    for file in files:
        alone = batch.with_name(f"{batch.name}-{file.name}")
        alone.mkdir()
        found |= read(Path(file.rename(alone / file.name)).parent)
    return found


def _has(package: str) -> bool:
    from compressor.measure.environment import installed

    return installed(package)


SHARES = {".pt": 60, ".safetensors": 60, ".pt2": 10, ".npz": 60, ".onnx": 100, ".toml": 100,
          ".idx": 50, ".gz": 50, ".csv": 50, ".json": 40}  # fmt: skip
"""500 files and more, by form."""


def test_changed_files_are_the_same_or_one_line(tmp_path: Path, sound: dict[str, bytes]) -> None:
    found = fuzzed(tmp_path, sound, SHARES)
    assert sum(sum(one.values()) for one in found.values()) >= 500
    for suffix, outcomes in found.items():
        assert outcomes["refused"] > SHARES[suffix] // 20, (suffix, outcomes)
    # Nothing else has a checksum, and a change of a number is read as another number.
    assert sum(found[suffix]["other"] for suffix in (".toml", ".idx", ".onnx")) > 5, found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_20000_changed_files_are_the_same_or_one_line(
    tmp_path: Path, sound: dict[str, bytes]
) -> None:
    shares = {suffix: 40 * count for suffix, count in SHARES.items()} | {".pt2": 200, ".json": 800}
    shares[".toml"] += 2000
    found = fuzzed(tmp_path, sound, shares, 10_000)
    assert sum(sum(one.values()) for one in found.values()) >= 20_000
    assert min(one["refused"] for one in found.values()) > 20, found


def test_200_changed_models_through_the_whole_way(tmp_path: Path, sound: dict[str, bytes]) -> None:
    """As a user reads them: ``compressor.load``, each in a child of its own."""
    outcomes = {"same": 0, "refused": 0}
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"model{suffix}"
        path.write_bytes(sound[suffix])
        expected = tensors(compressor.load(path).state_dict())
        for seed in range(100):
            path.write_bytes(mutated(sound[suffix], seed))
            found, line = outcome(lambda path=path: compressor.load(path).state_dict())
            assert line or tensors(found) == expected, seed
            outcomes["refused" if line else "same"] += 1
    assert outcomes["refused"] > 100, outcomes


def test_a_file_whose_mark_was_changed_needs_its_factory(
    tmp_path: Path, sound: dict[str, bytes]
) -> None:
    """It is no longer one that describes itself, and its digest is not asked for."""
    for suffix, mark in ((".pt", b"compressor.model"), (".safetensors", b'"compressor"')):
        path = tmp_path / f"model{suffix}"
        assert sound[suffix].count(mark) == 1
        other = bytearray(mark)
        other[3] ^= 1
        changed = sound[suffix].replace(mark, bytes(other))
        if suffix == ".pt":  # the checksum of the entry of the archive
            changed = rechecked(changed)
        path.write_bytes(changed)
        with pytest.raises(InputError, match="add --arch"):
            compressor.load(path)


def rechecked(archive: bytes) -> bytes:
    """The archive with checksums that match its entries, as one changed on purpose has."""
    found = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(found, "w") as new:
        for entry in old.infolist():
            start = entry.header_offset + 30
            name, extra = struct.unpack("<HH", archive[start - 4 : start])
            start += name + extra
            new.writestr(entry.filename, archive[start : start + entry.file_size])
    return found.getvalue()


def test_of_bare_weights_nobody_notices_a_change(tmp_path: Path) -> None:
    """What is not promised: a flipped bit in weights without a digest is another weight."""
    state = {"w": torch.rand(400, 25)}
    plain, ours = tmp_path / "plain.safetensors", tmp_path / "ours.safetensors"
    save_file(state, plain)
    net = torch.nn.Linear(25, 400, bias=False)
    torchfile.write(ours, net, {"factory": "a:b", "arguments": {}})
    for path in (plain, ours):
        content = bytearray(path.read_bytes())
        content[-1000] ^= 1
        path.write_bytes(content)
    found = readers.read(plain).state["w"]
    assert int((found != state["w"]).sum()) == 1
    with pytest.raises(InputError, match="does not match its digest"):
        torchfile.tensors_in(ours, torchfile.header(ours) or {})


# Values out of place, in JSON and TOML

ODD: Any = st.sampled_from(
    [
        None, True, 0, -1, 0.5, -0.0, 1e99, 1e308, 10**30, 10**400, 1 << 64, "", " ", "x" * 500,
        "\0", "\x1b[2J", "\u202e", "<b>", "|", "../../escaped", "/etc/passwd", "nan", [], {}, [[]],
        [{}], {"": None}, ["x"], {"x": 1}, [1, 2, 3],
    ]
)  # fmt: skip


def places(document: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value of a document."""
    inner: list[Any] = []
    if isinstance(document, dict):
        inner = list(document)
    if isinstance(document, list):
        inner = list(range(len(document)))
    return [way, *(found for key in inner for found in places(document[key], (*way, key)))]


def replaced(document: Any, way: tuple[Any, ...], value: Any) -> Any:
    if not way:
        return value
    changed = dict(document) if isinstance(document, dict) else list(document)
    changed[way[0]] = replaced(document[way[0]], way[1:], value)
    return changed


def changed(documents: dict[str, Any]) -> Any:
    """A document with a few values out of place."""

    def draw(pick: Any) -> Any:
        found = documents[pick(st.sampled_from(sorted(documents)))]
        for _ in range(pick(st.integers(1, 2))):
            found = replaced(found, pick(st.sampled_from(places(found))), pick(ODD))
        return found

    return st.composite(lambda pick: draw(pick))()


DOCUMENTS = {"report": json.loads(STORED.read_text(encoding="utf-8"))}
STATE = {
    "fingerprint": "ours",
    "command": "compressor run",
    "files": {"report.md": {"size": 3, "sha256": "0" * 64}, "best.onnx": {"size": 3, "sha256": ""}},
}


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changed(DOCUMENTS))
def test_a_report_with_values_out_of_place_is_shown_or_one_line(
    tmp_path: Path, document: Any
) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    outcome(lambda: report(file))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # Matplotlib's, of axes without extent
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changed(DOCUMENTS))
def test_such_a_report_is_drawn_or_one_line(tmp_path: Path, document: Any) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    outcome(lambda: Report.read(file).save())


@pytest.mark.parametrize("kind", ["noise", "cut off", "huge"])
def test_a_picture_that_is_none_is_left_out(kind: str) -> None:
    """Of the worst examples; 64 KB of PNG can be 400 million pixels."""
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000) if kind == "huge" else (8, 8)).save(file, "PNG")
    raw = {"noise": bytes(99), "cut off": file.getvalue()[:50], "huge": file.getvalue()}[kind]
    text = base64.b64encode(raw).decode()
    document = json.loads(STORED.read_text(encoding="utf-8"))
    row = {"example": 1, "target": "a", "baseline": "b", "output": "c", "lost": 1.0}
    for artifact in document["artifacts"]:
        artifact["worst"] = [{**row, "picture": text}]
    assert len(text) < 1 << 16
    shown = PICTURES["worst.png"]
    assert bool(shown[0](document)) == (kind == "cut off")  # which only drawing finds out
    if shown[0](document):
        assert shown[1](document).startswith(b"\x89PNG")


def begun(place: Path) -> Report | None:
    """The stored report of a folder that a run begins in, if it is the same run."""
    folder, found = Folder.open(place, "ours", "compressor run", fresh=False)
    folder.close()
    return found


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changed({"state": STATE}), st.booleans())
def test_a_run_folder_with_values_out_of_place_is_known_or_one_line(
    tmp_path: Path, state: Any, finished: bool
) -> None:
    place = tmp_path / "run"
    place.mkdir(exist_ok=True)
    document = DOCUMENTS["report"] | {"fingerprint": "ours"}
    (place / "report.json").write_text(json.dumps(document if finished else {}), encoding="utf-8")
    (place / "run.json").write_text(json.dumps(state), encoding="utf-8")
    before = sorted(path.name for path in tmp_path.iterdir())
    outcome(lambda: begun(place))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.integers(0, 1 << 20))
def test_a_damaged_run_json_is_known_or_one_line(tmp_path: Path, noise: bytes, at: int) -> None:
    place = tmp_path / "run"
    place.mkdir(exist_ok=True)
    text = json.dumps(STATE, indent=1).encode()
    at %= len(text)
    (place / "run.json").write_bytes(text[:at] + noise + text[at + len(noise) :])
    assert outcome(lambda: begun(place))[0] is None


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changed({"recipe": {"step": [{"stage": "prune", "ratio": 0.5, "keep": ["a"], "name": "p"},
                                    {"stage": "distill", "epochs": 2, "from": "p"}]}}))  # fmt: skip
def test_a_recipe_with_values_out_of_place_is_bound_or_one_line(
    tmp_path: Path, document: Any
) -> None:
    import tomli_w

    try:
        text = tomli_w.dumps(document)
        tomllib.loads(text)
    except (AttributeError, TypeError, ValueError):
        return  # TOML has no null and no such keys
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    assert outcome(lambda: steps(path))[1].isprintable()


def test_a_network_of_every_message_is_read(tmp_path: Path) -> None:
    """The file that is changed above is one that is read at all, and means something."""
    path = network(tmp_path)
    assert onnx.load(path).graph.initializer[0].dims == [3, 2]
    assert [slot.name for slot in onnxfile.read(path).slots] == ["x"]
