"""Claims of MEMO, SeCO and SpaCO, MKOR: by hand, in general, and given up where incomplete."""

from __future__ import annotations

from typing import Any

import pytest

from hwmodels import catalog
from validate.claims import memory
from validate.claims.claim import Claim, NotModelledError
from validate.claims.evaluate import NOT_MODELLED, OFF, evaluate
from validate.claims.models import model_named

MEMO = {"gpu": "A800-80GB", "n_gpus": 8, "cpu_mem": "2TB", "pcie": "32GB/s shared Gen4",
        "model": "GPT-7B (32 layers, h 4096, ffn 16384)"}  # fmt: skip


def claim(
    system: str, quantity: str, kind: str = "ratio", unit: str = "x", **setting: Any
) -> Claim:
    published = setting.pop("published", None)
    range_is = setting.pop("range_is", "")
    return Claim(id=system, family="memory_planning", quantity=quantity, unit=unit, kind=kind,
                 published=published, setting=setting, range_is=range_is)  # fmt: skip


# ---- MEMO ----------------------------------------------------------------------------------


def test_the_share_to_swap_by_hand() -> None:
    run = memory.memo_run(claim("memo", "MFU", **MEMO))
    seq = 2**20
    gib = 2.0**30
    assert run.swapped_bytes(seq, 1.0) == 16 * gib  # 16 s h 2 bytes over 8 GPUs
    assert run.swapped_bytes(seq, 0.0) == 2 * gib
    host = 2e12 / 8 / 30  # the last two layers stay
    assert run.swap_frac(seq) == pytest.approx((host - 2 * gib) / (14 * gib))
    assert run.link_bytes_per_s == pytest.approx(32e9 / 2 * 0.8)


def test_short_sequences_swap_less_and_nothing_exceeds_its_bounds() -> None:
    run = memory.memo_run(claim("memo", "MFU", **MEMO))
    fracs = [run.swap_frac(seq) for seq in (8192, 65536, 262144, 2**20, 2**22)]
    assert all(0 <= f <= 1 for f in fracs)
    assert fracs[0] < fracs[1] < fracs[2] == 1 > fracs[3] > fracs[4]


def test_mfu_counts_the_causal_half_once() -> None:
    run = memory.memo_run(claim("memo", "MFU", **MEMO))
    seq = 2**20
    flops = 6 * seq * (12 * 32 * 4096**2 + 50257 * 4096) + 6 * 32 * 4096 * seq**2
    assert run.mfu(seq) == pytest.approx(flops / (run.step_s(seq) * 8 * 312e12))
    assert 0.4 < run.mfu(seq) < 0.6
    one = claim("memo", "MFU 7B, 1M tokens", "mfu", "%", **MEMO)
    assert memory.evaluate_memo(one) == pytest.approx(100 * run.mfu(seq))


def test_a_faster_link_hides_copies_earlier() -> None:
    ask = lambda pcie: memory.evaluate_memo(  # noqa: E731
        claim("memo", "offload fully overlaps beyond", unit="tokens", model="GPT-7B", pcie=pcie)
    )
    shared, alone, fast = (ask(p) for p in ("32GB/s shared", "32GB/s", "320GB/s"))
    assert isinstance(shared, float) and shared % 65536 == 0
    assert shared > alone >= fast == 65536


def test_attention_takes_more_of_longer_sequences() -> None:
    shares = [
        memory.evaluate_memo(claim("memo", f"FlashAttention share of layer fwd at {n}K", unit="%",
                                   tp=8))
        for n in (64, 256, 1024)
    ]  # fmt: skip
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] < 100


def test_skeletal_activations_are_sixteen_tensors() -> None:
    ask = lambda unit, **more: memory.evaluate_memo(  # noqa: E731
        claim("memo", "skeletal activations", "memory", unit, **more)
    )
    assert ask("bsh") == 16
    assert ask("GiB", model="GPT-7B", seq=2**20) == 4096
    assert ask("GiB", model="GPT-13B", seq=2**20) == 16 * 40 * 5120 * 2 * 2**20 / 2**30


@pytest.mark.parametrize(
    ("quantity", "setting", "reason"),
    [
        ("average MFU", {}, "average"),
        ("MFU 7B", {}, "no seq"),
        ("MFU 9B", {"seq": 2**20, "model": "GPT-9B"}, "GPT of 9b"),
        ("training loss", {}, "no rule"),
    ],
)
def test_memo_gives_up_what_is_open(quantity: str, setting: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotModelledError, match=reason):
        memory.evaluate_memo(claim("memo", quantity, **setting))


