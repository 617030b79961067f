"""Which collectives one layer and one step need under a plan: who talks to whom, how much.

Where the ranks of a group lie is `workloads.placement`'s. In the usual order (tensor, context,
data, pipeline, innermost first) tensor groups have stride 1, context and data groups stride tp,
pipeline neighbours stride tp * cp * dp. Experts lie on the ranks of a stage in an order of their
own: etp innermost, then ep, so that expert groups have stride etp and the replicas of one expert
stride etp * ep.
"""

from __future__ import annotations

from simulator.expert_exchange import NODE_LIMITED, moe_exchanges
from simulator.layer_collective import CONTEXT, EXPERT, TENSOR, Exchange
from workloads.models.architecture import TransformerConfig, has_block, has_experts, mixer_of
from workloads.models.parameters import heads_per_rank
from workloads.numeric import Num, ceil_div
from workloads.ops.collective import Collective
from workloads.placement import axis_strides
from workloads.plan import Plan

__all__ = ["CONTEXT", "EXPERT", "TENSOR", "Exchange", "kv_elements_per_token", "layer_exchanges"]


def layer_exchanges(
    cfg: TransformerConfig,
    kind: str,
    *,
    len_seq: Num,
    plan: Plan,
    element_bytes: float,
    gathered_bytes: float | None = None,
    dispatcher: str = NODE_LIMITED,
) -> tuple[Exchange, ...]:
    """Collectives of one layer for one micro-batch.

    Tensor parallel with sequence parallelism (Korthikanti et al. 2022, section 4.2.2): each of
    the two blocks gathers its input and scatters its output, and the same again for gradients.
    Its weight gradients gather that input once more, hidden under the gradient itself.
    What is gathered has elements of `gathered_bytes` where it is cast before. What a mixture of
    experts exchanges, by which `dispatcher`, is `simulator.expert_exchange`'s, what the ranks of a
    sequence exchange `simulator.context_parallel`'s.
    """
    tokens = plan.micro_batch * ceil_div(len_seq, plan.cp)
    moved_bytes = {
        kind_of: tokens * cfg.hidden_dim * (wide if narrow is None else narrow)
        for kind_of, wide, narrow in (
            ("all_gather", element_bytes, gathered_bytes),
            ("reduce_scatter", element_bytes, None),
        )
    }
    block = [
        Exchange(
            piece=TENSOR,
            collective=Collective(kind=kind_of, num_bytes=each, num_ranks=plan.tp),
            stride=axis_strides(plan).tp,
            forward=1,
            backward=1,
            hidden=1 if kind_of == "all_gather" else 0,
        )
        for kind_of, each in moved_bytes.items()
    ]
    first = [*block, *_inside_mixer(cfg, kind, tokens, plan, element_bytes)]
    if not has_block(kind):
        return tuple(first)
    if not has_experts(kind):
        return (*first, *block)
    experts = moe_exchanges(
        cfg, num_tokens=tokens, plan=plan, element_bytes=element_bytes, dispatcher=dispatcher
    )
    return (*first, *experts)


def _inside_mixer(
    cfg: TransformerConfig, kind: str, tokens: Num, plan: Plan, element_bytes: float
) -> list[Exchange]:
    """What a mixer sums over its ranks: a product split by rows whose output all of them need.

    Backward the gradients of that output meet, from every rank's channels.
    """
    mixer = mixer_of(cfg, kind)
    if mixer is None or not mixer.reduced_elements():
        return []
    size = tokens * mixer.reduced_elements() * element_bytes
    summed = Collective(kind="all_reduce", num_bytes=size, num_ranks=plan.tp)
    stride = axis_strides(plan).tp
    return [Exchange(piece=TENSOR, collective=summed, stride=stride, forward=1, backward=1)]


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
