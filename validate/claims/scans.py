"""Claims on scans: memory, time and depth as orders of the length, and speedups over loops.

An order is confirmed where counts of the op follow it over lengths from 2^8 to 2^20: for O(f(N)),
counts are a f(N) + b g(N), g = 1, or N where f grows faster than N; the first and the last length
fix a and b, the others must follow within 2 %, and a f(N) must be seen in the last. The answer is
then the claim's own text (or 'see setting'), else a text that says what the counts do.

The published speedups name no device, batch and shape: 'setting incomplete'. Where a setting names
them, the ratio is that of one layer's forward pass, the scan against a loop of the same width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from hwmodels.device import Device
from hwmodels.dtypes import FP32, DType
from simulator.kernel_time.predict import predict
from validate.claims.claim import EXACT_TOLERANCE, Claim, Value, not_modelled
from validate.claims.structured import classes, formula_at
from workloads.op import Op
from workloads.ops.associative_scan import SEQUENTIAL, AssociativeScan
from workloads.ops.conv_state_space import ConvStateSpace
from workloads.ops.decode_attention import DecodeAttention
from workloads.ops.elementwise import Elementwise
from workloads.ops.plstm import Plstm
from workloads.ops.rnn import Rnn
from workloads.ops.same_conv import SameConv

LENGTHS: Final = tuple(4**n for n in range(4, 11))
HEAD_DIM: Final = 64
"""Width of a head where a setting names none; an order does not depend on it."""
SEE_SETTING: Final = "see setting"
CONSTANT: Final = "1"
LSTM_GATES: Final = 4
LSTM_FLOPS: Final = 4 + 3 + 3 + 1
"""Of an LSTM's unit: biases, the sums of three sigmoids, f c + i g, o tanh(c)."""
LSTM_SPECIAL: Final = 3 * 2 + 2
"""Sigmoids are an exponential and a reciprocal; two tangents."""

Count = Callable[[int], float]


# ---- orders --------------------------------------------------------------------------------


def has_order(order: str, count: Count) -> bool:
    """Whether counts grow as an order in N, or L.

    >>> has_order("N^2", lambda n: 3 * n**2 + 7 * n), has_order("N", lambda n: 3 * n**2)
    (True, False)
    >>> has_order("1", lambda n: 66), has_order("1", lambda n: n), has_order("log L", lambda n: n)
    (True, False, False)
    """
    counted = np.array([count(n) for n in LENGTHS])
    if order == CONSTANT:
        return bool(counted.max() / counted.min() - 1 <= EXACT_TOLERANCE)
    said = np.array([formula_at(order, dict.fromkeys("NL", n)) for n in LENGTHS])
    lengths = np.array(LENGTHS, dtype=np.float64)
    faster = said[-1] / said[0] > lengths[-1] / lengths[0]
    table = np.stack([said, lengths if faster else np.ones_like(lengths)], axis=1)
    ends = [0, -1]
    factors = np.linalg.solve(table[ends], counted[ends])
    leads = factors[0] * said[-1] > EXACT_TOLERANCE * counted[-1]
    return bool(leads and np.allclose(table @ factors, counted, rtol=EXACT_TOLERANCE))


def order_of(text: str) -> str:
    """The one order that a text names.

    >>> order_of("O(N) KV")
    'N'
    """
    found = classes(text)
    if len(found) != 1:
        not_modelled(f"setting unclear: '{text}' names several orders")
    return found[0]


def confirmed(text: str, count: Count, what: str) -> str:
    """Empty where the counts have the order of the text, else what they do not do."""
    order = order_of(text)
    if has_order(order, count):
        return ""
    growth = count(LENGTHS[-1]) / count(LENGTHS[-2])
    return f"{what} is not O({order}): grows {growth:.4g} times as lengths grow 4 times"


# ---- Aaren ---------------------------------------------------------------------------------


def evaluate_aaren(claim: Claim) -> Value:
    """Memory of a stream and time of N tokens as orders, against a cache of keys and values; the
    share that a learned query adds to the parameters.

    `memory` is the state (m, u, w) against K and V; `time` the operations of N steps, against
    those of N queries that attend to 1 ... N keys.
    """
    quantity = claim.quantity.casefold()
    if "parameter" in quantity:
        ours, theirs = claim.sizes("aaren", "transformer")
        return (ours / theirs - 1) * (100.0 if claim.unit == "%" else 1.0)
    if "memory" in quantity:
        counts = {"aaren": state_bytes, "transformer": cache_bytes}
    elif "time" in quantity or "comput" in quantity:
        counts = {"aaren": stream_operations, "transformer": decode_operations}
    else:
        not_modelled(f"no rule for '{claim.quantity}'")
    said = {
        name: str(value)
        for name, value in claim.setting.items()
        if isinstance(value, str) and value.startswith("O(")
    }
    if not said:
        not_modelled("setting incomplete: no order of aaren or transformer")
    for name, text in said.items():
        system = "aaren" if "aaren" in name.casefold() else "transformer"
        wrong = confirmed(text, counts[system], f"{claim.quantity} of {name}")
        if wrong:
            return wrong
    return SEE_SETTING


