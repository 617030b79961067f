"""Caches that leave the device or shrink on it: ShadowKV's and H2O's throughputs.

ShadowKV (arXiv 2410.21465). A decoding step of a Llama-like model on one A100, rates of the best
rung:

    full      linear layers + layers x FlashAttention-2 over the whole cache
    ShadowKV  linear layers + layers x (`ShadowKvDecode` + `SELECT_S`)
    infinite  `PAPER_BYTES_PER_S` / (bytes of K and V of a sequence): the paper's own roofline

FlashAttention-2 splits the keys only while batch x key-value heads leave SMs idle (`SPLIT_FRAC`);
the "infinite-memory hypothetical" is the full step at a batch that no memory holds. The budget
is a share of the length rounded up to a power of two, as the authors' configurations have it.

H2O (arXiv 2306.14048), `generation_seconds`: prefill + (new - 1) decoding steps, where

    on the device     (weights + rows of the cache + unfused scores) / memory bandwidth
    weights fetched   that + weights / (what copies sustain): HF Accelerate waits for them;
                      the longer of the two: DeepSpeed ZeRO-Inference fetches a layer ahead
    FlexGen's blocks  a layer's weights / link + max(hidden states back / link,
                      products on the device + attention on the host)        (its cost model)

H2O runs on FlexGen with `budget_frac` of the rows. The rates of the T4's machine are FlexGen's own
fits (`T4_HOST`); elsewhere the step is that of the best rung on the device. What the table does not
say, shapes of the abstract's figures, is taken from the authors' benchmark suites.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, log2
from typing import Final

from hwmodels.device import Device
from hwmodels.dtypes import BF16, FP16, DType
from validate.claims.claim import Claim, Value, not_modelled
from validate.claims.decoder import ops_seconds, step_seconds
from validate.claims.models import model_named
from workloads.models.architecture import TransformerConfig
from workloads.models.parameters import count_parameters
from workloads.models.transformer import PREFILL
from workloads.op import Op
from workloads.ops.attention import StandardAttention
from workloads.ops.decode_attention import DecodeAttention
from workloads.ops.elementwise import Elementwise
from workloads.ops.heavy_hitter import HeavyHitterDecode, HeavyHitterPrefill
from workloads.ops.shadow_kv import ShadowKvDecode

# ---- ShadowKV ------------------------------------------------------------------------------

PAPER_BYTES_PER_S: Final = 2 * 2.0**40
"""Bandwidth of the paper's roofline: the A100's "2 TB/s", taken as 2 TiB/s. It divides K and V
alone, without weights; the figures of four models follow from shapes to all printed digits."""
BUDGET_FRAC: Final = 1 / 64
"""Share of the tokens attended to: 1.56 %."""
SPLIT_FRAC: Final = 0.8
"""FlashAttention-2 splits the keys while blocks are fewer than this share of two an SM
(csrc/flash_attn/flash_api.cpp, num_splits_heuristic)."""
SPLIT, UNSPLIT = "fa2", "fa2-unsplit"
SELECT_S: Final = 0.347e-3
"""Seconds a layer that PyTorch's selection takes beyond the counted kernels: softmax in fp32 and
casts, gathers of indices, top-k by sorting, waits between two streams. One row of the table:
Llama-3-8B-1M, 124,928 tokens, batch 24, 239.51 tokens/s."""


def evaluate_shadowkv(claim: Claim) -> Value:
    """Decoding throughput in tokens per second: full attention, ShadowKV, the paper's roofline."""
    quantity = claim.quantity.casefold()
    (named,) = claim.need("model")
    (length,) = claim.sizes("seq")
    model = model_named(str(named))
    if claim.setting.get("kv_heads", model.attention.num_kv_heads) != model.attention.num_kv_heads:
        not_modelled(f"setting unclear: {named} has {model.attention.num_kv_heads} key-value heads")
    infinite = "infinite batch" in quantity or claim.setting.get("batch") == "inf"
    if infinite and "shadowkv" not in quantity:
        return PAPER_BYTES_PER_S / cache_bytes(model, length, claim.dtype(BF16))
    if "full attention" not in quantity and "shadowkv" not in quantity:
        not_modelled(f"no rule for '{claim.quantity}'")
    (batch,) = claim.sizes("batch")
    on, dtype = claim.device(), claim.dtype(BF16)
    seconds = step_seconds(
        model, on=on, batch=batch, len_context=length, dtype=dtype, attend=lambda _: ()
    )
    if "shadowkv" in quantity:
        op = shadow_kv(model, batch, length, dtype, str(claim.setting.get("sparse_budget", "")))
        per_layer = ops_seconds([op], on) + SELECT_S
    else:
        per_layer = _full_attention_seconds(model, batch, length, on, dtype)
    return batch / (seconds + model.num_layers * per_layer)


