"""Published plans against planned ones, on the table of Korthikanti et al. 2022."""

from __future__ import annotations

import pytest

from validate.plan_rows import compare_plans, main
from validate.published_steps import korthikanti


def test_no_published_plan_is_faster_than_the_planned_one() -> None:
    rows = [r for r in korthikanti() if r.params["num_gpus"] <= 64]
    found, others = compare_plans(rows)
    assert found and not others
    for one in found:
        assert one.ratio <= 1 + 1e-9 or not one.fits, one
        assert one.found_s > 0


def test_no_folder_is_no_question(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "FOLDER" in capsys.readouterr().err
