"""One transformer layer in training, where a system changes what is kept, moved or run again.

`SkeletalLayer` (MEMO, arXiv 2407.12117): of the s b tokens of a layer of hidden size h its backward
pass needs 16 b s h elements, the skeletal activations (section 3.1): input, first norm, Q, K, V,
attention's output, residual and second norm (1 each), the widened features before and after GELU
(4 each). Input and attention's output go to the host whole (2 b s h), of the other 14 b s h the
tokens of `swap_frac`; the rest is computed again, attention never. The copy to the host runs beside
the forward pass, the copy back beside the backward pass.

`ChunkwiseLayer` (SeCO and SpaCO, arXiv 2505.16710): the forward pass in chunks that keep keys and
values alone; then from the last chunk to the first its graph is made again and run backward with
the gradients that later chunks left at its keys and values. SpaCO does that for `backward_frac` of
the chunks, drawn at random. With F the forward pass and B the backward one,

    SeCO     F + F + B            SpaCO    F + backward_frac (F + B)

`frozen` weights (adapters are trained) need no gradient: B is then F for products. Adapters, norms'
row statistics and the loss are left out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Final

from hwmodels.dtypes import BF16, DType
from workloads.numeric import Num, ceil_div, minimum
from workloads.op import Stage
from workloads.ops.elementwise import add, gelu, gelu_backward
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.ops.host_copy import HostCopy
from workloads.ops.matmul import Matmul
from workloads.ops.norm import LayerNorm
from workloads.ops.norm_backward import LayerNormBackward
from workloads.ops.staged import StagedOp

FFN_MULTIPLE: Final = 4
SKELETAL_TENSORS: Final = 16
"""Elements per token and hidden unit that a layer's backward pass needs."""
WHOLE_TENSORS: Final = 2
"""Those of them that are always swapped: the layer's input and attention's output."""


@dataclass(frozen=True, kw_only=True)
class _TrainingLayer(StagedOp):
    """A GPT layer on one of `num_ranks` ranks that split heads and widened features."""

    batch: Num = 1
    len_seq: Num
    num_heads: Num
    head_dim: Num
    num_ranks: Num = 1
    dtype: DType = BF16

    @property
    def tokens(self) -> Num:
        """Tokens of all sequences."""
        return self.batch * self.len_seq

    @property
    def hidden(self) -> Num:
        """Hidden size."""
        return self.num_heads * self.head_dim

    @property
    def rows(self) -> Num:
        """Tokens of the norms and residuals, which split the sequence."""
        return ceil_div(self.tokens, self.num_ranks)

    @property
    def heads(self) -> Num:
        """Heads of one rank."""
        return ceil_div(self.num_heads, self.num_ranks)

    def weights(self) -> Num:
        """Elements of a rank's matrices: 12 h^2 of the layer."""
        width = self.heads * self.head_dim
        return self.hidden * width * (4 + 2 * FFN_MULTIPLE)

    def products(self, tokens: Num) -> Mapping[str, Matmul]:
        """The four matrix products of a forward pass over so many tokens."""
        h, width = self.hidden, self.heads * self.head_dim
        shapes = {
            "qkv": (3 * width, h),
            "out": (h, width),
            "up": (FFN_MULTIPLE * width, h),
            "down": (h, FFN_MULTIPLE * width),
        }
        return {
            name: Matmul(m=tokens, n=n, k=k, dtype=self.dtype) for name, (n, k) in shapes.items()
        }

    def maps(self, times: Num) -> tuple[Stage, ...]:
        """Norms, residuals and GELU of a forward pass, run so often."""
        h, rows = self.hidden, self.rows
        wide = self.tokens * FFN_MULTIPLE * self.heads * self.head_dim
        return (
            Stage("norm", LayerNorm(rows=rows, cols=h, dtype=self.dtype), 2 * times),
            Stage("residual", add(rows * h, self.dtype), 2 * times),
            Stage("gelu", gelu(wide, self.dtype), times),
        )

    def map_gradients(self, times: Num) -> tuple[Stage, ...]:
        """Their backward passes."""
        h, rows = self.hidden, self.rows
        wide = self.tokens * FFN_MULTIPLE * self.heads * self.head_dim
        return (
            Stage("norm_grad", LayerNormBackward(rows=rows, cols=h, dtype=self.dtype), 2 * times),
            Stage("residual_grad", add(rows * h, self.dtype), 2 * times),
            Stage("gelu_grad", gelu_backward(wide, self.dtype), times),
        )

    def attention_of(self, len_q: Num, len_kv: Num, *, causal: bool) -> FlashAttention2:
        """A rank's heads, so many queries over so many keys."""
        return FlashAttention2(
            batch=self.batch, num_heads=self.heads, len_q=len_q, len_kv=len_kv,
            head_dim=self.head_dim, causal=causal, dtype=self.dtype,
        )  # fmt: skip

    def compulsory_bytes(self) -> Num:
        """Weights once, the hidden states in and out."""
        return (self.weights() + 2 * self.rows * self.hidden) * self.dtype.bytes_per_element

    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """The kernels in the order they run."""


def _gradients(op: Matmul) -> tuple[Matmul, Matmul]:
    """Of the input and of the weights: the same product turned."""
    return op.over(n=op.k, k=op.n), op.over(m=op.k, k=op.m)


