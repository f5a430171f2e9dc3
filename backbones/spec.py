"""What a base model is: one `BaseSpec` per file in this folder, and the loaded thing, a `Backbone`.

Shape legend: B batch, C latent channels, h w latent height and width, H W pixels, T text tokens, D embedding width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from loragraft.backbones.attention import Attention, set_attention
from loragraft.quantization.checkpoint import base_id
from loragraft.quantization.ledger import Ledger
from loragraft.quantization.linear import SVDQuantLinear

Profile = Literal["native", "interchange", "weight-only"]
"""`native`: SVDQuant W4A8 with integer group scales. `interchange`: SVDQuant W4A4 in groups of 64. `weight-only`: W4A16 with
the branch, activations as they are."""


SaveX = Literal["quantized", "raw"]
Dgrad = Literal["dequantized", "int8"]


class Encoders(Protocol):
    """Pixels and captions to what the transformer reads, and latents back to pixels.

    `id` changes whenever the same input would be encoded differently: it is part of every cache key.
    `pipeline_parts` are the components that the base's diffusers pipeline takes besides transformer and scheduler.
    """

    @property
    def id(self) -> str: ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> scaled latents [B, C, h, w]."""
        ...

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        """B captions -> `prompt_embeds` [B, T, D] and `pooled_prompt_embeds` [B, P]."""
        ...

    def readable(self, caption: str) -> str:
        """The part of a caption that `encode_text` reads: the caption itself unless it is too long."""
        ...

    def release_text(self) -> None:
        """Frees the text encoder; `encode_text` raises RuntimeError from here on."""
        ...

    @property
    def pipeline_parts(self) -> dict[str, nn.Module | None]: ...


@dataclass(frozen=True, kw_only=True)
class BaseSpec:
    """A base model as data. Patterns are regexes that must match a module's full path."""

    name: str
    """The name that a recipe's `base` gives."""
    transformer_class: type[nn.Module]
    """The diffusers class that `from_pretrained` builds."""
    transformer_16bit: Path
    """Folder of the 16-bit transformer (diffusers layout)."""
    transformer_int4: dict[Profile, Path]
    """Profiles that ship ready-made; any other profile is quantized on first use, and kept."""
    load_encoders: Callable[[torch.device, torch.dtype], Encoders]
    resolution: int
    """Native edge in pixels."""
    quantize: tuple[str, ...]
    """Linears that carry the INT4 profile."""
    quantize_w4a16: tuple[str, ...]
    """Linears with few rows (adaLN): INT4 weights, 16-bit activations."""
    keep_16bit: tuple[str, ...]
    """Linears that stay as they are. Every linear is in exactly one of the three lists, or quantization refuses."""
    lora_targets: tuple[str, ...]
    """Where an adapter goes unless the recipe says otherwise."""
    calibration_prompts: tuple[str, ...]
    """Prompts whose denoising trajectories calibrate the smoothing."""
    guidance: float
    """Default classifier-free guidance."""


@dataclass
class Backbone:
    """A frozen base, ready to train on or to sample from."""

    spec: BaseSpec
    profile: Profile | None
    """None for the 16-bit model."""
    transformer: nn.Module
    encoders: Encoders
    base_id: str
    """sha256 over the sorted (name, dtype, shape, bytes) of the checkpoint's tensors."""
    ledger: Ledger
    device: torch.device
    dtype: torch.dtype
    """Compute dtype: float32 on a CPU, bfloat16 on a GPU."""

    def fingerprint(self) -> str:
        """Hash of the frozen tensors as they are in memory now: equal before and after training, or the base changed."""
        return base_id(self.transformer)

    def set_attention(self, name: Attention) -> None:
        """What computes attention, in the model and in the ledger. Raises ValueError as `attention.set_attention` does."""
        set_attention(self.transformer, name)
        self.ledger = replace(self.ledger, attention=name)

    def set_training_numerics(self, save_x: SaveX, dgrad: Dgrad) -> None:
        """What every INT4 layer keeps of its input for dA, and how the gradient passes through its weight."""
        for module in self.transformer.modules():
            if isinstance(module, SVDQuantLinear):
                module.save_x, module.dgrad = save_x, dgrad
