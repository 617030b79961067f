"""cuDNN's LSTM and GRU in the profiling suite, for their records: none of ours is beside.

Published times, and the op, leave out the product with the layer's input, which torch's layers
always make. It is made small: `INPUT` numbers a step, 16 / hidden of the recurrent product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from hwmodels.dtypes import FP32, TF32
from hwmodels.dtypes import dtype as format_of
from validate.kernels import formats
from validate.kernels.spec import Implementation, Inputs, KernelSpec, Launch
from validate.kernels.vendor_rnn import reference
from validate.record import Case
from workloads.op import Op
from workloads.ops.rnn import GATES, Rnn

Run = Callable[[], tuple[torch.Tensor, ...]]
INPUT: Final = 16
"""Width of the layer's input."""
LAYERS: Final = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}
DIRECTIONS: Final = ("fwd", "bwd_all")
WEIGHTS: Final = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
TOLERANCES: Final = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 5e-3, "bf16": 3e-2}
"""Errors of a state are fed back at every step."""


def case(cell: str, direction: str, dtype: str, sizes: tuple[int, ...]) -> Case:
    """One direction of a layer: hidden units, sequences, steps."""
    hidden, batch, steps = sizes
    params = {"cell": cell, "hidden": hidden, "batch": batch, "timesteps": steps}
    return Case(op=f"rnn_{direction}", dtype=dtype, params=params)


def _op(case: Case) -> Op:
    p = case.params
    return Rnn(
        cell=p["cell"], hidden=p["hidden"], batch=p["batch"], num_steps=p["timesteps"],
        direction=case.op.removeprefix("rnn_"),
        dtype=FP32 if case.dtype == "tf32" else format_of(case.dtype),
        math_dtype=TF32 if case.dtype == "tf32" else None,
    )  # fmt: skip


def _inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    p = case.params
    hidden, rows = int(p["hidden"]), GATES[p["cell"]] * int(p["hidden"])
    fixed: dict[str, Any] = {"dtype": case.dtype, "generator": generator, "device": device}
    scale = hidden**-0.5
    return {
        "x": formats.random(p["timesteps"], p["batch"], INPUT, **fixed),
        "weight_ih_l0": formats.random(rows, INPUT, scale=INPUT**-0.5, **fixed),
        "weight_hh_l0": formats.random(rows, hidden, scale=scale / 2, **fixed),
        "bias_ih_l0": formats.random(rows, scale=scale, **fixed),
        "bias_hh_l0": formats.random(rows, scale=scale, **fixed),
        "dh": formats.random(p["timesteps"], p["batch"], hidden, **fixed),
    }


def _reference(case: Case, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    cell, x = case.params["cell"], inputs["x"].double()
    weights = [inputs[name].double() for name in WEIGHTS]
    if case.op == "rnn_fwd":
        return (reference.hidden_states(cell, x, weights),)
    return reference.gradients(cell, x, weights, inputs["dh"].double())


def _layer(case: Case, inputs: Inputs) -> torch.nn.RNNBase:
    x, hidden = inputs["x"], int(case.params["hidden"])
    layer = LAYERS[case.params["cell"]](INPUT, hidden, device=x.device, dtype=x.dtype)
    with torch.no_grad():
        for name in WEIGHTS:
            getattr(layer, name).copy_(inputs[name])
    layer.flatten_parameters()
    return layer


def _prepare(case: Case, inputs: Inputs, launch: Launch | None) -> Run:
    """Forward as in inference; backward, data and weights, of a forward pass made beforehand."""
    layer, tf32 = _layer(case, inputs), case.dtype == "tf32"
    x, dh = inputs["x"].detach().requires_grad_(), inputs["dh"]

    def forward() -> tuple[torch.Tensor, ...]:
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            return (layer(x)[0],)

    if case.op == "rnn_fwd":
        layer.eval()  # in training mode cuDNN would write a reserve, gradients wanted or not
        return forward
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
        h = layer(x)[0]
    leaves = (x, *(getattr(layer, name) for name in WEIGHTS))

    def backward() -> tuple[torch.Tensor, ...]:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            return torch.autograd.grad(h, leaves, dh, retain_graph=True)

    return backward


def _row(case: Case) -> tuple[str, str, Mapping[str, Any]]:
    return "rnn", case.op, dict(case.params)


_CHECKED: Final = ((1, 1, 1), (16, 2, 5), (33, 3, 4), (64, 16, 3))
_TIMED: Final = (
    (512, 16, 25), (512, 128, 25), (1024, 64, 50), (1536, 32, 50), (1760, 16, 50),
    (2048, 128, 25), (2560, 32, 100), (4096, 128, 25),
)  # fmt: skip
"""Layers of translation and speech models, as DeepBench has them."""


def _checks(cell: str, direction: str) -> tuple[Case, ...]:
    return tuple(case(cell, direction, "fp32", sizes) for sizes in _CHECKED)


def _grid(cell: str, direction: str) -> tuple[Case, ...]:
    half = [case(cell, direction, "fp16", sizes) for sizes in _TIMED]
    return (*half, *(case(cell, direction, d, _TIMED[2]) for d in ("bf16", "fp32", "tf32")))


def _spec(cell: str, direction: str) -> KernelSpec:
    return KernelSpec(
        name=f"{cell}_{direction}", op=_op, inputs=_inputs, reference=_reference,
        implementations=(Implementation(name="cudnn", prepare=_prepare, vendor="cudnn"),),
        checks=_checks(cell, direction), grid=_grid(cell, direction), compilations=lambda: (),
        tolerances=TOLERANCES,
        source="Appleyard et al. 2016, arXiv 1604.01946 (recurrent layers of cuDNN)", row=_row,
    )  # fmt: skip


SPECS: Final = tuple(_spec(cell, direction) for cell in LAYERS for direction in DIRECTIONS)
