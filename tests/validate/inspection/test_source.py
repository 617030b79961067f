"""Loops of Triton's intermediate code."""

from __future__ import annotations

from validate.inspection.source import SourceLoop, source_loops

TTIR = """
#loc = loc("/x/kernel.py":3:0)
module {
  tt.func public @k(%a: !tt.ptr<bf16> {tt.divisibility = 16 : i32} loc("a"(#loc))) {
    %mask = arith.constant dense<true> : tensor<128xi1> loc(#loc1)
    scf.for %job = %0 to %1 step %2  : i32 {
      %s = scf.for %i = %0 to %1 step %2 iter_args(%acc = %z) -> (tensor<128x64xf32>)  : i32 {
        %x = tt.load %p, %m : tensor<128x32x!tt.ptr<bf16>> loc(#loc4)
        %y = tt.descriptor_load %d[%i, %j] : !tt.tensordesc<tensor<32x64xbf16>> -> tensor<32x64xbf16> loc(#loc4)
        %w = scf.if %c -> (tensor<128xf32>) {
          %e = math.exp2 %q : tensor<128xf32> loc(#loc4)
          scf.yield %e : tensor<128xf32> loc(#loc4)
        } else {
          scf.yield %q : tensor<128xf32> loc(#loc4)
        } loc(#loc4)
        %r = "tt.reduce"(%x) <{axis = 1 : i32}> ({
        ^bb0(%u: f32 loc(#loc4), %v: f32 loc(#loc4)):
          %m1 = arith.maxnumf %u, %v : f32 loc(#loc4)
          tt.reduce.return %m1 : f32 loc(#loc4)
        }) : (tensor<128x32xf32>) -> tensor<128xf32> loc(#loc4)
        %t = tt.dot %x, %y, %acc, inputPrecision = tf32 : tensor<128x32xbf16> * tensor<32x64xbf16> -> tensor<128x64xf32> loc(#loc4)
        scf.yield %t : tensor<128x64xf32> loc(#loc4)
      } loc(#loc7)
      tt.store %o, %s, %mm : tensor<128x64x!tt.ptr<f32>> loc(#loc5)
    } {tt.flatten} loc(#loc3)
    tt.descriptor_store %dd[%i, %j], %h : !tt.tensordesc<64x64xf16>, tensor<64x64xf16> loc(#loc5)
    tt.store %sp, %sv : !tt.ptr<i32> loc(#loc5)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
#loc1 = loc("/x/kernel.py":4:8)
#loc3 = loc("/x/kernel.py":7:4)
#loc4 = loc("/x/kernel.py":9:4)
#loc5 = loc("/x/kernel.py":11:4)
#loc6 = loc("/x/kernel.py":8:4)
#loc7 = loc("s"(#loc8))
#loc8 = loc(callsite(#loc6 at #loc3))
"""  # noqa: E501


def test_bytes_flops_and_lines_by_loop() -> None:
    outside, outer, inner = source_loops(TTIR)
    assert outside == SourceLoop(depth=-1, outer=None, store_bytes=64 * 64 * 2 + 4)
    assert outer == SourceLoop(depth=0, outer=None, line=7, store_bytes=128 * 64 * 4)
    assert inner == SourceLoop(
        depth=1, outer=1, line=8, dot_flops=2 * 128 * 32 * 64, math="bf16", special_ops=128,
        load_bytes=128 * 32 * 2 + 32 * 64 * 2,
    )  # fmt: skip


def test_formats_and_batches() -> None:
    dot = "%t = tt.dot %x, %y, %z, inputPrecision = {} : tensor<4x16x8x{}> * tensor<4x8x32x{}> -> t"
    for kind, precision, math in (
        ("f32", "tf32", "tf32"),
        ("f32", "ieee", "fp32"),
        ("f16", "tf32", "fp16"),
        ("f8E4M3FN", "tf32", "fp8"),
    ):
        (only,) = source_loops(dot.format(precision, kind, kind))
        assert (only.dot_flops, only.math) == (2 * 4 * 16 * 8 * 32, math)


def test_the_record_holds_no_lines() -> None:
    inner = source_loops(TTIR)[2]
    kept = SourceLoop.of(inner.plain())
    inner.line = 0
    assert kept == inner
