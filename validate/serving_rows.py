"""A published serving measurement as what the simulator takes: model, formats, layout, load.

A row becomes a `Serving`, or `Uncounted` says what it leaves open. What rows leave unsaid is read
the same way for all of them:

    model       sizes as the row states them; what it does not state (ranks of latent attention,
                dense first layers, shared experts, windows, norms of heads) by the model's name,
                from the configuration its authors publish (`MODELS`)
    formats     `Formats` of the checkpoints that engines serve under that label (`_formats`); an
                unknown precision is bf16, as the named checkpoint is stored; the cache is fp8
                beside fp8 and fp4 weights, but bf16 on Hopper for gpt-oss and DeepSeek
    squares     a row with moe_tp = moe_ep = k on k k ranks ran on k GPUs with ep = k: the same
                figures stand beside such rows under k GPUs, to the last digit
    batch       of a replica of attention: concurrency / attn_dp. A row of one engine whose
                concurrency is neither its batch nor left out ran behind a router, which spread
                requests over more engines than the row has GPUs; one without a concurrency states
                what an engine was allowed, not what it got. Neither says its load (`FLEET`,
                `LIMIT`): where a calibration may look, such rows are off by 3 to 10 times either
                way, and of one engine the same for any batch and any number of GPUs
    run         as its benchmark documents (`_run`): how lengths spread, which tokens go out
                together, whether a prompt waits for others
    DeepSeek-R1 may draft several tokens a step (its own multi-token prediction), which no row
                says: a family of its own. A row that repeats one of DeepSeek-V3 is that run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from hwmodels import catalog
from hwmodels.dtypes import BF16, FP8, MXFP4, MXFP8, NVFP4
from hwmodels.errors import InputError
from simulator.serving import PROMPT_TOKENS, Load, Terms, least_s, terms
from simulator.serving_kernels import ENGINES, Formats, Layout, Linear, Served
from validate.adapters.part import Uncounted
from validate.measurement import Measurement
from workloads.models.architecture import (
    AnyAttention,
    Attention,
    LatentAttention,
    Mlp,
    Moe,
    TransformerConfig,
)

SERVING_FAMILY: Final = "steps_inference"
TPOT, TTFT = "tpot_ms", "ttft_ms"
DENSE, MOE, DRAFTING = "dense", "moe", "moe, drafting unstated"
QUEUED: Final = f"the prompts in flight exceed {PROMPT_TOKENS} tokens, so that they queue"
FLEET: Final = "the concurrency is not that of one engine: how it was spread is not stated"
LIMIT: Final = "the row states no concurrency, only what the engine was allowed"
SAME_RUN: Final = "another row states the time of the same run"
TOO_FAST: Final = (
    "faster than reading weights and caches once: not the run that the row's setting describes"
)
MAX_SIZE: Final = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How a benchmark ran: `Load`'s fields, and mean over stated length of prompts and outputs."""

    length_frac: float = 1.0
    together: bool = True
    sent_frac: float = 1.0
    wait_steps: float = 0.0


