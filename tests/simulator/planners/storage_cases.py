"""Tensors to place: by hand, and at random."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simulator.planners.storage import Tensors


def tensors(rows: Sequence[tuple[int, int, int]]) -> Tensors:
    """Sizes, starts and ends, row by row."""
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return Tensors(
        names=tuple(f"t{i}" for i in range(len(rows))),
        sizes=columns[0], starts=columns[1], ends=columns[2],
    )  # fmt: skip


def random_tensors(num: int, rng: np.random.Generator, *, largest: int) -> Tensors:
    """Lives between two random moments, sizes uniform."""
    moments = np.sort(rng.integers(0, 2 * num, (num, 2)), axis=1)
    sizes = rng.integers(1, largest, num, endpoint=True)
    return tensors(
        list(zip(sizes.tolist(), moments[:, 0].tolist(), (moments[:, 1] + 1).tolist(), strict=True))
    )


ABOVE_LIVE = tensors(
    [(1, 2, 5), (2, 0, 2), (1, 3, 5), (3, 2, 6), (3, 4, 6), (3, 0, 2), (2, 5, 6), (1, 2, 4),
     (3, 1, 3)]
)  # fmt: skip
"""8 units alive at once, and no placement in fewer than 9; found at random and made small."""
HARD_60 = random_tensors(60, np.random.default_rng(8), largest=1000)
"""The hardest of forty such: every order is more than 4 % above the live bytes."""
