"""Pickled models: PyTorch's own layers load without trust, and nothing in a file is ever called."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compressor.errors import InputError
from compressor.loading import embedded, listed, pickled
from compressor.loading.torchfile import load_state


def model() -> nn.Module:
    torch.manual_seed(0)
    act = nn.ReLU(inplace=True)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
    made = nn.Sequential(
        OrderedDict(
            conv=nn.Conv1d(3, 8, 3, padding="same", bias=False),
            norm=nn.BatchNorm1d(8),
            act=act,
            again=nn.Sequential(nn.Dropout(0.2), act),
            turn=nn.Flatten(2),
            encoder=nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False),
            last=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=torch.relu),
            head=nn.Linear(8, 4, dtype=torch.float32),
        )
    )
    made.norm.running_mean.uniform_()
    made.conv.weight.requires_grad_(False)
    return made.eval()


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(3))


def rebuilt(path: Path) -> nn.Module:
    description, state = pickled.read(path)
    return load_state(embedded.build(description), state, path)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save(model(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"_use_new_zipfile_serialization": False},
        {"pickle_protocol": 4},
        {"pickle_protocol": 5},
    ],
    ids=["zip", "legacy", "protocol-4", "protocol-5"],
)
def test_a_model_of_known_layers_loads_without_trust(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    path = tmp_path / "model.pt"
    with warnings.catch_warnings(action="ignore"):
        torch.save(model(), path, **options)
    found = rebuilt(path)
    assert embedded.describe(found) == embedded.describe(model())
    assert not found.conv.weight.requires_grad
    assert not found.training
    with torch.no_grad():
        assert torch.equal(found(X), model()(X))
    assert found.act is found.again[1]


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_a_checkpoint_may_hold_the_model(tmp_path: Path, key: str) -> None:
    torch.save({"epoch": 3, key: model()}, tmp_path / "last.pt")
    assert torch.equal(rebuilt(tmp_path / "last.pt")(X), model()(X))


def test_a_model_of_an_older_pytorch_has_fewer_attributes(tmp_path: Path) -> None:
    old = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Conv2d(1, 1, 3))
    del old[0].norm_first, old[0].activation_relu_or_gelu, old[0].self_attn.batch_first
    del old[1]._reversed_padding_repeated_twice, old[1]._backward_pre_hooks
    torch.save(old, tmp_path / "old.pt")
    description, _ = pickled.read(tmp_path / "old.pt")
    assert description["modules"]["0"]["arguments"] == {"activation": "relu"}
    assert rebuilt(tmp_path / "old.pt")[0].norm_first is False


class Stranger(nn.Module):
    """A class that no file may bring along."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)


