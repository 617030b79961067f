"""Products of routed experts as training frameworks run them: the faster of two ways.

    grouped    one kernel that walks a list of problems (`kernel_time.grouped`)
    by itself  a product of the usual library for every expert, on streams that keep the device
               full: in 16 bits as one batched product, in narrow formats one after another

Transformer Engine's GroupedLinear has both (cuBLAS on several streams, CUTLASS grouped), and takes
by device, format and version what is faster.
"""

from __future__ import annotations

from hwmodels.device import Device
from hwmodels.dtypes import BF16
from simulator.kernel_time.predict import predict
from workloads.numeric import Num, minimum
from workloads.ops.grouped_matmul import GroupedMatmul
from workloads.ops.matmul import Matmul
from workloads.ops.quantised_matmul import QuantisedMatmul


def grouped_seconds(op: GroupedMatmul, *, on: Device) -> Num:
    """Calibrated seconds of the faster way."""
    return minimum(predict(op, on=on).seconds, _by_itself(op, on))


def _by_itself(op: GroupedMatmul, on: Device) -> Num:
    if op.dtype.bits >= BF16.bits:
        alike = Matmul(
            batch=op.batch, m=op.m, n=op.n, k=op.k, dtype=op.dtype, out_dtype=op.out_dtype
        )
        return predict(alike, on=on).seconds
    one = QuantisedMatmul(
        m=op.m, n=op.n, k=op.k, dtype=op.dtype, in_dtype=op.dtype, out_dtype=op.written_dtype
    )
    return op.batch * predict(one, on=on).seconds
