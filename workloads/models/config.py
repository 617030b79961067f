"""Decoder-only models as data, read from the `config.json` of Hugging Face transformers.

`load_hf_config(path)` keeps the figures that decide counts: sizes, heads, experts, biases, norms,
windows. What changes no count is dropped (rope base and scaling, epsilons, soft caps, initial
values, token ids). A key that its configuration class may leave out takes that class's default:

    all families         num_key_value_heads = num_attention_heads, head_dim = hidden_size /
                         num_attention_heads, biases false, tie_word_embeddings false
    llama                layer_types: entries 'linear_attention' are counted (none)
    mistral, mixtral     num_key_value_heads 8; mistral: sliding_window 4096 on every layer
    qwen2, qwen3         num_key_value_heads 32; q, k, v biased (qwen2), head_dim 128 (qwen3); no
                         window unless use_sliding_window, then from layer max_window_layers on
    qwen3_moe            num_key_value_heads 4, decoder_sparse_step 1, mlp_only_layers []
    gemma, gemma2        num_key_value_heads 16 (gemma2: 4), head_dim 256, tied; gemma2: window
                         4096 on every second layer
    gemma3(_text)        tied, vocabulary 262208, 8 heads of 256, 4 of them K/V, window 4096 on five
                         layers of six; the text part of a vision model is taken from text_config
    gpt2                 n_inner = 4 n_embd, 1024 positions, tied
    opt                  word_embed_proj_dim = hidden_size, biased, pre-norm, tied
    deepseek_v2, _v3     q_lora_rank 1536 (null: one full-rank projection), moe_layer_freq 1

Stacks with scans or convolutions are `hybrid_configs`'s: mamba, falcon_mamba, mamba2, bamba, jamba,
qwen3_next, lfm2.

Multi-token-prediction modules (DeepSeek-V3) and vision towers are not part of what is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from hwmodels.errors import InputError, SpecError, UnknownNameError
from workloads.models.architecture import (
    LAYER_NORM,
    Attention,
    LatentAttention,
    Mlp,
    Moe,
    TransformerConfig,
)
from workloads.models.config_parts import (
    ACTIVATIONS,
    attention_of,
    build,
    gated_of,
    head_dim_of,
    num_layers_of,
)
from workloads.models.hybrid_configs import HYBRIDS
from workloads.models.keys import Keys, read_object

__all__ = [
    "ACTIVATIONS",
    "FAMILIES",
    "Attention",
    "LatentAttention",
    "Mlp",
    "Moe",
    "TransformerConfig",
    "load_hf_config",
    "load_model",
]


def load_model(path: str | Path) -> TransformerConfig:
    """The config at a path; a missing one is answered with the files that lie beside it."""
    place = Path(path)
    if not place.exists():
        beside = sorted(str(p) for p in _folder(place).glob("*.json"))
        raise UnknownNameError(
            "model config",
            str(path),
            beside,
            hint="give the path of a Hugging Face config.json, such as examples/llama3-8b.json",
        )
    return load_hf_config(place)


def _folder(place: Path) -> Path:
    return place.parent if place.parent.is_dir() else Path()


def load_hf_config(path: str | Path) -> TransformerConfig:
    """Read one `config.json`; raises a one-line `InputError` naming file, key and mend."""
    file = Path(path)
    keys = Keys(str(file), read_object(file))
    family = keys.text("model_type")
    if family not in FAMILIES:
        raise UnknownNameError(
            f"model_type in {file}:", family, FAMILIES, hint=f"known: {', '.join(FAMILIES)}"
        )
    name = file.parent.name if file.stem == "config" and file.parent.name else file.stem
    try:
        return FAMILIES[family](keys, name)
    except SpecError:
        raise
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _windowed(keys: Keys, default_layers: int) -> int:
    """Layers with a sliding window: counted in `layer_types` where given."""
    kinds = keys.items("layer_types")
    return kinds.count("sliding_attention") if kinds else default_layers


def _llama(keys: Keys, name: str) -> TransformerConfig:
    linear = keys.items("layer_types").count("linear_attention")
    whole = build(keys, name, attention=attention_of(keys))
    if linear > whole.num_layers:
        keys.fail("layer_types", f"has {linear} linear layers of {whole.num_layers}", "mend it")
    return replace(whole, num_linear_layers=linear)


def _phi3(keys: Keys, name: str) -> TransformerConfig:
    window = keys.size("sliding_window") if keys.has("sliding_window") else None
    layers = num_layers_of(keys)
    return build(keys, name, attention=attention_of(keys), window=(window, layers))


def _mistral(keys: Keys, name: str) -> TransformerConfig:
    # Later checkpoints switch the window off with an explicit null; only absence means 4096.
    off = "sliding_window" in keys.values and not keys.has("sliding_window")
    window = None if off else keys.size("sliding_window", 4096)
    attention = attention_of(keys, num_kv_heads=8)
    return build(keys, name, attention=attention, window=(window, num_layers_of(keys)))


def _mixtral(keys: Keys, name: str) -> TransformerConfig:
    layers = num_layers_of(keys)
    window = keys.size("sliding_window") if keys.has("sliding_window") else None
    moe = Moe(
        num_experts=keys.size("num_local_experts", 8),
        num_active=keys.size("num_experts_per_tok", 2),
        expert_ffn_dim=keys.size("intermediate_size"),
        layers=tuple(range(layers)),
    )
    attention = attention_of(keys, num_kv_heads=8)
    return build(keys, name, attention=attention, moe=moe, window=(window, layers))


def _qwen_window(keys: Keys) -> tuple[int | None, int]:
    if not keys.flag("use_sliding_window", False):
        return None, 0
    layers = num_layers_of(keys)
    first = keys.size("max_window_layers", 28, least=0)
    return keys.size("sliding_window", 4096), _windowed(keys, max(layers - first, 0))


def _qwen2(keys: Keys, name: str) -> TransformerConfig:
    attention = attention_of(keys, num_kv_heads=32, qkv_bias=True)
    return build(keys, name, attention=attention, window=_qwen_window(keys))


def _qwen3(keys: Keys, name: str) -> TransformerConfig:
    attention = attention_of(keys, num_kv_heads=32, head_dim=128, qk_norm=True)
    return build(keys, name, attention=attention, window=_qwen_window(keys))


def _qwen3_moe(keys: Keys, name: str) -> TransformerConfig:
    step, dense = keys.size("decoder_sparse_step", 1), keys.items("mlp_only_layers")
    moe = Moe(
        num_experts=keys.size("num_experts"),
        num_active=keys.size("num_experts_per_tok"),
        expert_ffn_dim=keys.size("moe_intermediate_size"),
        layers=tuple(
            i for i in range(num_layers_of(keys)) if (i + 1) % step == 0 and i not in dense
        ),
    )
    attention = attention_of(keys, num_kv_heads=4, qk_norm=True)
    return build(keys, name, attention=attention, moe=moe, window=_qwen_window(keys))


def _gemma(keys: Keys, name: str) -> TransformerConfig:
    attention = attention_of(keys, num_kv_heads=16, head_dim=256)
    mlp = gated_of(keys, "hidden_activation", "hidden_act", default="gelu_pytorch_tanh")
    return build(keys, name, attention=attention, mlp=mlp, tied=True)


def _gemma2(keys: Keys, name: str) -> TransformerConfig:
    windowed = _windowed(keys, -(-num_layers_of(keys) // 2))
    return build(
        keys,
        name,
        attention=attention_of(keys, num_kv_heads=4, head_dim=256),
        mlp=gated_of(keys, "hidden_activation", "hidden_act", default="gelu_pytorch_tanh"),
        tied=True,
        norms_per_layer=4,
        window=(keys.size("sliding_window", 4096), windowed),
    )


def _gemma3_text(keys: Keys, name: str) -> TransformerConfig:
    layers = num_layers_of(keys)
    windowed = _windowed(keys, layers - layers // keys.size("sliding_window_pattern", 6))
    return build(
        keys,
        name,
        attention=attention_of(keys, num_heads=8, num_kv_heads=4, head_dim=256, qk_norm=True),
        mlp=gated_of(keys, "hidden_activation", default="gelu_pytorch_tanh"),
        tied=True,
        norms_per_layer=4,
        vocab_size=262_208,
        window=(keys.size("sliding_window", 4096), windowed),
    )


def _gemma3(keys: Keys, name: str) -> TransformerConfig:
    return _gemma3_text(keys.child("text_config") if keys.has("text_config") else keys, name)


def _gpt2(keys: Keys, name: str) -> TransformerConfig:
    hidden, heads = keys.size("n_embd"), keys.size("n_head")
    width = head_dim_of(keys, "n_embd", "n_head", heads, None)
    attention = Attention(
        num_heads=heads, num_kv_heads=heads, head_dim=width, qkv_bias=True, out_bias=True
    )
    return TransformerConfig(
        name=name,
        family="gpt2",
        hidden_dim=hidden,
        num_layers=num_layers_of(keys, "n_layer"),
        vocab_size=keys.size("vocab_size"),
        attention=attention,
        mlp=Mlp(
            ffn_dim=keys.size("n_inner", 4 * hidden),
            gated=False,
            activation=keys.choice("activation_function", "gelu_new", ACTIVATIONS),
            bias=True,
        ),
        norm=LAYER_NORM,
        tied_embeddings=keys.flag("tie_word_embeddings", True),
        num_positions=keys.size("n_positions", 1024),
    )


OPT_POSITION_OFFSET: Final = 2
"""Rows of OPT's position table in front of the first position."""


