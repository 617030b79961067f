"""What published precision labels stand for, and the fit of low-precision factors."""

from __future__ import annotations

import copy
import datetime
from dataclasses import replace

import pytest

from hwmodels.errors import InputError
from hwmodels.step_factors import LOW_PRECISION_FILE, read_step_factors, shipped_factors
from simulator.recipe import RECIPES
from simulator.stack import prior_of
from tests.validate.test_steps import training_row
from validate.adapters import Uncounted
from validate.low_precision_fit import document, fit, free_names, low_precision_runs
from validate.measurement import Measurement
from validate.precisions import recipe_name
from validate.runs import Run, run
from validate.step_accuracy import step_accuracy
from validate.step_fit import predicted_s
from validate.trainers import trainer_of

FROZEN = {"product/h100-sxm": 1.05, "attention": 1.0}


def row(label: str, source: str, **layout: object) -> Measurement:
    plan = {"microbatch": 2, "gradaccum": None, "globalbatch": 16, "recompute": None, "zero": None}
    made = training_row(10.0, source=source, layout=plan | layout)
    return replace(made, dtype=label)


@pytest.mark.parametrize(
    ("publisher", "label", "architecture", "name"),
    [
        ("torchtitan", "fp8_linear", "Hopper", "fp8-tensorwise"),
        ("torchtitan", "fp8_rowwise", "Hopper", "fp8-rowwise"),
        ("llm-foundry", "fp8", "Hopper", "fp8-delayed"),
        ("megatron-bridge", "fp8", "Blackwell", "fp8-current"),
        ("megatron-bridge", "mxfp8", "Blackwell", "mxfp8"),
        ("megatron-bridge", "fp8-mx", "Hopper", "fp8-blockwise"),
        ("megatron-bridge", "nvfp4", "Blackwell", "nvfp4"),
        ("anyone", "bf16", "", "bf16-grad16"),
        ("anyone", "fp8", "Hopper", None),  # whose fp8?
        ("torchtitan", "fp8-cs", "Hopper", None),
    ],
)
def test_labels(publisher: str, label: str, architecture: str, name: str | None) -> None:
    assert recipe_name(publisher, label, architecture) == name
    assert name is None or name in RECIPES


def test_a_label_nobody_explains_is_refused() -> None:
    with pytest.raises(Uncounted, match="no precision recipe for fp8 yet"):
        run(row("fp8", "somebody/2026"))


@pytest.mark.parametrize(
    ("layout", "label", "name", "zero"),
    [
        ({"fsdp": 0}, "fp8-cs", "megatron-bridge", 1),
        ({}, "fp8", "megatron-bridge", 1),
        ({"fsdp": 8}, "fp8-cs", "megatron-bridge", 3),
        ({"fsdp": 64}, "fp8-cs", "megatron-bridge-fsdp", 3),
        ({"fsdp": 0}, "nvfp4", "megatron-bridge-fp4", 1),
    ],
)
def test_what_is_assumed_of_megatron_bridge(
    layout: dict[str, int], label: str, name: str, zero: int
) -> None:
    found = trainer_of("megatron-bridge/25.11/pre-training", layout, label)
    assert found is not None and found.stack == name
    assert found.assumed == {"recompute": "none", "zero": zero}


def bridge() -> Run:
    made = run(row("fp8-cs", "megatron-bridge/25.11/pre-training"), assume=True)
    return replace(made, seconds=predicted_s(made, FROZEN))


def test_only_what_16_bit_steps_leave_open_is_fitted() -> None:
    made = bridge()
    assert free_names([made], FROZEN) == ["narrow/Hopper", "pointwise/fused", "quantise"]
    assert free_names([made], {"pointwise/fused": 1.0}) == ["narrow/Hopper", "quantise"]


def test_runs_at_the_priors_stay_there_and_slower_ones_move_up() -> None:
    made = bridge()
    at_priors = fit([made], FROZEN)
    for name, value in at_priors.items():
        assert value == pytest.approx(prior_of(name)[0], rel=2e-3)
    slower = fit([replace(made, seconds=1.2 * made.seconds)], FROZEN)
    assert all(slower[name] >= 0.99 * value for name, value in at_priors.items())
    told = predicted_s(made, {**FROZEN, **slower}) / made.seconds
    assert 1.1 < told < 1.2  # the priors hold a part of it back


def test_the_document_is_read_back_and_needs_low_precision_runs() -> None:
    made = row("fp8-cs", "megatron-bridge/25.11/pre-training")
    written = document([made], FROZEN, on=datetime.date(2026, 11, 21))
    assert written["num_runs"] == 1 and "narrow/Hopper" in written["factors"]
    with pytest.raises(InputError, match="no low-precision step"):
        document([row("bf16", "megatron-bridge/25.11/pre-training")], FROZEN,
                 on=datetime.date(2026, 11, 21))  # fmt: skip
    assert not low_precision_runs([])
    assert copy.copy(written)["rows"]


def test_the_shipped_file_holds_four_factors_that_no_other_file_has() -> None:
    low, dense = read_step_factors(LOW_PRECISION_FILE), shipped_factors()
    assert dense is not None and not set(low.values) & set(dense.values)
    assert len(low.values) <= 4
    assert all(0.5 < v / low.priors[n] < 2 for n, v in low.values.items())


def test_steps_in_a_narrow_format_are_a_family_of_their_own() -> None:
    layout = {"compile": 1, "recompute": "selective", "zero": 3}
    rows = [row(label, "torchtitan/2024-12", **layout) for label in ("fp8_linear", "bf16")]
    tables = {t.source for t in step_accuracy(rows)}
    assert tables == {
        "torchtitan 2024-12", "torchtitan fp8-tensorwise", "all dense", "all dense, 16 bits",
    }  # fmt: skip
