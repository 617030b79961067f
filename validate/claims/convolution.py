"""Claims of long convolutions: FlashFFTConv, H3, FlashButterfly, Hyena, Monarch Mixer and others.

**FlashFFTConv's table** (README of HazyResearch/flash-fft-conv). Its benchmark_flashfftconv.py says
what was run: transforms as long as the sequence, circular, but for rows called 'padded', whose data
fill half of them; PyTorch eager, gradients recorded, on fewer sequences and channels where
`measured_at` says so, scaled linearly. Memory is the allocator's peak, so it follows from the
arrays alive at the end of a call, counted in `library_peak_bytes` and `fused_peak_bytes`. The
reference runs while the tables of the last fused convolution, 4M points, are still held.

**M2-BERT's table** is of bert/benchmark_fwd.py of HazyResearch/m2: encoder and prediction head,
autocast to fp16, in training mode. The batch is not published: 32 sequences, as a comment of that
script has it, halved until the activations that autograd keeps fit the device.

Not modelled: claims without device or shapes (most speedups end to end), quality.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Final

from hwmodels.device import Device
from hwmodels.dtypes import FP16, FP32, DType, dtype
from hwmodels.errors import UnknownNameError
from validate.claims.claim import Claim, Value, device_named, not_modelled
from validate.claims.decoder import GRAPHS, dense, ops_seconds, step_seconds
from validate.claims.models import model_named
from workloads.models.transformer import DECODE, PREFILL
from workloads.op import Op
from workloads.ops.attention import StandardAttention
from workloads.ops.conv_layer import Hyena, MonarchMixer
from workloads.ops.elementwise import Elementwise, add, gelu, mul
from workloads.ops.fft_convolution import COMPLEX64, FFTConvolution, LongConvolution
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.ops.flash_fft_conv import FlashFFTConv
from workloads.ops.h3 import H3
from workloads.ops.matmul import Matmul
from workloads.ops.norm import LayerNorm
from workloads.ops.sgconv import MultiscaleFilter

LAST_TABLE_POINTS: Final = 2**22
"""Longest transform of the benchmark, whose tables the reference's peak includes."""
COMPLEX_BYTES: Final = COMPLEX64.bytes_per_element
FP32_BYTES: Final = 4
FUSED_POINTS: Final = 2**15
"""Longest transform of one fused kernel of the authors."""
HALF_SPECTRA: Final = (512, 2048)
"""Lengths whose fused kernels keep half a spectrum."""
ATTENTION_HEAD_DIM: Final = 64
FLASH_KERNEL: Final = "figure:fa1"
"""MosaicML's Triton kernel and HyenaDNA's baseline are of FlashAttention's first version."""
MIXER_DEVICE: Final = "A100-40GB"
"""What Monarch Mixer's paper calls an A100: the group's papers of that year time this one, and one
sequence of 8K fits the larger card by the count of `_batch`."""
MAX_BATCH: Final = 32
BERT_VOCAB: Final = 30522
BERT_LAYERS, BERT_HIDDEN, BERT_HEADS, BERT_FFN = 12, 768, 12, 3072
H3_ATTENTION_LAYERS: Final = 2
"""Layers of attention that the hybrid keeps (arXiv 2212.14052, section 5.1)."""


# ---- FlashFFTConv ---------------------------------------------------------------------------


def evaluate_flashfftconv(claim: Claim) -> Value:
    """Times, speedups and memory savings of the gated convolution.

    Off: 16K of the library's column, which took less a point than any other length, 8K included;
    the passes of its transforms are the same.
    """
    quantity = claim.quantity.casefold()
    if "constants" in quantity:
        not_modelled("setting incomplete: sizes of the copy and the product that were timed")
    if "mfu" in quantity or "op" not in claim.setting:
        not_modelled("setting incomplete: no shapes of the model")
    op, scale = _benchmarked(claim)
    if "memory" in quantity:
        tables = _table_bytes(LAST_TABLE_POINTS)
        return (library_peak_bytes(op) + tables) / fused_peak_bytes(op)
    on = claim.device()
    library = ops_seconds([FFTConvolution(**op)], on)
    fused = ops_seconds([FlashFFTConv(**op)], on)
    if "speedup" in quantity:
        return library / fused
    if "time" not in quantity:
        not_modelled(f"no rule for '{claim.quantity}'")
    named = str(claim.setting.get("impl", claim.quantity)).casefold()
    return scale * 1e3 * (fused if "flash" in named else library)


