"""What a rank keeps from the forward pass for the backward pass, tensor by tensor.

`saved_tensors` is the list: each tensor is named once, with its elements per token on one
tensor-parallel rank, its bytes per element, and whether sequence parallelism shards its tokens.
Everything else is a sum over it. Source of the method and of the checks: Korthikanti et al. 2022
(arXiv 2205.05198, section 4), whose layer of a GPT, with dropout and materialised scores, comes out
as s b h (34 + 5 a s / h).

Kept once although two ops need it: the output of attention (its own backward, and the input of
the output projection). Not kept: outputs of residual additions, what a transient needs, row
statistics of norms, token ids. Context parallelism divides the tokens; the K and V that travel
round the ring are buffers, not saved tensors. Mixers in the place of attention keep what
`workloads.models.mixers` lists, under selective recomputation too: the policy told above names
attention's scores only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from workloads.models.architecture import (
    LatentAttention,
    TransformerConfig,
    has_block,
    mixer_of,
)
from workloads.models.experts import load_of
from workloads.models.mixers import AnyMixer
from workloads.models.parameters import heads_per_rank, moe_of
from workloads.numeric import Condition, Num, ceil_div, minimum, where
from workloads.plan import Plan, Recompute

MASK_BYTES = 1
"""Bytes of one element of a dropout mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTensor:
    """One tensor kept for the backward pass.

    `elements_per_token` on one rank, split over tp where the tensor is. `by_sequence`: with
    sequence parallelism a rank has 1 / tp of the tokens. `recomputed`: dropped by selective
    recomputation, which redoes the scores, their softmax and its dropout.
    """

    name: str
    elements_per_token: Num
    bytes_per_element: float
    by_sequence: bool = False
    recomputed: bool = False

    @property
    def bytes_per_token(self) -> Num:
        """Bytes for one token that the rank has."""
        return self.elements_per_token * self.bytes_per_element


@dataclass(frozen=True, slots=True, kw_only=True)
class EndsBytes:
    """Kept before the first layer (first stage) and after the last one (last stage)."""

    embedding: Num
    head: Num


def saved_tensors(
    cfg: TransformerConfig,
    *,
    kind: str = "dense",
    len_seq: Num,
    tp: Num = 1,
    etp: Num | None = None,
    materialised: bool = False,
    dropout: bool = False,
    dtype: DType = BF16,
) -> tuple[SavedTensor, ...]:
    """Everything one layer keeps without recomputation.

    `materialised`: attention that writes its score matrix, len_seq scores per token and head;
    else a fused kernel that keeps one FP32 logsumexp per token and head. `dropout`: masks of the
    two blocks, and of the softmax where it is materialised.
    """
    moe = moe_of(cfg, kind)
    whole, e = cfg.hidden_dim, dtype.bytes_per_element
    tensors = [_rows("attention_norm.input", whole, e), _rows("attention.input", whole, e)]
    mixer = mixer_of(cfg, kind)
    if mixer is None:
        tensors += _heads(cfg, tp, e)
        tensors += _scores(cfg, tp, len_seq, e, materialised=materialised, dropout=dropout)
    else:
        tensors += _mixer(mixer, tp, e)
    if cfg.norms_per_layer == 4:
        tensors.append(_rows("attention_post_norm.input", whole, e))
    if dropout:
        tensors.append(_rows("attention.dropout_mask", whole, MASK_BYTES))
    if not has_block(kind):
        return tuple(tensors)
    tensors += [_rows("mlp_norm.input", whole, e), _rows("mlp.input", whole, e)]
    if moe is None:
        tensors += _block(cfg, "mlp", ceil_div(cfg.mlp.ffn_dim, tp), e)
    else:
        tensors += _experts(cfg, tp, tp if etp is None else etp, e)
    if cfg.norms_per_layer == 4:
        tensors.append(_rows("mlp_post_norm.input", whole, e))
    if dropout:
        tensors.append(_rows("mlp.dropout_mask", whole, MASK_BYTES))
    return tuple(tensors)


def _rows(name: str, elements: Num, size_bytes: float) -> SavedTensor:
    """Kept in the sequence-parallel region, whole columns."""
    return SavedTensor(
        name=name, elements_per_token=elements, bytes_per_element=size_bytes, by_sequence=True
    )


def _split(name: str, elements: Num, size_bytes: float, *, recomputed: bool = False) -> SavedTensor:
    """Kept for all tokens; `elements` are those of one rank."""
    return SavedTensor(
        name=name,
        elements_per_token=elements,
        bytes_per_element=size_bytes,
        recomputed=recomputed,
    )


def _mixer(mixer: AnyMixer, tp: Num, e: float) -> list[SavedTensor]:
    """What the ops of a mixer take; no selective policy names any of them."""
    wide = FP32.bytes_per_element
    return [_split(f"mixer.{t.name}", t.elements, wide if t.wide else e) for t in mixer.kept(tp)]


