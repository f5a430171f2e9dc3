"""What `flux_training.py` compares, and what each process is expected to take."""

from dataclasses import dataclass
from typing import Literal

from loragraft.backbones.attention import Attention
from loragraft.train.memory import Checkpointing


@dataclass(frozen=True)
class Variant:
    """One process. base: int4, bf16, fp8, nf4 or sdnq."""

    base: str = "int4"
    resolution: int = 1024
    compiled: bool = True
    attention: Attention = "sdpa"
    checkpointing: Checkpointing = "none"
    dgrad: Literal["dequantized", "int8"] = "dequantized"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    offload: bool = False
    cap_gib: float = 0.0
    """Of reserved memory; 0: none."""
    infer: bool = False


VARIANTS = {
    "ours_1024": Variant(attention="flash_attn_4", checkpointing="gelu"),
    "ours_1024_keep_all": Variant(attention="flash_attn_4"),
    "ours_1024_cheap": Variant(attention="flash_attn_4", checkpointing="cheap"),
    "ours_1024_sdpa": Variant(checkpointing="gelu"),
    "ours_1024_int8_dgrad": Variant(attention="flash_attn_4", checkpointing="gelu", dgrad="int8"),
    "ours_1024_ckpt": Variant(attention="flash_attn_4", checkpointing="block"),
    "ours_1024_ckpt_offload": Variant(attention="flash_attn_4", checkpointing="block", offload=True),
    "ours_1024_ckpt_adamw8bit": Variant(attention="flash_attn_4", checkpointing="block", optimizer="adamw8bit"),
    "ours_512": Variant(resolution=512, attention="flash_attn_4"),
    "ours_512_8gib": Variant(
        "int4", 512, True, "flash_attn_4", "block", optimizer="adamw8bit", offload=True, cap_gib=8.0
    ),
    "bf16_eager_1024": Variant("bf16", compiled=False),
    "bf16_compiled_1024": Variant("bf16"),
    "bf16_compiled_1024_same_attention": Variant("bf16", attention="flash_attn_4"),
    "bf16_eager_512": Variant("bf16", 512, compiled=False),
    "bf16_compiled_512": Variant("bf16", 512),
    "fp8_compiled_1024": Variant("fp8"),
    "nf4_eager_1024": Variant("nf4", compiled=False),
    "sdnq_eager_1024": Variant("sdnq", compiled=False),  # it compiles its own functions
    "ours_image": Variant(attention="flash_attn_4", infer=True),
    "bf16_image": Variant("bf16", attention="flash_attn_4", infer=True),
    "fp8_image": Variant("fp8", attention="flash_attn_4", infer=True),
    "nf4_image": Variant("nf4", attention="flash_attn_4", infer=True),  # bitsandbytes' products compile without a break
}
EXPECTED = {
    "ours_1024": (25.1, 78), "bf16_compiled_1024": (51.4, 97), "bf16_compiled_1024_same_attention": (51.4, 96),
    "bf16_eager_1024": (57.0, 54), "fp8_compiled_1024": (44.2, 98), "nf4_eager_1024": (54.8, 63), "sdnq_eager_1024": (57.0, 151),
    "ours_512": (16.2, 89), "bf16_eager_512": (34.7, 58), "bf16_compiled_512": (32.9, 99),
    "ours_1024_ckpt": (11.1, 75), "ours_1024_ckpt_offload": (9.5, 93), "ours_512_8gib": (8.0, 72),
    "ours_image": (11.0, 98), "bf16_image": (26.0, 72), "whole_run_1024": (11.0, 110), "whole_run_512": (8.0, 110),
    "ours_1024_keep_all": (33.2, 85), "fp8_image": (20.0, 85), "nf4_image": (14.0, 85),
    "ours_1024_cheap": (23.4, 85), "ours_1024_sdpa": (25.1, 85), "ours_1024_int8_dgrad": (26.2, 85), "ours_1024_ckpt_adamw8bit": (11.1, 75),
}  # fmt: skip
"""What `all` runs, the most important first: GiB that a process reserves at most, its seconds beside others, without those in which it
was stopped or waited for memory (H100, 16 cores)."""
CONTEXT_GIB = 1.0
FIRST = "ours_1024"
"""Its time to the first step is reported, and its profile."""
GIB_BEFORE = 6.0
"""While a rival compiles, on two blocks of each kind."""


def gib_before(name: str) -> float | None:
    """GiB that a process of `EXPECTED` reserves before it asks for its peak; None: it does not ask.

    A rival that compiles asks. Ours finds most of its kernels in the caches, and takes less."""
    variant = VARIANTS.get(name)
    if variant is None or variant.infer or variant.base == "int4":
        return None
    return GIB_BEFORE if variant.compiled or variant.base == "sdnq" else None
