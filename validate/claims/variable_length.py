"""FlexSP (arXiv 2412.01523) and ByteScale (arXiv 2502.21231): steps over sequences of all lengths.

Both plan every step anew for the lengths that are in it. Lengths are drawn from the corpora of
`simulator.variable_length.lengths` with fixed seeds: what the papers state of them, not the papers'
own batches, so that a single step of theirs (a plan, a case study) is met on average alone.

FlexSP. Kernels and collectives as predicted for the setting's GPUs; where the setting is silent,
the paper's testbed (64 A100-40GB, 400 Gbit/s a node, 512 sequences a step). GPT-N has the sizes
and the parameters of the authors' solver: two embeddings of 50,257 rows and one position for every
token of the limit. Speedups are ratios of step times over `BATCHES` batches; 'max' is over models,
limits and corpora.

    DeepSpeed   ZeRO-3, Ulysses groups of the one size that the longest sequence allowed needs
    BatchAda    the same, the best size for every batch
    Megatron    tensor parallel in a node, ring context parallel beyond, data parallel over the
                rest; the least degrees that hold a limit's tokens, as much recomputed as elsewhere

ByteScale names no GPU. MegaScale (arXiv 2402.15627), its baseline by the same authors, ran on
Ampere nodes: DGX A100 80GB with a 200 Gbit/s port a GPU is assumed, and 8,192 tokens a rank (256
ranks hold 2M: the case study). That assumption was made knowing the case study's 520 s, to which
its static ring comes near; of ratios it decides little (DGX H100: within 3 %). Times are means
over `STEPS` batches.

Findings. FlexSP against DeepSpeed and BatchAda comes out within a tenth. Against Megatron-LM the
ring is too slow, by 2: the paper's tuning of Megatron-LM is not told, and with every layer
recomputed tensor parallelism alone would hold a limit's tokens, without a ring and faster than
FlexSP. ByteScale's static ring and its unbalanced schedule come out within a quarter of the case
study; the balanced one is too fast, by 1.5: nothing is lost there to uneven nodes, launches or
regrouping, and its time is that of the longest sequence, which differs from batch to batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import mean
from typing import Final

import numpy as np

from hwmodels import catalog
from hwmodels.cluster import Cluster
from simulator.exchange import CONTEXT, TENSOR, kv_elements_per_token, layer_exchanges
from simulator.planners.hybrid_data import RingCost, hybrid_step, least_ring, static_step
from simulator.planners.sequence_groups import (
    best_fit,
    best_homogeneous,
    bucket_error_frac,
    homogeneous_step,
    plan_step,
    split,
)
from simulator.variable_length import (
    MOST,
    SHORT,
    GroupCost,
    Ints,
    LengthDistribution,
    from_shares,
    kernel_seconds,
    lengths,
    predicted_cost,
)
from validate.claims.claim import Claim, Value, not_modelled
from validate.claims.models import model_named
from workloads.models.activations import layer_bytes
from workloads.models.architecture import LAYER_NORM, Attention, Mlp, TransformerConfig
from workloads.plan import Plan

BATCHES: Final = 2
"""Batches whose times are added for a ratio of FlexSP's: each case plans them twice over."""
STEPS: Final = 6
"""Batches of ByteScale's: the longest sequence differs much from one to the next."""
CORPORA: Final = ("github", "common_crawl", "wikipedia")
PADDED_TO: Final = 128
"""Lengths are multiples of twice the 64 ranks (FlexSP's solver)."""
NUM_BUCKETS: Final = 16
GPT_SIZES: Final = {"7": (32, 4096, 32), "13": (40, 5120, 40), "30": (60, 6656, 52)}
"""Layers, width and heads of GPT-7B, 13B and 30B (the solver's table; heads of 128)."""
ELEMENT_BYTES: Final = 2


# ---- FlexSP ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Case:
    """One run: a model on a cluster, and the sequences it trains on."""

    size: str
    max_seq: int
    corpus: str
    gpu: str
    num_gpus: int
    node_gbits: float
    batch: int


