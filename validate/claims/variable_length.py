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
    Megatron    static data, tensor, pipeline and ring context parallelism, with or without full
                recomputation: the fastest that holds the limit's tokens, as the paper tunes it

ByteScale's models have eight groups of keys (table 1); its static baseline runs 8 micro-batches of
rings that each pass the whole context (section 8.3), 32M tokens a step (section 8.1). Byted's
lengths end at 2M with 12.1 % of the tokens there (section 3.1). It names no GPU. MegaScale (arXiv
2402.15627), its baseline by the same authors, ran on Ampere nodes: DGX A100 80GB with a 200 Gbit/s
port a GPU is assumed, and 8,192 tokens a rank (256 ranks hold 2M: the case study). That assumption
was made knowing the case study's 520 s, to which its static ring comes near; of ratios it decides
little (DGX H100: within 3 %). Times are means over `STEPS` batches.

Findings. FlexSP against DeepSpeed and BatchAda comes out within a tenth. Megatron-LM's ring is 2.4
times too slow: K and V of a token pass seven of eight node ports three times, four and a half times
what Ulysses' all-to-alls send, and 50 GB/s a node do not pass that in the time published for it,
whatever the degrees. Of the bucketing errors the largest is met (24.7 for 22.1 %), the smallest,
0.5 %, is not: it hangs on Common Crawl's own lengths, of which none is published. ByteScale over
Byted comes out at 3.8 (4.26 at most over the models; its ablation of this model: 3.89), over GitHub
at 6.6 (7.89). The case study is slower in all parts than the mean of such batches: its step's valid
computation is 1.5 times ours, so that its batch was a heavy one. With a short context the static
baseline is too slow and the balanced step too fast: what a micro-batch costs beside its kernels
(launches, exchange of gradients, regrouping) is not modelled, so that the growth with the context
comes out as 1.9 for both.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import mean
from typing import Final

import numpy as np

from hwmodels import catalog
from hwmodels.cluster import Cluster
from simulator.exchange import TENSOR, kv_elements_per_token, layer_exchanges
from simulator.memory import training_memory
from simulator.network import calibrated_seconds
from simulator.planners.hybrid_data import (
    RingCost,
    hybrid_step,
    least_ring,
    predicted_ring_cost,
    static_step,
)
from simulator.planners.sequence_groups import (
    best_fit,
    best_homogeneous,
    bucket_error_frac,
    homogeneous_step,
    plan_step,
    split,
)
from simulator.recipe import recipe
from simulator.variable_length import (
    ABOVE_LONG,
    LONG,
    MOST,
    SHORT,
    Floats,
    GroupCost,
    Ints,
    LengthDistribution,
    from_shares,
    lengths,
    predicted_cost,
)
from validate.claims.claim import Claim, Value, not_modelled
from validate.claims.models import model_named
from workloads.models.architecture import LAYER_NORM, Attention, Mlp, TransformerConfig
from workloads.models.transformer import train_step
from workloads.ops.collective import Collective
from workloads.plan import Plan, Recompute

BATCHES: Final = 2
"""Batches whose times are added for a ratio of FlexSP's: each case plans them twice over."""
STEPS: Final = 6
"""Batches of ByteScale's: the longest sequence differs much from one to the next."""
CORPORA: Final = ("github", "common_crawl", "wikipedia")
PADDED_TO: Final = 128
"""Lengths are multiples of twice the 64 ranks (FlexSP's solver)."""
NUM_BUCKETS: Final = 16
BUCKET_BATCHES: Final = 8
"""Batches of which the largest bucketing error counts."""
GPT_SIZES: Final = {"7": (32, 4096, 32), "13": (40, 5120, 40), "30": (60, 6656, 52)}
"""Layers, width and heads of GPT-7B, 13B and 30B (the solver's table; heads of 128)."""
ELEMENT_BYTES: Final = 2
HBM_FRAC: Final = 0.92
"""Share of the memory that a run may fill, as in `predicted_cost`."""


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


UNHURRIED_S: Final = 600.0
"""A limit that no plan reaches: what is found must not depend on the machine."""


