"""The requests of a step: what is asked is freed, and the peaks are those of the closed form."""

from __future__ import annotations

import pytest

from hwmodels.errors import InputError
from simulator.memory_timeline import KEPT
from simulator.planners.layer_requests import BUFFER, step_requests
from simulator.planners.storage import Tensors
from workloads.models.activations import layer_bytes
from workloads.models.config import load_hf_config
from workloads.models.transformer import train_step
from workloads.plan import Plan, Recompute

MODELS = ("gpt2", "llama3-8b", "qwen3-30b-a3b", "gemma-2-9b", "deepseek-v3")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize("swap", [False, True])
def test_everything_is_freed_and_passes_follow(
    model: str, recompute: Recompute, swap: bool
) -> None:
    step = train_step(load_hf_config(f"examples/{model}.json"), len_seq=512, global_batch=1)
    found = step_requests(step, plan=Plan(recompute=recompute, tp=2), num_layers=5, swap=swap)
    left = float(found.timeline.live_bytes[-1])
    buffers = sum(e.num_bytes for e in found.timeline.events if e.kind == BUFFER)
    assert left == pytest.approx(buffers, abs=1e-3)
    assert len(found.passes) == 10
    ends = [0, *(end for _, end in found.passes)]
    assert all(a <= b for (b, _), a in zip(found.passes, ends, strict=False))


@pytest.mark.parametrize("model", MODELS)
def test_kept_tensors_are_those_of_the_layers(model: str) -> None:
    cfg = load_hf_config(f"examples/{model}.json")
    step = train_step(cfg, len_seq=512, global_batch=1)
    found = step_requests(step, plan=Plan(), num_layers=4)
    kinds = ["moe" if cfg.moe is not None and k in cfg.moe.layers else "dense" for k in range(4)]
    total = sum(float(layer_bytes(cfg, batch=1, len_seq=512, kind=kind)) for kind in kinds)
    assert found.timeline.peak_of(KEPT) == pytest.approx(total)


def test_swapping_leaves_two_buffers_and_what_passes_through() -> None:
    step = train_step(load_hf_config("examples/gpt2.json"), len_seq=1024, global_batch=1)
    short, long_ = (
        Tensors.of(step_requests(step, plan=Plan(), num_layers=n, swap=True).timeline).live_bytes
        for n in (4, 12)
    )
    assert short == long_
    kept = Tensors.of(step_requests(step, plan=Plan(), num_layers=12).timeline).live_bytes
    layer = float(layer_bytes(step.config, batch=1, len_seq=1024))
    assert kept - long_ == pytest.approx(10 * layer, rel=0.02)


def test_recomputation_keeps_less_but_works_more() -> None:
    step = train_step(load_hf_config("examples/llama3-8b.json"), len_seq=1024, global_batch=1)
    none, full = (
        step_requests(step, plan=Plan(recompute=r), num_layers=8).timeline
        for r in (Recompute.NONE, Recompute.FULL)
    )
    assert full.peak_bytes < none.peak_bytes and len(full.events) > len(none.events)


def test_no_layers_is_refused() -> None:
    step = train_step(load_hf_config("examples/gpt2.json"), len_seq=64, global_batch=1)
    with pytest.raises(InputError, match="at least one"):
        step_requests(step, plan=Plan(), num_layers=0)
