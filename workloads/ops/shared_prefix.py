"""Attention of many sequences that share a prefix: its keys and values are kept and read once.

`SharedPrefixAttention` is Hydragen (Juravsky et al. 2024, arXiv 2402.05099, section 3). The softmax
over [prefix; own keys] is taken in parts and put together from their logsumexps l_i,

    o = sum_i w_i o_i,    w_i = exp(l_i - l),    l = log sum_i exp(l_i)

so that the queries of all b sequences meet the one prefix of P keys as a single product (matrix
times matrix) and only the S keys of its own are read for each sequence:

    flops   4 b H len_q (P + S) d                as without sharing
    keys    P + b S rows read and kept           instead of b (P + S)

A second shared level (the paper's tree, section 3.4): groups of `group_2` sequences that share
`len_shared_2` keys behind the prefix, each group's queries again one product.

`PrefixGroupedAttention` is Prefix Grouper (Liu et al. 2025, arXiv 2506.05433, section 3): training
on G responses to one prompt. The batch holds [P; R_1; ...; R_G] once; the prompt attends to itself,
each response to [P; R_i], and every linear layer sees P + G R tokens instead of G (P + R).

Exact, all of them. Ignored: copies that bring prompt and response keys side by side, padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwmodels.dtypes import BF16, FP32, DType
from hwmodels.errors import InputError
from workloads.machine import Machine, Values
from workloads.numeric import Num, any_true, ceil_div, floor, minimum
from workloads.op import Arrays, ProvedOp, Stage, require_fit
from workloads.ops.attention import probabilities
from workloads.ops.decode_attention import DecodeAttention
from workloads.ops.elementwise import Elementwise
from workloads.ops.flash_attention import FP32_BYTES, FlashAttention2
from workloads.ops.flash_attention_backward import FlashAttention2Backward
from workloads.ops.row_map import RowMap
from workloads.ops.staged import ProvedStagedOp
from workloads.work import Work

FA2 = "fa2"
"""The kernel both papers call for a prefix: FlashAttention-2's."""


