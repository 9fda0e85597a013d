"""A small vision transformer (Dosovitskiy et al. 2020), its modules named as in timm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name that the field uses)

from compressor.errors import InputError
from compressor.zoo.argument import Size


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values.

    The width of a head follows from ``qkv``, so that ``num_heads`` is all there is to change when
    heads are cut.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        y: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return y


class FeedForward(nn.Module):
    """Two linear layers with GELU between, applied to every token."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class Block(nn.Module):
    """Attention and feed-forward, each behind a normalisation and beside a shortcut (pre-norm)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class VisionTransformer(nn.Module):
    """Patches to tokens, a learned position each, blocks, the mean token to the head."""

    def __init__(
        self,
        in_channels: int,
        grid: int,
        patch: int,
        classes: int,
        dim: int,
        depth: int,
        heads: int,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(in_channels, dim, patch, stride=patch)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, grid * grid, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


def vit(
    in_channels: Size = 1,
    image_size: Size = 28,
    classes: Size = 10,
    patch_size: Size | None = None,
    dim: Size = 64,
    depth: Size = 2,
    heads: Size = 4,
) -> nn.Module:
    """Vision transformer.

    float32 ``(batch, in_channels, image_size, image_size)`` to logits ``(batch, classes)``.
    ``patch_size`` divides ``image_size``; by default it is the smallest that leaves at most 7x7
    patches, as ViT-B/32 has: 2 for 8 pixels, 4 for 28, 32 for 224.
    """
    if patch_size is None:
        patch_size = image_size // max(side for side in range(1, 8) if image_size % side == 0)
    if image_size % patch_size:
        raise InputError(f"zoo model 'vit': patch_size {patch_size} does not divide {image_size}")
    if dim % heads:
        raise InputError(f"zoo model 'vit': dim {dim} is not a multiple of heads {heads}")
    grid = image_size // patch_size
    return VisionTransformer(in_channels, grid, patch_size, classes, dim, depth, heads)
