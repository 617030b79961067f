"""Pipeline schedules: in which order each stage runs the passes of its micro-batches.

    gpipe         all forward, then all backward (Huang et al. 2019, arXiv 1811.06965)
    1f1b          one forward, one backward (Narayanan et al. 2021, arXiv 2104.04473, section 2.2)
    interleaved   the same with v chunks of the model a stage (there, section 2.2.2)
    zero_bubble   backward split in two, weights' gradients fill the gaps: ZB-H1, the memory of 1F1B
                  (Qi et al. 2024, arXiv 2401.10241, section 2)
    dualpipe      micro-batches from both ends at once, forward under backward (DeepSeek-V3, arXiv
                  2412.19437, section 3.2.1, and deepseek-ai/DualPipe)

With p equal stages, F, B and W the seconds of a stage's forward, input-gradient and weight-gradient
pass (B + W a whole backward pass), FB those of a forward and a whole backward pass run together, no
time between stages and enough micro-batches (p, dualpipe 2 p), a stage (dualpipe: one in the
middle) idles in one step

    gpipe, 1f1b   (p - 1) (F + B + W)
    interleaved   (p - 1) (F + B + W) / v      passes of a chunk take the v-th part
    zero_bubble   (p - 1) (F + B - W)          for W <= F and W <= B
    dualpipe      (p / 2 - 1) (FB + B - 2 W)   for F = B: the paper's FB + B - 3 W, whose B is B + W
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final, NamedTuple

from hwmodels.errors import InputError, UnknownNameError

GPIPE, ONE_F_ONE_B, INTERLEAVED, ZERO_BUBBLE, DUALPIPE = (
    "gpipe", "1f1b", "interleaved", "zero_bubble", "dualpipe",
)  # fmt: skip
SCHEDULES: Final = (GPIPE, ONE_F_ONE_B, INTERLEAVED, ZERO_BUBBLE, DUALPIPE)
FORWARD, BACKWARD, INPUT_GRAD, WEIGHT_GRAD, BOTH = "F", "BW", "B", "W", "F&BW"
"""`BACKWARD` is a whole backward pass, `INPUT_GRAD` and `WEIGHT_GRAD` its halves; `BOTH` a forward
pass and another micro-batch's whole backward in one."""


