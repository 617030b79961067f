"""Pieces that every part of a transformer is put together from: steps, and how they unroll.

A `Step` is one forward op with the ops its backward pass adds; `unrolled` turns a list of steps
into a `Workload`. What the pieces leave out is stated in `transformer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from hwmodels.dtypes import FP32, DType
from workloads.models.architecture import RMS_NORM, TransformerConfig
from workloads.numeric import Num, ceil_div
from workloads.op import Op
from workloads.ops.elementwise import (
    Elementwise,
    add,
    gelu,
    gelu_backward,
    rope,
    silu_mul,
    silu_mul_backward,
)
from workloads.ops.matmul import Matmul
from workloads.ops.norm import LayerNorm, RmsNorm
from workloads.ops.norm_backward import LayerNormBackward, RmsNormBackward
from workloads.plan import Plan
from workloads.workload import BACKWARD, FORWARD, Node, Workload

# Vector flops and special functions per element of the activations that have no named map:
# forward, backward. Products with the gate and its gradient are included where gated.
_ACTIVATION_COUNTS: Final = {
    ("silu", False): ((2, 2), (6, 2)),
    ("gelu", True): ((8, 1), (18, 1)),
    ("relu", False): ((1, 0), (1, 0)),
    ("relu", True): ((2, 0), (4, 0)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One forward op and what its backward pass adds.

    `gradients` run one after the other and hand the gradient on; `weight_gradients` hang off.
    `after` names earlier steps; None: the step before.
    """

    name: str
    part: str
    op: Op
    gradients: tuple[tuple[str, Op], ...] = ()
    weight_gradients: tuple[tuple[str, Op], ...] = ()
    count: Num = 1
    after: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """Everything the steps of one rank depend on; `rows` is the sequence-parallel share."""

    cfg: TransformerConfig
    plan: Plan
    batch: Num
    len_q: Num
    len_kv: Num
    causal: bool
    absorbed: bool
    dtype: DType
    fused: bool = True
    sequence_parallel: bool = True

    @property
    def tokens(self) -> Num:
        """Tokens of a micro-batch on a rank."""
        return ceil_div(self.batch * self.len_q, self.plan.cp)

    @property
    def rows(self) -> Num:
        """Its share of them where the sequence is split over tp; all of them where it is not."""
        return ceil_div(self.tokens, self.plan.tp) if self.sequence_parallel else self.tokens


def unrolled(name: str, steps: Sequence[Step], training: bool) -> Workload:
    """Forward nodes in order, then the backward nodes of each step in the opposite order."""
    nodes: list[Node] = []
    consumers: dict[str, list[str]] = {}
    for i, step in enumerate(steps):
        after = step.after if step.after is not None else tuple(s.name for s in steps[:i][-1:])
        for source in after:
            consumers.setdefault(source, []).append(step.name)
        nodes.append(_node(step, step.name, step.op, FORWARD, after))
    if not training:
        return Workload(tuple(nodes), name)
    carriers: dict[str, tuple[str, ...]] = {}
    for step in reversed(steps):
        sources = [c for user in consumers.get(step.name, ()) for c in carriers[user]]
        waits = tuple(dict.fromkeys(sources)) or (steps[-1].name,)
        for suffix, op in step.weight_gradients:
            nodes.append(_node(step, f"{step.name}.{suffix}", op, BACKWARD, waits))
        for suffix, op in step.gradients:
            nodes.append(_node(step, f"{step.name}.{suffix}", op, BACKWARD, waits))
            waits = (f"{step.name}.{suffix}",)
        carriers[step.name] = waits
    return Workload(tuple(nodes), name)


def _node(step: Step, name: str, op: Op, phase: str, after: tuple[str, ...]) -> Node:
    return Node(name=name, op=op, part=step.part, phase=phase, count=step.count, after=after)


