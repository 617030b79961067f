"""The planner's space with every way to share sequences that is asked for, beside every cp > 1.

plans with cp = 1      stay as they are, unless only split ones are asked for
plans with cp > 1      once for each (split, ulysses degree) that the model allows: the rules
                       are `workloads.sequence_plan.refusal`'s; a hybrid in all its degrees
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from hwmodels.errors import InputError
from workloads.models.config import TransformerConfig
from workloads.plan import Plan, SequenceSplit
from workloads.sequence_plan import alone, default_split, hybrid_degrees, refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Ways to share a sequence that are searched; none: the model's default.

    `whole`: plans with cp = 1 are searched beside. `ulysses`: the hybrid's degree, 0 for all.
    """

    of: tuple[SequenceSplit, ...] = ()
    whole: bool = True
    ulysses: int = 0

    def wanted(self, cfg: TransformerConfig) -> tuple[SequenceSplit, ...]:
        """What a model's plans are given."""
        return self.of or (default_split(cfg),)


ANY = Splits()


def with_splits(plans: Plan, splits: Splits, *, cfg: TransformerConfig, len_seq: int) -> Plan:
    """`plans` with their sequences split in each of the ways; `InputError` where none is left."""
    cps, tps = (np.asarray(x).astype(np.int64) for x in (plans.cp, plans.tp))
    parts = [(np.flatnonzero(cps == 1), SequenceSplit.RING_ZIGZAG, 1)] if splits.whole else []
    reasons: list[str] = []
    for cp, tp in sorted({(int(c), int(t)) for t, c in zip(tps, cps, strict=True)}):
        if cp == 1:
            reasons += [alone(split) for split in splits.wanted(cfg)]
            continue
        here = np.flatnonzero((cps == cp) & (tps == tp))
        for split, ulysses in _degrees(splits, cfg, tp, cp):
            why = refusal(cfg, len_seq=len_seq, tp=tp, cp=cp, split=split, ulysses=ulysses)
            if why:
                reasons.append(why)
            else:
                parts.append((here, split, ulysses))
    if not sum(index.size for index, _, _ in parts):
        raise InputError(reasons[-1] if reasons else "no plan of the space splits a sequence")
    return _joined([_with(plans, *part) for part in parts])


def _degrees(
    splits: Splits, cfg: TransformerConfig, tp: int, cp: int
) -> Iterator[tuple[SequenceSplit, int]]:
    """The splits, the hybrid with every degree that it may have (1 where it has none)."""
    for split in splits.wanted(cfg):
        if split != SequenceSplit.HYBRID:
            yield split, splits.ulysses or 1
            continue
        degrees = [splits.ulysses] if splits.ulysses else hybrid_degrees(cfg, tp=tp, cp=cp)
        for degree in degrees or [1]:
            yield split, degree


def _with(plans: Plan, index: np.ndarray, split: SequenceSplit, ulysses: int) -> Plan:
    """Some of the plans with that split."""
    picked = {f.name: np.asarray(getattr(plans, f.name))[index] for f in fields(Plan)}
    size = np.ones(index.size)
    return replace(Plan(**picked), sequence=float(split) * size, ulysses=ulysses * size)


def _joined(parts: Sequence[Plan]) -> Plan:
    return Plan(
        **{f.name: np.concatenate([np.asarray(getattr(p, f.name)) for p in parts])
           for f in fields(Plan)}
    )  # fmt: skip


def all_splits() -> Splits:
    """Every strategy, and sequences left whole."""
    return Splits(of=tuple(SequenceSplit))


def pinned_splits(pins: Mapping[str, int], splits: Splits) -> Splits:
    """`splits` with what pins of `sequence` and `ulysses` leave of them."""
    split, ulysses = pins.get("sequence"), pins.get("ulysses", 0)
    if split is not None and split not in set(SequenceSplit):
        known = ", ".join(f"{s.value} {s.label}" for s in SequenceSplit)
        raise InputError(f"sequence = {split} is no way to split one; known: {known}")
    if split is not None:
        one = SequenceSplit(split)
        splits = Splits(of=(one,), whole=one == SequenceSplit.RING_ZIGZAG)
    elif ulysses > 1 and SequenceSplit.HYBRID in splits.of:
        splits = Splits(of=(SequenceSplit.HYBRID,), whole=False)
    return replace(splits, ulysses=ulysses, whole=splits.whole and ulysses <= 1)
