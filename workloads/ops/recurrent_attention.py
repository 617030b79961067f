"""What linear attentions share: a recurrence in chunks, or one step of it from a held state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from hwmodels.dtypes import BF16, DType
from hwmodels.errors import InputError
from workloads.numeric import Num, any_true, minimum
from workloads.op import CHUNKED, Arrays, ProvedOp
from workloads.ops.linear_recurrence import CHANNEL, NONE, LinearRecurrence
from workloads.ops.recurrent_step import RecurrentStep
from workloads.ops.staged import Step, SteppedOp

SUB_CHUNK: Final = 16
"""Rows of a block of scores under decays by channel: one tensor-core tile."""


@dataclass(frozen=True, kw_only=True)
class RecurrentAttention(SteppedOp):
    """Tokens [batch, num_heads, len_seq, head_dim], worked on in chunks.

    With `update` it makes one step (len_seq = 1) from the state that decoding keeps.
    """

    tunable: ClassVar[Mapping[str, tuple[int, ...]]] = CHUNKED
    batch: Num = 1
    num_heads: Num
    len_seq: Num
    head_dim: Num
    chunk: Num = 64
    update: bool = False
    dtype: DType = BF16

    def check(self) -> None:
        """An update is one step."""
        if self.update and any_true(np.not_equal(self.len_seq, 1)):
            raise InputError(f"{self.name}: an update makes one step; set len_seq to 1")

    @property
    def streams(self) -> Num:
        """Heads of all sequences."""
        return self.batch * self.num_heads

    @property
    def rows(self) -> Num:
        """Queries of all heads."""
        return self.streams * self.len_seq

    def step_of(self, key_dim: Num, value_dim: Num, *, decay: bool = False) -> RecurrentStep:
        """The step: with decays by channel, or else with a normaliser."""
        return RecurrentStep(
            batch=self.batch, num_heads=self.num_heads, key_dim=key_dim, value_dim=value_dim,
            decay=decay, normalised=not decay, dtype=self.dtype,
        )  # fmt: skip

    def chunks_of(self, key_dim: Num, value_dim: Num, *, decay: bool = False) -> LinearRecurrence:
        """The same recurrence in chunks."""
        return LinearRecurrence(
            batch=self.batch, num_heads=self.num_heads, len_seq=self.len_seq, key_dim=key_dim,
            value_dim=value_dim, chunk=self.chunk, sub_chunk=minimum(SUB_CHUNK, self.chunk),
            decay=CHANNEL if decay else NONE, normalised=not decay, dtype=self.dtype,
        )  # fmt: skip

    def recurrence_of(self, key_dim: Num, value_dim: Num, *, decay: bool = False) -> ProvedOp:
        """The step of an update, else the chunks."""
        make = self.step_of if self.update else self.chunks_of
        return make(key_dim, value_dim, decay=decay)


def recurred(step: Step, op: ProvedOp, tokens: Arrays, held: Arrays) -> Arrays:
    """A recurrence over `tokens` [batch, heads, len, w], or its step from what is `held`."""
    if not isinstance(op, RecurrentStep):
        return step(op, tokens)
    names = ("state", "total") if op.normalised else ("state",)
    one = {name: values[:, :, 0] for name, values in tokens.items()}
    found = step(op, one | {name: held[name] for name in names})
    return {**found, "o": found["o"][:, :, None]}
