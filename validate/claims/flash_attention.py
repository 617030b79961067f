"""Claims of FlashAttention and its block-sparse form (Dao et al. 2022, arXiv 2205.14135).

Runtimes (tables 9 to 20) are of one attention call in PyTorch, forward, backward or both:

    T = max(sum of kernels, calls `CALL_S` + [both passes] `ENGINE_S`)

`flash`, `bsflash` are one kernel a pass, that of a later FlashAttention 1 (label figure:fa1) times
how much slower the kernel of the paper was; dropout adds its random numbers. `pytorch` is a list
of kernels: products, softmax, a boolean mask that is filled in and a dropout that keeps its mask;
`megatron` fuses scale, mask and softmax. Peak memory (table 21) counts arrays, `UNITS`; bytes moved
(figure 2) are the sum over the kernels of what each reads and writes, or the paper's algorithms 1
and 4 with its own blocks.

Off. GFLOPs and runtimes of figure 2: 66.6 and 75.2 GFLOP differ by one product over 64 heads, not
over the 1,024 of 64 sequences of 16 heads, for which the bytes are right; 7.3 ms for those would be
twice the rate of the runtime tables. bsflash on 512 and 1,024 positions: published times a position
are 0.5 to 0.7 of those from 2,048 on, where they are constant, as if the mask kept fewer keys
there; the paper does not say, so the count of keys is the same for all. flash on 512 and 1,024
positions, backward: published 20 to 35 % above the rate of longer ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from hwmodels.device import Device
from hwmodels.dtypes import FP8, FP32, DType
from simulator.kernel_time.predict import predict
from validate.claims.claim import EXACT_TOLERANCE, Claim, Value, not_modelled
from validate.claims.decoder import ops_seconds
from workloads.numeric import ceil_div
from workloads.op import Op
from workloads.ops.attention import AttentionOp, StandardAttention
from workloads.ops.attention_backward import StandardAttentionBackward
from workloads.ops.block_sparse_attention import (
    BlockSparseAttention,
    BlockSparseAttentionBackward,
)
from workloads.ops.elementwise import Elementwise
from workloads.ops.flash_attention_1 import FlashAttention1, FlashAttention1Backward

OOM: Final = "OOM"
MIB: Final = 2**20
FLASH, SPARSE, PYTORCH, MEGATRON = "flash", "bsflash", "pytorch", "megatron"
FORWARD, BACKWARD, BOTH = "fwd", "bwd", "fwd+bwd"
PASSES: Final = {FORWARD: (FORWARD,), BACKWARD: (BACKWARD,), BOTH: (FORWARD, BACKWARD)}

SLOWNESS: Final = {FORWARD: 2.126, BACKWARD: 1.173}
"""Time of the kernels of the paper (May 2022: one thread block a head) over that of figure:fa1,
which knows FlashAttention 1 of 2023 (thread blocks along the sequence as well), both without the
launch. One row a pass: flash, no mask, seq 4096: 8.42 ms forward and 21.57 ms backward."""
SPARSE_SLOWNESS: Final = {False: 1.316, True: 1.764}
"""Further slowness of the block-sparse backward kernel, without and with a padding mask: a head's
key blocks follow one another, and the fill and drain of each are not hidden behind products where
it meets 256 queries alone. One row each: bsflash bwd, seq 4096, 2.34 ms and 3.13 ms."""
PRODUCTS_SLOWNESS: Final = 1.92
"""Time of the four products of PyTorch's backward pass (einsum, CUDA 11) over that of today's
batched products. One row: pytorch bwd, no mask, seq 4096, 33.87 ms less the softmax kernel."""
FILL_SLOWNESS: Final = 2.48
"""Time of masked_fill under a mask broadcast over heads and queries, whose indices are computed
element by element, over that of a flat map. One row: pytorch fwd, padding mask, seq 1024, 1.93 ms,
less the other kernels."""
FILL_COPIES: Final = 4
"""Copies of the scores' gradient in the backward pass of an in-place fill of a view: CopySlices
copies it in, clones it and copies the result back, masked_fill clones it once more
(torch/csrc/autograd/functions/tensor.cpp)."""
DROPOUT_INSTRUCTIONS: Final = {FORWARD: 12, BACKWARD: 14}
"""Vector instructions a score of dropout in a fused kernel: Philox-4x32-10 takes ten rounds of
eight for 128 bits, which make eight 16-bit numbers; compare and select, again for dP backward."""
CALL_S: Final = 50e-6
"""Host seconds of a PyTorch call that launches a kernel. One row: pytorch fwd, no mask, seq 128,
0.21 ms for four calls."""
ENGINE_S: Final = 0.12e-3
"""Host seconds that a forward and a backward pass take together beyond the two alone: building the
graph, waking its thread. One row: flash fwd+bwd, no mask, seq 128, 0.31 ms less four calls."""
BLOCK_MASK_S: Final = 0.5e-3
"""Host seconds to bring the block mask into the kernel's form, five sorts and what belongs to them
(convert_blockmask of flash_blocksparse_attn_interface.py), for which the kernel waits; done in each
forward call where there is no padding mask. One row: bsflash fwd, no mask, seq 128, 0.56 ms."""

UNITS: Final = {PYTORCH: 10, FLASH: 11}
"""Arrays of q's size alive at the peak. Both: q, k, v, o and the gradients of all four. pytorch: k
over sqrt(d) and its gradient. flash: dq, dk and dv once more, stacked into the gradient of qkv."""
SCORES: Final = {FORWARD: 2, BACKWARD: 4}
"""Matrices of scores alive: S and P; in the backward pass also dP and dS."""
ACCUMULATOR_UNITS: Final = 2
"""flash, where there is more than one block of keys: o or dq in fp32."""
STATISTICS: Final = 2
"""flash: fp32 numbers a row, the logsumexp and D = rowsum(dO * O)."""
QUERY_BLOCK, KEY_BLOCK = 16, 256
"""Queries and keys of a block of the authors' kernel and of its masks, at head_dim 64."""
SRAM_BYTES: Final = 192 * 1024
"""M of the paper on an A100 (section 2.1)."""
ROOM_BYTES: Final = 2**20
"""Fast memory that holds the paper's blocks: it counts scores and accumulators outside M."""
BYTE: Final = FP8
"""A byte an element, as PyTorch's boolean masks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One row of the tables."""

    impl: str
    batch: int
    heads: int
    seq: int
    head_dim: int
    causal: bool
    masked: bool
    dropout: bool
    dtype: DType

    @property
    def num_scores(self) -> int:
        """Elements of all heads' scores."""
        return self.batch * self.heads * self.seq**2

    @property
    def unit_bytes(self) -> float:
        """Bytes of q."""
        elements = self.batch * self.heads * self.seq * self.head_dim
        return elements * self.dtype.bytes_per_element

    def of(self, kind: Callable[..., AttentionOp], **more: object) -> AttentionOp:
        """An op of this shape."""
        fields: dict[str, object] = {
            "batch": self.batch, "num_heads": self.heads, "len_q": self.seq,
            "head_dim": self.head_dim, "causal": self.causal, "dtype": self.dtype,
        }  # fmt: skip
        return kind(**(fields | more))


