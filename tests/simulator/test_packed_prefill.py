"""Passes over rows: what padding costs, what masks cost, and what lies in memory."""

from __future__ import annotations

import numpy as np
import pytest

from hwmodels import catalog
from hwmodels.errors import InfeasibleError, InputError
from simulator.packed_prefill import BLOCKS, DENSE, packed, padded
from simulator.planners.prefill import (
    APART,
    BY_LENGTH,
    PACKED,
    PADDED,
    plan_prefill,
)
from simulator.planners.prepacking import pack
from workloads.models.config import load_hf_config
from workloads.models.parameters import count_parameters

CFG = load_hf_config("examples/gpt2.json")
DEVICE = catalog.device("a100-sxm4-80gb")
HELD = np.array([1000, 600, 400, 300, 300, 200, 100, 100])


def test_one_prompt_is_the_same_padded_or_packed() -> None:
    one = np.array([512])
    alone, rows = padded(CFG, one), packed(CFG, pack(one), BLOCKS)
    assert alone.seconds(DEVICE) == pytest.approx(rows.seconds(DEVICE))
    assert alone.memory() == rows.memory()


def test_masks_and_padding_cost() -> None:
    found = pack(HELD)
    assert found.num_rows == 3
    whole, dense, blocks = padded(CFG, HELD), packed(CFG, found, DENSE), packed(CFG, found, BLOCKS)
    assert whole.num_tokens == 8000 and dense.num_tokens == blocks.num_tokens == 3000
    times = [one.seconds(DEVICE) for one in (whole, dense, blocks)]
    assert times[0] > times[1] > times[2]


def test_memory_by_hand() -> None:
    """GPT-2: 12 layers x 2 x 768 x 2 bytes of cache a token, 50,257 logits."""
    found = pack(HELD)
    rows = packed(CFG, found).memory()
    assert rows.weights == count_parameters(CFG).total * 2
    assert rows.cache == 3000 * 12 * 2 * 768 * 2
    assert rows.logits == len(HELD) * 50257 * 2
    assert rows.mask == 3 * 1000**2 * 2
    assert rows.total == rows.weights + rows.cache + rows.logits + rows.working + rows.mask
    every = packed(CFG, found, all_logits=True)
    assert every.memory().logits == 3000 * 50257 * 6
    assert every.seconds(DEVICE) > packed(CFG, found).seconds(DEVICE)


def test_ways_of_several_passes() -> None:
    plan = plan_prefill(HELD, CFG, DEVICE, num_prompts=4)
    assert [len(place) for place in plan.places] == [4, 4]
    tokens = {name: plan.way(name).num_tokens for name in (PADDED, BY_LENGTH, PACKED, APART)}
    assert tokens[PADDED] == 4 * 1000 + 4 * 300
    assert tokens[BY_LENGTH] == 4 * 300 + 4 * 1000
    assert tokens[PACKED] == tokens[APART] < tokens[PADDED]
    assert plan.num_rows >= plan.lower_rows and 0 <= plan.gap_frac < 1


def test_passes_hold_prompts() -> None:
    with pytest.raises(InputError, match="at least one prompt"):
        plan_prefill(HELD, CFG, DEVICE, num_prompts=0)
    with pytest.raises(InfeasibleError, match="prompt 1 of 1000 tokens fits no row of 900"):
        plan_prefill(HELD, CFG, DEVICE, num_prompts=4, room=900)


def test_states_of_scans_are_refused() -> None:
    with pytest.raises(InputError, match="attention alone"):
        padded(load_hf_config("examples/linear-llama3-1b.json"), HELD)
