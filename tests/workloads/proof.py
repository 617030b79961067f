"""The proof every program gives: counters equal the closed form exactly, numerics the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import numpy as np
from hypothesis import settings

from workloads.machine import Machine
from workloads.op import ProvedOp

Test = TypeVar("Test", bound=Callable[..., Any])

LEAST_SHAPES: Final = 200
"""Random shapes that prove one op, at the least."""

PROOFS: Final[dict[str, int]] = {}
"""Random shapes by op name, as the tests that prove the ops declare them."""


def proves(*names: str, shapes: int = LEAST_SHAPES) -> Callable[[Test], Test]:
    """Mark a property test as the proof of each of these ops, over that many random shapes."""

    def marked(test: Test) -> Test:
        PROOFS.update(dict.fromkeys(names, shapes))
        return settings(max_examples=shapes, deadline=None)(test)

    return marked


def assert_proved(op: ProvedOp, fast_bytes: float, *, seed: int = 0, rtol: float = 1e-9) -> None:
    """Run the op's program on a machine with that fast memory; compare everything."""
    inputs = op.inputs(np.random.default_rng(seed))
    kept = {key: value.copy() for key, value in inputs.items()}
    machine = Machine(fast_bytes)
    outputs = op.program(machine, inputs)
    expected = op.reference(kept)
    assert set(outputs) == set(expected)
    for key, value in expected.items():
        got = outputs[key]
        assert got.shape == value.shape, key
        assert np.isfinite(got).all(), f"{key} has unwritten or non-finite elements"
        error = np.linalg.norm(got - value) / max(np.linalg.norm(value), 1e-30)
        assert error < rtol, f"{key}: relative error {error:.2e}"
    counted, closed = machine.counted(), op.work(fast_bytes)
    for counter in ("vector_flops", "special_ops", "read_bytes", "write_bytes", "launches"):
        assert getattr(counted, counter) == getattr(closed, counter), (
            f"{counter}: program {getattr(counted, counter)} closed {getattr(closed, counter)} {op}"
        )
    closed_tensor = {d: f for d, f in closed.tensor_flops.items() if f}
    assert dict(counted.tensor_flops) == closed_tensor, (counted.tensor_flops, closed_tensor, op)
    assert machine.peak_bytes <= fast_bytes
    assert closed.bytes >= op.compulsory_bytes() * (1 - 1e-12)
    assert closed.bytes >= op.io_lower_bound_bytes(fast_bytes) * (1 - 1e-12)
