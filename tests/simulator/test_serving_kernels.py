"""Which kernels a pass launches: counts and sizes by hand."""

from dataclasses import replace

import pytest

from hwmodels import catalog
from hwmodels.dtypes import BF16, FP8
from hwmodels.errors import InputError, UnknownNameError
from simulator.serving_kernels import (
    ENGINES,
    EXPERTS,
    Batch,
    Formats,
    Kernel,
    Layout,
    Linear,
    Served,
    engine,
    forward_kernels,
    num_nodes,
)
from workloads.models.architecture import Attention, LatentAttention, Mlp, Moe, TransformerConfig
from workloads.ops.collective_transfer import (
    ClusterCollective,
    CollectiveTransfer,
    CustomAllReduce,
)
from workloads.ops.decode_attention import DecodeAttention, MlaDecode
from workloads.ops.expert_exchange import ExpertExchange
from workloads.ops.matmul import Matmul
from workloads.ops.prefill_attention import MlaPrefill, PrefillAttention
from workloads.ops.quantised_matmul import QuantisedMatmul

LLAMA = TransformerConfig(
    name="made", family="llama", hidden_dim=4096, num_layers=32, vocab_size=128256,
    attention=Attention(num_heads=32, num_kv_heads=8, head_dim=128, rope_dim=128),
    mlp=Mlp(ffn_dim=14336, gated=True, activation="silu"),
)  # fmt: skip
LATENT = replace(
    LLAMA,
    attention=LatentAttention(num_heads=32, q_lora_rank=1536, kv_lora_rank=512,
                              qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
    moe=Moe(num_experts=64, num_active=4, expert_ffn_dim=2048, layers=tuple(range(2, 32)),
            num_shared_experts=1, shared_ffn_dim=2048),
)  # fmt: skip
DECODING = Batch(num_decoding=8, len_context=1000)
PROMPT = Batch(num_prompts=1, len_prompt=512)


def served(
    config: TransformerConfig = LLAMA,
    name: str = "vllm",
    gpu: str = "h100-sxm",
    formats: Formats | None = None,
    **split: int,
) -> Served:
    """A setting; `split` are the degrees of its layout."""
    return Served(
        config=config,
        device=catalog.device(gpu),
        engine=ENGINES[name],
        formats=formats or Formats(),
        layout=Layout(**split),
    )


def of(kernels: list[Kernel], kind: type) -> list[Kernel]:
    return [k for k in kernels if type(k.op) is kind]


def test_a_decode_step_of_llama_by_hand() -> None:
    kernels = list(forward_kernels(served(tp=4), DECODING))
    products = {k.part: (k.op.m, k.op.n, k.op.k, k.times) for k in of(kernels, Matmul)}
    assert products["qkv"] == (8, (8 + 2 * 2) * 128, 4096, 32)
    assert products["output"] == (8, 4096, 1024, 32)
    assert products["mlp"] == (8, 4096, 3584, 32)  # the second of the two
    assert products["head"] == (8, 128256 // 4, 4096, 1)
    (attention,) = of(kernels, DecodeAttention)
    assert (attention.op.num_heads, attention.op.num_kv_heads) == (8, 2)
    assert attention.conditions.kernel == "vllm:fa3"
    reduced = of(kernels, CustomAllReduce)
    assert sum(k.times for k in reduced) == 2 * 32 + 1
    assert {k.op.num_bytes for k in reduced} == {8 * 4096 * 2}
    assert not of(kernels, PrefillAttention)


def test_weights_read_are_those_of_the_model() -> None:
    kernels = list(forward_kernels(served(), DECODING))
    elements = sum(k.times * k.op.n * k.op.k for k in of(kernels, Matmul))
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    assert elements == 32 * layer + 128256 * 4096


def test_a_prompt_and_decoding_sequences_share_the_linear_layers() -> None:
    both = Batch(num_prompts=1, len_prompt=512, num_decoding=8, len_context=1000)
    kernels = list(forward_kernels(served(), both))
    assert {k.op.m for k in of(kernels, Matmul) if k.part == "qkv"} == {520}
    assert {k.op.m for k in of(kernels, Matmul) if k.part == "head"} == {9}
    assert len(of(kernels, DecodeAttention)) == len(of(kernels, PrefillAttention)) == 1


def test_key_heads_are_copied_beyond_their_number() -> None:
    config = replace(LLAMA, attention=replace(LLAMA.attention, num_kv_heads=2))
    (attention,) = of(list(forward_kernels(served(config, tp=8), DECODING)), DecodeAttention)
    assert (attention.op.num_heads, attention.op.num_kv_heads) == (4, 1)


def test_large_messages_go_to_the_library_and_several_boards_over_the_network() -> None:
    long = Batch(num_prompts=1, len_prompt=8192)  # 64 MiB a message
    kernels = list(forward_kernels(served(tp=8), long))
    assert not of(kernels, CustomAllReduce)
    assert any(k.op.kind == "all_reduce" for k in of(kernels, CollectiveTransfer))
    far = list(forward_kernels(served(tp=16), DECODING))
    assert {k.op.num_nodes for k in of(far, ClusterCollective)} == {2}
    assert num_nodes(catalog.device("gb200"), 32) == 1


def test_one_rank_sends_nothing() -> None:
    kinds = {type(k.op) for k in forward_kernels(served(), DECODING)}
    assert not kinds & {CustomAllReduce, CollectiveTransfer, ClusterCollective, ExpertExchange}


def test_latent_attention_decodes_absorbed_and_takes_prompts_expanded() -> None:
    kernels = list(forward_kernels(served(LATENT, tp=4, moe_tp=4), DECODING))
    (attention,) = of(kernels, MlaDecode)
    assert (attention.op.num_heads, attention.op.latent_dim, attention.times) == (8, 512, 32)
    prompts = list(forward_kernels(served(LATENT, tp=4, moe_tp=4), PROMPT))
    (prefill,) = of(prompts, MlaPrefill)
    assert (prefill.op.head_dim, prefill.op.value_dim) == (192, 128)
    assert {k.op.n for k in prompts if k.part == "keys, values"} == {8 * 256}


def test_shared_experts_run_beside_the_routed_ones_while_decoding_only() -> None:
    setting = served(LATENT, tp=4, moe_tp=4)
    for batch, beside in ((DECODING, True), (PROMPT, False)):
        shared = [k for k in forward_kernels(setting, batch) if k.part == "shared experts"]
        assert shared and all(k.beside is beside for k in shared)


def test_replicas_of_attention_meet_at_the_experts() -> None:
    kernels = list(forward_kernels(served(LATENT, attn_dp=8, moe_ep=8), DECODING))
    (experts,) = (k for k in kernels if k.part == EXPERTS)
    assert (experts.op.num_tokens, experts.op.ep, experts.times) == (64, 8, 30)
    exchanges = of(kernels, ExpertExchange)
    assert [(k.op.direction, k.op.num_tokens) for k in exchanges] == [
        ("dispatch", 8), ("combine", 8),
    ]  # fmt: skip
    unsplit = list(forward_kernels(served(LATENT, attn_dp=8, moe_tp=8), DECODING))
    gathered = {k.op.kind: k.op.num_bytes for k in of(unsplit, CollectiveTransfer)}
    assert gathered == {"all_gather": 64 * 4096 * 2, "reduce_scatter": 64 * 4096 * 2}


@pytest.mark.parametrize(("scheme", "quantises"), [("tensor", False), ("block", True)])
def test_static_scales_are_quantised_by_the_kernel_before(scheme: str, quantises: bool) -> None:
    linear = Linear(dtype=FP8, scheme=scheme)
    setting = served(formats=Formats(attention=linear, mlp=linear, cache=FP8))
    products = of(list(forward_kernels(setting, DECODING)), QuantisedMatmul)
    assert len(products) == 4  # qkv, output, gate and up, down
    assert {k.op.quantises for k in products} == {quantises}


def test_windowed_layers_are_kernels_of_their_own() -> None:
    config = replace(LLAMA, window=128, num_windowed_layers=12)
    kernels = of(list(forward_kernels(served(config), DECODING)), DecodeAttention)
    assert {(k.op.window, k.times) for k in kernels} == {(None, 20), (128, 12)}


def test_settings_that_cannot_be() -> None:
    with pytest.raises(InputError, match="3 tensor parallel ranks do not divide 32 heads"):
        served(tp=3)
    with pytest.raises(InputError, match="experts' tp times ep is not the number of ranks"):
        served(LATENT, tp=8, moe_tp=4)
    with pytest.raises(InputError, match="below 1"):
        Layout(tp=0)
    with pytest.raises(UnknownNameError):
        engine("vlm")
    assert engine("sglang").mixes is False
    assert Linear(weight_dtype=FP8).stored == FP8 and Linear().stored == BF16
