from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP8, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.machine import Machine
from workloads.ops import flash_attention, flash_attention_backward
from workloads.ops.attention import AttentionOp, StandardAttention
from workloads.ops.flash_attention import FlashAttention2, ceil_sum
from workloads.ops.flash_attention_backward import FlashAttention2Backward

BOTH = (FlashAttention2, FlashAttention2Backward)
COUNTERS = ("vector_flops", "special_ops", "read_bytes", "write_bytes", "flops", "launches")
SM_BYTES = 228 * 1024


@st.composite
def shapes(draw: st.DrawFn, op: Callable[..., AttentionOp], fewest_keys: int = 1) -> AttentionOp:
    kv_heads, causal, longest = draw(st.integers(1, 2)), draw(st.booleans()), 40
    len_q = draw(st.integers(1, longest))
    return op(
        batch=draw(st.integers(1, 2)),
        num_heads=kv_heads * draw(st.integers(1, 5)),
        num_kv_heads=kv_heads,
        len_q=len_q,
        len_kv=draw(st.integers(max(len_q if causal else 1, fewest_keys), longest + 30)),
        head_dim=draw(st.integers(1, 20)),
        head_dim_v=draw(st.integers(1, 20)),
        causal=causal,
        dtype=draw(st.sampled_from([BF16, FP8, FP32])),
    )


# Log-uniform, so that small tiles, single tiles and everything between are all reached.
memories = st.floats(8, 15).map(lambda exponent: int(2**exponent))


def fits(op: AttentionOp, fast_bytes: int) -> bool:
    try:
        op.tiling(fast_bytes)
    except InputError:
        return False
    return True


@proves("flash_attention_2")
@given(op=shapes(FlashAttention2), fast_bytes=memories)
def test_forward_counts_what_the_closed_form_says(op: FlashAttention2, fast_bytes: int) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@proves("flash_attention_2_backward")
@given(op=shapes(FlashAttention2Backward, fewest_keys=2), fast_bytes=memories)
def test_backward_counts_what_the_closed_form_says(
    op: FlashAttention2Backward, fast_bytes: int
) -> None:
    assume(fits(op, fast_bytes))
    assert_proved(op, fast_bytes)


