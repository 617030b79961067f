"""The CUDA side of the timer, through torch: nothing else here knows of a GPU."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch

from hwmodels.errors import InputError
from validate.gpu_state import Monitor
from validate.kernels.judge import worst_error
from validate.record import EVENTS, GRAPH, UNKNOWN, Case, Environment
from validate.sampling import L2_MULTIPLE
from validate.timer import DeviceLost

if TYPE_CHECKING:
    from validate.kernels.spec import Inputs, KernelSpec

LEAST_ARCH: Final = 80
"""Kernels are compiled for compute capability 8.0 and later."""
SAMPLED: Final = 2**20
"""Elements of an output that are compared with the reference."""
CHUNK: Final = 2**26
"""Elements looked through for NaN at a time."""
NAN_OF_FP8: Final = 0x7F


def open_gpu(index: int = 0) -> TorchGpu:
    """The GPU of that number; one line says why there is none, or none that will do."""
    if torch.version.cuda is None:
        raise InputError(
            "this torch is built without CUDA: install a CUDA build, or replay records "
            "with --replay FILE"
        )
    try:
        torch.cuda.init()
        count = torch.cuda.device_count()
        if count <= index:
            raise InputError("no CUDA GPU is visible; run on a machine with one (see nvidia-smi)")
        major, minor = torch.cuda.get_device_capability(index)
        torch.zeros(1, device=f"cuda:{index}").item()
    except InputError:
        raise
    except (RuntimeError, AssertionError) as error:
        line = " ".join(str(error).split())[:300]
        raise InputError(f"CUDA does not start: {line}") from None
    arch = 10 * major + minor
    if arch < LEAST_ARCH:
        name = torch.cuda.get_device_name(index)
        raise InputError(
            f"{name} has compute capability {major}.{minor}; the kernels need 8.0 or later"
        )
    return TorchGpu(index, arch)


class TorchGpu:
    """One GPU as `validate.cuda_timer.Gpu` asks for it."""

    def __init__(self, index: int, arch: int) -> None:
        self.arch = arch
        self.device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(index)
        self.name = torch.cuda.get_device_name(index)
        self.l2_bytes = float(getattr(properties, "L2_cache_size", 0) or 50e6)
        self._monitor = Monitor(str(getattr(properties, "uuid", "")), index)
        size = int(L2_MULTIPLE * self.l2_bytes) // 4
        self._buffer = torch.empty(size, dtype=torch.int32, device=self.device)
        torch.cuda.set_device(index)
        self._stream = torch.cuda.Stream(self.device)

    def environment(self, l2_state: str) -> Environment:
        """Name, versions, and the driver's last word on clocks, power and heat."""
        state = self._monitor.state()
        return Environment(
            gpu=self.name,
            driver=self._monitor.driver,
            versions=_versions(),
            l2_state=l2_state,
            sm_clock_hz=state.sm_clock_hz,
            memory_clock_hz=state.memory_clock_hz,
            power_w=state.power_w,
            temperature_celsius=state.temperature_celsius,
            throttle=state.throttle,
        )

    def inputs(self, spec: KernelSpec, case: Case, seed: int) -> Inputs:
        """Drawn on the device."""
        with self._guarded():
            generator = torch.Generator(device=self.device).manual_seed(seed)
            return spec.inputs(case, generator, self.device)

    def copy(self, inputs: Inputs) -> Inputs:
        """Tensors that share memory share it in the copy too."""
        with self._guarded():
            return copy.deepcopy(dict(inputs))

    def size_bytes(self, *held: object) -> float:
        """Each storage once, views and all."""
        storages = {s.data_ptr(): s.nbytes() for s in map(_storage, _tensors(held))}
        return float(sum(storages.values()))

    def free_bytes(self) -> float:
        """What the driver has left, and what torch holds but does not use."""
        free, _ = torch.cuda.mem_get_info(self.device)
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return float(free + kept)

    def outputs(self, run: Callable[[], Any]) -> Any:
        """What one run returns, when the device is done."""
        with self._guarded():
            found = run()
            torch.cuda.synchronize(self.device)
            return found

    def poison(self, outputs: Any, inputs: Inputs) -> None:
        """NaN into every output that shares no memory with an input."""
        given = {_storage(t).data_ptr() for t in _tensors(inputs)}
        with self._guarded(), torch.no_grad():
            for out in _tensors(outputs):
                if _storage(out).data_ptr() not in given:
                    _poison(out)
            torch.cuda.synchronize(self.device)

    def error(self, outputs: Any, truth: Any) -> float:
        """The worst relative error on random elements; infinite for NaN anywhere."""
        with self._guarded(), torch.no_grad():
            found, wanted = list(_tensors(outputs)), list(_tensors(truth))
            if len(found) != len(wanted) or not all(map(_finite, found)):
                return math.inf
            if any(o.shape != t.shape for o, t in zip(found, wanted, strict=True)):
                return math.inf
            pairs = [_sampled(o, t) for o, t in zip(found, wanted, strict=True)]
            return worst_error([o for o, _ in pairs], [t for _, t in pairs])

    def capture(self, runs: Sequence[Callable[[], Any]], count: int) -> Launches:
        """A graph; eager launches where the run does something that no graph can hold."""

        def eager() -> None:
            for i in range(count):
                runs[i % len(runs)]()

        with self._guarded():
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize(self.device)
            try:
                with torch.cuda.stream(self._stream):
                    graph.capture_begin()
                    try:
                        eager()
                    finally:
                        graph.capture_end()
                graph.replay()
                torch.cuda.synchronize(self.device)
            except Exception:  # a copy to the host, an allocation of a library: not capturable
                torch.cuda.synchronize(self.device)
                return Launches(self, eager, EVENTS, runs)
            return Launches(self, graph.replay, GRAPH, runs)

    def timed(self, launch: Callable[[], Any], samples: int, *, flush: bool) -> list[float]:
        """Seconds between two events around each launch."""
        with self._guarded():
            pairs = []
            for _ in range(samples):
                start = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                if flush:
                    self._buffer.zero_()
                start.record()
                launch()
                end.record()
                pairs.append((start, end))
            torch.cuda.synchronize(self.device)
            return [start.elapsed_time(end) * 1e-3 for start, end in pairs]

    def release(self) -> None:
        """Cycles of Python hold tensors too: they are looked for where memory runs short."""
        with contextlib.suppress(RuntimeError):
            free, total = torch.cuda.mem_get_info(self.device)
            if free < total / 2:
                gc.collect()
                torch.cuda.empty_cache()

    def close(self) -> None:
        """End the watching of clocks."""
        self._monitor.close()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """After an error, find out whether the device still answers."""
        try:
            yield
        except DeviceLost:
            raise
        except Exception as error:
            try:
                torch.cuda.synchronize(self.device)
                alive = torch.ones(8, device=self.device).sum().item() == 8
            except torch.cuda.OutOfMemoryError:
                alive = True
            except Exception:
                alive = False
            if not alive:
                line = " ".join(str(error).split())[:200]
                raise DeviceLost(f"the device stopped answering: {line}") from error
            raise


