"""Splits of a plan's sequences: seconds by hand and against whole strategies, memory, planning."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import catalog
from hwmodels.errors import InputError
from simulator.context_parallel import SplitSeconds, buffer_bytes, split_seconds
from simulator.exchange import CONTEXT
from simulator.inference import inference_step
from simulator.memory import training_memory
from simulator.pieces import DATA, StepEstimate, is_attention, total_seconds
from simulator.planners.parallelism import plan_parallelism
from simulator.planners.sequence_splits import Splits, all_splits
from simulator.recipe import RECIPES
from simulator.sequence_parallel import attention_seconds, hybrid_seconds
from simulator.stack import OnDevice, factors_of, stack
from simulator.step import layer_times, training_step
from simulator.timeline import simulate_training
from workloads.models.config import TransformerConfig, load_hf_config
from workloads.models.transformer import TrainStep, prefill_step, train_step
from workloads.ops.flash_attention import FlashAttention2
from workloads.plan import Plan, Recompute, SequenceSplit
from workloads.sequence_plan import strategy_of
from workloads.workload import BACKWARD, FORWARD

BF16 = RECIPES["bf16"]
H100 = catalog.cluster("hgx-h100", nodes=8)
LLAMA = load_hf_config("examples/llama3-8b.json")
LINEAR = load_hf_config("examples/linear-llama3-1b.json")
MIXED = replace(LINEAR, num_linear_layers=12)
S = SequenceSplit
SOFTMAX = [s for s in S if s not in (S.LASP2, S.LASP2H)]
CALIBRATED = OnDevice(
    stack=stack("megatron"), factors=factors_of(stack("megatron"), H100.device, {})
)


def step_of(cfg: TransformerConfig = LLAMA, *, batch: int = 8, len_seq: int = 65536) -> TrainStep:
    return train_step(cfg, len_seq=len_seq, global_batch=batch)


def plan_of(split: S, **given: int) -> Plan:
    return Plan(**{"cp": 8, "sequence": split, "ulysses": 4 if split == S.HYBRID else 1} | given)


def run(step: TrainStep, plan: Plan) -> StepEstimate:
    return training_step(step, plan=plan, on=H100, recipe=BF16)


@cache
def split_of(split: S, cfg: TransformerConfig = LLAMA, len_seq: int = 65536,
             stack: OnDevice | None = None, cp: int = 8) -> SplitSeconds:  # fmt: skip
    step, plan = step_of(cfg, len_seq=len_seq), plan_of(split, cp=cp)
    return split_seconds(cfg, list(step.layer("dense", plan)), len_seq=len_seq, plan=plan, on=H100,
                         dtype=BF16.dtype, stack=stack)  # fmt: skip


def core(phase: str, len_seq: int = 65536) -> float:
    """A rank's mean share of attention."""
    nodes = step_of(len_seq=len_seq).layer("dense", Plan(cp=8)).select(phase=phase)
    return float(total_seconds(filter(is_attention, nodes), on=H100.device).lower_s)


# ---- seconds -------------------------------------------------------------------------------


@pytest.mark.parametrize("split", list(S))
def test_one_rank_costs_what_it_costs(split: S) -> None:
    """Without ranks to share with, no split adds a kernel or a byte."""
    plan = Plan(sequence=split)
    found = split_seconds(LLAMA, list(step_of().layer("dense", plan)), len_seq=65536, plan=plan,
                          on=H100, dtype=BF16.dtype)  # fmt: skip
    for one in (found.forward, found.backward):
        assert (one.moved, one.exposed, one.extra.lower_s) == (0, 0, 0)
    assert buffer_bytes(LLAMA, len_seq=65536, plan=plan, dtype=BF16.dtype) == 0


def test_the_last_rank_of_a_contiguous_ring_does_twice_the_mean() -> None:
    """15 / 8 of the mean attention at 8 ranks; balanced layouts only merge their parts."""
    mean = core(FORWARD)
    contiguous, zigzag, striped = (
        float(split_of(s).forward.extra.lower_s)
        for s in (S.RING_CONTIGUOUS, S.RING_ZIGZAG, S.RING_STRIPED)
    )
    assert contiguous - zigzag == pytest.approx(7 / 8 * mean, rel=1e-9)
    assert zigzag == striped < 0.1 * mean


