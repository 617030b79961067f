"""Serving at the calibrated rung: a decode step, a prefill, and the time of an output token.

A pass of one rank is the list of kernels of `simulator.serving_kernels`, each timed by
`simulator.kernel_time.predict`. With B sequences decoding on a rank, and requests of I prompt and
O output tokens:

    step(B) = pass(B) + step_s + sent B sequence_s                                              (1)
    extra   = pass(one prompt and B) - pass(B)        an engine that mixes both in a pass       (2)
    extra   = pass(one prompt) + step_s               one that does not (SGLang)                (2')
    TPOT    = step(B) + meets (B - 1) / O (extra + prompt_s)      aggregated                    (3)
    TPOT    = step(B)                                 disaggregated: prompts run elsewhere      (3')
    TTFT    = pass(one prompt and B) + step_s + launches launch_s + (1/2 + wait) step(B)        (4)

(3): continuous batching (Yu et al., Orca, OSDI 2022) takes a prompt in whenever a request ends.
While one request makes its O tokens, each of the B - 1 others ends once, so that all their prompts
fall on its steps: `meets` = 1. Where prompts run first and all requests are of one length, those
that begin together decode together and end together, and wait for each other's prompts before
their first token instead: a request meets half of the others on average (`meets` = 1/2). A closed
loop of either scheduler, pass by pass, gives these shares to within 0.1 (a test holds them).
Prompts that share a pass would meet less; times to first tokens that a calibration may use show
that requests which end together do not come back in one pass.

(1): `sent` is the share of steps whose tokens hold the host up on their way to the clients: 1 where
every token goes out at once, 1/n where n tokens go together, 0 where the engine sends them beside
the next pass. (4): no graph replays a prompt's pass, so that the host launches it kernel by kernel;
`wait` are steps for which the engine holds a prompt back to join it with others.

Pipeline stages (pp): the B sequences go round in min(pp, B) slots, each stage busy with one slot,
so that a step takes slots x the slowest stage, and no less than one slot needs for its way. A
prompt occupies each stage for extra / pp.

B = min(C, requests whose pages fit beside the weights): `simulator.serving_memory`. Left out:
drafting (several tokens a step), the client, prompts cut into chunks, clocks that fall in long
runs. Pipelines and eager decoding were compared with no published figure.
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
from simulator.mixer_kernels import pass_kernels
from simulator.serving_kernels import (
    EXPERTS,
    Batch,
    Engine,
    Kernel,
    Served,
    end_kernels,
    send,
)
from simulator.serving_memory import cache_bytes, paged, state_bytes, weight_bytes
from workloads.models.parameters import count_parameters
from workloads.numeric import ceil_div
from workloads.op import Op

PROMPT_TOKENS: Final = 8192
"""Prompt tokens of one pass: the default of vLLM (max_num_batched_tokens of its server),
TensorRT-LLM (max_num_tokens) and SGLang (chunked_prefill_size)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The constants of serving that no kernel's timing holds; fitted, see `FITTED_ON`.

    `step_s`: seconds by engine that the scheduler, sampling and the hand-over of a pass add to
    its kernels. `sequence_s`: seconds for the token of one sequence on its way to its client
    (detokenised, its state updated). `prompt_s`: seconds a prompt holds others up beyond its
    kernels. `launch_s`: seconds by engine from one kernel of a prompt's first pass to the next,
    beyond the kernels: launches from Python, hand-over, the client.
    """

    step_s: Mapping[str, float]
    sequence_s: float
    prompt_s: float
    launch_s: Mapping[str, float]

    def step(self, engine: Engine) -> float:
        """Seconds of the host a pass; an `InputError` for an engine never fitted."""
        return _of(self.step_s, engine)

    def launch(self, engine: Engine) -> float:
        """Seconds of the host a kernel of an eager pass."""
        return _of(self.launch_s, engine)


def _of(values: Mapping[str, float], engine: Engine) -> float:
    if engine.name not in values:
        raise InputError(f"no host time of {engine.name} is known; fit one")
    return values[engine.name]


FITTED_ON: Final = (
    "aiconfigurator's silicon samples (tpot_ms, ttft_ms), aggregated, H100 and B200; `python -m "
    "validate.serving DIR`, dense models and routed experts without drafting"
)
"""Source of the values of `HOST`."""
HOST: Final = Host(
    step_s={"trtllm": 0.0, "vllm": 62e-6, "sglang": 1.14e-3},
    sequence_s=16e-6,
    prompt_s=3.7e-3,
    launch_s={"trtllm": 109e-6, "vllm": 57e-6, "sglang": 183e-6},
)
"""The fitted constants, in seconds. An engine whose kernels alone already take what was measured is
at 0: its scheduler runs beside the pass. Beside these values, whose kernels run, in which formats,
and how tokens choose experts (`simulator.serving_kernels`) was settled on the same rows where no
documentation did."""
RANGES: Final[Mapping[str, tuple[float, float]]] = {"tpot": (0.84, 1.20), "ttft": (0.69, 1.78)}
"""Measured over predicted, first and last tenth, of figures whose model was left out of the fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`concurrency` requests in flight on one attention group, each of `isl` and `osl` tokens.

    `disaggregated`: prompts run elsewhere. `together`: requests are of one length and begin
    together; else their lengths differ about these means. `sent_frac`, `wait_steps`: as in the
    module's docstring. `graphs`: a captured graph replays decoding passes; else they are launched
    kernel by kernel.
    """

    concurrency: float
    isl: int
    osl: int
    disaggregated: bool = False
    together: bool = False
    sent_frac: float = 1.0
    wait_steps: float = 0.0
    graphs: bool = True

    def __post_init__(self) -> None:
        if not (self.concurrency >= 1 and self.isl >= 1 and self.osl >= 1):
            raise InputError(
                f"concurrency {self.concurrency:g}, isl {self.isl}, osl {self.osl}: none may be "
                "below 1; give whole numbers"
            )

    @property
    def len_context(self) -> int:
        """Tokens in a request's cache halfway through its output."""
        return self.isl + self.osl // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """Seconds of the kernels of one pass by part, and how many there are; `ends_s` of its ends."""

    parts: tuple[tuple[str, float], ...]
    num_kernels: float
    ends_s: float = 0.0

    @property
    def seconds(self) -> float:
        """All kernels."""
        return sum(s for _, s in self.parts)


