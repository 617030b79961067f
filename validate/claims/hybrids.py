"""Claims on Mamba-2-Hybrid, Hydra and Titans.

Mamba-2-Hybrid: one new token a sequence, kernels predicted one by one in a captured graph.

    Transformer   32 (attention + feed-forward) + ends
    hybrid        24 (norm + Mamba-2 layer + residual) + 4 attention + 28 feed-forward + ends

Both have hidden 4096, 32 heads of 128, a feed-forward layer of 16384 without a gate, 256000 tokens
and untied embeddings (arXiv 2406.07887, section 2; NVIDIA/Megatron-LM, examples/mamba). Their
caches have 8 heads: the hybrid's as published; the prediction of the paper's abstract compares
layers of attention, so that the Transformer's are taken to be as narrow, although the one that was
trained has 32 (`kv_heads` of a setting says otherwise). States are in the activations' format, as
mamba_ssm allocates them. What is predicted is time, whether or not caches fit one device.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Final

from hwmodels.device import Device
from hwmodels.dtypes import BF16, DType
from validate.claims.claim import Claim, Value, not_modelled
from validate.claims.decoder import dense, ops_seconds
from workloads.models.architecture import LAYER_NORM, Attention, Mlp, TransformerConfig
from workloads.models.transformer import DECODE, Inference
from workloads.op import Op
from workloads.ops.elementwise import residual_add
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.mamba2_layer import Mamba2Layer
from workloads.ops.neural_memory import NeuralMemory
from workloads.ops.norm import RmsNorm
from workloads.ops.quasi_separable import HydraLayer
from workloads.ops.staged import StagedOp
from workloads.plan import Plan
from workloads.workload import Workload

MAMBA_LAYERS, ATTENTION_LAYERS, MLP_LAYERS = 24, 4, 28
MAMBA_HEADS, MAMBA_GROUPS = 128, 8
TRANSFORMER: Final = TransformerConfig(
    name="transformer-8b", family="gpt", hidden_dim=4096, num_layers=32, vocab_size=256000,
    attention=Attention(num_heads=32, num_kv_heads=8, head_dim=128, rope_dim=64),
    norm=LAYER_NORM, mlp=Mlp(ffn_dim=16384, gated=False, activation="relu"),
)  # fmt: skip
ENDLESS: Final = 2**30
"""Tokens of a context without an end: attention outweighs everything else by thousands."""
EVERYTHING: Final = float(2**52)
UNITS: Final = {"bytes": 1.0, "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "MiB": 2**20,
                "GiB": 2**30, "ms": 1e-3, "s": 1.0, "us": 1e-6}  # fmt: skip


# ---- Mamba-2-Hybrid ------------------------------------------------------------------------


def evaluate_mamba_empirical(claim: Claim) -> Value:
    """Speedup, seconds or tokens/s of a decoding step; bytes that sequences keep.

    A context of 'N+' has no upper end: the speedup is that of ever longer contexts, which is the
    ratio of layers of attention. At 64K tokens and 32 sequences on an H100 it is 5.0.
    """
    batch, dtype = claim.sizes("batch")[0], claim.dtype(BF16)
    context = tokens_of(claim)
    heads = int(claim.setting.get("kv_heads", TRANSFORMER.attention.num_kv_heads))
    model = _with_kv_heads(heads)
    if claim.kind == "memory":
        kept = {False: _cache_bytes(model, 32, context, dtype) * batch,
                True: _hybrid_bytes(batch, context, dtype)}  # fmt: skip
        return kept[_is_hybrid(claim)] / _unit(claim)
    if claim.kind not in ("speedup", "latency", "throughput"):
        not_modelled("quality claim: nothing here says how well a model answers")
    on = claim.device()
    plain = _transformer_seconds(model, on, batch, context, dtype)
    hybrid = _hybrid_seconds(on, batch, context, dtype)
    if claim.kind == "speedup":
        return plain / hybrid
    seconds = hybrid if _is_hybrid(claim) else plain
    return batch / seconds if claim.kind == "throughput" else seconds / _unit(claim)


def tokens_of(claim: Claim) -> int:
    """The context of a setting: 4096, '64K', 'up to 64K' (its end) or '64K+' (no end).

    >>> tokens_of(Claim(id="", family="", quantity="", unit="", kind="", published=None,
    ...                 setting={"seq": "up to 64K"}))
    65536
    """
    (text,) = claim.need("seq")
    found = re.fullmatch(r"(?:up to )?(\d+(?:\.\d+)?)([KkM]?)(\+?)", str(text).strip())
    if not found:
        not_modelled(f"setting unclear: seq = '{text}'")
    if found[3]:
        return ENDLESS
    return int(float(found[1]) * {"": 1, "K": 2**10, "k": 2**10, "M": 2**20}[found[2]])


def _is_hybrid(claim: Claim) -> bool:
    """Which of the two models a setting names."""
    named = str(claim.setting.get("model", "hybrid")).casefold()
    if "vs" in named:
        not_modelled(f"setting unclear: which model of '{named}'")
    return "transformer" not in named


def _with_kv_heads(heads: int) -> TransformerConfig:
    assert isinstance(TRANSFORMER.attention, Attention)
    return replace(TRANSFORMER, attention=replace(TRANSFORMER.attention, num_kv_heads=heads))


def _cache_bytes(model: TransformerConfig, layers: int, context: int, dtype: DType) -> float:
    """Keys and values of one sequence in those layers of attention."""
    heads, width = model.attention.num_kv_heads, model.attention.head_dim
    return 2.0 * layers * heads * width * context * dtype.bytes_per_element


def mamba_layer(batch: int, dtype: DType) -> Mamba2Layer:
    """A Mamba-2 layer of the hybrid, one new token a sequence."""
    return Mamba2Layer(
        batch=batch, len_seq=1, num_heads=MAMBA_HEADS, num_groups=MAMBA_GROUPS, dtype=dtype,
        state_dtype=dtype, update=True,
    )  # fmt: skip


def _hybrid_bytes(batch: int, context: int, dtype: DType) -> float:
    """Caches of its layers of attention and states of the others."""
    states = MAMBA_LAYERS * float(mamba_layer(batch, dtype).state_bytes())
    return batch * _cache_bytes(TRANSFORMER, ATTENTION_LAYERS, context, dtype) + states


def _seconds(nodes: Workload, on: Device, prefix: str = "") -> float:
    """The nodes whose names start with that, attention as decoding runs it."""
    ops: list[Op] = []
    for node in nodes:
        if node.name.startswith(prefix):
            ops += dense(node.op) if isinstance(node.op, FlashAttention2) else [node.op]
    return ops_seconds(ops, on)


def _transformer_seconds(
    model: TransformerConfig, on: Device, batch: int, context: int, dtype: DType
) -> float:
    step = Inference(config=model, phase=DECODE, batch=batch, len_context=context)
    layer = step.layer("dense", Plan(), dtype=dtype)
    ends = _seconds(step.ends(Plan(), dtype=dtype), on)
    return ends + model.num_layers * _seconds(layer, on)


def _hybrid_seconds(on: Device, batch: int, context: int, dtype: DType) -> float:
    """Blocks of one kind each, with a norm before and a residual addition behind."""
    step = Inference(config=TRANSFORMER, phase=DECODE, batch=batch, len_context=context)
    layer = step.layer("dense", Plan(), dtype=dtype)
    whole, hidden = _seconds(layer, on), TRANSFORMER.hidden_dim
    mlp = sum(_seconds(layer, on, name) for name in ("mlp", "up", "activation", "down"))
    mamba: list[Op] = [
        RmsNorm(rows=batch, cols=hidden, dtype=dtype),
        mamba_layer(batch, dtype),
        residual_add(batch * hidden, dtype),
    ]
    ends = _seconds(step.ends(Plan(), dtype=dtype), on)
    blocks = ATTENTION_LAYERS * (whole - mlp) + MLP_LAYERS * mlp
    return ends + blocks + MAMBA_LAYERS * ops_seconds(mamba, on)


# ---- Hydra ---------------------------------------------------------------------------------

HYDRA_DEFAULTS: Final = {"batch": 1, "seq": 512, "heads": 24, "state": 64, "width": 7}
"""Where a setting is silent: the authors' module in their BERT, dim 768, sequences of 512."""


