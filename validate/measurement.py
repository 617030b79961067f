"""Published measurements: three CSV schemas, read strictly, nothing dropped in silence.

A row that cannot be believed (broken JSON, a negative size, a GPU nobody knows) becomes a
`Refusal` with its line and its reason; a file that cannot be read raises one `InputError`.

    kernels      source,gpu,op,dtype,params,latency_us               params is a JSON object
    collectives  source,gpu,nodes,gpus,collective,bytes,latency_us
    steps        source,gpu,n_gpus,model,parallelism,precision,metric,value

Rows that are to be predicted and not compared may leave latency_us empty, or the file the column.

The family of a row is its file's name without `kernels_`.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NoReturn, TypeAlias

from hwmodels import catalog, dtypes
from hwmodels.errors import InputError

KERNELS = ("source", "gpu", "op", "dtype", "params", "latency_us")
COLLECTIVES = ("source", "gpu", "nodes", "gpus", "collective", "bytes", "latency_us")
STEPS = ("source", "gpu", "n_gpus", "model", "parallelism", "precision", "metric", "value")

NO_DEVICES: Final[Mapping[str, str]] = MappingProxyType({})
MAX_LINES: Final = 50
"""Most lines that one record may span."""
_OPEN_QUOTE: Final = "unexpected end of data"
UNKNOWN_GPU: Final = "the GPU is in no catalogue"

TIME_UNITS_S = {"_s": 1.0, "_ms": 1e-3, "_us": 1e-6}
"""Endings of a step metric that make it a time, with their seconds."""

COMPOUND_DTYPES = frozenset({
    "amp_bf16", "bf16->fp8", "bf16_fp8kv", "bf16_kvbf16", "bf16_kvfp8",
    "fp16_fp32math", "fp16_mixed", "fp8-cs", "fp8-mx", "fp8_block", "fp8_linear",
    "fp8_matmul_only", "fp8_rowwise", "fp8_tensorwise", "int4_wo", "int8_smoothquant", "int8_wo",
    "unknown", "unknown16", "w4a16_mxfp4", "w4a8_mxfp4_mxfp8",
})  # fmt: skip
"""Labels that publishers use for more than one number format at once, or for a scaling recipe."""

_MAPS = ("add", "add_scalar", "mul", "div", "pow", "relu", "tanh", "gelu", "silu_and_mul")
_ROWS_COLS = ("rows", "cols", "elements")
_ATTENTION = ("batch", "heads_q", "heads_kv", "head_dim", "seq_q", "seq_kv")
_MOE = ("tokens", "hidden", "inter", "topk", "experts", "tp", "ep")
_GDN = ("batch", "seq", "d_conv", "heads_k", "dk", "heads_v", "dv")
_MAMBA = ("batch", "seq", "d_conv", "d_state", "heads", "head_dim", "groups", "chunk")
SIZES: Mapping[str, tuple[str, ...]] = {
    "gemm": ("m", "n", "k"),
    "bmm": ("batch", "m", "n", "k"),
    "attn_prefill": _ATTENTION,
    "attn_prefill_noncausal": _ATTENTION,
    "attn_fwd": _ATTENTION,
    "attn_fwd_bwd": _ATTENTION,
    "attn_decode": _ATTENTION,
    "mla_decode": ("batch", "heads_q", "seq_q", "seq_kv", "kv_lora", "rope_dim"),
    **dict.fromkeys(("moe_ffn_gated", "moe_ffn_nongated"), _MOE),
    "softmax": _ROWS_COLS,
    "layernorm": _ROWS_COLS,
    "rmsnorm": _ROWS_COLS,
    **dict.fromkeys((*_MAPS, "quantize_bf16_to_fp8_static"), ("elements",)),
    "rope": ("tokens", "heads_q", "heads_kv", "head_dim"),
    **dict.fromkeys(
        ("rnn_fwd", "rnn_bwd_data", "rnn_bwd_weight", "rnn_bwd_all"),
        ("hidden", "batch", "timesteps"),
    ),
    **dict.fromkeys(
        ("conv2d_fwd", "conv2d_bwd_data", "conv2d_bwd_weight"),
        ("n", "c", "h", "w", "k", "r", "s", "stride_h", "stride_w"),
    ),
    "embedding": ("tokens", "hidden", "vocab_shard"),
    **dict.fromkeys(
        (
            "gdn_context_causal_conv1d_fn",
            "gdn_generation_causal_conv1d_update",
            "gdn_context_chunk_gated_delta_rule",
            "gdn_context_chunk_gated_delta_rule_flashinfer",
            "gdn_context_chunk_gated_delta_rule_triton",
            "gdn_generation_fused_recurrent_gated_delta_rule",
            "gdn_generation_fused_recurrent_gated_delta_rule_packed_decode",
        ),
        _GDN,
    ),
    **dict.fromkeys(
        (
            "mamba2_context_causal_conv1d_fn",
            "mamba2_generation_causal_conv1d_update",
            "mamba2_context_mamba_chunk_scan_combined",
        ),
        _MAMBA,
    ),
    "depthwise_conv1d_fwd": ("batch", "seq", "d_model", "kernel"),
    "fftconv_gated_fwd": ("batch", "seq", "d_model"),
}
"""Sizes that an op's params must hold, each a whole number from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One published time. `seconds` is None where the row states a rate and no time.

    `gpu` is the name as published, `device_id` the catalogue's id for it or a device file.
    `seconds` is NaN in a row yet to be timed, which only `records(need_seconds=False)` lets by.
    """

    family: str
    source: str
    gpu: str
    device_id: str
    op: str
    dtype: str
    params: Mapping[str, Any]
    seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A row that could not be believed: where it stands and why it was refused."""

    family: str
    gpu: str
    op: str
    dtype: str
    file: str
    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class Readings:
    """Everything a set of files held: rows and refused rows, which add up to the lines read."""

    rows: tuple[Measurement, ...] = ()
    refused: tuple[Refusal, ...] = ()

    def __add__(self, other: Readings) -> Readings:
        return Readings(self.rows + other.rows, self.refused + other.refused)


