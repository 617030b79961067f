"""`ridgeplan serve`: times of tokens, throughput and memory of a served model, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cli import show
from cli.commands.plan import Model
from cli.options import AsJson
from cli.plans import whole
from cli.quantity import capacity_text, digits, percent_text, scaled_text, seconds_text, shown
from hwmodels.errors import UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from simulator.serving import Load
    from simulator.serving_estimate import ServingEstimate
    from simulator.serving_kernels import Served

SERVE, PREFILL, DECODE = PHASES = ("serve", "prefill", "decode")
UNTRIED: Final = "Compared with no published figure: {}."


def serve(
    model: Model,
    device: Annotated[
        str, typer.Option("--device", "-d", metavar="NAME", help="A device, or a TOML file.")
    ],
    isl: Annotated[str, typer.Option("--isl", metavar="N", help="Tokens of a prompt.")] = "1k",
    osl: Annotated[str, typer.Option("--osl", metavar="N", help="Tokens of an output.")] = "1k",
    concurrency: Annotated[
        str | None,
        typer.Option(
            "--concurrency",
            "-c",
            metavar="N",
            help="Requests in flight on one engine; as many as surely fit where left out. With "
            "--phase prefill: prompts of the pass (1 where left out).",
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", "-e", metavar="NAME", help="trtllm, vllm or sglang.")
    ] = "vllm",
    precision: Annotated[
        str, typer.Option("--precision", metavar="NAME", help="bf16, fp8, fp8-block or nvfp4.")
    ] = "bf16",
    cache: Annotated[
        str | None,
        typer.Option("--cache", metavar="NAME", help="Keys and values: bf16 or fp8."),
    ] = None,
    tp: Annotated[int, typer.Option("--tp", metavar="N", help="Tensor parallel ranks.")] = 1,
    pp: Annotated[int, typer.Option("--pp", metavar="N", help="Pipeline stages.")] = 1,
    attn_dp: Annotated[
        int, typer.Option("--attn-dp", metavar="N", help="Replicas of attention.")
    ] = 1,
    ep: Annotated[int, typer.Option("--ep", metavar="N", help="Ranks that share experts.")] = 1,
    phase: Annotated[
        str,
        typer.Option(
            "--phase", metavar="NAME", help="serve, or one pass alone: prefill or decode."
        ),
    ] = SERVE,
    disaggregated: Annotated[
        bool, typer.Option("--disaggregated", help="Prompts run on other ranks.")
    ] = False,
    eager: Annotated[
        bool, typer.Option("--eager", help="No graph replays decoding passes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Time per token and to the first, throughput and memory of a served model.

    One engine on tp x attn-dp x pp devices; requests of these mean lengths keep coming.

    \b
    Examples:
      ridgeplan serve examples/llama3-70b.json -d h200-sxm --tp 4 --precision fp8 -c 64
      ridgeplan serve examples/llama3-8b.json -d h100-sxm --isl 8k --osl 256 -e trtllm
      ridgeplan serve examples/deepseek-v3.json -d b200-sxm --tp 8 --ep 8 --precision fp8-block
    """
    if phase not in PHASES:
        raise UnknownNameError("phase", phase, PHASES, "one of " + ", ".join(PHASES))
    served = _served(model, device, engine, precision, cache, tp=tp, pp=pp, attn_dp=attn_dp, ep=ep)
    load = _load(served, whole(isl, "--isl"), whole(osl, "--osl"), concurrency, phase,
                 disaggregated=disaggregated, eager=eager)  # fmt: skip
    document = _document(served, load, phase, precision)
    if as_json:
        show.print_json(document)
        return
    _show(document)


def _served(
    model: Any, device: str, engine: str, precision: str, cache: str | None, **split: int
) -> Served:
    from hwmodels import catalog
    from hwmodels.errors import InputError
    from simulator.serving_estimate import formats_of
    from simulator.serving_kernels import Layout, Served
    from simulator.serving_kernels import engine as engine_of
    from workloads.models.config import load_model

    ranks, ep = split["tp"] * split["attn_dp"], split["ep"]
    if ep < 1 or ranks % ep:
        raise InputError(f"--ep {ep} does not divide {ranks} ranks (tp x attn-dp); give a divisor")
    config = load_model(model)
    if config.num_linear_layers:
        raise InputError(
            f"{shown(config.name)}: serving of linear-attention layers is not modelled; ask "
            "`ridgeplan plan` for training"
        )
    moe_tp = ranks // ep if config.moe else 1
    layout = Layout(tp=split["tp"], attn_dp=split["attn_dp"], moe_tp=moe_tp,
                    moe_ep=ep if config.moe else 1, pp=split["pp"])  # fmt: skip
    return Served(
        config=config,
        device=catalog.device(device),
        engine=engine_of(engine),
        formats=formats_of(precision, cache),
        layout=layout,
    )


def _load(
    served: Served,
    isl: int,
    osl: int,
    concurrency: str | None,
    phase: str,
    *,
    disaggregated: bool,
    eager: bool,
) -> Load:
    """Requests of one replica of attention."""
    from simulator.serving import Load
    from simulator.serving_estimate import most_in_flight

    if concurrency is not None:
        each = max(whole(concurrency, "--concurrency") / served.layout.attn_dp, 1.0)
    elif phase == PREFILL:
        each = 1.0
    else:
        each = float(most_in_flight(served, isl, osl))
    return Load(concurrency=each, isl=isl, osl=osl, disaggregated=disaggregated, graphs=not eager)


