"""`ridgeplan plan`: the best way to split a model over a cluster, and why the others lose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cli import show
from cli.quantity import digits, parse, parse_count, percent_text, scaled_text, seconds_text
from hwmodels.errors import InputError

if TYPE_CHECKING:
    from hwmodels.calibration import StepRatio
    from rich.table import Table

    from simulator.planners.parallelism import Candidate, PlanChoice, Step

PHASES: Final = ("train", "prefill", "decode")
GIB: Final = 2**30

RUNG: Final = "bound: kernels at their roofline, links at wire rate; a real step is slower"


def plan(
    model: Annotated[Path, typer.Argument(help="A Hugging Face config.json (see examples/).")],
    cluster: Annotated[str, typer.Option("--cluster", "-c", help="A cluster, or a TOML file.")],
    seq: Annotated[str, typer.Option("--seq", help="Tokens per sequence; 128k is 131072.")],
    nodes: Annotated[int, typer.Option("--nodes", "-n", help="Nodes of the cluster.")] = 1,
    global_batch: Annotated[
        str, typer.Option("--global-batch", "-b", help="Sequences per step, all ranks together.")
    ] = "1",
    phase: Annotated[str, typer.Option("--phase", help="train, prefill or decode.")] = "train",
    recipe: Annotated[
        str, typer.Option("--recipe", help="Precision: bf16, bf16-grad16, fp16, fp32.")
    ] = "bf16",
    hbm_fraction: Annotated[
        str, typer.Option("--hbm-fraction", help="Share of the memory a plan may fill.")
    ] = "92%",
    pin: Annotated[
        list[str] | None,
        typer.Option("--pin", metavar="KEY=VALUE", help="Only plans with this value: tp=8."),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, max=50, help="Plans to show.")] = 5,
    html: Annotated[
        Path | None, typer.Option("--html", help="Draw the search as one page.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Draw it: .html, .png, .svg, .pdf.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Find the fastest plan that fits, with its step time by piece and its memory by part."""
    from hwmodels.calibration import step_ratio

    from cli.charts.picture import asked_for
    from cli.files import check_writable, write_all
    from cli.progress import patience
    from hwmodels import catalog
    from simulator.planners.parallelism import plan_parallelism
    from simulator.recipe import recipe as recipe_of
    from workloads.models.config import load_hf_config

    pictures = asked_for(html, out)
    check_writable(pictures)
    question = _question(phase, load_hf_config(model), seq, global_batch)
    system = catalog.cluster(cluster, nodes)
    with patience("evaluating plans"):
        choice = plan_parallelism(
            question,
            on=system,
            recipe=recipe_of(recipe),
            hbm_frac=parse(hbm_fraction, "frac", "--hbm-fraction"),
            num_runners_up=top - 1,
            pins=_pins(pin or []),
        )
    device = system.device
    ratio = step_ratio(device.id, device.architecture) if phase == "train" else None
    if pictures:
        from cli.charts.picture import rendered
        from cli.charts.plan import figure

        with patience("drawing"):
            drawn = figure(choice, question)
            write_all({path: rendered(drawn, path.suffix) for path in pictures})
    if as_json:
        show.print_json(_record(choice, question, ratio))
    else:
        _show(choice, question, ratio)
    for path in pictures:
        typer.echo(f"wrote {path}", err=True)


def _question(phase: str, config: Any, seq: str, global_batch: str) -> Step:
    from workloads.models.transformer import decode_step, prefill_step, train_step

    if phase not in PHASES:
        raise InputError(f"--phase {phase!r} is unknown; give one of {', '.join(PHASES)}")
    len_seq = parse_count(seq, "--seq")
    batch = parse_count(global_batch, "--global-batch")
    if phase == "train":
        return train_step(config, len_seq=len_seq, global_batch=batch)
    make = prefill_step if phase == "prefill" else decode_step
    return make(config, batch=batch, len_context=len_seq)


