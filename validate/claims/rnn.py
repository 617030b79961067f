"""Claims on recurrent layers of several heads: FlashRNN.

The benchmark of the authors' repository, where a setting says no more: LSTMs of width 768 in 12
heads of 64, batch 16, 1024 steps, bf16, forward, H100. One call of

    fused        a copy that brings x into the kernel's order, then the persistent kernel
    alternating  the same copy; two kernels a step from a loop in C++: the longer of device and host
    vanilla      their loop in eager PyTorch, kernel after kernel: the longer of device and host
    nn.LSTM      one head of that width, by cuDNN's persistent kernel where PyTorch takes it (up to
                 1024 units, in 128s; taken to be as fast as theirs), and the product of its inputs

Training adds a backward pass: the chain again, with the transposed matrix, and the gradients of
the recurrent weights as one product.

Off: 40 times the largest head of the Triton kernel is 42 times by the authors' own constraints,
which allow 2688 units on 132 SMs. That the fused kernel trains twice as fast as nn.LSTM is a third
party's: the figure of the README has 8.6 ms of 12 heads of 64 against 5.2 of nn.LSTM in fp16.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from hwmodels.device import Device
from hwmodels.dtypes import BF16
from simulator.planners.rnn_tiling import (
    BACKWARD,
    COMMITTED,
    DIRECTIONS,
    FORWARD,
    Layer,
    Limits,
    largest_head_dim,
)
from validate.claims.claim import Claim, Value, not_modelled
from validate.claims.decoder import ops_seconds
from validate.claims.mamba import EAGER_KERNEL_S
from workloads.ops.elementwise import Elementwise
from workloads.ops.fused_rnn import AlternatingRnn, FusedRnn
from workloads.ops.matmul import BatchedMatmul, Matmul
from workloads.ops.rnn import Rnn
from workloads.ops.rnn_cell import CELLS, cell_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Seconds that a host takes for something, and where that is from."""

    seconds: float
    source: str


LAUNCH: Final = Host(
    seconds=4e-6, source="a kernel launched from C++, cuBLAS' own checks among it: usual"
)
KERNELS: Final[Mapping[str, int]] = {"lstm": 17, "slstm": 29, "gru": 20, "elman": 8}
"""Kernels of one step of the eager loop (vanilla_fwbw/fw.py and vanilla/ of NX-AI/flashrnn): R
copied for every sequence, product, two additions, the cell's functions one by one, two stacks, a
copy or two; of an slstm also a test that waits for the device."""
PERSISTENT_WIDTH, PERSISTENT_TILE = 1024, 128
"""Widths of one layer for which PyTorch takes cuDNN's persistent kernel, in fp16 (RNN.cpp)."""
GPU: Final = "h100-sxm"
SHAPE: Final = {"batch": 16, "seq": 1024, "heads": 12, "head_dim": 64}


def evaluate_flashrnn(claim: Claim) -> Value:
    """Speedups between the implementations; the largest head of the constraints."""
    quantity = claim.quantity.casefold()
    if "feasible" in quantity:
        return _largest_committed(claim)
    if "hidden size" in quantity or "head" in quantity:
        return _larger_than_triton(claim)
    layer, on = _layer(claim), claim.device(GPU)
    if "cudnn" in quantity or "nn.lstm" in quantity:
        return _library_training(layer, on) / _fused_training(layer, on)
    fused = fused_seconds(layer, on)
    if "vanilla" in quantity or "pytorch" in quantity:
        return vanilla_seconds(layer, on) / fused
    if "alternating" in quantity:
        return alternating_seconds(layer, on) / fused
    not_modelled(f"no rule for '{claim.quantity}'")


def _layer(claim: Claim) -> FusedRnn:
    """The layer of the setting; a width goes before the number of heads."""
    given = {name: claim.sizes(name)[0] for name in (*SHAPE, "hidden") if claim.setting.get(name)}
    sizes = SHAPE | {name: value for name, value in given.items() if name in SHAPE}
    if "hidden" in given:
        width = given["hidden"]
        if "heads" in given and "head_dim" not in given:
            sizes["head_dim"] = width // sizes["heads"]
        else:
            sizes["heads"] = width // sizes["head_dim"]
        if sizes["heads"] * sizes["head_dim"] != width:
            not_modelled(f"setting unclear: {width} units are no heads of {sizes['head_dim']}")
    named = re.split(r"[^a-z]+", str(claim.setting.get("function", "lstm")).casefold())[0]
    if named not in CELLS:
        not_modelled(f"setting unclear: no recurrent cell is called '{named}'")
    return FusedRnn(
        cell=named, batch=sizes["batch"], num_heads=sizes["heads"], head_dim=sizes["head_dim"],
        len_seq=sizes["seq"], dtype=claim.dtype(BF16),
    )  # fmt: skip


