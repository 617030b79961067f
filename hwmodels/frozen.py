"""An immutable, hashable, picklable mapping, so that a cached Device can be shared safely."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class FrozenDict(dict[K, V]):
    """A dict that refuses to change and therefore has a hash.

    >>> rates = FrozenDict({"fp32": 1e12})
    >>> rates["fp32"], hash(rates) == hash(FrozenDict(fp32=1e12))
    (1000000000000.0, True)
    """

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("the catalogue's figures are read-only; copy them with dict(...) first")

    __setitem__ = __delitem__ = clear = pop = popitem = _refuse
    setdefault = update = __ior__ = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type, tuple[dict[K, V]]]:
        return type(self), (dict(self),)


def freeze(value: Any) -> Any:
    """The same value with every dict frozen and every list a tuple, at any depth."""
    if isinstance(value, Mapping):
        return FrozenDict({key: freeze(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    return value
