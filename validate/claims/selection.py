"""Claims on attention over selected keys: an index, a tree search, blocks by their mass.

Double Sparsity (arXiv 2408.07092), TokenSelect (arXiv 2411.02886), Squeezed Attention (arXiv
2411.09688), HiP (arXiv 2406.09827), FlexPrefill (arXiv 2502.20766). A speedup of attention is

    predicted time of dense attention / predicted time of all kernels of the system's op

on the same device and shape, both captured (no host time): a decoding kernel with split keys, or
FlashAttention over a prompt. The kernels of Double Sparsity and Squeezed Attention are Triton's
(`TRITON`), as their authors wrote them; what they are compared with is not. A decoding step of a
whole model replaces its attention; with offloading a layer is max(kernels, copy), as both systems
fetch the next layer's keys while this one runs.

Nothing here is fitted and no constant belongs to a framework. What the index keeps is data: a
setting that does not say it takes the paper's own share, and FlexPrefill's gamma fixes none.

Off: Squeezed Attention's 4.0 to 4.3 times. The bytes allow 8; the model gives 5.3 on an H100, and
7.6 with the usual kernel in place of Triton's, 7.9 on an A6000. A list's uneven clusters and the
threshold's mask over all keys are not counted; whether they are the difference is not known.
HiP's and FlexPrefill's figures are recalled, and without a full setting.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Final

import numpy as np

from hwmodels.device import Device
from hwmodels.dtypes import FP16, INT4, DType
from simulator.kernel_time.model import Conditions
from simulator.kernel_time.predict import predict
from validate.claims.claim import EXACT_TOLERANCE, Claim, Value, device_named, not_modelled
from validate.claims.decoder import dense, ops_seconds, step_seconds
from validate.claims.models import model_named
from workloads import registry
from workloads.models.architecture import TransformerConfig
from workloads.op import Op
from workloads.ops.decode_attention import DecodeAttention
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.flex_prefill import FlexPrefillAttention
from workloads.ops.host_copy import HostCopy
from workloads.ops.selection import SelectiveAttention
from workloads.ops.tree_attention import TreeAttention

TRITON: Final = "triton"
"""Label of decoding kernels written in Triton: how they split keys, and what they sustain."""
PAPER_MODEL: Final = "Llama-2-7B"
"""Double Sparsity's model where a claim on bytes or offloading names none."""
LABELS: Final = INT4
"""Double Sparsity's format of labels where a claim names none: four bits."""
HOSTS: Final = ("A10", "A100", "H100")
BATCHES: Final = (1, 8)
"""Devices and batches over which a ratio must not move for a claim that names none."""
UNITS: Final = {"": 1, "k": 2**10, "m": 2**20}


# ---- reading settings ----------------------------------------------------------------------


def length_named(value: object) -> int:
    """A length as papers print it; the largest of an 'up to'.

    >>> length_named("up to 512K"), length_named(4096), length_named("1M")
    (524288, 4096, 1048576)
    """
    found = re.fullmatch(r"(?:up to )?(\d+) ?([km]?)", str(value).strip().casefold())
    if found is None or not int(found[1]):
        not_modelled(f"setting unclear: {value!r} is not a length")
    return int(found[1]) * UNITS[found[2]]


def share_named(value: object) -> float:
    """A share as papers print it.

    >>> share_named("1/16 token & channel"), share_named(0.9), share_named("90%")
    (0.0625, 0.9, 0.9)
    """
    found = re.match(r"(\d+(?:\.\d+)?)(?:/(\d+))?\s*(%?)", str(value).strip())
    if found is None or found[2] == "0":
        not_modelled(f"setting unclear: {value!r} is not a share")
    share = Fraction(found[1]) / Fraction(found[2] or 1) / (100 if found[3] else 1)
    if share > 1:
        not_modelled(f"setting unclear: {value!r} is not a share")
    return float(share)


def _length(claim: Claim) -> int:
    known = [n for n in ("seq", "context", "seq_len", "len_kv") if claim.setting.get(n)]
    return length_named(claim.need(*known[:1] or ["seq"])[0])


def _batch(claim: Claim) -> int:
    known = [n for n in ("batch", "batch_size", "bs") if claim.setting.get(n)]
    return claim.sizes(*known[:1] or ["batch"])[0]


def _model(claim: Claim) -> TransformerConfig:
    return model_named(str(claim.need("model")[0]))


def _shape(model: TransformerConfig, dtype: DType) -> dict[str, Any]:
    spec = model.attention
    return {
        "num_heads": spec.num_heads, "num_kv_heads": spec.num_kv_heads, "head_dim": spec.head_dim,
        "dtype": dtype,
    }  # fmt: skip


