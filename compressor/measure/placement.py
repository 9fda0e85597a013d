"""Placement: which node of an artifact ran where, for how long, and which Q/DQ pairs did not fuse.

It is read from the runtime's own profile of a few calls, after everything else was measured. On a
GPU the profile times the launch of a kernel, not the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compressor.measure.timed import Timed

MS = 30.0
"""Milliseconds of calls that are profiled, and at least a few calls."""

DEAREST = 10
"""Nodes that are named."""

COMPILE = 300.0
"""Milliseconds of loading above which OpenVINO is not made to compile a file again, which it has to
for its profile: seconds for a large 8-bit one."""

TOLD = ("onnxruntime", "openvino")
"""Runtimes that say which node took how long."""

FLOAT = ("Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm")
"""Operators that have an 8-bit kernel, by the names under which they run in float."""


def placement(run: Timed, path: Path, out: Path) -> dict[str, Any] | None:
    """The ``placement`` field of a measurement, of the ONNX file at ``path`` open in its worker.

    ``None`` where it would take too long or the runtime does not tell. Files are written beside
    ``out``. Raises :class:`WorkerFailed` where the profile cannot be had.
    """
    if run.target.runtime not in TOLD:
        return None
    if run.target.runtime == "openvino" and run.loaded["load_ms"] > COMPILE:
        return None
    answer = run.worker.ask("placement", path=str(path), ms=MS, out=str(out))
    graph = answer["graph"]
    unfused = None if graph is None else unfused_pairs(Path(graph)) if graph else 0
    return audit(answer["kernels"], answer["assigned"], unfused)


def audit(
    kernels: Sequence[Mapping[str, Any]], assigned: Mapping[str, int] | None, unfused: int | None
) -> dict[str, Any]:
    """Counts, shares of time and milliseconds by provider, operator and node.

    ``kernels`` are ``{"name", "op", "provider", "us"}``, the microseconds of each call. A node's
    time is the mean of the faster half of its calls: slower ones were disturbed.
    """
    nodes = [
        {"node": one["name"], "op": one["op"], "provider": one["provider"], "ms": _ms(one["us"])}
        for one in kernels
    ]
    nodes.sort(key=lambda node: (-node["ms"], node["node"]))
    whole = sum(node["ms"] for node in nodes)
    providers, operators = _by(nodes, "provider"), _by(nodes, "op")
    found = {op: len(group) for op, group in operators.items()}
    return {
        "nodes": {name: len(group) for name, group in providers.items()},
        "assigned": None if assigned is None else dict(assigned),
        "share": {name: _sum(group) / whole if whole else 0.0 for name, group in providers.items()},
        "memcpy": found.get("MemcpyFromHost", 0) + found.get("MemcpyToHost", 0),
        "quantize": found.get("QuantizeLinear", 0),
        "dequantize": found.get("DequantizeLinear", 0),
        "unfused": unfused,
        "operators": sorted(
            ({"op": op, "nodes": len(group), "ms": _sum(group)} for op, group in operators.items()),
            key=lambda row: (-float(str(row["ms"])), str(row["op"])),
        ),
        "dearest": nodes[:DEAREST],
    }


def unfused_pairs(path: Path) -> int:
    """Operators of an optimized graph that still run in float between Q/DQ pairs: an operator with
    an 8-bit kernel whose input comes from ``DequantizeLinear``."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    floats = {
        name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output
    }
    return sum(node.op_type in FLOAT and not floats.isdisjoint(node.input) for node in graph.node)


def _ms(us: Sequence[float]) -> float:
    faster = sorted(us)[: (len(us) + 1) // 2]
    return sum(faster) / len(faster) / 1e3


def _by(nodes: Sequence[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for node in nodes:
        groups.setdefault(node[key], []).append(node)
    return groups


def _sum(nodes: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(node["ms"] for node in nodes))
