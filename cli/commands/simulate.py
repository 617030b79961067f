"""`ridgeplan simulate`: one training step as a timeline, and what its seconds are made of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from cli import show
from cli.commands.plan import (
    ClusterName,
    GlobalBatch,
    Model,
    Nodes,
    OrderName,
    RecipeName,
    Seq,
    SplitNames,
)
from cli.options import AsJson, Html, Out
from cli.plans import (
    framework_on,
    half_80_of,
    question_of,
    splits_asked,
    whole,
    with_order,
)
from cli.quantity import parse

if TYPE_CHECKING:
    from cli.simulated import Simulated
    from hwmodels.cluster import Cluster
    from simulator.pieces import StepEstimate
    from simulator.planners.sequence_splits import Splits
    from simulator.recipe import Recipe
    from simulator.stack import OnDevice
    from simulator.timeline import StepTimeline
    from workloads.models.transformer import TrainStep
    from workloads.plan import Plan


OnePlan: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--pin",
        metavar="KEY=N",
        help="The plan: dp, tp, pp, cp, ep, mb, v, zero, recompute; what is left open is "
        "chosen as `plan` does.",
    ),
]
Framework: TypeAlias = Annotated[
    str,
    typer.Option(
        "--stack", metavar="NAME", help="The framework; 'bound' for kernels at the roofline."
    ),
]
ScheduleName: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        metavar="NAME",
        help="gpipe, 1f1b, interleaved, zero_bubble or dualpipe (1f1b; interleaved with v).",
    ),
]
Stages: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--stages",
        metavar="N,N,...",
        help="Layers of every pipeline stage, first to last (as many each as can be).",
    ),
]
DataLoading: TypeAlias = Annotated[
    str,
    typer.Option("--data-loading", metavar="TIME", help="The host reads a batch in: 80ms."),
]
TraceFile: TypeAlias = Annotated[
    Path | None,
    typer.Option("--trace", metavar="FILE", help="Write a Chrome trace (Perfetto opens it)."),
]


def simulate(
    model: Model,
    cluster: ClusterName,
    seq: Seq,
    nodes: Nodes = 1,
    global_batch: GlobalBatch = "1",
    param: OnePlan = None,
    stack: Framework = "megatron",
    schedule: ScheduleName = None,
    stages: Stages = None,
    recipe: RecipeName = "bf16",
    sequence_parallel: SplitNames = None,
    order: OrderName = "auto",
    data_loading: DataLoading = "0s",
    html: Html = None,
    out: Out = None,
    trace: TraceFile = None,
    as_json: AsJson = False,
) -> None:
    """One training step as a timeline of passes, exchange and updates.

    Simulates one rank of every pipeline stage, all others being alike: what is on the critical
    path, how long stages idle, how much exchange nothing hides.

    \b
    Examples:
      ridgeplan simulate examples/llama3-8b.json -c hgx-h100 -n 8 --seq 8k -b 256 --trace t.json
      ridgeplan simulate examples/llama3-70b.json -c hgx-h100 -n 8 --seq 8k -b 128 --pin pp=4
      ridgeplan simulate examples/llama3-8b.json -c hgx-h100 --seq 8k -b 64 --stack torchtitan
      ridgeplan simulate examples/llama3-8b.json -c hgx-h100 --seq 8k -b 64 --stages 9,8,8,7
      ridgeplan simulate examples/llama3-8b.json -c hgx-h100 -n 2 --seq 256k -b 8 --pin cp=16 \\
        --sequence-parallel hybrid --pin ulysses=8
    """
    from cli.charts.picture import asked_for
    from cli.files import check_writable, write_all
    from cli.progress import patience
    from cli.simulated import print_screen, record
    from cli.stages import pinned_stages, stages_given
    from hwmodels import catalog
    from simulator.recipe import recipe as recipe_of
    from workloads.models.config import load_model

    pictures = asked_for(html, out)
    check_writable([*pictures, *([trace] if trace else [])])
    system, chosen = catalog.cluster(cluster, nodes), recipe_of(recipe)
    question: Any = question_of(
        "train", load_model(model), whole(seq, "--seq"), whole(global_batch, "--global-batch")
    )
    framework, counts = framework_on(stack, system, chosen, question.config), stages_given(stages)
    pins = with_order(param, order)
    pins = pinned_stages(pins, counts, question.config.num_layers)
    with patience("simulating"):
        plan = _plan(
            question, system, chosen, pins, framework, splits_asked(sequence_parallel or [])
        )
        answer = _answer(question, system, chosen, framework, plan, counts, schedule, data_loading)
        contents = _files(answer, pictures, trace)
    write_all(contents)
    if as_json:
        show.print_json(record(answer))
        return
    print_screen(answer)
    show.wrote(contents)


def _files(answer: Simulated, pictures: list[Path], trace: Path | None) -> dict[Path, bytes]:
    """Trace and pictures, as far as asked for."""
    contents = {} if trace is None else {trace: _trace(answer)}
    if pictures:
        from cli.charts import step as chart
        from cli.charts.picture import rendered

        figure = chart.figure(answer)
        contents |= {path: rendered(figure, path.suffix) for path in pictures}
    return contents


def _answer(
    question: TrainStep,
    system: Cluster,
    recipe: Recipe,
    framework: OnDevice | None,
    plan: Plan,
    counts: tuple[int, ...],
    schedule: str | None,
    data_loading: str,
) -> Simulated:
    from cli.simulated import Simulated
    from simulator.step_memory import outer_stages

    found, analytic = (_staged if counts else _even)(
        question,
        counts,
        loading_s=parse(data_loading, "s", "--data-loading"),
        schedule_name=schedule,
        plan=plan,
        on=system,
        recipe=recipe,
        stack=framework,
    )
    return Simulated(
        question=question,
        cluster=system,
        recipe=recipe,
        framework=framework,
        half_80=None if framework is None else half_80_of(recipe, question.config),
        found=found,
        analytic=analytic,
        stages=outer_stages(found, question, recipe=recipe),
        counts=counts,
    )


def _even(
    question: TrainStep,
    _: tuple[int, ...],
    *,
    schedule_name: str | None,
    loading_s: float,
    **asked: Any,
) -> tuple[StepTimeline, StepEstimate]:
    """The step, and the sum of its pieces, of a plan whose stages are alike."""
    from simulator.step import training_step
    from simulator.timeline import simulate_training

    found = simulate_training(question, schedule_name=schedule_name, loading_s=loading_s, **asked)
    return found, training_step(question, **asked)


def _staged(
    question: TrainStep,
    counts: tuple[int, ...],
    *,
    schedule_name: str | None,
    loading_s: float,
    **asked: Any,
) -> tuple[StepTimeline, StepEstimate]:
    """The same where every stage has its own number of layers."""
    from cli.stages import stages_of
    from simulator.staged import stage_costs, staged_step
    from simulator.staged_timeline import simulate_staged

    stages = stages_of(question, asked["plan"], counts)
    found = simulate_staged(
        question, stages=stages, schedule_name=schedule_name, loading_s=loading_s, **asked
    )
    costs = stage_costs(question, stages=stages, **asked)
    return found, staged_step(question, costs, **asked)


def _plan(
    question: TrainStep,
    system: Cluster,
    recipe: Recipe,
    pins: dict[str, int],
    framework: OnDevice | None,
    splits: Splits,
) -> Plan:
    """The fastest plan that fits with these pins, as though stages were alike."""
    from simulator.planners.parallelism import plan_parallelism

    return plan_parallelism(
        question, on=system, recipe=recipe, pins=pins, num_runners_up=0, stack=framework,
        splits=splits,
    ).plan  # fmt: skip


def _trace(answer: Simulated) -> bytes:
    import json

    from simulator.step_memory import all_stages
    from simulator.trace import trace_events

    memory = all_stages(answer.found, answer.question, recipe=answer.recipe)
    return json.dumps(trace_events(answer.found, memory=memory)).encode()
