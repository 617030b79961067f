"""Claims against the model: reproduced, off by a ratio, or not modelled for a reason.

An evaluator takes a `Claim` and returns what the model says in the claim's own unit: one number,
one a named value, or a word such as 'OOM'. It reads the setting alone, never the published figure,
so that a row of the same table with other numbers works as well.

    reproduced   |predicted / published - 1| <= 15 % (memory, complexity, ratio: 2 %); for an
                 interval, inside it or that near to an end; for named values, every one of them
    ratio        predicted / published; for intervals against the nearer end, for named values the
                 worst one
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Final, TypeAlias

from hwmodels.errors import InputError
from validate.claims.claim import (
    EXACT_KINDS,
    EXACT_TOLERANCE,
    NAMED,
    TIME_TOLERANCE,
    Claim,
    NotModelledError,
    Value,
)

Evaluator: TypeAlias = Callable[[Claim], Value]

REPRODUCED, OFF, NOT_MODELLED = "reproduced", "off", "not modelled"

_MODULES: Final[Mapping[str, str]] = {
    "music_transformer": "encoder",
    "ntk_attention": "encoder",
    "bytetransformer": "encoder",
    "deltanet": "recurrence",
    "mamba_scan": "mamba",
    "languini_lstm": "mamba",
    "spikegpt": "mamba",
    "vir": "mamba",
    "state_tracking_lrnn": "mamba",
    "double_sparsity": "selection",
    "block_sparse_fa": "flash_attention",
    "flash_attention": "flash_attention",
    "flash_attention_2": "training",
    "kv_heads_svd": "compression",
    "prefixkv": "compression",
    "bfp_kv": "compression",
    "mikv": "compression",
    "matryoshkakv": "compression",
    "think": "compression",
    "minicache": "compression",
    "gear": "compression",
    "flexprefill": "selection",
    "hip_attention": "selection",
    "squeezed_attention": "selection",
    "tokenselect": "selection",
    "combiner": "structured",
    "fit": "structured",
    "infllm": "structured",
    "routing_transformer": "structured",
    "seqboat_sma": "structured",
    "xl3m": "structured",
    "fusemax": "structured",
    "gla": "recurrence",
    "longheads": "structured",
    "flashbutterfly": "convolution",
    "flashconv_h3": "convolution",
    "flashfftconv": "convolution",
    "hyena_dna": "convolution",
    "monarch_mixer": "convolution",
    "orchid": "convolution",
    "sgconv": "convolution",
    "tcnca": "convolution",
    "hydragen": "prefix",
    "prefix_grouper": "prefix",
    "streaming_llm": "windows",
    "lm_infinite": "windows",
    "moa": "windows",
    "sinklora": "windows",
    "masformer": "windows",
    "shadowkv": "offload",
    "h2o": "offload",
    "mamba_empirical": "hybrids",
    "hydra_bissm": "hybrids",
    "titans": "hybrids",
    "flashrnn": "rnn",
    "aaren": "scans",
    "convs5": "scans",
    "plstm": "scans",
    "s5_rl": "scans",
    "lightning_attention_2": "lightning",
    "lightning_attention_tnl": "lightning",
    "hedgehog": "linear_attention",
    "lightnet": "linear_attention",
    "longvq": "linear_attention",
    "scatterformer": "linear_attention",
    "memo": "memory",
    "seco_spaco": "memory",
    "mkor": "memory",
    "jrt": "based",
    "s4": "state_space",
    "lssl": "state_space",
    "spacetime": "state_space",
    "lmuformer": "state_space",
    "flexsp": "variable_length",
    **dict.fromkeys(
        (
            "lightseq",
            "deepspeed_ulysses",
            "lasp2",
            "token_ring",
            "ring_self_attention",
            "ring_attention_lwm",
        ),
        "sequence_parallel",
    ),
    "bytescale": "variable_length",
    "prepacking": "prepacking",
}
"""Where the evaluator of each system lives: `evaluate_<id>` of that module of this package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of a claim. `ratio` is None where there is nothing to divide."""

    claim: Claim
    predicted: Value
    ratio: float | None
    status: str
    reason: str = ""


def evaluator(system: str) -> Evaluator | None:
    """The evaluator of a system, None where it has none."""
    module = _MODULES.get(system)
    if module is None:
        return None
    found: Evaluator = getattr(import_module(f"{__package__}.{module}"), f"evaluate_{system}")
    return found


def evaluate(claim: Claim) -> Verdict:
    """The verdict on one claim; never raises for what a claim says."""
    run = evaluator(claim.id)
    if run is None:
        return _given_up(claim, f"no evaluator for {claim.id} yet")
    try:
        predicted = run(claim)
    except NotModelledError as why:
        return _given_up(claim, str(why))
    except InputError as why:  # a setting that no op can have
        return _given_up(claim, f"setting impossible: {why}")
    if predicted is None:
        return _given_up(claim, "the claim names nothing that can be computed")
    return judged(claim, predicted)


def evaluate_all(claims: Iterable[Claim]) -> list[Verdict]:
    """Verdicts in the order of the claims."""
    return [evaluate(claim) for claim in claims]


def judged(claim: Claim, predicted: Value) -> Verdict:
    """The verdict on a prediction."""
    ratio = ratio_of(claim.published, predicted, named=claim.range_is.startswith(NAMED))
    if ratio is None:
        same = str(predicted) == str(claim.published)
        status = REPRODUCED if same else OFF
        return Verdict(claim=claim, predicted=predicted, ratio=None, status=status)
    tolerance = EXACT_TOLERANCE if claim.kind in EXACT_KINDS else TIME_TOLERANCE
    status = REPRODUCED if abs(ratio - 1) <= tolerance else OFF
    return Verdict(claim=claim, predicted=predicted, ratio=ratio, status=status)


def ratio_of(published: Value, predicted: Value, *, named: bool) -> float | None:
    """predicted / published; None where one of them is no number.

    >>> ratio_of(2.0, 3.0, named=False), ratio_of((2.0, 4.0), 3.0, named=False)
    (1.5, 1.0)
    >>> ratio_of((2.0, 4.0), (2.0, 5.0), named=True)
    1.25
    """
    if isinstance(published, float) and isinstance(predicted, (int, float)):
        return predicted / published if published else None
    if not isinstance(published, tuple):
        return None
    if isinstance(predicted, tuple):
        ratios = [p / q for p, q in zip(predicted, published, strict=True) if q]
        return max(ratios, key=lambda r: abs(math.log(r)) if r > 0 else math.inf)
    if not isinstance(predicted, (int, float)) or named:
        return None
    low, high = published
    if predicted < low:
        return predicted / low
    return predicted / high if predicted > high else 1.0


def _given_up(claim: Claim, reason: str) -> Verdict:
    return Verdict(claim=claim, predicted=None, ratio=None, status=NOT_MODELLED, reason=reason)