def product(
    rank: Rank,
    name: str,
    part: str,
    m: Num,
    k: Num,
    n: Num,
    *,
    batch: Num = 1,
    out_dtype: DType | None = None,
    after: tuple[str, ...] | None = None,
) -> Step:
    """Y[m, n] = X[m, k] W[k, n], dX = dY W^T, dW = X^T dY."""
    dtype = rank.dtype
    dgrad = Matmul(batch=batch, m=m, n=k, k=n, dtype=dtype)
    wgrad = Matmul(batch=batch, m=k, n=n, k=m, dtype=dtype, out_dtype=FP32)
    return Step(
        name=name,
        part=part,
        op=Matmul(batch=batch, m=m, n=n, k=k, dtype=dtype, out_dtype=out_dtype),
        gradients=(("dgrad", dgrad),),
        weight_gradients=(("wgrad", wgrad),),
        after=after,
    )


def _norm_ops(rank: Rank, rows: Num, cols: Num, *, rms: bool) -> tuple[Op, Op]:
    """A norm and its backward."""
    if rms:
        forward: Op = RmsNorm(rows=rows, cols=cols, dtype=rank.dtype)
        return forward, RmsNormBackward(rows=rows, cols=cols, dtype=rank.dtype)
    forward = LayerNorm(rows=rows, cols=cols, dtype=rank.dtype)
    return forward, LayerNormBackward(rows=rows, cols=cols, dtype=rank.dtype)


def norm(
    rank: Rank,
    name: str,
    *,
    opens_block: bool = False,
    rows: Num | None = None,
    part: str = "norm",
) -> Step:
    """A norm over the hidden state; where it opens a block, the residual gradient joins after."""
    rows, hidden = rank.rows if rows is None else rows, rank.cfg.hidden_dim
    forward, backward = _norm_ops(rank, rows, hidden, rms=rank.cfg.norm == RMS_NORM)
    gradients = [("backward", backward)]
    if opens_block:
        gradients.append(("accumulate", add(rows * hidden, rank.dtype)))
    return Step(name=name, part=part, op=forward, gradients=tuple(gradients))


def inner_norm(
    rank: Rank, name: str, rows: Num, cols: Num, after: tuple[str, ...] | None = None
) -> Step:
    """A norm inside attention, always RMSNorm: over each head of q and k, or over a latent."""
    forward, backward = _norm_ops(rank, rows, cols, rms=True)
    return Step(
        name=name, part="norm", op=forward, gradients=(("backward", backward),), after=after
    )


def residual(rank: Rank, name: str, after: tuple[str, ...]) -> Step:
    """h + f(h); its gradient is the incoming one, for both terms."""
    op = add(rank.rows * rank.cfg.hidden_dim, rank.dtype)
    return Step(name=name, part="residual", op=op, after=after)


def rotation(
    rank: Rank, name: str, num_heads: Num, dim: int, after: tuple[str, ...] | None = None
) -> Step:
    """Rotary positions of q and k; the gradient turns back at the same price."""
    op = rope(rank.tokens, num_heads, dim, rank.dtype)
    return Step(name=name, part="attention", op=op, gradients=(("backward", op),), after=after)


def activation(rank: Rank, name: str, part: str, num_elements: Num) -> Step:
    """The activation of the MLP, with the product by the gate where gated."""
    mlp, dtype = rank.cfg.mlp, rank.dtype
    if (mlp.activation, mlp.gated) == ("silu", True):
        forward, backward = silu_mul(num_elements, dtype), silu_mul_backward(num_elements, dtype)
    elif (mlp.activation, mlp.gated) == ("gelu", False):
        forward, backward = gelu(num_elements, dtype), gelu_backward(num_elements, dtype)
    else:
        counts, backward_counts = _ACTIVATION_COUNTS[mlp.activation, mlp.gated]
        arrays = 2 if mlp.gated else 1
        forward = pointwise(num_elements, arrays, 1, counts, dtype)
        backward = pointwise(num_elements, arrays + 1, arrays, backward_counts, dtype)
    return Step(name=name, part=part, op=forward, gradients=(("backward", backward),))


def pointwise(
    num_elements: Num, num_inputs: Num, num_outputs: Num, counts: tuple[Num, Num], dtype: DType
) -> Elementwise:
    """A pointwise map with that many vector flops and special functions per element."""
    return Elementwise(
        num_elements=num_elements,
        num_inputs=num_inputs,
        num_outputs=num_outputs,
        vector_flops_per_element=counts[0],
        special_ops_per_element=counts[1],
        dtype=dtype,
    )
