"""Short convolutions, delta rules and chunked scans: counts against loops and hand counts."""

from __future__ import annotations

import numpy as np
import pytest

from hwmodels.dtypes import BF16, FP8, FP32
from hwmodels.errors import InputError
from workloads.ops.chunk_scan import MambaChunkScan
from workloads.ops.delta_rule import GatedDeltaRule, GatedDeltaStep
from workloads.ops.row_map import RowMap
from workloads.ops.short_conv import ShortConv

FAST = 2.0**17


def test_a_convolution_loop_does_as_many_flops() -> None:
    batch, length, channels, width = 2, 7, 3, 4
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((batch, length, channels)), rng.standard_normal((channels, width))
    y, flops = np.zeros_like(x), 0
    for b in range(batch):
        for t in range(length):
            for c in range(channels):
                for j in range(width):  # positions before the sequence hold zeros
                    y[b, t, c] += w[c, j] * (x[b, t - j, c] if t >= j else 0.0)
                    flops += 2
    op = ShortConv(batch=batch, len_seq=length, channels=channels, width=width, activation=False)
    work = op.work(FAST)
    assert (work.vector_flops, work.special_ops) == (flops, 0)
    assert work.read_bytes == 2 * (x.size + w.size) and work.write_bytes == 2 * y.size
    assert op.compulsory_bytes() == work.bytes


def test_an_update_moves_its_state_both_ways() -> None:
    op = ShortConv(batch=5, channels=64, width=4, update=True)
    assert op.state_bytes() == 5 * 64 * 3 * 2
    assert op.work(FAST).bytes == 2 * op.state_bytes() + 2 * 5 * 64 * 2 + 64 * 4 * 2
    assert op.work(FAST).special_ops == 2 * 5 * 64
    with pytest.raises(InputError, match="one step"):
        ShortConv(batch=5, len_seq=2, channels=64, update=True)


def delta_by_steps(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, int]:
    """The recurrence with a_t = 1, b_t = 1 as matrix-vector products, counting tensor flops."""
    state, flops, out = np.zeros((v.shape[1], k.shape[1])), 0, np.zeros_like(v)
    for t in range(len(q)):
        seen = state @ k[t]
        state = state + np.outer(v[t] - seen, k[t])
        out[t] = state @ q[t]
        flops += 3 * 2 * state.size
    return out, flops


def delta_by_chunks(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, chunk: int
) -> tuple[np.ndarray, int]:
    """The WY form, chunk by chunk, counting the flops of its products (not of the inverse)."""
    state, flops, parts = np.zeros((v.shape[1], k.shape[1])), 0, []

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        nonlocal flops
        flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return a @ b

    for start in range(0, len(q), chunk):
        qc, kc, vc = (x[start : start + chunk] for x in (q, k, v))
        inverse = np.linalg.inv(np.eye(chunk) + np.tril(product(kc, kc.T), -1))
        w, u = product(inverse, kc), product(inverse, vc)
        new = u - product(w, state.T)
        parts.append(product(qc, state.T) + product(np.tril(product(qc, kc.T)), new))
        state = state + product(kc.T, new).T
    return np.concatenate(parts), flops


def test_a_delta_rule_in_chunks_and_in_steps() -> None:
    length, dk, dv, chunk = 24, 5, 3, 8
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, length, dk))
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    v = rng.standard_normal((length, dv))
    stepped, step_flops = delta_by_steps(q, k, v)
    chunked, chunk_flops = delta_by_chunks(q, k, v, chunk)
    np.testing.assert_allclose(chunked, stepped, rtol=1e-9)
    op = GatedDeltaRule(
        len_seq=length, num_heads=1, num_key_heads=1, key_dim=dk, value_dim=dv, chunk=chunk
    )
    assert op.work(FAST).tensor_flops == {BF16: chunk_flops}
    assert op.min_flops() == {BF16: step_flops}


def test_delta_rule_bytes_by_hand() -> None:
    op = GatedDeltaRule(batch=2, len_seq=100, num_heads=8, num_key_heads=4)
    tokens = 200 * (2 * 4 * 128 * 2 + 8 * 128 * 2 + 8 * 4)  # q and k, v, gates
    assert op.work(FAST).read_bytes == tokens
    assert op.work(FAST).write_bytes == 200 * 8 * 128 * 2 + 2 * 8 * 128 * 128 * 4
    assert op.compulsory_bytes() == op.work(FAST).bytes
    assert op.num_chunks() == 2
    with pytest.raises(InputError, match="chunk"):
        GatedDeltaRule(len_seq=10, num_heads=8, num_key_heads=4, chunk=0)


def test_a_delta_step_reads_and_writes_its_state() -> None:
    op = GatedDeltaStep(batch=3, num_heads=8, num_key_heads=4)
    half = GatedDeltaStep(batch=3, num_heads=8, num_key_heads=4, final_dtype=BF16)
    elements = 3 * 8 * 128 * 128
    assert op.work(FAST).bytes - half.work(FAST).bytes == 2 * elements
    assert op.work(FAST).vector_flops == 7 * elements
    assert op.compulsory_bytes() == op.work(FAST).bytes >= 8 * elements


def test_a_chunked_scan_against_its_products() -> None:
    length, heads, p, n, groups, chunk = 24, 4, 3, 5, 2, 8
    flops = 0
    for _ in range(length // chunk):
        flops += groups * 2 * chunk * n * chunk  # C B^T
        for _ in range(heads):
            flops += 2 * chunk * chunk * p  # the masked scores times x
            flops += 2 * n * chunk * p + 2 * chunk * n * p  # states in, states out
    op = MambaChunkScan(
        len_seq=length, num_heads=heads, head_dim=p, num_groups=groups, state_dim=n, chunk=chunk
    )
    assert op.work(FAST).tensor_flops == {BF16: flops}
    assert op.min_flops() == {BF16: length * heads * 4 * n * p}
    read = length * (heads * p + 2 * groups * n + heads) * 2
    assert (op.work(FAST).read_bytes, op.num_chunks()) == (read, 3)
    assert op.work(FAST).write_bytes == length * heads * p * 2 + heads * n * p * 4


def test_a_row_map_by_hand() -> None:
    op = RowMap(rows=10, cols=7, num_inputs=2, vector_flops_per_element=3, out_dtype=FP8)
    work = op.work(FAST)
    assert (work.read_bytes, work.write_bytes, work.vector_flops) == (280, 70, 210)
    assert op.compulsory_bytes() == 350
    assert RowMap(rows=1, cols=1, dtype=FP32, vector_flops_per_element=0).work(FAST).bytes == 8
    with pytest.raises(InputError, match="at least 0"):
        RowMap(rows=1, cols=1, special_ops_per_element=-1)
