"""Claims of long convolutions on settings of our own."""

from __future__ import annotations

import pytest

from validate.claims import convolution as module
from validate.claims.claim import Claim, Value
from validate.claims.evaluate import NOT_MODELLED, evaluate, evaluator
from workloads.ops.flash_fft_conv import FlashFFTConv

TABLE = {"gpu": "H100-SXM", "dtype": "fp16 input, fp32 kernel", "batch": 16, "hidden": 64,
         "seq": 2048, "op": "gated conv forward"}  # fmt: skip


def claim(system: str, quantity: str, **setting: object) -> Claim:
    return Claim(
        id=system, family="convolution", quantity=quantity, unit="x", kind="latency",
        published=1.0, setting=setting,
    )  # fmt: skip


def run(system: str, quantity: str, **setting: object) -> Value:
    found = evaluator(system)
    assert found is not None
    return found(claim(system, quantity, **setting))


def number(system: str, quantity: str, **setting: object) -> float:
    value = run(system, quantity, **setting)
    assert isinstance(value, float)
    return value


def test_a_speedup_is_one_time_over_the_other() -> None:
    fused = number("flashfftconv", "FlashFFTConv time", **TABLE)
    library = number("flashfftconv", "time", **TABLE, impl="pytorch")
    assert number("flashfftconv", "speedup", **TABLE) == pytest.approx(library / fused)
    assert 2 < library / fused < 15


def test_a_time_measured_on_fewer_rows_is_scaled() -> None:
    measured = number("flashfftconv", "time", **TABLE, impl="flashfftconv")
    more = TABLE | {"batch": 32, "hidden": 128}
    scaled = number("flashfftconv", "time", **more, measured_at="B=16,H=64 then scaled")
    assert number("flashfftconv", "FlashFFTConv time", **more,
                  measured_at="B=16,H=64 then scaled to 32x128") == 4 * measured  # fmt: skip
    assert scaled > 4 * measured  # the library's, no implementation named


def test_memory_by_hand() -> None:
    """One sequence and channel of 64K: outer stages hand over four fp16 arrays."""
    op: dict[str, object] = {
        "batch": 1, "channels": 1, "len_seq": 2**16, "gated": False, "circular": True,
    }  # fmt: skip
    n = 2**16
    assert module.library_peak_bytes(op) == n * (2 + 4 + 24 + 2) + n * (4 + 8)
    assert module.fused_peak_bytes(op) == n * (2 + 2 + 8) + n * (4 + 8 + 4 + 8) + 8 * n
    saving = number("flashfftconv", "memory saving", **(TABLE | {"batch": 64, "hidden": 768}))
    assert 6 < saving < 7
    fewer = number("flashfftconv", "memory saving", **(TABLE | {"seq": 2**19, "hidden": 768}))
    assert 2.5 < fewer < 3.5


def test_padded_rows_fill_half_of_the_transform() -> None:
    whole = number("flashfftconv", "FlashFFTConv time", **TABLE)
    half = number("flashfftconv", "FlashFFTConv time",
                  **(TABLE | {"op": "gated padded conv forward"}))  # fmt: skip
    assert 0.6 * whole < half < whole


@pytest.mark.parametrize(("log2", "order"), [(8, 2), (10, 2), (12, 3), (15, 3), (16, 4), (22, 4)])
def test_the_order_is_the_papers(log2: int, order: int) -> None:
    op = FlashFFTConv(batch=1, channels=1, len_seq=2**log2, circular=True)
    assert op.tiling(232448)["order"] == order


def test_longer_than_a_block_holds_is_not_fused() -> None:
    a100 = number("flashconv_h3", "fused block FFT max length", gpu="A100")
    h100 = number("flashconv_h3", "fused block FFT max length", gpu="H100")
    assert a100 == 8192 and h100 >= a100


def test_attention_falls_behind_on_long_sequences() -> None:
    setting = {"gpu": "A100-80GB", "layers": 2, "hidden": 128, "batch": 1}
    short, long = (
        number("hyena_dna", "fwd+bwd speedup vs Transformer", **setting, seq=seq)
        for seq in (2**14, 2**18)
    )
    assert short < long / 4
    hybrid = number("flashconv_h3", "generation speedup", gpu="A100-80GB", batch=32,
                    new_tokens=64, prompt=[256, 1024])  # fmt: skip
    assert 1 < hybrid < 4
    passes = number("flashbutterfly", "convolution speedup", gpu="A100", batch=8, hidden=256,
                    seq=2**16)  # fmt: skip
    assert 1 < passes < 5


def test_the_mixer_keeps_its_throughput() -> None:
    ways = ("HF BERT-base", "FlashAttention BERT-base", "M2-BERT-base")
    short, long = (
        [number("monarch_mixer", f"throughput {way}", gpu="A100-40GB", seq=seq, impl=way)
         for way in ways]
        for seq in (512, 2048)
    )  # fmt: skip
    kept = [a / b for a, b in zip(long, short, strict=True)]
    assert kept[0] < kept[1] < kept[2] < 1
    assert run("monarch_mixer", "HF BERT-base", gpu="A100", seq=2**14) == "OOM"


def test_formulas_are_confirmed_by_counts() -> None:
    assert run("sgconv", "kernel parameters", formula="H*d*log2(L/d)") == "H*d*log2(L/d)"
    assert run("sgconv", "kernel parameters", formula="H*L") == "H*d*log2(L/d)"
    assert run("orchid", "complexity", formula="O(L log L d)") == "O(L log L d)"


@pytest.mark.parametrize(
    ("system", "quantity", "setting", "reason"),
    [
        ("flashfftconv", "time", {"op": "conv"}, "no batch, hidden, seq"),
        ("flashfftconv", "time", TABLE | {"op": "gated conv backward"}, "backward"),
        ("flashfftconv", "time", TABLE | {"dtype": "odd"}, "dtype 'odd'"),
        ("flashfftconv", "taste", TABLE, "no rule for 'taste'"),
        ("flashfftconv", "MFU", {}, "no shapes of the model"),
        ("flashfftconv", "cost-model constants", {"gpu": "A100"}, "sizes of the copy"),
        ("flashconv_h3", "LRA training speedup", {}, "no gpu"),
        ("flashbutterfly", "Path256 training speedup", {"seq": 65536}, "no gpu"),
        ("hyena_dna", "max context", {"seq": 10}, "no batch"),
        ("monarch_mixer", "throughput HF BERT-base", {"gpu": "A100"}, "no seq"),
        ("sgconv", "speed vs S4", {}, "no gpu"),
        ("orchid", "crossover", {}, "without device"),
        ("tcnca", "speedup", {"gpu": "A100"}, "no hidden size"),
        ("tcnca", "speedup", {}, "no gpu"),
    ],
)
def test_incomplete_settings_are_given_up(
    system: str, quantity: str, setting: dict[str, object], reason: str
) -> None:
    verdict = evaluate(claim(system, quantity, **setting))
    assert verdict.status == NOT_MODELLED
    assert reason in verdict.reason
