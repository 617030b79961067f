"""One's own tile in the calibrated model of products."""

from __future__ import annotations

import pytest

from hwmodels import catalog
from simulator.kernel_time.gemm import menu
from simulator.kernel_time.own_tiles import own_matmul_seconds
from simulator.kernel_time.predict import predict
from workloads.ops.matmul import Matmul

H100 = catalog.device("h100-sxm")
LARGE = Matmul(m=8192, n=8192, k=4096)


def seconds(op: Matmul, tile_m: int, tile_n: int, split: int = 1) -> float:
    return own_matmul_seconds(
        op, H100, tile_m=tile_m, tile_n=tile_n, split=split, step_bytes=128
    )  # fmt: skip


def test_the_best_of_the_librarys_tiles_is_the_librarys_time() -> None:
    kernels = menu(H100.compute_capability)
    tiles = zip(kernels.tile_m[:, 0], kernels.tile_n[:, 0], strict=True)
    best = min(
        seconds(LARGE, int(m), int(n), int(s)) for m, n in tiles for s in kernels.splits
    )  # fmt: skip
    assert best == pytest.approx(float(predict(LARGE, on=H100).seconds))


def test_small_tiles_feed_the_units_too_slowly() -> None:
    assert seconds(LARGE, 128, 256) < seconds(LARGE, 64, 128) < seconds(LARGE, 16, 64)


def test_parts_of_k_pay_where_tiles_are_few() -> None:
    deep = Matmul(m=128, n=128, k=65536)
    assert seconds(deep, 64, 64, split=8) < seconds(deep, 64, 64)
    assert seconds(LARGE, 128, 256, split=8) > seconds(LARGE, 128, 256)


def test_the_librarys_answer_is_not_disturbed() -> None:
    before = float(predict(LARGE, on=H100).seconds)
    seconds(LARGE, 16, 32)
    assert float(predict(LARGE, on=H100).seconds) == before
