"""`ridgeplan estimate` answers for every op and every modelled system, in words and as JSON."""

from __future__ import annotations

import json

import pytest

from cli.main import main
from workloads import registry

SIZES = {"length": "1k", "size": "16", "fraction": "50%"}
FIELDS = {"head_dim": "128", "num_heads": "32", "num_kv_heads": "8"}
NAMES = dict.fromkeys([*registry.names(), *(s.id for s in registry.systems() if s.op)])


@pytest.mark.parametrize("name", NAMES)
def test_an_op_is_told_and_recorded(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["estimate", name, "-d", "h100-sxm"]
    for p in registry.params(name).values():
        if p.required and p.kind in SIZES:
            asked += ["-p", f"{p.name}={FIELDS.get(p.name, SIZES[p.kind])}"]
    assert main(asked) == 0
    told = capsys.readouterr().out
    assert "on h100-sxm" in told and "Roofline" in told
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] >= found["lower_s"] * (1 - 1e-9)
