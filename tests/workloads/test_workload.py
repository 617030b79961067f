"""A workload is a DAG in execution order, and adds up its nodes."""

from __future__ import annotations

import networkx as nx
import pytest

from hwmodels.dtypes import BF16
from workloads.ops.matmul import Matmul
from workloads.work import Work
from workloads.workload import BACKWARD, FORWARD, Node, Workload, chain

UP = Node(name="up", op=Matmul(m=8, n=32, k=8), part="mlp")
DOWN = Node(name="down", op=Matmul(m=8, n=8, k=32), part="mlp", count=3, after=("up",))
GRAD = Node(name="grad", op=Matmul(m=8, n=8, k=8), part="mlp", phase=BACKWARD, after=("down",))


def test_nodes_add_up_by_their_counts() -> None:
    total = Workload((UP, DOWN, GRAD)).work(2**20)
    assert total.tensor_flops == {BF16: 2 * 8 * 32 * 8 * 4 + 2 * 8**3}
    assert total.launches == 5
    one = UP.op.work(2**20)
    assert total.bytes == one.bytes + 3 * DOWN.op.work(2**20).bytes + GRAD.op.work(2**20).bytes


def test_selection_by_phase_and_part() -> None:
    workload = Workload((UP, DOWN, GRAD))
    assert workload.select(phase=FORWARD) == (UP, DOWN)
    assert workload.select(phase=BACKWARD, part="mlp") == (GRAD,)
    assert workload.select(part="head") == ()
    assert workload["down"] is DOWN and len(workload) == 3


def test_the_graph_is_acyclic_and_keeps_the_ops() -> None:
    graph = Workload((UP, DOWN, GRAD), "block").graph
    assert nx.is_directed_acyclic_graph(graph)
    assert list(nx.topological_sort(graph)) == ["up", "down", "grad"]
    assert graph.nodes["down"]["op"] is DOWN.op and graph.nodes["down"]["count"] == 3


def test_an_order_that_cannot_be_executed_is_refused() -> None:
    with pytest.raises(ValueError, match="down waits for up"):
        Workload((DOWN, UP))
    with pytest.raises(ValueError, match="two nodes are called up"):
        Workload((UP, UP))


def test_a_chain_links_what_says_nothing() -> None:
    linked = chain("steps", [UP, Node(name="next", op=UP.op, part="mlp"), GRAD_AFTER_UP])
    assert linked["next"].after == ("up",)
    assert linked["last"].after == ("up",)


GRAD_AFTER_UP = Node(name="last", op=UP.op, part="mlp", after=("up",))


def test_work_adds_and_scales_every_counter() -> None:
    one = Work(
        tensor_flops={BF16: 1}, vector_flops=2, special_ops=3, read_bytes=4, write_bytes=5,
        launches=6,
    )  # fmt: skip
    both = one + one.times(2)
    assert both == one.times(3)
    assert both.bytes == 27 and both.flops == 9
