"""Claims on Based, JRT-Prompt and JRT-RNN: prefill of one layer's linear attention on an H100.

What is timed is a call of the authors' benchmark (HazyResearch/ThunderKittens,
examples/jrt/lin_attn_profile.py): 16 heads, 16 dims of queries and keys, 64 of
values, an encoder region of half the prompt, ten calls whose results are kept. Beside the kernel:

    custom CUDA      o += zeros_like(o), which checks for errors: fill, then read two and write one
    Triton (FLA)     outputs and normalisers in fp32 are summed over one part, then cast; host
                     time before the first kernel
    Fast Transformer TaylorExp in eager PyTorch (outer product, two divisions, concatenation) for
                     queries and keys, casts to fp32, outputs filled with zeros
    PyTorch          TaylorExp, scores of all pairs, the triangle taken, times V; JRT-RNN once more
                     for the encoder's keys

No normaliser is computed anywhere. FlashAttention-2 is timed as its authors time it.

'OOM' is what the benchmark prints nothing for: scores beyond the device's memory, or an index of
the fast-transformers kernel, 32 bits wide, beyond its range. PyTorch's caching allocator keeps a
third array of scores: the results of earlier calls and the next features split a cached one, which
can be neither used for scores again nor given back.

Based in PyTorch has no encoder and is JRT-RNN's code without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from hwmodels.device import Device
from hwmodels.dtypes import BF16, FP16, FP32, DType
from simulator.kernel_time.model import Conditions
from simulator.kernel_time.predict import predict
from validate.claims.claim import Claim, Value, not_modelled
from workloads.op import Op
from workloads.ops.based import Based
from workloads.ops.based_parallel import ParallelBased
from workloads.ops.causal_product import CausalProduct
from workloads.ops.elementwise import Elementwise
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.matmul import BatchedMatmul
from workloads.ops.prefix_linear_attention import PrefixLinearAttention

HEADS, FEATURE_DIM, VALUE_DIM = 16, 16, 64
ENCODER_RATIO: Final = 2
"""Tokens of the prompt for one of the encoder region."""
RESULTS_KEPT: Final = 10
SCORES_KEPT: Final = 3
"""Arrays of scores: before and after the triangle is taken, and one that fragments."""
MOST_INDEXED: Final = 2**31 - 1
ALIGNED_BYTES: Final = 16
UNALIGNED_FRAC: Final = 0.0525
"""Share of the peak rate that products sustain whose rows are odd numbers of elements (273
features), where kernels load element by element; anchored on JRT-RNN PyTorch, seq 2048, batch 16,
as what the other kernels leave of it."""
TRITON_HOST_S: Final = 3.1e-4
"""Python, autograd and Triton's launcher before the first kernel of a call, which starts on an idle
device; anchored on Based Triton, seq 2048, batch 16."""
FA2: Final = "figure:fa2"
OOM: Final = "OOM"


class Shape(NamedTuple):
    """One call: sequences, tokens of each, heads, widths, format."""

    batch: int
    seq: int
    heads: int
    dim: int
    value_dim: int
    dtype: DType

    @property
    def streams(self) -> int:
        """Heads of all sequences."""
        return self.batch * self.heads

    @property
    def rows(self) -> int:
        """Tokens of all heads."""
        return self.streams * self.seq

    @property
    def features(self) -> int:
        """Width of the feature map."""
        return 1 + self.dim + self.dim**2

    @property
    def encoded(self) -> int:
        """Tokens of an encoder region."""
        return self.seq // ENCODER_RATIO

    def fields(self) -> dict[str, Any]:
        """As the linear attention ops take them."""
        return {
            "batch": self.batch, "num_heads": self.heads, "len_seq": self.seq,
            "feature_dim": self.dim, "value_dim": self.value_dim, "dtype": self.dtype,
        }  # fmt: skip


class Run(NamedTuple):
    """Kernels of a call, bytes of the arrays it holds at once, and whether it can run at all."""

    seconds: Callable[[Device], float]
    held_bytes: float
    indexable: bool = True


def evaluate_jrt(claim: Claim) -> Value:
    """Milliseconds of a call, or how much faster than FlashAttention-2 one is."""
    on, shape = claim.device(), _shape(claim)
    if claim.kind != "speedup":
        (impl,) = claim.need("impl")
        return _times(_run(_key(str(impl)), shape), on, 1e3)
    flash = _run("flash", shape).seconds(on)
    text = f"{claim.quantity} {claim.setting.get('impl', '')}".casefold()
    named = [key for key in ("jrt-prompt", "jrt-rnn") if key in text] or [_key(text)]
    found = [flash / _run(key, shape).seconds(on) for key in named]
    return (min(found), max(found)) if len(found) > 1 else found[0]


def _times(run: Run, on: Device, scale: float) -> Value:
    if not run.indexable or run.held_bytes > (on.hbm.capacity_bytes or 0):
        return OOM
    return run.seconds(on) * scale


def _shape(claim: Claim) -> Shape:
    """The setting, the benchmark's own sizes where it names none ('16 (assumed; ...)')."""
    batch, seq = claim.sizes("batch", "seq")
    given = claim.setting
    heads = re.match(r"\s*(\d+)", str(given.get("heads", HEADS)))
    if heads is None or int(heads[1]) < 1:
        not_modelled(f"setting unclear: heads = {given['heads']!r}")
    dim, value_dim = (
        claim.sizes(name)[0] if name in given else usual
        for name, usual in (("feature_dim", FEATURE_DIM), ("head_dim", VALUE_DIM))
    )
    return Shape(batch, seq, int(heads[1]), dim, value_dim, claim.dtype(BF16))


