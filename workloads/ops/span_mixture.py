"""Different spans in one model: per head (MoA) and per layer (MASFormer).

`HeadSpanAttention`: mixture of sparse attention (Fu et al. 2024, arXiv 2406.14909, section 3). Head
h sees the sinks and a window of S_h(N) = alpha_h + beta_h N keys altogether. Heads come in two
classes: local ones keep S = alpha however long the input, elastic ones share the rest of the
budget, which makes their span grow with N:

    sum over heads of S_h = density N H,    S_elastic = (density N H - H_local alpha) / H_elastic

Which head belongs where, and at which alpha, is the result of the paper's profiling and of its
integer program; the cost depends on the number of heads in each class alone.

`LayerSpanAttention`: MASFormer (Zhang et al. 2023, arXiv 2310.12442, section 3). Of L layers, l
attend to everything and the rest to a span of m keys, in blocks of m or in a sliding window:

    pairs   l N (N + 1) / 2 + (L - l) N (m + 1) / 2               in blocks
            l N (N + 1) / 2 + (L - l) sum over p of min(p + 1, m)    sliding

Ignored: choosing spans, reordering heads into classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, Values
from workloads.numeric import Num, any_true, floor, minimum
from workloads.op import Arrays, Stage
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.ops.staged import ProvedStagedOp
from workloads.ops.windowed_attention import (
    WindowedAttention,
    join_rows,
    masked,
    masked_gradient,
    split_rows,
)


@dataclass(frozen=True, kw_only=True)
class HeadSpanAttention(ProvedStagedOp):
    """`num_local` K and V heads see `span_local` keys, the others what `density_frac` leaves.

    Q[batch, num_heads, len_q, head_dim], causal; spans hold `num_sinks` first keys (none by
    default). `num_local` left out is half of the K and V heads. One new token: len_q = 1.

    >>> op = HeadSpanAttention(num_heads=32, len_q=1, len_kv=8192, head_dim=128, span_local=2048)
    >>> op.span_elastic(), op.cache_bytes() / (2 * 2 * 32 * 128 * 8192)
    (6144, 0.5)
    """

    name: ClassVar[str] = "head_span_attention"
    cheaper: ClassVar[tuple[str, ...]] = ("num_kv_heads", "num_local", "span_local")
    batch: Num = 1
    num_heads: Num
    num_kv_heads: Num | None = None
    len_q: Num
    len_kv: Num | None = None
    head_dim: Num
    span_local: Num
    num_local: Num | None = None
    num_sinks: Num | None = None
    density_frac: Num = 0.5
    dtype: DType = BF16

    def check(self) -> None:
        """Heads of both classes, spans that exceed the sinks and end within the input."""
        if any_true(self.num_heads % self.kv_heads != 0):
            raise InputError(
                f"{self.name}: num_kv_heads = {self.num_kv_heads} must divide "
                f"num_heads = {self.num_heads}"
            )
        if any_true((self.local_heads < 1) | (self.local_heads >= self.kv_heads)):
            raise InputError(
                f"{self.name}: num_local = {self.local_heads} of {self.kv_heads} K and V heads "
                f"leaves a class empty; give 1 to {self.kv_heads - 1}, or take windowed_attention"
            )
        for what, span in (("span_local", self.span_local), ("density_frac", self.span_elastic())):
            if any_true(span <= self.sinks):
                raise InputError(
                    f"{self.name}: {what} leaves a span of {span} keys, not more than the "
                    f"num_sinks = {self.sinks}; raise density_frac, or lower num_local or sinks"
                )
        if any_true(self.span_local > self.len_keys):
            raise InputError(
                f"{self.name}: span_local = {self.span_local} is longer than the len_kv = "
                f"{self.len_keys} keys there are; shorten it, or take flash_attention_2"
            )

    @property
    def kv_heads(self) -> Num:
        """`num_kv_heads`, else `num_heads`."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def len_keys(self) -> Num:
        """`len_kv`, else `len_q`."""
        return self.len_q if self.len_kv is None else self.len_kv

    @property
    def sinks(self) -> Num:
        """`num_sinks`, else none."""
        return 0 if self.num_sinks is None else self.num_sinks

    @property
    def local_heads(self) -> Num:
        """`num_local`, else half of the K and V heads."""
        return self.kv_heads // 2 if self.num_local is None else self.num_local

    def span_elastic(self) -> Num:
        """Keys of an elastic head: an equal share of what the local heads leave, at most all."""
        budget = self.density_frac * self.len_keys * self.kv_heads
        share = (budget - self.local_heads * self.span_local) / (self.kv_heads - self.local_heads)
        return minimum(floor(share), self.len_keys)

    def classes(self) -> dict[str, WindowedAttention]:
        """The attention of each class of heads."""
        group = self.num_heads // self.kv_heads
        elastic = self.kv_heads - self.local_heads
        spans = {
            "local": (self.local_heads, self.span_local),
            "elastic": (elastic, self.span_elastic()),
        }
        return {
            name: WindowedAttention(
                batch=self.batch, num_heads=heads * group, num_kv_heads=heads, len_q=self.len_q,
                len_kv=self.len_kv, head_dim=self.head_dim, window=span - self.sinks,
                num_sinks=self.num_sinks, dtype=self.dtype,
            )
            for name, (heads, span) in spans.items()
        }  # fmt: skip

    def stages(self) -> tuple[Stage, ...]:
        """One kernel for each class."""
        return tuple(Stage(name, op) for name, op in self.classes().items())

    def cache_bytes(self) -> Num:
        """Keys and values kept of all sequences of one layer: 2 e d sum of S_h."""
        return sum(op.cache_bytes() for op in self.classes().values())

    def compulsory_bytes(self) -> Num:
        """Those of the classes: they share nothing."""
        return sum(op.compulsory_bytes() for op in self.classes().values())

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k and v of all heads, the local ones first."""
        parts = [op.inputs(rng) for op in self.classes().values()]
        return {n: np.concatenate([part[n] for part in parts], axis=1) for n in parts[0]}

    def _split(self, inputs: Arrays) -> list[Arrays]:
        """The arrays of each class."""
        group, local = int(self.num_heads // self.kv_heads), int(self.local_heads)
        cuts = {"q": local * group, "k": local, "v": local}
        return [
            {n: inputs[n][:, :cut] for n, cut in cuts.items()},
            {n: inputs[n][:, cut:] for n, cut in cuts.items()},
        ]

    def reference(self, inputs: Arrays) -> Arrays:
        """Each class under its own mask."""
        pairs = zip(self.classes().values(), self._split(inputs), strict=True)
        return _joined([op.reference(part) for op, part in pairs])

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The classes' programs in turn."""
        pairs = zip(self.classes().values(), self._split(inputs), strict=True)
        return _joined([op.program(machine, part) for op, part in pairs])


