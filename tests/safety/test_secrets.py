"""Nothing of who runs it and where goes into what a run leaves behind, and nothing is sent."""

from __future__ import annotations

import getpass
import gzip
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from corpus import saved

from compressor.guard.confine import filtering
from compressor.guard.server import FORKING
from compressor.measure.environment import PACKAGES
from compressor.pipeline.folder import OURS, Folder
from compressor.report import Report

pytestmark = pytest.mark.skipif(not FORKING, reason="namespaces and filters are Linux's")

HERE = Path(__file__).parents[2]
CANARY = "CANARY"

SECRETS = {
    "API_TOKEN": "token-CANARY",
    "AWS_SECRET_ACCESS_KEY": "aws-CANARY",
    "HF_TOKEN": "hf-CANARY",
    "WANDB_API_KEY": "wandb-CANARY",
    "MLFLOW_TRACKING_USERNAME": "mlflow-CANARY",
    "USER": "user-CANARY",
    "LOGNAME": "user-CANARY",
    "USERNAME": "user-CANARY",
    "HOSTNAME": "host-CANARY",
    "EMAIL": "mail-CANARY@example.com",
    "GIT_AUTHOR_NAME": "author-CANARY",
    "GIT_AUTHOR_EMAIL": "author-CANARY@example.com",
    "SSH_CONNECTION": "ssh-CANARY",
    "DISPLAY": "display-CANARY",
    "LS_COLORS": "colors-CANARY",
}

LAUNCH = """
import ctypes, errno, os, struct, sys
name, *words = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
user, group = os.getuid(), os.getgid()
# A user, a network without interfaces and a host's name of its own, where that is allowed.
alone = libc.unshare(0x10000000 | 0x40000000 | 0x04000000) == 0
if alone:
    for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"),
                       ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{file}", "w") as opened:
            opened.write(text)
    libc.sethostname(name.encode(), len(name.encode()))
    assert os.uname().nodename == name
# From here on socket() of IPv4, IPv6 and packets kills the process that asks for it.
rules = [(0x20, 0, 0, 4), (0x15, 1, 0, 0xC000003E), (0x06, 0, 0, 0x80000000), (0x20, 0, 0, 0),
         (0x15, 0, 4, 41), (0x20, 0, 0, 16), (0x15, 3, 0, 2), (0x15, 2, 0, 10), (0x15, 1, 0, 17),
         (0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x80000000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *rule) for rule in rules))
held = ctypes.create_string_buffer(
    struct.pack("@HxxxxxxP", len(rules), ctypes.addressof(program)))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, held, 0, 0) == 0
os.environ["ALONE"] = str(int(alone))
os.execv(sys.executable, [sys.executable, *words])
"""
"""Starts Python where nothing can be sent: ``(name of the host, words for Python)``."""


