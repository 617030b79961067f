from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import InputError, UnknownNameError
from workloads.ops.collective import KINDS, Collective, algorithms
from workloads.ops.collective_rounds import Buffer, shard_lengths, simulate, two_trees

CASES = [(kind, algorithm) for kind in KINDS for algorithm in algorithms(kind)]


def buffers_for(kind: str, num_elements: int, num_ranks: int, seed: int) -> list[Buffer]:
    rng = np.random.default_rng(seed)
    lengths = [num_elements] * num_ranks
    if kind == "all_gather":
        lengths = list(shard_lengths(num_elements, num_ranks))
    return [rng.integers(-99, 99, length).astype(np.float64) for length in lengths]


def expected(kind: str, buffers: list[Buffer]) -> list[Buffer]:
    """What the collective must leave on every rank, without any algorithm."""
    n, size = len(buffers), buffers[0].size
    ends = np.cumsum(shard_lengths(size, n))[:-1]
    if kind == "all_reduce":
        return [np.sum(buffers, axis=0)] * n
    if kind == "all_gather":
        return [np.concatenate(buffers)] * n
    if kind == "reduce_scatter":
        return np.split(np.sum(buffers, axis=0), ends)
    if kind == "all_to_all":
        return [np.concatenate([np.split(b, ends)[r] for b in buffers]) for r in range(n)]
    if kind == "broadcast":
        return [buffers[0]] * n
    return [buffers[rank - 1] for rank in range(n)]


