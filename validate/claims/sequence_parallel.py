"""Sequence parallelism: LightSeq, Ulysses, LASP-2, TokenRing, both ring attentions.

Training iterations (LightSeq's tables) are steps of `simulator.sequence_step`: full recomputation
(LightSeq keeps attention's output), FSDP or tensor parallelism over all ranks, kernels with the
factors of the framework each ran on. Chosen where the setting is silent:

- "100 Gbps" between boxes is the port of one accelerator: with one port a box the all-reduces of
  Megatron-LM alone would last longer than the iterations published for it;
- LightSeq runs a Triton kernel forward, FlashAttention-2 backward (the authors' repository);
  the others FlashAttention-2 in both passes; ring self-attention writes its scores;
- heads that the ranks do not divide are padded (the paper says so of both its baselines);
- DeepSpeed-Ulysses: GPT of the sizes named (30B: 36 layers of 8192, 64 heads), one sequence a
  step, lengths doubled from 8k until the baseline, Megatron-LM's tensor parallelism over as many
  ranks, is out of memory; the best of these;
- LASP-2: 64 accelerators, the paper's, where no number is given.

TokenRing's "step" is one step of the ring in the forward pass, causal and in zigzag layout.

Findings. Megatron-LM and Ulysses come out a tenth fast at the longest lengths, where attention is
all: kernels alone are faster than in a run of minutes. Ring self-attention is three times as slow
as modelled: its eager code makes more passes over the scores. TokenRing's baseline went at 12.9
GB/s, half of NCCL's rate for a flow over PCI Express 4; its own step sends to two neighbours at
once and used 21 GB/s of the same ports. LASP-2's step has a floor of 1.6 s that the paper's own
table shows for 2k tokens; with it LASP-1 loses 10 % at 512k and 21 % at 2048k where 7 and 15 are
published: the chain of 63 hops a layer, each a product after the state has come, grows with the
length. A ring of K and V would take 12 times as long as published at the bandwidth of the links.
The blocks that hide a ring: the paper's TPUv3 has links of 112 GB/s, the catalogue's 328 GB/s (four
of 656 Gbit/s). Ring attention's contexts grow sixteen times from 8 to 32 devices, which no memory
shared out evenly does. Memory rows of ring self-attention name neither number format, nor
optimizer, nor what is recomputed; TPUs have no kernel model.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from hwmodels import catalog
from hwmodels.cluster import Cluster
from hwmodels.device import Device
from hwmodels.dtypes import BF16, FP16
from hwmodels.step_factors import shipped_factors
from simulator.linear_sequence import passed_keys_seconds, passed_states_seconds
from simulator.memory import training_memory
from simulator.recipe import recipe
from simulator.sequence_parallel import (
    Kernels,
    attention_seconds,
    step_seconds,
)
from simulator.sequence_step import (
    SpreadStep,
    sequence_parallel_step,
    spread_layers,
    tensor_parallel_step,
)
from simulator.stack import OnDevice, Stack, factors_of
from validate.claims.claim import Claim, Value, not_modelled
from validate.claims.formula import formula_value
from validate.claims.models import model_named
from workloads.models.architecture import LAYER_NORM, Attention, Mlp, TransformerConfig
from workloads.models.transformer import TrainStep, train_step
from workloads.ops.collective import Collective
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.linear_states import LinearStates
from workloads.ops.sequence_attention import RingSelfAttention, UlyssesAttention
from workloads.plan import Plan, Recompute, SequenceSplit
from workloads.sequence_parallel import (
    Strategy,
    attention_speedup,
    exchange_bytes,
    strategy,
)
from workloads.workload import BACKWARD, FORWARD

SEE_SETTING: Final = "see setting"
FA2: Final = Kernels(forward="figure:fa2", backward="figure:fa2")
TRITON_FA2: Final = Kernels(forward="figure:fa_triton", backward="figure:fa2")
EAGER: Final = Stack(name="eager-fsdp", attention_kernel="figure:fa2", pointwise="eager",
                     exposed="fsdp", source="Hugging Face layers under PyTorch's FSDP")  # fmt: skip
MEGATRON: Final = Stack(name="megatron-fa", attention_kernel="figure:fa2", pointwise="megatron",
                        source="Megatron-LM with FlashAttention")  # fmt: skip
RECIPE: Final = recipe("bf16-grad16")
SHORTEST, LONGEST = 2**13, 2**24
LASP_RANKS: Final = 64
LASP_FLOOR_S: Final = 2048 / 1285
"""What a step of the paper's trainer takes however short it is: 2,048 tokens at 1,285 tokens/s on
64 GPUs (arXiv 2502.07563, table 6; up to 64K tokens the times are the same on 16 to 128 GPUs)."""
LIGHTSEQ_NETWORK: Final = "100Gbps"
"""The network of the paper's cluster, for rows that do not repeat it."""
_NODES: Final[Mapping[str, str]] = {
    "a100-sxm4-80gb": "dgx-a100-80gb", "a100-sxm4-40gb": "dgx-a100-40gb", "a10": "a10-pcie-4",
    "h100-sxm": "hgx-h100", "h200-sxm": "hgx-h200", "h800-sxm": "hgx-h800",
    "b200-sxm": "hgx-b200",
}  # fmt: skip


