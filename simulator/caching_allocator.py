"""PyTorch's caching allocator, replayed: how many bytes a sequence of requests keeps reserved.

Rules of c10/cuda/CUDACachingAllocator.cpp with default settings, for each stream apart:

    round      up to 512 bytes; requests up to 1 MiB and larger ones have pools of their own
    reuse      the smallest free block of the pool that holds the request, lowest address first
    split      what is left of a block, from 512 bytes (small pool) or above 1 MiB (large pool)
    grow       else a new segment: 2 MiB, 20 MiB, or above 10 MiB the request in whole 2 MiB
    merge      a freed block with free neighbours of its segment
    give back  at the device's limit every segment without a live block, then try again

Ignored: expandable segments, `max_split_size_mb`, waiting for other streams before reuse.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable
from dataclasses import dataclass, field

from hwmodels.errors import InfeasibleError, InputError
from simulator.activation_memory import MIB, SMALL_BYTES, rounded_bytes, segment_bytes


@dataclass(slots=True)
class _Block:
    """A stretch of a segment; `before` and `after` are its neighbours there."""

    segment: int
    start: int
    size: int
    pool: Hashable
    is_free: bool = False
    before: _Block | None = None
    after: _Block | None = None

    @property
    def key(self) -> tuple[int, int, int]:
        """Order of the free list: size, then address."""
        return (self.size, self.segment, self.start)


@dataclass(slots=True)
class CachingAllocator:
    """`allocate` and `free` by name; `reserved_bytes` is what the driver has handed out.

    >>> cache = CachingAllocator()
    >>> cache.allocate("logits", 3 * 2**30)
    >>> cache.free("logits")
    >>> cache.allocate("float", 6 * 2**30)  # no cached block holds it: both stay reserved
    >>> cache.reserved_bytes == 9 * 2**30
    True
    """

    capacity_bytes: float | None = None
    reserved_bytes: int = 0
    peak_reserved_bytes: int = 0
    live_bytes: int = 0
    peak_live_bytes: int = 0
    num_given_back: int = 0
    _live: dict[Hashable, _Block] = field(default_factory=dict)
    _free: dict[Hashable, list[tuple[int, int, int]]] = field(default_factory=dict)
    _blocks: dict[tuple[int, int], _Block] = field(default_factory=dict)
    _num_segments: int = 0

    def allocate(self, name: Hashable, num_bytes: float, stream: str = "") -> None:
        """A block for `name`, from the cache or from the driver."""
        if name in self._live:
            raise InputError(f"'{name}' is allocated already; free it first")
        size = int(rounded_bytes(num_bytes))
        pool = (stream, size <= SMALL_BYTES)
        block = self._cached(pool, size) or self._grown(pool, size)
        self._cut(block, size)
        block.is_free = False
        self._live[name] = block
        self.live_bytes += block.size
        self.peak_live_bytes = max(self.peak_live_bytes, self.live_bytes)

    def free(self, name: Hashable) -> None:
        """Back into the cache, merged with free neighbours."""
        block = self._live.pop(name, None)
        if block is None:
            raise InputError(f"'{name}' is not allocated; allocate it before it is freed")
        self.live_bytes -= block.size
        for other in (block.before, block.after):
            if other is not None and other.is_free:
                self._unlist(other)
                block = self._joined(*sorted((block, other), key=lambda one: one.start))
        self._list(block)

    # ---- inside --------------------------------------------------------------------------------

    def _cached(self, pool: Hashable, size: int) -> _Block | None:
        free = self._free.setdefault(pool, [])
        at = bisect_left(free, (size, -1, -1))
        if at == len(free):
            return None
        _, segment, start = free.pop(at)
        return self._blocks[segment, start]

    def _grown(self, pool: Hashable, size: int) -> _Block:
        needed = int(segment_bytes(size))
        if self.capacity_bytes is not None and self.reserved_bytes + needed > self.capacity_bytes:
            self._give_back()
            if self.reserved_bytes + needed > self.capacity_bytes:
                raise InfeasibleError(
                    f"out of memory: {needed / MIB:.0f} MiB more on top of "
                    f"{self.reserved_bytes / MIB:.0f} MiB reserved exceed the device's "
                    f"{self.capacity_bytes / MIB:.0f} MiB"
                )
        self.reserved_bytes += needed
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        block = _Block(segment=self._num_segments, start=0, size=needed, pool=pool)
        self._num_segments += 1
        self._blocks[block.segment, 0] = block
        return block

    def _give_back(self) -> None:
        """Every segment that is one free block."""
        self.num_given_back += 1
        for free in self._free.values():
            for key in list(free):
                block = self._blocks[key[1], key[2]]
                if block.before is None and block.after is None:
                    free.remove(key)
                    del self._blocks[block.segment, block.start]
                    self.reserved_bytes -= block.size

    def _cut(self, block: _Block, size: int) -> None:
        """Put what `size` leaves of the block back, where that is worth a block."""
        left = block.size - size
        is_small = size <= SMALL_BYTES
        if left <= 0 or (not is_small and left <= SMALL_BYTES):
            return
        rest = _Block(
            segment=block.segment, start=block.start + size, size=left, pool=block.pool,
            before=block, after=block.after,
        )  # fmt: skip
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        self._blocks[rest.segment, rest.start] = rest
        self._list(rest)

    def _joined(self, first: _Block, second: _Block) -> _Block:
        del self._blocks[second.segment, second.start]
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        return first

    def _list(self, block: _Block) -> None:
        block.is_free = True
        insort(self._free.setdefault(block.pool, []), block.key)

    def _unlist(self, block: _Block) -> None:
        free = self._free[block.pool]
        del free[bisect_left(free, block.key)]