def _opt(keys: Keys, name: str) -> TransformerConfig:
    hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    bias = keys.flag("enable_bias", True)
    width = head_dim_of(keys, "hidden_size", "num_attention_heads", heads, None)
    pre_norm = keys.flag("do_layer_norm_before", True)
    return TransformerConfig(
        name=name,
        family="opt",
        hidden_dim=hidden,
        num_layers=num_layers_of(keys),
        vocab_size=keys.size("vocab_size"),
        attention=Attention(
            num_heads=heads, num_kv_heads=heads, head_dim=width, qkv_bias=bias, out_bias=bias
        ),
        mlp=Mlp(
            ffn_dim=keys.size("ffn_dim"),
            gated=False,
            activation=keys.choice("activation_function", "relu", ACTIVATIONS),
            bias=bias,
        ),
        norm=LAYER_NORM,
        final_norm=pre_norm and not keys.flag("_remove_final_layer_norm", False),
        tied_embeddings=keys.flag("tie_word_embeddings", True),
        num_positions=keys.size("max_position_embeddings", 2048) + OPT_POSITION_OFFSET,
        embedding_dim=keys.size("word_embed_proj_dim", hidden),
    )


def _deepseek(keys: Keys, name: str) -> TransformerConfig:
    absent = "q_lora_rank" in keys.values and not keys.has("q_lora_rank")
    attention = LatentAttention(
        num_heads=keys.size("num_attention_heads"),
        q_lora_rank=None if absent else keys.size("q_lora_rank", 1536),
        kv_lora_rank=keys.size("kv_lora_rank"),
        qk_nope_head_dim=keys.size("qk_nope_head_dim"),
        qk_rope_head_dim=keys.size("qk_rope_head_dim"),
        v_head_dim=keys.size("v_head_dim"),
        bias=keys.flag("attention_bias", False),
    )
    first, step = keys.size("first_k_dense_replace", least=0), keys.size("moe_layer_freq", 1)
    width, shared = keys.size("moe_intermediate_size"), keys.size("n_shared_experts", 0, least=0)
    moe = Moe(
        num_experts=keys.size("n_routed_experts"),
        num_active=keys.size("num_experts_per_tok"),
        expert_ffn_dim=width,
        layers=tuple(i for i in range(num_layers_of(keys)) if i >= first and i % step == 0),
        num_shared_experts=shared,
        shared_ffn_dim=shared * width,
        router_bias=keys.text("model_type") == "deepseek_v3",
    )
    return build(keys, name, attention=attention, moe=moe)


FAMILIES: Final[Mapping[str, Callable[[Keys, str], TransformerConfig]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3_text": _gemma3_text,
    "gpt2": _gpt2,
    "opt": _opt,
    "phi3": _phi3,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    **HYBRIDS,
}
"""Readers by `model_type`."""