INFERENCE_X: Final = frozenset({(1024, 1024), (1024, 8192), (8192, 1024)})
"""Prompt and output tokens of the runs of InferenceX (SemiAnalysisAI/InferenceX, once
InferenceMAX), of which the rows of its models are."""
SENT_FRAC: Final[Mapping[str, float]] = {"trtllm": 1 / 10, "sglang": 1 / 30, "vllm": 0.0}
"""Share of steps whose tokens hold InferenceX's servers up: TensorRT-LLM's `stream_interval: 10`,
SGLang's `--stream-interval 30`; vLLM's `async-scheduling` sends beside the next pass (its scripts
benchmarks/70b_fp8_b200_trt_slurm.sh, dsr1_fp8_b200.sh, 70b_fp8_h100_slurm.sh)."""
WAIT_STEPS: Final = 20.0
"""`batch_wait_timeout_iters` of its TensorRT-LLM with Llama 70B, 1k/1k, below eight ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Ranks and widths of latent attention."""

    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the name of a model says beyond its row.

    `drafts`: the release drafts tokens. `raced`: InferenceX runs it.
    """

    latent: Latent | None = None
    num_dense: int = 0
    shared_ffn: int = 0
    window: int | None = None
    qk_norm: bool = False
    blockwise: bool = False
    drafts: bool = False
    raced: bool = False


HOPPER_MXFP4: Final[Mapping[str, str]] = {"trtllm": "triton_kernels", "vllm": "marlin"}
"""Kernel of MXFP4 experts on Hopper. TensorRT-LLM's is documented (its blog 9, "(H200/H100 Only)
Using OpenAI Triton Kernels"), vLLM's by the benchmark (InferenceX, benchmarks/gptoss_fp4_h100.sh,
VLLM_MXFP4_USE_MARLIN=1)."""
_DEEPSEEK: Final = Latent(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128)
MODELS: Final[Mapping[str, Facts]] = {
    "deepseek-r1": Facts(latent=_DEEPSEEK, num_dense=3, shared_ffn=2048, blockwise=True,
                         drafts=True, raced=True),
    "deepseek-v3": Facts(latent=_DEEPSEEK, num_dense=3, shared_ffn=2048, blockwise=True,
                         raced=True),
    "gpt-oss": Facts(window=128, raced=True),
    "qwen3": Facts(qk_norm=True, blockwise=True),
    "llama-3.1-70b": Facts(raced=True),
    "llama-3": Facts(),
}  # fmt: skip
"""By a piece of the name: config.json of deepseek-ai/DeepSeek-V3 (arXiv 2412.19437, section 4.2),
openai/gpt-oss-120b (every other layer sees 128 positions), Qwen/Qwen3-32B (arXiv 2505.09388,
section 2; its fp8 checkpoints have blockwise scales), meta-llama/Llama-3.1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """One published figure, its setting, and the kernels' part of its prediction."""

    row: Measurement
    served: Served
    load: Load
    family: str
    seconds: float
    terms: Terms

    @property
    def model(self) -> str:
        """The model's name without its publisher."""
        return self.served.config.name.rsplit("/", 1)[-1]

    @property
    def mode(self) -> str:
        """Prompts and output on the same ranks, or apart."""
        return "disagg" if self.load.disaggregated else "agg"


def is_serving(row: Measurement) -> bool:
    """Does the row belong to a file of serving measurements?"""
    return row.family.startswith(SERVING_FAMILY) and "parallelism" in row.params


def read_servings(
    rows: Iterable[Measurement], *, metric: str = TPOT
) -> tuple[tuple[Serving, ...], tuple[tuple[Measurement, str], ...]]:
    """Every figure of that metric with its setting, and every other row of it with the reason."""
    found: dict[str, Serving] = {}
    others: list[tuple[Measurement, str]] = []
    chosen = (row for row in rows if is_serving(row) and row.op == metric)
    # What repeats is kept under the name of which more is known.
    for row in sorted(chosen, key=lambda row: _drafts(row.params["model"])):
        try:
            one = serving(row)
        except Uncounted as why:
            others.append((row, str(why)))
            continue
        if found.setdefault(_identity(one), one) is not one:
            others.append((row, SAME_RUN))
    return tuple(found.values()), tuple(others)


def serving(row: Measurement) -> Serving:
    """The setting that a row states; raises `Uncounted` with what is missing."""
    try:
        return _serving(row)
    except InputError as why:
        raise Uncounted(str(why)) from None
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as why:
        # rows are other people's: one of an unforeseen form must not take the file along
        raise Uncounted("the model or the parallelism has no known form") from why


def _serving(row: Measurement) -> Serving:
    model, split = row.params["model"], row.params["parallelism"]
    facts = _facts(model)
    cfg = _config(model, facts)
    layout, batch, apart = _layout(split, cfg)
    load = _load(row, facts, batch, apart=apart, tp=layout.tp)
    served = _served(row, cfg, facts, layout)
    seconds = float(row.params["value"]) / 1e3
    if row.op == TTFT and (apart or batch * load.isl > PROMPT_TOKENS):
        raise Uncounted("prompts run on other ranks" if apart else QUEUED)
    if seconds < least_s(served, load):
        raise Uncounted(TOO_FAST)
    family = DRAFTING if facts.drafts else MOE if cfg.moe else DENSE
    return Serving(row=row, served=served, load=load, family=family, seconds=seconds,
                   terms=terms(served, load))  # fmt: skip


def _load(row: Measurement, facts: Facts, batch: float, *, apart: bool, tp: int) -> Load:
    model, split = row.params["model"], row.params["parallelism"]
    isl, osl = _size(model, "isl"), _size(model, "osl")
    run = _run(facts, isl, osl, str(split["backend"]).split("-", 1)[0], tp=tp)
    return Load(
        concurrency=batch,
        isl=max(round(run.length_frac * isl), 1),
        osl=max(round(run.length_frac * osl), 1),
        disaggregated=apart,
        together=run.together,
        sent_frac=run.sent_frac,
        wait_steps=run.wait_steps,
    )


