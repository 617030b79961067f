"""Serving at the calibrated rung: a decode step, a prefill, and the time of an output token.

A pass of one rank is the list of kernels of `simulator.serving_kernels`, each timed by
`simulator.kernel_time.predict`. With B sequences decoding on a rank, and C requests of I prompt
and O output tokens in flight on one attention group:

    pass(B)  = kernels + step_s + B sequence_s
    extra    = pass(one prompt and B) - pass(B)            an engine that mixes both in a pass
    extra    = pass(one prompt)                            one that does not (SGLang)
    TPOT     = pass(B) + interleave (B - 1) / O extra      aggregated
    TPOT     = pass(B)                                     disaggregated: prompts run elsewhere
    TTFT     = pass(one prompt and B) + pass(B) / 2        no queue: only the pass under way

Continuous batching (Yu et al., Orca, OSDI 2022) takes a prompt in whenever a request ends: while
one request makes its O tokens, each of the B - 1 others ends once, so that all of their prompts
fall on its steps where requests are spread evenly (`interleave` = 1), and half of them where all
begin and end together (1/2), since a request waits for the others' before its first token.

B = min(C, requests whose caches fit beside the weights). Left out: drafting (several tokens a
step), the spread of lengths, the client, prompts cut into chunks, clocks that fall in long runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from hwmodels.device import Device
from hwmodels.dtypes import BF16
from hwmodels.errors import InputError
from simulator.kernel_time.model import Conditions
from simulator.kernel_time.predict import predict
from simulator.serving_kernels import EXPERTS, Batch, Engine, Served, forward_kernels
from workloads.models.architecture import LatentAttention
from workloads.models.parameters import count_parameters
from workloads.op import Op

MEMORY_FRAC: Final = 0.9
"""Share of device memory that engines fill: vLLM's gpu_memory_utilization and TensorRT-LLM's
free_gpu_memory_fraction, both 0.9 by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The constants of serving that no kernel's timing holds; fitted, see `FITTED_ON`.

    `step_s`: seconds by engine that the scheduler, sampling and the hand-over of a pass add to
    its kernels. `sequence_s`: seconds a pass takes longer for each sequence in it (its tokens are
    detokenised, its state updated). `interleave_mixed`, `interleave_apart`: prompts of others that
    fall on a request's steps, per prompt that ends meanwhile, where prompts share the pass of
    decoding sequences and where they have their own; 1 spread evenly, 1/2 in step.
    """

    step_s: Mapping[str, float]
    sequence_s: float
    interleave_mixed: float
    interleave_apart: float

    def step(self, engine: Engine) -> float:
        """Seconds of the host a pass; an `InputError` for an engine never fitted."""
        if engine.name not in self.step_s:
            raise InputError(f"no host time of {engine.name} is known; fit one")
        return self.step_s[engine.name]


FITTED_ON: Final = (
    "aiconfigurator's silicon samples (tpot_ms), aggregated, H100 and B200; `python -m "
    "validate.serving DIR`, dense models and routed experts without drafting"
)
"""Source of the values of `HOST`."""
HOST: Final = Host(
    step_s={"trtllm": 98e-6, "vllm": 0.0, "sglang": 927e-6},
    sequence_s=3.4e-6,
    interleave_mixed=1.07,
    interleave_apart=0.50,
)
"""The fitted constants, in seconds. An engine whose kernels alone already take what was measured is
at 0. Beside these six values, whose kernels run, in which formats, and how tokens choose experts
(`simulator.serving_kernels`) was settled on the same rows where no documentation did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`concurrency` requests in flight on one attention group, each of `isl` and `osl` tokens.

    `disaggregated`: prompts run elsewhere.
    """

    concurrency: float
    isl: int
    osl: int
    disaggregated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """Seconds of the kernels of one pass, by part."""

    parts: tuple[tuple[str, float], ...]

    @property
    def seconds(self) -> float:
        """All kernels."""
        return sum(s for _, s in self.parts)


@lru_cache(maxsize=1 << 18)
def _kernel_s(op: Op, device: Device, conditions: Conditions) -> float:
    return float(predict(op, on=device, conditions=conditions).seconds)


def forward_pass(served: Served, batch: Batch) -> Pass:
    """Kernels alone."""
    parts: dict[str, float] = {}
    beside: dict[str, float] = {}
    for k in forward_kernels(served, batch):
        seconds = k.times * _kernel_s(k.op, served.device, k.conditions)
        into = beside if k.beside else parts
        into[k.part] = into.get(k.part, 0.0) + seconds
    hidden = parts.get(EXPERTS, 0.0)
    parts |= {part: max(s - hidden, 0.0) for part, s in beside.items()}
    return Pass(parts=tuple(parts.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What an output token's time is made of, before the host's constants.

    `batch` sequences decode on a rank in `decode_s`; `prompt_s` is the pass that takes a prompt
    in, `extra_s` what it costs them; `prompts` are those that end meanwhile, per output token.
    """

    engine: Engine
    batch: float
    decode_s: float
    prompt_s: float
    extra_s: float
    prompts: float


