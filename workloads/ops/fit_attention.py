"""FIT: attention inside groups of tokens, and global attention of a few latents a group.

Chen and Li 2023 (arXiv 2305.12689, sections 2 and 3). L tokens make t groups of n = L / t; every
group has m latents. A block is

    local    `num_local` times: tokens of a group attend to each other        4 t n^2 d flops
    read     the latents of a group attend to its tokens                      4 t m n d
    global   `num_global` times: all latents attend to each other             4 (t m)^2 d
    write    tokens of a group attend to its latents                          4 t n m d

With n = L / t the first is 4 L n d and the third 4 (L m / n)^2 d: their sum is least at
n = (2 m^2 L `num_global` / `num_local`)^(1/3), which makes it O(L^(4/3)). The groups left out are
the power of two nearest to that (in octaves), or what of it divides L. The projections between the
attentions are ops of their own: here each attends to the rows as they are. Bidirectional, as the
paper's encoders are; the autoregressive form shifts the latents and masks both attentions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from workloads.machine import Machine
from workloads.numeric import Num, floor, log2, maximum, where
from workloads.op import Arrays, Stage
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.staged import Step
from workloads.ops.structured import StructuredAttention, attended


@dataclass(frozen=True, kw_only=True)
class FitAttention(StructuredAttention):
    """One block over x[batch, num_heads, len_seq, head_dim] in `num_groups` groups.

    >>> op = FitAttention(num_heads=1, len_seq=4096, head_dim=64, num_groups=256)
    >>> op.min_flops()[op.dtype] == 4 * 64 * (4096 * 16 + 2 * 4096 * 1 + 256**2)
    True
    >>> round(op.best_len_group(), 1)     # (2 x 4096)^(1/3)
    20.2
    """

    name: ClassVar[str] = "fit_attention"
    cheaper: ClassVar[tuple[str, ...]] = ("num_groups", "num_latents")  # these move the default
    num_groups: Num | None = None
    num_latents: Num = 1
    num_local: Num = 1
    num_global: Num = 1

    def check(self) -> None:
        """Groups of one length."""
        self.must_divide("num_groups", self.groups, self.len_seq)

    def best_len_group(self) -> Num:
        """Tokens of a group at which local and global attention together cost least."""
        share = 2 * self.num_latents**2 * self.num_global / self.num_local
        return (share * self.len_seq) ** (1 / 3)

    @property
    def groups(self) -> Num:
        """`num_groups`, else the power of two that the best length asks for and L allows."""
        if self.num_groups is not None:
            return self.num_groups
        wanted = maximum(floor(log2(self.len_seq / self.best_len_group()) + 0.5), 0)
        found: Num = 1
        for power in range(1, int(np.max(wanted)) + 1):
            fits = (self.len_seq % 2**power == 0) & (power <= wanted)
            found = where(fits, 2**power, found)
        return found

    @property
    def len_group(self) -> Num:
        """Tokens of a group."""
        return self.len_seq // self.groups

    def compulsory_bytes(self) -> Num:
        """Tokens and latents once, tokens and latents once."""
        rows = self.streams * (self.len_seq + self.groups * self.num_latents)
        return 2 * rows * self.head_dim * self.dtype.bytes_per_element

    def kernels(self) -> dict[str, FlashAttention2]:
        """The four attentions by name."""
        count, n, m = self.streams * self.groups, self.len_group, self.num_latents
        return {
            "local": self.pieces(count, n, n),
            "read": self.pieces(count, m, n),
            "global": self.pieces(self.streams, self.groups * m, self.groups * m),
            "write": self.pieces(count, n, m),
        }

    def stages(self) -> tuple[Stage, ...]:
        """In the order they run, local and global ones as often as there are layers."""
        times = {"local": self.num_local, "global": self.num_global}
        return tuple(Stage(name, op, times.get(name, 1)) for name, op in self.kernels().items())

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Tokens x and latents z."""
        return {
            "x": self.random_rows(rng, self.len_seq),
            "z": self.random_rows(rng, self.groups * self.num_latents),
        }

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """Tokens, latents from tokens, latents, tokens from latents."""
        ops, width = self.kernels(), int(self.head_dim)
        tokens = inputs["x"].reshape(-1, int(self.len_group), width)
        latents = inputs["z"].reshape(-1, int(self.num_latents), width)
        for _ in range(int(self.num_local)):
            tokens, _ = attended(step, ops["local"], tokens, tokens, tokens)
        latents, _ = attended(step, ops["read"], latents, tokens, tokens)
        everyone = latents.reshape(int(self.streams), -1, width)
        for _ in range(int(self.num_global)):
            everyone, _ = attended(step, ops["global"], everyone, everyone, everyone)
        latents = everyone.reshape(latents.shape)
        tokens, _ = attended(step, ops["write"], tokens, latents, latents)
        return {"x": tokens.reshape(inputs["x"].shape), "z": everyone.reshape(inputs["z"].shape)}
