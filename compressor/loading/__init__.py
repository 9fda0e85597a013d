"""What a user hands in becomes a task; nothing that a file holds is ever executed."""

from compressor.loading.checkpoint import save
from compressor.loading.task import load, task

__all__ = ["load", "save", "task"]
