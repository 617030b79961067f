"""Decoder-only transformers as data, read from the `config.json` of Hugging Face transformers.

`load_hf_config(path)` keeps the figures that decide counts: sizes, heads, experts, biases, norms,
windows. What changes no count is dropped (rope base and scaling, epsilons, soft caps, initial
values, token ids). A key that its configuration class may leave out takes that class's default:

    all families         num_key_value_heads = num_attention_heads, head_dim = hidden_size /
                         num_attention_heads, biases false, tie_word_embeddings false
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

Multi-token-prediction modules (DeepSeek-V3) and vision towers are not part of what is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, TypeAlias, final

from hwmodels.errors import InputError, SpecError, UnknownNameError

RMS_NORM, LAYER_NORM = "rmsnorm", "layernorm"

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

MAX_SIZE: Final = 10**8
MAX_LAYERS: Final = 10**5


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Multi-head attention; grouped or multi-query when `num_kv_heads` is smaller.

    `rope_dim` elements of each head are rotated (0: positions enter elsewhere); `qk_norm` is an
    RMSNorm over each head of q and k.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_dim: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}; "
                "give a divisor"
            )

    @property
    def v_head_dim(self) -> int:
        """Width of a value head: the same as of a query head."""
        return self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    K and V come from one latent of `kv_lora_rank` plus a rotated key of `qk_rope_head_dim` that
    all heads share; q comes from a latent of `q_lora_rank` (None: straight from the hidden state).
    """

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    bias: bool = False

    @property
    def num_kv_heads(self) -> int:
        """Every head has its own K and V once they are expanded from the latent."""
        return self.num_heads

    @property
    def head_dim(self) -> int:
        """Width of a query or key head: the part without and the part with rotation."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """What the cache keeps per token: the K/V latent and the shared rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


