"""Shared-prefix decoding in the profiling suite.

A case's params: batch, heads_q, heads_kv, head_dim, len_prefix, len_suffix (the new token's key is
the suffix's last).
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hwmodels.dtypes import dtype as format_of
from validate.kernels import formats
from validate.kernels.decode_attention import tiles
from validate.kernels.decode_attention.kernel import Cache, decode_parts
from validate.kernels.decode_attention.suite import TOLERANCES
from validate.kernels.flash_attention import vendors
from validate.kernels.flash_attention.tiles import binary, suiting
from validate.kernels.flash_attention.vendors import Run, scale_of
from validate.kernels.shared_prefix import kernel, reference
from validate.kernels.spec import TRITON, Compilation, Implementation, Inputs, KernelSpec, Launch
from validate.record import Case
from workloads.op import Op
from workloads.ops.shared_prefix import SharedPrefixAttention

NAME: Final = "shared_prefix_decode"
COPIES_BYTES: Final = 2**34
"""Keys and values that the baseline may hold a sequence by itself."""


def _case(
    dtype: str, batch: int, heads: tuple[int, int], len_prefix: int, len_suffix: int,
    head_dim: int = 128,
) -> Case:  # fmt: skip
    params = {
        "batch": batch, "heads_q": heads[0], "heads_kv": heads[1], "head_dim": head_dim,
        "len_prefix": len_prefix, "len_suffix": len_suffix,
    }  # fmt: skip
    return Case(op=NAME, dtype=dtype, params=params)


def _op(case: Case) -> Op:
    p = case.params
    return SharedPrefixAttention(
        batch=p["batch"], num_heads=p["heads_q"], num_kv_heads=p["heads_kv"],
        len_prefix=p["len_prefix"], len_suffix=p["len_suffix"], head_dim=p["head_dim"],
        dtype=format_of(case.dtype),
    )  # fmt: skip


def _inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """q, and K and V of the prefix and of every sequence."""
    p = case.params

    def drawn(*shape: int) -> torch.Tensor:
        return formats.random(*shape, dtype=case.dtype, generator=generator, device=device)

    prefix = (p["heads_kv"], p["len_prefix"], p["head_dim"])
    own = (p["batch"], p["heads_kv"], p["len_suffix"], p["head_dim"])
    return {
        "q": drawn(p["batch"], p["heads_q"], p["head_dim"]),
        "k_prefix": drawn(*prefix), "v_prefix": drawn(*prefix), "k": drawn(*own), "v": drawn(*own),
    }  # fmt: skip


def _reference(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    prefix = (inputs["k_prefix"], inputs["v_prefix"])
    own = (inputs["k"], inputs["v"])
    return (reference.shared_prefix(inputs["q"], prefix, own, scale_of(case))[0],)


def _suffix_launch(case: Case, arch: int) -> Launch:
    p = case.params
    rows = p["heads_q"] // p["heads_kv"]
    return tiles.for_rows(tiles.DECODE, rows, arch, p["head_dim"], case.dtype)[0]


def _launches(case: Case, arch: int) -> tuple[Launch, ...]:
    """Tiles of the prefix; the suffix takes decoding's default."""
    p = case.params
    return suiting(tiles.PREFIX, arch, p["head_dim"], case.dtype)


def _prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    assert launch is not None
    own = Cache(inputs["k"], inputs["v"], case.params["len_suffix"])
    plan = kernel.plan_shared(
        inputs["q"], (inputs["k_prefix"], inputs["v_prefix"]), own,
        (launch, _suffix_launch(case, 0)), scale=scale_of(case), dtype=case.dtype,
    )  # fmt: skip
    return lambda: plan()[:1]


