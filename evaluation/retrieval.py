"""Captions and images in one space: two small towers over MiniLM's and EfficientNet-Lite0's features.

    e_text = normalise(T2 gelu(T1 t)),   t [768] = [sentence vector; mean of the token states, each of length 1]
    e_image = normalise(I2 gelu(I1 f)),  f [1280] = Lite0's pooled features, standardised on the training images
    similarity = e_text . e_image

A caption finds its image among N (recall at k) as far as the image shows what the caption says. This is no CLIP score and
not comparable with one: the towers saw this project's training splits only. Trained by `pretrain/retrieval.py`, which
writes date, data and held-out recall into the file's header.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import normalize

WEIGHTS = Path(__file__).resolve().parent / "weights" / "retrieval.safetensors"
TEXT_WIDTH, IMAGE_WIDTH = 768, 1280

EncodeText = Callable[[list[str]], dict[str, Tensor]]
"""`MiniLMEncoder.forward`: captions to `prompt_embeds` and `pooled_prompt_embeds`."""


def tower(width: int, hidden: int, shared: int) -> nn.Sequential:
    """Two layers, width -> hidden -> shared."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, shared))


class Towers(nn.Module):
    """Both towers and the mean and deviation of the image features that they were trained on."""

    image_mean: Tensor
    image_deviation: Tensor

    def __init__(self, hidden: int, shared: int) -> None:
        super().__init__()
        self.text, self.image = tower(TEXT_WIDTH, hidden, shared), tower(IMAGE_WIDTH, hidden, shared)
        self.register_buffer("image_mean", torch.zeros(IMAGE_WIDTH))
        self.register_buffer("image_deviation", torch.ones(IMAGE_WIDTH))

    def embed_text(self, features_N: Tensor) -> Tensor:
        """[N, 768] of `text_features` -> unit vectors [N, D]."""
        return normalize(self.text(features_N.float()), dim=1)

    def embed_images(self, features_N: Tensor) -> Tensor:
        """[N, 1280] of `features.lite0_features` -> unit vectors [N, D]."""
        return normalize(self.image((features_N.float() - self.image_mean) / self.image_deviation), dim=1)


@torch.no_grad()
def text_features(encode: EncodeText, captions: Sequence[str], batch_size: int = 64) -> Tensor:
    """N captions -> float32 [N, 768] on the CPU: what the text tower reads. Each different caption is encoded once."""
    distinct = list(dict.fromkeys(captions))
    rows = []
    for start in range(0, len(distinct), batch_size):
        encoded = encode(distinct[start : start + batch_size])
        states, pooled = encoded["prompt_embeds"].float(), encoded["pooled_prompt_embeds"].float()
        mask = (states != 0).any(-1, keepdim=True)  # padded positions are zero
        mean = normalize((normalize(states, dim=-1) * mask).sum(1) / mask.sum(1), dim=-1)
        rows.append(torch.cat([pooled, mean], dim=1).cpu())
    place = {caption: i for i, caption in enumerate(distinct)}
    return torch.cat(rows)[[place[caption] for caption in captions]]


def pack_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of `Towers` as stored: matrices [N, K] as int8 codes and one fp16 scale per row, max |w| / 127; else fp16."""
    packed = {}
    for name, tensor in state.items():
        if tensor.ndim == 2:
            scale = (tensor.abs().amax(1) / 127).clamp_min(1e-6).half()
            packed[f"{name}_scale"] = scale
            packed[name] = (tensor / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        else:
            packed[name] = tensor.half()
    return packed


def unpack_state(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `pack_state` stored, as float32."""
    return {
        name: tensor.float() * packed[f"{name}_scale"].float()[:, None]
        if tensor.dtype == torch.int8
        else tensor.float()
        for name, tensor in packed.items()
        if not name.endswith("_scale")
    }


def load_towers(path: Path = WEIGHTS) -> tuple[Towers, dict[str, Any]]:
    """The towers in evaluation mode, and what their header says (`date`, `data`, `held_out`, ...).

    Raises FileNotFoundError naming the command that makes them.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: reinstall, or train it with pretrain/retrieval.py")
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["loragraft"])
        packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    towers = Towers(about["hidden"], about["shared"])
    towers.load_state_dict(unpack_state(packed))
    return towers.eval().requires_grad_(False), about
