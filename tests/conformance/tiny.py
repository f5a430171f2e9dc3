"""A base's own architecture at a size that a CPU trains in seconds: its configuration shrunk by rule, and a whole diffusers folder
of it with random weights and tokenizers that were never trained.

Text widths are the same for every base: a CLIP gives `CLIP` numbers a token, T5 and Gemma `LONG`. The components of the folder
are those that the stock pipeline's constructor asks for; autoencoder and scheduler keep all of the base's own settings but the
widths.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from loragraft.backbones.spec import BaseSpec

CLIP, LONG = 32, 64
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
VOCABULARY = 64
Config = dict[str, Any]


def tiny_config(true: Mapping[str, Any]) -> Config:
    """The configuration of a denoiser, shrunk. Raises KeyError naming this file for a class without a rule."""
    name = true["_class_name"]
    if name not in RULES:
        raise KeyError(f"no rule shrinks a {name}: add one to RULES in {__file__}")
    return {**true, **RULES[name](true)}


def _flux(true: Mapping[str, Any]) -> Config:
    return {
        "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 64, "num_attention_heads": 2,
        "joint_attention_dim": LONG, "pooled_projection_dim": CLIP, "axes_dims_rope": (16, 24, 24),
    }  # fmt: skip


def _unet(true: Mapping[str, Any]) -> Config:
    """The first and the last of its levels, one ResNet and at most one transformer block where there were several."""
    pooled = true.get("addition_embed_type") == "text_time"
    several = isinstance(true.get("attention_head_dim"), list | tuple)
    small: Config = {
        "down_block_types": [true["down_block_types"][0], true["down_block_types"][-1]],
        "up_block_types": [true["up_block_types"][0], true["up_block_types"][-1]],
        "attention_head_dim": [1, 2] if several else 2, "transformer_layers_per_block": 1, "block_out_channels": [32, 64],
        "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 8, "cross_attention_dim": 2 * CLIP if pooled else CLIP,
    }  # fmt: skip
    if pooled:
        small |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + CLIP}
    return small


def _sana(true: Mapping[str, Any]) -> Config:
    return {
        "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1, "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 32, "cross_attention_dim": 64, "caption_channels": LONG, "sample_size": 2,
    }  # fmt: skip


def _pixart(true: Mapping[str, Any]) -> Config:
    return {
        "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1, "cross_attention_dim": 64,
        "caption_channels": LONG, "sample_size": 8,
    }  # fmt: skip


RULES: dict[str, Callable[[Mapping[str, Any]], Config]] = {
    "FluxTransformer2DModel": _flux,
    "UNet2DConditionModel": _unet,
    "SanaTransformer2DModel": _sana,
    "PixArtTransformer2DModel": _pixart,
}


def tiny_autoencoder(true: Mapping[str, Any]) -> nn.Module:
    """The autoencoder of this configuration with narrow levels: latents of the same channels, stride and scale."""
    known = {key: value for key, value in true.items() if not key.startswith("_")}
    if true["_class_name"] == "AutoencoderDC":
        levels = len(true["encoder_block_out_channels"])
        widths = (8,) * (levels - 2) + (16, true["latent_channels"])  # the last is averaged to the latents' channels
        narrow: Config = {
            "encoder_block_out_channels": widths, "decoder_block_out_channels": widths,
            "encoder_layers_per_block": (1,) * levels, "decoder_layers_per_block": (1,) * levels, "attention_head_dim": 8,
        }  # fmt: skip
        return diffusers.AutoencoderDC.from_config({**known, **narrow})
    levels = len(true["block_out_channels"])
    narrow = {"block_out_channels": (8,) * levels, "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64}
    return diffusers.AutoencoderKL.from_config({**known, **narrow})


def _clip(kind: type[PreTrainedModel]) -> PreTrainedModel:
    return kind(
        CLIPTextConfig(
            vocab_size=VOCABULARY, hidden_size=CLIP, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=77, eos_token_id=1, bos_token_id=1, pad_token_id=0, projection_dim=CLIP,
        )
    )  # fmt: skip


def _t5() -> PreTrainedModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=VOCABULARY, d_model=LONG, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def _gemma() -> PreTrainedModel:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=VOCABULARY, hidden_size=LONG, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, pad_token_id=0, eos_token_id=1, bos_token_id=1,
        )
    )  # fmt: skip


TEXT_ENCODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "CLIPTextModel": lambda: _clip(CLIPTextModel),
    "CLIPTextModelWithProjection": lambda: _clip(CLIPTextModelWithProjection),
    "T5EncoderModel": _t5,
    "Gemma2PreTrainedModel": _gemma,
}
TOKENIZERS = {
    "CLIPTokenizer": ("<end>", 77, False),
    "T5Tokenizer": ("</s>", 512, False),
    "GemmaTokenizer": ("<bos>", 2048, True),
}
"""Constructor's class -> (mark, longest input, whether the mark comes first)."""


def tiny_tokenizer(mark: str, length: int, first: bool) -> PreTrainedTokenizerFast:
    """One token a letter; spaces are dropped. Offsets and the mark are those of the real ones."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", mark, "<unk>", *LETTERS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s+"), "removed"), pre_tokenizers.Split("", "isolated")]
    )
    raw.post_processor = processors.TemplateProcessing(
        single=f"{mark} $A" if first else f"$A {mark}", special_tokens=[(mark, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token=mark, unk_token="<unk>", model_max_length=length
    )


def write_pipeline(spec: BaseSpec, config: Mapping[str, Any], folder: Path) -> Path:
    """What the stock pipeline's `save_pretrained` writes, in bfloat16, with a denoiser of `config`.

    Raises KeyError for a text encoder or tokenizer that has no rule here.
    """
    external = spec.external
    assert external is not None
    with init_empty_weights():
        true = external.random_encoders(0, torch.device("cpu"), torch.bfloat16).pipeline_parts
    stock = getattr(diffusers, external.pipeline_class)
    asked = inspect.signature(stock.__init__).parameters
    parts: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for name, parameter in asked.items():
            kind = getattr(parameter.annotation, "__name__", "")
            if name == "vae":
                parts[name] = tiny_autoencoder({**true["vae"].config, "_class_name": type(true["vae"]).__name__})
            elif name == "scheduler":
                parts[name] = true["scheduler"]
            elif name in ("transformer", "unet"):
                parts[name] = spec.transformer_class.from_config(dict(config))  # type: ignore[attr-defined]
            elif name.startswith("text_encoder"):
                parts[name] = TEXT_ENCODERS[kind]()
            elif name.startswith("tokenizer"):
                parts[name] = tiny_tokenizer(*TOKENIZERS[kind])
            elif name in ("safety_checker", "feature_extractor", "image_encoder"):
                parts[name] = None
    if "requires_safety_checker" in asked:
        parts["requires_safety_checker"] = False
    for part in parts.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, dtype=torch.bfloat16)
    stock(**parts).save_pretrained(folder)
    return folder
