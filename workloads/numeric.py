"""Arithmetic that keeps Python scalars scalar and broadcasts arrays.

Counting code is written once with these and the plain operators. A Python int stays exact and
takes tens of nanoseconds per operation, where a NumPy scalar takes a microsecond; an array is
float64, exact for counts below 2**53 and never wrapping around as an int64 product would.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Num: TypeAlias = float | Array
Condition: TypeAlias = bool | NDArray[np.bool_]


def as_num(value: object) -> Num:
    """Python numbers unchanged, NumPy scalars as Python numbers, sequences as float64 arrays.

    >>> as_num(np.int64(3)), as_num([1, 2])
    (3, array([1., 2.]))
    """
    if isinstance(value, (int, float)):
        return value
    array = np.asarray(value)
    if array.ndim == 0:
        item = array.item()
        if not isinstance(item, (int, float)):
            raise TypeError(f"not a number: {value!r}")
        return item
    return array.astype(np.float64)


def is_scalar(*values: Num) -> bool:
    """True when no argument is an array."""
    return not any(isinstance(v, np.ndarray) for v in values)


def ceil_div(a: Num, b: Num) -> Num:
    """The least integer not below a / b, for integer-valued a and b (counts below 2**52).

    >>> ceil_div(7, 2), ceil_div(np.array([6.0, 7.0]), 2)
    (4, array([3., 4.]))
    """
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.ceil(np.divide(a, b))
    return -(-a // b)


def floor(a: Num) -> Num:
    """The greatest integer not above a."""
    return np.floor(a) if isinstance(a, np.ndarray) else math.floor(a)


def sqrt(a: Num) -> Num:
    """The square root."""
    return np.sqrt(a) if isinstance(a, np.ndarray) else math.sqrt(a)


def log2(a: Num) -> Num:
    """The logarithm to base two."""
    return np.log2(a) if isinstance(a, np.ndarray) else math.log2(a)


def ceil_log2(size: Num) -> Num:
    """The least q with 2**q >= size, exactly, for whole sizes from 1.

    >>> [ceil_log2(s) for s in (1, 2, 3, 4, 5)], ceil_log2(np.array([1.0, 1024.0, 1025.0]))
    ([0, 1, 2, 2, 3], array([ 0., 10., 11.]))
    """
    if isinstance(size, np.ndarray):
        return np.frexp(size - 1)[1].astype(np.float64)
    return (int(size) - 1).bit_length()


def floor_log2(size: Num) -> Num:
    """The greatest q with 2**q <= size, exactly, for sizes from 1 (rounded down first).

    >>> floor_log2(1023.5), floor_log2(np.array([1.0, 1024.0]))
    (9, array([ 0., 10.]))
    """
    if isinstance(size, np.ndarray):
        return np.frexp(np.floor(size))[1] - 1.0
    return int(size).bit_length() - 1


def power_of_two(exponent: Num) -> Num:
    """2**exponent for whole exponents from 0.

    >>> power_of_two(10), power_of_two(np.array([0.0, 3.0]))
    (1024, array([1., 8.]))
    """
    if isinstance(exponent, np.ndarray):
        return np.ldexp(1.0, exponent.astype(np.int64))
    return 1 << int(exponent)


def minimum(a: Num, b: Num) -> Num:
    """The smaller, elementwise."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.minimum(a, b)
    return a if a <= b else b


def maximum(a: Num, b: Num) -> Num:
    """The larger, elementwise."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.maximum(a, b)
    return a if a >= b else b


def where(condition: Condition, a: Num, b: Num) -> Num:
    """`a` where the condition holds, else `b`; both are evaluated by the caller."""
    if isinstance(condition, np.ndarray):
        return np.where(condition, a, b)
    return a if condition else b


def any_true(condition: Condition) -> bool:
    """True when the condition holds anywhere."""
    return bool(condition.any()) if isinstance(condition, np.ndarray) else bool(condition)
