"""Length distributions and the cost of groups of sequences."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import catalog
from hwmodels.errors import InfeasibleError, InputError
from simulator.variable_length import (
    GroupCost,
    from_shares,
    lengths,
    memory_of_rank,
    predicted_cost,
)
from validate.claims.variable_length import flexsp_cluster, gpt

A100X64 = flexsp_cluster("a100-sxm4-40gb", 64, 400)


@given(
    frac=st.floats(0.5, 0.9),
    token_frac=st.floats(0.02, 0.3),
    limit=st.sampled_from([2.0**20, 2.0**21]),
)
@settings(max_examples=40, deadline=None)
def test_both_statements_hold_of_the_lognormal(
    frac: float, token_frac: float, limit: float
) -> None:
    found = from_shares(
        "x", below=(4096, frac), tokens_above=(2.0**18, token_frac), limit=limit, source="test"
    )
    assert found.below_frac(4096) == pytest.approx(frac, abs=1e-9)
    assert found.tokens_above_frac(2.0**18, limit=limit) == pytest.approx(token_frac, abs=1e-9)


def test_samples_have_the_stated_shares_and_are_the_same_again() -> None:
    corpus = lengths("github")
    held = corpus.sample(400_000, limit=2**21, seed=3)
    assert np.mean(held < 4096) == pytest.approx(0.8, abs=0.003)
    assert held[held > 2**18].sum() / held.sum() == pytest.approx(0.098, abs=0.03)
    assert np.array_equal(held, corpus.sample(400_000, limit=2**21, seed=3))


def test_samples_are_padded_and_end_at_the_limit() -> None:
    held = lengths("byted").sample(20_000, limit=100_000, seed=0, multiple=128)
    assert held.min() >= 128 and held.max() <= 100_000
    assert not np.any(held % 128)


@pytest.mark.parametrize("name", ["wikipedia", "common_crawl", "github"])
def test_every_corpus_names_its_source(name: str) -> None:
    assert "assumed" in lengths(name).source or "2502.21231" in lengths(name).source


def test_unknown_corpora_and_impossible_shares_are_refused() -> None:
    with pytest.raises(InputError, match="no corpus 'pile'"):
        lengths("pile")
    with pytest.raises(InputError, match="increasing lengths"):
        from_shares("x", below=(10, 0.5), tokens_above=(5, 0.5), limit=100, source="")
    with pytest.raises(InputError, match="no lognormal"):
        from_shares("x", below=(4096, 0.95), tokens_above=(2**18, 0.5), limit=2**20, source="")
    with pytest.raises(InputError, match="at least"):
        lengths("github").sample(0, limit=100, seed=0)


def test_a_group_costs_what_the_equation_says() -> None:
    cost = GroupCost(
        square_s=2.0, token_s=3.0, fixed_s=5.0, exchange_s={1: 0.0, 2: 0.5}, rank_tokens=10
    )
    # (2 * 16 + 3 * 4 + 2 * 4 + 3 * 2) / 2 + 0.5 * 6 + 5
    assert cost.group_s(np.array([4, 2]), 2) == 37.0
    assert cost.capacity_tokens(2) == 20 and cost.least_degree(11) == 2
    with pytest.raises(InfeasibleError, match="does not fit"):
        cost.least_degree(21)


def test_predicted_coefficients_are_near_the_profiled_ones() -> None:
    """FlexSP's own profile of GPT-7B on 64 A100-40GB: s, and GB/s of the all-to-alls."""
    cost = predicted_cost(gpt("7", 196608), on=A100X64, len_max=196608)
    assert cost.square_s == pytest.approx(5.128e-9, rel=0.05)
    assert cost.token_s == pytest.approx(0.18396e-3, rel=0.2)
    assert cost.fixed_s == pytest.approx(0.629, rel=0.35)
    moved = 8 * 32 * 4096 * 2 * 1e-9 / 1.048576  # the solver divides MiB by GB/s
    for degree, profiled in {16: 10.33, 32: 5.94, 64: 4.87}.items():
        assert moved / degree / cost.exchange_s[degree] == pytest.approx(profiled, rel=0.2)


def test_exchange_is_free_alone_and_dearer_between_nodes() -> None:
    cost = predicted_cost(gpt("7", 65536), on=A100X64, len_max=65536)
    total = [cost.exchange_s[d] * d for d in cost.degrees]
    assert total[0] == 0 and all(a < b for a, b in itertools.pairwise(total))
    assert total[4] > 5 * total[3]


@pytest.mark.parametrize("size", ["7", "13", "30"])
def test_the_longest_sequence_fits_with_the_least_recomputation(size: str) -> None:
    cfg = gpt(size, 393216)
    room = 0.92 * A100X64.device.hbm.capacity_bytes
    frac, tokens = memory_of_rank(cfg, num_ranks=64, len_max=393216, room=room)
    assert 64 * tokens >= 393216 * (1 - 1e-9)
    assert frac == 0 or math.isclose(64 * tokens, 393216, rel_tol=1e-6)
    assert (frac > 0) == (size != "7")


def test_what_does_not_fit_at_all_is_said() -> None:
    small = dataclasses.replace(A100X64, num_nodes=1)
    with pytest.raises(InfeasibleError, match="every layer recomputed"):
        memory_of_rank(gpt("30", 10**7), num_ranks=small.num_accelerators, len_max=10**7, room=37e9)


def test_recomputing_costs_attention_a_second_forward_pass() -> None:
    cfg, half = gpt("13", 393216), catalog.cluster("dgx-a100-80gb", nodes=8)
    tight = predicted_cost(cfg, on=A100X64, len_max=393216)
    wide = predicted_cost(cfg, on=half, len_max=393216)
    assert tight.recomputed_frac > 0 == wide.recomputed_frac
    assert 1 < tight.square_s / wide.square_s < 1 + tight.recomputed_frac


def test_byted_ends_in_sequences_of_two_million_tokens() -> None:
    """The paper's shares of the tokens: 44.3 % from 128K on, 37 % from 256K on, 12.1 % at 2M; of
    the sequences 1 % (rounded) reach 128K and 0.05 % reach 2M: 8.7 thousand tokens on average."""
    held = lengths("byted").sample(400_000, limit=2**21, seed=1).astype(float)
    total = held.sum()
    for length, share in ((2**17, 0.443), (2**18, 0.37)):
        assert held[held > length].sum() / total == pytest.approx(share, abs=0.02)
    assert held[held >= 2**21].sum() / total == pytest.approx(0.121, abs=0.02)
    assert (held > 2**17).mean() == pytest.approx(0.0075, rel=0.2)
    assert (held >= 2**21).mean() == pytest.approx(0.0005, rel=0.3)
    assert held.mean() == pytest.approx(8670, rel=0.1)


def test_a_tail_ends_at_the_limit() -> None:
    held = lengths("byted").sample(50_000, limit=2**19, seed=2)
    assert len(held) == 50_000 and held.max() <= 2**19
    assert (held > 2**18).any()
