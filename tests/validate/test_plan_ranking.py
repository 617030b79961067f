"""The order of published alternatives: by-hand taus, noise, groups, and what is too small."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.validate.test_steps import training_row
from validate.measurement import Measurement
from validate.plan_ranking import (
    NOISE_FRAC,
    SAME_MODEL,
    SAME_STEP,
    Alternative,
    Group,
    Pairs,
    Ranking,
    line,
    main,
    plan_ranking,
)

TITAN = "torchtitan/made up"


def group(*times: tuple[float, float], fitted: int = 0) -> Group:
    found = [
        Alternative(
            layout=str(i), measured_s=m, predicted_s=p, fitted=i < fitted, mesh=(float(i > 0),)
        )
        for i, (m, p) in enumerate(times)
    ]
    return Group(scope=SAME_STEP, name="made up", alternatives=tuple(found))


def titan(value: float, **layout: object) -> Measurement:
    return training_row(value, source=TITAN, layout=dict(layout))


def test_tau_by_hand() -> None:
    # Of the pairs 12, 13, 23 the first is in the wrong order: (2 - 1) / 3.
    one = group((1.0, 2.0), (2.0, 1.5), (3.0, 3.0))
    assert one.pairs() == Pairs(agreeing=2, opposing=1)
    assert one.tau == pytest.approx(1 / 3)
    assert one.pairs().tau == pytest.approx(1 / 3)


def test_pairs_within_the_noise_count_only_where_asked() -> None:
    near = 1 + NOISE_FRAC / 2
    one = group((1.0, 2.0), (near, 1.0), (2.0, 3.0))
    assert one.pairs().num == 3 and one.pairs().opposing == 1
    assert one.pairs(NOISE_FRAC) == Pairs(agreeing=2)


def test_equal_predictions_order_nothing() -> None:
    assert group((1.0, 1.0), (2.0, 1.0)).pairs() == Pairs(tied=1)
    assert Pairs(tied=1).tau == 0
    assert group((1.0, 1.0), (2.0, 1.0), (3.0, 1.0)).tau is None


def test_a_group_of_two_has_no_tau_but_a_pair() -> None:
    two, three = group((1.0, 1.0), (2.0, 2.0)), group((1.0, 1.0), (2.0, 2.0), (3.0, 3.0))
    assert two.tau is None and two.pairs().num == 1 and three.tau == pytest.approx(1)
    ranking = Ranking(scope=SAME_STEP, groups=(two, three), num_alone=7)
    assert ranking.too_small == (two,) and ranking.pairs() == Pairs(agreeing=4)
    told = line(ranking)
    assert "1.00 (4)" in told and "kept" in told and "1 of two" in told and "7 questions" in told
    assert ranking.as_dict()["num_too_small"] == 1


def test_the_bar_is_held_against_clear_pairs() -> None:
    wrong = group((1.0, 2.0), (2.0, 1.0))
    assert Ranking(scope=SAME_STEP, groups=(wrong,), num_alone=0).kept is False
    assert Ranking(scope=SAME_STEP, groups=(), num_alone=1).kept is None


def test_pairs_that_no_fit_has_seen_and_of_other_meshes() -> None:
    one = group((1.0, 1.0), (2.0, 2.0), (3.0, 3.0), fitted=1)
    assert one.pairs(unseen=True).num == 1
    assert one.pairs(other_mesh=True).num == 2


@given(st.lists(st.floats(1, 100), min_size=3, max_size=6, unique=True))
def test_a_perfect_model_has_tau_one_and_its_mirror_minus_one(times: list[float]) -> None:
    assert group(*((t, 3 * t) for t in times)).tau == pytest.approx(1)
    assert group(*((t, 1 / t) for t in times)).tau == pytest.approx(-1)
    pairs = len(list(itertools.combinations(times, 2)))
    assert group(*((t, t) for t in times)).pairs().agreeing == pairs


def test_rows_of_one_question_are_one_group() -> None:
    rows = [
        titan(1.0, compile=1, zero=3),
        titan(1.5, compile=0, zero=3),
        training_row(9.0, source=TITAN, model={"layers": 9}, layout={"zero": 3}),
    ]
    same, wide = plan_ranking(rows, papers=False)
    assert (same.scope, wide.scope) == (SAME_STEP, SAME_MODEL)
    (found,) = same.groups
    assert [a.layout.split(", ")[-1] for a in found.alternatives] == [
        "torchtitan-compiled", "torchtitan",
    ]  # fmt: skip
    assert same.num_alone == 1 and found.pairs() == Pairs(agreeing=1)


def test_one_layout_told_twice_is_one_alternative() -> None:
    rows = [titan(1.0), titan(4.0, cpu_offload=None), titan(8.0, recompute="none")]
    (found,) = plan_ranking(rows, papers=False)[0].groups
    twice, once = found.alternatives
    assert (twice.num_rows, once.num_rows) == (2, 1)
    assert twice.measured_s / once.measured_s == pytest.approx(2 / 8)  # of 1 s and 4 s: 2 s


def test_papers_stand_beside_the_rows() -> None:
    assert plan_ranking([]) == ()
    with_papers, without = (
        plan_ranking([titan(1.0, zero=3)], papers=papers)[0] for papers in (True, False)
    )
    assert len(with_papers.groups) == 4 and not without.groups
    assert with_papers.pairs(NOISE_FRAC).tau == 1


def test_a_folder_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none")]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
