"""Claims of Prepacking (arXiv 2404.09529): time and memory of prefilling prompts of unlike lengths.

The authors' profile (siyan-zhao/prepacking, profiling_time_and_memory.py): `SAMPLE` prompts in
passes of `batch`, padded in random order, padded in order of length, or each pass packed into rows
of its longest prompt; seconds are a pass's mean, memory is the largest pass's peak. As it runs

    attention    unfused and over all pairs: transformers 4.38 asks for torch 2.1.1 before it fuses,
                 environment.yml has torch 2.0.1
    products     weights of 4 bits (`loadbit` 4, the script's default), multiplied in FP32: the
                 default of bnb_4bit_compute_dtype
    logits       of every token, FP16 and once more in FP32
    held over    `_ = method(...)` keeps the pass before: its FP32 logits, its K and V

and its 'llama1b' is Sheared-LLaMA-1.3B (utils.py). Lengths: a setting's own, or those of a corpus.
None is published of MMLU's questions; a lognormal stands in, whose two parameters are anchored on
the length-ordered row of the README's table (`MMLU`), so that the other rows are predicted.

Off: full batching on MMLU. A lognormal long enough for the length-ordered row's memory meets its
longest prompts in more random passes than questions do, most of which are short and a few percent
of which quote passages of about one length. Left out: the host's packing, and the tokenizer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import mean
from typing import Any, Final

import numpy as np
from scipy.special import ndtri

from hwmodels.device import Device
from hwmodels.dtypes import FP16, FP32, DType
from simulator.kernel_time.predict import predict
from simulator.packed_prefill import Pass, packed, padded
from simulator.pieces import is_attention
from simulator.planners.prepacking import pack
from simulator.variable_length import Ints
from validate.claims.claim import Claim, Value, not_modelled
from validate.claims.models import model_named
from workloads.models.activations import kv_cache_bytes
from workloads.models.architecture import TransformerConfig
from workloads.models.parameters import count_parameters
from workloads.op import Op
from workloads.ops.attention import StandardAttention
from workloads.ops.matmul import Matmul
from workloads.workload import Node

SAMPLE: Final = 1000
"""Prompts drawn from a data set (dataset_utils.py)."""
SHUFFLES: Final = 2
"""Random orders whose passes count."""
BATCH: Final = 64
LOADBIT: Final = 4
DATASET: Final = "MMLU"
GPU: Final = "A6000"
MIB: Final = 2**20
"""What the script's 'MB' are."""
BLOCK: Final = 64
"""Weights that share a scale of FP32 in 4-bit storage (bitsandbytes)."""
MMLU: Final = (25.0, 1.15)
"""Median and sigma of a lognormal of MMLU's questions in tokens: with them the length-ordered row
of the README's table, 0.658 s and 22,950 MB, comes out within 2 %."""
CORPORA: Final = {"mmlu": MMLU}
ALIASES: Final = {"llama1b": "sheared-llama-1.3b", "llama-1b": "sheared-llama-1.3b"}
PACKED, FULL, ORDERED = "prepacking", "full batching", "length-ordered"


@dataclass(frozen=True, slots=True)
class Run:
    """One profile: a model on a device, its prompts and passes."""

    model: TransformerConfig
    on: Device
    held: tuple[int, ...]
    batch: int
    loadbit: int

    @property
    def weight_bytes(self) -> float:
        """Bytes of a parameter on average: layers at `loadbit`, embedding and head in FP16."""
        whole = float(count_parameters(self.model).total)
        ends = 2.0 * self.model.vocab_size * self.model.hidden_dim
        stored = self.loadbit / 8 + (FP32.bytes_per_element / BLOCK if self.loadbit == 4 else 0)
        return ((whole - ends) * stored + ends * FP16.bytes_per_element) / whole

    @property
    def products(self) -> DType:
        """Format in which the layers multiply."""
        return FP32 if self.loadbit == 4 else FP16

    def passes(self, method: str) -> list[Pass]:
        """The passes of a method."""
        how: dict[str, Any] = {"dtype": FP16, "weight_bytes": self.weight_bytes, "all_logits": True}
        if method == ORDERED:
            return [padded(self.model, part, **how) for part in _parts(self.held, self.batch)]
        rng = np.random.default_rng(0)
        parts = [
            part
            for _ in range(SHUFFLES)
            for part in _parts(rng.permutation(self.held).tolist(), self.batch)
        ]
        if method == FULL:
            return [padded(self.model, part, **how) for part in parts]
        return [packed(self.model, pack(part, prove=False), **how) for part in parts]

    def seconds(self, method: str) -> float:
        """A pass on average."""
        return mean(
            sum(times * _seconds(self._as_run(node, one), self.on) for node, times in one.nodes())
            for one in self.passes(method)
        )

    def _as_run(self, node: Node, one: Pass) -> Op:
        """Layers' products in their format, attention unfused over all pairs."""
        if isinstance(node.op, Matmul) and node.part != "head":
            return node.op.over(dtype=self.products)
        if is_attention(node):
            spec = self.model.attention
            return StandardAttention(
                batch=one.rows, num_heads=spec.num_heads, len_q=one.len_row,
                head_dim=spec.head_dim, dtype=FP16,
            )  # fmt: skip
        return node.op

    def peak_bytes(self, method: str) -> float:
        """The largest peak, with what the pass before leaves."""
        kept = float(kv_cache_bytes(self.model, batch=1, len_context=1, dtype=FP16))
        kept += FP32.bytes_per_element * self.model.vocab_size
        before, most = 0.0, 0.0
        for one in self.passes(method):
            memory = one.memory()  # the mask is gone when the logits are there
            most = max(most, before + memory.total - memory.mask)
            before = kept * one.num_tokens
        return most


