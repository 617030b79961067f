"""Attention in the profiling suite: dense, backward, windows with sinks, packed sequences.

A case's params are named as public tables name them: batch, heads_q, heads_kv, head_dim, seq_q,
seq_kv, causal (0 or 1); `window`, `sinks` (first keys kept beside it), `sink_logits` (1: a learned
logit a head); packed cases have `lens_q`, `lens_kv`, one number a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Final

import torch

from hwmodels.dtypes import DType
from hwmodels.dtypes import dtype as format_of
from validate.kernels import formats
from validate.kernels.flash_attention import backward, kernel, reference, tiles, vendors
from validate.kernels.flash_attention.vendors import mask_of, scale_of
from validate.kernels.ragged import together
from validate.kernels.spec import TRITON, Compilation, Implementation, Inputs, KernelSpec, Launch
from validate.record import Case
from workloads.op import Op
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.ops.windowed_attention import WindowedAttention

TOLERANCES: Final = {"fp32": 1e-5, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1e-2}
BACKWARD_TOLERANCES: Final = {"fp32": 2e-5, "tf32": 4e-3, "fp16": 4e-3, "bf16": 2e-2}
"""Twice the forward pass's: a gradient passes through P and dS, each rounded."""
FORWARD, BACKWARD = "flash_attention", "flash_attention_backward"
WINDOW, VARLEN = "flash_attention_window", "flash_attention_varlen"
SOURCE: Final = "Dao 2023, FlashAttention-2 (arXiv 2307.08691)"
MOST_DIM: Final = 256


def _case(
    name: str, dtype: str, batch: int, heads: tuple[int, int], seq: tuple[int, int], head_dim: int,
    causal: int = 1, **more: int,
) -> Case:  # fmt: skip
    params = {
        "batch": batch, "heads_q": heads[0], "heads_kv": heads[1], "head_dim": head_dim,
        "seq_q": seq[0], "seq_kv": seq[1], "causal": causal, **more,
    }  # fmt: skip
    return Case(op=name, dtype=dtype, params=params)


def _packed(
    dtype: str, heads: tuple[int, int], head_dim: int, lens_q: Sequence[int],
    lens_kv: Sequence[int] | None = None, causal: int = 1, **more: int,
) -> Case:  # fmt: skip
    params = {
        "heads_q": heads[0], "heads_kv": heads[1], "head_dim": head_dim, "causal": causal,
        "lens_q": list(lens_q), "lens_kv": list(lens_kv or lens_q), **more,
    }  # fmt: skip
    return Case(op=VARLEN, dtype=dtype, params=params)


# ---- counts ----------------------------------------------------------------------------------


def _dtype(case: Case) -> DType:
    return format_of(case.dtype)


def _shape(case: Case) -> dict[str, Any]:
    p = case.params
    return {
        "num_heads": p["heads_q"], "num_kv_heads": p["heads_kv"], "head_dim": p["head_dim"],
        "causal": bool(p["causal"]), "dtype": _dtype(case),
    }  # fmt: skip


def _dense(case: Case) -> dict[str, Any]:
    p = case.params
    return {"batch": p["batch"], "len_q": p["seq_q"], "len_kv": p["seq_kv"], **_shape(case)}


def _window_op(case: Case) -> Op:
    p = case.params
    if not p.get("window"):
        return FlashAttention2(**_dense(case))
    sinks = p.get("sinks") or None
    return WindowedAttention(window=p["window"], num_sinks=sinks, **_dense(case))


def _varlen_op(case: Case) -> Op:
    sizes = zip(case.params["lens_q"], case.params["lens_kv"], strict=True)
    return together(sizes, lambda n, m: FlashAttention2(len_q=n, len_kv=m, **_shape(case)))


# ---- inputs and truth ------------------------------------------------------------------------


def _inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """Normal q, k, v and, where they are needed, do and a sink's logits."""
    p = case.params

    def drawn(*shape: int, dtype: str = case.dtype) -> torch.Tensor:
        return formats.random(*shape, dtype=dtype, generator=generator, device=device)

    of_q = (p["batch"], p["heads_q"], p["seq_q"], p["head_dim"])
    of_k = (p["batch"], p["heads_kv"], p["seq_kv"], p["head_dim"])
    found = {"q": drawn(*of_q), "k": drawn(*of_k), "v": drawn(*of_k)}
    if case.op == BACKWARD:
        found["do"] = drawn(*of_q)
    if p.get("sink_logits"):
        found["sink"] = drawn(p["heads_q"], dtype="fp32")
    return found


