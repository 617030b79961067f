"""Claims on cascades and on attention with a fixed structure.

FuseMax's speedups are over FLAT on an accelerator of the same area, which no device of the
catalogue is: not modelled. What its cascade and its array say is evaluated. The formulas of the
others are read off the counts of their ops: an exponent a size, from two sizes a factor of four
apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from validate.claims.claim import EXACT_TOLERANCE, Claim, Value, not_modelled
from workloads import registry
from workloads.einsum_cascade import ONE_PASS, THREE_PASS, passes
from workloads.op import Op
from workloads.ops.fusemax import EINSUM_CYCLES, FuseMax
from workloads.ops.structured_attention import (
    ActivatedAttention,
    CombinerAttention,
    FitAttention,
    RoutingAttention,
)

ARRAY_ROWS = 256
"""Rows of FuseMax's array, where a setting names none (the authors' artifact)."""
LONG = 2**20
"""What 'long' stands for in a setting."""
HEAD_DIM = 64


def evaluate_fusemax(claim: Claim) -> Value:
    """Passes from the cascades, steps of the Einsums, and how busy the array is."""
    quantity = claim.quantity.casefold()
    if "passes" in quantity:
        return float(passes(ONE_PASS)), float(passes(THREE_PASS))
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


def evaluate_longheads(claim: Claim) -> Value:
    """O(N k l d): chunks of l keys, k of them a query and head."""
    sizes = {"num_heads": 8, "len_q": 2**14, "head_dim": 64, "len_kv": 2**22, "block_k": 64}

    def flops(**change: int) -> float:
        n = sizes | change
        kept = n.pop("kept", NUM_KEPT)
        op = registry.build("longheads", n | {"len_selected": kept * n["block_k"], "block_q": 1})
        return _stage_flops(op, "attend")

    found = [
        _exponent(lambda f, name=name: flops(**{name: f * (sizes | {"kept": NUM_KEPT})[name]}))
        for name in ("len_q", "kept", "block_k", "head_dim")
    ]
    return _confirmed(claim, "N k l d", found, [1, 1, 1, 1])


def evaluate_routing_transformer(claim: Claim) -> Value:
    """n k d of scores, n^2 d / k of attention, together least at k = sqrt(n)."""
    if "formula" not in claim.setting:
        not_modelled("the claim states a setting and no figure")

    def op(n: int = 2**14, k: int = 2**7, d: int = 64) -> RoutingAttention:
        return RoutingAttention(num_heads=1, len_seq=n, head_dim=d, num_clusters=k)

    scores = [_exponent(lambda f, i=i: _stage_flops(op(**_grown(i, f)), "score")) for i in "nkd"]
    attend = [_exponent(lambda f, i=i: _stage_flops(op(**_grown(i, f)), "attend")) for i in "nkd"]
    costs = {k: sum(op(n=2**16, k=k).min_flops().values()) for k in (2**7, 2**8, 2**9)}
    if min(costs, key=lambda k: costs[k]) != 2**8:
        return "least at another k than sqrt(n)"
    return _confirmed(claim, "nkd+n^2 d/k", [*scores, *attend], [1, 1, 1, 2, -1, 1])


def _grown(name: str, factor: int) -> dict[str, int]:
    return {name: {"n": 2**14, "k": 2**7, "d": 64}[name] * factor}


def evaluate_combiner(claim: Claim) -> Value:
    """O(L sqrt L) of the fixed pattern at blocks of sqrt(L)."""

    def flops(factor: int) -> float:
        root = 2**6 * factor
        op = CombinerAttention(num_heads=1, len_seq=root**2, head_dim=64, block=root)
        return float(sum(op.min_flops().values()))

    return _confirmed(claim, "L sqrt L", [_exponent(flops) / 2], [1.5])


def evaluate_fit(claim: Claim) -> Value:
    """O(L^(4/3)) at groups of L^(1/3) tokens and one latent a group."""
    if claim.kind != "complexity":
        not_modelled("setting incomplete: no layers, widths or precision of the training run")

    def flops(factor: int) -> float:
        root = 2**5 * factor
        op = FitAttention(num_heads=1, len_seq=root**3, head_dim=64, group=root)
        return float(sum(op.min_flops().values()))

    return _confirmed(claim, "L^(4/3)", [_exponent(flops) / 3], [4 / 3])


def evaluate_seqboat_sma(claim: Claim) -> Value:
    """O(r L w d): attention of the active tokens in their windows."""

    def flops(r: float = 0.125, n: int = 2**16, w: int = 2**7, d: int = 64) -> float:
        op = ActivatedAttention(num_heads=1, len_seq=n, head_dim=d, window=w, active_frac=r)
        return _stage_flops(op, "attend")

    found = [
        _exponent(lambda f: flops(r=0.125 * f)), _exponent(lambda f: flops(n=2**16 * f)),
        _exponent(lambda f: flops(w=2**7 * f)), _exponent(lambda f: flops(d=64 * f)),
    ]  # fmt: skip
    return _confirmed(claim, "rL w d", found, [1, 1, 1, 1])


def evaluate_xl3m(claim: Claim) -> Value:
    """The claim is a length on accelerators whose figures nobody published in full."""
    if "Ascend" in str(claim.setting.get("hw", "")):
        not_modelled("Ascend 910B is in no catalogue")
    not_modelled(f"no rule for '{claim.quantity}'")


def evaluate_infllm(claim: Claim) -> Value:
    """The claims are a length that a model copes with, and savings without a device."""
    if "length" in claim.quantity:
        not_modelled("which length a model copes with is a matter of quality")
    not_modelled("setting incomplete: no gpu, batch or budget")


def _stage_flops(op: Op, start: str) -> float:
    """Matrix flops of the stages whose names begin so."""
    chosen = [s for s in op.stages() if s.name.startswith(start)]
    return float(sum(s.times * sum(s.op.min_flops().values()) for s in chosen))


def _exponent(flops: Callable[[int], float]) -> float:
    """d log flops / d log size between a size and four times it."""
    return float(np.log(flops(4) / flops(1)) / np.log(4))


def _confirmed(
    claim: Claim, formula: str, found: Sequence[float], expected: Sequence[float]
) -> Value:
    """The published text where every exponent is within 2 %, else what was found."""
    text = str(claim.published or claim.setting.get("formula", ""))
    if formula not in text and formula not in str(claim.setting.get("formula", "")):
        not_modelled(f"no rule for the formula '{text}'")
    near = all(abs(f - e) <= EXACT_TOLERANCE * abs(e) for f, e in zip(found, expected, strict=True))
    return text if near else f"exponents {', '.join(f'{f:.2f}' for f in found)}"


NUM_KEPT = 16
"""Chunks a head selects, the formula's k."""
