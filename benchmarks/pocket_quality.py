"""How good the embedded base is on captions of held-out names: distance, retrieval, autoencoder, memorisation.

    python benchmarks/pocket_quality.py --icons icons.jsonl.gz mdi.jsonl.gz --out benchmarks/results/pocket_quality.json

Draws `--images` scenes of names that training never saw (pretrain/icons.py: about 4 % of the names, in no style), asks the
shipped base for their captions, and compares: KID and FD on Lite0 features, recall of the caption's image, the
autoencoder's PSNR, and whether drawn pictures lie nearer to training scenes than real held-out ones do. For scale, the
real pictures at half and quarter resolution. `--profile` chooses the weights; `--pictures ZIP` measures pictures that
`pretrain/pocket.py` has drawn (held_out_g3.0.zip) instead. Drawing is resumable in `--work`.
"""

import argparse
import io
import json
import os
import sys
import zipfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pretrain"))
from captions import draw_scenes
from composite import composite, frames
from icons import Icon, read_icons, render_icons, sampling_weights, split_of
from material import split_seed
from prompts import PROMPTS

from loragraft.backbones.load import load_backbone
from loragraft.backbones.minilm import MiniLMEncoder
from loragraft.backbones.spec import Backbone
from loragraft.data.cache import default_cache_root
from loragraft.disk import write_atomic
from loragraft.evaluation import measure
from loragraft.evaluation.features import lite0_features, load_lite0
from loragraft.evaluation.image_sets import ImageSet, device_name, read_images, render_missing
from loragraft.evaluation.metrics import kernel_distance, mean_interval, psnr
from loragraft.evaluation.retrieval import load_towers, text_features


