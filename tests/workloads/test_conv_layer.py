"""Layers around long convolutions: proofs, counts by hand, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP16, FP32
from hwmodels.errors import InputError
from tests.workloads.proof import assert_proved, proves
from workloads.op import Op
from workloads.ops.conv_layer import Hyena, MonarchMixer, Orchid
from workloads.ops.h3 import H3
from workloads.ops.sgconv import MultiscaleFilter, SGConv
from workloads.ops.short_conv import ShortConv
from workloads.ops.tcnca import Tcnca

memories = st.integers(30_000, 60_000)
formats = st.sampled_from([BF16, FP16, FP32])


@st.composite
def short(draw: st.DrawFn) -> ShortConv:
    update = draw(st.booleans())
    return ShortConv(
        batch=draw(st.integers(1, 3)),
        len_seq=1 if update else draw(st.integers(1, 20)),
        channels=draw(st.integers(1, 4)),
        width=draw(st.integers(1, 6)),
        activation=draw(st.booleans()),
        update=update,
        dtype=draw(formats),
    )


@proves("short_conv")
@given(op=short(), fast_bytes=st.integers(64, 200))
def test_short_conv(op: ShortConv, fast_bytes: int) -> None:
    assert_proved(op, fast_bytes)


@st.composite
def hyenas(draw: st.DrawFn) -> Hyena:
    return Hyena(
        batch=draw(st.integers(1, 2)),
        len_seq=draw(st.integers(1, 12)),
        dim=draw(st.integers(1, 4)),
        order=draw(st.integers(2, 4)),
        width=draw(st.integers(1, 4)),
        filter_dim=draw(st.integers(1, 4)),
        fused=draw(st.booleans()),
        dtype=draw(formats),
    )


@proves("hyena")
@given(op=hyenas(), fast_bytes=memories)
def test_hyena(op: Hyena, fast_bytes: int) -> None:
    assert_proved(op, fast_bytes)


@st.composite
def orchids(draw: st.DrawFn) -> Orchid:
    return Orchid(
        batch=draw(st.integers(1, 2)),
        len_seq=draw(st.integers(1, 16)),
        dim=draw(st.integers(1, 4)),
        width=draw(st.integers(1, 4)),
        condition_width=draw(st.integers(1, 4)),
        dtype=draw(formats),
    )


@proves("orchid")
@given(op=orchids(), fast_bytes=memories)
def test_orchid(op: Orchid, fast_bytes: int) -> None:
    assert_proved(op, fast_bytes)


@st.composite
def mixers(draw: st.DrawFn) -> MonarchMixer:
    blocks, causal = draw(st.integers(1, 3)), draw(st.booleans())
    return MonarchMixer(
        batch=draw(st.integers(1, 2)),
        len_seq=draw(st.integers(1, 12)) if causal else 2 ** draw(st.integers(0, 4)),
        dim=blocks * draw(st.integers(1, 3)),
        num_blocks=blocks,
        expansion=draw(st.integers(1, 3)),
        width=draw(st.integers(1, 4)),
        causal=causal,
        dtype=draw(formats),
    )


@proves("monarch_mixer")
@given(op=mixers(), fast_bytes=memories)
def test_monarch_mixer(op: MonarchMixer, fast_bytes: int) -> None:
    assert_proved(op, fast_bytes)


@st.composite
def h3s(draw: st.DrawFn) -> H3:
    chunk = draw(st.integers(1, 6))
    return H3(
        batch=draw(st.integers(1, 2)),
        len_seq=chunk * draw(st.integers(1, 5)),
        dim=draw(st.integers(1, 3)),
        shift_dim=draw(st.integers(1, 5)),
        state_dim=draw(st.integers(1, 4)),
        chunk=chunk,
        dtype=draw(formats),
    )


@proves("h3")
@given(op=h3s(), fast_bytes=memories)
def test_h3_with_and_without_state_passing(op: H3, fast_bytes: int) -> None:
    assert_proved(op, fast_bytes)


@st.composite
def sgconvs(draw: st.DrawFn) -> SGConv:
    dim = draw(st.integers(1, 5))
    return SGConv(
        batch=draw(st.integers(1, 2)),
        channels=draw(st.integers(1, 3)),
        len_seq=dim * 2 ** draw(st.integers(1, 4)),
        kernel_dim=dim,
        dtype=draw(formats),
    )


@proves("sgconv")
@given(op=sgconvs(), fast_bytes=st.integers(64, 2000))
def test_sgconv(op: SGConv, fast_bytes: int) -> None:
    assert_proved(op, fast_bytes)


@proves("multiscale_filter")
@given(op=sgconvs(), fast_bytes=st.integers(24, 200))
def test_filters_at_many_scales(op: SGConv, fast_bytes: int) -> None:
    assert_proved(op.filters(), fast_bytes)


@st.composite
def tcncas(draw: st.DrawFn) -> Tcnca:
    growth, depth = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = draw(st.integers(1, 2))
    chunk = growth ** (depth - 1) * draw(st.integers(1, 2))
    return Tcnca(
        batch=draw(st.integers(1, 2)),
        len_seq=chunk * draw(st.integers(1, 3)),
        dim=heads * draw(st.integers(1, 3)),
        num_heads=heads,
        width=draw(st.integers(1, 4)),
        depth=depth,
        growth=growth,
        chunk=chunk,
        dtype=draw(formats),
    )


@proves("tcnca")
@given(op=tcncas(), fast_bytes=memories)
def test_tcnca(op: Tcnca, fast_bytes: int) -> None:
    assert_proved(op, fast_bytes)


# ---- by hand -------------------------------------------------------------------------------


def test_a_hyena_layer_by_hand() -> None:
    """2 tokens of width 3, order 2: 9 columns projected, taps of 3, one convolution of 2 points."""
    op = Hyena(len_seq=2, dim=3, filter_dim=5)
    flops = op.min_flops()[BF16]
    assert flops == 2 * 2 * 9 * 3 + 2 * 2 * 3 * 3 + 2 * 2 * 3 * 5
    short = next(s.op for s in op.stages() if s.name == "short")
    assert short.work(2**16).vector_flops == 2 * 9 * 2 * 3
    assert [s.name for s in op.over(order=3).stages()].count("inner") == 1


def test_block_diagonal_matrices_are_as_much_cheaper_as_they_have_blocks() -> None:
    op = MonarchMixer(len_seq=64, dim=32, num_blocks=1)
    assert op.mixer_weights() / op.over(num_blocks=4).mixer_weights() == 4
    wide, narrow = (
        sum(s.op.min_flops()[BF16] for s in o.stages() if s.name in ("up", "down"))
        for o in (op, op.over(num_blocks=4))
    )
    assert wide / narrow == 4


def test_a_filter_of_its_own_for_every_sequence_is_transformed_for_every_sequence() -> None:
    op = Orchid(batch=8, len_seq=1024, dim=16)
    own = op.convolution().work(2**18)
    shared = op.convolution().over(batch=8, channels=16).work(2**18)
    # 3 transforms a row in place of 2 and an eighth; the gates' flops are the same
    m = 1024
    transform = 5 * m * 10 + 6 * m
    assert own.vector_flops - shared.vector_flops == (8 * 16 - 16) * transform


def test_state_passing_moves_every_token_a_fixed_number_of_times() -> None:
    lengths = 8192 * 2 ** np.arange(1, 6)
    moved = np.asarray(H3(len_seq=lengths, dim=64).work(50 * 2**20).bytes)
    more = np.diff(moved)[1:] / np.diff(lengths)[1:]  # from the third piece on
    assert more == pytest.approx(np.full(3, more[0]), rel=1e-3)
    op = H3(len_seq=2**15, dim=64)
    assert op.state_bytes() == op.over(len_seq=2**20).state_bytes() == 64 * 128 * 4


def test_the_scales_fill_the_filter() -> None:
    op = MultiscaleFilter(channels=3, len_seq=64, kernel_dim=4)
    assert op.num_parameters() == 3 * 4 * 4
    k = op.reference({"p": np.ones((3, 4, 4))})["k"]
    assert k.shape == (3, 64)
    assert (k[0, :8] == 1).all() and (k[0, 32:] == 1 / 8).all()


def test_a_token_sees_its_receptive_field_and_no_more() -> None:
    op = Tcnca(len_seq=64, dim=1, depth=3, width=3, chunk=1)
    inputs = dict(op.inputs(np.random.default_rng(1)))
    stack = inputs | {"x": np.zeros((64, 1))}
    base = op.reference(stack)["y"]
    stack["x"][0] = 1.0
    seen = np.flatnonzero((op.reference(stack)["y"] != base)[:, 0])
    assert seen.max() == op.receptive_field() - 1 == 14


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Hyena(len_seq=8, dim=2, order=1), "order = 1 must be a whole number from 2"),
        (lambda: MonarchMixer(len_seq=8, dim=6), "num_blocks = 4 must divide dim = 6"),
        (lambda: MonarchMixer(len_seq=12, dim=4), "needs a power of two"),
        (lambda: H3(len_seq=10000, dim=4), "chunk = 8192 must divide len_seq = 10000"),
        (lambda: SGConv(batch=1, channels=1, len_seq=48), "times a power of two"),
        (lambda: SGConv(batch=1, channels=1, len_seq=16), "times a power of two"),
        (lambda: Tcnca(len_seq=12, dim=2), "dilation 8 must divide len_seq = 12"),
        (lambda: Tcnca(len_seq=16, dim=3, num_heads=2), "num_heads = 2 must divide dim = 3"),
        (lambda: Tcnca(len_seq=16, dim=3, depth=0), "depth = 0 must be a whole number from 1"),
    ],
)
def test_impossible_layers_are_refused(make: object, says: str) -> None:
    assert callable(make)
    with pytest.raises(InputError, match=says):
        make()


def test_arrays_agree_with_scalars() -> None:
    lengths = np.array([256, 8192, 16384, 2**17])
    ops: list[Op] = [
        Hyena(len_seq=lengths, dim=8),
        H3(len_seq=lengths, dim=8),
        Orchid(len_seq=lengths, dim=8),
        MonarchMixer(len_seq=lengths, dim=8),
        SGConv(batch=1, channels=8, len_seq=lengths),
        Tcnca(len_seq=lengths, dim=8),
    ]
    for many in ops:
        counted = many.work(2**20)
        for i, length in enumerate(lengths):
            one = many.over(len_seq=int(length)).work(2**20)
            for counter in ("vector_flops", "read_bytes", "write_bytes", "launches", "flops"):
                every = np.broadcast_to(getattr(counted, counter), lengths.shape)
                assert getattr(one, counter) == pytest.approx(every[i], rel=1e-12), counter
