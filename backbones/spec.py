"""What a base model is: one `BaseSpec` per file in this folder, and the loaded thing, a `Backbone`.

Shape legend: B batch, C latent channels, h w latent height and width, H W pixels, T text tokens, D embedding width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict

import torch
from torch import Tensor, nn

from loragraft.backbones.attention import Attention, set_attention
from loragraft.backbones.family import Family
from loragraft.backbones.replay import Replay
from loragraft.quantization.checkpoint import checksum
from loragraft.quantization.formats import FormatName
from loragraft.quantization.ledger import Ledger
from loragraft.quantization.linear import SVDQuantLinear

Profile = Literal["native", "interchange", "weight-only", FormatName]
"""`native`: SVDQuant W4A8 with integer group scales. `interchange`: SVDQuant W4A4 in groups of 64. `weight-only`: W4A16 with
the branch, activations as they are. Otherwise a format of `quantization/formats.py`."""


SaveX = Literal["quantized", "raw"]
Dgrad = Literal["dequantized", "int8"]
GuidanceKind = Literal["classifier-free", "embedded", "none"]
"""`classifier-free`: two passes a step. `embedded`: an input of a guidance-distilled transformer, one pass. `none`: neither."""


class Encoders(Protocol):
    """Pixels and captions to what the denoiser reads, and latents back to pixels.

    `id` changes whenever the same input would be encoded differently: it is part of every cache key.
    `pipeline_parts` are the components that the base's diffusers pipeline takes besides the denoiser; `scheduler` is among
    them where it is not the plain one.
    """

    @property
    def id(self) -> str: ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> scaled latents [B, C, h, w]."""
        ...

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        """B captions -> the family's `text_keys`, [B, ...] each: `prompt_embeds` [B, T, D], and what else it reads."""
        ...

    def readable(self, caption: str) -> str:
        """The part of a caption that `encode_text` reads: the caption itself unless it is too long."""
        ...

    def release_text(self) -> None:
        """Frees the text encoder; `encode_text` raises RuntimeError from here on."""
        ...

    @property
    def pipeline_parts(self) -> dict[str, Any]: ...


