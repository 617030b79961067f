"""Sequences of unequal lengths: how long they are, and what a group of ranks takes for them.

Lengths are lognormal, cut off at the context limit (longer ones are dropped). Two published
statements fix one: the share of sequences below a length, and the share of tokens above another.

    P(s < x) = Phi((ln x - m) / sigma)
    tokens above t, of those up to the limit M:  1 - F(t) / F(M),  F(x) = Phi((ln x - m - sigma^2)
                                                                                       / sigma)

A group of d ranks holding sequences s_k takes, forward and backward (FlexSP, arXiv 2412.01523,
equations 8 to 12; Ulysses: tokens are split between the ranks, heads during attention)

    T = 1 / d sum_k (square s_k^2 + token s_k) + fixed + exchange_d sum_k s_k

    square    FlashAttention-2 forward and backward of all layers, causal, at `LEN_ATTENTION`
    token     all other kernels of all layers and both ends, at `ROWS` tokens
    fixed     per micro-batch, whatever is in it: ZeRO-3's two gathers of the weights and its
              reduction of the gradients, over all ranks
    exchange  four all-to-alls a layer forward (Q, K, V, O) and four backward; the calibrated time
              inside a node, outside the bound over `ALL_TO_ALL_NET_FRAC`

and every rank holds 1 / d of its tokens' activations beside its share of the states. Where the
longest sequence does not fit all ranks together, a share of the layers is recomputed: the least
that lets it.

Ignored: the optimizer (once a step, the same for every plan), launch gaps, changes of kernel
efficiency with the degree and with the mix of lengths in a pack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from hwmodels.cluster import Cluster
from hwmodels.dtypes import BF16
from hwmodels.errors import InfeasibleError, InputError
from hwmodels.frozen import FrozenDict
from simulator.kernel_time.model import Conditions
from simulator.kernel_time.predict import predict
from simulator.network import bound_seconds, calibrated_seconds
from simulator.pieces import is_attention
from workloads.models.activations import ends_bytes, layer_bytes
from workloads.models.config import TransformerConfig
from workloads.models.mixers import no_context
from workloads.models.parameters import count_parameters
from workloads.models.transformer import train_step
from workloads.ops.collective import Collective
from workloads.plan import Plan, Recompute
from workloads.workload import FORWARD, Node

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ROWS: Final = 8192
"""Tokens of a rank at which the kernels that are linear in tokens are timed."""
LEN_ATTENTION: Final = 32768
"""Length at which attention is timed."""
KERNEL: Final = "figure:fa2"
"""Attention as FlashAttention-2's library runs it: what both systems build on."""
STATE_BYTES: Final = 16
"""Bytes of state per parameter: 16-bit weight and gradient, FP32 weight and two moments."""
ALL_TO_ALL_NET_FRAC: Final = 0.74
"""Share of the network port that an all-to-all between nodes reaches: mean of 10.33 / 12.5,
5.94 / 8.33 and 4.87 / 7.14, profiled over wire rate in GB/s for 16, 32 and 64 A100 on 400 Gbit/s a
node (table '4k seq, 2 IB' of FlexSP's solver, PKU-DAIR/Hetu-Galvatron, branch flexsp)."""


