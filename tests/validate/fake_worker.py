"""Stands in for the process that measures: misbehaves as the file `script` in the folder says."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from tests.validate.fake_suite import record_of, trials
from validate.agenda import Item
from validate.profile import AGAIN, BAD_INPUT, counts
from validate.profile_worker import _say, tell
from validate.record import Record, Trial
from validate.session import session
from validate.timer import DeviceLost, ReplayTimer


class Misbehaving(ReplayTimer):
    def __init__(self, planned: list[Trial], script: list[str]) -> None:
        super().__init__([record_of(trial) for trial in planned])
        self._script = {planned[i].key: what for i, what in enumerate(script)}

    def measure(self, trial: Trial) -> Record:
        what = self._script.get(trial.key, "")
        if what == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif what == "exit":
            os._exit(3)
        elif what == "hang":
            time.sleep(60)
        elif what == "lose":
            raise DeviceLost("illegal memory access")
        return super().measure(trial)


def main(given: dict[str, object]) -> int:
    folder = Path(str(given["out"]))
    script = (folder / "script").read_text().split()
    if script == ["nothing"]:
        print("libcuda is missing", file=sys.stderr)
        return 1
    if script == ["refuse"]:
        tell({"event": "error", "message": "no CUDA GPU is visible"})
        return BAD_INPUT
    planned = trials(4)[: len(script)]
    print("a library talks on stdout", flush=True)
    done = session(
        [Item(trial, 1e-5, 1e-3) for trial in planned],
        Misbehaving(planned, script),
        folder,
        deadline_s=1e18,
        resume=bool(given["resume"]),
        say=_say,
    )
    tell({"event": "end", **counts(done)})
    return AGAIN if done.lost else 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
