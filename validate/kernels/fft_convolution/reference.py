"""The truth of long convolutions: float64 transforms, long enough that nothing wraps unasked."""

from __future__ import annotations

import torch


def convolution(u: torch.Tensor, k: torch.Tensor, *, circular: bool = False) -> torch.Tensor:
    """y[b, c] = u[b, c] * k[c], its first terms; `circular` adds what passes the end in front."""
    length = u.shape[-1]
    points = length if circular else 2 * length
    spectrum = torch.fft.rfft(k.double(), points)
    return torch.fft.irfft(torch.fft.rfft(u.double(), points) * spectrum, points)[..., :length]


def by_taps(u: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The causal convolution as its sum, tap by tap."""
    u, k, y = u.double(), k.double(), torch.zeros(u.shape, dtype=torch.float64)
    for j in range(k.shape[-1]):
        y[..., j:] += k[:, j, None] * u[..., : u.shape[-1] - j]
    return y