def _says(claim: Claim, *words: str) -> bool:
    """Whether the quantity has one of the words."""
    return any(word in claim.quantity.casefold() for word in words)


# ---- attention against attention -----------------------------------------------------------


def seconds(op: Op, on: Device, kernel: str = "") -> float:
    """Predicted seconds of an op."""
    return float(predict(op, on=on, conditions=Conditions(kernel=kernel)).seconds)


def dense_seconds(shape: dict[str, Any], on: Device, *, batch: int, len_q: int, keys: int) -> float:
    """Attention over all keys: one new token each, or the last `len_q` of a prompt."""
    whole = FlashAttention2(batch=batch, len_q=len_q, len_kv=keys, causal=len_q > 1, **shape)
    return ops_seconds(dense(whole), on)


def _built(system: str, shape: dict[str, Any], **fields: object) -> SelectiveAttention:
    """The system's op, with the presets of its paper."""
    op = registry.build(system, shape | fields)
    assert isinstance(op, SelectiveAttention)
    return op


# ---- Double Sparsity -----------------------------------------------------------------------


def evaluate_double_sparsity(claim: Claim) -> Value:
    """Speedups of attention, of a decoding step and of one with offloading; ratios of bytes."""
    share = share_named(claim.setting.get("sparsity", "1/16"))
    fields = {"kept_frac": share, "channel_frac": share, "index_dtype": _labels(claim)}
    if _says(claim, "offload"):
        return _offloaded(claim, fields)
    if _says(claim, "byte", "kv access", "memory access", "traffic"):
        return _byte_ratio(claim, fields)
    if _says(claim, "e2e", "end-to-end", "throughput", "decoding speedup"):
        return _decoded(claim, fields)
    if not _says(claim, "attention"):
        not_modelled(f"no rule for '{claim.quantity}'")
    batch, keys, on = _batch(claim), _length(claim), claim.device()
    shape = _shape(_model(claim), claim.dtype())
    op = _built("double_sparsity", shape, batch=batch, len_kv=keys, **fields)
    whole = dense_seconds(shape, on, batch=batch, len_q=1, keys=keys)
    return whole / seconds(op, on, TRITON)


def _labels(claim: Claim) -> DType:
    """Format of the label cache: four bits, unless the claim says sixteen."""
    told = " ".join(str(v) for k, v in claim.setting.items() if "label" in str(k))
    text = f"{claim.quantity} {told}".casefold()
    return FP16 if re.search(r"fp16|\b16\b|16-bit", text) else LABELS


def _byte_ratio(claim: Claim, fields: dict[str, object]) -> float:
    """Bytes of all keys and values over those of labels and selected ones; no length matters."""
    keys = _length(claim) if claim.setting.get("seq") else 2**16
    op = _built("double_sparsity", _shape(model_named(PAPER_MODEL), FP16), len_kv=keys, **fields)
    whole = DecodeAttention(num_heads=op.num_heads, len_kv=keys, head_dim=op.head_dim, dtype=FP16)
    return float(whole.cache_bytes() / op.kv_bytes_read())


def _decoded(claim: Claim, fields: dict[str, object]) -> float:
    """A step with the system's attention against one with dense attention, both compiled."""
    model, batch, keys, on = _model(claim), _batch(claim), _length(claim), claim.device()

    def attend(whole: FlashAttention2) -> Sequence[Op]:
        shape = {
            "num_heads": whole.num_heads, "num_kv_heads": whole.num_kv_heads,
            "head_dim": whole.head_dim, "dtype": whole.dtype,
        }  # fmt: skip
        op = _built("double_sparsity", shape, batch=batch, len_kv=whole.len_keys, **fields)
        return (op,)

    def step(how: Callable[[FlashAttention2], Sequence[Op]]) -> float:
        return step_seconds(
            model, on=on, batch=batch, len_context=keys, dtype=claim.dtype(), attend=how
        )

    return step(dense) / step(attend)


def _offloaded(claim: Claim, fields: dict[str, object]) -> float:
    """Against fetching every key, as FlexGen does.

    A claim that names no device or batch is answered where neither moves the ratio: both systems
    wait for the link, and the ratio is that of the bytes.
    """
    keys = _length(claim)
    model = model_named(str(claim.setting.get("model", PAPER_MODEL)))
    batches = [_batch(claim)] if claim.setting.get("batch") else BATCHES
    named = claim.setting.get("gpu")
    devices = [claim.device()] if named else [device_named(name) for name in HOSTS]
    ratios = [
        _fetched_ratio(model, on, batch=batch, keys=keys, dtype=claim.dtype(), fields=fields)
        for on in devices
        for batch in batches
    ]
    if max(ratios) / min(ratios) - 1 > EXACT_TOLERANCE:
        not_modelled("setting incomplete: no gpu or batch, on which the ratio depends here")
    return float(np.mean(ratios))


