"""What resources and pieces are called in sentences, tables and legends."""

from __future__ import annotations

from typing import Final

RESOURCES: Final = {
    "tensor": "tensor units",
    "vector": "vector units",
    "special": "special functions",
    "hbm": "HBM bandwidth",
    "l2": "L2 bandwidth",
    "llc": "LLC bandwidth",
    "smem": "shared-memory bandwidth",
    "register": "register bandwidth",
    "product": "matrix products",
    "attention": "attention",
    "scores": "softmax of scores",
    "pointwise": "maps and norms",
    "narrow": "matrix products in the narrow format",
    "rowwise": "matrix products with scales by row",
    "quantise": "casts to the narrow format",
}


def resource_text(name: str) -> str:
    """A resource, or a piece of a step, as people call it.

    >>> resource_text("hbm"), resource_text("pipeline bubble")
    ('HBM bandwidth', 'pipeline bubble')
    """
    return RESOURCES.get(name, name)