def cache_bytes(model: TransformerConfig, length: int, dtype: DType) -> float:
    """Keys and values of one sequence, all layers.

    >>> round(PAPER_BYTES_PER_S / cache_bytes(model_named("Llama-3-8B-1M"), 61440, BF16), 2)
    273.07
    """
    spec = model.attention
    row = 2 * spec.num_kv_heads * spec.head_dim * dtype.bytes_per_element
    return model.num_layers * length * row


def shadow_kv(
    model: TransformerConfig, batch: int, length: int, dtype: DType, budget: str = ""
) -> ShadowKvDecode:
    """One layer's step; `budget` may state a share, a rank and a chunk ("1.56%, rank 160").

    >>> shadow_kv(model_named("Yi-9B-200K"), 10, 244 * 1024, BF16).num_selected
    512
    """
    share = re.search(r"([\d.]+)\s*%", budget)
    frac = float(share.group(1)) / 100 if share else BUDGET_FRAC
    sizes = {
        key: int(found.group(1))
        for key in ("rank", "chunk")
        if (found := re.search(rf"{key}\s*(?:size)?\s*(\d+)", budget))
    }
    chunk = sizes.get("chunk", 8)
    tokens = frac * 2 ** ceil(log2(length))
    spec = model.attention
    return ShadowKvDecode(
        batch=batch, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, len_kv=length,
        head_dim=spec.head_dim, num_selected=max(round(tokens / chunk), 1), dtype=dtype, **sizes,
    )  # fmt: skip


def _full_attention_seconds(
    model: TransformerConfig, batch: int, length: int, on: Device, dtype: DType
) -> float:
    """FlashAttention-2's decoding kernel on one layer, split as the library does."""
    spec = model.attention
    op = DecodeAttention(
        batch=batch, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, len_kv=length,
        head_dim=spec.head_dim, dtype=dtype,
    )  # fmt: skip
    full = batch * spec.num_kv_heads >= SPLIT_FRAC * 2 * on.num_sms
    return ops_seconds([op], on, UNSPLIT if full else SPLIT)


# ---- H2O -----------------------------------------------------------------------------------

ACCELERATE, DEEPSPEED, FLEXGEN, H2O = "accelerate", "deepspeed", "flexgen", "h2o"
BUDGET: Final = 0.2
"""Share of the tokens that H2O keeps in the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Sustained rates of a machine: one device, its host, the link between them."""

    memory_bytes_per_s: float
    link_bytes_per_s: float
    cache_back_bytes_per_s: float
    hidden_back_bytes_per_s: float
    prefill_flops_per_s: float
    prefill_attention_flops_per_s: float
    decode_flops_per_s: float
    host_flops_per_s: float


T4_HOST: Final = Host(
    memory_bytes_per_s=220e9,
    link_bytes_per_s=12.89 * 2**30,
    cache_back_bytes_per_s=0.97 * 2**30,
    hidden_back_bytes_per_s=4.82 * 2**30,
    prefill_flops_per_s=21.24e12,
    prefill_attention_flops_per_s=9.97e12,
    decode_flops_per_s=4.3e12,
    host_flops_per_s=12.3e9,
)
"""A T4 on Google Cloud. All but the first: FlexGen's cost_model.py (arXiv 2303.06865), which its
authors fitted to runs on that machine; `back` is from the device. Memory: 220 of 320 GB/s, recalled
from Jia et al. 2019 (arXiv 1903.07486, table 3.1)."""
HOSTS: Final = {"t4": T4_HOST}