@lru_cache(maxsize=256)
def _times(case: _Case) -> _Times:
    cluster = flexsp_cluster(case.gpu, case.num_gpus, case.node_gbits)
    cfg = gpt(case.size, case.max_seq)
    cost = predicted_cost(cfg, on=cluster, len_max=case.max_seq)
    total = np.zeros(6)
    for held in _batches(case):
        ours = plan_step(
            held,
            cost,
            case.num_gpus,
            prove=False,
            by_time=False,
            extra_splits=1,
            time_limit_s=UNHURRIED_S,
        )
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
    """Packs of `max_seq` tokens under the best of Megatron-LM's static degrees that hold them.

    "We manually tune the most efficient strategy for baseline systems", degrees of DP, TP, PP and
    CP and checkpoints included (section 6.1).
    """
    packs = [held[pack].astype(np.float64) for pack in best_fit(held, max_seq)]
    found = [
        _megatron_step(packs, cfg, cost, on, max_seq, plan)
        for plan in _megatron_plans(cfg, on)
        if _fits(cfg, on, max_seq, plan, len(packs))
    ]
    if not found:
        not_modelled(f"no static degrees hold {max_seq} tokens of {cfg.name}")
    return min(found)


def _megatron_plans(cfg: TransformerConfig, on: Cluster) -> Iterator[Plan]:
    """Degrees that fill the cluster, powers of two: tp up to two nodes, as in the paper."""
    ranks, heads = on.num_accelerators, cfg.attention.num_heads
    powers = [2**i for i in range(ranks.bit_length())]
    for tp, cp, pp in itertools.product(powers, repeat=3):
        inside = tp <= 2 * on.accelerators_per_node and heads % tp == 0 and pp <= cfg.num_layers
        if not inside or ranks % (tp * cp * pp):
            continue
        for mode in (Recompute.NONE, Recompute.FULL):
            dp = ranks // (tp * cp * pp)
            yield Plan(dp=dp, tp=tp, cp=cp, pp=pp, recompute=mode, zero_stage=1)


