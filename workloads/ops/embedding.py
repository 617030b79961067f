"""Table lookup and its gradient: rows gathered by token, gradients added back by token.

Every token moves its own row, though another token may have moved the same one just before: how
often rows repeat depends on the text. The compulsory traffic assumes that no row repeats before
the table is used up, min(num_tokens, vocab_size) distinct rows. Identifiers are int32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, FP32, INT32, DType
from workloads.machine import Machine, slices
from workloads.numeric import Num, floor, maximum, minimum
from workloads.op import Arrays, ProvedOp, require_fit
from workloads.ops.streamed import Lanes
from workloads.work import Work

ID_BYTES = INT32.bytes_per_element


@dataclass(frozen=True, kw_only=True)
class Embedding(ProvedOp):
    """y[t] = table[id[t]] for `num_tokens` identifiers and a table [vocab_size, dim].

    Reads 4 + dim e bytes and writes dim e bytes per token; no flops.

    >>> op = Embedding(num_tokens=8192, vocab_size=128_256, dim=4096)
    >>> op.work(2**20).bytes == 8192 * (4 + 2 * 4096 * 2)
    True
    """

    name: ClassVar[str] = "embedding"
    num_tokens: Num
    vocab_size: Num
    dim: Num
    dtype: DType = BF16

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Tokens per `block` and columns per `chunk`; one row at least, or part of one."""
        e = self.dtype.bytes_per_element
        require_fit(self.name, fast_bytes, ID_BYTES + e, "an identifier and an element")
        chunk = minimum(self.dim, maximum(floor((fast_bytes - ID_BYTES) / e), 1))
        block = maximum(floor(fast_bytes / (ID_BYTES + chunk * e)), 1)
        return {"block": minimum(self.num_tokens, block), "chunk": chunk}

    def work(self, fast_bytes: Num) -> Work:
        """Identifiers and one row per token in, one row per token out."""
        self.tiling(fast_bytes)
        size = self.num_tokens * self.dim * self.dtype.bytes_per_element
        return Work(read_bytes=self.num_tokens * ID_BYTES + size, write_bytes=size)

    def min_flops(self) -> Mapping[DType, Num]:
        """No matrix products."""
        return {}

    def compulsory_bytes(self) -> Num:
        """Identifiers, the distinct rows that must come in at most once, and the output."""
        rows = minimum(self.num_tokens, self.vocab_size) + self.num_tokens
        return self.num_tokens * ID_BYTES + rows * self.dim * self.dtype.bytes_per_element

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """table[vocab_size, dim] and ids[num_tokens]."""
        return {
            "table": rng.standard_normal((int(self.vocab_size), int(self.dim))),
            "ids": _ids(rng, self.num_tokens, self.vocab_size),
        }

    def reference(self, inputs: Arrays) -> Arrays:
        """The product of a one-hot matrix with the table."""
        one_hot = inputs["ids"][:, None] == np.arange(int(self.vocab_size))
        return {"y": one_hot @ inputs["table"]}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Blocks of tokens: their identifiers, then their rows chunk by chunk."""
        table = machine.place(inputs["table"], self.dtype)
        ids = machine.place(inputs["ids"], INT32)
        y = machine.empty((int(self.num_tokens), int(self.dim)), self.dtype)
        tiles = {key: int(v) for key, v in self.tiling(machine.fast_bytes).items()}
        with machine.kernel():
            for tokens in slices(int(self.num_tokens), tiles["block"]):
                with machine.scope():
                    wanted = machine.load(ids, tokens).values.astype(int)
                    for cols in slices(int(self.dim), tiles["chunk"]):
                        with machine.scope():
                            machine.store(machine.load(table, (wanted, cols)), y, (tokens, cols))
        return {"y": y.values}


@dataclass(frozen=True, kw_only=True)
class EmbeddingBackward(ProvedOp):
    """grad[id[t]] += dy[t]: gradients of the table, added token by token in `grad_dtype`.

    Adds to a gradient that exists (main gradients accumulate over micro-batches): clearing it is
    the caller's. Each token reads its identifier and dy row, and reads, adds to and writes back
    its table row. Ignored: sorting by identifier, which would touch each distinct row once.

    >>> op = EmbeddingBackward(num_tokens=8192, vocab_size=128_256, dim=4096)
    >>> op.work(2**20).bytes == 8192 * (4 + 4096 * (2 + 4 + 4))
    True
    """

    name: ClassVar[str] = "embedding_backward"
    num_tokens: Num
    vocab_size: Num
    dim: Num
    dtype: DType = BF16
    grad_dtype: DType = FP32

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Columns per `chunk` of one token's rows; tokens go one at a time."""
        per_column_bytes = self.dtype.bytes_per_element + self.grad_dtype.bytes_per_element
        needed_bytes = ID_BYTES + per_column_bytes
        require_fit(self.name, fast_bytes, needed_bytes, "an identifier and two elements")
        chunk = maximum(floor((fast_bytes - ID_BYTES) / per_column_bytes), 1)
        return {"chunk": minimum(self.dim, chunk)}

    def work(self, fast_bytes: Num) -> Work:
        """One addition per element; the table row of each token in and out."""
        self.tiling(fast_bytes)
        elements = self.num_tokens * self.dim
        grad_bytes = elements * self.grad_dtype.bytes_per_element
        dy_bytes = elements * self.dtype.bytes_per_element
        return Work(
            vector_flops=elements,
            read_bytes=self.num_tokens * ID_BYTES + dy_bytes + grad_bytes,
            write_bytes=grad_bytes,
        )

    def min_flops(self) -> Mapping[DType, Num]:
        """No matrix products."""
        return {}

    def compulsory_bytes(self) -> Num:
        """Identifiers and dy, and the distinct rows in and out."""
        rows = minimum(self.num_tokens, self.vocab_size)
        rows_bytes = 2 * rows * self.dim * self.grad_dtype.bytes_per_element
        dy_bytes = self.num_tokens * self.dim * self.dtype.bytes_per_element
        return self.num_tokens * ID_BYTES + dy_bytes + rows_bytes

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """grad[vocab_size, dim], dy[num_tokens, dim] and ids[num_tokens]."""
        vocab, tokens, dim = (int(v) for v in (self.vocab_size, self.num_tokens, self.dim))
        return {
            "grad": rng.standard_normal((vocab, dim)),
            "dy": rng.standard_normal((tokens, dim)),
            "ids": _ids(rng, tokens, vocab),
        }

    def reference(self, inputs: Arrays) -> Arrays:
        """The transposed one-hot matrix times dy."""
        one_hot = np.arange(int(self.vocab_size))[:, None] == inputs["ids"]
        return {"grad": inputs["grad"] + one_hot @ inputs["dy"]}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """Token by token, so that two tokens of one row add up."""
        grad = machine.place(inputs["grad"].copy(), self.grad_dtype)
        dy = machine.place(inputs["dy"], self.dtype)
        ids = machine.place(inputs["ids"], INT32)
        chunk = int(self.tiling(machine.fast_bytes)["chunk"])
        with machine.kernel():
            for token in range(int(self.num_tokens)):
                with machine.scope():
                    row = int(machine.load(ids, token).values)
                    for cols in slices(int(self.dim), chunk):
                        with machine.scope():
                            held = machine.load(grad, (row, cols))
                            added = Lanes(machine, machine.load(dy, (token, cols)).values)
                            total = Lanes(machine, held.values) + added
                            machine.store(total.into(held), grad, (row, cols))
        return {"grad": grad.values}


def _ids(rng: np.random.Generator, num_tokens: Num, vocab_size: Num) -> np.ndarray:
    """Random identifiers, as float64 like every input."""
    return rng.integers(0, int(vocab_size), int(num_tokens)).astype(np.float64)
