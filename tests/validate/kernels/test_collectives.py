"""Collectives of two processes over gloo: checked, timed, in the layout of the public tables."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from validate.kernels.collectives import (
    GLOO,
    KINDS,
    NAME,
    NCCL,
    CollectiveTimer,
    group_sizes,
    trials,
)
from validate.record import Case, Trial
from validate.recorded import recorded
from validate.timer import Unmeasured


@pytest.fixture(scope="module")
def pair() -> Iterator[CollectiveTimer]:
    if not hasattr(socket, "AF_INET"):
        pytest.skip("gloo needs sockets")
    with CollectiveTimer(2, GLOO) as timer:
        yield timer


def trial(kind: str, num_bytes: int = 4096, dtype: str = "fp32", gpus: int = 2) -> Trial:
    params = {"nodes": 1, "gpus": gpus, "bytes": num_bytes}
    case = Case(op=kind, dtype=dtype, params=params)
    return Trial(kernel=NAME, implementation=GLOO, case=case)


@pytest.mark.parametrize("kind", KINDS)
def test_every_collective_is_right_and_timed(pair: CollectiveTimer, kind: str) -> None:
    record = pair.measure(trial(kind))
    assert record.seconds > 0 and record.error == 0.0
    assert record.trial == trial(kind)
    assert record.row == {"family": "collectives", "op": kind, "params": dict(record.case.params)}
    found = recorded([record], {"cpu": "h100-sxm"})
    assert found.rows[0].op == kind and found.rows[0].source == "ridgeplan/gloo/fp32"


def test_an_error_is_a_refusal(pair: CollectiveTimer) -> None:
    with pytest.raises(Unmeasured, match="KeyError") as why:
        pair.measure(trial("all_shout"))
    assert why.value.kind == "failed"


def test_the_grid_of_a_group() -> None:
    planned = trials(8, NCCL, "quick")
    assert {t.case.op for t in planned} == set(KINDS)
    assert len({t.key for t in planned}) == len(planned) == 7 * len(KINDS)
    assert all(t.case.params["gpus"] == 8 for t in planned)
    assert group_sizes(2) == (2,)
