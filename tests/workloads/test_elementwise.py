from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.dtypes import BF16, FP8, FP32, NVFP4
from hwmodels.errors import InputError, UnknownNameError
from tests.workloads.proof import assert_proved, proves
from workloads.machine import Machine
from workloads.op import ProvedOp
from workloads.ops import elementwise
from workloads.ops.adam import AdamStep
from workloads.ops.elementwise import FORMULAS, Elementwise, adam_step, cast, rope
from workloads.ops.rope import Rope

dtypes = st.sampled_from([BF16, FP8, FP32, NVFP4])
lengths = st.integers(1, 400)

generic = st.builds(
    Elementwise,
    num_elements=lengths,
    num_inputs=st.integers(0, 4),
    num_outputs=st.integers(1, 3),
    vector_flops_per_element=st.integers(0, 7),
    special_ops_per_element=st.integers(0, 3),
    dtype=dtypes,
    out_dtype=st.one_of(st.none(), dtypes),
)
helpers = st.sampled_from(
    [
        elementwise.silu_mul,
        elementwise.silu_mul_backward,
        elementwise.gelu,
        elementwise.gelu_backward,
        elementwise.add,
        elementwise.residual_add,
    ]
)
named = st.one_of(
    st.builds(lambda helper, n, dtype: helper(n, dtype), helpers, lengths, dtypes),
    st.builds(cast, lengths, dtypes, dtypes),
)
widths = st.sampled_from([1, 2, 4, 8])
adams = st.builds(
    adam_step, lengths, grad_bytes=widths, weight_bytes=st.sampled_from([0, 1, 2, 4]),
    moment_bytes=widths,
)  # fmt: skip
ropes = st.builds(
    rope, st.integers(1, 40), st.integers(1, 5), st.integers(1, 20).map(lambda half: 2 * half),
    dtypes,
)  # fmt: skip


@proves("elementwise")
@given(op=generic, fast_bytes=st.integers(64, 3000))
def test_the_stand_in_counts_what_is_declared(op: Elementwise, fast_bytes: int) -> None:
    assert_proved(op, fast_bytes)


@proves("elementwise")
@given(op=named, fast_bytes=st.integers(64, 3000), seed=st.integers(0, 99))
def test_named_maps_count_themselves(op: Elementwise, fast_bytes: int, seed: int) -> None:
    assert_proved(op, fast_bytes, seed=seed)


@proves("adam_step")
@given(op=adams, fast_bytes=st.integers(64, 3000), seed=st.integers(0, 99))
def test_adam_counts_itself(op: AdamStep, fast_bytes: int, seed: int) -> None:
    assert_proved(op, fast_bytes, seed=seed)


@proves("rope")
@given(op=ropes, fast_bytes=st.integers(320, 3000))
def test_rope_counts_itself(op: Rope, fast_bytes: int) -> None:
    assert_proved(op, fast_bytes)


@pytest.mark.parametrize("formula", FORMULAS)
def test_every_formula_is_reached_by_name(formula: str) -> None:
    stated = FORMULAS[formula]
    op = Elementwise(
        num_elements=100,
        num_inputs=stated.num_inputs,
        num_outputs=stated.num_outputs,
        vector_flops_per_element=stated.vector_flops,
        special_ops_per_element=stated.special_ops,
        formula=formula,
    )
    assert_proved(op, 100)


def test_a_wrong_flop_count_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    op = elementwise.gelu(50)
    wrong = dataclasses.replace(FORMULAS["gelu"], run=FORMULAS["cast"].run)
    monkeypatch.setitem(FORMULAS, "gelu", wrong)  # type: ignore[misc]
    with pytest.raises(AssertionError):
        assert_proved(op, 1000)


def test_adam_moves_28_bytes_per_parameter_in_the_usual_recipe() -> None:
    work = adam_step(1000).work(2**16)
    assert (work.read_bytes, work.write_bytes) == (14_000, 14_000)
    assert adam_step(1000, grad_bytes=4).work(2**16).bytes == 30_000
    assert adam_step(1000, grad_bytes=4, weight_bytes=0).work(2**16).bytes == 28_000


def test_adam_runs_in_less_fast_memory_than_it_has_parameters() -> None:
    op, machine = adam_step(1000), Machine(28 * 10)
    op.program(machine, op.inputs(np.random.default_rng(0)))
    assert machine.peak_bytes == 280


