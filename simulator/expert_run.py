"""How a framework runs a mixture of experts: its dispatcher, what overlaps, what the host costs.

On the calibrated rung a layer of experts takes, forward and backward together,

    layer     = max(attention and norms + kernels experts + exposed exchange, waits)
    experts   = its router, routed and shared experts, grouped products as `kernel_time.grouped`
                has them; `kernels` times as long in a training framework, which permutes rows twice
                (by rank, by expert), pads them to what a format's scales need, and runs a cast, a
                sum or a product of its own where a serving kernel fuses them
    exchange  = dispatch and combine (`expert_exchange`); under the kernels of another micro-batch
                where `overlapped`, so that only the excess shows
    waits     = host_s (1 - graphs_frac)

A framework launches a layer of experts kernel by kernel, and waits for the router's counts to come
to the host before it can size what follows: where the device is faster than the host it idles.
Captured graphs need fixed sizes; rows padded to a capacity have them, and some dispatchers keep the
counts on the device. `graphs_frac` is the share of the host's time that is captured. `host_s` is
that of a layer's forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from hwmodels.errors import InputError
from hwmodels.frozen import FrozenDict
from hwmodels.step_experts import shipped_expert_factors
from simulator.expert_exchange import NODE_LIMITED
from workloads.numeric import Num
from workloads.workload import Node

MODULES: Final[Mapping[str, tuple[str, ...]]] = FrozenDict(
    {
        "core_attn": ("attention",),
        "layernorm": ("attention_norm", "mlp_norm"),
        "mla_up_proj": ("q_b", "kv_b", "rope"),
        "mlp": ("up", "activation", "down"),
        "moe_act": ("experts.activation",),
        "shared_experts": ("shared.up", "shared.activation", "shared.down"),
        "moe": ("router", "dispatch", "experts.up", "experts.activation", "experts.down",
                "shared.up", "shared.activation", "shared.down", "combine"),
    }
)  # fmt: skip
"""Nodes of a layer by the name of the module that Megatron Core recomputes (its option
`recompute_modules`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRun:
    """A framework's choices for experts; nothing but the kernels by default."""

    dispatcher: str = NODE_LIMITED
    overlapped: bool = False
    kernels: float = 1.0
    host_s: float = 0.0
    graphs_frac: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.graphs_frac <= 1:
            raise InputError(f"graphs_frac {self.graphs_frac:g} must lie in [0, 1]")

    @property
    def waits_s(self) -> float:
        """Host time of a layer, forward and backward, that no graph takes."""
        return self.host_s * (1 - self.graphs_frac)


def fitted_run(dispatcher: str = NODE_LIMITED) -> ExpertRun:
    """With the shipped factors of `hwmodels.step_experts`; nothing overlapped, nothing captured."""
    found = shipped_expert_factors()
    return ExpertRun(dispatcher=dispatcher, kernels=found.kernels, host_s=found.host_s)


def module_shares(nodes: Sequence[Node], modules: Sequence[str]) -> list[Num]:
    """1 for the nodes of a layer's forward pass that belong to one of the modules, else 0."""
    unknown = [name for name in modules if name not in MODULES]
    if unknown:
        raise InputError(f"no module '{unknown[0]}' to recompute; name one of {', '.join(MODULES)}")
    repeated = {name for module in modules for name in MODULES[module]}
    return [1.0 if node.name in repeated else 0.0 for node in nodes]