def _fits(cfg: TransformerConfig, on: Cluster, max_seq: int, plan: Plan, num_packs: int) -> bool:
    """Is there room for packs of that length, all of them in flight that the schedule needs?

    Without the table of positions, which Megatron-LM holds whole on every tensor-parallel rank:
    with one row a token GPT-30B would fit none of the degrees that the paper names.
    """
    cfg = replace(cfg, num_positions=0)
    batch = plan.dp * max(-(-num_packs // int(plan.dp)), 1)
    step = train_step(cfg, len_seq=max_seq, global_batch=batch)
    memory = training_memory(step, plan=plan, recipe=recipe("bf16-grad16"))
    return float(memory.total) <= HBM_FRAC * on.device.hbm.capacity_bytes


def _megatron_step(
    packs: Sequence[Floats],
    cfg: TransformerConfig,
    cost: GroupCost,
    on: Cluster,
    max_seq: int,
    plan: Plan,
) -> float:
    """Packs dealt longest first to replicas; 1F1B in each: all its packs, and the slowest p - 1
    times more. Attention is that of the documents, and hides the ring; the tensor-parallel
    collectives wait.
    """
    ranks, tp, cp = float(plan.tp * plan.cp * plan.pp), int(plan.tp), int(plan.cp)
    again = 1.0 if plan.recompute == Recompute.FULL else 0.0
    work = (3 + again) / (3 + cost.recomputed_frac)  # a forward pass is a third
    tensor = layer_exchanges(cfg, "dense", len_seq=max_seq, plan=plan, element_bytes=ELEMENT_BYTES)
    times = [(e, e.seconds(on=on, calibrated=True)) for e in tensor if e.piece == TENSOR]
    waits = sum((1 + again) * float(t[0]) + float(t[1]) for _, t in times)
    kv_bytes = max_seq / cp * kv_elements_per_token(cfg, tp) * ELEMENT_BYTES
    send = Collective(kind="send_recv", num_bytes=kv_bytes, num_ranks=cp)
    ring = (3 + again) * (cp - 1) * float(calibrated_seconds(send, on=on, stride=tp))
    layers = cfg.num_layers / float(plan.pp)
    slots: list[list[float]] = [[] for _ in range(int(plan.dp))]
    for s in sorted(packs, key=lambda held: -float((held**2).sum())):
        full = float(s.sum()) / max_seq
        attention = work * cost.square_s * float((s**2).sum()) / ranks
        seconds = work * cost.token_s * float(s.sum()) / ranks + layers * waits * full
        emptiest = min(slots, key=sum)
        emptiest.append(seconds + max(attention, layers * ring * full))
    return max(sum(one) + (float(plan.pp) - 1) * max(one, default=0.0) for one in slots)


def _exchange_saved(cases: Sequence[_Case]) -> Value:
    """All-to-alls and whole step, static over flexible, in the run where the former gains most."""
    best = max((_times(c) for c in cases), key=lambda t: t.static_exchange / t.exchange)
    return best.deepspeed / best.flexsp, best.static_exchange / best.exchange


def _bucketing(claim: Claim) -> Value:
    """Tokens that rounding up to bucket bounds adds, %: least and most of both ways and corpora.

    Of each the largest of `BUCKET_BATCHES` batches: table 4 states the maximum.
    """
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
            worst = 0.0
            for held in _batches(replace(case, corpus=corpus), BUCKET_BATCHES):
                room = case.num_gpus * cost.rank_tokens
                parts = split(held, int(-(-held.sum() // room)))
                added = sum(bucket_error_frac(p, num, even=even) * float(p.sum()) for p in parts)
                worst = max(worst, added / float(held.sum()))
            found.append(100 * worst)
    return min(found), max(found)


# ---- ByteScale ---------------------------------------------------------------------------------

TOKENS_PER_STEP: Final = 32e6
RANK_TOKENS: Final = 8192
"""Tokens of a rank: 2M over the case study's 256 ranks."""
NUM_GROUPS: Final = 8
"""Heads of keys and values ('#Groups', table 1)."""
STATIC_FILL_FRAC: Final = TOKENS_PER_STEP / (8 * 1024 * RANK_TOKENS)
"""Fill of the static baseline's packs: 32M tokens a step (section 8.1) in 8 micro-batches of rings
of 256 ranks, on 1024 of them, each of which 'has to handle the communication volume for 2M'
(section 8.3)."""
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
            static_step(
                held, cost, num_ranks=num, rank_tokens=room, degree=ring, fill_frac=STATIC_FILL_FRAC
            ).seconds,
            hybrid_step(
                held, cost, num_ranks=num, rank_tokens=room, balance=False, offload=False
            ).seconds,
            hybrid_step(held, cost, num_ranks=num, rank_tokens=room).seconds,
        ))  # fmt: skip
    static, naive, balanced = (mean(times) for times in zip(*found, strict=True))
    return static, naive, balanced


def _corpus(token_frac: float) -> LengthDistribution:
    """The named corpus with that share of tokens above 256K, else a lognormal."""
    for name, share in ABOVE_LONG.items():
        if abs(share - token_frac) < 1e-9:
            return lengths(name)
    above = (LONG, token_frac)
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
    on = catalog.cluster(node, nodes=max(num_gpus // 8, 1))
    if not on.side_levels:
        not_modelled(f"no link to the host of {on.id} is known")
    return predicted_ring_cost(grouped(model_named(model)), on=on, host_bytes=HOST_BYTES)


def grouped(cfg: TransformerConfig) -> TransformerConfig:
    """The model with the eight groups of keys that every model of ByteScale's table 1 has."""
    spec = cfg.attention
    if not isinstance(spec, Attention) or spec.num_kv_heads <= NUM_GROUPS:
        return cfg
    return replace(cfg, attention=replace(spec, num_kv_heads=NUM_GROUPS))


def _growth(claim: Claim) -> Value:
    """Factor of the step time per doubling of the context: the least and the most of the three."""
    run = _run(claim)
    low, high = (_step_times(replace(run, context=c)) for c in DOUBLINGS)
    doublings = np.log2(DOUBLINGS[1] / DOUBLINGS[0])
    factors = [(b / a) ** (1 / doublings) for a, b in zip(low, high, strict=True)]
    return float(min(factors)), float(max(factors))
