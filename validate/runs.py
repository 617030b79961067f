"""A published training run as what the simulator takes: model, plan, step, recipe, cluster.

A row becomes a `Run`, or `Uncounted` says what it leaves open. Wherever a row is silent on a
detail that the bound needs, the run is refused; wherever a detail only adds time (a bias, a copy,
materialised attention scores), it is left out, so that the bound stays a bound.

    gated = 1            Llama's layer: RMSNorm, rotary positions, SwiGLU, no bias, own head
    gated = 0            GPT's layer: LayerNorm, `seq` learned positions, GELU, biases, tied head
    recompute full       the forward pass of every layer runs twice
    recompute selective  of attention scores: nothing, under a fused kernel; of some products of
                         each layer (torchtitan): left out, the real step does more
    16-bit precisions    gradients of 16 bits, the least any of the sources exchanges

A run published by more than one row (seconds, tokens per second, utilisation) counts once, by its
most direct row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Final

import numpy as np

from hwmodels import catalog
from hwmodels.cluster import Cluster
from hwmodels.errors import InputError
from simulator.memory import training_memory
from simulator.recipe import RECIPES, Recipe
from validate.adapters import Uncounted, is_training_step
from validate.measurement import Measurement
from validate.moe_models import moe_transformer
from validate.precisions import recipe_name
from validate.trainers import CHUNKS, MICRO_BATCHES, Trainer, trainer_of
from workloads.models.architecture import LAYER_NORM, Attention, Mlp, TransformerConfig
from workloads.models.parameters import count_parameters
from workloads.models.transformer import TrainStep
from workloads.numeric import ceil_div
from workloads.plan import Plan, Recompute

SECONDS: Final = ("step_time_s", "step_time_s_derived")
TOKENS_PER_S: Final = "tokens_per_s_per_gpu"
METRICS: Final = (SECONDS[0], TOKENS_PER_S, SECONDS[1])
"""Metrics that time a whole step, the most direct first."""

CLUSTERS: Final[Mapping[str, str]] = {
    "a100-sxm4-40gb": "dgx-a100-40gb",
    "a100-sxm4-80gb": "dgx-a100-80gb",
    "h100-sxm": "hgx-h100",
    "h100-sxm-96gb": "hgx-h100",
    "h200-sxm": "hgx-h200",
    "b200-sxm": "hgx-b200",
    "gb200": "gb200-nvl72",
}
"""The catalogue's system around a device; the 96 GB H100 sits on the boards of the 80 GB one."""

MAX_SIZE: Final = 2**40
_RECOMPUTE: Final = {
    "none": Recompute.NONE,
    "selective": Recompute.SELECTIVE,
    "full": Recompute.FULL,
}
_WITHOUT_ACCUMULATION: Final = ("torchtitan",)
"""Sources whose trainer had no gradient accumulation: global batch = dp x micro-batch."""

NOT_A_STEP: Final = "the metric is not the time of a whole step"
SAME_RUN: Final = "another row states the time of the same run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One published run and its measured seconds per optimizer step.

    `stack` names the framework where it is known. `assumed` are the parts of the plan that the row
    leaves open; where they leave a choice, the fields of `plan` are arrays of what is possible.
    """

    row: Measurement
    plan: Plan
    step: TrainStep
    recipe: Recipe
    cluster: Cluster
    seconds: float
    stack: str | None = None
    assumed: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """Who published it: the part of the row's source before the first slash."""
        return _publisher(self.row)

    @property
    def config(self) -> TransformerConfig:
        """The model that was trained."""
        return self.step.config


