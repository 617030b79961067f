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
    exposed      + exposed t_hidden        what data-parallel exchange under kernels costs these:
                                           processors, memory bandwidth, gaps between its parts

The factors are fitted on published steps (`python -m validate.step_fit`), a handful in all: none
belongs to a model, a size or a plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from hwmodels import catalog
from hwmodels.device import Device
from hwmodels.errors import UnknownNameError
from hwmodels.frozen import FrozenDict
from workloads.op import Op
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.ops.matmul import BatchedMatmul, Matmul
from workloads.ops.quantised_matmul import QuantisedMatmul

PRODUCT, ATTENTION, SCORES, POINTWISE, OPTIMIZER, LAYER, TENSOR, EXPOSED = (
    "product", "attention", "scores", "pointwise", "optimizer", "layer", "tensor", "exposed",
)  # fmt: skip
HALF: Final = "half"
"""Selective recomputation of every second product and all maps."""
SERIAL: Final = "serial"
"""Gradients are reduced after the last backward pass, under nothing."""
REFERENCE_W: Final[Mapping[str, float]] = FrozenDict(Ampere=400.0, Hopper=700.0, Blackwell=1000.0)
"""Power of the board that a prior of products is for."""
POWER_EXPONENT: Final = 0.4
CLASSES: Final = (PRODUCT, ATTENTION, SCORES, POINTWISE, OPTIMIZER, LAYER, TENSOR, EXPOSED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A framework as a set of choices; the values of its factors are data (`StepConstants`).

    `attention_kernel` is a label of the attention models ('' the usual kernel); `fused_attention`
    False: scores are written and read. The other fields name factors that frameworks share.
    `selective` says what selective recomputation runs again: 'scores' of unfused attention, or
    'half' of the products and all maps.
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
    source: str = ""


STACKS: Final[Mapping[str, Stack]] = FrozenDict(
    {
        s.name: s
        for s in (
            Stack(
                name="megatron-2022",
                fused_attention=False,
                pointwise="megatron",
                exposed=SERIAL,
                source="Megatron-LM before fused attention (arXiv 2104.04473, 2205.05198): "
                "fused maps, softmax with its mask, fused Adam",
            ),
            Stack(
                name="megatron",
                pointwise="megatron",
                tensor="overlapped",
                source="Megatron Core: Transformer Engine, distributed optimizer, tensor-parallel "
                "collectives overlapped",
            ),
            Stack(
                name="llm-foundry",
                attention_kernel="figure:fa1",
                pointwise="eager",
                optimizer="eager",
                exposed="fsdp",
                layer="eager",
                source="MosaicML llm-foundry: eager PyTorch with FSDP, FlashAttention-1 in Triton, "
                "DecoupledAdamW",
            ),
            Stack(
                name="torchtitan",
                attention_kernel="figure:fa2",
                exposed="fsdp",
                pointwise="eager",
                selective=HALF,
                source="torchtitan without torch.compile: FSDP2, FlashAttention-2 by PyTorch's "
                "scaled_dot_product_attention",
            ),
            Stack(
                name="torchtitan-compiled",
                attention_kernel="figure:fa2",
                exposed="fsdp",
                pointwise="compiled",
                selective=HALF,
                source="the same under torch.compile",
            ),
            Stack(
                name="torchtitan-async-tp",
                attention_kernel="figure:fa2",
                exposed="fsdp",
                pointwise="compiled",
                tensor="overlapped",
                selective=HALF,
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
    """One framework's factors on one device; 1 (0 for `layer_s`, `exposed`) changes nothing."""

    product: float = 1.0
    attention: float = 1.0
    scores: float = 1.0
    pointwise: float = 1.0
    optimizer: float = 1.0
    layer_s: float = 0.0
    tensor: float = 1.0
    exposed: float = 0.0

    def of(self, kernel_class: str) -> float:
        """The factor of a class of kernels."""
        found: float = getattr(self, kernel_class)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class OnDevice:
    """A framework with its factors on a device, and where these come from."""

    stack: Stack
    factors: Factors
    source: str = "no factor fitted"


PRIORS: Final[Mapping[str, tuple[float, float]]] = FrozenDict(
    {
        "product": (1.05, 0.15),
        "attention": (1.0, 0.3),
        "scores": (1.5, 0.8),
        "pointwise/fused": (1.2, 0.5),
        "pointwise/compiled": (1.1, 0.5),
        "pointwise/megatron": (1.5, 0.6),
        "pointwise/eager": (2.0, 0.8),
        "optimizer/fused": (1.2, 0.5),
        "optimizer/eager": (5.0, 1.0),
        "exposed/overlapped": (0.3, 1.0),
        "exposed/fsdp": (0.5, 1.0),
        "tensor/waited": (1.2, 0.4),
        "tensor/overlapped": (0.6, 0.6),
        "layer/eager": (1e-3, 2.0),
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
        ATTENTION if framework.fused_attention else SCORES,
    ]
    return (*names, f"{LAYER}/{framework.layer}") if framework.layer else tuple(names)


def factors_of(framework: Stack, device: Device, values: Mapping[str, float]) -> Factors:
    """The framework's factors on the device; one that was never fitted stays at its prior."""
    return Factors(
        product=_product(device, values),
        attention=_value(ATTENTION, values),
        scores=_value(SCORES, values),
        pointwise=_value(f"{POINTWISE}/{framework.pointwise}", values),
        optimizer=_value(f"{OPTIMIZER}/{framework.optimizer}", values),
        layer_s=_value(f"{LAYER}/{framework.layer}", values) if framework.layer else 0.0,
        tensor=_value(f"{TENSOR}/{framework.tensor}", values),
        exposed=1.0
        if framework.exposed == SERIAL
        else min(_value(f"{EXPOSED}/{framework.exposed}", values), 1.0),
    )


def _value(name: str, values: Mapping[str, float]) -> float:
    return values.get(name, prior_of(name)[0])


def prior_of(name: str) -> tuple[float, float]:
    """The prior of a factor: its own, or that of its class.

    Products run at the power limit; power goes with frequency times voltage squared, and voltage
    with frequency: a board with less of it is slower by less than the square root.
    """
    if name in PRIORS:
        return PRIORS[name]
    kind, _, owner = name.partition("/")
    value, spread = PRIORS[kind]
    if kind == PRODUCT:
        value *= _power(catalog.device(owner))
    return value, spread


def _power(device: Device) -> float:
    reference = REFERENCE_W.get(device.architecture)
    if reference is None or device.tdp_w is None:
        return 1.0
    return float((reference / device.tdp_w) ** POWER_EXPONENT)


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
    if isinstance(op, (Matmul, BatchedMatmul, QuantisedMatmul)):
        return PRODUCT
    if isinstance(op, (FlashAttention2, FlashAttention2Backward)):
        return ATTENTION
    return POINTWISE
