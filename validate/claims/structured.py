"""Claims on cascades of Einsums and on attention with a structure.

A formula is confirmed where counts of the system's op follow it: counts over formula stay the
same within 2 % while each size grows, or, where a class is all that is said, counts are
a f(L) + b L with a > 0 (two lengths fix a and b, the others must follow). The answer is then the
formula of the setting; else a text that says what was found.

FuseMax's speedups are over FLAT on an accelerator of the same area, which no device of the
catalogue is; FLAT's own mapping, which the ratio needs, no setting fixes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np

from validate.claims.claim import EXACT_TOLERANCE, Claim, Value, not_modelled
from validate.claims.formula import formula_value
from workloads import registry
from workloads.einsum_cascade import ONE_PASS, THREE_PASS, TWO_PASS, passes
from workloads.numeric import Num
from workloads.op import Op
from workloads.ops.combiner import PATTERNS, Combiner
from workloads.ops.fit_attention import FitAttention
from workloads.ops.fusemax import EINSUM_CYCLES, FuseMax
from workloads.ops.routed_attention import RoutedAttention
from workloads.ops.seqboat import SeqBoat

ARRAY_ROWS: Final = 256
"""Rows of FuseMax's array, where a setting names none (the authors' artifact)."""
LONG: Final = 2**20
"""What 'long' stands for in a setting."""
HEAD_DIM: Final = 64
CASCADES: Final = {"naive": THREE_PASS, "two_pass": TWO_PASS, "flash2": ONE_PASS}
"""Cascades by the names that settings give them."""

Sizes = Mapping[str, float]


# ---- formulas ------------------------------------------------------------------------------


def printed(claim: Claim) -> str:
    """The formula of the setting."""
    return str(claim.need("formula")[0])


def classes(text: str) -> list[str]:
    """The classes O(...) that a text names, without the O.

    >>> classes("O(L log L) or O(L^(4/3))")
    ['L log L', 'L^(4/3)']
    """
    found = re.findall(r"O\(((?:[^()]|\([^()]*\))*)\)", text)
    if not found:
        not_modelled(f"setting unclear: '{text}' names no class")
    return found


def formula_at(text: str, sizes: Sizes) -> float:
    """A formula with roots and binary logarithms of single sizes.

    >>> formula_at("L log L", {"L": 8}), formula_at("L sqrt(L)", {"L": 16})
    (24.0, 64.0)
    """
    known, plain = dict(sizes), text
    for word, letter, function in (("log", "G", np.log2), ("sqrt", "S", np.sqrt)):
        for name in re.findall(rf"{word} ?\(?([A-Za-z])\b\)?", text):
            known[letter] = float(function(sizes.get(name, np.nan)))
        plain = re.sub(rf"{word} ?(?:\([A-Za-z]\)|[A-Za-z]\b)", letter, plain)
    return formula_value(plain, known)


def follows(text: str, count: Callable[[Sizes], float], points: Sequence[Sizes]) -> bool:
    """Whether counts are proportional to the formula over these sizes.

    >>> follows("n^2 d", lambda at: 4 * at["n"] ** 2 * at["d"], grown({"n": 8, "d": 4}))
    True
    """
    ratios = [count(at) / formula_at(text, at) for at in points]
    return max(ratios) / min(ratios) - 1 <= EXACT_TOLERANCE


def grown(base: Sizes) -> list[Sizes]:
    """The sizes, and each of them twice and four times as large."""
    return [base, *({**base, name: base[name] * f} for name in base for f in (2, 4))]


def grows_as(text: str, count: Callable[[int], float], lengths: Sequence[int]) -> bool:
    """Whether counts at those lengths are a f(L) + b L with a > 0.

    >>> grows_as("L sqrt L", lambda n: 3 * n**1.5 + 5 * n, [2**10, 2**12, 2**14])
    True
    >>> grows_as("L log L", lambda n: 3 * n**1.5, [2**10, 2**12, 2**14])
    False
    """
    table = np.array([[formula_at(text, {"L": n}), n] for n in lengths])
    counted = np.array([count(n) for n in lengths])
    ends = [0, -1]
    factors = np.linalg.solve(table[ends], counted[ends])
    near = np.allclose(table @ factors, counted, rtol=EXACT_TOLERANCE)
    return bool(factors[0] > 0 and near)


def flops_of(op: Op, *stages: str) -> float:
    """Matrix flops of the op, or of the stages whose names begin so."""
    if not stages:
        return float(sum(op.min_flops().values()))
    chosen = [s for s in op.stages() if s.name.startswith(stages)]
    return float(sum(s.times * sum(s.op.min_flops().values()) for s in chosen))


# ---- FuseMax -------------------------------------------------------------------------------


def evaluate_fusemax(claim: Claim) -> Value:
    """Passes from the cascades, steps of the Einsums, and how busy the array is."""
    quantity = claim.quantity.casefold()
    if "passes" in quantity:
        named = [c for name, c in CASCADES.items() if name in claim.setting]
        counted = [float(passes(c)) for c in named or CASCADES.values()]
        return min(counted), max(counted)
    if "op costs" in quantity:
        steps = [sum(cycles) for cycles in EINSUM_CYCLES.values()]
        return float(min(steps)), float(max(steps))
    if "utilisation" in quantity:
        seq = claim.setting.get("seq", "long")
        length = int(seq) if isinstance(seq, (int, float)) else LONG
        rows = int(claim.setting.get("PE_dim", ARRAY_ROWS))
        width = int(claim.setting.get("head_dim", HEAD_DIM))
        return float(FuseMax(num_heads=1, len_q=length, head_dim=width).array_frac(rows))
    not_modelled("a speedup over FLAT on an accelerator that no device of the catalogue is")


# ---- selection by chunks -------------------------------------------------------------------

LONGHEADS: Final[Mapping[str, int]] = {"N": 2**14, "k": 16, "l": 256, "d": 128}
"""The paper's chunks and their number; a 7B model's head."""


def evaluate_longheads(claim: Claim) -> Value:
    """O(N k l d) of attending to k chunks of l keys a query and head.

    Scoring the N / l representatives of each query is besides: N^2 d / l, under 2 % of the whole
    at the paper's sizes up to N = 32K.
    """
    text = printed(claim)

    def attend(at: Sizes, *stages: str) -> float:
        op = registry.build("longheads", _longheads(at))
        return flops_of(op, *(stages or ("attend",)))

    (inner,) = classes(text)
    whole = {**LONGHEADS, "N": 2**15}
    beside = attend(whole, "score") / attend(whole)
    if follows(inner, attend, grown(LONGHEADS)) and beside <= EXACT_TOLERANCE:
        return text
    return f"attention does not grow as {inner}"


def _longheads(at: Sizes) -> dict[str, Any]:
    """Every token a query over its own list, none local."""
    return {
        "num_heads": 1, "len_q": at["N"], "len_kv": at["N"], "head_dim": at["d"],
        "block_k": at["l"], "len_selected": at["k"] * at["l"], "len_local": None,
    }  # fmt: skip


def evaluate_infllm(claim: Claim) -> Value:
    """Both claims lack what fixes a figure: a length tried, savings without device and budget."""
    if "length" in claim.quantity:
        not_modelled("a length that was tried, not one that anything bounds")
    not_modelled("setting incomplete: no gpu, batch or budget")


# ---- formulas of structures ----------------------------------------------------------------


def evaluate_routing_transformer(claim: Claim) -> Value:
    """n k d of scores and n^2 d / k of attention, and the k at which their sum is least.

    The least is looked for among the divisors of a length with many of them.
    """
    if "formula" not in claim.setting:
        not_modelled("the claim states a setting and no figure")
    text = printed(claim)
    cost, *rest = (part.strip() for part in text.split(","))

    def flops(at: Sizes) -> float:
        return flops_of(_routed(at["n"], at["k"], int(at["d"])))

    if not follows(cost, flops, grown({"n": 2**14, "k": 2**7, "d": 64})):
        return f"counts do not grow as {cost}"
    length = 5040**2
    divisors = np.array([k for k in range(1, 4 * 5040) if length % k == 0], dtype=np.float64)
    costs = np.asarray(sum(_routed(length, divisors, 64).min_flops().values()))
    least = float(divisors[costs.argmin()])
    for part in rest:
        wanted = re.fullmatch(r"k\*? ?= ?(.+)", part)
        expected = formula_at(wanted[1], {"n": length}) if wanted else np.nan
        if not abs(least / expected - 1) <= EXACT_TOLERANCE:
            return f"least at k = n^{np.log(least) / np.log(length):.3f}"
    return text


def _routed(n: Num, k: Num, d: int) -> RoutedAttention:
    """Without a mask, queries and keys routed apart."""
    return RoutedAttention(
        num_heads=1, len_seq=n, num_clusters=k, head_dim=d, shared_qk=False, causal=False
    )


def evaluate_combiner(claim: Claim) -> Value:
    """Every class must be that of a pattern, every pattern of one of the classes."""
    text = printed(claim)
    lengths = [4**n for n in range(6, 13)]

    def of(pattern: str, length: int) -> float:
        return flops_of(Combiner(num_heads=1, len_seq=length, head_dim=64, pattern=pattern))

    found = {
        (inner, pattern): grows_as(inner, lambda n, p=pattern: of(p, n), lengths)  # type: ignore[misc]
        for inner in classes(text)
        for pattern in PATTERNS
    }
    for inner in classes(text):
        if not any(found[inner, pattern] for pattern in PATTERNS):
            return f"no pattern grows as {inner}"
    alone = [p for p in PATTERNS if not any(found[inner, p] for inner in classes(text))]
    return f"{', '.join(alone)} grow otherwise" if alone else text


def evaluate_fit(claim: Claim) -> Value:
    """O(L^(4/3)) at the groups that cost least, one latent each."""
    if claim.kind != "complexity":
        not_modelled("setting incomplete: no layers, width or number format of the training run")
    text = printed(claim)
    (inner,) = classes(text)
    lengths = [8**n for n in range(4, 10)]

    def flops(length: int) -> float:
        return flops_of(FitAttention(num_heads=1, len_seq=length, head_dim=64))

    if grows_as(inner, flops, lengths):
        return text
    steps = [np.log(flops(b) / flops(a)) / np.log(b / a) for a, b in pairwise(lengths)]
    return f"O(L^{steps[-1]:.2f})"


def evaluate_seqboat_sma(claim: Claim) -> Value:
    """O(r L w d) of the active tokens' attention; the whole layer linear in L."""
    text = printed(claim)
    (inner,) = classes(text)

    def layer(at: Sizes) -> SeqBoat:
        return SeqBoat(len_seq=at["L"], dim=at["d"], window=at["w"], active_frac=at["r"])

    base = {"r": 1 / 8, "L": 2**20, "w": 2**8, "d": 2**8}
    if not follows(inner, lambda at: flops_of(layer(at), "attend"), grown(base)):
        return f"attention does not grow as {inner}"
    lengths = [{**base, "L": 2**n} for n in (18, 20, 22)]
    return text if follows("L", lambda at: flops_of(layer(at)), lengths) else "not linear in L"


def evaluate_xl3m(claim: Claim) -> Value:
    """The claim is a length; memory is that of one reading whatever it is."""
    not_modelled("memory holds one segment, or those kept, at a time: no length follows from it")
