"""Bytes of a training step that have a published closed form, and the rules that round them.

Sizes as Korthikanti et al. 2022 (arXiv 2205.05198) name them: s tokens a sequence, b sequences a
micro-batch, h hidden size, a heads, L layers, t tensor-parallel ranks, p stages, v chunks a stage.
One layer of a GPT with dropout and unfused attention, 16-bit, keeps for its backward pass

    tensor                s b h (10 + 24 / t + 5 a s / (h t))     eq. 2 (t = 1: eq. 1)
    sequence              s b h (34 + 5 a s / h) / t              eq. 4
    sequence_selective    34 s b h / t                            eq. 6 a layer
    selective             s b h (10 + 24 / t)                     table 2
    full                  2 s b h                                 table 2, the input alone

and the first stage, which has the most micro-batches in flight, L layers of it (eq. 5), times
1 + (p - 1) / (p v) under the interleaved schedule (section 4.2.3). Parameters with their gradients
and optimizer states take 18 bytes each (fp32 gradients), 12 L h^2 parameters without embeddings.

The forms leave out what `simulator.memory_timeline` adds: gradients on the way, buffers, logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from hwmodels.errors import InputError, UnknownNameError
from hwmodels.frozen import FrozenDict
from simulator.recipe import RECIPES
from workloads.numeric import Num, any_true, ceil_div, where

TENSOR, SEQUENCE, SELECTIVE, SEQUENCE_SELECTIVE, FULL = (
    "tensor", "sequence", "selective", "sequence_selective", "full",
)  # fmt: skip
MODES: Final = (TENSOR, SEQUENCE, SELECTIVE, SEQUENCE_SELECTIVE, FULL)

KIB, MIB = 2**10, 2**20

LOGITS_BYTES: Final[Mapping[str, float]] = FrozenDict(
    {
        "megatron": 4.0,  # fp32 probabilities, overwritten by their gradient (eq. in section 4.3)
        "torch-eager": 12.0,  # fp32 log-probabilities, their gradient, the fp32 logits' gradient
        "torch-compiled": 4.0,  # 16-bit logits and their gradient: the rest stays in the kernel
    }
)
"""Bytes live per token and vocabulary entry at the peak of the loss, by the code that runs it."""

CUBLAS_WORKSPACE_BYTES: Final = 8 * MIB + 128 * KIB
"""PyTorch's workspace of a cuBLAS handle and stream (CUBLAS_WORKSPACE_CONFIG ':4096:2:16:8')."""
CUBLAS_WORKSPACE_HOPPER_BYTES: Final = 32 * MIB
"""The same from compute capability 9.0 on (aten/src/ATen/cuda/CublasHandlePool.cpp)."""

ROUND_BYTES: Final = 512
"""PyTorch's caching allocator rounds every request up to a multiple of it (c10/cuda,
CUDACachingAllocator.cpp, kMinBlockSize)."""
SMALL_BYTES, SMALL_SEGMENT_BYTES = MIB, 2 * MIB
"""Requests up to the first share segments of the second (kSmallSize, kSmallBuffer)."""
MIDDLE_BYTES, MIDDLE_SEGMENT_BYTES = 10 * MIB, 20 * MIB
"""Requests below the first share segments of the second (kMinLargeAlloc, kLargeBuffer)."""
SEGMENT_ROUND_BYTES: Final = 2 * MIB
"""Larger ones get a segment of their own, rounded up to a multiple of it (kRoundLarge)."""


def layer_activation_bytes(
    mode: str, *, len_seq: Num, batch: Num, hidden_dim: Num, num_heads: Num, tp: Num = 1
) -> Num:
    """Bytes one layer keeps for one micro-batch on one rank, by the closed form of `mode`.

    >>> sizes = dict(len_seq=2048, batch=1, hidden_dim=12288, num_heads=96, tp=8)
    >>> layer_activation_bytes("full", **sizes) == 2 * 2048 * 12288
    True
    >>> layer_activation_bytes("sequence", **sizes) == 2048 * 12288 * (34 + 80) / 8
    True
    """
    if mode not in MODES:
        raise UnknownNameError("activation mode", mode, MODES)
    sbh = len_seq * batch * hidden_dim
    scores = 5 * num_heads * len_seq / hidden_dim
    factors = {
        TENSOR: 10 + 24 / tp + scores / tp,
        SEQUENCE: (34 + scores) / tp,
        SELECTIVE: 10 + 24 / tp,
        SEQUENCE_SELECTIVE: 34 / tp,
        FULL: 2.0,
    }
    return sbh * factors[mode]


def first_stage_factor(pp: Num, interleave: Num = 1) -> Num:
    """Layers' worth of activations the first stage holds over all layers of the model.

    >>> first_stage_factor(8), first_stage_factor(8, 3)
    (1.0, 1.2916666666666667)
    """
    return where(interleave > 1, 1 + (pp - 1) / (pp * interleave), 1.0)


