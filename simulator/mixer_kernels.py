"""The kernels that a serving engine launches for a mixer in the place of attention.

    norm; projection in; convolution and scan, of prompts and of decoding sequences apart; gate and
    norm; projection out; all-reduce

Prompts run the chunked forms, decoding sequences the one-step forms on states that device memory
holds (`simulator.serving_memory`). Tensor parallelism as `workloads.models.mixers` splits it; the
gates' and norms' maps are one kernel, as mamba_ssm's and fla's gated norms are. A narrow product
inside Mamba is summed over the ranks.

Left out: a prompt's states on their way to the cache, copies of keys for value heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Final, NamedTuple

from simulator.kernel_time.model import Conditions
from simulator.serving_kernels import (
    Batch,
    Kernel,
    Served,
    all_reduce,
    forward_kernels,
    layer_norm,
    linear_product,
    small,
)
from workloads.models.mixers import AnyMixer, GatedConv, GatedDelta, Mamba, Mamba2
from workloads.models.parameters import mixer_projections
from workloads.numeric import Num
from workloads.op import Op
from workloads.ops.delta_rule import GatedDeltaRule, GatedDeltaStep
from workloads.ops.norm import RmsNorm
from workloads.ops.row_map import RowMap
from workloads.ops.selective_scan import SelectiveScan
from workloads.ops.selective_scan_backward import SelectiveStep
from workloads.ops.short_conv import ShortConv
from workloads.ops.ssd_scan import SsdScan, SsdStep

SCAN, CONVOLUTION, PROJECTIONS = "scan", "convolution", "mixer"


class _Rows(NamedTuple):
    """Requests of one kind: how many, tokens of each, and do they decode?"""

    number: float
    length: int
    decode: bool


def pass_kernels(served: Served, batch: Batch) -> Iterator[Kernel]:
    """Every kernel of one pass, mixers included."""
    yield from forward_kernels(served, batch)
    layers = served.config.num_mixer_layers
    if layers:
        for kernel in mixer_kernels(served, batch):
            yield replace(kernel, times=kernel.times * layers)


def mixer_kernels(served: Served, batch: Batch) -> Iterator[Kernel]:
    """The mixer of one layer, its norm and its all-reduce."""
    mixer, tokens, tp = served.config.mixer, batch.num_tokens, served.layout.tp
    assert mixer is not None
    yield from layer_norm(served, tokens)
    yield from _inside(served, mixer, batch)
    yield _product(served, "out", tokens)
    yield from all_reduce(served, tokens, tp)


def _inside(served: Served, mixer: AnyMixer, batch: Batch) -> Iterator[Kernel]:
    """From the normed hidden state to what the last projection takes."""
    tokens, tp = batch.num_tokens, served.layout.tp
    inner = mixer_projections(served.config, tp)["out"].k
    yield _product(served, "in", tokens)
    if isinstance(mixer, GatedDelta):
        yield _product(served, "gates", tokens)
    if isinstance(mixer, GatedConv):
        yield small(PROJECTIONS, RowMap(rows=tokens, cols=inner, num_inputs=2))
    for rows in _rows(batch):
        yield Kernel(part=CONVOLUTION, op=_conv(served, mixer, rows), times=1,
                     conditions=Conditions())  # fmt: skip
    if isinstance(mixer, Mamba):
        yield from _narrow(served, mixer, tokens)
    for rows in _rows(batch):
        op = _SCANS[type(mixer)](mixer, rows, tp)
        if op is not None:
            yield Kernel(part=SCAN, op=op, times=1, conditions=Conditions())
    yield from _gated(mixer, tokens, inner)


def _rows(batch: Batch) -> Iterator[_Rows]:
    if batch.num_decoding:
        yield _Rows(batch.num_decoding, 1, True)
    if batch.num_prompts:
        yield _Rows(batch.num_prompts, batch.len_prompt, False)


def _product(served: Served, name: str, tokens: float) -> Kernel:
    matrix = mixer_projections(served.config, served.layout.tp)[name]
    return linear_product(
        served, PROJECTIONS, served.formats.attention, tokens, int(matrix.n), int(matrix.k)
    )


def _narrow(served: Served, mixer: Mamba, tokens: float) -> Iterator[Kernel]:
    """dt, B and C, their norms, and dt back to the channels."""
    yield _product(served, "x", tokens)
    yield from all_reduce(served, tokens, served.layout.tp, width=mixer.narrow)
    if mixer.inner_norms:
        yield small("inner norm", RmsNorm(rows=tokens, cols=mixer.narrow))
    yield _product(served, "dt", tokens)


def _conv(served: Served, mixer: AnyMixer, rows: _Rows) -> ShortConv:
    return ShortConv(
        batch=rows.number, len_seq=rows.length, channels=mixer.conv_channels(served.layout.tp),
        width=mixer.width, activation=not isinstance(mixer, GatedConv), update=rows.decode,
    )  # fmt: skip


def _gated(mixer: AnyMixer, tokens: float, inner: Num) -> Iterator[Kernel]:
    """The gate, and the norm with it; Mamba's is in its scan."""
    if not isinstance(mixer, Mamba):
        op = RowMap(rows=tokens, cols=inner, num_inputs=2, special_ops_per_element=1)
        yield small("gate", op)


def _mamba2(mixer: Mamba2, rows: _Rows, tp: int) -> Op:
    heads, groups = mixer.shape(tp)
    if rows.decode:
        return SsdStep(batch=rows.number, num_heads=heads, num_groups=groups,
                       head_dim=mixer.head_dim, state_dim=mixer.state_dim)  # fmt: skip
    return SsdScan(batch=rows.number, len_seq=rows.length, num_heads=heads, num_groups=groups,
                   head_dim=mixer.head_dim, state_dim=mixer.state_dim)  # fmt: skip


def _mamba(mixer: Mamba, rows: _Rows, tp: int) -> Op:
    channels = mixer.conv_channels(tp)
    if rows.decode:
        return SelectiveStep(batch=rows.number, channels=channels, state_dim=mixer.state_dim)
    return SelectiveScan(batch=rows.number, len_seq=rows.length, channels=channels,
                         state_dim=mixer.state_dim)  # fmt: skip


def _delta(mixer: GatedDelta, rows: _Rows, tp: int) -> Op:
    heads, keys = mixer.shape(tp)
    if rows.decode:
        return GatedDeltaStep(batch=rows.number, num_heads=heads, num_key_heads=keys,
                              key_dim=mixer.key_dim, value_dim=mixer.value_dim)  # fmt: skip
    return GatedDeltaRule(batch=rows.number, len_seq=rows.length, num_heads=heads,
                          num_key_heads=keys, key_dim=mixer.key_dim,
                          value_dim=mixer.value_dim)  # fmt: skip


def _no_scan(mixer: GatedConv, rows: _Rows, tp: int) -> None:
    return None


_SCANS: Final[Mapping[type, Callable[..., Op | None]]] = {
    Mamba2: _mamba2, Mamba: _mamba, GatedDelta: _delta, GatedConv: _no_scan,
}  # fmt: skip
