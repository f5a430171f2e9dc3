"""FLUX.1 as its makers (and ComfyUI) name it: fused linears, and which of diffusers' layers their rows are.

| theirs | diffusers' layers, row after row |
|---|---|
| double_blocks.i.img_attn.qkv, txt_attn.qkv | transformer_blocks.i.attn.to_q, to_k, to_v; add_q_proj, add_k_proj, add_v_proj |
| double_blocks.i.img_attn.proj, txt_attn.proj | attn.to_out.0, attn.to_add_out |
| double_blocks.i.img_mlp.0, .2, txt_mlp.0, .2 | ff.net.0.proj, ff.net.2, ff_context.net.0.proj, ff_context.net.2 |
| double_blocks.i.img_mod.lin, txt_mod.lin | norm1.linear, norm1_context.linear |
| single_blocks.i.linear1, linear2 | single_transformer_blocks.i.attn.to_q, to_k, to_v, proj_mlp; proj_out |
| single_blocks.i.modulation.lin | norm.linear |
| final_layer.adaLN_modulation.1 | norm_out.linear, its two halves exchanged (shift, scale for scale, shift) |

diffusers `scripts/convert_flux_to_diffusers.py`, ComfyUI `comfy/utils.py` (flux_to_diffusers).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loragraft.quantization.dialects.nunchaku_lite import check_interchange
from loragraft.quantization.linear import SVDQuantLinear

FIRST = "double_blocks."
EXCHANGED = "final_layer.adaLN_modulation.1"
TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    EXCHANGED: "norm_out.linear",
    "final_layer.linear": "proj_out",
}
GUIDANCE = {
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}
DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}


def flux_linears(config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Their linear -> diffusers' paths in the order of its rows, for the whole model of a diffusers configuration."""
    top = TOP | (GUIDANCE if config.get("guidance_embeds") else {})
    linears: dict[str, tuple[str, ...]] = {theirs: (ours,) for theirs, ours in top.items()}
    for i in range(config["num_layers"]):
        for theirs, parts in DOUBLE.items():
            linears[f"double_blocks.{i}.{theirs}"] = tuple(f"transformer_blocks.{i}.{part}" for part in parts)
    for i in range(config["num_single_layers"]):
        for theirs, parts in SINGLE.items():
            linears[f"single_blocks.{i}.{theirs}"] = tuple(f"single_transformer_blocks.{i}.{part}" for part in parts)
    return linears


def flux_norms(config: Mapping[str, Any]) -> dict[str, str]:
    """Their tensor -> diffusers', for the norms of the heads."""
    found: dict[str, str] = {}
    for kind, ours, norms, count in (
        ("double_blocks", "transformer_blocks", DOUBLE_NORMS, config["num_layers"]),
        ("single_blocks", "single_transformer_blocks", SINGLE_NORMS, config["num_single_layers"]),
    ):
        for i in range(count):
            found |= {f"{kind}.{i}.{theirs}.scale": f"{ours}.{i}.{name}.weight" for theirs, name in norms.items()}
    return found


def exchange_halves(rows: Tensor) -> Tensor:
    """[shift; scale] for [scale; shift], and back."""
    return torch.cat(rows.chunk(2)[::-1])


def fuse_rows(layers: Mapping[str, SVDQuantLinear], theirs: str) -> SVDQuantLinear:
    """Several W4A4 layers over one input as one, `theirs`; a single layer is returned as it is.

    Exact: the layers must agree in smoothing, equal lora_downs are kept once. Raises ValueError naming those that disagree.
    """
    (first_path, first), *others = layers.items()
    for path, layer in layers.items():
        check_interchange(path, layer, "ComfyUI")
    for path, other in others:
        same = other.numerics == first.numerics == "w4a4" and other.act_unsigned == first.act_unsigned
        same = same and other.in_features == first.in_features and (other.bias is None) == (first.bias is None)
        if not same:
            raise ValueError(
                f"layers {first_path!r} and {path!r} differ in kind, but are one layer ({theirs}) in ComfyUI"
            )
        assert first.smooth is not None and other.smooth is not None  # w4a4
        if not torch.equal(first.smooth, other.smooth):
            raise ValueError(
                f"layers {first_path!r} and {path!r} have different smoothing factors, but are one layer ({theirs}) in "
                "ComfyUI's FLUX; convert with --numerics w4a4, which gives them a common one, or write diffusers' names "
                "(--to comfyui)"
            )
    if not others:
        return first
    parts = list(layers.values())
    down, up = _joined_branch(parts)
    tensors = {
        "qweight": torch.cat([part.qweight for part in parts]),
        "wscale": torch.cat([part.wscale for part in parts], dim=1),
        "smooth": first.smooth,
        "lora_down": down,
        "lora_up": up,
        "bias": None if first.bias is None else torch.cat([part.bias for part in parts if part.bias is not None]),
    }
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return SVDQuantLinear(first.in_features, up.shape[0], "w4a4", given, act_unsigned=first.act_unsigned)


def _joined_branch(parts: list[SVDQuantLinear]) -> tuple[Tensor, Tensor]:
    """The different lora_downs one under another; every row of lora_up is zero but for the ranks of its own."""
    downs: list[Tensor] = []
    owner = []
    for part in parts:
        known = [i for i, down in enumerate(downs) if torch.equal(down, part.lora_down)]
        owner.append(known[0] if known else len(downs))
        downs += [] if known else [part.lora_down]
    ups = []
    for part, mine in zip(parts, owner, strict=True):
        blocks = [
            part.lora_up if i == mine else part.lora_up.new_zeros(part.out_features, len(d))
            for i, d in enumerate(downs)
        ]
        ups.append(torch.cat(blocks, dim=1))
    return torch.cat(downs), torch.cat(ups)
