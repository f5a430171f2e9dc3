"""`pocket`: a small real text-to-image model in FLUX.1's architecture that travels with the package.

12.6 M parameters (3 double and 5 single blocks of width 256), 128 px, a tiny 16-channel autoencoder (f8: 16x16
latents, 2x2-packed to 64 tokens of 64 channels), MiniLM in the place of T5 and CLIP. It makes the whole line run on
a laptop without a GPU and without a hub. How it was trained, on what, and how good it is: `pretrain/README.md`.
"""

import hashlib
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, FluxTransformer2DModel
from torch import Tensor, nn

from loragraft.backbones.architectures import FLUX
from loragraft.backbones.flow import FLUX_LIKE
from loragraft.backbones.minilm import TOKENS, MiniLMEncoder
from loragraft.backbones.spec import BaseSpec, Encoders

WEIGHTS = Path(__file__).resolve().parent / "weights" / "pocket"

# The sentence vector reaches the blocks through these alone. The words of a new domain shift it for every caption alike,
# which a low-rank change here can take back, so that a known thing stays known; that is why adapters go here as well.
_TARGETS = FLUX.quantize + FLUX.quantize_w4a16


class PocketEncoders:
    """The tiny autoencoder and MiniLM; `text` False leaves MiniLM out, as `release_text` would."""

    def __init__(self, device: torch.device, dtype: torch.dtype, *, text: bool = True) -> None:
        self.vae: AutoencoderTiny = AutoencoderTiny.from_pretrained(WEIGHTS / "vae", local_files_only=True)
        nn.Module.to(self.vae, device=device, dtype=dtype)
        self.vae.to(memory_format=torch.channels_last)
        self.vae.eval().requires_grad_(False)
        if device.type == "cpu":
            # One image at a time: a batch's feature maps pass 32 MB, which malloc maps and unmaps anew at every layer.
            self.vae.enable_slicing()
        self.text: MiniLMEncoder | None = MiniLMEncoder().to(device=device) if text else None
        vae_bytes = (WEIGHTS / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
        self._id = f"pocket-vae-{hashlib.sha256(vae_bytes).hexdigest()[:16]}+minilm-l6-v2-{TOKENS}"

    @property
    def id(self) -> str:
        return self._id

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """[B, 3, 128, 128] in [-1, 1] -> (z - shift) * scale, [B, 16, 16, 16]: about unit variance."""
        raw = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latents
        return (raw - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        """B captions -> token states [B, 32, 384] and the sentence vector [B, 384]."""
        return self._loaded_text(captions)

    def readable(self, caption: str) -> str:
        """The caption as far as 32 word pieces reach."""
        return self._loaded_text.readable(caption)

    @property
    def _loaded_text(self) -> MiniLMEncoder:
        if self.text is None:
            raise RuntimeError("the text encoder was released, or never loaded: encode captions before release_text()")
        return self.text

    def release_text(self) -> None:
        """Frees MiniLM (90 MB)."""
        self.text = None

    @property
    def pipeline_parts(self) -> dict[str, nn.Module | None]:
        return {"vae": self.vae, "text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}


def _load_encoders(device: torch.device, dtype: torch.dtype) -> Encoders:
    return PocketEncoders(device, dtype)


SPEC = BaseSpec(
    name="pocket",
    family=FLUX_LIKE,
    transformer_class=FluxTransformer2DModel,
    transformer_16bit=WEIGHTS / "transformer",
    transformer_int4={"native": WEIGHTS / "transformer-int4"},
    load_encoders=_load_encoders,
    resolution=128,
    quantize=FLUX.quantize,
    quantize_w4a16=FLUX.quantize_w4a16,
    keep_16bit=FLUX.keep_16bit,
    lora_targets=_TARGETS,
    calibration_prompts=(
        "red heart icon",
        "a shopping cart",
        "white star on a blue background",
        "cat face",
        "blue car, flat color icon",
        "gift box with a ribbon",
        "megaphone",
        "green leaf",
        "coffee cup",
        "rocket",
        "white bell on a red background",
        "camera",
        "yellow light bulb",
        "envelope",
        "trophy cup",
        "umbrella",
        "slice of pizza",
        "bicycle",
        "house",
        "key",
        "purple flower",
        "airplane on a sky blue background",
        "calendar",
        "dog",
        "credit card",
        "black and white clock",
        "music note",
        "map pin",
        "book",
        "white padlock on a green background",
        "sun with a face",
        "gear wheel",
    ),
    guidance=3.0,
)
