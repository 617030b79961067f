"""Decoding attention in the profiling suite: contiguous, paged, int8 and fp8 caches.

A case's params are named as public tables name them: batch, heads_q, heads_kv, head_dim, seq_q = 1,
seq_kv; `lens` (a length a sequence, the longest seq_kv) where they differ, `page` (its slots).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hwmodels.dtypes import FP8, INT8
from hwmodels.dtypes import dtype as format_of
from validate.kernels import formats
from validate.kernels.decode_attention import kernel, reference, tiles
from validate.kernels.decode_attention.kernel import Cache
from validate.kernels.flash_attention import vendors
from validate.kernels.flash_attention.tiles import binary
from validate.kernels.flash_attention.vendors import Run, scale_of
from validate.kernels.ragged import together
from validate.kernels.spec import TRITON, Compilation, Implementation, Inputs, KernelSpec, Launch
from validate.record import Case
from workloads.op import Op
from workloads.ops.decode_attention import DecodeAttention

PLAIN, PAGED = "decode_attention", "decode_attention_paged"
INT8_CACHE, FP8_CACHE = "decode_attention_int8", "decode_attention_fp8"
KV_DTYPES: Final = {INT8_CACHE: INT8, FP8_CACHE: FP8}
TOLERANCES: Final = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}
FP8_MOST: Final = 448.0
"""Largest E4M3 number."""
FP8_ARCH: Final = 89
"""First compute capability whose conversions know E4M3."""
BACKENDS: Final = ("sdpa-flash", "sdpa-cudnn", "sdpa-math")


def _case(
    name: str, dtype: str, batch: int, heads: tuple[int, int], seq_kv: int, head_dim: int = 128,
    **more: Any,
) -> Case:  # fmt: skip
    params = {
        "batch": batch, "heads_q": heads[0], "heads_kv": heads[1], "head_dim": head_dim,
        "seq_q": 1, "seq_kv": seq_kv, "causal": 1, **more,
    }  # fmt: skip
    return Case(op=name, dtype=dtype, params=params)


def lens_of(case: Case) -> tuple[int, ...]:
    """Cached keys of each sequence."""
    p = case.params
    return tuple(p.get("lens") or (p["seq_kv"],) * p["batch"])


def _op(case: Case) -> Op:
    p = case.params
    shape = {
        "num_heads": p["heads_q"], "num_kv_heads": p["heads_kv"], "head_dim": p["head_dim"],
        "dtype": format_of(case.dtype), "kv_dtype": KV_DTYPES.get(case.op),
    }  # fmt: skip
    if not p.get("lens"):
        return DecodeAttention(batch=p["batch"], len_kv=p["seq_kv"], **shape)
    sizes = [(n,) for n in lens_of(case)]
    return together(sizes, lambda n: DecodeAttention(len_kv=n, **shape))


# ---- inputs and truth ------------------------------------------------------------------------


def _inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """q[batch, heads, d], k and v as the case stores them, and what goes with them."""
    p = case.params

    def drawn(*shape: int) -> torch.Tensor:
        return formats.random(*shape, dtype=case.dtype, generator=generator, device=device)

    found: dict[str, Any] = {"q": drawn(p["batch"], p["heads_q"], p["head_dim"])}
    if p.get("lens"):
        found["lens"] = torch.tensor(lens_of(case), dtype=torch.int32, device=device)
    if case.op == PAGED:
        return {**found, **_pages(case, generator, device, drawn)}
    shape = (p["batch"], p["heads_kv"], p["seq_kv"], p["head_dim"])
    for name in ("k", "v"):
        x = drawn(*shape)
        if case.op == INT8_CACHE:
            found[name], found[f"{name}_scale"] = reference.quantised(x)
        elif case.op == FP8_CACHE:
            factor = float(x.abs().amax()) / FP8_MOST
            found[name] = (x.float() / factor).to(torch.float8_e4m3fn)
            found[f"{name}_factor"] = factor
        else:
            found[name] = x
    return found


def _pages(
    case: Case,
    generator: torch.Generator,
    device: torch.device,
    drawn: Callable[..., torch.Tensor],
) -> Inputs:
    """Pools of pages and a table that gives each sequence pages of its own, in no order."""
    p = case.params
    each = -(-p["seq_kv"] // p["page"])
    number = each * p["batch"]
    order = torch.randperm(number, generator=generator, device=generator.device)
    table = order.to(torch.int32).reshape(p["batch"], each).to(device)
    pool = (number, p["page"], p["heads_kv"], p["head_dim"])
    return {"k": drawn(*pool), "v": drawn(*pool), "table": table}


def _stored(case: Case, inputs: Inputs, name: str) -> list[torch.Tensor]:
    """Keys or values [kv_heads, len, d] of each sequence in float64."""
    lens, x = lens_of(case), inputs[name]
    if case.op == PAGED:
        return [reference.gathered(x, inputs["table"][b], n).double() for b, n in enumerate(lens)]
    factor = inputs.get(f"{name}_factor", 1.0)
    found = [x[b, :, :n].double() * factor for b, n in enumerate(lens)]
    scale = inputs.get(f"{name}_scale")
    if scale is None:
        return found
    return [found[b] * scale[b, :, :n, None].double() for b, n in enumerate(lens)]


def _reference(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    keys, values = _stored(case, inputs, "k"), _stored(case, inputs, "v")
    return (reference.decode(inputs["q"], keys, values, scale_of(case))[0],)


# ---- implementations -------------------------------------------------------------------------


def cache_of(case: Case, inputs: Inputs) -> Cache:
    """The cache of a case's inputs."""
    given = {
        name: inputs[name]
        for name in ("lens", "table", "k_scale", "v_scale", "k_factor", "v_factor")
        if name in inputs
    }
    return Cache(inputs["k"], inputs["v"], max(lens_of(case)), **given)


