"""Collectives: NCCL, the all-reduce kernels of serving frameworks, expert dispatch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from simulator.kernel_time.collective import CUSTOM, LIBRARY
from simulator.kernel_time.model import Conditions
from validate.adapters.part import Part, framework, part, uncounted
from validate.measurement import Measurement
from workloads.ops.collective_transfer import CollectiveTransfer

RENAMED: Final = {"moe_dispatch_fp8": "all_to_all", "moe_combine_bf16": "all_to_all",
                  "broadcast": ""}  # fmt: skip


def collective(row: Measurement) -> tuple[Part, ...]:
    """One collective; the host-side libraries of DeepBench's MPI runs are no GPU kernels."""
    pieces = row.source.split("/")
    kind = RENAMED.get(row.op, row.op)
    if not kind:
        uncounted(f"no model for {row.op} yet")
    if pieces[0] == "deepbench" and not pieces[1].startswith("NCCL"):
        uncounted("an all-reduce of a host library is no GPU kernel")
    p = row.params
    if p["gpus"] < 2:
        uncounted("a collective of one rank moves nothing")
    sizes = {"num_bytes": p["bytes"], "num_ranks": p["gpus"], "num_nodes": p["nodes"]}
    return (part(CollectiveTransfer, sizes, Conditions(kernel=_kernel(row)), kind=kind),)


def _kernel(row: Measurement) -> str:
    """The library and what makes its runs differ: its framework, its cluster, several nodes."""
    pieces = row.source.split("/")
    publisher, name = pieces[0], pieces[1]
    suffix = "-nodes" if row.params["nodes"] > 1 else ""
    if "custom_ar_graph" in pieces:
        return f"{CUSTOM}-{framework(row)}"
    if name.startswith("deepep"):
        direction = "dispatch" if "dispatch" in row.op else "combine"
        return f"{name}-{direction}{suffix}"
    if publisher == "vidur":
        kind = "p2p" if row.op == "send_recv" else "ring"
        return f"{LIBRARY}-vidur-{kind}{suffix}"
    if publisher == "aic":
        return LIBRARY
    return f"{LIBRARY}-{publisher}{suffix}"


ADAPTERS: Final[Mapping[str, Callable[[Measurement], tuple[Part, ...]]]] = dict.fromkeys(
    ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv", "broadcast",
     "moe_dispatch_fp8", "moe_combine_bf16"),
    collective,
)  # fmt: skip
