"""Memory of a serving rank: weights, and a cache of keys and values in pages of equal size.

    page      p tokens of one request, all layers of the rank                  PagedAttention
    tokens    n held of a request hold ceil(n / p) pages; where n is any number alike, of mean L,
              (L + (p - 1) / 2) / p pages on average: (p - 1) / 2 tokens are empty
    pages     floor((share x capacity - weights) / bytes of a page)
    states    what a request leaves in the mixers of a rank, whatever its length; no pages
    at once   pages / ceil((I + O) / p)      requests, each at its longest: none is ever put off
              pages / pages of I + O / 2     requests spread evenly over their lives

Pages after Kwon et al. (SOSP 2023, arXiv 2309.06180, section 4.1): a request wastes less than one
page. Layers that see a window keep a window's tokens. A pipeline stage holds ceil(L / pp) layers.
Ignored: activations, the buffers of collectives and captured graphs, which lie in the share left
over (1 - `MEMORY_FRAC`); shared prefixes. States of scans are held in fp32, as their kernels take
them; an engine that keeps them in 16 bits holds half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hwmodels.dtypes import BF16
from hwmodels.errors import InputError
from simulator.serving_kernels import Served
from workloads.models.activations import mixer_state_bytes
from workloads.models.architecture import LatentAttention
from workloads.models.parameters import count_parameters
from workloads.numeric import ceil_div

MEMORY_FRAC: Final = 0.9
"""Share of device memory that engines fill: vLLM's gpu_memory_utilization and TensorRT-LLM's
free_gpu_memory_fraction, both 0.9 by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paged:
    """The cache of one rank: bytes of weights, of the room left, of one page, and what fits.

    `most_requests`: requests of mean length at once. `safe_requests`: those that fit when every one
    is at its longest, so that none is ever put off or recomputed. `waste_frac`: share of the pages'
    bytes that no token fills. `state_bytes`: of one request in the mixers of the rank.
    """

    weights_bytes: float
    room_bytes: float
    page_tokens: int
    page_bytes: float
    num_pages: int
    token_bytes: float
    most_requests: float
    safe_requests: int
    waste_frac: float
    state_bytes: float = 0.0


def paged(served: Served, *, isl: int, osl: int) -> Paged:
    """What fits on one rank for requests of `isl` prompt and `osl` output tokens."""
    weights = weight_bytes(served)
    room = MEMORY_FRAC * served.device.hbm.capacity_bytes - weights
    if room <= 0:
        raise InputError("the weights do not fit the device; give more ranks or a wider layout")
    page = served.engine.page_tokens
    mean, states = isl + osl / 2, state_bytes(served)
    held, filled = held_bytes(served, mean), cache_bytes(served, mean) + states
    longest = cache_bytes(served, page * int(ceil_div(isl + osl, page))) + states
    page_bytes = cache_bytes(served, page)
    return Paged(
        weights_bytes=weights,
        room_bytes=room,
        page_tokens=page,
        page_bytes=page_bytes,
        num_pages=int(room / page_bytes) if page_bytes else 0,
        token_bytes=cache_bytes(served, 1),
        most_requests=room / held,
        safe_requests=int(room / longest),
        waste_frac=1 - filled / held,
        state_bytes=states,
    )


def held_bytes(served: Served, length: float) -> float:
    """Bytes of the pages that a request of that mean length holds on one rank, and its states."""
    pages = cache_bytes(served, length + (served.engine.page_tokens - 1) / 2)
    return pages + state_bytes(served)


def state_bytes(served: Served) -> float:
    """Bytes of one request's states on one rank: 0 without mixers."""
    stage = int(ceil_div(served.config.num_layers, served.layout.pp))
    return stage * float(mixer_state_bytes(served.config, tp=served.layout.tp))


def cache_bytes(served: Served, length: float) -> float:
    """Bytes of one request's keys and values on one rank."""
    cfg, element = served.config, served.formats.cache.bytes_per_element
    stage = int(ceil_div(cfg.num_layers, served.layout.pp)) / cfg.num_layers
    a = cfg.attention
    if isinstance(a, LatentAttention):
        return stage * cfg.num_layers * a.latent_dim * length * element
    windowed = cfg.num_windowed_layers if cfg.window else 0
    rows = (cfg.num_attention_layers - windowed) * length + windowed * min(cfg.window or 0, length)
    kv_heads = int(ceil_div(a.num_kv_heads, served.layout.tp))
    return stage * 2 * kv_heads * a.head_dim * rows * element


def weight_bytes(served: Served) -> float:
    """Bytes of one rank's weights: the parts of the model in their formats, split as laid out.

    A pipeline's fullest rank: ceil(L / pp) layers, and the larger end.
    """
    count, split, formats = count_parameters(served.config), served.layout, served.formats
    layers = served.config.num_layers
    stage = int(ceil_div(layers, split.pp)) / layers
    mlp = (count.mlp + count.shared_experts) * formats.mlp.stored.bytes_per_element
    heads = (count.attention + count.mixers) * formats.attention.stored.bytes_per_element
    router = count.router * BF16.bytes_per_element
    ends = count.embedding_and_head * BF16.bytes_per_element
    if split.pp > 1:  # the first stage has the one, the last the other
        ends = served.config.vocab_size * served.config.hidden_dim * BF16.bytes_per_element
    experts = count.experts * formats.experts.stored.bytes_per_element
    return stage * ((mlp + heads + router) / split.tp + experts / (split.moe_tp * split.moe_ep)) + (
        ends / split.tp
    )
