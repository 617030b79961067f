"""A prepared run is replayed: it reads its inputs anew and needs nothing that it left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import pytest
import torch

from tests.validate.kernels import fast_scan
from tests.validate.kernels.checking import CPU
from validate.kernels import registry
from validate.kernels.judge import POISON, relative_error
from validate.kernels.spec import TRITON, Implementation, Inputs, KernelSpec, Launch
from validate.record import Case

ARCH: Final = 90
LEAST_BYTES: Final = 500
LAID_OUT: Final[Mapping[str, frozenset[str]]] = {
    "fft_convolution": frozenset({"k"}),
    "flash_attention_backward": frozenset({"q", "k", "v"}),
    "short_convolution": frozenset({"w"}),
    "short_convolution_backward": frozenset({"w"}),
}
"""Inputs that a preparation lays out anew, or runs a forward pass on: later changes of them are
not seen."""


def _ours() -> list[tuple[KernelSpec, Implementation]]:
    return [(s, i) for s in registry.specs() for i in s.implementations if _is_ours(i)]


def _is_ours(how: Implementation) -> bool:
    return how.name.startswith(TRITON)


def _name(value: object) -> str:
    return str(getattr(value, "name", ""))


def _able(spec: KernelSpec, how: Implementation) -> list[Case]:
    """Checks that the implementation takes, the least first."""
    fit = [c for c in spec.checks if how.refusal(c, ARCH) is None and c.dtype in ("fp32", "fp16")]
    return sorted(fit, key=lambda c: float(spec.op(c).compulsory_bytes()))


def _trials(spec: KernelSpec, how: Implementation) -> Iterator[tuple[Case, Launch | None]]:
    """A small case, but more than an element or two, with every kernel that its launches take."""
    cases = _able(spec, how)
    small = next((c for c in cases if spec.op(c).compulsory_bytes() > LEAST_BYTES), cases[-1])
    launches = how.launches(small, ARCH)
    variants = {_variant(x): x for x in reversed(launches)}
    yield from ((small, launch) for launch in variants.values())


def _variant(launch: Launch | None) -> tuple[Any, ...]:
    """What a launch changes but tile sizes: names of its parameters, and those that are flags."""
    if launch is None:
        return ()
    return tuple(
        (name, name.startswith("SPLIT") and size > 1) for name, size in launch.meta.items()
    )


def _drawn(spec: KernelSpec, case: Case, seed: int) -> Inputs:
    return spec.inputs(case, torch.Generator().manual_seed(seed), CPU)


def _poison(outputs: tuple[torch.Tensor, ...], inputs: Inputs) -> None:
    given = {x.untyped_storage().data_ptr() for x in inputs.values() if torch.is_tensor(x)}
    for out in outputs:
        assert out.untyped_storage().data_ptr() not in given
        out.fill_(POISON)


def _changed(spec: KernelSpec, case: Case, inputs: Inputs) -> None:
    """Other numbers in the same memory; what is no number (indices, lengths) stays."""
    other = _drawn(spec, case, 2)
    for name, value in inputs.items():
        kept = name in LAID_OUT.get(spec.name, ())
        if torch.is_tensor(value) and value.is_floating_point() and not kept:
            assert value.shape == other[name].shape
            value.copy_(other[name])


def _repeated(
    spec: KernelSpec, how: Implementation, case: Case, launch: Launch | None
) -> list[float]:
    """The errors of a second run, on changed inputs and over poisoned outputs."""
    inputs = _drawn(spec, case, 1)
    run = how.prepare(case, inputs, launch)
    _poison(run(), inputs)
    _changed(spec, case, inputs)
    found, truth = run(), spec.reference(case, inputs)
    return [relative_error(o, t) for o, t in zip(found, truth, strict=True)]


@pytest.mark.parametrize(("spec", "how"), _ours(), ids=_name)
def test_a_run_can_be_repeated(
    spec: KernelSpec, how: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The truth of changed inputs, whatever a first run left behind."""
    fast_scan.use(monkeypatch)
    for case, launch in _trials(spec, how):
        errors = _repeated(spec, how, case, launch)
        assert max(errors) <= spec.tolerances[case.dtype], (case, launch, errors)


def test_a_first_result_that_is_kept_is_caught() -> None:
    spec = registry.spec("gemm")
    case, launch = next(_trials(spec, spec.implementations[0]))

    def once(case: Case, inputs: Inputs, launch: Launch | None) -> Callable[[], Any]:
        kept = tuple(spec.reference(case, inputs))
        return lambda: tuple(out.clone() for out in kept)

    def added(case: Case, inputs: Inputs, launch: Launch | None) -> Callable[[], Any]:
        total = torch.zeros(spec.reference(case, inputs)[0].shape, dtype=torch.float64)
        return lambda: (total.add_(spec.reference(case, inputs)[0]),)

    for prepare in (once, added):
        how = Implementation(name="kept", prepare=prepare)
        assert _repeated(spec, how, case, launch)[0] > 0.1