def _heads(cfg: TransformerConfig, tp: Num, e: float) -> list[SavedTensor]:
    """Q, K and V as attention takes them, and what the norms before them need."""
    spec = cfg.attention
    q, kv = heads_per_rank(spec.num_heads, spec.num_kv_heads, tp)
    tensors = [
        _split("q", q * spec.head_dim, e),
        _split("k", kv * spec.head_dim, e),
        _split("v", kv * spec.v_head_dim, e),
    ]
    if not isinstance(spec, LatentAttention):
        norms = [_split("qk_norm.input", (q + kv) * spec.head_dim, e)] if spec.qk_norm else []
        return [*norms, *tensors]
    latents = [("kv_a_norm.input", spec.kv_lora_rank), ("kv_b.input", spec.kv_lora_rank)]
    if spec.q_lora_rank:
        latents += [("q_a_norm.input", spec.q_lora_rank), ("q_b.input", spec.q_lora_rank)]
    return [*(_rows(name, rank, e) for name, rank in latents), *tensors]


def _scores(
    cfg: TransformerConfig, tp: Num, len_seq: Num, e: float, *, materialised: bool, dropout: bool
) -> list[SavedTensor]:
    """The output of attention, and its scores or their logsumexp."""
    spec = cfg.attention
    q, _ = heads_per_rank(spec.num_heads, spec.num_kv_heads, tp)
    out = _split("attention.output", q * spec.v_head_dim, e)
    gate = []
    if not isinstance(spec, LatentAttention) and spec.out_gate:
        gate = [_split(name, q * spec.v_head_dim, e) for name in ("out_gate.input", "out.input")]
    if not materialised:
        rows = q if not cfg.num_linear_layers else q * (1 - cfg.linear_frac)
        return [out, _split("attention.logsumexp", rows, FP32.bytes_per_element), *gate]
    tensors = [*gate, out, _split("softmax.output", q * len_seq, e, recomputed=True)]
    if dropout:
        tensors.append(_split("softmax.dropout_mask", q * len_seq, MASK_BYTES, recomputed=True))
        tensors.append(_split("softmax.dropout_output", q * len_seq, e, recomputed=True))
    return tensors


def _block(cfg: TransformerConfig, name: str, width: Num, e: float) -> list[SavedTensor]:
    """Input and output of an activation of that width; the output is what `down` takes.

    A ReLU without gate needs its output only.
    """
    inputs = 2 if cfg.mlp.gated else 1
    output = _split(f"{name}.down.input", width, e)
    if (cfg.mlp.activation, inputs) == ("relu", 1):
        return [output]
    return [_split(f"{name}.activation.input", inputs * width, e), output]


def _experts(cfg: TransformerConfig, tp: Num, etp: Num, e: float) -> list[SavedTensor]:
    """Router logits, the rows each expert got, their widened forms, the outputs to be weighted.

    A rank's experts get the rows of etp shards of the sequence (`workloads.models.experts`).
    """
    moe = cfg.moe
    assert moe is not None
    rows, share = moe.num_active * cfg.hidden_dim, etp / tp * load_of(moe)
    width = moe.num_active * ceil_div(moe.expert_ffn_dim, etp)
    tensors = [
        _rows("router.logits", moe.num_experts, FP32.bytes_per_element),
        _split("experts.input", share * rows, e),
        *_block(cfg, "experts", share * width, e),
        _rows("experts.output", rows, e),
    ]
    if moe.shared_ffn_dim:
        tensors += _block(cfg, "shared", ceil_div(moe.shared_ffn_dim, tp), e)
    return tensors


def layer_bytes(
    cfg: TransformerConfig,
    *,
    kind: str = "dense",
    batch: Num,
    len_seq: Num,
    plan: Plan | None = None,
    materialised: bool = False,
    dropout: bool = False,
    sequence_parallel: bool = True,
    dtype: DType = BF16,
) -> Num:
    """Bytes one layer keeps for one micro-batch of `batch` sequences on one rank.

    `plan.recompute` NONE keeps every tensor; SELECTIVE drops scores where they are materialised;
    FULL keeps the layer's input only. Without `sequence_parallel`, tensors outside the split
    regions are kept whole by each tensor-parallel rank.

    >>> from workloads.models.config import load_hf_config
    >>> llama = load_hf_config("examples/llama3-8b.json")
    >>> layer_bytes(llama, batch=1, len_seq=1) == 2 * (4 * 4096 + 10240 + 3 * 14336) + 4 * 32
    True
    """
    plan = plan or Plan()
    tokens, rows = _shares(plan, batch * len_seq, sequence_parallel)
    tensors = saved_tensors(
        cfg,
        kind=kind,
        len_seq=len_seq,
        tp=plan.tp,
        etp=plan.expert_tp,
        materialised=materialised,
        dropout=dropout,
        dtype=dtype,
    )
    everything = _bytes(tensors, tokens, rows)
    selective = _bytes((t for t in tensors if not t.recomputed), tokens, rows)
    full = rows * cfg.hidden_dim * dtype.bytes_per_element
    kept = where(_is(plan.recompute, Recompute.SELECTIVE), selective, everything)
    return where(_is(plan.recompute, Recompute.FULL), full, kept)


