"""A Mamba-2 layer: its proof, decoding against a prompt, sizes of the published hybrid."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels import catalog
from hwmodels.dtypes import BF16, FP32
from hwmodels.errors import InputError
from simulator.estimate import estimate
from tests.workloads.proof import assert_proved, proves
from workloads import registry
from workloads.ops.mamba2_layer import Mamba2Layer


@proves("mamba2_layer")
@given(data=st.data(), update=st.booleans(), fast_bytes=st.integers(1500, 20000))
def test_a_layer_counts_what_the_closed_form_says(
    data: st.DataObject, update: bool, fast_bytes: int
) -> None:
    groups = data.draw(st.integers(1, 2))
    op = Mamba2Layer(
        batch=data.draw(st.integers(1, 2)), num_groups=groups,
        num_heads=groups * data.draw(st.integers(1, 3)), head_dim=data.draw(st.integers(1, 4)),
        state_dim=data.draw(st.integers(1, 4)), width=data.draw(st.integers(2, 4)),
        dim=data.draw(st.none() | st.integers(1, 6)), chunk=data.draw(st.integers(1, 6)),
        len_seq=1 if update else data.draw(st.integers(1, 12)), update=update,
        dtype=data.draw(st.sampled_from([BF16, FP32])),
    )  # fmt: skip
    try:
        op.work(fast_bytes)
    except InputError:
        assume(False)
    assert_proved(op, fast_bytes)


SHAPE: dict[str, Any] = {
    "batch": 2, "num_heads": 4, "num_groups": 2, "head_dim": 3, "state_dim": 5, "dim": 7,
}  # fmt: skip


def test_decoding_from_nothing_gives_what_the_prompt_gives() -> None:
    prompt = Mamba2Layer(**SHAPE, len_seq=6)
    inputs = dict(prompt.inputs(np.random.default_rng(1)))
    expected = prompt.reference(inputs)
    step = Mamba2Layer(**SHAPE, len_seq=1, update=True)
    drawn = step.inputs(np.random.default_rng(2))
    held = {name: np.zeros_like(drawn[name]) for name in ("before", "state")}
    for t in range(6):
        found = step.reference(inputs | held | {"u": inputs["u"][:, t : t + 1]})
        np.testing.assert_allclose(found["y"][:, 0], expected["y"][:, t], atol=1e-12)
        held = {name: found[name] for name in ("before", "state")}
    np.testing.assert_allclose(held["state"], expected["state"], atol=1e-12)


def test_the_hybrids_layer_by_hand() -> None:
    op = registry.build("mamba_empirical", {"len_seq": 1, "batch": 32, "update": True})
    assert isinstance(op, Mamba2Layer)
    assert (op.model_dim, op.inner, op.conv_channels) == (4096, 8192, 8192 + 2 * 8 * 128)
    assert op.state_bytes() == 32 * (128 * 128 * 64 * 4 + 10240 * 3 * 2)
    products = 2 * 32 * 4096 * (18560 + 8192)
    assert op.work(2**20).tensor_flops[BF16] == products
    assert op.weights() == pytest.approx(109.6e6, rel=1e-3)


def test_states_do_not_grow_and_time_does() -> None:
    on = catalog.device("h100-sxm")
    short, long = (Mamba2Layer(num_heads=32, len_seq=n) for n in (2048, 65536))
    assert short.state_bytes() == long.state_bytes()
    times = [float(estimate(op, on=on).seconds) for op in (short, long)]
    assert 10 < times[1] / times[0] < 34


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"update": True}, "an update makes one step; give len_seq = 1"),
        ({"num_groups": 3}, "num_groups = 3 must divide num_heads = 4"),
    ],
)
def test_impossible_layers_are_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        registry.build("mamba2_layer", {"num_heads": 4, "len_seq": 64} | fields)
