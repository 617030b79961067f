"""A Llama decoding step as Hugging Face's modules run it, kernel by kernel in a captured graph.

Nothing is fused: a norm is eight kernels (cast, square, mean, two on one number a row, scale, cast,
weight), a rotation five, and the tables of the rotation are cast to half precision in every layer.
Tensor parallelism splits the layers' matrices alone; embedding and head are whole on every rank,
and each all-reduce copies its input first (functional collectives). Sampling is PyTorch's
multinomial over all of the vocabulary in fp32. Sources: transformers 4.36 modeling_llama.py, and
hydragen/llama.py and tp.py of the authors' repository (ScalingIntelligence/hydragen).

Ignored: the host between two steps, beyond what a captured graph hides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from hwmodels.device import Device
from hwmodels.dtypes import FP32, DType
from validate.claims.claim import not_modelled
from validate.claims.decoder import all_reduce_seconds, ops_seconds
from workloads.models.architecture import TransformerConfig
from workloads.models.parameters import count_parameters
from workloads.op import Op
from workloads.ops.block_pool import BlockPool
from workloads.ops.elementwise import Elementwise
from workloads.ops.matmul import Matmul
from workloads.ops.softmax import Softmax

NUM_POSITIONS: Final = 16384
"""Rows of the rotation's tables: max_position_embeddings of the Code Llama configurations."""
NUM_INDEX_KERNELS: Final = 3
"""Kernels on one whole number a sequence in each layer: positions less the shared length."""
SAMPLING_PASSES: Final = 4
"""Of multinomial, over one array of probabilities: maximum, minimum, a random draw, arg max."""


def no_attention_seconds(
    model: TransformerConfig, *, batch: int, tp: int, on: Device, dtype: DType
) -> float:
    """One step of `batch` new tokens without attention and without the write to the cache.

    >>> from hwmodels import catalog
    >>> from hwmodels.dtypes import FP16
    >>> from validate.claims.models import model_named
    >>> a100, model = catalog.device("a100-sxm4-40gb"), model_named("CodeLlama-7B")
    >>> 0.008 < no_attention_seconds(model, batch=32, tp=8, on=a100, dtype=FP16) < 0.013
    True
    """
    reduced = batch * model.hidden_dim * dtype.bytes_per_element
    one_layer = ops_seconds(list(layer(model, batch=batch, tp=tp, dtype=dtype)), on)
    one_layer += 2 * all_reduce_seconds(reduced, tp, on, "nccl")
    return model.num_layers * one_layer + ops_seconds(list(head(model, batch, dtype)), on)


def layer(
    model: TransformerConfig, *, batch: int, tp: int, dtype: DType, tables: int = NUM_POSITIONS
) -> Iterator[Op]:
    """The kernels of one layer on one rank, but for attention and all-reduces.

    `tables`: rows of the rotation's tables, 0 where they are kept in half precision and the
    positions come with the input.
    """
    hidden, spec = model.hidden_dim, model.attention
    query, key = (_share(n, tp) * spec.head_dim for n in (spec.num_heads, spec.num_kv_heads))
    ffn = _share(model.mlp.ffn_dim, tp)
    for _ in range(2):
        yield from _norm(batch, hidden, dtype)
    for n, k in (
        (query, hidden), (key, hidden), (key, hidden), (hidden, query),
        (ffn, hidden), (ffn, hidden), (hidden, ffn),
    ):  # fmt: skip
        yield Matmul(m=batch, n=n, k=k, dtype=dtype)
    for _ in range(2):  # cosine and sine: cast whole, then gathered by position
        if tables:
            yield pointwise(tables * spec.head_dim, FP32, dtype)
        yield pointwise(batch * spec.head_dim, dtype)
    for _ in range(NUM_INDEX_KERNELS if tables else 0):
        yield pointwise(batch, dtype)
    for width in (query, key):
        yield from rotation(batch * width, dtype)
    yield pointwise(batch * ffn, dtype)  # SiLU
    yield pointwise(batch * ffn, dtype, num_inputs=2)
    for _ in range(2):
        if tp > 1:
            yield pointwise(batch * hidden, dtype)  # the copy that an all-reduce starts from
        yield pointwise(batch * hidden, dtype, num_inputs=2)  # residual


def head(model: TransformerConfig, batch: int, dtype: DType) -> Iterator[Op]:
    """Final norm, logits over the whole vocabulary, temperature, softmax, one sample a row."""
    logits = batch * model.vocab_size
    yield from _norm(batch, model.hidden_dim, dtype)
    yield Matmul(m=batch, n=model.vocab_size, k=model.hidden_dim, dtype=dtype)
    yield pointwise(logits, dtype, FP32)
    yield pointwise(logits, FP32)
    yield Softmax(rows=batch, cols=model.vocab_size, dtype=FP32)
    for _ in range(SAMPLING_PASSES):
        yield BlockPool(batch=batch, len_seq=model.vocab_size, dim=1, block=model.vocab_size,
                        dtype=FP32)  # fmt: skip
    yield pointwise(logits, FP32, num_inputs=2)  # probabilities over the draw


def weight_bytes(model: TransformerConfig, tp: int, dtype: DType) -> float:
    """Parameters on one rank: the layers' split, embedding and head whole.

    >>> from hwmodels.dtypes import FP16
    >>> from validate.claims.models import model_named
    >>> round(weight_bytes(model_named("CodeLlama-7B"), 8, FP16) / 1e9, 2)
    2.14
    """
    ends = 2 * model.vocab_size * model.hidden_dim
    layers = count_parameters(model).total - ends
    return (ends + layers / tp) * dtype.bytes_per_element


def _share(count: int, tp: int) -> int:
    """Of that many heads or columns, those of one rank."""
    if count % tp:
        not_modelled(f"setting impossible: {count} columns or heads do not split over {tp} ranks")
    return count // tp


def _norm(rows: int, cols: int, dtype: DType) -> Iterator[Op]:
    yield pointwise(rows * cols, dtype, FP32)
    yield pointwise(rows * cols, FP32)
    yield BlockPool(batch=rows, len_seq=cols, dim=1, block=cols, dtype=FP32)
    yield pointwise(rows, FP32)
    yield pointwise(rows, FP32)
    yield pointwise(rows * cols, FP32)
    yield pointwise(rows * cols, FP32, dtype)
    yield pointwise(rows * cols, dtype)


def rotation(elements: int, dtype: DType) -> Iterator[Op]:
    """x cos + (halves exchanged, one negated) sin: five kernels."""
    yield pointwise(elements // 2, dtype)
    for num_inputs in (1, 1, 1, 2):
        yield pointwise(elements, dtype, num_inputs=num_inputs)


def pointwise(
    elements: int, dtype: DType, out: DType | None = None, *, num_inputs: int = 1
) -> Elementwise:
    """One kernel over whole arrays in `dtype`, written in `out` or else `dtype`."""
    return Elementwise(num_elements=elements, num_inputs=num_inputs, dtype=dtype, out_dtype=out)