FETCH_BYTES_PER_S: Final = {ACCELERATE: 4.87e9, DEEPSPEED: 9.13e9}
"""What copies of weights sustain in each pass, B/s. Accelerate moves pageable memory: one row of
the table, OPT-6.7B, 512 + 1024, batch 16, 5.6 tokens/s. DeepSpeed pins it: one row, OPT-6.7B,
512 + 32, batch 16, 10.2 tokens/s. Both are less than the link's 13.8 GB/s."""
HOST_WEIGHTS_FRAC: Final = {FLEXGEN: 0.8, H2O: 1.0}
"""Share of the weights that stay on the host where the cache does ("20 80 0 100 0 100" and "0 100
0 100 0 100" in h2o_flexgen/benchmark/h2o/h2o_suite.py)."""
TIMED_TOKENS: Final = {ACCELERATE: 16, DEEPSPEED: 16, FLEXGEN: 1}
"""New tokens that runs with weights on the host really made, the others being extrapolated: the
baselines' cut_gen_len (bench_h2o.py), the first layers of FlexGen's first step (h2o_suite.py, debug
fewer_batch). H2O's slots do not grow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One cell of the table: `batch` prompts, `new` tokens each; `offload` where "C" stands."""

    model: TransformerConfig
    impl: str
    batch: int
    prompt: int
    new: int
    offload: bool
    on: Device
    budget_frac: float = BUDGET
    dtype: DType = FP16

    @property
    def length(self) -> int:
        """Mean length of a sequence while it is timed."""
        timed = self.new
        if self.offload:
            timed = min(timed, TIMED_TOKENS.get(self.impl, timed))
        return self.prompt + timed // 2

    @property
    def host(self) -> Host:
        """The rates of the device's machine; given up where none are known."""
        if self.on.id not in HOSTS:
            not_modelled(f"no rates are known of a host of {self.on.name}")
        return HOSTS[self.on.id]


LARGEST: Final[Sequence[tuple[str, int, dict[str, int]]]] = (
    ("OPT-6.7B", 32, {ACCELERATE: 2, DEEPSPEED: 16, FLEXGEN: 2, H2O: 4}),
    ("OPT-6.7B", 512, {ACCELERATE: 1, DEEPSPEED: 16, FLEXGEN: 1, H2O: 4}),
    ("OPT-6.7B", 1024, {ACCELERATE: 16, DEEPSPEED: 16, FLEXGEN: 1, H2O: 4}),
    ("OPT-30B", 32, {ACCELERATE: 8, DEEPSPEED: 4, FLEXGEN: 144, H2O: 728}),
    ("OPT-30B", 512, {ACCELERATE: 8, DEEPSPEED: 4, FLEXGEN: 80, H2O: 416}),
    ("OPT-30B", 1024, {ACCELERATE: 8, DEEPSPEED: 4, FLEXGEN: 48, H2O: 264}),
)
"""Model, new tokens and batches of the authors' suites (h2o_suite.py, bench_h2o.py): prompts of
512 on a T4, the largest batches that run."""
ON_HOST_FROM: Final = 16
"""Batches of the suites from which OPT-6.7B's weights are on the host; OPT-30B's always are."""
LATENCY_SHAPE: Final = {"prompt": 2048, "new": 2048, "batch": 24}
"""The suite's case of OPT-6.7B on the A100 that both systems run."""


def evaluate_h2o(claim: Claim) -> Value:
    """Throughput (tokens/s), latency (s), their ratios.

    Off: FlexGen with two prompts and H2O with four, all on the T4, are up to a fifth too fast: a
    step is published as 75 to 81 ms, of which reading weights and cache takes 65 at 220 GB/s, and
    FlexGen's single prompt as 59. The suite times 8 or 128 tokens and extrapolates. Therefore
    the largest gains over FlexGen, those of OPT-6.7B, exceed the abstract's by a third.
    """
    quantity = claim.quantity.casefold()
    if "gain" in quantity:
        return _gains()
    if "reduction" in quantity and "latency" in quantity:
        full, kept = (
            generation_seconds(_generation(claim, impl, LATENCY_SHAPE)) for impl in (FLEXGEN, H2O)
        )
        return full / kept
    cell = _generation(claim, _implementation(quantity))
    if "throughput" in quantity:
        return cell.batch * cell.new / generation_seconds(cell)
    if "latency" in quantity:
        return generation_seconds(cell)
    not_modelled(f"no rule for '{claim.quantity}'")


def _implementation(text: str) -> str:
    """The first framework that a quantity names."""
    found = [impl for impl in (ACCELERATE, DEEPSPEED, FLEXGEN, H2O) if impl in text]
    if not found:
        not_modelled(f"setting unclear: '{text}' names no framework")
    return found[0]