def _benchmarked(claim: Claim) -> tuple[dict[str, object], float]:
    """Fields of the convolution that was run, and what its time was multiplied with."""
    batch, hidden, seq = claim.sizes("batch", "hidden", "seq")
    kind = str(claim.setting["op"]).casefold()
    if "back" in kind or "bwd" in kind:
        not_modelled("the backward pass of a long convolution has no count yet")
    run = re.match(r"B=(\d+),\s*H=(\d+)", str(claim.setting.get("measured_at", "")))
    rows = (int(run[1]), int(run[2])) if run else (batch, hidden)
    padded = "padded" in kind and "unpadded" not in kind
    fields: dict[str, object] = {
        "batch": rows[0], "channels": rows[1], "len_seq": seq // 2 if padded else seq,
        "gated": "gated" in kind, "circular": not padded, "dtype": _format(claim),
    }  # fmt: skip
    return fields, batch * hidden / (rows[0] * rows[1])


def _format(claim: Claim) -> DType:
    """The activations' format: the first word of the setting."""
    text = re.split(r"[ ,/]", str(claim.setting.get("dtype", FP16.name)))[0]
    try:
        return dtype(text)
    except UnknownNameError:
        not_modelled(f"setting unclear: dtype '{text}'")


def _points(op: LongConvolution) -> float:
    return float(op.num_points if op.circular else 2 * op.num_points)


def library_peak_bytes(fields: dict[str, object]) -> float:
    """Bytes alive when the reference ends: what autograd saved and what the function still names.

    Gated: u and gates, three fp32 copies of them, the product; three complex spectra; the gated
    result in fp32 and cast. One filter a channel, and its spectrum.

    >>> op = {"batch": 1, "channels": 1, "len_seq": 1024, "gated": True, "circular": True}
    >>> library_peak_bytes(op) / 1024   # 3 2 + 3 4 + 3 8 + 2 4 + 2, filter 4 + 8
    64.0
    """
    op = FFTConvolution(**fields)  # type: ignore[arg-type]
    length, n, e = float(op.len_seq), _points(op), op.dtype.bytes_per_element
    arrays = (3 * e + 5 * FP32_BYTES + e) if op.gated else (e + FP32_BYTES + e)
    row = arrays * length + 3 * COMPLEX_BYTES * n
    filters = op.channels * (FP32_BYTES * float(op.filter_len) + COMPLEX_BYTES * n)
    return float(op.rows * row + filters)


def fused_peak_bytes(fields: dict[str, object]) -> float:
    """The same of the fused convolution: inputs and output, the filter's spectrum and its copies.

    Beyond 32K points, also what the outer stages hand to the fused kernel and take from it.

    >>> op = {"batch": 1, "channels": 1, "len_seq": 1024, "gated": True, "circular": True}
    >>> fused_peak_bytes(op) / 1024     # 4 2, filter 4 + 8 + 4, tables 8
    32.0
    """
    op = FlashFFTConv(**fields)  # type: ignore[arg-type]
    length, n, e = float(op.len_seq), _points(op), op.dtype.bytes_per_element
    row = (4 if op.gated else 2) * e * length
    spectrum = (COMPLEX_BYTES + 2 * e) * n
    if n in HALF_SPECTRA:
        spectrum = spectrum / 2
    if n > FUSED_POINTS:
        row += 2 * 2 * e * n
        spectrum += COMPLEX_BYTES * n
    filters = op.channels * (FP32_BYTES * float(op.filter_len) + spectrum)
    return float(op.rows * row + filters) + _table_bytes(n)


