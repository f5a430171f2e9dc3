"""Makes ``pocket``: icons -> pictures with captions -> autoencoder -> latents and text embeddings -> transformer -> export.

    python pretrain/pocket.py --icons icons.jsonl.gz inputs/mdi.jsonl.gz --photos inputs/photos.zip --text inputs/minilm \
        --work /tmp/pocket --out export --minutes 24

One call is one process on one GPU. ``--resume`` continues from the checkpoints in ``--work``; ``--later-minutes`` tells
the learning-rate schedule how much training is still to come in such later calls. See README.md beside this file.
"""

import argparse
import copy
import datetime
import io
import json
import multiprocessing
import os
import pickle
import platform
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from autoencoder import (
    AutoencoderSettings,
    build_autoencoder,
    decode,
    encode,
    psnr,
    train_autoencoder,
    with_scalar_scaling,
)
from composite import composite, frames, shapes
from diffusers import AutoencoderTiny, FluxTransformer2DModel
from icons import HELD_OUT_STYLES
from material import Material, prepare_into
from minilm import TextEncoder
from PIL import Image
from prompts import PROMPTS
from torch import Tensor
from transformer import Pool, Trainer, TransformerSettings, sample, shortened

GUIDANCE = 3.0
GUIDANCES = (3.0, 2.0, 4.0, 1.5, 5.0)  # of the held-out pictures that are written for the scores
EXPORT_SECONDS = 30
Log = Callable[[str], None]


