"""Edits do what they say and nothing else; what does not fit is one line."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compressor.errors import InputError
from compressor.loading.edits import EDITS, apply


def model() -> nn.Module:
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {
        "fc": nn.Linear(4, 6),
        "norm": nn.BatchNorm1d(6),
        "attention": nn.MultiheadAttention(8, 2),
        "with_bias": nn.MultiheadAttention(8, 2, add_bias_kv=True),
        "with_zero": nn.MultiheadAttention(8, 2, add_zero_attn=True),
        "rnn": nn.LSTM(4, 3),
    }
    return nn.ModuleDict(layers)


def keep(**changes: Any) -> dict[str, Any]:
    return {"edit": "keep", "parameter": "fc.weight", "dim": 0, "indices": [0, 1], **changes}


def scale(**changes: Any) -> dict[str, Any]:
    said = {"edit": "scale", "parameter": "fc.weight", "dim": 0, "indices": [0, 1], "factor": 2.0}
    return {**said, **changes}


def attention(**changes: Any) -> dict[str, Any]:
    return {"edit": "rewrite", "module": "attention", "as": "attention", **changes}


def flatten(**changes: Any) -> dict[str, Any]:
    return {"edit": "rewrite", "module": "fc", "as": "flatten", "size": 3, **changes}


def without(edit: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in edit.items() if key != name}


BAD = [
    attention(**{"as": "anything"}),
    attention(**{"as": "Attention"}),
    attention(**{"as": ["attention"]}),
    attention(**{"as": None}),
    without(attention(), "as"),
    without(attention(), "module"),
    attention(module="absent"),
    attention(module=3),
    attention(module="fc"),
    attention(module="rnn"),
    attention(module=""),
    attention(module="with_bias"),
    attention(module="with_zero"),
    flatten(size=0),
    flatten(size=-1),
    flatten(size=3.0),
    flatten(size="3"),
    flatten(size=True),
    flatten(size=None),
    flatten(size=[3]),
    without(flatten(), "size"),
    flatten(module="absent"),
    scale(factor=0.0),
    scale(factor=-1.0),
    scale(factor=math.nan),
    scale(factor=math.inf),
    scale(factor=-math.inf),
    scale(factor="2.0"),
    scale(factor=2),
    scale(factor=True),
    scale(factor=None),
    scale(factor=[2.0]),
    without(scale(), "factor"),
    scale(parameter="absent.weight"),
    scale(parameter="fc.absent"),
    scale(parameter="fc.forward"),
    scale(dim=2),
    scale(dim=-1),
    scale(dim="0"),
    scale(dim=0.0),
    scale(dim=True),
    scale(dim=None),
    scale(indices=[]),
    scale(indices=[6]),
    scale(indices=[-1]),
    scale(indices=[0.0]),
    scale(indices=["0"]),
    scale(indices=[True]),
    scale(indices=3),
    scale(indices=None),
    keep(indices=[6]),
    keep(indices=[-1]),
    keep(indices=[0, 1.0]),
    without(keep(), "dim"),
    without(keep(), "indices"),
    without(keep(), "parameter"),
    without(keep(), "edit"),
]


@pytest.mark.parametrize("edit", BAD, ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_does_not_fit_is_one_line(edit: dict[str, Any], device: str) -> None:
    given = model().to(device)
    with pytest.raises(InputError, match="an edit in the file does not fit its model") as caught:
        apply(given, [edit])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_layer_is_rewritten_once() -> None:
    with pytest.raises(InputError, match="not an attention layer that can be rewritten"):
        apply(model(), [attention(), attention()])


def test_edits_go_in_order() -> None:
    with pytest.raises(InputError):
        apply(model(), [keep(parameter="attention.q_proj.weight"), attention()])
    apply(model(), [attention(), keep(parameter="attention.q_proj.weight")])


def test_the_set_of_edits_is_the_documented_one() -> None:
    assert set(EDITS) == {"fake_quantize", "keep", "rewrite", "scale", "set_attribute"}


@given(
    dim=st.integers(0, 1),
    data=st.data(),
    factor=st.floats(1e-3, 1e3, allow_nan=False),
)
def test_scale_multiplies_those_slices_only(dim: int, data: st.DataObject, factor: float) -> None:
    dense = model()
    before = dense.get_parameter("fc.weight").detach().clone()
    size = before.shape[dim]
    indices = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
    rest = {
        name: value.clone() for name, value in dense.state_dict().items() if name != "fc.weight"
    }
    apply(dense, [scale(dim=dim, indices=indices, factor=factor)])
    after = dense.get_parameter("fc.weight").detach().movedim(dim, 0)
    for at, (old, new) in enumerate(zip(before.movedim(dim, 0), after, strict=True)):
        assert torch.equal(new, old * factor if at in indices else old)
    assert all(torch.equal(dense.state_dict()[name], value) for name, value in rest.items())


def test_scale_reaches_a_frozen_parameter_and_leaves_it_frozen() -> None:
    dense = model().requires_grad_(False)
    wanted = dense.get_parameter("fc.weight")[:2] * 0.5
    apply(dense, [scale(factor=0.5)])
    assert torch.equal(dense.get_parameter("fc.weight")[:2], wanted)
    assert not dense.get_parameter("fc.weight").requires_grad


def test_scale_and_rewrite_work_on_a_sketch() -> None:
    sketch = copy.deepcopy(model()).to("meta")
    apply(sketch, [attention(), flatten(), scale(), keep()])
    assert sketch.get_parameter("fc.weight").shape == (2, 4)
    assert sketch.get_parameter("attention.q_proj.weight").shape == (8, 8)
