"""CLIP score: how well an image shows its prompt, by OpenAI's ViT-L/14.

    score = 100 cos(image embedding, text embedding)

per image; the published figure is the mean. The text encoder reads 77 tokens, so longer prompts are cut, and how many were is
part of the result. torchmetrics' `CLIPScore` is this value with a negative mean raised to 0.
Source: Radford et al. (2021); Hessel et al., "CLIPScore" (2021), without its factor 2.5.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import Tensor

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipScorer:
    """`transformers`' CLIPModel and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model.eval().requires_grad_(False), tokenizer
        self._edge: int = model.config.vision_config.image_size
        self._most: int = model.config.text_config.max_position_embeddings

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> "ClipScorer":
        """From a folder with config.json, model.safetensors, vocab.json and merges.txt; float32."""
        from transformers import CLIPModel, CLIPTokenizer

        model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        return cls(model.to(device), CLIPTokenizer.from_pretrained(folder, local_files_only=True))

    def cut(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than the encoder reads."""
        return sum(len(self._tokenizer(prompt)["input_ids"]) > self._most for prompt in prompts)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """B images with their prompts -> float64 [B] on the CPU. Raises ValueError where the numbers differ."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts do not belong together")
        device = self._model.device
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self._most, return_tensors="pt"
        ).to(device)
        pixels = torch.stack([clip_pixels(image, self._edge) for image in images]).to(device)
        output = self._model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels
        )
        cosine = torch.cosine_similarity(output.image_embeds.double(), output.text_embeds.double(), dim=-1)
        return 100 * cosine.cpu()


def clip_pixels(image: Image, edge: int) -> Tensor:
    """float32 [3, edge, edge]: the shorter edge resized (PIL bicubic), the centre cut out, CLIP's mean and deviation."""
    width, height = image.size
    scale = edge / min(width, height)
    size = (edge, int(height * scale)) if width <= height else (int(width * scale), edge)
    left, top = (size[0] - edge) // 2, (size[1] - edge) // 2
    square = image.convert("RGB").resize(size, Resampling.BICUBIC).crop((left, top, left + edge, top + edge))
    values = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, DEVIATION))
    return (values - mean) / deviation
