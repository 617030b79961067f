"""One layer on one rank: attention or a mixer, then a feed-forward block or its experts."""

from __future__ import annotations

from hwmodels.dtypes import BF16, DType
from workloads.models.architecture import (
    Attention,
    LatentAttention,
    TransformerConfig,
    has_block,
    has_experts,
    mixer_of,
)
from workloads.models.block import (
    Rank,
    Step,
    inner_norm,
    norm,
    pointwise,
    product,
    residual,
    rotation,
    unrolled,
)
from workloads.models.feed_forward import dense_steps, moe_steps
from workloads.models.mixer_layer import mixer_steps
from workloads.models.parameters import attention_projections, heads_per_rank, moe_of
from workloads.numeric import Num, any_true, maximum, minimum, where
from workloads.op import Op
from workloads.ops.attention import StandardAttention
from workloads.ops.attention_backward import StandardAttentionBackward
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.ops.linear_recurrence import LinearRecurrence
from workloads.ops.linear_recurrence_backward import LinearRecurrenceBackward
from workloads.plan import Plan
from workloads.workload import Workload


def layer(
    cfg: TransformerConfig,
    *,
    kind: str = "dense",
    batch: Num,
    len_q: Num,
    len_kv: Num | None = None,
    plan: Plan | None = None,
    training: bool,
    causal: bool = True,
    absorbed: bool = False,
    fused: bool = True,
    sequence_parallel: bool = True,
    dtype: DType = BF16,
) -> Workload:
    """One layer on one rank for a micro-batch of `batch` sequences of `len_q` new tokens.

    `len_kv` counts the cached positions and the new ones (default: `len_q`). `absorbed` applies to
    latent attention only: the expansion of K and V is folded into the query and the output, and
    all heads attend to the cached latent itself, which pays when few queries meet many keys
    (DeepSeek-V2, arXiv 2405.04434, section 2.1.2). Without `fused`, attention writes its scores;
    without `sequence_parallel`, tensor-parallel ranks repeat norms and residuals of all tokens.
    Sizes and plan fields may be arrays.

    >>> from workloads.models.config import load_hf_config
    >>> one = layer(load_hf_config("examples/llama3-8b.json"), batch=1, len_q=8192, training=False)
    >>> sum(n.op.min_flops()[BF16] for n in one.select(part="mlp") if n.op.name == "matmul")
    2886218022912
    """
    moe_of(cfg, kind)
    rank = Rank(
        cfg=cfg,
        plan=plan or Plan(),
        batch=batch,
        len_q=len_q,
        len_kv=len_q if len_kv is None else len_kv,
        causal=causal,
        absorbed=absorbed and isinstance(cfg.attention, LatentAttention),
        dtype=dtype,
        fused=fused,
        sequence_parallel=sequence_parallel,
    )
    mixer = mixer_of(cfg, kind)
    mixed = _attention(rank) if mixer is None else mixer_steps(rank, mixer)
    attention = [norm(rank, "attention_norm", opens_block=True), *mixed]
    if not has_block(kind):
        last = residual(rank, "attention_residual", (attention[-1].name,))
        return unrolled(f"{cfg.name} {kind} layer", [*attention, last], training)
    block = moe_steps(rank) if has_experts(kind) else dense_steps(rank)
    if cfg.norms_per_layer == 4:
        attention.append(norm(rank, "attention_post_norm"))
        block.append(norm(rank, "mlp_post_norm"))
    steps = [
        *attention,
        residual(rank, "attention_residual", (attention[-1].name,)),
        norm(rank, "mlp_norm", opens_block=True),
        *block,
        residual(rank, "mlp_residual", (block[-1].name, "attention_residual")),
    ]
    return unrolled(f"{cfg.name} {kind} layer", steps, training)


# ---- attention -----------------------------------------------------------------------------