def _joined(parts: list[Arrays]) -> Arrays:
    """Outputs of the classes side by side, along the heads."""
    return {n: np.concatenate([part[n] for part in parts], axis=1) for n in parts[0]}


@dataclass(frozen=True, kw_only=True)
class LayerSpanAttention(ProvedStagedOp):
    """The attention of `num_layers` layers, `num_full_layers` of them full, the rest of a `span`.

    q, k and v[num_layers, batch, heads, len, head_dim], causal, the full layers first (the order
    costs nothing). `sliding`: a window of `span` keys; else blocks of `span` positions that see
    only themselves, where one new token reads the `span` keys of a block that it completes.
    Where inputs are short, one long kernel may beat many short blocks: hence `cheaper`.

    >>> op = LayerSpanAttention(num_layers=24, num_full_layers=4, num_heads=16, len_q=8192,
    ...                         head_dim=128, span=1024)
    >>> round(op.min_flops()[BF16] / (24 * op.full().min_flops()[BF16]), 4)  # 4/24 + 20/24 / 8
    0.2709
    """

    name: ClassVar[str] = "layer_span_attention"
    cheaper: ClassVar[tuple[str, ...]] = ("num_kv_heads", "num_full_layers", "span")
    batch: Num = 1
    num_layers: Num
    num_full_layers: Num = 1
    num_heads: Num
    num_kv_heads: Num | None = None
    len_q: Num
    len_kv: Num | None = None
    head_dim: Num
    span: Num
    sliding: bool = False
    dtype: DType = BF16

    def check(self) -> None:
        """No more full layers than layers, spans within the input, blocks that divide it."""
        self.full()  # refuses heads that do not divide
        if any_true(self.num_full_layers > self.num_layers):
            raise InputError(
                f"{self.name}: num_full_layers = {self.num_full_layers} is more than "
                f"num_layers = {self.num_layers}; give at most all of them"
            )
        if any_true(self.span > self.len_keys):
            raise InputError(
                f"{self.name}: span = {self.span} is longer than the len_kv = {self.len_keys} "
                f"keys there are; shorten it, or take flash_attention_2"
            )
        whole = (self.len_keys == self.len_q) & (self.len_q % self.span == 0)
        if not self.sliding and any_true(np.logical_not(whole | (self.len_q == 1))):
            raise InputError(
                f"{self.name}: blocks of span = {self.span} must divide len_q = {self.len_q}, and "
                f"len_kv be as long; change one of them, or set sliding=true"
            )

    @property
    def len_keys(self) -> Num:
        """`len_kv`, else `len_q`."""
        return self.len_q if self.len_kv is None else self.len_kv

    def full(self) -> FlashAttention2:
        """A full layer."""
        return self._layer(self.batch, self.len_q, self.len_kv, None)

    def local(self) -> FlashAttention2:
        """A layer of short span."""
        if self.sliding:
            return self._layer(self.batch, self.len_q, self.len_kv, self.span)
        if any_true(self.len_q > 1):
            return self._layer(self.batch * (self.len_q // self.span), self.span, None, None)
        return self._layer(self.batch, self.len_q, self.span, None)

    def _layer(
        self, batch: Num, len_q: Num, len_kv: Num | None, window: Num | None
    ) -> FlashAttention2:
        """One kernel; where it decodes, a window over all keys, which is timed as decoding."""
        shape: dict[str, Any] = {
            "batch": batch, "num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads,
            "len_q": len_q, "len_kv": len_kv, "head_dim": self.head_dim, "dtype": self.dtype,
            "causal": True,
        }  # fmt: skip
        if window is None and any_true(len_q > 1):
            return FlashAttention2(**shape)
        keys = len_q if len_kv is None else len_kv
        return WindowedAttention(**shape, window=keys if window is None else window)

    @property
    def num_local_layers(self) -> Num:
        """Layers of short span."""
        return self.num_layers - self.num_full_layers

    def stages(self) -> tuple[Stage, ...]:
        """A kernel a layer."""
        return (
            Stage("full", self.full(), times=self.num_full_layers),
            Stage("local", self.local(), times=self.num_local_layers),
        )

    def cache_bytes(self) -> Num:
        """Keys and values kept of all sequences of all layers: N in full ones, the span in others.

        >>> op = LayerSpanAttention(num_layers=4, num_heads=1, len_q=8, head_dim=1, span=2)
        >>> op.cache_bytes() == 2 * 2 * (8 + 3 * 2)
        True
        """
        rows = self.num_full_layers * self.len_keys + self.num_local_layers * self.span
        per_row = 2 * self.full().kv_heads * self.head_dim * self.dtype.bytes_per_element
        return self.batch * rows * per_row

    def compulsory_bytes(self) -> Num:
        """Those of the layers."""
        full, local = (op.compulsory_bytes() for op in (self.full(), self.local()))
        return self.num_full_layers * full + self.num_local_layers * local

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k and v of every layer."""
        found = [self.full().inputs(rng) for _ in range(int(self.num_layers))]
        return {n: np.stack([one[n] for one in found]) for n in found[0]}

    def mask(self, *, full: bool) -> Values:
        """Which key each query of a layer sees."""
        len_q, len_kv, span = int(self.len_q), int(self.len_keys), int(self.span)
        place, keys = np.arange(len_kv - len_q, len_kv)[:, None], np.arange(len_kv)
        low: Values = place - span + 1
        if not self.sliding and len_q > 1:
            low = place // span * span
        seen: Values = (keys <= place) & ((keys >= low) | full)
        return seen

    def reference(self, inputs: Arrays) -> Arrays:
        """Every layer under its mask."""
        num_full = int(self.num_full_layers)
        found = [
            masked(self.full(), _layer_of(inputs, i), self.mask(full=i < num_full))
            for i in range(int(self.num_layers))
        ]
        return {n: np.stack([one[n] for one in found]) for n in found[0]}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The layers' programs in turn."""
        num_full = int(self.num_full_layers)
        found = [
            self.full().program(machine, _layer_of(inputs, i))
            if i < num_full
            else self._local(machine, _layer_of(inputs, i))
            for i in range(int(self.num_layers))
        ]
        return {n: np.stack([one[n] for one in found]) for n in found[0]}

    def _local(self, machine: Machine, inputs: Arrays) -> Arrays:
        """A layer of short span; blocks are sequences of their own, which is addressing."""
        if self.sliding:
            return self.local().program(machine, inputs)
        span = int(self.span)
        if self.len_q == 1:
            kept = {n: inputs[n][:, :, -span:] for n in ("k", "v")}
            return self.local().program(machine, {**inputs, **kept})
        blocks = {n: split_rows(x, int(self.len_q) // span) for n, x in inputs.items()}
        found = self.local().program(machine, blocks)
        return {n: join_rows(x, int(self.batch)) for n, x in found.items()}


@dataclass(frozen=True, kw_only=True)
class LayerSpanAttentionBackward(LayerSpanAttention):
    """Backward pass of the layers, each from what its forward pass left: o, its logsumexp, and do.

    Spans are blocks; the gradient of a sliding window is not modelled.

    >>> op = LayerSpanAttentionBackward(num_layers=2, num_heads=16, len_q=8192, head_dim=128,
    ...                                 span=1024)
    >>> op.min_flops()[BF16] == 2.5 * LayerSpanAttention.min_flops(
    ...     LayerSpanAttention(num_layers=2, num_heads=16, len_q=8192, head_dim=128, span=1024)
    ... )[BF16]
    True
    """

    name: ClassVar[str] = "layer_span_attention_backward"

    def check(self) -> None:
        """Whole inputs in blocks."""
        super().check()
        if self.sliding or any_true(self.len_keys != self.len_q):
            raise InputError(
                f"{self.name}: gradients are those of whole inputs in blocks; leave sliding and "
                f"len_kv out"
            )

    def _gradient(self, op: FlashAttention2) -> FlashAttention2Backward:
        return FlashAttention2Backward(
            batch=op.batch, num_heads=op.num_heads, num_kv_heads=op.num_kv_heads, len_q=op.len_q,
            head_dim=op.head_dim, causal=True, dtype=op.dtype,
        )  # fmt: skip

    def gradients(self) -> tuple[FlashAttention2Backward, FlashAttention2Backward]:
        """The backward pass of a full layer, and of one of short span."""
        return self._gradient(self.full()), self._gradient(self.local())

    def stages(self) -> tuple[Stage, ...]:
        """Its kernels, layer by layer."""
        full, local = self.gradients()
        return (
            Stage("full", full, times=self.num_full_layers),
            Stage("local", local, times=self.num_local_layers),
        )

    def compulsory_bytes(self) -> Num:
        """Those of the layers."""
        full, local = (op.compulsory_bytes() for op in self.gradients())
        return self.num_full_layers * full + self.num_local_layers * local

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k, v and do at random; o and lse as the forward pass leaves them, of every layer."""
        forward = super().inputs(rng)
        found = super().reference(forward)
        return {**forward, **found, "do": rng.standard_normal(found["o"].shape)}

    def reference(self, inputs: Arrays) -> Arrays:
        """The chain rule on whole matrices, under each layer's mask."""
        num_full = int(self.num_full_layers)
        found = [
            masked_gradient(self.full(), _layer_of(inputs, i), self.mask(full=i < num_full))
            for i in range(int(self.num_layers))
        ]
        return {n: np.stack([one[n] for one in found]) for n in found[0]}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The layers' backward programs in turn; blocks are sequences of their own."""
        full, local = self.gradients()
        blocks, found = int(self.len_q) // int(self.span), []
        for i in range(int(self.num_layers)):
            part = _layer_of(inputs, i)
            if i < int(self.num_full_layers):
                found.append(full.program(machine, part))
                continue
            split = {n: split_rows(x, blocks) for n, x in part.items()}
            one = local.program(machine, split)
            found.append({n: join_rows(x, int(self.batch)) for n, x in one.items()})
        return {n: np.stack([one[n] for one in found]) for n in found[0]}


def _layer_of(inputs: Arrays, number: int) -> Arrays:
    return {n: x[number] for n, x in inputs.items()}
