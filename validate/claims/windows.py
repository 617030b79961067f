"""Claims on windows and sinks: StreamingLLM, LM-Infinite, MoA, SinkLoRA, MASFormer.

StreamingLLM and its baseline ran on Hugging Face's eager modules, whose attention is unfused. One
new token over a cache of C keys then passes over the cache so often (K and V together count one):

    2   evict: what is kept is copied to a new array, read and written
    2   append: the new key and value, by another copy
    5   rotate the keys to their places in the cache: five kernels over K (streaming_llm's patch)
    1   the two products with the query

The baseline computes C tokens anew for every token it emits: C^2 scores a head and layer that are
divided, masked, taken to fp32 by a softmax and back. No constant beside the host's time.

MoA's memory (GB are GiB there), with the prompts' B N tokens, T bytes of keys and values a token:

    FlashAttention-2    weights + B N T: measured while decoding, when the prompt's arrays are gone
    H2O                 weights + density B N T + two fp16 arrays of one layer's scores
    MoA                 weights + density B N T + the prompt's feed-forward: 3 ffn + hidden elements

The paper does not say at which moment each was measured. Which arrays are alive was settled by
looking at its table, one rule a system for all rows: these figures test the slopes in batch, length
and model, not the choice of the moment.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Final

from hwmodels.device import Device
from hwmodels.dtypes import FP32, DType
from validate.claims.claim import Claim, Value, not_modelled
from validate.claims.decoder import Framework, ops_seconds, step_seconds, weight_bytes
from validate.claims.models import model_named
from validate.claims.unfused import layer, pointwise, rotation
from workloads.models.architecture import TransformerConfig
from workloads.op import Op
from workloads.ops.decode_attention import DecodeAttention
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.matmul import BatchedMatmul, Matmul
from workloads.ops.shifted_groups import ShiftedGroupAttention
from workloads.ops.softmax import Softmax
from workloads.ops.span_mixture import HeadSpanAttention, LayerSpanAttention
from workloads.ops.windowed_attention import WindowedAttention

EAGER: Final = Framework(
    name="Hugging Face eager",
    host_s_per_layer=0.97e-3,
    source="StreamingLLM, figure 10: Llama-2-7B at a cache of 256 takes 31 ms for 32 layers, "
    "which the device needs less for; all other rows follow",
)
SINKS: Final = 4
"""First keys that StreamingLLM keeps (arXiv 2309.17453, table 2)."""
GIB: Final = 2**30
RESERVED_BYTES: Final = 2e9
"""CUDA context and workspaces of the libraries, of which no batch can make use."""
VLLM_MEMORY_FRAC: Final = 0.9
"""vLLM's default gpu_memory_utilization."""
SCORE_ARRAYS: Final = 2
"""Arrays of one layer's scores alive at once in H2O's eager prompt: scores and probabilities."""
GATED_ARRAYS: Final = 3
"""Arrays of the feed-forward's width alive at once: gate, up, and their product."""
LEN_PROMPTS: Final = 8192
"""Length at which a ratio that hardly depends on it is taken where the setting has none."""


# ---- Hugging Face's eager attention --------------------------------------------------------


def eager_token(
    model: TransformerConfig, len_cache: int, dtype: DType, *, batch: int = 1, moves: bool
) -> Iterator[Op]:
    """One layer for one new token a sequence; `moves`: the cache evicts and rotates its keys."""
    heads, kv_heads = model.attention.num_heads, model.attention.num_kv_heads
    dim = model.attention.head_dim
    kept = batch * kv_heads * len_cache * dim
    yield from layer(model, batch=batch, tp=1, dtype=dtype, tables=0)
    for _ in range(4 if moves else 2):  # keys and values: cut what is kept, append
        yield pointwise(kept, dtype)
    if moves:
        yield from rotation(kept, dtype)
    if kv_heads != heads:
        for _ in range(2):  # repeated for every query head
            yield pointwise(batch * heads * len_cache * dim, dtype)
    yield from _scores(model, batch=batch, len_q=1, len_kv=len_cache, dtype=dtype)


