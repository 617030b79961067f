"""The truth of image convolutions: torch's in float64, on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn import grad

from validate.record import Case


def convolution(
    direction: str,
    images: torch.Tensor,
    filters: torch.Tensor,
    dy: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> torch.Tensor:
    """y, dx or dw of images[n, c, h, w] and filters[k, c, r, s]; dy is like y."""
    x, w, dy = (v.double().cpu().contiguous() for v in (images, filters, dy))
    if direction == "fwd":
        return F.conv2d(x, w, stride=stride, padding=padding)
    if direction == "bwd_data":
        return grad.conv2d_input(list(x.shape), w, dy, stride=stride, padding=padding)
    return grad.conv2d_weight(x, list(w.shape), dy, stride=stride, padding=padding)


def output_size(case: Case) -> tuple[int, int]:
    """Height and width of y."""
    p = case.params
    return (
        (p["h"] + 2 * p["pad_h"] - p["r"]) // p["stride_h"] + 1,
        (p["w"] + 2 * p["pad_w"] - p["s"]) // p["stride_w"] + 1,
    )
