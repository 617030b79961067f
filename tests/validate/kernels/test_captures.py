"""A device's graph can hold a prepared run: the host never waits, and CUDA takes its grids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from tests.validate.kernels.checking import CPU
from validate.kernels import registry
from validate.kernels.spec import TRITON, Implementation, KernelSpec
from validate.record import Case

ARCH: Final = 90
MOST_GRID: Final = (2**31 - 1, 2**16 - 1, 2**16 - 1)
"""Programs that CUDA takes along each axis of a launch."""

SYNCHRONISING: Final = frozenset({
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal",
    "_unique2", "unique_dim", "unique_consecutive", "lift_fresh",
})  # fmt: skip
"""Operators that a device answers to the host, or (lift_fresh) that carry host data to it."""


INDEXING: Final = frozenset({"index", "index_put", "index_put_"})
"""Operators that wait for the device where an index is a mask."""


def _masks(indices: Sequence[torch.Tensor | None]) -> bool:
    return any(i is not None and i.dtype == torch.bool for i in indices)


class NoHost(TorchDispatchMode):
    """Refuses operators that would make the host wait for the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in SYNCHRONISING, f"{name} waits for the device"
        assert name not in INDEXING or not _masks(args[1]), f"{name} counts what a mask keeps"
        return func(*args, **(kwargs or {}))


def _launched(self: InterpretedFunction, *args: Any, grid: Any, **kwargs: Any) -> None:
    """In place of a launch: does CUDA take its grid and its sizes?"""
    assert all(1 <= n <= most for n, most in zip(grid, MOST_GRID, strict=False)), grid
    assert all(type(n) is int for n in grid), grid
    sizes = [x for x in args if isinstance(x, int)]
    assert all(abs(x) < 2**31 for x in sizes), sizes


def _is_ours(how: Implementation) -> bool:
    return how.name.startswith(TRITON)


def _least(spec: KernelSpec, how: Implementation) -> list[Case]:
    """The least check that the implementation takes, if any."""
    fit = [c for c in spec.checks if how.refusal(c, ARCH) is None]
    return sorted(fit, key=lambda c: float(spec.op(c).compulsory_bytes()))[:1]


@pytest.fixture
def unlaunched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels do nothing, so that what is left is what the host does."""
    monkeypatch.setattr(InterpretedFunction, "run", _launched)


def _refuses(run: Callable[[], object]) -> bool:
    try:
        with NoHost():
            run()
    except AssertionError:
        return True
    return False


def test_a_wait_is_noticed() -> None:
    x = torch.ones(3)
    assert _refuses(lambda: x.sum().item())
    assert _refuses(lambda: x[x > 0])
    assert _refuses(lambda: torch.tensor([1.0]) * x)
    assert not _refuses(lambda: (x * 2).sum())


@pytest.mark.usefixtures("unlaunched")
@pytest.mark.parametrize("spec", registry.specs(), ids=lambda s: s.name)
def test_runs_never_wait_for_the_device(spec: KernelSpec) -> None:
    """Ours and the others', on the least case that each takes."""
    for how in spec.implementations:
        for case in _least(spec, how):
            inputs = spec.inputs(case, torch.Generator().manual_seed(1), CPU)
            for launch in how.launches(case, ARCH) if _is_ours(how) else (None,):
                try:
                    run = how.prepare(case, inputs, launch)
                    run()  # plans and caches are made in a first run, before any capture
                except (RuntimeError, NotImplementedError):
                    assert not _is_ours(how)  # torch has it on CUDA alone
                    continue
                with NoHost():
                    run()
