"""Attention kernels, interpreted: every case, every tile, gradients, planted bugs."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.validate.kernels.checking import CPU, check, errors
from validate.kernels.flash_attention import backward, kernel, reference, tiles, vendors
from validate.kernels.flash_attention.kernel import Packed, plan_forward
from validate.kernels.flash_attention.reference import Mask
from validate.kernels.flash_attention.suite import BACKWARD, FORWARD, SPECS, VARLEN, WINDOW
from validate.kernels.judge import relative_error
from validate.kernels.spec import Launch
from validate.record import Case

BY_NAME = {spec.name: spec for spec in SPECS}
SMALL = Launch(meta={"BLOCK_M": 16, "BLOCK_N": 16, "TMA": 0})
SMALL_BACK = Launch(meta={"RESIDENT": 32, "STREAMED": 16, "TMA": 0})
CHECKS = [(spec.name, case) for spec in SPECS for case in spec.checks]


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors(batch: int, heads: int, kv_heads: int, n: int, m: int, d: int) -> list[torch.Tensor]:
    of_k = (batch, kv_heads, m, d)
    return [drawn(1, batch, heads, n, d), drawn(2, *of_k), drawn(3, *of_k)]


@pytest.mark.parametrize(("name", "case"), CHECKS, ids=lambda x: getattr(x, "key", x))
def test_every_case_meets_its_tolerance(name: str, case: Case) -> None:
    check(BY_NAME[name], case)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2)]), n=st.integers(1, 40),
    more=st.integers(-12, 40), causal=st.booleans(), window=st.integers(0, 40),
    sinks=st.integers(0, 20), learned=st.booleans(), tma=st.booleans(),
)  # fmt: skip
def test_any_lengths_windows_and_sinks(
    heads: tuple[int, int], n: int, more: int, causal: bool, window: int, sinks: int,
    learned: bool, tma: bool,
) -> None:  # fmt: skip
    """Queries without a key too: they give O = 0 and lse = -infinity."""
    mask = Mask(causal, window if causal else 0, sinks if causal and window else 0)
    q, k, v = tensors(1, *heads, n, max(1, n + more), 16)
    sink = drawn(4, heads[0]) if learned else None
    launch = replace(SMALL, meta={**SMALL.meta, "TMA": int(tma)})
    o, lse = plan_forward(q, k, v, launch, mask=mask, scale=0.25, sink=sink)()
    truth, true_lse = reference.attention(q, k, v, mask, 0.25, sink)
    seen = torch.isfinite(true_lse)
    assert torch.equal(torch.isfinite(lse), seen)
    assert relative_error(o, truth) < 1e-5
    assert relative_error(lse[seen], true_lse[seen]) < 1e-5


@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    heads=st.sampled_from([(1, 1), (2, 1)]), n=st.integers(2, 40), more=st.integers(-8, 30),
    causal=st.booleans(), window=st.integers(0, 30), sinks=st.integers(0, 20),
    learned=st.booleans(), tma=st.booleans(),
)  # fmt: skip
def test_gradients_of_any_lengths_windows_and_sinks(
    heads: tuple[int, int], n: int, more: int, causal: bool, window: int, sinks: int,
    learned: bool, tma: bool,
) -> None:  # fmt: skip
    mask = Mask(causal, window if causal else 0, sinks if causal and window else 0)
    q, k, v = tensors(1, *heads, n, max(2, n + more), 16)
    do, sink = drawn(5, *q.shape), drawn(4, heads[0]) if learned else None
    options: dict[str, Any] = {"mask": mask, "scale": 0.25, "sink": sink}
    o, lse = plan_forward(q, k, v, SMALL, **options)()
    launch = replace(SMALL_BACK, meta={**SMALL_BACK.meta, "TMA": int(tma)})
    found = backward.plan_backward(q, k, v, do, o, lse, launch, **options)()
    truth = reference.gradients(q, k, v, do, mask, 0.25, sink)
    assert len(found) == len(truth) == 3 + learned
    assert max(relative_error(*pair) for pair in zip(found, truth, strict=True)) < 2e-5


def test_the_reference_gradient_is_that_of_the_reference() -> None:
    """Against automatic differentiation, in float64, with a window and both kinds of sinks."""
    mask, leaves = (
        Mask(True, 4, 2),
        [x.double().requires_grad_() for x in tensors(2, 4, 2, 7, 11, 8)],
    )
    sink = drawn(4, 4).double().requires_grad_()
    q, k, v = leaves
    scores = q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) * 0.3
    scores = scores.masked_fill(~mask.seen(torch.arange(7), 7, 11), -torch.inf)
    scores = torch.cat([scores, sink[None, :, None, None].expand(2, 4, 7, 1)], dim=-1)
    o = torch.softmax(scores, dim=-1)[..., :-1] @ v.repeat_interleave(2, dim=1)
    do = drawn(5, *q.shape).double()
    truth = torch.autograd.grad(o, [*leaves, sink], do)
    plain = [x.detach() for x in leaves]
    assert relative_error(reference.attention(*plain, mask, 0.3, sink.detach())[0], o) < 1e-12
    found = reference.gradients(*plain, do, mask, 0.3, sink.detach())
    assert max(relative_error(*pair) for pair in zip(found, truth, strict=True)) < 1e-12


def test_gradients_of_packed_sequences() -> None:
    lens_q, lens_k = (5, 27, 1), (9, 27, 20)
    q, do = drawn(1, 33, 2, 16), drawn(4, 33, 2, 16)
    k, v = drawn(2, 56, 1, 16), drawn(3, 56, 1, 16)
    ends = [torch.tensor([0, *accumulate(x)], dtype=torch.int32) for x in (lens_q, lens_k)]
    packed = Packed(ends[0], ends[1], max(lens_q), max(lens_k))
    options: dict[str, Any] = {"mask": Mask(True), "scale": 0.25, "packed": packed}
    o, lse = plan_forward(q, k, v, SMALL, **options)()
    found = backward.plan_backward(q, k, v, do, o, lse, SMALL_BACK, **options)()
    pieces = [x.split(lens) for x, lens in ((q, lens_q), (k, lens_k), (v, lens_k), (do, lens_q))]
    truth = [
        reference.gradients(*(x.transpose(0, 1)[None] for x in piece), Mask(True), 0.25)
        for piece in zip(*pieces, strict=True)
    ]
    for i, name in enumerate(("dq", "dk", "dv")):
        whole = torch.cat([t[i][0].transpose(0, 1) for t in truth])
        assert relative_error(found[i], whole) < 2e-5, name


@pytest.mark.parametrize("tile", tiles.FORWARD, ids=lambda t: t.launch.label)
def test_every_forward_tile(tile: tiles.Tile) -> None:
    """Over the edge of a block of either kind, at the least width it is shipped for."""
    dtype = torch.float32 if "fp32" in tile.formats else torch.float16
    dim, n = tile.least_dim, tile.launch.meta["BLOCK_M"] + 3
    q, k, v = (x.to(dtype) for x in tensors(1, 1, 1, n, n + 5, dim))
    o, _ = plan_forward(q, k, v, tile.launch, mask=Mask(True), scale=0.2)()
    assert relative_error(o, reference.attention(q, k, v, Mask(True), 0.2)[0]) < 2e-3


@pytest.mark.parametrize("tile", tiles.BACKWARD, ids=lambda t: t.launch.label)
def test_every_backward_tile(tile: tiles.Tile) -> None:
    dtype = torch.float32 if "fp32" in tile.formats else torch.float16
    dim, n = tile.least_dim, tile.launch.meta["RESIDENT"] + 3
    q, k, v = (x.to(dtype) for x in tensors(1, 1, 1, n, n + 5, dim))
    do, mask = drawn(5, *q.shape, dtype=dtype), Mask(True)
    o, lse = plan_forward(q, k, v, SMALL, mask=mask, scale=0.2)()
    found = backward.plan_backward(q, k, v, do, o, lse, tile.launch, mask=mask, scale=0.2)()
    truth = reference.gradients(q, k, v, do, mask, 0.2)
    assert max(relative_error(*pair) for pair in zip(found, truth, strict=True)) < 4e-3


def test_a_dropped_mask_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in BY_NAME[FORWARD].checks if c.params["causal"] and c.params["seq_q"] > 1)
    monkeypatch.setattr(vendors, "mask_of", lambda case: Mask())
    monkeypatch.setattr("validate.kernels.flash_attention.suite._options", lambda case, inputs: {
        "mask": Mask(), "scale": vendors.scale_of(case), "dtype": case.dtype,
    })  # fmt: skip
    assert min(errors(BY_NAME[FORWARD], case)) > 0.05


def test_an_unwritten_output_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch of one block of queries too few leaves NaN, which is infinitely wrong."""
    case = next(c for c in BY_NAME[FORWARD].checks if c.params["seq_q"] == 150)
    monkeypatch.setattr(kernel.triton, "cdiv", lambda a, b: max(1, -(-a // b) - 1))
    assert errors(BY_NAME[FORWARD], case) == [float("inf")]


@pytest.mark.parametrize("name", ["sdpa-flash", "sdpa-math"])
def test_the_frameworks_attention_on_the_cpu(name: str) -> None:
    ran = [c for c in BY_NAME[FORWARD].checks if c.dtype == "fp32" and vendors._is_plain(c)]
    assert len(ran) >= 3
    for case in ran:
        check(BY_NAME[FORWARD], case, name)


def test_the_unfused_form_knows_windows() -> None:
    for case in BY_NAME[WINDOW].checks:
        if case.dtype == "fp32" and not case.params.get("sink_logits"):
            check(BY_NAME[WINDOW], case, "sdpa-math")


def test_refusals_name_the_reason() -> None:
    spec = BY_NAME[FORWARD]
    case = spec.grid[-1]
    wide = replace(case, params={**case.params, "head_dim": 256, "heads_kv": 1, "seq_q": 77})
    for name in vendors.BACKENDS:
        how = spec.implementation(name)
        assert "compute capability" in str(how.refusal(case, 75))
        assert how.refusal(wide, 90) is not None or name == "sdpa-math"
    learned = BY_NAME[WINDOW].grid[-1]
    assert "sinks" in str(BY_NAME[WINDOW].implementation("flash-attention").refusal(learned, 90))
    odd = replace(case, params={**case.params, "head_dim": 80})
    assert "head_dim" in str(spec.implementation("triton").refusal(odd, 90))


def test_flops_of_packed_sequences_add_up() -> None:
    case = BY_NAME[VARLEN].checks[1]
    pairs = sum(n * (n + 1) // 2 for n in case.params["lens_q"])
    flops = BY_NAME[VARLEN].op(case).min_flops()
    assert sum(flops.values()) == 4 * case.params["heads_q"] * case.params["head_dim"] * pairs


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_cases_and_binaries_are_stated(spec: Any) -> None:
    names = [c.name for c in spec.compilations()]
    assert len(set(names)) == len(names) > 0
    keys = [c.key for c in spec.grid]
    assert len(set(keys)) == len(keys) >= 12
    for case in (*spec.checks, *spec.grid):
        assert spec.op(case).work(2.0**17).bytes > 0
        for arch in (80, 90, 100):
            how = spec.implementations[0]
            assert how.refusal(case, arch) is None
            if case.params["head_dim"] <= 128 or spec.name != BACKWARD:
                assert how.launches(case, arch), (case, arch)


def test_inputs_are_random() -> None:
    spec = BY_NAME[BACKWARD]
    inputs = spec.inputs(spec.checks[1], torch.Generator().manual_seed(0), CPU)
    assert set(inputs) == {"q", "k", "v", "do"}
    assert all(float(x.std()) > 0.5 for x in inputs.values())
