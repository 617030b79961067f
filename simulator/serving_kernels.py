"""The kernels that a serving engine launches for one forward pass of one rank, in their order.

`forward_kernels` lists them for a batch of prompts and of decoding sequences, layer by layer:

    norm; q, k, v; norm of heads; rotation and cache write; attention; output product; all-reduce
    norm; gate and up; activation; down                                       of a dense layer
    norm; router, choice; routed experts; shared experts                      of routed experts
    all-reduce, or with attention data parallel dispatch and combine
    embedding; final norm; head and gather of logits, sampling                once a pass

Latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) goes down to its latents, decodes in
the absorbed form (two batched products beside it) and takes prompts expanded. Tensor parallel
ranks split heads, widths and the vocabulary; key heads are copied where there are more ranks.
What differs between engines are facts in `ENGINES`: which kernel serves attention, whether
rotation is fused into it and norms into the all-reduce. Pipeline stages share out the layers: the
list is that of all stages together.

Weights come from device memory, activations from the L2. Left out: biases, masks, the
bookkeeping of the batch (the host's share: `simulator.serving`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from hwmodels.device import Device
from hwmodels.dtypes import BF16, FP8, FP32, NVFP4, DType
from hwmodels.errors import InputError, UnknownNameError, UnsupportedError
from simulator.kernel_time.model import COLD, REPLAYED, ROTATED, Conditions
from workloads.models.architecture import Attention, LatentAttention, TransformerConfig
from workloads.numeric import ceil_div
from workloads.op import Op
from workloads.ops.collective_transfer import (
    ClusterCollective,
    CollectiveTransfer,
    CustomAllReduce,
)
from workloads.ops.decode_attention import DecodeAttention, MlaDecode
from workloads.ops.embedding import Embedding
from workloads.ops.expert_exchange import ExpertExchange
from workloads.ops.matmul import BatchedMatmul, Matmul
from workloads.ops.norm import RmsNorm
from workloads.ops.prefill_attention import MlaPrefill, PrefillAttention
from workloads.ops.quantised_matmul import QuantisedMatmul
from workloads.ops.row_map import RowMap
from workloads.ops.served_experts import ServedExperts
from workloads.ops.softmax import Softmax

CUSTOM_BYTES: Final = 8 * 2**20
"""Largest message of an engine's own all-reduce; NCCL takes the rest (vLLM,
custom_all_reduce.py, `max_size=8192 * 1024`)."""
DOMAIN_RANKS: Final[Mapping[str, int]] = {"gb200": 72, "gb300": 72}
"""GPUs on one NVLink switch, where it joins more than a board's (NVIDIA, GB200 NVL72)."""
BOARD_RANKS: Final = 8
EXPERTS: Final = "experts"
"""The part of a pass that shared experts run beside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Facts of a serving engine; kernel names by the major number of the compute capability.

    `fuses_rotation`: rotation and cache write are part of the attention kernel. `fuses_norms`:
    where the all-reduce adds the residual and normalises. `page_tokens`: tokens of a page of the
    cache. `fuses_quantisers`: formats into which the
    kernel before a product quantises. `mixes`: prompts share a pass with decoding sequences.
    `blockwise`: whose kernels multiply blockwise fp8, where not the engine's own.
    """

    name: str
    decode: Mapping[str, str]
    decode_fp8: Mapping[str, str]
    prefill: Mapping[str, str]
    latent_decode: Mapping[str, str]
    latent_prefill: Mapping[str, str]
    fuses_rotation: bool
    fuses_norms: tuple[str, ...]
    page_tokens: int
    fuses_quantisers: tuple[DType, ...]
    mixes: bool
    blockwise: Mapping[str, str] = field(default_factory=dict)


