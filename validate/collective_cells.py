"""Collectives by GPU and kind of group: errors over payloads large enough for a link to matter.

A cell is one kind of group on one GPU; `ALL_KINDS` adds the cells of a GPU up, and that is what the
bar is about:

    MAPE <= LIMIT_FRAC over rows with payload >= LEAST_BYTES that no calibration was fitted on

The payload is what the source states: nccl-tests' size of a collective, T topk hidden bytes of an
exchange between experts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from hwmodels.calibration import Calibration
from validate.batches import batches
from validate.measurement import Measurement
from validate.predictions import Predictions, fitted_on, predict
from workloads.op import Op
from workloads.ops.collective_transfer import ClusterCollective, CollectiveTransfer, CustomAllReduce
from workloads.ops.expert_exchange import ExpertExchange

FAMILY: Final = "collectives"
LEAST_BYTES: Final = 2**16
LIMIT_FRAC: Final = 0.12
ALL_KINDS: Final = "all"
ONE_NODE, NODES, CUSTOM = "library, one node", "library, several nodes", "frameworks' all-reduce"
SENDS, NODE_SENDS = "send-receive, one node", "send-receive, two nodes"
EXPERTS, NODE_EXPERTS = "experts, one node", "experts, several nodes"
KINDS: Final = (ONE_NODE, NODES, CUSTOM, SENDS, NODE_SENDS, EXPERTS, NODE_EXPERTS, ALL_KINDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveCell:
    """Errors of one kind of group on one GPU, fractions; `scope` says whose the constants are.

    `n` rows were judged, `without` had no prediction (or a calibration has seen them). `kept` is
    the bar's verdict and None for a part of a GPU's rows.
    """

    gpu: str
    kind: str
    n: int
    without: int
    mape: float | None
    median_ape: float | None
    bias: float | None
    coverage_80: float | None
    scope: str
    kept: bool | None


def collective_cells(
    rows: Sequence[Measurement], calibrations: Sequence[Calibration] | None = None
) -> tuple[CollectiveCell, ...]:
    """The cells of all GPUs that have rows of collectives; `calibrations` replace the shipped."""
    mine = [r for r in rows if r.family == FAMILY and r.params.get("bytes", 0) >= LEAST_BYTES]
    if not mine:
        return ()
    kinds = _kinds(mine)
    found = predict(mine, calibrations)
    seen = fitted_on(mine, found, calibrations)
    judged: dict[tuple[str, str], list[int]] = defaultdict(list)
    without: Counter[tuple[str, str]] = Counter()
    for i, row in enumerate(mine):
        counted = found.reasons[i] is None and seen[i] is None
        for kind in dict.fromkeys((kinds[i], ALL_KINDS)):
            if counted:
                judged[row.gpu, kind].append(i)
            else:
                without[row.gpu, kind] += 1
    keys = sorted(judged.keys() | without.keys(), key=lambda k: (k[0], KINDS.index(k[1])))
    return tuple(_cell(key, mine, found, judged[key], without[key]) for key in keys)


def _kinds(rows: Sequence[Measurement]) -> list[str]:
    """By row the kind of its group; `ALL_KINDS` alone for a row that no op counts."""
    kinds = [ALL_KINDS] * len(rows)
    for batch in batches(rows)[0]:
        for i in batch.where:
            kinds[i] = _kind(batch.op, rows[i].params)
    return kinds


def _kind(op: Op, params: Mapping[str, Any]) -> str:
    """What sort of group runs the op."""
    away = params["nodes"] > 1
    if isinstance(op, ExpertExchange):
        return NODE_EXPERTS if away else EXPERTS
    if isinstance(op, CustomAllReduce):
        return CUSTOM
    assert isinstance(op, CollectiveTransfer)
    if op.kind == "send_recv":
        return NODE_SENDS if away else SENDS
    return NODES if isinstance(op, ClusterCollective) else ONE_NODE


def _cell(
    key: tuple[str, str],
    rows: Sequence[Measurement],
    found: Predictions,
    judged: Sequence[int],
    without: int,
) -> CollectiveCell:
    gpu, kind = key
    where = np.array(judged, dtype=np.intp)
    measured = np.array([rows[i].seconds for i in judged], dtype=np.float64)
    ratio = found.seconds[where] / measured
    mape = float(np.mean(np.abs(ratio - 1))) if judged else None
    inside = (found.low_80_s[where] <= measured) & (measured <= found.high_80_s[where])
    return CollectiveCell(
        gpu=gpu,
        kind=kind,
        n=len(judged),
        without=without,
        mape=mape,
        median_ape=float(np.median(np.abs(ratio - 1))) if judged else None,
        bias=float(np.expm1(np.mean(np.log(ratio)))) if judged else None,
        coverage_80=float(np.mean(inside)) if judged else None,
        scope="+".join(dict.fromkeys(found.scope(i) for i in judged)),
        kept=None if kind != ALL_KINDS or mape is None else mape <= LIMIT_FRAC,
    )


def as_dicts(cells: Sequence[CollectiveCell]) -> list[Mapping[str, Any]]:
    """Plain numbers and strings."""
    return [asdict(cell) for cell in cells]
