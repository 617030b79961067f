"""The answer to a serving question: times of tokens, throughput, memory, and why.

    requests/s = replicas B / (TTFT + (O - 1) TPOT)      B in flight on each replica of attention
    tokens/s   = O requests/s                            output tokens of the engine

TPOT and TTFT as of `simulator.serving`, with the range in which four fifths of the published
figures of models left out of the fit lay. Requests beyond those that fit wait, and so does a prompt
whose turn comes after others': the time to the first token holds neither wait, so that throughput
is that of requests in flight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from hwmodels.dtypes import BF16, FP8, NVFP4, DType
from hwmodels.errors import InputError, UnknownNameError
from simulator.serving import (
    HOST,
    LAUNCHING,
    PROMPT_TOKENS,
    RANGES,
    SCHEDULER,
    Load,
    Terms,
    forward_pass,
    round_s,
    step_s,
    terms,
    tpot_parts,
    tpot_s,
    ttft_parts,
    ttft_s,
)
from simulator.serving_kernels import Batch, Formats, Linear, Served
from simulator.serving_memory import Paged, paged

_EIGHT, _BLOCK = Linear(dtype=FP8), Linear(dtype=FP8, scheme="block")
_FOUR: Final = Linear(dtype=NVFP4, scheme="block")
PRECISIONS: Final[Mapping[str, Formats]] = MappingProxyType(
    {
        "bf16": Formats(),
        "fp8": Formats(attention=_EIGHT, mlp=_EIGHT, experts=_EIGHT, cache=FP8),
        "fp8-block": Formats(attention=_BLOCK, mlp=_BLOCK, experts=_BLOCK, cache=FP8),
        "nvfp4": Formats(attention=_FOUR, mlp=_FOUR, experts=_FOUR, cache=FP8),
    }
)
"""Formats of the weights of all linear layers, with the cache that engines take beside them."""
CACHES: Final[Mapping[str, DType]] = MappingProxyType({"bf16": BF16, "fp8": FP8})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingEstimate:
    """TPOT and TTFT with their ranges, throughput, memory, and what a token's time is made of.

    `waiting`: requests in flight beyond those that fit. `queues`: do the prompts in flight exceed
    one pass, so that a first token waits for others' prompts, too?
    """

    served: Served
    load: Load
    terms: Terms
    memory: Paged
    tpot_s: float
    tpot_range_s: tuple[float, float]
    ttft_s: float | None
    ttft_range_s: tuple[float, float] | None
    parts: Mapping[str, float]
    first_parts: Mapping[str, float]
    requests_per_s: float
    waiting: float
    queues: bool

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of the whole engine."""
        return self.load.osl * self.requests_per_s

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Output tokens of one GPU."""
        return self.tokens_per_s / self.served.layout.num_gpus


def formats_of(precision: str, cache: str | None = None) -> Formats:
    """Formats by name; `cache` overrides that of keys and values."""
    if precision not in PRECISIONS:
        raise UnknownNameError(
            "precision", precision, PRECISIONS, "one of " + ", ".join(PRECISIONS)
        )
    if cache is None:
        return PRECISIONS[precision]
    if cache not in CACHES:
        raise UnknownNameError("cache format", cache, CACHES, "one of " + ", ".join(CACHES))
    return replace(PRECISIONS[precision], cache=CACHES[cache])


def most_in_flight(served: Served, isl: int, osl: int) -> int:
    """Requests of one attention group that fit however long they have become."""
    most = paged(served, isl=isl, osl=osl).safe_requests
    if most < 1:
        raise InputError("not one request's cache fits; give more ranks or shorter requests")
    return most


def estimate_serving(served: Served, load: Load) -> ServingEstimate:
    """What serving that load takes, on one engine of that layout."""
    found = terms(served, load)
    token = tpot_s(found, HOST)
    first = None if load.disaggregated else ttft_s(found, HOST)
    flight_s = (first or 0.0) + (load.osl - 1) * token
    requests = served.layout.attn_dp * found.batch / max(flight_s, token)
    return ServingEstimate(
        served=served,
        load=load,
        terms=found,
        memory=paged(served, isl=load.isl, osl=load.osl),
        tpot_s=token,
        tpot_range_s=_range(token, "tpot"),
        ttft_s=first,
        ttft_range_s=None if first is None else _range(first, "ttft"),
        parts=tpot_parts(found, HOST),
        first_parts={} if first is None else ttft_parts(found, HOST),
        requests_per_s=requests,
        waiting=max(load.concurrency - found.batch, 0.0),
        queues=not load.disaggregated and found.batch * load.isl > PROMPT_TOKENS,
    )


def _range(seconds: float, metric: str) -> tuple[float, float]:
    low, high = RANGES[metric]
    return low * seconds, high * seconds


def prefill_parts(served: Served, load: Load) -> dict[str, float]:
    """Seconds of a pass of `concurrency` prompts alone, by part, with what launching it adds."""
    batch = Batch(num_prompts=load.concurrency, len_prompt=load.isl)
    found = forward_pass(served, batch)
    hops = round_s(served, found, batch, 1) - found.seconds
    beyond = {
        "sends between stages": hops,
        LAUNCHING: found.num_kernels * HOST.launch(served.engine),
        SCHEDULER: HOST.step(served.engine),
    }
    return dict(found.parts) | {name: s for name, s in beyond.items() if s > 0}


def decode_parts(served: Served, load: Load) -> dict[str, float]:
    """Seconds of a decoding step that takes no prompt in, by part; they add up to its time."""
    found = terms(served, replace(load, disaggregated=True))
    parts = tpot_parts(found, HOST)
    assert abs(sum(parts.values()) - step_s(found, HOST)) <= 1e-9
    return parts
