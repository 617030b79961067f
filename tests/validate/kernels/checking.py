"""How the suites' own tests check a kernel on the CPU interpreter."""

from __future__ import annotations

import zlib

import torch

from validate.kernels.judge import relative_error
from validate.kernels.spec import KernelSpec
from validate.record import Case

CPU = torch.device("cpu")


def errors(spec: KernelSpec, case: Case, implementation: str = "triton") -> list[float]:
    """The relative error of every output of one implementation, interpreted."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.key.encode()))
    inputs = spec.inputs(case, generator, CPU)
    how = spec.implementation(implementation)
    launch = how.launches(case, 80)[0]
    outs = how.prepare(case, inputs, launch)()
    truth = spec.reference(case, inputs)
    assert len(outs) == len(truth)
    return [relative_error(out, ref) for out, ref in zip(outs, truth, strict=True)]


def check(spec: KernelSpec, case: Case, implementation: str = "triton") -> None:
    """Every output within the spec's tolerance of its reference."""
    found = errors(spec, case, implementation)
    assert max(found) <= spec.tolerances[case.dtype], found
