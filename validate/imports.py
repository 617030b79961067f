"""Others' measurements as records: the public CSV schema, and the parquet layout of aiconfigurator.

A CSV file (source,gpu,op,dtype,params,latency_us, or that of collectives; `validate.measurement`)
keeps its columns. A parquet file of aiconfigurator's `systems/data/<system>/<framework>/<version>`
is told by its columns; latencies there are milliseconds, sizes of NCCL rows elements:

    gemm_perf                  gemm_dtype, m, n, k
    context_attention_perf     attn_dtype, kv_cache_dtype, batch_size, isl, num_heads,
                               num_key_value_heads, head_dim, window_size       (causal)
    generation_attention_perf  the same, with step: keys are isl + step
    moe_perf                   moe_dtype, num_tokens, hidden_size, inter_size, topk, num_experts,
                               moe_tp_size, moe_ep_size, distribution
    nccl_perf                  nccl_dtype, num_gpus, op_name, message_size

beside framework, version, device, kernel_source and latency in each. Rows of other forms, formats
that have no name here, and mixed formats of which a table does not say what is computed in which
(bf16 queries over an fp8 cache in a prompt) are refused and counted, never guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from hwmodels.errors import InputError
from validate.measurement import Measurement, csv_files, read
from validate.record import IMPORTED, UNKNOWN, Case, Environment, Record
from validate.recorded import COLLECTIVES

Row = Mapping[str, Any]

FORMATS: Final[Mapping[str, str]] = MappingProxyType({
    "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "fp8": "fp8", "fp8_static": "fp8",
    "fp8_block": "fp8_block", "nvfp4": "nvfp4", "int8_wo": "int8_wo", "int4_wo": "int4_wo",
    "sq": "int8_smoothquant", "w4a16_mxfp4": "w4a16_mxfp4",
    "w4a8_mxfp4_mxfp8": "w4a8_mxfp4_mxfp8",
})  # fmt: skip
"""aiconfigurator's names of formats, and the public ones."""
NCCL_FORMATS: Final = {"half": 2, "int8": 1}
"""Bytes of an element of its NCCL rows."""
NCCL_OPS: Final = {"alltoall": "all_to_all", "all_to_all": "all_to_all"}
MOE_OPS: Final = ("moe_ffn_gated", "moe_ffn_nongated")
COMMON: Final = ("framework", "version", "device", "kernel_source", "latency")


class _Refused(Exception):
    """A row that cannot be taken; carries the reason."""


@dataclass(frozen=True, slots=True)
class Imported:
    """Records of a file, and how many of its rows were refused for each reason."""

    records: tuple[Record, ...]
    refused: Mapping[str, int]


def imported(path: Path, gpu: str = "") -> Imported:
    """The records of a file, or of a folder's CSV and parquet files.

    `gpu` names the device of parquet files whose rows name none that is known. Raises `InputError`
    where nothing can be read.
    """
    tables = sorted(path.rglob("*.parquet")) if path.is_dir() else []
    if path.suffix == ".parquet":
        tables = [path]
    found = [_of_table(_rows(table), table.stem, gpu) for table in tables]
    if not tables or (path.is_dir() and list(path.glob("*.csv"))):
        found += [_of_csv(file) for file in csv_files(path)]
    refused: dict[str, int] = {}
    for part in found:
        for reason, count in part.refused.items():
            refused[reason] = refused.get(reason, 0) + count
    return Imported(tuple(r for part in found for r in part.records), refused)


def _of_csv(file: Path) -> Imported:
    """A file of the public schema."""
    readings = read(file)
    refused: dict[str, int] = {}
    for refusal in readings.refused:
        refused[refusal.reason] = refused.get(refusal.reason, 0) + 1
    records = []
    for row in readings.rows:
        if row.seconds is None or "parallelism" in row.params:
            reason = "a whole step is no kernel"
            refused[reason] = refused.get(reason, 0) + 1
        else:
            records.append(record_of(row))
    return Imported(tuple(records), refused)