ENGINES: Final[Mapping[str, Engine]] = {
    "trtllm": Engine(
        name="trtllm",
        decode={"9": "xqa", "10": "trtllm-gen"},
        decode_fp8={"9": "xqa-wgmma", "10": "trtllm-gen"},
        prefill={"9": "trtllm", "10": "trtllm-gen"},
        latent_decode={"9": "trtllm-mla", "10": "trtllm-gen-mla"},
        latent_prefill={"9": "trtllm", "10": "trtllm-gen"},
        fuses_rotation=True,
        fuses_norms=("8", "9", "10", "12"),
        page_tokens=32,
        fuses_quantisers=(FP8, NVFP4),
        mixes=True,
    ),
    "vllm": Engine(
        name="vllm",
        decode={"9": "fa3", "10": "trtllm-gen"},
        decode_fp8={"9": "fa3", "10": "trtllm-gen"},
        prefill={"9": "fa3", "10": "trtllm-gen"},
        latent_decode={"9": "flashmla", "10": "flashmla"},
        latent_prefill={"9": "fa3-latent", "10": "trtllm-gen"},
        fuses_rotation=False,
        fuses_norms=("10",),
        page_tokens=16,
        fuses_quantisers=(FP8,),
        mixes=True,
    ),
    "sglang": Engine(
        name="sglang",
        decode={"9": "fa3-sgl", "10": "trtllm-gen"},
        decode_fp8={"9": "fa3-sgl", "10": "trtllm-gen"},
        prefill={"9": "fa3", "10": "trtllm-gen"},
        latent_decode={"9": "fa3-mla", "10": "trtllm-gen-mla"},
        latent_prefill={"9": "fa3", "10": "trtllm-gen"},
        fuses_rotation=False,
        fuses_norms=("10",),
        page_tokens=1,
        fuses_quantisers=(FP8,),
        mixes=False,
        blockwise={"10": "trtllm"},
    ),
}
"""Attention kernels: what the published kernel timings of each engine name on that architecture.
`fuses_norms` is TensorRT-LLM's AllReduceFusionOp and, on Blackwell, FlashInfer's as the published
benchmarks switch it on (InferenceX, benchmarks/70b_fp8_b200_docker.sh `enable_fi_allreduce_fusion`,
dsr1_fp8_b200.sh `--enable-flashinfer-allreduce-fusion`); `mixes` SGLang's scheduler, which runs
prompts first. `page_tokens` are defaults: vLLM's block_size, TensorRT-LLM's tokens_per_block,
SGLang's page_size. Not documented but settled on serving rows that a calibration may use:
`fuses_quantisers` (with a quantiser of its own before every product, steps of fp8 models came out
up to a quarter too long) and `blockwise` (SGLang's own blockwise products on Blackwell came out a
third too long)."""


