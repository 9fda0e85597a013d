"""Folders of pictures: what is found, what is decoded, what is refused."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_data import contents
from torch.nn.functional import interpolate

from compressor.data import adopt, folder, read
from compressor.data.demand import OnDemand, targets
from compressor.data.folder import _decoded, _plain
from compressor.errors import InputError
from compressor.task import UNLABELLED, Array, Split
from compressor.training.loader import automatic, batches, resident


def save(path: Path, pixels: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def numbered(folder: Path, counts: dict[str, int], start: int = 0) -> int:
    """Gray pictures of one colour, which says which picture it is."""
    for name, count in counts.items():
        for _ in range(count):
            save(folder / name / f"{start:03}.png", np.full((6, 5), start, np.uint8))
            start += 1
    return start


def ids(split: Split) -> list[int]:
    return [round(float(value) * 255) for value in contents(split)[0][:, 0, 0, 0]]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The train split of the digits as PNG files, a folder for each class."""
    folder = tmp_path_factory.mktemp("digits")
    x, y = contents(read("digits").splits.train)
    for at, (image, label) in enumerate(zip(x[:300], y[:300], strict=True)):
        save(folder / str(label) / f"{at}.png", np.round(image[0] * 255).astype(np.uint8))
    return folder


@pytest.fixture(scope="module")
def photos() -> list[Path]:
    """Two real photographs, JPEG, 640x427."""
    from sklearn import datasets

    return sorted(Path(datasets.__file__).parent.glob("images/*.jpg"))


def test_real_pictures_come_back(digits: Path) -> None:
    data = read(f"images:{digits}?size=8&gray=1", seed=3)
    assert (data.kind, data.outputs, data.labelled) == ("classification", 10, True)
    assert data.name == f"images:{digits}?size=8&gray=1"
    sizes = data.splits.sizes()
    assert sizes == {"train": 180, "validate": 45, "calibrate": 180, "test": 75}
    x, y = contents(read("digits").splits.train)
    known = {np.round(image * 255).tobytes(): label for image, label in zip(x, y, strict=True)}
    for split in (data.splits.train, data.splits.validate, data.splits.test):
        seen_x, seen_y = contents(split)
        assert (seen_x.dtype, seen_x.shape[1:], seen_y.dtype) == (np.float32, (1, 8, 8), np.int64)
        assert [known[np.round(image * 255).tobytes()] for image in seen_x] == seen_y.tolist()
    # Every class has its share of every cut.
    whole = np.bincount(y[:300], minlength=10)
    found = np.bincount(contents(data.splits.test)[1], minlength=10)
    assert np.abs(found - whole / 4).max() <= 1


@pytest.mark.parametrize("validate", ["val", "valid", "validate"])
def test_parts(tmp_path: Path, validate: str) -> None:
    start = numbered(tmp_path / "train", {"b": 9, "a": 6, "c": 5})
    start = numbered(tmp_path / "test", {"b": 4, "c": 3}, start)
    start = numbered(tmp_path / validate, {"a": 2, "c": 3}, start)
    numbered(tmp_path / "unlabelled", {".": 3, "deeper/still": 2}, start)
    splits = read(f"images:{tmp_path}?size=4").splits
    assert splits.sizes() == {"train": 25, "validate": 5, "calibrate": 25, "test": 7}
    # Classes are sorted: a, b, c.
    assert ids(splits.test) == list(range(20, 27))
    assert contents(splits.test)[1].tolist() == [1, 1, 1, 1, 2, 2, 2]
    assert contents(splits.validate)[1].tolist() == [0, 0, 2, 2, 2]
    _, y = contents(splits.train)
    labelled = {int(at): int(label) for at, label in zip(ids(splits.train), y, strict=True)}
    wanted = {
        at: 1 if at < 9 else 0 if at < 15 else 2 if at < 20 else UNLABELLED for at in labelled
    }
    assert labelled == wanted
    assert len(labelled) == 25


