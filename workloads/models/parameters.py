"""How many parameters a transformer has, exactly: by part, in use per token, and per rank.

One set of formulas serves the whole model and one rank of it: a weight that tensor parallelism
splits is written with its shard, and the whole model is the case tp = 1. Split by columns: q, k,
v, the widening half of an MLP, the embedding and the head by vocabulary. Split by rows: the
attention's output and the narrowing half of an MLP, whose biases every rank keeps. Kept whole:
norms, learned positions, the router, the latent down-projections of latent attention. What does
not divide is padded to the next whole shard, and a K/V head is copied where tp exceeds their
number (Shoeybi et al. 2019, arXiv 1909.08053, and Megatron-LM's layout since). Mixers in the place
of attention are split as `workloads.models.mixers` says.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hwmodels.errors import InputError
from workloads.models.architecture import (
    LatentAttention,
    Moe,
    TransformerConfig,
    has_block,
    has_experts,
    layers_between,
    mixer_of,
)
from workloads.models.projection import Projection, by_name, heads_per_rank
from workloads.numeric import Num, ceil_div, where
from workloads.plan import Plan

__all__ = [
    "LayerParameters",
    "ParameterCount",
    "Projection",
    "StageParameters",
    "attention_projections",
    "count_parameters",
    "heads_per_rank",
    "layer_parameters",
    "matmul_parameters",
    "mixer_projections",
    "mlp_projections",
    "moe_of",
    "mtp_parameters",
    "parameters_per_rank",
    "projection_parameters",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParameters:
    """Parameters of one layer by part; arrays where the plan is one."""

    attention: Num = 0
    mlp: Num = 0
    router: Num = 0
    experts: Num = 0
    shared_experts: Num = 0
    norms: Num = 0
    mixer: Num = 0

    @property
    def total(self) -> Num:
        """All parts."""
        blocks = self.attention + self.mixer + self.mlp + self.router + self.experts
        return blocks + self.shared_experts + self.norms

    @property
    def dense(self) -> Num:
        """All but the routed experts: what data parallelism replicates over dp * cp."""
        return self.total - self.experts


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """Parameters of a whole model by part.

    `head` is 0 where the embedding is tied. `active` leaves out the experts a token did not
    choose and nothing else: the embedding, the head and the norms are in it. `dense_layer` and
    `moe_layer` are one layer of either kind with attention, None where the model has none;
    `mixers` is what stands in the place of attention.
    """

    embedding: int
    positions: int
    attention: int
    mlp: int
    router: int
    experts: int
    shared_experts: int
    norms: int
    head: int
    idle_experts: int
    dense_layer: LayerParameters | None
    moe_layer: LayerParameters | None
    mtp: int = 0
    mixers: int = 0

    @property
    def layers(self) -> int:
        """Everything inside the layers, and the final norm."""
        blocks = self.attention + self.mixers + self.mlp + self.router + self.experts
        return blocks + self.shared_experts + self.norms

    @property
    def embedding_and_head(self) -> int:
        """Token embedding, learned positions, output projection."""
        return self.embedding + self.positions + self.head

    @property
    def total(self) -> int:
        """All parameters, a tied matrix once."""
        return self.layers + self.embedding_and_head + self.mtp

    @property
    def active(self) -> int:
        """Parameters that one token's forward pass uses; no modules of multi-token prediction."""
        return self.total - self.mtp - self.idle_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class StageParameters:
    """Parameters that one rank of a pipeline stage holds.

    `dense` is replicated over dp * cp ranks, `experts` over dp * cp / ep: what ZeRO may shard.
    """

    dense: Num
    experts: Num

    @property
    def total(self) -> Num:
        """Both."""
        return self.dense + self.experts


def attention_projections(cfg: TransformerConfig, tp: Num = 1) -> dict[str, Projection]:
    """The matrices of one attention block on one of `tp` ranks, q, k and v as one.

    Latent attention: `q_a` and `kv_a` make the latents, `q_b` and `kv_b` expand them per head;
    a full-rank query is `q_b` alone.
    """
    spec, hidden = cfg.attention, cfg.hidden_dim
    q, kv = heads_per_rank(spec.num_heads, spec.num_kv_heads, tp)
    if not isinstance(spec, LatentAttention):
        heads = q * (1 + spec.out_gate) + 2 * kv
        qkv = Projection(name="qkv", k=hidden, n=heads * spec.head_dim, bias=spec.qkv_bias)
        out = Projection(name="out", k=q * spec.head_dim, n=hidden, bias=spec.out_bias)
        return by_name((qkv, out))
    rank, bias = spec.q_lora_rank, spec.bias
    expanded = q * (spec.qk_nope_head_dim + spec.v_head_dim)
    matrices = [
        Projection(name="q_b", k=rank or hidden, n=q * spec.head_dim),
        Projection(name="kv_a", k=hidden, n=spec.latent_dim, bias=bias),
        Projection(name="kv_b", k=spec.kv_lora_rank, n=expanded),
        Projection(name="out", k=q * spec.v_head_dim, n=hidden, bias=bias),
    ]
    if rank:
        matrices.insert(0, Projection(name="q_a", k=hidden, n=rank, bias=bias))
    return by_name(matrices)


