"""The names that loading a file would look up: none is hidden, whatever stands before it."""

from __future__ import annotations

import io
import os
import pickle
import struct
import time
from collections import Counter, OrderedDict
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compressor.errors import InputError
from compressor.inspection import inspect
from compressor.loading import listed


def names(path: Path, what: str = "classes") -> list[str]:
    found: list[str] = listed.read(path)[0][what]
    return found


def plain(path: Path, instructions: bytes) -> Path:
    path.write_bytes(instructions)
    return path


class Watched(pickle.Unpickler):
    """Python's own, which notes what it looks up and calls nothing of it."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.asked: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.asked.add(f"{module}.{name}")
        return super().find_class(module, name)


THINGS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.fractions()
    | st.sampled_from([int, OrderedDict, os.path.join, Fraction, nn.Linear, Path("x"), 1j]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.builds(lambda one: OrderedDict(a=one), inner)
        | st.builds(lambda one: [one, one], inner)
        | st.frozensets(st.integers(), max_size=3)
        | st.builds(Counter, st.lists(st.text(max_size=2), max_size=3))
    ),
    max_leaves=12,
)


@given(thing=THINGS, protocol=st.integers(2, 5))
def test_what_python_looks_up_is_listed(
    thing: Any, protocol: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = plain(tmp_path_factory.getbasetemp() / "x.pkl", pickle.dumps(thing, protocol))
    watched = Watched(io.BytesIO(path.read_bytes()))
    watched.load()
    assert set(names(path)) == {one.replace("__builtin__", "builtins") for one in watched.asked}


SYSTEM = b"cos\nsystem\n"
HIDING = {
    "an instance of an old class": b"(ifractions\nFraction\n",
    "an object of an old class": b"(cfractions\nFraction\no",
    "a call by name": b"cfractions\nFraction\n)}\x92",
    "a mark and a pop": b"(0",
    "a list that is dropped": b"(I1\nI2\nl0",
    "numbers": b"I01\nL5L\nF1.5\n",
}


@pytest.mark.parametrize("what", HIDING)
def test_nothing_hides_what_stands_behind_it(what: str, tmp_path: Path) -> None:
    path = plain(tmp_path / "x.pt", b"\x80\x04" + HIDING[what] + SYSTEM + b".")
    assert "os.system" in names(path)
    assert "os.system" in names(path, "foreign")


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


@pytest.mark.parametrize(
    ("instructions", "wanted"),
    [
        (text("system") + b"\x940" + text("os") + b"h\x00\x93", "os.system"),
        (text("os") + b"2" + b"\x93", "os.os"),
        (text("os") + text("system") + b"\x93", "os.system"),
        (b"K\x01K\x02\x93", "a name that the file computes"),
        (b"\x82\x01", "a name that the file computes"),
        (b"h\x07" + SYSTEM, "what stands behind a part that cannot be followed"),
        (b"0" + SYSTEM, "what stands behind a part that cannot be followed"),
    ],
    ids=range(7),
)
def test_names_by_way_of_the_stack_and_the_memo(
    instructions: bytes, wanted: str, tmp_path: Path
) -> None:
    path = plain(tmp_path / "x.pt", b"\x80\x04" + instructions + b".")
    assert names(path, "foreign") == [wanted]


def test_all_pickles_of_an_old_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(
        {"a": torch.zeros(2), "b": Fraction(1, 2)}, path, _use_new_zipfile_serialization=False
    )
    assert names(path, "foreign") == ["fractions.Fraction"]


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def test_a_program_s_sample_inputs_are_listed(tmp_path: Path) -> None:
    """``torch.export.load`` unpickles them."""
    import warnings
    import zipfile

    class Spectral(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.rfft(x).abs()

    clean, path = tmp_path / "clean.pt2", tmp_path / "net.pt2"
    with warnings.catch_warnings(action="ignore"):
        torch.export.save(torch.export.export(Spectral(), (torch.zeros(2, 8),)), clean)
    held = io.BytesIO()
    torch.save(Evil(), held)
    with zipfile.ZipFile(clean) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            sample = "sample_inputs" in entry.filename and entry.filename.endswith(".pt")
            new.writestr(entry.filename, held.getvalue() if sample else old.read(entry))
    system = f"{os.system.__module__}.system"
    assert names(path, "foreign") == [system]
    assert inspect(path).document["executes"] == [f"{system} (--trust-pickle)"]
    assert inspect(clean).document["executes"] == []


def test_a_pickle_made_to_take_for_ever_is_one_line(tmp_path: Path) -> None:
    """Tuples of one another, 2^60 values to hash, in 200 bytes."""
    nested = b"K\x01" + b"2\x86" * 60
    path = plain(tmp_path / "x.pt", b"\x80\x02}" + nested + b"K\x01s.")
    began = time.monotonic()
    with pytest.raises(InputError):
        inspect(path)
    assert names(path) == []
    assert time.monotonic() - began < 60


def test_a_long_pickle_takes_little(tmp_path: Path) -> None:
    path = plain(tmp_path / "x.pt", b"\x80\x02(" + b"N" * 100_000 + struct.pack("<B", 0x6C) + b".")
    assert names(path) == []