class Pass(NamedTuple):
    """A pass of a micro-batch through a chunk on a stage; chunk c of stage s is part c p + s.

    `second` is the backward pass that a `BOTH` runs beside its forward: (micro-batch, chunk).
    """

    kind: str
    micro_batch: int
    chunk: int = 0
    second: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The passes of every stage in order; `parts[c][s]` is the part of the model of chunk c there.

    A forward pass needs the one of the part before; a backward pass the one of the part after, and
    its own forward pass. `num_parts` in all.
    """

    name: str
    passes: tuple[tuple[Pass, ...], ...]
    num_micro_batches: int
    parts: tuple[tuple[int, ...], ...]

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return len(self.passes)

    @property
    def num_parts(self) -> int:
        """Parts that the model is cut into."""
        return 1 + max(part for chunk in self.parts for part in chunk)


def schedule(
    name: str, *, num_stages: int, num_micro_batches: int, num_chunks: int = 1
) -> Schedule:
    """The schedule of that name; raises `InputError` where it has none for such numbers.

    >>> [str(p.kind) for p in schedule("1f1b", num_stages=2, num_micro_batches=3).passes[0]]
    ['F', 'F', 'BW', 'F', 'BW', 'BW']
    """
    if name not in SCHEDULES:
        raise UnknownNameError("schedule", name, SCHEDULES)
    for what, number in (("stages", num_stages), ("micro-batches", num_micro_batches),
                         ("chunks", num_chunks)):  # fmt: skip
        if number < 1:
            raise InputError(f"{name}: {number} {what}; give at least 1")
    if num_chunks > 1 and name != INTERLEAVED:
        raise InputError(f"{name} has one chunk a stage, not {num_chunks}; use 'interleaved'")
    if name == DUALPIPE:
        return _dualpipe(num_stages, num_micro_batches)
    if name == INTERLEAVED and num_chunks > 1:
        return _interleaved(num_stages, num_micro_batches, num_chunks)
    stages = range(num_stages)
    make = {GPIPE: _gpipe, ZERO_BUBBLE: _zero_bubble}.get(name, _one_f_one_b)
    return Schedule(
        name=name,
        passes=tuple(make(s, num_stages, num_micro_batches) for s in stages),
        num_micro_batches=num_micro_batches,
        parts=(tuple(stages),),
    )


def _gpipe(stage: int, num_stages: int, m: int) -> tuple[Pass, ...]:
    forward = [Pass(FORWARD, i) for i in range(m)]
    return (*forward, *(Pass(BACKWARD, i) for i in range(m)))


def _one_f_one_b(stage: int, num_stages: int, m: int) -> tuple[Pass, ...]:
    """`p - s - 1` forward passes ahead, then one forward and one backward in turn."""
    ahead = min(num_stages - stage - 1, m)
    found = [Pass(FORWARD, i) for i in range(ahead)]
    for i in range(m - ahead):
        found += [Pass(FORWARD, ahead + i), Pass(BACKWARD, i)]
    return (*found, *(Pass(BACKWARD, i) for i in range(m - ahead, m)))


def _zero_bubble(stage: int, num_stages: int, m: int) -> tuple[Pass, ...]:
    """1F1B's order; the weight gradients of stage s lag s micro-batches behind.

    So a stage hands input gradients on s W earlier than under 1F1B while it holds, as the first
    stage of 1F1B does, at most p micro-batches.
    """
    found: list[Pass] = []
    waiting: deque[int] = deque()
    for p in _one_f_one_b(stage, num_stages, m):
        if p.kind == FORWARD:
            found.append(p)
            continue
        found.append(Pass(INPUT_GRAD, p.micro_batch))
        waiting.append(p.micro_batch)
        if len(waiting) > stage:
            found.append(Pass(WEIGHT_GRAD, waiting.popleft()))
    return (*found, *(Pass(WEIGHT_GRAD, i) for i in waiting))


def _interleaved(num_stages: int, m: int, v: int) -> Schedule:
    """Groups of p micro-batches go through the chunks in turn (Megatron-LM's order)."""
    if m % num_stages:
        raise InputError(
            f"interleaved: {m} micro-batches are no multiple of {num_stages} stages; "
            "change the micro-batch, or use '1f1b'"
        )
    total = m * v

    def nth(k: int, *, backward: bool) -> Pass:
        group, inside = divmod(k, num_stages * v)
        chunk, i = divmod(inside, num_stages)
        micro = group * num_stages + i
        return Pass(BACKWARD, micro, v - 1 - chunk) if backward else Pass(FORWARD, micro, chunk)

    passes = []
    for stage in range(num_stages):
        ahead = min(2 * (num_stages - stage - 1) + (v - 1) * num_stages, total)
        own = [nth(k, backward=False) for k in range(ahead)]
        for k in range(total - ahead):
            own += [nth(ahead + k, backward=False), nth(k, backward=True)]
        own += [nth(k, backward=True) for k in range(total - ahead, total)]
        passes.append(tuple(own))
    return Schedule(
        name=INTERLEAVED,
        passes=tuple(passes),
        num_micro_batches=m,
        parts=tuple(tuple(c * num_stages + s for s in range(num_stages)) for c in range(v)),
    )


def _dualpipe(num_stages: int, m: int) -> Schedule:
    """Half of the micro-batches enter at either end; a stage holds a part for each direction."""
    if num_stages % 2:
        raise InputError(f"dualpipe needs an even number of stages, not {num_stages}")
    if m % 2 or m < 2 * num_stages:
        raise InputError(
            f"dualpipe: {m} micro-batches; it needs an even number of at least twice the "
            f"{num_stages} stages"
        )
    stages = range(num_stages)
    return Schedule(
        name=DUALPIPE,
        passes=tuple(_Dual(s, num_stages, m).passes() for s in stages),
        num_micro_batches=m,
        parts=(tuple(stages), tuple(reversed(stages))),
    )


class _Dual:
    """The order of one stage of DualPipe; `near` comes from the end that the stage is nearer to."""

    def __init__(self, stage: int, num_stages: int, m: int) -> None:
        self.near = 0 if stage < num_stages // 2 else 1
        self.from_end = min(stage, num_stages - 1 - stage)
        self.to_middle = num_stages // 2 - 1 - self.from_end
        self.num_main = m // 2 - num_stages + self.from_end + 1
        self.forward = [iter(range(m // 2)), iter(range(m // 2, m))]
        self.backward = [iter(range(m // 2)), iter(range(m // 2, m))]
        self.weights: deque[tuple[int, int]] = deque()
        self.found: list[Pass] = []

    def passes(self) -> tuple[Pass, ...]:
        """Fill from both ends, forward under backward in the middle, drain with split backward."""
        near, far = self.near, 1 - self.near
        for _ in range(2 * self.to_middle):
            self._forward(near)
        for _ in range(self.from_end + 1):
            self._forward(near)
            self._forward(far)
        for _ in range(self.to_middle):
            self._input_grad(far)
            self._weight_grad()
            self._forward(far)
        self._main(near, far)
        for _ in range(self.to_middle):
            self._backward(far)
            self._both(far, near)
        self._drain(near, far)
        for _ in range(self.to_middle):
            self._weight_grad()
            self._input_grad(near)
        while self.weights:
            self._weight_grad()
        return tuple(self.found)

    def _main(self, near: int, far: int) -> None:
        for i in range(self.num_main):
            if i == 0 and self.to_middle == 0:  # in the middle the first pair is not overlapped
                self._forward(near)
                self._backward(far)
            else:
                self._both(near, far)
            self._both(far, near)

    def _drain(self, near: int, far: int) -> None:
        """Backward passes from both ends; the later half of them split."""
        num = self.from_end + 1
        split = False
        for i in range(num):
            if i == num // 2 and self.from_end % 2 == 1:
                split = True
            self._either(far, split=split)
            if i == num // 2 and self.from_end % 2 == 0:
                split = True
            self._either(near, split=split)

    def _forward(self, chunk: int) -> None:
        self.found.append(Pass(FORWARD, next(self.forward[chunk]), chunk))

    def _backward(self, chunk: int) -> None:
        self.found.append(Pass(BACKWARD, next(self.backward[chunk]), chunk))

    def _input_grad(self, chunk: int) -> None:
        micro = next(self.backward[chunk])
        self.found.append(Pass(INPUT_GRAD, micro, chunk))
        self.weights.append((micro, chunk))

    def _weight_grad(self) -> None:
        self.found.append(Pass(WEIGHT_GRAD, *self.weights.popleft()))

    def _either(self, chunk: int, *, split: bool) -> None:
        self._input_grad(chunk) if split else self._backward(chunk)

    def _both(self, forward: int, backward: int) -> None:
        micro = next(self.forward[forward])
        self.found.append(Pass(BOTH, micro, forward, (next(self.backward[backward]), backward)))