def mlp_projections(
    cfg: TransformerConfig, ffn_dim: int, tp: Num = 1, *, bias: bool = False
) -> dict[str, Projection]:
    """`up` (gate and up side by side where gated) and `down` of one block, on one of `tp` ranks."""
    width = ceil_div(ffn_dim, tp)
    widening = 2 if cfg.mlp.gated else 1
    up = Projection(name="up", k=cfg.hidden_dim, n=widening * width, bias=bias)
    return by_name((up, Projection(name="down", k=width, n=cfg.hidden_dim, bias=bias)))


def _parameters(matrices: dict[str, Projection]) -> Num:
    return _sum(matrix.num_parameters for matrix in matrices.values())


def _weights(matrices: dict[str, Projection]) -> Num:
    return _sum(matrix.k * matrix.n for matrix in matrices.values())


def _sum(values: Iterable[Num]) -> Num:
    return sum(values, start=0)


def _inner_norms(cfg: TransformerConfig) -> int:
    """Norms inside an attention block: over each head of q and k, or over the latents."""
    spec = cfg.attention
    if isinstance(spec, LatentAttention):
        return (spec.q_lora_rank or 0) + spec.kv_lora_rank
    return 2 * spec.head_dim * spec.qk_norm


def layer_parameters(
    cfg: TransformerConfig, kind: str, tp: Num = 1, ep: Num = 1, etp: Num | None = None
) -> LayerParameters:
    """One layer of a kind, as 'dense' or 'moe', on one rank of tp; routed experts of etp * ep.

    `etp` is the number of ranks that split each expert, None: as many as tp.

    Llama-3-8B's attention is 4096 (32 + 2 * 8) 128 + 32 * 128 * 4096.

    >>> from workloads.models.config import load_hf_config
    >>> layer_parameters(load_hf_config("examples/llama3-8b.json"), "dense").attention
    41943040
    """
    moe, mixer = moe_of(cfg, kind), mixer_of(cfg, kind)
    attention: Num = 0
    mixed: Num = 0
    if mixer is None:
        attention = _parameters(attention_projections(cfg, tp)) + _inner_norms(cfg)
    else:
        mixed = _parameters(mixer_projections(cfg, tp)) + mixer.small(tp)
    norms = (cfg.norms_per_layer if has_block(kind) else 1) * cfg.norm_dim
    if moe is None:
        width = cfg.mlp.ffn_dim
        block = mlp_projections(cfg, width, tp, bias=cfg.mlp.bias) if has_block(kind) else {}
        return LayerParameters(
            attention=attention, mixer=mixed, mlp=_parameters(block), norms=norms
        )
    expert = _parameters(mlp_projections(cfg, moe.expert_ffn_dim, tp if etp is None else etp))
    shared = mlp_projections(cfg, moe.shared_ffn_dim, tp) if moe.shared_ffn_dim else {}
    return LayerParameters(
        attention=attention,
        mixer=mixed,
        router=moe.num_experts * (cfg.hidden_dim + moe.router_bias)
        + moe.shared_gate * cfg.hidden_dim,
        experts=ceil_div(moe.num_experts, ep) * expert,
        shared_experts=_parameters(shared),
        norms=norms,
    )


def moe_of(cfg: TransformerConfig, kind: str) -> Moe | None:
    """The mixture of a layer of that kind, None for a dense one; refuses kinds not in the model."""
    if kind not in cfg.kinds:
        raise InputError(f"{cfg.name} has no '{kind}' layers; it has {', '.join(cfg.kinds)}")
    return cfg.moe if has_experts(kind) else None


def mixer_projections(cfg: TransformerConfig, tp: Num = 1) -> dict[str, Projection]:
    """The matrices of one mixer in the place of attention, on one of `tp` ranks."""
    return by_name(cfg.mixer.matrices(cfg.hidden_dim, tp)) if cfg.mixer else {}


def projection_parameters(cfg: TransformerConfig) -> int:
    """The matrix between the embedding's width and the hidden size, 0 where they agree."""
    return cfg.embedding_dim * cfg.hidden_dim if cfg.embedding_dim != cfg.hidden_dim else 0


def count_parameters(cfg: TransformerConfig) -> ParameterCount:
    """Every parameter of the model, by part.

    >>> from workloads.models.config import load_hf_config
    >>> count_parameters(load_hf_config("examples/llama3-8b.json")).total
    8030261248
    """
    layers = {kind: layer_parameters(cfg, kind) for kind in cfg.kinds}

    def over_layers(part: str) -> int:
        return int(sum(count * getattr(layers[kind], part) for kind, count in cfg.kinds.items()))

    table, project = cfg.vocab_size * cfg.embedding_dim, projection_parameters(cfg)
    experts, moe = over_layers("experts"), cfg.moe
    return ParameterCount(
        embedding=table + project,
        positions=cfg.num_positions * cfg.hidden_dim,
        attention=over_layers("attention"),
        mlp=over_layers("mlp"),
        router=over_layers("router"),
        experts=experts,
        shared_experts=over_layers("shared_experts"),
        norms=over_layers("norms") + cfg.final_norm * cfg.norm_dim,
        head=project + (0 if cfg.tied_embeddings else table),
        idle_experts=experts // moe.num_experts * (moe.num_experts - moe.num_active) if moe else 0,
        dense_layer=layers.get("dense"),
        moe_layer=layers.get("moe"),
        mtp=int(cfg.num_mtp * (layers[cfg.last_kind].total + mtp_parameters(cfg))),
        mixers=over_layers("mixer"),
    )


