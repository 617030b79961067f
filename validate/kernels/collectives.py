"""Collectives over several GPUs through torch.distributed, in the layout of the public tables.

`bytes` is the size that nccl-tests states: the total output of an all-gather, the total input of a
reduce-scatter, one rank's buffer otherwise. A time is the largest over the ranks of each
one's median. One process a rank; rank 0 takes trials as lines on stdin, tells the others, and
answers with lines on stdout. Every collective is checked on numbers before it is timed.

    python -m validate.kernels.collectives RANK NUM_RANKS BACKEND FILE     is one rank
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from validate.record import EVENTS, NOISY, UNKNOWN, WARM, Case, Environment, Record, Trial
from validate.sampling import Sample
from validate.session import now
from validate.timer import Unmeasured

if TYPE_CHECKING:
    import torch

NAME: Final = "collectives"
NCCL, GLOO = "nccl", "gloo"
KINDS: Final = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")
FORMATS: Final = ("bf16",)
SIZES: Final = {
    "quick": tuple(2**p for p in range(10, 29, 3)),
    "full": tuple(2**p for p in range(9, 31)),
}
"""Bytes, from a launch to what fills the links."""
COST_S: Final = 0.5
FIRST_ANSWER_S, ANSWER_S = 180.0, 60.0
"""Longest that a group may take to come up, and for one collective."""
SAMPLES, WARM_UPS = 31, 5
SAMPLE_S: Final = 1e-3
"""Length of a sample: so many launches that the clock's resolution is small."""
MOST_LAUNCHES: Final = 40
"""An all-reduce in place multiplies its numbers: so many stay finite in bf16 over eight ranks."""
TIGHT: Final = 0.02
TOLERANCES: Final = {"bf16": 2e-2, "fp16": 4e-3, "fp32": 1e-5}
ROOT: Final = Path(__file__).resolve().parents[2]


def group_sizes(num_gpus: int) -> tuple[int, ...]:
    """Powers of two up to the GPUs there are, and all of them.

    >>> group_sizes(8), group_sizes(6), group_sizes(1)
    ((2, 4, 8), (2, 4, 6), ())
    """
    powers = [2**p for p in range(1, 11) if 2**p <= num_gpus]
    return tuple(sorted({*powers, *([num_gpus] if num_gpus > 1 else [])}))


def trials(num_ranks: int, backend: str, suite: str = "full") -> tuple[Trial, ...]:
    """Every collective at every size in every format, the largest sizes last."""
    return tuple(
        Trial(
            kernel=NAME,
            implementation=backend,
            case=Case(op=kind, dtype=dtype, params={"nodes": 1, "gpus": num_ranks, "bytes": size}),
        )
        for size in SIZES[suite]
        for kind in KINDS
        for dtype in FORMATS
    )


class CollectiveTimer:
    """Times collectives of one group; a context manager, which ends its processes."""

    def __init__(self, num_ranks: int, backend: str, *, python: str = sys.executable) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ridgeplan-")
        self._command = [python, "-m", "validate.kernels.collectives"]
        self._num_ranks, self._backend = num_ranks, backend
        self._ranks: list[subprocess.Popen[str]] = []
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._starts = 0
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()
        self._folder.cleanup()

    @property
    def environment(self) -> Environment:
        """The machine of rank 0."""
        return Environment(**self._environment)

    def measure(self, trial: Trial) -> Record:
        """Ask the group; a group that does not answer is replaced, and the trial refused."""
        if not self._ranks:
            self._start()
        root = self._ranks[0]
        assert root.stdin is not None
        try:
            root.stdin.write(json.dumps({"op": trial.case.op, "dtype": trial.case.dtype,
                                         "bytes": trial.case.params["bytes"]}) + "\n")  # fmt: skip
            root.stdin.flush()
            found = self._answers.get(timeout=ANSWER_S)
        except queue.Empty:
            self._stop()
            raise Unmeasured("hung", f"no answer within {ANSWER_S:g} s") from None
        except OSError:
            found = {"kind": "failed", "reason": "rank 0 is gone"}
        if "reason" in found:
            self._stop()
            raise Unmeasured(found["kind"], found["reason"])
        return self._record(trial, found)

    def _record(self, trial: Trial, found: dict[str, Any]) -> Record:
        sample = Sample(tuple(found["seconds"]))
        low, high = sample.ends
        return Record(
            case=trial.case,
            environment=self.environment,
            seconds=sample.median,
            repetitions=len(sample.seconds) * found["launches"],
            spread_frac=sample.spread_frac,
            measured_at=now(),
            kernel=NAME,
            implementation=self._backend,
            method=EVENTS,
            low_s=low,
            high_s=high,
            flags=(NOISY,) if sample.half_width_frac > TIGHT else (),
            error=found["error"],
            judge="exact sums",
            row={"family": NAME, "op": trial.case.op, "params": dict(trial.case.params)},
        )

    def _start(self) -> None:
        """One process a rank; waits until rank 0 says that the group stands."""
        self._starts += 1
        meeting = Path(self._folder.name) / f"meeting-{self._starts}"
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        self._answers = queue.Queue()
        for rank in range(self._num_ranks):
            arguments = [str(rank), str(self._num_ranks), self._backend, str(meeting)]
            self._ranks.append(
                subprocess.Popen(
                    [*self._command, *arguments],
                    stdin=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    env={**os.environ, "PYTHONPATH": path, "TORCH_CPP_LOG_LEVEL": "ERROR"},
                )
            )
        self._listener = threading.Thread(target=self._listen, args=(self._ranks[0],), daemon=True)
        self._listener.start()
        try:
            first = self._answers.get(timeout=FIRST_ANSWER_S)
        except queue.Empty:
            first = {"reason": "the ranks did not meet in time"}
        if "environment" not in first:
            self._stop()
            raise Unmeasured("failed", f"no group of {self._num_ranks}: {first.get('reason')}")
        self._environment = first["environment"]

    def _listen(self, root: subprocess.Popen[str]) -> None:
        answers = self._answers
        assert root.stdout is not None
        for line in root.stdout:
            with contextlib.suppress(ValueError):
                answers.put(json.loads(line))
        answers.put({"kind": "failed", "reason": "a rank ended"})

    def _stop(self) -> None:
        for process in self._ranks:
            process.kill()
        for process in self._ranks:
            process.wait()
        self._listener.join(timeout=5)
        for process in self._ranks:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        self._ranks = []


