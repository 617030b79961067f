"""How Megatron-Bridge ran the mixtures of experts in its tables: what rows do not say.

Each release's performance scripts (scripts/performance/configs) hold the setting of every row: the
token dispatcher, whether the exchange of experts runs under other kernels (`moe_a2a_overlap`),
which parts of a layer are captured in graphs (`cuda_graph_scope`), which modules are recomputed
(`recompute_modules`). Read from three states of the repository, taken for the releases around them:

    2025-10    commits 0fa501ac, 01328424             releases 25.09 and 25.11
    2026-Q1    commits f0e2c37e, f29a269f             25.11 where its tables follow it, 26.02
    2026-mid   commits 04264182, 01b2977e, 07eea52d   26.04 and later

Everywhere expert_tensor_parallel_size = 1, gradients in 16 bits, forced balance, the distributed
optimizer, and sequence parallelism where tp > 1. "alltoall" is flat; "deepep" and "hybridep"
(node-limited) send a token once to a node and once to a rank. Graphs of the whole step need fixed
sizes: with token drop, or with the fused kernels of MXFP8 (`cutedsl_fused_grouped_mlp`): Qwen3 on
GB200 from 26.06 on (pull request 4249 of the repository), DeepSeek-V3 and gpt-oss there from 26.08.
Those also run attention in fp8, which is not modelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from simulator.expert_exchange import DEEPEP, FLAT, NODE_LIMITED
from validate.adapters.part import Uncounted
from validate.moe_models import (
    DEEPSEEK,
    GPT_OSS,
    QWEN_30B,
    QWEN_235B,
    drops_tokens,
    model_of,
)

Release = tuple[int, ...]
ATTENTION, ROUTER, STEP = "attn", "moe_router", "full_iteration"
HOPPER, BOARD, RACK = "H100", "B200", "GB200"
UP, DENSE, ACT, NORMS = "mla_up_proj", "mlp", "moe_act", "layernorm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One row's setting. `graphs`: the parts of a layer captured, `STEP` all of them. `fused`: one
    kernel for products, activation and casts of the experts, as serving has.
    """

    dispatcher: str = FLAT
    overlapped: bool = False
    graphs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    fused: bool = False


_PARTLY: Final = (ATTENTION, ROUTER)
_FUSED: Final = Setting(dispatcher=NODE_LIMITED, overlapped=True, graphs=(STEP,), fused=True)
_DROPLESS: Final[Mapping[tuple[str, str], tuple[tuple[Release, Setting], ...]]] = {
    (QWEN_30B, HOPPER): (
        ((25, 9), Setting()),
        ((26, 4), Setting(dispatcher=NODE_LIMITED)),
    ),
    (QWEN_30B, BOARD): (
        ((25, 9), Setting(graphs=(ROUTER,))),
        ((26, 4), Setting(dispatcher=NODE_LIMITED, graphs=_PARTLY)),
    ),
    (QWEN_30B, RACK): (
        ((25, 9), Setting(dispatcher=NODE_LIMITED, graphs=(ROUTER,))),
        ((26, 6), _FUSED),
    ),
    (QWEN_235B, HOPPER): (((25, 9), Setting(overlapped=True)),),
    (QWEN_235B, BOARD): (((25, 9), Setting()),),
    (QWEN_235B, RACK): (
        ((25, 9), Setting(dispatcher=NODE_LIMITED, graphs=_PARTLY)),
        ((26, 6), _FUSED),
    ),
    (DEEPSEEK, HOPPER): (
        ((25, 9), Setting(dispatcher=DEEPEP, overlapped=True, modules=(UP, DENSE))),
    ),
    (DEEPSEEK, BOARD): (
        ((25, 9), Setting(modules=(UP,))),
        ((26, 2), Setting(dispatcher=NODE_LIMITED, modules=(UP,))),
        ((26, 4, 1), Setting(dispatcher=DEEPEP, overlapped=True, graphs=_PARTLY,
                             modules=(UP, DENSE))),
    ),
    (DEEPSEEK, RACK): (
        ((25, 9), Setting(dispatcher=NODE_LIMITED, graphs=_PARTLY, modules=(UP,))),
        ((26, 8), replace(_FUSED, modules=(UP,))),
    ),
    (GPT_OSS, HOPPER): (((25, 9), Setting(modules=(NORMS, ACT))),),
    (GPT_OSS, BOARD): (((25, 9), Setting(modules=(NORMS, ACT))),),
    (GPT_OSS, RACK): (
        ((25, 9), Setting(modules=(NORMS, ACT))),
        ((26, 4), Setting(overlapped=True, modules=(NORMS, ACT))),
        ((26, 8), _FUSED),
    ),
}  # fmt: skip
_DROPPING: Final[Mapping[tuple[str, str], Setting]] = {
    (QWEN_30B, BOARD): Setting(graphs=(STEP,)),
    (QWEN_30B, RACK): Setting(graphs=(STEP,)),
    (QWEN_235B, RACK): Setting(graphs=(STEP,)),
    (DEEPSEEK, BOARD): Setting(modules=(UP,)),
    (DEEPSEEK, RACK): Setting(modules=(UP,)),
}


def release_of(source: str) -> Release:
    """The release in a row's source.

    >>> release_of("megatron-bridge/26.04.01/pre-training")
    (26, 4, 1)
    """
    parts = source.split("/")
    try:
        return tuple(int(n) for n in parts[1].split("."))
    except (IndexError, ValueError):
        raise Uncounted("the row's source names no release") from None


def setting_of(source: str, gpu: str, model: Mapping[str, Any]) -> Setting:
    """The setting of a row; raises `Uncounted` where no script is known.

    >>> setting_of("megatron-bridge/26.08/pre-training", "GB200", {"name": "DeepSeekV3"}).graphs
    ('full_iteration',)
    """
    if not source.startswith("megatron-bridge/"):
        raise Uncounted("a mixture of experts whose trainer's setting is not known")
    name, board, release = model_of(model), _board(gpu), release_of(source)
    if drops_tokens(model):
        return _DROPPING.get((name, board), Setting())
    known = [setting for since, setting in _DROPLESS.get((name, board), ()) if since <= release]
    if not known:
        raise Uncounted("a mixture of experts whose trainer's setting is not known")
    return known[-1]


def _board(gpu: str) -> str:
    for board in (RACK, BOARD, HOPPER):
        if gpu.upper().startswith(board):
            return board
    raise Uncounted(f"no setting of a mixture of experts is known on {gpu:.40}")
