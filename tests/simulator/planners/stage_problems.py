"""Small stage problems of all shapes, and their answers by trying everything."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from simulator.planners.modes import LayerKind, Limits, Mode, undominated
from simulator.planners.stages import Choice, EndPart, StageProblem, objective
from workloads.numeric import Array


class Linear:
    """States of w bytes a parameter; an exchange of r seconds a parameter, less what hides it."""

    def __init__(self, state_bytes: float, exchange_s: float, update_s: float) -> None:
        self.state_bytes, self.exchange_s, self.update_s = state_bytes, exchange_s, update_s

    def states(self, dense: Array, experts: Array) -> Array:
        return self.state_bytes * (dense + 0.5 * experts)

    def after(self, dense: Array, experts: Array, forward_s: Array, backward_s: Array) -> Array:
        moved = self.exchange_s * (dense + experts)
        exposed = np.maximum(moved - backward_s, 0) + np.maximum(0.5 * moved - forward_s, 0)
        return exposed + self.update_s * (dense + experts)


def random_problem(seed: int, *, num_kinds: int | None = None) -> StageProblem:
    """A mesh of up to four stages and six layers; about a third of them fit nothing."""
    rng = np.random.default_rng(seed)
    kinds = num_kinds or int(rng.integers(1, 3))
    stages, chunks = int(rng.integers(1, 5)), int(rng.integers(1, 3))
    layers = int(rng.integers(stages, 7))
    if chunks > 1:
        layers = stages * chunks if kinds > 1 else chunks * int(rng.integers(stages, stages + 3))
    micro = float(rng.integers(1, 9)) * (stages if chunks > 1 else 1)
    flight = tuple(min(micro, stages - i) * rng.uniform(1, 1.3) for i in range(stages))
    host = rng.random() < 0.6
    linear = Linear(rng.uniform(0, 0.4), rng.choice([0.0, rng.uniform(0, 3)]), rng.uniform(0, 0.2))
    per_stage = layers / stages
    return StageProblem(
        num_stages=stages, num_chunks=chunks, num_micro=micro,
        kinds=tuple(_kind(rng, f"kind{i}", host) for i in range(kinds)),
        sequence=tuple(int(k) for k in rng.integers(0, kinds, layers)),
        first=_end(rng), last=_end(rng), in_flight=flight,
        limits=Limits(
            budget_bytes=per_stage * rng.uniform(0.1, 2.5) + stages * rng.uniform(0, 0.6),
            host_bytes=per_stage * stages * rng.uniform(0.2, 2) if host else 0.0,
            host_bytes_per_s=rng.uniform(0.2, 2) if host else 0.0,
        ),
        states=linear.states, after=linear.after,
        fixed_s=rng.uniform(0, 1), fixed_bytes=rng.uniform(0, 0.2),
    )  # fmt: skip


def _kind(rng: np.random.Generator, name: str, host: bool) -> LayerKind:
    forward = rng.uniform(0.5, 1.5)
    kept, small = rng.uniform(0.6, 1.4), rng.uniform(0.05, 0.3)
    base = 3 * forward
    modes = [
        Mode(name="none", seconds=base, backward_s=2 * forward, kept_bytes=kept),
        Mode(name="full", seconds=base + forward, backward_s=3 * forward, kept_bytes=small,
             working_bytes=kept * rng.choice([0.0, 1.0])),
    ]  # fmt: skip
    if rng.random() < 0.3:
        modes.append(Mode(name="selective", seconds=base + rng.uniform(0.1, 0.6),
                          backward_s=2 * forward, kept_bytes=kept * 0.6))  # fmt: skip
    if host:
        modes += [
            Mode(name="offload", seconds=base + 0.1, backward_s=2 * forward, kept_bytes=0.0,
                 host_bytes=kept, working_bytes=kept * rng.choice([0.0, 0.5])),
            Mode(name="offload+full", seconds=base + forward + 0.02, backward_s=3 * forward,
                 kept_bytes=0.0, host_bytes=small),
        ]  # fmt: skip
    return LayerKind(name=name, modes=undominated(modes), forward_s=forward,
                     dense=rng.uniform(0.2, 1), experts=rng.choice([0.0, 0.5]))  # fmt: skip


def _end(rng: np.random.Generator) -> EndPart:
    return EndPart(seconds=rng.uniform(0, 2), kept_bytes=rng.uniform(0, 0.2),
                   fixed_bytes=rng.uniform(0, 0.3), dense=rng.uniform(0, 1))  # fmt: skip


def by_brute_force(problem: StageProblem) -> float:
    """The least of (1) over every split and, stage by stage, every assignment of modes."""
    best = math.inf
    for sizes in _splits(problem):
        choices = [fastest(problem, i, held) for i, held in enumerate(_held(problem, sizes))]
        if all(c is not None for c in choices):
            best = min(best, objective(problem, [c for c in choices if c is not None]))
    return best


def _splits(problem: StageProblem) -> Iterator[tuple[int, ...]]:
    total, p, v = problem.num_layers, problem.num_stages, problem.num_chunks
    alike = len(problem.kinds) == 1
    for sizes in itertools.product(range(v, total + 1, v), repeat=p):
        if sum(sizes) == total and (v == 1 or alike or len(set(sizes)) == 1):
            yield sizes


def _held(problem: StageProblem, sizes: tuple[int, ...]) -> list[list[int]]:
    """Kinds of the layers of every stage, chunk by chunk."""
    p, v = problem.num_stages, problem.num_chunks
    if v == 1 or len(problem.kinds) == 1:
        ends = list(itertools.accumulate(sizes))
        return [list(problem.sequence[e - s : e]) for e, s in zip(ends, sizes, strict=True)]
    size = problem.num_layers // (p * v)
    return [
        [problem.sequence[(c * p + i) * size + j] for c in range(v) for j in range(size)]
        for i in range(p)
    ]


def fastest(problem: StageProblem, stage: int, held: list[int]) -> Choice | None:
    """Every assignment of modes to single layers, each row written out."""
    kinds, limits, f = problem.kinds, problem.limits, problem.in_flight[stage]
    ends = list(problem.ends(stage))
    dense = sum(kinds[k].dense for k in held) + sum(e.dense for e in ends)
    experts = sum(kinds[k].experts for k in held) + sum(e.experts for e in ends)
    states = float(problem.states(np.array([dense]), np.array([experts]))[0])
    fixed = problem.fixed_bytes + sum(e.fixed_bytes + f * e.kept_bytes for e in ends)
    forward = sum(kinds[k].forward_s for k in held)
    best: Choice | None = None
    for modes in itertools.product(*(kinds[k].modes for k in held)):
        host = sum(m.host_bytes for m in modes)
        working = max(m.working_bytes for m in modes)
        held_bytes = states + fixed + f * sum(m.kept_bytes for m in modes) + working
        if held_bytes > limits.budget_bytes * (1 + 1e-12):
            continue
        if host and (
            f * host > limits.host_bytes * (1 + 1e-12)
            or host > limits.host_bytes_per_s * forward * (1 + 1e-12)
        ):
            continue
        seconds = sum(m.seconds for m in modes) + sum(e.seconds for e in ends)
        if best is None or seconds < best.seconds - 1e-12:
            best = Choice(seconds, forward, sum(m.backward_s for m in modes), dense, experts, ())
    return best
