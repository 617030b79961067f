"""Mixers in the place of attention: parameters and flops against PyTorch, counts by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hwmodels.dtypes import BF16
from hwmodels.errors import InputError
from workloads.models.activations import kv_cache_bytes, layer_bytes, mixer_state_bytes
from workloads.models.architecture import TransformerConfig
from workloads.models.config import load_hf_config
from workloads.models.mixers import GatedConv, GatedDelta, Mamba, Mamba2
from workloads.models.parameters import count_parameters, layer_parameters, parameters_per_rank
from workloads.models.transformer import decode_step, layer, model_flops, prefill_step
from workloads.ops.matmul import Matmul
from workloads.ops.short_conv import ShortConv
from workloads.ops.ssd_scan import SsdScan
from workloads.ops.ssd_scan_backward import SsdScanBackward
from workloads.plan import Plan, Recompute
from workloads.workload import BACKWARD, FORWARD

NAMES = ("bamba-9b", "jamba-v0.1", "qwen3-next-80b-a3b", "lfm2-1.2b")
BATCH, LEN = 2, 640


def example(name: str) -> TransformerConfig:
    return load_hf_config(f"examples/{name}.json")


def written(tmp_path: Path, **keys: object) -> TransformerConfig:
    file = tmp_path / "one.json"
    file.write_text(json.dumps(keys))
    return load_hf_config(file)


# ---- parameters, against modules ------------------------------------------------------------


class Bag(nn.Module):
    """Parameters of those sizes beside modules, as a mixer of Hugging Face transformers has."""

    def __init__(self, *sizes: int, **modules: nn.Module) -> None:
        super().__init__()
        for i, size in enumerate(sizes):
            self.register_parameter(f"p{i}", nn.Parameter(torch.empty(size)))
        for name, module in modules.items():
            self.add_module(name, module)


def taps(channels: int, width: int, bias: bool) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, width, groups=channels, bias=bias)


def mamba2_module(m: Mamba2, d: int) -> nn.Module:
    inner = m.num_heads * m.head_dim
    conv = inner + 2 * m.num_groups * m.state_dim
    return Bag(
        m.num_heads, m.num_heads, m.num_heads, inner,  # dt_bias, A_log, D, norm
        in_proj=nn.Linear(d, inner + conv + m.num_heads, bias=m.bias),
        conv1d=taps(conv, m.width, m.conv_bias),
        out_proj=nn.Linear(inner, d, bias=m.bias),
    )  # fmt: skip


def mamba_module(m: Mamba, d: int) -> nn.Module:
    norms = (m.dt_rank, m.state_dim, m.state_dim) if m.inner_norms and m.norm_scales else ()
    return Bag(
        m.channels * m.state_dim, m.channels, *norms,
        in_proj=nn.Linear(d, 2 * m.channels, bias=m.bias),
        conv1d=taps(m.channels, m.width, m.conv_bias),
        x_proj=nn.Linear(m.channels, m.dt_rank + 2 * m.state_dim, bias=False),
        dt_proj=nn.Linear(m.dt_rank, m.channels, bias=True),
        out_proj=nn.Linear(m.channels, d, bias=m.bias),
    )  # fmt: skip


def delta_module(m: GatedDelta, d: int) -> nn.Module:
    keys, values = m.num_key_heads * m.key_dim, m.num_heads * m.value_dim
    return Bag(
        m.num_heads, m.num_heads, m.value_dim,
        in_proj_qkvz=nn.Linear(d, 2 * keys + 2 * values, bias=False),
        in_proj_ba=nn.Linear(d, 2 * m.num_heads, bias=False),
        conv1d=taps(2 * keys + values, m.width, bias=False),
        out_proj=nn.Linear(values, d, bias=False),
    )  # fmt: skip


def conv_module(m: GatedConv, d: int) -> nn.Module:
    return Bag(
        in_proj=nn.Linear(d, 3 * d, bias=m.bias),
        conv=taps(d, m.width, m.conv_bias),
        out_proj=nn.Linear(d, d, bias=m.bias),
    )


MODULES: dict[type, Callable[..., nn.Module]] = {
    Mamba2: mamba2_module, Mamba: mamba_module, GatedDelta: delta_module, GatedConv: conv_module,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("biased", [False, True])
def test_a_mixers_parameters_are_those_of_its_module(name: str, biased: bool) -> None:
    cfg = example(name)
    assert cfg.mixer is not None
    cfg = replace(cfg, mixer=replace(cfg.mixer, conv_bias=biased))
    if not isinstance(cfg.mixer, GatedDelta):
        cfg = replace(cfg, mixer=replace(cfg.mixer, bias=biased))
    else:
        cfg = replace(cfg, mixer=replace(cfg.mixer, conv_bias=False))
    with torch.device("meta"):
        module = MODULES[type(cfg.mixer)](cfg.mixer, cfg.hidden_dim)
    kind = cfg.kind_of(cfg.mixer_layers[0])
    expected = sum(p.numel() for p in module.parameters())
    assert layer_parameters(cfg, kind).mixer == expected


def test_totals_of_published_checkpoints(tmp_path: Path) -> None:
    """Counts that the checkpoints' pages state, of sizes that are no example here."""
    lfm2 = json.loads(Path("examples/lfm2-1.2b.json").read_text())
    for heads, hidden, ffn, total in (
        (16, 1024, 6656, 354_483_968),
        (24, 1536, 10240, 742_489_344),
    ):
        sizes = {"hidden_size": hidden, "block_dim": hidden, "conv_dim": hidden,
                 "block_ff_dim": ffn, "num_attention_heads": heads}  # fmt: skip
        assert count_parameters(written(tmp_path, **lfm2 | sizes)).total == total
    small = {"model_type": "mamba", "hidden_size": 768, "num_hidden_layers": 24, "use_bias": False}
    assert count_parameters(written(tmp_path, **small, vocab_size=50280)).total == 129_135_360
    falcon = {"model_type": "falcon_mamba", "hidden_size": 4096, "num_hidden_layers": 64,
              "vocab_size": 65024, "tie_word_embeddings": False}  # fmt: skip
    assert count_parameters(written(tmp_path, **falcon)).total == 7_272_665_088
    codestral = {"model_type": "mamba2", "hidden_size": 4096, "num_hidden_layers": 64,
                 "vocab_size": 32768}  # fmt: skip
    assert count_parameters(written(tmp_path, **codestral)).total == 7_285_403_648