def _attention(rank: Rank) -> list[Step]:
    """From the normed hidden state to the output projection."""
    spec = rank.cfg.attention
    if isinstance(spec, LatentAttention):
        inner = _absorbed_latent(rank, spec) if rank.absorbed else _expanded_latent(rank, spec)
    else:
        inner = _grouped(rank, spec)
    out = attention_projections(rank.cfg, rank.plan.tp)["out"]
    return [*inner, product(rank, "out", "attention", rank.tokens, out.k, out.n)]


def _grouped(rank: Rank, spec: Attention) -> list[Step]:
    """One product for q, k and v, norms and rotation of heads where present, attention."""
    qkv = attention_projections(rank.cfg, rank.plan.tp)["qkv"]
    q, kv = heads_per_rank(spec.num_heads, spec.num_kv_heads, rank.plan.tp)
    steps = [product(rank, "qkv", "attention", rank.tokens, qkv.k, qkv.n)]
    if spec.qk_norm:
        steps.append(inner_norm(rank, "qk_norm", rank.tokens * (q + kv), spec.head_dim))
    if spec.rope_dim:
        steps.append(rotation(rank, "rope", q + kv, spec.rope_dim))
    scores = _scores(rank, q, kv, spec.head_dim, spec.head_dim)
    return [*steps, *scores, *([_out_gate(rank, q * spec.head_dim)] if spec.out_gate else [])]


def _out_gate(rank: Rank, width: Num) -> Step:
    """Attention's output times the sigmoid of its gate."""
    elements = rank.tokens * width
    backward = pointwise(elements, 3, 2, (5, 2), rank.dtype)
    return Step(
        name="out_gate",
        part="attention",
        op=pointwise(elements, 2, 1, (2, 2), rank.dtype),
        gradients=(("backward", backward),),
    )


def _latent_query(rank: Rank, spec: LatentAttention) -> list[Step]:
    """Query heads, by way of a latent where there is one."""
    dims = attention_projections(rank.cfg, rank.plan.tp)
    steps: list[Step] = []
    if spec.q_lora_rank:
        steps = [
            product(rank, "q_a", "attention", rank.rows, dims["q_a"].k, dims["q_a"].n),
            inner_norm(rank, "q_a_norm", rank.rows, spec.q_lora_rank),
        ]
    steps.append(product(rank, "q_b", "attention", rank.tokens, dims["q_b"].k, dims["q_b"].n))
    return steps


def _latent_key(rank: Rank, spec: LatentAttention) -> list[Step]:
    """The K/V latent with the shared rotated key, and its norm."""
    kv_a = attention_projections(rank.cfg, rank.plan.tp)["kv_a"]
    opening = ("attention_norm",)
    return [
        product(rank, "kv_a", "attention", rank.rows, kv_a.k, kv_a.n, after=opening),
        inner_norm(rank, "kv_a_norm", rank.rows, spec.kv_lora_rank),
    ]


def _expanded_latent(rank: Rank, spec: LatentAttention) -> list[Step]:
    """K and V of every head expanded from the latent: training and prefill."""
    heads, _ = heads_per_rank(spec.num_heads, spec.num_heads, rank.plan.tp)
    kv_b = attention_projections(rank.cfg, rank.plan.tp)["kv_b"]
    return [
        *_latent_query(rank, spec),
        *_latent_key(rank, spec),
        product(rank, "kv_b", "attention", rank.tokens, kv_b.k, kv_b.n),
        rotation(rank, "rope", heads + 1, spec.qk_rope_head_dim, ("q_b", "kv_b")),
        *_scores(rank, heads, heads, spec.head_dim, spec.v_head_dim),
    ]


