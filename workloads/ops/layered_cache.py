"""Caches compressed across layers: merged pairs (MiniCache), budgets by layer (PrefixKV).

MiniCache (Liu et al. 2024, arXiv 2405.14366, section 4): the deepest `merged_frac` of the layers
keep one cache a pair, the directions between both layers' vectors, and of each layer the lengths.
A `retained_frac` of tokens, whose vectors point too far apart, are kept of both layers besides.
With n tokens of h = kv_heads head_dim channels, P = floor(merged_frac layers / 2) pairs, C(n) the
bytes of a layer's codes and e those of an element, a sequence takes

    (layers - P) C(n) + 2 P C(retained) + P (8 e n / 2 + 4 retained)

which without codes, for P = layers / 4, is the paper's layers (3.1 h + 2) n bytes, and the indices
of retained tokens. Every layer of a pair reads the directions when it runs: memory halves, traffic
does not. Attention scales scores and probabilities by the lengths, one flop each a head.

PrefixKV (Wang et al. 2024, arXiv 2412.03409, section 3): layer l keeps its o_l most attended
tokens, the least that hold the same share of attention in every layer, found offline so that sum
o_l = round(budget_frac len_kv layers). How that is spread depends on the model; here half of the
layers keep base (1 + `spread_frac`), half base (1 - spread_frac), and what is over goes one by one
to the layers that keep least. Ignored: the offline search.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError
from workloads.machine import Machine
from workloads.numeric import Num, any_true, floor, maximum, minimum
from workloads.op import Arrays, Op, ProvedOp, Stage
from workloads.ops.cache_segment import KNOWN_BITS, Coding, Segment, share
from workloads.ops.restoring_attention import RestoringAttention
from workloads.ops.staged import ProvedStagedOp
from workloads.ops.top_k import INDEX, TopK


@dataclass(frozen=True, kw_only=True)
class LayersOp(Op):
    """The fields of all layers' caches of `batch` sequences, and how their programs go together."""

    batch: Num = 1
    num_heads: Num
    num_kv_heads: Num | None = None
    len_kv: Num
    head_dim: Num
    num_layers: Num = 32
    dtype: DType = BF16

    @property
    def kv_heads(self) -> Num:
        """`num_kv_heads`, else `num_heads`."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def attend(self, *segments: Segment) -> RestoringAttention:
        """One layer's attention over such a cache."""
        length = sum((s.tokens for s in segments), start=0 * self.len_kv)
        return RestoringAttention(
            batch=self.batch, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
            len_kv=length, head_dim=self.head_dim, segments=segments, dtype=self.dtype,
        )  # fmt: skip

    def plain_cache_bytes(self) -> Num:
        """Bytes of one sequence's whole cache in `dtype`, all layers."""
        e = self.dtype.bytes_per_element
        return self.num_layers * self.kv_heads * self.len_kv * 2 * self.head_dim * e

    def compulsory_bytes(self) -> Num:
        """What every layer reads and writes."""
        stages = self.stages()
        return sum((s.op.compulsory_bytes() * s.times for s in stages), start=0 * self.len_kv)

    def _runs(self) -> Iterator[tuple[str, ProvedOp]]:
        """A name for every layer, and what it runs."""
        for stage in self.stages():
            assert isinstance(stage.op, ProvedOp)
            for number in range(int(stage.times)):
                yield f"{stage.name}_{number}_", stage.op

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Every layer's own, named after it."""
        return {
            prefix + name: value
            for prefix, op in self._runs()
            for name, value in op.inputs(rng).items()
        }

    def reference(self, inputs: Arrays) -> Arrays:
        """Layer by layer."""
        return {
            prefix + name: value
            for prefix, op in self._runs()
            for name, value in op.reference(_of(inputs, prefix)).items()
        }

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Layer by layer."""
        return {
            prefix + name: value
            for prefix, op in self._runs()
            for name, value in op.program(machine, _of(inputs, prefix)).items()
        }


def _of(inputs: Arrays, prefix: str) -> Arrays:
    return {k.removeprefix(prefix): v for k, v in inputs.items() if k.startswith(prefix)}


@dataclass(frozen=True, kw_only=True)
class MergedLayersAttention(LayersOp, ProvedStagedOp):
    """One decoding step of all layers over caches merged in pairs, codes of `bits`.

    In 16 bits LLaMA-2-7B keeps 3.1 of 4 parts, and the lengths and indices:

    >>> op = MergedLayersAttention(num_heads=32, len_kv=2000, head_dim=128, bits=16)
    >>> op.cache_bytes() == 32 * (3.1 * 4096 + 2) * 2000 + 8 * 4 * 100
    True
    """

    name: ClassVar[str] = "merged_layers_attention"
    cheaper: ClassVar[tuple[str, ...]] = ("group_size", "num_kv_heads")
    merged_frac: Num = 0.5
    retained_frac: Num = 0.05
    bits: Num = 4
    group_size: Num | None = None
    zero_point: bool = False
    scale_bits: Num = 16

    def check(self) -> None:
        """Widths that kernels unpack."""
        if any_true(np.logical_not(np.isin(self.bits, KNOWN_BITS))):
            known = " ".join(str(b) for b in KNOWN_BITS)
            raise InputError(f"{self.name}: bits = {self.bits} must be one of {known}")

    @property
    def num_pairs(self) -> Num:
        """Pairs of layers that share a cache."""
        return floor(self.merged_frac * self.num_layers / 2)

    @property
    def len_retained(self) -> Num:
        """Tokens that both layers of a pair keep."""
        return share(self.retained_frac, self.len_kv)

    def _coded(self, tokens: Num, *, magnitudes: bool = False) -> Segment:
        coding = Coding(
            bits=self.bits, group=self.group_size, zero_point=self.zero_point,
            scale_bits=self.scale_bits,
        )  # fmt: skip
        return Segment(
            tokens=tokens, key_width=self.head_dim, value_width=self.head_dim,
            key=coding, value=coding, magnitudes=magnitudes,
        )  # fmt: skip

    def stages(self) -> tuple[Stage, ...]:
        """Layers of their own, and layers of pairs."""
        merged = self._coded(self.len_kv - self.len_retained, magnitudes=True)
        retained = self._coded(self.len_retained)
        return (
            Stage("own", self.attend(self._coded(self.len_kv)), times=self._layers_of_their_own),
            Stage("paired", self.attend(merged, retained), times=2 * self.num_pairs),
        )

    @property
    def _layers_of_their_own(self) -> Num:
        return self.num_layers - 2 * self.num_pairs

    def cache_bytes(self) -> Num:
        """Bytes of one sequence in all layers, by the module's equation."""
        e, n, retained = self.dtype.bytes_per_element, self.len_kv, self.len_retained
        codes, twice = (
            self.kv_heads * self._coded(tokens).num_bytes(e) for tokens in (n, retained)
        )
        pair = codes + 2 * twice + 4 * n * e + retained * INDEX.bytes_per_element
        return self._layers_of_their_own * codes + self.num_pairs * pair

    def kept_frac(self) -> Num:
        """`cache_bytes` over `plain_cache_bytes`."""
        return self.cache_bytes() / self.plain_cache_bytes()