def _table_bytes(points: float) -> float:
    """Twiddle factors both ways, complex fp16; the matrices are small beside them."""
    return 2 * 2 * FP16.bytes_per_element * points


# ---- H3, FlashButterfly, Hyena -----------------------------------------------------------------


def evaluate_flashconv_h3(claim: Claim) -> Value:
    """The longest convolution that fits a thread block; generation by the hybrid against attention.

    Off: generation. The rates that the paper states of either model are a fraction of what the
    kernels allow; how the code's share divides between them is not in the setting.
    """
    quantity = claim.quantity.casefold()
    if "max length" in quantity:
        return _longest_fused(claim.device())
    if "generation" in quantity:
        return _generation(claim)
    not_modelled("setting incomplete: no gpu, no shapes of the model")


def _longest_fused(on: Device) -> float:
    """Tokens of the longest causal convolution whose transform one block's shared memory holds."""
    block = on.sm.smem_bytes_per_block or on.memory[0].capacity_bytes
    length = 2
    while FlashFFTConv(batch=1, channels=1, len_seq=2 * length).tiling(block)["num_outer"] == 0:
        length *= 2
    return float(length)


def _generation(claim: Claim) -> float:
    """Tokens/s over a Transformer's at the longest prompt, the prompt included."""
    batch, new = claim.sizes("batch", "new_tokens")
    (prompts,), on = claim.need("prompt"), claim.device()
    prompt = max(prompts) if isinstance(prompts, (list, tuple)) else int(prompts)
    model = model_named(str(claim.setting.get("model", "GPT3-1.3B")))
    layers, hidden = model.num_layers, model.hidden_dim

    def seconds(phase: str, *, hybrid: bool) -> float:
        context = prompt if phase == PREFILL else prompt + new // 2
        run = {"on": on, "batch": batch, "len_context": context, "phase": phase,
               "framework": GRAPHS}  # fmt: skip
        whole = step_seconds(model, attend=dense, **run)  # type: ignore[arg-type]
        if not hybrid:
            return whole
        bare = step_seconds(model, attend=lambda shape: (), **run)  # type: ignore[arg-type]
        replaced = 1 - H3_ATTENTION_LAYERS / layers
        mixers: list[Op] = _state_update(batch, hidden)
        if phase == PREFILL:
            layer = H3(batch=batch, len_seq=_padded(prompt), dim=hidden, dtype=FP16)
            mixers = [s.op for s in layer.stages() if s.name in ("shift", "fused")]
        return bare + (whole - bare) * (1 - replaced) + layers * replaced * ops_seconds(mixers, on)

    total = {
        hybrid: seconds(PREFILL, hybrid=hybrid) + new * seconds(DECODE, hybrid=hybrid)
        for hybrid in (False, True)
    }
    return total[False] / total[True]


def _padded(length: int) -> int:
    return int(2 ** math.ceil(math.log2(length)))