def launched(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Python with ``words`` in ``folder``, among secrets and without a network."""
    home = folder.parent / f"home-{CANARY}"
    home.mkdir(exist_ok=True)
    (home / ".gitconfig").write_text(
        f"[user]\n\tname = git-{CANARY}\n\temail = git-{CANARY}@example.com\n", encoding="utf-8"
    )
    scratch = home / "tmp"
    scratch.mkdir(exist_ok=True)
    kept = {
        key: os.environ[key] for key in ("PATH", "LANG", "LD_LIBRARY_PATH") if key in os.environ
    }
    places = {"HOME": str(home), "TMPDIR": str(scratch), "PYTHONPATH": str(HERE)}
    return subprocess.run(
        [sys.executable, "-c", LAUNCH, f"host-{CANARY}", *words],
        cwd=folder,
        env={**kept, **SECRETS, **places, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


needs_filters = pytest.mark.skipif(
    not (FORKING and filtering()), reason="system calls cannot be filtered here"
)


@needs_filters
@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6"])
def test_whoever_opens_a_socket_is_killed(tmp_path: Path, family: str) -> None:
    """The trap springs: also in a child of a child, and in what is no Python."""
    folder = tmp_path / "folder"
    folder.mkdir()
    asks = f"import socket; socket.socket(socket.{family})"
    assert launched(folder, "-c", asks).returncode == -31  # SIGSYS
    nested = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {asks!r}]))"
    assert launched(folder, "-c", nested).returncode in (256 - 31, -31, 225)
    calls = f"import ctypes, socket; ctypes.CDLL(None).socket(int(socket.{family}), 1, 0)"
    assert launched(folder, "-c", calls).returncode == -31
    assert launched(folder, "-c", "import socket; socket.socketpair()").returncode == 0


@needs_filters
def test_no_interface_leads_out(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    said = launched(
        folder,
        "-c",
        "import os, socket; print(os.environ['ALONE'], socket.gethostname());"
        "print([line.split(':')[0].strip() for line in open('/proc/net/dev') if ':' in line])",
    ).stdout.splitlines()
    if said[0].startswith("0"):
        pytest.skip("no namespace can be made here")
    assert said == [f"1 host-{CANARY}", "['lo']"]


class Left(NamedTuple):
    """What a run left: its folder, and what its process said."""

    folder: Path
    done: subprocess.CompletedProcess[str]

    @property
    def out(self) -> Path:
        return self.folder / "out"


FLAGS = ["--prune", "0.5", "--epochs", "1", "--quantize", "int8-dynamic", "--threads", "1",
         "--provider", "cpu", "--log", "csv", "--log", "json", "--log", "tensorboard",
         "--out", "out"]  # fmt: skip


def ran(root: Path, *flags: str) -> Left:
    folder = root / f"project-{CANARY}"
    folder.mkdir(parents=True)
    # The model of somebody else, whose file does not say where it was made.
    shutil.move(saved(root / "made.pt"), folder / "model.pt")
    git = folder / ".git"
    git.mkdir()
    (git / "config").write_text(f"[user]\n\tname = repository-{CANARY}\n", encoding="utf-8")
    return Left(folder, launched(folder, "-m", "compressor", "run", "model.pt", *FLAGS, *flags))


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Left:
    """The real command on a real model, with everything that writes files switched on."""
    if not filtering():
        pytest.skip("system calls cannot be filtered here")
    return ran(tmp_path_factory.mktemp("secrets"))


def contents(path: Path) -> Iterator[bytes]:
    """All that a file holds: as it lies there, and unpacked where it is packed."""
    raw = path.read_bytes()
    yield raw
    if raw[:2] == b"\x1f\x8b":
        yield gzip.decompress(raw)
    if raw[:2] == b"PK":
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(name) for name in archive.namelist())
    if raw.startswith(b"\x89PNG"):
        for kind, data in chunks(raw):
            if kind == b"zTXt":
                yield zlib.decompress(data.split(b"\0", 1)[1][1:])


def chunks(raw: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of a PNG: kind and data."""
    at = 8
    while at < len(raw):
        size = int.from_bytes(raw[at : at + 4], "big")
        yield raw[at + 4 : at + 8], raw[at + 8 : at + 8 + size]
        at += 12 + size


def holders(folder: Path, text: str) -> list[str]:
    """The files below a folder whose names or contents hold ``text``, in UTF-8 or UTF-16."""
    forms = [text.encode(code) for code in ("utf-8", "utf-16-le", "utf-16-be")]
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if text in str(path.relative_to(folder))
        or (path.is_file() and any(one in held for held in contents(path) for one in forms))
    ]


def test_the_run_was_a_whole_one(left: Left) -> None:
    """Nothing was killed on its way: every file is there, and every row was measured."""
    assert left.done.returncode == 0, left.done.stderr
    document = Report.read(left.out).document
    names = [artifact["name"] for artifact in document["artifacts"]]
    assert names == ["baseline", "pruned", "recovered", "int8-dynamic"]
    assert not document.get("failed")
    assert not [row for row in document["measurements"] if "skipped" in row]
    assert not [stage for stage in document["stages"] if stage.get("skipped")]
    logs = left.out / "artifacts" / "logs"
    assert {path.suffix for path in logs.rglob("*") if path.is_file()} >= {".csv", ".jsonl"}
    assert list(logs.rglob("events*"))


def test_what_is_looked_for_would_be_found(left: Left, tmp_path: Path) -> None:
    files = {"plain.txt": b"", "wide.bin": b"", "packed.gz": b""}
    for name in files:
        (tmp_path / name).write_bytes(
            f"a {CANARY} b".encode("utf-16" if "wide" in name else "utf-8")
        )
    (tmp_path / "packed.gz").write_bytes(gzip.compress(f"a {CANARY} b".encode()))
    with zipfile.ZipFile(tmp_path / "zipped.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner", f"a {CANARY} b")
    (tmp_path / CANARY).mkdir()
    assert len(holders(tmp_path, CANARY)) == 5
    # And in a real folder: a layer's name lies in models, reports and records.
    found = holders(left.out, "fc1")
    assert {"best.onnx", "report.json", "artifacts/pruned.safetensors"} <= {*found}
    assert "samples.json.gz" in holders(left.out, "baseline")


def test_no_secret_is_in_any_file(left: Left) -> None:
    assert left.done.returncode == 0
    assert holders(left.out, CANARY) == []
    assert CANARY not in left.done.stdout
    assert CANARY not in left.done.stderr


def test_nothing_of_this_machine_is_in_any_file(left: Left) -> None:
    """Neither names nor places: those of the home, of the packages and of the folders."""
    places = {str(left.folder), str(Path.home()), str(HERE), sys.prefix, str(Path(sys.executable))}
    user = getpass.getuser()
    for text in places | {f"/{user}/", f"/home/{user}"}:
        if len(text) > 3:
            assert holders(left.out, text) == [], text
    for text in (socket.gethostname(), platform.node()):
        if len(text) > 4:  # a short one is a part of other words
            assert holders(left.out, text) == [], text


