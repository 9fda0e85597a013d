"""The names that a file's pickles ask for, also where no model comes from them.

A list of what loading the file would run must not end where the file wants it to. So nothing is
followed but strings and where they lie: instructions that :mod:`.pickled` refuses are passed over.
"""

from __future__ import annotations

import io
import json
import pickletools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from compressor.artifact import zipped
from compressor.errors import InputError
from compressor.loading.graph.archive import LONGEST, Archive
from compressor.loading.pickled import LEGACY, Global, is_known

COMPUTED = Global("", "a name that the file computes")
UNFOLLOWED = Global("", "what stands behind a part that cannot be followed")
OBJECTS = Global("", "objects of TorchScript")

PARTS = 5
"""Pickles one after the other in a file from before PyTorch 1.6."""

PUT, GET = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), ("GET", "BINGET", "LONG_BINGET")

OTHERS = ("GLOBAL", "INST", "PERSID")
"""Instructions with a text of which they make something else."""

Names = dict[Global, None]


def read(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """``classes``, all names that loading ``path`` would ask for, and those of them that are
    ``foreign`` to PyTorch's layers and tensors, which are code; both sorted. For the guard's child:
    a file may be made to take long."""
    names = _asked(path)
    return {
        "classes": sorted(map(_shown, names)),
        "foreign": sorted(_shown(name) for name in names if not is_known(name)),
    }, {}


def _shown(name: Global) -> str:
    return ".".join(name).removeprefix(".")


def _asked(path: Path) -> Names:
    names: Names = {}
    if zipped(path):
        archive = Archive(path)
        for stream in _packed(archive):
            _scanned(stream, names)
        if any("custom_obj" in entry for entry in archive.entries):
            names[OBJECTS] = None
    else:
        with path.open("rb") as file:
            if file.read(1) == b"\x80":
                file.seek(0)
                _scanned(file, names)
    return names


def _packed(archive: Archive) -> Iterator[BinaryIO]:
    """The pickles of an archive, and of archives in it: an exported program has sample inputs."""
    for name in archive.entries:
        if name.endswith(".pkl"):
            yield io.BytesIO(archive.read(name, LONGEST))
        elif archive.data is None and (name.endswith(".pt") or name in _flagged(archive)):
            held = archive.read(name, LONGEST)
            if held[:2] == b"PK":
                yield from _packed(Archive(archive.path, held))
            else:
                yield io.BytesIO(held)


def _flagged(archive: Archive) -> set[str]:
    """The entries of an exported program that its own lists call pickles."""
    found: set[str] = set()
    for name in archive.entries:
        if name.endswith("_config.json"):
            place = name.rpartition("/")[0]
            listed = json.loads(archive.read(name, LONGEST)).get("config", {})
            found |= {
                f"{place}/{one['path_name']}" for one in listed.values() if one.get("use_pickle")
            }
    return found


def _scanned(stream: BinaryIO, names: Names) -> None:
    """Adds the names that the pickles in ``stream`` ask for, and what could not be followed."""
    start = stream.read(32)
    stream.seek(0)
    legacy = LEGACY[0].to_bytes(10, "little") in start
    for _ in range(PARTS if legacy else 1):
        try:
            _scan(stream, names)
        except InputError:
            raise
        except Exception:
            names[UNFOLLOWED] = None
            return


def _scan(stream: BinaryIO, names: Names) -> None:
    """One pickle up to its end: its names, by what its instructions do to the stack.

    As :func:`pickletools.dis` keeps it, with strings where they are known and ``None`` elsewhere.
    """
    mark, stack, memo = pickletools.markobject, list[Any](), dict[Any, Any]()
    for opcode, arg, _ in pickletools.genops(stream):
        name, given, pushed = opcode.name, list(opcode.stack_before), list[Any](opcode.stack_after)
        if name in ("GLOBAL", "INST"):
            _name(names, *str(arg).split(" ", 1))
        elif name == "STACK_GLOBAL":
            _name(names, stack[-2], stack[-1])
        elif name.startswith("EXT"):
            names[COMPUTED] = None
        if name in PUT:
            memo[len(memo) if name == "MEMOIZE" else arg] = stack[-1]
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in GET:
            stack.append(memo[arg])
        else:
            count = len(given)
            if mark in given or (name == "POP" and stack[-1] is mark):
                while stack.pop() is not mark:
                    pass
                count = given.index(mark) if mark in given else 0
            if count > len(stack):
                raise ValueError("its stack is empty")
            del stack[len(stack) - count :]
            text = (
                arg if isinstance(arg, str) and name not in ("GLOBAL", "INST", "PERSID") else None
            )
            stack += [mark if one is mark else text for one in pushed]


def _name(names: Names, module: Any = None, name: Any = None) -> None:
    if isinstance(module, str) and isinstance(name, str):
        # Python 2 had another name for the module.
        names[Global(module.replace("__builtin__", "builtins"), name)] = None
    else:
        names[COMPUTED] = None
