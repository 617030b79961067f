"""Pipeline schedules written out and run, as the truth that closed forms are held against.

Orders of Narayanan et al. 2021 (arXiv 2104.04473): stage i of p warms up with p - i - 1 forward
passes (1F1B), or with 2 (p - i - 1) + (v - 1) p passes of chunks (interleaved), then alternates
forward and backward, then drains.
"""

from __future__ import annotations

from collections.abc import Sequence

Pass = tuple[str, int, int]
"""'F' or 'B', chunk, micro-batch."""


def order(p: int, m: int, v: int, stage: int) -> list[Pass]:
    """Passes of one stage, in order."""
    total = m * v
    if v == 1:
        warm_up = min(total, p - stage - 1)
    else:
        assert m % p == 0
        warm_up = min(total, 2 * (p - stage - 1) + (v - 1) * p)
    forward = [("F", *_virtual(k, p, v)) for k in range(total)]
    backward = [("B", v - 1 - c, mb) for c, mb in (_virtual(k, p, v) for k in range(total))]
    passes: list[Pass] = forward[:warm_up]
    for k in range(total - warm_up):
        passes += [forward[warm_up + k], backward[k]]
    return passes + backward[total - warm_up :]


def _virtual(k: int, p: int, v: int) -> tuple[int, int]:
    """(chunk, micro-batch) of the k-th pass: p micro-batches go through a chunk, then the next."""
    group, within = divmod(k, p * v)
    return (within // p, group * p + within % p) if v > 1 else (0, k)


def most_alive(p: int, m: int, v: int, stage: int) -> int:
    """Most chunks of micro-batches whose forward is done (or running) and backward is not."""
    alive = most = 0
    for kind, _, _ in order(p, m, v, stage):
        alive += 1 if kind == "F" else -1
        most = max(most, alive)
    assert alive == 0
    return most


def makespan(forward: Sequence[float], backward: Sequence[float], m: int, v: int = 1) -> float:
    """Seconds until the last pass ends; times are of one chunk of each stage."""
    p = len(forward)
    queues = [order(p, m, v, stage) for stage in range(p)]
    at, free = [0] * p, [0.0] * p
    done: dict[tuple[int, Pass], float] = {}
    while any(at[i] < len(queues[i]) for i in range(p)):
        moved = False
        for i in range(p):
            while at[i] < len(queues[i]):
                todo = queues[i][at[i]]
                before = _waits_for(todo, i, p, v)
                if before is not None and before not in done:
                    break
                start = max(free[i], done[before] if before else 0.0)
                free[i] = start + (forward[i] if todo[0] == "F" else backward[i])
                done[i, todo] = free[i]
                at[i] += 1
                moved = True
        assert moved, "the schedule waits for itself"
    return max(free)


def _waits_for(todo: Pass, stage: int, p: int, v: int) -> tuple[int, Pass] | None:
    kind, chunk, micro = todo
    if kind == "F":
        if stage:
            return stage - 1, ("F", chunk, micro)
        return (p - 1, ("F", chunk - 1, micro)) if chunk else None
    if stage < p - 1:
        return stage + 1, ("B", chunk, micro)
    if chunk < v - 1:
        return 0, ("B", chunk + 1, micro)
    return stage, ("F", chunk, micro)
