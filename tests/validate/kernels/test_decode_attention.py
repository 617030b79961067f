"""Decoding kernels, interpreted: caches of all kinds, parts, shared prefixes, planted bugs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.validate.kernels.checking import check, errors
from validate.kernels.decode_attention import kernel, reference, tiles
from validate.kernels.decode_attention.kernel import Cache, Parts, cut, plan_decode
from validate.kernels.decode_attention.suite import BACKENDS, FP8_CACHE, PAGED, PLAIN
from validate.kernels.decode_attention.suite import SPECS as DECODE
from validate.kernels.flash_attention.tiles import Tile
from validate.kernels.judge import relative_error
from validate.kernels.shared_prefix.suite import NAME as SHARED
from validate.kernels.shared_prefix.suite import SPECS as PREFIX
from validate.kernels.spec import Launch
from validate.record import Case

SPECS = (*DECODE, *PREFIX)
BY_NAME = {spec.name: spec for spec in SPECS}
CHECKS = [(spec.name, case) for spec in SPECS for case in spec.checks]
SMALL = Launch(meta={"BLOCK_M": 16, "BLOCK_N": 16})


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_of(x: torch.Tensor, lens: list[int]) -> list[torch.Tensor]:
    return [x[b, :, :n] for b, n in enumerate(lens)]


@pytest.mark.parametrize(("name", "case"), CHECKS, ids=lambda x: getattr(x, "key", x))
def test_every_case_meets_its_tolerance(name: str, case: Case) -> None:
    check(BY_NAME[name], case)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    heads=st.sampled_from([(1, 1), (6, 2), (18, 1)]),
    lens=st.lists(st.integers(1, 70), max_size=3, min_size=1), splits=st.integers(1, 9),
)  # fmt: skip
def test_any_lengths_and_parts(heads: tuple[int, int], lens: list[int], splits: int) -> None:
    """Parts that begin behind a short sequence's end hold nothing and count for nothing."""
    batch, most = len(lens), max(lens)
    q = drawn(1, batch, heads[0], 16)
    k, v = drawn(2, batch, heads[1], most, 16), drawn(3, batch, heads[1], most, 16)
    cache = Cache(k, v, most, torch.tensor(lens, dtype=torch.int32))
    o, lse = plan_decode(q, cache, SMALL, scale=0.25, num_splits=splits)()
    truth, true_lse = reference.decode(q, rows_of(k, lens), rows_of(v, lens), 0.25)
    assert relative_error(o, truth) < 1e-5
    assert relative_error(lse, true_lse) < 1e-5


def test_keys_may_lie_in_any_order_of_axes() -> None:
    """[batch, len, kv_heads, d], as models write it, seen as [batch, kv_heads, len, d]."""
    q = drawn(1, 2, 4, 16)
    k, v = (drawn(s, 2, 40, 2, 16).transpose(1, 2) for s in (2, 3))
    o, _ = plan_decode(q, Cache(k, v, 40), SMALL, scale=0.25)()
    assert relative_error(o, reference.decode(q, list(k), list(v), 0.25)[0]) < 1e-5


@pytest.mark.parametrize("tile", tiles.DECODE + tiles.PREFIX, ids=lambda t: t.launch.label)
def test_every_tile(tile: Tile) -> None:
    dtype = torch.float32 if "fp32" in tile.formats else torch.float16
    dim, n = tile.least_dim, tile.launch.meta["BLOCK_N"] + 3
    heads = tile.launch.meta["BLOCK_M"] + 1
    q = drawn(1, 1, heads, dim).to(dtype)
    k, v = (drawn(s, 1, 1, n, dim).to(dtype) for s in (2, 3))
    o, _ = plan_decode(q, Cache(k, v, n), tile.launch, scale=0.2)()
    assert relative_error(o, reference.decode(q, list(k), list(v), 0.2)[0]) < 2e-3