def test_a_report_has_the_listed_facts_alone(left: Left) -> None:
    there = Report.read(left.out).document["environment"]
    assert {*there["versions"]} <= {"python", *(name.replace("-", "_") for name in PACKAGES)}
    assert all(re.fullmatch(r"[\w.+-]+", str(said)) for said in there["versions"].values())
    assert {*there} == {
        "versions", "cpu", "os", "load", "session_settings", "threads", "providers", "noise_floor",
    }  # fmt: skip
    assert {*there["cpu"]} == {"model", "features", "cores"}
    assert there["os"] == f"{platform.system()} {platform.machine()}"


def test_onnx_files_say_nothing_of_where_they_were_made(left: Left) -> None:
    import onnx

    files = list(left.out.rglob("*.onnx"))
    assert len(files) > 3
    for path in files:
        held = onnx.load(path)
        texts = [held.doc_string, held.graph.doc_string, held.domain, held.producer_name]
        texts += [f"{one.key} {one.value}" for one in held.metadata_props]
        for node in held.graph.node:
            texts += [node.doc_string, *(f"{one.key} {one.value}" for one in node.metadata_props)]
        assert not [text for text in texts if re.search(r"\.py\b|/\w+/|[A-Z]:\\|Traceback", text)]


def test_pictures_say_nothing_but_pixels(left: Left) -> None:
    kinds = {kind for path in left.out.rglob("*.png") for kind, _ in chunks(path.read_bytes())}
    assert kinds <= {b"IHDR", b"IDAT", b"IEND", b"pHYs", b"PLTE", b"tRNS"}


def test_a_run_leaves_what_it_says_and_nothing_beside(left: Left) -> None:
    assert {path.name for path in left.folder.iterdir()} == {"model.pt", "out", ".git"}
    assert {path.name for path in left.out.iterdir()} <= OURS
    home = left.folder.parent / f"home-{CANARY}"
    found = [path for path in home.rglob("*") if path.is_file()]
    # Matplotlib keeps a list of fonts, PyTorch's compiler its cache; telemetry would keep an id.
    others = [
        str(path.relative_to(home))
        for path in found
        if path.name != ".gitconfig" and not re.search("matplotlib|torchinductor", str(path))
    ]
    assert others == []


def test_pages_ask_for_nothing(left: Left) -> None:
    page = (left.out / "report.html").read_text(encoding="utf-8")
    text = (left.out / "report.md").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    known = json.loads((left.out / "report.json").read_text(encoding="utf-8"))
    assert "://" not in json.dumps(known)
    assert "://" not in text
    assert {*re.findall(r"\w+://[^\s\"'<)]+", page)} <= {"http://www.w3.org/2000/svg"}


def test_a_lock_says_who_only_while_it_is_held(tmp_path: Path) -> None:
    """``run.lock`` names process and host for whoever waits; a finished run has none."""
    folder, _ = Folder.open(tmp_path / "run", "f", "c", fresh=False)
    assert platform.node() in (tmp_path / "run" / "run.lock").read_text(encoding="utf-8")
    folder.close()
    assert not (tmp_path / "run" / "run.lock").exists()


COMMANDS = """
import json, sys
from compressor.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as end:
        if end.code:
            sys.exit(f"{words}: {end.code}")
    print("ended", flush=True)
"""
"""One command after the other, without the start of Python for each."""


@needs_filters
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_other_command_is_as_quiet(left: Left) -> None:
    """Without a network, among secrets: bench, inspect, compare, report, demo and doctor."""
    calls = [
        ["bench", "out/best.onnx", "out/artifacts/pruned.onnx", "--provider", "cpu", "--threads",
         "1", "--data", "breast-cancer", "--out", "bench"],
        ["inspect", "model.pt"],
        ["inspect", "model.pt", "--sensitivity", "--out", "curves"],
        ["inspect", "out/artifacts/pruned.safetensors", "--data", "breast-cancer", "--json"],
        ["compare", "out", "out"],
        ["report", "out"],
        ["report", "out", "bench", "--out", "both.md"],
        ["demo", "--model", "mlp", "--epochs", "1", "--out", "demo.pt"],
        ["run", "model.pt", "--dry-run", "--prune", "0.5"],
        ["run", "model.pt", "--quantize", "int8", "--threads", "1", "--provider", "cpu", "--out",
         "static"],
    ]  # fmt: skip
    done = launched(left.folder, "-c", COMMANDS, json.dumps(calls))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count("ended") == len(calls)
    assert CANARY not in done.stdout + done.stderr
    shutil.rmtree(left.folder / ".git")
    assert holders(left.folder, CANARY) == []
    done = launched(left.folder, "-m", "compressor", "doctor")
    assert done.returncode == 0
    assert CANARY not in done.stdout
