"""Files at rest: written whole or not at all, and watched for change."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.artifact import Artifact, digest, replacing, write_text
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