def eager_prompt(model: TransformerConfig, length: int, dtype: DType) -> Iterator[Op]:
    """One layer for a whole prompt."""
    yield from layer(model, batch=length, tp=1, dtype=dtype, tables=0)
    for _ in range(4):  # q, k, v and the output brought into one piece
        yield pointwise(length * model.hidden_dim, dtype)
    yield from _scores(model, batch=1, len_q=length, len_kv=length, dtype=dtype)


def _scores(
    model: TransformerConfig, *, batch: int, len_q: int, len_kv: int, dtype: DType
) -> Iterator[Op]:
    """Product, division, mask, softmax in fp32 with its casts, product."""
    heads, dim = batch * model.attention.num_heads, model.attention.head_dim
    scores = heads * len_q * len_kv
    yield BatchedMatmul(batch=heads, m=len_q, n=len_kv, k=dim, dtype=dtype)
    for _ in range(2):
        yield pointwise(scores, dtype)
    yield pointwise(scores, dtype, FP32)
    yield Softmax(rows=heads * len_q, cols=len_kv, dtype=FP32)
    yield pointwise(scores, FP32, dtype)
    yield BatchedMatmul(batch=heads, m=len_q, n=dim, k=len_kv, dtype=dtype)


def logits(model: TransformerConfig, rows: int, dtype: DType) -> Iterator[Op]:
    """The head over all rows, and its cast to fp32."""
    yield Matmul(m=rows, n=model.vocab_size, k=model.hidden_dim, dtype=dtype)
    yield pointwise(rows * model.vocab_size, dtype, FP32)


def eager_seconds(
    model: TransformerConfig, one_layer: Iterator[Op], rows: int, *, on: Device, dtype: DType
) -> float:
    """One pass: all layers and the head, or the host where it is slower."""
    device_s = model.num_layers * ops_seconds(list(one_layer), on)
    device_s += ops_seconds(list(logits(model, rows, dtype)), on)
    return max(device_s, model.num_layers * EAGER.host_s_per_layer)


# ---- StreamingLLM --------------------------------------------------------------------------


def evaluate_streaming_llm(claim: Claim) -> Value:
    """Latency of a token with either implementation, their ratio, or bytes kept.

    Streaming comes out slow for small caches of 13B (products with one row reach more of this GPU's
    bandwidth than the model's), recomputation fast for small ones (its large products do not).
    """
    model = model_named(str(claim.need("model")[0]))
    (len_cache,) = claim.sizes("cache")
    if claim.kind == "memory":
        return _cached_gigabytes(claim, model, len_cache)
    on, dtype = claim.device(), claim.dtype()

    def streaming() -> float:
        ops = eager_token(model, len_cache, dtype, moves=True)
        return eager_seconds(model, ops, 1, on=on, dtype=dtype)

    def recomputing() -> float:
        ops = eager_prompt(model, len_cache, dtype)
        return eager_seconds(model, ops, len_cache, on=on, dtype=dtype)

    if claim.kind == "speedup":
        return recomputing() / streaming()
    impl = str(claim.need("impl")[0]).casefold()
    if "comput" in impl:
        return _in_unit(recomputing(), claim.unit)
    if "streaming" in impl:
        return _in_unit(streaming(), claim.unit)
    not_modelled(f"setting unclear: no implementation is called '{claim.setting['impl']}'")


def _in_unit(seconds: float, unit: str) -> float:
    """Seconds in the claim's unit of time."""
    scale = {"s": 1.0, "ms": 1e3, "us": 1e6}.get(unit.split("/")[0].strip())
    if scale is None:
        not_modelled(f"setting unclear: unit '{unit}'")
    return seconds * scale


def _cached_gigabytes(claim: Claim, model: TransformerConfig, len_cache: int) -> float:
    """Weights, and the cache of all layers as the op keeps it."""
    dtype, spec = claim.dtype(), model.attention
    op = WindowedAttention(
        num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, len_q=1, len_kv=len_cache,
        head_dim=spec.head_dim, window=max(len_cache - SINKS, 1), num_sinks=SINKS, dtype=dtype,
    )  # fmt: skip
    return (weight_bytes(model, dtype) + model.num_layers * float(op.cache_bytes())) / GIB


