"""The routed experts' feed-forward on one rank: permutation, two grouped products, finalisation.

Each of `num_tokens` tokens chooses `topk` of `num_experts` experts; `ep` ranks hold equal parts of
the experts and `tp` ranks share each expert's inner width. The rank counted is the loaded one.
With h = hidden, i = inter / tp, L = num_experts / ep local experts, R the rows routed to the rank:

    flops   2 R h (2 i + i) gated, 2 R h (i + i) not gated
    weights (experts hit) h (3 or 2) i elements, each read once
    bytes   weights + input of the tokens with a local choice + as many output rows

Routing 'balanced' spreads choices as evenly as whole numbers allow: R = num_tokens topk / ep, at
most one expert more or less than another. 'balanced_grouped' is the same for a router that opens
half of its groups of experts only (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): the choices in
closed groups tie, and every token makes them at the first experts, which are on this rank.
Routing 'power_law_A' draws every expert's load
independently from the density x^-A on [1, M], M = 0.8 num_tokens (at least 30), and scales the sum
to num_tokens topk. The loaded rank's rows are then the expected maximum over ep sums of L draws:

    R = (num_tokens topk / ep) g,   g = (1 - 1 / (9 s) + z / (3 sqrt(s)))^3,   s = L / cv^2

the quantile of a gamma distribution with the coefficient of variation of the sum (Wilson and
Hilferty 1931) at z = sqrt(2 ln(1 + 0.22 (ep - 1))), the mean of the largest of ep standard normal
draws within 6 % from ep = 4; cv is that of one draw. No load exceeds num_tokens. The rule is
that of the benchmark aiconfigurator (its collector's `_generate_power_law_distribution`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, TypeAlias

import numpy as np

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError
from workloads.numeric import Array, Num, any_true
from workloads.op import Op, checked_size
from workloads.work import Work

BALANCED, GROUPED = "balanced", "balanced_grouped"
SKIPPED, PASSED, COMPUTED = "skipped", "passed", "computed"
CLASSES: Final = 8
"""Quantiles of the load of an expert that stand for all experts of a rank."""
LEAST_RANGE: Final = 30.0
"""Least ratio of the largest load to the smallest that a power law may draw."""
Ways: TypeAlias = Num
"""Ranks that share something: more of them, less work for each. Checked by the op itself."""
_POWER_LAW: Final = re.compile(r"power_law_(\d+(?:\.\d+)?)")


@dataclass(frozen=True, slots=True)
class Loads:
    """Experts of one rank by class of load; the arrays have one more axis than the sizes.

    `experts`: how many experts a class stands for; `rows`: mean rows of each; `hit_frac`: share
    of them that get any row.
    """

    experts: Array
    rows: Array
    hit_frac: Array


@dataclass(frozen=True, kw_only=True)
class MoeFfn(Op):
    """Routed experts of one rank of an expert-parallel group; sizes before division by tp and ep.

    `remote` is what becomes of a choice of an expert on another rank: 'skipped': nothing here;
    'passed': its row goes through activation and sum, but no product; 'computed': through the
    rank's first expert (so do one-rank benchmarks of kernels that cannot skip). `packed`: the
    rank's choices come from as few tokens as can hold them, at least one. `scaling` is the
    granularity of the scales of quantised formats, 'tensor' or 'block'.

    >>> op = MoeFfn(num_tokens=4096, hidden=4096, inter=14336, topk=2, num_experts=8)
    >>> op.work(0).tensor_flops[BF16] == 6 * 4096 * 2 * 4096 * 14336
    True
    """

    name: ClassVar[str] = "moe_ffn"
    num_tokens: Num
    hidden: Num
    inter: Num
    topk: Num
    num_experts: Num
    tp: Ways = 1
    ep: Ways = 1
    dtype: DType = BF16
    weight_dtype: DType | None = None
    gated: bool = True
    routing: str = BALANCED
    scaling: str = "tensor"
    remote: str = SKIPPED
    packed: bool = False

    def check(self) -> None:
        """Refuse more choices or ranks than experts, and words that mean nothing here."""
        for name in ("tp", "ep"):
            object.__setattr__(self, name, checked_size(self.name, name, getattr(self, name)))
        if any_true(np.greater(self.topk, self.num_experts)):
            raise InputError(f"{self.name}: topk exceeds num_experts, of which a token takes topk")
        if any_true(np.greater(self.ep, self.num_experts)):
            raise InputError(f"{self.name}: ep exceeds num_experts; a rank needs an expert")
        if self.remote not in (SKIPPED, PASSED, COMPUTED):
            raise InputError(
                f"{self.name}: remote {self.remote!r} is not {SKIPPED}, {PASSED} or {COMPUTED}"
            )
        if self.scaling not in ("tensor", "block"):
            raise InputError(f"{self.name}: scaling {self.scaling!r} is not 'tensor' or 'block'")
        if self.exponent is not None and not 0 < self.exponent < 2:
            raise InputError(f"{self.name}: the power of {self.routing!r} must be between 0 and 2")

    @property
    def exponent(self) -> float | None:
        """The power of the routing's law; None where it is balanced."""
        if self.routing in (BALANCED, GROUPED):
            return None
        found = _POWER_LAW.fullmatch(self.routing)
        if found is None:
            raise InputError(
                f"{self.name}: routing {self.routing!r} is neither '{BALANCED}' nor 'power_law_A'"
            )
        return float(found[1])

    @property
    def stored_dtype(self) -> DType:
        """Format of the weights in memory: `weight_dtype`, else the activations' format."""
        return self.weight_dtype or self.dtype

    @property
    def local_experts(self) -> Num:
        """Experts that the rank holds."""
        return self.num_experts / self.ep

    @property
    def local_inter(self) -> Num:
        """Inner width that the rank computes."""
        return self.inter / self.tp

    @property
    def expert_elements(self) -> Num:
        """Weights of one expert on the rank."""
        return (3 if self.gated else 2) * self.hidden * self.local_inter

    def imbalance(self) -> Num:
        """Rows of the loaded rank over the mean rank's.

        >>> MoeFfn(num_tokens=64, hidden=8, inter=8, topk=2, num_experts=8, ep=4).imbalance()
        1.0
        """
        if self.exponent is None:
            return 1.0
        top, cv = _spread(self.exponent, self._range())
        z = np.sqrt(2 * np.log(1 + 0.22 * (self.ep - 1)))
        shape = self.local_experts / cv**2
        gamma = (1 - 1 / (9 * shape) + z / (3 * np.sqrt(shape))) ** 3
        limit = np.minimum(top, np.minimum(self.topk, self.local_experts) * self.ep / self.topk)
        found: Num = np.clip(gamma, 1.0, np.maximum(limit, 1.0))
        return found

    def _range(self) -> Num:
        return np.maximum(0.8 * self.num_tokens, LEAST_RANGE)

    def routed_rows(self) -> Num:
        """Rows routed to the rank: one per token and choice of a local expert."""
        if self.routing == GROUPED:
            hot, others = self._grouped()
            return self.num_tokens * (hot + others * self.topk / self.num_experts)
        rows = self.num_tokens * self.topk / self.ep * self.imbalance()
        return np.maximum(rows, self._width()) if self.packed else rows

    def _grouped(self) -> tuple[Num, Num]:
        """Experts that every token chooses, and those of its groups beside them, on the rank."""
        hot = np.minimum(np.floor(self.topk / 2), self.local_experts)
        return hot, np.maximum(np.minimum(self.local_experts, self.num_experts / 2) - hot, 0.0)

    def _width(self) -> Num:
        return np.minimum(self.topk, self.local_experts)

    def local_tokens(self) -> Num:
        """Tokens with a local choice.

        Balanced choices of a token lie far apart, so as few as possible meet on one rank; under a
        power law each local expert is chosen by its share of the tokens, independently.
        """
        rows = self.routed_rows()
        if self.packed:
            return rows / self._width()
        if self.exponent is None:
            return np.minimum(rows, self.num_tokens)
        tokens = np.asarray(self.num_tokens, dtype=np.float64)[..., None]
        loads = self._spread_loads()
        missed = (1 - loads.rows / tokens) ** loads.experts
        found = np.minimum(self.num_tokens * (1 - missed.prod(axis=-1)), rows)
        return float(found) if np.ndim(found) == 0 else found

    def remote_rows(self) -> Num:
        """Rows of remote choices that run on the rank all the same."""
        if self.remote != COMPUTED:
            return 0.0
        return np.maximum(self.local_tokens() * self.topk - self.routed_rows(), 0.0)

    def computed_rows(self) -> Num:
        """Rows that go through the rank's experts."""
        return self.routed_rows() + self.remote_rows()

    def passed_rows(self) -> Num:
        """Rows that go through what stands around the products."""
        if self.remote == PASSED:
            return self.num_tokens * self.topk
        return self.computed_rows()

    def loads(self) -> Loads:
        """The rank's experts by load, and the remote rows as one more expert that holds them."""
        spread = self._spread_loads()
        if self.remote != COMPUTED:
            return spread
        shape = spread.rows.shape[:-1]
        remote = np.broadcast_to(np.asarray(self.remote_rows())[..., None], (*shape, 1))
        return Loads(
            np.concatenate([spread.experts, np.ones_like(remote)], -1),
            np.concatenate([spread.rows, remote], -1),
            np.concatenate([spread.hit_frac, np.zeros_like(remote)], -1),
        )

    def _spread_loads(self) -> Loads:
        """The rank's own experts by class of load."""
        if self.routing == GROUPED:
            return self._grouped_loads()
        mean = np.asarray(self.routed_rows() / self.local_experts, dtype=np.float64)[..., None]
        held = np.asarray(self.local_experts, dtype=np.float64)[..., None]
        rows = mean * self._profile(held)
        rows = np.minimum(rows, np.asarray(self.num_tokens, dtype=np.float64)[..., None])
        experts = np.broadcast_to(held / rows.shape[-1], rows.shape)
        if self.exponent is None:
            hits = np.minimum(held, np.ceil(np.asarray(self.routed_rows())[..., None]))
            hit_frac = hits / held
        else:
            hit_frac = np.minimum(rows, 1.0)
        return Loads(experts, rows, np.broadcast_to(hit_frac, rows.shape))

    def _grouped_loads(self) -> Loads:
        hot, others = self._grouped()
        each = self.num_tokens * self.topk / self.num_experts
        experts, rows = (
            np.stack(np.broadcast_arrays(*pair, self.num_tokens)[:2], -1).astype(np.float64)
            for pair in ((hot, others), (self.num_tokens, each))
        )
        return Loads(experts, rows, np.minimum(rows, 1.0))

    def _profile(self, held: Array) -> Array:
        """Load of each class over the mean: the law's quantiles, flatter where experts are few."""
        if self.exponent is None:
            return np.ones_like(held)
        middle = (np.arange(CLASSES) + 0.5) / CLASSES
        span = np.asarray(self._range(), dtype=np.float64)[..., None]
        draws = _quantile(self.exponent, span, middle) ** (1 - 1 / np.maximum(held, 1.0))
        profile: Array = draws / draws.mean(axis=-1, keepdims=True)
        return profile

    def experts_hit(self) -> Num:
        """Expected local experts with at least one row.

        >>> MoeFfn(num_tokens=2, hidden=8, inter=8, topk=8, num_experts=256, ep=4).experts_hit()
        4.0
        """
        loads = self.loads()
        total = (loads.experts * loads.hit_frac).sum(axis=-1)
        return float(total) if total.ndim == 0 else total

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """No tiling is chosen here: the counts are those of weights and rows passing once."""
        return {}

    def work(self, fast_bytes: Num) -> Work:
        """The products; weights, inputs and outputs once. Inner rows are taken to stay on chip."""
        rows, inner = self.computed_rows(), self.local_inter
        out = self.local_tokens() * self.hidden * BF16.bytes_per_element
        return Work(
            tensor_flops={self.dtype: 2 * rows * self.expert_elements},
            vector_flops=rows * (inner * (2 if self.gated else 1) + self.hidden),
            special_ops=rows * inner * (2 if self.gated else 0),
            read_bytes=self.compulsory_bytes() - out,
            write_bytes=out,
            launches=2,
        )

    def weight_bytes(self) -> Num:
        """Weights of the experts hit."""
        return self.experts_hit() * self.expert_elements * self.stored_dtype.bytes_per_element

    def compulsory_bytes(self) -> Num:
        """Weights of the experts hit; 16-bit rows in and out of tokens with a local choice."""
        return self.weight_bytes() + 2 * self.local_tokens() * self.hidden * BF16.bytes_per_element


def _moment(power: float, order: int, top: Num) -> Num:
    """Integral of x^(order - power) over [1, top]."""
    rise = order + 1 - power
    return np.log(top) if abs(rise) < 1e-9 else (top**rise - 1) / rise


def _spread(power: float, top: Num) -> tuple[Num, Num]:
    """Largest draw over the mean draw, and the coefficient of variation of one."""
    total, first, second = (_moment(power, order, top) for order in (0, 1, 2))
    mean = first / total
    return top / mean, np.sqrt(second / total / mean**2 - 1)


def _quantile(power: float, top: Array, share: Array) -> Array:
    """Inverse distribution function of the density x^-power on [1, top]."""
    if math.isclose(power, 1.0):
        return top**share
    return ((top ** (1 - power) - 1) * share + 1) ** (1 / (1 - power))
