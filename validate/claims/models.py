"""The transformers that claims name: sizes from their published configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from validate.claims.claim import not_modelled
from workloads.models.architecture import LAYER_NORM, Attention, Mlp, TransformerConfig


def _llama(
    name: str, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int = 32000
) -> TransformerConfig:
    """RMSNorm, gated SiLU, rotary positions, no bias."""
    attention = Attention(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=hidden // heads, rope_dim=hidden // heads
    )
    return TransformerConfig(
        name=name, family="llama", hidden_dim=hidden, num_layers=layers, vocab_size=vocab,
        attention=attention, mlp=Mlp(ffn_dim=ffn, gated=True, activation="silu"),
    )  # fmt: skip


def _gpt(
    name: str, layers: int, hidden: int, heads: int, vocab: int = 50272, positions: int = 2048
) -> TransformerConfig:
    """LayerNorm, two-matrix feed-forward of four times the width, biases, learned positions."""
    attention = Attention(
        num_heads=heads, num_kv_heads=heads, head_dim=hidden // heads, qkv_bias=True, out_bias=True
    )
    return TransformerConfig(
        name=name, family="gpt", hidden_dim=hidden, num_layers=layers, vocab_size=vocab,
        attention=attention, norm=LAYER_NORM, tied_embeddings=True, num_positions=positions,
        mlp=Mlp(ffn_dim=4 * hidden, gated=False, activation="gelu", bias=True),
    )  # fmt: skip


_LLAMA_7B = _llama("llama-7b", 32, 4096, 32, 32, 11008)
_LLAMA_13B = _llama("llama-13b", 40, 5120, 40, 40, 13824)
_LLAMA3_8B = _llama("llama-3-8b", 32, 4096, 32, 8, 14336, 128256)

MODELS: Final[Mapping[str, TransformerConfig]] = {
    # meta-llama, lmsys and codellama configs on huggingface.co
    "llama-2-7b": _LLAMA_7B, "llama2-7b": _LLAMA_7B, "vicuna-7b": _LLAMA_7B, "llama-7b": _LLAMA_7B,
    "llama-2-7b-32k": _LLAMA_7B,  # togethercomputer: longer positions, same sizes
    "llama-2-13b": _LLAMA_13B, "llama2-13b": _LLAMA_13B, "vicuna-13b": _LLAMA_13B,
    "llava-1.5-7b": _LLAMA_7B,  # its language model is Vicuna-7B
    "codellama-7b": _LLAMA_7B, "codellama-13b": _LLAMA_13B,
    "codellama-34b": _llama("codellama-34b", 48, 8192, 64, 8, 22016),
    "llama-2-70b": _llama("llama-2-70b", 80, 8192, 64, 8, 28672),
    "llama-3-8b-1m": _LLAMA3_8B, "llama-3.1-8b": _LLAMA3_8B, "llama-3-8b": _LLAMA3_8B,
    # THUDM/glm-4-9b-chat-1m: 4 groups of multi-query attention, ffn 13696
    "glm-4-9b-1m": _llama("glm-4-9b-1m", 40, 4096, 32, 4, 13696, 151552),
    # 01-ai/Yi-9B-200K: depth-upscaled Yi-6B
    "yi-9b-200k": _llama("yi-9b-200k", 48, 4096, 32, 4, 11008, 64000),
    "mistral-7b": _llama("mistral-7b", 32, 4096, 32, 8, 14336),
    # Qwen/Qwen2-7B (its query, key and value biases left out)
    "qwen2-7b": _llama("qwen2-7b", 28, 3584, 28, 4, 18944, 152064),
    # princeton-nlp/Sheared-LLaMA-1.3B; TinyLlama/TinyLlama-1.1B
    "sheared-llama-1.3b": _llama("sheared-llama-1.3b", 24, 2048, 16, 16, 5504),
    "tinyllama-1.1b": _llama("tinyllama-1.1b", 22, 2048, 32, 4, 5632),
    # facebook/opt configs
    "opt-6.7b": _gpt("opt-6.7b", 32, 4096, 32), "opt-30b": _gpt("opt-30b", 48, 7168, 56),
    # Brown et al. 2020 (arXiv 2005.14165), table 2.1
    "gpt3-1.3b": _gpt("gpt3-1.3b", 24, 2048, 16, 50304),
    "gpt3-2.7b": _gpt("gpt3-2.7b", 32, 2560, 32, 50304),
    "gpt-neo-1.3b": _gpt("gpt-neo-1.3b", 24, 2048, 16, 50257),
}  # fmt: skip


def model_named(text: str) -> TransformerConfig:
    """The model a claim names.

    >>> model_named("Vicuna-7B").num_layers
    32
    """
    name = text.split("(")[0].strip().casefold().replace(" ", "-")
    if name not in MODELS:
        not_modelled(f"setting unclear: no sizes are known of the model '{text}'")
    return MODELS[name]
