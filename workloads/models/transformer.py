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

from dataclasses import dataclass, replace

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from hwmodels.errors import InputError
from workloads.models.architecture import TransformerConfig
from workloads.models.block import Rank, Step, norm, product, unrolled
from workloads.models.layer import layer
from workloads.models.mixers import AnyMixer
from workloads.models.mtp import mtp_ends
from workloads.models.parameters import matmul_parameters
from workloads.numeric import Num, any_true, ceil_div, minimum
from workloads.op import checked_size
from workloads.ops.elementwise import Elementwise, adam_step, add
from workloads.ops.embedding import Embedding, EmbeddingBackward
from workloads.ops.softmax import Softmax
from workloads.plan import Plan
from workloads.workload import OPTIMIZER, Node, Workload

__all__ = [
    "DECODE",
    "PREFILL",
    "Inference",
    "TrainStep",
    "decode_step",
    "ends",
    "layer",
    "model_flops",
    "model_flops_forward",
    "optimizer",
    "prefill_step",
    "train_step",
]


def ends(
    cfg: TransformerConfig,
    *,
    batch: Num,
    len_q: Num,
    plan: Plan | None = None,
    training: bool,
    last_token_only: bool = False,
    sequence_parallel: bool = True,
    dtype: DType = BF16,
) -> Workload:
    """Embedding and positions (part 'embedding'), final norm, head and loss (part 'head').

    The first pipeline stage has the one part, the last the other. The head writes FP32 logits;
    in training a softmax keeps the probabilities and their gradient is one more pass over them.
    `last_token_only`: logits for one token per sequence, as prefill needs them. In training, part
    'mtp' is what modules of multi-token prediction repeat of them; their layers are not in it.
    """
    rank = Rank(
        cfg=cfg,
        plan=plan or Plan(),
        batch=batch,
        len_q=len_q,
        len_kv=len_q,
        causal=True,
        absorbed=False,
        dtype=dtype,
        sequence_parallel=sequence_parallel,
    )
    steps = [*_entry(rank), *_exit(rank, batch if last_token_only else rank.tokens, training)]
    once = unrolled(f"{cfg.name} ends", steps, training)
    if not (training and cfg.num_mtp):
        return once
    module = (replace(n, count=cfg.num_mtp * n.count) for n in mtp_ends(rank, once))
    return Workload((*once, *module), once.name)


def _entry(rank: Rank) -> list[Step]:
    """Look up tokens, project where the table is narrower, add positions."""
    cfg, part = rank.cfg, "embedding"
    table = ceil_div(cfg.vocab_size, rank.plan.tp)
    steps = [_lookup(rank, "embedding", rank.tokens, table, cfg.embedding_dim)]
    if cfg.embedding_dim != cfg.hidden_dim:
        steps.append(
            product(rank, "project_in", part, rank.rows, cfg.embedding_dim, cfg.hidden_dim)
        )
    if cfg.num_positions:
        steps.append(_lookup(rank, "positions", rank.rows, cfg.num_positions, cfg.hidden_dim))
        op = add(rank.rows * cfg.hidden_dim, rank.dtype)
        steps.append(
            Step(name="add_positions", part=part, op=op, after=(steps[-2].name, "positions"))
        )
    return steps


def _lookup(rank: Rank, name: str, num_tokens: Num, vocab_size: Num, dim: int) -> Step:
    op = Embedding(num_tokens=num_tokens, vocab_size=vocab_size, dim=dim, dtype=rank.dtype)
    backward = EmbeddingBackward(
        num_tokens=num_tokens, vocab_size=vocab_size, dim=dim, dtype=rank.dtype
    )
    return Step(
        name=name,
        part="embedding",
        op=op,
        weight_gradients=(("backward", backward),),
        after=(),
    )