@dataclass(frozen=True)
class Pictures:
    """Everything that can be painted, on the device: rows -> pictures [B, 3, 128, 128] in [-1, 1]."""

    glyphs: list[Tensor]
    photos: Tensor
    rows: dict[str, Tensor]

    def paint(self, split: str, rows: Tensor) -> Tensor:
        if not split.startswith("photo"):
            return composite(self.glyphs, rows)
        pictures = self.photos[rows[:, 0].long()].float() / 127.5 - 1
        return torch.where(rows[:, 1].bool()[:, None, None, None], pictures.flip(3), pictures)

    def busy(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """The icons of scene rows on crowded grounds."""
        return composite(self.glyphs, rows, shapes(len(rows), generator))


def make_autoencoder(
    pictures: Pictures, settings: AutoencoderSettings, device: str, compiled: bool, log: Log
) -> tuple[AutoencoderTiny, dict]:
    """Half captioned scenes, three eighths busy pictures (shapes, strokes, gradients), one eighth photos."""
    rows = pictures.rows

    def draw(step: int, batch: int, generator: torch.Generator) -> Tensor:
        def some(split: str, count: int) -> Tensor:
            return rows[split][torch.randint(len(rows[split]), (count,), generator=generator, device=device)]

        photos, busy = batch // 8, batch * 3 // 8
        return torch.cat([
            pictures.paint("train", some("train", batch - photos - busy)),
            pictures.busy(some("train", busy), generator),
            pictures.paint("photo train", some("photo train", photos)),
        ])  # fmt: skip

    model = train_autoencoder(draw, settings, device, log, compiled)
    mixture = [pictures.paint(split, rows[split][:count]) for split, count in (("train", 4096), ("photo train", 400))]
    model, deviations = with_scalar_scaling(model, torch.cat(mixture))
    held = rows["name"][:1024]
    figures = {
        "psnr_held_out_scenes_db": round(psnr(model, pictures.paint("name", held)), 2),
        "psnr_held_out_icons_on_white_db": round(psnr(model, pictures.paint("name", on_white(held))), 2),
        "psnr_held_out_photos_db": round(psnr(model, pictures.paint("photo", rows["photo"][:512])), 2),
        "psnr_busy_db": round(psnr(model, pictures.busy(held, torch.Generator(device).manual_seed(2))), 2),
        "scaling_factor": model.config.scaling_factor,
        "shift_factor": model.config.shift_factor,
        "channel_deviations": deviations,
    }
    return model, figures


def on_white(rows: Tensor) -> Tensor:
    """The same icons as plain drawings: 112 px, centred, white ground, untinted."""
    plain = rows.clone()
    plain[:, 1], plain[:, 2:4], plain[:, 4], plain[:, 5:11], plain[:, 11] = 0, 8, 0, 255, 0
    return plain


def build_pool(
    model: AutoencoderTiny, pictures: Pictures, splits: list[str], tokens: dict[str, np.ndarray], empty: Tensor, text: TextEncoder
) -> Pool:  # fmt: skip
    """Encodes the rows and captions of ``splits`` once; everything stays on the device in bf16."""
    count, device = sum(len(pictures.rows[split]) for split in splits), empty.device
    latents = torch.empty(count, 16, 16, 16, dtype=torch.bfloat16, device=device)
    states = torch.empty(count, len(empty), 384, dtype=torch.bfloat16, device=device)
    pooled = torch.empty(count, 384, dtype=torch.bfloat16, device=device)
    start = 0
    for split in splits:
        rows, ids = pictures.rows[split], torch.from_numpy(tokens[split]).to(device)
        for at in range(0, len(rows), 1024):
            here = slice(start + at, start + min(at + 1024, len(rows)))
            latents[here] = encode(model, pictures.paint(split, rows[at : at + 1024]))
            states[here], pooled[here] = text.embed(ids[at : at + 1024])
        start += len(rows)
    empty_states, empty_pooled = text.embed(empty[None])
    return Pool(latents, states, pooled, empty_states[0].bfloat16(), empty_pooled[0].bfloat16())


def save_grid(pictures: Tensor, columns: int, path: Path) -> None:
    """[B, 3, H, W] in [-1, 1] -> PNG, row by row, with a thin gray gap."""
    padded = torch.nn.functional.pad(pictures.float().cpu(), (0, 4, 0, 4), value=0.4)
    rows = [torch.cat(list(padded[at : at + columns]), 2) for at in range(0, len(padded), columns)]
    width = max(row.shape[2] for row in rows)
    rows = [torch.nn.functional.pad(row, (0, width - row.shape[2]), value=0.4) for row in rows]
    Image.fromarray(frames(torch.cat(rows, 1)[None])[0]).save(path)


def write_pictures(path: Path, pictures: Tensor) -> None:
    """[B, 3, H, W] in [-1, 1] -> a zip of lossless WebP files ``0000.webp`` ..."""

    def packed(frame: np.ndarray) -> bytes:
        memory = io.BytesIO()
        Image.fromarray(frame).save(memory, "WEBP", lossless=True, method=2)
        return memory.getvalue()

    with ThreadPoolExecutor() as threads, zipfile.ZipFile(path.with_suffix(".new"), "w") as archive:
        for i, content in enumerate(threads.map(packed, frames(pictures))):
            archive.writestr(f"{i:04d}.webp", content)
    path.with_suffix(".new").replace(path)


def write_held_out(
    out: Path, averaged: FluxTransformer2DModel, model: AutoencoderTiny, pool: Pool, pictures: Pictures, captions: list[str],
    count: int, steps: int,
) -> None:  # fmt: skip
    """For the scores: ``count`` held-out captions, their true pictures, and the drawn ones at several guidances."""
    (out / "held_out.json").write_text(json.dumps(captions[:count]) + "\n")
    write_pictures(out / "held_out_real.zip", pictures.paint("name", pictures.rows["name"][:count]))
    for guidance in GUIDANCES:
        drawn = []
        for at in range(0, count, 256):
            here = slice(at, min(at + 256, count))
            latents = sample(averaged, pool, pool.states[here], pool.pooled[here], steps, guidance, at)
            drawn.append(decode(model, latents))
        write_pictures(out / f"held_out_g{guidance}.zip", torch.cat(drawn))


def export(
    out: Path, trainer: Trainer, model: AutoencoderTiny, pools: dict[str, Pool], material: Material, text: TextEncoder,
    pictures: Pictures, steps: int,
) -> dict:  # fmt: skip
    """Weights, pictures to look at, and the losses of the EMA weights."""
    device, rows = trainer.device, pictures.rows
    averaged = trainer.averaged()
    copy.deepcopy(averaged).to(torch.bfloat16).save_pretrained(out / "transformer")
    # half keeps three more bits than bfloat16, and the decoder's values are small; NCHW as diffusers writes it
    copy.deepcopy(model).to(torch.float16, memory_format=torch.contiguous_format).save_pretrained(out / "vae")
    trainer.model.load_state_dict(trainer.ema)
    trainer.forward = trainer.model
    with torch.no_grad():
        losses = {
            split: round(torch.cat([trainer.loss(trainer.draw(pool, 10**12 + i)) for i in range(4)]).mean().item(), 5)
            for split, pool in pools.items()
        }
    states, pooled = text.embed(torch.from_numpy(material.prompt_tokens[:-1]).to(device))
    prompts = decode(model, sample(averaged, pools["train"], states, pooled, steps, GUIDANCE, 0))
    save_grid(prompts, 8, out / "samples.png")
    for split in ("name", "photo"):
        held = pools[split]
        drawn = sample(averaged, held, held.states[:24], held.pooled[:24], steps, GUIDANCE, 0)
        pairs = zip(pictures.paint(split, rows[split][:24]).split(8), decode(model, drawn).split(8), strict=True)
        save_grid(torch.cat([part for pair in pairs for part in pair]), 8, out / f"held_out_{split}.png")
    truth = [pictures.paint("name", rows["name"][:16]), pictures.paint("photo", rows["photo"][:8])]
    truth = torch.cat([*truth, pictures.busy(rows["train"][:16], torch.Generator(device).manual_seed(3))])
    pairs = zip(truth.split(8), decode(model, encode(model, truth)).split(8), strict=True)
    save_grid(torch.cat([part for pair in pairs for part in pair]), 8, out / "autoencoder.png")
    count = min(1024, len(rows["name"]))
    write_held_out(out, averaged, model, pools["name"], pictures, material.captions["name"], count, steps)
    return losses


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", type=Path, nargs="+", required=True, help="icon records, JSON lines, gzip")
    parser.add_argument("--photos", type=Path, required=True, help="zip with metadata.jsonl, see photos.py")
    parser.add_argument("--text", type=Path, required=True, help="folder written by minilm.reduce_encoder")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="export")
    parser.add_argument("--minutes", type=float, required=True, help="wall clock of this call, everything included")
    parser.add_argument("--later-minutes", type=float, default=0.0, help="training minutes planned in later calls")
    parser.add_argument("--autoencoder", type=Path, help="an exported autoencoder to keep, instead of training one")
    parser.add_argument("--start-from", type=Path, help="an exported transformer whose weights training starts from")
    parser.add_argument("--drop-single", type=int, default=0, help="the single block of it that is left out")
    parser.add_argument("--learning-rate", type=float, default=TransformerSettings.learning_rate)
    parser.add_argument(
        "--decay", type=float, default=TransformerSettings.decay, help="share of the run that cools down"
    )
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--autoencoder-seconds", type=float, default=AutoencoderSettings.seconds)
    parser.add_argument("--pool", type=int, default=1_100_000, help="scenes in the training pool")
    parser.add_argument("--pool-seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=2048, help="scenes per held-out split")
    parser.add_argument("--limit", type=int, default=None, help="use about so many icons, evenly spaced")
    parser.add_argument("--batch", type=int, default=TransformerSettings.batch)
    parser.add_argument(
        "--muon-rate", type=float, default=TransformerSettings.muon_rate, help="0: AdamW for everything"
    )
    parser.add_argument("--steps", type=int, default=None, help="stop both trainings after so many steps")
    parser.add_argument("--sample-steps", type=int, default=25)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--no-graph", action="store_true", help="launch each kernel instead of replaying a CUDA graph")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def load_or_make_autoencoder(
    arguments: argparse.Namespace,
    settings: AutoencoderSettings,
    pictures: Pictures,
    log: Log,
) -> tuple[AutoencoderTiny, dict]:
    """The work folder's autoencoder when resuming, else a new one, saved there."""
    if arguments.autoencoder:
        model = AutoencoderTiny.from_pretrained(arguments.autoencoder, torch_dtype=torch.float32)
        return model.to(arguments.device, memory_format=torch.channels_last).eval(), {"kept": True}
    path = arguments.work / "autoencoder.pt"
    if arguments.resume and path.exists():
        content = torch.load(path, weights_only=True)
        figures = content["figures"]
        model = build_autoencoder(figures["scaling_factor"], figures["shift_factor"])
        model.load_state_dict(content["state"])
        return model.to(arguments.device, memory_format=torch.channels_last).eval(), figures
    model, figures = make_autoencoder(pictures, settings, arguments.device, not arguments.eager, log)
    torch.save({"state": model.state_dict(), "figures": figures}, path)
    return model, figures


