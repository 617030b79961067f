"""What a training framework adds to its kernels' times, and how much of its exchange it hides.

A kernel model times one kernel by itself. In a training step the same kernels run for hours at the
power limit, written by a framework that fuses less than one could, beside collectives that take
some of the memory bandwidth. So on the calibrated rung

    product      t_kernel * product        matrix products, by device and number format
    attention    t_kernel * attention      fused attention, the framework's kernel
    scores       t_kernel * scores         softmax, mask and dropout of attention in pieces
    pointwise    t_kernel * pointwise      maps and norms: kernels where one would do, casts
    optimizer    t_kernel * optimizer      passes over the states where one would do
    layer        + layer_s                 a layer of a micro-batch: launches that nothing hides
    tensor       t_exchange * tensor       tensor-parallel collectives, waited for or overlapped
    exposed      + exposed t_busy          what data-parallel exchange under kernels costs these:
                                           processors, memory bandwidth, gaps between its parts,
                                           for as long as it would take on the innermost link: a
                                           slower network keeps them no busier
    jitter       + jitter sqrt(2 ln n) t   steps end with the slowest of n nodes: the expected
                                           maximum of n normal times, `jitter` their deviation

The factors are fitted on published steps (`python -m validate.step_fit`), a handful in all: none
belongs to a model, a size or a plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from hwmodels import catalog
from hwmodels.device import Device
from hwmodels.dtypes import BF16
from hwmodels.errors import UnknownNameError
from hwmodels.frozen import FrozenDict
from simulator.expert_run import ExpertRun
from simulator.recipe import Recipe
from workloads.op import Op
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.ops.grouped_matmul import GroupedMatmul
from workloads.ops.matmul import BatchedMatmul, Matmul
from workloads.ops.quantise_tensor import QuantiseTensor
from workloads.ops.quantised_matmul import QuantisedMatmul

PRODUCT, ATTENTION, SCORES, POINTWISE, OPTIMIZER, LAYER, TENSOR, EXPOSED = (
    "product", "attention", "scores", "pointwise", "optimizer", "layer", "tensor", "exposed",
)  # fmt: skip
NARROW, ROWWISE, QUANTISE, JITTER = "narrow", "rowwise", "quantise", "jitter"
ROWWISE_FRAC: Final = 1.19
"""Products with scales by row over those with one scale, torch._scaled_mm on Hopper: anchored on
6,412 against 7,186 tokens/s of Llama 3 8B on 8 H100 (pytorch/torchtitan, commit 7a04053), of which
casts and gathers explain a third."""
SECOND: Final = "second"
"""Selective recomputation of every second product and all maps."""
SERIAL: Final = "serial"
"""Gradients are reduced after the last backward pass, under nothing."""
EAGER_PASSES: Final[Mapping[str, tuple[float, float]]] = FrozenDict(
    norm=(36 / 4, 76 / 6), rope=(20 / 4, 20 / 4), activation=(10 / 6, 18 / 10)
)
"""torchtitan's Llama without a compiler, bytes per element over those of one kernel. RMSNorm in
single precision: cast (6), square (8), mean (4), product (8), cast (6), weight (4), and the
gradient of each. Rotation: cast (6), complex product (8), cast (6). SiLU (4), product with the gate
(6)."""
COUNTED_LOSS_BYTES: Final = 14.0
"""Bytes a logit costs as `workloads.models` writes the loss: a softmax that keeps probabilities
(read and write 4), their gradient (read 4, write 2)."""
EAGER_LOSS_BYTES: Final = 36.0
"""PyTorch's cross-entropy on 16-bit logits, kernel by kernel: cast (2 + 4), log-softmax (8), zeros
for the gradient (4), backward of log-softmax (12), cast (6)."""
FUSED_LOSS_BYTES: Final = 6.0
"""One kernel that reads 16-bit logits, and one that overwrites them with their gradient."""
PARALLEL_LOSS_BYTES: Final = 52.0
"""Megatron-LM's cross-entropy over a split vocabulary, kernel by kernel (cross_entropy.py without
fusion): cast (6), maximum (4), subtraction (8), exponential (8), sum (4), division (8); backward:
product (8), cast (6)."""
REFERENCE_BOARD: Final[Mapping[str, tuple[float, int, float]]] = FrozenDict(
    Ampere=(400.0, 108, 1.41e9), Hopper=(700.0, 132, 1.83e9), Blackwell=(1000.0, 148, 1.856e9)
)
"""Power, SMs and tensor clock of the board that a prior of products is for: A100 SXM, H100 SXM,
B200 SXM as catalogued."""
POWER_EXPONENT: Final = 0.4
CLASSES: Final = (PRODUCT, ATTENTION, SCORES, POINTWISE, OPTIMIZER, LAYER, TENSOR, EXPOSED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A framework as a set of choices; the values of its factors are data (`StepConstants`).

    `attention_kernel` is a label of the attention models ('' the usual kernel); `fused_attention`
    False: scores are written and read. The other fields name factors that frameworks share.
    `selective` says what selective recomputation runs again: 'scores' of unfused attention, or
    'second': every second product and all maps; or the `modules` of that name; with `early_stop`,
    recomputation ends where nothing more is needed (`simulator.recomputation`). Without
    `sequence_parallel`, tensor-parallel ranks repeat norms and residuals.

    `gradient_bytes`: of a gradient element as it is reduced and given to the optimizer; None: as
    the recipe says. `loss_bytes`: what the kernels of the loss move for a logit, forward and
    backward, counted in the framework's source. `passes`: bytes that its kernels for a map move
    over those of one kernel, (forward, backward). `sequence_copies`: tensor-parallel collectives
    copy what they gather or scatter (`simulator.felt_exchange`).
    """

    name: str
    attention_kernel: str = ""
    fused_attention: bool = True
    pointwise: str = "fused"
    optimizer: str = "fused"
    exposed: str = "overlapped"
    tensor: str = "waited"
    layer: str = ""
    selective: str = "scores"
    modules: tuple[str, ...] = ()
    early_stop: bool = False
    sequence_parallel: bool = True
    gradient_bytes: float | None = None
    loss_bytes: float = COUNTED_LOSS_BYTES
    sequence_copies: bool = False
    passes: Mapping[str, tuple[float, float]] = field(default_factory=FrozenDict)
    source: str = ""

    def exchanged(self, recipe: Recipe) -> Recipe:
        """The recipe with gradients as wide as this framework reduces them."""
        if self.gradient_bytes is None:
            return recipe
        return replace(recipe, gradient_bytes=self.gradient_bytes)


