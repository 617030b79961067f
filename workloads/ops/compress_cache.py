"""Compressing a prompt's keys and values into the cache of `compressed_cache`, kernel by kernel.

In order, each only where the scheme asks for it, with n = len_old tokens of batch cache_heads
streams:

    join      keys, values of joined or narrowed heads projected: 2 n joined d (dk + dv) flops
    channels  scores of key channels from `len_window` queries, the best kept (ThinK)
    tokens    the len_full most important found (MiKV): top-k of scores that attention left behind
    outliers  the largest elements of keys and of values found and taken out (GEAR)
    gather    kept channels copied, where nothing quantises them
    quantise  keys and values
    residual  what codes leave, and two power iterations for its factors (GEAR, algorithm 2)

Generation compresses blocks of len_buffer tokens by the same kernels: the op with len_kv =
len_buffer. Choices: outliers are the largest of a head, GEAR takes as many of every vector; the
restored copy that the residual subtracts counts as read in 16 bits. Ignored: orthonormalising r
columns, O((n + d) r^2); the scores of tokens, which come out of the attention before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, TypeAlias

import numpy as np

from hwmodels.errors import InputError
from workloads.machine import Machine, Values
from workloads.numeric import Num, any_true, maximum, minimum
from workloads.op import Arrays, ProvedOp, Stage
from workloads.ops.cache_segment import WHOLE_BITS, share
from workloads.ops.compressed_cache import CompressedCacheOp
from workloads.ops.elementwise import add, cast
from workloads.ops.matmul import BatchedMatmul
from workloads.ops.quantise_groups import ChannelScores, QuantiseGroups
from workloads.ops.staged import ProvedStagedOp
from workloads.ops.top_k import TopK

ITERATIONS: Final = 2
"""Power iterations of a correction."""

Run: TypeAlias = Callable[[ProvedOp, Arrays], Arrays]


@dataclass(frozen=True, kw_only=True)
class CompressCache(CompressedCacheOp, ProvedStagedOp):
    """k, v [batch, num_kv_heads, len_old, head_dim] -> codes, scales, indices and factors.

    >>> op = CompressCache(num_heads=32, len_kv=1000, head_dim=128)
    >>> [stage.name for stage in op.stages()], op.work(2**17).write_bytes == op.cache_bytes()
    (['quantise_k', 'quantise_v'], True)
    """

    name: ClassVar[str] = "compress_cache"
    cheaper: ClassVar[tuple[str, ...]] = (
        "heads_joined", "group_size", "len_generated", "len_buffer", "key_bits", "value_bits",
    )  # fmt: skip
    len_window: Num = 32

    def check(self) -> None:
        """Something to compress, by some scheme."""
        super().check()
        if any_true(self.len_coded < 1):
            raise InputError(
                f"{self.name}: full_frac and len_buffer leave no token to compress; lower them"
            )
        if not self.stages():
            raise InputError(
                f"{self.name}: nothing is compressed; set key_bits, pruned_frac, key_frac or others"
            )

    @property
    def len_coded(self) -> Num:
        """Tokens that are coded."""
        return self.len_old - self.len_full

    @property
    def streams(self) -> Num:
        """Caches: sequences times cached heads."""
        return self.batch * self.cache_heads

    def _touched(self, side: str) -> bool:
        """Does any kernel read the keys ('k') or values ('v')?"""
        projects = self.projects_keys if side == "k" else self.projects_values
        always = self.rank is not None or any_true(np.greater(self.outlier_frac, 0))
        return projects or always or self._narrow(side) or (side == "k" and self.prunes)

    def _narrow(self, side: str) -> bool:
        return any_true(np.less(self.coding(side).bits, WHOLE_BITS))

    def _width(self, side: str) -> Num:
        return self.key_width_kept if side == "k" else self.value_width

    def stages(self) -> tuple[Stage, ...]:
        """The kernels of the module's list that the scheme needs."""
        found: list[Stage] = []
        for side, projects, width in (
            ("k", self.projects_keys, self.key_width),
            ("v", self.projects_values, self.value_width),
        ):
            if projects:
                join = BatchedMatmul(
                    batch=self.cache_heads, m=self.batch * self.len_old, n=width,
                    k=self.heads_joined * self.head_dim, dtype=self.dtype,
                )  # fmt: skip
                found.append(Stage(f"join_{side}", join))
        if self.prunes:
            found += self._channel_stages()
        if any_true(np.greater(self.len_full, 0)):
            best = TopK(rows=self.streams, cols=self.len_old, k=maximum(self.len_full, 1))
            found.append(Stage("tokens", best, times=minimum(self.len_full, 1)))
        for side in ("k", "v"):
            found += self._coding_stages(side)
        return tuple(found)

    def _channel_stages(self) -> list[Stage]:
        window = self.len_window * (self.num_heads // self.cache_heads)
        scores = ChannelScores(
            streams=self.streams, len_q=window, len_kv=self.len_old, dim=self.key_width,
            dtype=self.dtype,
        )  # fmt: skip
        best = TopK(rows=self.streams, cols=self.key_width, k=self.key_width_kept)
        found = [Stage("channel_scores", scores), Stage("channels", best)]
        if not self._narrow("k"):
            kept = self.streams * self.len_coded * self.key_width_kept
            found.append(Stage("gather", cast(kept, self.dtype, self.dtype)))
        return found

    def _coding_stages(self, side: str) -> list[Stage]:
        found, n, d = [], self.len_coded, self._width(side)
        if any_true(np.greater(self.outlier_frac, 0)):
            largest = maximum(share(self.outlier_frac, n * d), 1)
            best = TopK(rows=self.streams, cols=n * d, k=largest, dtype=self.dtype)
            found.append(Stage(f"outliers_{side}", best))
        coding = self.coding(side)
        if self._narrow(side):
            by_channel = coding.by_channel
            quantise = QuantiseGroups(
                rows=self.streams * (d if by_channel else n), cols=n if by_channel else d,
                bits=coding.bits, group=coding.group, zero_point=coding.zero_point,
                scale_bits=coding.scale_bits, dtype=self.dtype,
            )  # fmt: skip
            found.append(Stage(f"quantise_{side}", quantise))
        if self.rank is not None:
            found.append(Stage(f"residual_{side}", add(self.streams * n * d, self.dtype)))
            for name, rows, depth in (("left", n, d), ("right", d, n)):
                product = BatchedMatmul(
                    batch=self.streams, m=rows, n=self.rank, k=depth, dtype=self.dtype
                )
                found.append(Stage(f"{name}_{side}", product, times=ITERATIONS))
        return found

    def compulsory_bytes(self) -> Num:
        """The keys and values that are coded, read once; what is written is each scheme's."""
        sides: Num = 0 * self.len_kv
        for side, projects, width in (
            ("k", self.projects_keys, self._width("k")),
            ("v", self.projects_values, self.value_width),
        ):
            raw = self.heads_joined * self.head_dim if projects else width
            sides = sides + self._touched(side) * raw
        return self.streams * self.len_coded * sides * self.dtype.bytes_per_element

    # ---- the proof --------------------------------------------------------------------------

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """k and v by stream, weights of the joins, queries, token scores, starts of iterations."""
        n, joined = int(self.len_old), int(self.heads_joined * self.head_dim)
        streams, heads = int(self.streams), int(self.cache_heads)
        found: dict[str, Values] = {}
        for side, width in (("k", self.key_width), ("v", self.value_width)):
            projects = self.projects_keys if side == "k" else self.projects_values
            wide = joined if projects else int(width)
            found[side] = rng.standard_normal((streams, n, wide))
            found[f"join_{side}"] = rng.standard_normal((heads, wide, int(width)))
            rank = int(self.old_rank)
            found[f"start_{side}"] = rng.standard_normal((streams, int(self._width(side)), rank))
        window = int(self.len_window * (self.num_heads // self.cache_heads))
        found["q"] = rng.standard_normal((streams, window, int(self.key_width)))
        found["importance"] = rng.random((streams, n))
        return found

    def reference(self, inputs: Arrays) -> Arrays:
        """The stages' references in turn."""
        return self._chain(inputs, lambda op, arrays: op.reference(arrays))

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The stages' programs in turn."""
        return self._chain(inputs, lambda op, arrays: op.program(machine, arrays))

    def _ops(self) -> dict[str, ProvedOp]:
        return {s.name: s.op for s in self.stages() if isinstance(s.op, ProvedOp)}

    def _chain(self, inputs: Arrays, run: Run) -> Arrays:
        """What flows from stage to stage; picking rows and columns is addressing."""
        ops, found = self._ops(), {}
        sides = {side: self._joined(inputs, side, ops, run) for side in ("k", "v")}
        if "channels" in ops:
            scores = run(ops["channel_scores"], {"q": inputs["q"], "k": sides["k"]})["y"]
            found["channels"] = run(ops["channels"], {"x": scores})["index"]
            columns = found["channels"].astype(np.int64)[:, None, :]
            sides["k"] = np.take_along_axis(sides["k"], columns, axis=2)
        if "tokens" in ops:
            found["tokens"] = run(ops["tokens"], {"x": inputs["importance"]})["index"]
            sides = {side: self._others(x, found["tokens"]) for side, x in sides.items()}
        if "gather" in ops:
            flat = run(ops["gather"], {"x0": sides["k"].reshape(-1)})["y0"]
            sides["k"] = flat.reshape(sides["k"].shape)
        for side, x in sides.items():
            coded = self._coded(x, inputs[f"start_{side}"], side, ops, run)
            found |= {f"{side}_{name}": value for name, value in coded.items()}
        return found

    def _joined(self, inputs: Arrays, side: str, ops: dict[str, ProvedOp], run: Run) -> Values:
        x = inputs[side]
        if f"join_{side}" not in ops:
            return x
        batch, heads = int(self.batch), int(self.cache_heads)
        rows = x.reshape(batch, heads, x.shape[1], -1).swapaxes(0, 1).reshape(heads, -1, x.shape[2])
        c = run(ops[f"join_{side}"], {"a": rows, "b": inputs[f"join_{side}"]})["c"]
        joined: Values = c.reshape(heads, batch, x.shape[1], -1).swapaxes(0, 1)
        return joined.reshape(x.shape[0], x.shape[1], -1)

    def _others(self, x: Values, tokens: Values) -> Values:
        """All tokens but those."""
        every = np.arange(x.shape[1])
        kept = [np.setdiff1d(every, row.astype(np.int64)) for row in tokens]
        return np.stack([x[i, row] for i, row in enumerate(kept)])

    def _coded(
        self, x: Values, start: Values, side: str, ops: dict[str, ProvedOp], run: Run
    ) -> dict[str, Values]:
        found: dict[str, Values] = {}
        if f"outliers_{side}" in ops:
            flat = x.reshape(x.shape[0], -1).copy()
            found["outliers"] = run(ops[f"outliers_{side}"], {"x": np.abs(flat)})["index"]
            np.put_along_axis(flat, found["outliers"].astype(np.int64), 0.0, axis=1)
            x = flat.reshape(x.shape)
        restored = x
        if f"quantise_{side}" in ops:
            coded, restored = self._quantised(x, side, ops, run)
            found |= coded
        if f"left_{side}" in ops:
            pair = {"x0": x.reshape(-1), "x1": -restored.reshape(-1)}
            residual = run(ops[f"residual_{side}"], pair)["y0"].reshape(x.shape)
            right = start
            for _ in range(ITERATIONS):
                left = run(ops[f"left_{side}"], {"a": residual, "b": right})["c"]
                turned = {"a": residual.swapaxes(1, 2), "b": left}
                right = run(ops[f"right_{side}"], turned)["c"]
            found |= {"left": left, "right": right}
        return found

    def _quantised(
        self, x: Values, side: str, ops: dict[str, ProvedOp], run: Run
    ) -> tuple[dict[str, Values], Values]:
        """Codes, scales and zero points, and what they stand for."""
        coding, (streams, n, d) = self.coding(side), x.shape
        turned = x.swapaxes(1, 2) if coding.by_channel else x
        flat = run(ops[f"quantise_{side}"], {"x": turned.reshape(-1, turned.shape[2])})
        found = {name: value.reshape(streams, turned.shape[1], -1) for name, value in flat.items()}
        if coding.by_channel:
            found = {name: value.swapaxes(1, 2) for name, value in found.items()}
        return found, coding.restored(found, n, d)
