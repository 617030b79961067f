"""Sequence splits of plans: closed forms against the enumeration of ranks, and every refusal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import InputError
from workloads.models.config import load_hf_config
from workloads.ops.flash_attention import FlashAttention2
from workloads.plan import Plan, SequenceSplit
from workloads.sequence_parallel import (
    RINGS,
    STRATEGIES,
    Parcels,
    balance_frac,
    exchange_bytes,
    messages,
    num_steps,
    strategy,
)
from workloads.sequence_parallel import _step_pairs as step_pairs
from workloads.sequence_plan import (
    NAMES,
    balance,
    check_plan,
    default_split,
    hybrid_degrees,
    longest_of,
    refusal,
    ring_runs,
    split_named,
    strategy_of,
)
from workloads.workload import BACKWARD, FORWARD

LLAMA = load_hf_config("examples/llama3-8b.json")
LINEAR = load_hf_config("examples/linear-llama3-1b.json")
MIXED = replace(LINEAR, num_linear_layers=12)
FUSED_RINGS = [s.name for s in STRATEGIES.values() if s.moves in RINGS and s.fused]


def whole(ranks: int, kv_heads: int = 8) -> FlashAttention2:
    return FlashAttention2(num_heads=8, num_kv_heads=kv_heads, len_q=ranks * 2**13, head_dim=64,
                           causal=True)  # fmt: skip


def enumerated(name: str, shape: FlashAttention2, ranks: int, phase: str) -> list[float]:
    """Bytes of the busiest port in every step, and of what is left at the end."""
    how, found = strategy(name), []
    for step in range(num_steps(how, ranks, causal=True) + 1):
        ports: dict[tuple[int, str], float] = {}
        for m in messages(how, shape, ranks, step, phase=phase):
            for key in ((m.source, "out"), (m.target, "in")):
                ports[key] = ports.get(key, 0.0) + float(m.num_bytes)
        found.append(max(ports.values(), default=0.0))
    return found


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(FUSED_RINGS),
    ranks=st.integers(2, 11),
    kv_heads=st.sampled_from([1, 2, 8]),
    phase=st.sampled_from([FORWARD, BACKWARD]),
)
def test_runs_are_the_enumerated_steps(name: str, ranks: int, kv_heads: int, phase: str) -> None:
    """Every step's longest chunk and busiest port, in order."""
    shape, how = whole(ranks, kv_heads), strategy(name)
    runs = ring_runs(how, Parcels.of(shape, ranks), ranks, phase=phase)
    steps = [(float(r.share), float(r.num_bytes)) for r in runs for _ in range(int(r.times))]
    _, lasts = step_pairs(how, shape, ranks)
    mean = shape.num_pairs() / ranks
    assert [s for s, _ in steps] == pytest.approx([x / mean for x in [*lasts, 0]], rel=2e-3)
    assert [b for _, b in steps] == pytest.approx(enumerated(name, shape, ranks, phase))


@pytest.mark.parametrize("name", FUSED_RINGS)
def test_runs_take_arrays_of_ranks(name: str) -> None:
    ranks = np.arange(1.0, 12.0)
    parcels = Parcels(query=3.0, keys=5.0, output=2.0, rows=0.5)
    for phase in (FORWARD, BACKWARD):
        together = ring_runs(strategy(name), parcels, ranks, phase=phase)
        for i, n in enumerate(ranks):
            alone = ring_runs(strategy(name), parcels, float(n), phase=phase)
            for run, one in zip(together, alone, strict=True):
                for many, single in zip(run, one, strict=True):
                    assert np.broadcast_to(many, ranks.shape)[i] == pytest.approx(single)
    assert longest_of(ring_runs(strategy(name), parcels, 1.0, phase=FORWARD)) == 0


def test_a_contiguous_ring_does_twice_the_mean_and_others_are_even() -> None:
    """By hand: (2 P - 1) / P, 1, and (P + 1) / P of LightSeq with P even."""
    for ranks in (2, 8, 64):
        assert balance(strategy("ring_attention"), ranks) == (2 * ranks - 1) / ranks
        assert balance(strategy("zigzag_ring"), ranks) == 1
        assert balance(strategy("striped_attention"), ranks) == 1
        assert balance(strategy("lightseq"), ranks) == (ranks + 1) / ranks
        assert balance(strategy("lightseq"), ranks + 1) == 1
    for name in FUSED_RINGS:
        how, shape = strategy(name), whole(8)
        runs = ring_runs(how, Parcels.of(shape, 8), 8, phase=FORWARD)
        assert longest_of(runs) == pytest.approx(balance(how, 8))
        assert 1 / balance_frac(how, shape, 8) == pytest.approx(balance(how, 8), rel=1e-3)


