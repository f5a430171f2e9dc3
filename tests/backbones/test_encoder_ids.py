"""Encoders' ids are part of every cache key, and random embeddings are what a cache holds under them: neither may change."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loragraft.backbones.load import find_spec
from loragraft.backbones.text_encoders import digest_of

CPU = torch.device("cpu")
RANDOM = {
    "flux1-dev": ("flux1-random-3-512x4096x768", (-0.40897, -0.22466)),
    "flux1-schnell": ("flux1-random-3-256x4096x768", (-0.31337, -0.91786)),
    "sd15": ("clip-random-3-77x768x0", (-1.2851, -1.31859)),
    "sd-turbo": ("clip-random-3-77x1024x0", (-0.22001, -0.55174)),
    "sdxl": ("clip-random-3-77x2048x1280", (1.32256, -1.28641)),
    "sana-06b": ("sana-random-3-300x2304", (0.78085, 0.21498)),
    "pixart-sigma": ("pixart-random-3-300x4096", (0.20226, -0.29896)),
}
"""Base -> its id with seed 3, and the last two numbers of the states of "a white heart"."""
CLIP = ("text_encoder", "tokenizer", "vae")
FOLDERS = {
    "flux1-dev": ("flux_folder", ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"), "flux1-{}-512"),
    "pixart-sigma": ("pixart_folder", CLIP, "pixart-{}-300"),
    "sana-06b": ("sana_folder", CLIP, "sana-{}-300-[0-9a-f]{{8}}"),
    "sd15": ("sd15", CLIP, "clip-{}"),
    "sdxl": ("sdxl", (*CLIP, "text_encoder_2", "tokenizer_2"), "clip-{}-zeros"),
}
"""Base -> its tiny pipeline, the parts that its id is a digest of, and the id around it."""


@pytest.mark.parametrize("name", RANDOM)
def test_random_encoders_keep_their_ids_and_their_numbers(name: str) -> None:
    external = find_spec(name).external
    assert external is not None
    with torch.device("meta"):  # the autoencoder alone; captions are drawn on the CPU
        made = external.random_encoders(3, CPU, torch.float32)
    identity, numbers = RANDOM[name]
    assert made.id == identity
    states = made.encode_text(["a white heart"])["prompt_embeds"]
    torch.testing.assert_close(states[0, -1, -2:], torch.tensor(numbers), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FOLDERS)
def test_encoders_of_a_folder_keep_their_ids(
    name: str, request: pytest.FixtureRequest, unet_folder: Callable[[str], Path]
) -> None:
    where, parts, around = FOLDERS[name]
    folder = unet_folder(where) if where == name else request.getfixturevalue(where)
    external = find_spec(name).external
    assert external is not None
    made = external.open_encoders(folder, CPU, torch.float32)
    assert re.fullmatch(around.format(digest_of(folder, parts)), made.id)


def test_the_digest_of_files_is_what_it_was(tmp_path: Path) -> None:
    """A small file, read whole, and one that is sampled."""
    for part in ("vae", "tokenizer"):
        (tmp_path / part).mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").write_text("a white heart\n")
    with (tmp_path / "vae" / "weights.bin").open("wb") as file:
        file.truncate(2**24 + 5)
        file.seek(2**24)
        file.write(b"heart")
    assert digest_of(tmp_path, ("tokenizer", "vae")) == "797b7e91e6f53806"
