"""A transformer as ops: what one rank computes for one micro-batch, forward and backward.

`layer` is one layer, `ends` what precedes and follows the layers, `optimizer` the update. With t
tokens of a micro-batch on a rank, t = ceil(batch len_q / cp):

    split by tp           columns of q, k, v and of the widening MLP matrices, rows of the others,
                          vocabulary of the embedding and the head
    on ceil(t / tp) rows  norms, residual additions, the router, dispatch and combination of expert
                          inputs, the latent down-projections: sequence parallelism (Korthikanti et
                          al. 2022, arXiv 2205.05198, section 4.2.2)
    attention             ceil(heads / tp) heads of the whole sequence, done 1 / cp times: a ring
                          over a balanced (zigzag) causal layout gives every rank that share
    experts               ceil(experts / ep) per rank, each split by tp, loads balanced: a rank
                          works on t * num_active rows

Sizes that do not divide are rounded up, so that a rank is never given too little. A window that
only some layers have is averaged over the layers: `Node.count` is then a fraction.

Backward: each product gives `dgrad` and `wgrad` (FP32, written once), attention its fused
backward, everything else a map of its own; a `wgrad` waits only for its gradient, nothing waits
for it. Where the residual stream forks, the gradients are added in a kernel (`.accumulate`).

Ignored: bias additions and their gradients, soft caps, dropout, the softmax and top-k of the
router, the sort of received rows by expert, copies that join or split heads, sums of gradients
within a block (a product adds into its output), and all communication: that is the simulator's.
Recomputation is not unrolled: a fully recomputed layer runs its forward nodes twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from hwmodels.errors import InputError
from workloads.models.config import RMS_NORM, Attention, LatentAttention, Moe, TransformerConfig
from workloads.models.parameters import (
    attention_projections,
    heads_per_rank,
    matmul_parameters,
    mlp_projections,
    moe_of,
)
from workloads.numeric import Num, any_true, ceil_div, maximum, minimum, where
from workloads.op import Op, checked_size
from workloads.ops.elementwise import (
    Elementwise,
    adam_step,
    add,
    gelu,
    gelu_backward,
    rope,
    silu_mul,
    silu_mul_backward,
)
from workloads.ops.embedding import Embedding, EmbeddingBackward
from workloads.ops.flash_attention import FlashAttention2, FlashAttention2Backward
from workloads.ops.matmul import Matmul
from workloads.ops.norm import LayerNorm, LayerNormBackward, RmsNorm, RmsNormBackward
from workloads.ops.softmax import Softmax
from workloads.plan import Plan
from workloads.workload import BACKWARD, FORWARD, OPTIMIZER, Node, Workload

# Vector flops and special functions per element of the activations that have no named map:
# forward, backward. Products with the gate and its gradient are included where gated.
_ACTIVATION_COUNTS: Final = {
    ("silu", False): ((2, 2), (6, 2)),
    ("gelu", True): ((8, 1), (18, 1)),
    ("relu", False): ((1, 0), (1, 0)),
    ("relu", True): ((2, 0), (4, 0)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """One forward op and what its backward pass adds.

    `gradients` run one after the other and hand the gradient on; `weight_gradients` hang off.
    `after` names earlier steps; None: the step before.
    """

    name: str
    part: str
    op: Op
    gradients: tuple[tuple[str, Op], ...] = ()
    weight_gradients: tuple[tuple[str, Op], ...] = ()
    count: Num = 1
    after: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rank:
    """Everything the steps of one rank depend on; `rows` is the sequence-parallel share."""

    cfg: TransformerConfig
    plan: Plan
    batch: Num
    len_q: Num
    len_kv: Num
    causal: bool
    absorbed: bool
    dtype: DType

    @property
    def tokens(self) -> Num:
        return ceil_div(self.batch * self.len_q, self.plan.cp)

    @property
    def rows(self) -> Num:
        return ceil_div(self.tokens, self.plan.tp)


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
    dtype: DType = BF16,
) -> Workload:
    """One layer on one rank for a micro-batch of `batch` sequences of `len_q` new tokens.

    `len_kv` counts the cached positions and the new ones (default: `len_q`). `absorbed` applies to
    latent attention only: the expansion of K and V is folded into the query and the output, and
    all heads attend to the cached latent itself, which pays when few queries meet many keys
    (DeepSeek-V2, arXiv 2405.04434, section 2.1.2). Sizes and plan fields may be arrays.

    >>> from workloads.models.config import load_hf_config
    >>> one = layer(load_hf_config("examples/llama3-8b.json"), batch=1, len_q=8192, training=False)
    >>> sum(n.op.min_flops()[BF16] for n in one.select(part="mlp") if n.op.name == "matmul")
    2886218022912
    """
    moe_of(cfg, kind)
    rank = _Rank(
        cfg=cfg,
        plan=plan or Plan(),
        batch=batch,
        len_q=len_q,
        len_kv=len_q if len_kv is None else len_kv,
        causal=causal,
        absorbed=absorbed and isinstance(cfg.attention, LatentAttention),
        dtype=dtype,
    )
    attention = [_norm(rank, "attention_norm", opens_block=True), *_attention(rank)]
    block = _moe(rank) if kind == "moe" else _mlp(rank)
    if cfg.norms_per_layer == 4:
        attention.append(_norm(rank, "attention_post_norm"))
        block.append(_norm(rank, "mlp_post_norm"))
    steps = [
        *attention,
        _residual(rank, "attention_residual", (attention[-1].name,)),
        _norm(rank, "mlp_norm", opens_block=True),
        *block,
        _residual(rank, "mlp_residual", (block[-1].name, "attention_residual")),
    ]
    return _unrolled(f"{cfg.name} {kind} layer", steps, training)


def _unrolled(name: str, steps: Sequence[_Step], training: bool) -> Workload:
    """Forward nodes in order, then the backward nodes of each step in the opposite order."""
    nodes: list[Node] = []
    consumers: dict[str, list[str]] = {}
    for i, step in enumerate(steps):
        after = step.after if step.after is not None else tuple(s.name for s in steps[:i][-1:])
        for source in after:
            consumers.setdefault(source, []).append(step.name)
        nodes.append(_node(step, step.name, step.op, FORWARD, after))
    if not training:
        return Workload(tuple(nodes), name)
    carriers: dict[str, tuple[str, ...]] = {}
    for step in reversed(steps):
        sources = [c for user in consumers.get(step.name, ()) for c in carriers[user]]
        waits = tuple(dict.fromkeys(sources)) or (steps[-1].name,)
        for suffix, op in step.weight_gradients:
            nodes.append(_node(step, f"{step.name}.{suffix}", op, BACKWARD, waits))
        for suffix, op in step.gradients:
            nodes.append(_node(step, f"{step.name}.{suffix}", op, BACKWARD, waits))
            waits = (f"{step.name}.{suffix}",)
        carriers[step.name] = waits
    return Workload(tuple(nodes), name)


def _node(step: _Step, name: str, op: Op, phase: str, after: tuple[str, ...]) -> Node:
    return Node(name=name, op=op, part=step.part, phase=phase, count=step.count, after=after)


# ---- pieces --------------------------------------------------------------------------------


def _product(
    rank: _Rank,
    name: str,
    part: str,
    m: Num,
    k: Num,
    n: Num,
    *,
    batch: Num = 1,
    out_dtype: DType | None = None,
    after: tuple[str, ...] | None = None,
) -> _Step:
    """Y[m, n] = X[m, k] W[k, n], dX = dY W^T, dW = X^T dY."""
    dtype = rank.dtype
    dgrad = Matmul(batch=batch, m=m, n=k, k=n, dtype=dtype)
    wgrad = Matmul(batch=batch, m=k, n=n, k=m, dtype=dtype, out_dtype=FP32)
    return _Step(
        name=name,
        part=part,
        op=Matmul(batch=batch, m=m, n=n, k=k, dtype=dtype, out_dtype=out_dtype),
        gradients=(("dgrad", dgrad),),
        weight_gradients=(("wgrad", wgrad),),
        after=after,
    )


def _norm_ops(rank: _Rank, rows: Num, cols: Num, *, rms: bool) -> tuple[Op, Op]:
    """A norm and its backward."""
    if rms:
        forward: Op = RmsNorm(rows=rows, cols=cols, dtype=rank.dtype)
        return forward, RmsNormBackward(rows=rows, cols=cols, dtype=rank.dtype)
    forward = LayerNorm(rows=rows, cols=cols, dtype=rank.dtype)
    return forward, LayerNormBackward(rows=rows, cols=cols, dtype=rank.dtype)


def _norm(
    rank: _Rank,
    name: str,
    *,
    opens_block: bool = False,
    rows: Num | None = None,
    part: str = "norm",
) -> _Step:
    """A norm over the hidden state; where it opens a block, the residual gradient joins after."""
    rows, hidden = rank.rows if rows is None else rows, rank.cfg.hidden_dim
    forward, backward = _norm_ops(rank, rows, hidden, rms=rank.cfg.norm == RMS_NORM)
    gradients = [("backward", backward)]
    if opens_block:
        gradients.append(("accumulate", add(rows * hidden, rank.dtype)))
    return _Step(name=name, part=part, op=forward, gradients=tuple(gradients))


def _inner_norm(
    rank: _Rank, name: str, rows: Num, cols: Num, after: tuple[str, ...] | None = None
) -> _Step:
    """A norm inside attention, always RMSNorm: over each head of q and k, or over a latent."""
    forward, backward = _norm_ops(rank, rows, cols, rms=True)
    return _Step(
        name=name, part="norm", op=forward, gradients=(("backward", backward),), after=after
    )


def _residual(rank: _Rank, name: str, after: tuple[str, ...]) -> _Step:
    """h + f(h); its gradient is the incoming one, for both terms."""
    op = add(rank.rows * rank.cfg.hidden_dim, rank.dtype)
    return _Step(name=name, part="residual", op=op, after=after)


def _rotation(
    rank: _Rank, name: str, num_heads: Num, dim: int, after: tuple[str, ...] | None = None
) -> _Step:
    """Rotary positions of q and k; the gradient turns back at the same price."""
    op = rope(rank.tokens, num_heads, dim, rank.dtype)
    return _Step(name=name, part="attention", op=op, gradients=(("backward", op),), after=after)


def _activation(rank: _Rank, name: str, part: str, num_elements: Num) -> _Step:
    """The activation of the MLP, with the product by the gate where gated."""
    mlp, dtype = rank.cfg.mlp, rank.dtype
    if (mlp.activation, mlp.gated) == ("silu", True):
        forward, backward = silu_mul(num_elements, dtype), silu_mul_backward(num_elements, dtype)
    elif (mlp.activation, mlp.gated) == ("gelu", False):
        forward, backward = gelu(num_elements, dtype), gelu_backward(num_elements, dtype)
    else:
        counts, backward_counts = _ACTIVATION_COUNTS[mlp.activation, mlp.gated]
        arrays = 2 if mlp.gated else 1
        forward = _map(num_elements, arrays, 1, counts, dtype)
        backward = _map(num_elements, arrays + 1, arrays, backward_counts, dtype)
    return _Step(name=name, part=part, op=forward, gradients=(("backward", backward),))


def _map(
    num_elements: Num, num_inputs: Num, num_outputs: Num, counts: tuple[Num, Num], dtype: DType
) -> Elementwise:
    """A pointwise map with that many vector flops and special functions per element."""
    return Elementwise(
        num_elements=num_elements,
        num_inputs=num_inputs,
        num_outputs=num_outputs,
        vector_flops_per_element=counts[0],
        special_ops_per_element=counts[1],
        dtype=dtype,
    )


# ---- attention -----------------------------------------------------------------------------


def _attention(rank: _Rank) -> list[_Step]:
    """From the normed hidden state to the output projection."""
    spec = rank.cfg.attention
    if isinstance(spec, LatentAttention):
        inner = _absorbed_latent(rank, spec) if rank.absorbed else _expanded_latent(rank, spec)
    else:
        inner = _grouped(rank, spec)
    out = attention_projections(rank.cfg, rank.plan.tp)["out"]
    return [*inner, _product(rank, "out", "attention", rank.tokens, out.k, out.n)]


def _grouped(rank: _Rank, spec: Attention) -> list[_Step]:
    """One product for q, k and v, norms and rotation of heads where present, attention."""
    qkv = attention_projections(rank.cfg, rank.plan.tp)["qkv"]
    q, kv = heads_per_rank(spec.num_heads, spec.num_kv_heads, rank.plan.tp)
    steps = [_product(rank, "qkv", "attention", rank.tokens, qkv.k, qkv.n)]
    if spec.qk_norm:
        steps.append(_inner_norm(rank, "qk_norm", rank.tokens * (q + kv), spec.head_dim))
    if spec.rope_dim:
        steps.append(_rotation(rank, "rope", q + kv, spec.rope_dim))
    return [*steps, *_scores(rank, q, kv, spec.head_dim, spec.head_dim)]


def _latent_query(rank: _Rank, spec: LatentAttention) -> list[_Step]:
    """Query heads, by way of a latent where there is one."""
    dims = attention_projections(rank.cfg, rank.plan.tp)
    steps: list[_Step] = []
    if spec.q_lora_rank:
        steps = [
            _product(rank, "q_a", "attention", rank.rows, dims["q_a"].k, dims["q_a"].n),
            _inner_norm(rank, "q_a_norm", rank.rows, spec.q_lora_rank),
        ]
    steps.append(_product(rank, "q_b", "attention", rank.tokens, dims["q_b"].k, dims["q_b"].n))
    return steps


def _latent_key(rank: _Rank, spec: LatentAttention) -> list[_Step]:
    """The K/V latent with the shared rotated key, and its norm."""
    kv_a = attention_projections(rank.cfg, rank.plan.tp)["kv_a"]
    opening = ("attention_norm",)
    return [
        _product(rank, "kv_a", "attention", rank.rows, kv_a.k, kv_a.n, after=opening),
        _inner_norm(rank, "kv_a_norm", rank.rows, spec.kv_lora_rank),
    ]


def _expanded_latent(rank: _Rank, spec: LatentAttention) -> list[_Step]:
    """K and V of every head expanded from the latent: training and prefill."""
    heads, _ = heads_per_rank(spec.num_heads, spec.num_heads, rank.plan.tp)
    kv_b = attention_projections(rank.cfg, rank.plan.tp)["kv_b"]
    return [
        *_latent_query(rank, spec),
        *_latent_key(rank, spec),
        _product(rank, "kv_b", "attention", rank.tokens, kv_b.k, kv_b.n),
        _rotation(rank, "rope", heads + 1, spec.qk_rope_head_dim, ("q_b", "kv_b")),
        *_scores(rank, heads, heads, spec.head_dim, spec.v_head_dim),
    ]


def _absorbed_latent(rank: _Rank, spec: LatentAttention) -> list[_Step]:
    """All heads attend to the latent, one K/V head of latent_dim and kv_lora_rank: decoding."""
    heads, _ = heads_per_rank(spec.num_heads, spec.num_heads, rank.plan.tp)
    latent, nope, v = spec.kv_lora_rank, spec.qk_nope_head_dim, spec.v_head_dim
    query = _latent_query(rank, spec)
    return [
        *query,
        _product(rank, "q_absorb", "attention", rank.tokens, nope, latent, batch=heads),
        *_latent_key(rank, spec),
        _rotation(rank, "rope", heads + 1, spec.qk_rope_head_dim, ("q_absorb", "kv_a_norm")),
        *_scores(rank, heads, 1, spec.latent_dim, latent),
        _product(rank, "v_absorb", "attention", rank.tokens, latent, v, batch=heads),
    ]


def _scores(rank: _Rank, heads: Num, kv_heads: Num, head_dim: int, v_dim: int) -> list[_Step]:
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
    return [
        _Step(
            name=name,
            part="attention",
            op=op,
            gradients=(("backward", FlashAttention2Backward(**vars(op))),),
            count=count / rank.plan.cp,
        )
        for name, op, count in _windowed(rank, whole)
    ]


def _windowed(rank: _Rank, whole: FlashAttention2) -> list[tuple[str, FlashAttention2, Num]]:
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


# ---- feed-forward --------------------------------------------------------------------------


def _mlp(rank: _Rank) -> list[_Step]:
    """Widen, activate, narrow."""
    return _block(rank, "", "mlp", rank.cfg.mlp.ffn_dim)


def _block(
    rank: _Rank, prefix: str, part: str, ffn_dim: int, after: tuple[str, ...] | None = None
) -> list[_Step]:
    """A feed-forward block over all tokens of the rank."""
    dims = mlp_projections(rank.cfg, ffn_dim, rank.plan.tp)
    up, down = dims["up"], dims["down"]
    return [
        _product(rank, f"{prefix}up", part, rank.tokens, up.k, up.n, after=after),
        _activation(rank, f"{prefix}activation", part, rank.tokens * down.k),
        _product(rank, f"{prefix}down", part, rank.tokens, down.k, down.n),
    ]


def _moe(rank: _Rank) -> list[_Step]:
    """Router, dispatch, experts, shared experts, weighted sum of what came back."""
    cfg, moe, dtype = rank.cfg, rank.cfg.moe, rank.dtype
    assert moe is not None
    chosen, elements, opening = moe.num_active, rank.rows * cfg.hidden_dim, ("mlp_norm",)
    hidden, choices = cfg.hidden_dim, moe.num_experts
    router = _product(
        rank, "router", "moe", rank.rows, hidden, choices, out_dtype=FP32, after=opening
    )
    dispatch = _Step(
        name="dispatch",
        part="moe",
        op=_map(elements, 1, chosen, (0, 0), dtype),
        gradients=(("backward", _map(elements, chosen, 1, (chosen - 1, 0), dtype)),),
        after=("mlp_norm", "router"),
    )
    has_shared = moe.shared_ffn_dim > 0
    shared = _block(rank, "shared.", "moe", moe.shared_ffn_dim, opening) if has_shared else []
    combine = _Step(
        name="combine",
        part="moe",
        op=_map(elements, chosen + has_shared, 1, (2 * chosen - 1 + has_shared, 0), dtype),
        gradients=(("backward", _map(elements, 1 + chosen, chosen, (3 * chosen, 0), dtype)),),
        after=("experts.down", "router", *(["shared.down"] if has_shared else [])),
    )
    return [router, dispatch, *_experts(rank, moe), *shared, combine]


def _experts(rank: _Rank, moe: Moe) -> list[_Step]:
    """The routed experts of a rank as one batched block.

    Its t * num_active rows are spread evenly over as many of its experts as there are rows for:
    with few tokens some experts idle, and their weights are not read.
    """
    dims = mlp_projections(rank.cfg, moe.expert_ffn_dim, rank.plan.tp)
    up, down = dims["up"], dims["down"]
    num_rows = rank.tokens * moe.num_active
    busy = minimum(ceil_div(moe.num_experts, rank.plan.ep), num_rows)
    m = ceil_div(num_rows, busy)
    return [
        _product(rank, "experts.up", "moe", m, up.k, up.n, batch=busy),
        _activation(rank, "experts.activation", "moe", busy * m * down.k),
        _product(rank, "experts.down", "moe", m, down.k, down.n, batch=busy),
    ]


# ---- before and after the layers -----------------------------------------------------------


def ends(
    cfg: TransformerConfig,
    *,
    batch: Num,
    len_q: Num,
    plan: Plan | None = None,
    training: bool,
    last_token_only: bool = False,
    dtype: DType = BF16,
) -> Workload:
    """Embedding and positions (part 'embedding'), final norm, head and loss (part 'head').

    The first pipeline stage has the one part, the last the other. The head writes FP32 logits;
    in training a softmax keeps the probabilities and their gradient is one more pass over them.
    `last_token_only`: logits for one token per sequence, as prefill needs them.
    """
    rank = _Rank(
        cfg=cfg,
        plan=plan or Plan(),
        batch=batch,
        len_q=len_q,
        len_kv=len_q,
        causal=True,
        absorbed=False,
        dtype=dtype,
    )
    steps = [*_entry(rank), *_exit(rank, batch if last_token_only else rank.tokens, training)]
    return _unrolled(f"{cfg.name} ends", steps, training)


def _entry(rank: _Rank) -> list[_Step]:
    """Look up tokens, project where the table is narrower, add positions."""
    cfg, part = rank.cfg, "embedding"
    table = ceil_div(cfg.vocab_size, rank.plan.tp)
    steps = [_lookup(rank, "embedding", rank.tokens, table, cfg.embedding_dim)]
    if cfg.embedding_dim != cfg.hidden_dim:
        steps.append(
            _product(rank, "project_in", part, rank.rows, cfg.embedding_dim, cfg.hidden_dim)
        )
    if cfg.num_positions:
        steps.append(_lookup(rank, "positions", rank.rows, cfg.num_positions, cfg.hidden_dim))
        op = add(rank.rows * cfg.hidden_dim, rank.dtype)
        steps.append(
            _Step(name="add_positions", part=part, op=op, after=(steps[-2].name, "positions"))
        )
    return steps


def _lookup(rank: _Rank, name: str, num_tokens: Num, vocab_size: Num, dim: int) -> _Step:
    op = Embedding(num_tokens=num_tokens, vocab_size=vocab_size, dim=dim, dtype=rank.dtype)
    backward = EmbeddingBackward(
        num_tokens=num_tokens, vocab_size=vocab_size, dim=dim, dtype=rank.dtype
    )
    return _Step(
        name=name,
        part="embedding",
        op=op,
        weight_gradients=(("backward", backward),),
        after=(),
    )


def _exit(rank: _Rank, tokens: Num, training: bool) -> list[_Step]:
    """Final norm, projection where the table is narrower, logits, softmax cross-entropy."""
    cfg, part = rank.cfg, "head"
    rows, columns = ceil_div(tokens, rank.plan.tp), ceil_div(cfg.vocab_size, rank.plan.tp)
    steps = [_norm(rank, "final_norm", rows=rows, part=part)] if cfg.final_norm else []
    if cfg.embedding_dim != cfg.hidden_dim:
        steps.append(_product(rank, "project_out", part, rows, cfg.hidden_dim, cfg.embedding_dim))
    steps.append(_product(rank, "head", part, tokens, cfg.embedding_dim, columns, out_dtype=FP32))
    if training:
        backward = Elementwise(
            num_elements=tokens * columns,
            vector_flops_per_element=2,
            dtype=FP32,
            out_dtype=rank.dtype,
        )
        op = Softmax(rows=tokens, cols=columns, dtype=FP32)
        steps.append(_Step(name="loss", part=part, op=op, gradients=(("backward", backward),)))
    return steps


def optimizer(num_parameters: Num, *, grad_bytes: Num = 4, weight_bytes: Num = 2) -> Workload:
    """One Adam step over the parameters a rank updates (a shard, where ZeRO splits them)."""
    op = adam_step(ceil_div(num_parameters, 1), grad_bytes=grad_bytes, weight_bytes=weight_bytes)
    return Workload((Node(name="adam", op=op, part="optimizer", phase=OPTIMIZER),), "optimizer")


# ---- whole steps ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainStep:
    """One optimizer step over `global_batch` sequences of `len_seq` tokens."""

    config: TransformerConfig
    len_seq: Num
    global_batch: Num

    def __post_init__(self) -> None:
        for name in ("len_seq", "global_batch"):
            object.__setattr__(self, name, checked_size("train_step", name, getattr(self, name)))

    @property
    def num_tokens(self) -> Num:
        """Tokens of the whole step."""
        return self.len_seq * self.global_batch

    @property
    def model_flops(self) -> Num:
        """What the step needs by the MFU convention; see `model_flops`."""
        return model_flops(self.config, self.len_seq, self.num_tokens)

    def layer(self, kind: str, plan: Plan, *, dtype: DType = BF16) -> Workload:
        """One layer, forward and backward, for one micro-batch on one rank."""
        return layer(
            self.config,
            kind=kind,
            batch=plan.micro_batch,
            len_q=self.len_seq,
            plan=plan,
            training=True,
            dtype=dtype,
        )

    def ends(self, plan: Plan, *, dtype: DType = BF16) -> Workload:
        """Embedding, head and loss for one micro-batch on one rank."""
        return ends(
            self.config,
            batch=plan.micro_batch,
            len_q=self.len_seq,
            plan=plan,
            training=True,
            dtype=dtype,
        )


PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """One forward pass of `batch` sequences on one data-parallel replica.

    Prefill: all `len_context` positions are new. Decode: one new token per sequence, which is the
    last of `len_context` positions.
    """

    config: TransformerConfig
    phase: str
    batch: Num
    len_context: Num

    def __post_init__(self) -> None:
        if self.phase not in (PREFILL, DECODE):
            raise InputError(f"phase '{self.phase}' is neither '{PREFILL}' nor '{DECODE}'")
        for name in ("batch", "len_context"):
            object.__setattr__(self, name, checked_size(self.phase, name, getattr(self, name)))

    @property
    def len_new(self) -> Num:
        """New tokens per sequence."""
        return self.len_context if self.phase == PREFILL else 1

    @property
    def num_tokens(self) -> Num:
        """New tokens of the pass."""
        return self.batch * self.len_new

    def layer(self, kind: str, plan: Plan, *, dtype: DType = BF16) -> Workload:
        """One layer on one rank; decoding takes latent attention in its absorbed form."""
        self._check(plan)
        return layer(
            self.config,
            kind=kind,
            batch=self.batch,
            len_q=self.len_new,
            len_kv=self.len_context,
            plan=plan,
            training=False,
            absorbed=self.phase == DECODE,
            dtype=dtype,
        )

    def ends(self, plan: Plan, *, dtype: DType = BF16) -> Workload:
        """Embedding and head on one rank; logits for the last token of each sequence."""
        self._check(plan)
        return ends(
            self.config,
            batch=self.batch,
            len_q=self.len_new,
            plan=plan,
            training=False,
            last_token_only=True,
            dtype=dtype,
        )

    def _check(self, plan: Plan) -> None:
        if self.phase == DECODE and any_true(np.not_equal(plan.cp, 1)):
            raise InputError("decode: one new token cannot be split over cp ranks; give cp = 1")


def train_step(cfg: TransformerConfig, *, len_seq: Num, global_batch: Num) -> TrainStep:
    """One optimizer step as a value that planners take."""
    return TrainStep(config=cfg, len_seq=len_seq, global_batch=global_batch)


def prefill_step(cfg: TransformerConfig, *, batch: Num, len_context: Num) -> Inference:
    """Reading `batch` prompts of `len_context` tokens."""
    return Inference(config=cfg, phase=PREFILL, batch=batch, len_context=len_context)


def decode_step(cfg: TransformerConfig, *, batch: Num, len_context: Num) -> Inference:
    """One new token for each of `batch` sequences, at `len_context` positions with it."""
    return Inference(config=cfg, phase=DECODE, batch=batch, len_context=len_context)


def model_flops_forward(cfg: TransformerConfig, len_seq: Num, num_tokens: Num) -> Num:
    """Matrix flops of the forward pass over `num_tokens` tokens in sequences of `len_seq`.

        2 N num_tokens + 2 heads (d_qk + d_v) keys num_tokens, summed over layers

    N: `matmul_parameters`, chosen experts only, the head included, the embedding lookup not. keys
    is the mean number a token attends to: len_seq / 2 under a causal mask, exactly half, and
    w - w^2 / (2 len_seq) with a window w < len_seq (Chowdhery et al. 2022, arXiv 2204.02311,
    appendix B, which counts the whole square, halved for the mask). Latent attention in its
    expanded form.

    >>> from workloads.models.config import load_hf_config
    >>> model_flops_forward(load_hf_config("examples/llama3-8b.json"), 8192, 1) / 1e9
    17.156800512
    """
    spec = cfg.attention
    keys = len_seq / 2
    if cfg.window:
        w = minimum(cfg.window, len_seq)
        keys = keys + cfg.windowed_frac * (w - w * w / (2 * len_seq) - keys)
    per_key = 2 * spec.num_heads * (spec.head_dim + spec.v_head_dim)
    return (2 * matmul_parameters(cfg) + cfg.num_layers * per_key * keys) * num_tokens


def model_flops(cfg: TransformerConfig, len_seq: Num, num_tokens: Num) -> Num:
    """Matrix flops of a training step by the MFU convention: three times the forward pass.

    Forward and backward without recomputation; what a kernel does beyond that (the scores that
    a fused attention computes again, masked-out tile parts) does not count.

    >>> from workloads.models.config import load_hf_config
    >>> model_flops(load_hf_config("examples/llama3-8b.json"), 8192, 1) / 1e9
    51.470401536
    """
    return 3 * model_flops_forward(cfg, len_seq, num_tokens)
