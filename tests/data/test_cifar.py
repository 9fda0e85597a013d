"""CIFAR's two versions hold the same data, and its pickles run nothing."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_data import contents

from compressor.data import cifar, read
from compressor.data.cifar import PIXELS, Bytes, unpickled
from compressor.errors import InputError
from compressor.task import UNLABELLED, Array

TRAIN = [f"data_batch_{at}" for at in range(1, 6)]
FILES = {"cifar10": [*TRAIN, "test_batch"], "cifar100": ["train", "test"]}
CLASSES = {"cifar10": (10,), "cifar100": (20, 100)}
KEYS = {"cifar10": ("labels",), "cifar100": ("coarse_labels", "fine_labels")}
MEAN = {"cifar10": (0.4914, 0.4822, 0.4465), "cifar100": (0.5071, 0.4865, 0.4409)}
STD = {"cifar10": (0.2470, 0.2435, 0.2616), "cifar100": (0.2673, 0.2564, 0.2762)}

Set = dict[str, tuple[Array, tuple[Array, ...]]]


@functools.cache
def photos() -> Array:
    """Pieces of scikit-learn's two photographs, uint8 ``(n, 3072)``, red first, then rows."""
    from sklearn.datasets import load_sample_images

    pieces = [
        image[top : top + 32, left : left + 32].transpose(2, 0, 1).ravel()
        for image in load_sample_images().images
        for top in range(0, 384, 32)
        for left in range(0, 608, 32)
    ]
    return np.array(pieces, np.uint8)


def made(name: str, each: int = 40) -> Set:
    """Images and labels of every file of a set."""
    draw = np.random.default_rng(len(name))
    found: Set = {}
    for at, file in enumerate(FILES[name]):
        labels = tuple(draw.integers(0, classes, each) for classes in CLASSES[name])
        found[file] = photos()[at * each : (at + 1) * each], labels
    return found


def binary(folder: Path, parts: Set) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file, (images, labels) in parts.items():
        columns = [column.astype(np.uint8)[:, None] for column in labels]
        (folder / f"{file}.bin").write_bytes(np.hstack([*columns, images]).tobytes())
    return folder


def record(name: str, images: Array, labels: tuple[Array, ...]) -> dict[str, Any]:
    found = dict(zip(KEYS[name], (column.tolist() for column in labels), strict=True))
    return {
        "batch_label": "testing batch 1 of 1",
        **found,
        "data": images,
        "filenames": [f"leptodactylus_s_{at:06}.png" for at in range(len(images))],
    }


