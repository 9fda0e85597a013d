"""A model at rest: a file, its digest, and the steps that made it."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from compressor.errors import StageError


@dataclass(frozen=True)
class Artifact:
    """A file that holds a model, and how it was made.

    ``form`` is ``"torch"`` (safetensors, see :mod:`compressor.loading.torchfile`) or ``"onnx"``.
    ``companions`` are files that belong to ``path`` (external data). ``steps`` are the records of
    the stages that made it, oldest first: ``{"stage", "settings", "facts"}``, plain JSON values.
    ``source`` is the torch file that an ONNX file was exported from. ``digest`` is the SHA-256 of
    ``path`` and its companions, in hexadecimal; it is taken when the artifact is made, so that a
    later change of the file is noticed.
    """

    name: str
    path: Path
    form: str
    digest: str
    steps: tuple[Mapping[str, Any], ...] = ()
    companions: tuple[Path, ...] = ()
    source: Path | None = None

    @classmethod
    def of(cls, path: Path, form: str, **fields: Any) -> Artifact:
        """The artifact at ``path``, digested now. Its name is the file's stem."""
        companions = tuple(fields.pop("companions", ()))
        return cls(
            name=path.stem,
            path=path,
            form=form,
            digest=digest(path, *companions),
            companions=companions,
            **fields,
        )

    def then(
        self,
        path: Path,
        form: str,
        stage: str,
        settings: Mapping[str, Any],
        *,
        companions: Iterable[Path] = (),
        **facts: Any,
    ) -> Artifact:
        """The next artifact: the file at ``path``, made from this one by ``stage``."""
        record = {"stage": stage, "settings": dict(settings), "facts": facts}
        source = self.path if (self.form, form) == ("torch", "onnx") else None
        steps = (*self.steps, record)
        return Artifact.of(path, form, steps=steps, source=source, companions=companions)

    def checked(self) -> Artifact:
        """This artifact, after its file was compared with its digest.

        Raises :class:`StageError` when the file is gone or has changed.
        """
        files = (self.path, *self.companions)
        if not all(file.is_file() for file in files) or digest(*files) != self.digest:
            raise StageError(f"{self.path} changed since it was made; run again with --fresh")
        return self

    @property
    def size_bytes(self) -> int:
        """Bytes on disk, companions included."""
        return sum(path.stat().st_size for path in (self.path, *self.companions))

    def to_json(self) -> dict[str, Any]:
        """Plain values; paths as file names beside the record."""
        return {
            "name": self.name,
            "path": self.path.name,
            "form": self.form,
            "digest": self.digest,
            "steps": list(self.steps),
            "companions": [path.name for path in self.companions],
            "source": self.source.name if self.source else None,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], folder: Path) -> Artifact:
        """The artifact that :meth:`to_json` described, its files in ``folder``."""
        artifact = cls(
            name=record["name"],
            path=folder / record["path"],
            form=record["form"],
            digest=record["digest"],
            steps=tuple(record["steps"]),
            companions=tuple(folder / name for name in record["companions"]),
        )
        return replace(artifact, source=folder / record["source"]) if record["source"] else artifact


Torch = Annotated[Artifact, "torch"]
Onnx = Annotated[Artifact, "onnx"]
"""What a stage takes and gives, said in its signature; the runner exports where it has to."""


def zipped(path: Path) -> bool:
    """Whether ``path`` is a zip file, perhaps a damaged one."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # one in several parts, or made to look like it
        return True


def digest(*paths: Path) -> str:
    """SHA-256 over the contents of the files, in order, in hexadecimal."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                total.update(chunk)
    return total.hexdigest()


def copy(artifact: Artifact, path: Path) -> None:
    """Copies the file to ``path``, companions beside it under their own names, and compares the
    digest. Raises :class:`StageError` where it is another, and leaves what was there before."""
    into = [path, *(path.with_name(companion.name) for companion in artifact.companions)]
    with ExitStack() as open_:
        # Closed in reverse: the file that names its companions comes last.
        parts = [open_.enter_context(replacing(place)) for place in into]
        for part, file in zip(parts, (artifact.path, *artifact.companions), strict=True):
            shutil.copyfile(file, part)
        if digest(*parts) != artifact.digest:
            raise StageError(f"{artifact.path} changed since it was made; run again with --fresh")


@contextmanager
def replacing(path: Path, check: Callable[[Path], object] | None = None) -> Iterator[Path]:
    """A path beside ``path`` to write to; synced and renamed over ``path`` when all went well.

    A reader sees the old file or the new one, never a part, and so it is after a power cut.
    ``check`` gets the new file before it takes the old one's place, and stops that by raising.
    On an error nothing is left behind.
    """
    beside = part_of(path)
    try:
        yield beside
        _settled(beside)
        if check is not None:
            check(beside)
        beside.replace(path)
        synced(path.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def together(folder: Path) -> Iterator[Path]:
    """A folder to write files to that belong together; they move into ``folder`` as one.

    All of them are on the disk before the first moves. A process that is killed in the middle of
    moving leaves the rest to whoever calls :func:`settle`, as all readers of ours do: they see all
    old files or all new ones. On an error nothing has changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settle(folder)
    beside = part_of(folder / READY)
    beside.mkdir()
    try:
        yield beside
        for file in beside.iterdir():
            _settled(file)
        synced(beside)
        beside.replace(folder / READY)
        synced(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    settle(folder)


def settle(folder: Path) -> None:
    """Moves what a process that was killed had written with :func:`together`, where there is any.

    JSON comes last, as it says what the other files are.
    """
    ready = folder / READY
    if ready.is_symlink() or not ready.is_dir():
        return  # what a link leads to is not ours to move
    for file in sorted(ready.iterdir(), key=lambda file: (file.suffix == ".json", file.name)):
        with suppress(FileNotFoundError):  # another process was faster
            file.replace(folder / file.name)
    synced(folder)
    with suppress(OSError):
        ready.rmdir()


READY = ".together.ready"
"""The folder of files that are complete, and about to move up."""

PART = re.compile(r"\..+\.[0-9a-f]{8}\.part")
"""Names of what is being written; a process that was killed leaves them behind."""


def part_of(path: Path) -> Path:
    """A new name beside ``path``, a :data:`PART`, for what is to become or was ``path``."""
    return path.with_name(f".{path.name.removeprefix('.')}.{secrets.token_hex(4)}.part")


def synced(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # a folder cannot be opened there
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _settled(file: Path) -> None:
    synced(file)
    # Some writers make files that only their owner can read: follow the umask instead.
    file.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text so that a reader sees all of it or the old file."""

    def check(file: Path) -> None:
        if file.read_bytes() != text.encode():
            raise OSError(errno.EIO, "what was written does not read the same", str(path))

    with replacing(path, check) as beside:
        beside.write_bytes(text.encode())
