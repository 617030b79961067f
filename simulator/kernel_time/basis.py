"""Where the constants of a kernel model come from on a device, and how sure they are.

A device without a calibration of its own borrows, in this order and never in silence:

    own           the device's calibration
    architecture  calibrations of the same architecture (name and compute-capability major); of
                  these, where there are any, those of the same chip at the same power: boards
                  that differ in their memory only
    mean          the geometric mean over all calibrated devices
    nominal       the constants' start values, where nothing was ever fitted

A constant with a factor for the run's label (its kernel, its dtype) is taken from the donors that
have that factor; where none has, as the donors' usual kernel has it. The interval of a borrowed
prediction is wider: of 'mean', that of predicting each donor from the other architectures.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import Final, TypeVar

from hwmodels import catalog
from hwmodels.calibration import (
    POOLED,
    Calibration,
    ModelCalibration,
    Residuals,
    shipped,
)
from hwmodels.device import Device
from simulator.kernel_time.constants import Constant
from simulator.kernel_time.model import HOST, KernelModel

OWN, ARCHITECTURE, MEAN, NOMINAL = "own", "architecture", "mean", "nominal"
NOMINAL_Q80: Final = math.log(2.0)
"""Half width of the 80 % interval where no constant was ever fitted: a factor of two."""
NOMINAL_Q90: Final = math.log(3.0)

UNLEARNED: Final = "unidentified"
"""Status of a constant that a device's rows could not tell."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """The donors of one model's constants on one device; `scope` says how they are related.

    `peers` are all calibrations of the model: what an eager launch costs is the timing method's,
    whatever the architecture. `instruction` is the kind of the device's matrix instruction.
    """

    model: KernelModel
    scope: str
    donors: tuple[ModelCalibration, ...]
    peers: tuple[ModelCalibration, ...] = ()
    instruction: str = ""

    @property
    def calibrated(self) -> bool:
        """Was anything fitted?"""
        return self.scope != NOMINAL

    def describe(self) -> str:
        """The provenance in a line."""
        names = ", ".join(d.device_id for d in self.donors)
        rows = sum(d.num_rows for d in self.donors)
        return {
            OWN: f"calibration of {names}: {rows} published timings",
            ARCHITECTURE: f"borrowed from {names}: same architecture, {rows} published timings",
            MEAN: f"borrowed: geometric mean of {names}; no calibration of this architecture",
            NOMINAL: "nominal constants: this kernel family was never calibrated",
        }[self.scope]

    def constants(self, labels: Mapping[str, str]) -> dict[str, float]:
        """Every constant of the model for a run with those labels."""
        return {c.name: self._value(c, labels) for c in self.model.all_constants()}

    def narrowed(self, labels: Mapping[str, str]) -> Basis:
        """Of several donors, those that know most of the run's labels."""
        if len(self.donors) <= 1:
            return self
        known = [_labels_known(self.model, d, labels) for d in self.donors]
        donors = tuple(d for d, k in zip(self.donors, known, strict=True) if k == max(known))
        return dataclasses.replace(self, donors=donors)

    def _value(self, constant: Constant, labels: Mapping[str, str]) -> float:
        """The geometric mean over the donors that know the labels, else over all of them."""
        donors = self._donors_of(constant)
        if constant.unlearned is not None:
            donors = [d for d in donors if _learned(d, constant)]
            if self.donors and not donors:
                return constant.unlearned
        asked = [_labelled(d, constant, labels) for d in donors]
        known = [value for value in asked if value is not None]
        if not known and constant is HOST:
            known = [v for d in self.peers if (v := _labelled(d, constant, labels)) is not None]
        values = known or [_unlabelled(d, constant, labels) for d in donors] or [constant.start]
        mean = values[0] if len(values) == 1 else math.exp(fmean(map(math.log, values)))
        return min(max(mean, constant.low), constant.high)

    def _donors_of(self, constant: Constant) -> list[ModelCalibration]:
        """Those that hold the constant; of several, those with the device's matrix instruction.

        Of a constant that is lent, the device itself where it learned it, or else all that did,
        whatever their architecture.
        """
        if constant.lent:
            own = [d for d in self.donors if self.scope == OWN and _learned(d, constant)]
            return own or [d for d in self.peers if _learned(d, constant)]
        if self.scope == MEAN and constant.by_instruction:
            same = [d for d in self.peers if _instruction_of(d.device_id) == self.instruction]
            if found := [d for d in same if constant.name in d.constants]:
                return found
        return [d for d in self.donors if constant.name in d.constants]

    def knows(self, labels: Mapping[str, str]) -> bool:
        """Does some donor have a factor for every label that the run states?"""
        asked = sum(key is not None for key in _keys(self.model, labels).values())
        return any(_labels_known(self.model, d, labels) == asked for d in self.donors)

    def residuals(self, regime: str, *, kernel: str = "", known: bool = True) -> Residuals | None:
        """The residuals an interval is made of; None where nothing speaks of this device.

        The narrowest group that had rows enough: that kernel in that regime, that kernel, that
        regime, all rows. A run with a label that no donor knows (`known=False`) is as uncertain as
        a new device.
        """
        if self.scope == NOMINAL:
            return None
        if self.scope == MEAN or not known:
            found = [d.transfer for d in self.donors if d.transfer is not None]
            return _mixed(found) if found else None  # one architecture alone says nothing of others
        groups = [*residual_groups(kernel, regime), POOLED]
        return _mixed([
            next(d.residuals[group] for group in groups if group in d.residuals)
            for d in self.donors
        ])  # fmt: skip


