"""One launch of a trial between the profiler's marks, for `validate.counters` to run under ncu."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from hwmodels.errors import InputError
from validate.record import Case, Trial

WARM_UPS = 2
"""Launches before the marks: compilation and allocation stay outside of them."""


def main(argv: Sequence[str]) -> int:
    """Run the trial that the argument names (JSON with `trial` and `launch`)."""
    given = json.loads(argv[0])
    trial = Trial(**{**given["trial"], "case": Case(**given["trial"]["case"])})
    os.environ.pop("TRITON_INTERPRET", None)  # before anything imports triton
    try:
        run(trial, given["launch"])
    except InputError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def run(trial: Trial, label: str) -> None:
    """Inputs, warm-up, and the one launch that is counted."""
    import torch

    from validate.agenda import named, suites
    from validate.cuda_timer import label_of, seed_of
    from validate.torch_gpu import open_gpu

    gpu = open_gpu()
    try:
        (spec,) = named(suites()[0], [trial.kernel])
        how = spec.implementation(trial.implementation)
        launches = how.launches(trial.case, gpu.arch)
        if not launches:
            raise InputError("no tile configuration is shipped for this GPU")
        launch = next((x for x in launches if label_of(x) == label), launches[0])
        inputs = gpu.inputs(spec, trial.case, seed_of(f"{spec.name} {trial.case.key}"))
        launched = how.prepare(trial.case, inputs, launch)
        for _ in range(WARM_UPS):
            gpu.outputs(launched)
        torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
        gpu.outputs(launched)
        torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]
    finally:
        gpu.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
