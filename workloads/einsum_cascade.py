"""Attention as a cascade of Einsums, and how often a cascade must pass over its keys.

FuseMax (Nayak et al. 2024, arXiv 2406.10491, section 3) writes an algorithm as a list of Einsums
over ranks and counts its *passes* over one of them: how often it must run through the rank from its
first to its last fibre. An Einsum that keeps the rank can follow what it reads within the same
pass, fibre by fibre; a tensor that came out of a full reduction over the rank is only there when
the pass has ended, so whoever reads it together with the rank needs another:

    pass(e)  = max over inputs t of   pass(producer of t)        t keeps the rank
                                      pass(producer of t) + 1    t was reduced over it
               and 1 for an Einsum that reads only inputs of the cascade
    passes   = max of pass(e) over Einsums that read the rank

A rank may be split in M1 chunks of M0: reducing over M0 alone leaves M1, and a running tensor
(an iterative rank, RM_{m1+1} = max(RM_{m1}, LM_{m1})) keeps M1 too: both follow within the pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import networkx as nx


@dataclass(frozen=True, slots=True)
class Einsum:
    """`output` over `ranks` from tensors of the cascade; other ranks of its inputs are reduced."""

    output: str
    ranks: str
    inputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cascade:
    """Einsums in any order, and the ranks of the tensors they start from. A rank is a letter or a
    letter and a digit, separated by blanks: 'E M1 M0'.
    """

    name: str
    given: tuple[tuple[str, str], ...]
    einsums: tuple[Einsum, ...]

    def ranks_of(self, tensor: str) -> frozenset[str]:
        """The ranks of a tensor."""
        found = dict(self.given) | {e.output: e.ranks for e in self.einsums}
        return frozenset(found[tensor].split())

    def graph(self) -> nx.DiGraph:
        """Tensors, an edge from every input to its output; running tensors read themselves."""
        graph = nx.DiGraph()
        graph.add_nodes_from(name for name, _ in self.given)
        for einsum in self.einsums:
            others = (i for i in einsum.inputs if i != einsum.output)
            graph.add_edges_from((i, einsum.output) for i in others)
        return graph


def passes(cascade: Cascade, rank: str = "M") -> int:
    """How often the cascade runs through a rank (or through the chunks it is split into).

    >>> [passes(c) for c in (THREE_PASS, TWO_PASS, ONE_PASS)]
    [3, 2, 1]
    """
    producer = {e.output: e for e in cascade.einsums}
    made_in: dict[str, int] = {}
    for tensor in nx.topological_sort(cascade.graph()):
        if tensor not in producer:
            made_in[tensor] = 1
            continue
        inputs = [i for i in producer[tensor].inputs if i != tensor]
        made_in[tensor] = max(
            made_in[i] + (_reduced(cascade, producer, i, rank) and _keeps(cascade, inputs, rank))
            for i in inputs
        )
    return max(
        made_in[e.output] for e in cascade.einsums if _keeps(cascade, e.inputs, rank)
    )  # fmt: skip


def _keeps(cascade: Cascade, tensors: Sequence[str], rank: str) -> bool:
    """Does one of the tensors have the rank, or a part of it?"""
    return any(name.startswith(rank) for t in tensors for name in cascade.ranks_of(t))


def _reduced(cascade: Cascade, producer: dict[str, Einsum], tensor: str, rank: str) -> bool:
    """Did the tensor come out of a full reduction over the rank, its own or an earlier one?"""
    if tensor not in producer or _keeps(cascade, [tensor], rank):
        return False
    inputs = [i for i in producer[tensor].inputs if i != tensor]
    return _keeps(cascade, inputs, rank) or any(
        _reduced(cascade, producer, i, rank) for i in inputs
    )


_GIVEN = (("Q", "E P"), ("K", "E M"), ("V", "F M"))
_SPLIT = (("Q", "E P"), ("K", "E M1 M0"), ("V", "F M1 M0"))

THREE_PASS: Final = Cascade(
    name="3-pass",
    given=_GIVEN,
    einsums=(
        Einsum("QK", "M P", ("Q", "K")),
        Einsum("GM", "P", ("QK",)),  # the row's maximum
        Einsum("SN", "M P", ("QK", "GM")),  # e^(QK - GM)
        Einsum("SD", "P", ("SN",)),
        Einsum("A", "M P", ("SN", "SD")),
        Einsum("AV", "F P", ("A", "V")),
    ),
)
"""The stable softmax as it is taught."""

TWO_PASS: Final = Cascade(
    name="2-pass",
    given=_SPLIT,
    einsums=(
        Einsum("QK", "M1 M0 P", ("Q", "K")),
        Einsum("LM", "M1 P", ("QK",)),  # a chunk's maximum
        Einsum("SLN", "M1 M0 P", ("QK", "LM")),
        Einsum("SLD", "M1 P", ("SLN",)),
        Einsum("GM", "P", ("LM",)),
        Einsum("PRM", "M1 P", ("LM", "GM")),  # e^(LM - GM), a correction a chunk
        Einsum("SD", "P", ("SLD", "PRM")),
        Einsum("SN", "M1 M0 P", ("SLN", "PRM")),
        Einsum("SNV", "F P", ("SN", "V")),
        Einsum("AV", "F P", ("SNV", "SD")),  # the division at the end
    ),
)
"""Chunks scaled by their own maximum, corrected by the row's."""

ONE_PASS: Final = Cascade(
    name="1-pass",
    given=_SPLIT,
    einsums=(
        Einsum("QK", "M1 M0 P", ("Q", "K")),
        Einsum("LM", "M1 P", ("QK",)),
        Einsum("RM", "M1 P", ("RM", "LM")),  # the running maximum, M1 iterative
        Einsum("SLN", "M1 M0 P", ("QK", "RM")),
        Einsum("SLD", "M1 P", ("SLN",)),
        Einsum("SLNV", "F M1 P", ("SLN", "V")),
        Einsum("PRM", "M1 P", ("RM",)),  # e^(RM - RM before), the correction of a step
        Einsum("RD", "M1 P", ("RD", "SLD", "PRM")),
        Einsum("RNV", "F M1 P", ("RNV", "SLNV", "PRM")),
        Einsum("AV", "F P", ("RNV", "RD")),
    ),
)
"""FlashAttention-2's online softmax: what FuseMax maps on its array."""

CASCADES: Final = (THREE_PASS, TWO_PASS, ONE_PASS)
