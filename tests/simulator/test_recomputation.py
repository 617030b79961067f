"""What runs again in the backward pass: by hand for the layers of GPT and Llama."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hwmodels import catalog
from simulator.exchange import layer_exchanges
from simulator.recipe import RECIPES
from simulator.recomputation import (
    exchange_shares,
    full_shares,
    selective_exchange_shares,
    selective_shares,
)
from simulator.stack import STACKS, Factors, OnDevice
from simulator.step import layer_times, training_step
from workloads.models.config import TransformerConfig, load_hf_config
from workloads.models.transformer import TrainStep, train_step
from workloads.plan import Plan, Recompute
from workloads.workload import FORWARD, Node

LLAMA = load_hf_config("examples/llama3-8b.json")
STEP = train_step(LLAMA, len_seq=4096, global_batch=16)
NODE = catalog.cluster("hgx-h100")
TITAN, FOUNDRY, OLD = (
    STACKS[n] for n in ("torchtitan-compiled", "llm-foundry", "llm-foundry-torch1")
)


def forward(plan: Plan, step: TrainStep = STEP) -> tuple[Node, ...]:
    return step.layer("dense", plan).select(phase=FORWARD)


def shares_of(plan: Plan, cfg: TransformerConfig = LLAMA) -> dict[str, float]:
    nodes = forward(plan)
    found = selective_shares(nodes, TITAN, cfg, plan)
    return {n.name: float(s) for n, s in zip(nodes, found, strict=True)}


def test_recomputation_ends_before_the_layer_s_last_product() -> None:
    nodes = forward(Plan())
    assert full_shares(nodes, OLD) == full_shares(nodes, None) == [1.0] * len(nodes)
    left = [n.name for n, s in zip(nodes, full_shares(nodes, FOUNDRY), strict=True) if not s]
    assert left == ["down", "mlp_residual"]


def test_of_every_second_product_k_out_and_up_run_again() -> None:
    """q (4096), k, v (1024 each); gate, up, down: the second, fourth and sixth are not kept."""
    found = shares_of(Plan())
    assert found["qkv"] == pytest.approx(1024 / 6144)
    assert (found["out"], found["up"], found["down"]) == (1, 0.5, 0)
    assert found["attention"] == 0
    assert all(found[n] == 1 for n in ("attention_norm", "mlp_norm", "rope", "activation"))
    assert found["mlp_residual"] == 0 < found["attention_residual"]


def test_what_is_scattered_behind_out_is_kept() -> None:
    assert shares_of(Plan(tp=8))["out"] == 0
    plans = Plan(tp=np.array([1.0, 8.0]))
    nodes = forward(plans)
    found = selective_shares(nodes, TITAN, LLAMA, plans)
    out = dict(zip((n.name for n in nodes), found, strict=True))["out"]
    assert np.asarray(out).tolist() == [1, 0]


def test_collectives_that_are_repeated() -> None:
    """Gather, scatter, gather, scatter: the last is behind the last product."""
    exchanges = layer_exchanges(LLAMA, "dense", len_seq=4096, plan=Plan(tp=8), element_bytes=2)
    kinds = [e.collective.kind for e in exchanges]
    assert kinds == ["all_gather", "reduce_scatter"] * 2
    assert exchange_shares(exchanges, OLD) == [1, 1, 1, 1]
    assert exchange_shares(exchanges, TITAN) == [1, 1, 1, 0]
    assert selective_exchange_shares(exchanges, TITAN) == [1, 0, 1, 0]
    assert selective_exchange_shares(exchanges, STACKS["megatron-2022"]) == [0, 0, 0, 0]


@pytest.mark.parametrize("plan", [Plan(micro_batch=2), Plan(tp=8, micro_batch=2)])
def test_early_stop_saves_the_last_product_and_its_collective(plan: Plan) -> None:
    def seconds(name: str, recompute: Recompute) -> float:
        on_device = OnDevice(stack=STACKS[name], factors=Factors())
        asked = dataclasses.replace(plan, recompute=recompute)
        e = training_step(STEP, plan=asked, on=NODE, recipe=RECIPES["bf16"], stack=on_device)
        return float(e.seconds)

    none, whole = (seconds(OLD.name, r) for r in (Recompute.NONE, Recompute.FULL))
    early = seconds(FOUNDRY.name, Recompute.FULL)
    # Of gate, up, down, q, k, v, out, down is 27 % of the products: less of what else runs again.
    assert 0.73 < (early - none) / (whole - none) < 0.87


def test_without_early_stop_full_recomputation_is_the_forward_pass() -> None:
    on_device = OnDevice(stack=STACKS["megatron"], factors=Factors())
    t = layer_times(STEP, plan=Plan(tp=4), on=NODE, recipe=RECIPES["bf16"], stack=on_device)
    assert t.full.kernels == t.forward and t.full.exposed == t.exposed_forward
    assert float(t.selective.seconds) == 0  # fused attention writes no scores


def test_ranks_that_do_not_split_the_sequence_repeat_norms() -> None:
    whole, split = (
        {n.name: n.op for n in STEP.layer("dense", Plan(tp=8), sequence_parallel=sequence_parallel)}
        for sequence_parallel in (False, True)
    )
    for name in ("attention_norm", "mlp_norm.backward"):
        assert whole[name].rows == 8 * split[name].rows  # type: ignore[attr-defined]
    assert whole["up"] == split["up"]
