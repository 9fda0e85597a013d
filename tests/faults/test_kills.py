"""A run that is killed, whenever, leaves nothing half and goes on where it was."""

from __future__ import annotations

import random
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from running import Case, Launcher, litter, shas, sound

KILLED = -signal.SIGKILL


def complete(launcher: Launcher, case: Case, folder: Path) -> None:
    """The same command again: it ends well, with what an undisturbed run makes."""
    ran = launcher.run(folder, *case.words, "--out", "out")
    assert ran.code == 0, ran.errors
    assert sound(folder / "out")
    assert shas(folder / "out") == case.shas
    assert litter(folder / "out") == []


def killed(
    launcher: Launcher, case: Case, folder: Path, kills: int, seed: int, longest: float = 3.0
) -> int:
    """Kills runs at random moments, ``kills`` times; the last of all is left alone.

    A run that ends before its moment has its folder checked, and the next one begins anew. Gives
    how many times a run was taken up.
    """
    draw, done, resumed = random.Random(seed), 0, 0
    while done < kills:
        fresh = ["--fresh"] * (draw.random() < 0.2)
        resumed += (folder / "out").exists()
        moment = draw.uniform(0.02, longest)
        ran = launcher.run(folder, *case.words, *fresh, "--out", "out", after=moment)
        assert ran.code in (0, KILLED), ran.errors
        done += ran.code == KILLED
        if sound(folder / "out"):
            assert shas(folder / "out") == case.shas
            if draw.random() < 0.5:  # the others start over in a finished folder, or show it
                shutil.rmtree(folder / "out")
    complete(launcher, case, folder)
    return resumed


def test_a_handful_of_moments(launcher: Launcher, case: Case, tmp_path: Path) -> None:
    killed(launcher, case, tmp_path, 3, seed=0)


@pytest.mark.slow
def test_a_hundred_moments(
    launcher: Launcher, case: Case, guarded: Case, tmp_path: Path, tiny: Path
) -> None:
    """Half of them of a run that reads its model through the guard."""
    runs = [(launcher, case, 3.0), (Launcher(tiny), guarded, 4.0)]
    try:
        with ThreadPoolExecutor(2) as pool:
            ran = [
                pool.submit(killed, one, what, tmp_path / str(seed), 50, seed, longest)
                for seed, (one, what, longest) in enumerate(runs, 1)
            ]
            assert sum(one.result() for one in ran) > 50
    finally:
        runs[1][0].close()