@dataclass(frozen=True, slots=True)
class Line:
    """One record of a CSV file: the number of its last line, its cells, its text as it stands.

    `problem` says why the text is not CSV; there are no cells then.
    """

    number: int
    cells: tuple[str, ...]
    text: str
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Records:
    """A file in its order: the header, and every later line with what was made of it.

    A blank line is made nothing of (None).
    """

    columns: tuple[str, ...]
    header: Line
    lines: tuple[tuple[Line, Measurement | Refusal | None], ...]


class _Refused(Exception):
    """Raised while one row is parsed; carries the reason."""


def csv_files(path: Path, family: str | None = None) -> tuple[Path, ...]:
    """The CSV files at `path` (a file, or a folder's own), of one family if that is given."""
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(path.glob("*.csv"))
    else:
        raise InputError(f"{path}: no such file or folder; give a CSV file or a folder of them")
    if not files:
        raise InputError(f"{path}: holds no .csv file; give a folder of measurement files")
    kept = tuple(f for f in files if family in (None, family_of(f)))
    if not kept:
        known = ", ".join(sorted({family_of(f) for f in files}))
        raise InputError(f"{path}: no family '{family}'; it has {known}")
    return kept


def family_of(path: Path) -> str:
    """The family a file belongs to: its name without `kernels_` and the extension.

    >>> family_of(Path("kernels_gemm.csv")), family_of(Path("collectives.csv"))
    ('gemm', 'collectives')
    """
    return path.stem.removeprefix("kernels_")


def read(path: Path, devices: Mapping[str, str] = NO_DEVICES) -> Readings:
    """Every row of one file; raises `InputError` where the file as a whole makes no sense."""
    made = [m for _, m in records(path, devices).lines]
    return Readings(
        rows=tuple(m for m in made if isinstance(m, Measurement)),
        refused=tuple(m for m in made if isinstance(m, Refusal)),
    )


