"""Bytes of one rank over time: tensors allocated and freed in the order a stage runs them.

A `Trace` collects allocations and frees by name; its `Timeline` gives the live bytes after every
event, the peak, and the tensors alive there by kind and share: a peak that explains itself.
`stage_timeline` writes the trace of one pipeline stage, pass by pass of a `Schedule`:

    before      weights, gradients, optimizer states (recipe, ZeRO stage); two layers gathered
                whole under ZeRO 3, a layer's gradients under ZeRO 2 and 3 (`simulator.memory`)
    forward     a layer keeps its saved tensors (`workloads.models.activations`); full recompute its
                input, selective recompute all but the scores
    backward    layers in reverse: what was dropped comes back, the gradient of the hidden states
                goes through, then the layer's tensors are freed; a backward pass split in two frees
                them with the weights' gradients
    last stage  inputs of the final norm and the head, and the loss's probabilities

The peak of the kept tensors is the closed form of `simulator.activation_memory` where that one
applies (GPT, dropout, unfused attention). Ignored here: collectives' buffers,
fragments; `simulator.fsdp_memory` replays those for a framework that has them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hwmodels.errors import InputError
from simulator.caching_allocator import CachingAllocator
from simulator.recipe import Recipe
from simulator.schedule import BACKWARD, BOTH, FORWARD, INPUT_GRAD, Pass, Schedule
from workloads.models.activations import SavedTensor, ends_bytes, saved_tensors
from workloads.models.config import TransformerConfig
from workloads.models.parameters import layer_parameters, parameters_per_rank
from workloads.models.transformer import TrainStep
from workloads.numeric import ceil_div
from workloads.plan import Plan, Recompute

WEIGHTS, GRADIENTS, OPTIMIZER, KEPT, RECOMPUTED, FLOWING, ENDS, GATHERED, SCATTERED = (
    "weights", "gradients", "optimizer", "activations", "recomputed", "flowing gradient", "ends",
    "gathered weights", "layer gradients",
)  # fmt: skip


class Event(NamedTuple):
    """One allocation (`num_bytes` > 0) or free (< 0) of a tensor; `kind` groups tensors."""

    name: Hashable
    kind: str
    num_bytes: float
    stream: str = ""


class Alive(NamedTuple):
    """Tensors of one kind at the peak: their bytes, number, and share of the peak."""

    kind: str
    num_bytes: float
    num_tensors: int
    share_frac: float


@dataclass(slots=True)
class Trace:
    """Events in execution order; refuses to free what is not there."""

    events: list[Event] = field(default_factory=list)
    _live: dict[Hashable, Event] = field(default_factory=dict)

    def allocate(self, name: Hashable, num_bytes: float, *, kind: str, stream: str = "") -> None:
        """A tensor comes to life; one of no bytes leaves no event."""
        if name in self._live:
            raise InputError(f"'{name}' is allocated already; free it first")
        event = Event(name, kind, float(num_bytes), stream)
        self._live[name] = event
        if num_bytes > 0:
            self.events.append(event)

    def free(self, *names: Hashable) -> None:
        """Tensors die."""
        for name in names:
            event = self._live.pop(name, None)
            if event is None:
                raise InputError(f"'{name}' is not allocated; allocate it before it is freed")
            if event.num_bytes > 0:
                self.events.append(event._replace(num_bytes=-event.num_bytes))

    def is_live(self, name: Hashable) -> bool:
        """Has the tensor been allocated, and not freed since?"""
        return name in self._live

    def timeline(self) -> Timeline:
        """What was collected so far."""
        return Timeline(events=tuple(self.events))


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Events in order; everything else follows from them.

    `pass_ends`: events up to the end of each pass, where a stage was played.

    >>> trace = Trace()
    >>> trace.allocate("x", 100, kind="activations")
    >>> trace.allocate("w", 300, kind="weights")
    >>> trace.free("x")
    >>> line = trace.timeline()
    >>> line.peak_bytes, [a.kind for a in line.alive_at_peak()], line.live_bytes.tolist()
    (400.0, ['weights', 'activations'], [100.0, 400.0, 300.0])
    """

    events: tuple[Event, ...]
    pass_ends: tuple[int, ...] = ()

    def by_pass(self) -> Iterator[tuple[float, float]]:
        """(most bytes alive during it, bytes alive after it) of every pass of the stage."""
        live, start = self.live_bytes, 0
        for end in self.pass_ends:
            before = live[start - 1] if start else 0.0
            yield float(live[start:end].max(initial=before)), float(live[end - 1] if end else 0.0)
            start = end

    @property
    def live_bytes(self) -> NDArray[np.float64]:
        """Bytes alive after each event."""
        return np.cumsum([e.num_bytes for e in self.events], dtype=np.float64)

    @property
    def peak_index(self) -> int:
        """The first event after which most bytes are alive."""
        if not self.events:
            raise InputError("a timeline without events has no peak; allocate something")
        return int(np.argmax(self.live_bytes))

    @property
    def peak_bytes(self) -> float:
        """Most bytes alive at once."""
        return float(self.live_bytes[self.peak_index])

    def tensors_at_peak(self) -> tuple[Event, ...]:
        """The tensors alive at the peak, largest first."""
        alive: dict[Hashable, Event] = {}
        for event in self.events[: self.peak_index + 1]:
            if event.num_bytes > 0:
                alive[event.name] = event
            else:
                del alive[event.name]
        return tuple(sorted(alive.values(), key=lambda e: -e.num_bytes))

    def alive_at_peak(self) -> tuple[Alive, ...]:
        """Those tensors by kind, largest share first; the shares add up to 1."""
        held: Counter[str] = Counter()
        number: Counter[str] = Counter()
        for event in self.tensors_at_peak():
            held[event.kind] += event.num_bytes  # type: ignore[assignment]  # floats count too
            number[event.kind] += 1
        peak = self.peak_bytes
        return tuple(
            Alive(kind, num_bytes, number[kind], num_bytes / peak)
            for kind, num_bytes in held.most_common()
        )

    def peak_of(self, *kinds: str) -> float:
        """Most bytes of those kinds alive at once, whatever else is."""
        live = np.cumsum([e.num_bytes if e.kind in kinds else 0.0 for e in self.events])
        return float(live.max(initial=0.0))

    def headroom_bytes(self, capacity_bytes: float) -> float:
        """What a device of that capacity has left at the peak; negative: it does not fit."""
        return capacity_bytes - self.peak_bytes

    def replayed(self, capacity_bytes: float | None = None) -> CachingAllocator:
        """The events through PyTorch's allocator; raises `InfeasibleError` out of memory."""
        cache = CachingAllocator(capacity_bytes=capacity_bytes)
        for event in self.events:
            if event.num_bytes > 0:
                cache.allocate(event.name, event.num_bytes, event.stream)
            else:
                cache.free(event.name)
        return cache