# ---- LM-Infinite ---------------------------------------------------------------------------


def evaluate_lm_infinite(claim: Claim) -> Value:
    """Speed against full attention of a given length, where the device is known.

    Decoding compares eager steps over all keys and over the first `n_starting` (10) and last
    `n_local` (4096, Llama-2's length of training); encoding compares fused kernels.
    """
    (length,) = claim.sizes("seq")
    on, dtype = claim.device(), claim.dtype()
    first, last = (int(claim.setting.get(n, d)) for n, d in (("n_starting", 10), ("n_local", 4096)))
    if last > length:
        not_modelled(f"setting impossible: a window of {last} in a sequence of {length}")
    quantity = claim.quantity.casefold()

    def speedup(model: TransformerConfig) -> float:
        if "decod" in quantity:
            kept = min(length, first + last)
            dense = eager_token(model, length, dtype, moves=False)
            short = eager_token(model, kept, dtype, moves=True)
            return eager_seconds(model, dense, 1, on=on, dtype=dtype) / eager_seconds(
                model, short, 1, on=on, dtype=dtype
            )
        full, windowed = (
            step_seconds(
                model, on=on, batch=1, len_context=length, phase="prefill", dtype=dtype,
                attend=lambda shape, windowed=windowed: [
                    _lambda_shaped(shape, first, last) if windowed else shape
                ],
            )
            for windowed in (False, True)
        )  # fmt: skip
        return full / windowed

    if "cod" not in quantity:
        not_modelled(f"no rule for '{claim.quantity}'")
    return _mean_over(claim, speedup)


def _lambda_shaped(shape: FlashAttention2, first: int, last: int) -> Op:
    """The same attention under LM-Infinite's mask."""
    return WindowedAttention(
        batch=shape.batch, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads,
        len_q=shape.len_q, len_kv=shape.len_kv, head_dim=shape.head_dim, window=last,
        num_sinks=first, dtype=shape.dtype,
    )  # fmt: skip


def models_meant(text: str) -> list[TransformerConfig]:
    """One model, or several sizes of a family.

    >>> [m.num_layers for m in models_meant("Llama-2 7B/13B")], len(models_meant("Vicuna-7B"))
    ([32, 40], 1)
    """
    family, *_ = re.split(r"[\s-]*\d+(?:\.\d+)?b\b", text, maxsplit=1, flags=re.IGNORECASE)
    sizes = re.findall(r"\d+(?:\.\d+)?b\b", text, flags=re.IGNORECASE)
    if len(sizes) < 2:
        return [model_named(text)]
    return [model_named(f"{family}-{size}") for size in sizes]


def _mean_over(
    claim: Claim, value: Callable[[TransformerConfig], float], default: str = ""
) -> float:
    """The geometric mean over the models that the setting names."""
    text = str(claim.setting.get("model") or claim.setting.get("models") or default)
    if not text:
        not_modelled("setting incomplete: no model")
    if not re.match(r"[a-z]", text, flags=re.IGNORECASE):  # sizes alone: the paper's family
        text = f"Vicuna {text}"
    logs = [math.log(value(model)) for model in models_meant(text)]
    return math.exp(sum(logs) / len(logs))


# ---- MoA -----------------------------------------------------------------------------------


def evaluate_moa(claim: Claim) -> Value:
    """Memory at a batch and length, and throughput of decoding against other systems.

    Off against FlashAttention-2: at full memory the baseline's copies of its cache are taken to run
    at the device's bandwidth and decoding at that of the calibrated kernel, both kinder to it than
    the paper's run; alone on a long input, two devices in turn are taken to be half as productive.
    """
    quantity = claim.quantity.casefold()
    if claim.kind == "memory":
        return _moa_memory(claim, quantity)
    if "vllm" in quantity:
        return _moa_speedup(claim, vllm_throughput)
    if "fa2" in quantity or "flash" in quantity:
        return _moa_speedup(claim, eager_throughput)
    not_modelled(f"no rule for '{claim.quantity}'")