@dataclass(frozen=True, kw_only=True)
class CombineParts(ProvedOp):
    """O[rows, dim] and its logsumexp from `num_parts` attentions over parts of the keys.

    Reads every part's output in `dtype` and logsumexp in fp32, writes one of each. With n parts a
    row takes 4 n + 1 vector flops for the weights (maximum, subtract, sum, scale; the maximum is
    added again), n + 2 special functions (exp, 1 / sum, log), 2 n dim flops for the weighted sum.

    >>> work = CombineParts(rows=8, dim=128, num_parts=2).work(2**16)
    >>> work.read_bytes == 8 * 2 * (2 * 128 + 4), work.special_ops == 8 * 4
    (True, True)
    """

    name: ClassVar[str] = "combine_parts"
    rows: Num
    dim: Num
    num_parts: Num = 2
    dtype: DType = BF16

    def stages(self) -> tuple[Stage, ...]:
        """A kernel that gives rows to thread blocks; a logsumexp counts as some more columns."""
        cols = self.dim + ceil_div(FP32_BYTES, self.dtype.bytes_per_element)
        flops, special = self._per_row()
        kernel = RowMap(
            rows=self.rows, cols=cols, num_inputs=self.num_parts, dtype=self.dtype,
            vector_flops_per_element=flops / cols, special_ops_per_element=special / cols,
        )  # fmt: skip
        return (Stage("combine", kernel),)

    def _per_row(self) -> tuple[Num, Num]:
        n = self.num_parts
        return 4 * n + 1 + 2 * n * self.dim, n + 2

    def _row_bytes(self) -> Num:
        """What a row holds in fast memory: parts, weights, weighted parts, sums."""
        part = self.dim * (self.dtype.bytes_per_element + FP32_BYTES) + FP32_BYTES
        return self.num_parts * part + FP32_BYTES * (self.dim + 3)

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Rows held together with all their parts."""
        require_fit(self.name, fast_bytes, self._row_bytes(), "one row of every part")
        return {"rows": minimum(self.rows, floor(fast_bytes / self._row_bytes()))}

    def work(self, fast_bytes: Num) -> Work:
        """Every part once, the output once."""
        self.tiling(fast_bytes)
        one = self.rows * (self.dim * self.dtype.bytes_per_element + FP32_BYTES)
        flops, special = self._per_row()
        return Work(
            vector_flops=self.rows * flops,
            special_ops=self.rows * special,
            read_bytes=self.num_parts * one,
            write_bytes=one,
        )

    def compulsory_bytes(self) -> Num:
        """Nothing is read twice."""
        one = self.rows * (self.dim * self.dtype.bytes_per_element + FP32_BYTES)
        return (self.num_parts + 1) * one

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """parts[num_parts, rows, dim] and lse[num_parts, rows, 1]."""
        parts, rows, dim = int(self.num_parts), int(self.rows), int(self.dim)
        return {
            "parts": rng.standard_normal((parts, rows, dim)),
            "lse": rng.standard_normal((parts, rows, 1)),
        }

    def reference(self, inputs: Arrays) -> Arrays:
        """The weights in one expression."""
        weights = np.exp(inputs["lse"])
        total = weights.sum(axis=0)
        return {"o": (inputs["parts"] * weights).sum(axis=0) / total, "lse": np.log(total)}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """One kernel over blocks of rows."""
        parts = machine.place(inputs["parts"], self.dtype)
        sums = machine.place(inputs["lse"], FP32)
        rows, dim = parts.values.shape[1:]
        o, lse = machine.empty((rows, dim), self.dtype), machine.empty((rows, 1), FP32)
        step = int(self.tiling(machine.fast_bytes)["rows"])
        with machine.kernel():
            for start in range(0, rows, step):
                index = slice(start, min(start + step, rows))
                with machine.scope():
                    held = machine.load(parts, (slice(None), index))
                    weights = machine.load(sums, (slice(None), index))
                    top = machine.reduce("max", weights, axis=0)
                    machine.vector(weights.values - top.values, into=weights)
                    machine.special(np.exp(weights.values), into=weights)
                    total = machine.reduce("sum", weights, axis=0)
                    inverse = machine.special(1 / total.values)
                    machine.special(np.log(total.values), into=total)
                    machine.vector(top.values + total.values, into=total)
                    machine.vector(weights.values * inverse.values, into=weights)
                    added = machine.vector(held.values * weights.values)
                    out = machine.reduce("sum", added, axis=0)
                    machine.store(out, o, index)
                    machine.store(total, lse, index)
        return {"o": o.values, "lse": lse.values}


@dataclass(frozen=True, kw_only=True)
class SharedPrefixAttention(ProvedOp):
    """`len_q` new tokens of each of `batch` sequences over [prefix; shared by a group; own keys].

    Q[batch, num_heads, len_q, head_dim]; the prefix is K, V[num_kv_heads, len_prefix, head_dim],
    the second level (none by default) [batch / group_2, num_kv_heads, len_shared_2, head_dim], and
    [batch, num_kv_heads, len_suffix, head_dim] are a sequence's own keys, the new tokens last
    among them (causal). `num_splits` parts of the prefix run side by side, as FlashAttention-2's
    library splits keys where queries alone leave SMs idle; each is one more part to combine.

    >>> op = SharedPrefixAttention(batch=1024, num_heads=32, len_prefix=16384, len_suffix=64,
    ...                            head_dim=128)
    >>> op.cache_bytes() == 2 * 2 * 32 * 128 * (16384 + 1024 * 64)
    True
    >>> op.unshared().cache_bytes() / op.cache_bytes()     # b (P + S) / (P + b S)
    205.6
    """

    name: ClassVar[str] = "shared_prefix_attention"
    cheaper: ClassVar[tuple[str, ...]] = ("num_kv_heads", "num_splits", "group_2")
    batch: Num
    num_heads: Num
    num_kv_heads: Num | None = None
    len_q: Num = 1
    len_prefix: Num
    len_suffix: Num
    len_shared_2: Num | None = None
    group_2: Num = 1
    head_dim: Num
    num_splits: Num = 1
    dtype: DType = BF16

    def check(self) -> None:
        """Heads, groups and parts that divide; new tokens among the suffix."""
        for small, large in (
            ("num_kv_heads", "num_heads"), ("group_2", "batch"), ("num_splits", "len_prefix"),
        ):  # fmt: skip
            divisor = getattr(self, small)
            if divisor is not None and any_true(getattr(self, large) % divisor != 0):
                raise InputError(
                    f"{self.name}: {small} = {divisor} must divide {large} = "
                    f"{getattr(self, large)}; give a divisor of it, or leave {small} out"
                )
        if any_true(self.len_q > self.len_suffix):
            raise InputError(
                f"{self.name}: len_suffix = {self.len_suffix} counts the len_q = {self.len_q} new "
                f"tokens; give at least as many"
            )

    @property
    def kv_heads(self) -> Num:
        """`num_kv_heads`, else `num_heads`."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def _attention(self, batch: Num, len_q: Num, len_kv: Num, causal: bool) -> FlashAttention2:
        return FlashAttention2(
            batch=batch, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, len_q=len_q,
            len_kv=len_kv, head_dim=self.head_dim, causal=causal, dtype=self.dtype,
        )  # fmt: skip

    def parts(self) -> dict[str, FlashAttention2]:
        """One attention for each level: queries of all descendants against the level's keys."""
        found = {
            "prefix": self._attention(
                self.num_splits, self.batch * self.len_q, self.len_prefix // self.num_splits, False
            )
        }
        if self.len_shared_2 is not None:
            found["shared_2"] = self._attention(
                self.batch // self.group_2, self.group_2 * self.len_q, self.len_shared_2, False
            )
        return found | {"suffix": self._attention(self.batch, self.len_q, self.len_suffix, True)}

    def combine(self) -> CombineParts:
        """The kernel that puts the parts together."""
        return CombineParts(
            rows=self.batch * self.num_heads * self.len_q, dim=self.head_dim, dtype=self.dtype,
            num_parts=self.num_splits + (1 if self.len_shared_2 is None else 2),
        )  # fmt: skip

    def unshared(self) -> DecodeAttention:
        """The same keys without sharing, one new token: every sequence with a copy of them all."""
        length = self.len_prefix + self.len_suffix
        if self.len_shared_2 is not None:
            length = length + self.len_shared_2
        return DecodeAttention(
            batch=self.batch, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
            len_kv=length, head_dim=self.head_dim, dtype=self.dtype,
        )  # fmt: skip

    def cache_bytes(self) -> Num:
        """Keys and values that are kept, of one layer: P + b S rows."""
        rows = self.len_prefix + self.batch * self.len_suffix
        if self.len_shared_2 is not None:
            rows = rows + self.batch // self.group_2 * self.len_shared_2
        return rows * self.kv_heads * 2 * self.head_dim * self.dtype.bytes_per_element

    def stages(self) -> tuple[Stage, ...]:
        """FlashAttention-2 for what is shared, a decoding kernel for each sequence's own keys.

        The decoding kernel packs a sequence's new tokens like heads, which computes their mask.
        """
        kernels = self.parts()
        kernels.pop("suffix")
        own = DecodeAttention(
            batch=self.batch, num_heads=self.num_heads * self.len_q, num_kv_heads=self.kv_heads,
            len_kv=self.len_suffix, head_dim=self.head_dim, dtype=self.dtype,
        )  # fmt: skip
        shared = (Stage(name, op, kernel=FA2) for name, op in kernels.items())
        return (*shared, Stage("suffix", own), Stage("combine", self.combine()))

    def tiling(self, fast_bytes: Num) -> Mapping[str, Num]:
        """Those of the kernels, prefixed with the part's name."""
        return {
            f"{name}_{key}": value
            for name, op in (*self.parts().items(), ("combine", self.combine()))
            for key, value in op.tiling(fast_bytes).items()
        }

    def work(self, fast_bytes: Num) -> Work:
        """The sum of the kernels."""
        total = self.combine().work(fast_bytes)
        for op in self.parts().values():
            total = total + op.work(fast_bytes)
        return total

    def min_flops(self) -> Mapping[DType, Num]:
        """4 d flops for every pair that a query may see."""
        return {self.dtype: sum(op.min_flops()[self.dtype] for op in self.parts().values())}

    def compulsory_bytes(self) -> Num:
        """The kept rows once, Q and O once."""
        elements = 2 * self.batch * self.num_heads * self.len_q * self.head_dim
        return self.cache_bytes() + elements * self.dtype.bytes_per_element

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, and k and v of every level by its name: k_prefix, v_prefix, k_suffix ..."""
        batch, heads, kv_heads, dim = (
            int(n) for n in (self.batch, self.num_heads, self.kv_heads, self.head_dim)
        )
        levels = [("prefix", 1, self.len_prefix), ("suffix", batch, self.len_suffix)]
        if self.len_shared_2 is not None:
            levels.insert(1, ("shared_2", batch // int(self.group_2), self.len_shared_2))
        found = {"q": rng.standard_normal((batch, heads, int(self.len_q), dim))}
        for name, count, length in levels:
            for kind in ("k", "v"):
                shape = (count, kv_heads, int(length), dim)
                found[f"{kind}_{name}"] = rng.standard_normal(shape)
        return found

    def reference(self, inputs: Arrays) -> Arrays:
        """One softmax over all keys of a sequence, copies of what is shared laid side by side."""
        batch = int(self.batch)

        def whole(kind: str) -> Values:
            levels = [inputs[f"{kind}_{name}"] for name in self.parts()]
            return np.concatenate([np.repeat(x, batch // len(x), axis=0) for x in levels], axis=2)

        keys, values = whole("k"), whole("v")
        plain = self._attention(self.batch, self.len_q, keys.shape[2], True)
        p, lse = probabilities(plain, {"q": inputs["q"], "k": keys})
        return {"o": p @ np.repeat(values, plain.sizes().group, axis=1), "lse": lse}

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The parts' programs, then the one that combines them."""
        outputs: list[Arrays] = []
        for name, op in self.parts().items():
            splits = int(self.num_splits) if name == "prefix" else 1
            key, value = (_split(inputs[f"{kind}_{name}"], splits) for kind in ("k", "v"))
            query = _grouped(inputs["q"], int(op.batch) // splits)
            part = {"q": np.repeat(query, splits, axis=0), "k": key, "v": value}
            found = op.program(machine, part)
            outputs.extend(
                {n: self._rows(x[i::splits]) for n, x in found.items()} for i in range(splits)
            )
        combined = self.combine().program(
            machine,
            {
                "parts": np.stack([x["o"] for x in outputs]),
                "lse": np.stack([x["lse"] for x in outputs]),
            },
        )
        shape = inputs["q"].shape[:3]
        return {name: x.reshape(*shape, -1) for name, x in combined.items()}

    def _rows(self, values: Values) -> Values:
        """[groups, heads, members len_q, width] as rows in the order of q: addressing, not work."""
        groups, heads, rows, width = values.shape
        split = values.reshape(groups, heads, rows // int(self.len_q), int(self.len_q), width)
        return split.swapaxes(1, 2).reshape(-1, width)


def _grouped(q: Values, groups: int) -> Values:
    """q[batch, heads, len_q, d] as [groups, heads, members len_q, d]: addressing, not work."""
    batch, heads, len_q, dim = q.shape
    split = q.reshape(groups, batch // groups, heads, len_q, dim)
    return split.swapaxes(1, 2).reshape(groups, heads, -1, dim)


def _split(x: Values, splits: int) -> Values:
    """[n, heads, len, d] as [n splits, heads, len / splits, d]."""
    count, heads, length, dim = x.shape
    parts = x.reshape(count, heads, splits, length // splits, dim)
    return parts.swapaxes(1, 2).reshape(count * splits, heads, -1, dim)


# ---- training on groups of responses -------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PrefixGroupedAttention(ProvedStagedOp):
    """`num_responses` responses of `len_response` tokens to each of `batch` prompts, causal.

    q[batch, num_heads, P + G R, head_dim], k and v alike with num_kv_heads: the prompt, then the
    responses one after another. The second kernel reads the prompt's keys once a response.

    >>> op = PrefixGroupedAttention(num_responses=8, len_prefix=4096, len_response=512,
    ...                             num_heads=32, head_dim=128)
    >>> op.num_tokens() / op.num_tokens_repeated()               # (P + G R) / (G (P + R))
    0.2222222222222222
    >>> flops = op.min_flops()[op.dtype]
    >>> flops == 4 * 32 * 128 * (4096 * 4097 / 2 + 8 * (512 * 4096 + 512 * 513 / 2))
    True
    """

    name: ClassVar[str] = "prefix_grouped_attention"
    cheaper: ClassVar[tuple[str, ...]] = ("num_kv_heads",)
    batch: Num = 1
    num_responses: Num
    len_prefix: Num
    len_response: Num
    num_heads: Num
    num_kv_heads: Num | None = None
    head_dim: Num
    dtype: DType = BF16

    def check(self) -> None:
        """Heads that divide."""
        if any_true(self.num_heads % self.kv_heads != 0):
            raise InputError(
                f"{self.name}: num_kv_heads = {self.num_kv_heads} must divide "
                f"num_heads = {self.num_heads}"
            )

    @property
    def kv_heads(self) -> Num:
        """`num_kv_heads`, else `num_heads`."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def num_tokens(self) -> Num:
        """Tokens that linear layers see: P + G R a prompt."""
        return self.batch * (self.len_prefix + self.num_responses * self.len_response)

    def num_tokens_repeated(self) -> Num:
        """The same where every response brings a copy of its prompt: G (P + R)."""
        return self.batch * self.num_responses * (self.len_prefix + self.len_response)

    def repeated(self) -> FlashAttention2:
        """The attention that this one replaces: G sequences [P; R] a prompt."""
        length = self.len_prefix + self.len_response
        return FlashAttention2(
            batch=self.batch * self.num_responses, num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads, len_q=length, head_dim=self.head_dim, causal=True,
            dtype=self.dtype,
        )  # fmt: skip

    def attentions(self) -> tuple[FlashAttention2, FlashAttention2]:
        """The prompt to itself, and each response to prompt and response."""
        whole = self.repeated()
        prompt = whole.over(batch=self.batch, len_q=self.len_prefix)
        length = self.len_prefix + self.len_response
        return prompt, whole.over(len_q=self.len_response, len_kv=length)

    def stages(self) -> tuple[Stage, ...]:
        """Two kernels."""
        prompt, responses = self.attentions()
        return Stage("prompt", prompt, kernel=FA2), Stage("responses", responses, kernel=FA2)

    def compulsory_bytes(self) -> Num:
        """Q, K, V and O of every token once, the logsumexps."""
        rows = self.num_tokens()
        per_row = 2 * (self.num_heads + self.kv_heads) * self.head_dim
        return rows * (per_row * self.dtype.bytes_per_element + self.num_heads * FP32_BYTES)

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k and v of all tokens."""
        tokens, dim = int(self.num_tokens() // self.batch), int(self.head_dim)
        heads = {"q": self.num_heads, "k": self.kv_heads, "v": self.kv_heads}
        return {
            name: rng.standard_normal((int(self.batch), int(count), tokens, dim))
            for name, count in heads.items()
        }

    def _prompt(self, x: Values) -> Values:
        """The prompt's rows of an array over all tokens."""
        return x[:, :, : int(self.len_prefix)]

    def _responses(self, x: Values) -> Values:
        """The responses' rows as sequences of their own, [batch G, heads, R, width]."""
        batch, heads, _, width = x.shape
        split = x[:, :, int(self.len_prefix) :].reshape(
            batch, heads, int(self.num_responses), -1, width
        )
        return split.swapaxes(1, 2).reshape(-1, heads, int(self.len_response), width)

    def _with_prompt(self, x: Values) -> Values:
        """Each response's rows behind its prompt's, [batch G, heads, P + R, width]."""
        prompt = np.repeat(self._prompt(x), int(self.num_responses), axis=0)
        return np.concatenate([prompt, self._responses(x)], axis=2)

    def _joined(self, prompt: Values, responses: Values) -> Values:
        """The inverse of `_prompt` and `_responses`."""
        batch, heads, _, width = prompt.shape
        split = responses.reshape(batch, -1, heads, int(self.len_response), width)
        rows = split.swapaxes(1, 2).reshape(batch, heads, -1, width)
        return np.concatenate([prompt, rows], axis=2)

    def mask(self) -> Values:
        """Which token may see which: its own response up to itself, and the prompt."""
        prompt, length = int(self.len_prefix), int(self.len_response)
        place = np.arange(prompt + int(self.num_responses) * length)
        owner = np.where(place < prompt, -1, (place - prompt) // length)
        same = (owner[:, None] == owner) | (owner == -1)
        seen: Values = same & (place[:, None] >= place)
        return seen

    def reference(self, inputs: Arrays) -> Arrays:
        """One masked softmax over all tokens."""
        group = int(self.num_heads // self.kv_heads)
        p, lse = self._probabilities(inputs)
        return {"o": p @ np.repeat(inputs["v"], group, axis=1), "lse": lse}

    def _probabilities(self, inputs: Arrays) -> tuple[Values, Values]:
        keys = np.repeat(inputs["k"], int(self.num_heads // self.kv_heads), axis=1)
        scores = inputs["q"] @ keys.swapaxes(-1, -2) * float(self.head_dim) ** -0.5
        exponentials = np.where(self.mask(), np.exp(scores), 0.0)
        total = exponentials.sum(axis=-1, keepdims=True)
        return exponentials / total, np.log(total)

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The two kernels' programs."""
        prompt, responses = self.attentions()
        first = prompt.program(machine, {n: self._prompt(x) for n, x in inputs.items()})
        second = responses.program(
            machine,
            {
                "q": self._responses(inputs["q"]),
                "k": self._with_prompt(inputs["k"]),
                "v": self._with_prompt(inputs["v"]),
            },
        )
        return {name: self._joined(x, second[name]) for name, x in first.items()}


@dataclass(frozen=True, kw_only=True)
class PrefixGroupedAttentionBackward(PrefixGroupedAttention):
    """Backward pass: both kernels' gradients, those of the prompt's keys added over responses.

    The last two kernels add G + 1 arrays of the prompt's dK and dV. `o`, `do` and the logsumexp
    come as the forward pass leaves them.

    >>> shape = dict(num_responses=8, len_prefix=4096, len_response=512, num_heads=32, head_dim=128)
    >>> forward, backward = PrefixGroupedAttention(**shape), PrefixGroupedAttentionBackward(**shape)
    >>> backward.min_flops()[BF16] / forward.min_flops()[BF16], len(backward.stages())
    (2.5, 3)
    """

    name: ClassVar[str] = "prefix_grouped_attention_backward"

    def gradients(self) -> tuple[FlashAttention2Backward, FlashAttention2Backward]:
        """The backward kernels of the forward pass's two."""
        first, second = (
            FlashAttention2Backward(
                batch=op.batch, num_heads=op.num_heads, num_kv_heads=op.num_kv_heads,
                len_q=op.len_q, len_kv=op.len_kv, head_dim=op.head_dim, causal=True,
                dtype=op.dtype,
            )
            for op in self.attentions()
        )  # fmt: skip
        return first, second

    def total(self) -> Elementwise:
        """Sum of the prompt's dK (or dV) over the prompt's own and G responses."""
        elements = self.batch * self.kv_heads * self.len_prefix * self.head_dim
        return Elementwise(
            num_elements=elements, num_inputs=self.num_responses + 1,
            vector_flops_per_element=self.num_responses, dtype=self.dtype,
        )  # fmt: skip

    def stages(self) -> tuple[Stage, ...]:
        """Two backward kernels and the sums, for dK and for dV."""
        prompt, responses = self.gradients()
        return (
            Stage("prompt", prompt, kernel=FA2),
            Stage("responses", responses, kernel=FA2),
            Stage("sums", self.total(), times=2),
        )

    def compulsory_bytes(self) -> Num:
        """Q, K, V, O and dO once, dQ, dK and dV once, the logsumexps."""
        per_row = 4 * (self.num_heads + self.kv_heads) * self.head_dim
        row_bytes = per_row * self.dtype.bytes_per_element + self.num_heads * FP32_BYTES
        return self.num_tokens() * row_bytes

    def inputs(self, rng: np.random.Generator) -> Arrays:
        """q, k, v and do at random; o and lse as the forward pass leaves them."""
        forward = super().inputs(rng)
        found = super().reference(forward)
        return {**forward, **found, "do": rng.standard_normal(found["o"].shape)}

    def reference(self, inputs: Arrays) -> Arrays:
        """The chain rule on whole matrices, under the mask of the group."""
        batch, heads, kv_heads = (int(n) for n in (self.batch, self.num_heads, self.kv_heads))
        p, _ = self._probabilities(inputs)
        keys, values = (np.repeat(inputs[n], heads // kv_heads, axis=1) for n in ("k", "v"))
        dp = inputs["do"] @ values.swapaxes(-1, -2)
        ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * float(self.head_dim) ** -0.5

        def over_group(per_head: Values) -> Values:
            split = per_head.reshape(batch, kv_heads, heads // kv_heads, *per_head.shape[2:])
            summed: Values = split.sum(axis=2)
            return summed

        return {
            "dq": ds @ keys,
            "dk": over_group(ds.swapaxes(-1, -2) @ inputs["q"]),
            "dv": over_group(p.swapaxes(-1, -2) @ inputs["do"]),
        }

    def program(self, machine: Machine, inputs: Arrays) -> Arrays:
        """The two backward programs, then the sums of the prompt's dK and dV."""
        prompt, responses = self.gradients()
        by_query = {n: inputs[n] for n in ("q", "do", "o", "lse")}
        by_key = {n: inputs[n] for n in ("k", "v")}
        first = prompt.program(machine, {n: self._prompt(x) for n, x in inputs.items()})
        second = responses.program(
            machine,
            {n: self._responses(x) for n, x in by_query.items()}
            | {n: self._with_prompt(x) for n, x in by_key.items()},
        )
        outputs = {"dq": self._joined(first["dq"], second["dq"])}
        length = int(self.len_prefix)
        for name in ("dk", "dv"):
            shared = self._summed(machine, first[name], second[name][:, :, :length])
            outputs[name] = self._joined(shared, second[name][:, :, length:])
        return outputs

    def _summed(self, machine: Machine, own: Values, others: Values) -> Values:
        """The prompt's gradient from its own kernel and from every response."""
        split = others.reshape(own.shape[0], -1, *own.shape[1:]).swapaxes(0, 1)
        arrays = [own, *split]
        found = self.total().program(
            machine, {f"x{i}": x.reshape(-1) for i, x in enumerate(arrays)}
        )
        summed: Values = found["y0"].reshape(own.shape)
        return summed
