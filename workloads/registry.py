"""The ops by name, and the words people use for their fields. An op is imported when asked for."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hwmodels.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from workloads.op import Op

PROVED: Final = "proved"
DERIVED: Final = "derived"
NOT_YET: Final = "not yet"

_SYSTEMS: Final = Path(__file__).parent / "data" / "systems.toml"


@dataclass(frozen=True, slots=True)
class Entry:
    """Where an op lives and what it is, in a line."""

    module: str
    class_name: str
    summary: str


@dataclass(frozen=True, slots=True)
class Param:
    """One field of an op: `kind` is 'length', 'size', 'fraction', 'dtype', 'flag' or 'text'."""

    name: str
    kind: str
    required: bool
    default: object


@dataclass(frozen=True, slots=True)
class System:
    """A published system: facts, and the op that models it (empty where none does yet).

    `preset` are values of the op's fields that make it this system: defaults, for the asker to
    change, with the paper's value where that is data-dependent.
    """

    id: str
    title: str
    family: str
    paper: str
    op: str
    preset: Mapping[str, object] = dataclasses.field(default_factory=dict)


_OPS: Final[Mapping[str, Entry]] = {
    "matmul": Entry("matmul", "Matmul", "matrix product, tiled, batched"),
    "batched_matmul": Entry("matmul", "BatchedMatmul", "many small matrix products in one kernel"),
    "quantised_matmul": Entry(
        "quantised_matmul", "QuantisedMatmul", "product of quantised operands, quantising included"
    ),
    "softmax": Entry("softmax", "Softmax", "row-wise softmax"),
    "attention": Entry(
        "attention", "StandardAttention", "attention that writes its scores to memory"
    ),
    "attention_backward": Entry(
        "attention_backward", "StandardAttentionBackward", "its backward pass, scores kept"
    ),
    "softmax_backward": Entry("softmax_backward", "SoftmaxBackward", "row-wise softmax, backward"),
    "flash_attention": Entry(
        "flash_attention_1", "FlashAttention1", "fused attention, keys in the outer loop, forward"
    ),
    "flash_attention_backward": Entry(
        "flash_attention_1", "FlashAttention1Backward", "the same, backward"
    ),
    "block_sparse_attention": Entry(
        "block_sparse_attention", "BlockSparseAttention", "fused attention under a block mask"
    ),
    "block_sparse_attention_backward": Entry(
        "block_sparse_attention", "BlockSparseAttentionBackward", "the same, backward"
    ),
    "flash_attention_2": Entry("flash_attention", "FlashAttention2", "fused attention, forward"),
    "flash_attention_2_backward": Entry(
        "flash_attention_backward", "FlashAttention2Backward", "fused attention, backward"
    ),
    "prefill_attention": Entry(
        "prefill_attention", "PrefillAttention", "fused attention over a prompt, with windows"
    ),
    "mla_prefill": Entry(
        "prefill_attention", "MlaPrefill", "latent attention over a prompt, heads expanded"
    ),
    "decode_attention": Entry(
        "decode_attention", "DecodeAttention", "attention of one new token over a cache"
    ),
    "mla_decode": Entry("decode_attention", "MlaDecode", "latent attention of one new token"),
    "mamba_scan": Entry("selective_scan", "SelectiveScan", "fused selective scan"),
    "mamba_scan_backward": Entry(
        "selective_scan_backward", "SelectiveScanBackward", "its backward pass"
    ),
    "mamba_step": Entry(
        "selective_scan_backward", "SelectiveStep", "selective scan, one new token"
    ),
    "mamba_scan_unfused": Entry(
        "selective_scan", "SelectiveScanUnfused", "selective scan, states written to memory"
    ),
    "fft_convolution": Entry(
        "fft_convolution", "FFTConvolution", "long convolution through library FFTs"
    ),
    "flashfftconv": Entry(
        "flash_fft_conv", "FlashFFTConv", "long convolution through fused Monarch FFTs"
    ),
    "rmsnorm": Entry("norm", "RmsNorm", "root-mean-square normalisation, forward"),
    "rmsnorm_backward": Entry(
        "norm_backward", "RmsNormBackward", "root-mean-square normalisation, backward"
    ),
    "layernorm": Entry("norm", "LayerNorm", "layer normalisation, forward"),
    "layernorm_backward": Entry(
        "norm_backward", "LayerNormBackward", "layer normalisation, backward"
    ),
    "elementwise": Entry("elementwise", "Elementwise", "pointwise map over arrays"),
    "rope": Entry("rope", "Rope", "rotary position embedding"),
    "adam_step": Entry("adam", "AdamStep", "fused Adam update of all parameters"),
    "selected_attention": Entry(
        "selected_attention", "SelectedAttention", "attention over lists of selected keys"
    ),
    "top_k": Entry("top_k", "TopK", "indices of the k largest of each row"),
    "key_scores": Entry("key_scores", "KeyScores", "scores of few queries against an index"),
    "selective_attention": Entry(
        "selection", "SelectiveAttention", "attention over keys that an index picks"
    ),
    "tree_attention": Entry(
        "tree_attention", "TreeAttention", "attention over keys that a tree search finds"
    ),
    "flex_prefill_attention": Entry(
        "flex_prefill", "FlexPrefillAttention", "a prompt's attention over blocks by share of mass"
    ),
    "block_max": Entry("tree_attention", "BlockMax", "maxima over blocks of rows"),
    "block_pool": Entry("block_pool", "BlockPool", "means over blocks of rows"),
    "host_copy": Entry("host_copy", "HostCopy", "copy between host and device memory"),
    "recover_chunks": Entry(
        "shadow_kv", "RecoverChunks", "keys from low-rank factors, values from the host"
    ),
    "shadow_kv_decode": Entry(
        "shadow_kv", "ShadowKvDecode", "low-rank keys, values on the host, chosen by landmarks"
    ),
    "shadow_kv_build": Entry("shadow_kv", "ShadowKvBuild", "factors and landmarks of a prompt"),
    "evict_least": Entry("heavy_hitter", "EvictLeast", "scores of kept tokens, and the least"),
    "heavy_hitter_decode": Entry(
        "heavy_hitter", "HeavyHitterDecode", "one new token over heavy hitters and recent tokens"
    ),
    "heavy_hitter_prefill": Entry(
        "heavy_hitter", "HeavyHitterPrefill", "a prompt's attention, and which tokens it keeps"
    ),
    "compressed_attention": Entry(
        "compressed_cache", "CompressedAttention", "decoding over a compressed cache"
    ),
    "compress_cache": Entry("compress_cache", "CompressCache", "a prompt's cache compressed"),
    "quantise_groups": Entry(
        "quantise_groups", "QuantiseGroups", "groups of a row rounded to integers with a scale"
    ),
    "quantise_tensor": Entry(
        "quantise_tensor", "QuantiseTensor", "a training step's tensor cast to a narrow format"
    ),
    "channel_scores": Entry(
        "quantise_groups", "ChannelScores", "how much queries use each channel of keys"
    ),
    "merged_layers_attention": Entry(
        "layered_cache", "MergedLayersAttention", "decoding over caches merged in pairs of layers"
    ),
    "merge_layers": Entry("merge_layers", "MergeLayers", "two layers' caches merged and quantised"),
    "slerp_merge": Entry("merge_layers", "SlerpMerge", "spherical interpolation of row vectors"),
    "layer_budget_attention": Entry(
        "layered_cache", "LayerBudgetAttention", "decoding with a cache budget by layer"
    ),
    "layer_budget_selection": Entry(
        "layered_cache", "LayerBudgetSelection", "tokens that each layer's budget keeps"
    ),
    "grouped_matmul": Entry(
        "grouped_matmul", "GroupedMatmul", "products of routed experts, one kernel for all"
    ),
    "moe_ffn": Entry("moe_ffn", "MoeFfn", "routed experts of one rank, forward"),
    "embedding": Entry("embedding", "Embedding", "table lookup, forward"),
    "row_map": Entry("row_map", "RowMap", "pointwise map, a thread block a row"),
    "short_conv": Entry("short_conv", "ShortConv", "short depthwise causal convolution"),
    "gated_delta_rule": Entry("delta_rule", "GatedDeltaRule", "gated delta rule in chunks"),
    "gated_delta_step": Entry("delta_rule", "GatedDeltaStep", "gated delta rule, one new token"),
    "mamba2_chunk_scan": Entry("chunk_scan", "MambaChunkScan", "Mamba-2 scan in chunks"),
    "ssd_scan": Entry("ssd_scan", "SsdScan", "Mamba-2 scan in chunks, heads sharing B and C"),
    "ssd_scan_backward": Entry("ssd_scan_backward", "SsdScanBackward", "its backward pass"),
    "ssd_step": Entry("ssd_scan", "SsdStep", "Mamba-2 scan, one new token"),
    "mamba2_layer": Entry("mamba2_layer", "Mamba2Layer", "Mamba-2 layer, a prompt or one token"),
    "merge_directions": Entry(
        "quasi_separable", "MergeDirections", "scans of both directions shifted and added"
    ),
    "quasi_separable": Entry(
        "quasi_separable", "QuasiSeparable", "bidirectional mixer by quasi-separable matrices"
    ),
    "hydra_layer": Entry(
        "quasi_separable", "HydraLayer", "bidirectional Mamba-2 layer, projections shared"
    ),
    "memory_map": Entry("neural_memory", "MemoryMap", "pointwise maps of a neural memory"),
    "row_blend": Entry("neural_memory", "RowBlend", "sums of rows with a coefficient each"),
    "momentum_scan": Entry(
        "neural_memory", "MomentumScan", "coefficients of gradients under momentum and decay"
    ),
    "neural_memory": Entry(
        "neural_memory", "NeuralMemory", "MLP memory learnt by gradient descent as it reads"
    ),
    "associative_scan": Entry(
        "associative_scan", "AssociativeScan", "prefix scan of an associative operator"
    ),
    "routed_attention": Entry(
        "routed_attention", "RoutedAttention", "attention inside clusters routed by content"
    ),
    "combiner": Entry(
        "combiner", "Combiner", "attention to near keys, to the others through pooled spans"
    ),
    "fit_attention": Entry(
        "fit_attention", "FitAttention", "attention in groups, and of latents of all groups"
    ),
    "seqboat": Entry("seqboat", "SeqBoat", "gated attention of the tokens a gate switches on"),
    "row_entropy": Entry("segmented_prefill", "RowEntropy", "entropy of each row's softmax"),
    "segmented_prefill": Entry(
        "segmented_prefill", "SegmentedPrefill", "segments read apart, the best read again"
    ),
    "fusemax": Entry("fusemax", "FuseMax", "attention by the one-pass cascade of Einsums"),
    "linear_recurrence": Entry(
        "linear_recurrence",
        "LinearRecurrence",
        "linear attention with decay or delta rule, chunked",
    ),
    "linear_recurrence_backward": Entry(
        "linear_recurrence_backward", "LinearRecurrenceBackward", "its backward pass"
    ),
    "lightning_attention_1": Entry(
        "lightning_attention_1", "LightningAttention1", "decayed left product in tiles, no softmax"
    ),
    "swish_features": Entry("transnormer", "SwishFeatures", "swish, turned by position (LRPE-d)"),
    "transnormer_attention": Entry(
        "transnormer", "TransnormerAttention", "Lightning Attention with feature map, norm, gate"
    ),
    "kernel_features": Entry(
        "feature_map", "KernelFeatures", "feature maps of linear attention: elu, Taylor, Hedgehog's"
    ),
    "recurrent_step": Entry("recurrent_step", "RecurrentStep", "linear recurrence, one new token"),
    "feature_attention": Entry(
        "feature_attention", "FeatureAttention", "linear attention behind a feature map"
    ),
    "based": Entry("based", "Based", "linear attention by exp's Taylor series, fused"),
    "prefix_linear_attention": Entry(
        "prefix_linear_attention", "PrefixLinearAttention", "Based after an encoder region"
    ),
    "based_parallel": Entry(
        "based_parallel", "ParallelBased", "Based by all pairs of queries and keys, tile by tile"
    ),
    "causal_product": Entry(
        "causal_product", "CausalProduct", "linear attention token by token on fp32 lanes"
    ),
    "additive_decay": Entry("lightnet", "AdditiveDecay", "decays of a running softmax over keys"),
    "lightnet": Entry("lightnet", "LightNet", "linear recurrence that adds up a softmax over keys"),
    "one_hot": Entry("long_vq", "OneHot", "indices as rows of the unit matrix"),
    "longvq": Entry("long_vq", "LongVq", "linear attention to the codes that keys are rounded to"),
    "window_states": Entry(
        "scattered_attention", "WindowStates", "sums of k v^T over windows of unequal lengths"
    ),
    "window_readout": Entry(
        "scattered_attention", "WindowReadout", "what the queries of each window read of its sums"
    ),
    "scattered_attention": Entry(
        "scattered_attention", "ScatteredAttention", "linear attention in windows of voxels"
    ),
    "embedding_backward": Entry("embedding", "EmbeddingBackward", "table lookup, backward"),
    "conv2d": Entry("conv2d", "Conv2d", "two-dimensional convolution, direct or Winograd"),
    "rnn": Entry("rnn", "Rnn", "recurrent layer: vanilla, GRU or LSTM, forward or backward"),
    "collective": Entry(
        "collective_transfer", "CollectiveTransfer", "a collective of a communication library"
    ),
    "cluster_collective": Entry(
        "collective_transfer", "ClusterCollective", "the same over several nodes"
    ),
    "staged_collective": Entry(
        "collective_transfer", "StagedCollective", "the same, each message by way of host memory"
    ),
    "custom_all_reduce": Entry(
        "collective_transfer", "CustomAllReduce", "all-reduce kernel of a serving framework"
    ),
    "combine_parts": Entry(
        "shared_prefix", "CombineParts", "attentions over parts of the keys put together"
    ),
    "shared_prefix_attention": Entry(
        "shared_prefix", "SharedPrefixAttention", "attention of sequences that share a prefix"
    ),
    "prefix_grouped_attention": Entry(
        "shared_prefix", "PrefixGroupedAttention", "responses to one prompt, its keys once"
    ),
    "prefix_grouped_attention_backward": Entry(
        "shared_prefix", "PrefixGroupedAttentionBackward", "the same, backward"
    ),
    "packed_attention": Entry(
        "packed_attention", "PackedAttention", "attention of unequal sequences without padding"
    ),
    "feature_map": Entry("ntk_attention", "FeatureMap", "elu(x) + 1, a thread block a row"),
    "add_state": Entry("ntk_attention", "AddState", "a prefix's state put into an attention"),
    "ntk_attention": Entry(
        "ntk_attention", "NtkAttention", "attention with a prefix kept as a matrix and a vector"
    ),
    "skew": Entry("relative_attention", "Skew", "relative scores moved to the places of the keys"),
    "relative_attention": Entry(
        "relative_attention", "RelativeAttention", "attention with learned relative positions"
    ),
    "hyena": Entry("conv_layer", "Hyena", "Hyena operator: gates and long convolutions"),
    "orchid": Entry("conv_layer", "Orchid", "gated convolution whose filter is made of its input"),
    "monarch_mixer": Entry(
        "conv_layer", "MonarchMixer", "Monarch convolution and block-diagonal feed-forward layer"
    ),
    "h3": Entry("h3", "H3", "H3 layer: shift and diagonal state spaces, state passing"),
    "sgconv": Entry("sgconv", "SGConv", "long convolution with a multi-scale filter"),
    "multiscale_filter": Entry("sgconv", "MultiscaleFilter", "filters interpolated at many scales"),
    "tcnca": Entry("tcnca", "Tcnca", "dilated depthwise convolutions, attention in chunks"),
    "windowed_attention": Entry(
        "windowed_attention", "WindowedAttention", "attention to first keys and a window of last"
    ),
    "head_span_attention": Entry(
        "span_mixture", "HeadSpanAttention", "windowed attention with a span for each head"
    ),
    "layer_span_attention": Entry(
        "span_mixture", "LayerSpanAttention", "full attention in some layers, a span in others"
    ),
    "layer_span_attention_backward": Entry(
        "span_mixture", "LayerSpanAttentionBackward", "the same in blocks, backward"
    ),
    "shifted_group_attention": Entry(
        "shifted_groups", "ShiftedGroupAttention", "attention in groups, half of the heads shifted"
    ),
    "shifted_group_attention_backward": Entry(
        "shifted_groups", "ShiftedGroupAttentionBackward", "the same, backward"
    ),
    "wkv": Entry("wkv", "Wkv", "RWKV's recurrence of weighted sums"),
    "spiking_neurons": Entry("wkv", "SpikingNeurons", "leaky integrate-and-fire neurons"),
    "spiking_product": Entry("wkv", "SpikingProduct", "product with spikes, by masked additions"),
    "spiking_token_mix": Entry(
        "wkv", "SpikingTokenMix", "RWKV's recurrence between projections of spikes"
    ),
    "cell_map": Entry("cell_map", "CellMap", "pointwise gates of recurrent cells"),
    "rnn_cell": Entry("rnn_cell", "RnnCell", "pointwise step of an LSTM, GRU, sLSTM or Elman cell"),
    "fused_rnn": Entry(
        "fused_rnn", "FusedRnn", "recurrent layer of several heads, all steps in one kernel"
    ),
    "alternating_rnn": Entry(
        "fused_rnn", "AlternatingRnn", "the same, a product and a pointwise kernel a step"
    ),
    "quasi_lstm": Entry(
        "quasi_rnn", "QuasiLstm", "LSTM whose gates see the input alone, scanned in blocks"
    ),
    "lstm_layer": Entry("quasi_rnn", "Lstm", "LSTM layer of several heads, step by step"),
    "same_conv": Entry("same_conv", "SameConv", "direct convolution, output as large as input"),
    "state_scan": Entry("state_scan", "StateScan", "scan of diagonal states with one decay"),
    "row_fft": Entry("row_fft", "RowFFT", "Fourier transforms of real rows, forward or back"),
    "state_step": Entry("state_step", "StateStep", "structured state spaces, one new token"),
    "cauchy_sums": Entry(
        "state_kernel", "CauchySums", "generating functions of diagonal-plus-low-rank systems"
    ),
    "companion_spectrum": Entry(
        "state_kernel", "CompanionSpectrum", "generating functions of companion systems"
    ),
    "state_kernel": Entry(
        "state_kernel", "StateKernel", "convolution kernels of state spaces: S4, LSSL, SpaceTime"
    ),
    "skip_term": Entry("state_space_layer", "SkipTerm", "a scaled input added to the output"),
    "state_space_layer": Entry(
        "state_space_layer", "StateSpaceLayer", "state spaces by long convolution, or step by step"
    ),
    "spectrum_product": Entry(
        "legendre_memory", "SpectrumProduct", "spectra of every signal times every filter"
    ),
    "legendre_memory": Entry(
        "legendre_memory", "LegendreMemory", "Legendre memory unit, in parallel or step by step"
    ),
    "lmuformer": Entry(
        "legendre_memory", "LmuFormer", "Legendre memory units between convolutions, a model"
    ),
    "conv_state_space": Entry(
        "conv_state_space", "ConvStateSpace", "state space of images, scanned over frames"
    ),
    "block_edges": Entry(
        "block_edges", "BlockEdges", "states handed from block to block of a chain or grid"
    ),
    "plstm": Entry("plstm", "Plstm", "linear recurrence on the edges of a chain or grid"),
    "rank_one_update": Entry("mkor", "RankOneUpdate", "inverse of a factor plus a rank-1 matrix"),
    "mkor_step": Entry(
        "mkor", "MkorStep", "rank-1 updates of both inverses, gradient preconditioned"
    ),
    "skeletal_layer": Entry(
        "training_layer", "SkeletalLayer", "layer whose activations are swapped or recomputed"
    ),
    "chunkwise_layer": Entry(
        "training_layer", "ChunkwiseLayer", "layer run forward and backward chunk by chunk"
    ),
    "ring_attention": Entry(
        "sequence_attention", "RingAttention", "one rank's attention in a ring over the sequence"
    ),
    "ulysses_attention": Entry(
        "sequence_attention", "UlyssesAttention", "some heads of the sequence, between all-to-alls"
    ),
    "ring_self_attention": Entry(
        "sequence_attention", "RingSelfAttention", "a ring over the sequence that writes scores"
    ),
    "linear_states": Entry(
        "linear_states", "LinearStates", "one rank's linear attention, states gathered from all"
    ),
    "expert_exchange": Entry(
        "expert_exchange", "ExpertExchange", "tokens sent to their experts, or back"
    ),
}

# A word -> the fields it may mean, best first; an alternative counts when the op has all of it.
_ALIASES: Final[Mapping[str, Sequence[tuple[str, ...]]]] = {
    "heads": (("num_heads",),),
    "kv_heads": (("num_kv_heads",),),
    "tokens": (("num_tokens",),),
    "seq": (("len_seq",), ("len_q", "len_kv"), ("num_tokens",)),
    "seq_q": (("len_q",),),
    "seq_kv": (("len_kv",),),
    "dim": (("head_dim",), ("key_dim",), ("dim",), ("cols",)),
    "channels": (("num_channels",), ("channels",), ("dim",)),
    "state": (("state_dim",),),
    "vocab": (("vocab_size",),),
    "params": (("num_parameters",),),
}


def names() -> tuple[str, ...]:
    """The names of all ops, in catalogue order."""
    return tuple(_OPS)


def resolve(name: str) -> str:
    """The registered spelling of an op's name; case, hyphens and underscores are the same.

    A system is a name in its own right, whether or not it sets fields of its op.

    >>> resolve("Flash-Attention-2")
    'flash_attention_2'
    """
    folded = _fold(name)
    if folded in _OPS:
        return folded
    system = next((s for s in systems() if _fold(s.id) == folded), None)
    if system is None:
        known = [*_OPS, *(s.id for s in systems() if s.op)]
        raise UnknownNameError("op", name, known, "see `ridgeplan systems`")
    if not system.op:
        raise InputError(
            f"{system.id} is listed but not modelled yet; see `ridgeplan systems` for what is"
        )
    return system.id


def summary(name: str) -> str:
    """What the op is, in a line."""
    return _entry(name)[0].summary


def op_class(name: str) -> type[Op]:
    """The class of that name, imported now.

    >>> op_class("MATMUL").__name__
    'Matmul'
    """
    entry, _ = _entry(name)
    found: type[Op] = getattr(import_module(f"workloads.ops.{entry.module}"), entry.class_name)
    return found


def status(name: str) -> str:
    """'proved' where a program that counts itself backs the closed form, else 'derived'."""
    from workloads.op import ProvedOp

    return PROVED if issubclass(op_class(name), ProvedOp) else DERIVED


@lru_cache(maxsize=64)
def params(name: str) -> Mapping[str, Param]:
    """The fields of an op by name, in the order it states them.

    >>> [p.name for p in params("matmul").values() if p.required]
    ['m', 'n', 'k']
    """
    found = {}
    _, preset = _entry(name)
    for f in dataclasses.fields(op_class(name)):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        default = None if required else f.default
        found[f.name] = Param(
            f.name,
            _kind(f.name, str(f.type)),
            required and f.name not in preset,
            preset.get(f.name, default),
        )
    return found


def fields_meant(name: str, key: str) -> tuple[str, ...]:
    """The fields of op `name` that a user's word means: 'heads' is num_heads.

    >>> fields_meant("matmul", "M")
    ('m',)
    """
    known, folded = params(name), _fold(key)
    if folded in known:
        return (folded,)
    for alternative in _ALIASES.get(folded, ()):
        if all(field in known for field in alternative):
            return alternative
    for field in (f"num_{folded}", f"len_{folded}"):
        if field in known:
            return (field,)
    words = [word for word in _ALIASES if any(set(a) <= set(known) for a in _ALIASES[word])]
    hint = f"it has {', '.join(known)}"
    raise UnknownNameError(f"{resolve(name)} parameter", key, [*known, *words], hint)


def build(name: str, values: Mapping[str, object]) -> Op:
    """The op with those field values; one error names every required field that is missing.

    >>> build("matmul", {"m": 8, "n": 8, "k": 8}).compulsory_bytes()
    384.0
    """
    missing = [p.name for p in params(name).values() if p.required and p.name not in values]
    if missing:
        short = [_short(name, field) for field in missing]
        shown = " ".join(f"-p {word}=..." for word in dict.fromkeys(short))
        raise InputError(f"{resolve(name)} needs {', '.join(missing)}; give {shown}")
    return op_class(name)(**(_entry(name)[1] | dict(values)))


def _entry(name: str) -> tuple[Entry, dict[str, object]]:
    """Where the op of a name lives, and the values the name sets."""
    found = resolve(name)
    if found in _OPS:
        return _OPS[found], {}
    system = next(s for s in systems() if s.id == found)
    return _OPS[system.op], dict(system.preset)


@lru_cache(maxsize=1)
def systems() -> tuple[System, ...]:
    """The published systems, in catalogue order."""
    table = tomllib.loads(_SYSTEMS.read_text(encoding="utf-8"))
    return tuple(System(**entry) for entry in table["system"])


def system_status(system: System) -> str:
    """The status of the op that models the system, or 'not yet'."""
    return status(system.op) if system.op else NOT_YET


def _fold(name: str) -> str:
    return "_".join(name.casefold().replace("-", " ").replace("_", " ").split())


def _kind(field: str, annotation: str) -> str:
    if "DType" in annotation:
        return "dtype"
    if annotation == "bool":
        return "flag"
    if annotation in ("str", "str | None"):
        return "text"
    if field.endswith("_frac"):
        return "fraction"
    return "length" if field.startswith("len_") else "size"


def _short(name: str, field: str) -> str:
    """The shortest word of `_ALIASES` that sets the field, or the field itself."""
    words = [word for word in _ALIASES if field in _meant_or_nothing(name, word)]
    return words[0] if words else field


def _meant_or_nothing(name: str, word: str) -> tuple[str, ...]:
    try:
        return fields_meant(name, word)
    except UnknownNameError:
        return ()
