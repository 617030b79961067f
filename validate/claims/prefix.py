"""Claims on shared prefixes: Hydragen (arXiv 2402.05099), Prefix Grouper (arXiv 2506.05433).

Hydragen's table (section 4.1, appendix C.1): tokens per second of `batch` completions of one
prompt, decoding alone (the time of the prompt is subtracted), tensor parallel over `n_gpus`.

    Hydragen, FlashAttention    no-attention step + layers x attention       (graphs, no fusion)
    vLLM 0.2.7                  B sequence + tables + max(device, step, lists)

The authors' own code runs unfused kernels (`unfused`), so the first line has no constant of its
own. In vLLM all completions are one group that shares the blocks of its prompt, so it neither runs
out of memory nor reads the prefix often from HBM. What collapses is the host:

    lists    the sampler turns the prompt's token ids of every sequence into a tensor, each step,
             used or not: B P Python numbers, while the device runs
             (vllm/model_executor/sampling_metadata.py, SamplingTensors.from_lists)
    tables   outside captured graphs, block tables are padded to the context length in tokens, not
             in blocks: B (P + S) numbers more, before the device starts
             (vllm/worker/model_runner.py, _prepare_decode: max_len=max_context_len)

Graphs end at 256 sequences and 8,192 tokens of context: past either the throughput falls to one
token in (P + S) 2 `LIST_S`, whatever the model and the batch: 0.4 k tokens/s at 16 k.

Off: FlashAttention with CodeLlama-34B, batch 1024, prefix 1024. Its cache and weights take 39 of
43 GB here, as much as rows that ran; the paper prints OOM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from hwmodels.device import Device
from hwmodels.dtypes import FP32, DType
from validate.claims.claim import EXACT_TOLERANCE, Claim, Value, not_modelled
from validate.claims.decoder import ops_seconds, step_seconds
from validate.claims.formula import formula_value
from validate.claims.models import model_named
from validate.claims.unfused import no_attention_seconds, weight_bytes
from workloads.models.architecture import TransformerConfig
from workloads.op import Op
from workloads.ops.decode_attention import DecodeAttention
from workloads.ops.elementwise import Elementwise
from workloads.ops.matmul import Matmul
from workloads.ops.shared_prefix import PrefixGroupedAttention, SharedPrefixAttention

HYDRAGEN, FLASH, VLLM, NONE = "hydragen", "flashattention", "vllm", "no-attention"
OOM: Final = "OOM"
NEW_TOKENS: Final = 128
CACHE_ROWS: Final = 16
"""Hydragen's caches are rounded up to as many rows (hydragen/llama.py, setup_caches)."""
SAMPLING_ARRAYS: Final = 5
"""fp32 arrays of batch x vocabulary alive while sampling: logits, scaled, probabilities, two."""
RESERVED_BYTES: Final = 2e9
"""CUDA context (0.5 GB), NCCL's buffers on 8 ranks and cuBLAS workspaces."""
QUERY_ROWS: Final = 128
"""Query rows of a tile of FlashAttention-2."""
MOST_SPLITS: Final = 128
"""Parts of the keys that FlashAttention-2 takes at most (csrc/flash_attn, num_splits_heuristic)."""

LIST_S: Final = 72e-9
"""vLLM: seconds to copy a Python number of a nested list into a tensor. One row of the table:
CodeLlama-7B, batch 1024, prefix 4096, 1.5 k tokens/s, with two numbers a token of context.
torch.tensor on such lists takes 55 to 60 ns on a current server core."""
SEQUENCE_S: Final = 42e-6
"""vLLM: host seconds a sequence and step (scheduler, metadata, outputs). One row of the table:
CodeLlama-7B, batch 2048, prefix 1024, 4.9 k tokens/s, less its lists."""
STEP_S: Final = 16.4e-3
"""vLLM: least seconds of a step over 8 Ray workers that replay a graph. One row: CodeLlama-7B,
batch 32, prefix 2048, 1.8 k tokens/s; the 13B model takes as long."""
LAUNCH_S: Final = 0.4e-3
"""vLLM: host seconds to launch a layer outside a graph. One row: CodeLlama-7B, batch 32, prefix
8192, 0.6 k tokens/s, less its lists and tables."""
GRAPH_BATCH: Final = 256
GRAPH_CONTEXT: Final = 8192
"""Largest batch and context that vLLM 0.2.7 captures (_BATCH_SIZES_TO_CAPTURE, default of
max_context_len_to_capture)."""
VLLM_MEMORY_FRAC: Final = 0.9
"""gpu_memory_utilization of the authors' benchmark (scripts/synth.py)."""
L2_FAR: Final = "l2_read_beyond_20mib_bytes_per_s"
"""A100: rate of reads that both halves of the L2 serve."""

