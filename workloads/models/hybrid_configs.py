"""Configs of stacks that mix attention with scans and convolutions, or have no attention at all.

Keys and defaults are those of the configuration classes in Hugging Face transformers:

    mamba2        128 heads of 64 in 8 groups, 128 states, expand 2, conv_kernel 4; no feed-forward
                  block, no attention; taps biased, projections not
    mamba         16 states, expand 2, conv_kernel 4, time_step_rank "auto" = hidden / 16 rounded
                  up; projections and taps biased, tied; falcon_mamba: projections not, norms
                  without scale on dt, B and C
    bamba         attention in attn_layer_indices (none), elsewhere Mamba-2: mamba_n_heads 128,
                  mamba_n_groups 1, mamba_d_state 256, mamba_d_conv 4, mamba_expand 2; half of
                  each head rotated
    jamba         attention where i % attn_layer_period (8) = attn_layer_offset (4), elsewhere
                  Mamba with norms on dt, B and C: mamba_d_state 16, mamba_d_conv 4, mamba_expand
                  2, mamba_dt_rank "auto"; experts (16, 2 chosen) where i % expert_layer_period (2)
                  = expert_layer_offset (1); no rotation
    qwen3_next    layer_types, else full attention in every full_attention_interval-th (4) layer and
                  gated delta nets elsewhere: 16 key and 32 value heads of 128, 4 taps; gated
                  attention of 16 heads of 256, 2 of them K/V, a quarter rotated; 512 experts, 10
                  chosen, 512 wide, and a gated shared one
    lfm2          layer_types 'conv' and 'full_attention', else full_attn_idxs (all); conv_L_cache
                  3; the feed-forward width is block_ff_dim, 2/3 of it rounded up to
                  block_multiple_of (256) while block_auto_adjust_ff_dim; q and k normed, tied

Modules of multi-token prediction (Qwen3-Next) are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from workloads.models.architecture import NO_ATTENTION, Attention, Mlp, Moe, TransformerConfig
from workloads.models.config_parts import attention_of, build, gated_of, num_layers_of
from workloads.models.keys import Keys
from workloads.models.mixers import AnyMixer, GatedConv, GatedDelta, Mamba, Mamba2
from workloads.numeric import ceil_div

LOW_RANK: Final = 16
"""Channels of the hidden state to one of dt where time_step_rank is "auto"."""
NO_BLOCK: Final = Mlp(ffn_dim=0, gated=True, activation="silu")
FULL: Final = "full_attention"


def _hybrid(
    keys: Keys,
    name: str,
    mixer: AnyMixer,
    mixed: Sequence[int],
    *,
    attention: Attention = NO_ATTENTION,
    mlp: Mlp | None = None,
    moe: Moe | None = None,
    tied: bool = False,
) -> TransformerConfig:
    """The usual keys, with the mixer on the layers in `mixed`."""
    whole = build(keys, name, attention=attention, mlp=mlp, moe=moe, tied=tied)
    return replace(whole, mixer=mixer if mixed else None, mixer_layers=tuple(mixed))


def _every(keys: Keys) -> range:
    return range(num_layers_of(keys))


def _inner(keys: Keys, key: str) -> int:
    """Width inside a mixer: `expand` times the hidden size, rounded down."""
    return int(keys.number(key, 2.0) * keys.size("hidden_size"))


def _rank(keys: Keys, key: str) -> int:
    """Rank of dt, a number or "auto"."""
    if keys.values.get(key) in (None, "auto"):
        return int(ceil_div(keys.size("hidden_size"), LOW_RANK))
    return keys.size(key)


# ---- scans ---------------------------------------------------------------------------------


def _mamba2_of(keys: Keys, prefix: tuple[str, ...], mixer: Mamba2) -> Mamba2:
    """Refuses heads that do not make up the inner width, as the configuration class does."""
    expand, heads_key = prefix
    inner = _inner(keys, expand)
    if mixer.num_heads * mixer.head_dim != inner:
        problem = f"is {mixer.num_heads}: with {mixer.head_dim} channels a head not {inner} in all"
        keys.fail(heads_key, problem, f"make heads times their width {expand} x hidden_size")
    return mixer


def _mamba2(keys: Keys, name: str) -> TransformerConfig:
    mixer = Mamba2(
        num_heads=keys.size("num_heads", 128),
        head_dim=keys.size("head_dim", 64),
        num_groups=keys.size("n_groups", 8),
        state_dim=keys.size("state_size", 128),
        width=keys.size("conv_kernel", 4),
        conv_bias=keys.flag("use_conv_bias", True),
        bias=keys.flag("use_bias", False),
    )
    mixer = _mamba2_of(keys, ("expand", "num_heads"), mixer)
    return _hybrid(keys, name, mixer, _every(keys), mlp=NO_BLOCK)


def _bamba(keys: Keys, name: str) -> TransformerConfig:
    layers = _every(keys)
    attended = set(keys.items("attn_layer_indices"))
    if not attended <= set(layers):
        keys.fail("attn_layer_indices", f"leaves the {len(layers)} layers", "mend it")
    heads, inner = keys.size("mamba_n_heads", 128), _inner(keys, "mamba_expand")
    auto = keys.values.get("mamba_d_head") in (None, "auto")
    mixer = Mamba2(
        num_heads=heads,
        head_dim=inner // heads if auto else keys.size("mamba_d_head"),
        num_groups=keys.size("mamba_n_groups", 1),
        state_dim=keys.size("mamba_d_state", 256),
        width=keys.size("mamba_d_conv", 4),
        conv_bias=keys.flag("mamba_conv_bias", True),
        bias=keys.flag("mamba_proj_bias", False),
    )
    mixer = _mamba2_of(keys, ("mamba_expand", "mamba_n_heads"), mixer)
    attention = attention_of(keys, num_heads=32, num_kv_heads=8)
    attention = replace(attention, rope_dim=max(2 * (attention.head_dim // 4), 2))
    return _hybrid(keys, name, mixer, [i for i in layers if i not in attended], attention=attention)


def _mamba(keys: Keys, name: str) -> TransformerConfig:
    falcon = keys.text("model_type") == "falcon_mamba"
    mixer = Mamba(
        channels=_inner(keys, "expand"),
        state_dim=keys.size("state_size", 16),
        dt_rank=_rank(keys, "time_step_rank"),
        width=keys.size("conv_kernel", 4),
        conv_bias=keys.flag("use_conv_bias", True),
        bias=keys.flag("use_bias", not falcon),
        inner_norms=falcon,
        norm_scales=False,
    )
    return _hybrid(keys, name, mixer, _every(keys), mlp=NO_BLOCK, tied=True)


def _on(keys: Keys, what: str, period: int, offset: int) -> list[int]:
    """Layers i with i % period = offset, of the keys `what`_layer_period and _offset."""
    every = keys.size(f"{what}_layer_period", period)
    at = keys.size(f"{what}_layer_offset", offset, least=0)
    if at >= every:
        keys.fail(f"{what}_layer_offset", f"is {at}", f"give less than the period of {every}")
    return [i for i in _every(keys) if i % every == at]


def _jamba(keys: Keys, name: str) -> TransformerConfig:
    attended = _on(keys, "attn", 8, 4)
    num_experts = keys.size("num_experts", 16)
    moe = Moe(
        num_experts=num_experts,
        num_active=keys.size("num_experts_per_tok", 2),
        expert_ffn_dim=keys.size("intermediate_size"),
        layers=tuple(_on(keys, "expert", 2, 1)),
    )
    mixer = Mamba(
        channels=_inner(keys, "mamba_expand"),
        state_dim=keys.size("mamba_d_state", 16),
        dt_rank=_rank(keys, "mamba_dt_rank"),
        width=keys.size("mamba_d_conv", 4),
        conv_bias=keys.flag("mamba_conv_bias", True),
        bias=keys.flag("mamba_proj_bias", False),
        inner_norms=True,
    )
    attention = replace(attention_of(keys, num_heads=32, num_kv_heads=8), rope_dim=0)
    mixed = [i for i in _every(keys) if i not in attended]
    return _hybrid(
        keys, name, mixer, mixed, attention=attention, moe=moe if num_experts > 1 else None
    )


def _qwen3_next(keys: Keys, name: str) -> TransformerConfig:
    mixer = GatedDelta(
        num_heads=keys.size("linear_num_value_heads", 32),
        num_key_heads=keys.size("linear_num_key_heads", 16),
        key_dim=keys.size("linear_key_head_dim", 128),
        value_dim=keys.size("linear_value_head_dim", 128),
        width=keys.size("linear_conv_kernel_dim", 4),
    )
    attention = attention_of(keys, num_heads=16, num_kv_heads=2, head_dim=256, qk_norm=True)
    rotation = keys.child("rope_parameters") if keys.has("rope_parameters") else keys
    frac = rotation.fraction("partial_rotary_factor", keys.fraction("partial_rotary_factor", 0.25))
    rope_dim = max(2 * int(attention.head_dim * frac / 2), 2)
    step, dense = keys.size("decoder_sparse_step", 1), keys.items("mlp_only_layers")
    moe = Moe(
        num_experts=keys.size("num_experts", 512),
        num_active=keys.size("num_experts_per_tok", 10),
        expert_ffn_dim=keys.size("moe_intermediate_size", 512),
        layers=tuple(i for i in _every(keys) if (i + 1) % step == 0 and i not in dense),
        num_shared_experts=1,
        shared_ffn_dim=keys.size("shared_expert_intermediate_size", 512),
        shared_gate=True,
    )
    every = keys.size("full_attention_interval", 4)
    usual = ["linear_attention" if (i + 1) % every else FULL for i in _every(keys)]
    mixed = _typed(keys, "linear_attention", usual)
    whole = replace(attention, rope_dim=rope_dim, out_gate=True)
    return _hybrid(keys, name, mixer, mixed, attention=whole, moe=moe)


def _typed(keys: Keys, own: str, usual: Sequence[str]) -> list[int]:
    """Layers of that type in `layer_types`; no other but full attention may stand there."""
    types = list(keys.items("layer_types")) or list(usual)
    layers = num_layers_of(keys)
    if len(types) != layers:
        keys.fail("layer_types", f"names {len(types)} of {layers} layers", "name every one")
    for kind in types:
        if kind not in (own, FULL):
            keys.fail("layer_types", f"names '{str(kind)[:40]}'", f"use '{own}' and '{FULL}'")
    return [i for i, kind in enumerate(types) if kind == own]


# ---- convolutions --------------------------------------------------------------------------


def _lfm2(keys: Keys, name: str) -> TransformerConfig:
    hidden = keys.size("hidden_size")
    for key in ("conv_dim", "block_dim"):
        if keys.size(key, hidden) != hidden:
            keys.fail(key, f"is not hidden_size = {hidden}", "only equal widths are modelled")
    mixer = GatedConv(
        channels=hidden,
        width=keys.size("conv_L_cache", 3),
        conv_bias=keys.flag("conv_bias", False),
        bias=keys.flag("conv_bias", False),
    )
    attended = keys.items("full_attn_idxs") if keys.has("full_attn_idxs") else list(_every(keys))
    mixed = _typed(keys, "conv", [FULL if i in attended else "conv" for i in _every(keys)])
    attention = attention_of(keys, num_heads=32, num_kv_heads=8, qk_norm=True)
    ffn = Keys(keys.file, {**keys.values, "intermediate_size": _lfm2_width(keys)}, keys.prefix)
    tied = keys.flag("tie_embedding", keys.flag("tie_word_embeddings", True))
    whole = _hybrid(keys, name, mixer, mixed, attention=attention, mlp=gated_of(ffn))
    return replace(whole, tied_embeddings=tied)


def _lfm2_width(keys: Keys) -> int:
    """Of the feed-forward block, after what `block_auto_adjust_ff_dim` makes of it."""
    width = keys.size("block_ff_dim", keys.size("intermediate_size", 12288))
    if not keys.flag("block_auto_adjust_ff_dim", True):
        return width
    width = int(keys.number("block_ffn_dim_multiplier", 1.0) * int(2 * width / 3))
    multiple = keys.size("block_multiple_of", 256)
    return multiple * int(ceil_div(width, multiple))


HYBRIDS: Final[Mapping[str, Callable[[Keys, str], TransformerConfig]]] = {
    "mamba": _mamba,
    "falcon_mamba": _mamba,
    "mamba2": _mamba2,
    "bamba": _bamba,
    "jamba": _jamba,
    "qwen3_next": _qwen3_next,
    "lfm2": _lfm2,
}
"""Readers by `model_type`."""
