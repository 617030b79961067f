"""pLSTM: composition, chunks and graph proved against a pass in topological order."""

from __future__ import annotations

from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.line_graph import grid_graph, traversal
from workloads.machine import Machine
from workloads.op import ProvedOp
from workloads.ops.block_edges import BlockEdges
from workloads.ops.plstm import Plstm

formats = st.sampled_from([BF16, FP32])


def prove(op: ProvedOp, fast_bytes: int) -> None:
    try:
        op.work(fast_bytes)
    except InputError:
        assume(False)
    assert_proved(op, fast_bytes)


@proves("block_edges")
@given(data=st.data(), dtype=formats, fast_bytes=st.integers(100, 2000))
def test_states_between_blocks_count_what_the_closed_form_says(
    data: st.DataObject, dtype: Any, fast_bytes: int
) -> None:
    op = BlockEdges(
        streams=data.draw(st.integers(1, 2)), blocks_x=data.draw(st.integers(1, 4)),
        blocks_y=data.draw(st.integers(1, 3)), edges_left=data.draw(st.integers(1, 4)),
        edges_above=data.draw(st.none() | st.integers(1, 4)), width=data.draw(st.integers(1, 9)),
        dtype=dtype,
    )  # fmt: skip
    prove(op, fast_bytes)


@proves("plstm")
@given(data=st.data(), dtype=formats, fast_bytes=st.floats(10, 14).map(lambda e: int(2**e)))
def test_a_layer_counts_what_the_closed_form_says(
    data: st.DataObject, dtype: Any, fast_bytes: int
) -> None:
    grid = data.draw(st.booleans())
    op = Plstm(
        batch=data.draw(st.integers(1, 2)), num_heads=data.draw(st.integers(1, 2)),
        width=data.draw(st.integers(1, 6 if grid else 12)),
        height=data.draw(st.integers(1, 6)) if grid else None,
        key_dim=data.draw(st.integers(1, 4)), value_dim=data.draw(st.none() | st.integers(1, 4)),
        chunk=data.draw(st.sampled_from([None, 1, 2, 4])), dtype=dtype,
    )  # fmt: skip
    prove(op, fast_bytes)


# ---- other truths --------------------------------------------------------------------------

GRID: dict[str, Any] = {"batch": 2, "width": 5, "height": 3, "key_dim": 3, "value_dim": 2}


def test_a_chain_is_a_gated_sum_over_earlier_nodes() -> None:
    op = Plstm(width=6, key_dim=3)
    inputs = op.inputs(np.random.default_rng(1))
    q, k, v, gates = (inputs[name][0, 0] for name in ("q", "k", "v", "gates"))
    (t, s), (m, d) = gates[:, 0].T, gates[:, 1].T
    expected = np.zeros_like(v)
    for i in range(6):
        for j in range(i + 1):
            path = d[i] if i == j else m[i] * np.prod(t[j + 1 : i]) * s[j]
            expected[i] += path * (q[i] @ k[j]) * v[j]
    np.testing.assert_allclose(op.reference(inputs)["y"][0, 0], expected)


def test_with_open_gates_a_grid_counts_paths() -> None:
    """Every transition one: a node sees another as often as paths lead from it."""
    op = Plstm(width=4, height=4, key_dim=1)
    inputs = {name: np.ones_like(x) for name, x in op.inputs(np.random.default_rng(2)).items()}
    graph = grid_graph(4, 4)
    got = op.program(Machine(2**16), inputs)["y"][0, ..., 0]
    for row in range(4):
        for col in range(4):
            before = nx.ancestors(graph, (row, col))
            paths = [len(list(nx.all_simple_paths(graph, n, (row, col)))) for n in before]
            assert got[row, col] == pytest.approx(1 + sum(paths))


@pytest.mark.parametrize("height", [None, 3])
def test_chunks_are_nodes_one_after_another(height: int | None) -> None:
    whole = Plstm(**{**GRID, "height": height}, chunk=2)
    inputs = whole.inputs(np.random.default_rng(3))
    step = whole.step()
    right = {row: inputs["left"][:, row : row + 1] for row in range(height or 1)}
    down = {col: inputs.get("above", inputs["left"])[:, col : col + 1] for col in range(5)}
    got = whole.program(Machine(2**16), inputs)
    for row in range(height or 1):
        for col in range(5):
            one = {n: inputs[n][:, row : row + 1, col : col + 1] for n in ("q", "k", "v", "gates")}
            one |= {"left": right[row]} | ({} if height is None else {"above": down[col]})
            found = step.program(Machine(2**16), one)
            right[row], down[col] = found["right"], found.get("down", down[col])
            np.testing.assert_allclose(found["y"][:, 0, 0], got["y"][:, row, col])
    np.testing.assert_allclose(got["right"][:, :1], right[0])


@pytest.mark.parametrize("chunk", [None, 1, 2, 8])
@pytest.mark.parametrize("gate", [0.0, 1e-300, 1e-9, 0.5 - 1e-12, 0.5])
def test_transitions_close_to_nothing_and_to_one(chunk: int | None, gate: float) -> None:
    """Half to the right and half down is a chain's 1: states neither grow nor fade."""
    op = Plstm(**{**GRID, "width": 9, "height": 9}, chunk=chunk)
    inputs = dict(op.inputs(np.random.default_rng(4)))
    gates = inputs["gates"].copy()
    gates[..., :2, :2] = gate
    inputs["gates"] = gates
    for name, expected in op.reference(inputs).items():
        got = op.program(Machine(2**16), inputs)[name]
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


