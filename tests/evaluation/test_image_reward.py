"""ImageReward against the same network written out by hand over the published names, on tiny random weights."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import gelu, layer_norm, linear, softmax

from loragraft.evaluation.clip_score import clip_pixels
from loragraft.evaluation.image_reward import DEVIATION, MEAN, MOST_TOKENS, ImageReward

HEADS, LAYERS, WIDE, NARROW, EDGE, PATCH = 2, 2, 24, 16, 16, 8
VISION = {
    "hidden_size": WIDE,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": EDGE,
    "patch_size": PATCH,
    "layer_norm_eps": 1e-6,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "dog", "sat"]
TEXT = {
    "vocab_size": len(WORDS),
    "hidden_size": NARROW,
    "encoder_hidden_size": WIDE,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "is_decoder": True,
}
State = dict[str, torch.Tensor]


def published() -> State:
    """Random tensors under the names of ImageReward.pt."""
    shapes: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, WIDE),
        "blip.visual_encoder.pos_embed": (1, (EDGE // PATCH) ** 2 + 1, WIDE),
        "blip.visual_encoder.patch_embed.proj.weight": (WIDE, 3, PATCH, PATCH),
        "blip.visual_encoder.patch_embed.proj.bias": (WIDE,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (len(WORDS), NARROW),
        "blip.text_encoder.embeddings.position_embeddings.weight": (512, NARROW),
        "blip.text_encoder.embeddings.position_ids": (1, 512),
        "blip.text_proj.weight": (4, NARROW),
    }

    def affine(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    affine("blip.visual_encoder.norm", WIDE)
    affine("blip.text_encoder.embeddings.LayerNorm", NARROW)
    for n in range(LAYERS):
        block, layer = f"blip.visual_encoder.blocks.{n}", f"blip.text_encoder.encoder.layer.{n}"
        affine(f"{block}.norm1", WIDE)
        affine(f"{block}.norm2", WIDE)
        affine(f"{block}.attn.qkv", 3 * WIDE, WIDE)
        affine(f"{block}.attn.proj", WIDE, WIDE)
        affine(f"{block}.mlp.fc1", 32, WIDE)
        affine(f"{block}.mlp.fc2", WIDE, 32)
        for kind, source in (("attention", NARROW), ("crossattention", WIDE)):
            affine(f"{layer}.{kind}.self.query", NARROW, NARROW)
            affine(f"{layer}.{kind}.self.key", NARROW, source)
            affine(f"{layer}.{kind}.self.value", NARROW, source)
            affine(f"{layer}.{kind}.output.dense", NARROW, NARROW)
            affine(f"{layer}.{kind}.output.LayerNorm", NARROW)
        affine(f"{layer}.intermediate.dense", 32, NARROW)
        affine(f"{layer}.output.dense", NARROW, 32)
        affine(f"{layer}.output.LayerNorm", NARROW)
    for index, (rows, columns) in {0: (1024, NARROW), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}.items():
        affine(f"mlp.layers.{index}", rows, columns)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


@pytest.fixture
def scorer(tmp_path: Path) -> ImageReward:
    from transformers import BertTokenizer

    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return ImageReward(published(), BertTokenizer.from_pretrained(tmp_path, local_files_only=True), VISION, TEXT)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """[T, C], [S, C], [S, C], with `mask` [S] False where nothing is to be seen."""
    q, k, v = (x.view(len(x), HEADS, -1).transpose(0, 1) for x in (q, k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (softmax(scores, -1) @ v).transpose(0, 1).flatten(1)


def by_hand(state: State, image: Image.Image, ids: list[int]) -> float:
    """One image and the word pieces of its prompt, padded with zeros."""

    def lin(name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    visual, text = "blip.visual_encoder", "blip.text_encoder"
    patches = clip_pixels(image, EDGE).unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # [3, y, x, p, p]
    flat = patches.permute(1, 2, 0, 3, 4).reshape((EDGE // PATCH) ** 2, -1)
    tokens = flat @ state[f"{visual}.patch_embed.proj.weight"].flatten(1).T + state[f"{visual}.patch_embed.proj.bias"]
    x = torch.cat([state[f"{visual}.cls_token"][0], tokens]) + state[f"{visual}.pos_embed"][0]
    for n in range(LAYERS):
        block = f"{visual}.blocks.{n}"
        x = x + lin(
            f"{block}.attn.proj", attend(*lin(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1))
        )
        x = x + lin(f"{block}.mlp.fc2", gelu(lin(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    seen = norm(f"{visual}.norm", x, 1e-6)
    real = torch.tensor([i != 0 for i in ids])
    embeddings = f"{text}.embeddings"
    t = (
        state[f"{embeddings}.word_embeddings.weight"][ids]
        + state[f"{embeddings}.position_embeddings.weight"][: len(ids)]
    )
    t = norm(f"{embeddings}.LayerNorm", t, 1e-12)
    for n in range(LAYERS):
        layer = f"{text}.encoder.layer.{n}"
        for kind, source, mask in (("attention", None, real), ("crossattention", seen, None)):
            q, k, v = (lin(f"{layer}.{kind}.self.{s}", t if s == "query" or source is None else source) for s in ("query", "key", "value"))  # fmt: skip
            out = lin(f"{layer}.{kind}.output.dense", attend(q, k, v, mask))
            t = norm(f"{layer}.{kind}.output.LayerNorm", out + t, 1e-12)
        out = lin(f"{layer}.output.dense", gelu(lin(f"{layer}.intermediate.dense", t)))
        t = norm(f"{layer}.output.LayerNorm", out + t, 1e-12)
    y = t[0]
    for index in (0, 2, 4, 6, 7):
        y = lin(f"mlp.layers.{index}", y)
    return (float(y) - MEAN) / DEVIATION


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 28, 3), dtype=np.uint8))


def test_agrees_with_the_network_written_out(scorer: ImageReward) -> None:
    images, prompts = [picture(0), picture(1)], ["a red cat sat", "dog"]
    rewards = scorer(images, prompts)
    for image, prompt, reward in zip(images, prompts, rewards, strict=True):
        ids = [2, *(WORDS.index(word) for word in prompt.split()), 3]
        expected = by_hand(published(), image, ids + [0] * (MOST_TOKENS - len(ids)))
        assert float(reward) == pytest.approx(expected, rel=1e-4)
    assert float(scorer([images[0]], [prompts[1]])[0]) != pytest.approx(float(rewards[1]), rel=1e-3), (
        "it sees the image"
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mlp.layers.7.weight": torch.zeros(1, 17)}, r"mlp\.4\.weight"),
        ({"blip.visual_encoder.blocks.2.norm1.weight": torch.zeros(WIDE)}, r"vision\.encoder\.layers\.2\.layer_norm1"),
        ({"mlp.layers.9.weight": torch.zeros(1, 1)}, r"mlp\.layers\.9"),
    ],
)
def test_other_files_are_refused(scorer: ImageReward, change: State, named: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)not ImageReward's.*{named}"):
        ImageReward(published() | change, scorer._tokenizer, VISION, TEXT)
    fewer = published()
    del fewer["blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"]
    with pytest.raises(ValueError, match=r"(?s)Missing.*crossattention\.self\.key"):
        ImageReward(fewer, scorer._tokenizer, VISION, TEXT)


def test_the_published_sizes_are_those_of_blip_large() -> None:
    """Parameters of the vision tower, the text encoder and the head, from the constants alone."""
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    from loragraft.evaluation import image_reward

    with torch.device("meta"):
        vision = BlipVisionModel(BlipVisionConfig(**image_reward.VISION))
        text = BlipTextModel(BlipTextConfig(**image_reward.TEXT), add_pooling_layer=False)
    assert vision.embeddings.position_embedding.shape == (1, 197, 1024)
    assert sum(p.numel() for p in vision.parameters()) == 303_301_632  # ViT-L/16 at 224 pixels without its classifier
    assert text.encoder.layer[0].crossattention.self.key.weight.shape == (768, 1024)