class Evil:
    """Whatever it is unpickled with runs."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> Any:
        return self.call, self.args


def test_foreign_classes_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(nn.Sequential(nn.Linear(2, 2), Stranger()), path)
    name = f"{Stranger.__module__}.Stranger"
    with pytest.raises(InputError, match=rf"{name}: add --trust-pickle") as caught:
        pickled.read(path)
    assert "torch.nn" not in str(caught.value)
    assert name in listed.read(path)[0]["classes"]
    assert "torch.nn.modules.linear.Linear" in listed.read(path)[0]["classes"]


def evil_attribute(module: nn.Module, mark: Path) -> None:
    module[0].note = Evil(os.mkdir, str(mark))


def evil_weight(module: nn.Module, mark: Path) -> None:
    module[0]._buffers["running"] = Evil(os.mkdir, str(mark))


def evil_eval(module: nn.Module, mark: Path) -> None:
    module[0].note = Evil(eval, f"__import__('os').mkdir({str(mark)!r})")


@pytest.mark.parametrize("damage", [evil_attribute, evil_weight, evil_eval])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_nothing_in_a_file_is_called(
    tmp_path: Path, damage: Callable[[nn.Module, Path], None], new: bool
) -> None:
    mark, path = tmp_path / "mark", tmp_path / "model.pt"
    module = nn.Sequential(nn.Linear(2, 2))
    damage(module, mark)
    torch.save(module, path, _use_new_zipfile_serialization=new)
    with pytest.raises(InputError, match="classes that are code"):
        pickled.read(path)
    assert listed.read(path)[0]["classes"]
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # the file does what it was made for, elsewhere


def overridden(module: nn.Module) -> None:
    module[0].forward = 3


def method(module: nn.Module) -> None:
    module[0].__dict__["extra_repr"] = "x"


def hook(module: nn.Module) -> None:
    module[0]._forward_hooks[0] = 3


def size(module: nn.Module) -> None:
    module[0].in_features = 2**63


def nested(module: nn.Module) -> None:
    module._modules["0"] = module


def text(module: nn.Module) -> None:
    module[0]._parameters["weight"] = "x"


def list_of_layers(module: nn.Module) -> None:
    module._modules = [1]


def bomb(module: nn.Module) -> None:
    value: Any = "x"
    for _ in range(60):
        value = [value] * 10
    module[0].in_features = value


def doubled(module: nn.Module) -> None:
    part: nn.Module = nn.ReLU()
    for _ in range(40):
        part = nn.Sequential(part, part)
    module.append(part)


def deep(module: nn.Module) -> None:
    part: nn.Module = nn.ReLU()
    for _ in range(100):
        part = nn.Sequential(part)
    module.append(part)


def repeated(module: nn.Module) -> None:
    module[0].weight = nn.Parameter(torch.zeros(1).expand(2**20, 2**20))


def overlapping(module: nn.Module) -> None:
    module[0].weight = nn.Parameter(torch.zeros(400).as_strided((200, 200), (1, 1)))


@pytest.mark.parametrize(
    "damage",
    [overridden, method, hook, size, nested, text, list_of_layers, bomb, doubled, deep, repeated,
     overlapping],
)  # fmt: skip
def test_an_injected_attribute_is_one_line_in_little_memory(
    tmp_path: Path, damage: Callable[[nn.Module], None]
) -> None:
    path = tmp_path / "model.pt"
    module = nn.Sequential(nn.Linear(2, 2))
    damage(module)
    torch.save(module, path)
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught:
            pickled.read(path)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_tensor_that_many_layers_share_is_bounded(tmp_path: Path) -> None:
    """Each layer would get memory of its own for the same stored numbers."""
    path = tmp_path / "model.pt"
    shared = torch.zeros(100, 100)
    torch.save(nn.Sequential(*(_of(shared[:, :]) for _ in range(500))), path)
    with pytest.raises(InputError, match="more than the file holds"):
        pickled.read(path)


def _of(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(100, 100, bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer


STORED = pickle.dumps(1, protocol=2)


def packed(path: Path, instructions: bytes, how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", how) as file:
        file.writestr("model/data.pkl", instructions)
        file.writestr("model/data/0", bytes(16))
    return path


def asked(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


STORAGE = (
    b"(X\x07\x00\x00\x00storage" + asked("torch", "FloatStorage") + b"X\x01\x00\x00\x000"
    b"X\x03\x00\x00\x00cpuK\x04tQ"
)


def tensor(offset: bytes, sizes: bytes, strides: bytes) -> bytes:
    rebuild = asked("torch._utils", "_rebuild_tensor_v2")
    return b"\x80\x02" + rebuild + b"(" + STORAGE + offset + sizes + strides + b"\x89}tR."


@pytest.mark.parametrize(
    "instructions",
    [
        tensor(b"K\x00", b"K\x05\x85", b"K\x01\x85"),
        tensor(b"K\x03", b"K\x02\x85", b"K\x01\x85"),
        tensor(b"J\xff\xff\xff\xff", b"K\x02\x85", b"K\x01\x85"),
        tensor(b"K\x00", b"J\xff\xff\xff\xff\x85", b"K\x01\x85"),
        tensor(b"K\x00", b"K\x02K\x02\x86", b"K\x01\x85"),
        tensor(b"K\x00", b"\x8a\x09" + (2**63).to_bytes(9, "little") + b"\x85", b"K\x00\x85"),
        tensor(b"K\x00", b"K\x00\x8a\x07" + (2**50).to_bytes(7, "little") + b"\x86", b"))\x86"),
        b"\x80\x02" + b"]" * 100 + b".",
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x02K\x01)R.",
        b"\x80\x02K\x01K\x02b.",
        b"\x80\x02(i__main__\nEvil\n.",
        b"\x80\x02h\x07.",
        b"\x80\x02",
        b".",
        b"",
        b"\x80\x02" + asked("torch.nn.modules.linear", "Linear") + b")\x81K\x01b.",
        b"\x80\x02" + asked("torch.nn.modules.linear", "Linear") + b")\x81}b.",
        b"\x80\x02" + asked("torch.nn.modules.linear", "Linear") + b"}X\x01\x00\x00\x00aK\x01sb.",
    ],
    ids=range(19),
)  # fmt: skip
def test_malformed_instructions_are_one_line(tmp_path: Path, instructions: bytes) -> None:
    with pytest.raises(InputError) as caught:
        pickled.read(packed(tmp_path / "model.pt", instructions))
    assert "\n" not in str(caught.value)
    listed.read(tmp_path / "model.pt")


def test_compressed_entries_are_never_unpacked(tmp_path: Path) -> None:
    path = packed(tmp_path / "model.pt", bytes(200_000_000), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1_000_000
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="compressed"):
            pickled.read(path)
        with pytest.raises(InputError, match="compressed"):
            listed.read(path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "names", [("m/a", "m/a"), ("m/../a",), ("/m/a",), ("a",), ("m/a", "n/a"), ("m\\a/b",)], ids=str
)
def test_unsafe_names_in_an_archive_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    path = tmp_path / "model.pt"
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, STORED)
    with pytest.raises(InputError, match="not as PyTorch saves"):
        pickled.read(path)


def test_a_flipped_bit_in_the_weights_is_found(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as file:
        at = file.getinfo(next(name for name in file.namelist() if name.endswith("/data/3")))
    start = at.header_offset
    name, extra = struct.unpack("<HH", data[start + 26 : start + 30])
    data[start + 30 + name + extra] ^= 4
    saved.write_bytes(data)
    with pytest.raises(InputError):
        pickled.read(saved)


@cache
def older() -> bytes:
    """A file of the older form, which names storages by addresses: made once, it stays the same."""
    whole = io.BytesIO()
    torch.save(
        nn.Sequential(nn.Linear(2, 2), nn.ReLU()), whole, _use_new_zipfile_serialization=False
    )
    return whole.getvalue()


@settings(max_examples=40)
@given(st.data())
def test_a_damaged_file_gives_a_model_or_an_input_error(data: st.DataObject) -> None:
    import tempfile

    broken = bytearray(older())
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        path.write_bytes(broken[: data.draw(st.integers(1, len(broken)))])
        with contextlib.suppress(InputError):
            description, _ = pickled.read(path)
            embedded.describe(embedded.build(description))


def test_a_file_without_a_model_says_so(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state.pt")
    with pytest.raises(InputError, match="not a whole model"):
        pickled.read(tmp_path / "state.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(InputError, match="not a PyTorch checkpoint"):
        pickled.read(tmp_path / "text.pt")


def test_a_big_endian_file_is_refused(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(other, "w") as new:
        for entry in old.infolist():
            data = b"big" if entry.filename.endswith("byteorder") else old.read(entry)
            new.writestr(entry.filename, data)
    with pytest.raises(InputError, match="big-endian"):
        pickled.read(other)


def test_trust_unpickles_what_reading_refuses(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"model": nn.Sequential(Stranger()), "epoch": 1}, path)
    with pytest.raises(InputError):
        pickled.read(path)
    found = pickled.trusted(path)
    assert type(found[0]) is Stranger
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="not a whole model"):
        pickled.trusted(path)
    path.write_bytes(struct.pack("<q", 7))
    with pytest.raises(InputError, match="does not unpickle"):
        pickled.trusted(path)


def test_a_torchscript_program_needs_trust(tmp_path: Path) -> None:
    path = tmp_path / "scripted.pt"
    layer = nn.Linear(3, 2)
    with warnings.catch_warnings(action="ignore"):
        torch.jit.trace(layer, torch.zeros(1, 3)).save(str(path))
    with pytest.raises(InputError, match="TorchScript program, which is code: add --trust-pickle"):
        pickled.read(path)
    # The name is mangled where the process has scripted another Linear before.
    asked = listed.read(path)[0]["classes"]
    assert any(name.startswith("__torch__.torch.nn.modules.linear.") for name in asked)
    x = torch.ones(2, 3)
    assert np.array_equal(pickled.trusted(path)(x).detach(), layer(x).detach())
