"""A collective explained: level, algorithm, protocol, and that nothing faster was left out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import catalog
from hwmodels.errors import InputError
from simulator.collective_answer import answer
from simulator.network import calibrated_seconds
from workloads.ops.collective import KINDS, Collective

SYSTEMS = ("hgx-h100", "dgx-a100-80gb", "hgx-b200", "dgx-1-v100", "dgx-h100")


@given(
    st.sampled_from(SYSTEMS),
    st.sampled_from(KINDS),
    st.sampled_from([2, 4, 8, 16, 32, 64]),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(10, 33),
)
@settings(max_examples=120, deadline=None)
def test_the_answer_is_the_fastest_way_and_what_steps_use(
    system: str, kind: str, n: int, stride: int, log_bytes: int
) -> None:
    if n * stride > 64:
        return
    on = catalog.cluster(system, nodes=8)
    made = Collective(kind, 2**log_bytes, n)
    found = answer(made, on=on, stride=stride)
    assert found.prediction is not None
    assert found.seconds_by_way[found.way] == min(found.seconds_by_way.values())
    assert found.seconds == pytest.approx(calibrated_seconds(made, on=on, stride=stride), rel=1e-9)
    # the device's own memory must keep up: the prediction is never below its fastest way
    assert found.prediction.seconds >= found.seconds_by_way[found.way] * (1 - 1e-9)
    assert found.level == on.level_spanning(n * stride).name


def test_levels_nodes_and_ways_by_hand() -> None:
    on = catalog.cluster("hgx-h100", nodes=8)
    inside = answer(Collective("all_reduce", 2**28, 8), on=on)
    assert (inside.level, inside.num_nodes, inside.way) == ("nvlink", 1, ("nvls", "Simple"))
    four = answer(Collective("all_reduce", 2**28, 4), on=on)
    assert four.way == ("ring", "Simple")  # the switch adds from five ranks on
    across = answer(Collective("all_reduce", 2**12, 64), on=on)
    assert (across.level, across.num_nodes, across.way) == ("infiniband_ndr", 8, ("tree", "LL"))
    strided = answer(Collective("all_gather", 2**28, 8), on=on, stride=8)
    assert (strided.num_nodes, strided.way) == (8, ("ring", "Simple"))
    assert 0.5 * 50e9 < strided.bus_bytes_per_s < 50e9


def test_devices_without_a_kernel_model_are_at_the_bound_and_say_so() -> None:
    found = answer(Collective("all_reduce", 2**30, 16), on=catalog.cluster("tpu-v4-pod", nodes=4))
    assert found.prediction is None and "bound" in found.reason and not found.seconds_by_way
    assert found.seconds == found.bound.lower_s


def test_groups_that_do_not_tile_are_refused() -> None:
    with pytest.raises(InputError, match="do not tile the 64"):
        answer(Collective("all_reduce", 1, 24), on=catalog.cluster("hgx-h100", nodes=8))