def evaluate_flash_attention(claim: Claim) -> Value:
    """Runtimes (ms), peak memory (MiB), bytes moved (GB), GFLOPs, and the order of growth."""
    quantity = claim.quantity.casefold()
    if "hbm accesses" in quantity:
        return _growth(claim)
    if "accuracy" in quantity:
        not_modelled("time to an accuracy depends on how many steps it takes")
    if "training speedup" in quantity or "lra" in quantity:
        not_modelled("setting incomplete: no batch, nor which kernels the baseline fuses")
    if "hbm read+write" in quantity:
        impl = FLASH if "flash" in quantity else PYTORCH
        return moved_bytes(_call(claim, impl=impl, variant="causal mask, dropout")) / 1e9
    if "gflops" in quantity:
        calls = [_call(claim, impl=i, variant="") for i in (PYTORCH, FLASH)]
        return flops(calls[0]) / 1e9, flops(calls[1]) / 1e9
    if "standard vs flash" in quantity:
        times = [
            _seconds(_call(claim, impl=i, variant="padding mask, dropout"), BOTH, claim.device())
            for i in (FLASH, PYTORCH)
        ]
        return times[0] * 1e3, times[1] * 1e3
    return _table(claim)


def evaluate_block_sparse_fa(claim: Claim) -> Value:
    """The rows of the same tables; peak memory is that of flash."""
    return _table(claim)


def _table(claim: Claim) -> Value:
    """One cell of tables 9 to 21."""
    quantity, (impl,) = claim.quantity.casefold(), claim.need("impl")
    if "peak memory" in quantity:
        call = _call(claim, impl=str(impl), variant="")
        return _or_oom(call, BACKWARD, claim, peak_bytes(call, BACKWARD) / MIB)
    if "runtime" in quantity:
        variant, part = claim.need("variant", "pass_")
        if part not in PASSES:
            not_modelled(f"setting unclear: pass_ = {part!r}")
        call = _call(claim, impl=str(impl), variant=str(variant))
        milliseconds = _seconds(call, str(part), claim.device()) * 1e3
        return _or_oom(call, PASSES[part][-1], claim, milliseconds)
    not_modelled(f"no rule for '{claim.quantity}'")