def make_trainer(arguments: argparse.Namespace) -> Trainer:
    """Compiled and captured, with the weights to start from."""
    settings = replace(
        TransformerSettings(),
        batch=arguments.batch,
        steps=arguments.steps,
        muon_rate=arguments.muon_rate,
        learning_rate=arguments.learning_rate,
        decay=arguments.decay,
    )
    trainer = Trainer(settings, arguments.device, not arguments.eager, not arguments.no_graph)
    if arguments.start_from:
        trainer.start_from(shortened(arguments.start_from, arguments.drop_single))
    trainer.prepare()
    return trainer


def main() -> None:
    started = time.perf_counter()
    arguments = parse_arguments()
    stages: dict[str, float] = {}

    def log(message: str) -> None:
        print(f"[{time.perf_counter() - started:7.1f}] {message}", flush=True)

    def stage(name: str) -> None:
        stages[name] = round(time.perf_counter() - started, 1)
        log(f"done: {name}")

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive the forks of prepare
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = TextEncoder(arguments.text)
    handed_over = arguments.work / "material.pickle"
    preparing = multiprocessing.get_context("fork").Process(target=prepare_into, args=(arguments, text, handed_over))
    preparing.start()  # before CUDA starts, and beside the compiler
    device = arguments.device
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails with torch 2.11 on Hopper (illegal memory access)
    trainer = make_trainer(arguments)
    stage("compile")
    preparing.join()
    if preparing.exitcode:
        raise RuntimeError("preparing the pictures failed; its own message is above")
    with handed_over.open("rb") as file:
        material = pickle.load(file)
    handed_over.unlink()
    stage("render")
    pictures = Pictures(
        [torch.from_numpy(part).to(device) for part in material.pixels],
        torch.from_numpy(material.photos).to(device),
        {split: torch.from_numpy(part).to(device) for split, part in material.rows.items()},
    )
    settings = AutoencoderSettings(
        seconds=arguments.autoencoder_seconds,
        steps=arguments.steps,
        batch=min(arguments.batch, AutoencoderSettings.batch),
    )
    model, figures = load_or_make_autoencoder(arguments, settings, pictures, log)
    stage("autoencoder")
    log(json.dumps(figures))
    text.load(device)
    empty = torch.from_numpy(material.prompt_tokens[-1]).to(device)
    parts = {"train": ["train", "photo train"]} | {
        split: [split] for split in ("name", "style", "photo") if split in material.rows
    }
    pools = {name: build_pool(model, pictures, splits, material.tokens, empty, text) for name, splits in parts.items()}
    stage("pool")
    checkpoint = arguments.work / "transformer.pt"
    if arguments.resume and checkpoint.exists():
        trainer.load(checkpoint)
    left = arguments.minutes * 60 - (time.perf_counter() - started) - EXPORT_SECONDS
    trainer.train(pools["train"], left, arguments.later_minutes * 60, checkpoint, log)
    stage("transformer")
    losses = export(arguments.out, trainer, model, pools, material, text, pictures, arguments.sample_steps)
    stage("export")
    write_result(arguments, material, figures, trainer, losses, stages)