def _shares(plan: Plan, num_tokens: Num, sequence_parallel: bool) -> tuple[Num, Num]:
    """Tokens of one rank, and those whose rows it has where the sequence is split over tp."""
    tokens = ceil_div(num_tokens, plan.cp)
    return tokens, ceil_div(tokens, plan.tp) if sequence_parallel else tokens


def _bytes(tensors: Iterable[SavedTensor], tokens: Num, rows: Num) -> Num:
    total: Num = 0
    for tensor in tensors:
        total = total + tensor.bytes_per_token * (rows if tensor.by_sequence else tokens)
    return total


def _is(value: Num, mode: Recompute) -> Condition:
    return np.equal(value, mode) if isinstance(value, np.ndarray) else value == mode


def ends_bytes(
    cfg: TransformerConfig,
    *,
    batch: Num,
    len_seq: Num,
    plan: Plan | None = None,
    dropout: bool = False,
    sequence_parallel: bool = True,
    dtype: DType = BF16,
) -> EndsBytes:
    """Bytes kept outside the layers for one micro-batch on one rank, whatever is recomputed.

    Before: the dropout mask of the embedding, and the narrow embedding where it is projected.
    After: the inputs of the final norm and of the head, the FP32 probabilities of the loss split
    by vocabulary: (4 s b h + 4 s b v) / t (Korthikanti et al. 2022, section 4.3).

    >>> from workloads.models.config import load_hf_config
    >>> gpt = load_hf_config("examples/gpt2.json")
    >>> ends_bytes(gpt, batch=1, len_seq=1024).head == 1024 * (4 * 768 + 4 * 50257)
    True
    """
    plan = plan or Plan()
    tokens, rows = _shares(plan, batch * len_seq, sequence_parallel)
    hidden, e = cfg.hidden_dim, dtype.bytes_per_element
    projected = cfg.embedding_dim != cfg.hidden_dim
    before = [_rows("embedding.dropout_mask", hidden, MASK_BYTES)] if dropout else []
    after = [_rows("head.input", cfg.embedding_dim, e)]
    if cfg.final_norm:
        after.append(_rows("final_norm.input", hidden, e))
    if projected:
        before.append(_rows("project_in.input", cfg.embedding_dim, e))
        after.append(_rows("project_out.input", hidden, e))
    after.append(
        _split("loss.probabilities", ceil_div(cfg.vocab_size, plan.tp), FP32.bytes_per_element)
    )
    return EndsBytes(embedding=_bytes(before, tokens, rows), head=_bytes(after, tokens, rows))


def kv_cache_bytes(
    cfg: TransformerConfig,
    *,
    batch: Num,
    len_context: Num,
    plan: Plan | None = None,
    dtype: DType = BF16,
) -> Num:
    """Bytes of the K/V cache of `batch` sequences on one rank, ceil(num_layers / pp) layers of it.

    A windowed layer keeps its window only. Latent attention keeps one latent per token, a copy on
    every tensor-parallel rank. Layers with and without window are spread evenly over the stages,
    and so are mixers, which keep their states whatever the length.

    >>> from workloads.models.config import load_hf_config
    >>> kv_cache_bytes(load_hf_config("examples/llama3-8b.json"), batch=1, len_context=1)
    131072.0
    """
    plan, spec = plan or Plan(), cfg.attention
    if isinstance(spec, LatentAttention):
        width: Num = spec.latent_dim
    else:
        _, kv = heads_per_rank(spec.num_heads, spec.num_kv_heads, plan.tp)
        width = 2 * kv * spec.head_dim
    frac = cfg.windowed_frac
    length = len_context * (1 - frac)
    if cfg.window:
        length = length + frac * minimum(cfg.window, len_context)
    layers = ceil_div(cfg.num_layers, plan.pp)
    if cfg.mixer is not None:
        length = length * cfg.num_attention_layers / cfg.num_layers
    cached = layers * batch * length * width * dtype.bytes_per_element / plan.cp
    return cached + layers * batch * mixer_state_bytes(cfg, tp=plan.tp, dtype=dtype)


def mixer_state_bytes(cfg: TransformerConfig, *, tp: Num = 1, dtype: DType = BF16) -> Num:
    """Bytes that one sequence leaves behind in the mean layer of a rank: 0 without mixers.

    States of a scan are fp32, as its kernels take them; what a convolution remembers is in `dtype`.
    """
    if cfg.mixer is None:
        return 0
    held = cfg.mixer.states(tp)
    each = held.scan * FP32.bytes_per_element + held.conv * dtype.bytes_per_element
    return cfg.num_mixer_layers / cfg.num_layers * each
