"""Experts hit by independent choices, against drawing them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads.ops.moe_ffn import MoeFfn
from workloads.ops.served_experts import ServedExperts


def test_the_share_hit_is_that_of_drawn_choices() -> None:
    rng = np.random.default_rng(1)
    tokens, topk, experts = 24, 4, 64
    hit = [
        len(np.unique([rng.choice(experts, topk, replace=False) for _ in range(tokens)]))
        for _ in range(400)
    ]
    op = ServedExperts(num_tokens=tokens, hidden=8, inter=8, topk=topk, num_experts=experts)
    assert op.experts_hit() == pytest.approx(np.mean(hit), rel=0.01)


@given(
    tokens=st.integers(1, 4096),
    routing=st.sampled_from(["balanced", "power_law_1.01", "power_law_1.2"]),
)
def test_never_more_than_dealt_choices_hit_and_rows_are_the_same(tokens: int, routing: str) -> None:
    sizes = {"num_tokens": tokens, "hidden": 64, "inter": 64, "topk": 8, "num_experts": 256}
    served = ServedExperts(**sizes, routing=routing, ep=4)
    dealt = MoeFfn(**sizes, routing=routing, ep=4)
    assert 0 < served.experts_hit() <= dealt.experts_hit() * (1 + 1e-9)
    assert served.computed_rows() == dealt.computed_rows()


def test_arrays_agree_with_single_shapes() -> None:
    sizes = {"hidden": 64, "inter": 64, "topk": 8, "num_experts": 256}
    many = ServedExperts(num_tokens=np.array([1, 8, 64]), **sizes).weight_bytes()
    each = [ServedExperts(num_tokens=t, **sizes).weight_bytes() for t in (1, 8, 64)]
    np.testing.assert_allclose(many, each)
