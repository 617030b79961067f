"""Long convolutions with transforms as matrix products (Monarch form), gates and all, fused.

    y = v (k * (u w)),     Fu et al. 2023, arXiv 2311.05908 (FlashFFTConv)

A transform of m = n_1 n_2 points is, for j = j_1 n_2 + j_2 and frequency k_1 + n_1 k_2,

    Z[k_1, k_2] = sum_{j_2} F_2[j_2, k_2]  T[k_1, j_2]  sum_{j_1} F_1[k_1, j_1] z[j_1, j_2]

two products with DFT matrices around a product with twiddles T. Matrices are unitary, so that
16-bit formats neither overflow nor lose small numbers on the way.

**Causal without padding.** Modulo X^m - i the product of two polynomials of less than 2 m terms
has its terms 0..m-1 in the real part and the rest in the imaginary part, which is thrown away.
With zeta = exp(2 pi i / (4 m)), z_j = u_j zeta^j turns it into a cyclic convolution of m points:
a causal convolution of m real numbers takes m complex points, no zeros. zeta^j splits into
zeta^(j_1 n_2), which is put into F_1, and zeta^(j_2), put into T; so it costs nothing. As inputs
are real and only real outputs are wanted, the first and last products are two real ones, the
inner two four: 2 m (4 n_1 + 8 n_2) flops. A circular convolution is the same without zeta.

`monarch` does all of this for one row or ROWS rows (ROWS channels side by side: products stay
wide where n_1 n_2 is small). Longer rows: `outer_forward` takes a first stage of n_0 points, of
strips of columns, to slow memory as complex numbers; `monarch` runs on its n_0 rows; and
`outer_inverse` undoes it. Programs of one channel and all sequences are neighbours, so that the
filter's spectrum comes from slow memory once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
import triton
import triton.language as tl

from validate.kernels.fft_convolution import tables
from validate.kernels.judge import poisoned
from validate.kernels.spec import Launch

OUTER_FACTORS: Final = (16, 32)
"""First stages through slow memory: few points, so that few products."""
OUTER_WARPS: Final = 4
PRECISIONS: Final = {"fp32": "tf32x3", "tf32": "tf32", "fp16": "tf32", "bf16": "tf32"}
"""Products of fp32 operands: three tf32 products hold fp32's accuracy; others never are fp32."""


@triton.jit
def _matrix(ptr, PLANE: tl.constexpr, N: tl.constexpr):
    """A plane of [4, N, N]."""
    n = tl.arange(0, N)
    return tl.load(ptr + PLANE * N * N + n[:, None] * N + n[None, :])


@triton.jit
def _left(f_ptr, PLANE: tl.constexpr, N: tl.constexpr, re, im, PRECISION: tl.constexpr):
    """(F re, F im) of a complex matrix F and a complex block."""
    f, g = _matrix(f_ptr, PLANE, N), _matrix(f_ptr, PLANE + 1, N)
    real = tl.dot(f, re, input_precision=PRECISION)
    real = tl.dot(g, -im, real, input_precision=PRECISION)
    imag = tl.dot(f, im, input_precision=PRECISION)
    return real, tl.dot(g, re, imag, input_precision=PRECISION)


@triton.jit
def _right(f_ptr, PLANE: tl.constexpr, N: tl.constexpr, re, im, PRECISION: tl.constexpr):
    """Block times a complex (symmetric) matrix."""
    f, g = _matrix(f_ptr, PLANE, N), _matrix(f_ptr, PLANE + 1, N)
    real = tl.dot(re, f, input_precision=PRECISION)
    real = tl.dot(-im, g, real, input_precision=PRECISION)
    imag = tl.dot(im, f, input_precision=PRECISION)
    return real, tl.dot(re, g, imag, input_precision=PRECISION)