def test_what_is_sent_by_hand() -> None:
    """A rank's Q and O have 8192 x 4096 elements, K with V a half of that; 450 GB/s a GPU."""
    q = o = 8192 * 4096 * 2
    kv, rows, port = q / 2, 8192 * 32 * 4, 450e9
    ahead, back = (
        {s: float(getattr(split_of(s), phase).moved) * port for s in SOFTMAX}
        for phase in ("forward", "backward")
    )
    for ring in (S.RING_ZIGZAG, S.RING_STRIPED, S.RING_CONTIGUOUS):
        assert ahead[ring] == pytest.approx(7 * kv) and back[ring] == pytest.approx(14 * kv)
    assert ahead[S.TOKEN_RING] == pytest.approx(7 * (q + o + rows))
    assert back[S.TOKEN_RING] == pytest.approx(7 * (q + o + 2 * rows + q))
    assert ahead[S.ULYSSES] == back[S.ULYSSES] == pytest.approx(7 / 8 * (q + kv + o))
    # A ring of two groups, and all-to-alls of four.
    assert ahead[S.HYBRID] == pytest.approx(kv + 3 / 4 * (q + kv + o))
    # K and V round, one after the other; backward dK and dV of all 8 chunks are reduced in the
    # switch, which takes 9 / 8 of a buffer.
    assert ahead[S.RING_SELF_ATTENTION] == pytest.approx(7 * kv)
    assert back[S.RING_SELF_ATTENTION] == pytest.approx(7 * kv + 9 / 8 * 8 * kv)


def test_all_to_alls_wait_and_rings_hide() -> None:
    for split in (S.ULYSSES, S.RING_ZIGZAG):
        found = split_of(split)
        if split == S.ULYSSES:
            assert found.forward.exposed == found.forward.moved > 0
        else:  # all but the last gradients, one chunk of K and V
            assert found.forward.exposed == 0 < found.forward.moved
            assert found.backward.exposed == pytest.approx(found.backward.moved / 14)


def test_scores_of_ring_self_attention_are_written_and_not_masked() -> None:
    extra = split_of(S.RING_SELF_ATTENTION).forward.extra.lower_s
    scores = 32 * 8192 * 65536 * 2  # written, read and written by the softmax, read
    assert extra + core(FORWARD) > max(4 * scores / 3.352e12, 2 * core(FORWARD))


def test_states_are_gathered_whatever_the_length() -> None:
    """16 heads of 128 x 128 from each of 8 ranks, on all layers or on 12 of 16."""
    gathered = 8 * 16 * 128 * 128 * 2 * 7 / 8 / 450e9
    for length in (65536, 2**20):
        found = split_of(S.LASP2, LINEAR, length)
        assert float(found.forward.moved) == float(found.backward.moved)
        assert float(found.forward.moved) == pytest.approx(gathered)
        assert found.forward.exposed == 0
    mixed = split_of(S.LASP2H, MIXED)
    keys = 65536 * 2 * 2048 * 2 * 7 / 8 / 450e9
    assert float(mixed.forward.moved) == pytest.approx((12 * gathered + 4 * keys) / 16)
    assert float(mixed.backward.moved) == pytest.approx((12 * gathered + 8 * keys) / 16)
    assert float(mixed.forward.exposed) == pytest.approx(4 * keys / 16)


@pytest.mark.parametrize("split", [s for s in SOFTMAX if s != S.RING_SELF_ATTENTION])
@pytest.mark.parametrize("phase", [FORWARD, BACKWARD])
def test_a_layer_takes_what_the_strategy_takes(split: S, phase: str) -> None:
    """Against the rank-by-rank model, which times every chunk as a kernel of its own."""
    whole = FlashAttention2(num_heads=32, num_kv_heads=8, len_q=65536, head_dim=128, causal=True)
    given = {"num_ranks": 8, "on": H100, "phase": phase}
    expected = (
        hybrid_seconds(strategy_of(split), whole, inner=4, **given)  # type: ignore[arg-type]
        if split == S.HYBRID
        else attention_seconds(strategy_of(split), whole, **given)  # type: ignore[arg-type]
    )
    found = split_of(split, stack=CALIBRATED)
    one = found.forward if phase == FORWARD else found.backward
    nodes = [n for n in step_of().layer("dense", plan_of(split)).select(phase=phase)
             if is_attention(n)]  # fmt: skip
    mean = total_seconds(nodes, on=H100.device, stack=CALIBRATED).lower_s
    ours = float(mean + one.extra.lower_s + one.exposed)
    assert ours == pytest.approx(expected.seconds, rel=0.15)