def record_of(row: Measurement) -> Record:
    """A published row as a record; what it does not state stays unknown."""
    assert row.seconds is not None
    return Record(
        case=Case(op=row.op, dtype=row.dtype, params=dict(row.params)),
        environment=Environment(
            gpu=row.gpu,
            sm_clock_hz=None,
            memory_clock_hz=None,
            driver=UNKNOWN,
            versions={},
            l2_state=UNKNOWN,
        ),
        seconds=row.seconds,
        repetitions=1,
        spread_frac=0.0,
        measured_at=UNKNOWN,
        kernel=row.op,
        implementation=row.source,
        flags=(IMPORTED,),
        row={"family": row.family, "op": row.op, "params": dict(row.params)},
        source=row.source,
    )


def _rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a parquet file; one line says which package reads them."""
    try:
        pandas = import_module("pandas")
        import_module("pyarrow")
    except ImportError as error:
        raise InputError(
            f"{file}: parquet needs {error.name}: pip install pandas pyarrow, "
            "or turn the file into the CSV schema"
        ) from None
    try:
        table = pandas.read_parquet(file)
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        raise InputError(f"{file}: is no parquet file that can be read ({line})") from None
    return [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]


def _of_table(rows: Sequence[Row], name: str, gpu: str) -> Imported:
    """Rows of aiconfigurator's layout."""
    kind = next((k for k in KINDS if k.fits(rows[0])), None) if rows else None
    if kind is None:
        return Imported((), {f"{name}: no known table" if rows else f"{name}: no row": len(rows)})
    records: list[Record] = []
    refused: dict[str, int] = {}
    for row in rows:
        try:
            records.append(record_of(kind.measurement(row, gpu)))
        except _Refused as why:
            refused[str(why)] = refused.get(str(why), 0) + 1
        except (KeyError, TypeError, ValueError):
            reason = f"{name}: a cell is missing or no number"
            refused[reason] = refused.get(reason, 0) + 1
    return Imported(tuple(records), refused)


@dataclass(frozen=True, slots=True)
class _Kind:
    """One table: the columns that tell it, its family, and op, format, params of a row."""

    family: str
    columns: tuple[str, ...]
    read: Callable[[Row], tuple[str, str, dict[str, Any]]]

    def fits(self, row: Row) -> bool:
        """Has the row these columns?"""
        return set(self.columns) <= row.keys()

    def measurement(self, row: Row, gpu: str) -> Measurement:
        """The row under its public name."""
        op, dtype, params = self.read(row)
        seconds = float(row["latency"]) * 1e-3
        if not (math.isfinite(seconds) and seconds > 0):
            raise _Refused("the latency is not a positive number")
        kernel = _text(row, "kernel_source")
        source = "/".join(filter(None, ("aic", f"{_text(row, 'framework').lower()}-"
                                        f"{_text(row, 'version')}", kernel)))  # fmt: skip
        if self.family == COLLECTIVES:
            source = f"aic/nccl-{_text(row, 'version')}/{dtype}"
        return Measurement(
            family=FAMILIES.get(op, self.family),
            source=source,
            gpu=gpu or _text(row, "device"),
            device_id="",
            op=op,
            dtype="" if self.family == COLLECTIVES else dtype,
            params=params,
            seconds=seconds,
        )


def _gemm(row: Row) -> tuple[str, str, dict[str, int]]:
    return "gemm", _format(row["gemm_dtype"]), _sizes(row, {"m": "m", "n": "n", "k": "k"})


_HEADS: Final = {
    "batch": "batch_size", "heads_q": "num_heads", "heads_kv": "num_key_value_heads",
    "head_dim": "head_dim",
}  # fmt: skip


def _attention(row: Row, len_q: int, len_kv: int) -> dict[str, int]:
    sizes = _sizes({**row, "num_key_value_heads": _whole(row["num_key_value_heads"], 0)
                    or row["num_heads"]}, _HEADS)  # fmt: skip
    found = {**sizes, "seq_q": len_q, "seq_kv": len_kv, "causal": 1}
    window = _whole(row.get("window_size", 0) or 0, 0)
    return {**found, "window": window} if window else found


def _prefill(row: Row) -> tuple[str, str, dict[str, int]]:
    dtype, cache = _format(row["attn_dtype"]), _format(row["kv_cache_dtype"])
    if dtype != cache:
        raise _Refused(f"a prompt in {dtype} over a cache in {cache} does not say what computes")
    length = _whole(row["isl"])
    return "attn_prefill", dtype, _attention(row, length, length)