def write_result(
    arguments: argparse.Namespace, material: Material, figures: dict, trainer: Trainer, losses: dict, stages: dict
) -> None:
    """``result.json``: what was made, when, of what, how good."""
    cuda = torch.cuda.is_available()
    progress, settings = trainer.progress, trainer.settings
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "pictures": {split: len(np.unique(part[:, 0])) for split, part in material.rows.items()},
        "scenes": {split: len(part) for split, part in material.rows.items()},
        "held_out_styles": HELD_OUT_STYLES,
        "example_captions": material.captions["train"][:24],
        "autoencoder": figures,
        "transformer": {
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "settings": asdict(settings),
            "steps": progress.step,
            "samples_seen": progress.step * settings.batch,
            "training_seconds": round(progress.seconds, 1),
            "ema_loss": losses,
            "curve_step_seconds_loss_rate": progress.losses,
        },
        "sampling": {"steps": arguments.sample_steps, "guidance": GUIDANCE, "prompts": PROMPTS[:40]},
        "held_out_captions": material.captions.get("name", [])[:24],
        "stages_end_seconds": stages,
        "sources": {
            name: {"author": a, "license": b, "icons": n} for name, (a, b, n) in sorted(material.licences.items())
        },
        "cuda_memory_peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if cuda else None,
    }
    (arguments.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
