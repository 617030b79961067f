"""Collectives by kind of group: who is judged, who is not, and the verdict."""

from __future__ import annotations

from pathlib import Path

import pytest

from validate.collective_cells import (
    ALL_KINDS,
    CUSTOM,
    EXPERTS,
    LEAST_BYTES,
    LIMIT_FRAC,
    NODES,
    ONE_NODE,
    SENDS,
    collective_cells,
)
from validate.collective_report import collectives_markdown
from validate.measurement import Measurement, read
from validate.predictions import predict

HEAD = "source,gpu,nodes,gpus,collective,bytes,latency_us\n"
SOURCE = "x/nccl/half,H100-SXM-80GB"
LINES = (
    f"{SOURCE},1,8,all_reduce,{2**24},120",
    f"{SOURCE},1,8,all_reduce,{2**10},20",
    f"{SOURCE},4,32,all_reduce,{2**24},400",
    f"{SOURCE},1,2,send_recv,{2**24},50",
    f"x/vllm-1/custom_ar_graph/bf16,H100-SXM-80GB,1,8,all_reduce,{2**20},15",
    f"aic/deepep-ll/T64_H4096_K8_E256,H100-SXM-80GB,1,8,moe_dispatch_fp8,{2**21},30",
    f"aic/deepep-ll/unreadable,H100-SXM-80GB,1,8,moe_dispatch_fp8,{2**21},30",
)


@pytest.fixture
def rows(tmp_path: Path) -> tuple[Measurement, ...]:
    file = tmp_path / "collectives.csv"
    file.write_text(HEAD + "\n".join(LINES) + "\n")
    return read(file).rows


def test_every_large_row_is_in_one_cell_and_in_the_sum(rows: tuple[Measurement, ...]) -> None:
    cells = {c.kind: c for c in collective_cells(rows)}
    assert set(cells) == {ONE_NODE, NODES, CUSTOM, SENDS, EXPERTS, ALL_KINDS}
    assert all(cells[k].n == 1 for k in (ONE_NODE, NODES, CUSTOM, SENDS, EXPERTS))
    assert (cells[ALL_KINDS].n, cells[ALL_KINDS].without) == (5, 1)
    assert [c.kept for k, c in cells.items() if k != ALL_KINDS] == [None] * 5


def test_errors_are_those_of_the_predictions(rows: tuple[Measurement, ...]) -> None:
    large = [r for r in rows if r.params["bytes"] >= LEAST_BYTES]
    found = predict(large)
    off = [
        abs(s / r.seconds - 1)
        for s, r, why in zip(found.seconds, large, found.reasons, strict=True)
        if why is None and r.seconds is not None
    ]
    whole = collective_cells(rows)[-1]
    assert whole.kind == ALL_KINDS and whole.mape is not None
    assert whole.mape == pytest.approx(sum(off) / len(off))
    assert whole.kept == (whole.mape <= LIMIT_FRAC)
    assert whole.scope.startswith("own")


def test_nothing_is_said_where_there_is_nothing() -> None:
    assert collective_cells(()) == ()


def test_the_record_states_the_bar_and_the_verdict(rows: tuple[Measurement, ...]) -> None:
    text = collectives_markdown(collective_cells(rows))
    assert "12.0 % MAPE per GPU" in text and "| all | 5 | 1 |" in text
    assert text.count("\n| ") == 1 + 6  # the header and six cells
