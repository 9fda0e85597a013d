"""Files at rest: written whole or not at all, and watched for change."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.artifact import (
    PART,
    READY,
    Artifact,
    copy,
    digest,
    part_of,
    replacing,
    settle,
    together,
    write_text,
)
from compressor.errors import StageError


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_text("old")
    with replacing(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("written", [True, False])
def test_an_error_leaves_the_old_file_and_no_litter(
    tmp_path: Path, error: type[BaseException], written: bool
) -> None:
    path = tmp_path / "model.bin"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as beside:
            if written:
                beside.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    with replacing(path) as one, replacing(path) as other:
        assert one != other
        one.write_text("1")
        other.write_text("2")
    assert path.read_text() == "1"  # the last to finish


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_mode_follows_the_umask(tmp_path: Path, mask: int) -> None:
    path = tmp_path / "model.bin"
    before = os.umask(mask)
    try:
        with replacing(path) as beside:
            beside.touch(mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_text_is_utf_8(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "é …\n")
    assert (tmp_path / "a.txt").read_bytes() == "é …\n".encode()


@given(content=st.binary(min_size=1, max_size=64), position=st.integers(0), bit=st.integers(0, 7))
def test_the_digest_changes_with_every_bit(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, position: int, bit: int
) -> None:
    path = tmp_path_factory.mktemp("digest") / "file"
    path.write_bytes(content)
    before = digest(path)
    flipped = bytearray(content)
    flipped[position % len(content)] ^= 1 << bit
    path.write_bytes(flipped)
    assert digest(path) != before
    path.write_bytes(content)
    assert digest(path) == before


def test_the_digest_is_sha_256_of_all_files_in_order(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"ab")
    two.write_bytes(b"c")
    assert digest(one, two) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest(two, one) != digest(one, two)


def artifact(folder: Path) -> Artifact:
    (folder / "m.onnx").write_bytes(b"graph")
    (folder / "m.data").write_bytes(b"weights")
    return Artifact.of(folder / "m.onnx", "onnx", companions=(folder / "m.data",))


def test_an_unchanged_artifact_is_itself(tmp_path: Path) -> None:
    made = artifact(tmp_path)
    assert made.checked() is made
    assert made.size_bytes == 12


@pytest.mark.parametrize("name", ["m.onnx", "m.data"])
def test_a_changed_file_is_noticed(tmp_path: Path, name: str) -> None:
    made = artifact(tmp_path)
    (tmp_path / name).write_bytes(b"other!!")
    with pytest.raises(StageError, match=r"m\.onnx changed since it was made; run again with --f"):
        made.checked()


@pytest.mark.parametrize("name", ["m.onnx", "m.data"])
def test_a_file_that_is_gone_is_noticed(tmp_path: Path, name: str) -> None:
    made = artifact(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(StageError, match="changed since it was made"):
        made.checked()


def test_steps_are_appended_and_the_torch_source_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"torch")
    (tmp_path / "b.onnx").write_bytes(b"onnx")
    (tmp_path / "c.onnx").write_bytes(b"int8")
    torch = Artifact.of(tmp_path / "a.safetensors", "torch")
    onnx = torch.then(tmp_path / "b.onnx", "onnx", "export", {"opset": 20}, parity=0.5)
    int8 = onnx.then(tmp_path / "c.onnx", "onnx", "quantize", {"scheme": "static"})
    assert onnx.source == torch.path
    assert [step["stage"] for step in int8.steps] == ["export", "quantize"]
    assert int8.steps[0] == {
        "stage": "export",
        "settings": {"opset": 20},
        "facts": {"parity": 0.5},
    }
    assert (int8.name, int8.form, int8.digest) == ("c", "onnx", digest(tmp_path / "c.onnx"))


def test_json_and_back(tmp_path: Path) -> None:
    made = replace(artifact(tmp_path), steps=({"stage": "x", "settings": {}, "facts": {}},))
    assert Artifact.from_json(made.to_json(), tmp_path) == made
    assert str(tmp_path) not in str(made.to_json())


def test_a_file_is_on_the_disk_before_it_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the content, then the name, then the folder that holds the name."""
    seen: list[str] = []
    sync, rename = os.fsync, Path.replace

    def synced(handle: int) -> None:
        seen.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        sync(handle)

    def renamed(self: Path, target: Path) -> Path:
        seen.append("name")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    write_text(tmp_path / "a.txt", "new")
    assert seen == ["file", "name", "folder"]
    seen.clear()
    with together(tmp_path) as beside:
        (beside / "b.txt").touch()
    assert seen == ["file", "folder", "name", "folder", "name", "folder"]