def test_a_ring_sends_what_its_strategy_counts() -> None:
    """Sums over the steps, where the busiest rank is the same in all of them."""
    shape = whole(8)
    for name in ("ring_attention", "zigzag_ring", "striped_attention"):
        for phase in (FORWARD, BACKWARD):
            runs = ring_runs(strategy(name), Parcels.of(shape, 8), 8, phase=phase)
            sent = sum(float(r.times * r.num_bytes) for r in runs)
            assert sent == exchange_bytes(strategy(name), shape, 8, phase=phase)["send_recv"]


# ---- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "sizes", "rule"),
    [
        ("ulysses", {"cp": 16}, "16 must divide the 8 key and value heads"),
        ("ulysses", {"cp": 4, "tp": 4}, "4 must divide the 2 key and value heads"),
        ("ring-contiguous", {"cp": 1}, "nobody to share"),
        ("lightseq", {"cp": 3}, "a length that 3 divides"),
        ("ring-zigzag", {"cp": 8, "len_seq": 8 * 1001}, "a length that 16 divides"),
        ("ring-striped", {"cp": 8, "len_seq": 8 * 1001 + 4}, "a length that 8 divides"),
        ("lasp2", {"cp": 8}, "softmax attention"),
        ("lasp2h", {"cp": 8}, "softmax attention"),
        ("hybrid", {"cp": 8, "ulysses": 1}, "between 1 and it"),
        ("hybrid", {"cp": 8, "ulysses": 8}, "between 1 and it"),
        ("hybrid", {"cp": 8, "ulysses": 3}, "must divide cp = 8"),
        ("hybrid", {"cp": 32, "ulysses": 16}, "16 must divide the 8 key and value heads"),
        ("token-ring", {"cp": 8, "ulysses": 2}, "belongs to the hybrid"),
    ],
)
def test_what_a_split_forbids(split: str, sizes: dict[str, int], rule: str) -> None:
    """One line that names strategy and rule."""
    asked = {"len_seq": 2**16, "tp": 1, "ulysses": 1} | sizes
    why = refusal(LLAMA, split=split_named(split), **asked)
    assert why is not None and why.startswith(f"{split}: ") and rule in why
    assert "\n" not in why and len(why) < 200
    plan = Plan(sequence=split_named(split), **{k: v for k, v in asked.items() if k != "len_seq"})
    with pytest.raises(InputError, match=split):
        check_plan(LLAMA, plan, asked["len_seq"])


def test_an_array_of_plans_is_refused_for_its_worst() -> None:
    fine = Plan(cp=np.array([1.0, 2.0, 8.0]), sequence=np.array([0.0, 0.0, 6.0]))
    check_plan(LLAMA, fine, 2**16)
    with pytest.raises(InputError, match="ulysses"):
        check_plan(LLAMA, replace(fine, cp=np.array([1.0, 2.0, 16.0])), 2**16)


def test_linear_layers_take_gathered_states() -> None:
    def why(cfg: object, name: str) -> str | None:
        return refusal(cfg, len_seq=2**16, tp=1, cp=8, split=split_named(name))  # type: ignore[arg-type]

    assert why(LINEAR, "lasp2") is None and why(LINEAR, "lasp2h") is None
    assert why(LINEAR, "ulysses") is None
    assert "no ring of keys" in (why(LINEAR, "ring-zigzag") or "")
    assert "take lasp2h" in (why(MIXED, "lasp2") or "")
    assert why(MIXED, "lasp2h") is None
    assert [default_split(c) for c in (LLAMA, LINEAR, MIXED)] == [
        SequenceSplit.RING_ZIGZAG, SequenceSplit.LASP2, SequenceSplit.LASP2H,
    ]  # fmt: skip


def test_every_strategy_has_a_name_and_every_name_a_strategy() -> None:
    assert {strategy_of(s).name for s in SequenceSplit} == set(STRATEGIES)
    assert [split_named(name.upper()) for name in NAMES] == list(SequenceSplit)
    with pytest.raises(InputError, match="ring-zigzag"):
        split_named("ring-zagzig")


def test_degrees_of_a_hybrid() -> None:
    """Divisors of cp below it that divide the heads of a rank: 8 of them, or 2 at tp 4."""
    assert hybrid_degrees(LLAMA, tp=1, cp=16) == [2, 4, 8]
    assert hybrid_degrees(LLAMA, tp=4, cp=16) == [2]
    assert hybrid_degrees(LLAMA, tp=8, cp=16) == []


def test_plans_say_how_they_split() -> None:
    hybrid = Plan(cp=8, sequence=SequenceSplit.HYBRID, ulysses=4)
    assert str(hybrid) == "dp1 tp1 pp1 cp8 hybrid u4 mb1 recompute-none zero0"
    assert "ring" not in str(Plan(cp=8))
