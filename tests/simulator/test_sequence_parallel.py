"""Attention and training steps over a sequence's ranks: bounds, overlap, networks, what is kept."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import catalog
from hwmodels.cluster import Cluster
from hwmodels.dtypes import FP16
from hwmodels.errors import InputError
from simulator.linear_sequence import (
    gathered_keys_seconds,
    hybrid_layers_seconds,
    passed_keys_seconds,
    passed_states_seconds,
)
from simulator.recipe import recipe
from simulator.sequence_parallel import (
    NET_STEP_S,
    PORT_FRAC,
    Kernels,
    Network,
    attention_seconds,
    hybrid_seconds,
    step_seconds,
)
from simulator.sequence_step import (
    ADAM,
    ATTENTION,
    EXCHANGE,
    MAPS,
    SpreadStep,
    sequence_parallel_step,
    tensor_parallel_step,
)
from simulator.stack import STACKS, Factors, OnDevice
from workloads.models.config import load_hf_config
from workloads.models.transformer import TrainStep, train_step
from workloads.ops.flash_attention import FlashAttention2
from workloads.sequence_parallel import STRATEGIES, Message, strategy
from workloads.workload import BACKWARD, FORWARD

NODE = catalog.cluster("dgx-a100-80gb")
EXACT = ("ring_attention", "zigzag_ring", "striped_attention", "lightseq", "token_ring", "ulysses")


def whole(length: int = 2**16, **changes: Any) -> FlashAttention2:
    values: dict[str, Any] = {"num_heads": 32, "head_dim": 128, "causal": True, "dtype": FP16}
    return FlashAttention2(len_q=length, **(values | changes))


def nodes(count: int, port_bytes_per_s: float = 12.5e9) -> Cluster:
    inner, *outer = NODE.levels
    slower = tuple(dataclasses.replace(level, bytes_per_s=port_bytes_per_s) for level in outer)
    return dataclasses.replace(NODE, num_nodes=count, levels=(inner, *slower))


@pytest.mark.parametrize("phase", [FORWARD, BACKWARD])
@pytest.mark.parametrize("name", list(STRATEGIES))
def test_a_pass_is_its_longest_chunks_and_what_they_do_not_hide(name: str, phase: str) -> None:
    found = attention_seconds(strategy(name), whole(2**14), num_ranks=8, on=NODE, phase=phase)
    assert 0 < found.compute_s <= found.seconds <= found.compute_s + found.sends_s * (1 + 1e-9)


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(EXACT), doubled=st.integers(0, 3))
def test_longer_sequences_take_longer_and_more_ranks_less(name: str, doubled: int) -> None:
    shape = whole(2 ** (15 + doubled))
    times = {
        n: attention_seconds(strategy(name), shape, num_ranks=n, on=NODE).seconds for n in (4, 8)
    }
    longer = attention_seconds(strategy(name), whole(2 ** (16 + doubled)), num_ranks=8, on=NODE)
    assert times[8] < times[4]
    assert longer.seconds > 2 * times[8]


def test_balance_shows_in_seconds() -> None:
    shape = whole(2**18)
    t = {n: attention_seconds(strategy(n), shape, num_ranks=8, on=NODE).seconds for n in EXACT}
    assert t["ring_attention"] / t["zigzag_ring"] == pytest.approx(7.5 / 4, rel=0.05)
    assert t["lightseq"] / t["zigzag_ring"] == pytest.approx(4.5 / 4, rel=0.05)


def test_a_message_across_nodes_goes_through_one_port() -> None:
    """128 MiB at 0.96 of 12.5 GB/s; the same inside a node is faster; opposite ways overlap."""
    net = Network(on=nodes(2), num_ranks=16)
    size = 2.0**27
    across = net.step_seconds([Message(7, 8, size, "next", "keys")])
    assert across == pytest.approx(NET_STEP_S + size / (PORT_FRAC * 12.5e9), rel=1e-12)
    inside = net.step_seconds([Message(6, 7, size, "next", "keys")])
    assert inside < across / 5
    both = [Message(7, 8, size, "next", "keys"), Message(8, 7, size, "back", "output")]
    assert net.step_seconds(both) == across
    twice = [Message(7, 8, size, "next", "keys"), Message(7, 9, size, "next", "keys")]
    assert net.step_seconds(twice) == pytest.approx(2 * across - NET_STEP_S, rel=1e-9)


def test_a_slow_network_shows_where_chunks_are_short() -> None:
    """16 ranks on two nodes, 8k tokens each: keys of all heads cannot hide; of 8 heads only what
    helpers are sent and send back, queries and outputs, is felt."""
    how, shape = strategy("lightseq"), whole(2**17)
    many = attention_seconds(how, shape, num_ranks=16, on=nodes(2))
    few = attention_seconds(how, shape.over(num_kv_heads=8), num_ranks=16, on=nodes(2))
    assert many.exposed_s > 0.3 * many.compute_s
    assert 0 < few.exposed_s < 0.6 * many.exposed_s
    fast = attention_seconds(how, shape, num_ranks=16, on=nodes(2, 50e9))
    assert fast.exposed_s < 0.1 * fast.compute_s


def test_a_step_is_the_longer_of_chunk_and_port() -> None:
    """A10 cards: 6000 x 3000 keys take longer than Q alone, less than K and V; Q and O go to two
    neighbours at once through the 24 GB/s of a port."""
    cards, shape = catalog.cluster("a10-pcie-4"), whole(24000)
    ring, query, both = (
        step_seconds(strategy(name), shape, num_ranks=4, on=cards, step=step)
        for name, step in (("zigzag_ring", 1), ("token_ring", 1), ("token_ring", 2))
    )
    assert query < ring and query < both
    sent = 6000 * 32 * (2 * 128 * 2 + 4)  # the query, the output and its statistic
    assert both == pytest.approx(sent / (12 / 15.754 * 31.5e9), rel=0.01)
    net = Network(on=cards, num_ranks=4)
    one = net.step_seconds([Message(1, 2, 5e7, "next", "query")])
    two = net.step_seconds([Message(1, 2, 5e7, "next", "query"),
                            Message(1, 0, 5e7, "back", "output")])  # fmt: skip
    assert one < two <= 1.01 * net.step_seconds([Message(1, 2, 1e8, "next", "keys")])


def test_a_hybrid_lies_between_its_parts() -> None:
    shape = whole(2**17)
    how = strategy("zigzag_ring")
    ring = attention_seconds(how, shape, num_ranks=8, on=NODE)
    assert hybrid_seconds(how, shape, num_ranks=8, inner=1, on=NODE).seconds == ring.seconds
    heads = attention_seconds(strategy("ulysses"), shape, num_ranks=8, on=NODE)
    alone = hybrid_seconds(how, shape, num_ranks=8, inner=8, on=NODE)
    assert alone.seconds == pytest.approx(heads.seconds, rel=1e-9)
    mixed = hybrid_seconds(how, shape, num_ranks=16, inner=8, on=nodes(2))
    flat = attention_seconds(how, shape, num_ranks=16, on=nodes(2))
    assert mixed.seconds < flat.seconds
    with pytest.raises(InputError, match="common divisor"):
        hybrid_seconds(how, shape.over(num_kv_heads=4), num_ranks=8, inner=8, on=NODE)


def test_states_cost_the_same_to_send_whatever_the_length() -> None:
    ranks: dict[str, Any] = {"num_ranks": 16, "on": nodes(2)}
    short, long = (attention_seconds(strategy("lasp2"), whole(n), **ranks) for n in (2**16, 2**18))
    assert short.sends_s == long.sends_s
    chain = passed_states_seconds(whole(2**18), **ranks)
    keys = passed_keys_seconds(whole(2**18), **ranks)
    assert long.seconds < chain.seconds < keys.seconds
    # Fifteen hops, one of them between the nodes; K^T V is ready before its state comes.
    inner, outer = (
        Network(on=nodes(2), num_ranks=16).step_seconds([Message(r, r + 1, 2**20, "next", "s")])
        for r in (0, 7)
    )
    assert chain.sends_s == pytest.approx(14 * inner + outer, rel=1e-9) and inner < outer
    assert chain.exposed_s < chain.sends_s + 15 * chain.compute_s


def test_hybrid_layers_are_a_mean_of_both() -> None:
    shape = whole(2**16)
    linear = attention_seconds(strategy("lasp2"), shape, num_ranks=8, on=NODE).seconds
    softmax = gathered_keys_seconds(shape, num_ranks=8, on=NODE).seconds
    quarter = hybrid_layers_seconds(shape, num_ranks=8, on=NODE, softmax_frac=0.25)
    assert quarter == pytest.approx(0.75 * linear + 0.25 * softmax, rel=1e-12)
    ring = attention_seconds(strategy("zigzag_ring"), shape, num_ranks=8, on=NODE)
    assert softmax == pytest.approx(ring.seconds, rel=0.25)


# ---- steps ---------------------------------------------------------------------------------


def run_on(cluster: Cluster, ranks: int, **changes: Any) -> SpreadStep:
    stack = OnDevice(stack=STACKS["torchtitan"], factors=Factors())
    values: dict[str, Any] = {"recipe": recipe("fp16"), "stack": stack, "kernels": Kernels()}
    return SpreadStep(num_ranks=ranks, on=cluster, **(values | changes))


def llama(length: int = 2**16) -> TrainStep:
    cfg = load_hf_config("examples/llama3-8b.json")
    return train_step(cfg, len_seq=length, global_batch=1)


def test_keeping_attentions_output_saves_one_forward_pass_of_it() -> None:
    kept = strategy("lightseq")
    plain = dataclasses.replace(kept, keeps_output=False)
    run = run_on(NODE, 8)
    with_it, without = (sequence_parallel_step(llama(), how, run) for how in (kept, plain))
    shape = whole(num_kv_heads=8)
    forward = attention_seconds(kept, shape, num_ranks=8, on=NODE).seconds
    assert without[ATTENTION] - with_it[ATTENTION] == pytest.approx(32 * forward, rel=1e-9)
    assert without[MAPS] == with_it[MAPS]
    none = sequence_parallel_step(llama(), plain, dataclasses.replace(run, recompute=False))
    assert none[ATTENTION] == with_it[ATTENTION] and none[MAPS] < with_it[MAPS]


def test_tensor_parallelism_waits_for_its_exchange() -> None:
    near = tensor_parallel_step(llama(), run_on(NODE, 8))
    far = tensor_parallel_step(llama(), run_on(nodes(2), 16))
    ring = sequence_parallel_step(llama(), strategy("lightseq"), run_on(NODE, 8))
    assert near[EXCHANGE] > 0 and ring[EXCHANGE] == 0
    assert far[EXCHANGE] > near[EXCHANGE] and far[MAPS] < near[MAPS]
    assert far[ADAM] == pytest.approx(near[ADAM] / 2, rel=0.2)


def test_heads_that_ranks_do_not_divide_are_rounded_up() -> None:
    """32 heads over 24 ranks: two each, as over 16."""
    times = {
        n: tensor_parallel_step(llama(2**18), run_on(nodes(3), n))[ATTENTION] for n in (16, 24)
    }
    assert times[24] == pytest.approx(times[16], rel=1e-9)
