"""Tilings of persistent recurrent kernels: the published facts, the rules again, refusals."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import catalog
from hwmodels.dtypes import FP8, FP32
from hwmodels.errors import InfeasibleError, InputError
from simulator.planners.integers import solve, solve_milp
from simulator.planners.rnn_tiling import (
    BACKWARD,
    COMMITTED,
    DIRECTIONS,
    FORWARD,
    RELEASED,
    Layer,
    Limits,
    binding_limits,
    committed_rules,
    largest_head_dim,
    limits_of,
    plan_rnn_tiling,
    released_rules,
)

A100 = Limits(num_sms=108, smem_bytes=165_000)
"""What autotune/constrint_test.constrint fixes, with one gate and 8 sequences."""


def one_gate(head: int) -> Layer:
    return Layer(head_dim=head, gates=1, batch=8)


def test_the_largest_head_of_the_committed_rules() -> None:
    choice = plan_rnn_tiling(one_gate(2912), on=A100, rules=COMMITTED)
    assert (choice.values["r_out"], choice.values["r_in"], choice.num_blocks) == (13, 8, 104)
    assert choice.head_dim == 2912
    assert largest_head_dim(one_gate(1), on=A100, rules=COMMITTED) == 2912


@pytest.mark.parametrize("head", range(2976, 3300, 16))
def test_the_committed_file_has_no_solution(head: int) -> None:
    assert not solve(committed_rules(one_gate(head), A100)).feasible


def test_the_wanted_size_of_the_file_is_refused_with_the_way_out() -> None:
    with pytest.raises(InfeasibleError, match="split the width into 2 heads") as why:
        plan_rnn_tiling(one_gate(2976), on=A100, rules=COMMITTED)
    text = str(why.value)
    assert "shared memory" in text and "SMs" in text and "2912" in text and "\n" not in text
    halves = Layer(head_dim=1488, num_heads=2, gates=1)
    assert plan_rnn_tiling(halves, on=A100, rules=COMMITTED).head_dim >= 1488


@pytest.mark.parametrize("head", [1024, 2048, 2816, 2912, 2928, 2976, 3072])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_highs_finds_or_refutes_the_same(head: int, direction: str) -> None:
    program = committed_rules(one_gate(head), A100, direction)
    chosen = solve_milp(program)
    answer = solve(program)
    assert (chosen is not None) == answer.feasible
    if chosen:
        assert chosen in [dict(row) for row in answer.rows()]


@settings(max_examples=40, deadline=None)
@given(
    head=st.integers(1, 100).map(lambda n: 16 * n), gates=st.sampled_from((1, 3, 4)),
    batch=st.sampled_from((8, 16, 64)), direction=st.sampled_from(DIRECTIONS),
)  # fmt: skip
def test_a_committed_tiling_keeps_every_rule(
    head: int, gates: int, batch: int, direction: str
) -> None:
    layer = Layer(head_dim=head, gates=gates, batch=batch)
    for v in solve(committed_rules(layer, A100, direction)).rows():
        rows, columns = (head, gates * head) if direction == FORWARD else (gates * head, head)
        blocks = v["r_out"] * v["r_in"] * v["b_blocks"]
        assert columns % (v["r_out"] * 32) == 0 and rows % v["r_in"] == 0
        assert columns * v["w_in"] <= 1024 * v["r_out"]
        assert v["w_batch"] * 8 * v["b_blocks"] == batch and blocks <= 108
        matrix = 2 * gates * head**2 + 2 * columns * 8
        sums = 4 * v["r_in"] * columns + 4 * v["r_in"] * 8 * (gates if direction == FORWARD else 1)
        assert v["b_blocks"] * (matrix + sums) <= 165_000 * blocks


@settings(max_examples=40, deadline=None)
@given(
    head=st.integers(1, 170).map(lambda n: 16 * n), heads=st.sampled_from((1, 3, 12)),
    direction=st.sampled_from(DIRECTIONS), device=st.sampled_from(("h100-sxm", "a100-sxm4-80gb")),
)  # fmt: skip
def test_a_released_tiling_keeps_every_rule(
    head: int, heads: int, direction: str, device: str
) -> None:
    layer = Layer(head_dim=head, num_heads=heads, gates=4, batch=16)
    limits = limits_of(catalog.device(device))
    answer = solve(released_rules(layer, limits, direction))
    rows, columns = (head, 4 * head) if direction == FORWARD else (4 * head, head)
    for v in list(answer.rows())[:50]:
        per_head = v["r_out"] * v["r_in"] * v["b_blocks"]
        threads = 32 * v["warps"] * v["w_batch"]
        t_batch = 256 // v["t_out"]
        assert per_head * v["heads_beside"] <= limits.num_sms and heads % v["heads_beside"] == 0
        assert threads <= 256
        assert v["warps"] * v["r_out"] * v["l_out"] * v["t_out"] == v["w_in"] * columns
        assert rows % (v["r_in"] * v["w_in"] * 16) == 0
        sequences = v["w_batch"] * v["b_blocks"] * v["l_batch"] * t_batch
        assert 16 % sequences == 0
        cached = 16 * v["t_out"] * v["cached"] * v["warps"]
        fragments = v["warps"] * v["w_batch"] * (512 * v["l_batch"] + 16 * t_batch)
        assert 2 * (cached + fragments) <= limits.register_bytes
        weights = 2 * v["b_blocks"] * (4 * head**2 + 8 * columns) + 64
        in_registers = 2 * cached * per_head
        assert in_registers < weights
        sums = 4 * v["w_in"] * v["r_in"] * sequences * (columns + 8 * v["r_out"])
        assert weights - in_registers + sums <= limits.smem_bytes * per_head


def test_registers_take_the_released_kernel_beyond_shared_memory() -> None:
    """Four gates on 132 SMs: 2 x 4 x 2688^2 B, 58 MB, of which shared memory holds 30."""
    h100 = catalog.device("h100-sxm")
    largest = largest_head_dim(Layer(head_dim=1, batch=16), on=h100, directions=DIRECTIONS)
    assert largest == 2688
    limits = limits_of(h100)
    assert 8 * largest**2 > 1.9 * limits.num_sms * limits.smem_bytes
    assert plan_rnn_tiling(Layer(head_dim=2560), on=h100).head_dim == 2560  # max_head_dim.ipynb


def test_the_authors_benchmark_spreads_every_head_over_blocks() -> None:
    choice = plan_rnn_tiling(
        Layer(head_dim=64, num_heads=12, batch=16), on=catalog.device("h100-sxm")
    )
    assert choice.values["heads_beside"] == 12 and choice.values["r_out"] == 8
    assert choice.num_blocks == 96 and choice.num_solutions > 1


def test_a_head_is_padded_to_the_next_that_fits() -> None:
    choice = plan_rnn_tiling(Layer(head_dim=50), on=catalog.device("h100-sxm"))
    assert choice.head_dim == 64 and choice.layer.head_dim == 50


def test_more_memory_or_sms_hold_larger_heads() -> None:
    layer = Layer(head_dim=1)
    sizes = [largest_head_dim(layer, on=Limits(num_sms=n, smem_bytes=160_000)) for n in (16, 64)]
    memory = [largest_head_dim(layer, on=Limits(num_sms=64, smem_bytes=s)) for s in (6e4, 2e5)]
    assert sizes[0] < sizes[1] and memory[0] < memory[1]


@pytest.mark.parametrize("device", ["t4", "v100-sxm2-16gb", "h200-sxm", "b200-sxm", "l40s"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_device_has_an_answer(device: str, direction: str) -> None:
    on = catalog.device(device)
    largest = largest_head_dim(Layer(head_dim=1), on=on, directions=(direction,))
    assert largest >= 256
    weights = 8 * largest**2
    limits = limits_of(on)
    assert weights <= limits.num_sms * (limits.smem_bytes + limits.register_bytes)


def test_full_precision_halves_what_fits() -> None:
    on = catalog.device("a100-sxm4-80gb")
    half = largest_head_dim(Layer(head_dim=1, batch=16), on=on)
    full = largest_head_dim(Layer(head_dim=1, batch=16, dtype=FP32), on=on)
    assert half**2 / 3 < full**2 < half**2 / 1.5


def test_what_binds_is_named() -> None:
    on = catalog.device("h100-sxm")
    assert set(binding_limits(Layer(head_dim=1), 4096, on=on)) <= {
        "number of SMs", "registers", "shared memory", "threads of a block",
    }  # fmt: skip


def test_impossible_questions_are_refused() -> None:
    with pytest.raises(InputError, match="head_dim = 0"):
        Layer(head_dim=0)
    with pytest.raises(InputError, match="no kernel for fp8"):
        Layer(head_dim=64, dtype=FP8)
    with pytest.raises(InputError, match="rule set"):
        plan_rnn_tiling(Layer(head_dim=64), on=A100, rules="release")
    with pytest.raises(InputError, match="direction"):
        plan_rnn_tiling(Layer(head_dim=64), on=A100, direction="sideways")
    assert plan_rnn_tiling(Layer(head_dim=64), on=A100, direction=BACKWARD, rules=RELEASED)


def test_a_device_without_room_is_refused_without_a_vain_way_out() -> None:
    with pytest.raises(InfeasibleError, match="alternate two kernels") as why:
        plan_rnn_tiling(Layer(head_dim=64), on=Limits(num_sms=1, smem_bytes=0, register_bytes=0))
    assert "split" not in str(why.value)