_NAMES: Final[Mapping[str, str]] = {
    "flash": "flash", "jrt-rnn pytorch": "jrt-rnn pytorch", "jrt-rnn": "jrt-rnn",
    "jrt-prompt": "jrt-prompt", "fast transformer": "causal", "causal dot": "causal",
    "triton": "triton", "fla": "triton", "based pytorch": "pytorch", "based": "based",
}  # fmt: skip
"""Implementations by the first of these that their label holds."""


def _key(text: str) -> str:
    folded = text.casefold()
    for part, key in _NAMES.items():
        if part in folded:
            return key
    not_modelled(f"no implementation '{text}' is known here")


def _run(key: str, s: Shape) -> Run:
    if key == "flash":
        flash = FlashAttention2(
            batch=s.batch, num_heads=s.heads, len_q=s.seq, head_dim=s.value_dim, causal=True,
            dtype=FP16,  # as fast as bf16, and the format the kernel alone is known in
        )  # fmt: skip
        held = (3 + RESULTS_KEPT) * s.rows * s.value_dim * s.dtype.bytes_per_element
        return Run(lambda on: _seconds([flash], on, FA2), held)
    makers: Mapping[str, Callable[[Shape], Run]] = {
        "based": lambda s: _custom(s, Based(**s.fields(), normalised=False)),
        "jrt-prompt": lambda s: _run("based", s._replace(seq=2 * s.seq)),
        "jrt-rnn": lambda s: _custom(
            s,
            PrefixLinearAttention(**s.fields(), len_encoder=s.encoded, normalised=False),
        ),
        "triton": _triton,
        "causal": _causal,
        "pytorch": lambda s: _pytorch(s, 0),
        "jrt-rnn pytorch": lambda s: _pytorch(s, s.encoded),
    }
    return makers[key](s)


def _custom(s: Shape, kernel: Based) -> Run:
    outputs = s.rows * s.value_dim
    check = [
        Elementwise(num_elements=outputs, num_inputs=0, dtype=s.dtype),
        Elementwise(num_elements=outputs, num_inputs=2, dtype=s.dtype),
    ]
    more = (RESULTS_KEPT + 1) * outputs * s.dtype.bytes_per_element
    held = float(kernel.compulsory_bytes()) + more
    return Run(lambda on: _seconds([kernel, *check], on), held)


