"""Claims on compressed caches: bytes kept, and what they are worth at a device's memory.

GEAR (arXiv 2403.05527), MiniCache (2405.14366), ThinK (2407.21018), MatryoshkaKV (2410.14731),
MiKV (2402.18096), block floating point (2403.20137), PrefixKV (2412.03409), KV heads by SVD
(2406.07056).

With C the bytes of an uncompressed sequence, kept the share that the system's op says is left of
it, W those of the weights and B the batch:

    ratio             1 / kept                    share removed   1 - kept
    peak memory       (W + B C) / (W + B kept C), activations left out
    throughput        largest batch with the system / without: a full device is read whole at every
                      step, so that steps take as long and tokens go with the batch

What a setting leaves open is the system's preset (its paper's usual value), LLaMA-2-7B's heads and
`LENGTH` tokens; batch, length, model and device of a peak or a throughput are never assumed, except
that a throughput which is said to be batch growth alone needs no length: weights aside it is 1 /
kept. So a compression rate that the paper chose by quality, not by its setting, is only found
consistent here: the arithmetic is confirmed, not the quality at that rate.

Choices that the papers leave open: MiniCache's directions have one 16-bit scale a head and token
(as KIVI's groups, but unit vectors need no zero point; with one the ratio would be 4.86 and not
5.00); block floating point is compared with the same blocks at twice the mantissa's width (BFP16),
as 16-bit floats would make it 3.9 and not 2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, Protocol

from hwmodels.dtypes import FP16
from validate.claims.claim import Claim, Value, not_modelled
from validate.claims.decoder import step_seconds, weight_bytes
from validate.claims.models import model_named
from workloads import registry
from workloads.models.architecture import TransformerConfig
from workloads.numeric import Num
from workloads.op import Op
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.layered_cache import LayerBudgetAttention

MODEL: Final = "LLaMA-2-7B"
"""Whose heads are meant where a ratio names no model."""
LENGTH: Final = 2048
"""Tokens of a sequence where a ratio names none: ThinK's larger budget, LLaMA-2's half."""
LENGTHS: Final = frozenset({"seq", "context", "len_kv", "seq_len", "prompt"})
"""Settings that say how long a sequence is."""
BFP_MANTISSA: Final = 8
"""Mantissa bits of BFP16, which BFP12's four are compared with."""


class Cache(Protocol):
    """An op that says what is left of a cache."""

    def cache_bytes(self) -> Num:
        """Of a sequence."""

    def plain_cache_bytes(self) -> Num:
        """Of one uncompressed."""

    def kept_frac(self) -> Num:
        """Their ratio."""


def evaluate_gear(claim: Claim) -> Value:
    """Ratio of bytes, peak memory with the weights, throughput as growth of the batch."""
    fields = _fields(claim, bits=("key_bits", "value_bits"), rank=("rank",), s=("outlier_frac",))
    return _memory_claim(claim, "gear", fields)


def evaluate_minicache(claim: Claim) -> Value:
    """The same; the cache is that of all layers."""
    fields = _fields(claim, bits=("bits",), gamma=("retained_frac",), group_size=("group_size",))
    return _memory_claim(claim, "minicache", fields)


def evaluate_think(claim: Claim) -> Value:
    """Share of the cache that pruned key channels free, their mask and the window counted."""
    fields = _fields(claim, lambda_=("pruned_frac",), **{"lambda": ("pruned_frac",)})
    return _memory_claim(claim, "think", fields)


def evaluate_matryoshkakv(claim: Claim) -> Value:
    """Share of the cache removed at the setting's rank, else at the paper's usual rate."""
    fields = _fields(claim, kept=("key_frac", "value_frac"))
    if rank := claim.setting.get("rank"):
        fields = dict.fromkeys(("key_frac", "value_frac"), rank / _model(claim).attention.head_dim)
    return _memory_claim(claim, "matryoshkakv", fields)


def evaluate_mikv(claim: Claim) -> Value:
    """p + (1 - p) b / 16 with the scales."""
    fields = _fields(
        claim, p=("full_frac",), importance_ratio=("full_frac",), b=("key_bits", "value_bits"),
        bits=("key_bits", "value_bits"), group_size=("group_size",),
    )  # fmt: skip
    return _memory_claim(claim, "mikv", fields)


def evaluate_bfp_kv(claim: Claim) -> Value:
    """m + 8 / n bits against the baseline that the setting names, else BFP16."""
    fields = _fields(
        claim, m=("key_bits", "value_bits"), mantissa=("key_bits", "value_bits"),
        n=("group_size",), block=("group_size",),
    )  # fmt: skip
    narrow = _cache("bfp_kv", claim, fields)
    if "16" in str(claim.setting.get("baseline", "")) and not _says(claim, "bfp16"):
        return _in_unit(claim, float(narrow.kept_frac()))
    wide = _cache("bfp_kv", claim, fields | dict.fromkeys(("key_bits", "value_bits"), BFP_MANTISSA))
    return _in_unit(claim, float(narrow.cache_bytes() / wide.cache_bytes()))


def evaluate_kv_heads_svd(claim: Claim) -> Value:
    """Share of the heads, and so of the cache, that joining them removes."""
    fields = _fields(claim, heads_joined=("heads_joined",))
    if kept := claim.setting.get("kv_heads"):
        fields["heads_joined"] = _model(claim).attention.num_kv_heads // int(kept)
    return _memory_claim(claim, "kv_heads_svd", fields)


