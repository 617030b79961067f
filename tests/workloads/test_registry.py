from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from hwmodels.dtypes import FP16
from hwmodels.errors import InputError, UnknownNameError
from tests.workloads.proof import LEAST_SHAPES, PROOFS
from workloads import registry
from workloads.op import Op, ProvedOp


@pytest.mark.parametrize("name", registry.names())
def test_every_entry_imports_and_names_itself(name: str) -> None:
    found = registry.op_class(name)
    assert issubclass(found, Op)
    assert found.name == name
    assert registry.status(name) == ("proved" if issubclass(found, ProvedOp) else "derived")
    assert registry.summary(name)
    assert all(p.kind in ("length", "size", "fraction", "dtype", "flag", "text")
               for p in registry.params(name).values())  # fmt: skip


@pytest.mark.parametrize(
    "name", [name for name in registry.names() if registry.status(name) == registry.PROVED]
)
def test_every_proved_op_has_its_proof_over_many_shapes(name: str) -> None:
    for path in Path(__file__).parent.glob("test_*.py"):
        if "@proves(" in path.read_text(encoding="utf-8"):
            import_module(f"{__package__}.{path.stem}")
    assert PROOFS[name] >= LEAST_SHAPES


@pytest.mark.parametrize(
    ("op", "field", "kind"),
    [
        ("attention", "num_kv_heads", "size"),
        ("flash_attention_2", "len_kv", "length"),
        ("flash_attention_2_backward", "head_dim_v", "size"),
        ("fft_convolution", "len_filter", "length"),
    ],
)
def test_a_size_that_may_be_left_out_is_still_a_size(op: str, field: str, kind: str) -> None:
    param = registry.params(op)[field]
    assert (param.kind, param.required, param.default) == (kind, False, None)


def test_names_fold_case_hyphens_and_underscores() -> None:
    assert registry.resolve("Flash-Attention_2") == "flash_attention_2"
    assert registry.op_class("MATMUL").name == "matmul"


def test_an_unknown_op_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean softmax"):
        registry.op_class("softmaxx")


def test_a_listed_system_without_a_model_says_so() -> None:
    with pytest.raises(InputError, match="lra is listed but not modelled yet"):
        registry.op_class("lra")


@pytest.mark.parametrize(
    ("op", "word", "fields"),
    [
        ("attention", "heads", ("num_heads",)),
        ("attention", "kv-heads", ("num_kv_heads",)),
        ("attention", "seq", ("len_q", "len_kv")),
        ("attention", "seq_q", ("len_q",)),
        ("attention", "dim", ("head_dim",)),
        ("attention", "batch", ("batch",)),
        ("mamba_scan", "seq", ("len_seq",)),
        ("mamba_scan", "state", ("state_dim",)),
        ("mamba_scan", "channels", ("channels",)),
        ("softmax", "dim", ("cols",)),
        ("embedding", "tokens", ("num_tokens",)),
        ("rope", "seq", ("num_tokens",)),
        ("rope", "heads", ("num_heads",)),
        ("rope", "dim", ("head_dim",)),
        ("adam_step", "params", ("num_parameters",)),
        ("adam_step", "parameters", ("num_parameters",)),
        ("matmul", "K", ("k",)),
    ],
)
def test_words_mean_fields(op: str, word: str, fields: tuple[str, ...]) -> None:
    assert registry.fields_meant(op, word) == fields


def test_an_unknown_parameter_suggests_or_lists_the_ops_own() -> None:
    with pytest.raises(UnknownNameError, match=r"attention parameter 'head'.*heads"):
        registry.fields_meant("attention", "head")
    with pytest.raises(UnknownNameError, match="it has m, n, k, batch"):
        registry.fields_meant("matmul", "zzzz")


def test_build_makes_the_op_or_lists_everything_missing() -> None:
    op = registry.build("matmul", {"m": 2, "n": 3, "k": 4, "dtype": FP16})
    assert op.compulsory_bytes() == (8 + 12 + 6) * 2
    with pytest.raises(InputError) as caught:
        registry.build("attention", {"batch": 1})
    assert str(caught.value) == (
        "attention needs num_heads, len_q, head_dim; give -p heads=... -p seq=... -p dim=..."
    )


def test_the_published_systems_are_all_listed_once_and_their_ops_exist() -> None:
    systems = registry.systems()
    assert len(systems) == 124
    assert len({s.id for s in systems}) == 124
    assert all(s.title and s.family and s.paper for s in systems)
    backing = {s.id: s.op for s in systems if s.op}
    assert set(backing.values()) <= set(registry.names())
    assert backing["mamba_scan"] == "mamba_scan"
    statuses = {s.id: registry.system_status(s) for s in systems}
    assert statuses["flashfftconv"] == "proved"
    assert statuses["hydragen"] == "proved"
    assert statuses["lra"] == "not yet"