# ---- depth and the graph -------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(1, None), (7, None), (1, 1), (4, 3), (8, 8)])
def test_the_graph_agrees_with_the_formulas(width: int, height: int | None) -> None:
    op = Plstm(width=width, height=height, key_dim=1)
    found, rows = op.traversal(), height or 1
    assert found.depth == op.longest_path()
    assert found.num_edges == rows * (width - 1) + width * (rows - 1)
    assert found.num_transitions == sum(i * o for i, o in degrees(width, rows))


def degrees(width: int, height: int) -> list[tuple[int, int]]:
    return [
        ((x > 0) + (y > 0), (x + 1 < width) + (y + 1 < height))
        for y in range(height)
        for x in range(width)
    ]


@pytest.mark.parametrize(("width", "height"), [(1, None), (5, None), (16, None), (3, 6), (8, 8)])
def test_depth_is_the_longest_path_of_the_compositions(width: int, height: int | None) -> None:
    """Every product waits for those that made its operands."""
    op = Plstm(width=width, height=height, key_dim=1)
    graph: nx.DiGraph = nx.DiGraph()
    now: tuple[float, ...] = (0, 0)
    for merge in op.merges():
        graph.add_edge(now, now := (float(merge.after.width), float(merge.after.height)))
    longest = nx.dag_longest_path_length(graph, weight=None) if graph else 0
    assert op.depth() == longest


def test_depth_by_hand() -> None:
    assert [Plstm(width=n, key_dim=1).depth() for n in (1, 2, 3, 4096)] == [0, 1, 2, 12]
    grid = Plstm(width=16, height=16, key_dim=1)
    assert (grid.depth(), grid.longest_path()) == (8, 31)
    assert grid.over(chunk=4).depth() == 2 + 2 + 7
    assert grid.over(chunk=16).depth() == 8 + 1


def test_any_acyclic_graph_has_a_traversal() -> None:
    tree = nx.DiGraph([(0, 1), (0, 2), (1, 3), (1, 4), (4, 5)])
    found = traversal(tree)
    assert (found.num_edges, found.num_transitions, found.depth) == (5, 3, 4)
    assert found.flops(2, 3) == 6 * (2 * (3 + 2 * 5) + 5 * 6)


# ---- by hand -------------------------------------------------------------------------------


def test_two_nodes_of_a_chain_by_hand() -> None:
    op = Plstm(width=2, key_dim=3, value_dim=4)
    work = op.work(2**16)
    compose = 2 * 2 * 2 * 1  # two rows of the later node, two columns of the earlier one
    inside = 2 * 2 * 2 * 3 + 2 * 2 * 2 * 4
    assert work.tensor_flops[FP32] == compose + inside
    assert work.vector_flops == 2 * 2
    moved = (2 + 2 + 4) + 2 * 9 + (6 + 6 + 4) + 3 * 4 + (4 + 8 + 8)
    assert work.bytes == 4 * moved
    assert work.launches == 5


def test_work_in_chunks_is_linear_in_the_length() -> None:
    op = Plstm(width=1024, key_dim=64, chunk=64)
    for factor in (2, 8):
        longer = op.over(width=1024 * factor)
        assert longer.min_flops()[FP32] == factor * op.min_flops()[FP32]
    whole = Plstm(width=1024, key_dim=64)
    assert whole.over(width=4096).min_flops()[FP32] > 15 * whole.min_flops()[FP32]


def test_padding_is_counted() -> None:
    op = Plstm(width=5, height=3, key_dim=2, chunk=2)
    assert op.work(2**16).tensor_flops == op.over(width=6, height=4).work(2**16).tensor_flops
    assert op.compulsory_bytes() < op.over(width=6, height=4).compulsory_bytes()


def test_states_held_do_not_grow_with_a_chain() -> None:
    op = Plstm(width=100, num_heads=2, key_dim=8, chunk=4, dtype=BF16)
    assert op.state_bytes() == op.over(width=10_000).state_bytes() == 2 * 64 * 2
    assert op.over(height=7).state_bytes() == 8 * 2 * 64 * 2
    assert op.step().work(2**16).bytes < op.work(2**16).bytes / 20


@pytest.mark.parametrize("chunk", [0, 3, 48, 2.0])
def test_a_chunk_is_a_power_of_two(chunk: Any) -> None:
    with pytest.raises(InputError, match="power of two"):
        Plstm(width=64, key_dim=8, chunk=chunk)


def test_arrays_of_sizes_count_each_as_alone() -> None:
    widths = np.array([1.0, 3.0, 8.0, 100.0])
    for chunk in (None, 8):
        op = Plstm(width=5, height=4, key_dim=2, chunk=chunk)
        many = op.over(width=widths).work(2**16)
        for i, width in enumerate(widths):
            one = op.over(width=int(width)).work(2**16)
            for name in ("vector_flops", "read_bytes", "write_bytes", "launches"):
                counted = np.broadcast_to(getattr(many, name), widths.shape)[i]
                assert counted == getattr(one, name), (name, width, chunk)
            assert many.tensor_flops[FP32][i] == one.tensor_flops[FP32]  # type: ignore[index]
