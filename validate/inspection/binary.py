"""One kernel compiled ahead of time, and what its binary takes and holds.

Triton compiles for a target that need not be present; ptxas tells registers and spills, nvdisasm
(both in Triton's wheel) prints the machine code. Must run in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from hwmodels.errors import InputError
from simulator.occupancy import Resources
from validate.inspection import sass
from validate.inspection.source import SourceLoop, source_loops
from validate.kernels.spec import ARCHITECTURES

WARP: Final = 32
ALIGNMENT: Final = 16
_SPILLS: Final = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)
_USED: Final = re.compile(r"Used (\d+) registers")
_THREADS: Final = re.compile(r"\.(?:reqntid|maxntid) (\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a binary takes of an SM, the instructions it holds, and its loops.

    `smem_bytes` are those a launch asks for; `num_warps` all warps of a block, `plain_warps` those
    asked for (fewer where Triton specialises warps). `source` starts with the code around loops.
    """

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    smem_bytes: int
    num_warps: int
    plain_warps: int
    tensor_columns: int
    code: sass.Code
    source: tuple[SourceLoop, ...]

    @property
    def spill_bytes(self) -> int:
        """Bytes of registers that went to memory and came back."""
        return self.spill_store_bytes + self.spill_load_bytes

    @property
    def resources(self) -> Resources:
        """What one block takes."""
        return Resources(
            registers=self.registers, num_warps=self.num_warps, smem_bytes=self.smem_bytes,
            tensor_columns=self.tensor_columns,
        )  # fmt: skip


def require_triton() -> str:
    """Triton's version; one line where it is missing, or interpreting, which cannot compile."""
    if os.environ.get("TRITON_INTERPRET", "") not in ("", "0"):
        raise InputError("TRITON_INTERPRET is set, so nothing can be compiled; unset it")
    try:
        import triton
    except ImportError:
        raise InputError(
            "compiling needs triton, which is not installed; pip install 'ridgeplan[gpu]'"
        ) from None
    return str(triton.__version__)


def check_arch(arch: int) -> None:
    """Raises where kernels are not compiled for that compute capability."""
    if arch not in ARCHITECTURES:
        known = ", ".join(f"sm_{a}" for a in ARCHITECTURES)
        raise InputError(f"sm_{arch} is not supported; kernels are compiled for {known}")


def compiled(
    function: Any,
    *,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: tuple[str, ...],
    num_warps: int,
    num_stages: int,
    arch: int,
) -> Inspection:
    """Compile one jitted function for a compute capability and read the binary."""
    require_triton()
    check_arch(arch)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    index = {name: number for number, name in enumerate(function.arg_names)}
    source = ASTSource(
        fn=function,
        signature=dict(signature),
        constexprs={(index[name],): value for name, value in constants.items()},
        attrs={(index[name],): [["tt.divisibility", ALIGNMENT]] for name in aligned},
    )
    told = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="ridgeplan-") as folder, _fresh(Path(folder)):
        try:
            with contextlib.redirect_stdout(told):
                made = triton.compile(
                    source,
                    target=GPUTarget("cuda", arch, WARP),
                    options={"num_warps": num_warps, "num_stages": num_stages},
                )
        except Exception as error:
            raise InputError(
                f"{function.__name__} does not compile for sm_{arch}: {first_line(error)}"
            ) from None
        return _read(made, told.getvalue(), arch, Path(folder))


@contextlib.contextmanager
def _fresh(folder: Path) -> Any:
    """An empty cache, and ptxas asked to tell what it used."""
    from triton import knobs

    with knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir = str(folder / "cache")
        knobs.nvidia.dump_ptxas_log = True
        yield


def first_line(error: BaseException) -> str:
    """The line of a compiler's complaint that says what is wrong, with its place if told."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    lines = [x.strip() for x in str(root).splitlines() if x.strip()]
    where = next((f"line {m[1]} of the kernel: " for x in str(error).splitlines()
                  if (m := re.match(r"^at (\d+):\d+:$", x.strip()))), "")  # fmt: skip
    told = [x for x in lines if not re.match(r"^at \d+:\d+:$|^[\^~]+$", x)]
    marked = next((x for x in told if "error" in x.lower()), None)
    message = marked or (told[-1] if where and root is error and told else next(iter(told), ""))
    named = re.fullmatch(r"[A-Z]\w*(?:Error|Exception)\((['\"])(.*)\1\)", message)
    return f"{where}{named[2] if named else message or type(root).__name__}"[:400]


def _read(made: Any, told: str, arch: int, folder: Path) -> Inspection:
    spills, used = _SPILLS.search(told), _USED.search(told)
    if spills is None or used is None:
        raise InputError(f"ptxas told nothing of registers for sm_{arch}; try another triton")
    threads = _THREADS.search(made.asm["ptx"])
    metadata = made.metadata
    stack, stores, loads = (int(x) for x in spills.groups())
    return Inspection(
        registers=int(used[1]), stack_bytes=stack, spill_store_bytes=stores,
        spill_load_bytes=loads, smem_bytes=int(metadata.shared),
        num_warps=int(threads[1]) // WARP if threads else int(metadata.num_warps),
        plain_warps=int(metadata.num_warps), tensor_columns=int(getattr(metadata, "tmem_size", 0)),
        code=sass.read(disassembled(made.asm["cubin"], folder), metadata.name),
        source=source_loops(made.asm["ttir"]),
    )  # fmt: skip


@lru_cache(maxsize=1)
def _disassembler() -> str:
    from triton import knobs

    return str(knobs.nvidia.nvdisasm.path)


def disassembled(cubin: bytes, folder: Path) -> str:
    """nvdisasm's text of a binary, with source lines."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    done = subprocess.run(
        [_disassembler(), "-c", "-g", "-ndf", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = next((x for x in done.stderr.splitlines() if x.strip()), "no reason given")
        raise InputError(f"nvdisasm cannot read the binary: {said.strip()}")
    return done.stdout
