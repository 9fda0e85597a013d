"""Pictures in a folder, decoded when they are asked for."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field, FiniteFloat

from compressor.data.demand import At, OnDemand
from compressor.data.live import BARE, PARTS, Data, checked
from compressor.data.splitting import completed
from compressor.errors import InputError, one_line
from compressor.task import UNLABELLED, Array, Batch, Split

if TYPE_CHECKING:
    from PIL import Image

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""What pictures are called; a folder's other files are passed over."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What they may be, whatever they are called: for others, such as EPS, Pillow starts programs."""


def _numbers(text: object) -> object:
    return text.split(",") if isinstance(text, str) else text


Channels = Annotated[tuple[FiniteFloat, ...], BeforeValidator(_numbers)]
"""One number for each channel, or one for all: ``0.485,0.456,0.406``."""


def images(
    location: str,
    seed: int,
    *,
    size: Annotated[int, Field(ge=1, le=4096)] = 224,
    gray: bool = False,
    mean: Channels = (0.0,),
    std: Channels = (1.0,),
) -> Data:
    """Pictures, one folder for each class; or ``train`` and ``test``, each with such folders.

    Classes are the names of the folders, sorted. Beside ``train`` there may be any of ``test``,
    ``validate`` (``validation``, ``valid``, ``val``, ``dev``) and ``calibrate``, in upper or lower
    case, whose classes are those of ``train``, and ``unlabelled``, further pictures for ``train``
    without a class. A folder of nothing but pictures is data without labels. Pictures may lie
    deeper; files with other endings are passed over. Pixels are taken as they are stored, as
    torchvision does: a camera's note that a picture is to be turned (EXIF) is not followed.

    Inputs are float32 ``(3, size, size)``, with ``gray`` ``(1, size, size)``: the shorter side is
    made ``size`` pixels long (bilinear, antialiased), the middle of the longer kept, and
    ``(pixel / 255 - mean) / std`` taken of each channel. What the model was trained with is not
    known here: ask for it. Only the paths are held in memory.

    Raises :class:`InputError` for a folder without pictures and, when it is read, for a picture
    that cannot be decoded.
    """
    root = Path(location).expanduser()
    if not root.is_dir():
        raise InputError(f"there is no folder {root}")
    decode = decoder(size, gray, mean, std)

    def split(paths: Sequence[str], labels: Array) -> Split:
        def read(at: At) -> Batch:
            return (decode([(paths[position], None) for position in at]),), labels[at]

        return Split(OnDemand(read, labels.__getitem__, parallel=True), np.arange(len(paths)))

    split_into = _split_into(root)
    home = split_into.get("train", root)
    classes, in_parts = _classes(home), "train" in split_into
    if not in_parts and not classes:
        bare = completed(split(*_bare(root)), seed)
        return Data("images", checked(bare, bare=tuple(bare.sizes())), labelled=False)
    if not in_parts and len(split_into) == len(classes):
        raise InputError(f"{root} holds {', '.join(classes)} and no train: add it")
    paths, labels = _labelled(home, classes)
    train = split(paths, labels)
    others = {
        part: split(*_labelled(folder, classes))
        for part, folder in (split_into.items() if in_parts else ())
        if part not in ("train", BARE)
    }
    splits = checked(completed(train, seed, labels=labels, **others))
    if in_parts and BARE in split_into:
        more = split(*_bare(split_into[BARE]))
        splits = completed(train, seed, labels=labels, **others, unlabelled=more)
    return Data("images", splits, "classification", len(classes))


def decoder(
    size: int, gray: bool, mean: Channels, std: Channels
) -> Callable[[Sequence[tuple[str, bytes | None]]], Array]:
    """Makes pictures float32 ``(n, channels, size, size)``, by the options of :func:`images`.

    A picture is its path, or its title and the content of its file. Raises :class:`InputError` for
    options that do not go together and, when it is called, for a picture that cannot be decoded.
    """
    wide = 1 if gray else 3
    for title, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, wide):
            raise InputError(
                f"option {title} has {len(values)} numbers for {wide} channels: give 1 or {wide}"
            )
    if min(std) <= 0:
        raise InputError(f"option std={min(std):g}: give numbers above 0")
    # One multiplication and one addition a pixel, in float32.
    scale = (1 / (255 * np.array(std, np.float64))).astype(np.float32)[:, None, None]
    shift = (-np.array(mean, np.float64) / np.array(std)).astype(np.float32)[:, None, None]

    def decode(pictures: Sequence[tuple[str, bytes | None]]) -> Array:
        pixels = np.empty((len(pictures), wide, size, size), np.float32)
        for place, (path, content) in enumerate(pictures):
            pixels[place] = _decoded(path, size, gray, content).transpose(2, 0, 1)
            pixels[place] *= scale
            pixels[place] += shift
        return pixels

    return decode


