"""Our matrix flops against PyTorch's own counter, on meta tensors of the real sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from hwmodels.dtypes import BF16
from workloads.models.config import LatentAttention, TransformerConfig, load_hf_config
from workloads.models.transformer import ends, layer, model_flops
from workloads.workload import BACKWARD, FORWARD

BATCH, LEN = 2, 640
Block = Callable[[torch.Tensor, TransformerConfig], torch.Tensor]


def weight(rows: int, cols: int) -> torch.Tensor:
    return torch.empty(rows, cols, device="meta", requires_grad=True)


def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def grouped_attention(x: torch.Tensor, cfg: TransformerConfig) -> torch.Tensor:
    spec = cfg.attention
    h, d = cfg.hidden_dim, spec.head_dim
    q = heads(F.linear(x, weight(spec.num_heads * d, h)), spec.num_heads)
    k = heads(F.linear(x, weight(spec.num_kv_heads * d, h)), spec.num_kv_heads)
    v = heads(F.linear(x, weight(spec.num_kv_heads * d, h)), spec.num_kv_heads)
    return F.linear(attend(q, k, v), weight(h, spec.num_heads * d))


def latent_attention(x: torch.Tensor, cfg: TransformerConfig) -> torch.Tensor:
    spec, h = cfg.attention, cfg.hidden_dim
    assert isinstance(spec, LatentAttention) and spec.q_lora_rank
    a, nope, rope, v_dim = (
        spec.num_heads, spec.qk_nope_head_dim, spec.qk_rope_head_dim, spec.v_head_dim,
    )  # fmt: skip
    q = F.linear(x, weight(spec.q_lora_rank, h))
    q = heads(F.linear(q, weight(a * (nope + rope), spec.q_lora_rank)), a)
    joint = F.linear(x, weight(spec.kv_lora_rank + rope, h))
    latent, shared = joint.split([spec.kv_lora_rank, rope], -1)
    expanded = heads(F.linear(latent, weight(a * (nope + v_dim), spec.kv_lora_rank)), a)
    k, v = expanded.split([nope, v_dim], -1)
    k = torch.cat([k, shared.unsqueeze(1).expand(-1, a, -1, -1)], -1)
    # Math attention: the counter has no formula for fused kernels with d_v unlike d_qk.
    p = (q @ k.transpose(-1, -2)).softmax(-1)
    return F.linear((p @ v).transpose(1, 2).flatten(2), weight(h, a * v_dim))


def feed_forward(x: torch.Tensor, cfg: TransformerConfig) -> torch.Tensor:
    h, ffn = cfg.hidden_dim, cfg.mlp.ffn_dim
    if not cfg.mlp.gated:
        return F.linear(F.gelu(F.linear(x, weight(ffn, h))), weight(h, ffn))
    gate, up = F.linear(x, weight(ffn, h)), F.linear(x, weight(ffn, h))
    return F.linear(F.silu(gate) * up, weight(h, ffn))


def mixture(x: torch.Tensor, cfg: TransformerConfig) -> torch.Tensor:
    """Balanced experts: every expert gets tokens * chosen / experts rows, the first ones here."""
    moe, h = cfg.moe, cfg.hidden_dim
    assert moe is not None
    rows = x.flatten(0, 1)
    logits = F.linear(rows, weight(moe.num_experts, h))
    m = rows.shape[0] * moe.num_active // moe.num_experts
    received = rows[:m].expand(moe.num_experts, m, h)
    w = [torch.empty(moe.num_experts, *s, device="meta", requires_grad=True)
         for s in ((h, 2 * moe.expert_ffn_dim), (moe.expert_ffn_dim, h))]  # fmt: skip
    gate, up = (received @ w[0]).chunk(2, -1)
    y = ((F.silu(gate) * up) @ w[1]).sum() + logits.sum()
    if moe.shared_ffn_dim:
        shape = dataclasses.replace(cfg.mlp, ffn_dim=moe.shared_ffn_dim)
        y = y + feed_forward(x, dataclasses.replace(cfg, mlp=shape)).sum()
    return x + y


def counted(run: Callable[[], torch.Tensor]) -> int:
    """Forward and backward flops of a run, by the counter."""
    with FlopCounterMode(display=False) as counter:
        run().sum().backward()
    return int(counter.get_total_flops())


def ours(workload: object) -> float:
    """All matrix flops, the fifth product of a fused attention backward left out.

    The counter sees attention's backward as four products; a fused one computes Q K^T again.
    """
    total = 0.0
    for node in workload:  # type: ignore[attr-defined]
        total += node.count * node.op.min_flops().get(BF16, 0)
        if node.op.name == "flash_attention_2_backward":
            total -= (
                node.count
                * 2
                * node.op.head_dim
                * (node.op.batch * node.op.num_heads * node.op.num_pairs())
            )
    return total


def residual_layer(cfg: TransformerConfig, block: Block) -> torch.Tensor:
    x = torch.empty(BATCH, LEN, cfg.hidden_dim, device="meta", requires_grad=True)
    latent = isinstance(cfg.attention, LatentAttention)
    y = x + (latent_attention if latent else grouped_attention)(x, cfg)
    return y + block(y, cfg)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama3-8b", "dense"),
        ("gpt2", "dense"),
        ("opt-6.7b", "dense"),
        ("gemma-7b", "dense"),
        ("mixtral-8x7b", "moe"),
        ("deepseek-v3", "dense"),
        ("deepseek-v3", "moe"),
    ],
)
def test_a_layer_has_the_flops_torch_counts(name: str, kind: str) -> None:
    cfg = load_hf_config(f"examples/{name}.json")
    block = mixture if kind == "moe" else feed_forward
    mine = layer(cfg, kind=kind, batch=BATCH, len_q=LEN, training=True, causal=False)
    assert ours(mine) == counted(lambda: residual_layer(cfg, block))


@pytest.mark.parametrize("name", ["llama3-8b", "gpt2"])
def test_a_whole_model_has_the_flops_torch_counts(name: str) -> None:
    cfg = dataclasses.replace(load_hf_config(f"examples/{name}.json"), num_layers=3)

    def run() -> torch.Tensor:
        table = weight(cfg.vocab_size, cfg.hidden_dim)
        ids = torch.empty(BATCH, LEN, dtype=torch.long, device="meta")
        x = F.embedding(ids, table)
        for _ in range(cfg.num_layers):
            x = x + grouped_attention(x, cfg)
            x = x + feed_forward(x, cfg)
        head = table if cfg.tied_embeddings else weight(cfg.vocab_size, cfg.hidden_dim)
        return F.linear(x, head)

    one = ours(layer(cfg, batch=BATCH, len_q=LEN, training=True, causal=False))
    outside = ours(ends(cfg, batch=BATCH, len_q=LEN, training=True))
    torch_flops = counted(run)
    assert 3 * one + outside == torch_flops
    # The MFU convention counts half the square that the counter counts whole.
    square = 3 * 3 * 4 * BATCH * LEN**2 * cfg.attention.num_heads * cfg.attention.head_dim
    assert model_flops(cfg, LEN, BATCH * LEN) + square / 2 == torch_flops


def test_forward_alone_is_a_third_without_the_recomputed_scores() -> None:
    cfg = load_hf_config("examples/llama3-8b.json")
    step = layer(cfg, batch=BATCH, len_q=LEN, training=True, causal=False)
    forward, backward = ours(step.select(phase=FORWARD)), ours(step.select(phase=BACKWARD))
    assert backward == 2 * forward
