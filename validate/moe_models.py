"""A published mixture-of-experts model as a config: what its row states, and what its name says.

Rows state sizes. What they leave unsaid comes by the model's name from the configuration that its
authors publish (`validate.serving_rows.MODELS`: ranks of latent attention, windows, norms of
heads), and here what training adds: DeepSeek-V3 trains one module of multi-token prediction and
opens four of eight groups of experts to a token (arXiv 2412.19437, sections 2.2 and 4.2). A row of
it whose name says "w/o MTP" leaves the module out; that the others have it shows in their flops per
token, 260 GF beside 249 (ours: 260.6 and 250.4). "tokendrop" rows give every expert its mean share
of rows and no more (Megatron-Bridge, `apply_moe_token_drop`: capacity factor 1, padded).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from hwmodels.errors import InputError
from hwmodels.frozen import FrozenDict
from validate.adapters.part import Uncounted
from validate.serving_rows import MODELS, Facts
from workloads.models.architecture import (
    AnyAttention,
    Attention,
    LatentAttention,
    Mlp,
    Moe,
    TransformerConfig,
)

QWEN_30B, QWEN_235B, DEEPSEEK, GPT_OSS = "qwen3-30b", "qwen3-235b", "deepseek-v3", "gpt-oss"
FAMILIES: Final[Mapping[str, str]] = FrozenDict(
    {QWEN_30B: "qwen3", QWEN_235B: "qwen3", DEEPSEEK: "deepseek-v3", GPT_OSS: "gpt-oss"}
)
"""Models by name, and under which name their published configuration stands."""
TOKEN_DROP: Final = "tokendrop"
WITHOUT_MTP: Final = "w/o mtp"
CAPACITY_FACTOR: Final = 1.0
NUM_GROUPS, NUM_OPEN = 8, 4
MAX_SIZE: Final = 2**31


def model_of(model: Mapping[str, Any]) -> str:
    """The model's name among `FAMILIES`; raises `Uncounted` for others.

    >>> model_of({"name": "GPT OSS 120B"}), model_of({"name": "DeepSeekV3 (w/o MTP)"})
    ('gpt-oss', 'deepseek-v3')
    """
    said = "".join(c for c in str(model.get("name")).lower() if c.isalnum())
    for name in FAMILIES:
        if said.startswith("".join(c for c in name if c.isalnum())):
            return name
    raise Uncounted(f"what {model.get('name')!s:.60} computes is not known beyond its sizes")


def drops_tokens(model: Mapping[str, Any]) -> bool:
    """Does the row's name say that tokens beyond a capacity are dropped?"""
    return TOKEN_DROP in str(model.get("name")).lower()


def moe_transformer(model: Mapping[str, Any]) -> TransformerConfig:
    """The config of a row's model; raises `Uncounted` where a size is missing."""
    name = model_of(model)
    facts, layers = MODELS[FAMILIES[name]], _size(model, "layers")
    with_mtp = name == DEEPSEEK and WITHOUT_MTP not in str(model["name"]).lower()
    try:
        return TransformerConfig(
            name=name,
            family="llama",
            hidden_dim=_size(model, "hidden"),
            num_layers=layers,
            vocab_size=_size(model, "vocab"),
            attention=_attention(model, facts),
            mlp=Mlp(ffn_dim=_size(model, "ffn" if "ffn" in model else "moe_ffn"), gated=True,
                    activation="silu"),
            moe=_moe(model, name, layers),
            window=facts.window,
            num_windowed_layers=layers // 2 if facts.window else 0,
            num_mtp=1 if with_mtp else 0,
        )  # fmt: skip
    except InputError as why:
        raise Uncounted(str(why)) from None


def _attention(model: Mapping[str, Any], facts: Facts) -> AnyAttention:
    heads = _size(model, "heads")
    if model.get("mla"):
        if facts.latent is None:
            raise Uncounted("the ranks of latent attention are not stated")
        a = facts.latent
        return LatentAttention(num_heads=heads, q_lora_rank=a.q_rank, kv_lora_rank=a.kv_rank,
                               qk_nope_head_dim=a.nope_dim, qk_rope_head_dim=a.rope_dim,
                               v_head_dim=a.v_dim)  # fmt: skip
    width = _size(model, "head_dim")
    return Attention(num_heads=heads, num_kv_heads=_size(model, "kv_heads"), head_dim=width,
                     rope_dim=width, qk_norm=facts.qk_norm)  # fmt: skip


def _moe(model: Mapping[str, Any], name: str, layers: int) -> Moe:
    width, shared = _size(model, "moe_ffn"), _size(model, "shared", 0)
    limited = name == DEEPSEEK
    return Moe(
        num_experts=_size(model, "experts"),
        num_active=_size(model, "topk"),
        expert_ffn_dim=width,
        layers=tuple(range(_size(model, "dense_layers", 0), layers)),
        num_shared_experts=shared,
        shared_ffn_dim=shared * width,
        router_bias=limited,
        num_groups=NUM_GROUPS if limited else 1,
        num_open_groups=NUM_OPEN if limited else 1,
        capacity_factor=CAPACITY_FACTOR if drops_tokens(model) else 0.0,
    )


def _size(model: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = model.get(key, default)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    least = 0 if default == 0 else 1
    if not number or not least <= value < MAX_SIZE or value != int(value):
        raise Uncounted(f"{key} is not a whole number from {least}")
    return int(value)
