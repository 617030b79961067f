"""Starts a replayed session again and again and kills it at random moments: COUNT kills, SEED.

Run as a program of its own, so that nothing but the session is in the processes that die.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from tests.validate.fake_suite import record_of, trials
from validate.agenda import Item
from validate.record import Record, Trial
from validate.session import session
from validate.timer import ReplayTimer, Unmeasured

REFUSED_EVERY = 7


class Slow:
    """A replay that takes its time, and refuses every seventh trial."""

    def __init__(self, planned: list[Trial]) -> None:
        self._replay = ReplayTimer([record_of(trial) for trial in planned])
        self._refused = {trial.key for trial in planned[::REFUSED_EVERY]}
        self.environment = self._replay.environment

    def measure(self, trial: Trial) -> Record:
        time.sleep(0.0005)
        if trial.key in self._refused:
            raise Unmeasured("wrong", "relative error 0.3")
        return self._replay.measure(trial)


def main(folder: Path, count: int, seed: int) -> None:
    planned = trials(110)
    timer, plan = Slow(planned), [Item(trial, 1e-5, 1e-3) for trial in planned]
    rng = random.Random(seed)
    kills = 0
    while True:
        child = os.fork()
        if child == 0:
            session(plan, timer, folder, deadline_s=1e18, resume=True)
            os._exit(0)
        if kills < count:
            time.sleep(rng.uniform(0.0, 0.012))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
        elif kills >= count or status != 0:
            print(kills, status)
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
