"""Layers whose activations are swapped, recomputed or chunked: counts by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16
from workloads.ops.training_layer import ChunkwiseLayer, SkeletalLayer

FAST = 2**18


def flops(op: SkeletalLayer | ChunkwiseLayer) -> float:
    return float(op.min_flops()[BF16])


def test_skeletal_activations_of_the_paper() -> None:
    """7B, 1M tokens, 32 layers: 4096 GiB (arXiv 2407.12117, section 3.1)."""
    op = SkeletalLayer(len_seq=2**20, num_heads=32, head_dim=128)
    assert 32 * op.skeletal_bytes() == 4096 * 2**30
    assert op.whole_bytes() * 8 == op.skeletal_bytes()


@given(st.floats(0, 1))
def test_what_is_not_swapped_is_computed_again(frac: float) -> None:
    op = SkeletalLayer(len_seq=1024, num_heads=8, head_dim=64, swap_frac=frac)
    forward, backward = op, op.over(backward=True)
    h = 512
    products, pairs = 24 * 1024 * h * h, 1024 * 1025 / 2
    assert flops(forward) == pytest.approx(products + 4 * h * pairs)
    again = (1 - frac) * (products - 8 * 1024 * h * h)  # all but the last product
    assert flops(backward) == pytest.approx(2 * products + 10 * h * pairs + again)
    assert op.work(FAST).host_bytes == pytest.approx(1024 * h * 2 * (2 + 14 * frac), abs=1)
    assert op.over(backward=True).work(FAST).host_bytes == op.work(FAST).host_bytes


def test_ranks_share_products_and_swaps() -> None:
    one = SkeletalLayer(len_seq=4096, num_heads=32, head_dim=128)
    eight = one.over(num_ranks=8)
    assert flops(eight) * 8 == flops(one)
    assert eight.swapped_bytes() * 8 == one.swapped_bytes()


def test_seco_runs_forward_twice_and_spaco_as_much_as_it_samples() -> None:
    seco = ChunkwiseLayer(len_seq=8192, num_heads=8, head_dim=64, chunk=512)
    only = seco.over(backward_frac=0.0)
    f = flops(only)
    h, tokens = 512, 8192
    assert f == pytest.approx(24 * tokens * h * h + 4 * h * tokens * 4097, rel=1e-12)
    linear, attention = 24 * tokens * h * h, 4 * h * tokens * 4097
    assert flops(seco) == pytest.approx(3 * linear + 4.5 * attention)
    assert flops(seco.over(frozen=False)) == pytest.approx(4 * linear + 4.5 * attention)
    quarter = flops(seco.over(backward_frac=0.25))
    assert quarter - f == pytest.approx((flops(seco) - f) / 4)


def test_chunks_see_on_average_half_of_the_keys() -> None:
    op = ChunkwiseLayer(len_seq=np.array([512.0, 1024.0]), num_heads=8, head_dim=64, chunk=512)
    assert op.mean_keys().tolist() == [257.0, 513.0]
    assert op.num_chunks().tolist() == [1.0, 2.0]
