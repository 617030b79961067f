"""The convolution kernel of a linear state space, K_k = C A^k B for k < L, made three ways.

    cauchy     the generating function of A = Lambda - P Q* at m points w: four sums over N states,
               then an inverse transform                     O(N m) operations, O(N + L) memory
               (S4, Gu et al. 2022, arXiv 2111.00396, algorithm 1 and lemma C.3)
    krylov     B, A B, A^2 B, ... by doubling with a dense A, then C times each
               2 N^2 L + 2 N^3 log2 L flops, N L numbers     (LSSL, Gu et al. 2021, 2110.13985)
    companion  the same generating function for A = shift + a e^T: correlations and transforms
               O((N + L) log(N + L)) operations              (SpaceTime, Zhang et al. 2023,
                                                              2303.09489, section 3.3)

**Points.** A real kernel of n = 2 m terms (n a power of two, at least L: the rest is padding) is
determined by its generating function at the m roots of w^m = i (`row_fft`), where roots of unity
take m + 1 points. There w^n = -1, and with C' = C (I + A^n)

    sum_{k < n} K_k w^k = C' (I - A w)^-1 B

C' is what the models learn (or is made once): it is given. The bilinear rule with step t makes of
it, with s_xy = sum_j x_j y_j / (2 (1 - w) / t - lambda_j (1 + w)) over all N states,

    K(w) = 2 (s_cb - s_cp (1 + (1 + w) s_qp)^-1 (1 + w) s_qb)

and the companion, with the polynomials f of the correlations of C' with B and a, and g of B and a
in reverse,

    K(w) = f_b(w) + w f_a(w) g_b(w) / (1 - w g_a(w))

Ignored: making C' and powers of w (tables, as of any transform); Krylov vectors kept for a backward
pass; fast algorithms for Cauchy matrices (sums are made term by term, as published code does).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from hwmodels.dtypes import FP32, DType
from hwmodels.errors import InputError, UnknownNameError
from workloads.machine import Machine, Tile, Values, slices
from workloads.numeric import (
    Num,
    any_true,
    ceil_log2,
    floor,
    maximum,
    minimum,
    power_of_two,
    where,
)
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.complex_lanes import (
    PRODUCT_FLOPS,
    RECIPROCAL_FLOPS,
    SCALE_FLOPS,
    SUM_FLOPS,
    ComplexLanes,
)
from workloads.ops.fft_convolution import COMPLEX64, FFTConvolution
from workloads.ops.matmul import BatchedMatmul
from workloads.ops.row_fft import RowFFT, log2_points, root_points
from workloads.ops.staged import Step, SteppedOp
from workloads.ops.state_spaces import (
    COMPANION,
    DENSE,
    LOW_RANK,
    VECTORS,
    complex_vectors,
    kernels,
    num_parameters,
    random_system,
    real_parts,
    truncated,
)
from workloads.ops.state_step import FP32_BYTES, as_stream
from workloads.ops.streamed import Lanes, StreamedOp
from workloads.work import Work

CAUCHY, KRYLOV = "cauchy", "krylov"
METHODS: Final[Mapping[str, str]] = {CAUCHY: LOW_RANK, KRYLOV: DENSE, COMPANION: COMPANION}
"""Ways to make a kernel, and the structure of A that each is for."""
SUMS: Final = 4
"""s_cb, s_cp, s_qb, s_qp."""
COMPLEX_BYTES: Final = 2 * FP32_BYTES

TERM_FLOPS: Final = (
    PRODUCT_FLOPS + SUM_FLOPS + RECIPROCAL_FLOPS + SUMS * (PRODUCT_FLOPS + SUM_FLOPS)
)
"""A state at a point: the denominator, its reciprocal, four products added: 45."""
POINT_FLOPS: Final = 4 * PRODUCT_FLOPS + 1 + RECIPROCAL_FLOPS + SUM_FLOPS + 2 * SCALE_FLOPS
"""The rest of a point: 2 (1 - w) / t, Woodbury's correction, the 2: 36."""
RATE_FLOPS: Final = 1
"""2 / t, beside one special function."""


