"""The models that Lightning Attention's authors train, and one layer of each as its code runs it.

TransNormerLLM: heads of 128, SwiGLU-sized gated blocks, metaseq's vocabulary of 50,272. Layers,
widths and heads are those of table 1 of arXiv 2307.14995 (385M, 1B, 3B, 7B); the widths of the
feed-forward blocks follow from the parameters it states, each layer having 5 h^2 in the mixer (q,
k, v, gate, output) and 3 h f behind it. LLaMA of the same name: nothing is published, so layers,
width, heads and feed-forward are taken to be the same, with 4 h^2 in attention.

Matrix products and attention are kernels; what stands between them runs map by map, as eager
PyTorch does. A map is written with the bytes that it reads and writes for one element of its width:
bf16 2, fp32 4. The lists follow facebookresearch/llama (model.py: RMSNorm and rotation in fp32) and
OpenNLPLab's modeling_transnormer.py (SRMSNorm a Triton kernel, queries and keys activated, heads
copied to the front and back). Reductions to a number a row are left out of the writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from hwmodels.dtypes import BF16
from workloads.models.architecture import Attention, Mlp, TransformerConfig
from workloads.ops.elementwise import Elementwise
from workloads.ops.matmul import Matmul

VOCABULARY: Final = 50_272
LLAMA, TRANSNORMER = "llama", "transnormer"


class Map(NamedTuple):
    """A pointwise kernel: bytes read and written an element, over h elements a token, or f."""

    read: int
    written: int
    ffn: bool = False

    def op(self, model: TransformerConfig, tokens: int) -> Elementwise:
        """The kernel over all tokens, its traffic in bf16 arrays."""
        return self.over(tokens * (model.mlp.ffn_dim if self.ffn else model.hidden_dim))

    def over(self, num_elements: int) -> Elementwise:
        """The kernel over that many elements; what only reads counts one array as written."""
        arrays, outputs = (self.read + self.written) // 2, max(self.written // 2, 1)
        return Elementwise(
            num_elements=num_elements, num_inputs=arrays - outputs, num_outputs=outputs, dtype=BF16
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """An architecture's layer: the widths of its products, and its maps forward and backward."""

    mixer_outputs: int
    """Products of h x h whose input is the normed state: q, k, v and the gate."""
    forward: tuple[Map, ...]
    backward: tuple[Map, ...]


_RMS_NORM: Final = (
    Map(2, 4), Map(4, 4), Map(4, 0), Map(4, 4), Map(4, 2), Map(2, 2),
)  # fmt: skip
"""To fp32, square, mean, times rsqrt, to bf16, times the weight."""
_RMS_NORM_BACKWARD: Final = (
    Map(2, 2), Map(4, 2), Map(2, 0),  # times the weight; its gradient, summed over tokens
    Map(2, 4), Map(4, 4), Map(8, 4), Map(4, 0),  # to fp32; both factors, one summed over the row
    Map(0, 4), Map(4, 4), Map(4, 4), Map(8, 4), Map(8, 4),  # mean, square; both paths added
    Map(4, 2),
)  # fmt: skip
_ROTATION: Final = (Map(2, 4), Map(4, 4), Map(4, 2))
"""To fp32, product of complex numbers, to bf16; for queries or keys."""
_ADD: Final = (Map(4, 2),)
"""Also a gate's product, and a gradient that meets another."""

FAMILIES: Final[Mapping[str, Family]] = {
    LLAMA: Family(
        mixer_outputs=3,
        forward=(
            *2 * _RMS_NORM, *2 * _ROTATION, *2 * _ADD,
            Map(2, 2, ffn=True), Map(4, 2, ffn=True),  # silu, product
        ),
        backward=(
            *2 * _RMS_NORM_BACKWARD, *2 * _ROTATION,
            *3 * (Map(4, 2, ffn=True),),  # both sides of the product, silu
            *5 * _ADD,  # of q, k and v; of both halves; of two residuals
        ),
    ),
    TRANSNORMER: Family(
        mixer_outputs=4,
        forward=(
            *3 * (Map(2, 2),),  # SRMSNorm before both blocks and behind attention
            *6 * (Map(2, 2),),  # silu of q and k; copies of q, k, v and o
            *3 * _ADD,  # gate, two residuals
            Map(4, 2, ffn=True),  # product of both halves: SGLU has no activation
        ),
        backward=(
            *5 * (Map(4, 2),),  # three norms, two silu
            Map(8, 8), Map(2, 2),  # gradients of q, k, v, u side by side; the copy of dO
            *2 * _ADD, *2 * (Map(4, 2, ffn=True),),  # both sides of gate and product
            *3 * _ADD,  # of both halves; of two residuals
        ),
    ),
}  # fmt: skip
"""LLaMA and TransNormerLLM."""

_SIZES: Final[Mapping[str, tuple[int, int, int, int]]] = {
    "0.4b": (24, 1024, 8, 2816), "385m": (24, 1024, 8, 2816), "1b": (16, 2048, 16, 5632),
    "3b": (32, 2560, 20, 6912), "7b": (30, 4096, 32, 11008),
}  # fmt: skip
"""Layers, width, heads, width of the feed-forward block."""


def sized(name: str) -> TransformerConfig | None:
    """The sizes that a claim's model name stands for.

    >>> sized("1B").hidden_dim
    2048
    """
    if name.casefold() not in _SIZES:
        return None
    layers, hidden, heads, ffn = _SIZES[name.casefold()]
    attention = Attention(
        num_heads=heads, num_kv_heads=heads, head_dim=hidden // heads, rope_dim=hidden // heads
    )
    return TransformerConfig(
        name=name, family=LLAMA, hidden_dim=hidden, num_layers=layers, vocab_size=VOCABULARY,
        attention=attention, mlp=Mlp(ffn_dim=ffn, gated=True, activation="silu"),
        tied_embeddings=True,
    )  # fmt: skip


def parameters(model: TransformerConfig, family: str) -> int:
    """Matrices of all layers and the embedding, which is the head as well.

    >>> round(parameters(sized("1B"), TRANSNORMER) / 992_165_888, 3)
    1.0
    """
    h, f = model.hidden_dim, model.mlp.ffn_dim
    layer = (FAMILIES[family].mixer_outputs + 1) * h * h + 3 * h * f
    return model.num_layers * layer + model.vocab_size * h


def products(model: TransformerConfig, family: str, tokens: int) -> list[Matmul]:
    """The forward products of a layer: inputs of the mixer, its output, both halves, down."""
    h, f = model.hidden_dim, model.mlp.ffn_dim
    widths = ((h, FAMILIES[family].mixer_outputs * h), (h, h), (h, f), (h, f), (f, h))
    return [Matmul(m=tokens, n=n, k=k, dtype=BF16) for k, n in widths]


def gradients(product: Matmul) -> list[Matmul]:
    """dX = dY W^T and dW = X^T dY of Y = X W."""
    m, n, k = product.m, product.n, product.k
    return [Matmul(m=m, n=k, k=n, dtype=BF16), Matmul(m=k, n=n, k=m, dtype=BF16)]
