"""The process that measures for `validate.profile`, which tells it what to do in one argument."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hwmodels.errors import InputError
from validate.agenda import (
    KIN,
    POINTS,
    QUICK,
    QUICK_LAUNCHES,
    Agenda,
    Item,
    arch_of,
    named,
    planned,
    suites,
)
from validate.profile import AGAIN, BAD_INPUT, DONE, counts
from validate.record import read_records, read_refused
from validate.recorded import COLLECTIVES, device_of
from validate.session import REFUSALS, Event, Summary, session
from validate.timer import ReplayTimer, Timer, Unmeasured

if TYPE_CHECKING:
    from validate.kernels.spec import KernelSpec

COLLECTIVES_SHARE: Final = 0.2
"""Share of the time that is kept for collectives where there are several GPUs."""
PR_SET_PDEATHSIG: Final = 1


def main(argv: Sequence[str]) -> int:
    """Measure what the argument asks for; events are JSON lines on stdout."""
    given = json.loads(argv[0])
    _die_with(given["parent"])
    try:
        done = work(given)
    except InputError as error:
        tell({"event": "error", "message": " ".join(str(error).split())})
        return BAD_INPUT
    tell({"event": "end", **counts(done)})
    return AGAIN if done.lost else DONE


def work(given: Mapping[str, Any]) -> Summary:
    """Open the timer, make the plan, run the session; then the collectives of several GPUs."""
    asked = given["kernels"]
    wanted = [name for name in asked if name != COLLECTIVES]
    num_gpus = _num_gpus(given)
    joined = num_gpus > 1 and (not asked or COLLECTIVES in asked)
    if asked and not wanted and not joined:
        raise InputError(f"collectives need two GPUs or more, and there is {num_gpus}")
    until, done = given["until"], Summary()
    if not asked or wanted:
        kept = COLLECTIVES_SHARE * max(until - time.monotonic(), 0.0) if joined else 0.0
        done = _kernels(given, wanted, until - kept)
    if joined and not done.lost:
        done += _collectives(given, num_gpus, resume=given["resume"] or not asked or bool(wanted))
    return done


def _kernels(given: Mapping[str, Any], wanted: Sequence[str], until: float) -> Summary:
    with _opened(given) as (timer, arch):
        plan = _plan(given, wanted, timer.environment.gpu, arch)
        return session(
            plan.items,
            timer,
            Path(given["out"]),
            deadline_s=until,
            resume=given["resume"],
            retry_before=given["retry_before"],
            say=_say,
            notes={"suite": given["suite"], "skipped": _skipped(plan)},
        )


@contextlib.contextmanager
def _opened(given: Mapping[str, Any]) -> Iterator[tuple[Timer, int]]:
    """The timer and the compute capability, times ten; the GPU is let go of at the end."""
    if given["replay"] is not None:
        path = Path(given["replay"])
        found = ReplayTimer(read_records(path).records, read_refused(path.parent / REFUSALS))
        gpu = found.environment.gpu
        device_id = device_of(gpu)
        if device_id is None:
            raise InputError(f"{path}: GPU '{gpu}' is in no catalogue; nothing to plan by")
        yield found, arch_of(device_id)
        return
    from validate.cuda_timer import CudaTimer
    from validate.torch_gpu import open_gpu

    most = QUICK_LAUNCHES if given["suite"] == QUICK else None
    gpu_here = open_gpu()
    os.environ.pop("TRITON_INTERPRET", None)  # before anything imports triton
    try:
        yield CudaTimer(gpu_here, suites()[0], most_launches=most), gpu_here.arch
    finally:
        gpu_here.close()


def _plan(given: Mapping[str, Any], wanted: Sequence[str], gpu: str, arch: int) -> Agenda:
    """The trials of this GPU, told to the listener; by its kin where no catalogue knows it."""
    specs, broken = suites()
    chosen: Sequence[KernelSpec] = named(specs, wanted) if wanted else specs
    device_id = device_of(gpu)
    if device_id is None:
        device_id = KIN.get(arch // 10, KIN[9])
        tell({"event": "note", "note": f"GPU '{gpu}' is in no catalogue; planned as {device_id}"})
    for folder, reason in broken:
        tell({"event": "note", "note": f"validate/kernels/{folder} is left out: {reason}"})
    points = given["points"] or POINTS[given["suite"]]
    plan = planned(chosen, device_id, arch, points, tuple(broken))
    tell({"event": "plan", "gpu": gpu, "trials": len(plan.items), "points": plan.num_points,
          "skipped": len(plan.skipped), "cost_s": plan.cost_s})  # fmt: skip
    return plan


def _skipped(plan: Agenda) -> dict[str, int]:
    """How many trials are not meant for this GPU, by kernel, implementation and reason."""
    counts: dict[str, int] = {}
    for trial, reason in plan.skipped:
        name = f"{trial.kernel}/{trial.implementation} {trial.case.dtype}: {reason}"
        counts[name] = counts.get(name, 0) + 1
    return counts


def _num_gpus(given: Mapping[str, Any]) -> int:
    """GPUs that a collective could join; one in a replay."""
    if given["replay"] is not None:
        return 1
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 1


def _collectives(given: Mapping[str, Any], num_gpus: int, *, resume: bool) -> Summary:
    """All-reduce and its kin over 2, 4, 8 GPUs, as many as there are."""
    from validate.kernels import collectives

    done = Summary()
    for num_ranks in collectives.group_sizes(num_gpus):
        try:
            timer = collectives.CollectiveTimer(num_ranks, collectives.NCCL)
        except Unmeasured as why:  # the kernels' records stand whatever the links do
            tell({"event": "note", "note": f"collectives are left out: {why}"})
            break
        with timer:
            trials = collectives.trials(num_ranks, collectives.NCCL, given["suite"])
            done += session(
                [Item(trial, 0.0, collectives.COST_S) for trial in trials],
                timer,
                Path(given["out"]),
                deadline_s=given["until"],
                resume=resume,
                retry_before=given["retry_before"],
                say=_say,
            )
    return done


def _say(event: Event) -> None:
    """One result, in few words."""
    line: dict[str, Any] = {
        "event": "trial",
        "number": event.number,
        "total": event.total,
        "trial": str(event.trial),
        "kernel": event.trial.kernel,
    }
    if event.record is not None:
        record = event.record
        line |= {
            "seconds": record.seconds,
            "half_width_frac": record.half_width_frac,
            "launch": record.launch,
            "flags": list(record.flags),
        }
    elif event.refused is not None:
        line |= {"seconds": None, "kind": event.refused.kind, "reason": event.refused.reason}
    tell(line)


def tell(event: Mapping[str, Any]) -> None:
    """One line to the process that listens; without a listener there is nothing left to do."""
    try:
        print(json.dumps(event), flush=True)
    except BrokenPipeError:
        os._exit(BAD_INPUT)


def _die_with(parent: int) -> None:
    """Have the system end this process when the one that listens is gone (Linux: prctl(2))."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        os._exit(BAD_INPUT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