def matmul_parameters(cfg: TransformerConfig) -> int:
    """Weights that one token is multiplied with: projections, chosen experts, the head.

    Left out: norms, biases, positions and the embedding, which is looked up; the head counts
    where it is tied, too, and again for every module of multi-token prediction beside its layer
    and its projection. This is the N of "6 N per token".

    >>> from workloads.models.config import load_hf_config
    >>> matmul_parameters(load_hf_config("examples/llama3-8b.json"))
    7504658432
    """
    used = {kind: _layer_weights(cfg, kind) for kind in cfg.kinds}
    blocks = _sum(count * used[kind] for kind, count in cfg.kinds.items())
    head = cfg.vocab_size * cfg.embedding_dim + 2 * projection_parameters(cfg)
    module = used[cfg.last_kind] + head + 2 * cfg.hidden_dim * cfg.hidden_dim
    return int(blocks + head + cfg.num_mtp * module)


def _layer_weights(cfg: TransformerConfig, kind: str) -> Num:
    """Weights of one layer of a kind that a token is multiplied with."""
    mixed = mixer_of(cfg, kind) is not None
    own = _weights(mixer_projections(cfg) if mixed else attention_projections(cfg))
    if not has_block(kind):
        return own
    if not has_experts(kind) or cfg.moe is None:
        return own + _weights(mlp_projections(cfg, cfg.mlp.ffn_dim))
    chosen = cfg.moe.num_active * _weights(mlp_projections(cfg, cfg.moe.expert_ffn_dim))
    shared = _weights(mlp_projections(cfg, cfg.moe.shared_ffn_dim))
    return own + chosen + shared + cfg.hidden_dim * (cfg.moe.num_experts + cfg.moe.shared_gate)


def parameters_per_rank(
    cfg: TransformerConfig, plan: Plan
) -> tuple[StageParameters, StageParameters]:
    """What one rank of the first and of the last pipeline stage holds.

    Every stage is taken to hold ceil(num_layers / pp) layers: the first ones of the model on the
    first stage, the last ones on the last. The first stage adds the embedding and the positions;
    the last the final norm and the head, which is a copy of a tied embedding unless both stages
    are one. Routed experts are split over ep ranks and each of them over `plan.expert_tp`. The
    last stage holds the modules of multi-token prediction, which share embedding and head.

    >>> from workloads.models.config import load_hf_config
    >>> llama = load_hf_config("examples/llama3-8b.json")
    >>> first, last = parameters_per_rank(llama, Plan(tp=2, pp=4))
    >>> first.total == 4 * 2 * 218_112_000 // 2 + 4 * 2 * 4096 + 128256 * 4096 // 2
    True
    """
    num = ceil_div(cfg.num_layers, plan.pp)
    table = ceil_div(cfg.vocab_size, plan.tp) * cfg.embedding_dim
    project = projection_parameters(cfg)
    one_stage = np.equal(plan.pp, 1) if isinstance(plan.pp, np.ndarray) else plan.pp == 1
    copied = where(one_stage, 0, table) if cfg.tied_embeddings else table
    head = copied + project + cfg.final_norm * cfg.norm_dim
    embedding = table + project + cfg.num_positions * cfg.hidden_dim
    layers = {
        kind: layer_parameters(cfg, kind, plan.tp, plan.ep, plan.expert_tp) for kind in cfg.kinds
    }
    extra = layers[cfg.last_kind]
    modules = cfg.num_mtp * (extra.dense + mtp_parameters(cfg))
    predicted = cfg.num_mtp * extra.experts

    def stage(counts: dict[str, Num], ends: Num, experts: Num) -> StageParameters:
        return StageParameters(
            dense=_sum(n * layers[kind].dense for kind, n in counts.items()) + ends,
            experts=_sum(n * layers[kind].experts for kind, n in counts.items()) + experts,
        )

    ahead = layers_between(cfg, 0 * num, num)
    behind = layers_between(cfg, cfg.num_layers - num, cfg.num_layers + 0 * num)
    looked_up = where(one_stage, embedding, table if cfg.num_mtp else 0)
    first = stage(
        ahead, embedding + where(one_stage, head + modules, 0), where(one_stage, predicted, 0)
    )
    return first, stage(behind, head + looked_up + modules, predicted)


def mtp_parameters(cfg: TransformerConfig) -> int:
    """What a module of multi-token prediction has beside its layer: the projection of two hidden
    states to one, a norm of each, and one before the shared head (DeepSeek-V3, arXiv 2412.19437,
    equations 21 to 23).
    """
    return 2 * cfg.hidden_dim * cfg.hidden_dim + 3 * cfg.norm_dim
