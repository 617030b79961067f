"""Which recipe of low-precision training a published precision label stands for, by publisher.

torchtitan       fp8_linear, fp8_tensorwise   torchao's tensorwise recipe with float8 all-gathers
                                              (its reports of 2024-12 and 2025-06)
                 fp8_rowwise                  torchao's rowwise recipe, all gathers in bf16
llm-foundry      fp8                          Composer's amp_fp8: Transformer Engine with
                                              delayed scaling, FSDP in bf16
megatron-bridge  fp8, fp8-cs                  current scaling of tensors, no layer left in bf16
                                              (scripts/performance/utils: get_precision_config);
                                              the tables of 26.x write FP8 where the scripts
                                              have FP8_CS
                 fp8-mx, mxfp8                blocks of 32 on Blackwell; on Hopper the same
                                              column means 1 x 128 and 128 x 128 blocks
                 nvfp4                        NVFP4BlockScaling, no layer left in bf16
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from hwmodels.frozen import FrozenDict

WIDE: Final[Mapping[str, str]] = FrozenDict(
    {"bf16": "bf16-grad16", "amp_bf16": "bf16-grad16", "fp16": "fp16"}
)
_BRIDGE: Final[Mapping[str, str]] = FrozenDict(
    {
        "fp8": "fp8-current",
        "fp8-cs": "fp8-current",
        "fp8-mx": "mxfp8",
        "mxfp8": "mxfp8",
        "nvfp4": "nvfp4",
    }
)
_LABELS: Final[Mapping[str, Mapping[str, str]]] = FrozenDict(
    {
        "torchtitan": FrozenDict(
            {
                "fp8_linear": "fp8-tensorwise",
                "fp8_tensorwise": "fp8-tensorwise",
                "fp8_rowwise": "fp8-rowwise",
            }
        ),
        "llm-foundry": FrozenDict({"fp8": "fp8-delayed"}),
        "megatron-bridge": _BRIDGE,
    }
)


def recipe_name(publisher: str, label: str, architecture: str) -> str | None:
    """The recipe behind a label; None where nobody says what it stands for.

    >>> recipe_name("megatron-bridge", "fp8-mx", "Blackwell")
    'mxfp8'
    >>> recipe_name("megatron-bridge", "fp8-mx", "Hopper")
    'fp8-blockwise'
    """
    found = WIDE.get(label) or _LABELS.get(publisher, {}).get(label)
    return "fp8-blockwise" if found == "mxfp8" and architecture == "Hopper" else found