def _or_oom(call: Call, part: str, claim: Claim, value: float) -> Value:
    return value if peak_bytes(call, part) <= claim.device("A100-40GB").hbm.capacity_bytes else OOM


def _call(claim: Claim, *, impl: str, variant: str) -> Call:
    """The call that a setting describes; 'no mask' and 'no dropout' name what is absent."""
    name = impl.casefold()
    if name not in (FLASH, SPARSE, PYTORCH, MEGATRON):
        not_modelled(f"no kernels of '{impl}' are known here")
    batch, heads, seq, dim = claim.sizes("batch", "heads", "seq", "head_dim")
    return Call(
        impl=name, batch=batch, heads=heads, seq=seq, head_dim=dim,
        causal=bool(claim.setting.get("causal", False)),
        masked="mask" in variant and "no mask" not in variant,
        dropout="dropout" in variant and "no dropout" not in variant,
        dtype=claim.dtype(),
    )  # fmt: skip


# ---- time ----------------------------------------------------------------------------------


def _seconds(call: Call, part: str, on: Device) -> float:
    """A forward pass, a backward pass or both."""
    parts = PASSES[part]
    device = sum(device_seconds(call, p, on) for p in parts)
    host = sum(num_calls(call, p) for p in parts) * CALL_S + ENGINE_S * (len(parts) - 1)
    waits = BLOCK_MASK_S * (call.impl == SPARSE and not call.masked and FORWARD in parts)
    return max(device, host) + waits


def device_seconds(call: Call, part: str, on: Device) -> float:
    """The kernels of one pass."""
    if call.impl in (FLASH, SPARSE):
        return _fused_seconds(call, part, on)
    kernels = unfused(call, part)
    return sum(slowness * ops_seconds([op], on) for op, slowness in kernels)


def _fused_seconds(call: Call, part: str, on: Device) -> float:
    op = fused(call, part)
    kernel = predict(op, on=on).parts[0].prediction
    launch = float(kernel.terms["launch"])
    slowness = SLOWNESS[part]
    if call.impl == SPARSE and part == BACKWARD:
        slowness *= SPARSE_SLOWNESS[call.masked]
    seconds = launch + slowness * (float(kernel.seconds) - launch)
    if call.dropout:
        rate = on.vector_rate_flops_per_s(FP32)
        if rate is None:
            not_modelled(f"{on.id} states no vector rate")
        scores = call.batch * call.heads * float(op.num_pairs())
        seconds += scores * DROPOUT_INSTRUCTIONS[part] / (rate / 2)  # a flop is half an FMA
    return seconds


def fused(call: Call, part: str) -> AttentionOp:
    """The op of a fused pass; a block mask's sequence is padded to whole blocks."""
    if call.impl == FLASH:
        return call.of(FlashAttention1 if part == FORWARD else FlashAttention1Backward)
    block = min(KEY_BLOCK, int(ceil_div(call.seq, QUERY_BLOCK)) * QUERY_BLOCK)
    kind = BlockSparseAttention if part == FORWARD else BlockSparseAttentionBackward
    padded = int(ceil_div(call.seq, block)) * block
    return call.of(kind, len_q=padded, block_q=QUERY_BLOCK, block_k=block)


def unfused(call: Call, part: str) -> list[tuple[Op, float]]:
    """The kernels of one pass, each with how much longer it takes than today's."""
    kind = StandardAttention if part == FORWARD else StandardAttentionBackward
    slow = PRODUCTS_SLOWNESS if part == BACKWARD else 1.0
    kernels: list[tuple[Op, float]] = [
        (stage.op, 1.0 if stage.name == "softmax" else slow) for stage in call.of(kind).stages()
    ]
    flat = _map(call)
    if call.masked and call.impl == PYTORCH:
        kernels.append((flat, FILL_SLOWNESS))
        kernels += [(flat, 1.0)] * (FILL_COPIES * (part == BACKWARD))
    return kernels + (_dropout(call) if call.dropout else [])


def _map(call: Call) -> Elementwise:
    return Elementwise(num_elements=call.num_scores, dtype=call.dtype)


def _dropout(call: Call) -> list[tuple[Op, float]]:
    """Scores in and out, and a byte each of the mask that is kept."""
    mask = Elementwise(num_elements=call.num_scores, num_inputs=0, dtype=BYTE)
    return [(_map(call), 1.0), (mask, 1.0)]