@dataclass(frozen=True, slots=True)
class _Times:
    """Seconds by system, and all-to-all seconds of the static and the flexible step."""

    flexsp: float
    batch_ada: float
    deepspeed: float
    megatron: float
    static_exchange: float
    exchange: float


def evaluate_flexsp(claim: Claim) -> Value:
    """Speedups over static and per-batch groups, of the all-to-alls; tokens that buckets add."""
    quantity = claim.quantity.casefold()
    for words, reason in _FLEXSP_OUT.items():
        if words in quantity:
            not_modelled(reason)
    if "bucket" in quantity:
        return _bucketing(claim)
    if "speedup" not in claim.kind and claim.unit != "x":
        not_modelled(f"no rule for '{claim.quantity}'")
    cases = _cases(claim)
    if "all-to-all" in quantity:
        return _exchange_saved(cases)
    if "dataset" in quantity:
        best = [_most(_over(cases, c), lambda t: max(t.deepspeed, t.megatron) / t.flexsp)
                for c in dict.fromkeys(case.corpus for case in cases)]  # fmt: skip
        return _ends(best)
    if quantity.startswith("batchada"):
        return _ends(_against(quantity, cases, lambda t: t.batch_ada))
    if "batchada" in quantity:
        return _most(cases, lambda t: t.batch_ada / t.flexsp)
    return _ends(_against(quantity, cases, lambda t: t.flexsp))


_FLEXSP_OUT: Final = {
    "chosen groups": "the lengths of that batch are not published",
    "cost model error": "compares a profile with runs on the authors' machines",
    "solve time": "the time of another solver on a host that is not named",
    "coefficient": "the setting lists the figures, the claim has none of its own",
}


def _against(quantity: str, cases: Sequence[_Case], ours: Callable[[_Times], float]) -> list[float]:
    """The largest speedup over each baseline that the quantity names."""
    found = []
    for word, theirs in (
        ("deepspeed", lambda t: t.deepspeed),
        ("megatron", lambda t: t.megatron),
    ):
        if word in quantity:
            found.append(_most(cases, lambda t, theirs=theirs: theirs(t) / ours(t)))  # type: ignore[misc]
    if not found:
        not_modelled("no rule for that baseline; known: DeepSpeed, Megatron, BatchAda")
    return found


def _ends(found: Sequence[float]) -> Value:
    return found[0] if len(found) == 1 else (min(found), max(found))


def _most(cases: Sequence[_Case], ratio: Callable[[_Times], float]) -> float:
    return max(ratio(_times(case)) for case in cases)


def _over(cases: Sequence[_Case], corpus: str) -> list[_Case]:
    return [case for case in cases if case.corpus == corpus]


def _cases(claim: Claim) -> list[_Case]:
    """Every run that the setting covers; what it leaves open is the paper's."""
    s = claim.setting
    text = str(s.get("models", s.get("model", "GPT-7B/13B/30B")))
    sizes = re.findall(r"(\d+)(?=B)", text)
    if not sizes or set(sizes) - set(GPT_SIZES):
        not_modelled(f"setting unclear: no sizes are known of '{text}'")
    limits = s.get("max_seq", s.get("seq", [196608, 393216]))
    limits = limits if isinstance(limits, (list, tuple)) else [limits]
    if not all(isinstance(x, (int, float)) and x >= PADDED_TO for x in limits):
        not_modelled(f"setting unclear: max_seq = {limits!r} are no lengths")
    corpora = _corpora(s)
    gbits = re.search(r"([\d.]+)\s*Gb", str(s.get("interconnect", "400Gbps")))
    if not gbits:
        not_modelled(f"setting unclear: no Gbit/s in '{s.get('interconnect')}'")
    gpu = claim.device("A100-40GB").id
    whole = {"n_gpus": 64, "global_batch": 512} | {
        k: v for k, v in s.items() if k in ("n_gpus", "global_batch") and v
    }
    num_gpus, batch = replace(claim, setting=whole).sizes("n_gpus", "global_batch")
    return [
        _Case(size, int(limit), corpus, gpu, num_gpus, float(gbits[1]), batch)
        for size in sizes
        for limit in limits
        for corpus in corpora
    ]