def tpot_s(t: Terms, host: Host = HOST) -> float:
    """Seconds of an output token, as the client sees them."""
    step = host.step(t.engine)
    decode = t.decode_s + step + t.batch * host.sequence_s
    if t.engine.mixes:
        return decode + host.interleave_mixed * t.prompts * t.extra_s
    return decode + host.interleave_apart * t.prompts * (t.extra_s + step)


def ttft_s(t: Terms, host: Host = HOST) -> float:
    """Seconds to the first token of a request that waits for no other prompt."""
    step = host.step(t.engine)
    under_way = t.decode_s + step + t.batch * host.sequence_s
    return t.prompt_s + step + under_way / 2


def capacity(served: Served, load: Load) -> float:
    """Requests whose caches fit on one attention group beside the weights of a rank.

        (share x capacity - weights) / (bytes of a token's cache x mean length)

    with the mean length I + O / 2 of a request in flight. Windowed layers keep the window.
    """
    room = MEMORY_FRAC * served.device.hbm.capacity_bytes - weight_bytes(served)
    if room <= 0:
        raise InputError("the weights do not fit the device; give more ranks or a wider layout")
    return room / cache_bytes(served, load.isl + load.osl / 2)


def cache_bytes(served: Served, length: float) -> float:
    """Bytes of one request's cache on one rank."""
    cfg, element = served.config, served.formats.cache.bytes_per_element
    a = cfg.attention
    if isinstance(a, LatentAttention):
        return cfg.num_layers * a.latent_dim * length * element
    windowed = cfg.num_windowed_layers if cfg.window else 0
    rows = (cfg.num_layers - windowed) * length + windowed * min(cfg.window or 0, length)
    kv_heads = -(-a.num_kv_heads // served.layout.tp)
    return 2 * kv_heads * a.head_dim * rows * element


def weight_bytes(served: Served) -> float:
    """Bytes of one rank's weights: the parts of the model in their formats, split as laid out."""
    count, split, formats = count_parameters(served.config), served.layout, served.formats
    mlp = (count.mlp + count.shared_experts) * formats.mlp.stored.bytes_per_element
    heads = count.attention * formats.attention.stored.bytes_per_element
    ends = (count.embedding_and_head + count.router) * BF16.bytes_per_element
    experts = count.experts * formats.experts.stored.bytes_per_element
    return (mlp + heads + ends) / split.tp + experts / (split.moe_tp * split.moe_ep)


def least_s(served: Served, load: Load) -> float:
    """Seconds to read the weights hit and all caches once at peak bandwidth: no step is faster."""
    batch = min(load.concurrency, capacity(served, load))
    moe, split, formats = served.config.moe, served.layout, served.formats
    read = weight_bytes(served)
    if moe is not None:
        held = count_parameters(served.config).experts * formats.experts.stored.bytes_per_element
        missed = (1 - moe.num_active / moe.num_experts) ** (batch * split.attn_dp)
        read -= missed * held / (split.moe_tp * split.moe_ep)
    table = served.config.vocab_size * served.config.hidden_dim * BF16.bytes_per_element
    read -= table / split.tp  # the embedding is looked up, not read
    read += batch * cache_bytes(served, load.isl + load.osl / 2)
    bandwidth = served.device.hbm.bytes_per_s
    if bandwidth is None:
        raise InputError(f"{served.device.id} states no memory bandwidth; give its spec file one")
    return float(read / bandwidth)


def terms(served: Served, load: Load) -> Terms:
    """Kernels of the passes that one output token's time is made of."""
    batch = float(math.floor(min(load.concurrency, capacity(served, load))))
    if batch < 1:
        raise InputError("not one request's cache fits; give more ranks or shorter requests")
    decoding = Batch(num_decoding=batch, len_context=load.isl + load.osl / 2)
    mixed = replace(decoding, num_prompts=1, len_prompt=load.isl)
    engine, decode_s = served.engine, forward_pass(served, decoding).seconds
    if load.disaggregated:
        return Terms(engine=engine, batch=batch, decode_s=decode_s, prompt_s=0.0, extra_s=0.0,
                     prompts=0.0)  # fmt: skip
    prompt = mixed if engine.mixes else Batch(num_prompts=1, len_prompt=load.isl)
    prompt_s = forward_pass(served, prompt).seconds
    return Terms(
        engine=engine,
        batch=batch,
        decode_s=decode_s,
        prompt_s=prompt_s,
        extra_s=prompt_s - decode_s if engine.mixes else prompt_s,
        prompts=(batch - 1) / load.osl,
    )