def test_a_cache_in_int8_is_near_the_one_it_stores() -> None:
    x = drawn(1, 2, 3, 50, 64)
    stored, scale = reference.quantised(x)
    assert int(stored.abs().max()) == 127
    assert 1e-3 < relative_error(stored * scale[..., None], x) < 1e-2


def test_scales_of_pages_are_refused() -> None:
    pool = drawn(1, 4, 16, 1, 16)
    table = torch.zeros(1, 4, dtype=torch.int32)
    cache = Cache(
        pool, pool, 60, table=table, k_scale=drawn(2, 1, 1, 60), v_scale=drawn(3, 1, 1, 60)
    )
    with pytest.raises(ValueError, match="paged"):
        plan_decode(drawn(4, 1, 1, 16), cache, SMALL, scale=1.0)


@given(
    st.integers(1, 4096), st.integers(1, 200_000), st.sampled_from([32, 64]), st.integers(2, 148)
)
def test_parts_cover_all_keys_in_whole_blocks(
    problems: int, len_max: int, block_n: int, num_multiprocessors: int
) -> None:
    parts = cut(problems, len_max, block_n, num_multiprocessors)
    assert parts.keys % block_n == 0
    assert (parts.number - 1) * parts.keys < len_max <= parts.number * parts.keys
    assert 1 <= parts.number <= kernel.MOST_PARTS


def test_short_caches_are_not_cut() -> None:
    assert cut(1, 256, 64, 132) == Parts(1, 256)


def test_a_lost_part_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in BY_NAME[PLAIN].checks if c.params["seq_kv"] == 700)
    real = kernel.cut

    def short(problems: int, len_max: int, block_n: int, sms: int) -> Parts:
        found = real(problems, len_max, block_n, sms)
        assert found.number > 1
        return Parts(found.number - 1, found.keys)

    monkeypatch.setattr(kernel, "cut", short)
    assert min(errors(BY_NAME[PLAIN], case)) > 0.05


def test_pages_in_the_wrong_order_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in BY_NAME[PAGED].checks if c.params["seq_kv"] == 37)
    real = reference.gathered
    monkeypatch.setattr(reference, "gathered", lambda pool, table, n: real(pool, table.flip(0), n))
    assert min(errors(BY_NAME[PAGED], case)) > 0.05


@pytest.mark.parametrize("name", ["sdpa-flash", "sdpa-math"])
def test_the_frameworks_attention_on_the_cpu(name: str) -> None:
    for case in BY_NAME[PLAIN].checks[:6]:
        check(BY_NAME[PLAIN], case, name)


def test_copies_of_the_prefix_give_the_same() -> None:
    for case in BY_NAME[SHARED].checks[:4]:
        check(BY_NAME[SHARED], case, "sdpa-flash")


def test_refusals_name_the_reason() -> None:
    spec = BY_NAME[PLAIN]
    ragged = next(c for c in spec.checks if c.params.get("lens"))
    for name in BACKENDS:
        assert "one length" in str(spec.implementation(name).refusal(ragged, 90))
    fp8 = BY_NAME[FP8_CACHE]
    assert "8.9" in str(fp8.implementation("triton").refusal(fp8.grid[0], 80))
    many = max(BY_NAME[SHARED].grid, key=lambda c: c.params["batch"] * c.params["len_prefix"])
    assert "copy" in str(BY_NAME[SHARED].implementation("sdpa-flash").refusal(many, 90))


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_cases_and_binaries_are_stated(spec: Any) -> None:
    names = [c.name for c in spec.compilations()]
    assert len(set(names)) == len(names) > 0
    keys = [c.key for c in spec.grid]
    assert len(set(keys)) == len(keys) >= 12
    for case in (*spec.checks, *spec.grid):
        assert spec.op(case).work(2.0**17).bytes > 0
        for arch in (80, 90, 100):
            assert spec.implementations[0].launches(case, arch), (case, arch)
