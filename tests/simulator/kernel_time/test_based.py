"""Time of Based's kernels: what they grow with, by hand where it is simple."""

from __future__ import annotations

import pytest

from hwmodels import catalog
from simulator.kernel_time.predict import predict
from workloads.op import Op
from workloads.ops.based import Based
from workloads.ops.based_parallel import ParallelBased
from workloads.ops.causal_product import CausalProduct
from workloads.ops.prefix_linear_attention import PrefixLinearAttention

H100 = catalog.device("h100-sxm")


def seconds(op: Op) -> float:
    return float(predict(op, on=H100).seconds)


def test_heads_that_have_an_sm_each_cost_nothing_more() -> None:
    one, full = (Based(num_heads=n, len_seq=16384) for n in (1, 132))
    assert seconds(full) == pytest.approx(seconds(one), rel=0.02)
    assert seconds(one) == pytest.approx(256 * 7550 / 1.83e9, rel=0.01)
    twice, four = (seconds(full.over(batch=b)) for b in (2, 4))
    assert seconds(full) < twice < 1.5 * seconds(full)
    assert four == pytest.approx(2 * twice, rel=0.01)


def test_an_encoder_s_chunk_costs_less_than_a_decoder_s() -> None:
    causal = Based(num_heads=64, len_seq=8192)
    prefix = PrefixLinearAttention(num_heads=64, len_seq=8192, len_encoder=4096)
    assert seconds(prefix) / seconds(causal) == pytest.approx(1 + 0.74 / 2, rel=0.01)


def test_a_smaller_state_is_faster_but_not_in_proportion() -> None:
    full = Based(num_heads=132, len_seq=8192)
    half = seconds(full.over(symmetric=True)) / seconds(full)
    assert half == pytest.approx(0.25 + 0.75 * 136 / 256, rel=0.02)


def test_all_pairs_are_quadratic_and_tokens_linear() -> None:
    pairs = ParallelBased(batch=8, num_heads=16, len_seq=16384)
    assert seconds(pairs.over(len_seq=32768)) == pytest.approx(4 * seconds(pairs), rel=0.02)
    stepped = CausalProduct(batch=8, num_heads=16, len_seq=16384, key_dim=273)
    assert seconds(stepped.over(len_seq=32768)) == pytest.approx(2 * seconds(stepped), rel=0.01)
    by_hand = 128 * 16384 * 273 * 2 * 8 / (132 * 1.83e9)
    assert seconds(stepped) == pytest.approx(by_hand, rel=0.05)