# ---- LightSeq ------------------------------------------------------------------------------


def evaluate_lightseq(claim: Claim) -> Value:
    """Seconds of training iterations, longest sequences, the speedup of balanced attention."""
    quantity = claim.quantity.casefold()
    if "max seq" in quantity:
        return _longest_of_lightseq(claim)
    if claim.kind == "speedup":
        return _balance(claim)
    if "iteration" not in quantity:
        not_modelled(f"no rule for '{claim.quantity}'")
    if " vs " in quantity:
        left, right = quantity.removesuffix("iteration").split(" vs ")
        return _ordered(_iteration(claim, left), _iteration(claim, right))
    return _iteration(claim, quantity.removeprefix("iteration time"))


def _iteration(claim: Claim, system: str) -> float:
    """Seconds of one training step of a system."""
    ranks, seq = claim.sizes("n_gpus")[0], _length(claim)
    on, cfg = _cluster(claim, ranks, network=LIGHTSEQ_NETWORK), _llama(claim)
    step = train_step(cfg, len_seq=seq, global_batch=claim.setting.get("batch") or 1)
    for words, how in _SYSTEMS.items():
        if any(word in system for word in words):
            return sum(how(step, ranks, on).values())
    not_modelled(f"no system is called '{system.strip()}'")


def _lightseq(step: TrainStep, ranks: int, on: Cluster) -> Mapping[str, float]:
    return sequence_parallel_step(step, strategy("lightseq"), _run(ranks, on, EAGER, TRITON_FA2))


def _ring(name: str) -> Callable[[TrainStep, int, Cluster], Mapping[str, float]]:
    def run(step: TrainStep, ranks: int, on: Cluster) -> Mapping[str, float]:
        return sequence_parallel_step(step, strategy(name), _run(ranks, on, EAGER, FA2))

    return run


def _ulysses(step: TrainStep, ranks: int, on: Cluster) -> Mapping[str, float]:
    padded = dataclasses.replace(step, config=_padded(step.config, ranks))
    return sequence_parallel_step(padded, strategy("ulysses"), _run(ranks, on, EAGER, FA2))


def _megatron(step: TrainStep, ranks: int, on: Cluster) -> Mapping[str, float]:
    return tensor_parallel_step(step, _run(ranks, on, MEGATRON, FA2))


_SYSTEMS: Final[
    Mapping[tuple[str, ...], Callable[[TrainStep, int, Cluster], Mapping[str, float]]]
] = {
    ("megatron",): _megatron,
    ("ulysses",): _ulysses,
    ("distflash", "lightseq", "dfa"): _lightseq,
    ("rsa", "ring self"): _ring("ring_self_attention"),
    ("ring attention",): _ring("ring_attention"),
}