def _decode(row: Row) -> tuple[str, str, dict[str, int]]:
    if _text(row, "framework").lower() == "trtllm" and _version(row) < SOUND_DECODE:
        raise _Refused(K_ONLY)
    dtype, cache = _format(row.get("attn_dtype", "bfloat16")), _format(row["kv_cache_dtype"])
    label = dtype if dtype == cache else f"{dtype}_{cache}kv"
    if label not in ("bf16", "fp16", "fp8", "bf16_fp8kv"):
        raise _Refused(f"queries in {dtype} over a cache in {cache} have no name here")
    if _whole(row.get("beam_width", 1) or 1) != 1:
        raise _Refused("beams share their cache; only one beam is taken")
    return "attn_decode", label, _attention(row, 1, _whole(row["isl"]) + _whole(row["step"], 0))


SOUND_DECODE: Final = (1, 3, 0, 20)
K_ONLY: Final = "TensorRT-LLM decode before 1.3.0rc20 was timed over a cache without values"
"""aiconfigurator's collector allocated such a cache until 2026-08-03 (its history)."""


def _version(row: Row) -> tuple[int, ...]:
    """The numbers of a version; a release is later than its candidates.

    >>> _version({"version": "1.3.0rc20"}), _version({"version": "1.0.0"})
    ((1, 3, 0, 20), (1, 0, 0, 1000000))
    """
    numbers = [int(n) for n in re.findall(r"[0-9]+", _text(row, "version"))[:4]]
    return (*numbers, *([0] * (3 - len(numbers))), *([10**6] if len(numbers) < 4 else []))


def _moe(row: Row) -> tuple[str, str, dict[str, Any]]:
    op = str(row.get("op_name", ""))
    gated = MOE_OPS[1] if "nongated" in op or "relu2" in op else MOE_OPS[0]
    sizes = _sizes(row, {
        "tokens": "num_tokens", "hidden": "hidden_size", "inter": "inter_size", "topk": "topk",
        "experts": "num_experts", "tp": "moe_tp_size", "ep": "moe_ep_size",
    })  # fmt: skip
    return gated, _format(row["moe_dtype"]), {**sizes, "dist": str(row["distribution"])}


def _nccl(row: Row) -> tuple[str, str, dict[str, int]]:
    dtype, op = str(row["nccl_dtype"]), str(row["op_name"])
    if dtype not in NCCL_FORMATS:
        raise _Refused(f"the format '{dtype[:20]}' has no name here")
    size = _whole(row["message_size"]) * NCCL_FORMATS[dtype]
    return NCCL_OPS.get(op, op), dtype, {"nodes": 1, "gpus": _whole(row["num_gpus"]), "bytes": size}


def _attention_row(row: Row) -> tuple[str, str, dict[str, Any]]:
    """A prompt or one new token: both tables have the same columns, `op_name` tells them apart."""
    op = str(row["op_name"])
    if op == "context_attention":
        return _prefill(row)
    if op == "generation_attention":
        return _decode(row)
    raise _Refused(f"op_name '{op[:30]}' has no name here")


KINDS: Final = (
    _Kind("gemm", (*COMMON, "gemm_dtype", "m", "n", "k"), _gemm),
    _Kind("attention", (*COMMON, "op_name", "kv_cache_dtype", "isl", "head_dim"), _attention_row),
    _Kind("moe", (*COMMON, "moe_dtype", "num_tokens", "moe_ep_size"), _moe),
    _Kind(COLLECTIVES, ("version", "latency", "nccl_dtype", "message_size", "num_gpus"), _nccl),
)
FAMILIES: Final = {"attn_prefill": "attention_prefill", "attn_decode": "attention_decode"}
"""Families of ops whose table holds more than one."""


def _format(name: object) -> str:
    found = FORMATS.get(str(name))
    if found is None:
        raise _Refused(f"the format '{str(name)[:20]}' has no name here")
    return found


def _sizes(row: Row, names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: _whole(row[theirs]) for ours, theirs in names.items()}


def _whole(value: Any, least: int = 1) -> int:
    number = float(value)
    if number != int(number) or number < least:
        raise _Refused("a size is not a whole number")
    return int(number)


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    return "" if value is None or value != value else str(value).strip()