def first_stage_activation_bytes(
    mode: str,
    *,
    len_seq: Num,
    batch: Num,
    hidden_dim: Num,
    num_heads: Num,
    num_layers: Num,
    tp: Num = 1,
    pp: Num = 1,
    interleave: Num = 1,
) -> Num:
    """Bytes the first stage keeps with its pipeline full (eq. 5 and section 4.2.3).

    Without pipeline all layers of one micro-batch; with it as many, p micro-batches of L / p.
    """
    layer = layer_activation_bytes(
        mode, len_seq=len_seq, batch=batch, hidden_dim=hidden_dim, num_heads=num_heads, tp=tp
    )
    return layer * num_layers * first_stage_factor(pp, interleave)


def ends_activation_bytes(
    *, len_seq: Num, batch: Num, hidden_dim: Num, vocab_size: Num, tp: Num = 1, pp: Num = 1
) -> Num:
    """Bytes outside the layers on the first stage (section 4.3), with sequence parallelism.

    s b h p / t of embedding dropout masks, and where p = 1 the final norm, the output layer and
    the loss besides: 4 s b h / t (1 + vocabulary / h).
    """
    sbh = len_seq * batch * hidden_dim / tp
    return sbh * pp + where(pp > 1, 0.0, 4 * sbh * (1 + vocab_size / hidden_dim))


def layer_state_bytes(*, hidden_dim: Num, num_layers: Num, tp: Num = 1, pp: Num = 1) -> Num:
    """Weights, gradients and optimizer states of the layers on one rank: 18 * 12 L h^2 / (t p).

    >>> layer_state_bytes(hidden_dim=6144, num_layers=48, tp=8) == 18 * 12 * 48 * 6144**2 / 8
    True
    """
    parameters = 12 * num_layers * hidden_dim**2 / (tp * pp)
    return RECIPES["bf16"].bytes_per_parameter * parameters


def logits_bytes(trainer: str, *, num_tokens: Num, vocab_size: Num, tp: Num = 1) -> Num:
    """Bytes live at the peak of the loss on one rank; the vocabulary is split over tp.

    >>> logits_bytes("torch-eager", num_tokens=8192, vocab_size=128256) / 2**30
    11.7421875
    """
    if trainer not in LOGITS_BYTES:
        raise UnknownNameError("trainer", trainer, LOGITS_BYTES)
    return LOGITS_BYTES[trainer] * num_tokens * ceil_div(vocab_size, tp)


def workspace_bytes(compute_capability: str | None, num_streams: int = 1) -> int:
    """Scratch of the cuBLAS handles PyTorch keeps, one a stream that multiplies matrices."""
    major = int((compute_capability or "0").split(".", 1)[0])
    one = CUBLAS_WORKSPACE_HOPPER_BYTES if major >= 9 else CUBLAS_WORKSPACE_BYTES
    return one * num_streams


def fsdp_buffer_bytes(
    parameters: Num, *, weight_bytes: Num = 2, reduce_bytes: Num = 4, num_prefetched: Num = 1
) -> Num:
    """Buffers of fully sharded data parallelism around a layer of `parameters` at its backward.

    The layer gathered for the kernels, `num_prefetched` more in flat all-gather outputs, its
    16-bit gradients, and the flat input of the reduce-scatter in `reduce_bytes`.
    """
    gathered = weight_bytes * parameters * (1 + num_prefetched)
    return gathered + (weight_bytes + reduce_bytes) * parameters


def rounded_bytes(num_bytes: Num) -> Num:
    """A request as PyTorch's allocator sees it: up to a multiple of 512 bytes.

    >>> rounded_bytes(1), rounded_bytes(1024), rounded_bytes(0)
    (512, 1024, 512)
    """
    whole = ceil_div(num_bytes, ROUND_BYTES)
    return ROUND_BYTES * where(whole < 1, 1, whole)


def segment_bytes(num_bytes: Num) -> Num:
    """What the allocator asks the driver for when no cached block holds the request.

    >>> [segment_bytes(n) // MIB for n in (1, MIB, MIB + 1, 10 * MIB, 10 * MIB + 1)]
    [2, 2, 20, 10, 12]
    """
    size = rounded_bytes(num_bytes)
    large = SEGMENT_ROUND_BYTES * ceil_div(size, SEGMENT_ROUND_BYTES)
    shared = where(size <= SMALL_BYTES, SMALL_SEGMENT_BYTES, MIDDLE_SEGMENT_BYTES)
    return where(size < MIDDLE_BYTES, shared, large)


def paged_cache_bytes(
    *, num_tokens: Num, bytes_per_token: Num, block_tokens: Num = 16, batch: Num = 1
) -> Num:
    """A paged K/V cache of `batch` sequences of `num_tokens` each: whole blocks (vLLM: 16 tokens).

    At most block_tokens - 1 places of a sequence are empty (Kwon et al. 2023, arXiv 2309.06180).

    >>> paged_cache_bytes(num_tokens=100, bytes_per_token=2, batch=3)
    672
    """
    if any_true(block_tokens < 1):
        raise InputError("a cache block holds at least 1 token; set block_tokens to 1 or more")
    return batch * ceil_div(num_tokens, block_tokens) * block_tokens * bytes_per_token
