"""Makes Nunchaku FLUX files out of random logical tensors with the formulas of formulas.py, and says what they mean.

`make(model, formulas, spelling)` -> (block tensors, other tensors, expected): `expected` maps a diffusers path to what a
reader must find there (codes, wscale, smooth, lora_down, lora_up, bias, ... or the adaLN's).
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

RANK = 16
V1 = {
    "attn.to_qkv": "qkv_proj", "attn.add_qkv_proj": "qkv_proj_context", "attn.to_out.0": "out_proj",
    "attn.to_add_out": "out_proj_context", "ff.net.0.proj": "mlp_fc1", "ff.net.2": "mlp_fc2",
    "ff_context.net.0.proj": "mlp_context_fc1", "ff_context.net.2": "mlp_context_fc2", "attn.to_out": "out_proj",
}  # fmt: skip
V1_LEAVES = {
    "smooth_factor": "smooth",
    "smooth_factor_orig": "smooth_orig",
    "proj_down": "lora_down",
    "proj_up": "lora_up",
}


def logical_w4a4(
    N: int, K: int, seed: int, *, bias: bool = True, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "codes": torch.randint(-7, 8, (N, K), generator=random).to(torch.int8),
        "wscale": ((torch.rand(K // 64, N, generator=random) + 0.5) / (5 * K**0.5)).to(dtype),
        "smooth": (torch.rand(K, generator=random) + 0.5).to(dtype),
        "lora_down": (torch.randn(RANK, K, generator=random) / K**0.5).to(dtype),
        "lora_up": (torch.randn(N, RANK, generator=random) / RANK**0.5).to(dtype),
        "bias": (torch.randn(N, generator=random) if bias else torch.zeros(N)).to(dtype),
    }


def packed_w4a4(layer: dict[str, Tensor], formulas: ModuleType) -> dict[str, Tensor]:
    return {
        "qweight": formulas.packed_qweight(layer["codes"]),
        "wscales": formulas.packed_scales(layer["wscale"]),
        "smooth_factor": formulas.packed_vector(layer["smooth"]),
        "smooth_factor_orig": formulas.packed_vector(torch.ones_like(layer["smooth"])),
        "proj_down": formulas.packed_down(layer["lora_down"]),
        "proj_up": formulas.packed_up(layer["lora_up"]),
        "bias": formulas.packed_vector(layer["bias"]),
    }


def logical_awq(N: int, K: int, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    scale = ((torch.rand(K // 64, N, generator=random) + 0.5) / 50).to(torch.bfloat16)
    codes = torch.randint(0, 16, (N, K), generator=random).to(torch.uint8)
    return {"codes": codes, "wscale": scale, "wzero": -7 * scale, "bias": torch.randn(N, generator=random).bfloat16()}


def packed_awq(layer: dict[str, Tensor], splits: int, formulas: ModuleType) -> dict[str, Tensor]:
    """As DeepCompressor does it: rows channel by channel, 1 added to two splits of the bias, groups padded to 16."""
    N = layer["codes"].shape[0]
    ones = torch.zeros(N)
    if splits > 1:
        for split in {1, splits - 2}:
            ones[split * (N // splits) : (split + 1) * (N // splits)] = 1
    packed = {
        "qweight": formulas.packed_awq(formulas.interleaved(layer["codes"], splits)),
        "bias": formulas.interleaved(layer["bias"] + ones.bfloat16(), splits),
    }
    for name, stored in (("wscale", "wscales"), ("wzero", "wzeros")):
        groups = formulas.interleaved(layer[name].T, splits).T
        packed[stored] = torch.cat([groups, groups.new_zeros(16 - groups.shape[0], N)]) if splits > 1 else groups
    return packed


def make(
    model: nn.Module, formulas: ModuleType, spelling: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, dict[str, Any]]]:
    blocks: dict[str, Tensor] = {}
    expected: dict[str, dict[str, Any]] = {}
    width = model.config.num_attention_heads * model.config.attention_head_dim

    def put(block: str, local: str, packed: dict[str, Tensor]) -> None:
        place = f"{block}.{V1.get(local, local) if spelling == 'v1' else local}"
        for leaf, tensor in packed.items():
            blocks[f"{place}.{V1_LEAVES.get(leaf, leaf) if spelling == 'v1' else leaf}"] = tensor

    def w4a4(block: str, local: str, N: int, K: int, **more: Any) -> dict[str, Tensor]:
        smooth = more.pop("smooth", None)
        layer = logical_w4a4(N, K, seed=len(blocks), dtype=dtype, **more)
        layer["smooth"] = layer["smooth"] if smooth is None else smooth
        put(block, local, packed_w4a4(layer, formulas))
        return layer

    def fused(block: str, local: str, parts: tuple[str, ...]) -> None:
        whole = w4a4(block, local, width * len(parts), width)
        for i, part in enumerate(parts):
            rows = slice(i * width, (i + 1) * width)
            expected[f"{block}.{part}"] = whole | {
                "codes": whole["codes"][rows], "wscale": whole["wscale"][:, rows], "lora_up": whole["lora_up"][rows],
                "bias": whole["bias"][rows],
            }  # fmt: skip

    def adaln(block: str, local: str, splits: int) -> None:
        layer = logical_awq(splits * width, width, seed=len(blocks))
        put(block, local, packed_awq(layer, splits, formulas))
        stored = (layer["bias"] + 1).float() - 1  # what is left of a bias in bfloat16 once 1 was added
        bias = layer["bias"].float().view(splits, -1).clone()
        for split in {1, splits - 2}:
            bias[split] = stored.view(splits, -1)[split]
        expected[f"{block}.{local}"] = layer | {"bias": bias.flatten()}

    for i in range(model.config.num_layers):
        block = f"transformer_blocks.{i}"
        fused(block, "attn.to_qkv", ("attn.to_q", "attn.to_k", "attn.to_v"))
        fused(block, "attn.add_qkv_proj", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"))
        for local in ("attn.to_out.0", "attn.to_add_out"):
            expected[f"{block}.{local}"] = w4a4(block, local, width, width)
        for local in ("ff", "ff_context"):
            expected[f"{block}.{local}.net.0.proj"] = w4a4(block, f"{local}.net.0.proj", 4 * width, width)
            expected[f"{block}.{local}.net.2"] = w4a4(block, f"{local}.net.2", width, 4 * width) | {"unsigned": 0}
        adaln(block, "norm1.linear", 6)
        adaln(block, "norm1_context.linear", 6)
    for i in range(model.config.num_single_layers):
        block = f"single_transformer_blocks.{i}"
        fused(block, "attn.to_qkv", ("attn.to_q", "attn.to_k", "attn.to_v"))
        shared = expected[f"{block}.attn.to_q"]["smooth"]  # one input, one smoothing factor
        expected[f"{block}.proj_mlp"] = w4a4(block, "mlp_fc1", 4 * width, width, smooth=shared)
        attention = w4a4(block, "attn.to_out", width, width, bias=False)
        mlp = w4a4(block, "mlp_fc2", width, 4 * width)
        expected[f"{block}.proj_out"] = {"attention": attention, "mlp": mlp}
        adaln(block, "norm.linear", 3)
    rest: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] in expected:
            continue
        if spelling == "v1" and ".attn.norm_" in name:
            blocks[name.replace(".attn.", ".")] = tensor.to(torch.bfloat16)
        else:
            rest[name] = tensor.to(torch.bfloat16)
    return blocks, rest, expected
