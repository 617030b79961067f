"""Pointwise maps, norms, softmax, lookups: rows that stream their arrays once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from hwmodels.dtypes import BF16, FP8, DType
from validate.adapters.part import Part, part, plain_dtype, uncounted
from validate.measurement import Measurement
from workloads.op import Op
from workloads.ops.elementwise import Elementwise
from workloads.ops.embedding import Embedding
from workloads.ops.norm import LayerNorm, RmsNorm
from workloads.ops.softmax import Softmax


def _rope(row: Measurement) -> tuple[Part, ...]:
    """Without the rotation tables, whose format differs between kernels."""
    p = row.params
    turned = p["tokens"] * (p["heads_q"] + p["heads_kv"]) * p["head_dim"]
    return (_pointwise(row, turned, 1, 3, 0),)


def _quantise(row: Measurement) -> tuple[Part, ...]:
    """With a static scale: one multiplication an element, half the bytes out."""
    if row.dtype != "bf16->fp8":
        uncounted(f"{row.op} in {row.dtype} has no count yet")
    return (_pointwise(row, row.params["elements"], 1, 1, 0, dtype=BF16, out_dtype=FP8),)


def _by_rows(op: type[Op]) -> Callable[[Measurement], tuple[Part, ...]]:
    def adapt(row: Measurement) -> tuple[Part, ...]:
        sizes = {"rows": row.params["rows"], "cols": row.params["cols"]}
        return (part(op, sizes, dtype=plain_dtype(row)),)

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
    return part(
        Elementwise,
        {"num_elements": num_elements},
        num_inputs=num_inputs,
        num_outputs=1,
        vector_flops_per_element=vector_flops,
        special_ops_per_element=special_ops,
        **(formats or {"dtype": plain_dtype(row)}),
    )


def _embedding(row: Measurement) -> tuple[Part, ...]:
    p = row.params
    sizes = {"num_tokens": p["tokens"], "dim": p["hidden"], "vocab_size": p["vocab_shard"]}
    return (part(Embedding, sizes, dtype=plain_dtype(row)),)


ADAPTERS: Final[Mapping[str, Callable[[Measurement], tuple[Part, ...]]]] = {
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