@lru_cache(maxsize=1 << 18)
def _kernel_s(op: Op, device: Device, conditions: Conditions) -> float:
    return float(predict(op, on=device, conditions=conditions).seconds)


def _seconds(served: Served, kernel: Kernel) -> float:
    return kernel.times * _kernel_s(kernel.op, served.device, kernel.conditions)


def forward_pass(served: Served, batch: Batch) -> Pass:
    """Kernels alone, of all pipeline stages."""
    parts: dict[str, float] = {}
    beside: dict[str, float] = {}
    count = 0.0
    for k in pass_kernels(served, batch):
        into = beside if k.beside else parts
        into[k.part] = into.get(k.part, 0.0) + _seconds(served, k)
        count += k.times
    hidden = parts.get(EXPERTS, 0.0)
    parts |= {part: max(s - hidden, 0.0) for part, s in beside.items()}
    ends = sum(_seconds(served, k) for k in end_kernels(served, batch))
    return Pass(parts=tuple(parts.items()), num_kernels=count, ends_s=ends)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What an output token's time is made of, before the host's constants.

    `batch` sequences decode on a rank in `decode_s`, of which `parts` are kernels; `prompt_s` is
    the pass that takes a prompt in, of `prompt_kernels` kernels, `extra_s` what it costs the
    sequences; `prompts` are those that fall on a request's steps, per output token.
    """

    engine: Engine
    load: Load
    batch: float
    decode_s: float
    prompt_s: float = 0.0
    extra_s: float = 0.0
    prompts: float = 0.0
    decode_kernels: float = 0.0
    prompt_kernels: float = 0.0
    parts: tuple[tuple[str, float], ...] = ()


SCHEDULER: Final = "scheduler and hand-over"
SENDING: Final = "tokens to their clients"
PROMPTS: Final = "prompts of others"
LAUNCHES: Final = "launches that no kernel hides"
STAGES: Final = "pipeline stages that wait"
LAUNCHING: Final = "launching a prompt's pass, its way in and out"


def tpot_parts(t: Terms, host: Host = HOST) -> dict[str, float]:
    """Where the seconds of an output token go; they add up to `tpot_s`."""
    step, own = host.step(t.engine), sum(s for _, s in t.parts)
    extra = t.extra_s + host.prompt_s + (0.0 if t.engine.mixes else step)
    parts = dict(t.parts)
    parts[STAGES] = t.decode_s - own if t.parts else 0.0
    if not t.parts:
        parts["kernels"] = t.decode_s
    parts[LAUNCHES] = _unhidden_s(t, host)
    parts[SCHEDULER] = step
    parts[SENDING] = t.load.sent_frac * t.batch * host.sequence_s
    parts[PROMPTS] = t.prompts * extra
    return {name: s for name, s in parts.items() if s > 0}


def _unhidden_s(t: Terms, host: Host) -> float:
    """What launching an eager decoding pass takes longer than its kernels."""
    if t.load.graphs:
        return 0.0
    return max(t.decode_kernels * host.launch(t.engine) - t.decode_s, 0.0)


def step_s(t: Terms, host: Host = HOST) -> float:
    """Seconds of a decoding step that takes no prompt in."""
    sent = t.load.sent_frac * t.batch * host.sequence_s
    return t.decode_s + _unhidden_s(t, host) + host.step(t.engine) + sent


def tpot_s(t: Terms, host: Host = HOST) -> float:
    """Seconds of an output token, as the client sees them: (3)."""
    extra = t.extra_s + host.prompt_s + (0.0 if t.engine.mixes else host.step(t.engine))
    return step_s(t, host) + t.prompts * extra


def ttft_s(t: Terms, host: Host = HOST) -> float:
    """Seconds to the first token of a request that waits for no other prompt: (4)."""
    return sum(ttft_parts(t, host).values())


def ttft_parts(t: Terms, host: Host = HOST) -> dict[str, float]:
    """Where the seconds before a first token go."""
    return {
        "its prompt's pass": t.prompt_s,
        LAUNCHING: t.prompt_kernels * host.launch(t.engine),
        SCHEDULER: host.step(t.engine),
        "the step under way": step_s(t, host) / 2,
        "held back to join others": t.load.wait_steps * step_s(t, host),
    }


def capacity(served: Served, load: Load) -> float:
    """Requests of mean length whose pages fit on one attention group beside a rank's weights."""
    return paged(served, isl=load.isl, osl=load.osl).most_requests


