"""What is kept of a teacher is what it says when asked, and nothing that is not whole is taken."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor.data import read
from compressor.errors import StageError
from compressor.task import Input, Split, Task
from compressor.training import teacher as module
from compressor.training.loop import Batch
from compressor.training.recovery import TOLD, Aim, recover
from compressor.training.settings import Training
from compressor.training.teacher import Teacher

CPU = torch.device("cpu")
TRAIN = read("digits").splits.train.take(np.arange(300))
FEW = 64
"""Examples that it may be asked about to know what is kept."""


class Asked(nn.Module):
    """Counts the examples that it was asked about."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        out: Tensor = self.body(x)
        return out


def batch_of(split: Split, at: Any) -> Batch:
    inputs, targets = split.fetch(split.indices[at])
    return Batch(tuple(map(torch.from_numpy, inputs)), torch.from_numpy(targets), at)


def test_several_are_averaged_and_none_is_changed() -> None:
    models = [Asked(seed).train() for seed in range(3)]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    told = Teacher(models, CPU)
    batch = batch_of(TRAIN, np.array([7, 0, 250]))
    found = told.returned(batch)
    assert not found.requires_grad
    wanted = np.mean([model.body(*batch.inputs).numpy() for model in models], axis=0)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(found, told.returned(batch))  # dropout is off
    for model, state in zip(models, before, strict=True):
        assert not model.training
        assert not any(one.requires_grad for one in model.parameters())
        assert all(torch.equal(state[name], one) for name, one in model.state_dict().items())


def test_one_gives_all_that_it_returns_and_several_their_first() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.flatten(1), x.amax((1, 2, 3))

    batch = batch_of(TRAIN, np.arange(4))
    (one,) = batch.inputs
    alone = Teacher([Pair()], CPU).returned(batch)
    assert isinstance(alone, tuple)
    assert torch.equal(alone[1], one.amax((1, 2, 3)))
    assert torch.equal(Teacher([Pair(), Pair()], CPU).returned(batch), one.flatten(1))


@given(
    count=st.integers(1, 300),
    order=st.randoms(use_true_random=False),
    teachers=st.integers(1, 2),
    cap=st.sampled_from((1, 7 * 256, 1 << 20)),
)
@settings(max_examples=15)
def test_what_is_kept_is_what_is_said(
    tmp_path_factory: pytest.TempPathFactory, count: int, order: Any, teachers: int, cap: int
) -> None:
    split = TRAIN.take(np.array(order.sample(range(300), count)))
    models = [Asked(seed) for seed in range(teachers)]
    asked, kept = Teacher(models, CPU), Teacher(models, CPU)
    path = tmp_path_factory.mktemp("kept") / "told.npy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "EVALUATED", cap)
        assert kept.keep(split, path)
    for model in models:
        model.seen = 0
    at = np.array(order.sample(range(count), min(count, 9)))
    batch = batch_of(split, at)
    found = kept.returned(batch)
    assert models[0].seen == 0
    torch.testing.assert_close(found, asked.returned(batch), rtol=1e-6, atol=1e-6)
    found[:] = 7  # what a loss does to it in place stays its own
    assert not (kept.returned(batch) == 7).any()


def test_it_is_read_once_and_taken_again(tmp_path: Path) -> None:
    model = Asked()
    path = tmp_path / "told.npy"
    assert Teacher([model], CPU).keep(TRAIN, path)
    assert model.seen <= len(TRAIN) + FEW
    held, model.seen = path.read_bytes(), 0
    again = Teacher([model], CPU)
    assert again.keep(TRAIN, path)
    assert model.seen <= FEW
    assert path.read_bytes() == held
    assert list(tmp_path.iterdir()) == [path]


