"""Linear state spaces of three structures, as plain matrices: parameters, truth, prepared forms.

    x_k = A x_{k-1} + B u_k,   y_k = C x_k + D u_k,      K_k = C A^k B

H systems at once, N states each. Parameters are arrays of real numbers:

    low_rank    p[H, 5, 2, N/2]: real and imaginary parts of lambda, p, q, b, c, and step[H]. The
                continuous A = diag(lambda) - p q*, conjugate pairs kept once, is discretised by the
                bilinear rule with that step (S4, Gu et al. 2022, arXiv 2111.00396, section 3)
    dense       a[H, N, N], b[H, N], c[H, N]   (LSSL, Gu et al. 2021, arXiv 2110.13985)
    companion   a[H, N], b[H, N], c[H, N]: A shifts down, its last column is a   (SpaceTime, Zhang
                et al. 2023, arXiv 2303.09489, section 3.1)

What is prepared once for all steps and lengths (`prepared`, `truncated`) is not counted anywhere:
models learn it in place of the parameters it comes from.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from hwmodels.errors import UnknownNameError
from workloads.machine import Values
from workloads.numeric import Num
from workloads.op import Arrays

LOW_RANK, DENSE, COMPANION = "low_rank", "dense", "companion"
STRUCTURES: Final = (LOW_RANK, DENSE, COMPANION)
VECTORS: Final = 5
"""lambda, p, q, b, c."""
PREPARED: Final = 7
"""Complex vectors of a prepared step: g, p, q, b, d, e, c (see `prepared`)."""


def check_structure(structure: str) -> None:
    """Refuse a structure that is not known."""
    if structure not in STRUCTURES:
        raise UnknownNameError("structure", structure, list(STRUCTURES))


def num_parameters(structure: str, state_dim: Num) -> Num:
    """Real numbers of one system: A, B, C (and the step of a continuous one).

    >>> num_parameters("low_rank", 64), num_parameters("dense", 64), num_parameters("companion", 64)
    (321, 4224, 192)
    """
    if structure == LOW_RANK:
        return VECTORS * state_dim + 1
    return (state_dim if structure == DENSE else 1) * state_dim + 2 * state_dim


def step_numbers(structure: str, state_dim: Num) -> Num:
    """Real numbers of a system that one step reads, D not among them."""
    if structure == LOW_RANK:
        return PREPARED * state_dim
    return num_parameters(structure, state_dim)


class Dense(NamedTuple):
    """Matrices A[H, N, N], B[H, N], C[H, N], complex where the structure is."""

    a: Values
    b: Values
    c: Values


def random_system(structure: str, rng: np.random.Generator, systems: int, n: int) -> Arrays:
    """Parameters of stable systems, decays from slow to fast."""
    if structure == LOW_RANK:
        return _random_low_rank(rng, systems, n // 2)
    b, c = rng.standard_normal((2, systems, n))
    if structure == COMPANION:
        a = rng.standard_normal((systems, n))
        a *= rng.uniform(0.2, 0.99, (systems, 1)) / np.abs(a).sum(axis=1, keepdims=True)
    else:
        a = rng.standard_normal((systems, n, n))
        norm = np.linalg.norm(a, ord=2, axis=(1, 2), keepdims=True)
        a *= rng.uniform(0.2, 0.99, (systems, 1, 1)) / norm
    return {"a": a, "b": b, "c": c}


def _random_low_rank(rng: np.random.Generator, systems: int, pairs: int) -> Arrays:
    vectors = rng.standard_normal((systems, VECTORS, 2, pairs))
    vectors[:, 0, 0] = -(10 ** rng.uniform(-1, 1, (systems, pairs)))
    vectors[:, 0, 1] *= 3
    vectors[:, 2] = rng.uniform(0.2, 1, (systems, 1, 1)) * vectors[:, 1]  # q along p: stable
    return {"p": vectors, "step": 10 ** rng.uniform(-1.5, 0, systems)}


def complex_vectors(parts: Values) -> Values:
    """parts[..., 2, n] as complex numbers."""
    return np.asarray(parts[..., 0, :] + 1j * parts[..., 1, :])


def real_parts(vectors: Values) -> Values:
    """The inverse of `complex_vectors`."""
    return np.stack([vectors.real, vectors.imag], axis=-2)


def dense_form(structure: str, system: Arrays) -> Dense:
    """The discrete system as plain matrices."""
    if structure == DENSE:
        return Dense(system["a"], system["b"], system["c"])
    if structure == COMPANION:
        n = system["a"].shape[1]
        a = np.repeat(np.eye(n, k=-1)[None], len(system["a"]), axis=0)
        a[:, :, -1] += system["a"]
        return Dense(a, system["b"], system["c"])
    half = complex_vectors(system["p"])
    lam, p, q, b, c = np.moveaxis(np.concatenate([half, half.conj()], axis=-1), 1, 0)
    n = lam.shape[1]
    continuous = lam[:, :, None] * np.eye(n) - p[:, :, None] * q.conj()[:, None]
    step = system["step"][:, None, None] / 2 * continuous
    forward, backward = np.eye(n) + step, np.eye(n) - step
    a = np.linalg.solve(backward, forward)
    b = np.linalg.solve(backward, (system["step"][:, None] * b)[:, :, None])[:, :, 0]
    return Dense(a, b, c)


def kernels(structure: str, system: Arrays, length: int) -> Values:
    """K[H, length] = C A^k B, one power after another in float64."""
    found = dense_form(structure, system)
    state, taps = found.b, []
    for _ in range(length):
        taps.append(np.real((found.c * state).sum(axis=1)))
        state = (found.a @ state[:, :, None])[:, :, 0]
    return np.stack(taps, axis=1)


def truncated(structure: str, system: Arrays, points: int) -> Values:
    """C (I + A^n) with n = 2 `points`: [H, N], complex pairs once.

    The generating function cut off after n terms, at roots w of w^m = i with m = n / 2 points,
    where w^n = -1, is this row times (I - A w)^-1 B.
    """
    found = dense_form(structure, system)
    whole = np.linalg.matrix_power(found.a, 2 * points)
    row = found.c + (found.c[:, None] @ whole)[:, 0]
    return row[:, : row.shape[1] // 2] if structure == LOW_RANK else np.real(row)


def prepared(structure: str, system: Arrays) -> Arrays:
    """What a step reads. For the low rank, with r = 2 / step and d = 1 / (r - lambda),

        v = g x - p (q . x) + b u,   w = d v,   x' = w - e (q . w),   y = c . x'

    g = r + lambda, b = 2 b, e = d p / (1 + q* d p), and q . x = 2 Re sum(q* x) over pairs (the 2 is
    in q and c): arXiv 2111.00396, appendix C.2.
    """
    if structure != LOW_RANK:
        return {name: system[name] for name in ("a", "b", "c")}
    lam, p, q, b, c = np.moveaxis(complex_vectors(system["p"]), 1, 0)
    rate = 2 / system["step"][:, None]
    d = 1 / (rate - lam)
    share = 1 + 2 * np.real((q.conj() * d * p).sum(axis=1, keepdims=True))
    vectors = [rate + lam, p, 2 * q.conj(), 2 * b, d, d * p / share, 2 * c]
    return {"p": real_parts(np.stack(vectors, axis=1))}
