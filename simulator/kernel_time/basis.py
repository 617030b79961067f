"""Where the constants of a kernel model come from on a device, and how sure they are.

A device without a calibration of its own borrows, in this order and never in silence:

    own           the device's calibration
    architecture  calibrations of the same architecture (name and compute-capability major)
    mean          the geometric mean over all calibrated devices
    nominal       the constants' start values, where nothing was ever fitted

A constant with a factor for the run's label (its kernel, its dtype) is taken from the donors that
have that factor; where none has, from the bases of all. The interval of a borrowed prediction is
wider: of 'mean', that of predicting each donor from the other architectures.
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
    FittedConstant,
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

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """The donors of one model's constants on one device; `scope` says how they are related.

    `hosts` are all calibrations of the model: what an eager launch costs is the timing method's,
    whatever the architecture.
    """

    model: KernelModel
    scope: str
    donors: tuple[ModelCalibration, ...]
    hosts: tuple[ModelCalibration, ...] = ()

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
        fitted = _having(self.donors, constant.name)
        if not fitted and constant is not HOST:
            return constant.start
        key = "|".join(labels.get(name, "") for name in constant.by)
        known = [f.value * f.factors[key] for f in fitted if key in f.factors]
        if not known and constant is HOST:
            known = [
                f.value * f.factors[key]
                for f in _having(self.hosts, constant.name)
                if key in f.factors
            ]
        values = known or [f.value for f in fitted] or [constant.start]
        return values[0] if len(values) == 1 else math.exp(fmean(map(math.log, values)))

    def knows(self, labels: Mapping[str, str]) -> bool:
        """Does some donor have a factor for every label that the run states?"""
        asked = sum(key is not None for key in _keys(self.model, labels).values())
        return any(_labels_known(self.model, d, labels) == asked for d in self.donors)

    def residuals(self, regime: str, *, known: bool = True) -> Residuals | None:
        """The residuals an interval is made of; None where nothing was fitted.

        A run with a label that no donor knows (`known=False`) is as uncertain as a new device.
        """
        if self.scope == NOMINAL:
            return None
        if self.scope == MEAN or not known:
            found = [d.transfer for d in self.donors if d.transfer is not None]
            if found:
                return _mixed(found)
        own = [d.residuals.get(regime, d.residuals[POOLED]) for d in self.donors]
        return _mixed(own)


def _having(donors: Sequence[ModelCalibration], name: str) -> list[FittedConstant]:
    return [d.constants[name] for d in donors if name in d.constants]


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


Identity = tuple[str, tuple[str, str]]


def _identity(device: Device) -> Identity:
    return device.id, kin(device)


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
    device_id, family = identity
    have = [c for c in calibrations if model.name in c.models]
    own = [c for c in have if c.device_id == device_id]
    same = [c for c in have if _kin_of(c.device_id) == family]
    for scope, found in ((OWN, own), (ARCHITECTURE, same), (MEAN, have)):
        if found:
            donors = tuple(c.models[model.name] for c in found)
            hosts = tuple(c.models[model.name] for c in have)
            return Basis(model=model, scope=scope, donors=donors, hosts=hosts)
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
