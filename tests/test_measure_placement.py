"""Which node ran where: counts, shares and Q/DQ pairs that did not fuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, save_model

from compressor.artifact import Artifact
from compressor.measure.placement import DEAREST, audit
from compressor.measure.protocol import observe
from compressor.measurement import Target
from compressor.report import schema

RNG = np.random.default_rng(0)
FEED = (RNG.standard_normal((2, 16), np.float32),)

NODE = st.fixed_dictionaries(
    {
        "name": st.text(max_size=4),
        "op": st.sampled_from(["Conv", "MemcpyToHost", "QuantizeLinear", "DequantizeLinear"]),
        "provider": st.sampled_from(["CPUExecutionProvider", "CUDAExecutionProvider"]),
        "us": st.lists(st.floats(0, 1e6), min_size=1, max_size=7),
    }
)


@given(st.lists(NODE, max_size=15), st.none() | st.integers(0, 9))
def test_an_audit_adds_up(kernels: list[dict[str, Any]], unfused: int | None) -> None:
    found = audit(kernels, {"CPUExecutionProvider": 3}, unfused)
    assert sum(found["nodes"].values()) == len(kernels)
    assert sum(one["nodes"] for one in found["operators"]) == len(kernels)
    total = sum(one["ms"] for one in found["operators"])
    assert sum(found["share"].values()) == pytest.approx(1 if total else 0)
    assert found["memcpy"] == sum(one["op"] == "MemcpyToHost" for one in kernels)
    assert found["quantize"] == sum(one["op"] == "QuantizeLinear" for one in kernels)
    assert len(found["dearest"]) == min(DEAREST, len(kernels))
    for rows in (found["operators"], found["dearest"]):
        assert [one["ms"] for one in rows] == sorted((one["ms"] for one in rows), reverse=True)


def test_disturbed_calls_do_not_count() -> None:
    node = {"name": "a", "op": "Conv", "provider": "CPU", "us": [9000.0, 2.0, 4.0]}
    assert audit([node], None, None)["dearest"][0]["ms"] == pytest.approx(0.003)


def quantized(path: Path, weights: bool) -> Artifact:
    """A MatMul between Q/DQ pairs; where its ``weights`` have none it stays in float."""
    scale, zero = np.float32(0.1), np.uint8(128)
    constants = {
        "s": np.array(scale),
        "z": np.array(zero),
        "ws": np.array(scale),
        "wz": np.array(np.int8(0)),
        "w": RNG.integers(-9, 9, (16, 16)).astype(np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["d", "f"], ["m"], name="product"),
        helper.make_node("QuantizeLinear", ["m", "s", "z"], ["mq"]),
        helper.make_node("DequantizeLinear", ["mq", "s", "z"], ["y"]),
    ]
    if weights:
        nodes.insert(0, helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["f"]))
    else:
        constants["f"] = RNG.standard_normal((16, 16), np.float32)
    used = {name for node in nodes for name in node.input}
    stored = [numpy_helper.from_array(v, k) for k, v in constants.items() if k in used]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 16]) for n in "xy")
    graph = helper.make_graph(nodes, "pairs", [x], [y], stored)
    opset = [helper.make_opsetid("", 17)]
    save_model(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return Artifact.of(path, "onnx")


@pytest.mark.parametrize("weights", [True, False])
def test_pairs_that_do_not_fuse_are_counted(tmp_path: Path, weights: bool) -> None:
    artifact = quantized(tmp_path / "baseline.onnx", weights)
    found = observe([artifact], Target(), FEED, seconds=0).placements["baseline"]
    assert found is not None
    assert found["unfused"] == (0 if weights else 1)
    assert ("QLinearMatMul" in {one["op"] for one in found["operators"]}) is weights
    assert found["assigned"] == {"CPUExecutionProvider": 6 if weights else 5}
    assert found["share"] == {"CPUExecutionProvider": 1}
    assert set(found) == set(schema()["$defs"]["placement"]["required"])


def test_openvino_counts_its_own_nodes(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    artifact = quantized(tmp_path / "baseline.onnx", True)
    found = observe([artifact], Target("openvino"), FEED, seconds=0).placements["baseline"]
    assert found is not None
    assert sum(found["nodes"].values()) == sum(one["nodes"] for one in found["operators"])
    assert found["assigned"] is None
    assert found["unfused"] is None