def _generation(claim: Claim, impl: str, usual: dict[str, int] | None = None) -> Generation:
    """The cell that a claim describes; given up where it is incomplete."""
    setting = {**(usual or {}), **claim.setting}
    full = replace(claim, setting=setting)
    named = re.search(r"opt-[\d.]+b", claim.quantity.casefold())
    model = model_named(str(setting.get("model") or (named and named.group()) or ""))
    prompt, new = full.sizes("prompt", "new")
    (text,) = full.need("batch")
    size, _, place = (part.strip().casefold() for part in str(text).partition(","))
    (batch,) = replace(full, setting={"batch": _number(size)}).sizes("batch")
    if place not in ("", "g", "c"):
        not_modelled(f"setting unclear: batch '{text}'; G and C are modelled")
    share = re.search(r"([\d.]+)\s*%", claim.quantity)
    return Generation(
        model=model, impl=impl, batch=batch, prompt=prompt, new=new, offload=place == "c",
        on=full.device(), dtype=full.dtype(),
        budget_frac=float(share.group(1)) / 100 if share else BUDGET,
    )  # fmt: skip


def _number(text: str) -> object:
    """A number where the text is one."""
    try:
        return float(text)
    except ValueError:
        return text


def _gains() -> Value:
    """Least and most of the largest gains over FlexGen, Accelerate and DeepSpeed in the suites."""
    best = dict.fromkeys(FETCH_BYTES_PER_S | {FLEXGEN: 0.0}, 0.0)
    claim = Claim(id=H2O, family="", quantity="", unit="x", kind="speedup", published=None)
    for model, new, batches in LARGEST:
        rates = {}
        for impl, batch in batches.items():
            place = "C" if batch >= ON_HOST_FROM or "30" in model else "G"
            setting = {
                "model": model, "gpu": "T4", "prompt": 512, "new": new, "batch": f"{batch},{place}"
            }  # fmt: skip
            cell = _generation(replace(claim, setting=setting), impl)
            rates[impl] = batch * new / generation_seconds(cell)
        best = {impl: max(gain, rates[H2O] / rates[impl]) for impl, gain in best.items()}
    return min(best.values()), max(best.values())


# ---- time of a generation ------------------------------------------------------------------


def generation_seconds(cell: Generation) -> float:
    """Prefill and new - 1 further tokens.

    >>> from hwmodels import catalog
    >>> cell = Generation(model=model_named("OPT-30B"), impl=H2O, batch=728, prompt=512, new=32,
    ...                   offload=True, on=catalog.device("t4"))
    >>> 10 < cell.batch * cell.new / generation_seconds(cell) < 15
    True
    """
    steps = cell.new - 1
    if not cell.offload and cell.on.id not in HOSTS:
        return _device_prefill(cell) + steps * _device_step(cell)
    if cell.offload and cell.impl in HOST_WEIGHTS_FRAC:
        layers = cell.model.num_layers
        return layers * (_block_prefill(cell) + steps * _block_step(cell))
    prefill = cell.model.num_layers * _layer_prefill(cell)
    moved = weight_bytes(cell) + cell.model.num_layers * _attention_bytes(cell)
    step = moved / cell.host.memory_bytes_per_s
    if cell.offload:
        fetched = weight_bytes(cell) / FETCH_BYTES_PER_S[cell.impl]
        together = max if cell.impl == DEEPSPEED else _in_turn
        prefill, step = together(prefill, fetched), together(step, fetched)
    return prefill + steps * step


def _in_turn(one: float, other: float) -> float:
    return one + other


def weight_bytes(cell: Generation) -> float:
    """Parameters that a step reads: all but the table of positions."""
    count = count_parameters(cell.model)
    return (count.total - count.positions) * cell.dtype.bytes_per_element


def layer_elements(model: TransformerConfig) -> float:
    """Weights of one layer's matrices: 12 hidden^2 for OPT."""
    spec, hidden = model.attention, model.hidden_dim
    attention = 2 * hidden * spec.head_dim * (spec.num_heads + spec.num_kv_heads)
    matrices = 3 if model.mlp.gated else 2
    return attention + matrices * hidden * model.mlp.ffn_dim


def step_ops(cell: Generation) -> list[Op]:
    """Attention of one layer and step, as the framework runs it: unfused.

    Hugging Face's modules lay the new key behind a copy of all others; FlexGen writes in place.
    """
    spec = cell.model.attention
    shape = {
        "batch": cell.batch, "num_heads": spec.num_heads, "num_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim, "dtype": cell.dtype,
    }  # fmt: skip
    if cell.impl == H2O:  # its slots are allotted for the longest sequence
        length = cell.prompt + cell.new
        return [HeavyHitterDecode(len_kv=length, budget_frac=cell.budget_frac, **shape)]
    ops: list[Op] = [StandardAttention(len_q=1, len_kv=cell.length, **shape)]
    if cell.impl in FETCH_BYTES_PER_S:
        rows = 2 * cell.batch * spec.num_kv_heads * cell.length
        ops.append(Elementwise(num_elements=rows * spec.head_dim, dtype=cell.dtype))
    return ops


