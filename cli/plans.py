"""A plan search as a record and in words: what `--json`, the tables and the chart share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from cli.quantity import count_text, parse_count, seconds_text, shown
from hwmodels.errors import InputError

if TYPE_CHECKING:
    from hwmodels.cluster import Cluster
    from hwmodels.step_factors import StepFactors
    from hwmodels.step_ratios import StepRatio
    from simulator.planners.parallelism import Candidate, PlanChoice, Step
    from simulator.planners.sequence_splits import Splits
    from simulator.recipe import Recipe
    from simulator.stack import OnDevice
    from workloads.models.config import TransformerConfig

MOST: Final = 2**30
"""Tokens in a sequence, sequences in a batch: more is a slip of the keyboard."""
PIN_WORDS: Final = {"mb": "micro_batch", "v": "interleave", "zero": "zero_stage"}
"""Fields of a plan as its short form writes them."""

BOUND: Final = "bound"
RUNG: Final = "bound: kernels at their roofline, links at wire rate; the lower bound is a floor"


def record(choice: PlanChoice, question: Step, ratio: StepRatio | None) -> dict[str, Any]:
    """The whole answer of one search."""
    best = choice.best
    return {
        "model": question.config.name,
        **asked_of(question),
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
        "stack": choice.stack.stack.name if choice.stack else None,
        "measured_over_bound": ratio,
        "plans": [
            _candidate(c) | {"why_not_best": None if c is best else why_not_best(c, best)}
            for c in (best, *choice.runners_up)
        ],
    }


def rung_text(choice: PlanChoice) -> str:
    """What the times stand on."""
    if choice.stack is None:
        return RUNG
    return f"calibrated: kernels as {choice.stack.stack.name} runs them; {choice.stack.source}"


def framework_on(
    name: str | None, system: Cluster, recipe: Recipe, config: TransformerConfig
) -> OnDevice | None:
    """The framework of that name with the fitted factors; None for 'bound' or nothing."""
    from hwmodels.step_factors import shipped_values
    from simulator.expert_run import fitted_run
    from simulator.stack import OnDevice, factors_of
    from simulator.stack import stack as stack_of

    if name is None or name == BOUND:
        return None
    framework, (kind, shipped) = stack_of(name), _fitted_for(recipe, config)
    factors = factors_of(framework, system.device, shipped_values())
    if shipped is None:
        source = f"factors of {kind}" if config.mixer is not None else ""
        return OnDevice(stack=framework, factors=factors, source=source, experts=fitted_run())
    low, high = (100 * (math.exp(sign * shipped.half_80) - 1) for sign in (-1, 1))
    source = (
        f"factors of {shipped.num_runs} {kind}; 80 % of steps of tables left out of the "
        f"fit took {low:+.0f} to {high:+.0f} % of the time told"
    )
    return OnDevice(stack=framework, factors=factors, source=source, experts=fitted_run())


def half_80_of(recipe: Recipe, config: TransformerConfig) -> float | None:
    """Half width in log time of a calibrated step's 80 % interval; None where none was fitted."""
    shipped = _fitted_for(recipe, config)[1]
    return None if shipped is None else shipped.half_80


def _fitted_for(recipe: Recipe, config: TransformerConfig) -> tuple[str, StepFactors | None]:
    """The published steps that are most like this one, in words, and the fit on them."""
    from hwmodels.step_experts import shipped_experts
    from hwmodels.step_factors import shipped_factors, shipped_low_precision

    if config.mixer is not None:
        return f"published steps; none with {config.mixer.label} layers was compared", None
    if config.moe is not None:
        return "published steps of mixtures of experts", shipped_experts()
    if recipe.low is not None:
        return "published steps in narrow formats", shipped_low_precision()
    return "published steps", shipped_factors()


def asked_of(question: Step) -> dict[str, Any]:
    """Phase, tokens of a sequence and number of sequences, by the names of the record."""
    from workloads.models.transformer import TrainStep

    if isinstance(question, TrainStep):
        phase, len_seq, batch = "train", question.len_seq, question.global_batch
    else:
        phase, len_seq, batch = question.phase, question.len_context, question.batch
    return {"phase": phase, "len_seq": len_seq, "global_batch": batch}