def _run(facts: Facts, isl: int, osl: int, engine: str, *, tp: int) -> Run:
    """How the benchmark of these lengths ran the model.

    InferenceX draws lengths evenly from 0.8 of the stated ones to the whole
    (utils/bench_serving/benchmark_serving.py with `--random-range-ratio 0.8`), so that requests end
    at different times. The others, aiconfigurator's own runs, are taken to be of one length: left
    free, the fit on rows that a calibration may use met 0.5 of the prompts on SGLang, as it then
    must be, and 0.9 to 1 on the engines that mix.
    """
    if not facts.raced or (isl, osl) not in INFERENCE_X:
        return Run()
    held_back = engine == "trtllm" and facts.latent is None and facts.window is None
    short = isl == osl == 1024 and tp < 8
    return Run(
        length_frac=0.9,
        together=False,
        sent_frac=SENT_FRAC.get(engine, 1.0),
        wait_steps=WAIT_STEPS if held_back and short else 0.0,
    )


def _identity(one: Serving) -> str:
    """All of a figure but the model's name and the way its layout is written."""
    split, load = one.served.layout, one.load
    return json.dumps([
        one.row.gpu, one.row.dtype, one.row.op, str(one.row.params["parallelism"]["backend"]),
        one.served.config.hidden_dim, one.served.config.num_layers,
        [split.tp, split.attn_dp, split.moe_tp, split.moe_ep],
        [load.concurrency, load.isl, load.osl, load.disaggregated], one.seconds,
    ])  # fmt: skip


# ---- the model -------------------------------------------------------------------------------


def _facts(model: Mapping[str, Any]) -> Facts:
    name = str(model["name"]).lower()
    found = next((facts for piece, facts in MODELS.items() if piece in name), None)
    if found is None:
        raise Uncounted(f"what {model['name']!s:.60} computes is not known beyond its sizes")
    return found


def _drafts(model: Mapping[str, Any]) -> bool:
    return "deepseek-r1" in str(model.get("name")).lower()


def _size(values: Mapping[str, Any], key: str) -> int:
    value: Any = values.get(key)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 1 <= value < MAX_SIZE or value != int(value):
        raise Uncounted(f"{key} is not a whole number from 1")
    return int(value)


def _config(model: Mapping[str, Any], facts: Facts) -> TransformerConfig:
    layers = _size(model, "layers")
    return TransformerConfig(
        name=str(model["name"]),
        family="llama",
        hidden_dim=_size(model, "hidden"),
        num_layers=layers,
        vocab_size=_size(model, "vocab"),
        attention=_attention(model, facts),
        mlp=Mlp(ffn_dim=_size(model, "ffn"), gated=True, activation="silu"),
        moe=_moe(model, facts, layers) if "experts" in model else None,
        window=facts.window,
        num_windowed_layers=layers // 2 if facts.window else 0,
    )


def _attention(model: Mapping[str, Any], facts: Facts) -> AnyAttention:
    heads = _size(model, "heads")
    if model.get("mla"):
        if facts.latent is None:
            raise Uncounted("the ranks of latent attention are not stated")
        a = facts.latent
        return LatentAttention(num_heads=heads, q_lora_rank=a.q_rank, kv_lora_rank=a.kv_rank,
                               qk_nope_head_dim=a.nope_dim, qk_rope_head_dim=a.rope_dim,
                               v_head_dim=a.v_dim)  # fmt: skip
    width = _size(model, "head_dim") if "head_dim" in model else _size(model, "hidden") // heads
    return Attention(num_heads=heads, num_kv_heads=_size(model, "kv_heads"), head_dim=width,
                     rope_dim=width, qk_norm=facts.qk_norm)  # fmt: skip


def _moe(model: Mapping[str, Any], facts: Facts, layers: int) -> Moe:
    return Moe(
        num_experts=_size(model, "experts"),
        num_active=_size(model, "topk"),
        expert_ffn_dim=_size(model, "moe_ffn" if "moe_ffn" in model else "ffn"),
        layers=tuple(range(facts.num_dense, layers)),
        num_shared_experts=1 if facts.shared_ffn else 0,
        shared_ffn_dim=facts.shared_ffn,
    )


# ---- formats, layout, load -------------------------------------------------------------------


