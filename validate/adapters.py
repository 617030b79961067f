"""A measured row as ops: what each published op name and dtype label means in our counts.

An adapter turns one row into the parts that run one after the other, or raises `Uncounted` with
the reason. What it leaves out of a row (a bias, a write to the KV cache) only lowers the count, so
the bound stays a bound; a row of which we would count too much is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from hwmodels.dtypes import ALIASES, ALL, BF16, FP8, FP16, DType
from validate.measurement import Measurement
from workloads.op import Op
from workloads.ops.elementwise import Elementwise
from workloads.ops.embedding import Embedding
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.ops.matmul import Matmul
from workloads.ops.norm import LayerNorm, RmsNorm
from workloads.ops.softmax import Softmax

QUANTISED = "the row includes a quantisation kernel that has no count yet"
WEIGHT_ONLY = "a product with quantised weights has no count yet"
WHOLE_STEP = "a training step is held against the bound as a whole, not as one op"
TRAINING_FAMILY = "steps_training"


class Uncounted(Exception):
    """No op of ours counts this row; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Part:
    """One op of a row: its class, the fields that may not become arrays, and its sizes."""

    op: type[Op]
    fixed: tuple[tuple[str, Any], ...]
    sizes: Mapping[str, int]


def parts(row: Measurement) -> tuple[Part, ...]:
    """The ops that run in a row, one after the other; raises `Uncounted`."""
    if is_training_step(row):
        raise Uncounted(WHOLE_STEP)
    if "parallelism" in row.params:
        raise Uncounted("a whole step is not one op")
    if row.seconds is None:
        raise Uncounted("the metric is not a time")
    adapter = ADAPTERS.get(row.op)
    if adapter is None:
        raise Uncounted(f"no op for {row.op} yet")
    return adapter(row)


def is_training_step(row: Measurement) -> bool:
    """Does the row belong to a file of training steps?"""
    return row.family.startswith(TRAINING_FAMILY) and "parallelism" in row.params


# ---- number formats ------------------------------------------------------------------------

_PLAIN: Mapping[str, DType] = ALL | {alias: ALL[name] for alias, name in ALIASES.items()}

_GEMM_DTYPES: Mapping[str, tuple[DType, DType] | str] = {
    **{label: (dtype, dtype) for label, dtype in _PLAIN.items()},
    "fp16_mixed": (FP16, FP16),
    "fp8_matmul_only": (FP8, BF16),
    "fp16_fp32math": "fp16 storage with fp32 arithmetic has no count yet",
    **dict.fromkeys(("fp8", "fp8_block", "nvfp4", "mxfp8", "mxfp4", "int8_smoothquant"), QUANTISED),
    **dict.fromkeys(("int4_wo", "int8_wo"), WEIGHT_ONLY),
}
"""Input and output format of a product by label, or why it has no count."""


def _plain_dtype(row: Measurement) -> DType:
    if row.dtype in _PLAIN:
        return _PLAIN[row.dtype]
    _uncounted(f"{row.op} in {row.dtype} mixes formats and has no count yet")


def _uncounted(reason: str) -> NoReturn:
    raise Uncounted(reason)


def _part(op: type[Op], sizes: Mapping[str, int], **fixed: object) -> Part:
    return Part(op, tuple(fixed.items()), sizes)


# ---- one function an op --------------------------------------------------------------------


def _matmul(row: Measurement) -> tuple[Part, ...]:
    formats = _GEMM_DTYPES.get(row.dtype, f"a product in {row.dtype} has no count yet")
    if isinstance(formats, str):
        _uncounted(formats)
    p = row.params
    sizes = {"batch": p.get("batch", 1), "m": p["m"], "n": p["n"], "k": p["k"]}
    return (_part(Matmul, sizes, dtype=formats[0], out_dtype=formats[1]),)


def _attention_sizes(row: Measurement) -> dict[str, int]:
    p = row.params
    if p.get("window", p["seq_kv"]) < p["seq_kv"]:
        _uncounted("attention in a sliding window has no count yet")
    if p["heads_q"] % p["heads_kv"]:
        _uncounted("the query heads are no multiple of the KV heads")
    return {
        "batch": p["batch"],
        "num_heads": p["heads_q"],
        "num_kv_heads": p["heads_kv"],
        "len_q": p["seq_q"],
        "len_kv": p["seq_kv"],
        "head_dim": p["head_dim"],
    }


