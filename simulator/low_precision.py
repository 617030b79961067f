"""Low-precision training: which products run in a narrow format, and the casts that takes.

A linear layer Y = X W trains by three products, each sums over another axis:

    forward  Y  = X W      over columns of X        dgrad  dX = dY W^T    over columns of dY
    wgrad    dW = X^T dY   over rows of X and dY

So X, W and dY are each read twice, along and across. Where a scale belongs to a part of a row (a
row, a block), the two readings need casts of their own; where one scale serves the tensor, a second
copy is only needed where the matrix instruction wants its operands along k (Ada, Hopper: fp8
operands of wgmma are K-major), and is a transposition. How much is cast, per micro-batch:

    X of a product split by columns    all the tokens that tensor parallelism gathers, not 1 / tp
    X of a product split by rows       its own columns
    dY                                 the other way round
    cast before the gather             1 / tp of it, the copy that lies across of all of it; the
                                       gather then moves narrow elements

    weights   "shard"   once a step, each data-parallel rank its own, before they are gathered
              "step"    once a step, all that a rank holds
              "pass"    in every forward pass, and again across in every backward pass

Embedding, head, norms, router and attention stay in 16 bits, and so do gradients of weights, as all
the sources do. Left out: the exchange of the largest magnitude (a number a tensor), scales of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from hwmodels.device import Device
from hwmodels.dtypes import FP8, MXFP4, MXFP8, NVFP4, DType
from hwmodels.errors import UnsupportedError
from workloads.numeric import Num, any_true, ceil_div, where
from workloads.op import Op
from workloads.ops.grouped_matmul import GroupedMatmul
from workloads.ops.matmul import Matmul
from workloads.ops.quantise_tensor import QuantiseTensor
from workloads.ops.quantised_matmul import QuantisedMatmul
from workloads.plan import Plan
from workloads.workload import FORWARD, Node, Workload

DGRAD, WGRAD = "dgrad", "wgrad"
ALL_PRODUCTS: Final = (FORWARD, DGRAD, WGRAD)
TENSOR, ROW, BLOCK = "tensor", "row", "block"
SHARD, STEP, PASS = "shard", "step", "pass"
QUANTISE: Final = "quantise"
"""The part of a workload that casts."""
BLACKWELL: Final = 10
"""Compute capability (major) of the first matrix instruction that takes block scales and fp8
operands in any layout (PTX ISA, tcgen05.mma kind::mxf8f6f4, mxf4nvf4)."""
FIRST_FP8: Final = 9
UNSPLIT: Final = ("router", "q_a", "kv_a")
BY_ROWS: Final = ("out", "down")
"""Products whose weights tensor parallelism splits by rows (`workloads.models.parameters`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowPrecision:
    """How a framework trains linear layers in a narrow format.

    `stored` is the format of the copies, `product` the one whose rate the matrix unit has (mxfp8
    runs at fp8's), `scheme` who shares a scale. `delayed`: the scale is that of the steps before,
    so that nothing is read to find it. `split`: a kernel for each copy. `weights` when they are
    cast, `gathers_activations`: tensor-parallel gathers move cast elements. `products`: which of
    the three are narrow. `source` says who does it so.
    """

    stored: DType
    product: DType
    scheme: str
    delayed: bool = False
    split: bool = False
    weights: str = STEP
    gathers_activations: bool = False
    products: tuple[str, ...] = ALL_PRODUCTS
    source: str = ""

    @property
    def gathers_weights(self) -> bool:
        """Do data-parallel ranks gather narrow weights?"""
        return self.weights == SHARD

    def check(self, device: Device) -> None:
        """Raise where the device has no such products."""
        major = _major(device)
        needed = FIRST_FP8 if self.product == FP8 and self.stored == FP8 else BLACKWELL
        if device.tensor_rate_flops_per_s(self.product) is None or major < needed:
            have = [d for d in ("bf16", "fp8", "nvfp4") if f"{d}_acc_fp32" in
                    device.tensor_flops_per_s]  # fmt: skip
            raise UnsupportedError(
                f"{device.id} has no {self.stored} products with scales per {self.scheme}; "
                f"choose a recipe of a format it computes: {', '.join(have)}"
            )

    def needs_across(self, device: Device) -> bool:
        """Does the second reading of an operand need a copy of its own?"""
        return self.scheme != TENSOR or _major(device) < BLACKWELL


def _major(device: Device) -> int:
    return int((device.compute_capability or "0").split(".")[0])


_TE: Final = "Transformer Engine "
FP8_DELAYED: Final = LowPrecision(
    stored=FP8, product=FP8, scheme=TENSOR, delayed=True, weights=PASS,
    source=_TE + "DelayedScaling: cast and transposed in one kernel, scale from the history",
)  # fmt: skip
FP8_CURRENT: Final = LowPrecision(
    stored=FP8, product=FP8, scheme=TENSOR, weights=SHARD, gathers_activations=True,
    source=_TE + "Float8CurrentScaling in Megatron Core: largest magnitude first; parameters are "
    "kept and gathered in fp8 (fp8_param_gather), so are activations under sequence parallelism",
)  # fmt: skip
FP8_TENSORWISE: Final = LowPrecision(
    stored=FP8, product=FP8, scheme=TENSOR, split=True, weights=SHARD, gathers_activations=True,
    source="torchao's tensorwise recipe as torchtitan runs it: dynamic scales, float8 all-gather "
    "of FSDP and tensor parallelism (torchtitan, docs/float8.md)",
)  # fmt: skip
FP8_ROWWISE: Final = LowPrecision(
    stored=FP8, product=FP8, scheme=ROW, split=True, weights=PASS,
    source="torchao's rowwise recipe: scales by row, again by column across; all gathers in "
    "bf16 (torchtitan, models/llama3/infra/parallelize.py)",
)  # fmt: skip
FP8_BLOCKWISE: Final = LowPrecision(
    stored=FP8, product=FP8, scheme=BLOCK, weights=STEP,
    source=_TE + "Float8BlockScaling: 1 x 128 of activations, 128 x 128 of weights "
    "(DeepSeek-V3, arXiv 2412.19437, section 3.3.2)",
)  # fmt: skip
MXFP8_BLOCKS: Final = LowPrecision(
    stored=MXFP8, product=FP8, scheme=BLOCK, weights=STEP, gathers_activations=True,
    source=_TE + "MXFP8BlockScaling: blocks of 32, along and across, in one kernel; parameters "
    "are gathered in bf16 and cast behind it (Megatron Core, reuse_grad_buf_for_mxfp8_param_ag)",
)  # fmt: skip
NVFP4_BLOCKS: Final = LowPrecision(
    stored=NVFP4, product=NVFP4, scheme=BLOCK, split=True, weights=STEP,
    gathers_activations=True,
    source=_TE + "NVFP4BlockScaling: blocks of 16 under a scale of the tensor, Hadamard transform "
    "across (arXiv 2509.25149); weights are gathered in bf16",
)  # fmt: skip
MXFP4_BLOCKS: Final = replace(
    NVFP4_BLOCKS,
    stored=MXFP4,
    product=MXFP4,
    split=False,
    source="blocks of 32 with scales that are powers of two (OCP microscaling formats 1.0)",
)


def narrowed(work: Workload, low: LowPrecision, *, plan: Plan, device: Device) -> Workload:
    """A layer's workload with its linear products in the narrow format, and what casts for them."""
    low.check(device)
    nodes: list[Node] = []
    cast: dict[str, tuple[str, ...]] = {}
    for node in work:
        kind = _kind(node)
        if kind is None or kind not in low.products:
            nodes.append(node)
            continue
        added = tuple(_casts(node, kind, low, plan, device))
        gradient = f"{_base(node)} gradient"
        if kind != FORWARD:  # the first of the two that read dY casts it for both
            added = () if gradient in cast else added
            cast.setdefault(gradient, tuple(n.name for n in added))
        nodes += added
        waits = cast[gradient] if kind != FORWARD else tuple(n.name for n in added)
        nodes.append(replace(node, op=_product(node.op, low), count=_count(node),
                             after=(*node.after, *waits)))  # fmt: skip
    return Workload(tuple(nodes), work.name)


def _base(node: Node) -> str:
    """The linear layer that a node belongs to."""
    return node.name.removesuffix(f".{DGRAD}").removesuffix(f".{WGRAD}")


def _kind(node: Node) -> str | None:
    """Which of the three products of a linear layer a node is; None for everything else."""
    name = _base(node).rpartition(".")[2]
    linear = isinstance(node.op, Matmul) and node.part in ("attention", "mixer", "mlp", "moe")
    if not linear or name in UNSPLIT or name.endswith("absorb"):
        return None
    last = node.name.rpartition(".")[2]
    return last if last in (DGRAD, WGRAD) else FORWARD


def _count(node: Node) -> Num:
    assert isinstance(node.op, Matmul)
    return node.count * node.op.batch / _groups(node.op)


def _groups(op: Matmul) -> Num:
    """Products that one kernel has: those of all experts, and one of what is no group."""
    return op.batch if isinstance(op, GroupedMatmul) else 1


def _product(op: Op, low: LowPrecision) -> Op:
    """The product alone: both operands are cast already."""
    assert isinstance(op, Matmul)
    if isinstance(op, GroupedMatmul):
        return replace(op, dtype=low.product, out_dtype=op.written_dtype)
    scheme = TENSOR if low.product != low.stored else low.scheme
    return QuantisedMatmul(
        m=op.m, n=op.n, k=op.k, dtype=low.product, in_dtype=low.product,
        out_dtype=op.written_dtype, scheme=scheme,
    )  # fmt: skip


def _casts(
    node: Node, kind: str, low: LowPrecision, plan: Plan, device: Device
) -> Iterator[Node]:  # fmt: skip
    """The kernels that cast what a product reads: X (and W) forward, dY backward.

    A second kernel for the copy across runs where its reader does, in the backward pass.
    """
    op = node.op
    assert isinstance(op, Matmul)
    by_rows = _base(node).rpartition(".")[2] in BY_ROWS
    # Rows of routed experts come by their exchange, in 16 bits, and no tensor-parallel gather.
    spread, all_of = not isinstance(op, GroupedMatmul), _groups(op)
    cast = _Cast(node=node, low=low, plan=plan, device=device)
    if kind == FORWARD:
        both = WGRAD in low.products and not low.split
        gathered = spread and not by_rows
        yield from cast.operand("x", all_of * op.m * op.k, across=both, gathered=gathered)
        if low.weights == PASS:
            both = DGRAD in low.products and not low.split
            yield from cast.operand("w", all_of * op.k * op.n, across=both)
        return
    tokens, width, other = (op.m, op.k, op.n) if kind == DGRAD else (op.k, op.n, op.m)
    tokens, weights = all_of * tokens, all_of * width * other
    both = set(low.products) >= {DGRAD, WGRAD}
    yield from cast.operand("dy", tokens * width, across=both, gathered=spread and by_rows)
    if low.split and WGRAD in low.products:
        yield from cast.again("x", tokens * other, gathered=spread and not by_rows)
    if low.split and DGRAD in low.products and low.weights == PASS:
        yield from cast.again("w", weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cast:
    """The casts of one product's operands."""

    node: Node
    low: LowPrecision
    plan: Plan
    device: Device

    @property
    def _shared(self) -> bool:
        """Is a scale of the whole tensor looked for?"""
        return not self.low.delayed and (self.low.scheme == TENSOR or self.low.stored == NVFP4)

    def operand(
        self, name: str, elements: Num, *, across: bool, gathered: bool = False
    ) -> Iterator[Node]:  # fmt: skip
        """An operand as it comes: along, and across where the products need that."""
        low = self.low
        across = across and low.needs_across(self.device)
        early = gathered and low.gathers_activations
        turned: Num = self._turned if early and across else 0
        yield self._node(name, QuantiseTensor(
            num_elements=ceil_div(elements, self.plan.tp) if early else elements,
            copies=(2 if across else 1) - turned, largest=self._shared,
            local=low.scheme != TENSOR and not self._shared, split=low.split,
            out_dtype=low.stored,
        ))  # fmt: skip
        yield from self._turn(f"{name}_across", elements, turned)

    def again(self, name: str, elements: Num, *, gathered: bool = False) -> Iterator[Node]:
        """An operand of the forward pass once more, across."""
        low = self.low
        if not low.needs_across(self.device):
            return
        early = gathered and low.gathers_activations
        turned: Num = self._turned if early else 0
        yield from self._turn(f"{name}_across", elements, turned)
        # By columns no tile holds what shares a scale: its maximum is a kernel of its own.
        op = QuantiseTensor(
            num_elements=ceil_div(elements, self.plan.tp) if early else elements,
            largest=low.scheme == ROW, local=low.scheme == BLOCK, out_dtype=low.stored,
        )  # fmt: skip
        if any_true(np.not_equal(turned, 1)):
            yield self._node(f"{name}_again", op, 1 - turned)

    @property
    def _turned(self) -> Num:
        """1 where a narrow operand is gathered, so that the copy across is a transposition."""
        return where(self.plan.tp > 1, 1, 0) if self.low.scheme == TENSOR else 0

    def _turn(self, name: str, elements: Num, count: Num) -> Iterator[Node]:
        """A narrow copy transposed, `count` times."""
        stored = self.low.stored
        if any_true(np.not_equal(count, 0)):
            op = QuantiseTensor(num_elements=elements, dtype=stored, out_dtype=stored)
            yield self._node(name, op, count)

    def _node(self, name: str, op: QuantiseTensor, count: Num = 1) -> Node:
        node = self.node
        return Node(name=f"{node.name}.{name}", op=op, part=QUANTISE, phase=node.phase,
                    count=_count(node) * count, after=node.after)  # fmt: skip


def weight_casts(
    num_parameters: Num, num_shards: Num, low: LowPrecision, device: Device
) -> tuple[QuantiseTensor, ...]:
    """What casts a rank's `num_parameters` once a step; nothing where every pass does it.

    In shards: each rank its own, and what is gathered is turned by all of it where needed.
    """
    if low.weights == PASS:
        return ()
    across = low.needs_across(device)
    early = low.weights == SHARD
    turned = early and across and low.scheme == TENSOR
    shared = low.scheme == TENSOR or low.stored == NVFP4
    cast = QuantiseTensor(
        num_elements=ceil_div(num_parameters, num_shards if early else 1),
        copies=2 if across and not turned else 1,
        largest=shared and not low.delayed, local=not shared, split=low.split,
        out_dtype=low.stored,
    )  # fmt: skip
    if not turned:
        return (cast,)
    return (cast, QuantiseTensor(num_elements=ceil_div(num_parameters, 1), dtype=low.stored,
                                 out_dtype=low.stored))  # fmt: skip