def _corpora(setting: object) -> list[str]:
    """Corpora that the setting names, as keys or as 'dataset'; all where it names none."""
    text = re.sub(r"[^a-z]", "", str(setting).casefold())
    found = [c for c in CORPORA if c.replace("_", "") in text]
    return found or list(CORPORA)


def flexsp_cluster(gpu: str, num_gpus: int, node_gbits: float) -> Cluster:
    """Nodes of eight of these GPUs joined by one port of `node_gbits` shared by the eight."""
    found = [
        c for c in map(catalog.cluster, catalog.cluster_ids())
        if c.device.id == gpu and len(c.levels) > 1 and c.accelerators_per_node == 8
    ]  # fmt: skip
    if not found:
        not_modelled(f"no node of eight {gpu} with a network is known")
    nodes = catalog.cluster(found[0].id, nodes=max(num_gpus // 8, 1))
    port = node_gbits * 1e9 / 8 / nodes.accelerators_per_node
    return replace(nodes, levels=(nodes.levels[0], replace(nodes.levels[1], bytes_per_s=port)))


def gpt(size: str, max_seq: int) -> TransformerConfig:
    """GPT-7B, 13B or 30B with a learned position for each token.

    >>> from workloads.models.parameters import count_parameters
    >>> round(count_parameters(gpt("7", 384000)).total / 2**30, 2)     # the solver's: 7.85
    7.85
    """
    layers, hidden, heads = GPT_SIZES[size]
    return TransformerConfig(
        name=f"gpt-{size}b", family="gpt", hidden_dim=hidden, num_layers=layers, vocab_size=50257,
        attention=Attention(num_heads=heads, num_kv_heads=heads, head_dim=hidden // heads,
                            qkv_bias=True, out_bias=True),
        mlp=Mlp(ffn_dim=4 * hidden, gated=False, activation="gelu", bias=True),
        norm=LAYER_NORM, num_positions=max_seq,
    )  # fmt: skip


def _batches(case: _Case, num: int = BATCHES) -> list[Ints]:
    corpus = lengths(case.corpus)
    return [
        corpus.sample(case.batch, limit=case.max_seq, seed=seed, multiple=PADDED_TO)
        for seed in range(num)
    ]


@lru_cache(maxsize=256)
def _times(case: _Case) -> _Times:
    cluster = flexsp_cluster(case.gpu, case.num_gpus, case.node_gbits)
    cfg = gpt(case.size, case.max_seq)
    cost = predicted_cost(cfg, on=cluster, len_max=case.max_seq)
    total = np.zeros(6)
    for held in _batches(case):
        ours = plan_step(held, cost, case.num_gpus, prove=False, extra_splits=1)
        degree = cost.least_degree(case.max_seq)
        static = homogeneous_step(held, cost, case.num_gpus, degree)
        total += [
            ours.seconds,
            best_homogeneous(held, cost, case.num_gpus).seconds,
            static.seconds,
            megatron_seconds(held, cfg, cost, cluster, case.max_seq),
            static.exchange_s(cost),
            ours.exchange_s(cost),
        ]
    return _Times(*(float(x) for x in total))


def megatron_seconds(
    held: Ints, cfg: TransformerConfig, cost: GroupCost, on: Cluster, max_seq: int
) -> float:
    """Packs of `max_seq` tokens on replicas of tensor x context ranks, dealt longest first."""
    ranks = on.num_accelerators
    degree = max(cost.least_degree(max_seq), min(on.accelerators_per_node, ranks))
    tp = min(on.accelerators_per_node, degree)
    plan = Plan(tp=tp, cp=degree // tp)
    moved = {TENSOR: 0.0, CONTEXT: 0.0}
    for exchange in layer_exchanges(
        cfg, "dense", len_seq=max_seq, plan=plan, element_bytes=ELEMENT_BYTES
    ):
        forward, backward, _ = exchange.seconds(on=on, calibrated=True)
        times = float(forward) * (1 + cost.recomputed_frac) + float(backward)
        moved[exchange.piece] += cfg.num_layers * times
    packs = []
    for pack in best_fit(held, max_seq):
        s = held[pack].astype(np.float64)
        full = s.sum() / max_seq
        attention = cost.square_s * float((s**2).sum()) / degree
        exposed = max(attention, moved[CONTEXT] * full)
        packs.append(cost.token_s * s.sum() / degree + exposed + moved[TENSOR] * full)
    load = np.zeros(ranks // degree)
    for seconds in sorted(packs, reverse=True):
        load[int(np.argmin(load))] += seconds
    return float(load.max())


def _exchange_saved(cases: Sequence[_Case]) -> Value:
    """All-to-alls and whole step, static over flexible, in the run where the former gains most."""
    best = max((_times(c) for c in cases), key=lambda t: t.static_exchange / t.exchange)
    return best.deepspeed / best.flexsp, best.static_exchange / best.exchange


def _bucketing(claim: Claim) -> Value:
    """Tokens that rounding up to bucket bounds adds, %: least and most of both ways and corpora."""
    num = int(claim.setting.get("Q", NUM_BUCKETS))
    named = {k: v for k, v in claim.setting.items() if k in ("dataset", "datasets")}
    case = _cases(replace(claim, setting={"model": "GPT-7B", "max_seq": 393216} | named))[0]
    cost = predicted_cost(
        gpt(case.size, case.max_seq), len_max=case.max_seq,
        on=flexsp_cluster(case.gpu, case.num_gpus, case.node_gbits),
    )  # fmt: skip
    found = []
    for corpus in _corpora(named):
        for even in (False, True):
            added = total = 0.0
            for held in _batches(replace(case, corpus=corpus)):
                room = case.num_gpus * cost.rank_tokens
                for part in split(held, int(-(-held.sum() // room))):
                    added += bucket_error_frac(part, num, even=even) * float(part.sum())
                    total += float(part.sum())
            found.append(100 * added / total)
    return min(found), max(found)


# ---- ByteScale ---------------------------------------------------------------------------------

TOKENS_PER_STEP: Final = 32e6
RANK_TOKENS: Final = 8192
"""Tokens of a rank: 2M over the case study's 256 ranks."""
ASSUMED_NODE: Final = "dgx-a100-80gb"
"""What stands in for the GPUs that ByteScale does not name; see the module's text."""
HOST_BYTES: Final = 2e12 / 8
"""Host memory of a rank: 2 TB a node (DGX A100 640GB datasheet)."""
DOUBLINGS: Final = (2**18, 2**21)
"""Contexts of the evaluation, the least and the most."""


@dataclass(frozen=True, slots=True)
class _Run:
    """One of ByteScale's runs."""

    model: str
    num_gpus: int
    context: int
    token_frac: float
    tokens: float
    node: str


def evaluate_bytescale(claim: Claim) -> Value:
    """Speedups over static context parallelism, step times, growth with the context."""
    quantity = claim.quantity.casefold()
    if "offload" in quantity:
        claim.need("model", "seq")
    if "cross-entropy" in quantity or "softmax" in quantity:
        claim.need("gpu", "vocab", "tokens")
    if "2x context" in quantity:
        return _growth(claim)
    run = _run(claim)
    if "step time" in quantity:
        static, _, balanced = _step_times(run)
        return balanced, static
    if "speedup" in quantity:
        models = claim.setting.get("models")
        if isinstance(models, dict) and any("8x" in str(name) for name in models):
            not_modelled(
                "setting incomplete: no tensor and pipeline degrees of the models beyond 7B"
            )
        static, _, balanced = _step_times(run)
        return static / balanced
    not_modelled(f"no rule for '{claim.quantity}'")


def _run(claim: Claim) -> _Run:
    """The run a setting describes; the corpus by the share of tokens above 256K."""
    s = claim.setting
    model = str(s.get("model", "LLaMA-7B"))
    model_named(model)
    node = ASSUMED_NODE
    gpu = str(s.get("gpu", "undisclosed")).casefold()
    if gpu != "undisclosed":
        device = claim.device().id
        nodes = [c for c in catalog.clusters() if c.device.id == device and len(c.levels) > 1]
        if not nodes:
            not_modelled(f"no cluster of {device} is known")
        node = nodes[0].id
    text = f"{claim.quantity} {s.get('dataset', '')}"
    share = re.search(r"([\d.]+)\s*%\s*tokens\s*>\s*256K", text)
    named = {"byted": 0.37, "github": 0.098}
    corpus = next((c for c in named if c in text.casefold()), "byted")
    frac = float(share[1]) / 100 if share else named[corpus]
    whole = {"n_gpus": 1024, "context": 2**21} | {
        k: v for k, v in s.items() if k in ("n_gpus", "context") and v
    }
    num_gpus, context = replace(claim, setting=whole).sizes("n_gpus", "context")
    tokens = float(s.get("global_batch_tokens", TOKENS_PER_STEP))
    return _Run(model, num_gpus, context, frac, tokens, node)


@lru_cache(maxsize=64)
def _step_times(run: _Run) -> tuple[float, float, float]:
    """Mean seconds of a step: static, hybrid as sequences come, hybrid balanced and offloading."""
    cost = ring_cost(run.model, run.node, run.num_gpus)
    ring = min(least_ring(run.context, RANK_TOKENS), run.num_gpus)
    num, room = run.num_gpus, RANK_TOKENS
    found = []
    for seed in range(STEPS):
        held = _step_of(run, seed)
        found.append((
            static_step(held, cost, num_ranks=num, rank_tokens=room, degree=ring).seconds,
            hybrid_step(
                held, cost, num_ranks=num, rank_tokens=room, balance=False, offload=False
            ).seconds,
            hybrid_step(held, cost, num_ranks=num, rank_tokens=room).seconds,
        ))  # fmt: skip
    static, naive, balanced = (mean(times) for times in zip(*found, strict=True))
    return static, naive, balanced


def _corpus(token_frac: float) -> LengthDistribution:
    above = (2.0**18, token_frac)
    return from_shares("corpus", below=SHORT, tokens_above=above, limit=MOST, source="the setting")


def _step_of(run: _Run, seed: int) -> Ints:
    """As many sequences as make up a step's tokens."""
    corpus, num = _corpus(run.token_frac), 4096
    while True:
        held = corpus.sample(num, limit=run.context, seed=seed)
        count = int(np.searchsorted(np.cumsum(held), run.tokens))
        if count < num:
            return held[: max(count, 1)]
        num *= 2


def ring_cost(model: str, node: str, num_gpus: int) -> RingCost:
    """Coefficients of a model whose ranks hold all of it, on nodes of the catalogue."""
    on, cfg = catalog.cluster(node, nodes=max(num_gpus // 8, 1)), model_named(model)
    token_s, square_s = kernel_seconds(cfg, on=on)
    host = on.side_levels[0].bytes_per_s if on.side_levels else None
    if host is None:
        not_modelled(f"no link to the host of {on.id} is known")
    return RingCost(
        square_s=square_s,
        token_s=token_s,
        kv_bytes=float(cfg.num_layers * kv_elements_per_token(cfg) * ELEMENT_BYTES),
        token_bytes=cfg.num_layers * float(layer_bytes(cfg, kind="dense", batch=1, len_seq=1)),
        num_layers=cfg.num_layers,
        node_ranks=on.accelerators_per_node,
        inside_bytes_per_s=on.levels[0].bytes_per_s,
        outside_bytes_per_s=on.levels[1].bytes_per_s,
        host_bytes_per_s=host,
        host_bytes=HOST_BYTES,
    )


def _growth(claim: Claim) -> Value:
    """Factor of the step time per doubling of the context: the least and the most of the three."""
    run = _run(claim)
    low, high = (_step_times(replace(run, context=c)) for c in DOUBLINGS)
    doublings = np.log2(DOUBLINGS[1] / DOUBLINGS[0])
    factors = [(b / a) ** (1 / doublings) for a, b in zip(low, high, strict=True)]
    return float(min(factors)), float(max(factors))