def _attention_gradient(op: FlashAttention2) -> FlashAttention2Backward:
    return FlashAttention2Backward(
        batch=op.batch, num_heads=op.num_heads, len_q=op.len_q, len_kv=op.len_kv,
        head_dim=op.head_dim, causal=op.causal, dtype=op.dtype,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SkeletalLayer(_TrainingLayer):
    """One layer of MEMO, forward or `backward`; 1 - `swap_frac` of the tokens computed again.

    >>> op = SkeletalLayer(len_seq=2**20, num_heads=32, head_dim=128, num_ranks=8)
    >>> op.skeletal_bytes() * 8 * 32 / 2**30
    4096.0
    """

    name: ClassVar[str] = "skeletal_layer"
    swap_frac: Num = 1.0
    backward: bool = False

    def skeletal_bytes(self) -> Num:
        """What the backward pass needs of the forward pass, on one rank: 16 b s h / ranks."""
        elements = SKELETAL_TENSORS * self.tokens * self.hidden
        return elements * self.dtype.bytes_per_element / self.num_ranks

    def whole_bytes(self) -> Num:
        """Its part that is always swapped: input and attention's output."""
        return self.skeletal_bytes() * WHOLE_TENSORS / SKELETAL_TENSORS

    def swapped_bytes(self) -> Num:
        """What goes to the host and comes back."""
        return self.whole_bytes() + self.swap_frac * (self.skeletal_bytes() - self.whole_bytes())

    def attention(self) -> FlashAttention2:
        """A rank's heads over the whole sequence."""
        return self.attention_of(self.len_seq, self.len_seq, causal=True)

    def stages(self) -> tuple[Stage, ...]:
        """Kernels of the pass, the copy beside them."""
        copy = HostCopy(num_bytes=ceil_div(self.swapped_bytes(), 1), to_host=not self.backward)
        products = self.products(self.tokens)
        if not self.backward:
            return (
                *(Stage(name, op) for name, op in products.items()),
                Stage("attention", self.attention()),
                *self.maps(1),
                Stage("swap_out", copy, beside=True),
            )
        again = 1 - self.swap_frac
        redone = [Stage(f"{name}_again", op, again) for name, op in products.items()]
        grads = [
            Stage(f"{name}_{of}", op)
            for name, forward in products.items()
            for of, op in zip(("grad", "weight_grad"), _gradients(forward), strict=True)
        ]
        return (
            *redone[:-1],  # the last product's output is needed by nothing
            *self.maps(again),
            *grads,
            Stage("attention_grad", _attention_gradient(self.attention())),
            *self.map_gradients(1),
            Stage("swap_in", copy, beside=True),
        )


@dataclass(frozen=True, kw_only=True)
class ChunkwiseLayer(_TrainingLayer):
    """One layer of SeCO (`backward_frac` 1) or SpaCO over a sequence in chunks.

    >>> op = ChunkwiseLayer(len_seq=16384, num_heads=32, head_dim=128, chunk=512)
    >>> op.num_chunks(), op.kept_bytes() == 2 * 2 * 16384 * 4096 * 2
    (32, True)
    """

    name: ClassVar[str] = "chunkwise_layer"
    tunable: ClassVar[Mapping[str, tuple[int, ...]]] = MappingProxyType(
        {"chunk": (512, 1024, 2048, 4096)}
    )
    chunk: Num = 512
    backward_frac: Num = 1.0
    frozen: bool = True

    def piece(self) -> Num:
        """Tokens of a chunk."""
        return minimum(self.chunk, self.len_seq)

    def num_chunks(self) -> Num:
        """Chunks of a sequence."""
        return ceil_div(self.len_seq, self.piece())

    def kept_bytes(self) -> Num:
        """Keys and values of the whole sequence, and the gradients that later chunks add up."""
        width = self.heads * self.head_dim
        return 2 * 2 * self.tokens * width * self.dtype.bytes_per_element

    def mean_keys(self) -> Num:
        """Keys a query sees on average: those of the chunks before, and half of its own."""
        return ceil_div((self.num_chunks() - 1) * self.piece() + self.piece() + 1, 2)

    def attention(self) -> FlashAttention2:
        """A chunk's queries over the keys they see on average."""
        return self.attention_of(self.piece(), self.mean_keys(), causal=False)

    def stages(self) -> tuple[Stage, ...]:
        """Forward over all chunks, then forward and backward over the share that is run back."""
        chunks, back = self.num_chunks(), self.num_chunks() * self.backward_frac
        products = self.products(self.batch * self.piece())
        turned = [
            Stage(f"{name}_{of}", op, back)
            for name, forward in products.items()
            for of, op in zip(("grad", "weight_grad"), _gradients(forward), strict=True)
            if of == "grad" or not self.frozen
        ]
        return (
            *(Stage(name, op, chunks) for name, op in products.items()),
            Stage("attention", self.attention(), chunks),
            *self.maps(1),
            *(Stage(f"{name}_again", op, back) for name, op in products.items()),
            Stage("attention_again", self.attention(), back),
            *self.maps(self.backward_frac),
            *turned,
            Stage("attention_grad", _attention_gradient(self.attention()), back),
            *self.map_gradients(self.backward_frac),
        )
