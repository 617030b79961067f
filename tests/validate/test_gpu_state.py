"""What the driver says is recorded, and its silence too."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from validate.gpu_state import Monitor, State, reasons_of, state_of

SMI = """#!/bin/sh
case "$*" in
  *clocks_event_reasons*) {new} ;;
esac
case "$*" in
  *driver_version*) echo "580.95, 1980, 3201, 100.5, 40, 0x0" ;;
  *-lms*) echo "1755, 3201, 690.1, 66, 0x44"; exec sleep 20 ;;
esac
"""


@pytest.fixture()
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "nvidia-smi"


def script(path: Path, new: str) -> None:
    path.write_text(SMI.format(new=new))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize("new", [":", "echo not a valid field; exit 2"])
def test_the_state_under_load_is_the_last_line(smi: Path, new: str) -> None:
    script(smi, new)
    monitor = Monitor("0123-abc", 0)
    assert monitor.driver == "580.95"
    for _ in range(200):
        if monitor.state().power_w == 690.1:
            break
        time.sleep(0.02)
    assert monitor.state() == State(
        sm_clock_hz=1.755e9,
        memory_clock_hz=3.201e9,
        power_w=690.1,
        temperature_celsius=66.0,
        throttle="sw_power_cap+hw_thermal_slowdown",
    )
    monitor.close()


def test_without_a_driver_everything_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monitor = Monitor("", 0)
    assert monitor.driver == "unknown" and monitor.state() == State()
    monitor.close()


def test_idle_is_no_throttling() -> None:
    assert reasons_of("0x1") == "none" and reasons_of("0x9") == "hw_slowdown"
    assert state_of(["1"]) == State()
