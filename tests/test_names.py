"""Functions named on the command line."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from compressor import names
from compressor.errors import InputError


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_module_s_function() -> None:
    assert names.function("math:sqrt", "--arch")(9) == 3


def test_a_file_s_function_beside_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_names.py").write_text("answer = 42\n")
    (tmp_path / "mine.py").write_text(
        "import neighbour_of_names\ndef f():\n    return neighbour_of_names.answer\n"
    )
    assert names.function("./mine.py:f", "--arch")() == 42
    assert names.function("mine:f", "--arch")() == 42
    assert names.function(f"{tmp_path}/mine.py:f", "--arch")() == 42


def test_a_file_named_like_a_module_does_not_replace_it(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("def f():\n    return 'mine'\n")
    assert names.function("./random.py:f", "--arch")() == "mine"
    assert sys.modules["random"] is random
    # As a module, what is installed goes first.
    assert names.function("random:random", "--arch") == random.random


def test_dataclasses_work_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "shapes.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Shape:\n    width: int = 3\n"
    )
    assert names.function("./shapes.py:Shape", "--arch")().width == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "write PKG.MOD:FUNCTION or ./file.py:function"),
        (":f", "write PKG.MOD:FUNCTION"),
        ("math:", "write PKG.MOD:FUNCTION"),
        ("math:a.b", "write PKG.MOD:FUNCTION"),
        ("math:pi", "math has no function 'pi'"),
        ("math:absent", "math has no function 'absent'"),
        ("no_such_package.x:f", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("./absent.py:f", "importing ./absent.py failed: FileNotFoundError: there is no such file"),
        ("./raises.py:f", "ValueError: two lines"),
        ("./quits.py:f", "SystemExit: 3"),
        ("./syntax.py:f", "SyntaxError"),
    ],
)
def test_what_cannot_be_had_is_one_line(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "raises.py").write_text("raise ValueError('two\\nlines')\n")
    (tmp_path / "quits.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "syntax.py").write_text("def f(:\n")
    with pytest.raises(InputError) as caught:
        names.function(name, "--arch")
    assert str(caught.value).startswith(f"--arch {name!r}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_failed_leaves_no_half_module(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("x = 1\nraise ValueError\n")
    with pytest.raises(InputError):
        names.function("./broken.py:f", "--arch")
    assert not [name for name in sys.modules if name.endswith("user_broken")]


def test_call_gives_what_the_function_gives() -> None:
    assert names.call(dict, "builtins:dict", "--data") == {}
    assert names.call(lambda x=1: x, "a:b", "--data") == 1


def test_a_function_with_arguments_is_not_called() -> None:
    def never(x: int) -> None:
        raise AssertionError

    with pytest.raises(InputError, match="--data a:b: it is called without arguments: missing"):
        names.call(never, "a:b", "--data")


@pytest.mark.parametrize("error", [ValueError("one\ntwo"), SystemExit("one two")])
def test_what_the_function_raises_is_one_line(error: BaseException) -> None:
    def fails() -> None:
        raise error

    with pytest.raises(InputError) as caught:
        names.call(fails, "a:b", "--arch")
    assert str(caught.value) == f"--arch a:b: it raised {type(error).__name__}: one two"


def test_control_c_goes_through() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        names.call(interrupted, "a:b", "--arch")


def test_the_console_script_finds_modules_beside_the_user(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("def f():\n    return 7\n")
    script = "import sys; sys.path = [p for p in sys.path if p]; from compressor import names\n"
    script += "print(names.function('beside:f', '--arch')())"
    ran = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "7\n"
