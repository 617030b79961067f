from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hwmodels.errors import InputError
from workloads.models.config import (
    FAMILIES,
    Attention,
    LatentAttention,
    Moe,
    load_hf_config,
    load_model,
)

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 100,
}


def written(tmp_path: Path, changes: dict[str, Any], drop: str = "") -> Path:
    values = {k: v for k, v in (LLAMA | changes).items() if k != drop}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def grouped(path: Path) -> Attention:
    attention = load_hf_config(path).attention
    assert isinstance(attention, Attention)
    return attention


def one_line_error(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_hf_config(path)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    assert str(path) in text
    return text


# ---- what is read --------------------------------------------------------------------------


def test_every_example_loads_under_its_file_name() -> None:
    paths = sorted(Path("examples").glob("*.json"))
    assert len(paths) == 20
    for path in paths:
        cfg = load_model(path)
        assert cfg.name == path.stem
        assert cfg.num_dense_layers + cfg.num_moe_layers == cfg.num_layers
        assert sum(cfg.kinds.values()) == cfg.num_layers


def test_a_config_json_is_called_like_its_folder(tmp_path: Path) -> None:
    assert load_hf_config(written(tmp_path, {})).name == tmp_path.name


def test_absent_keys_take_the_defaults_of_their_class(tmp_path: Path) -> None:
    cfg = load_hf_config(written(tmp_path, {}))
    assert cfg.attention == Attention(num_heads=8, num_kv_heads=8, head_dim=8, rope_dim=8)
    assert not cfg.tied_embeddings and cfg.window is None and cfg.mlp.activation == "silu"
    mistral = load_hf_config(written(tmp_path, {"model_type": "mistral"}))
    assert mistral.attention.num_kv_heads == 8
    assert (mistral.window, mistral.num_windowed_layers) == (4096, 4)


def test_an_explicit_null_switches_the_window_off(tmp_path: Path) -> None:
    cfg = load_hf_config(written(tmp_path, {"model_type": "mistral", "sliding_window": None}))
    assert cfg.window is None and cfg.windowed_frac == 0


@pytest.mark.parametrize(
    ("family", "extra", "windowed"),
    [
        ("qwen2", {"num_key_value_heads": 8, "sliding_window": 16}, 0),
        ("qwen2", {"num_key_value_heads": 8, "sliding_window": 16, "use_sliding_window": True,
                   "max_window_layers": 3}, 1),
        ("gemma2", {"sliding_window": 16}, 2),
        ("gemma3_text", {"sliding_window": 16, "num_hidden_layers": 17}, 15),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}, 3),
        ("phi3", {"sliding_window": 16}, 4),
    ],
)  # fmt: skip
def test_windowed_layers(tmp_path: Path, family: str, extra: dict[str, Any], windowed: int) -> None:
    cfg = load_hf_config(written(tmp_path, {"model_type": family} | extra))
    assert cfg.num_windowed_layers == windowed
    assert (cfg.window is None) == (windowed == 0)


def test_gemma3_reads_its_text_part_and_its_class_defaults(tmp_path: Path) -> None:
    text = {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
        "num_hidden_layers": 34, "sliding_window": 1024,
    }  # fmt: skip
    path = tmp_path / "gemma-3-4b.json"
    path.write_text(json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": {}}))
    cfg = load_hf_config(path)
    assert cfg.vocab_size == 262_208 and cfg.tied_embeddings and cfg.norms_per_layer == 4
    assert isinstance(cfg.attention, Attention) and cfg.attention.qk_norm
    assert (cfg.attention.num_heads, cfg.attention.num_kv_heads, cfg.attention.head_dim) == (
        8,
        4,
        256,
    )
    assert cfg.num_windowed_layers == 34 - 5


def test_sparse_layers_follow_step_and_exceptions(tmp_path: Path) -> None:
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
           "decoder_sparse_step": 2, "mlp_only_layers": [1], "model_type": "qwen3_moe"}  # fmt: skip
    cfg = load_hf_config(written(tmp_path, moe))
    assert cfg.moe is not None and cfg.moe.layers == (3,)
    assert cfg.kinds == {"dense": 3, "moe": 1}