def least_s(served: Served, load: Load) -> float:
    """Seconds to read the weights hit and all caches once at peak bandwidth: no step is faster."""
    batch = min(load.concurrency, capacity(served, load))
    moe, split, formats = served.config.moe, served.layout, served.formats
    read = weight_bytes(served)
    if moe is not None:
        held = count_parameters(served.config).experts * formats.experts.stored.bytes_per_element
        missed = (1 - moe.num_active / moe.num_experts) ** (batch * split.attn_dp)
        read -= missed * held / (split.moe_tp * split.moe_ep * split.pp)
    if split.pp == 1:  # the embedding is looked up, not read
        table = served.config.vocab_size * served.config.hidden_dim * BF16.bytes_per_element
        read -= table / split.tp
    read += batch * (cache_bytes(served, load.isl + load.osl / 2) + state_bytes(served))
    bandwidth = served.device.hbm.bytes_per_s
    if bandwidth is None:
        raise InputError(f"{served.device.id} states no memory bandwidth; give its spec file one")
    return float(read / bandwidth)


def terms(served: Served, load: Load) -> Terms:
    """Kernels of the passes that one output token's time is made of."""
    batch = float(math.floor(min(load.concurrency, capacity(served, load))))
    if batch < 1:
        raise InputError("not one request's cache fits; give more ranks or shorter requests")
    engine, stages = served.engine, served.layout.pp
    slots = min(stages, batch)
    decoding = Batch(num_decoding=math.ceil(batch / slots), len_context=load.len_context)
    decode = forward_pass(served, decoding)
    found = Terms(engine=engine, load=load, batch=batch, parts=decode.parts,
                  decode_s=round_s(served, decode, decoding, slots),
                  decode_kernels=slots * decode.num_kernels)  # fmt: skip
    if load.disaggregated:
        return found
    alone = Batch(num_prompts=1, len_prompt=load.isl)
    mixed = replace(decoding, num_prompts=1, len_prompt=load.isl)
    prompt = forward_pass(served, mixed if engine.mixes else alone)
    extra = prompt.seconds - decode.seconds if engine.mixes else prompt.seconds
    meets = 0.5 if load.together and not engine.mixes else 1.0
    return replace(
        found,
        prompt_s=prompt.seconds,
        extra_s=extra / stages,
        prompts=meets * (batch - 1) / load.osl,
        prompt_kernels=prompt.num_kernels,
    )


def round_s(served: Served, decode: Pass, batch: Batch, slots: float) -> float:
    """Seconds in which every slot of a pipeline has advanced by one token."""
    stages, layers = served.layout.pp, served.config.num_layers
    if stages == 1:
        return decode.seconds
    hops = stages * _seconds(served, send(served, batch.num_tokens))
    share = int(ceil_div(layers, stages)) / layers
    slowest = (decode.seconds - decode.ends_s) * share + decode.ends_s
    return max(decode.seconds + hops, slots * slowest)