class Weights(Protocol):
    """Where a base that does not travel with the package finds its weights: a recipe's block `weights` (see there)."""

    @property
    def path(self) -> str: ...

    @property
    def encoders(self) -> str: ...

    @property
    def allow_download(self) -> bool: ...

    @property
    def random(self) -> bool: ...

    @property
    def seed(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class External:
    """What is known of a base whose weights do not travel with the package."""

    config: Mapping[str, Any]
    """The denoiser's configuration: its true shapes, which `weights.random` builds."""
    pipeline_class: str
    """diffusers' class that its `model_index.json` names."""
    hub_id: str
    """Where it is published."""
    check: Callable[[Mapping[str, Any], str], None]
    """(configuration of a denoiser, where it was found): raises ValueError if it is not this base's."""
    open_encoders: Callable[[Path, torch.device, torch.dtype], Encoders]
    """From the folder of its pipeline."""
    random_encoders: Callable[[int, torch.device, torch.dtype], Encoders]
    """The same shapes from a seed."""
    text_bytes: int
    """Of text encoders that lie on the device as a whole while captions are encoded."""
    t5_tokens: int = 0
    """Tokens that T5-XXL reads, streamed layer by layer; 0 = there is none."""


class Guided(TypedDict):
    """How the sampler is told of guidance."""

    guidance: float
    """Classifier-free; 1 = one pass a step."""
    embedded_guidance: float
    """What a transformer with a guidance embedding gets; others ignore it."""


@dataclass(frozen=True, kw_only=True)
class BaseSpec:
    """A base model as data. Patterns are regexes that must match a module's full path."""

    name: str
    """The name that a recipe's `base` gives."""
    family: Family
    """What it shares with others of its kind."""
    transformer_class: type[nn.Module]
    """The denoiser's diffusers class (a transformer or a UNet), which `from_pretrained` builds."""
    transformer_16bit: Path | None = None
    """Folder of the 16-bit denoiser (diffusers layout); None for an `external` base."""
    transformer_int4: Mapping[Profile, Path] = field(default_factory=dict)
    """Profiles that ship ready-made; any other profile is quantized on first use, and kept."""
    load_encoders: Callable[[torch.device, torch.dtype], Encoders] | None = None
    """None for an `external` base."""
    external: External | None = None
    """Where the weights come from the user."""
    resolution: int
    """Native edge in pixels."""
    grain: int = 16
    """Height and width of a picture are multiples of it: the autoencoder's stride times the patch."""
    quantize: tuple[str, ...]
    """Linears that carry the INT4 profile."""
    quantize_w4a16: tuple[str, ...]
    """Linears with few rows (adaLN): INT4 weights, 16-bit activations."""
    keep_16bit: tuple[str, ...]
    """Linears that stay as they are. Every linear is in exactly one of the three lists, or quantization refuses."""
    quantize_conv: tuple[str, ...] = ()
    """Convolutions that carry the INT4 profile; kernels larger than 1x1 in `native` alone."""
    lora_targets: tuple[str, ...]
    """Where an adapter goes unless the recipe says otherwise."""
    calibration_prompts: tuple[str, ...]
    """Prompts whose denoising trajectories calibrate the smoothing."""
    guidance: float
    """Default of `guidance_kind`."""
    guidance_kind: GuidanceKind = "classifier-free"
    training_guidance: float | None = None
    """The guidance embedding of a training step; None where the transformer has none."""
    steps: int = 20
    """Default sampling steps."""
    refuses_training: str = ""
    """Why an adapter cannot be trained on this base, and what to do instead; empty = it can."""

    def __post_init__(self) -> None:
        ships = self.transformer_16bit is not None and self.load_encoders is not None
        if ships == (self.external is not None):
            raise ValueError(f"base {self.name!r}: give either transformer_16bit and load_encoders, or external")

    @property
    def stride(self) -> int:
        """Pixels along the edge of one latent pixel."""
        return self.grain // self.family.patch

    def tokens(self, resolution: int) -> int:
        """Image tokens of a square picture."""
        edge = resolution // self.stride
        return self.family.tokens(edge, edge)

    def guided(self, guidance: float, true_guidance: float = 1.0, negative_prompt: str = "") -> Guided:
        """A recipe's `guidance` in this base's kind; `true_guidance` is classifier-free guidance beside it.

        Raises ValueError for a true_guidance where `guidance` is classifier-free itself, and for a negative prompt that no
        second pass would read.
        """
        if self.guidance_kind == "classifier-free":
            if true_guidance > 1:
                raise ValueError(
                    f"true_guidance is for distilled bases; {self.name}'s guidance is classifier-free itself"
                )
            return {"guidance": guidance, "embedded_guidance": 1.0}
        if negative_prompt and true_guidance <= 1:
            raise ValueError(
                f"{self.name} draws in one pass a step and would not read the negative prompt {negative_prompt!r}: "
                "leave it out, or ask for the second pass with a true_guidance above 1, such as 2"
            )
        return {"guidance": true_guidance, "embedded_guidance": guidance if self.guidance_kind == "embedded" else 1.0}


@dataclass
class Backbone:
    """A frozen base, ready to train on or to sample from."""

    spec: BaseSpec
    profile: Profile | None
    """None for the 16-bit model."""
    transformer: nn.Module
    """The denoiser."""
    encoders: Encoders
    base_id: str
    """sha256 over the sorted (name, dtype, shape, bytes) of the checkpoint's tensors."""
    ledger: Ledger
    device: torch.device
    dtype: torch.dtype
    """Compute dtype: float32 on a CPU, bfloat16 on a GPU."""
    resolution: int
    """Edge in pixels that is drawn: the base's own, unless a run sets another."""
    replay: Replay = field(default_factory=Replay, repr=False, compare=False)
    """CUDA graphs of the transformer, from one picture to the next."""

    def onto_device(self) -> None:
        """A transformer that waited on the CPU (`load_backbone`) goes to `device`, and the ledger says what runs it there;
        otherwise nothing happens."""
        nn.Module.to(self.transformer, device=self.device)
        self.ledger = self.ledger.moved(self.transformer)

    def fingerprint(self) -> str:
        """`checksum` of the frozen tensors as they are in memory now: equal before and after training, or the base changed."""
        return checksum(self.transformer)

    def set_attention(self, name: Attention) -> None:
        """What computes attention, in the model and in the ledger. Raises ValueError as `attention.set_attention` does."""
        set_attention(self.transformer, name)
        self.ledger = replace(self.ledger, attention=name)

    def set_training_numerics(self, save_x: SaveX, dgrad: Dgrad) -> None:
        """What every INT4 layer keeps of its input for dA, and how the gradient passes through its weight."""
        for module in self.transformer.modules():
            if isinstance(module, SVDQuantLinear):
                module.save_x, module.dgrad = save_x, dgrad
