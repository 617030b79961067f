"""Which ops of a layer's forward pass run again in its backward pass, by framework.

    whole         the function that was wrapped, to its end: reentrant checkpointing, and PyTorch's
                  other kind before release 2.1
    early stop    up to the last op whose input is kept: PyTorch from 2.1 on ends there
                  (`set_checkpoint_early_stop`). A layer's last product keeps its input before it
                  runs, so neither it nor the addition behind it, nor the tensor-parallel collective
                  between them, happens again: of the products of an ungated layer, a third
    scores        attention without a fused kernel, and nothing else (Korthikanti et al. 2022)
    second        PyTorch's selective checkpointing per operator as torchtitan sets it: the outputs
                  of attention, of reduce-scatters and of every other product are kept. Of q, k, v,
                  out, gate, up, down, in this order, k, out and up run again, all maps, and the
                  gathers of both blocks. Where out's result is scattered, that is what was kept

A policy gives each node and each collective the share of its forward time that is spent again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from simulator.exchange import CONTEXT, Exchange
from simulator.expert_run import module_shares
from simulator.low_precision import QUANTISE
from simulator.stack import ATTENTION, NARROW, PRODUCT, ROWWISE, SECOND, Stack, class_of
from workloads.models.architecture import Attention, TransformerConfig
from workloads.models.parameters import heads_per_rank
from workloads.numeric import Num, where
from workloads.ops.attention import StandardAttention
from workloads.plan import Plan
from workloads.workload import Node

ALL: Final = "all_gather"
PRODUCTS: Final = (PRODUCT, NARROW, ROWWISE)
HALF_FRAC: Final = 0.5
"""Of products that no framework's order of q, k, v, out, gate, up, down covers, every second."""


def full_shares(nodes: Sequence[Node], framework: Stack | None) -> list[Num]:
    """Shares of a layer's forward nodes that full recomputation runs again."""
    kept: list[Num] = [1.0] * len(nodes)
    if framework is None or not framework.early_stop:
        return kept
    last = len(nodes) - 1
    while last > 0 and nodes[last].part == "residual":  # an addition keeps nothing
        last -= 1
    while last > 0 and nodes[last - 1].part == QUANTISE:  # kept as it was before it was cast
        last -= 1
    return kept[:last] + [0.0] * (len(nodes) - last)


def selective_shares(
    nodes: Sequence[Node], framework: Stack | None, cfg: TransformerConfig, plan: Plan
) -> list[Num]:
    """Shares of a layer's forward nodes that selective recomputation runs again."""
    if framework is None:
        return [0.0] * len(nodes)
    if framework.modules:
        return module_shares(nodes, framework.modules)
    if framework.selective != SECOND:
        return [float(isinstance(n.op, StandardAttention)) for n in nodes]
    products = _second_products(cfg, plan)
    ends = full_shares(nodes, framework)
    return [_second(n, end, products) for n, end in zip(nodes, ends, strict=True)]


def _second(node: Node, end: Num, products: Mapping[str, Num]) -> Num:
    kernel_class = class_of(node.op)
    if kernel_class == ATTENTION:
        return 0.0
    if node.part == QUANTISE:  # of a product that runs again
        return products.get(node.name.rpartition(".")[0], HALF_FRAC)
    return products.get(node.name, HALF_FRAC) if kernel_class in PRODUCTS else end


def _second_products(cfg: TransformerConfig, plan: Plan) -> Mapping[str, Num]:
    """Shares of the products that `layer` names, by what every second one is."""
    spec = cfg.attention
    shares: dict[str, Num] = {"down": 0.0, "up": HALF_FRAC if cfg.mlp.gated else 0.0}
    if isinstance(spec, Attention):
        queries, keys = heads_per_rank(spec.num_heads, spec.num_kv_heads, plan.tp)
        shares["qkv"] = keys / (queries + 2 * keys)
        shares["out"] = where(plan.tp > 1, 0.0, 1.0)
    return shares


def exchange_shares(exchanges: Sequence[Exchange], framework: Stack | None) -> list[Num]:
    """Shares of a layer's forward collectives that full recomputation repeats."""
    shares: list[Num] = [1.0] * len(exchanges)
    if framework is not None and framework.early_stop:
        ends = [i for i, e in enumerate(exchanges) if e.collective.kind == "reduce_scatter"]
        shares[ends[-1]] = 0.0
    return shares


def selective_exchange_shares(exchanges: Sequence[Exchange], framework: Stack | None) -> list[Num]:
    """Shares of a layer's forward collectives that selective recomputation repeats."""
    second = framework is not None and framework.selective == SECOND
    return [float(second and e.piece != CONTEXT and e.collective.kind == ALL) for e in exchanges]