_MEGATRON_2022 = Stack(
    name="megatron-2022",
    fused_attention=False,
    pointwise="megatron-2022",
    exposed=SERIAL,
    loss_bytes=PARALLEL_LOSS_BYTES,
    source="Megatron-LM before fused attention (arXiv 2205.05198): fused maps, softmax with its "
    "mask, fused Adam, sequence parallelism",
)
_MEGATRON = Stack(
    name="megatron",
    pointwise="megatron",
    tensor="overlapped",
    gradient_bytes=4,
    loss_bytes=PARALLEL_LOSS_BYTES,
    source="Megatron Core: Transformer Engine, distributed optimizer, gradients in "
    "single precision, tensor-parallel collectives overlapped",
)
_FOUNDRY = Stack(
    name="llm-foundry",
    attention_kernel="figure:fa1",
    pointwise="eager",
    optimizer="eager",
    exposed="fsdp",
    layer="eager",
    early_stop=True,
    loss_bytes=FUSED_LOSS_BYTES,
    source="MosaicML llm-foundry on PyTorch 2.1: eager, FSDP, checkpointing that is not "
    "reentrant, FlashAttention-1 in Triton, DecoupledAdamW",
)
_TITAN = Stack(
    name="torchtitan",
    attention_kernel="figure:fa2",
    exposed="fsdp",
    pointwise="compiled",
    passes=EAGER_PASSES,
    selective=SECOND,
    early_stop=True,
    gradient_bytes=4,
    loss_bytes=EAGER_LOSS_BYTES,
    sequence_copies=True,
    source="torchtitan without torch.compile: FSDP2 that reduces in single precision, "
    "FlashAttention-2 by PyTorch's scaled_dot_product_attention",
)
STACKS: Final[Mapping[str, Stack]] = FrozenDict(
    {
        s.name: s
        for s in (
            _MEGATRON_2022,
            replace(
                _MEGATRON_2022,
                name="megatron-2022-whole",
                sequence_parallel=False,
                source="the same without sequence parallelism: every rank has whole norms",
            ),
            replace(
                _MEGATRON_2022,
                name="megatron-2021",
                pointwise="megatron",
                sequence_parallel=False,
                source="Megatron-LM a year earlier (arXiv 2104.04473), gradients reduced at last",
            ),
            replace(
                _MEGATRON_2022,
                name="megatron-2021-ddp",
                pointwise="megatron",
                sequence_parallel=False,
                exposed="overlapped",
                source="the same in PyTorch's DistributedDataParallel, which overlaps reduction",
            ),
            _MEGATRON,
            replace(
                _MEGATRON,
                name="megatron-bridge",
                pointwise="fused",
                gradient_bytes=2,
                loss_bytes=FUSED_LOSS_BYTES,
                source="Megatron-Bridge's performance scripts: the same with 16-bit gradients",
            ),
            replace(
                _MEGATRON,
                name="megatron-bridge-fsdp",
                pointwise="fused",
                exposed="fsdp",
                gradient_bytes=2,
                loss_bytes=FUSED_LOSS_BYTES,
                source="the same, fully sharded (Megatron-FSDP)",
            ),
            replace(
                _MEGATRON,
                name="megatron-bridge-fp4",
                pointwise="fused",
                gradient_bytes=2,
                loss_bytes=FUSED_LOSS_BYTES,
                tensor="waited",
                source="the same without overlap of tensor parallelism, as for nvfp4",
            ),
            _FOUNDRY,
            replace(
                _FOUNDRY,
                name="llm-foundry-torch1",
                early_stop=False,
                source="the same on PyTorch 1.13, which recomputes the whole of a layer",
            ),
            _TITAN,
            replace(
                _TITAN,
                name="torchtitan-compiled",
                passes=FrozenDict(),
                source="the same under torch.compile",
            ),
            replace(
                _TITAN,
                name="torchtitan-async-tp",
                passes=FrozenDict(),
                tensor="overlapped",
                sequence_copies=False,
                source="the same with asynchronous tensor parallelism",
            ),
        )
    }
)


