"""Claims on chunked linear recurrences: the benchmark of flash-linear-attention (GLA, DeltaNet).

One call of an eager PyTorch function, forward or forward and backward, on one GPU:

    T = max(device, host)

`device` is the op's predicted time; the host time is what the function's Python and its launches
take, whatever the shape. FlashAttention-2 has no kernel for Blackwell: it runs the code of sm_80,
whose products go at Ampere's rate an SM and clock, so its time is that of an A100 with the device's
SMs and clock.

Off: the backward pass of GLA, whose sub-chunks spill registers in ways that no count shows, and
everything backward at a head of 256.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from hwmodels import catalog
from hwmodels.device import Device
from hwmodels.dtypes import BF16, FP16
from simulator.kernel_time.model import Conditions
from simulator.kernel_time.predict import predict
from validate.claims.claim import Claim, Value, not_modelled
from workloads.op import Op
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.ops.linear_recurrence import CHANNEL, DELTA, SCALAR, LinearRecurrence
from workloads.ops.linear_recurrence_backward import LinearRecurrenceBackward


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A function of the library: its recurrence, and host seconds forward and backward.

    The host seconds are those of the smallest shape of the table (batch 8, seq 1024, 8 heads of
    64; of chunk_gdn forward batch 4, seq 2048, 16 heads of 128), where the device waits.
    """

    fields: Mapping[str, str]
    forward_s: float
    backward_s: float


FUNCTIONS: Final = {
    "chunk_retention": Function(fields={"decay": SCALAR}, forward_s=425e-6, backward_s=473e-6),
    "chunk_gla": Function(fields={"decay": CHANNEL}, forward_s=358e-6, backward_s=1349e-6),
    "chunk_gdn": Function(
        fields={"decay": SCALAR, "rule": DELTA}, forward_s=753e-6, backward_s=1221e-6
    ),
    "chunk_delta_rule": Function(fields={"rule": DELTA}, forward_s=753e-6, backward_s=1221e-6),
}
FLASH: Final = "flash_attn"
FLASH_FORWARD_S, FLASH_BACKWARD_S = 157e-6, 320e-6
"""Host seconds of FlashAttention-2's function: the same row."""
FA2: Final = "figure:fa2"
"""The kernel alone, as its authors time it; serving frameworks run it with more beside."""
SM80: Final = "a100-sxm4-80gb"


def evaluate_gla(claim: Claim) -> Value:
    """Milliseconds of a row of the benchmark."""
    return _row(claim)


def evaluate_deltanet(claim: Claim) -> Value:
    """The same rows; a speedup over the recurrent form names no recurrent kernel."""
    if claim.kind == "speedup":
        not_modelled("setting incomplete: batch, heads and the recurrent kernel are not named")
    return _row(claim)


def _row(claim: Claim) -> float:
    batch, seq, heads, width = claim.sizes("batch", "seq", "heads", "head_dim")
    (impl,) = claim.need("impl")
    shape = {"batch": batch, "num_heads": heads, "dtype": claim.dtype(BF16)}
    backward, on = "bwd" in claim.quantity, claim.device()
    if str(impl).startswith(FLASH):
        causal = bool(claim.setting.get("causal", True))
        shape |= {"len_q": seq, "head_dim": width, "causal": causal}
        return _flash_seconds(shape, on, backward=backward) * 1e3
    if impl not in FUNCTIONS:
        not_modelled(f"no function '{impl}' is known here")
    function = FUNCTIONS[str(impl)]
    shape |= {"len_seq": seq, "key_dim": width, **function.fields}
    seconds = max(_seconds(LinearRecurrence(**shape), on), function.forward_s)
    if backward:
        seconds += max(_seconds(LinearRecurrenceBackward(**shape), on), function.backward_s)
    return seconds * 1e3


def _flash_seconds(shape: dict[str, Any], on: Device, *, backward: bool) -> float:
    """FlashAttention-2: its own kernel where the device's calibration knows it, else sm_80's."""
    scale = 1.0
    target = on
    if on.compute_capability and int(on.compute_capability.split(".")[0]) >= BLACKWELL:
        target = catalog.device(SM80)
        scale = _sm_clocks(target) / _sm_clocks(on)
    shape = shape | {"dtype": FP16}  # as fast as bf16, and the format the kernel alone is known in
    forward = scale * _seconds(FlashAttention2(**shape), target, FA2)
    seconds = max(forward, FLASH_FORWARD_S)
    if backward:
        gradients = scale * _seconds(FlashAttention2Backward(**shape), target, FA2)
        seconds += max(gradients, FLASH_BACKWARD_S)
    return seconds


BLACKWELL: Final = 10


def _sm_clocks(device: Device) -> float:
    return device.num_sms * (device.tensor_clock_hz or device.clock_hz)


def _seconds(op: Op, on: Device, kernel: str = "") -> float:
    return float(predict(op, on=on, conditions=Conditions(kernel=kernel)).seconds)
