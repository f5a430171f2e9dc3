"""CLIP score against the cosine of the two embeddings, on a tiny random CLIP in the published layout."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from loragraft.evaluation.clip_score import DEVIATION, MEAN, ClipScorer, clip_pixels

WORDS = {"<|startoftext|>": 0, "<|endoftext|>": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """config.json, model.safetensors, vocab.json, merges.txt: what the real folder has."""
    from transformers import CLIPConfig, CLIPModel

    letters = [chr(code) for code in range(33, 127)]
    vocabulary = WORDS | {text: i + 2 for i, text in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(vocabulary), "max_position_embeddings": 12, "eos_token_id": 1, "bos_token_id": 0}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path)
    return tmp_path


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_a_score_is_100_times_the_cosine(folder: Path) -> None:
    scorer = ClipScorer.load(folder)
    images, prompts = [picture(0), picture(1)], ["a cat", "two red dogs"]
    for image, prompt, score in zip(images, prompts, scorer(images, prompts), strict=True):
        tokens = scorer._tokenizer(prompt, truncation=True, max_length=12, return_tensors="pt")
        seen = scorer._model.get_image_features(pixel_values=clip_pixels(image, 16)[None]).pooler_output[0]
        read = scorer._model.get_text_features(**tokens).pooler_output[0]
        expected = 100 * float(seen @ read / (seen.norm() * read.norm()))
        assert float(score) == pytest.approx(expected, rel=1e-4), "padding beside another prompt changes nothing"


def test_long_prompts_are_cut_and_counted(folder: Path) -> None:
    scorer = ClipScorer.load(folder)
    long = "abcdefghijklmnop"
    assert scorer.cut(["a", long, "abc"]) == 1
    assert torch.equal(scorer([picture(0)], [long]), scorer([picture(0)], [long + "q"]))
    with pytest.raises(ValueError, match="1 images and 2 prompts"):
        scorer([picture(0)], ["a", "b"])


def test_pixels_are_a_centred_square_of_the_shorter_edge() -> None:
    wide = Image.new("RGB", (300, 100), "black")
    wide.paste((255, 255, 255), (100, 0, 200, 100))  # the middle third, alone
    values = clip_pixels(wide, 50)
    white = (1 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    assert values.shape == (3, 50, 50)
    assert torch.allclose(values[:, 25, 3:-3], white[:, None].expand(3, 44), atol=1e-5)
    assert clip_pixels(wide.rotate(90, expand=True), 50).shape == (3, 50, 50)