@dataclass(frozen=True, kw_only=True)
class CauchySums(ProvedOp):
    """Spectra y[channels, m] complex64 of kernels, from p[channels, 5, 2, N/2] and step[channels].

    The five vectors are lambda, p, q, b and C', one of each conjugate pair:

        flops    channels (m (45 N + 36) + 12 N + 1),   special  channels (m (N + 1) + 1)
        reads    channels (20 N + 4),                   writes   channels 8 m

    >>> op = CauchySums(channels=2, state_dim=64, num_points=512)
    >>> op.work(2**16).vector_flops == 2 * (512 * (45 * 64 + 36) + 12 * 64 + 1)
    True
    """

    name: ClassVar[str] = "cauchy_sums"
    channels: Num
    state_dim: Num
    num_points: Num

    def check(self) -> None:
        """Pairs of states; points of a transform."""
        if any_true(self.state_dim % 2 != 0):
            raise InputError(
                f"{self.name}: state_dim = {self.state_dim} must be even, complex states come in "
                "pairs; take one more"
            )
        if any_true(power_of_two(ceil_log2(self.num_points)) != self.num_points):
            raise InputError(
                f"{self.name}: num_points = {self.num_points} must be a power of two, as the "
                "transform's; pad it"
            )

    def stages(self) -> tuple[Stage, ...]:
        """Timed as a pointwise kernel of the same counts."""
        return (Stage("sums", as_stream(self.work(float(2**52)))),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Points of a `chunk` beside a channel's vectors and the products of them."""
        held = (VECTORS + SUMS) * self.state_dim * FP32_BYTES + FP32_BYTES
        require_fit(
            self.name, fast_bytes, held + COMPLEX_BYTES, "the vectors of one channel",
            "make state_dim smaller",
        )  # fmt: skip
        room = floor((fast_bytes - held) / COMPLEX_BYTES)
        return {"chunk": minimum(self.num_points, room)}

    def work(self, fast_bytes: Num) -> Work:
        """The class docstring's."""
        self.tiling(fast_bytes)
        n, m = self.state_dim, self.num_points
        products = SUMS * PRODUCT_FLOPS * n / 2
        return Work(
            vector_flops=self.channels * (m * (TERM_FLOPS * n + POINT_FLOPS) + products + 1),
            special_ops=self.channels * (m * (n + 1) + RATE_FLOPS),
            read_bytes=self.channels * (VECTORS * n + 1) * FP32_BYTES,
            write_bytes=self.channels * m * COMPLEX_BYTES,
        )

    def compulsory_bytes(self) -> Num:
        """Vectors and spectra once."""
        return self.work(float(2**52)).bytes

    def min_flops(self) -> Mapping[DType, Num]:
        """No matrix products: a Cauchy matrix is made and used on the spot."""
        return {}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """A system's parameters, its C' among them."""
        made = random_system(LOW_RANK, rng, int(self.channels), int(self.state_dim))
        return cut_off(LOW_RANK, made, int(self.num_points))

    def reference(self, inputs: Arrays) -> Arrays:
        """C' (I - A w)^-1 B with the whole continuous A, point by point."""
        half = complex_vectors(inputs["p"])
        lam, p, q, b, c = np.moveaxis(np.concatenate([half, half.conj()], axis=-1), 1, 0)
        eye = np.eye(lam.shape[1])
        a = lam[:, :, None] * eye - p[:, :, None] * q.conj()[:, None]
        rate, found = 2 / inputs["step"][:, None, None], []
        for w in root_points(int(self.num_points)):
            x = np.linalg.solve(rate * (1 - w) * eye - a * (1 + w), b[:, :, None])[:, :, 0]
            found.append(2 * (c * x).sum(axis=1))
        return {"y": np.stack(found, axis=1)}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel: channel after channel, chunks of points, each lane all states in turn."""
        params = machine.place(inputs["p"], FP32)
        steps = machine.place(inputs["step"], FP32)
        channels, m = int(self.channels), int(self.num_points)
        y = machine.empty((channels, m), COMPLEX64, is_complex=True)
        chunk = int(self.tiling(machine.fast_bytes)["chunk"])
        points = root_points(m)
        with machine.kernel():
            for channel in range(channels):
                with machine.scope():
                    held = machine.load(params, channel)
                    products = _products(machine, held)
                    rate = Lanes(machine, machine.load(steps, channel).values).reciprocal() * 2.0
                    for part in slices(m, chunk):
                        with machine.scope():
                            w = points[part]
                            found = _spectrum(machine, held.values[0], products, rate, w)
                            machine.store(machine.hold(found, COMPLEX64), y, (channel, part))
        return {"y": y.values}


def _products(mc: Machine, held: Tile) -> Values:
    """c b, c p, q* b, q* p[4, N/2] of the loaded vectors, held beside them."""
    _, p, q, b, c = (ComplexLanes.of(mc, v) for v in complex_vectors(held.values))
    star = ComplexLanes(q.re, -q.im)
    found = np.stack([x.times(y).values for x, y in ((c, b), (c, p), (star, b), (star, p))])
    mc.hold(real_parts(found), FP32)
    return found


def _spectrum(mc: Machine, lam: Values, products: Values, rate: Lanes, w: Values) -> Values:
    """K(w) of a chunk of points: the sums in registers, state after state."""
    half = complex_vectors(lam)
    states = ComplexLanes.of(mc, np.concatenate([half, half.conj()])[:, None])
    plus = ComplexLanes.of(mc, 1 + w)
    apart = ComplexLanes.of(mc, 1 - w).scaled(rate)
    inverse = apart.minus(states.times(plus)).reciprocal()
    cb, cp, qb, qp = (
        inverse.times(ComplexLanes.of(mc, np.concatenate([v, v.conj()])[:, None])).sum()
        for v in products
    )
    undone = plus.times(qp).one_plus().reciprocal()
    fixed = cp.times(qb).times(plus).times(undone)
    return np.asarray(cb.minus(fixed).scaled(2.0).values[0])


COMPANION_FLOPS: Final = 4 * PRODUCT_FLOPS + 1 + RECIPROCAL_FLOPS + SUM_FLOPS
"""f_b + w f_a g_b / (1 - w g_a): 32, beside one special function."""


@dataclass(frozen=True, kw_only=True)
class CompanionSpectrum(StreamedOp):
    """Spectra y[channels, m] of kernels from those of f_b, f_a, g_b, g_a: x[4, channels, m].

    >>> CompanionSpectrum(channels=2, num_points=512).work(2**16).bytes == 2 * 512 * 40
    True
    """

    name: ClassVar[str] = "companion_spectrum"
    channels: Num
    num_points: Num

    def elements(self) -> Num:
        """Points of all channels."""
        return self.channels * self.num_points

    def read_bytes(self) -> Num:
        """Four complex64 numbers."""
        return 4 * COMPLEX_BYTES

    def write_bytes(self) -> Num:
        """One."""
        return COMPLEX_BYTES

    def steps(self) -> tuple[Num, Num]:
        """32 flops, a reciprocal."""
        return COMPANION_FLOPS, 1

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random spectra."""
        parts = rng.standard_normal((2, 4, int(self.channels), int(self.num_points)))
        return {"x": parts[0] + 1j * parts[1]}

    def reference(self, inputs: Arrays) -> Arrays:
        """The formula."""
        fb, fa, gb, ga = inputs["x"]
        w = root_points(int(self.num_points))
        return {"y": fb + w * fa * gb / (1 - w * ga)}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Chunk after chunk; powers of w come from the place, in registers."""
        x = machine.place(inputs["x"].reshape(4, -1), COMPLEX64)
        y = machine.empty(x.values.shape[1:], COMPLEX64, is_complex=True)
        points = np.tile(root_points(int(self.num_points)), int(self.channels))
        with machine.kernel():
            for part in slices(len(points), int(self.tiling(machine.fast_bytes)["chunk"])):
                with machine.scope():
                    held = machine.load(x, (slice(None), part)).values
                    fb, fa, gb, ga = (ComplexLanes.of(machine, row) for row in held)
                    w = ComplexLanes.of(machine, points[part])
                    undone = w.times(ga).one_minus().reciprocal()
                    found = fb.plus(fa.times(gb).times(w).times(undone))
                    machine.store(machine.hold(found.values, COMPLEX64), y, part)
        return {"y": y.values.reshape(inputs["x"].shape[1:])}


def cut_off(structure: str, system: Arrays, points: int) -> Arrays:
    """The system with C' in the place of C."""
    row = truncated(structure, system, points)
    if structure != LOW_RANK:
        return {**system, "c": row}
    vectors = system["p"].copy()
    vectors[:, VECTORS - 1] = real_parts(row)
    return {**system, "p": vectors}


@dataclass(frozen=True, kw_only=True)
class StateKernel(SteppedOp):
    """K[channels, len_seq] in fp32 of a system a channel.

    A dense A is multiplied in `math_dtype` (else fp32).

    >>> naive = StateKernel(channels=1, state_dim=64, len_seq=4096, method="krylov")
    >>> naive.min_flops()[FP32] == 2 * 64**2 * 4095 + 2 * 64**3 * 11 + 2 * 64 * 4096
    True
    >>> fast = naive.over(method="cauchy")
    >>> naive.memory_bytes() == 4 * (64 * 4096 + 4096 + 2 * 64**2 + 64**2 + 2 * 64)
    True
    >>> fast.memory_bytes() == 8 * 2048 + 4 * 4096 + 4 * (5 * 64 + 1)
    True
    """

    name: ClassVar[str] = "state_kernel"
    channels: Num
    state_dim: Num
    len_seq: Num
    method: str = CAUCHY
    math_dtype: DType | None = None

    def check(self) -> None:
        """A known method; what its stages take."""
        if self.method not in METHODS:
            raise UnknownNameError("method", self.method, list(METHODS))
        if self.method != KRYLOV and self.math_dtype is not None:
            raise InputError(f"{self.name}: {self.method} has no products; leave math_dtype out")
        self.stages()

    @property
    def structure(self) -> str:
        """Of A."""
        return METHODS[self.method]

    @property
    def len_transform(self) -> Num:
        """Real points of the transforms: the least power of two that holds kernel and state."""
        held = self.len_seq
        if self.method == COMPANION:
            held = maximum(held, self.state_dim)
        return 2 * power_of_two(log2_points(held))

    @property
    def num_points(self) -> Num:
        """Points w."""
        return self.len_transform // 2

    def parameter_bytes(self) -> Num:
        """Of all channels, in fp32."""
        return self.channels * num_parameters(self.structure, self.state_dim) * FP32_BYTES

    def compulsory_bytes(self) -> Num:
        """Parameters in, kernels out; K_0 = C B alone needs no A."""
        unused: Num = 0
        if self.method == KRYLOV:
            unused = where(self.len_seq > 1, 0, self.channels * self.state_dim**2 * FP32_BYTES)
        kernel = self.channels * self.len_seq * FP32_BYTES
        return self.parameter_bytes() - unused + kernel

    def memory_bytes(self) -> Num:
        """Parameters, kernels, and the most that lies between them at a time.

        Krylov: all vectors and two powers of A. Else spectra and whole transforms; a companion's
        four polynomials have spectra of their own, beside the one they give.
        """
        if self.method == KRYLOV:
            n = self.state_dim
            between = (n * self.len_seq + self.len_seq + 2 * n * n) * FP32_BYTES
            return self.parameter_bytes() + self.channels * between
        spectra = 1 if self.method == CAUCHY else 5
        between = spectra * self.num_points * COMPLEX_BYTES + self.len_transform * FP32_BYTES
        if self.method == COMPANION:
            between = between + 4 * self.state_dim * FP32_BYTES
        return self.parameter_bytes() + self.channels * between

    # ---- stages ------------------------------------------------------------------------------

    def stages(self) -> tuple[Stage, ...]:
        """By the method."""
        if self.method == KRYLOV:
            return self._doublings()
        back = Stage("inverse", self.transform(self.channels, inverse=True))
        if self.method == CAUCHY:
            return Stage("sums", self.sums()), back
        return (
            Stage("correlate", self.correlation()),
            Stage("forward", self.transform(4 * self.channels)),
            Stage("spectrum", self.spectrum()),
            back,
        )

    def sums(self) -> CauchySums:
        """Of all channels."""
        return CauchySums(
            channels=self.channels, state_dim=self.state_dim, num_points=self.num_points
        )

    def correlation(self) -> FFTConvolution:
        """C' with B and a, by a convolution with C' reversed."""
        return FFTConvolution(batch=2, channels=self.channels, len_seq=self.state_dim, dtype=FP32)

    def spectrum(self) -> CompanionSpectrum:
        """From those of the four polynomials."""
        return CompanionSpectrum(channels=self.channels, num_points=self.num_points)

    def transform(self, rows: Num, *, inverse: bool = False) -> RowFFT:
        """Of polynomials of state_dim coefficients, or back to kernels."""
        return RowFFT(
            rows=rows, len_seq=self.len_transform if inverse else self.state_dim,
            len_transform=self.len_transform, inverse=inverse,
        )  # fmt: skip

    def product(self, rows: Num, cols: Num) -> BatchedMatmul:
        """Of matrices [rows, N] [N, cols], one a channel."""
        return BatchedMatmul(
            batch=self.channels, m=rows, n=cols, k=self.state_dim, dtype=FP32,
            math_dtype=self.math_dtype,
        )  # fmt: skip

    def num_levels(self) -> Num:
        """Doublings from one vector to len_seq."""
        return ceil_log2(self.len_seq)

    def width(self, level: int) -> Num:
        """Vectors that a doubling adds."""
        return minimum(2**level, self.len_seq - 2**level)

    def _doublings(self) -> tuple[Stage, ...]:
        """A^(2^i) times what there is, A^(2^i) squared, ...; C times all."""
        n, levels = self.state_dim, self.num_levels()
        grow = [
            Stage(
                f"extend_{i}", self.product(n, maximum(self.width(i), 1)),
                where(levels > i, 1, 0),
            )
            for i in range(int(np.max(levels)))
        ]  # fmt: skip
        squared = Stage("square", self.product(n, n), maximum(levels - 1, 0))
        return (*grow, squared, Stage("read", self.product(1, self.len_seq)))

    # ---- the program -------------------------------------------------------------------------

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """The parameters of `state_spaces`."""
        return random_system(self.structure, rng, int(self.channels), int(self.state_dim))

    def reference(self, inputs: Arrays) -> Arrays:
        """C A^k B, one power after another."""
        return {"k": kernels(self.structure, inputs, int(self.len_seq))}

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """The method's stages in turn."""
        if self.method == KRYLOV:
            return {"k": self._krylov(step, inputs)}
        given = cut_off(self.structure, inputs, int(self.num_points))
        if self.method == CAUCHY:
            spectrum = step(self.sums(), given)["y"]
        else:
            spectrum = self._companion(step, given)
        back = step(self.transform(self.channels, inverse=True), {"x": spectrum})["y"]
        return {"k": back[:, : int(self.len_seq)]}

    def _krylov(self, step: Step, inputs: Arrays) -> Values:
        n, length = int(self.state_dim), int(self.len_seq)
        power, vectors = inputs["a"], inputs["b"][:, :, None]
        for level in range(int(self.num_levels())):
            if level:
                power = step(self.product(n, n), {"a": power, "b": power})["c"]
            width = int(self.width(level))
            more = step(self.product(n, width), {"a": power, "b": vectors[:, :, :width]})["c"]
            vectors = np.concatenate([vectors, more], axis=2)
        return step(self.product(1, length), {"a": inputs["c"][:, None], "b": vectors})["c"][:, 0]

    def _companion(self, step: Step, inputs: Arrays) -> Values:
        """Spectra; reversals are addressing."""
        pair = np.stack([inputs["b"], inputs["a"]])
        correlated = step(self.correlation(), {"u": pair, "k": inputs["c"][:, ::-1]})["y"]
        rows = np.concatenate([correlated, pair])[:, :, ::-1]
        spectra = step(self.transform(4 * self.channels), {"x": rows.reshape(-1, rows.shape[2])})[
            "y"
        ]
        found = spectra.reshape(4, int(self.channels), -1)
        return step(self.spectrum(), {"x": found})["y"]
