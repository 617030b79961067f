"""Claims on scans of vector states and their kin: Mamba, quasi-LSTM, SpikeGPT, ViR, gates below 0.

**Training memory** of a step in mixed precision, for n parameters and T tokens:

    bytes = 18 n + layers kept T + ends T + other
    18 n    weights, gradients and two moments in fp32, weights cast to 16 bits
    kept    what autograd saves of a layer for the backward pass, a token, d the width, w = 2 d:
            Mamba        residual 4 d, normed input 2 d, x and z 4 w, scan's output 2 w, x_proj's
                         output 2 (d / 16 + 2 N), B and C again 4 N; states of chunks of 2048 tokens
                         8 N w a chunk. Convolution, delta and the gated output are made again
                         (MambaInnerFn, checkpoint_lvl 1)
            Transformer  residuals 8 d, normed inputs 4 d, q, k, v 6 d, attention's output 2 d,
                         feed-forward 8 d before GELU, which the compiler makes again
    ends    last residual and norm 6 d, logits and their gradient 4 V

**Scan against attention** (section 4.5, appendix E.5): forward kernels alone, model width D, heads
of 64, no gate. The parallel scan of plain PyTorch sweeps up and down a tree of (a, b) pairs in
fp32, a product and a multiply-add each level. **Inference**: all sequences' prompts, then all their
tokens, at the best batch that fits; Mamba in a captured graph, the Transformer as transformers'
eager code runs it: unfused attention, a cache that is copied to grow.

Off: memory away from a line through its rows (from 0.6 to 1.35 GB a sequence between neighbours,
which an allocator's blocks make, not the arrays); the crossover: 7x at 32K and 1x at 2K ask that
attention grow 112 times between them, where its kernel grows 180 times; inference by a fifth: the
Transformer's code loses more than its kernels and copies are counted here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from hwmodels.device import Device
from hwmodels.dtypes import BF16, FP16, FP32, DType
from validate.claims.claim import Claim, Value, not_modelled
from validate.claims.decoder import Framework, ops_seconds
from validate.claims.formula import formula_value
from validate.claims.windows import EAGER
from workloads import registry
from workloads.op import Op
from workloads.ops.attention import StandardAttention
from workloads.ops.elementwise import Elementwise, add, gelu
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.linear_recurrence import LinearRecurrence
from workloads.ops.matmul import Matmul
from workloads.ops.norm import LayerNorm, RmsNorm
from workloads.ops.quasi_rnn import QuasiLstm, lstm_steps
from workloads.ops.selective_scan import SelectiveScan
from workloads.ops.short_conv import ShortConv
from workloads.ops.wkv import SpikingTokenMix

STATE: Final = 16
EXPAND, CONV_WIDTH, RANK_SHARE = 2, 4, 16
"""Mamba's inner width over d, taps of its convolution, d over the rank of delta (section 3.4)."""
VOCAB: Final = 50280
"""GPT-NeoX's tokens padded to a multiple of 8, as published models have them."""
HEAD_DIM, FFN = 64, 4
FA2: Final = "figure:fa2"
PARAMETER_BYTES: Final = 18
CHUNK: Final = 2048
"""Steps of a chunk whose last state the scan's kernel writes out."""
OTHER_BYTES: Final = 1.42e9
"""CUDA context, libraries, communication buffers, slack of the allocator: 4.6 GB of the
Transformer at batch 1 (table 15) less what is counted."""
LENGTHS: Final = tuple(2**i for i in range(9, 20))
"""Sequence lengths of figure 8."""
EAGER_KERNEL_S: Final = 8e-6
"""Host time of a kernel that eager PyTorch launches in a loop: usual of its dispatcher."""
SEE_SETTING: Final = "see setting"
"""What a claim's value says where the formulas stand in its setting."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Layers of a Transformer and width; a Mamba of that size has twice the layers."""

    layers: int
    dim: int


