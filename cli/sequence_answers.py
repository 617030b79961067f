"""What is asked of `plan sequences`, its answers by method, and sequences that fit nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np

from cli.quantity import count_text
from hwmodels.errors import InfeasibleError, InputError

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from hwmodels.cluster import Cluster
    from simulator.planners.group_placement import GroupPlan
    from simulator.planners.sequence_groups import StepPlan
    from simulator.variable_length import GroupCost, Ints
    from workloads.models.config import TransformerConfig

HBM_FRAC: Final = 0.92
MOST_DOUBLINGS: Final = 14


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question: a model on a cluster, lengths with the lines they stand in, and limits.

    `limit` is the longest length allowed; `host_bytes` a rank's share of its host's memory;
    `num_prompts` and `room` are those of a packed pass.
    """

    config: TransformerConfig
    system: Cluster
    held: Ints
    lines: Ints | None
    about: dict[str, Any]
    limit: int | None
    limit_s: float
    gap_frac: float
    host_bytes: float
    num_prompts: int | None = None
    room: int | None = None

    @property
    def allowed(self) -> int:
        """The longest length that must fit."""
        return self.limit or int(self.held.max())

    def where(self, place: int) -> str:
        """The line of a sequence, as a message begins; nothing where lengths were drawn."""
        return f"line {self.lines[place]}: " if self.lines is not None else ""

    def check_limit(self) -> None:
        """Refuse a length above the longest allowed."""
        longest = int(np.argmax(self.held))
        if self.limit is not None and self.held[longest] > self.limit:
            raise InputError(
                f"{self.where(longest)}{self.held[longest]} tokens are more than --seq = "
                f"{self.limit}; raise --seq or leave it out"
            )

    def record(self) -> dict[str, Any]:
        """What every method's document begins with."""
        return {
            "model": self.config.name, "cluster": self.system.id,
            "num_accelerators": self.system.num_accelerators, **self.about,
            "max_seq": self.allowed, "num_sequences": len(self.held),
            "num_tokens": int(self.held.sum()), "longest": int(self.held.max()),
        }  # fmt: skip


class SequenceAnswer(ABC):
    """What all methods do with files and words; each says what it has."""

    method: ClassVar[str]

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """The JSON document."""

    @abstractmethod
    def tables(self) -> None:
        """For people."""

    @abstractmethod
    def explained(self) -> str:
        """A program with its numbers and a solution."""

    @abstractmethod
    def figure(self) -> go.Figure:
        """The chart."""

    def write(self, pictures: list[Path]) -> None:
        """The chart as files."""
        from cli.charts.picture import rendered
        from cli.files import write_all

        if pictures:
            drawn = self.figure()
            write_all({path: rendered(drawn, path.suffix) for path in pictures})

    def show(self, pictures: list[Path], *, explain: bool, as_json: bool) -> None:
        """Print the answer."""
        from cli import show

        if as_json:
            words = {"explanation": self.explained()} if explain else {}
            show.print_json(self.record() | words)
            return
        self.tables()
        if explain:
            print(self.explained())
        show.wrote(pictures)


def headline(document: dict[str, Any]) -> str:
    """The question in one line."""
    return (
        f"{document['model']}, {document['num_sequences']} sequences of "
        f"{document['corpus'] or document['source']} "
        f"({count_text(document['num_tokens'])} tokens, the longest "
        f"{count_text(document['longest'])}) on {document['num_accelerators']} accelerators of "
        f"{document['cluster']}"
    )


def chart_title(document: dict[str, Any], what: str, where: str) -> str:
    """The question above a chart: shorter than the headline, whose figures the text tells."""
    corpus = document["corpus"] or Path(document["source"]).name
    return f"{document['model']}: {document['num_sequences']} {what} of {corpus}, {where}"


def group_title(document: dict[str, Any]) -> str:
    """The title over a chart of groups or rings."""
    where = f"{document['num_accelerators']} accelerators of {document['cluster']}"
    return chart_title(document, "sequences", where)


def micro_batches(step: StepPlan, held: Ints, cost: GroupCost) -> list[dict[str, Any]]:
    """Every micro-batch with its groups; sequences by their place in the input, from 0."""
    places: dict[int, list[int]] = defaultdict(list)
    for place in range(len(held) - 1, -1, -1):
        places[int(held[place])].append(place)
    found = []
    for part, plan in step.micro_batches:
        own = np.array([places[int(length)].pop() for length in part])
        found.append({
            "seconds": plan.seconds, "lower_s": plan.lower_s, "gap_frac": plan.gap_frac,
            "shape": str(plan), "num_sequences": len(part), "num_tokens": int(part.sum()),
            "groups": _groups(part, own, plan, cost),
        })  # fmt: skip
    return found


def _groups(part: Ints, own: Ints, plan: GroupPlan, cost: GroupCost) -> list[dict[str, Any]]:
    found = []
    for group, degree in enumerate(plan.degrees):
        here = plan.owners == group
        if not here.any():
            continue
        found.append({
            "degree": degree, "seconds": cost.group_s(part[here], degree),
            "num_tokens": int(part[here].sum()), "longest": int(part[here].max()),
            "sequences": own[here].tolist(),
        })  # fmt: skip
    return found


def cost_or_refusal(asked: Asked) -> GroupCost:
    """The groups' cost; refused where a sequence fits none: which one, and what would fit it."""
    from simulator.variable_length import predicted_cost

    cfg, system, limit = asked.config, asked.system, asked.limit
    longest = int(np.argmax(asked.held))
    length = int(asked.held[longest])
    asked.check_limit()
    try:
        cost = predicted_cost(cfg, on=system, len_max=asked.allowed, hbm_frac=HBM_FRAC)
        cost.least_degree(float(length))
    except InfeasibleError as error:
        if limit is not None and limit > length and _fits(cfg, system, length, 1):
            raise
        nodes = _nodes_for(cfg, system, length)
        most, way = _most(cfg, system), "no number of nodes tried holds it"
        if nodes:
            way = f"--nodes {nodes} would hold it"
        here = (
            f"or give at most {count_text(most)} tokens" if most else "the states alone fill these"
        )
        raise InfeasibleError(
            f"{asked.where(longest)}a sequence of {length} tokens of {cfg.name} fits no group of "
            f"up to {system.num_accelerators} x {system.device.id} with every layer recomputed; "
            f"{way}, {here}"
        ) from error
    return cost


def _fits(cfg: TransformerConfig, system: Cluster, length: int, times: int) -> bool:
    """Does one sequence fit the largest group of so many times the ranks?"""
    from simulator.variable_length import memory_of_rank

    ranks = system.num_accelerators * times
    room = HBM_FRAC * system.device.hbm.capacity_bytes
    try:
        tokens = memory_of_rank(cfg, num_ranks=ranks, len_max=length, room=room)[1]
    except InfeasibleError:
        return False
    return bool(length <= tokens * (1 << (ranks.bit_length() - 1)))


def _nodes_for(cfg: TransformerConfig, system: Cluster, length: int) -> int | None:
    """The least doubling of the nodes at which one sequence fits."""
    for times in (1 << i for i in range(1, MOST_DOUBLINGS)):
        if _fits(cfg, system, length, times):
            return times * int(system.num_nodes)
    return None


def _most(cfg: TransformerConfig, system: Cluster) -> int:
    """Tokens of the longest sequence that fits, by bisection."""
    low, high = 0, 2**40
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(cfg, system, middle, 1) else (low, middle)
    return low
