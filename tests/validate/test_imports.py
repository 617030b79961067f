"""Others' tables become records with the names of the public schema; the rest is counted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from hwmodels.errors import InputError
from tests.synthetic import gemm_rows, write_rows
from validate import imports
from validate.imports import Imported, imported
from validate.recorded import measurements

COMMON = {
    "framework": "VLLM",
    "version": "0.24.0",
    "device": "NVIDIA H200",
    "op_name": "gemm",
    "kernel_source": "vllm_default",
    "latency": 0.05,
}
ATTENTION = {
    **COMMON,
    "op_name": "context_attention",
    "kernel_source": "vllm_flash_attn_fa3",
    "batch_size": 4,
    "isl": 2048,
    "num_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "beam_width": 1,
    "attn_dtype": "bfloat16",
    "kv_cache_dtype": "bfloat16",
    "step": 0,
}
DECODE = {**ATTENTION, "op_name": "generation_attention", "isl": 1, "step": 4095}
GEMM = {**COMMON, "gemm_dtype": "bfloat16", "m": 64, "n": 4096, "k": 1024}
MOE = {
    **COMMON,
    "op_name": "moe",
    "moe_dtype": "fp8_block",
    "num_tokens": 512,
    "hidden_size": 7168,
    "inter_size": 2048,
    "topk": 8,
    "num_experts": 256,
    "moe_tp_size": 1,
    "moe_ep_size": 8,
    "distribution": "power_law_1.2",
}
NCCL = {
    "version": "2.29.2",
    "device": "NVIDIA H200",
    "nccl_dtype": "half",
    "num_gpus": 8,
    "message_size": 1024,
    "op_name": "alltoall",
    "latency": 0.02,
}


def table(*rows: dict[str, Any]) -> Imported:
    return imports._of_table(rows, "table", "")


def test_a_product() -> None:
    (record,) = table(GEMM).records
    (row,) = measurements([record])
    assert (row.family, row.op, row.dtype) == ("gemm", "gemm", "bf16")
    assert row.params == {"m": 64, "n": 4096, "k": 1024} and row.device_id == "h200-sxm"
    assert row.source == "aic/vllm-0.24.0/vllm_default"
    assert row.seconds == pytest.approx(5e-5)
    assert record.flags == ("imported",) and record.environment.l2_state == "unknown"


def test_prompts_and_tokens() -> None:
    prompt, token = measurements(table(ATTENTION, DECODE).records)
    assert (prompt.family, prompt.op) == ("attention_prefill", "attn_prefill")
    assert prompt.params == {
        "batch": 4, "heads_q": 32, "heads_kv": 8, "head_dim": 128, "seq_q": 2048,
        "seq_kv": 2048, "causal": 1,
    }  # fmt: skip
    assert (token.family, token.op) == ("attention_decode", "attn_decode")
    assert (token.params["seq_q"], token.params["seq_kv"]) == (1, 4096)


def test_fields_that_say_more() -> None:
    (row,) = measurements(table({**DECODE, "kv_cache_dtype": "fp8", "window_size": 128}).records)
    assert row.dtype == "bf16_fp8kv" and row.params["window"] == 128
    (all_heads,) = measurements(table({**ATTENTION, "num_key_value_heads": 0}).records)
    assert all_heads.params["heads_kv"] == 32


def test_experts_and_collectives() -> None:
    (experts,) = measurements(table(MOE).records)
    assert experts.op == "moe_ffn_gated" and experts.dtype == "fp8_block"
    assert experts.params["ep"] == 8 and experts.params["dist"] == "power_law_1.2"
    (exchange,) = measurements(table(NCCL).records)
    assert (exchange.family, exchange.op, exchange.dtype) == ("collectives", "all_to_all", "")
    assert exchange.params == {"nodes": 1, "gpus": 8, "bytes": 2048}  # elements of two bytes
    assert exchange.source == "aic/nccl-2.29.2/half"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**GEMM, "gemm_dtype": "awq"}, "the format 'awq' has no name here"),
        ({**GEMM, "m": 0}, "a size is not a whole number"),
        ({**GEMM, "latency": 0.0}, "the latency is not a positive number"),
        ({**GEMM, "n": None}, "a cell is missing or no number"),
        ({**ATTENTION, "kv_cache_dtype": "fp8"}, "does not say what computes"),
        ({**DECODE, "beam_width": 4}, "only one beam"),
        ({**DECODE, "framework": "TRTLLM", "version": "1.2.0"}, "a cache without values"),
        ({**ATTENTION, "op_name": "encoder"}, "op_name 'encoder'"),
        ({"odd": 1}, "no known table"),
    ],
)
def test_what_cannot_be_told_is_counted_with_its_reason(row: dict[str, Any], said: str) -> None:
    found = table(row)
    assert not found.records
    ((reason, count),) = found.refused.items()
    assert said in reason and count == 1


def test_decode_of_a_sound_release_is_taken() -> None:
    assert table({**DECODE, "framework": "TRTLLM", "version": "1.3.0rc20"}).records
    assert table({**DECODE, "framework": "TRTLLM", "version": "1.3.0"}).records


def test_the_public_schema_comes_back_as_it_was(tmp_path: Path) -> None:
    rows = gemm_rows(count=12)
    found = imported(write_rows(tmp_path / "kernels_gemm.csv", rows))
    back = measurements(found.records)
    assert [(r.source, r.gpu, r.op, r.dtype, dict(r.params)) for r in back] == [
        (r.source, r.gpu, r.op, r.dtype, dict(r.params)) for r in rows
    ]
    assert [r.seconds for r in back] == pytest.approx([r.seconds for r in rows])
    assert imported(tmp_path).records == found.records


def test_steps_are_no_kernels(tmp_path: Path) -> None:
    (tmp_path / "steps_training.csv").write_text(
        "source,gpu,n_gpus,model,parallelism,precision,metric,value\n"
        "x,H100-SXM-80GB,8,{},{},bf16,step_time_s,1.0\n"
        "x,Z9,8,{},{},bf16,step_time_s,1.0\n"
    )
    found = imported(tmp_path)
    assert not found.records
    assert set(found.refused) == {"a whole step is no kernel", "the GPU is in no catalogue"}


def test_parquet_names_the_package_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "gemm_perf.parquet"
    file.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError) as why:
        imported(file)
    assert "pip install pandas pyarrow" in str(why.value) and "\n" not in str(why.value)


def test_parquet_is_read_through_pandas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "gemm_perf.parquet"
    file.write_bytes(b"PAR1")

    class Table:
        def to_dict(self, orient: str) -> list[dict[str, Any]]:
            return [GEMM, {**GEMM, "m": -1}]

    class Pandas:
        @staticmethod
        def read_parquet(path: Path) -> Table:
            if path.name.startswith("broken"):
                raise ValueError("no magic\nbytes")
            return Table()

    fakes = {"pandas": Pandas, "pyarrow": object()}
    monkeypatch.setattr(imports, "import_module", fakes.__getitem__)
    found = imported(tmp_path)
    assert len(found.records) == 1 and sum(found.refused.values()) == 1
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"")
    with pytest.raises(InputError, match="no parquet file that can be read"):
        imported(broken)
