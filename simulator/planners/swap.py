"""Which activations leave for the host while their layer runs (MEMO's token-wise swap).

A layer keeps S_input bytes of its input, S_attention of its attention's output and S_others of the
rest for the backward pass. The first two always go to the host; of the rest the share alpha, token
by token, and the other tokens are computed again (not attention: its output comes back):

    max  alpha
    s.t. (S_input + S_attention + alpha S_others) / B <= T_layer     "copy hidden"           (1)
         m (n - 2)(S_input + S_attention + alpha S_others) <= M_host "host memory"           (2)
         0 <= alpha <= 1

    alpha* = min(1, (B T_layer - S_input - S_attention) / S_others,
                    (M_host / (m (n - 2)) - S_input - S_attention) / S_others)               (3)

B is what one device's link sustains, M_host its share of the host's memory; the last two of n
layers stay on the device, whose backward passes come at once. A pipeline stage has the question to
itself: n are its layers, m the micro-batches that it holds at once, and only the last stage's last
layers stay, since elsewhere other micro-batches' passes come in between. Two buffers of one layer's
kept tensors take turns: S_input + S_attention + S_others bytes each. Whole tokens only: alpha is
rounded down to floor(alpha tokens) / tokens, which (1) and (2) allow.

A GPT layer (ungated, ffn = 4 h, fused attention) keeps 16 b s h elements: S_input = S_attention =
b s h, S_others = 14 b s h. Here the tensors are those of `workloads.models.activations`, which adds
one FP32 number per token and head, the attention's logsumexp, to S_attention.

Where layers of several kinds differ in time and in bytes (attention beside scans or convolutions),
alpha is one for all of them: (1) holds for each kind, (2) for their sum, told in means of a layer.
A scan is not run again: the mixer's output counts as S_attention.

Source: MEMO, arXiv 2407.12117, section 4.1. Implemented in: `program` (1, 2), `swap_frac` (3),
`plan_swap` (rounding, what is recomputed), `kept_bytes` (the tensors).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InfeasibleError, InputError
from simulator.planners.program import AT_MOST, MAXIMISE, Program, Row, Variable
from workloads.models.activations import saved_tensors
from workloads.models.config import TransformerConfig
from workloads.numeric import ceil_div
from workloads.plan import Plan

LAST_LAYERS: Final = 2
"""Layers at the end that are never offloaded."""
NUM_BUFFERS: Final = 2
ALPHA, COPY, HOST = "alpha", "copy hidden behind the layer", "host memory"
ALL: Final = "everything swapped"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptBytes:
    """Bytes one layer keeps on one rank: its input, attention's output, all others."""

    input: float
    attention: float
    others: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.input + self.attention + self.others


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapKind:
    """Layers of one kind among several: what one keeps, and its forward pass."""

    name: str
    kept: KeptBytes
    layer_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapQuestion:
    """What the program needs; `layer_s` is one layer's forward pass, `num_tokens` those of a rank.

    `other_forward_s` is the part of `layer_s` that is not attention: what recomputing takes. With
    `kinds`, the layers are of those kinds, and the other figures means over them. `in_flight`
    micro-batches are held at once; the last `last_kept` layers are never offloaded.
    """

    kept: KeptBytes
    layer_s: float
    other_forward_s: float
    link_bytes_per_s: float
    host_bytes: float
    num_layers: int
    num_tokens: int
    kinds: tuple[SwapKind, ...] = ()
    in_flight: float = 1.0
    last_kept: int = LAST_LAYERS

    def __post_init__(self) -> None:
        if self.layer_s <= 0 or self.link_bytes_per_s <= 0 or self.num_layers < 1:
            raise InputError("swap: the layer's time, the link and the layers must be above 0")
        if self.host_bytes < 0 or self.num_tokens < 1:
            raise InputError("swap: give host memory of at least 0 bytes and at least one token")
        if self.in_flight < 1 or self.last_kept < 0:
            raise InputError("swap: give at least one micro-batch and no negative number of layers")

    @property
    def offloaded_layers(self) -> int:
        """Layers whose activations go to the host."""
        return max(self.num_layers - self.last_kept, 0)

    @property
    def host_layers(self) -> float:
        """Layers times micro-batches that are on the host at once."""
        return self.in_flight * self.offloaded_layers

    @property
    def copies(self) -> dict[str, tuple[KeptBytes, float]]:
        """What is copied behind what, by the name of the row."""
        rows = {f"{COPY} ({k.name})": (k.kept, k.layer_s) for k in self.kinds}
        return rows or {COPY: (self.kept, self.layer_s)}

    @property
    def always_bytes(self) -> float:
        """What goes to the host whatever alpha is, per layer."""
        return self.kept.input + self.kept.attention


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapPlan:
    """`alpha` is the optimum, `swapped_tokens` its whole tokens; `binding` the row that stops it.

    `recompute_s` is added to each offloaded layer's backward pass; bytes are one rank's.
    """

    question: SwapQuestion
    alpha: float
    swapped_tokens: int
    binding: str

    @property
    def swapped_frac(self) -> float:
        """Share of the tokens whose other activations are swapped."""
        return self.swapped_tokens / self.question.num_tokens

    @property
    def layer_bytes(self) -> float:
        """To the host, per layer."""
        return self.question.always_bytes + self.swapped_frac * self.question.kept.others

    @property
    def host_bytes(self) -> float:
        """On the host, all layers of all micro-batches in flight."""
        return self.question.host_layers * self.layer_bytes

    @property
    def copy_s(self) -> float:
        """One layer's copy; at most its forward pass."""
        return self.layer_bytes / self.question.link_bytes_per_s

    @property
    def recompute_s(self) -> float:
        """One layer's tokens that were not swapped, computed again."""
        return (1 - self.swapped_frac) * self.question.other_forward_s

    @property
    def device_bytes(self) -> float:
        """Kept on the device: two buffers, and the layers that stay (in the buffers' place)."""
        largest = max(kept.total for kept, _ in self.question.copies.values())
        return min(NUM_BUFFERS, self.question.num_layers) * largest