def records(
    path: Path, devices: Mapping[str, str] = NO_DEVICES, *, need_seconds: bool = True
) -> Records:
    """One file line by line; raises `InputError` where it makes no sense as a whole.

    `devices` gives GPU names of the file a meaning: a device's id or the path of its file.
    Without `need_seconds` a row may leave its latency_us empty, or the file the column.
    """
    lines = _lines(path)
    header = next(lines, Line(0, (), ""))
    _check_csv(path, [header])
    columns = tuple(cell.strip() for cell in header.cells)
    known = _PARSERS if need_seconds else {**_PARSERS, **_UNTIMED}
    if columns not in known:
        shown = ",".join(columns)[:60] or "nothing"
        raise InputError(
            f"{path}: line 1 holds {shown!r}, not a known header; "
            f"kernel files start with {','.join(KERNELS)}"
        )
    parse, reader = known[columns], _Reader(family_of(path), devices, need_seconds)
    found = tuple((line, _made(reader, parse, path, columns, line)) for line in lines)
    _check_csv(path, [line for line, made in found if made])
    if not any(made for _, made in found):
        raise InputError(f"{path}: a header and no rows; add rows or leave the file out")
    return Records(columns, header, found)


def _made(
    reader: _Reader, parse: _Parse, path: Path, columns: Sequence[str], line: Line
) -> Measurement | Refusal | None:
    """What a line says, or why it is not believed."""
    cells = line.cells
    if not cells and not line.problem:
        return None
    try:
        if line.problem:
            _refuse("the row is not CSV: put params between double quotes, double those inside")
        if len(cells) != len(columns):
            few = len(cells) < len(columns)
            _refuse(f"the row has too {'few' if few else 'many'} fields")
        return parse(reader, dict(zip(columns, cells, strict=True)))
    except _Refused as why:
        return _refusal(reader.family, path, line.number, columns, cells, str(why))


def _check_csv(path: Path, lines: Sequence[Line]) -> None:
    """A file without a single line of CSV is none."""
    if lines and all(line.problem for line in lines):
        raise InputError(
            f"{path}: line {lines[0].number} is not CSV ({lines[0].problem}); "
            "put params between double quotes and double the quotes inside"
        )


def _lines(path: Path) -> Iterator[Line]:
    """The records of a CSV file; one may span lines."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if not text.strip():
        raise InputError(f"{path}: is empty; a kernel file starts with {','.join(KERNELS)}")
    lines = list(io.StringIO(text, newline=""))
    at = 0
    while at < len(lines):
        line = _record(lines, at)
        at = line.number
        yield line


def _record(lines: Sequence[str], at: int) -> Line:
    """The record that begins at a line; that line alone, with its problem, where it is not CSV."""
    problem = ""
    for end in range(at + 1, min(at + MAX_LINES, len(lines)) + 1):
        try:
            cells = next(csv.reader(lines[at:end], strict=True), [])
        except csv.Error as error:
            problem = problem or str(error)
            if str(error) != _OPEN_QUOTE:
                break
        else:
            return Line(end, tuple(cells), "".join(lines[at:end]))
    return Line(at + 1, (), lines[at], problem)


def _refusal(
    family: str, path: Path, line: int, columns: Sequence[str], cells: Sequence[str], reason: str
) -> Refusal:
    """A refusal that keeps as much of the row's identity as the row still has."""
    known = dict(zip(columns, cells, strict=False))
    return Refusal(
        family=family,
        gpu=known.get("gpu", ""),
        op=known.get("op") or known.get("collective") or known.get("metric") or "",
        dtype=known.get("dtype") or known.get("precision") or "",
        file=str(path),
        line=line,
        reason=reason,
    )


# ---- the three schemas -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Reader:
    """What rows of one file have in common."""

    family: str
    devices: Mapping[str, str]
    need_seconds: bool

    def device_id(self, gpu: str) -> str:
        return self.devices[gpu] if gpu in self.devices else _device_id(gpu)

    def seconds(self, row: Mapping[str, str]) -> float:
        if not self.need_seconds and not row.get("latency_us", "").strip():
            return math.nan
        return _positive(row["latency_us"], "latency_us") * 1e-6


