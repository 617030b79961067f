"""An executable two-level memory: slow (HBM) and fast (SRAM of a stated size), counting itself.

A program places its inputs in slow memory, loads tiles, computes on tiles and stores them back.
Values are float64 throughout, so that numerics can be compared with a naive reference; bytes are
counted by each array's nominal number format. Fast memory refuses to overflow, and must be empty
when a kernel starts: what one kernel leaves for the next goes through slow memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwmodels.dtypes import FP32, DType
from workloads.work import Work

Values: TypeAlias = NDArray[Any]
Index: TypeAlias = Any


class FastMemoryOverflow(RuntimeError):
    """A program asked for more fast memory than the machine has."""


class SlowArray:
    """An array in slow memory with its nominal number format."""

    __slots__ = ("dtype", "values")

    def __init__(self, values: Values, dtype: DType) -> None:
        self.values, self.dtype = values, dtype


class Tile:
    """An array in fast memory; holds its bytes until freed."""

    __slots__ = ("dtype", "nbytes", "values")

    def __init__(self, values: Values, dtype: DType) -> None:
        self.values = values
        self.dtype = dtype
        self.nbytes = values.size * dtype.bytes_per_element

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values held."""
        return self.values.shape


class Machine:
    """A fast memory of `fast_bytes` in front of an unlimited slow one."""

    def __init__(self, fast_bytes: float) -> None:
        self.fast_bytes = fast_bytes
        self.used_bytes = 0.0
        self.peak_bytes = 0.0
        self._live: dict[int, Tile] = {}
        self._tensor: dict[DType, float] = {}
        self._vector = 0
        self._special = 0
        self._read = 0.0
        self._written = 0.0
        self._launches = 0

    # ---- slow memory -----------------------------------------------------------------------

    def place(self, values: Values, dtype: DType) -> SlowArray:
        """Put an input into slow memory; free of charge, it was there before we came."""
        return SlowArray(np.asarray(values, dtype=np.result_type(values, np.float64)), dtype)

    def empty(self, shape: tuple[int, ...], dtype: DType, *, is_complex: bool = False) -> SlowArray:
        """Reserve an output; poisoned with NaN so that an unwritten element shows."""
        kind = np.complex128 if is_complex else np.float64
        return SlowArray(np.full(shape, np.nan, dtype=kind), dtype)

    # ---- moving ----------------------------------------------------------------------------

    def load(self, source: SlowArray, index: Index = ...) -> Tile:
        """Copy part of a slow array into fast memory."""
        tile = self._hold(np.array(source.values[index]), source.dtype)
        self._read += tile.nbytes
        return tile

    def store(self, tile: Tile, target: SlowArray, index: Index = ...) -> None:
        """Copy a tile to slow memory; the bytes are the target's format's, the tile stays."""
        self._alive(tile)
        target.values[index] = tile.values.reshape(target.values[index].shape)
        self._written += tile.values.size * target.dtype.bytes_per_element

    def reload(self, source: SlowArray, index: Index, into: Tile) -> None:
        """Read part of a slow array into a tile that is already held."""
        self._alive(into)
        into.values[...] = source.values[index]
        self._read += into.values.size * source.dtype.bytes_per_element

    # ---- fast memory -----------------------------------------------------------------------

    def full(self, shape: tuple[int, ...], value: float, dtype: DType = FP32) -> Tile:
        """A tile filled with a constant (an accumulator); no traffic."""
        return self._hold(np.full(shape, value, dtype=np.float64), dtype)

    def hold(self, values: Values, dtype: DType = FP32) -> Tile:
        """A tile of values computed on the spot (a mask, twiddle factors); no traffic.

        Use only for what a kernel derives from indices; data comes through `load`.
        """
        return self._hold(np.array(values), dtype)

    def free(self, *tiles: Tile) -> None:
        """Give fast memory back."""
        for tile in tiles:
            self._alive(tile)
            del self._live[id(tile)]
            self.used_bytes -= tile.nbytes

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Free on exit every tile that was allocated inside."""
        before = set(self._live)
        yield
        self.free(*[t for key, t in self._live.items() if key not in before])

    @contextmanager
    def kernel(self) -> Iterator[None]:
        """One kernel launch: fast memory is empty before it and emptied after it."""
        if self._live:
            raise RuntimeError("fast memory must be empty when a kernel starts")
        self._launches += 1
        with self.scope():
            yield

    @contextmanager
    def grid(self, num_blocks: int) -> Iterator[list[Machine]]:
        """One launch of thread blocks that stay resident together, each with a fast memory as
        large as this one's; what they count is added up when the kernel ends."""
        with self.kernel():
            blocks = [Machine(self.fast_bytes) for _ in range(num_blocks)]
            yield blocks
            for block in blocks:
                self._absorb(block)

    # ---- computing -------------------------------------------------------------------------

    def matmul(self, a: Tile, b: Tile, dtype: DType, *, into: Tile | None = None) -> Tile:
        """a @ b (batched over leading axes), 2 m n k flops each, added to `into` if given."""
        product = self._values(a) @ self._values(b)
        real = 4 if np.iscomplexobj(a.values) and np.iscomplexobj(b.values) else 1
        flops = 2 * product.size * a.shape[-1] * real
        self._tensor[dtype] = self._tensor.get(dtype, 0) + flops
        if into is None:
            return self._hold(product, FP32)
        self._alive(into)
        into.values += product
        return into

    def vector(
        self,
        values: Values,
        *,
        per_element: float = 1,
        into: Tile | None = None,
        dtype: DType = FP32,
    ) -> Tile:
        """Record an elementwise result: `per_element` flops for each element of `values`.

        `into` overwrites a held tile of the same shape; otherwise a new tile is held.
        """
        self._vector += round(values.size * per_element)
        return self._put(values, into, dtype)

    def special(
        self,
        values: Values,
        *,
        per_element: float = 1,
        into: Tile | None = None,
        dtype: DType = FP32,
    ) -> Tile:
        """Record a special-function result (exp, reciprocal, rsqrt): one op per element."""
        self._special += round(values.size * per_element)
        return self._put(values, into, dtype)

    def reduce(
        self, kind: str, tile: Tile, axis: int = -1, *, keepdims: bool = True, dtype: DType = FP32
    ) -> Tile:
        """'sum' or 'max' along an axis: as many flops as elements go in."""
        values = self._values(tile)
        self._vector += values.size
        if kind == "sum":
            return self._hold(values.sum(axis=axis, keepdims=keepdims), dtype)
        if kind == "max":
            return self._hold(values.max(axis=axis, keepdims=keepdims), dtype)
        raise ValueError(f"reduce knows 'sum' and 'max', not '{kind}'")

    def count(self, *, vector: float = 0, special: float = 0) -> None:
        """Work on values already held that no other verb describes; say what at the call."""
        self._vector += round(vector)
        self._special += round(special)

    # ---- the tally -------------------------------------------------------------------------

    def counted(self) -> Work:
        """Everything counted so far."""
        return Work(
            tensor_flops=dict(self._tensor),
            vector_flops=self._vector,
            special_ops=self._special,
            read_bytes=self._read,
            write_bytes=self._written,
            launches=self._launches,
        )

    # ---- inside ----------------------------------------------------------------------------

    def _absorb(self, block: Machine) -> None:
        self.peak_bytes = max(self.peak_bytes, block.peak_bytes)
        for dtype, flops in block._tensor.items():
            self._tensor[dtype] = self._tensor.get(dtype, 0) + flops
        self._vector += block._vector
        self._special += block._special
        self._read += block._read
        self._written += block._written

    def _put(self, values: Values, into: Tile | None, dtype: DType) -> Tile:
        if into is None:
            return self._hold(np.array(values), dtype)
        self._alive(into)
        into.values[...] = values
        return into

    def _hold(self, values: Values, dtype: DType) -> Tile:
        tile = Tile(values, dtype)
        if self.used_bytes + tile.nbytes > self.fast_bytes:
            raise FastMemoryOverflow(
                f"{tile.nbytes:.0f} bytes for {tile.shape} do not fit: {self.used_bytes:.0f} of "
                f"{self.fast_bytes:.0f} bytes are in use"
            )
        self.used_bytes += tile.nbytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        self._live[id(tile)] = tile
        return tile

    def _alive(self, tile: Tile) -> None:
        if id(tile) not in self._live:
            raise RuntimeError("this tile is not in fast memory: it was freed or never held")

    def _values(self, tile: Tile) -> Values:
        self._alive(tile)
        return tile.values


def slices(size: int, step: int) -> list[slice]:
    """Consecutive ranges of at most `step` that cover `size`.

    >>> slices(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