# ---- one rank ------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> None:
    """Join the group, then serve trials until stdin ends."""
    import torch
    from torch import distributed

    rank, num_ranks, backend, meeting = int(argv[0]), int(argv[1]), argv[2], argv[3]
    device = torch.device("cpu" if backend == GLOO else f"cuda:{rank}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        backend, init_method=f"file://{meeting}", rank=rank, world_size=num_ranks
    )
    if rank == 0:
        print(json.dumps({"environment": _environment(device)}), flush=True)
    for asked in _asked(rank, device):
        answer = _answer(asked, rank, num_ranks, device)
        if rank == 0:
            print(json.dumps(answer), flush=True)
        if "reason" in answer:
            break
    os._exit(0)  # a group that failed half-way cannot be taken down in order


def _asked(rank: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Trials as rank 0 reads them, told to all."""
    from torch import distributed

    while True:
        line = sys.stdin.readline() if rank == 0 else ""
        box: list[Any] = [json.loads(line) if line.strip() else None]
        distributed.broadcast_object_list(box, src=0, device=device)
        if box[0] is None:
            return
        yield box[0]


def _answer(
    asked: dict[str, Any], rank: int, num_ranks: int, device: torch.device
) -> dict[str, Any]:
    """Check and time one collective; `reason` where it cannot be."""
    try:
        exchange, error = _prepared(asked, rank, num_ranks, device)
        limit = TOLERANCES[asked["dtype"]]
        if not error <= limit:
            return {"kind": "wrong", "reason": f"relative error {error:.2g} above {limit:.2g}"}
        seconds, launches = _timed(exchange, device)
        return {"seconds": seconds, "launches": launches, "error": error}
    except Exception as why:  # one rank's error ends the group, whatever it is
        lines = str(why).strip().splitlines() or [""]
        kind = "memory" if "out of memory" in str(why).lower() else "failed"
        return {"kind": kind, "reason": f"{type(why).__name__}: {lines[0][:200]}"}


def _prepared(
    asked: dict[str, Any], rank: int, num_ranks: int, device: torch.device
) -> tuple[_Exchange, float]:
    """The collective, and its worst relative error over the ranks."""
    import torch
    from torch import distributed

    from validate.kernels.formats import TORCH
    from validate.kernels.judge import relative_error

    dtype = TORCH[asked["dtype"]]
    size = max(asked["bytes"] // torch.empty(0, dtype=dtype).element_size(), num_ranks)
    build = _BUILDERS[asked["op"]]
    exchange = build(_Rank(rank, num_ranks, device, dtype), size - size % num_ranks)
    exchange.reset()
    exchange.launch()
    error = relative_error(exchange.out, exchange.expected)
    worst = torch.tensor([error], dtype=torch.float64, device=device)
    distributed.all_reduce(worst, op=distributed.ReduceOp.MAX)
    return exchange, float(worst.item())


@dataclass(frozen=True)
class _Exchange:
    """A collective ready to launch; `reset` makes its buffers what they were."""

    launch: Callable[[], object]
    reset: Callable[[], object]
    out: torch.Tensor
    expected: torch.Tensor


@dataclass(frozen=True)
class _Rank:
    """One process of the group and what its buffers are made of."""

    rank: int
    num_ranks: int
    device: torch.device
    dtype: torch.dtype

    def numbers(self, of: int, start: int, count: int) -> torch.Tensor:
        """What a rank holds from a place on: 1 + (place + rank) mod 7, so that sums are small."""
        import torch

        places = torch.arange(start, start + count, device=self.device)
        return (1 + (places + of) % 7).to(self.dtype)

    def total(self, start: int, count: int) -> torch.Tensor:
        """The sum of all ranks' numbers."""
        import torch

        parts = [self.numbers(r, start, count).float() for r in range(self.num_ranks)]
        return torch.stack(parts).sum(dim=0)

    def unwritten(self, count: int) -> torch.Tensor:
        """A poisoned buffer."""
        import torch

        return torch.full((count,), torch.nan, device=self.device).to(self.dtype)


def _all_reduce(on: _Rank, size: int) -> _Exchange:
    from torch import distributed

    mine, buffer = on.numbers(on.rank, 0, size), on.unwritten(size)
    return _Exchange(
        lambda: distributed.all_reduce(buffer),
        lambda: buffer.copy_(mine),
        buffer,
        on.total(0, size),
    )


def _all_gather(on: _Rank, size: int) -> _Exchange:
    import torch
    from torch import distributed

    part = size // on.num_ranks
    mine, out = on.numbers(on.rank, on.rank * part, part), on.unwritten(size)
    whole = torch.cat([on.numbers(r, r * part, part) for r in range(on.num_ranks)])
    return _Exchange(
        lambda: distributed.all_gather_into_tensor(out, mine), lambda: None, out, whole
    )


def _reduce_scatter(on: _Rank, size: int) -> _Exchange:
    from torch import distributed

    part = size // on.num_ranks
    mine, out = on.numbers(on.rank, 0, size), on.unwritten(part)
    return _Exchange(
        lambda: distributed.reduce_scatter_tensor(out, mine),
        lambda: None,
        out,
        on.total(on.rank * part, part),
    )


def _all_to_all(on: _Rank, size: int) -> _Exchange:
    import torch
    from torch import distributed

    part = size // on.num_ranks
    mine, out = on.numbers(on.rank, 0, size), on.unwritten(size)
    whole = torch.cat([on.numbers(r, on.rank * part, part) for r in range(on.num_ranks)])
    return _Exchange(lambda: distributed.all_to_all_single(out, mine), lambda: None, out, whole)


def _send_recv(on: _Rank, size: int) -> _Exchange:
    """Every even rank sends to the next; without a next it stands aside."""
    from torch import distributed

    even = on.rank % 2 == 0
    peer = on.rank + 1 if even else on.rank - 1
    mine, out = on.numbers(on.rank, 0, size), on.unwritten(size)
    if peer >= on.num_ranks:
        return _Exchange(lambda: None, lambda: None, mine, mine)
    if even:
        return _Exchange(lambda: distributed.send(mine, peer), lambda: None, mine, mine)
    got = on.numbers(peer, 0, size)
    return _Exchange(lambda: distributed.recv(out, peer), lambda: None, out, got)


_BUILDERS: Final[dict[str, Callable[[_Rank, int], _Exchange]]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "send_recv": _send_recv,
}


def _timed(exchange: _Exchange, device: torch.device) -> tuple[list[float], int]:
    """Samples in seconds a launch, of the rank whose median is the largest, and launches each."""
    import torch
    from torch import distributed

    once = [_sample(exchange, 1, device) for _ in range(WARM_UPS)]
    guess = torch.tensor([sorted(once)[len(once) // 2]], dtype=torch.float64, device=device)
    distributed.all_reduce(guess, op=distributed.ReduceOp.MAX)
    launches = min(max(int(SAMPLE_S / max(float(guess.item()), 1e-7)), 1), MOST_LAUNCHES)
    mine = [_sample(exchange, launches, device) for _ in range(SAMPLES)]
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, mine)
    return max(every, key=lambda samples: sorted(samples)[len(samples) // 2]), launches


def _sample(exchange: _Exchange, launches: int, device: torch.device) -> float:
    """Seconds a launch, all ranks starting together."""
    import torch
    from torch import distributed

    exchange.reset()
    distributed.barrier()
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(launches):
            exchange.launch()
        return (time.perf_counter() - start) / launches
    torch.cuda.synchronize(device)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(launches):
        exchange.launch()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) * 1e-3 / launches


def _environment(device: torch.device) -> dict[str, Any]:
    """The machine of this rank."""
    import torch

    cuda = device.type == "cuda"
    versions: dict[str, str] = {"torch": str(torch.__version__)}
    if cuda:
        versions |= {
            "cuda": torch.version.cuda or UNKNOWN,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else "cpu",
        "sm_clock_hz": None,
        "memory_clock_hz": None,
        "driver": UNKNOWN,
        "versions": versions,
        "l2_state": WARM,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