@pytest.mark.parametrize("name", NAMES)
def test_ranks_share_a_mixer(name: str) -> None:
    """Twice: heads or channels in two; norms and the outputs of rows whole."""
    cfg = example(name)
    assert cfg.mixer is not None
    whole, half = (
        sum(m.num_weights for m in cfg.mixer.matrices(cfg.hidden_dim, tp)) for tp in (1, 2)
    )
    shared = 0  # one group cannot be divided: both ranks have its B and C
    if isinstance(cfg.mixer, Mamba2):
        shared = 2 * cfg.hidden_dim * cfg.mixer.state_dim
    assert 2 * half == whole + shared
    tp = np.array([1.0, 2.0])
    assert list(cfg.mixer.small(tp)) == [cfg.mixer.small(1), cfg.mixer.small(2)]


@pytest.mark.parametrize("name", NAMES)
def test_stages_hold_what_their_layers_have(name: str) -> None:
    cfg = example(name)
    plans = Plan(tp=np.array([1.0, 2.0, 2.0]), pp=np.array([1.0, 2.0, 4.0]))
    first, last = parameters_per_rank(cfg, plans)
    for i, (tp, pp) in enumerate(((1, 1), (2, 2), (2, 4))):
        num = cfg.num_layers // pp
        own = [layer_parameters(cfg, cfg.kind_of(j), tp) for j in range(num)]
        table = cfg.vocab_size // tp * cfg.hidden_dim
        ends = table if pp > 1 else (1 if cfg.tied_embeddings else 2) * table + cfg.hidden_dim
        assert first.total[i] == sum(o.total for o in own) + ends
        one = parameters_per_rank(cfg, Plan(tp=tp, pp=pp))
        assert (first.total[i], last.total[i]) == (one[0].total, one[1].total)


