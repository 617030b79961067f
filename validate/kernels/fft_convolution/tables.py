"""Tables of the Monarch transforms: DFT matrices, twiddles, spectra; made once, in float64."""

from __future__ import annotations

import math
from typing import Final

import torch

LEAST_FACTOR: Final = 16
"""The least side of a tensor core's product."""


def num_points(len_seq: int) -> int:
    """Complex points of a transform: the least power of two that holds the sequence."""
    return max(LEAST_FACTOR**2, 1 << (len_seq - 1).bit_length())


def _roots(exponents: torch.Tensor, period: int, device: torch.device) -> torch.Tensor:
    """exp(2 pi i exponents / period), exponents whole numbers."""
    angle = (exponents % period).double() * (2 * math.pi / period)
    return torch.polar(torch.ones_like(angle), angle).to(device)


def _planes(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.stack((values.real, values.imag)).to(dtype).contiguous()


def matrices(size: int, twist: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[4, size, size]: the unitary DFT's matrix, real and imaginary, and its inverse's.

    `twist` > 0: inputs j are first turned by exp(2 pi i j / twist), outputs of the inverse back.
    """
    j = torch.arange(size)
    forward = _roots(-j[:, None] * j[None, :], size, device)
    if twist:
        forward = forward * _roots(j, twist, device)[None, :]
    forward = forward / math.sqrt(size)
    inverse = forward.conj().T.resolve_conj()
    return torch.cat((_planes(forward, dtype), _planes(inverse, dtype)))


def twiddles(
    size: int, after: int, twist: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """[2, size, after]: exp(-2 pi i k j / (size after)), times exp(2 pi i j / twist)."""
    k, j = torch.arange(size), torch.arange(after)
    found = _roots(-k[:, None] * j[None, :], size * after, device)
    if twist:
        found = found * _roots(j, twist, device)[None, :]
    return _planes(found, dtype)


def spectrum(
    k: torch.Tensor, factors: tuple[int, ...], dtype: torch.dtype, *, circular: bool
) -> torch.Tensor:
    """[2, channels, points]: the filters' transforms in the order that the stages leave.

    A stage of n of the points left takes frequency k + n k' to place (k, k').
    """
    points = math.prod(factors)
    taps = k.double()
    if not circular:
        turn = _roots(torch.arange(taps.shape[-1]), 4 * points, k.device)
        taps = taps * turn
    left = torch.fft.fft(taps, points)
    shape = [len(left)]
    for n in factors[:-1]:
        left = left.unflatten(-1, (-1, n)).transpose(-1, -2)
        shape.append(n)
    return _planes(left.reshape(shape[0], points), dtype)