MODELS: Final = {
    # arXiv 2312.00752, table 12 (after Brown et al. 2020); 6.9B: appendix E.5
    "125m": Sizes(12, 768), "130m": Sizes(12, 768), "350m": Sizes(24, 1024),
    "370m": Sizes(24, 1024), "760m": Sizes(24, 1536), "790m": Sizes(24, 1536),
    "1.3b": Sizes(24, 2048), "1.4b": Sizes(24, 2048), "2.7b": Sizes(32, 2560),
    "2.8b": Sizes(32, 2560), "6.7b": Sizes(32, 4096), "6.9b": Sizes(32, 4096),
}  # fmt: skip


def sizes_named(text: str) -> Sizes:
    """The sizes a paper calls a model by.

    >>> sizes_named("Mamba-1.4B").dim
    2048
    """
    found = re.search(r"(\d+(?:\.\d+)?)\s*([mb])", text.casefold())
    name = f"{found[1]}{found[2]}" if found else text
    if name not in MODELS:
        not_modelled(f"setting unclear: no sizes are known of the model '{text}'")
    return MODELS[name]


def evaluate_mamba_scan(claim: Claim) -> Value:
    """Memory of training, speed of the scan and of inference."""
    quantity = claim.quantity.casefold()
    if "memory" in quantity:
        return _training_memory(claim)
    if "throughput" in quantity:
        return _inference(claim)
    if "non-causal" in quantity:
        return _causal_speedup(claim)
    if "crossover" in quantity:
        return _crossover(claim)
    if "scan" not in quantity:
        not_modelled(f"no rule for '{claim.quantity}'")
    (seq,), on = claim.sizes("seq"), claim.device()
    scan = ops_seconds([_scan(claim, seq)], on)
    if "attention" in quantity or "fa2" in quantity:
        return ops_seconds([_attention(claim, seq)], on, FA2) / scan
    if "pytorch" in quantity or "standard" in quantity or "naive" in quantity:
        return ops_seconds(list(standard_scan(_scan(claim, seq))), on) / scan
    not_modelled(f"no rule for '{claim.quantity}'")


# ---- training memory --------------------------------------------------------------------------


def _training_memory(claim: Claim) -> Value:
    """GB of the Transformer and of Mamba, or of the one that is named."""
    batch, seq = claim.sizes("batch", "seq")
    (named,) = claim.need("params")
    model, tokens = sizes_named(str(named)), batch * seq
    both = transformer_bytes(model, tokens) / 1e9, mamba_bytes(model, tokens) / 1e9
    impl = str(claim.setting.get("impl", "")).casefold()
    if not impl:
        return both
    return both["mamba" in impl]


def mamba_parameters(model: Sizes) -> float:
    """Parameters of a Mamba with tied embeddings.

    >>> round(mamba_parameters(MODELS["130m"]) / 1e6)
    129
    """
    d, w, rank = model.dim, EXPAND * model.dim, model.dim / RANK_SHARE
    layer = 2 * d * w + w * (CONV_WIDTH + 1) + w * (rank + 2 * STATE) + (rank + 1) * w
    layer += w * (STATE + 1) + w * d + d
    return float(2 * model.layers * layer + VOCAB * d + d)


def transformer_parameters(model: Sizes) -> float:
    """Parameters of a GPT with rotary positions and tied embeddings.

    >>> round(transformer_parameters(MODELS["125m"]) / 1e6)
    124
    """
    d = model.dim
    return float(model.layers * ((4 + 2 * FFN) * d * d + (9 + FFN) * d) + (VOCAB + 2) * d)


def mamba_bytes(model: Sizes, tokens: int) -> float:
    """Peak of a training step of Mamba; see the module's docstring."""
    d, w = model.dim, EXPAND * model.dim
    kept = 4 * d + 2 * d + 4 * w + 2 * w + 2 * (d / RANK_SHARE + 2 * STATE) + 4 * STATE
    kept += 8 * STATE * w / CHUNK
    activations = tokens * (2 * model.layers * kept + _ends(d))
    return PARAMETER_BYTES * mamba_parameters(model) + activations + OTHER_BYTES


