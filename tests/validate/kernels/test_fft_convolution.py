"""Long convolutions: right in both ways of wrapping, fused or split, gated or not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.validate.kernels.checking import check, errors
from validate.kernels.fft_convolution import kernel, reference, suite, tables
from validate.kernels.judge import relative_error
from validate.kernels.spec import Launch
from validate.record import Case

SPEC = suite.SPEC


def _key(value: object) -> str:
    return value.key if isinstance(value, Case) else ""


@pytest.mark.parametrize("case", SPEC.checks, ids=_key)
def test_checks(case: Case) -> None:
    check(SPEC, case)


@pytest.mark.parametrize("case", SPEC.checks, ids=_key)
def test_torch_fft(case: Case) -> None:
    check(SPEC, case, "torch-fft")


def _error(length: int, launch: Launch, *, channels: int, circular: bool, batch: int = 1) -> float:
    case = suite.case("fp32", (batch, channels, length), circular=circular)
    inputs = SPEC.inputs(case, torch.Generator().manual_seed(length), torch.device("cpu"))
    (y,) = kernel.Convolution(inputs, "fp32", launch, circular=circular)()
    return relative_error(y, SPEC.reference(case, inputs)[0])


@pytest.mark.parametrize("launch", kernel.LAUNCHES, ids=lambda x: x.label)
@pytest.mark.parametrize("circular", [False, True])
def test_every_launch_fused(launch: Launch, circular: bool) -> None:
    """More channels than a program takes, and an end that is no multiple of anything."""
    points, rows = launch.meta["N1"] * launch.meta["N2"], launch.meta["ROWS"]
    length = points if circular else points - 3
    assert len(kernel.factors(length, launch)) == 2
    assert _error(length, launch, channels=rows + rows // 2, circular=circular) < 1e-6


@pytest.mark.parametrize("outer", kernel.OUTER_FACTORS)
@pytest.mark.parametrize("circular", [False, True])
def test_split(outer: int, circular: bool) -> None:
    launch = kernel.LAUNCHES[0]
    length = outer * 256 if circular else outer * 256 - 7
    assert kernel.factors(length, launch) == (outer, 16, 16)
    assert _error(length, launch, channels=1, circular=circular, batch=2) < 1e-6


@settings(max_examples=3, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 700))
def test_ragged(batch: int, channels: int, length: int) -> None:
    for dtype in ("fp32", "fp16"):
        check(SPEC, suite.case(dtype, (batch, channels, length)))


def test_reference_is_the_sum_over_taps() -> None:
    u, k = torch.randn(2, 3, 50), torch.randn(3, 50)
    assert relative_error(reference.convolution(u, k), reference.by_taps(u, k)) < 1e-12


def test_circular_reference_by_hand() -> None:
    """1, 2, 0, 0 by a delay of three: the ends meet."""
    u, k = torch.tensor([[[1.0, 2.0, 0.0, 0.0]]]), torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    found = reference.convolution(u, k, circular=True)
    assert torch.allclose(found, torch.tensor([[[2.0, 0.0, 0.0, 1.0]]], dtype=torch.float64))


def test_matrices_are_unitary_and_inverse() -> None:
    re, im, inv_re, inv_im = tables.matrices(16, 64, torch.float64, torch.device("cpu"))
    product = torch.complex(re, im) @ torch.complex(inv_re, inv_im)
    assert torch.allclose(product, torch.eye(16, dtype=torch.complex128), atol=1e-12)


def test_spectrum_places() -> None:
    """Frequency k1 + n1 k2 stands at (k1, k2)."""
    k = torch.randn(2, 512)
    re, im = tables.spectrum(k, (32, 16), torch.float64, circular=True)
    full = torch.fft.fft(k.double(), 512)
    place = 5 * 16 + 3
    assert torch.allclose(torch.complex(re, im)[:, place], full[:, 5 + 32 * 3])


@pytest.mark.parametrize("name", ["twiddles", "matrices", "spectrum"])
def test_a_lost_twist_is_caught(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Without its turn by zeta the causal convolution would wrap around."""
    whole = getattr(tables, name)

    def untwisted(*given: Any, **more: Any) -> torch.Tensor:
        if name == "spectrum":
            return whole(*given, circular=True)
        at = {"twiddles": 2, "matrices": 1}[name]
        return whole(*given[:at], 0, *given[at + 1 :])

    monkeypatch.setattr(tables, name, untwisted)
    assert max(errors(SPEC, SPEC.checks[2])) > 0.01


def test_an_unwritten_row_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel.triton, "cdiv", lambda n, size: n // size)
    assert errors(SPEC, SPEC.checks[2]) == [math.inf]


def test_every_length_has_a_launch() -> None:
    triton = SPEC.implementation("triton")
    for case in (*SPEC.checks, *SPEC.grid):
        for arch in (80, 90, 100):
            assert triton.launches(case, arch), case.key
            assert triton.refusal(case, arch) is None
    long = suite.case("bf16", (1, 1, 2**24))
    assert triton.refusal(long, 90) == "no tile set transforms as many points in bf16"
    wide = suite.case("fp32", (1, 1, 1025))
    assert triton.refusal(wide, 90) == "no tile set transforms as many points in fp32"


def test_rows_are_of_circular_cases_only() -> None:
    assert SPEC.row is not None
    assert SPEC.row(SPEC.checks[0]) is None
    found = SPEC.row(suite.case("fp16", (64, 768, 256), circular=True))
    assert found is not None and found[1] == "fftconv_gated_fwd"
    assert found[2] == {"batch": 64, "d_model": 768, "seq": 256, "gated": 1, "direction": "fwd"}


def test_binaries_have_names_of_their_own() -> None:
    found = SPEC.compilations()
    assert len({c.name for c in found}) == len(found)
    for c in found:
        assert set(c.signature) == set(c.function.arg_names), c.name


def test_short_circular_sequences_are_refused() -> None:
    """Fewer points than the least transform's would wrap at its length, not at theirs."""
    refusal = SPEC.implementation("triton").refusal
    assert refusal(suite.case("fp16", (1, 1, 256), circular=True), 90) is None
    assert "wrap" in (refusal(suite.case("fp16", (1, 1, 128), circular=True), 90) or "")
    assert refusal(suite.case("fp16", (1, 1, 128)), 90) is None