# ---- flops -----------------------------------------------------------------------------------


def counted(run: Callable[[], torch.Tensor]) -> tuple[int, int]:
    """Forward flops, and those of forward and backward, by PyTorch's counter."""
    found = []
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            out = run().sum()
            if backward:
                out.backward()
        found.append(int(counter.get_total_flops()))
    return found[0], found[1]


@pytest.mark.parametrize("name", NAMES)
def test_projections_are_those_of_the_flop_counter(name: str) -> None:
    """Each with its input: what lies between them is no product."""
    cfg = example(name)
    assert cfg.mixer is not None
    matrices = cfg.mixer.matrices(cfg.hidden_dim)

    def run() -> torch.Tensor:
        total = torch.zeros((), device="meta")
        for m in matrices:
            x = torch.empty(BATCH, LEN, int(m.k), device="meta", requires_grad=True)
            w = torch.empty(int(m.n), int(m.k), device="meta", requires_grad=True)
            total = total + F.linear(x, w).sum()
        return total

    forward, both = counted(run)
    kind = cfg.kind_of(cfg.mixer_layers[0])
    work = layer(cfg, kind=kind, batch=BATCH, len_q=LEN, training=True)
    for phase, expected in ((FORWARD, forward), (BACKWARD, both - forward)):
        nodes = work.select(phase=phase, part="mixer")
        ours = sum(n.op.min_flops()[BF16] for n in nodes if isinstance(n.op, Matmul))
        assert ours == expected


@pytest.mark.parametrize("name", NAMES)
def test_taps_are_those_of_the_flop_counter(name: str) -> None:
    cfg = example(name)
    assert cfg.mixer is not None
    channels, width = int(cfg.mixer.conv_channels()), cfg.mixer.width

    def run() -> torch.Tensor:
        x = torch.empty(BATCH, channels, LEN + width - 1, device="meta", requires_grad=True)
        w = torch.empty(channels, 1, width, device="meta", requires_grad=True)
        return F.conv1d(x, w, groups=channels)

    forward, _ = counted(run)
    kind = cfg.kind_of(cfg.mixer_layers[0])
    work = layer(cfg, kind=kind, batch=BATCH, len_q=LEN, training=False)
    (conv,) = [n.op for n in work if isinstance(n.op, ShortConv)]
    assert conv.elements() * 2 * conv.width == forward == 2 * width * channels * BATCH * LEN


def test_the_scan_in_chunks_and_its_gradients_are_those_of_the_flop_counter() -> None:
    """Whole chunks; a kernel's backward pass makes C B^T and the states again."""
    chunk, chunks, groups, share, n, p = 32, 5, 2, 3, 16, 24

    def run() -> torch.Tensor:
        def leaf(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, device="meta", requires_grad=True)

        b, c = leaf(BATCH, groups, chunks, chunk, n), leaf(BATCH, groups, chunks, chunk, n)
        u = leaf(BATCH, groups, share, chunks, chunk, p)
        decay = torch.empty(BATCH, groups, share, chunks, chunk, chunk, device="meta")
        inner = c @ b.transpose(-1, -2)
        y = (decay * inner.unsqueeze(2)) @ u
        wide = (BATCH, groups, share, chunks, chunk, n)
        states = b.unsqueeze(2).expand(wide).transpose(-1, -2) @ u
        return y + c.unsqueeze(2).expand(wide) @ states

    forward, both = counted(run)
    shape = {"batch": BATCH, "len_seq": chunk * chunks, "num_heads": groups * share,
             "num_groups": groups, "head_dim": p, "state_dim": n, "chunk": chunk}  # fmt: skip
    assert SsdScan(**shape).work(2**52).tensor_flops[BF16] == forward
    again = BATCH * chunks * (groups * 2 * chunk**2 * n + groups * share * 2 * chunk * n * p)
    backward = SsdScanBackward(**shape).work(0).tensor_flops[BF16]
    assert backward == both - forward + again


