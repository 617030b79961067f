"""What a board's power limit leaves of a peak rate that its clock alone would allow."""

from __future__ import annotations

from hwmodels.device import Device
from workloads.numeric import Num


def sustained_frac(device: Device, peak_flops_per_s: Num, energy_j_per_flop: float) -> Num:
    """Share of a peak rate that the board can feed: smoothly min(1, limit / wanted power).

        w = peak energy / limit,   share = (1 + w^4)^(-1/4)

    1 for a device that states no limit. The rate it leaves, peak times share, grows with the peak.

    >>> from hwmodels import catalog
    >>> t4, v100 = catalog.device("t4"), catalog.device("v100-pcie-32gb")
    >>> round(sustained_frac(t4, 8.1e12, 2e-11), 2), round(sustained_frac(v100, 14e12, 1e-11), 2)
    (0.43, 0.98)
    """
    if device.tdp_w is None:
        return 1.0
    wanted = peak_flops_per_s * energy_j_per_flop / device.tdp_w
    return (1 + wanted**4) ** -0.25