def _unshared(name: str) -> Implementation:
    """SDPA over a copy of the prefix for each sequence, as a cache without sharing holds it."""
    backend, vendor = vendors.BACKENDS[name]

    def prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
        q, grouped = inputs["q"][:, :, None], inputs["q"].shape[1] != inputs["k"].shape[1]
        k, v = (
            torch.cat([inputs[f"{n}_prefix"].expand(len(q), -1, -1, -1), inputs[n]], dim=2)
            for n in ("k", "v")
        )

        def run() -> tuple[torch.Tensor, ...]:
            with sdpa_kernel(backend):
                o = scaled_dot_product_attention(q, k, v, scale=scale_of(case), enable_gqa=grouped)
            return (o[:, :, 0],)

        return run

    return Implementation(
        name=name, prepare=prepare, vendor=vendor,
        refusal=lambda case, arch: _no_copies(name, case, arch),
    )  # fmt: skip


def _no_copies(name: str, case: Case, arch: int) -> str | None:
    p = case.params
    length = p["len_prefix"] + p["len_suffix"]
    copies = 4 * p["batch"] * p["heads_kv"] * length * p["head_dim"]
    if copies > COPIES_BYTES:
        return "a copy of the prefix for each sequence would not fit beside the rest"
    dense = Case(op=case.op, dtype=case.dtype, params={**p, "seq_q": 1, "seq_kv": length})
    return vendors.refusal(name, dense, arch)


def _binaries() -> tuple[Compilation, ...]:
    return tuple(
        _binary(tile.launch, dtype, dim)
        for tile in tiles.PREFIX
        for dim in (64, 128)
        for dtype in ("bf16", "fp32")
        if dtype in tile.formats and tile.least_dim <= dim <= tile.most_dim
    )


def _binary(launch: Launch, dtype: str, dim: int) -> Compilation:
    kind = formats.TRITON[dtype]
    floats = dict.fromkeys(("k_scale", "v_scale", "lse", "o", "table", "lens"), "*fp32")
    types = {**floats, "scale": "fp32", "out_scale": "fp32", **dict.fromkeys("qkv", f"*{kind}")}
    constants: dict[str, Any] = {
        "DIM": dim, "PAGE": 0, "SCALED": False, "RAGGED": False, "PRECISION": "ieee", **launch.meta,
    }  # fmt: skip
    return binary(
        NAME, decode_parts, launch, types, constants, f"{dtype}-d{dim}-prefix",
        ("stride_sz", "stride_sh", "stride_table"),
    )  # fmt: skip


_CHECKED: Final[tuple[tuple[Any, ...], ...]] = (
    (1, (1, 1), 1, 1, 16), (3, (4, 2), 37, 5, 16), (2, (4, 1), 64, 32, 32),
    (5, (2, 1), 130, 17, 16), (1, (4, 2), 600, 300, 16), (17, (2, 1), 20, 3, 16),
)  # fmt: skip
_GRID: Final[tuple[tuple[Any, ...], ...]] = (
    (1, (32, 8), 2048, 128), (8, (32, 8), 2048, 128), (32, (32, 8), 1024, 256),
    (64, (32, 8), 8192, 64), (16, (32, 8), 32768, 512), (256, (32, 8), 2048, 128),
    (256, (32, 32), 16384, 64), (1024, (32, 8), 16384, 64), (32, (32, 8), 131072, 1024),
    (64, (64, 8), 4096, 2048), (512, (64, 8), 1024, 1024), (128, (32, 32), 1024, 128, 64),
)  # fmt: skip

SPECS: Final = (
    KernelSpec(
        name=NAME, op=_op, inputs=_inputs, reference=_reference,
        implementations=(
            Implementation(name=TRITON, prepare=_prepare, launches=_launches),
            _unshared("sdpa-flash"), _unshared("sdpa-cudnn"),
        ),
        checks=tuple(_case(d, *s) for d in ("fp32", "fp16") for s in _CHECKED),
        grid=tuple(
            sorted(
                (_case("bf16", *s) for s in _GRID),
                key=lambda c: (
                    (c.params["len_prefix"] + c.params["batch"] * c.params["len_suffix"])
                    * c.params["heads_kv"]
                ),
            )
        ),
        compilations=_binaries, tolerances=TOLERANCES,
        source="Juravsky et al. 2024, Hydragen (arXiv 2402.05099)",
    ),
)  # fmt: skip
