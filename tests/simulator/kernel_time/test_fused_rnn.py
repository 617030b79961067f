"""Time of the persistent recurrent kernel: its chain by hand, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.errors import InputError
from simulator.estimate import estimate
from simulator.kernel_time.fused_rnn import CONSTANTS
from simulator.kernel_time.predict import predict
from workloads.ops.fused_rnn import FusedRnn

H100 = catalog.device("h100-sxm")
C = {c.name: c.start for c in CONSTANTS}
OP = FusedRnn(cell="lstm", batch=16, num_heads=12, head_dim=64, len_seq=1024)


def test_a_short_head_waits_for_barriers() -> None:
    """One product a warp: 1024 times barrier, step and fragment."""
    found = predict(OP, on=H100)
    chain = 1024 * (C["barrier_s"] + C["step_s"] + C["fragment_s"])
    assert found.seconds == pytest.approx(C["launch_s"] + chain, rel=1e-3)
    assert found.regime == "barriers"


def test_a_wide_head_has_products_one_after_another() -> None:
    """768 rows in 8 warps: 32 columns of a block are two warps, 192 rows each, 12 products."""
    wide = OP.over(num_heads=1, head_dim=768)
    assert predict(wide, on=H100).terms["products"] == pytest.approx(1024 * 12 * C["fragment_s"])


def test_heads_that_do_not_fit_together_take_turns() -> None:
    one = FusedRnn(num_heads=1, head_dim=2048, len_seq=100, batch=16)
    terms = [predict(one.over(num_heads=n), on=H100).terms["steps"] for n in (1, 4)]
    assert terms[1] == 4 * terms[0]


def test_a_head_that_no_tiling_holds_is_refused_in_a_line() -> None:
    with pytest.raises(InputError, match="times as many heads") as why:
        estimate(FusedRnn(head_dim=4096, len_seq=10), on=H100)
    text = str(why.value)
    assert "\n" not in text and "2688" in text and "SMs" in text and "alternating_rnn" in text
    assert estimate(FusedRnn(num_heads=2, head_dim=2048, len_seq=10), on=H100).seconds > 0


def test_the_largest_of_an_array_is_refused() -> None:
    op = FusedRnn(head_dim=np.array([64.0, 4096.0]), len_seq=10)
    with pytest.raises(InputError, match="not of 4096"):
        predict(op, on=H100)


def test_one_gate_holds_wider_heads_than_four() -> None:
    assert predict(FusedRnn(cell="elman", head_dim=4096, len_seq=10), on=H100).seconds > 0