@pytest.mark.parametrize("op", BOTH)
@pytest.mark.parametrize("granule", [4, 8])
@pytest.mark.parametrize("seed", range(20))
def test_blocks_of_several_granules_are_proved(
    op: type[AttentionOp], granule: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small granule, small shapes reach blocks of many granules and ragged tails."""
    for module in (flash_attention, flash_attention_backward):
        monkeypatch.setattr(module, "GRANULE", granule)
    rng = np.random.default_rng(seed)
    len_q = int(rng.integers(10, 70))
    shape = op(
        num_heads=2 * int(rng.integers(1, 4)),
        num_kv_heads=2,
        len_q=len_q,
        len_kv=len_q + int(rng.integers(0, 40)),
        head_dim=3,
        head_dim_v=2,
        causal=True,
    )
    assert_proved(shape, int(rng.integers(800, 6000)), seed=seed)


# (op, shape, fast_bytes, tile): each way a tile is chosen, at the real granule.
CASES = [
    # Multiples of the granule, even: 2 blocks of 128 rather than 192 and 8.
    (FlashAttention2, {"len_q": 200, "len_kv": 333}, 60_000, (128, 64, 1)),
    (FlashAttention2, {"len_q": 200, "len_kv": 333}, 10**6, (200, 64, 1)),
    (FlashAttention2, {"len_q": 70, "len_kv": 90}, 3000, (8, 8, 1)),
    # 8 heads share a tile: 16 positions make 128 rows.
    (FlashAttention2, {"len_q": 70, "len_kv": 90, "num_heads": 8}, 160 * 332, (16, 64, 8)),
    # Not even one position of all 8 heads fits.
    (FlashAttention2, {"len_q": 20, "len_kv": 30, "num_heads": 8}, 1000, (1, 8, 3)),
    # Decoding: one position, whole key blocks.
    (FlashAttention2, {"len_q": 1, "len_kv": 200, "num_heads": 4}, 10_000, (1, 64, 4)),
    # MLA prefill: wider keys than values.
    (FlashAttention2, {"len_q": 130, "len_kv": 130, "head_dim": 192, "head_dim_v": 128},
     SM_BYTES, (130, 64, 1)),
    (FlashAttention2Backward, {"len_q": 200, "len_kv": 333}, 10**5, (64, 128, 1)),
    (FlashAttention2Backward, {"len_q": 200, "len_kv": 333}, 10**6, (64, 333, 1)),
    (FlashAttention2Backward, {"len_q": 70, "len_kv": 90}, 3000, (4, 4, 1)),
    (FlashAttention2Backward, {"len_q": 20, "len_kv": 90, "num_heads": 8}, 40_000, (8, 32, 8)),
    # More heads share K and V than a tile takes.
    (FlashAttention2Backward, {"len_q": 5, "len_kv": 9, "num_heads": 80}, 40_000, (1, 9, 64)),
    (FlashAttention2Backward, {"len_q": 130, "len_kv": 130, "head_dim": 192, "head_dim_v": 128},
     SM_BYTES, (32, 32, 1)),
]  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("op", "shape", "fast_bytes", "tile"), CASES)
def test_each_kind_of_tile_is_reached_and_proved(
    op: type[AttentionOp],
    shape: dict[str, int],
    fast_bytes: int,
    tile: tuple[int, int, int],
    causal: bool,
) -> None:
    defaults = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 16}
    one = op(**{**defaults, **shape}, causal=causal)
    assert tuple(one.tiling(fast_bytes).values()) == tile
    assert_proved(one, fast_bytes)


def directional_derivative(op: AttentionOp, inputs: dict[str, np.ndarray], name: str) -> float:
    """d <O, dO> along a random direction of one input, by central differences."""
    direction = np.random.default_rng(9).standard_normal(inputs[name].shape)

    def loss(step: float) -> float:
        moved = {**inputs, name: inputs[name] + step * direction}
        return float((op.reference(moved)["o"] * inputs["do"]).sum())

    return (loss(1e-6) - loss(-1e-6)) / 2e-6


@pytest.mark.parametrize("causal", [False, True])
def test_backward_reference_is_the_gradient_of_the_forward_one(causal: bool) -> None:
    backward = FlashAttention2Backward(
        batch=2, num_heads=6, num_kv_heads=2, len_q=7, len_kv=9, head_dim=5, head_dim_v=3,
        causal=causal,
    )  # fmt: skip
    forward = FlashAttention2(**vars(backward))
    inputs = dict(backward.inputs(np.random.default_rng(4)))
    gradients = backward.reference(inputs)
    for name in ("q", "k", "v"):
        direction = np.random.default_rng(9).standard_normal(inputs[name].shape)
        analytic = float((gradients[f"d{name}"] * direction).sum())
        assert analytic == pytest.approx(directional_derivative(forward, inputs, name), rel=1e-6)


def test_a_single_key_has_no_score_gradient() -> None:
    """One key takes all the weight whatever its score: dQ and dK vanish, dV sums the heads' dO."""
    op = FlashAttention2Backward(num_heads=3, num_kv_heads=1, len_q=1, head_dim=4, causal=True)
    inputs, machine = op.inputs(np.random.default_rng(8)), Machine(4096)
    outputs = op.program(machine, inputs)
    np.testing.assert_allclose(outputs["dq"], 0, atol=1e-12)
    np.testing.assert_allclose(outputs["dk"], 0, atol=1e-12)
    np.testing.assert_allclose(outputs["dv"], inputs["do"].sum(axis=1, keepdims=True))
    assert machine.counted() == op.work(4096)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("op", BOTH)
@pytest.mark.parametrize("fast_bytes", [12_000, 40_000, SM_BYTES, 50 * 2**20])
def test_arrays_agree_with_scalars(op: type[AttentionOp], fast_bytes: int, causal: bool) -> None:
    rng = np.random.default_rng(5)
    kv_heads = rng.integers(1, 5, 200)
    heads = kv_heads * rng.integers(1, 9, 200)
    len_q = (2 ** rng.uniform(0, 13, 200)).astype(int)
    len_kv = len_q + (2 ** rng.uniform(0, 13, 200)).astype(int) - 1
    dims = rng.choice([32, 64, 128], 200)
    fields = {
        "num_heads": heads, "num_kv_heads": kv_heads, "len_q": len_q, "len_kv": len_kv,
        "head_dim": dims,
    }  # fmt: skip
    arrays = op(**fields, causal=causal)
    many, flops, tiles = arrays.work(fast_bytes), arrays.min_flops(), arrays.tiling(fast_bytes)
    for i in range(200):
        one = op(**{name: int(value[i]) for name, value in fields.items()}, causal=causal)
        work = one.work(fast_bytes)
        for counter in COUNTERS:
            assert getattr(work, counter) == np.broadcast_to(getattr(many, counter), 200)[i]
        assert one.min_flops()[BF16] == np.asarray(flops[BF16])[i]
        for key, value in one.tiling(fast_bytes).items():
            assert value == np.broadcast_to(tiles[key], 200)[i]


@pytest.mark.parametrize("op", BOTH)
def test_memories_as_an_array_agree_with_scalars(op: type[AttentionOp]) -> None:
    fast_bytes = np.geomspace(6_000, 10**7, 60).round()
    one = op(num_heads=8, num_kv_heads=2, len_q=700, len_kv=901, head_dim=64, causal=True)
    many = one.work(fast_bytes)
    for i, fast in enumerate(fast_bytes):
        for counter in COUNTERS:
            got = np.broadcast_to(getattr(many, counter), 60)[i]
            assert getattr(one.work(float(fast)), counter) == got


@pytest.mark.parametrize("op", BOTH)
def test_a_larger_fast_memory_never_moves_more(op: type[AttentionOp]) -> None:
    rng = np.random.default_rng(6)
    len_q = (2 ** rng.uniform(0, 10, 2000)).astype(int)
    group = rng.integers(1, 9, 2000)
    for causal in (False, True):
        shape = op(
            num_heads=group,
            num_kv_heads=1,
            len_q=len_q,
            len_kv=len_q + (2 ** rng.uniform(0, 9, 2000)).astype(int) - 1,
            head_dim=24,
            head_dim_v=16,
            causal=causal,
        )
        before = np.full(2000, np.inf)
        for fast_bytes in np.geomspace(4_000, 2_000_000, 60):
            now = np.asarray(shape.work(float(fast_bytes)).bytes)
            assert (now <= before).all()
            before = now


@settings(max_examples=200, deadline=None)
@given(data=st.data(), step_log2=st.integers(0, 6), divisor_log2=st.integers(0, 6))
def test_ceil_sum_is_the_sum(data: st.DataObject, step_log2: int, divisor_log2: int) -> None:
    step, divisor = 2**step_log2, 2**divisor_log2
    start, count = data.draw(st.integers(1, 300)), data.draw(st.integers(0, 40))
    step *= data.draw(st.integers(1, 5)) if step >= divisor else 1
    expected = sum(-(-(start + i * step) // divisor) for i in range(count))
    assert ceil_sum(start, step, count, divisor) == expected


def test_known_numbers_of_a_causal_layer() -> None:
    """32 heads, 8192 positions, d = 128 on one SM: 43 blocks of 192 rows, 64 keys at a time."""
    op = FlashAttention2(num_heads=32, len_q=8192, len_kv=8192, head_dim=128, causal=True)
    assert op.min_flops()[BF16] == 549_822_922_752 == 32 * (8192 * 8193 // 2) * 4 * 128
    work = op.work(SM_BYTES)
    ends = [min(192 * i, 8192) for i in range(1, 44)]
    area = sum(192 * end for end in ends[:-1]) + (8192 - 42 * 192) * 8192
    assert work.tensor_flops[BF16] == 32 * area * 4 * 128
    assert work.read_bytes == 32 * 256 * (8192 + 2 * sum(ends))
    assert work.write_bytes == 32 * 8192 * (256 + 4)
    wasted_frac = work.tensor_flops[BF16] / op.min_flops()[BF16] - 1
    assert wasted_frac == pytest.approx(192 / 8192, rel=0.02)


def test_causal_skips_and_full_does_not() -> None:
    full = FlashAttention2(num_heads=8, len_q=16384, head_dim=128)
    causal = full.over(causal=True)
    ratio = causal.work(SM_BYTES).flops / full.work(SM_BYTES).flops
    assert 0.5 < ratio < 0.52
    backward = FlashAttention2Backward(num_heads=8, len_q=16384, head_dim=128)
    ratio = backward.over(causal=True).work(SM_BYTES).flops / backward.work(SM_BYTES).flops
    assert 0.5 < ratio < 0.52


def test_flash_moves_less_than_standard_and_computes_the_same() -> None:
    flash = FlashAttention2(num_heads=16, num_kv_heads=4, len_q=4096, head_dim=128)
    standard = StandardAttention(**vars(flash))
    assert flash.work(SM_BYTES).tensor_flops == standard.work(SM_BYTES).tensor_flops
    # S and P alone, each written and read once, outweigh all that the fused kernel moves.
    scores_bytes = 4 * 16 * 4096**2 * 2
    assert standard.work(SM_BYTES).bytes > scores_bytes > 1.9 * flash.work(SM_BYTES).bytes
    l2_bytes = 50 * 2**20
    assert flash.work(l2_bytes).bytes == flash.compulsory_bytes()
    assert standard.work(l2_bytes).bytes > scores_bytes


def test_decoding_reads_the_cache_once_per_group() -> None:
    op = FlashAttention2(num_heads=32, num_kv_heads=8, len_q=1, len_kv=100_000, head_dim=128)
    cache_bytes = 8 * 100_000 * 2 * 128 * 2
    assert op.work(SM_BYTES).read_bytes == cache_bytes + 32 * 128 * 2
    assert op.over(causal=True).work(SM_BYTES).read_bytes == op.work(SM_BYTES).read_bytes


@pytest.mark.parametrize("op", BOTH)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads = 3 must divide num_heads = 4"),
        ({"len_kv": 15, "causal": True}, "leaves queries without a key"),
        ({"len_kv": 0}, "len_kv = 0 must be"),
        ({"head_dim": -1}, "head_dim = -1 must be"),
        ({"len_keys": 4}, "has no field 'len_keys'"),
    ],
)
def test_impossible_shapes_are_refused(
    op: type[AttentionOp], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        op(num_heads=4, len_q=16, head_dim=8).over(**changes)


@pytest.mark.parametrize("op", BOTH)
def test_too_small_a_fast_memory_is_refused(op: type[AttentionOp]) -> None:
    with pytest.raises(InputError, match="cannot hold one"):
        op(num_heads=1, len_q=4, head_dim=8).work(64)


@pytest.mark.parametrize("op", BOTH)
def test_whole_number_arrays_sweep_eleven_lengths_in_one_call(op: type[AttentionOp]) -> None:
    one = op(batch=1, num_heads=32, len_q=8192, head_dim=128, dtype=BF16, causal=True)
    lengths = 2 ** np.arange(10, 21)
    assert lengths.dtype.kind == "i"
    swept = one.over(len_q=lengths)
    np.testing.assert_array_equal(swept.len_keys, lengths)
    many = swept.work(SM_BYTES)
    for i, length in enumerate(lengths.tolist()):
        alone = one.over(len_q=length).work(SM_BYTES)
        for counter in ("vector_flops", "special_ops", "read_bytes", "write_bytes", "flops"):
            counts = np.asarray(getattr(many, counter))
            assert counts.shape == (11,)
            assert counts[i] == getattr(alone, counter)
        assert np.asarray(swept.min_flops()[BF16])[i] == one.over(len_q=length).min_flops()[BF16]


@pytest.mark.parametrize("op", BOTH)
def test_a_sweep_past_the_given_keys_is_refused(op: type[AttentionOp]) -> None:
    one = op(num_heads=32, len_q=8192, len_kv=8192, head_dim=128, causal=True)
    with pytest.raises(InputError, match="causal with len_q above len_kv leaves queries without"):
        one.over(len_q=2 ** np.arange(10, 21))


@pytest.mark.parametrize("field", ["num_kv_heads", "len_kv", "head_dim_v"])
def test_sizes_that_may_be_left_out_are_checked_like_all_others(field: str) -> None:
    one = FlashAttention2(num_heads=4, len_q=16, head_dim=8, causal=True)
    assert getattr(one.over(**{field: None}), field) is None
    sizes = np.array([2, 4]) if field == "num_kv_heads" else np.array([16, 32])
    assert getattr(one.over(**{field: sizes}), field).dtype == np.float64
    for bad in (0, -1, 2.5, float("nan"), [4, 0], "two"):
        with pytest.raises(InputError, match=f"flash_attention_2: {field} = "):
            one.over(**{field: bad})