def _fetched_ratio(
    model: TransformerConfig,
    on: Device,
    *,
    batch: int,
    keys: int,
    dtype: DType,
    fields: dict[str, object],
) -> float:
    """A layer that fetches all keys over one that fetches its lists."""
    shape = _shape(model, dtype)
    rest = step_seconds(
        model, on=on, batch=batch, len_context=keys, dtype=dtype, attend=lambda _: ()
    )
    op = _built("double_sparsity", shape, batch=batch, len_kv=keys, **fields)
    whole = DecodeAttention(batch=batch, len_kv=keys, **shape)
    own, all_keys = (
        max(
            rest / model.num_layers + seconds(kernel, on),
            seconds(HostCopy(num_bytes=int(num_bytes)), on),
        )
        for kernel, num_bytes in ((op, op.fetched_bytes()), (whole, whole.cache_bytes()))
    )
    return all_keys / own


# ---- TokenSelect ---------------------------------------------------------------------------


def evaluate_tokenselect(claim: Claim) -> Value:
    """Speedup of attention, for one new token or a chunk of a prompt as `phase` says.

    A chunk shares one list; a token's depends on how often the selection cache hits (`hit_frac`,
    else never). The step's baseline, InfLLM, is no op here.
    """
    if not _says(claim, "attention"):
        claim.need("gpu", "model", "seq")
        not_modelled("the baseline's own selection and host copies (InfLLM) are not modelled")
    shape, keys = _shape(_model(claim), claim.dtype()), _length(claim)
    (phase,) = claim.need("phase")
    on = claim.device()
    hits = (
        {"hit_frac": share_named(claim.setting["hit_frac"])} if "hit_frac" in claim.setting else {}
    )
    if claim.setting.get("k"):
        hits["len_selected"] = claim.sizes("k")[0]
    new = claim.sizes("chunk")[0] if str(phase).casefold().startswith("prefill") else 1
    local = int(registry.params("tokenselect")["len_local"].default or 0)  # type: ignore[call-overload]
    past = keys - local - (new if new > 1 else 0)
    if past < 1:
        not_modelled(f"setting unclear: {keys} keys leave none to select from")
    op = _built(
        "tokenselect", shape, len_q=new, block_q=new, len_kv=past, len_local=keys - past, **hits
    )
    return dense_seconds(shape, on, batch=1, len_q=new, keys=keys) / seconds(op, on)


# ---- Squeezed Attention --------------------------------------------------------------------


def evaluate_squeezed_attention(claim: Claim) -> Value:
    """Reduction of the KV budget (bytes), speedup of the kernels while generating.

    The shares are those of the setting's `sparsity`; without one, the most that the paper drops,
    90 %. A prompt needs the length of the user's input (`len_q`); without it, or where a claim
    names both phases, the figure is that of generating. One sequence: its context is fixed.
    """
    kept = 1 - share_named(claim.setting["sparsity"]) if "sparsity" in claim.setting else 0.1
    coarse: dict[str, object] = {"coarse": 5} if _says(claim, "hierarch") else {}
    if _says(claim, "budget"):
        return _budget_reduction(kept, coarse)
    if not _says(claim, "speedup", "latency"):
        not_modelled(f"no rule for '{claim.quantity}'")
    shape, keys, on = _shape(_model(claim), claim.dtype()), _length(claim), claim.device()
    new = 1
    if _says(claim, "prefill") and not _says(claim, "generation", "decod"):
        new = claim.sizes("len_q")[0]
    batch = _batch(claim) if claim.setting.get("batch") else 1
    op = _built(
        "squeezed_attention", shape, batch=batch, len_q=new, len_kv=keys, kept_frac=kept, **coarse
    )
    whole = FlashAttention2(batch=batch, len_q=new, len_kv=keys, **shape)
    return ops_seconds(dense(whole), on) / seconds(op, on, TRITON)


def _budget_reduction(kept: float, coarse: dict[str, object]) -> float:
    """Bytes of all keys and values over those of centroids and kept keys.

    >>> round(_budget_reduction(0.1, {}), 2), round(_budget_reduction(0.3, {}), 2)
    (8.0, 3.08)
    """
    shape = _shape(model_named(PAPER_MODEL), FP16)
    op = _built("squeezed_attention", shape, len_kv=20 * 2**16, kept_frac=kept, **coarse)
    whole = DecodeAttention(len_kv=op.len_kv, **shape)
    return float(whole.cache_bytes() / op.kv_bytes_read())


# ---- HiP attention -------------------------------------------------------------------------

