"""How an output is judged: poisoned first, then compared with the reference by relative norm."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

POISON = math.nan


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """An output of NaN (integers: the least value), so that what is left unwritten shows."""
    value = POISON if dtype.is_floating_point else torch.iinfo(dtype).min
    return torch.full(shape, value, dtype=dtype, device=device)


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """||out - reference|| / ||reference|| in float64; infinite where NaN or infinity stands alone.

    A shape other than the reference's is infinitely wrong. A reference of zeros asks for zeros.

    >>> relative_error(torch.tensor([3.0, 4.4]), torch.tensor([3.0, 4.0])) # doctest: +ELLIPSIS
    0.08...
    >>> relative_error(torch.tensor([math.nan]), torch.tensor([1.0]))
    inf
    """
    if out.shape != reference.shape:
        return math.inf
    found, truth = out.detach().double().cpu(), reference.detach().double().cpu()
    if not bool(torch.isfinite(found).all()):
        return math.inf
    off = float(torch.linalg.vector_norm(found - truth))
    size = float(torch.linalg.vector_norm(truth))
    return off / size if size else (0.0 if off == 0 else math.inf)


def worst_error(outs: Iterable[torch.Tensor], references: Iterable[torch.Tensor]) -> float:
    """The largest relative error over the outputs; infinite where their number differs."""
    try:
        return max(relative_error(o, r) for o, r in zip(outs, references, strict=True))
    except ValueError:
        return math.inf