@triton.jit
def _turn(re, im, ptr, at, plane, SIGN: tl.constexpr):
    """Times the complex numbers at `ptr`, conjugated where SIGN is -1."""
    c = tl.load(ptr + at).to(tl.float32)
    s = tl.load(ptr + plane + at).to(tl.float32) * SIGN
    return re * c - im * s, re * s + im * c


@triton.jit
def _gated(ptr, gate_ptr, at, inside, GATED: tl.constexpr):
    """The numbers at `ptr`, times their gate."""
    x = tl.load(ptr + at, mask=inside, other=0.0)
    if GATED:
        gate = tl.load(gate_ptr + at, mask=inside, other=0.0)
        x = (x.to(tl.float32) * gate.to(tl.float32)).to(ptr.dtype.element_ty)
    return x


@triton.jit
def _put(ptr, gate_ptr, at, inside, y, GATED: tl.constexpr):
    """Stores y, times its gate."""
    if GATED:
        y *= tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(ptr + at, y.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def monarch(
    u_ptr, w_ptr, v_ptr, y_ptr, spectrum_ptr, f1_ptr, f2_ptr, t_ptr, batch, channels, len_seq,
    N1: tl.constexpr, N2: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
    GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of one sequence's channels: transform, product, inverse. Unless WHOLE, rows are
    complex planes u[2, batch, channels, N1 N2], replaced in place, and there are no gates."""
    M: tl.constexpr = N1 * N2
    dtype = u_ptr.dtype.element_ty
    pid = tl.program_id(0)
    b, first = pid % batch, pid // batch * ROWS
    # [N1, ROWS N2]: columns are (row, j2)
    i = tl.arange(0, N1)[:, None]
    q = tl.arange(0, ROWS * N2)[None, :]
    c = first + q // N2
    j = i * N2 + q % N2
    row = b.to(tl.int64) * channels + c
    if WHOLE:
        inside = (c < channels) & (j < len_seq)
        at = row * len_seq + j
        x = _gated(u_ptr, w_ptr, at, inside, GATED)
        re = tl.dot(_matrix(f1_ptr, 0, N1), x, input_precision=PRECISION)
        im = tl.dot(_matrix(f1_ptr, 1, N1), x, input_precision=PRECISION)
    else:
        inside = (c < channels) & (j < M)
        at = row * M + j
        plane = tl.cast(batch, tl.int64) * channels * M
        xr = tl.load(u_ptr + at, mask=inside, other=0.0)
        xi = tl.load(u_ptr + plane + at, mask=inside, other=0.0)
        re, im = _left(f1_ptr, 0, N1, xr, xi, PRECISION)
    re, im = _turn(re, im, t_ptr, j, M, 1)
    # [N1 ROWS, N2]: rows are (k1, row)
    re = tl.reshape(re.to(dtype), (N1 * ROWS, N2))
    im = tl.reshape(im.to(dtype), (N1 * ROWS, N2))
    re, im = _right(f2_ptr, 0, N2, re, im, PRECISION)
    p = tl.arange(0, N1 * ROWS)[:, None]
    k = p // ROWS * N2 + tl.arange(0, N2)[None, :]
    channel = tl.minimum(first + p % ROWS, channels - 1)
    spectra = tl.cast(channels, tl.int64) * M
    re, im = _turn(re, im, spectrum_ptr, channel.to(tl.int64) * M + k, spectra, 1)
    re, im = _right(f2_ptr, 2, N2, re.to(dtype), im.to(dtype), PRECISION)
    re, im = _turn(re, im, t_ptr, k, M, -1)
    re = tl.reshape(re.to(dtype), (N1, ROWS * N2))
    im = tl.reshape(im.to(dtype), (N1, ROWS * N2))
    if WHOLE:
        y = tl.dot(_matrix(f1_ptr, 2, N1), re, input_precision=PRECISION)
        y = tl.dot(_matrix(f1_ptr, 3, N1), -im, y, input_precision=PRECISION)
        _put(y_ptr, v_ptr, at, inside, y, GATED)
    else:
        re, im = _left(f1_ptr, 2, N1, re, im, PRECISION)
        tl.store(y_ptr + at, re.to(dtype), mask=inside)
        tl.store(y_ptr + plane + at, im.to(dtype), mask=inside)


@triton.jit
def outer_forward(
    u_ptr, w_ptr, points_ptr, f_ptr, t_ptr, rows, len_seq, after,
    N: tl.constexpr, COLS: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """points[2, rows, N, after]: the first stage of real rows, COLS columns a program."""
    strips = after // COLS
    row = (tl.program_id(0) // strips).to(tl.int64)
    j = tl.program_id(0) % strips * COLS + tl.arange(0, COLS)[None, :]
    place = tl.arange(0, N)[:, None] * after + j
    x = _gated(u_ptr, w_ptr, row * len_seq + place, place < len_seq, GATED)
    re = tl.dot(_matrix(f_ptr, 0, N), x, input_precision=PRECISION)
    im = tl.dot(_matrix(f_ptr, 1, N), x, input_precision=PRECISION)
    re, im = _turn(re, im, t_ptr, place, N * after, 1)
    at = row * N * after + place
    plane = tl.cast(rows, tl.int64) * N * after
    tl.store(points_ptr + at, re.to(points_ptr.dtype.element_ty))
    tl.store(points_ptr + plane + at, im.to(points_ptr.dtype.element_ty))


@triton.jit
def outer_inverse(
    points_ptr, v_ptr, y_ptr, f_ptr, t_ptr, rows, len_seq, after,
    N: tl.constexpr, COLS: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y: the first stage undone, its real part, gated."""
    strips = after // COLS
    row = (tl.program_id(0) // strips).to(tl.int64)
    j = tl.program_id(0) % strips * COLS + tl.arange(0, COLS)[None, :]
    place = tl.arange(0, N)[:, None] * after + j
    dtype = points_ptr.dtype.element_ty
    at = row * N * after + place
    plane = tl.cast(rows, tl.int64) * N * after
    re = tl.load(points_ptr + at).to(tl.float32)
    im = tl.load(points_ptr + plane + at).to(tl.float32)
    re, im = _turn(re, im, t_ptr, place, N * after, -1)
    y = tl.dot(_matrix(f_ptr, 2, N), re.to(dtype), input_precision=PRECISION)
    y = tl.dot(_matrix(f_ptr, 3, N), -im.to(dtype), y, input_precision=PRECISION)
    _put(y_ptr, v_ptr, row * len_seq + place, place < len_seq, y, GATED)


# ---- tile sets -----------------------------------------------------------------------------


def _launch(n1: int, n2: int, rows: int, warps: int, least_arch: int = 0) -> Launch:
    meta = {"N1": n1, "N2": n2, "ROWS": rows}
    return Launch(meta=meta, num_warps=warps, num_stages=1, least_arch=least_arch)


LAUNCHES: Final = (
    _launch(16, 16, 8, 4), _launch(16, 16, 4, 4, 90), _launch(32, 16, 4, 4),
    _launch(32, 16, 2, 4, 90), _launch(32, 32, 4, 4), _launch(32, 32, 1, 4), _launch(64, 32, 1, 4),
    _launch(64, 64, 1, 4), _launch(64, 64, 1, 8), _launch(128, 64, 1, 8, 90),
)  # fmt: skip
"""Factors as even as possible. Both parts of a row are fp32 sums in registers: 2 * 4096 of them
are 64 a thread of four warps, 2 * 8192 as many of eight; sm_80, whose operands come through
registers too, has no room for those, and in bf16 spills a word or two where a program holds few
short rows. Rows of 16384 would spill on all three."""
NARROW: Final = (_launch(16, 16, 4, 4), _launch(32, 16, 2, 4), _launch(32, 32, 1, 4))
"""Of fp32 operands: 1024 points a program."""
OUTER_COLS: Final = 128
"""Columns of a strip: 256 bytes of each of its rows."""


def factors(len_seq: int, launch: Launch) -> tuple[int, ...]:
    """(outer factor or none, n1, n2) that the launch transforms a sequence with; () if it
    cannot."""
    n1, n2 = launch.meta["N1"], launch.meta["N2"]
    outer, rest = divmod(tables.num_points(len_seq), n1 * n2)
    if rest or outer not in (1, *OUTER_FACTORS):
        return ()
    return (n1, n2) if outer == 1 else (outer, n1, n2)


# ---- launching -----------------------------------------------------------------------------


class Convolution:
    """Tables, workspace and launches of one shape; call it to run."""

    def __init__(
        self, inputs: Mapping[str, Any], dtype: str, launch: Launch, *, circular: bool
    ) -> None:
        """`inputs`: u[batch, channels, len], k[channels, len], gates v and w like u or none."""
        self.u, self.launch = inputs["u"], launch
        self.gated, self.precision = "w" in inputs, PRECISIONS[dtype]
        self.w, self.v = inputs.get("w", self.u), inputs.get("v", self.u)
        self.batch, self.channels, self.len_seq = self.u.shape
        self.y = poisoned(*self.u.shape, dtype=self.u.dtype, device=self.u.device)
        self.factors = factors(self.len_seq, launch)
        kind, where = self.u.dtype, self.u.device
        points = tables.num_points(self.len_seq)
        n1, n2 = self.factors[-2:]
        self.outer = self.factors[0] if len(self.factors) == 3 else 1
        twist = 0 if circular else 4 * points
        first = self.factors[0]
        self.first = tables.matrices(first, twist and 4 * first, kind, where)
        self.turns = tables.twiddles(first, points // first, twist, kind, where)
        self.f1, self.t1, self.points = self.first, self.turns, self.u
        if self.outer > 1:
            self.f1 = tables.matrices(n1, 0, kind, where)
            self.t1 = tables.twiddles(n1, n2, 0, kind, where)
            shape = (2, self.batch, self.channels, points)
            self.points = poisoned(*shape, dtype=kind, device=where)
        self.f2 = tables.matrices(n2, 0, kind, where)
        self.spectrum = tables.spectrum(inputs["k"], self.factors, kind, circular=circular)

    def __call__(self) -> tuple[torch.Tensor, ...]:
        """y."""
        if self.outer == 1:
            self._monarch(self.u, self.y, whole=True)
            return (self.y,)
        self._outer(outer_forward, self.u, self.w, self.points)
        self._monarch(self.points, self.points, whole=False)
        self._outer(outer_inverse, self.points, self.v, self.y)
        return (self.y,)

    def _monarch(self, u: torch.Tensor, y: torch.Tensor, *, whole: bool) -> None:
        channels = self.channels * self.outer
        grid = (self.batch * triton.cdiv(channels, self.launch.meta["ROWS"]),)
        monarch[grid](
            u, self.w, self.v, y, self.spectrum, self.f1, self.f2, self.t1,
            self.batch, channels, self.len_seq, **self.launch.meta, WHOLE=whole,
            GATED=self.gated and whole, PRECISION=self.precision,
            num_warps=self.launch.num_warps, num_stages=self.launch.num_stages,
        )  # fmt: skip

    def _outer(
        self, function: Any, source: torch.Tensor, gate: torch.Tensor, target: torch.Tensor
    ) -> None:
        rows = self.batch * self.channels
        after = self.launch.meta["N1"] * self.launch.meta["N2"]
        function[(rows * (after // OUTER_COLS),)](
            source, gate, target, self.first, self.turns, rows, self.len_seq, after,
            N=self.outer, COLS=OUTER_COLS, GATED=self.gated, PRECISION=self.precision,
            num_warps=OUTER_WARPS, num_stages=1,
        )  # fmt: skip