def test_model_flops_are_weights_and_recurrences() -> None:
    """LFM2 by hand: 6 attention layers of 32 heads of 64, 10 of three taps a channel."""
    weights = 16 * 3 * 2048 * 8192 + 6 * 2048 * (2 * 2048 + 2 * 512) + 10 * 4 * 2048**2
    weights += 65536 * 2048
    scores = 6 * 4 * 32 * 64 * (1024 / 2)
    assert model_flops(example("lfm2-1.2b"), 1024, 1) == 3 * (
        2 * weights + scores + 10 * 2 * 3 * 2048
    )
    short, long = (model_flops(example("bamba-9b"), n, 1) for n in (1024, 2048))
    assert long - short == 3 * 3 * 4 * 32 * 128 * 512  # only three layers see the length


# ---- layers ----------------------------------------------------------------------------------


def test_a_layer_without_a_block_is_a_mixer_alone(tmp_path: Path) -> None:
    keys = {"model_type": "mamba2", "hidden_size": 4096, "num_hidden_layers": 2,
            "vocab_size": 1000}  # fmt: skip
    cfg = written(tmp_path, **keys)
    assert cfg.kinds == {"mamba2": 2}
    work = layer(cfg, kind="mamba2", batch=1, len_q=128, training=True)
    forward = [n.name for n in work.select(phase=FORWARD)]
    assert forward == ["attention_norm", "mixer_in", "mixer_conv", "mixer_scan", "mixer_gate",
                       "mixer_norm", "mixer_out", "attention_residual"]  # fmt: skip
    assert len(work.select(phase=BACKWARD)) == 2 + 2 * 2 + 4  # norm's two, two products', maps'


@pytest.mark.parametrize("name", NAMES)
def test_decoding_steps_from_held_states(name: str) -> None:
    cfg = example(name)
    kind = cfg.kind_of(cfg.mixer_layers[0])
    told = {"batch": 4, "len_context": 4096}
    new = decode_step(cfg, **told).layer(kind, Plan())
    read = prefill_step(cfg, **told).layer(kind, Plan())
    assert new["mixer_conv"].op.update and not read["mixer_conv"].op.update
    if "conv" not in kind:
        assert "step" in new["mixer_scan"].op.name and "step" not in read["mixer_scan"].op.name


def test_a_sequence_is_not_split() -> None:
    cfg = example("bamba-9b")
    with pytest.raises(InputError, match=r"bamba-9b: its mamba2 layers .* give cp = 1"):
        layer(cfg, kind="dense mamba2", batch=1, len_q=4096, plan=Plan(cp=2), training=True)
    layer(cfg, kind="dense", batch=1, len_q=4096, plan=Plan(cp=2), training=True)


def test_what_is_not_told_apart_is_refused() -> None:
    cfg = example("bamba-9b")
    with pytest.raises(InputError, match="windows beside mamba2 layers is not modelled"):
        replace(cfg, window=4096, num_windowed_layers=3)
    with pytest.raises(InputError, match="belong together"):
        replace(cfg, mixer_layers=())
    with pytest.raises(InputError, match="within the model's 32 layers"):
        replace(cfg, mixer_layers=(0, 32))


# ---- memory ----------------------------------------------------------------------------------


def test_a_mixer_keeps_what_its_ops_take() -> None:
    """Bamba by hand, a token: x, its norm, z, xBC before and after the taps, dt, y thrice."""
    cfg = example("bamba-9b")
    block = 2 * 4096 + 3 * 14336
    mixed = 2 * 4096 + 8192 + 2 * (8192 + 256) + 128 + 3 * 8192
    asked = {"kind": "dense mamba2", "batch": 1, "len_seq": 1024}
    assert layer_bytes(cfg, **asked) == 1024 * 2 * (block + mixed)
    assert layer_bytes(cfg, **asked, plan=Plan(recompute=Recompute.FULL)) == 1024 * 2 * 4096
    same = layer_bytes(cfg, **asked, plan=Plan(recompute=Recompute.SELECTIVE))
    assert same == layer_bytes(cfg, **asked)


