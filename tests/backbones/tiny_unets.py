"""Pipelines of Stable Diffusion small enough for a CPU: every part of a diffusers folder, with a tokenizer that was never trained."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from loragraft.backbones.stable_diffusion import KINDS

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WIDTH, POOLED = 64, 32
"""Of a token and of the pooled vector."""


def tiny_config(name: str) -> dict[str, Any]:
    """The base's own blocks, narrow."""
    published = dict(KINDS[name].unet)
    levels = len(published["block_out_channels"])
    small = {"block_out_channels": [32, *[64] * (levels - 1)], "layers_per_block": 1, "cross_attention_dim": WIDTH}
    heads = published["attention_head_dim"]
    small["attention_head_dim"] = 2 if isinstance(heads, int) else [1, *[2] * (levels - 1)]
    if KINDS[name].family.sized:
        small |= {"transformer_layers_per_block": [1, 1, 1], "addition_time_embed_dim": 8}
        small["projection_class_embeddings_input_dim"] = POOLED + 6 * 8
    return published | small


def tiny_unet(name: str) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(list(KINDS).index(name))
        return UNet2DConditionModel.from_config(tiny_config(name))


def tiny_vae(name: str) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=64,
        scaling_factor=KINDS[name].vae["scaling_factor"],
    )  # fmt: skip


def clip_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """One token a letter between CLIP's two marks; spaces are dropped."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", "<unk>", "<start>", *LETTERS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s+"), "removed"), pre_tokenizers.Split("", "isolated")]
    )
    marks = [("<start>", 3), ("<end>", 1)]
    raw.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=marks)
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<unk>",
        model_max_length=77,
    )  # fmt: skip
    made.save_pretrained(folder)
    return made


def _clip(width: int, made: type[nn.Module]) -> nn.Module:
    return made(
        CLIPTextConfig(
            vocab_size=64, hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=77, eos_token_id=1, bos_token_id=3, pad_token_id=0, projection_dim=POOLED,
        )
    )  # fmt: skip


def write_pipeline(folder: Path, name: str) -> Path:
    """What `save_pretrained` of the base's pipeline writes, in bfloat16; SD1.5's with PNDM, as it was published."""
    kind = KINDS[name]
    made, config = kind.scheduler
    parts: dict[str, Any] = {
        "scheduler": PNDMScheduler(skip_prk_steps=True, **config) if name == "sd15" else made.from_config(dict(config)),
        "unet": tiny_unet(name),
        **kind.family.options,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        parts |= {"vae": tiny_vae(name), "tokenizer": clip_tokenizer(folder / "tokenizer")}
        parts["text_encoder"] = _clip(WIDTH // 2 if kind.family.sized else WIDTH, CLIPTextModel)
        if kind.family.sized:
            parts["text_encoder_2"] = _clip(WIDTH // 2, CLIPTextModelWithProjection)
            parts["tokenizer_2"] = clip_tokenizer(folder / "tokenizer_2")
    for part in parts.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, torch.bfloat16)
    kind.family.text_to_image(**parts).save_pretrained(folder)
    return folder
