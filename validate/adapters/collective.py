"""Collectives: NCCL on one node and on several, frameworks' all-reduce kernels, expert exchange."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from hwmodels import catalog
from hwmodels.dtypes import BF16, FP8, FP32, INT8, DType
from simulator.kernel_time.collective import PROFILED, over_cards
from simulator.kernel_time.model import Conditions
from validate.adapters.part import Part, framework, host_of, part, uncounted
from validate.measurement import Measurement
from workloads.ops.collective_transfer import (
    ClusterCollective,
    CollectiveTransfer,
    CustomAllReduce,
    StagedCollective,
)
from workloads.ops.expert_exchange import ExpertExchange

LIBRARY: Final = "nccl"
DEEPBENCH_CARDS: Final = 8
"""Cards of one server: DeepBench's README, "Topology for NVIDIA 8 GPU System"."""
ONE_ROOT: Final = "gtx"
"""How the ids of DeepBench's cards on servers with one PCI Express root begin (its README: ten
cards a server; rings of 8 TITAN X (Pascal) pass 8.75 GB/s there, more than QPI carries). Its
servers with eight cards have two roots, and QPI between them."""
QPI_BYTES_PER_S: Final = 6e9
"""QPI between two sockets of those years (NCCL's src/graph/topo.h, QPI_BW)."""
FDR_BYTES_PER_S: Final = 6.8e9
"""InfiniBand FDR, 4 lanes of 14.0625 Gbit/s behind 64b/66b (the same README)."""
EFA_HOP_S: Final = 17.5e-6
"""A message over AWS's EFA: 15 to 20 us (hwmodels/data/clusters/aws-p4d.toml)."""
FORMATS: Final[Mapping[str, DType]] = {"int8": INT8, "fp32": FP32}
ROUTING: Final = re.compile(r"T(\d+)_H(\d+)_K(\d+)_E(\d+)$")
"""Tokens, hidden size, choices and experts, as the publisher of expert exchange names its runs."""


def collective(row: Measurement) -> tuple[Part, ...]:
    """One collective; the host-side libraries of DeepBench's MPI runs are no GPU kernels."""
    pieces = row.source.split("/")
    if pieces[0] == "deepbench" and not pieces[1].startswith("NCCL"):
        uncounted("an all-reduce of a host library is no GPU kernel")
    p = row.params
    if p["gpus"] < 2:
        uncounted("a collective of one rank moves nothing")
    sizes = {"num_bytes": p["bytes"], "num_ranks": p["gpus"]}
    fixed: dict[str, Any] = {"kind": row.op, "dtype": FORMATS.get(pieces[-1], BF16)}
    if pieces[0] == "deepbench" and not row.device_id.startswith(ONE_ROOT):
        fixed["root_bytes_per_s"] = QPI_BYTES_PER_S
    nodes = _nodes(row, pieces)
    if nodes > 1:
        sizes["num_nodes"] = nodes
        return (part(_op(row, pieces), sizes, _run(row, pieces), **fixed, **_ports(row, pieces)),)
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


def _nodes(row: Measurement, pieces: list[str]) -> int:
    """Nodes of the group. DeepBench states none: its cards are eight to a server (its README)."""
    stated = int(row.params["nodes"])
    if pieces[0] == "deepbench":
        return max(stated, -(-int(row.params["gpus"]) // DEEPBENCH_CARDS))
    return stated


def _op(row: Measurement, pieces: list[str]) -> type[ClusterCollective]:
    """Through host memory, or not: Vidur's servers of paired cards and its DGX A100 move 2 to 8
    GB/s over ports of 12.5 and 25, as DeepBench's of 2017 had to. Nothing is known of others: the
    network reads accelerators.
    """
    old = _paired(pieces) or row.device_id.startswith("a100")
    staged = pieces[0] == "deepbench" or (pieces[0] == "vidur" and old)
    return StagedCollective if staged else ClusterCollective


def _paired(pieces: list[str]) -> bool:
    """A server whose cards are joined in pairs?"""
    return "pairwise" in pieces[-1]


def _ports(row: Measurement, pieces: list[str]) -> dict[str, Any]:
    """Network ports: NVIDIA's DGX A100 has 200 Gbit/s a GPU, DGX H100 and AWS p6-b200 400 Gbit/s;
    servers of cards are taken at 100 Gbit/s a card, DeepBench's have one InfiniBand FDR port.
    Between Vidur's servers of paired cards a message of 16 MB moves at a third of one of 1 MB: TCP.
    """
    if pieces[0] == "deepbench":
        return {"port_bytes_per_s": FDR_BYTES_PER_S, "ports_per_node": 1}
    if _paired(pieces):
        return {"port_bytes_per_s": 12.5e9, "sockets": True}
    hop = {"hop_s": EFA_HOP_S} if "efa" in "/".join(pieces) else {}
    return {"port_bytes_per_s": 25e9 if row.device_id.startswith("a100") else 50e9, **hop}


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