def test_arrays_agree_with_scalars() -> None:
    rng = np.random.default_rng(1)
    n, inputs, flops = rng.integers(1, 9000, 40), rng.integers(0, 5, 40), rng.random(40)
    many = Elementwise(num_elements=n, num_inputs=inputs, vector_flops_per_element=flops)
    heads = 2 * rng.integers(1, 64, 40)
    many_ropes, many_adams = rope(n, inputs + 1, heads), adam_step(n, grad_bytes=inputs + 1)
    for i in range(40):
        pairs: list[tuple[ProvedOp, ProvedOp]] = [
            (
                many,
                Elementwise(
                    num_elements=int(n[i]),
                    num_inputs=int(inputs[i]),
                    vector_flops_per_element=float(flops[i]),
                ),
            ),
            (many_ropes, rope(int(n[i]), int(inputs[i]) + 1, int(heads[i]))),
            (many_adams, adam_step(int(n[i]), grad_bytes=int(inputs[i]) + 1)),
        ]
        for array, scalar in pairs:
            got, one = array.work(2**12), scalar.work(2**12)
            assert np.asarray(got.vector_flops)[i] == one.vector_flops
            assert np.asarray(got.bytes)[i] == one.bytes
            assert np.asarray(array.compulsory_bytes())[i] == scalar.compulsory_bytes()


@settings(max_examples=200, deadline=None)
@given(op=st.one_of(generic, named), more=st.integers(1, 100))
def test_more_elements_are_more_work(op: Elementwise, more: int) -> None:
    less, grown = op.work(2**12), op.over(num_elements=op.num_elements + more).work(2**12)
    assert grown.bytes > less.bytes
    assert grown.vector_flops >= less.vector_flops
    assert grown.special_ops >= less.special_ops


@pytest.mark.parametrize("bad", [0, -4, 2.5, float("nan"), float("inf"), 2**60, "many"])
def test_bad_sizes_are_refused(bad: object) -> None:
    with pytest.raises(InputError, match="elementwise: num_elements = "):
        Elementwise(num_elements=bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="adam_step: num_parameters = "):
        adam_step(bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="rope: num_heads = "):
        rope(8, bad, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [-1, float("nan"), float("inf"), "some", [1, -2]])
@pytest.mark.parametrize(
    "field", ["num_inputs", "vector_flops_per_element", "special_ops_per_element"]
)
def test_bad_counts_per_element_are_refused(field: str, bad: object) -> None:
    with pytest.raises(InputError, match=f"elementwise: {field} = "):
        Elementwise(num_elements=8, **{field: bad})  # type: ignore[arg-type]


def test_half_an_input_is_refused_but_half_a_flop_is_an_average() -> None:
    with pytest.raises(InputError, match=r"num_inputs = 0\.5 must be a whole number"):
        Elementwise(num_elements=8, num_inputs=0.5)
    op = Elementwise(num_elements=8, vector_flops_per_element=0.5)
    assert op.work(100).vector_flops == 4
    with pytest.raises(InputError, match="whole vector_flops_per_element"):
        op.program(Machine(100), op.inputs(np.random.default_rng(0)))


def test_a_formula_keeps_its_own_counts() -> None:
    with pytest.raises(InputError, match="gelu has vector_flops_per_element = 7, not 3"):
        elementwise.gelu(8).over(vector_flops_per_element=3)
    with pytest.raises(UnknownNameError, match="gelu"):
        Elementwise(num_elements=8, formula="gellu")


def test_odd_heads_cannot_rotate() -> None:
    with pytest.raises(InputError, match="head_dim = 7 must be even"):
        rope(8, 2, 7)


def test_unknown_widths_have_counts_but_no_program() -> None:
    op = adam_step(8, grad_bytes=3)
    assert op.work(100).read_bytes == 8 * 15
    with pytest.raises(InputError, match="no format is 3 bytes wide"):
        op.program(Machine(100), op.inputs(np.random.default_rng(0)))


@pytest.mark.parametrize("op", [elementwise.add(8), adam_step(8), rope(8, 2, 8)])
def test_too_small_a_fast_memory_is_refused(op: ProvedOp) -> None:
    with pytest.raises(InputError, match="cannot hold"):
        op.work(4)