# ---- implementations ---------------------------------------------------------------------------


def fused_seconds(layer: FusedRnn, on: Device) -> float:
    """One call of the fused kernel."""
    return ops_seconds([_reordered(layer), layer], on)


def alternating_seconds(layer: FusedRnn, on: Device) -> float:
    """One call of the alternating kernels."""
    op = AlternatingRnn(**_fields(layer))
    host = 2 * float(layer.len_seq) * LAUNCH.seconds
    return ops_seconds([_reordered(layer)], on) + max(ops_seconds([op], on), host)


def vanilla_seconds(layer: FusedRnn, on: Device) -> float:
    """One call of the eager loop; R is copied for every sequence, every step."""
    cell, kernels = cell_of(layer.cell), KERNELS[layer.cell]
    weights = cell.from_state * layer.hidden * layer.head_dim
    units = layer.batch * layer.hidden
    step = [
        Elementwise(num_elements=layer.batch * weights, num_inputs=1, dtype=layer.dtype),
        AlternatingRnn(**_fields(layer)).product,
        *[
            Elementwise(num_elements=units, num_inputs=2, dtype=layer.dtype)
            for _ in range(kernels - 2)
        ],
    ]
    host = kernels * EAGER_KERNEL_S
    return float(layer.len_seq) * max(ops_seconds(step, on), host)


def _fused_training(layer: FusedRnn, on: Device) -> float:
    """Both passes, x and its gradient copied."""
    return _trained(layer, on) + 2 * ops_seconds([_reordered(layer)], on)


def _trained(layer: FusedRnn, on: Device) -> float:
    """The persistent kernel forward and backward, and the gradients of R."""
    kept = layer.over(training=True)
    gradients = BatchedMatmul(
        batch=layer.num_heads, m=layer.kind.from_state * layer.head_dim, n=layer.head_dim,
        k=layer.batch * layer.len_seq, dtype=layer.dtype,
    )  # fmt: skip
    return ops_seconds([kept, kept, gradients], on)


def _library_training(layer: FusedRnn, on: Device) -> float:
    """nn.LSTM of that width as one head: both passes of its chain and of its inputs' product."""
    if layer.cell not in ("lstm", "gru"):
        not_modelled(f"cuDNN has no {layer.cell}")
    inputs = Matmul(
        m=layer.batch * layer.len_seq, n=layer.kind.from_input * layer.hidden, k=layer.hidden,
        dtype=layer.dtype,
    )  # fmt: skip
    whole = layer.over(num_heads=1, head_dim=layer.hidden)
    if layer.hidden <= PERSISTENT_WIDTH and not layer.hidden % PERSISTENT_TILE:
        return _trained(whole, on) + 3 * ops_seconds([inputs], on)
    chain = Rnn(
        cell=layer.cell, hidden=layer.hidden, batch=layer.batch, num_steps=layer.len_seq,
        dtype=layer.dtype,
    )  # fmt: skip
    return ops_seconds([chain, chain.over(direction="bwd_all"), inputs, inputs, inputs], on)


def _reordered(layer: FusedRnn) -> Elementwise:
    """x copied into the order of the kernel."""
    elements = layer.kind.from_input * layer.len_seq * layer.batch * layer.hidden
    return Elementwise(num_elements=elements, dtype=layer.dtype)


def _fields(layer: FusedRnn) -> dict[str, Any]:
    return {
        name: getattr(layer, name)
        for name in ("cell", "batch", "num_heads", "head_dim", "len_seq", "training", "dtype")
    }


# ---- constraints -------------------------------------------------------------------------------


def _largest_committed(claim: Claim) -> float:
    """The largest multiple of 16 that the committed rules allow one head."""
    num_sms, smem, gates, batch = claim.sizes("SMs", "smem_per_block", "gates", "batch")
    threads = claim.sizes("threads")[0] if claim.setting.get("threads") else 1024
    limits = Limits(num_sms=num_sms, smem_bytes=smem, max_threads=threads)
    direction = BACKWARD if "backward" in claim.quantity.casefold() else FORWARD
    layer = Layer(head_dim=1, gates=gates, batch=batch)
    return float(largest_head_dim(layer, on=limits, directions=(direction,), rules=COMMITTED))


def _larger_than_triton(claim: Claim) -> float:
    """The largest head that both passes hold, over the Triton kernel's (an LSTM's four gates)."""
    (triton,) = claim.need("triton_head_dim")
    found = re.search(r"\d+", str(triton))
    if not found:
        not_modelled(f"setting unclear: triton_head_dim = {triton!r} is not a size")
    layer = Layer(head_dim=1, gates=_layer(claim).kind.from_state, batch=SHAPE["batch"])
    return largest_head_dim(layer, on=claim.device(GPU), directions=DIRECTIONS) / int(found[0])