def test_another_teacher_s_outputs_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "told.npy"
    assert Teacher([Asked(0)], CPU).keep(TRAIN, path)
    other = Teacher([Asked(1)], CPU)
    batch = batch_of(TRAIN, np.arange(20))
    wanted = other.returned(batch)
    assert other.keep(TRAIN, path)
    torch.testing.assert_close(other.returned(batch), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_killed_while_keeping_leaves_nothing(
    tmp_path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVALUATED", 16 * 256)  # 16 examples at a time
    model = Asked()

    def end(*given: Any) -> None:
        if model.seen > 150:
            raise error

    handle = model.register_forward_hook(end)
    told = Teacher([model], CPU)
    path = tmp_path / "told.npy"
    with pytest.raises(error):
        told.keep(TRAIN, path)
    assert not list(tmp_path.iterdir())
    handle.remove()
    batch = batch_of(TRAIN, np.arange(290, 300))
    wanted = told.returned(batch)  # asked: nothing is kept
    assert told.keep(TRAIN, path)
    torch.testing.assert_close(told.returned(batch), wanted, rtol=1e-6, atol=1e-6)


WHOLE = 128 + 300 * 10 * 4


@given(length=st.integers(0, WHOLE - 1))
@settings(max_examples=25)
def test_a_part_of_a_file_is_not_taken(
    tmp_path_factory: pytest.TempPathFactory, length: int
) -> None:
    told = Teacher([Asked()], CPU)
    path = tmp_path_factory.mktemp("part") / "told.npy"
    assert told.keep(TRAIN, path)
    whole = path.read_bytes()
    assert len(whole) == WHOLE
    path.write_bytes(whole[:length])
    assert told.keep(TRAIN, path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("said", [b"", b"\x93NUMPY\x01\x00v\x00{", b"no array"])
def test_a_file_of_somebody_else_is_not_taken(tmp_path: Path, said: bytes) -> None:
    path = tmp_path / "told.npy"
    path.write_bytes(said)
    told = Teacher([Asked()], CPU)
    assert told.keep(TRAIN, path)
    assert np.load(path).shape == (300, 10)


@pytest.mark.parametrize("shape", [(300, 9), (299, 10), (300,)])
def test_an_array_of_another_shape_is_not_taken(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "told.npy"
    np.save(path, np.zeros(shape, np.float32))
    told = Teacher([Asked()], CPU)
    assert told.keep(TRAIN, path)
    assert np.load(path).any()


def test_too_much_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "told.npy"
    model = Asked()
    batch = batch_of(TRAIN, np.arange(5))
    for held, kept in ((300 * 40 - 1, False), (300 * 40, True)):
        monkeypatch.setattr(module, "HELD", held)
        told = Teacher([model], CPU)
        assert told.keep(TRAIN, path) is kept
        assert path.exists() is kept
        model.seen = 0
        assert told.returned(batch).shape == (5, 10)
        assert model.seen == (0 if kept else 5)


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"outputs \(12,000 bytes\) cannot be kept in") as caught:
        Teacher([Asked()], CPU).keep(TRAIN, tmp_path / "nowhere" / "told.npy")
    assert "\n" not in str(caught.value)


KEEP = """
    import sys
    from pathlib import Path
    import numpy as np, torch
    from torch import nn
    from compressor.errors import StageError
    from compressor.task import Split
    from compressor.training.teacher import Teacher

    folder = Path(sys.argv[1])
    split = Split.arrays(np.zeros((3000, 4), np.float32), np.zeros(3000, np.int64))
    try:
        Teacher([nn.Linear(4, 1000)], torch.device("cpu")).keep(split, folder / "told.npy")
    except StageError as error:
        print(error)
    print(sorted(path.name for path in folder.iterdir()))
"""


def kept_in(folder: Path, before: str, *shell: str) -> subprocess.CompletedProcess[str]:
    """A teacher that keeps 12 MB in ``folder``, in a process of its own, ``before`` done first."""
    folder.mkdir()
    script = folder.with_name("keep.py")
    script.write_text(textwrap.dedent(KEEP), encoding="utf-8")
    command = f'{before} && exec "{sys.executable}" "{script}" "{folder}"'
    return subprocess.run([*shell, command], capture_output=True, text=True, check=False)


def one_line(ended: subprocess.CompletedProcess[str], reason: str) -> None:
    assert ended.returncode == 0, (ended.returncode, ended.stderr)
    said, left = ended.stdout.splitlines()
    assert said.startswith("the teacher's outputs (12,000,000 bytes) cannot be kept in ")
    assert reason in said
    assert left == "[]"


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    folder, shell = tmp_path / "disk", ("unshare", "-rm", "sh", "-c")
    mount = f'mount -t tmpfs -o size=4m full "{tmp_path}/{{}}"'
    (tmp_path / "trial").mkdir()
    trial = (*shell, mount.format("trial"))
    if not shutil.which("unshare") or subprocess.run(trial, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    one_line(kept_in(folder, mount.format("disk"), *shell), "No space left on device")


def test_a_limit_of_file_sizes_is_one_line(tmp_path: Path) -> None:
    one_line(kept_in(tmp_path / "disk", "ulimit -f 4096", "bash", "-c"), "File too large")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_that_goes_on_asks_the_teacher_no_more(tmp_path: Path, precision: Any) -> None:
    reference = Asked().eval()
    made: list[Asked] = []

    def build() -> nn.Module:
        made.append(copy.deepcopy(reference))
        return made[-1]

    data = read("digits").splits
    splits = replace(data, train=TRAIN, validate=data.validate.take(np.arange(50)))
    lines: list[str] = []

    def watch(text: str) -> None:
        lines.append(text)
        if len(lines) == 2:
            raise KeyboardInterrupt

    task = Task(
        "model",
        "classification",
        build,
        {},
        (Input("input", (1, 8, 8)),),
        "accuracy",
        splits=splits,
    )

    def go(task: Task) -> nn.Module:
        torch.manual_seed(3)
        student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        how = Training(epochs=4, precision=precision)
        recover(student, task, how, Aim({"kd": 1.0}), into=tmp_path / "student", key="key")
        return student

    with pytest.raises(KeyboardInterrupt):
        go(replace(task, watch=watch))
    assert (tmp_path / f"student{TOLD}").exists()
    assert made[-1].seen <= len(TRAIN) + FEW
    go(task)
    assert len(made) == 2
    assert made[-1].seen <= FEW


def test_in_half_precision_the_kept_are_whole_and_the_asked_close_to_them(tmp_path: Path) -> None:
    told, asked = Teacher([Asked()], CPU), Teacher([Asked()], CPU)
    batch = batch_of(TRAIN, np.arange(30))
    whole = asked.returned(batch)
    assert told.keep(TRAIN, tmp_path / "told.npy")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(told.returned(batch), whole, rtol=1e-6, atol=1e-6)
        half = asked.returned(batch)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), whole, rtol=0, atol=2e-2 * float(whole.abs().max()))