# ---- lengths -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthDistribution:
    """Lognormal lengths: `median` tokens, `sigma` of their logarithm, and where both come from.

    `tail`: (length, share of the tokens in sequences at least as long), ascending; from the first
    length on these hold instead of the lognormal, tokens evenly over the logarithm of the length
    from one to the next, and the last share in sequences of that very length.
    """

    name: str
    median: float
    sigma: float
    source: str
    tail: tuple[tuple[float, float], ...] = ()

    def below_frac(self, length: float) -> float:
        """Share of the sequences of the lognormal shorter than `length`.

        >>> lengths("wikipedia").below_frac(8192)
        0.96
        """
        return round(float(ndtr(math.log(length / self.median) / self.sigma)), 12)

    def tokens_above_frac(self, length: float, *, limit: float) -> float:
        """Share of the tokens in sequences longer than `length`, of those up to `limit`.

        >>> round(lengths("github").tokens_above_frac(2**18, limit=2**21), 3)
        0.098
        """
        return _tokens_above(math.log(self.median), self.sigma, length, limit)

    def sample(self, num: int, *, limit: int, seed: int, multiple: int = 1) -> Ints:
        """`num` lengths up to `limit`, rounded up to a multiple: the same for the same seed."""
        if num < 1 or multiple < 1 or limit < multiple:
            raise InputError(
                f"{num} sequences up to {limit} tokens in multiples of {multiple}: give at least "
                "one sequence and a limit of at least one multiple"
            )
        rng = np.random.default_rng(seed)
        most = limit // multiple * multiple
        drawn = self._body(rng, num, min(most, self.tail[0][0] if self.tail else most))
        if self.tail:
            drawn = self._with_tail(rng, drawn, most)
        padded = np.ceil(np.maximum(drawn, 1.0) / multiple).astype(np.int64) * multiple
        held: Ints = np.minimum(padded, limit // multiple * multiple)
        return held

    def _body(self, rng: np.random.Generator, num: int, most: float) -> Floats:
        """Lengths of the lognormal up to `most`."""
        top = ndtr(math.log(most / self.median) / self.sigma)
        quantiles = ndtri(rng.uniform(0.0, top, num))
        return np.asarray(np.exp(math.log(self.median) + self.sigma * quantiles))

    def _with_tail(self, rng: np.random.Generator, body: Floats, most: float) -> Floats:
        """Some of the body's lengths replaced by ones of the tail, none beyond `most`.

        A share of the tokens spread over ln(length) from a to b is share (1/a - 1/b) / ln(b/a) of
        the sequences for one token of all, with a density of 1 / length squared.
        """
        start = self.tail[0][0]
        z = math.log(start / self.median) / self.sigma
        mean = math.exp(math.log(self.median) + self.sigma**2 / 2) * ndtr(z - self.sigma) / ndtr(z)
        weights = [(1 - self.tail[0][1]) / mean]
        ends = [*self.tail[1:], (self.tail[-1][0], 0.0)]
        spans = [(a, b, share - beyond)
                 for (a, share), (b, beyond) in zip(self.tail, ends, strict=True)]  # fmt: skip
        for a, b, share in spans:
            inside = (1 / a - 1 / min(b, most)) / math.log(b / a) if a < b else 1 / a
            weights.append(share * inside if a < most or a == b == most else 0.0)
        chosen = rng.choice(len(weights), size=len(body), p=np.array(weights) / sum(weights))
        drawn = body.copy()
        for k, (a, b, _) in enumerate(spans, 1):
            here = np.flatnonzero(chosen == k)
            drawn[here] = 1 / (1 / a - rng.uniform(size=len(here)) * (1 / a - 1 / min(b, most)))
        return drawn


def _tokens_above(log_median: float, sigma: float, length: float, limit: float) -> float:
    low, high = (
        ndtr((math.log(x) - log_median) / sigma - sigma) for x in (min(length, limit), limit)
    )
    return float(1 - low / high)


def from_shares(
    name: str,
    *,
    below: tuple[float, float],
    tokens_above: tuple[float, float],
    limit: float,
    source: str,
) -> LengthDistribution:
    """The lognormal of which `below` = (length, share of sequences) and `tokens_above` = (length,
    share of the tokens of sequences up to `limit`) hold.
    """
    from scipy.optimize import brentq  # heavy: on demand

    (length, frac), (long, token_frac) = below, tokens_above
    if not (0 < frac < 1 and 0 < token_frac < 1 and 0 < length < long < limit):
        raise InputError(
            f"{name}: shares of {frac} below {length} and of {token_frac} above {long} up to "
            f"{limit}; give shares inside (0, 1) and increasing lengths"
        )
    z = float(ndtri(frac))

    def excess(sigma: float) -> float:
        return _tokens_above(math.log(length) - z * sigma, sigma, long, limit) - token_frac

    if excess(MOST_SIGMA) < 0 or excess(LEAST_SIGMA) > 0:
        raise InputError(f"{name}: no lognormal has {token_frac:.1%} of its tokens above {long:g}")
    sigma = float(brentq(excess, LEAST_SIGMA, MOST_SIGMA))
    median = math.exp(math.log(length) - z * sigma)
    return LengthDistribution(name=name, median=median, sigma=sigma, source=source)


LEAST_SIGMA, MOST_SIGMA = 0.2, 4.0
"""Spread of ln(length) that is looked for: from nearly equal lengths to a factor 55 per sigma."""
SHORT: Final = (4096.0, 0.80)
"""Nearly 80 % of Byted's samples have 4K tokens or fewer (ByteScale, section 3.1); GitHub's are
taken to be alike."""
LONG: Final = 2.0**18
MOST: Final = 2.0**21
ABOVE_LONG: Final[Mapping[str, float]] = FrozenDict(github=0.098, byted=0.37)
"""Tokens of ByteScale's corpora in sequences above 256K (section 8.2). GitHub's lognormal has 18 %
above 128K, where section 3.1 says 16.2 %."""
BYTED_TAIL: Final = ((2.0**17, 0.443), (LONG, 0.37), (MOST, 0.121))
"""Tokens of Byted in sequences of 128K or more, of 256K or more, and of 2M, where they end."""


@lru_cache(maxsize=16)
def lengths(name: str) -> LengthDistribution:
    """A named corpus: 'github', 'byted', 'wikipedia' or 'common_crawl'.

    GitHub and Byted rest on two statements each. Of Wikipedia one is known; it shares GitHub's
    sigma (an assumption: 1,780 tokens on average, within 6 % for every sigma of 1.4 to 2.1). Of
    Common Crawl none is; it lies half-way between (an assumption).
    """
    if name in ABOVE_LONG:
        source = "ByteScale (arXiv 2502.21231, sections 3.1 and 8.2): 80 % below 4K, "
        source += f"{ABOVE_LONG[name]:.1%} of tokens above 256K"
        body = from_shares(
            name, below=SHORT, tokens_above=(LONG, ABOVE_LONG[name]), limit=MOST, source=source
        )
        return replace(body, tail=BYTED_TAIL) if name == "byted" else body
    github = lengths("github") if name in ("wikipedia", "common_crawl") else None
    if github is None:
        raise InputError(f"no corpus '{name}'; known: byted, common_crawl, github, wikipedia")
    if name == "wikipedia":
        median = math.exp(math.log(8192) - float(ndtri(0.96)) * github.sigma)
        source = "FlexSP (arXiv 2412.01523), figure 2: 96 % below 8K; sigma as GitHub's (assumed)"
    else:
        median = math.sqrt(lengths("wikipedia").median * github.median)
        source = "assumed: between GitHub and Wikipedia"
    return LengthDistribution(name=name, median=median, sigma=github.sigma, source=source)


# ---- cost --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCost:
    """Coefficients of the cost above. `exchange_s` maps each degree that a group may have to the
    seconds that one token adds to its group's all-to-alls; `rank_tokens` fit beside the states.
    """

    square_s: float
    token_s: float
    fixed_s: float
    exchange_s: Mapping[int, float]
    rank_tokens: float
    recomputed_frac: float = 0.0

    def __post_init__(self) -> None:
        if not self.exchange_s or min(self.exchange_s) < 1 or self.rank_tokens <= 0:
            raise InputError("a group needs degrees of at least 1 and room for tokens on a rank")

    @property
    def degrees(self) -> tuple[int, ...]:
        """Sizes a group may have, ascending."""
        return tuple(sorted(self.exchange_s))

    def capacity_tokens(self, degree: int) -> float:
        """Tokens that a group of that size holds."""
        return degree * self.rank_tokens

    def weight_s(self, length: Floats | Ints | float, degree: int) -> Floats:
        """Seconds that sequences add to a group of that size, one each."""
        s = np.asarray(length, dtype=np.float64)
        compute = (self.square_s * s + self.token_s) * s / degree
        return np.asarray(compute + self.exchange_s[degree] * s)

    def group_s(self, held: Floats | Ints, degree: int) -> float:
        """Seconds of one group that holds these sequences."""
        return float(np.sum(self.weight_s(held, degree))) + self.fixed_s

    def least_degree(self, length: float) -> int:
        """The smallest group that one sequence fits."""
        for degree in self.degrees:
            if length <= self.capacity_tokens(degree):
                return degree
        raise InfeasibleError(
            f"a sequence of {length:g} tokens does not fit {self.degrees[-1]} ranks of "
            f"{self.rank_tokens:.0f} tokens each"
        )


def predicted_cost(
    cfg: TransformerConfig, *, on: Cluster, len_max: int, hbm_frac: float = 0.92
) -> GroupCost:
    """The coefficients for a model on all accelerators of `on`, from the kernels' predictions.

    `len_max` is the longest sequence that must fit; `hbm_frac` the share of memory that is used.
    """
    num_ranks = on.num_accelerators
    recomputed, rank_tokens = memory_of_rank(
        cfg, num_ranks=num_ranks, len_max=len_max, room=hbm_frac * on.device.hbm.capacity_bytes
    )
    token_s, square_s = _kernel_seconds(cfg, on, recomputed)
    degrees = [2**i for i in range(int(math.log2(num_ranks)) + 1)]
    exchange = {d: _all_to_all_s(cfg, on, d, recomputed) for d in degrees}
    return GroupCost(
        square_s=square_s,
        token_s=token_s,
        fixed_s=weights_exchange_s(cfg, on),
        exchange_s=FrozenDict(exchange),
        rank_tokens=rank_tokens,
        recomputed_frac=recomputed,
    )


def memory_of_rank(
    cfg: TransformerConfig, *, num_ranks: int, len_max: int, room: float
) -> tuple[float, float]:
    """Share of the layers that is recomputed, and tokens a rank has room for.

    Per token and layer `layer_bytes` are kept, or the layer's input alone and, once, the whole of
    the layer that is being recomputed; the states are spread over all ranks (ZeRO-3).
    """
    kind = next(iter(cfg.kinds))
    whole, least = (
        float(layer_bytes(cfg, kind=kind, batch=1, len_seq=1, dropout=True, plan=Plan(recompute=r)))
        for r in (Recompute.NONE, Recompute.FULL)
    )
    edges = ends_bytes(cfg, batch=1, len_seq=1, dropout=True)
    ends, layers = float(edges.embedding + edges.head), cfg.num_layers
    left = room - STATE_BYTES * float(count_parameters(cfg).total) / num_ranks
    needed = left / (len_max / num_ranks)
    if layers * whole + ends <= needed:
        return 0.0, left / (layers * whole + ends)
    frac = (layers * whole + ends + whole - needed) / (layers * (whole - least))
    if frac > 1:
        raise InfeasibleError(
            f"{len_max} tokens of {cfg.name} do not fit {num_ranks} ranks with every layer "
            "recomputed; use more ranks or a shorter limit"
        )
    per_token = layers * (whole - frac * (whole - least)) + ends + whole
    return frac, left / per_token


def _kernel_seconds(cfg: TransformerConfig, on: Cluster, recomputed: float) -> tuple[float, float]:
    """Seconds per token, and of attention per squared length; forward passes run again."""
    if cfg.mixer is not None:
        raise InputError(no_context(cfg.name, cfg.mixer))
    token_s = square_s = 0.0
    for len_seq, attention in ((ROWS, False), (LEN_ATTENTION, True)):
        step = train_step(cfg, len_seq=len_seq, global_batch=1)
        total = 0.0
        for kind, layers in cfg.kinds.items():
            nodes = step.layer(kind, Plan(), dtype=BF16)
            total += layers * sum(
                _seconds(node, on) * (1 + (recomputed if node.phase == FORWARD else 0.0))
                for node in nodes
                if is_attention(node) == attention
            )
        if attention:
            square_s = total / len_seq**2
        else:
            ends = sum(_seconds(node, on) for node in step.ends(Plan(), dtype=BF16))
            token_s = (total + ends) / len_seq
    return token_s, square_s


def _seconds(node: Node, on: Cluster) -> float:
    run = Conditions(kernel=KERNEL if is_attention(node) else "")
    return float(node.count) * float(predict(node.op, on=on.device, conditions=run).seconds)


def _all_to_all_s(cfg: TransformerConfig, on: Cluster, degree: int, recomputed: float) -> float:
    """Seconds per token of its group: Q, K, V and O of every layer, forward and backward."""
    if degree == 1:
        return 0.0
    buffers = 4.0 * cfg.num_layers * (2 + recomputed)
    num_bytes = ROWS * cfg.hidden_dim * BF16.bytes_per_element
    op = Collective(kind="all_to_all", num_bytes=num_bytes, num_ranks=degree)
    if degree <= on.levels[0].size:
        once = float(calibrated_seconds(op, on=on))
    else:
        once = float(bound_seconds(op, on=on)) / ALL_TO_ALL_NET_FRAC
    return buffers * once / (ROWS * degree)


def weights_exchange_s(cfg: TransformerConfig, on: Cluster) -> float:
    """ZeRO-3 in one micro-batch: weights gathered forward and backward, gradients reduced."""
    num_bytes = float(count_parameters(cfg).total) * BF16.bytes_per_element
    return sum(
        float(bound_seconds(
            Collective(kind=kind, num_bytes=num_bytes, num_ranks=on.num_accelerators), on=on
        ))
        for kind in ("all_gather", "all_gather", "reduce_scatter")
    )  # fmt: skip


def kernel_seconds(
    cfg: TransformerConfig, *, on: Cluster, recomputed_frac: float = 0.0
) -> tuple[float, float]:
    """`token` and `square` of the cost above, for one rank that has the whole model."""
    return _kernel_seconds(cfg, on, recomputed_frac)
