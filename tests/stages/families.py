"""The test zoo of pruning: one small model of every family, and what a good pruner does to it.

Parameters and multiply-accumulates are worked by hand: convolutions are ``positions * kernel *
inputs * outputs``, linear layers ``tokens * inputs * outputs``, BatchNorm and LayerNorm have two
parameters a channel and no products.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from standing import settled, task_of
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name that the field uses)
from torch.nn.utils.parametrizations import weight_norm

from compressor import Task, zoo
from compressor.loading.task import tensors
from compressor.task import Input, Kind


@dataclass(frozen=True)
class Family:
    """A model and what pruning at 0.3 and 0.5 owes it.

    ``cut`` are the layers that make channels, heads or hidden units that a good pruner removes (of
    coupled layers the first that runs); ``left`` must keep what they make: output layers, and
    those that cannot be cut soundly. A layer in neither may be cut, if that is sound, or left
    alone. ``params`` and ``macs`` (of one example) are those of the uncut model.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[Input, ...]
    kind: Kind
    cut: tuple[str, ...]
    left: tuple[str, ...]
    params: int
    macs: int

    def build(self) -> nn.Module:
        """The model in eval mode, the same at every call.

        Vectors (biases, scales) move off their constant starts and BatchNorm sees a batch:
        otherwise all channels would be alike there and a cut in the wrong place would not show.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            return settled(model, *(torch.from_numpy(x.synthetic(8, 0)) for x in self.inputs))


# --- parts


def chain(**layers: nn.Module) -> nn.Sequential:
    """Layers by name, one after the other."""
    return nn.Sequential(OrderedDict(layers))


def unit(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU: ``kernel**2 * inputs / groups * outputs + 2 * outputs``."""
    return chain(
        conv=nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        norm=nn.BatchNorm2d(outputs),
        act=nn.ReLU(),
    )


