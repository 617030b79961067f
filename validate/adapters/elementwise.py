"""Pointwise maps, norms, softmax, lookups: rows that stream their arrays once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, Final

from hwmodels.dtypes import BF16, FP8
from simulator.kernel_time.model import REPLAYED, Conditions
from validate.adapters.part import Part, framework, host_of, part, plain_dtype, uncounted
from validate.measurement import Measurement
from workloads.op import Op
from workloads.ops.elementwise import Elementwise, gelu
from workloads.ops.embedding import Embedding
from workloads.ops.norm import LayerNorm, RmsNorm
from workloads.ops.row_map import RowMap
from workloads.ops.softmax import Softmax

KERNELS: Final[Mapping[str, str]] = {"silu_and_mul": "vllm-silu", "embedding": "vllm-embedding"}
"""vLLM's kernels that differ from its usual ones: a costlier gate, a lookup with masks."""
QUANTISERS: Final[Mapping[str, str]] = {"vllm": "vllm-quant", "trtllm": "trtllm-quant"}
"""Kernel labels of the static quantisers by framework."""


def _conditions(row: Measurement) -> Conditions:
    """Vidur timed vLLM's kernels; eager harnesses pay a host that differs from call to call."""
    if row.source.startswith("vidur/"):
        return Conditions(kernel=KERNELS.get(row.op, "vllm"), l2=REPLAYED)
    host = host_of(row)
    return Conditions(host=f"{host}/{row.op}" if host else "", l2=REPLAYED)


def _rope(row: Measurement) -> tuple[Part, ...]:
    """Without the rotation tables, whose format differs between kernels."""
    p = row.params
    cols = (p["heads_q"] + p["heads_kv"]) * p["head_dim"]
    return (_row_map(row, p["tokens"], cols, num_inputs=1, vector_flops_per_element=3),)


def _quantise(row: Measurement) -> tuple[Part, ...]:
    """With a static scale: one multiplication an element, half the bytes out."""
    if row.dtype != "bf16->fp8":
        uncounted(f"{row.op} in {row.dtype} has no count yet")
    p = row.params
    conditions = Conditions(kernel=QUANTISERS.get(framework(row), ""), l2=REPLAYED)
    rows = p.get("rows", 1)
    sizes = {"rows": rows, "cols": p.get("cols", p["elements"] // rows)}
    return (part(RowMap, sizes, conditions, num_inputs=1, dtype=BF16, out_dtype=FP8),)


def _norm(op: type[Op]) -> Callable[[Measurement], tuple[Part, ...]]:
    def adapt(row: Measurement) -> tuple[Part, ...]:
        sizes = {"rows": row.params["rows"], "cols": row.params["cols"]}
        return (part(op, sizes, _conditions(row), dtype=plain_dtype(row)),)

    return adapt


def _softmax(row: Measurement) -> tuple[Part, ...]:
    """PyTorch stages a long row in shared memory only where it is aligned and fits.

    LLMCompass timed a release from before the staging.
    """
    cols, dtype = row.params["cols"], plain_dtype(row)
    conditions = _conditions(row)
    row_bytes = cols * dtype.bytes_per_element
    if cols > WARP_COLS and row_bytes % VECTOR_BYTES:
        conditions = replace(conditions, kernel="unaligned")
    elif cols > WARP_COLS and (row_bytes > STAGED_BYTES or row.source.startswith("llmcompass/")):
        conditions = replace(conditions, kernel="unstaged")
    sizes = {"rows": row.params["rows"], "cols": cols}
    return (part(Softmax, sizes, conditions, dtype=dtype),)


WARP_COLS: Final = 1024
"""Longest row that PyTorch's softmax gives to a warp, which holds it in registers."""
VECTOR_BYTES: Final = 16
STAGED_BYTES: Final = 48 * 1024
"""Shared memory a block may have without asking for more."""


def _elementwise(
    num_inputs: int, vector_flops: int, special_ops: int
) -> Callable[[Measurement], tuple[Part, ...]]:
    """A map with one output; the counts are per element, the least any kernel needs."""

    def adapt(row: Measurement) -> tuple[Part, ...]:
        counts = {
            "num_inputs": num_inputs,
            "vector_flops_per_element": vector_flops,
            "special_ops_per_element": special_ops,
        }
        p = row.params
        if row.op in BY_ROW and "rows" in p and "cols" in p:
            return (_row_map(row, p["rows"], p["cols"], **counts),)
        sizes = {"num_elements": p["elements"]}
        one = part(Elementwise, sizes, _conditions(row), dtype=plain_dtype(row), **counts)
        return (one, one) if _adds_twice(row) else (one,)

    return adapt


def _gelu(row: Measurement) -> tuple[Part, ...]:
    """The named map, whose arithmetic outweighs its bytes in 16-bit formats."""
    one = gelu(row.params["elements"], plain_dtype(row))
    fixed = {f.name: getattr(one, f.name) for f in fields(one)}
    sizes = {"num_elements": fixed.pop("num_elements")}
    return (part(Elementwise, sizes, _conditions(row), **fixed),)


def _adds_twice(row: Measurement) -> bool:
    """Vidur's rows of 2560 columns are Phi-2's, which adds attention and MLP to the residual."""
    return row.op == "add" and row.source.startswith("vidur/") and row.params.get("cols") == 2560


BY_ROW: Final = frozenset({"silu_and_mul"})
"""Maps whose kernels in serving frameworks give each row a block."""


def _row_map(row: Measurement, rows: int, cols: int, **counts: Any) -> Part:
    sizes = {"rows": rows, "cols": cols}
    return part(RowMap, sizes, _conditions(row), dtype=plain_dtype(row), **counts)


def _embedding(row: Measurement) -> tuple[Part, ...]:
    p = row.params
    sizes = {"num_tokens": p["tokens"], "dim": p["hidden"], "vocab_size": p["vocab_shard"]}
    return (part(Embedding, sizes, _conditions(row), dtype=plain_dtype(row)),)


ADAPTERS: Final[Mapping[str, Callable[[Measurement], tuple[Part, ...]]]] = {
    "softmax": _softmax,
    "layernorm": _norm(LayerNorm),
    "rmsnorm": _norm(RmsNorm),
    "add": _elementwise(2, 1, 0),
    "add_scalar": _elementwise(1, 1, 0),
    "mul": _elementwise(2, 1, 0),
    "div": _elementwise(2, 0, 1),
    "pow": _elementwise(2, 1, 2),  # 2 ** (y log2 x)
    "relu": _elementwise(1, 1, 0),
    "tanh": _elementwise(1, 0, 1),
    "gelu": _gelu,
    "silu_and_mul": _elementwise(2, 1, 1),
    "rope": _rope,
    "quantize_bf16_to_fp8_static": _quantise,
    "embedding": _embedding,
}