def evaluate_hydra_bissm(claim: Claim) -> Value:
    """Hydra's layer over a Mamba-2 layer of the same sizes: flops, parameters, or seconds.

    Scans alone are twice those of Mamba-2; with what both directions share, less.
    """
    sizes = {name: claim.setting.get(name, value) for name, value in HYDRA_DEFAULTS.items()}
    batch, seq, heads, state, width = replace(claim, setting=sizes).sizes(*HYDRA_DEFAULTS)
    shape = {"batch": batch, "len_seq": seq, "num_heads": heads, "state_dim": state}
    both = (HydraLayer(**shape, width=width), Mamba2Layer(**shape, width=width))  # type: ignore[arg-type]
    if claim.kind in ("speedup", "latency"):
        slow, fast = (ops_seconds([op], claim.device()) for op in both)
        return fast / slow if claim.kind == "speedup" else slow / _unit(claim)
    if claim.kind not in ("complexity", "ratio", "memory"):
        not_modelled("quality claim: nothing here says how well a model answers")
    quantity = claim.quantity.casefold()
    if "param" in quantity:
        mine, other = (float(op.weights()) for op in both)
    elif "scan" in quantity:
        mine, other = (_scan_flops(op) for op in both)
    else:
        mine, other = (float(op.work(EVERYTHING).flops) for op in both)
    return mine / other


