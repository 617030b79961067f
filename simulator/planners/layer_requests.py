"""The memory requests of a training step, layer pass by layer pass: what a storage plan places.

Forward, a layer asks for the tensors it keeps (`workloads.models.activations`, in their order) and
for what it drops at once: the fused output of the QKV product until it is taken apart, the outputs
of the two blocks until they are added to the residual. Backward, layers in reverse; the gradient of
each kept tensor lives from the op that makes it to the op that takes it, and the kept tensor until
its own gradient is there. The gradient of the hidden states goes through.

With `swap` (MEMO) the kept tensors are no requests of the step: they stand in two buffers of one
layer's size that take turns, and come and go with the copies; what is left is what lives within one
pass, and the passes' hidden states. With recomputation a backward pass begins with the forward's
requests.

    Implemented in: `step_requests` (the order of passes), `_forward`, `_backward`.

Ignored: workspaces of kernels, buffers of collectives, gradients of weights and optimizer states
(they stand still: `simulator.memory`), tensors of an op's inside.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError
from simulator.memory_timeline import ENDS, FLOWING, KEPT, RECOMPUTED, Timeline, Trace
from workloads.models.activations import SavedTensor, ends_bytes, saved_tensors
from workloads.models.transformer import TrainStep
from workloads.numeric import ceil_div
from workloads.plan import Plan, Recompute

TRANSIENT: Final = "transient"
BUFFER: Final = "swap buffer"
INPUT: Final = "attention_norm.input"
BLOCKS: Final = {
    "attention.output": "attention", "mixer.output": "attention", "mlp.down.input": "mlp",
    "experts.output": "mlp",
}  # fmt: skip
"""The kept tensor after which each block makes its output."""

TOGETHER: Final = ("q", "k", "v")
"""Attention's backward makes these gradients at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One pipeline stage: its first layer, whether it has the ends, and what else is in flight.

    `others` are the micro-batches beside the one whose passes are followed: without swapping the
    stage holds what they keep throughout.
    """

    first_layer: int = 0
    has_embedding: bool = True
    has_head: bool = True
    others: float = 0.0


WHOLE: Final = Part()


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """The step's events, and the window of events of each layer pass."""

    timeline: Timeline
    passes: tuple[tuple[int, int], ...]


def step_requests(
    step: TrainStep, *, plan: Plan, num_layers: int, dtype: DType = BF16, swap: bool = False,
    part: Part = WHOLE,
) -> Requests:  # fmt: skip
    """One micro-batch forward and backward over `num_layers` layers of one rank."""
    if num_layers < 1:
        raise InputError(f"{num_layers} layers; give at least one")
    run = _Run(step, plan, num_layers, dtype, swap, part.first_layer)
    trace, passes = Trace(), []
    ends = ends_bytes(step.config, batch=plan.micro_batch, len_seq=step.len_seq, plan=plan,
                      dtype=dtype)  # fmt: skip
    if swap:
        for side in range(min(2, num_layers)):
            trace.allocate(("buffer", side), run.layer_bytes(), kind=BUFFER)
    if part.others and not swap:
        trace.allocate("other micro-batches", part.others * run.kept_bytes(), kind=KEPT)
    if part.has_embedding:
        trace.allocate("embedding", float(ends.embedding), kind=ENDS)
    for layer in range(num_layers):
        start = len(trace.events)
        run.forward(trace, layer)
        passes.append((start, len(trace.events)))
    if part.has_head:
        trace.allocate("head", float(ends.head), kind=ENDS)
    trace.allocate(("gradient", num_layers), run.hidden, kind=FLOWING)
    if part.has_head:
        trace.free("head")
    if ("hidden", num_layers - 1) in run.open:
        trace.free(("hidden", num_layers - 1))
    for layer in reversed(range(num_layers)):
        start = len(trace.events)
        run.backward(trace, layer)
        passes.append((start, len(trace.events)))
    trace.free(("gradient", 0), *(["embedding"] if part.has_embedding else []))
    if part.others and not swap:
        trace.free("other micro-batches")
    return Requests(timeline=trace.timeline(), passes=tuple(passes))


