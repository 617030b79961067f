"""A decoder-only transformer as data: the sizes that decide its counts, and nothing else."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np

from hwmodels.errors import InputError
from workloads.models.mixers import AnyMixer
from workloads.numeric import Num, is_scalar

RMS_NORM, LAYER_NORM = "rmsnorm", "layernorm"
DENSE, MOE = "dense", "moe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Multi-head attention; grouped or multi-query when `num_kv_heads` is smaller.

    `rope_dim` elements of each head are rotated (0: positions enter elsewhere); `qk_norm` is an
    RMSNorm over each head of q and k. `out_gate`: each query head comes with a gate of its width,
    whose sigmoid multiplies its output (Qwen3-Next).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_dim: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    out_gate: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}; "
                "give a divisor"
            )

    @property
    def v_head_dim(self) -> int:
        """Width of a value head: the same as of a query head."""
        return self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    K and V come from one latent of `kv_lora_rank` plus a rotated key of `qk_rope_head_dim` that
    all heads share; q comes from a latent of `q_lora_rank` (None: straight from the hidden state).
    """

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    bias: bool = False

    @property
    def num_kv_heads(self) -> int:
        """Every head has its own K and V once they are expanded from the latent."""
        return self.num_heads

    @property
    def head_dim(self) -> int:
        """Width of a query or key head: the part without and the part with rotation."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """What the cache keeps per token: the K/V latent and the shared rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


AnyAttention: TypeAlias = Attention | LatentAttention