def python(folder: Path, name: str, parts: Set, dumps: Callable[[Any], bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file, (images, labels) in parts.items():
        (folder / file).write_bytes(dumps(record(name, images, labels)))
    return folder


def python2(value: Any) -> bytes:
    """What Python 2's cPickle wrote with protocol 2: strings are bytes, all of them memorised."""
    memo = iter(range(1 << 20))

    def put() -> bytes:
        at = next(memo)
        return b"q" + bytes([at]) if at < 256 else b"r" + struct.pack("<I", at)

    def string(text: bytes) -> bytes:
        short = len(text) < 256
        size = b"U" + bytes([len(text)]) if short else b"T" + struct.pack("<i", len(text))
        return size + text + put()

    def whole(number: int) -> bytes:
        if number < 256:
            return b"K" + bytes([number])
        if number < 65536:
            return b"M" + struct.pack("<H", number)
        return b"J" + struct.pack("<i", number)

    def array(values: Array) -> bytes:
        dtype = b"cnumpy\ndtype\n" + put() + string(b"u1") + b"K\0K\1\x87" + put() + b"R" + put()
        dtype += (
            b"(K\3" + string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0t" + put() + b"b"
        )
        start = b"cnumpy.core.multiarray\n_reconstruct\n" + put() + b"cnumpy\nndarray\n" + put()
        start += b"K\0\x85" + put() + string(b"b") + b"\x87" + put() + b"R" + put()
        shape = b"".join(map(whole, values.shape)) + b"\x86" + put()
        return (
            start
            + b"(K\1"
            + shape
            + dtype
            + b"\x89"
            + string(values.tobytes())
            + b"t"
            + put()
            + b"b"
        )

    def any_(value: Any) -> bytes:
        if isinstance(value, str):
            return string(value.encode())
        if isinstance(value, int):
            return whole(value)
        if isinstance(value, list):
            return b"]" + put() + b"(" + b"".join(map(any_, value)) + b"e"
        if isinstance(value, dict):
            pairs = b"".join(any_(key) + any_(each) for key, each in value.items())
            return b"}" + put() + b"(" + pairs + b"u"
        return array(value)

    return b"\x80\2" + any_(value) + b"."


WRITERS: dict[str, Callable[[Any], bytes]] = {
    "Python 2": python2,
    "protocol 3": lambda value: pickle.dumps(value, 3),
    "protocol 4": lambda value: pickle.dumps(value, 4),
    "bytes": lambda value: pickle.dumps({key.encode(): each for key, each in value.items()}, 4),
}


def test_python2_is_what_pickle_reads() -> None:
    """The stand-in for the original files is right: Python's own reader takes it."""
    images, labels = made("cifar10")["test_batch"]
    found = pickle.loads(python2(record("cifar10", images, labels)), encoding="latin1")
    np.testing.assert_array_equal(found["data"], images)
    assert found["labels"] == labels[0].tolist()
    assert found["filenames"][3] == "leptodactylus_s_000003.png"


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", FILES)
def test_both_versions_are_the_same_data(tmp_path: Path, name: str, writer: str) -> None:
    parts = made(name)
    one = read(f"{name}:{binary(tmp_path / 'bin', parts)}", 3)
    other = read(f"{name}:{python(tmp_path / 'py', name, parts, WRITERS[writer])}", 3)
    assert (one.kind, one.outputs, one.labelled) == ("classification", CLASSES[name][-1], True)
    assert one.splits.sizes() == other.splits.sizes()
    for part in one.splits.sizes():
        seen, same = getattr(one.splits, part), getattr(other.splits, part)
        assert seen.digest() == same.digest()


@pytest.mark.parametrize("name", FILES)
def test_pixels_and_labels(tmp_path: Path, name: str) -> None:
    parts = made(name)
    splits = read(f"{name}:{binary(tmp_path, parts)}").splits
    images, labels = parts[FILES[name][-1]]
    x, y = contents(splits.test)
    assert (x.dtype, x.shape, y.dtype) == (np.float32, (40, 3, 32, 32), np.int64)
    np.testing.assert_array_equal(y, labels[-1])
    mean, std = (np.array(each[name])[:, None, None] for each in (MEAN, STD))
    wanted = (images.reshape(-1, 3, 32, 32) / 255 - mean) / std
    np.testing.assert_allclose(x, wanted, rtol=0, atol=1e-6)
    # Train and validate are all the other files, every image once, with its label.
    every = np.concatenate([parts[file][0] for file in FILES[name][:-1]]).reshape(-1, 3, 32, 32)
    known = dict(
        zip(
            (image.tobytes() for image in every),
            np.concatenate([parts[file][1][-1] for file in FILES[name][:-1]]).tolist(),
            strict=True,
        )
    )
    seen = []
    for part in (splits.train, splits.validate):
        x, y = contents(part)
        raw = np.round((x * std + mean) * 255).astype(np.uint8)
        assert [known[image.tobytes()] for image in raw] == y.tolist()
        seen += [image.tobytes() for image in raw]
    assert sorted(seen) == sorted(known)


def test_options(tmp_path: Path) -> None:
    parts = made("cifar100")
    folder = binary(tmp_path / "deep" / "cifar-100-binary", parts).parent
    data = read(f"cifar100:{folder}?labels=coarse")
    assert data.outputs == 20
    np.testing.assert_array_equal(contents(data.splits.test)[1], parts["test"][1][0])
    parts = made("cifar10", 60)
    folder = binary(tmp_path / "ten" / "cifar-10-batches-bin", parts).parent
    splits = read(f"cifar10:{folder}?train=50&labelled=0.5").splits
    assert splits.sizes() == {"train": 50, "validate": 60, "calibrate": 50, "test": 60}
    assert (contents(splits.train)[1] == UNLABELLED).sum() == 25
    assert (contents(splits.test)[1] >= 0).all()
    again = read(f"cifar10:{folder}?train=50&labelled=0.5", 1).splits
    assert again.test.digest() == splits.test.digest()
    assert again.train.digest() != splits.train.digest()


# Hostile pickles


class Runs:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def test_nothing_is_run(tmp_path: Path) -> None:
    there = tmp_path / "ran"
    for protocol in range(2, 6):
        for value in (Runs(os.mkdir, str(there)), {"data": [Runs(Path.touch, there)]}):
            with pytest.raises(
                InputError, match=r"asks for '(posix|pathlib|_*builtins?_*)\..*could run code"
            ):
                unpickled(pickle.dumps(value, protocol))
    assert not there.exists()
    for name in ("builtins.eval", "numpy.load", "numpy.core.multiarray._reconstructX", "os.system"):
        module, _, attribute = name.rpartition(".")
        with pytest.raises(InputError, match="asks for"):
            unpickled(f"c{module}\n{attribute}\n(tR.".encode())


def test_names_for_a_terminal_are_escaped() -> None:
    with pytest.raises(InputError) as caught:
        unpickled(b"cos\n\x1b[31msystem\n.")
    assert str(caught.value).isprintable()


U1 = b"cnumpy\ndtype\n(U\2u1K\0K\1tR"
EMPTY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85U\1btR"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no pickle of CIFAR"),
        (b"this is no pickle", "no pickle of CIFAR"),
        (b"\x80\2}q\0.", "holds no array 'data' and list 'labels'"),
        (b"\x80\2]q\0.", "holds no array 'data'"),
        (b"\x80\2}q\0", "no pickle of CIFAR: pickle exhausted before seeing STOP"),
        (b"T\xff\xff\xff\x7fabc.", "expected 2147483647 bytes in a string4, but only 4 remain"),
        (b"X\xff\xff\xff\xffabc.", "expected 4294967295 bytes"),
        (b"0.", "instruction POP"),
        (b"Q.", "instruction BINPERSID"),
        (b"h\5.", "no pickle of CIFAR"),
        (b"a.", "no pickle of CIFAR"),
        (b"K\1K\2a.", "fills a int as a list"),
        (b"(K\1K\2o.", "instruction OBJ"),
        (b"cnumpy\ndtype\n(U\2O8K\0K\1tR.", "array of b'O8': pixels are bytes"),
        (EMPTY + b"(K\1(K\2M\0\x0ct" + U1 + b"\x89U\3abctb.", "holds 3 bytes of an array of shape"),
        (EMPTY + b"(K\1(J\xff\xff\xff\xffK\1t" + U1 + b"\x89U\3abctb.", "array of shape"),
        (EMPTY + b"K\1b.", "fills what is no array"),
        (b"cnumpy\nndarray\n(K\1tR.", "calls what is no array"),
        (b"K\1(K\1tR.", "calls what is no array"),
        (b"}(]K\1u.", "no pickle of CIFAR: unhashable"),
    ],
)
def test_broken_pickles_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    folder = python(tmp_path, "cifar10", made("cifar10"), WRITERS["protocol 4"])
    (folder / "data_batch_3").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read(f"cifar10:{folder}")
    told = str(caught.value)
    assert said in told or (not content and "has 0 bytes" in told)
    assert "data_batch_3" in told
    assert "\n" not in told


