"""Collectives as a framework feels them: copies, links kept busy, waiting for the slowest node."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.dtypes import BF16
from simulator.exchange import layer_exchanges
from simulator.felt_exchange import busy_share, felt_seconds, wait_share
from simulator.kernel_time.predict import predict
from simulator.stack import STACKS, Factors, OnDevice
from workloads.models.config import load_hf_config
from workloads.ops.collective import Collective
from workloads.ops.elementwise import Elementwise
from workloads.plan import Plan

LLAMA = load_hf_config("examples/llama3-8b.json")
NODES = catalog.cluster("hgx-h100", nodes=16)


def felt(plan: Plan, name: str, **factors: float) -> list[float]:
    on_device = OnDevice(stack=STACKS[name], factors=Factors(**factors))
    exchanges = layer_exchanges(LLAMA, "dense", len_seq=4096, plan=plan, element_bytes=2)
    found = felt_seconds(exchanges, plan=plan, dtype=BF16, on=NODES, stack=on_device)
    return [float(forward) for forward, _, _ in found]


def test_a_batch_of_sequences_is_copied_into_order() -> None:
    plan = Plan(tp=8, micro_batch=2)
    plain, copied = felt(plan, "megatron"), felt(plan, "torchtitan-compiled", pointwise=1.5)
    op = Elementwise(num_elements=2 * 4096 * 4096, vector_flops_per_element=0, dtype=BF16)
    once = float(predict(op, on=NODES.device).seconds)
    assert copied == pytest.approx([t + 1.5 * once for t in plain])


def test_one_sequence_needs_no_copy_and_one_rank_no_collective() -> None:
    alone = Plan(tp=8, micro_batch=1)
    assert felt(alone, "torchtitan-compiled") == felt(alone, "megatron")
    assert felt(Plan(micro_batch=4), "torchtitan-compiled") == [0.0] * 4


def test_the_factor_is_of_the_collective_not_of_the_copy() -> None:
    plan = Plan(tp=8, micro_batch=2)
    one, two = (felt(plan, "torchtitan-compiled", tensor=f)[0] for f in (1.0, 2.0))
    assert two - one == pytest.approx(felt(plan, "megatron")[0])


def test_links_are_busy_as_long_as_the_innermost_would_take() -> None:
    """7/8 of 8 GB over 450 GB/s are 15.6 ms; a port of a ninth of that leaves a ninth."""
    sent = Collective(kind="all_gather", num_bytes=8e9, num_ranks=8).wire_bytes()
    inside_s = 7e9 / NODES.levels[0].bytes_per_s
    assert busy_share(sent, 9 * inside_s, NODES) == pytest.approx(1 / 9)
    assert busy_share(sent, inside_s / 2, NODES) == 1
    assert busy_share(0.0, 0.0, NODES) == 0


def test_more_nodes_wait_longer() -> None:
    on_device = OnDevice(stack=STACKS["megatron"], factors=Factors(jitter=0.01))
    found = np.asarray(wait_share(Plan(dp=np.array([1.0, 8.0, 16.0, 128.0])), NODES, on_device))
    assert found[:2].tolist() == [0, 0]
    assert found[2:] == pytest.approx([0.01 * math.sqrt(2 * math.log(n)) for n in (2, 16)])