def test_lightseq_does_not_attend_again() -> None:
    """Full recomputation of a layer is the layer less its attention, its merges and sends."""
    times = layer_times(step_of(), plan=plan_of(S.LIGHTSEQ), on=H100, recipe=BF16)
    split = split_of(S.LIGHTSEQ)
    left = times.forward.lower_s - times.full.kernels.lower_s
    assert left == pytest.approx(core(FORWARD) + split.forward.extra.lower_s, rel=1e-9)
    assert times.full.exchange[CONTEXT] == 0 < times.exchange_forward[CONTEXT]
    ring = layer_times(step_of(), plan=plan_of(S.RING_ZIGZAG), on=H100, recipe=BF16)
    assert ring.full.kernels.lower_s == ring.forward.lower_s


@settings(max_examples=40, deadline=None)
@given(
    split=st.sampled_from(SOFTMAX),
    cp=st.sampled_from([4, 8]),
    tp=st.sampled_from([1, 2]),
    recompute=st.sampled_from([Recompute.NONE, Recompute.FULL]),
    len_seq=st.sampled_from([8192, 65536]),
)
def test_a_split_step_lies_between_its_bounds(
    split: S, cp: int, tp: int, recompute: Recompute, len_seq: int
) -> None:
    degree = min(cp, 8 // tp)
    plan = plan_of(split, cp=degree, tp=tp, recompute=recompute,
                   ulysses=2 if split == S.HYBRID else 1)  # fmt: skip
    step = step_of(batch=4, len_seq=len_seq)
    e = run(step, plan)
    assert e.lower_s <= e.seconds * (1 + 1e-12) and e.seconds <= e.upper_s * (1 + 1e-12)
    assert 0 < e.mfu_frac <= 1
    # The sum of pieces lets no kernel that hides a ring hide gradients; the engine does.
    timed = simulate_training(step, plan=plan, on=H100, recipe=BF16).seconds
    assert 0.98 * float(e.seconds - e.seconds_by_piece[DATA]) <= timed <= 1.02 * float(e.seconds)


def test_arrays_of_splits_are_the_plans_one_by_one() -> None:
    plans = [plan_of(s, cp=cp, zero_stage=1, recompute=r, ulysses=2 if s == S.HYBRID else 1)
             for s in SOFTMAX for cp in (4, 8) for r in (0, 2)] + [Plan()]  # fmt: skip
    together = Plan(**{f.name: np.array([float(getattr(p, f.name)) for p in plans])
                       for f in fields(Plan)})  # fmt: skip
    step = step_of()
    seconds = np.asarray(run(step, together).seconds)
    held = np.asarray(training_memory(step, plan=together, recipe=BF16).total)
    for i, plan in enumerate(plans):
        assert seconds[i] == pytest.approx(float(run(step, plan).seconds), rel=1e-12), plan
        alone = training_memory(step, plan=plan, recipe=BF16).total
        assert held[i] == pytest.approx(float(alone), rel=1e-12), plan


def test_prefill_shares_its_prompt() -> None:
    """The ring's kernels and the excess of its sends, in serving too."""
    prompt = prefill_step(LLAMA, batch=1, len_context=65536)
    seconds = {
        s: float(inference_step(prompt, plan=plan_of(s), on=H100, recipe=BF16).seconds)
        for s in (S.RING_ZIGZAG, S.RING_CONTIGUOUS, S.ULYSSES)
    }
    assert seconds[S.RING_CONTIGUOUS] > 1.3 * seconds[S.RING_ZIGZAG]
    shown = inference_step(prompt, plan=plan_of(S.ULYSSES), on=H100, recipe=BF16)
    assert shown.seconds_by_piece[CONTEXT] > 0


# ---- memory --------------------------------------------------------------------------------


def parts(split: S, cfg: TransformerConfig = LLAMA, **given: int) -> dict[str, float]:
    found = training_memory(step_of(cfg), plan=plan_of(split, **given), recipe=BF16)
    return {k: float(v) for k, v in found.bytes_by_part.items()}


def test_buffers_by_hand() -> None:
    q = o = 8192 * 4096 * 2
    kv, rows = q / 2, 8192 * 32 * 4
    expected = {
        S.RING_ZIGZAG: 2 * kv, S.RING_STRIPED: 2 * kv, S.RING_CONTIGUOUS: 2 * kv,
        S.RING_SELF_ATTENTION: 2 * kv, S.LIGHTSEQ: 2 * (kv + q + o + rows),
        S.TOKEN_RING: 2 * (q + o + rows), S.ULYSSES: q + kv + o, S.HYBRID: q + kv + o + 2 * kv,
    }  # fmt: skip
    assert {s: parts(s)["sequence exchange"] for s in SOFTMAX} == expected
    states = 8 * 16 * 128 * 128 * 2
    assert parts(S.LASP2, LINEAR)["sequence exchange"] == states
    keys = 65536 * 2 * 2048 * 2
    assert parts(S.LASP2H, MIXED)["sequence exchange"] == states + keys


def test_what_a_split_keeps() -> None:
    """Scores of all keys; LightSeq's outputs and statistics; LASP-2's sums of states."""
    ring = parts(S.RING_ZIGZAG)["activations"]
    scores = 32 * (32 * 8192 * 65536 * 2 - 32 * 8192 * 4)  # layers; scores, less their logsumexp
    assert parts(S.RING_SELF_ATTENTION)["activations"] - ring == scores
    assert parts(S.LIGHTSEQ)["activations"] == ring == parts(S.ULYSSES)["activations"]
    full = {s: parts(s, recompute=2)["activations"] for s in (S.RING_ZIGZAG, S.LIGHTSEQ)}
    assert full[S.LIGHTSEQ] - full[S.RING_ZIGZAG] == 32 * 8192 * (4096 * 2 + 32 * 4)
    whole = parts(S.LASP2, LINEAR)["activations"] - parts(S.ULYSSES, LINEAR)["activations"]
    assert whole == 16 * 16 * 128 * 128 * 2


# ---- the planner ---------------------------------------------------------------------------


def test_the_planner_finds_the_best_split() -> None:
    """All ways to split a sequence on the nodes, the fastest first; none is faster than it."""
    step, on = step_of(len_seq=131072, batch=4), catalog.cluster("hgx-h100", nodes=2)
    usual = plan_parallelism(step, on=on)
    every = plan_parallelism(step, on=on, splits=all_splits())
    assert every.num_evaluated > 5 * usual.num_evaluated
    assert float(every.best.step.seconds) <= float(usual.best.step.seconds)
    one = plan_parallelism(step, on=on, splits=Splits(of=(S.ULYSSES,), whole=False))
    assert set(np.asarray(one.feasible.sequence)) == {float(S.ULYSSES)}
    assert float(every.best.step.seconds) <= float(one.best.step.seconds)
    assert 1 not in set(np.asarray(one.feasible.cp))


def test_a_hybrid_is_searched_in_all_its_degrees() -> None:
    step, on = step_of(batch=2), catalog.cluster("hgx-h100", nodes=2)
    hybrid = Splits(of=(S.HYBRID,), whole=False)
    found = plan_parallelism(step, on=on, splits=hybrid, pins={"cp": 16})
    assert set(np.asarray(found.feasible.ulysses)) == {2.0, 4.0, 8.0}
    pinned = plan_parallelism(step, on=on, splits=hybrid, pins={"cp": 16, "ulysses": 8})
    assert pinned.plan.ulysses == 8


@pytest.mark.parametrize(
    ("splits", "pins", "rule"),
    [
        (Splits(of=(S.ULYSSES,), whole=False), {"cp": 16}, "must divide the 8 key and value heads"),
        (Splits(of=(S.RING_ZIGZAG,), whole=False), {"cp": 1}, "nobody to share"),
        (Splits(of=(S.LASP2,), whole=False), {}, "softmax attention"),
        (Splits(), {"sequence": 77}, "is no way to split"),
        (Splits(), {"ulysses": 2}, "belongs to the hybrid"),
    ],
)
def test_what_no_plan_can_do(splits: Splits, pins: dict[str, int], rule: str) -> None:
    on = catalog.cluster("hgx-h100", nodes=2)
    with pytest.raises(InputError, match=rule):
        plan_parallelism(step_of(), on=on, splits=splits, pins=pins)


def test_a_linear_model_is_planned_with_gathered_states() -> None:
    step = step_of(LINEAR, batch=1, len_seq=2**19)
    found = plan_parallelism(step, on=catalog.cluster("hgx-h100", nodes=2))
    used = np.asarray(found.feasible.sequence)[np.asarray(found.feasible.cp) > 1]
    assert set(used) == {float(S.LASP2)}
    with pytest.raises(InputError, match="not modelled"):
        prefill_step(LINEAR, batch=1, len_context=8192)
