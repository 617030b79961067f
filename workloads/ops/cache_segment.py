"""What a compressed cache is made of: runs of tokens stored the same way, and their bytes.

A `Coding` stores an [n, d] array of keys or values as `bits`-bit integers, `group` of which share a
scale and, if asymmetric, a zero point: x = scale code + zero. Groups run along the tokens of a
channel (KIVI's keys, arXiv 2402.02750) or along the channels of a token. Block floating point is
the same with the shared exponent as scale and no zero point. With S scales of s bits:

    bytes  n d bits / 8 + S (1 + zero) s / 8,     S = d ceil(n / group)  or  n ceil(d / group)

A `Segment` is `num` runs of `tokens` tokens with a coding of keys and of values and, beside the
codes, o outliers in coordinate form (6 bytes: a value and two 16-bit indices) and a correction of
rank r, x + left[n, r] right[d, r]^T (GEAR, arXiv 2403.05527, equation 3), in the cache's format.
Sixteen bits are the values themselves. Ignored: padding of packed words, page tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from hwmodels.dtypes import DType
from workloads.machine import Values, slices
from workloads.numeric import Num, any_true, ceil_div, floor, maximum, minimum, where
from workloads.op import Arrays

WHOLE_BITS: Final = 16
"""Width at which an element is stored as it is."""
KNOWN_BITS: Final = (2, 3, 4, 8, WHOLE_BITS)
"""Widths that packed kernels exist for."""
POSITION: Final = DType("int16", 16, "int32")
OUTLIER_BYTES: Final = 6
"""fp16 value, token and channel of 16 bits each."""
FLAG: Final = DType("flag", 1, "int32")
"""One bit a channel: kept or not."""


def code_dtype(bits: Num) -> DType:
    """Integers of that many bits."""
    return DType(f"code{int(bits)}", int(bits), "int32")


def share(frac: Num, whole: Num) -> Num:
    """The nearest whole number to a fraction of `whole`.

    >>> share(0.02, 128), share(0.5, 5)
    (3, 3)
    """
    return floor(frac * whole + 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coding:
    """How an [n, d] array is stored; sizes broadcast."""

    bits: Num = WHOLE_BITS
    group: Num | None = None
    by_channel: bool = False
    zero_point: bool = True
    scale_bits: Num = 16

    def run(self, n: Num, d: Num) -> Num:
        """Elements that share a scale: `group`, or all there are along its axis (1 of nothing)."""
        whole = maximum(n if self.by_channel else d, 1)
        return whole if self.group is None else minimum(self.group, whole)

    def num_scales(self, n: Num, d: Num) -> Num:
        """Groups of the array; none where it is stored as it is."""
        run = self.run(n, d)
        groups = d * ceil_div(n, run) if self.by_channel else n * ceil_div(d, run)
        return where(self.bits < WHOLE_BITS, groups, 0)

    def num_bytes(self, n: Num, d: Num, element_bytes: float = 2.0) -> Num:
        """Codes, scales and zero points; elements stored as they are have `element_bytes`.

        >>> Coding(bits=4, group=64, by_channel=True).num_bytes(128, 128)
        9216.0
        """
        per_group = (1 + self.zero_point) * self.scale_bits / 8
        width = where(self.bits < WHOLE_BITS, self.bits / 8, element_bytes)
        return n * d * width + self.num_scales(n, d) * per_group

    def flops(self) -> Num:
        """Vector flops to restore an element: scale it, add the zero point."""
        return where(self.bits < WHOLE_BITS, 1 + self.zero_point, 0)

    def token_run(self, n: Num) -> Num:
        """Tokens that a scale belongs to: 1 where each has its own."""
        if not self.by_channel:
            return 1
        return where(self.bits < WHOLE_BITS, self.run(n, 1), 1)

    def inputs(self, rng: np.random.Generator, lead: tuple[int, ...], n: int, d: int) -> Arrays:
        """Random codes [*lead, n, d] with scales and zero points."""
        if self.bits >= WHOLE_BITS:
            return {"codes": rng.standard_normal((*lead, n, d))}
        top = 2 ** int(self.bits)
        low = 0 if self.zero_point else -top // 2
        codes = rng.integers(low, low + top, (*lead, n, d)).astype(np.float64)
        run = int(self.run(n, d))
        groups = (-(-n // run), d) if self.by_channel else (n, -(-d // run))
        found = {"codes": codes, "scale": (0.1 + rng.random((*lead, *groups))) / top}
        if self.zero_point:
            found["zero"] = rng.standard_normal((*lead, *groups))
        return found

    def restored(self, stored: Arrays, n: int, d: int) -> Values:
        """The array that the codes stand for; naive."""
        codes = stored["codes"]
        if "scale" not in stored:
            return codes
        spread = codes * self.spread(stored["scale"], n, d)
        return spread + self.spread(stored["zero"], n, d) if "zero" in stored else spread

    def spread(self, scales: Values, n: int, d: int, run: int | None = None) -> Values:
        """Scales of [n, d] elements, each repeated over its group."""
        run = int(self.run(n, d)) if run is None else run
        axis = -2 if self.by_channel else -1
        whole: Values = np.repeat(scales, run, axis=axis)
        return whole[..., :n, :d]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """`num` runs of `tokens` tokens: keys of `key_width` channels, values of `value_width`.

    `flags`: channels that a one-bit mask speaks of, which of them the keys keep (0: no mask).
    `magnitudes`: every key and value is a direction with a length of its own, 16 bits each.
    """

    tokens: Num
    key_width: Num
    value_width: Num
    num: Num = 1
    key: Coding = Coding()
    value: Coding = Coding()
    rank: Num = 0
    outlier_frac: Num = 0.0
    flags: Num = 0
    magnitudes: bool = False

    @property
    def used(self) -> Num:
        """1, or 0 where the runs are empty."""
        return minimum(self.tokens, 1)

    @property
    def key_outliers(self) -> Num:
        """Outliers of a run's keys."""
        return share(self.outlier_frac, self.tokens * self.key_width)

    @property
    def value_outliers(self) -> Num:
        """Outliers of a run's values."""
        return share(self.outlier_frac, self.tokens * self.value_width)

    @property
    def widths(self) -> Num:
        """Channels of a key and a value."""
        return self.key_width + self.value_width

    def num_bytes(self, element_bytes: float) -> Num:
        """Bytes of all runs; `element_bytes` is what an element has that is stored as it is."""
        n, e = self.tokens, element_bytes
        codes = self.key.num_bytes(n, self.key_width, e)
        codes = codes + self.value.num_bytes(n, self.value_width, e)
        outliers = OUTLIER_BYTES * (self.key_outliers + self.value_outliers)
        low_rank = self.rank * (2 * n + self.used * self.widths) * e
        lengths = 2 * n * e if self.magnitudes else 0
        return self.num * (codes + outliers + low_rank + lengths + self.used * self.flags / 8)

    def steps(self, chunk: Num) -> Num:
        """Chunks of a run: they keep to the groups of keys, or divide one (see `chunks`)."""
        run, n = self.key.token_run(self.tokens), self.tokens
        aligned = maximum(chunk // run, 1) * run
        inside = (n // run) * ceil_div(run, chunk) + ceil_div(n % run, chunk)
        return where(chunk >= run, ceil_div(n, aligned), inside)

    def chunks(self, chunk: int) -> list[tuple[slice, list[slice]]]:
        """Tokens whose key scales are loaded together, and the chunks they are worked on in.

        >>> coding = Coding(bits=4, group=4, by_channel=True)
        >>> run = Segment(tokens=6, key_width=1, value_width=1, key=coding)
        >>> [(o.stop, [i.stop for i in inner]) for o, inner in run.chunks(3)], run.steps(3)
        ([(4, [3, 4]), (6, [6])], 3)
        """
        n, run = int(self.tokens), int(self.key.token_run(self.tokens))
        if chunk >= run:
            return [(part, [part]) for part in slices(n, chunk // run * run)]
        return [
            (part, [slice(part.start + s.start, part.start + s.stop) for s in
                    slices(part.stop - part.start, chunk)])
            for part in slices(n, run)
        ]  # fmt: skip

    def vector_flops(self) -> Num:
        """Flops to restore the keys and values of all runs once, outliers added."""
        restore = self.key_width * self.key.flops() + self.value_width * self.value.flops()
        return self.num * (self.tokens * restore + self.key_outliers + self.value_outliers)

    def is_plain(self) -> bool:
        """Nothing but elements as they are?"""
        return not any_true((self.key.bits < WHOLE_BITS) | (self.value.bits < WHOLE_BITS))

    def inputs(self, rng: np.random.Generator, streams: int) -> Arrays:
        """Random contents of all runs of `streams` caches; keys of the result begin k_ or v_."""
        lead, n, r = (streams, int(self.num)), int(self.tokens), int(self.rank)
        found: dict[str, Values] = {}
        for side, coding, width, count in self._sides():
            d, o = int(width), int(count)
            for key, value in coding.inputs(rng, lead, n, d).items():
                found[f"{side}_{key}"] = value
            found[f"{side}_left"] = rng.standard_normal((*lead, n, r))
            found[f"{side}_right"] = rng.standard_normal((*lead, d, r))
            tokens = np.sort(rng.integers(0, max(n, 1), (*lead, o)), axis=-1)
            channels = rng.integers(0, d, (*lead, o))
            found[f"{side}_token"], found[f"{side}_channel"] = tokens * 1.0, channels * 1.0
            found[f"{side}_outlier"] = 5 * rng.standard_normal((*lead, o))
            found[f"{side}_length"] = 0.5 + rng.random((*lead, n, 1))
        if int(self.flags):
            kept = rng.permuted(np.tile(np.arange(int(self.flags)), (streams, 1)), axis=-1)
            found["kept"] = (kept < int(self.key_width)) * 1.0
        return found

    def _sides(self) -> tuple[tuple[str, Coding, Num, Num], ...]:
        return (
            ("k", self.key, self.key_width, self.key_outliers),
            ("v", self.value, self.value_width, self.value_outliers),
        )

    def dense(self, stored: Arrays) -> tuple[Values, Values]:
        """Keys and values [streams, num tokens, width] that the runs stand for; naive."""
        n, whole = int(self.tokens), []
        for side, coding, width, _ in self._sides():
            d = int(width)
            part = {name.removeprefix(f"{side}_"): a for name, a in stored.items()}
            x = coding.restored({k: part[k] for k in ("codes", "scale", "zero") if k in part}, n, d)
            x = x + part["left"] @ part["right"].swapaxes(-1, -2)
            at = part["token"].astype(np.int64), part["channel"].astype(np.int64)
            lead = np.indices(at[0].shape)[:2]
            np.add.at(x, (*lead, *at), part["outlier"])
            x = x * part["length"] if self.magnitudes else x
            x = x.reshape(x.shape[0], -1, d)
            if side == "k" and "kept" in stored:
                x = _widened(x, stored["kept"])
            whole.append(x)
        return whole[0], whole[1]


def _widened(keys: Values, kept: Values) -> Values:
    """Keys with zeros where a channel was pruned."""
    wide = np.zeros((*keys.shape[:2], kept.shape[-1]))
    for stream in range(keys.shape[0]):
        wide[stream][:, kept[stream] > 0] = keys[stream]
    return wide
