"""Reading claims: what is taken as it stands, what is refused, what a setting must say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hwmodels.errors import InputError
from validate.claims.claim import Claim, NotModelledError, device_named, read_claims
from validate.claims.models import MODELS, model_named
from workloads.models.parameters import count_parameters


def claim(**setting: object) -> Claim:
    return Claim(
        id="x", family="f", quantity="q", unit="ms", kind="latency", published=1.0, setting=setting
    )


def written(tmp_path: Path, content: object) -> Path:
    file = tmp_path / "claims.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_figures_pairs_words_and_formulas_are_read(tmp_path: Path) -> None:
    rows = [
        {"quantity": "a", "value": 3},
        {"quantity": "b", "low": 1, "high": 2.5},
        {"quantity": "c", "value": "OOM", "confidence": "low"},
        {"quantity": "d"},
    ]
    found = read_claims(written(tmp_path, [{"id": "s", "family": "f", "claims": rows}]))
    assert [c.published for c in found] == [3.0, (1.0, 2.5), "OOM", None]
    assert [c.confidence for c in found] == ["high", "high", "low", "high"]
    assert {c.id for c in found} == {"s"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{broken", "not JSON"),
        ('"text"', "not a list of systems"),
        ([{"family": "f"}], "system 1: needs an id"),
        ([{"id": "s", "claims": 3}], r"\(s\): claims is not a list"),
        ([{"id": "s", "claims": [{"value": 1}]}], "claim 1: needs a quantity"),
        ([{"id": "s", "claims": [{"quantity": "q", "setting": 1}]}], "setting is not an object"),
    ],
)
def test_what_is_no_claims_file_is_refused(tmp_path: Path, content: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_claims(written(tmp_path, content))


def test_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_claims(tmp_path / "none.json")


def test_settings_must_be_complete_and_whole() -> None:
    one = claim(batch=4, seq=2.5, heads=True, gpu="T4-16GB", dtype="bf16/fp16")
    assert one.sizes("batch") == [4]
    assert (one.device().id, one.dtype().name) == ("t4", "bf16")
    with pytest.raises(NotModelledError, match="setting incomplete: no layers, hidden"):
        one.need("batch", "layers", "hidden")
    for name in ("seq", "heads"):
        with pytest.raises(NotModelledError, match="setting unclear"):
            one.sizes(name)
    with pytest.raises(NotModelledError, match="setting incomplete: no gpu"):
        claim().device()


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("A100-80GB x1", "a100-sxm4-80gb"), ("A100-80GB-PCIe", "a100-pcie-80gb"),
        ("2x RTX 4090", "rtx-4090"), ("H100/A100", "h100-sxm"), ("A40-48GB x1-2", "a40"),
        ("RTX 3090-24GB", "rtx-3090"), ("V100-32G", "v100-sxm2-32gb"),
    ],
)  # fmt: skip
def test_papers_name_devices_loosely(text: str, device: str) -> None:
    assert device_named(text).id == device


def test_a_device_nobody_knows_is_given_up() -> None:
    with pytest.raises(NotModelledError, match="no device is called 'Ascend 910B'"):
        device_named("Ascend 910B")


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-2-7b", 6.74), ("codellama-34b", 33.7), ("opt-30b", 30.0), ("llama-3.1-8b", 8.03),
     ("yi-9b-200k", 8.83), ("glm-4-9b-1m", 9.4), ("gpt3-2.7b", 2.65)],
)  # fmt: skip
def test_models_have_the_parameters_they_are_known_for(name: str, billions: float) -> None:
    assert count_parameters(MODELS[name]).total / 1e9 == pytest.approx(billions, rel=0.015)


def test_a_model_nobody_knows_is_given_up() -> None:
    with pytest.raises(NotModelledError, match="no sizes are known of the model 'GPT-9'"):
        model_named("GPT-9")
