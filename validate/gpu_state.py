"""Clocks, power, heat and throttling of a GPU while it works, from the driver; never required.

`pynvml` is asked where it can be imported, else `nvidia-smi` runs beside the profile and prints a
line several times a second, of which the last is read. Whatever neither tells is unknown.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

from validate.record import UNKNOWN

PERIOD_MILLI: Final = "200"
"""Thousandths of a second between two lines of nvidia-smi."""
REASONS: Final = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""The field's name since driver 535, and before."""
FIELDS: Final = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
NONE: Final = "none"

BITS: Final = {
    0x0001: "idle",
    0x0002: "application_clocks",
    0x0004: "sw_power_cap",
    0x0008: "hw_slowdown",
    0x0010: "sync_boost",
    0x0020: "sw_thermal_slowdown",
    0x0040: "hw_thermal_slowdown",
    0x0080: "hw_power_brake",
    0x0100: "display_clocks",
}
"""NVML's nvmlClocksEventReasons (NVIDIA Management Library reference)."""


@dataclass(frozen=True, slots=True)
class State:
    """The driver's word; None and 'unknown' where it said nothing."""

    sm_clock_hz: float | None = None
    memory_clock_hz: float | None = None
    power_w: float | None = None
    temperature_celsius: float | None = None
    throttle: str = UNKNOWN


def state_of(cells: Sequence[str]) -> State:
    """A line of nvidia-smi: MHz, MHz, W, degrees Celsius, and the bits of the reasons.

    >>> state_of(["1980", "3201", "693.25", "61", "0x0000000000000004"])
    State(sm_clock_hz=1980000000.0, memory_clock_hz=3201000000.0, power_w=693.25,
    temperature_celsius=61.0, throttle='sw_power_cap')
    >>> state_of(["[N/A]", "3201", "[N/A]", "61", "[N/A]"]).throttle
    'unknown'
    """
    if len(cells) != len(FIELDS) + 1:
        return State()
    sm, memory, power, heat = (_number(cell) for cell in cells[:-1])
    return State(
        sm_clock_hz=None if sm is None else sm * 1e6,
        memory_clock_hz=None if memory is None else memory * 1e6,
        power_w=power,
        temperature_celsius=heat,
        throttle=reasons_of(cells[-1]),
    )


def reasons_of(text: str) -> str:
    """The names of the bits, joined by '+'; 'none' where none is set but idleness.

    >>> reasons_of("0x0"), reasons_of("0x44"), reasons_of("?")
    ('none', 'sw_power_cap+hw_thermal_slowdown', 'unknown')
    """
    try:
        bits = int(text.strip(), 0)
    except ValueError:
        return UNKNOWN
    names = [name for bit, name in BITS.items() if bits & bit and name != "idle"]
    return "+".join(names) or NONE


def _number(cell: str) -> float | None:
    try:
        return float(cell.strip())
    except ValueError:
        return None


class Monitor:
    """Watches one GPU: its `uuid` tells it from others where the driver's numbers differ."""

    def __init__(self, uuid: str, index: int) -> None:
        name = uuid if not uuid or uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        self._gpu = name or str(index)
        self._last = State()
        self._nvml: Any = None
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self.driver = UNKNOWN
        if not self._open_nvml():
            self._open_smi()

    def state(self) -> State:
        """The last word."""
        if self._nvml is not None:
            with contextlib.suppress(Exception):  # NVML raises its own errors
                return self._from_nvml()
        return self._last

    def close(self) -> None:
        """End what runs beside the profile."""
        if self._process is None or self._reader is None:
            return
        self._process.kill()
        self._process.wait()
        self._reader.join(timeout=5)
        if self._process.stdout is not None and not self._reader.is_alive():
            self._process.stdout.close()

    def _open_nvml(self) -> bool:
        try:
            pynvml = import_module("pynvml")
            pynvml.nvmlInit()
            find = pynvml.nvmlDeviceGetHandleByUUID
            handle = find(self._gpu) if not self._gpu.isdigit() else (
                pynvml.nvmlDeviceGetHandleByIndex(int(self._gpu))
            )  # fmt: skip
            self.driver = str(pynvml.nvmlSystemGetDriverVersion())
        except Exception:  # not installed, or no driver: nvidia-smi is asked
            return False
        self._nvml = (pynvml, handle)
        return True

    def _from_nvml(self) -> State:
        nvml, handle = self._nvml
        return State(
            sm_clock_hz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM) * 1e6,
            memory_clock_hz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM) * 1e6,
            power_w=nvml.nvmlDeviceGetPowerUsage(handle) * 1e-3,
            temperature_celsius=float(
                nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
            ),
            throttle=reasons_of(str(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))),
        )

    def _open_smi(self) -> None:
        for reasons in REASONS:
            line = _smi(self._gpu, ["driver_version", *FIELDS, reasons])
            if line is None:
                continue
            driver, *cells = line
            self.driver, self._last = driver or UNKNOWN, state_of(cells)
            self._watch([*FIELDS, reasons])
            return

    def _watch(self, fields: Sequence[str]) -> None:
        command = [*_command(self._gpu, fields), "-lms", PERIOD_MILLI]
        try:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:
            return
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            self._last = state_of([cell.strip() for cell in line.split(",")])


def _command(gpu: str, fields: Sequence[str]) -> list[str]:
    query = f"--query-gpu={','.join(fields)}"
    return ["nvidia-smi", "-i", gpu, query, "--format=csv,noheader,nounits"]


def _smi(gpu: str, fields: Sequence[str]) -> list[str] | None:
    """The cells of one line; None where nvidia-smi is missing or knows a field not."""
    try:
        done = subprocess.run(
            _command(gpu, fields), capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    cells = [cell.strip() for cell in done.stdout.strip().split("\n")[0].split(",")]
    return cells if len(cells) == len(fields) else None
