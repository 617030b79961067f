"""`ridgeplan plan`: the best way to split a model over a cluster, and why the others lose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import typer

from cli import show
from cli.options import AsJson, Html, Out
from cli.plan_search import explain as explained
from cli.plan_search import (
    program_of,
    proof,
    search_text,
    searched,
    stages_text,
    training_options,
)
from cli.plans import (
    asked_of,
    asked_text,
    framework_on,
    question_of,
    record,
    rung_text,
    short_plan,
    splits_asked,
    step_text,
    whole,
    why_not_best,
    with_order,
)
from cli.quantity import (
    count_text,
    digits,
    parse,
    percent_text,
    scaled_text,
    seconds_text,
    shown,
)
from cli.wording import resource_text
from hwmodels.errors import InputError, UnknownNameError
from hwmodels.units import GIB

if TYPE_CHECKING:
    from rich.table import Table

    from hwmodels.cluster import Cluster
    from hwmodels.step_ratios import StepRatio
    from simulator.planners.parallelism import Candidate, PlanChoice, Step

PHASES: Final = ("train", "prefill", "decode")
MOST_NODES: Final = 2**20

Model: TypeAlias = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A Hugging Face config.json (see examples/).")
]
ClusterName: TypeAlias = Annotated[
    str, typer.Option("--cluster", "-c", metavar="NAME", help="A cluster, or a TOML file.")
]
Seq: TypeAlias = Annotated[
    str, typer.Option("--seq", metavar="N", help="Tokens per sequence; 128k is 131072.")
]
Nodes: TypeAlias = Annotated[
    int, typer.Option("--nodes", "-n", metavar="N", help="Nodes of the cluster.")
]
GlobalBatch: TypeAlias = Annotated[
    str,
    typer.Option(
        "--global-batch", "-b", metavar="N", help="Sequences per step, all ranks together."
    ),
]
Phase: TypeAlias = Annotated[
    str, typer.Option("--phase", metavar="NAME", help="train, prefill or decode.")
]
RecipeName: TypeAlias = Annotated[
    str,
    typer.Option(
        "--recipe",
        "--precision",
        metavar="NAME",
        help="Precision: bf16, bf16-grad16, fp16, fp32; linear layers in a narrower format: "
        "fp8-tensorwise, fp8-current, fp8-delayed, fp8-rowwise, fp8-blockwise, mxfp8, nvfp4, "
        "mxfp4.",
    ),
]
HbmFraction: TypeAlias = Annotated[
    str,
    typer.Option(
        "--hbm-fraction", metavar="SHARE", help="Share of the memory that a plan may fill."
    ),
]
Pins: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--pin", metavar="KEY=N", help="Only plans with this value, e.g. tp=8; may repeat."
    ),
]
Top: TypeAlias = Annotated[
    int, typer.Option("--top", metavar="N", min=1, max=50, help="Plans to show.")
]
SplitNames: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--sequence-parallel",
        metavar="NAME",
        help="How cp ranks share a sequence: ring-zigzag (the default), ring-contiguous, "
        "ring-striped, ring-self-attention, lightseq, token-ring, ulysses, hybrid (its heads' "
        "degree: --pin ulysses=N), lasp2, lasp2h; only plans with cp > 1. Or all. May repeat.",
    ),
]
OrderName: TypeAlias = Annotated[
    str,
    typer.Option(
        "--order",
        metavar="NAME",
        help="Axes from the nearest ranks outward, e.g. tp-cp-pp-dp (stages side by side); auto "
        "searches tp-cp-dp-pp, tp-cp-pp-dp and tp-pp-cp-dp.",
    ),
]
MemoryBudget: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--memory-budget", metavar="SIZE", help="Device memory a plan may fill, e.g. 48GB."
    ),
]
HostMemory: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--host-memory",
        metavar="SIZE",
        help="Host memory of a node that activations may be offloaded to, or node: what the "
        "catalogue says it has (none is used otherwise).",
    ),
]
Explain: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--explain", help="Stages, what memory and links are worth, the program with numbers."
    ),
]
TimeLimit: TypeAlias = Annotated[
    str | None,
    typer.Option("--time-limit", metavar="TIME", help="End the search then, e.g. 10s."),
]
Gap: TypeAlias = Annotated[
    str,
    typer.Option("--gap", metavar="SHARE", help="End the search when it is proven that close."),
]
StackName: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--stack",
        metavar="NAME",
        help="Train as this framework does, e.g. megatron (kernels at the roofline).",
    ),
]


def plan(
    model: Model,
    cluster: ClusterName,
    seq: Seq,
    nodes: Nodes = 1,
    global_batch: GlobalBatch = "1",
    phase: Phase = "train",
    recipe: RecipeName = "bf16",
    hbm_fraction: HbmFraction = "92%",
    pin: Pins = None,
    top: Top = 5,
    stack: StackName = None,
    sequence_parallel: SplitNames = None,
    order: OrderName = "auto",
    memory_budget: MemoryBudget = None,
    host_memory: HostMemory = None,
    explain: Explain = False,
    time_limit: TimeLimit = None,
    gap: Gap = "0",
    html: Html = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """The fastest way to split a model over a cluster.

    Searches every plan (data, tensor, pipeline, context and expert parallelism, micro-batch,
    interleaving, ZeRO; in training any split of the layers into stages, each layer's activations
    kept, recomputed or offloaded), proves that none is faster than the one it shows, and says what
    the others pay for.

    \b
    Examples:
      ridgeplan plan examples/llama3-8b.json -c hgx-h100 -n 8 --seq 128k -b 64
      ridgeplan plan examples/llama3-8b.json -c hgx-h100 -n 4 --seq 8k -b 128 --pin tp=1
      ridgeplan plan examples/llama3-8b.json -c hgx-h100 -n 8 --seq 512k -b 16 \\
        --sequence-parallel all
      ridgeplan plan examples/megatron-1t.json -c dgx-a100-80gb -n 384 --seq 2k -b 3072 \\
        --memory-budget 36GB --stack megatron --explain
      ridgeplan plan examples/llama3-70b.json -c hgx-h200 --seq 8k -b 32 --phase decode
    """
    from cli.charts.picture import asked_for
    from cli.files import check_writable
    from cli.progress import patience
    from hwmodels import catalog
    from simulator.recipe import recipe as recipe_of
    from workloads.models.config import load_model

    pictures = asked_for(html, out)
    check_writable(pictures)
    if nodes > MOST_NODES:
        raise InputError(f"--nodes = {nodes} is more than {count_text(MOST_NODES)}; give fewer")
    kind = _phase(phase)
    len_seq, batch = whole(seq, "--seq"), whole(global_batch, "--global-batch")
    hbm_frac, pins = parse(hbm_fraction, "frac", "--hbm-fraction"), with_order(pin, order)
    question = question_of(kind, load_model(model), len_seq, batch)
    system = catalog.cluster(cluster, nodes)
    asked: dict[str, Any] = {
        "on": system, "recipe": recipe_of(recipe), "hbm_frac": hbm_frac, "pins": pins,
        "num_runners_up": top - 1,
        "stack": framework_on(stack, system, recipe_of(recipe), question.config),
        "splits": splits_asked(sequence_parallel or []),
    }  # fmt: skip
    training = training_options(memory_budget, host_memory, time_limit, gap, on=system)
    if kind != "train":
        _only_training(memory_budget, host_memory, time_limit, explain)
    with patience("searching plans"):
        choice, answer = searched(question, asked, training)
        found = proof(choice, answer, priced=explain or as_json)
    ratio = _ratio(choice, question)
    if pictures:
        _draw(choice, question, ratio, pictures)
    if as_json:
        show.print_json(record(choice, question, ratio) | found)
        return
    _show(choice, question, ratio)
    if explain and answer is not None:
        explained(found, choice)
        print(program_of(answer))
    show.wrote(pictures)


def _ratio(choice: PlanChoice, question: Step) -> StepRatio | None:
    """What published steps took over the bound: those fitted are of dense transformers."""
    from hwmodels.step_ratios import step_ratio

    device = choice.cluster.device
    cfg = question.config
    trained = asked_of(question)["phase"] == "train" and cfg.moe is None and cfg.mixer is None
    known = trained and choice.stack is None
    return step_ratio(device.id, device.architecture) if known else None


def _draw(
    choice: PlanChoice, question: Step, ratio: StepRatio | None, pictures: Sequence[Path]
) -> None:
    from cli.charts.picture import rendered
    from cli.charts.plan import figure
    from cli.files import write_all
    from cli.progress import patience

    with patience("drawing"):
        drawn = figure(choice, question, ratio)
        write_all({path: rendered(drawn, path.suffix) for path in pictures})


def _only_training(
    memory_budget: str | None, host_memory: str | None, time_limit: str | None, explain: bool
) -> None:
    """Options of the training planner have no meaning where a model serves."""
    given = {
        "--memory-budget": memory_budget, "--host-memory": host_memory,
        "--time-limit": time_limit, "--explain": explain or None,
    }  # fmt: skip
    for name, value in given.items():
        if value is not None:
            raise InputError(f"{name} is for training; leave it out, or give --phase train")


def _phase(text: str) -> str:
    kind = text.strip().casefold()
    if kind not in PHASES:
        raise UnknownNameError("--phase", shown(text), PHASES, f"give {', '.join(PHASES)}")
    return kind


def _show(choice: PlanChoice, question: Step, ratio: StepRatio | None) -> None:
    out, system = show.console(), choice.cluster
    nodes = f"{system.num_nodes} node{'s' if system.num_nodes > 1 else ''}"
    out.print(
        f"{asked_text(question)} on {system.num_accelerators} x {system.device.id} "
        f"({system.id}, {nodes})",
        style="bold",
    )
    out.print()
    out.print(show.pairs(_headline(choice, question, ratio)))
    out.print(_pieces(choice.best))
    out.print(f"Kernels are bound by {_split(choice.best)}.")
    out.print(_memory(choice))
    out.print(_ranking(choice))
    out.print(show.pairs(_search(choice, question)))


def _headline(
    choice: PlanChoice, question: Step, ratio: StepRatio | None
) -> list[tuple[str, str]]:  # fmt: skip
    step = choice.best.step
    seconds = float(step.seconds)
    lower, upper = seconds_text(float(step.lower_s)), seconds_text(float(step.upper_s))
    lines = [
        ("Best plan", _plan_text(choice)),
        (
            "Time",
            f"{seconds_text(seconds)} {step_text(question)}, bound by {resource_text(step.bound)}",
        ),
        (
            "Bounds",
            f"{lower} if all communication hid, {upper} if nothing overlapped{_peaks(choice)}",
        ),
        (
            "Speed",
            f"{scaled_text(float(step.tokens_per_s), 'tokens/s')}, "
            f"MFU {percent_text(float(step.mfu_frac))} on this rung",
        ),
        ("Rung", rung_text(choice)),
    ]
    return lines if ratio is None else [*lines, ("Expect", _expected(choice, ratio))]


def _plan_text(choice: PlanChoice) -> str:
    """The plan, and its stages where they are not all there is."""
    best = choice.best
    even = len({(s.num_layers, tuple(s.modes)) for s in best.stages}) <= 1
    plain = even and all(len(s.modes) == 1 for s in best.stages)
    return str(choice.plan) if plain else f"{choice.plan}; {stages_text(best)}"


def _peaks(choice: PlanChoice) -> str:
    """What the bounds rest on, where that is rates no kernel reaches."""
    peaks = " at these peak rates: a real step can exceed both"
    return peaks if choice.stack is None else ""


def _expected(choice: PlanChoice, ratio: StepRatio) -> str:
    """The range that published steps of such devices make likely, and how far that reaches."""
    plan, seconds = choice.plan, float(choice.best.step.seconds)
    alike = plan.tp * plan.pp * plan.cp == 1 and plan.num_ranks <= 64
    low, high = seconds_text(seconds * ratio.p10), seconds_text(seconds * ratio.p90)
    return (
        f"{low} .. {high}: four in five of {ratio.num_rows} published training steps of dense "
        f"models on this {ratio.scope} took {digits(ratio.p10)} to {digits(ratio.p90)} times their "
        f"bound ({digits(ratio.median)} in the median)"
        + ("" if alike else "; most ran FSDP on up to 64 GPUs, so this plan is extrapolated")
    )


def _pieces(best: Candidate) -> Table:
    """Where the step's time goes."""
    table = show.table("piece of the step", "time", "share", right=("time", "share"))
    total = float(best.step.seconds)
    rows = {k: float(v) for k, v in best.step.seconds_by_piece.items()}
    for piece, seconds in sorted(rows.items(), key=lambda item: -item[1]):
        if seconds > 0:
            table.add_row(piece, seconds_text(seconds), percent_text(seconds / total))
    return table


