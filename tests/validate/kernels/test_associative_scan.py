"""The associative scan and its gradients, interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.validate.kernels import checking, fast_scan
from validate.kernels.associative_scan import kernel, reference
from validate.kernels.associative_scan.suite import SPECS
from validate.kernels.judge import relative_error
from validate.kernels.spec import Launch
from validate.record import Case

FORWARD, BACKWARD = SPECS
CASES = [(spec, case) for spec in SPECS for case in spec.checks]
SMALL = Launch(meta={"BLOCK": 16, "ROWS": 2, "CUT": 0})
SMALL_CUT = Launch(meta={"BLOCK": 16, "ROWS": 2, "CUT": 1})


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    fast_scan.use(monkeypatch)


def _numbers(*shape: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(shape, generator=generator) * 2 - 1
    return a, *(torch.randn(shape, generator=generator) for _ in range(2))


@pytest.mark.parametrize(("spec", "case"), CASES, ids=lambda x: getattr(x, "key", ""))
@pytest.mark.usefixtures("_quick")
def test_checks(spec: object, case: Case) -> None:
    checking.check(spec, case)


def test_one_case_by_the_interpreters_own_scan() -> None:
    a, b, dh = _numbers(2, 37)
    (h,) = kernel.Scan(a, b, SMALL)()
    assert relative_error(h, reference.scan(a.double(), b.double())) < 1e-6
    for found, truth in zip(
        kernel.Scan(a, dh, SMALL_CUT, state=h)(),
        reference.gradients(a.double(), b.double(), dh.double()),
        strict=True,
    ):
        assert relative_error(found, truth) < 1e-5


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("launch", kernel.LAUNCHES, ids=lambda launch: launch.label)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_shipped_tile(spec: object, launch: Launch) -> None:
    rows, length = launch.meta["ROWS"] + 1, launch.meta["BLOCK"] + 37
    a, b, dh = _numbers(rows, length)
    (h,) = kernel.Scan(a, b, launch)()
    truth = reference.scan(a.double(), b.double())
    assert relative_error(h, truth) < 1e-5
    if spec is BACKWARD:
        found = kernel.Scan(a, dh, launch, state=h)()
        truths = reference.gradients(a.double(), b.double(), dh.double())
        assert max(map(relative_error, found, truths)) < 1e-5


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 5),
    length=st.integers(1, 130),
    cut=st.booleans(),
    seed=st.integers(0, 99),
)
def test_ragged_shapes_both_ways(rows: int, length: int, cut: bool, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fast_scan.use(patch)
        a, b, dh = _numbers(rows, length, seed=seed)
        launch = SMALL_CUT if cut else SMALL
        (h,) = kernel.Scan(a, b, launch)()
        found = kernel.Scan(a, dh, launch, state=h)()
    assert relative_error(h, reference.scan(a.double(), b.double())) < 1e-5
    truths = reference.gradients(a.double(), b.double(), dh.double())
    assert max(relative_error(f, t) for f, t in zip(found, truths, strict=True)) < 1e-5


def test_a_row_is_cut_into_whole_tiles_that_cover_it() -> None:
    for rows, length in ((1, 2**20), (7, 5000), (2000, 4096)):
        segment = kernel.len_segments(rows, length, kernel.CUT[0])
        assert segment % kernel.CUT[0].meta["BLOCK"] == 0
        assert segment * -(-length // segment) >= length
    assert kernel.len_segments(3, 5000, kernel.CARRIED[0]) == 5000


@pytest.mark.usefixtures("_quick")
def test_a_lost_carry_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel.Scan, "_carry", lambda self, a, b, before: before.zero_())
    a, b, _ = _numbers(1, 64)
    (h,) = kernel.Scan(a.abs(), b, SMALL_CUT)()
    assert relative_error(h, reference.scan(a.abs().double(), b.double())) > 1e-3


@pytest.mark.usefixtures("_quick")
def test_rows_left_out_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel.Scan, "_grid", (1,))
    a, b, _ = _numbers(5, 20)
    (h,) = kernel.Scan(a, b, SMALL)()
    assert relative_error(h, reference.scan(a.double(), b.double())) == float("inf")


def test_a_sum_is_what_torch_says() -> None:
    case = next(c for c in FORWARD.checks if c.params["decay"] == "none")
    checking.check(FORWARD, case, "torch")
    other = FORWARD.checks[0]
    assert "decays" in (FORWARD.implementation("torch").refusal(other, 90) or "")


def test_counted_bytes_are_three_and_five_arrays() -> None:
    params = {"rows": 8, "len_seq": 100, "decay": "random"}
    for spec, arrays in ((FORWARD, 3), (BACKWARD, 5)):
        case = Case(op=spec.name, dtype="bf16", params=params)
        assert spec.op(case).work(2**17).bytes == arrays * 800 * 2


def test_every_timed_case_is_counted_and_every_binary_has_a_name_of_its_own() -> None:
    for spec in SPECS:
        assert all(spec.op(case).work(164 * 2**10).bytes > 0 for case in spec.grid)
        assert len({case.key for case in spec.grid}) == len(spec.grid)
    names = [binary.name for spec in SPECS for binary in spec.compilations()]
    assert len(set(names)) == len(names)


def test_long_rows_have_the_truth_of_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doubling and the closed form of the gradients, against the steps and their autograd."""
    generator = torch.Generator().manual_seed(3)
    a, b, dh = (torch.randn(3, 37, generator=generator, dtype=torch.float64) for _ in range(3))
    truth, truths = reference.by_steps(a, b), reference.gradients(a, b, dh)
    monkeypatch.setattr(reference, "MOST_STEPS", 5)
    assert relative_error(reference.scan(a, b), truth) < 1e-12
    found = reference.gradients(a, b, dh)
    assert max(relative_error(x, y) for x, y in zip(found, truths, strict=True)) < 1e-12
