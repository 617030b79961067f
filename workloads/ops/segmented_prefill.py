"""XL3M: a long context read in segments, each with the question behind it; the best are read again.

Wang et al. 2024 (arXiv 2405.17755, section 3). N tokens are cut into segments of s. Each is read
with the q tokens of the question appended, apart from all others, and scored by the entropy of the
model's predictions at the question's tokens: the lower, the more the segment helps. The k segments
with the lowest mean entropy are put together in their order, the question behind them, and read as
one prompt:

    segments   N / s sequences of s + q tokens       2 (N / s) (s + q)^2 d flops a head, causal
    again      one sequence of k s + q tokens        2 (k s + q)^2 d
    memory     keys and values of one reading at a time: k s + q tokens, whatever N

Attention of one layer, and once the head that predicts. With `vocab_size` V the logits of the
question's tokens are (N / s) q rows of a product of num_heads head_dim by V, and their entropies
lse - sum p x. The segments run side by side; how many devices do that is the asker's matter. The
sizes of the segments are those of the model's training length; `segment`, `len_question` and
`num_kept` are for the asker to set, their defaults no figures of the paper. Ignored: overlap of the
segments, projections and feed-forward layers (linear in the tokens that are read).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, SlowArray, Values, slices
from workloads.numeric import Num, any_true, ceil_div, floor, minimum
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.block_pool import BlockPool
from workloads.ops.elementwise import Elementwise
from workloads.ops.flash_attention import FP32_BYTES, FlashAttention2
from workloads.ops.matmul import Matmul
from workloads.ops.selection import SparseOp
from workloads.ops.softmax import online_update
from workloads.ops.staged import Step
from workloads.ops.top_k import TopK
from workloads.ops.windowed_attention import join_rows, split_rows
from workloads.work import Work


@dataclass(frozen=True, kw_only=True)
class RowEntropy(ProvedOp):
    """Entropy [rows] in fp32 of softmax(x)[rows, cols]: lse - sum p x, each row read once.

    Elements are worked on as the online softmax does, with sum e^(x - m) x carried beside the sum:
    a product and an addition more.

    >>> RowEntropy(rows=8, cols=32000).work(2**18).bytes == 8 * (2 * 32000 + 4)
    True
    """

    name: ClassVar[str] = "row_entropy"
    rows: Num
    cols: Num
    dtype: DType = BF16

    def stages(self) -> tuple[Stage, ...]:
        """Timed as a map over the logits, which writes what it reads: no less than it takes."""
        flops, special = self._steps(1)
        elements = self.rows * self.cols
        stream = Elementwise(
            num_elements=elements, dtype=self.dtype, vector_flops_per_element=flops / elements,
            special_ops_per_element=special / elements,
        )  # fmt: skip
        return (Stage("entropy", stream),)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Columns of a `chunk`, held with their fp32 copy and products."""
        held, fixed = self.dtype.bytes_per_element + 2 * FP32_BYTES, 8 * FP32_BYTES
        require_fit(self.name, fast_bytes, held + fixed, "one logit and the sums")
        return {"chunk": minimum(self.cols, floor((fast_bytes - fixed) / held))}

    def _steps(self, chunks: Num) -> tuple[Num, Num]:
        """Vector flops and special functions of all rows."""
        vector = 5 * self.cols + 6 * chunks + 3
        return self.rows * vector, self.rows * (self.cols + chunks + 2)

    def work(self, fast_bytes: Num) -> Work:
        """Logits once, 5 flops and an exp each; 6 and an exp a chunk, 3 and two a row."""
        vector, special = self._steps(ceil_div(self.cols, self.tiling(fast_bytes)["chunk"]))
        return Work(
            vector_flops=vector,
            special_ops=special,
            read_bytes=self.rows * self.cols * self.dtype.bytes_per_element,
            write_bytes=self.rows * FP32_BYTES,
        )

    def compulsory_bytes(self) -> Num:
        """Logits once, entropies once."""
        return self.rows * (self.cols * self.dtype.bytes_per_element + FP32_BYTES)

    def min_flops(self) -> Mapping[DType, Num]:
        """No products."""
        return {}

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """Random logits."""
        return {"x": 3 * rng.standard_normal((int(self.rows), int(self.cols)))}

    def reference(self, inputs: Arrays) -> Arrays:
        """- sum p log p."""
        p = np.exp(inputs["x"] - inputs["x"].max(axis=-1, keepdims=True))
        p = p / p.sum(axis=-1, keepdims=True)
        return {"y": -(p * np.log(p)).sum(axis=-1)}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel, row by row, chunk by chunk."""
        x = machine.place(inputs["x"], self.dtype)
        y = machine.empty((int(self.rows),), FP32)
        parts = slices(int(self.cols), int(self.tiling(machine.fast_bytes)["chunk"]))
        with machine.kernel():
            for row in range(int(self.rows)):
                with machine.scope():
                    _row_entropy(machine, x, y, slice(row, row + 1), parts)
        return {"y": y.values}


def _row_entropy(mc: Machine, x: SlowArray, y: SlowArray, row: slice, parts: list[slice]) -> None:
    """Entropy of one row from a running maximum, sum and weighted sum."""
    top, total, mean = mc.full((1, 1), -np.inf), mc.full((1, 1), 0.0), mc.full((1, 1), 0.0)
    for cols in parts:
        with mc.scope():
            raw = mc.load(x, (row, cols))
            scores = mc.vector(raw.values, per_element=0)  # the fp32 copy
            mc.free(raw)
            logits = mc.vector(scores.values, per_element=0)
            online_update(mc, scores, top, total, carried=mean)
            mc.vector(scores.values * logits.values, into=logits)
            mc.vector(mean.values + mc.reduce("sum", logits).values, into=mean)
    inverse = mc.special(1 / total.values)
    mc.special(np.log(total.values), into=total)
    mc.vector(top.values + total.values, into=top)
    mc.vector(mean.values * inverse.values, into=mean)
    mc.vector(top.values - mean.values, into=top)
    mc.store(top, y, row)


@dataclass(frozen=True, kw_only=True)
class SegmentedPrefill(SparseOp):
    """Context[batch, heads, len_seq, head_dim] in segments, `len_question` tokens behind each.

    O[batch, num_heads, num_kept segment + len_question, head_dim] and its logsumexp, of the second
    reading. The last segment must be whole.

    >>> op = SegmentedPrefill(num_heads=32, len_seq=2**20, head_dim=128)
    >>> op.num_segments, op.len_final, op.cache_bytes() / op.full_cache_bytes() < 1 / 100
    (512, 8256, True)
    """

    name: ClassVar[str] = "segmented_prefill"
    cheaper: ClassVar[tuple[str, ...]] = ("num_kv_heads", "segment")
    len_seq: Num
    segment: Num = 2048
    len_question: Num = 64
    num_kept: Num = 4
    vocab_size: Num = 32000

    def check(self) -> None:
        """Whole segments."""
        super().check()
        if any_true(self.len_seq % self.len_segment != 0):
            raise InputError(
                f"{self.name}: segment = {self.segment} must divide len_seq = {self.len_seq}; "
                f"pad the context"
            )

    @property
    def len_segment(self) -> Num:
        """`segment`, no more than there is."""
        return minimum(self.segment, self.len_seq)

    @property
    def num_segments(self) -> Num:
        """Segments of the context."""
        return self.len_seq // self.len_segment

    @property
    def kept(self) -> Num:
        """`num_kept`, no more than there are."""
        return minimum(self.num_kept, self.num_segments)

    @property
    def len_final(self) -> Num:
        """Tokens of the second reading."""
        return self.kept * self.len_segment + self.len_question

    def cache_bytes(self) -> Num:
        """Keys and values of one layer that the answer is generated from."""
        return self._cached(self.len_final)

    def full_cache_bytes(self) -> Num:
        """The same of the whole context and the question."""
        return self._cached(self.len_seq + self.len_question)

    def _cached(self, tokens: Num) -> Num:
        rows = self.batch * self.kv_heads * tokens
        return rows * 2 * self.head_dim * self.dtype.bytes_per_element

    def compulsory_bytes(self) -> Num:
        """Context and question once, the second reading's O and logsumexp."""
        heads, tokens = self.num_heads + 2 * self.kv_heads, self.len_seq + self.len_question
        e = self.dtype.bytes_per_element
        written = self.num_heads * self.len_final * (self.head_dim * e + FP32_BYTES)
        return self.batch * (heads * tokens * self.head_dim * e + written)

    def _reading(self, sequences: Num, length: Num) -> FlashAttention2:
        return FlashAttention2(
            batch=sequences, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
            len_q=length, head_dim=self.head_dim, causal=True, dtype=self.dtype,
        )  # fmt: skip

    def kernels(self) -> dict[str, ProvedOp]:
        """The stages by name, in order."""
        pieces, vocab = self.batch * self.num_segments, self.vocab_size
        rows = pieces * self.len_question
        return {
            "segments": self._reading(pieces, self.len_segment + self.len_question),
            "logits": Matmul(m=rows, n=vocab, k=self.num_heads * self.head_dim, dtype=self.dtype),
            "entropy": RowEntropy(rows=rows, cols=vocab, dtype=self.dtype),
            "mean": BlockPool(
                batch=pieces, len_seq=self.len_question, dim=1, block=self.len_question, dtype=FP32
            ),
            "top": TopK(rows=self.batch, cols=self.num_segments, k=self.kept),
            "again": self._reading(self.batch, self.len_final),
        }

    def stages(self) -> tuple[Stage, ...]:
        """Every kernel once."""
        return tuple(Stage(name, op) for name, op in self.kernels().items())

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k and v of the context, `question_q` and so on, the head's weights `head`."""
        found = self.random_qkv(rng, self.len_seq, self.len_seq)
        question = self.random_qkv(rng, self.len_question, self.len_question)
        shape = (int(self.num_heads) * int(self.head_dim), int(self.vocab_size))
        found |= {f"question_{name}": x for name, x in question.items()}
        return found | {"head": rng.standard_normal(shape)}

    def run(self, step: Step, inputs: Arrays, machine: Machine | None) -> Arrays:
        """Read the segments, score them, read the best again."""
        ops, count, batch = self.kernels(), int(self.num_segments), int(self.batch)
        split = {n: split_rows(inputs[n], count) for n in ("q", "k", "v")}
        asked = {n: np.repeat(inputs[f"question_{n}"], count, axis=0) for n in split}
        read = step(ops["segments"], {n: np.concatenate([split[n], asked[n]], 2) for n in split})
        chosen = self._best(step, ops, read["o"][:, :, -int(self.len_question) :], inputs["head"])
        owner = (np.arange(batch)[:, None] * count + chosen).reshape(-1)
        again = {}
        for name, x in split.items():
            found = join_rows(x[owner], batch)
            again[name] = np.concatenate([found, inputs[f"question_{name}"]], axis=2)
        return step(ops["again"], again)

    def _best(self, step: Step, ops: dict[str, ProvedOp], o: Values, head: Values) -> Values:
        """Numbers [batch, kept] of the segments with the least entropy, o[pieces, heads, q, d]."""
        rows = o.swapaxes(1, 2).reshape(1, -1, head.shape[0])
        logits = step(ops["logits"], {"a": rows, "b": head[None]})["c"][0]
        entropies = step(ops["entropy"], {"x": logits})["y"].reshape(len(o), -1, 1)
        means = step(ops["mean"], {"x": entropies})["y"].reshape(int(self.batch), -1)
        return step(ops["top"], {"x": -means})["index"].astype(np.int64)