def _served(
    row: Measurement, cfg: TransformerConfig, facts: Facts, layout: Layout
) -> Served:  # fmt: skip
    name = str(row.params["parallelism"]["backend"]).split("-", 1)[0]
    if name not in ENGINES:
        raise Uncounted(f"no serving engine {name!s:.30} is known")
    device = catalog.device(row.device_id)
    hopper = (device.compute_capability or "").startswith("9.")
    narrow = facts.window is not None
    return Served(
        config=cfg,
        device=device,
        engine=ENGINES[name],
        formats=_formats(row.dtype, facts, hopper=hopper),
        layout=layout,
        expert_kernel=HOPPER_MXFP4.get(name, "") if narrow and hopper else "",
    )


def _formats(precision: str, facts: Facts, *, hopper: bool) -> Formats:
    """Formats of the checkpoint under a label.

    gpt-oss stores its experts in MXFP4 whatever the label says (OpenAI, model card, section 2.1);
    NVIDIA's NVFP4 checkpoint of DeepSeek leaves attention in bf16 (nvidia/DeepSeek-R1-FP4).
    """
    block = Linear(dtype=FP8, scheme="block")
    four = Linear(dtype=NVFP4, scheme="block")
    if facts.window is not None and precision in ("fp4", "fp8"):
        experts = Linear(dtype=BF16 if hopper else MXFP8, weight_dtype=MXFP4, scheme="block")
        return Formats(experts=experts, cache=BF16 if hopper else FP8)
    if precision == "unknown" or precision == "bf16":
        return Formats()
    if precision == "fp8":
        eight = block if facts.blockwise else Linear(dtype=FP8)
        cache = BF16 if facts.latent and hopper else FP8
        return Formats(attention=eight, mlp=eight, experts=eight, cache=cache)
    if precision == "fp4":
        attention = Linear() if facts.latent else four
        return Formats(attention=attention, mlp=four, experts=four, cache=FP8)
    raise Uncounted(f"no checkpoint format for {precision!s:.30} is known")


def _degree(split: Mapping[str, Any], key: str) -> int:
    """A degree of parallelism; 0 and nothing mean that it is not split."""
    value = split.get(key)
    missing = not value or (isinstance(value, float) and math.isnan(value))
    return 1 if missing else _size(split, key)


def _layout(split: Mapping[str, Any], cfg: TransformerConfig) -> tuple[Layout, float, bool]:
    """Ranks of the engine that decodes, sequences on each replica of attention, prompts apart."""
    if split.get("mode") == "disagg":
        tp, dp, ep = (_degree(split, key) for key in ("d_tp", "d_dp", "d_moe_ep"))
        if not split.get("d_batch"):
            raise Uncounted("the row states no batch of the ranks that decode")
        if not split.get("concurrency"):
            raise Uncounted(LIMIT)
        inner = Layout(tp=tp, attn_dp=dp, moe_tp=max(tp * dp // ep, 1), moe_ep=ep)
        return _plain(inner, cfg), float(_size(split, "d_batch")), True
    if split.get("mode") != "agg":
        raise Uncounted("the mode is neither 'agg' nor 'disagg'")
    if _degree(split, "pp") != 1:
        raise Uncounted("pipeline parallel serving has no count yet")
    layout = Layout(
        tp=_degree(split, "tp"),
        attn_dp=_degree(split, "attn_dp"),
        moe_tp=_degree(split, "moe_tp"),
        moe_ep=_degree(split, "moe_ep"),
    )
    layout = _plain(_unsquared(layout, split), cfg)
    if not split.get("concurrency"):
        raise Uncounted(LIMIT)
    in_flight, batch = _size(split, "concurrency"), _size(split, "batch")
    if layout.attn_dp == 1 and in_flight != batch:
        raise Uncounted(FLEET)
    return layout, max(in_flight / layout.attn_dp, 1.0), False


def _unsquared(layout: Layout, split: Mapping[str, Any]) -> Layout:
    """k ranks with ep = k where the row says k times k; see the module's docstring."""
    k = layout.moe_ep
    if "attn_dp" not in split or not (layout.moe_tp == k > 1 and layout.num_ranks == k * k):
        return layout
    if layout.attn_dp > 1:
        return Layout(tp=1, attn_dp=k, moe_tp=1, moe_ep=k)
    return Layout(tp=k, attn_dp=1, moe_tp=1, moe_ep=k)


def _plain(layout: Layout, cfg: TransformerConfig) -> Layout:
    """Degrees of the experts mean nothing to a dense model."""
    return layout if cfg.moe else Layout(tp=layout.tp, attn_dp=layout.attn_dp)