@pytest.mark.parametrize(("kind", "algorithm"), CASES)
@settings(max_examples=200, deadline=None)
@given(num_elements=st.integers(1, 100), num_ranks=st.integers(1, 33), seed=st.integers(0, 2**31))
def test_the_algorithm_sends_what_the_closed_form_says(
    kind: str, algorithm: str, num_elements: int, num_ranks: int, seed: int
) -> None:
    buffers = buffers_for(kind, num_elements, num_ranks, seed)
    kept = [b.copy() for b in buffers]
    done = simulate(kind, buffers, algorithm)
    closed = Collective(kind, num_elements, num_ranks, algorithm)
    assert max(done.sent_bytes) == closed.wire_bytes()
    assert done.num_steps == closed.num_steps()
    assert len(done.results) == num_ranks
    for got, want in zip(done.results, expected(kind, kept), strict=True):
        np.testing.assert_array_equal(got, want)
    for before, after in zip(kept, buffers, strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(("kind", "algorithm"), CASES)
def test_one_rank_sends_nothing(kind: str, algorithm: str) -> None:
    alone = Collective(kind, 1000, 1, algorithm)
    assert (alone.wire_bytes(), alone.num_steps()) == (0, 0)
    assert simulate(kind, [np.arange(3.0)], algorithm).results[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"])
@given(chunk=st.integers(1, 1000), num_ranks=st.integers(2, 64))
def test_ring_bytes_are_the_bus_factor_where_parts_are_equal(
    kind: str, chunk: int, num_ranks: int
) -> None:
    op = Collective(kind, chunk * num_ranks, num_ranks)
    assert op.wire_bytes() == pytest.approx(op.num_bytes * op.bus_factor(), rel=1e-12)


@given(parts=st.integers(1, 50), num_ranks=st.integers(2, 64))
def test_all_reduce_is_reduce_scatter_and_all_gather(parts: int, num_ranks: int) -> None:
    size = parts * 7
    whole = Collective("all_reduce", size, num_ranks)
    halves = [Collective(kind, size, num_ranks) for kind in ("reduce_scatter", "all_gather")]
    assert whole.wire_bytes() == sum(h.wire_bytes() for h in halves)
    assert whole.num_steps() == sum(h.num_steps() for h in halves)


def test_bus_factors_are_those_of_nccl_tests() -> None:
    factors = {kind: Collective(kind, 1, 8).bus_factor() for kind in KINDS}
    assert factors == {
        "all_reduce": 1.75,
        "all_gather": 0.875,
        "reduce_scatter": 0.875,
        "all_to_all": 0.875,
        "broadcast": 1,
        "send_recv": 1,
    }


def test_algorithms_on_a_node_of_eight() -> None:
    by_algorithm = {a: Collective("all_reduce", 800, 8, a) for a in algorithms("all_reduce")}
    assert {a: c.wire_bytes() for a, c in by_algorithm.items()} == {
        "ring": 1400,
        "tree": 1600,
        "nvls": 900,
    }
    assert {a: c.num_steps() for a, c in by_algorithm.items()} == {"ring": 14, "tree": 6, "nvls": 2}


@pytest.mark.parametrize("num_ranks", range(2, 130))
def test_both_trees_are_binary_and_share_no_inner_rank(num_ranks: int) -> None:
    children = []
    for parents in two_trees(num_ranks):
        for rank in range(num_ranks):  # every rank reaches the root
            at, hops = rank, 0
            while at:
                at, hops = parents[at], hops + 1
                assert hops <= num_ranks
        counts = np.bincount([p for r, p in enumerate(parents) if r], minlength=num_ranks)
        assert counts.max() <= 2
        assert counts[0] == 1
        children.append(counts[1:])
    assert not ((children[0] > 0) & (children[1] > 0)).any()


@pytest.mark.parametrize(("kind", "algorithm"), CASES)
def test_arrays_agree_with_scalars(kind: str, algorithm: str) -> None:
    ranks = np.arange(1, 300)
    sizes = np.random.default_rng(2).integers(0, 10**9, ranks.size)
    many = Collective(kind, sizes, ranks, algorithm)
    wire, steps, factors = many.wire_bytes(), many.num_steps(), many.bus_factor()
    for i, (size, n) in enumerate(zip(sizes.tolist(), ranks.tolist(), strict=True)):
        one = Collective(kind, size, n, algorithm)
        assert np.asarray(wire)[i] == one.wire_bytes()
        assert np.asarray(steps)[i] == one.num_steps()
        assert np.asarray(factors)[i] == one.bus_factor()


@pytest.mark.parametrize(("kind", "algorithm"), CASES)
@given(size=st.integers(0, 10**6), more=st.integers(0, 10**6), num_ranks=st.integers(1, 64))
def test_more_bytes_are_never_fewer_on_the_wire(
    kind: str, algorithm: str, size: int, more: int, num_ranks: int
) -> None:
    small, large = (Collective(kind, s, num_ranks, algorithm) for s in (size, size + more))
    assert small.wire_bytes() <= large.wire_bytes()
    assert small.num_steps() == large.num_steps()


def test_uneven_groups_and_empty_buffers_are_welcome() -> None:
    assert Collective("all_reduce", 3.0, 1.5).wire_bytes() == 2.0
    assert Collective("all_reduce", 0, 8).wire_bytes() == 0


@pytest.mark.parametrize("bad", [-1, float("nan"), float("inf"), "many", [4, -4]])
def test_bad_numbers_are_refused(bad: object) -> None:
    with pytest.raises(InputError, match="broadcast: num_bytes = "):
        Collective("broadcast", bad, 8)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="broadcast: num_ranks = "):
        Collective("broadcast", 8, bad)  # type: ignore[arg-type]


def test_no_ranks_and_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="at least 1"):
        Collective("broadcast", 8, 0)
    with pytest.raises(UnknownNameError, match="did you mean all_reduce"):
        Collective("allreduce", 8, 8)
    with pytest.raises(UnknownNameError, match="it has ring"):
        Collective("all_gather", 8, 8, "nvls")
    with pytest.raises(UnknownNameError):
        algorithms("gossip")


def test_unequal_shards_are_refused() -> None:
    with pytest.raises(InputError, match="shards must hold"):
        simulate("all_gather", [np.ones(1), np.ones(3)])