def _exit(rank: Rank, tokens: Num, training: bool) -> list[Step]:
    """Final norm, projection where the table is narrower, logits, softmax cross-entropy."""
    cfg, part = rank.cfg, "head"
    columns = ceil_div(cfg.vocab_size, rank.plan.tp)
    rows = ceil_div(tokens, rank.plan.tp) if rank.sequence_parallel else tokens
    steps = [norm(rank, "final_norm", rows=rows, part=part)] if cfg.final_norm else []
    if cfg.embedding_dim != cfg.hidden_dim:
        steps.append(product(rank, "project_out", part, rows, cfg.hidden_dim, cfg.embedding_dim))
    steps.append(product(rank, "head", part, tokens, cfg.embedding_dim, columns, out_dtype=FP32))
    if training:
        backward = Elementwise(
            num_elements=tokens * columns,
            vector_flops_per_element=2,
            dtype=FP32,
            out_dtype=rank.dtype,
        )
        op = Softmax(rows=tokens, cols=columns, dtype=FP32)
        steps.append(Step(name="loss", part=part, op=op, gradients=(("backward", backward),)))
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

    def layer(
        self,
        kind: str,
        plan: Plan,
        *,
        dtype: DType = BF16,
        fused: bool = True,
        sequence_parallel: bool = True,
    ) -> Workload:
        """One layer, forward and backward, for one micro-batch on one rank."""
        return layer(
            self.config,
            kind=kind,
            batch=plan.micro_batch,
            len_q=self.len_seq,
            plan=plan,
            training=True,
            fused=fused,
            sequence_parallel=sequence_parallel,
            dtype=dtype,
        )

    def ends(self, plan: Plan, *, dtype: DType = BF16, sequence_parallel: bool = True) -> Workload:
        """Embedding, head and loss for one micro-batch on one rank."""
        return ends(
            self.config,
            batch=plan.micro_batch,
            len_q=self.len_seq,
            plan=plan,
            training=True,
            sequence_parallel=sequence_parallel,
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
        if self.config.num_linear_layers:
            raise InputError(
                f"{self.config.name}: serving of linear-attention layers is not modelled; "
                "ask for training"
            )
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
    expanded form. A mixer has its recurrence and its taps in the place of scores, run token by
    token, whatever a kernel in chunks does beyond.

    >>> from workloads.models.config import load_hf_config
    >>> model_flops_forward(load_hf_config("examples/llama3-8b.json"), 8192, 1) / 1e9
    17.156800512
    """
    if cfg.mixer is not None:
        return _hybrid_flops(cfg, cfg.mixer, len_seq, num_tokens)
    spec = cfg.attention
    keys = len_seq / 2
    if cfg.window:
        w = minimum(cfg.window, len_seq)
        keys = keys + cfg.windowed_frac * (w - w * w / (2 * len_seq) - keys)
    if cfg.num_linear_layers:  # 4 d_qk d_v flops a head: the state's update and its query
        state = 2 * spec.head_dim * spec.v_head_dim / (spec.head_dim + spec.v_head_dim)
        keys = keys + cfg.linear_frac * (state - keys)
    per_key = 2 * spec.num_heads * (spec.head_dim + spec.v_head_dim)
    layers = cfg.num_layers + cfg.num_mtp
    return (2 * matmul_parameters(cfg) + layers * per_key * keys) * num_tokens


def _hybrid_flops(cfg: TransformerConfig, mixer: AnyMixer, len_seq: Num, num_tokens: Num) -> Num:
    """The same with mixers: their recurrences and taps in the place of scores."""
    spec = cfg.attention
    per_key = 2 * spec.num_heads * (spec.head_dim + spec.v_head_dim)
    own = cfg.num_attention_layers * per_key * (len_seq / 2)
    own = own + cfg.num_mixer_layers * mixer.flops_per_token()
    return (2 * matmul_parameters(cfg) + own) * num_tokens


def model_flops(cfg: TransformerConfig, len_seq: Num, num_tokens: Num) -> Num:
    """Matrix flops of a training step by the MFU convention: three times the forward pass.

    Forward and backward without recomputation; what a kernel does beyond that (the scores that
    a fused attention computes again, masked-out tile parts) does not count.

    >>> from workloads.models.config import load_hf_config
    >>> model_flops(load_hf_config("examples/llama3-8b.json"), 8192, 1) / 1e9
    51.470401536
    """
    return 3 * model_flops_forward(cfg, len_seq, num_tokens)
