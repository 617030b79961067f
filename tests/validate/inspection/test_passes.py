"""Machine loops matched with the source's."""

from __future__ import annotations

import pytest

from hwmodels.errors import InputError
from tests.validate.inspection.made import binary, loop, source
from validate.inspection.passes import passes
from validate.inspection.sass import Code

# 4 warps of 8 HMMA: 4 x 8 x 4096 flops
DOT = 4 * 8 * 4096
PRODUCT = source(dot_flops=DOT, load_bytes=4096, math="bf16", line=12)


def machine(found: object, kind: str) -> float:
    """How often the body that holds a kind runs."""
    return next(b.passes for b in found.bodies if kind in b.counts)  # type: ignore[attr-defined]


def test_loops_that_nest_alike_are_paired_in_order() -> None:
    outer = source(store_bytes=64, line=3)
    inner = source(depth=1, outer=1, dot_flops=DOT, math="bf16", line=5)
    found = binary(
        loop(MUFU_EX2=1), loop(depth=1, outer=0, HMMA_16816=8), sources=(outer, inner)
    )  # fmt: skip
    made = passes(found, [3, 7])
    assert (machine(made, "MUFU.EX2"), machine(made, "HMMA.16816")) == (3, 21)
    assert machine(made, "STG.128") == 1 and made.notes == ()
    assert sum(b.passes * b.store_bytes for b in made.bodies) == 512 + 3 * 64


def test_waits_count_as_no_loop() -> None:
    found = binary(loop(HMMA_16816=8), loop(wait=True, SYNCS=1), sources=(PRODUCT,))
    assert machine(passes(found, [9]), "HMMA.16816") == 9


def test_an_unrolled_loop_runs_that_much_less() -> None:
    found = binary(loop(HMMA_16816=32), sources=(PRODUCT,))
    assert machine(passes(found, [64]), "HMMA.16816") == 16
    # a copy for the remainder beside it: the wide one stands for both
    both = binary(loop(HMMA_16816=32), loop(HMMA_16816=8, ALU=1), sources=(PRODUCT,))
    assert passes(both, [64]).bodies[1].passes == 16


def test_loads_tell_unrolling_where_nothing_multiplies() -> None:
    plain = source(load_bytes=2048, line=4)
    found = binary(loop(LDG_128=4, FMA=16), loop(LDG_128=1, FMA=4), sources=(plain,))
    assert passes(found, [64]).bodies[1].passes == 16


def test_copies_behind_the_loop_betray_unrolling() -> None:
    # 4 warps of 32 lanes load 16 bytes each: 2048 bytes a pass of the source
    plain = source(load_bytes=2048, special_ops=512, line=4)
    wide = loop(LDG_128=4, MUFU_EX2=16)
    counts = {"LDG.128": 7, "MUFU.EX2": 28, "STG.128": 1}
    found = binary(wide, sources=(plain,), code=Code(counts=counts, loops=(wide,)))
    assert passes(found, [64]).bodies[1].passes == 16
    # without copies for the remainder the warps only repeat each other's loads
    alone = binary(wide, sources=(plain,))
    assert passes(alone, [64]).bodies[1].passes == 64


def test_a_flattened_nest_is_told_by_its_leaf() -> None:
    outer, inner = source(), source(depth=1, outer=1, dot_flops=DOT, math="bf16")
    empty = loop(ALU=20, STG_128=2)
    found = binary(empty, loop(HMMA_16816=8), sources=(outer, inner))
    made = passes(found, [5, 40])
    assert machine(made, "HMMA.16816") == 200
    assert made.bodies[1].maybe_share == 1 / 40
    assert any("no counterpart" in note for note in made.notes)


def test_tensor_memory_takes_flops_from_the_source() -> None:
    found = binary(loop(UTCHMMA=4), sources=(PRODUCT,), tensor_columns=128)
    made = passes(found, [10])
    assert sum(b.passes * b.tensor_flops for b in made.bodies) == 10 * DOT
    assert any("tensor memory" in note for note in made.notes)


def test_formats_come_from_the_instructions() -> None:
    fp8 = source(dot_flops=2 * 64 * 128 * 32, math="fp8")
    found = binary(loop(QGMMA_64x128x32=1), sources=(fp8,))
    assert passes(found, [2]).bodies[1].math == "fp8"


@pytest.mark.parametrize(
    ("found", "trips", "words"),
    [
        (binary(loop(HMMA_16816=8), sources=(PRODUCT,)), [], r"1 loop \(line 12\), 0 trip counts"),
        (binary(sources=()), [4], "has 0 loops, 1 trip"),
        (binary(loop(FMA=8), sources=(PRODUCT,)), [4], "cannot be told apart"),
        (
            binary(sources=(PRODUCT,), code=Code(counts={}, loops=None, why_unknown="BRX")),
            [4],
            "are unknown: BRX",
        ),
    ],
)
def test_what_is_not_known_is_refused(found: object, trips: list[float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        passes(found, trips)  # type: ignore[arg-type]


def test_specialised_warps_are_named() -> None:
    found = binary(loop(HMMA_16816=8), sources=(PRODUCT,), num_warps=12)
    assert any("specialised" in note for note in passes(found, [1]).notes)