def _packed_inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """Normal q, k, v[tokens, heads, head_dim], and where sequences end."""
    p = case.params
    found: dict[str, Any] = {}
    for name, lens, heads in (("q", "lens_q", "heads_q"), ("k", "lens_kv", "heads_kv")):
        shape = (sum(p[lens]), p[heads], p["head_dim"])
        for kind in (name,) if name == "q" else ("k", "v"):
            found[kind] = formats.random(
                *shape, dtype=case.dtype, generator=generator, device=device
            )
    ends = [
        torch.tensor([0, *accumulate(p[lens])], dtype=torch.int32, device=device)
        for lens in ("lens_q", "lens_kv")
    ]
    return {**found, "cu_q": ends[0], "cu_k": ends[1]}


def _reference(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    q, k, v = (inputs[n] for n in ("q", "k", "v"))
    truth = reference.attention(q, k, v, mask_of(case), scale_of(case), inputs.get("sink"))
    return (truth[0],)


def _packed_reference(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Each sequence by itself, as a dense one."""
    p = case.params
    pieces = zip(
        inputs["q"].split(p["lens_q"]), inputs["k"].split(p["lens_kv"]),
        inputs["v"].split(p["lens_kv"]), strict=True,
    )  # fmt: skip
    outs = []
    for piece in pieces:
        q, k, v = (x.transpose(0, 1)[None] for x in piece)
        outs.append(reference.attention(q, k, v, mask_of(case), scale_of(case))[0][0])
    return (torch.cat([o.transpose(0, 1) for o in outs]),)


def _gradient(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    q, k, v, do = (inputs[n] for n in ("q", "k", "v", "do"))
    return reference.gradients(q, k, v, do, mask_of(case), scale_of(case), inputs.get("sink"))


# ---- our implementation ----------------------------------------------------------------------


def _options(case: Case, inputs: Inputs) -> dict[str, Any]:
    return {
        "mask": mask_of(case), "scale": scale_of(case), "sink": inputs.get("sink"),
        "packed": vendors.packed_of(case, inputs), "dtype": case.dtype,
    }  # fmt: skip


def _prepare(case: Case, inputs: Inputs, launch: Launch | None) -> vendors.Run:
    assert launch is not None
    q, k, v = (inputs[n] for n in ("q", "k", "v"))
    plan = kernel.plan_forward(q, k, v, launch, **_options(case, inputs))
    return lambda: plan()[:1]


def _prepare_backward(case: Case, inputs: Inputs, launch: Launch | None) -> vendors.Run:
    """The forward pass runs here, once, with the default tile for this case."""
    assert launch is not None
    q, k, v = (inputs[n] for n in ("q", "k", "v"))
    options = _options(case, inputs)
    plain = next(x for x in tiles.FORWARD if not x.launch.meta["TMA"] and _fits(x, case))
    o, lse = kernel.plan_forward(q, k, v, plain.launch, **options)()
    return backward.plan_backward(q, k, v, inputs["do"], o, lse, launch, **options)


def _fits(tile: tiles.Tile, case: Case) -> bool:
    return tile.least_dim <= case.params["head_dim"] <= tile.most_dim and (
        case.dtype in tile.formats
    )


def _launches(table: Sequence[tiles.Tile], packed: bool = False) -> Callable[..., Any]:
    def found(case: Case, arch: int) -> tuple[Launch, ...]:
        all_of = tiles.suiting(table, arch, case.params["head_dim"], case.dtype)
        return tuple(x for x in all_of if not (packed and x.meta.get("TMA", 0)))

    return found


def _refusal(case: Case, arch: int) -> str | None:
    dim = case.params["head_dim"]
    return None if dim & (dim - 1) == 0 and 16 <= dim <= MOST_DIM else "head_dim is 16 ... 256"


def _ours(prepare: Any, table: Sequence[tiles.Tile], packed: bool = False) -> Implementation:
    return Implementation(
        name=TRITON, prepare=prepare, launches=_launches(table, packed), refusal=_refusal
    )


# ---- binaries --------------------------------------------------------------------------------

_DIMS: Final = (64, 128, 256)
_FLOATS: Final = {"scale": "fp32", "lse": "*fp32", "sink": "*fp32"}
_ENDS: Final = {"cu_q": "*i32", "cu_k": "*i32"}
_LSE_STRIDES: Final = ("stride_lz", "stride_lh")
_PLAIN: Final[Mapping[str, Any]] = {
    "CAUSAL": True, "WINDOW": False, "SINK": False, "VARLEN": False, "PRECISION": "ieee",
}  # fmt: skip
_VARIANTS: Final = {
    FORWARD: {"causal": {}, "full": {"CAUSAL": False}},
    WINDOW: {"window": {"WINDOW": True, "SINK": True}},
    VARLEN: {"packed": {"VARLEN": True}},
}
"""What each spec sets beside the plain causal form, by label."""


def _forward_binaries(name: str) -> tuple[Compilation, ...]:
    return tuple(
        _forward_binary(name, f"{dtype}-d{dim}-{label}", tile.launch, dtype, dim, more)
        for tile in tiles.FORWARD
        for dim in _DIMS
        for dtype in tile.formats
        for label, more in _VARIANTS[name].items()
        if tile.least_dim <= dim <= tile.most_dim
        and not (name == VARLEN and tile.launch.meta["TMA"])
        and _ships(dtype, label)
    )


def _ships(dtype: str, label: str) -> bool:
    """fp16 compiles as bf16 does: shipped of it, and of fp32, the causal form alone."""
    return dtype == "bf16" or (label == "causal" and dtype != "tf32")


def _forward_binary(
    name: str, label: str, launch: Launch, dtype: str, dim: int, more: Mapping[str, Any]
) -> Compilation:
    kind, tma = formats.TRITON[dtype], bool(launch.meta["TMA"])
    sizes = {n: launch.meta[n] for n in ("BLOCK_M", "BLOCK_N")}
    tensors = dict.fromkeys(("q", "k", "v", "o"), f"*{kind}")
    if tma:
        rows = {"q": sizes["BLOCK_M"], "k": sizes["BLOCK_N"], "v": sizes["BLOCK_N"]}
        tensors |= {n: f"tensordesc<{kind}[1, {rows[n]}, {dim}]>" for n in rows}
    constants = {"DIM": dim, "TMA": tma, **_PLAIN, **more, **sizes}
    return tiles.binary(
        name, kernel.flash_forward, launch, {**tensors, **_FLOATS, **_ENDS}, constants, label,
        _LSE_STRIDES,
    )  # fmt: skip


def _backward_binaries() -> tuple[Compilation, ...]:
    found = [
        _backward_binary(function, tile.launch, dtype, dim)
        for function in (backward.flash_backward_keys, backward.flash_backward_queries)
        for tile in tiles.BACKWARD
        for dim in _DIMS
        for dtype in tile.formats
        if tile.least_dim <= dim <= tile.most_dim and dtype in ("bf16", "fp32")
    ]
    return (*found, *(_delta_binary(dim) for dim in _DIMS))


def _backward_binary(function: Any, launch: Launch, dtype: str, dim: int) -> Compilation:
    kind = f"*{formats.TRITON[dtype]}"
    tensors = {n: kind for n in ("q", "k", "v", "do", "dq", "dk", "dv") if n in function.arg_names}
    types = {"delta": "*fp32", "lse": "*fp32", "scale": "fp32", "sm_scale": "fp32"}
    tma, resident = bool(launch.meta["TMA"]), ("k", "v")
    if function is backward.flash_backward_queries:
        resident = ("q", "do")
    if tma:
        rows = {n: "RESIDENT" if n in resident else "STREAMED" for n in ("q", "k", "v", "do")}
        tensors |= {
            n: f"tensordesc<{kind[1:]}[1, {launch.meta[row]}, {dim}]>" for n, row in rows.items()
        }
    constants = {**_PLAIN, "DIM": dim, **launch.meta, "TMA": tma}
    del constants["SINK"]
    return tiles.binary(
        BACKWARD, function, launch, {**tensors, **types, **_ENDS}, constants, f"{dtype}-d{dim}",
        _LSE_STRIDES,
    )  # fmt: skip


def _delta_binary(dim: int) -> Compilation:
    launch = Launch(meta={"BLOCK_M": backward.DELTA_ROWS}, num_warps=4, num_stages=2)
    types = dict.fromkeys(("lse", "sink", "delta", "dsink"), "*fp32")
    types |= {"o": "*bf16", "do": "*bf16", "cu_q": "*i32"}
    constants = {"DIM": dim, "SINK": True, "VARLEN": False, **launch.meta}
    return tiles.binary(
        BACKWARD, backward.flash_delta, launch, types, constants, f"bf16-d{dim}", _LSE_STRIDES
    )


# ---- cases -----------------------------------------------------------------------------------


def _forward_checks() -> tuple[Case, ...]:
    """One key; ragged ends; one tile exactly; several; more keys than queries; grouped heads."""
    shapes: tuple[tuple[Any, ...], ...] = (
        (1, (1, 1), (1, 1), 16, 1), (1, (2, 1), (37, 37), 16, 1), (1, (1, 1), (128, 128), 16, 0),
        (2, (2, 1), (20, 150), 32, 1), (1, (2, 2), (130, 67), 16, 0),
        (1, (1, 1), (150, 300), 16, 1),
    )  # fmt: skip
    found = [_case(FORWARD, dtype, *s) for dtype in ("fp32", "fp16") for s in shapes]
    wide = _case(FORWARD, "fp16", 1, (1, 1), (70, 70), 256)
    return (*found, wide, _case(FORWARD, "fp16", 1, (2, 1), (33, 40), 64, 1, sink_logits=1))


def _window_checks() -> tuple[Case, ...]:
    shapes: tuple[tuple[tuple[int, int], dict[str, int]], ...] = (
        ((40, 40), {"window": 7}), ((150, 150), {"window": 33, "sinks": 4}),
        ((30, 200), {"window": 64, "sinks": 70}), ((128, 256), {"window": 64, "sink_logits": 1}),
        ((1, 90), {"window": 5, "sinks": 2}), ((70, 70), {"window": 70}),
    )  # fmt: skip
    return tuple(
        _case(WINDOW, dtype, 1, (2, 1), seq, 16, **more)
        for dtype in ("fp32", "fp16") for seq, more in shapes
    )  # fmt: skip


def _varlen_checks() -> tuple[Case, ...]:
    lengths: tuple[tuple[Any, ...], ...] = (
        ((1,), None), ((37, 1, 80), None), ((5, 64), (70, 64)), ((3, 130), (90, 140)),
    )  # fmt: skip
    found = [_packed(d, (2, 1), 16, *s) for d in ("fp32", "fp16") for s in lengths]
    return (
        *found, _packed("fp16", (2, 2), 64, (50, 13), (20, 61), causal=0),
        _packed("fp32", (1, 1), 16, (90, 30), window=17, sinks=3),
    )  # fmt: skip


def _backward_checks() -> tuple[Case, ...]:
    shapes: tuple[tuple[Any, ...], ...] = (
        (1, (1, 1), (2, 3), 16, 0), (1, (2, 1), (37, 37), 16, 1), (1, (1, 1), (64, 64), 16, 0),
        (1, (2, 1), (20, 50), 32, 1), (1, (1, 1), (70, 37), 16, 0),
    )  # fmt: skip
    found = [_case(BACKWARD, dtype, *s) for dtype in ("fp32", "fp16") for s in shapes]
    return (*found, _case(BACKWARD, "fp32", 1, (2, 1), (33, 40), 16, 1, sink_logits=1))


def _forward_grid(name: str = FORWARD) -> tuple[Case, ...]:
    """16,384 tokens at each length as papers plot them, then what models and servers run."""
    papers = [
        _case(name, "bf16", 16384 // n, (2048 // d, 2048 // d), (n, n), d, causal)
        for n in (512, 1024, 2048, 4096, 8192, 16384) for d in (64, 128) for causal in (0, 1)
    ]  # fmt: skip
    grouped: tuple[tuple[int, int, int], ...] = (
        (1, 128, 128), (1, 1024, 1024), (4, 2048, 2048), (1, 8192, 8192), (2, 16384, 16384),
        (1, 32768, 32768), (1, 512, 8192), (1, 2048, 32768), (8, 256, 4096),
    )  # fmt: skip
    models = [_case(name, "bf16", b, (32, 8), (n, m), 128) for b, n, m in grouped]
    rest = [
        _case(name, "bf16", 2, (16, 16), (4096, 4096), 256),
        _case(name, "fp16", 2, (16, 16), (8192, 8192), 128),
        _case(name, "fp16", 2, (16, 16), (8192, 8192), 128, 0),
        _case(name, "fp32", 1, (8, 8), (1024, 1024), 64),
        _case(name, "bf16", 64, (12, 12), (197, 197), 64, 0),
    ]
    return _sorted([*papers, *models, *rest])


def _backward_grid() -> tuple[Case, ...]:
    kept = [c for c in _forward_grid(BACKWARD) if c.params["head_dim"] <= 128]
    return tuple(c for c in kept if c.params["seq_q"] <= 16384)


def _window_grid() -> tuple[Case, ...]:
    sizes = ((1024, 128), (4096, 1024), (8192, 128), (8192, 4096), (16384, 4096), (32768, 1024))
    plain = [_case(WINDOW, "bf16", 1, (32, 8), (n, n), 128, window=w) for n, w in sizes]
    sinks = [
        _case(WINDOW, "bf16", 1, (32, 8), (n, n), 128, window=w, sinks=4)
        for n, w in ((4096, 1020), (16384, 4092))
    ]
    learned = [  # gpt-oss: 64 heads of 64 over 8, window 128
        _case(WINDOW, "bf16", 1, (64, 8), (n, n), 64, window=128, sink_logits=1)
        for n in (2048, 8192, 32768)
    ]
    full = [_case(WINDOW, "bf16", 1, (64, 8), (8192, 8192), 64, sink_logits=1)]
    return _sorted([*plain, *sinks, *learned, *full])


_DOCUMENTS: Final = (0.02, 0.31, 0.05, 0.11, 0.003, 0.17, 0.007, 0.33)
"""Shares of a packed batch: a few long documents and many short ones, in no order."""


def _varlen_grid() -> tuple[Case, ...]:
    def documents(tokens: int) -> tuple[int, ...]:
        lens = [max(1, round(share * tokens)) for share in _DOCUMENTS]
        return (*lens[:-1], tokens - sum(lens[:-1]))

    mixed = [
        _packed("bf16", heads, dim, documents(n))
        for n in (2048, 8192, 16384, 32768, 65536)
        for heads, dim in (((32, 8), 128), ((16, 16), 64))
    ]
    even = [_packed("bf16", (32, 8), 128, (16384 // b,) * b) for b in (1, 4, 16, 64)]
    chunks = [_packed("bf16", (32, 8), 128, (512,) * 8, (512, 1024, 2048, 3000) * 2)]
    full = [_packed("bf16", (16, 16), 64, documents(16384), causal=0)]
    return (*mixed, *even, *chunks, *full)


def _sorted(cases: Sequence[Case]) -> tuple[Case, ...]:
    def work(case: Case) -> int:
        p = case.params
        return int(p["batch"] * p["heads_q"] * p["seq_q"] * p["seq_kv"] * p["head_dim"])

    return tuple(sorted(cases, key=work))


# ---- the specs -------------------------------------------------------------------------------


def _row(case: Case) -> tuple[str, str, Mapping[str, Any]]:
    return "attention_prefill", "attn_fwd", {**case.params, "direction": "fwd"}


SPECS: Final = (
    KernelSpec(
        name=FORWARD, op=lambda case: FlashAttention2(**_dense(case)), inputs=_inputs,
        reference=_reference,
        implementations=(
            _ours(_prepare, tiles.FORWARD), *(vendors.forward(n) for n in vendors.BACKENDS),
        ),
        checks=_forward_checks(), grid=_forward_grid(),
        compilations=lambda: _forward_binaries(FORWARD), tolerances=TOLERANCES, source=SOURCE,
        row=_row,
    ),
    KernelSpec(
        name=BACKWARD, op=lambda case: FlashAttention2Backward(**_dense(case)), inputs=_inputs,
        reference=_gradient,
        implementations=(
            _ours(_prepare_backward, tiles.BACKWARD), vendors.FLASH_BACKWARD,
            vendors.CUDNN_BACKWARD, vendors.EFFICIENT_BACKWARD,
        ),
        checks=_backward_checks(), grid=_backward_grid(), compilations=_backward_binaries,
        tolerances=BACKWARD_TOLERANCES, source=SOURCE,
    ),
    KernelSpec(
        name=WINDOW, op=_window_op, inputs=_inputs, reference=_reference,
        implementations=(
            _ours(_prepare, tiles.FORWARD), vendors.FLASH, vendors.forward("sdpa-math"),
        ),
        checks=_window_checks(), grid=_window_grid(),
        compilations=lambda: _forward_binaries(WINDOW), tolerances=TOLERANCES,
        source="Xiao et al. 2023, attention sinks (arXiv 2309.17453), in FlashAttention-2's tiling",
    ),
    KernelSpec(
        name=VARLEN, op=_varlen_op, inputs=_packed_inputs, reference=_packed_reference,
        implementations=(_ours(_prepare, tiles.FORWARD, packed=True), vendors.FLASH),
        checks=_varlen_checks(), grid=_varlen_grid(),
        compilations=lambda: _forward_binaries(VARLEN), tolerances=TOLERANCES, source=SOURCE,
    ),
)  # fmt: skip
