"""Steps whose stages differ against plain steps, by hand, and as a timeline."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from hwmodels import catalog
from hwmodels.errors import InputError
from hwmodels.step_factors import shipped_factors
from simulator.layer_modes import FULL, NONE, OFFLOAD, OFFLOAD_FULL, layer_kinds
from simulator.memory import training_memory
from simulator.recipe import RECIPES
from simulator.stack import STACKS, OnDevice, factors_of
from simulator.staged import (
    StageLayers,
    counted_stages,
    even_stages,
    stage_costs,
    staged_memory,
    staged_step,
)
from simulator.staged_timeline import simulate_staged
from simulator.step import training_step
from simulator.timeline import simulate_training
from workloads.models.config import load_hf_config
from workloads.models.transformer import train_step
from workloads.plan import Plan, Recompute

BF16 = RECIPES["bf16"]
ON = catalog.cluster("dgx-a100-80gb", nodes=4)
GPT = load_hf_config("examples/gpt3-175b.json")
STEP = train_step(replace(GPT, num_layers=24, hidden_dim=3072, embedding_dim=3072), len_seq=2048,
                  global_batch=96)  # fmt: skip


def framework(name: str) -> OnDevice | None:
    if name == "bound":
        return None
    shipped = shipped_factors()
    assert shipped is not None
    return OnDevice(stack=STACKS[name], factors=factors_of(STACKS[name], ON.device, shipped.values))


PLANS = [
    Plan(dp=4, tp=2, pp=4, micro_batch=1, zero_stage=1),
    Plan(dp=2, tp=4, pp=4, micro_batch=2, interleave=3, zero_stage=1),
    Plan(dp=8, tp=1, pp=2, cp=2, micro_batch=1, zero_stage=1),
    Plan(dp=16, tp=2, pp=1, micro_batch=2, zero_stage=3),
    Plan(dp=32, tp=1, pp=1, micro_batch=1, zero_stage=0),
]


@pytest.mark.parametrize(
    ("plan", "mode", "name"), list(product(PLANS, (NONE, FULL), ("bound", "megatron")))
)
def test_equal_stages_are_what_plain_steps_say(plan: Plan, mode: str, name: str) -> None:
    stack = framework(name)
    costs = stage_costs(
        STEP, plan=plan, stages=even_stages(STEP, plan, mode), on=ON, recipe=BF16, stack=stack
    )
    found = staged_step(STEP, costs, plan=plan, on=ON, recipe=BF16, stack=stack)
    asked = replace(plan, recompute=int(Recompute.FULL if mode == FULL else Recompute.NONE))
    plain = training_step(STEP, plan=asked, on=ON, recipe=BF16, stack=stack)
    assert float(found.seconds) == pytest.approx(float(plain.seconds), rel=1e-9)
    for piece, seconds in plain.seconds_by_piece.items():
        own = float(found.seconds_by_piece.get(piece, 0.0))
        assert own == pytest.approx(float(seconds), rel=1e-9, abs=1e-12), piece
    assert float(found.lower_s) == pytest.approx(float(plain.lower_s), rel=1e-9)
    assert float(found.upper_s) == pytest.approx(float(plain.upper_s), rel=2e-2)
    held = training_memory(STEP, plan=asked, recipe=BF16)
    assert float(staged_memory(costs).total) == pytest.approx(float(held.total), rel=1e-12)


def test_uneven_stages_by_hand() -> None:
    """1F1B: m times the slowest stage, and once each other one."""
    plan = Plan(dp=4, tp=4, pp=2, micro_batch=1)
    stages = tuple(StageLayers(counts={"dense": c}) for c in ({NONE: 9, FULL: 4}, {NONE: 11}))
    costs = stage_costs(STEP, plan=plan, stages=stages, on=ON, recipe=BF16)
    kept = stage_costs(STEP, plan=plan, stages=even_stages(STEP, plan), on=ON, recipe=BF16)
    layer_s = (kept[0].seconds - kept[0].seconds / 12) / 11  # no ends: the embedding is free
    assert costs[0].seconds > 13 * layer_s > costs[1].seconds - kept[1].seconds + 12 * layer_s
    step = staged_step(STEP, costs, plan=plan, on=ON, recipe=BF16)
    pieces = step.seconds_by_piece
    whole = sum(float(s) for s in pieces.values())
    after = float(pieces["data parallel"]) + float(pieces["optimizer"])
    sends = float(pieces["pipeline sends"])
    slowest, other = max(c.seconds for c in costs), min(c.seconds for c in costs)
    assert whole == pytest.approx(24 * slowest + other + sends + after, rel=1e-12)
    assert stages[0].num_layers == 13
    assert stages[0].modes == {NONE: 9, FULL: 4}


def test_offloading_holds_on_the_host_and_costs_copies() -> None:
    plan = Plan(dp=4, tp=4, pp=2, micro_batch=1)
    kept, away = (
        stage_costs(STEP, plan=plan, stages=even_stages(STEP, plan, mode), on=ON, recipe=BF16)
        for mode in (NONE, OFFLOAD)
    )
    activations = kept[0].bytes_by_part["activations"]
    assert away[0].host_bytes == pytest.approx(activations, rel=1e-12)
    assert away[0].bytes_by_part["activations"] == 0
    assert ON.device.hbm.bytes_per_s is not None
    copied = 12 * 2 * (activations / 2 / 12) / ON.device.hbm.bytes_per_s
    assert away[0].copy_s == pytest.approx(copied, rel=1e-12)
    assert away[0].seconds - kept[0].seconds == pytest.approx(copied, rel=1e-9)


@pytest.mark.parametrize("name", ["bound", "megatron"])
@pytest.mark.parametrize("plan", [p for p in PLANS if p.zero_stage])
def test_the_timeline_of_equal_stages_is_the_plain_one(plan: Plan, name: str) -> None:
    stack = framework(name)
    stages = even_stages(STEP, plan)
    found = simulate_staged(STEP, plan=plan, stages=stages, on=ON, recipe=BF16, stack=stack)
    plain = simulate_training(STEP, plan=plan, on=ON, recipe=BF16, stack=stack)
    # A stage exchanges its own parameters, not those of the larger end stage.
    assert plain.seconds * (1 - 1e-3) <= found.seconds <= plain.seconds * (1 + 1e-9)


def test_the_timeline_of_uneven_stages_is_their_step() -> None:
    """Within the exchange that starts and ends the step."""
    plan = Plan(dp=4, tp=2, pp=4, micro_batch=1, zero_stage=1)
    counts = ({NONE: 3, FULL: 2}, {NONE: 4, OFFLOAD: 2}, {NONE: 7}, {OFFLOAD_FULL: 2, NONE: 4})
    stages = tuple(StageLayers(counts={"dense": c}) for c in counts)
    costs = stage_costs(STEP, plan=plan, stages=stages, on=ON, recipe=BF16)
    step = staged_step(STEP, costs, plan=plan, on=ON, recipe=BF16)
    found = simulate_staged(STEP, plan=plan, stages=stages, on=ON, recipe=BF16)
    assert found.seconds == pytest.approx(float(step.seconds), rel=0.02)


def test_kinds_follow_the_models_order() -> None:
    cfg = load_hf_config("examples/deepseek-v3.json")
    kinds, sequence = layer_kinds(cfg)
    assert [k.name for k in kinds] == ["dense", "moe"]
    assert sequence == (0,) * 3 + (1,) * 58
    hybrid = replace(load_hf_config("examples/llama3-8b.json"), num_linear_layers=24)
    kinds, sequence = layer_kinds(hybrid)
    assert [k.name for k in kinds] == ["dense", "dense linear"]
    assert sequence == (0, 1, 1, 1) * 8
    assert layer_kinds(hybrid, by_attention=False)[1] == (0,) * 32


def test_what_is_no_split_is_refused() -> None:
    plan = Plan(dp=4, tp=4, pp=2, micro_batch=1)
    one = StageLayers(counts={"dense": {NONE: 12}})
    short = StageLayers(counts={"dense": {NONE: 11}})
    other = StageLayers(counts={"moe": {NONE: 12}})
    for stages, words in (((one,), "1 stages"), ((one, short), "no split"), ((one, other), "kind")):
        with pytest.raises(InputError, match=words):
            stage_costs(STEP, plan=plan, stages=stages, on=ON, recipe=BF16)


def test_counted_stages_follow_the_models_order() -> None:
    """Three dense layers lead: interleaved, the second stage begins inside its first chunk."""
    deepseek = load_hf_config("examples/deepseek-v3.json")
    cfg = replace(deepseek, num_layers=10,
                  moe=replace(deepseek.moe, layers=tuple(range(3, 10))))  # type: ignore[type-var]  # fmt: skip
    step = train_step(cfg, len_seq=2048, global_batch=8)
    plain = counted_stages(step, Plan(pp=3), (2, 4, 4))
    assert [dict(s.counts) for s in plain] == [
        {"dense": {NONE: 2}}, {"dense": {NONE: 1}, "moe": {NONE: 3}}, {"moe": {NONE: 4}},
    ]  # fmt: skip
    first, second = counted_stages(step, Plan(pp=2, interleave=2), (4, 6), FULL)
    assert dict(first.counts) == {"dense": {FULL: 2}, "moe": {FULL: 2}}
    assert dict(second.counts) == {"dense": {FULL: 1}, "moe": {FULL: 5}}
    assert counted_stages(STEP, Plan(pp=4), (6,) * 4) == even_stages(STEP, Plan(pp=4))


@pytest.mark.parametrize(
    ("counts", "v", "said"),
    [
        ((12,), 1, "are 1 numbers of a plan with pp = 2; give 2, or pin pp=1"),
        ((12, 13), 1, "hold 25 layers, the model has 24; make the sum 24"),
        ((0, 24), 1, "leave one empty"),
        ((13, 11), 2, "do not divide into 2 chunks"),
    ],
)
def test_counts_that_are_no_stages(counts: tuple[int, ...], v: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        counted_stages(STEP, Plan(pp=2, interleave=v), counts)


def test_uneven_stages_wait_for_their_batch_and_take_no_dualpipe() -> None:
    plan = Plan(dp=4, tp=2, pp=4, micro_batch=1, zero_stage=1)
    asked = {"plan": plan, "stages": counted_stages(STEP, plan, (5, 6, 7, 6)), "on": ON,
             "recipe": BF16}  # fmt: skip
    free = simulate_staged(STEP, **asked)  # type: ignore[arg-type]
    late = simulate_staged(STEP, **asked, loading_s=2 * free.seconds)  # type: ignore[arg-type]
    assert late.seconds == 2 * free.seconds and free.stage_layers == (5, 6, 7, 6)
    with pytest.raises(InputError, match="dualpipe"):
        simulate_staged(STEP, **asked, schedule_name="dualpipe")  # type: ignore[arg-type]