def _scan_flops(op: StagedOp) -> float:
    """Tensor flops of the scans in a layer."""
    if isinstance(op, HydraLayer):
        op = op.mixer()
    found = next(stage.op for stage in op.stages() if stage.name == "scan")
    return float(sum(found.work(EVERYTHING).tensor_flops.values()))


# ---- Titans --------------------------------------------------------------------------------


def evaluate_titans(claim: Claim) -> Value:
    """Flops or held bytes of the memory at the sizes of a setting.

    How long a context stays of use is not in the counts: they are linear in it, the state constant.
    """
    if claim.kind not in ("complexity", "memory") or "scaling" in claim.quantity.casefold():
        not_modelled(
            "quality claim: the cost is linear and the state constant, so that counts allow any "
            "length; how much of it is recalled is a matter of training"
        )
    seq, dim = claim.sizes("seq", "dim")
    sizes = {"batch": 1, "depth": 2, "chunk": 64, "width": dim} | dict(claim.setting)
    batch, depth, chunk, width = replace(claim, setting=sizes).sizes(
        "batch", "depth", "chunk", "width"
    )
    op = NeuralMemory(
        batch=batch, len_seq=seq, dim=dim, depth=depth, width=width, chunk=chunk,
        dtype=claim.dtype(BF16),
    )  # fmt: skip
    if claim.kind == "memory":
        return float(op.state_bytes()) / _unit(claim)
    prefix = claim.unit[: -len("FLOPs")] if claim.unit.casefold().endswith("flops") else None
    scale = {"": 1.0, "M": 1e6, "G": 1e9, "T": 1e12}.get(prefix if prefix is not None else "-")
    if scale is None:
        not_modelled(f"setting unclear: unit '{claim.unit}'")
    return float(op.work(EVERYTHING).flops) / scale


def _unit(claim: Claim) -> float:
    """SI value of the claim's unit."""
    if claim.unit not in UNITS:
        not_modelled(f"setting unclear: unit '{claim.unit}'")
    return float(UNITS[claim.unit])