def _state_update(batch: int, hidden: int) -> list[Op]:
    """One token of the two state spaces: both states read and written in fp32."""
    layer = H3(batch=batch, len_seq=1, dim=hidden, dtype=FP16)
    elements = int(layer.state_bytes() // FP32_BYTES)
    return [Elementwise(num_elements=elements, num_inputs=1, vector_flops_per_element=4,
                        dtype=FP32)]  # fmt: skip


def evaluate_flashbutterfly(claim: Claim) -> Value:
    """A convolution of three passes against the library's, where the setting gives its shape."""
    if "convolution" not in claim.quantity.casefold():
        not_modelled("setting incomplete: no gpu, no shapes of the model")
    batch, hidden, seq = claim.sizes("batch", "hidden", "seq")
    op = {"batch": batch, "channels": hidden, "len_seq": seq}
    library = FFTConvolution(**op)  # type: ignore[arg-type]
    fused = FlashFFTConv(**op, order=3)  # type: ignore[arg-type]
    on = claim.device()
    return ops_seconds([library], on) / ops_seconds([fused], on)


def evaluate_hyena_dna(claim: Claim) -> Value:
    """Forward and backward of whole models, Hyena's convolutions through the library.

    Chosen where the setting is silent: heads of 64, a feed-forward layer of four times the width.
    A backward pass of anything but attention is taken for two forward ones. Off by 2: which heads
    and which kernel the Transformer had is not stated.
    """
    if "fwd+bwd" not in claim.quantity.casefold():
        not_modelled("setting incomplete: no batch, no hidden size")
    seq, layers, hidden, batch = claim.sizes("seq", "layers", "hidden", "batch")
    on = claim.device()
    shape = FlashAttention2(
        batch=batch, num_heads=max(hidden // ATTENTION_HEAD_DIM, 1), len_q=seq,
        head_dim=min(hidden, ATTENTION_HEAD_DIM), causal=True, dtype=FP16,
    )  # fmt: skip
    backward = FlashAttention2Backward(
        batch=shape.batch, num_heads=shape.num_heads, len_q=shape.len_q,
        head_dim=shape.head_dim, causal=True, dtype=FP16,
    )  # fmt: skip
    tokens = batch * seq
    mlp: list[Op] = [_linear(tokens, 4 * hidden, hidden), gelu(tokens * 4 * hidden, FP16),
                     _linear(tokens, hidden, 4 * hidden), add(tokens * hidden, FP16)]  # fmt: skip
    linear: list[Op] = [_linear(tokens, 3 * hidden, hidden), _linear(tokens, hidden, hidden)]
    hyena = Hyena(batch=batch, len_seq=seq, dim=hidden, fused=False, dtype=FP16)
    rest = 3 * ops_seconds(mlp, on)
    attention = ops_seconds([shape, backward], on, FLASH_KERNEL) + 3 * ops_seconds(linear, on)
    operator = 3 * ops_seconds([hyena], on)
    return layers * (attention + rest) / (layers * (operator + rest))


def _linear(rows: int, cols: int, inner: int) -> Matmul:
    return Matmul(m=rows, n=cols, k=inner, dtype=FP16)


# ---- Monarch Mixer ------------------------------------------------------------------------------


def evaluate_monarch_mixer(claim: Claim) -> Value:
    """Tokens/ms of the forward pass of BERT-base three ways, and whether it fits.

    Fast by a fifth to a third, the transformers' code most: its eager kernels lose more than they
    are counted here, its head's 30522 columns among them, which no 16-byte load divides.
    """
    (seq,), on = claim.sizes("seq"), claim.device()
    if str(claim.setting["gpu"]).strip().casefold() == "a100":
        on = device_named(MIXER_DEVICE)
    quantity = claim.quantity.casefold()
    if "speedup" in quantity:
        return _throughput("m2", seq, on) / _throughput("hf", seq, on)
    named = str(claim.setting.get("impl", claim.quantity)).casefold()
    way = "flash" if "flash" in named else "m2" if named.startswith(("m2", "monarch")) else "hf"
    if _batch(way, seq, on) == 0:
        return "OOM"
    return _throughput(way, seq, on)


def _throughput(way: str, seq: int, on: Device) -> float:
    """Tokens a millisecond."""
    batch = _batch(way, seq, on)
    if not batch:
        not_modelled("the model does not fit the device")
    layer = {"hf": _hf_layer, "flash": _flash_layer, "m2": _m2_layer}[way]
    ops = list(layer(batch, seq))
    fused = [op for op in ops if isinstance(op, FlashAttention2)]
    rest = [op for op in ops if not isinstance(op, FlashAttention2)]
    seconds = BERT_LAYERS * (ops_seconds(rest, on) + ops_seconds(fused, on, FLASH_KERNEL))
    seconds += ops_seconds(list(_bert_head(batch * seq)), on)
    return batch * seq / seconds / 1e3


def _batch(way: str, seq: int, on: Device) -> int:
    """Sequences whose activations fit: 32, or the largest half, quarter, ...; 0 where none does.

    Kept a score: the softmax in fp32, its cast copy, the dropout's mask; in the last layer, before
    they are freed, scores, scaled, masked, cast and dropped-out ones as well. Kept a token and
    layer: 20 rows of the model's width and 3 of the feed-forward layer's.
    """
    token = 20 * 2 * BERT_HIDDEN + 3 * 2 * BERT_FFN
    kept = BERT_LAYERS * seq * token + seq * BERT_VOCAB * (2 + FP32_BYTES)
    if way == "hf":
        kept += BERT_HEADS * seq**2 * ((4 + 2 + 1) * BERT_LAYERS + 2 + 2 + 2 + 4 + 4)
    batch = MAX_BATCH
    while batch and batch * kept > on.hbm.capacity_bytes:
        batch //= 2
    return batch


def _map(elements: int, given: DType, made: DType | None = None, inputs: int = 1) -> Elementwise:
    return Elementwise(num_elements=elements, num_inputs=inputs, dtype=given, out_dtype=made)


def _after(tokens: int) -> Iterator[Op]:
    """Dropout, residual and layer norm in fp32, the cast that the next product starts with."""
    width = tokens * BERT_HIDDEN
    yield _map(width, FP16)
    yield _map(width, FP32, inputs=2)
    yield LayerNorm(rows=tokens, cols=BERT_HIDDEN, dtype=FP32)
    yield _map(width, FP32, FP16)


def _hf_layer(batch: int, seq: int) -> Iterator[Op]:
    """transformers' BertLayer: unfused attention with scores in fp16, their softmax in fp32."""
    tokens, scores = batch * seq, batch * BERT_HEADS * seq**2
    for _ in range(2):  # autocast casts the norm's output for each of three products
        yield _map(tokens * BERT_HIDDEN, FP32, FP16)
    for _ in range(3):
        yield _linear(tokens, BERT_HIDDEN, BERT_HIDDEN)
        yield _map(tokens * BERT_HIDDEN, FP16)  # heads apart
    plain = StandardAttention(batch=batch, num_heads=BERT_HEADS, len_q=seq, head_dim=64, dtype=FP16)
    first, softmax, last = (stage.op for stage in plain.stages())
    yield first
    yield _map(scores, FP16)  # scaled
    yield _map(scores, FP16)  # masked
    yield _map(scores, FP16, FP32)
    yield softmax.over(dtype=FP32)
    yield _map(scores, FP32)  # dropout
    yield _map(scores, FP32, FP16)
    yield last
    yield _map(tokens * BERT_HIDDEN, FP16)  # heads side by side
    yield _linear(tokens, BERT_HIDDEN, BERT_HIDDEN)
    yield from _after(tokens)
    yield _linear(tokens, BERT_FFN, BERT_HIDDEN)
    yield gelu(tokens * BERT_FFN, FP16)
    yield _linear(tokens, BERT_HIDDEN, BERT_FFN)
    yield from _after(tokens)


def _flash_layer(batch: int, seq: int) -> Iterator[Op]:
    """MosaicML's BERT: fused attention, one projection, a gated feed-forward layer.

    Its attention reads a bias of batch heads seq^2 numbers in fp32 (ALiBi added to the mask): as
    many bytes here as half as many copied. Around it tokens are padded and unpadded by copies.
    """
    tokens = batch * seq
    yield _linear(tokens, 3 * BERT_HIDDEN, BERT_HIDDEN)
    yield _map(3 * tokens * BERT_HIDDEN, FP16)
    yield _map(batch * BERT_HEADS * seq**2 // 2, FP32)
    yield _map(tokens * BERT_HIDDEN, FP16)
    yield FlashAttention2(batch=batch, num_heads=BERT_HEADS, len_q=seq, head_dim=64, dtype=FP16)
    yield _linear(tokens, BERT_HIDDEN, BERT_HIDDEN)
    yield from _after(tokens)
    yield _linear(tokens, 2 * BERT_FFN, BERT_HIDDEN)
    yield gelu(tokens * BERT_FFN, FP16)
    yield mul(tokens * BERT_FFN, FP16)
    yield _linear(tokens, BERT_HIDDEN, BERT_FFN)
    yield from _after(tokens)


def _m2_layer(batch: int, seq: int) -> Iterator[Op]:
    """Monarch Mixer with a second, ungated convolution beside the first (residual_long_conv).

    Convolutions want channels before tokens: copies transpose projections, input and output.
    """
    width = batch * seq * BERT_HIDDEN
    layer = MonarchMixer(batch=batch, len_seq=seq, dim=BERT_HIDDEN, causal=True, dtype=FP16)
    for stage in layer.stages():
        yield stage.op
        if stage.name == "project":
            yield _map(3 * width, FP16)
        if stage.name == "convolve":
            yield _map(width, FP16)
            yield layer.convolution().over(gated=False)
            yield add(width, FP16)
            yield _map(width, FP16)
        if stage.name in ("output", "down"):
            yield from _after(batch * seq)


def _bert_head(tokens: int) -> Iterator[Op]:
    """Dense, GELU, norm, logits of every token."""
    yield _linear(tokens, BERT_HIDDEN, BERT_HIDDEN)
    yield gelu(tokens * BERT_HIDDEN, FP16)
    yield LayerNorm(rows=tokens, cols=BERT_HIDDEN, dtype=FP32)
    yield _linear(tokens, BERT_VOCAB, BERT_HIDDEN)


# ---- formulas ---------------------------------------------------------------------------------


def evaluate_sgconv(claim: Claim) -> Value:
    """Parameters of the filters: the formula where the op's count agrees with it."""
    if "parameters" not in claim.quantity.casefold():
        not_modelled("setting incomplete: no gpu, no shapes, no S4 to compare with")
    for channels, length, dim in ((64, 1024, 16), (256, 16384, 64), (768, 2**20, 32)):
        op = MultiscaleFilter(channels=channels, len_seq=length, kernel_dim=dim)
        if not math.isclose(float(op.num_parameters()), channels * dim * math.log2(length / dim)):
            return f"{op.num_parameters()} at H {channels}, L {length}, d {dim}"
    return _formula(claim, "H*d*log2(L/d)")


def evaluate_orchid(claim: Claim) -> Value:
    """The complexity, from the counted flops of the transforms."""
    if "complexity" not in claim.quantity.casefold():
        not_modelled("the paper's crossover is a plot without device or batch")
    for dim in (64, 768):
        ratios = [_transform_flops(2**q, dim) / (2**q * q * dim) for q in range(12, 24, 2)]
        if max(ratios) / min(ratios) > 1.02:
            return f"transforms per L log L d between {min(ratios):.3g} and {max(ratios):.3g}"
    return _formula(claim, "O(L log L d)")


def _transform_flops(length: int, dim: int) -> float:
    """Butterflies of the layer's three transforms, of which each has L / 2 log2 L a channel.

    The op's count less what grows as L: the twist and the product, 6 flops a point each.
    """
    op = FFTConvolution(batch=1, channels=dim, len_seq=length)
    linear = dim * length * (3 * 6 + 6)
    return float(op.work(float(2**52)).vector_flops) - linear


def evaluate_tcnca(claim: Claim) -> Value:
    """Speedups over MEGA: no device is named."""
    claim.device()
    not_modelled("setting incomplete: no hidden size, batch, width and depth of the network")


def _formula(claim: Claim, confirmed: str) -> str:
    """The claim's own spelling of a formula that was confirmed."""
    text = str(claim.setting.get("formula", confirmed))
    return text if _squeezed(text) == _squeezed(confirmed) else confirmed


def _squeezed(text: str) -> str:
    return re.sub(r"\s", "", text).casefold()
