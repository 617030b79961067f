"""Which kernel model times which op: the nearest class wins, the general path takes the rest."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from hwmodels.errors import InputError
from simulator.kernel_time import (
    attention_backward,
    attention_decode,
    attention_prefill,
    based,
    collective,
    collective_nodes,
    conv2d,
    expert_exchange,
    fused_rnn,
    gemm,
    general,
    grouped,
    host_copy,
    long_conv,
    moe,
    quantised_gemm,
    rnn,
    scan,
    selective_scan,
    streaming,
)
from simulator.kernel_time.model import KernelModel
from workloads.op import Op

MODELS: Final[tuple[KernelModel, ...]] = (
    gemm.MODEL,
    gemm.BATCHED,
    quantised_gemm.MODEL,
    attention_decode.MODEL,
    moe.MODEL,
    grouped.MODEL,
    collective.MODEL,
    collective.CUSTOM,
    collective_nodes.CLUSTER,
    collective_nodes.STAGED,
    expert_exchange.EXPERTS,
    rnn.MODEL,
    fused_rnn.MODEL,
    attention_prefill.MODEL,
    attention_backward.MODEL,
    scan.SHORT_CONV,
    scan.DELTA_STEP,
    scan.DELTA_RULE,
    scan.CHUNK_SCAN,
    selective_scan.MODEL,
    based.MODEL,
    based.PARALLEL,
    based.STEPS,
    streaming.MODEL,
    conv2d.MODEL,
    host_copy.MODEL,
    long_conv.MODEL,
    general.MODEL,
)


@lru_cache(maxsize=512)
def model_of(op: type[Op]) -> KernelModel:
    """The model of the nearest base class that has one.

    >>> from workloads.ops.matmul import Matmul
    >>> from workloads.ops.softmax import Softmax
    >>> model_of(Matmul).name
    'gemm'
    """
    by_op = {kind: model for model in MODELS for kind in model.ops}
    return next(by_op[kind] for kind in op.__mro__ if kind in by_op)


def model(name: str) -> KernelModel:
    """The model of that name."""
    for found in MODELS:
        if found.name == name:
            return found
    known = ", ".join(m.name for m in MODELS)
    raise InputError(f"unknown kernel model '{name}'; it is one of {known}")