def _pins(given: list[str]) -> dict[str, int]:
    pins = {}
    for text in given:
        key, equals, value = text.partition("=")
        number = parse_count(value, f"--pin {key}") if equals else None
        if number is None or number != int(number):
            raise InputError(f"--pin '{text}' is not KEY=VALUE with a whole number, such as tp=8")
        pins[key.strip()] = int(number)
    return pins


# ---- for programs ----------------------------------------------------------------------------


def _record(choice: PlanChoice, question: Step, ratio: StepRatio | None) -> dict[str, Any]:
    from simulator.planners.parallelism import why_slower

    best = choice.best
    return {
        "model": question.config.name,
        "phase": getattr(question, "phase", "train"),
        "cluster": choice.cluster.id,
        "device": choice.cluster.device.id,
        "num_nodes": choice.cluster.num_nodes,
        "num_accelerators": choice.cluster.num_accelerators,
        "recipe": choice.recipe.name,
        "budget_bytes": choice.budget_bytes,
        "rung": best.step.rung,
        "num_evaluated": choice.num_evaluated,
        "num_feasible": choice.num_feasible,
        "gap_frac": choice.gap_frac,
        "measured_over_bound": ratio,
        "plans": [
            _candidate(c) | {"why_not_best": None if c is best else why_slower(c, best)}
            for c in (best, *choice.runners_up)
        ],
    }


def _candidate(c: Candidate) -> dict[str, Any]:
    return {
        "plan": c.plan,
        "seconds": c.step.seconds,
        "lower_s": c.step.lower_s,
        "upper_s": c.step.upper_s,
        "tokens_per_s": c.step.tokens_per_s,
        "mfu_frac": c.step.mfu_frac,
        "bound": c.step.bound,
        "seconds_by_piece": c.step.seconds_by_piece,
        "compute_by_resource": c.step.compute_by_resource,
        "memory_bytes": c.memory.total,
        "memory_bytes_by_part": c.memory.bytes_by_part,
    }


# ---- for people ------------------------------------------------------------------------------


def _show(choice: PlanChoice, question: Step, ratio: StepRatio | None) -> None:
    out, best, system = show.console(), choice.best, choice.cluster
    nodes = f"{system.num_nodes} node{'s' if system.num_nodes > 1 else ''}"
    out.print(
        f"{asked_text(question)} on {system.num_accelerators} x {system.device.id} "
        f"({system.id}, {nodes})",
        style="bold",
    )
    out.print()
    out.print(show.pairs(_headline(choice, ratio)))
    pieces, split = _pieces(best)
    out.print(pieces)
    out.print(split)
    out.print(_memory(choice))
    out.print(_ranking(choice))
    search = (
        f"{choice.num_evaluated:,} plans evaluated, {choice.num_feasible:,} fit; every plan of "
        f"the space was tried, so the gap is {percent_text(choice.gap_frac)}"
    )
    budget = (
        f"{choice.budget_bytes / GIB:.1f} of {system.device.hbm.capacity_bytes / GIB:.1f} GiB; "
        "the rest is a margin for context, communication buffers and fragmentation"
    )
    level = system.levels[-1] if system.num_nodes > 1 else system.levels[0]
    sources = [
        ("Search", search),
        ("Budget", budget),
        ("Recipe", f"{choice.recipe.name}, {choice.recipe.source}"),
        ("Sources", f"links: {_link_source(choice, level.name)}"),
    ]
    out.print(show.pairs(sources))


def asked_text(question: Step) -> str:
    """The question in words: 'train llama3-8b, 64 x 131072 tokens'."""
    from workloads.models.transformer import TrainStep

    if isinstance(question, TrainStep):
        return (
            f"train {question.config.name}, "
            f"{question.global_batch:g} x {question.len_seq:g} tokens a step"
        )
    what = "prompts" if question.phase == "prefill" else "sequences at position"
    return (
        f"{question.phase} {question.config.name}, {question.batch:g} {what} "
        f"{'of ' if question.phase == 'prefill' else ''}{question.len_context:g}"
    )