# ---- SeCO and SpaCO ------------------------------------------------------------------------


def test_the_longest_sequences_by_hand() -> None:
    llama, on = model_named("llama-3-8b"), catalog.device("rtx-3090")
    kept = 32 * (2 * (4 * 4096 + 2 * 1024 + 2 * 4096 + 3 * 14336) + 4 * 32)
    assert memory.graph_bytes(llama, 1) == kept + 12 * 128256
    room = on.hbm.capacity_bytes - 2 * 8030261248
    assert 1024 < room / memory.graph_bytes(llama, 1) < 2048
    chunked = (room - memory.graph_bytes(llama, 512)) / (2 * 131072)
    assert 16384 < chunked < 32768
    one = claim("seco_spaco", "max sequence 8B LoRA on one GPU", "memory", "tokens",
                gpu="RTX 3090-24GB", model="LLaMA3-8B", method="LoRA")  # fmt: skip
    assert memory.evaluate_seco_spaco(one) == (1024, 16384)


def test_more_memory_and_smaller_chunks_hold_longer_sequences() -> None:
    llama = model_named("llama-3-8b")
    small, large = catalog.device("rtx-3090"), catalog.device("a100-sxm4-80gb")
    for system in (memory.WHOLE, memory.SECO):
        assert memory.longest_sequence(llama, large, system) > memory.longest_sequence(
            llama, small, system
        )
    longest = [memory.longest_sequence(llama, small, memory.SECO, c) for c in (256, 1024, 4096)]
    assert longest == sorted(longest, reverse=True)
    assert memory.longest_sequence(llama, catalog.device("p4"), memory.WHOLE) == 0


def test_running_fewer_chunks_back_is_faster_and_all_of_them_is_seco() -> None:
    ask = lambda t: memory.evaluate_seco_spaco(  # noqa: E731
        claim("seco_spaco", "SpaCO vs SeCO speed", "speedup", gpu="RTX 3090", seq=8192, t=t)
    )
    gains = [ask(t) for t in (16, 8, 1)]
    assert gains[0] == pytest.approx(1) and gains == sorted(gains)


def test_full_training_and_quality_are_given_up() -> None:
    one = claim("seco_spaco", "max sequence", "memory", gpu="RTX 3090", method="full")
    with pytest.raises(NotModelledError, match="optimizer states"):
        memory.evaluate_seco_spaco(one)
    with pytest.raises(NotModelledError, match="quality"):
        memory.evaluate_seco_spaco(claim("seco_spaco", "LongBench", "quality", gpu="RTX 3090"))


# ---- MKOR ----------------------------------------------------------------------------------

ORDERS = {"compute": "O(d^2)", "memory": "O(2d^2/2)", "comm": "O(d)",
          "kfac": ["O(d^3)", "O(4d^2)", "O(4d^2)"],
          "sngd": ["O(b^3)", "O(2bd+b^2)", "O(2bd+b^2)"]}  # fmt: skip


def test_the_orders_are_confirmed() -> None:
    assert (
        memory.evaluate_mkor(claim("mkor", "complexity", "complexity", **ORDERS)) == "see setting"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"compute": "O(d^3)"}, "mkor compute"),
        ({"comm": "O(d^2)"}, "mkor comm"),
        ({"kfac": ["O(d^2)"]}, "kfac compute"),
        ({"sngd": ["O(b^3)", "O(2bd)"]}, "sngd memory"),
    ],
)
def test_other_orders_are_refuted(changes: dict[str, Any], said: str) -> None:
    one = claim("mkor", "complexity", "complexity", published="see setting", **ORDERS | changes)
    verdict = evaluate(one)
    assert verdict.status == OFF and said in str(verdict.predicted)


def test_bytes_of_a_layer() -> None:
    ask = lambda quantity: memory.evaluate_mkor(  # noqa: E731
        claim("mkor", quantity, "memory", "bytes", d=1024)
    )
    assert ask("state") == 2 * 2 * 1024**2 and ask("communication") == 2 * 2 * 1024


def test_speedups_to_a_quality_are_given_up() -> None:
    verdict = evaluate(claim("mkor", "speedup BERT-Large vs LAMB", "speedup", gpu="A100"))
    assert verdict.status == NOT_MODELLED and "quality" in verdict.reason
    with pytest.raises(NotModelledError, match="no order"):
        memory.evaluate_mkor(claim("mkor", "complexity", "complexity"))
