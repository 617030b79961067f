"""What the suite's kernels are counted as, by hand: matrix flops, and bytes that must be moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pytest

from validate.adapters import parts
from validate.kernels import registry
from validate.kernels.spec import KernelSpec
from validate.measurement import SIZES, Measurement
from validate.record import Case
from validate.recorded import source_of

_PRODUCT: Final = {"m": 33, "n": 160, "k": 64}
_ROWS: Final = {"rows": 3, "cols": 4096}
_STEPS: Final = {"batch": 16, "heads": 1, "head_dim": 32, "len_seq": 7}
_TAPS: Final = {"batch": 3, "len_seq": 2, "channels": 20, "width": 5, "bias": 0, "activation": 0}
_IMAGE: Final = {
    "n": 3, "c": 2, "h": 8, "w": 8, "k": 4, "r": 1, "s": 1, "pad_h": 0, "pad_w": 0,
    "stride_h": 2, "stride_w": 2, "layout": "nhwc",
}  # fmt: skip
_LAYER: Final = {"hidden": 64, "batch": 16, "timesteps": 3}
_LONG: Final = {"batch": 2, "channels": 3, "len_seq": 100, "gated": 1, "circular": 0}

BY_HAND: Final[tuple[tuple[str, str, str, Mapping[str, Any], float, float], ...]] = (
    ("gemm", "gemm", "fp16", _PRODUCT, 2 * 33 * 160 * 64, 2 * (33 * 64 + 160 * 64 + 33 * 160)),
    ("gemm", "gemm", "fp8", _PRODUCT, 2 * 33 * 160 * 64, 33 * 64 + 160 * 64 + 2 * 33 * 160),
    ("gemm", "gemm", "tf32", _PRODUCT, 2 * 33 * 160 * 64, 4 * (33 * 64 + 160 * 64 + 33 * 160)),
    # half of the weight in bf16, and two bits for the place of each number kept
    ("sparse_gemm", "sparse_gemm", "bf16", _PRODUCT, 33 * 160 * 64,
     2 * (33 * 64 + 160 * 32 + 33 * 160) + 160 * 32 // 4),
    ("tensor_core_ceiling", "tensor_core_ceiling", "tf32", {"programs": 3, "iterations": 2},
     3 * 2 * 2 * 128 * 128 * 64, 3 * 4 * (2 * 128 * 64 + 128 * 128)),
    ("copy", "copy", "fp32", {"elements": 8193}, 0, 2 * 4 * 8193),
    ("triad", "triad", "fp32", {"elements": 8193}, 0, 3 * 4 * 8193),
    ("l2_read", "l2_read", "fp32", {"elements": 5000, "passes": 3}, 0, 4 * 5000),
    ("elementwise", "elementwise", "bf16", {"map": "gelu", "elements": 5000}, 0, 2 * 2 * 5000),
    ("elementwise", "elementwise", "fp32", {"map": "add", "elements": 70}, 0, 3 * 4 * 70),
    ("swiglu", "swiglu", "bf16", {"rows": 3, "cols": 1025}, 0, 3 * 2 * 3 * 1025),
    ("softmax", "softmax", "bf16", _ROWS, 0, 2 * 2 * 3 * 4096),
    ("softmax_backward", "softmax_backward", "fp32", _ROWS, 0, 3 * 4 * 3 * 4096),
    # statistics: four bytes a row
    ("rmsnorm", "rmsnorm", "bf16", _ROWS, 0, 2 * (2 * 3 * 4096 + 4096) + 4 * 3),
    ("rmsnorm_backward", "rmsnorm_backward", "bf16", _ROWS, 0,
     2 * (3 * 3 * 4096 + 2 * 4096) + 4 * 3),
    ("layernorm", "layernorm", "fp16", _ROWS, 0, 2 * (2 * 3 * 4096 + 2 * 4096) + 2 * 4 * 3),
    # 128 complex points of each of three filters
    ("fft_convolution", "fft_convolution", "fp16", _LONG, 6 * 16 * 128 * (16 + 8),
     2 * (4 * 600 + 2 * 128 * 3)),
    ("short_convolution", "short_convolution", "fp16", _TAPS, 0, 2 * (2 * 120 + 100)),
    # gradients of five taps and a bias of 20 channels in fp32
    ("short_convolution_backward", "short_convolution_backward", "fp16", _TAPS, 0,
     2 * (3 * 120 + 100) + 4 * 6 * 20),
    # weights, inputs, biases, first states, all states
    ("recurrent_step", "recurrent_step", "fp16", {"cell": "slstm", **_STEPS},
     2 * 7 * 16 * 4 * 32 * 32, 2 * 32 * (4 * 32 + 7 * 16 * 4 + 4 + 4 * 16 + 4 * 7 * 16)),
    ("recurrent_step", "recurrent_step", "fp32", {"cell": "lstm", **_STEPS},
     2 * 7 * 16 * 4 * 32 * 32, 4 * 32 * (4 * 32 + 7 * 16 * 4 + 4 + 2 * 16 + 2 * 7 * 16)),
    ("conv2d_fwd", "conv2d_fwd", "fp16", _IMAGE, 2 * 3 * 4 * 4 * 4 * 2,
     2 * (3 * 2 * 64 + 8 + 3 * 4 * 16)),
    ("conv2d_bwd_weight", "conv2d_bwd_weight", "fp32", _IMAGE, 2 * 3 * 4 * 4 * 4 * 2,
     4 * (3 * 2 * 64 + 8 + 3 * 4 * 16)),
    # weights of the state, pre-activations and states of three steps
    ("lstm_fwd", "rnn_fwd", "fp32", {"cell": "lstm", **_LAYER}, 2 * 3 * 16 * 4 * 64 * 64,
     4 * (4 * 64 * 64 + 3 * 16 * 64 * (4 + 1))),
)  # fmt: skip


@pytest.mark.parametrize(("name", "op", "dtype", "params", "flops", "moved"), BY_HAND)
def test_by_hand(
    name: str, op: str, dtype: str, params: Mapping[str, Any], flops: float, moved: float
) -> None:
    found = registry.spec(name).op(Case(op=op, dtype=dtype, params=dict(params)))
    assert sum(found.work(2.0**18).tensor_flops.values()) == flops
    assert found.compulsory_bytes() == moved


def test_l2_reads_count_every_pass() -> None:
    """Three passes over 5000 numbers in two spans, whose sums are written once."""
    case = Case(op="l2_read", dtype="fp32", params={"elements": 5000, "passes": 3})
    work = registry.spec("l2_read").op(case).work(2.0**18)
    assert (work.read_bytes, work.write_bytes) == (3 * 4 * 5000, 2 * 4)


def _rows(spec: KernelSpec) -> list[tuple[Case, Measurement]]:
    """Cases worth timing that a public table names, as records of the first implementation."""
    found = []
    for case in spec.grid:
        row = spec.row(case) if spec.row is not None else None
        if row is None:
            continue
        family, op, params = row
        source = source_of(spec.implementations[0].name, spec.implementations[0].vendor, "rotated")
        read = Measurement(
            family=family, source=source, gpu="H200", device_id="h200-sxm", op=op,
            dtype=case.dtype, params=params, seconds=1.0,
        )  # fmt: skip
        found.append((case, read))
    return found


@pytest.mark.parametrize("spec", list(filter(_rows, registry.specs())), ids=lambda s: s.name)
def test_rows_are_read_as_the_case_is_counted(spec: KernelSpec) -> None:
    """Sizes by the names of the public schema, whole and from 1; the same bytes by its adapter."""
    for case, row in _rows(spec):
        sizes = [row.params[name] for name in SIZES.get(row.op, ())]
        assert all(isinstance(size, int) and size >= 1 for size in sizes), row
        made = [part.op(**dict(part.fixed), **part.sizes) for part in parts(row)]
        moved = sum(float(op.compulsory_bytes()) for op in made)
        assert moved == pytest.approx(float(spec.op(case).compulsory_bytes()), rel=0.03), case.key
