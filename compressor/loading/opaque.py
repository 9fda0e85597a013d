"""Programs that run, but that no layers come from: PyTorch's own exporter makes ONNX of them.

Only of files that the user trusts, since PyTorch's loaders execute what a file holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compressor.errors import InputError, one_line
from compressor.loading import pickled
from compressor.loading.graph.program import AS_IT_IS
from compressor.quiet import quiet
from compressor.task import Inputs

OPSET = 20
SCRIPTED = 18
"""The same for TorchScript, whose exporter is older and knows no later one."""


class Opaque(InputError):
    """A trusted program whose layers cannot be had; :func:`converted` still gives its ONNX.

    ``scripted`` says that it is TorchScript, and not what ``torch.export`` writes.
    """

    def __init__(self, path: Path, text: str, *, scripted: bool) -> None:
        super().__init__(text.replace(f", or, if you trust the file, {AS_IT_IS}", ""))
        self.path, self.scripted = path, scripted


def converted(why: Opaque, into: Path, example: Inputs | None) -> Path:
    """The trusted program ``why.path`` as an ONNX file in the folder ``into``: this executes it.

    ``example`` is a batch of two, which only TorchScript needs; its first axes are left open.
    Raises ``why``, with what else went wrong, where PyTorch cannot export the program either.
    """
    path = why.path
    made = into / f"{path.stem}.onnx"
    try:
        with quiet(), torch.no_grad():
            if why.scripted:
                _scripted(pickled.trusted(path).eval(), made, example or ())
            else:
                with path.open("rb") as file:  # by its name it must be a .pt2
                    _exported(torch.export.load(file), made)
    except Exception as error:
        raise InputError(f"{why}; nor does it become ONNX ({one_line(error, 160)})") from None
    return made


def _exported(program: torch.export.ExportedProgram, made: Path) -> None:
    found = torch.onnx.export(
        program,
        dynamo=True,
        external_data=False,
        opset_version=OPSET,
        verbose=False,
    )
    assert found is not None
    found.save(made)


def _scripted(program: Any, made: Path, example: Inputs) -> None:
    names = [one.name for one in program.forward.schema.arguments][1 : 1 + len(example)]
    torch.onnx.export(
        program,
        tuple(map(torch.from_numpy, example)),
        made,
        dynamo=False,
        opset_version=SCRIPTED,
        input_names=names,
        output_names=["output"],
        dynamic_axes={name: {0: "batch"} for name in (*names, "output")},
    )
