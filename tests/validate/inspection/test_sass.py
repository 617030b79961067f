"""Loops and kinds of machine code, on code written for the purpose."""

from __future__ import annotations

import pytest

from validate.inspection.sass import kind_of, read

HEAD = """
\t.section\t.text.other,"ax",@progbits
other:
        /*0000*/                   FFMA R1, R2, R3, R4 ;
\t.section\t.text.mine,"ax",@progbits
mine:
"""


def code(*rows: str) -> str:
    """nvdisasm's layout: labels flush left, 'line N' as a comment, the rest instructions."""
    lines, address = [HEAD], 0
    for row in rows:
        if row.startswith("."):
            lines.append(f"{row}:")
        elif row.startswith("line "):
            lines.append(f'\t//## File "/x/kernel.py", {row}')
        else:
            lines.append(f"        /*{address:04x}*/                   {row} ;")
            address += 16
    return "\n".join(lines)


LOOP = (
    "MOV R1, c[0x0][0x28]", ".L_x_0", "line 12", "LDG.E.128 R4, [R2.64]", "FFMA R1, R4, R5, R6",
    "@P0 BRA `(.L_x_0)", "STG.E.64 [R2.64], R4", "EXIT", ".L_x_9", "BRA `(.L_x_9)",
)  # fmt: skip


def test_one_loop_and_the_trap_after_the_end() -> None:
    found = read(code(*LOOP), "mine")
    assert found.loops is not None and len(found.loops) == 1
    (loop,) = found.loops
    assert loop.counts == {"CONTROL": 1, "FMA": 1, "LDG.128": 1} == loop.always
    assert loop.lines == (("/x/kernel.py", 12),) and not loop.is_wait
    assert found.counts["FMA"] == 1  # the other function's is not counted
    assert found.counts["STG.64"] == 1


def test_nests_and_paths_that_may_be_gone_around() -> None:
    found = read(
        code(
            ".L_x_0", "HMMA.16816.F32.BF16 R4, R8, R12, R4", ".L_x_1", "MUFU.EX2 R1, R2",
            "@!P1 BRA `(.L_x_1)", "@P2 BRA `(.L_x_2)", "STS.128 [R1], R4", ".L_x_2",
            "@P0 BRA `(.L_x_0)", "EXIT",
        ),
        "mine",
    )  # fmt: skip
    assert found.loops is not None
    outer, inner = found.loops
    assert (outer.depth, outer.outer, inner.depth, inner.outer) == (0, None, 1, 0)
    assert outer.counts == {"CONTROL": 2, "HMMA.16816": 1, "STS.128": 1}
    assert outer.always == {"CONTROL": 2, "HMMA.16816": 1}
    assert inner.counts == {"CONTROL": 1, "MUFU.EX2": 1}


def test_waits_moved_behind_the_end_are_no_loops_of_the_body() -> None:
    found = read(
        code(
            ".L_x_0", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2", "@!P0 BRA `(.L_x_3)",
            ".L_x_1", "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24",
            "@P1 BRA `(.L_x_0)", "EXIT",
            ".L_x_3", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2", "@!P0 BRA `(.L_x_3)",
            "BRA `(.L_x_1)",
        ),
        "mine",
    )  # fmt: skip
    assert found.loops is not None
    assert [(x.depth, x.is_wait) for x in found.loops] == [(0, False), (1, True)]
    assert found.loops[0].counts == {"CONTROL": 3, "HGMMA.64x128x16": 1, "SYNCS": 1}
    assert found.loops[1].counts == {"CONTROL": 1, "SYNCS": 1}


def test_a_loop_that_is_left_in_its_middle_is_one() -> None:
    found = read(
        code(".L_x_0", "FADD R1, R1, R2", "@P3 EXIT", "FMUL R1, R1, R2", "BRA `(.L_x_0)"), "mine"
    )
    assert found.loops is not None
    assert [x.counts for x in found.loops] == [{"CONTROL": 2, "FMA": 2}]


def test_an_indirect_branch_makes_loops_unknown() -> None:
    found = read(code(*LOOP[:-3], "BRX R4 -0x120", "EXIT"), "mine")
    assert found.loops is None and "BRX" in found.why_unknown
    assert found.counts["LDG.128"] == 1


def test_conditions_in_operands_do_not_end_a_block() -> None:
    found = read(
        code(".L_x_0", "FADD R1, R1, R2", "BRA.U UP0, `(.L_x_0)", "STG.E [R2.64], R1", "EXIT"),
        "mine",
    )
    assert found.loops is not None and found.counts["STG.32"] == 1
    assert found.loops[0].counts == {"CONTROL": 1, "FMA": 1}


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("LDG.E.U16", "LDG.16"),
        ("LDGSTS.E.BYPASS.LTC128B.128", "LDGSTS.128"),
        ("UTMALDG.2D", "UTMALDG"),
        ("UTCHMMA", "UTCHMMA"),
        ("UTCBAR", "CONTROL"),
        ("QGMMA.64x256x32.F32.E4M3.E4M3", "QGMMA.64x256x32"),
        ("HMMA.1688.F32.TF32", "HMMA.1688"),
        ("IMAD.MOV.U32", "FMA"),
        ("FFMA2", "FMA2"),
        ("UIADD3", "UNIFORM"),
        ("LDL.LU", "LDL"),
        ("STL.64", "STL"),
        ("F2FP.BF16.F32.PACK_AB", "ALU"),
        ("I2F.RP", "CONVERT"),
        ("STTM.x32", "STTM.x32"),
        ("STSM.16.M88.4", "STSM.4"),
        ("CALL.REL.NOINC", "CALL"),
    ],
)
def test_kinds(opcode: str, kind: str) -> None:
    assert kind_of(opcode) == kind