def _prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    assert launch is not None
    plan = kernel.plan_decode(
        inputs["q"], cache_of(case, inputs), launch, scale=scale_of(case), dtype=case.dtype
    )
    return lambda: plan()[:1]


def _launches(case: Case, arch: int) -> tuple[Launch, ...]:
    p = case.params
    rows = p["heads_q"] // p["heads_kv"]
    return tiles.for_rows(tiles.DECODE, rows, arch, p["head_dim"], case.dtype)


def _refusal(case: Case, arch: int) -> str | None:
    if case.op == FP8_CACHE and 0 < arch < FP8_ARCH:
        return "fp8 needs compute capability 8.9 or later"
    return None


def _sdpa(name: str) -> Implementation:
    backend, vendor = vendors.BACKENDS[name]

    def prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
        q, k, v = inputs["q"][:, :, None], inputs["k"], inputs["v"]

        def run() -> tuple[torch.Tensor, ...]:
            with sdpa_kernel(backend):
                grouped = q.shape[1] != k.shape[1]
                o = scaled_dot_product_attention(q, k, v, scale=scale_of(case), enable_gqa=grouped)
            return (o[:, :, 0],)

        return run

    def refusal(case: Case, arch: int) -> str | None:
        if case.params.get("lens"):
            return "sequences of one length only"
        return vendors.refusal(name, case, arch)

    return Implementation(name=name, prepare=prepare, refusal=refusal, vendor=vendor)


# ---- binaries --------------------------------------------------------------------------------

_PAGE: Final = 64
_FLOATS: Final = {
    "k_scale": "*fp32", "v_scale": "*fp32", "lse": "*fp32", "scale": "fp32", "out_scale": "fp32",
}  # fmt: skip


def _binaries(name: str) -> tuple[Compilation, ...]:
    kinds = ("bf16",) if name != PLAIN else ("bf16", "fp16", "fp32")
    parts = tuple(
        part_binary(name, tile.launch, kind, dim)
        for tile in tiles.DECODE
        for dim in (64, 128, 256)
        for kind in kinds
        if tile.least_dim <= dim <= tile.most_dim and kind in tile.formats
    )
    merged = tuple(_merge_binary(dim) for dim in (64, 128, 256)) if name == PLAIN else ()
    return parts + merged


def part_binary(name: str, launch: Launch, dtype: str, dim: int) -> Compilation:
    """`decode_parts` as that spec runs it: the cache in its format, parts in fp32."""
    stored = KV_DTYPES.get(name)
    kind = formats.TRITON[dtype]
    cache = kind if stored is None else formats.TRITON[stored.name]
    least = FP8_ARCH if name == FP8_CACHE else 0
    types = {"q": f"*{kind}", "k": f"*{cache}", "v": f"*{cache}", "o": "*fp32", **_FLOATS}
    constants = {
        "DIM": dim, "PAGE": _PAGE if name == PAGED else 0, "SCALED": name == INT8_CACHE,
        "RAGGED": name == PAGED, "PRECISION": "ieee",
        "BLOCK_M": launch.meta["BLOCK_M"], "BLOCK_N": launch.meta["BLOCK_N"],
    }  # fmt: skip
    launched = Launch(
        meta=launch.meta, num_warps=launch.num_warps, num_stages=launch.num_stages,
        least_arch=max(launch.least_arch, least), most_arch=launch.most_arch,
    )  # fmt: skip
    types |= {"table": "*i32", "lens": "*i32"}
    return binary(
        name, kernel.decode_parts, launched, types, constants, f"{dtype}-d{dim}",
        ("stride_sz", "stride_sh", "stride_table"),
    )  # fmt: skip


