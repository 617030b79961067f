"""What readers of configs share: attention, a gated block, a model with RMSNorm and rotation."""

from __future__ import annotations

from typing import Final

from workloads.models.architecture import AnyAttention, Attention, Mlp, Moe, TransformerConfig
from workloads.models.keys import Keys

ACTIVATIONS: Final = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu": "relu",
}
"""Activation names of configs, and the one of three counts each stands for."""

MAX_LAYERS: Final = 10**5


def attention_of(
    keys: Keys,
    *,
    num_kv_heads: int | None = None,
    num_heads: int | None = None,
    head_dim: int | None = None,
    qkv_bias: bool | None = None,
    qk_norm: bool = False,
) -> Attention:
    """Grouped attention from the usual keys; the arguments are the family's defaults."""
    heads = keys.size("num_attention_heads", num_heads)
    kv = keys.size("num_key_value_heads", num_kv_heads or heads)
    if heads % kv:
        problem = f"is {kv}, which does not divide num_attention_heads = {heads}"
        keys.fail("num_key_value_heads", problem, f"give a divisor of {heads}")
    width = head_dim_of(keys, "hidden_size", "num_attention_heads", heads, head_dim)
    bias = keys.flag("attention_bias", False)
    return Attention(
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=width,
        rope_dim=max(2 * int(width * keys.fraction("partial_rotary_factor", 1.0) / 2), 2),
        qkv_bias=bias if qkv_bias is None else qkv_bias,
        out_bias=bias,
        qk_norm=qk_norm,
    )


def head_dim_of(
    keys: Keys, hidden_key: str, heads_key: str, heads: int, default: int | None
) -> int:
    """`head_dim`, else the family's default, else the hidden size over the heads."""
    if default is not None or keys.has("head_dim"):
        return keys.size("head_dim", default)
    hidden = keys.size(hidden_key)
    if hidden % heads:
        problem = f"is {hidden}, which {heads_key} = {heads} does not divide"
        keys.fail(hidden_key, problem, "mend one of them or add head_dim")
    return hidden // heads


def num_layers_of(keys: Keys, key: str = "num_hidden_layers") -> int:
    """Layers of the model."""
    return keys.size(key, most=MAX_LAYERS)


def gated_of(keys: Keys, *keys_of_activation: str, default: str = "silu") -> Mlp:
    """A gated block; the first activation key that is present counts."""
    present = [k for k in keys_of_activation if keys.has(k)]
    return Mlp(
        ffn_dim=keys.size("intermediate_size"),
        gated=True,
        activation=keys.choice(present[0] if present else "hidden_act", default, ACTIVATIONS),
        bias=keys.flag("mlp_bias", False),
    )


def build(
    keys: Keys,
    name: str,
    *,
    attention: AnyAttention,
    mlp: Mlp | None = None,
    moe: Moe | None = None,
    tied: bool = False,
    norms_per_layer: int = 2,
    vocab_size: int | None = None,
    window: tuple[int | None, int] = (None, 0),
) -> TransformerConfig:
    """What the families with RMSNorm and rotary positions have in common."""
    width, num_windowed = window
    return TransformerConfig(
        name=name,
        family=keys.text("model_type", "?"),
        hidden_dim=keys.size("hidden_size"),
        num_layers=num_layers_of(keys),
        vocab_size=keys.size("vocab_size", vocab_size),
        attention=attention,
        mlp=mlp or gated_of(keys),
        moe=moe,
        norms_per_layer=norms_per_layer,
        tied_embeddings=keys.flag("tie_word_embeddings", tied),
        window=width if num_windowed else None,
        num_windowed_layers=num_windowed if width else 0,
    )
