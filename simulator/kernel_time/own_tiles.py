"""A kernel of somebody's own in the calibrated model: its tile in place of the library's menu.

Only products take a tile as a parameter so far; other models keep the tiles of the kernels that
their published rows were measured on.
"""

from __future__ import annotations

from hwmodels.device import Device
from simulator.kernel_time.basis import basis
from simulator.kernel_time.gemm import MODEL, own_menu, own_seconds
from simulator.kernel_time.model import USUAL, Conditions
from simulator.kernel_time.rates import rates_of
from workloads.ops.matmul import Matmul


def own_matmul_seconds(
    op: Matmul,
    on: Device,
    *,
    tile_m: int,
    tile_n: int,
    step_bytes: int,
    split: int = 1,
    conditions: Conditions = USUAL,
) -> float:
    """Seconds of a product in tiles of one size, `split` parts of k, `step_bytes` of k a step.

    The device's calibrated constants are those of library kernels: how well one's own is written
    is not in them.

    >>> from hwmodels import catalog
    >>> op = Matmul(m=8192, n=8192, k=8192)
    >>> on = catalog.device("h100-sxm")
    >>> wide = own_matmul_seconds(op, on, tile_m=128, tile_n=256, step_bytes=128)
    >>> wide < own_matmul_seconds(op, on, tile_m=64, tile_n=64, step_bytes=128)
    True
    """
    labels = MODEL.labels(op, conditions)
    constants = basis(on, MODEL, None).narrowed(labels).constants(labels)
    own = own_menu(on.compute_capability, tile_m, tile_n, split, step_bytes)
    return float(own_seconds(op, rates_of(on), constants, conditions, own).seconds)
