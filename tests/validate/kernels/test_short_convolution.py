"""Short convolutions: outputs and gradients right at ends, halos and every tile set."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.validate.kernels.checking import check, errors
from validate.kernels.judge import relative_error, worst_error
from validate.kernels.short_convolution import kernel, reference, suite
from validate.kernels.spec import KernelSpec, Launch
from validate.record import Case

FORWARD, BACKWARD = suite.SPECS
ALL = [(spec, case) for spec in suite.SPECS for case in spec.checks]
THEIRS = [(s, c) for s, c in ALL if c.dtype == "fp32" or c.params["channels"] == 1]
"""torch's fp16 convolutions are slow on a CPU: one number of them is enough."""


def _key(value: object) -> str:
    return value.key if isinstance(value, Case) else ""


@pytest.mark.parametrize(("spec", "case"), ALL, ids=_key)
def test_checks(spec: KernelSpec, case: Case) -> None:
    check(spec, case)


@pytest.mark.parametrize(("spec", "case"), THEIRS, ids=_key)
def test_cudnn(spec: KernelSpec, case: Case) -> None:
    check(spec, case, "cudnn")


@pytest.mark.parametrize("launch", kernel.LAUNCHES, ids=lambda x: x.label)
def test_every_forward_launch(launch: Launch) -> None:
    x, w = torch.randn(1, launch.meta["BT"] + 3, launch.meta["BC"] + 5), torch.randn(1, 4)
    w = w.expand(x.shape[2], 4)
    (y,) = kernel.prepare_forward(x, w, None, launch, silu=True)()
    truth = reference.short_convolution(x.double(), w.double(), None, activation=True)
    assert relative_error(y, truth) < 1e-6


@pytest.mark.parametrize("launch", kernel.BACKWARD_LAUNCHES, ids=lambda x: x.label)
def test_every_backward_launch(launch: Launch) -> None:
    channels = launch.meta["BC"] - 5
    x, w = torch.randn(1, launch.meta["BT"] + 3, channels), torch.randn(channels, 3)
    bias, dy = torch.randn(channels), torch.randn(x.shape)
    found = kernel.prepare_backward(x, w, bias, dy, launch, silu=True)()
    given = (v.double() for v in (x, w, bias, dy))
    assert worst_error(found, reference.gradients(*given, activation=True)) < 1e-6


@settings(max_examples=3, deadline=None)
@given(st.integers(1, 2), st.integers(1, 40), st.integers(1, 30), st.integers(3, 5))
def test_ragged(batch: int, length: int, channels: int, width: int) -> None:
    for name, spec in ((suite.FORWARD, FORWARD), (suite.BACKWARD, BACKWARD)):
        check(spec, suite.case(name, "fp32", (batch, length, channels, width)))


def test_by_hand() -> None:
    """1, 2, 3 by the taps 10 (a step ago) and 1 (now)."""
    x, w = torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[10.0, 1.0]])
    found = reference.short_convolution(x, w, None, activation=False)
    assert found.flatten().tolist() == [1.0, 12.0, 23.0]


def test_a_lost_halo_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps taken as if each tile were a sequence of its own."""
    case = suite.case(suite.FORWARD, "fp32", (1, 64, 8, 4))
    assert max(errors(FORWARD, case)) < 1e-6
    whole = kernel.prepare_forward

    def torn(x: torch.Tensor, *given: torch.Tensor, silu: bool) -> kernel.Run:
        parts = [whole(part.contiguous(), *given, silu=silu) for part in x.split(32, dim=1)]
        return lambda: (torch.cat([part()[0] for part in parts], dim=1),)

    monkeypatch.setattr(kernel, "prepare_forward", torn)
    assert max(errors(FORWARD, case)) > 1e-2


def test_unwritten_tiles_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel.triton, "cdiv", lambda n, size: n // size)
    case = suite.case(suite.FORWARD, "fp32", (1, 40, 64, 4))
    assert errors(FORWARD, case) == [math.inf]


def test_counts_of_gradients() -> None:
    """10 x 4 numbers of two bytes: x, dy and dx; 4 x 3 taps in, 4 x 4 fp32 sums out."""
    op = BACKWARD.op(suite.case(suite.BACKWARD, "bf16", (1, 10, 4, 3), activation=False))
    work = op.work(2.0**16)
    assert (work.read_bytes, work.write_bytes) == (2 * 80 + 24, 80 + 64)
    assert work.vector_flops == 40 * 13


def test_rows() -> None:
    assert FORWARD.row is not None and BACKWARD.row is not None
    plain = suite.case(suite.FORWARD, "bf16", (16, 1024, 768, 5), bias=False, activation=False)
    found = FORWARD.row(plain)
    assert found is not None
    assert found[1:] == (
        "depthwise_conv1d_fwd",
        {"batch": 16, "seq": 1024, "d_model": 768, "kernel": 5, "layout": "BLH",
         "direction": "fwd"},
    )  # fmt: skip
    assert FORWARD.row(FORWARD.checks[0]) is None
    assert BACKWARD.row(BACKWARD.checks[-1]) is None


def test_too_many_taps_are_refused() -> None:
    long = suite.case(suite.FORWARD, "bf16", (1, 64, 64, 9))
    assert FORWARD.implementation("triton").refusal(long, 90) == "more than 7 taps"


def test_binaries_have_names_of_their_own() -> None:
    found = [c for spec in suite.SPECS for c in spec.compilations()]
    assert len({c.name for c in found}) == len(found)
    for c in found:
        assert set(c.signature) == set(c.function.arg_names), c.name


def test_torch_keeps_fp32_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN may not round operands to tf32 under our case of fp32, and gets its setting back."""
    seen, flags = [], torch.backends.cudnn
    whole = suite.F.conv1d

    def watched(*given: object, **more: object) -> torch.Tensor:
        seen.append(flags.allow_tf32)
        return whole(*given, **more)

    monkeypatch.setattr(suite.F, "conv1d", watched)
    before = flags.allow_tf32
    check(FORWARD, suite.case(suite.FORWARD, "fp32", (1, 9, 2, 4)), "cudnn")
    assert seen == [False]
    assert flags.allow_tf32 == before
