"""Memory of a training step under PyTorch's FSDP, as torchtitan runs it: tensors in order.

Every tensor of a step is allocated and freed where the trainer does it, through the rules of
PyTorch's caching allocator; the peak is what `torch.cuda.max_memory_reserved` would report. Read
from torchtitan's sources (BSD-3; train.py, parallelisms/parallelize_llama.py, models/llama) and
from FSDP2 (torch/distributed/fsdp/_fully_shard):

    states      fp32 weights, gradients and two Adam moments, sharded over dp * cp and tp
    gathered    a layer's 16-bit weights when it runs, flat buffers of two layers on a stream of
                their own; embedding, last norm and head stay gathered for the whole step
    selective   a layer keeps its input, attention's output and every second product: 1, 3, 5, 7 of
                q, k, v, out, w1, w3, w2; compiled code drops the last, which no gradient needs
    full        a layer keeps its input
    fp8         products take 8-bit copies of their inputs; what is kept is kept in 16 bits
    tensor      sequence-parallel norms; inputs of products gathered, outputs reduce-scattered,
                both through a copy that brings ranks and tokens in order, the tokens not being the
                first dimension (torch/distributed/_functional_collectives.py); asynchronous: those
                buffers lie in symmetric memory, outside the allocator
    loss        fp32 copy of the logits, log-probabilities and their gradients as whole tensors;
                split by vocabulary one more (torch/distributed/tensor/parallel/loss.py); compiled:
                16-bit logits and their gradient alone

No figure is fitted. Left out: what autograd, NCCL and the driver hold outside the allocator, masks,
token ids, row statistics of norms, 8-bit copies of weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from hwmodels.errors import InputError
from simulator.activation_memory import CUBLAS_WORKSPACE_HOPPER_BYTES
from simulator.memory_timeline import (
    ENDS,
    FLOWING,
    GRADIENTS,
    KEPT,
    OPTIMIZER,
    RECOMPUTED,
    WEIGHTS,
    Timeline,
    Trace,
)
from workloads.models.architecture import Attention, TransformerConfig
from workloads.models.parameters import count_parameters, layer_parameters
from workloads.numeric import ceil_div
from workloads.plan import Plan, Recompute

BUFFERS, LOGITS, WORKSPACE, TRANSIENT = "buffers", "logits", "workspace", "transient"
GATHER, REDUCE = "all-gather stream", "reduce-scatter stream"
NUM_STEPS: Final = 3
"""Steps replayed: the optimizer's states come at the end of the first."""
BF16_BYTES, FP32_BYTES, FP8_BYTES = 2, 4, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FsdpTrainer:
    """What a run of the trainer switches on."""

    compiled: bool = True
    compiled_loss: bool = False
    fp8: bool = False
    async_tp: bool = False


def fsdp_timeline(
    cfg: TransformerConfig, *, len_seq: int, plan: Plan, trainer: FsdpTrainer
) -> Timeline:
    """`NUM_STEPS` optimizer steps of one rank, a micro-batch each; dense models, no pipeline.

    >>> from workloads.models.config import load_hf_config
    >>> llama = load_hf_config("examples/llama3-8b.json")
    >>> plan = Plan(dp=8, zero_stage=3, recompute=Recompute.FULL)
    >>> line = fsdp_timeline(llama, len_seq=8192, plan=plan, trainer=FsdpTrainer())
    >>> line.replayed().peak_reserved_bytes >= line.peak_bytes
    True
    """
    attends = isinstance(cfg.attention, Attention) and cfg.mixer is None
    if cfg.moe is not None or not attends or not cfg.mlp.gated:
        raise InputError(f"{cfg.name}: only dense gated models are replayed under FSDP")
    if plan.pp != 1 or plan.zero_stage != 3:
        raise InputError("the replay is of ZeRO 3 without a pipeline; set pp=1, zero_stage=3")
    if plan.recompute == Recompute.NONE:
        raise InputError("the replay knows selective and full recompute; set one of them")
    trace = Trace()
    run = _Run(cfg, len_seq, plan, trainer, trace)
    trace.allocate("cublas", CUBLAS_WORKSPACE_HOPPER_BYTES, kind=WORKSPACE)
    for unit in run.units():
        trace.allocate((WEIGHTS, unit), run.shard(unit) * FP32_BYTES, kind=WEIGHTS)
    for index in range(NUM_STEPS):
        run.step(first=index == 0)
    return trace.timeline()


ROOT: Final = -1
"""The unit of embedding, last norm and head; layers count from 0."""


