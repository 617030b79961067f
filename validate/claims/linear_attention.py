"""Claims on linear attentions by features, additive decays, codes and windows.

Times are the op's, all its kernels, against FlashAttention-2's causal forward pass where a speedup
is over FlashAttention; nothing is added for the host. Counts confirm a formula over sizes at which
what it leaves out (chunks of 64 tokens, the passes of the selection) is under 2 %.

Not modelled: Hedgehog's speed at 32K, whose setting names neither batch nor heads (5 to 8 at the
usual ones); ScatterFormer's
module, whose setting names no scene; frames a second of a whole detector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

from simulator.kernel_time.predict import predict
from validate.claims.claim import EXACT_TOLERANCE, Claim, Value, not_modelled
from validate.claims.structured import Sizes, classes, follows, formula_at, grown, printed
from workloads.op import Op
from workloads.ops.feature_attention import FeatureAttention
from workloads.ops.feature_map import HEDGEHOG
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.lightnet import LightNet
from workloads.ops.long_vq import LongVq
from workloads.ops.scattered_attention import ScatteredAttention

SECONDS: Final[Mapping[str, float]] = {"s": 1.0, "ms": 1e3, "us": 1e6}
BYTES: Final[Mapping[str, float]] = {
    "B": 1.0, "KB": 1e-3, "KiB": 2.0**-10, "MB": 1e-6, "MiB": 2.0**-20, "GB": 1e-9, "GiB": 2.0**-30,
}  # fmt: skip
LARGE: Final = 2**13
"""A size against which a chunk of 64 tokens is small."""
ANY_MEMORY: Final = float(2**52)
LETTERS: Final[Mapping[str, str]] = {
    "N": "len_seq", "L": "len_seq", "n": "len_seq", "T": "len_seq",
    "d": "head_dim", "D": "head_dim", "S": "num_codes", "C": "num_codes",
}  # fmt: skip
"""What formulas call the sizes of an op."""


def evaluate_hedgehog(claim: Claim) -> Value:
    """Time against FlashAttention, matrix flops of the recurrence, or bytes of the state."""
    if "formula" in claim.setting:
        return _confirmed(claim, "Nd", lambda **sizes: _hedgehog(**sizes).recurrence())
    batch, seq, heads, width = claim.sizes("batch", "seq", "heads", "head_dim")
    op = _hedgehog(batch=batch, len_seq=seq, num_heads=heads, head_dim=width)
    if claim.kind != "speedup":
        return _of(claim, op, op.state_bytes)
    flash = FlashAttention2(
        batch=batch, num_heads=heads, len_q=seq, head_dim=width, causal=True, dtype=claim.dtype()
    )
    return _seconds(claim, flash) / _seconds(claim, op)


def _hedgehog(**sizes: float) -> FeatureAttention:
    return FeatureAttention(**({"num_heads": 1} | sizes), feature=HEDGEHOG)


def evaluate_lightnet(claim: Claim) -> Value:
    """Passes over the data, LightNet's and those of scans in every direction; images: two axes."""
    if "scan" in claim.quantity.casefold() or claim.unit in ("scans", "passes"):
        axes = claim.sizes("axes")[0] if "axes" in claim.setting else 2
        op = LightNet(num_heads=1, len_seq=64, head_dim=64, num_axes=axes)
        counted = float(op.num_scans()), float(op.directional_scans())
        return min(counted), max(counted)
    if "formula" in claim.setting:
        return _confirmed(claim, "Nd", lambda **sizes: LightNet(num_heads=1, **sizes))
    batch, seq, heads, width = claim.sizes("batch", "seq", "heads", "head_dim")
    causal = bool(claim.setting.get("causal", False))
    op = LightNet(batch=batch, len_seq=seq, num_heads=heads, head_dim=width, causal=causal)
    return _of(claim, op, op.state_bytes)


