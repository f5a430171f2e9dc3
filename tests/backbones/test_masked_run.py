"""The whole line on tiny SANA and PixArt-Sigma pipelines: quantize, encode, train three steps, save, draw."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtSigmaPipeline, SanaPipeline
from PIL import Image
from torch import Tensor

from loragraft import cli
from loragraft.adapters.checkpoint import load_adapter
from loragraft.backbones.load import find_spec, load_backbone
from loragraft.backbones.pictures import Pictures
from loragraft.recipes.schema import WeightsConfig
from loragraft.train import lora

SMALL = (
    "data.count=16", "data.resolution=64", "train.steps=3", "train.batch_size=2", "train.threads=1", "train.validate_every=0",
    "optim.warmup_steps=0", "adapter.rank=2", "adapter.alpha=2", "sample.steps=1", "sample.prompts=[promo tile]",
    "tracking.mode=disabled",
)  # fmt: skip
Trained = tuple[str, Path, Path, list[tuple[Tensor, dict[str, Tensor]]], list[Tensor]]
"""(base, run, its pipeline, latents and text of every step, what the image encoder gave)."""
TARGETS = {
    "sana-16b": [
        r"adapter.targets=['transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.conv_(inverted|point))']"
    ],
    "pixart-sigma": [],
}
"""SANA's 1x1 convolutions carry adapters when they are asked for."""
SHAPES = {"sana-16b": (32, 2, 2), "pixart-sigma": (4, 8, 8)}


@pytest.fixture(scope="module", params=list(SHAPES))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Each base, trained once."""
    base = request.param
    folder: Path = request.getfixturevalue("sana_folder" if base == "sana-16b" else "pixart_folder")
    place = tmp_path_factory.mktemp(base)
    seen: list[tuple[Tensor, dict[str, Tensor]]] = []
    encoded: list[Tensor] = []
    family = type(find_spec(base).family)
    loss, encode = family.loss, Pictures.encode_images

    def keeping(self: Pictures, pixels: Tensor) -> Tensor:
        encoded.append(encode(self, pixels))
        return encoded[-1]

    def noting(
        self: Any, model: Any, latents: Tensor, noise: Tensor, times: Tensor, text: Any, *rest: Any, **more: Any
    ) -> Tensor:
        if torch.is_grad_enabled():
            seen.append((latents, text))
        return loss(self, model, latents, noise, times, text, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loragraft.backbones.architectures.FOLDER_ROUNDS", 1)
        patch.setattr("loragraft.backbones.architectures.DATA_FREE_GRID", 1)
        patch.setattr(family, "loss", noting)
        patch.setattr(Pictures, "encode_images", keeping)
        patch.setenv("LORAGRAFT_CACHE", str(place / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(place)
        command = ["--recipe", "marketing", "--cpu", "--out", "runs/tiny", f"base={base}", *SMALL, *TARGETS[base]]
        assert lora.main([*command, f"weights.path={folder}"]) == 0
    return base, place / "runs" / "tiny", folder, seen, encoded


def test_three_steps_on_cached_latents_and_masks(trained: Trained) -> None:
    base, run, _, seen, _ = trained
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(seen) == 3 and all(line["grad_norm"] > 0 for line in lines)
    for latents, text in seen:
        assert tuple(latents.shape) == (2, *SHAPES[base])
        mask = text["prompt_attention_mask"]
        assert mask.shape == (2, 300) and set(mask.unique().tolist()) == {0.0, 1.0}
        assert (mask.diff(dim=1) <= 0).all(), "a caption's tokens come first"
    adapter = load_adapter(run / "adapter")
    assert all(bool(up.any()) for _, up in adapter.pairs.values()), "a target learned nothing"
    kernels = {path for path, (down, _) in adapter.pairs.items() if down.dim() == 4}
    assert len(kernels) == (4 if base == "sana-16b" else 0) and len(adapter.pairs) == 20
    assert adapter.metadata["base"] == base
    with Image.open(run / "samples" / "step_000003.png") as sheet:
        assert sheet.size == (4 * 64, 64)


def test_steps_see_what_the_encoder_gave_once_scaled(trained: Trained) -> None:
    """Scaled again, or not at all, it would be another picture; the cache rounds to bfloat16."""
    _, _, _, seen, encoded = trained
    known = torch.cat(encoded).bfloat16().float()
    for latents, _ in seen:
        for one in latents:
            assert (known == one).flatten(1).all(1).any()


def test_the_ledger_lists_what_stays_in_16_bits(trained: Trained) -> None:
    base, run, folder, *_ = trained
    backbone = load_backbone(base, "native", "cpu", run.parents[1] / "cache", WeightsConfig(path=str(folder)))
    rows = {row.path: row for row in backbone.ledger.rows}
    time = "time_embed" if base == "sana-16b" else "adaln_single"
    assert rows[f"{time}.linear"].numerics == "w4a16"
    kept = {path for path, row in rows.items() if row.backend == "torch"}
    embedders = {f"{time}.emb.timestep_embedder.linear_{i}" for i in (1, 2)}
    assert {path for path in kept if "transformer_blocks" not in path} >= {
        *embedders, "caption_projection.linear_1", "caption_projection.linear_2", "proj_out",
    }  # fmt: skip
    feed_forward = ("conv_inverted", "conv_point") if base == "sana-16b" else ("net.0.proj", "net.2")
    for i in range(2):
        assert {rows[f"transformer_blocks.{i}.ff.{part}"].numerics for part in feed_forward} == {"w4a8"}
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            assert {rows[f"transformer_blocks.{i}.attn{j}.{part}"].numerics for j in (1, 2)} == {"w4a8"}


def test_generate_draws_before_and_after(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    base, run, *_ = trained
    monkeypatch.chdir(run.parents[1])
    monkeypatch.setenv("LORAGRAFT_CACHE", str(run.parents[1] / "cache"))
    assert cli.main(["generate", "--adapter", "runs/tiny", "--out", "drawn", "--compare", "--steps", "2"]) == 0
    with Image.open("drawn/0000.png") as image:
        about = json.loads(image.info["loragraft"])
        assert image.size == (64, 64)
    assert (about["base"], about["guidance"], about["steps"]) == (base, 4.5, 2)
    assert Path("drawn/before_after.png").exists()


def test_sana_pipeline_loads_the_adapter_as_it_is(trained: Trained) -> None:
    """Onto the 16-bit weights, through diffusers' own loader; PixArtSigmaPipeline has none."""
    base, run, folder, *_ = trained
    pipeline_class = SanaPipeline if base == "sana-16b" else PixArtSigmaPipeline
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    pipeline = pipeline_class.from_pretrained(folder, **parts, dtype=torch.float32, local_files_only=True)
    if base != "sana-16b":
        assert not hasattr(pipeline, "load_lora_weights")
        return
    pairs = load_adapter(run / "adapter").pairs
    before = {path: pipeline.transformer.get_submodule(path).weight.clone() for path in pairs}
    pipeline.load_lora_weights(run / "adapter")
    pipeline.fuse_lora()
    for path, (down, up) in pairs.items():
        layer = pipeline.transformer.get_submodule(path).get_base_layer()
        shaped = (up.float().flatten(1) @ down.float().flatten(1)).reshape(before[path].shape)
        torch.testing.assert_close(layer.weight, before[path] + shaped, msg=path)