def _split(best: Candidate) -> str:
    """The kernels' time by binding resource, in words."""
    compute = {k: float(v) for k, v in best.step.compute_by_resource.items()}
    whole = sum(compute.values())
    ordered = sorted(compute.items(), key=lambda item: -item[1])
    shares = [f"{resource_text(k)} for {percent_text(v / whole)}" for k, v in ordered if v > 0]
    return ", ".join(shares) + " of their time"


def _memory(choice: PlanChoice) -> Table:
    """What fills one accelerator's memory."""
    table = show.table("memory per accelerator", "GiB", "of budget", right=("GiB", "of budget"))
    memory = choice.best.memory
    for part, size in memory.bytes_by_part.items():
        if float(size) > 0:
            share = percent_text(float(size) / choice.budget_bytes)
            name = "ends (embedding, head, loss)" if part == "ends" else part
            table.add_row(name, f"{float(size) / GIB:.2f}", share)
    total = float(memory.total)
    table.add_section()
    table.add_row("total", f"{total / GIB:.2f}", percent_text(total / choice.budget_bytes))
    return table


def _ranking(choice: PlanChoice) -> Table:
    """The best plan of every mesh, and what the others pay for; no more columns than fit."""
    wide, right = show.width() >= 90, ("step", "MFU", "GiB")
    bound = ("bound by",) if wide else ()
    table = show.table("plan", *right, *bound, "why not", right=right)
    table.padding = (0, 1, 0, 0)
    for column in table.columns[: 4 if show.width() >= 80 else 0]:
        column.no_wrap = True
    for candidate in (choice.best, *choice.runners_up):
        first = candidate is choice.best
        table.add_row(
            short_plan(candidate),
            seconds_text(float(candidate.step.seconds)),
            percent_text(float(candidate.step.mfu_frac)),
            f"{float(candidate.memory.total) / GIB:.1f}",
            *((resource_text(candidate.step.bound),) if wide else ()),
            "best" if first else why_not_best(candidate, choice.best),
        )
    return table


