"""Collectives: NCCL on one node and on several, frameworks' all-reduce kernels, expert exchange."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from hwmodels import catalog
from hwmodels.dtypes import BF16, FP8, FP32, INT8, DType
from simulator.kernel_time.collective import over_cards
from simulator.kernel_time.model import Conditions
from validate.adapters.part import Part, framework, host_of, part, uncounted
from validate.measurement import Measurement
from workloads.ops.collective_transfer import (
    ClusterCollective,
    CollectiveTransfer,
    CustomAllReduce,
)
from workloads.ops.expert_exchange import ExpertExchange

LIBRARY: Final = "nccl"
PROFILED: Final = "nccl-profiled"
"""Kernel times of a profiler: they hold the wait for the last rank."""
FORMATS: Final[Mapping[str, DType]] = {"int8": INT8, "fp32": FP32}
ROUTING: Final = re.compile(r"T(\d+)_H(\d+)_K(\d+)_E(\d+)$")
"""Tokens, hidden size, choices and experts, as the publisher of expert exchange names its runs."""


def collective(row: Measurement) -> tuple[Part, ...]:
    """One collective; the host-side libraries of DeepBench's MPI runs are no GPU kernels."""
    pieces = row.source.split("/")
    if row.op == "broadcast":
        uncounted("no model for broadcast yet")
    if pieces[0] == "deepbench" and not pieces[1].startswith("NCCL"):
        uncounted("an all-reduce of a host library is no GPU kernel")
    p = row.params
    if p["gpus"] < 2:
        uncounted("a collective of one rank moves nothing")
    sizes = {"num_bytes": p["bytes"], "num_ranks": p["gpus"]}
    fixed: dict[str, Any] = {"kind": row.op, "dtype": FORMATS.get(pieces[-1], BF16)}
    if p["nodes"] > 1:
        sizes["num_nodes"] = p["nodes"]
        fixed["port_bytes_per_s"] = _port(row, pieces)
        return (part(ClusterCollective, sizes, _run(row, pieces), **fixed),)
    if "custom_ar_graph" in pieces and (p["gpus"] == 2 or not _cards(row)):
        return (part(CustomAllReduce, sizes, Conditions(kernel=framework(row)), **fixed),)
    return (part(CollectiveTransfer, sizes, _run(row, pieces), **fixed),)


def _cards(row: Measurement) -> bool:
    """Are the ranks joined by PCI Express? Frameworks then leave more than two to the library
    (vLLM: "custom allreduce is disabled" there).
    """
    if row.device_id not in catalog.device_ids():
        return False
    return bool(over_cards(row.params["gpus"], catalog.device(row.device_id)))


def _port(row: Measurement, pieces: list[str]) -> float:
    """Bytes per second of one rank's network port: NVIDIA's DGX A100 has 200 Gbit/s a GPU, DGX
    H100 and AWS p6-b200 400 Gbit/s; 100 Gbit/s is taken for servers of cards.
    """
    if "pairwise" in pieces[-1]:
        return 12.5e9
    return 25e9 if row.device_id.startswith("a100") else 50e9


def _run(row: Measurement, pieces: list[str]) -> Conditions:
    """The library's kernel; a profiler's times wait for the last rank, longer in chains."""
    if pieces[0] == "vidur":
        return Conditions(kernel=PROFILED + ("-p2p" if row.op == "send_recv" else ""))
    return Conditions(kernel=LIBRARY, host=host_of(row))


def exchange(row: Measurement) -> tuple[Part, ...]:
    """One dispatch or combine: the publisher's bytes are an upper bound, its sizes tell more."""
    pieces = row.source.split("/")
    found = ROUTING.match(pieces[-1])
    if found is None:
        uncounted(f"{row.op}: the source states no tokens, width, choices and experts")
    tokens, hidden, topk, experts = map(int, found.groups())
    direction = "dispatch" if "dispatch" in row.op else "combine"
    sizes = {"num_tokens": tokens, "hidden": hidden, "topk": topk, "num_experts": experts,
             "num_ranks": row.params["gpus"], "num_nodes": row.params["nodes"]}  # fmt: skip
    kernel = f"{pieces[1]}-{direction}" + ("-nodes" if row.params["nodes"] > 1 else "")
    return (
        part(
            ExpertExchange,
            sizes,
            Conditions(kernel=kernel),
            direction=direction,
            low_latency=pieces[1].endswith("-ll"),
            dtype=FP8 if row.op.endswith("_fp8") else BF16,
        ),
    )


ADAPTERS: Final[Mapping[str, Callable[[Measurement], tuple[Part, ...]]]] = {
    **dict.fromkeys(
        ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv", "broadcast"),
        collective,
    ),
    **dict.fromkeys(("moe_dispatch_fp8", "moe_combine_bf16"), exchange),
}
