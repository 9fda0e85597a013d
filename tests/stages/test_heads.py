"""Attention: whole heads or dimensions of every head, and the attributes that count them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, masked, same, task_for
from standing import at_rest, task_of
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name that the field uses)

from compressor import Task
from compressor.loading import torchfile
from compressor.loading.rewrites import Attention
from compressor.measure import counting
from compressor.stages import prune
from compressor.task import Input

BERT = "bert.encoder.layer.{}.attention.self"
ENCODER = "encoder.layers.{}.self_attn"
WHERE = {
    "vit, fused": ("blocks.{}.attn", "qkv"),
    "vit, separate": ("blocks.{}.attention", "q"),
    "multihead attention": ("attention", ""),
    "transformer encoder, norm last": (ENCODER, ""),
    "transformer encoder, norm first": (ENCODER, ""),
    "bert": (BERT, "query"),
}
"""The layers that hold attention, and the projection that a report names."""

WRITTEN: dict[str, dict[str, dict[str, int]]] = {
    "vit, fused": {"heads": {"num_heads": 2}, "dimensions": {"num_heads": 4}},
    "vit, separate": {
        "heads": {"heads": 2, "head_dim": 8},
        "dimensions": {"heads": 4, "head_dim": 4},
    },
    "multihead attention": {"heads": {"num_heads": 2}, "dimensions": {"num_heads": 4}},
    "transformer encoder, norm last": {
        "heads": {"num_heads": 2},
        "dimensions": {"num_heads": 4},
    },
    "transformer encoder, norm first": {
        "heads": {"num_heads": 2},
        "dimensions": {"num_heads": 4},
    },
    "bert": {
        "heads": {"num_attention_heads": 2, "attention_head_size": 8, "all_head_size": 16},
        "dimensions": {"num_attention_heads": 4, "attention_head_size": 4, "all_head_size": 16},
    },
}
"""What the layer says of itself after half of it went: four heads of eight dimensions before."""


def pruned(task: Task, folder: Path, **given: Any) -> tuple[nn.Module, list[Any], dict[str, Any]]:
    """The pruned model, its edits and the facts."""
    made = prune(at_rest(task, folder), task, folder / "pruned", **{"ratio": 0.5, **given})
    model, edits = torchfile.open_model(made, task)
    return model, edits, dict(made.steps[-1]["facts"])


@pytest.mark.parametrize("attention", ["heads", "dimensions"])
@pytest.mark.parametrize("name", WHERE)
def test_half_of_the_attention_goes(name: str, attention: str, tmp_path: Path) -> None:
    task = task_for(name)
    place, root = WHERE[name]
    model, edits, facts = pruned(task, tmp_path, attention=attention)
    for layer in {place.format(at) for at in (0, 1)}:
        had, has = facts["layers"][f"{layer}.{root}".rstrip(".")]
        assert has == had / 2
        module: Any = model.get_submodule(layer)
        wanted = WRITTEN[name][attention]
        assert {key: getattr(module, key) for key in wanted} == wanted
        inward = [each.in_features for each in module.modules() if isinstance(each, nn.Linear)]
        outward = [each.out_features for each in module.modules() if isinstance(each, nn.Linear)]
        assert {16, 32} >= set(inward)
        assert {16, 32, 48} >= set(outward)
    # Queries that were multiplied stand in the file in float32.
    scaled = any(edit["edit"] == "scale" for edit in edits)
    same(masked(task.model(), edits), model, task, 1e-6 if scaled else 1e-10)
    assert counting.macs(model, task.examples(1)) < FAMILIES[name].macs


@pytest.mark.parametrize("name", ["vit, fused", "multihead attention", "bert"])
def test_heads_go_as_a_whole(name: str, tmp_path: Path) -> None:
    """What stays of queries, keys and values are the same heads, in stretches of eight."""
    _, edits, _ = pruned(task_for(name), tmp_path)
    place, _ = WHERE[name]
    layer = place.format(0)
    stretches = {
        edit["parameter"]: [
            edit["indices"][at : at + 8] for at in range(0, len(edit["indices"]), 8)
        ]
        for edit in edits
        if edit["edit"] == "keep" and edit["parameter"].startswith(layer) and edit["dim"] == 0
    }
    heads = {frozenset(stretch[0] // 8 % 4 for stretch in parts) for parts in stretches.values()}
    assert len(heads) == 1
    assert len(next(iter(heads))) == 2
    for parts in stretches.values():
        assert all(part == list(range(part[0], part[0] + 8)) and part[0] % 8 == 0 for part in parts)


@pytest.mark.parametrize("name", ["vit, fused", "multihead attention"])
def test_the_scale_of_the_scores_stays_that_of_the_dense_model(name: str, tmp_path: Path) -> None:
    """Code that divides by the root of what is left of a head gets its queries multiplied."""
    _, edits, _ = pruned(task_for(name), tmp_path, attention="dimensions")
    scales = [edit["factor"] for edit in edits if edit["edit"] == "scale"]
    assert scales
    assert scales == pytest.approx([0.5**0.5] * len(scales))
    _, edits, _ = pruned(task_for(name), tmp_path, attention="heads")
    assert not any(edit["edit"] == "scale" for edit in edits)


def test_attention_of_pytorch_is_rewritten_only_where_it_is_cut(tmp_path: Path) -> None:
    task = task_for("transformer encoder, norm last")
    keep = ("encoder.layers.1.self_attn*",)
    model, _, facts = pruned(task, tmp_path, keep=keep)
    assert isinstance(model.get_submodule("encoder.layers.0.self_attn"), Attention)
    assert type(model.get_submodule("encoder.layers.1.self_attn")) is nn.MultiheadAttention
    assert facts["left_alone"]["encoder.layers.1.self_attn"] == "asked for with keep"


class Stubborn(nn.Module):
    """Its count of heads stands in the code: a head cannot go, and dimensions can."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.proj, self.head = nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.embed(x))
        b, t, _ = x.shape
        q, k, v = (
            each(x).reshape(b, t, 4, -1).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.head((x + self.proj(mixed.transpose(1, 2).reshape(b, t, -1))).mean(1))


def test_a_count_of_heads_in_the_code_is_named_or_gone_around(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = task_of(Stubborn(), (6, 8))
    dense = task.model()
    model, edits, facts = pruned(task, tmp_path, attention="dimensions")
    assert facts["layers"] == {"q": [32, 16]}
    same(masked(dense, edits), model, task, 1e-6)


class Padded(nn.Module):
    """The encoder as PyTorch builds it by default: where padding comes last, it packs its input."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.embed = nn.Embedding(50, 32)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(32, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        # The first token is always real.
        pad = torch.cat([torch.zeros_like(mask[:, :1]), 1 - mask[:, 1:]], 1).bool()
        return self.head(self.encoder(self.embed(ids), src_key_padding_mask=pad)[:, 0])


PADDED = (Input("ids", (8,), "int64", high=50), Input("mask", (8,), "int64", high=2))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_that_packs_its_input_runs_on_padded_examples(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = task_of(Padded(), inputs=PADDED)
    model, edits, _ = pruned(task, tmp_path)
    ids = torch.randint(50, (3, 8))
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    with torch.inference_mode():
        wanted = masked(task.model(), edits)(ids, mask)
        torch.testing.assert_close(model(ids, mask), wanted, rtol=1e-4, atol=1e-5)
