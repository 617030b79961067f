"""Ops nobody knows: recognised by their sizes, flagged, or given up with their sizes named."""

from __future__ import annotations

import pytest

from hwmodels import catalog
from simulator.kernel_time.predict import predict
from validate.adapters import Uncounted, parts
from validate.adapters.unknown import FLAG
from validate.batches import batches
from validate.measurement import Measurement

ATTENTION = {"batch": 2, "heads_q": 8, "heads_kv": 2, "head_dim": 128, "seq_q": 64, "seq_kv": 64}
CONV = {"n": 2, "c": 8, "h": 9, "w": 7, "k": 4, "r": 3, "s": 3, "pad_h": 1, "pad_w": 1,
        "stride_h": 1, "stride_w": 1}  # fmt: skip
DELTA = {"batch": 4, "seq": 512, "tokens": 2048, "d_model": 2048, "heads_k": 8, "dk": 128,
         "heads_v": 16, "dv": 128}  # fmt: skip
MOE = {"tokens": 128, "hidden": 1024, "inter": 512, "topk": 2, "experts": 8, "tp": 1, "ep": 1,
       "dist": "balanced"}  # fmt: skip


def row(params: dict[str, object], op: str = "brand_new", dtype: str = "bf16") -> Measurement:
    return Measurement(
        family="f", source="aic/new-1/x", gpu="H100", device_id="h100-sxm", op=op, dtype=dtype,
        params=params, seconds=1e-3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"m": 8, "n": 64, "k": 32}, "matmul"),
        ({"m": 8, "n": 64, "k": 32, "batch": 4}, "batched_matmul"),
        ({"tokens": 8, "n": 64, "k": 32}, "matmul"),
        (ATTENTION, "prefill_attention"),
        (ATTENTION | {"seq_q": 1}, "decode_attention"),
        (CONV, "conv2d"),
        ({"cell": "lstm", "hidden": 64, "batch": 4, "timesteps": 7}, "rnn"),
        (MOE, "moe_ffn"),
        (DELTA, "counted"),
        ({"batch": 2, "seq": 128, "heads": 8, "head_dim": 64, "d_state": 128}, "counted"),
        ({"tokens": 64, "hidden": 4096}, "counted"),
        ({"tokens": 64, "hidden_size": 4096}, "counted"),
        ({"rows": 64, "cols": 4096, "inputs": 3}, "elementwise"),
        ({"elements": 4096}, "elementwise"),
    ],
)
def test_sizes_tell_what_an_op_is_like(params: dict[str, object], name: str) -> None:
    (part,) = parts(row(params))
    assert part.op.name == name and part.flag == FLAG
    (batch,), (reason,) = batches([row(params)])
    assert batch.flag == FLAG and reason is None
    found = predict(batch.op, on=catalog.device("h100-sxm"), conditions=batch.conditions)
    assert 1e-7 < float(found.seconds[0]) < 1e-2


GDN = DELTA | {"d_conv": 4}
MAMBA = {"batch": 2, "seq": 128, "tokens": 256, "d_model": 1024, "d_conv": 4, "d_state": 128,
         "heads": 16, "head_dim": 64, "groups": 1, "chunk": 128}  # fmt: skip


@pytest.mark.parametrize(
    ("op", "params", "like"),
    [
        ("kda_context_chunk", GDN, "gdn_context_chunk_gated_delta_rule"),
        ("kda_generation_recurrent", GDN | {"seq": 1},
         "gdn_generation_fused_recurrent_gated_delta_rule"),
        ("kda_context_conv1d", GDN, "gdn_context_causal_conv1d_fn"),
        ("kda_conv1d_update", GDN | {"seq": 1}, "gdn_generation_causal_conv1d_update"),
        ("mamba3_scan", MAMBA, "mamba2_context_mamba_chunk_scan_combined"),
        ("mamba3_conv1d_update", MAMBA | {"seq": 1}, "mamba2_generation_causal_conv1d_update"),
    ],
)  # fmt: skip
def test_recurrences_are_taken_for_their_nearest_kin(
    op: str, params: dict[str, object], like: str
) -> None:
    (guessed,), (known,) = parts(row(params, op)), parts(row(params, like))
    assert (guessed.op, guessed.sizes, guessed.flag) == (known.op, known.sizes, FLAG)


@pytest.mark.parametrize(
    ("op", "params", "field", "value"),
    [
        ("newer_conv", {k: v for k, v in CONV.items() if k[:2] not in ("st", "pa")}, "stride", 1),
        ("newer_conv_wgrad_bwd", CONV, "direction", "bwd_weight"),
        ("newer_conv_backward", CONV, "direction", "bwd_data"),
        ("newer_attn", {k: v for k, v in ATTENTION.items() if k != "heads_kv"}, "kv_heads", 8),
        ("newer_attn", {k: v for k, v in ATTENTION.items() if k != "seq_kv"}, "len_kv", 64),
    ],
)
def test_usual_sizes_and_directions_are_filled_in(
    op: str, params: dict[str, object], field: str, value: object
) -> None:
    (part,) = parts(row(params, op))
    assert getattr(part.op(**dict(part.fixed), **part.sizes), field) == value


def test_an_attention_backward_is_one() -> None:
    (part,) = parts(row(ATTENTION | {"causal": 1}, "newer_attn_bwd"))
    assert part.op.name.endswith("backward") and part.flag == FLAG


def test_a_label_no_op_of_the_kind_uses_falls_back_on_what_is_stored() -> None:
    for params in (MOE, ATTENTION, {"m": 8, "n": 64, "k": 32}):
        (part, *_) = parts(row(params, dtype="unknown"))
        assert part.flag == FLAG


def test_a_known_op_carries_no_flag() -> None:
    (part,) = parts(row({"m": 8, "n": 64, "k": 32}, "gemm"))
    assert part.flag == ""


def test_a_state_is_counted_once_a_sequence_and_not_for_a_convolution() -> None:
    (part,) = parts(row(DELTA))
    width = 2 * 8 * 128 + 2 * 16 * 128
    state = 16 * 128 * 128
    assert part.sizes["moved_bytes"] == 2048 * width * 2 + 2 * 4 * state * 4
    assert part.sizes["tensor_flops"] == 2048 * 4 * state
    (short,) = parts(row(DELTA, "newer_conv1d"))
    assert short.sizes["moved_bytes"] == 2048 * 2 * 2048 * 2


@pytest.mark.parametrize(("label", "stored"), [("fp16_mixed", "fp16"), ("fp8_rowwise", "bf16")])
def test_compound_labels_store_something(label: str, stored: str) -> None:
    (part,) = parts(row({"elements": 64}, dtype=label))
    assert str(dict(part.fixed)["dtype"]) == stored


@pytest.mark.parametrize("params", [{}, {"frobs": 3, "quux": 4}, {"tokens": 5}])
def test_sizes_of_no_known_op_are_named(params: dict[str, object]) -> None:
    with pytest.raises(Uncounted, match=f"brand_new yet, and its sizes .*{'|'.join(params)}"):
        parts(row(params))
