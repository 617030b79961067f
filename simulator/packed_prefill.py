"""Reading prompts of unlike lengths in one pass: padded to the longest, or packed into rows.

A pass over `rows` rows of `len_row` tokens runs every kernel that is linear in tokens on
rows x len_row of them, padding included. Its attention is one of

    padded    each row is one prompt: rows sequences of len_row, causal
    dense     rows share a mask that is given as numbers: all len_row^2 pairs of every row are
              computed, whatever the mask drops (scaled_dot_product_attention with `attn_mask`)
    blocks    a kernel that knows where prompts begin: each prompt's own causal triangle

where `blocks` is timed as that many prompts of one length, the root of the mean square, which has
their flops. On one device there are held at once

    weights + K and V of every row's tokens, all layers
            + logits: of each prompt's last token, or of all tokens (16 bit, and once more in FP32)
            + what the widest layer works with: 2 hidden + width, 16 bit a token
            + dense: the mask, 16 bit a pair

    width = (query heads + 2 key heads) head_dim, or the feed-forward block's up, gate and product
            (those of the chosen experts)

Source: Zhao et al. 2024, Prepacking (arXiv 2404.09529), section 3; siyan-zhao/prepacking, model.py
for the dense mask. Implemented in: `Pass.seconds`, `Pass.memory`, `padded`, `packed`.

Ignored: packing itself and building the mask (the host's), unpacking K and V for generation,
launch gaps, fragmentation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import numpy as np

from hwmodels.device import Device
from hwmodels.dtypes import BF16, FP32, DType
from hwmodels.errors import UnsupportedError
from simulator.kernel_time.model import Conditions
from simulator.kernel_time.predict import predict
from simulator.pieces import is_attention
from simulator.planners.prepacking import Packing
from simulator.variable_length import Ints
from workloads.models.activations import kv_cache_bytes
from workloads.models.config import TransformerConfig
from workloads.models.parameters import count_parameters
from workloads.models.transformer import prefill_step
from workloads.op import Op
from workloads.plan import Plan
from workloads.workload import Node

PADDED, DENSE, BLOCKS = "padded", "dense", "blocks"
MASKS: Final = (PADDED, DENSE, BLOCKS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on the device at the peak of a pass, by what holds them."""

    weights: float
    cache: float
    logits: float
    working: float
    mask: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.cache + self.logits + self.working + self.mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One forward pass over `rows` rows of `len_row` tokens that hold prompts of `held` tokens."""

    config: TransformerConfig
    held: tuple[int, ...]
    rows: int
    len_row: int
    mask: str = PADDED
    dtype: DType = BF16
    weight_bytes: float = BF16.bytes_per_element
    all_logits: bool = False

    def __post_init__(self) -> None:
        if self.config.mixer is not None or self.config.num_linear_layers:
            raise UnsupportedError(
                f"{self.config.name}: states of its scan layers would run on from one prompt of a "
                "row into the next; packed rows are modelled for attention alone"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed."""
        return self.rows * self.len_row

    def seconds(self, on: Device, *, kernel: str = "") -> float:
        """Kernels one after another, as predicted; attention on the calibrated `kernel`."""
        total = 0.0
        for node, times in self.nodes():
            run = Conditions(kernel=kernel if is_attention(node) else "")
            total += times * float(predict(node.op, on=on, conditions=run).seconds)
        return total

    def nodes(self) -> Iterator[tuple[Node, float]]:
        """Every kernel of the pass with how often it runs."""
        plan = Plan()
        rows = prefill_step(self.config, batch=self.rows, len_context=self.len_row)
        length = math.ceil(math.sqrt(float(np.mean(np.square(self.held, dtype=np.float64)))))
        apart = prefill_step(self.config, batch=len(self.held), len_context=length)
        asked = apart if self.mask == BLOCKS else rows
        for kind, count in self.config.kinds.items():
            for node in rows.layer(kind, plan, dtype=self.dtype):
                if not is_attention(node):
                    yield node, float(node.count) * count
            for node in asked.layer(kind, plan, dtype=self.dtype):
                if is_attention(node):
                    yield self._masked(node), float(node.count) * count
        ends = prefill_step(self.config, batch=len(self.held), len_context=1)
        every = rows if self.all_logits else ends
        for node in rows.ends(plan, dtype=self.dtype):
            if node.part == "embedding":
                yield node, float(node.count)
        for node in every.ends(plan, dtype=self.dtype):
            if node.part != "embedding":
                yield self._headed(node), float(node.count)

    def _masked(self, node: Node) -> Node:
        """Attention over all pairs where the mask is dense."""
        whole = self.mask == DENSE and "causal" in {f.name for f in fields(node.op)}
        return replace(node, op=node.op.over(causal=False)) if whole else node

    def _headed(self, node: Node) -> Node:
        """The head over every token where all logits are asked for."""
        if not self.all_logits:
            return node
        return replace(node, op=_over_rows(node.op, self.rows, self.num_tokens))

    def memory(self) -> Memory:
        """Bytes at the peak."""
        cfg, size = self.config, self.dtype.bytes_per_element
        logit_bytes = size + FP32.bytes_per_element if self.all_logits else size
        logits = self.num_tokens if self.all_logits else len(self.held)
        cache = kv_cache_bytes(cfg, batch=self.rows, len_context=self.len_row, dtype=self.dtype)
        pairs = self.rows * float(self.len_row) ** 2
        return Memory(
            weights=float(count_parameters(cfg).total) * self.weight_bytes,
            cache=float(cache),
            logits=float(logits) * cfg.vocab_size * logit_bytes,
            working=float(self.num_tokens) * (2 * cfg.hidden_dim + _width(cfg)) * size,
            mask=pairs * size if self.mask == DENSE else 0.0,
        )


def _over_rows(op: Op, few: int, many: int) -> Op:
    """The op with `many` rows where it has `few`."""
    names = [f.name for f in fields(op) if f.name in ("rows", "m") and getattr(op, f.name) == few]
    return op.over(**dict.fromkeys(names, many)) if names else op


def _width(cfg: TransformerConfig) -> float:
    """Elements a token takes in the widest part of a layer."""
    spec = cfg.attention
    heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    ffn = cfg.mlp.ffn_dim if cfg.num_dense_layers else 0
    if cfg.moe:
        ffn = max(ffn, cfg.moe.num_active * cfg.moe.expert_ffn_dim + cfg.moe.shared_ffn_dim)
    return float(max(heads, (3 if cfg.mlp.gated else 2) * ffn))


def padded(config: TransformerConfig, held: Ints, **how: Any) -> Pass:
    """Every prompt in a row of its own, padded to the longest."""
    return Pass(
        config=config, held=tuple(held.tolist()), rows=len(held), len_row=int(held.max()),
        **how,
    )  # fmt: skip


def packed(config: TransformerConfig, found: Packing, mask: str = DENSE, **how: Any) -> Pass:
    """The rows of a packing, with the mask as numbers (the paper's) or known to the kernel."""
    return Pass(
        config=config, held=tuple(found.held.tolist()), rows=found.num_rows, len_row=found.len_row,
        mask=mask, **how,
    )  # fmt: skip