def transformer_bytes(model: Sizes, tokens: int) -> float:
    """The same of a Transformer with FlashAttention-2 and a compiler."""
    d = model.dim
    kept = 8 * d + 4 * d + 6 * d + 2 * d + 2 * FFN * d
    activations = tokens * (model.layers * kept + _ends(d))
    return PARAMETER_BYTES * transformer_parameters(model) + activations + OTHER_BYTES


def _ends(dim: int) -> float:
    return 6 * dim + 4 * VOCAB


# ---- scan and attention -----------------------------------------------------------------------


def _width(claim: Claim) -> int:
    return claim.sizes("D")[0] if claim.setting.get("D") else 1024


def _batch(claim: Claim) -> int:
    return claim.sizes("batch")[0] if claim.setting.get("batch") else 1


def _scan(claim: Claim, seq: int) -> SelectiveScan:
    """The scan that figure 8 times: channels as wide as the model, no gate."""
    states = claim.sizes("N_state")[0] if claim.setting.get("N_state") else STATE
    return SelectiveScan(
        batch=_batch(claim), len_seq=seq, channels=_width(claim), state_dim=states, gated=False,
        dtype=claim.dtype(BF16),
    )  # fmt: skip


def _attention(claim: Claim, seq: int, *, causal: bool = True) -> FlashAttention2:
    """Causal attention of the same width."""
    head = claim.sizes("head_dim")[0] if claim.setting.get("head_dim") else HEAD_DIM
    return FlashAttention2(
        batch=_batch(claim), num_heads=max(_width(claim) // head, 1), len_q=seq, head_dim=head,
        causal=causal, dtype=FP16,
    )  # fmt: skip


def standard_scan(op: SelectiveScan) -> Iterator[Op]:
    """The parallel scan in eager PyTorch, all states in memory, fp32.

    exp(delta A): a product and an exponential; delta x B: a product; a level of the tree: a
    product of decays, a multiply-add of drives; h C summed up.
    """
    steps = int(op.steps)
    states = steps * int(op.state_dim)

    def run(elements: int, inputs: int, special: int = 0) -> Op:
        return Elementwise(
            num_elements=max(elements, 1), num_inputs=inputs, dtype=FP32,
            special_ops_per_element=special,
        )  # fmt: skip

    yield run(steps, 2)
    yield run(states, 1)
    yield run(states, 1, 1)
    yield run(states, 1)
    for level in range(1, math.ceil(math.log2(max(op.len_seq, 2))) + 1):
        for _ in ("up", "down"):
            yield run(states >> level, 2)
            yield run(states >> level, 3)
    yield run(states, 1)
    yield run(states, 1)


def _causal_speedup(claim: Claim) -> float:
    """The mean over figure 8's lengths, or at the length that is given.

    Off by 4 %: which lengths 'about 1.7' stands for is not said; one half is 2 at most.
    """
    lengths = claim.sizes("seq") if claim.setting.get("seq") else LENGTHS
    on = claim.device()

    def seconds(seq: int, *, causal: bool) -> float:
        return ops_seconds([_attention(claim, seq, causal=causal)], on, FA2)

    ratios = [seconds(n, causal=False) / seconds(n, causal=True) for n in lengths]
    return float(np.exp(np.mean(np.log(ratios))))


def _crossover(claim: Claim) -> float:
    """Tokens from which the scan is as fast as attention, between figure 8's lengths."""
    on = claim.device()
    gaps = [
        math.log(ops_seconds([_attention(claim, n)], on, FA2) / ops_seconds([_scan(claim, n)], on))
        for n in LENGTHS
    ]
    for i in range(1, len(LENGTHS)):
        if gaps[i - 1] < 0 <= gaps[i]:
            share = gaps[i - 1] / (gaps[i - 1] - gaps[i])
            return float(LENGTHS[i - 1] * 2**share)
    not_modelled("the scan and attention do not cross within the figure's lengths")


# ---- inference --------------------------------------------------------------------------------


def _inference(claim: Claim) -> float:
    """Mamba's tokens/s over the Transformer's, each at its best batch; the mean over pairs."""
    prompt, new = claim.sizes("prompt", "new")
    on, dtype = claim.device(), claim.dtype(FP16)
    named = re.findall(r"\d+(?:\.\d+)?\s*[MBmb](?![A-Za-z])", str(claim.setting.get("models", "")))
    pairs = {sizes_named(name).dim: sizes_named(name) for name in named}
    if not pairs:
        not_modelled("setting incomplete: no models")
    batches = _batches(claim)
    ratios = []
    for model in pairs.values():
        run = {"on": on, "prompt": prompt, "new": new, "dtype": dtype}
        best = [_best(way, model, batches, run) for way in (_mamba_run, _transformer_run)]
        ratios.append(best[0] / best[1])
    return float(np.exp(np.mean(np.log(ratios))))


def _batches(claim: Claim) -> list[int]:
    """The batch of the setting, or the powers of two of its range."""
    found = [int(n) for n in re.findall(r"\d+", str(claim.need("batch")[0]))]
    if not found or found[0] < 1:
        not_modelled(f"setting unclear: batch = {claim.setting['batch']!r}")
    if len(found) == 1:
        return found
    low, high = found[0], found[-1]
    return [low * 2**i for i in range(max(int(math.log2(high / low)), 0) + 1)]


def _best(
    way: Callable[..., float], model: Sizes, batches: list[int], run: dict[str, Any]
) -> float:
    """Most tokens/s among the batches that fit."""
    seconds = {batch: way(model, batch, **run) for batch in batches}
    new = int(run["new"])
    rates = [batch * new / s for batch, s in seconds.items() if math.isfinite(s)]
    if not rates:
        not_modelled("no batch fits the device")
    return max(rates)


def _mamba_run(
    model: Sizes, batch: int, *, on: Device, prompt: int, new: int, dtype: DType
) -> float:
    """Seconds of prompts and new tokens; infinite where the model does not fit."""
    e = dtype.bytes_per_element
    state = 2 * model.layers * EXPAND * model.dim * (STATE + CONV_WIDTH) * e
    longest = batch * prompt * (10 * EXPAND * model.dim * e)
    if e * mamba_parameters(model) + batch * state + longest > on.hbm.capacity_bytes:
        return math.inf
    head = ops_seconds([_product(batch, VOCAB, model.dim, dtype)], on)
    first = 2 * model.layers * ops_seconds(list(_mamba_layer(model, batch, prompt, dtype)), on)
    step = 2 * model.layers * ops_seconds(list(_mamba_layer(model, batch, 1, dtype)), on)
    return float(first + head + new * (step + head))


def _mamba_layer(model: Sizes, batch: int, seq: int, dtype: DType) -> Iterator[Op]:
    """One layer over prompts, or one token with its states."""
    d, w, rank, tokens = model.dim, EXPAND * model.dim, model.dim // RANK_SHARE, batch * seq
    update = seq == 1
    yield RmsNorm(rows=tokens, cols=d, residual=True, dtype=dtype)
    yield _product(tokens, 2 * w, d, dtype)
    yield ShortConv(batch=batch, len_seq=seq, channels=w, width=CONV_WIDTH, update=update,
                    dtype=dtype)  # fmt: skip
    yield _product(tokens, rank + 2 * STATE, w, dtype)
    yield _product(tokens, w, rank, dtype)
    if update:
        yield Elementwise(num_elements=batch * w * STATE, num_inputs=1, dtype=dtype,
                          vector_flops_per_element=6, special_ops_per_element=1)  # fmt: skip
    else:
        yield SelectiveScan(batch=batch, len_seq=seq, channels=w, state_dim=STATE, dtype=dtype)
    yield _product(tokens, d, w, dtype)


def _transformer_run(
    model: Sizes, batch: int, *, on: Device, prompt: int, new: int, dtype: DType
) -> float:
    """The same of an eager Transformer, all logits of the prompt in fp32 among what must fit."""
    e, layers, d = dtype.bytes_per_element, model.layers, model.dim
    heads = d // _head_dim(model)
    cache = layers * 2 * (prompt + new) * d * e
    logits = prompt * VOCAB * (e + FP32.bytes_per_element)
    scores = heads * prompt**2 * (e + FP32.bytes_per_element)
    held = e * transformer_parameters(model) + batch * (cache + logits + scores)
    if held > on.hbm.capacity_bytes:
        return math.inf
    first = _eager_pass(model, batch, prompt, prompt, on, dtype, EAGER)
    step = _eager_pass(model, batch, 1, prompt + new // 2, on, dtype, EAGER)
    return first + new * step


def _eager_pass(
    model: Sizes, batch: int, seq: int, keys: int, on: Device, dtype: DType, framework: Framework
) -> float:
    """Seconds of one forward pass: the device's or the host's."""
    d, tokens = model.dim, batch * seq
    head = _head_dim(model)
    attention = StandardAttention(
        batch=batch, num_heads=d // head, len_q=seq, len_kv=keys, head_dim=head, causal=seq > 1,
        dtype=dtype,
    )  # fmt: skip
    layer: list[Op] = [
        LayerNorm(rows=tokens, cols=d, dtype=dtype), _product(tokens, 3 * d, d, dtype),
        *_eager_attention(attention), _product(tokens, d, d, dtype), add(tokens * d, dtype),
        LayerNorm(rows=tokens, cols=d, dtype=dtype), _product(tokens, FFN * d, d, dtype),
        gelu(tokens * FFN * d, dtype), _product(tokens, d, FFN * d, dtype), add(tokens * d, dtype),
    ]  # fmt: skip
    if seq == 1:  # the cache grows by a copy of it
        layer.append(Elementwise(num_elements=2 * batch * keys * d, num_inputs=1, dtype=dtype))
    device_s = model.layers * ops_seconds(layer, on)
    device_s += ops_seconds([_product(tokens, VOCAB, d, dtype)], on)
    return max(float(device_s), model.layers * framework.host_s_per_layer)


def _eager_attention(op: StandardAttention) -> Iterator[Op]:
    """As transformers has it: heads apart, scores scaled and masked, softmax in fp32 between casts.

    Prompts: q, k and v are copied for the batched product, and the heads side by side again.
    """
    scores = int(op.batch * op.num_heads * op.len_q * op.len_keys)
    width = int(op.batch * op.num_heads * op.len_q * op.head_dim)

    def copied(elements: int, given: DType, made: DType) -> Op:
        return Elementwise(num_elements=elements, num_inputs=1, dtype=given, out_dtype=made)

    first, softmax, last = (stage.op for stage in op.stages())
    yield copied(4 * width, op.dtype, op.dtype)
    yield first
    yield copied(scores, op.dtype, op.dtype)
    yield copied(scores, op.dtype, op.dtype)
    yield copied(scores, op.dtype, FP32)
    yield softmax.over(dtype=FP32)
    yield copied(scores, FP32, op.dtype)
    yield last


def _head_dim(model: Sizes) -> int:
    """Heads of 64 up to a width of 1536, of 128 beyond."""
    return HEAD_DIM if model.dim <= 1536 else 2 * HEAD_DIM


def _product(rows: int, cols: int, inner: int, dtype: DType) -> Matmul:
    return Matmul(m=rows, n=cols, k=inner, dtype=dtype)


# ---- kin --------------------------------------------------------------------------------------


def evaluate_languini_lstm(claim: Claim) -> Value:
    """Tokens/s of the quasi-LSTM over the LSTM's, step by step in eager PyTorch, forward."""
    on = claim.device()
    batch, seq, hidden, heads = claim.sizes("batch", "seq", "hidden", "heads")
    head = claim.sizes("head_dim")[0] if claim.setting.get("head_dim") else hidden // heads
    block = claim.sizes("block_length")[0] if claim.setting.get("block_length") else seq
    quasi = QuasiLstm(
        batch=batch, len_seq=seq, dim=hidden, num_heads=heads, head_dim=head, block_length=block,
        dtype=claim.dtype(FP16),
    )  # fmt: skip
    seconds = [
        max(ops_seconds([op], on), float(op.work(float(2**52)).launches) * EAGER_KERNEL_S)
        for op in (lstm_steps(quasi), quasi)
    ]
    return seconds[0] / seconds[1]


def evaluate_spikegpt(claim: Claim) -> Value:
    """Multiply-adds of the products with spikes over the additions that spikes leave.

    The paper's 20 needs that one value in 20 is a spike; the claim's setting states no rate.
    """
    if "operation" not in claim.quantity.casefold():
        not_modelled(f"no rule for '{claim.quantity}'")
    rate = claim.setting.get("spike_rate", claim.setting.get("firing_rate"))
    if rate is None:
        not_modelled("setting incomplete: no spike_rate, on which the additions depend")
    op = SpikingTokenMix(len_seq=1024, dim=768, spike_frac=float(rate))
    dense = float(op.projection().min_flops()[op.dtype]) / 2
    return dense / float(op.synaptic_ops())


def evaluate_vir(claim: Claim) -> Value:
    """The orders of the setting, confirmed by the counts of the form they are stated for.

    Parallel: scores and values of a whole sequence. Recurrent: the state's update and its
    products with queries. Chunkwise: both by chunks of C. One head of width d.
    """
    if claim.kind != "complexity":
        not_modelled(f"no rule for '{claim.quantity}'")
    stated = {key: str(claim.setting[key]) for key in _FORMS if claim.setting.get(key)}
    if not stated:
        not_modelled("setting incomplete: no order of a form")
    for form, text in stated.items():
        order = re.fullmatch(r"\s*[oO]\((.+)\)\s*", text)
        constants = [
            _FORMS[form](n, d) / formula_value(order[1] if order else text, _letters(n, d))
            for n, d in ((256, 32), (1024, 32), (4096, 64), (4096, 128))
        ]
        if max(constants) > 1.02 * min(constants):
            return f"{form}: {text} times {min(constants):.3g} to {max(constants):.3g}"
    return SEE_SETTING


VIR_CHUNK: Final = 64


def _letters(length: int, dim: int) -> dict[str, float]:
    return {"N": length, "d": dim, "D": dim, "C": VIR_CHUNK}


def _parallel_flops(length: int, dim: int) -> float:
    op = StandardAttention(num_heads=1, len_q=length, head_dim=dim)
    return float(sum(op.min_flops().values()))


def _retention(length: int, dim: int) -> LinearRecurrence:
    return LinearRecurrence(
        num_heads=1, len_seq=length, key_dim=dim, chunk=VIR_CHUNK, decay="scalar"
    )


def _recurrent_flops(length: int, dim: int) -> float:
    return float(sum(_retention(length, dim).min_flops().values()))


def _chunkwise_flops(length: int, dim: int) -> float:
    return float(sum(_retention(length, dim).work(float(2**52)).tensor_flops.values()))


_FORMS: Final = {
    "parallel": _parallel_flops,
    "recurrent": _recurrent_flops,
    "chunkwise": _chunkwise_flops,
}


def evaluate_state_tracking_lrnn(claim: Claim) -> Value:
    """Percent more time than the base model: both are one op, counted and timed alike.

    b in (0, 2) in place of (0, 1) changes a factor of the gate, no shape and no kernel.
    """
    if "overhead" not in claim.quantity.casefold():
        not_modelled("a figure of quality")
    if "mamba" in claim.quantity.casefold():
        not_modelled("setting incomplete: no kernel of the extended Mamba is named")
    (named,) = claim.need("model")
    model = sizes_named(str(named))
    shape: dict[str, object] = {
        "batch": 1, "num_heads": max(model.dim // 128, 1), "len_seq": 2048, "key_dim": 128,
    }  # fmt: skip
    extended, base = (registry.build(name, shape) for name in ("state_tracking_lrnn", "deltanet"))
    if claim.setting.get("gpu"):
        on = claim.device()
        return 100 * (ops_seconds([extended], on) / ops_seconds([base], on) - 1)
    counted = [op.work(2.0**18) for op in (extended, base)]
    flops = [work.flops + work.special_ops + work.bytes for work in counted]
    return 100 * float(flops[0] / flops[1] - 1)
