"""The truth of what streams, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import torch


def triad(b: torch.Tensor, c: torch.Tensor, scale: float) -> torch.Tensor:
    """a = b + scale c."""
    return b.double() + scale * c.double()


def repeated_sums(x: torch.Tensor, span: int, passes: int, stride: int) -> torch.Tensor:
    """Sum over passes p of the span (s + p stride) modulo their number, for each span s."""
    sums = torch.stack([piece.double().sum() for piece in torch.split(x, span)])
    return sum((sums.roll(-p * stride) for p in range(passes)), start=torch.zeros_like(sums))


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), Hendrycks and Gimpel 2016."""
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


MAPS: Final[Mapping[str, Callable[..., torch.Tensor]]] = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "relu": lambda x: torch.where(x > 0, x, 0),
    "tanh": torch.tanh,
    "gelu": gelu,
}
"""The maps of `elementwise`, on float64."""


def gate(x: torch.Tensor) -> torch.Tensor:
    """g sigmoid(g) u of rows [g | u] (Shazeer 2020, SwiGLU without its products)."""
    g, u = x.double().chunk(2, dim=-1)
    return g / (1 + torch.exp(-g)) * u