def evaluate_prepacking(claim: Claim) -> Value:
    """Seconds and memory of prepacking and of full batching, and how many times faster it is."""
    quantity = claim.quantity.casefold()
    if claim.kind in ("quality", "accuracy"):
        not_modelled("quality claim: packing changes no result that is modelled")
    if "batch" in quantity and "max" in quantity:
        not_modelled("setting incomplete: no memory limit, model and lengths of a largest batch")
    if "ttft" in quantity or "generat" in quantity or "util" in quantity:
        not_modelled("generation after the prompts, and utilisation, are not modelled")
    run = run_of(claim)
    methods = _methods(claim)
    if "speedup" in quantity or claim.kind == "speedup":
        other = ORDERED if "order" in quantity else FULL
        return run.seconds(other) / run.seconds(PACKED)
    if claim.kind == "memory" or "memory" in quantity:
        unit = {"mb": MIB, "gb": 2**30, "mib": MIB, "gib": 2**30}.get(claim.unit.casefold())
        if unit is None:
            not_modelled(f"setting unclear: unit '{claim.unit}'")
        return _told([run.peak_bytes(method) / unit for method in methods])
    if "time" in quantity or claim.kind == "latency":
        scale = {"ms": 1e3, "s": 1.0}.get(claim.unit.casefold())
        if scale is None:
            not_modelled(f"setting unclear: unit '{claim.unit}'")
        return _told([run.seconds(method) * scale for method in methods])
    not_modelled(f"no rule for '{claim.quantity}'")


def _told(found: list[float]) -> Value:
    return found[0] if len(found) == 1 else (found[0], found[1])


def _methods(claim: Claim) -> list[str]:
    """The method that a setting or quantity names; else prepacking and full batching."""
    text = f"{claim.setting.get('method', '')} {claim.quantity}".casefold()
    if "order" in text:
        return [ORDERED]
    if "full" in text:
        return [FULL]
    return [PACKED] if "prepack" in text else [PACKED, FULL]


def run_of(claim: Claim) -> Run:
    """The profile a claim describes; what the authors' script holds fixed is filled in."""
    setting = claim.setting
    if "model" not in setting:
        not_modelled("setting incomplete: no single model")
    text = str(setting["model"])
    alias = next((name for word, name in ALIASES.items() if word in text.casefold()), text)
    loadbit = int(setting.get("loadbit", LOADBIT))
    if loadbit not in (4, 16):
        not_modelled(f"loadbit {loadbit}: products of 8-bit weights as they were run")
    (batch,) = claim.sizes("batch") if setting.get("batch") else (BATCH,)
    return Run(model_named(alias), claim.device(GPU), _held(claim), batch, loadbit)


def _held(claim: Claim) -> tuple[int, ...]:
    """Lengths, ascending: the setting's, or a corpus' quantiles."""
    given = claim.setting.get("lengths")
    if isinstance(given, (list, tuple)) and given:
        if not all(isinstance(x, int) and x >= 1 for x in given):
            not_modelled(f"setting unclear: lengths {given!r} are no sizes")
        return tuple(sorted(given))
    named = re.sub(r"[^a-z]", "", str(claim.setting.get("dataset", DATASET)).casefold())
    if named not in CORPORA:
        not_modelled("setting incomplete: the lengths of the prompts are not known")
    return corpus_lengths(*CORPORA[named])


@lru_cache(maxsize=8)
def corpus_lengths(median: float, sigma: float) -> tuple[int, ...]:
    """`SAMPLE` quantiles of a lognormal, at least two tokens each (the script drops single words).

    >>> corpus_lengths(40.0, 0.9)[SAMPLE // 2]
    40
    """
    places = (np.arange(SAMPLE) + 0.5) / SAMPLE
    lengths = np.exp(math.log(median) + sigma * ndtri(places))
    return tuple(int(x) for x in np.maximum(np.round(lengths), 2))


def _parts(held: Sequence[int], size: int) -> list[Ints]:
    return [np.array(held[at : at + size]) for at in range(0, len(held), size)]


@lru_cache(maxsize=1 << 14)
def _seconds(op: Op, on: Device) -> float:
    return float(predict(op, on=on).seconds)