def _search(choice: PlanChoice, question: Step) -> list[tuple[str, str]]:
    """How the plan was found, within what budget, and whose figures it rests on."""
    system, recipe = choice.cluster, choice.recipe
    capacity = system.device.hbm.capacity_bytes
    precision = f"{recipe.name}, {digits(recipe.weight_bytes, 1)} bytes a weight"
    if asked_of(question)["phase"] == "train":
        precision = f"{recipe.name}: {recipe.source}"
    used = system.levels if system.num_nodes > 1 else system.levels[:1]
    links = [
        f"{x.name} {scaled_text(x.bytes_per_s, 'B/s')} ({_cited(system, x.name)})" for x in used
    ]
    return [
        (
            "Search",
            search_text(choice),
        ),
        (
            "Budget",
            f"{choice.budget_bytes / GIB:.1f} of {capacity / GIB:.1f} GiB; the rest is a margin "
            "for the driver, communication buffers and fragmentation",
        ),
        ("Recipe", precision),
        ("Links", "; ".join(links)),
    ]


def _cited(cluster: Cluster, level: str) -> str:
    """The source of a level's bandwidth: the most specific pattern that matches it."""
    from hwmodels.device import matches

    path = f"levels.{level}.bytes_per_s"
    found = [pattern for pattern in cluster.sources if matches(path, pattern)]
    return cluster.sources[max(found, key=len)] if found else "unsourced"