NO_ATTENTION: Final = Attention(num_heads=1, num_kv_heads=1, head_dim=1)
"""Stands in models whose every layer has a mixer: no layer has it, so that no count meets it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """A feed-forward block: two matrices, or three when `gated` (up, gate, down); none at 0."""

    ffn_dim: int
    gated: bool
    activation: str
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe:
    """Mixture of experts; each expert has the form of the config's `mlp` without bias.

    `layers` are the indices of the layers that have it. `shared_ffn_dim` is the width of all
    shared experts together, `shared_gate` one weight a channel that scales their output;
    `router_bias` the per-expert correction of DeepSeek-V3. A token's choices lie in
    `num_open_groups` of `num_groups` groups of experts.

    How tokens spread: `imbalance` is the rows of the most loaded rank over the mean, 1 where the
    router is forced to balance. With a `capacity_factor` each expert takes that many times its mean
    share, is padded up to it and drops the rest (Lepikhin et al. 2020, arXiv 2006.16668, section
    2.2); 0: no token is dropped.
    """

    num_experts: int
    num_active: int
    expert_ffn_dim: int
    layers: tuple[int, ...]
    num_shared_experts: int = 0
    shared_ffn_dim: int = 0
    shared_gate: bool = False
    router_bias: bool = False
    num_groups: int = 1
    num_open_groups: int = 1
    imbalance: float = 1.0
    capacity_factor: float = 0.0

    def __post_init__(self) -> None:
        if self.num_active > self.num_experts:
            raise InputError(
                f"{self.num_active} active experts of {self.num_experts}; "
                "a token cannot choose more experts than there are"
            )
        if not 1 <= self.imbalance <= self.num_experts / self.num_active:
            raise InputError(
                f"imbalance {self.imbalance:g} must lie between 1 and "
                f"{self.num_experts / self.num_active:g}, where all tokens choose the same experts"
            )
        if not 0 <= self.capacity_factor <= self.num_experts / self.num_active:
            raise InputError(
                f"capacity factor {self.capacity_factor:g} must lie between 0 (no token dropped) "
                f"and {self.num_experts / self.num_active:g}, where none can be"
            )
        if not 1 <= self.num_open_groups <= self.num_groups or self.num_experts % self.num_groups:
            raise InputError(
                f"{self.num_open_groups} open of {self.num_groups} groups of {self.num_experts} "
                "experts; groups must divide the experts, and at most all be open"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """A decoder-only transformer.

    `norms_per_layer` counts the norms over `hidden_dim` in one layer: 2, or 4 where each block
    also normalises its output. `num_positions` rows of learned positions (0: none). The embedding
    has `embedding_dim` columns and is projected where that differs from `hidden_dim`.
    `num_windowed_layers` layers see only the last `window` positions; `num_linear_layers` have
    linear attention (a state of head_dim x head_dim a head, no softmax, no decay). The layers in
    `mixer_layers` have `mixer` in the place of attention (`workloads.models.mixers`). In training,
    `num_mtp` modules of multi-token prediction follow the last layer (DeepSeek-V3, arXiv
    2412.19437, section 2.2), each a projection, a layer of the last kind and a use of the head.
    """

    name: str
    family: str
    hidden_dim: int
    num_layers: int
    vocab_size: int
    attention: AnyAttention
    mlp: Mlp
    moe: Moe | None = None
    norm: str = RMS_NORM
    norms_per_layer: int = 2
    final_norm: bool = True
    tied_embeddings: bool = False
    num_positions: int = 0
    embedding_dim: int = 0
    window: int | None = None
    num_windowed_layers: int = 0
    num_linear_layers: int = 0
    num_mtp: int = 0
    mixer: AnyMixer | None = None
    mixer_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._check_mixer()
        if self.num_linear_layers and isinstance(self.attention, LatentAttention):
            raise InputError("linear layers with latent attention are not modelled; leave one out")
        if not self.embedding_dim:
            object.__setattr__(self, "embedding_dim", self.hidden_dim)

    def _check_mixer(self) -> None:
        """A mixer and its layers, and nothing that is not told apart from them."""
        if (self.mixer is None) != (not self.mixer_layers):
            raise InputError("a mixer and the layers that have it belong together; give both")
        if self.mixer is None:
            return
        if self.mixer_layers[0] < 0 or self.mixer_layers[-1] >= self.num_layers:
            raise InputError(f"mixer layers must lie within the model's {self.num_layers} layers")
        beside = {
            "windows": bool(self.window), "linear attention": bool(self.num_linear_layers),
            "multi-token prediction": bool(self.num_mtp),
            "norms behind blocks": self.norms_per_layer == 4,
            "latent attention": isinstance(self.attention, LatentAttention),
        }  # fmt: skip
        for what, present in beside.items():
            if present:
                raise InputError(f"{what} beside {self.mixer.label} layers is not modelled")

    @property
    def num_mixer_layers(self) -> int:
        """Layers with a mixer in the place of attention."""
        return len(self.mixer_layers)

    @property
    def num_attention_layers(self) -> int:
        """Layers with attention of any sort."""
        return self.num_layers - self.num_mixer_layers

    @property
    def split_parts(self) -> int:
        """What tensor-parallel ranks share out: query heads, heads or channels of the mixer, or
        the greatest number that divides both.
        """
        if self.mixer is None:
            return self.attention.num_heads
        if not self.num_attention_layers:
            return self.mixer.num_parts
        return math.gcd(self.attention.num_heads, self.mixer.num_parts)

    @property
    def num_moe_layers(self) -> int:
        """Layers whose feed-forward block is a mixture of experts."""
        return len(self.moe.layers) if self.moe else 0

    @property
    def num_dense_layers(self) -> int:
        """Layers with a plain feed-forward block."""
        return self.num_layers - self.num_moe_layers if self.mlp.ffn_dim else 0

    @property
    def kinds(self) -> dict[str, int]:
        """Layers by kind, those kinds only that occur: {'dense': 3, 'moe': 58}.

        A kind is named by its feed-forward block, if it has one, and by its mixer, if that is not
        attention: 'dense mamba2', 'mamba'.
        """
        return {kind: len(indices) for kind, indices in kind_indices(self).items()}

    def kind_of(self, layer: int) -> str:
        """The kind of one layer."""
        experts = self.moe is not None and layer in self.moe.layers
        return _named(self, experts=experts, mixed=layer in self.mixer_layers)

    @property
    def last_kind(self) -> str:
        """Kind of the last layer, and of what a module of multi-token prediction repeats."""
        return self.kind_of(self.num_layers - 1)

    @property
    def windowed_frac(self) -> float:
        """Fraction of the layers whose attention is windowed."""
        return self.num_windowed_layers / self.num_layers if self.window else 0.0

    @property
    def linear_frac(self) -> float:
        """Fraction of the layers whose attention is linear."""
        return self.num_linear_layers / self.num_layers

    @property
    def norm_dim(self) -> int:
        """Parameters of one norm over the hidden state: a scale, and a bias for LayerNorm."""
        return self.hidden_dim * (2 if self.norm == LAYER_NORM else 1)


# ---- kinds ---------------------------------------------------------------------------------


def _named(cfg: TransformerConfig, *, experts: bool, mixed: bool) -> str:
    block = MOE if experts else DENSE if cfg.mlp.ffn_dim else ""
    mixer = cfg.mixer.label if cfg.mixer and mixed else ""
    return f"{block} {mixer}".strip() or "attention"


def has_experts(kind: str) -> bool:
    """Is the feed-forward block of that kind of layer a mixture of experts?"""
    return kind.split()[0] == MOE


def has_block(kind: str) -> bool:
    """Has that kind of layer a feed-forward block at all?"""
    return kind.split()[0] in (DENSE, MOE)


def mixer_of(cfg: TransformerConfig, kind: str) -> AnyMixer | None:
    """The mixer of that kind of layer; None where it is attention."""
    return cfg.mixer if cfg.mixer and kind.split()[-1] == cfg.mixer.label else None


@lru_cache(maxsize=1024)
def kind_indices(cfg: TransformerConfig) -> Mapping[str, tuple[int, ...]]:
    """The layers of every kind, kinds in the order of their names."""
    found: dict[str, list[int]] = {}
    experts, mixed = frozenset(cfg.moe.layers if cfg.moe else ()), frozenset(cfg.mixer_layers)
    for layer in range(cfg.num_layers):
        name = _named(cfg, experts=layer in experts, mixed=layer in mixed)
        found.setdefault(name, []).append(layer)
    return MappingProxyType({kind: tuple(found[kind]) for kind in sorted(found)})


def layers_between(cfg: TransformerConfig, start: Num, stop: Num) -> dict[str, Num]:
    """How many layers of every kind lie in start <= i < stop; arrays give arrays."""
    if is_scalar(start, stop):
        return {
            kind: bisect_left(indices, stop) - bisect_left(indices, start)
            for kind, indices in kind_indices(cfg).items()
        }
    return {
        kind: (np.searchsorted(indices, stop) - np.searchsorted(indices, start)).astype(np.float64)
        for kind, indices in kind_indices(cfg).items()
    }
