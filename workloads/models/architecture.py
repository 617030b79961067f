"""A decoder-only transformer as data: the sizes that decide its counts, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from hwmodels.errors import InputError

RMS_NORM, LAYER_NORM = "rmsnorm", "layernorm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Multi-head attention; grouped or multi-query when `num_kv_heads` is smaller.

    `rope_dim` elements of each head are rotated (0: positions enter elsewhere); `qk_norm` is an
    RMSNorm over each head of q and k.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_dim: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """A feed-forward block: two matrices, or three when `gated` (up, gate, down)."""

    ffn_dim: int
    gated: bool
    activation: str
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe:
    """Mixture of experts; each expert has the form of the config's `mlp` without bias.

    `layers` are the indices of the layers that have it. `shared_ffn_dim` is the width of all
    shared experts together; `router_bias` the per-expert correction of DeepSeek-V3. A token's
    choices lie in `num_open_groups` of `num_groups` groups of experts.

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
    linear attention (a state of head_dim x head_dim a head, no softmax, no decay). In training,
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

    def __post_init__(self) -> None:
        if self.num_linear_layers and isinstance(self.attention, LatentAttention):
            raise InputError("linear layers with latent attention are not modelled; leave one out")
        if not self.embedding_dim:
            object.__setattr__(self, "embedding_dim", self.hidden_dim)

    @property
    def num_moe_layers(self) -> int:
        """Layers whose feed-forward block is a mixture of experts."""
        return len(self.moe.layers) if self.moe else 0

    @property
    def num_dense_layers(self) -> int:
        """Layers with a plain feed-forward block."""
        return self.num_layers - self.num_moe_layers

    @property
    def kinds(self) -> dict[str, int]:
        """Layers by kind, those kinds only that occur: {'dense': 3, 'moe': 58}."""
        both = {"dense": self.num_dense_layers, "moe": self.num_moe_layers}
        return {kind: count for kind, count in both.items() if count}

    @property
    def last_kind(self) -> str:
        """Kind of the last layer, and of what a module of multi-token prediction repeats."""
        return "moe" if self.moe and self.num_layers - 1 in self.moe.layers else "dense"

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
