"""Counts of routed experts against hand counts and draws of the routing rules themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hwmodels.dtypes import BF16, FP8, MXFP4
from hwmodels.errors import InputError
from workloads.ops.moe_ffn import COMPUTED, GROUPED, PASSED, MoeFfn


def moe(**changes: object) -> MoeFfn:
    values: dict[str, Any] = {
        "num_tokens": 1024, "hidden": 2048, "inter": 768, "topk": 8, "num_experts": 128,
    }  # fmt: skip
    return MoeFfn(**(values | changes))


def even_choices(tokens: int, experts: int, topk: int) -> np.ndarray[Any, Any]:
    """Choices spread over all experts: token by token, one in each of topk equal stretches."""
    stretch = experts // topk
    step = (
        np.arange(tokens) % stretch if tokens >= stretch else np.arange(tokens) * stretch // tokens
    )
    return step[:, None] + stretch * np.arange(topk)[None, :]


@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 1024])
@pytest.mark.parametrize("ep", [1, 2, 8, 32, 128])
def test_balanced_routing_against_choices_drawn_one_by_one(tokens: int, ep: int) -> None:
    local = even_choices(tokens, 128, 8) < 128 // ep
    op = moe(num_tokens=tokens, ep=ep)
    chosen = even_choices(tokens, 128, 8)[local]
    # The first rank holds the rounding, at most one row and token more than the mean.
    assert op.routed_rows() == pytest.approx(local.sum(), abs=1)
    assert op.local_tokens() == pytest.approx(local.any(axis=1).sum(), abs=1)
    assert op.experts_hit() == len(set(chosen.tolist()))


def power_law_draws(
    tokens: int, experts: int, topk: int, ep: int, power: float, draws: int
) -> tuple[float, float]:
    """Mean rows and experts hit of the loaded rank, loads drawn and scaled by the rule."""
    rng = np.random.default_rng(20261121)
    top = max(0.8 * tokens, 30.0)
    share = rng.random((draws, experts))
    loads = ((top ** (1 - power) - 1) * share + 1) ** (1 / (1 - power))
    loads = np.minimum(loads / loads.sum(axis=1, keepdims=True) * tokens * topk, tokens)
    ranks = loads.reshape(draws, ep, experts // ep)
    loaded = ranks[np.arange(draws), ranks.sum(axis=2).argmax(axis=1)]
    return float(loaded.sum(axis=1).mean()), float(np.minimum(loaded, 1).sum(axis=1).mean())


@pytest.mark.parametrize("power", [1.01, 1.2])
@pytest.mark.parametrize("ep", [1, 4, 16, 64])
@pytest.mark.parametrize("tokens", [64, 1024, 8192])
def test_power_law_routing_against_random_draws(power: float, ep: int, tokens: int) -> None:
    op = moe(num_tokens=tokens, num_experts=256, ep=ep, routing=f"power_law_{power}")
    rows, hit = power_law_draws(tokens, 256, 8, ep, power, 400)
    assert op.routed_rows() == pytest.approx(rows, rel=0.15)
    assert op.experts_hit() == pytest.approx(hit, rel=0.1)
    assert op.imbalance() >= 1
    assert op.local_tokens() <= min(op.routed_rows(), tokens)


def test_one_rank_of_everything_by_hand() -> None:
    op = moe()
    assert op.work(0).tensor_flops[BF16] == 6 * 1024 * 8 * 2048 * 768
    assert op.compulsory_bytes() == 2 * (128 * 3 * 2048 * 768 + 2 * 1024 * 2048)
    assert moe(gated=False).work(0).tensor_flops[BF16] == 4 * 1024 * 8 * 2048 * 768
    assert op.work(0).bytes == op.compulsory_bytes()
    assert op.work(0).special_ops == 2 * 8 * 1024 * 768


def test_ranks_share_rows_and_width() -> None:
    whole, part = moe(), moe(tp=2, ep=4)
    assert part.routed_rows() == whole.routed_rows() / 4
    assert part.work(0).tensor_flops[BF16] == whole.work(0).tensor_flops[BF16] / 8
    assert part.weight_bytes() == whole.weight_bytes() / 8


def test_weights_count_in_their_own_format() -> None:
    op = moe(dtype=FP8, weight_dtype=MXFP4)
    assert op.weight_bytes() == 128 * 3 * 2048 * 768 * MXFP4.bytes_per_element
    assert set(op.work(0).tensor_flops) == {FP8}


def test_remote_choices_by_what_becomes_of_them() -> None:
    skipped, passed, computed = (moe(ep=16, remote=r) for r in ("skipped", PASSED, COMPUTED))
    # 8 of 128 experts: half of the tokens choose one of them, each once.
    assert (skipped.computed_rows(), skipped.passed_rows()) == (512, 512)
    assert (passed.computed_rows(), passed.passed_rows()) == (512, 8192)
    assert computed.local_tokens() == 512
    assert (computed.computed_rows(), computed.passed_rows()) == (4096, 4096)
    loads = computed.loads()
    assert (loads.experts * loads.rows).sum() == pytest.approx(4096)
    assert computed.experts_hit() == skipped.experts_hit() == 8


def test_a_grouped_router_crowds_the_first_experts() -> None:
    op = moe(num_experts=256, num_tokens=1536, ep=64, routing=GROUPED)
    assert op.routed_rows() == 4 * 1536  # four experts here, each chosen by every token
    whole = moe(num_experts=256, num_tokens=1536, routing=GROUPED)
    assert whole.experts_hit() == 128
    assert whole.routed_rows() == pytest.approx(8 * 1536, rel=0.02)


def test_packed_choices_make_at_least_one_whole_token() -> None:
    op = moe(num_tokens=1, ep=16, routing="power_law_1.2", packed=True)
    assert (op.routed_rows(), op.local_tokens()) == (8, 1)


@pytest.mark.parametrize("routing", ["balanced", "power_law_1.2", GROUPED])
@pytest.mark.parametrize("field", ["num_tokens", "topk", "hidden", "inter"])
def test_counts_do_not_fall_with_any_size(routing: str, field: str) -> None:
    sizes = np.arange(1.0, 65.0) if field == "topk" else np.arange(1.0, 400.0)
    op = moe(ep=4, routing=routing, remote=COMPUTED).over(**{field: sizes})
    for count in (op.computed_rows(), op.experts_hit(), op.compulsory_bytes()):
        assert np.all(np.diff(np.broadcast_to(count, sizes.shape)) >= -1e-9)


@pytest.mark.parametrize("routing", ["balanced", "power_law_1.01", GROUPED])
def test_arrays_agree_with_scalars(routing: str) -> None:
    tokens, ep = np.array([1.0, 33.0, 4096.0]), np.array([1.0, 8.0, 64.0])
    many = moe(num_tokens=tokens, ep=ep, routing=routing, remote=COMPUTED)
    for i in range(3):
        one = moe(num_tokens=tokens[i], ep=ep[i], routing=routing, remote=COMPUTED)
        assert np.asarray(many.computed_rows())[i] == pytest.approx(one.computed_rows())
        assert np.asarray(many.experts_hit())[i] == pytest.approx(one.experts_hit())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk": 200}, "topk exceeds num_experts"),
        ({"ep": 256}, "ep exceeds num_experts"),
        ({"ep": 0}, "ep = 0 must be a whole number"),
        ({"tp": 1.5}, "tp = 1.5 must be a whole number"),
        ({"routing": "uniform"}, "routing 'uniform' is neither"),
        ({"routing": "power_law_3"}, "the power of 'power_law_3'"),
        ({"scaling": "row"}, "scaling 'row' is not"),
        ({"remote": "kept"}, "remote 'kept' is not"),
    ],
)
def test_what_it_refuses(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        moe(**changes)
