"""Stacks of attention, scans and convolutions: the planner against a loop over every layout."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.errors import InfeasibleError, InputError
from simulator.layer_modes import NONE, layer_kinds
from simulator.memory import training_memory
from simulator.planners import modes
from simulator.planners.figures import Question, figures_of, rank_limits
from simulator.planners.memory import swap_question
from simulator.planners.modes import LayerKind, Limits, Mode, best_modes
from simulator.planners.prices import mesh_program
from simulator.planners.program import solve
from simulator.planners.swap import COPY, HOST, KeptBytes, SwapKind, SwapQuestion, plan_swap
from simulator.planners.swap import program as swap_program
from simulator.planners.training import plan_training, training_space
from simulator.recipe import RECIPES
from simulator.staged import even_stages, stage_costs, staged_memory, staged_step
from simulator.step import training_step
from tests.simulator.planners.test_training import by_loop, node
from workloads.models.architecture import Moe, TransformerConfig
from workloads.models.config import load_hf_config
from workloads.models.transformer import TrainStep, train_step
from workloads.plan import Plan

BF16 = RECIPES["bf16"]
NAMES = ("bamba-9b", "jamba-v0.1", "qwen3-next-80b-a3b", "lfm2-1.2b")


def example(name: str) -> TransformerConfig:
    return load_hf_config(f"examples/{name}.json")


def small(name: str, mixed: tuple[int, ...], layers: int, experts: tuple[int, ...]) -> TrainStep:
    """A narrow stack of the example's layers, `mixed` of which have its mixer."""
    cfg = example(name)
    assert cfg.mixer is not None
    moe = None
    if cfg.moe is not None and experts:
        moe = replace(cfg.moe, num_experts=8, num_active=2, expert_ffn_dim=2048, layers=experts)
    cfg = replace(
        cfg, num_layers=layers, mixer_layers=mixed, moe=moe, vocab_size=32768,
        hidden_dim=2048, embedding_dim=2048, mlp=replace(cfg.mlp, ffn_dim=4096),
    )  # fmt: skip
    return train_step(cfg, len_seq=2048, global_batch=2)


CASES = [
    # model, layers with its mixer, all layers, layers with experts, budget GB, host GB of a node
    ("bamba-9b", (0, 1, 3), 4, (), 40.0, 0.0),
    ("bamba-9b", (0, 1, 3), 4, (), 5.4, 0.0),
    ("bamba-9b", (0, 1, 3), 4, (), 4.6, 0.0),
    ("bamba-9b", (2,), 3, (), 4.4, 8.0),
    ("bamba-9b", (1, 2), 3, (), 1.0, 0.0),
    ("lfm2-1.2b", (0, 1, 3), 4, (), 3.2, 0.0),
    ("lfm2-1.2b", (0, 2), 3, (), 2.7, 4.0),
    ("jamba-v0.1", (0, 2), 3, (1,), 8.4, 0.0),
    ("jamba-v0.1", (0, 1), 3, (1, 2), 8.0, 0.0),
    ("qwen3-next-80b-a3b", (0, 1, 2), 4, (0, 1, 2, 3), 10.0, 0.0),
    ("qwen3-next-80b-a3b", (0, 1), 3, (1, 2), 7.0, 0.0),
]


@pytest.mark.parametrize(("name", "mixed", "layers", "experts", "budget", "host"), CASES)
def test_a_hybrid_plan_is_that_of_a_loop(
    name: str,
    mixed: tuple[int, ...],
    layers: int,
    experts: tuple[int, ...],
    budget: float,
    host: float,
) -> None:
    step, on = small(name, mixed, layers, experts), node(2)
    pins = {"pp": 2, "micro_batch": 1}
    best = by_loop(step, on, budget * 1e9, host * 1e9, pins)
    ask = {"on": on, "budget_bytes": budget * 1e9, "host_bytes_per_node": host * 1e9, "pins": pins}
    if math.isinf(best):
        with pytest.raises(InfeasibleError):
            plan_training(step, **ask)  # type: ignore[arg-type]
        return
    found = plan_training(step, **ask)  # type: ignore[arg-type]
    assert float(found.best.step.seconds) == pytest.approx(best, rel=1e-9)
    assert (found.status, found.gap_frac) == ("optimal", 0.0)