def _moa_memory(claim: Claim, quantity: str) -> Value:
    """GiB of one device, or 'OOM' where it has less."""
    model = model_named(str(claim.need("model")[0]))
    batch, length = claim.sizes("batch", "seq")
    on, dtype = claim.device(), claim.dtype()
    density = float(claim.setting.get("density", 0.5))
    if "flash" in quantity or "fa2" in quantity:
        used = held_bytes(model, batch, length, 1.0, dtype)
    elif "h2o" in quantity:
        scores = batch * model.attention.num_heads * length**2 * dtype.bytes_per_element
        used = held_bytes(model, batch, length, density, dtype) + SCORE_ARRAYS * scores
    elif "moa" in quantity:
        used = held_bytes(model, batch, length, density, dtype)
        used += batch * length * prompt_bytes(model, dtype)
    else:
        not_modelled(f"no rule for '{claim.quantity}'")
    return "OOM" if used > on.hbm.capacity_bytes - RESERVED_BYTES else used / GIB


def held_bytes(
    model: TransformerConfig, batch: int, length: int, density: float, dtype: DType
) -> float:
    """Weights, and that share of all keys and values."""
    return weight_bytes(model, dtype) + density * batch * length * token_bytes(model, dtype)


def token_bytes(model: TransformerConfig, dtype: DType) -> float:
    """Keys and values of one token in all layers.

    >>> from hwmodels.dtypes import FP16
    >>> token_bytes(model_named("Vicuna-7B"), FP16) / 1024
    512.0
    """
    per_layer = 2 * model.attention.num_kv_heads * model.attention.head_dim
    return model.num_layers * per_layer * dtype.bytes_per_element


def prompt_bytes(model: TransformerConfig, dtype: DType) -> float:
    """What one token of a prompt holds while its feed-forward is computed, cache aside."""
    elements = GATED_ARRAYS * model.mlp.ffn_dim + model.hidden_dim
    return elements * dtype.bytes_per_element


def _moa_speedup(
    claim: Claim, other: Callable[[TransformerConfig, int, int | None, Device, DType], float]
) -> float:
    """Tokens per second over those of another system, each at its batch; per device."""
    on, dtype = claim.device(), claim.dtype()
    density = float(claim.setting.get("density", 0.5))
    length = int(claim.setting.get("seq") or LEN_PROMPTS)
    batch = claim.setting.get("batch")
    found = re.search(r"needs (\d+) gpus", str(claim.setting.get("note", "")).casefold())
    devices = int(found.group(1)) if found else 1

    def speedup(model: TransformerConfig) -> float:
        fixed = None if batch is None else int(batch)
        mine = moa_throughput(model, length, fixed, on, dtype, density=density)
        return devices * mine / other(model, length, fixed, on, dtype)

    return _mean_over(claim, speedup, "Vicuna 7B/13B" if claim.setting.get("gpu") else "")


