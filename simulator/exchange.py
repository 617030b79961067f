"""Which collectives one layer and one step need under a plan: who talks to whom, how much.

Ranks lie innermost first: tensor, context, (expert within data x context), data, pipeline. So
tensor groups have stride 1, context and data groups stride tp, expert groups stride tp, the
replicas of one expert stride tp * ep, pipeline neighbours stride tp * cp * dp.
"""

from __future__ import annotations

from dataclasses import dataclass

from hwmodels.cluster import Cluster
from simulator.network import bound_seconds, calibrated_seconds
from workloads.models.config import TransformerConfig
from workloads.models.parameters import heads_per_rank
from workloads.numeric import Num, ceil_div, where
from workloads.ops.collective import Collective
from workloads.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """`forward` times a collective in the forward pass of a layer, `backward` in its backward.

    `hidden` more run in the backward pass under kernels that do not wait for them.
    """

    piece: str
    collective: Collective
    stride: Num
    forward: Num
    backward: Num
    hidden: Num = 0

    def seconds(self, *, on: Cluster, calibrated: bool = False) -> tuple[Num, Num, Num]:
        """Seconds in the forward pass, in the backward pass, and hidden in it."""
        seconds = calibrated_seconds if calibrated else bound_seconds
        once = seconds(self.collective, on=on, stride=self.stride)
        return self.forward * once, self.backward * once, self.hidden * once


TENSOR, CONTEXT, EXPERT = "tensor parallel", "context parallel", "expert parallel"


def layer_exchanges(
    cfg: TransformerConfig, kind: str, *, len_seq: Num, plan: Plan, element_bytes: float
) -> tuple[Exchange, ...]:
    """Collectives of one layer for one micro-batch.

    Tensor parallel with sequence parallelism (Korthikanti et al. 2022, section 4.2.2): each of
    the two blocks gathers its input and scatters its output, and the same again for gradients.
    Its weight gradients gather that input once more, hidden under the gradient itself. Behind an
    all-to-all, routed experts are gathered and scattered row by row, one for each expert a token
    chose, and shared experts beside them; without one, every rank routes the gathered tokens.
    Context parallel ring (Liu et al. 2023, arXiv 2310.01889): K and V pass cp - 1 neighbours;
    backward passes them again with their gradients. Experts: tokens go out and come back through
    all-to-all, and so do their gradients.
    """
    tokens = plan.micro_batch * ceil_div(len_seq, plan.cp)
    hidden_bytes = tokens * cfg.hidden_dim * element_bytes
    routed_rows = cfg.moe.num_active if kind == "moe" and cfg.moe else 0
    block_rows = _rows_per_token(cfg, plan) if routed_rows else 1
    found = [
        Exchange(
            piece=TENSOR,
            collective=Collective(kind=kind_of, num_bytes=hidden_bytes * rows, num_ranks=plan.tp),
            stride=1,
            forward=1,
            backward=1,
            hidden=1 if kind_of == "all_gather" else 0,
        )
        for rows in (1, block_rows)
        for kind_of in ("all_gather", "reduce_scatter")
    ]
    kv_bytes = tokens * kv_elements_per_token(cfg, plan.tp) * element_bytes
    found.append(
        Exchange(
            piece=CONTEXT,
            collective=Collective(kind="send_recv", num_bytes=kv_bytes, num_ranks=plan.cp),
            stride=plan.tp,
            forward=plan.cp - 1,
            backward=2 * (plan.cp - 1),
        )
    )
    if routed_rows:
        routed = ceil_div(tokens, plan.tp) * routed_rows * cfg.hidden_dim * element_bytes
        found.append(
            Exchange(
                piece=EXPERT,
                collective=Collective(kind="all_to_all", num_bytes=routed, num_ranks=plan.ep),
                stride=plan.tp,
                forward=2,
                backward=2,
            )
        )
    return tuple(found)


def _rows_per_token(cfg: TransformerConfig, plan: Plan) -> Num:
    """Rows that tensor-parallel ranks exchange for a token at the edges of an MoE block."""
    assert cfg.moe is not None
    behind = cfg.moe.num_active + (1 if cfg.moe.shared_ffn_dim else 0)
    return where(plan.ep > 1, behind, 1)


def kv_elements_per_token(cfg: TransformerConfig, tp: Num = 1) -> Num:
    """K and V elements of a token that one tensor-parallel rank attends to in one layer.

    Latent attention has them expanded, head by head: passing the latent instead would expand it
    again on every rank of the ring, which no op counts.

    >>> from workloads.models.config import load_hf_config
    >>> kv_elements_per_token(load_hf_config("examples/llama3-8b.json"))
    2048
    """
    spec = cfg.attention
    _, kv_heads = heads_per_rank(spec.num_heads, spec.num_kv_heads, tp)
    return kv_heads * (spec.head_dim + spec.v_head_dim)