def evaluate_prefixkv(claim: Claim) -> Value:
    """Speedup of a decoding step whose layers keep their budgets; bytes where it is a ratio."""
    fields = {"budget_frac": _budget(claim)}
    if not _says(claim, "speedup", "latency", "throughput"):
        return _memory_claim(claim, "prefixkv", fields)
    batch, length = claim.sizes("batch")[0], _length(claim)
    on, model = claim.device(), _model(claim, named=True)

    def kept(shape: FlashAttention2) -> list[Op]:
        return [
            LayerBudgetAttention(
                batch=shape.batch, num_heads=shape.num_heads, num_kv_heads=shape.kv_heads,
                len_kv=shape.len_keys, head_dim=shape.head_dim, num_layers=1, dtype=shape.dtype,
                **fields,
            )
        ]  # fmt: skip

    run: dict[str, Any] = {"on": on, "batch": batch, "len_context": length, "dtype": claim.dtype()}
    return step_seconds(model, **run) / step_seconds(model, attend=kept, **run)


# ---- from settings to caches ---------------------------------------------------------------


def _says(claim: Claim, *words: str) -> bool:
    """Whether the quantity or the setting has one of the words."""
    text = f"{claim.quantity} {claim.setting}".casefold()
    return any(word in text for word in words)


def _fields(claim: Claim, **names: tuple[str, ...]) -> dict[str, Any]:
    """Fields of an op that the setting gives, by the setting's word for them."""
    found: dict[str, Any] = {}
    for word, fields in names.items():
        value = claim.setting.get(word)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found |= dict.fromkeys(fields, value)
        elif value is not None:
            not_modelled(f"setting unclear: {word} = {value!r} is no number")
    return found


def _model(claim: Claim, *, named: bool = False) -> TransformerConfig:
    """The model of the setting; `MODEL` where none must be named."""
    return model_named(str(claim.need("model")[0] if named else claim.setting.get("model", MODEL)))


def _length(claim: Claim, default: int | None = None) -> int:
    """Tokens of a sequence: the context, or prompt and new ones together."""
    for word in ("seq", "context", "len_kv", "seq_len"):
        if word in claim.setting:
            return claim.sizes(word)[0]
    if "prompt" in claim.setting:
        prompt, new = claim.sizes("prompt", "new")
        return prompt + new
    return claim.sizes("seq")[0] if default is None else default


def _budget(claim: Claim) -> float:
    """Share of the cache that is kept, from the setting or from '20% budget'."""
    if (given := claim.setting.get("budget")) is not None:
        return float(given)
    found = re.search(r"(\d+(?:\.\d+)?) ?% ?(?:budget|cache)", claim.quantity)
    return float(found[1]) / 100 if found else float(claim.need("budget")[0])


def _cache(
    system: str, claim: Claim, fields: Mapping[str, Any], *, length: int | None = None
) -> Cache:
    """The system's op at the claim's shape. One layer stands for all where they are alike."""
    model = _model(claim)
    shape = {
        "num_heads": model.attention.num_heads, "num_kv_heads": model.attention.num_kv_heads,
        "head_dim": model.attention.head_dim, "dtype": FP16,
        "len_kv": _length(claim, LENGTH) if length is None else length,
    }  # fmt: skip
    if "num_layers" in registry.params(system):
        shape["num_layers"] = model.num_layers
    op: Any = registry.build(system, shape | dict(fields))
    found: Cache = op
    return found


def _memory_claim(claim: Claim, system: str, fields: Mapping[str, Any]) -> Value:
    """A ratio of caches, of peaks or of batches, by the words of the claim."""
    if _says(claim, "throughput", "speedup"):
        return _batch_growth(claim, system, fields)
    if _says(claim, "peak", "footprint", "incl. weights", "total memory"):
        return _in_unit(claim, _peak_kept(claim, system, fields))
    return _in_unit(claim, float(_cache(system, claim, fields).kept_frac()))


def _weights(claim: Claim) -> float:
    """Bytes of the weights; eight bits where the setting says so."""
    found = re.search(r"weights? (\d+)-?bit", str(claim.setting.get("model", "")))
    bits = float(claim.setting.get("weight_bits", found[1] if found else FP16.bits))
    return weight_bytes(_model(claim, named=True)) * bits / FP16.bits


def _peak_kept(claim: Claim, system: str, fields: Mapping[str, Any]) -> float:
    """Peak memory with the system over that without."""
    claim.need("model")
    batch, length = claim.sizes("batch")[0], _length(claim)
    plain, kept = _sequence_bytes(claim, system, fields, length)
    weights = _weights(claim)
    return (weights + batch * kept) / (weights + batch * plain)


def _sequence_bytes(
    claim: Claim, system: str, fields: Mapping[str, Any], length: int
) -> tuple[float, float]:
    """Bytes of a sequence in all layers, uncompressed and compressed."""
    cache = _cache(system, claim, fields, length=length)
    alike = "num_layers" not in registry.params(system)
    layers = _model(claim).num_layers if alike else 1
    return float(layers * cache.plain_cache_bytes()), float(layers * cache.cache_bytes())


def _batch_growth(claim: Claim, system: str, fields: Mapping[str, Any]) -> float:
    """Largest batch of sequences with the system over that without."""
    on = claim.device()
    if _says(claim, "batch growth") and not LENGTHS & set(claim.setting):
        claim.need("model")
        return float(1 / _cache(system, claim, fields).kept_frac())
    plain, kept = _sequence_bytes(claim, system, fields, _length(claim))
    room = on.hbm.capacity_bytes - _weights(claim)
    if room < plain:
        not_modelled("not one uncompressed sequence fits beside the weights")
    return (room // kept) / (room // plain)


def _in_unit(claim: Claim, kept: float) -> float:
    """The share kept as the claim's unit and words ask for it."""
    unit = claim.unit.casefold()
    if unit == "x":
        return 1 / kept
    removed = _says(claim, "reduction", "removed", "saving") or "removed" in unit
    share = 1 - kept if removed else kept
    return 100 * share if unit == "%" else share
