"""Published closed forms of activations and states, and the allocator's rounding, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.errors import InputError, UnknownNameError
from simulator.activation_memory import (
    CUBLAS_WORKSPACE_BYTES,
    CUBLAS_WORKSPACE_HOPPER_BYTES,
    FULL,
    MIB,
    MODES,
    SELECTIVE,
    SEQUENCE,
    SEQUENCE_SELECTIVE,
    TENSOR,
    ends_activation_bytes,
    first_stage_activation_bytes,
    first_stage_factor,
    fsdp_buffer_bytes,
    layer_activation_bytes,
    layer_state_bytes,
    logits_bytes,
    paged_cache_bytes,
    rounded_bytes,
    segment_bytes,
    workspace_bytes,
)

MODELS = {
    "22B": {"hidden_dim": 6144, "num_heads": 64, "num_layers": 48, "batch": 4},
    "175B": {"hidden_dim": 12288, "num_heads": 96, "num_layers": 96, "batch": 1},
    "530B": {"hidden_dim": 20480, "num_heads": 128, "num_layers": 105, "batch": 1},
    "1T": {"hidden_dim": 25600, "num_heads": 160, "num_layers": 128, "batch": 1},
}
"""Korthikanti et al. 2022, table 3; sequences of 2048, tensor parallelism over 8."""
PIPELINES = {"22B": (1, 1), "175B": (8, 3), "530B": (35, 3), "1T": (64, 1)}


@pytest.mark.parametrize("model", MODELS)
def test_the_four_models_of_the_paper(model: str) -> None:
    sizes, (pp, v) = MODELS[model], PIPELINES[model]
    s, t = 2048, 8
    h, a, layers, b = (sizes[k] for k in ("hidden_dim", "num_heads", "num_layers", "batch"))
    sbh, scores = s * b * h, 5 * a * s / h
    by_hand = {
        TENSOR: sbh * (10 + 24 / t + scores / t),
        SEQUENCE: sbh * (34 / t + scores / t),
        SELECTIVE: sbh * (10 + 24 / t),
        SEQUENCE_SELECTIVE: 34 * sbh / t,
        FULL: 2 * sbh,
    }
    factor = 1 + (pp - 1) / (pp * v) if v > 1 else 1.0
    for mode in MODES:
        found = first_stage_activation_bytes(mode, len_seq=s, tp=t, pp=pp, interleave=v, **sizes)
        assert found == pytest.approx(by_hand[mode] * layers * factor, rel=1e-12)


def test_the_scores_of_the_paper_weigh_what_it_says() -> None:
    """5 a s / h is 80 for GPT-3 and 64 for the 530B model (section 5)."""
    for model, scores in (("175B", 80), ("530B", 64)):
        sizes = {k: v for k, v in MODELS[model].items() if k != "num_layers"}
        one = layer_activation_bytes(SEQUENCE, len_seq=2048, **sizes)
        assert one / (2048 * sizes["hidden_dim"]) == pytest.approx(34 + scores, rel=1e-12)


def test_ends_and_states_by_hand() -> None:
    sizes = {"len_seq": 2048, "batch": 4, "hidden_dim": 6144, "vocab_size": 51200, "tp": 8}
    sbh = 2048 * 4 * 6144
    assert ends_activation_bytes(**sizes) == pytest.approx(sbh / 8 * (1 + 4 * (1 + 51200 / 6144)))
    assert ends_activation_bytes(pp=4, **sizes) == pytest.approx(sbh / 8 * 4)
    state = layer_state_bytes(hidden_dim=6144, num_layers=48, tp=8)
    assert state / 2**30 == pytest.approx(45.5625, rel=1e-12)


@given(st.integers(1, 64), st.integers(1, 12))
def test_interleaving_never_holds_less(pp: int, v: int) -> None:
    assert 1 <= first_stage_factor(pp, v) < 2
    many = first_stage_factor(np.array([float(pp)] * 2), np.array([1.0, float(v)]))
    assert np.asarray(many).tolist() == [1.0, first_stage_factor(pp, v)]


def test_logits_by_trainer() -> None:
    one = {"num_tokens": 16384, "vocab_size": 128256}
    assert logits_bytes("torch-eager", **one) == 3 * logits_bytes("torch-compiled", **one)
    assert logits_bytes("megatron", tp=8, **one) == 4 * 16384 * 16032
    with pytest.raises(UnknownNameError, match="trainer"):
        logits_bytes("torch-eagre", **one)
    with pytest.raises(UnknownNameError, match="activation mode"):
        layer_activation_bytes("ful", len_seq=1, batch=1, hidden_dim=1, num_heads=1)


def test_workspaces_and_buffers_by_hand() -> None:
    assert workspace_bytes("9.0", 2) == 2 * CUBLAS_WORKSPACE_HOPPER_BYTES == 64 * MIB
    assert workspace_bytes("8.0") == workspace_bytes(None) == CUBLAS_WORKSPACE_BYTES
    assert fsdp_buffer_bytes(1000) == 1000 * (2 + 2 + 2 + 4)


@given(st.integers(1, 2**36))
def test_segments_hold_their_request(num_bytes: int) -> None:
    size, segment = rounded_bytes(num_bytes), segment_bytes(num_bytes)
    assert num_bytes <= size < num_bytes + 512 and size % 512 == 0
    assert segment >= size and segment % (2 * MIB) == 0
    assert num_bytes <= 10 * MIB or segment - size < 2 * MIB


@given(st.integers(1, 10**6), st.integers(1, 256), st.integers(1, 64))
def test_a_paged_cache_wastes_less_than_a_block_a_sequence(n: int, block: int, batch: int) -> None:
    paged = paged_cache_bytes(num_tokens=n, bytes_per_token=4, block_tokens=block, batch=batch)
    assert 0 <= paged - 4 * n * batch < 4 * block * batch
    with pytest.raises(InputError, match="at least 1 token"):
        paged_cache_bytes(num_tokens=n, bytes_per_token=4, block_tokens=0)