def _document(served: Served, load: Load, phase: str, precision: str) -> dict[str, Any]:
    from simulator.serving_estimate import decode_parts, estimate_serving, prefill_parts

    split = served.layout
    document: dict[str, Any] = {
        "model": served.config.name,
        "device": served.device.id,
        "num_gpus": split.num_gpus,
        "engine": served.engine.name,
        "precision": precision,
        "cache": served.formats.cache.name,
        "layout": split,
        "phase": phase,
        "load": load,
        "concurrency": load.concurrency * split.attn_dp,
    }
    if phase == SERVE:
        return document | _answer(estimate_serving(served, load))
    parts = prefill_parts(served, load) if phase == PREFILL else decode_parts(served, load)
    return document | {"seconds": sum(parts.values()), "seconds_by_part": parts}


def _answer(found: ServingEstimate) -> dict[str, Any]:
    from simulator.serving import FITTED_ON

    return {
        "tpot_s": found.tpot_s,
        "tpot_range_s": found.tpot_range_s,
        "ttft_s": found.ttft_s,
        "ttft_range_s": found.ttft_range_s,
        "seconds_by_part": found.parts,
        "ttft_by_part": found.first_parts,
        "in_flight": found.terms.batch * found.served.layout.attn_dp,
        "waiting": found.waiting * found.served.layout.attn_dp,
        "prompts_queue": found.queues,
        "requests_per_s": found.requests_per_s,
        "tokens_per_s": found.tokens_per_s,
        "tokens_per_s_per_gpu": found.tokens_per_s_per_gpu,
        "memory": found.memory,
        "source": FITTED_ON,
        "notes": _notes(found),
    }


def _notes(found: ServingEstimate) -> list[str]:
    """What the figures leave out in this setting."""
    load, split = found.load, found.served.layout
    notes = []
    if found.waiting:
        notes.append(
            f"{found.waiting * split.attn_dp:.0f} requests more than fit wait for others to end; "
            "their wait is not in the time to the first token."
        )
    if found.queues:
        notes.append(
            "The prompts in flight exceed one pass: where requests arrive together, first tokens "
            "wait for others' prompts, too."
        )
    mixer = found.served.config.mixer
    if mixer is not None:
        notes.append(
            f"No published figure of a model with {mixer.label} layers is among those compared; "
            f"the states of a request take {capacity_text(found.memory.state_bytes)} of a device."
        )
    untried = [name for name, used in
               (("pipeline stages", split.pp > 1), ("eager decoding", not load.graphs)) if used
               ]  # fmt: skip
    if untried:
        notes.append(UNTRIED.format(", ".join(untried)))
    return notes


def _show(d: Mapping[str, Any]) -> None:
    out, split = show.console(), d["layout"]
    degrees = " ".join(
        f"{name}={n}"
        for name, n in (("tp", split.tp), ("pp", split.pp), ("attn-dp", split.attn_dp),
                        ("ep", split.moe_ep))
        if n > 1
    )  # fmt: skip
    load = d["load"]
    out.print(
        f"{d['model']} on {d['num_gpus']} x {d['device']}, {d['engine']}, {d['precision']}"
        f"{', ' + degrees if degrees else ''}: {d['concurrency']:.0f} requests of "
        f"{load.isl} + {load.osl} tokens",
        style="bold",
    )
    lines = _serving_lines(d) if d["phase"] == SERVE else [
        ("Pass", f"{d['phase']}, {seconds_text(d['seconds'])}")
    ]  # fmt: skip
    out.print(show.pairs(lines))
    _print_parts("where the time goes", d["seconds_by_part"])
    if d.get("ttft_by_part"):
        _print_parts("where the time to the first token goes", d["ttft_by_part"])


def _serving_lines(d: Mapping[str, Any]) -> list[tuple[str, str]]:
    memory = d["memory"]
    token = f"{seconds_text(d['tpot_s'])} ({_range_text(d['tpot_range_s'])})"
    first = "runs on other ranks"
    if d["ttft_s"] is not None:
        first = f"{seconds_text(d['ttft_s'])} ({_range_text(d['ttft_range_s'])})"
    return [
        ("Output token", token),
        ("First token", first),
        ("Throughput", f"{scaled_text(d['tokens_per_s'], 'tokens/s')}, "
                       f"{scaled_text(d['tokens_per_s_per_gpu'], 'tokens/s')} a GPU, "
                       f"{digits(d['requests_per_s'])} requests/s"),
        ("Memory", f"weights {capacity_text(memory.weights_bytes)}; cache "
                   f"{capacity_text(memory.room_bytes)} in {memory.num_pages} pages of "
                   f"{memory.page_tokens} tokens, {percent_text(memory.waste_frac)} of them empty"),
        ("Fit", f"{memory.safe_requests} requests at their longest, {memory.most_requests:.0f} "
                "spread over their lives, a replica"),
        ("Range", "four fifths of published figures, their model left out of the fit"),
        ("Source", d["source"]),
        *(("Note", note) for note in d["notes"]),
    ]  # fmt: skip


def _range_text(both: tuple[float, float]) -> str:
    return f"{seconds_text(both[0])} to {seconds_text(both[1])}"


def _print_parts(title: str, parts: Mapping[str, float]) -> None:
    whole_s = sum(parts.values())
    table = show.table("part", "time", "share", title=title, right=("time", "share"))
    for name, s in sorted(parts.items(), key=lambda item: -item[1]):
        if s > 0:
            table.add_row(name, seconds_text(s), percent_text(s / whole_s))
    show.console().print(table)