def stack(name: str) -> Stack:
    """The framework of that name."""
    if name not in STACKS:
        raise UnknownNameError("stack", name, STACKS, f"one of {', '.join(STACKS)}, or bound")
    return STACKS[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """One framework's factors on one device; 1 (0 for `layer_s`, `exposed`,
    `jitter`) changes nothing.
    """

    product: float = 1.0
    attention: float = 1.0
    scores: float = 1.0
    pointwise: float = 1.0
    optimizer: float = 1.0
    layer_s: float = 0.0
    tensor: float = 1.0
    exposed: float = 0.0
    jitter: float = 0.0
    narrow: float = 1.0
    rowwise: float = 1.0
    quantise: float = 1.0

    def of(self, kernel_class: str) -> float:
        """The factor of a class of kernels."""
        found: float = getattr(self, kernel_class)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class OnDevice:
    """A framework with its factors on a device, where these come from, how it runs experts."""

    stack: Stack
    factors: Factors
    source: str = "no factor fitted"
    experts: ExpertRun = field(default_factory=ExpertRun)


PRIORS: Final[Mapping[str, tuple[float, float]]] = FrozenDict(
    {
        "product": (1.05, 0.15),
        "attention": (1.0, 0.3),
        "scores": (1.5, 0.8),
        "pointwise/fused": (1.2, 0.5),
        "pointwise/compiled": (1.1, 0.5),
        "pointwise/megatron": (1.5, 0.6),
        "pointwise/megatron-2022": (1.5, 0.6),
        "pointwise/eager": (2.0, 0.8),
        "optimizer/fused": (1.2, 0.5),
        "optimizer/eager": (5.0, 1.0),
        "exposed/overlapped": (0.3, 1.0),
        "exposed/fsdp": (0.5, 1.0),
        "tensor/waited": (1.2, 0.4),
        "tensor/overlapped": (0.6, 0.6),
        "layer/eager": (1e-3, 2.0),
        "jitter": (0.01, 0.7),
        "narrow": (1.0, 0.15),
        "quantise": (1.2, 0.5),
    }
)
"""What a fit holds each factor to: a value from experience, and the spread of its logarithm. A
product is slower in a long run than alone (power); a map in eager code is two or more kernels."""


def factor_names(framework: Stack, device: Device) -> tuple[str, ...]:
    """The factors that a framework on a device uses, by the names they are fitted under."""
    names = [
        f"{PRODUCT}/{device.id}",
        f"{POINTWISE}/{framework.pointwise}",
        f"{OPTIMIZER}/{framework.optimizer}",
        *((f"{EXPOSED}/{framework.exposed}",) if framework.exposed != SERIAL else ()),
        f"{TENSOR}/{framework.tensor}",
        JITTER,
        ATTENTION if framework.fused_attention else SCORES,
    ]
    return (*names, f"{LAYER}/{framework.layer}") if framework.layer else tuple(names)


def narrow_factor_names(device: Device) -> tuple[str, ...]:
    """The factors that a recipe of low-precision training adds on a device."""
    return f"{NARROW}/{device.architecture}", QUANTISE


def factors_of(framework: Stack, device: Device, values: Mapping[str, float]) -> Factors:
    """The framework's factors on the device; one that was never fitted stays at its prior."""
    narrow = _product(device, values) * _value(f"{NARROW}/{device.architecture}", values)
    return Factors(
        product=_product(device, values),
        attention=_value(ATTENTION, values) * _power(device),
        scores=_value(SCORES, values),
        pointwise=_value(f"{POINTWISE}/{framework.pointwise}", values),
        optimizer=_value(f"{OPTIMIZER}/{framework.optimizer}", values),
        layer_s=_value(f"{LAYER}/{framework.layer}", values) if framework.layer else 0.0,
        tensor=_value(f"{TENSOR}/{framework.tensor}", values),
        narrow=narrow,
        rowwise=narrow * ROWWISE_FRAC,
        quantise=_value(QUANTISE, values),
        jitter=_value(JITTER, values),
        exposed=1.0
        if framework.exposed == SERIAL
        else min(_value(f"{EXPOSED}/{framework.exposed}", values), 1.0),
    )


def _value(name: str, values: Mapping[str, float]) -> float:
    return values.get(name, prior_of(name)[0])


def prior_of(name: str) -> tuple[float, float]:
    """The prior of a factor: its own, or that of its class.

    Products run at the power limit; power goes with frequency times voltage squared, and voltage
    with frequency: a board with less of it is slower by less than the square root. One with a
    higher clock, or more SMs, for the same power falls further below what its clock promises.
    """
    if name in PRIORS:  # that of fused attention is multiplied by the board's share as well
        return PRIORS[name]
    kind, _, owner = name.partition("/")
    value, spread = PRIORS[kind]
    if kind == PRODUCT:
        value *= _power(catalog.device(owner))
    return value, spread


def _power(device: Device) -> float:
    reference = REFERENCE_BOARD.get(device.architecture)
    if reference is None or device.tdp_w is None:
        return 1.0
    power_w, num_sms, clock_hz = reference
    clock = (device.tensor_clock_hz or device.clock_hz) / clock_hz
    power = power_w * device.num_sms / num_sms / device.tdp_w
    return float(clock * power**POWER_EXPONENT)


def _product(device: Device, values: Mapping[str, float]) -> float:
    """Of the device itself, else of its architecture's, with the power each may draw."""
    own = values.get(f"{PRODUCT}/{device.id}")
    if own is not None:
        return own
    known = {
        catalog.device(name.removeprefix(f"{PRODUCT}/")): value
        for name, value in values.items()
        if name.startswith(f"{PRODUCT}/")
    }
    kin = [math.log(v / _power(d)) for d, v in known.items()
           if d.architecture == device.architecture]  # fmt: skip
    if not kin:
        return prior_of(f"{PRODUCT}/{device.id}")[0]
    return math.exp(sum(kin) / len(kin)) * _power(device)


def class_of(op: Op) -> str:
    """The class of a kernel by its op; what is neither product nor attention is a map."""
    if isinstance(op, QuantisedMatmul):
        return ROWWISE if op.scheme == "row" else NARROW
    if isinstance(op, GroupedMatmul):
        return NARROW if op.dtype.bits < BF16.bits else PRODUCT
    if isinstance(op, QuantiseTensor):
        return QUANTISE
    if isinstance(op, (Matmul, BatchedMatmul)):
        return PRODUCT
    if isinstance(op, (FlashAttention2, FlashAttention2Backward)):
        return ATTENTION
    return POINTWISE