def _learned(donor: ModelCalibration, constant: Constant) -> bool:
    """Could the donor's rows tell the constant?"""
    fitted = donor.constants.get(constant.name)
    return fitted is not None and fitted.status != UNLEARNED


def _labelled(
    donor: ModelCalibration, constant: Constant, labels: Mapping[str, str]
) -> float | None:
    """The donor's value under exactly the run's labels; its base for a constant without any."""
    if constant.name not in donor.constants:
        return None
    fitted = donor.constants[constant.name]
    if not constant.by:
        return fitted.value
    factor = fitted.factors.get("|".join(labels.get(name, "") for name in constant.by))
    return None if factor is None else fitted.value * factor


def _unlabelled(donor: ModelCalibration, constant: Constant, labels: Mapping[str, str]) -> float:
    """The donor's value for a run it never saw: its kernel in other formats, the usual kernel,
    the base.
    """
    fitted = donor.constants[constant.name]
    for kernel in (labels.get("kernel", ""), donor.usual_kernel):
        exact = _labelled(donor, constant, {**labels, "kernel": kernel})
        if exact is not None:
            return exact
        like = [f for key, f in fitted.factors.items() if key.split("|")[0] == kernel]
        if kernel and like:
            return fitted.value * math.exp(fmean(map(math.log, like)))
    return fitted.value


@lru_cache(maxsize=256)
def _instruction_of(device_id: str) -> str:
    """The matrix instruction of a catalogued device; '' for others."""
    return instruction(catalog.device(device_id)) if device_id in catalog.device_ids() else ""


def instruction(device: Device) -> str:
    """The kind of matrix instruction kernels of a device are written with.

    NVIDIA's PTX ISA: warp-wide mma.sync (Volta to Ada, GeForce and RTX Blackwell), wgmma (Hopper),
    tcgen05 (data-centre Blackwell); none before Volta.

    >>> [instruction(catalog.device(d)) for d in ("a100-sxm4-80gb", "rtx-5090", "h100-sxm", "p4")]
    ['mma.sync', 'mma.sync', 'wgmma', '']
    """
    major = (device.compute_capability or "").split(".")[0]
    return {"7": "mma.sync", "8": "mma.sync", "12": "mma.sync", "9": "wgmma", "10": "tcgen05"}.get(
        major, ""
    )


def _keys(model: KernelModel, labels: Mapping[str, str]) -> dict[str, str | None]:
    """The factor key of every constant that has labels; None where the run leaves one open."""
    keys: dict[str, str | None] = {}
    for constant in model.constants:
        values = [labels.get(name, "") for name in constant.by]
        if values:
            keys[constant.name] = "|".join(values) if all(values) else None
    return keys


