"""PyTorch's caching allocator: its rules one by one, and what always holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.errors import InfeasibleError, InputError
from simulator.activation_memory import MIB
from simulator.caching_allocator import CachingAllocator

GIB = 2**30


def test_small_requests_share_a_segment() -> None:
    cache = CachingAllocator()
    for i in range(4):
        cache.allocate(i, 512 * 1024)
    assert cache.reserved_bytes == 2 * MIB
    cache.allocate(4, 1)
    assert (cache.reserved_bytes, cache.live_bytes) == (4 * MIB, 2 * MIB + 512)


def test_middle_requests_share_twenty_and_large_ones_are_rounded() -> None:
    cache = CachingAllocator()
    cache.allocate("a", 4 * MIB)
    cache.allocate("b", 9 * MIB)
    assert cache.reserved_bytes == 20 * MIB
    cache.allocate("c", 10 * MIB + 1)
    assert cache.reserved_bytes == 32 * MIB


def test_the_best_fit_is_taken_and_the_rest_is_split_off() -> None:
    cache = CachingAllocator()
    for name, size in (("big", 64 * MIB), ("mid", 32 * MIB)):
        cache.allocate(name, size)
    cache.free("big")
    cache.free("mid")
    cache.allocate("x", 20 * MIB)  # from the 32 MiB block
    cache.allocate("y", 64 * MIB)  # the 64 MiB block is whole still
    cache.allocate("z", 12 * MIB)  # what x left
    assert cache.reserved_bytes == 96 * MIB


def test_a_rest_of_up_to_one_mebibyte_is_not_split_off() -> None:
    cache = CachingAllocator()
    cache.allocate("x", 32 * MIB)
    cache.free("x")
    cache.allocate("y", 31 * MIB)
    assert cache.live_bytes == 32 * MIB


def test_neighbours_merge_and_streams_do_not_share() -> None:
    cache = CachingAllocator()
    cache.allocate("whole", 64 * MIB)
    cache.free("whole")
    for i in range(4):
        cache.allocate(i, 16 * MIB)
    for i in (0, 2, 3, 1):
        cache.free(i)
    cache.allocate("again", 64 * MIB)
    assert cache.reserved_bytes == 64 * MIB
    cache.free("again")
    cache.allocate("other", 64 * MIB, "gather")
    assert cache.reserved_bytes == 128 * MIB


def test_at_the_limit_cached_segments_go_back() -> None:
    cache = CachingAllocator(capacity_bytes=3 * GIB)
    cache.allocate("x", GIB)
    cache.free("x")
    cache.allocate("y", 2.5 * GIB)
    assert (cache.reserved_bytes, cache.num_given_back) == (int(2.5 * GIB), 1)
    with pytest.raises(InfeasibleError, match="out of memory: 1024 MiB more"):
        cache.allocate("z", GIB)


def test_names_are_unique_and_known() -> None:
    cache = CachingAllocator()
    cache.allocate("x", 1)
    with pytest.raises(InputError, match="allocated already"):
        cache.allocate("x", 1)
    with pytest.raises(InputError, match="not allocated"):
        cache.free("y")


@given(st.lists(st.tuples(st.integers(1, 2**28), st.booleans(), st.booleans()), max_size=40))
def test_reserved_bytes_hold_the_live_ones_and_all_can_be_used_again(
    requests: list[tuple[int, bool, bool]],
) -> None:
    cache, live = CachingAllocator(), []
    for i, (size, is_freed, other) in enumerate(requests):
        cache.allocate(i, size, "other" if other else "")
        live.append(i)
        if is_freed:
            cache.free(live.pop(len(live) // 2))
        assert cache.live_bytes <= cache.reserved_bytes <= cache.peak_reserved_bytes
    for name in live:
        cache.free(name)
    assert cache.live_bytes == 0
    before = cache.reserved_bytes
    cache.capacity_bytes = 0
    cache._give_back()  # every segment must have merged into one free block
    assert cache.reserved_bytes == 0 <= before
