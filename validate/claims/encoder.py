"""Claims on encoders and their attention: ByteTransformer, NTK-Attention, Music Transformer.

ByteTransformer's table (its repository, for arXiv 2210.03052): milliseconds of a BERT encoder's
forward pass. Each implementation is the kernels it runs, layer by layer:

    device   layers x `SLOWNESS` (sum of kernels + mask) + syncs x `SYNC_S`
    time     max(device, layers x host)               host: eager PyTorch alone

                    tokens of products and norms   attention
    PyTorch         b max                          unfused, copies, one pass to scale and mask
    DeepSpeed       b max                          unfused, biases and layouts fused
    FasterT.        b max                          fused up to 384, else unfused
    FasterT. r.p.   sum of lengths                 the same; the unfused one is padded
    ByteTransformer sum of lengths (b > 2)         `PackedAttention`, packed

What ByteTransformer does is read from its source (bert_transformer.h, cutlass_attention.h): on
compute capability 8.0 the kernel that holds a sequence ends at 128, longer ones take grouped
products, and up to two sequences nothing is packed. It is called layer by layer, so that each layer
counts its tokens anew and waits for the result. Lengths are those of `PackedAttention`.

Mask: FasterTransformer's softmax reads [batch, max, max] for every head
(unfused_attention_kernels.cu), ByteTransformer's first product loads it as its third operand;
DeepSpeed's is taken to do so too, which was not looked up.

Off: long sequences of DeepSpeed, up to 20 % too fast; remove-padding with one sequence, 20 to 30 %
too fast: it ran no faster than plain FasterTransformer there, as if nothing had been removed, while
the setting says 0.6 of the maximum.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from hwmodels.device import Device
from hwmodels.dtypes import FP32, DType
from validate.claims.claim import EXACT_TOLERANCE, Claim, Value, not_modelled
from validate.claims.decoder import ops_seconds
from validate.claims.formula import formula_value
from workloads.op import Op
from workloads.ops.elementwise import Elementwise
from workloads.ops.matmul import BatchedMatmul, Matmul
from workloads.ops.norm import LayerNorm
from workloads.ops.ntk_attention import NtkAttention
from workloads.ops.packed_attention import PackedAttention
from workloads.ops.relative_attention import RelativeAttention
from workloads.ops.softmax import Softmax

SLOWNESS: Final = 1.33
"""Seconds of a kernel on the table's A100 over those of the catalogue's. One row:
FasterTransformer, batch 16, max_seq 256, 6.77 ms. A measured ratio without a known cause: the
source says neither which A100 it was nor its clocks."""
TABLE_GPU: Final = "a100"
"""Devices that `SLOWNESS` is for."""
HOST_S: Final = 0.241e-3
"""PyTorch: host seconds to issue a layer. One row: batch 1, max_seq 512, 2.89 ms."""
SYNC_S: Final = 35e-6
"""Counting tokens: two small kernels, a copy to the host and its wait, the device idle. One row:
ByteTransformer, batch 16, max_seq 64, 2.09 ms, less its kernels."""
LEN_FUSED: Final = 384
"""Longest sequence of FasterTransformer's fused attention, which is TensorRT's."""
LEN_SHORT: Final = 128
"""ByteTransformer: longest `max_seq` of the kernel that holds a sequence, on an A100."""
BATCH_PADDED: Final = 2
"""ByteTransformer: largest batch that is not packed."""
FFN: Final = 4
"""Width of the feed-forward part over that of the model: BERT's."""

