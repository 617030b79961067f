"""Prompts in rows: by hand, against every packing of small cases, and bounds that hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import InfeasibleError, InputError
from simulator.planners import prepacking
from simulator.planners.prepacking import (
    CONSTANT_VOLUME,
    FULLEST,
    Packing,
    constant_volume,
    fullest_rows,
    lower_rows,
    pack,
    pattern_program,
    row_program,
)
from simulator.planners.program import FEASIBLE, INFEASIBLE, OPTIMAL, solve

SMALL = st.lists(st.integers(1, 20), min_size=1, max_size=7)


def fewest(held: list[int], room: int) -> int:
    """Rows of the best packing, by trying every row for every prompt."""

    def least(k: int, rows: tuple[int, ...], best: int) -> int:
        if len(rows) >= best:
            return best
        if k == len(held):
            return len(rows)
        for r in range(len(rows)):
            if rows[r] + held[k] <= room:
                grown = (*rows[:r], rows[r] + held[k], *rows[r + 1 :])
                best = min(best, least(k + 1, grown, best))
        return min(best, least(k + 1, (*rows, held[k]), best))

    return least(0, (), len(held) + 1)


def check(found: Packing) -> None:
    assert (found.row_tokens <= found.room).all() and found.row_tokens.sum() == found.held.sum()
    assert found.lower_rows <= found.num_rows
    assert sorted(k for row in found.members() for k in row.tolist()) == list(
        range(len(found.held))
    )


@settings(max_examples=150, deadline=None)
@given(SMALL, st.integers(0, 10))
def test_the_proved_packing_is_the_best_of_all(held: list[int], spare: int) -> None:
    room = max(held) + spare
    found = pack(np.array(held), room)
    check(found)
    assert (found.num_rows, found.status) == (fewest(held, room), OPTIMAL)


@settings(max_examples=60, deadline=None)
@given(SMALL, st.integers(0, 10))
def test_heuristics_and_bounds_lie_on_their_sides(held: list[int], spare: int) -> None:
    room, lengths = max(held) + spare, np.array(held)
    best = fewest(held, room)
    assert -(-sum(held) // room) <= lower_rows(lengths, room) <= best
    for rows in (constant_volume(lengths, room), fullest_rows(lengths, room)):
        assert np.bincount(rows, weights=lengths).max() <= room
        assert best <= rows.max() + 1


def test_longest_first_is_not_always_best() -> None:
    """Best-fit decreasing takes 3 rows of 10 for {5, 4, 3, 3, 3, 2}; two hold all 20 tokens."""
    held = np.array([5, 4, 3, 3, 3, 2])
    paper, found = pack(held, 10, prove=False), pack(held, 10)
    assert (paper.num_rows, paper.lower_rows, paper.method) == (3, 2, CONSTANT_VOLUME)
    assert (paper.status, paper.gap_frac) == (FEASIBLE, pytest.approx(1 / 3))
    assert (found.num_rows, found.method, found.gap_frac) == (2, FULLEST, 0.0)


def test_patterns_prove_what_sums_do_not() -> None:
    """Three prompts of 4 in rows of 10: two fit one; 9 of them ask for 5 rows, tokens for 4."""
    held = np.full(9, 4)
    assert -(-held.sum() // 10) == 4
    found = pack(held, 10)
    assert (found.num_rows, found.lower_rows) == (5, 5)


def test_the_bound_of_patterns_is_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the two heuristics as they are and no search, generation closes a hard case."""
    held = np.array([409, 449, 397, 388, 402, 419, 273, 297, 262, 303, 258, 262, 318, 254, 341, 309,
                     340, 319])  # fmt: skip
    assert held.sum() == 6000
    found = pack(held, 1000)
    check(found)
    assert found.lower_rows >= 6
    monkeypatch.setattr(prepacking, "MOST_STEPS", 0)
    monkeypatch.setattr(prepacking, "MOST_CHOICES", 0)
    blind = pack(held, 1000)
    check(blind)
    assert blind.lower_rows <= found.lower_rows and blind.num_rows >= found.num_rows


def test_programs_agree() -> None:
    held = np.array([5, 4, 3, 3, 3, 2])
    found = pack(held, 10)
    assert solve(pattern_program(found)).objective == found.num_rows
    assert solve(row_program(found, 2)).status == OPTIMAL
    assert solve(row_program(found, 1), explain=False).status == INFEASIBLE


def test_what_is_saved_by_hand() -> None:
    """6 + 4 and 5 + 3 + 2 in two rows of 10: 20 tokens for 20, padded 5 x 6 = 30."""
    found = pack(np.array([6, 5, 4, 3, 2]), 10)
    assert (found.num_rows, found.len_row, found.num_tokens) == (2, 10, 20)
    assert found.padding_frac == 0 and found.saved_frac == pytest.approx(1 / 3)


def test_what_cannot_be_packed() -> None:
    with pytest.raises(InputError, match="at least one token"):
        pack(np.array([], dtype=np.int64))
    with pytest.raises(InputError, match="at least one token"):
        pack(np.array([3, 0]))
    with pytest.raises(InfeasibleError, match="prompt 2 of 9 tokens fits no row of 8"):
        pack(np.array([3, 9]), 8)
