"""A small model, the recipe that all runs replay, and what an undisturbed run of it makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from running import Case, Launcher, shas, sound

from compressor.demo import demo
from compressor.loading import task, torchfile

DATA = "breast-cancer"


@pytest.fixture(scope="session")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLP on a table, in a file that is read in the guard's child: that takes a second."""
    return demo("mlp", data=DATA, epochs=8, out=tmp_path_factory.mktemp("tiny") / "mlp.pt").path


@pytest.fixture(scope="session")
def tiny(pickled: Path) -> Path:
    """The same in a file that needs no guard."""
    read, path = task(pickled), pickled.with_suffix(".safetensors")
    torchfile.write(path, read.model(), read.source)
    return path


@pytest.fixture(scope="session")
def launcher(tiny: Path) -> Iterator[Launcher]:
    """Forks commands."""
    made = Launcher(tiny)
    yield made
    made.close()


@pytest.fixture(scope="session")
def case(launcher: Launcher, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The recipe as it was resolved: what was decided by times is decided there."""
    folder = tmp_path_factory.mktemp("reference")
    words = ("run", str(tiny), "--data", DATA, "--provider", "cpu", "--threads", "1")
    asked = ("--prune", "0.5", "--epochs", "6", "--quantize", "int8-dynamic")
    found = undisturbed(launcher, folder, *words, *asked)
    return Case((*words, "--recipe", str(folder / "out" / "recipe.toml")), found)


def undisturbed(launcher: Launcher, folder: Path, *words: str) -> dict[str, str]:
    """The digests that a command ends with."""
    ran = launcher.run(folder, *words, "--out", "out")
    assert ran.code == 0, ran.errors
    assert sound(folder / "out")
    return shas(folder / "out")


@pytest.fixture
def guarded(launcher: Launcher, case: Case, tiny: Path, pickled: Path, tmp_path: Path) -> Case:
    """The same for the file that the guard reads."""
    words = tuple(str(pickled) if word == str(tiny) else word for word in case.words)
    return Case(words, undisturbed(launcher, tmp_path / "reference", *words))
