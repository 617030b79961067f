"""In which order the ranks of a plan's axes lie, innermost first, and how far apart that puts them.

Ranks are numbered along the axes tp, cp, dp, pp in some order; the devices of a node have
consecutive numbers. The stride of an axis is the product of the degrees inside it:

    order tp-cp-dp-pp:   tp 1,   cp tp,   dp tp cp,   pp tp cp dp
    order tp-cp-pp-dp:   tp 1,   cp tp,   pp tp cp,   dp tp cp pp

Named as Megatron Core names its `order` (`RankGenerator` in parallel_state.py, default
tp-cp-ep-dp-pp; its option --use-tp-pp-dp-mapping asks for tp-cp-ep-pp-dp), without ep: experts lie
on the ranks of a stage (`workloads.placement`).

    Implemented in: `strides_of`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from hwmodels.errors import InputError, UnknownNameError
from workloads.numeric import Array, Num, is_scalar, minimum, where


class AxisOrder(IntEnum):
    """Axes of a plan, innermost first: every order of the four.

    Those with tp outside other axes can be laid out, but a planner has no use for them: see
    `simulator.planners.axis_orders`.
    """

    TP_CP_DP_PP = 0
    TP_CP_PP_DP = 1
    TP_PP_CP_DP = 2
    TP_DP_CP_PP = 3
    TP_DP_PP_CP = 4
    TP_PP_DP_CP = 5
    CP_TP_DP_PP = 6
    CP_TP_PP_DP = 7
    CP_PP_TP_DP = 8
    CP_DP_TP_PP = 9
    CP_DP_PP_TP = 10
    CP_PP_DP_TP = 11
    DP_TP_CP_PP = 12
    DP_TP_PP_CP = 13
    DP_PP_TP_CP = 14
    DP_CP_TP_PP = 15
    DP_CP_PP_TP = 16
    DP_PP_CP_TP = 17
    PP_TP_CP_DP = 18
    PP_TP_DP_CP = 19
    PP_DP_TP_CP = 20
    PP_CP_TP_DP = 21
    PP_CP_DP_TP = 22
    PP_DP_CP_TP = 23

    @property
    def label(self) -> str:
        """The name as it is written: 'tp-cp-dp-pp'."""
        return self.name.casefold().replace("_", "-")

    @property
    def axes(self) -> tuple[str, ...]:
        """Innermost first.

        >>> AxisOrder.TP_CP_PP_DP.axes
        ('tp', 'cp', 'pp', 'dp')
        """
        return tuple(self.label.split("-"))


ORDERS: Final[Mapping[str, AxisOrder]] = {order.label: order for order in AxisOrder}
"""Orders by the name that commands take."""


def order_named(name: str) -> AxisOrder:
    """The order of that name.

    >>> order_named("tp-cp-pp-dp")
    <AxisOrder.TP_CP_PP_DP: 1>
    """
    found = ORDERS.get(name.casefold())
    if found is None:
        known = "give tp, cp, dp and pp once each, innermost first: tp-cp-dp-pp, tp-cp-pp-dp, ..."
        raise UnknownNameError("order of the axes", name, ORDERS, known)
    return found


class Strides(NamedTuple):
    """Places between neighbours of every axis."""

    tp: Num
    cp: Num
    dp: Num
    pp: Num


def strides_of(order: Num, *, tp: Num, cp: Num, dp: Num, pp: Num) -> Strides:
    """The strides of degrees in an order; all may be arrays.

    >>> strides_of(AxisOrder.TP_CP_PP_DP, tp=8, cp=2, dp=4, pp=16)
    Strides(tp=1, cp=8, dp=256, pp=16)
    """
    degrees = {"tp": tp, "cp": cp, "dp": dp, "pp": pp}
    found: Strides | None = None
    for one, here in _orders(order):
        own = _walked(one, degrees)
        found = own if found is None else Strides(
            *(where(here, a, b) for a, b in zip(own, found, strict=True))
        )  # fmt: skip
    assert found is not None
    return found


def _orders(order: Num) -> Iterator[tuple[AxisOrder, np.ndarray]]:
    """Every order among the plans, and which have it."""
    values = np.asarray(order)
    if values.size and not values.any():  # the usual one throughout
        kinds: Array = np.zeros(1)
    else:
        kinds = np.unique(values)
    for kind in kinds:
        if kind not in _VALUES:
            raise InputError(
                f"order {kind:g} is none of {len(AxisOrder)}; give a value or a name of AxisOrder"
            )
        yield AxisOrder(int(kind)), values == kind


def _walked(order: AxisOrder, degrees: Mapping[str, Num]) -> Strides:
    found: dict[str, Num] = {}
    stride: Num = 1
    for axis in order.axes:
        found[axis] = stride
        stride = stride * degrees[axis]
    return Strides(**found)


_VALUES: Final = frozenset(int(order) for order in AxisOrder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lattice:
    """Where the ranks of a group lie that another axis cuts in two.

    Runs of `inner` ranks, `near` places apart, begin `far` places apart. Even where
    far = inner near: then all are `near` apart.
    """

    near: Num
    inner: Num
    far: Num

    @property
    def is_even(self) -> bool | np.ndarray:
        """Are the ranks of a group all as far apart?"""
        return np.equal(self.far, self.near * self.inner)

    def span(self, num_ranks: Num) -> Num:
        """Places of the block that a group of so many ranks lies in.

        >>> Lattice(near=1, inner=2, far=4).span(4)
        8.0
        """
        runs = num_ranks / self.inner
        return where(np.greater(runs, 1), runs * self.far, self.near * num_ranks)

    def apart(self, num_ranks: Num) -> Num:
        """Places between neighbours of the first `num_ranks` of a group, in the mean.

        >>> Lattice(near=1, inner=2, far=4).apart(4), Lattice(near=1, inner=2, far=4).apart(2)
        (2.0, 1.0)
        """
        return self.span(num_ranks) / num_ranks


Spacing: TypeAlias = Num | Lattice
"""Places between neighbours of a group, or where they lie."""


def span_of(num_ranks: Num, spaced: Spacing) -> Num:
    """Places of the block that a group lies in; blocks lie side by side."""
    if isinstance(spaced, Lattice):
        return spaced.span(num_ranks)
    return num_ranks * spaced


def apart_of(num_ranks: Num, spaced: Spacing) -> Num:
    """Places between neighbours of the first `num_ranks` of a group, in the mean."""
    return spaced.apart(num_ranks) if isinstance(spaced, Lattice) else spaced


def numbers_of(spaced: Spacing) -> tuple[Num, Num, Num]:
    """What tells one spacing from another."""
    if isinstance(spaced, Lattice):
        even = spaced.is_even
        return spaced.near, where(even, 0, spaced.inner), where(even, 0, spaced.far)
    return spaced, 0, 0


def spacing(*, near: Num, inner: Num, far: Num) -> Spacing:
    """A lattice, or a plain stride where all are even."""
    lattice = Lattice(near=near, inner=inner, far=far)
    return near if np.all(lattice.is_even) else lattice


def of_two_axes(first: tuple[Num, Num], second: tuple[Num, Num]) -> Spacing:
    """How the ranks of two axes together lie; each axis as (degree, stride).

    >>> of_two_axes((2, 8), (4, 16)), of_two_axes((2, 8), (4, 64))
    (8, Lattice(near=8, inner=2, far=64))
    """
    (n1, s1), (n2, s2) = first, second
    turned = np.equal(n1, 1) | (np.less(s2, s1) & np.greater(n2, 1))
    near, inner = where(turned, s2, s1), where(turned, n2, n1)
    alone = np.equal(where(turned, n1, n2), 1)
    return spacing(near=near, inner=inner, far=where(alone, near * inner, where(turned, s1, s2)))


def cut(spaced: Num, num_ranks: Num, *, inside: Num, times: Num) -> Spacing:
    """How ranks lie that were `spaced` evenly before an axis of degree `times` came to lie between
    every block of `inside` places and the next.

    >>> cut(1, 4, inside=8, times=2), cut(8, 4, inside=8, times=2), cut(1, 16, inside=8, times=2)
    (1, 16, Lattice(near=1, inner=8, far=16))
    """
    within = np.less_equal(spaced * num_ranks, inside) | np.equal(times, 1)
    beyond = np.greater_equal(spaced, inside) & np.logical_not(within)
    near = where(beyond, spaced * times, spaced)
    if is_scalar(spaced, num_ranks, inside, times):
        inner: Num = num_ranks if within else 1 if beyond else minimum(inside // spaced, num_ranks)
    else:
        inner = where(within, num_ranks, where(beyond, 1.0, minimum(inside / spaced, num_ranks)))
    split = np.logical_not(within | beyond)
    return spacing(near=near, inner=inner, far=where(split, inside * times, near * inner))