def test_states_do_not_grow_with_the_length() -> None:
    """Bamba: 128 x 128 x 64 numbers in fp32 and 3 inputs of 8448 channels, in 29 of 32 layers."""
    cfg = example("bamba-9b")
    states = 29 * (128 * 128 * 64 * 4 + 3 * 8448 * 2)
    assert 32 * mixer_state_bytes(cfg) == states
    cache = [kv_cache_bytes(cfg, batch=1, len_context=n) for n in (1000, 2000)]
    assert cache[0] == states + 3 * 1000 * 2 * 8 * 128 * 2
    assert cache[1] - cache[0] == 3 * 1000 * 2 * 8 * 128 * 2


# ---- configs ---------------------------------------------------------------------------------


def test_layers_are_where_their_configs_put_them() -> None:
    jamba = example("jamba-v0.1")
    assert [i for i in range(32) if i not in jamba.mixer_layers] == [4, 12, 20, 28]
    assert jamba.moe is not None and jamba.moe.layers == tuple(range(1, 32, 2))
    assert (jamba.attention.rope_dim, jamba.kind_of(4), jamba.kind_of(5)) == (
        0, "dense", "moe mamba",
    )  # fmt: skip
    qwen = example("qwen3-next-80b-a3b")
    assert [i for i in range(48) if i not in qwen.mixer_layers] == list(range(3, 48, 4))
    assert (qwen.attention.rope_dim, qwen.attention.out_gate) == (64, True)
    assert example("lfm2-1.2b").mlp.ffn_dim == 8192


def test_layer_types_say_the_same_as_indices(tmp_path: Path) -> None:
    keys = json.loads(Path("examples/lfm2-1.2b.json").read_text())
    attended = keys.pop("full_attn_idxs")
    types = ["full_attention" if i in attended else "conv" for i in range(16)]
    assert replace(written(tmp_path, **keys, layer_types=types), name="lfm2-1.2b") == example(
        "lfm2-1.2b"
    )
    with pytest.raises(InputError, match=r"one.json: layer_types: names 15 of 16 layers"):
        written(tmp_path, **keys, layer_types=types[1:])
    with pytest.raises(InputError, match="names 'sliding_attention'"):
        written(tmp_path, **keys, layer_types=["sliding_attention", *types[1:]])


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("bamba-9b", {"mamba_n_heads": 64}, "mamba_n_heads: is 64: with 64 channels"),
        ("bamba-9b", {"attn_layer_indices": [40]}, "attn_layer_indices: leaves the 32 layers"),
        ("bamba-9b", {"mamba_n_groups": 3}, "3 groups of a Mamba-2 mixer do not divide"),
        ("bamba-9b", {"mamba_expand": "two"}, "mamba_expand: is \"two\", not a number"),
        ("bamba-9b", {"mamba_expand": 0}, "mamba_expand: is 0; give a number above 0"),
        ("jamba-v0.1", {"attn_layer_offset": 8}, "attn_layer_offset: is 8; give less"),
        ("qwen3-next-80b-a3b", {"linear_num_key_heads": 5}, "5 key heads of a gated delta net"),
        ("lfm2-1.2b", {"conv_dim": 1024}, "conv_dim: is not hidden_size = 2048"),
    ],
)  # fmt: skip
def test_bad_configs_are_one_line(
    tmp_path: Path, name: str, change: dict[str, object], told: str
) -> None:
    keys = json.loads(Path(f"examples/{name}.json").read_text())
    with pytest.raises(InputError) as caught:
        written(tmp_path, **keys | change)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