def _merge_binary(dim: int) -> Compilation:
    launch = Launch(meta={"PARTS": 32, "MERGED": kernel.MERGED}, num_warps=2, num_stages=3)
    types = {"parts": "*fp32", "sums": "*fp32", "o": "*bf16", "lse": "*fp32"}
    constants = {"DIM": dim, **launch.meta}
    return binary(PLAIN, kernel.merge_parts, launch, types, constants, f"bf16-d{dim}")


# ---- cases -----------------------------------------------------------------------------------

_CHECKED: Final[Sequence[tuple[Any, ...]]] = (
    (1, (1, 1), 1, 16), (2, (4, 2), 37, 16), (1, (8, 1), 64, 32), (1, (2, 1), 700, 16),
    (1, (40, 2), 130, 16), (1, (3, 3), 300, 64),
)  # fmt: skip
"""One key; ragged; one tile exactly; several parts; more rows than a tile; parts with a rest."""


def _checks(name: str) -> tuple[Case, ...]:
    more: dict[str, Any] = {"page": 16} if name == PAGED else {}
    found = [_case(name, d, *s, **more) for d in ("fp32", "fp16") for s in _CHECKED]
    if name in (PLAIN, PAGED):
        lens = [600, 1, 257]
        found.append(_case(name, "fp16", 3, (4, 2), 600, 16, lens=lens, **more))
    if name == PAGED:
        found.append(_case(name, "fp16", 2, (4, 2), 300, 16, page=128))
        found.append(_case(name, "fp32", 2, (2, 2), 300, 16, page=48))
    return tuple(found)


_HEADS: Final = ((32, 8), (32, 32), (64, 8))
_BATCHES: Final = ((1, 512), (1, 8192), (1, 131072), (8, 2048), (32, 2048), (128, 1024))
_DEEP: Final = ((4, 32768), (64, 8192), (256, 512))


def _grid(name: str) -> tuple[Case, ...]:
    """From a sequence that no kernel can spread to caches of 2 GB a layer."""
    more: dict[str, Any] = {"page": 64} if name == PAGED else {}
    heads = _HEADS if name == PLAIN else _HEADS[:1]
    found = [_case(name, "bf16", b, h, n, **more) for h in heads for b, n in (*_BATCHES, *_DEEP)]
    found += [_case(name, "bf16", b, (64, 8), n, 64, **more) for b, n in _BATCHES[3:]]
    if name == PLAIN:
        found += [_case(name, "fp16", b, (32, 8), n) for b, n in _BATCHES[3:]]
        found += [_case(name, "bf16", b, (32, 1), n) for b, n in ((8, 8192), (64, 8192))]
        found += [_case(name, "bf16", 16, (16, 4), 4096, 256)]
    if name == PAGED:
        lens = [1 + (4096 * (7 * i + 3)) % 8192 for i in range(32)]
        found += [_case(name, "bf16", 32, (32, 8), max(lens), page=16, lens=lens)]
        found += [_case(name, "bf16", b, (32, 8), n, page=16) for b, n in _BATCHES[3:]]
    return tuple(sorted(found, key=lambda c: _bytes(c)))


def _bytes(case: Case) -> int:
    p = case.params
    return int(sum(lens_of(case)) * p["heads_kv"] * p["head_dim"])


def _row(case: Case) -> tuple[str, str, Mapping[str, Any]] | None:
    """Public rows know one length; caches of several have none."""
    if case.params.get("lens"):
        return None
    return "attention_decode", "attn_decode", {**case.params, "direction": "fwd"}


def _spec(name: str, source: str, *others: Implementation, row: Any = None) -> KernelSpec:
    ours = Implementation(name=TRITON, prepare=_prepare, launches=_launches, refusal=_refusal)
    return KernelSpec(
        name=name, op=_op, inputs=_inputs, reference=_reference, implementations=(ours, *others),
        checks=_checks(name), grid=_grid(name), compilations=lambda: _binaries(name),
        tolerances=TOLERANCES, source=source, row=row,
    )  # fmt: skip


SPECS: Final = (
    _spec(PLAIN, "Dao et al. 2023, Flash-Decoding", *(_sdpa(n) for n in BACKENDS), row=_row),
    _spec(PAGED, "Kwon et al. 2023, PagedAttention (arXiv 2309.06180)"),
    _spec(INT8_CACHE, "Flash-Decoding over int8 keys and values, a scale a token and head"),
    _spec(FP8_CACHE, "Flash-Decoding over E4M3 keys and values, one scale each"),
)
