"""FlashRNN's two kernels and the cells: proofs, counts by hand, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.machine import FastMemoryOverflow, Machine
from workloads.ops.fused_rnn import AlternatingRnn, FusedRnn, MultiHeadRnn
from workloads.ops.rnn_cell import CELLS, RnnCell

cells = st.sampled_from(list(CELLS))
sizes = st.fixed_dictionaries(
    {
        "cell": cells,
        "batch": st.integers(1, 19),
        "num_heads": st.integers(1, 3),
        "head_dim": st.integers(1, 9),
        "len_seq": st.integers(1, 5),
        "training": st.booleans(),
        "dtype": st.sampled_from([BF16, FP32]),
    }
)


@proves("fused_rnn")
@given(shape=sizes, spread=st.floats(0, 1))
def test_the_fused_kernel(shape: dict[str, object], spread: float) -> None:
    op = FusedRnn(**shape)  # type: ignore[arg-type]
    least, most = memory_for(op, 1), memory_for(op, int(op.head_dim))
    assert_proved(op, least + spread * (most - least))


def memory_for(op: FusedRnn, units: int) -> float:
    """The least fast memory with which a block holds that many units."""
    low, high = 1.0, 2.0**30
    while high - low > 1:
        middle = (low + high) // 2
        try:
            fits = int(op.tiling(middle)["units"]) >= units
        except InputError:
            fits = False
        low, high = (low, middle) if fits else (middle, high)
    return high


@proves("alternating_rnn")
@given(shape=sizes, fast=st.integers(300, 20_000))
def test_the_alternating_kernels(shape: dict[str, object], fast: int) -> None:
    assert_proved(AlternatingRnn(**shape), fast)  # type: ignore[arg-type]


@proves("rnn_cell")
@given(
    cell=cells, batch=st.integers(1, 5), units=st.integers(1, 30), training=st.booleans(),
    fast=st.integers(200, 4000),
)  # fmt: skip
def test_a_cell(cell: str, batch: int, units: int, training: bool, fast: int) -> None:
    assert_proved(RnnCell(cell=cell, batch=batch, units=units, training=training), fast)


@pytest.mark.parametrize("cell", CELLS)
def test_both_kernels_compute_the_same(cell: str) -> None:
    fields = {"cell": cell, "batch": 3, "num_heads": 2, "head_dim": 6, "len_seq": 7}
    fused, other = FusedRnn(**fields), AlternatingRnn(**fields)  # type: ignore[arg-type]
    inputs = fused.inputs(np.random.default_rng(1))
    found = [op.program(Machine(2**12), inputs)["s"] for op in (fused, other)]
    assert np.allclose(found[0], found[1], rtol=1e-12)


def test_an_lstm_by_hand() -> None:
    """One unit, no input, no recurrent weight: c = s(1) c0 + s(1) tanh(1), y = s(1) tanh(c)."""
    op = FusedRnn(cell="lstm", head_dim=1, len_seq=1)
    inputs = {
        "x": np.ones((1, 1, 1, 1, 4)), "r": np.zeros((1, 1, 1, 4)), "b": np.zeros((1, 1, 4)),
        "s": np.full((1, 1, 1, 2), 0.5),
    }  # fmt: skip
    gate = 1 / (1 + np.exp(-1))
    c = gate * 0.5 + gate * np.tanh(1)
    found = op.program(Machine(2**12), inputs)["s"].ravel()
    assert np.allclose(found, [gate * np.tanh(c), c])


@pytest.mark.parametrize("decay", [-40.0, 40.0])
def test_an_slstm_survives_gates_near_0_and_1(decay: float) -> None:
    """Forget gates of e^-40 and 1 - e^-40 over many steps: no overflow, n at least 1."""
    op = FusedRnn(cell="slstm", batch=2, head_dim=3, len_seq=40)
    inputs = dict(op.inputs(np.random.default_rng(2)))
    inputs["x"] = inputs["x"].copy()
    inputs["x"][..., 1] = decay
    inputs["x"][..., 0] *= 30
    found = op.program(Machine(2**12), inputs)["s"]
    assert np.isfinite(found).all() and (found[..., 2] >= 1).all()
    assert np.allclose(found, op.reference(inputs)["s"], rtol=1e-9)


def test_counts_by_hand() -> None:
    """LSTM of one head of 64, 16 rows, 10 steps in bf16; each block holds all of it."""
    op = FusedRnn(cell="lstm", batch=16, head_dim=64, len_seq=10)
    work = op.work(2**20)
    weights, biases = 4 * 64 * 64 * 2, 4 * 64 * 2
    first, x, states = 2 * 16 * 64 * 2, 4 * 10 * 16 * 64 * 2, 2 * 10 * 16 * 64 * 2
    assert work.read_bytes == weights + biases + first + x
    assert work.write_bytes == states and work.launches == 1
    assert work.tensor_flops == {BF16: 10 * 16 * 2 * 4 * 64 * 64}
    per_step = op.over(training=True).work(2**20).write_bytes - states
    assert per_step == 4 * 10 * 16 * 64 * 2  # the gates


def test_blocks_that_share_a_head_read_its_state_every_step() -> None:
    op = FusedRnn(cell="elman", batch=8, head_dim=512, len_seq=100)
    one, fast = op.work(2**30), 2.0**18
    blocks = op.tiling(fast)["blocks"]
    assert blocks > 1 and op.blocks(fast) == blocks
    assert op.work(fast).read_bytes - one.read_bytes == (blocks * 100 - 1) * 8 * 512 * 2


def test_heads_make_the_recurrence_cheaper() -> None:
    wide = FusedRnn(num_heads=1, head_dim=768, len_seq=8)
    split = FusedRnn(num_heads=12, head_dim=64, len_seq=8)
    assert wide.hidden == split.hidden == 768
    assert wide.weight_bytes() == 12 * split.weight_bytes()
    assert wide.min_flops()[BF16] == 12 * split.min_flops()[BF16]


def test_a_step_from_a_held_state() -> None:
    op = FusedRnn(cell="slstm", batch=2, num_heads=4, head_dim=64, len_seq=1)
    assert op.state_bytes() == 4 * 2 * 256 * 2
    assert op.work(2**20).write_bytes == op.state_bytes()


def test_alternating_reads_the_weights_every_step() -> None:
    op = AlternatingRnn(cell="lstm", batch=4, num_heads=2, head_dim=32, len_seq=50)
    more = op.over(len_seq=51).work(2**20).bytes - op.work(2**20).bytes
    step = op.weight_bytes() + 4 * 64 * 2 * (1 + 4 + 4 + 4 + 1 + 2) + 4 * 64 * 2
    assert more == step


@pytest.mark.parametrize("kind", [FusedRnn, AlternatingRnn])
def test_an_unknown_cell_is_refused(kind: type[MultiHeadRnn]) -> None:
    with pytest.raises(InputError, match="recurrent cell 'lstn'"):
        kind(cell="lstn", head_dim=8, len_seq=2)


def test_a_head_no_block_can_begin_is_refused_with_the_way_out() -> None:
    with pytest.raises(InputError, match="alternating_rnn") as why:
        FusedRnn(head_dim=2**20, len_seq=2).work(2**18)
    assert "\n" not in str(why.value)


def test_fields_may_be_arrays() -> None:
    op = FusedRnn(head_dim=np.array([16.0, 64.0, 512.0]), len_seq=8)
    work = op.work(2**16)
    for i, d in enumerate((16, 64, 512)):
        assert np.asarray(work.bytes)[i] == op.over(head_dim=d).work(2**16).bytes


def test_resident_blocks_have_memories_of_their_own_and_one_tally() -> None:
    machine = Machine(64)
    source = machine.place(np.ones((4, 16)), FP32)
    with machine.grid(4) as blocks:
        tiles = [block.load(source, i) for i, block in enumerate(blocks)]
        assert [block.used_bytes for block in blocks] == [64] * 4
        with pytest.raises(FastMemoryOverflow):
            blocks[0].hold(np.ones(1))
        for block, tile in zip(blocks, tiles, strict=True):
            block.vector(2 * tile.values, into=tile)
    counted = machine.counted()
    assert (counted.read_bytes, counted.vector_flops, counted.launches) == (256, 64, 1)
    assert machine.peak_bytes == 64 and machine.used_bytes == 0
