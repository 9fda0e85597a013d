"""The folder of a run, killed before every change that it makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("changes.py")


def test_every_change_of_the_folder_can_be_the_last(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    counts = json.loads(ran.stdout)
    # Each file is opened and renamed; a way that changed nothing would show nothing.
    assert min(counts.values()) >= 20, counts