def _run(ranks: int, on: Cluster, stack: Stack, kernels: Kernels) -> SpreadStep:
    fitted = shipped_factors()
    factors = factors_of(stack, on.device, fitted.values if fitted else {})
    return SpreadStep(
        num_ranks=ranks, on=on, recipe=recipe("fp16"), kernels=kernels,
        stack=OnDevice(stack=stack, factors=factors),
    )  # fmt: skip


def _llama(claim: Claim) -> TransformerConfig:
    """LLaMA-7B, or a variant: LLaMA-33H has 33 heads, the setting may name others."""
    named = str(claim.need("model")[0])
    heads_in_name = re.fullmatch(r"LLaMA-(\d+)H", named)
    variant = heads_in_name or named == "LLaMA-GQA"
    base = model_named("llama-7b" if variant else named)
    s, spec = claim.setting, base.attention
    heads = int(s.get("heads") or (heads_in_name[1] if heads_in_name else spec.num_heads))
    kv_heads = s.get("kv_heads") or (spec.num_kv_heads if not variant else None)
    if named == "LLaMA-GQA" and not kv_heads:
        kv_heads = 8  # section 4: groups of four
    width = s.get("hidden")
    if width and int(width) != base.hidden_dim:
        not_modelled(f"setting unclear: {named} of width {width}; its other sizes are not given")
    assert isinstance(spec, Attention)
    attention = dataclasses.replace(spec, num_heads=heads, num_kv_heads=int(kv_heads or heads))
    layers = int(s.get("layers") or base.num_layers)
    return dataclasses.replace(base, attention=attention, num_layers=layers)


