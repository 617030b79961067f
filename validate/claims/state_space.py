"""Claims on state spaces as convolutions: S4, LSSL, SpaceTime, LMUFormer.

An order is confirmed where counts of the ops follow it in every size it names, the others held:
counts = a f(size) + b g(size) with g = 1, or the size itself where f grows faster; the ends of a
sweep fix a and b, what lies between must follow within 2 %, and a f must be seen in the last. A
tilde (or 'near-linear') allows a factor log(size). The answer is then the claim's own text.

Times of S4 against LSSL and transformers need a device and every size: the published tables name
neither the length nor the batch ('setting incomplete'). Where a setting does, the ratio is that of
one layer's kernels in fp32, those of the state space made in each call; a backward pass is taken
for as slow a multiple of the forward one on either side, and no host time is added.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from hwmodels.device import Device
from hwmodels.dtypes import FP32
from validate.claims.claim import EXACT_TOLERANCE, Claim, Value, not_modelled
from validate.claims.decoder import ops_seconds
from validate.claims.structured import formula_at
from workloads.op import Op
from workloads.ops.attention import StandardAttention
from workloads.ops.decode_attention import DecodeAttention
from workloads.ops.flash_attention import FlashAttention2
from workloads.ops.legendre_memory import LmuFormer
from workloads.ops.matmul import Matmul
from workloads.ops.state_kernel import CAUCHY, KRYLOV, StateKernel
from workloads.ops.state_space_layer import StateSpaceLayer
from workloads.ops.state_spaces import COMPANION
from workloads.ops.state_step import StateStep

SEE_SETTING: Final = "see setting"
FEWER_STATES: Final = 4
"""S4's states are that many times fewer than LSSL's of as many parameters (S4, appendix D.1)."""
STRUCTURED: Final = "structured"
LARGE: Final = 2**26
"""A size held while another one is swept through `SWEEP`."""
SMALL: Final = 64
"""A size held far below those of a long sweep."""
SWEEP: Final = tuple(2**n for n in range(6, 13))
LONG_SWEEP: Final = tuple(4**n for n in range(9, 16))

Sizes = Mapping[str, float]
Count = Callable[[Sizes], float]


# ---- orders --------------------------------------------------------------------------------


def follows(order: str, count: Count, name: str, held: Sizes, sweep: Sequence[int]) -> bool:
    """Whether counts have the order in one size, the others held.

    >>> count = lambda at: 3 * at["N"] ** 2 * at["L"] + 5 * at["L"]
    >>> [follows("N^2 L", count, name, {"N": 64, "L": 64}, SWEEP) for name in "NL"]
    [True, True]
    >>> follows("N L", count, "N", {"N": 64, "L": 64}, SWEEP)
    False
    """
    points = [{**held, name: size} for size in sweep]
    said = np.array([formula_at(order, at) for at in points])
    counted = np.array([count(at) for at in points])
    sizes = np.array(sweep, dtype=np.float64)
    faster = said[-1] / said[0] > 1.01 * sizes[-1] / sizes[0]
    table = np.stack([said, sizes if faster else np.ones_like(sizes)], axis=1)
    ends = [0, -1]
    factors = np.linalg.solve(table[ends], counted[ends])
    leads = factors[0] * said[-1] > EXACT_TOLERANCE * counted[-1]
    return bool(leads and np.allclose(table @ factors, counted, rtol=EXACT_TOLERANCE))


def is_product(order: str, count: Count, states: str, length: str) -> bool:
    """An order in states, held much shorter than lengths, and in lengths."""
    held = {states: SMALL, length: LARGE}
    return follows(order, count, states, held, SWEEP) and (
        length not in order or follows(order, count, length, held, LONG_SWEEP)
    )


def is_sum(count: Count, states: str, length: str, *, log: bool) -> bool:
    """O(states + length), each swept far beyond the other; with `log` a logarithm beside it."""
    for name, other in ((states, length), (length, states)):
        order = f"{name} log {name}" if log else name
        if not follows(order, count, name, {name: SMALL, other: SMALL}, LONG_SWEEP):
            return False
    return True


def _kernel(method: str, states: str, length: str) -> Callable[[Sizes], StateKernel]:
    def made(at: Sizes) -> StateKernel:
        return StateKernel(
            channels=1, state_dim=int(at[states]), len_seq=int(at[length]), method=method
        )

    return made


def _flops(op: Op) -> float:
    return float(op.work(float(2**52)).flops)


def _sizes_named(text: str) -> str:
    return "".join(sorted(set(re.findall(r"\b[A-Za-z]\b", text)) - {"O"}))


def _terms(text: str) -> list[tuple[str, bool, str]]:
    """(order, whether a logarithm is allowed, what stands behind it) of each O(...).

    >>> _terms("O(N^2 L) naive, O~(N+L) structured")
    [('N^2 L', False, 'naive'), ('N+L', True, 'structured')]
    """
    found = re.findall(r"(O~|~O|Õ|O)\(([^()]*)\)\s*([^,O~Õ]*)", text)
    if not found:
        not_modelled(f"setting unclear: '{text}' names no order")
    return [(order.strip(), sign != "O", behind.strip()) for sign, order, behind in found]


# ---- LSSL ----------------------------------------------------------------------------------


def evaluate_lssl(claim: Claim) -> Value:
    """Orders of a kernel's flops and memory a feature, and of a recurrent step.

    Naive kernels are Krylov's by doubling (their 2 N^3 log L of squarings is unseen for L much
    longer than N); structured ones are counted on the companion form, which gives the kernels of
    any controllable system of one input: the paper's own fast algorithm is a proof, not an op here.
    """
    if claim.kind != "complexity":
        not_modelled(f"no rule for '{claim.quantity}'")
    for name, text in claim.setting.items():
        if not isinstance(text, str) or "(" not in text:
            continue
        for order, log, behind in _terms(text):
            structured = STRUCTURED in behind or log
            if not _lssl_order(name, order, log=log, structured=structured):
                return f"{name} is not {text}"
    return SEE_SETTING


def _lssl_order(name: str, order: str, *, log: bool, structured: bool) -> bool:
    kernel = _kernel(COMPANION if structured else KRYLOV, "N", "L")
    counts: dict[str, Count] = {
        "kernel": lambda at: _flops(kernel(at)),
        "memory": lambda at: float(kernel(at).memory_bytes()),
        "recurrent": _dense_step_flops,
    }
    what = next((key for key in counts if key in name.casefold()), "")
    if not what:
        not_modelled(f"setting unclear: no count is called '{name}'")
    if "+" in order:
        return is_sum(counts[what], "N", "L", log=log)
    return is_product(order, counts[what], "N", "L")


def _dense_step_flops(at: Sizes) -> float:
    op = StateSpaceLayer(
        channels=1, len_seq=1, state_dim=int(at["N"]), method=KRYLOV, recurrent=True
    )
    return _flops(op)


# ---- SpaceTime -----------------------------------------------------------------------------


def evaluate_spacetime(claim: Claim) -> Value:
    """Compute and memory of a companion's kernel as orders; times name no device and shape.

    The orders are the paper's with a logarithm left out: transforms have one, which is allowed for
    compute and not for memory. The naive form holds and makes every A^k B by shifts.
    """
    if claim.kind != "complexity":
        not_modelled("setting incomplete: no gpu, no batch, length and sizes of the three models")
    (text,) = claim.need("formula")
    for order, _, _ in _terms(str(text)):
        names = _sizes_named(order)
        if len(names) != 2:
            not_modelled(f"setting unclear: '{order}' does not name states and length")
        if not _companion_order(order, *names):
            return f"counts are not O({order})"
    return str(text)


def _companion_order(order: str, states: str, length: str) -> bool:
    """Of states and length by these names."""
    if "+" in order:
        kernel = _kernel(COMPANION, states, length)
        memory = is_sum(lambda at: float(kernel(at).memory_bytes()), states, length, log=False)
        return memory and is_sum(lambda at: _flops(kernel(at)), states, length, log=True)
    naive = _kernel(KRYLOV, states, length)

    def steps(at: Sizes) -> float:
        one = StateStep(channels=1, state_dim=int(at[states]), structure=COMPANION)
        return at[length] * _flops(one)

    memory = is_product(order, lambda at: float(naive(at).memory_bytes()), states, length)
    return memory and is_product(order, steps, states, length)


# ---- S4 ------------------------------------------------------------------------------------


def evaluate_s4(claim: Claim) -> Value:
    """A layer's training step and memory against LSSL's; a model's training and generation against
    a transformer's. Lists of hidden sizes or lengths give the least and the largest ratio."""
    quantity = claim.quantity.casefold()
    if "generation" in quantity:
        return _generation(claim)
    if "lssl" in quantity or "lssl" in str(claim.setting.get("baseline", "")).casefold():
        return _against_lssl(claim, memory="memory" in quantity)
    if "transformer" in quantity:
        return _against_transformer(claim)
    not_modelled(f"no rule for '{claim.quantity}'")