# ---- one stage of a pipeline ---------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOptions:
    """How the layers keep what they keep, as `workloads.models.activations` takes it."""

    materialised: bool = False
    dropout: bool = False
    sequence_parallel: bool = True


FUSED: Final = StageOptions()


def stage_timeline(
    step: TrainStep,
    *,
    plan: Plan,
    recipe: Recipe,
    schedule: Schedule,
    stage: int = 0,
    options: StageOptions = FUSED,
    stage_layers: Sequence[float] | None = None,
) -> Timeline:
    """One step of one rank of a stage; layers over the parts as `simulator.timeline` lays them.

    `stage_layers`: how many each stage holds, where they differ.
    """
    if not 0 <= stage < schedule.num_stages:
        raise InputError(f"stage {stage} of {schedule.num_stages}; count from 0")
    if schedule.num_stages != plan.pp:
        raise InputError(
            f"the schedule has {schedule.num_stages} stages, the plan {plan.pp}; make them equal"
        )
    held = part_layers(schedule, step.config.num_layers, stage_layers)
    trace, marks = Trace(), []
    bare = _Stage(step, plan, recipe, schedule, stage, options, held)
    run = replace(bare, table={k: tuple(bare.saved_of(k)) for k in step.config.kinds})
    for kind, num_bytes in run.states().items():
        trace.allocate(kind, num_bytes, kind=kind)
    for one in schedule.passes[stage]:
        run.play(trace, one)
        marks.append(len(trace.events))
    return replace(trace.timeline(), pass_ends=tuple(marks))


