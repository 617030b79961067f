"""Claims of Lightning Attention-2 and TransNormerLLM: a training step end to end, and the mixer.

Tokens a second and GPU of a training step (arXiv 2401.04658, table 1: metaseq, FSDP over n_gpus):

    compute  layers (2 forward + backward) + ends      each kernel's time times `RUN`
    step     max(compute, exchange) + Adam on 1 / n_gpus of the parameters
    held     18 B a parameter / n_gpus + inputs of all layers + max(logits, one layer redone)
             'OOM' above the share of the device memory that plans may fill

What no setting states is in `ASSUMED`, once for all rows; `RUN` and `MASKED` are each anchored on
one row. Layers are recomputed in full: kept whole, a layer holds 16 times its input, and 81,920
tokens of the 1B model, a row that ran, would not fit. Lightning-2 works in blocks of 256 tokens and
makes the states of all blocks at once (lightning_attn2_parallel.py of the authors). Not modelled:
LRPE of the first layer, clipping of gradients, launches (a step of 32k tokens hides them).

Findings. Tokens a second of Lightning-2 fall by 9 % at most between 1,024 and 94,208 tokens. LLaMA
of 1B comes out 20 % fast at short lengths: without attention its published step is 1.3 times
TransNormerLLM's, where those of 0.4B and 3B are equal, so its sizes, which nobody published, must
be others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NoReturn

from hwmodels.device import Device
from hwmodels.dtypes import BF16, FP16
from simulator.kernel_time.model import Conditions
from simulator.kernel_time.predict import predict
from simulator.planners.parallelism import DEFAULT_HBM_FRAC
from simulator.recipe import RECIPES
from validate.claims.claim import EXACT_TOLERANCE, Claim, Value, not_modelled
from validate.claims.lightning_models import (
    FAMILIES,
    LLAMA,
    TRANSNORMER,
    Map,
    gradients,
    parameters,
    products,
    sized,
)
from workloads.models.activations import layer_bytes
from workloads.models.architecture import TransformerConfig
from workloads.models.transformer import optimizer
from workloads.op import Op
from workloads.ops.attention import StandardAttention
from workloads.ops.collective_transfer import CollectiveTransfer
from workloads.ops.elementwise import mul
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.ops.lightning_attention_1 import LightningAttention1
from workloads.ops.linear_recurrence import SCALAR, LinearRecurrence
from workloads.ops.linear_recurrence_backward import LinearRecurrenceBackward
from workloads.ops.matmul import Matmul
from workloads.ops.transnormer import TransnormerAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumed:
    """A figure that no setting states: its value, unit, and where it comes from."""

    value: float
    unit: str
    source: str


TOKENS: Final = Assumed(
    value=32_768,
    unit="tokens a step and GPU, one sequence at least",
    source="the longest sequence of table 1 that all three models hold",
)
BLOCK: Final = Assumed(
    value=256, unit="tokens", source="BLOCK of lightning_attn2_parallel.py, OpenNLPLab"
)
LOGIT: Final = Assumed(
    value=14,
    unit="B a logit",
    source="cross entropy in eager PyTorch: bf16 logits, their fp32 copy, fp32 log-probabilities "
    "and gradient; which rows of table 1 are out of memory agrees with it, and with no fp32 copy "
    "more or less",
)
RUN: Final = Assumed(
    value=1.2,
    unit="time of a kernel in a training step over its time alone",
    source="TransNormerLLM with Lightning-2, 1B, 8,192 tokens: power limit, FSDP beside it",
)
MASKED: Final = Assumed(
    value=1,
    unit="share of the masked key blocks that LLaMA's attention computes",
    source="LLaMA 0.4B, 81,920 tokens: with those skipped it would take little over half as long",
)
ASSUMED: Final[Mapping[str, Assumed]] = {
    "tokens": TOKENS, "block": BLOCK, "logit": LOGIT, "run": RUN, "masked": MASKED,
}  # fmt: skip
"""Everything the module assumes."""

FLASH, LEFT, RIGHT = "FlashAttention-2", "Lightning-1", "Lightning-2"
FA2: Final = "figure:fa2"
"""The kernel alone, known in fp16; bf16 is as fast."""
OUT_OF_MEMORY: Final = "OOM"
GPUS_OF_A_NODE: Final = 8
LOSS: Final = (Map(2, 4), Map(4, 4), Map(0, 4), Map(8, 4), Map(4, 2))
"""Logits to fp32, log-softmax; zeros of a gradient, the softmax's gradient, to bf16."""
SEE_SETTING: Final = "see setting"
"""What a claim prints whose setting says it all."""