def _attention_bytes(cell: Generation) -> float:
    """What a step's attention moves on the device, one layer."""
    fast_bytes = float(cell.on.level("smem").capacity_bytes)
    return sum(float(op.work(fast_bytes).bytes) for op in step_ops(cell))


def _layer_prefill(cell: Generation) -> float:
    """One layer over the prompts on the device: products, scores, and what H2O adds."""
    tokens, spec = cell.batch * cell.prompt, cell.model.attention
    pairs = cell.batch * spec.num_heads * cell.prompt**2
    seconds = 2 * tokens * layer_elements(cell.model) / cell.host.prefill_flops_per_s
    seconds += 4 * pairs * spec.head_dim / cell.host.prefill_attention_flops_per_s
    if cell.impl == H2O:
        op = prefill_op(cell)
        added = (op.scores(), op.heavy(), op.keep())
        moved = sum(float(one.compulsory_bytes()) for one in added)
        seconds += moved / cell.host.memory_bytes_per_s
    return seconds


def prefill_op(cell: Generation) -> HeavyHitterPrefill:
    """One layer of H2O over the prompts."""
    spec = cell.model.attention
    return HeavyHitterPrefill(
        batch=cell.batch, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads,
        len_kv=cell.prompt, head_dim=spec.head_dim, budget_frac=cell.budget_frac,
        dtype=cell.dtype,
    )  # fmt: skip


# ---- FlexGen's blocks ----------------------------------------------------------------------


def _fetched_bytes(cell: Generation, tokens: int) -> float:
    """Weights and hidden states of one layer that come over the link."""
    e = cell.dtype.bytes_per_element
    weights = HOST_WEIGHTS_FRAC[cell.impl] * layer_elements(cell.model) * e
    return weights + tokens * cell.model.hidden_dim * e


def _block_prefill(cell: Generation) -> float:
    """The longest of fetching, computing, and sending the cache and hidden states back."""
    tokens, e = cell.batch * cell.prompt, cell.dtype.bytes_per_element
    op = prefill_op(cell)
    cache = float(op.cache_bytes() if cell.impl == H2O else op.full_cache_bytes())
    back = cache / cell.host.cache_back_bytes_per_s
    back += tokens * cell.model.hidden_dim * e / cell.host.hidden_back_bytes_per_s
    fetch = _fetched_bytes(cell, tokens) / cell.host.link_bytes_per_s
    return max(fetch, back, _layer_prefill(cell))


def _block_step(cell: Generation) -> float:
    """One layer of a step: weights come, then products on the device, attention on the host."""
    host, e = cell.host, cell.dtype.bytes_per_element
    fetch = _fetched_bytes(cell, cell.batch) / host.link_bytes_per_s
    back = cell.batch * cell.model.hidden_dim * e / host.hidden_back_bytes_per_s
    products = 2 * cell.batch * layer_elements(cell.model) / host.decode_flops_per_s
    flops = sum(float(f) for op in step_ops(cell) for f in op.min_flops().values())
    return fetch + max(back, products + flops / host.host_flops_per_s)


# ---- devices without such a table ----------------------------------------------------------


def _device_step(cell: Generation) -> float:
    """A step on the best rung, all on the device."""
    linear = step_seconds(
        cell.model, on=cell.on, batch=cell.batch, len_context=cell.length, dtype=cell.dtype,
        attend=lambda _: (),
    )  # fmt: skip
    return linear + cell.model.num_layers * ops_seconds(step_ops(cell), cell.on)


def _device_prefill(cell: Generation) -> float:
    """The prompts on the best rung with unfused attention."""
    spec = cell.model.attention
    plain = StandardAttention(
        batch=cell.batch, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads,
        len_q=cell.prompt, head_dim=spec.head_dim, causal=True, dtype=cell.dtype,
    )  # fmt: skip
    attention: Op = prefill_op(cell) if cell.impl == H2O else plain
    return step_seconds(
        cell.model, on=cell.on, batch=cell.batch, len_context=cell.prompt, phase=PREFILL,
        dtype=cell.dtype, attend=lambda _: (attention,),
    )  # fmt: skip