def num_calls(call: Call, part: str) -> int:
    """PyTorch calls of one pass.

    flash: the function, and without a padding mask the lengths of the sequences; backward the
    function and its output, with a padding mask also the gradient of the unpadding, in two.
    pytorch: scale, product, softmax, product; the mask is inverted and filled in. megatron wraps
    softmax and dropout in functions of its own.
    """
    forward = part == FORWARD
    if call.impl in (FLASH, SPARSE):
        return (1 if call.masked else 2) if forward else (4 if call.masked else 2)
    more = int(call.dropout)
    if call.impl == MEGATRON:
        return 6 + more
    if forward:
        return 4 + 2 * call.masked + more
    return 5 + 4 * call.masked + more


# ---- counts --------------------------------------------------------------------------------


def peak_bytes(call: Call, part: str) -> float:
    """Bytes of the arrays alive together, inputs included.

    >>> from hwmodels.dtypes import FP16
    >>> one = Call(impl=FLASH, batch=16, heads=8, seq=2048, head_dim=64, causal=False, masked=False,
    ...            dropout=False, dtype=FP16)
    >>> peak_bytes(one, BACKWARD) / MIB                      # 13 units of 32 MiB, 2 of statistics
    418.0
    """
    rows = call.batch * call.heads * call.seq
    if call.impl in (FLASH, SPARSE):
        units = UNITS[FLASH] + ACCUMULATOR_UNITS * (call.seq > KEY_BLOCK)
        return units * call.unit_bytes + STATISTICS * rows * FP32.bytes_per_element
    scores = SCORES[part] * call.num_scores * call.dtype.bytes_per_element
    return UNITS[PYTORCH] * call.unit_bytes + scores


def moved_bytes(call: Call) -> float:
    """Read and written, forward and backward.

    Standard: each kernel's inputs once and outputs once, a causal mask that is added to the scores
    (nothing to do backward) and dropout: 18 times the scores and 12 times q. flash: the paper's
    algorithms with its blocks for M = 192 KB, 384 keys at d = 64 in fp16.
    """
    if call.impl == FLASH:
        kinds = (FlashAttention1, FlashAttention1Backward)
        ops = [call.of(kind, sram_bytes=SRAM_BYTES) for kind in kinds]
        return sum(float(op.work(ROOM_BYTES).bytes) for op in ops)
    kernels: list[Op] = [
        stage.op
        for kind in (StandardAttention, StandardAttentionBackward)
        for stage in call.of(kind).stages()
    ]
    kernels += [op for op, _ in 2 * _dropout(call)]
    return sum(float(op.compulsory_bytes()) for op in [*kernels, _map(call)])


def flops(call: Call) -> float:
    """Flops of the products, forward and backward: 12 N^2 d a head, with recomputation 14."""
    kinds = (
        (FlashAttention1, FlashAttention1Backward)
        if call.impl == FLASH
        else (StandardAttention, StandardAttentionBackward)
    )
    return sum(float(call.of(kind).min_flops()[call.dtype]) for kind in kinds)


def _growth(claim: Claim) -> str:
    """The formula of the claim, where the counts grow as it says, else what they do instead.

    At N = 2^18, d = 64 and M = 64 K to 256 K elements: flash moves N^2 d^2 / M elements times a
    constant, the unfused passes N^2 times one.
    """
    (formula,) = claim.need("formula")
    large = Call(
        impl=FLASH, batch=1, heads=1, seq=2**18, head_dim=64, causal=False, masked=False,
        dropout=False, dtype=claim.dtype(),
    )  # fmt: skip

    def elements(kind: Callable[..., AttentionOp], seq: int, **more: object) -> float:
        moved = large.of(kind, len_q=seq, **more).work(16 * MIB).bytes
        return float(moved) / large.dtype.bytes_per_element

    def fused_constant(seq: int, memory: int) -> float:
        bytes_of_it = memory * int(large.dtype.bytes_per_element)
        found = elements(FlashAttention1, seq, sram_bytes=bytes_of_it)
        return found * memory / (seq * large.head_dim) ** 2

    sizes = (large.seq, 2 * large.seq)
    constants = [fused_constant(n, m * 1024) for n in sizes for m in (64, 128, 256)]
    plain = [elements(StandardAttention, n) / n**2 for n in sizes]
    worst = max(max(c) / min(c) for c in (constants, plain))
    if worst <= 1 + EXACT_TOLERANCE:
        return str(formula)
    return f"constants of the orders differ by a factor {worst:.3f}"