def _triton(s: Shape) -> Run:
    kernel = ParallelBased(**s.fields())
    outputs = s.rows * (s.value_dim + 1)
    sums = [
        Elementwise(num_elements=outputs, dtype=FP32),
        Elementwise(num_elements=outputs, dtype=FP32, out_dtype=s.dtype),
    ]
    e = s.dtype.bytes_per_element
    held = float(kernel.compulsory_bytes()) + outputs * (FP32.bytes_per_element + RESULTS_KEPT * e)
    return Run(lambda on: TRITON_HOST_S + _seconds([kernel, *sums], on), held)


def _causal(s: Shape) -> Run:
    kernel = CausalProduct(
        batch=s.batch, num_heads=s.heads, len_seq=s.seq, key_dim=s.features, value_dim=s.value_dim
    )
    features, values = s.rows * s.features, s.rows * s.value_dim
    ops: list[Op] = [*_taylor(s, s.rows), *_taylor(s, s.rows)]
    for elements in (features, features, values):
        ops.append(Elementwise(num_elements=elements, dtype=s.dtype, out_dtype=FP32))
    ops.append(Elementwise(num_elements=values, num_inputs=0, dtype=FP32))
    e, wide = s.dtype.bytes_per_element, FP32.bytes_per_element
    held = 2 * features * (e + wide) + values * (e + wide + RESULTS_KEPT * wide)
    return Run(lambda on: _seconds([*ops, kernel], on), held, features <= MOST_INDEXED)


def _pytorch(s: Shape, encoded: int) -> Run:
    """All pairs: with the causal triangle, and of every query with an encoder's keys."""
    rows, pairs = s.streams * (2 * s.seq + encoded), s.rows * s.seq
    pointwise = [*_taylor(s, rows), Elementwise(num_elements=pairs, dtype=s.dtype)]
    products = [_product(s, s.seq, s.features, s.seq), _product(s, s.value_dim, s.seq, s.seq)]
    if encoded:
        products.append(_product(s, encoded, s.features, s.seq))
        products.append(_product(s, s.value_dim, encoded, s.seq))
        both = Elementwise(num_elements=s.rows * s.value_dim, num_inputs=2, dtype=s.dtype)
        pointwise.append(both)

    def seconds(on: Device) -> float:
        return _seconds(pointwise, on) + sum(_product_seconds(op, on) for op in products)

    e = s.dtype.bytes_per_element
    scores = (SCORES_KEPT * pairs + rows * s.features) * e
    return Run(seconds, scores + (RESULTS_KEPT + 3) * s.rows * s.value_dim * e)


def _product(s: Shape, n: int, k: int, m: int) -> BatchedMatmul:
    return BatchedMatmul(batch=s.streams, m=m, n=n, k=k, dtype=s.dtype)


def _product_seconds(op: BatchedMatmul, on: Device) -> float:
    """As predicted; slower where the rows of its operands along k are not aligned."""
    seconds = float(predict(op, on=on).seconds)
    if op.k * op.dtype.bytes_per_element % ALIGNED_BYTES == 0:
        return seconds
    rate = on.matmul_rate_flops_per_s(op.dtype)[0]
    flops = float(sum(op.min_flops().values()))
    return max(seconds, flops / (rate * UNALIGNED_FRAC))


def _taylor(s: Shape, rows: int) -> Iterator[Op]:
    """TaylorExp on rows: products and two divisions of them, the rest divided, concatenated."""
    pairs = rows * s.dim**2
    yield Elementwise(num_elements=pairs, num_inputs=0, dtype=s.dtype)  # the inputs are small
    for _ in range(2):
        yield Elementwise(num_elements=pairs, dtype=s.dtype)
    yield Elementwise(num_elements=rows * s.dim, dtype=s.dtype)
    yield Elementwise(num_elements=rows * s.features, dtype=s.dtype)


def _seconds(ops: list[Op], on: Device, kernel: str = "") -> float:
    conditions = Conditions(kernel=kernel)
    return sum(float(predict(op, on=on, conditions=conditions).seconds) for op in ops)