def _against_lssl(claim: Claim, *, memory: bool) -> Value:
    """Ratios over the hidden sizes: LSSL with as many states as channels, S4 with a quarter."""
    seq, batch = claim.sizes("seq", "batch")
    hiddens = _listed(claim, "hidden_dims" if "hidden_dims" in claim.setting else "hidden")
    on = None if memory else claim.device()
    found = []
    for hidden in hiddens:
        shape: dict[str, Any] = {"batch": batch, "channels": hidden, "len_seq": seq}
        ours = StateSpaceLayer(**shape, state_dim=max(hidden // FEWER_STATES, 2), method=CAUCHY)
        theirs = StateSpaceLayer(**shape, state_dim=hidden, method=KRYLOV)
        cost = [layer_bytes(op) if on is None else ops_seconds([op], on) for op in (theirs, ours)]
        found.append(cost[0] / cost[1])
    return _ends(found)


def layer_bytes(op: StateSpaceLayer) -> float:
    """Memory of a layer's forward pass: its kernel's, and u and y of all rows.

    >>> a, b = (StateSpaceLayer(channels=8, len_seq=64, state_dim=8, method=m)
    ...         for m in ("krylov", "cauchy"))
    >>> layer_bytes(a) > layer_bytes(b)
    True
    """
    return float(op.kernel().memory_bytes() + 2 * op.convolution().sequence_bytes)


def _against_transformer(claim: Claim) -> Value:
    """Layers over the lengths: attention with its scores in memory, over S4."""
    batch, hidden, heads = claim.sizes("batch", "hidden", "heads")
    on, found = claim.device(), []
    states = int(claim.setting.get("state", hidden))
    for seq in _listed(claim, "seq"):
        tokens = batch * seq
        attention = StandardAttention(
            batch=batch, num_heads=heads, len_q=seq, head_dim=hidden // heads, dtype=FP32
        )
        theirs = [attention, *_linears(tokens, hidden, 4)]
        layer = StateSpaceLayer(batch=batch, channels=hidden, len_seq=seq, state_dim=states)
        ours = [layer, *_linears(tokens, hidden, 1)]
        seconds = [_layer_seconds(mixer, tokens, hidden, on) for mixer in (theirs, ours)]
        found.append(seconds[0] / seconds[1])
    return _ends(found)


def _generation(claim: Claim) -> float:
    """Tokens/s of a model over a transformer's, halfway through what is generated."""
    batch, hidden, heads, new = claim.sizes("batch", "hidden", "heads", "new_tokens")
    on = claim.device()
    states = int(claim.setting.get("state", 64))
    attention = DecodeAttention(
        batch=batch, num_heads=heads, len_kv=max(new // 2, 1), head_dim=hidden // heads, dtype=FP32
    )
    step = StateStep(batch=batch, channels=hidden, state_dim=states)
    theirs = _layer_seconds([attention, *_linears(batch, hidden, 4)], batch, hidden, on)
    return theirs / _layer_seconds([step, *_linears(batch, hidden, 1)], batch, hidden, on)


def _layer_seconds(mixer: Sequence[Op], tokens: int, hidden: int, on: Device) -> float:
    """A mixer and a feed-forward layer of four times the width."""
    wide = Matmul(m=tokens, n=4 * hidden, k=hidden, dtype=FP32)
    return ops_seconds([*mixer, wide, wide.over(n=hidden, k=4 * hidden)], on)


def _linears(tokens: int, hidden: int, count: int) -> list[Op]:
    return [Matmul(m=tokens, n=hidden, k=hidden, dtype=FP32)] * count


def _listed(claim: Claim, name: str) -> list[int]:
    """One size or several."""
    (given,) = claim.need(name)
    values = given if isinstance(given, (list, tuple)) else [given]
    return [_size(name, value) for value in values]


def _size(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1:
        not_modelled(f"setting unclear: {name} = {value!r} is not a size")
    return int(value)


def _ends(found: Sequence[float]) -> Value:
    return found[0] if len(found) == 1 else (min(found), max(found))


# ---- LMUFormer -----------------------------------------------------------------------------

AST: Final[Mapping[str, int]] = {
    "hidden": 768, "heads": 12, "layers": 12, "patch": 16, "stride": 10, "tokens": 2,
}  # fmt: skip
"""Gong et al. 2021 (arXiv 2104.01778): a distilled ViT-B over overlapping patches, two tokens."""
MEL_BINS: Final = 128
FRAMES: Final = 128
CLASSES: Final = 35
"""Of Speech Commands v2: bins, frames of a second, words."""


def evaluate_lmuformer(claim: Claim) -> Value:
    """Parameters and flops of AST over LMUFormer's on one second of speech.

    Off by 5 %: flops. The published figure is that of LMUFormer's convolutions alone (189M
    multiply-adds); its memory's two linear maps and the head are 17M more.
    """
    frames = _size("frames", claim.setting.get("frames", FRAMES))
    bins = _size("mel_bins", claim.setting.get("mel_bins", MEL_BINS))
    classes = _size("classes", claim.setting.get("classes", CLASSES))
    ours = LmuFormer(len_seq=frames, in_channels=bins, num_classes=classes)
    params = ast_parameters(frames, bins, classes) / float(ours.num_parameters())
    flops = ast_flops(frames, bins, classes) / _flops(ours)
    quantity = claim.quantity.casefold()
    if "flop" not in quantity and "param" not in quantity:
        not_modelled(f"no rule for '{claim.quantity}'")
    if "flop" not in quantity:
        return params
    return flops if "param" not in quantity else (params, flops)


def ast_tokens(frames: int, bins: int) -> int:
    """Patches, and the two tokens.

    >>> ast_tokens(128, 128)
    146
    """
    patch, stride = AST["patch"], AST["stride"]
    if min(frames, bins) < patch:
        not_modelled(f"setting impossible: {frames} frames of {bins} bins hold no patch")
    rows, cols = ((size - patch) // stride + 1 for size in (frames, bins))
    return rows * cols + AST["tokens"]


def ast_parameters(frames: int, bins: int, classes: int) -> float:
    """Patch embedding, positions, blocks, head; not the ImageNet heads it was trained with.

    >>> ast_parameters(128, 128, 35)
    85395491.0
    """
    d = AST["hidden"]
    embed = AST["patch"] ** 2 * d + d + (AST["tokens"] + ast_tokens(frames, bins)) * d
    block = 12 * d * d + 13 * d
    return float(embed + AST["layers"] * block + 2 * d + 2 * d + classes * (d + 1))


def ast_flops(frames: int, bins: int, classes: int) -> float:
    """Of the products of one second."""
    d, n = AST["hidden"], ast_tokens(frames, bins)
    attention = FlashAttention2(
        batch=1, num_heads=AST["heads"], len_q=n, head_dim=d // AST["heads"], dtype=FP32
    )
    layer = [Matmul(m=n, n=12 * d, k=d, dtype=FP32), attention]
    ends = [
        Matmul(m=n - AST["tokens"], n=d, k=AST["patch"] ** 2, dtype=FP32),
        Matmul(m=1, n=classes, k=d, dtype=FP32),
    ]
    return AST["layers"] * sum(map(_flops, layer)) + sum(map(_flops, ends))