def test_what_cannot_be_synced_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "a.txt", "new")
    with pytest.raises(OSError, match="No space"), together(tmp_path) as beside:
        (beside / "a.txt").write_text("new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_file_that_does_not_hold_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_text("old")

    def check(file: Path) -> None:
        raise StageError(file.read_text())

    with pytest.raises(StageError, match="half"), replacing(path, check) as beside:
        beside.write_text("half")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_text_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: write(self, data[:-1]))
    with pytest.raises(OSError, match="does not read the same"):
        write_text(tmp_path / "a.txt", "new")
    assert list(tmp_path.iterdir()) == []


@given(name=st.text("abc.", min_size=1, max_size=8).filter(lambda name: name not in (".", "..")))
def test_parts_are_known_by_their_names(name: str) -> None:
    part = part_of(Path("folder") / name)
    assert part.parent == Path("folder")
    assert PART.fullmatch(part.name)
    assert not PART.fullmatch(name)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_files_that_belong_together_come_together(
    tmp_path: Path, error: type[BaseException]
) -> None:
    for name in ("a.onnx", "a.json", "other"):
        (tmp_path / name).write_text("old")

    def write(fail: bool) -> None:
        with together(tmp_path) as beside:
            for name in ("a.onnx", "a.json", "b.md"):
                (beside / name).write_text("new")
                assert (tmp_path / "a.onnx").read_text() == "old"
            if fail:
                raise error

    with pytest.raises(error):
        write(True)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == dict.fromkeys(("a.onnx", "a.json", "other"), "old")
    write(False)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == dict.fromkeys(("a.onnx", "a.json", "b.md"), "new") | {"other": "old"}


@pytest.mark.parametrize("moves", range(4))
def test_a_move_that_was_cut_short_is_ended_by_who_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    names = ("a.onnx", "b.md", "a.json")  # JSON last
    for name in names:
        (tmp_path / name).write_text("old")
    rename, left = Path.replace, [moves + 1]  # the first makes all of them ready

    def cut(self: Path, target: Path) -> Path:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", cut)
        try:
            with together(tmp_path) as beside:
                for name in names:
                    (beside / name).write_text("new")
        except KeyboardInterrupt:
            assert moves < 3
    assert [(tmp_path / name).read_text() for name in names] == [
        "new" if at < moves else "old" for at in range(3)
    ]
    settle(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        names, "new"
    )
    assert not (tmp_path / READY).exists()


def test_a_copy_is_the_same_and_brings_its_companions(tmp_path: Path) -> None:
    made = artifact(tmp_path)
    (tmp_path / "to").mkdir()
    copy(made, tmp_path / "to" / "best.onnx")
    assert digest(tmp_path / "to" / "best.onnx", tmp_path / "to" / "m.data") == made.digest


@pytest.mark.parametrize("name", ["m.onnx", "m.data"])
def test_what_changed_is_not_copied(tmp_path: Path, name: str) -> None:
    made = artifact(tmp_path)
    (tmp_path / name).write_bytes(b"other!!")
    to = tmp_path / "to"
    to.mkdir()
    (to / "best.onnx").write_bytes(b"old")
    with pytest.raises(StageError, match=r"m\.onnx changed since it was made"):
        copy(made, to / "best.onnx")
    assert {path.name: path.read_bytes() for path in to.iterdir()} == {"best.onnx": b"old"}