def engine(name: str) -> Engine:
    """The engine of that name."""
    if name not in ENGINES:
        raise UnknownNameError("serving engine", name, ENGINES, "one of " + ", ".join(ENGINES))
    return ENGINES[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """How a linear layer is stored and multiplied; `scheme` as of `QuantisedMatmul`."""

    dtype: DType = BF16
    weight_dtype: DType | None = None
    scheme: str = "tensor"

    @property
    def stored(self) -> DType:
        """Format of the weights in memory."""
        return self.weight_dtype or self.dtype

    @property
    def is_blockwise_fp8(self) -> bool:
        """Does every block of 128 activations get a scale of its own, found as they come?"""
        return self.dtype == FP8 and self.scheme == "block"


PLAIN_LINEAR: Final = Linear()


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """Number formats of a served model by part; router, embedding, head and norms are bf16."""

    attention: Linear = PLAIN_LINEAR
    mlp: Linear = PLAIN_LINEAR
    experts: Linear = PLAIN_LINEAR
    cache: DType = BF16


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Ranks of one engine: tp of attention, replicas of attention, tp and ep of routed experts.

    `pp` stages of so many ranks each share out the layers.
    """

    tp: int = 1
    attn_dp: int = 1
    moe_tp: int = 1
    moe_ep: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        if min(self.tp, self.attn_dp, self.moe_tp, self.moe_ep, self.pp) < 1:
            raise InputError("a degree of parallelism is below 1; give whole numbers from 1")

    @property
    def num_ranks(self) -> int:
        """GPUs of one pipeline stage."""
        return self.tp * self.attn_dp

    @property
    def num_gpus(self) -> int:
        """GPUs of one engine."""
        return self.num_ranks * self.pp


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model as it is served: on which device, by which engine, in which formats, split how.

    `routing` is that of `MoeFfn` (of three laws tried on rows that a calibration may use, this one
    and a power of 1.2 do equally well, even loads worse); `expert_kernel` the label of the routed
    experts' kernel, empty for the usual one.
    """

    config: TransformerConfig
    device: Device
    engine: Engine
    formats: Formats
    layout: Layout
    routing: str = "power_law_1.01"
    expert_kernel: str = ""

    def __post_init__(self) -> None:
        cfg, split = self.config, self.layout
        if cfg.split_parts % split.tp:
            parts = "" if cfg.mixer is None else f" of attention and {cfg.mixer.label} layers"
            raise InputError(
                f"{split.tp} tensor parallel ranks do not divide {cfg.split_parts} heads{parts}"
            )
        if cfg.moe and split.moe_tp * split.moe_ep != split.num_ranks:
            raise InputError(
                "the experts' tp times ep is not the number of ranks; give degrees that agree"
            )
        if split.pp > cfg.num_layers:
            raise InputError(f"{split.pp} stages are more than {cfg.num_layers} layers; give fewer")
        if cfg.moe and cfg.moe.num_experts % split.moe_ep:
            raise InputError(f"{split.moe_ep} ranks do not divide the experts; give a divisor")

    @property
    def major(self) -> str:
        """Major number of the device's compute capability."""
        return (self.device.compute_capability or "").split(".")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One pass of a rank: `num_prompts` prompts of `len_prompt`, `num_decoding` sequences.

    `len_context` is the mean length of the caches that the decoding sequences read.
    """

    num_prompts: float = 0
    len_prompt: int = 1
    num_decoding: float = 0
    len_context: float = 1

    @property
    def num_tokens(self) -> float:
        """Rows of the linear layers."""
        return self.num_prompts * self.len_prompt + self.num_decoding

    @property
    def num_sampled(self) -> float:
        """Rows of the head."""
        return self.num_prompts + self.num_decoding


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One op of a pass, how it runs, and how often; `beside`: on a second stream."""

    part: str
    op: Op
    times: float
    conditions: Conditions
    beside: bool = False


def forward_kernels(served: Served, batch: Batch) -> Iterator[Kernel]:
    """Every kernel of one pass but those of mixers in the place of attention
    (`simulator.mixer_kernels`).
    """
    cfg = served.config
    for windowed, layers in _by_window(cfg):
        for kernel in attention_kernels(served, batch, window=windowed):
            yield _repeated(kernel, layers)
    yield from _repeat(mlp_kernels(served, batch), cfg.num_dense_layers)
    yield from _repeat(moe_kernels(served, batch), cfg.num_moe_layers)
    yield from end_kernels(served, batch)


def _by_window(cfg: TransformerConfig) -> tuple[tuple[int | None, int], ...]:
    whole = cfg.num_attention_layers - (cfg.num_windowed_layers if cfg.window else 0)
    both = ((None, whole), (cfg.window, cfg.num_attention_layers - whole))
    return tuple((window, layers) for window, layers in both if layers)


def _repeated(kernel: Kernel, layers: float) -> Kernel:
    return replace(kernel, times=kernel.times * layers)


def _repeat(kernels: Iterator[Kernel], layers: int) -> Iterator[Kernel]:
    if layers:
        yield from (_repeated(kernel, layers) for kernel in kernels)


# ---- attention -------------------------------------------------------------------------------


def attention_kernels(served: Served, batch: Batch, *, window: int | None) -> Iterator[Kernel]:
    """The attention block of one layer, its norm and its all-reduce."""
    yield from layer_norm(served, batch.num_tokens)
    attention = served.config.attention
    if isinstance(attention, LatentAttention):
        yield from _latent(served, batch, attention)
    else:
        yield from _grouped(served, batch, attention, window)
    out_k = attention.num_heads // served.layout.tp * attention.v_head_dim
    linear = served.formats.attention
    yield linear_product(
        served, "output", linear, batch.num_tokens, served.config.hidden_dim, out_k
    )
    yield from all_reduce(served, batch.num_tokens, served.layout.tp)


def _grouped(
    served: Served, batch: Batch, attention: Attention, window: int | None
) -> Iterator[Kernel]:
    """Heads of this rank: q, k, v, their norm, rotation and cache write, attention."""
    heads = attention.num_heads // served.layout.tp
    kv_heads = _shard(attention.num_kv_heads, served.layout.tp)
    width = (heads + 2 * kv_heads) * attention.head_dim
    tokens, hidden = batch.num_tokens, served.config.hidden_dim
    gates = heads * attention.head_dim * attention.out_gate
    linear = served.formats.attention
    yield linear_product(served, "qkv", linear, tokens, width + gates, hidden)
    if attention.qk_norm:
        rows = tokens * (heads + kv_heads)
        yield small("qk norm", RmsNorm(rows=rows, cols=attention.head_dim))
    if not served.engine.fuses_rotation:
        yield small("rope", RowMap(rows=tokens, cols=width, vector_flops_per_element=3))
        written = 2 * kv_heads * attention.head_dim
        out = served.formats.cache
        yield small("cache", RowMap(rows=tokens, cols=written, out_dtype=out))
    sizes = heads, kv_heads, attention.head_dim
    if batch.num_decoding:
        yield _decode(served, batch, sizes, window)
    if batch.num_prompts:
        yield _prefill(served, batch, sizes, window)
    if gates:
        op = RowMap(rows=tokens, cols=gates, num_inputs=2, special_ops_per_element=2)
        yield small("gate", op)


def _decode(
    served: Served, batch: Batch, sizes: tuple[int, int, int], window: int | None
) -> Kernel:
    cache, engine = served.formats.cache, served.engine
    heads, kv_heads, width = sizes
    narrow = cache == FP8
    kernel = (engine.decode_fp8 if narrow else engine.decode).get(served.major, "")
    op = DecodeAttention(
        batch=batch.num_decoding,
        len_kv=batch.len_context,
        window=min(window, batch.len_context) if window else None,
        dtype=BF16,
        kv_dtype=cache,
        product_dtype=cache,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width,
    )
    label = f"{engine.name}:{kernel}" if kernel else ""
    return Kernel(part="attention", op=op, times=1, conditions=Conditions(kernel=label))


def _prefill(
    served: Served, batch: Batch, sizes: tuple[int, int, int], window: int | None
) -> Kernel:
    kernel = served.engine.prefill.get(served.major, "")
    heads, kv_heads, width = sizes
    op = PrefillAttention(
        batch=batch.num_prompts,
        len_q=batch.len_prompt,
        window=min(window, batch.len_prompt) if window else None,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width,
    )
    label = f"{served.engine.name}+cache:{kernel}" if kernel else ""
    return Kernel(part="prefill attention", op=op, times=1, conditions=Conditions(kernel=label))


def _latent(served: Served, batch: Batch, attention: LatentAttention) -> Iterator[Kernel]:
    """Down to the latents, up to the heads; decoding absorbed, prompts expanded."""
    a, linear, tokens = attention, served.formats.attention, batch.num_tokens
    heads, hidden = a.num_heads // served.layout.tp, served.config.hidden_dim
    q_rank = a.q_lora_rank or 0
    down = q_rank + a.latent_dim
    yield linear_product(served, "latents", linear, tokens, down, hidden)
    yield small("latent norm", RmsNorm(rows=tokens, cols=down))
    yield linear_product(served, "queries", linear, tokens, heads * a.head_dim, q_rank or hidden)
    yield small("rope", RowMap(rows=tokens, cols=(heads + 1) * a.qk_rope_head_dim,
                                vector_flops_per_element=3))  # fmt: skip
    if batch.num_decoding:
        yield _batched(served, "absorb", heads, batch.num_decoding, a.kv_lora_rank,
                       a.qk_nope_head_dim)  # fmt: skip
        yield _latent_decode(served, batch, a, heads)
        yield _batched(served, "expand", heads, batch.num_decoding, a.v_head_dim, a.kv_lora_rank)
    if batch.num_prompts:
        rows, width = batch.num_prompts * batch.len_prompt, a.qk_nope_head_dim + a.v_head_dim
        yield linear_product(served, "keys, values", linear, rows, heads * width, a.kv_lora_rank)
        kernel = served.engine.latent_prefill.get(served.major, "")
        cache = "+fp8cache" if served.formats.cache == FP8 else "+cache"
        op = MlaPrefill(batch=batch.num_prompts, num_heads=heads, len_q=batch.len_prompt,
                        head_dim=a.head_dim, value_dim=a.v_head_dim)  # fmt: skip
        label = f"{served.engine.name}-mla{cache}:{kernel}" if kernel else ""
        yield Kernel(part="prefill attention", op=op, times=1, conditions=Conditions(kernel=label))


def _latent_decode(served: Served, batch: Batch, a: LatentAttention, heads: int) -> Kernel:
    kernel = served.engine.latent_decode.get(served.major, "")
    cache = served.formats.cache
    op = MlaDecode(
        batch=batch.num_decoding,
        num_heads=heads,
        len_kv=batch.len_context,
        latent_dim=a.kv_lora_rank,
        rope_dim=a.qk_rope_head_dim,
        dtype=BF16,
        kv_dtype=cache,
        product_dtype=cache,
    )
    label = f"{served.engine.name}:{kernel}" if kernel else ""
    return Kernel(part="attention", op=op, times=1, conditions=Conditions(kernel=label))


# ---- feed-forward ----------------------------------------------------------------------------


def mlp_kernels(served: Served, batch: Batch) -> Iterator[Kernel]:
    """The dense feed-forward block of one layer, its norm and its all-reduce."""
    yield from layer_norm(served, batch.num_tokens)
    width = served.config.mlp.ffn_dim
    yield from _gated(served, batch.num_tokens, width, served.formats.mlp, "mlp")
    yield from all_reduce(served, batch.num_tokens, served.layout.tp)


def _gated(
    served: Served, tokens: float, width: int, linear: Linear, part: str
) -> Iterator[Kernel]:
    inner, hidden = _shard(width, served.layout.tp), served.config.hidden_dim
    both = 2 if served.config.mlp.gated else 1
    yield linear_product(served, part, linear, tokens, both * inner, hidden)
    yield small("activation", RowMap(rows=tokens, cols=inner, num_inputs=both,
                                      special_ops_per_element=1))  # fmt: skip
    yield linear_product(served, part, linear, tokens, hidden, inner)


def moe_kernels(served: Served, batch: Batch) -> Iterator[Kernel]:
    """Routed and shared experts of one layer; the tokens of all replicas of attention meet."""
    moe, cfg, split = served.config.moe, served.config, served.layout
    if moe is None:
        return
    own, every = batch.num_tokens, batch.num_tokens * split.attn_dp
    yield from layer_norm(served, own)
    router = Matmul(m=own, n=moe.num_experts, k=cfg.hidden_dim)
    yield _cublas(served, "router", router)
    yield small("router", Softmax(rows=own, cols=moe.num_experts, dtype=FP32))
    linear = served.formats.experts
    experts = ServedExperts(
        num_tokens=every,
        hidden=cfg.hidden_dim,
        inter=moe.expert_ffn_dim,
        topk=moe.num_active,
        num_experts=moe.num_experts,
        tp=split.moe_tp,
        ep=split.moe_ep,
        dtype=linear.dtype,
        weight_dtype=linear.stored,
        scaling=linear.scheme,
        gated=cfg.mlp.gated,
        routing=served.routing,
    )
    yield Kernel(part=EXPERTS, op=experts, times=1,
                 conditions=Conditions(kernel=served.expert_kernel, l2=COLD))  # fmt: skip
    if moe.shared_ffn_dim:
        shared = _gated(served, own, moe.shared_ffn_dim, served.formats.mlp, "shared experts")
        yield from (replace(kernel, beside=not batch.num_prompts) for kernel in shared)
    if split.attn_dp == 1:
        yield from all_reduce(served, own, split.num_ranks)
    else:
        yield from _dispatch(served, own)


def _dispatch(served: Served, own: float) -> Iterator[Kernel]:
    """Tokens of a replica to their experts and back; gathered whole where experts are not split."""
    moe, split, hidden = served.config.moe, served.layout, served.config.hidden_dim
    assert moe is not None
    if split.moe_ep == 1:
        size = own * split.attn_dp * hidden
        yield _library(served, "all_gather", size * BF16.bytes_per_element, split.num_ranks)
        yield _library(served, "reduce_scatter", size * BF16.bytes_per_element, split.num_ranks)
        return
    nodes = num_nodes(served.device, split.num_ranks)
    few = own <= LOW_LATENCY_TOKENS
    kind = "deepep-ll" if few else "deepep-normal"
    for direction, dtype in (("dispatch", FP8), ("combine", BF16)):
        op = ExpertExchange(
            num_tokens=own,
            hidden=hidden,
            topk=moe.num_active,
            num_experts=moe.num_experts,
            num_ranks=split.moe_ep,
            num_nodes=min(nodes, split.moe_ep),
            direction=direction,
            low_latency=few,
            dtype=dtype,
        )
        label = f"{kind}-{direction}" + ("-nodes" if nodes > 1 else "")
        yield Kernel(part="exchange", op=op, times=1, conditions=Conditions(kernel=label))


LOW_LATENCY_TOKENS: Final = 128
"""Tokens of a rank up to which the low-latency kernels serve (DeepEP's README, its benchmark)."""


# ---- ends of a pass and parts they share -----------------------------------------------------


def end_kernels(served: Served, batch: Batch) -> Iterator[Kernel]:
    """Embedding, final norm, head, gather of the logits, sampling."""
    cfg, tp, rows = served.config, served.layout.tp, batch.num_sampled
    vocab = _shard(cfg.vocab_size, tp)
    lookup = Embedding(num_tokens=batch.num_tokens, vocab_size=vocab, dim=cfg.hidden_dim)
    yield small("ends", lookup)
    yield from all_reduce(served, batch.num_tokens, tp)
    yield small("ends", RmsNorm(rows=batch.num_tokens, cols=cfg.hidden_dim))
    yield _cublas(served, "head", Matmul(m=rows, n=vocab, k=cfg.hidden_dim))
    if tp > 1:
        yield _library(served, "all_gather", rows * vocab * tp * BF16.bytes_per_element, tp)
    yield small("sampling", Softmax(rows=rows, cols=cfg.vocab_size, dtype=FP32))


def num_nodes(device: Device, num_ranks: int) -> int:
    """NVLink domains that so many ranks fill."""
    return int(ceil_div(num_ranks, DOMAIN_RANKS.get(device.id, BOARD_RANKS)))


def _shard(size: int, tp: int) -> int:
    """A rank's part, padded to a whole one."""
    return int(ceil_div(size, tp))


def layer_norm(served: Served, tokens: float) -> Iterator[Kernel]:
    """The norm before a block; nothing where the all-reduce before it has it inside."""
    if served.major in served.engine.fuses_norms and served.layout.tp > 1:
        return
    yield small("norm", RmsNorm(rows=tokens, cols=served.config.hidden_dim, residual=True))


def small(part: str, op: Op) -> Kernel:
    """A map over activations, which lie in the L2."""
    return Kernel(part=part, op=op, times=1, conditions=Conditions(l2=REPLAYED))


def linear_product(served: Served, part: str, linear: Linear, m: float, n: int, k: int) -> Kernel:
    """A linear layer as it is stored."""
    if linear.dtype == BF16 and linear.stored == BF16:
        return _cublas(served, part, Matmul(m=m, n=n, k=k))
    fused = linear.dtype in served.engine.fuses_quantisers and not linear.is_blockwise_fp8
    op = QuantisedMatmul(
        m=m,
        n=n,
        k=k,
        dtype=linear.dtype,
        weight_dtype=linear.stored,
        in_dtype=linear.dtype if fused else BF16,
        scheme=linear.scheme,
    )
    names = served.engine.blockwise if linear.is_blockwise_fp8 else {}
    kernel = names.get(served.major, served.engine.name)
    return Kernel(part=part, op=op, times=1, conditions=Conditions(kernel=kernel, l2=ROTATED))


def _cublas(served: Served, part: str, op: Matmul) -> Kernel:
    return Kernel(part=part, op=op, times=1,
                  conditions=Conditions(kernel=served.engine.name, l2=ROTATED))  # fmt: skip


def _batched(served: Served, part: str, batch: int, m: float, n: int, k: int) -> Kernel:
    return _cublas(served, part, BatchedMatmul(batch=batch, m=m, n=n, k=k))


def all_reduce(
    served: Served, tokens: float, num_ranks: int, *, width: int | None = None
) -> Iterator[Kernel]:
    """The engine's own kernel for a small message, NCCL for a large one or several domains.

    Of the hidden state, or of `width` numbers a token.
    """
    if num_ranks == 1:
        return
    size = tokens * (width or served.config.hidden_dim) * BF16.bytes_per_element
    if size > CUSTOM_BYTES or num_nodes(served.device, num_ranks) > 1:
        yield _library(served, "all_reduce", size, num_ranks)
        return
    op = CustomAllReduce(num_bytes=size, num_ranks=num_ranks)
    yield Kernel(part="all-reduce", op=op, times=1,
                 conditions=Conditions(kernel=served.engine.name))  # fmt: skip


def _library(served: Served, kind: str, num_bytes: float, num_ranks: int) -> Kernel:
    """A collective of NCCL, over the network where one domain is too small."""
    nodes = num_nodes(served.device, num_ranks)
    op = CollectiveTransfer(kind=kind, num_bytes=num_bytes, num_ranks=num_ranks)
    if nodes > 1:
        op = ClusterCollective(kind=kind, num_bytes=num_bytes, num_ranks=num_ranks,
                               num_nodes=nodes)  # fmt: skip
    if not served.device.links:
        raise UnsupportedError(f"{served.device.id} has no link; give its spec file one")
    return Kernel(part="all-reduce" if kind == "all_reduce" else kind, op=op, times=1,
                  conditions=Conditions(kernel="nccl"))  # fmt: skip


def send(served: Served, tokens: float) -> Kernel:
    """The hidden state of a slot on its way to the next pipeline stage."""
    size = tokens * served.config.hidden_dim * BF16.bytes_per_element
    return _library(served, "send_recv", size, 2)