def _split_into(root: Path) -> dict[str, Path]:
    """The folders of a data set that are its parts, by what they are called here.

    Raises :class:`InputError` for two of one part, and for pictures in a folder beside ``train``
    that is none: they would be left out without a word.
    """
    found: dict[str, Path] = {}
    strangers = []
    for name in _classes(root):
        part = {**PARTS, BARE: BARE}.get(name.lower())
        if part is None:
            strangers.append(root / name)
        elif part in found:
            raise InputError(f"{root} holds the part {part!r} twice: remove {root / name}")
        else:
            found[part] = root / name
    for stranger in strangers if "train" in found else ():
        if any(
            name.lower().endswith(ENDINGS) for _, _, names in os.walk(stranger) for name in names
        ):
            raise InputError(
                f"{stranger} stands beside {found['train'].name} and is no part "
                f"({', '.join(PARTS)}, {BARE}): move it, or give that folder another name if it "
                "is a class"
            )
    return found


def _classes(folder: Path) -> list[str]:
    return sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."
    )


def _labelled(folder: Path, classes: Sequence[str]) -> tuple[list[str], Array]:
    """The paths of the pictures of all classes, and their int64 labels, shape ``(n,)``."""
    paths: list[str] = []
    labels: list[int] = []
    for name in _classes(folder):
        if name not in classes:
            raise InputError(f"{folder / name} is a class that train has not: add it there")
        found = _pictures(folder / name)
        paths += found
        labels += [classes.index(name)] * len(found)
    if not paths:
        raise InputError(f"{folder} has no folders: give one for each class")
    return paths, np.array(labels, dtype=np.int64)


def _bare(folder: Path) -> tuple[list[str], Array]:
    """The paths of all pictures in a folder, and that none has a label."""
    paths = _pictures(folder)
    return paths, np.full(len(paths), UNLABELLED, dtype=np.int64)


def _pictures(folder: Path) -> list[str]:
    """The paths of all pictures below a folder, sorted; at least one."""
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        where = (at := Path(place).stat()).st_dev, at.st_ino
        if where in seen:  # two links in a folder to itself would never end
            folders.clear()
            continue
        seen.add(where)
        found += [
            str(Path(place) / name)
            for name in names
            if name.lower().endswith(ENDINGS) and name[0] != "."
        ]
    found.sort()
    if not found:
        raise InputError(f"{folder} holds no picture ({', '.join(ENDINGS)}): add some or remove it")
    return found


def _decoded(path: str, size: int, gray: bool, content: bytes | None = None) -> Array:
    """One picture as uint8, shape ``(size, size, channels)``."""
    from PIL import Image

    try:
        with Image.open(path if content is None else io.BytesIO(content), formats=FORMATS) as image:
            # A JPEG decoder can halve as it decodes. Where 4 times the size is left no value
            # differed by more than 1 of 255 (twice: by 24), in a quarter of the time.
            image.draft(None, (4 * size, 4 * size))
            pixels = np.asarray(_squared(_plain(image, gray), size))
    except Exception as error:  # Pillow and its decoders raise a dozen types on a broken file
        why = one_line(error).partition(" <_io")[0]  # where in memory it was is no help
        raise InputError(f"{path} cannot be decoded: {why}: replace or remove it") from None
    return pixels.reshape(size, size, -1)


def _plain(image: Image.Image, gray: bool) -> Image.Image:
    """The picture in 8 bits a channel: RGB, or gray."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        # Pillow would clip, not scale: nearly all of it white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError(f"its pixels are of mode {image.mode}, of no known range; save 8 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if gray else "RGB")


def _squared(image: Image.Image, size: int) -> Image.Image:
    """The largest square in the middle, resized as the whole picture would have been."""
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box: Any = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)
