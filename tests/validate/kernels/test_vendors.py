"""Vendors' convolutions and recurrent layers: what torch runs on a CPU is what the truth says."""

from __future__ import annotations

import pytest
import torch

from tests.validate.kernels.checking import check
from validate.adapters import ADAPTERS
from validate.kernels.judge import relative_error
from validate.kernels.spec import KernelSpec
from validate.kernels.vendor_convolution import reference as images
from validate.kernels.vendor_convolution import suite as convolutions
from validate.kernels.vendor_rnn import reference as layers
from validate.kernels.vendor_rnn import suite as recurrences
from validate.measurement import Measurement
from validate.record import Case

ALL = [
    (spec, case) for s in (convolutions, recurrences) for spec in s.SPECS for case in spec.checks
]
SPECS = (*convolutions.SPECS, *recurrences.SPECS)


def _key(value: object) -> str:
    return f"{value.op}-{value.key}" if isinstance(value, Case) else ""


@pytest.mark.parametrize(("spec", "case"), ALL, ids=_key)
def test_checks(spec: KernelSpec, case: Case) -> None:
    check(spec, case, "cudnn")


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_rows_count_as_the_op_does(spec: KernelSpec) -> None:
    """A record of ours read as a published row is counted like its case."""
    assert spec.row is not None
    for case in spec.grid:
        if case.dtype == "tf32":
            continue
        family, op, params = spec.row(case)
        row = Measurement(
            family=family, source="ridgeplan/cudnn/rotated", gpu="H200", device_id="h200-sxm",
            op=op, dtype=case.dtype, params=params, seconds=1.0,
        )  # fmt: skip
        (part,) = ADAPTERS[op](row)
        made = part.op(**dict(part.fixed), **part.sizes)
        assert made.work(2.0**18) == spec.op(case).work(2.0**18)


def test_nothing_is_compiled() -> None:
    assert all(spec.compilations() == () for spec in SPECS)
    assert len({spec.name for spec in SPECS}) == len(SPECS)


def test_convolution_by_hand() -> None:
    """A row 1, 2, 3 by the filter 10, 1, without padding and with a stride of two."""
    x, w = torch.tensor([[[[1.0, 2.0, 3.0]]]]), torch.tensor([[[[10.0, 1.0]]]])
    dy = torch.ones(1, 1, 1, 2)
    plain = images.convolution("fwd", x, w, dy, (1, 1), (0, 0))
    assert plain.flatten().tolist() == [12.0, 23.0]
    back = images.convolution("bwd_data", x, w, dy, (1, 1), (0, 0))
    assert back.flatten().tolist() == [10.0, 11.0, 1.0]
    weights = images.convolution("bwd_weight", x, w, dy, (1, 1), (0, 0))
    assert weights.flatten().tolist() == [3.0, 5.0]
    wide = images.convolution("fwd", x, w, dy[..., :1], (2, 2), (0, 0))
    assert wide.flatten().tolist() == [12.0]


@pytest.mark.parametrize("cell", recurrences.LAYERS)
def test_layers_against_torch(cell: str) -> None:
    """torch's own layer in float64, another implementation of the same equations."""
    layer = recurrences.LAYERS[cell](3, 5, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    weights = [getattr(layer, name) for name in recurrences.WEIGHTS]
    assert relative_error(layers.hidden_states(cell, x, weights), layer(x)[0]) < 1e-12