def test_budgets_of_the_cases_ask_for_something() -> None:
    """Else a loop over modes proves nothing: some cases fit freely, some recompute, some not."""
    kinds = set()
    for name, mixed, layers, experts, budget, host in CASES:
        step, on = small(name, mixed, layers, experts), node(2)
        try:
            found = plan_training(
                step, on=on, budget_bytes=budget * 1e9, host_bytes_per_node=host * 1e9,
                pins={"pp": 2, "micro_batch": 1},
            )  # fmt: skip
        except InfeasibleError:
            kinds.add("none fits")
            continue
        kinds |= {m for s in found.best.stages for m in s.modes}
        kinds |= {"uneven" for _ in range(1) if len({s.num_layers for s in found.best.stages}) > 1}
    assert {"none fits", "none", "full", "uneven"} <= kinds


@pytest.mark.parametrize("name", NAMES)
def test_no_layout_beats_its_bound(name: str) -> None:
    step, on = train_step(example(name), len_seq=4096, global_batch=16), catalog.cluster("dgx-h100")
    asked = Question(step=step, on=on, recipe=BF16, limits=rank_limits(80e9, on))
    space = training_space(step, on=on)
    assert np.all(np.asarray(space.cp) == 1)  # states are not passed between ranks
    figures = figures_of(asked, space)
    rng = np.random.default_rng(7)
    for index in rng.integers(0, figures.size, 12):
        plan = figures.plan(int(index))
        costs = stage_costs(
            step, plan=plan, stages=even_stages(step, plan, NONE), on=on, recipe=BF16
        )
        seconds = float(staged_step(step, costs, plan=plan, on=on, recipe=BF16).seconds)
        assert figures.bounds[index] <= seconds * (1 + 1e-12)
        assert figures.least_bytes[index] <= float(staged_memory(costs).total) * (1 + 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_one_stage_is_the_sum_of_its_kinds(name: str) -> None:
    """Layer by layer or as mean layers: the same step and the same bytes."""
    step, on, plan = (
        train_step(example(name), len_seq=4096, global_batch=16),
        catalog.cluster("dgx-h100"), Plan(dp=4, tp=2, zero_stage=1),
    )  # fmt: skip
    costs = stage_costs(step, plan=plan, stages=even_stages(step, plan), on=on, recipe=BF16)
    staged = staged_step(step, costs, plan=plan, on=on, recipe=BF16)
    whole = training_step(step, plan=plan, on=on, recipe=BF16)
    assert float(staged.seconds) == pytest.approx(float(whole.seconds), rel=1e-9)
    memory = training_memory(step, plan=plan, recipe=BF16)
    assert float(staged_memory(costs).total) == pytest.approx(float(memory.total), rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_fullest_stage_is_no_larger_than_told(name: str) -> None:
    """Kinds alternate, so that any stage may be the fullest."""
    step = train_step(example(name), len_seq=4096, global_batch=16)
    for pp in (2, 4, 8):
        plan, on = Plan(dp=8 // pp, pp=pp), catalog.cluster("dgx-h100")
        costs = stage_costs(step, plan=plan, stages=even_stages(step, plan), on=on, recipe=BF16)
        told = float(training_memory(step, plan=plan, recipe=BF16).total)
        assert told >= float(staged_memory(costs).total) * (1 - 1e-12)


def test_kinds_of_a_stack_in_their_order() -> None:
    kinds, sequence = layer_kinds(example("jamba-v0.1"))
    assert [k.name for k in kinds] == ["dense", "dense mamba", "moe mamba"]
    assert sequence[:8] == (1, 2, 1, 2, 0, 2, 1, 2)
    for kind in kinds:
        assert kind.config.kinds == {kind.block: 32}


def test_pins_that_a_mixer_forbids() -> None:
    step = train_step(example("jamba-v0.1"), len_seq=4096, global_batch=16)
    on = catalog.cluster("dgx-h100")
    with pytest.raises(InputError, match=r"mamba layers .* give cp = 1"):
        plan_training(step, on=on, pins={"cp": 2})
    with pytest.raises(InputError, match="tp=3 does not divide the 32 heads of jamba"):
        plan_training(step, on=on, pins={"tp": 3})


# ---- swapping ------------------------------------------------------------------------------


def test_one_share_for_all_kinds_is_the_least_of_theirs() -> None:
    """Attention hides 8 of its 14 others, the scan 3 of 10: the scan binds; then the host does."""
    attention = KeptBytes(input=1.0, attention=1.0, others=14.0)
    scan = KeptBytes(input=1.0, attention=2.0, others=10.0)
    question = SwapQuestion(
        kept=KeptBytes(input=1.0, attention=1.5, others=12.0), layer_s=8.0, other_forward_s=4.0,
        link_bytes_per_s=1.0, host_bytes=1e9, num_layers=32, num_tokens=1000,
        kinds=(SwapKind(name="dense", kept=attention, layer_s=10.0),
               SwapKind(name="dense mamba2", kept=scan, layer_s=6.0)),
    )  # fmt: skip
    plan = plan_swap(question)
    assert (plan.alpha, plan.binding) == (pytest.approx(0.3), f"{COPY} (dense mamba2)")
    assert plan.device_bytes == 2 * 16.0
    tight = replace(question, host_bytes=30 * (2.5 + 0.1 * 12))
    assert (plan_swap(tight).alpha, plan_swap(tight).binding) == (pytest.approx(0.1), HOST)
    for one in (question, tight):
        assert solve(swap_program(one)).values["alpha"] == pytest.approx(plan_swap(one).alpha)


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_is_swapped_by_its_slowest_copy(name: str) -> None:
    step, on = train_step(example(name), len_seq=16384, global_batch=1), catalog.cluster("hgx-h100")
    question = swap_question(step, plan=Plan(tp=8), on=on, recipe=BF16, host_bytes=2e12)
    assert [k.name for k in question.kinds] == list(step.config.kinds)
    found = plan_swap(question)
    for kind in question.kinds:
        copied = kind.kept.input + kind.kept.attention + found.alpha * kind.kept.others
        assert copied / question.link_bytes_per_s <= kind.layer_s * (1 + 1e-9)


def test_examples_are_plain_configs() -> None:
    for name in NAMES:
        with open(f"examples/{name}.json") as file:
            assert json.load(file)["model_type"] == example(name).family


def test_a_mixture_asks_for_experts() -> None:
    moe = example("qwen3-next-80b-a3b").moe
    assert isinstance(moe, Moe) and (moe.num_experts, moe.num_active, moe.shared_gate) == (
        512, 10, True,
    )  # fmt: skip


def test_the_relaxed_mesh_names_kinds_and_modes() -> None:
    step, on = small("bamba-9b", (0, 1, 3), 4, ()), node(2)
    asked = Question(step=step, on=on, recipe=BF16, limits=rank_limits(5.4e9, on))
    figures = figures_of(asked, Plan(**{k: np.array([float(v)]) for k, v in vars_of(Plan(pp=2))}))
    names = set(mesh_program(figures.problem(0)).objective)
    assert any("dense mamba2,full" in name for name in names)


def vars_of(plan: Plan) -> list[tuple[str, float]]:
    return [(name, float(getattr(plan, name))) for name in plan.__dataclass_fields__]


# ---- modes of many kinds -------------------------------------------------------------------


def made_kinds(rng: np.random.Generator, number: int) -> list[LayerKind]:
    """Kinds of random times and sizes, some of which cannot go to the host."""
    kinds = []
    for k in range(number):
        t, kept, own = rng.uniform(1, 3), rng.uniform(1, 4), rng.uniform(0.05, 0.1)
        ways = [
            Mode(name="none", seconds=t, backward_s=t, kept_bytes=kept),
            Mode(name="offload", seconds=1.05 * t, backward_s=t, kept_bytes=0.0,
                 host_bytes=kept, working_bytes=2 * kept),
            Mode(name="full", seconds=1.33 * t, backward_s=t, kept_bytes=own,
                 working_bytes=kept),
            Mode(name="offload+full", seconds=1.34 * t, backward_s=t, kept_bytes=0.0,
                 host_bytes=own, working_bytes=kept + 2 * own),
        ]  # fmt: skip
        some = sorted(rng.choice(4, int(rng.integers(2, 5)), replace=False))
        kinds.append(
            LayerKind(name=str(k), forward_s=t / 3, modes=tuple(ways[int(i)] for i in some))
        )
    return kinds


def test_kinds_met_in_pairs_are_those_of_one_list(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(11)
    outcomes = set()
    for _ in range(150):
        number = int(rng.integers(2, 4))
        kinds, layers = made_kinds(rng, number), [int(n) for n in rng.integers(0, 5, number)]
        asked = {
            "in_flight": np.array([1.0, 2.0, 4.0]), "free_bytes": rng.uniform(0, 40, 3),
            "limits": Limits(budget_bytes=50, host_bytes=float(rng.choice([0, 5, 50])),
                             host_bytes_per_s=float(rng.choice([0.0, 2.0, 20.0]))),
        }  # fmt: skip
        found = []
        for most in (10**9, 0):
            monkeypatch.setattr(modes, "MOST_TOGETHER", most)
            found.append(best_modes(kinds, layers, **asked))  # type: ignore[arg-type]
        listed, met = found
        np.testing.assert_allclose(met.seconds, listed.seconds, rtol=1e-14)
        fits = np.isfinite(met.seconds)
        for own, other in zip(met.counts, listed.counts, strict=True):
            np.testing.assert_array_equal(own[fits], other[fits])
        outcomes |= set(fits.tolist())
    assert outcomes == {True, False}
