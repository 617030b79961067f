"""Precision recipes: bytes each parameter costs in weights, gradients and optimizer state."""

from __future__ import annotations

from dataclasses import dataclass

from hwmodels.dtypes import BF16, FP16, FP32, DType
from hwmodels.errors import UnknownNameError


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How parameters are kept while training.

    `weight_bytes` are those the kernels read, `gradient_bytes` the accumulated gradient,
    `optimizer_bytes` the fp32 master copy and the two Adam moments, all per parameter.
    """

    name: str
    dtype: DType
    weight_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    source: str

    @property
    def bytes_per_parameter(self) -> float:
        """Unsharded bytes per parameter.

        >>> RECIPES["bf16"].bytes_per_parameter
        18
        """
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


RECIPES = {
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


def recipe(name: str) -> Recipe:
    """The recipe of that name."""
    if name not in RECIPES:
        raise UnknownNameError("precision recipe", name, RECIPES, f"one of {', '.join(RECIPES)}")
    return RECIPES[name]