def test_a_folder_of_pictures_has_no_labels(tmp_path: Path) -> None:
    numbered(tmp_path, {".": 20})
    data = read(f"images:{tmp_path}?size=4&gray=true")
    assert (data.labelled, data.kind, data.outputs) == (False, None, None)
    parts = (data.splits.train, data.splits.validate, data.splits.test)
    assert sorted(each for part in parts for each in ids(part)) == list(range(20))
    assert {int(label) for part in parts for label in contents(part)[1]} == {UNLABELLED}
    assert adopt(data) is data


def test_what_is_no_picture_is_passed_over(tmp_path: Path) -> None:
    numbered(tmp_path, {"a": 8, "b/deeper": 8, "b": 2, ".hidden": 4})
    for name in ("readme.txt", "a/notes.csv", "a/._000.png", "b/Thumbs.db"):
        (tmp_path / name).write_text("no picture")
    (tmp_path / "a" / "LOUD.JPEG").write_bytes((tmp_path / "a" / "000.png").read_bytes())
    splits = read(f"images:{tmp_path}?size=4").splits
    assert sum(len(getattr(splits, name)) for name in ("train", "validate", "test")) == 19


# Pixels


@given(
    st.integers(1, 24),
    st.sampled_from([1, 3, 5]),
    st.booleans(),
    st.integers(2, 24),
    st.booleans(),
    st.integers(0, 9),
)
def test_resized_antialiased_and_the_middle_of_it(
    tmp_path_factory: pytest.TempPathFactory,
    side: int,
    times: int,
    upright: bool,
    size: int,
    gray: bool,
    seed: int,
) -> None:
    """What PyTorch makes of the whole picture, and then the middle: as torchvision does."""
    shape = (side * times, side) if upright else (side, side * times)
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 1 if gray else 3), np.uint8)
    path = tmp_path_factory.getbasetemp() / "drawn.png"
    save(path, pixels[:, :, 0] if gray else pixels)
    whole = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    made = (size * times, size) if upright else (size, size * times)
    resized = interpolate(whole, made, mode="bilinear", antialias=True)[0].numpy()
    start = size * (times - 1) // 2
    middle = slice(start, start + size)
    wanted = resized[:, middle] if upright else resized[:, :, middle]
    seen = _decoded(str(path), size, gray).transpose(2, 0, 1)
    # Pillow rounds to bytes after each of its two passes.
    np.testing.assert_allclose(seen, wanted, atol=1.01)


def test_mean_and_deviation(tmp_path: Path) -> None:
    for at in range(12):
        save(tmp_path / "ab"[at % 2] / f"{at}.png", np.full((4, 4, 3), (at, 100, 255), np.uint8))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    plain = read(f"images:{tmp_path}?size=4").splits.test
    options = f"mean={','.join(map(str, mean))}&std={','.join(map(str, std))}"
    scaled = read(f"images:{tmp_path}?size=4&{options}").splits.test
    one = read(f"images:{tmp_path}?size=4&mean=0.5&std=0.25").splits.test
    x, _ = contents(plain)
    np.testing.assert_allclose(
        x[:, :, 0, 0] * 255, [[at[0], 100, 255] for at in x[:, :, 0, 0] * 255]
    )
    shaped = (np.array(values)[:, None, None] for values in (mean, std))
    np.testing.assert_allclose(contents(scaled)[0], (x - next(shaped)) / next(shaped), atol=1e-6)
    np.testing.assert_allclose(contents(one)[0], (x - 0.5) / 0.25, atol=1e-6)
    assert contents(scaled)[0].dtype == np.float32


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_pixel(tmp_path: Path, photos: list[Path], mode: str) -> None:
    """What is stored otherwise looks like the original; in 16 bits it is not clipped to white."""
    with Image.open(photos[0]) as photo:
        small = photo.resize((64, 64))
    if mode == "I;16":
        stored = Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257)
    else:
        stored = small.convert(mode)
    if mode == "P":
        stored.info["transparency"] = bytes(range(256))
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    stored.save(path)
    for gray in (False, True):
        wanted = np.asarray(small.convert("L" if gray else "RGB"), np.float32).reshape(64, 64, -1)
        if mode in ("1", "L", "LA", "I;16") and not gray:
            wanted = np.asarray(small.convert("L").convert("RGB"), np.float32)
        seen = _decoded(str(path), 64, gray)
        assert (seen.shape, seen.dtype) == ((64, 64, 1 if gray else 3), np.uint8)
        allowed = {"1": 128, "P": 16}.get(mode, 1)
        assert np.abs(seen.mean(axis=(0, 1)) - wanted.mean(axis=(0, 1))).max() <= 12
        assert np.abs(seen - wanted).mean() <= allowed