def kept_bytes(
    cfg: TransformerConfig,
    *,
    num_tokens: float,
    len_seq: int,
    plan: Plan | None = None,
    kind: str = "dense",
    dtype: DType = BF16,
) -> KeptBytes:
    """What a layer keeps for `num_tokens` tokens of a tensor-parallel group, on one of its ranks.

    >>> from workloads.models.config import load_hf_config
    >>> gpt = load_hf_config("examples/gpt2.json")
    >>> kept = kept_bytes(gpt, num_tokens=1, len_seq=1024)
    >>> kept.input / 1536, (kept.attention - 4 * 12) / 1536, kept.others / 1536
    (1.0, 1.0, 14.0)
    """
    plan = plan or Plan()
    rows = float(ceil_div(num_tokens, plan.tp))
    parts = {"input": 0.0, "attention": 0.0, "others": 0.0}
    names = {
        "attention_norm.input": "input",
        "attention.output": "attention",
        "attention.logsumexp": "attention",
        "mixer.output": "attention",
    }
    for one in saved_tensors(cfg, kind=kind, len_seq=len_seq, tp=plan.tp, dtype=dtype):
        held = float(one.bytes_per_token) * (rows if one.by_sequence else num_tokens)
        parts[names.get(one.name, "others")] += held
    return KeptBytes(**parts)


def program(question: SwapQuestion) -> Program:
    """Rows (1) and (2), in shares of the layer's time and of the host's memory."""
    always, others = question.always_bytes, question.kept.others
    per_layer_s, layers = 1 / question.link_bytes_per_s, question.host_layers
    return Program(
        name="swap",
        sense=MAXIMISE,
        objective={ALPHA: 1.0},
        variables=(Variable(ALPHA, 0.0, 1.0),),
        rows=(
            *(
                Row(name, {ALPHA: kept.others * per_layer_s}, AT_MOST,
                    layer_s - (kept.input + kept.attention) * per_layer_s)
                for name, (kept, layer_s) in question.copies.items()
            ),
            Row(HOST, {ALPHA: layers * others}, AT_MOST, question.host_bytes - layers * always),
        ),
    )  # fmt: skip


def swap_frac(question: SwapQuestion) -> tuple[float, str]:
    """(3) and the row that binds; raises where not even the input and the output can go.

    >>> kept = KeptBytes(input=1.0, attention=1.0, others=14.0)
    >>> swap_frac(SwapQuestion(kept=kept, layer_s=9.0, other_forward_s=4.0, link_bytes_per_s=1.0,
    ...     host_bytes=1e9, num_layers=32, num_tokens=1000))
    (0.5, 'copy hidden behind the layer')
    """
    layers = question.host_layers
    allowed = {
        name: (kept, question.link_bytes_per_s * layer_s)
        for name, (kept, layer_s) in question.copies.items()
    }
    allowed[HOST] = (question.kept, question.host_bytes / layers if layers else math.inf)
    shares = {ALL: 1.0}
    for name, (kept, most) in allowed.items():
        always = kept.input + kept.attention
        left = most - always
        if left < 0:
            raise InfeasibleError(
                f"{name}: a layer's input and attention output are {always:.4g} bytes, "
                f"{-left:.4g} more than fit; {_MEND[HOST if name == HOST else COPY]}"
            )
        if kept.others:
            shares[name] = left / kept.others
    binding = min(shares, key=lambda name: shares[name])
    return shares[binding], binding


_MEND: Final = {
    COPY: "take longer sequences or a faster link",
    HOST: "give more host memory, more ranks, or recompute whole layers",
}


def plan_swap(question: SwapQuestion) -> SwapPlan:
    """The optimum, rounded down to whole tokens."""
    alpha, binding = swap_frac(question)
    tokens = math.floor(alpha * question.num_tokens * (1 + 1e-12))
    return SwapPlan(
        question=question, alpha=alpha, swapped_tokens=min(tokens, question.num_tokens),
        binding=binding,
    )  # fmt: skip