SIZES: Final = tuple(2**n for n in range(15, 26, 2))
"""Lengths at which a growth is tried: two fix the coefficients, the others must follow."""
GROWTHS: Final[dict[str, Callable[[float], float]]] = {
    "log t": np.log2,
    "t": float,
    "t log t": lambda t: t * np.log2(t),
    "t^2": lambda t: t * t,
    "t^2 log t": lambda t: t * t * np.log2(t),
}
SEE_SETTING: Final = "see setting"
"""What a claim's value says where the formulas stand in its setting."""


def evaluate_hip_attention(claim: Claim) -> Value:
    """Growth of the counts with the length; speedups where device, model and length are given."""
    if _says(claim, "complex"):
        return _complexity(claim)
    if not _says(claim, "speedup", "latency"):
        not_modelled(f"no rule for '{claim.quantity}'")
    shape, keys, on = _shape(_model(claim), claim.dtype()), _length(claim), claim.device()
    batch, (phase,) = _batch(claim), claim.need("phase")
    new = keys if str(phase).casefold().startswith("prefill") else 1
    dense_shape = dict(shape)
    if claim.setting.get("k"):
        shape["len_selected"] = claim.sizes("k")[0]
    op = TreeAttention(batch=batch, len_q=new, len_kv=keys, **shape)
    return dense_seconds(dense_shape, on, batch=batch, len_q=new, keys=keys) / seconds(op, on)


def _complexity(claim: Claim) -> str:
    """The setting's classes if flops and bytes of a prompt's attention grow so, else what is off.

    One head of 128, the paper's blocks and 512 keys a list, lengths `SIZES`.
    """
    counts: dict[str, Callable[[TreeAttention], float]] = {
        "time": lambda op: float(op.min_flops()[op.dtype]),
        "space": lambda op: float(op.cache_bytes() + op.list_bytes()),
    }
    named = {key: str(claim.setting[key]) for key in counts if claim.setting.get(key)}
    if not named:
        not_modelled("setting incomplete: no class of time or space")
    for key, text in named.items():
        counted = [
            counts[key](TreeAttention(num_heads=1, len_q=t, len_kv=t, head_dim=128, dtype=FP16))
            for t in SIZES
        ]
        if not grows_as(text, counted):
            growth = counted[-1] / counted[-2]
            return f"{key} is not {text}: times {growth:.4g} from {SIZES[-2]} to {SIZES[-1]}"
    return SEE_SETTING


def grows_as(text: str, counted: Sequence[float]) -> bool:
    """Whether counts at `SIZES` are a f(T) + b T with a > 0, for f of 'O(f)', within 2 %.

    The linear term is what a class leaves out beside T log T and above; f = T stands alone.

    >>> grows_as("O(T log T)", [7 * t * np.log2(t / 512) + 5 * t for t in SIZES])
    True
    >>> grows_as("O(T)", [7 * t * np.log2(t) for t in SIZES])
    False
    """
    inner = re.fullmatch(r"o\((.+)\)", text.strip().casefold())
    name = re.sub(r"\s+", " ", inner[1].strip()) if inner else ""
    if name not in GROWTHS:
        not_modelled(f"setting unclear: '{text}' is no known class")
    basis = [GROWTHS[name]] if name in ("t", "log t") else [GROWTHS[name], GROWTHS["t"]]
    table = np.array([[f(t) for f in basis] for t in SIZES])
    few = slice(None, None, len(SIZES) - 1) if len(basis) > 1 else slice(0, 1)
    factors = np.linalg.solve(table[few], np.asarray(counted)[few])
    follows = np.allclose(table @ factors, counted, rtol=EXACT_TOLERANCE)
    return bool(factors[0] > 0 and follows)


# ---- FlexPrefill ---------------------------------------------------------------------------


def evaluate_flexprefill(claim: Claim) -> Value:
    """Speedup of a prompt's attention; the share of blocks kept must be given.

    Gamma bounds the mass that is kept, not the number of blocks: that depends on the text.
    """
    if not _says(claim, "speedup", "latency"):
        not_modelled(f"no rule for '{claim.quantity}'")
    shape, keys, on = _shape(_model(claim), claim.dtype()), _length(claim), claim.device()
    given = claim.setting
    if "sparsity" in given:
        kept = 1 - share_named(given["sparsity"])
    elif "density" in given or "kept_frac" in given:
        kept = share_named(given.get("density", given.get("kept_frac")))
    else:
        not_modelled("setting incomplete: gamma does not fix the share of blocks that is kept")
    op = FlexPrefillAttention(len_q=keys, kept_frac=kept, **shape)
    return dense_seconds(shape, on, batch=1, len_q=keys, keys=keys) / seconds(op, on)
