"""A small model, the recipe that all runs replay, and what an undisturbed run of it makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from running import Case, Launcher, shas, sound

from compressor.demo import demo


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLP on the digits."""
    return demo("mlp", epochs=8, out=tmp_path_factory.mktemp("tiny") / "mlp.pt").path


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
    common = ("run", str(tiny), "--provider", "cpu", "--threads", "1")
    asked = ("--prune", "0.5", "--epochs", "6", "--quantize", "int8-dynamic")
    ran = launcher.run(folder, *common, *asked, "--out", "out")
    assert ran.code == 0, ran.errors
    assert sound(folder / "out")
    return Case((*common, "--recipe", str(folder / "out" / "recipe.toml")), shas(folder / "out"))
