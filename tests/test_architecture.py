"""The rules of the house as tests: imports point down, floors stay pure, figures have sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from hwmodels import catalog
from hwmodels.units import UNIT_SUFFIXES

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("hwmodels", "workloads", "simulator", "validate", "cli")

# What each floor may import of ours. `hwmodels.errors` is open to all: one family of user errors.
ALLOWED = {
    "hwmodels": ("hwmodels",),
    "workloads": ("workloads", "hwmodels.dtypes", "hwmodels.units", "hwmodels.errors"),
    "simulator": ("simulator", "workloads", "hwmodels"),
    "validate": ("validate", "simulator", "workloads", "hwmodels"),
    "cli": FLOORS,
}
# Third-party packages that belong to one floor only.
OWNED = {
    "torch": "validate",
    "triton": "validate",
    "typer": "cli",
    "rich": "cli",
    "plotly": "cli",
    "kaleido": "cli",
}


def modules(floor: str) -> list[Path]:
    return sorted((ROOT / floor).rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Every module a file imports, function-level imports included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which floor is meant"
            assert node.module
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_down(floor: str) -> None:
    for path in modules(floor):
        for name in imports_of(path):
            if name.split(".")[0] in FLOORS:
                assert any(within(name, a) for a in ALLOWED[floor]), f"{path} imports {name}"


@pytest.mark.parametrize("floor", FLOORS)
def test_third_party_packages_stay_on_their_floor(floor: str) -> None:
    for path in modules(floor):
        for name in imports_of(path):
            owner = OWNED.get(name.split(".")[0])
            assert owner in (None, floor), f"{path} imports {name}, which only {owner} may"


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_the_simulator_stays_light() -> None:
    names = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for floor in ("hwmodels", "workloads", "simulator")
        for p in modules(floor)
    ]
    loaded = loaded_by("import " + ", ".join(names))
    assert "simulator.estimate" in loaded
    assert not loaded & {"torch", "triton", "plotly", "typer", "rich", "pandas", "scipy.optimize"}


def test_the_purity_probe_can_see_an_import() -> None:
    assert "plotly" in loaded_by("import plotly")


def annotated_names(path: Path) -> set[str]:
    """Names of annotated fields and arguments: what a reader meets as a quantity."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
    return found


FOREIGN_UNITS = (
    "_ms", "_us", "_ns", "_gb", "_gib", "_mb", "_kb", "_ghz", "_mhz", "_tflops", "_gflops",
    "_tflops_per_s", "_gbps", "_gb_per_s", "_percent", "_pct", "_watts", "_seconds_ms",
)  # fmt: skip


@pytest.mark.parametrize("floor", ["hwmodels", "workloads", "simulator", "validate"])
def test_units_are_si_and_in_the_name(floor: str) -> None:
    for path in modules(floor):
        for name in annotated_names(path):
            assert not name.lower().endswith(FOREIGN_UNITS), f"{path}: {name} is not in SI units"


def test_the_unit_rule_knows_its_suffixes() -> None:
    assert not any(suffix.endswith(FOREIGN_UNITS) for suffix in UNIT_SUFFIXES)
    assert "memory_gb".endswith(FOREIGN_UNITS)


@pytest.mark.parametrize("device_id", catalog.device_ids())
def test_every_device_figure_has_a_source(device_id: str) -> None:
    device = catalog.device(device_id)
    figures = ["num_sms", "clock_hz"]
    figures += [f"tensor_flops_per_s.{k}" for k in device.tensor_flops_per_s]
    figures += [f"vector_flops_per_s.{k}" for k in device.vector_flops_per_s]
    figures += [f"measured.{k}" for k in device.measured]
    for level in device.memory:
        figures.append(f"memory.{level.name}.capacity_bytes")
        figures += [
            f"memory.{level.name}.{figure}"
            for figure in ("bytes_per_s", "latency_s")
            if getattr(level, figure) is not None
        ]
    figures += [f"links.{link.name}.bytes_per_s" for link in device.links]
    for figure in figures:
        assert (device.source_of(figure) or "").strip(), f"{device_id}: {figure} has no source"


def function_lengths() -> list[tuple[int, str]]:
    found = []
    for floor in FLOORS:
        for path in modules(floor):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    length = (node.end_lineno or node.lineno) - node.lineno + 1
                    found.append((length, f"{path.relative_to(ROOT)}:{node.name}"))
    return sorted(found)


def test_functions_stay_small() -> None:
    lengths = function_lengths()
    p95 = lengths[int(0.95 * len(lengths))]
    assert p95[0] <= 40, f"95th percentile is {p95}"
    assert lengths[-1][0] <= 80, f"too long: {lengths[-1]}"