PYTORCH, DEEPSPEED, FASTER, FASTER_PACKED, BYTE = (
    "pytorch", "deepspeed", "fastertransformer", "fastertransformer remove-padding",
    "bytetransformer",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """One cell of the table: `mean_frac` is the mean length over `max_seq`."""

    batch: int
    heads: int
    head_dim: int
    layers: int
    max_seq: int
    mean_frac: float
    on: Device
    dtype: DType

    @property
    def hidden(self) -> int:
        """Width of the model."""
        return self.heads * self.head_dim

    @property
    def padded_tokens(self) -> int:
        """Tokens with padding."""
        return self.batch * self.max_seq

    @property
    def mask_seconds(self) -> float:
        """The mask [batch, max_seq, max_seq] read for every head, as fast as memory gives it."""
        scores = self.heads * self.padded_tokens * self.max_seq
        rate = self.on.hbm.bytes_per_s
        if rate is None:
            not_modelled(f"no bandwidth is known of the memory of {self.on.name}")
        return scores * self.dtype.bytes_per_element / rate

    def packed(self, len_short: int, *, padded: bool = False) -> PackedAttention:
        """The attention of the real lengths, or of `max_seq` everywhere."""
        return PackedAttention(
            batch=self.batch, num_heads=self.heads, len_max=self.max_seq, head_dim=self.head_dim,
            mean_frac=1.0 if padded else self.mean_frac, len_short=len_short, dtype=self.dtype,
        )  # fmt: skip


# ---- ByteTransformer -----------------------------------------------------------------------


def evaluate_bytetransformer(claim: Claim) -> Value:
    """Milliseconds of a forward pass. The abstract's speedups name no shapes."""
    quantity = claim.quantity.casefold()
    if "speedup" in quantity:
        not_modelled("setting incomplete: no batch, max_seq")
    if "forward" in quantity:
        return 1e3 * forward_seconds(_encoder(claim), _impl(claim))
    not_modelled(f"no rule for '{claim.quantity}'")


def _impl(claim: Claim) -> str:
    (text,) = claim.need("impl")
    name = re.sub(r"[\s_-]+", " ", str(text).casefold()).replace("remove padding", "remove-padding")
    known = {PYTORCH, DEEPSPEED, FASTER, FASTER_PACKED, BYTE}
    found = name.replace(" with ", " ").removesuffix(" jit")
    if found not in known:
        not_modelled(f"no kernels are known of the implementation '{text}'")
    return found


def _encoder(claim: Claim) -> Encoder:
    if claim.setting.get("n_gpus", 1) != 1:
        not_modelled("setting unclear: one encoder on several devices")
    batch, heads, head_dim, layers, max_seq = claim.sizes(
        "batch", "heads", "head_dim", "layers", "max_seq"
    )
    return Encoder(
        batch=batch, heads=heads, head_dim=head_dim, layers=layers, max_seq=max_seq,
        mean_frac=_mean_frac(claim, max_seq), on=claim.device(), dtype=claim.dtype(),
    )  # fmt: skip


def _mean_frac(claim: Claim, max_seq: int) -> float:
    """'0.6*max', or a length."""
    (mean,) = claim.need("avg_seq")
    found = re.fullmatch(r"\s*([\d.]+)\s*\*\s*max\w*\s*", str(mean))
    try:
        share = float(found[1]) if found else float(mean) / max_seq
    except (TypeError, ValueError):
        not_modelled(f"setting unclear: avg_seq = {mean!r}")
    if not 0 < share <= 1:
        not_modelled(f"setting unclear: avg_seq = {mean!r} is no length up to max_seq")
    return share


def forward_seconds(cell: Encoder, impl: str) -> float:
    """Seconds of all layers, by the module's equation.

    >>> from hwmodels import catalog
    >>> from hwmodels.dtypes import FP16
    >>> cell = Encoder(batch=16, heads=12, head_dim=64, layers=12, max_seq=448, mean_frac=0.6,
    ...                on=catalog.device("a100-sxm4-80gb"), dtype=FP16)
    >>> forward_seconds(cell, BYTE) < forward_seconds(cell, FASTER) < forward_seconds(cell, PYTORCH)
    True
    """
    packs = packs_tokens(cell, impl)
    layer = ops_seconds(list(_linear(cell, impl)), cell.on) + _attention_seconds(cell, impl)
    slowness = SLOWNESS if TABLE_GPU in cell.on.id else 1.0
    device = cell.layers * slowness * layer
    if packs:
        device += SYNC_S * (cell.layers if impl == BYTE else 1)
    return max(device, cell.layers * HOST_S) if impl == PYTORCH else device


def packs_tokens(cell: Encoder, impl: str) -> bool:
    """Whether the implementation leaves padding out of products and norms."""
    return impl == FASTER_PACKED or (impl == BYTE and cell.batch > BATCH_PADDED)


def num_tokens(cell: Encoder, impl: str) -> int:
    """Tokens of products and norms."""
    return int(cell.packed(LEN_SHORT, padded=not packs_tokens(cell, impl)).num_tokens())


def _linear(cell: Encoder, impl: str) -> Iterator[Op]:
    """Products, norms and activation of a layer; the layouts of Q, K, V and O are attention's."""
    tokens, hidden, ffn = num_tokens(cell, impl), cell.hidden, FFN * cell.hidden
    projections = 3 if impl == PYTORCH else 1
    for _ in range(projections):
        yield Matmul(m=tokens, n=3 * hidden // projections, k=hidden, dtype=cell.dtype)
    for n, k in ((hidden, hidden), (ffn, hidden), (hidden, ffn)):
        yield Matmul(m=tokens, n=n, k=k, dtype=cell.dtype)
    for _ in range(2):  # the residual is a kernel of its own in PyTorch
        if impl == PYTORCH:
            yield _map(tokens * hidden, cell.dtype, num_inputs=2)
        yield LayerNorm(rows=tokens, cols=hidden, dtype=cell.dtype, residual=impl != PYTORCH)
    if impl != BYTE:  # there the product's epilogue
        yield _map(tokens * ffn, cell.dtype)
    elif packs_tokens(cell, impl):  # each layer packs its input and writes its output padded
        yield _map(tokens * hidden, cell.dtype)
        yield _map(cell.padded_tokens * hidden, cell.dtype)


def _attention_seconds(cell: Encoder, impl: str) -> float:
    """From the product of Q, K and V to what the output projection reads."""
    if impl == BYTE:
        return _packed_seconds(cell)
    width = cell.padded_tokens * cell.hidden
    if impl in (FASTER, FASTER_PACKED) and cell.max_seq <= LEN_FUSED:
        attention = cell.packed(cell.max_seq, padded=impl == FASTER)
        bias = _map(3 * num_tokens(cell, impl) * cell.hidden, cell.dtype)
        return ops_seconds([bias, attention], cell.on)
    products = cell.batch * cell.heads
    kernels: list[Op] = [
        BatchedMatmul(batch=products, m=cell.max_seq, n=cell.max_seq, k=cell.head_dim,
                      dtype=cell.dtype),
        Softmax(rows=products * cell.max_seq, cols=cell.max_seq, dtype=cell.dtype),
        BatchedMatmul(batch=products, m=cell.max_seq, n=cell.head_dim, k=cell.max_seq,
                      dtype=cell.dtype),
        _map(width, cell.dtype),
    ]  # fmt: skip
    if impl == PYTORCH:  # Q, K and V apart; the compiler fuses scale and mask into one pass
        kernels += [_map(width, cell.dtype)] * 3
        kernels.append(_map(products * cell.max_seq**2, cell.dtype))
        return ops_seconds(kernels, cell.on)
    return ops_seconds([*kernels, _map(3 * width, cell.dtype)], cell.on) + cell.mask_seconds


def _packed_seconds(cell: Encoder) -> float:
    """Long sequences: Q, K and V written padded, the mask read beside each real score."""
    packed = packs_tokens(cell, BYTE)
    attention = cell.packed(LEN_SHORT, padded=not packed)
    seconds = ops_seconds([attention], cell.on)
    if cell.max_seq <= LEN_SHORT:
        return seconds
    moved = (num_tokens(cell, BYTE) + cell.padded_tokens) // 2
    share = float(attention.num_pairs() / attention.padded_pairs())
    bias = _map(3 * moved * cell.hidden, cell.dtype)
    return seconds + ops_seconds([bias], cell.on) + share * cell.mask_seconds


def _map(elements: int, dtype: DType, *, num_inputs: int = 1) -> Elementwise:
    return Elementwise(num_elements=elements, num_inputs=num_inputs, dtype=dtype)


# ---- NTK-Attention -------------------------------------------------------------------------

DIMS: Final = (64, 512, 4096)
PREFIXES: Final = (1000, 100_000)
"""Widths and prefix lengths at which a formula is tried."""


def evaluate_ntk_attention(claim: Claim) -> Value:
    """'X vs Y' parameters of the state and of the prefix: the formula where the op confirms it."""
    if "param" not in claim.quantity.casefold():
        not_modelled(f"no rule for '{claim.quantity}'")
    (text,) = claim.need("formula")
    state, _, prefix = str(text).partition(" vs ")
    for dim in DIMS:
        op = NtkAttention(num_heads=1, len_q=1, head_dim=dim)
        for length in PREFIXES:
            sizes = {"d": dim, "m": length}
            pairs = [(state, float(op.state_parameters()))]
            if prefix:
                pairs.append((prefix, float(op.prefix_parameters(length))))
            for formula, counted in pairs:
                if not _near(formula_value(formula, sizes), counted):
                    return f"{counted:.6g} at {sizes}"
    return str(text)


# ---- Music Transformer ---------------------------------------------------------------------

MEGABYTE: Final = 1e6


def evaluate_music_transformer(claim: Claim) -> Value:
    """Megabytes of the embeddings, kept and gathered, for lengths L and width D of all heads.

    The example is off by L: its two figures, 4.2 MB and 8.5 GB, are L D and L^2 D numbers of four
    bytes for L = 2048 and D = 512 to within 1 %, while the setting says L = 650.
    """
    if claim.kind == "memory":
        length, width = claim.sizes("L", "D")
        dtype = claim.dtype(FP32)
        op = RelativeAttention(num_heads=1, len_seq=length, head_dim=width, dtype=dtype)
        return float(op.embedding_bytes()) / MEGABYTE, float(op.gathered_bytes()) / MEGABYTE
    before, after = claim.need("before", "after")
    return _confirmed_orders(str(before), str(after))


def _confirmed_orders(before: str, after: str) -> str:
    """'see setting' where the op's bytes grow as both orders say, else what they grow as."""
    for name, order in (("before", before), ("after", after)):
        small, large = (_embedding_growth(order, *sizes) for sizes in ((64, 32), (512, 128)))
        counted = [pair[0 if name == "before" else 1] for pair in (small, large)]
        said = [pair[2] for pair in (small, large)]
        if not _near(counted[1] / counted[0], said[1] / said[0]):
            return f"{name}: grows by {counted[1] / counted[0]:.4g}, not {said[1] / said[0]:.4g}"
    return "see setting"


def _embedding_growth(order: str, length: int, width: int) -> tuple[float, float, float]:
    """Bytes gathered, bytes kept, and the order's own value at those sizes."""
    found = re.fullmatch(r"\s*O\((.*)\)\s*", order)
    if found is None:
        not_modelled(f"setting unclear: order '{order}'")
    op = RelativeAttention(num_heads=1, len_seq=length, head_dim=width)
    said = formula_value(found[1], {"L": length, "D": width})
    return float(op.gathered_bytes()), float(op.embedding_bytes()), said


def _near(one: float, other: float) -> bool:
    return abs(one / other - 1) <= EXACT_TOLERANCE