def moa_throughput(
    model: TransformerConfig, length: int, batch: int | None, on: Device, dtype: DType,
    *, density: float,
) -> float:  # fmt: skip
    """Tokens per second of eager layers around one windowed kernel for each class of heads."""
    per_sequence = length * (density * token_bytes(model, dtype) + prompt_bytes(model, dtype))
    count = batch or batch_that_fits(model, per_sequence, on, dtype)
    spec = model.attention
    attend = HeadSpanAttention(
        batch=count, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, len_q=1,
        len_kv=length, head_dim=spec.head_dim, span_local=max(int(density * length) // 2, 1),
        density_frac=density, dtype=dtype,
    )  # fmt: skip
    ops = [*layer(model, batch=count, tp=1, dtype=dtype, tables=0), attend]
    return count / eager_seconds(model, iter(ops), count, on=on, dtype=dtype)


def eager_throughput(
    model: TransformerConfig, length: int, batch: int | None, on: Device, dtype: DType
) -> float:
    """Tokens per second of eager layers around FlashAttention-2, the cache copied to grow."""
    count = batch or batch_that_fits(model, length * token_bytes(model, dtype), on, dtype)
    spec = model.attention
    kept = count * spec.num_kv_heads * length * spec.head_dim
    attend = DecodeAttention(
        batch=count, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, len_kv=length,
        head_dim=spec.head_dim, dtype=dtype,
    )  # fmt: skip
    copies = [pointwise(kept, dtype), pointwise(kept, dtype)]
    ops = [*layer(model, batch=count, tp=1, dtype=dtype, tables=0), *copies, attend]
    return count / eager_seconds(model, iter(ops), count, on=on, dtype=dtype)


def vllm_throughput(
    model: TransformerConfig, length: int, batch: int | None, on: Device, dtype: DType
) -> float:
    """Tokens per second of captured steps with all keys, in the memory that vLLM takes."""
    free = VLLM_MEMORY_FRAC * on.hbm.capacity_bytes - weight_bytes(model, dtype)
    count = batch or int(free // (length * token_bytes(model, dtype)))
    if count < 1:
        not_modelled(f"setting impossible: {model.name} and {length} tokens exceed {on.name}")
    return count / step_seconds(model, on=on, batch=count, len_context=length, dtype=dtype)


def batch_that_fits(
    model: TransformerConfig, sequence_bytes: float, on: Device, dtype: DType
) -> int:
    """Sequences for which the device has memory beside the weights."""
    free = on.hbm.capacity_bytes - RESERVED_BYTES - weight_bytes(model, dtype)
    if free < sequence_bytes:
        not_modelled(f"setting impossible: one sequence of {model.name} exceeds {on.name}")
    return int(free // sequence_bytes)


# ---- training with short spans -------------------------------------------------------------


def evaluate_sinklora(claim: Claim) -> Value:
    """Flops of attention in groups over those of dense attention, both causal.

    At 8192 positions and 4 sinks where the setting has none; from 2048 positions on the
    fraction is the same within 2 %.
    """
    if claim.kind not in ("complexity", "ratio") or "attention" not in claim.quantity.casefold():
        not_modelled(f"no rule for '{claim.quantity}'")
    (groups,) = claim.sizes("groups")
    op = ShiftedGroupAttention(
        num_heads=32, len_seq=int(claim.setting.get("seq", LEN_PROMPTS)), head_dim=128,
        num_groups=groups, num_sinks=int(claim.setting.get("sinks", SINKS)),
    )  # fmt: skip
    kept, dense = (sum(float(f) for f in one.min_flops().values()) for one in (op, op.dense()))
    return 100 * kept / dense if "%" in claim.unit else kept / dense


def evaluate_masformer(claim: Claim) -> Value:
    """Share of attention's flops that short spans save: 1 - l / L - (1 - l / L) (m + 1) / (N + 1).

    The abstract's 'up to 75 %' is more than 4 full layers of 24 leave possible at 8192 tokens in
    blocks of 1024 (72.9 %).
    """
    if "reduction" not in claim.quantity.casefold() and "saving" not in claim.quantity.casefold():
        not_modelled(f"no rule for '{claim.quantity}'")
    length, span = claim.sizes("seq", "block")
    model = model_named(str(claim.need("model")[0]))
    numbers = [int(n) for n in re.findall(r"\d+", str(claim.need("full_layers")[0]))]
    if not numbers:
        not_modelled(f"setting unclear: full_layers = {claim.setting['full_layers']!r}")
    op = LayerSpanAttention(
        num_layers=numbers[1] if len(numbers) > 1 else model.num_layers,
        num_full_layers=numbers[0], num_heads=model.attention.num_heads, len_q=length,
        head_dim=model.attention.head_dim, span=span,
    )  # fmt: skip
    dense = op.over(num_full_layers=op.num_layers)
    kept, whole = (sum(float(f) for f in one.min_flops().values()) for one in (op, dense))
    return (1 - kept / whole) * (100 if "%" in claim.unit else 1)
