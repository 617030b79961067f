"""The three answers of `plan memory`, each with its tables, its JSON, its chart and its program."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from cli import show
from cli.memory_plans import (
    gib,
    placement_record,
    schedule_record,
    show_model,
    show_placement,
    show_schedule,
    storage_record,
    swap_record,
)
from cli.quantity import parse
from hwmodels.errors import InputError

if TYPE_CHECKING:
    from simulator.planners.memory import MemoryPlan
    from simulator.planners.program import Program, Solution
    from simulator.planners.rematerialise import Graph, RematerialisePlan
    from simulator.planners.storage import Placement, Tensors
    from simulator.planners.swap import SwapPlan
    from workloads.plan import Plan

Asked: TypeAlias = Mapping[str, Any]
SEARCH_S: Final = 1.0
"""Time of the local search where a solver takes over."""


class Answer(ABC):
    """What all three do with files and words; each says which program, record and chart it has."""

    @abstractmethod
    def program(self) -> tuple[Program, Solution | None]:
        """The program that was solved or stated, with the solver's answer if one was asked."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """The JSON document."""

    def chart(self) -> tuple[Placement, str]:
        """The placement to draw, and its title."""
        raise InputError("this answer has no chart; leave --html and --out away")

    @abstractmethod
    def tables(self) -> None:
        """For people."""

    def files(self, asked: Asked) -> None:
        """Charts and programs, as far as asked for."""
        from cli.files import write_all

        contents: dict[Path, bytes] = {}
        if asked["pictures"]:
            from cli.charts.picture import rendered
            from cli.charts.storage import figure

            drawn = figure(*self.chart())
            contents = {path: rendered(drawn, path.suffix) for path in asked["pictures"]}
        if asked["lp"]:
            from simulator.planners.engines import exported

            path = asked["lp"]
            contents[path] = exported(self.program()[0], path.suffix.lower()[1:]).encode()
        write_all(contents)

    def show(self, asked: Asked) -> None:
        """Print the answer."""
        from simulator.planners.program_text import text

        words = text(*self.program()) if asked["explain"] else None
        if asked["as_json"]:
            show.print_json(self.record() | ({} if words is None else {"explanation": words}))
            return
        self.tables()
        if words is not None:
            print()
            print(words)
        show.wrote((*asked["pictures"], *([asked["lp"]] if asked["lp"] else [])))


@dataclass(frozen=True, kw_only=True)
class PlacementAnswer(Answer):
    """Places for given tensors."""

    found: Placement
    solution: Solution | None
    title: str
    rows: list[tuple[str, str]]
    extra: dict[str, Any]

    @staticmethod
    def of(
        tensors: Tensors, asked: Asked, *, title: str, rows: list[tuple[str, str]],
        record: dict[str, Any],
    ) -> PlacementAnswer:  # fmt: skip
        """Placed, and proved where that was asked for and is not already."""
        from simulator.planners.program import OPTIMAL
        from simulator.planners.storage import place, proved

        limit = asked["time_limit_s"]
        share = min(limit / 3, SEARCH_S) if asked["engine"] else limit
        found, solution = place(tensors, time_limit_s=share, gap_frac=asked["gap_frac"]), None
        if asked["engine"] and found.status != OPTIMAL:
            found, solution = proved(
                found, engine=asked["engine"], time_limit_s=max(limit - found.solve_s, limit / 2)
            )
        return PlacementAnswer(found=found, solution=solution, title=title, rows=rows, extra=record)

    def program(self) -> tuple[Program, Solution | None]:
        """The storage program: boxes in time and address."""
        from simulator.planners.storage import program

        return program(self.found.tensors, self.found.peak_bytes), self.solution

    def record(self) -> dict[str, Any]:
        """The placement."""
        return {**self.extra, "storage": placement_record(self.found, self.solution)}

    def chart(self) -> tuple[Placement, str]:
        """The placement."""
        return self.found, self.title

    def tables(self) -> None:
        """The placement."""
        show_placement(self.found, self.title, self.rows)


@dataclass(frozen=True, kw_only=True)
class GraphAnswer(Answer):
    """What to compute again."""

    found: RematerialisePlan

    @staticmethod
    def of(graph: Graph, budget_bytes: float, asked: Asked) -> GraphAnswer:
        """The cheapest schedule within the budget."""
        from simulator.planners.rematerialise import plan

        if asked["pictures"]:
            raise InputError("a graph's schedule has no chart; leave --html and --out away")
        found = plan(
            graph, budget_bytes, engine=asked["engine"], time_limit_s=asked["time_limit_s"],
            gap_frac=asked["gap_frac"],
        )  # fmt: skip
        return GraphAnswer(found=found)

    def program(self) -> tuple[Program, Solution | None]:
        """The rematerialisation program, in units of the largest size and time."""
        from simulator.planners.rematerialise import program

        graph = self.found.schedule.graph
        return program(graph, self.found.budget_bytes), self.found.solution

    def record(self) -> dict[str, Any]:
        """The schedule."""
        return {"source": "graph", "schedule": schedule_record(self.found)}

    def tables(self) -> None:
        """The schedule."""
        show_schedule(self.found)