class _Run:
    """The passes of one rank; `open` are the hidden states between layers that nothing keeps."""

    def __init__(
        self, step: TrainStep, plan: Plan, num_layers: int, dtype: DType, swap: bool,
        first_layer: int = 0,
    ) -> None:  # fmt: skip
        self.step, self.plan, self.num_layers = step, plan, num_layers
        self.dtype, self.swap, self.first_layer = dtype, swap, first_layer
        self.tokens = float(ceil_div(plan.micro_batch * step.len_seq, plan.cp))
        self.rows = float(ceil_div(self.tokens, plan.tp))
        self.hidden = self.rows * step.config.hidden_dim * dtype.bytes_per_element
        self.open: set[Hashable] = set()

    def saved(self, layer: int) -> list[tuple[SavedTensor, float]]:
        """A layer's kept tensors with their bytes."""
        kind = self.step.config.kind_of(self.first_layer + layer)
        return [
            (one, float(one.bytes_per_token) * (self.rows if one.by_sequence else self.tokens))
            for one in saved_tensors(
                self.step.config, kind=kind, len_seq=self.step.len_seq, tp=self.plan.tp,
                dtype=self.dtype,
            )
        ]  # fmt: skip

    def layer_bytes(self) -> float:
        """The largest layer's kept tensors."""
        return max(sum(size for _, size in self.saved(k)) for k in range(self.num_layers))

    def kept_bytes(self) -> float:
        """What all layers keep of one micro-batch between its passes."""
        return sum(
            size
            for layer in range(self.num_layers)
            for one, size in self.saved(layer)
            if not self.drops(one)
        )

    def drops(self, one: SavedTensor) -> bool:
        """Is the tensor dropped after the forward pass and made again?"""
        full = self.plan.recompute == Recompute.FULL and one.name != INPUT
        selective = self.plan.recompute == Recompute.SELECTIVE and one.recomputed
        return bool(full or selective)

    def forward(self, trace: Trace, layer: int) -> None:
        """A layer's requests; the hidden states it hands on are the next one's input."""
        made = self.make(trace, layer, again=False)
        trace.free(*(name for name, one in made if self.drops(one)))
        if self.swap or layer == self.num_layers - 1:  # else the next layer keeps it as its input
            trace.allocate(("hidden", layer), self.hidden, kind=FLOWING)
            self.open.add(("hidden", layer))
        if ("hidden", layer - 1) in self.open:
            self.open.discard(("hidden", layer - 1))
            trace.free(("hidden", layer - 1))

    def make(
        self, trace: Trace, layer: int, *, again: bool
    ) -> list[tuple[Hashable, SavedTensor]]:  # fmt: skip
        """Kept tensors in order, with what is dropped at once."""
        made: list[tuple[Hashable, SavedTensor]] = []
        saved = self.saved(layer)
        fused = sum(size for one, size in saved if one.name in ("q", "k", "v"))
        for one, size in saved:
            name = (layer, one.name)
            if one.name == "q":
                trace.allocate((layer, "qkv"), fused, kind=TRANSIENT)
            if not self.swap and not trace.is_live(name):
                trace.allocate(name, size, kind=RECOMPUTED if again else KEPT)
                made.append((name, one))
            if one.name == "v":
                trace.free((layer, "qkv"))
            block = BLOCKS.get(one.name)
            if block is not None:
                trace.allocate((layer, block, "out"), self.hidden, kind=TRANSIENT)
                trace.free((layer, block, "out"))
        return made

    def backward(self, trace: Trace, layer: int) -> None:
        """Kept tensors and gradients in reverse, from the gradient of the layer's output."""
        if not self.swap and any(self.drops(one) for one, _ in self.saved(layer)):
            self.make(trace, layer, again=True)
        residual: Hashable = ("gradient", layer + 1)
        above: tuple[Hashable, ...] = ()
        for group in _groups(self.saved(layer)):
            mine = tuple(("gradient of", layer, one.name) for one, _ in group)
            for name, (_, size) in zip(mine, group, strict=True):
                trace.allocate(name, size, kind=TRANSIENT)
            trace.free(*above)
            above = mine
            if not self.swap:
                trace.free(*((layer, one.name) for one, _ in group))
        trace.allocate(("gradient", layer), self.hidden, kind=FLOWING)
        trace.free(*above, residual)
        if not self.swap:
            trace.free((layer, INPUT))


def _groups(saved: list[tuple[SavedTensor, float]]) -> list[list[tuple[SavedTensor, float]]]:
    """Kept tensors but the layer's input, last first, those that share a backward op together."""
    groups: list[list[tuple[SavedTensor, float]]] = []
    for pair in reversed(saved):
        if pair[0].name in TOGETHER and groups and groups[-1][0][0].name in TOGETHER:
            groups[-1].append(pair)
        elif pair[0].name != INPUT:
            groups.append([pair])
    return groups