def _headline(choice: PlanChoice, ratio: StepRatio | None) -> list[tuple[str, str]]:
    step = choice.best.step
    seconds = float(step.seconds)
    bounds = f"{seconds_text(float(step.lower_s))} .. {seconds_text(float(step.upper_s))}"
    lines = [
        ("Best plan", str(choice.plan)),
        ("Step", f"{seconds_text(seconds)}, bounds {bounds}, bound by {bound_text(step.bound)}"),
        (
            "Speed",
            f"{scaled_text(float(step.tokens_per_s), 'tokens/s')}, "
            f"MFU {percent_text(float(step.mfu_frac))} at most",
        ),
        ("Rung", RUNG),
    ]
    if ratio is not None:
        low, high = seconds * ratio.p10, seconds * ratio.p90
        lines.append(
            (
                "Expect",
                f"{seconds_text(low)} .. {seconds_text(high)}: {ratio.num_rows} published "
                f"training steps ({ratio.scope}) took {digits(ratio.p10)} to "
                f"{digits(ratio.p90)} times this bound (80 %), {digits(ratio.median)} in the "
                "median",
            )
        )
    return lines


def bound_text(name: str) -> str:
    """A resource or piece as people call it."""
    return {
        "tensor": "tensor cores",
        "vector": "vector units",
        "special": "special functions",
        "hbm": "HBM bandwidth",
        "l2": "L2 bandwidth",
        "smem": "shared-memory bandwidth",
    }.get(name, name)


def _pieces(best: Candidate) -> tuple[Table, str]:
    """Where the step's time goes, and how its kernels split by binding resource."""
    table = show.table("piece of the step", "time", "share", right=("time", "share"))
    total = float(best.step.seconds)
    rows = {k: float(v) for k, v in best.step.seconds_by_piece.items()}
    for piece, seconds in sorted(rows.items(), key=lambda item: -item[1]):
        if seconds > 0:
            table.add_row(piece, seconds_text(seconds), percent_text(seconds / total))
    compute = {k: float(v) for k, v in best.step.compute_by_resource.items()}
    whole = sum(compute.values())
    split = ", ".join(
        f"{bound_text(k)} {percent_text(v / whole)}"
        for k, v in sorted(compute.items(), key=lambda item: -item[1])
        if v > 0
    )
    return table, f"kernel time by binding resource: {split}"


def _memory(choice: PlanChoice) -> Table:
    """What fills one accelerator's memory."""
    table = show.table("memory per accelerator", "GiB", "of budget", right=("GiB", "of budget"))
    memory = choice.best.memory
    for part, size in memory.bytes_by_part.items():
        if float(size) > 0:
            share = percent_text(float(size) / choice.budget_bytes)
            table.add_row(part, f"{float(size) / GIB:.2f}", share)
    total = float(memory.total)
    table.add_section()
    table.add_row("total", f"{total / GIB:.2f}", percent_text(total / choice.budget_bytes))
    return table


def _ranking(choice: PlanChoice) -> Table:
    """The best plan of every mesh, and what the others pay for."""
    from simulator.planners.parallelism import why_slower

    right = ("step", "MFU", "GiB")
    table = show.table("plan", "step", "MFU", "GiB", "bound by", "why not", right=right)
    for candidate in (choice.best, *choice.runners_up):
        first = candidate is choice.best
        table.add_row(
            short_plan(candidate),
            seconds_text(float(candidate.step.seconds)),
            percent_text(float(candidate.step.mfu_frac)),
            f"{float(candidate.memory.total) / GIB:.1f}",
            bound_text(candidate.step.bound),
            "best" if first else why_slower(candidate, choice.best),
        )
    return table


def short_plan(candidate: Candidate) -> str:
    """The plan without what is at its default: 'dp4 tp1 pp1 cp16 mb1 zero2'."""
    text = str(candidate.plan)
    return (
        text.replace(" recompute-none", "").replace("recompute-full", "full").replace(" zero0", "")
    )


def _link_source(choice: PlanChoice, level: str) -> str:
    from hwmodels.device import matches

    path = f"levels.{level}.bytes_per_s"
    found = [g for g in choice.cluster.sources if matches(path, g)]
    cited = choice.cluster.sources[max(found, key=len)] if found else "unsourced"
    return f"{level} {cited}"