@dataclass(frozen=True, kw_only=True)
class ModelAnswer(Answer):
    """A model's swap and storage; `rung` tells what its layer's time stands on."""

    found: MemoryPlan
    solution: Solution
    rung: str
    stages: tuple[SwapPlan, ...]

    def program(self) -> tuple[Program, Solution | None]:
        """The swap program."""
        from simulator.planners.swap import program

        return program(self.found.swap.question), self.solution

    def record(self) -> dict[str, Any]:
        """Swap and storage."""
        found, plan = self.found, self.found.plan
        return {
            "source": "model",
            "model": found.step.config.name,
            "len_seq": found.step.len_seq,
            "cluster": found.cluster.id,
            "plan": {key: int(getattr(plan, key)) for key in ("dp", "tp", "pp", "cp", "ep",
                     "micro_batch", "recompute")},
            "rung": self.rung,
            "swap": swap_record(found.swap)
            | {"status": self.solution.status, "gap_frac": self.solution.gap_frac,
               "solve_s": self.solution.solve_s},
            "stage": found.stage,
            "stages": [swap_record(swap) for swap in self.stages],
            "storage": storage_record(found.swapped),
            "storage_all_kept": storage_record(found.kept),
        }  # fmt: skip

    def chart(self) -> tuple[Placement, str]:
        """The step with swapping."""
        best = self.found.swapped.best
        return best, f"{self.found.step.config.name}: {gib(best.peak_bytes)} for a step's tensors"

    def tables(self) -> None:
        """Swap and storage."""
        show_model(self.found, self.rung, self.stages)


def model_answer(
    source: Path,
    asked: Asked,
    *,
    cluster: str | None,
    seq: str | None,
    nodes: int,
    host_memory: str | None,
    host_bandwidth: str | None,
    pin: list[str] | None,
    recipe: str,
    stack: str,
) -> ModelAnswer:
    """Swap and storage of a model's training step."""
    from cli.host_memory import NODE, host_bytes
    from cli.plans import framework_on, pins_given, whole
    from hwmodels import catalog
    from simulator.planners import swap
    from simulator.planners.memory import plan_memory, plan_stages
    from simulator.planners.program import solve
    from simulator.recipe import recipe as recipe_of
    from workloads.models.config import load_model
    from workloads.models.transformer import train_step

    if cluster is None or seq is None:
        raise InputError("a model needs --cluster and --seq, e.g. -c hgx-h100 --seq 512k")
    system, chosen = catalog.cluster(cluster, nodes), recipe_of(recipe)
    plan = _plan(pins_given(pin or []), system.num_accelerators)
    question = train_step(
        load_model(source), len_seq=whole(seq, "--seq"),
        global_batch=int(plan.dp) * int(plan.micro_batch) * _micro_batches(plan),
    )  # fmt: skip
    framework = framework_on(stack, system, chosen, question.config)
    rate = None if host_bandwidth is None else parse(
        host_bandwidth, "bytes_per_s", "--host-bandwidth"
    )  # fmt: skip
    swaps = plan_stages(
        question, plan=plan, on=system, recipe=chosen, stack=framework, link_bytes_per_s=rate,
        host_bytes=host_bytes(host_memory, system, default=NODE),
    )  # fmt: skip
    stage = min(range(len(swaps)), key=lambda i: swaps[i].alpha)
    numbers = swaps[stage].question
    found = plan_memory(
        question, numbers, plan=plan, on=system, recipe=chosen, stage=stage,
        time_limit_s=asked["time_limit_s"], gap_frac=asked["gap_frac"],
    )  # fmt: skip
    rung = "bound: kernels at the roofline" if framework is None else (
        f"calibrated, as {framework.stack.name} runs it"
    )  # fmt: skip
    solution = solve(swap.program(numbers), time_limit_s=asked["time_limit_s"])
    return ModelAnswer(found=found, solution=solution, rung=rung, stages=swaps)


def _micro_batches(plan: Plan) -> int:
    """Enough that every stage of a pipeline holds as many as it ever does."""
    return 1 if plan.pp == 1 else 2 * int(plan.pp)


def _plan(pins: dict[str, int], num_ranks: int) -> Any:
    """The pinned plan; data-parallel ranks are what is left."""
    from workloads.plan import Plan

    used = 1
    for key in ("tp", "pp", "cp"):
        used *= pins.get(key, 1)
    if num_ranks % used or pins.get("dp", num_ranks // used) * used != num_ranks:
        told = ", ".join(f"{key}={value}" for key, value in pins.items())
        raise InputError(f"the pins {told} do not divide {num_ranks} ranks; change one or --nodes")
    return Plan(**{"dp": num_ranks // used, **pins})