def _absorbed_latent(rank: Rank, spec: LatentAttention) -> list[Step]:
    """All heads attend to the latent, one K/V head of latent_dim and kv_lora_rank: decoding."""
    heads, _ = heads_per_rank(spec.num_heads, spec.num_heads, rank.plan.tp)
    latent, nope, v = spec.kv_lora_rank, spec.qk_nope_head_dim, spec.v_head_dim
    query = _latent_query(rank, spec)
    return [
        *query,
        product(rank, "q_absorb", "attention", rank.tokens, nope, latent, batch=heads),
        *_latent_key(rank, spec),
        rotation(rank, "rope", heads + 1, spec.qk_rope_head_dim, ("q_absorb", "kv_a_norm")),
        *_scores(rank, heads, 1, spec.latent_dim, latent),
        product(rank, "v_absorb", "attention", rank.tokens, latent, v, batch=heads),
    ]


def _scores(rank: Rank, heads: Num, kv_heads: Num, head_dim: int, v_dim: int) -> list[Step]:
    """Attention, forward and backward, in as many pieces as windows make of it."""
    whole = FlashAttention2(
        batch=rank.batch,
        num_heads=heads,
        num_kv_heads=kv_heads,
        len_q=rank.len_q,
        len_kv=rank.len_kv,
        head_dim=head_dim,
        head_dim_v=v_dim,
        causal=rank.causal,
        dtype=rank.dtype,
    )
    linear = rank.cfg.linear_frac
    softmax = [
        Step(
            name=name,
            part="attention",
            op=forward,
            gradients=(("backward", backward),),
            count=count * (1 - linear) / rank.plan.cp,
        )
        for name, op, count in _windowed(rank, whole)
        for forward, backward in (_kernels(op, fused=rank.fused),)
    ]
    if not linear:
        return softmax
    return [*(softmax if linear < 1 else []), _linear(rank, whole, linear)]


def _linear(rank: Rank, whole: FlashAttention2, frac: float) -> Step:
    """Linear attention in chunks, on the layers that have it; K and V are repeated for heads."""
    forward = LinearRecurrence(
        batch=whole.batch, num_heads=whole.num_heads, len_seq=whole.len_q,
        key_dim=whole.head_dim, value_dim=whole.value_dim, dtype=whole.dtype,
    )  # fmt: skip
    backward = LinearRecurrenceBackward(
        batch=whole.batch, num_heads=whole.num_heads, len_seq=whole.len_q,
        key_dim=whole.head_dim, value_dim=whole.value_dim, dtype=whole.dtype,
    )  # fmt: skip
    return Step(
        name="linear_attention",
        part="attention",
        op=forward,
        gradients=(("backward", backward),),
        count=frac / rank.plan.cp,
    )


def _kernels(op: FlashAttention2, *, fused: bool) -> tuple[Op, Op]:
    """Attention and its backward, fused or with its scores in memory."""
    if fused:
        return op, FlashAttention2Backward(**vars(op))
    return StandardAttention(**vars(op)), StandardAttentionBackward(**vars(op))


def _windowed(rank: Rank, whole: FlashAttention2) -> list[tuple[str, FlashAttention2, Num]]:
    """Names, ops and counts: the layers without a window, and the pieces of those with one.

    A query sees min(window, position) keys. With w the window and p = len_kv - len_q, the first
    min(max(w - p, 0), len_q) queries see all that precedes them, each later one meets w keys.
    """
    window, frac = rank.cfg.window, rank.cfg.windowed_frac
    if window is None or not rank.causal or not any_true(rank.len_kv > window):
        return [("attention", whole, 1)]
    past = rank.len_kv - rank.len_q
    first = minimum(maximum(window - past, 0), rank.len_q)
    later = rank.len_q - first
    pieces: list[tuple[str, FlashAttention2, Num]] = []
    if frac < 1:
        pieces.append(("attention", whole, 1 - frac))
    if any_true(first > 0):
        len_q = maximum(first, 1)
        op = whole.over(len_q=len_q, len_kv=maximum(past + first, len_q))
        pieces.append(("attention.first", op, where(first > 0, frac, 0)))
    if any_true(later > 0):
        op = whole.over(len_q=maximum(later, 1), len_kv=window, causal=False)
        pieces.append(("attention.window", op, where(later > 0, frac, 0)))
    return pieces