class Launches:
    """Captured or eager launches; holds the runs, whose memory they use."""

    def __init__(
        self, gpu: TorchGpu, launch: Callable[[], Any], method: str, runs: Sequence[Any]
    ) -> None:
        self._gpu, self._launch, self.method, self._runs = gpu, launch, method, runs

    def seconds(self, samples: int, *, flush: bool) -> list[float]:
        """Device seconds of all launches together, for each sample."""
        return self._gpu.timed(self._launch, samples, flush=flush)


def _tensors(held: object) -> Iterator[torch.Tensor]:
    """Every tensor in nested mappings, sequences and objects with fields."""
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, Mapping):
        for value in held.values():
            yield from _tensors(value)
    elif isinstance(held, (list, tuple)):
        for value in held:
            yield from _tensors(value)
    elif hasattr(held, "__dataclass_fields__"):
        for name in held.__dataclass_fields__:
            yield from _tensors(getattr(held, name))


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _poison(out: torch.Tensor) -> None:
    """NaN; the least integer; the NaN byte of E4M3, which knows no infinity."""
    if out.dtype == torch.bool:
        return
    if not out.dtype.is_floating_point:
        out.fill_(torch.iinfo(out.dtype).min)
    elif out.element_size() == 1:
        out.view(torch.uint8).fill_(NAN_OF_FP8)
    else:
        out.fill_(math.nan)


def _finite(out: torch.Tensor) -> bool:
    """No NaN, no infinity; looked through a piece at a time."""
    if not out.dtype.is_floating_point:
        return True
    pieces = out.detach().reshape(-1).split(CHUNK)
    return all(bool(torch.isfinite(_widened(piece)).all()) for piece in pieces)


def _widened(piece: torch.Tensor) -> torch.Tensor:
    return piece.float() if piece.element_size() == 1 else piece


def _sampled(out: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same random elements of both, or all where they are few."""
    flat = out.detach().reshape(-1)
    wanted = truth.detach().reshape(-1).to(flat.device)
    if flat.numel() <= SAMPLED:
        return flat, wanted
    generator = torch.Generator(device=flat.device).manual_seed(SAMPLED)
    at = torch.randint(flat.numel(), (SAMPLED,), generator=generator, device=flat.device)
    if flat.element_size() == 1:  # indexing is not implemented for every format of one byte
        return flat.view(torch.uint8)[at].view(flat.dtype), wanted[at]
    return flat[at], wanted[at]


def _versions() -> dict[str, str]:
    """The libraries that matter."""
    found = {"torch": torch.__version__, "cuda": torch.version.cuda or UNKNOWN}
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    for name in ("triton", "numpy"):
        try:
            found[name] = str(importlib.import_module(name).__version__)
        except ImportError:
            found[name] = UNKNOWN
    return found
