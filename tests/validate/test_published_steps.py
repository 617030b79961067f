"""Steps that papers publish: the eight of Korthikanti et al., table 5, as the model takes them."""

from __future__ import annotations

import pytest

from hwmodels.step_factors import shipped_factors
from validate.published_steps import KORTHIKANTI, korthikanti
from validate.report import step_model_markdown
from validate.runs import digest, read_runs
from validate.step_accuracy import published_accuracy
from workloads.models.parameters import count_parameters


def test_all_eight_are_runs_with_every_detail_of_their_plan() -> None:
    runs, others = read_runs(korthikanti())
    assert len(runs) == 8 and not others
    assert not [r for r in runs if r.assumed]
    sizes = [count_parameters(r.config).total / 1e9 for r in runs]
    assert sizes[::2] == sizes[1::2] == pytest.approx([22, 175, 530, 1008], rel=0.02)
    assert [int(r.plan.num_ranks) for r in runs[::2]] == [8, 64, 280, 512]
    assert {r.stack for r in runs} == {"megatron-2022", "megatron-2022-whole"}


def test_no_fit_has_seen_the_largest_two_models() -> None:
    factors = shipped_factors()
    assert factors is not None
    fitted = [digest(row) in factors.rows for row in korthikanti()]
    assert fitted == [True] * 4 + [False] * 4


def test_the_table_holds_the_paper_s_cases_within_their_bar() -> None:
    (table,) = published_accuracy()
    assert (table.source, table.n, table.fitted) == (KORTHIKANTI, 8, 4)
    assert table.mape < 0.03 and table.max_ape < 0.06
    assert table.mfu_mape is not None and table.mfu_mape > 4 * table.mape
    assert f"| {KORTHIKANTI} |" in step_model_markdown([table])