def _kernel(reader: _Reader, row: Mapping[str, str]) -> Measurement:
    return Measurement(
        family=reader.family,
        source=row["source"],
        gpu=row["gpu"],
        device_id=reader.device_id(row["gpu"]),
        op=_named(row["op"], "op"),
        dtype=_dtype(row["dtype"]),
        params=_params(row["params"], SIZES.get(row["op"], ())),
        seconds=reader.seconds(row),
    )


def _collective(reader: _Reader, row: Mapping[str, str]) -> Measurement:
    names = ("nodes", "gpus", "bytes")
    return Measurement(
        family=reader.family,
        source=row["source"],
        gpu=row["gpu"],
        device_id=reader.device_id(row["gpu"]),
        op=_named(row["collective"], "collective"),
        dtype="",
        params={name: _whole(name, _positive(row[name], name)) for name in names},
        seconds=reader.seconds(row),
    )


def _step(reader: _Reader, row: Mapping[str, str]) -> Measurement:
    metric, value = _named(row["metric"], "metric"), _positive(row["value"], "value")
    unit_s = _time_unit_s(metric)
    return Measurement(
        family=reader.family,
        source=row["source"],
        gpu=row["gpu"],
        device_id=reader.device_id(row["gpu"]),
        op=metric,
        dtype=_dtype(row["precision"]),
        params={
            "num_gpus": _whole("n_gpus", _positive(row["n_gpus"], "n_gpus")),
            "model": _params(row["model"], (), "model"),
            "parallelism": _params(row["parallelism"], (), "parallelism"),
            "value": value,
        },
        seconds=None if unit_s is None else value * unit_s,
    )


_Parse: TypeAlias = Callable[[_Reader, Mapping[str, str]], Measurement]
_PARSERS: Mapping[tuple[str, ...], _Parse] = MappingProxyType({
    KERNELS: _kernel,
    COLLECTIVES: _collective,
    STEPS: _step,
})  # fmt: skip
_UNTIMED: Mapping[tuple[str, ...], _Parse] = MappingProxyType({
    KERNELS[:-1]: _kernel,
    COLLECTIVES[:-1]: _collective,
})  # fmt: skip


def _time_unit_s(metric: str) -> float | None:
    """Seconds per unit of a time metric, None for a rate or a ratio."""
    name = metric.removesuffix("_derived")
    if name.endswith("_per_s"):
        return None
    return next((s for ending, s in TIME_UNITS_S.items() if name.endswith(ending)), None)


# ---- one field -------------------------------------------------------------------------------


def _refuse(reason: str) -> NoReturn:
    raise _Refused(reason)


@lru_cache(maxsize=256)
def _resolved(gpu: str) -> str | None:
    if "/" in gpu or gpu.endswith(".toml"):
        return None  # a row of data must not make us open a file
    try:
        return catalog.device(gpu).id
    except InputError:
        return None


def _device_id(gpu: str) -> str:
    found = _resolved(gpu)
    return found if found is not None else _refuse(UNKNOWN_GPU)


def _named(text: str, column: str) -> str:
    return text if text.strip() else _refuse(f"{column} is empty")


def _dtype(label: str) -> str:
    known = label in COMPOUND_DTYPES or label in dtypes.ALL or label in dtypes.ALIASES
    return label if known else _refuse("the dtype is unknown")


def _positive(text: str, column: str) -> float:
    """A decimal number above zero; Python's own spellings (1_000, nan, inf) are not numbers."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0) or "_" in text:
        _refuse(f"{column} is not a positive finite number")
    return value


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _refuse(f"size {name} is not a number")
    if not 1 <= value < 2**52 or value != int(value):
        _refuse(f"size {name} is not a whole number of at least 1")
    return int(value)


def _params(text: str, sizes: Iterable[str], column: str = "params") -> Mapping[str, Any]:
    """A JSON object whose numbers are finite and not negative, with the named sizes whole."""
    try:
        params = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError, _Refused):
        _refuse(f"{column} is not JSON")
    if not isinstance(params, dict):
        _refuse(f"{column} is not a JSON object")
    for name, value in params.items():
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            _refuse(f"{column}: {name[:30]} is negative or not finite")
    for name in sizes:
        if name not in params:
            _refuse(f"{column} lacks size {name}")
        params[name] = _whole(name, params[name])
    return params
