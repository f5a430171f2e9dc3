"""ImageReward v1.0: a learned estimate of what people prefer, given the prompt; about 0 on average, higher is better.

    reward = (MLP(t) - mean) / deviation,    t = first state of the BLIP-L text encoder that looks at the image by cross-attention

The image is resized to 224 pixels and cut square as CLIP's are; the prompt is cut at 35 word pieces. The network is
`transformers`' BLIP, into which the tensors of the published file go under other names. Unlike the library's defaults, the
vision encoder's norms have an epsilon of 1e-6 and the text encoder 12 heads and no causal mask.
Source: Xu et al., "ImageReward" (2023), and its published code (Apache-2.0), for the constants.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from loragraft.evaluation.clip_score import clip_pixels

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
MOST_TOKENS = 35
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
TEXT = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "encoder_hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "is_decoder": True,  # what gives the layers their cross-attention; the mask is bidirectional all the same
}
_PLAIN = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_IN_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
}


class ImageReward(nn.Module):
    """The scorer; `tokenizer` is BERT's (uncased)."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        tokenizer: Any,
        vision: Mapping[str, Any] = VISION,
        text: Mapping[str, Any] = TEXT,
    ) -> None:
        """state: as published. Raises ValueError naming tensors that are missing, too many or of another shape."""
        super().__init__()
        from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        width = text["hidden_size"]
        with torch.device("meta"):  # a second's worth of random values less; assign=True brings the real ones
            self.vision = BlipVisionModel(BlipVisionConfig(**vision))
            self.text = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
            # no activation between them: so it was published
            self.mlp = nn.Sequential(
                nn.Linear(width, 1024), nn.Linear(1024, 128), nn.Linear(128, 64), nn.Linear(64, 16), nn.Linear(16, 1)
            )
        positions = torch.arange(self.text.config.max_position_embeddings).expand(1, -1)
        self.text.embeddings.register_buffer("position_ids", positions, persistent=False)  # made on no device above
        try:
            self.load_state_dict(renamed(state), strict=True, assign=True)
        except RuntimeError as error:
            raise ValueError(f"the file is not ImageReward's: {error}") from error
        self._tokenizer, self._edge = tokenizer, int(vision["image_size"])
        self.float().eval().requires_grad_(False)

    @classmethod
    def load(cls, weights: Path, vocabulary: Path, device: torch.device | str = "cpu") -> "ImageReward":
        """From the published file and BERT's vocab.txt."""
        from transformers import BertTokenizer

        state = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
        return cls(state, BertTokenizer.from_pretrained(vocabulary.parent, local_files_only=True)).to(device)

    @torch.no_grad()
    def forward(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """B images with their prompts -> float64 [B] on the CPU. Raises ValueError where the numbers differ."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts do not belong together")
        device = self.vision.device
        pixels = torch.stack([clip_pixels(image, self._edge) for image in images]).to(device)
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MOST_TOKENS, return_tensors="pt"
        ).to(device)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=device),
            is_decoder=False,
        ).last_hidden_state[:, 0]
        reward: Tensor = self.mlp(read)[:, 0]
        return ((reward.double() - MEAN) / DEVIATION).cpu()


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published names -> ours. The projections of BLIP's pretraining, which no reward needs, are left out."""
    found = {}
    for name, tensor in state.items():
        if name.startswith("blip.visual_encoder."):
            found[f"vision.{_of_vision(name.removeprefix('blip.visual_encoder.'))}"] = tensor
        elif name.startswith("blip.text_encoder."):
            if not name.endswith("position_ids"):
                found[f"text.{name.removeprefix('blip.text_encoder.')}"] = tensor
        elif match := re.fullmatch(r"mlp\.layers\.(\d+)\.(weight|bias)", name):
            order = {0: 0, 2: 1, 4: 2, 6: 3, 7: 4}  # dropouts lie between
            found[f"mlp.{order.get(int(match[1]), name)}.{match[2]}"] = tensor
    return found


def _of_vision(name: str) -> str:
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name):
        return f"encoder.layers.{match[1]}.{_IN_BLOCK.get(match[2], match[2])}.{match[3]}"
    stem, _, last = name.rpartition(".")
    return _PLAIN.get(name) or f"{_PLAIN.get(stem, stem)}.{last}"
