"""Profile the kernels of the suite on the GPU of this machine.

    python -m validate.profile --suite quick --out DIR

runs from a bare checkout with torch, triton and numpy alone. The work is done by a second process
(`--worker`), which this one watches: where a kernel takes the process or the GPU's context with it,
or never ends, that trial gets a refusal and the work goes on in a fresh process. Records are on the
disk as they are made (`validate.session`); `--resume` goes on after whatever ended a profile.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from hwmodels.errors import InputError
from validate.agenda import SECONDS, SUITES
from validate.record import HUNG, LOST, NOISY
from validate.session import Summary, free_store, now, refusal, refuse, running

ROOT: Final = Path(__file__).resolve().parents[1]
WORKER: Final = "validate.profile_worker"
DONE, BAD_INPUT, AGAIN, INTERRUPTED = 0, 2, 75, 130
"""Exit codes; AGAIN asks for a fresh process, as the device is lost to this one."""
SILENCE_S: Final = 150.0
"""Longest that a trial may take, and a worker may need to begin."""
MOST_STARTS: Final = 40
Say = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to profile and where to; `replay` answers from a file of records, without a GPU."""

    suite: str
    out: Path
    kernels: tuple[str, ...] = ()
    seconds: float | None = None
    points: int | None = None
    resume: bool = False
    retry: bool = False
    replay: Path | None = None

    def checked(self) -> Options:
        """The same; raises `InputError` where it makes no sense."""
        if self.suite not in SUITES:
            raise InputError(f"--suite {self.suite}: it is {' or '.join(SUITES)}")
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise InputError(f"--seconds {self.seconds:g}: give a positive number")
        if self.points is not None and self.points < 1:
            raise InputError(f"--points {self.points}: give at least 1")
        if self.replay is not None and not self.replay.is_file():
            raise InputError(f"--replay {self.replay}: no such file; give a file of records")
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"--out {self.out}: is a file; give a folder")
        return self

    @property
    def budget_s(self) -> float:
        """Seconds that the profile may take."""
        return SECONDS[self.suite] if self.seconds is None else self.seconds


def profile(options: Options, say: Say = lambda _: None) -> Summary:
    """Run a profile to its end; `say` hears of every event.

    Events are JSON objects with an `event`: 'plan' (what is ahead), 'trial' (one result), 'again'
    (a fresh process, and why), 'end' (the counts). Raises `InputError` with the worker's reason.
    """
    options.checked()
    free_store(options.out, resume=options.resume)
    until, resume = time.monotonic() + options.budget_s, options.resume
    retry_before = now() if options.retry else ""
    tally = _Tally(say)
    for _ in range(MOST_STARTS):
        before = tally.own
        outcome = _Worker(options, until, retry_before, resume=resume).run(tally)
        resume = True
        if outcome.code == BAD_INPUT:
            raise InputError(outcome.message or "the worker gave no reason")
        if outcome.code == DONE and outcome.summary is not None:
            done = replace(
                tally.summary, known=outcome.summary.known - before, late=outcome.summary.late
            )
            say({"event": "end", **counts(done)})
            return done
        tally.summary += _blamed(options.out, outcome, say)
    raise InputError(f"the worker ended {MOST_STARTS} times; see {options.out}/refusals.jsonl")


class _Tally:
    """Counts results as they are told, whatever becomes of the process that told them."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self.summary = Summary()

    @property
    def own(self) -> int:
        """Trials that got a line."""
        return self.summary.measured + self.summary.refused

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Count an event and pass it on."""
        if event["event"] == "trial" and event["seconds"] is None:
            self.summary += Summary(refused=1)
        elif event["event"] == "trial":
            self.summary += Summary(measured=1, noisy=int(NOISY in event["flags"]))
        self._say(event)


