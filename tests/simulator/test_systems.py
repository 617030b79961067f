"""Every modelled system: it can be asked, swept, timed, and says what it is."""

from __future__ import annotations

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.errors import InputError
from simulator.estimate import BOUND, estimate
from tests.simulator.test_estimate import small
from workloads import registry
from workloads.registry import DERIVED, NOT_YET, PROVED

MODELLED = [s for s in registry.systems() if s.op]
ATTENTION = ("attention", "sparse_attention", "kv_compression")
EXACT = (
    "flash_attention", "flash_attention_2", "block_sparse_fa", "hydragen", "bytetransformer",
    "fusemax", "prefix_grouper", "ntk_attention", "music_transformer",
    "lightning_attention_2", "lightning_attention_tnl", "gla", "deltanet", "lightnet", "hedgehog",
    "jrt", "longvq", "scatterformer", "vir", "state_tracking_lrnn", "aaren", "mamba_scan", "s4",
    "lssl", "convs5", "plstm", "s5_rl", "spacetime", "mamba_empirical", "hydra_bissm", "titans",
    "flashfftconv", "flashconv_h3", "flashbutterfly", "hyena_dna", "monarch_mixer", "sgconv",
    "orchid", "tcnca", "flashrnn", "languini_lstm", "spikegpt", "lmuformer",
)  # fmt: skip
"""Systems whose result is that of their definition to the last bit of exact arithmetic."""


@pytest.mark.parametrize("system", MODELLED, ids=lambda s: s.id)
def test_a_system_can_be_asked_on_every_rung(system: registry.System) -> None:
    op = small(registry.resolve(system.id))
    for device in ("h100-sxm", "a100-sxm4-80gb", "t4"):
        on = catalog.device(device)
        e = estimate(op.over(dtype="fp16") if hasattr(op, "dtype") else op, on=on)
        low, high = e.interval(80)
        assert 0 < low <= e.seconds <= high
        assert e.seconds >= estimate(e.op, on=on, rung=BOUND).lower_s * (1 - 1e-9)
    assert registry.system_status(system) in (PROVED, DERIVED)


@pytest.mark.parametrize("system", MODELLED, ids=lambda s: s.id)
def test_a_system_takes_arrays_of_batches(system: registry.System) -> None:
    name = registry.resolve(system.id)
    op, on = small(name), catalog.device("h100-sxm")
    known = registry.params(name)
    usual = [f for f in ("batch", "num_heads", "rows", "m") if f in known]
    field = (usual or [p.name for p in known.values() if p.required and p.kind == "size"])[0]
    start = getattr(op, field)
    many = estimate(op.over(**{field: start * np.array([1.0, 2.0, 8.0])}), on=on)
    one = [float(estimate(op.over(**{field: start * f}), on=on).seconds) for f in (1, 2, 8)]
    assert np.allclose(np.broadcast_to(many.seconds, 3), one, rtol=1e-9)


@pytest.mark.parametrize("family", ATTENTION)
def test_the_families_of_attention_are_all_modelled(family: str) -> None:
    found = [s for s in registry.systems() if s.family == family]
    assert found and not [s.id for s in found if registry.system_status(s) == NOT_YET]


def test_every_exact_algorithm_is_proved() -> None:
    status = {s.id: registry.system_status(s) for s in registry.systems()}
    assert [name for name in EXACT if status[name] != PROVED] == []


@pytest.mark.parametrize("system", MODELLED, ids=lambda s: s.id)
def test_a_preset_names_fields_the_op_has(system: registry.System) -> None:
    fields = registry.params(registry.resolve(system.id))
    assert set(system.preset) <= set(fields)
    for name, value in system.preset.items():
        assert fields[name].default == value and not fields[name].required


def test_a_field_no_system_has_is_refused() -> None:
    with pytest.raises(InputError, match="parameter"):
        registry.fields_meant("flash_attention_2", "keep_ratio_of_the_moon")