def evaluate_lightning_attention_2(claim: Claim) -> Value:
    """Tokens a second and GPU of a training step, or 'OOM'."""
    if "training" not in claim.quantity.casefold():
        not_modelled(f"no rule for '{claim.quantity}'")
    (seq, ranks), on = claim.sizes("seq", "n_gpus"), claim.device()
    named, impl = claim.need("model", "impl")
    if claim.dtype(BF16) not in (BF16, FP16):
        not_modelled("setting unclear: FlashAttention-2 takes 16-bit formats")
    if ranks > GPUS_OF_A_NODE:
        not_modelled(f"no exchange over {ranks} GPUs of several nodes")
    kind = next((k for k in (FLASH, LEFT, RIGHT) if k.casefold() in str(impl).casefold()), None)
    if kind is None:
        not_modelled(f"no implementation '{impl}' is known here")
    batch = max(int(TOKENS.value) // seq, 1)
    run = Run(model=_model(str(named)), kind=kind, batch=batch, seq=seq, ranks=ranks, on=on)
    if run.held_bytes() > on.hbm.capacity_bytes * DEFAULT_HBM_FRAC:
        return OUT_OF_MEMORY
    return run.tokens / run.seconds()


def evaluate_lightning_attention_tnl(claim: Claim) -> Value:
    """That work a token does not grow, or what Lightning-1 gains over scores in slow memory.

    The gains of the paper's abstract name no shape; both grow with the length (on an A100 with 16
    heads of 128 the time of both passes gains 1.7 times at 1,024 tokens and 3.2 at 4,096).
    """
    quantity = claim.quantity.casefold()
    if "constant" in quantity:
        return _constant(claim)
    if "gain" in quantity:
        return _gains(claim)
    if "inference" in quantity:
        claim.need("gpu", "batch", "seq")
        not_modelled("no framework of these authors' inference is known")
    not_modelled(f"no rule for '{claim.quantity}'")


def _model(named: str) -> TransformerConfig:
    model = sized(named)
    if model is None:
        not_modelled(f"setting unclear: no sizes are known of the model '{named}'")
    return model


# ---- a training step -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training step on one GPU of `ranks`; `kind` is the attention."""

    model: TransformerConfig
    kind: str
    batch: int
    seq: int
    ranks: int
    on: Device

    @property
    def family(self) -> str:
        """LLaMA with softmax attention, TransNormerLLM with the others."""
        return LLAMA if self.kind == FLASH else TRANSNORMER

    @property
    def tokens(self) -> int:
        """Tokens of the step on one GPU."""
        return self.batch * self.seq

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return parameters(self.model, self.family)

    def held_bytes(self) -> float:
        """At the larger peak: where the loss is differentiated, or where a layer is redone."""
        state = RECIPES["bf16"].bytes_per_parameter * self.parameters / self.ranks
        width = self.model.num_layers * self.model.hidden_dim * BF16.bytes_per_element
        redone = float(layer_bytes(self.model, batch=self.batch, len_seq=self.seq))
        logits = LOGIT.value * self.tokens * self.model.vocab_size
        return state + self.tokens * width + max(logits, redone)

    def seconds(self) -> float:
        """Compute or exchange, whichever is longer, and the optimizer."""
        layer = 2 * self._layer(backward=False) + self._layer(backward=True)
        compute = RUN.value * (self.model.num_layers * layer + self._ends())
        update = seconds_of(
            [node.op for node in optimizer(self.parameters / self.ranks)], self.on
        )  # fmt: skip
        return max(compute, self._exchange()) + RUN.value * update

    def _layer(self, *, backward: bool) -> float:
        """Products, maps and attention of one pass."""
        forward = products(self.model, self.family, self.tokens)
        matrices = [g for p in forward for g in gradients(p)] if backward else forward
        family = FAMILIES[self.family]
        maps = family.backward if backward else family.forward
        plain = seconds_of([*matrices, *(m.op(self.model, self.tokens) for m in maps)], self.on)
        return plain + self._attention(backward=backward)

    def _attention(self, *, backward: bool) -> float:
        spec = self.model.attention
        if self.kind == RIGHT:
            make = LinearRecurrenceBackward if backward else LinearRecurrence
            recurrence = make(
                batch=self.batch, num_heads=spec.num_heads, len_seq=self.seq,
                key_dim=spec.head_dim, chunk=int(BLOCK.value), decay=SCALAR, dtype=BF16,
            )  # fmt: skip
            return seconds_of([recurrence], self.on)
        if self.kind == LEFT:
            left = LightningAttention1(
                batch=self.batch, num_heads=spec.num_heads, len_seq=self.seq,
                head_dim=spec.head_dim, dtype=FP16,
            )  # fmt: skip
            return left_seconds(left, self.on, backward=backward)
        make_flash = FlashAttention2Backward if backward else FlashAttention2
        flash = make_flash(
            batch=self.batch, num_heads=spec.num_heads, len_q=self.seq, head_dim=spec.head_dim,
            causal=not MASKED.value, dtype=FP16,
        )  # fmt: skip
        return seconds_of([flash], self.on, FA2)

    def _ends(self) -> float:
        """The head, its loss, and the gradients of both."""
        tokens, vocabulary = self.tokens, self.model.vocab_size
        head = Matmul(m=tokens, n=vocabulary, k=self.model.hidden_dim, dtype=BF16)
        loss = [m.over(tokens * vocabulary) for m in LOSS]
        return seconds_of([head, *gradients(head), *loss], self.on)

    def _exchange(self) -> float:
        """Weights gathered for both passes, gradients scattered: bf16, hidden under compute."""
        if self.ranks == 1:
            return 0.0
        num_bytes = int(self.parameters * BF16.bytes_per_element)
        gather, scatter = (
            CollectiveTransfer(kind=kind, num_bytes=num_bytes, num_ranks=self.ranks)
            for kind in ("all_gather", "reduce_scatter")
        )
        return seconds_of([gather, gather, scatter], self.on)


def left_seconds(op: LightningAttention1, on: Device, *, backward: bool) -> float:
    """Lightning-1 as FlashAttention-2's kernel, whose products and loops it has."""
    return seconds_of([op.backward() if backward else op.flash()], on, FA2)


def seconds_of(ops: Iterable[Op], on: Device, kernel: str = "") -> float:
    """Kernels one after another."""
    run = Conditions(kernel=kernel)
    return sum(float(predict(op, on=on, conditions=run).seconds) for op in ops)


# ---- the mixer -----------------------------------------------------------------------------


def _constant(claim: Claim) -> str:
    """'see setting' where the matrix flops of a token stay within 2 % over all lengths named."""
    named, lengths = claim.need("model", "seq")
    ends = [_length(text) for text in str(lengths).split("-")]
    for name in str(named).split("/"):
        model = _model(name.strip())
        spread = _spread(model, sorted(ends))
        if spread > 1 + EXACT_TOLERANCE:
            return f"{name}: {spread:.3g} times the flops a token"
    return SEE_SETTING


def _spread(model: TransformerConfig, ends: list[int]) -> float:
    """Most over fewest flops a token, forward and backward, doubling from the first length."""
    found, seq = [], ends[0]
    while seq <= ends[-1]:
        op = TransnormerAttention(
            num_heads=model.attention.num_heads, len_seq=seq, head_dim=model.attention.head_dim,
            chunk=int(BLOCK.value),
        )  # fmt: skip
        back = LinearRecurrenceBackward(
            num_heads=op.num_heads, len_seq=seq, key_dim=op.head_dim, chunk=op.chunk, decay=SCALAR
        )
        work = op.work(float(2**52)) + back.work(float(2**52))
        found.append(float(work.flops) / seq)
        seq *= 2
    return max(found) / min(found)


def _length(text: str) -> int:
    """A length as papers print it.

    >>> _length("128K"), _length("2048")
    (131072, 2048)
    """
    match = re.fullmatch(r"(\d+)\s*([kK]?)", text.strip())
    if not match or not int(match[1]):
        _unclear(f"'{text}' is not a length")
    return int(match[1]) * (1024 if match[2] else 1)


def _unclear(why: str) -> NoReturn:
    not_modelled(f"setting unclear: {why}")


def _gains(claim: Claim) -> tuple[float, float]:
    """(time, memory) of NormAttention in eager PyTorch over Lightning-1's, forward and backward.

    Eager: products over all n^2 pairs, each score times its decay; kept are Q, K, V, O and two
    n x n matrices a head. Lightning-1 keeps the first four.
    """
    seq, heads, width = claim.sizes("seq", "heads", "head_dim")
    (batch,), on = claim.sizes("batch"), claim.device()
    plain = StandardAttention(
        batch=batch, num_heads=heads, len_q=seq, head_dim=width, dtype=claim.dtype(BF16)
    )
    scores, _, output = (stage.op for stage in plain.stages())
    decay = mul(batch * heads * seq * seq, claim.dtype(BF16))
    eager = seconds_of([scores, decay, output, output, output, decay, scores, scores], on)
    left = LightningAttention1(
        batch=batch, num_heads=heads, len_seq=seq, head_dim=width, dtype=FP16
    )
    fused = sum(left_seconds(left, on, backward=b) for b in (False, True))
    return eager / fused, (4 * seq * width + 2 * seq * seq) / (4 * seq * width)