def counts(summary: Summary) -> dict[str, int]:
    """The counts of a session by name."""
    return {
        "measured": summary.measured,
        "noisy": summary.noisy,
        "refused": summary.refused,
        "known": summary.known,
        "late": summary.late,
    }


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How a worker ended: its code, its counts if it gave them, the last it said on stderr.

    `lines` of results came from it; a worker without any, not in a trial, cannot be helped.
    """

    code: int
    summary: Summary | None
    message: str
    hung: bool = False


def _blamed(folder: Path, outcome: _Outcome, say: Say) -> Summary:
    """Write the refusal of the trial that took the worker along; go on without it."""
    if outcome.code == AGAIN:
        say({"event": "again", "reason": "the device was lost"})
        return Summary()
    trial = running(folder)
    how = f"no end within {SILENCE_S:g} s" if outcome.hung else f"ended with {_ended(outcome.code)}"
    if trial is None:
        said = f": {outcome.message}" if outcome.message else ""
        raise InputError(f"the worker {how} before any trial{said}")
    kind = HUNG if outcome.hung else LOST
    refuse(folder, refusal(trial, _gpu_of(folder), kind, f"the process {how}"))
    (folder / "current.json").unlink(missing_ok=True)
    say({"event": "again", "reason": f"{trial}: {how}"})
    return Summary(refused=1)


def _ended(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"code {code}"


def _gpu_of(folder: Path) -> str:
    """The GPU of the last session there."""
    try:
        sessions = json.loads((folder / "environment.json").read_text())["sessions"]
        return str(sessions[-1]["environment"]["gpu"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return "unknown"


class _Worker:
    """The process that measures: started, listened to, ended where it falls silent."""

    def __init__(self, options: Options, until: float, retry_before: str, *, resume: bool) -> None:
        given = {
            "suite": options.suite,
            "out": str(options.out),
            "kernels": list(options.kernels),
            "points": options.points,
            "resume": resume,
            "retry_before": retry_before,
            "replay": None if options.replay is None else str(options.replay),
            "until": until,
            "parent": os.getpid(),
        }
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER, json.dumps(given)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._said: deque[str] = deque(maxlen=20)
        self._threads = [
            threading.Thread(target=self._listen, daemon=True),
            threading.Thread(target=self._overhear, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def run(self, say: Say) -> _Outcome:
        """Pass events on until the worker ends."""
        summary: Summary | None = None
        message = ""
        try:
            while True:
                try:
                    line = self._lines.get(timeout=SILENCE_S)
                except queue.Empty:
                    return self._outcome(summary, hung=True)
                if line is None:
                    return self._outcome(summary, message=message)
                event = _event(line)
                if event.get("event") == "end":
                    summary = Summary(**{k: event[k] for k in counts(Summary())})
                elif event.get("event") == "error":
                    message = str(event["message"])
                elif event:
                    say(event)
        finally:
            self._end()

    def _outcome(
        self, summary: Summary | None, *, message: str = "", hung: bool = False
    ) -> _Outcome:
        if hung:
            self._process.kill()
        code = self._process.wait()
        for thread in self._threads:
            thread.join(timeout=5)
        return _Outcome(code, summary, message or " ".join(list(self._said)[-1:]), hung)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _overhear(self) -> None:
        assert self._process.stderr is not None
        self._said.extend(line.strip() for line in self._process.stderr if line.strip())

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()


def _event(line: str) -> dict[str, Any]:
    """What a worker said; libraries that print to stdout are not listened to."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and "event" in found else {}


def line_of(event: Mapping[str, Any]) -> str:
    """An event as a line for people."""
    match event["event"]:
        case "plan":
            skipped = f", {event['skipped']} not meant for it" if event["skipped"] else ""
            return (
                f"{event['gpu']}: {event['trials']} trials at {event['points']} points{skipped}, "
                f"about {event['cost_s']:.0f} s"
            )
        case "trial":
            return f"[{event['number']}/{event['total']}] {event['trial']}: {result_of(event)}"
        case "again":
            return f"a fresh process: {event['reason']}"
        case "end":
            return (
                f"{event['measured']} measured ({event['noisy']} noisy), {event['refused']} "
                f"refused, {event['known']} known before, {event['late']} left for want of time"
            )
    return str(event.get("note", event))


def result_of(event: Mapping[str, Any]) -> str:
    """The time of a trial, or why there is none."""
    if event.get("seconds") is None:
        return f"refused ({event['kind']}): {event['reason']}"
    half = event["half_width_frac"]
    width = "" if half is None else f" +-{half:.1%}"
    notes = [event["launch"], *event["flags"]]
    tail = f" ({', '.join(filter(None, notes))})" if any(notes) else ""
    return f"{event['seconds'] * 1e6:.2f} us{width}{tail}"


def options_of(argv: Sequence[str]) -> Options:
    """Options from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m validate.profile", description="Profile the kernels on this GPU."
    )
    parser.add_argument("--suite", choices=SUITES, default=SUITES[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--kernel", action="append", default=[], metavar="NAME")
    parser.add_argument("--seconds", type=float, metavar="N", help="end by then")
    parser.add_argument("--points", type=int, metavar="N", help="at most so many points")
    parser.add_argument("--resume", action="store_true", help="go on in a folder with records")
    parser.add_argument("--retry", action="store_true", help="try refused trials again")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="answer from records, no GPU")
    given = parser.parse_args(list(argv))
    return Options(
        suite=given.suite,
        out=given.out,
        kernels=tuple(given.kernel),
        seconds=given.seconds,
        points=given.points,
        resume=given.resume,
        retry=given.retry,
        replay=given.replay,
    )


def main(argv: Sequence[str]) -> int:
    """The command line; errors a user can mend are one line on stderr."""
    try:
        options = options_of(argv)
        profile(options, lambda event: print(line_of(event), file=sys.stderr, flush=True))
    except InputError as error:
        print(f"validate.profile: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; --resume goes on", file=sys.stderr)
        return INTERRUPTED
    print(f"records in {options.out / 'records.jsonl'}", file=sys.stderr)
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