def bare(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """A unit without its ReLU, as before a sum; as many parameters."""
    whole = unit(inputs, outputs, kernel, stride, groups)
    return chain(conv=whole[0], norm=whole[1])


def pooled(inputs: int) -> nn.Sequential:
    """Mean over the image, then ten logits: ``inputs * 10 + 10``."""
    return chain(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(inputs, 10))


# --- convolutions


class ConstantView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = unit(3, 16)
        self.second = unit(16, 32, stride=2)
        self.fc = nn.Linear(512, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.second(self.first(x))
        x = x.view(-1, 512)
        return self.head(F.relu(self.fc(x)))


class ConstantReshape(ConstantView):
    def forward(self, x: Tensor) -> Any:
        b = x.shape[0]
        x = self.second(self.first(x))
        x = x.reshape(b, 512)
        return self.head(F.relu(self.fc(x)))


class Basic(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, padded: bool = False) -> None:
        super().__init__()
        self.first = unit(inputs, outputs, stride=stride)
        self.second = bare(outputs, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = Padded(outputs - inputs) if padded else bare(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class Padded(nn.Module):
    """Every other pixel, and channels of zeros on both sides (option A of the paper)."""

    def __init__(self, more: int) -> None:
        super().__init__()
        self.side = more // 2

    def forward(self, x: Tensor) -> Any:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.side, self.side))


def residual(padded: bool) -> nn.Module:
    return chain(
        stem=unit(3, 16),
        block1=Basic(16, 16),
        block2=Basic(16, 32, 2, padded),
        block3=Basic(32, 32),
        head=pooled(32),
    )


class Inverted(nn.Module):
    """Wide inside, narrow outside, depthwise between (MobileNetV2, Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.expand = unit(inputs, 64, 1)
        self.depthwise = unit(64, 64, stride=stride, groups=64)
        self.project = bare(64, outputs, 1)
        self.adds = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Any:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


class Grouped(nn.Module):
    """Reduce, convolve in four groups, expand (ResNeXt, Xie et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce = unit(32, 32, 1)
        self.grouped = unit(32, 32, groups=4)
        self.expand = bare(32, 32, 1)

    def forward(self, x: Tensor) -> Any:
        return F.relu(x + self.expand(self.grouped(self.reduce(x))))


def dense_layer(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    return chain(
        norm=nn.BatchNorm2d(inputs),
        act=nn.ReLU(),
        conv=nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
    )


class Dense(nn.Module):
    """Every layer reads all before it (DenseNet, Huang et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = dense_layer(16, 16)
        self.layer2 = dense_layer(32, 16)
        self.layer3 = dense_layer(48, 16)
        self.merge = dense_layer(64, 32, 1)
        self.head = pooled(32)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for layer in (self.layer1, self.layer2, self.layer3):
            x = torch.cat([x, layer(x)], 1)
        return self.head(F.relu(self.merge(x)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = unit(3, 16)
        self.down2 = unit(16, 32)
        self.bottom = unit(32, 64)
        self.up2 = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.join2 = unit(64, 32)
        self.up1 = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.join1 = unit(32, 16)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Any:
        fine = self.down1(x)
        coarse = self.down2(F.max_pool2d(fine, 2))
        y = self.bottom(F.max_pool2d(coarse, 2))
        y = self.join2(torch.cat([coarse, self.up2(y)], 1))
        y = self.join1(torch.cat([fine, self.up1(y)], 1))
        return self.head(y)


class Excited(nn.Module):
    """Channels weighed by what the whole image says (Hu et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 32)
        self.squeeze = nn.Conv2d(32, 16, 1)
        self.excite = nn.Conv2d(16, 32, 1)
        self.last = unit(32, 48)
        self.head = pooled(48)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return self.head(self.last(x * torch.sigmoid(gate)))


class ExcitedInChunks(nn.Module):
    """The second layer makes a scale and a bias for every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 32)
        self.squeeze = nn.Linear(32, 16)
        self.excite = nn.Linear(16, 64)
        self.last = unit(32, 48)
        self.head = pooled(48)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        scale, bias = self.excite(F.relu(self.squeeze(x.mean((2, 3))))).chunk(2, dim=1)
        x = x * torch.sigmoid(scale)[:, :, None, None] + bias[:, :, None, None]
        return self.head(self.last(x))


class Gated(nn.Module):
    """One half of the channels gates the other (GLU, Dauphin et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 16)
        self.glu = nn.Conv2d(16, 64, 3, padding=1)
        self.last = unit(32, 48)
        self.head = pooled(48)

    def forward(self, x: Tensor) -> Any:
        a, b = self.glu(self.stem(x)).chunk(2, dim=1)
        return self.head(self.last(a * torch.sigmoid(b)))


class PartWay(nn.Module):
    """Half of the channels take the long way (CSPNet, Wang et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 32)
        self.way1 = unit(16, 32)
        self.way2 = unit(32, 16)
        self.merge = unit(32, 48, 1)
        self.head = pooled(48)

    def forward(self, x: Tensor) -> Any:
        short, long = self.stem(x).chunk(2, dim=1)
        return self.head(self.merge(torch.cat([short, self.way2(self.way1(long))], 1)))


class Shuffled(nn.Module):
    """A unit of ShuffleNet (Zhang et al. 2018): groups that exchange their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = unit(32, 32, 1, groups=4)
        self.depthwise = bare(32, 32, groups=32)
        self.second = bare(32, 32, 1, groups=4)

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        b, c, h, w = y.shape
        y = y.view(b, 4, c // 4, h, w).transpose(1, 2).reshape(b, c, h, w)
        return F.relu(x + self.second(self.depthwise(y)))


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 48)
        self.small = bare(16, 32)
        self.large = bare(32, 32)
        self.last = unit(32, 48)
        self.head = pooled(48)

    def forward(self, x: Tensor) -> Any:
        small, large = torch.split(self.stem(x), [16, 32], dim=1)
        return self.head(self.last(F.relu(self.small(small) + self.large(large))))


class Shared(nn.Module):
    """One convolution, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 16)
        self.shared = nn.Conv2d(16, 16, 3, padding=1)
        self.last = unit(16, 32)
        self.head = pooled(32)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.shared(self.stem(x)))
        return self.head(self.last(F.relu(self.shared(x))))


class SamePadded(nn.Conv2d):
    """Pads by itself, as the convolutions of EfficientNet do."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class SpatialBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = unit(3, 16)
        self.bias = nn.Parameter(torch.randn(1, 1, 8, 8))
        self.second = unit(16, 32)
        self.head = pooled(32)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.second(self.first(x) + self.bias))


class ScaledResidual(nn.Module):
    """A raw parameter scales every channel of a branch (layer scale, Touvron et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 32)
        self.first = unit(32, 48)
        self.second = bare(48, 32)
        self.gamma = nn.Parameter(0.5 + torch.rand(32, 1, 1))
        self.head = pooled(32)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.head(F.relu(x + self.gamma * self.second(self.first(x))))


class ConvNeXt(nn.Module):
    """One block of ConvNeXt (Liu et al. 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 2, stride=2)
        self.depthwise = nn.Conv2d(32, 32, 7, padding=3, groups=32)
        self.norm = nn.LayerNorm(32)
        self.fc1 = nn.Linear(32, 64)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(64, 32)
        self.gamma = nn.Parameter(torch.ones(32))
        self.head = pooled(32)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.gamma * self.fc2(self.act(self.fc1(self.norm(y))))
        return self.head(x + y.permute(0, 3, 1, 2))


class Unlearned(nn.Module):
    """The backbone's forward pass records no gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = chain(first=unit(3, 16), second=unit(16, 32))
        self.head = pooled(32)

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(x)


def frozen() -> nn.Module:
    model = chain(backbone=chain(first=unit(3, 16), second=unit(16, 32)), head=pooled(32))
    model.backbone.requires_grad_(False)
    return model


class BoxesAndClasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 16)
        self.body = unit(16, 32)
        self.fc = nn.Linear(32, 48)
        self.classes = nn.Linear(32, 10)
        self.boxes = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.body(self.stem(x)).mean((2, 3))
        return {"logits": self.classes(x), "boxes": self.boxes(F.relu(self.fc(x)))}


class Scales(nn.Module):
    """Maps of two scales, each with a head of its own; the coarse one is also read by the fine."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 16)
        self.fine = unit(16, 32, stride=2)
        self.coarse = unit(32, 64, stride=2)
        self.lateral = nn.Conv2d(64, 32, 1)
        self.fine_head = nn.Conv2d(32, 6, 1)
        self.coarse_head = nn.Conv2d(64, 6, 1)

    def forward(self, x: Tensor) -> Any:
        fine = self.fine(self.stem(x))
        coarse = self.coarse(fine)
        fine = fine + F.interpolate(self.lateral(coarse), scale_factor=2.0, mode="nearest")
        return [self.fine_head(fine), self.coarse_head(coarse)]


# --- linear layers and sequences


class Tied(nn.Module):
    """Both layers share a weight whose columns are the model's input: its width cannot change."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 20)
        self.second = nn.Linear(20, 20)
        self.second.weight = self.first.weight
        self.third = nn.Linear(20, 48)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.head(F.relu(self.third(x)))


class TiedHead(nn.Module):
    """The output layer is the embedding (Press and Wolf 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Any:
        x = self.embedding(tokens).mean(1)
        return self.head(self.down(F.relu(self.up(x))))


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.fc1 = nn.Linear(32, 48)
        self.fc2 = nn.Linear(48, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, tokens: Tensor) -> Any:
        x = self.embedding(tokens).mean(1)
        return self.head(F.relu(self.fc2(F.relu(self.fc1(x)))))


class LastStep(nn.Module):
    """The head reads the output of the last step; ``width`` is the output's."""

    def __init__(self, rnn: nn.RNNBase, width: int) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.rnn(x)[0][:, -1])


class LastState(LastStep):
    """The head reads the last layer's hidden state."""

    def forward(self, x: Tensor) -> Any:
        _, (hidden, _) = self.rnn(x)
        return self.head(hidden[-1])


class BothStates(LastStep):
    """The head reads the hidden states of both directions side by side."""

    def forward(self, x: Tensor) -> Any:
        _, hidden = self.rnn(x)
        return self.head(torch.cat([hidden[-2], hidden[-1]], 1))


class TimeFirst(LastStep):
    """The recurrent layer wants steps before examples."""

    def forward(self, x: Tensor) -> Any:
        return self.head(self.rnn(x.transpose(0, 1))[0].transpose(0, 1)[:, -1])


class Columns(nn.Module):
    """Columns of convolutional features are the steps of an LSTM (CRNN, Shi et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = unit(3, 16)
        self.second = unit(16, 32, stride=2)
        self.rnn = nn.LSTM(32, 16, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Any:
        steps = self.second(self.first(x)).mean(2).transpose(1, 2)
        return self.head(self.rnn(steps)[0][:, -1])


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.fc1 = nn.Linear(32, 64)
        self.fc2 = nn.Linear(64, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = x + self.fc2(F.relu(self.fc1(x)))
        return self.head(x.mean(1))


class Encoder(nn.Module):
    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.encoder(self.embed(x)).mean(1))


class SeparateAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.scale = self.head_dim**-0.5
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Any:
        b, t, _ = x.shape
        q = self.q(x).reshape(b, t, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x).reshape(b, t, self.heads, self.head_dim).transpose(1, 2)
        v = self.v(x).reshape(b, t, self.heads, self.head_dim).transpose(1, 2)
        weights = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(b, t, self.heads * self.head_dim)
        return self.proj(mixed)


class SeparateBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(32)
        self.attention = SeparateAttention(32, 4)
        self.norm2 = nn.LayerNorm(32)
        self.fc1 = nn.Linear(32, 64)
        self.fc2 = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Any:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class SeparateViT(nn.Module):
    """A vision transformer with a class token and separate queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.position = nn.Parameter(0.1 * torch.randn(1, 17, 32))
        self.blocks = nn.Sequential(SeparateBlock(), SeparateBlock())
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


# --- BERT (Devlin et al. 2018), modules and attributes named as in transformers


class BertEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(50, 32, padding_idx=0)
        self.position_embeddings = nn.Embedding(12, 32)
        self.token_type_embeddings = nn.Embedding(2, 32)
        self.LayerNorm = nn.LayerNorm(32, eps=1e-12)
        self.dropout = nn.Dropout(0.1)
        self.position_ids: Tensor
        self.register_buffer("position_ids", torch.arange(12).expand((1, -1)), persistent=False)

    def forward(self, input_ids: Tensor) -> Any:
        positions = self.position_ids[:, : input_ids.shape[1]]
        x = self.word_embeddings(input_ids)
        x = x + self.token_type_embeddings(torch.zeros_like(input_ids))
        x = x + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(x))


class BertSelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads = 4
        self.attention_head_size = 8
        self.all_head_size = self.num_attention_heads * self.attention_head_size
        self.scaling = self.attention_head_size**-0.5
        self.query = nn.Linear(32, self.all_head_size)
        self.key = nn.Linear(32, self.all_head_size)
        self.value = nn.Linear(32, self.all_head_size)
        self.dropout = nn.Dropout(0.1)

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.num_attention_heads, self.attention_head_size)
        return x.view(*shape).permute(0, 2, 1, 3)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Any:
        query = self.transpose_for_scores(self.query(hidden_states))
        key = self.transpose_for_scores(self.key(hidden_states))
        value = self.transpose_for_scores(self.value(hidden_states))
        scores = torch.matmul(query, key.transpose(-1, -2)) * self.scaling + attention_mask
        weights = self.dropout(F.softmax(scores, dim=-1))
        context = torch.matmul(weights, value).permute(0, 2, 1, 3).contiguous()
        return context.reshape(*context.shape[:-2], self.all_head_size)


class BertSelfOutput(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, 32)
        self.LayerNorm = nn.LayerNorm(32, eps=1e-12)
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Any:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class BertOutput(BertSelfOutput):
    pass


class BertAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self = BertSelfAttention()
        self.output = BertSelfOutput(32)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Any:
        return self.output(self.self(hidden_states, attention_mask), hidden_states)


class BertIntermediate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(32, 64)
        self.intermediate_act_fn = nn.GELU()

    def forward(self, hidden_states: Tensor) -> Any:
        return self.intermediate_act_fn(self.dense(hidden_states))


class BertLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = BertAttention()
        self.intermediate = BertIntermediate()
        self.output = BertOutput(64)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Any:
        attended = self.attention(hidden_states, attention_mask)
        return self.output(self.intermediate(attended), attended)


class BertEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([BertLayer(), BertLayer()])

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Any:
        for layer in self.layer:
            hidden_states = layer(hidden_states, attention_mask)
        return hidden_states


class BertPooler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(32, 32)
        self.activation = nn.Tanh()

    def forward(self, hidden_states: Tensor) -> Any:
        return self.activation(self.dense(hidden_states[:, 0]))


class BertModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings()
        self.encoder = BertEncoder()
        self.pooler = BertPooler()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x = self.embeddings(input_ids)
        hidden = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        return self.pooler(self.encoder(x, hidden))


class BertForSequenceClassification(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bert = BertModel()
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(32, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.classifier(self.dropout(self.bert(input_ids, attention_mask)))


# --- the families

IMAGE = Input("image", (3, 8, 8))
ROW = Input("row", (20,))
STEPS = Input("steps", (6, 8))
WORDS = Input("words", (12,), "int64", high=50)


def recurrent(
    cell: Callable[..., nn.RNNBase],
    gates: int,
    layers: int = 1,
    ways: int = 1,
    reads: type[LastStep] = LastStep,
    **options: Any,
) -> Family:
    """Sixteen hidden units over six steps of eight features."""
    # One direction of one layer: its inputs and its own state to every gate; two biases a gate.
    first, later = gates * 16 * (8 + 16), gates * 16 * (16 * ways + 16)
    weights = ways * (first + (layers - 1) * later)
    biases = ways * layers * gates * 2 * 16

    def make() -> nn.Module:
        given = {"batch_first": True, "bidirectional": ways == 2, **options}
        return reads(cell(8, 16, layers, **given), 16 * ways)

    return Family(
        make,
        (STEPS,),
        "classification",
        cut=("rnn",),
        left=("head",),
        params=weights + biases + 16 * ways * 10 + 10,
        macs=6 * weights + 16 * ways * 10,
    )


def encoder(norm_first: bool) -> Family:
    """Two layers of width 32, four heads, 64 inside, over six tokens."""
    return Family(
        lambda: Encoder(norm_first),
        (STEPS,),
        "classification",
        cut=(
            "encoder.layers.0.self_attn",
            "encoder.layers.0.linear1",
            "encoder.layers.1.self_attn",
            "encoder.layers.1.linear1",
        ),
        left=(
            "embed",
            "encoder.layers.0.self_attn.out_proj",
            "encoder.layers.0.linear2",
            "encoder.layers.1.self_attn.out_proj",
            "encoder.layers.1.linear2",
            "head",
        ),
        params=(8 * 32 + 32)
        # four projections, the feed-forward part, two LayerNorms
        + 2 * (4 * (32 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32) + 2 * 2 * 32)
        + (32 * 10 + 10),
        # scores and their products with the values are 6 x 6 x 32 each
        macs=6 * 8 * 32 + 2 * (6 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 6 * 6 * 32) + 32 * 10,
    )


FAMILIES: dict[str, Family] = {
    "cnn": Family(
        lambda: chain(first=unit(3, 16), second=unit(16, 32, stride=2), head=pooled(32)),
        (IMAGE,),
        "classification",
        cut=("first.conv", "second.conv"),
        left=("head.fc",),
        params=(9 * 3 * 16 + 2 * 16) + (9 * 16 * 32 + 2 * 32) + (32 * 10 + 10),
        macs=64 * 9 * 3 * 16 + 16 * 9 * 16 * 32 + 32 * 10,
    ),
    "constant view": Family(
        ConstantView,
        (IMAGE,),
        "classification",
        cut=("first.conv", "second.conv", "fc"),
        left=("head",),
        params=(9 * 3 * 16 + 2 * 16)
        + (9 * 16 * 32 + 2 * 32)
        + (512 * 64 + 64)
        + (64 * 10 + 10),
        macs=64 * 9 * 3 * 16 + 16 * 9 * 16 * 32 + 512 * 64 + 64 * 10,
    ),
    "constant reshape": Family(
        ConstantReshape,
        (IMAGE,),
        "classification",
        cut=("first.conv", "second.conv", "fc"),
        left=("head",),
        params=(9 * 3 * 16 + 2 * 16)
        + (9 * 16 * 32 + 2 * 32)
        + (512 * 64 + 64)
        + (64 * 10 + 10),
        macs=64 * 9 * 3 * 16 + 16 * 9 * 16 * 32 + 512 * 64 + 64 * 10,
    ),
    "residual": Family(
        lambda: residual(padded=False),
        (IMAGE,),
        "classification",
        cut=(
            "stem.conv",
            "block1.first.conv",
            "block2.first.conv",
            "block2.second.conv",
            "block3.first.conv",
        ),
        left=("head.fc",),
        params=(9 * 3 * 16 + 2 * 16)
        + 2 * (9 * 16 * 16 + 2 * 16)
        + (9 * 16 * 32 + 2 * 32) + (9 * 32 * 32 + 2 * 32) + (16 * 32 + 2 * 32)
        + 2 * (9 * 32 * 32 + 2 * 32)
        + (32 * 10 + 10),
        macs=64 * (9 * 3 * 16 + 2 * 9 * 16 * 16)
        + 16 * (9 * 16 * 32 + 9 * 32 * 32 + 16 * 32 + 2 * 9 * 32 * 32)
        + 32 * 10,
    ),
    # The padded channels have a constant place: those of the sums may be cut around them.
    "residual, padded shortcut": Family(
        lambda: residual(padded=True),
        (IMAGE,),
        "classification",
        cut=("block1.first.conv", "block2.first.conv", "block3.first.conv"),
        left=("head.fc",),
        params=(9 * 3 * 16 + 2 * 16)
        + 2 * (9 * 16 * 16 + 2 * 16)
        + (9 * 16 * 32 + 2 * 32) + (9 * 32 * 32 + 2 * 32)
        + 2 * (9 * 32 * 32 + 2 * 32)
        + (32 * 10 + 10),
        macs=64 * (9 * 3 * 16 + 2 * 9 * 16 * 16)
        + 16 * (9 * 16 * 32 + 3 * 9 * 32 * 32)
        + 32 * 10,
    ),
    "inverted residual": Family(
        lambda: chain(
            stem=unit(3, 16),
            block1=Inverted(16, 16),
            block2=Inverted(16, 32, stride=2),
            last=unit(32, 64, 1),
            head=pooled(64),
        ),
        (IMAGE,),
        "classification",
        cut=(
            "stem.conv",
            "block1.expand.conv",
            "block2.expand.conv",
            "block2.project.conv",
            "last.conv",
        ),
        left=("head.fc",),
        params=(9 * 3 * 16 + 2 * 16)
        + (16 * 64 + 2 * 64) + (9 * 64 + 2 * 64) + (64 * 16 + 2 * 16)
        + (16 * 64 + 2 * 64) + (9 * 64 + 2 * 64) + (64 * 32 + 2 * 32)
        + (32 * 64 + 2 * 64)
        + (64 * 10 + 10),
        macs=64 * (9 * 3 * 16 + 16 * 64 + 9 * 64 + 64 * 16 + 16 * 64)
        + 16 * (9 * 64 + 64 * 32 + 32 * 64)
        + 64 * 10,
    ),
    "depthwise, two each": Family(
        lambda: chain(
            stem=unit(3, 16),
            depthwise=unit(16, 32, groups=16),
            point=unit(32, 32, 1),
            head=pooled(32),
        ),
        (IMAGE,),
        "classification",
        cut=("stem.conv", "point.conv"),
        left=("head.fc",),
        params=(9 * 3 * 16 + 2 * 16) + (9 * 32 + 2 * 32) + (32 * 32 + 2 * 32) + (32 * 10 + 10),
        macs=64 * (9 * 3 * 16 + 9 * 32 + 32 * 32) + 32 * 10,
    ),
    "grouped": Family(
        lambda: chain(stem=unit(3, 32), block=Grouped(), head=pooled(32)),
        (IMAGE,),
        "classification",
        cut=("stem.conv", "block.reduce.conv", "block.grouped.conv"),
        left=("head.fc",),
        params=(9 * 3 * 32 + 2 * 32)
        + (32 * 32 + 2 * 32) + (9 * 8 * 32 + 2 * 32) + (32 * 32 + 2 * 32)
        + (32 * 10 + 10),
        macs=64 * (9 * 3 * 32 + 32 * 32 + 9 * 8 * 32 + 32 * 32) + 32 * 10,
    ),
    "dense": Family(
        Dense,
        (IMAGE,),
        "classification",
        cut=("stem", "layer1.conv", "layer2.conv", "layer3.conv", "merge.conv"),
        left=("head.fc",),
        params=9 * 3 * 16
        + (2 * 16 + 9 * 16 * 16) + (2 * 32 + 9 * 32 * 16) + (2 * 48 + 9 * 48 * 16)
        + (2 * 64 + 64 * 32)
        + (32 * 10 + 10),
        macs=64 * (9 * 3 * 16 + 9 * (16 + 32 + 48) * 16 + 64 * 32) + 32 * 10,
    ),
    "unet": Family(
        UNet,
        (IMAGE,),
        "segmentation",
        cut=(
            "down1.conv",
            "down2.conv",
            "bottom.conv",
            "up2",
            "join2.conv",
            "up1",
            "join1.conv",
        ),
        left=("head",),
        params=(9 * 3 * 16 + 2 * 16) + (9 * 16 * 32 + 2 * 32) + (9 * 32 * 64 + 2 * 64)
        + (4 * 64 * 32 + 32) + (9 * 64 * 32 + 2 * 32)
        + (4 * 32 * 16 + 16) + (9 * 32 * 16 + 2 * 16)
        + (16 * 2 + 2),
        # a transposed convolution works at the positions of its input
        macs=64 * 9 * 3 * 16 + 16 * 9 * 16 * 32 + 4 * 9 * 32 * 64
        + 4 * 4 * 64 * 32 + 16 * 9 * 64 * 32
        + 16 * 4 * 32 * 16 + 64 * 9 * 32 * 16
        + 64 * 16 * 2,
    ),
    "conv1d": Family(
        lambda: chain(
            conv1=nn.Conv1d(4, 16, 5, padding=2),
            norm1=nn.BatchNorm1d(16),
            act1=nn.ReLU(),
            conv2=nn.Conv1d(16, 32, 3, stride=2, padding=1),
            norm2=nn.BatchNorm1d(32),
            act2=nn.ReLU(),
            pool=nn.AdaptiveAvgPool1d(1),
            flat=nn.Flatten(),
            head=nn.Linear(32, 10),
        ),
        (Input("signal", (4, 32)),),
        "classification",
        cut=("conv1", "conv2"),
        left=("head",),
        params=(5 * 4 * 16 + 16 + 2 * 16) + (3 * 16 * 32 + 32 + 2 * 32) + (32 * 10 + 10),
        macs=32 * 5 * 4 * 16 + 16 * 3 * 16 * 32 + 32 * 10,
    ),
    "conv3d": Family(
        lambda: chain(
            conv1=nn.Conv3d(1, 16, 3, padding=1),
            norm1=nn.BatchNorm3d(16),
            act1=nn.ReLU(),
            shrink=nn.MaxPool3d(2),
            conv2=nn.Conv3d(16, 32, 3, padding=1, bias=False),
            norm2=nn.BatchNorm3d(32),
            act2=nn.ReLU(),
            pool=nn.AdaptiveAvgPool3d(1),
            flat=nn.Flatten(),
            head=nn.Linear(32, 10),
        ),
        (Input("volume", (1, 6, 6, 6)),),
        "classification",
        cut=("conv1", "conv2"),
        left=("head",),
        params=(27 * 16 + 16 + 2 * 16) + (27 * 16 * 32 + 2 * 32) + (32 * 10 + 10),
        macs=216 * 27 * 16 + 27 * 27 * 16 * 32 + 32 * 10,
    ),
    "squeeze-excite": Family(
        Excited,
        (IMAGE,),
        "classification",
        cut=("stem.conv", "squeeze", "last.conv"),
        left=("head.fc",),
        params=(9 * 3 * 32 + 2 * 32)
        + (32 * 16 + 16) + (16 * 32 + 32)
        + (9 * 32 * 48 + 2 * 48)
        + (48 * 10 + 10),
        macs=64 * 9 * 3 * 32 + 32 * 16 + 16 * 32 + 64 * 9 * 32 * 48 + 48 * 10,
    ),
    "squeeze-excite, chunks": Family(
        ExcitedInChunks,
        (IMAGE,),
        "classification",
        cut=("stem.conv", "squeeze", "last.conv"),
        left=("head.fc",),
        params=(9 * 3 * 32 + 2 * 32)
        + (32 * 16 + 16) + (16 * 64 + 64)
        + (9 * 32 * 48 + 2 * 48)
        + (48 * 10 + 10),
        macs=64 * 9 * 3 * 32 + 32 * 16 + 16 * 64 + 64 * 9 * 32 * 48 + 48 * 10,
    ),
    "glu": Family(
        Gated,
        (IMAGE,),
        "classification",
        cut=("stem.conv", "glu", "last.conv"),
        left=("head.fc",),
        params=(9 * 3 * 16 + 2 * 16)
        + (9 * 16 * 64 + 64)
        + (9 * 32 * 48 + 2 * 48)
        + (48 * 10 + 10),
        macs=64 * (9 * 3 * 16 + 9 * 16 * 64 + 9 * 32 * 48) + 48 * 10,
    ),
    # The stem's halves are cut where both lose as many.
    "csp": Family(
        PartWay,
        (IMAGE,),
        "classification",
        cut=("stem.conv", "way1.conv", "way2.conv", "merge.conv"),
        left=("head.fc",),
        params=(9 * 3 * 32 + 2 * 32)
        + (9 * 16 * 32 + 2 * 32) + (9 * 32 * 16 + 2 * 16)
        + (32 * 48 + 2 * 48)
        + (48 * 10 + 10),
        macs=64 * (9 * 3 * 32 + 9 * 16 * 32 + 9 * 32 * 16 + 32 * 48) + 48 * 10,
    ),
    # What the shuffle moves is cut right or not at all.
    "channel shuffle": Family(
        lambda: chain(
            stem=unit(3, 16),
            widen=unit(16, 32, 1),
            unit=Shuffled(),
            last=unit(32, 48, 1),
            head=pooled(48),
        ),
        (IMAGE,),
        "classification",
        cut=("stem.conv", "last.conv"),
        left=("head.fc",),
        params=(9 * 3 * 16 + 2 * 16) + (16 * 32 + 2 * 32)
        + (8 * 32 + 2 * 32) + (9 * 32 + 2 * 32) + (8 * 32 + 2 * 32)
        + (32 * 48 + 2 * 48)
        + (48 * 10 + 10),
        macs=64 * (9 * 3 * 16 + 16 * 32 + 8 * 32 + 9 * 32 + 8 * 32 + 32 * 48) + 48 * 10,
    ),
    "mlp, layer norm": Family(
        lambda: chain(
            fc1=nn.Linear(20, 32),
            norm=nn.LayerNorm(32),
            act1=nn.ReLU(),
            fc2=nn.Linear(32, 48),
            act2=nn.ReLU(),
            fc3=nn.Linear(48, 32),
            act3=nn.ReLU(),
            head=nn.Linear(32, 10),
        ),
        (ROW,),
        "classification",
        cut=("fc2", "fc3"),
        left=("fc1", "head"),
        params=(20 * 32 + 32) + 2 * 32 + (32 * 48 + 48) + (48 * 32 + 32) + (32 * 10 + 10),
        macs=20 * 32 + 32 * 48 + 48 * 32 + 32 * 10,
    ),
    "mlp, prelu": Family(
        lambda: chain(
            fc1=nn.Linear(20, 32),
            norm1=nn.BatchNorm1d(32),
            act1=nn.PReLU(32),
            fc2=nn.Linear(32, 48),
            norm2=nn.BatchNorm1d(48),
            act2=nn.PReLU(48),
            head=nn.Linear(48, 10),
        ),
        (ROW,),
        "classification",
        cut=("fc1", "fc2"),
        left=("head",),
        params=(20 * 32 + 32 + 2 * 32 + 32) + (32 * 48 + 48 + 2 * 48 + 48) + (48 * 10 + 10),
        macs=20 * 32 + 32 * 48 + 48 * 10,
    ),
    "lstm": recurrent(nn.LSTM, 4),
    "lstm, two layers": recurrent(nn.LSTM, 4, layers=2),
    "lstm, both ways": recurrent(nn.LSTM, 4, ways=2),
    "lstm, two layers, both ways": recurrent(nn.LSTM, 4, layers=2, ways=2),
    "gru": recurrent(nn.GRU, 3),
    "gru, two layers": recurrent(nn.GRU, 3, layers=2),
    "gru, both ways": recurrent(nn.GRU, 3, ways=2),
    "gru, two layers, both ways": recurrent(nn.GRU, 3, layers=2, ways=2),
    "rnn": recurrent(nn.RNN, 1),
    "rnn, two layers": recurrent(nn.RNN, 1, layers=2),
    "rnn, both ways": recurrent(nn.RNN, 1, ways=2),
    "rnn, two layers, both ways": recurrent(nn.RNN, 1, layers=2, ways=2),
    "relu rnn": recurrent(nn.RNN, 1, nonlinearity="relu"),
    "relu rnn, two layers": recurrent(nn.RNN, 1, layers=2, nonlinearity="relu"),
    "relu rnn, both ways": recurrent(nn.RNN, 1, ways=2, nonlinearity="relu"),
    "relu rnn, two layers, both ways": recurrent(
        nn.RNN, 1, layers=2, ways=2, nonlinearity="relu"
    ),
    "lstm, last state": recurrent(nn.LSTM, 4, reads=LastState),
    "gru, both states": recurrent(nn.GRU, 3, layers=2, ways=2, reads=BothStates),
    "lstm, time first": recurrent(nn.LSTM, 4, reads=TimeFirst, batch_first=False),
    # torch's exporter forgets the projection: onnxruntime refuses even the uncut model.
    "lstm, projected": Family(
        lambda: LastStep(nn.LSTM(8, 32, proj_size=16, batch_first=True), 16),
        (STEPS,),
        "classification",
        cut=("rnn",),
        left=("head",),
        # four gates read the inputs and the projected state, which is 16 of 32
        params=4 * 32 * (8 + 16) + 4 * 2 * 32 + 32 * 16 + (16 * 10 + 10),
        macs=6 * (4 * 32 * (8 + 16) + 32 * 16) + 16 * 10,
    ),
    "cnn, lstm": Family(
        Columns,
        (IMAGE,),
        "classification",
        cut=("first.conv", "second.conv", "rnn"),
        left=("head",),
        params=(9 * 3 * 16 + 2 * 16) + (9 * 16 * 32 + 2 * 32)
        + 4 * (32 * 16 + 16 * 16 + 2 * 16)
        + (16 * 10 + 10),
        macs=64 * 9 * 3 * 16 + 16 * 9 * 16 * 32 + 4 * 4 * (32 * 16 + 16 * 16) + 16 * 10,
    ),
    "multihead attention": Family(
        Attentive,
        (Input("tokens", (6, 32)),),
        "classification",
        cut=("attention", "fc1"),
        left=("attention.out_proj", "fc2", "head"),
        params=4 * (32 * 32 + 32) + 2 * 32
        + (32 * 64 + 64) + (64 * 32 + 32)
        + (32 * 10 + 10),
        macs=6 * 4 * 32 * 32 + 2 * 6 * 6 * 32 + 6 * 2 * 32 * 64 + 32 * 10,
    ),
    "transformer encoder, norm last": encoder(norm_first=False),
    "transformer encoder, norm first": encoder(norm_first=True),
    "vit, fused": Family(
        lambda: zoo.build("vit", {"in_channels": 3, "image_size": 8, "dim": 32, "heads": 4}),
        (IMAGE,),
        "classification",
        cut=("blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.attn.qkv", "blocks.1.mlp.fc1"),
        left=(
            "patch_embed",
            "blocks.0.attn.proj",
            "blocks.0.mlp.fc2",
            "blocks.1.attn.proj",
            "blocks.1.mlp.fc2",
            "head",
        ),
        # 16 tokens of 2 x 2 pixels, a position each
        params=(4 * 3 * 32 + 32) + 16 * 32
        + 2 * (
            2 * 2 * 32
            + (32 * 96 + 96) + (32 * 32 + 32)
            + (32 * 128 + 128) + (128 * 32 + 32)
        )
        + 2 * 32
        + (32 * 10 + 10),
        macs=16 * 4 * 3 * 32
        + 2 * (16 * (32 * 96 + 32 * 32 + 2 * 32 * 128) + 2 * 16 * 16 * 32)
        + 32 * 10,
    ),
    "vit, separate": Family(
        SeparateViT,
        (IMAGE,),
        "classification",
        cut=("blocks.0.attention.q", "blocks.0.fc1", "blocks.1.attention.q", "blocks.1.fc1"),
        left=(
            "patch",
            "blocks.0.attention.proj",
            "blocks.0.fc2",
            "blocks.1.attention.proj",
            "blocks.1.fc2",
            "head",
        ),
        # 16 patches and the class token
        params=(4 * 3 * 32 + 32) + 32 + 17 * 32
        + 2 * (2 * 2 * 32 + 4 * (32 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32))
        + 2 * 32
        + (32 * 10 + 10),
        macs=16 * 4 * 3 * 32
        + 2 * (17 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 17 * 17 * 32)
        + 32 * 10,
    ),
    "bert": Family(
        BertForSequenceClassification,
        (
            Input("input_ids", (8,), "int64", high=50),
            Input("attention_mask", (8,), "int64", high=2),
        ),
        "classification",
        cut=(
            "bert.encoder.layer.0.attention.self.query",
            "bert.encoder.layer.0.intermediate.dense",
            "bert.encoder.layer.1.attention.self.query",
            "bert.encoder.layer.1.intermediate.dense",
            "bert.pooler.dense",
        ),
        left=(
            "bert.embeddings.word_embeddings",
            "bert.embeddings.position_embeddings",
            "bert.embeddings.token_type_embeddings",
            "bert.encoder.layer.0.attention.output.dense",
            "bert.encoder.layer.0.output.dense",
            "bert.encoder.layer.1.attention.output.dense",
            "bert.encoder.layer.1.output.dense",
            "classifier",
        ),
        params=(50 + 12 + 2) * 32 + 2 * 32
        + 2 * (4 * (32 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32) + 2 * 2 * 32)
        + (32 * 32 + 32)
        + (32 * 3 + 3),
        # eight tokens; the pooler and the classifier read the first
        macs=2 * (8 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 8 * 8 * 32) + 32 * 32 + 32 * 3,
    ),
    "text": Family(
        Text,
        (WORDS,),
        "classification",
        cut=("embedding", "fc1", "fc2"),
        left=("head",),
        params=50 * 32 + (32 * 48 + 48) + (48 * 32 + 32) + (32 * 10 + 10),
        macs=32 * 48 + 48 * 32 + 32 * 10,
    ),
    # GroupNorm's channels may go by whole groups of four, or stay.
    "group norm": Family(
        lambda: chain(
            first=nn.Conv2d(3, 16, 3, padding=1),
            norm=nn.GroupNorm(4, 16),
            act=nn.ReLU(),
            second=unit(16, 32),
            head=pooled(32),
        ),
        (IMAGE,),
        "classification",
        cut=("second.conv",),
        left=("head.fc",),
        params=(9 * 3 * 16 + 16) + 2 * 16 + (9 * 16 * 32 + 2 * 32) + (32 * 10 + 10),
        macs=64 * (9 * 3 * 16 + 9 * 16 * 32) + 32 * 10,
    ),
    "instance norm": Family(
        lambda: chain(
            first=nn.Conv2d(3, 16, 3, padding=1),
            norm1=nn.InstanceNorm2d(16, affine=True),
            act1=nn.ReLU(),
            second=nn.Conv2d(16, 32, 3, padding=1),
            norm2=nn.InstanceNorm2d(32),
            act2=nn.ReLU(),
            head=pooled(32),
        ),
        (IMAGE,),
        "classification",
        cut=("first", "second"),
        left=("head.fc",),
        # the second norm has no parameters
        params=(9 * 3 * 16 + 16) + 2 * 16 + (9 * 16 * 32 + 32) + (32 * 10 + 10),
        macs=64 * (9 * 3 * 16 + 9 * 16 * 32) + 32 * 10,
    ),
    "convnext": Family(
        ConvNeXt,
        (IMAGE,),
        "classification",
        cut=("fc1",),
        left=("stem", "depthwise", "fc2", "head.fc"),
        params=(4 * 3 * 32 + 32)
        + (49 * 32 + 32) + 2 * 32 + (32 * 64 + 64) + (64 * 32 + 32) + 32
        + (32 * 10 + 10),
        macs=16 * (4 * 3 * 32 + 49 * 32 + 2 * 32 * 64) + 32 * 10,
    ),
    "layer scale": Family(
        ScaledResidual,
        (IMAGE,),
        "classification",
        cut=("stem.conv", "first.conv"),
        left=("head.fc",),
        params=(9 * 3 * 32 + 2 * 32)
        + (9 * 32 * 48 + 2 * 48) + (9 * 48 * 32 + 2 * 32) + 32
        + (32 * 10 + 10),
        macs=64 * (9 * 3 * 32 + 9 * 32 * 48 + 9 * 48 * 32) + 32 * 10,
    ),
    "spatial bias": Family(
        SpatialBias,
        (IMAGE,),
        "classification",
        cut=("first.conv", "second.conv"),
        left=("head.fc",),
        params=(9 * 3 * 16 + 2 * 16) + 8 * 8 + (9 * 16 * 32 + 2 * 32) + (32 * 10 + 10),
        macs=64 * (9 * 3 * 16 + 9 * 16 * 32) + 32 * 10,
    ),
    "frozen backbone": Family(
        frozen,
        (IMAGE,),
        "classification",
        cut=("backbone.first.conv", "backbone.second.conv"),
        left=("head.fc",),
        params=(9 * 3 * 16 + 2 * 16) + (9 * 16 * 32 + 2 * 32) + (32 * 10 + 10),
        macs=64 * (9 * 3 * 16 + 9 * 16 * 32) + 32 * 10,
    ),
    "no gradients": Family(
        Unlearned,
        (IMAGE,),
        "classification",
        cut=("backbone.first.conv", "backbone.second.conv"),
        left=("head.fc",),
        params=(9 * 3 * 16 + 2 * 16) + (9 * 16 * 32 + 2 * 32) + (32 * 10 + 10),
        macs=64 * (9 * 3 * 16 + 9 * 16 * 32) + 32 * 10,
    ),
    "tied": Family(
        Tied,
        (ROW,),
        "classification",
        cut=("third",),
        left=("first", "second", "head"),
        # the shared weight counts once and works twice
        params=(20 * 20 + 20 + 20) + (20 * 48 + 48) + (48 * 10 + 10),
        macs=2 * 20 * 20 + 20 * 48 + 48 * 10,
    ),
    "tied head": Family(
        TiedHead,
        (WORDS,),
        "classification",
        cut=("up",),
        left=("head",),
        params=50 * 32 + (32 * 64 + 64) + (64 * 32 + 32),
        macs=32 * 64 + 64 * 32 + 32 * 50,
    ),
    "many heads": Family(
        BoxesAndClasses,
        (IMAGE,),
        "classification",
        cut=("stem.conv", "body.conv", "fc"),
        left=("classes", "boxes"),
        params=(9 * 3 * 16 + 2 * 16) + (9 * 16 * 32 + 2 * 32)
        + (32 * 48 + 48)
        + (32 * 10 + 10) + (48 * 4 + 4),
        macs=64 * (9 * 3 * 16 + 9 * 16 * 32) + 32 * 48 + 32 * 10 + 48 * 4,
    ),
    "many scales": Family(
        Scales,
        (IMAGE,),
        "regression",
        cut=("stem.conv", "fine.conv", "coarse.conv"),
        left=("fine_head", "coarse_head"),
        params=(9 * 3 * 16 + 2 * 16) + (9 * 16 * 32 + 2 * 32) + (9 * 32 * 64 + 2 * 64)
        + (64 * 32 + 32)
        + (32 * 6 + 6) + (64 * 6 + 6),
        # 8 x 8, then 4 x 4, then 2 x 2
        macs=64 * 9 * 3 * 16
        + 16 * (9 * 16 * 32 + 32 * 6)
        + 4 * (9 * 32 * 64 + 64 * 32 + 64 * 6),
    ),
    "segmentation": Family(
        lambda: chain(
            first=unit(3, 16),
            second=unit(16, 32, stride=2),
            larger=nn.Upsample(scale_factor=2.0, mode="nearest"),
            third=unit(32, 16),
            head=nn.Conv2d(16, 3, 1),
        ),
        (IMAGE,),
        "segmentation",
        cut=("first.conv", "second.conv", "third.conv"),
        left=("head",),
        params=(9 * 3 * 16 + 2 * 16) + (9 * 16 * 32 + 2 * 32) + (9 * 32 * 16 + 2 * 16)
        + (16 * 3 + 3),
        macs=64 * 9 * 3 * 16 + 16 * 9 * 16 * 32 + 64 * 9 * 32 * 16 + 64 * 16 * 3,
    ),
    "regression": Family(
        lambda: chain(
            fc1=nn.Linear(20, 32),
            act1=nn.ReLU(),
            fc2=nn.Linear(32, 48),
            act2=nn.Tanh(),
            head=nn.Linear(48, 1),
        ),
        (ROW,),
        "regression",
        cut=("fc1", "fc2"),
        left=("head",),
        params=(20 * 32 + 32) + (32 * 48 + 48) + (48 * 1 + 1),
        macs=20 * 32 + 32 * 48 + 48 * 1,
    ),
    # What goes round through the shared layer may be cut if all of it is.
    "shared": Family(
        Shared,
        (IMAGE,),
        "classification",
        cut=("last.conv",),
        left=("head.fc",),
        params=(9 * 3 * 16 + 2 * 16) + (9 * 16 * 16 + 16) + (9 * 16 * 32 + 2 * 32)
        + (32 * 10 + 10),
        macs=64 * (9 * 3 * 16 + 2 * 9 * 16 * 16 + 9 * 16 * 32) + 32 * 10,
    ),
    # The sizes of the parts stand in the code: the stem is cut only by a pruner that mends them.
    "split": Family(
        Split,
        (IMAGE,),
        "classification",
        cut=("small.conv", "last.conv"),
        left=("head.fc",),
        params=(9 * 3 * 48 + 2 * 48)
        + (9 * 16 * 32 + 2 * 32) + (9 * 32 * 32 + 2 * 32)
        + (9 * 32 * 48 + 2 * 48)
        + (48 * 10 + 10),
        macs=64 * (9 * 3 * 48 + 9 * 16 * 32 + 9 * 32 * 32 + 9 * 32 * 48) + 48 * 10,
    ),
    "transposed, depthwise": Family(
        lambda: chain(
            stem=unit(3, 32),
            up=nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1, groups=32),
            last=unit(32, 48),
            head=nn.Conv2d(48, 2, 1),
        ),
        (IMAGE,),
        "segmentation",
        cut=("stem.conv", "last.conv"),
        left=("head",),
        params=(9 * 3 * 32 + 2 * 32) + (16 * 32 + 32) + (9 * 32 * 48 + 2 * 48) + (48 * 2 + 2),
        # 8 x 8 before and 16 x 16 after
        macs=64 * (9 * 3 * 32 + 16 * 32) + 256 * (9 * 32 * 48 + 48 * 2),
    ),
    "transposed, grouped": Family(
        lambda: chain(
            stem=unit(3, 32),
            up=nn.ConvTranspose2d(32, 64, 2, stride=2, groups=4),
            act=nn.ReLU(),
            last=unit(64, 16),
            head=nn.Conv2d(16, 2, 1),
        ),
        (IMAGE,),
        "segmentation",
        cut=("stem.conv", "up", "last.conv"),
        left=("head",),
        # every input channel reaches 16 outputs
        params=(9 * 3 * 32 + 2 * 32) + (4 * 32 * 16 + 64) + (9 * 64 * 16 + 2 * 16) + (16 * 2 + 2),
        macs=64 * (9 * 3 * 32 + 4 * 32 * 16) + 256 * (9 * 64 * 16 + 16 * 2),
    ),
    "subclass": Family(
        lambda: chain(
            first=SamePadded(3, 16, 3),
            act1=nn.ReLU(),
            second=SamePadded(16, 32, 3, bias=False),
            norm=nn.BatchNorm2d(32),
            act2=nn.ReLU(),
            head=pooled(32),
        ),
        (IMAGE,),
        "classification",
        cut=("first", "second"),
        left=("head.fc",),
        params=(9 * 3 * 16 + 16) + (9 * 16 * 32 + 2 * 32) + (32 * 10 + 10),
        macs=64 * (9 * 3 * 16 + 9 * 16 * 32) + 32 * 10,
    ),
    # A cut input would change the norm that its weight is divided by.
    "weight norm": Family(
        lambda: chain(
            stem=unit(3, 16),
            normed=weight_norm(nn.Conv2d(16, 32, 3, padding=1)),
            act=nn.ReLU(),
            third=unit(32, 48),
            head=pooled(48),
        ),
        (IMAGE,),
        "classification",
        cut=("third.conv",),
        left=("head.fc",),
        # a length and a direction for every output
        params=(9 * 3 * 16 + 2 * 16) + (32 + 9 * 16 * 32 + 32) + (9 * 32 * 48 + 2 * 48)
        + (48 * 10 + 10),
        macs=64 * (9 * 3 * 16 + 9 * 16 * 32 + 9 * 32 * 48) + 48 * 10,
    ),
}  # fmt: skip
"""By name; see :class:`Family`."""


def task_for(name: str) -> Task:
    """A task around the family's model, without data."""
    family = FAMILIES[name]
    shapes = [given.shape for given in family.inputs]
    made: Task = task_of(family.build(), *shapes, kind=family.kind, inputs=family.inputs)
    return made


# --- what holds of every cut


def masked(dense: nn.Module, edits: Iterable[Mapping[str, Any]]) -> nn.Module:
    """A copy of the model as its factory builds it, with what the edits remove set to zero.

    Written without the engine's own proof. Nothing is rewritten: of attention, queries, keys and
    values stand in thirds of one weight here.
    """
    model = copy.deepcopy(dense)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for edit in edits:
        if edit["edit"] != "keep":
            continue
        tensor = named.get(edit["parameter"])
        if tensor is None:
            layer, projection, kind = edit["parameter"].rsplit(".", 2)
            third = "qkv".index(projection.removesuffix("_proj"))
            tensor = named[f"{layer}.in_proj_{kind}"].data.chunk(3)[third]
        gone = sorted(set(range(tensor.shape[edit["dim"]])) - set(edit["indices"]))
        tensor.data.index_fill_(edit["dim"], torch.tensor(gone, dtype=torch.long), 0)
    return model


def exact(model: nn.Module, task: Task, size: int) -> list[Tensor]:
    """All outputs in float64, for ``size`` examples."""
    given = [torch.from_numpy(part) for part in task.examples(size)]
    given = [part.double() if part.is_floating_point() else part for part in given]
    with torch.inference_mode():
        return tensors(copy.deepcopy(model).double().eval()(*given))


def same(wanted: nn.Module, got: nn.Module, task: Task, tolerance: float = 1e-10) -> None:
    """Both models compute the same in float64, at batch 1, 2 and 7."""
    for size in (1, 2, 7):
        for ours, theirs in zip(exact(got, task, size), exact(wanted, task, size), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
