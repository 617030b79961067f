"""Claims of systems that make training fit: MEMO, SeCO and SpaCO, MKOR.

MEMO (arXiv 2407.12117). A GPT on `n_gpus`, tensor parallelism over a node of 8 with its sequence
split, ranks beyond it share the sequence. A layer of `SkeletalLayer` each way, on the best rung,

    step   L (max(kernels, copy out) + max(kernels + recompute, copy back) + collectives) + head
    alpha  min(1, (B T - S_in - S_attn) / S_others, (M_CPU / (L - 2) - S_in - S_attn) / S_others)
    MFU    (6 s parameters + 6 L h s^2) / (step n peak)       attention halved for the causal mask

with T the forward pass of a layer, B what a GPU's link to the host sustains (the share of the wire
rate that `simulator.kernel_time.host_copy` states) and M_CPU its share of the host's memory
(section 4.1). T holds the layer's collectives, and so does attention's share of it. "Shared" in a
setting's link: two GPUs hang on one, as on the four switches of an 8-GPU board. Lengths are
multiples of 64K, as in the paper's experiments.

SeCO and SpaCO (arXiv 2505.16710). A model's 16-bit weights, frozen, and on the rest of the device

    whole  tokens (kept by all layers + 12 B a logit)                      one graph
    SeCO   tokens (K and V, and their gradients) + chunk's graph           chunks of 512

in sequences of a power of two; times are those of `ChunkwiseLayer`. "Up to": one chunk run back, as
in the authors' scripts (find_chunk_size/launch-sparse.sh). Off: SpaCO's gain comes out a quarter
above the abstract's 3, whose chunk, length and number of chunks run back are not stated there.

MKOR (arXiv 2306.01685). Orders, held against counts: products with one column and a rank-1 update,
two vectors sent, two inverses kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from hwmodels.device import Device
from hwmodels.dtypes import BF16
from simulator.activation_memory import logits_bytes
from simulator.kernel_time import host_copy
from simulator.kernel_time.model import Conditions
from simulator.kernel_time.predict import predict
from validate.claims.claim import Claim, Value, device_named, not_modelled
from validate.claims.decoder import weight_bytes
from validate.claims.formula import formula_value
from validate.claims.models import model_named
from workloads.models.activations import kv_cache_bytes, layer_bytes
from workloads.models.architecture import TransformerConfig
from workloads.op import Op
from workloads.ops.collective_transfer import CollectiveTransfer
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.ops.host_copy import HostCopy
from workloads.ops.matmul import Matmul
from workloads.ops.mkor import MkorStep
from workloads.ops.training_layer import ChunkwiseLayer, SkeletalLayer

# ---- MEMO ----------------------------------------------------------------------------------

NODE: Final = 8
"""GPUs of a node, over which tensor parallelism goes, and which share the host's memory."""
GPUS_PER_LINK: Final = 2
"""GPUs behind one PCIe switch of an 8-GPU A100 or A800 board (NVIDIA DGX A100 user guide)."""
LINK_BYTES_PER_S, HOST_BYTES = 32e9, 2e12
"""The paper's environment (section 5.1): PCIe 4.0 x16, 2 TB a node."""
GRID: Final = 64 * 1024
"""Step of the lengths of the paper's experiments."""
LONGEST: Final = 2**24
DEVICE: Final = "A800-80GB"
HEAD_DIM: Final = 128
VOCABULARY: Final = 50257
SIZES: Final[Mapping[str, tuple[int, int]]] = {
    "7b": (32, 4096), "13b": (40, 5120), "30b": (48, 7168), "65b": (80, 8192),
}  # fmt: skip
"""Layers and hidden size of the paper's GPTs by name; 12 L h^2 parameters are theirs."""
KERNEL: Final = "figure:fa2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Memo:
    """A run of MEMO: its model, ranks, device and host."""

    layers: int
    hidden: int
    num_ranks: int
    on: Device
    link_bytes_per_s: float
    host_bytes: float

    @property
    def context_ranks(self) -> int:
        """Ranks that share a sequence beyond tensor parallelism."""
        return max(self.num_ranks // NODE, 1)

    @property
    def parameters(self) -> int:
        """Of all layers and the embedding."""
        return 12 * self.layers * self.hidden**2 + VOCABULARY * self.hidden

    def layer(self, seq: int, swap_frac: float = 1.0) -> SkeletalLayer:
        """A layer over the whole sequence on one of the tensor-parallel ranks."""
        return SkeletalLayer(
            len_seq=seq, num_heads=self.hidden // HEAD_DIM, head_dim=HEAD_DIM,
            num_ranks=min(self.num_ranks, NODE), swap_frac=swap_frac,
        )  # fmt: skip

    def parts(
        self, seq: int, swap_frac: float = 1.0, *, backward: bool = False
    ) -> dict[str, float]:
        """Seconds of attention and of all other kernels of a layer's pass, on one GPU."""
        found = {"attention": 0.0, "other": 0.0}
        for stage in self.layer(seq, swap_frac).over(backward=backward).stages():
            if isinstance(stage.op, HostCopy) or not stage.times:
                continue
            is_attention = isinstance(stage.op, (FlashAttention2, FlashAttention2Backward))
            part = "attention" if is_attention else "other"
            kernel = KERNEL if is_attention else ""
            found[part] += float(stage.times) * _seconds(stage.op, self.on, kernel)
        return {part: seconds / self.context_ranks for part, seconds in found.items()}

    def exchange_s(self, seq: int) -> float:
        """Two gathers and two reduce-scatters of hidden states: one pass of a layer."""
        ranks = min(self.num_ranks, NODE)
        if ranks == 1:
            return 0.0
        num_bytes = seq * self.hidden * BF16.bytes_per_element // self.context_ranks
        return sum(
            2 * _seconds(CollectiveTransfer(kind=kind, num_bytes=num_bytes, num_ranks=ranks),
                         self.on)
            for kind in ("all_gather", "reduce_scatter")
        )  # fmt: skip

    def forward_s(self, seq: int) -> float:
        """A layer's forward pass."""
        return sum(self.parts(seq).values()) + self.exchange_s(seq)

    def swapped_bytes(self, seq: int, swap_frac: float) -> float:
        """What one GPU sends to the host for a layer."""
        return float(self.layer(seq, swap_frac).swapped_bytes()) / self.context_ranks

    def overlap_frac(self, seq: int) -> float:
        """The largest share of tokens whose copy a layer's forward pass hides, unbounded."""
        return self._frac(seq, self.link_bytes_per_s * self.forward_s(seq))

    def swap_frac(self, seq: int) -> float:
        """The paper's alpha: hidden behind the layer, and held by the host; in [0, 1]."""
        host = self.host_bytes / max(self.layers - 2, 1)
        return min(max(min(self.overlap_frac(seq), self._frac(seq, host)), 0.0), 1.0)

    def _frac(self, seq: int, num_bytes: float) -> float:
        whole, everything = (self.swapped_bytes(seq, frac) for frac in (0.0, 1.0))
        return (num_bytes - whole) / (everything - whole)

    def step_s(self, seq: int) -> float:
        """One sequence forward and backward."""
        alpha = self.swap_frac(seq)
        copy = self.swapped_bytes(seq, alpha) / self.link_bytes_per_s
        exchange = self.exchange_s(seq)
        forward = max(self.forward_s(seq), copy)
        back = sum(self.parts(seq, alpha, backward=True).values()) + exchange
        tokens = seq // self.context_ranks
        width = -(-VOCABULARY // min(self.num_ranks, NODE))
        head = Matmul(m=tokens, n=width, k=self.hidden)
        return self.layers * (forward + max(back, copy)) + 3 * _seconds(head, self.on)

    def mfu(self, seq: int) -> float:
        """Share of the peak that the model's flops reach."""
        flops = 6.0 * seq * self.parameters + 6.0 * self.layers * self.hidden * float(seq) ** 2
        peak = self.on.matmul_rate_flops_per_s(BF16)[0]
        return flops / (self.step_s(seq) * self.num_ranks * peak)


def evaluate_memo(claim: Claim) -> Value:
    """MFU of a run, the length from which copies hide, attention's share of a layer.

    Averages over runs that a setting does not list are not modelled, nor are lengths that were
    run without being the longest possible.
    """
    quantity = claim.quantity.casefold()
    if "average" in quantity:
        not_modelled("setting incomplete: an average over runs that it does not list")
    if "overlap" in quantity:
        run = memo_run(claim)
        return next(
            (float(s) for s in range(GRID, LONGEST, GRID) if run.overlap_frac(s) >= 1), math.inf
        )
    if "share" in quantity and "attention" in quantity:
        run, seq = memo_run(claim), _length(claim)
        return _scaled(claim, run.parts(seq)["attention"] / run.forward_s(seq))
    if "skeletal" in quantity or ("activation" in quantity and claim.kind == "memory"):
        return _skeletal(claim)
    if "mfu" in quantity:
        return _scaled(claim, memo_run(claim).mfu(_length(claim)))
    if claim.unit == "tokens":
        not_modelled("setting incomplete: a length that was run; no limit of memory is stated")
    not_modelled(f"no rule for '{claim.quantity}'")


def memo_run(claim: Claim) -> Memo:
    """The run a claim describes; what the paper holds fixed is filled in."""
    setting, text = claim.setting, f"{claim.setting.get('model', '')} {claim.quantity}".casefold()
    layers, hidden = _sizes(text)
    ranks = setting.get("n_gpus", setting.get("tp", NODE))
    (count,) = _with(claim, n_gpus=ranks).sizes("n_gpus")
    return Memo(
        layers=layers,
        hidden=hidden,
        num_ranks=count,
        on=device_named(str(setting.get("gpu", DEVICE))),
        link_bytes_per_s=_link(str(setting.get("pcie", "shared"))),
        host_bytes=_capacity(str(setting.get("cpu_mem", ""))) / NODE,
    )


def _with(claim: Claim, **setting: Any) -> Claim:
    return Claim(
        id=claim.id, family=claim.family, quantity=claim.quantity, unit=claim.unit,
        kind=claim.kind, published=None, setting={**claim.setting, **setting},
    )  # fmt: skip


def _sizes(text: str) -> tuple[int, int]:
    """Layers and hidden size, spelled out or by the paper's names; 7B where none is named."""
    spelled = re.search(r"(\d+)\s*layers?.*?\bh(?:idden)?\s*=?\s*(\d+)", text)
    if spelled:
        return int(spelled[1]), int(spelled[2])
    named = re.search(r"\b(?:gpt-)?(\d+b)\b", text)
    if named is None:
        return SIZES["7b"]
    if named[1] not in SIZES:
        not_modelled(f"setting unclear: no sizes are known of a GPT of {named[1]}")
    return SIZES[named[1]]


def _length(claim: Claim) -> int:
    """Tokens: `seq`, or the length that the quantity names (576K)."""
    if claim.setting.get("seq") is not None:
        return claim.sizes("seq")[0]
    named = re.search(r"(\d+)\s*([km])\b", claim.quantity.casefold())
    if named is None:
        not_modelled("setting incomplete: no seq")
    return int(named[1]) * {"k": 2**10, "m": 2**20}[named[2]]


def _link(text: str) -> float:
    """Bytes per second that copies of one GPU sustain: "32GB/s shared Gen4"."""
    stated = re.search(r"([\d.]+)\s*gb/s", text.casefold())
    wire = float(stated[1]) * 1e9 if stated else LINK_BYTES_PER_S
    rate = wire * host_copy.MODEL.nominal()["link_frac"]
    return rate / (GPUS_PER_LINK if "shared" in text.casefold() else 1)


def _capacity(text: str) -> float:
    """Bytes of a node's host memory: "2TB"."""
    stated = re.search(r"([\d.]+)\s*([gt])i?b", text.casefold())
    if stated is None:
        return HOST_BYTES
    return float(stated[1]) * {"g": 1e9, "t": 1e12}[stated[2]]


UNITS: Final = {"gib": 2.0**30, "mib": 2.0**20, "tib": 2.0**40, "b": 1.0, "bytes": 1.0,
                "gb": 1e9, "mb": 1e6, "tb": 1e12}  # fmt: skip


def _skeletal(claim: Claim) -> float:
    """Bytes of all layers' skeletal activations over all GPUs, or their elements by b s h."""
    run = memo_run(claim)
    unit = claim.unit.casefold()
    if unit in ("elements", "bsh", "tensors", "x"):
        op = run.layer(GRID)
        elements = float(op.skeletal_bytes()) * float(op.num_ranks) / BF16.bytes_per_element
        return elements / (GRID * run.hidden)
    if unit not in UNITS:
        not_modelled(f"setting unclear: unit '{claim.unit}'")
    (batch,) = _with(claim, batch=claim.setting.get("batch", 1)).sizes("batch")
    op = run.layer(_length(claim))
    whole = float(op.skeletal_bytes()) * float(op.num_ranks)
    return batch * run.layers * whole / UNITS[unit]


def _scaled(claim: Claim, frac: float) -> float:
    return frac * (100.0 if claim.unit == "%" else 1.0)


def _seconds(op: Op, on: Device, kernel: str = "") -> float:
    return float(predict(op, on=on, conditions=Conditions(kernel=kernel)).seconds)


# ---- SeCO and SpaCO ------------------------------------------------------------------------

CHUNK: Final = 512
"""Tokens of a chunk in the authors' repository (README, find_chunk_size/launch-seco.sh)."""
TRAINER: Final = "torch-eager"
MODEL: Final = "LLaMA3-8B"
"""Model of the abstract's figures."""


def evaluate_seco_spaco(claim: Claim) -> Value:
    """Longest sequences of one GPU (whole graph, SeCO), and SpaCO's gain over SeCO.

    Adapters, their states and the framework's own memory are left out.
    """
    quantity = claim.quantity.casefold()
    if claim.kind in ("quality", "accuracy"):
        not_modelled("quality claim: nothing here says how well a model answers")
    on, model = claim.device(), _decoder(claim)
    chunk = int(claim.setting.get("chunk", CHUNK))
    if "max" in quantity and "sequence" in quantity:
        if str(claim.setting.get("method", "LoRA")).casefold() != "lora":
            not_modelled("setting incomplete: optimizer states of full training are not stated")
        longest = {name: longest_sequence(model, on, name, chunk) for name in (WHOLE, SECO)}
        if claim.range_is or "seco" not in quantity:
            return float(longest[WHOLE]), float(longest[SECO])
        return float(longest[SECO])
    if "spaco" in quantity and claim.kind in ("speedup", "ratio"):
        seq = int(claim.setting.get("seq") or longest_sequence(model, on, SECO, chunk))
        op = chunkwise(model, seq, chunk)
        share = float(claim.setting.get("t", 1)) / float(op.num_chunks())
        seco, spaco = (_seconds(op.over(backward_frac=f), on) for f in (1.0, min(share, 1.0)))
        return seco / spaco
    not_modelled(f"no rule for '{claim.quantity}'")


WHOLE, SECO = "whole graph", "seco"


def _decoder(claim: Claim) -> TransformerConfig:
    named = str(claim.setting.get("model", MODEL))
    spelled = re.sub(r"^(llama)-?(\d)", r"\1-\2", named.strip().casefold())
    return model_named(spelled)


def graph_bytes(model: TransformerConfig, tokens: int) -> float:
    """What the layers keep of so many tokens, and the logits at the loss's peak."""
    layers = model.num_layers * float(layer_bytes(model, batch=1, len_seq=tokens))
    return layers + float(logits_bytes(TRAINER, num_tokens=tokens, vocab_size=model.vocab_size))


def needed_bytes(model: TransformerConfig, tokens: int, system: str, chunk: int) -> float:
    """Weights, and what a sequence needs: its graph, or a chunk's beside K, V and gradients."""
    weights = weight_bytes(model, BF16)
    if system == WHOLE:
        return weights + graph_bytes(model, tokens)
    cache = 2 * float(kv_cache_bytes(model, batch=1, len_context=tokens))
    return weights + cache + graph_bytes(model, min(chunk, tokens))


def longest_sequence(model: TransformerConfig, on: Device, system: str, chunk: int = CHUNK) -> int:
    """The largest power of two that fits the device; 0 where not even one token does.

    >>> from hwmodels import catalog
    >>> llama = model_named("llama-3-8b")
    >>> longest_sequence(llama, catalog.device("rtx-3090"), "seco")
    16384
    """
    fits = 0
    for exponent in range(31):
        if needed_bytes(model, 2**exponent, system, chunk) > on.hbm.capacity_bytes:
            break
        fits = 2**exponent
    return fits


def chunkwise(model: TransformerConfig, seq: int, chunk: int) -> ChunkwiseLayer:
    """A layer of the model's width with frozen weights."""
    spec = model.attention
    return ChunkwiseLayer(
        len_seq=seq, num_heads=spec.num_heads, head_dim=model.hidden_dim // spec.num_heads,
        chunk=chunk,
    )  # fmt: skip


# ---- MKOR ----------------------------------------------------------------------------------

SEE_SETTING: Final = "see setting"
INVERT_FLOPS: Final = 2.0
"""Flops of inverting a matrix of d, by d^3 (LU and two triangular solves)."""


def _mkor(d: float) -> MkorStep:
    return MkorStep(dim_out=int(d), dim_in=int(d))


_COUNTS: Final[Mapping[tuple[str, str], Callable[[float, float], float]]] = {
    ("mkor", "compute"): lambda d, b: float(_mkor(d).factor_flops()),
    ("mkor", "memory"): lambda d, b: float(_mkor(d).state_bytes()),
    ("mkor", "comm"): lambda d, b: float(_mkor(d).communicated_bytes()),
    # two covariances inverted; both and both inverses kept and sent
    ("kfac", "compute"): lambda d, b: 2 * INVERT_FLOPS * d**3,
    ("kfac", "memory"): lambda d, b: 4 * d**2,
    ("kfac", "comm"): lambda d, b: 4 * d**2,
    # a kernel of samples inverted; two vectors a sample and the kernel
    ("sngd", "compute"): lambda d, b: INVERT_FLOPS * b**3,
    ("sngd", "memory"): lambda d, b: 2 * b * d + b**2,
    ("sngd", "comm"): lambda d, b: 2 * b * d + b**2,
}
"""Counts per layer of d x d weights (and b samples) by system and resource."""
RESOURCES: Final = ("compute", "memory", "comm")
POINTS: Final = ((256, 64), (1024, 64), (1024, 512), (8192, 256))


def evaluate_mkor(claim: Claim) -> Value:
    """Orders of the setting, confirmed where they are the counts up to one constant.

    Speedups over other optimizers multiply a ratio of steps to a quality: not modelled.
    """
    if claim.kind == "complexity":
        return _orders(claim.setting)
    if claim.kind == "speedup":
        not_modelled("quality claim: the speedup holds the number of steps to a quality")
    if claim.kind in ("memory", "ratio"):
        return _mkor_bytes(claim)
    not_modelled(f"no rule for '{claim.quantity}'")


def _orders(setting: Mapping[str, Any]) -> str:
    stated = {("mkor", r): str(setting[r]) for r in RESOURCES if setting.get(r)}
    for system in ("kfac", "sngd"):
        texts = setting.get(system)
        if isinstance(texts, (list, tuple)):
            stated |= {(system, r): str(t) for r, t in zip(RESOURCES, texts, strict=False)}
    if not stated:
        not_modelled("setting incomplete: no order of compute, memory or communication")
    for (system, resource), text in stated.items():
        inner = re.fullmatch(r"\s*[oO]\((.+)\)\s*", text)
        constants = [
            _COUNTS[system, resource](d, b) / formula_value(inner[1] if inner else text,
                                                            {"d": d, "b": b})
            for d, b in POINTS
        ]  # fmt: skip
        if max(constants) > 1.02 * min(constants):
            low, high = min(constants), max(constants)
            return f"{system} {resource}: {text} times {low:.3g} to {high:.3g}"
    return SEE_SETTING


def _mkor_bytes(claim: Claim) -> float:
    """Bytes a layer of d keeps (or sends, where the quantity says so), in the claim's unit."""
    (d,) = claim.sizes("d")
    op, unit = _mkor(d), claim.unit.casefold()
    if unit not in UNITS:
        not_modelled(f"setting unclear: unit '{claim.unit}'")
    is_sent = "comm" in claim.quantity.casefold()
    return float(op.communicated_bytes() if is_sent else op.state_bytes()) / UNITS[unit]
