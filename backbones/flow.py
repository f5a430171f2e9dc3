"""Rectified flow: the path from data to noise, its velocity, and the training loss.

    x_t = (1 - t) x_0 + t e,        v = dx_t/dt = e - x_0,        loss = mean (v_theta(x_t, t, c) - v)^2

with t = sigmoid(n), n ~ N(0, 1) ("logit-normal"). Source: Esser et al., "Scaling Rectified Flow Transformers for
High-Resolution Image Synthesis" (2024), sections 2 and 3.1; FLUX.1 keeps the same convention (t = 1 is noise).
"""

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn


def sample_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """`count` logit-normal times in (0, 1), float32 on the generator's device."""
    return torch.sigmoid(torch.randn(count, generator=generator, device=generator.device))


def predict_velocity(
    transformer: nn.Module, latents: Tensor, times: Tensor, text: dict[str, Tensor], guidance: float | None = None
) -> Tensor:
    """v_theta of a FLUX-shaped transformer: latents [B, C, h, w], times [B] in [0, 1] -> [B, C, h, w].

    `text` holds `prompt_embeds` [B, T, D] and `pooled_prompt_embeds` [B, P]. Packing is FLUX's own: 2x2 latent
    pixels make one token of 4 C channels (diffusers `FluxPipeline._pack_latents`). `guidance` is the input of a
    guidance-distilled transformer, and None for any other.
    """
    b, c, h, w = latents.shape
    prompt_embeds = text["prompt_embeds"]
    image_ids = latent_image_ids(h // 2, w // 2, latents.device, latents.dtype)
    text_ids = torch.zeros(prompt_embeds.shape[1], 3, device=latents.device, dtype=latents.dtype)
    (packed,) = transformer(
        hidden_states=FluxPipeline._pack_latents(latents, b, c, h, w),
        encoder_hidden_states=prompt_embeds,
        pooled_projections=text["pooled_prompt_embeds"],
        timestep=times.to(latents.dtype),
        guidance=None if guidance is None else torch.full((b,), guidance, device=latents.device),
        img_ids=image_ids,
        txt_ids=text_ids,
        return_dict=False,
    )
    # [B, h/2 w/2, 4C] -> [B, C, h, w], the inverse of _pack_latents.
    unpacked = packed.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return unpacked.reshape(b, c, h, w)


def latent_image_ids(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Position (0, row, column) of every token, [rows columns, 3]; diffusers' own function makes them on the CPU, which a
    CUDA graph cannot capture."""
    axes = [torch.arange(size, device=device) for size in (1, rows, columns)]
    return torch.cartesian_prod(*axes).to(dtype)


def flow_loss(
    transformer: nn.Module,
    latents: Tensor,
    noise: Tensor,
    times: Tensor,
    text: dict[str, Tensor],
    weights: Tensor | None = None,
    guidance: float | None = None,
) -> Tensor:
    """Mean squared velocity error of a batch, a float32 scalar. Shapes and `guidance` as in `predict_velocity`.

    weights [B]: the error of sample b counts weights[b] times; the mean is still over B.
    """
    t = times.view(-1, 1, 1, 1).to(latents.dtype)
    velocity = predict_velocity(transformer, (1 - t) * latents + t * noise, times, text, guidance).float()
    target = (noise - latents).float()
    if weights is None:
        return torch.nn.functional.mse_loss(velocity, target)
    return ((velocity - target).square().flatten(1).mean(1) * weights).mean()