def test_large_jpegs_are_decoded_smaller_and_look_the_same(
    tmp_path: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []

    def noted(image: Image.Image, gray: bool) -> Image.Image:
        made = _plain(image, gray)
        widths.append(made.width)
        return made

    monkeypatch.setattr(folder, "_plain", noted)
    with Image.open(photos[0]) as photo:
        photo.resize((2560, 1708), Image.Resampling.LANCZOS).save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        middle = (426, 0, 2134, 1708)
        whole = image.resize((64, 64), Image.Resampling.BILINEAR, box=middle)
    seen = _decoded(str(tmp_path / "a.jpg"), 64, False).astype(np.float32)
    assert np.abs(seen - np.asarray(whole, np.float32)).max() <= 1
    assert widths == [2560 / 4]


# On demand


def test_pictures_are_read_when_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered(tmp_path, {"a": 100, "b": 100})
    opened: list[str] = []
    plain = Image.open

    def counted(path: str, *rest: Any, **more: Any) -> Image.Image:
        opened.append(path)
        return plain(path, *rest, **more)

    monkeypatch.setattr(Image, "open", counted)
    train = read(f"images:{tmp_path}?size=4").splits.train
    assert len(opened) == 32
    seen = np.concatenate(list(targets(train, 16)))
    assert len(opened) == 32
    np.testing.assert_array_equal(seen, contents(train)[1])
    assert len(opened) == 32 + len(train)
    assert isinstance(train.fetch, OnDemand)
    assert automatic(train) >= 1
    held = resident(train, 1 << 20)
    assert automatic(held) == 0
    opened.clear()
    assert held.digest() == held.digest()
    assert not opened
    assert held.digest() == train.digest()


def test_threads_decode_the_same(digits: Path) -> None:
    train = read(f"images:{digits}?size=8").splits.train
    steps = np.array_split(np.random.default_rng(0).permutation(len(train)), 9)
    alone, together = (
        [x.numpy().tobytes() for (x,), _ in batches(train, steps, workers=count, pin=False)]
        for count in (0, 3)
    )
    assert alone == together


def every_batch(spec: str, seed: int) -> None:
    """Reads all there is: in this thread with seed 0, in two with seed 1."""
    splits = read(spec, seed).splits
    for split in (splits.train, splits.validate, splits.test):
        list(batches(split, [np.arange(len(split))], workers=2 * seed, pin=False))


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "text": b"this is no picture at all",
    "half": b"half",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_picture_is_named(tmp_path: Path, photos: list[Path], kind: str) -> None:
    numbered(tmp_path, {"a": 20, "b": 20})
    content = photos[0].read_bytes()
    (tmp_path / "b" / "bad.jpg").write_bytes(
        content[: len(content) // 2] if kind == "half" else BROKEN[kind]
    )
    where = str(tmp_path / "b" / "bad.jpg")
    for seed in (0, 1):
        with pytest.raises(InputError, match=r"cannot be decoded: .*: replace or remove") as caught:
            every_batch(f"images:{tmp_path}?size=4", seed)
        assert where in str(caught.value)
        assert "\n" not in str(caught.value)


def test_pixels_of_no_known_range_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.tif", np.full((4, 4), 0.5, np.float32))
    with pytest.raises(InputError, match=r"a\.tif cannot be decoded: its pixels are of mode F"):
        _decoded(str(tmp_path / "a.tif"), 4, False)


@given(at=st.integers(0, 100_000), change=st.binary(min_size=1, max_size=6))
def test_changed_pictures_never_surprise(
    tmp_path_factory: pytest.TempPathFactory, photos: list[Path], at: int, change: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.png"
    with Image.open(photos[0]) as photo:
        photo.resize((24, 16)).save(path)
    content = path.read_bytes()
    at %= len(content)
    path.write_bytes(content[:at] + change + content[at + len(change) :])
    with contextlib.suppress(InputError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of some damage and reads on
        assert _decoded(str(path), 8, False).shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("made", "spec", "message"),
    [
        ({}, "images:/not/here", "there is no folder /not/here"),
        ({}, "images:{}", "holds no picture"),
        ({"a": 3, "b": 0}, "images:{}", "b holds no picture .*: add some or remove it"),
        ({"a": 2, "b": 2}, "images:{}", "too few examples to split: 4"),
        ({"train/a": 9, "test/b": 3}, "images:{}", "b is a class that train has not: add it"),
        ({"train": 9, "test/b": 3}, "images:{}", "train has no folders: give one for each class"),
        ({"train/a": 9, "test": 3}, "images:{}", "test has no folders: give one for each class"),
        ({"train/a": 9, "val/a": 3, "valid/a": 3}, "images:{}", "'validate' twice: remove"),
        ({"test/a": 9, "val/a": 3}, "images:{}", "holds test, val and no train: add it"),
        ({"train/a": 9, "unlabelled": 0}, "images:{}", "unlabelled holds no picture"),
        ({"train/a": 9, "test/a": 1}, "images:{}", "split test: it has 1 example"),
        ({"a": 9}, "images:{}?mean=1,2", "option mean has 2 numbers for 3 channels: give 1 or 3"),
        ({"a": 9}, "images:{}?gray=1&std=1,2,3", "std has 3 numbers for 1 channels"),
        ({"a": 9}, "images:{}?std=0", "option std=0: give numbers above 0"),
        ({"a": 9}, "images:{}?std=nan", "option std='nan'"),
        ({"a": 9}, "images:{}?mean=inf", "option mean='inf'"),
        ({"a": 9}, "images:{}?mean=", "option mean=''.*valid number"),
        ({"a": 9}, "images:{}?size=0", "greater than or equal to 1"),
        ({"a": 9}, "images:{}?width=9", "unknown option 'width'; known: size, gray, mean, std"),
        ({}, "images", "write images:PATH"),
    ],
)
def test_wrong_folders_are_refused(
    tmp_path: Path, made: dict[str, int], spec: str, message: str
) -> None:
    for name, count in made.items():
        (tmp_path / name).mkdir(parents=True)
        numbered(tmp_path, {name: count})
    with pytest.raises(InputError, match=message) as caught:
        read(spec.format(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("train", "validate", "test"),
    [("Train", "Val", "Test"), ("training", "validation", "testing"), ("train", "dev", "TEST")],
)
def test_parts_by_other_names(tmp_path: Path, train: str, validate: str, test: str) -> None:
    start = 0
    for part, count in ((train, 8), (validate, 3), (test, 4)):
        start = numbered(tmp_path / part, {"a": count, "b": count}, start)
    splits = read(f"images:{tmp_path}?size=6", 0).splits
    assert (len(splits.validate), len(splits.test)) == (6, 8)


def test_what_stands_beside_train_is_not_left_out_without_a_word(tmp_path: Path) -> None:
    numbered(tmp_path / "train", {"a": 8, "b": 8})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "read.me").write_text("how it was made", encoding="utf-8")
    assert len(read(f"images:{tmp_path}?size=6", 0).splits.train) > 0
    numbered(tmp_path / "bus", {"one": 1})
    with pytest.raises(InputError, match="bus stands beside train and is no part") as caught:
        read(f"images:{tmp_path}?size=6", 0)
    assert "\n" not in str(caught.value)