def test_deepseek_starts_dense_and_may_do_without_a_query_latent(tmp_path: Path) -> None:
    values = json.loads(Path("examples/deepseek-v3.json").read_text()) | {"q_lora_rank": None}
    path = tmp_path / "v.json"
    path.write_text(json.dumps(values))
    cfg = load_hf_config(path)
    assert isinstance(cfg.attention, LatentAttention) and cfg.attention.q_lora_rank is None
    assert cfg.attention.head_dim == 192 and cfg.attention.latent_dim == 576
    assert cfg.kinds == {"dense": 3, "moe": 58}


def test_opt_positions_have_an_offset_of_two_and_may_project(tmp_path: Path) -> None:
    opt = {"model_type": "opt", "ffn_dim": 256, "word_embed_proj_dim": 32,
           "do_layer_norm_before": False}  # fmt: skip
    cfg = load_hf_config(written(tmp_path, opt))
    assert cfg.num_positions == 2050 and cfg.embedding_dim == 32 and not cfg.final_norm


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(LLAMA).encode())
    assert load_hf_config(path).hidden_dim == 64


# ---- what is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "line 1 column 1"),
        (b'{"model_type": "llama",\n "hidden_size": ', "line 2 column"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[1, 2]", "a list, not an object"),
        (b"null", "null, not an object"),
        (b"{}", "model_type: missing"),
        (b'{"model_type": 3}', "is 3, not a text"),
        (b"[" * 100_000, "nests too deeply"),
        (b'{"model_type": ' + b"9" * 5000 + b"}", "absurdly long number"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    assert words in one_line_error(path)


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    assert "is not a regular file" in one_line_error(tmp_path)
    assert "does not exist" in one_line_error(tmp_path / "none.json")


def test_load_model_suggests_the_files_beside() -> None:
    with pytest.raises(InputError, match=r"did you mean .*examples/llama3-8b\.json"):
        load_model("examples/llama3-8.json")
    with pytest.raises(InputError, match=r"give the path of a Hugging Face config\.json"):
        load_model("zzzzzz")


def test_an_unknown_family_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean llama"):
        load_hf_config(written(tmp_path, {"model_type": "lama"}))
    with pytest.raises(InputError) as caught:
        load_hf_config(written(tmp_path, {"model_type": "xyzzy"}))
    assert all(family in str(caught.value) for family in FAMILIES)


@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "vocab_size"],
)  # fmt: skip
def test_a_missing_size_is_named(tmp_path: Path, key: str) -> None:
    text = one_line_error(written(tmp_path, {}, drop=key))
    assert f"{key}: missing" in text and f'add "{key}"' in text


@pytest.mark.parametrize("bad", [0, -1, 10**9, 2.5, 64.0, "64", True, [64], {"a": 1}, float("nan")])
def test_absurd_sizes_are_named(tmp_path: Path, bad: object) -> None:
    assert ": hidden_size: is " in one_line_error(written(tmp_path, {"hidden_size": bad}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads: is 3, which does not divide"),
        ({"num_attention_heads": 7}, "hidden_size: is 64, which num_attention_heads = 7"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers: is 1000000"),
        ({"attention_bias": "yes"}, "attention_bias: is \"yes\", not true or false"),
        ({"hidden_act": "snake"}, "hidden_act: is 'snake'; use one of silu"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor: is 2"),
        ({"model_type": "gemma3", "text_config": 3}, "text_config: is 3, not an object"),
        ({"model_type": "gemma2", "layer_types": 3}, "layer_types: is 3, not a list"),
        ({"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 8,
          "moe_intermediate_size": 8}, "8 active experts of 4"),
    ],
)  # fmt: skip
def test_impossible_values(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assert words in one_line_error(written(tmp_path, changes))


def test_a_nested_key_is_named_by_its_path(tmp_path: Path) -> None:
    changes = {"model_type": "gemma3", "text_config": {"hidden_size": -4}}
    text = one_line_error(written(tmp_path, changes))
    assert "text_config.num_hidden_layers: missing" in text


def test_hand_made_specs_are_checked_too() -> None:
    with pytest.raises(InputError, match="does not divide num_heads"):
        Attention(num_heads=8, num_kv_heads=3, head_dim=64)
    with pytest.raises(InputError, match="5 active experts of 4"):
        Moe(num_experts=4, num_active=5, expert_ffn_dim=8, layers=(0,))