def _padded(cfg: TransformerConfig, ranks: int) -> TransformerConfig:
    """Heads of queries and keys rounded up to what the ranks divide."""
    spec = cfg.attention
    assert isinstance(spec, Attention)
    heads, kv_heads = (-(-n // ranks) * ranks for n in (spec.num_heads, spec.num_kv_heads))
    return dataclasses.replace(
        cfg, attention=dataclasses.replace(spec, num_heads=heads, num_kv_heads=kv_heads)
    )


def _balance(claim: Claim) -> Value:
    """Attention's forward speedup over one device, by the steps' longest chunks."""
    (ranks,) = claim.sizes("n_gpus")
    whole = FlashAttention2(num_heads=1, len_q=ranks * 2**14, head_dim=128, causal=True, dtype=FP16)
    names = {"balanced": "lightseq", "unbalanced": "ring_attention"}
    asked = [strategy(names[name]) for name in names if name in claim.setting]
    found = [float(attention_speedup(how, whole, ranks)) for how in asked or [strategy("lightseq")]]
    return found[0] if len(found) == 1 else _ordered(*found)


def _longest_of_lightseq(claim: Claim) -> Value:
    """Tokens that fit: needs the whole model, of which the table's rows name the heads alone."""
    claim.need("heads", "hidden", "layers")
    (ranks,) = claim.sizes("n_gpus")
    heads, hidden, layers = claim.sizes("heads", "hidden", "layers")
    cfg = dataclasses.replace(
        model_named("llama-7b"), hidden_dim=hidden, num_layers=layers,
        attention=Attention(num_heads=heads, num_kv_heads=heads, head_dim=hidden // heads,
                            rope_dim=hidden // heads),
    )  # fmt: skip
    device = claim.device("A100-40GB")
    tensor = min(heads, ranks)
    found = {
        "megatron_tp_dp": Plan(tp=tensor),
        "megatron_tp_pp": Plan(tp=tensor, pp=max(ranks // tensor, 1)),
        # Checkpoints at the layers' ends: the outputs that faster iterations keep are left out.
        "dfa": Plan(cp=ranks, zero_stage=3),
    }
    asked = [longest(cfg, plan, device) for name, plan in found.items() if name in claim.setting]
    return _ordered(min(asked), max(asked))


# ---- Ulysses -------------------------------------------------------------------------------


def evaluate_deepspeed_ulysses(claim: Claim) -> Value:
    """Message sizes, the best speedup and throughput of the sweep, the length that fits."""
    quantity = claim.quantity.casefold()
    if claim.kind == "complexity":
        return _message_sizes(claim)
    if claim.kind == "ratio":
        return float(claim.sizes("n_gpus")[0])  # 4 N h against 4 N h / P
    if claim.kind == "memory":
        return _fits(claim)
    if "speedup" in quantity:
        pairs = re.findall(r"GPT-([\d.]+)B on (\d+)", str(claim.need("models")[0]))
        if not pairs:
            not_modelled("setting unclear: models and numbers of GPUs")
        return max(max(r for r, _ in _sweep(float(b), int(n), claim)) for b, n in pairs)
    if "throughput" in quantity:
        return max(rate for b, n in ((7.0, 32), (30.0, 64)) for _, rate in _sweep(b, n, claim))
    not_modelled(f"no rule for '{claim.quantity}'")


def _sweep(billions: float, ranks: int, claim: Claim) -> list[tuple[float, float]]:
    """(speedup over tensor parallelism, TFLOP/s) of every length that the baseline can hold.

    TFLOP/s by Megatron-LM's count, recomputed passes included (Narayanan et al. 2021, section 5.1),
    but attention halved: with its whole square long sequences would exceed the peak.
    """
    cfg, on = gpt_of(billions), _cluster(claim, ranks)
    found, seq = [], SHORTEST
    while seq <= longest(cfg, Plan(tp=ranks), on.device):
        step = train_step(cfg, len_seq=seq, global_batch=1)
        ours, theirs = (sum(f(step, ranks, on).values()) for f in (_ulysses, _megatron))
        found.append((theirs / ours, counted_flops(cfg, seq) / ours / ranks / 1e12))
        seq *= 2
    if not found:
        not_modelled(f"the baseline holds no length of a GPT of {billions:g}B on {ranks} ranks")
    return found


def counted_flops(cfg: TransformerConfig, seq: int) -> float:
    """96 s l h^2 (1 + s / 12 h + V / 16 l h) a sequence, recomputation included."""
    layers, hidden, vocab = cfg.num_layers, cfg.hidden_dim, cfg.vocab_size
    factor = 1 + seq / (12 * hidden) + vocab / (16 * layers * hidden)
    return 96.0 * seq * layers * hidden**2 * factor


_GPT: Final[Mapping[float, tuple[int, int, int]]] = {
    1.2: (24, 2048, 16), 7.0: (32, 4096, 32), 30.0: (36, 8192, 64),
}  # fmt: skip
"""Layers, width, heads; 12 l h^2 parameters and the embedding."""


def gpt_of(billions: float) -> TransformerConfig:
    """A GPT of about that many parameters."""
    if billions not in _GPT:
        not_modelled(f"setting incomplete: no sizes are known of a GPT of {billions:g}B")
    layers, hidden, heads = _GPT[billions]
    attention = Attention(num_heads=heads, num_kv_heads=heads, head_dim=hidden // heads)
    return TransformerConfig(
        name=f"gpt-{billions:g}b", family="gpt", hidden_dim=hidden, num_layers=layers,
        vocab_size=50304, attention=attention, norm=LAYER_NORM, tied_embeddings=True,
        num_positions=1, mlp=Mlp(ffn_dim=4 * hidden, gated=False, activation="gelu"),
    )  # fmt: skip


def _message_sizes(claim: Claim) -> str:
    """'see setting' where messages of a layer, forward, have the elements the formulas say."""
    ranks, seq, heads, width = 8, 2**16, 32, 128
    sizes = {"N": float(seq), "h": float(heads * width), "P": float(ranks)}
    op = UlyssesAttention(num_heads=heads, len_seq=seq, head_dim=width, num_ranks=ranks)
    ours = {
        "ulysses": float(op.sent_bytes()) / op.dtype.bytes_per_element,
        # Both blocks gather their input and scatter their output.
        "megatron_sp": 4 * float(Collective("all_gather", seq * heads * width, ranks).num_bytes),
    }
    asked = {name: text for name, text in claim.setting.items() if name in ours}
    if not asked:
        not_modelled("setting incomplete: no formula")
    for name, text in asked.items():
        if abs(formula_value(str(text), sizes) / ours[name] - 1) > 0.01:
            return f"{name}: {ours[name]:g} elements at N {seq}, h {heads * width}, P {ranks}"
    return SEE_SETTING


def _fits(claim: Claim) -> float:
    """The length that the quantity names where memory holds it, else the longest that it holds."""
    (ranks,) = claim.sizes("n_gpus")
    size = re.search(r"([\d.]+)B GPT", claim.quantity)
    asked = re.search(r"to ([\d.]+)([KM]) tokens", claim.quantity)
    if not size or not asked:
        not_modelled("setting incomplete: no model, or no length")
    tokens = float(asked[1]) * {"K": 1e3, "M": 1e6}[asked[2]]
    cfg, device = gpt_of(float(size[1])), claim.device()
    degree = min(ranks, cfg.attention.num_heads)  # the rest of the ranks are data-parallel
    split = SequenceSplit.ULYSSES if degree > 1 else SequenceSplit.RING_ZIGZAG
    plan = Plan(cp=degree, zero_stage=3, dp=ranks // degree, sequence=split)
    held = longest(cfg, plan, device)
    return min(tokens, float(held))


def longest(cfg: TransformerConfig, plan: Plan, device: Device, shortest: int = SHORTEST) -> int:
    """The longest of the doubled lengths that fits under full recomputation; 0: none."""
    held, seq = 0, shortest
    full = dataclasses.replace(plan, recompute=Recompute.FULL)
    while seq <= LONGEST:
        step = train_step(cfg, len_seq=seq, global_batch=plan.dp)
        total = float(training_memory(step, plan=full, recipe=RECIPE).total)
        if total > float(device.hbm.capacity_bytes):
            return held
        held, seq = seq, 2 * seq
    return held


# ---- LASP-2 --------------------------------------------------------------------------------


def evaluate_lasp2(claim: Claim) -> Value:
    """Per cent of speed over LASP-1 and a ring of K and V; serial messages."""
    s = claim.setting
    ranks = int(s.get("n_gpus", LASP_RANKS))
    if claim.kind == "complexity":
        op = LinearStates(num_heads=16, len_seq=ranks * 1024, head_dim=128, num_ranks=ranks)
        few, many = op.num_sends()
        return float(few), float(many)
    if claim.kind != "speedup":
        not_modelled(f"no rule for '{claim.quantity}'")
    (seq,) = claim.sizes("seq")
    on = _cluster(claim, ranks, "A100-80GB")
    times = {name: _linear_step(name, seq, ranks, on) for name in ("lasp2", "lasp1", "ring")}
    asked = [name for name in ("lasp1", "ring") if name in s] or ["lasp1"]
    found = [100 * (times[name] / times["lasp2"] - 1) for name in asked]
    return found[0] if len(found) == 1 else _ordered(*found)


def _linear_layers(name: str, shape: FlashAttention2, layers: int, **ranks: Any) -> float:
    """Attention of a step's layers, forward and backward."""
    how = strategy("lasp2")
    if name == "lasp1":
        chained = [passed_states_seconds(shape, phase=p, **ranks) for p in (FORWARD, BACKWARD)]
        return layers * sum(found.seconds for found in chained)
    attend = passed_keys_seconds if name == "ring" else partial(attention_seconds, how)
    forward, backward = (attend(shape, phase=p, **ranks).seconds for p in (FORWARD, BACKWARD))
    return layers * (forward + backward)


def _linear_step(name: str, seq: int, ranks: int, on: Cluster) -> float:
    """A training step of Linear-Llama3-1B: 16 layers of 2048, 16 heads, gated MLP of 5504."""
    attention = Attention(num_heads=16, num_kv_heads=16, head_dim=128)
    cfg = TransformerConfig(
        name="linear-llama3-1b", family="llama", hidden_dim=2048, num_layers=16,
        vocab_size=128256, attention=attention,
        mlp=Mlp(ffn_dim=5504, gated=True, activation="silu"),
    )  # fmt: skip
    step = train_step(cfg, len_seq=seq, global_batch=1)
    shape = FlashAttention2(num_heads=16, len_q=seq, head_dim=128, causal=True, dtype=FP16)
    core = _linear_layers(name, shape, cfg.num_layers, num_ranks=ranks, on=on)
    # Nothing is recomputed: 32 GB for 16K tokens a GPU (table 6) are 16 layers' 34 h s bytes.
    run = dataclasses.replace(_run(ranks, on, EAGER, FA2), recompute=False)
    return LASP_FLOOR_S + sum(spread_layers(step, run, core / cfg.num_layers).values())


# ---- rings ---------------------------------------------------------------------------------


def evaluate_token_ring(claim: Claim) -> Value:
    """Milliseconds of one step of the ring."""
    s = claim.setting
    seq, heads, width, ranks = claim.sizes("seq", "heads", "head_dim", "n_gpus")
    shape = FlashAttention2(num_heads=heads, num_kv_heads=s.get("kv_heads"), len_q=seq,
                            head_dim=width, causal=True, dtype=claim.dtype(FP16))  # fmt: skip
    on = _cluster(claim, ranks)

    def step(how: Strategy, number: int) -> float:
        return 1e3 * step_seconds(how, shape, num_ranks=ranks, on=on, step=number, kernels=FA2)

    if "tokenring" in claim.quantity.casefold():
        return _ordered(step(strategy("token_ring"), 1), step(strategy("token_ring"), 2))
    return step(strategy("zigzag_ring"), 1)


def evaluate_ring_self_attention(claim: Claim) -> Value:
    """Elements sent in a layer, and where memory crosses that of tensor parallelism."""
    if claim.kind == "memory":
        not_modelled(
            "setting incomplete: neither number format, optimizer nor recomputation is named"
        )
    if "formula" in claim.setting:
        return _ring_elements(str(claim.setting["formula"]))
    return _crossover(claim)


def _ring_elements(formula: str) -> str:
    """The formula itself where our count agrees, and Megatron's where it is said to be equal."""
    batch, heads, seq, width, ranks = 3, 4, 64, 8, 4
    op = RingSelfAttention(
        batch=batch, num_heads=heads, len_seq=seq, head_dim=width, num_ranks=ranks
    )
    e, how = op.dtype.bytes_per_element, strategy("ring_self_attention")
    both = [exchange_bytes(how, op.whole(), ranks, phase=p) for p in (FORWARD, BACKWARD)]
    ours = sum(float(sent["send_recv"]) for sent in both) / e
    sizes = {"N": ranks, "B": batch, "Z": heads, "L": seq, "A": width}
    text = formula.split(" total")[0].replace("*", " ")
    same = abs(formula_value(text, {k: float(v) for k, v in sizes.items()}) / ours - 1) < 0.01
    if same and "Megatron" in formula:
        hidden = heads * width
        tensor = 4 * float(Collective("all_reduce", batch * seq * hidden, ranks).wire_bytes())
        same = abs(tensor / ours - 1) < 0.01
    return formula if same else f"{float(ours):g} elements at {sizes}"


def _crossover(claim: Claim) -> str:
    """'see setting' where sequence parallelism keeps less than tensor parallelism from there on.

    Tensor parallelism divides weights by N (4 elements a parameter: it, its gradient, Adam's two)
    and keeps B L H activations whole; sequence parallelism the other way round: they cross at
    B L H = 4 parameters. A feed-forward block has 8 H^2 parameters, attention 4 A Z H.
    """
    sizes = {"H": 96.0, "A": 8.0, "Z": 12.0}
    blocks = {"mlp": 8 * sizes["H"] ** 2, "attention": 4 * sizes["A"] * sizes["Z"] * sizes["H"]}
    asked = {name: text for name, text in claim.setting.items() if name in blocks}
    if not asked:
        not_modelled("setting incomplete: no condition")
    for name, text in asked.items():
        limit = formula_value(str(text).split(">")[1].replace("*", " "), sizes)
        ours = 4 * blocks[name] / sizes["H"]
        if abs(limit / ours - 1) > 0.01:
            return f"{name}: B L > {ours / sizes['H']:g} H"
    return SEE_SETTING


def evaluate_ring_attention_lwm(claim: Claim) -> Value:
    """Steps of training stages, blocks that hide the ring, contexts that fit."""
    s, quantity = claim.setting, claim.quantity.casefold()
    if "stages" in quantity:
        (tokens, batch) = claim.need("tokens_B", "tokens_per_batch")
        steps = [1e9 * float(t) / _number(batch) for t in tokens]
        return _ordered(min(steps), max(steps))
    if "block size" in quantity:
        found = [_block(name) for name in s]
        return _ordered(min(found), max(found))
    if "max context" in quantity:
        device, cfg = claim.device("A100-80GB"), model_named("llama-7b")
        ranks = [int(n[1:]) for n in s if re.fullmatch(r"x\d+", n)]
        if not ranks:
            not_modelled("setting incomplete: no number of devices")
        # The table's K are thousands.
        held = [longest(cfg, Plan(cp=n, zero_stage=3), device, shortest=8000) for n in ranks]
        return _ordered(min(held), max(held))
    not_modelled("setting unclear: TPUs are timed at the bound alone, no kernel model knows them")


def _block(name: str) -> float:
    """Tokens c at which 4 d c^2 flops hide 4 c d bytes: peak over bandwidth."""
    chip, _, link = name.casefold().partition("_")
    device = catalog.device(_CHIPS.get(chip, chip))
    inner = max((link.bytes_per_s for link in device.links), default=math.nan)
    return device.matmul_rate_flops_per_s(BF16)[0] / _PORTS.get(link, inner)


_CHIPS: Final[Mapping[str, str]] = {
    "a100": "a100-sxm4-80gb", "tpuv3": "tpu-v3", "tpuv4": "tpu-v4", "tpuv5e": "tpu-v5e",
}  # fmt: skip
_PORTS: Final[Mapping[str, float]] = {"ib": 12.5e9}
"""Network ports that names mean: 100 Gbit/s (Liu et al. 2023, table 2)."""


# ---- what all of them need -----------------------------------------------------------------


def _cluster(claim: Claim, ranks: int, default: str | None = None, network: str = "") -> Cluster:
    """The node of the setting's device, as many as the ranks need, its network as stated."""
    node = _node_of(claim.device(default))
    nodes = -(-ranks // node.accelerators_per_node)
    rate = re.search(r"(\d+)\s*Gbps", str(claim.setting.get("interconnect", network)))
    levels = node.levels
    if rate:
        port = float(rate[1]) * 1e9 / 8
        inner, *outer = levels
        levels = (inner, *(dataclasses.replace(level, bytes_per_s=port) for level in outer))
    return dataclasses.replace(node, num_nodes=nodes, levels=levels)


def _node_of(device: Device) -> Cluster:
    """The usual node of a device, else the first that the catalogue has."""
    if device.id in _NODES:
        return catalog.cluster(_NODES[device.id])
    for cluster in catalog.clusters():
        if cluster.device.id == device.id:
            return cluster
    not_modelled(f"setting unclear: no cluster of {device.id} is known")


def _length(claim: Claim) -> int:
    return claim.sizes("seq_total" if "seq_total" in claim.setting else "seq")[0]


def _number(text: object) -> float:
    """'4M' as a number."""
    found = re.fullmatch(r"([\d.]+)\s*([KMB]?)", str(text).strip())
    if not found:
        not_modelled(f"setting unclear: '{text}' is no number")
    return float(found[1]) * {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}[found[2]]


def _ordered(*found: float) -> tuple[float, float]:
    return min(found), max(found)
