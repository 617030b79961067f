"""The FSDP replay: states and logits by hand, what each switch does, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hwmodels.errors import InputError
from simulator.fsdp_memory import LOGITS, FsdpTrainer, fsdp_timeline
from simulator.memory_timeline import GRADIENTS, KEPT, OPTIMIZER, WEIGHTS, Timeline
from workloads.models.config import load_hf_config
from workloads.models.parameters import count_parameters
from workloads.plan import Plan, Recompute

LLAMA = load_hf_config("examples/llama3-8b.json")
SHORT = replace(LLAMA, num_layers=4)
SELECTIVE = Plan(dp=8, zero_stage=3, micro_batch=2, recompute=Recompute.SELECTIVE)
TOKENS = 2 * 8192


def line(plan: Plan = SELECTIVE, **switches: bool) -> Timeline:
    return fsdp_timeline(SHORT, len_seq=8192, plan=plan, trainer=FsdpTrainer(**switches))


def test_states_are_sixteen_bytes_a_parameter_sharded() -> None:
    found = line(replace(SELECTIVE, dp=64))
    shard = count_parameters(SHORT).total / 64
    assert found.peak_of(OPTIMIZER) == pytest.approx(8 * shard, rel=1e-5)
    assert found.peak_of(WEIGHTS) == pytest.approx(4 * shard, rel=1e-5)
    last = {e.name: e for e in found.events if e.kind == GRADIENTS and e.num_bytes > 0}
    kept = sum(e.num_bytes for name, e in last.items() if name in [(GRADIENTS, u)
               for u in range(-1, 4)])  # fmt: skip
    assert kept == pytest.approx(4 * shard, rel=1e-5)


def test_kept_activations_by_hand() -> None:
    """Input, q, v, w1, attention with its logsumexp; eager code the last product too."""
    h, kv, ffn, heads = 4096, 1024, 14336, 32
    compiled = TOKENS * (2 * (3 * h + kv + ffn) + 4 * heads)
    last = TOKENS * 2 * h  # the fourth layer's output, the next layer's input
    assert line().peak_of(KEPT) == 4 * compiled + last
    assert line(compiled=False).peak_of(KEPT) == 4 * (compiled + TOKENS * 2 * h) + last
    full = line(replace(SELECTIVE, recompute=Recompute.FULL))
    assert full.peak_of(KEPT) == 5 * TOKENS * 2 * h


def test_logits_of_the_three_losses() -> None:
    entries = TOKENS * LLAMA.vocab_size
    assert line().peak_of(LOGITS) == 12 * entries
    assert line(compiled_loss=True).peak_of(LOGITS) == 4 * entries
    split = line(replace(SELECTIVE, tp=8, dp=1))
    assert split.peak_of(LOGITS) == 16 * entries / 8


def test_the_allocator_keeps_the_logits_that_it_cannot_use_again() -> None:
    """The 16-bit logits are dead at the loss's peak; their block fits no fp32 tensor."""
    found = line()
    cache = found.replayed()
    assert cache.peak_reserved_bytes - found.peak_bytes > 2 * TOKENS * LLAMA.vocab_size


def test_eight_bit_products_and_asynchronous_exchange_hold_less_live() -> None:
    assert line(fp8=True).peak_bytes < line().peak_bytes
    split = replace(SELECTIVE, tp=8, dp=1, recompute=Recompute.FULL)
    assert line(split, async_tp=True).peak_bytes <= line(split).peak_bytes


def test_everything_but_states_and_gradients_is_freed() -> None:
    found = line()
    states = 16 * count_parameters(SHORT).total / 8
    assert found.live_bytes[-1] == pytest.approx(states + 32 * 2**20, rel=1e-5)


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        (replace(SELECTIVE, pp=2), "without a pipeline"),
        (replace(SELECTIVE, zero_stage=1), "ZeRO 3"),
        (replace(SELECTIVE, recompute=Recompute.NONE), "selective and full"),
    ],
)
def test_plans_it_does_not_replay_are_refused(plan: Plan, match: str) -> None:
    with pytest.raises(InputError, match=match):
        line(plan)


def test_models_it_does_not_replay_are_refused() -> None:
    gpt2 = load_hf_config("examples/gpt2.json")
    with pytest.raises(InputError, match="gated"):
        fsdp_timeline(gpt2, len_seq=128, plan=SELECTIVE, trainer=FsdpTrainer())
