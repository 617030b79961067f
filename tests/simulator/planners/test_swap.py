"""MEMO's swap fraction: closed form, program and the tensors it rests on."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import InfeasibleError, InputError
from simulator.planners.program import INFEASIBLE, OPTIMAL, solve
from simulator.planners.swap import (
    ALL,
    COPY,
    HOST,
    KeptBytes,
    SwapQuestion,
    kept_bytes,
    plan_swap,
    program,
    swap_frac,
)
from workloads.models.activations import layer_bytes
from workloads.models.config import load_hf_config
from workloads.plan import Plan

GPT = load_hf_config("examples/gpt2.json")


def question(**changes: float) -> SwapQuestion:
    """Sixteen units a layer, of which two always go; ten seconds at a unit a second."""
    base = SwapQuestion(
        kept=KeptBytes(input=1.0, attention=1.0, others=14.0), layer_s=9.0, other_forward_s=4.0,
        link_bytes_per_s=1.0, host_bytes=1e9, num_layers=32, num_tokens=1000,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_skeletal_activations_are_16_bsh() -> None:
    """4096 GiB for 32 layers of h = 4096 at 1M tokens in two bytes, as MEMO prints."""
    cfg = dataclasses.replace(
        GPT, hidden_dim=4096,
        attention=dataclasses.replace(GPT.attention, num_heads=32, num_kv_heads=32, head_dim=128),
        mlp=dataclasses.replace(GPT.mlp, ffn_dim=4 * 4096),
    )  # fmt: skip
    tokens = 2**20
    kept = kept_bytes(cfg, num_tokens=tokens, len_seq=tokens)
    unit, logsumexp = tokens * 4096 * 2, 4 * 32 * tokens
    assert (kept.input, kept.attention, kept.others) == (unit, unit + logsumexp, 14 * unit)
    assert 32 * (kept.total - logsumexp) == 4096 * 2**30
    sharded = kept_bytes(cfg, num_tokens=tokens, len_seq=tokens, plan=Plan(tp=8))
    assert sharded.total == kept.total / 8


@pytest.mark.parametrize("model", ["gpt2", "llama3-8b", "qwen3-30b-a3b", "gemma-2-9b"])
def test_parts_add_up_to_the_layer(model: str) -> None:
    cfg = load_hf_config(f"examples/{model}.json")
    kind = cfg.last_kind
    kept = kept_bytes(cfg, num_tokens=512, len_seq=512, kind=kind)
    assert kept.total == layer_bytes(cfg, batch=1, len_seq=512, kind=kind)
    assert kept.input == 512 * cfg.hidden_dim * 2


@pytest.mark.parametrize(
    ("changes", "alpha", "binding"),
    [
        ({}, 0.5, COPY),
        ({"layer_s": 100.0}, 1.0, ALL),
        ({"layer_s": 2.0}, 0.0, COPY),
        ({"host_bytes": 30 * 5.5}, 0.25, HOST),
        ({"host_bytes": 60.0}, 0.0, HOST),
        ({"num_layers": 2, "host_bytes": 0.0}, 0.5, COPY),
        ({"link_bytes_per_s": 2.0, "layer_s": 4.5}, 0.5, COPY),
    ],
)
def test_by_hand(changes: dict[str, float], alpha: float, binding: str) -> None:
    asked = question(**changes)
    found, row = swap_frac(asked)
    assert (found, row) == (pytest.approx(alpha, abs=1e-15), binding)
    linear = solve(program(asked))
    assert (linear.status, linear.values["alpha"]) == (OPTIMAL, pytest.approx(alpha, abs=1e-9))


@settings(max_examples=80, deadline=None)
@given(
    st.floats(1e6, 1e11), st.floats(1e6, 1e11), st.floats(1e6, 1e12), st.floats(1e-4, 10.0),
    st.floats(1e9, 9e11), st.floats(0, 1e13), st.integers(1, 128),
)  # fmt: skip
def test_closed_form_and_program_agree(
    kept_input: float, attention: float, others: float, layer_s: float, link: float, host: float,
    layers: int,
) -> None:  # fmt: skip
    asked = question(
        kept=KeptBytes(input=kept_input, attention=attention, others=others),  # type: ignore[arg-type]
        layer_s=layer_s, link_bytes_per_s=link, host_bytes=host, num_layers=layers,
    )  # fmt: skip
    linear = solve(program(asked), explain=False)
    try:
        alpha, _ = swap_frac(asked)
    except InfeasibleError:
        assert linear.status == INFEASIBLE
        return
    assert linear.status == OPTIMAL
    assert linear.values["alpha"] == pytest.approx(alpha, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.floats(2.0, 16.0), st.integers(1, 10**6))
def test_rounding_keeps_both_rows(layer_s: float, tokens: int) -> None:
    asked = question(layer_s=layer_s, num_tokens=tokens)
    found = plan_swap(asked)
    assert -1e-12 <= found.alpha - found.swapped_frac < 1 / tokens + 1e-12
    assert found.copy_s <= layer_s * (1 + 1e-9) and found.host_bytes <= asked.host_bytes
    more = dataclasses.replace(found, swapped_tokens=found.swapped_tokens + 1)
    assert found.swapped_tokens == tokens or more.copy_s > layer_s * (1 - 1e-9)


def test_prices_are_what_more_would_give() -> None:
    asked = question(host_bytes=30 * 5.5)
    found = solve(program(asked))
    assert found.duals is not None
    assert found.duals[COPY] == 0
    assert found.duals[HOST] == pytest.approx(1 / (30 * 14))
    more = swap_frac(question(host_bytes=30 * 5.5 + 1))[0] - swap_frac(asked)[0]
    assert found.duals[HOST] == pytest.approx(more)


def test_the_plan_tells_what_it_costs() -> None:
    found = plan_swap(question())
    assert (found.swapped_tokens, found.layer_bytes, found.host_bytes) == (500, 9.0, 270.0)
    assert (found.copy_s, found.recompute_s, found.device_bytes) == (9.0, 2.0, 32.0)
    assert plan_swap(question(num_layers=1)).device_bytes == 16.0


def test_what_cannot_go_is_named() -> None:
    with pytest.raises(InfeasibleError, match="copy hidden"):
        plan_swap(question(layer_s=1.9))
    with pytest.raises(InfeasibleError, match="host memory"):
        plan_swap(question(host_bytes=59.0))
    conflict = solve(program(question(host_bytes=59.0))).conflict
    assert conflict is not None and conflict.rows == (HOST,)
    for wrong in ({"layer_s": 0.0}, {"link_bytes_per_s": -1.0}, {"num_layers": 0},
                  {"host_bytes": -1.0}, {"num_tokens": 0}):  # fmt: skip
        with pytest.raises(InputError):
            question(**wrong)


def test_no_host_row_without_offloaded_layers() -> None:
    assert math.isfinite(plan_swap(question(num_layers=1, host_bytes=0.0)).alpha)


def test_a_pipeline_stage_holds_several_micro_batches() -> None:
    """Thirty units of host memory: four layers of two micro-batches take 8 (2 + 14 alpha)."""
    asked = question(num_layers=4, in_flight=2.0, last_kept=0, host_bytes=8 * 9.0)
    found, row = swap_frac(asked)
    assert (found, row) == (pytest.approx(0.5), COPY)
    tight = question(num_layers=4, in_flight=2.0, last_kept=0, host_bytes=8 * 5.5)
    assert swap_frac(tight) == (pytest.approx(0.25), HOST)
    assert plan_swap(tight).host_bytes == pytest.approx(44.0)
    linear = solve(program(tight))
    assert linear.values["alpha"] == pytest.approx(0.25)
    for wrong in ({"in_flight": 0.5}, {"last_kept": -1}):
        with pytest.raises(InputError):
            question(**wrong)