AnyAttention: TypeAlias = Attention | LatentAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """A feed-forward block: two matrices, or three when `gated` (up, gate, down)."""

    ffn_dim: int
    gated: bool
    activation: str
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe:
    """Mixture of experts; each expert has the form of the config's `mlp` without bias.

    `layers` are the indices of the layers that have it. `shared_ffn_dim` is the width of all
    shared experts together; `router_bias` the per-expert correction of DeepSeek-V3.
    """

    num_experts: int
    num_active: int
    expert_ffn_dim: int
    layers: tuple[int, ...]
    num_shared_experts: int = 0
    shared_ffn_dim: int = 0
    router_bias: bool = False

    def __post_init__(self) -> None:
        if self.num_active > self.num_experts:
            raise InputError(
                f"{self.num_active} active experts of {self.num_experts}; "
                "a token cannot choose more experts than there are"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """A decoder-only transformer.

    `norms_per_layer` counts the norms over `hidden_dim` in one layer: 2, or 4 where each block
    also normalises its output. `num_positions` rows of learned positions (0: none). The embedding
    has `embedding_dim` columns and is projected where that differs from `hidden_dim`.
    `num_windowed_layers` layers see only the last `window` positions.
    """

    name: str
    family: str
    hidden_dim: int
    num_layers: int
    vocab_size: int
    attention: AnyAttention
    mlp: Mlp
    moe: Moe | None = None
    norm: str = RMS_NORM
    norms_per_layer: int = 2
    final_norm: bool = True
    tied_embeddings: bool = False
    num_positions: int = 0
    embedding_dim: int = 0
    window: int | None = None
    num_windowed_layers: int = 0

    def __post_init__(self) -> None:
        if not self.embedding_dim:
            object.__setattr__(self, "embedding_dim", self.hidden_dim)

    @property
    def num_moe_layers(self) -> int:
        """Layers whose feed-forward block is a mixture of experts."""
        return len(self.moe.layers) if self.moe else 0

    @property
    def num_dense_layers(self) -> int:
        """Layers with a plain feed-forward block."""
        return self.num_layers - self.num_moe_layers

    @property
    def kinds(self) -> dict[str, int]:
        """Layers by kind, those kinds only that occur: {'dense': 3, 'moe': 58}."""
        both = {"dense": self.num_dense_layers, "moe": self.num_moe_layers}
        return {kind: count for kind, count in both.items() if count}

    @property
    def windowed_frac(self) -> float:
        """Fraction of the layers whose attention is windowed."""
        return self.num_windowed_layers / self.num_layers if self.window else 0.0

    @property
    def norm_dim(self) -> int:
        """Parameters of one norm over the hidden state: a scale, and a bias for LayerNorm."""
        return self.hidden_dim * (2 if self.norm == LAYER_NORM else 1)


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
    keys = _Keys(str(file), _object(file))
    family = keys.text("model_type")
    if family not in FAMILIES:
        raise UnknownNameError(
            "model_type", family, FAMILIES, hint=f"{file} must be one of {', '.join(FAMILIES)}"
        )
    name = file.parent.name if file.stem == "config" and file.parent.name else file.stem
    try:
        return FAMILIES[family](keys, name)
    except SpecError:
        raise
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _object(file: Path) -> Mapping[str, object]:
    """The JSON object in a file."""
    try:
        if not file.is_file():
            problem = "is not a regular file" if file.exists() else "does not exist"
            raise SpecError(file, "file", problem, "give the path of a config.json")
        values = json.loads(file.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte {error.start})"
        raise SpecError(file, "file", problem, "save it as UTF-8") from None
    except json.JSONDecodeError as error:
        problem = f"is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}"
        raise SpecError(file, "file", problem, "mend that line or fetch the file again") from None
    except RecursionError:
        raise SpecError(file, "file", "nests too deeply", "fetch the file again") from None
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        raise SpecError(file, "file", problem, "check the path and its rights") from None
    except SpecError:
        raise
    except ValueError:
        raise SpecError(file, "file", "holds an absurdly long number", "shorten it") from None
    if not isinstance(values, dict):
        problem = f"holds {_kind(values)}, not an object"
        raise SpecError(file, "file", problem, 'start it with { "model_type": ... }')
    return values


def _kind(value: object) -> str:
    """What a JSON value is, in words, cut to a length that fits one line."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


@final
class _Keys:
    """Typed access to one JSON object; whatever is wrong becomes one `SpecError`."""

    __slots__ = ("file", "prefix", "values")

    def __init__(self, file: str, values: Mapping[str, object], prefix: str = "") -> None:
        self.file, self.values, self.prefix = file, values, prefix

    def fail(self, key: str, problem: str, mend: str) -> NoReturn:
        """Raise the error of that key."""
        raise SpecError(self.file, self.prefix + key, problem, mend)

    def has(self, key: str) -> bool:
        """Present, and not null."""
        return self.values.get(key) is not None

    def child(self, key: str) -> _Keys:
        """The object under a key."""
        inner = self.values[key]
        if not isinstance(inner, dict):
            self.fail(key, f"is {_kind(inner)}, not an object", f'write "{key}": {{ ... }}')
        return _Keys(self.file, inner, f"{self.prefix}{key}.")

    def size(
        self, key: str, default: int | None = None, *, most: int = MAX_SIZE, least: int = 1
    ) -> int:
        """A whole number in [least, most]; required unless there is a default."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                self.fail(key, "missing", f'add "{key}": a whole number')
            return default
        if type(value) is not int:
            self.fail(key, f"is {_kind(value)}, not a whole number", f"write {key} as an integer")
        if not least <= value <= most:
            self.fail(key, f"is {_kind(value)}", f"give a whole number from {least} to {most}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false; null counts as absent."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(key, f"is {_kind(value)}, not true or false", "write true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A text; required unless there is a default."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                self.fail(key, "missing", f'add "{key}": "..."')
            return default
        if not isinstance(value, str):
            self.fail(key, f"is {_kind(value)}, not a text", "write it in quotes")
        return value

    def items(self, key: str) -> Sequence[object]:
        """A list; empty when absent."""
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list):
            self.fail(key, f"is {_kind(value)}, not a list", "write it as [ ... ]")
        return value

    def fraction(self, key: str, default: float) -> float:
        """A number in [0, 1]."""
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            self.fail(key, f"is {_kind(value)}", "give a number from 0 to 1")
        return float(value)

    def activation(self, key: str, default: str) -> str:
        """An activation by the name of its count."""
        name = self.text(key, default)
        if name not in ACTIVATIONS:
            self.fail(key, f"is '{name[:40]}'", f"use one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]


def _attention(
    keys: _Keys,
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
    width = _head_dim(keys, "hidden_size", "num_attention_heads", heads, head_dim)
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


def _head_dim(keys: _Keys, hidden_key: str, heads_key: str, heads: int, default: int | None) -> int:
    """`head_dim`, else the family's default, else the hidden size over the heads."""
    if default is not None or keys.has("head_dim"):
        return keys.size("head_dim", default)
    hidden = keys.size(hidden_key)
    if hidden % heads:
        problem = f"is {hidden}, which {heads_key} = {heads} does not divide"
        keys.fail(hidden_key, problem, "mend one of them or add head_dim")
    return hidden // heads


def _num_layers(keys: _Keys, key: str = "num_hidden_layers") -> int:
    return keys.size(key, most=MAX_LAYERS)


def _gated(keys: _Keys, *keys_of_activation: str, default: str = "silu") -> Mlp:
    """A gated block; the first activation key that is present counts."""
    present = [k for k in keys_of_activation if keys.has(k)]
    return Mlp(
        ffn_dim=keys.size("intermediate_size"),
        gated=True,
        activation=keys.activation(present[0] if present else "hidden_act", default),
        bias=keys.flag("mlp_bias", False),
    )


def _windowed(keys: _Keys, default_layers: int) -> int:
    """Layers with a sliding window: counted in `layer_types` where given."""
    kinds = keys.items("layer_types")
    return kinds.count("sliding_attention") if kinds else default_layers


def _build(
    keys: _Keys,
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
        num_layers=_num_layers(keys),
        vocab_size=keys.size("vocab_size", vocab_size),
        attention=attention,
        mlp=mlp or _gated(keys),
        moe=moe,
        norms_per_layer=norms_per_layer,
        tied_embeddings=keys.flag("tie_word_embeddings", tied),
        window=width if num_windowed else None,
        num_windowed_layers=num_windowed if width else 0,
    )


def _llama(keys: _Keys, name: str) -> TransformerConfig:
    return _build(keys, name, attention=_attention(keys))


def _phi3(keys: _Keys, name: str) -> TransformerConfig:
    window = keys.size("sliding_window") if keys.has("sliding_window") else None
    layers = _num_layers(keys)
    return _build(keys, name, attention=_attention(keys), window=(window, layers))


def _mistral(keys: _Keys, name: str) -> TransformerConfig:
    # Later checkpoints switch the window off with an explicit null; only absence means 4096.
    off = "sliding_window" in keys.values and not keys.has("sliding_window")
    window = None if off else keys.size("sliding_window", 4096)
    attention = _attention(keys, num_kv_heads=8)
    return _build(keys, name, attention=attention, window=(window, _num_layers(keys)))


def _mixtral(keys: _Keys, name: str) -> TransformerConfig:
    layers = _num_layers(keys)
    window = keys.size("sliding_window") if keys.has("sliding_window") else None
    moe = Moe(
        num_experts=keys.size("num_local_experts", 8),
        num_active=keys.size("num_experts_per_tok", 2),
        expert_ffn_dim=keys.size("intermediate_size"),
        layers=tuple(range(layers)),
    )
    attention = _attention(keys, num_kv_heads=8)
    return _build(keys, name, attention=attention, moe=moe, window=(window, layers))


def _qwen_window(keys: _Keys) -> tuple[int | None, int]:
    if not keys.flag("use_sliding_window", False):
        return None, 0
    layers = _num_layers(keys)
    first = keys.size("max_window_layers", 28, least=0)
    return keys.size("sliding_window", 4096), _windowed(keys, max(layers - first, 0))


def _qwen2(keys: _Keys, name: str) -> TransformerConfig:
    attention = _attention(keys, num_kv_heads=32, qkv_bias=True)
    return _build(keys, name, attention=attention, window=_qwen_window(keys))


def _qwen3(keys: _Keys, name: str) -> TransformerConfig:
    attention = _attention(keys, num_kv_heads=32, head_dim=128, qk_norm=True)
    return _build(keys, name, attention=attention, window=_qwen_window(keys))


def _qwen3_moe(keys: _Keys, name: str) -> TransformerConfig:
    step, dense = keys.size("decoder_sparse_step", 1), keys.items("mlp_only_layers")
    moe = Moe(
        num_experts=keys.size("num_experts"),
        num_active=keys.size("num_experts_per_tok"),
        expert_ffn_dim=keys.size("moe_intermediate_size"),
        layers=tuple(i for i in range(_num_layers(keys)) if (i + 1) % step == 0 and i not in dense),
    )
    attention = _attention(keys, num_kv_heads=4, qk_norm=True)
    return _build(keys, name, attention=attention, moe=moe, window=_qwen_window(keys))


def _gemma(keys: _Keys, name: str) -> TransformerConfig:
    attention = _attention(keys, num_kv_heads=16, head_dim=256)
    mlp = _gated(keys, "hidden_activation", "hidden_act", default="gelu_pytorch_tanh")
    return _build(keys, name, attention=attention, mlp=mlp, tied=True)


def _gemma2(keys: _Keys, name: str) -> TransformerConfig:
    windowed = _windowed(keys, -(-_num_layers(keys) // 2))
    return _build(
        keys,
        name,
        attention=_attention(keys, num_kv_heads=4, head_dim=256),
        mlp=_gated(keys, "hidden_activation", "hidden_act", default="gelu_pytorch_tanh"),
        tied=True,
        norms_per_layer=4,
        window=(keys.size("sliding_window", 4096), windowed),
    )


def _gemma3_text(keys: _Keys, name: str) -> TransformerConfig:
    layers = _num_layers(keys)
    windowed = _windowed(keys, layers - layers // keys.size("sliding_window_pattern", 6))
    return _build(
        keys,
        name,
        attention=_attention(keys, num_heads=8, num_kv_heads=4, head_dim=256, qk_norm=True),
        mlp=_gated(keys, "hidden_activation", default="gelu_pytorch_tanh"),
        tied=True,
        norms_per_layer=4,
        vocab_size=262_208,
        window=(keys.size("sliding_window", 4096), windowed),
    )


def _gemma3(keys: _Keys, name: str) -> TransformerConfig:
    return _gemma3_text(keys.child("text_config") if keys.has("text_config") else keys, name)


def _gpt2(keys: _Keys, name: str) -> TransformerConfig:
    hidden, heads = keys.size("n_embd"), keys.size("n_head")
    width = _head_dim(keys, "n_embd", "n_head", heads, None)
    attention = Attention(
        num_heads=heads, num_kv_heads=heads, head_dim=width, qkv_bias=True, out_bias=True
    )
    return TransformerConfig(
        name=name,
        family="gpt2",
        hidden_dim=hidden,
        num_layers=_num_layers(keys, "n_layer"),
        vocab_size=keys.size("vocab_size"),
        attention=attention,
        mlp=Mlp(
            ffn_dim=keys.size("n_inner", 4 * hidden),
            gated=False,
            activation=keys.activation("activation_function", "gelu_new"),
            bias=True,
        ),
        norm=LAYER_NORM,
        tied_embeddings=keys.flag("tie_word_embeddings", True),
        num_positions=keys.size("n_positions", 1024),
    )


OPT_POSITION_OFFSET: Final = 2
"""Rows of OPT's position table in front of the first position."""


def _opt(keys: _Keys, name: str) -> TransformerConfig:
    hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    bias = keys.flag("enable_bias", True)
    width = _head_dim(keys, "hidden_size", "num_attention_heads", heads, None)
    pre_norm = keys.flag("do_layer_norm_before", True)
    return TransformerConfig(
        name=name,
        family="opt",
        hidden_dim=hidden,
        num_layers=_num_layers(keys),
        vocab_size=keys.size("vocab_size"),
        attention=Attention(
            num_heads=heads, num_kv_heads=heads, head_dim=width, qkv_bias=bias, out_bias=bias
        ),
        mlp=Mlp(
            ffn_dim=keys.size("ffn_dim"),
            gated=False,
            activation=keys.activation("activation_function", "relu"),
            bias=bias,
        ),
        norm=LAYER_NORM,
        final_norm=pre_norm and not keys.flag("_remove_final_layer_norm", False),
        tied_embeddings=keys.flag("tie_word_embeddings", True),
        num_positions=keys.size("max_position_embeddings", 2048) + OPT_POSITION_OFFSET,
        embedding_dim=keys.size("word_embed_proj_dim", hidden),
    )


def _deepseek(keys: _Keys, name: str) -> TransformerConfig:
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
        layers=tuple(i for i in range(_num_layers(keys)) if i >= first and i % step == 0),
        num_shared_experts=shared,
        shared_ffn_dim=shared * width,
        router_bias=keys.text("model_type") == "deepseek_v3",
    )
    return _build(keys, name, attention=attention, moe=moe)


FAMILIES: Final[Mapping[str, Callable[[_Keys, str], TransformerConfig]]] = {
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
}
"""Readers by `model_type`."""
