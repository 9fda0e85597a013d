"""A model at rest: a file, its digest, and the steps that made it."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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


def digest(*paths: Path) -> str:
    """SHA-256 over the contents of the files, in order, in hexadecimal."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                total.update(chunk)
    return total.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; synced and renamed over ``path`` when all went well.

    A reader sees the old file or the new one, never a part. On an error nothing is left behind.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        # Some writers make files that only their owner can read: follow the umask instead.
        beside.chmod(0o666 & ~_umask())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text so that a reader sees all of it or the old file."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