def digest(row: Measurement) -> str:
    """sha256 of what a row says, whatever file it stands in."""
    said = {
        "source": row.source,
        "gpu": row.gpu,
        "op": row.op,
        "dtype": row.dtype,
        "params": dict(row.params),
    }
    text = json.dumps(said, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256(text.encode()).hexdigest()


def read_runs(
    rows: Iterable[Measurement], *, assume: bool = False
) -> tuple[tuple[Run, ...], tuple[tuple[Measurement, str], ...]]:
    """Every run among training rows, and every other row with the reason why it is none.

    With `assume`, what a row leaves open of its plan is filled in as `validate.trainers` says.
    """
    rows = tuple(filter(is_training_step, rows))
    published = {(identity(row), row.op) for row in rows}
    runs: list[Run] = []
    others: list[tuple[Measurement, str]] = []
    for row in rows:
        better = METRICS[: METRICS.index(row.op)] if row.op in METRICS else ()
        if any((identity(row), metric) in published for metric in better):
            others.append((row, SAME_RUN))
            continue
        try:
            runs.append(run(row, assume=assume))
        except Uncounted as why:
            others.append((row, str(why)))
    return tuple(runs), tuple(others)


def run(row: Measurement, *, assume: bool = False, experts: bool = False) -> Run:
    """The run that a row states; raises `Uncounted` with what is missing.

    A mixture of experts is only read where `experts` says so: see `validate.moe_runs`.
    """
    if row.op not in METRICS:
        raise Uncounted(NOT_A_STEP)
    model, layout = row.params["model"], row.params["parallelism"]
    read = moe_transformer if experts and "experts" in model else transformer_of
    cfg, recipe = read(model), _recipe(row)
    trainer = trainer_of(row.source, layout, row.dtype)
    if assume and trainer is not None and _is_open(layout, trainer):
        return _assumed(row, cfg, recipe, trainer)
    plan = plan_of(layout, row.params["num_gpus"])
    batch = _global_batch(row, layout, plan)
    try:
        step = TrainStep(config=cfg, len_seq=_size(model, "seq"), global_batch=batch)
        cluster = _cluster(row)
    except InputError as why:
        raise Uncounted(str(why)) from None
    value = float(row.params["value"])
    tokens = float(step.num_tokens)
    seconds = value if row.op in SECONDS else tokens / (value * row.params["num_gpus"])
    return Run(
        row=row, plan=plan, step=step, recipe=recipe, cluster=cluster, seconds=seconds,
        stack=trainer.stack if trainer else None,
    )  # fmt: skip


def _is_open(layout: Mapping[str, Any], trainer: Trainer) -> bool:
    return any(key not in layout for key in (*trainer.assumed, "microbatch"))


def _assumed(row: Measurement, cfg: TransformerConfig, recipe: Recipe, trainer: Trainer) -> Run:
    """The run with every micro-batch and number of chunks that its row leaves possible."""
    stated = dict(row.params["parallelism"])
    filled = {**trainer.assumed, **stated}
    chunks = CHUNKS if filled.get("pp", 1) > 1 and "interleave" not in filled else (None,)
    possible: list[Run] = []
    why = "no micro-batch is possible"
    micros = MICRO_BATCHES if "microbatch" not in filled else (filled["microbatch"],)
    chosen = len(micros) * len(chunks) > 1  # else it ran so, whatever our memory model says
    for micro in micros:
        for number in chunks:
            layout = filled | {"microbatch": micro} | ({"interleave": number} if number else {})
            tried = replace(row, params={**row.params, "parallelism": layout})
            try:
                found = run(tried)
            except Uncounted as refused:
                why = str(refused)
                continue
            if not chosen or _is_possible(found, cfg):
                possible.append(found)
    if not possible:
        raise Uncounted(why)
    names = tuple(key for key in (*filled, "microbatch", "interleave") if key not in stated)
    plans = [one.plan for one in possible]
    plan = replace(
        plans[0],
        micro_batch=np.asarray([float(p.micro_batch) for p in plans]),
        interleave=np.asarray([float(p.interleave) for p in plans]),
    )
    return replace(possible[0], row=row, plan=plan, stack=trainer.stack,
                   assumed=tuple(dict.fromkeys(names)))  # fmt: skip


def _is_possible(run: Run, cfg: TransformerConfig) -> bool:
    """Chunks divide the layers of a stage, micro-batches the stages, and all of it fits."""
    plan = run.plan
    stage = ceil_div(cfg.num_layers, plan.pp)
    if plan.interleave > 1 and stage % plan.interleave:
        return False
    if plan.interleave > 1 and plan.num_micro_batches(run.step.global_batch) % plan.pp:
        return False
    needed = training_memory(run.step, plan=plan, recipe=run.recipe).total
    return bool(needed <= run.cluster.device.hbm.capacity_bytes)


def identity(row: Measurement) -> str:
    """All of a row but its metric and value: equal for the rows of one run."""
    params = {k: v for k, v in row.params.items() if k != "value"}
    return json.dumps([row.source, row.gpu, row.dtype, params], sort_keys=True)


def _publisher(row: Measurement) -> str:
    return row.source.split("/", 1)[0]


# ---- one part of a run -----------------------------------------------------------------------


def _size(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if value is None:
        raise Uncounted(f"the row states no {key}")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 1 <= value < MAX_SIZE or value != int(value):
        raise Uncounted(f"{key} is not a whole number from 1")
    return int(value)


def transformer_of(model: Mapping[str, Any]) -> TransformerConfig:
    """The model by its sizes; where the row states the number of parameters, ours must agree."""
    if "experts" in model:
        raise Uncounted("a mixture of experts: timed as its trainer ran it, in tables of its own")
    if model.get("gated") not in (0, 1):
        raise Uncounted("not a decoder-only language model with a stated feed-forward block")
    hidden, heads, gated = _size(model, "hidden"), _size(model, "heads"), model["gated"] == 1
    head_dim = _size(model, "head_dim") if "head_dim" in model else hidden // heads
    kv_heads = _size(model, "kv_heads")
    if heads % kv_heads or hidden % heads:
        raise Uncounted("the heads do not divide the hidden size, or the KV heads the heads")
    cfg = TransformerConfig(
        name=str(model.get("name", "?")),
        family="llama" if gated else "gpt2",
        hidden_dim=hidden,
        num_layers=_size(model, "layers"),
        vocab_size=_size(model, "vocab"),
        attention=Attention(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rope_dim=head_dim if gated else 0,
            qkv_bias=not gated,
            out_bias=not gated,
        ),
        mlp=Mlp(
            ffn_dim=_size(model, "ffn"),
            gated=gated,
            activation="silu" if gated else "gelu",
            bias=not gated,
        ),
    )
    if not gated:
        seq = _size(model, "seq")
        cfg = replace(cfg, norm=LAYER_NORM, tied_embeddings=True, num_positions=seq)
    if "params" in model and count_parameters(cfg).total != _size(model, "params"):
        raise Uncounted("the row states another number of parameters than its sizes give")
    return cfg


def _recipe(row: Measurement) -> Recipe:
    if row.source.endswith("/lora"):
        raise Uncounted("only adapters are trained")
    known = row.device_id is not None
    architecture = catalog.device(row.device_id).architecture if known else ""
    name = recipe_name(_publisher(row), row.dtype, architecture)
    if name is None:
        raise Uncounted(f"no precision recipe for {row.dtype} yet")
    return RECIPES[name]


def plan_of(layout: Mapping[str, Any], num_gpus: int) -> Plan:
    """The plan of a row's layout; raises `Uncounted` with what is missing."""
    if "microbatch" not in layout:
        raise Uncounted("the row states no micro-batch")
    recompute = str(layout.get("recompute"))
    if recompute not in _RECOMPUTE:
        raise Uncounted("the row does not say what is recomputed")
    if "zero" not in layout:
        raise Uncounted("the row states no ZeRO stage")
    if layout.get("cpu_offload", 0):
        raise Uncounted("activations are offloaded to the host")
    degrees = {axis: _size(layout, axis) for axis in ("dp", "tp", "pp", "cp")}
    degrees |= {axis: _size(layout, axis) for axis in ("ep", "etp") if axis in layout}
    plan = Plan(
        **degrees,
        micro_batch=_size(layout, "microbatch"),
        interleave=_size(layout, "interleave") if "interleave" in layout else 1,
        recompute=_RECOMPUTE[recompute],
        zero_stage=_stage(layout["zero"]),
    )
    if plan.pp > 1 and "interleave" not in layout:
        raise Uncounted("the row states no number of model chunks per pipeline stage")
    if plan.num_ranks != num_gpus:
        raise Uncounted("the degrees of parallelism do not multiply to the number of GPUs")
    return plan


def _stage(zero: Any) -> int:
    if zero not in (0, 1, 2, 3):
        raise Uncounted("the ZeRO stage is none of 0, 1, 2, 3")
    return int(zero)


def _global_batch(row: Measurement, layout: Mapping[str, Any], plan: Plan) -> int:
    """Sequences of a step: stated, or micro-batch x dp x micro-batches."""
    slot = int(plan.dp * plan.micro_batch)
    if "globalbatch" in layout:
        batch = _size(layout, "globalbatch")
    elif "gradaccum" in layout:
        batch = slot * _size(layout, "gradaccum")
    elif _publisher(row) in _WITHOUT_ACCUMULATION:
        batch = slot
    else:
        raise Uncounted("the row states neither a global batch nor the micro-batches in it")
    if batch % slot:
        raise Uncounted("the global batch is no whole number of micro-batches")
    return batch


def _cluster(row: Measurement) -> Cluster:
    """Nodes of the catalogue's system, as many as the GPUs need."""
    if row.device_id not in CLUSTERS:
        raise Uncounted(f"no cluster of {row.device_id} is catalogued for training")
    node = catalog.cluster(CLUSTERS[row.device_id])
    num_nodes = int(ceil_div(row.params["num_gpus"], node.accelerators_per_node))
    system = catalog.cluster(CLUSTERS[row.device_id], nodes=num_nodes)
    if system.device.id == row.device_id:
        return system
    return replace(system, device=catalog.device(row.device_id))
