"""SANA's encoders: Gemma-2 (2 B, instruction-tuned) for captions, DC-AE f32c32 for pictures.

    text = Gemma-2's last states of "<instruction><caption>"; of its tokens the first and the last T - 1     [B, 300, 2304]
    latents = DC-AE(picture) * 0.41407                                                                       [B, 32, H/32, W/32]

The instruction asks for a better prompt, and attention carries that into the caption's tokens (Xie et al., "SANA", 2024, section
2.3). It is the default of diffusers' SanaPipeline. As there, the empty caption of the unconditional pass goes without it; a
negative prompt of the user's own goes with it here, since it is encoded as any caption.
"""

import hashlib
import inspect
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderDC, SanaPipeline
from torch import Tensor

from loragraft.backbones.masked_encoders import MaskedEncoders

TOKENS = 300
INSTRUCTION: list[str] = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


class SanaEncoders(MaskedEncoders):
    """From the folder of a SANA pipeline. Raises CheckpointError where that is incomplete."""

    name, pipeline, autoencoder, tokens = "sana", SanaPipeline, AutoencoderDC, TOKENS

    @cached_property
    def id(self) -> str:
        """With the instruction's digest: it is diffusers', and may change with it."""
        return f"{super().id}-{hashlib.sha256(_instruction().encode()).hexdigest()[:8]}"

    def readable(self, caption: str) -> str:
        """The caption as far as Gemma's tokens reach beside the instruction's."""
        return self._cut(caption, before=_instruction(), tokens=self._room, end_marks=0)

    @cached_property
    def _room(self) -> int:
        """Tokens of instruction and caption together, as SanaPipeline counts them."""
        return len(self._tokenizer(_instruction())["input_ids"]) + self.tokens - 2

    @torch.no_grad()
    def _encode(self, text: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
        rows: dict[int, tuple[Tensor, Tensor]] = {}
        for empty in (False, True):
            chosen = [i for i, caption in enumerate(captions) if (not caption.strip()) == empty]
            if chosen:
                found = text.encode_prompt(
                    [captions[i] for i in chosen],
                    do_classifier_free_guidance=False,
                    device=self._device,
                    max_sequence_length=self.tokens,
                    complex_human_instruction=None if empty else INSTRUCTION,
                )
                rows |= dict(zip(chosen, zip(found[0], found[1], strict=True), strict=True))
        states, masks = zip(*(rows[i] for i in range(len(captions))), strict=True)
        return torch.stack(states), torch.stack(masks)


def _instruction() -> str:
    return "\n".join(INSTRUCTION)