def _candidate(c: Candidate) -> dict[str, Any]:
    from workloads.axis_order import AxisOrder

    return {
        "plan": c.plan,
        "order": AxisOrder(int(c.plan.order)).label,
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


def asked_text(question: Step) -> str:
    """The question in words: 'Train llama3-8b, 64 x 128k tokens a step'."""
    asked, name = asked_of(question), question.config.name
    length, batch = (count_text(asked[key]) for key in ("len_seq", "global_batch"))
    if asked["phase"] == "train":
        return f"Train {name}, {batch} x {length} tokens a step"
    if asked["phase"] == "prefill":
        return f"Prefill of {name}, {batch} prompts of {length} tokens"
    return f"Decode with {name}, {batch} sequences at position {length}"


def step_text(question: Step) -> str:
    """What is done when the seconds are over."""
    return {
        "train": "a step",
        "prefill": "for all prompts",
        "decode": "for one more token of every sequence",
    }[asked_of(question)["phase"]]


def why_not_best(candidate: Candidate, best: Candidate) -> str:
    """What a plan pays for against the best one: its worst pieces, or its worst case."""
    from simulator.planners.parallelism import extra_seconds

    total = float(candidate.step.seconds) - float(best.step.seconds)
    if total <= 1e-3 * float(best.step.seconds):
        worst = float(candidate.step.upper_s) - float(best.step.upper_s)
        if worst > 0:
            return f"as fast if all overlaps, +{seconds_text(worst)} if nothing does"
        return "as fast, but less simple"
    extra = list(extra_seconds(candidate, best).items())[:2]
    return ", ".join(f"{piece} +{seconds_text(s)}" for piece, s in extra if s > 0.1 * total)


def short_plan(candidate: Candidate) -> str:
    """The plan without what is at its default: 'dp4 tp1 pp1 cp16 mb1 zero2'."""
    text = str(candidate.plan)
    return (
        text.replace(" recompute-none", "").replace("recompute-full", "full").replace(" zero0", "")
    )


def whole(text: str, option: str) -> int:
    """A size of the question: whole, positive, and of this world."""
    number = parse_count(text, option)
    if not 1 <= number <= MOST or number != int(number):
        most = count_text(MOST)
        raise InputError(f"{option} = '{shown(text)}' is not a whole number from 1 to {most}")
    return int(number)


def pins_given(given: list[str], option: str = "--pin") -> dict[str, int]:
    """Field of the plan -> its value; short words as a plan is written are welcome."""
    from cli.questions import pairs

    pins: dict[str, int] = {}
    for key, text in pairs(given, option, "tp=8"):
        field = PIN_WORDS.get(key.casefold(), key.casefold())
        told = _told(field, text)
        number = parse_count(told, f"{option} {shown(key)}")
        least = 0 if field in ("recompute", "zero_stage", "sequence", "order") else 1
        if number < least or number != int(number):
            raise InputError(
                f"{option} {shown(key)} = '{shown(text)}' is not a whole number from {least} up"
            )
        if field in pins:
            raise InputError(f"{option} {shown(field)} is given twice; keep one")
        pins[field] = int(number)
    return pins


def _told(field: str, text: str) -> str:
    """The number of what is given by its name: a recompute mode, a sequence's split, an order."""
    from workloads.axis_order import ORDERS
    from workloads.plan import Recompute
    from workloads.sequence_plan import NAMES

    modes = {mode.name.casefold(): str(int(mode)) for mode in Recompute}
    splits = {name: str(int(split)) for name, split in NAMES.items()}
    orders = {name: str(int(order)) for name, order in ORDERS.items()}
    names = {"recompute": modes, "sequence": splits, "order": orders}.get(field, {})
    return names.get(text.casefold(), text)


AUTO: Final = "auto"


def with_order(given: list[str] | None, name: str) -> dict[str, int]:
    """The pins with the order of the axes that `--order` asks for; all useful ones for 'auto'."""
    from workloads.axis_order import order_named

    pins = pins_given(given or [])
    if name.casefold() == AUTO:
        return pins
    order = int(order_named(name))
    if pins.get("order", order) != order:
        raise InputError("--order and --pin order ask for two orders; keep one")
    return {**pins, "order": order}


EVERY: Final = "all"


def splits_asked(named: list[str]) -> Splits:
    """What `--sequence-parallel` asks for: the model's default, these alone, or all."""
    from simulator.planners.sequence_splits import ANY, Splits, all_splits
    from workloads.sequence_plan import split_named

    if not named:
        return ANY
    if EVERY in (name.casefold() for name in named):
        return all_splits()
    return Splits(of=tuple(split_named(name) for name in named), whole=False)


def question_of(kind: str, config: TransformerConfig, len_seq: int, batch: int) -> Step:
    """One step of that phase."""
    from workloads.models.transformer import decode_step, prefill_step, train_step

    if kind == "train":
        return train_step(config, len_seq=len_seq, global_batch=batch)
    make = prefill_step if kind == "prefill" else decode_step
    return make(config, batch=batch, len_context=len_seq)
