from __future__ import annotations

import pytest

from cli.quantity import (
    capacity_text,
    count_text,
    digits,
    parse,
    parse_count,
    parse_flag,
    percent_text,
    scaled_text,
    seconds_text,
)
from hwmodels.errors import InputError


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("3.35TB/s", "bytes_per_s", 3.35e12),
        ("3.35 TB/s", "bytes_per_s", 3.35e12),
        ("400Gb/s", "bytes_per_s", 50e9),
        ("400Gbps", "bytes_per_s", 50e9),
        ("900GBps", "bytes_per_s", 900e9),
        ("80GB", "bytes", 80e9),
        ("80GiB", "bytes", 80 * 2**30),
        ("1e9", "bytes", 1e9),
        ("989TFLOP/s", "flops_per_s", 989e12),
        ("989.4 TFLOPS", "flops_per_s", 989.4e12),
        ("1.5us", "s", 1.5e-6),
        ("1.5µs", "s", 1.5e-6),
        ("20 ms", "s", 0.02),
        ("3s", "s", 3.0),
        ("2h", "s", 7200.0),
        ("1.98GHz", "hz", 1.98e9),
        ("700W", "w", 700.0),
        ("90%", "frac", 0.9),
        ("0.9", "frac", 0.9),
    ],
)
def test_quantities_are_read_as_people_write_them(text: str, kind: str, value: float) -> None:
    assert parse(text, kind) == value


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "bytes"), ("GB", "bytes"), ("80XB", "bytes"), ("80gb", "bytes"), ("nan", "bytes"),
        ("inf", "bytes"), ("1e999", "bytes"), ("80GB/s", "bytes"), ("1.2.3", "s"), ("3.35TB", "s"),
        ("110%", "frac"), ("-1%", "frac"), ("3Ms", "s"), ("1__0", "bytes"), ("１２x", "bytes"),
        ("--5", "bytes"), ("9" * 5000, "bytes"),
    ],
)  # fmt: skip
def test_garbage_is_refused_in_one_short_line(text: str, kind: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text, kind, "--memory")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 200
    assert message.startswith("--memory")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8192", 8192),
        ("4k", 4096),
        ("128K", 131_072),
        ("128Ki", 131_072),
        ("1M", 2**20),
        ("1m", 2**20),
        ("2G", 2**31),
        ("1e5", 100_000),
        ("100000", 100_000),
        ("1.5k", 1536),
        ("8_192", 8192),
        ("-4", -4),
    ],
)
def test_suffixes_of_counts_are_binary_and_plain_numbers_decimal(text: str, count: int) -> None:
    got = parse_count(text)
    assert got == count
    assert isinstance(got, int)


@pytest.mark.parametrize("count", [1, 1000, 1024, 4096, 5000, 131_072, 2**20, 3 * 2**30])
def test_a_count_is_shown_as_it_is_read(count: int) -> None:
    assert parse_count(count_text(count).replace(",", "")) == count


@pytest.mark.parametrize(
    "text", ["many", "12kk", "12kB", "12i", "12 x", "1e400", "0x10", "", "9" * 400 + "k"]
)
def test_bad_counts_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="seq = "):
        parse_count(text, "seq")


def test_flags() -> None:
    assert parse_flag("True") and parse_flag("1")
    assert not parse_flag("no")
    with pytest.raises(InputError, match="give true or false"):
        parse_flag("maybe")


def test_numbers_for_people_have_three_digits_and_carry_over() -> None:
    assert seconds_text(999.6e-6) == "1.00 ms"
    assert seconds_text(0.0) == "0 s"
    assert scaled_text(3.352e12, "B/s") == "3.35 TB/s"
    assert scaled_text(999.6e9, "FLOP") == "1.00 TFLOP"
    assert scaled_text(0, "B") == "0 B"
    assert digits(99.96) == "100"
    assert capacity_text(50 * 2**20) == "50 MiB"
    assert percent_text(0.0) == "0 %"