def scenes(icons: list[Icon], split: str, count: int) -> tuple[Tensor, list[str]]:
    """`count` scenes of a split of pool 0 -> pictures [N, 3, 128, 128] in [-1, 1], captions. Renders the drawn icons only."""
    weights = sampling_weights(icons)
    members = [i for i, icon in enumerate(icons) if split_of(icon) == split]
    if split == "train":  # far more than are drawn here
        members = members[:: max(1, len(members) // (2 * count))]
    chosen = [icons[i] for i in members]
    pixels, stats = render_icons(chosen, processes=1)
    seen = [i for i, stat in enumerate(stats) if stat.solid > 0]
    rows, captions = draw_scenes(chosen, stats, [weights[i] for i in members], seen, count, split_seed(split, 0))
    glyphs = [torch.from_numpy(part) for part in pixels]
    return torch.cat([composite(glyphs, part) for part in torch.from_numpy(rows).split(256)]), captions


def as_images(pictures: Tensor) -> list[Image.Image]:
    """[N, 3, H, W] in [-1, 1] -> PIL."""
    return [Image.fromarray(frame) for frame in frames(pictures)]


def blurred(images: list[Image.Image], factor: int) -> list[Image.Image]:
    """Halved or quartered and back: what lost detail costs."""
    size = images[0].size
    small = (size[0] // factor, size[1] // factor)
    return [image.resize(small, Image.Resampling.BICUBIC).resize(size, Image.Resampling.BICUBIC) for image in images]


def autoencoder_psnr(backbone: Backbone, pictures: Tensor) -> dict[str, float]:
    """Mean PSNR in dB of decode(encode(x)), with its interval."""
    vae = backbone.encoders.pipeline_parts["vae"]
    values = []
    for part in pictures.split(16):
        latents = backbone.encoders.encode_images(part)
        raw = latents / vae.config.scaling_factor + vae.config.shift_factor
        values.append(psnr((vae.decode(raw).sample.clamp(-1, 1) + 1) / 2, (part + 1) / 2))
    return asdict(mean_interval(torch.cat(values).clamp(max=60)))


def drawn(
    args: argparse.Namespace, backbone: Backbone, captions: list[str]
) -> tuple[list[Image.Image], dict[str, Any]]:
    """The base's pictures for the captions, and how they were made."""
    if args.pictures:
        with zipfile.ZipFile(args.pictures) as archive:
            names = sorted(archive.namelist())[: args.images]
            images = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in names]
        return images, {"pictures": args.pictures.name, "weights": "16bit, as pretrain/pocket.py drew them"}
    entry = ImageSet(
        name="held-out",
        prompts=tuple(captions),
        count=args.images,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
    )
    folder = render_missing(backbone, [entry], args.work)["held-out"]
    paths = [folder / f"{i:04d}.png" for i in range(args.images)]
    made = {"weights": args.profile, "steps": args.steps, "guidance": args.guidance, "seed": args.seed}
    return read_images(paths), made


def draw_grid(args: argparse.Namespace, backbone: Backbone) -> None:
    """Ten by ten, in the order of the prompts, nothing chosen."""
    entry = ImageSet(name="grid", prompts=PROMPTS, count=len(PROMPTS), seed=0, steps=args.steps, guidance=args.guidance)
    folder = render_missing(backbone, [entry], args.work)["grid"]
    pictures = read_images([folder / f"{i:04d}.png" for i in range(len(PROMPTS))])
    edge = pictures[0].width + 2
    sheet = Image.new("RGB", (10 * edge, -(-len(pictures) // 10) * edge), "#cccccc")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % 10 * edge + 1, i // 10 * edge + 1))
    args.grid.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.grid)


@torch.no_grad()
def main() -> int:
    """Draws, measures, writes the JSON, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", type=Path, nargs="+", required=True, help="icon records, JSON lines, gzip")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=default_cache_root() / "pocket-quality")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--train-scenes", type=int, default=3000, help="looked through for copies")
    parser.add_argument("--profile", choices=("native", "interchange", "16bit"), default="native")
    parser.add_argument("--pictures", type=Path, help="a zip of pictures drawn for the same captions")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", type=Path, help="also draw the hundred prompts of pretrain/prompts.py, ten by ten")
    parser.add_argument("--commit", default="", help="commit of the code that runs")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    icons = read_icons(args.icons)
    pictures, captions = scenes(icons, "name", args.images)
    profile = None if args.profile == "16bit" else args.profile
    backbone = load_backbone("pocket", profile, device, default_cache_root())
    if args.grid:
        draw_grid(args, backbone)
    images, made = drawn(args, backbone, captions)
    real_images = as_images(pictures)
    network = load_lite0(device)
    generated, real = lite0_features(network, images), lite0_features(network, real_images)
    towers, about = load_towers()
    gallery = measure.gallery_of(captions, towers.embed_text(text_features(MiniLMEncoder(), captions)))
    found, found_real = (measure.hits(gallery, towers, features) for features in (generated, real))
    train = lite0_features(network, as_images(scenes(icons, "train", args.train_scenes)[0]))
    result = {
        "base": "pocket",
        "base_id": backbone.base_id,
        **made,
        "captions": "held-out names, one scene each draw, fillers included",
        "images": len(images),
        "measured_on": f"{device_name(torch.device(device))}, {os.cpu_count()} cores",
        "versions": {package: version(package) for package in ("torch", "diffusers")},
        "commit": args.commit,
        "command": "python benchmarks/pocket_quality.py --icons ICONS... --out benchmarks/results/pocket_quality.json",
        "drawn": measure.measure_set(generated, real, found),
        "floors": measure.floors(real, found_real, args.seed),
        "kid_of_blurred_real": {
            f"1/{factor}": kernel_distance(lite0_features(network, blurred(real_images, factor)), real)
            for factor in (2, 4)
        },
        "retrieval": {"gallery": gallery.size, "chance": gallery.chance, "projection_date": about["date"]},
        "shuffled_captions": measure.shuffled(gallery, towers, generated, args.seed),
        "autoencoder_psnr_db": autoencoder_psnr(backbone, pictures[:256]),
        "memorisation": {"training_scenes": len(train), **measure.memory(generated, real, train).to_dict()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
