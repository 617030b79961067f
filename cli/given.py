"""What a user gives beside the data: device files for its GPU names, and calibration files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from cli.quantity import shown
from hwmodels.errors import InputError

if TYPE_CHECKING:
    from hwmodels.calibration import Calibration

Calibrations: TypeAlias = Annotated[
    list[Path] | None,
    typer.Option(
        "--calibration", metavar="FILE", help="Use this calibration too; may repeat. It wins "
        "over a shipped one of the same device.",
    ),
]  # fmt: skip
Devices: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--device", "-d", metavar="GPU=DEVICE", help="What a GPU name of the data means: a "
        "device of the catalogue, or a TOML file; may repeat.",
    ),
]  # fmt: skip


def devices(given: Sequence[str] | None) -> dict[str, str]:
    """GPU names of the data with the device each means: an id, or the path of a readable file."""
    from hwmodels import catalog

    found: dict[str, str] = {}
    for text in given or ():
        name, separator, target = text.rpartition("=")
        if not separator or not name.strip() or not target.strip():
            raise InputError(
                f"--device {shown(text)}: is not GPU=DEVICE; give the data's name of the GPU and "
                "a device or a TOML file, e.g. --device 'My GPU=./my-gpu.toml'"
            )
        if name in found:
            raise InputError(f"--device {shown(name)} is given twice; name each GPU once")
        device = catalog.device(target.strip())
        is_file = target.strip().endswith(".toml") or "/" in target
        found[name] = target.strip() if is_file else device.id
    return found


def calibrations(
    files: Sequence[Path] | None, targets: Mapping[str, str]
) -> tuple[Calibration, ...] | None:
    """The shipped calibrations and those given, which win; None stands for the shipped ones.

    `targets` is what `devices` made: a calibration may be for one of these too.
    """
    if not files:
        return None
    from hwmodels import catalog
    from hwmodels.calibration import read_calibration, shipped

    known = {*catalog.device_ids(), *(catalog.device(t).id for t in targets.values())}
    given: dict[str, Calibration] = {}
    for file in files:
        calibration = read_calibration(file)
        device_id = calibration.device_id
        if device_id not in known:
            raise InputError(
                f"{shown(file, 200)}: calibrates '{shown(device_id)}', which is in no catalogue; "
                "give its file with --device GPU=FILE.toml, or another calibration"
            )
        if device_id in given:
            raise InputError(f"--calibration: two files calibrate {device_id}; give one a device")
        given[device_id] = calibration
    return (*(c for c in shipped() if c.device_id not in given), *given.values())
