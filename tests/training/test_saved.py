"""A state on disk is given back bit for bit, or not at all, and is no pickle."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor.training import saved
from compressor.training.optimisers import OPTIMISERS
from compressor.training.settings import Training

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    made = (torch.randn(shape, generator=random) * 10).to(draw(st.sampled_from(DTYPES)))
    return made.T if made.ndim == 2 else made


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        yield Path(name)


@given(
    held=st.dictionaries(st.text(st.characters(categories=("L", "P"))), tensors(), max_size=5),
    facts=st.dictionaries(st.text(), PLAIN, max_size=4),
    key=st.text(),
)
def test_what_is_written_is_read(
    folder: Path, held: dict[str, Tensor], facts: dict[str, Any], key: str
) -> None:
    path = folder / "state"
    held.pop("__metadata__", None)
    saved.write(path, key, held, facts)
    assert saved.read(path, f"{key}.") is None
    found = saved.read(path, key)
    assert found is not None
    assert found[1] == facts
    assert found[0].keys() == held.keys()
    for name, tensor in held.items():
        assert found[0][name].dtype == tensor.dtype
        assert torch.equal(found[0][name], tensor)


@cache
def whole() -> bytes:
    with TemporaryDirectory() as name:
        path = Path(name) / "state"
        saved.write(path, "key", {"a": torch.arange(40.0), "b": torch.tensor(3)}, {"best": 0.5})
        return path.read_bytes()


@given(bit=st.integers(0, 8 * len(whole()) - 1))
def test_a_single_flipped_bit_is_noticed(folder: Path, bit: int) -> None:
    path = folder / "flipped"
    harmed = bytearray(whole())
    harmed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(harmed))
    found = saved.read(path, "key")
    if found is not None:  # JSON has room that says nothing: spaces around its values
        assert found[1] == {"best": 0.5}
        assert torch.equal(found[0]["a"], torch.arange(40.0))
        assert torch.equal(found[0]["b"], torch.tensor(3))


@given(length=st.integers(0, len(whole()) - 1))
def test_a_part_of_a_file_is_none(folder: Path, length: int) -> None:
    path = folder / "cut"
    path.write_bytes(whole()[:length])
    assert saved.read(path, "key") is None


@given(text=st.binary(max_size=200))
def test_other_files_are_none(folder: Path, text: bytes) -> None:
    path = folder / "other"
    path.write_bytes(text)
    assert saved.read(path, "key") is None


@pytest.mark.parametrize(
    "said",
    [
        None,
        "[]",
        '"key"',
        "{}",
        '{"key": "key"}',
        '{"key": "key", "digest": "0"}',
        '{"key": "key", "facts": 3, "digest": "0"}',
        "{",
    ],
)
def test_headers_of_others_are_none(folder: Path, said: str | None) -> None:
    from safetensors.torch import save_file

    path = folder / "header"
    save_file({"a": torch.ones(2)}, path, metadata=None if said is None else {"training": said})
    assert saved.read(path, "key") is None


def test_no_file_is_none(folder: Path) -> None:
    assert saved.read(folder / "nothing", "key") is None
    assert saved.read(folder, "key") is None


def test_a_file_is_tensors_and_json_and_nothing_else(folder: Path) -> None:
    path = folder / "plain"
    held = {"a": torch.arange(10, dtype=torch.float64), "b": torch.ones(3, 2).T}
    saved.write(path, "key", held, {"best": 1e-300})
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert json.loads(header.pop("__metadata__")["training"])["facts"] == {"best": 1e-300}
    assert header.keys() == held.keys()
    assert len(data) - 8 - length == sum(one.nbytes for one in held.values())


def test_a_write_that_fails_leaves_what_was_there(folder: Path) -> None:
    path = folder / "kept"
    saved.write(path, "key", {"a": torch.ones(2)}, {})
    before, there = path.read_bytes(), set(folder.iterdir())
    with pytest.raises(TypeError):
        saved.write(path, "key", {"a": torch.zeros(2)}, {"no plain value": object()})
    assert path.read_bytes() == before
    assert set(folder.iterdir()) == there


@given(
    st.dictionaries(
        st.text(st.characters(categories=("L",)), min_size=1),
        st.dictionaries(st.text(min_size=1), st.integers(0, 9).map(torch.tensor), max_size=3),
        max_size=4,
    )
)
def test_what_is_put_under_a_name_is_found_there_alone(
    groups: dict[str, dict[str, Tensor]],
) -> None:
    together = {}
    for name, group in groups.items():
        together |= saved.of(name, group)
    for name, group in groups.items():
        assert saved.under(name, together) == group


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_an_optimiser_goes_on_from_plain_values(folder: Path, name: Any, steps: int) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        model.get_submodule("1").bias.requires_grad_(False)  # type: ignore[union-attr]
        own = [one for one in model.parameters() if one.requires_grad]
        return model, OPTIMISERS[name](own, Training(optimizer=name, weight_decay=0.1))

    def walk(model: nn.Module, optimiser: torch.optim.Optimizer, steps: int) -> None:
        for at in range(steps):
            optimiser.zero_grad()
            (model(torch.full((2, 3), float(at + 1))) ** 2).sum().backward()
            optimiser.step()

    model, optimiser = fresh()
    walk(model, optimiser, steps)
    tensors, facts = saved.moments(optimiser)
    saved.write(folder / "moments", "key", tensors, facts)
    other, later = fresh()
    other.load_state_dict(model.state_dict())
    found = saved.read(folder / "moments", "key")
    assert found is not None
    saved.restore(later, *found)
    assert later.param_groups[0].keys() == optimiser.param_groups[0].keys()
    for one in optimiser.param_groups[0].keys() - {"params"}:
        assert later.param_groups[0][one] == optimiser.param_groups[0][one]
        assert type(later.param_groups[0][one]) is type(optimiser.param_groups[0][one])
    walk(model, optimiser, 3)
    walk(other, later, 3)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