def _prefill(row: Measurement) -> tuple[Part, ...]:
    sizes, causal = _attention_sizes(row), bool(row.params.get("causal", 0))
    return (_part(FlashAttention2, sizes, causal=causal, dtype=_plain_dtype(row)),)


def _forward_backward(row: Measurement) -> tuple[Part, ...]:
    sizes, causal = _attention_sizes(row), bool(row.params.get("causal", 0))
    dtype = _plain_dtype(row)
    return (
        _part(FlashAttention2, sizes, causal=causal, dtype=dtype),
        _part(FlashAttention2Backward, sizes, causal=causal, dtype=dtype),
    )


def _decode(row: Measurement) -> tuple[Part, ...]:
    """One new token, which sees every key."""
    sizes = _attention_sizes(row)
    if sizes["len_q"] != 1:
        _uncounted("decoding of several tokens at once has no count yet")
    return (_part(FlashAttention2, sizes, causal=False, dtype=_plain_dtype(row)),)


def _rope(row: Measurement) -> tuple[Part, ...]:
    """Without the rotation tables, whose format differs between kernels."""
    p = row.params
    turned = p["tokens"] * (p["heads_q"] + p["heads_kv"]) * p["head_dim"]
    return (_pointwise(row, turned, 1, 3, 0),)


def _quantise(row: Measurement) -> tuple[Part, ...]:
    """With a static scale: one multiplication an element, half the bytes out."""
    if row.dtype != "bf16->fp8":
        _uncounted(f"{row.op} in {row.dtype} has no count yet")
    part = _pointwise(row, row.params["elements"], 1, 1, 0, dtype=BF16, out_dtype=FP8)
    return (part,)


def _by_rows(op: type[Op]) -> Callable[[Measurement], tuple[Part, ...]]:
    def adapt(row: Measurement) -> tuple[Part, ...]:
        sizes = {"rows": row.params["rows"], "cols": row.params["cols"]}
        return (_part(op, sizes, dtype=_plain_dtype(row)),)

    return adapt


def _elementwise(
    num_inputs: int, vector_flops: int, special_ops: int
) -> Callable[[Measurement], tuple[Part, ...]]:
    def adapt(row: Measurement) -> tuple[Part, ...]:
        num_elements = row.params["elements"]
        return (_pointwise(row, num_elements, num_inputs, vector_flops, special_ops),)

    return adapt


def _pointwise(
    row: Measurement,
    num_elements: int,
    num_inputs: int,
    vector_flops: int,
    special_ops: int,
    **formats: DType,
) -> Part:
    """A map with one output; the counts are per element, the least any kernel needs."""
    return _part(
        Elementwise,
        {"num_elements": num_elements},
        num_inputs=num_inputs,
        num_outputs=1,
        vector_flops_per_element=vector_flops,
        special_ops_per_element=special_ops,
        **(formats or {"dtype": _plain_dtype(row)}),
    )


def _embedding(row: Measurement) -> tuple[Part, ...]:
    p = row.params
    sizes = {"num_tokens": p["tokens"], "dim": p["hidden"], "vocab_size": p["vocab_shard"]}
    return (_part(Embedding, sizes, dtype=_plain_dtype(row)),)


ADAPTERS: Mapping[str, Callable[[Measurement], tuple[Part, ...]]] = {
    "gemm": _matmul,
    "bmm": _matmul,
    "attn_prefill": _prefill,
    "attn_prefill_noncausal": _prefill,
    "attn_fwd": _prefill,
    "attn_fwd_bwd": _forward_backward,
    "attn_decode": _decode,
    "softmax": _by_rows(Softmax),
    "layernorm": _by_rows(LayerNorm),
    "rmsnorm": _by_rows(RmsNorm),
    "add": _elementwise(2, 1, 0),
    "add_scalar": _elementwise(1, 1, 0),
    "mul": _elementwise(2, 1, 0),
    "div": _elementwise(2, 0, 1),
    "pow": _elementwise(2, 1, 2),  # 2 ** (y log2 x)
    "relu": _elementwise(1, 1, 0),
    "tanh": _elementwise(1, 0, 1),
    "gelu": _elementwise(1, 1, 1),  # at least x times one special function
    "silu_and_mul": _elementwise(2, 1, 1),
    "rope": _rope,
    "quantize_bf16_to_fp8_static": _quantise,
    "embedding": _embedding,
}