_NAMES: Final = {
    "flashattention": FLASH, "no sharing": FLASH, "hydragen": HYDRAGEN, "vllm": VLLM,
    "no attention": NONE, "no-attention": NONE,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """One cell of the table."""

    model: TransformerConfig
    batch: int
    prefix: int
    new_tokens: int
    tp: int
    on: Device
    dtype: DType

    @property
    def length(self) -> int:
        """Mean length of a completion while it grows."""
        return max(self.new_tokens // 2, 1)

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads and key-value heads of one rank."""
        spec = self.model.attention
        return spec.num_heads // self.tp, max(spec.num_kv_heads // self.tp, 1)

    @property
    def row_bytes(self) -> float:
        """Keys and values of one token, all layers, on one rank."""
        row = 2 * self.heads[1] * self.model.attention.head_dim * self.dtype.bytes_per_element
        return self.model.num_layers * row


# ---- Hydragen ------------------------------------------------------------------------------


def evaluate_hydragen(claim: Claim) -> Value:
    """Throughputs (k tokens/s) or 'OOM', the speedup over the best baseline, drops with length."""
    quantity = claim.quantity.casefold()
    if "hierarchical" in quantity:
        not_modelled("setting incomplete: no lengths of the shared prompt and of the problems")
    if "drop" in quantity:
        return _drop(claim)
    if "speedup" in quantity:
        cell = _cell(claim)
        own, *baselines = (throughput(cell, impl) for impl in (HYDRAGEN, FLASH, VLLM))
        running = [rate for rate in baselines if not isinstance(rate, str)]
        return own / max(running) if running and not isinstance(own, str) else OOM
    if "throughput" in quantity or OOM.casefold() in quantity:
        impl = NONE if "no-attention" in quantity else _impl(claim)
        return throughput(_cell(claim, prefix_matters=impl != NONE), impl)
    not_modelled(f"no rule for '{claim.quantity}'")


def _drop(claim: Claim) -> Value:
    """Per cent of throughput lost from a prefix of 1k to 16k; the abstract's model is 13B."""
    setting = {"model": "CodeLlama-13B", "gpu": "A100-40GB", "n_gpus": 8} | dict(claim.setting)
    short, long = (
        throughput(_cell_of(claim, setting | {"shared_prefix": prefix}), HYDRAGEN)
        for prefix in (1024, 16256)
    )
    if isinstance(short, str) or isinstance(long, str):
        return OOM
    return 100 * (1 - long / short)


def _impl(claim: Claim) -> str:
    """The implementation of the setting."""
    (text,) = claim.need("impl")
    name = str(text).casefold()
    if VLLM in name and "no-detok" not in name:
        not_modelled("the host time of vLLM's detokenisation depends on the text")
    for word, impl in _NAMES.items():
        if word in name:
            return impl
    not_modelled(f"setting unclear: no implementation is called '{text}'")


def _cell(claim: Claim, *, prefix_matters: bool = True) -> Decoding:
    setting = dict(claim.setting)
    if "prefix" in setting:
        setting.setdefault("shared_prefix", setting["prefix"])
    if not prefix_matters:
        setting.setdefault("shared_prefix", 1)
    return _cell_of(claim, setting)


def _cell_of(claim: Claim, setting: dict[str, object]) -> Decoding:
    """The cell that a setting describes; the claim is given up where it is incomplete."""
    full = Claim(
        id=claim.id, family=claim.family, quantity=claim.quantity, unit=claim.unit, kind=claim.kind,
        published=None, setting={"new_tokens": NEW_TOKENS} | setting,
    )  # fmt: skip
    (named,) = full.need("model")
    batch, prefix, new, ranks = full.sizes("batch", "shared_prefix", "new_tokens", "n_gpus")
    split = str(setting.get("parallel", f"TP{ranks}")).casefold()
    if split != f"tp{ranks}":
        not_modelled(f"setting unclear: parallel '{split}' on {ranks} devices")
    model = model_named(str(named))
    if model.attention.num_kv_heads % ranks:
        not_modelled(f"setting impossible: {ranks} ranks do not divide the key-value heads")
    return Decoding(
        model=model, batch=batch, prefix=prefix, new_tokens=new, tp=ranks, on=full.device(),
        dtype=full.dtype(),
    )  # fmt: skip


def throughput(cell: Decoding, impl: str) -> float | str:
    """Thousand tokens per second of decoding, or 'OOM'.

    >>> from hwmodels import catalog
    >>> from hwmodels.dtypes import FP16
    >>> cell = Decoding(model=model_named("CodeLlama-7B"), batch=512, prefix=16256, new_tokens=128,
    ...                 tp=8, on=catalog.device("a100-sxm4-40gb"), dtype=FP16)
    >>> throughput(cell, FLASH), throughput(cell, HYDRAGEN) > 20 * throughput(cell, VLLM)
    ('OOM', True)
    """
    usable = cell.on.hbm.capacity_bytes - RESERVED_BYTES
    if impl == VLLM:
        usable = VLLM_MEMORY_FRAC * cell.on.hbm.capacity_bytes
    if memory_bytes(cell, impl) > usable:
        return OOM
    if impl == VLLM:
        seconds = vllm_seconds(cell)
    else:
        seconds = no_attention_seconds(
            cell.model, batch=cell.batch, tp=cell.tp, on=cell.on, dtype=cell.dtype
        )
        if impl != NONE:
            seconds += cell.model.num_layers * _attention_seconds(cell, impl)
    return cell.batch / seconds / 1e3


def memory_bytes(cell: Decoding, impl: str) -> float:
    """Weights, cache and sampling on one rank. Only FlashAttention copies the prefix B times."""
    rows = cell.prefix + cell.batch * _rounded(cell.new_tokens)
    if impl == FLASH:
        rows = cell.prefix + cell.batch * _rounded(cell.prefix + cell.new_tokens)
    logits = cell.batch * cell.model.vocab_size * FP32.bytes_per_element
    cache = rows * cell.row_bytes
    return weight_bytes(cell.model, cell.tp, cell.dtype) + cache + SAMPLING_ARRAYS * logits


def _rounded(rows: int) -> int:
    return -(-rows // CACHE_ROWS) * CACHE_ROWS


def _attention_seconds(cell: Decoding, impl: str) -> float:
    """One layer's write to the cache and its attention: Triton's split kernel for own keys."""
    heads, kv_heads = cell.heads
    dim = cell.model.attention.head_dim
    written = Elementwise(num_elements=cell.batch * kv_heads * dim, dtype=cell.dtype)
    ops: list[Op] = [written, written]
    if impl == FLASH:
        ops.append(
            DecodeAttention(
                batch=cell.batch, num_heads=heads, num_kv_heads=kv_heads,
                len_kv=cell.prefix + cell.length, head_dim=dim, dtype=cell.dtype,
            )
        )  # fmt: skip
    else:
        ops.append(
            SharedPrefixAttention(
                batch=cell.batch, num_heads=heads, num_kv_heads=kv_heads, len_prefix=cell.prefix,
                len_suffix=cell.length, head_dim=dim, num_splits=prefix_splits(cell),
                dtype=cell.dtype,
            )
        )  # fmt: skip
    return ops_seconds(ops, cell.on)


def prefix_splits(cell: Decoding) -> int:
    """Parts of the prefix that fill the SMs: a power of two that divides it."""
    tiles = -(-cell.batch // QUERY_ROWS) * cell.heads[0]
    splits = 1
    while tiles * splits * 2 <= 2 * cell.on.num_sms and cell.prefix % (2 * splits) == 0:
        if splits * 2 > min(MOST_SPLITS, cell.prefix // QUERY_ROWS):
            break
        splits *= 2
    return splits


# ---- vLLM ----------------------------------------------------------------------------------


def vllm_seconds(cell: Decoding) -> float:
    """One step of vLLM 0.2.7 by the module's equation."""
    context = cell.prefix + cell.length
    lists = cell.batch * cell.prefix * LIST_S
    captured = cell.batch <= GRAPH_BATCH and cell.prefix + cell.new_tokens <= GRAPH_CONTEXT
    tables = 0.0
    if not captured:
        tables = cell.batch * context * LIST_S
        lists += cell.model.num_layers * LAUNCH_S
    device = vllm_device_seconds(cell)
    return cell.batch * SEQUENCE_S + tables + max(device, STEP_S, lists)


def vllm_device_seconds(cell: Decoding) -> float:
    """Fused layers, and attention that fetches each head's keys for every sequence from the L2.

    Keys and values of the prefix are the same blocks for all sequences: HBM gives them once.
    """
    dim = cell.model.attention.head_dim
    step = step_seconds(
        cell.model, on=cell.on, batch=cell.batch, len_context=cell.prefix + cell.length, tp=cell.tp,
        dtype=cell.dtype, attend=lambda _: (),
    )  # fmt: skip
    fetched = cell.batch * cell.heads[0] * (cell.prefix + cell.length) * 2 * dim
    rate = cell.on.measured.get(L2_FAR) or cell.on.level("l2").bytes_per_s
    if rate is None:
        not_modelled(f"no bandwidth is known of the L2 of {cell.on.name}")
    own = DecodeAttention(
        batch=cell.batch, num_heads=cell.heads[0], num_kv_heads=cell.heads[1], len_kv=cell.length,
        head_dim=dim, dtype=cell.dtype,
    )  # fmt: skip
    attention = ops_seconds([own], cell.on) + fetched * cell.dtype.bytes_per_element / rate
    return step + cell.model.num_layers * attention


# ---- Prefix Grouper ------------------------------------------------------------------------


PREFIXES: Final = (4096, 8192, 16384)
"""Lengths of the prompt at which a formula is tried where the setting names none."""


def evaluate_prefix_grouper(claim: Claim) -> Value:
    """Flop ratios of grouped to repeated prompts: the formula, where the counts confirm it.

    With sizes (P, R, G) and no formula, the ratio itself. The counts are those of the op and of a
    product over its tokens; causal attention counts the diagonal whole, P (P + 1) / 2 pairs.
    """
    counted = _counted_ratio(claim)
    text = claim.setting.get("formula")
    if not isinstance(text, str):
        return counted(*(int(n) for n in claim.sizes("P", "R", "G")))
    named = claim.setting.get("P", PREFIXES)
    lengths = [int(n) for n in (named if isinstance(named, (list, tuple)) else [named])]
    ratio, _, limit = text.partition("->")
    tried = [
        (ratio, {"P": p, "R": max(p // share, 1), "G": group})
        for p in lengths
        for share, group in ((16, 4), (4, 8), (1, 16))
    ]
    if limit:  # 'X for P >> R'
        tried += [(limit.split("for")[0], {"P": p, "R": 1, "G": 8}) for p in lengths]
    for formula, sizes in tried:
        found = counted(*sizes.values())
        if not _near(formula_value(formula, sizes), found):
            return f"{found:.6g} at {sizes}"
    return text


def _near(one: float, other: float) -> bool:
    return abs(one / other - 1) <= EXACT_TOLERANCE


def _counted_ratio(claim: Claim) -> Callable[[int, int, int], float]:
    """From P, R and G to the flops of the claim's layers, grouped over repeated."""
    quantity = claim.quantity.casefold()
    if "linear" not in quantity and "attention" not in quantity:
        not_modelled(f"no rule for '{claim.quantity}'")

    def ratio(prefix: int, response: int, group: int) -> float:
        op = PrefixGroupedAttention(
            num_responses=group, len_prefix=prefix, len_response=response, num_heads=1, head_dim=128
        )
        pair: tuple[Op, Op] = (op, op.repeated())
        if "linear" in quantity:
            pair = (
                Matmul(m=op.num_tokens(), n=128, k=128),
                Matmul(m=op.num_tokens_repeated(), n=128, k=128),
            )
        new, old = (sum(float(f) for f in one.min_flops().values()) for one in pair)
        return new / old

    return ratio