def test_long_pickles_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "CALLS_AT_MOST", 100)
    assert unpickled(b"(" + b"N" * 97 + b"t.") == (None,) * 97
    with pytest.raises(InputError, match="more than 100 instructions"):
        unpickled(b"(" + b"N" * 99 + b"t.")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=12,
    ),
    st.sampled_from([3, 4]),
)
def test_plain_values_are_what_pickle_reads(value: Any, protocol: int) -> None:
    assert unpickled(pickle.dumps(value, protocol)) == value


@given(st.integers(1, 5), st.integers(1, 5), st.booleans(), st.sampled_from([3, 4]))
def test_arrays_are_what_pickle_reads(rows: int, width: int, turned: bool, protocol: int) -> None:
    values = np.arange(rows * width, dtype=np.uint8).reshape(rows, width)
    values = np.asfortranarray(values) if turned else values
    found = unpickled(pickle.dumps([values, values], protocol))
    assert isinstance(found[0], Bytes)
    np.testing.assert_array_equal(found[0].values, values)


SMALL = python2(record("cifar10", photos()[:3], (np.array([3, 1, 2]),)))


@given(st.integers(0, len(SMALL) - 1), st.binary(min_size=1, max_size=5), st.booleans())
def test_changed_pickles_never_surprise(
    tmp_path_factory: pytest.TempPathFactory, at: int, change: bytes, early: bool
) -> None:
    """Instructions stand at both ends: pixels are most of it, and are passed over."""
    at = at % 200 if early else at
    path = tmp_path_factory.getbasetemp() / "changed-cifar"
    path.write_bytes(SMALL[:at] + change + SMALL[at + len(change) :])
    with contextlib.suppress(InputError):
        images, labels = cifar._pickled(path, (("labels", 10),), 0)
        assert (images.dtype, images.shape[1:], len(labels)) == (np.uint8, (3, 32, 32), len(images))
        assert 0 <= labels.min() <= labels.max() < 10


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "data_batch_2.bin").unlink(), "has no data_batch_2.bin: get"),
        (lambda folder: (folder / "data_batch_1.bin").unlink(), "neither data_batch_1.bin nor"),
        (
            lambda folder: (folder / "test_batch.bin").write_bytes(b"\0" * (PIXELS + 2)),
            "test_batch.bin has 3,074 bytes, no multiple of 3073",
        ),
        (lambda folder: (folder / "test_batch.bin").write_bytes(b""), "has 0 bytes"),
        (
            lambda folder: (folder / "test_batch.bin").write_bytes(b"\x0a" * (PIXELS + 1)),
            "holds the label 10, labels are 0 to 9",
        ),
        (
            lambda folder: (folder / "test_batch.bin").write_bytes(b"\x01" * (PIXELS + 1)),
            "split test: it has 1 example",
        ),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, change: Callable[[Path], Any], said: str) -> None:
    folder = binary(tmp_path, made("cifar10"))
    change(folder)
    with pytest.raises(InputError, match=said) as caught:
        read(f"cifar10:{folder}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("cifar10", "write cifar10:PATH"),
        ("cifar10:/nowhere", "/nowhere has neither"),
        ("cifar10:{}?train=1", "option train='1'"),
        ("cifar10:{}?train=161", "option train=161: there are only 160 examples"),
        ("cifar10:{}?labels=coarse", "unknown option 'labels'; known: train, labelled"),
        ("cifar100:{}", "neither train.bin nor train"),
        ("cifar100:{}?labels=rough", "option labels='rough'"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, spec: str, said: str) -> None:
    binary(tmp_path, made("cifar10"))
    with pytest.raises(InputError, match=said):
        read(spec.format(tmp_path))


def test_large_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "BYTES_AT_MOST", 1000)
    with pytest.raises(InputError, match="at most 1,000 can be"):
        read(f"cifar10:{binary(tmp_path, made('cifar10'))}")


def test_bytes_as_python_3_writes_them_for_python_2() -> None:
    """By way of ``_codecs.encode``, of which nothing but Latin-1 is taken."""
    value = {b"data": b"\xff\x00a", b"labels": [1, 2]}
    assert unpickled(pickle.dumps(value, protocol=2)) == value
    start, text = b"\x80\x02c_codecs\nencode\n(", b"X\x02\0\0\0ab"
    for wrong in (text + b"X\x05\0\0\0rot13", b"K\x01X\x06\0\0\0latin1", text):
        with pytest.raises(InputError, match="calls what is no array"):
            unpickled(start + wrong + b"tR.")
