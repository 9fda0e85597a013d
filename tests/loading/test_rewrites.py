"""Rewritten layers compute what the original does, for whatever the original can be asked."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name that the field uses)

from compressor.loading.edits import apply
from compressor.loading.rewrites import REWRITES, Attention, suits

BATCH, QUERIES, KEYS, WIDTH, HEADS = 3, 5, 7, 12, 4

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")


def attention(**options: Any) -> nn.MultiheadAttention:
    """With weights and biases that differ everywhere, in float64."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(WIDTH, HEADS, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer.double().eval()


def inputs(
    layer: nn.MultiheadAttention, batched: bool = True, own: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in the layout that the layer wants; ``own``: self-attention."""
    generator = torch.Generator().manual_seed(1)
    lengths = (QUERIES, QUERIES, QUERIES) if own else (QUERIES, KEYS, KEYS)
    sizes = (WIDTH, layer.kdim, layer.vdim)
    parts = [
        torch.randn(BATCH, length, size, generator=generator, dtype=torch.float64)
        for length, size in zip(lengths, sizes, strict=True)
    ]
    if own:
        parts = [parts[0]] * 3
    if not batched:
        parts = [part[0] for part in parts]
    elif not layer.batch_first:
        parts = [part.transpose(0, 1) for part in parts]
    return parts[0], parts[1], parts[2]


def same(layer: nn.MultiheadAttention, given: tuple[Tensor, ...], **options: Any) -> None:
    with torch.inference_mode():
        wanted, wanted_weights = layer(*given, **options)
        got, weights = Attention(layer)(*given, **options)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert (weights is None) == (wanted_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, wanted_weights, rtol=1e-12, atol=1e-12)


def masks(kind: str, seed: int) -> Tensor:
    """``(queries, keys)`` or one for every example and head; every query keeps a key."""
    generator = torch.Generator().manual_seed(seed)
    shape = (QUERIES, KEYS) if kind.endswith("2d") else (BATCH * HEADS, QUERIES, KEYS)
    if kind.startswith("float"):
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) < 0.4
    mask[..., 0] = False
    return mask


def padding(kind: str) -> Tensor:
    """``(batch, keys)``: 0, 2 and 4 keys at the end do not count."""
    mask = torch.arange(KEYS)[None] >= KEYS - torch.tensor([0, 2, 4])[:, None]
    if kind == "bool":
        return mask
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, float("-inf"))


@settings(max_examples=120)
@given(
    batch_first=st.booleans(),
    bias=st.booleans(),
    sizes=st.sampled_from([{}, {"kdim": 8}, {"vdim": 6}, {"kdim": 8, "vdim": 6}]),
    mask=st.sampled_from([None, "bool 2d", "bool 3d", "float 2d", "float 3d"]),
    padded=st.sampled_from([None, "bool", "float"]),
    need_weights=st.booleans(),
    average=st.booleans(),
)
def test_attention_is_what_pytorch_computes(
    batch_first: bool,
    bias: bool,
    sizes: dict[str, int],
    mask: str | None,
    padded: str | None,
    need_weights: bool,
    average: bool,
) -> None:
    layer = attention(batch_first=batch_first, bias=bias, **sizes)
    same(
        layer,
        inputs(layer),
        attn_mask=masks(mask, 2) if mask else None,
        key_padding_mask=padding(padded) if padded else None,
        need_weights=need_weights,
        average_attn_weights=average,
    )


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", [None, "bool 2d", "float 2d"])
@pytest.mark.parametrize("padded", [False, True])
def test_one_example_without_a_batch(
    batch_first: bool, need_weights: bool, mask: str | None, padded: bool
) -> None:
    layer = attention(batch_first=batch_first)
    same(
        layer,
        inputs(layer, batched=False),
        attn_mask=masks(mask, 2) if mask else None,
        key_padding_mask=padding("bool")[1] if padded else None,
        need_weights=need_weights,
    )


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_mask_for_every_head_without_a_batch(batch_first: bool) -> None:
    layer = attention(batch_first=batch_first)
    same(layer, inputs(layer, batched=False), attn_mask=masks("bool 3d", 2)[:HEADS])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_a_causal_mask(batch_first: bool, need_weights: bool) -> None:
    layer = attention(batch_first=batch_first)
    mask = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)
    same(
        layer,
        inputs(layer, own=True),
        attn_mask=mask,
        is_causal=True,
        need_weights=need_weights,
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_it_takes_over_what_the_layer_was(training: bool, frozen: bool) -> None:
    layer = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.25, batch_first=True)
    layer.train(training).requires_grad_(not frozen)
    ours = Attention(layer)
    assert ours.training == training
    assert all(part.training == training for part in ours.modules())
    assert all(each.requires_grad != frozen for each in ours.parameters())
    assert (ours.num_heads, ours.embed_dim, ours.dropout) == (HEADS, WIDTH, 0.25)
    assert ours.batch_first


def test_gradients_are_the_same() -> None:
    layer = attention(batch_first=True)
    ours = Attention(layer)
    given = inputs(layer)
    layer(*given)[0].square().sum().backward()
    ours(*given)[0].square().sum().backward()
    packed = layer.in_proj_weight.grad
    assert packed is not None
    for name, wanted in zip("qkv", packed.chunk(3), strict=True):
        found = ours.get_parameter(f"{name}_proj.weight").grad
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("norm_first", "nested", "padded"),
    [
        (False, False, False),
        (False, False, True),
        (False, True, False),
        (False, True, True),
        (True, False, False),
        (True, False, True),
        (True, True, False),
        (True, True, True),
    ],
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_s_layers_are_rewritten_in_place(
    norm_first: bool, nested: bool, padded: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    edits = [
        {"edit": "rewrite", "module": f"layers.{at}.self_attn", "as": "attention"} for at in (0, 1)
    ]
    rewritten = apply(copy.deepcopy(encoder), edits)
    x = torch.randn(BATCH, KEYS, WIDTH)
    mask = padding("bool") if padded else None
    with torch.inference_mode():
        wanted = encoder(x, src_key_padding_mask=mask)
        got = rewritten(x, src_key_padding_mask=mask)
    # What was padded means nothing: the fused path of the original fills it with zeros.
    real = torch.ones(BATCH, KEYS, dtype=torch.bool) if mask is None else ~mask
    torch.testing.assert_close(got[real], wanted[real], rtol=1e-4, atol=1e-5)


def test_what_it_cannot_stand_for_is_not_suited() -> None:
    class Own(nn.MultiheadAttention):
        pass

    assert suits(nn.MultiheadAttention(WIDTH, HEADS))
    assert not suits(nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True))
    assert not suits(nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True))
    assert not suits(Own(WIDTH, HEADS))
    assert not suits(nn.Linear(WIDTH, WIDTH))
    normed = nn.MultiheadAttention(WIDTH, HEADS)
    nn.utils.parametrizations.weight_norm(normed, "in_proj_weight")
    assert not suits(normed)


# --- views


class Flat(nn.Module):
    """Merges axes to a constant in one of many ways, and reshapes otherwise as well."""

    def __init__(self, way: str, channels: int = 4) -> None:
        super().__init__()
        self.way = way
        self.conv = nn.Conv2d(1, channels, 3, padding=1)
        self.fc = nn.Linear(channels * 4, 3)

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.conv(x))
        y = y.view(-1, y.shape[1], 2, 2)  # merges nothing
        b = y.shape[0]
        flat = {
            "view": lambda: y.view(-1, 16),
            "view of a tuple": lambda: y.view((-1, 16)),
            "view by batch": lambda: y.view(b, 16),
            "reshape": lambda: y.reshape(b, 16),
            "reshape of a list": lambda: y.reshape([b, 16]),
            "function": lambda: torch.reshape(y, (b, 16)),
        }[self.way]()
        return self.fc(flat)


WAYS = (
    "view",
    "view of a tuple",
    "view by batch",
    "reshape",
    "reshape of a list",
    "function",
)
FLATTEN = {"edit": "rewrite", "module": "", "as": "flatten", "size": 16}


@pytest.mark.parametrize("way", WAYS)
def test_a_view_to_a_constant_follows_the_channels(way: str) -> None:
    torch.manual_seed(0)
    dense, small = Flat(way).eval(), Flat(way).eval()
    small.load_state_dict(dense.state_dict())
    narrow = [
        {"edit": "keep", "parameter": "conv.weight", "dim": 0, "indices": [0, 2, 3]},
        {"edit": "keep", "parameter": "conv.bias", "dim": 0, "indices": [0, 2, 3]},
        {
            "edit": "keep",
            "parameter": "fc.weight",
            "dim": 1,
            "indices": [0, 1, 2, 3, *range(8, 16)],
        },
    ]
    apply(small, [FLATTEN])
    x = torch.randn(5, 1, 2, 2)
    assert torch.equal(small(x), dense(x)), "it computes the same before anything is cut"
    apply(small, narrow)
    with torch.no_grad():
        dense.get_parameter("conv.weight")[1], dense.get_parameter("conv.bias")[1] = 0, 0
    for size in (1, 2, 5):
        torch.testing.assert_close(small(x[:size]), dense(x[:size]))


def test_only_the_size_that_was_named_is_rewritten() -> None:
    model = Flat("view").eval()
    apply(model, [{**FLATTEN, "size": 8}])
    assert model(torch.zeros(2, 1, 2, 2)).shape == (2, 3)
    cut = [{"edit": "keep", "parameter": "conv.weight", "dim": 0, "indices": [0]}]
    cut += [{"edit": "keep", "parameter": "conv.bias", "dim": 0, "indices": [0]}]
    with pytest.raises(RuntimeError):
        apply(model, cut)(torch.zeros(3, 1, 2, 2))


def test_two_sizes_of_one_layer() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.view(-1, 16), x[:, :2].reshape(-1, 8)

    model = apply(Two(), [FLATTEN, {**FLATTEN, "size": 8}])
    one, other = model(torch.zeros(3, 5, 2, 2))
    assert (one.shape, other.shape) == ((3, 20), (3, 8))


def test_a_rewritten_model_can_be_copied() -> None:
    torch.manual_seed(0)
    model = apply(Flat("view").eval(), [FLATTEN])
    other = copy.deepcopy(model)
    x = torch.randn(2, 1, 2, 2)
    assert torch.equal(other(x), model(x))
    with torch.no_grad():
        other.get_parameter("fc.bias").add_(1)
    assert not torch.equal(other(x), model(x)), "the copy's forward must read the copy's weights"


def test_the_set_of_rewrites_is_the_documented_one() -> None:
    assert set(REWRITES) == {"attention", "flatten", "fold"}
