"""Splits are carved as they always were: a model keeps being judged on what it never saw.

The digests were taken before data could be without labels, mapped or in folders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_data import Numbers, halves, numbered, tensor_dataset, write_mnist

from compressor.data import adopt, read
from compressor.task import Splits

SEEDS = (0, 3)

EXACT = ("digits", "digits?size=16", "digits-rows", "line")
"""Sources whose values are the same on every machine; of the others only positions are."""

SOURCES = {
    "digits": ("db4bbb9fcd830df5", "b6b069843ac19748"),
    "digits?size=16": ("04f03406c016d572", "400317aee737b2d8"),
    "digits?size=20": ("cb7131b68eb935d6", "73ceb8ebbc9b891f"),
    "digits-rows": ("6348056b8a93393a", "28cfe802bf9daacb"),
    "digits-masks": ("12f66f5c6a4b2053", "f1a7c3aa2a94fe6b"),
    "breast-cancer": ("ae02a22230d3e36e", "866f42d31d7ca771"),
    "wine": ("0ba37435a53f28d9", "1066a1f467855b30"),
    "diabetes": ("64e0c8ac396a76b0", "ff9f6a8bc7a4d6b0"),
    "line": ("49e820f55ed0f6a8", "4d5eaaf01dcc542c"),
}
MNIST = {
    "mnist": ("23149887e2ac8553", "5a1af2a5235f77f6"),
    "mnist?train=20": ("17289836284e51a9", "e12c986ddde166e3"),
    "mnist?size=56&train=30": ("042d7fa33e56a786", "b35f93c2c5764291"),
}
LIVE = {
    "pair": ("ba587fa53b1b0f45", "57b66cb3694a40b4"),
    "floats": ("8e6af2ae177c72be", "36cb676f1342b94b"),
    "dataset": ("7e2bc5c550a9981f", "759c0fa157cfadf4"),
    "tensors": ("ba587fa53b1b0f45", "57b66cb3694a40b4"),
    "stream": ("ba587fa53b1b0f45", "57b66cb3694a40b4"),
    "two": ("48bb7df21d16aca5", "0ecaa510d05b151b"),
    "named": ("26f1c117ad14918e", "b045e699d6ffc968"),
}
FORMS: dict[str, Callable[[], object]] = {
    "pair": lambda: numbered(200),
    "floats": lambda: (numbered(200)[0], numbered(200)[0]),
    "dataset": lambda: Numbers(200),
    "tensors": lambda: tensor_dataset(200),
    "stream": lambda: iter(halves(200)),
    "two": lambda: (Numbers(200), numbered(40)),
    "named": lambda: {"train": numbered(200), "val": numbered(20)},
}


def fingerprint(splits: Splits, *, values: bool = True) -> str:
    """Of the positions of every split, in order, and of what stands there."""
    total = hashlib.sha256()
    for split in (splits.train, splits.validate, splits.calibrate, splits.test):
        total.update(split.indices.astype("<i8").tobytes())
        if values:
            total.update(split.digest().encode())
    return total.hexdigest()[:16]


@pytest.mark.parametrize("spec", SOURCES)
def test_sources_are_split_as_before(spec: str) -> None:
    seen = (fingerprint(read(spec, seed).splits, values=spec in EXACT) for seed in SEEDS)
    assert tuple(seen) == SOURCES[spec]


@pytest.mark.parametrize("spec", MNIST)
def test_mnist_is_split_as_before(tmp_path: Path, spec: str) -> None:
    write_mnist(tmp_path)
    options = spec.removeprefix("mnist")
    seen = (fingerprint(read(f"mnist:{tmp_path}{options}", seed).splits) for seed in SEEDS)
    assert tuple(seen) == MNIST[spec]


@pytest.mark.parametrize("form", LIVE)
def test_live_data_is_split_as_before(form: str) -> None:
    seen = (fingerprint(adopt(FORMS[form](), seed).splits) for seed in SEEDS)
    assert tuple(seen) == LIVE[form]


def test_files_are_split_as_live_data_is(tmp_path: Path) -> None:
    x, y = numbered(200)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    (tmp_path / "files").mkdir()
    np.save(tmp_path / "files" / "x.npy", x)
    np.save(tmp_path / "files" / "y.npy", y)
    for place in ("a.npz", "files", "files/x.npy"):
        spec = f"arrays:{tmp_path / place}"
        assert tuple(fingerprint(read(spec, seed).splits) for seed in SEEDS) == LIVE["pair"]