def part_layers(
    schedule: Schedule, num_layers: int, stage_layers: Sequence[float] | None = None
) -> tuple[range, ...]:
    """Layers of the model that each part holds, in order; ceil(L / parts) where stages are alike.

    A stage of several parts has its layers in equal ones.

    >>> from simulator.schedule import schedule
    >>> two = schedule("interleaved", num_stages=2, num_micro_batches=2, num_chunks=2)
    >>> part_layers(two, 10, (6, 4))
    (range(0, 3), range(3, 5), range(5, 8), range(8, 10))
    """
    parts = schedule.num_parts
    if stage_layers is None:
        if num_layers % parts and len(schedule.parts) > 1:
            raise _indivisible(num_layers, parts)
        most = -(-num_layers // parts)
        sizes = [min(max(num_layers - i * most, 0), most) for i in range(parts)]
    else:
        chunks = parts // schedule.num_stages  # fewer than a stage holds where two share a part
        sizes = [0] * parts
        for chunk in schedule.parts[:chunks]:
            for stage, part in enumerate(chunk):
                sizes[part] = int(stage_layers[stage] // chunks)
        alike = all(
            sizes[chunk[s]] == stage_layers[s] / chunks
            for chunk in schedule.parts
            for s in range(schedule.num_stages)
        )
        if sum(sizes) != num_layers or not alike:
            raise _indivisible(num_layers, parts)
    starts = [0, *itertools.accumulate(sizes)]
    return tuple(range(a, b) for a, b in itertools.pairwise(starts))


def _indivisible(num_layers: int, num_parts: int) -> InputError:
    return InputError(
        f"{num_layers} layers do not divide over {num_parts} parts; change the stages or the chunks"
    )


@dataclass(frozen=True, slots=True)
class _Stage:
    step: TrainStep
    plan: Plan
    recipe: Recipe
    schedule: Schedule
    stage: int
    options: StageOptions
    held: tuple[range, ...]
    table: Mapping[str, tuple[tuple[SavedTensor, float], ...]] = field(default_factory=dict)

    # ---- sizes -----------------------------------------------------------------------------

    @property
    def cfg(self) -> TransformerConfig:
        return self.step.config

    @property
    def tokens(self) -> float:
        return float(ceil_div(self.plan.micro_batch * self.step.len_seq, self.plan.cp))

    @property
    def rows(self) -> float:
        """Tokens of the regions that sequence parallelism splits."""
        shared = self.options.sequence_parallel
        return float(ceil_div(self.tokens, self.plan.tp)) if shared else self.tokens

    @property
    def hidden_bytes(self) -> float:
        return self.rows * self.cfg.hidden_dim * self.recipe.dtype.bytes_per_element

    def states(self) -> dict[str, float]:
        """Weights, gradients and optimizer states of the stage, sharded as ZeRO does."""
        parameters = self.parameters()
        shard = ceil_div(parameters, self.plan.dp * self.plan.cp)
        sizes = zip(
            (OPTIMIZER, GRADIENTS, WEIGHTS),
            (self.recipe.optimizer_bytes, self.recipe.gradient_bytes, self.recipe.weight_bytes),
            strict=True,
        )
        held = {
            kind: size * float(shard if self.plan.zero_stage > level else parameters)
            for level, (kind, size) in enumerate(sizes)
        }
        if self.plan.zero_stage >= 3:  # two layers whole, at work and next
            held[GATHERED] = 2 * self.recipe.weight_bytes * max(self.layer_sizes().values())
        if self.plan.zero_stage >= 2:
            whole = self.recipe.weight_bytes + self.recipe.gradient_bytes
            held[SCATTERED] = whole * max(self.layer_sizes().values())
        return held

    def layer_sizes(self) -> dict[str, float]:
        """Parameters of a layer on one rank, by kind."""
        cfg, plan = self.cfg, self.plan
        return {
            k: float(layer_parameters(cfg, k, plan.tp, plan.ep, plan.expert_tp).total)
            for k in cfg.kinds
        }

    def parameters(self) -> float:
        """Of the layers of all its parts, and of the ends that the rank has."""
        cfg, tp, ep, etp = self.cfg, self.plan.tp, self.plan.ep, self.plan.expert_tp
        layers = self.layer_sizes()
        own = [layer for chunk in range(len(self.schedule.parts)) for layer in self.layers(chunk)]
        total = sum(layers[self.kind(layer)] for layer in own)
        whole = Plan(tp=tp, ep=ep, etp=etp, pp=cfg.num_layers)
        first, last = parameters_per_rank(cfg, whole)  # a stage for every layer: ends by difference
        if 0 in own:
            total += float(first.total) - layers[self.kind(0)]
        if cfg.num_layers - 1 in own:
            both = cfg.num_layers == 1
            total += 0.0 if both else float(last.total) - layers[self.kind(cfg.num_layers - 1)]
        return total

    def kind(self, layer: int) -> str:
        return self.cfg.kind_of(layer)

    def layers(self, chunk: int) -> range:
        """Layers of the model that a chunk of this stage holds."""
        return self.held[self.schedule.parts[chunk][self.stage]]

    def saved(self, layer: int) -> Iterable[tuple[SavedTensor, float]]:
        """The tensors of a layer with their bytes."""
        return self.table[self.kind(layer)]

    def saved_of(self, kind: str) -> Iterator[tuple[SavedTensor, float]]:
        """The same, of a kind of layer: what `table` holds."""
        for tensor in saved_tensors(
            self.cfg, kind=kind, len_seq=self.step.len_seq, tp=self.plan.tp,
            etp=self.plan.expert_tp,
            materialised=self.options.materialised, dropout=self.options.dropout,
            dtype=self.recipe.dtype,
        ):  # fmt: skip
            rows = self.rows if tensor.by_sequence else self.tokens
            yield tensor, float(tensor.bytes_per_token) * rows

    # ---- events ----------------------------------------------------------------------------

    def play(self, trace: Trace, one: Pass) -> None:
        """The events of a pass."""
        if one.kind in (FORWARD, BOTH):
            self.forward(trace, one.micro_batch, one.chunk)
        if one.kind == BOTH and one.second is not None:
            self.backward(trace, *one.second, frees=True)
        elif one.kind in (BACKWARD, INPUT_GRAD):
            self.backward(trace, one.micro_batch, one.chunk, frees=one.kind == BACKWARD)
        elif one.kind not in (FORWARD, BOTH):  # the weights' gradients: inputs are needed no more
            for layer in reversed(self.layers(one.chunk)):
                self.drop(trace, layer, one.micro_batch)
            self.drop_ends(trace, one.micro_batch, one.chunk)

    def forward(self, trace: Trace, micro: int, chunk: int) -> None:
        """Every layer runs with all its tensors, then drops what is recomputed."""
        self.keep_ends(trace, micro, chunk)
        for layer in self.layers(chunk):
            self.keep(trace, layer, micro, again=False)
            for tensor, num_bytes in self.saved(layer):
                if self.is_dropped(tensor):
                    trace.free((layer, micro, tensor.name))
                    self.leave_input(trace, layer, micro, tensor, num_bytes)

    def backward(self, trace: Trace, micro: int, chunk: int, *, frees: bool) -> None:
        """Layers in reverse, what was dropped computed again first."""
        flowing = ("gradient", micro, chunk)
        trace.allocate(flowing, self.hidden_bytes, kind=FLOWING)
        for layer in reversed(self.layers(chunk)):
            self.keep(trace, layer, micro, again=True)
            if frees:
                self.drop(trace, layer, micro)
        if frees:
            self.drop_ends(trace, micro, chunk)
        trace.free(flowing)

    def is_dropped(self, tensor: SavedTensor) -> bool:
        full = self.plan.recompute == Recompute.FULL
        return bool(full or (self.plan.recompute == Recompute.SELECTIVE and tensor.recomputed))

    def leave_input(
        self, trace: Trace, layer: int, micro: int, tensor: SavedTensor, num_bytes: float
    ) -> None:
        """Full recompute keeps the layer's input, which the first norm takes."""
        if self.plan.recompute == Recompute.FULL and tensor.name == "attention_norm.input":
            trace.allocate((layer, micro, tensor.name), num_bytes, kind=KEPT)

    def keep(self, trace: Trace, layer: int, micro: int, *, again: bool) -> None:
        """Allocate the tensors of a layer that are not there yet."""
        for tensor, num_bytes in self.saved(layer):
            name = (layer, micro, tensor.name)
            if not trace.is_live(name):
                short_lived = again or self.is_dropped(tensor)
                trace.allocate(name, num_bytes, kind=RECOMPUTED if short_lived else KEPT)

    def drop(self, trace: Trace, layer: int, micro: int) -> None:
        trace.free(*((layer, micro, tensor.name) for tensor, _ in self.saved(layer)))

    def ends(self, chunk: int) -> dict[str, float]:
        """What the first and the last part of the model keep besides their layers."""
        both = ends_bytes(
            self.cfg, batch=self.plan.micro_batch, len_seq=self.step.len_seq, plan=self.plan,
            dropout=self.options.dropout, sequence_parallel=self.options.sequence_parallel,
            dtype=self.recipe.dtype,
        )  # fmt: skip
        layers = self.layers(chunk)
        found = {}
        if 0 in layers:
            found["embedding"] = float(both.embedding)
        if self.cfg.num_layers - 1 in layers:
            found["head"] = float(both.head)
        return found

    def keep_ends(self, trace: Trace, micro: int, chunk: int) -> None:
        for name, num_bytes in self.ends(chunk).items():
            trace.allocate((name, micro), num_bytes, kind=ENDS)

    def drop_ends(self, trace: Trace, micro: int, chunk: int) -> None:
        trace.free(*((name, micro) for name in self.ends(chunk)))