def _stream(tokens: int) -> AssociativeScan:
    return AssociativeScan(
        len_seq=tokens, width=HEAD_DIM, operator="softmax", algorithm=SEQUENTIAL, chunk=LENGTHS[0]
    )


def state_bytes(tokens: int) -> float:
    """What a stream holds after those tokens: m, u and w of one head."""
    op = _stream(tokens)
    return float(op.element_values * op.dtype.bytes_per_element)


def cache_bytes(tokens: int) -> float:
    """K and V of those tokens: what one more decoding step reads beside its query."""
    op = DecodeAttention(num_heads=1, len_kv=tokens, head_dim=HEAD_DIM)
    return float(op.compulsory_bytes())


def stream_operations(tokens: int) -> float:
    """Of those tokens one after another."""
    work = _stream(tokens).work(2.0**20)
    return float(work.flops + work.special_ops)


def decode_operations(tokens: int) -> float:
    """Of those tokens, each attending to all up to itself."""
    lengths = np.arange(1, tokens + 1, dtype=np.float64)
    work = DecodeAttention(num_heads=1, len_kv=lengths, head_dim=HEAD_DIM).work(2.0**20)
    return float(np.sum(work.flops + work.special_ops))


# ---- pLSTM ---------------------------------------------------------------------------------


def evaluate_plstm(claim: Claim) -> Value:
    """Dependent steps of a composition: an order over chains and square grids of L nodes, or the
    number where the setting gives width (and height)."""
    if claim.kind != "complexity" and "depth" not in claim.quantity:
        not_modelled(f"no rule for '{claim.quantity}'")
    if "width" in claim.setting:
        grid = "height" in claim.setting
        width, height = claim.sizes("width", "height" if grid else "width")
        return float(Plstm(key_dim=1, width=width, height=height if grid else None).depth())
    (text,) = claim.need("formula")
    plain = str(text).replace("max(W,H)", "L").replace("max(W, H)", "L")
    for what, count in (("depth of a grid", grid_depth), ("depth of a chain", chain_depth)):
        wrong = confirmed(plain, count, what)
        if wrong:
            return wrong
    return str(text)


def grid_depth(nodes: int) -> float:
    """Of a square grid of so many nodes."""
    side = int(np.sqrt(nodes))
    return float(Plstm(width=side, height=side, key_dim=1).depth())


def chain_depth(nodes: int) -> float:
    """Of a chain."""
    return float(Plstm(width=nodes, key_dim=1).depth())


# ---- speedups ------------------------------------------------------------------------------


def evaluate_convs5(claim: Claim) -> Value:
    """One layer's forward pass over all frames, ConvLSTM's over ConvS5's.

    Sampling is set against a transformer whose layers, heads and tokens a frame no setting fixes.
    """
    if "transformer" in claim.quantity.casefold():
        not_modelled("setting incomplete: no gpu, batch, or sizes of the transformer")
    batch, frames, height, width, channels, state = claim.sizes(
        "batch", "frames", "height", "width", "channels", "state"
    )
    on, dtype = claim.device(), claim.dtype(FP32)
    image: dict[str, Any] = {"batch": batch, "height": height, "width": width, "dtype": dtype}
    ours = ConvStateSpace(len_seq=frames, channels=channels, state_dim=state, **image)
    theirs = _conv_lstm_step_s(channels, image, on)
    return frames * theirs / _seconds(ours, on)


def _conv_lstm_step_s(channels: int, image: dict[str, Any], on: Device) -> float:
    """A frame of a ConvLSTM as wide as its input: gates by one convolution, then the cell."""
    gates = SameConv(
        in_channels=2 * channels, out_channels=LSTM_GATES * channels,
        out_height=image["height"], out_width=image["width"], **image,
    )  # fmt: skip
    units = image["batch"] * image["height"] * image["width"] * channels
    cell = Elementwise(
        num_elements=units, num_inputs=LSTM_GATES + 1, num_outputs=2,
        vector_flops_per_element=LSTM_FLOPS, special_ops_per_element=LSTM_SPECIAL,
        dtype=gates.dtype,
    )  # fmt: skip
    return _seconds(gates, on) + _seconds(cell, on)


def evaluate_s5_rl(claim: Claim) -> Value:
    """The recurrence of one layer over a sequence: an LSTM's or GRU's steps over the scan with
    resets, as wide; neither with its projections of the input."""
    batch, length, hidden = claim.sizes("batch", "seq", "hidden")
    on, dtype = claim.device(), claim.dtype(FP32)
    cell = "gru" if "gru" in str(claim.setting.get("baseline", "")).casefold() else "lstm"
    return _rnn_seconds(cell, batch, length, hidden, dtype, on) / _seconds(
        AssociativeScan(
            batch=batch, len_seq=length, width=hidden, operator="reset", dtype=dtype
        ),
        on,
    )  # fmt: skip


def _rnn_seconds(
    cell: str, batch: int, length: int, hidden: int, dtype: DType, on: Device
) -> float:
    return _seconds(Rnn(cell=cell, hidden=hidden, batch=batch, num_steps=length, dtype=dtype), on)


def _seconds(op: Op, on: Device) -> float:
    return float(predict(op, on=on).seconds)
