"""Which rule pinned values of a plan break, whatever the rest of it: one line, before any search.

The rules are those of the planners' space (`parallelism`, equations 1 to 8); each is checked as
soon as the values it needs are pinned. Pins that break none of them may still leave no plan: that
is found by the search, and no error of the question.

    dp tp pp cp = accelerators; a part of them divides it       tp | heads, accelerators of a link
    pp <= layers; v <= 8, v | layers, pp v <= layers            cp = 2^k, 2 cp | tokens
    ep | experts, ep | dp cp (etp = 0) or dp cp tp (etp = 1)    dp micro-batch | global batch
    v > 1: pp > 1 and pp | micro-batches                        ZeRO needs dp cp > 1, 2 and 3 pp = 1

    Implemented in: `check_pins`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from hwmodels.cluster import Cluster
from hwmodels.errors import InputError
from workloads.axis_order import AxisOrder
from workloads.models.config import TransformerConfig
from workloads.models.mixers import no_context
from workloads.models.transformer import DECODE, Inference, TrainStep
from workloads.plan import Recompute

DEGREES: Final = ("dp", "tp", "pp", "cp")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    pins: Mapping[str, int]
    step: TrainStep | Inference
    on: Cluster
    max_micro_batch: int
    max_interleave: int
    even: bool

    @property
    def cfg(self) -> TransformerConfig:
        return self.step.config

    @property
    def total(self) -> int:
        return self.on.num_accelerators

    def told(self, *names: str) -> str:
        """The pinned ones of these fields: 'tp=8, dp=3'."""
        return ", ".join(f"{k}={v}" for k, v in self.pins.items() if k in names)

    def has(self, *names: str) -> bool:
        return all(name in self.pins for name in names)

    def product(self, *names: str) -> int:
        return math.prod(self.pins.get(name, 1) for name in names)


def check_pins(
    pins: Mapping[str, int],
    step: TrainStep | Inference,
    *,
    on: Cluster,
    max_micro_batch: int,
    max_interleave: int,
    even: bool,
) -> None:
    """Raise `InputError` with the first rule that the pins break; `even`: stages are alike."""
    asked = _Asked(
        pins=pins, step=step, on=on, max_micro_batch=max_micro_batch,
        max_interleave=max_interleave, even=even,
    )  # fmt: skip
    for rule in (*_RULES, *(_TRAINING if isinstance(step, TrainStep) else _SERVING)):
        for broken in rule(asked):
            raise InputError(broken)


# ---- the mesh --------------------------------------------------------------------------------


def _tensor(a: _Asked) -> Iterator[str]:
    tp, heads = a.pins.get("tp", 1), a.cfg.split_parts
    inner = a.on.levels[0]
    reach = int(min(inner.size, a.total))
    if heads % tp:
        parts = "query heads" if a.cfg.mixer is None else f"heads of {a.cfg.name} all told"
        yield f"tp={tp} does not divide the {heads} {parts}; pin a divisor of {heads}"
    elif reach % tp:
        yield (
            f"tp={tp} does not divide the {reach} accelerators of one {inner.name} group; pin a "
            f"divisor of {reach}"
        )


def _stages(a: _Asked) -> Iterator[str]:
    pp, layers = a.pins.get("pp", 1), a.cfg.num_layers
    if pp > layers:
        yield f"pp={pp} is more than the model's {layers} layers; a stage needs at least one"


def _tiles(a: _Asked) -> Iterator[str]:
    """Equation 1."""
    pinned, product = a.told(*DEGREES), a.product(*DEGREES)
    if a.total % product:
        made = f"{pinned} make {product} ranks, which do" if "," in pinned else f"{pinned} does"
        yield (
            f"{made} not divide the {a.total} accelerators; dp x tp x pp x cp must be "
            f"{a.total}: loosen a pin or change the nodes"
        )
    elif a.has(*DEGREES) and product != a.total:
        yield (
            f"{pinned} make {product} ranks of {a.total} accelerators; dp x tp x pp x cp must be "
            f"{a.total}: loosen a pin or change the nodes"
        )


def _context(a: _Asked) -> Iterator[str]:
    cp = a.pins.get("cp", 1)
    new = int(a.step.len_seq if isinstance(a.step, TrainStep) else a.step.len_new)
    if cp > 1 and a.cfg.mixer is not None:
        yield no_context(a.cfg.name, a.cfg.mixer)
    elif cp & (cp - 1):
        yield f"cp={cp} is no power of two; pin 1, 2, 4 and so on"
    elif cp > 1 and isinstance(a.step, Inference) and a.step.phase == DECODE:
        yield f"cp={cp}: one new token is not split; leave cp out of a decode step"
    elif cp > 1 and new % (2 * cp):
        yield (
            f"cp={cp}: 2 x {cp} does not divide the {new} tokens of a sequence; pin less, or "
            "change the length"
        )


def _experts(a: _Asked) -> Iterator[str]:
    ep, etp = a.pins.get("ep", 1), a.pins.get("etp", 0)
    if etp not in (0, 1):
        yield f"etp={etp} is neither 0 (experts are split as tp says) nor 1 (not at all)"
    if ep == 1:
        return
    if a.cfg.moe is None:
        yield f"ep={ep}: {a.cfg.name} has no experts; leave ep out"
    elif a.cfg.moe.num_experts % ep:
        number = a.cfg.moe.num_experts
        yield f"ep={ep} does not divide the {number} experts; pin a divisor of {number}"
    elif a.total // a.pins.get("pp", 1) % ep:
        ranks = a.total // a.pins.get("pp", 1)
        yield f"ep={ep} does not divide the {ranks} ranks that dp x cp x tp can be; pin less"
    elif a.has("dp", "cp", "tp", "etp") or (a.has("dp", "cp", "tp") and a.pins["tp"] == 1):
        names = ("dp", "cp", "tp") if etp else ("dp", "cp")
        if a.product(*names) % ep:
            said = " x ".join(names)
            yield f"ep={ep} does not divide {said} = {a.product(*names)}; loosen a pin"


def _order(a: _Asked) -> Iterator[str]:
    order = a.pins.get("order", 0)
    if order not in set(AxisOrder):
        yield f"order={order} is no order of the axes; pin one by its name, e.g. tp-cp-pp-dp"


# ---- the schedule ----------------------------------------------------------------------------


def _batch(a: _Asked) -> Iterator[str]:
    """Equation 6."""
    assert isinstance(a.step, TrainStep)
    batch, micro = int(a.step.global_batch), a.pins.get("micro_batch", 1)
    slot = a.product("dp", "micro_batch")
    if micro > a.max_micro_batch:
        yield f"micro_batch={micro} is more than the {a.max_micro_batch} that are searched"
    elif batch % slot:
        told = a.told("dp", "micro_batch")
        made = f"{told} make {slot} sequences, which do" if "," in told else f"{told} does"
        yield f"{made} not divide the global batch of {batch}; pin a divisor, or change the batch"


def _chunks(a: _Asked) -> Iterator[str]:
    """Equation 3."""
    assert isinstance(a.step, TrainStep)
    v, pp, layers = a.pins.get("interleave", 1), a.pins.get("pp"), a.cfg.num_layers
    if v == 1:
        return
    if v > a.max_interleave:
        yield f"interleave={v} is more than the {a.max_interleave} chunks that are searched"
    elif pp == 1:
        yield f"interleave={v} needs pipeline stages, and pp=1 has one; pin pp, or interleave=1"
    elif layers % v:
        yield f"interleave={v} does not divide the {layers} layers; pin a divisor of {layers}"
    elif pp is not None and pp * v > layers:
        yield f"pp={pp}, interleave={v} make {pp * v} chunks of {layers} layers; pin less"
    elif pp is not None and a.even and layers % (pp * v):
        yield (
            f"pp={pp}, interleave={v} make {pp * v} chunks, which do not divide the {layers} "
            "layers; pin others"
        )
    elif pp is not None and a.has("dp", "micro_batch"):
        micro = int(a.step.global_batch) // a.product("dp", "micro_batch")
        if micro % pp:
            yield f"interleave={v} needs pp={pp} to divide the {micro} micro-batches; loosen a pin"


def _recompute(a: _Asked) -> Iterator[str]:
    mode = a.pins.get("recompute", 0)
    if mode not in set(Recompute):
        yield f"recompute={mode} is no mode; pin none, selective or full"
    elif mode == Recompute.SELECTIVE and a.even:
        yield (
            "recompute=selective drops attention scores, which fused attention never stores; pin "
            "none or full"
        )


def _zero(a: _Asked) -> Iterator[str]:
    """Equation 8."""
    stage, pp = a.pins.get("zero_stage", 0), a.pins.get("pp", 1)
    rest = a.total // a.product("tp", "pp")
    if stage not in (0, 1, 2, 3):
        yield f"zero_stage={stage} is none of 0, 1, 2, 3"
    elif stage >= 2 and pp > 1:
        yield (
            f"zero_stage={stage} with pp={pp} would exchange for every micro-batch; pin ZeRO 0 or "
            "1, or pp=1"
        )
    elif stage and (rest == 1 or (a.has("dp", "cp") and a.product("dp", "cp") == 1)):
        yield f"zero_stage={stage} shards over dp x cp ranks, and here that is 1; pin zero=0"


def _slot(a: _Asked) -> Iterator[str]:
    """Equation 7."""
    assert isinstance(a.step, Inference)
    batch, slots = int(a.step.batch), a.product("dp", "pp")
    if batch % slots:
        yield f"{a.told('dp', 'pp')}: {slots} slots do not divide the batch of {batch}; loosen one"
    for name in ("interleave", "zero_stage", "recompute"):
        usual = int(name == "interleave")
        if a.pins.get(name, usual) != usual:
            yield f"{name}={a.pins[name]} is for training; leave it out of serving"


_Rule = Callable[[_Asked], Iterator[str]]
_RULES: Final[tuple[_Rule, ...]] = (_stages, _tensor, _context, _tiles, _experts, _order)
_TRAINING: Final[tuple[_Rule, ...]] = (_batch, _chunks, _recompute, _zero)
_SERVING: Final[tuple[_Rule, ...]] = (_slot,)
