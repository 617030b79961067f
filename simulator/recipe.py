"""Precision recipes: bytes each parameter costs in weights, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from hwmodels.device import Device
from hwmodels.dtypes import BF16, FP16, FP32, DType
from hwmodels.errors import InputError, UnknownNameError
from hwmodels.frozen import FrozenDict
from simulator import low_precision
from simulator.low_precision import QUANTISE, LowPrecision, narrowed, weight_casts
from workloads.models.architecture import TransformerConfig
from workloads.models.parameters import count_parameters, parameters_per_rank
from workloads.models.transformer import TrainStep
from workloads.numeric import maximum, where
from workloads.plan import Plan
from workloads.workload import OPTIMIZER, Node, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How parameters are kept while training.

    `weight_bytes` are those the kernels read, `gradient_bytes` the accumulated gradient,
    `optimizer_bytes` the fp32 master copy and the two Adam moments, all per parameter. `low`: the
    linear layers run in a narrower format than `dtype`.
    """

    name: str
    dtype: DType
    weight_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    source: str
    low: LowPrecision | None = None

    @property
    def peak_dtype(self) -> DType:
        """The format whose peak a utilisation is quoted against: that of the linear layers."""
        return self.dtype if self.low is None else self.low.product

    def layer(
        self,
        step: TrainStep,
        kind: str,
        plan: Plan,
        *,
        on: Device,
        fused: bool = True,
        sequence_parallel: bool = True,
    ) -> Workload:
        """One layer of a micro-batch on one rank, its linear products in the recipe's format."""
        work = step.layer(
            kind, plan, dtype=self.dtype, fused=fused, sequence_parallel=sequence_parallel
        )
        return work if self.low is None else narrowed(work, self.low, plan=plan, device=on)

    def weight_casts(self, cfg: TransformerConfig, plan: Plan, on: Device) -> tuple[Node, ...]:
        """What casts the weights of the larger end stage once a step."""
        if self.low is None:
            return ()
        first, last = parameters_per_rank(cfg, plan)
        held = maximum(first.total, last.total) * narrow_frac(cfg)
        shards = where(plan.zero_stage >= 1, plan.dp * plan.cp, 1)
        return tuple(
            Node(name=f"weights{i}", op=op, part=QUANTISE, phase=OPTIMIZER)
            for i, op in enumerate(weight_casts(held, shards, self.low, on))
        )

    def gathered_bytes(self, cfg: TransformerConfig) -> float:
        """Bytes of a parameter that data-parallel ranks gather: the mean over the model."""
        if self.low is None or not self.low.gathers_weights:
            return self.weight_bytes
        share = narrow_frac(cfg)
        return share * self.low.stored.bytes_per_element + (1 - share) * self.weight_bytes

    def gathered_activation_bytes(self) -> float:
        """Bytes of an activation that tensor-parallel ranks gather."""
        if self.low is None or not self.low.gathers_activations:
            return self.dtype.bytes_per_element
        return self.low.stored.bytes_per_element

    @property
    def bytes_per_parameter(self) -> float:
        """Unsharded bytes per parameter.

        >>> RECIPES["bf16"].bytes_per_parameter
        18
        """
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        Recipe(
            name="bf16",
            dtype=BF16,
            weight_bytes=2,
            gradient_bytes=4,
            optimizer_bytes=12,
            source="Megatron-LM mixed precision, fp32 gradients: 18 B (Korthikanti et al. 2022)",
        ),
        Recipe(
            name="bf16-grad16",
            dtype=BF16,
            weight_bytes=2,
            gradient_bytes=2,
            optimizer_bytes=12,
            source="16-bit gradients: 16 B (Rajbhandari et al. 2020, ZeRO, section 3.1)",
        ),
        Recipe(
            name="fp16",
            dtype=FP16,
            weight_bytes=2,
            gradient_bytes=2,
            optimizer_bytes=12,
            source="16-bit gradients: 16 B (Rajbhandari et al. 2020, ZeRO, section 3.1)",
        ),
        Recipe(
            name="fp32",
            dtype=FP32,
            weight_bytes=4,
            gradient_bytes=4,
            optimizer_bytes=8,
            source="Adam in single precision: weight, gradient and two moments of 4 B",
        ),
    )
}

_NARROW: Final[Mapping[str, LowPrecision]] = FrozenDict(
    {
        "fp8-delayed": low_precision.FP8_DELAYED,
        "fp8-current": low_precision.FP8_CURRENT,
        "fp8-tensorwise": low_precision.FP8_TENSORWISE,
        "fp8-rowwise": low_precision.FP8_ROWWISE,
        "fp8-blockwise": low_precision.FP8_BLOCKWISE,
        "mxfp8": low_precision.MXFP8_BLOCKS,
        "nvfp4": low_precision.NVFP4_BLOCKS,
        "mxfp4": low_precision.MXFP4_BLOCKS,
    }
)
RECIPES |= {
    name: Recipe(
        name=name,
        dtype=BF16,
        weight_bytes=2,
        gradient_bytes=2,
        optimizer_bytes=12,
        source=f"{low.source}; 16-bit gradients, states as of bf16-grad16",
        low=low,
    )
    for name, low in _NARROW.items()
}


def narrow_frac(cfg: TransformerConfig) -> float:
    """Share of a model's parameters that are weights of linear layers: neither ends nor norms.

    >>> from workloads.models.config import load_hf_config
    >>> round(narrow_frac(load_hf_config("examples/llama3-8b.json")), 3)
    0.869
    """
    p = count_parameters(cfg)
    return (p.attention + p.mixers + p.mlp + p.experts + p.shared_experts) / p.total


def recipe(name: str) -> Recipe:
    """The recipe of that name."""
    if name not in RECIPES:
        raise UnknownNameError("precision recipe", name, RECIPES, f"one of {', '.join(RECIPES)}")
    return RECIPES[name]


def require_wide(chosen: Recipe, phase: str) -> None:
    """Raise for a recipe of low-precision training where nothing is trained."""
    if chosen.low is not None:
        raise InputError(
            f"recipe {chosen.name} says how a model is trained, not how it serves; "
            f"for {phase} give bf16, fp16 or fp32"
        )