@dataclass(frozen=True, slots=True)
class _Run:
    cfg: TransformerConfig
    len_seq: int
    plan: Plan
    trainer: FsdpTrainer
    trace: Trace

    # ---- sizes -----------------------------------------------------------------------------

    @property
    def tokens(self) -> float:
        return float(ceil_div(self.plan.micro_batch * self.len_seq, self.plan.cp))

    @property
    def rows(self) -> float:
        return float(ceil_div(self.tokens, self.plan.tp))

    @property
    def heads(self) -> float:
        return float(ceil_div(self.cfg.attention.num_heads, self.plan.tp))

    @property
    def q_bytes(self) -> float:
        assert isinstance(self.cfg.attention, Attention)
        return self.tokens * self.heads * self.cfg.attention.head_dim * BF16_BYTES

    @property
    def kv_bytes(self) -> float:
        spec = self.cfg.attention
        assert isinstance(spec, Attention)
        heads = float(ceil_div(spec.num_kv_heads, self.plan.tp))
        return self.tokens * heads * spec.head_dim * BF16_BYTES

    @property
    def ffn_bytes(self) -> float:
        return self.tokens * float(ceil_div(self.cfg.mlp.ffn_dim, self.plan.tp)) * BF16_BYTES

    @property
    def row_bytes(self) -> float:
        """Hidden states where the sequence is split over tp."""
        return self.rows * self.cfg.hidden_dim * BF16_BYTES

    @property
    def whole_bytes(self) -> float:
        """Hidden states of all tokens of the rank."""
        return self.tokens * self.cfg.hidden_dim * BF16_BYTES

    @property
    def logit_entries(self) -> float:
        return self.tokens * float(ceil_div(self.cfg.vocab_size, self.plan.tp))

    @property
    def is_split(self) -> bool:
        """Is the model split over tensor-parallel ranks?"""
        return bool(self.plan.tp > 1)

    def units(self) -> range:
        """FSDP's units: the root, then the layers."""
        return range(ROOT, self.cfg.num_layers)

    def parameters(self, unit: int) -> float:
        """Of a unit on one tensor-parallel rank."""
        if unit == ROOT:
            count = count_parameters(self.cfg)
            return float(count.embedding_and_head / self.plan.tp + self.cfg.hidden_dim)
        return float(layer_parameters(self.cfg, "dense", self.plan.tp).total)

    def shard(self, unit: int) -> float:
        return float(ceil_div(self.parameters(unit), self.plan.dp * self.plan.cp))

    # ---- the step --------------------------------------------------------------------------

    def step(self, *, first: bool) -> None:
        """Forward, loss, backward, optimizer; gradients of the step before go first."""
        if not first:
            self.trace.free(*((GRADIENTS, unit) for unit in self.units()))
        self.gather(ROOT)
        self.trace.allocate(("input", 0), self.row_bytes, kind=KEPT)
        for layer in range(self.cfg.num_layers):
            self.gather(layer)
            self.forward(layer)
            if layer < self.cfg.num_layers - 1:  # the last one is needed again at once
                self.release(layer)
        self.loss()
        for layer in reversed(range(self.cfg.num_layers)):
            if not self.trace.is_live(("gathered", layer)):
                self.gather(layer)
            self.backward(layer)
            self.release(layer)
            self.reduce(layer)
        self.trace.free(("input gradient", 0))
        root = BF16_BYTES * self.parameters(ROOT)
        self.trace.allocate("embedding gradient", root / 2, kind=GRADIENTS)
        self.release(ROOT)
        self.trace.allocate((GRADIENTS, "unsharded"), 0, kind=GRADIENTS)
        self.reduce(ROOT)
        self.trace.free("embedding gradient", "head gradient")
        self.optimizer(first=first)

    def gather(self, unit: int) -> None:
        """All-gather into a flat buffer, copied into the weights; the buffer before goes."""
        num_bytes = self.parameters(unit) * self.weight_bytes(unit)
        trace = self.trace
        trace.allocate(("flat", unit), num_bytes, kind=BUFFERS, stream=GATHER)
        trace.allocate(("gathered", unit), num_bytes, kind=BUFFERS)
        trace.free(*(("flat", u) for u in self.units() if u != unit and trace.is_live(("flat", u))))

    def weight_bytes(self, unit: int) -> int:
        return FP8_BYTES if self.trainer.fp8 and unit != ROOT else BF16_BYTES

    def release(self, unit: int) -> None:
        self.trace.free(("gathered", unit))
        if unit == ROOT:
            flats = [("flat", u) for u in self.units() if self.trace.is_live(("flat", u))]
            self.trace.free(*flats)

    def reduce(self, unit: int) -> None:
        """Gradients into the flat fp32 input of the reduce-scatter; the shard stays."""
        trace = self.trace
        flat = self.parameters(unit) * FP32_BYTES
        trace.allocate(("reduce", unit), flat, kind=BUFFERS)  # copied in on the compute stream
        shard = self.shard(unit) * FP32_BYTES
        trace.allocate((GRADIENTS, unit), shard, kind=GRADIENTS, stream=REDUCE)
        if trace.is_live((GRADIENTS, "unsharded")):
            trace.free((GRADIENTS, "unsharded"))
        others = [("reduce", u) for u in self.units() if u != unit or unit == ROOT]
        trace.free(*(name for name in others if trace.is_live(name)))

    def optimizer(self, *, first: bool) -> None:
        """Moments at the first step; the denominators of all parameters at once (foreach)."""
        for unit in self.units() if first else ():
            for moment in ("m", "v"):
                name = (OPTIMIZER, moment, unit)
                self.trace.allocate(name, self.shard(unit) * FP32_BYTES, kind=OPTIMIZER)
        for unit in self.units():
            num_bytes = self.shard(unit) * FP32_BYTES
            self.trace.allocate(("denominator", unit), num_bytes, kind=TRANSIENT)
        self.trace.free(*(("denominator", unit) for unit in self.units()))

    # ---- a layer ---------------------------------------------------------------------------

    def kept(self) -> tuple[str, ...]:
        """What of a layer's forward pass outlives it."""
        if self.plan.recompute == Recompute.FULL:
            return ()
        products = ("q", "v", "w1") if self.trainer.compiled else ("q", "v", "w1", "w2")
        return (*products, "attention", "logsumexp")

    def parts(self) -> Iterable[tuple[str, float, tuple[str, ...]]]:
        """Tensors of a layer's forward pass in order, and the ones that die with each."""
        yield from self.normed("norm1")
        yield "q", self.q_bytes, ()
        yield "k", self.kv_bytes, ()
        yield "v", self.kv_bytes, self.taken("norm1")
        yield from self.rotated()
        yield "k repeated", self.q_bytes, ("k rotated",)
        yield "v repeated", self.q_bytes, ("v",)
        yield "attention", self.q_bytes, ()
        yield "logsumexp", self.tokens * self.heads * FP32_BYTES, ("q rotated", "k repeated",
                                                                   "v repeated")  # fmt: skip
        yield "attention rows", self.q_bytes, ("attention", "logsumexp")
        yield from self.eighth("attention rows 8", self.q_bytes)
        yield from self.scattered("out", ("attention rows", "attention rows 8"))
        yield "middle", self.row_bytes, ("out",)
        yield from self.normed("norm2")
        yield "w1", self.ffn_bytes, ()
        yield "w3", self.ffn_bytes, self.taken("norm2")
        if not self.trainer.compiled:
            yield "silu", self.ffn_bytes, ()
        yield "product", self.ffn_bytes, ("w1", "silu", "w3")
        yield from self.eighth("product 8", self.ffn_bytes)
        yield from self.scattered("w2", ("product", "product 8"))

    def normed(self, name: str) -> Iterable[tuple[str, float, tuple[str, ...]]]:
        """A norm (eager: fp32 copies), its output gathered over tp, an 8-bit copy of it."""
        if not self.trainer.compiled:
            yield f"{name} float", 2 * self.row_bytes, ()
            yield f"{name} square", 2 * self.row_bytes, ()
            yield f"{name} scaled", 2 * self.row_bytes, (f"{name} square",)
            yield f"{name} cast", self.row_bytes, ()
        yield name, self.row_bytes, (f"{name} float", f"{name} scaled", f"{name} cast")
        split = self.is_split
        yield from self.eighth(f"{name} 8", self.row_bytes)
        if split and not self.trainer.async_tp:
            whole = self.whole_bytes / (BF16_BYTES if self.trainer.fp8 else 1)
            yield f"{name} ranks", whole, (f"{name} 8",) if self.trainer.fp8 else ()
            yield f"{name} gathered", whole, (f"{name} ranks",)

    def taken(self, name: str) -> tuple[str, ...]:
        """What dies when the last product has taken its input."""
        return (name, f"{name} 8", f"{name} gathered")

    def eighth(self, name: str, num_bytes: float) -> Iterable[tuple[str, float, tuple[str, ...]]]:
        if self.trainer.fp8:
            yield name, num_bytes / BF16_BYTES, ()

    def rotated(self) -> Iterable[tuple[str, float, tuple[str, ...]]]:
        """Rotary positions: eager code goes through fp32."""
        if not self.trainer.compiled:
            yield "q float", 2 * self.q_bytes, ()
            yield "k float", 2 * self.kv_bytes, ()
            yield "q turned", 2 * self.q_bytes, ("q float",)
            yield "k turned", 2 * self.kv_bytes, ("k float",)
        yield "q rotated", self.q_bytes, ("q", "q turned")
        yield "k rotated", self.kv_bytes, ("k", "k turned")

    def scattered(
        self, name: str, dies: tuple[str, ...]
    ) -> Iterable[tuple[str, float, tuple[str, ...]]]:
        """The output of a row-parallel product, reduce-scattered over tp."""
        if self.is_split and not self.trainer.async_tp:
            yield f"{name} partial", self.whole_bytes, dies
            yield f"{name} ranks", self.whole_bytes, (f"{name} partial",)
            dies = (f"{name} ranks",)
        yield name, self.row_bytes, dies

    def forward(self, layer: int) -> None:
        """The tensors come and go; what is kept stays, the output is the next layer's input."""
        trace, kept = self.trace, self.kept()
        for name, num_bytes, dies in self.parts():
            trace.allocate((layer, name), num_bytes, kind=KEPT if name in kept else TRANSIENT)
            self.end(layer, (d for d in dies if d not in kept))
        trace.allocate(("input", layer + 1), self.row_bytes, kind=KEPT)
        self.end(layer, (d for d in ("middle", "w2") if d not in kept))

    def end(self, layer: int, names: Iterable[str]) -> None:
        """Free those of the names that are there."""
        self.trace.free(*((layer, n) for n in names if self.trace.is_live((layer, n))))

    def backward(self, layer: int) -> None:
        """Everything dropped comes back up to the last product's input, then gradients run."""
        trace = self.trace
        for name, num_bytes, _ in self.parts():
            if name == "w2" or name.endswith((" square", " partial", " ranks")):
                continue
            if not trace.is_live((layer, name)):
                trace.allocate((layer, name), num_bytes, kind=RECOMPUTED)
        weights = BF16_BYTES * self.parameters(layer)
        trace.allocate((GRADIENTS, "unsharded"), weights, kind=GRADIENTS)
        self.gradients(layer)
        self.end(layer, [name for name, _, _ in self.parts()])
        trace.free(("input gradient", layer + 1), ("input", layer))

    def gradients(self, layer: int) -> None:
        """Gradients of the two blocks; a block's inner ones die before the other begins."""
        split = self.is_split and not self.trainer.async_tp
        gathered = self.whole_bytes if split else 0.0
        inner = {
            "feed-forward": (gathered, 3 * self.ffn_bytes, 2 * self.whole_bytes),
            "attention": (gathered, 6 * self.q_bytes, 2 * self.kv_bytes, 2 * self.whole_bytes),
        }
        for block, sizes in inner.items():
            names = [(layer, block, i) for i in range(len(sizes))]
            for name, num_bytes in zip(names, sizes, strict=True):
                self.trace.allocate(name, num_bytes, kind=FLOWING)
            if block == "attention":
                below = ("input gradient", layer)
                self.trace.allocate(below, self.row_bytes, kind=FLOWING)
            self.trace.free(*names)

    # ---- the loss --------------------------------------------------------------------------

    def loss(self) -> None:
        """Last norm, head, loss, and their gradients down to the last layer's output."""
        trace = self.trace
        last, half, split = self.cfg.num_layers, BF16_BYTES, self.is_split
        trace.allocate("normed", self.row_bytes, kind=ENDS)
        whole = self.whole_bytes if split else 0
        trace.allocate("normed ranks", whole, kind=TRANSIENT)
        trace.allocate("normed gathered", whole, kind=ENDS)
        trace.free("normed ranks")
        self.logits("logits", half)
        if self.trainer.compiled_loss:
            self.logits("logit gradients", half)
            trace.free("logits")
        else:
            self.whole_tensors(split)
            self.logits("logit gradients", half)
            trace.free("fp32 gradients")
        head = half * self.parameters(ROOT) / 2
        trace.allocate("head gradient", head, kind=GRADIENTS)
        trace.allocate("hidden gradient", self.whole_bytes, kind=FLOWING)
        trace.free("logit gradients", "normed gathered")
        trace.allocate(("input gradient", last), self.row_bytes, kind=FLOWING)
        trace.free("hidden gradient", "normed", ("input", last))

    def logits(self, name: str, num_bytes: int) -> None:
        self.trace.allocate(name, num_bytes * self.logit_entries, kind=LOGITS)

    def whole_tensors(self, split: bool) -> None:
        """fp32 tensors of the eager loss; leaves the gradient of the fp32 logits."""
        trace, full = self.trace, FP32_BYTES
        self.logits("fp32 logits", full)
        if split:
            self.logits("shifted", full)
            self.logits("exponentials", full)
            trace.free("exponentials")
        self.logits("log-probabilities", full)
        trace.free("fp32 logits", *(["shifted"] if split else []), "logits")
        self.logits("loss gradient", full)
        if split:
            self.logits("exponentials", full)
            self.logits("sum", full)
            trace.free("exponentials")
        self.logits("fp32 gradients", full)
        trace.free("loss gradient", "log-probabilities", *(["sum"] if split else []))