def evaluate_longvq(claim: Claim) -> Value:
    """O(N S d): all flops of the op, search, weights, sums of the codes and moving average."""
    if "formula" in claim.setting:
        return _confirmed(claim, "NSd", lambda **sizes: LongVq(num_heads=1, **sizes))
    batch, seq, heads, width, codes = claim.sizes("batch", "seq", "heads", "head_dim", "codes")
    op = LongVq(batch=batch, len_seq=seq, num_heads=heads, head_dim=width, num_codes=codes)
    return _of(claim, op, op.state_bytes)


def evaluate_scatterformer(claim: Claim) -> Value:
    """Time of scattered linear attention over the voxels and windows of a scene."""
    if claim.unit.casefold() in ("fps", "hz") or "detector" in claim.quantity.casefold():
        not_modelled("frames a second of a whole detector: convolutions and heads besides")
    voxels, windows, heads, width = claim.sizes("voxels", "windows", "heads", "head_dim")
    op = ScatteredAttention(
        num_voxels=voxels, num_windows=windows, num_heads=heads, head_dim=width
    )  # fmt: skip
    return _of(claim, op, lambda: op.kernels()[1].state_bytes())


# ---- what they share -----------------------------------------------------------------------


def _of(claim: Claim, op: Op, state_bytes: Callable[[], object]) -> Value:
    """Seconds, matrix flops or state bytes of the op, as the unit asks."""
    unit = claim.unit.split("/")[0].strip()
    if unit in SECONDS:
        return _seconds(claim, op) * SECONDS[unit]
    if unit in BYTES and "state" in claim.quantity.casefold():
        return float(state_bytes()) * BYTES[unit]  # type: ignore[arg-type]
    if "flop" in unit.casefold():
        scale = {"G": 1e-9, "T": 1e-12, "M": 1e-6}.get(unit[0].upper(), 1.0)
        return scale * float(sum(op.min_flops().values()))
    not_modelled(f"no count of this op is in '{claim.unit}' of {claim.quantity}")


def _seconds(claim: Claim, op: Op) -> float:
    return float(predict(op.over(dtype=claim.dtype()), on=claim.device()).seconds)


def _confirmed(claim: Claim, sizes: str, make: Callable[..., Op]) -> str:
    """The setting's formula where the op's flops follow it, else the powers that they follow.

    A class O(...) takes all flops of the op at sizes from `LARGE` on; a formula with its factor
    takes matrix flops, and must give their number. `sizes` are the letters of the op's own; what a
    formula leaves out of them grows as well.
    """
    text = printed(claim)
    is_class = "O(" in text
    bare = classes(text)[0] if is_class else text
    letters = _letters(bare, sizes)

    def count(at: Sizes) -> float:
        op = make(**{LETTERS[name]: size for name, size in at.items()})
        if is_class:
            return float(op.work(ANY_MEMORY).flops)
        return float(sum(op.min_flops().values()))

    points = grown(dict.fromkeys(letters, LARGE))
    first = count(points[0])
    if follows(bare, count, points):
        ratio = first / formula_at(bare, points[0])
        if is_class or abs(ratio - 1) <= EXACT_TOLERANCE:
            return text
        return f"{ratio:.3g} times {text}"
    twice = {name: count({**points[0], name: 2 * LARGE}) / first for name in letters}
    return "O(" + " ".join(f"{name}^{math.log2(r):.2f}" for name, r in twice.items()) + ")"


def _letters(formula: str, sizes: str) -> list[str]:
    """The sizes that a formula names, and those of `sizes` that it leaves out."""
    fields = {LETTERS[name] for name in sizes}
    named = [name for name in dict.fromkeys(formula) if name.isalpha()]
    for name in named:
        if LETTERS.get(name) not in fields:
            not_modelled(f"setting unclear: '{formula}' has a size '{name}'")
    known = {LETTERS[name] for name in named}
    if len(known) < len(named):
        not_modelled(f"setting unclear: '{formula}' names a size twice")
    return named + [name for name in sizes if LETTERS[name] not in known]
