"""A folder is a run's own, or it is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.errors import InputError
from compressor.pipeline.folder import STATE, Folder


def files(path: Path) -> list[str]:
    return sorted(str(one.relative_to(path)) for one in path.rglob("*"))


@pytest.mark.parametrize("name", ["thesis.tex", "report.json", "run.json", "artifacts"])
@pytest.mark.parametrize("fresh", [False, True])
def test_other_people_s_files_are_never_touched(tmp_path: Path, name: str, fresh: bool) -> None:
    (tmp_path / name).write_text('{"lint": 1}')
    (tmp_path / "more").mkdir()
    with pytest.raises(InputError, match="holds other files"):
        Folder.open(tmp_path, "f", "compressor run x", fresh=fresh)
    assert files(tmp_path) == sorted([name, "more"])


def test_a_run_that_failed_at_once_can_be_taken_up_or_replaced(tmp_path: Path) -> None:
    first, report = Folder.open(tmp_path / "run", "f", "compressor run x", fresh=False)
    assert report is None
    (first.artifacts / "baseline.safetensors").write_bytes(b"half")
    again, report = Folder.open(tmp_path / "run", "f", "compressor run x", fresh=False)
    assert report is None
    assert files(again.path) == ["artifacts", "artifacts/baseline.safetensors", STATE]
    with pytest.raises(InputError, match=r"holds another run \(compressor run x\)"):
        Folder.open(tmp_path / "run", "g", "compressor run y", fresh=False)
    fresh, _ = Folder.open(tmp_path / "run", "g", "compressor run y", fresh=True)
    assert files(fresh.path) == ["artifacts", STATE]
