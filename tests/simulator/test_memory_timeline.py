"""Live bytes over time: peaks by hand, peaks explained, agreement with the closed forms."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import InputError
from simulator.activation_memory import (
    FULL,
    SELECTIVE,
    SEQUENCE,
    SEQUENCE_SELECTIVE,
    TENSOR,
    first_stage_activation_bytes,
)
from simulator.memory import training_memory
from simulator.memory_timeline import (
    GRADIENTS,
    KEPT,
    OPTIMIZER,
    RECOMPUTED,
    WEIGHTS,
    StageOptions,
    Timeline,
    Trace,
    part_layers,
    stage_timeline,
)
from simulator.recipe import RECIPES
from simulator.schedule import SCHEDULES, schedule
from workloads.models.architecture import LAYER_NORM, Attention, Mlp, TransformerConfig
from workloads.models.config import load_hf_config
from workloads.models.parameters import parameters_per_rank
from workloads.models.transformer import train_step
from workloads.plan import Plan, Recompute

BF16 = RECIPES["bf16"]
LLAMA = load_hf_config("examples/llama3-8b.json")


def gpt(layers: int, hidden: int, heads: int) -> TransformerConfig:
    attention = Attention(num_heads=heads, num_kv_heads=heads, head_dim=hidden // heads,
                          qkv_bias=True, out_bias=True)  # fmt: skip
    return TransformerConfig(
        name="gpt", family="gpt2", hidden_dim=hidden, num_layers=layers, vocab_size=51200,
        attention=attention, norm=LAYER_NORM, tied_embeddings=True, num_positions=2048,
        mlp=Mlp(ffn_dim=4 * hidden, gated=False, activation="gelu", bias=True),
    )  # fmt: skip


FORMS = {
    TENSOR: (False, Recompute.NONE),
    SEQUENCE: (True, Recompute.NONE),
    SELECTIVE: (False, Recompute.SELECTIVE),
    SEQUENCE_SELECTIVE: (True, Recompute.SELECTIVE),
    FULL: (False, Recompute.FULL),
}


@pytest.mark.parametrize("mode", FORMS)
@settings(max_examples=12, deadline=None)
@given(
    pipeline=st.sampled_from([("1f1b", 1, 1), ("1f1b", 4, 1), ("zero_bubble", 4, 1),
                              ("interleaved", 4, 3), ("interleaved", 2, 2)]),
    tp=st.sampled_from([1, 2, 4]), micro_batch=st.integers(1, 3),
    len_seq=st.sampled_from([64, 256]),
)  # fmt: skip
def test_the_first_stage_peaks_at_the_closed_form(
    mode: str, pipeline: tuple[str, int, int], tp: int, micro_batch: int, len_seq: int
) -> None:
    name, pp, v = pipeline
    is_split, recompute = FORMS[mode]
    cfg = gpt(12, 256, 8)
    plan = Plan(tp=tp, pp=pp, interleave=v, micro_batch=micro_batch, recompute=recompute)
    line = stage_timeline(
        train_step(cfg, len_seq=len_seq, global_batch=8 * micro_batch), plan=plan, recipe=BF16,
        schedule=schedule(name, num_stages=pp, num_micro_batches=8, num_chunks=v),
        options=StageOptions(materialised=True, dropout=True, sequence_parallel=is_split),
    )  # fmt: skip
    closed = first_stage_activation_bytes(
        mode, len_seq=len_seq, batch=micro_batch, hidden_dim=256, num_heads=8, num_layers=12,
        tp=tp, pp=pp, interleave=v,
    )  # fmt: skip
    assert line.peak_of(KEPT) == pytest.approx(closed, rel=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("recompute", list(Recompute))
def test_every_schedule_frees_what_it_allocates_and_explains_its_peak(
    name: str, recompute: Recompute
) -> None:
    plan = Plan(pp=4, recompute=recompute)
    found = schedule(name, num_stages=4, num_micro_batches=8)
    step = train_step(LLAMA, len_seq=4096, global_batch=8)
    for stage in range(4):
        line = stage_timeline(step, plan=plan, recipe=BF16, schedule=found, stage=stage)
        alive = line.alive_at_peak()
        assert sum(a.num_bytes for a in alive) == pytest.approx(line.peak_bytes, rel=1e-12)
        assert sum(a.share_frac for a in alive) == pytest.approx(1, rel=1e-12)
        assert sum(e.num_bytes for e in line.tensors_at_peak()) == pytest.approx(line.peak_bytes)
        states = sum(a.num_bytes for a in alive if a.kind in (WEIGHTS, GRADIENTS, OPTIMIZER))
        assert line.live_bytes[-1] == pytest.approx(states, rel=1e-9)


def test_the_states_are_those_of_the_sum_over_parts() -> None:
    step = train_step(LLAMA, len_seq=4096, global_batch=32)
    for zero in (0, 1, 2, 3):
        plan = Plan(dp=4, tp=2, pp=2, zero_stage=zero)
        found = schedule("1f1b", num_stages=2, num_micro_batches=8)
        parts = training_memory(step, plan=plan, recipe=BF16).bytes_by_part
        line = stage_timeline(step, plan=plan, recipe=BF16, schedule=found)
        for kind in (WEIGHTS, GRADIENTS, OPTIMIZER):
            assert line.peak_of(kind) == pytest.approx(float(parts[kind]), rel=1e-6)
        assert line.peak_of(KEPT) == pytest.approx(float(parts["activations"]), rel=1e-9)


def test_both_ends_have_their_parameters() -> None:
    step = train_step(LLAMA, len_seq=128, global_batch=8)
    plan = Plan(pp=4)
    held = parameters_per_rank(LLAMA, plan)
    found = schedule("1f1b", num_stages=4, num_micro_batches=8)
    for stage, own in ((0, held[0]), (3, held[1])):
        line = stage_timeline(step, plan=plan, recipe=BF16, schedule=found, stage=stage)
        assert line.peak_of(WEIGHTS) == 2 * float(own.total)


def test_recompute_trades_kept_for_transient() -> None:
    step = train_step(LLAMA, len_seq=8192, global_batch=8)
    peaks = []
    for recompute in (Recompute.NONE, Recompute.FULL):
        line = stage_timeline(
            step, plan=Plan(recompute=recompute), recipe=BF16,
            schedule=schedule("1f1b", num_stages=1, num_micro_batches=8),
        )  # fmt: skip
        peaks.append((line.peak_bytes, line.peak_of(RECOMPUTED)))
    assert peaks[1][0] < peaks[0][0] and peaks[0][1] == 0 < peaks[1][1]


def test_headroom_and_replay() -> None:
    trace = Trace()
    trace.allocate("w", 2**30, kind=WEIGHTS)
    trace.allocate("nothing", 0, kind=KEPT)
    trace.free("nothing")
    line = trace.timeline()
    assert len(line.events) == 1
    assert line.headroom_bytes(2**31) == 2**30 and line.headroom_bytes(0) < 0
    assert line.replayed().peak_reserved_bytes == 2**30


def test_what_makes_no_timeline_is_refused() -> None:
    trace = Trace()
    trace.allocate("x", 1, kind=KEPT)
    with pytest.raises(InputError, match="allocated already"):
        trace.allocate("x", 1, kind=KEPT)
    with pytest.raises(InputError, match="not allocated"):
        trace.free("y")
    with pytest.raises(InputError, match="no peak"):
        Timeline(events=()).peak_index  # noqa: B018
    step = train_step(LLAMA, len_seq=128, global_batch=8)
    two = schedule("1f1b", num_stages=2, num_micro_batches=8)
    with pytest.raises(InputError, match="the plan 4"):
        stage_timeline(step, plan=Plan(pp=4), recipe=BF16, schedule=two)
    with pytest.raises(InputError, match="count from 0"):
        stage_timeline(step, plan=Plan(pp=2), recipe=BF16, schedule=two, stage=2)
    three = schedule("interleaved", num_stages=3, num_micro_batches=9, num_chunks=2)
    with pytest.raises(InputError, match="32 layers do not divide over 6"):
        stage_timeline(step, plan=Plan(pp=3, interleave=2), recipe=BF16, schedule=three)


def test_the_last_stage_holds_what_is_left() -> None:
    """32 layers on 3 stages: 11, 11 and 10, one micro-batch in flight on the last."""
    step = train_step(LLAMA, len_seq=128, global_batch=8)
    three = schedule("1f1b", num_stages=3, num_micro_batches=8)
    lines = [
        stage_timeline(step, plan=Plan(pp=3), recipe=BF16, schedule=three, stage=s)
        for s in range(3)
    ]
    assert [line.peak_of(KEPT) / lines[2].peak_of(KEPT) for line in lines] == pytest.approx(
        [3 * 11 / 10, 2 * 11 / 10, 1]
    )
    during, after = zip(*lines[0].by_pass(), strict=True)
    assert max(during) == lines[0].peak_bytes and len(during) == 16
    assert after[-1] == pytest.approx(sum(e.num_bytes for e in lines[0].events[:3]))


def test_stages_hold_the_layers_they_are_told() -> None:
    """12, 9, 7 and 4 layers: weights and what is kept follow, the ends stay where they are."""
    step = train_step(LLAMA, len_seq=128, global_batch=8)
    four = schedule("1f1b", num_stages=4, num_micro_batches=8)
    counts = (12, 9, 7, 4)
    lines = [
        stage_timeline(
            step, plan=Plan(pp=4), recipe=BF16, schedule=four, stage=s, stage_layers=counts
        )
        for s in range(4)
    ]
    kept = [line.peak_of(KEPT) / count for line, count in zip(lines, counts, strict=True)]
    assert [k / kept[3] for k in kept] == pytest.approx([4, 3, 2, 1])
    weights = [line.peak_of("weights") for line in lines]
    assert weights[1] / weights[2] == pytest.approx(9 / 7)
    whole = stage_timeline(
        step, plan=Plan(), recipe=BF16, schedule=schedule("1f1b", num_stages=1, num_micro_batches=8)
    )
    assert sum(weights) == pytest.approx(whole.peak_of("weights"))


@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_parts_hold_every_layer_once_and_in_order(p: int, v: int, data: st.DataObject) -> None:
    counts = [v * data.draw(st.integers(1, 5)) for _ in range(p)]
    name = "interleaved" if v > 1 else "1f1b"
    made = schedule(name, num_stages=p, num_micro_batches=p, num_chunks=v)
    parts = part_layers(made, sum(counts), counts)
    assert [layer for part in parts for layer in part] == list(range(sum(counts)))
    held = [sum(len(parts[chunk[s]]) for chunk in made.parts) for s in range(p)]
    assert held == counts


def test_counts_that_are_no_split_make_no_parts() -> None:
    two = schedule("interleaved", num_stages=2, num_micro_batches=2, num_chunks=2)
    for counts in ((5, 3), (4, 6), (4, 4.5)):
        with pytest.raises(InputError, match="do not divide"):
            part_layers(two, 8, counts)
    both = schedule("dualpipe", num_stages=2, num_micro_batches=4)
    with pytest.raises(InputError, match="do not divide"):
        part_layers(both, 8, (5, 3))
    assert part_layers(both, 8, (4, 4)) == (range(4), range(4, 8))
