"""`ridgeplan simulate`: one training step as a timeline, and what its seconds are made of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import show
from cli.commands.plan import ClusterName, GlobalBatch, Model, Nodes, RecipeName, Seq
from cli.options import AsJson
from cli.plans import BOUND, asked_text, framework_on, pins_given, question_of, whole
from cli.quantity import percent_text, scaled_text, seconds_text

if TYPE_CHECKING:
    from hwmodels.cluster import Cluster
    from simulator.recipe import Recipe
    from simulator.stack import OnDevice
    from simulator.timeline import StepTimeline
    from workloads.models.transformer import TrainStep
    from workloads.plan import Plan


def simulate(
    model: Model,
    cluster: ClusterName,
    seq: Seq,
    nodes: Nodes = 1,
    global_batch: GlobalBatch = "1",
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--pin",
            metavar="KEY=N",
            help="The plan: dp, tp, pp, cp, ep, mb, v, zero, recompute; what is left open is "
            "chosen as `plan` does.",
        ),
    ] = None,
    stack: Annotated[
        str,
        typer.Option(
            "--stack", metavar="NAME", help="The framework; 'bound' for kernels at the roofline."
        ),
    ] = "megatron",
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule",
            metavar="NAME",
            help="gpipe, 1f1b, interleaved, zero_bubble or dualpipe (1f1b; interleaved with v).",
        ),
    ] = None,
    recipe: RecipeName = "bf16",
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Write a Chrome trace (Perfetto opens it)."),
    ] = None,
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
    """
    from cli.files import check_writable, write_all
    from cli.progress import patience
    from hwmodels import catalog
    from simulator.recipe import recipe as recipe_of
    from simulator.timeline import simulate_training
    from workloads.models.config import load_model

    check_writable([trace] if trace else [])
    system, chosen = catalog.cluster(cluster, nodes), recipe_of(recipe)
    question: Any = question_of(
        "train", load_model(model), whole(seq, "--seq"), whole(global_batch, "--global-batch")
    )
    framework = framework_on(stack, system)
    with patience("simulating"):
        plan = _plan(question, system, chosen, pins_given(param or []), framework)
        found = simulate_training(
            question, plan=plan, on=system, recipe=chosen, stack=framework, schedule_name=schedule
        )
    if trace is not None:
        write_all({trace: _trace(found, question, chosen)})
    document = _document(found, question, system, framework)
    if as_json:
        show.print_json(document)
        return
    _show(document, question, system, framework)
    if trace is not None:
        print(f"wrote {trace}")


def _plan(
    question: TrainStep,
    system: Cluster,
    recipe: Recipe,
    pins: dict[str, int],
    framework: OnDevice | None,
) -> Plan:
    """The fastest plan that fits with these pins."""
    from simulator.planners.parallelism import plan_parallelism

    return plan_parallelism(
        question, on=system, recipe=recipe, pins=pins, num_runners_up=0, stack=framework
    ).plan


def _trace(found: StepTimeline, question: TrainStep, recipe: Recipe) -> bytes:
    import json

    from simulator.memory import training_memory
    from simulator.pipeline import in_flight
    from simulator.trace import trace_events

    parts = training_memory(question, plan=found.plan, recipe=recipe).bytes_by_part
    deepest = max(in_flight(found.schedule, s) for s in range(found.schedule.num_stages))
    each = float(parts.get("activations", 0.0)) / max(deepest, 1)
    return json.dumps(trace_events(found, bytes_in_flight=each)).encode()


def _document(
    found: StepTimeline, question: TrainStep, system: Cluster, framework: OnDevice | None
) -> dict[str, Any]:
    return {
        "model": question.config.name,
        "cluster": system.id,
        "num_accelerators": system.num_accelerators,
        "plan": found.plan,
        "schedule": found.schedule.name,
        "stack": framework.stack.name if framework else BOUND,
        "source": framework.source if framework else "kernels at their roofline",
        "seconds": found.seconds,
        "tokens_per_s": question.num_tokens / found.seconds,
        "bubble_frac": found.bubble_frac(),
        "exposed_s": found.exposed_s(),
        "critical_s": dict(found.critical_s()),
        "layer": found.layers,
        "num_tasks": len(found.timeline.tasks),
    }


def _show(
    d: dict[str, Any], question: TrainStep, system: Cluster, framework: OnDevice | None
) -> None:
    out = show.console()
    out.print(
        f"{asked_text(question)} on {system.num_accelerators} x {system.device.id}", style="bold"
    )
    critical = ", ".join(
        f"{kind} {seconds_text(s)}"
        for kind, s in sorted(d["critical_s"].items(), key=lambda item: -item[1])
        if s > 0
    )
    source = framework.stack.source if framework else ""
    out.print(
        show.pairs(
            [
                ("Plan", f"{d['plan']}, schedule {d['schedule']}"),
                ("Step", f"{seconds_text(d['seconds'])}, "
                         f"{scaled_text(d['tokens_per_s'], 'tokens/s')}"),
                ("Critical path", critical),
                ("Idle", f"{percent_text(d['bubble_frac'])} of the stages' time"),
                ("Exposed", f"{seconds_text(d['exposed_s'])} of weights and gradients on the way "
                            "while the stage waits"),
                ("Stack", f"{d['stack']}: {d['source']}. {source}"),
            ]
        )
    )  # fmt: skip