@dataclass(frozen=True, kw_only=True)
class LayerBudgetOp(LayersOp):
    """How many tokens each layer keeps."""

    budget_frac: Num = 0.2
    spread_frac: Num = 0.0

    def check(self) -> None:
        """A token in every layer at least."""
        if any_true(self.num_kept < self.num_layers):
            raise InputError(
                f"{self.name}: budget_frac = {self.budget_frac} leaves some layer without a token; "
                f"raise it or len_kv"
            )

    @property
    def num_kept(self) -> Num:
        """Tokens of all layers: round(budget_frac len_kv num_layers)."""
        return share(self.budget_frac, self.len_kv * self.num_layers)

    def sizes(self) -> tuple[tuple[str, Num, Num], ...]:
        """Name, tokens kept, layers that keep as many.

        >>> op = LayerBudgetAttention(num_heads=1, len_kv=10, head_dim=1, num_layers=3,
        ...                           budget_frac=0.56, spread_frac=0.4)
        >>> [(size, layers) for _, size, layers in op.sizes() if layers]
        [(4, 1), (6, 1), (7, 1)]
        """
        layers, half = self.num_layers, self.num_layers // 2
        base = self.num_kept // layers
        left = self.num_kept - base * layers
        moved = minimum(share(self.spread_frac, base), base - 1)
        moved = minimum(moved, maximum(self.len_kv - base - 1, 0))
        found = []
        kinds = (("least", base - moved, half), ("mean", base, layers - 2 * half),
                 ("most", base + moved, half))  # fmt: skip
        for name, size, count in kinds:
            more = minimum(left, count)
            left = left - more
            found.append((name, size, count - more))
            found.append((f"{name}_more", minimum(size + 1, self.len_kv), more))
        return tuple(found)

    def cache_bytes(self) -> Num:
        """Bytes of one sequence in all layers."""
        return self.num_kept * self.kv_heads * 2 * self.head_dim * self.dtype.bytes_per_element

    def kept_frac(self) -> Num:
        """`cache_bytes` over `plain_cache_bytes`."""
        return self.cache_bytes() / self.plain_cache_bytes()


@dataclass(frozen=True, kw_only=True)
class LayerBudgetAttention(LayerBudgetOp, ProvedStagedOp):
    """One decoding step of all layers, each over the tokens it keeps.

    >>> op = LayerBudgetAttention(num_heads=32, len_kv=1000, head_dim=128)
    >>> op.cache_bytes() == 0.2 * 32 * 1000 * 2 * 4096 * 2
    True
    """

    name: ClassVar[str] = "layer_budget_attention"
    cheaper: ClassVar[tuple[str, ...]] = ("num_kv_heads",)

    def stages(self) -> tuple[Stage, ...]:
        """Layers by how much they keep."""
        return tuple(
            Stage(
                name,
                self.attend(
                    Segment(tokens=size, key_width=self.head_dim, value_width=self.head_dim)
                ),
                times=layers,
            )
            for name, size, layers in self.sizes()
        )


@dataclass(frozen=True, kw_only=True)
class LayerBudgetSelection(LayerBudgetOp, ProvedStagedOp):
    """The selection after a prompt: each layer's o_l most attended of len_kv tokens, a sequence.

    >>> op = LayerBudgetSelection(num_heads=32, len_kv=1000, head_dim=128, num_layers=2)
    >>> op.compulsory_bytes() == 2 * (1000 + 200) * 4
    True
    """

    name: ClassVar[str] = "layer_budget_selection"

    def stages(self) -> tuple[Stage, ...]:
        """A top-k a layer."""
        return tuple(
            Stage(name, TopK(rows=self.batch, cols=self.len_kv, k=size), times=layers)
            for name, size, layers in self.sizes()
        )