def _labels_known(
    model: KernelModel, donor: ModelCalibration, labels: Mapping[str, str]
) -> int:  # fmt: skip
    """How many of the run's labels the donor has a factor for."""
    return sum(
        name in donor.constants and key in donor.constants[name].factors
        for name, key in _keys(model, labels).items()
    )


def residual_groups(kernel: str, regime: str) -> tuple[str, ...]:
    """The groups whose residuals may stand for a run, narrowest first.

    >>> residual_groups("fa3", "hbm")
    ('kernel fa3, hbm', 'kernel fa3', 'hbm')
    """
    return (f"kernel {kernel}, {regime}", f"kernel {kernel}", regime) if kernel else (regime,)


def _mixed(found: Sequence[Residuals]) -> Residuals:
    """One set of residuals from several donors: their means, quantile by quantile."""
    if len(found) == 1:
        return found[0]
    return Residuals(
        num_rows=sum(r.num_rows for r in found),
        q80=fmean(r.q80 for r in found),
        q90=fmean(r.q90 for r in found),
        quantiles=tuple(fmean(q) for q in zip(*(r.quantiles for r in found), strict=True)),
    )


def basis(
    device: Device, model: KernelModel, calibrations: Sequence[Calibration] | None = None
) -> Basis:
    """The donors for `model` on `device` among the calibrations (the shipped ones by default)."""
    if calibrations is None:
        return _shipped_basis(_identity(device), model)
    return _find(_identity(device), model, calibrations)


Chip = tuple[str, int, float, float | None]
Identity = tuple[str, tuple[str, str], str, Chip]


def _identity(device: Device) -> Identity:
    return device.id, kin(device), instruction(device), _chip(device)


def _chip(device: Device) -> Chip:
    """What two boards with the same compute share: architecture, SMs, clock and power limit."""
    return device.architecture, device.num_sms, device.clock_hz, device.tdp_w


def kin(device: Device) -> tuple[str, str]:
    """What makes two devices the same architecture: its name and the capability's major number.

    >>> kin(catalog.device("h200-sxm")) == kin(catalog.device("h100-sxm"))
    True
    >>> kin(catalog.device("rtx-pro-6000-blackwell-server")) == kin(catalog.device("b200-sxm"))
    False
    """
    return device.architecture.split()[0], (device.compute_capability or "").split(".")[0]


@lru_cache(maxsize=1024)
def _shipped_basis(identity: Identity, model: KernelModel) -> Basis:
    return _find(identity, model, shipped())


def _find(identity: Identity, model: KernelModel, calibrations: Sequence[Calibration]) -> Basis:
    device_id, family, kind, chip = identity
    have = [c for c in calibrations if model.name in c.models]
    own = [c for c in have if c.device_id == device_id]
    same = [c for c in have if _kin_of(c.device_id) == family]
    twins = [c for c in same if _chip(catalog.device(c.device_id)) == chip]
    for scope, found in ((OWN, own), (ARCHITECTURE, twins or same), (MEAN, have)):
        if found:
            donors = tuple(c.models[model.name] for c in found)
            peers = tuple(c.models[model.name] for c in have)
            return Basis(model=model, scope=scope, donors=donors, peers=peers, instruction=kind)
    return Basis(model=model, scope=NOMINAL, donors=())


@lru_cache(maxsize=256)
def _kin_of(device_id: str) -> tuple[str, str] | None:
    """None for a device that no catalogue holds (a user's spec file)."""
    return kin(catalog.device(device_id)) if device_id in catalog.device_ids() else None


def remembered(make: Callable[[Device], T]) -> Callable[[Device], T]:
    """Cache by the identity of a device: hashing all its figures would cost more than most uses."""
    kept: dict[int, tuple[Device, T]] = {}

    def find(device: Device) -> T:
        entry = kept.get(id(device))
        if entry is not None and entry[0] is device:
            return entry[1]
        if len(kept) > 256:
            kept.clear()
        made = make(device)
        kept[id(device)] = (device, made)
        return made

    return find
